"""Checkpoint files: tensors and plain values, written atomically, read without running any code in them."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from runs import RunError
from runs.files import atomic_file, remove_temporaries, write_atomically

# The keys of a checkpoint that a run can resume from.
STATE = tuple("model optimizer scheduler scaler ema sampler rng epoch step best history config".split())


class DamagedError(RunError):
    """A checkpoint that is not whole."""


def save_checkpoint(state: dict, path: Path) -> None:
    """Write tensors and plain values as `atomic_file` does. Raises WriteError."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running code in it. Raises DamagedError for anything that is not a whole checkpoint.

    Other projects' files hold the weights under "state_dict" or alone; here they are always under "model".
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        # torch.load does not verify checksums and would return numbers in which some bits have changed.
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {part}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        reason = (
            "it holds more than tensors and plain values" if "Unsupported" in str(error) else "damaged, or another kind of file"
        )
        raise DamagedError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    if "model" in state:
        return state
    return {"model": state.get("state_dict", state)}


def load_run_state(path: Path) -> dict:
    """Read a checkpoint that a run can resume from. Raises DamagedError."""
    state = load_checkpoint(path)
    missing = [name for name in STATE if name not in state]
    if missing or not isinstance(state["config"], dict):
        raise DamagedError(f"{path} is not the state of a run: it holds no {', '.join(missing) or 'options'}")
    return state


def evaluated_weights(source: Path) -> dict:
    """The weights that a checkpoint's metrics belong to: the averaged ones if there are any. Raises RunError."""
    state = load_checkpoint(source)
    weights = state.get("ema") or state["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise RunError(f"{source} is not a checkpoint: its model is not tensors by name")
    # Prefixes that DistributedDataParallel and torch.compile add in files of other projects.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.items()}


def load_state(model: nn.Module, weights: dict) -> None:
    """Load a state dict of exactly this architecture. Raises ValueError that names the first difference."""
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            raise ValueError(f"of another architecture: it has no {name}")
        if weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(value.shape)} here"
            raise ValueError(f"of another architecture or number of classes: {name} is {shapes}")
    for name in weights:
        if name not in own:
            raise ValueError(f"of another architecture: this model has no {name}")
    model.load_state_dict(weights)


def load_weights(
    model: nn.Module, source: Path, load: Callable[[nn.Module, dict], None] = load_state, flag: str = "--checkpoint"
) -> None:
    """Load the weights of the checkpoint that `flag` names; `load` puts a state dict into the model or raises ValueError.

    Raises RunError if the file cannot be read or the weights do not fit.
    """
    weights = evaluated_weights(source)
    try:
        load(model, weights)
    except ValueError as error:
        raise RunError(f"{flag}: {source} is {error}") from None


def export_weights(path: Path, weights: dict) -> None:
    """Write a state dict as safetensors, for sharing. Raises WriteError."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    write_atomically(path, save({name: value.contiguous() for name, value in weights.items()}))


def export_onnx(path: Path, model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Write the model, in eval mode, as ONNX: input `images` (batch, channels, height, width), output `logits`.

    Raises WriteError. A graph of plain operators: nothing of this project is needed to run it.
    """
    model = copy.deepcopy(model).cpu().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *image_shape),),  # one image would be taken for a constant
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    write_atomically(path, program.model_proto.SerializeToString())


# ---------------------------------------------------------------------------------------------------------------
# Random numbers: the part of a checkpoint that belongs to no object
# ---------------------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict:
    """The states of the generators a run draws from; data order and augmentation are functions of the seed instead."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore what `random_state` returned; a device that the checkpoint's run did not use keeps its state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
