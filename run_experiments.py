"""Sweeps: a grid of runs from a YAML file, on this machine or a cluster, with a summary table and plots.

python run_experiments.py configs/sweeps/mixers.yaml --jobs 2
python run_experiments.py configs/sweeps/mixers.yaml --set seed=0,1,2 --set num_epochs=3 --dry_run
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from options import PROGRAMS, RESUME_MAY_CHANGE, OneLineParser, Program, did_you_mean, parse_options, read_yaml

ROOT = Path(__file__).resolve().parent
KEYS = ("program", "options", "grid", "seed")
PLOTS_EVERY = 30  # seconds: drawing takes one or two
SET_BY_THE_SWEEP = ("output_dir", "resume", "test_only", "checkpoint", "export")


# ---------------------------------------------------------------------------------------------------------------
# The points of a sweep
# ---------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder: what varies
    program: str
    values: dict  # options by name, as in the sweep
    varying: dict  # those of them in which the points differ

    def argv(self, folder: Path) -> list[str]:
        """The command line after the program; it goes on where a run in this folder ended."""
        words = []
        for name, value in self.values.items():
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return [*words, "--output_dir", str(folder / self.name), "--resume"]


def combinations(axes: dict) -> Iterator[dict]:
    """Every choice of one value per name; a value that is not a list is the only choice."""
    choices = [value if isinstance(value, list) else [value] for value in axes.values()]
    for values in itertools.product(*choices):
        yield dict(zip(axes, values, strict=True))


def read_sweep(path: str, changes: list[str]) -> tuple[list[tuple[str, dict]], list[str]]:
    """Points (program, options by name) and axes of a sweep file, changed by `--set name=v1,v2`. Raises ValueError.

    A mapping of the grid may have a program and options of its own; `program` is then an axis, and the first one.
    """
    try:
        sweep = read_yaml(path)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("config=")) from None
    for key in sweep:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, KEYS)}; a sweep has {', '.join(KEYS)}")
    options, grid = sweep.get("options") or {}, sweep.get("grid") or {}
    grids = [dict(one) if isinstance(one, dict) else one for one in (grid if isinstance(grid, list) else [grid])]
    if not isinstance(options, dict) or not all(isinstance(one, dict) for one in grids):
        raise ValueError(f"{path}: options is a mapping, and grid a mapping or a list of mappings, of option names to values")
    programs = [one.pop("program", sweep.get("program")) for one in grids]
    own = [one.pop("options", None) or {} for one in grids]
    for program in programs:
        find_program(program, path)
    every = {"seed": sweep["seed"]} if "seed" in sweep else {}
    axes = [name for one in [*grids, every] for name in one]
    for name, values in map(parse_change, changes):
        grids, own = ([{key: value for key, value in one.items() if key != name} for one in ones] for ones in (grids, own))
        options = {key: value for key, value in options.items() if key != name}
        every[name] = values
        axes.append(name)
    for one in [options, every, *grids, *own]:
        if not isinstance(one, dict):
            raise ValueError(f"{path}: options is a mapping of option names to values")
        check_values(path, one)
    points = [
        (program, options | constants | point)
        for program, constants, one in zip(programs, own, grids, strict=True)
        for point in combinations(one | every)
    ]
    distinct = []
    for point in points:  # what --set removed may leave twins
        if point not in distinct:
            distinct.append(point)
    axes = sorted(dict.fromkeys(axes), key="seed".__eq__)  # the seed last
    return distinct, ["program", *axes] if len(set(programs)) > 1 else axes


def find_program(name: str, path: str) -> Program:
    """A command line of ours, or a Python file of another one that has its `PROGRAM`. Raises ValueError, naming the sweep."""
    if isinstance(name, str) and name in PROGRAMS:
        return PROGRAMS[name]
    file = ROOT / str(name)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{path}: program is {name!r}; give {', '.join(PROGRAMS)} or a Python file that has a PROGRAM")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "PROGRAM", None), Program):
        raise ValueError(f"{path}: program {name} has no PROGRAM, as examples/compare_with_timm.py has it")
    return module.PROGRAM


def parse_change(change: str) -> tuple[str, list]:
    """name=v1,v2 -> name and values, which are written as in YAML."""
    name, equals, text = change.partition("=")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = None
    if not name or not equals or not values:
        raise ValueError(f"--set {change!r} is not name=value or name=value1,value2")
    return name, values


def check_values(path: str, options: dict) -> None:
    for name, value in options.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is not the name of an option")
        if value == []:
            raise ValueError(f"{path}: {name} has no values")
        values = value if isinstance(value, list) else [value]
        flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
        for one in flat:
            if one is not None and not isinstance(one, (str, int, float)):
                raise ValueError(f"{path}: {name} has the value {one}, which is neither a number nor a text")


def name_points(points: list[tuple[str, dict]], axes: list[str]) -> list[Point]:
    """Points with a name each: their values on the axes. So a part of a sweep has the names that the whole has."""
    named = []
    for program, values in points:
        of_axis = {"program": find_program(program, program).family} | values
        varying = {name: of_axis[name] for name in axes if name in of_axis}
        plain = ("program", "layer")
        parts = [as_word(value) if name in plain else f"{name}-{as_word(value)}" for name, value in varying.items()]
        named.append(Point("_".join(parts) or as_word(values.get("layer", "run")), program, values, varying))
    return named


def as_word(value) -> str:
    """A value as part of a folder's name."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in text)


def check_points(points: list[Point], folder: Path) -> None:
    """Raise ValueError for the first point whose options do not fit, or whose folder holds a run with others."""
    names, runs = [point.name for point in points], {}
    for point in points:
        for name in SET_BY_THE_SWEEP:
            if name in point.values:
                raise ValueError(f"{point.name}: {name} is set by the sweep; leave it out")
        if names.count(point.name) > 1:
            raise ValueError(f"two points would be named {point.name}; make their values differ in letters or digits")
        options = resolved(point, folder)
        same = runs.setdefault(json.dumps(options | {"output_dir": ""}), point.name)
        if same != point.name:
            raise ValueError(f"{same} and {point.name} are the same run; drop one of them")
        check_folder(point, options, folder / point.name)


def check_folder(point: Point, options: dict, folder: Path) -> None:
    """Raise ValueError if the folder holds a run with other options; one without a schedule may be made longer."""
    path = folder / "config.yaml"
    for name, value in (read_yaml(str(path)) if path.exists() else {}).items():
        may_change = name in RESUME_MAY_CHANGE
        if name == "num_epochs" and value != options[name]:
            may_change = value < options[name] and options["scheduler"] == "none" and not options["early_stopping"]
        elif name == "early_stopping":
            may_change = False
        if name in options and options[name] != value and not may_change:
            raise ValueError(
                f"{point.name}: {folder} holds a run with {name}={value}, not {options[name]}; "
                "remove it, or use another --output_dir"
            )


def resolved(point: Point, folder: Path) -> dict:
    """Every option of the point's run by name. Raises ValueError with the message that its program would end with."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            options, _ = parse_options(find_program(point.program, point.name), "", point.argv(folder), prog=point.program)
    except SystemExit:
        raise ValueError(f"{point.name}: {message.getvalue().split('error: ', 1)[-1].strip()}") from None
    return options.as_dict()


# ---------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def finished_summary(point: Point, folder: Path) -> dict | None:
    """The summary of the point's run if it has ended: by early stopping, or after as many epochs as are asked for now."""
    summary = read_summary(folder / point.name)
    if not summary or not summary["finished"]:
        return None
    options = resolved(point, folder)
    return summary if options["early_stopping"] or summary["epochs"] == options["num_epochs"] else None


def is_finished(point: Point, folder: Path) -> bool:
    return finished_summary(point, folder) is not None


def lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a run's folder as long as any process has it open; None if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@dataclass
class Running:
    """A run in its own process, which holds the lock of its folder as well: if we are killed, it stays locked."""

    point: Point
    process: subprocess.Popen
    slot: int
    descriptor: int


@dataclass
class Sweep:
    """Points on this machine, one per slot at a time."""

    points: list[Point]
    folder: Path
    slots: int
    gpus: bool = False  # each slot has GPUs of its own
    gpus_per_run: int = 1  # with more than one, torchrun starts as many processes
    failed: list[str] = field(default_factory=list)

    def start(self, point: Point, slot: int, descriptor: int) -> Running:
        """Start a point, whose lock we hold."""
        folder = self.folder / point.name
        (folder / "point.json").write_text(json.dumps(point._asdict()))  # the summary of later sweeps in this folder has it too
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[slot * self.gpus_per_run :][: self.gpus_per_run])
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (self.slots * self.gpus_per_run))))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus_per_run}"]
        command = [sys.executable, *(launcher if self.gpus_per_run > 1 else []), str(ROOT / point.program)]
        command += point.argv(self.folder)
        with open(folder / "log.txt", "ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(descriptor,),
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
        return Running(point, process, slot, descriptor)

    def start_some(self, waiting: list[Point], running: list[Running], progress) -> None:
        """Start points while slots are free. What is finished is done; what another process runs waits for that."""
        for point in list(waiting):
            free = set(range(self.slots)) - {run.slot for run in running}
            descriptor = lock(self.folder / point.name) if free else None
            if descriptor is None:
                continue
            waiting.remove(point)
            if is_finished(point, self.folder):  # looked at under the lock, so that nobody else is about to run it
                os.close(descriptor)
                progress.update()
            else:
                running.append(self.start(point, min(free), descriptor))

    def run(self, progress) -> None:
        """Run all points; the summary is kept current. Runs are ended with the sweep, to be resumed by the next one."""
        waiting, running, draw_again = list(self.points), [], time.monotonic() + PLOTS_EVERY
        try:
            while waiting or running:
                self.start_some(waiting, running, progress)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    progress.write(self.outcome(run))
                    os.close(run.descriptor)
                    progress.update()
                    is_due = time.monotonic() > draw_again
                    write_summary(self.points, self.folder, draw_plots=is_due)
                    draw_again = time.monotonic() + PLOTS_EVERY if is_due else draw_again
                elsewhere = len(waiting) if len(running) < self.slots else 0
                note = f", {elsewhere} run by another process" if elsewhere else ""
                progress.set_postfix_str(f"{len(running)} running, {len(self.failed)} failed{note}")
                time.sleep(0.1)
        finally:
            for run in running:
                run.process.terminate()  # not SIGINT, which runs started in the background ignore
            for run in running:
                run.process.wait()
                os.close(run.descriptor)

    def outcome(self, run: Running) -> str:
        """How a run ended, in a line; a failure is noted."""
        folder = self.folder / run.point.name
        summary = finished_summary(run.point, self.folder)
        if run.process.returncode == 0 and summary:
            return f"{run.point.name}: test top-1 {summary['final']['test_top1']:.2f} %"
        self.failed.append(run.point.name)
        return f"{run.point.name} failed: {last_line(folder / 'log.txt')} (see {folder / 'log.txt'})"


def cores() -> int:
    """Cores that we may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that we may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    import torch  # only to count

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


class ClusterRun:
    """A point as a job of submitit: it runs the same code, and when its job is requeued it is submitted again and resumes."""

    process: subprocess.Popen | None = None

    def __call__(self, point: Point, points: list[Point], folder: Path, gpus_per_run: int) -> str:
        descriptor = lock(folder / point.name)
        if descriptor is not None and not is_finished(point, folder):
            sweep = Sweep([point], folder, slots=1, gpus_per_run=gpus_per_run)
            run = sweep.start(point, 0, descriptor)
            self.process = run.process
            run.process.wait()
            message = sweep.outcome(run)
            if sweep.failed:
                os.close(descriptor)
                raise RuntimeError(message)
        if descriptor is not None:
            os.close(descriptor)
        write_summary(points, folder)
        return point.name

    def checkpoint(self, *arguments):
        from submitit.helpers import DelayedSubmission

        if self.process is not None:  # it saves and ends; a signal has interrupted `wait`, which would not let in another
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.process.pid, 0)
        return DelayedSubmission(ClusterRun(), *arguments)


def submit(points: list[Point], folder: Path, parameters: dict, gpus_per_run: int) -> list:
    """One job per point that is not finished, as an array; returns submitit's jobs."""
    from submitit import AutoExecutor

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # jobs inherit it
    points_left = [point for point in points if not is_finished(point, folder)]
    if not points_left:
        return []
    executor = AutoExecutor(folder=folder / "jobs", cluster="slurm")
    executor.update_parameters(name=folder.name, **parameters)
    with executor.batch():
        return [executor.submit(ClusterRun(), point, points, folder, gpus_per_run) for point in points_left]


# ---------------------------------------------------------------------------------------------------------------
# What came out
# ---------------------------------------------------------------------------------------------------------------

MEASURES = {  # column -> where it stands in summary.json, and what it is divided by
    "top1": (("final", "test_top1"), 1),
    "top5": (("final", "test_top5"), 1),
    "best_top1": (("best", "test_top1"), 1),
    "parameters": (("parameters",), 1),
    "mflops_per_image": (("flops_per_image",), 1e6),
    "epoch_seconds": (("average_epoch_seconds",), 1),
    "latency_ms_per_image": (("latency_ms_per_image",), 1),
    "peak_memory_mb": (("peak_memory_bytes",), 1e6),
}


def with_earlier(points: list[Point], folder: Path) -> list[Point]:
    """These points, and those that other sweeps started in the same folder."""
    names = {point.name for point in points}
    earlier = []
    for path in sorted(folder.glob("*/point.json")):
        if path.parent.name not in names:
            earlier.append(Point(**json.loads(path.read_text())))
    return [*points, *earlier]


def summarize(points: list[Point], folder: Path) -> list[dict]:
    """A row for all points that differ in their seed only: means of what ended, and standard deviations over the seeds."""
    columns = list(dict.fromkeys(name for point in points for name in point.varying if name != "seed"))
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(json.dumps(point.varying | {"seed": None}, sort_keys=True), []).append(point)
    rows = []
    for group in groups.values():
        summaries = [summary for point in group if (summary := finished_summary(point, folder))]
        row = {name: as_cell(group[0].varying.get(name, "")) for name in columns}
        row |= {"runs": len(summaries), "of": len(group)}
        for measure, (path, unit) in MEASURES.items():
            values = []
            for summary in summaries:
                for key in path:
                    summary = summary[key]
                values.append(summary / unit)
            row[measure] = statistics.fmean(values) if values else math.nan
            row[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        rows.append(row)
    return rows


def as_cell(value):
    """A value of the grid as a number where it is one (YAML reads 1e-3 as a text), lists in a word."""
    if isinstance(value, list):
        return as_word(value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def write_summary(points: list[Point], folder: Path, draw_plots: bool = True) -> None:
    """summary.csv, summary.md and the plots, from whatever has ended so far."""
    from utils import as_csv, as_png, write_atomically

    rows = summarize(with_earlier(points, folder), folder)
    cells = [{name: "" if is_nan(value) else value for name, value in row.items()} for row in rows]
    write_atomically(folder / "summary.csv", as_csv(cells))
    write_atomically(folder / "summary.md", as_markdown(rows))
    done = [row for row in rows if row["runs"]]
    if done and draw_plots:
        for name, figure in draw(done).items():
            write_atomically(folder / f"{name}.png", as_png(figure))


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)


def as_markdown(rows: list[dict]) -> str:
    """Means, with standard deviations over seeds where they are of interest."""
    columns = [name for name in rows[0] if not name.endswith("_std")]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for name in columns:
            value, spread = row[name], row.get(f"{name}_std", math.nan)
            if is_nan(value):
                cells.append("")
            elif name == "parameters":
                cells.append(f"{value:,.0f}")
            elif name in MEASURES:
                cells.append(f"{value:.4g}" + ("" if is_nan(spread) or name == "mflops_per_image" else f" ± {spread:.2g}"))
            else:
                cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "top1 and top5 are of the last epoch, on the test set, in percent; means of the runs that ended, ± standard deviation."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def draw(rows: list[dict]) -> dict:
    """Figures by name: accuracy against each cost, and against every option that was swept through numbers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    swept = [name for name in itertools.takewhile(lambda name: name != "runs", rows[0]) if len({row[name] for row in rows}) > 1]
    styles = list(itertools.product("os^vDP", [f"C{number}" for number in range(10)]))
    costs = {
        "latency_ms_per_image": "latency (ms per image)",
        "mflops_per_image": "MFLOPs per image",
        "parameters": "parameters",
        "peak_memory_mb": "peak memory (MB)",
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axis, (cost, label) in zip(figure.subplots(2, 2).flatten(), costs.items(), strict=True):
        for row, (marker, color) in zip(rows, itertools.cycle(styles), strict=False):
            spread = 0 if is_nan(row["top1_std"]) else row["top1_std"]
            axis.errorbar(
                row[cost], row["top1"], spread, fmt=marker, color=color, ms=7, lw=1, capsize=2, label=label_of(row, swept)
            )
        values = [row[cost] for row in rows]
        if max(values) > 3 * min(values):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.minorticks_off()
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_xlabel(label)
        axis.set_ylabel("test top-1 (%)")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figures = {"tradeoff": figure}
    for option in swept:
        if all(
            isinstance(row[option], (int, float)) and not isinstance(row[option], bool) for row in rows if row[option] != ""
        ):
            figures[f"top1_by_{option}"] = draw_option(rows, option, [name for name in swept if name != option])
    return figures


def draw_option(rows: list[dict], option: str, others: list[str]):
    """Accuracy against one option, a line for every combination of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row[option] != "":
            lines.setdefault(label_of(row, others), []).append(row)
    for label, of_line in lines.items():
        of_line.sort(key=lambda row: row[option])
        spreads = [0 if is_nan(row["top1_std"]) else row["top1_std"] for row in of_line]
        axis.errorbar(
            [row[option] for row in of_line], [row["top1"] for row in of_line], spreads, marker="o", capsize=2, label=label
        )
    axis.set_xlabel(option)
    axis.set_ylabel("test top-1 (%)")
    axis.set_xticks(sorted({row[option] for row in rows if row[option] != ""}))
    axis.grid(alpha=0.3)
    if others:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def label_of(row: dict, names: list[str]) -> str:
    plain = ("program", "layer")
    return ", ".join(str(row[name]) if name in plain else f"{name} {row[name]}" for name in names if row[name] != "") or "all"


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="program, options, grid and seed; see configs/sweeps")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="set or replace an option or an axis of the grid; repeatable",
    )
    parser.add_argument("--output_dir", type=Path, help="folder of the sweep (default: ./Output/sweeps/<name of the file>)")
    parser.add_argument("--dry_run", action="store_true", help="print the points and stop")
    parser.add_argument(
        "--gpus_per_run", type=int, default=1, help="GPUs of one run; more than 1 start it by torchrun (default: 1)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    where.add_argument("--gpus", type=int, help="run on so many GPUs, one run on each (or on --gpus_per_run of them) at a time")
    where.add_argument(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="submit to SLURM by submitit (pip install submitit), with its parameters: timeout_min=600 slurm_partition=gpu "
        "gpus_per_node=1 slurm_array_parallelism=8",
    )
    return parser


def slurm_parameters(words: list[str]) -> dict:
    parameters = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name or not equals:
            raise ValueError(f"--slurm {word!r} is not name=value")
        try:
            parameters[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--slurm {word!r} has a value that YAML cannot read") from None
    return parameters


def show_points(points: list[Point], folder: Path) -> None:
    width = max(len(point.name) for point in points)
    for point in points:
        state = "finished" if is_finished(point, folder) else "begun" if (folder / point.name / "last.pt").exists() else ""
        print(f"{point.name:<{width}}  {state:<8}  {point.program} {shlex.join(point.argv(folder)[:-3])}".rstrip())
    print(f"{len(points)} runs in {folder}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    folder = args.output_dir or Path("Output/sweeps") / Path(args.sweep).stem
    try:
        for name in ("jobs", "gpus", "gpus_per_run"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
        if args.gpus_per_run > 1 and args.gpus is None and args.slurm is None:
            raise ValueError(f"--gpus_per_run {args.gpus_per_run} goes with --gpus or --slurm")
        if args.gpus and args.gpus < args.gpus_per_run:
            raise ValueError(f"--gpus_per_run {args.gpus_per_run} is more than --gpus {args.gpus}")
        points = name_points(*read_sweep(args.sweep, args.set))
        check_points(points, folder)
        parameters = None if args.slurm is None else slurm_parameters(args.slurm)
        if args.gpus and not args.dry_run and args.gpus > len(visible_gpus()):
            raise ValueError(f"--gpus {args.gpus} is more than the {len(visible_gpus())} GPUs that can be used here")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder} is not a folder")
        if args.dry_run:
            show_points(points, folder)
            return 0
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output_dir {folder}: {error.strerror}")
    if parameters is not None:
        return run_on_cluster(points, folder, parameters, args.gpus_per_run, parser)
    from tqdm import tqdm

    slots = args.gpus // args.gpus_per_run if args.gpus else args.jobs
    sweep = Sweep(points, folder, slots, gpus=bool(args.gpus), gpus_per_run=args.gpus_per_run)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tqdm(total=len(points), unit="run", disable=None) as progress:
            sweep.run(progress)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    write_summary(points, folder)
    print((folder / "summary.md").read_text())
    if sweep.failed:
        print(f"{len(sweep.failed)} of {len(points)} failed: {', '.join(sweep.failed)}", file=sys.stderr)
    print(f"results are in {folder}")
    return 1 if sweep.failed else 0


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def run_on_cluster(
    points: list[Point], folder: Path, parameters: dict, gpus_per_run: int, parser: argparse.ArgumentParser
) -> int:
    try:
        jobs = submit(points, folder, parameters, gpus_per_run)
    except ModuleNotFoundError:
        parser.error("--slurm needs the package submitit: pip install submitit")
    except (RuntimeError, NameError, TypeError, ValueError) as error:  # no sbatch here, or a parameter that it does not know
        for made in (folder / "jobs", folder):
            with contextlib.suppress(OSError):  # it holds something
                made.rmdir()
        parser.error(f"--slurm: {error}")
    print(f"submitted {len(jobs)} jobs; their logs are in {folder / 'jobs'}, and the summary in {folder} grows as they end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
