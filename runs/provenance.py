"""Options that a checkpoint was trained with, and lines for the user where this run has others."""

import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from options.fields import as_words
from options.runs import Options, Program, as_trained, assumed_options, same_value
from runs import RunError
from runs.checkpoints import Loaded
from runs.fingerprint import compare, describe_classes, noted_classes
from runs.parameters import head_of


def options_as_trained(options: Options, program: Program, stated: dict, state: dict, path: Path) -> tuple[Options, dict]:
    """Return the options to evaluate a checkpoint with, and how those that are stated differ from the trained ones.

    state: contents of the checkpoint. Raises RunError.
    """
    trained = state.get("config")
    is_ours = isinstance(trained, dict)
    try:
        found, changes = as_trained(program, stated, trained if is_ours else {})
    except (ValueError, TypeError) as error:
        raise RunError("--test_only: " + f"with the options of {path}, " * is_ours + str(error)) from None
    if not options.train.checkpoint:  # results stay in the folder that the weights are from
        found = found._replace(train=replace(found.train, output_dir=options.train.output_dir))
    return found, changes


def check_same_class(options: dict, trained: dict, path: Path, flag: str) -> None:
    """Raise RunError if the file of a custom mixer has changed since the training."""
    now, then = options.get("layer_sha256"), trained.get("layer_sha256")
    if then and now and now != then and same_value("layer", options["layer"], trained.get("layer")):
        override = ", or take it as it is now by --override" * (flag == "--test_only")
        raise RunError(
            f"{flag}: {path} was trained with another content of --layer {options['layer']}: its SHA-256 was {then} and is now "
            f"{now}; give its file the former content back{override}"
        )


def check_same_number(state: dict, classes: int, path: Path, data_path: str) -> None:
    """Raise RunError if a checkpoint was trained on another number of classes."""
    names = noted_classes(state)
    if names is not None and len(names) != classes:
        raise RunError(
            f"--test_only: {path} was trained on {len(names)} classes, and --data_path {data_path} has {classes}; evaluate it "
            f"on its own classes ({', '.join(names[:5])}{', ...' * (len(names) > 5)})"
        )


def check_same_classes(state: dict, here: dict, path: Path, override: bool, quiet: bool) -> None:
    """Raise RunError if the classes of a checkpoint that is about to be evaluated are others; print a line for other images."""
    if not isinstance(state.get("config"), dict):
        return  # weights of others
    if noted_classes(state) is None:
        line = f"{path} does not say which classes it was trained on; they are taken to be those of --data_path"
    elif not (difference := compare(state["data"], here, ("test",))):
        return
    elif difference.of_classes and not override:
        raise RunError(
            f"--test_only: {path} was trained on {difference.text}; give the class folders their former names, or evaluate by "
            "position with --override"
        )
    else:
        line = f"{path} was trained with {difference.text}"
    if not quiet:
        print(f"warning: {line}", file=sys.stderr)


def say_whose_head(state: dict, class_names: list[str], path: Path) -> None:
    """Warn if a training starts from a head of other classes."""
    before = noted_classes(state)
    if before is not None and before != class_names:
        print(
            f"warning: {path}: its head is of other classes ({describe_classes(before, class_names)}); training starts from it",
            file=sys.stderr,
        )


def say_what_is_assumed(options: Options, state: dict, path: Path, changes: dict) -> None:
    """Print the options that the weights of others do not tell, or those that differ from the trained ones."""
    if not isinstance(state.get("config"), dict):
        words = " ".join(f"--{name} {as_words(value)}" for name, value in assumed_options(options.model).items())
        print(f"assumed of {path}, which does not say: {words}")
    elif changes:
        words = ", ".join(f"--{name} {as_words(before)}, here {as_words(after)}" for name, (before, after) in changes.items())
        print(f"warning: {'--override: ' * options.train.override}{path} was trained with {words}", file=sys.stderr)


def say_what_differs(options: Options, state: dict, path: Path) -> None:
    """Warn where the weights that a training starts from belong to another model, though they fit, or to other images."""
    trained = state["config"] if isinstance(state.get("config"), dict) else state.get("preprocessing") or {}
    of_images = {name: getattr(options.data, name) for name in ("interpolation", "mean", "std") if hasattr(options.data, name)}
    differences = [
        f"--{name} {as_words(trained[name])}, here {as_words(value)}"
        for name, value in (assumed_options(options.model) | of_images).items()
        if name in trained and not same_value(name, trained[name], value)
    ]
    if differences:
        print(f"warning: {path} was trained with {'; '.join(differences)}", file=sys.stderr)


def say_what_was_loaded(loaded: Loaded, path: Path, model: nn.Module) -> None:
    """Print a line if the file holds more or fewer weights than the model, and one more if the classifier starts anew."""
    name = f"{head_of(model)}weight"
    if name in loaded.new:
        print(f"warning: {path}: a new head, {name} is {loaded.new[name]}", file=sys.stderr)
    if loaded.new or loaded.unused or loaded.resampled:
        print(f"weights of {path}: {_counts(loaded)}")


def _counts(loaded: Loaded) -> str:
    parts = [f"{len(loaded.loaded)} tensors loaded" + f" (positions from {loaded.resampled})" * bool(loaded.resampled)]
    parts += [f"{len(names)} {what}" for names, what in ((loaded.new, "new"), (loaded.unused, "not used")) if names]
    return ", ".join(parts)


def list_of_loaded(loaded: Loaded, path: Path) -> str:
    """Return the part of model.txt about the weights that a run starts from."""
    lines = [f"new       {name}  ({why})" for name, why in loaded.new.items()]
    lines += [f"not used  {name}" for name in loaded.unused]
    lines += [f"loaded    {name}" for name in loaded.loaded]
    return f"\nweights of {path}: {_counts(loaded)}\n" + "\n".join(lines) + "\n"
