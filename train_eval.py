"""Training and evaluation: one loop for fp32 and mixed precision, eager and compiled.

`run` is what both command lines call. `fit` trains epoch by epoch and writes the outputs; `train_one_epoch` and
`evaluate` are its two halves. Losses and counts stay on the device: the host waits for it every 20 steps.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
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
from utils import Progress, RunError, RunFolder

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
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        hits = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        count = torch.full_like(self.sums[0], len(labels))
        self.sums += torch.stack([loss.detach() * count, hits[:, 0].sum(), hits.sum(), count])

    def read(self) -> Metrics:
        """Waits for the device."""
        loss, top1, top5, seen = self.sums.tolist()
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
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **shared)
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
    if config.compile_mode == "reduce-memory":
        model.recompute = True
        return torch.compile(model)
    return torch.compile(model, mode=config.compile_mode)


def new_step(config: TrainConfig, device: torch.device) -> None:
    """Let CUDA graphs reuse the memory of the step before; micro-batches of one step keep theirs."""
    if config.use_compiled and device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


class Training:
    """Everything that a training step changes, which is what `last.pt` holds."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, steps_per_epoch: int):
        self.model, self.config, self.device = model, config, device
        self.call = compile_for(config, model)
        self.autocast = autocast_for(config, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.schedule = LearningRate(self.optimizer, config, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.use_amp and config.amp_dtype == "float16")
        self.average = Average(model, config.ema_decay) if config.ema_decay else None
        self.evaluated = self.average.model if self.average else model
        self.call_evaluated = compile_for(config, self.average.model) if self.average else self.call
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

    def update(self, images: Tensor, targets: Tensor, loss_function: Callable) -> None:
        """One optimizer step on a batch, in micro-batches under --accumulate_steps."""
        self.optimizer.zero_grad(set_to_none=True)
        new_step(self.config, self.device)
        finite = torch.ones_like(self.bad, dtype=torch.bool)
        poison = torch.where(self.bad > 0, math.nan, 1.0)  # float16: makes the scaler skip the step too
        size = math.ceil(len(images) / self.config.accumulate_steps)
        for part, part_targets in zip(images.split(size), targets.split(size), strict=True):
            with self.autocast():
                logits = self.call(part)
            logits = logits.float()
            loss = loss_function(logits, part_targets)
            self.scaler.scale(loss * (poison * len(part) / len(images))).backward()
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
        now_bad = torch.maximum(self.bad, (~finite).float())
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

    def state_dict(self, options: dict) -> dict:
        """Tensors and plain values only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "sampler": {"seed": self.config.seed, "sums": self.meter.sums, "seconds": self.seconds, "lr": self.lr},
            "rng": utils.random_state(),
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
        self.meter.sums.copy_(state["sampler"]["sums"])
        self.seconds, self.lr = state["sampler"]["seconds"], state["sampler"]["lr"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.best, self.history = state["best"], state["history"]
        utils.set_random_state(state["rng"])


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
    Raises NonFiniteLoss.
    """
    training.model.train()
    config = training.config
    if training.step == 0:
        training.lr = training.schedule.now
    started, earlier = time.perf_counter(), training.seconds
    saved = looked = time.monotonic()
    done = training.step * config.batch_size
    with Progress(f"epoch {training.epoch + 1}/{config.num_epochs}", batches.num_samples, done) as progress:
        for images, targets in batches.epoch(training.epoch, start=training.step):
            if mix is not None:
                images, targets = mix(images, targets)
            training.update(images, targets, loss_function)
            progress.advance(len(images))
            now = time.monotonic()
            if training.step % READ_EVERY == 0 or now - looked > READ_SECONDS:
                looked = now
                training.check_finite()
                if progress.due:
                    progress.show(*training.meter.read()[:2])
            if save is not None and config.save_minutes and now - saved > 60 * config.save_minutes:
                training.seconds = earlier + time.perf_counter() - started
                save()
                saved = time.monotonic()
    training.check_finite()
    metrics = training.meter.read()
    training.seconds = earlier + time.perf_counter() - started
    return metrics


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
) -> Metrics:
    """Means over all images of `batches`, every one counted once; `call` is the compiled model if there is one."""
    model.eval()
    call = model if call is None else call
    meter = Meter(device)
    with Progress(title, batches.num_samples) as progress:
        for step, (images, labels) in enumerate(batches.epoch(0), start=1):
            with autocast():
                logits = call(images).float()
            meter.add(loss_function(logits, labels), logits, labels)
            progress.advance(len(images))
            if step % READ_EVERY == 0 and progress.due:
                progress.show(*meter.read()[:2])
    return meter.read()


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
    config = training.config
    loss_function, plain_loss = make_loss(config.criterion, config.label_smoothing), make_loss(config.criterion)
    mix = make_mix(config.mixup, config.cutmix, facts["num_classes"])
    judge = "val" if data.val is not None else "test"
    board = _tensorboard(folder) if config.tensorboard else None

    def save(*paths):
        training.check_finite()
        utils.save_checkpoint(training.state_dict(options), *paths)

    while training.epoch < config.num_epochs and not _stalled(training.history, judge, config.early_stopping):
        metrics = {"train": train_one_epoch(training, data.train, loss_function, mix, lambda: save(folder.last))}
        for name, batches in (("val", data.val), ("test", data.test)):
            if batches is not None:
                metrics[name] = evaluate(
                    training.evaluated,
                    batches,
                    plain_loss,
                    device=training.device,
                    call=training.call_evaluated,
                    autocast=training.autocast,
                    title=name,
                )
        for name, values in metrics.items():
            if not math.isfinite(values.loss):
                raise NonFiniteLoss(f"the {name} loss is not finite after epoch {training.epoch + 1}; try a lower --lr")
        training.schedule.epoch_done(metrics[judge].loss)
        row = _row(training, metrics, data.train.num_samples)
        training.history.append(row)
        is_best = not training.best or row[f"{judge}_top1"] > training.best[f"{judge}_top1"]
        training.best = row if is_best else training.best
        training.epoch, training.step, training.seconds = training.epoch + 1, 0, 0.0
        training.meter = Meter(training.device)
        keep = config.save_every and training.epoch % config.save_every == 0
        kept = folder.path / f"epoch_{training.epoch}.pt"
        save(folder.last, *([folder.best] if is_best else []), *([kept] if keep else []))
        ended = training.epoch == config.num_epochs or _stalled(training.history, judge, config.early_stopping)
        folder.epoch_done(training.history, training.best, _summary(training, judge, facts, ended), last=ended)
        left = (config.num_epochs - training.epoch) * row["seconds"]
        print(utils.epoch_line(row) + (f"  ETA {tqdm.format_interval(left)}" if not ended else ""), flush=True)
        if board is not None:
            for name, value in row.items():
                board.add_scalar(name, value, training.epoch)
            board.flush()
    return training.best


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


def _tensorboard(folder: RunFolder):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder.path / "tensorboard")


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
    try:
        (_test if options.train.test_only else _train)(options, make_model, load)
    except (RunError, DataError) as error:
        fail(str(error))
    except NonFiniteLoss as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        last = RunFolder(options.train.output_dir).last
        print("interrupted" + (f"; --resume goes on from {last}" if last.exists() else ""), file=sys.stderr)
        return 130
    return 0


def _prepare(options: Options, make_model: Callable[[], nn.Module]) -> tuple[nn.Module, RunFolder, torch.device]:
    """Everything that can fail before data is read or a file is written."""
    train = options.train
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("several processes cannot train one model yet, they would overwrite each other; start one process")
    device = utils.pick_device(train.device)
    autocast_for(train, device)
    folder = RunFolder(train.output_dir)
    utils.check_writable(folder.path, "--output_dir")
    if train.export:
        utils.check_writable(Path(train.export).parent, "--export")
    if train.mixup or train.cutmix:
        import_torchvision()
    if train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard")
    utils.seed_everything(train.seed, train.deterministic)
    return make_model(), folder, device


def _test(options: Options, make_model: Callable[[], nn.Module], load: Callable[[nn.Module, dict], None]) -> None:
    """Evaluate --checkpoint, else best.pt of the output folder; print and write test_results.json, nothing else."""
    model, folder, device = _prepare(options, make_model)
    train = options.train
    path = Path(train.checkpoint) if train.checkpoint else folder.best
    if not path.exists():
        raise RunError(f"--test_only: there is no {path}; train first, or name the weights with --checkpoint FILE")
    utils.load_weights(model, path, load, "--checkpoint" if train.checkpoint else "--test_only")
    data = load_data(options.data, batch_size=train.batch_size, seed=train.seed, device=device, test_only=True)
    model.to(device)
    metrics = evaluate(
        model,
        data.test,
        make_loss(train.criterion),
        device=device,
        call=compile_for(train, model),
        autocast=autocast_for(train, device),
    )
    print(f"test top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}  ({path})")
    results = {**metrics._asdict(), "images": data.test.num_samples, "checkpoint": str(path)}
    folder.path.mkdir(parents=True, exist_ok=True)
    utils.write_atomically(folder.path / "test_results.json", json.dumps(results, indent=2) + "\n")


def _train(options: Options, make_model: Callable[[], nn.Module], load: Callable[[nn.Module, dict], None]) -> None:
    model, folder, device = _prepare(options, make_model)
    train, plain = options.train, options.as_dict()
    state = utils.resumable_state(folder.last, plain) if train.resume else None
    if train.checkpoint and state is None:
        utils.load_weights(model, Path(train.checkpoint), load)
    data = load_data(options.data, batch_size=train.batch_size, seed=train.seed, device=device)
    model.to(device)
    training = Training(model, train, device, len(data.train))
    if state is not None:
        try:
            training.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise RunError(f"--resume: {folder.last} is damaged ({type(error).__name__})") from None
        print(f"resumed {folder.last}: {training.epoch} epochs and {training.step} steps are done")
    shape = (options.model.in_channels, *options.model.image_size)
    facts = {
        "parameters": utils.count_parameters(model),
        "flops_per_image": utils.count_flops(model, torch.zeros(1, *shape, device=device)),
        "image_shape": shape,
        "num_classes": options.model.num_classes,
        "train_images": data.train.num_samples,
        "test_images": data.test.num_samples,
    }
    folder.start(plain, model, resumed=state is not None)
    print(
        f"{options.model.layer} on {options.data.dataset}: {facts['parameters']:,} parameters, "
        f"{facts['flops_per_image'] / 1e6:,.2f} MFLOPs per image, {facts['train_images']:,} training and "
        f"{facts['test_images']:,} test images, on {utils.device_name(device)}"
    )
    best = fit(training, data, folder, plain, facts)
    if train.export:
        utils.export_weights(Path(train.export), utils.evaluated_weights(folder.best))
    judge = "val" if data.val is not None else "test"
    print(f"best {judge} top-1 {best[f'{judge}_top1']:.2f} % in epoch {best['epoch']}; results are in {folder.path}")
