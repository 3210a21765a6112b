"""Build a layer from its row."""

import importlib

from torch import nn

from options.layers import Row
from options.models import ModelConfig


def build_layer(row: Row, config: ModelConfig, *sizes: int, **known) -> nn.Module:
    """Build the layer of a row with the options of the config. Raises ValueError as its constructor does.

    Args:
        sizes: positional arguments: channels in and out in 2-D, features and heads in 1-D.
        known: values that a row may name and the config does not hold, such as the layout of the tokens.
    """
    return layer_class(row)(*sizes, **layer_arguments(row, config, **known))


def layer_class(row: Row) -> type[nn.Module]:
    module, _, name = row.target.partition(":")
    return getattr(importlib.import_module(module), name)


def layer_arguments(row: Row, config: ModelConfig, **known) -> dict:
    """Collect the keyword arguments of the constructor from the config and from `known`."""
    values = {
        argument: known[option] if option in known else getattr(config, option) for argument, option in row.arguments.items()
    }
    # None leaves an option to the default of the class.
    return dict(row.fixed) | {argument: value for argument, value in values.items() if value is not None}
