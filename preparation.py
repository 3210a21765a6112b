"""Before a run begins: everything that can fail before data is read or a file is written, and what is known then."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from dataset import Data, import_torchvision
from kernels import backend
from options import AsTrained, ModelConfig, Options
from probe import probe
from runs import RunError
from runs.checkpoints import Leeway, Loaded
from runs.export import check_export
from runs.folder import RunFolder
from runs.measure import count_flops, count_parameters
from runs.memory import making
from runs.optimization import autocast_for
from runs.parameters import freeze, layer_scales
from runs.processes import Processes, Signals
from runs.tracking import is_installed
from utils import choose_kernels, pick_device, seed_everything


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
