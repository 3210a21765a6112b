"""Try custom mixers on a batch of two before data is read: output, mixing matrix, finite numbers, gradients."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from allconvnet import make_single2d
from mixers.base import TokenLayout
from mixers.build import build_layer
from models.backbones import plan
from options.allconvnet import AllConvNetConfig
from options.custom_mixer import describe_error, is_address
from options.layers import Row, layer_label
from options.models import ModelConfig
from options.vit import ViTConfig
from runs.memory import is_out_of_memory


class Trial(NamedTuple):
    """A mixer to build, the shapes of its input and output, and in 1-D the heads of its mixing matrix."""

    address: str
    row: Row
    make: Callable[[], nn.Module]
    given: tuple[int, ...]
    wanted: tuple[int, ...]
    heads: int | None = None

    def error(self, what: str) -> ValueError:
        return ValueError(f"--layer {self.address}: {layer_label(self.address)} {what}")

    def call(self, what: str, function: Callable, *arguments):
        """Call the user's code. Raises ValueError, in one line, for its errors."""
        try:
            return function(*arguments)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            file = sys.modules[self.row.target.partition(":")[0]].__file__
            raise self.error(f"{what}: {describe_error(error, file)}") from None

    def check(self, out: object, call: str, wanted: tuple[int, ...]) -> None:
        """Raise ValueError for an output of another shape or type, or with numbers that are not finite."""
        if not isinstance(out, Tensor) or tuple(out.shape) != wanted or not out.is_floating_point():
            raise self.error(f"gave {_kind(out)} for {call} of {self.given}; it must give {wanted}")
        if not out.isfinite().all():
            raise self.error(f"gave numbers that are not finite (NaN or infinity) for {call}")


def probe(config: ModelConfig, device: torch.device) -> list[str]:
    """Try each custom mixer of the model on `device`; the random numbers of the run stay as they are.

    Returns a line for each that leaves parameters without a gradient. Raises ValueError, in one line, for a layer that does not
    fit its map in a backbone, and for a custom mixer that cannot train: a constructor or a forward that raises, another shape,
    a missing pair under output_attentions, NaN or infinity.
    """
    lines = {}
    for trial in trials(config):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            missing = try_out(trial, device)
        if missing:
            lines[f"--layer {layer_label(trial.address)}: no gradient reaches {', '.join(missing)}"] = None
    return list(lines)


def trials(config: ModelConfig) -> Iterator[Trial]:
    """Yield the mixer of a ViT once, as its blocks are alike, and that of each layer of a convolutional network."""
    if isinstance(config, ViTConfig) and is_address(config.layer) and config.num_local_layers != 0:
        layout = TokenLayout(*config.grid, config.class_tokens)
        shape, row = (2, layout.num_tokens, config.d_model), config.rows[config.layer]
        make = partial(build_layer, row, config, config.d_model, config.num_heads, layout=layout, block=0)
        yield Trial(config.layer, row, make, shape, shape, config.num_heads)
    elif isinstance(config, AllConvNetConfig):
        for one, before, after, stride in dict.fromkeys(layers2d(config)):
            for name, width in one.branches(after):
                if is_address(name):
                    make = partial(make_single2d, name, one, before, width, stride=stride)
                    sides = [-(-side // stride) for side in config.grid_after(name, one.image_size)]
                    yield Trial(name, one.rows[name], make, (2, before, *one.image_size), (2, width, *sides))


def layers2d(config: AllConvNetConfig) -> Iterator[tuple[AllConvNetConfig, int, int, int]]:
    """Yield config, channels in and out and stride of every layer. Raises ValueError for one that does not fit its map."""
    if config.is_backbone:
        for _, module, _, _, layer in plan(config)[1]:
            if layer is not None:
                yield layer, module.in_channels, module.out_channels, module.stride[0]
        return
    for before, after, grid in zip((config.in_channels, *config.channels), config.channels, config.grids(), strict=False):
        yield config.layer_on(after, grid), before, after, 1


def try_out(trial: Trial, device: torch.device) -> list[str]:
    """Return the names of the parameters without a gradient. Raises ValueError as `probe` does."""
    # A module that is thrown away: no statistic of the trained one may change.
    mixer = trial.call("cannot be made", lambda: trial.make().to(device))
    x = torch.randn(trial.given, device=device, requires_grad=True)
    out = trial.call("fails in forward", mixer, x)
    trial.check(out, "forward", trial.wanted)
    if out.requires_grad:
        trial.call("fails in its backward pass", (out * torch.randn_like(out)).sum().backward)
    if trial.heads is not None:
        with torch.no_grad():
            pair = trial.call("fails in forward(x, True), its output_attentions", mixer.eval(), x.detach(), True)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise trial.error(
                f"gave {_kind(pair)} for forward(x, True); under output_attentions it must give a pair: the output, and the "
                "(B, heads, N, N) matrix of its weights, or None"
            )
        out, matrix = pair
        trial.check(out, "forward(x, True)[0]", trial.wanted)
        if matrix is not None:
            tokens = trial.given[1]
            trial.check(matrix, "the matrix of forward(x, True)", (2, trial.heads, tokens, tokens))
    return [name for name, parameter in mixer.named_parameters() if parameter.requires_grad and parameter.grad is None]


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape)) + ("" if value.is_floating_point() else f" of {value.dtype}")
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
