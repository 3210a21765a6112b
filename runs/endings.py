"""End a run that raised: print its line and choose the exit status."""

import signal
import sys

import torch

from options.runs import Options
from runs import DataError, RunError, Stopped
from runs.folder import RunFolder
from runs.processes import Processes
from runs.streams import announce

# Words of the errors of torch and multiprocessing about processes that read images.
OF_WORKERS = ("DataLoader worker", "Too many open files", "ancdata")


def is_of_worker(error: BaseException) -> bool:
    """Return whether an error says that a process that reads images has died, or cannot be started or reached."""
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in OF_WORKERS))


def lost_worker(error: BaseException) -> DataError:
    """Return the line for a process that reads images and died, or cannot be started or hand over its batch."""
    reason = " ".join(str(error).split())[:150]
    return DataError(
        f"a process that reads images failed ({reason}); use --num_workers 0, a smaller --batch_size, more shared memory "
        "(docker --shm-size) or open files (ulimit -n), or a shorter TMPDIR"
    )


def exit_status(error: BaseException, options: Options, processes: Processes, begun: bool) -> int:
    """Print one line for an error that is being handled; return 1, or 128 + number for a signal.

    begun: training or evaluation has begun. Raises SystemExit(2) for what the user can correct, and the error itself if it is
    none of a run's.
    """
    text = " ".join(str(error).split())
    # torch raises plain RuntimeErrors: only their text tells them apart.
    if isinstance(error, RuntimeError) and options.train.deterministic and "deterministic" in text:
        layer = options.model.layer
        error = RunError(f"--deterministic: --layer {layer} has a step without a deterministic form here ({text[:150]})")
    elif isinstance(error, RuntimeError) and is_of_worker(error):  # from torch's signal handler, at any line
        error = lost_worker(error)
    if isinstance(error, RunError) or (isinstance(error, DataError) and not begun):
        if not processes.local_rank:
            announce("error", str(error))
        elif isinstance(error, DataError):  # which the first process of this machine need not have met
            print(error, file=sys.stderr)
        raise SystemExit(2)
    status = 1
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        line, status = f"stopped by {signal.Signals(number).name}", 128 + number
    elif isinstance(error, (OSError, Stopped, DataError)):
        line = f"stopped: {error}"
    elif processes.world > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        line = f"stopped: process 0 has lost another one of {processes.world}"
    else:
        raise error
    last = RunFolder(options.train.output_dir).last
    resumable = isinstance(error, DataError) or getattr(error, "resumable", False)
    if resumable and not options.train.test_only and last.exists():
        line += f"; --resume continues from {last}"
    if processes.first or isinstance(error, DataError):
        print(line, file=sys.stderr)
    return status
