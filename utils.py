"""Seeds, devices, checkpoint files, and what a run writes into its output folder."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from options import RESUME_MAY_CHANGE
from processes import Processes

COLUMNS = (
    "epoch lr train_loss train_top1 train_top5 test_loss test_top1 test_top5 seconds images_per_s".split()
)  # and, where a validation set is held out, val_loss val_top1 val_top5


class RunError(Exception):
    """Something a user can mend, in one line; the program ends with exit status 2."""


class WriteError(Exception):
    """An output that cannot be written, in one line; what it would have replaced is unchanged."""


class DamagedError(RunError):
    """A checkpoint that is not whole."""


# ---------------------------------------------------------------------------------------------------------------
# Device and random numbers
# ---------------------------------------------------------------------------------------------------------------


def pick_device(name: str, processes: Processes | None = None) -> torch.device:
    """The device that --device names; auto takes cuda, then mps, then cpu. Raises RunError if it is absent.

    Of several processes on a machine each has a GPU of its own.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise RunError(f"--device {name}: there is none here; use {' or '.join(d for d, there in present.items() if there)}")
    if processes is None or processes.world == 1:
        return torch.device(name)
    if name == "mps":
        raise RunError("--device mps: several processes can train on cuda or cpu")
    if name == "cuda" and processes.local_world > (count := torch.cuda.device_count()):
        raise RunError(
            f"--device cuda: more processes than GPUs on a machine; use torchrun --nproc_per_node={count}, or --device cpu"
        )
    return torch.device(name, processes.local_rank) if name == "cuda" else torch.device(name)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch on all devices; `deterministic` also forbids operations whose result may vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def seed_process(seed: int, rank: int, *progress: int) -> None:
    """Random numbers of its own for each process after the first, which goes on with those that made the model."""
    if rank or progress:
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr((seed, rank, *progress)).encode()).digest()[:8], "big") >> 1)


def random_state(device: torch.device) -> dict:
    """The states of the generators a run draws from; data order and augmentation are functions of the seed instead."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write, which replaces `path` once it is whole: a reader sees the old file or the new one, never half of one.

    It is a temporary file in the same folder, flushed to disk, then renamed. Raises WriteError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises a RuntimeError from it
        if not isinstance(cause, OSError):
            raise
        raise WriteError(f"{path} cannot be written ({cause.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """The names in it, which else may be lost with the power; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """What was being written, to the file `name` or any, when a process was killed."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """The whole of a file, as in `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def as_csv(rows: list[dict], columns: list[str] | None = None) -> str:
    """A table with a header; its columns are those of the first row unless they are given."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_png(figure, dpi: int = 110) -> bytes:
    """A figure of matplotlib as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def check_writable(folder: Path, flag: str) -> None:
    """Raise RunError if a folder cannot be made or written to; nothing is left there."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise RunError(f"{flag} {folder}: {existing} cannot be written to ({error.strerror})") from None


def save_checkpoint(state: dict, path: Path) -> None:
    """Write tensors and plain values, as in `atomic_file`."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint; no code in it is run. Raises DamagedError for anything that is not a whole checkpoint."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        # torch.load does not look at the checksums, and would give numbers of which some bits have changed.
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {part}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        reason = (
            "it holds more than tensors and plain values" if "Unsupported" in str(error) else "damaged, or another kind of file"
        )
        raise DamagedError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    if "model" in state:
        return state
    return {"model": state.get("state_dict", state)}  # where others put the weights


def evaluated_weights(source: Path) -> dict:
    """The weights in a checkpoint that its metrics belong to: the averaged ones if there are any. Raises RunError."""
    state = load_checkpoint(source)
    weights = state.get("ema") or state["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise RunError(f"{source} is not a checkpoint: its model is not tensors by name")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.items()}


def load_state(model: nn.Module, weights: dict) -> None:
    """Load a state dict of exactly this architecture. Raises ValueError that names the first difference."""
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            raise ValueError(f"of another architecture: it has no {name}")
        if weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(value.shape)} here"
            raise ValueError(f"of another architecture or number of classes: {name} is {shapes}")
    for name in weights:
        if name not in own:
            raise ValueError(f"of another architecture: this model has no {name}")
    model.load_state_dict(weights)


def load_weights(
    model: nn.Module, source: Path, load: Callable[[nn.Module, dict], None] = load_state, flag: str = "--checkpoint"
) -> None:
    """Load the weights in a checkpoint that `flag` asked for; `load` puts a state dict into the model, or raises ValueError.

    Raises RunError if the file cannot be read or the weights do not fit.
    """
    weights = evaluated_weights(source)
    try:
        load(model, weights)
    except ValueError as error:
        raise RunError(f"{flag}: {source} is {error}") from None


def export_weights(path: Path, weights: dict) -> None:
    """Write a state dict as safetensors, for sharing."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    write_atomically(path, save({name: value.contiguous() for name, value in weights.items()}))


STATE = tuple("model optimizer scheduler scaler ema sampler rng epoch step best history config".split())


def resumable_state(folder: RunFolder, options: dict, quiet: bool = False) -> tuple[dict, Path] | None:
    """The state to go on from and its file, or None if there is none: last.pt or, where that is damaged, an earlier one.

    Raises RunError if it is of a run with other options, or if no file can be read.
    """
    if not folder.last.exists() and not folder.previous.exists():
        return None
    problems = []
    for path in (folder.last, folder.previous, folder.best):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
            missing = [name for name in STATE if name not in state]
            if missing or not isinstance(state["config"], dict):
                raise DamagedError(f"{path} is not the state of a run: it holds no {', '.join(missing) or 'options'}")
        except DamagedError as error:
            problems.append(str(error))
            continue
        for name, value in options.items():
            if name not in RESUME_MAY_CHANGE and state["config"].get(name) != value:
                raise RunError(f"--resume: {path} was trained with --{name} {state['config'].get(name)}, not {value}")
        if problems and not quiet:
            print(f"warning: {'; '.join(problems)}; going on from {path}", file=sys.stderr)
        return state, path
    raise RunError(f"--resume: {'; '.join(problems)}; there is nothing to go on from, leave --resume out to start anew")


# ---------------------------------------------------------------------------------------------------------------
# What a model costs
# ---------------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, image: torch.Tensor) -> int:
    """FLOPs of one forward pass in eval mode, a multiply-add counted as two.

    Counted by `torch.utils.flop_counter`: matrix products, convolutions, attention, and the search, the scores and
    the aggregation of neighbors. It does not see element-wise work, normalization, softmax, top-K and gather.
    """
    training = model.training
    model.eval()
    flops = flops_of(lambda: model(image))
    model.train(training)
    return flops


def flops_of(function: Callable[[], object]) -> int:
    """FLOPs of what `function` runs, counted as in `count_flops`."""
    # Attention decomposed into its two products counts the same on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.no_grad()
def measure_latency(model: nn.Module, image: torch.Tensor, seconds: float = 1.0) -> float:
    """Median milliseconds of a forward pass in eval mode on this one image, warm-up excluded."""
    training = model.training
    model.eval()
    synchronize = torch.cuda.synchronize if image.is_cuda else (lambda: None)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 13 or (time.perf_counter() < end and len(times) < 103):
        synchronize()
        start = time.perf_counter()
        model(image)
        synchronize()
        times.append(time.perf_counter() - start)
    model.train(training)
    return 1e3 * statistics.median(times[3:])


def peak_memory(device: torch.device) -> dict:
    """Peak memory in bytes, and of what: the CUDA allocator, else the process."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": "CUDA allocator"}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "peak_memory_of": "process (resident)"}


def versions() -> dict:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "torchvision", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # small data sets train without torchvision
            found[name] = metadata.version(name)
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


# ---------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------


class Progress:
    """A tqdm bar when stderr is a terminal; otherwise a line there at most every 30 seconds. Counts images."""

    LINE_EVERY = 30

    def __init__(self, title: str, total: int, done: int = 0, quiet: bool = False):
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self.start, self.first, self.printed = time.monotonic(), done, time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            self.bar = tqdm(desc=title, total=total, initial=done, unit=" images", unit_scale=True, leave=False)

    @property
    def due(self) -> bool:
        return not self.quiet and (self.bar is not None or time.monotonic() - self.printed > self.LINE_EVERY)

    def advance(self, images: int) -> None:
        self.done += images
        if self.bar is not None:
            self.bar.update(images)

    def show(self, loss: float, top1: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, top-1 {top1:.2f} %", refresh=False)
            return
        self.printed = time.monotonic()
        rate = (self.done - self.first) / (self.printed - self.start)
        left = tqdm.format_interval((self.total - self.done) / max(rate, 1e-9))
        print(
            f"{self.title}: {self.done:,}/{self.total:,} images, {rate:,.0f} images/s, ETA {left}, "
            f"loss {loss:.4f}, top-1 {top1:.2f} %",
            file=sys.stderr,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception) -> None:
        if self.bar is not None:
            self.bar.close()


# ---------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------


def describe_model(model: nn.Module) -> str:
    """The text of model.txt: module tree and parameter table."""
    rows = [(name, "x".join(map(str, p.shape)) or "1", f"{p.numel():,}") for name, p in model.named_parameters()]
    rows.append(("total", "", f"{count_parameters(model):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {count:>{widths[2]}}".rstrip() for name, shape, count in rows]
    return f"{model}\n\n" + "\n".join(table) + "\n"


def epoch_line(row: dict) -> str:
    """One epoch of the history in words; losses per image, accuracies in percent."""
    line = f"epoch {row['epoch']:3d}  time {row['seconds']:7.2f} s"
    for name in ("train", "val", "test"):
        if f"{name}_loss" in row:
            line += f"  {name} loss {row[f'{name}_loss']:.4f} top-1 {row[f'{name}_top1']:6.2f} top-5 {row[f'{name}_top5']:6.2f}"
    return line


class RunFolder:
    """Writes the outputs of one run into its folder, as the run goes.

    Tables are rewritten whole from the history after every epoch, so that a resumed run has no gap or double line.
    """

    CURVES_EVERY = 30  # seconds between drawings of curves.png: a drawing can take as long as a short epoch

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._drawn = 0.0

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def previous(self) -> Path:
        """The last.pt before the last one, until the run is finished."""
        return self.path / "previous.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    def save(self, state: dict, *others: Path) -> None:
        """Write last.pt, after `others`: a run that is killed between them writes those once more when it is resumed."""
        for path in others:
            save_checkpoint(state, path)
        self._link(self.last, self.previous)
        save_checkpoint(state, self.last)

    def restore(self, path: Path) -> None:
        """Make the file that a run goes on from its last.pt, in the place of a damaged one."""
        if path != self.last:
            self._link(path, self.last)

    def _link(self, path: Path, name: Path) -> None:
        """Another name for a file. Without hard links, or without the file, there is none: best.pt is left to fall back on."""
        with contextlib.suppress(OSError):
            link = self.path / f".{name.name}.{os.getpid()}.tmp"
            os.link(path, link)
            os.replace(link, name)
            link.unlink(missing_ok=True)  # still there if both were names of one file already

    def start(self, options: dict, model: nn.Module, resumed: bool) -> None:
        """Create the folder and write what is known before training; warn if it holds another run."""
        if not resumed and any((self.path / name).exists() for name in ("args.txt", "metrics.csv", "last.pt", "best.pt")):
            print(
                f"warning: {self.path} holds another run, which is written over; its weights stay as *.pt.old", file=sys.stderr
            )
            for path in self.path.glob("*.pt"):
                path.replace(path.with_name(path.name + ".old"))
            for name in ("train_eval_results.txt", "metrics.csv", "summary.json", "curves.png", "test_results.json"):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.path)
        shown = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in options.items()}
        self._write("args.txt", "".join(f"{name}: {value}\n" for name, value in shown.items()))
        self._write("config.yaml", yaml.safe_dump(options, sort_keys=False))
        self._write("model.txt", describe_model(model))

    def is_behind(self, epochs: int, ended: bool) -> bool:
        """Whether the results lack some of so many epochs, or do not know that the run has ended."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
            return summary["epochs"] < epochs or ended > summary["finished"]
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def epoch_done(self, history: list[dict], best: dict, summary: dict, last: bool) -> None:
        """Write the results so far; `best` is the row of the best epoch."""
        average = statistics.fmean(row["seconds"] for row in history)
        judge = "val" if "val_top1" in best else "test"
        text = "".join(epoch_line(row) + "\n" for row in history)
        text += f"\naverage epoch time {average:.2f} s\n"
        text += f"best {judge} top-1 {best[f'{judge}_top1']:.2f} % in epoch {best['epoch']}"
        text += f", where test top-1 is {best['test_top1']:.2f} %\n" if judge == "val" else ", chosen on the test set\n"
        self._write("train_eval_results.txt", text)
        extra = [name for name in best if name not in COLUMNS]
        self._write("metrics.csv", as_csv(history, COLUMNS + extra))
        if last or time.monotonic() - self._drawn > self.CURVES_EVERY:
            draw_curves(history, self.path / "curves.png")
            self._drawn = time.monotonic()
        if last:
            self.previous.unlink(missing_ok=True)
        # The last one: where it says that the run has ended, nothing is left to write.
        self._write("summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)


def draw_curves(history: list[dict], path: Path) -> None:
    """Loss and top-1 accuracy by epoch, as PNG."""
    from matplotlib.figure import Figure  # imported late: it takes most of a second

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, key, label in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1 accuracy (%)"), strict=True):
        for name in ("train", "val", "test"):
            if f"{name}_{key}" in history[0]:
                values = [row[f"{name}_{key}"] for row in history]
                axis.plot(epochs, values, label=name, marker="." if len(epochs) < 30 else None)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomically(path, as_png(figure, dpi=120))
