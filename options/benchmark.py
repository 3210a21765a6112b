"""`BenchmarkConfig`: options of `benchmark.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from options.fields import BATCH, SIDE, as_words, check_fields, option
from options.training import KERNELS, KERNELS_HELP


@dataclass(frozen=True)
class BenchmarkConfig:
    """Layers, sizes and conditions of the measurements."""

    heading = "benchmark"

    layer: tuple[str, ...] | None = option(None, "layers, one row each (default: all)", kind=str, many=True)
    resolution: tuple[int, ...] | None = option(
        None, "sides of the grid of tokens (default: 16 32)", kind=int, many=True, low=1, high=SIDE
    )
    tokens: tuple[int, ...] | None = option(
        None, "number of tokens instead of --resolution; squares", kind=int, many=True, low=1, high=SIDE**2
    )
    batch_size: int = option(8, "images per batch, except for latency", low=1, high=BATCH)
    precision: tuple[str, ...] = option(("fp32",), "fp32, or autocast to one of the others", choices=("fp32", "bf16", "fp16"))
    execution: tuple[str, ...] = option(("eager",), "eager, or with torch.compile", choices=("eager", "compiled"))
    against: str | None = option(
        None,
        "also measure the naive form of each layer that has one, and the ratios",
        kind=str,
        choices=("naive",),
    )
    baseline: bool = option(
        False,
        "also measure the reference: Attention of vit with three projections instead of a merged one, torchvision's "
        "network beside a backbone (--model) of Conv2d",
    )
    repeats: int = option(7, "measurements per row, interleaved; medians are reported", low=1, high=10**6)
    device: str = option("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cpu", "cuda", "mps"))
    kernels: str = option("auto", KERNELS_HELP, choices=KERNELS)
    seed: int = option(0, "of weights and inputs", low=0, below=2**31)
    output_dir: str = option("./Output/benchmark", "folder for the table and the plot")

    def __post_init__(self):
        check_fields(self)
        if self.resolution and self.tokens:
            raise ValueError(f"tokens={as_words(self.tokens)} replaces resolution; drop one of them")
        if not self.tokens:
            object.__setattr__(self, "resolution", self.resolution or (16, 32))
            return
        for tokens in self.tokens:
            side = math.isqrt(tokens)
            if side**2 != tokens:
                raise ValueError(f"tokens={tokens} is not a square number; {side**2} and {(side + 1) ** 2} are")
        object.__setattr__(self, "resolution", tuple(math.isqrt(tokens) for tokens in self.tokens))
