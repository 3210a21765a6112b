"""Sweeps among damaged files, full disks and closed pipes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import run_experiments
from experiments import points as sweep_points
from experiments import report, runner
from experiments.points import find_config, name_points, read_sweep
from experiments.report import summarize, with_earlier
from runs import Stopped
from runs.files import write_atomically
from runs.lock import release
from tests import test_run_experiments
from tests.helpers.sweeps import read_csv
from tests.test_run_experiments import ROOT, SWEEP, in_own_process, notes

FOLDER = Path("Output/sweeps/sweep")
sweep = test_run_experiments.sweep


@pytest.fixture(autouse=True)
def warnings_come_again():
    report.warn_once.cache_clear()


def refused(*argv, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run_experiments.main(list(argv))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "Traceback" not in line
    return line


# --- what other sweeps left in the folder -----------------------------------------------------------------------------


def test_a_sweep_whose_config_file_has_gone_keeps_its_rows(sweep, capsys):
    """Its points cannot be resolved any more; what their runs wrote down says whether they have ended."""
    Path("base.yaml").write_text("num_epochs: 2\n")
    options = {name: value for name, value in SWEEP["options"].items() if name != "num_epochs"} | {"config": "base.yaml"}
    Path("old.yaml").write_text(yaml.safe_dump(SWEEP | {"options": options, "grid": {"layer": "ConvNN", "num_epochs": 2}}))
    assert run_experiments.main(["old.yaml", "--output_dir", "all"]) == 0
    for seed in (0, 1):
        values = {"num_epochs": 2 + seed, "early_stopping": 0}  # the second as if it had been meant to be longer
        Path(f"all/ConvNN_num_epochs-2_seed-{seed}/config.yaml").write_text(yaml.safe_dump(values))
    Path("base.yaml").unlink()
    assert run_experiments.main(["sweep.yaml", "--output_dir", "all", "--set", "layer=Attention"]) == 0
    rows = [(row["layer"], row["num_epochs"], row["runs"], row["of"]) for row in read_csv("all/summary.csv")]
    assert rows == [("Attention", "", "2", "2"), ("ConvNN", "2", "1", "2")]
    Path("all/ConvNN_num_epochs-2_seed-0/config.yaml").unlink()
    assert run_experiments.main(["sweep.yaml", "--output_dir", "all", "--set", "layer=Attention"]) == 0
    assert [row["runs"] for row in read_csv("all/summary.csv")] == ["2", "0"]


NOTES = (  # damaged in as many ways
    "",
    '{"name": "old"',
    "[1, 2]",
    "3",
    '{"name": "old"}',
    '{"name": "x", "program": "p", "values": {}, "varying": {}}',
    '{"name": "old", "program": "p", "values": 3, "varying": {}}',
    "\ud800",
)


@pytest.mark.parametrize("text", NOTES)
def test_a_damaged_note_of_a_point_is_a_warning(text, sweep, capsys):
    (FOLDER / "old").mkdir(parents=True)
    points = name_points(*read_sweep("sweep.yaml", []))
    (FOLDER / "old" / "point.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for _ in range(2):  # every summary meets it, one says so
        assert with_earlier(points, FOLDER) == points
    assert capsys.readouterr().err.count("warning: Output/sweeps/sweep/old/point.json is not the note of a point") == 1
    note = {"name": "old", "program": "vit_main.py", "values": {"layer": "GPSA"}, "varying": {"layer": "GPSA"}}
    (FOLDER / "old" / "point.json").write_text(json.dumps(note))
    assert [point.name for point in with_earlier(points, FOLDER)][4:] == ["old"]


def test_the_note_of_a_point_is_whole_or_not_there(sweep, monkeypatch):
    written = []
    real = write_atomically
    monkeypatch.setattr(runner, "write_atomically", lambda path, data: (written.append(path.name), real(path, data))[1])
    assert run_experiments.main(["sweep.yaml", "--set", "seed=0", "--set", "layer=ConvNN"]) == 0
    assert written.count("point.json") == 1
    assert json.loads((FOLDER / "ConvNN_seed-0" / "point.json").read_text())["varying"] == {"layer": "ConvNN", "seed": 0}


def test_a_run_with_an_odd_summary_has_not_ended(sweep):
    assert run_experiments.main(["sweep.yaml"]) == 0
    path, points = FOLDER / "ConvNN_seed-1" / "summary.json", name_points(*read_sweep("sweep.yaml", []))
    text = path.read_text()
    whole = json.loads(text)
    odd = [
        whole | {"final": {"test_top1": "62", "test_top5": 90.0}},
        whole | {"final": [62.0]},
        whole | {"finished": "yes"},
        whole | {"epochs": None},
        whole | {"parameters": float("inf")},
        {"finished": True},
        *([], 3, {}, None),
    ]
    for content in [text[:-9], "", "\0", *map(json.dumps, odd)]:
        path.write_text(content)
        assert [row["runs"] for row in summarize(points, FOLDER)] == [2, 1], content
    assert run_experiments.main(["sweep.yaml"]) == 0  # which runs it again, and nothing else
    assert [note[1] for note in notes() if note[0] == "start"][4:] == ["ConvNN_seed-1"]
    assert [row["runs"] for row in summarize(points, FOLDER)] == [2, 2]


# --- places that cannot be written to ---------------------------------------------------------------------------------


def full(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_summary_that_cannot_be_written_does_not_end_the_runs(sweep, monkeypatch, capsys):
    real = os.fsync

    def fsync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        full() if "summary" in name else real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run_experiments.main(["sweep.yaml"]) == 1
    out, err = capsys.readouterr()
    assert sum(what == "end" for what, *_ in notes()) == 4 and "failed" not in out
    assert "warning: Output/sweeps/sweep/summary.csv cannot be written (No space left on device)" in err
    assert "Traceback" not in err and not (FOLDER / "summary.csv").exists()


def test_a_point_that_cannot_be_started_fails_alone(sweep, monkeypatch, capsys):
    real = runner.lock

    def lock(folder):
        if folder.name == "ConvNN_seed-0":
            full()
        return real(folder)

    monkeypatch.setattr(runner, "lock", lock)
    assert run_experiments.main(["sweep.yaml"]) == 1
    out, err = capsys.readouterr()
    assert "ConvNN_seed-0 failed: cannot be started: [Errno 28] No space left on device" in out
    assert err.strip().endswith("1 of 4 failed: ConvNN_seed-0") and "Traceback" not in err
    assert sum(what == "end" for what, *_ in notes()) == 3


def test_a_point_that_another_process_runs_is_waited_for_and_named_once(sweep, monkeypatch, capsys):
    """As after a kill of another sweep, whose run goes on."""
    folder, sleeps, real = FOLDER / "Attention_seed-0", [], runner.time.sleep
    descriptor = runner.lock(folder)

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            release(folder, descriptor)
        real(seconds)

    monkeypatch.setattr(runner.time, "sleep", sleep)
    assert run_experiments.main(["sweep.yaml"]) == 0
    line = f"Attention_seed-0: waiting for another process that runs it (see {folder / 'log.txt'})"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert sum(what == "end" for what, *_ in notes()) == 4


def test_a_note_that_cannot_be_written_gives_its_lock_back(sweep, monkeypatch, capsys):
    real = write_atomically

    def write(path, data):
        if path.name == "point.json":
            raise Stopped(f"{path} cannot be written (No space left on device)")
        real(path, data)

    monkeypatch.setattr(runner, "write_atomically", write)
    assert run_experiments.main(["sweep.yaml"]) == 1
    assert "4 of 4 failed" in capsys.readouterr().err and not notes()
    descriptor = runner.lock(FOLDER / "ConvNN_seed-0")
    assert descriptor is not None
    os.close(descriptor)


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_runs(sweep, monkeypatch, capsys):
    def mkdtemp(*_args, dir=None, **_more):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))  # by hand, as root may write everywhere

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
    assert "cannot be written to (Permission denied)" in refused("sweep.yaml", capsys=capsys)
    assert not notes()
    line = refused("sweep.yaml", "--output_dir", "sweep.yaml/a", capsys=capsys)
    assert "output_dir='sweep.yaml/a/Attention_seed-0': a part of it is a file, not a folder" in line


def test_the_folder_of_a_point_that_is_a_file(sweep, capsys):
    FOLDER.mkdir(parents=True)
    (FOLDER / "ConvNN_seed-0").write_text("")
    line = refused("sweep.yaml", capsys=capsys)
    assert "ConvNN_seed-0: Output/sweeps/sweep/ConvNN_seed-0 is a file, not a folder; remove it" in line


# --- failures in the summary, advice ----------------------------------------------------------------------------------


def test_failed_points_are_told_apart_from_those_that_have_not_run(sweep, capsys):
    change = ["--set", "lr=0.1,0.5", "--set", "layer=ConvNN", "--set", "seed=0"]
    assert run_experiments.main(["sweep.yaml", *change]) == 1
    rows = read_csv(FOLDER / "summary.csv")
    assert [(row["lr"], row["runs"], row["of"], row["failed"]) for row in rows] == [
        ("0.1", "1", "1", "0"),
        ("0.5", "0", "1", "1"),
    ]
    text = (FOLDER / "summary.md").read_text()
    assert "| ConvNN | 0.5 | 0 | 1 | 1 |" in text
    assert "- ConvNN_lr-0.5_seed-0: vit_main.py: error: lr is too high (see" in text
    points = name_points(*read_sweep("sweep.yaml", [*change[1:4:2], "seed=0,1"]))
    assert [row["failed"] for row in summarize(points, FOLDER)] == [0, 1]  # seed 1 has not run: no failure
    # Runs that have ended since have not failed, and without failures there is no such column.
    program = sweep / "vit_main.py"
    program.write_text(program.read_text().replace('== "0.5"', '== "no"'))
    (FOLDER / "ConvNN_lr-0.1_seed-0" / "failure.txt").write_text("before it ended, elsewhere")
    assert run_experiments.main(["sweep.yaml", *change]) == 0
    assert "failed" not in read_csv(FOLDER / "summary.csv")[0] and "Failed" not in (FOLDER / "summary.md").read_text()


def test_the_advice_to_leave_out_resume_is_put_as_a_sweep_can_follow_it(sweep, capsys):
    program = sweep / "vit_main.py"
    program.write_text(program.read_text().replace("lr is too high", "there is nothing to resume from, leave --resume out"))
    assert run_experiments.main(["sweep.yaml", "--set", "lr=0.5", "--set", "layer=ConvNN", "--set", "seed=0"]) == 1
    folder = FOLDER / "ConvNN_lr-0.5_seed-0"
    assert f"leave --resume out; to start it anew, remove {folder} (see {folder}/log.txt)" in capsys.readouterr().out


# --- where `config:` is found -----------------------------------------------------------------------------------------


def test_config_is_found_from_here_beside_the_sweep_or_among_the_programs(sweep, monkeypatch):
    values = SWEEP | {"options": {"config": "base.yaml"}}
    (sweep / "sub").mkdir()
    (sweep / "sub" / "sweep.yaml").write_text(yaml.safe_dump(values))
    (sweep / "elsewhere").mkdir()
    monkeypatch.chdir(sweep / "elsewhere")
    monkeypatch.setattr(sweep_points, "ROOT", sweep / "root")

    def config(path="../sub/sweep.yaml"):
        points = find_config(name_points(*read_sweep(path, [])), path)
        assert {point.name for point in points} == {
            f"{layer}_seed-{seed}" for layer in ("Attention", "ConvNN") for seed in (0, 1)
        }
        return points[0].values["config"]

    assert config() == "base.yaml"  # nowhere: the program will say so
    for folder, expected in (
        (sweep / "root", str(sweep / "root" / "base.yaml")),
        (sweep / "sub", "../sub/base.yaml"),
        (sweep / "elsewhere", "base.yaml"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "base.yaml").write_text("")
        assert config() == expected


def test_a_shipped_sweep_starts_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = str(ROOT / "configs" / "sweeps" / "k_test.yaml")
    assert run_experiments.main([sweep, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "24 runs in Output/sweeps/k_test" in out and str(ROOT / "configs" / "vit_cifar_small.yaml") in out


# --- a reader that goes away ------------------------------------------------------------------------------------------


def test_nobody_reads_the_output_any_more(sweep):
    """`| head -1`: the points go on, and end as they would."""
    process = in_own_process(sweep)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err
    assert sum(what == "end" for what, *_ in notes()) == 4 and (FOLDER / "summary.md").exists()


def test_a_dry_run_through_head(sweep):
    command = f"{sys.executable} {ROOT / 'run_experiments.py'} sweep.yaml --dry_run --set seed={','.join(map(str, range(300)))}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True, cwd=sweep)
    assert done.stdout.count("\n") == 1 and done.stderr == "" and done.returncode == 0
