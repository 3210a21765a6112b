"""Neighbors of each token of an image, and their weights: recorded from a model, layer by layer."""

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from experiments.trained import Run
from layers1d import MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import Attention2d, ConvNN2d, ConvNNAttention2d
from mixers.base import MultiHeadMixer
from mixers.graph import AxialGraphMixer, GraphAggregation, GraphConv2d, GraphMixer
from neighbors import find_neighbors, gather_neighbors, neighbor_scores, neighbor_weights
from options.vit import ViTConfig
from vit import ViT

KINDS = (MultiHeadMixer, ConvNN2d, ConvNNAttention2d, Attention2d, GraphConv2d)
ABSENT = -1  # in an index: an empty slot of a token that has fewer neighbors


@dataclass
class Mixing:
    """The mixing of one layer for B images with H heads: N tokens take from M keys.

    Keys are the class tokens, then the grid in raster order; queries are the N tokens inside its ring of padding.
    """

    name: str
    rule: str  # in words: the choice of the K, and their weights
    grid: tuple[int, int]  # sides of the grid of keys, ring of padding included
    padding: int
    class_tokens: int
    index: Tensor  # (B, H, N, K), in the layer's order, ABSENT where there is none
    weights: Tensor  # (B, H, N, K), 0 where absent
    share: Tensor  # (B, H, N): share of a token's whole weight that the K hold
    is_share: bool = True  # the weights of a token add up to one over all keys; False: raw scores
    is_whole: bool = True  # the layer mixes no other pairs than these
    is_search: bool = True  # nearest first, from a search; False: the largest entries of a mixing matrix
    scored: tuple | None = None  # query (B, H, N, d), key (B, H, M, d), metric, temperature: where scores decide

    @property
    def num_keys(self) -> int:
        return self.class_tokens + self.grid[0] * self.grid[1]


def record_mixing(model: nn.Module, images: Tensor, pairs: int) -> tuple[Tensor, list[Mixing]]:
    """Return logits of the images, and the mixing of each layer that mixes by neighbors or by a matrix, unlike convolutions.

    Where a layer mixes all pairs, the `pairs` strongest of each token are kept.
    """
    found: list[Mixing] = []
    is_vit = isinstance(model.config, ViTConfig)

    def record(name: str, module: nn.Module, inputs: tuple, output) -> None:
        x = inputs[0]
        if is_vit:
            mixed = output if isinstance(output, tuple) else getattr(module, "mixed", module.forward)(x, True)
            mixing = _of_sequence(module, x, mixed[1], model.config.grid, pairs)
        else:
            mixing = _of_image(module, x, pairs)
        if mixing is not None:
            mixing.name = layer_name(name, "block" if is_vit else "layer")
            found.append(mixing)

    parts = {name: part for name, part in model.named_modules() if isinstance(part, KINDS)}
    if is_vit:  # custom mixers too, by their matrix
        place = "attn" if model.config.is_backbone else "mixer"
        custom = {f"blocks.{number}.{place}": getattr(block, place) for number, block in enumerate(model.blocks)}
        parts |= {name: part for name, part in custom.items() if not any(isinstance(one, KINDS) for one in part.modules())}
    handles = [part.register_forward_hook(partial(record, name)) for name, part in parts.items()]
    with torch.no_grad():
        logits = model(images, output_attentions=True)[0] if isinstance(model, ViT) else model(images)
    for handle in handles:
        handle.remove()
    return logits, found


def record_run(run: Run, pairs: int) -> tuple[Tensor, list[Mixing]]:
    """Record the mixing of a run on its images. Raises ValueError where no layer has neighbors or weights."""
    logits, found = record_mixing(run.model, run.images, pairs)
    if not found:
        raise ValueError(
            f"{run.folder}: layer={run.options.model.layer} has no neighbors or weights to show; a convolution has none"
        )
    return logits, found


def layer_name(module: str, kind: str) -> str:
    """Return the name of the layer that a module is part of: blocks.2.mixer.first -> block 3 (first).

    Backbones number all their parts, so torchvision's names are kept: features.3 -> layer features.3.
    """
    if re.match(r"features\.|conv1|layer\d", module):
        return f"{kind} {module.removesuffix('.layer')}"
    parts = module.split(".")
    number = next((int(part) for part in parts if part.isdigit()), 0)
    branch = next((f" ({part})" for part in parts if part in ("first", "second")), "")
    return f"{kind} {number + 1}{branch}"


# ---------------------------------------------------------------------------------------------------------------
# The kinds of layers
# ---------------------------------------------------------------------------------------------------------------


def _of_sequence(mixer: MultiHeadMixer, x: Tensor, matrix: Tensor | None, grid: tuple[int, int], pairs: int) -> Mixing | None:
    """Record a mixer on tokens x (B, N, d_model), by its kind or else from its mixing matrix (B, H, N, N)."""
    where = {"name": "", "grid": grid, "padding": 0, "class_tokens": x.shape[1] - grid[0] * grid[1]}
    if isinstance(mixer, MultiHeadConvNNAttention):
        query, key, _ = mixer.project(x, mixer.layout)
        query, key = (mixer.select.search_features(part.flatten(0, 1), mixer.layout.grid) for part in (query, key))
        return _of_attention(mixer, mixer.select(query, key, mixer.layout.grid), query, key, mixer.num_heads, where)
    if isinstance(mixer, MultiHeadKvtAttention):
        query, key = (part.flatten(0, 1) for part in mixer.project(x)[:2])
        index = find_neighbors(query, key, mixer.K, "matmul")
        rule = f"the {mixer.K} largest q · k of a token, weighed by their softmax"
        return _scored(index, query, key, "matmul", mixer.score_temperature, mixer.num_heads, rule=rule, **where)
    if isinstance(mixer, GraphMixer):
        (x,) = mixer.project(x, mixer.layout)
        features = mixer.select.search_features(x, mixer.layout.grid)
        index = mixer.select(features, features, mixer.layout.grid)[:, where["class_tokens"] :, :: mixer.dilation]
        return _joined(mixer.graph, x, index, _rule_of(mixer.select.neighbors, "features", index.shape[2]), where)
    if isinstance(mixer, AxialGraphMixer):
        return _of_axes(mixer, mixer.project(x)[0], pairs, where)
    return None if matrix is None else _strongest(matrix, pairs, where)


def _of_image(mixer: nn.Module, x: Tensor, pairs: int) -> Mixing:
    padding = mixer.padding if isinstance(mixer, ConvNN2d) else 0
    tokens, grid = mixer.fold(x, padding)
    where = {"name": "", "grid": grid, "padding": padding, "class_tokens": 0}
    if isinstance(mixer, Attention2d):
        query, key, _ = mixer.qkv(tokens).unflatten(2, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return _strongest((query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1), pairs, where)
    if isinstance(mixer, ConvNNAttention2d):
        query, key, _ = mixer.qkv(tokens).chunk(3, dim=-1)
        query, key = (mixer.select.search_features(part, grid) for part in (query, key))
        return _of_attention(mixer, mixer.select(query, key, grid), query, key, 1, where)
    if isinstance(mixer, GraphConv2d):
        tokens = mixer.input(mixer.select.append_coordinates(tokens, grid))
        features = mixer.select.search_features(tokens, grid)
        rule = _rule_of(mixer.select.neighbors, "features")
        return _joined(mixer.graph, tokens, mixer.select(features, features, grid), rule, where)
    features = mixer.select.search_features(tokens, grid)
    index = mixer.select(mixer.select.drop_padding(features, grid), features, grid)[:, None]
    # The K values are not weighted: each has its own matrix, whose norm bounds the contribution of the slot.
    slots = mixer.conv[0] if isinstance(mixer.conv, nn.Sequential) else mixer.conv
    norms = slots.weight.norm(dim=(0, 1))
    rule = f"{_rule_of(mixer.select.neighbors, 'features')}, a matrix each; their weight is the norm of the slot's matrix"
    return _whole(index, (norms / norms.sum()).expand(index.shape), rule=rule, **where)


def _of_attention(mixer: nn.Module, index: Tensor, query: Tensor, key: Tensor, heads: int, where: dict) -> Mixing:
    """Record ConvNN attention: index (B * H, N, K), query (B * H, N, d), key (B * H, M, d)."""
    metric, softmax = mixer.select.neighbors.metric, mixer.softmax_topk_val
    weighed = "the softmax of their scores" if softmax else "their scores"
    rule = f"{_rule_of(mixer.select.neighbors, 'q and k')}, weighed by {weighed}"
    return _scored(index, query, key, metric, mixer.score_temperature, heads, rule=rule, is_share=softmax, **where)


def _scored(index, query, key, metric: str, temperature: float, heads: int, is_share: bool = True, **rest) -> Mixing:
    scores = neighbor_scores(query, key, index, metric)
    weights = neighbor_weights(scores, metric, softmax=is_share, temperature=temperature)
    index, weights, query, key = (part.unflatten(0, (-1, heads)) for part in (index, weights, query, key))
    return _whole(index, weights, scored=(query, key, metric, temperature), is_share=is_share, **rest)


def _joined(graph: GraphAggregation, x: Tensor, index: Tensor, rule: str, where: dict) -> Mixing:
    """Record a graph convolution: x (B, N, C), index (B, P, K) of the patches; one graph for all heads.

    Class tokens take from all tokens; the K strongest are kept.
    """
    classes = torch.arange(x.shape[1]).expand(x.shape[0], where["class_tokens"], -1)
    if graph.kind == "mean":
        weights, of_classes = (torch.full(one.shape, 1 / one.shape[2]) for one in (index, classes))
        rule += ", their mean"
    else:
        values = graph.relative(x) if graph.kind == "edge" else x
        weights, of_classes = (_shares_of_maximum(values, one) for one in (index, classes))
        rule += ", their maximum; their weight is the share of the features that are theirs"
    strongest, chosen = of_classes.topk(index.shape[2], dim=2)
    weights = torch.cat([strongest, weights], dim=1)[:, None]
    return Mixing(
        index=torch.cat([chosen, index], dim=1)[:, None],
        weights=weights,
        share=weights.sum(dim=3),
        is_whole=not where["class_tokens"],
        rule=rule + "; class tokens take from all" * bool(where["class_tokens"]),
        **where,
    )


def _of_axes(mixer: AxialGraphMixer, x: Tensor, pairs: int, where: dict) -> Mixing:
    """Record GreedyViG, whose tokens have unlike numbers of neighbors, by the features that come from each token."""
    index = mixer.near_candidates(x, mixer.layout)  # of the patches; class tokens see everyone
    everyone = torch.arange(x.shape[1]).expand(x.shape[0], where["class_tokens"], -1)
    matrix = torch.cat(
        [
            x.new_zeros(*one.shape[:2], x.shape[1]).scatter_add(2, one, _shares_of_maximum(x, one))
            for one in (everyone, index)
            if one.shape[1]
        ],
        dim=1,
    )
    mixing = _strongest(matrix[:, None], pairs, where)
    mixing.rule = f"near tokens of the own row and column, their maximum; {mixing.rule}, shares of the features"
    return mixing


def _shares_of_maximum(values: Tensor, index: Tensor) -> Tensor:
    """Return the share of a token's maximum over its neighbors that each contributes: (B, M, C), (B, N, K) -> (B, N, K)."""
    largest = gather_neighbors(values, index).argmax(dim=2, keepdim=True)  # (B, N, 1, C)
    slots = torch.arange(index.shape[2])[:, None]
    return (largest == slots).float().mean(dim=3)


def _whole(index: Tensor, weights: Tensor, **rest) -> Mixing:
    return Mixing(index=index, weights=weights, share=torch.ones(index.shape[:3]), **rest)


def _rule_of(neighbors, of: str, K: int | None = None) -> str:
    by = "location" if neighbors.similarity_type == "Loc" else f"{neighbors.metric} of {of}"
    by += " and location" * (neighbors.similarity_type == "Loc_Col")
    among = "" if neighbors.sampling == "all" else f" among {neighbors.sampling} candidates"
    dilated = "" if K in (None, neighbors.K) else f"{K} of "
    return f"{dilated}the {neighbors.K} nearest by {by}{among}"


def _strongest(matrix: Tensor, pairs: int, where: dict) -> Mixing:
    """Keep the strongest pairs of each token of a mixing matrix (B, H, N, N); pairs of weight 0 are absent."""
    strength, index = matrix.abs().topk(min(pairs, matrix.shape[-1]), dim=-1)
    is_whole = bool(((matrix != 0).sum(dim=-1) <= pairs).all())
    rule = "all weights of a token" if is_whole else f"the {pairs} strongest of a token's {matrix.shape[-1]} weights"
    return Mixing(
        index=index.masked_fill(strength == 0, ABSENT),
        weights=matrix.gather(-1, index),
        share=strength.sum(dim=-1) / matrix.abs().sum(dim=-1),
        is_share=bool((matrix >= 0).all() and (matrix.sum(dim=-1) - 1).abs().max() < 1e-3),
        is_whole=is_whole,
        is_search=False,
        rule=rule,
        **where,
    )
