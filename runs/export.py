"""What leaves a run for others: the best weights as safetensors, or the model with them as ONNX."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

from options.training import TrainConfig
from runs import RunError
from runs.checkpoints import evaluated_weights, load_state
from runs.files import check_writable, is_same_file, remove_temporaries, write_atomically


def check_export(train: TrainConfig) -> None:
    """Raise RunError if --export cannot be written, would be written over something, or needs packages that are missing."""
    check_writable(Path(train.export).parent, "--export")
    if Path(train.export).is_dir():
        raise RunError(f"--export {train.export} is a folder; name a file")
    if os.path.lexists(train.export) and not train.overwrite:
        own = " and is the --checkpoint" * is_same_file(train.export, train.checkpoint)
        raise RunError(f"--export {train.export} exists{own}; name another file, or write over it with --overwrite")
    if train.export.endswith(".onnx") and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise RunError(f"--export {train.export} needs the packages onnx and onnxscript: pip install onnx onnxscript")


def export(path: Path, model: nn.Module, best: Path, image_shape: tuple[int, ...]) -> None:
    """Write the weights of the checkpoint `best` in the format that the file's name asks for. Raises Stopped."""
    weights = evaluated_weights(best)
    if path.suffix == ".onnx":
        load_state(model, weights)
        export_onnx(path, model, image_shape)
    else:
        export_weights(path, weights)


def export_weights(path: Path, weights: dict) -> None:
    """Write a state dict as safetensors, for sharing. Raises Stopped."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    write_atomically(path, save({name: value.contiguous() for name, value in weights.items()}))


def export_onnx(path: Path, model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Write the model, in eval mode, as ONNX: input `images` (batch, channels, height, width), output `logits`.

    Raises Stopped. A graph of plain operators: nothing of this project is needed to run it.
    """
    model = copy.deepcopy(model).cpu().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *image_shape),),  # one image would be taken for a constant
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    write_atomically(path, program.model_proto.SerializeToString())
