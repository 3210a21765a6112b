"""The pooling that a layer of the registry can be tested with."""

from options.layers import LAYERS1D_ROWS


def pool_of(layer: str, pool: str = "cls") -> str:
    """Return `pool`, or mean for a layer that does not mix: its class token would see no patch."""
    return pool if LAYERS1D_ROWS[layer].mixes else "mean"
