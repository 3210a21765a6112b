"""Pictures of what a model sees: attention maps, neighbors on the image, local masks, samples of the data.

Each function draws the figure that the arguments of `visualize.py` ask for.
"""

import argparse
import dataclasses
import itertools

import torch

from dataset import load_data
from experiments.mixing import Mixing, record_mixing
from experiments.panels import COLUMN, PAGE, legend_below, make_panels, wrapped
from experiments.trained import as_picture, load_run
from launch.mask import draw_pairs, draw_patches
from mixers.local import local_mask
from options.data import DataConfig
from options.layers import LOCAL_MASKS
from options.vit import ViTConfig
from runs.files import drawable

QUERIES = ((0.3, 0.3), (0.3, 0.7), (0.6, 0.5))  # places of tokens: down and right, from 0 to 1
RING = {"marker": "o", "ms": 8, "mfc": "none", "ls": ""}  # around a token that has the class token as a neighbor


def show_picture(axis, picture) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    axis.set(xticks=[], yticks=[])


def title_of(axis, truth: str, prediction: str) -> None:
    """Set the class as the title, green where the model is right, red where it is wrong."""
    right = truth == prediction
    truth, prediction = drawable(truth, 18), drawable(prediction, 18)
    axis.set_title(truth if right else f"{prediction}\n(is {truth})", color="tab:green" if right else "tab:red")


def draw_attention(args: argparse.Namespace):
    """Draw the attention of the class token (or, without one, of the mean patch), block by block and averaged over heads."""
    run = load_run(args.run, args.images, args.data_path)
    if not isinstance(run.options.model, ViTConfig):
        raise ValueError(f"{args.run} is a run of allconvnet_main.py; attention maps are of the patches of vit_main.py")
    with torch.no_grad():
        logits, matrices = run.model(run.images, output_attentions=True)
    grid = run.options.model.grid
    maps = {}
    for number, matrix in enumerate(matrices, 1):
        if matrix is not None:
            weights = matrix.mean(dim=1)  # (B, N, N)
            has_class_token = weights.shape[-1] > grid[0] * grid[1]
            weights = weights[:, 0] if has_class_token else weights.mean(dim=1)  # (B, N)
            maps[f"block {number}"] = weights[:, -grid[0] * grid[1] :].unflatten(1, grid)
    if not maps:
        raise ValueError(f"{args.run}: layer={run.options.model.layer} returns no mixing matrix")
    maps["average"] = torch.stack(list(maps.values())).mean(dim=0)

    side = max(0.75, min(1.2, PAGE / (len(maps) + 1)))
    figure, axes = make_panels(len(run.images) * (len(maps) + 1), len(maps) + 1, side, side + 0.25)
    figure.supxlabel(wrapped("attention from low (dark) to high (light), on a scale of each map", figure), fontsize=7)
    for image, row in enumerate(axes.reshape(len(run.images), -1)):
        show_picture(row[0], as_picture(run.images[image], run.options.data))
        title_of(row[0], *(run.class_names[number] for number in (run.labels[image], logits[image].argmax())))
        for axis, (name, of_images) in zip(row[1:], maps.items(), strict=True):
            axis.imshow(of_images[image].numpy(), cmap="viridis", extent=(0, 1, 1, 0))
            axis.set(xticks=[], yticks=[])
            if image == 0:
                axis.set_title(name)
    return figure


def draw_neighbors(args: argparse.Namespace):
    """Draw the neighbors of some tokens in every layer on the image: joined to the token, the nearest boldest."""
    from matplotlib.lines import Line2D

    run = load_run(args.run, args.images, args.data_path)
    logits, layers = record_mixing(run.model, run.images, run.options.model.K)
    layers = [layer for layer in layers if layer.is_search]
    if not layers:
        raise ValueError(f"{args.run}: layer={run.options.model.layer} searches no neighbors; ConvNN and its kin do")
    heads = max(layer.index.shape[1] for layer in layers)
    if args.head > heads:
        raise ValueError(f"--head {args.head}: the layers have heads 1 to {heads}")

    side = max(0.95, min(1.65, PAGE / len(layers)))
    figure, axes = make_panels(len(run.images) * len(layers), len(layers), side, side + 0.25)
    for image, row in enumerate(axes.reshape(len(run.images), -1)):
        for layer, axis in zip(layers, row, strict=True):
            show_picture(axis, as_picture(run.images[image], run.options.data))
            head = min(args.head, layer.index.shape[1])  # the last one of layers with fewer heads
            for number, place in enumerate(args.queries or QUERIES):
                draw_lines(axis, layer, layer.index[image, head - 1], place, f"C{number}")
            if image == 0:
                of_head = f", head {head}" if layer.index.shape[1] > 1 else ""
                size = " x ".join(map(str, layer.grid))
                axis.set_xlabel(f"{layer.name}{of_head}\n{size} tokens")
                axis.xaxis.set_label_position("top")
        title_of(row[0], *(run.class_names[number] for number in (run.labels[image], logits[image].argmax())))
    looks = {"a token": "*", "its neighbors, the nearest boldest": "o"}
    handles = [Line2D([], [], color="gray", marker=marker, ls="") for marker in looks.values()]
    if any(layer.class_tokens for layer in layers):
        looks["the class token among them"] = ""
        handles.append(Line2D([], [], color="gray", **RING))
    legend_below(figure, handles, list(looks))
    return figure


def draw_lines(axis, layer: Mixing, index, place: tuple[float, float], color: str) -> None:
    """Draw lines from the token at a place to its neighbors in `index` (N, K); a ring around it stands for a class token."""
    # Keys are numbered over the padded grid, class tokens first; queries over the image inside the ring of padding.
    height, width = (side - 2 * layer.padding for side in layer.grid)
    row, column = int(min(place[0] * height, height - 1)), int(min(place[1] * width, width - 1))
    x, y = (column + 0.5) / width, (row + 0.5) / height
    neighbors = index[layer.class_tokens + row * width + column].tolist()
    for rank, token in enumerate(neighbors):
        strength = 1 - 0.8 * rank / max(len(neighbors) - 1, 1)
        if token < layer.class_tokens:
            axis.plot(x, y, color=color, **RING)
            continue
        v, u = (cell - layer.padding + 0.5 for cell in divmod(token - layer.class_tokens, layer.grid[1]))
        looks = {"color": color, "alpha": 0.25 + 0.75 * strength}
        axis.plot([x, u / width], [y, v / height], "-", lw=0.4 + strength, **looks)
        axis.plot(u / width, v / height, "o", ms=1 + 2 * strength, **looks)
    axis.plot(x, y, "*", color=color, ms=7, mec="white", mew=0.5)


def draw_masks(args: argparse.Namespace):
    """Draw the local masks by type and expansion step, and beside each the patches that the middle one sees."""
    height, width = args.grid
    row, column = height // 2, width // 2
    steps = args.expansion_step
    side = max(0.9, min(1.6, PAGE / (2 * len(steps))))
    figure, axes = make_panels(2 * len(LOCAL_MASKS) * len(steps), 2 * len(steps), side, side + 0.2)
    figure.supxlabel(wrapped("masks of all pairs, and the patches that the one with the star attends to", figure), fontsize=7)
    panels = iter(axes.reshape(-1, 2))
    for name in LOCAL_MASKS:
        for step in steps:
            mask = local_mask(name, step, height, width)
            whole, around = next(panels)
            draw_pairs(whole, mask)
            if step == steps[0]:
                whole.set_ylabel(name)
            if name == "1d_cardinal":
                whole.set_title(f"expansion step {step}", fontweight="bold")
            draw_patches(around, mask[row * width + column].view(height, width), row, column)
    return figure


def draw_samples(args: argparse.Namespace):
    values = {name: getattr(args, name) for name in ("dataset", "augment", "auto_augment", "random_erasing", "noise")}
    config = DataConfig(**values, data_path=args.data_path or "./Data", resize=args.resize, num_workers=0, download=False)
    config = dataclasses.replace(config, resize=config.resize or config.size)
    data = load_data(config, batch_size=args.images, seed=args.seed, device=torch.device("cpu"))
    images, labels = next(iter(data.train.epoch(0)))
    figure, axes = make_panels(len(images), min(8, len(images)), PAGE / 8, 1.1)
    for axis, image, label in zip(axes, images, labels, strict=True):
        show_picture(axis, as_picture(image, config))
        axis.set_title(drawable(data.class_names[label], 16), fontsize=6)
    return figure


def draw_confusion(names: list[str], counts: list[list[int]]):
    """Draw the shares of each class's images by predicted class, in percent, and the accuracy of each class."""
    shares = [[100 * n / max(sum(row), 1) for n in row] for row in counts]
    size = min(PAGE, max(COLUMN, 0.25 * len(names)))
    figure, (axis,) = make_panels(1, 1, size, 0.8 * size)
    figure.set_layout_engine("compressed")  # which knows of square cells; "constrained" cuts the labels off
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, label="% of the class", shrink=0.6)
    axis.set(xlabel="predicted", ylabel="class")
    if len(names) > 60:  # too many to be read
        return figure
    names = [drawable(name, 18) for name in names]
    labels = [f"{name} ({row[number]:.0f} %)" for number, (name, row) in enumerate(zip(names, shares, strict=True))]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set_yticks(range(len(names)), labels, fontsize=6)
    if len(names) <= 20:
        for y, x in itertools.product(range(len(names)), repeat=2):
            if counts[y][x]:
                color = "w" if shares[y][x] > 60 else "k"
                axis.text(x, y, str(counts[y][x]), ha="center", va="center", fontsize=5, color=color)
    return figure
