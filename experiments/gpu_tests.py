"""First contact, part `tests`: the tests that need a GPU, by pytest, with a row for each as soon as it ends.

This module is also the plugin of pytest that writes the rows.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.gpu_parts import Part

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pytest", "hypothesis")
PROCESSES = 12
# Kernels first: what is wrong in them is wrong in the models.
RUNS = (
    (["tests/kernels/interpreted_cuda.py"], {"CONVNN_TEST_DEVICE": "cuda"}),
    (["tests/experiments/test_gpu.py"], {}),  # no others: collecting them imports more than a GPU machine may have
)
ROWS = "CONVNN_CONTACT_ROWS"


def pytest_runtest_logreport(report) -> None:
    """Add a row for a test that has run, or that failed or was skipped before.

    Of the processes of pytest-xdist the first adds all rows.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    status = {"passed": "ok", "failed": "failed: ", "skipped": "skipped: "}[report.outcome]
    if report.skipped:
        status += str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "expected"
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        status += (crash.message if crash else str(report.longrepr)).splitlines()[0][:300]
    Part("tests", Path(os.environ[ROWS]), "cuda").add(report.nodeid, status, seconds=round(report.duration, 2))


def command(words: list[str], processes: int) -> list[str]:
    """Return the call of pytest, in several processes where pytest-xdist is installed."""
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "experiments.gpu_tests", "-p", "no:cacheprovider", *parallel, *words]


def tests(part: Part) -> None:
    """Run the tests until the deadline; the programs that are still running then are ended."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or part.device != "cuda":
        reason = f"{', '.join(missing)} not installed" if missing else "no CUDA device"
        for words, _ in RUNS:
            part.add(" ".join(words), f"skipped: {reason}")
        return
    for words, environment in RUNS:
        environment = os.environ | environment | {ROWS: str(part.rows.resolve()), "NVIDIA_TF32_OVERRIDE": "0"}
        line = command(words, PROCESSES)
        process = subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(max(0.0, part.deadline - time.time()))
            part.add(" ".join(words), "ok" if status == 0 else f"failed: exit status {status}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            part.add(" ".join(words), "skipped: the time of this part is up")
