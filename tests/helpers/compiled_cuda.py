"""Launches of `kernels/cuda.py`, found on fake CUDA tensors and compiled on a machine without a GPU.

`python -m tests.helpers.compiled_cuda` prints the table of registers that docs/dev/gpu.md holds (about 4 minutes).
"""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import cuda, triton_common

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


def launches(function: Callable, *arguments) -> tuple[object, list]:
    """Return the output of a function of `kernels.cuda` for fake tensors, and (kernel, arguments, options) of its launches."""
    found, launch = [], triton_common.launch
    triton_common.launch = lambda kernel, grid, *given, device, **options: found.append((kernel, given, options))
    try:
        return function(*arguments), found
    finally:
        triton_common.launch = launch


def _kind(value) -> tuple[str, list]:
    """Type of one argument, and what the runtime would tell the compiler of its value."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
    if value is None or value == 1:
        return "constexpr", []
    return "i32" if abs(value) < 2**31 else "i64", [["tt.divisibility", 16]] if value % 16 == 0 else []


def compile_launch(kernel, given: tuple, options: dict, architecture: int):
    """The kernel of one launch for sm_`architecture`, as the runtime would compile it for these arguments."""
    signature, constants, properties = {}, {}, {}
    options = triton_common.COMPILATION | options
    for place, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name], constants[(place,)] = "constexpr", options.pop(name)
            continue
        parts = given[place] if isinstance(given[place], tuple) else (given[place],)
        kinds = [_kind(part) for part in parts]
        for part, (kind, attributes) in enumerate(kinds):
            path = (place, part) if isinstance(given[place], tuple) else (place,)
            if kind == "constexpr":
                constants[path] = parts[part]
            if attributes:
                properties[path] = attributes
        signature[name] = tuple(kind for kind, _ in kinds) if isinstance(given[place], tuple) else kinds[0][0]
    source = ASTSource(kernel, signature, constants, properties)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled) -> tuple[int, int, int]:
    """Registers and bytes of stack of a thread, bytes of shared memory of a block."""
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        printed = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def cases() -> dict[str, tuple]:
    """Name -> function and arguments of calls as the layers make them; to be made under FakeTensorMode."""
    G, N = 64, 197

    def new(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    found = {}
    own, some = new(N, dtype=torch.long), new(40, dtype=torch.long)
    for dtype in (torch.bfloat16, torch.float32):
        kind = TYPES[dtype]
        for C, K in ((64, 9), (64, 16), (64, 32), (64, 64), (128, 16), (256, 16)):
            x = new(G, N, C, dtype=dtype)
            found[f"search, {kind}, C {C}, K {K}"] = cuda.find_scored_neighbors, x, x, K, None, None
        found[f"search, cosine, own first, {kind}, C 256, K 9"] = cuda.find_neighbors, x, x, 9, "cosine", None, own
        x = new(G, N, 64, dtype=dtype)
        found[f"search, euclidean, own first, candidates, {kind}, C 64, K 9"] = (
            cuda.find_neighbors,
            x,
            x,
            9,
            "euclidean",
            some,
            own,
        )
        for C, D, K in ((64, 64, 9), (64, 64, 16), (256, 512, 9)):
            x, grad = new(G, N, C, dtype=dtype), new(G, N, D, dtype=dtype)
            index, scores = new(G, N, K, dtype=torch.long), new(G, N, K)
            size = f"{kind}, C {C}, K {K}"
            for squared in (False, True):
                name = "squared distances" if squared else "pair scores"
                found[f"{name}, {size}"] = cuda.pair_scores, x, x, index, squared
                found[f"{name} backward, {size}"] = cuda.pair_scores_backward, scores, x, x, index, squared
            found[f"weighted sum, {size}"] = cuda.weighted_sum, x, index, scores
            found[f"largest neighbor, {size}"] = cuda.max_neighbors, x, index
            weight = new(K, C, dtype=dtype)
            found[f"depthwise, {size}"] = cuda.aggregate, x, index, weight, scores, True
            found[f"depthwise backward, {size}"] = cuda.aggregate_backward, x, x, index, weight, scores, True, True
            weight = new(D, K * C, dtype=dtype)
            for name, given in (("standard", None), ("standard with scores", scores)):
                given = index, weight, given, False
                found[f"{name}, {size}, D {D}"] = cuda.aggregate, x, *given
                found[f"{name} backward, {size}, D {D}"] = cuda.aggregate_backward, grad, x, *given, True
                if dtype == torch.float32:
                    found[f"{name}, TF32, {size}, D {D}"] = tf32, cuda.aggregate, x, *given
                    found[f"{name} backward, TF32, {size}, D {D}"] = tf32, cuda.aggregate_backward, grad, x, *given, True
    return found


def tf32(function: Callable, *arguments):
    """With products of float32 in TF32, as a user may allow them."""
    torch.set_float32_matmul_precision("high")
    try:
        return function(*arguments)
    finally:
        torch.set_float32_matmul_precision("highest")


@functools.cache
def all_launches() -> dict[str, tuple]:
    """Name -> launch, in the atomic and the deterministic form; each once."""
    torch._C._ensureCUDADeviceGuardSet()
    found = {}
    for in_order in (False, True):
        torch.use_deterministic_algorithms(in_order)
        with FakeTensorMode():
            for name, (function, *arguments) in cases().items():
                for launch in launches(function, *arguments)[1]:
                    found.setdefault(f"{launch[0].__name__.strip('_')}: {name}", launch)
    torch.use_deterministic_algorithms(False)
    return found


def main() -> None:
    rows = {}
    for name, launch in all_launches().items():
        dtype = next(kind for kind in ("TF32", "bf16", "fp32") if kind in name)
        found = [resources(compile_launch(*launch, architecture)) for architecture in ARCHITECTURES]
        if any(stack for _, stack, _ in found):
            print(f"{name}: spills, {found}", file=sys.stderr)
        rows.setdefault((name.split(":")[0], dtype), []).append(found)
    columns = " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    print(f"| kernel | inputs | configurations | {columns} | shared memory, KB |")
    print(f"|---|---|---:|{'---:|' * len(ARCHITECTURES)}---:|")
    for (kernel, dtype), found in rows.items():
        spread = [sorted(one[a][0] for one in found) for a in range(len(ARCHITECTURES))]
        cells = " | ".join(f"{least[0]} to {least[-1]}" if least[0] < least[-1] else f"{least[0]}" for least in spread)
        memory = max(shared for one in found for _, _, shared in one) / 1024
        print(f"| `{kernel}` | {dtype} | {len(found)} | {cells} | {memory:.1f} |")


if __name__ == "__main__":
    main()
