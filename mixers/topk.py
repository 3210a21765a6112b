"""Learning which K neighbors are chosen: a forward pass with K of them, and a gradient for all candidates.

The plain choice (`--topk hard`) gives a gradient to the scores of the chosen pairs only, and with K = 1 to none. Here, in
training, the scores get the gradient of shares P = softmax(scores / temperature) over all candidates, as if the slots were

    slot k < K:  P[i, j_k] x_{j_k}
    slot K:      P[i, j_K] x_{j_K} + sum over the candidates j that were not chosen of P[i, j] x_j

before the convolution over the slots, or the sum. The forward pass has the K slots only, weighed as by the plain choice, and
the values x and the filter get its gradient.

    straight_through  the K nearest (Bengio et al., arXiv 1308.3432)
    gumbel            K drawn without replacement from P (Gumbel top-k; Kool et al., arXiv 1903.06059)

All pairs of tokens are scored, (B, N, M), in PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.reference import nearest
from neighbors import all_pair_scores, find_scored_neighbors, neighbor_weights


class Choice(NamedTuple):
    """K neighbors of each token, and how the choice is learned."""

    index: Tensor  # (B, N, K)
    weights: Tensor  # (B, N, K) of the values of the slots, without gradient
    shares: Tensor  # (B, N, M) of all keys, 0 for those that are no candidates; they carry the gradient


def choose(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    *,
    topk: str,
    temperature: float = 1.0,
    candidates: Tensor | None = None,
    self_index: Tensor | None = None,
) -> Choice:
    """Choose K keys for each query: query (B, N, C), key (B, M, C); candidates and self_index as in `find_neighbors`.

    topk straight_through: the nearest, nearest first. gumbel: the K largest of scores / temperature + noise, largest first,
    with independent Gumbel(0, 1) noise from the device's global generator; a token that is always slot 0 is that here too,
    and the other K - 1 are drawn. Weights are the softmax of the scores of the chosen, without the noise.

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
            chosen = scores.gather(2, index)
        else:
            index, chosen = find_scored_neighbors(query, key, K, metric, candidates=candidates, self_index=self_index)
        weights = neighbor_weights(chosen, metric, temperature=temperature)
    return Choice(index, weights, shares)


def _allowed(N: int, M: int, candidates: Tensor, self_index: Tensor | None) -> Tensor:
    """(N, M): whether a key is a candidate of a query, or its own token."""
    allowed = torch.zeros(M, dtype=torch.bool, device=candidates.device).index_fill(0, candidates, True)
    if self_index is None:
        return allowed.expand(N, M)
    return allowed | (self_index[:, None] == torch.arange(M, device=candidates.device))


def mix_straight_through(
    choice: Choice,
    values: Tensor,
    dropout: float,
    mix: Callable[[Tensor, Tensor, Tensor], Tensor],
    mix_last: Callable[[Tensor], Tensor],
) -> Tensor:
    """`mix(values, index, weights)` of the chosen neighbors, whose scores get the gradient that all candidates had.

    Args:
        values: (B, M, C).
        dropout: probability of dropping the weight of a slot, and the gradient of its share; those that were not chosen have
            no weight to drop.
        mix: values, index and weights (B, N, K) -> (B, N, D), linear in values * weights.
        mix_last: what `mix` makes of values (B, N, C) in the last slot, without a gradient to its parameters: (B, N, D).
    """
    index, weights, shares = choice
    weights = straight_through(weights, shares.gather(2, index))
    others = shares.scatter(2, index, 0).to(values.dtype) @ values.detach()  # (B, N, C)
    return straight_through(mix(values, index, F.dropout(weights, dropout)), mix_last(others))


def straight_through(x: Tensor, soft: Tensor) -> Tensor:
    """x, and its gradient, with that of `soft` beside it."""
    return x + (soft - soft.detach())
