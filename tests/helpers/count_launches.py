"""Kernels that the operators of one layer launch, and the bytes they move: `python -m tests.helpers.count_launches`.

Counted on fake CUDA tensors: each operator of PyTorch that computes as one launch (a sort is several), each Triton kernel as
one. Bytes are those of all tensors that a launch is given or returns, each once; what a kernel gathers again comes on top.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import chunked, cuda
from tests.helpers.compiled_cuda import launches

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
    """Counts operators that compute something, and the bytes of their tensors."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def add(self, *tensors) -> None:
        self.count += 1
        self.bytes += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and not function.is_view and name not in QUIET:
            self.add(*tree_leaves((args, kwargs, output)))
        return output


def count(backend, layer: tuple) -> tuple[int, int, int]:
    """Launches of the operators of one layer, forward and backward, and bytes of both together."""
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
    found, moved = [], 0
    for calls in (forward, backward):
        with Counter() as counter:
            for call in calls:
                for _, given, _ in launches(*call)[1]:
                    counter.add(*given)
        found.append(counter.count)
        moved += counter.bytes
    return *found, moved


def main() -> None:
    torch._C._ensureCUDADeviceGuardSet()
    heads = [f"{name}: forward | backward | GB" for name in ("chunked", "Triton", "Triton in order")]
    print(f"| layer | {' | '.join(heads)} |\n|---|{'---:|' * 9}")
    for name, layer in LAYERS.items():
        cells = []
        for backend, in_order in ((chunked, False), (cuda, False), (cuda, True)):
            torch.use_deterministic_algorithms(in_order)
            with FakeTensorMode():
                forward, backward, moved = count(backend, layer)
            cells.append(f"{forward:,} | {backward:,} | {moved / 1e9:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
