"""The Triton kernels on a machine without a GPU: interpreted, compiled, and their functions on fake CUDA tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA only")

from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import cuda
from tests.helpers.compiled_cuda import ARCHITECTURES, TOOLS, all_launches, compile_launch, launches, resources

HERE = Path(__file__).parent
SHAPES = 3, 20, 30, 8, 12, 5  # B, N, M, C, D, K
# Of each kernel the configurations with the most registers; tests/helpers/compiled_cuda.py prints those of all.
HEAVIEST = [
    "search_kernel: search, bf16, C 64, K 16",
    "search_kernel: search, fp32, C 64, K 32",
    "search_kernel: search, euclidean, own first, candidates, bf16, C 64, K 9",
    "key_terms_kernel: search, cosine, own first, bf16, C 256, K 9",
    "pair_kernel: depthwise backward, fp32, C 64, K 16",
    "gather_max_kernel: largest neighbor, fp32, C 64, K 16",
    "gather_sum_kernel: squared distances backward, fp32, C 64, K 16",
    "spread_atomic_kernel: squared distances backward, fp32, C 64, K 16",
    "spread_sorted_kernel: squared distances backward, fp32, C 64, K 16",
    "mix_kernel: attention, fp32, C 64, K 16",
    "mix_rows_grad_kernel: attention backward, fp32, C 256, K 9",
    "mix_tokens_grad_kernel: attention backward, fp32, C 64, K 16",
    "depthwise_weight_grad_kernel: depthwise backward, bf16, C 64, K 9",
    "weight_grad_kernel: standard with scores backward, bf16, C 256, K 9, D 512",
    "convolution_kernel: standard, bf16, C 256, K 9, D 512",
    "rows_grad_kernel: standard with scores backward, bf16, C 64, K 9, D 64",
    "rows_grad_kernel: standard with scores backward, fp32, C 256, K 9, D 512",
    "search_kernel: search, cosine, own first, fp32, C 256, K 9",  # Triton 3.6 has spilled
]


def test_kernels_under_the_interpreter():
    """In a process of its own, as Triton reads the variable when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent.parent)}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted_cuda.py")]
    run = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout


# --- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists(), reason="Triton without ptxas, cuobjdump"
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    every = all_launches()
    for name in HEAVIEST if architecture == 90 else HEAVIEST[::4]:
        registers, stack, shared = resources(compile_launch(*every[name], architecture))
        assert stack == 0 and registers <= 168, name
        assert shared <= 99 * 1024, name  # what any of them has


def test_every_kernel_is_compiled():
    assert {name.split(":")[0] for name in HEAVIEST} == {name.split(":")[0] for name in all_launches()}


# --- fake tensors ---------------------------------------------------------------------------------------------------


def calls(dtype):
    """Every operator with its arguments, and the shapes and types of what it returns."""
    B, N, M, C, D, K = SHAPES

    def new(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    query, key, index = new(B, N, C), new(B, M, C), new(B, N, K, dtype=torch.long)
    pairs, own, some = new(B, N, K, dtype=torch.float32), new(N, dtype=torch.long), new(9, dtype=torch.long)
    indices, numbers = ((B, N, K), torch.long), ((B, N, K), torch.float32)
    rows, keys = ((B, N, C), dtype), ((B, M, C), dtype)
    for metric in ("cosine", "euclidean", "matmul"):
        for candidates in (None, some):
            for self_index in (None, own):
                yield cuda.find_neighbors, (query, key, K, metric, candidates, self_index), [indices]
    for self_index, k in ((None, K), (own, K), (own, 1)):
        expected = [((B, N, k), torch.long), ((B, N, k), torch.float32)]
        yield cuda.find_scored_neighbors, (query, key, k, None, self_index), expected
    for squared in (False, True):
        yield cuda.pair_scores, (query, key, index, squared), [numbers]
        yield cuda.pair_scores_backward, (pairs, query, key, index, squared), [rows, keys]
    yield cuda.weighted_sum, (key, index, pairs), [rows]
    yield cuda.weighted_sum, (key.mT.contiguous().mT, index[:1].expand(B, -1, -1), pairs.to(dtype)), [rows]
    yield cuda.weighted_sum_backward, (query, key, index, pairs.to(dtype)), [keys, ((B, N, K), dtype)]
    yield cuda.max_neighbors, (key, index), [rows, ((B, N, C), torch.int32)]
    one, other, grad = (new(B, rows, 2, C).transpose(1, 2) for rows in (N, M, N))
    index2, pairs2 = new(2 * B, N, K, dtype=torch.long), new(2 * B, N, K, dtype=torch.float32)
    found = [((B, 2, N, C), dtype), ((2 * B, N, K), torch.long), ((2 * B, N, K), torch.float32)]
    grads = [((B, 2, N, C), dtype), *[((B, 2, M, C), dtype)] * 2]
    for weight, shape in ((None, (0,)), (new(C, 1, K), (K, C))):
        yield cuda.neighbor_attention, (one, other, other, weight, K, 2.0), found
        given = grad, one, other, other, weight, index2, pairs2, 2.0
        yield cuda.neighbor_attention_backward, given, [*grads, (shape, dtype)]
    for depthwise in (True, False):
        weight, out = (new(K, C), C) if depthwise else (new(D, K * C), D)
        for scores in (None, pairs):
            yield cuda.aggregate, (key, index, weight, scores, depthwise), [((B, N, out), dtype)]
            for need_values in (True, False):
                expected = [
                    keys if need_values else ((0,), dtype),
                    (tuple(weight.shape), dtype),
                    ((0,), torch.float32) if scores is None else numbers,
                ]
                given = new(B, N, out), key, index, weight, scores, depthwise, need_values
                yield cuda.aggregate_backward, given, expected


@pytest.mark.parametrize("in_order", [False, True], ids=["atomic", "in order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_stay_on_the_device(dtype, in_order, monkeypatch):
    """No tensor is made or read elsewhere, and no value of one is asked for, at which fake tensors raise."""
    torch._C._ensureCUDADeviceGuardSet()
    torch.use_deterministic_algorithms(in_order)
    monkeypatch.setattr("kernels.triton_convolution.ORDERED_ELEMENTS", 1)
    try:
        with FakeTensorMode():
            for function, arguments, expected in calls(dtype):
                found, launched = launches(function, *arguments)
                found = found if isinstance(found, tuple) else (found,)
                assert [(tuple(x.shape), x.dtype) for x in found] == expected, function.__name__
                assert all(x.is_cuda and (x.transpose(1, 2) if x.ndim == 4 else x).is_contiguous() for x in found)
                tensors = [x for _, given, _ in launched for x in given if isinstance(x, torch.Tensor)]
                assert all(x.is_cuda for x in tensors)
                assert launched or function is cuda.find_neighbors
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_covered():
    B, N, M, C, _, K = SHAPES
    torch._C._ensureCUDADeviceGuardSet()
    with FakeTensorMode():
        x, index = torch.empty(B, M, C, device="cuda"), torch.empty(B, N, K, dtype=torch.long, device="cuda")
        pairs, weight = torch.empty(B, N, K, device="cuda"), torch.empty(K, C, device="cuda")
        assert cuda.covers_search(x, x, 64) and cuda.covers_pairs(x, x, index)
        assert cuda.covers_weighted_sum(x, index, pairs) and cuda.covers_aggregate(x, index, weight, pairs)
        assert cuda.covers_weighted_sum(x.half(), index, pairs) and cuda.covers_aggregate(x, index, weight, None)
        assert not cuda.covers_search(x, x, 65)
        assert not cuda.covers_pairs(x, x, index.repeat(1, 1, 13))  # K of 65
        for other in (x.double(), x.int(), x[:0], x.cpu()):
            assert not cuda.covers_search(other, other, K)
            assert not cuda.covers_pairs(other, other, index)
            assert not cuda.covers_weighted_sum(other, index, pairs)
            assert not cuda.covers_aggregate(other, index, weight.to(other.dtype), pairs)
        assert not cuda.covers_search(x, x.half(), K) and not cuda.covers_pairs(x, x.half(), index)
        assert not cuda.covers_aggregate(x, index, weight.half(), pairs)
        assert not cuda.covers_aggregate(x, index, weight, pairs.double())
        assert not cuda.covers_weighted_sum(x, index, pairs.double())
        large = torch.empty(1, 2**16, 2**15 + 8, device="cuda")
        assert not cuda.covers_search(large, large, K)
        many = torch.empty(2**17, 2**11, 1, device="cuda")
        assert not cuda.covers_search(many, many, 8) and cuda.covers_search(many, many, 7)
