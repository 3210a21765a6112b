"""Seeds, devices, and what computes on them.

What a run needs besides (files, checkpoints, the output folder, measurements) is in the package `runs` and can be imported from
here too.
"""

from __future__ import annotations

import os

import torch

from kernels import backend
from runs import RunError

# What could be imported from here before is offered from here still.
from runs.checkpoints import (  # noqa: F401
    STATE,
    DamagedError,
    evaluated_weights,
    load_checkpoint,
    load_state,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)
from runs.export import export_weights  # noqa: F401
from runs.files import (  # noqa: F401
    WriteError,
    as_csv,
    as_png,
    atomic_file,
    check_writable,
    remove_temporaries,
    write_atomically,
)
from runs.folder import COLUMNS, RunFolder, describe_model, draw_curves  # noqa: F401
from runs.measure import count_flops, count_parameters, device_name, flops_of, measure_latency, versions  # noqa: F401
from runs.measure import process_peak_memory as peak_memory  # noqa: F401
from runs.processes import Processes, seed_process  # noqa: F401
from runs.progress import Progress, epoch_line  # noqa: F401
from runs.resume import resumable_state  # noqa: F401


def pick_device(name: str, processes: Processes | None = None) -> torch.device:
    """The device that --device names; auto takes cuda, then mps, then cpu. Raises RunError if it is absent.

    With several processes on a machine, each has a GPU of its own.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise RunError(f"--device {name}: there is none here; use {' or '.join(d for d, there in present.items() if there)}")
    if processes is None or processes.world == 1:
        return torch.device(name)
    if name == "mps":
        raise RunError("--device mps: several processes can train on cuda or cpu")
    if name == "cuda" and processes.local_world > (count := torch.cuda.device_count()):
        raise RunError(
            f"--device cuda: more processes than GPUs on a machine; use torchrun --nproc_per_node={count}, or --device cpu"
        )
    return torch.device(name, processes.local_rank) if name == "cuda" else torch.device(name)


def choose_kernels(name: str, device: torch.device) -> None:
    """Compute by the backend that --kernels names; `auto` leaves it to CONVNN_KERNELS. Raises RunError if it is not there."""
    if name == "triton" and device.type != "cuda":
        raise RunError(f"--kernels triton needs CUDA, the device is {device.type}; use --kernels auto")
    if name == "triton" and backend.triton_kernels() is None:
        raise RunError("--kernels triton: Triton is not installed; it comes with PyTorch for CUDA on Linux")
    if name != "auto":
        backend.choose(name)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch on all devices; `deterministic` also forbids operations whose result may vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
        torch.use_deterministic_algorithms(True)
    # cuDNN's benchmark picks the fastest algorithm by timing, so another one from run to run.
    torch.backends.cudnn.benchmark = not deterministic
