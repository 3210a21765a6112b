"""Figures of runs: training curves, attention maps, neighbors and what is measured of them, a page to explore, masks, samples.

python visualize.py curves Output/ViT/*
python visualize.py neighbors Output/AllConvNet/ConvNN
python visualize.py explore Output/ViT/ConvNNAttention Output/ViT/KvtAttention
python visualize.py analyze Output/ViT/ConvNNAttention Output/ViT/KvtAttention
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import (
    COLORS,
    LINE_STYLES,
    color_of,
    draw_confusion,
    label_groups,
    legend_beside,
    plot_seeds,
    read_metrics,
)
from experiments.pictures import (
    draw_attention,
    draw_masks,
    draw_neighbors,
    draw_samples,
)
from experiments.points import readable
from experiments.trained import read_config
from options.data import DATASETS
from options.fields import as_number
from options.parser import OneLineParser, new_path, number_type
from runs.streams import run_program

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes most of a second to import

NOT_COMPARED = ("seed", "output_dir", "device", "resume", "num_workers")  # by them runs of one kind may differ
MOST_WITH_TRAINING = 12  # lines of a panel beside which training curves can still be told apart


# ---------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------


def draw_curves(args: argparse.Namespace) -> Figure:
    """Loss and top-1 by epoch; runs that differ in their seed only are one line, their mean, in a band of their range."""
    from matplotlib.figure import Figure

    groups: dict[str, list[tuple[Path, list[dict]]]] = {}
    for folder in folders_of_runs(args.runs, args.output or default_output(args)):
        rows = read_metrics(folder)
        values = {}
        for name, value in read_config(folder).items():
            values |= {} if name in NOT_COMPARED else readable(name, value)
        groups.setdefault(json.dumps(values), []).append((folder, rows))
    labels = label_groups([json.loads(key) for key in groups], [[folder for folder, _ in group] for group in groups.values()])

    figure = Figure(figsize=(9, min(8, max(4.2, 0.14 * len(groups)))), layout="constrained")
    axes = figure.subplots(1, 2)
    # Many lines leave no room for training curves; the styles then tell those of one color apart.
    parts = {"train": (":", 0.08), "test": ("-", 0.2)} if len(groups) <= MOST_WITH_TRAINING else {"test": ("-", 0.2)}
    for number, (label, group) in enumerate(zip(labels, groups.values(), strict=True)):
        for axis, key in zip(axes, ("loss", "top1"), strict=True):
            for part, (style, band) in parts.items():
                runs = [[row[f"{part}_{key}"] for row in rows] for _, rows in group]
                looks = {"color": color_of(number), "marker": "." if min(map(len, runs)) < 3 else None}
                looks["ls"] = style if len(parts) > 1 else LINE_STYLES[number // COLORS % len(LINE_STYLES)]
                plot_seeds(axis, runs, band, **looks, label=label if part == "test" else None)
    for axis, name in zip(axes, ("loss", "top-1 accuracy (%)"), strict=True):
        axis.set_xlabel("epoch")
        axis.set_ylabel(name if len(parts) > 1 else f"test {name}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if len(parts) > 1:
        axes[0].plot([], [], "k-", label="test")
        axes[0].plot([], [], "k:", label="training")
    legend_beside(figure, *axes[0].get_legend_handles_labels())
    return figure


def folders_of_runs(paths: list[Path], output: Path) -> list[Path]:
    """The paths that hold runs. `Output/ViT/*` has other things too: files, and runs in their first epoch; stderr names them.

    The figure itself, drawn by the last call, is one of those files. A path that is not there is kept, to be an error.
    """
    others = [path for path in paths if path.is_file() or (path.is_dir() and not (path / "metrics.csv").exists())]
    runs = [path for path in paths if path not in others]
    if not runs:
        raise ValueError(f"{paths[0]} holds no metrics.csv; give folders of runs that have ended an epoch")
    if named := [str(path) for path in others if path.resolve() != output.resolve()]:
        print(f"left out, as there is no metrics.csv in them: {', '.join(named)}", file=sys.stderr)
    return runs


def draw_confusion_of(args: argparse.Namespace) -> Figure:
    """The confusion matrix in the run's test_results.json."""
    path = args.run / "test_results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        names, counts = list(results["classes"]), results["confusion"]
    except FileNotFoundError:
        raise ValueError(f"{args.run} holds no test_results.json; evaluate the run with --test_only first") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no confusion matrix, as evaluations of up to 200 classes write it") from None
    return draw_confusion(names, counts)


def write_explorer(args: argparse.Namespace) -> str:
    """The page on which a token answers with its neighbors, of one or several runs side by side."""
    from experiments.explorer import LARGEST, explorer_page

    page = explorer_page(args.runs, args.images, args.pairs, args.data_path)
    if len(page) > LARGEST:
        print(f"the page has {len(page) / 1e6:.1f} MB; fewer --images or --pairs make it smaller", file=sys.stderr)
    return page


def draw_analysis(args: argparse.Namespace) -> Figure:
    """Distances, hubs, mass and overlaps of the neighbors of runs, by layer; the numbers go into a table beside the figure."""
    from experiments import analysis
    from runs.files import as_csv, write_atomically

    rows = analysis.analyze_runs(args.runs, args.images, args.pairs, args.noise, args.data_path)
    table = (args.output or default_output(args)).with_suffix(".csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(table, as_csv(rows, analysis.COLUMNS).encode())
    print(table)
    return analysis.draw_analysis(rows)


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------


at_least_one, at_least_zero = number_type(int, 1, 2**31 - 1), number_type(int, 0, 2**31 - 1)
pictures = number_type(int, 1, 400)  # beyond it, nobody could see any


def place(text: str) -> tuple[float, float]:
    try:
        down, right = (as_number(part, float) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, as 0.5,0.25") from None
    if not (0 <= down <= 1 and 0 <= right <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is outside the image, whose sides run from 0 to 1")
    return down, right


def deviation(text: str) -> float:
    try:
        value = as_number(text, float)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE", parser_class=OneLineParser)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        one = figures.add_parser(name, help=help, description=help, allow_abbrev=False)
        one.set_defaults(parser=one)
        one.add_argument("--output", type=new_path, metavar=f"FILE{suffix_of(name)}", help="where it goes")
        return one

    curves = add("curves", "loss and accuracy of one or many runs, seeds as a band (default output: curves.png beside them)")
    curves.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="output folders of runs")
    confusion = add("confusion", "which classes are taken for which (default output: confusion.png in the run's folder)")
    confusion.add_argument("run", type=Path, metavar="DIR", help="output folder of a run that --test_only has evaluated")
    for name, help in (
        ("attention", "images beside what the class token attends to, per block and averaged"),
        ("neighbors", "the K neighbors that some tokens pick in each layer, on the image, the nearest boldest"),
    ):
        one = add(name, f"{help} (default output: {name}.png in the run's folder)")
        one.add_argument("run", type=Path, metavar="DIR", help="output folder of a run")
        one.add_argument("--images", type=pictures, default=4, help="test images (default: 4)")
        one.add_argument("--data_path", help="folder that holds the data set, if not where the run found it")
        if name == "neighbors":
            one.add_argument("--queries", nargs="+", type=place, metavar="Y,X", help="places of the tokens, from 0,0 to 1,1")
            one.add_argument("--head", type=at_least_zero, default=0, help="head, where there are several (default: 0)")
    for name, help, images in (
        ("explore", "a page that shows the neighbors of any token (default output: explorer.html beside the runs)", 16),
        (
            "analyze",
            "distances, hubs and overlaps of neighbors by layer, as a table too (default output: analysis.png)",
            32,
        ),
    ):
        one = add(name, help)
        one.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="output folders of runs")
        one.add_argument("--images", type=at_least_one, default=images, help=f"test images (default: {images})")
        one.add_argument("--pairs", type=at_least_one, help="pairs kept per token where a layer mixes all (default: its K)")
        one.add_argument("--data_path", help="folder that holds the data set, if not where the runs found it")
        if name == "analyze":
            one.add_argument("--noise", type=deviation, default=0.1, help="deviation of noise on the pixels (default: 0.1)")
    masks = add("masks", "the local masks by type and expansion step (default output: ./Output/masks.png)")
    masks.add_argument(
        "--grid", nargs=2, type=at_least_one, default=(9, 9), metavar=("HEIGHT", "WIDTH"), help="patches (default: 9 9)"
    )
    masks.add_argument("--expansion_step", nargs="+", type=at_least_zero, default=[1, 2, 3], help="steps (default: 1 2 3)")
    masks.add_argument(
        "--patch", nargs=2, type=at_least_zero, metavar=("ROW", "COLUMN"), help="patch in the middle of the pattern"
    )
    samples = add("samples", "training images with their labels, as a model sees them (default output: ./Output/<dataset>.png)")
    samples.add_argument("--dataset", choices=DATASETS, default="digits", help="data set (default: digits)")
    samples.add_argument("--data_path", help="folder that holds it (default: ./Data)")
    samples.add_argument("--images", type=pictures, default=24, help="how many (default: 24)")
    samples.add_argument("--resize", type=at_least_one, nargs="+", help="side they are resized to, or height and width")
    samples.add_argument("--augment", action="store_true", help="random crop and flip")
    samples.add_argument("--auto_augment", choices=("none", "rand", "trivial"), default="none", help="torchvision's policy")
    samples.add_argument(
        "--random_erasing", type=number_type(float), default=0.0, help="probability of an erased box (default: 0)"
    )
    samples.add_argument(
        "--noise", type=number_type(float), default=0.0, help="standard deviation of noise on pixels from 0 to 1"
    )
    samples.add_argument("--seed", type=at_least_zero, default=0, help="of order, augmentation and noise")
    return parser


DRAW = {
    "curves": draw_curves,
    "confusion": draw_confusion_of,
    "attention": draw_attention,
    "neighbors": draw_neighbors,
    "explore": write_explorer,
    "analyze": draw_analysis,
    "masks": draw_masks,
    "samples": draw_samples,
}


# Figures of one or several runs, and their files.
OF_RUNS = {
    "curves": "curves.png",
    "explore": "explorer.html",
    "analyze": "analysis.png",
}


def suffix_of(figure: str) -> str:
    return ".html" if figure == "explore" else ".png"


def default_output(args: argparse.Namespace) -> Path:
    if args.figure in OF_RUNS:
        return (args.runs[0] if len(args.runs) == 1 else args.runs[0].parent) / OF_RUNS[args.figure]
    if args.figure in ("attention", "neighbors", "confusion"):
        return args.run / f"{args.figure}.png"
    return Path("Output") / f"{args.dataset if args.figure == 'samples' else args.figure}.png"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    output = args.output or default_output(args)
    if output.suffix.lower() != (suffix := suffix_of(args.figure)):
        parser.error(f"--output {output} is not a {suffix} file, which is what is {'drawn' if suffix == '.png' else 'written'}")
    try:
        figure = DRAW[args.figure](args)
        from runs.files import as_png, write_atomically

        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, figure.encode() if isinstance(figure, str) else as_png(figure))
    except Exception as error:
        from readers.images import DataError
        from runs import RunError
        from runs.checkpoints import NonFiniteWeights
        from runs.files import WriteError
        from runs.memory import is_out_of_memory

        if is_out_of_memory(error):
            parser.error(f"out of memory while drawing {args.figure}; a smaller picture, or fewer, need less")
        if not isinstance(error, (ValueError, OSError, DataError, NonFiniteWeights, RunError, WriteError)):
            raise
        parser.error(" ".join(str(error).split()))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
