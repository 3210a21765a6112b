"""What the mixers of the ViT cost as tokens grow: parameters, FLOPs, time and peak memory of forward and backward.

python benchmark.py --layer Attention Performer --tokens 256 1024 4096
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

from options import LAYERS1D_NAMES, ViTConfig

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--layer", nargs="+", default=LAYERS1D_NAMES, metavar="NAME", help="layers of vit_main.py (default: all)"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help="square numbers (default: 256 1024)")
    parser.add_argument("--d_model", type=int, default=192, help="features per token (default: 192)")
    parser.add_argument("--num_heads", type=int, default=3, help="heads (default: 3)")
    parser.add_argument("--batch_size", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements, of which the median counts (default: 7)")
    parser.add_argument("--csv", metavar="FILE", help="write the table here as well")
    return parser


def make_configs(args: argparse.Namespace) -> list[ViTConfig]:
    """One for every row of the table. Raises ValueError."""
    for name in ("batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    configs = []
    for layer, tokens in itertools.product(args.layer, args.tokens):
        side = math.isqrt(max(tokens, 0))
        if tokens < 1 or side**2 != tokens:
            raise ValueError(f"--tokens {tokens} is not a square number; the patches of a square image are")
        sizes = {"image_size": side, "patch_size": 1, "pool": "mean", "d_model": args.d_model, "num_heads": args.num_heads}
        configs.append(ViTConfig(layer=layer, attention_dropout=0.0, **sizes))
    return configs


def allocated_peak(function: Callable[[], object]) -> int:
    """Largest sum of bytes alive that the CPU's allocator handed out while `function` ran, as the profiler saw it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        result = function()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    del result
    return peak


def measure(config: ViTConfig, batch_size: int, repeats: int) -> dict:
    """One row: the mixer of `config` on random tokens, on the CPU, in float32."""
    import torch

    from utils import count_flops, count_parameters
    from vit import TokenLayout, make_layer1d

    torch.manual_seed(0)
    layout = TokenLayout(*config.grid)
    mixer = make_layer1d(config, layout)
    x = torch.randn(batch_size, layout.num_tokens, config.d_model, requires_grad=True)

    def forward():
        with torch.no_grad():
            mixer(x)

    def step():
        mixer.zero_grad()
        mixer(x).sum().backward()

    row = {
        "layer": config.layer,
        "tokens": layout.num_tokens,
        "parameters": count_parameters(mixer),
        "forward_mflops": count_flops(mixer, x[:1].detach()) / 1e6,
    }
    for name, run in {"forward": forward, "forward_backward": step}.items():
        run()  # warm-up, which also makes the tables
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        row[f"{name}_ms"] = 1e3 * statistics.median(times)
    mixer.zero_grad()
    return row | {"forward_backward_peak_mb": allocated_peak(step) / 1e6}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        configs = make_configs(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    rows = []
    for config in configs:
        rows.append(measure(config, args.batch_size, args.repeats))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        cells = [
            f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if value != config.layer else value
            for value in rows[-1].values()
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
