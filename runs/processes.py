"""Processes that train one model together, and the signals that stop them.

`torchrun` starts the processes and gives each its rank in environment variables; torch.distributed does the rest.
"""

import contextlib
import hashlib
import inspect
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runs import RunError
from runs.lock import VARIABLE


class Interrupted(KeyboardInterrupt):
    """The signal `number` stops the run. Not an `Exception`: no handler of failures catches it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.resumable = False  # whether last.pt holds the state


@contextlib.contextmanager
def plain_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for Interrupted: Python exits with 130, which ends the loop of a shell, for this class alone."""
    try:
        yield
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from None


class Signals:
    """Context that handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless nohup ignores it).

    A signal raises Interrupted at once, except within `deferred()`: there its number is kept in `received` (else 0), and the
    loop stops at the end of a step, or in `interruptible` before the next one. A second signal ends the process immediately,
    with exit status 128 + its number.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    SAME = 2.0  # seconds within which torchrun may forward a signal that its processes have already received
    STUCK = 5.0  # seconds after which a signal that the main thread has not handled ends the process

    def __init__(self):
        self.received = 0
        self._deferring = False
        self._waiting = False
        self._before: dict = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            # Python runs handlers in the main thread, between bytecodes: not while that waits inside a C library. The wakeup
            # pipe receives the number of each signal at once, for a thread to read.
            pipe, write = os.pipe()
            os.set_blocking(write, False)
            self._before_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False), write
            threading.Thread(target=self._watch, args=(pipe,), daemon=True).start()
            for number in self.NUMBERS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
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
        """Let signals wait in `received` as long as this context lasts."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def interruptible(self, items: Iterator) -> Iterator:
        """Yield the items. A signal raises Interrupted while the next one is awaited, which may be for ever."""
        while True:
            self._waiting = True
            try:
                if self.received:
                    raise Interrupted(self.received)
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def _handle(self, number: int, _frame) -> None:
        if not self.received:
            self.received = number
            if self._waiting or not self._deferring:
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
                number, now = byte[0], time.monotonic()
                if number not in self.NUMBERS:  # the end of a child, or others that have their own handlers
                    continue
                if not first:
                    first, since = number, now
                    continue
                # A terminal that is closed sends SIGHUP, and its shell does too. torchrun forwards a signal that its processes,
                # which are one group with it on a terminal, may have received themselves.
                is_same_hangup = number == first == signal.SIGHUP
                if not is_same_hangup and ("TORCHELASTIC_RUN_ID" not in os.environ or now - since > self.SAME):
                    os._exit(128 + number)


def seed_process(seed: int, rank: int, *progress: int) -> None:
    """Seed every process but the first, which keeps the random numbers that made the model.

    With `progress` (epoch, step) the first one is seeded as well: another number of processes resumes a run.
    """
    if rank or progress:
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr((seed, rank, *progress)).encode()).digest()[:8], "big") >> 1)


def _ranks() -> list[int]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Raises RunError if they are missing or wrong."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RunError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {', '.join(missing)}; start several processes with torchrun"
        )
    values = [os.environ[name] for name in names] + [os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        given = " ".join(f"{name}={os.environ[name]}" for name in names)
        raise RunError(f"{given} are not valid ranks; start the processes with torchrun")
    return list(map(int, values))


class Processes:
    """Context of the `world` processes that train one model; this one has number `rank`. With one, nothing is sent.

    `connect` opens the process groups, leaving closes them. All methods are collective: if one process calls a method, all
    must.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1):
        self.rank, self.world, self.local_rank, self.local_world = rank, world, local_rank, local_world
        self.first = rank == 0  # this one prints and writes
        self._control = None  # a gloo group on the CPU beside the default one, which sums gradients
        self._asked: tuple[dist.Work, Tensor] | None = None

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read torchrun's variables; without them there is one process.

        Raises RunError if they are missing or wrong, or if a scheduler has started several tasks without them.
        """
        if os.environ.get("WORLD_SIZE", "1") != "1":
            return cls(*_ranks())
        for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            value = os.environ.get(name, "")
            # torchrun's single process and the run of a sweep are one task, whatever their job was given.
            if value.isdecimal() and int(value) > 1 and not os.environ.keys() & {"WORLD_SIZE", VARIABLE}:
                raise RunError(
                    f"{name}={value} tasks without torchrun would each train the whole run; start them with torchrun "
                    "(scripts/slurm_train.sh does), or start one task"
                )
        return cls()

    def connect(self, device: torch.device) -> None:
        """Join the other processes: nccl sums gradients on CUDA, gloo everything else. Raises RunError."""
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

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind, *_exception) -> None:
        if self.world > 1 and dist.is_initialized():
            if kind is None:  # after an error the others may be gone, and a barrier would wait until its timeout
                self.finish()
            dist.destroy_process_group()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training, whose gradients become means over the processes."""
        if self.world == 1:
            return model
        # `share` broadcasts BatchNorm's statistics of the first process once an epoch, before they are used; DDP would do it
        # in every step. The option that stops it was renamed in torch 2.13.
        # The gradient of the class token of a single image is a view; DDP copies it, which is cheap, and warns.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        parallel = nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return parallel(model, gradient_as_bucket_view=True, **{option: False})

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier(group=self._control)

    def finish(self) -> None:
        """Leave together: torchrun terminates the remaining processes as soon as one has exited."""
        self.agree()  # completes the reduction that the last call has started
        self.wait()

    @contextlib.contextmanager
    def first_of_machine_first(self):
        """Let one process of each machine, which creates files that all read, leave this context before the others enter it."""
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
        """Take the maximum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast the tensors of the first process, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value) -> list:
        """Return the values of all processes, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self._control)
        return values

    def agree(self, *wishes: int) -> list[int]:
        """Return the maximum of each wish over all processes.

        With several processes these are the wishes of the previous call, so that none waits: the reduction runs while a step is
        computed, and all processes learn of a wish at the same call.
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
