"""One optimizer step, and the state of a training, which is what `last.pt` holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from options.training import TrainConfig
from runs.checkpoints import random_state, set_random_state
from runs.metrics import Meter, Metrics
from runs.optimization import (
    Average,
    FiniteCheck,
    LearningRate,
    NonFiniteLoss,
    autocast_for,
    compile_for,
    make_optimizer,
    new_step,
)
from runs.processes import Interrupted, Processes, Signals, seed_process


class Stepper:
    """A model and what an optimizer step changes. steps_per_epoch: optimizer steps, for the schedule."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, steps_per_epoch: int, processes: Processes):
        self.model, self.config, self.device, self.processes = model, config, device, processes
        self.steps_per_epoch = steps_per_epoch
        self.compiled = compile_for(config, model)
        self.train_model = processes.parallel(self.compiled)  # what a step calls
        self.autocast = autocast_for(config, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.schedule = LearningRate(self.optimizer, config, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.use_amp and config.amp_dtype == "float16")
        self.average = Average(model, config.ema_decay) if config.ema_decay else None
        self.finite = FiniteCheck(device, processes)
        self.meter = Meter(device)  # of this epoch
        self.step = 0  # steps done in this epoch

    def update(self, images: Tensor, targets: Tensor, loss_function: Callable, total: int | None = None) -> None:
        """One optimizer step on a batch, in micro-batches under --accumulate_steps.

        images (B, C, H, W); targets (B,) or (B, classes); total: images of all processes in this step, of which `images` are
        this one's share; None: there are no others.
        """
        self.optimizer.zero_grad(set_to_none=True)
        new_step(self.config, self.device)
        self._backward(images, targets, loss_function, total)
        self._step_optimizer()
        if self.average:
            self.average.update(self.model)
        self.schedule.step()
        self.step += 1

    def _backward(self, images: Tensor, targets: Tensor, loss_function: Callable, total: int | None) -> None:
        """Gradients of the mean loss over the `total` images of this step."""
        self.finite.begin_step()
        # With more processes than images in the last batch, some have none: they compute zeros, to join in the all-reduce.
        idle = len(images) == 0
        if idle:
            images, targets = images.new_zeros(2, *images.shape[1:]), targets.new_zeros(2, *targets.shape[1:])
        total, world = total or len(images), self.processes.world
        size = math.ceil(len(images) / self.config.accumulate_steps)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        for number, (part, part_targets) in enumerate(parts, start=1):
            # Gradients are all-reduced in the backward pass of the last micro-batch only.
            local = world > 1 and number < len(parts)
            with self.train_model.no_sync() if local else nullcontext():
                with self.autocast():
                    logits = self.train_model(part)
                logits = logits.float()
                loss = loss_function(logits, part_targets)
                # DDP averages over the processes: with this weight, means over unequal shares add up to that of the batch.
                weight = 0.0 if idle else world * len(part) / total
                self.scaler.scale(loss * (self.finite.factor(loss) * weight)).backward()
            if not idle:
                self.meter.add(loss, logits, part_targets)
                self.finite.watch(loss)

    def _step_optimizer(self) -> None:
        """Clip the gradients and step, unless something is not finite: decided on the device."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.clip_grad_norm:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad_norm, norm)
        if self.scaler.is_enabled():  # float16: gradients overflow now and then, and the scaler skips those steps
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.finite.watch(norm)
        self.finite.end_step(self.step, self.schedule.now)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self.finite.found  # where it is 1, a fused optimizer changes nothing
            self.optimizer.step()


class Training(Stepper):
    """A model in training: its steps, how far it is, and its history. Steps and epochs are counted from 0.

    processes and signals: by default one process, which nothing stops.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        steps_per_epoch: int,
        processes: Processes | None = None,
        signals: Signals | None = None,
    ):
        super().__init__(model, config, device, steps_per_epoch, processes or Processes())
        self.signals = signals or Signals()
        self.eval_model = self.average.model if self.average else model
        self.compiled_eval_model = compile_for(config, self.eval_model) if self.average else self.compiled
        self.seconds = 0.0  # of training in this epoch, before it was interrupted
        self.lr = config.lr  # at the start of this epoch
        self.epoch = 0  # epochs done; `step` counts in the one after those
        self.best: dict = {}  # row of the history
        self.history: list[dict] = []

    def check_finite(self) -> None:
        """Raise NonFiniteLoss if a step was not finite. Synchronizes with the device."""
        advice = "a lower --lr, --warmup_epochs"
        advice += "" if self.config.clip_grad_norm else ", --clip_grad_norm 1"
        advice += ", --amp_dtype bfloat16" if self.scaler.is_enabled() else ""
        self.finite.check(self.epoch, advice)

    def agree(self, look: bool = False, save: bool = False) -> tuple[bool, bool]:
        """Whether any process wants to read numbers from the device, or to save. Raises Interrupted if one got a signal."""
        number, look, save = self.processes.agree(self.signals.received, look, save)
        if number:
            raise Interrupted(number)
        return bool(look), bool(save)

    def total(self) -> Metrics:
        """Means over the images of all processes in this epoch so far. Synchronizes with the device."""
        return self.meter.read(self.processes.sum_(self.meter.sums.clone()))

    def epoch_done(self, row: dict, selection_split: str) -> None:
        """Add the row of an epoch that is trained and evaluated to the history; `selection_split` chooses the best one.

        Raises NonFiniteLoss.
        """
        for name in ("train", "val", "test"):
            if not math.isfinite(row.get(f"{name}_loss", 0.0)):
                raise NonFiniteLoss(f"the {name} loss is not finite after epoch {row['epoch']}; try a lower --lr")
        self.schedule.epoch_done(row[f"{selection_split}_loss"])
        self.history.append(row)
        if not self.best or row[f"{selection_split}_top1"] > self.best[f"{selection_split}_top1"]:
            self.best = row
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.meter = Meter(self.device)

    def share_statistics(self) -> None:
        """Broadcast the BatchNorm statistics of the first process, which are the ones that are saved."""
        for model in [self.model] + ([self.average.model] if self.average else []):
            parameters = dict(model.named_parameters())
            self.processes.share(value for name, value in model.state_dict().items() if name not in parameters)

    def state_dict(self, options: dict) -> dict:
        """Tensors and plain values only; with several processes, all must call it."""
        # What differs between processes: random numbers, and sums over their shares of the images.
        own = self.processes.gather((random_state(self.device), self.meter.sums.cpu()))
        sums = [sums for _, sums in own]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "sampler": {"seed": self.config.seed, "sums": sums, "seconds": self.seconds, "lr": self.lr},
            "rng": [rng for rng, _ in own],
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "config": options,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state. Raises KeyError, TypeError, ValueError, RuntimeError, AttributeError or IndexError."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, own in self.optimizer.state.items():
            if any(torch.is_tensor(value) and value.ndim and value.shape != parameter.shape for value in own.values()):
                raise ValueError("state of the optimizer of other shapes, which its fused step would not notice")
        if state["step"] > self.steps_per_epoch:
            raise ValueError(f"step {state['step']} of {self.steps_per_epoch}")
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
            set_random_state(rng[rank], self.device)
        else:  # saved by another number of processes: continues with the same distribution, not the same numbers
            self.meter.sums.copy_(sum(sums) if rank == 0 else torch.zeros_like(sums[0]))
            seed_process(self.config.seed, rank, self.epoch, self.step)
