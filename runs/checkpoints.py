"""Checkpoint files: tensors and plain values, written atomically, read without running any code in them."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from runs import RunError, Stopped
from runs.files import atomic_file
from runs.memory import is_out_of_memory

# The keys of a checkpoint that a run can resume from.
STATE = tuple("model optimizer scheduler scaler ema sampler rng epoch step best history config".split())


# Where other projects' files hold the weights, and what they put before their names.
WRAPPERS = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")


class DamagedError(RunError):
    """A checkpoint that is not whole."""


def save_checkpoint(state: dict, path: Path) -> None:
    """Write tensors and plain values as `atomic_file` does. Raises Stopped."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running code in it. Raises DamagedError for anything that is not a whole checkpoint.

    Other projects' files hold the weights under one of `WRAPPERS` or alone; here they are always under "model".
    """
    if not path.is_file():
        raise DamagedError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, not a checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        # torch.load does not verify checksums and would return numbers in which some bits have changed.
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {part}")
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that `weights_in` refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        code = "it is a pickle with code, which is not run: it holds more than tensors and plain values"
        reason = code if _names_code(error, path) else "damaged, or another kind of file"
        reason = "it needs more memory than there is, or is damaged" if is_out_of_memory(error) else reason
        raise DamagedError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state | {"model": next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)}


def _names_code(error: Exception, path: Path) -> bool:
    """Whether torch.load refused a file because it would call or import something."""
    if "Unsupported operand" in str(error) and not zipfile.is_zipfile(path):  # a pickle of another protocol, or none at all
        try:
            with path.open("rb") as file:
                return any(step.name in ("GLOBAL", "STACK_GLOBAL", "INST") for step, _, _ in pickletools.genops(file))
        except Exception:  # a damaged file can raise almost anything
            return False
    words = ("Unsupported", "unsupported", "GLOBAL", "not an allowed", "unrecognized function")
    return any(word in str(error) for word in words)


def load_run_state(path: Path) -> dict:
    """Read a checkpoint that a run can resume from. Raises DamagedError."""
    state = load_checkpoint(path)
    missing = [name for name in STATE if name not in state]
    if missing or not isinstance(state["config"], dict):
        raise DamagedError(f"{path} is not the state of a run: it holds no {', '.join(missing) or 'options'}")
    if wrong := _contradiction(state):
        raise DamagedError(f"{path} is not the state of a run: its {wrong}")
    return state


def _contradiction(state: dict) -> str:
    """What in the state of a run cannot be, as somebody who edited it may have left it; its checksums are right."""
    for name in ("epoch", "step"):
        if type(state[name]) is not int or state[name] < 0:
            return f"{name} is {state[name]!r}"
    history, best, sampler = state["history"], state["best"], state["sampler"]
    if not (isinstance(history, list) and all(isinstance(row, dict) for row in history) and isinstance(best, dict)):
        return "history or best epoch is no table"
    if [row.get("epoch") for row in history] != list(range(1, state["epoch"] + 1)) or (history and best not in history):
        return f"history does not lead to epoch {state['epoch']}"
    if not isinstance(sampler, dict) or not all(isinstance(sampler.get(name), (int, float)) for name in ("seconds", "lr")):
        return "times and learning rate are no numbers"
    if not (isinstance(state["rng"], list) and state["rng"]):
        return "random states are missing"
    return ""


def evaluated_weights(source: Path) -> dict:
    """The weights that a checkpoint's metrics belong to: the averaged ones if there are any. Raises RunError."""
    return weights_in(load_checkpoint(source), source)


def weights_in(state: dict, source: Path) -> dict:
    """Of what `load_checkpoint` has read from this file. Raises RunError."""
    average = state.get("ema")
    weights = average if isinstance(average, dict) and average else state["model"]
    if average is not None and not isinstance(average, dict):
        raise RunError(f"{source} is not a checkpoint: its ema is a {type(average).__name__}, not tensors by name")
    if not all(isinstance(name, str) for name in weights):
        raise RunError(f"{source} is not a checkpoint: its tensors have no names but {next(iter(weights))!r}")
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise RunError(f"{source} is not a checkpoint: its model is not tensors by name")
    for name, value in weights.items():
        kinds = {"quantized": value.is_quantized, "without data (meta)": value.is_meta}
        kinds |= {"sparse": value.layout != torch.strided, "of complex numbers": value.is_complex()}
        for kind, holds in kinds.items():
            if holds:
                raise RunError(f"{source} cannot be used: {name} is {kind}; save it as a dense tensor of real numbers")
    plain = {_plain_name(name): value for name, value in weights.items()}
    if len(plain) < len(weights):
        name = next(name for name in weights if _plain_name(name) != name and _plain_name(name) in weights)
        raise RunError(f"{source} cannot be used: it holds {_plain_name(name)} twice, also as {name}; save it with one of them")
    return plain


def _plain_name(name: str) -> str:
    """Without the prefixes that DistributedDataParallel and torch.compile add in files of other projects, in any order."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def check_finite_weights(weights: dict, source: Path) -> None:
    """Raise Stopped, which names the first tensor, if there is a NaN or an infinity among them."""
    names = [name for name, value in weights.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if names:
        more = f" and {len(names) - 1} other tensors" * (len(names) > 1)
        raise Stopped(f"{source} holds numbers that are not finite (NaN or infinity) in {names[0]}{more}")


class Leeway(NamedTuple):
    """How far weights may differ from those of the model that they are loaded into."""

    partial: bool = False  # what matches the model's `replaceable` need not be there, or not in that shape
    resample: bool = False  # positions of another grid are interpolated
    grid: tuple[int, int] | None = None  # of the patches that those positions are of, where it is known


class Loaded(NamedTuple):
    """What became of the weights in a file, by name."""

    loaded: list[str]
    new: dict[str, str]  # what this model keeps as it was initialized: shapes there and here
    unused: list[str]  # what this model has no place for
    resampled: str = ""  # positions: from which grid to which


def load_state(model: nn.Module, weights: dict, leeway: Leeway = Leeway()) -> Loaded:  # noqa: B008  it is immutable
    """Load a state dict, by default of exactly this architecture. Raises ValueError that names the first difference.

    leeway.partial: what the regular expression `model.replaceable` matches, if there is one, is loaded where name and shape are
    the same.
    """
    own = model.state_dict()
    replaceable = getattr(model, "replaceable", None) if leeway.partial else None

    def check(name: str, why: str) -> None:
        if replaceable is None or not re.match(replaceable, name):
            raise ValueError(f"of another architecture{why}")

    new = {}
    for name, value in own.items():
        if name not in weights:
            check(name, f": it has no {name}")
            new[name] = f"not there, {tuple(value.shape)} here"
        elif weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(value.shape)} here"
            check(name, f" or number of classes: {name} is {shapes}")
            new[name] = shapes
        elif value.is_floating_point() and not weights[name].is_floating_point():
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise ValueError(f"not of floating-point numbers: {name} is {kind}, whose scale is not known here")
    unused = [name for name in weights if name not in own]
    for name in unused:
        check(name, f": this model has no {name}")
    fitting = {name: weights[name] for name in own if name not in new}
    model.load_state_dict(fitting, strict=not new)
    return Loaded(list(fitting), new, unused)


def load_weights(
    model: nn.Module,
    source: Path,
    load: Callable[[nn.Module, dict, Leeway], Loaded] = load_state,
    flag: str = "--checkpoint",
    state: dict | None = None,
    leeway: Leeway = Leeway(),  # noqa: B008  it is immutable
) -> Loaded:
    """Load the weights of the checkpoint that `flag` names; `load` puts a state dict into the model or raises ValueError.

    state: what `load_checkpoint` has read from it, if it has. Raises RunError if the file cannot be read or the weights do not
    fit, and Stopped.
    """
    weights = weights_in(load_checkpoint(source) if state is None else state, source)
    try:
        loaded = load(model, weights, leeway)
    except ValueError as error:
        raise RunError(f"{flag}: {source} is {error}") from None
    check_finite_weights(weights, source)
    return loaded


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
