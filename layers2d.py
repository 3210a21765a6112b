"""Token mixers on images, (B, C_in, H, W) -> (B, C_out, H, W).

ConvNN, in the steps that `ConvNN2d.forward` takes:

1. Every pixel is a token: (B, C, H, W) becomes (B, N, C). A pixel-unshuffle before (pattern B) makes fewer, wider
   tokens; a ring of zeros (`padding`) can join them.
2. Each token finds the K tokens most similar to it, itself first: an index (B, N, K).
3. A convolution runs over those K slots instead of over a window of pixels, with the weights (out, in, K) of an `nn.Conv1d`.
4. The tokens become an image again; a pixel-shuffle after (pattern A) undoes the unshuffle.

Chosen by location (`similarity_type="Loc"`), the K slots are a window and ConvNN is `nn.Conv2d`. Chosen between projected
queries and keys, with values weighed by the softmax of their scores, it is attention in which each token attends to
its K best: `ConvNNAttention2d`. The same classes serve sequences, images with one side: `layers1d.py`.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import ImageMixer
from mixers.selection import GridTables, NeighborSelection
from mixers.topk import Choice, mix_straight_through
from neighbors import aggregate, coordinates, grid_places, neighbor_weights
from options.checks import check_dropout, check_slots, check_temperature, check_topk
from options.neighbors import NeighborConfig


class ConvNN2d(ImageMixer):
    """Convolutional nearest neighbors (arXiv 2511.14137) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    `conv` convolves over the K neighbors that each token finds by similarity. With `similarity_type="Loc"`, `padding=p` and
    K = (2p + 1)^2, p = 1 or 2, it is `nn.Conv2d(kernel_size=2p + 1, padding=p)`, whose weight is `conv.weight` unflattened, and
    `F.conv2d` is what runs.

    Args:
        neighbors: which tokens are neighbors; the token itself is always slot 0 (`Loc` among all: raster order).
        shuffle_pattern, shuffle_scale: B unshuffles before, A shuffles after, BA both, NA neither.
        padding: width of a ring of zero tokens that takes part in the search.
        image_size: size of the input if known, so that tables are made, and errors raised, at construction.

    Raises ValueError if K, the samples or the shuffle do not fit the tokens.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        neighbors: NeighborConfig,
        *,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        padding: int = 0,
        bias: bool = True,
        image_size: int | tuple[int, ...] | None = None,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        if padding < 0:
            raise ValueError(f"padding={padding} must be at least 0")
        self.padding = padding
        grid = self.token_grid(image_size, padding)
        self.select = NeighborSelection(neighbors, axes=self.axes, self_first=True, padding=padding, grid=grid)
        inputs, outputs = self.token_channels
        inputs += self.axes * (neighbors.aggregation_type == "Loc_Col")
        self.conv = nn.Conv1d(inputs, outputs, neighbors.K, stride=neighbors.K, bias=bias)
        window = (2 * padding + 1) ** self.axes
        self.is_convolution = (
            neighbors.similarity_type == "Loc" and neighbors.sampling == "all" and neighbors.K == window and padding <= 2
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x, self.padding)  # (B, M, C), ring included
        values = self.select.append_coordinates(tokens, grid)
        if self.is_convolution:
            return self.shuffle(self.convolve(values, grid))
        features = self.select.search_features(tokens.detach(), grid)
        index = self.select(self.select.drop_padding(features, grid), features, grid)  # (B, N, K)
        out = aggregate(values, index, self.conv.weight)  # (B, N, D)
        if self.conv.bias is not None:
            out = out + self.conv.bias.to(out.dtype)
        return self.unfold(out, tuple(side - 2 * self.padding for side in grid))

    def convolve(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What ConvNN is where neighbors are a whole window: the K slots, in raster order, are the taps of a kernel."""
        convolution = F.conv1d if self.axes == 1 else F.conv2d
        kernel = self.conv.weight.unflatten(2, (2 * self.padding + 1,) * self.axes)
        return convolution(values.transpose(1, 2).unflatten(2, grid), kernel, self.conv.bias)


class ConvNNAttention2d(ImageMixer):
    """ConvNN attention (arXiv 2511.14137) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    Neighbors are found between projected queries and keys; the projected values of the K slots are multiplied by the
    softmax of their scores (or the raw scores) and convolved over the slots. One head. With K = N, matmul, softmax and
    depthwise weights of one it is `Attention2d` with one head.

    Args:
        neighbors: which tokens are neighbors; in `all` mode a token competes for its own slots like any other.
        convolution_type: over the slots, standard, depthwise or depthwise-separable, without bias.
        softmax_topk_val: weigh values by the softmax of the scores; False: by the raw scores.
        score_temperature: what scores are divided by before the softmax.
        topk: hard, or how the choice of neighbors is learned in training: straight_through, gumbel (`mixers/topk.py`).
        attention_dropout: probability of dropping a weight.
        shuffle_pattern, shuffle_scale, image_size: as in `ConvNN2d`.

    Raises ValueError if K, the samples, the shuffle, the temperature or the convolution type do not fit, and for a choice that
    cannot be learned: by location, or without the softmax.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        neighbors: NeighborConfig,
        *,
        convolution_type: str = "standard",
        softmax_topk_val: bool = True,
        score_temperature: float = 1.0,
        topk: str = "hard",
        attention_dropout: float = 0.0,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        image_size: int | tuple[int, ...] | None = None,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
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
        if self.topk != "hard" and self.training:
            choice = self.select.choose(query, key, grid, self.topk, self.score_temperature)
            return self.unfold(self.proj(learned_slot_convolution(self.conv, values, choice, self.dropout.p)), grid)
        index, scores = self.select(query, key, grid, scored=True)  # (B, N, K) each
        weights = neighbor_weights(
            scores, self.select.neighbors.metric, softmax=self.softmax_topk_val, temperature=self.score_temperature
        )
        out = slot_convolution(self.conv, values, index, self.dropout(weights))
        return self.unfold(self.proj(out), grid)


class Attention2d(ImageMixer):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762) over the pixels of an image:
    (B, C_in, H, W) -> (B, C_out, H, W).

    Raises ValueError if num_heads does not divide the channels that attention runs on, and for an attention_dropout that is no
    probability.
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


class CoordConv2d(GridTables):
    """Convolution of the channels and two more, the coordinates of each pixel (CoordConv; Liu et al., arXiv 1807.03247):
    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    Coordinates run from -1 to 1 along each side, row first; the ring of zeros around the map has none. Arguments are those of
    `make_conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, image_size=None, **geometry):
        super().__init__()
        self.conv = nn.Conv2d(in_channels + 2, out_channels, kernel_size, **geometry)
        if image_size is not None:
            self._tables(tuple(image_size), device=None)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[2:])
        places = coordinates(self._tables(grid, x.device)["places"], grid, x.dtype)  # (N, 2)
        return self.conv(torch.cat([x, places.T.unflatten(1, grid).expand(x.shape[0], -1, -1, -1)], dim=1))

    def _make_tables(self, grid: tuple[int, ...]) -> dict[str, Tensor]:
        return {"places": grid_places(grid)}


def make_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    aggregation_type: str = "Col",
    image_size: tuple[int, int] | None = None,
    stride: int = 1,
    bias: bool = True,
) -> nn.Module:
    """A convolution that keeps the size of the map, but for its stride; with aggregation_type Loc_Col a `CoordConv2d`."""
    if kernel_size % 2 == 0:  # the copy of the map that PyTorch warns of is what keeps its size
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
    geometry = {"padding": "same"} if stride == 1 else {"padding": kernel_size // 2, "stride": stride}
    if aggregation_type == "Loc_Col":
        return CoordConv2d(in_channels, out_channels, kernel_size, image_size=image_size, bias=bias, **geometry)
    return nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias, **geometry)


class Strided2d(nn.Module):
    """A mixer of which every `stride`-th row and column is kept, as of a convolution with a stride.

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
    """Two mixers side by side: both see the whole input, ReLU after each, channels concatenated.

    (B, C_in, H, W) -> (B, C_first + C_second, H, W).

    Args:
        join: instead of the two ReLUs, what runs on the concatenated channels.
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


def make_convolution(in_channels: int, out_channels: int, kernel_size: int, convolution_type: str, **geometry) -> nn.Module:
    """A 1-D convolution without bias: standard, depthwise, or depthwise-separable (depthwise, then 1 x 1)."""
    if convolution_type == "standard":
        return nn.Conv1d(in_channels, out_channels, kernel_size, bias=False, **geometry)
    depthwise = nn.Conv1d(in_channels, in_channels, kernel_size, groups=in_channels, bias=False, **geometry)
    if convolution_type == "depthwise":
        return depthwise
    pointwise = nn.Conv1d(in_channels, out_channels, 1, bias=False)
    nn.init.xavier_uniform_(pointwise.weight)  # a projection of features, initialized as the others are
    return nn.Sequential(depthwise, pointwise)


def make_slot_convolution(channels: int, coordinates: int, neighbors: NeighborConfig, convolution_type: str) -> nn.Module:
    """The convolution over K slots of ConvNN attention, without bias; depthwise weights start at one.

    channels of the values, coordinates that aggregation_type Loc_Col appends to them -> channels.
    Raises ValueError for an unknown type, and for `depthwise` with coordinates appended.
    """
    check_slots(convolution_type, neighbors.aggregation_type)
    inputs = channels + coordinates * (neighbors.aggregation_type == "Loc_Col")
    conv = make_convolution(inputs, channels, neighbors.K, convolution_type, stride=neighbors.K)
    if convolution_type != "standard":
        nn.init.ones_((conv if convolution_type == "depthwise" else conv[0]).weight)
    return conv


def slot_convolution(conv: nn.Module, values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Apply what `make_slot_convolution` made: values (B, M, C), index and weights (B, N, K) -> (B, N, D)."""
    if isinstance(conv, nn.Sequential):
        depthwise, pointwise = conv
        mixed = aggregate(values, index, depthwise.weight, weights, depthwise=True)
        return F.linear(mixed, pointwise.weight.squeeze(-1))
    return aggregate(values, index, conv.weight, weights, depthwise=conv.groups > 1)


def last_slot(conv: nn.Module, x: Tensor) -> Tensor:
    """What `slot_convolution` makes of values in the last slot alone, one for each token: (B, N, C) -> (B, N, D).

    Its filter is a constant here.
    """
    if isinstance(conv, nn.Sequential):
        depthwise, pointwise = conv
        return last_slot(pointwise, last_slot(depthwise, x))
    weight = conv.weight.detach()[:, :, -1]
    return x * weight.squeeze(1).to(x.dtype) if conv.groups > 1 else F.linear(x, weight)


def learned_slot_convolution(conv: nn.Module, values: Tensor, choice: Choice, dropout: float) -> Tensor:
    """`slot_convolution` of the chosen neighbors, with the gradient of all candidates to their scores."""
    return mix_straight_through(choice, values, dropout, partial(slot_convolution, conv), partial(last_slot, conv))
