"""Attention with a cost linear in the number of tokens N, on (B, N, d_model).

LinearAttention replaces the softmax by a product of features, Performer by random features; Linformer compresses keys and
values, Nystromformer goes through landmarks, Hybrid adds up neighborhoods and a Performer. None holds an (N, N) matrix, except
to return the mixing matrix: the output for an identity in place of the values. `attention_dropout` drops weights of a query: of
the compressed keys, of the features, of the landmarks.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import Bias, MultiHeadMixer, TokenLayout, attend, check_at_least, check_one_of, scaled_products
from mixers.local import make_pattern
from mixers.tables import GridTables, PerGrid
from mixers.tilings import neighborhood_tilings
from options.layers import PERFORMER_KERNELS


class LinearMixer(MultiHeadMixer):
    """Base of mixers that are linear in their values; they override `weigh`."""

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, *layout: TokenLayout) -> Tensor:
        """query and key (B, H, N, d), value (B, H, N, e) -> mixed values (B, H, N, e)."""
        raise NotImplementedError

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, *layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        out = self.weigh(query, key, value, self.dropout, *layout)
        return out, self.weigh(query, key, identity_values(value), 0.0, *layout) if output_matrix else None


def identity_values(value: Tensor) -> Tensor:
    """(B, H, N, d) -> identities (B, H, N, N); mixing them gives the mixing matrix."""
    B, H, N, _ = value.shape
    return torch.eye(N, dtype=value.dtype, device=value.device).expand(B, H, N, N)


def feature_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention by products of positive features: query and key (B, H, N, m), their logarithms, value (B, H, N, e) -> the same.

    Two softmaxes, over the tokens for every feature, then over the features for every query, are the quotient of the sums. They
    cannot overflow.
    """
    total = key.logsumexp(dim=2, keepdim=True)  # (B, H, 1, m): sum of a feature over all keys
    values = (key - total).exp().mT.to(value.dtype) @ value  # (B, H, m, e)
    weights = (query + total).softmax(dim=-1)  # (B, H, N, m)
    return F.dropout(weights, dropout).to(value.dtype) @ values


class LinearAttention(LinearMixer):
    """Linear attention (Katharopoulos et al., arXiv 2006.16236): weights phi(q) phi(k), phi = elu + 1, over their sum. O(N d).

    A class token is one of the tokens.
    """

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        logs = [part.clamp(max=0) + part.relu().log1p() for part in (query.to(wide), key.to(wide))]
        return feature_attention(*logs, value, dropout)


class LinformerAttention(LinearMixer):
    """Linformer (Wang et al., arXiv 2006.04768): attention to k learned mixtures of the keys and of the values. O(N k).

    The projections (k, N) are shared by all heads. With k = N and identities as projections it is `MultiHeadAttention`.

    Raises ValueError for a k below 1.
    """

    per_token = "key_projection"

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        k: int,
        *,
        layout: TokenLayout,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        check_at_least(1, k=k)
        # With variance 1/N, a mixture of N tokens has the variance of one token. The 1/k of the paper's theorem 2 keeps the
        # norm of all N instead, and lets scores and values grow with N / k.
        N = layout.num_tokens
        self.key_projection = nn.Parameter(torch.randn(k, N) / math.sqrt(N))
        self.value_projection = nn.Parameter(torch.randn(k, N) / math.sqrt(N))

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        return attend(query, self.key_projection @ key, self.value_projection @ value, dropout=dropout)[0]


class RandomFeatures(nn.Module):
    """FAVOR+ (Choromanski et al., arXiv 2009.14794): attention by a kernel of positive random features.

    `softmax` features estimate softmax(q k^T / sqrt(d)) without bias, `relu` features are another kernel. Both run on the
    logarithms of the features; the result equals the quotient of the paper without its stabilizers and small constants.

    `features` (m, d), orthogonal in blocks of d, are drawn at construction, saved with the model, and drawn anew by
    `redraw(seed)`.
    """

    def __init__(self, head_dim: int, num_features: int, kernel: str):
        super().__init__()
        check_at_least(1, num_features=num_features)
        check_one_of(PERFORMER_KERNELS, kernel=kernel)
        self.kernel = kernel
        self.register_buffer("features", orthogonal_features(num_features, head_dim))

    def extra_repr(self) -> str:
        return "features={}, head_dim={}, kernel={}".format(*self.features.shape, self.kernel)

    def redraw(self, seed: int) -> None:
        """Draw the features again, from this seed."""
        self.features.copy_(orthogonal_features(*self.features.shape, torch.Generator().manual_seed(seed)))

    def log_features(self, x: Tensor) -> Tensor:
        """(B, H, N, d) -> logarithms of the features (B, H, N, m), up to a constant, in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            x = x.to(dtype) / x.shape[-1] ** 0.25
            projected = x @ self.features.to(dtype).T
            if self.kernel == "softmax":
                return projected - x.square().sum(dim=-1, keepdim=True) / 2
            # The constant of the paper's code: a query without any feature weights all keys alike.
            return (projected.relu() + 1e-3).log()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """query and key (B, H, N, d), value (B, H, N, e) -> (B, H, N, e)."""
        return feature_attention(self.log_features(query), self.log_features(key), value, dropout)


def orthogonal_features(num_features: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """(m, d): rows with the lengths of normal vectors, in orthogonal blocks of d rows (arXiv 2009.14794, section 2)."""
    blocks = []
    for _ in range(math.ceil(num_features / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
        blocks.append((q * r.diagonal().sign()).T)  # signs that make the rotation uniform
    lengths = torch.randn(num_features, dim, dtype=torch.float64, generator=generator).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:num_features] * lengths).float()


class PerformerAttention(LinearMixer):
    """Performer (Choromanski et al., arXiv 2009.14794): attention by positive random features. O(N m).

    Args:
        num_features: random features (m); the more, the closer the softmax kernel to `MultiHeadAttention`.
        kernel: `softmax` or `relu`.

    Raises ValueError for fewer than one feature or an unknown kernel.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_features: int,
        *,
        kernel: str = "softmax",
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, attention_dropout=attention_dropout, bias=bias)
        self.random = RandomFeatures(self.head_dim, num_features, kernel)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        return self.random(query, key, value, dropout)


class NystromformerAttention(LinearMixer):
    """Nystromformer (Xiong et al., arXiv 2102.03902): attention from queries to landmarks to keys. O(N m).

    Landmarks are the means of m runs of tokens of nearly equal length. With a landmark for every token it is
    `MultiHeadAttention`, computed as such.

    Args:
        num_landmarks: landmarks (m).
        conv_kernel: size of an added depthwise convolution of the values along the sequence, one per head; 0: none.

    Raises ValueError for fewer than one landmark or a negative conv_kernel.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_landmarks: int,
        *,
        layout: TokenLayout,
        conv_kernel: int = 0,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        check_at_least(1, num_landmarks=num_landmarks)
        check_at_least(0, conv_kernel=conv_kernel)
        self.tables = PerGrid(partial(GridTables, partial(segment_tables, num_landmarks)), layout.sides)
        self.reach = (conv_kernel - 1) // 2, conv_kernel // 2  # tokens before and after
        self.conv = None
        if conv_kernel:
            self.conv = nn.Conv2d(num_heads, num_heads, (conv_kernel, 1), groups=num_heads, bias=False)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, layout: TokenLayout) -> Tensor:
        segments = self.tables.at(layout.sides, query.device).segments
        if segments is None:
            out, _ = attend(query, key, value, dropout=dropout)
        else:
            segments = segments.to(query.dtype)
            means = segments / segments.sum(dim=1, keepdim=True)  # before the sum, which may be too large for float16
            query_landmarks, key_landmarks = means @ query, means @ key  # (B, H, m, d)
            values, _ = attend(query_landmarks, key, value)  # (B, H, m, e)
            with torch.autocast(query.device.type, enabled=False):
                dtype = torch.promote_types(query.dtype, torch.float32)
                scores = scaled_products(query_landmarks.to(dtype), key_landmarks.to(dtype))
                values = pseudo_inverse(scores.softmax(dim=-1)) @ values.to(dtype)
            out, _ = attend(query, key_landmarks, values.to(query.dtype), dropout=dropout)
        return out if self.conv is None else out + self.conv(F.pad(value, (0, 0, *self.reach)))


def segment_tables(num_landmarks: int, *sides: int) -> dict[str, Tensor | None]:
    """Make `segments` (m, N): ones for the tokens of each of m runs of nearly equal length, else zeros; None if m >= N."""
    tokens = TokenLayout(*sides).num_tokens
    if num_landmarks >= tokens:
        return {"segments": None}
    segment = torch.arange(tokens) * num_landmarks // tokens
    return {"segments": (segment == torch.arange(num_landmarks)[:, None]).float()}


def pseudo_inverse(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Moore-Penrose inverse of matrices (..., m, m) of softmax rows, by the third-order iteration of arXiv 2102.03902.

    Each matrix starts from its own norms, so the result does not depend on the batch.
    """
    norms = matrix.sum(dim=-2).amax(dim=-1) * matrix.sum(dim=-1).amax(dim=-1)
    inverse = matrix.mT / norms[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse


class HybridAttention(MultiHeadMixer):
    """Regional and global attention in one, after Ibtehaz et al. (arXiv 2406.08859). Memory O(N).

    One neighborhood attention per dilation, and a Performer for global context, on the same queries, keys and values;
    every token fuses the branches by a learned softmax gate.

    Args:
        window: side of the neighborhoods, odd.
        dilations: steps between the patches of a neighborhood, one branch each.
        num_features, kernel: of the Performer.

    Raises ValueError if the window is even, or times a dilation more than a side of the grid.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        window: int,
        dilations: tuple[int, ...],
        num_features: int,
        kernel: str = "softmax",
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        tilings = [partial(neighborhood_tilings, window, step, names=("window", "dilations")) for step in dilations]
        self.regional = nn.ModuleList(PerGrid(partial(make_pattern, each), layout.sides) for each in tilings)
        self.context = RandomFeatures(self.head_dim, num_features, kernel)
        self.gate = nn.Linear(d_model, len(dilations) + 1, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        """Return query, key and value of every head, and the share of every branch (B, 1, N, branches)."""
        return *super().project(x), self.gate(x).softmax(dim=-1)[:, None]

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, shares: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        *regional, last = shares.to(value.dtype).split(1, dim=-1)
        out = last * self.context(query, key, value, self.dropout)
        matrix = last * self.context(query, key, identity_values(value), 0.0) if output_matrix else None
        for share, patterns in zip(regional, self.regional, strict=True):
            pattern = patterns.at(layout.sides, query.device)
            mixed, weights = pattern(query, key, value, dropout=self.dropout, output_matrix=output_matrix)
            out = out + share * mixed
            if output_matrix:
                matrix = matrix + share * weights
        return out, matrix
