"""Training and evaluation: one loop for fp32 and mixed precision, eager and compiled.

From top to bottom: `train_step` takes one optimizer step. `train_one_epoch` and `evaluate` iterate over the images once. `fit`
iterates over the epochs and writes the outputs. Both programs call `run`. Losses and counts stay on the device, and the CPU
synchronizes with it every 20 steps.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dataset import Data
from launch.given import Given, as_batches
from launch.prepare import Request, begin_test, begin_training
from options.models import ModelConfig
from options.runs import Options, Program, evaluation_options
from options.training import TrainConfig
from runs import DataError, RunError, Stopped
from runs.checkpoints import Loaded, LoadPolicy, load_state
from runs.endings import exit_status
from runs.export import export
from runs.folder import RunFolder, costs_of, summarize
from runs.measure import count_parameters
from runs.memory import stop_if_out_of_memory
from runs.metrics import Meter, Metrics, Predictions, history_row, stalled
from runs.optimization import autocast_for, compile_for, make_loss, make_mix
from runs.parameters import start_training
from runs.processes import Interrupted, Processes, Signals, plain_interrupts
from runs.progress import Progress, Timer, epoch_line
from runs.tracking import Board, Tracker
from runs.training import Training

MEMORY_ADVICE = "a smaller --batch_size, --accumulate_steps, --use_amp or --use_compiled --compile_mode reduce-memory need less"
READ_EVERY, READ_SECONDS = 20, 5  # steps, or seconds, between two synchronizations with the device


# ---------------------------------------------------------------------------------------------------------------
# A step and an epoch
# ---------------------------------------------------------------------------------------------------------------


def train_step(training: Training, images: Tensor, targets: Tensor, loss_function: Callable, total: int | None = None) -> None:
    """Take one optimizer step on a batch, in micro-batches under --accumulate_steps.

    A loss or gradient that is not finite leaves the weights as they were, on all processes and from then on. The device decides
    it without waiting for the CPU, which finds out in `training.check_finite`.

    Args:
        images: (B, C, H, W), this process's share of the batch.
        targets: labels (B,) or shares (B, classes).
        total: images of all processes in this step; None: B.
    """
    config, model, optimizer, scaler = training.config, training.train_model, training.optimizer, training.scaler
    finite, world = training.finite, training.processes.world
    optimizer.zero_grad(set_to_none=True)
    if config.use_compiled and training.device.type == "cuda":  # CUDA graphs reuse the memory of the previous step
        torch.compiler.cudagraph_mark_step_begin()
    # A last batch may have fewer images than processes: those without any compute zeros, to join in the all-reduce. Two, as
    # BatchNorm needs two values per channel. Their loss has weight 0, and BatchNorm's statistics that are kept are those of the
    # first process, which always has images.
    idle = len(images) == 0
    if idle:
        images, targets = images.new_zeros(2, *images.shape[1:]), targets.new_zeros(2, *targets.shape[1:])
    total = total or len(images)
    size = math.ceil(len(images) / config.accumulate_steps)
    micro_batches = list(zip(images.split(size), targets.split(size), strict=True))
    for number, (part, part_targets) in enumerate(micro_batches, start=1):
        # DDP all-reduces the gradients in the backward pass of the last micro-batch only.
        with model.no_sync() if world > 1 and number < len(micro_batches) else nullcontext():
            with training.autocast():
                logits = model(part).float()
            loss = loss_function(logits, part_targets)
            # DDP averages over processes: so weighted, means over unequal shares add up to the mean over the batch.
            weight = 0.0 if idle else world * len(part) / total
            scaler.scale(loss * (finite.one_or_nan(loss) * weight)).backward()
        if not idle:
            training.meter.add(loss, logits, part_targets)
            finite.watch(loss)
    scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in training.parameters if p.grad is not None])
    if config.clip_grad_norm:
        clip_grads_with_norm_(training.parameters, config.clip_grad_norm, norm)
    if not scaler.is_enabled():  # float16's gradients overflow now and then; the scaler skips those steps
        finite.watch(norm)
    finite.end_step(training.step, training.schedule.lr)
    if not scaler.is_enabled():
        optimizer.found_inf = finite.found  # where it is 1, a fused optimizer changes nothing
    scaler.step(optimizer)
    scaler.update()
    if training.average:
        training.average.update(training.model)
    training.schedule.step()
    training.step += 1


def train_one_epoch(
    training: Training, batches, loss_function: Callable, mix: Callable | None = None, save: Callable[[], None] | None = None
) -> Metrics:
    """Train on the batches of the current epoch that are left, from `training.step` on.

    Args:
        batches: `dataset.DeviceBatches` or similar.
        mix: images, labels -> images, shares of the classes.
        save: called every `save_minutes`, at the end of a step.

    Returns means over the images of the epoch, each taken when the image was trained on. Raises Stopped for a loss or gradient
    that is not finite, and Interrupted at the end of a step after a signal.
    """
    start_training(training.model)
    config, processes = training.config, training.processes
    if training.step == 0:
        training.epoch_lr = training.schedule.lr
    started, earlier = time.perf_counter(), training.seconds
    # Synchronizing and saving are collective, but clocks differ: the first process's decides for all.
    sync_timer, save_timer = Timer(READ_SECONDS * processes.first), Timer(60 * config.save_minutes * processes.first)
    title, done = f"epoch {training.epoch + 1}/{config.num_epochs}", training.step * config.batch_size
    try:
        with Progress(title, batches.num_samples, done, quiet=not processes.first) as progress:
            training.poll()  # raises Interrupted for a signal that has come between two epochs
            for images, targets in training.awaiting(batches.epoch(training.epoch, start=training.step)):
                if mix is not None and len(images):
                    images, targets = mix(images, targets)
                total = batches.images_in(training.step)
                train_step(training, images, targets, loss_function, total)
                progress.advance(total)
                sync, is_save_due = training.poll(sync=sync_timer.is_due(), save=save_timer.is_due())  # may raise Interrupted
                if sync or training.step % READ_EVERY == 0:
                    training.check_finite()
                    if progress.due:
                        progress.show(*training.meter.read()[:2])
                if is_save_due and save is not None:
                    training.seconds = earlier + time.perf_counter() - started
                    save()
    finally:  # of an interrupted epoch too: a resumed run adds to it
        training.seconds = earlier + time.perf_counter() - started
    training.check_finite()
    return training.meter.read(processes.sum_(training.meter.sums.clone()))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    loss_function: Callable = nn.functional.cross_entropy,
    *,
    device: torch.device | None = None,
    compiled: Callable | None = None,
    autocast: Callable = nullcontext,
    title: str = "test",
    processes: Processes | None = None,
    predictions: Predictions | None = None,
    polled: Callable[[Iterator], Iterator] = iter,
) -> Metrics:
    """Return means over all images of `batches`, each counted once.

    Args:
        batches: those of `load_data`, or any iterable of (images, labels).
        device: of the model; None: that of its first parameter.
        compiled: the compiled model, if there is one.
        predictions: receives the predicted classes.
        polled: yields the batches until a signal.
    """
    device = device or next(model.parameters()).device
    batches = as_batches(batches, device)
    model.eval()
    compiled = model if compiled is None else compiled
    processes = processes or Processes()
    meter = Meter(device)
    # One row of sums per batch, added up in the order of the batches, whichever process computed them. A running sum in
    # floating point would not give exactly the same result with another number of processes.
    rows = meter.sums.new_zeros(batches.num_batches, 4)
    with Progress(title, batches.num_samples, quiet=not processes.first) as progress:
        for step, (images, labels) in enumerate(polled(batches.epoch(0))):
            if len(images):
                with autocast():
                    logits = compiled(images).float()
                number = step * processes.world + processes.rank
                rows[number] = meter.tally(loss_function(logits, labels), logits, labels)
                if predictions is not None:
                    predictions.add(number, logits, labels)
            progress.advance(batches.images_in(step))
            if (step + 1) % READ_EVERY == 0 and progress.due:
                progress.show(*meter.read(rows.sum(0))[:2])
    if predictions is not None:
        processes.sum_(predictions.table)
    return meter.read(processes.sum_(rows).sum(0))


# ---------------------------------------------------------------------------------------------------------------
# All epochs
# ---------------------------------------------------------------------------------------------------------------


def fit(training: Training, data: Data, folder: RunFolder, options: dict, facts: dict, tracker: Tracker | None = None) -> dict:
    """Train until the last epoch or early stopping, write the outputs after every epoch; return the row of the best epoch.

    Args:
        options: the contents of `args.txt`.
        facts: of model and data, for `summary.json`.
        tracker: also receives the row of every epoch.
    """
    config, processes = training.config, training.processes
    # Label smoothing is for training: losses of different settings compare only without it.
    loss_function, plain_loss = make_loss(config.criterion, config.label_smoothing), make_loss(config.criterion)
    mix = make_mix(config.mixup, config.cutmix, facts["num_classes"])
    split = data.selection_split

    def save(*others):
        training.check_finite()
        state = training.state_dict(options)  # collective: it gathers the random states of all processes
        if processes.first:
            folder.save(state, *others)

    def ended() -> bool:
        return training.epoch >= config.num_epochs or stalled(training.history, split, config.early_stopping)

    def publish() -> None:
        if processes.first:
            for receiver in filter(None, (board, tracker)):
                receiver.epoch_done(training.history[-1])
            folder.write_predictions(training.predictions)
            folder.epoch_done(training.history, training.best, summarize(training, split, facts, ended()), last=ended())

    is_behind = bool(training.history) and processes.first and folder.is_behind(training.epoch, ended())
    board = Board(folder.path, training.epoch - is_behind) if config.tensorboard and processes.first else None
    if is_behind:
        publish()  # the results of a run that was killed between its last checkpoint and its results
    try:
        with training.signals.deferred():  # from here on there is something to save: a signal waits for the end of a step
            while not ended():
                with stop_if_out_of_memory(f"a step of --batch_size {config.batch_size} images", MEMORY_ADVICE):
                    metrics = {"train": train_one_epoch(training, data.train, loss_function, mix, save)}
                trained = time.monotonic()
                with stop_if_out_of_memory(f"an evaluation of --batch_size {config.batch_size} images", MEMORY_ADVICE):
                    metrics |= _evaluate_splits(training, data, plain_loss)
                epoch = training.epoch + 1
                row = history_row(epoch, training.epoch_lr, metrics, data.train.num_samples, training.seconds)
                training.epoch_done(row, split)
                kept = [folder.best] * (training.best == row)
                kept += [folder.path / f"epoch_{epoch}.pt"] * bool(config.save_every and epoch % config.save_every == 0)
                # Checkpoints before results: a run killed in between publishes again when it is resumed.
                save(*kept)
                publish()
                if processes.first:
                    left = (config.num_epochs - epoch) * (row["seconds"] + time.monotonic() - trained)
                    print(epoch_line(row, 0 if ended() else left), flush=True)
    except (Interrupted, DataError) as error:  # a signal stops all processes at the same step, missing data only one of them
        if isinstance(error, Interrupted) or processes.world == 1:
            save()
            processes.finish()
            error.resumable = True
        raise
    return training.best


def _evaluate_splits(training: Training, data: Data, loss_function: Callable) -> dict[str, Metrics]:
    training.share_statistics()  # until here they differ between the processes
    predictions = Predictions(data.test, training.device)
    metrics = {
        name: evaluate(
            training.eval_model,
            batches,
            loss_function,
            device=training.device,
            compiled=training.compiled_eval_model,
            autocast=training.autocast,
            title=name,
            processes=training.processes,
            predictions=predictions if name == "test" else None,
            polled=training.polled,  # raises Interrupted after a signal
        )
        for name, batches in (("val", data.val), ("test", data.test))
        if batches is not None
    }
    training.predictions |= predictions.columns("last")
    return metrics


# ---------------------------------------------------------------------------------------------------------------
# A run, from options to outputs
# ---------------------------------------------------------------------------------------------------------------


def run(
    options: Options,
    make_model: Callable[[ModelConfig], nn.Module],
    load: Callable[[nn.Module, dict, LoadPolicy], Loaded] = load_state,
    *,
    program: Program,
    stated: dict,
    warnings: Sequence[str] = (),
) -> int:
    """Train, or evaluate a checkpoint under --test_only; return the exit status. User errors raise SystemExit(2).

    Args:
        load: puts the state dict of a --checkpoint into the model; by default only one of exactly this architecture.
        program: the command line that is running.
        stated: options set on the command line or in --config, by name; --test_only takes the others from the checkpoint.
        warnings: lines about the options, printed once nothing can be wrong any more.
    """
    processes, begun = Processes(), False
    try:
        processes = Processes.from_environment()
        with Signals() as signals, processes, stop_if_out_of_memory("what this run needs", MEMORY_ADVICE):
            request = Request(options, make_model, load, processes, signals)
            if options.train.test_only:
                evaluation = begin_test(request, program, stated)
                begun = True
                _test(*evaluation)
            else:
                folder = RunFolder(options.train.output_dir)
                with folder.claimed(options.train) if processes.first else nullcontext():
                    training, data, facts = begin_training(request, warnings)
                    begun = True
                    _train(training, data, folder, options, facts)
    except (KeyboardInterrupt, RunError, DataError, Stopped, RuntimeError, OSError) as error:
        return exit_status(error, options, processes, begun)
    return 0


def train(
    model: nn.Module,
    train_loader: Iterable,
    test_loader: Iterable,
    config: TrainConfig = TrainConfig(),  # noqa: B008  it is immutable
    *,
    output_dir: str | Path | None = None,
) -> dict:
    """Train a classifier, (B, ...) -> (B, classes), as the programs do; return the row of the best epoch.

    The loaders, iterables of (images (B, ...), labels (B,)), are read once before training, then once per epoch. The default of
    `output_dir` is ./Output/ and the class of the model. Raises TypeError, ValueError, RunError, DataError or Stopped, each in
    one line, and KeyboardInterrupt after a signal, once the state is saved.
    """
    given = Given(model, train_loader, test_loader, config, output_dir)
    folder, memory = RunFolder(given.options.train.output_dir), stop_if_out_of_memory("what this run needs", MEMORY_ADVICE)
    with plain_interrupts(), Signals() as signals, memory, folder.claimed(given.options.train):
        request = Request(given.options, lambda _: model, load_state, Processes(), signals, given.read)
        training, data, facts = begin_training(request, [])
        _train(training, data, folder, given.options, facts)
    return training.best


def _train(training: Training, data: Data, folder: RunFolder, options: Options, facts: dict) -> None:
    first, plain = training.processes.first, options.as_dict()
    with Tracker(folder.path, plain) if options.train.wandb and first else nullcontext() as tracker:
        best = fit(training, data, folder, plain, facts, tracker)
        if not first:
            return
        if options.train.export:
            export(Path(options.train.export), training.model, facts, folder.best)
        split = data.selection_split
        print(f"best {split} top-1 {best[f'{split}_top1']:.2f} % in epoch {best['epoch']}; results are in {folder.path}")


def _test(request: Request, model: nn.Module, data: Data, path: Path, facts: dict) -> None:
    """Evaluate a checkpoint on the test images; print and write test_results.json, nothing else."""
    options, processes, device = request.options, request.processes, next(model.parameters()).device
    train = options.train
    predictions = Predictions(data.test, device)
    with stop_if_out_of_memory(f"an evaluation of --batch_size {train.batch_size} images", MEMORY_ADVICE):
        metrics = evaluate(
            model,
            data.test,
            make_loss(train.criterion),
            device=device,
            compiled=compile_for(train, model),
            autocast=autocast_for(train, device),
            processes=processes,
            predictions=predictions,
        )
    if not processes.first:
        return
    if not math.isfinite(metrics.loss):
        raise Stopped(f"the test loss of {path} is not finite: its weights overflow in this model")
    print(f"test top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}  ({path})")
    results = {
        **metrics._asdict(),
        "images": data.test.num_samples,
        "checkpoint": str(path),
        "parameters": count_parameters(model),
        "flops_per_image": facts["flops_per_image"],
        **costs_of(model, facts["image_shape"], device),
        **predictions.summary(data.class_names),
        "options": evaluation_options(options),
        "override": facts["override"],
    }
    written = RunFolder(train.output_dir).write_test_results(results, predictions.columns("predicted"))
    if train.export:
        export(Path(train.export), model, facts)
    others = ": test_results.json is of other options" * (written.name != "test_results.json")
    if others or train.checkpoint:
        print(f"results are in {written}{others}")
