"""Parts of a training step: losses, mixes, optimizers, schedules, averages, precision, and the check for finite numbers."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from options.training import TrainConfig
from runs import Stopped
from runs.parameters import parameter_groups
from runs.processes import Processes


def make_loss(criterion: str, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a mean loss of logits (B, classes) against labels (B,) or shares (B, classes). MSE takes one-hot targets."""
    if criterion == "CrossEntropy":
        return lambda logits, targets: F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        # Smoothed as cross-entropy is: a share of every target goes evenly to all classes.
        shares = F.one_hot(targets, classes).to(logits.dtype) if targets.ndim == 1 else targets
        return F.mse_loss(logits, shares * (1 - label_smoothing) + label_smoothing / classes)

    return mean_squared_error


def make_mix(mixup: float, cutmix: float, num_classes: int) -> Callable | None:
    """Return mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), both by turns, or None; labels become shares (B, classes)."""
    if not mixup and not cutmix:
        return None
    from torchvision.transforms import v2  # late: small data sets train without torchvision

    mixes = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    return v2.RandomChoice(mixes)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return a fused optimizer, which can skip a step on the device without the CPU having to know."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, fused=True)
        if config.momentum:
            # torch creates these in the first step, uninitialized: a fused step that is skipped would leave them so.
            for parameter in (parameter for group in groups for parameter in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        groups, betas=(config.beta1, config.beta2), fused=True
    )


class LearningRate:
    """Linear warm-up per step, then step or cosine by epoch and step, plateau by epoch, or constant."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int):
        self.optimizer = optimizer
        self.config = config
        self.warmup_steps = config.warmup_steps or config.warmup_epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        schedulers = torch.optim.lr_scheduler
        # Both exist always, so that checkpoints of all schedules have one form; `step` and `epoch_done` choose.
        self.by_step = schedulers.LambdaLR(optimizer, self.factor)
        mode = "min" if config.plateau_metric == "loss" else "max"
        self.plateau = schedulers.ReduceLROnPlateau(
            optimizer, mode, factor=config.lr_gamma, patience=config.lr_step - 1, threshold=0, eps=0
        )

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at this optimizer step, counted from 0 over the whole run."""
        cfg = self.config
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        step -= self.warmup_steps
        if cfg.scheduler == "step":
            return cfg.lr_gamma ** (step // (self.steps_per_epoch * cfg.lr_step))
        if cfg.scheduler == "cosine":
            total = cfg.num_epochs * self.steps_per_epoch - self.warmup_steps
            share = 0.5 * (1 + math.cos(math.pi * min(1, step / max(total, 1))))
            least = cfg.min_lr / cfg.lr if cfg.min_lr else 0.0  # --lr may be 0
            return least + (1 - least) * share
        return 1.0

    def step(self) -> None:
        # Under plateau the rate belongs to the other scheduler once warm-up is over: this one would reset it.
        if self.config.scheduler != "plateau" or self.by_step.last_epoch < self.warmup_steps:
            self.by_step.step()

    def epoch_done(self, loss: float, top1: float) -> None:
        if self.config.scheduler == "plateau" and self.by_step.last_epoch >= self.warmup_steps:
            self.plateau.step(loss if self.config.plateau_metric == "loss" else top1)

    @property
    def lr(self) -> float:
        """Learning rate of the first group of parameters, which is the one without layer decay."""
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict:
        # A checkpoint of plain values cannot hold the function and the bound methods.
        by_step = {k: v for k, v in self.by_step.state_dict().items() if k != "lr_lambdas"}
        plateau = {k: v for k, v in self.plateau.state_dict().items() if isinstance(v, (int, float, str, list))}
        return {"by_step": by_step, "plateau": plateau}

    def load_state_dict(self, state: dict) -> None:
        self.by_step.load_state_dict(state["by_step"] | {"lr_lambdas": [None]})
        self.plateau.load_state_dict(state["plateau"])


class Average:
    """Exponential moving average of weights and BatchNorm statistics. The averaged model is evaluated."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        # state_dict, not parameters: running means and variances of BatchNorm belong to the weights that made them.
        mine, new = list(self.model.state_dict().values()), list(model.state_dict().values())
        averaged = [pair for pair in zip(mine, new, strict=True) if pair[0].is_floating_point()]
        # mine <- mine + (1 - decay) (new - mine), in one fused call instead of a kernel per tensor.
        torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], 1 - self.decay)
        for a, b in zip(mine, new, strict=True):
            if not a.is_floating_point():  # BatchNorm's count of batches
                a.copy_(b)


def autocast_for(config: TrainConfig, device: torch.device):
    """Return a factory of contexts for mixed precision, which do nothing without --use_amp."""
    if not config.use_amp:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype))


def compile_for(config: TrainConfig, model: nn.Module) -> Callable:
    """Return the model to call: compiled under --use_compiled, with the parameters of `model`."""
    if not config.use_compiled:
        return model
    # One graph per batch size. torch makes a graph for all sizes when it meets a second one; the numbers would then depend
    # on the size that a run begins with, and a resumed run begins with another.
    torch._dynamo.config.recompile_limit = 64
    if config.compile_mode == "reduce-memory":
        model.recompute = True
        return torch.compile(model, dynamic=False)
    return torch.compile(model, mode=config.compile_mode, dynamic=False)


class FiniteCheck:
    """Watch for the first optimizer step whose loss or gradient is not finite. Only `check` synchronizes with the device.

    `found` is 1 from that step on, on all processes: the factor for losses becomes NaN and a fused optimizer skips its step,
    so that no later step reaches the weights either, however late the CPU looks.
    """

    def __init__(self, device: torch.device, processes: Processes):
        self.processes = processes
        self.found = torch.zeros((), device=device)
        self.step = torch.full((), -1, device=device, dtype=torch.long)  # of `found`, in its epoch
        self.lr = torch.zeros((), device=device)  # in that step
        self._finite = torch.ones((), device=device, dtype=torch.bool)  # so far in the current step

    def one_or_nan(self, loss: Tensor) -> Tensor:
        """Return the factor of this loss before backward: 1, or NaN if the loss or an earlier step was not finite.

        The loss is made NaN on purpose, so that all processes skip the step: NaN gradients spread to all of them in the
        all-reduce, and make float16's scaler skip its step.
        """
        return torch.where(loss.detach().isfinite() & (self.found == 0), 1.0, math.nan)

    def watch(self, value: Tensor) -> None:
        """Take a loss or the norm of the gradients into account for the current step."""
        self._finite &= value.detach().isfinite()

    def end_step(self, step: int, lr: float) -> None:
        """Conclude the current step on all processes, before the optimizer makes it."""
        found = self.processes.maximum_(torch.maximum(self.found, (~self._finite).float()))
        is_first = found > self.found
        self.step, self.lr = torch.where(is_first, step, self.step), torch.where(is_first, lr, self.lr)
        self.found, self._finite = found, torch.ones_like(self._finite)

    def check(self, epoch: int, advice: str) -> None:
        """Raise Stopped if a step was not finite. Synchronizes with the device."""
        step = self.step.item()
        if step >= 0:
            raise Stopped(
                f"the loss or its gradient is not finite at epoch {epoch + 1}, step {step + 1}, learning rate "
                f"{self.lr.item():g}; that step did not reach the weights. Try {advice}"
            )
