"""The flag reference, written out by hand and not taken from `options/`, and helpers to parse command lines."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from options.runs import PROGRAMS, Options, parse_options

ROOT = Path(__file__).parent.parent.parent


BOOLEANS = ("use_amp", "use_compiled", "augment", "download", "deterministic", "resume", "test_only", "tensorboard")


BOOLEANS += ("overwrite", "override", "trust_code", "strict", "decay_norms", "batch_norm", "wandb")


LAYERS = ("Conv2d", "Conv2d_New", "ConvNN", "ConvNN_Attn", "Attention", "ViG", "Identity", "Pooling")


NOTED = ("layer_sha256",)  # what a run notes in its files, and no flag gives


# Options of `allconvnet_main.py` without a flag; num_workers depends on the machine.
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
    "image_column": None,
    "label_column": None,
    "task_size": 6,
    "task_symbols": None,
    "data_path": "./Data",
    "resize": 32,
    "crop": None,
    "interpolation": "bilinear",
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
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
    "beta1": 0.9,
    "beta2": 0.999,
    "momentum": 0.9,
    "scheduler": "none",
    "lr_step": 20,
    "lr_gamma": 0.1,
    "plateau_metric": "loss",
    "warmup_epochs": 0,
    "warmup_steps": 0,
    "min_lr": 0.0,
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
    "trust_code": False,
    # fine-tuning and regularization
    "strict": False,
    "freeze": None,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "decay_norms": True,
}


CHOICES = {
    "branch_join": ("relu", "conv1x1"),
    "model": ("allconvnet", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "densenet121"),
    "stem": ("small", "imagenet"),
    "crop": ("center", "squash"),
    "interpolation": ("bilinear", "bicubic"),
    "topk": ("hard", "straight_through", "gumbel"),
    "convolution_type": ("standard", "depthwise", "depthwise-separable"),
    "shuffle_pattern": ("BA", "NA", "B", "A"),
    "sampling_type": ("all", "random", "spatial"),
    "magnitude_type": ("similarity", "cosine", "distance", "euclidean", "matmul"),
    "similarity_type": ("Col", "Loc", "Loc_Col"),
    "aggregation_type": ("Col", "Loc_Col"),
    "dataset": (
        *("cifar10", "cifar100", "imagenet", "imagenet100", "imagenette"),
        *("mnist", "fashion_mnist", "digits", "folder", "task_find", "task_locate", "task_beside", "task_opposite"),
        *("task_recall", "task_count", "task_duplicate", "task_joined"),
    ),
    "auto_augment": ("none", "rand", "trivial"),
    "amp_dtype": ("bfloat16", "float16"),
    "compile_mode": ("default", "reduce-overhead", "reduce-memory", "max-autotune"),
    "criterion": ("CrossEntropy", "MSE"),
    "optimizer": ("adam", "sgd", "adamw"),
    "scheduler": ("step", "cosine", "plateau", "none"),
    "plateau_metric": ("loss", "top1"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "kernels": ("auto", "chunked", "triton"),
}


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


def as_argv(settings: dict) -> list[str]:
    argv = []
    for name, value in settings.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={value}")
    return argv


# Options of `vit_main.py` without a flag, where they differ from `allconvnet_main.py`.
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
    "separate_qkv": False,
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


VIT_BOOLEANS = (
    *(name for name in BOOLEANS if name not in OF_ALLCONVNET),
    "attention_bias",
    "qkv_bias",
    "proj_bias",
    "separate_qkv",
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
        *("Identity", "Pointwise", "MeanMixing", "RandomMixing", "Pooling"),
        *("MlpMixer", "FNet", "GFNet", "XCiT", "LinearAttention", "Swin", "FocalModulation"),
    ),
    "model": ("vit", "convit_ti", "convit_ti_plus", "convit_s", "convit_s_plus", "convit_b", "convit_b_plus"),
    "pos_embedding": ("sinusoidal", "learned", "none"),
    "pool": ("cls", "mean"),
    "convolution_type": ("standard", "depthwise", "depthwise-separable"),
    "sparse_mode": ("all", "local", "strided"),
    "mask_type": ("1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors", "full"),
    "performer_kernel": ("softmax", "relu"),
}


def parse_vit(line: str) -> Options:
    return parse_options(PROGRAMS["vit_main.py"], "Train.", shlex.split(line))[0]
