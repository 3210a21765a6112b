"""Selection on validation images: two stages, killed and resumed, and a ranking that test images would have turned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import run_experiments
from tests.helpers.sweeps import make_sweep, read_csv

ROOT = Path(run_experiments.__file__).parent
# Accuracies by layer and learning rate: validation, test. By test images ConvNN would win with 0.1 (62), by validation images
# Attention does (60 against 58).
TRUTH = {"Attention": {"0.1": (50, 61), "0.01": (70, 60)}, "ConvNN": {"0.1": (40, 62), "0.01": (60, 58)}}
PROGRAM = f"""
import json, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--output_dir"])
open("notes.txt", "a").write(str(folder) + "\\n")
while pathlib.Path("wait").exists() and len(open("notes.txt").readlines()) >= int(open("wait").read()):
    time.sleep(0.01)
val, test = {TRUTH!r}[options["--layer"]][options["--lr"]]
seed = int(options["--seed"])
row = {{"test_top1": test + seed / 10, "test_top5": 90.0, "val_top1": val, "val_loss": 1 / val}}
summary = {{"finished": True, "epochs": 1, "final": row, "best": row, "parameters": 1000, "flops_per_image": 2e6,
           "average_epoch_seconds": 1.5, "latency_ms_per_image": 3.0, "peak_memory_bytes": 4e6}}
(folder / "summary.json").write_text(json.dumps(summary))
(folder / "config.yaml").write_text("lr: " + options["--lr"])
"""
SWEEP = {
    "program": "vit_main.py",
    "options": {"dataset": "digits", "patch_size": 2, "num_epochs": 1, "d_model": 16, "num_heads": 2, "val_fraction": 0.1},
    "grid": {"layer": ["Attention", "ConvNN"]},
    "seed": [0, 1, 2],
    "select": {"lr": [0.1, 0.01]},
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    make_sweep(tmp_path, monkeypatch, PROGRAM, SWEEP)
    return tmp_path / "Output/sweeps/sweep"


def test_validation_images_choose_where_test_images_would_turn_the_ranking(sweep, capsys):
    assert run_experiments.main(["sweep.yaml", "--baseline", "Attention", "--jobs", "4"]) == 0
    rows = {row["layer"]: row for row in read_csv(sweep / "summary.csv")}
    assert [row["lr"] for row in rows.values()] == ["0.01", "0.01"]
    assert float(rows["Attention"]["top1"]) == pytest.approx(60.1) and float(rows["ConvNN"]["top1"]) == pytest.approx(58.1)
    assert float(rows["Attention"]["val_top1"]) == 70
    assert float(rows["ConvNN"]["difference"]) == pytest.approx(-2) and rows["ConvNN"]["told_apart"] == "yes"
    names = Path("notes.txt").read_text().split()
    assert len(names) == len(set(names)) == 4 + 6
    assert sum("select/" in name and name.endswith("seed-1000") for name in names) == 4
    table = (sweep / "summary.md").read_text()
    assert "| -2.00 [-2.00, -2.00] |" in table and "validation images" in table and "varies in this table" not in table
    assert "lr varies in this table" in (sweep / "select" / "summary.md").read_text()
    tex = (sweep / "summary.tex").read_text()
    assert "Attention & $60.10 \\pm 0.10$ &" in tex and "\\toprule" in tex
    assert (sweep / "ranking.png").stat().st_size > 5000
    capsys.readouterr()
    assert run_experiments.main(["sweep.yaml"]) == 0 and len(Path("notes.txt").read_text().split()) == 10  # nothing runs again


def test_by_loss_and_from_the_command_line(sweep, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump({name: value for name, value in SWEEP.items() if name != "select"}))
    assert run_experiments.main(["sweep.yaml", "--select", "lr=0.01,0.1", "--by", "val_loss", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "4 runs in Output/sweeps/sweep/select" in out and "6 runs in Output/sweeps/sweep\n" in out and "6 of the runs" in out
    assert run_experiments.main(["sweep.yaml", "--select", "lr=0.01,0.1", "--by", "val_loss", "--set", "seed=0"]) == 0
    assert [row["lr"] for row in read_csv(sweep / "summary.csv")] == ["0.01", "0.01"]


def test_killed_in_each_stage_and_resumed(sweep):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from experiments import points, runner"]
    command[-1] += f"; import pathlib; points.ROOT = runner.ROOT = pathlib.Path({os.getcwd()!r})"
    command[-1] += "; import run_experiments; sys.exit(run_experiments.main(['sweep.yaml', '--jobs', '1']))"
    for stop in (3, 7):  # within the first stage of 4 runs, and within the second
        Path("wait").write_text(str(stop))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not Path("notes.txt").exists() or len(Path("notes.txt").read_text().split()) < stop:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait()
    Path("wait").unlink()
    assert run_experiments.main(["sweep.yaml"]) == 0
    names = Path("notes.txt").read_text().split()
    assert len(names) == 10 + 2 and len(set(names)) == 10  # the run that was killed, twice
    assert [row["top1"] for row in read_csv(sweep / "summary.csv")] == ["60.1", "58.1"]


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, ["--by", "test_top1"], "--by"),
        ({"select": {"lr": [0.1], "by": "test_top1"}}, [], "nothing is chosen on test images"),
        ({"select": [0.1]}, [], "select is a mapping"),
        ({"select": {"lr": []}}, [], "lr has no values"),
        ({"select": {}}, ["--by", "val_loss"], "--by val_loss needs values to choose from"),
        ({"grid": {"layer": ["Attention"], "lr": [0.1, 0.2]}}, [], "lr varies in the sweep and is to be chosen"),
        ({"options": SWEEP["options"] | {"val_fraction": 0}}, [], "has no validation images to choose on; set val_fraction"),
        ({}, ["--select", "lr"], "--select 'lr' is not name=value"),
        ({}, ["--select", "learning_rate=1"], "learning_rate"),
        ({}, ["--baseline", "Conv1d"], "--baseline Conv1d is no row of this sweep; its layers are Attention, ConvNN"),
    ],
)
def test_mistakes_are_one_line(sweep, change, words, said, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP | change))
    with pytest.raises(SystemExit) as end:
        run_experiments.main(["sweep.yaml", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1 and not Path("notes.txt").exists()
    assert not (sweep / "select").exists()


def test_a_value_that_fails_is_not_chosen(sweep, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP | {"select": {"lr": [0.5, 0.1]}, "seed": 0}))  # 0.5: a KeyError
    assert run_experiments.main(["sweep.yaml"]) == 0
    assert [row["lr"] for row in read_csv(sweep / "summary.csv")] == ["0.1", "0.1"]
    note = json.loads((sweep / "Attention_seed-0" / "point.json").read_text())
    assert note["chosen"] == [["lr", 0.1]]
