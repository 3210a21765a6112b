"""Trained runs, read from their folders: options, models with the best weights, and test images as pictures."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset import channel_stats, load_data
from models.build import build_network
from models.replace import replace_attention
from options.data import DataConfig
from options.parser import read_yaml
from options.runs import PROGRAMS, Options, resolve
from options.trust import check_trusted
from options.vit import ViTConfig
from runs.checkpoints import load_checkpoint, load_weights
from runs.fingerprint import describe_classes, noted_classes
from runs.provenance import check_same_class


class Run(NamedTuple):
    name: str  # the name of its folder, or its path where two have the same name
    folder: Path
    options: Options
    model: nn.Module
    images: Tensor
    labels: Tensor
    class_names: list[str]


def read_config(folder: Path) -> dict:
    """Read the options of the run in a folder by name. Raises ValueError without a run."""
    path = folder / "config.yaml"
    if not path.exists():
        raise ValueError(f"{folder} holds no run: there is no config.yaml in it")
    return read_yaml(str(path))


def read_options(folder: Path, data_path: str | None = None) -> Options:
    """Resolve the options of the run in a folder, with another `data_path` if given.

    Raises ValueError without a run, and for a custom mixer in a file that this user has not trained with.
    """
    values = read_config(folder) | ({"data_path": data_path} if data_path else {})
    try:
        check_trusted(str(values.get("layer", "")), values.get("layer_sha256"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    program = PROGRAMS["vit_main.py" if "patch_size" in values else "allconvnet_main.py"]
    return resolve(program.model, program.family, values)


def check_classes(folder: Path, class_names: list[str]) -> None:
    """Raise ValueError if the best checkpoint of a run was trained on other classes."""
    noted = noted_classes(load_checkpoint(folder / "best.pt"))
    if noted is not None and noted != class_names:
        raise ValueError(f"{folder}: best.pt was trained on {describe_classes(noted, class_names)}; give them the former names")


def load_model(folder: Path, options: Options, weights: str = "best.pt") -> nn.Module:
    """Return the model of a run in eval mode on the CPU, with the weights in one of its files. Raises ValueError without it."""
    path = folder / weights
    if not path.exists():
        raise ValueError(f"{folder} holds no {weights}; its run has not ended its first epoch")
    model = build_network(options.model)
    state = load_checkpoint(path)
    check_same_class(options.as_dict(), state.get("config") or {}, path, weights)
    load_weights(model, path, flag=weights, state=state)
    return model.eval()


def load_run(folder: Path, images: int, data_path: str | None) -> Run:
    """Load a run with its best weights and a number of test images (n, C, H, W), all on the CPU."""
    options = read_options(folder, data_path)
    model = load_model(folder, options)
    if isinstance(options.model, ViTConfig) and options.model.is_backbone and options.model.layer == "Attention":
        replace_attention(model, "Attention")  # timm's own does not tell its weights
    config = dataclasses.replace(options.data, test_limit=images, num_workers=0, download=False)
    data = load_data(config, batch_size=images, seed=options.train.seed, device=torch.device("cpu"), test_only=True)
    check_classes(folder, data.class_names)
    return Run(folder.resolve().name, folder, options, model, *next(iter(data.test.epoch(0))), data.class_names)


def load_runs(folders: list[Path], images: int, data_path: str | None) -> list[Run]:
    """Load several runs with the same test images. Raises ValueError where a run has other images than the first."""
    runs: list[Run] = []
    for folder in folders:
        run = load_run(folder, images, data_path)
        runs.append(run)
        if not (run.images.shape == runs[0].images.shape and run.images.equal(runs[0].images)):
            ours, first = (
                f"of {one.options.data.dataset} at {' x '.join(map(str, one.images.shape[2:]))}" for one in (run, runs[0])
            )
            raise ValueError(
                f"{folder}: its images are {ours}, the images of {folders[0]} {first}; "
                "runs side by side need the same images (--dataset, --resize)"
            )
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.folder)) for run in runs]
    return runs


def as_picture(image: Tensor, config: DataConfig) -> np.ndarray:
    """Return a normalized image (C, H, W) as matplotlib shows it: (H, W) gray or (H, W, 3), from 0 to 1."""
    mean, std = channel_stats(config)
    pixels = (image * std + mean).clamp(0, 1)
    return pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
