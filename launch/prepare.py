"""Prepare a run: everything that can fail before data is read or a file is written, then data, weights and state."""

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dataset import Data, load_data
from kernels import backend
from launch.mask import write_mask
from launch.probe import probe
from models.backbones import fitted_options
from options.data import sides_of
from options.fields import as_words
from options.models import ModelConfig
from options.runs import Options, Program, grid_of
from options.training import TrainConfig
from options.trust import remember
from readers.files import import_torchvision
from runs import RunError
from runs.checkpoints import Loaded, LoadPolicy, load_checkpoint, load_weights
from runs.devices import choose_kernels, pick_device
from runs.export import check_export
from runs.files import check_writable
from runs.folder import RunFolder
from runs.measure import count_flops, count_parameters, device_name
from runs.memory import stop_if_out_of_memory
from runs.parameters import freeze, head_of, layer_scales, start_training
from runs.processes import Processes, Signals, seed_process
from runs.provenance import (
    check_same_class,
    check_same_classes,
    check_same_number,
    list_of_loaded,
    options_as_trained,
    say_what_differs,
    say_what_is_assumed,
    say_what_was_loaded,
    say_whose_head,
)
from runs.resume import check_same_data, check_same_state, resumable_state, resume
from runs.streams import announce
from runs.tracking import is_installed
from runs.training import Training
from utils import seed_everything


class Request(NamedTuple):
    """The run that the command line asks for, and the processes that take part in it.

    make_model: config -> model; load: puts a state dict into the model; read: reads the data, by default `load_data`.
    """

    options: Options
    make_model: Callable[[ModelConfig], nn.Module]
    load: Callable[[nn.Module, dict, LoadPolicy], Loaded]
    processes: Processes
    signals: Signals
    read: Callable[..., Data] | None = None


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def begin_training(request: Request, warnings: list[str]) -> tuple[Training, Data, dict]:
    """Make the model and load the data; start from the beginning, from --checkpoint's weights, or where --resume finds the run.

    warnings: lines about the options, printed once nothing can be wrong any more. Returns the training, the data, and facts
    about both for summary.json. Raises RunError, DataError and Stopped.
    """
    options, processes = request.options, request.processes
    train, plain, folder = options.train, options.as_dict(), RunFolder(options.train.output_dir)
    device = check(request)
    model, unreached = build(request, device)
    found = resumable_state(folder, plain, quiet=not processes.first) if train.resume else None
    if train.export and found is not None and found[0]["best"] and not folder.best.exists():
        raise RunError(f"--export: {folder.best} of epoch {found[0]['best']['epoch']} is gone; leave --export out")
    notes, started_from = load_start(request, model, None if found is None else found[1])
    processes.connect(device)
    check_same_state(processes, folder, found)
    data = read_data(request, device)
    if processes.first and started_from is not None:
        say_whose_head(started_from, data.class_names, Path(train.checkpoint))
    model.to(device)
    if found is not None:
        check_same_data(found[0], data.fingerprint, found[1], train.override, quiet=not processes.first)
    training = Training(model, train, device, len(data.train), processes, request.signals)
    training.fingerprint = data.fingerprint
    if found is None:
        seed_process(train.seed, processes.rank)  # dropout and mixes differ between processes, unlike the weights
    else:
        resume(training, folder, *found)
    facts = facts_of(request, model, data, device)
    check_short_batches(model, train, facts["train_images"], facts["image_shape"], processes.world)
    if processes.first:
        for warning in [*warnings, *fitted_options(options.model)]:
            announce("warning", warning)
        for warning in unreached:
            print(f"warning: {warning}", file=sys.stderr)
        remember(options.model.layer)
        folder.start(plain, model, resumed=found is not None, notes=notes)
        write_mask(model, folder.path / "mask.png")
        trained = f" ({facts['trained_parameters']:,} of them trained)" if train.freeze else ""
        print(
            f"{options.model.title} on {options.data.dataset}: {facts['parameters']:,} parameters{trained}, "
            f"{facts['flops_per_image'] / 1e6:,.2f} MFLOPs per image, {facts['train_images']:,} training and "
            f"{facts['test_images']:,} test images, on {device_name(device)}"
            + (f", {processes.world} processes" if processes.world > 1 else ""),
            flush=True,
        )
    return training, data, facts


def check(request: Request) -> torch.device:
    """Check everything that can be known without model and data; return the device. Raises RunError."""
    train, data, processes = request.options.train, request.options.data, request.processes
    if train.batch_size < processes.world * train.accumulate_steps:
        each = f" of {train.accumulate_steps} micro-batches each" * (train.accumulate_steps > 1)
        raise RunError(f"--batch_size {train.batch_size} is the total, and fewer images than {processes.world} processes{each}")
    device = pick_device(train.device, processes)
    choose_kernels(train.kernels, device)
    if train.use_amp and train.amp_dtype == "float16" and device.type != "cuda":
        raise RunError(f"--amp_dtype float16 needs CUDA, the device is {device.type}; use --amp_dtype bfloat16")
    if train.export:
        check_export(train)
    if train.mixup or train.cutmix or data.auto_augment != "none" or data.random_erasing:
        import_torchvision()
    if train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if train.wandb and not is_installed():
        raise RunError("--wandb needs the package wandb: pip install wandb")
    return device


def build(request: Request, device: torch.device) -> tuple[nn.Module, list[str]]:
    """Seed torch and build the model, on the CPU; return it, and warnings of a custom mixer. Raises RunError and Stopped."""
    train, processes = request.options.train, request.processes
    seed_everything(train.seed, train.deterministic)  # before the model: all processes initialize the same weights
    with stop_if_out_of_memory(f"the model of --layer {request.options.model.layer}"):
        try:
            warnings = probe(request.options.model, device)
            if warnings and processes.world > 1:
                raise RunError(
                    f"{warnings[0]}; with several processes each parameter needs one: use it, or set its requires_grad to False"
                )
            model = request.make_model(request.options.model)
        except ValueError as error:
            raise RunError(str(error)) from None
    if not train.test_only:
        freeze(model, train.freeze)
        layer_scales(model, train.layer_decay)  # raises for a model without numbered blocks
    return model, warnings


def load_start(request: Request, model: nn.Module, resumed_from: Path | None) -> tuple[str, dict | None]:
    """Load the weights of --checkpoint, if there is one, into a model that is about to be trained.

    Returns a note for model.txt, and the checkpoint if its head was loaded.

    resumed_from: the checkpoint that the run continues from, whose weights come instead. Raises RunError and Stopped.
    """
    train, first = request.options.train, request.processes.first
    if resumed_from is not None:
        if train.checkpoint and first:
            line = f"warning: --checkpoint {train.checkpoint} is not read: --resume continues from {resumed_from}"
            print(line, file=sys.stderr)
        return "", None
    if not train.checkpoint:
        if (train.freeze or train.strict) and first:
            unread = f"--freeze {train.freeze}" if train.freeze else "--strict"
            print(f"warning: {unread} goes with the weights of a --checkpoint, and none is given", file=sys.stderr)
        return "", None
    path = Path(train.checkpoint)
    if not path.is_file():
        raise RunError(f"--checkpoint {path} is no file, and --resume finds nothing in {train.output_dir} to resume from")
    state = load_checkpoint(path)
    if isinstance(state.get("config"), dict):
        check_same_class(request.options.as_dict(), state["config"], path, "--checkpoint")
    policy = LoadPolicy(partial=not train.strict, resample=not train.strict, grid=grid_of(state.get("config")))
    loaded = load_weights(model, path, request.load, state=state, policy=policy)
    if first:
        say_what_differs(request.options, state, path)
        say_what_was_loaded(loaded, path, model)
    return list_of_loaded(loaded, path), None if f"{head_of(model)}weight" in loaded.new else {"data": state.get("data")}


def read_data(request: Request, device: torch.device) -> Data:
    """Load the data set; on each machine one process goes first, as it may download it. Raises DataError and Stopped."""
    options, processes = request.options, request.processes
    with (
        processes.first_of_machine_first(),
        stop_if_out_of_memory("the data set", "--train_limit and --test_limit take less"),
    ):
        return (request.read or load_data)(
            options.data,
            batch_size=options.train.batch_size,
            seed=options.train.seed,
            device=device,
            test_only=options.train.test_only,
            rank=processes.rank,
            world=processes.world,
        )


def check_short_batches(model: nn.Module, train: TrainConfig, images: int, shape: tuple[int, ...], world: int) -> None:
    """Raise RunError where BatchNorm will meet a micro-batch of one image whose map is one pixel: nothing to normalize over.

    images: number of training images, each (C, H, W) of `shape`; world: processes. Model and random numbers do not change.
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


def facts_of(request: Request, model: nn.Module, data: Data, device: torch.device) -> dict:
    """Return the facts about model and data that summary.json holds."""
    shape = (request.options.model.in_channels, *request.options.model.image_size)
    return {
        "parameters": count_parameters(model),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops_per_image": count_flops(model, torch.zeros(1, *shape, device=device)),
        "image_shape": shape,
        "preprocessing": getattr(request.options.data, "preprocessing", None),
        "num_classes": request.options.model.num_classes,
        "train_images": data.train.num_samples,
        "test_images": data.test.num_samples,
        "class_names": data.class_names,
        "data": data.fingerprint,
        "processes": request.processes.world,
        "kernels": backend.running_on(device),
    }


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------


def begin_test(request: Request, program: Program, stated: dict) -> tuple[Request, nn.Module, Data, Path, dict]:
    """Load --checkpoint, else best.pt of the output folder, as the model that it was trained as, and the test images.

    stated: options set on the command line or in --config. Returns the request with the options that the checkpoint was trained
    with, the model, the data, the file, and facts for test_results.json. Raises RunError, DataError and Stopped.
    """
    options, processes = request.options, request.processes
    path = Path(options.train.checkpoint) if options.train.checkpoint else RunFolder(options.train.output_dir).best
    if not path.exists():
        raise RunError(f"--test_only: there is no {path}; train first, or name the weights with --checkpoint FILE")
    state = load_checkpoint(path)
    options, changes = options_as_trained(options, program, stated, state, path)
    request, train = request._replace(options=options), options.train
    check_writable(Path(train.output_dir), "--output_dir")
    device = check(request)
    model, _ = build(request, device)
    check_same_number(state, options.model.num_classes, path, options.data.data_path)
    # Images of another size need no --override: the model computes the same function of an image at that size.
    free = train.override or "resize" in changes or "config" not in state
    policy = LoadPolicy(resample=not train.strict and free, grid=grid_of(state.get("config")))
    loaded = load_weights(model, path, request.load, "--checkpoint" if train.checkpoint else "--test_only", state, policy)
    refused = {} if train.override else {name: change for name, change in changes.items() if name != "resize"}
    if refused:  # the weights fit, but another model than the trained one would be evaluated
        check_same_class(options.as_dict(), state["config"], path, "--test_only")
        name, (trained, now) = next(iter(refused.items()))
        raise RunError(
            f"--test_only: {path} was trained with --{name} {as_words(trained)}, not {as_words(now)}; leave --{name} out, "
            "or evaluate its weights in another model than theirs with --override"
        )
    shape = (options.model.in_channels, *sides_of(options.data.resize))
    try:
        flops = count_flops(model, torch.zeros(1, *shape))
    except ValueError as error:  # of a layer that cannot run on maps of this size
        raise RunError(f"--test_only: --resize {as_words(options.data.resize)} with {path}: {error}") from None
    if processes.first:
        say_what_is_assumed(options, state, path, changes)
        say_what_was_loaded(loaded, path, model)
    processes.connect(device)
    data = read_data(request, device)
    check_same_classes(state, data.fingerprint, path, train.override, quiet=not processes.first)
    override = {name: {"trained": before, "here": after} for name, (before, after) in changes.items()}
    facts = {"image_shape": shape, "flops_per_image": flops, "override": override}
    facts |= {"preprocessing": options.data.preprocessing, "class_names": data.class_names}
    return request, model.to(device), data, path, facts
