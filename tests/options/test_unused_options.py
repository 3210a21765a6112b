"""An option on the command line that the chosen layer does not read is named in one line; the table knows what layers read."""

import shlex

import pytest
import torch

import allconvnet_main
import run_experiments
import vit_main
from allconvnet import AllConvNet
from options.allconvnet import AllConvNetConfig
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from options.runs import PROGRAMS, parse_options, unused_options
from options.vit import ViTConfig
from vit import ViT


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def warnings(line, capsys, program="vit_main.py"):
    """Return the text after "warning: " in the lines on stderr."""
    resolved, parser = parse_options(PROGRAMS[program], "", shlex.split(line), prog=program)
    for line in unused_options(resolved, parser.given):
        parser.warn(line)
    out, err = capsys.readouterr()
    assert out == "" and all(each.startswith(f"{program}: warning: ") for each in err.splitlines())
    return [each.split("warning: ")[1] for each in err.splitlines()]


# --- what is said ---------------------------------------------------------------------------------------------------

VIT = [
    ("", []),
    ("--mask_type 2d_cardinal --expansion_step 2", ["--mask_type 2d_cardinal", "--expansion_step 2"]),
    ("--layer MaskedAttention --mask_type 2d_cardinal --expansion_step 2", []),
    ("--layer MaskedAttention --mask_type full --expansion_step 2", ["--expansion_step 2 is not used by --mask_type full"]),
    ("--K 5 --layer Linformer", ["--K 5"]),
    ("--K 5 --layer KvtAttention --magnitude_type cosine", ["--magnitude_type cosine"]),
    ("--layer ConvNNAttention --kernel_size 3 --K 5 --no-softmax_topk_val", ["--kernel_size 3"]),
    ("--layer ConvNN --no-softmax_topk_val --score_temperature 2", ["--score_temperature 2.0"]),
    ("--layer KvtAttention --no-softmax_topk_val --score_temperature 2", ["--softmax_topk_val False"]),
    ("--topk gumbel", ["--topk gumbel is not used by --layer Attention"]),
    ("--layer KvtAttention --topk gumbel --K 1", []),
    ("--layer KvtAttention --topk gumbel --no-softmax_topk_val", ["--softmax_topk_val False"]),
    ("--layer ViG --topk straight_through", ["--topk straight_through is not used by --layer ViG"]),
    ("--layer Conv1d --attention_dropout 0.2 --kernel_size 3", ["--attention_dropout 0.2"]),
    ("--layer Conv1d --num_local_layers 2 --attention_dropout 0.2", []),  # of the Attention after them
    ("--layer Conv1d --num_local_layers 0 --kernel_size 3", ["--kernel_size 3 is not used by --num_local_layers 0"]),
    ("--coordinate_encoding", ["--coordinate_encoding True"]),
    ("--layer ConvNN --coordinate_encoding --lambda_param 0.3", []),
    ("--layer ConvNN --lambda_param 0.3", ["--lambda_param 0.3 is not used by --similarity_type Col"]),
    ("--layer ConvNN --num_samples 30", ["--num_samples 30 is not used by --sampling_type all"]),
    ("--layer ConvNN --sampling_type random", ["--sampling_type random is not used by --num_samples -1"]),
    ("--layer ConvNN --sampling_type all --num_samples -1", []),
    ("--layer ConvNN --sampling_type random --num_samples 30", []),
    ("--layer ConvNN --sampling_type random --num_samples 30 --sample_padding 2", ["--sample_padding 2"]),
    ("--layer ConvNN --sampling_type spatial --num_samples 3 --sample_padding 2", []),
    ("--layer SparseAttention --sparse_mode all --sparse_context_window 3", ["--sparse_context_window 3"]),
    ("--layer BranchConv --branch_ratio 0 --K 5 --kernel_size 3", ["--K 5"]),
    ("--layer BranchConv --branch_ratio 1 --K 5 --kernel_size 3", ["--kernel_size 3"]),
    ("--layer BranchConv --branch_ratio 0.25 --K 5 --kernel_size 3", []),
    ("--branch_ratio 0.25", ["--branch_ratio 0.25 is not used by --layer Attention"]),
    ("--model convit_ti --window_size 4 --locality_strength 2", ["--window_size 4 is not used by --layer GPSA"]),
    ("--drop_path 0.1 --qkv_bias False", []),
    ("--drop_path 0.1 --num_layers 1", ["--drop_path 0.1 is not used by --num_layers 1"]),
    ("--layer Conv1d --no-proj_bias --num_local_layers 0", []),
    ("--layer ViG --similarity_type Loc --magnitude_type distance",
     ["--magnitude_type distance is not used by --similarity_type Loc"]),
    ("--layer ConvNN --similarity_type Loc --magnitude_type distance", []),
    ("--layer ViG --graph_aggregation edge --num_heads 2", ["--num_heads 2 is not used by --graph_aggregation edge"]),
    ("--layer ViG --graph_aggregation mean --num_heads 2", []),
    ("--layer ViG --graph_aggregation edge --num_local_layers 1 --num_heads 2", []),  # of the Attention after it
    ("--pool mean --lr 0.1 --patch_size 32 --d_hidden 64 --num_heads 2", []),
    ("--momentum 0.5 --lr_step 5", ["--momentum 0.5 is not used by --optimizer adamw", "--lr_step 5"]),
    ("--momentum 0.5 --optimizer sgd --lr_step 5 --lr_gamma 0.5 --scheduler plateau", []),
    ("--lr_step 20 --lr_gamma 0.5 --scheduler cosine", ["--lr_step 20 is not used by --scheduler cosine", "--lr_gamma 0.5"]),
    ("--compile_mode reduce-memory", ["--compile_mode reduce-memory is not used by --use_compiled False"]),
    ("--compile_mode reduce-memory --use_compiled --amp_dtype bfloat16 --use_amp", []),
    ("--amp_dtype bfloat16 --no-use_amp", ["--amp_dtype bfloat16 is not used by --use_amp False"]),
    ("--dataset digits --data_path ./Data", ["--data_path ./Data is not used by --dataset digits"]),
    ("--dataset mnist --data_path ./Data", []),
]  # fmt: skip
ALLCONVNET = [
    ("--layer Conv2d --K 3 --kernel_size 5 --shuffle_pattern NA", ["--shuffle_pattern NA", "--K 3"]),
    ("--layer ConvNN --padding 1 --kernel_size 5", ["--kernel_size 5"]),
    ("--layer ConvNN_Attn --padding 1 --num_heads 2", ["--num_heads 2", "--padding 1"]),
    ("--layer Conv2d/Attention --num_heads 2 --kernel_size 5 --branch_ratio 0.25 --K 3", ["--K 3"]),
    ("--branch_ratio 0.25", ["--branch_ratio 0.25 is not used by --layer ConvNN"]),
    ("--layer Conv2d/ConvNN --branch_ratio 1 --kernel_size 5", ["--kernel_size 5"]),
    ("--shuffle_pattern NA --shuffle_scale 4", ["--shuffle_scale 4 is not used by --shuffle_pattern NA"]),
    ("--similarity_type Loc --magnitude_type matmul", ["--magnitude_type matmul is not used by --similarity_type Loc"]),
    ("--similarity_type Loc --magnitude_type matmul --layer ConvNN_Attn", []),
    ("--topk gumbel", ["--topk gumbel is not used by --layer ConvNN"]),  # its values are not weighed
    ("--topk gumbel --layer Conv2d/ConvNN_Attn", []),
    ("--sampling_type spatial --num_samples 8", []),
    ("--drop_path 0.1", ["--drop_path 0.1 is not used by --layer ConvNN"]),
    ("--layer Conv2d --aggregation_type Loc_Col --attention_dropout 0.1", ["--attention_dropout 0.1"]),
    ("--layer Attention --attention_dropout 0.1 --convolution_type depthwise", ["--convolution_type depthwise"]),
    ("--layer ViG --graph_aggregation edge --num_heads 2", ["--num_heads 2 is not used by --graph_aggregation edge"]),
    ("--layer Attention/ViG --graph_aggregation edge --num_heads 2", []),
    ("--stem small --replace last 2", ["--stem small is not used by --model allconvnet", "--replace last 2"]),
    ("--model vgg11 --channels 8 8 --stem small --batch_norm --classifier_width 8", ["--channels 8 8"]),
    ("--model resnet18 --batch_norm --classifier_width 8 --num_layers 3 --replace last 2",
     ["--batch_norm True is not used by --model resnet18", "--classifier_width 8", "--num_layers 3"]),
]  # fmt: skip
LINES = [("vit_main.py", *one) for one in VIT] + [("allconvnet_main.py", *one) for one in ALLCONVNET]


@pytest.mark.parametrize(("program", "line", "expected"), LINES, ids=[f"{one[0][0]} {one[1]}" for one in LINES])
def test_each_option_without_effect_is_named_in_a_line(program, line, expected, capsys):
    found = [each for each in warnings(line, capsys, program) if " is not used by --" in each]
    assert len(found) == len(expected)
    for start in expected:
        assert [each.startswith(start) for each in found].count(True) == 1


def test_a_layer_of_ones_own_may_have_a_use_for_scores(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from torch import nn\nclass Searching(nn.Conv2d):\n    def __init__(self, in_channels, out_channels, *, neighbors):\n"
        "        super().__init__(in_channels, out_channels, 1)\n"
    )
    line = f"--layer ConvNN/{tmp_path / 'own.py'}:Searching --similarity_type Loc --magnitude_type matmul"
    assert warnings(line, capsys, "allconvnet_main.py") == []


SMALL_VIT = "--resize 8 --patch_size 4 --num_layers 1 --num_heads 1 --d_model 8 --d_mlp 8"
QUICK = "--dataset digits --num_epochs 1 --train_limit 4 --test_limit 2 --batch_size 4 --device cpu"


@pytest.mark.usefixtures("quick_results")
@pytest.mark.parametrize(
    ("main", "line", "small"),
    [
        (vit_main.main, "--expansion_step 2 --mask_type 2d_cardinal", SMALL_VIT),
        (allconvnet_main.main, "--num_heads 2 --kernel_size 5", "--channels 4 --K 3"),
    ],
)
def test_the_programs_say_it_when_training_begins(main, line, small, tmp_path, monkeypatch, capsys):
    """Not before: a mistake that is found late is one line all the same."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(shlex.split(f"{line} {small} {QUICK} --train_limit 9999"))
    assert capsys.readouterr().err.count("\n") == 1
    assert main(shlex.split(f"{line} {small} {QUICK}")) == 0
    said = [each for each in capsys.readouterr().err.splitlines() if ": warning: " in each]
    assert sorted(each.split(": warning: ")[1].split()[0] for each in said) == sorted(line.split()[::2])


def test_values_of_files_are_silent(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("mask_type: 2d_cardinal\nexpansion_step: 2\n")
    assert warnings(f"--config {path}", capsys) == []
    (one,) = warnings(f"--config {path} --expansion_step 3", capsys)
    assert one.startswith("--expansion_step 3 ")


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert len(warnings("--K 3", capsys)) == count


def test_a_sweep_is_silent(tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text("program: vit_main.py\noptions: {dataset: digits, K: 5}\ngrid: {layer: [Attention, Performer, Conv1d]}\n")
    assert run_experiments.main([str(file), "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "--layer Performer" in out.replace("=", " ") and "warning" not in out + err


# --- what is true ---------------------------------------------------------------------------------------------------

# A value for each option of a layer, and another one that must change the numbers of exactly the layers that read it.
TWO_VALUES = {
    "K": (3, 2),
    "sampling_type": ("spatial", "random"),
    "num_samples": (3, 2),
    "sample_padding": (0, 1),
    "magnitude_type": ("matmul", "distance"),
    "similarity_type": ("Loc_Col", "Col"),
    "aggregation_type": ("Col", "Loc_Col"),
    "lambda_param": (0.5, 0.1),
}
VIT_VALUES = TWO_VALUES | {
    "attention_dropout": (0.2, 0.7),
    "attention_bias": (True, False),
    "convolution_type": ("standard", "depthwise-separable"),
    "softmax_topk_val": (True, False),
    "kernel_size": (3, 1),
    "window_size": (2, 1),
    "sparse_mode": ("strided", "local"),
    "sparse_context_window": (3, 5),
    "dilation": (1, 2),
    "graph_aggregation": ("max", "edge"),
    "score_temperature": (1.0, 2.0),
    "topk": ("hard", "gumbel"),
    "region_size": (2, 1),
    "top_regions": (2, 3),
    "value_convolution": (3, 0),
    "num_clusters": (5, 4),
    "branch_ratio": (0.5, 0.25),
    "mask_type": ("2d_cardinal", "1d_cardinal"),
    "expansion_step": (1, 2),
    "linformer_k": (6, 5),
    "performer_features": (10, 9),
    "performer_kernel": ("softmax", "relu"),
    "nystrom_landmarks": (5, 4),
    "nystrom_conv_kernel": (3, 0),
    "hybrid_window": (3, 1),
    "hybrid_dilations": ((1, 2), (1,)),
    "locality_strength": (1.0, 2.0),
}
ALLCONVNET_VALUES = TWO_VALUES | {
    "magnitude_type": ("similarity", "distance"),
    "kernel_size": (3, 1),
    "num_heads": (2, 4),
    "attention_dropout": (0.2, 0.7),
    "convolution_type": ("standard", "depthwise-separable"),
    "shuffle_pattern": ("BA", "NA"),
    "shuffle_scale": (2, 1),
    "padding": (0, 1),
    "branch_ratio": (0.5, 0.25),
    "branch_join": ("relu", "conv1x1"),
    "graph_aggregation": ("max", "edge"),
    "score_temperature": (1.0, 2.0),
    "topk": ("hard", "gumbel"),
}


def numbers(make, config, size) -> torch.Tensor:
    """The output of a training step and of evaluation, whose weights and dropout come from one seed."""
    torch.manual_seed(0)
    model, images = make(config), torch.randn(2, 3, *size)
    for parameter in model.parameters():
        if not parameter.any():  # biases: at zero they say nothing
            torch.nn.init.normal_(parameter)
    return torch.cat([model.train()(images), model.eval()(images)]).detach()


def check_table(make, config, values, size):
    """The options that change the numbers are those that the config does not call without effect."""
    first = {name: one for name, (one, _) in values.items()}
    expected = numbers(make, config(**first), size)
    changing = {
        name
        for name, (_, two) in values.items()
        if not torch.equal(numbers(make, config(**first | {name: two}), size), expected)
    }
    assert changing == values.keys() - config(**first).without_effect().keys()


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_the_table_of_the_vit_is_true(layer):
    def config(**values):
        sizes = {"image_size": (24, 32), "patch_size": 4, "num_layers": 1, "num_heads": 4, "d_model": 16, "d_mlp": 8}
        return ViTConfig(layer=layer, pool="mean", **sizes, **values)

    check_table(ViT, config, VIT_VALUES, (24, 32))


@pytest.mark.parametrize("layer", [*LAYERS2D_NAMES, "Conv2d/ConvNN", "ConvNN_Attn/Attention"])
def test_the_table_of_the_allconvnet_is_true(layer):
    def config(**values):
        return AllConvNetConfig(layer=layer, channels=(8,), image_size=(12, 16), **values)

    check_table(AllConvNet, config, ALLCONVNET_VALUES, (12, 16))
