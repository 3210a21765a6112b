"""Figures of runs: training curves, attention maps, neighbors and what is measured of them, a page to explore, masks, samples.

python visualize.py curves Output/ViT/*
python visualize.py neighbors Output/AllConvNet/ConvNN
python visualize.py explore Output/ViT/ConvNNAttention Output/ViT/KvtAttention
python visualize.py analyze Output/ViT/ConvNNAttention Output/ViT/KvtAttention
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cli import as_number, new_path, number_type
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
from experiments.points import readable
from experiments.trained import as_picture, load_model, load_run, read_config, read_options  # noqa: F401  some only offered
from options import DATASETS, DataConfig, OneLineParser, ViTConfig
from runs.streams import run_program

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes most of a second to import

NOT_COMPARED = ("seed", "output_dir", "device", "resume", "num_workers")  # by them runs of one kind may differ
MOST_WITH_TRAINING = 12  # lines of a panel beside which training curves can still be told apart


def show_picture(axis, picture) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    axis.set_xticks([])
    axis.set_yticks([])


def title_of(axis, truth: str, prediction: str) -> None:
    """Green where the model is right, red where it is wrong."""
    right = truth == prediction
    axis.set_title(truth if right else f"{prediction}\n(is {truth})", color="tab:green" if right else "tab:red", fontsize=8)


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


def draw_attention(args: argparse.Namespace) -> Figure:
    """What the class token (or, without one, the mean patch) attends to, block by block and averaged, heads averaged."""
    import torch
    from matplotlib.figure import Figure

    options = read_options(args.run, args.data_path)
    if not isinstance(options.model, ViTConfig):
        raise ValueError(f"{args.run} is a run of allconvnet_main.py; attention maps are of the patches of vit_main.py")
    model, images, labels, names = load_run(args.run, args.images, args.data_path)
    with torch.no_grad():
        logits, matrices = model(images, output_attentions=True)
    if all(matrix is None for matrix in matrices):
        raise ValueError(f"{args.run}: the convolutions of layer={options.model.layer} have no attention")
    patches = options.model.grid[0] * options.model.grid[1]
    maps = {}
    for number, matrix in enumerate(matrices, 1):
        if matrix is None:
            continue
        weights = matrix.mean(dim=1)  # (B, N, N)
        # Where there is no class token, the mean over the queries: how much each patch is attended to.
        from_token = weights[:, 0] if matrix.shape[-1] > patches else weights.mean(dim=1)
        maps[f"block {number}"] = from_token[:, -patches:].unflatten(1, options.model.grid)
    maps["average"] = torch.stack(list(maps.values())).mean(dim=0)

    figure = Figure(figsize=(1.5 * (len(maps) + 1), 1.75 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    for row, image, label, predicted, number in zip(
        axes, images, labels, logits.argmax(dim=1), range(len(images)), strict=True
    ):
        show_picture(row[0], as_picture(image, options.data.dataset))
        title_of(row[0], names[label], names[predicted])
        for axis, (name, of_images) in zip(row[1:], maps.items(), strict=True):
            axis.imshow(of_images[number].numpy(), cmap="viridis", extent=(0, 1, 1, 0))
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(name, fontsize=8)
    return figure


def draw_neighbors(args: argparse.Namespace) -> Figure:
    """The neighbors that some tokens pick in every layer, on the image: joined to the token, the nearest boldest."""
    import torch
    from matplotlib.figure import Figure

    from graph_layers import GraphMixer
    from selection import NeighborSelection

    options = read_options(args.run, args.data_path)
    model, images, labels, names = load_run(args.run, args.images, args.data_path)
    found: list[tuple[str, NeighborSelection, tuple, torch.Tensor]] = []

    def record(name: str, dilation: int) -> Callable:
        def hook(module, inputs, output):
            index = output[0] if isinstance(output, tuple) else output  # where scores come with it
            found.append((name, module, inputs[2], index.unflatten(0, (len(images), -1))[..., ::dilation]))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, NeighborSelection):
            mixer = model.get_submodule(name.rpartition(".")[0])
            module.register_forward_hook(record(name, mixer.dilation if isinstance(mixer, GraphMixer) else 1))
    with torch.no_grad():
        predicted = model(images).argmax(dim=1)
    if not found:
        raise ValueError(f"{args.run}: layer={options.model.layer} searches no neighbors; ConvNN and its kin do")
    heads = max(index.shape[1] for *_, index in found)
    if args.head >= heads:
        raise ValueError(f"--head {args.head}: the layers have heads 0 to {heads - 1}")
    queries = args.queries or [(0.3, 0.3), (0.3, 0.7), (0.6, 0.5)]

    figure = Figure(figsize=(2.2 * len(found), 2.45 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(found), squeeze=False)
    for image, row in enumerate(axes):
        for (name, module, grid, index), axis in zip(found, row, strict=True):
            show_picture(axis, as_picture(images[image], options.data.dataset))
            head = min(args.head, index.shape[1] - 1)  # of layers with fewer heads the last one
            for number, place in enumerate(queries):
                draw_choice(axis, module, grid, index[image, head], place, f"C{number}")
            if image == 0:
                which = f", head {head}" if index.shape[1] > 1 else ""
                axis.set_xlabel(f"{layer_number(name)}: {' x '.join(map(str, grid))} tokens{which}", fontsize=8)
                axis.xaxis.set_label_position("top")
        title_of(row[0], names[labels[image]], names[predicted[image]])
    return figure


def layer_number(name: str) -> str:
    """The layer that a module is part of, by the first number in its name: layers.0.mixer.select -> layer 1.

    In VGG and ResNet numbers are of all parts, and torchvision's names say more: features.3.select -> features.3.
    """
    if re.match(r"features\.|conv1\.|layer\d", name):
        return name.removesuffix(".select").removesuffix(".layer")
    number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return f"layer {number + 1}" + (" (" + name.split(".")[-2] + ")" if ".first." in name or ".second." in name else "")


def draw_choice(axis, module, grid: tuple[int, ...], index, place: tuple[float, float], color: str) -> None:
    """Lines from the token at a place (down, right; 0 to 1) to its neighbors; a ring around it if it chose a class token."""
    height, width = grid if len(grid) == 2 else (1, grid[0])
    # Keys are numbered over the padded grid, class tokens first; queries over the image inside the ring of padding.
    pad, class_tokens = module.padding, module.class_tokens
    inside = height - 2 * pad * (len(grid) == 2), width - 2 * pad

    def center(token: int) -> tuple[float, float]:
        row, column = divmod(token - class_tokens, width)
        return (column - pad + 0.5) / inside[1], (row - pad * (len(grid) == 2) + 0.5) / inside[0]

    row, column = (min(int(part * side), side - 1) for part, side in zip(place, inside, strict=True))
    query = class_tokens + row * inside[1] + column
    x, y = (column + 0.5) / inside[1], (row + 0.5) / inside[0]
    neighbors = index[query].tolist()
    for rank, token in enumerate(neighbors):
        strength = 1 - 0.8 * rank / max(len(neighbors) - 1, 1)
        if token < class_tokens:
            axis.plot(x, y, "o", ms=11, mfc="none", mec=color, mew=1)
            continue
        u, v = center(token)
        axis.plot([x, u], [y, v], "-", color=color, lw=0.5 + 1.5 * strength, alpha=0.25 + 0.75 * strength)
        axis.plot(u, v, "o", color=color, ms=1.5 + 3 * strength, alpha=0.25 + 0.75 * strength)
    axis.plot(x, y, "*", color=color, ms=10, mec="white", mew=0.8)


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
    from utils import as_csv, write_atomically

    rows = analysis.analyze_runs(args.runs, args.images, args.pairs, args.noise, args.data_path)
    table = (args.output or default_output(args)).with_suffix(".csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(table, as_csv(rows, analysis.COLUMNS).encode())
    print(table)
    return analysis.draw_analysis(rows)


def draw_masks(args: argparse.Namespace) -> Figure:
    """The local masks by type and expansion step, and beside each the pattern around one patch on the grid."""
    from matplotlib.figure import Figure

    from masks import generate_1d_attention_mask, generate_2d_attention_mask_all_neighbors, generate_2d_attention_mask_cardinal

    height, width = args.grid
    types = {
        "1d_cardinal": lambda step: generate_1d_attention_mask(1 + 4 * step, height * width),
        "1d_all_neighbors": lambda step: generate_1d_attention_mask((2 * step + 1) ** 2, height * width),
        "2d_cardinal": lambda step: generate_2d_attention_mask_cardinal(step, height, width),
        "2d_all_neighbors": lambda step: generate_2d_attention_mask_all_neighbors(step, height, width),
    }
    row, column = args.patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"--patch {row} {column} is not in the grid of {height} x {width} patches")
    figure = Figure(figsize=(3.4 * len(args.expansion_step), 1.9 * len(types)), layout="constrained")
    axes = figure.subplots(len(types), 2 * len(args.expansion_step), squeeze=False)
    for number, (name, make) in enumerate(types.items()):
        for pair, step in enumerate(args.expansion_step):
            mask = make(step).numpy()
            whole, around = axes[number, 2 * pair : 2 * pair + 2]
            whole.imshow(mask, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            around.imshow(mask[row * width + column].reshape(height, width), cmap="Blues", vmin=0, vmax=1)
            around.plot(column, row, "*", color="tab:red", ms=7)
            around.set_xticks([x - 0.5 for x in range(width)], [])
            around.set_yticks([y - 0.5 for y in range(height)], [])
            around.grid(color="lightgray", lw=0.4)
            around.tick_params(length=0)
            whole.set_xticks([])
            whole.set_yticks([])
            count = int(mask[row * width + column].sum())
            around.set_title(f"{count} patches", fontsize=8)
            if number == 0:
                whole.set_title(f"expansion step {step}", fontsize=9, fontweight="bold")
            if pair == 0:
                whole.set_ylabel(name, fontsize=9)
    return figure


def draw_samples(args: argparse.Namespace) -> Figure:
    """Training images with their labels, as a model sees them."""
    import torch
    from matplotlib.figure import Figure

    from dataset import load_data

    values = {name: getattr(args, name) for name in ("dataset", "augment", "auto_augment", "random_erasing", "noise")}
    size = args.resize or DATASETS[args.dataset].size
    config = DataConfig(**values, data_path=args.data_path or "./Data", resize=size, num_workers=0, download=False)
    data = load_data(config, batch_size=args.images, seed=args.seed, device=torch.device("cpu"))
    images, labels = next(iter(data.train.epoch(0)))
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(images) :]:
        axis.axis("off")
    for axis, image, label in zip(axes, images, labels, strict=False):
        show_picture(axis, as_picture(image, args.dataset))
        axis.set_title(data.class_names[label], fontsize=8)
    return figure


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
    args.parser.note_repeated()
    output = args.output or default_output(args)
    if output.suffix.lower() != (suffix := suffix_of(args.figure)):
        parser.error(f"--output {output} is not a {suffix} file, which is what is {'drawn' if suffix == '.png' else 'written'}")
    try:
        figure = DRAW[args.figure](args)
        from utils import as_png, write_atomically

        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, figure.encode() if isinstance(figure, str) else as_png(figure))
    except Exception as error:
        from dataset import DataError  # late, as torch takes seconds to import
        from runs.checkpoints import NonFiniteWeights
        from runs.memory import is_out_of_memory
        from utils import RunError, WriteError

        if is_out_of_memory(error):
            parser.error(f"out of memory while drawing {args.figure}; a smaller picture, or fewer, need less")
        if not isinstance(error, (ValueError, OSError, DataError, NonFiniteWeights, RunError, WriteError)):
            raise
        parser.error(" ".join(str(error).split()))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
