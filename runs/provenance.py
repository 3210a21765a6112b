"""What a checkpoint was trained as: the options it is evaluated with, and what a user is told where they differ."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from options import AsTrained, ModelConfig, Options, as_words, assumed_options, same_value
from runs import RunError


def options_as_trained(
    options: Options, as_trained: Callable[[dict], AsTrained] | None, state: dict, path: Path
) -> tuple[Options, dict]:
    """The options to evaluate a checkpoint with, and how they differ from those it was trained with. Raises RunError."""
    trained = state.get("config")
    if not isinstance(trained, dict) or as_trained is None:
        return options, {}
    try:
        found, changes = as_trained(trained)
    except (ValueError, TypeError) as error:
        raise RunError(f"--test_only: with the options of {path}, {error}") from None
    if not options.train.checkpoint:  # results stay in the folder that the weights are from
        found = found._replace(train=replace(found.train, output_dir=options.train.output_dir))
    return found, changes


def check_same_class(options: dict, trained: dict, path: Path, flag: str) -> None:
    """Raise RunError where a layer of one's own is called as the trained one, and its file has another content."""
    now, then = options.get("layer_sha256"), trained.get("layer_sha256")
    if then and now and now != then and same_value("layer", options["layer"], trained.get("layer")):
        raise RunError(
            f"{flag}: {path} was trained with another content of --layer {options['layer']}: its SHA-256 was {then} and is now "
            f"{now}; give its file the former content back"
            + ", or take it as it is now by --override"
            * (flag == "--test_only")
        )


def say_what_is_assumed(options: Options, state: dict, path: Path, changes: dict) -> None:
    if not isinstance(state.get("config"), dict):
        words = " ".join(f"--{name} {as_words(value)}" for name, value in assumed_options(options.model).items())
        print(f"assumed of {path}, which does not say: {words}")
    elif changes:
        words = ", ".join(f"--{name} {as_words(before)}, here {as_words(after)}" for name, (before, after) in changes.items())
        print(f"warning: --override: {path} was trained with {words}", file=sys.stderr)


def say_what_differs(model: ModelConfig, state: dict, path: Path) -> None:
    """A warning where training goes on from weights that another model than this one was trained to, though they fit."""
    trained = state.get("config")
    if isinstance(trained, dict):
        differences = [
            f"--{name} {as_words(trained[name])}, here {as_words(value)}"
            for name, value in assumed_options(model).items()
            if name in trained and not same_value(name, trained[name], value)
        ]
        if differences:
            print(f"warning: {path} was trained with {'; '.join(differences)}", file=sys.stderr)
