"""Before a run begins: everything that can fail before data is read or a file is written, the weights to start from, and
what is known then."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dataset import Data
from kernels import backend
from launch.probe import probe
from options.models import ModelConfig
from options.runs import AsTrained, Options, grid_of
from options.training import TrainConfig
from readers.files import import_torchvision
from runs import RunError
from runs.checkpoints import Leeway, Loaded, load_checkpoint, load_weights
from runs.devices import choose_kernels, pick_device
from runs.export import check_export
from runs.folder import RunFolder
from runs.measure import count_flops, count_parameters
from runs.memory import making
from runs.optimization import autocast_for
from runs.parameters import freeze, layer_scales, start_training
from runs.processes import Processes, Signals
from runs.provenance import check_same_class, list_of_loaded, say_what_differs, say_what_was_loaded
from runs.tracking import is_installed
from utils import seed_everything


class Job(NamedTuple):
    """What the command line asks of a run, and what runs it."""

    options: Options
    make_model: Callable[[ModelConfig], nn.Module]
    load: Callable[[nn.Module, dict, Leeway], Loaded]
    as_trained: Callable[[dict], AsTrained] | None
    announce: Callable[[], None]
    processes: Processes
    signals: Signals


def prepare(job: Job) -> tuple[nn.Module, RunFolder, torch.device, list[str]]:
    """Everything that can fail before data is read or a file is written; also what the user should know of the layer."""
    train, processes = job.options.train, job.processes
    if train.batch_size < processes.world * train.accumulate_steps:
        what = f"{processes.world} processes" + f" of {train.accumulate_steps} micro-batches each" * (
            train.accumulate_steps > 1
        )
        raise RunError(f"--batch_size {train.batch_size} is the total, and fewer images than {what}")
    device = pick_device(train.device, processes)
    choose_kernels(train.kernels, device)
    autocast_for(train, device)  # raises for a dtype that the device does not have
    if train.export:
        check_export(train)
    data = job.options.data
    if train.mixup or train.cutmix or data.auto_augment != "none" or data.random_erasing:
        import_torchvision()
    if train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if train.wandb and not is_installed():
        raise RunError("--wandb needs the package wandb: pip install wandb")
    seed_everything(train.seed, train.deterministic)  # before the model: all processes initialize the same weights
    with making(f"the model of --layer {job.options.model.layer}"):
        try:
            warnings = probe(job.options.model, device)
        except ValueError as error:
            raise RunError(str(error)) from None
        if warnings and processes.world > 1:
            raise RunError(
                f"{warnings[0]}; with several processes each parameter needs one: use it, or set its requires_grad to False"
            )
        model = job.make_model(job.options.model)
    if not train.test_only:
        freeze(model, train.freeze)
        layer_scales(model, train.layer_decay)  # raises for a model whose blocks it cannot tell
    return model, RunFolder(train.output_dir), device, warnings


def load_start(job: Job, model: nn.Module, resumed_from: Path | None) -> str:
    """Put the weights of --checkpoint, if there is one, into a model that is about to be trained; returns what model.txt says.

    resumed_from: the file that a run goes on from, whose weights come instead. Raises RunError.
    """
    train, first = job.options.train, job.processes.first
    if resumed_from is not None:
        if train.checkpoint and first:
            where = f"--resume goes on from {resumed_from}"
            print(f"warning: --checkpoint {train.checkpoint} is not read: {where}", file=sys.stderr)
        return ""
    if not train.checkpoint:
        unread = f"--freeze {train.freeze}" if train.freeze else "--strict" if train.strict else ""
        if unread and first:
            print(f"warning: {unread} goes with the weights of a --checkpoint, and none is given", file=sys.stderr)
        return ""
    path = Path(train.checkpoint)
    if not path.is_file():
        raise RunError(f"--checkpoint {path} is no file, and --resume finds nothing in {train.output_dir} to go on from")
    state = load_checkpoint(path)
    if isinstance(state.get("config"), dict):
        check_same_class(job.options.as_dict(), state["config"], path, "--checkpoint")
    leeway = Leeway(partial=not train.strict, resample=not train.strict, grid=grid_of(state.get("config")))
    loaded = load_weights(model, path, job.load, state=state, leeway=leeway)
    if first:
        say_what_differs(job.options.model, state, path)
        say_what_was_loaded(loaded, path, model)
    return list_of_loaded(loaded, path)


def check_short_batches(model: nn.Module, train: TrainConfig, images: int, shape: tuple[int, ...], world: int) -> None:
    """Raise RunError where a micro-batch will be one image, in which BatchNorm over a map of one pixel has nothing to compare.

    images: of the training set, each (C, H, W) of `shape`; world: processes. Model and random numbers stay as they are.
    """
    batches = {min(train.batch_size, images), images % train.batch_size}
    shares = {share for batch in batches for share in (batch // world, -(-batch // world)) if share}
    sizes = {share: math.ceil(share / train.accumulate_steps) for share in shares}  # of the micro-batches but the last
    has_one = any(1 in (size, share % size) for share, size in sizes.items())
    if not has_one or not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        one = copy.deepcopy(model)
        start_training(one)
        try:
            one(torch.zeros(1, *shape, device=device))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise RunError(
                f"--batch_size {train.batch_size} leaves a batch with one image, whose last map is one pixel: BatchNorm "
                "has nothing to compare; use another --batch_size, --accumulate_steps or --resize"
            ) from None


def facts_of(job: Job, model: nn.Module, data: Data, device: torch.device) -> dict:
    """What summary.json says of the model and the data."""
    shape = (job.options.model.in_channels, *job.options.model.image_size)
    return {
        "parameters": count_parameters(model),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops_per_image": count_flops(model, torch.zeros(1, *shape, device=device)),
        "image_shape": shape,
        "num_classes": job.options.model.num_classes,
        "train_images": data.train.num_samples,
        "test_images": data.test.num_samples,
        "class_names": data.class_names,
        "processes": job.processes.world,
        "kernels": backend.running_on(device),
    }
