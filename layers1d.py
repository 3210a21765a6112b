"""Token mixers on sequences: ConvNN, ConvNN attention, attention, convolution, k-NN attention, and pairs of them.

Mixers on (B, C, N) come first. They are the mixers of `layers2d.py` on images with one side.

Mixers on (B, N, d_model) are for transformers. Most subclass `MultiHeadMixer` (`mixers/base.py`), which has the projections
and the heads, and implement `mix`. A `TokenLayout` describes the N tokens.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import attention
from layers2d import Attention2d, ConvNN2d, ConvNNAttention2d, make_convolution, make_slot_convolution, slot_convolution
from mixers.base import (
    Bias,
    MultiHeadMixer,
    TokenLayout,
    ValueMixer,
    attend,
    both_biases,
    check_at_least,
    is_plain,
    layout_argument,
    mixing_matrix,
)
from mixers.selection import select_tokens
from mixers.topk import find_learned_neighbors, learn_from_unchosen
from neighbors import attend_to_neighbors, find_scored_neighbors, neighbor_weights, weighted_sum
from options.checks import branch_widths, check_slots, check_temperature, check_topk
from options.neighbors import NeighborConfig, NeighborFields, as_neighbors


class OnSequence:
    """Turn a mixer on images into a mixer on sequences, which have one side."""

    axes = 1


class ConvNN1d(OnSequence, ConvNN2d):
    """Convolutional nearest neighbors (arXiv 2511.14137) on a sequence: (B, C_in, N) -> (B, C_out, N).

    Arguments and errors are as in `ConvNN2d`. Selected by location, K = 2p + 1 neighbors are the window of an `nn.Conv1d`.
    """


class ConvNNAttention1d(OnSequence, ConvNNAttention2d):
    """ConvNN attention (arXiv 2511.14137) on a sequence: (B, C_in, N) -> (B, C_out, N).

    Arguments and errors are as in `ConvNNAttention2d`.
    """


class Attention1d(OnSequence, Attention2d):
    """Multi-head self-attention on a sequence: (B, C_in, N) -> (B, C_out, N).

    Arguments and errors are as in `Attention2d`.
    """


# ---------------------------------------------------------------------------------------------------------------
# Mixers on (B, N, d_model)
# ---------------------------------------------------------------------------------------------------------------


class MultiHeadAttention(MultiHeadMixer):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762): every token attends to all.

    Args:
        separate_qkv: project by three linears `query`, `key` and `value`, instead of one of three times the width, `qkv`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        separate_qkv: bool = False,
        layout: TokenLayout | None = None,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        self.separate_qkv = separate_qkv  # read by `make_projection`
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)

    def make_projection(self, d_model: int, bias: bool) -> None:
        if not self.separate_qkv:
            return super().make_projection(d_model, bias)
        self.query, self.key, self.value = (nn.Linear(d_model, d_model, bias=bias) for _ in range(3))

    def project_features(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.query(x), self.key(x), self.value(x)) if self.separate_qkv else super().project_features(x)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        return attend(query, key, value, dropout=self.dropout, output_matrix=output_matrix)


class MultiHeadConvNNAttention(MultiHeadMixer):
    """ConvNN attention (arXiv 2511.14137): select K keys per query in each head, then convolve over their values.

    The values of the K slots are multiplied by the softmax of their scores, or by the raw scores. `conv` convolves over the
    slots and is shared by all heads. With K = N, matmul and depthwise weights of one, it is `MultiHeadAttention`.

    Args:
        neighbors: search options, which can also be given by keyword; class tokens are always candidates, at the grid center.
        layout: layout of the tokens; only a search by location or along the sequence needs it.
        convolution_type: convolution over the slots: standard, depthwise or depthwise-separable, without bias.
        softmax_topk_val: weight values by the softmax of the scores; if False, by the raw scores.
        score_temperature: divisor of the scores before the softmax; near 0, the nearest neighbor has all the weight.
        topk: hard, or a learned top-k in training: straight_through or gumbel (`mixers/topk.py`).

    Raises:
        ValueError: K, the samples, the heads, the temperature or the convolution type is invalid. A learned top-k does not
            support a search by location or raw scores.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        neighbors: NeighborConfig | None = None,
        *,
        layout: TokenLayout | None = None,
        convolution_type: str = "depthwise",
        softmax_topk_val: bool = True,
        score_temperature: float = 1.0,
        topk: str = "hard",
        attention_dropout: float = 0.0,
        bias: Bias = True,
        **fields: Unpack[NeighborFields],
    ):
        neighbors = as_neighbors(neighbors, fields)
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        check_temperature(score_temperature)
        check_topk(topk, neighbors.similarity_type, softmax_topk_val)
        self.score_temperature, self.topk = score_temperature, topk
        self.select = select_tokens(neighbors, layout, self_first=False)
        self.softmax_topk_val = softmax_topk_val
        self.conv = make_slot_convolution(self.head_dim, self.select.axes, neighbors, convolution_type)
        if convolution_type == "standard" and softmax_topk_val:
            # The K weights of a softmax add up to one. Xavier, slot by slot, gives the output the scale of one projected
            # value; the default of a convolution is made for a sum over K unweighted values.
            bound = math.sqrt(6 / (self.conv.in_channels + self.head_dim))
            nn.init.uniform_(self.conv.weight, -bound, bound)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        K, metric, temperature = self.select.neighbors.K, self.select.neighbors.metric, self.score_temperature
        plain = not (output_matrix or self.dropout) and (self.topk == "hard" or not self.training)
        if plain and attention.pays(query) and self.is_one_operator:
            return attend_to_neighbors(query, key, value, K, metric, self.conv.weight, temperature=temperature), None
        heads, grid = query.shape[:2], layout.grid
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)  # (B * H, N, d)
        query, key = (self.select.search_features(part, grid) for part in (query, key))
        values = self.select.append_coordinates(value, grid)
        space = self.select.search_space(grid, key.device)
        if self.topk != "hard" and self.training:
            index, weights, shares = find_learned_neighbors(
                query, key, K, metric, topk=self.topk, temperature=temperature, **space
            )
        else:
            index, scores = find_scored_neighbors(query, key, K, metric, **space)  # (B * H, N, K) each
            weights = neighbor_weights(scores, metric, softmax=self.softmax_topk_val, temperature=temperature)
            shares = None
        out = slot_convolution(self.conv, values, index, F.dropout(weights, self.dropout), shares)
        return out.unflatten(0, heads), mixing_matrix(index, weights, self.num_heads) if output_matrix else None

    @property
    def is_one_operator(self) -> bool:
        """True where `attend_to_neighbors` computes the forward pass without dropout."""
        rules, conv = self.select.neighbors, self.conv
        return (
            (rules.sampling, rules.similarity_type) == ("all", "Col")
            and rules.metric != "euclidean"
            and self.softmax_topk_val
            and is_plain(conv, nn.Conv1d)
            and conv.groups == conv.out_channels == self.head_dim
            and conv.bias is None
        )


class MultiHeadConvNN(MultiHeadConvNNAttention):
    """ConvNN (arXiv 2511.14137) with queries, keys and values projected along the sequence, N -> N.

    Heads split the features. Arguments and errors are as in `MultiHeadConvNNAttention`.
    """

    per_token = "qkv.weight"

    def make_projection(self, d_model: int, bias: bool) -> None:
        N = self.layout.num_tokens
        self.qkv = nn.Linear(N, 3 * N, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        parts = self.qkv(x.transpose(1, 2)).chunk(3, dim=2)  # (B, d_model, N) each
        return tuple(self.split_heads(part.transpose(1, 2)) for part in parts)


class MultiHeadKvtAttention(MultiHeadMixer):
    """k-NN attention (KVT, Wang et al., arXiv 2106.00515): softmax over the K largest scores of each query.

    All other weights are zero. With K = N, it is `MultiHeadAttention`.

    Args:
        K: number of keys that each query attends to.
        score_temperature: divisor of the scores before the softmax.
        topk: as in `MultiHeadConvNNAttention`.

    Raises:
        ValueError: the temperature is not above 0, K exceeds the number of tokens, or `topk` is unknown.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        K: int,
        *,
        score_temperature: float = 1.0,
        topk: str = "hard",
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, attention_dropout=attention_dropout, bias=bias)
        check_at_least(1, K=K)
        check_temperature(score_temperature)
        check_topk(topk)
        self.K, self.score_temperature, self.topk = K, score_temperature, topk

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        plain = not (output_matrix or self.dropout) and (self.topk == "hard" or not self.training)
        if plain and attention.pays(query):
            return attend_to_neighbors(query, key, value, self.K, "matmul", temperature=self.score_temperature), None
        heads = query.shape[:2]
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)  # (B * H, N, d)
        if self.topk != "hard" and self.training:
            index, weights, shares = find_learned_neighbors(
                query, key, self.K, "matmul", topk=self.topk, temperature=self.score_temperature
            )
        else:
            index, scores = find_scored_neighbors(query, key, self.K, "matmul")  # (B * H, N, K) each
            weights, shares = neighbor_weights(scores, "matmul", temperature=self.score_temperature), None
        out = weighted_sum(value, index, F.dropout(weights, self.dropout))
        out = learn_from_unchosen(out, value, index, shares)
        return out.unflatten(0, heads), mixing_matrix(index, weights, self.num_heads) if output_matrix else None


class MultiHeadConv1dAttention(ValueMixer):
    """Convolution along the sequence in place of attention: project values, convolve each head, project the output.

    `conv` runs over the features of one head and the `kernel_size` tokens around each token. All heads share it. The class
    token comes first in the sequence, so it sees the first patches only: (kernel_size - 1) / 2 more with every layer.

    Args:
        convolution_type: standard, depthwise or depthwise-separable, without bias.

    Raises:
        ValueError: the heads, the kernel or the convolution type is invalid.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        kernel_size: int,
        *,
        layout: TokenLayout | None = None,
        convolution_type: str = "standard",
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, bias=bias)
        check_slots(convolution_type, "Col")
        check_at_least(1, kernel_size=kernel_size)
        self.reach = (kernel_size - 1) // 2, kernel_size // 2  # tokens before and after
        self.conv = make_convolution(self.head_dim, self.head_dim, kernel_size, convolution_type)

    def mix(self, value: Tensor, output_matrix: bool, layout: TokenLayout | None = None) -> tuple[Tensor, None]:
        heads = value.shape[:2]
        out = self.conv(F.pad(value.flatten(0, 1).transpose(1, 2), self.reach))  # (B * H, d, N)
        return out.transpose(1, 2).unflatten(0, heads), None


class MultiHeadConv1d(MultiHeadConv1dAttention):
    """`MultiHeadConv1dAttention` with the values projected along the sequence, N -> N, instead of along the features."""

    per_token = "value.weight"

    def make_projection(self, d_model: int, bias: bool) -> None:
        N = self.layout.num_tokens
        self.value = nn.Linear(N, N, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        return (self.split_heads(self.value(x.transpose(1, 2)).transpose(1, 2)),)


class Branching1d(nn.Module):
    """Two mixers side by side: `first` mixes the first features, `second` mixes the rest, and a linear layer joins them.

    (B, N, first + second) -> (B, N, first + second). The mixing matrix is the mean of the branches' matrices, weighted by
    their numbers of features. A convolution has no mixing matrix.
    """

    def __init__(self, first: nn.Module, second: nn.Module, widths: tuple[int, int], *, bias: Bias = True):
        super().__init__()
        self.first = first
        self.second = second
        self.widths = widths
        self.proj = nn.Linear(sum(widths), sum(widths), bias=both_biases(bias)[1])

    def forward(
        self, x: Tensor, output_attentions: bool = False, layout: TokenLayout | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Arguments as in `MultiHeadMixer`."""
        given = [layout_argument(mixer, layout) for mixer in (self.first, self.second)]
        parts = x.split(self.widths, dim=2)
        if not output_attentions:
            return self.proj(torch.cat([self.first(parts[0], **given[0]), self.second(parts[1], **given[1])], dim=2))
        (one, matrix), (two, other) = self.first(parts[0], True, **given[0]), self.second(parts[1], True, **given[1])
        if other is not None:
            share = self.widths[0] / sum(self.widths)
            matrix = share * matrix + (1 - share) * other
        return self.proj(torch.cat([one, two], dim=2)), matrix


class BranchingAttention(Branching1d):
    """ConvNN attention on the first `branch_ratio` of the features beside attention on the rest, then a linear layer.

    Arguments are as in `MultiHeadConvNNAttention`. Each branch has `num_heads` heads.

    Args:
        kernel_size: if given, the second branch is a `MultiHeadConv1dAttention`.
        convolution_type: if None, depthwise over the slots and standard along the sequence.

    Raises:
        ValueError: a branch raises it, or the heads do not divide both parts of the features.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        neighbors: NeighborConfig | None = None,
        kernel_size: int | None = None,
        *,
        layout: TokenLayout | None = None,
        branch_ratio: float = 0.5,
        convolution_type: str | None = None,
        softmax_topk_val: bool = True,
        score_temperature: float = 1.0,
        topk: str = "hard",
        attention_dropout: float = 0.0,
        bias: Bias = True,
        **fields: Unpack[NeighborFields],
    ):
        widths = branch_widths(d_model, num_heads, branch_ratio)
        convnn = MultiHeadConvNNAttention(
            widths[0],
            num_heads,
            neighbors,
            layout=layout,
            convolution_type=convolution_type or "depthwise",
            softmax_topk_val=softmax_topk_val,
            score_temperature=score_temperature,
            topk=topk,
            attention_dropout=attention_dropout,
            bias=bias,
            **fields,
        )
        if kernel_size is None:
            second = MultiHeadAttention(widths[1], num_heads, attention_dropout=attention_dropout, bias=bias)
        else:
            second = MultiHeadConv1dAttention(
                widths[1], num_heads, kernel_size, layout=layout, convolution_type=convolution_type or "standard", bias=bias
            )
        super().__init__(convnn, second, widths, bias=bias)


class BranchingConv(BranchingAttention):
    """ConvNN attention on the first `branch_ratio` of the features beside a convolution on the rest, then a linear layer.

    Arguments and errors are as in `BranchingAttention`.
    """

    def __init__(self, d_model: int, num_heads: int, neighbors: NeighborConfig | None = None, kernel_size: int = 9, **options):
        super().__init__(d_model, num_heads, neighbors, kernel_size, **options)
