"""Choose a device and the kernels that compute on it."""

import torch

from kernels import backend
from runs import RunError
from runs.processes import Processes


def pick_device(name: str, processes: Processes | None = None) -> torch.device:
    """Return the device that --device names; auto takes cuda, then mps, then cpu. Raises RunError if it is absent.

    Each process on a machine has its own GPU.
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
    """Choose the backend that --kernels names; `auto` leaves it to CONVNN_KERNELS. Raises RunError if it is absent."""
    if name == "triton" and device.type != "cuda":
        raise RunError(f"--kernels triton needs CUDA, the device is {device.type}; use --kernels auto")
    if name == "triton" and backend.triton_kernels() is None:
        raise RunError("--kernels triton: Triton is not installed; it comes with PyTorch for CUDA on Linux")
    if name != "auto":
        backend.choose(name)
