"""First contact, part `time`: layers against attention in bfloat16, every kernel alone, and the targets.

Layers compute forward and backward with their projections, parameters and inputs in bfloat16, in eager mode and as a CUDA
graph, which leaves out the time of the host. All layers of a size are measured in turns. Without a GPU the eager layers alone
are measured, in float32 on smaller batches and without the longest sequence.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.gpu_parts import Part, full_precision
from layers1d import MultiHeadAttention, MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import ConvNN2d
from options.neighbors import NeighborConfig
from runs.measure import median_ms, take_turns

WIDTH, HEADS, K = 192, 3, 9
REPEATS, CALLS = 7, 10  # measurements of each, and calls in a measurement, so that waiting for the device counts little


class Size(NamedTuple):
    """Batch and tokens of the layers, and the largest allowed ratios to attention under CUDA graphs."""

    B: int
    N: int
    convnn: float
    kvt: float | None = None


SIZES = [Size(256, 197, 1.5, 1.2), Size(32, 1024, 1.0), Size(8, 4096, 0.5)]
CONVOLUTION = 1.6  # ConvNN2d, 16 x 16, 256 -> 512, B = 128, to Conv2d of equal FLOPs


def make_step(layer: nn.Module, x: Tensor, attention: SDPBackend | None = None) -> Callable[[], None]:
    """Return forward and backward of a layer: gradients of the input and of all parameters, newly allocated in each call."""
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    grad = torch.randn_like(layer(x))

    def step() -> None:
        if attention is None:
            out = layer(x)
        else:
            with sdpa_kernel(attention):
                out = layer(x)
        torch.autograd.grad(out, inputs, grad)

    return step


def as_graph(step: Callable[[], object]) -> Callable[[], None]:
    """Record a call as a CUDA graph; return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels, makes tables
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def repeated(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()


def placement(part: Part) -> dict:
    """Return device and dtype of all layers and inputs; CPUs without bfloat16 products would take minutes."""
    return {"device": part.device, "dtype": torch.bfloat16 if part.device == "cuda" else torch.float32}


def measure(part: Part, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each function, measured in turns."""
    repeats, calls = (1, 1) if part.device == "cpu" else (REPEATS, CALLS)
    tasks = [functools.partial(repeated, function, calls) for function in functions.values()]
    seconds = take_turns(tasks, repeats, torch.device(part.device))
    return {name: median_ms(found) / calls for name, found in zip(functions, seconds, strict=True)}


def attempt(part: Part, name: str, make: Callable[[], Callable], found: dict[str, Callable]) -> None:
    """Put `make()` among the found functions if it runs; else add a row that says why not."""
    try:
        function = make()
        function()
        found[name] = function
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        part.add(name, f"failed: {reason}")


def layer_steps(part: Part, B: int, N: int) -> dict[str, Callable[[], Callable]]:
    """Name -> function that makes a training step, of attention by each backend and of the layers of ours."""
    new = functools.partial(torch.randn, B, N, WIDTH, **placement(part))
    attention = {"attention": None}
    if part.device == "cuda":
        attention = {"attention (cuDNN)": SDPBackend.CUDNN_ATTENTION, "attention (Flash)": SDPBackend.FLASH_ATTENTION}
    layers = {name: (MultiHeadAttention(WIDTH, HEADS), kind) for name, kind in attention.items()}
    layers["ConvNN attention"] = MultiHeadConvNNAttention(WIDTH, HEADS, NeighborConfig(K=K, magnitude_type="matmul")), None
    layers["KVT"] = MultiHeadKvtAttention(WIDTH, HEADS, K), None
    return {
        name: functools.partial(make_step, layer.to(**placement(part)), new(), kind) for name, (layer, kind) in layers.items()
    }


def convolution_steps(part: Part, B: int) -> dict[str, Callable[[], Callable]]:
    new = functools.partial(torch.randn, B, 256, 16, 16, **placement(part))
    layers = {"Conv2d": nn.Conv2d(256, 512, 3, padding=1), "ConvNN2d": ConvNN2d(256, 512, NeighborConfig(K=K))}
    return {name: functools.partial(make_step, layer.to(**placement(part)), new()) for name, layer in layers.items()}


def time_layers(part: Part, name: str, steps: dict[str, Callable], B: int) -> dict[str, float]:
    """Add a row for each layer, eager and as a graph; return milliseconds by `layer, execution`."""
    functions: dict[str, Callable] = {}
    for layer, make in steps.items():
        attempt(part, f"{layer}, eager", make, functions)
    if part.device == "cuda":
        for layer in list(functions):
            attempt(part, layer.replace("eager", "graph"), functools.partial(as_graph, functions[layer]), functions)
    found = measure(part, functions)
    for layer, ms in found.items():
        part.add(f"{name}, {layer}", "ok", batch=B, ms=ms)
    return found


def time_size(part: Part, size: Size) -> None:
    B = size.B if part.device == "cuda" else max(1, size.B // 64)
    name = f"N {size.N}"
    found = time_layers(part, name, layer_steps(part, B, size.N), B)
    attention = [ms for layer, ms in found.items() if layer.startswith("attention") and layer.endswith("graph")]
    ours = found.get("ConvNN attention, graph")
    part.add_target(f"{name}, ConvNN attention / attention, graphs", ours, attention, size.convnn)
    if size.kvt:
        part.add_target(f"{name}, KVT / attention, graphs", found.get("KVT, graph"), attention, size.kvt)


def time_convolution(part: Part) -> None:
    B = 128 if part.device == "cuda" else 1
    found = time_layers(part, "16 x 16", convolution_steps(part, B), B)
    theirs = [found["Conv2d, graph"]] if "Conv2d, graph" in found else []
    part.add_target("16 x 16, ConvNN2d / Conv2d, graphs", found.get("ConvNN2d, graph"), theirs, CONVOLUTION)


def kernel_calls(B: int, N: int, C: int = 64) -> dict[str, Callable[[], object]]:
    """Every kernel of ConvNN attention and KVT on (B, N, C) of each head."""
    from kernels import cuda

    new = functools.partial(torch.randn, device="cuda")
    query, key, values, grad = (new(B, N, C, dtype=torch.bfloat16) for _ in range(4))
    index, scores = cuda.find_scored_neighbors(query, key, K, None, None)
    weights, slots = scores.softmax(2), new(K, C, dtype=torch.bfloat16)
    return {
        "search": lambda: cuda.find_scored_neighbors(query, key, K, None, None),
        "weighted sum": lambda: cuda.weighted_sum(values, index, weights),
        "weighted sum, backward": lambda: cuda.weighted_sum_backward(grad, values, index, weights),
        "depthwise": lambda: cuda.aggregate(values, index, slots, weights, True),
        "depthwise, backward": lambda: cuda.aggregate_backward(grad, values, index, slots, weights, True, True),
        "pair scores, backward": lambda: cuda.pair_scores_backward(scores, query, key, index, False),
    }


def time_kernels(part: Part, size: Size) -> None:
    """Add a row for each kernel alone as a graph; backward passes by atomic additions and in order."""
    functions: dict[str, Callable] = {}
    for name, call in kernel_calls(size.B * HEADS, size.N).items():
        attempt(part, f"kernel: N {size.N}, {name}", functools.partial(as_graph, call), functions)
        if "backward" in name:
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                attempt(part, f"kernel: N {size.N}, {name}, in order", functools.partial(as_graph, call), functions)
            finally:
                torch.use_deterministic_algorithms(False)
    for name, ms in measure(part, functions).items():
        part.add(name, "ok", batch=size.B, ms=ms)


def times(part: Part) -> None:
    """Measure all sizes; N = 197 first, where the host weighs most, then its kernels."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = False  # another kernel in front of every one in order
    tasks: list[tuple[str, Callable[[], None]]] = []
    for size in SIZES[:1] if part.small else SIZES:
        layers = f"N {size.N}", functools.partial(time_size, part, size)
        if part.device == "cuda":
            tasks += [layers, (f"kernel: N {size.N}", functools.partial(time_kernels, part, size))]
        elif size.N < 4096:
            tasks.append(layers)
            part.add(f"cuDNN, Flash, CUDA graphs and kernels alone, N {size.N}", "skipped: no CUDA device")
        else:
            part.add(f"N {size.N}", "skipped: no CUDA device")
    if not part.small:
        tasks.append(("16 x 16", functools.partial(time_convolution, part)))
    with full_precision():
        for name, task in tasks:
            if part.is_over():
                part.add(name, "skipped: the time of this part is up")
            else:
                task()
