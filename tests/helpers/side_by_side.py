"""Many layers in one model, for what costs seconds per model: tracing, compiling, exporting."""

from torch import Tensor, nn


class SideBySide(nn.Module):
    """The mean of layers that see one input. Each has its own parameters, and so its own gradients to compare."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers) / len(self.layers)


def in_groups(names: tuple[str, ...], groups: int) -> list[tuple[str, ...]]:
    return [names[first::groups] for first in range(groups)]
