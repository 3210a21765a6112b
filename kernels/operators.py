"""Every operator, declared once: schema, result of fake tensors, gradient, FLOPs, and its form on each device.

As operators they keep their loops over chunks, which `torch.compile` would unroll, and gather neighbors again in the backward
pass instead of keeping them K-fold. An index (B, N, K) counts rows of key or values; scores
and sums over channels are in float32 at least. FLOPs count a multiply-add as two.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels import backend, chunked, cpu, reference
from kernels.reference import accumulator


def _gradients(grad: Tensor, backward: Callable, given: tuple, plain: Callable, tensors: tuple[Tensor, ...]):
    """Return `backward(grad, *given)`, the gradients of `plain(*tensors)`.

    Where they will be differentiated again, autograd computes them through the plain form; tensors that need no gradient get
    None.
    """
    if not torch.is_grad_enabled():
        return backward(grad, *given)
    with torch.enable_grad():
        views = [tensor.view_as(tensor) for tensor in tensors]  # one each, where query and key are the same tensor
        wanted = [view for view in views if view.requires_grad]
        found = iter(torch.autograd.grad(plain(*views), wanted, grad, create_graph=True))
        return tuple(next(found) if view.requires_grad else None for view in views)


# ---------------------------------------------------------------------------------------------------------------
# Select
# ---------------------------------------------------------------------------------------------------------------


@custom_op("convnn::find_neighbors", mutates_args=())
def find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    """index (B, N, K): for query (B, N, C) the K nearest of key (B, M, C), nearest first.

    candidates (S,): only these keys count. self_index (N,): the key that is the query's own token, then slot 0.
    """
    return chunked.find_neighbors(query, key, K, metric, candidates, self_index)


@find_neighbors.register_fake
def _(query, key, K, metric, candidates, self_index):
    return query.new_empty((*query.shape[:2], K), dtype=torch.long)


@custom_op("convnn::find_scored_neighbors", mutates_args=())
def find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`find_neighbors` by dot product, and the differentiable products of the pairs found: (B, N, K) each."""
    return chunked.find_scored_neighbors(query, key, K, candidates, self_index)


@find_scored_neighbors.register_fake
def _(query, key, K, candidates, self_index):
    shape = *query.shape[:2], K
    return query.new_empty(shape, dtype=torch.long), query.new_empty(shape, dtype=accumulator(query.dtype))


def _save_search(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.mark_non_differentiable(output[0])


def _search_gradient(ctx, _, grad):
    return *_pair_gradients(*ctx.saved_tensors, False, grad), None, None, None


find_scored_neighbors.register_autograd(_search_gradient, setup_context=_save_search)


# ---------------------------------------------------------------------------------------------------------------
# Score
# ---------------------------------------------------------------------------------------------------------------


@custom_op("convnn::pair_scores", mutates_args=())
def pair_scores(query: Tensor, key: Tensor, index: Tensor, squared_distance: bool) -> Tensor:
    """q_i . k_j(i,k), or the squared distance of the two: query (B, N, C), key (B, M, C) -> (B, N, K)."""
    return chunked.pair_scores(query, key, index, squared_distance)


@pair_scores.register_fake
def _(query, key, index, squared_distance):
    return query.new_empty(index.shape, dtype=accumulator(query.dtype))


@custom_op("convnn::pair_scores_backward", mutates_args=())
def pair_scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, squared_distance: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key."""
    return chunked.pair_scores_backward(grad, query, key, index, squared_distance)


@pair_scores_backward.register_fake
def _(grad, query, key, index, squared_distance):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save_pair(ctx, inputs, output):
    query, key, index, ctx.squared_distance = inputs
    ctx.save_for_backward(query, key, index)


def _pair_gradients(query, key, index, squared_distance, grad):
    given, plain = (query, key, index, squared_distance), lambda q, k: reference.pair_scores(q, k, index, squared_distance)
    return _gradients(grad, pair_scores_backward, given, plain, (query, key))


def _pair_gradient(ctx, grad):
    return *_pair_gradients(*ctx.saved_tensors, ctx.squared_distance, grad), None, None


pair_scores.register_autograd(_pair_gradient, setup_context=_save_pair)


# ---------------------------------------------------------------------------------------------------------------
# Aggregate
# ---------------------------------------------------------------------------------------------------------------


@custom_op("convnn::aggregate", mutates_args=())
def aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool) -> Tensor:
    """Sum over k of W_k (score_ik value_j(i,k)): values (B, M, C), weight (D, K * C) -> (B, N, D).

    A row of `weight` holds the slots one after the other. depthwise: weight (K, C), D = C.
    """
    return chunked.aggregate(values, index, weight, scores, depthwise)


@aggregate.register_fake
def _(values, index, weight, scores, depthwise):
    return values.new_empty((*index.shape[:2], weight.shape[1 if depthwise else 0]))


@custom_op("convnn::aggregate_backward", mutates_args=())
def aggregate_backward(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values (empty unless needed), of the weight, and of the scores (empty if there are none)."""
    return chunked.aggregate_backward(grad, values, index, weight, scores, depthwise, need_values)


@aggregate_backward.register_fake
def _(grad, values, index, weight, scores, depthwise, need_values):
    return (
        values.new_empty(values.shape if need_values else 0),
        weight.new_empty(weight.shape),
        values.new_empty(0 if scores is None else scores.shape, dtype=accumulator(values.dtype)),
    )


def _save_aggregate(ctx, inputs, output):
    values, index, weight, scores, ctx.depthwise = inputs
    ctx.save_for_backward(values, index, weight, scores)


def _aggregate_gradient(ctx, grad):
    need_values = ctx.needs_input_grad[0]
    values, index, weight, scores = ctx.saved_tensors  # read once: activation checkpointing allows no more
    to_values, to_weight, *to_scores = _gradients(
        grad,
        aggregate_backward,
        (values, index, weight, scores, ctx.depthwise, need_values),
        lambda v, w, s=None: reference.aggregate(v, index, w, s, ctx.depthwise),
        (values, weight) if scores is None else (values, weight, scores),
    )
    return to_values if need_values else None, None, to_weight, None if scores is None else to_scores[0], None


aggregate.register_autograd(_aggregate_gradient, setup_context=_save_aggregate)


@custom_op("convnn::weighted_sum", mutates_args=())
def weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weight_ik value_j(i,k): values (B, M, C), index and weights (B, N, K) -> (B, N, C)."""
    return chunked.weighted_sum(values, index, weights)


@weighted_sum.register_fake
def _(values, index, weights):
    return values.new_empty((*index.shape[:2], values.shape[2]))


@custom_op("convnn::weighted_sum_backward", mutates_args=())
def weighted_sum_backward(grad: Tensor, values: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of values and weights."""
    return chunked.weighted_sum_backward(grad, values, index, weights)


@weighted_sum_backward.register_fake
def _(grad, values, index, weights):
    return values.new_empty(values.shape), weights.new_empty(weights.shape)


def _save_weighted_sum(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weighted_sum_gradient(ctx, grad):
    values, index, weights = ctx.saved_tensors
    given, plain = (values, index, weights), lambda v, w: reference.weighted_sum(v, index, w)
    to_values, to_weights = _gradients(grad, weighted_sum_backward, given, plain, (values, weights))
    return to_values, None, to_weights


weighted_sum.register_autograd(_weighted_sum_gradient, setup_context=_save_weighted_sum)


@custom_op("convnn::max_neighbors", mutates_args=())
def max_neighbors(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Largest neighbor, channel by channel, and its row; among equal ones the first slot's.

    values (B, M, C), index (B, N, K) -> (B, N, C) each.
    """
    return chunked.max_neighbors(values, index)


@max_neighbors.register_fake
def _(values, index):
    shape = *index.shape[:2], values.shape[2]
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int32)


@custom_op("convnn::max_neighbors_backward", mutates_args=())
def max_neighbors_backward(grad: Tensor, values: Tensor, winner: Tensor) -> Tensor:
    """Gradient of the values: each goes to the row of the largest neighbor."""
    return chunked.max_neighbors_backward(grad, values, winner)


@max_neighbors_backward.register_fake
def _(grad, values, winner):
    return values.new_empty(values.shape)


def _save_max(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _max_gradient(ctx, grad, _):
    values, winner = ctx.saved_tensors

    def backward(*given):
        return (max_neighbors_backward(*given),)

    return *_gradients(grad, backward, (values, winner), lambda v: v.gather(1, winner.long()), (values,)), None


max_neighbors.register_autograd(_max_gradient, setup_context=_save_max)


# ---------------------------------------------------------------------------------------------------------------
# FLOPs, from shapes
# ---------------------------------------------------------------------------------------------------------------


def _search_flops(query, key, K, candidates, self_index) -> int:
    B, N, C = query
    return 0 if K == (self_index is not None) else 2 * B * N * (candidates or key[1:])[0] * C


FLOPS = {
    find_neighbors: lambda query, key, K, metric, candidates, self_index: _search_flops(query, key, K, candidates, self_index),
    find_scored_neighbors: _search_flops,
    pair_scores: lambda query, key, index, _: 2 * math.prod(index) * query[2],
    pair_scores_backward: lambda grad, query, key, index, _: 4 * math.prod(index) * query[2],
    aggregate: lambda values, index, weight, scores, _: 2 * index[0] * index[1] * math.prod(weight),
    aggregate_backward: lambda grad, values, index, weight, scores, _, need_values: (
        2 * index[0] * index[1] * math.prod(weight) * (1 + (need_values or scores is not None))
    ),
    weighted_sum: lambda values, index, weights: 2 * math.prod(index) * values[2],
    weighted_sum_backward: lambda grad, values, index, weights: 4 * math.prod(index) * values[2],
}


def _count(operator: CustomOpDef, formula: Callable[..., int]) -> None:
    @register_flop_formula(operator._opoverload.overloadpacket)
    def _(*shapes, out_shape, **_kwargs) -> int:
        return formula(*shapes)


for _operator, _formula in FLOPS.items():
    _count(_operator, _formula)


# ---------------------------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------------------------

# Operator, its form on a CPU, its form on any device, and its Triton kernel: False if it does not cover the arguments, None if
# there is none.
BACKENDS = (
    (
        find_neighbors,
        cpu.find_neighbors,
        chunked.find_neighbors,
        lambda cuda, query, key, K, *_: cuda.covers_search(query, key, K) and cuda.find_neighbors,
    ),
    (
        find_scored_neighbors,
        cpu.find_scored_neighbors,
        chunked.find_scored_neighbors,
        lambda cuda, query, key, K, *_: cuda.covers_search(query, key, K) and cuda.find_scored_neighbors,
    ),
    (
        pair_scores,
        cpu.pair_scores,
        chunked.pair_scores,
        lambda cuda, query, key, index, _: cuda.covers_pairs(query, key, index) and cuda.pair_scores,
    ),
    (
        pair_scores_backward,
        cpu.pair_scores_backward,
        chunked.pair_scores_backward,
        lambda cuda, _, query, key, index, __: cuda.covers_pairs(query, key, index) and cuda.pair_scores_backward,
    ),
    (
        aggregate,
        cpu.aggregate,
        chunked.aggregate,
        lambda cuda, *given: cuda.covers_aggregate(*given[:4]) and cuda.aggregate,
    ),
    (
        aggregate_backward,
        cpu.aggregate_backward,
        chunked.aggregate_backward,
        lambda cuda, _, *given: cuda.covers_aggregate(*given[:4]) and cuda.aggregate_backward,
    ),
    (
        weighted_sum,
        cpu.weighted_sum,
        chunked.weighted_sum,
        lambda cuda, *given: cuda.covers_weighted_sum(*given) and cuda.weighted_sum,
    ),
    (
        weighted_sum_backward,
        cpu.weighted_sum_backward,
        chunked.weighted_sum_backward,
        lambda cuda, _, *given: cuda.covers_weighted_sum(*given) and cuda.weighted_sum_backward,
    ),
    (
        max_neighbors,
        chunked.max_neighbors,
        chunked.max_neighbors,
        lambda cuda, *given: cuda.covers_max(*given) and cuda.max_neighbors,
    ),
    (
        max_neighbors_backward,
        chunked.max_neighbors_backward,
        chunked.max_neighbors_backward,
        lambda *_: None,  # one scatter of PyTorch's
    ),
)


def _register(operator: CustomOpDef, on_cpu: Callable, on_any_device: Callable, triton_kernel: Callable) -> None:
    @operator.register_kernel("cpu")
    def _(*given):
        return (on_any_device if backend.chosen() == "chunked" else on_cpu)(*given)

    @operator.register_kernel("cuda")
    def _(*given):
        return backend.on_cuda(operator._name, triton_kernel, on_any_device, given)


for _row in BACKENDS:
    _register(*_row)
