"""Pictures of what a model sees and chooses: attention maps, neighbors on the image, local masks, samples of the data.

A function draws the figure that the arguments of `visualize.py` ask for.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.trained import as_picture, load_run, read_options
from options.data import DATASETS, DataConfig
from options.vit import ViTConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes most of a second to import


def show_picture(axis, picture) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    axis.set_xticks([])
    axis.set_yticks([])


def title_of(axis, truth: str, prediction: str) -> None:
    """Green where the model is right, red where it is wrong."""
    right = truth == prediction
    axis.set_title(truth if right else f"{prediction}\n(is {truth})", color="tab:green" if right else "tab:red", fontsize=8)


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

    from layers1d import MultiHeadConvNNAttention
    from layers2d import ConvNNAttention2d
    from mixers.graph import GraphMixer
    from mixers.selection import NeighborSelection

    options = read_options(args.run, args.data_path)
    model, images, labels, names = load_run(args.run, args.images, args.data_path)
    found: list[tuple[str, NeighborSelection, tuple, torch.Tensor]] = []

    def record(name: str, dilation: int) -> Callable:
        def hook(module, inputs, output):
            found.append((name, module, inputs[2], output.unflatten(0, (len(images), -1))[..., ::dilation]))

        return hook

    def search(mixer, inputs, output):
        """Run `select` of an attention, which searches for itself."""
        if isinstance(mixer, MultiHeadConvNNAttention):
            grid, parts = mixer.layout.grid, [part.flatten(0, 1) for part in mixer.project(inputs[0])[:2]]
        else:
            tokens, grid = mixer.fold(inputs[0])
            parts = mixer.qkv(tokens).chunk(3, dim=-1)[:2]
        mixer.select(*(mixer.select.search_features(part, grid) for part in parts), grid)

    for name, module in model.named_modules():
        if isinstance(module, NeighborSelection):
            mixer = model.get_submodule(name.rpartition(".")[0])
            module.register_forward_hook(record(name, mixer.dilation if isinstance(mixer, GraphMixer) else 1))
            if isinstance(mixer, (MultiHeadConvNNAttention, ConvNNAttention2d)):
                mixer.register_forward_hook(search)
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


def draw_masks(args: argparse.Namespace) -> Figure:
    """The local masks by type and expansion step, and beside each the pattern around one patch on the grid."""
    from matplotlib.figure import Figure

    from mixers.local import local_mask
    from options.layers import MASK_TYPES

    height, width = args.grid
    row, column = args.patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"--patch {row} {column} is not in the grid of {height} x {width} patches")
    figure = Figure(figsize=(3.4 * len(args.expansion_step), 1.9 * len(MASK_TYPES)), layout="constrained")
    axes = figure.subplots(len(MASK_TYPES), 2 * len(args.expansion_step), squeeze=False)
    for number, name in enumerate(MASK_TYPES):
        for pair, step in enumerate(args.expansion_step):
            mask = local_mask(name, step, height, width).numpy()
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
