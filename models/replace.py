"""Replace the attention of vision transformers of timm, torchvision and Hugging Face by mixers of this package."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixers.base import TokenMixer
from models.timm import call_of_timm, mixer_class
from vit import init_vit_weights


def replace_attention(model: nn.Module, layer: str, **options) -> nn.Module:
    """Replace every self-attention of a vision transformer, in place, and keep its weights; return the model.

    Projections keep their weights where the mixer has them; other parameters are initialized. With `KvtAttention` or depthwise
    `ConvNNAttention` and K = N the model computes what it did.

    Args:
        model: a vision transformer of timm (class token, registers and norms of queries and keys included), torchvision's
            `VisionTransformer`, or Hugging Face's `ViTModel`; or a module that holds one.
        layer: a name in `LAYERS1D_ROWS`, or the address of a custom mixer.
        options: fields of `ViTConfig` for the mixer, such as K=16. The model gives the rest.

    Raises ValueError for a model without such attention, and for a layer or an option that does not fit.
    """
    found = {name: part for name, part in model.named_modules() if _name_of(part) in LIBRARIES}
    library = LIBRARIES[_name_of(next(iter(found.values())))] if found else None
    owner = next((part for part in model.modules() if library and hasattr(part, library.mark)), None)
    if owner is None:
        if any(isinstance(part, TokenMixer) for part in model.modules()):
            raise ValueError(
                f"the attention of {type(model).__name__} is replaced already; replace it in a copy of the original"
            )
        raise ValueError(
            f"{type(model).__name__} has no attention that a mixer can replace; a ViT, DeiT or DINOv2 of timm, torchvision's "
            "VisionTransformer and Hugging Face's ViTModel have"
        )
    try:
        grid, prefix_tokens = library.tokens(owner)
    except (AttributeError, TypeError):
        raise ValueError(f"{type(owner).__name__} has no fixed grid of patches") from None
    sizes = {"image_size": grid, "patch_size": 1, "prefix_tokens": prefix_tokens}
    if twice := sizes.keys() & options:
        raise ValueError(f"{min(twice)} comes from the model; drop it")
    make = mixer_class(library.call, layer, **sizes, **options)
    for number, (name, attention) in enumerate(found.items()):
        try:
            arguments, weights = library.read(attention)
            mixer = make(**arguments, block=number).to(weights["proj.weight"]).train(attention.training)
        except ValueError as error:
            raise ValueError(f"{name} of {type(owner).__name__}: {error}") from None
        init_vit_weights(mixer)
        own = mixer.state_dict()
        fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
        mixer.load_state_dict(fitting, strict=False)
        model.set_submodule(name, mixer)
    return model


class Found(NamedTuple):
    """Self-attention of another library: the arguments of a mixer in its place, and its weights by the mixer's names."""

    arguments: dict
    weights: dict[str, Tensor]


def read_timm(attention: nn.Module) -> Found:
    """Read timm's `Attention`. Raises ValueError if no mixer can stand in its place."""
    qkv, proj, norm = attention.qkv, attention.proj, attention.q_norm
    if getattr(attention, "gate", None) is not None or not isinstance(attention.norm, nn.Identity):
        raise ValueError("its output has a gate or a norm, and no mixer has one; use layer=Attention, its own")
    if (qkv.out_features, proj.out_features) != (3 * qkv.in_features, qkv.in_features):
        raise ValueError("its heads do not have the width of the tokens; use layer=Attention, its own")
    arguments = {
        "dim": qkv.in_features,
        "num_heads": attention.num_heads,
        "qkv_bias": qkv.bias is not None,
        "proj_bias": proj.bias is not None,
        "attn_drop": attention.attn_drop.p,
        "proj_drop": attention.proj_drop.p,
    }
    if not isinstance(norm, nn.Identity):
        arguments |= {"qk_norm": True, "norm_layer": lambda width: type(norm)(width, eps=norm.eps)}
    return Found(arguments, attention.state_dict())


def read_torchvision(attention: nn.MultiheadAttention) -> Found:
    arguments = {"dim": attention.embed_dim, "num_heads": attention.num_heads, "attn_drop": attention.dropout, "qkv_bias": True}
    state = attention.state_dict()
    return Found(arguments, {name.replace("in_proj_", "qkv.").replace("out_proj", "proj"): state[name] for name in state})


def read_huggingface(attention: nn.Module) -> Found:
    parts, proj = (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj
    weights = {f"proj.{name}": value for name, value in proj.state_dict().items()}
    weights |= {f"qkv.{name}": torch.cat([getattr(part, name) for part in parts]) for name in parts[0].state_dict()}
    arguments = {"dim": proj.out_features, "num_heads": attention.num_attention_heads, "qkv_bias": "qkv.bias" in weights}
    return Found(arguments | {"attn_drop": attention.attention_dropout}, weights)


def call_of_torchvision(mixer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **_) -> tuple[Tensor, None]:
    return mixer.mixed(query), None


def call_of_huggingface(mixer: nn.Module, hidden_states: Tensor, *_, **__) -> tuple[Tensor, None]:
    return mixer.mixed(hidden_states), None


class Library(NamedTuple):
    """Vision transformers of a library."""

    mark: str  # attribute of the module that knows its tokens
    tokens: Callable[[nn.Module], tuple[tuple[int, int], int]]  # grid of patches, and number of tokens before them
    read: Callable[[nn.Module], Found]
    call: Callable  # forward pass of a mixer in place of its attention


def _tokens_of_huggingface(embeddings: nn.Module) -> tuple[tuple[int, int], int]:
    patches = embeddings.patch_embeddings
    return tuple(side // patch for side, patch in zip(patches.image_size, patches.patch_size, strict=True)), 1


LIBRARIES = {  # by the class of the attention
    "timm.layers.attention.Attention": Library(
        "num_prefix_tokens",
        lambda model: (tuple(model.patch_embed.grid_size), model.num_prefix_tokens),
        read_timm,
        call_of_timm,
    ),
    "torch.nn.modules.activation.MultiheadAttention": Library(
        "conv_proj", lambda model: ((model.image_size // model.patch_size,) * 2, 1), read_torchvision, call_of_torchvision
    ),
    "transformers.models.vit.modeling_vit.ViTAttention": Library(
        "patch_embeddings", _tokens_of_huggingface, read_huggingface, call_of_huggingface
    ),
}


def _name_of(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
