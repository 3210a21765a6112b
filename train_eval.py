"""Training and evaluation: one loop for fp32 and mixed precision, eager and compiled.

The story of a run, from top to bottom: `train_one_epoch` and `evaluate` are the two halves of an epoch, `fit` goes through the
epochs and writes the outputs, `run` is what both command lines call. One optimizer step is `runs.training.Stepper.update`.
Losses and counts stay on the device; the CPU synchronizes with it every 20 steps.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dataset import Data, load_data
from launch.prepare import Job, check_short_batches, facts_of, load_start, prepare
from options.data import sides_of
from options.fields import as_words
from options.models import ModelConfig
from options.runs import AsTrained, Options, evaluation_options, grid_of
from readers.images import DataError
from runs import RunError
from runs.checkpoints import Leeway, Loaded, load_checkpoint, load_state, load_weights
from runs.endings import STOPPED, exit_status
from runs.export import export
from runs.files import ReadError, check_writable
from runs.folder import RunFolder, costs_of, summarize
from runs.measure import count_flops, count_parameters, device_name
from runs.memory import making
from runs.metrics import Confusion, Meter, Metrics, history_row
from runs.optimization import (
    NonFiniteLoss,
    autocast_for,
    compile_for,
    make_loss,
    make_mix,
)
from runs.parameters import start_training
from runs.processes import Interrupted, ProcessError, Processes, Signals, seed_process
from runs.progress import Progress, epoch_line
from runs.provenance import (
    check_same_class,
    options_as_trained,
    say_what_is_assumed,
    say_what_was_loaded,
)
from runs.resume import check_same_state, resumable_state, resume
from runs.tracking import Tracker
from runs.training import Training

MEMORY_ADVICE = "a smaller --batch_size, --accumulate_steps, --use_amp or --use_compiled --compile_mode reduce-memory need less"
MOST_CONFUSED = 200  # classes, of which test_results.json holds the matrix
READ_EVERY, READ_SECONDS = 20, 5  # steps, or seconds, between two synchronizations with the device


# ---------------------------------------------------------------------------------------------------------------
# Epochs
# ---------------------------------------------------------------------------------------------------------------


def train_one_epoch(
    training: Training,
    batches,
    loss_function: Callable,
    mix: Callable | None = None,
    save: Callable[[], None] | None = None,
) -> Metrics:
    """Train on every batch of the epoch that `training` stands in, from the step it stands at.

    batches: `dataset.DeviceBatches` or alike; mix: images, labels -> images, shares; save: called every
    `save_minutes`, at a step's end. Returns the means over the images of the epoch, as they were when trained on.
    Raises NonFiniteLoss, and Interrupted at the end of a step after a signal.
    """
    start_training(training.model)
    config, processes = training.config, training.processes
    if training.step == 0:
        training.lr = training.schedule.now
    started, earlier = time.perf_counter(), training.seconds
    saved = looked = time.monotonic()
    done = training.step * config.batch_size
    title = f"epoch {training.epoch + 1}/{config.num_epochs}"
    try:
        with Progress(title, batches.num_samples, done, quiet=not processes.first) as progress:
            training.agree()  # before the first step: a signal may have come between two epochs
            for images, targets in batches.epoch(training.epoch, start=training.step):
                if mix is not None and len(images):
                    images, targets = mix(images, targets)
                total = batches.images_in(training.step)
                training.update(images, targets, loss_function, total)
                progress.advance(total)
                # Saving and checking are collective, but clocks differ: processes agree at which step they are due.
                now = time.monotonic()
                want_look, want_save = now - looked > READ_SECONDS, now - saved > 60 * config.save_minutes > 0
                looked, saved = now if want_look else looked, now if want_save else saved
                look, due = training.agree(want_look, want_save)
                if look or training.step % READ_EVERY == 0:
                    training.check_finite()
                    if progress.due:
                        progress.show(*training.meter.read()[:2])
                if due and save is not None:
                    training.seconds = earlier + time.perf_counter() - started
                    save()
    finally:  # of an interrupted epoch too: a resumed run adds to it
        training.seconds = earlier + time.perf_counter() - started
    training.check_finite()
    return training.total()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches,
    loss_function: Callable,
    *,
    device: torch.device,
    compiled: Callable | None = None,
    autocast: Callable = nullcontext,
    title: str = "test",
    processes: Processes | None = None,
    check: Callable[[], object] = lambda: None,
    seen: Callable[[torch.Tensor, torch.Tensor], object] = lambda logits, labels: None,
) -> Metrics:
    """Means over all images of `batches`, every one counted once; `compiled` is the compiled model if there is one.

    `check` is called after every batch, equally often on all processes; `seen` with the logits and labels of every batch.
    """
    model.eval()
    compiled = model if compiled is None else compiled
    processes = processes or Processes()
    meter = Meter(device)
    # One row of sums per batch, added up in the order of the batches whichever process computed them: with several
    # processes the result is exactly that of one, which a running sum in floating point would not give.
    rows = meter.sums.new_zeros(-(-batches.num_samples // batches.recipe.batch_size), 4)
    with Progress(title, batches.num_samples, quiet=not processes.first) as progress:
        for step, (images, labels) in enumerate(batches.epoch(0)):
            if len(images):
                with autocast():
                    logits = compiled(images).float()
                seen(logits, labels)
                rows[step * processes.world + processes.rank] = meter.tally(loss_function(logits, labels), logits, labels)
            progress.advance(batches.images_in(step))
            check()
            if (step + 1) % READ_EVERY == 0 and progress.due:
                progress.show(*meter.read(rows.sum(0))[:2])
    return meter.read(processes.sum_(rows).sum(0))


def _evaluate_splits(training: Training, data: Data, loss_function: Callable) -> dict[str, Metrics]:
    """Metrics of the validation images, if there are any, and of the test images."""
    training.share_statistics()  # each process has those of its own images until here
    return {
        name: evaluate(
            training.eval_model,
            batches,
            loss_function,
            device=training.device,
            compiled=training.compiled_eval_model,
            autocast=training.autocast,
            title=name,
            processes=training.processes,
            check=training.agree,
        )
        for name, batches in (("val", data.val), ("test", data.test))
        if batches is not None
    }


# ---------------------------------------------------------------------------------------------------------------
# All epochs
# ---------------------------------------------------------------------------------------------------------------


def fit(
    training: Training,
    data: Data,
    folder: RunFolder,
    options: dict,
    facts: dict,
    tracker: Tracker | None = None,
) -> dict:
    """Train until the last epoch or until early stopping, writing the outputs after every epoch.

    options: what `args.txt` holds; facts: of the model, for `summary.json`; tracker: gets the row of every epoch too. Returns
    the row of the best one.
    """
    config, processes = training.config, training.processes
    # Label smoothing is for training: losses of different settings compare only without it.
    loss_function, plain_loss = make_loss(config.criterion, config.label_smoothing), make_loss(config.criterion)
    mix = make_mix(config.mixup, config.cutmix, facts["num_classes"])
    split = selection_split(data)
    board = folder.tensorboard(training.epoch) if config.tensorboard and processes.first else None

    def save(*others):
        training.check_finite()
        state = training.state_dict(options)  # collective: it gathers the random states of all processes
        if processes.first:
            folder.save(state, *others)

    def ended() -> bool:
        return training.epoch >= config.num_epochs or _stalled(training.history, split, config.early_stopping)

    def publish() -> None:
        if processes.first:
            folder.epoch_done(training.history, training.best, summarize(training, split, facts, ended()), last=ended())

    if training.history and processes.first and folder.is_behind(len(training.history), ended()):
        publish()  # the results of a run that was killed between its last checkpoint and its results
    try:
        with training.signals.deferred():  # from here on there is something to save: a signal waits for the end of a step
            while not ended():
                with making(f"a step of --batch_size {config.batch_size} images", MEMORY_ADVICE):
                    metrics = {"train": train_one_epoch(training, data.train, loss_function, mix, save)}
                trained = time.monotonic()
                with making(f"an evaluation of --batch_size {config.batch_size} images", MEMORY_ADVICE):
                    metrics |= _evaluate_splits(training, data, plain_loss)
                images = data.train.num_samples
                training.epoch_done(history_row(training.epoch + 1, training.lr, metrics, images, training.seconds), split)
                row, epoch = training.history[-1], training.epoch
                kept = [folder.best] * (training.best == row)
                kept += [folder.path / f"epoch_{epoch}.pt"] * bool(config.save_every and epoch % config.save_every == 0)
                # Checkpoints before results: a run killed in between publishes again when it is resumed.
                save(*kept)
                publish()
                if processes.first:
                    left = (config.num_epochs - epoch) * (row["seconds"] + time.monotonic() - trained)
                    eta = "" if ended() else f"  ETA {tqdm.format_interval(left)}"
                    print(epoch_line(row) + eta, flush=True)
                if board is not None:
                    for name, value in row.items():
                        board.add_scalar(name, value, epoch)
                    board.flush()
                if tracker is not None:
                    tracker.epoch_done(row)
    except Interrupted as interrupted:  # by all processes at the same step
        save()
        processes.finish()
        interrupted.is_saved = True
        raise
    return training.best


def selection_split(data: Data) -> str:
    """The part of the data that chooses the best epoch and stops early: "val" where images are held out, else "test"."""
    return "val" if data.val is not None else "test"


def _stalled(history: list[dict], split: str, patience: int) -> bool:
    """Whether the last `patience` epochs brought no better loss; 0: never."""
    if not patience or len(history) <= patience:
        return False
    losses = [row[f"{split}_loss"] for row in history]
    return min(losses[-patience:]) >= min(losses[:-patience])


# ---------------------------------------------------------------------------------------------------------------
# A run, from options to outputs
# ---------------------------------------------------------------------------------------------------------------


def run(
    options: Options,
    make_model: Callable[[ModelConfig], nn.Module],
    fail: Callable[[str], None],
    load: Callable[[nn.Module, dict, Leeway], Loaded] = load_state,
    as_trained: Callable[[dict], AsTrained] | None = None,
    announce: Callable[[], None] = lambda: None,
) -> int:
    """Train, or evaluate under --test_only, as the options say; returns the exit status.

    `fail` ends the program with one line and status 2 for what the user can correct; `load` puts the state dict of a
    --checkpoint into the model; `as_trained` says, from the options in a checkpoint of ours, how to evaluate it; `announce`
    prints what the user should know of a training that begins, once nothing can be wrong with it any more.
    """
    signals, processes = Signals(), None
    # Exit status: 2 (`fail`) for the user's mistakes, 1 for what happens on the way, 128 + number for signals.
    try:
        processes = Processes.from_environment()
        with signals, processes:
            job = Job(options, make_model, load, as_trained, announce, processes, signals)
            with making("what this run needs", MEMORY_ADVICE):
                if options.train.test_only:
                    _test(job)
                else:
                    with RunFolder(options.train.output_dir).claimed(options.train) if processes.first else nullcontext():
                        _train(job)
    except (RunError, DataError, ProcessError) as error:
        if isinstance(error, DataError) and processes.local_rank:
            print(error, file=sys.stderr)  # of this process alone: `fail` leaves what concerns all to the first one
        fail(str(error))
    except (KeyboardInterrupt, RuntimeError, OSError, *STOPPED) as error:
        return exit_status(error, options, processes, fail)
    return 0


def _load_data(run: Job, device: torch.device) -> Data:
    options, processes = run.options, run.processes
    # The first may download it.
    with (
        processes.first_of_machine_first(),
        making("the data set", "--train_limit and --test_limit take less"),
    ):
        return load_data(
            options.data,
            batch_size=options.train.batch_size,
            seed=options.train.seed,
            device=device,
            test_only=options.train.test_only,
            rank=processes.rank,
            world=processes.world,
        )


def _test(run: Job) -> None:
    """Evaluate --checkpoint, else best.pt of the output folder; print and write test_results.json, nothing else."""
    options, processes = run.options, run.processes
    path = Path(options.train.checkpoint) if options.train.checkpoint else RunFolder(options.train.output_dir).best
    if not path.exists():
        raise RunError(f"--test_only: there is no {path}; train first, or name the weights with --checkpoint FILE")
    state = load_checkpoint(path)
    options, changes = options_as_trained(options, run.as_trained, state, path)
    run = run._replace(options=options)
    train = options.train
    check_writable(Path(train.output_dir), "--output_dir")
    model, folder, device, _ = prepare(run)
    # Images of another size need no --override: what the model computes is the same function of an image, at that size.
    free = train.override or "resize" in changes or "config" not in state
    leeway = Leeway(resample=not train.strict and free, grid=grid_of(state.get("config")))
    loaded = load_weights(model, path, run.load, "--checkpoint" if train.checkpoint else "--test_only", state, leeway)
    refused = {} if train.override else {name: change for name, change in changes.items() if name != "resize"}
    if refused:  # they fit, and would give another number than that of the model that was trained
        check_same_class(options.as_dict(), state["config"], path, "--test_only")
        name, (trained, stated) = next(iter(refused.items()))
        raise RunError(
            f"--test_only: {path} was trained with --{name} {as_words(trained)}, not {as_words(stated)}; leave --{name} out, "
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
    data = _load_data(run, device)
    model.to(device)
    confusion = Confusion(options.model.num_classes, device)
    with making(f"an evaluation of --batch_size {train.batch_size} images", MEMORY_ADVICE), _reading():
        metrics = evaluate(
            model,
            data.test,
            make_loss(train.criterion),
            device=device,
            compiled=compile_for(train, model),
            autocast=autocast_for(train, device),
            processes=processes,
            seen=confusion.add,
        )
        processes.sum_(confusion.counts)
    if not processes.first:
        return
    if not math.isfinite(metrics.loss):
        raise NonFiniteLoss(f"the test loss of {path} is not finite: its weights overflow in this model")
    print(f"test top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}  ({path})")
    results = {**metrics._asdict(), "images": data.test.num_samples, "checkpoint": str(path)}
    results["parameters"] = count_parameters(model)
    results["flops_per_image"] = flops
    results |= costs_of(model, shape, device)
    results["classes"] = confusion.by_class(data.class_names)
    if len(data.class_names) <= MOST_CONFUSED:
        results["confusion"] = confusion.counts.tolist()
    results["options"] = evaluation_options(options)
    results["override"] = {name: {"trained": before, "here": after} for name, (before, after) in changes.items()}
    written = folder.write_test_results(results)
    if written.name != "test_results.json":
        print(f"results are in {written}: test_results.json is of other options")


def _train(run: Job) -> None:
    """Train from the beginning, from --checkpoint's weights, or from where --resume finds the run; write all outputs."""
    model, folder, device, warnings = prepare(run)
    options, processes = run.options, run.processes
    train, plain = options.train, options.as_dict()
    found = resumable_state(folder, plain, quiet=not processes.first) if train.resume else None
    if train.export and found is not None and found[0]["best"] and not folder.best.exists():
        raise RunError(f"--export: {folder.best} of epoch {found[0]['best']['epoch']} is gone; leave --export out")
    notes = load_start(run, model, None if found is None else found[1])
    processes.connect(device)
    check_same_state(processes, folder, found)
    data = _load_data(run, device)
    model.to(device)
    training = Training(model, train, device, len(data.train), processes, run.signals)
    if found is None:
        seed_process(train.seed, processes.rank)  # dropout and mixes differ between processes, unlike the weights
    else:
        resume(training, folder, *found)
    facts = facts_of(run, model, data, device)
    check_short_batches(model, train, facts["train_images"], facts["image_shape"], processes.world)
    if processes.first:
        run.announce()
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        folder.start(plain, model, resumed=found is not None, notes=notes)
        trained = f" ({facts['trained_parameters']:,} of them trained)" if train.freeze else ""
        print(
            f"{options.model.title} on {options.data.dataset}: {facts['parameters']:,} parameters{trained}, "
            f"{facts['flops_per_image'] / 1e6:,.2f} MFLOPs per image, {facts['train_images']:,} training and "
            f"{facts['test_images']:,} test images, on {device_name(device)}"
            + (f", {processes.world} processes" if processes.world > 1 else ""),
            flush=True,
        )
    with Tracker(folder.path, plain) if train.wandb and processes.first else nullcontext() as tracker:
        with _reading():
            best = fit(training, data, folder, plain, facts, tracker)
        if not processes.first:
            return
        if train.export:
            export(Path(train.export), model, folder.best, facts["image_shape"])
        split = selection_split(data)
        print(f"best {split} top-1 {best[f'{split}_top1']:.2f} % in epoch {best['epoch']}; results are in {folder.path}")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """A context in which data that turns out to be wrong ends the run as whatever happens on the way, with status 1."""
    try:
        yield
    except DataError as error:
        raise ReadError(str(error)) from None
