"""Folders that hold what is read of a run afterwards: options, and the weights of an untrained model."""

from pathlib import Path

import torch
import yaml

from experiments.trained import read_options
from models.build import build_network
from vit import ViT


def write_run(folder: Path, values: dict, weights: tuple[str, ...] = ("best.pt",), seed: int = 0) -> Path:
    """A run on the embedded digits; every file of weights has others."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values | {"dataset": "digits"}))
    torch.manual_seed(seed)
    for name in weights:
        model = (ViT if "patch_size" in values else build_network)(read_options(folder).model)
        torch.save({"model": model.state_dict()}, folder / name)
    return folder
