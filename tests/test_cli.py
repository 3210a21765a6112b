"""The command line as a user types it: what it prints, what it leaves, what it says when something is wrong."""

import contextlib
import copy
import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train_eval
import vit_main
from allconvnet import AllConvNet
from allconvnet_main import main
from launch.prepare import check_short_batches
from options.allconvnet import AllConvNetConfig
from options.training import TrainConfig
from runs import RunError
from runs.checkpoints import load_checkpoint, weights_in
from runs.export import export_weights
from runs.files import check_writable
from tests.helpers.forked import Forked

ROOT = Path(__file__).parent.parent
SMALL = "--dataset digits --layer Conv2d/ConvNN --channels 4 8 --batch_size 32 --train_limit 100 --test_limit 50 --device cpu"
pytestmark = pytest.mark.usefixtures("quick_results")  # which `trained` is made without
OUTPUTS = "args.txt config.yaml model.txt train_eval_results.txt metrics.csv metrics.json summary.json curves.png".split()
OUTPUTS += ["last.pt", "best.pt", "test_predictions.npz"]


def run(line, folder, *, epochs=2):
    return main([*shlex.split(f"{SMALL} --num_epochs {epochs} {line}"), "--output_dir", str(folder)])


def fails(line, capsys, program=main):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        program(shlex.split(line))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs, for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("", folder) == 0
    return folder


@pytest.mark.parametrize(
    ("similarity", "epochs", "least"),
    [("Loc", 4, 85), ("Col", 8, 30)],  # of 94 to 96, and of 39 to 41; with one neighbor, the token itself, at most 25
)
def test_a_convnn_learns_digits(similarity, epochs, least, tmp_path):
    line = "--dataset digits --layer ConvNN --channels 16 32 --K 9 --shuffle_pattern NA --batch_size 64 --lr 0.01 --device cpu"
    words = f"{line} --similarity_type {similarity} --num_epochs {epochs} --output_dir {tmp_path / 'run'}".split()
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["test_top1"] > least


# --- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_are_all_there(trained):
    assert sorted(path.name for path in trained.iterdir()) == sorted(OUTPUTS)
    table = rows(trained)
    assert list(table[0]) == (
        "epoch lr train_loss train_top1 train_top5 test_loss test_top1 test_top5 seconds images_per_s".split()
    )
    assert [row["epoch"] for row in table] == ["1", "2"]
    epochs = json.loads((trained / "metrics.json").read_text())
    assert [{name: str(value) for name, value in epoch.items()} for epoch in epochs] == table
    assert all(0 <= float(row[name]) <= 100 for row in table for name in row if "top" in name)
    results = (trained / "train_eval_results.txt").read_text().splitlines()
    assert results[0].startswith("epoch   1") and results[1].startswith("epoch   2")
    assert "average epoch time" in results[-2] and "chosen on the test set" in results[-1]
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_args_and_config_hold_every_option(trained):
    args = dict(line.split(": ", 1) for line in (trained / "args.txt").read_text().splitlines())
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert list(args) == list(config)
    assert args["channels"] == "4 8" and config["channels"] == [4, 8]
    assert args["num_layers"] == "2" and args["resize"] == "8" and args["lr"] == "0.001"


def test_summary(trained):
    summary = json.loads((trained / "summary.json").read_text())
    table = rows(trained)
    assert summary["finished"] and summary["epochs"] == 2
    assert summary["best"]["test_top1"] == max(float(row["test_top1"]) for row in table)
    assert summary["final"]["test_loss"] == float(table[-1]["test_loss"])
    assert summary["best_epoch_chosen_on"] == "test set" and "--val_fraction" in summary["note"]
    assert summary["latency_ms_per_image"] > 0 and summary["peak_memory_bytes"] > 0
    assert summary["latency_std_ms"] >= 0 and summary["training_seconds"] == sum(float(row["seconds"]) for row in table)
    model = (trained / "model.txt").read_text()
    assert f"{summary['parameters']:,}" in model and "Branching2d" in model
    state = torch.load(trained / "best.pt", weights_only=True)
    assert summary["parameters"] == sum(v.numel() for k, v in state["model"].items() if "running" not in k and "num_b" not in k)


def test_checkpoints_hold_what_the_design_names(trained):
    for name in ("last.pt", "best.pt"):
        state = torch.load(trained / name, weights_only=True)
        assert (
            list(state)
            == "model optimizer scheduler scaler ema sampler rng epoch step best history predictions config data".split()
        )
    assert (state["epoch"], state["step"]) == (state["best"]["epoch"], 0)


def test_config_of_a_run_runs_again_with_equal_numbers(trained, tmp_path):
    assert main(["--config", str(trained / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    names = [name for name in rows(trained)[0] if name not in ("seconds", "images_per_s")]
    assert [[row[n] for n in names] for row in rows(trained)] == [[row[n] for n in names] for row in rows(tmp_path / "again")]


def test_output_goes_to_a_folder_named_after_the_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(f"{SMALL} --num_epochs 1")) == 0
    assert (tmp_path / "Output" / "AllConvNet" / "Conv2d-ConvNN" / "best.pt").exists()


def test_another_run_in_the_folder_is_written_over_when_told_with_a_warning(tmp_path, capsys):
    run("", tmp_path / "run")
    run("--test_only", tmp_path / "run")
    weights = (tmp_path / "run" / "best.pt").read_bytes()
    capsys.readouterr()
    run("--seed 1 --overwrite", tmp_path / "run", epochs=1)
    assert "warning" in capsys.readouterr().err
    assert len(rows(tmp_path / "run")) == 1 and (tmp_path / "run" / "best.pt.old").read_bytes() == weights
    assert not (tmp_path / "run" / "test_results.json").exists()


# --- flags do what they say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "--use_amp",
        "--clip_grad_norm 0 --optimizer sgd --momentum 0.5 --scheduler step --lr_step 1",
        "--accumulate_steps 4 --criterion MSE --label_smoothing 0.1 --optimizer adam --scheduler plateau",
        "--mixup 0.5 --cutmix 0.5 --ema_decay 0.5 --scheduler cosine --warmup_epochs 1 --augment --noise 0.1",
        "--deterministic --save_minutes 0.0001 --num_workers 0 --no-download",
        "--resize 12 --layer Attention/ConvNN_Attn --sampling_type random --num_samples 12",
    ],
)
def test_flags_train(line, tmp_path):
    assert run(line, tmp_path / "run") == 0
    assert all(torch.isfinite(torch.tensor(float(value))) for row in rows(tmp_path / "run") for value in row.values())


def test_seeds_repeat_and_differ(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"--seed {seed} --layer ConvNN --sampling_type random --num_samples 12", tmp_path / name, epochs=1)
    losses = [rows(tmp_path / name)[0]["test_loss"] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]


def test_validation_set_chooses_the_best_epoch(tmp_path):
    run("--val_fraction 0.3 --lr 0.01", tmp_path / "run", epochs=4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    table = rows(tmp_path / "run")
    assert summary["best_epoch_chosen_on"] == "validation set" and summary["train_images"] == 70
    assert summary["best"]["val_top1"] == max(float(row["val_top1"]) for row in table)
    assert "best val top-1" in (tmp_path / "run" / "train_eval_results.txt").read_text()


def test_early_stopping(tmp_path):
    run("--early_stopping 2 --lr 0", tmp_path / "run", epochs=9)  # a loss that BatchNorm's statistics alone can change
    losses = [float(row["test_loss"]) for row in rows(tmp_path / "run")]
    assert len(losses) < 9 and min(losses[-2:]) >= min(losses[:-2])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_a_run_whose_weights_overflow_does_not_finish(tmp_path, capsys):
    """Loss and gradient of the one step are finite, what it makes of the weights is not."""
    line = "--lr 1e38 --clip_grad_norm 0 --optimizer sgd --layer Conv2d --batch_size 100"
    assert run(line, tmp_path / "run", epochs=1) == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "run" / "best.pt").exists()


def test_save_every_and_export_and_checkpoint(tmp_path):
    pytest.importorskip("safetensors")
    exported = tmp_path / "new folder" / "w.safetensors"
    run(f"--save_every 2 --export '{exported}'", tmp_path / "run", epochs=4)
    assert {path.name for path in (tmp_path / "run").glob("epoch_*.pt")} == {"epoch_2.pt", "epoch_4.pt"}
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    for path in (exported, tmp_path / "run" / "best.pt"):
        weights = weights_in(load_checkpoint(path), path)
        assert all(torch.equal(weights[name], value) for name, value in best.items())
        run(f"--checkpoint '{path}' --lr 0 --weight_decay 0 --overwrite", tmp_path / "from", epochs=1)
        started = torch.load(tmp_path / "from" / "last.pt", weights_only=True)["model"]
        assert all(
            torch.equal(started[name], value) for name, value in best.items() if "running" not in name and "num" not in name
        )


def test_a_test_exports_the_weights_that_it_evaluates_and_says_where_its_results_are(tmp_path, capsys):
    """Of any checkpoint, also in a folder with a finished run, where a training would be refused."""
    run("--lr 0.1", tmp_path / "run", epochs=2)
    for number, name in enumerate(("best.pt", "last.pt"), 1):
        path, exported = tmp_path / "run" / name, tmp_path / f"{number}.safetensors"
        capsys.readouterr()
        assert run(f"--test_only --checkpoint '{path}' --export '{exported}'", tmp_path / "tests") == 0
        results = tmp_path / "tests" / f"test_results{'-2' * (number == 2)}.json"
        assert f"results are in {results}" in capsys.readouterr().out and results.exists()
        weights = weights_in(load_checkpoint(exported), exported)
        state = weights_in(load_checkpoint(path), path)
        assert weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)
    again = f"--test_only --export '{exported}'"
    assert "exists" in fails(f"{SMALL} {again} --output_dir '{tmp_path / 'run'}'", capsys)
    assert run(f"{again} --overwrite", tmp_path / "run") == 0
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    weights = weights_in(load_checkpoint(exported), exported)
    assert all(torch.equal(weights[name], value) for name, value in best.items())


def test_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run("--tensorboard", tmp_path / "run")
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("test_loss")]
    assert values == pytest.approx([float(row["test_loss"]) for row in rows(tmp_path / "run")])


@pytest.mark.parametrize("more", ["", "--ema_decay 0.5"])
def test_test_only_gives_the_number_of_the_best_epoch_and_writes_nothing_else(more, tmp_path, capsys):
    folder = tmp_path / "run"
    run(more, folder, epochs=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(f"--test_only {more}", folder) == 0
    results = json.loads((folder / "test_results.json").read_text())
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert (results["top1"], results["top5"]) == (best["test_top1"], best["test_top5"])
    assert results["loss"] == pytest.approx(best["test_loss"]) and results["images"] == 50
    assert f"top-1 {best['test_top1']:.2f}" in capsys.readouterr().out
    for name in ("test_results.json", "test_predictions-1.npz"):
        (folder / name).unlink()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resume_goes_on_where_the_run_stopped(trained, tmp_path, capsys):
    run("", tmp_path / "run", epochs=1)
    assert run("--resume", tmp_path / "run") == 0
    assert "resumed" in capsys.readouterr().out
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "run", trained))
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    assert [row["test_loss"] for row in rows(tmp_path / "run")] == [row["test_loss"] for row in rows(trained)]
    assert run("--resume", tmp_path / "run") == 0  # a finished run stays finished
    assert len(rows(tmp_path / "run")) == 2


def test_resume_without_a_run_starts_one(tmp_path):
    assert run("--resume", tmp_path / "run", epochs=1) == 0
    assert len(rows(tmp_path / "run")) == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert run("--lr 1e30 --clip_grad_norm 0 --optimizer sgd", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert re.search(r"not finite at epoch 1, step \d+, learning rate 1e\+30", error) and "--lr" in error
    assert not (tmp_path / "run" / "last.pt").exists()


# --- what is wrong ends in one line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--device cuda", ["--device cuda", "cpu"]),
        ("--use_amp --amp_dtype float16", ["--amp_dtype float16", "bfloat16"]),
        ("--test_only", ["--test_only", "best.pt", "--checkpoint"]),
        ("--dataset cifar10 --no-download --data_path nowhere", ["nowhere", "cifar-10-batches-py", "--dataset digits"]),
        (
            "--dataset fashion_mnist --no-download --data_path nowhere",
            ["nowhere", "train-images-idx3-ubyte", "--dataset digits"],
        ),
        ("--dataset imagenette --no-download --data_path nowhere", ["nowhere", "train/", "--dataset digits"]),
        ("--train_limit 5000", ["--train_limit 5000", "1437"]),
        ("--K 20", ["K=20", "1 to 16"]),
        ("--layer ConvNN --channels 4 6 --convolution_type depthwise", ["16 channels, not 24", "use depthwise-separable"]),
        ("--layr ConvNN", ["--layr", "--layer"]),
    ],
)
def test_errors_before_anything_is_written(line, words, tmp_path, monkeypatch, capsys):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    device = "" if "--device" in line else "--device cpu"
    error = fails(f"--dataset digits --num_epochs 1 {device} {line}", capsys)
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_half_an_environment_of_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = fails(f"{SMALL} --output_dir {tmp_path / 'run'}", capsys)
    assert "WORLD_SIZE=2 is set without RANK" in error and "torchrun" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("images", ["--train_limit 33", "--train_limit 35 --accumulate_steps 2"])
def test_a_batch_of_one_image_without_a_neighbor(images, tmp_path, capsys):
    line = "--dataset digits --device cpu --layer ConvNN --shuffle_pattern B --channels 4 8 8 --K 1 --batch_size 32"
    error = fails(f"{line} {images} --test_limit 10 --num_epochs 1 --output_dir {tmp_path / 'run'}", capsys)
    assert "--batch_size 32 leaves a batch with one image" in error
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_image_is_tried_on_a_copy():
    """And only where there is one: of the last two of 34 images each of two processes gets one."""
    convs = AllConvNetConfig(layer="ConvNN", channels=(4,), sampling_type="random", num_samples=9, image_size=8, in_channels=1)
    model, config = AllConvNet(convs), TrainConfig(batch_size=32)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_short_batches(model, config, 33, (1, 8, 8), world=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = AllConvNet(AllConvNetConfig(layer="Conv2d", channels=(4,), image_size=1, in_channels=1))
    for images, world, is_refused in (
        (33, 1, True),
        (33, 2, True),
        (64, 1, False),
        (34, 1, False),
        (34, 2, True),
        (11, 4, False),
    ):
        with pytest.raises(RunError, match="one image") if is_refused else contextlib.nullcontext():
            check_short_batches(model, config, images, (1, 1, 1), world)


def test_a_training_set_smaller_than_a_batch(tmp_path):
    run("--train_limit 20 --batch_size 64", tmp_path / "run", epochs=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_images"] == 20


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--output_dir" in fails(f"{SMALL} --output_dir {tmp_path / 'file'}", capsys)


def test_the_output_folder_is_checked_once(tmp_path, monkeypatch):
    checked, real = [], check_writable
    for module in ("launch.prepare", "runs.folder"):
        monkeypatch.setattr(f"{module}.check_writable", lambda folder, flag: (checked.append(flag), real(folder, flag)))
    run("", tmp_path / "run", epochs=1)
    run("--test_only", tmp_path / "run")
    assert checked == ["--output_dir"] * 2


def test_checkpoint_of_another_architecture_names_the_first_difference(trained, tmp_path, capsys):
    base = f"--dataset digits --checkpoint {trained / 'best.pt'} --test_only --device cpu"
    assert "layers.0.0.first.weight" in fails(f"{base} --layer Conv2d/ConvNN --channels 6 8", capsys)
    assert "layers.0.0.weight" in fails(f"{base} --layer Conv2d --channels 4 8", capsys)
    assert "layers.2.0" in fails(f"{base} --layer Conv2d/ConvNN --channels 4 8 8", capsys)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert str(path) in fails(f"{SMALL} --checkpoint {path} --test_only", capsys)


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    fails(f"{SMALL} --checkpoint {tmp_path / 'evil.pt'} --test_only", capsys)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [{"model": 3}, {"model": {"a": 1}}, [1], {"optimizer": {}}])
def test_a_checkpoint_of_something_else(content, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in fails(f"{SMALL} --checkpoint {tmp_path / 'x.pt'} --test_only", capsys)


def test_resume_from_a_damaged_state(trained, tmp_path, capsys):
    state = torch.load(trained / "last.pt", weights_only=True)
    del state["optimizer"]["state"]
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "last.pt")
    assert "last.pt is damaged" in fails(f"{SMALL} --num_epochs 3 --resume --output_dir {tmp_path / 'run'}", capsys)


def test_resume_within_an_epoch(tmp_path, monkeypatch):
    """Killed in the middle of the second epoch, after a checkpoint within it: the same files as if it had not been."""

    options = "--batch_size 4 --save_minutes 1e-9 --scheduler cosine --warmup_epochs 1 --mixup 0.3 --ema_decay 0.5 --augment"
    assert run(options, tmp_path / "whole") == 0
    original, steps = train_eval.train_step, []

    def train_step(*args):
        steps.append(1)
        if len(steps) == 40:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(train_eval, "train_step", train_step)
    assert run(options, tmp_path / "killed") == 130
    monkeypatch.undo()
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] > 0
    assert run(f"{options} --resume", tmp_path / "killed") == 0
    whole, killed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(killed[part][name], value) for name, value in whole[part].items())
    names = [name for name in rows(tmp_path / "whole")[0] if name not in ("seconds", "images_per_s")]
    ours, theirs = ([[row[n] for n in names] for row in rows(tmp_path / name)] for name in ("killed", "whole"))
    assert ours == theirs


def test_resume_under_other_options(trained, capsys):
    base = f"{SMALL} --num_epochs 4 --output_dir {trained} --resume"
    assert "--lr 0.001, not 0.5; give it as it was, or use another --output_dir" in fails(f"{base} --lr 0.5", capsys)
    assert "--K 9, not 5;" in fails(f"{base} --K 5", capsys)
    assert "--channels 4 8, not 4 6;" in fails(f"{base} --channels 4 6", capsys)


@pytest.mark.parametrize("scheduler", ["cosine", "step"])
def test_a_cosine_over_other_epochs_is_said(scheduler, tmp_path, capsys):
    options = f"--scheduler {scheduler} --batch_size 100"
    assert run(options, tmp_path / "run", epochs=1) == run(f"{options} --resume", tmp_path / "run", epochs=2) == 0
    warning = capsys.readouterr().err
    assert ("--num_epochs was 1 and is 2" in warning) == (scheduler == "cosine") and warning.count("warning") <= 1


def test_torchvision_made_for_another_torch_is_one_line(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    command = [sys.executable, "allconvnet_main.py", *shlex.split("--dataset imagenette --download --data_path nowhere")]
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "torchvision" in result.stderr and "pip install" in result.stderr


# --- the ViT --------------------------------------------------------------------------------------------------------

SMALL_VIT = (
    "--dataset digits --resize 8 --patch_size 2 --num_layers 2 --num_heads 2 --d_model 16 --d_mlp 16 --batch_size 32 "
    "--train_limit 100 --test_limit 50 --device cpu"
)


def run_vit(line, folder, *, epochs=2):
    return vit_main.main([*shlex.split(f"{SMALL_VIT} --num_epochs {epochs} {line}"), "--output_dir", str(folder)])


def test_vit_outputs_and_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        vit_main.main(
            shlex.split(f"{SMALL_VIT} --num_epochs 2 --layer ConvNNAttention --num_samples 6 --K 4 --sampling_type random")
        )
        == 0
    )
    folder = tmp_path / "Output" / "ViT" / "ConvNNAttention"
    assert sorted(path.name for path in folder.iterdir()) == sorted(OUTPUTS)
    args = dict(line.split(": ", 1) for line in (folder / "args.txt").read_text().splitlines())
    assert (args["d_model"], args["lr"], args["magnitude_type"], args["resize"]) == ("16", "0.0001", "matmul", "8")
    assert "MultiHeadConvNNAttention" in (folder / "model.txt").read_text()
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert vit_main.main(["--config", str(folder / "config.yaml"), "--test_only"]) == 0
    assert json.loads((folder / "test_results.json").read_text())["top1"] == best["test_top1"]
    assert f"top-1 {best['test_top1']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "--layer Attention --patch_size 16 --num_layers 8 --num_heads 8 --d_model 512",
        "--layer ConvNNAttention --patch_size 16 --num_layers 8 --num_heads 8 --d_model 512 --K 9 --num_samples 32 "
        "--sampling_type random",
        "--layer Attention --num_layers 12 --num_heads 3 --d_hidden 192 --d_mlp 768 --optimizer adamw --lr 1e-3",
        "--layer ConvNNAttention --convolution_type depthwise --num_layers 12 --d_hidden 192 --d_mlp 768 --K 9 "
        "--sampling_type spatial --num_samples 8 --similarity_type Col --aggregation_type Col",
    ],
)
def test_the_four_vit_commands_run_as_written(command, tmp_path):
    assert any(command in " ".join(line.split()) for line in commands_of_the_pages())
    limits = "--dataset digits --num_epochs 1 --train_limit 1 --test_limit 1 --batch_size 1 --device cpu"
    assert vit_main.main([*shlex.split(f"{command} {limits}"), "--output_dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"] and summary["image_shape"] == [1, 224, 224]


@pytest.mark.parametrize(
    "line",
    [
        "--layer NeighborhoodAttention --kernel_size 3 --num_local_layers 1 --use_amp --ema_decay 0.5",
        "--layer BranchConv --kernel_size 3 --K 4 --pool mean --mixup 0.5 --accumulate_steps 2 --pos_embedding learned",
        "--layer ConvNN --coordinate_encoding --K 4 --final_norm --no-patch_norm",
        "--layer MaskedAttention --mask_type 2d_cardinal --expansion_step 2",
        "--layer Linformer --linformer_k 5 --use_amp",
        "--layer Nystromformer --nystrom_landmarks 4 --nystrom_conv_kernel 3 --ema_decay 0.5",
        "--layer Hybrid --hybrid_dilations 1 --performer_features 8 --performer_kernel relu",
        "--layer GPSA --num_local_layers 1 --locality_strength 2",
        "--model convit_ti --num_layers 2 --num_local_layers 1",
    ],
)
def test_vit_flags_train(line, tmp_path):
    assert run_vit(line, tmp_path / "run", epochs=1) == 0
    assert all(torch.isfinite(torch.tensor(float(value))) for row in rows(tmp_path / "run") for value in row.values())


@pytest.mark.parametrize(
    "layer",
    ["--layer ConvNNAttention --K 4 --sampling_type random --num_samples 6", "--layer Hybrid --hybrid_dilations 1"],
)
def test_vit_resumes_bit_for_bit(layer, tmp_path):
    options = f"{layer} --dropout 0.2 --attention_dropout 0.2"
    run_vit(options, tmp_path / "whole")
    run_vit(options, tmp_path / "run", epochs=1)
    assert run_vit(f"{options} --resume", tmp_path / "run") == 0
    ours, theirs = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_vit_checkpoints_of_torchvision(tmp_path, capsys):
    models = pytest.importorskip("torchvision").models
    reference = models.VisionTransformer(8, 2, 2, 2, 16, 16, num_classes=10)
    reference.conv_proj = torch.nn.Conv2d(1, 16, 2, 2)
    for value in reference.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.5)
    same = "--no-patch_norm --final_norm --pos_embedding learned --test_only"
    results = []
    torch.save(reference.state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "b.pth")
    export_weights(tmp_path / "c.safetensors", reference.state_dict())
    for name, file in (("a.pt", "test_results"), ("b.pth", "test_results-2"), ("c.safetensors", "test_results-3")):
        assert run_vit(f"{same} --checkpoint {tmp_path / name}", tmp_path / "run") == 0
        written = json.loads((tmp_path / "run" / f"{file}.json").read_text())
        assert written["checkpoint"] == str(tmp_path / name)
        results.append(written["loss"])
    from dataset import load_data
    from options.data import DataConfig

    data = load_data(
        DataConfig(dataset="digits", resize=8, test_limit=50, num_workers=0),
        batch_size=50,
        seed=0,
        device=torch.device("cpu"),
        test_only=True,
    )
    ((images, labels),) = data.test.epoch(0)
    expected = torch.nn.functional.cross_entropy(reference.eval()(images), labels).item()
    assert results == pytest.approx([expected] * 3, rel=1e-5)
    torch.save(models.VisionTransformer(8, 2, 2, 2, 16, 16, num_classes=7).state_dict(), tmp_path / "other.pt")
    error = fails(f"{SMALL_VIT} {same} --checkpoint {tmp_path / 'other.pt'}", capsys, vit_main.main)
    assert "other.pt is of another architecture or number of classes" in error and "patch_embedding.weight" in error


# --- progress, README and docs ---------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_one_line_per_epoch(tmp_path):
    command = ["allconvnet_main.py", *shlex.split(f"{SMALL} --num_epochs 2 --output_dir"), str(tmp_path / "run")]
    process = Forked(command, cwd=ROOT)
    out, error = process.communicate()
    assert process.returncode == 0 and error == ""
    assert [line.split()[0] for line in out.splitlines()] == ["Conv2d/ConvNN", "epoch", "epoch", "best"]


# test_custom_mixers.py and test_tutorial.py run these pages, whose commands need the files that the pages add.
RUN_ELSEWHERE = ("custom_mixers.md", "tutorial.md")
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in RUN_ELSEWHERE)]


def blocks(language):
    """The blocks of code in this language ("": commands) of all pages, by page."""
    found = [(page, *block) for page in PAGES for block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)]
    return [(page, code) for page, word, code in found if word == language]


def commands_of_the_pages():
    lines = [line for _, code in blocks("") for line in code.replace("\\\n", " ").splitlines()]
    found = [re.match(r"(?:\w+=\S+ )?(?:python|torchrun .*?|sbatch .*?) ([\w/]+\.py.*)", line) for line in lines]
    return list(dict.fromkeys(f"python {one[1]}" for one in found if one))


def test_commands_are_found_on_every_page_that_has_some():
    assert len(commands_of_the_pages()) > 35
    for page, code in blocks(""):
        for line in code.replace("\\\n", " ").splitlines():
            assert re.match(r"(\w+=\S+ )?(python|torchrun|sbatch|pip install) ", line), f"{page.name}: {line}"


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: getattr(value, "name", ""))
def test_python_of_the_pages_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {})


@pytest.mark.parametrize(("page", "sweep"), blocks("yaml"), ids=lambda value: getattr(value, "name", ""))
def test_sweeps_of_the_pages_have_points(page, sweep, tmp_path, monkeypatch):
    import run_experiments

    monkeypatch.chdir(ROOT)
    (tmp_path / "sweep.yaml").write_text(sweep)
    assert run_experiments.main([str(tmp_path / "sweep.yaml"), "--dry_run"]) == 0


@pytest.mark.parametrize("command", commands_of_the_pages())
def test_commands_of_the_pages_parse(command, monkeypatch):
    import benchmark
    import predict
    import run_experiments
    import visualize
    from experiments.points import find_program
    from options.runs import parse_options

    monkeypatch.chdir(ROOT)
    _, program, *argv = shlex.split(command, comments=True)
    if program == "benchmark.py":
        if argv[:1] not in (["targets"], ["host"]):
            benchmark.parse(argv)
    elif program == "run_experiments.py":
        assert run_experiments.main([*argv, "--dry_run"]) == 0
    elif program == "visualize.py":
        visualize.make_parser().parse_args(argv)
    elif program == "predict.py":
        predict.make_parser().parse_args(argv)
    else:
        parse_options(find_program(program, command), "", argv)


@pytest.mark.parametrize(
    "example",
    [
        "--layer ConvNN --sampling_type spatial --num_samples 8 --K 9 --channels 64 128 256 --num_layers 3",
        "--layer Attention/ConvNN_Attn --sampling_type random --num_samples 32 --channels 64 128 256 --num_layers 3",
    ],
)
def test_the_two_examples_of_the_layers_page_run(example, tmp_path):
    assert any(example in " ".join(command.split()) for command in commands_of_the_pages())
    small = "--dataset digits --resize 32 --num_epochs 1 --train_limit 4 --test_limit 2 --batch_size 4 --device cpu"
    assert main([*shlex.split(f"{example} {small}"), "--output_dir", str(tmp_path / "run")]) == 0
