"""Track a run by TensorBoard (`--tensorboard`) or Weights & Biases (`--wandb`)."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from runs.files import write_atomically

ID_FILE = "wandb_id.txt"
PROJECT = "convnn"  # unless WANDB_PROJECT says otherwise
FINISH_SECONDS = 60.0  # for uploads at the end; `wandb sync` uploads the rest


def is_installed() -> bool:
    """Return whether the package is installed; the folder `wandb` that its runs leave has no __init__.py."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


class Board:
    """Write a row of metrics.csv after every epoch for TensorBoard; hide what an interrupted run left after `epochs` epochs."""

    def __init__(self, folder: Path, epochs: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=epochs + 1)

    def epoch_done(self, row: dict) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()


class Tracker:
    """Context that sends the options, then a row of metrics.csv after every epoch, to a run of Weights & Biases.

    Variables of wandb apply (WANDB_MODE, WANDB_PROJECT, WANDB_NAME and so on). The id of its run stays in the folder, so that a
    resumed run continues it. A failure is a warning, after which training goes on without it.
    """

    def __init__(self, folder: Path, options: dict):
        self._folder, self._options = folder, options
        self._run = None

    def __enter__(self) -> "Tracker":
        with self._or_warn("start"):
            import wandb  # imported late: it takes a second

            known = self._folder / ID_FILE
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", self._folder.name),
                dir=self._folder,
                id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
                resume="allow",
                settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
            )
            self._run.config.update(self._options, allow_val_change=True)  # --num_epochs of a resumed run
            write_atomically(known, f"{self._run.id}\n")
        return self

    def epoch_done(self, row: dict) -> None:
        with self._or_warn("log"):
            if self._run is not None:
                self._run.log(row, step=row["epoch"])

    def __exit__(self, kind: type | None, *_) -> None:
        with self._or_warn("finish"):
            if self._run is not None:
                self._run.finish(exit_code=int(kind is not None))

    @contextlib.contextmanager
    def _or_warn(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: a network, a disk, a process of wandb's that died
            self._run = None
            why = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: --wandb could not {what} ({why}); training goes on without it", file=sys.stderr)
