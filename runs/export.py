"""Export the best weights as safetensors, or the model with them as ONNX."""

import copy
import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

from options.training import TrainConfig
from runs import RunError
from runs.checkpoints import load_checkpoint, load_state, weights_in
from runs.files import check_writable, remove_temporaries, write_atomically


def check_export(train: TrainConfig) -> None:
    """Raise RunError if the file of --export cannot be written or exists, or if packages are missing."""
    check_writable(Path(train.export).parent, "--export")
    if Path(train.export).is_dir():
        raise RunError(f"--export {train.export} is a folder; name a file")
    if os.path.lexists(train.export) and not train.overwrite:
        raise RunError(f"--export {train.export} exists; name another file, or write over it with --overwrite")
    if train.export.endswith(".onnx") and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise RunError(f"--export {train.export} needs the packages onnx and onnxscript: pip install onnx onnxscript")


def export(path: Path, model: nn.Module, image_shape: tuple[int, ...], best: Path | None = None) -> None:
    """Write a model, or its weights, as the file's suffix says; of the checkpoint `best` if given. Raises Stopped."""
    weights = model.state_dict() if best is None else weights_in(load_checkpoint(best), best)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    if path.suffix == ".onnx":
        load_state(model, weights)
        export_onnx(path, model, image_shape)
    else:
        export_weights(path, weights)


def export_weights(path: Path, weights: dict) -> None:
    """Write a state dict as safetensors."""
    from safetensors.torch import save

    write_atomically(path, save({name: value.contiguous() for name, value in weights.items()}))


def export_onnx(path: Path, model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Write the model, in eval mode, as ONNX: input `images` (batch, channels, height, width), output `logits`.

    The graph holds plain operators: nothing of this project is needed to run it.
    """
    program = torch.onnx.export(
        copy.deepcopy(model).cpu().eval(),
        (torch.zeros(2, *image_shape),),  # the exporter takes one image for a constant
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    write_atomically(path, program.model_proto.SerializeToString())
