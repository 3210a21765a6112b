"""Export the best weights as safetensors, or the model with them as ONNX."""

import copy
import importlib.util
import json
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


def export(path: Path, model: nn.Module, facts: dict, best: Path | None = None) -> None:
    """Write a model, or its weights, as the file's suffix says; of the checkpoint `best` if given. Raises Stopped.

    facts: of model and data, as in summary.json; the file holds `preprocessing` and `class_names` as JSON in its metadata.
    """
    notes = {name: json.dumps(facts[name]) for name in ("preprocessing", "class_names")}
    weights = model.state_dict() if best is None else weights_in(load_checkpoint(best), best)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    if path.suffix == ".onnx":
        load_state(model, weights)
        export_onnx(path, model, facts["image_shape"], notes)
    else:
        export_weights(path, weights, notes)


def export_weights(path: Path, weights: dict, notes: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors, with notes in its metadata."""
    from safetensors.torch import save

    write_atomically(path, save({name: value.contiguous() for name, value in weights.items()}, metadata=notes))


def export_onnx(path: Path, model: nn.Module, image_shape: tuple[int, ...], notes: dict[str, str] | None = None) -> None:
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
    proto = program.model_proto
    for name, text in (notes or {}).items():
        proto.metadata_props.add(key=name, value=text)
    write_atomically(path, proto.SerializeToString())
