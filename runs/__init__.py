"""The machinery of a training run: processes and signals, files, checkpoints, the output folder, measurements.

Nothing here knows a model or a data set, and nothing here imports from the modules above it.
"""


class RunError(Exception):
    """A mistake that the user can correct, in one line; the program ends with exit status 2."""
