"""How a run that raised ends: the line that is printed, and the exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import torch

from options.runs import Options
from runs.checkpoints import NonFiniteWeights
from runs.files import ReadError, WriteError
from runs.folder import RunFolder
from runs.memory import OutOfMemory
from runs.optimization import NonFiniteLoss
from runs.processes import Processes

STOPPED = (NonFiniteLoss, NonFiniteWeights, OutOfMemory, ReadError, WriteError)  # what ends a run on its way


def exit_status(error: BaseException, options: Options, processes: Processes | None, fail: Callable[[str], None]) -> int:
    """1 for what happens on the way, 128 + number for a signal; `fail` (2) for what the user can correct.

    Anything else is raised again: to be called while the error is handled.
    """
    train, is_first = options.train, processes is None or processes.first
    last = RunFolder(train.output_dir).last
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        hint = f"; --resume goes on from {last}" if getattr(error, "is_saved", False) else ""
        return _say(f"stopped by {signal.Signals(number).name}{hint}", 128 + number, is_first)
    if isinstance(error, (OSError, *STOPPED)):
        is_kept = isinstance(error, (OutOfMemory, ReadError)) and not train.test_only and last.exists()
        speaks = is_first or isinstance(error, ReadError)  # which the others have not met
        return _say(f"stopped: {error}" + f"; --resume goes on from {last}" * is_kept, 1, speaks)
    text = " ".join(str(error).split())
    if train.deterministic and "deterministic" in text:
        fail(f"--deterministic: --layer {options.model.layer} has a step without a deterministic form here ({text[:150]})")
    if "DataLoader worker" in text:  # raised by torch's signal handler, wherever the run was
        fail(f"a process that reads images died ({text[:150]}); try --num_workers 0")
    is_lost = isinstance(error, torch.distributed.DistError) or "gloo" in text
    if processes.world == 1 or not is_lost:
        raise
    return _say(f"stopped: process 0 has lost another one of {processes.world}", 1, is_first)


def _say(line: str, status: int, speaks: bool) -> int:
    if speaks:  # of several processes one does
        print(line, file=sys.stderr)
    return status
