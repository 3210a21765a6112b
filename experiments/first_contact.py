"""Checks and measurements on a GPU, in six minutes: kernels against float64, times against attention, tests.

python3 -m experiments.first_contact
python3 -m experiments.first_contact --parts check time --output contact

Needs no installation and no network. Every row is appended to rows.jsonl as soon as it is measured, and summary.md is written
anew after each part, so a run that is cut off keeps what it has. Without a GPU the parts are run as far as they go, and what is
not there is skipped by name; --small checks the kernels under Triton's interpreter then. The exit status is 1 where a row
failed; missed targets do not count.
"""

import argparse
import importlib.util
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from experiments import gpu_checks, gpu_tests, gpu_times, gpu_training
from experiments.gpu_parts import Part, read_rows, run_in_processes
from experiments.tables import as_markdown
from options.parser import OneLineParser
from runs.files import write_atomically
from runs.measure import commit

WORK = {
    "check": gpu_checks.check,
    "time": gpu_times.times,
    "tests": gpu_tests.tests,
    "epochs": gpu_training.epochs,
    "profile": gpu_training.profile,
}
# Seconds of each part on a GPU; twice as many on a CPU. The first three, twice, fit into fifteen minutes with the start of the
# machine.
SECONDS = {"check": 90, "time": 110, "tests": 140, "epochs": 240, "profile": 60}
FIRST = ("check", "time", "tests")
CHECKERS = 12  # processes, one for each size and dtype; compilation takes most of their time
COLUMNS = {
    "check": ("status", "error", "agreement", "registers", "spills", "shared", "seconds"),
    "time": ("status", "batch", "ms", "ratio", "target", "seconds"),
    "tests": ("status", "seconds"),
    "epochs": ("status", "kernels", "seconds", "peak_mb", "ratio", "target"),
    "profile": ("status", "device_ms_per_step", "seconds"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="first_contact", description=__doc__.splitlines()[0], allow_abbrev=False)
    folder = os.environ.get("OUT", "Output/gpu")
    parser.add_argument("--output", default=folder, help="folder of rows.jsonl and summary.md (default: $OUT, or Output/gpu)")
    parser.add_argument("--parts", nargs="+", choices=tuple(WORK), default=FIRST, help=f"(default: {' '.join(FIRST)})")
    parser.add_argument("--small", action="store_true", help="one small size; without a GPU under Triton's interpreter")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the seconds that each part may take (default: 1)")
    args = parser.parse_args(argv)
    if not args.scale > 0:
        parser.error(f"--scale {args.scale}: must be above 0")
    return args


def why_not(name: str, device: str, small: bool) -> str | None:
    """Return why a part cannot run here at all, or None."""
    if name != "check":
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if device == "cuda" or small else "no CUDA device; --small runs the kernels under the interpreter"


def run_part(part: Part, work: Callable[[Part], None]) -> None:
    """Run one part in processes of its own, or in this one if it starts processes itself; add its wall-clock seconds."""
    start = time.time()
    reason = why_not(part.name, part.device, part.small)
    if reason:
        part.add("all kernels", f"skipped: {reason}")
    elif part.name in ("tests", "epochs") or (part.name == "profile" and part.device != "cuda"):
        work(part)
    else:
        run_in_processes(work, part, CHECKERS if part.name == "check" and part.device == "cuda" else 1)
    part.add("all of it", "ok", seconds=round(time.time() - start, 1))


def kind_of(status: str) -> str:
    return status.partition(":")[0].partition(" ")[0]


def summary_of(rows: list[dict], about: str) -> str:
    """Return the summary in Markdown: counts by part, then all that failed or missed, then a table of each part."""
    texts = [about]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    for part in parts:
        counts = Counter(kind_of(row["status"]) for row in rows if row["part"] == part)
        texts.append(f"{part}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    bad = [row for row in rows if kind_of(row["status"]) in ("failed", "missed", "spills")]
    texts += [f"- {row['part']}: {row['case']}: {row['status']}" for row in bad]
    for part in parts:
        found = [row for row in rows if row["part"] == part]
        names = [name for name in COLUMNS[part] if any(name in row for row in found)]
        texts.append(as_markdown([{part: row["case"]} | {name: row.get(name) for name in names} for row in found]))
    return "\n\n".join(texts) + "\n"


def main(argv: list[str]) -> int:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # in the processes of all parts
    os.environ["CONVNN_KERNELS"] = "triton" if device == "cuda" else "auto"  # where a kernel cannot run, a row says so
    if args.small and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"no CUDA device ({platform.machine()})"
    about = f"{machine}, Python {platform.python_version()}, torch {torch.__version__}, commit {commit()}"
    print(about, flush=True)
    scale = args.scale * (1 if device == "cuda" else 2)
    for name in args.parts:
        part = Part(name, rows, device, args.small, time.time() + SECONDS[name] * scale)
        run_part(part, WORK[name])
        write_atomically(folder / "summary.md", summary_of(read_rows(rows), about))
    print((folder / "summary.md").read_text(encoding="utf-8"))
    print(f"results are in {folder}")
    return 1 if any(kind_of(row["status"]) == "failed" for row in read_rows(rows)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
