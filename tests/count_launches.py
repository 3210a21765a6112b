"""Kernels that one call of each operator launches, chunked and in Triton: `PYTHONPATH=. python tests/count_launches.py`.

Counted on fake CUDA tensors: each operator of PyTorch that computes as one launch (a sort is several), each kernel as one.
"""

from __future__ import annotations

import torch
from compiled_cuda import launches
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunked, cuda

# Of operators that only make, view or describe tensors, and launch nothing.
QUIET = {"empty", "empty_like", "new_empty", "detach", "_unsafe_view", "promote_types"}
# Name: groups (images x heads), tokens, channels of a token, output channels (0: depthwise), neighbors, scored
LAYERS = {
    "ViT-Tiny, 197 tokens, batch 256": (768, 197, 64, 0, 9, True),
    "1,024 tokens, batch 32": (96, 1024, 64, 0, 9, True),
    "4,096 tokens, batch 8": (24, 4096, 64, 0, 9, True),
    "AllConvNet, layer 1, batch 128": (128, 256, 12, 128, 9, False),
    "AllConvNet, layer 2": (128, 256, 128, 256, 9, False),
    "AllConvNet, layer 3": (128, 256, 256, 512, 9, False),
    "AllConvNet, layer 4": (128, 256, 512, 1024, 9, False),
    "AllConvNet, layer 5": (128, 256, 1024, 2048, 9, False),
}


class Counter(TorchDispatchMode):
    """Counts operators that compute something."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        self.count += namespace == "aten" and not function.is_view and name not in QUIET
        return function(*args, **(kwargs or {}))


def count(backend, layer: tuple) -> tuple[int, int]:
    """Launches of the operators of one layer, forward and backward."""
    G, N, C, D, K, scored = layer

    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    x, index, scores = new(G, N, C), new(G, N, K, dtype=torch.long), new(G, N, K, dtype=torch.float32) if scored else None
    weight, grad = (new(D, K * C), new(G, N, D)) if D else (new(K, C), x)
    if scored:
        search = backend.find_scored_neighbors, x, x, K, None, None
    else:
        search = backend.find_neighbors, x, x, K, "cosine", None, new(N, dtype=torch.long)
    forward = [search, (backend.aggregate, x, index, weight, scores, not D)]
    backward = [(backend.aggregate_backward, grad, x, index, weight, scores, not D, True)]
    if scored:
        backward.append((backend.pair_scores_backward, scores, x, x, index, False))
    found = []
    for calls in (forward, backward):
        with Counter() as counter:
            triton = sum(len(launches(*call)[1]) for call in calls)
        found.append(counter.count + triton)
    return tuple(found)


def main() -> None:
    torch._C._ensureCUDADeviceGuardSet()
    print("| layer | chunked: forward | backward | Triton: forward | backward | in order |\n|---|---:|---:|---:|---:|---:|")
    for name, layer in LAYERS.items():
        found = []
        for backend, in_order in ((chunked, False), (cuda, False), (cuda, True)):
            torch.use_deterministic_algorithms(in_order)
            with FakeTensorMode():
                found += count(backend, layer)
        print(f"| {name} | {' | '.join(f'{n:,}' for n in found[:4])} | {found[5]:,} |")


if __name__ == "__main__":
    main()
