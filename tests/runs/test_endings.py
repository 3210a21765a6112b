"""Ends of a run from outside: out of memory, closed streams, signals of a terminal."""

import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import allconvnet_main
import train_eval
from runs import Stopped, processes, streams
from runs.memory import is_out_of_memory, stop_if_out_of_memory
from runs.processes import Signals
from tests.helpers.forked import Forked

ROOT = Path(__file__).parent.parent.parent
LINE = "--dataset digits --layer Conv2d --channels 4 --batch_size 16 --train_limit 32 --test_limit 20 --device cpu"
pytestmark = pytest.mark.usefixtures("quick_results")


def run(line, folder, *, epochs=1):
    return allconvnet_main.main([*shlex.split(f"{LINE} --num_epochs {epochs} {line}"), "--output_dir", str(folder)])


# --- memory ---------------------------------------------------------------------------------------------------------

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
SHORT = [
    (RuntimeError(f"{CPU}8589934592 bytes. Error code 12 (Cannot allocate memory)"), "8.00 GiB more"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes."), "1.00 GiB more"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "of the GPU while"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.50 GiB more"),
    (MemoryError("Unable to allocate 3.2 TiB for an array with shape (1, 2)"), "3.2 TiB more"),
    (MemoryError(), "while making x; use less"),
    (OSError(12, "Cannot allocate memory"), "while making x; use less"),
]


@pytest.mark.parametrize(("error", "words"), SHORT)
def test_short_memory_is_one_line(error, words):
    with (
        pytest.raises(Stopped, match=r"out of memory .*making x.*use less") as caught,
        stop_if_out_of_memory("x", "use less"),
    ):
        raise error
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory"), OSError(28, "No space left")])
def test_other_errors_are_not_about_memory(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), stop_if_out_of_memory("x"):
        raise error


def test_what_cannot_be_had_is_asked_for_really():
    with pytest.raises(Stopped, match="GiB more could not be had"), stop_if_out_of_memory("x"):
        torch.empty(2**60, dtype=torch.uint8)


def exhaust_the_gpu():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of 80 GiB")


@pytest.mark.parametrize(
    ("exhaust", "where"),
    [(lambda: torch.empty(2**60, dtype=torch.uint8), "memory while"), (exhaust_the_gpu, "of the GPU while")],
)
def test_a_run_out_of_memory_keeps_its_state_and_says_what_helps(exhaust, where, tmp_path, monkeypatch, capsys):
    real, calls = train_eval.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == 3:
            exhaust()
        real(*args)

    monkeypatch.setattr(train_eval, "train_step", train_step)
    assert run("", tmp_path / "run", epochs=2) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{where} making a step of --batch_size 16 images" in error
    assert all(f in error for f in ("--batch_size", "--accumulate_steps", "--compile_mode reduce-memory", "--use_amp"))
    assert f"--resume continues from {tmp_path / 'run' / 'last.pt'}" in error
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    monkeypatch.undo()
    assert run("--resume", tmp_path / "run", epochs=2) == 0


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_that_nobody_reads_goes_nowhere():
    pipe, write = os.pipe()
    stream = streams.Stream(os.fdopen(write, "w"))
    os.close(pipe)
    for _ in range(3):
        assert stream.write("text\n") == 5
        stream.flush()
    assert os.path.samestat(os.fstat(write), os.stat(os.devnull)) and not stream.isatty()
    stream.close()


def run_of_its_own(folder):
    return f"allconvnet_main.py {LINE} --num_epochs 2 --save_minutes 0 --output_dir {folder}".split()


def has_finished(folder):
    summary = (folder / "summary.json").read_text()
    return torch.load(folder / "last.pt", weights_only=True)["epoch"] == 2 and "finished" in summary


def test_a_run_whose_reader_has_seen_enough_goes_on(tmp_path):
    command = f"set -o pipefail; {sys.executable} {' '.join(run_of_its_own(tmp_path / 'run'))} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert has_finished(tmp_path / "run")


@pytest.mark.parametrize("closed", [(1, 2), (2,), (0, 1)], ids=["output and errors", "errors", "input and output"])
def test_a_run_whose_streams_are_closed_goes_on(closed, tmp_path):
    process = Forked(run_of_its_own(tmp_path / "run"), closed=closed, cwd=ROOT)
    _, error = process.communicate()
    assert process.returncode == 0 and error == "", error
    assert has_finished(tmp_path / "run")


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_second_hangup_is_of_the_same_terminal(monkeypatch):
    ended = []
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    with Signals() as signals, signals.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP
    assert not ended


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("program", ["allconvnet_main.py", "vit_main.py", "predict.py"])
def test_an_interrupt_while_modules_are_imported_leaves_no_traceback(program):
    """The first import after Python's own is where it comes."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'options': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"runpy.run_path({program!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


# --- messages -------------------------------------------------------------------------------------------------------


def test_the_time_left_counts_evaluations(tmp_path, monkeypatch, capsys):
    """On a clock that only evaluations move on, by 100 s each."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 0.0)
    real = train_eval.evaluate

    def evaluate(*args, **kwargs):
        now[0] += 100
        return real(*args, **kwargs)

    monkeypatch.setattr(train_eval, "time", clock)
    monkeypatch.setattr(train_eval, "evaluate", evaluate)
    run("", tmp_path / "run", epochs=3)
    assert [line.split("ETA ")[1] for line in capsys.readouterr().out.splitlines() if "ETA" in line] == ["03:20", "01:40"]
