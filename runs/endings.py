"""End a run that raised: print its line and choose the exit status."""

from __future__ import annotations

import signal
import sys

import torch

from options.runs import Options
from runs import DataError, RunError, Stopped
from runs.folder import RunFolder
from runs.processes import Processes
from runs.streams import announce


def exit_status(error: BaseException, options: Options, processes: Processes, begun: bool) -> int:
    """Print one line for an error that is being handled; return 1, or 128 + number for a signal.

    begun: training or evaluation has begun. Raises SystemExit(2) for what the user can correct, and the error itself if it is
    none of a run's.
    """
    last = RunFolder(options.train.output_dir).last
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:  # from torch's signal handler, at any line
        error = DataError(f"a process that reads images died ({text[:150]}); try --num_workers 0")
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        hint = f"; --resume continues from {last}" if getattr(error, "is_saved", False) else ""
        return _say(f"stopped by {signal.Signals(number).name}{hint}", 128 + number, processes.first)
    if isinstance(error, DataError) and not begun and processes.local_rank:
        print(error, file=sys.stderr)  # which the first process of this machine need not have met
    if isinstance(error, RunError) or (isinstance(error, DataError) and not begun):
        _refuse(str(error), processes)
    if isinstance(error, (OSError, Stopped, DataError)):
        is_kept = isinstance(error, DataError) or getattr(error, "resumable", False)
        hint = f"; --resume continues from {last}" if is_kept and not options.train.test_only and last.exists() else ""
        return _say(f"stopped: {error}{hint}", 1, processes.first or isinstance(error, DataError))
    # torch raises a plain RuntimeError for the two that follow: only its text tells them apart.
    if options.train.deterministic and "deterministic" in text:
        layer = options.model.layer
        _refuse(f"--deterministic: --layer {layer} has a step without a deterministic form here ({text[:150]})", processes)
    if processes.world == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        raise error
    return _say(f"stopped: process 0 has lost another one of {processes.world}", 1, processes.first)


def _say(line: str, status: int, speaks: bool) -> int:
    if speaks:
        print(line, file=sys.stderr)
    return status


def _refuse(text: str, processes: Processes) -> None:
    if not processes.local_rank:
        announce("error", text)
    raise SystemExit(2)
