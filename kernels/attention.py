"""Attention to the K keys of largest product, as one operator with one backward operator, for CUDA.

Search, softmax, weighted sum and convolution over the slots, in one call: an operator takes 30 to 100 microseconds of host
time, and between operators a tensor of all heads is copied. Heads keep the strides that the projection gave them. On a CPU
it does not pay (docs/dev/performance.md), and layers compute step by step.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from kernels import backend, chunked, reference
from kernels.reference import accumulator, slots_of

LIBRARY = Library("convnn", "FRAGMENT")
LIBRARY.define(
    "neighbor_attention(Tensor query, Tensor key, Tensor value, Tensor? weight, int K, float divisor)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "neighbor_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? weight, Tensor index,"
    " Tensor weights, float divisor) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward = torch.ops.convnn.neighbor_attention.default
_backward = torch.ops.convnn.neighbor_attention_backward.default


def pays(query: Tensor) -> bool:
    """Return True where the one operator is faster than its steps."""
    return query.is_cuda


def neighbor_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, K: int, divisor: float) -> Tensor:
    """Attend to the K keys of largest product: query (B, H, N, C), key and value (B, H, M, C) -> (B, H, N, C).

    The softmax of the K products / divisor weights the values, times `weight` (C, 1, K), the weights of a depthwise
    convolution over the slots; None: of one. Products and their softmax are in float32 at least.
    """
    given = query, key, value, weight, K, divisor
    if backend.is_plain():
        return compose(reference, *given)[0]
    if torch.compiler.is_compiling():  # with the gradient that torch.library knows; in eager mode it costs twice the time
        return _forward(*given)[0]
    return _NeighborAttention.apply(*given)


def mixed_pairs(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, index: Tensor, divisor: float) -> Tensor:
    """`neighbor_attention` to the keys of an index (B * H, N, K), in PyTorch's own operators."""
    (q, k, v), heads = (part.flatten(0, 1) for part in (query, key, value)), query.shape[:2]
    products = reference.pair_scores(q, k, index, False)
    return mix(reference, v, index, (products / divisor).softmax(2), weight).unflatten(0, heads)


def mix(parts: ModuleType, values: Tensor, index: Tensor, weights: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return parts.weighted_sum(values, index, weights)
    return parts.aggregate(values, index, slots_of(weight), weights, True)


def side_by_side(rows: Tensor, heads: tuple[int, int]) -> Tensor:
    """(B * H, N, C) -> (B, H, N, C), the heads of a token side by side in memory, as projections have them."""
    return rows.unflatten(0, heads).transpose(1, 2).contiguous().transpose(1, 2)


def compose(
    parts: ModuleType, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, K: int, divisor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and index and weights (B * H, N, K)."""
    (q, k, v), heads = (part.flatten(0, 1) for part in (query, key, value)), query.shape[:2]
    index, products = parts.find_scored_neighbors(q, k, K, None, None)
    weights = (products / divisor).softmax(2)
    return side_by_side(mix(parts, v, index, weights, weight), heads), index, weights


def compose_backward(
    parts: ModuleType,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    index: Tensor,
    weights: Tensor,
    divisor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, slot by slot, weight: (K, C), empty if there is none."""
    (g, q, k, v), heads = (part.flatten(0, 1) for part in (grad, query, key, value)), query.shape[:2]
    if weight is None:
        (to_value, to_weights), to_weight = parts.weighted_sum_backward(g, v, index, weights), value.new_empty(0)
    else:
        to_value, to_weight, to_weights = parts.aggregate_backward(g, v, index, slots_of(weight), weights, True, True)
    to_scores = torch._softmax_backward_data(to_weights, weights, 2, weights.dtype) / divisor
    to_query, to_key = parts.pair_scores_backward(to_scores, q, k, index, False)
    return *(side_by_side(part, heads) for part in (to_query, to_key, to_value)), to_weight


# ---------------------------------------------------------------------------------------------------------------
# Gradient
# ---------------------------------------------------------------------------------------------------------------


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.divisor = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    query, key, value, weight, index, weights = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated again: autograd computes it through the plain form
        given = [None if x is None else x.view_as(x) for x in (query, key, value, weight)]
        wanted = [x for x in given if x is not None and x.requires_grad]
        output = mixed_pairs(*given, index, ctx.divisor)
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
        return *(next(found) if x is not None and x.requires_grad else None for x in given), None, None
    *found, to_weight = _backward(grad, query, key, value, weight, index, weights, ctx.divisor)
    return *found, None if weight is None else to_weight.t()[:, None], None, None


class _NeighborAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):
        with torch._C._AutoDispatchBelowAutograd():  # past the gradient that torch.library knows
            output = _forward(*given)
        *tensors, _, ctx.divisor = given
        ctx.save_for_backward(*tensors, *output[1:])
        return output[0]

    backward = staticmethod(_gradient)


torch.library.register_autograd("convnn::neighbor_attention", _gradient, setup_context=_save, lib=LIBRARY)


# ---------------------------------------------------------------------------------------------------------------
# Fake tensors, FLOPs, backends
# ---------------------------------------------------------------------------------------------------------------


def _rows_like(x: Tensor, rows: int) -> Tensor:
    B, H, _, C = x.shape
    return x.new_empty(B, rows, H, C).transpose(1, 2)


@torch.library.register_fake("convnn::neighbor_attention", lib=LIBRARY)
def _(query, key, value, weight, K, divisor):
    B, H, N, _ = query.shape
    index = query.new_empty(B * H, N, K, dtype=torch.long)
    return _rows_like(value, N), index, query.new_empty(index.shape, dtype=accumulator(query.dtype))


@torch.library.register_fake("convnn::neighbor_attention_backward", lib=LIBRARY)
def _(grad, query, key, value, weight, index, weights, divisor):
    like = (_rows_like(x, x.shape[2]) for x in (query, key, value))
    return *like, value.new_empty(0) if weight is None else weight.new_empty(weight.shape[2], weight.shape[0])


@register_flop_formula(torch.ops.convnn.neighbor_attention)
def _(query, key, value, weight, K, divisor, *, out_shape, **_kwargs) -> int:
    B, H, N, C = query
    return 2 * B * H * N * C * (key[2] + K)


@register_flop_formula(torch.ops.convnn.neighbor_attention_backward)
def _(grad, query, key, value, weight, index, weights, divisor, *, out_shape, **_kwargs) -> int:
    B, H, N, C = query
    return 8 * B * H * N * C * index[2]


def _anywhere(*given):
    return compose(chunked, *given)


def _backward_anywhere(*given):
    return compose_backward(chunked, *given)


def _kernel(cuda: ModuleType, *given):
    return cuda.covers_attention(*given[:5]) and cuda.neighbor_attention


def _backward_kernel(cuda: ModuleType, *given):
    return cuda.covers_attention(*given[1:5], given[5].shape[2]) and cuda.neighbor_attention_backward


def _on_cuda(*given):
    return backend.on_cuda("neighbor_attention", _kernel, _anywhere, given)


def _backward_on_cuda(*given):
    return backend.on_cuda("neighbor_attention_backward", _backward_kernel, _backward_anywhere, given)


LIBRARY.impl("neighbor_attention", _anywhere, "CompositeExplicitAutograd")
LIBRARY.impl("neighbor_attention_backward", _backward_anywhere, "CompositeExplicitAutograd")
LIBRARY.impl("neighbor_attention", _on_cuda, "CUDA")
LIBRARY.impl("neighbor_attention_backward", _backward_on_cuda, "CUDA")
