"""Picture of the mask of a layer, which a run of `MaskedAttention` leaves in its folder."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mixers.local import MultiHeadMaskedAttention
from runs.files import as_figure, paper_style, write_atomically

LARGEST = 2000  # tokens; a mask of more pairs is not drawn


def draw_pairs(axis, mask: Tensor) -> None:
    """Draw a mask (N, N), rows attend to columns."""
    axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def draw_patches(axis, allowed: Tensor, row: int, column: int) -> None:
    """Draw the patches (height, width) that the patch with the star, in this row and column, attends to."""
    height, width = allowed.shape
    axis.imshow(allowed.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.plot(column, row, "*", color="tab:red", ms=5)
    axis.set(xticks=[x - 0.5 for x in range(width)], yticks=[y - 0.5 for y in range(height)])
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.grid(color="lightgray", lw=0.4)
    axis.set_title(f"{int(allowed.sum())} patches")


def draw_mask(mixer: MultiHeadMaskedAttention):
    """Draw the mask of all pairs of tokens, and the patches that the one in the middle of the grid attends to."""
    from matplotlib import rc_context  # imported late: it takes most of a second
    from matplotlib.figure import Figure

    height, width, c = mixer.layout.sides
    row, column = height // 2, width // 2
    pattern = mixer.patterns.make(height, width, c)
    middle = pattern.allows(torch.tensor(c + row * width + column), torch.arange(mixer.layout.num_tokens))
    with rc_context(paper_style()):  # the settings of a caller stay
        figure = Figure(figsize=(3.3, 1.9), layout="constrained")
        *others, axis = figure.subplots(1, 1 + (mixer.layout.num_tokens <= LARGEST), squeeze=False)[0]
        for whole in others:
            draw_pairs(whole, pattern.make_mask(torch.device("cpu")))
            whole.set_title(f"{mixer.layout.num_tokens} x {mixer.layout.num_tokens} tokens")
        draw_patches(axis, middle[c:].view(height, width), row, column)
        step = f", expansion step {mixer.expansion_step}" * (mixer.mask_type != "full")
        figure.suptitle(f"{mixer.mask_type}{step}", fontsize=7)
    return figure


def write_mask(model: nn.Module, path: Path) -> None:
    """Write the picture of the mask of a model's first `MultiHeadMaskedAttention`, if it has one."""
    mixer = next((part for part in model.modules() if isinstance(part, MultiHeadMaskedAttention)), None)
    if mixer is not None:
        write_atomically(path, as_figure(draw_mask(mixer)))
