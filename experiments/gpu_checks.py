"""First contact, part `check`: every kernel in bfloat16 and float32 against the plain form in float64.

Neighbors are compared by score: a row counts as wrong where its scores fall short of the best by more than rounding, where a
token comes twice or, on whole numbers, whose scores are exact, where any index differs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.gpu_parts import Part, compiled_kernels, full_precision, is_interpreted, resources
from kernels import attention, reference

METRICS = ("matmul", "cosine", "euclidean")


class Size(NamedTuple):
    """Tokens, channels and neighbors of a problem; M: keys, B: groups, D: output channels of the standard convolution."""

    N: int
    C: int
    K: int
    M: int
    B: int = 2
    D: int = 48

    def __str__(self) -> str:
        return f"N {self.N}, M {self.M}, C {self.C}, K {self.K}"


# The layer of ViT-Tiny first. Together they have all N, C and K that differ in tiles, ragged ends or passes;
# Triton 3.6 has spilled at 256 channels.
SIZES = [
    Size(197, 64, 9, 197),
    Size(1, 12, 1, 1),
    Size(5, 80, 4, 7),
    Size(1024, 48, 64, 1024),
    Size(1024, 128, 9, 1024),
    Size(197, 256, 9, 300),
]
SMALL = [Size(5, 12, 4, 7, D=8)]


class Problem:
    """Random tensors of one size, on the device, and their copies in float64."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str):
        B, (N, C, K, M, _, D) = size.B, size

        def new(*shape, dtype=dtype):
            return torch.randn(*shape, device=device).to(dtype)

        torch.manual_seed(0)
        self.K, self.query, self.key = K, new(B, N, C), new(B, M, C)
        self.index = torch.rand(B, N, M, device=device).topk(K).indices
        self.index[:, ::2, 0] = 0  # a token that very many chose
        self.pairs = new(B, N, K, dtype=torch.float32)
        self.depthwise, self.standard = new(K, C), new(D, K * C)
        self.rows, self.wide = new(B, N, C), new(B, N, D)  # gradients


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of what this dtype may differ by; above 1 it is an error."""
    tolerance = 3e-5 if found.dtype == torch.float32 else 1e-2
    scale = max(1.0, expected.abs().max().item())
    worst = (found.double() - expected).abs().max().item() / (tolerance * scale)
    return worst if worst == worst else float("inf")


def check_neighbors(index: Tensor, scores: Tensor, exact: bool = False, forced: int = 0) -> dict:
    """Compare an index (B, N, K) with the best of all scores (B, N, M); the first `forced` slots count as given."""
    K = index.shape[2]
    expected = reference.largest(scores, K - forced)
    found = index[:, :, forced:]
    short = scores.gather(2, expected) - scores.gather(2, found)
    wrong = short.abs() > 1e-5 * scores.abs().amax().clamp(min=1)
    if exact:
        wrong = wrong | (found != expected)
    ordered = index.sort(2).values
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(2)
    rows = int((wrong.any(2) | twice).sum())
    agreement = (found == expected).double().mean().item() if found.numel() else 1.0
    return {"status": "ok" if rows == 0 else f"failed: {rows} rows are wrong", "agreement": agreement}


def check_search(problem: Problem, metric: str, own: bool) -> dict:
    from kernels import cuda

    N, M = problem.query.shape[1], problem.key.shape[1]
    # As the last tokens of an image: not in the first tile only.
    self_index = torch.arange(N, device=problem.query.device) + (M - N) if own else None
    index = cuda.find_neighbors(problem.query, problem.key, problem.K, metric, None, self_index)
    scores = reference.all_scores(problem.query.double(), problem.key.double(), metric)
    if own:
        if not torch.equal(index[:, :, 0], self_index.expand(len(index), -1)):
            return {"status": "failed: the token itself is not first"}
        scores.scatter_(2, self_index.view(1, N, 1).expand(len(index), -1, 1), -1e9)
    return check_neighbors(index, scores, forced=int(own))


def check_scored_search(problem: Problem) -> dict:
    from kernels import cuda

    index, products = cuda.find_scored_neighbors(problem.query, problem.key, problem.K, None, None)
    scores = problem.query.double() @ problem.key.double().mT
    error = error_of(products, scores.gather(2, index))
    found = check_neighbors(index, scores)
    return found | {"error": error} | ({"status": "failed: products"} if error > 1 else {})


def check_ties(dtype: torch.dtype, device: str, keys: int = 300) -> dict:
    """Equal scores: whole numbers, which have the same products in any order of sums, and blank images."""
    from kernels import cuda

    query, key = torch.randint(-2, 3, (1, 40, 12), device=device), torch.randint(-2, 3, (1, keys, 12), device=device)
    key[:, keys // 2 :] = 1
    query, key = query.to(dtype), key.to(dtype)
    index = cuda.find_neighbors(query, key, 9, "matmul", None, None)
    return check_neighbors(index, query.double() @ key.double().mT, exact=True)


def check_nan(dtype: torch.dtype, device: str) -> dict:
    """NaN ranks above infinity, and of equal scores the smallest key wins."""
    from kernels import cuda

    key = torch.zeros(1, 90, 1, device=device)
    key[0, [7, 40, 80]], key[0, [11, 70]] = torch.inf, torch.nan
    index = cuda.find_neighbors(torch.ones(1, 5, 1, device=device, dtype=dtype), key.to(dtype), 9, "matmul", None, None)
    expected = [11, 70, 7, 40, 80, 0, 1, 2, 3]
    return {"status": "ok" if index.cpu().eq(torch.tensor(expected)).all() else f"failed: found {index[0, 0].tolist()}"}


def check_largest(problem: Problem) -> dict:
    """Compare the largest neighbors and their rows, among equal ones that of the first slot, exactly."""
    from kernels import cuda

    largest, row = cuda.max_neighbors(problem.key, problem.index)
    slots = reference.gather(problem.key, problem.index)  # (B, N, K, C)
    expected = slots.amax(2)
    rank = torch.arange(problem.K, 0, -1, device=slots.device)[:, None]
    first = ((slots == expected[:, :, None]) * rank).argmax(2)  # `max` on CUDA may return another one
    same = torch.equal(largest, expected) and torch.equal(row, problem.index.gather(2, first).int())
    return {"status": "ok" if same else "failed: another maximum"}


def check_sums(compute: Callable, plain: Callable, *tensors: Tensor | None) -> dict:
    """Compare tensors that a kernel computes with the plain form's on the same numbers in float64."""
    found = compute()
    expected = plain(*(x if x is None or not x.is_floating_point() else x.double() for x in tensors))
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    error = max(error_of(one, other.detach()) for one, other in zip(found, expected, strict=True))
    return {"status": "ok" if error <= 1 else "failed: not the plain form's numbers", "error": error}


def check_gradients(compute: Callable, plain: Callable, grad: Tensor, *tensors: Tensor) -> dict:
    """Compare gradients of `plain` at these tensors with autograd's in float64."""

    def gradients(grad: Tensor, *inputs: Tensor):
        inputs = [x.requires_grad_() for x in inputs]
        with torch.enable_grad():
            return torch.autograd.grad(plain(*inputs), inputs, grad)

    return check_sums(compute, gradients, grad, *(x.clone() for x in tensors))


def sums(p: Problem) -> dict[str, Callable[[], dict]]:
    """Cases of the kernels that score and aggregate, forward and backward."""
    from kernels import cuda

    found = {"largest neighbor": lambda: check_largest(p)}
    for squared, name in ((False, "pair scores"), (True, "squared distances")):
        plain = functools.partial(reference.pair_scores, index=p.index, squared_distance=squared)
        forward = functools.partial(cuda.pair_scores, p.query, p.key, p.index, squared)
        backward = functools.partial(cuda.pair_scores_backward, p.pairs, p.query, p.key, p.index, squared)
        found[name] = functools.partial(check_sums, forward, plain, p.query, p.key)
        found[f"{name}, backward"] = functools.partial(check_gradients, backward, plain, p.pairs, p.query, p.key)

    def weighted(values: Tensor, weights: Tensor) -> Tensor:
        return reference.weighted_sum(values, p.index, weights)

    forward = functools.partial(cuda.weighted_sum, p.key, p.index, p.pairs)
    backward = functools.partial(cuda.weighted_sum_backward, p.rows, p.key, p.index, p.pairs)
    found["weighted sum"] = functools.partial(check_sums, forward, weighted, p.key, p.pairs)
    found["weighted sum, backward"] = functools.partial(check_gradients, backward, weighted, p.rows, p.key, p.pairs)
    for depthwise, weight, grad in ((True, p.depthwise, p.rows), (False, p.standard, p.wide)):

        def plain(values: Tensor, weight: Tensor, scores: Tensor, depthwise: bool = depthwise) -> Tensor:
            return reference.aggregate(values, p.index, weight, scores, depthwise)

        name = f"{'depthwise' if depthwise else 'standard'} convolution"
        given = p.key, p.index, weight, p.pairs, depthwise
        forward = functools.partial(cuda.aggregate, *given)
        backward = functools.partial(cuda.aggregate_backward, grad, *given, True)
        found[name] = functools.partial(check_sums, forward, plain, p.key, weight, p.pairs)
        found[f"{name}, backward"] = functools.partial(check_gradients, backward, plain, grad, p.key, weight, p.pairs)
    return found


def check_attention(p: Problem, is_weighted: bool) -> dict:
    """Compare attention as one operator, forward and backward, with the plain form on the keys that it chose."""
    from kernels import cuda

    query, key, grad = (x[:, None] for x in (p.query, p.key, p.rows))  # one head
    weight = p.depthwise.t()[:, None].contiguous() if is_weighted else None
    output, index, weights = cuda.neighbor_attention(query, key, key, weight, p.K, 3.0)
    found = check_neighbors(index, p.query.double() @ p.key.double().mT)
    if found["status"] != "ok":
        return found

    def plain(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
        return attention.mixed_pairs(query, key, value, weight, index, 3.0)

    def backward() -> tuple[Tensor, ...]:
        *rows, to_weight = cuda.neighbor_attention_backward(grad, query, key, key, weight, index, weights, 3.0)
        return *rows, *([to_weight.t()[:, None]] if is_weighted else [])

    given = query, key, key, *([weight] if is_weighted else [])
    forward, slopes = check_sums(lambda: output, plain, *given), check_gradients(backward, plain, grad, *given)
    return found | max(forward, slopes, key=lambda row: row["error"])


def in_order(check: Callable[[], dict]) -> dict:
    """Check with the sums of `--deterministic`."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return check()
    finally:
        torch.use_deterministic_algorithms(False)


def with_resources(check: Callable[[], dict]) -> dict:
    """Check, and add registers, spilled registers and shared memory of the kernels that ran; spills are an error."""
    with compiled_kernels() as compiled:
        row = check()
    used = resources(compiled)
    if used.get("spills") and row.get("status", "ok") == "ok":
        row = row | {"status": f"spills {used['spills']} registers"}
    return row | used


def cases_of(size: Size, dtype: torch.dtype, device: str) -> dict[str, Callable[[], dict]]:
    """Name -> check of every kernel at this size."""
    p = Problem(size, dtype, device)
    found = {"scored search": functools.partial(check_scored_search, p)}
    for metric in METRICS:
        found[f"search, {metric}"] = functools.partial(check_search, p, metric, False)
    if 1 < size.K and size.N <= size.M:
        found["search, cosine, own first"] = functools.partial(check_search, p, "cosine", True)
    checks = {f"attention{kind}": functools.partial(check_attention, p, bool(kind)) for kind in ("", " with slots")}
    found |= checks | {f"{name}, in order": functools.partial(in_order, check) for name, check in checks.items()}
    for name, check in sums(p).items():
        found[name] = check
        if "backward" in name:
            found[f"{name}, in order"] = functools.partial(in_order, check)
    kind = str(dtype).removeprefix("torch.")
    return {f"{name}, {kind}, {size}": functools.partial(with_resources, check) for name, check in found.items()}


def check(part: Part) -> None:
    """Check this shard's sizes; the interpreter computes bfloat16 wrongly, so it is left out there."""
    dtypes = [torch.float32] if is_interpreted() else [torch.bfloat16, torch.float32]
    kinds = [(size, dtype) for dtype in dtypes for size in (SMALL if part.small else SIZES)]
    cases = {}
    with full_precision():
        for size, dtype in kinds[part.shard :: part.shards]:
            cases |= cases_of(size, dtype, part.device)
        if part.shard == 0:
            for dtype in dtypes:
                for name, special in (("ties", check_ties), ("NaN", check_nan)):
                    kind = str(dtype).removeprefix("torch.")
                    cases[f"{name}, {kind}"] = functools.partial(with_resources, functools.partial(special, dtype, part.device))
        part.run(cases)
