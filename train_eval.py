"""Training and evaluation: one loop for fp32 and mixed precision, eager and compiled.

`run` is what both command lines call. `fit` trains epoch by epoch and writes the outputs; `train_one_epoch` and
`evaluate` are its two halves. Losses and counts stay on the device: the host waits for it every 20 steps.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import utils
from dataset import Data, DataError, import_torchvision, load_data
from options import Options, TrainConfig
from processes import Interrupted, ProcessError, Processes, Signals
from utils import Progress, RunError, RunFolder, WriteError

READ_EVERY, READ_SECONDS = 20, 5  # steps, or seconds, between two looks at numbers on the device


class NonFiniteLoss(Exception):
    """A loss or gradient that is not finite; the weights are those before that step."""


class Metrics(NamedTuple):
    """Means over images; accuracies in percent."""

    loss: float
    top1: float
    top5: float


class Meter:
    """Sums over images, on the device: loss, top-1 and top-5 correct, seen. Top-5 of n < 5 classes is top-n."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """loss: mean over these images; logits (B, classes); targets (B,), or (B, classes): the largest share counts."""
        self.sums += self.tally(loss, logits, targets)

    def tally(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The sums over these images alone (4,)."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        hits = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        count = torch.full_like(self.sums[0], len(labels))
        return torch.stack([loss.detach() * count, hits[:, 0].sum(), hits.sum(), count])

    def read(self, sums: Tensor | None = None) -> Metrics:
        """Means; of other sums than its own if given. Waits for the device."""
        loss, top1, top5, seen = (self.sums if sums is None else sums).tolist()
        seen = max(seen, 1)
        return Metrics(loss / seen, 100 * top1 / seen, 100 * top5 / seen)


# ---------------------------------------------------------------------------------------------------------------
# The parts of a training step
# ---------------------------------------------------------------------------------------------------------------


def make_loss(criterion: str, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean loss of logits (B, classes) against labels (B,) or shares (B, classes); MSE is on one-hot targets."""
    if criterion == "CrossEntropy":
        return lambda logits, targets: F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        shares = F.one_hot(targets, classes).to(logits.dtype) if targets.ndim == 1 else targets
        return F.mse_loss(logits, shares * (1 - label_smoothing) + label_smoothing / classes)

    return mean_squared_error


def make_mix(mixup: float, cutmix: float, num_classes: int) -> Callable | None:
    """mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of a batch, or None; labels become shares (B, classes)."""
    if not mixup and not cutmix:
        return None
    v2 = import_torchvision().transforms.v2
    mixes = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    return v2.RandomChoice(mixes)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """A fused optimizer: it can skip a step on the device, without the host having to know."""
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=config.momentum, **shared)
        if config.momentum:
            # Else made in the first step, of memory as it is: a fused step that is skipped then leaves anything in it.
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](model.parameters(), **shared)


class LearningRate:
    """Linear warm-up per step, then step or cosine by epoch and step, plateau by epoch, or constant."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int):
        self.optimizer = optimizer
        self.config = config
        self.warmup_steps = config.warmup_epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        schedulers = torch.optim.lr_scheduler
        self.by_step = schedulers.LambdaLR(optimizer, self.factor)
        self.plateau = schedulers.ReduceLROnPlateau(
            optimizer, factor=config.lr_gamma, patience=config.lr_step - 1, threshold=0, eps=0
        )

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at this optimizer step, counted from 0 over the whole run."""
        cfg = self.config
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        step -= self.warmup_steps
        if cfg.scheduler == "step":
            return cfg.lr_gamma ** (step // (self.steps_per_epoch * cfg.lr_step))
        if cfg.scheduler == "cosine":
            total = (cfg.num_epochs - cfg.warmup_epochs) * self.steps_per_epoch
            return 0.5 * (1 + math.cos(math.pi * min(1, step / max(total, 1))))
        return 1.0

    def step(self) -> None:
        # Under plateau the rate is the other scheduler's once warm-up is over.
        if self.config.scheduler != "plateau" or self.by_step.last_epoch < self.warmup_steps:
            self.by_step.step()

    def epoch_done(self, loss: float) -> None:
        if self.config.scheduler == "plateau" and self.by_step.last_epoch >= self.warmup_steps:
            self.plateau.step(loss)

    @property
    def now(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict:
        # Without the function and the bound methods, which a checkpoint of plain values cannot hold.
        by_step = {k: v for k, v in self.by_step.state_dict().items() if k != "lr_lambdas"}
        plateau = {k: v for k, v in self.plateau.state_dict().items() if isinstance(v, (int, float, str, list))}
        return {"by_step": by_step, "plateau": plateau}

    def load_state_dict(self, state: dict) -> None:
        self.by_step.load_state_dict(state["by_step"] | {"lr_lambdas": [None]})
        self.plateau.load_state_dict(state["plateau"])


class Average:
    """Exponential moving average of weights and BatchNorm statistics, the model that is then evaluated."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        mine, new = list(self.model.state_dict().values()), list(model.state_dict().values())
        averaged = [pair for pair in zip(mine, new, strict=True) if pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], 1 - self.decay)
        for a, b in zip(mine, new, strict=True):
            if not a.is_floating_point():
                a.copy_(b)


def autocast_for(config: TrainConfig, device: torch.device):
    """A context maker for mixed precision, a no-op without --use_amp. Raises RunError for float16 without CUDA."""
    if not config.use_amp:
        return nullcontext
    if config.amp_dtype == "float16" and device.type != "cuda":
        raise RunError(f"--amp_dtype float16 needs CUDA, the device is {device.type}; use --amp_dtype bfloat16")
    return lambda: torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype))


def compile_for(config: TrainConfig, model: nn.Module) -> Callable:
    """The model as it is called: compiled under --use_compiled; parameters are shared with `model`."""
    if not config.use_compiled:
        return model
    # A graph for each size of batch: with graphs for all sizes, which torch makes when it sees a second one, the numbers
    # would depend on the batch that a run begins with, and a resumed run begins with another.
    torch._dynamo.config.recompile_limit = 64
    if config.compile_mode == "reduce-memory":
        model.recompute = True
        return torch.compile(model, dynamic=False)
    return torch.compile(model, mode=config.compile_mode, dynamic=False)


def new_step(config: TrainConfig, device: torch.device) -> None:
    """Let CUDA graphs reuse the memory of the step before; micro-batches of one step keep theirs."""
    if config.use_compiled and device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


class Training:
    """Everything that a training step changes, which is what `last.pt` holds."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        steps_per_epoch: int,
        processes: Processes | None = None,
        signals: Signals | None = None,
    ):
        self.model, self.config, self.device = model, config, device
        self.processes, self.signals = processes or Processes(), signals or Signals()
        compiled = compile_for(config, model)
        self.call = self.processes.parallel(compiled)
        self.autocast = autocast_for(config, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.schedule = LearningRate(self.optimizer, config, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.use_amp and config.amp_dtype == "float16")
        self.average = Average(model, config.ema_decay) if config.ema_decay else None
        self.evaluated = self.average.model if self.average else model
        self.call_evaluated = compile_for(config, self.average.model) if self.average else compiled
        self.meter = Meter(device)
        self.seconds = 0.0  # of training in this epoch, before it was interrupted
        self.lr = config.lr  # at the start of this epoch
        self.epoch = 0  # epochs done
        self.step = 0  # steps done in the epoch after that
        self.best: dict = {}  # row of the history
        self.history: list[dict] = []
        # 1 from the first step on whose loss or gradient is not finite; then no step reaches the weights.
        self.bad = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, device=device, dtype=torch.long)
        self.bad_lr = torch.zeros((), device=device)

    def update(self, images: Tensor, targets: Tensor, loss_function: Callable, total: int | None = None) -> None:
        """One optimizer step on a batch, in micro-batches under --accumulate_steps.

        total: images of all processes in this step, of which `images` are this one's share; None: there are no others.
        """
        self.optimizer.zero_grad(set_to_none=True)
        new_step(self.config, self.device)
        finite = torch.ones_like(self.bad, dtype=torch.bool)
        idle = len(images) == 0  # more processes than images in the last batch: only join in the sum of gradients
        if idle:
            images, targets = images.new_zeros(2, *images.shape[1:]), targets.new_zeros(2, *targets.shape[1:])
        total, world = total or len(images), self.processes.world
        size = math.ceil(len(images) / self.config.accumulate_steps)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        for number, (part, part_targets) in enumerate(parts, start=1):
            alone = world > 1 and number < len(parts)
            with self.call.no_sync() if alone else nullcontext():
                with self.autocast():
                    logits = self.call(part)
                logits = logits.float()
                loss = loss_function(logits, part_targets)
                # A loss that is not finite, now or before, makes all gradients NaN: on all processes, as they are summed,
                # and for the scaler of float16, which then skips the step.
                poison = torch.where(loss.detach().isfinite() & (self.bad == 0), 1.0, math.nan)
                share = 0.0 if idle else world * len(part) / total  # gradients become means over the processes
                self.scaler.scale(loss * (poison * share)).backward()
            if not idle:
                self.meter.add(loss, logits, part_targets)
                finite &= loss.detach().isfinite()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_grad_norm:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad_norm, norm)
        if self.scaler.is_enabled():  # gradients that overflow are the scaler's business
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            finite &= norm.isfinite()
        now_bad = self.processes.maximum_(torch.maximum(self.bad, (~finite).float()))
        self.bad_step = torch.where(now_bad > self.bad, self.step, self.bad_step)
        self.bad_lr = torch.where(now_bad > self.bad, self.schedule.now, self.bad_lr)
        self.bad = now_bad
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self.bad
            self.optimizer.step()
        if self.average:
            self.average.update(self.model)
        self.schedule.step()
        self.step += 1

    def check_finite(self) -> None:
        """Raise NonFiniteLoss if a step was not finite. Waits for the device."""
        step = self.bad_step.item()
        if step >= 0:
            advice = "a lower --lr, --warmup_epochs"
            advice += "" if self.config.clip_grad_norm else ", --clip_grad_norm 1"
            advice += ", --amp_dtype bfloat16" if self.scaler.is_enabled() else ""
            raise NonFiniteLoss(
                f"the loss or its gradient is not finite at epoch {self.epoch + 1}, step {step + 1}, learning rate "
                f"{self.bad_lr.item():g}; that step did not reach the weights. Try {advice}"
            )

    def agree(self, look: bool = False, save: bool = False) -> tuple[bool, bool]:
        """Whether any process wants to look at the device, or to save. Raises Interrupted if one was told to stop."""
        number, look, save = self.processes.agree(self.signals.received, look, save)
        if number:
            raise Interrupted(number)
        return bool(look), bool(save)

    def total(self) -> Metrics:
        """Means over the images of all processes in this epoch so far."""
        return self.meter.read(self.processes.sum_(self.meter.sums.clone()))

    def epoch_done(self, row: dict, judge: str) -> None:
        """Take up the row of an epoch that is trained and evaluated; `judge` names the part that chooses the best one.

        Raises NonFiniteLoss.
        """
        for name in ("train", "val", "test"):
            if not math.isfinite(row.get(f"{name}_loss", 0.0)):
                raise NonFiniteLoss(f"the {name} loss is not finite after epoch {row['epoch']}; try a lower --lr")
        self.schedule.epoch_done(row[f"{judge}_loss"])
        self.history.append(row)
        if not self.best or row[f"{judge}_top1"] > self.best[f"{judge}_top1"]:
            self.best = row
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.meter = Meter(self.device)

    def share_statistics(self) -> None:
        """BatchNorm's running statistics become those of the first process, which are those that are saved."""
        for model in [self.model] + ([self.average.model] if self.average else []):
            parameters = dict(model.named_parameters())
            self.processes.share(value for name, value in model.state_dict().items() if name not in parameters)

    def state_dict(self, options: dict) -> dict:
        """Tensors and plain values only; of several processes all must call it."""
        # What differs between processes: random numbers, and sums over their shares of the images.
        own = self.processes.gather((utils.random_state(self.device), self.meter.sums.cpu()))
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "sampler": {
                "seed": self.config.seed,
                "sums": [sums for _, sums in own],
                "seconds": self.seconds,
                "lr": self.lr,
            },
            "rng": [rng for rng, _ in own],
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "config": options,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.model.load_state_dict(state["ema"])
        self.seconds, self.lr = state["sampler"]["seconds"], state["sampler"]["lr"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.best, self.history = state["best"], state["history"]
        rank, sums, rng = self.processes.rank, state["sampler"]["sums"], state["rng"]
        if len(sums) != len(rng) or any(value.shape != (4,) for value in sums):
            raise ValueError("sums and random states of the processes")
        if len(sums) == self.processes.world:
            self.meter.sums.copy_(sums[rank])
            utils.set_random_state(rng[rank], self.device)
        else:  # other processes than those that saved it: equal in distribution, not in numbers
            self.meter.sums.copy_(sum(sums) if rank == 0 else torch.zeros_like(sums[0]))
            utils.seed_process(self.config.seed, rank, self.epoch, self.step)


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
    training.model.train()
    config, processes = training.config, training.processes
    if training.step == 0:
        training.lr = training.schedule.now
    started, earlier = time.perf_counter(), training.seconds
    saved = looked = time.monotonic()
    done = training.step * config.batch_size
    title = f"epoch {training.epoch + 1}/{config.num_epochs}"
    try:
        with Progress(title, batches.num_samples, done, quiet=not processes.first) as progress:
            training.agree()
            for images, targets in batches.epoch(training.epoch, start=training.step):
                if mix is not None and len(images):
                    images, targets = mix(images, targets)
                total = batches.images_in(training.step)
                training.update(images, targets, loss_function, total)
                progress.advance(total)
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
    finally:
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
    call: Callable | None = None,
    autocast: Callable = nullcontext,
    title: str = "test",
    processes: Processes | None = None,
    check: Callable[[], object] = lambda: None,
) -> Metrics:
    """Means over all images of `batches`, every one counted once; `call` is the compiled model if there is one.

    The sums are kept by batch and added up in their order, whichever process computed them: the result of several is exactly
    that of one. `check` is called after every batch, on all processes equally often.
    """
    model.eval()
    call = model if call is None else call
    processes = processes or Processes()
    meter = Meter(device)
    rows = meter.sums.new_zeros(-(-batches.num_samples // batches.recipe.batch_size), 4)
    with Progress(title, batches.num_samples, quiet=not processes.first) as progress:
        for step, (images, labels) in enumerate(batches.epoch(0)):
            if len(images):
                with autocast():
                    logits = call(images).float()
                rows[step * processes.world + processes.rank] = meter.tally(loss_function(logits, labels), logits, labels)
            progress.advance(batches.images_in(step))
            check()
            if (step + 1) % READ_EVERY == 0 and progress.due:
                progress.show(*meter.read(rows.sum(0))[:2])
    return meter.read(processes.sum_(rows).sum(0))


def fit(
    training: Training,
    data: Data,
    folder: RunFolder,
    options: dict,
    facts: dict,
) -> dict:
    """Train until the last epoch or until early stopping, writing the outputs after every epoch.

    options: what `args.txt` holds; facts: of the model, for `summary.json`. Returns the row of the best epoch.
    """
    config, processes = training.config, training.processes
    loss_function, plain_loss = make_loss(config.criterion, config.label_smoothing), make_loss(config.criterion)
    mix = make_mix(config.mixup, config.cutmix, facts["num_classes"])
    judge = "val" if data.val is not None else "test"
    board = _tensorboard(folder, training.epoch) if config.tensorboard and processes.first else None

    def save(*others):
        training.check_finite()
        state = training.state_dict(options)
        if processes.first:
            folder.save(state, *others)

    def ended() -> bool:
        return training.epoch >= config.num_epochs or _stalled(training.history, judge, config.early_stopping)

    def publish() -> None:
        if processes.first:
            folder.epoch_done(training.history, training.best, _summary(training, judge, facts, ended()), last=ended())

    if training.history and processes.first and folder.is_behind(len(training.history), ended()):
        publish()  # of a run that was killed after it had saved and before it had written its results
    try:
        with training.signals.deferred():
            while not ended():
                metrics = {"train": train_one_epoch(training, data.train, loss_function, mix, save)}
                metrics |= _evaluate_parts(training, data, plain_loss)
                training.epoch_done(_row(training, metrics, data.train.num_samples), judge)
                row, epoch = training.history[-1], training.epoch
                kept = [folder.best] * (training.best == row)
                kept += [folder.path / f"epoch_{epoch}.pt"] * bool(config.save_every and epoch % config.save_every == 0)
                save(*kept)
                publish()
                if processes.first:
                    left = (config.num_epochs - epoch) * row["seconds"]
                    eta = "" if ended() else f"  ETA {tqdm.format_interval(left)}"
                    print(utils.epoch_line(row) + eta, flush=True)
                if board is not None:
                    for name, value in row.items():
                        board.add_scalar(name, value, epoch)
                    board.flush()
    except Interrupted as interrupted:
        save()
        processes.finish()
        interrupted.is_saved = True
        raise
    return training.best


def _evaluate_parts(training: Training, data: Data, loss_function: Callable) -> dict[str, Metrics]:
    """Metrics of the validation images, if there are any, and of the test images."""
    training.share_statistics()
    return {
        name: evaluate(
            training.evaluated,
            batches,
            loss_function,
            device=training.device,
            call=training.call_evaluated,
            autocast=training.autocast,
            title=name,
            processes=training.processes,
            check=training.agree,
        )
        for name, batches in (("val", data.val), ("test", data.test))
        if batches is not None
    }


def _stalled(history: list[dict], judge: str, patience: int) -> bool:
    """Whether the last `patience` epochs brought no better loss; 0: never."""
    if not patience or len(history) <= patience:
        return False
    losses = [row[f"{judge}_loss"] for row in history]
    return min(losses[-patience:]) >= min(losses[:-patience])


def _row(training: Training, metrics: dict[str, Metrics], images: int) -> dict:
    row = {"epoch": training.epoch + 1, "lr": training.lr}
    for name in ("train", "test"):
        row |= {f"{name}_{key}": value for key, value in metrics[name]._asdict().items()}
    row |= {"seconds": training.seconds, "images_per_s": images / max(training.seconds, 1e-9)}
    if "val" in metrics:
        row |= {f"val_{key}": value for key, value in metrics["val"]._asdict().items()}
    return row


def _summary(training: Training, judge: str, facts: dict, ended: bool) -> dict:
    chosen = {"val": "validation set", "test": "test set"}[judge]
    note = "" if judge == "val" else "The best epoch was chosen on the test set; --val_fraction chooses it on held-out images."
    seconds = [row["seconds"] for row in training.history]
    image = torch.zeros(1, *facts["image_shape"], device=training.device)
    return {
        "finished": ended,
        "epochs": len(training.history),
        "best_epoch_chosen_on": chosen,
        "note": note,
        "final": training.history[-1],
        "best": training.best,
        "average_epoch_seconds": sum(seconds) / len(seconds),
        **facts,
        **utils.peak_memory(training.device),
        "latency_ms_per_image": utils.measure_latency(training.model, image) if ended else None,
        "device": utils.device_name(training.device),
        "versions": utils.versions(),
    }


def _tensorboard(folder: RunFolder, epochs: int):
    """A writer; of events after these epochs, which an interrupted run may have left, none are shown."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder.path / "tensorboard", purge_step=epochs + 1)


# ---------------------------------------------------------------------------------------------------------------
# A run, from options to outputs
# ---------------------------------------------------------------------------------------------------------------


def run(
    options: Options,
    make_model: Callable[[], nn.Module],
    fail: Callable[[str], None],
    load: Callable[[nn.Module, dict], None] = utils.load_state,
) -> int:
    """Train, or evaluate under --test_only, as the options say; returns the exit status.

    `fail` ends the program with one line and status 2 for what the user can mend; `load` puts the state dict of a
    --checkpoint into the model.
    """
    signals, processes = Signals(), None
    try:
        processes = Processes.from_environment()
        with signals, processes:
            (_test if options.train.test_only else _train)(_Run(options, make_model, load, processes, signals))
    except (RunError, DataError, ProcessError) as error:
        if isinstance(error, DataError) and processes.local_rank:
            print(error, file=sys.stderr)  # of this process alone: `fail` leaves the faults of all to the first one
        fail(str(error))
    except (NonFiniteLoss, WriteError, OSError) as error:
        if processes.first:
            print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        if processes is None or processes.first:
            last = RunFolder(options.train.output_dir).last
            hint = f"; --resume goes on from {last}" if getattr(error, "is_saved", False) else ""
            print(f"stopped by {signal.Signals(number).name}{hint}", file=sys.stderr)
        return 128 + number
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        fail(
            f"--batch_size {options.train.batch_size} leaves a batch with one image, whose last map is one pixel: BatchNorm "
            "has nothing to compare; use another --batch_size, --accumulate_steps or --resize"
        )
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if options.train.deterministic and "deterministic" in text:
            fail(f"--deterministic: --layer {options.model.layer} has a step without a deterministic form here ({text[:150]})")
        if "DataLoader worker" in text:  # noticed by torch's handler of signals, wherever the run was
            fail(f"a process that reads images died ({text[:150]}); try --num_workers 0")
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in text
        if processes.world == 1 or not lost:
            raise
        if processes.first:  # the others may have said what it was
            print(f"stopped: process 0 has lost another one of {processes.world}", file=sys.stderr)
        return 1
    return 0


class _Run(NamedTuple):
    options: Options
    make_model: Callable[[], nn.Module]
    load: Callable[[nn.Module, dict], None]
    processes: Processes
    signals: Signals


def _prepare(run: _Run) -> tuple[nn.Module, RunFolder, torch.device]:
    """Everything that can fail before data is read or a file is written."""
    train, processes = run.options.train, run.processes
    if train.batch_size < processes.world * train.accumulate_steps:
        what = f"{processes.world} processes" + f" of {train.accumulate_steps} micro-batches each" * (
            train.accumulate_steps > 1
        )
        raise RunError(f"--batch_size {train.batch_size} is the total, and fewer images than {what}")
    device = utils.pick_device(train.device, processes)
    autocast_for(train, device)
    folder = RunFolder(train.output_dir)
    utils.check_writable(folder.path, "--output_dir")
    if train.export:
        utils.check_writable(Path(train.export).parent, "--export")
        if Path(train.export).is_dir():
            raise RunError(f"--export {train.export} is a folder; name a file")
    if train.mixup or train.cutmix:
        import_torchvision()
    if train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard")
    utils.seed_everything(train.seed, train.deterministic)
    return run.make_model(), folder, device


def _load_data(run: _Run, device: torch.device) -> Data:
    options, processes = run.options, run.processes
    with processes.first_of_machine_first():  # which may download it
        return load_data(
            options.data,
            batch_size=options.train.batch_size,
            seed=options.train.seed,
            device=device,
            test_only=options.train.test_only,
            rank=processes.rank,
            world=processes.world,
        )


def _test(run: _Run) -> None:
    """Evaluate --checkpoint, else best.pt of the output folder; print and write test_results.json, nothing else."""
    model, folder, device = _prepare(run)
    train, processes = run.options.train, run.processes
    path = Path(train.checkpoint) if train.checkpoint else folder.best
    if not path.exists():
        raise RunError(f"--test_only: there is no {path}; train first, or name the weights with --checkpoint FILE")
    utils.load_weights(model, path, run.load, "--checkpoint" if train.checkpoint else "--test_only")
    processes.connect(device)
    data = _load_data(run, device)
    model.to(device)
    metrics = evaluate(
        model,
        data.test,
        make_loss(train.criterion),
        device=device,
        call=compile_for(train, model),
        autocast=autocast_for(train, device),
        processes=processes,
    )
    if not processes.first:
        return
    print(f"test top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}  ({path})")
    results = {**metrics._asdict(), "images": data.test.num_samples, "checkpoint": str(path)}
    folder.path.mkdir(parents=True, exist_ok=True)
    utils.write_atomically(folder.path / "test_results.json", json.dumps(results, indent=2) + "\n")


def _train(run: _Run) -> None:
    model, folder, device = _prepare(run)
    options, processes = run.options, run.processes
    train, plain = options.train, options.as_dict()
    found = utils.resumable_state(folder, plain, quiet=not processes.first) if train.resume else None
    if train.export and found is not None and found[0]["best"] and not folder.best.exists():
        raise RunError(f"--export: {folder.best} of epoch {found[0]['best']['epoch']} is gone; leave --export out")
    if train.checkpoint and found is None:
        utils.load_weights(model, Path(train.checkpoint), run.load)
    processes.connect(device)
    # Files that not all of them see would train something else, or make them wait for ever.
    seen = processes.gather(None if found is None else [found[1].name, found[0]["epoch"], found[0]["step"]])
    if any(one != seen[0] for one in seen):
        raise ProcessError(
            f"--resume: the processes find different states in --output_dir {folder.path}: {seen}; all must see it"
        )
    data = _load_data(run, device)
    model.to(device)
    training = Training(model, train, device, len(data.train), processes, run.signals)
    if found is None:
        utils.seed_process(train.seed, processes.rank)
    else:
        _resume(training, *found)
        if processes.first:
            folder.restore(found[1])
            if training.best and not folder.best.exists():
                print(f"warning: {folder.best} of epoch {training.best['epoch']} is gone", file=sys.stderr)
    shape = (options.model.in_channels, *options.model.image_size)
    facts = {
        "parameters": utils.count_parameters(model),
        "flops_per_image": utils.count_flops(model, torch.zeros(1, *shape, device=device)),
        "image_shape": shape,
        "num_classes": options.model.num_classes,
        "train_images": data.train.num_samples,
        "test_images": data.test.num_samples,
        "processes": processes.world,
    }
    if processes.first:
        folder.start(plain, model, resumed=found is not None)
        print(
            f"{options.model.layer} on {options.data.dataset}: {facts['parameters']:,} parameters, "
            f"{facts['flops_per_image'] / 1e6:,.2f} MFLOPs per image, {facts['train_images']:,} training and "
            f"{facts['test_images']:,} test images, on {utils.device_name(device)}"
            + (f", {processes.world} processes" if processes.world > 1 else ""),
            flush=True,
        )
    best = fit(training, data, folder, plain, facts)
    if not processes.first:
        return
    if train.export:
        utils.export_weights(Path(train.export), utils.evaluated_weights(folder.best))
    judge = "val" if data.val is not None else "test"
    print(f"best {judge} top-1 {best[f'{judge}_top1']:.2f} % in epoch {best['epoch']}; results are in {folder.path}")


def _resume(training: Training, state: dict, path: Path) -> None:
    """Go on from the state that was in this file. Raises RunError if it is not that of such a training."""
    processes = training.processes
    try:
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise RunError(f"--resume: {path} is damaged ({type(error).__name__})") from None
    if processes.first:
        print(f"resumed {path}: {training.epoch} epochs and {training.step} steps are done")
        if len(state["rng"]) != processes.world:
            print(
                f"warning: {len(state['rng'])} processes trained so far, now there are {processes.world}: "
                "the numbers will not be exactly those of a run that was not interrupted",
                file=sys.stderr,
            )
    processes.wait()  # before the first one writes over what others still read
