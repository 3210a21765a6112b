"""Output folder of a run: options, model, checkpoints, tables, curves and summary."""

import contextlib
import io
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import nn

from options.runs import same_value
from options.training import TrainConfig
from runs import RunError
from runs.checkpoints import save_checkpoint
from runs.files import as_csv, as_figure, check_writable, paper_style, remove_temporaries, write_atomically
from runs.lock import locked
from runs.measure import count_parameters, device_name, measure_latency, process_peak_memory, versions
from runs.progress import epoch_line
from runs.tracking import ID_FILE
from runs.training import Training

COLUMNS = (
    "epoch lr train_loss train_top1 train_top5 test_loss test_top1 test_top5 seconds images_per_s".split()
)  # and, where a validation set is held out, val_loss val_top1 val_top5


RESULTS = ["metrics.csv", "metrics.json", "summary.json", "curves.png"]
TEXTS = ["args.txt", "config.yaml", "model.txt", "train_eval_results.txt", "mask.png", *RESULTS, ID_FILE]
CHECKPOINTS = "last.pt previous.pt best.pt".split()
# Options that every config.yaml of a run holds, and files of options seldom.
ALWAYS = {"layer", "dataset", "num_epochs", "seed", "output_dir", "batch_size", "lr", "save_every", "tensorboard"}


class Found(NamedTuple):
    """Contents of an output folder, which holds a run of ours if there is its config.yaml."""

    options: dict | None  # of the run
    weights: list[Path]  # checkpoints
    others: list[Path]  # other outputs
    epochs: int  # that the run has written down
    finished: bool


def describe_model(model: nn.Module) -> str:
    """Return the text of model.txt: module tree and a table of parameters, with a note at frozen ones."""
    named = list(model.named_parameters())
    rows = [
        (name, "x".join(map(str, p.shape)) or "1", f"{p.numel():,}", "" if p.requires_grad else "frozen") for name, p in named
    ]
    rows.append(("total", "", f"{count_parameters(model):,}", ""))
    learning = [p.numel() for _, p in named if p.requires_grad]
    if len(learning) < len(named):
        rows.append(("trained", "", f"{sum(learning):,}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {count:>{widths[2]}}  {note}".rstrip() for name, shape, count, note in rows
    ]
    return f"{model}\n\n" + "\n".join(table) + "\n"


class RunFolder:
    """Output folder of a run: recognize the run that is there, and write the outputs of this one.

    Tables are rewritten whole from the history after every epoch, so that a resumed run has no gap or double line.
    """

    CURVES_EVERY = 30  # seconds between drawings of curves.png: a drawing can take as long as a short epoch

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self.previous = self.path / "previous.pt"  # the last.pt before the current one, until the run is finished
        self._drawn = 0.0

    def save(self, state: dict, *others: Path) -> None:
        """Write last.pt, after `others`, which a run that is killed in between writes once more when it is resumed."""
        for path in others:
            save_checkpoint(state, path)
        self.link(self.last, self.previous)
        save_checkpoint(state, self.last)

    def link(self, path: Path, name: Path) -> None:
        """Give a file a second name. Without hard links, or without the file, there is none: best.pt is the fallback."""
        with contextlib.suppress(OSError):
            # Linked under a temporary name and renamed: os.link does not replace, and `name` must never be missing.
            link = self.path / f".{name.name}.{os.getpid()}.tmp"
            os.link(path, link)
            os.replace(link, name)
            link.unlink(missing_ok=True)  # still there if both were names of one file already

    def look(self) -> Found:
        """Return the outputs that are there, without changing anything."""
        options, summary = self._read("config.yaml", yaml.safe_load), self._read("summary.json", json.loads)
        if not options.keys() >= ALWAYS:
            options = None
        checkpoints, texts = ([path for name in names if (path := self.path / name).exists()] for names in (CHECKPOINTS, TEXTS))
        if options is not None:
            texts += self._matching(self.path, r"test_results(-\d+)?\.json|test_predictions(-\d+)?\.npz")
            checkpoints += self._matching(self.path, r"epoch_\d+\.pt") if options["save_every"] else []
            texts += self._matching(self.path / "tensorboard", r"events\.out\.tfevents\..*") if options["tensorboard"] else []
        return Found(options, checkpoints, texts, summary.get("epochs", 0), summary.get("finished") is True)

    @staticmethod
    def _matching(folder: Path, pattern: str) -> list[Path]:
        return [path for path in sorted(folder.glob("*")) if re.fullmatch(pattern, path.name) and path.is_file()]

    def _read(self, name: str, parse: Callable[[str], object]) -> dict:
        """Return the mapping in a file, or an empty one if the file cannot be read or holds none."""
        try:
            values = parse((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    @contextlib.contextmanager
    def claimed(self, train: TrainConfig) -> Iterator[None]:
        """Hold the folder for this run: nobody else writes there, and it holds nothing that would be lost."""
        check_writable(self.path, "--output_dir")
        with locked(self.path):
            self.check(train.resume, train.overwrite, train.save_every)
            yield

    def check(self, resume: bool, overwrite: bool, save_every: int = 0) -> None:
        """Raise RunError, with the remedy, if a run that starts here would write over another one.

        A run of ours is written over only under --overwrite, and the files of anybody else never.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--output_dir {self.path} is a file, not a folder")
        if resume and any((self.path / name).exists() for name in CHECKPOINTS):
            return  # `resumable_state` looks at the checkpoints themselves
        found, where = self.look(), f"--output_dir {self.path}"
        if found.options is None:
            foreign = found.others + found.weights
            foreign += self._matching(self.path, r"epoch_\d+\.pt") if save_every else []
            if foreign:
                names = ", ".join(path.name for path in foreign)
                raise RunError(
                    f"{where} holds {names} without the config.yaml of a run of this program, and a run would write over them; "
                    "use another --output_dir"
                )
            return
        if overwrite or not (found.weights or found.finished):
            return
        what = (
            f"a finished run ({found.epochs} epochs)"
            if found.finished
            else f"an unfinished run ({found.epochs} of {found.options['num_epochs']} epochs)"
        )
        if resume:
            raise RunError(
                f"{where} holds {what} without a checkpoint to resume from; use another --output_dir, or --overwrite to "
                "start anew in its place"
            )
        keep = "keep it" if found.finished else "go on with it"
        raise RunError(f"{where} holds {what}; use --resume to {keep}, another --output_dir, or --overwrite to write over it")

    def start(self, options: dict, model: nn.Module, resumed: bool, notes: str = "") -> None:
        """Create the folder and write args.txt, config.yaml and model.txt. Another run that is there is written over.

        notes: end of model.txt, which stays as it is when a run is resumed.
        """
        if not resumed:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.path)  # left by a process that was killed while it wrote
        shown = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in options.items()}
        write_atomically(self.path / "args.txt", "".join(f"{name}: {value}\n" for name, value in shown.items()))
        # Running this file again must not write over a run.
        write_atomically(self.path / "config.yaml", yaml.safe_dump(options | {"overwrite": False}, sort_keys=False))
        if not resumed or not (self.path / "model.txt").exists():
            write_atomically(self.path / "model.txt", describe_model(model) + notes)

    def _clear(self) -> None:
        """Remove the outputs of the run that is there, and nothing else."""
        found = self.look()
        if found.options is None:
            return
        if found.weights:
            print(
                f"warning: {self.path} holds another run, which is written over; its weights stay as *.pt.old", file=sys.stderr
            )
        for path in found.weights:  # which may have taken days
            path.replace(path.with_name(path.name + ".old"))
        for path in found.others:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is missing, or holds other events
            (self.path / "tensorboard").rmdir()

    def is_behind(self, epochs: int, ended: bool) -> bool:
        """Return whether the results lack some of so many epochs, or do not say that the run has ended though it has."""
        found = self.look()
        return found.epochs < epochs or (ended and not found.finished)

    def epoch_done(self, history: list[dict], best: dict, summary: dict, last: bool) -> None:
        """Write the results so far; best: row of the best epoch; last: no epoch follows."""
        write_atomically(self.path / "train_eval_results.txt", results_text(history, best))
        columns = COLUMNS + [name for name in best if name not in COLUMNS]
        write_atomically(self.path / "metrics.csv", as_csv(history, columns))
        write_atomically(self.path / "metrics.json", json.dumps(history, indent=1, allow_nan=False) + "\n")
        if last or time.monotonic() - self._drawn > self.CURVES_EVERY:
            draw_curves(history, self.path / "curves.png")
            self._drawn = time.monotonic()
        if last:
            self.previous.unlink(missing_ok=True)
        # summary.json comes last: once it says that the run has ended, nothing else remains to be written.
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def write_predictions(self, predictions: dict[str, torch.Tensor], name: str = "test_predictions.npz") -> None:
        """Write arrays of classes, one number per test image in the order of the data set, for `numpy.load`."""
        file = io.BytesIO()
        np.savez_compressed(file, **{name: classes.numpy() for name, classes in predictions.items()})
        write_atomically(self.path / name, file.getvalue())

    def write_test_results(self, results: dict, predictions: dict[str, torch.Tensor]) -> Path:
        """Write test_results.json and test_predictions.npz; return the path of the former.

        Beside results of other options or another checkpoint they are test_results-2.json and test_predictions-2.npz, and so
        on. The predictions of a training stay: beside them the first are test_predictions-1.npz.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        results = json.loads(json.dumps(results, allow_nan=False))
        names = (f"test_results{f'-{number}' * (number > 1)}.json" for number in itertools.count(1))
        path = next(path for name in names if not (path := self.path / name).exists() or self._is_of_same(path, results))
        number = re.sub(r"\D", "", path.stem)
        if not number and (self.path / "metrics.csv").exists():
            number = "1"
        self.write_predictions(predictions, f"test_predictions{'-' * bool(number)}{number}.npz")
        write_atomically(path, json.dumps(results, indent=2) + "\n")
        return path

    def _is_of_same(self, path: Path, results: dict) -> bool:
        """Return whether the file holds a result of the same options and checkpoint."""
        there = self._read(path.name, json.loads)
        then, now = ({**one.get("options", {}), "checkpoint": one.get("checkpoint")} for one in (there, results))
        return then.keys() == now.keys() and all(same_value(name, then[name], value) for name, value in now.items())


def costs_of(model: nn.Module, image_shape: tuple[int, ...], device: torch.device) -> dict:
    """Measure the latency of one image, for a second, and the peak memory of this process so far."""
    return process_peak_memory(device) | measure_latency(model, torch.zeros(1, *image_shape, device=device))


def summarize(training: Training, selection_split: str, facts: dict, ended: bool) -> dict:
    """Return the contents of summary.json; facts: of model and data."""
    note = "The best epoch was chosen on the test set; --val_fraction chooses it on held-out images."
    history, device = training.history, training.device
    return {
        "finished": ended,
        "epochs": len(history),
        "best_epoch_chosen_on": {"val": "validation set", "test": "test set"}[selection_split],
        "note": "" if selection_split == "val" else note,
        "final": history[-1],
        "best": training.best,
        "training_seconds": sum(row["seconds"] for row in history),
        "average_epoch_seconds": statistics.fmean(row["seconds"] for row in history),
        **facts,
        "latency_ms_per_image": None,
        "latency_std_ms": None,
        **(costs_of(training.model, facts["image_shape"], device) if ended else process_peak_memory(device)),
        "device": device_name(device),
        "versions": versions(),
    }


def results_text(history: list[dict], best: dict) -> str:
    """Return the text of train_eval_results.txt: a line for each epoch, average epoch time, the best epoch."""
    split = "val" if "val_top1" in best else "test"
    note = f"where test top-1 is {best['test_top1']:.2f} %" if split == "val" else "chosen on the test set"
    return (
        "".join(epoch_line(row) + "\n" for row in history)
        + f"\naverage epoch time {statistics.fmean(row['seconds'] for row in history):.2f} s\n"
        + f"best {split} top-1 {best[f'{split}_top1']:.2f} % in epoch {best['epoch']}, {note}\n"
    )


def draw_curves(history: list[dict], path: Path) -> None:
    """Draw loss and top-1 accuracy by epoch, as PNG."""
    from matplotlib import rc_context  # imported late: it takes most of a second
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    with rc_context(paper_style()):  # the settings of a caller stay
        figure = Figure(figsize=(6.9, 2.4), layout="constrained")
        for axis, key, label in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1 accuracy (%)"), strict=True):
            for name in ("train", "val", "test"):
                if f"{name}_{key}" in history[0]:
                    marker = "." if len(epochs) < 30 else None
                    axis.plot(epochs, [row[f"{name}_{key}"] for row in history], label=name, marker=marker)
            axis.set_xlabel("epoch")
            axis.set_ylabel(label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend()
        write_atomically(path, as_figure(figure))
