#!/usr/bin/env bash
# One training on all GPUs of a SLURM job, on one or several nodes:
#
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm_train.sh vit_main.py --config configs/vit_tiny_convnn.yaml --output_dir Output/a
#
# The output folder and the data must be visible on all nodes. Three minutes before its time limit the job saves, is
# requeued and resumes (--resume is added below). Give --time, --partition and other options to sbatch, or set them here.
# PROCESSES sets the processes per node (default: its GPUs, else one), PYTHON the interpreter.
#
#SBATCH --job-name=convnn
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -u

: "${SLURM_JOB_ID:?is not set: start this script by sbatch}"
if [ $# -eq 0 ]; then
    echo "usage: sbatch [options] scripts/slurm_train.sh vit_main.py|allconvnet_main.py [flags]" >&2
    exit 2
fi
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first_node:$((20000 + SLURM_JOB_ID % 20000))" \
    "$@" --resume &
step=$!

# srun passes the signal to torchrun on every node, and that to its processes, which save at one step and end.
again=
trap 'again=yes; kill -TERM "$step"' USR1
trap 'kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before srun has ended
    wait "$step" || status=$?
done
if [ -n "$again" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
