"""Small sweeps: the same points with a share of the images and of the epochs."""

import math
from pathlib import Path

from experiments.points import Point, name_of, options_of
from options.data import info_of
from options.runs import Options

LEAST_PER_CLASS = 10  # images, in either part
LIMITS = ("train_limit", "test_limit")


def scale_points(points: list[Point], scale: float, folder: Path) -> tuple[list[Point], str]:
    """Return the points with a share of their images and epochs, and a line about them. Raises ValueError."""
    if not 0 < scale < 1:
        raise ValueError(f"--scale {scale:g} must be above 0 and below 1, such as 0.05")
    small, lines = [], {}
    for point in points:
        if point.test_only:
            raise ValueError(
                f"{point.name}: --scale is of training, and test_only evaluates a checkpoint; set test_limit instead"
            )
        options, _ = options_of(point, folder)
        images = images_of(point, options)
        changed = scaled_epochs(options, scale)
        # Never fewer than a handful for each class, nor more than there are.
        least = LEAST_PER_CLASS * options.model.num_classes
        changed |= {name: min(count, share(count, scale, least)) for name, count in images.items()}
        varying = {name: changed.get(name, value) for name, value in point.varying.items()}
        values = point.values | changed
        small.append(Point(name_of(varying, values), point.program, values, varying))
        counts = {limit: f"{values[limit]:,} of {images[limit]:,}" for limit in LIMITS}
        lines[
            f"{options.data.dataset}: {values['num_epochs']} of {options.train.num_epochs} epochs, "
            f"{counts['train_limit']} training and {counts['test_limit']} test images"
        ] = None
    return small, f"--scale {scale:g}: {'; '.join(lines)}"


def share(count: int, scale: float, least: int = 1) -> int:
    return max(least, math.floor(count * scale + 0.5))


def scaled_epochs(options: Options, scale: float) -> dict:
    """Scale the epochs, the steps and warm-up of the learning rate, and the patience of early stopping."""
    train = options.train
    names = ["num_epochs", *["lr_step"] * (train.scheduler in ("step", "plateau"))]
    names += [name for name in ("warmup_epochs", "early_stopping") if getattr(train, name)]
    warmup = {"warmup_steps": share(train.warmup_steps, scale**2)} if train.warmup_steps else {}  # fewer images an epoch too
    return {name: share(getattr(train, name), scale) for name in names} | warmup


def images_of(point: Point, options: Options) -> dict[str, int]:
    """Return the numbers of images of the whole run, by the option that limits them. Raises ValueError for unknown ones."""
    known = info_of(options.data.dataset).images or (None, None)
    found = {limit: getattr(options.data, limit) or count for limit, count in zip(LIMITS, known, strict=True)}
    missing = [limit for limit, count in found.items() if count is None]
    if missing:
        raise ValueError(
            f"{point.name}: --scale does not know how many images dataset={options.data.dataset} has; give "
            f"{' and '.join(missing)}, as in {' '.join(f'--set {limit}=N' for limit in missing)}"
        )
    return found
