"""What a run shares with the world around it: other processes that train the same model, and signals that stop it.

`torchrun` starts the processes and tells each its place by environment variables; torch.distributed does the rest.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Interrupted(KeyboardInterrupt):
    """The run is told to stop by the signal `number`. Not an `Exception`: nothing takes it for a failure."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.is_saved = False  # whether what was trained is in last.pt


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 while a run lasts: a context.

    Where there is nothing to finish, a signal raises Interrupted at once. Within `deferred()` it is kept in `received` (else
    0), for the loop to stop at the end of a step. A second signal ends the process there and then, with the same status.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
    SAME = 2.0  # seconds: torchrun passes on a signal that its processes may have had themselves
    STUCK = 5.0  # seconds that a first signal is given to reach a main thread that has nothing to finish

    def __init__(self):
        self.received = 0
        self._deferring = False
        self._before: dict = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            pipe, write = os.pipe()
            os.set_blocking(write, False)
            self._before_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False), write
            threading.Thread(target=self._watch, args=(pipe,), daemon=True).start()
            self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_exception) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            before, write = self._before_pipe
            signal.set_wakeup_fd(before)
            os.close(write)  # which ends the thread

    @contextlib.contextmanager
    def deferred(self):
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, _frame) -> None:
        if not self.received:
            self.received = number
            if not self._deferring:
                raise Interrupted(number)

    def _watch(self, pipe: int) -> None:
        """In a thread, as the main one may be waiting inside a library for other processes, where no handler runs."""
        first, since = 0, 0.0
        with open(pipe, "rb", buffering=0) as signals:
            while True:
                ready, _, _ = select.select([signals], [], [], self.STUCK if first and not self.received else None)
                if not ready:
                    if not self._deferring and not self.received:
                        os._exit(128 + first)
                    continue
                byte = signals.read(1)
                if not byte:
                    return
                number = byte[0]
                if number not in self.NUMBERS:  # the end of a child, or others that have their own handlers
                    continue
                if not first:
                    first, since = number, time.monotonic()
                elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - since > self.SAME:
                    os._exit(128 + number)


class ProcessError(Exception):
    """Processes that cannot work together, in one line."""


class Processes:
    """The processes that train one model: `world` of them, of which this is number `rank`. One alone needs nobody.

    A context: `connect` begins the conversation, leaving ends it. What is called on one must be called on all.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1):
        self.rank, self.world, self.local_rank, self.local_world = rank, world, local_rank, local_world
        self._control = None  # a group on the CPU, apart from the one that sums gradients
        self._asked: tuple[dist.Work, Tensor] | None = None

    @classmethod
    def from_environment(cls) -> Processes:
        """As torchrun says, else one process. Raises ProcessError where the variables do not fit together."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ProcessError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {', '.join(missing)}; "
                "start several processes by torchrun"
            )
        values = [os.environ[name] for name in names] + [os.environ.get("LOCAL_WORLD_SIZE", "1")]
        if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
            given = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=False))
            raise ProcessError(f"{given} are not the places of processes; start them by torchrun")
        return cls(*map(int, values))

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def connected(self) -> bool:
        return self._control is not None

    def connect(self, device: torch.device) -> None:
        """Meet the others, or raise ProcessError. Gradients are summed by nccl on CUDA, by gloo elsewhere; all else by gloo."""
        if self.world == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.world)
            self._control = dist.new_group(backend="gloo")
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ProcessError(
                f"the {self.world} processes cannot meet at {where}: {' '.join(str(error).split())[:200]}"
            ) from None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind, *_exception) -> None:
        if self.connected:
            if kind is None:  # else others may be gone, and waiting for them would last
                self.finish()
            dist.destroy_process_group()
            self._control = None

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: its gradients become means over the processes."""
        if self.world == 1:
            return model
        # Statistics of BatchNorm are those of the first process, handed out by `share` before they are used: once an epoch
        # instead of in every step. The option has another name from torch 2.15 on.
        # A gradient that is a view, as of the class token of a single image, is copied: no matter for its few numbers.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        parallel = nn.parallel.DistributedDataParallel
        names = inspect.signature(parallel).parameters
        every_step = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        return parallel(model, gradient_as_bucket_view=True, **{every_step: False})

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier(group=self._control)

    def finish(self) -> None:
        """Leave together: torchrun ends those that are still there when one has gone."""
        self.agree()
        self.wait()

    @contextlib.contextmanager
    def first_of_machine_first(self):
        """For files that one process makes and all read: the others enter when it has left."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum_(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Those of the first process, to all, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self._control)
        return values

    def agree(self, *wishes: int) -> list[int]:
        """The largest of each wish over all processes.

        Of several processes it is the wishes of the call before this one, for nobody to wait: it is known to all at the
        same call, which is what matters.
        """
        if self.world == 1:
            return list(wishes)
        agreed = [0] * len(wishes)
        if self._asked is not None:
            work, tensor = self._asked
            work.wait()
            agreed, self._asked = tensor.tolist(), None
        if wishes:
            tensor = torch.tensor(wishes, dtype=torch.int32)
            self._asked = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True), tensor
        return agreed
