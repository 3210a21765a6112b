"""Our mixers inside timm's vision transformers: `VisionTransformer(..., attn_layer=timm_mixer("ConvNNAttention", K=9))`."""

import copyreg
import dataclasses
from functools import partial

from torch import Tensor, nn

from mixers.base import TokenLayout
from mixers.build import layer_arguments, layer_class
from options.layers import LAYERS1D_ROWS, layer_row
from options.vit import ViTConfig


class MixerType(type):
    """Type of the classes that `timm_mixer` makes: pickle calls it again, as it finds them in no module."""

    made_from: tuple[str, dict]


copyreg.pickle(MixerType, lambda mixer: (partial(timm_mixer, mixer.made_from[0], **mixer.made_from[1]), ()))


def timm_mixer(layer: str, **options) -> type[nn.Module]:
    """Return a class for timm's `attn_layer`, or for the `attn` of a `Block`: (B, N, dim) -> the same.

    Its projections are called `qkv` and `proj` as in timm's attention, so it takes the weights of that.

    Args:
        layer: a name in `LAYERS1D_ROWS`.
        options: fields of `ViTConfig` for the mixer, and image_size (224), patch_size (16) and pool (cls; `mean` for a model
            without a class token), which describe the tokens. timm passes heads, biases and dropout.

    Raises ValueError for an unknown layer or an option that does not fit; the class raises it for normalized queries and keys,
    and for masks.
    """
    base = ViTConfig(layer=layer, d_model=2**16, num_heads=1, **options)  # timm passes the features later
    layout = TokenLayout(*base.grid, base.class_tokens)
    row = layer_row(LAYERS1D_ROWS, layer, base.branch_ratio)

    class Mixer(layer_class(row), metaclass=MixerType):
        made_from = layer, options

        def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = False,
            qk_norm: bool = False,
            scale_norm: bool = False,
            proj_bias: bool = True,
            attn_drop: float = 0.0,
            proj_drop: float = 0.0,
            norm_layer: type[nn.Module] | None = None,
            device=None,
            dtype=None,
        ):
            if qk_norm or scale_norm:
                raise ValueError(
                    f"{layer} has no norm of queries and keys or of its output: qk_norm and scale_norm must be False"
                )
            own = {"d_model": dim, "num_heads": num_heads, "attention_dropout": attn_drop}
            config = dataclasses.replace(base, **own, qkv_bias=qkv_bias, proj_bias=proj_bias)
            super().__init__(dim, num_heads, **layer_arguments(row, config, layout=layout, block=0))
            self.proj_drop = nn.Dropout(proj_drop)
            self.to(device=device, dtype=dtype)

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            if attn_mask is not None or is_causal:
                raise ValueError(f"{layer} selects the tokens that attend to each other itself, and takes no mask")
            return self.proj_drop(super().forward(x))

    Mixer.__name__ = Mixer.__qualname__ = layer_class(row).__name__
    return Mixer
