import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import run_experiments
from experiments import runner
from experiments.points import check_points, leave_out_unread, name_points, read_sweep, resolved
from experiments.report import summarize, write_summary
from experiments.runner import ClusterRun, lock
from options.data import TASKS
from options.layers import LAYERS1D_NAMES
from tests.helpers.forked import Forked
from tests.helpers.sweeps import make_sweep, read_csv

ROOT = Path(run_experiments.__file__).parent

# Stands in for vit_main.py: it notes when it starts and ends, waits for others or stays in an epoch if told, fails on demand,
# and goes on where it was.
PROGRAM = """
import json, os, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--output_dir"])
notes = folder.parent / "notes.txt"
note = lambda what: open(notes, "a").write(f"{what} {folder.name}\\n")
note("start")
while notes.read_text().count("start ") < int(os.environ.get("TOGETHER", "1")):  # as many must have started
    time.sleep(0.01)
open(folder / "environment.json", "w").write(json.dumps(dict(os.environ)))
begun = folder / "last.pt"
for epoch in range(int(begun.read_text()) if begun.exists() else 0, int(options["--num_epochs"])):
    if str(epoch) == os.environ.get("STAY"):
        time.sleep(3600)
    begun.write_text(str(epoch + 1))
    note(f"epoch-{epoch}")
if options.get("--lr") == "0.5":
    print("something")
    sys.exit("vit_main.py: error: lr is too high")
seed, layer = int(options["--seed"]), options["--layer"]
top1 = {"Attention": 50, "ConvNN": 60}[layer] + 2 * seed
row = {"test_top1": top1, "test_top5": 90.0}
summary = {"finished": True, "epochs": int(options["--num_epochs"]), "final": row, "best": row, "parameters": 1000,
           "flops_per_image": 2e6, "average_epoch_seconds": 1.5, "latency_ms_per_image": 3.0, "peak_memory_bytes": 4e6}
(folder / "summary.json").write_text(json.dumps(summary))
note("end")
"""
SWEEP = {
    "program": "vit_main.py",
    "options": {"dataset": "digits", "resize": 8, "patch_size": 2, "num_epochs": 2, "d_model": 16, "num_heads": 2},
    "grid": {"layer": ["Attention", "ConvNN"]},
    "seed": [0, 1],
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep file, with a program that takes no time."""
    make_sweep(tmp_path, monkeypatch, PROGRAM, SWEEP)
    return tmp_path


def notes(folder="Output/sweeps/sweep"):
    """(what, point) in order."""
    path = Path(folder) / "notes.txt"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def points_of(text, *changes):
    Path("other.yaml").write_text(text)
    return name_points(*read_sweep("other.yaml", list(changes)))


# --- points ---------------------------------------------------------------------------------------------------------


def test_lists_multiply_out_and_names_say_what_varies(sweep):
    points = name_points(*read_sweep("sweep.yaml", []))
    assert [point.name for point in points] == ["Attention_seed-0", "Attention_seed-1", "ConvNN_seed-0", "ConvNN_seed-1"]
    assert points[3].values == SWEEP["options"] | {"layer": "ConvNN", "seed": 1}
    assert points[3].varying == {"layer": "ConvNN", "seed": 1}
    assert points[0].argv(Path("f"))[-3:] == ["--output_dir", "f/Attention_seed-0", "--resume"]


def test_hand_picked_combinations_and_values_that_are_lists(sweep):
    points = points_of(
        "program: vit_main.py\noptions: {num_heads: 2}\n"
        "grid:\n- {layer: Hybrid, hybrid_dilations: [[1], [1, 2]]}\n- {layer: ConvNN, K: [3, 5], branch_ratio: 0.25}"
    )
    assert [point.name for point in points] == [
        "Hybrid_hybrid_dilations-1",
        "Hybrid_hybrid_dilations-1x2",
        "ConvNN_K-3_branch_ratio-0.25",
        "ConvNN_K-5_branch_ratio-0.25",
    ]
    words = points[1].argv(Path("f"))
    assert words[words.index("--hybrid_dilations") :][:3] == ["--hybrid_dilations", "1", "2"]
    check_points(points, Path("f"))


def test_set_replaces_options_and_axes(sweep):
    points = name_points(
        *read_sweep("sweep.yaml", ["layer=ConvNN", "K=3,4", "num_epochs=7", "seed=5", "hybrid_dilations=[1,2]"])
    )
    rest = "num_epochs-7_hybrid_dilations-1x2_seed-5"
    assert [point.name for point in points] == [f"ConvNN_K-3_{rest}", f"ConvNN_K-4_{rest}"]
    assert points[0].values == SWEEP["options"] | {
        "num_epochs": 7,
        "layer": "ConvNN",
        "K": 3,
        "seed": 5,
        "hybrid_dilations": [1, 2],
    }


def test_the_sweeps_that_are_shipped(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    sizes = {}
    (tmp_path / "last.pt").touch()
    changes = {
        "abilities": ["seed=0"],
        "kvt_without_training": [f"checkpoint={tmp_path / 'last.pt'}"],
    }  # which the one it names is not yet
    for path in sorted(Path("configs/sweeps").glob("*.yaml")):
        points = name_points(*read_sweep(str(path), changes.get(path.stem, [])))
        check_points(points, Path("Output/nowhere"))
        sizes[path.stem] = len(points)
        assert f"python run_experiments.py {path}" in path.read_text()
    several = {"fashion_mnist": 62, "mixers": 32, "k_test": 24, "local_masks": 51, "kvt_without_training": 7, "topk": 18}
    assert sizes == several | {"abilities": len(TASKS) * len(LAYERS1D_NAMES)}


def test_a_sweep_of_several_programs(monkeypatch):
    """A mapping of the grid may name its program, one of another library too, and options that are not axes."""
    monkeypatch.chdir(ROOT)
    points = name_points(*read_sweep("configs/sweeps/fashion_mnist.yaml", ["seed=3", "lr=0.5"]))
    found = {point.name: (point.program, point.values["lr"], point.values.get("config")) for point in points}
    assert len(points) == 31
    small = "configs/vit_cifar_small.yaml"
    assert found["ViT_Attention_lr-0.5_seed-3"] == ("vit_main.py", 0.5, small)
    assert found["Peers_timm_lr-0.5_seed-3"] == ("examples/compare_with_timm.py", 0.5, small)
    assert found["AllConvNet_Conv2d-ConvNN_lr-0.5_seed-3"] == ("allconvnet_main.py", 0.5, None)


@pytest.mark.parametrize(
    ("options", "grid", "names"),
    [
        ("", "{layer: [Attention, KvtAttention], K: [3, 4]}", "Attention KvtAttention_K-3 KvtAttention_K-4"),
        ("", "[{layer: Attention}, {layer: Attention, K: 3}]", "Attention"),
        ("", "{K: [3, 4], layer: [Attention]}", "Attention"),
        ("layer: Attention", "{K: [3, 4], lr: [0.1, 0.2]}", "lr-0.1 lr-0.2"),
        ("layer: ConvNN", "{K: [3, 4], kernel_size: [3, 5]}", "K-3 K-4"),
        ("num_local_layers: 0", "{layer: [ConvNN, KvtAttention], K: [3, 4]}", "ConvNN KvtAttention"),
        ("layer: ConvNN", "{sampling_type: [all, random], num_samples: [9, 10]}",
         "sampling_type-all sampling_type-random_num_samples-9 sampling_type-random_num_samples-10"),
        ("layer: ConvNN", "{similarity_type: [Col, Loc_Col], lambda_param: [0.3, 0.5]}",
         "similarity_type-Col similarity_type-Loc-Col_lambda_param-0.3 similarity_type-Loc-Col_lambda_param-0.5"),
        ("layer: BranchConv", "{branch_ratio: [0, 0.5], K: [3, 4]}",
         "branch_ratio-0 branch_ratio-0.5_K-3 branch_ratio-0.5_K-4"),
    ],
)  # fmt: skip
def test_an_axis_that_a_layer_does_not_read_multiplies_no_runs(options, grid, names, sweep):
    text = "program: vit_main.py\noptions: {resize: 8, patch_size: 2, num_heads: 2, dataset: digits, %s}\ngrid: %s\n"
    every = points_of(text % (options, grid))
    points, line = leave_out_unread(every)
    assert [point.name for point in points] == names.split()
    assert line.endswith(f" left out there, {len(every)} combinations are {len(points)} runs") and "\n" not in line
    check_points(points, Path("f"))
    for point in every:  # each combination alone, as in a part of the sweep
        (alone,), _ = leave_out_unread([point])
        assert alone in points


def test_an_axis_that_a_layer_does_not_read_is_said_and_empty_in_the_summary(sweep, capsys):
    text = yaml.safe_dump(SWEEP | {"program": "vit_main.py", "grid": {"layer": ["Attention", "ConvNN"], "K": [3, 4]}})
    Path("other.yaml").write_text(text)
    assert run_experiments.main(["other.yaml"]) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.split(": ", 1)[1] == ("warning: K is not read under layer=Attention; left out there, 8 combinations are 6 runs")
    rows = [(row["layer"], row["K"], row["runs"]) for row in read_csv("Output/sweeps/other/summary.csv")]
    assert rows == [("Attention", "", "2"), ("ConvNN", "3", "2"), ("ConvNN", "4", "2")]
    assert Path("Output/sweeps/other/top1_by_K.png").exists()
    ended = len(notes("Output/sweeps/other"))
    assert run_experiments.main(["other.yaml", "--set", "K=4"]) == 0  # a part: nothing is run again
    assert len(notes("Output/sweeps/other")) == ended


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("program: main.py", "give allconvnet_main.py, vit_main.py or a Python file that has a PROGRAM"),
        ("program: mine.py", "program mine.py has no PROGRAM"),
        ("program: vit_main.py\ngrid: [{options: 3, K: 4}]", "options is a mapping"),
        ("programs: vit_main.py", "unknown key 'programs'; did you mean program?"),
        ("program: vit_main.py\ngrid: [1]", "grid a mapping or a list of mappings"),
        ("program: vit_main.py\ngrid: {K: []}", "K has no values"),
        ("program: vit_main.py\nseed: []", "seed has no values"),
        ("program: [vit_main.py]", "give allconvnet_main.py, vit_main.py or a Python file"),
        ("program: vit_main.py\noptions: {3: 4}", "3=4 is not an option with a number or a text"),
        ("program: vit_main.py\ngrid: {lr: [2020-01-01, 0.1]}", "lr=2020-01-01 is not an option with a number or a text"),
        ("program: vit_main.py\ngrid: [{layer: Attention}, {layer: Attention, dropout: 0.1}]", "are the same run"),
        ("program: vit_main.py\ngrid: {layer: [Attention, Atention]}", "Atention: layer='Atention'; did you mean Attention?"),
        ("program: vit_main.py\ngrid: {layer: [KvtAttention], K: [9, 999]}", "K-999: K=999"),
        ("program: vit_main.py\ngrid: {kk: [9, 999]}", "unknown option --kk"),
        ("program: vit_main.py\noptions: {output_dir: a}", "output_dir cannot be set in a sweep"),
        ("program: vit_main.py\ngrid: {data_path: [a/b, a+b]}", "two points would be named data_path-a-b"),
        ("- a\n- b", "must be a mapping, one `name: value` per line"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(text, says, sweep, capsys):
    Path("other.yaml").write_text(text)
    Path("mine.py").write_text("")
    with pytest.raises(SystemExit) as end:
        run_experiments.main(["other.yaml"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and all(part in line for part in says.split("; "))
    assert not Path("Output").exists()


@pytest.mark.parametrize(
    "line",
    [
        "nowhere.yaml",
        "sweep.yaml --jobs 0",
        "sweep.yaml --jobs 1_0",
        "sweep.yaml --output_dir=",
        "sweep.yaml --set help=1",
        "sweep.yaml --set K=1:30",
        "sweep.yaml --set K=*a",
        "sweep.yaml --set K",
        "sweep.yaml --set K=",
        "sweep.yaml --slurm a",
        "sweep.yaml --gpus 2 --gpus_per_run 4",
        "sweep.yaml --gpus_per_run 2",
        "sweep.yaml --slurm a=[",
        "sweep.yaml --gpus 99",
    ],
)
def test_bad_command_lines(line, sweep, capsys):
    with pytest.raises(SystemExit) as end:
        run_experiments.main(line.split())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("Output").exists()


# --- running --------------------------------------------------------------------------------------------------------


def test_all_points_run_once_and_are_summarized(sweep, capsys):
    assert run_experiments.main(["sweep.yaml", "--jobs", "2"]) == 0
    assert sorted(name for what, name in notes() if what == "start") == [
        "Attention_seed-0",
        "Attention_seed-1",
        "ConvNN_seed-0",
        "ConvNN_seed-1",
    ]
    folder = Path("Output/sweeps/sweep")
    rows = read_csv(folder / "summary.csv")
    assert [(row["layer"], row["runs"], row["of"]) for row in rows] == [("Attention", "2", "2"), ("ConvNN", "2", "2")]
    assert [float(row["top1"]) for row in rows] == [51, 61] and float(rows[0]["top1_std"]) == pytest.approx(2**0.5)
    assert rows[0]["mflops_per_image"] == "2.0" and rows[0]["peak_memory_mb"] == "4.0"
    assert "| ConvNN | 2 | 2 | 61 ± 1.4 |" in (folder / "summary.md").read_text()
    with Image.open(folder / "tradeoff.png") as picture:
        assert picture.size[0] > 800
    assert "ConvNN_seed-1: test top-1 62.00 %" in capsys.readouterr().out
    assert run_experiments.main(["sweep.yaml"]) == 0  # there is nothing left to do
    assert len(notes()) == 4 * 4
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP | {"options": SWEEP["options"] | {"num_epochs": 3}}))
    assert run_experiments.main(["sweep.yaml"]) == 0  # one more epoch each
    assert [what for what, *_ in notes()[16:]].count("epoch-2") == 4 and "epoch-1" not in [what for what, *_ in notes()[16:]]


def test_a_failed_run_does_not_stop_the_rest(sweep, capsys):
    assert run_experiments.main(["sweep.yaml", "--set", "lr=0.1,0.5", "--set", "layer=ConvNN", "--set", "seed=0"]) == 1
    out, err = capsys.readouterr()
    name = "ConvNN_lr-0.5_seed-0"
    assert f"{name} failed: vit_main.py: error: lr is too high (see Output/sweeps/sweep/{name}/log.txt)" in out
    assert err.strip().endswith(f"1 of 2 failed: {name}")
    rows = read_csv("Output/sweeps/sweep/summary.csv")
    assert [(row["lr"], row["runs"], row["top1"]) for row in rows] == [("0.1", "1", "60.0"), ("0.5", "0", "")]
    assert Path("Output/sweeps/sweep/tradeoff.png").exists() and not Path("Output/sweeps/sweep/top1_by_lr.png").exists()


def test_slots(sweep, monkeypatch):
    monkeypatch.setenv("TOGETHER", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert run_experiments.main(["sweep.yaml", "--gpus", "2"]) == 0
    folder = Path("Output/sweeps/sweep")
    used = [json.loads(path.read_text()) for path in folder.glob("*/environment.json")]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in used} == {"4", "7"} and len(used) == 4
    running, most = 0, 0
    for what, _ in notes():
        running += {"start": 1, "end": -1}.get(what, 0)
        most = max(most, running)
    assert most == 2
    monkeypatch.setattr(runner, "cores", lambda: 6)
    assert run_experiments.main(["sweep.yaml", "--jobs", "3", "--set", "num_epochs=1", "--output_dir", "b"]) == 0
    used = [json.loads(path.read_text()) for path in Path("b").glob("*/environment.json")]
    assert {one["OMP_NUM_THREADS"] for one in used} == {"2"} and {one["CUDA_VISIBLE_DEVICES"] for one in used} == {"4,7"}


def test_a_run_on_several_gpus_is_started_by_torchrun(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,4,5,9")
    commands = []

    class Process:
        returncode = 3

        def __init__(self, command, env, **more):
            commands.append((command, env["CUDA_VISIBLE_DEVICES"]))

        def poll(self):
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert run_experiments.main(["sweep.yaml", "--gpus", "5", "--gpus_per_run", "2"]) == 1
    assert {gpus for _, gpus in commands} == {"3,1", "4,5"} and len(commands) == 4
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(sweep / "vit_main.py")]
    assert all(command[:6] == launcher for command, _ in commands)


def in_own_process(folder, *more, **environment):
    """With the program of the fixture `sweep`."""
    code = (
        "import sys, experiments.points, run_experiments; from pathlib import Path; experiments.points.ROOT = Path.cwd(); "
        "sys.exit(run_experiments.run_program(run_experiments.main))"
    )
    return Forked(["-c", code, "sweep.yaml", *more], cwd=folder, env=os.environ | environment)


def wait_for(condition, seconds=1800):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_started_again_it_goes_on(sweep, number):
    first = in_own_process(sweep, "--jobs", "2", STAY="1")
    wait_for(lambda: any(what == "epoch-0" for what, *_ in notes()))
    first.send_signal(number)
    assert first.wait(1800) == 128 + number
    begun = notes()
    assert not any(what == "end" for what, *_ in begun)
    assert run_experiments.main(["sweep.yaml"]) == 0
    rest = notes()[len(begun) :]
    epochs = [(what, name) for what, name in begun + rest if what.startswith("epoch")]
    assert len(epochs) == len(set(epochs)) == 8  # no epoch was trained twice


def test_killed_its_runs_are_not_started_twice(sweep):
    """SIGKILL leaves the processes of the runs; their folders stay locked until they end."""
    first = in_own_process(sweep, "--jobs", "2", TOGETHER="4")
    wait_for(lambda: sum(what == "start" for what, *_ in notes()) == 2)
    first.kill()
    first.wait()
    assert run_experiments.main(["sweep.yaml", "--jobs", "2"]) == 0
    starts = [name for what, name in notes() if what == "start"]
    assert len(starts) == len(set(starts)) == 4
    wait_for(lambda: sum(what == "end" for what, *_ in notes()) == 4)


def test_two_runners_share_the_points(sweep):
    runners = [in_own_process(sweep, TOGETHER="2") for _ in range(2)]
    outputs = [runner.communicate(timeout=1800)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0]
    starts = [name for what, name in notes() if what == "start"]
    assert sorted(starts) == sorted(set(starts)) and len(starts) == 4
    assert all("| ConvNN | 2 | 2 | 61 ± 1.4 |" in output for output in outputs)  # both wait for what the other runs


def test_what_another_process_finishes_before_we_lock_it_is_not_run_again(sweep, monkeypatch):
    real = runner.lock

    def late(folder):
        descriptor = real(folder)
        summary = {"finished": True, "epochs": 2, "final": {"test_top1": 1.0, "test_top5": 2.0}, "best": {"test_top1": 1.0}}
        costs = {"parameters": 1, "flops_per_image": 1, "average_epoch_seconds": 1, "latency_ms_per_image": 1}
        (folder / "summary.json").write_text(json.dumps(summary | costs | {"peak_memory_bytes": 1}))
        return descriptor

    monkeypatch.setattr(runner, "lock", late)
    assert run_experiments.main(["sweep.yaml"]) == 0
    assert not notes()


def test_a_lock_is_held_once(tmp_path):
    first = lock(tmp_path / "run")
    assert first is not None and lock(tmp_path / "run") is None
    os.close(first)
    second = lock(tmp_path / "run")
    assert second is not None
    os.close(second)


def test_a_folder_with_other_options_is_refused(sweep):
    folder = Path("Output/sweeps/sweep/Attention_seed-0")
    folder.mkdir(parents=True)
    points = name_points(*read_sweep("sweep.yaml", []))
    (folder / "config.yaml").write_text(yaml.safe_dump({"layer": "Attention", "num_epochs": 1, "lr": 0.3}))
    with pytest.raises(ValueError, match=r"holds a run with lr=0\.3, not 0\.0001; remove it"):
        check_points(points, Path("Output/sweeps/sweep"))


@pytest.mark.parametrize(
    ("before", "now", "is_allowed"),
    [
        ({"num_epochs": 1}, {}, True),
        ({"num_epochs": 3}, {}, False),  # its numbers would be those of more epochs
        ({"num_epochs": 1}, {"scheduler": "cosine"}, False),  # its learning rate was another
        ({"num_epochs": 1, "early_stopping": 2}, {"early_stopping": 2}, False),
        ({"early_stopping": 2}, {}, False),
        ({"num_workers": 99}, {}, True),
    ],
)
def test_only_runs_without_a_schedule_may_become_longer(before, now, is_allowed, sweep):
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP | {"options": SWEEP["options"] | now}))
    points = name_points(*read_sweep("sweep.yaml", []))
    folder = Path("out") / points[0].name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved(points[0], Path("out")) | before))
    if is_allowed:
        check_points(points, Path("out"))
    else:
        with pytest.raises(
            ValueError, match=f"holds a run with {[*before][-1] if 'early_stopping' in before and not now else 'num_epochs'}="
        ):
            check_points(points, Path("out"))


def test_a_part_of_a_sweep_has_its_names_and_keeps_its_summary(sweep):
    assert run_experiments.main(["sweep.yaml"]) == 0
    assert run_experiments.main(["sweep.yaml", "--set", "layer=Attention"]) == 0
    assert run_experiments.main(["sweep.yaml", "--set", "K=4", "--set", "layer=ConvNN"]) == 0
    starts = [name for what, name in notes() if what == "start"]
    assert len(starts) == 6 and starts[4:] == ["ConvNN_K-4_seed-0", "ConvNN_K-4_seed-1"]
    rows = read_csv("Output/sweeps/sweep/summary.csv")
    assert {(row["layer"], row["K"], row["runs"]) for row in rows} == {
        ("ConvNN", "4", "2"),
        ("Attention", "", "2"),
        ("ConvNN", "", "2"),
    }


def test_numbers_that_yaml_reads_as_texts_are_numbers_in_the_summary(sweep):
    assert run_experiments.main(["sweep.yaml", "--set", "lr=1e-3,2e-3", "--set", "layer=ConvNN"]) == 0
    assert {row["lr"] for row in read_csv("Output/sweeps/sweep/summary.csv")} == {"0.001", "0.002"}
    assert Path("Output/sweeps/sweep/top1_by_lr.png").exists()


def test_dry_run_prints_the_points_and_starts_none(sweep, capsys):
    folder = Path("Output/sweeps/sweep")
    (folder / "ConvNN_seed-1").mkdir(parents=True)
    (folder / "ConvNN_seed-1" / "last.pt").touch()
    assert run_experiments.main(["sweep.yaml", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"4 runs in {folder}" and lines[3].split()[:3] == ["ConvNN_seed-1", "begun", "vit_main.py"]
    assert "--layer Attention --seed 0" in lines[0] and not notes()


# --- cluster, summary -----------------------------------------------------------------------------------------------


def test_submitted_runs(tmp_path):
    """Run a sweep with --slurm as a user does, except that submitit runs the jobs here."""
    pytest.importorskip("submitit")
    options = {"dataset": "digits", "layer": "Conv2d", "channels": [2], "train_limit": 20, "test_limit": 10, "num_epochs": 1}
    sweep = {"program": "allconvnet_main.py", "options": options, "seed": 3}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code = (
        "import sys, runpy, submitit; real = submitit.AutoExecutor; "
        "submitit.AutoExecutor = lambda folder, cluster: real(folder=folder, cluster={'slurm': 'local'}[cluster]); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    program = str(ROOT / "run_experiments.py")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{program!r}, *sys.argv[1:]]; {code}"
    command = ["-c", code, "sweep.yaml", "--slurm", "timeout_min=5", "slurm_array_parallelism=2"]
    process = Forked(command, cwd=tmp_path)
    out, error = process.communicate()
    assert process.returncode == 0 and "submitted 1 jobs" in out, error
    folder = tmp_path / "Output/sweeps/sweep"

    def ended():
        return (folder / "summary.csv").exists() and [row["runs"] for row in read_csv(folder / "summary.csv")] == ["1"]

    wait_for(ended)
    assert (folder / "seed-3" / "summary.json").exists()


def test_a_job_that_is_requeued_is_submitted_as_it_was(sweep):
    pytest.importorskip("submitit")
    run, points = ClusterRun(), name_points(*read_sweep("sweep.yaml", []))
    run.process = subprocess.Popen(["sleep", "3600"])
    again = run.checkpoint(points[0], points, sweep / "out", 1)
    assert run.process.wait(timeout=1800) in (0, -signal.SIGTERM)  # 0: it is known only that it has ended
    assert type(again.function) is ClusterRun and again.args == (points[0], points, sweep / "out", 1)
    assert again.result() == points[0].name and (sweep / "out" / "summary.csv").exists()
    with pytest.raises(RuntimeError, match=r"Attention_seed-0 failed: .* lr is too high"):
        run(points[0]._replace(values=points[0].values | {"lr": 0.5, "num_epochs": 3}), points, sweep / "out", 1)


def test_summary_of_runs_that_are_missing_or_unfinished(sweep):
    points = name_points(*read_sweep("sweep.yaml", []))
    rows = summarize(points, Path("nothing"))
    assert [row["runs"] for row in rows] == [0, 0] and all(math.isnan(row["top1"]) for row in rows)
    write_summary(points, Path("."))
    assert not Path("tradeoff.png").exists() and Path("summary.md").exists()


def test_a_sweep_of_the_real_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = {
        "program": "allconvnet_main.py",
        "options": {
            "dataset": "digits",
            "layer": "ConvNN",
            "channels": [4],
            "train_limit": 40,
            "test_limit": 20,
            "device": "cpu",
        },
        "grid": {"K": 2, "num_epochs": 1},
    }
    Path("small.yaml").write_text(yaml.safe_dump(sweep))
    assert run_experiments.main(["small.yaml"]) == 0
    folder = Path("Output/sweeps/small")
    assert (folder / "K-2_num_epochs-1" / "summary.json").exists()
    assert [row["runs"] for row in read_csv(folder / "summary.csv")] == ["1"] and (folder / "tradeoff.png").exists()
