"""Checkpoint files: tensors and plain values, written atomically, read without running any code in them."""

import json
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

# Keys of a checkpoint that a run can resume from.
STATE = tuple("model optimizer scheduler scaler ema sampler rng epoch step best history config".split())


# Other projects' files hold the weights under these names, and put these prefixes before the names of tensors.
WRAPPERS = ("model", "state_dict", "model_state_dict")
PREFIXES = re.compile(r"(?:module\.|_orig_mod\.)*")  # of DistributedDataParallel and torch.compile


class DamagedError(RunError):
    """A checkpoint that is not whole: a run resumes from the one before."""


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
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            return {"model": weights} | {name: json.loads(notes[name]) for name in ("preprocessing",) if name in notes}
        # torch.load does not verify checksums and would return numbers in which some bits have changed.
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {part}")
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that `weights_in` refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        reason = "it is damaged, or holds more than tensors and plain values, and code in it is not run"
        if is_out_of_memory(error):
            reason = "it needs more memory than there is, or is damaged"
        raise DamagedError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state | {"model": next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)}


def load_run_state(path: Path) -> dict:
    """Read a checkpoint that a run can resume from. Raises DamagedError."""
    state = load_checkpoint(path)
    missing = [name for name in STATE if name not in state]
    if missing or not isinstance(state["config"], dict):
        raise DamagedError(f"{path} is not the state of a run: it holds no {', '.join(missing) or 'options'}")
    return state


def weights_in(state: dict, source: Path) -> dict:
    """Return the weights that the metrics of a checkpoint, read from this file, belong to: averaged ones if there are any.

    Raises RunError.
    """
    average = state.get("ema")
    weights = state["model"] if average is None else average
    are_tensors = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    )
    if not are_tensors or not weights:
        raise RunError(f"{source} is not a checkpoint: its {'model' if average is None else 'ema'} is not tensors by name")
    for name, value in weights.items():
        kinds = {"quantized": value.is_quantized, "without data (meta)": value.is_meta}
        kinds |= {"sparse": value.layout != torch.strided, "of complex numbers": value.is_complex()}
        for kind, holds in kinds.items():
            if holds:
                raise RunError(f"{source} cannot be used: {name} is {kind}; save it as a dense tensor of real numbers")
    return {name[PREFIXES.match(name).end() :]: value for name, value in weights.items()}


def check_finite_weights(weights: dict, source: Path) -> None:
    """Raise Stopped, which names the first tensor, if there is a NaN or an infinity among the weights."""
    names = [name for name, value in weights.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if names:
        more = f" and {len(names) - 1} other tensors" * (len(names) > 1)
        raise Stopped(f"{source} holds numbers that are not finite (NaN or infinity) in {names[0]}{more}")


class LoadPolicy(NamedTuple):
    """Mismatches to accept when weights are loaded into a model."""

    partial: bool = False  # names that match the model's `replaceable` may be missing or of another shape
    resample: bool = False  # positions of another grid are interpolated
    grid: tuple[int, int] | None = None  # of patches, that the positions in the file belong to, where it is known


class Loaded(NamedTuple):
    """Names of the weights that were loaded from a file, and of those that were not."""

    loaded: list[str]
    new: dict[str, str]  # left as initialized: shapes there and here
    unused: list[str]  # in the file only
    resampled: str = ""  # of positions: the grids of the file and of the model


def load_state(model: nn.Module, weights: dict, policy: LoadPolicy = LoadPolicy()) -> Loaded:  # noqa: B008  it is immutable
    """Load a state dict, by default of exactly this architecture. Raises ValueError that names the first difference.

    policy.partial: names that the regular expression `model.replaceable` matches, if there is one, are loaded where the shape
    is the same.
    """
    own = model.state_dict()
    replaceable = getattr(model, "replaceable", None) if policy.partial else None

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
    load: Callable[[nn.Module, dict, LoadPolicy], Loaded] = load_state,
    flag: str = "--checkpoint",
    state: dict | None = None,
    policy: LoadPolicy = LoadPolicy(),  # noqa: B008  it is immutable
) -> Loaded:
    """Load the weights of the checkpoint that `flag` names; `load` puts a state dict into the model or raises ValueError.

    state: the result of `load_checkpoint`, if it has been called. Raises RunError if the file cannot be read or the weights do
    not fit, and Stopped for weights that are not finite.
    """
    weights = weights_in(load_checkpoint(source) if state is None else state, source)
    try:
        loaded = load(model, weights, policy)
    except ValueError as error:
        raise RunError(f"{flag}: {source} is {error}") from None
    check_finite_weights(weights, source)
    return loaded


# ---------------------------------------------------------------------------------------------------------------
# Random numbers: the part of a checkpoint that belongs to no object
# ---------------------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict:
    """Return the states of the generators a run draws from; data order and augmentation are functions of the seed instead."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()  # of the current device, which is this one
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore the result of `random_state`; a device that the checkpoint's run did not use keeps its state."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
