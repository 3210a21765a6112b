"""Several processes that train one model, by gloo on this machine, and the signals that stop a run."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vit_main
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from runs import RunError
from runs.processes import Interrupted, Processes, Signals
from tests.helpers.forked import Forked

ROOT = Path(__file__).parent.parent.parent


def start(command, rank=0, world=1, port=0, **more):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # what torchrun starts has one thread, as forks have
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return Forked(command, cwd=ROOT, env=environment | more)


def start_both(*command, **more):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(command, rank, 2, port, **more) for rank in range(2)]


HANG = 900  # seconds after which a test gives up: far more than anything takes on a busy machine


def finish(processes):
    """(exit status, stdout, stderr without the lines of progress that there are on a slow machine) of each."""
    try:
        outputs = [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (p.returncode, out, re.sub(r"(?m)^epoch .* ETA .*\n", "", err))
        for p, (out, err) in zip(processes, outputs, strict=True)
    ]


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_ends_at_once_what_has_nothing_to_save():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", Signals.NUMBERS)
def test_a_signal_waits_for_the_end_of_a_step(number):
    with Signals() as signals, signals.deferred():
        assert signals.received == 0
        signal.raise_signal(number)
        assert signals.received == number


TWICE = """
import os, signal, sys, time
from runs.processes import Signals
with Signals() as signals, signals.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun passes on what its processes may have had themselves
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here", flush=True)
        while True:  # which must end it some time
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(3600)
"""


@pytest.mark.parametrize("launcher", ["", "torchrun"])
def test_a_second_signal_ends_the_process(launcher):
    more = {"TORCHELASTIC_RUN_ID": "x"} if launcher else {}
    ((status, out, err),) = finish([start(["-c", TWICE], **more)])
    number = signal.SIGTERM if launcher else signal.SIGINT
    assert (status, out, err) == (128 + number, "still here\n" if launcher else "", "")


WAITING = """
import contextlib, datetime, sys, torch.distributed as dist
from runs.processes import Signals
Signals.STUCK = 0.5
with Signals() as signals, signals.deferred() if sys.argv[1] == "2" else contextlib.nullcontext():
    print("here", flush=True)
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=datetime.timedelta(seconds=1800))
    print("waiting", flush=True)
    store.wait(["what never comes"])
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_end_a_process_that_waits_inside_a_library(signals):
    """Where no handler of Python runs: the first one if there is nothing to save, else the second."""
    process = start(["-c", WAITING, str(signals)])
    while process.stdout.readline() != "waiting\n":
        pass
    time.sleep(0.5)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    ((status, _, _),) = finish([process])
    assert status == 143


# --- one process, and the environment -------------------------------------------------------------------------------


def test_one_process_needs_nobody():
    with Processes() as alone:
        alone.connect(torch.device("cpu"))
        tensor = torch.ones(3)
        assert alone.first and alone.agree(5, 0) == [5, 0] and alone.gather("x") == ["x"]
        assert alone.sum_(tensor) is tensor and alone.maximum_(tensor) is tensor and tensor.tolist() == [1] * 3
        alone.share([tensor])
        with alone.first_of_machine_first():
            alone.wait()
        model = torch.nn.Linear(1, 1)
        assert alone.parallel(model) is model and not torch.distributed.is_initialized()


def test_environment(monkeypatch):
    assert Processes.from_environment().world == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"WORLD_SIZE=2 .*RANK, LOCAL_RANK, MASTER_ADDR.*torchrun"):
        Processes.from_environment()
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    found = Processes.from_environment()
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(RunError, match=r"RANK=4 WORLD_SIZE=4 LOCAL_RANK=1 are not"):
        Processes.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(RunError, match="WORLD_SIZE=abc"):
        Processes.from_environment()
    assert (found.rank, found.world, found.local_rank, found.first) == (3, 4, 1, False)


# --- two processes against one --------------------------------------------------------------------------------------

SAME_AS_ONE = """
import math, sys
import numpy as np, torch
from dataset import DeviceBatches, Recipe
from options.allconvnet import AllConvNetConfig
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from options.training import TrainConfig
from options.vit import ViTConfig
from tests.helpers.pools import pool_of
from allconvnet import AllConvNet
from vit import ViT
from runs.processes import Processes, Signals
from runs import Stopped
from runs.optimization import make_loss
from runs.training import Training
import train_eval
from train_eval import evaluate, train_one_epoch, train_step

CPU = torch.device("cpu")
SMALL = dict(image_size=8, patch_size=2, in_channels=1, num_layers=2, num_heads=2, d_model=8, d_mlp=8, dropout=0.0,
             attention_dropout=0.0, K=4, kernel_size=3, hybrid_dilations=(1,), nystrom_landmarks=4)
loss_function = make_loss("CrossEntropy")
result = {}

def batches(part, processes, batch_size=7, n=43):  # 43 = 6 x 7 + 1: the last batch leaves a process without images
    labels = np.arange(n) % 10
    images = np.random.default_rng(0).integers(0, 255, (n, 1, 8, 8)).astype(np.uint8)
    recipe = Recipe("digits", part, batch_size, 0, 8, CPU, rank=processes.rank, world=processes.world)
    return DeviceBatches(images, labels, np.arange(n), recipe)

def training(processes, model, **options):
    config = TrainConfig(batch_size=7, num_epochs=2, lr=0.01, **options)
    return Training(model, config, CPU, 7, processes)

class Exact(ViT):
    # In float64 up to the logits: one process and two differ in the order of their sums only.
    def forward(self, images):
        return super().forward(images.double())

losses = []

def recorded(training, *args):
    train_step(training, *args)
    losses.append(training.meter.read(training.processes.sum_(training.meter.sums.clone())).loss)

with Signals(), Processes.from_environment() as processes:
    processes.connect(CPU)
    for accumulate in (1, 3):
        torch.manual_seed(0)
        config = TrainConfig(batch_size=7, num_epochs=2, lr=0.1, optimizer="sgd", accumulate_steps=accumulate)
        run = Training(Exact(ViTConfig(**SMALL)).double(), config, CPU, 7, processes)
        train_eval.train_step = recorded
        train_one_epoch(run, batches("train", processes), loss_function)
        train_eval.train_step = train_step
        result[f"losses {accumulate}"], losses = losses, []
        result[f"weights {accumulate}"] = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        result["gradient is known to all"] = all(p.grad is not None for p in run.parameters)
    torch.manual_seed(1)
    model = ViT(ViTConfig(**SMALL))
    for size in (7, 50):
        rest = {"device": CPU, "processes": processes}
        result[f"evaluation {size}"] = list(evaluate(model, batches("test", processes, size), loss_function, **rest))
    # Every layer under DDP, whose second step fails if a parameter had no gradient in the first.
    for name in LAYERS1D_NAMES:
        torch.manual_seed(2)
        run = training(processes, Exact(ViTConfig(**SMALL, layer=name, pool=pool_of(name))).double())
        for images, labels in batches("train", processes, n=14).epoch(0):
            train_step(run, images, labels, loss_function, 7)
            if run.step == 1:
                result[f"layer {name}"] = torch.cat([p.grad.flatten() for p in run.parameters])
    for name in (*LAYERS2D_NAMES, "Conv2d/ConvNN"):
        model = AllConvNet(AllConvNetConfig(layer=name, channels=(8, 8), K=4, image_size=8, in_channels=1))
        run = training(processes, model, ema_decay=0.5)
        train_one_epoch(run, batches("train", processes), loss_function)
        run.share_statistics()
        result[f"buffers {name}"] = [v.float() for m in (run.model, run.eval_model) for v in m.state_dict().values()]
    if processes.world > 1:  # wishes of any process, one call later, on all
        result["agreed"] = [processes.agree(3 * processes.rank + t, 0, 0) for t in range(3)]
        processes.agree()
        result["gathered"] = processes.gather(processes.rank)
        # A process with a loss that is not finite stops all, with the weights before that step.
        run = training(processes, ViT(ViTConfig(**SMALL)), ema_decay=0.5)
        before = []
        def faulty(logits, labels):
            bad = processes.rank == 1 and run.step == 3
            if run.step == 3 and not before:
                before.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]).clone())
            return loss_function(logits, labels) * (math.nan if bad else 1.0)
        try:
            train_one_epoch(run, batches("train", processes), faulty)
        except Stopped as error:
            result["error"] = str(error)
        result["before"] = before[0]
        result["after"] = torch.cat([p.detach().flatten() for p in run.model.parameters()])
torch.save(result, sys.argv[1] + f"/{processes.world}-{processes.rank}.pt")
"""


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    alone = start(["-c", SAME_AS_ONE, str(folder)])
    for status, _, err in finish([alone, *start_both("-c", SAME_AS_ONE, str(folder))]):
        assert status == 0, err
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train_as_one_with_the_same_total_batch(one_and_two, accumulate):
    alone, first, second = one_and_two.values()
    losses = alone[f"losses {accumulate}"]
    assert len(losses) == 7 and len(set(losses)) == 7
    assert first[f"losses {accumulate}"] == pytest.approx(losses, abs=1e-6)
    assert second[f"losses {accumulate}"] == first[f"losses {accumulate}"]
    assert torch.equal(first[f"weights {accumulate}"], second[f"weights {accumulate}"])
    torch.testing.assert_close(first[f"weights {accumulate}"], alone[f"weights {accumulate}"], atol=1e-7, rtol=0)
    assert first["gradient is known to all"]


@pytest.mark.parametrize("size", [7, 50])
def test_evaluation_by_two_processes_is_exactly_that_of_one(one_and_two, size):
    """43 images: an odd number of batches, or one batch for two processes."""
    alone, first, second = (run[f"evaluation {size}"] for run in one_and_two.values())
    assert alone == first == second and alone[0] > 0


def test_every_layer_has_the_gradient_of_one_process(one_and_two):
    alone, first, second = one_and_two.values()
    layers = [name for name in alone if name.startswith("layer ")]
    assert len(layers) == len(LAYERS1D_NAMES)
    for name in layers:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], atol=1e-7, rtol=1e-6)


def test_statistics_of_batch_norm_are_those_of_the_first_process(one_and_two):
    alone, first, second = one_and_two.values()
    layers = [name for name in alone if name.startswith("buffers ")]
    assert len(layers) == len(LAYERS2D_NAMES) + 1  # and two side by side
    for name in layers:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


def test_wishes_are_known_to_all_one_call_later(one_and_two):
    for name in ("2-0", "2-1"):
        assert one_and_two[name]["agreed"] == [[0, 0, 0], [3, 0, 0], [4, 0, 0]]
    assert one_and_two["2-0"]["gathered"] == [0, 1] == one_and_two["2-1"]["gathered"]


def test_a_process_with_a_nan_stops_all_before_that_step(one_and_two):
    for name in ("2-0", "2-1"):
        run = one_and_two[name]
        assert "epoch 1, step 4" in run["error"] and torch.equal(run["before"], run["after"])


# --- the command line under torchrun --------------------------------------------------------------------------------

TRAIN = shlex.split(
    "vit_main.py --dataset digits --resize 8 --patch_size 2 --num_layers 2 --num_heads 2 --d_model 16 --d_mlp 16 --device cpu "
    "--batch_size 4 --train_limit 61 --test_limit 51 --num_epochs 2 --ema_decay 0.9 --mixup 0.3 --accumulate_steps 2"
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


# The command line, whose process of one rank tells itself, or torchrun, to stop in its n-th step, and waits until it knows.
STOPPED = """
import os, signal, sys, time, train_eval, vit_main
rank, step, whom = sys.argv[1:4]
original, steps = train_eval.train_step, []
def train_step(training, *args):
    steps.append(1)
    if len(steps) == int(step) and os.environ["RANK"] == rank:
        os.kill(os.getppid() if whom == "torchrun" else os.getpid(), signal.SIGTERM)
        while not training.signals.received:
            time.sleep(0.01)
    original(training, *args)
train_eval.train_step = train_step
sys.exit(vit_main.main(sys.argv[4:]))
"""


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def plain(state):
    """Return the parts that must be equal, as text: no times, no name of a folder."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in state["history"]]
    sampler = {k: v for k, v in state["sampler"].items() if k != "seconds"}
    parts = {k: state[k] for k in ("model", "optimizer", "scheduler", "ema", "rng", "epoch", "step")}
    torch.set_printoptions(profile="full", precision=17)
    try:
        return str(parts | {"history": rows, "sampler": sampler})
    finally:
        torch.set_printoptions(profile="default")


def test_a_signal_to_one_process_stops_all_at_one_step_and_they_resume_exactly(tmp_path):
    whole = start_both(*TRAIN, "--output_dir", str(tmp_path / "whole"))
    here = [*TRAIN[1:], "--output_dir", str(tmp_path / "run")]
    (first, _, message), (second, _, silent) = finish(start_both("-c", STOPPED, "1", "5", "itself", *here))
    assert (first, second) == (143, 143) and silent == ""
    assert re.fullmatch(r"stopped by SIGTERM; --resume continues from .*last.pt\n", message)
    state = state_of(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (0, 6)  # one step later it is known to all
    assert len(state["rng"]) == 2 and not torch.equal(state["rng"][0]["cpu"], state["rng"][1]["cpu"])
    assert sum(sums[3].item() for sums in state["sampler"]["sums"]) == 4 * 6  # both have counted their images of it

    assert [status for status, *_ in finish(whole)] == [0, 0]
    # The second time it is torchrun that is told to stop, and tells its processes.
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    ((status, _, error),) = finish([start([*TORCHRUN, str(script), "0", "8", "torchrun", *here, "--resume"])])
    assert status != 0 and "stopped by SIGTERM" in error
    assert state_of(tmp_path / "run")["step"] >= 6 + 8
    (first, out, error), (second, _, silent) = finish(start_both(TRAIN[0], *here, "--resume", TORCHELASTIC_RUN_ID="x"))
    assert (first, second) == (0, 0) and silent == ""
    assert f"resumed {tmp_path / 'run' / 'last.pt'}" in out and "processes trained so far" not in error
    assert plain(state_of(tmp_path / "run")) == plain(state_of(tmp_path / "whole"))
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


def test_processes_that_see_different_states_do_not_train(tmp_path):
    """As with an output folder that is not shared between machines."""
    assert vit_main.main([*TRAIN[1:], "--num_epochs", "1", "--train_limit", "8", "--output_dir", str(tmp_path / "run")]) == 0
    script = "import os, sys, vit_main, launch.prepare; find = launch.prepare.resumable_state; "
    script += "launch.prepare.resumable_state = lambda *a, **k: None if os.environ['RANK'] == '1' else find(*a, **k); "
    script += "sys.exit(vit_main.main(sys.argv[1:]))"
    line = [*TRAIN[1:], "--train_limit", "8", "--resume", "--output_dir", str(tmp_path / "run")]
    (first, _, error), (second, _, _) = finish(start_both("-c", script, *line))
    assert (first, second) == (2, 2) and error.count("\n") == 1
    assert "different states" in error and "['last.pt', 1, 0], None" in error


def test_a_process_that_fails_ends_the_others(tmp_path):
    """The second process finds no test images; the first one must not wait for it for ever."""
    script = "import sys, vit_main; import launch.prepare; "
    script += (
        "launch.prepare.load_data = lambda *a, load=launch.prepare.load_data, **k: load(*a, **k) if not k['rank'] else 1 / 0; "
    )
    script += "sys.exit(vit_main.main(sys.argv[1:]))"
    line = [*TRAIN[1:], "--output_dir", str(tmp_path / "run")]
    (first, _, message), (second, _, error) = finish(start_both("-c", script, *line))
    assert (first, second) == (1, 1)
    assert "ZeroDivisionError" in error and message == "stopped: process 0 has lost another one of 2\n"


def test_options_that_do_not_fit_several_processes(tmp_path, monkeypatch, capsys):
    """Before they meet: one line, from the first of them."""
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    errors = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            vit_main.main([*TRAIN[1:], "--batch_size", "3", "--output_dir", str(tmp_path / "run")])
        assert end.value.code == 2 and not (tmp_path / "run").exists()
        errors.append(capsys.readouterr().err)
    assert errors[1] == "" and errors[0].count("\n") == 1
    assert "--batch_size 3" in errors[0] and "2 processes of 2 micro-batches" in errors[0]


# --- on a cluster ---------------------------------------------------------------------------------------------------

# As srun does: the command once per node, signals passed on. Here the nodes are all this machine.
SRUN = """#!/usr/bin/env bash
shift
for node in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do while kill -0 "$task" 2>/dev/null; do wait "$task"; done; done
exit 143
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo localhost ;;
    requeue) echo "requeued $2" ;;
esac
"""


def test_the_script_for_a_cluster_trains_on_two_nodes_and_is_queued_again(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM"))}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    script = [str(ROOT / "scripts" / "slurm_train.sh")]
    outside = subprocess.run([*script, "vit_main.py"], env=environment, capture_output=True, text=True)
    assert outside.returncode != 0 and "sbatch" in outside.stderr
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes[1-2]"}
    command = [*script, *TRAIN, "--num_epochs", "4000", "--save_minutes", "1e-9", "--output_dir", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    end = time.monotonic() + HANG
    while not (tmp_path / "run" / "last.pt").exists():  # steps are being made
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    ((status, out, error),) = finish([job])
    assert status == 143 and f"requeued {os.getpid()}" in out and "stopped by SIGTERM; --resume continues from" in error
    state = state_of(tmp_path / "run")
    assert (state["epoch"], state["step"]) > (0, 0)
