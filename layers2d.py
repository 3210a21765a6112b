"""Token mixers on images, (B, C_in, H, W) -> (B, C_out, H, W).

`convnn_plain` is ConvNN in ten lines. The layers compute the same function in bounded memory. Every pixel is a token. A
pixel-unshuffle before the layer (pattern B) makes fewer, wider tokens. A pixel-shuffle after it (pattern A) undoes this.

With neighbors selected by location (`similarity_type="Loc"`), the K slots are a window and ConvNN is `nn.Conv2d`.
`ConvNNAttention2d` selects between projected queries and keys and weights values by the softmax of their scores. It is
attention in which each token attends to its K best keys. `layers1d.py` applies the same classes to sequences.
"""

import warnings
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mixers.base import ImageMixer, check_at_least, is_plain
from mixers.selection import NeighborSelection
from mixers.topk import find_learned_neighbors, learn_from_unchosen
from neighbors import aggregate, coordinates, find_scored_neighbors, gather_neighbors, grid_locations, neighbor_weights
from options.checks import check_dropout, check_slots, check_temperature, check_topk
from options.neighbors import NeighborConfig, NeighborFields, as_neighbors


def convnn_plain(x: Tensor, weight: Tensor, bias: Tensor, K: int) -> Tensor:
    """ConvNN (arXiv 2511.14137), written plainly: x (B, C, H, W), weight (D, C, K), bias (D,) -> (B, D, H, W)."""
    tokens = x.flatten(2).transpose(1, 2)  # (B, N, C): every pixel is a token
    directions = F.normalize(tokens.detach(), dim=2)
    scores = directions @ directions.mT  # (B, N, N): cosine similarity of every pair
    scores.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # a token is its own first neighbor
    index = scores.topk(K, dim=2).indices  # (B, N, K): nearest first
    neighbors = tokens[:, None].take_along_dim(index[..., None], dim=2)  # (B, N, K, C)
    slots = neighbors.flatten(1, 2).transpose(1, 2)  # (B, C, N * K)
    return F.conv1d(slots, weight, bias, stride=K).unflatten(2, x.shape[2:])  # a weight matrix per slot


class ConvNN2d(ImageMixer):
    """Convolutional nearest neighbors (arXiv 2511.14137) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    `conv` convolves over the K nearest neighbors of each token. With `similarity_type="Loc"`, `padding=p` and
    K = (2p + 1)^2 for p = 1 or 2, it is `nn.Conv2d(kernel_size=2p + 1, padding=p)`. The kernel is `conv.weight`, unflattened,
    and the layer runs `F.conv2d`.

    Args:
        neighbors: search options, which can also be given by keyword. The token itself is always slot 0. Only `Loc` among
            all tokens uses raster order.
        convolution_type: convolution over the slots: standard, depthwise (groups of one input channel, as in `nn.Conv2d`) or
            depthwise-separable.
        shuffle_pattern, shuffle_scale: B unshuffles before the layer, A shuffles after it, BA does both, NA neither.
        padding: width of a ring of zero tokens that takes part in the search.
        image_size: size of the input, if known, to create tables and raise errors at construction.

    Raises:
        ValueError: K, the samples or the shuffle do not fit the tokens, or convolution_type is unknown. Depthwise needs
            out_channels to be a multiple of in_channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        neighbors: NeighborConfig | None = None,
        *,
        convolution_type: str = "standard",
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        padding: int = 0,
        bias: bool = True,
        image_size: int | tuple[int, ...] | None = None,
        **fields: Unpack[NeighborFields],
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        neighbors = as_neighbors(neighbors, fields)
        check_at_least(0, padding=padding)
        self.padding = padding
        grid = self.token_grid(image_size, padding)
        self.select = NeighborSelection(neighbors, axes=self.axes, self_first=True, padding=padding, grid=grid)
        inputs, outputs = self.token_channels
        inputs += self.axes * (neighbors.aggregation_type == "Loc_Col")
        check_slots(convolution_type, neighbors.aggregation_type)
        self.conv = make_convolution(inputs, outputs, neighbors.K, convolution_type, stride=neighbors.K, bias=bias)
        window = (2 * padding + 1) ** self.axes
        self.is_convolution = (
            neighbors.similarity_type == "Loc" and neighbors.sampling == "all" and neighbors.K == window and padding <= 2
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x, self.padding)  # (B, M, C), ring included
        values = self.select.append_coordinates(tokens, grid)
        if self.is_convolution and is_plain(self.conv, nn.Conv1d):
            return self.shuffle(self.convolve(values, grid))
        features = self.select.search_features(tokens.detach(), grid)
        index = self.select(self.select.drop_padding(features, grid), features, grid)  # (B, N, K)
        out = slot_convolution(self.conv, values, index)  # (B, N, D)
        return self.unfold(out, tuple(side - 2 * self.padding for side in grid))

    def convolve(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Convolve a whole window: its K slots, in raster order, are the taps of a kernel."""
        convolution = F.conv1d if self.axes == 1 else F.conv2d
        kernel = self.conv.weight.unflatten(2, (2 * self.padding + 1,) * self.axes)
        return convolution(values.transpose(1, 2).unflatten(2, grid), kernel, self.conv.bias, groups=self.conv.groups)


class ConvNNAttention2d(ImageMixer):
    """ConvNN attention (arXiv 2511.14137) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    The layer has one head and selects neighbors between projected queries and keys. The projected values of the K slots are
    multiplied by the softmax of their scores, or by the raw scores. `conv` convolves over the slots. With K = N, matmul,
    softmax and depthwise weights of one, it is `Attention2d` with one head.

    Args:
        neighbors: search options, which can also be given by keyword; among all tokens, a token competes for its own slots
            like any other.
        convolution_type: convolution over the slots: standard, depthwise or depthwise-separable, without bias.
        softmax_topk_val: weight values by the softmax of the scores; if False, by the raw scores.
        score_temperature: divisor of the scores before the softmax.
        topk: hard, or a learned top-k in training: straight_through or gumbel (`mixers/topk.py`).
        attention_dropout: probability of dropping a weight.
        shuffle_pattern, shuffle_scale, image_size: as in `ConvNN2d`.

    Raises:
        ValueError: K, the samples, the shuffle, the temperature or the convolution type is invalid. A learned top-k does not
            support a search by location or raw scores.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        neighbors: NeighborConfig | None = None,
        *,
        convolution_type: str = "standard",
        softmax_topk_val: bool = True,
        score_temperature: float = 1.0,
        topk: str = "hard",
        attention_dropout: float = 0.0,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        image_size: int | tuple[int, ...] | None = None,
        **fields: Unpack[NeighborFields],
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        neighbors = as_neighbors(neighbors, fields)
        grid = self.token_grid(image_size)
        self.select = NeighborSelection(neighbors, axes=self.axes, self_first=False, grid=grid)
        check_temperature(score_temperature)
        check_topk(topk, neighbors.similarity_type, softmax_topk_val)
        self.softmax_topk_val, self.score_temperature, self.topk = softmax_topk_val, score_temperature, topk
        inputs, D = self.token_channels
        self.qkv = nn.Linear(inputs, 3 * D)
        self.conv = make_slot_convolution(D, self.axes, neighbors, convolution_type)
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(attention_dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x)  # (B, N, C)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)  # (B, N, D) each
        query, key = (self.select.search_features(part, grid) for part in (query, key))
        values = self.select.append_coordinates(value, grid)
        K, metric, space = self.select.neighbors.K, self.select.neighbors.metric, self.select.search_space(grid, x.device)
        if self.topk != "hard" and self.training:
            index, weights, shares = find_learned_neighbors(
                query, key, K, metric, topk=self.topk, temperature=self.score_temperature, **space
            )
        else:
            index, scores = find_scored_neighbors(query, key, K, metric, **space)  # (B, N, K) each
            weights = neighbor_weights(scores, metric, softmax=self.softmax_topk_val, temperature=self.score_temperature)
            shares = None
        out = slot_convolution(self.conv, values, index, self.dropout(weights), shares)
        return self.unfold(self.proj(out), grid)


class Attention2d(ImageMixer):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762) over the pixels of an image:
    (B, C_in, H, W) -> (B, C_out, H, W).

    Raises:
        ValueError: num_heads does not divide the channels that attention runs on, or attention_dropout is not in [0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int,
        *,
        attention_dropout: float = 0.0,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        inputs, D = self.token_channels
        if num_heads < 1 or D % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {D} channels that attention runs on")
        check_dropout(attention_dropout)
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(inputs, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x)  # (B, N, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.unfold(self.proj(out.transpose(1, 2).flatten(2)), grid)


class CoordConv2d(nn.Module):
    """Convolution of the channels and the two coordinates of each pixel (CoordConv; Liu et al., arXiv 1807.03247):
    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    Coordinates run from -1 to 1 along each side, row first. The zero padding around the map has no coordinates. Arguments are
    as in `nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **geometry):
        super().__init__()
        self.conv = nn.Conv2d(in_channels + 2, out_channels, kernel_size, **geometry)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        channels = coordinates(grid_locations((H, W), x.device), (H, W), x.dtype).T.unflatten(1, (H, W))  # (2, H, W)
        return self.conv(torch.cat([x, channels.expand(B, -1, -1, -1)], dim=1))


def make_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    aggregation_type: str = "Col",
    stride: int = 1,
    bias: bool = True,
) -> nn.Module:
    """Make a convolution that keeps the size of the map but for its stride; with aggregation_type Loc_Col a `CoordConv2d`."""
    if kernel_size % 2 == 0:  # PyTorch warns of the copy of the map that keeps its size
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
    padding = "same" if stride == 1 else kernel_size // 2
    convolution = CoordConv2d if aggregation_type == "Loc_Col" else nn.Conv2d
    return convolution(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)


class ShuffledConv2d(ImageMixer):
    """Convolution of tokens: unshuffled before, with their coordinates if asked for, and shuffled after.

    (B, C_in, H, W) -> (B, C_out, H, W), as `Conv2d_New` of the published code: the baseline of ConvNN under the same shuffles.

    Args:
        kernel_size, aggregation_type: as in `make_conv2d`; coordinates are appended after the unshuffle.
        shuffle_pattern, shuffle_scale: as in `ConvNN2d`.

    Raises ValueError if the scale does not divide the sides of the map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        aggregation_type: str = "Col",
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        self.conv = make_conv2d(*self.token_channels, kernel_size, aggregation_type=aggregation_type, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self.token_grid(tuple(x.shape[2:]))  # raises
        return self.shuffle(self.conv(self.unshuffle(x)))


class Strided2d(nn.Module):
    """Mixer followed by a stride: keep every `stride`-th row and column of its output.

    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride), rounded up.
    """

    def __init__(self, layer: nn.Module, stride: int):
        super().__init__()
        self.layer = layer
        self.stride = stride

    def extra_repr(self) -> str:
        return f"stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, :, :: self.stride, :: self.stride]


class Branching2d(nn.Module):
    """Two mixers side by side on the whole input, with a ReLU after each and concatenated channels.

    (B, C_in, H, W) -> (B, C_first + C_second, H, W).

    Args:
        join: layer on the concatenated channels; it replaces the two ReLUs.
    """

    def __init__(self, first: nn.Module, second: nn.Module, join: nn.Module | None = None):
        super().__init__()
        self.first = first
        self.second = second
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        if self.join is None:
            return torch.cat([F.relu(first), F.relu(second)], dim=1)
        return self.join(torch.cat([first, second], dim=1))


def make_convolution(
    in_channels: int, out_channels: int, kernel_size: int, convolution_type: str, *, stride: int = 1, bias: bool = False
) -> nn.Module:
    """Make a 1-D convolution: standard, depthwise, or depthwise-separable (depthwise without bias, then 1 x 1).

    Raises ValueError for depthwise with out_channels that are no multiple of in_channels.
    """
    if convolution_type == "depthwise" and out_channels % in_channels:
        raise ValueError(
            f"convolution_type=depthwise makes a multiple of its {in_channels} channels, not {out_channels}; "
            "use depthwise-separable"
        )
    if convolution_type != "depthwise-separable":
        groups = in_channels if convolution_type == "depthwise" else 1
        return nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias)
    depthwise = nn.Conv1d(in_channels, in_channels, kernel_size, stride=stride, groups=in_channels, bias=False)
    pointwise = nn.Conv1d(in_channels, out_channels, 1, bias=bias)
    nn.init.xavier_uniform_(pointwise.weight)  # a projection of features, initialized as all are
    return nn.Sequential(depthwise, pointwise)


def make_slot_convolution(channels: int, coordinates: int, neighbors: NeighborConfig, convolution_type: str) -> nn.Module:
    """Make the convolution over K slots of ConvNN attention, without bias; depthwise weights start at one.

    `channels` of the values, and the `coordinates` that aggregation_type Loc_Col appends to them -> `channels`.
    Raises ValueError for an unknown type, and for `depthwise` with coordinates appended.
    """
    check_slots(convolution_type, neighbors.aggregation_type)
    inputs = channels + coordinates * (neighbors.aggregation_type == "Loc_Col")
    conv = make_convolution(inputs, channels, neighbors.K, convolution_type, stride=neighbors.K)
    if convolution_type != "standard":
        nn.init.ones_((conv if convolution_type == "depthwise" else conv[0]).weight)
    return conv


def slot_convolution(
    conv: nn.Module, values: Tensor, index: Tensor, weights: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """Convolve over the slots: values (B, M, C), index and weights of the values (B, N, K) -> (B, N, D).

    A plain convolution is fused with the gathering of its slots. Any other module in its place is called on the K-fold
    values, (B, C, N * K) -> (B, D, N). With the shares of a learned top-k, candidates that are not neighbors get a gradient
    (`mixers/topk.py`).
    """
    first, *rest = conv if is_plain(conv, nn.Sequential) else [conv]
    if is_plain(first, nn.Conv1d):
        depthwise = first.groups > 1
        if depthwise and first.out_channels > first.in_channels:  # each value serves several outputs
            values = values.repeat_interleave(first.out_channels // first.in_channels, dim=2)
        out = aggregate(values, index, first.weight, weights, depthwise=depthwise)
        if first.bias is not None:
            out = out + first.bias.to(out.dtype)
    else:
        slots = gather_neighbors(values, index)  # (B, N, K, C)
        if weights is not None:
            slots = (slots * weights[..., None]).to(values.dtype)
        out = first(slots.flatten(1, 2).mT).mT
    for pointwise in rest:
        out = pointwise(out.mT).mT
    return learn_from_unchosen(out, values, index, shares, partial(last_slot, conv, index.shape[2]))


def last_slot(conv: nn.Module, K: int, x: Tensor) -> Tensor:
    """Apply the last slot of a convolution over K, with constant parameters: (B, N, C) -> (B, N, D)."""
    if is_plain(conv, nn.Sequential):
        depthwise, pointwise = conv
        return last_slot(pointwise, 1, last_slot(depthwise, K, x))
    if is_plain(conv, nn.Conv1d):
        weight = conv.weight.detach()[:, :, -1]
        return x * weight.squeeze(1).to(x.dtype) if conv.groups > 1 else F.linear(x, weight)
    constants = {name: parameter.detach() for name, parameter in conv.named_parameters()}
    return functional_call(conv, constants, F.pad(x.mT[..., None], (K - 1, 0)).flatten(2)).mT
