"""Compiles what `kernels/cuda.py` launches, on a machine without a GPU: `PYTHONPATH=. python tests/compiled_cuda.py` prints the
table of registers of docs/gpu.md.

The functions run on fake CUDA tensors; what they would launch is written down, with its tile sizes and the properties of its
arguments that Triton compiles for, instead of launched.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import cuda, triton_common

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


def launches(function, *arguments):
    """What a function of `kernels.cuda` returns for fake tensors, and its launches: (kernel, arguments, options) each."""
    found = []
    original = triton_common.launch
    triton_common.launch = lambda kernel, grid, *arguments, device, **options: found.append((kernel, arguments, options))
    try:
        output = function(*arguments)
    finally:
        triton_common.launch = original
    return output, found


def _argument(value):
    """Type and properties of one argument, as the runtime would specialise on them."""
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
    if value is None or value == 1:
        return "constexpr", []
    return "i32" if abs(value) < 2**31 else "i64", [["tt.divisibility", 16]] if value % 16 == 0 else []


def source(kernel, arguments, options):
    """Source and options of the compiler for one launch."""
    names = kernel.arg_names
    signature, constants, properties = {}, {}, {}
    for place, value in enumerate(arguments):
        if isinstance(value, tuple) and value[0] is not None:
            kinds = [_argument(part) for part in value]
            signature[names[place]] = tuple(kind for kind, _ in kinds)
            constants |= {(place, part): value[part] for part, (kind, _) in enumerate(kinds) if kind == "constexpr"}
            properties |= {(place, part): kind[1] for part, kind in enumerate(kinds) if kind[1]}
            continue
        signature[names[place]], attributes = _argument(value)
        if signature[names[place]] == "constexpr":
            constants[(place,)] = value
        if attributes:
            properties[(place,)] = attributes
    options = dict(options)
    for place, name in enumerate(names):
        if name in options:
            signature[name], constants[(place,)] = "constexpr", options.pop(name)
    assert list(signature) == names, (names, list(signature))
    return ASTSource(kernel, signature, constants, properties), triton_common.COMPILATION | options


def resources(kernel, arguments, options, architecture):
    """Registers and bytes of stack of one thread, and bytes of shared memory, compiled for sm_`architecture`."""
    code, options = source(kernel, arguments, options)
    compiled = triton.compile(code, target=GPUTarget("cuda", architecture, 32), options=options)
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        printed = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def cases():
    """Name -> function and arguments: what the layers ask for. Fake tensors, to be made under FakeTensorMode."""
    G, N, C, D = 768, 197, 64, 256

    def rows(dtype, tokens=N, channels=C):
        return torch.empty(G, tokens, channels, dtype=dtype, device="cuda")

    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, wide = rows(dtype), rows(dtype, 256, D)
        kind = NAMES[dtype]
        for K in (9, 16, 32, 64):
            found[f"search, {kind}, K {K}"] = cuda.find_scored_neighbors, (x, x, K, None, None)
        own, some = (torch.empty(n, dtype=torch.long, device="cuda") for n in (256, 32))
        found[f"search, cosine, own first, {D} channels, {kind}, K 9"] = (
            cuda.find_neighbors,
            (wide, wide, 9, "cosine", None, own),
        )
        found[f"search, euclidean, candidates, {kind}, K 9"] = cuda.find_neighbors, (x, x, 9, "euclidean", some, None)
        for K in (9, 16):
            index = torch.empty(G, N, K, dtype=torch.long, device="cuda")
            weights = torch.empty(G, N, K, device="cuda")
            depthwise = torch.empty(K, C, dtype=dtype, device="cuda")
            for squared in (False, True):
                name = f"pair scores{', squared distance' if squared else ''}, {kind}, K {K}"
                found[name] = cuda.pair_scores, (x, x, index, squared)
                found[name + ", backward"] = cuda.pair_scores_backward, (weights, x, x, index, squared)
            found[f"weighted sum, {kind}, K {K}"] = cuda.weighted_sum, (x, index, weights)
            found[f"weighted sum, {kind}, K {K}, backward"] = cuda.weighted_sum_backward, (x, x, index, weights)
            found[f"depthwise, {kind}, K {K}"] = cuda.aggregate, (x, index, depthwise, weights, True)
            found[f"depthwise, {kind}, K {K}, backward"] = (
                cuda.aggregate_backward,
                (x, x, index, depthwise, weights, True, True),
            )
            for scores in (None, weights):
                name = f"standard{', scores' if scores is not None else ''}, {kind}, K {K}"
                weight = torch.empty(128, K * C, dtype=dtype, device="cuda")
                found[name] = cuda.aggregate, (x, index, weight, scores, False)
                grad = rows(dtype, N, 128)
                found[name + ", backward"] = cuda.aggregate_backward, (grad, x, index, weight, scores, False, True)
    return found


def table(architectures=ARCHITECTURES, only=""):
    torch._C._ensureCUDADeviceGuardSet()
    for in_order in (False, True):
        torch.use_deterministic_algorithms(in_order)
        with FakeTensorMode():
            for name, (function, arguments) in cases().items():
                if only not in name:
                    continue
                for kernel, given, options in launches(function, *arguments)[1]:
                    found = [resources(kernel, given, options, a) for a in architectures]
                    print(
                        name, kernel.__name__, *found, in_order, {k: v for k, v in options.items() if k not in "KC"}, flush=True
                    )


if __name__ == "__main__":
    table(only=sys.argv[1] if len(sys.argv) > 1 else "")
