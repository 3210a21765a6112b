"""The expectations here are written out from the flag reference, not taken from `options/`."""

import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from options.allconvnet import AllConvNetConfig
from options.benchmark import BenchmarkConfig
from options.checks import branch_widths
from options.data import DataConfig
from options.fields import option, specs
from options.layers import LAYERS2D_NAMES
from options.neighbors import NeighborConfig
from options.runs import PROGRAMS, Options, as_trained, parse_options
from options.training import KERNELS_IN_ENVIRONMENT, TrainConfig
from options.vit import VIT_MODELS, ViTConfig

ROOT = Path(__file__).parent.parent.parent
BOOLEANS = ("use_amp", "use_compiled", "augment", "download", "deterministic", "resume", "test_only", "tensorboard")
BOOLEANS += ("overwrite", "override", "strict", "decay_norms", "batch_norm", "wandb")
LAYERS = ("Conv2d", "ConvNN", "ConvNN_Attn", "Attention", "ViG")
NOTED = ("layer_sha256",)  # what a run notes in its files, and no flag gives

# What `allconvnet_main.py` without a flag resolves to; num_workers depends on the machine.
DEFAULTS = {
    # model and layer
    "model": "allconvnet",
    "layer": "ConvNN",
    "mixer_option": None,
    "layer_sha256": None,
    "num_layers": 5,
    "channels": [32, 64, 128, 256, 512],
    "attention_dropout": 0.0,
    "convolution_type": "standard",
    "replace": ["all"],
    "stem": None,
    "classifier_width": None,
    "batch_norm": False,
    "kernel_size": 3,
    "num_heads": 4,
    "shuffle_pattern": "BA",
    "shuffle_scale": 2,
    "padding": 0,
    "branch_ratio": 0.5,
    "branch_join": "relu",
    "graph_aggregation": "max",
    "score_temperature": 1.0,
    "topk": "hard",
    # neighbors
    "K": 9,
    "sampling_type": "all",
    "num_samples": -1,
    "sample_padding": 0,
    "magnitude_type": "similarity",
    "similarity_type": "Col",
    "aggregation_type": "Col",
    "lambda_param": 0.5,
    # data
    "dataset": "cifar10",
    "data_path": "./Data",
    "resize": 32,
    "val_fraction": 0.0,
    "augment": False,
    "auto_augment": "none",
    "random_erasing": 0.0,
    "noise": 0.0,
    "download": True,
    "num_workers": ...,
    "train_limit": None,
    "test_limit": None,
    # training
    "batch_size": 256,
    "num_epochs": 150,
    "use_amp": False,
    "amp_dtype": "bfloat16",
    "use_compiled": False,
    "compile_mode": "default",
    "clip_grad_norm": 1.0,
    "accumulate_steps": 1,
    "criterion": "CrossEntropy",
    "label_smoothing": 0.0,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "momentum": 0.9,
    "scheduler": "none",
    "lr_step": 20,
    "lr_gamma": 0.1,
    "warmup_epochs": 0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.0,
    "early_stopping": 0,
    # system and output
    "device": "auto",
    "seed": 0,
    "deterministic": False,
    "output_dir": "./Output/AllConvNet/ConvNN",
    "resume": False,
    "checkpoint": None,
    "save_minutes": 10.0,
    "save_every": 0,
    "export": None,
    "test_only": False,
    "tensorboard": False,
    "wandb": False,
    "kernels": "auto",
    "overwrite": False,
    "override": False,
    # fine-tuning and regularization
    "strict": False,
    "freeze": None,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "decay_norms": True,
}
CHOICES = {
    "branch_join": ("relu", "conv1x1"),
    "model": ("allconvnet", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34"),
    "stem": ("small", "imagenet"),
    "topk": ("hard", "straight_through", "gumbel"),
    "convolution_type": ("standard", "depthwise", "depthwise-separable"),
    "shuffle_pattern": ("BA", "NA", "B", "A"),
    "sampling_type": ("all", "random", "spatial"),
    "magnitude_type": ("similarity", "cosine", "distance", "euclidean", "matmul"),
    "similarity_type": ("Col", "Loc", "Loc_Col"),
    "aggregation_type": ("Col", "Loc_Col"),
    "dataset": (
        *("cifar10", "cifar100", "imagenet", "imagenet100", "imagenette"),
        *("mnist", "fashion_mnist", "digits", "folder"),
    ),
    "auto_augment": ("none", "rand", "trivial"),
    "amp_dtype": ("bfloat16", "float16"),
    "compile_mode": ("default", "reduce-overhead", "reduce-memory", "max-autotune"),
    "criterion": ("CrossEntropy", "MSE"),
    "optimizer": ("adam", "sgd", "adamw"),
    "scheduler": ("step", "cosine", "plateau", "none"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "kernels": ("auto", "chunked", "triton"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory: no ./Data, and what is written shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*argv: str) -> Options:
    """Options of a command line, given as words or as one text."""
    argv = shlex.split(argv[0]) if len(argv) == 1 else argv
    return parse_options(PROGRAMS["allconvnet_main.py"], "Train.", list(argv))[0]


def parse_yaml(text: str, *argv: str) -> Options:
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse("--config", "c.yaml", *argv)


def values(*argv: str) -> dict:
    return parse(*argv).as_dict()


def error_of(call, *args, capsys) -> str:
    """The one line on stderr that a command line ends in, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    return err.strip()


def assert_says(line: str, fragments: str) -> None:
    """`fragments` are separated by "; "."""
    for fragment in fragments.split("; "):
        assert re.search(rf"(?<!\w){re.escape(fragment)}(?!\w)", line), f"{fragment!r} is not in: {line}"


def defaults_of(config: type) -> dict:
    return {f.name: f.default for f in dataclasses.fields(config)}


# --- the flags ------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_reference():
    found = values("")
    assert set(found) == set(DEFAULTS)
    for name, expected in DEFAULTS.items():
        if expected is not ...:
            assert found[name] == expected and type(found[name]) is type(expected), name
    assert type(found["num_workers"]) is int and 0 <= found["num_workers"] <= 8


def test_flags_are_those_of_the_reference_and_no_others():
    _, parser = parse_options(PROGRAMS["allconvnet_main.py"], "Train.", [])
    found = {flag for action in parser._actions for flag in action.option_strings}
    flags = {f"--{name}" for name in DEFAULTS if name not in NOTED} | {f"--no-{name}" for name in BOOLEANS}
    assert found == {"-h", "--help", "--config"} | flags


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_those_of_the_reference(name, capsys):
    Path("val").mkdir()
    Path("train/a").mkdir(parents=True)
    Path("train/b").mkdir()
    for choice in CHOICES[name]:  # one layer of width 4 and K = 4: pattern B halves the map, digits are 8 x 8
        assert values(f"--channels 4 --K 4 --data_path . --{name} {choice}")[name] == choice
    line = error_of(parse, f"--{name} no-such", capsys=capsys)
    listed = re.search(r"is not one of ([^;]+)", line)[1].split(", ")
    assert sorted(listed) == sorted(CHOICES[name])


def test_layer_is_one_or_two_different_ones(capsys):
    for layer in [*LAYERS, *(f"{a}/{b}" for a in LAYERS for b in LAYERS if a != b)]:
        found = values(f"--layer {layer}")
        assert found["layer"] == layer
        assert found["output_dir"] == "./Output/AllConvNet/" + layer.replace("/", "-")
    for bad in ("ConvNNAttention", "ConvNN/ConvNN", "ConvNN/", "/ConvNN", "", "Conv2d/ConvNN/Attention", "Conv2d/Conv1d"):
        assert_says(error_of(parse, "--layer", bad, capsys=capsys), f"layer={bad!r}")


def test_sizes_follow_the_data_set():
    sizes = {"cifar10": 32, "cifar100": 32, "mnist": 28, "fashion_mnist": 28, "digits": 8}
    sizes |= dict.fromkeys(["imagenet", "imagenet100", "imagenette"], 224)
    classes = {"cifar100": 100, "imagenet": 1000, "imagenet100": 100}
    for name, size in sizes.items():
        model, data, _ = parse(f"--dataset {name}")
        assert data.resize == size and model.image_size == (size, size)
        assert model.in_channels == (1 if size in (28, 8) else 3)
        assert model.num_classes == classes.get(name, 10)
        assert parse(f"--dataset {name} --resize 48").model.image_size == (48, 48)


def test_classes_of_a_folder_are_counted(capsys):
    assert_says(error_of(parse, "--dataset folder --data_path pets", capsys=capsys), "data_path='pets'; train/; val/")
    Path("pets/train/cat").mkdir(parents=True)
    assert_says(error_of(parse, "--dataset folder --data_path pets", capsys=capsys), "data_path='pets'; train/; val/")
    Path("pets/val").mkdir()
    assert_says(error_of(parse, "--dataset folder --data_path pets", capsys=capsys), "data_path='pets'; 1; at least 2")
    Path("pets/train/notes.txt").touch()
    Path("pets/train/dog").mkdir()
    assert parse("--dataset folder --data_path pets").model.num_classes == 2


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert not stop.value.code
    for name, default in DEFAULTS.items():
        if name in NOTED:
            continue
        section = re.search(rf"^  --{name} (.*?)(?=^  --|^\S|\Z)", text, re.M | re.S)
        assert section, name
        stated = re.search(r"\(default: ([^)]*)\)", " ".join(section[1].split()))
        if name not in ("num_layers", "resize", "output_dir", "num_workers") and default is not None:
            assert stated[1] == (" ".join(map(str, default)) if isinstance(default, list) else str(default))


def test_neighbor_config_alone():
    assert defaults_of(NeighborConfig) == {name: DEFAULTS[name] for name in defaults_of(NeighborConfig)} | {
        "magnitude_type": "cosine"
    }
    names = {"similarity": "cosine", "distance": "euclidean", "cosine": "cosine", "euclidean": "euclidean", "matmul": "matmul"}
    for name, metric in names.items():
        assert parse(f"--magnitude_type {name}").model.neighbors == NeighborConfig(magnitude_type=name)
        assert NeighborConfig(magnitude_type=name).metric == metric
    assert NeighborConfig(sampling_type="spatial").sampling == "all"  # num_samples=-1
    assert NeighborConfig(sampling_type="spatial", num_samples=3).sampling == "spatial"


# --- parsing --------------------------------------------------------------------------------------------------------


def test_flags_win_over_yaml_over_defaults():
    assert parse_yaml("K: 5\nlr: 0.5\n", "--K", "7").as_dict() == values("--K 7 --lr 0.5")
    assert parse_yaml("augment: true\nuse_amp: true", "--no-augment").as_dict() == values("--use_amp")
    assert parse_yaml("channels: [8, 8]", "--channels", "4").model.channels == (4,)
    assert parse_yaml("") == parse_yaml("# nothing\n") == parse("")
    assert parse("--config", "c.yaml", "--K", "3") == parse("--K", "3", "--config", "c.yaml")


def test_a_programs_own_defaults_lose_to_yaml_and_flags():
    def lr(*argv):
        return parse_options(PROGRAMS["allconvnet_main.py"]._replace(defaults={"lr": 1e-4}), "Train.", list(argv))[0].train.lr

    Path("lr.yaml").write_text("lr: 0.3")
    assert (lr(), lr("--config", "lr.yaml"), lr("--config", "lr.yaml", "--lr", "0.2")) == (1e-4, 0.3, 0.2)


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_in_all_forms(name):
    beside = "--test_only " if name == "override" else ""  # without which it has no meaning
    for on in (f"--{name}", f"--{name} True", f"--{name} true", f"--{name}=True", f"--no-{name} --{name}"):
        assert values(beside + on)[name] is True
    for off in (f"--no-{name}", f"--{name} False", f"--{name} false", f"--{name}=False", f"--{name} --no-{name}"):
        assert values(off)[name] is False
    assert parse_yaml(f"{name}: true" + "\ntest_only: true" * bool(beside)).as_dict()[name] is True
    assert parse_yaml(f"{name}: 'False'").as_dict()[name] is False


def test_a_boolean_flag_leaves_the_next_flag_alone():
    found = values("--augment --K 4 --use_amp")
    assert found["augment"] is found["use_amp"] is True and found["K"] == 4


def test_numbers_as_yaml_and_people_write_them():
    found = parse_yaml("lr: 1e-3\nweight_decay: 1e-6\nnoise: 1\nmomentum: '.5'\nseed: '7'").as_dict()
    expected = {"lr": 1e-3, "weight_decay": 1e-6, "noise": 1.0, "momentum": 0.5, "seed": 7}
    assert {name: found[name] for name in expected} == expected
    assert all(type(found[name]) is type(value) for name, value in expected.items())
    assert values("--lr 1e-3 --noise 1 --momentum .5 --num_samples -1")["noise"] == 1.0


def test_none_where_it_is_allowed():
    optional = ("num_layers", "resize", "num_workers", "train_limit", "test_limit", "output_dir", "checkpoint", "export")
    for name in optional:
        for text in ("none", "None"):
            assert values(f"--{name} {text}") == values("")
            assert parse_yaml(f"{name}: {text}").as_dict() == values("")
        assert parse_yaml(f"{name}: null").as_dict() == values("")
    assert values("--scheduler none")["scheduler"] == "none"


def test_lists():
    assert values("--channels 8 16 --K 3")["channels"] == [8, 16]
    assert parse_yaml("channels: [8, '16']").as_dict()["channels"] == [8, 16]
    assert parse_yaml("channels:\n- 8\n- 16\n").model.num_layers == 2
    assert values("--channels 8 16 --num_layers 2")["num_layers"] == 2


def test_texts_are_not_taken_for_numbers_and_truth_values():
    for text in ("no", "off", "Yes", "1_0", "0x10", "1:30", "010", "2_0.5"):
        assert parse_yaml(f"output_dir: {text}").as_dict()["output_dir"] == text
        assert parse_yaml(yaml.safe_dump({"output_dir": text})).as_dict()["output_dir"] == text
    found = parse_yaml(
        "seed: 0\nlr: 0.5\nmomentum: .5\nnoise: 1.\nweight_decay: 2.5e-3\naugment: TRUE\nbatch_size: +7"
    ).as_dict()
    expected = {"seed": 0, "lr": 0.5, "momentum": 0.5, "noise": 1.0, "weight_decay": 0.0025, "augment": True, "batch_size": 7}
    assert {name: found[name] for name in expected} == expected


def test_a_variable_for_kernels_that_are_not_there_is_one_line(monkeypatch, capsys):
    from kernels.backend import BACKENDS

    assert KERNELS_IN_ENVIRONMENT == BACKENDS
    monkeypatch.setenv("CONVNN_KERNELS", "bad")
    assert_says(error_of(parse, "", capsys=capsys), "CONVNN_KERNELS='bad'; auto, chunked, triton, reference")


def test_a_run_takes_one_file_of_options(capsys):
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text("K: 3")
    assert parse("--config a.yaml --config a.yaml").model.K == 3
    line = error_of(parse, "--config a.yaml --lr 1 --config b.yaml", capsys=capsys)
    assert_says(line, "--config; more than once; a.yaml, b.yaml")


# --- errors ---------------------------------------------------------------------------------------------------------

# Command line, and what the one line must say: the flag, the value, and what would work.
BAD = [
    # unknown
    ("--chan 3", "--chan; did you mean --channels?"),
    ("--chan=3", "--chan; did you mean --channels?"),
    ("--num_epoch 3", "--num_epoch; did you mean --num_epochs?"),
    ("--k 3", "--k; did you mean --K?"),
    ("-K 3", "-K; did you mean --K?"),
    ("--use-amp", "--use-amp; did you mean --use_amp?"),
    ("--no-lr", "--no-lr"),
    ("--d_model 3", "--d_model"),
    ("stray", "'stray'"),
    ("K=3", "'K=3'"),
    ("--num_epochs 3 stray", "'stray'"),
    ("--layer ConvNN Attention", "'Attention'"),
    ("--layer convNN", "layer='convNN'; did you mean ConvNN?; Conv2d, ConvNN, ConvNN_Attn, Attention"),
    ("--layer K=3", "layer='K=3'"),
    ("--dataset mnits", "dataset='mnits'; did you mean mnist?; cifar10"),
    ("--dataset MNIST", "dataset='MNIST'; did you mean mnist?"),
    ("--similarity_type loc", "similarity_type='loc'; did you mean Loc?; Col, Loc, Loc_Col"),
    # types
    ("--K", "--K; expected one argument"),
    ("--K x", "K='x'; whole number"),
    ("--K 2.5", "K='2.5'; whole number"),
    ("--K 3.0", "K='3.0'; whole number"),
    ("--K none", "K='none'; whole number"),
    ("--num_epochs 1e2", "num_epochs='1e2'; whole number"),
    ("--lr fast", "lr='fast'; number"),
    ("--K 1_0", "K='1_0'; whole number; plain decimal digits"),
    ("--K 0x10", "K='0x10'; whole number; plain decimal digits"),
    ("--K 010", "K='010'; whole number; plain decimal digits"),
    ("--K ' 3'", "K=' 3'; whole number"),
    ("--K \u0663", "K='\u0663'; whole number"),
    ("--channels 8 1_6", "channels='1_6'; whole number"),
    ("--lr 1_0.5", "lr='1_0.5'; number; plain decimal digits"),
    ("--lr 1e-0_3", "lr='1e-0_3'; number"),
    ("--channels", "--channels; at least one"),
    ("--channels 8 x", "channels='x'; whole number"),
    ("--channels 8,16", "channels='8,16'; whole number"),
    ("--auto_augment randaugment", "auto_augment='randaugment'; none, rand, trivial"),
    ("--random_erasing 1.1", "random_erasing=1.1; 1"),
    ("--random_erasing -0.1", "random_erasing=-0.1; 0"),
    ("--augment maybe", "augment='maybe'; True or False"),
    ("--augment 1", "augment='1'; True or False"),
    ("--no-augment True", "'True'"),
    ("--lr nan", "lr=nan; finite"),
    ("--lr inf", "lr=inf; finite"),
    ("--lr -inf", "lr=-inf; finite"),
    ("--lr 1e999", "lr=inf; finite"),
    ("--branch_ratio nan", "branch_ratio=nan; finite"),
    ("--checkpoint ''", "checkpoint=''; empty"),
    ("--output_dir ''", "output_dir=''; empty"),
    ("--config ''", "--config ''"),
    # ranges
    ("--K 0", "K=0; at least 1"),
    ("--K -3", "K=-3; at least 1"),
    ("--channels 8 0", "channels=0; at least 1"),
    ("--kernel_size 0", "kernel_size=0; at least 1"),
    ("--num_heads 0", "num_heads=0; at least 1"),
    ("--shuffle_scale 0", "shuffle_scale=0; at least 1"),
    ("--padding -1", "padding=-1; at least 0"),
    ("--sample_padding -1", "sample_padding=-1; at least 0"),
    ("--num_samples 0", "num_samples=0; at least 1; -1"),
    ("--num_samples -2", "num_samples=-2; at least -1"),
    ("--branch_ratio 1.5", "branch_ratio=1.5; at least 0; at most 1"),
    ("--lambda_param -0.5", "lambda_param=-0.5; at least 0; at most 1"),
    ("--lr -1e-3", "lr=-0.001; at least 0"),
    ("--val_fraction 1", "val_fraction=1.0; below 1"),
    ("--label_smoothing 1.5", "label_smoothing=1.5; below 1"),
    ("--ema_decay 1", "ema_decay=1.0; below 1"),
    ("--momentum -.5", "momentum=-0.5; at least 0"),
    ("--noise -1", "noise=-1.0; at least 0"),
    ("--batch_size 0", "batch_size=0; at least 1"),
    ("--num_epochs 0", "num_epochs=0; at least 1"),
    ("--train_limit 0", "train_limit=0; at least 1"),
    ("--num_workers -1", "num_workers=-1; at least 0"),
    ("--seed -1", "seed=-1; at least 0"),
    ("--seed 2147483648", "seed=2147483648; below 2147483648"),
    # no run reaches these
    ("--lr 1e300", "lr=1e+300; at least 0; at most 1e+38"),
    ("--noise 1e300", "noise=1e+300; at most 1000"),
    ("--mixup 1e-300", "mixup=1e-300; 0; at least 0.001"),
    ("--cutmix 1001", "cutmix=1001.0; at most 1000"),
    (f"--batch_size 1{30 * '0'}", f"batch_size=1{30 * '0'}; at most 10000000"),
    ("--num_layers 1000000000", "num_layers=1000000000; at most 10000"),
    ("--num_workers 100000", "num_workers=100000; at most 1024"),
    ("--resize 100000", "resize=100000; at most 16384"),
    # neighbors: the default is 32 x 32 with BA and scale 2, so 16 x 16 tokens
    ("--K 257", "K=257; 256 tokens; 1 to 256"),
    ("--K 325 --padding 1", "K=325; 1 to 324"),
    ("--K 257 --padding 1 --layer ConvNN_Attn", "K=257; 1 to 256"),
    ("--K 1025 --shuffle_pattern NA", "K=1025; 1 to 1024"),
    ("--K 65 --shuffle_scale 4", "K=65; 1 to 64"),
    ("--K 17 --dataset digits", "K=17; 1 to 16"),
    ("--K 257 --layer Conv2d/ConvNN", "K=257; 1 to 256"),
    ("--K 257 --sampling_type random", "K=257; 1 to 256"),  # num_samples=-1 means all
    ("--sampling_type random --num_samples 8", "K=9; num_samples=8; sampling_type=random; 1 to 8"),
    ("--sampling_type random --num_samples 257", "num_samples=257; 256 tokens"),
    ("--sampling_type random --num_samples 325 --padding 1", "num_samples=325; 324 tokens"),
    ("--sampling_type spatial --num_samples 2", "K=9; num_samples=2; sampling_type=spatial; 1 to 4"),
    ("--sampling_type spatial --num_samples 3 --K 10", "K=10; num_samples=3; 1 to 9"),
    ("--sampling_type spatial --num_samples 17", "num_samples=17; 16 x 16; at most 16"),
    ("--sampling_type spatial --num_samples 19 --padding 1", "num_samples=19; 18 x 18; at most 18"),
    ("--sampling_type spatial --num_samples 11 --sample_padding 3", "num_samples=11; sample_padding=3; at most 10"),
    ("--sampling_type spatial --num_samples 3 --sample_padding 8", "num_samples=3; sample_padding=8; at most 0"),
    # heads divide the channels that attention runs on: times 4 under A and BA
    ("--layer Attention --num_heads 3", "num_heads=3; 128"),
    ("--layer Attention --num_heads 64 --shuffle_pattern NA", "num_heads=64; 32"),
    ("--layer Attention --num_heads 64 --shuffle_pattern B", "num_heads=64; 32"),
    ("--layer Conv2d/Attention --num_heads 128", "num_heads=128; 64"),
    ("--layer Conv2d/Attention --num_heads 3 --branch_ratio 1", "num_heads=3; 128"),
    ("--layer Attention/Conv2d --num_heads 3 --branch_ratio 0", "num_heads=3; 128"),
    # shapes
    ("--dataset mnist --shuffle_scale 3", "shuffle_scale=3; 28 x 28"),
    ("--resize 33", "shuffle_scale=2; 33 x 33; resize"),
    ("--shuffle_scale 3 --layer Attention", "shuffle_scale=3; 32 x 32"),
    ("--shuffle_scale 3 --layer Conv2d/ConvNN_Attn", "shuffle_scale=3; 32 x 32"),
    ("--shuffle_pattern B --dataset mnist --K 1", "shuffle_scale=2; 7 x 7"),  # 28, 14, 7
    ("--shuffle_pattern B", "K=9; 1 to 4"),  # 16 x 16, 8 x 8, 4 x 4, 2 x 2 tokens
    ("--shuffle_pattern A --layer Conv2d/ConvNN", "shuffle_pattern=A; Conv2d; BA or NA"),
    ("--shuffle_pattern B --layer Attention/Conv2d", "shuffle_pattern=B; Conv2d; BA or NA"),
    ("--num_layers 3", "num_layers=3; channels=32 64 128 256 512"),
    ("--num_layers 1 --channels 8 8", "num_layers=1; channels=8 8"),
    ("--layer Conv2d/ConvNN --channels 1", "channels=1; layer=Conv2d/ConvNN"),
    # training and files
    ("--accumulate_steps 257", "accumulate_steps=257; batch_size=256"),
    ("--accumulate_steps 3 --batch_size 2", "accumulate_steps=3; batch_size=2"),
    ("--warmup_epochs 5 --num_epochs 4", "warmup_epochs=5; num_epochs=4"),
    ("--checkpoint no.pt", "checkpoint='no.pt'; does not exist"),
    ("--checkpoint no.safetensors --test_only", "checkpoint='no.safetensors'; does not exist"),
    (f"--checkpoint {'x' * 300}.pt", "checkpoint; does not exist"),
    ("--checkpoint no.txt", "checkpoint='no.txt'; .pt; .safetensors"),
    ("--checkpoint .pt/", "checkpoint='.pt/'"),
    ("--export weights.pt", "export='weights.pt'; .safetensors"),
    ("--dataset folder --data_path gone", "data_path='gone'; train/; val/"),
    (f"--dataset folder --data_path {'x' * 300}", "data_path; train/; val/"),
    ("--config gone.yaml", "--config 'gone.yaml'; No such file"),
    ("--config K=3.yaml", "--config 'K=3.yaml'; No such file"),
    ("--config .", "--config '.'; directory"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line[:60] for line, _ in BAD])
def test_a_bad_command_line_ends_in_one_clear_line(line, says, folder, capsys):
    found = error_of(parse, line, capsys=capsys)
    assert "error: " in found
    assert_says(found.split("error: ", 1)[1], says)
    assert not list(folder.iterdir())  # nothing is written


BAD_YAML = [
    ("K: 3\nlr: 1\nK: 4\n", "--config 'c.yaml'; 'K'; twice"),
    ("{K: 3, K: 3}", "--config 'c.yaml'; 'K'; twice"),
    ("chanels: [8]", "--config 'c.yaml'; 'chanels'; did you mean channels?"),
    ("k: 8", "'k'; did you mean K?"),
    ("no-augment: true", "'no-augment'; did you mean augment?"),
    ("config: d.yaml", "'config'"),
    ("3: 4", "unknown key 3"),
    ("? [K, lr]\n: 3", "--config 'c.yaml'; line 1"),
    ("? {K: 3}\n: 3", "--config 'c.yaml'; line 1"),
    ("- K\n- 3\n", "--config 'c.yaml'; name: value"),
    ("just text", "--config 'c.yaml'; name: value"),
    ("0", "--config 'c.yaml'; name: value"),
    ("K: [1\n", "--config 'c.yaml'; line 1"),
    ("\tK: 3", "--config 'c.yaml'; line 1"),
    ("K: 3\n---\nK: 4\n", "--config 'c.yaml'; single document"),
    ("K: !!python/name:os.system", "--config 'c.yaml'; os.system"),
    ("[" * 5000, "--config 'c.yaml'"),
    (b"K: \xff", "--config 'c.yaml'; utf-8"),
    (b"K: \x00", "--config 'c.yaml'"),
    ("batch_size: !!int 1:30", "--config 'c.yaml'; line 1; a tag; without it"),
    ("lr: !!timestamp x", "--config 'c.yaml'; a tag"),
    ("channels: !!set {4, 8}", "--config 'c.yaml'; a tag"),
    ("!!omap [K: 3]", "--config 'c.yaml'; a tag"),
    ("K: 3.0", "K=3.0; whole number"),
    ("batch_size: 1:30", "batch_size='1:30'; whole number; plain decimal digits"),
    ("K: 1_0", "K='1_0'; whole number"),
    ("K: 0x10", "K='0x10'; whole number"),
    ("K: 0b11", "K='0b11'; whole number"),
    ("K: 010", "K='010'; whole number"),
    ("lr: 1:30.5", "lr='1:30.5'; number"),
    ("lr: 1_0.5", "lr='1_0.5'; number"),
    ("channels: [8, 1:30]", "channels='1:30'; whole number"),
    ("augment: yes", "augment='yes'; True or False"),
    ("augment: off", "augment='off'; True or False"),
    ("K: true", "K=True; whole number"),
    ("K: null", "K=None; whole number"),
    ("K: [3]", "K=[3]; whole number"),
    ("K: &again [*again]", "--config 'c.yaml'; line 1; an alias; again"),
    ("".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)), "--config 'c.yaml'; an alias; a0"),
    ("base: &base {K: 3}\n<<: *base\n", "--config 'c.yaml'; line 2; an alias"),
    ("# " + 10**5 * "x", "--config 'c.yaml'; larger than 100,000 bytes"),
    (f"? {5000 * 'x'}\n: 1", "--config 'c.yaml'; unknown key"),
    ("K: 0", "K=0; at least 1"),
    ("seed: none", "seed='none'; whole number"),
    ("lr: true", "lr=True; number"),
    ("lr: .nan", "lr=nan; finite"),
    ("lr: -.inf", "lr=-inf; finite"),
    ("lr: 1e999", "lr=inf; finite"),
    ("lr: {a: 1}", "lr={'a': 1}; number"),
    ("augment: maybe", "augment='maybe'; True or False"),
    ("augment: 1", "augment=1; True or False"),
    ("channels: 32", "channels=32; list"),
    ("channels: 32 64", "channels='32 64'; list"),
    ("channels: []", "channels=(); at least one"),
    ("channels: [8, 6.5]", "channels=6.5; whole number"),
    ("channels: [[8]]", "channels=[8]; whole number"),
    ("layer: 3", "layer=3; text"),
    ("layer: [Conv2d, ConvNN]", "layer=['Conv2d', 'ConvNN']; text"),
    ("scheduler: null", "scheduler=None; text"),
    ("checkpoint: ''", "checkpoint=''; empty"),
    ("export: weights.pt", "export='weights.pt'; .safetensors"),
    ("K: 257", "K=257; 1 to 256"),
]


@pytest.mark.parametrize(("text", "says"), BAD_YAML, ids=[str(text)[:40] for text, _ in BAD_YAML])
def test_a_bad_yaml_file_ends_in_one_clear_line(text, says, capsys):
    assert_says(error_of(parse_yaml, text, capsys=capsys), says)


@pytest.mark.parametrize(
    "line",
    [
        "--layer Conv2d --K 9999",
        "--layer Conv2d --shuffle_scale 5",
        "--layer Conv2d --num_heads 7",
        "--layer Conv2d --shuffle_pattern A",
        "--layer Conv2d --shuffle_pattern B --resize 33",
        "--layer Conv2d --sampling_type random --num_samples 9999",
        "--layer Conv2d --sampling_type spatial --num_samples 2",
        "--layer ConvNN --num_heads 7",
        "--layer ConvNN --channels 1 --branch_ratio 0.3",
        "--layer ConvNN_Attn --padding 1 --num_heads 7",
        "--layer Attention --K 9999",
        "--layer Attention --sampling_type random --num_samples 2",
        "--layer Conv2d/Attention --K 9999",
        "--shuffle_pattern NA --shuffle_scale 5",
        "--shuffle_pattern A --shuffle_scale 3 --channels 8 8",
        "--shuffle_pattern A --layer ConvNN/Attention --channels 8 8",
        "--sample_padding 99",
        "--sample_padding 99 --sampling_type random --num_samples 9",
        # one branch only
        "--layer Conv2d/ConvNN --branch_ratio 0 --K 9999",
        "--layer ConvNN/Conv2d --branch_ratio 1 --K 9999",
        "--layer ConvNN/Attention --branch_ratio 0 --num_heads 7",
        "--layer Attention/ConvNN --branch_ratio 1 --num_heads 7",
        "--layer Conv2d/ConvNN --branch_ratio 0 --shuffle_pattern A",
        "--layer Conv2d/ConvNN --branch_ratio 1 --shuffle_pattern A",
        "--layer ConvNN/Conv2d --branch_ratio 1 --channels 1",
        # at the limits
        "--K 256",
        "--K 324 --padding 1",
        "--K 1024 --shuffle_pattern NA",
        "--sampling_type random --num_samples 9",
        "--sampling_type random --num_samples 256 --K 256",
        "--sampling_type spatial --num_samples 3",
        "--sampling_type spatial --num_samples 18 --padding 1",
        "--sampling_type spatial --num_samples 10 --sample_padding 3",
        "--sampling_type spatial --num_samples 1 --sample_padding 3 --K 1",
        "--layer Attention --num_heads 128",
        "--layer Attention --num_heads 128 --shuffle_pattern A",
        "--layer Conv2d/Attention --num_heads 64",
        "--shuffle_pattern B --channels 8 8 8",
        "--accumulate_steps 256",
        "--branch_ratio 0",
        "--branch_ratio 1",
        "--lr 0 --seed 2147483647 --lambda_param 1 --save_minutes 0 --num_workers 0",
    ],
)
def test_relations_hold_only_for_the_layer_in_use(line):
    expected = dict(pair.split(" ", 1) for pair in line[2:].split(" --"))
    found = values(line)
    for name, text in expected.items():
        value = found[name]
        assert " ".join(map(str, value)) == text if isinstance(value, list) else type(value)(text) == value


def test_checkpoints_by_suffix():
    for name in ("a.pt", "a.pth", "a.safetensors"):
        Path(name).touch()
        assert values(f"--checkpoint {name}")["checkpoint"] == name
    assert values("--export a.safetensors")["export"] == "a.safetensors"


def test_configs_raise_value_error_and_name_the_option():
    for config, bad in [
        (NeighborConfig, {"K": 0}),
        (NeighborConfig, {"sampling_type": "random", "num_samples": 3}),
        (AllConvNetConfig, {"K": 257}),
        (AllConvNetConfig, {"channels": (8, "8")}),
        (DataConfig, {"dataset": "cifar"}),
        (TrainConfig, {"lr": math.nan}),
        (TrainConfig, {"use_amp": 1}),
    ]:
        with pytest.raises(ValueError, match=next(iter(bad))):
            config(**bad)


@pytest.mark.parametrize("config", [AllConvNetConfig, ViTConfig, DataConfig, TrainConfig, BenchmarkConfig])
def test_every_number_has_an_upper_bound(config):
    for name, spec in specs(config).items():
        bounds = (spec.high, spec.below)
        assert spec.kind in (str, bool) or any(bound is not None and math.isfinite(bound) for bound in bounds), name
        if spec.kind is float and spec.high is not None:
            assert spec.high <= 1e38, name  # float32 holds it


@pytest.mark.parametrize("model", [AllConvNetConfig, ViTConfig])
@pytest.mark.parametrize(
    "bad",
    [
        {"num_classes": -3},
        {"num_classes": 0},
        {"num_classes": 2.0},
        {"in_channels": 0},
        {"in_channels": True},
        {"image_size": 0},
        {"image_size": (32, -1)},
        {"image_size": "32"},
        {"image_size": (32, 32, 32)},
        {"image_size": 10**6},
    ],
)
def test_what_the_data_set_decides_is_checked_too(model, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"^{name}="):
        model(**bad)


def test_numbers_of_numpy_are_numbers():
    model = AllConvNetConfig(K=np.int64(4), lambda_param=np.float32(0.25), num_classes=np.int8(3), image_size=np.int32(16))
    assert (model.K, model.lambda_param, model.num_classes, model.image_size) == (4, 0.25, 3, (16, 16))
    assert {type(value) for value in (model.K, model.num_classes, *model.image_size)} == {int}
    assert type(model.lambda_param) is float and type(TrainConfig(lr=np.int64(1)).lr) is float
    for bad in (np.float64(4), np.bool_(True), np.array([4]), "4", None):
        with pytest.raises(ValueError, match="K="):
            AllConvNetConfig(K=bad)


def test_a_pipe_a_device_and_a_link_to_itself_as_config(capsys):
    os.mkfifo("pipe.yaml")
    os.symlink("loop.yaml", "loop.yaml")
    for name, says in [
        ("pipe.yaml", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("loop.yaml", "Too many levels of symbolic links"),
    ]:
        assert_says(error_of(parse, "--config", name, capsys=capsys), f"--config {name!r}; {says}")


# --- YAML and back --------------------------------------------------------------------------------------------------


@st.composite
def settings_of_a_run(draw):
    """Any values that go together, on maps of 8 x 8 tokens or more."""
    pattern = draw(st.sampled_from(["BA", "NA", "A"]))
    pairs = st.permutations(LAYERS).map(lambda names: "/".join(names[:2]))
    layer = draw(st.sampled_from(LAYERS) | pairs.filter(lambda pair: pattern != "A" or "Conv2d" not in pair))
    sampling = draw(st.sampled_from(CHOICES["sampling_type"]))
    samples = {"all": st.just(-1), "random": st.integers(9, 64), "spatial": st.integers(3, 4)}[sampling]
    fractions = st.floats(0, 1, exclude_max=True)
    positive = st.floats(0, 1e6)
    text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1)
    given = {
        "layer": st.just(layer),
        "channels": st.lists(st.integers(1, 9).map(lambda n: 32 * n), min_size=1, max_size=2),
        "shuffle_pattern": st.just(pattern),
        "shuffle_scale": st.sampled_from([1, 2, 4]),
        "num_heads": st.sampled_from([1, 2, 4, 8]),
        "branch_ratio": st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        "padding": st.integers(0, 3),
        "K": st.integers(1, 9),
        "sampling_type": st.just(sampling),
        "num_samples": samples,
        "sample_padding": st.integers(0, 2),
        "resize": st.sampled_from([32, 48]),
        "batch_size": st.integers(8, 10**7),
        "accumulate_steps": st.integers(1, 8),
        "num_epochs": st.integers(5, 10**6),
        "warmup_epochs": st.integers(0, 5),
        "seed": st.integers(0, 2**31 - 1),
        "num_workers": st.none() | st.integers(0, 9),
        "train_limit": st.none() | st.integers(1, 10**9),
        "data_path": text,
        "output_dir": text.filter(lambda text: text not in ("none", "None")),
        "export": st.none() | text.map(lambda text: text + ".safetensors"),
        **{name: st.booleans() for name in BOOLEANS if name not in ("test_only", "override")},
        **dict.fromkeys(("val_fraction", "label_smoothing", "momentum", "lr_gamma", "ema_decay"), fractions),
        **dict.fromkeys(("lr", "weight_decay", "clip_grad_norm", "save_minutes"), positive),
        **dict.fromkeys(("mixup", "cutmix"), st.just(0.0) | st.floats(1e-3, 1e3)),
        **{
            name: st.sampled_from(choices)
            for name, choices in CHOICES.items()
            if name not in ("shuffle_pattern", "sampling_type", "dataset", "convolution_type")
        },
        "convolution_type": st.sampled_from(["standard", "depthwise-separable"]),
        "model": st.sampled_from(CHOICES["model"] if pattern == "NA" else ["allconvnet"]),
        "replace": st.sampled_from([["all"], ["last", "3"], ["stages", "1", "3"]]),
        "classifier_width": st.none() | st.integers(1, 9),
    }
    return draw(st.fixed_dictionaries(given))


def as_argv(settings: dict) -> list[str]:
    argv = []
    for name, value in settings.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={value}")
    return argv


@given(settings=settings_of_a_run())
def test_options_survive_yaml(settings, tmp_path_factory):
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    first = parse("--K=1", *as_argv(settings))
    found = first.as_dict()
    assert {name: found[name] for name in settings if settings[name] is not None} == {
        name: value for name, value in settings.items() if value is not None
    }
    for plain in (found, settings):  # what a run writes, and what a person would
        file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        assert parse("--config", str(file)) == first
    assert list(yaml.safe_load(yaml.safe_dump(found, sort_keys=False))) == list(found)


# --- presets --------------------------------------------------------------------------------------------------------


def test_preset_allconvnet_states_the_defaults():
    file = ROOT / "configs/allconvnet.yaml"
    stated = yaml.safe_load(file.read_text())
    assert stated == {name: DEFAULTS[name] for name in stated} and len(stated) > 40
    assert parse("--config", str(file)) == parse("")


def test_preset_demo():
    file = ROOT / "configs/demo.yaml"
    stated, found = yaml.safe_load(file.read_text()), values("--config", str(file))
    assert found["dataset"] == "digits" and stated == {name: found[name] for name in stated}


PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_resolves_to_and_its_header_is_a_command(name):
    file = ROOT / "configs" / name
    text = file.read_text()
    header = re.match(rf"# python (\w+\.py) (--config configs/{name}.*?)(  .*)?\n#\n# \S", text)
    program, line = header[1], header[2]
    for checkpoint in re.findall(r"--checkpoint (\S+)", line):
        Path(checkpoint).touch()
    options, parser = parse_options(PROGRAMS[program], "", shlex.split(line.replace("configs/", f"{ROOT}/configs/")))
    found, stated = options.as_dict(), yaml.safe_load(text)
    names = stated.keys() - parser.given
    assert {key: found[key] for key in names} == {key: stated[key] for key in names}


RECIPES = {
    "vgg11_cifar10": ("allconvnet_main.py", {"model": "vgg11", "dataset": "cifar10", "batch_norm": True, "optimizer": "sgd"}),
    "vit_cifar10": ("vit_main.py", {"dataset": "cifar10", "patch_size": 4, "auto_augment": "trivial", "random_erasing": 0.25}),
    "finetune_224": ("vit_main.py", {"resize": 224, "layer_decay": 0.65, "decay_norms": False, "auto_augment": "rand"}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_state_nothing_that_their_model_does_not_read(name):
    program, expected = RECIPES[name]
    options = parse_options(PROGRAMS[program], "", ["--config", f"{ROOT}/configs/{name}.yaml"])[0]
    found, stated = options.as_dict(), yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    assert {key: found[key] for key in expected} == expected
    assert not stated.keys() & options.model.without_effect().keys()


# --- sizes ----------------------------------------------------------------------------------------------------------


@given(ratio=st.floats(0, 1), channels=st.integers(2, 600))
def test_branches_share_the_channels(ratio, channels):
    config = AllConvNetConfig(layer="Conv2d/ConvNN", branch_ratio=ratio, channels=(channels,))
    found = config.branches(channels)
    if ratio in (0, 1):
        assert found == [(("Conv2d", "ConvNN")[int(ratio)], channels)]
    else:
        (first, rest), (second, share) = found
        assert (first, second) == ("Conv2d", "ConvNN")
        assert rest + share == channels and rest >= 1 and share >= 1
        assert abs(share - min(max(ratio * channels, 1), channels - 1)) <= 0.5


@pytest.mark.parametrize("channels", [3, 5, 7, 9, 11, 13])
def test_of_an_odd_number_the_first_branch_gets_the_extra_one(channels):
    config = AllConvNetConfig(layer="Conv2d/ConvNN", channels=(channels,))
    assert config.branches(channels) == [("Conv2d", channels // 2 + 1), ("ConvNN", channels // 2)]
    assert branch_widths(channels, 1, 0.5) == (channels // 2 + 1, channels // 2)


def test_a_single_layer_ignores_the_ratio():
    for ratio in (0.0, 0.3, 1.0):
        assert AllConvNetConfig(layer="ConvNN", branch_ratio=ratio).branches(7) == [("ConvNN", 7)]


def test_grids():
    def grids(pattern, size=(12, 16), layer="ConvNN", **more):
        return AllConvNetConfig(layer=layer, shuffle_pattern=pattern, image_size=size, channels=(4, 4, 4), K=1, **more).grids()

    for pattern in ("NA", "BA"):
        assert grids(pattern) == [(12, 16)] * 3
    assert grids("A") == [(12, 16), (24, 32), (48, 64)]
    assert grids("A", shuffle_scale=3) == [(12, 16), (36, 48), (108, 144)]
    assert grids("B", size=(24, 16)) == [(24, 16), (12, 8), (6, 4)]
    assert grids("B", size=8, layer="ConvNN_Attn/Attention", branch_ratio=0) == [(8, 8), (4, 4), (2, 2)]
    assert grids("A", layer="Conv2d") == grids("A", layer="ConvNN/Conv2d", branch_ratio=1) == [(12, 16)] * 3
    with pytest.raises(ValueError, match="shuffle_scale=2 does not divide the 3 x 4 map"):
        grids("B")


# --- the ViT --------------------------------------------------------------------------------------------------------

# What `vit_main.py` without a flag resolves to, where it differs from `allconvnet_main.py`.
OF_ALLCONVNET = ("channels", "padding", "branch_join", "replace", "stem", "classifier_width", "batch_norm")
VIT_DEFAULTS = {name: value for name, value in DEFAULTS.items() if name not in OF_ALLCONVNET} | {
    "model": "vit",
    "layer": "Attention",
    "patch_size": 16,
    "num_layers": 8,
    "num_heads": 8,
    "d_model": 512,
    "d_mlp": 2048,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "attention_bias": True,
    "qkv_bias": None,
    "proj_bias": None,
    "pos_embedding": "sinusoidal",
    "patch_norm": True,
    "final_norm": False,
    "pool": "cls",
    "num_local_layers": None,
    "initializer_range": None,
    "convolution_type": None,
    "softmax_topk_val": True,
    "coordinate_encoding": False,
    "kernel_size": 9,
    "window_size": 16,
    "sparse_mode": "strided",
    "sparse_context_window": 14,
    "mask_type": "2d_all_neighbors",
    "expansion_step": 1,
    "dilation": 1,
    "region_size": 2,
    "top_regions": 4,
    "value_convolution": 0,
    "num_clusters": 16,
    "linformer_k": 64,
    "performer_features": 64,
    "performer_kernel": "softmax",
    "nystrom_landmarks": 32,
    "nystrom_conv_kernel": 0,
    "hybrid_window": 3,
    "hybrid_dilations": [1, 2],
    "locality_strength": 1.0,
    "branch_ratio": 0.5,
    "magnitude_type": "matmul",
    "lr": 1e-4,
    "resize": 224,
    "output_dir": "./Output/ViT/Attention",
}
for name in ("shuffle_pattern", "shuffle_scale"):
    del VIT_DEFAULTS[name]
VIT_BOOLEANS = (
    *(name for name in BOOLEANS if name not in OF_ALLCONVNET),
    "attention_bias",
    "qkv_bias",
    "proj_bias",
    "patch_norm",
    "final_norm",
    "softmax_topk_val",
    "coordinate_encoding",
)
VIT_CHOICES = {name: choices for name, choices in CHOICES.items() if name not in ("branch_join", "shuffle_pattern", "stem")} | {
    "layer": (
        *("Attention", "ConvNN", "ConvNNAttention", "Conv1d", "Conv1dAttention", "KvtAttention", "LocalAttention"),
        *("SparseAttention", "MaskedAttention", "NeighborhoodAttention", "Linformer", "Performer", "Nystromformer", "Hybrid"),
        *("GPSA", "BranchConv", "BranchAttention", "ViG", "GreedyViG", "BiFormer", "BlockTopK", "PaCa", "ContextCluster"),
    ),
    "model": ("vit", "convit_ti", "convit_ti_plus", "convit_s", "convit_s_plus", "convit_b", "convit_b_plus"),
    "pos_embedding": ("sinusoidal", "learned", "none"),
    "pool": ("cls", "mean"),
    "convolution_type": ("standard", "depthwise", "depthwise-separable"),
    "sparse_mode": ("all", "local", "strided"),
    "mask_type": ("1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors"),
    "performer_kernel": ("softmax", "relu"),
}


def parse_vit(line: str) -> Options:
    return parse_options(PROGRAMS["vit_main.py"], "Train.", shlex.split(line))[0]


def test_vit_defaults_are_those_of_the_reference():
    found = parse_vit("").as_dict()
    assert set(found) == set(VIT_DEFAULTS)
    for name, expected in VIT_DEFAULTS.items():
        if expected is not ...:
            assert found[name] == expected and type(found[name]) is type(expected), name


def test_vit_flags_are_those_of_the_reference_and_no_others():
    _, parser = parse_options(PROGRAMS["vit_main.py"], "Train.", [])
    found = {flag for action in parser._actions for flag in action.option_strings}
    negations = {f"--no-{name}" for name in VIT_BOOLEANS}
    flags = {f"--{name}" for name in VIT_DEFAULTS if name not in NOTED}
    assert found == {"-h", "--help", "--config", "--d_hidden"} | flags | negations


@pytest.mark.parametrize("name", VIT_CHOICES)
def test_vit_choices_are_those_of_the_reference(name, capsys):
    Path("val").mkdir()
    Path("train/a").mkdir(parents=True)
    Path("train/b").mkdir()
    more = "--convolution_type standard" if name == "aggregation_type" else ""
    for choice in VIT_CHOICES[name]:
        assert parse_vit(f"--data_path . {more} --{name} {choice}").as_dict()[name] == choice
    line = error_of(parse_vit, f"--{name} no-such", capsys=capsys)
    assert sorted(re.search(r"is not one of ([^;]+)", line)[1].split(", ")) == sorted(VIT_CHOICES[name])


def test_vit_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_vit("--help")
    text = capsys.readouterr().out
    assert all(f"\n  --{name} " in text for name in VIT_DEFAULTS if name not in NOTED) and "--d_hidden" in text


def test_d_hidden_is_another_name_of_d_model(capsys):
    assert parse_vit("--d_hidden 192 --num_heads 3").as_dict()["d_model"] == 192
    Path("c.yaml").write_text("d_hidden: 64")
    assert parse_vit("--config c.yaml").model.d_model == 64
    assert parse_vit("--config c.yaml --d_model 32").model.d_model == 32
    Path("c.yaml").write_text("d_hidden: 64\nd_model: 32")
    assert_says(error_of(parse_vit, "--config c.yaml", capsys=capsys), "'d_hidden'; 'd_model'; drop one")


def test_coordinate_encoding_is_short_for_loc_col():
    assert parse_vit("--coordinate_encoding").model == parse_vit("--coordinate_encoding --similarity_type Loc_Col").model
    assert parse_vit("--coordinate_encoding").model.neighbors.similarity_type == "Loc_Col"
    assert parse_vit("").model.neighbors == NeighborConfig(magnitude_type="matmul")


def test_coordinate_encoding_and_what_it_is_short_for_give_way_to_either_flag():
    """config.yaml of a run holds both."""
    Path("c.yaml").write_text(yaml.safe_dump(parse_vit("--coordinate_encoding").as_dict()))
    assert parse_vit("--config c.yaml --similarity_type Col").model == ViTConfig()
    assert parse_vit("--config c.yaml --no-coordinate_encoding").model == ViTConfig()
    for same in ("--coordinate_encoding", "--similarity_type Loc_Col"):
        assert parse_vit(f"--config c.yaml {same}") == parse_vit("--config c.yaml")
    Path("c.yaml").write_text("similarity_type: Loc_Col\n")
    assert parse_vit("--config c.yaml --no-coordinate_encoding").model.similarity_type == "Loc_Col"
    trained = parse_vit("--layer ConvNNAttention --coordinate_encoding").as_dict()
    found, changes = as_trained(PROGRAMS["vit_main.py"], {"similarity_type": "Col"}, trained)
    assert found.model == ViTConfig(layer="ConvNNAttention")
    assert changes.keys() == {"similarity_type", "coordinate_encoding"}


CONVIT = {"ti": (192, 4), "ti_plus": (256, 4), "s": (432, 9), "s_plus": (576, 9), "b": (768, 16), "b_plus": (1024, 16)}


@pytest.mark.parametrize("size", CONVIT)
def test_a_convit_is_its_flags(size):
    """arXiv 2103.10697: 12 layers, 10 of them local, an MLP of four times the features."""
    dim, heads = CONVIT[size]
    options = parse_vit(f"--model convit_{size}")
    expected = parse_vit(
        f"--layer GPSA --num_layers 12 --num_local_layers 10 --num_heads {heads} --d_model {dim} --d_mlp {4 * dim} --dropout 0 "
        "--attention_dropout 0 --no-attention_bias --pos_embedding learned --no-patch_norm --final_norm "
        "--initializer_range 0.02"
    )
    rest = {"model": f"convit_{size}", "output_dir": f"./Output/ViT/convit_{size}"}
    assert options.as_dict() == expected.as_dict() | rest
    assert ViTConfig(model=f"convit_{size}").d_mlp == 4 * dim


def test_flags_beside_a_convit_override_it():
    """Those with the default of a ViT too, and those of a YAML file."""
    Path("c.yaml").write_text("model: convit_ti\ndropout: 0.1\n")
    model = parse_vit("--config c.yaml --num_layers 8 --num_local_layers none --d_hidden 512 --pool mean").model
    assert (model.layer, model.num_layers, model.num_local_layers, model.d_model, model.d_mlp) == ("GPSA", 8, None, 512, 768)
    assert (model.num_heads, model.dropout, model.attention_dropout, model.pool) == (4, 0.1, 0.0, "mean")
    # a model on the command line is not the model of the file, whose flags say nothing of it
    Path("run.yaml").write_text(yaml.safe_dump(parse_vit("--model convit_ti --resize 64 --K 5").as_dict()))
    model = parse_vit("--config run.yaml --model convit_s --dropout 0.3").model
    assert model == ViTConfig(model="convit_s", image_size=64, K=5, dropout=0.3)
    assert parse_vit("--config run.yaml --model vit").model == ViTConfig(image_size=64, K=5)
    assert parse_vit("--config run.yaml --model convit_ti --num_heads 8").model.num_heads == 8
    # and a file that names no model says what it says of any
    Path("small.yaml").write_text("num_layers: 11\nd_model: 48\n")
    assert parse_vit("--config small.yaml --model convit_ti").model == ViTConfig(model="convit_ti", num_layers=11, d_model=48)
    smaller = dataclasses.replace(ViTConfig(model="convit_s"), num_layers=12, layer="Attention")
    assert (smaller.layer, smaller.num_heads, smaller.d_model) == ("Attention", 9, 432)
    first = parse_vit("--model convit_ti --num_heads 8 --d_model 512")
    Path("c.yaml").write_text(yaml.safe_dump(first.as_dict(), sort_keys=False))
    assert parse_vit("--config c.yaml") == first


def test_what_a_model_decides_is_what_may_be_left_to_it():
    """In a dataclass that inherits the options too; there an option with a default of its own is not left to the model."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(ViTConfig):
        d_mlp: int = option(64, "hidden features")

    fields = ViTConfig.__dataclass_fields__
    left = {name for name, spec in specs(ViTConfig).items() if fields[name].default is not spec.default}
    assert all(set(values) in (left, set()) for values in VIT_MODELS.values())
    one, two = Other(model="convit_ti", num_heads=2), Other(num_heads=2, dropout=0.1)
    assert (one.layer, one.num_layers, one.dropout, one.num_heads, one.d_mlp) == ("GPSA", 12, 0.0, 2, 64)
    assert (two.layer, two.num_layers, two.dropout, two.num_heads, two.d_mlp) == ("Attention", 8, 0.1, 2, 64)
    assert dataclasses.replace(one, model="vit").num_layers == 12  # a replacement gives all that there is


def test_vit_options_survive_yaml():
    line = (
        "--layer BranchConv --d_hidden 96 --num_heads 4 --num_local_layers 3 --no-attention_bias --hybrid_dilations 1 3 "
        "--coordinate_encoding --convolution_type standard --aggregation_type Loc_Col --resize 64 --lr 3e-4"
    )
    first = parse_vit(line)
    Path("c.yaml").write_text(yaml.safe_dump(first.as_dict(), sort_keys=False))
    assert parse_vit("--config c.yaml") == first


def test_vit_sizes():
    config = ViTConfig(image_size=(32, 48), patch_size=16)
    assert config.image_size == (32, 48) and config.grid == (2, 3) and config.class_tokens == 1
    assert ViTConfig(pool="mean").class_tokens == 0 == ViTConfig(num_local_layers=0).class_tokens
    assert ViTConfig(image_size=64).image_size == (64, 64)
    assert parse_vit("--dataset digits --resize none --patch_size 2").data.resize == 8


VIT_BAD = [
    ("--layer ConvNN_Attn", "layer='ConvNN_Attn'; did you mean ConvNNAttention?"),
    ("--model convit", "model='convit'"),
    ("--patch_size 15", "patch_size=15; 224 x 224; resize"),
    ("--num_heads 7", "num_heads=7; d_model=512"),
    ("--d_hidden 100", "num_heads=8; d_model=100"),
    ("--num_local_layers 8", "num_local_layers=8; num_layers=8"),
    ("--model convit_ti --num_layers 6", "num_local_layers=10; num_layers=6; a smaller number"),
    ("--layer Hybrid --hybrid_window 4", "hybrid_window=4; odd"),
    ("--layer Hybrid --hybrid_dilations 1 5", "hybrid_window=3; hybrid_dilations=5; 14 x 14; at most 14"),
    ("--expansion_step -1", "expansion_step=-1; at least 0"),
    ("--linformer_k 0", "linformer_k=0; at least 1"),
    ("--nystrom_landmarks 0", "nystrom_landmarks=0; at least 1"),
    ("--performer_features 0", "performer_features=0; at least 1"),
    ("--performer_kernel gelu", "performer_kernel='gelu'; softmax, relu"),
    ("--locality_strength -1", "locality_strength=-1.0; at least 0"),
    ("--num_local_layers -1", "num_local_layers=-1; at least 0"),
    ("--layer ConvNNAttention --K 198", "K=198; 1 to 197"),
    ("--layer ConvNN --K 197 --pool mean", "K=197; 1 to 196"),
    ("--layer ConvNN --K 197 --num_local_layers 2", "K=197; 1 to 196"),
    ("--layer KvtAttention --K 198", "K=198; 197 tokens; 1 to 197"),
    ("--layer BranchConv --K 198", "K=198; 1 to 197"),
    ("--layer ConvNNAttention --K 34 --sampling_type random --num_samples 32", "K=34; 33; num_samples=32"),
    ("--layer ConvNNAttention --sampling_type random --num_samples 197", "num_samples=197; 196"),
    ("--layer ConvNNAttention --sampling_type spatial --num_samples 15", "num_samples=15; 14 x 14; at most 14"),
    ("--layer ConvNNAttention --aggregation_type Loc_Col", "aggregation_type=Loc_Col; convolution_type=standard"),
    ("--layer BranchAttention --aggregation_type Loc_Col", "aggregation_type=Loc_Col"),
    ("--layer ConvNN --coordinate_encoding --similarity_type Loc", "coordinate_encoding=True; similarity_type=Loc_Col"),
    ("--layer ConvNN --topk gumbel --similarity_type Loc", "topk=gumbel; similarity_type=Loc; topk=hard"),
    ("--layer BranchConv --topk gumbel --no-softmax_topk_val", "topk=gumbel; softmax_topk_val=True; topk=hard"),
    ("--layer NeighborhoodAttention --kernel_size 4", "kernel_size=4; odd"),
    ("--layer NeighborhoodAttention --kernel_size 15", "kernel_size=15; dilation=1; 14 x 14; at most 14"),
    ("--layer NeighborhoodAttention --kernel_size 5 --dilation 3", "kernel_size=5; dilation=3; 15; at most 14"),
    ("--layer BiFormer --value_convolution 4", "value_convolution=4; odd"),
    ("--layer BiFormer --value_convolution 29", "value_convolution=29; 14 x 14; at most 27"),
    ("--value_convolution -1", "value_convolution=-1; at least 0"),
    ("--layer BranchConv --branch_ratio 0.3", "branch_ratio=0.3; d_model=512; 154 + 358; num_heads=8"),
    ("--layer BranchAttention --branch_ratio 0.001", "branch_ratio=0.001; 1 + 511"),
    ("--initializer_range 0", "initializer_range=0; above 0"),
    ("--window_size -1", "window_size=-1; at least 0"),
    ("--sparse_context_window 0", "sparse_context_window=0; at least 1"),
    ("--dropout 1", "dropout=1.0; below 1"),
    ("--channels 3", "--channels"),
    ("--d_modell 3", "--d_modell; did you mean --d_model?"),
]


@pytest.mark.parametrize(("line", "says"), VIT_BAD, ids=[line for line, _ in VIT_BAD])
def test_a_bad_vit_command_line_ends_in_one_clear_line(line, says, folder, capsys):
    assert_says(error_of(parse_vit, line, capsys=capsys).split("error: ", 1)[1], says)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "line",
    [
        "--K 9999",
        "--kernel_size 4",
        "--coordinate_encoding --similarity_type Loc",
        "--layer Conv1d --kernel_size 4 --K 9999",
        "--layer KvtAttention --aggregation_type Loc_Col --sampling_type random --num_samples 9999",
        "--layer NeighborhoodAttention --branch_ratio 0.3 --K 9999",
        "--layer BranchAttention --branch_ratio 0 --K 9999",
        "--layer ConvNN --num_local_layers 0 --K 9999",
        "--layer BranchConv --branch_ratio 1 --kernel_size 4",
        "--layer ConvNNAttention --K 33 --sampling_type random --num_samples 32",
        "--layer ConvNNAttention --K 5 --sampling_type spatial --num_samples 2",
    ],
)
def test_options_that_the_layer_does_not_use_are_accepted(line):
    assert parse_vit(line)


VIT_PRESETS = {
    "vit_tiny": {"patch_size": 16, "num_layers": 12, "num_heads": 3, "d_model": 192, "d_mlp": 768, "attention_bias": False}
    | {"layer": "Attention", "resize": 224, "num_epochs": 150},
    "vit_tiny_convnn": {"layer": "ConvNNAttention", "num_heads": 1, "convolution_type": "depthwise", "K": 9, "num_layers": 12}
    | {"patch_size": 16, "d_model": 192, "d_mlp": 768, "attention_bias": False, "resize": 224, "num_epochs": 150},
    "vit_b16": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "d_model": 768, "d_mlp": 3072, "dropout": 0.1}
    | {"pos_embedding": "learned", "final_norm": True, "patch_norm": False, "resize": 224},
    "vit_cifar_small": {"resize": 32, "patch_size": 4, "d_model": 48, "num_layers": 4, "num_heads": 4, "d_mlp": 192}
    | {"pos_embedding": "learned", "dropout": 0.0, "kernel_size": 3, "hybrid_dilations": [1, 2]},
    "convit_ti": {"model": "convit_ti", "layer": "GPSA", "num_local_layers": 10, "num_layers": 12, "d_model": 192}
    | {"num_heads": 4, "d_mlp": 768, "patch_size": 16, "resize": 224, "num_epochs": 150},
}


@pytest.mark.parametrize("name", VIT_PRESETS)
def test_vit_presets(name):
    found = parse_vit(f"--config {ROOT}/configs/{name}.yaml").as_dict()
    assert {key: found[key] for key in VIT_PRESETS[name]} == VIT_PRESETS[name]
    header = (ROOT / f"configs/{name}.yaml").read_text().splitlines()[0]
    assert parse_vit(header.removeprefix("# python vit_main.py").replace("configs/", f"{ROOT}/configs/"))


# --- speed ----------------------------------------------------------------------------------------------------------

HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "PIL", "safetensors", "tqdm", "tensorboard", "wandb"}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-c", "import options.runs"], 0),
        (["allconvnet_main.py", "--help"], 0),
        (["allconvnet_main.py", "--K", "9999"], 2),
        (["allconvnet_main.py", "--config", "configs/demo.yaml", "--chan", "3"], 2),
        (["vit_main.py", "--help"], 0),
        (["vit_main.py", "--layer", "NeighborhoodAttention", "--kernel_size", "4"], 2),
    ],
    ids=["import", "help", "bad value", "bad flag", "ViT help", "ViT bad value"],
)
def test_nothing_heavy_is_imported_for_help_and_errors(words, status):
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "options" in imported and not imported & HEAVY
    assert "Traceback" not in done.stderr
    rest = [line for line in lines if not line.startswith("import time:")]
    assert len(rest) == (1 if status else 0) and all(line.startswith(f"{words[0]}: error: ") for line in rest)


def test_modules_that_use_options_offer_the_same_classes():
    """The layer names, stated without torch, are those of the registry."""
    import allconvnet

    assert ViTConfig is ViTConfig
    assert tuple(allconvnet.LAYERS2D) == LAYERS2D_NAMES == LAYERS
    assert AllConvNetConfig is AllConvNetConfig and NeighborConfig is NeighborConfig


def test_config_of_a_run_can_be_run_with_other_channels(tmp_path):
    """config.yaml holds num_layers as resolved; it must not stand in the way of --channels."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(parse("--channels", "8", "16").as_dict()))
    assert parse("--config", str(path), "--channels", "8").model.num_layers == 1
    assert parse("--config", str(path)).model.num_layers == 2


def test_what_size_and_data_set_decided_in_a_config_of_a_run_is_decided_anew(tmp_path):
    """But not what was given, and not for a checkpoint, which is evaluated as it was trained."""
    path = tmp_path / "config.yaml"

    def again(first, line):
        path.write_text(yaml.safe_dump(parse(first).as_dict()))
        found = parse(f"--config {path} {line}")
        return found.data.resize, found.model.stem, found.model.classifier_width

    assert again("--model vgg11", "--resize 224") == (224, "imagenet", 4096)
    assert again("--model vgg11", "--stem imagenet") == (32, "imagenet", 4096)
    assert again("--model vgg11", "--dataset imagenette") == (224, "imagenet", 4096)
    assert again("--model vgg11 --resize 64", "--dataset imagenette") == (64, "small", 512)
    assert again("--model vgg11 --resize 160 --stem small", "--resize 224") == (224, "small", 512)
    assert again("--model vgg11 --classifier_width 64", "--resize 224") == (224, "imagenet", 64)
    assert again("--dataset digits", "--dataset cifar10")[0] == 32
    path.write_text("dataset: digits\nresize: 8\n")
    assert parse(f"--config {path} --dataset cifar10").data.resize == 8
    trained = parse("--model vgg11").as_dict()
    found = as_trained(PROGRAMS["allconvnet_main.py"], {"resize": 224, "dataset": "imagenette"}, trained).options
    assert (found.data.resize, found.model.stem, found.model.classifier_width) == (224, "small", 512)
