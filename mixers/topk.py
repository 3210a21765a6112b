"""Learned top-k: a forward pass with K neighbors, and a gradient for all candidates.

Under `--topk hard` only the scores of the K neighbors get a gradient, and with K = 1 not even they. Here, in training, the
scores get the gradient of shares P = softmax(scores / temperature) over all candidates, as if the slots were

    slot k < K:  P[i, j_k] x_{j_k}
    slot K:      P[i, j_K] x_{j_K} + sum over the candidates j that are not neighbors of P[i, j] x_j

before the convolution over the slots, or the sum. The forward pass has the K slots only, weighted as under `hard`, and the
values x and the filter get its gradient.

    straight_through  the K nearest (Bengio et al., arXiv 1308.3432)
    gumbel            K drawn without replacement from P (Gumbel top-k; Kool et al., arXiv 1903.06059)

All pairs of tokens are scored, (B, N, M), in PyTorch's own operators.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import nearest
from neighbors import all_pair_scores, find_scored_neighbors, neighbor_weights


class LearnedNeighbors(NamedTuple):
    """K neighbors of each token, and the shares that their scores learn from."""

    index: Tensor  # (B, N, K)
    weights: Tensor  # (B, N, K) of the values of the slots, with the gradient of the shares
    shares: Tensor  # (B, N, M) of all keys, 0 unless a candidate; they carry the gradient


def find_learned_neighbors(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    *,
    topk: str,
    temperature: float = 1.0,
    candidates: Tensor | None = None,
    self_index: Tensor | None = None,
) -> LearnedNeighbors:
    """Find K keys for each query: query (B, N, C), key (B, M, C); candidates and self_index as in `find_neighbors`.

    topk straight_through: the nearest, nearest first. gumbel: the K largest of scores / temperature + noise, largest first,
    with independent Gumbel(0, 1) noise from the device's global generator; a token that is always slot 0 stays there,
    and the other K - 1 are drawn. Weights are the softmax of the K scores, without the noise.

    Raises ValueError as `find_neighbors`.
    """
    scores = all_pair_scores(query, key, metric)  # (B, N, M)
    if candidates is not None:
        scores = scores.masked_fill(~_allowed(*scores.shape[1:], candidates, self_index), -torch.inf)
    shares = neighbor_weights(scores, metric, temperature=temperature)
    with torch.no_grad():
        if topk == "gumbel":
            noise = -torch.empty_like(scores).exponential_().log()
            # Masked once more: noise can be infinite.
            index = nearest(scores / temperature + noise, K, candidates, self_index)
            found = scores.gather(2, index)
        else:
            index, found = find_scored_neighbors(query, key, K, metric, candidates=candidates, self_index=self_index)
        weights = neighbor_weights(found, metric, temperature=temperature)
    return LearnedNeighbors(index, straight_through(weights, shares.gather(2, index)), shares)


def _allowed(N: int, M: int, candidates: Tensor, self_index: Tensor | None) -> Tensor:
    """(N, M), True where a key is a candidate of a query, or its own token."""
    allowed = torch.zeros(M, dtype=torch.bool, device=candidates.device).index_fill(0, candidates, True)
    if self_index is None:
        return allowed.expand(N, M)
    return allowed | (self_index[:, None] == torch.arange(M, device=candidates.device))


def learn_from_unchosen(
    out: Tensor,
    values: Tensor,
    index: Tensor,
    shares: Tensor | None,
    last_slot: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return `out` (B, N, D); where shares are given, candidates that are not neighbors get a gradient through them.

    Args:
        values: (B, M, C), constants here.
        last_slot: the layer's mixing of the last slot, with constant parameters: (B, N, C) -> (B, N, D).
    """
    if shares is None:
        return out
    unchosen = shares.scatter(2, index, 0).to(values.dtype) @ values.detach()  # (B, N, C)
    return straight_through(out, last_slot(unchosen))


def straight_through(x: Tensor, soft: Tensor) -> Tensor:
    """Return x; in the backward pass `soft` gets the gradient too."""
    return x + (soft - soft.detach())
