"""Options of `vit_main.py`."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from options.fields import option, specs
from options.neighbors import NeighborConfig
from options.runs import PROGRAMS, as_trained, parse_options
from options.vit import VIT_MODELS, ViTConfig
from tests.options.reference import (
    NOTED,
    ROOT,
    VIT_BOOLEANS,
    VIT_CHOICES,
    VIT_DEFAULTS,
    assert_says,
    error_of,
    parse_vit,
)

pytestmark = pytest.mark.usefixtures("folder")


for name in ("shuffle_pattern", "shuffle_scale"):
    del VIT_DEFAULTS[name]


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
    more = {"aggregation_type": "--convolution_type standard", "layer": "--pool mean"}.get(name, "")
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
    Path("c.yaml").write_text(yaml.safe_dump(parse_vit("").as_dict()))
    assert parse_vit("--config c.yaml --coordinate_encoding").model == parse_vit("--coordinate_encoding").model
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
    """Options with the default of a ViT too, and options of a YAML file."""
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
    left -= {"similarity_type", "patch_size"}  # which coordinate_encoding and a model of timm decide
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
    ("--layer ViG --coordinate_encoding --similarity_type Col", "coordinate_encoding=True; similarity_type=Loc_Col, not Col"),
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
