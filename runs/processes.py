"""What a run shares with its surroundings: other processes that train the same model, and signals that stop it.

`torchrun` starts the processes and gives each its rank in environment variables; torch.distributed does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
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

from runs import RunError
from runs.lock import VARIABLE

HANGUP = getattr(signal, "SIGHUP", None)


def _is_ignored_hangup(number: int) -> bool:
    return number == HANGUP and signal.getsignal(number) is signal.SIG_IGN


class Interrupted(KeyboardInterrupt):
    """The signal `number` tells the run to stop. Not an `Exception`: no handler of failures catches it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.is_saved = False  # whether what was trained is in last.pt


class Signals:
    """Handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless nohup has it ignored) while a run lasts: a context.

    A signal raises Interrupted at once, except within `deferred()`: there its number is kept in `received` (else 0), and the
    loop stops at the end of a step. A second signal ends the process immediately, with exit status 128 + its number.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
    SAME = 2.0  # seconds in which a signal from torchrun may be one that its processes have already received
    STUCK = 5.0  # seconds after which a first signal that the main thread has not handled ends the process

    def __init__(self):
        self.received = 0
        self._deferring = False
        self._before: dict = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            # Python runs handlers in the main thread, between bytecodes: not while that waits inside a C library. The wakeup
            # pipe receives the number of each signal at once, for a thread to read.
            pipe, write = os.pipe()
            os.set_blocking(write, False)
            self._before_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False), write
            threading.Thread(target=self._watch, args=(pipe,), daemon=True).start()
            handled = [number for number in self.NUMBERS if not _is_ignored_hangup(number)]
            self._before = {number: signal.signal(number, self._handle) for number in handled}
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
        """Signals wait in `received` as long as this context lasts."""
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
        """End the process at a second signal, or at a first one that the main thread does not handle. Runs in a thread."""
        first, since = 0, 0.0
        with open(pipe, "rb", buffering=0) as signals:
            while True:
                ready, _, _ = select.select([signals], [], [], self.STUCK if first and not self.received else None)
                if not ready:
                    if not self._deferring and not self.received:
                        os._exit(128 + first)
                    continue
                byte = signals.read(1)
                if not byte:  # closed by __exit__
                    return
                number = byte[0]
                if number not in self.NUMBERS:  # the end of a child, or others that have their own handlers
                    continue
                if not first:
                    first, since = number, time.monotonic()
                elif number == first == HANGUP:
                    pass  # a terminal that is closed sends it, and its shell too
                # torchrun forwards a signal that its processes, one group with it on a terminal, may have received themselves.
                elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - since > self.SAME:
                    os._exit(128 + number)


def seed_process(seed: int, rank: int, *progress: int) -> None:
    """Give each process after the first random numbers of its own; the first goes on with those that made the model.

    With `progress` (epoch, step) the first one is seeded anew too, as when another number of processes resumes a run.
    """
    if rank or progress:
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr((seed, rank, *progress)).encode()).digest()[:8], "big") >> 1)


def _ranks() -> list[int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, checked. Raises RunError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RunError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {', '.join(missing)}; start several processes with torchrun"
        )
    values = [os.environ[name] for name in names] + [os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        given = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=False))
        raise RunError(f"{given} are not valid ranks; start the processes with torchrun")
    return list(map(int, values))


def _check_tasks() -> None:
    """Raise RunError where a scheduler has started several tasks that know nothing of each other.

    A run that a sweep has started is one of its own, whatever the job of the sweep was given.
    """
    if "WORLD_SIZE" in os.environ or VARIABLE in os.environ:
        return
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise RunError(
                f"{name}={value} tasks without torchrun would each train the whole run; start them with torchrun "
                "(scripts/slurm_train.sh does), or start one task"
            )


class Processes:
    """The processes that train one model: `world` of them, of which this is number `rank`. With one, nothing is sent.

    A context: `connect` opens the process groups, leaving closes them. All methods are collective: what one process calls,
    all must call.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1):
        self.rank, self.world, self.local_rank, self.local_world = rank, world, local_rank, local_world
        self._control = None  # a gloo group on the CPU beside the default one, which sums gradients
        self._asked: tuple[dist.Work, Tensor] | None = None

    @classmethod
    def from_environment(cls) -> Processes:
        """From torchrun's variables, else one process. Raises RunError if they are incomplete or inconsistent."""
        _check_tasks()
        return cls(*_ranks()) if os.environ.get("WORLD_SIZE", "1") != "1" else cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def connected(self) -> bool:
        return self._control is not None

    def connect(self, device: torch.device) -> None:
        """Join the other processes. Gradients are summed by nccl on CUDA, everything else by gloo. Raises RunError."""
        if self.world == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A second group for control messages: they must not wait for the GPU, nor queue behind the gradients.
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.world)
            self._control = dist.new_group(backend="gloo")
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RunError(f"the {self.world} processes cannot meet at {where}: {' '.join(str(error).split())[:200]}") from None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind, *_exception) -> None:
        if self.connected:
            if kind is None:  # after an error the others may be gone, and a barrier would wait until its timeout
                self.finish()
            dist.destroy_process_group()
            self._control = None

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model to call in training: its gradients become means over the processes."""
        if self.world == 1:
            return model
        # BatchNorm's running statistics are those of the first process. `share` broadcasts them before they are used, once
        # an epoch; DDP would do it in every step. The option that stops it has another name from torch 2.15 on.
        # The gradient of the class token of a single image is a view, which DDP copies and warns of: it is tiny.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        parallel = nn.parallel.DistributedDataParallel
        names = inspect.signature(parallel).parameters
        every_step = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        return parallel(model, gradient_as_bucket_view=True, **{every_step: False})

    def wait(self) -> None:
        """Barrier: return once all processes have called it."""
        if self.world > 1:
            dist.barrier(group=self._control)

    def finish(self) -> None:
        """Leave together: torchrun terminates the remaining processes as soon as one has exited."""
        self.agree()
        self.wait()

    @contextlib.contextmanager
    def first_of_machine_first(self):
        """For files that one process of each machine creates and all read: the others enter when it has left."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum_(self, tensor: Tensor) -> Tensor:
        """All-reduce: the maximum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast the tensors of the first process to all, in place."""
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
        """The maximum of each wish over all processes.

        With several processes these are the wishes of the previous call, so that no one waits: the reduction runs while a
        step is computed. What matters is that all processes learn of a wish at the same call.
        """
        if self.world == 1:
            return list(wishes)
        agreed = [0] * len(wishes)
        if self._asked is not None:  # the reduction that the previous call has started
            work, tensor = self._asked
            work.wait()
            agreed, self._asked = tensor.tolist(), None
        if wishes:
            tensor = torch.tensor(wishes, dtype=torch.int32)
            self._asked = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True), tensor
        return agreed
