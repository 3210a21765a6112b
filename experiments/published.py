"""Published numbers beside ours: a table of options and measures whose rows are matched with the points of a sweep."""

import csv
import io
import math
from typing import NamedTuple

from experiments.points import Point, find_program
from options.data import DataConfig
from options.fields import did_you_mean, specs
from options.neighbors import canonical_metric
from options.reading import read_text
from options.runs import PROGRAMS
from options.training import TrainConfig

MEASURES = ("top1", "best_top1", "epoch_seconds")  # as the summary calls them
ABOUT = ("epochs", "source")
COMPARED = ("top1", "best_top1")  # seconds are of another machine
LARGEST = 10_000_000  # bytes of a file


class Row(NamedTuple):
    options: dict[str, object]  # other options match anything
    measures: dict[str, tuple[float, float]]  # smallest and largest published value
    epochs: int | None
    source: str


class Published(NamedTuple):
    measures: dict[str, tuple[float, float]]
    source: str
    is_whole: bool  # the run has as many epochs and all images


def read_published(path: str, points: list[Point]) -> list[Row]:
    """Read the rows of a published.csv. Raises ValueError for a file of another kind, or a column that is no option."""
    try:
        lines = csv.DictReader(io.StringIO(read_text(path, LARGEST).removeprefix("\ufeff"), newline=""), strict=True)
        columns, rows = lines.fieldnames or [], list(lines)
    except OSError as error:
        raise ValueError(f"--published {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--published {path} is not a CSV file: {error}") from None
    options = known_options(points)
    for name in columns:
        if name not in (*MEASURES, *ABOUT, *options):
            raise ValueError(
                f"--published {path}: its column {name!r} is no option, nor one of {', '.join((*MEASURES, *ABOUT))}"
                f"{did_you_mean(name, options)}"
            )
        if columns.count(name) > 1:
            raise ValueError(f"--published {path} has two columns {name!r}; drop one")
    if not any(name in columns for name in MEASURES):
        raise ValueError(f"--published {path} has none of the columns {', '.join(MEASURES)}")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(parse_row(row, options))
        except ValueError as error:
            raise ValueError(f"--published {path}, row {number}: {error}") from None
    return found


def known_options(points: list[Point]) -> tuple[str, ...]:
    programs = [*PROGRAMS.values(), *(find_program(point.program, point.name) for point in points)]
    configs = dict.fromkeys([DataConfig, TrainConfig, *(program.model for program in programs)])
    return tuple(dict.fromkeys(name for config in configs for name in specs(config)))


def parse_row(row: dict, options: tuple[str, ...]) -> Row:
    if None in row or None in row.values():
        raise ValueError("not as many cells as the first line has names")
    cells = {name: text.strip() for name, text in row.items() if text.strip()}
    epochs = cells.get("epochs")
    if epochs is not None and not epochs.isdecimal():
        raise ValueError(f"epochs {epochs!r} is not a whole number")
    measures = {name: parse_range(name, cells[name]) for name in MEASURES if name in cells}
    stated = {name: plain(name, cells[name].split()) for name in options if name in cells}
    return Row(stated, measures, epochs and int(epochs), cells.get("source", ""))


def parse_range(name: str, text: str) -> tuple[float, float]:
    """Parse `77.6` or `77.6..78.4`."""
    try:
        numbers = [float(word) for word in text.split("..")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)) or numbers != sorted(numbers):
        raise ValueError(f"{name} {text!r} is neither a number nor two as in 77.6..78.4")
    return numbers[0], numbers[-1]


def plain(name: str, value) -> tuple:
    """Return a value in its one normal form: 1e-4 is 0.0001, similarity is cosine, 224 is 224 x 224."""
    words = []
    for word in value if isinstance(value, (list, tuple)) else [value]:
        try:
            words.append(float(word) if not isinstance(word, bool) else str(word).lower())
        except (TypeError, ValueError):
            words.append(str(word).lower())
    if name == "magnitude_type":
        words = [canonical_metric(word) for word in words]
    return tuple(words * 2 if name == "resize" and len(words) == 1 else words)


def match(rows: list[Row], runs: dict[str, dict]) -> dict[str, Published]:
    """Return the published numbers of each run, by its name; several rows that match make a range.

    runs: options by name, by name of the run. Rows with the run's number of epochs count alone, if there are any. Evaluations
    of a checkpoint match nothing: the options of its training are unknown.
    """
    found = {}
    for run, values in runs.items():
        if values["test_only"]:
            continue
        options = {name: plain(name, value) for name, value in values.items()}
        fitting = [row for row in rows if all(options.get(name) == value for name, value in row.options.items())]
        epochs = options["num_epochs"][0]
        same = [row for row in fitting if row.epochs in (epochs, None)]
        if fitting:
            is_whole = bool(same) and options["train_limit"] == options["test_limit"] == ("none",)
            found[run] = merge(same or fitting, is_whole)
    return found


def merge(rows: list[Row], is_whole: bool) -> Published:
    measures = {}
    for name in MEASURES:
        ranges = [row.measures[name] for row in rows if name in row.measures]
        if ranges:
            measures[name] = min(low for low, _ in ranges), max(high for _, high in ranges)
    return Published(measures, "; ".join(dict.fromkeys(row.source for row in rows if row.source)), is_whole)


def is_outside(mean: float, deviation: float, low: float, high: float) -> bool:
    """Tell if our mean and the middle of the range are more than two deviations and more than half the range apart."""
    return abs(mean - (low + high) / 2) > max(2 * deviation, (high - low) / 2)


def put_beside(rows: list[dict], found: list[Published | None]) -> list[dict]:
    """Return the rows of a summary with published numbers behind the measures that they belong to."""
    shown = [name for name in MEASURES if any(one and name in one.measures for one in found)]
    if not shown:
        return rows
    wider = []
    for row, published in zip(rows, found, strict=True):
        new = {}
        for name, value in row.items():
            new[name] = value
            if (measure := name.removesuffix("_std")) != name and measure in shown:
                new |= columns_of(measure, row, published)
        wider.append(new | {"published_source": published.source if published else ""})
    return wider


def columns_of(measure: str, row: dict, published: Published | None) -> dict:
    low, high = published.measures.get(measure, (math.nan, math.nan)) if published else (math.nan, math.nan)
    columns = {f"published_{measure}": low, f"published_{measure}_high": high}
    if measure in COMPARED:
        mean, deviation = row[measure], row[f"{measure}_std"]
        is_compared = published and published.is_whole and not math.isnan(deviation + low)  # one seed has no deviation
        verdict = "outside" if is_compared and is_outside(mean, deviation, low, high) else "within"
        columns[f"published_{measure}_is"] = verdict if is_compared else ""
    return columns


def as_text(row: dict, measure: str) -> str:
    """Return a cell of the readable table: `74.39 to 75.33 (outside)`."""
    low, high = row[f"published_{measure}"], row[f"published_{measure}_high"]
    if math.isnan(low):
        return ""
    text = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return text + (" (outside)" if row.get(f"published_{measure}_is") == "outside" else "")


NOTE = (
    "published is what others found with the same options, as far as they are stated; a range where there are several. It is "
    "outside where its middle and our mean are further apart than two of our standard deviations and than half its range. Runs "
    "of one seed have no deviation, and those of other epochs or fewer images are no repetition: there nothing is marked. "
    "summary.csv names the sources."
)
