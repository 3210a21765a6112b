"""Which tokens each token of an image takes from, and with what weights: recorded from a model, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.trained import Run
from layers1d import MultiHeadConvNNAttention, MultiHeadKvtAttention, MultiHeadMixer
from layers2d import Attention2d, ConvNN2d, ConvNNAttention2d
from neighbors import find_neighbors, neighbor_scores, neighbor_weights
from vit import ViT

ABSENT = -1  # in an index: a place that no token takes, as the token has fewer neighbors


@dataclass
class Mixing:
    """How one layer mixes the tokens of B images with H heads: N tokens take from M keys.

    Keys are the class tokens, then the grid in raster order; the N tokens that ask are those inside its ring of padding.
    """

    name: str
    rule: str  # in words: how the K are chosen, and what their weights are
    grid: tuple[int, int]  # sides of the grid of keys, ring of padding included
    padding: int
    class_tokens: int
    index: Tensor  # (B, H, N, K), in the layer's order, ABSENT where there is none
    weights: Tensor  # (B, H, N, K), 0 where absent
    share: Tensor  # (B, H, N): of a token's whole weight, what the K hold
    is_share: bool = True  # the weights of a token add up to one over all keys; False: raw scores
    is_whole: bool = True  # the layer mixes no other pairs than these
    scored: tuple[Tensor, Tensor, str] | None = None  # query (B, H, N, d), key (B, H, M, d), metric: if they decide

    @property
    def num_keys(self) -> int:
        return self.class_tokens + self.grid[0] * self.grid[1]


def record_mixing(model: nn.Module, images: Tensor, pairs: int) -> tuple[Tensor, list[Mixing]]:
    """Logits of the images, and the mixing of each layer that mixes by neighbors or by a matrix; convolutions have neither.

    Where a layer mixes all pairs, the `pairs` strongest of each token are kept.
    """
    found: list[Mixing] = []

    def hook(name: str):
        def record(module: nn.Module, inputs: tuple, output) -> None:
            if isinstance(module, MultiHeadMixer):
                mixing = _of_sequence(module, inputs[0], output[1], model.config.grid, pairs)
            else:
                mixing = _of_image(module, inputs[0], pairs)
            if mixing is not None:
                mixing.name = layer_name(name, "block" if isinstance(model, ViT) else "layer")
                found.append(mixing)

        return record

    kinds = (MultiHeadMixer, ConvNN2d, ConvNNAttention2d, Attention2d)
    handles = [part.register_forward_hook(hook(name)) for name, part in model.named_modules() if isinstance(part, kinds)]
    with torch.no_grad():
        logits = model(images, output_attentions=True)[0] if isinstance(model, ViT) else model(images)
    for handle in handles:
        handle.remove()
    return logits, found


def record_run(run: Run, pairs: int) -> tuple[Tensor, list[Mixing]]:
    """`record_mixing` of a run on its images. Raises ValueError where no layer has neighbors or weights."""
    logits, found = record_mixing(run.model, run.images, pairs)
    if not found:
        raise ValueError(
            f"{run.folder}: layer={run.options.model.layer} has no neighbors or weights to show; a convolution has none"
        )
    return logits, found


def layer_name(module: str, kind: str) -> str:
    """What the layer is called that a module is part of: blocks.2.mixer.first -> block 3 (first)."""
    parts = module.split(".")
    number = next((int(part) for part in parts if part.isdigit()), 0)
    branch = next((f" ({part})" for part in parts if part in ("first", "second")), "")
    return f"{kind} {number + 1}{branch}"


# ---------------------------------------------------------------------------------------------------------------
# The kinds of layers
# ---------------------------------------------------------------------------------------------------------------


def _of_sequence(mixer: MultiHeadMixer, x: Tensor, matrix: Tensor | None, grid: tuple[int, int], pairs: int) -> Mixing | None:
    """Of a mixer on tokens x (B, N, d_model), from its mixing matrix (B, H, N, N)."""
    if matrix is None:
        return None
    where = {"name": "", "grid": grid, "padding": 0, "class_tokens": x.shape[1] - grid[0] * grid[1]}
    if isinstance(mixer, MultiHeadConvNNAttention):
        query, key, _ = mixer.project(x)
        query, key = (mixer.select.search_features(part.flatten(0, 1), mixer.layout.grid) for part in (query, key))
        index = mixer.select(query, key, mixer.layout.grid)
        return _chosen(index, query, key, mixer.num_heads, mixer.select.neighbors, mixer.softmax_topk_val, where)
    if isinstance(mixer, MultiHeadKvtAttention):
        query, key = (part.flatten(0, 1) for part in mixer.project(x)[:2])
        index = find_neighbors(query, key, mixer.K, "matmul")
        weights = neighbor_weights(neighbor_scores(query, key, index, "matmul"), "matmul")
        rule = f"the {mixer.K} largest q · k of a token, weighed by their softmax"
        return _scored(index, weights, query, key, "matmul", mixer.num_heads, rule=rule, **where)
    return _strongest(matrix, pairs, where)


def _of_image(mixer: nn.Module, x: Tensor, pairs: int) -> Mixing:
    """Of a mixer on an image x (B, C, H, W)."""
    padding = mixer.padding if isinstance(mixer, ConvNN2d) else 0
    tokens, grid = mixer.fold(x, padding)
    where = {"name": "", "grid": grid, "padding": padding, "class_tokens": 0}
    if isinstance(mixer, Attention2d):
        query, key, _ = mixer.qkv(tokens).unflatten(2, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return _strongest((query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1), pairs, where)
    if isinstance(mixer, ConvNNAttention2d):
        query, key, _ = mixer.qkv(tokens).chunk(3, dim=-1)
        query, key = (mixer.select.search_features(part, grid) for part in (query, key))
        index = mixer.select(query, key, grid)
        return _chosen(index, query, key, 1, mixer.select.neighbors, mixer.softmax_topk_val, where)
    features = mixer.select.search_features(tokens, grid)
    index = mixer.select(mixer.select.drop_padding(features, grid), features, grid)[:, None]
    # The K values are not weighed: each has a matrix of its own, and what a slot can add is the norm of its matrix.
    norms = mixer.conv.weight.norm(dim=(0, 1))
    weights = (norms / norms.sum()).expand(index.shape)
    rule = f"{_choice(mixer.select.neighbors, 'features')}, a matrix each; their weight is the norm of the slot's matrix"
    return Mixing(index=index, weights=weights, share=torch.ones(index.shape[:3]), rule=rule, **where)


def _chosen(index, query, key, heads: int, neighbors, softmax: bool, where: dict) -> Mixing:
    """Of ConvNN attention: index (B * H, N, K), query (B * H, N, d), key (B * H, M, d)."""
    metric = neighbors.metric
    weights = neighbor_weights(neighbor_scores(query, key, index, metric), metric, softmax=softmax)
    rule = f"{_choice(neighbors, 'q and k')}, weighed by {'the softmax of their scores' if softmax else 'their scores'}"
    return _scored(index, weights, query, key, metric, heads, rule=rule, is_share=softmax, **where)


def _scored(index, weights, query, key, metric: str, heads: int, **rest) -> Mixing:
    index, weights, query, key = (part.unflatten(0, (-1, heads)) for part in (index, weights, query, key))
    return Mixing(index=index, weights=weights, share=torch.ones(index.shape[:3]), scored=(query, key, metric), **rest)


def _choice(neighbors, of: str) -> str:
    by = "location" if neighbors.similarity_type == "Loc" else f"{neighbors.metric} of {of}"
    by += " and location" * (neighbors.similarity_type == "Loc_Col")
    among = "" if neighbors.sampling == "all" else f" among {neighbors.sampling} candidates"
    return f"the {neighbors.K} nearest by {by}{among}"


def _strongest(matrix: Tensor, pairs: int, where: dict) -> Mixing:
    """Of a mixing matrix (B, H, N, N): the strongest pairs of each token; those of weight 0 are none."""
    strength, index = matrix.abs().topk(min(pairs, matrix.shape[-1]), dim=-1)
    is_whole = bool(((matrix != 0).sum(dim=-1) <= pairs).all())
    rule = "all weights of a token" if is_whole else f"the {pairs} strongest of a token's {matrix.shape[-1]} weights"
    return Mixing(
        index=index.masked_fill(strength == 0, ABSENT),
        weights=matrix.gather(-1, index),
        share=strength.sum(dim=-1) / matrix.abs().sum(dim=-1),
        is_share=bool((matrix >= 0).all() and (matrix.sum(dim=-1) - 1).abs().max() < 1e-3),
        is_whole=is_whole,
        rule=rule,
        **where,
    )
