"""First contact with a GPU, without one: rows, budgets and errors; checks that find wrong kernels; targets from given times."""

import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import first_contact, gpu_checks, gpu_parts, gpu_tests, gpu_times
from experiments.gpu_parts import Part, read_rows
from kernels import attention, chunked, reference


@pytest.fixture
def part(tmp_path):
    return Part("check", tmp_path / "rows.jsonl", "cpu", small=True)


def statuses(part):
    return {row["case"]: row["status"] for row in read_rows(part.rows)}


def fail(message):
    raise RuntimeError(message)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_each_case_is_a_row_at_once(part):
    def second():
        assert statuses(part) == {"one": "ok"}
        return {"status": "missed", "ms": 2.0}

    part.run({"one": dict, "two": second, "three": lambda: fail("bad\nstack"), "four": lambda: {"ms": 1.5}})
    assert statuses(part) == {"one": "ok", "two": "missed", "three": "failed: RuntimeError: bad", "four": "ok"}
    part.rows.write_text(part.rows.read_text() + '{"part": "che')  # cut off
    assert len(read_rows(part.rows)) == 4


def test_nothing_runs_after_an_error_of_the_device(part):
    part.run({"one": lambda: fail("CUDA error: an illegal memory access was encountered"), "two": lambda: fail("never run")})
    assert statuses(part)["two"] == "skipped: after an error of the device"


def test_nothing_starts_after_the_deadline(tmp_path):
    part = Part("check", tmp_path / "rows.jsonl", "cpu", deadline=0.0)
    part.run({"one": lambda: fail("never run")})
    assert statuses(part) == {"one": "skipped: the time of this part is up"}


def test_processes_that_die_or_hang_are_rows(part, monkeypatch):
    class Process:
        def __init__(self, target, args):
            self.shard, self.exitcode, self.alive = args[0].shard, 0, args[0].shard == 2

        def start(self):
            self.exitcode = 3 if self.shard == 1 else 0

        def join(self, timeout=None):
            pass

        def is_alive(self):
            return self.alive

        def kill(self):
            self.alive = False

    monkeypatch.setattr(gpu_parts.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Process))
    gpu_parts.run_in_processes(print, part, 3)
    assert statuses(part) == {
        "process 2 of 3": "failed: exit status 3",
        "process 3 of 3": "failed: ended, as the time of this part is up",
    }


def test_full_precision_is_restored():
    before = torch.backends.cudnn.allow_tf32
    with gpu_parts.full_precision():
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 == before


def test_spills_are_an_error(monkeypatch):
    triton_common = pytest.importorskip("kernels.triton_common")
    kernel = SimpleNamespace(n_regs=168, n_spills=4, metadata=SimpleNamespace(shared=1024))
    monkeypatch.setattr(triton_common, "launch", lambda *given, **options: kernel)
    row = gpu_checks.with_resources(lambda: {"error": 0.5} if triton_common.launch(None) else {})
    assert row == {"error": 0.5, "status": "spills 4 registers", "registers": 168, "spills": 4, "shared": 1024}


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """The module of kernels with the plain forms in place of them, in float32 alone as under the interpreter."""
    cuda = pytest.importorskip("kernels.cuda")
    for name in ("find_neighbors", "find_scored_neighbors", "pair_scores", "weighted_sum", "aggregate", "max_neighbors"):
        monkeypatch.setattr(cuda, name, getattr(reference, name))
    for name in ("pair_scores_backward", "weighted_sum_backward", "aggregate_backward"):
        monkeypatch.setattr(cuda, name, getattr(chunked, name))
    monkeypatch.setattr(cuda, "neighbor_attention", functools.partial(attention.compose, reference))
    monkeypatch.setattr(cuda, "neighbor_attention_backward", functools.partial(attention.compose_backward, chunked))
    monkeypatch.setattr(gpu_checks, "is_interpreted", lambda: True)
    return cuda


def test_right_kernels_pass(part, cuda):
    gpu_checks.check(part)
    found = statuses(part)
    assert len(found) == 27 and set(found.values()) == {"ok"}


def test_wrong_kernels_fail(part, cuda, monkeypatch):
    monkeypatch.setattr(cuda, "find_neighbors", lambda *given: reference.find_neighbors(*given).roll(1, 1))
    monkeypatch.setattr(cuda, "weighted_sum", lambda *given: reference.weighted_sum(*given) * 1.02)
    wrong = functools.partial(attention.compose, reference)
    monkeypatch.setattr(cuda, "neighbor_attention", lambda *given: (wrong(*given)[0] * 1.02, *wrong(*given)[1:]))
    monkeypatch.setattr(cuda, "max_neighbors", lambda *given: [x * 0 for x in reference.max_neighbors(*given)])
    gpu_checks.check(part)
    failed = {case.split(", float32")[0] for case, status in statuses(part).items() if status.startswith("failed")}
    assert {"search, matmul", "search, cosine, own first", "weighted sum", "attention", "largest neighbor", "ties"} <= failed
    assert not {"scored search", "pair scores", "depthwise convolution, backward"} & failed


# --- times ------------------------------------------------------------------------------------------------------------


def test_targets_are_ratios_to_the_faster_attention(tmp_path, monkeypatch):
    part = Part("time", tmp_path / "rows.jsonl", "cuda")
    times = {"attention (cuDNN)": 2.0, "attention (Flash)": 1.0, "ConvNN attention": 1.4, "KVT": 1.3}
    monkeypatch.setattr(gpu_times, "layer_steps", lambda part, B, N: {name: (lambda: dict) for name in times})
    monkeypatch.setattr(gpu_times, "as_graph", lambda step: dict)
    monkeypatch.setattr(gpu_times, "measure", lambda part, found: {name: times[name.split(",")[0]] for name in found})
    gpu_times.time_size(part, gpu_times.SIZES[0])
    found = {row["case"]: row for row in read_rows(part.rows)}
    assert found["N 197, KVT, eager"]["ms"] == found["N 197, KVT, graph"]["ms"] == 1.3
    ours, kvt = found["target: N 197, ConvNN attention / attention, graphs"], found["target: N 197, KVT / attention, graphs"]
    assert (ours["status"], ours["ratio"], ours["target"]) == ("met", 1.4, 1.5)
    assert (kvt["status"], kvt["ratio"], kvt["target"]) == ("missed", 1.3, 1.2)


def test_a_layer_that_fails_is_a_row_and_the_others_are_measured(part):
    found = {}
    gpu_times.attempt(part, "cuDNN", lambda: fail("No available kernel"), found)
    gpu_times.attempt(part, "Flash", lambda: dict, found)
    assert statuses(part) == {"cuDNN": "failed: No available kernel"} and found == {"Flash": dict}


def test_layers_of_every_kind_run_a_step(part):
    for make in (*gpu_times.layer_steps(part, 1, 12).values(), *gpu_times.convolution_steps(part, 1).values()):
        make()()


# --- tests ------------------------------------------------------------------------------------------------------------


def test_rows_of_tests(part, monkeypatch):
    monkeypatch.setenv(gpu_tests.ROWS, str(part.rows))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="AssertionError: 3 is not 4\nmore"))
    for name, when, outcome, text in (
        ("a", "setup", "passed", None),
        ("a", "call", "passed", None),
        ("b", "call", "failed", crash),
        ("c", "setup", "skipped", ("file", 3, "Skipped: no CUDA device")),
    ):
        states = {word: word == outcome for word in ("passed", "failed", "skipped")}
        gpu_tests.pytest_runtest_logreport(
            SimpleNamespace(nodeid=name, when=when, outcome=outcome, longrepr=text, duration=1.0, **states)
        )
    assert statuses(part) == {"a": "ok", "b": "failed: AssertionError: 3 is not 4", "c": "skipped: no CUDA device"}


def test_tests_that_outlast_their_time_are_ended(tmp_path, monkeypatch):
    part = Part("tests", tmp_path / "rows.jsonl", "cuda", deadline=0.0)
    monkeypatch.setattr(gpu_tests, "command", lambda words, processes: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(gpu_tests, "NEEDED", ("pytest",))
    gpu_tests.tests(part)
    assert set(statuses(part).values()) == {"skipped: the time of this part is up"}


def test_tests_are_skipped_by_what_is_missing(tmp_path, monkeypatch):
    part = Part("tests", tmp_path / "rows.jsonl", "cuda")
    monkeypatch.setattr(gpu_tests, "NEEDED", ("pytest", "not_there"))
    gpu_tests.tests(part)
    assert set(statuses(part).values()) == {"skipped: not_there not installed"}


def test_all_tests_that_need_a_gpu_are_run():
    folder = gpu_tests.ROOT / "tests"
    mark = "pytest.mark." + "gpu"
    marked = {str(path.relative_to(folder.parent)) for path in folder.rglob("*.py") if mark in path.read_text(encoding="utf-8")}
    assert marked <= {word for words, _ in gpu_tests.RUNS for word in words}


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """All parts in this process, and its environment as it was."""
    monkeypatch.setattr(first_contact, "run_in_processes", lambda work, part, shards: work(part))
    for name in ("NVIDIA_TF32_OVERRIDE", "CONVNN_KERNELS", "TRITON_INTERPRET", "OUT"):
        monkeypatch.setenv(name, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device")
def test_without_a_gpu_every_part_says_what_it_skips(tmp_path, here, capsys):
    parts = ["check", "tests", "epochs", "profile"]
    assert first_contact.main(["--parts", *parts, "--output", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert list(dict.fromkeys(row["part"] for row in rows)) == parts
    assert all(row["status"].startswith("skipped: ") for row in rows if row["case"] != "all of it")
    summary = (tmp_path / "summary.md").read_text()
    assert summary in capsys.readouterr().out and "no CUDA device" in summary


def test_a_failure_is_the_exit_status_and_stands_first(tmp_path, here, monkeypatch):
    monkeypatch.setitem(first_contact.WORK, "time", lambda part: part.run({"one": lambda: fail("bad"), "two": dict}))
    assert first_contact.main(["--parts", "time", "--output", str(tmp_path)]) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "time: 1 failed, 2 ok\n\n- time: one: failed: RuntimeError: bad\n\n| time" in summary
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["part"] == "time"


@pytest.mark.parametrize("line, said", [("--scale 0", "--scale 0.0: must be above 0"), ("--parts all", "invalid choice")])
def test_wrong_options(line, said, capsys):
    with pytest.raises(SystemExit):
        first_contact.parse(line.split())
    assert said in capsys.readouterr().err
