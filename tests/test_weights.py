"""Checkpoints of every kind: whose they are, what they may hold, and which model they are evaluated in."""

import json
import math
import pickle
import shlex
from pathlib import Path

import pytest
import torch

import allconvnet_main
import vit
import vit_main
from models.pretrained import load_vit_weights
from options.runs import PROGRAMS, as_trained, parse_options
from options.vit import ViTConfig
from runs import RunError, Stopped
from runs.checkpoints import (
    DamagedError,
    check_finite_weights,
    load_checkpoint,
    load_state,
    weights_in,
)
from runs.folder import RunFolder

VIT = (
    "--dataset digits --resize 8 --patch_size 4 --num_layers 1 --num_heads 2 --d_model 8 --d_mlp 8 --batch_size 16 "
    "--train_limit 32 --test_limit 20 --device cpu --num_epochs 1"
)
pytestmark = pytest.mark.usefixtures("quick_results")


def run(line, folder=None):
    return vit_main.main(shlex.split(line) + (["--output_dir", str(folder)] if folder else []))


def refused(line, capsys, program=vit_main):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program.main(shlex.split(line))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of ours, to be read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(f"{VIT} --layer KvtAttention --K 3", folder) == 0
    return folder / "best.pt"


# --- the model that was trained -------------------------------------------------------------------------------------


def test_a_checkpoint_is_evaluated_as_the_model_it_was_trained_as(trained, tmp_path):
    assert run(f"--test_only --checkpoint {trained} --test_limit 20 --device cpu", tmp_path) == 0
    results = json.loads((tmp_path / "test_results.json").read_text())
    best = torch.load(trained, weights_only=True)["best"]
    assert results["top1"] == best["test_top1"] and results["loss"] == pytest.approx(best["test_loss"])
    options = results["options"]
    assert (options["layer"], options["num_heads"], options["K"], options["dataset"]) == ("KvtAttention", 2, 3, "digits")
    assert results["override"] == {}


@pytest.mark.parametrize("stated", ["--num_heads 4", "--K 2", "--layer Attention", "--patch_size 2"])
def test_another_model_than_the_trained_one_needs_override(stated, trained, tmp_path, capsys):
    line = f"--test_only --checkpoint {trained} --test_limit 20 --device cpu {stated}"
    name = stated.split()[0]
    if name != "--patch_size":  # which the shapes of the weights show
        error = refused(f"{line} --output_dir {tmp_path}", capsys)
        assert f"was trained with {name} " in error and f"not {stated.split()[1]}; leave {name} out" in error
        assert "--override" in error
    else:
        assert "of another architecture" in refused(f"{line} --output_dir {tmp_path}", capsys)
    assert not list(tmp_path.iterdir())


def test_what_is_stated_is_judged_with_the_options_of_the_checkpoint(tmp_path, capsys):
    """Beside the defaults of the programs none of these would do."""
    line = VIT.replace("--resize 8 --patch_size 4", "--resize 9 --patch_size 3").replace("--d_model 8", "--d_model 12")
    assert run(line.replace("--num_heads 2", "--num_heads 3"), tmp_path / "vit") == 0
    test = "--test_only --device cpu --test_limit 20"
    for stated in ("--num_heads 3", "--patch_size 3", "--num_heads 3 --resize 9"):
        assert run(f"{test} {stated}", tmp_path / "vit") == 0
    line = "--dataset digits --layer Conv2d --channels 4 8 --train_limit 32 --test_limit 20 --device cpu --num_epochs 1"
    assert allconvnet_main.main([*line.split(), "--output_dir", str(tmp_path / "conv")]) == 0
    assert allconvnet_main.main([*test.split(), "--num_layers", "2", "--output_dir", str(tmp_path / "conv")]) == 0
    assert sorted(path.name for path in tmp_path.rglob("test_results*")) == ["test_results.json"] * 2
    # and what does not do there, or for weights without options, or by itself, is one line
    test += f" --output_dir {tmp_path / 'vit'}"
    assert f"with the options of {tmp_path / 'vit' / 'best.pt'}, num_heads=5 does not divide d_model=12" in refused(
        f"{test} --num_heads 5", capsys
    )
    torch.save(weights_in(load_checkpoint(tmp_path / "vit" / "best.pt"), tmp_path / "vit" / "best.pt"), tmp_path / "w.pt")
    error = refused(f"{test} --checkpoint {tmp_path / 'w.pt'} --num_heads 3", capsys)
    assert "--test_only: num_heads=3 does not divide d_model=512" in error
    assert "num_heads=0 must be at least 1" in refused(f"{test} --num_heads 0", capsys)
    error = refused("--test_only --device cpu --layer KvtAttention --num_heads 3", capsys)
    assert "there is no Output/ViT/KvtAttention/best.pt" in error


def test_what_is_overridden_is_said_recorded_and_replaces_nothing(trained, tmp_path, capsys):
    line = f"--test_only --checkpoint {trained} --test_limit 20 --device cpu"
    assert run(line, tmp_path) == 0
    first = (tmp_path / "test_results.json").read_bytes()
    capsys.readouterr()
    for _ in range(2):
        assert run(f"{line} --num_heads 4 --override", tmp_path) == 0
        out, error = capsys.readouterr()
        assert error == f"warning: --override: {trained} was trained with --num_heads 2, here 4\n"
        assert "test_results-2.json: test_results.json is of other options" in out
    results = json.loads((tmp_path / "test_results-2.json").read_text())
    assert results["override"] == {"num_heads": {"trained": 2, "here": 4}} and results["options"]["num_heads"] == 4
    assert (tmp_path / "test_results.json").read_bytes() == first
    results = ["test_results-2.json", "test_results.json"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == results
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["test_predictions-2.npz", "test_predictions.npz"]
    (tmp_path / "test_results.json").write_text("mine")
    assert run(line, tmp_path) == 0 and (tmp_path / "test_results.json").read_text() == "mine"


def test_a_result_of_the_same_options_in_other_words_is_written_over(trained, tmp_path, monkeypatch):
    line = f"--test_only --test_limit 20 --device cpu --output_dir {tmp_path / 'out'}"
    assert run(f"{line} --checkpoint {trained} --resize 8") == 0
    monkeypatch.chdir(trained.parent)
    assert run(f"{line} --checkpoint best.pt --resize 8 8 --data_path {Path('Data').absolute()} --magnitude_type matmul") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["test_results.json"]
    assert run(f"{line} --checkpoint best.pt --magnitude_type similarity") == 0
    assert run(f"{line} --checkpoint best.pt --magnitude_type cosine") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["test_results-2.json", "test_results.json"]


def test_options_that_change_no_number_need_no_override(trained):
    config = torch.load(trained, weights_only=True)["config"]
    program = PROGRAMS["vit_main.py"]
    for line in (
        "--dropout 0.5",
        "--attention_dropout 0",
        "--num_heads 2",
        "--resize 8",
        "--window_size 3",
        "--magnitude_type cosine",
    ):
        _, parser = parse_options(program, "", shlex.split(f"--dataset digits --patch_size 4 {line}"))
        assert as_trained(program, parser.stated, config).changes == {}, line
    assert as_trained(program, {"resize": 12}, config).changes == {"resize": (8, 12)}


def test_a_checkpoint_of_the_other_program_is_called_that(trained, tmp_path, capsys):
    line = f"--device cpu --checkpoint {trained} --test_only --output_dir {tmp_path}"
    assert "it was trained by vit_main.py" in refused(line, capsys, allconvnet_main)
    line = f"--dataset digits --device cpu --resume --output_dir {trained.parent}"
    error = refused(line, capsys, allconvnet_main)
    assert "is of a run of vit_main.py" in error and "magnitude" not in error


def test_what_foreign_weights_do_not_say_is_printed(trained, tmp_path, capsys):
    torch.save(weights_in(load_checkpoint(trained), trained), tmp_path / "w.pt")
    line = f"{VIT} --layer KvtAttention --K 3 --test_only --checkpoint {tmp_path / 'w.pt'}"
    assert run(line, tmp_path) == 0
    out = capsys.readouterr().out
    assert f"assumed of {tmp_path / 'w.pt'}, which does not say: --K 3 --layer KvtAttention --num_heads 2" in out
    assert "--K 3" in out and "--d_model" not in out


def test_training_from_another_model_is_said_and_resuming_reads_no_checkpoint(trained, tmp_path, capsys):
    line = f"{VIT} --layer KvtAttention --checkpoint {trained}"
    assert run(f"{line} --K 2 --num_heads 4", tmp_path) == 0
    assert "was trained with --K 3, here 2; --num_heads 2, here 4\n" in capsys.readouterr().err
    assert run(f"{line} --K 2 --num_heads 4 --resume", tmp_path) == 0
    assert f"--checkpoint {trained} is not read: --resume continues from" in capsys.readouterr().err


# --- what a file may hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_are_unwrapped(wrapper, prefix, tmp_path):
    weights = {f"{prefix}weight": torch.ones(2, 3), f"{prefix}bias": torch.zeros(2)}
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, tmp_path / "x.pt")
    model = torch.nn.Linear(3, 2)
    load_state(model, weights_in(load_checkpoint(tmp_path / "x.pt"), tmp_path / "x.pt"))
    assert torch.equal(model.weight, torch.ones(2, 3))


ONES = torch.ones(2, 3)
ODD = [
    ({0: ONES}, "not tensors by name"),
    ({"model": {0: ONES}}, "not tensors by name"),
    ({"model": {}}, "not tensors by name"),
    ({"model": {"w": ONES}, "ema": ONES}, "its ema is not tensors by name"),
    ({"w": ONES.to_sparse()}, "w is sparse"),
    ({"w": ONES.to("meta")}, "w is without data"),
    ({"w": ONES.cfloat()}, "w is of complex numbers"),
    ({"state_dict": {"w": {"a": ONES}}}, "not tensors by name"),
    (ONES, "holds a Tensor"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("content", "words"), ODD, ids=[words for _, words in ODD])
def test_odd_tensors_are_one_line(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(RunError, match=words) as caught:
        weights_in(load_checkpoint(tmp_path / "x.pt"), tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and str(tmp_path / "x.pt") in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused(tmp_path):
    torch.save({"w": torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8)}, tmp_path / "x.pt")
    with pytest.raises(RunError, match=r"w is quantized|cannot be read"):
        weights_in(load_checkpoint(tmp_path / "x.pt"), tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    with pytest.raises(ValueError, match=f"0.weight is {str(dtype)[6:]}"):
        load_state(model, state | {"0.weight": state["0.weight"].to(dtype)})
    load_state(model, {name: value.half() for name, value in state.items()})  # BatchNorm's count of batches as well


def test_weights_that_are_not_finite_are_named(trained, tmp_path, capsys):
    state = torch.load(trained, weights_only=True)
    names = [name for name, value in state["model"].items() if value.is_floating_point()][:2]
    for name, value in zip(names, (math.nan, -math.inf), strict=True):
        state["model"][name].view(-1)[1] = value
    with pytest.raises(Stopped, match=rf"in {names[0]} and 1 other tensors"):
        check_finite_weights(state["model"], Path("x.pt"))
    torch.save(state, tmp_path / "x.pt")
    for more in ("--test_only", ""):
        capsys.readouterr()
        line = f"{VIT} --layer KvtAttention --K 3 --checkpoint {tmp_path / 'x.pt'} {more}"
        assert run(line, tmp_path / "run") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "not finite (NaN or infinity) in" in error and names[0] in error
        assert not (tmp_path / "run").exists()


def test_weights_that_overflow_leave_no_result(trained, tmp_path, capsys):
    state = torch.load(trained, weights_only=True)
    state["model"]["classifier.weight"].fill_(3e38)
    state["model"]["classifier.bias"].fill_(3e38)
    torch.save(state, tmp_path / "x.pt")
    assert run(f"--test_only --checkpoint {tmp_path / 'x.pt'} --device cpu --test_limit 20", tmp_path / "run") == 1
    assert "the test loss" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="JSON"):
        RunFolder(tmp_path / "run").write_test_results({"loss": math.nan}, {})


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_called_that(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "zip.pt")
    torch.save({"model": Evil()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4):
        (tmp_path / f"{protocol}.pt").write_bytes(pickle.dumps({"model": Evil()}, protocol))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DamagedError, match="holds more than tensors and plain values, and code in it is not run"):
            load_checkpoint(path)
    for text in ("hello", "xx", "{}"):
        (tmp_path / "text.pt").write_text(text)
        with pytest.raises(DamagedError, match="it is damaged, or"):
            load_checkpoint(tmp_path / "text.pt")
    assert capsys.readouterr().out == ""


def test_a_folder_is_called_that(tmp_path, capsys):
    (tmp_path / "x.pt").mkdir()
    assert "x.pt' is a folder" in refused(f"--checkpoint {tmp_path / 'x.pt'}", capsys)
    with pytest.raises(DamagedError, match="is a folder, not a checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_advice_for_weights_of_others_names_what_is_missing_only():
    def model(**more):
        size = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_layers": 1, "num_heads": 2, "d_model": 8, "d_mlp": 8}
        return vit.ViT(ViTConfig(**size, **more))

    weights = {"patch_embed.proj.weight": torch.ones(8, 3, 4, 4)}
    with pytest.raises(ValueError, match="need --no-patch_norm --final_norm --pos_embedding learned; they are for images of 3"):
        load_vit_weights(model(), weights)
    given = model(patch_norm=False, final_norm=True, pos_embedding="learned")
    with pytest.raises(ValueError, match="are for images of 3 channels, and these have 1") as caught:
        load_vit_weights(given, weights)
    assert "need" not in str(caught.value)
