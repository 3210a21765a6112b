"""`BenchmarkConfig`: options of `benchmark.py`."""

import math
from dataclasses import dataclass

from options.fields import BATCH, SIDE, as_words, check_fields, option
from options.training import DEVICE_HELP, KERNELS, KERNELS_HELP


@dataclass(frozen=True)
class BenchmarkConfig:
    """Layers, sizes, precisions and repeats of a benchmark."""

    heading = "benchmark"

    layer: tuple[str, ...] | None = option(None, "layers, one row each (default: all)", kind=str, many=True)
    resolution: tuple[int, ...] | None = option(
        None, "sides of the grid of tokens (default: 16 32)", kind=int, many=True, low=1, high=SIDE
    )
    tokens: tuple[int, ...] | None = option(
        None, "the same as numbers of tokens, which are squares", kind=int, many=True, low=1, high=SIDE**2
    )
    batch_size: int = option(8, "images of a batch; latency is always measured with one image", low=1, high=BATCH)
    precision: tuple[str, ...] = option(("fp32",), "fp32, or autocast to bf16 or fp16", choices=("fp32", "bf16", "fp16"))
    execution: tuple[str, ...] = option(("eager",), "eager, or by torch.compile", choices=("eager", "compiled"))
    against: str | None = option(
        None,
        "also measure the naive form of each layer, where it has one, and the ratios to it",
        kind=str,
        choices=("naive",),
    )
    baseline: bool = option(False, "also measure Attention of vit with three projections instead of a merged one")
    repeats: int = option(7, "measurements of each row, taken in turns; their median is reported", low=1, high=10**6)
    device: str = option("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda", "mps"))
    kernels: str = option("auto", KERNELS_HELP, choices=KERNELS)
    seed: int = option(0, "seed of weights and inputs", low=0, below=2**31)
    output_dir: str = option("./Output/benchmark", "folder for the table and the plot", path=True)

    def __post_init__(self):
        check_fields(self)
        if self.resolution and self.tokens:
            raise ValueError(f"tokens={as_words(self.tokens)} and resolution both give the sizes; drop one of them")
        if not self.tokens:
            object.__setattr__(self, "resolution", self.resolution or (16, 32))
            return
        sides = tuple(math.isqrt(tokens) for tokens in self.tokens)
        for tokens, side in zip(self.tokens, sides, strict=True):
            if side**2 != tokens:
                raise ValueError(f"tokens={tokens} is not a square number; {side**2} and {(side + 1) ** 2} are")
        object.__setattr__(self, "resolution", sides)
