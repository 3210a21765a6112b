"""Figures of runs: training curves, attention maps, neighbors and measures, a page to explore, masks, samples, abilities.

python visualize.py curves Output/ViT/*
python visualize.py neighbors Output/AllConvNet/ConvNN
python visualize.py explore Output/ViT/ConvNNAttention Output/ViT/KvtAttention
python visualize.py analyze Output/ViT/ConvNNAttention Output/ViT/KvtAttention
"""

import argparse
import json
import sys
from pathlib import Path

from experiments import abilities, analysis, figures, panels, pictures
from experiments.explorer import LARGEST, explorer_page
from experiments.pictures import draw_attention, draw_masks, draw_neighbors, draw_samples
from experiments.points import readable
from experiments.trained import read_config
from options.parser import OneLineParser, nonempty_path, number_type, output_path
from options.trust import trusting
from runs import DataError, RunError, Stopped
from runs.files import FIGURE_SUFFIXES, as_csv, as_figure, write_atomically
from runs.memory import is_out_of_memory
from runs.streams import run_program

NOT_COMPARED = ("seed", "output_dir", "device", "resume", "num_workers")  # options in which runs of one kind may differ
MOST_WITH_TRAINING = 12  # lines of a panel beside which training curves can still be told apart


# ---------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------


def draw_curves(args: argparse.Namespace):
    """Plot loss and top-1 by epoch; runs that differ in their seed only are one line, their mean, in a band of their range."""
    groups: dict[str, list[tuple[Path, list[dict]]]] = {}
    for folder in folders_of_runs(args.runs):
        rows = figures.read_metrics(folder)
        compared = {name: value for name, value in read_config(folder).items() if name not in NOT_COMPARED}
        values = {part: text for name, value in compared.items() for part, text in readable(name, value).items()}
        groups.setdefault(json.dumps(values), []).append((folder, rows))
    labels = figures.label_groups(
        [json.loads(kind) for kind in groups], [[folder for folder, _ in group] for group in groups.values()]
    )

    # Many lines leave no room for training curves; the styles then tell lines of one color apart.
    parts = {"train": (":", 0.08), "test": ("-", 0.2)} if len(groups) <= MOST_WITH_TRAINING else {"test": (None, 0.2)}
    figure, axes = panels.make_panels(2, 1, panels.COLUMN, 1.8)
    for axis, key, name in zip(axes, ("loss", "top1"), ("loss", "top-1 accuracy (%)"), strict=True):
        for number, (label, group) in enumerate(zip(labels, groups.values(), strict=True)):
            for part, (style, band) in parts.items():
                runs = [[row[f"{part}_{key}"] for row in rows] for _, rows in group]
                looks = figures.look_of(number, runs)
                looks["ls"] = style or looks["ls"]
                figures.plot_seeds(axis, runs, band, **looks, label=label if part == "test" else None)
        figures.by_epoch(axis)
        axis.set_ylabel(name if len(parts) > 1 else f"test {name}")
    if len(parts) > 1:
        axes[0].plot([], [], "k-", label="test")
        axes[0].plot([], [], "k:", label="training")
    if any(len(group) > 1 for group in groups.values()):
        axes[0].fill_between([], [], color="k", alpha=0.2, lw=0, label="range of seeds")
    panels.legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


def folders_of_runs(paths: list[Path]) -> list[Path]:
    """Return the folders of runs: the paths and, for the folder of a sweep, the folders in it.

    Files, and folders of runs in their first epoch, which stderr names, are left out: `Output/ViT/*` has both. A path that does
    not exist is kept, to be an error.
    """
    folders = [run for path in paths if not path.is_file() for run in runs_in(path)]
    begun = [path for path in folders if path.is_dir() and not (path / "metrics.csv").exists()]
    if len(begun) == len(folders):
        raise ValueError(f"{paths[0]} holds no metrics.csv; give folders of runs that have ended an epoch")
    if begun:
        print(f"left out, as there is no metrics.csv in them: {', '.join(map(str, begun))}", file=sys.stderr)
    return [path for path in folders if path not in begun]


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs in the folder of a sweep; any other folder as it is."""
    is_run = (folder / "config.yaml").exists() or (folder / "metrics.csv").exists()
    return [folder] if is_run else sorted(path.parent for path in folder.glob("*/config.yaml")) or [folder]


def draw_confusion(args: argparse.Namespace):
    path = args.run / "test_results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return pictures.draw_confusion(list(results["classes"]), results["confusion"])
    except FileNotFoundError:
        raise ValueError(f"{args.run} holds no test_results.json; evaluate the run with --test_only first") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no confusion matrix, as evaluations of up to 200 classes write it") from None


def write_explorer(args: argparse.Namespace) -> str:
    """Return the page on which a token shows its neighbors, for one or several runs side by side."""
    page = explorer_page(args.runs, args.images, args.pairs, args.data_path)
    if len(page) > LARGEST:
        print(f"the page has {len(page) / 1e6:.1f} MB; fewer --images or --pairs make it smaller", file=sys.stderr)
    return page


def write_table(args: argparse.Namespace, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Write the numbers of a figure beside it, and print the path."""
    table = (args.output or default_output(args)).with_suffix(".csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(table, as_csv(rows, columns))
    print(table)


def draw_analysis(args: argparse.Namespace):
    """Draw distances, hubs, mass and overlaps of the neighbors by layer; write the numbers as a table beside the figure."""
    rows = analysis.analyze_runs(args.runs, args.images, args.pairs, args.noise, args.data_path)
    write_table(args, rows, analysis.COLUMNS)
    return analysis.draw_analysis(rows)


def draw_map_of_abilities(args: argparse.Namespace):
    """Draw how much of each task every mixer has learned; write the numbers of a sweep as a table beside the figure."""
    results = abilities.read_results(args.run)
    if args.run.suffix != ".csv":
        write_table(args, abilities.as_rows(results), abilities.COLUMNS)
    return abilities.draw_abilities(results)


DRAW = {
    "curves": draw_curves,
    "confusion": draw_confusion,
    "attention": draw_attention,
    "neighbors": draw_neighbors,
    "explore": write_explorer,
    "analyze": draw_analysis,
    "masks": draw_masks,
    "samples": draw_samples,
    "tasks": lambda args: abilities.draw_tasks(),
    "abilities": draw_map_of_abilities,
}


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------


at_least_one, at_least_zero = number_type(int, 1, 2**31 - 1), number_type(int, 0, 2**31 - 1)
tiles = number_type(int, 1, 400)  # more would be too small to see


def place(text: str) -> tuple[float, float]:
    try:
        down, right = map(float, text.split(","))
    except ValueError:
        down = right = -1.0
    if not (0 <= down <= 1 and 0 <= right <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers from 0 to 1, such as 0.5,0.25")
    return down, right


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE", parser_class=OneLineParser)

    def add(name: str, help: str, run: str | None = None, images: int | None = None, count=at_least_one):
        one = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        one.add_argument("--output", type=output_path, metavar=f"FILE{'|'.join(suffixes_of(name))}", help="file to write")
        if run:
            one.add_argument(
                run, nargs="+" if run == "runs" else None, type=nonempty_path, metavar="DIR", help="output folder of a run"
            )
        if images:
            one.add_argument("--images", type=count, default=images, help=f"number of images (default: {images})")
            one.add_argument("--data_path", help="folder of the data set, if not where the run found it (default: ./Data)")
        if run and images:
            one.add_argument("--trust_code", action="store_true", help="run the custom mixer's file, whoever wrote it")
        return one

    add(
        "curves",
        "loss and accuracy of runs, or of all runs of a sweep; seeds as a band (default output: curves.png beside them)",
        "runs",
    )
    add("confusion", "predicted by true classes of an evaluated run (default output: confusion.png in its folder)", "run")
    add(
        "attention",
        "images beside the class token's attention, per block and averaged (default output: attention.png in the run's folder)",
        "run",
        4,
        tiles,
    )
    neighbors = add(
        "neighbors",
        "the K neighbors of some tokens in each layer, on the image, the nearest boldest "
        "(default output: neighbors.png in the run's folder)",
        "run",
        4,
        tiles,
    )
    neighbors.add_argument("--queries", nargs="+", type=place, metavar="Y,X", help="places of the tokens, from 0,0 to 1,1")
    neighbors.add_argument("--head", type=at_least_one, default=1, help="head, where there are several (default: 1)")
    explore = add(
        "explore", "a page that shows the neighbors of any token (default output: explorer.html beside the runs)", "runs", 16
    )
    analyze = add(
        "analyze",
        "distances, hubs and overlaps of neighbors by layer, as a table too (default output: analysis.png)",
        "runs",
        32,
    )
    for one in (explore, analyze):
        one.add_argument("--pairs", type=at_least_one, help="pairs kept per token where a layer mixes all (default: its K)")
    analyze.add_argument(
        "--noise", type=number_type(float, 0, 1), default=0.1, help="deviation of noise on the pixels (default: 0.1)"
    )
    masks = add("masks", "the local masks by type and expansion step (default output: ./Output/masks.png)")
    masks.add_argument(
        "--grid", nargs=2, type=at_least_one, default=(9, 9), metavar=("HEIGHT", "WIDTH"), help="patches (default: 9 9)"
    )
    masks.add_argument("--expansion_step", nargs="+", type=at_least_zero, default=[1, 2, 3], help="steps (default: 1 2 3)")
    samples = add(
        "samples",
        "training images with their labels, as a model sees them (default output: ./Output/<dataset>.png)",
        images=24,
        count=tiles,
    )
    samples.add_argument("--dataset", default="digits", help="data set (default: digits)")
    samples.add_argument("--resize", type=at_least_one, nargs="+", help="side they are resized to, or height and width")
    samples.add_argument("--augment", action="store_true", help="random crop and flip")
    samples.add_argument("--auto_augment", choices=("none", "rand", "trivial"), default="none", help="torchvision's policy")
    samples.add_argument(
        "--random_erasing", type=number_type(float), default=0.0, help="probability of an erased box (default: 0)"
    )
    samples.add_argument(
        "--noise", type=number_type(float), default=0.0, help="standard deviation of noise on pixels from 0 to 1"
    )
    samples.add_argument("--seed", type=at_least_zero, default=0, help="seed of order, augmentation and noise")
    add("tasks", "the generated tasks: four training and four test images of each (default output: ./Output/tasks.png)")
    grid = add("abilities", "mixers by generated tasks, as a table too (default output: abilities.png in the sweep's folder)")
    grid.add_argument(
        "run", type=nonempty_path, metavar="SWEEP", help="output folder of a sweep over both, or its table (.csv)"
    )
    return parser


def file_name(figure: str) -> str:
    return {"explore": "explorer.html", "analyze": "analysis.png"}.get(figure, f"{figure}.png")


def suffixes_of(figure: str) -> tuple[str, ...]:
    return (".html",) if figure == "explore" else FIGURE_SUFFIXES


def default_output(args: argparse.Namespace) -> Path:
    name = file_name(args.figure)
    if "runs" in args:
        return (args.runs[0] if len(args.runs) == 1 else args.runs[0].parent) / name
    if "run" in args:
        return (args.run.parent if args.run.suffix == ".csv" else args.run) / name
    return Path("Output") / (f"{Path(args.dataset).name}.png" if args.figure == "samples" else name)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    output = args.output or default_output(args)
    suffixes = suffixes_of(args.figure)
    if output.suffix.lower() not in suffixes:
        parser.error(f"--output {output} is not a file of {' or '.join(suffixes)}")
    try:
        with trusting(getattr(args, "trust_code", False)):
            figure = DRAW[args.figure](args)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, figure if isinstance(figure, str) else as_figure(figure, output.suffix))
    except Exception as error:
        if is_out_of_memory(error):
            parser.error(f"out of memory while drawing {args.figure}; smaller or fewer images need less")
        if not isinstance(error, (ValueError, OSError, DataError, RunError, Stopped)):
            raise
        parser.error(" ".join(str(error).split()))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
