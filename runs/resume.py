"""Resume an interrupted run: find its state, and continue from it."""

import sys
from pathlib import Path

from options.data import DataConfig, info_of
from options.fields import as_words, specs
from options.models import ModelConfig
from options.runs import program_of, same_value
from options.training import RESUME_MAY_CHANGE, TrainConfig
from runs import RunError
from runs.checkpoints import DamagedError, load_run_state, load_state
from runs.fingerprint import compare, noted_classes
from runs.folder import RunFolder
from runs.processes import Processes
from runs.provenance import check_same_class
from runs.training import Training

DEFAULTS = {name: spec.default for config in (ModelConfig, DataConfig, TrainConfig) for name, spec in specs(config).items()}


def resumable_state(folder: RunFolder, options: dict, quiet: bool = False) -> tuple[dict, Path] | None:
    """Return the state to resume from and its file, or None if there is none: last.pt, or an earlier one if that is damaged.

    Raises RunError if it belongs to a run with other options, or if no file can be read.
    """
    candidates = [path for path in (folder.last, folder.previous, folder.best) if path.exists()]
    problems = [] if folder.last.exists() else [f"{folder.last} is gone"]
    for path in candidates:
        try:
            state = load_run_state(path)
        except DamagedError as error:
            problems.append(str(error))
            continue
        _check_options(options, state["config"], path)
        if problems and not quiet:
            print(f"warning: {'; '.join(problems)}; resuming from {path}", file=sys.stderr)
        return state, path
    if candidates:
        raise RunError(
            f"--resume: {'; '.join(problems)}; there is nothing to resume from, --overwrite instead of --resume starts anew"
        )
    return None


def _check_options(options: dict, trained: dict, path: Path) -> None:
    """Raise RunError where the options of the run in this file are others."""
    program = program_of(trained)
    if program and program_of(options) not in (None, program):
        raise RunError(f"--resume: {path} is of a run of {program}; resume it with that, or use another --output_dir")
    check_same_class(options, trained, path, "--resume")
    info = info_of(trained.get("dataset"))
    trained = ({"mean": info.mean, "std": info.std} if info else {}) | trained
    for name, value in options.items():
        before = trained.get(name, DEFAULTS.get(name))  # an option that is newer than the run
        if name not in RESUME_MAY_CHANGE and not same_value(name, before, value):
            raise RunError(
                f"--resume: {path} was trained with --{name} {as_words(before)}, not {as_words(value)}; give it as "
                "it was, or use another --output_dir for another run"
            )


def check_same_data(state: dict, here: dict, path: Path, override: bool, quiet: bool) -> None:
    """Raise RunError if the run in this file trained on other classes, or without `override` on another number of images."""
    if noted_classes(state) is None:
        line = f"{path} does not say what it was trained on: the data are taken to be the same"
    elif not (difference := compare(state["data"], here)):
        return
    elif difference.of_classes or (difference.of_numbers and not override):
        remedy = "give the data back their former content, "
        remedy += "go on with those that are there by --override, " if difference.of_numbers else ""
        raise RunError(f"--resume: {path} was trained on {difference.text}; {remedy}or use another --output_dir")
    else:
        line = f"{path} was trained on {difference.text}; going on with those that are there"
    if not quiet:
        print(f"warning: {line}", file=sys.stderr)


def check_same_state(processes: Processes, folder: RunFolder, found: tuple[dict, Path] | None) -> None:
    """Raise RunError if the processes found different states: they would train apart, or wait for each other forever."""
    seen = processes.gather(None if found is None else [found[1].name, found[0]["epoch"], found[0]["step"]])
    if any(one != seen[0] for one in seen):
        raise RunError(f"--resume: the processes find different states in --output_dir {folder.path}: {seen}; all must see it")


def resume(training: Training, folder: RunFolder, state: dict, path: Path) -> None:
    """Continue from the state in this file of the folder. Raises RunError if it does not fit the training."""
    processes = training.processes
    if type(state["step"]) is int and state["step"] > training.steps_per_epoch and training.config.override:
        state = state | {"step": training.steps_per_epoch}  # of an epoch that had more images
    try:
        try:
            load_state(training.model, state["model"])
        except ValueError as error:
            raise RunError(f"--resume: {path} is {error}") from None
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise RunError(f"--resume: {path} is damaged ({type(error).__name__})") from None
    lines = [f"resumed {path}: {training.epoch} epochs and {training.step} steps are done"]
    before, now = state["config"].get("num_epochs"), training.config.num_epochs
    if training.config.scheduler == "cosine" and before != now:
        lines.append(
            f"warning: --num_epochs was {before} and is {now}: from here on the learning rate is that of --scheduler "
            f"cosine over {now} epochs, which the epochs so far were not trained at"
        )
    if len(state["rng"]) != processes.world:
        lines.append(
            f"warning: {len(state['rng'])} processes trained so far, now there are {processes.world}: "
            "the numbers will not be exactly those of a run that was not interrupted"
        )
    if training.best and not folder.best.exists():
        lines.append(f"warning: {folder.best} of epoch {training.best['epoch']} is gone")
    processes.wait()  # before the first one replaces files that others still read
    if processes.first:
        if path != folder.last:
            folder.link(path, folder.last)  # in place of a damaged one
        for line in lines:
            print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)
