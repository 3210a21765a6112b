"""Parts of `experiments/first_contact.py`: rows appended as they are measured, time budgets, worker processes."""

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import backend


@dataclass(frozen=True)
class Part:
    """One part of a run: the file of its rows, its device and its share of the time.

    deadline: seconds of `time.time()`, which all processes share. shard, shards: the cases of one worker process.
    """

    name: str
    rows: Path
    device: str
    small: bool = False
    deadline: float = float("inf")
    shard: int = 0
    shards: int = 1

    def add(self, case: str, status: str, **values) -> None:
        """Append a row. One write in append mode, so that the rows of several processes do not mix."""
        line = json.dumps({"part": self.name, "case": case, "status": status, **values}) + "\n"
        with open(self.rows, "a", encoding="utf-8") as file:
            file.write(line)
        print(f"{self.name}: {case}: {status}", flush=True)

    def add_target(self, name: str, ours: float | None, theirs: list[float], target: float) -> None:
        """Add the ratio of ours to the smallest of theirs, and whether it meets the target."""
        if ours is None or not theirs:
            self.add(f"target: {name}", "skipped: needs both times", target=target)
        else:
            ratio = ours / min(theirs)
            self.add(f"target: {name}", "met" if ratio <= target else "missed", ratio=ratio, target=target)

    def is_over(self) -> bool:
        """Return True once the time of this part is up."""
        return time.time() > self.deadline

    def run(self, cases: dict[str, Callable[[], dict]]) -> None:
        """Add a row for each case: its values, why it failed, or why it was skipped.

        A case returns the values of its row; `status` among them replaces `ok`. After an error of the device, which spoils
        the whole process, the other cases are skipped.
        """
        spoiled = False
        for name, case in cases.items():
            if spoiled or self.is_over():
                self.add(name, f"skipped: {'after an error of the device' if spoiled else 'the time of this part is up'}")
                continue
            try:
                self.add(name, **{"status": "ok"} | case())
            except Exception as error:
                message = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
                self.add(name, f"failed: {message}")
                spoiled = backend.is_device_error(error) and not isinstance(error, torch.OutOfMemoryError)


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file, without a last line that was cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def run_in_processes(work: Callable[[Part], None], part: Part, shards: int, grace: float = 5.0) -> None:
    """Run `work` on each shard in a process of its own, and end those that outlast the deadline by `grace` seconds.

    An illegal address, or a kernel that never returns, costs one shard of one part.
    """
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(replace(part, shard=i, shards=shards),)) for i in range(shards)]
    for worker in workers:
        worker.start()
    for shard, worker in enumerate(workers):
        worker.join(max(0.0, part.deadline + grace - time.time()))
        if worker.is_alive():
            worker.kill()
            worker.join()
            part.add(f"process {shard + 1} of {shards}", "failed: ended, as the time of this part is up")
        elif worker.exitcode:
            part.add(f"process {shard + 1} of {shards}", f"failed: exit status {worker.exitcode}")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 without TF32, in matrix products and in cuDNN, so that all that is compared has equal precision."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list]:
    """Collect the compiled kernels that are launched within the context."""
    from kernels import triton_common

    found, launch = [], triton_common.launch

    def record(kernel, *given, **options):
        compiled = launch(kernel, *given, **options)
        if compiled is not None:  # not interpreted
            found.append(compiled)
        return compiled

    triton_common.launch = record
    try:
        yield found
    finally:
        triton_common.launch = launch


def resources(compiled: list) -> dict[str, int]:
    """Return the most registers, spilled registers of a thread and shared bytes of a block over compiled kernels."""
    if not compiled:
        return {}
    return {
        "registers": max(kernel.n_regs for kernel in compiled),
        "spills": max(kernel.n_spills for kernel in compiled),
        "shared": max(kernel.metadata.shared for kernel in compiled),
    }


def is_interpreted() -> bool:
    """Return True where the kernels run under Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
