"""State of a training: model, optimizer, schedule, averages and history, which `last.pt` holds."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from options.training import TrainConfig
from runs import Stopped
from runs.checkpoints import random_state, set_random_state
from runs.metrics import Meter
from runs.optimization import Average, FiniteCheck, LearningRate, autocast_for, compile_for, make_optimizer
from runs.processes import Interrupted, Processes, Signals, seed_process


class Training:
    """A model in training, with its progress and history. Steps and epochs are counted from 0.

    steps_per_epoch: optimizer steps, for the schedule. processes and signals: by default one process, which nothing stops.
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
        self.model, self.config, self.device = model, config, device
        self.processes, self.signals = processes or Processes(), signals or Signals()
        self.steps_per_epoch = steps_per_epoch
        self.compiled = compile_for(config, model)
        self.train_model = self.processes.parallel(self.compiled)  # called by a step
        self.autocast = autocast_for(config, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.schedule = LearningRate(self.optimizer, config, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.use_amp and config.amp_dtype == "float16")
        self.average = Average(model, config.ema_decay) if config.ema_decay else None
        self.eval_model = self.average.model if self.average else model
        self.compiled_eval_model = compile_for(config, self.eval_model) if self.average else self.compiled
        self.finite = FiniteCheck(device, self.processes)
        self.meter = Meter(device)  # of this epoch
        self.seconds = 0.0  # of training in this epoch, before it was interrupted
        self.epoch_lr = config.lr  # at the start of this epoch
        self.epoch = 0  # epochs done
        self.step = 0  # steps done in the epoch after those
        self.best: dict = {}  # row of the history
        self.history: list[dict] = []
        self.predictions: dict[str, torch.Tensor] = {}  # of the test images: labels, and classes of the last and best epoch
        self.fingerprint: dict | None = None  # of the data

    def check_finite(self) -> None:
        """Raise Stopped if a step was not finite. Synchronizes with the device."""
        clip = "" if self.config.clip_grad_norm else ", --clip_grad_norm 1"
        dtype = ", --amp_dtype bfloat16" if self.scaler.is_enabled() else ""
        self.finite.check(self.epoch, f"a lower --lr, --warmup_epochs{clip}{dtype}")

    def poll(self, *, sync: bool = False, save: bool = False) -> tuple[bool, bool]:
        """Return whether any process asks to synchronize with the device, and to save; see `Processes.agree`.

        Raises Interrupted on all processes if one received a signal.
        """
        number, sync, save = self.processes.agree(self.signals.received, sync, save)
        if number:
            raise Interrupted(number)
        return bool(sync), bool(save)

    def awaiting(self, batches: Iterator) -> Iterator:
        """Yield the batches; a signal to a single process does not wait for the next one. Several stop by `poll`."""
        return self.signals.interruptible(batches) if self.processes.world == 1 else batches

    def polled(self, batches: Iterator) -> Iterator:
        """Yield the batches of an evaluation, and poll after each."""
        for batch in self.awaiting(batches):
            yield batch
            self.poll()

    def epoch_done(self, row: dict, selection_split: str) -> None:
        """Add the row of a trained and evaluated epoch to the history; `selection_split` chooses the best one.

        Raises Stopped for a loss that is not finite.
        """
        for name in ("train", "val", "test"):
            if not math.isfinite(row.get(f"{name}_loss", 0.0)):
                raise Stopped(f"the {name} loss is not finite after epoch {row['epoch']}; try a lower --lr")
        self.schedule.epoch_done(row[f"{selection_split}_loss"], row[f"{selection_split}_top1"])
        self.history.append(row)
        if not self.best or row[f"{selection_split}_top1"] > self.best[f"{selection_split}_top1"]:
            self.best, self.predictions["best"] = row, self.predictions["last"]
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.meter = Meter(self.device)

    def share_statistics(self) -> None:
        """Broadcast the BatchNorm statistics of the first process, which are those that are saved."""
        for model in dict.fromkeys((self.model, self.eval_model)):
            parameters = dict(model.named_parameters())
            self.processes.share(value for name, value in model.state_dict().items() if name not in parameters)

    def state_dict(self, options: dict) -> dict:
        """Return tensors and plain values only. With several processes, all must call it."""
        # Random numbers and sums over images differ between the processes.
        own = self.processes.gather((random_state(self.device), self.meter.sums.cpu()))
        sums = [sums for _, sums in own]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "sampler": {"seed": self.config.seed, "sums": sums, "seconds": self.seconds, "lr": self.epoch_lr},
            "rng": [rng for rng, _ in own],
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "predictions": self.predictions,
            "config": options,
            "data": self.fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state. Raises KeyError, TypeError, ValueError, RuntimeError, AttributeError or IndexError."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, own in self.optimizer.state.items():
            if any(torch.is_tensor(value) and value.ndim and value.shape != parameter.shape for value in own.values()):
                raise ValueError("state of the optimizer of other shapes, which its fused step would not notice")
        epoch, step, history = state["epoch"], state["step"], state["history"]
        if type(epoch) is not int or [row["epoch"] for row in history] != list(range(1, epoch + 1)):
            raise ValueError(f"a history that does not lead to epoch {epoch}")
        if not 0 <= step <= self.steps_per_epoch or (history and state["best"] not in history):
            raise ValueError(f"step {step} of {self.steps_per_epoch}, or a best epoch that is not in the history")
        if history and not state["predictions"].keys() >= {"labels", "last", "best"}:
            raise ValueError("predictions of the test images that are missing")
        self.schedule.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.model.load_state_dict(state["ema"])
        self.seconds, self.epoch_lr = float(state["sampler"]["seconds"]), float(state["sampler"]["lr"])
        self.epoch, self.step, self.best, self.history = epoch, step, state["best"], history
        self.predictions = state["predictions"]
        rank, sums, rng = self.processes.rank, state["sampler"]["sums"], state["rng"]
        if len(sums) != len(rng) or any(value.shape != (4,) for value in sums):
            raise ValueError("sums and random states of the processes")
        if len(sums) == self.processes.world:
            self.meter.sums.copy_(sums[rank])
            set_random_state(rng[rank], self.device)
        else:  # saved by another number of processes: continues with the same distribution, not the same numbers
            self.meter.sums.copy_(sum(sums) if rank == 0 else torch.zeros_like(sums[0]))
            seed_process(self.config.seed, rank, self.epoch, self.step)
