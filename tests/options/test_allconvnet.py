"""Options of `allconvnet_main.py`."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from options.allconvnet import AllConvNetConfig
from options.checks import branch_widths
from options.runs import PROGRAMS, as_trained, parse_options
from tests.options.reference import BOOLEANS, CHOICES, DEFAULTS, LAYERS, NOTED, assert_says, error_of, parse, values

pytestmark = pytest.mark.usefixtures("folder")


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
        if name not in ("num_layers", "resize", "mean", "std", "output_dir", "num_workers") and default is not None:
            assert stated[1] == (" ".join(map(str, default)) if isinstance(default, list) else str(default))


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
        "--shuffle_pattern NA --shuffle_scale 0",
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
