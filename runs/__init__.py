"""Machinery of a training run: processes and signals, files, checkpoints, the output folder, measurements.

The package knows no model and no data set. Three kinds of exceptions end a run, each raised with the text that is printed.
"""


class RunError(Exception):
    """A mistake that the user can correct. Exit status 2."""


class DataError(Exception):
    """Missing or wrong data. Exit status 2, or 1 once training or evaluation has begun."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names of files may hold line breaks


class Stopped(Exception):
    """A failure on the way: no memory, a full disk, a loss that is not finite. Exit status 1.

    resumable: the printed line names the checkpoint that `--resume` continues from.
    """

    def __init__(self, message: str, resumable: bool = False):
        super().__init__(message)
        self.resumable = resumable
