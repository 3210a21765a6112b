"""Options of a run, resolved from flags and YAML, and the options of an evaluation, resolved with a checkpoint."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from options.allconvnet import AllConvNetConfig
from options.backbones import BACKBONES
from options.data import CELL, DataConfig, default_statistics, info_of, is_task, sides_of
from options.fields import as_words, build, check_option, specs
from options.layers import WITHOUT_EFFECT, layer_label
from options.libraries import is_hub, open_hub
from options.machine import cpu_cores
from options.models import ModelConfig
from options.neighbors import as_sides, canonical_metric
from options.parser import OneLineParser, merge, read_values
from options.reading import is_hidden, path_problem
from options.timm import PREFIX, describe, is_timm
from options.training import KERNELS_IN_ENVIRONMENT, KERNELS_VARIABLE, TrainConfig
from options.trust import check_trusted, trusting
from options.vit import CONVITS, ViTConfig


def check_environment() -> None:
    """Raise ValueError for an unknown value of CONVNN_KERNELS, before the import of the kernels fails on it."""
    kernels = os.environ.get(KERNELS_VARIABLE, "auto")
    if kernels not in KERNELS_IN_ENVIRONMENT:
        raise ValueError(f"{KERNELS_VARIABLE}={kernels!r} is not one of {', '.join(KERNELS_IN_ENVIRONMENT)}")


class Options(NamedTuple):
    """The resolved options of one run."""

    model: AllConvNetConfig | ViTConfig
    data: DataConfig
    train: TrainConfig

    def as_dict(self) -> dict:
        """Return every option by name, as plain values that YAML and a checkpoint can hold."""
        values = {name: getattr(config, name) for config in self for name in specs(type(config))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _count_classes(data: DataConfig) -> int:
    if is_hub(data.dataset):
        return len(open_hub(data.dataset, data.image_column, data.label_column, data.download).class_names)
    from options.storage import DISK, find_part  # imports numpy, which the help of a program does not need

    data_path = data.data_path
    train, val = (find_part(Path(data_path), part) for part in ("train", "val"))
    if train is None or val is None:
        raise ValueError(
            f"data_path={data_path!r} must hold train/ and val/ with one folder per class for dataset=folder, or train.zip and "
            "val.zip (or .tar) with these folders"
        )
    storage, folder = train
    try:
        classes = sum(entry.is_dir() and not is_hidden(entry.name) for entry in storage.scandir(folder))
    except OSError as error:
        raise ValueError(f"data_path={data_path!r}: {error.filename} cannot be read ({error.strerror})") from None
    if classes < 2:
        name = "train/" if storage is DISK else folder.relative_to(data_path)
        raise ValueError(f"data_path={data_path!r} has {classes} class folders in {name}; it needs at least 2")
    return classes


def resolve(model_type: type, family: str, values: dict) -> Options:
    """Build options from plain values by name, and fill in the values that follow from the data set. Raises ValueError."""
    data, train = build(DataConfig, values), build(TrainConfig, values)
    if train.override:  # accept a changed custom mixer
        values = {name: value for name, value in values.items() if name != "layer_sha256"}
    mean, std = data.statistics
    data = dataclasses.replace(
        data,
        mean=mean,
        std=std,
        resize=data.resize or data.size,
        num_workers=min(8, cpu_cores()) if data.num_workers is None else data.num_workers,
    )
    classes = info_of(data.dataset).classes or _count_classes(data)
    model = build(model_type, values, image_size=data.resize, in_channels=len(mean), num_classes=classes)
    if train.output_dir is None:
        name, preset = layer_label(model.layer).replace("/", "-"), getattr(model, "model", None)
        folder = f"{preset}/{name}" if preset in BACKBONES else f"{family}/{preset if preset in CONVITS else name}"
        folder = f"{family}/{preset.removeprefix(PREFIX)}/{name}" if is_timm(preset) else folder
        train = dataclasses.replace(train, output_dir=f"./Output/{folder}")
    for name, path in (("data_path", data.data_path), ("output_dir", train.output_dir), ("export", train.export)):
        problem = path and path_problem(path)
        if problem:
            raise ValueError(f"{name}={path!r}: {problem}")
    return Options(model, data, train)


class Program(NamedTuple):
    """A training program: its model, the name of its output folder, and its defaults."""

    model: type
    family: str
    defaults: dict

    def defaults_for(self, values: dict) -> dict:
        """Return the defaults for these options.

        A model of timm has its preprocessing. A cell of a generated task is a patch, and its images keep their size.
        """
        model = values.get("model")
        of_task = {"patch_size": CELL, "resize": None} if is_task(values.get("dataset")) else {}
        return self.defaults | (describe(model).data if is_timm(model) else of_task)


PROGRAMS = {
    "allconvnet_main.py": Program(AllConvNetConfig, "AllConvNet", {}),
    "vit_main.py": Program(ViTConfig, "ViT", {"lr": 1e-4, "resize": 224}),
}


def parse_options(
    program: Program, description: str, argv: list[str] | None = None, prog: str | None = None
) -> tuple[Options, OneLineParser]:
    """Resolve defaults, YAML and flags, each overriding the one before. Returns the options of a run, and the parser."""
    values, parser = read_values(program.model, (DataConfig, TrainConfig), description, argv, program.defaults, prog)
    try:
        check_environment()
        try:
            return resolve(program.model, program.family, program.defaults_for(values) | values), parser
        except ValueError:
            if not values.get("test_only"):
                raise
            options = _without_model(program, values)
            if options is None:
                raise
            return options, parser
    except ValueError as error:
        parser.error(str(error))


def _without_model(program: Program, values: dict) -> Options | None:
    """Resolve the options of a test except those of its model, which a checkpoint completes; None if others are invalid too.

    `as_trained` then checks the options of the model against each other.
    """
    model = specs(program.model)
    folder = {"model", "layer", "mixer_option"} if "layer" in values else {"model"}  # these name the output folder
    kept = {name: value for name, value in values.items() if name in folder or name not in model}
    resize = kept.pop("resize", None)  # the default model may not fit it
    try:
        for name in values.keys() & model.keys():
            check_option(name, values[name], model[name])
        options = resolve(program.model, program.family, program.defaults_for(kept) | kept)
        return options if resize is None else options._replace(data=dataclasses.replace(options.data, resize=resize))
    except ValueError:
        return None


# Model options that change neither the weights nor the evaluation.
ONLY_IN_TRAINING = {"dropout", "attention_dropout", "drop_path", "initializer_range", "topk"}


# Model options that change names or shapes of weights; `model` changes others.
SHOWN_BY_SHAPES = set(
    "model num_layers channels patch_size d_model d_mlp kernel_size attention_bias qkv_bias proj_bias separate_qkv "
    "patch_norm final_norm pos_embedding pool linformer_k convolution_type branch_ratio shuffle_pattern shuffle_scale "
    "replace stem classifier_width batch_norm".split()
)


def program_of(options: dict) -> str | None:
    """Return the name of the program that wrote these options, or None if it is another one."""
    found = [name for name, program in PROGRAMS.items() if specs(program.model).keys() <= options.keys()]
    return found[0] if len(found) == 1 else None


# Options of the data that an evaluation takes from the training.
OF_DATA = ("dataset", "image_column", "label_column", "task_size", "task_symbols", "data_path")
OF_DATA += ("resize", "crop", "interpolation", "mean", "std")


def evaluation_options(options: Options) -> dict:
    """Return the options that decide the result of an evaluation, as plain values."""
    names = "noise test_limit criterion use_amp amp_dtype seed".split()
    values = options.as_dict()
    return {name: values[name] for name in (*specs(type(options.model)), *OF_DATA, *names)}


class AsTrained(NamedTuple):
    """Options to evaluate a checkpoint with."""

    options: Options  # model options of its training, overridden by the stated ones
    changes: dict[str, tuple]  # stated model options that differ from training: (trained, stated)


def as_trained(program: Program, stated: dict, trained: dict) -> AsTrained:
    """Override the options of a checkpoint (empty if unknown) by those that the command line and its file state.

    Raises ValueError if they do not fit together, or if another program trained the checkpoint.
    """
    other = program_of(trained)
    if other and program in PROGRAMS.values() and PROGRAMS[other] is not program:
        raise ValueError(f"it was trained by {other}; evaluate it with that program")
    model = [name for name in specs(program.model) if name in trained]
    recorded = {name: trained[name] for name in (*model, *OF_DATA, "criterion") if name in trained}
    if "dataset" in stated:
        recorded = {name: recorded[name] for name in recorded.keys() - default_statistics(trained) - {"data_path"}}
    if "task_size" in stated:
        stated = {"resize": CELL * stated["task_size"]} | stated
    with trusting(bool(stated.get("trust_code"))):
        noted = {} if "layer" in stated else trained
        check_trusted(str(noted.get("layer", "")), None if stated.get("override") else noted.get("layer_sha256"))
    # Another data set or image size does not change the trained model.
    others = {name: value for name, value in stated.items() if name not in ("dataset", "resize")}
    values = program.defaults_for(recorded | stated) | program.model.drop_overridden(recorded, others)
    options = resolve(program.model, program.family, merge(values, stated, specs(program.model)))
    now = options.as_dict()
    unused = options.model.without_effect().keys() | ONLY_IN_TRAINING
    compared = [
        name for name in (*model, "resize", "crop", "interpolation", "mean", "std") if name in recorded and name not in unused
    ]
    changes = {name: (recorded[name], now[name]) for name in compared if not same_value(name, recorded[name], now[name])}
    if "resize" in recorded and isinstance(options.model, AllConvNetConfig):
        # Its layers run on maps of any size. Built for this size, a backbone would have another K and other weights.
        options = options._replace(model=dataclasses.replace(options.model, image_size=recorded["resize"]))
    return AsTrained(options, changes)


def same_value(name: str, first, second) -> bool:
    """Compare two values of an option; a custom mixer is the same in any folder."""
    return _plain(name, first) == _plain(name, second)


def _plain(name: str, value):
    """Return the canonical form of a value."""
    if name == "layer":
        return layer_label(str(value))
    if name == "resize":
        return sides_of(value)
    if name == "magnitude_type":
        return canonical_metric(value)
    if name in ("checkpoint", "data_path"):
        return value and os.path.realpath(value)
    return tuple(value) if isinstance(value, list) else value


def grid_of(trained: dict | None) -> tuple[int, int] | None:
    """Return the rows and columns of patches of a model with these options, or None if they are missing or invalid."""
    try:
        height, width = sides_of(trained["resize"])
        return height // trained["patch_size"], width // trained["patch_size"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # of another program, or edited
        return None


def assumed_options(model: ModelConfig) -> dict:
    """Return the options that change what a model computes but not the shapes of its weights, by name."""
    names = specs(type(model)).keys() - SHOWN_BY_SHAPES - ONLY_IN_TRAINING - model.without_effect().keys()
    values = {name: getattr(model, name) for name in specs(type(model)) if name in names}
    return {name: value for name, value in values.items() if value is not None}


def unused_options(options: Options, given: frozenset[str]) -> list[str]:
    """Return a warning for every option on the command line that the run does not read; files may serve several layers."""
    values, unused = options.as_dict(), options.model.without_effect()
    for name, other, switching_off in WITHOUT_EFFECT:
        if name in specs(DataConfig) | specs(TrainConfig) and values[other] in switching_off:
            unused[name] = other
    return [
        f"--{name} {as_words(values[name])} is not used by --{other} {as_words(values[other])}"
        for name, other in unused.items()
        if name in given
    ]


def oversized_default(model: AllConvNetConfig, given: frozenset[str]) -> list[str]:
    """Return a warning for images of at most 8 x 8 pixels in the default network, which is meant for 32 x 32."""
    spec = specs(AllConvNetConfig)["channels"]
    if not model.is_backbone and max(model.image_size) <= 8 and model.channels == spec.default and "channels" not in given:
        return [
            f"the default --channels {as_words(spec.default)} are for images of 32 x 32 and learn {as_sides(model.image_size)} "
            "slowly and badly; --channels 16 32 64, as in configs/demo.yaml, would fit"
        ]
    return []
