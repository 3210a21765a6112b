"""Run the points of a sweep on this machine or a cluster. A lock on its folder keeps a run from being started twice."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from experiments.points import ROOT, Point, program_path
from experiments.report import FAILURE, NOTHING, Beside, finished_summary, is_finished, write_summary
from options.machine import cpu_cores as cores
from runs import Stopped
from runs.files import write_atomically
from runs.lock import VARIABLE, LockedError, identity, release, take

PLOTS_EVERY = 30  # seconds: drawing takes one or two


def lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of a run's folder while any process has it open; None if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return take(folder)
    except LockedError:
        return None


@dataclass
class Running:
    """A run in its own process, which holds the lock of its folder as well: if we are killed, it stays locked."""

    point: Point
    process: subprocess.Popen
    slot: int
    descriptor: int


@dataclass
class Sweep:
    """Run points on this machine, one per slot at a time."""

    points: list[Point]
    folder: Path
    slots: int
    gpus: bool = False  # each slot has its own GPUs
    gpus_per_run: int = 1  # with more than one, torchrun starts as many processes
    failed: list[str] = field(default_factory=list)
    awaited: set[str] = field(default_factory=set)  # points that another process was found to run
    beside: Beside = NOTHING  # for the summary

    def start(self, point: Point, slot: int, descriptor: int) -> Running:
        """Start a point, whose lock we hold. Raises OSError or Stopped for a folder that cannot be written to."""
        folder = self.folder / point.name
        write_atomically(folder / "point.json", json.dumps(point._asdict()))  # for the summary of later sweeps in this folder
        (folder / FAILURE).unlink(missing_ok=True)
        environment = os.environ | {VARIABLE: identity(descriptor)}  # the run is not to wait for our lock
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[slot * self.gpus_per_run :][: self.gpus_per_run])
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (self.slots * self.gpus_per_run))))
        if "." in __package__:  # installed: other modules must not find those beside the program
            environment["PYTHONSAFEPATH"] = "1"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus_per_run}"]
        command = [sys.executable, *(launcher if self.gpus_per_run > 1 else []), str(program_path(point.program))]
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
        """Start points while slots are free. Finished points are done; points that another process runs wait for it."""
        for point in list(waiting):
            free = set(range(self.slots)) - {run.slot for run in running}
            descriptor = None
            try:
                descriptor = lock(self.folder / point.name) if free else None
                if descriptor is None:
                    if free and point.name not in self.awaited:
                        self.awaited.add(point.name)
                        log = self.folder / point.name / "log.txt"
                        progress.write(f"{point.name}: waiting for another process that runs it (see {log})")
                        sys.stdout.flush()
                    continue
                waiting.remove(point)
                if not is_finished(point, self.folder):  # looked at under the lock, so that nobody else is about to run it
                    running.append(self.start(point, min(free), descriptor))
                    continue
            except (OSError, Stopped) as error:  # a full disk, a folder that may not be written to: the others go on
                if point in waiting:
                    waiting.remove(point)
                progress.write(self.failure(point, f"cannot be started: {error}"))
            if descriptor is not None:
                release(self.folder / point.name, descriptor)
            progress.update()

    def run(self, progress) -> None:
        """Run all points and keep the summary current. Runs end with the sweep, to be resumed by the next one."""
        waiting, running, draw_again = list(self.points), [], time.monotonic() + PLOTS_EVERY
        try:
            while waiting or running:
                self.start_some(waiting, running, progress)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    progress.write(self.outcome(run))
                    sys.stdout.flush()
                    release(self.folder / run.point.name, run.descriptor)
                    progress.update()
                    is_due = time.monotonic() > draw_again
                    write_summary(self.points, self.folder, is_due, self.beside)
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
                release(self.folder / run.point.name, run.descriptor)

    def outcome(self, run: Running) -> str:
        """Return a line about the end of a run; note a failure."""
        folder = self.folder / run.point.name
        summary = finished_summary(run.point, self.folder)
        if run.process.returncode == 0 and summary:
            return f"{run.point.name}: test top-1 {summary['final']['test_top1']:.2f} %"
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        line = lines[-1] if lines else ""
        # The program's advice may be to leave out --resume, which a sweep always gives.
        advice = f"; to start it anew, remove {folder}" if "--resume" in line else ""
        return self.failure(run.point, f"{line}{advice} (see {folder / 'log.txt'})")

    def failure(self, point: Point, why: str) -> str:
        """Note that a point failed, for the end and for the summary; return a line about it."""
        self.failed.append(point.name)
        with contextlib.suppress(OSError):  # on a full disk the line is all there is
            (self.folder / point.name / FAILURE).write_text(f"{why}\n", encoding="utf-8")
        return f"{point.name} failed: {why}"


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    import torch  # only to count

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


class ClusterRun:
    """A point as a job of submitit: it runs the same code; when its job is requeued it is submitted again and resumes."""

    process: subprocess.Popen | None = None

    def __call__(
        self,
        point: Point,
        points: list[Point],
        folder: Path,
        gpus_per_run: int,
        beside: Beside = NOTHING,
    ) -> str:
        descriptor = lock(folder / point.name)
        if descriptor is not None and not is_finished(point, folder):
            sweep = Sweep([point], folder, slots=1, gpus_per_run=gpus_per_run)
            run = sweep.start(point, 0, descriptor)
            self.process = run.process
            run.process.wait()
            message = sweep.outcome(run)
            if sweep.failed:
                release(folder / point.name, descriptor)
                raise RuntimeError(message)
        if descriptor is not None:
            release(folder / point.name, descriptor)
        write_summary(points, folder, beside=beside)
        return point.name

    def checkpoint(self, *arguments):
        from submitit.helpers import DelayedSubmission

        if self.process is not None:  # it saves and ends; a signal has interrupted `wait`, which would not let in another
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.process.pid, 0)
        return DelayedSubmission(ClusterRun(), *arguments)


def submit(
    points: list[Point],
    folder: Path,
    parameters: dict,
    gpus_per_run: int,
    beside: Beside = NOTHING,
) -> list:
    """Submit one job per point that is not finished, as an array; return submitit's jobs."""
    from submitit import AutoExecutor

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # jobs inherit it
    points_left = [point for point in points if not is_finished(point, folder)]
    if not points_left:
        return []
    executor = AutoExecutor(folder=folder / "jobs", cluster="slurm")
    executor.update_parameters(name=folder.name, **parameters)
    with executor.batch():
        return [executor.submit(ClusterRun(), point, points, folder, gpus_per_run, beside) for point in points_left]
