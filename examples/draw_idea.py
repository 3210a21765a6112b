"""Draw docs/idea.png, the figure of the README: the tokens that Conv2d, ConvNN and attention mix."""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from neighbors import find_neighbors, grid_locations, location_neighbors

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "idea.png"
SIDE, K = 9, 9
TOKEN = 3 * SIDE + 2  # row 3, column 2: at the edge of the left fruit
SCENE = """
sssssssss
srrsssssl
rrrsssrsl
srrssrrrs
sssssrrrs
sssssssss
gggssgggg
ggggggggg
ggggggggg
""".split()
PALETTE = {"s": (0.66, 0.80, 0.93), "l": (0.93, 0.95, 0.97), "r": (0.87, 0.42, 0.36), "g": (0.58, 0.74, 0.45)}


def scene() -> Tensor:
    """Return an image of SIDE x SIDE tokens with three features each, (1, N, 3): two red fruits between sky and grass."""
    colors = torch.tensor([PALETTE[letter] for row in SCENE for letter in row])
    noise = torch.randn(colors.shape, generator=torch.Generator().manual_seed(3))
    return (colors + 0.018 * noise).clamp(0, 1)[None]


def draw_grid(axes, tokens: Tensor, title: str, rule: str, formula: str) -> None:
    axes.imshow(tokens.view(SIDE, SIDE, 3).numpy())
    axes.set_title(title, fontsize=16, fontweight="bold", pad=8)
    axes.text(0.5, -0.06, rule, fontsize=13, ha="center", va="center", transform=axes.transAxes)
    axes.text(0.5, -0.175, formula, fontsize=15, ha="center", va="center", transform=axes.transAxes)
    axes.set_xticks([edge - 0.5 for edge in range(SIDE + 1)], [])
    axes.set_yticks([edge - 0.5 for edge in range(SIDE + 1)], [])
    axes.grid(color="white", linewidth=1.2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def frame(axes, token: int, color: str, width: float) -> None:
    y, x = divmod(token, SIDE)
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=4, clip_on=False))


def draw_slots(axes, chosen: list[int]) -> None:
    """Number the chosen tokens by their slot, and join them with their query."""
    own_y, own_x = divmod(TOKEN, SIDE)
    for slot, token in enumerate(chosen, 1):
        y, x = divmod(token, SIDE)
        axes.plot([own_x, x], [own_y, y], color="black", linewidth=1, alpha=0.55, zorder=2)
        axes.text(x, y, str(slot), ha="center", va="center", fontsize=12, fontweight="bold", zorder=6)
        axes.scatter([x], [y], s=210, color="white", edgecolor="black", linewidth=0.8, zorder=5)
        frame(axes, token, "black", 1.4)
    frame(axes, TOKEN, "black", 4)


def draw_weights(axes, weights: Tensor) -> None:
    """Draw a dot on every token, as large as its weight."""
    for token, weight in enumerate(weights.tolist()):
        y, x = divmod(token, SIDE)
        axes.scatter([x], [y], s=8 + 420 * weight / weights.max().item(), color="black", edgecolor="white", linewidth=0.6)
    frame(axes, TOKEN, "black", 4)


def main() -> None:
    tokens = scene()
    own = torch.tensor([TOKEN])
    window = location_neighbors(grid_locations((SIDE, SIDE)), K, own)[0]
    similar = find_neighbors(tokens[:, own], tokens, K, "euclidean", self_index=own)[0, 0]
    distance = torch.cdist(tokens[:, own], tokens)[0, 0]

    figure = Figure(figsize=(13, 5.5))
    conv, convnn, attention = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.215, wspace=0.08)
    slots = r"$y_i = \sum_{k=1}^{9}\ W_k\ x_{j(i,k)}$"
    draw_grid(conv, tokens, "Conv2d", "the 9 nearest by location, a matrix per slot", slots)
    draw_slots(conv, window.tolist())
    draw_grid(convnn, tokens, "ConvNN", "the 9 most similar, a matrix per slot", slots)
    draw_slots(convnn, similar.tolist())
    draw_grid(attention, tokens, "Attention", "all tokens, weights by similarity", r"$y_i = \sum_{j=1}^{N}\ s_{ij}\ v_j$")
    draw_weights(attention, (-8 * distance).softmax(dim=0))
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
