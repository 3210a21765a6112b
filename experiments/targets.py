"""Targets for speed: ratios of time and memory to plain forms, run in the same process.

python benchmark.py targets

Ratios of times are medians over pairs of measurements, one right after the other, and are shown with their quartiles. The exit
status is 1 where a median misses its target. float32 is computed without TF32 on both sides. Targets under CUDA graphs are
those of `experiments/gpu_times.py`.
"""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.tables import as_markdown
from options.machine import cpu_cores
from options.neighbors import NeighborConfig
from options.parser import OneLineParser, number_type
from runs import RunError
from runs.files import as_csv, check_writable, write_atomically
from runs.measure import Case, device_name, median_ms, peak_memory, seconds_of, spread, take_turns, training_flops, versions


class Target(NamedTuple):
    """A layer, the layer to compare it with (None: its naive form), and the largest allowed ratios of time and memory.

    Forward and backward, gradients of the input and of all parameters; set on two AVX-512 cores.
    """

    name: str
    layer: object
    x: object
    time: float
    memory: float | None
    against: object = None
    precision: str = "fp32"


def make_targets() -> list[Target]:
    import torch
    from torch import nn

    from experiments.naive import Published
    from layers1d import MultiHeadAttention, MultiHeadConvNNAttention, MultiHeadKvtAttention
    from layers2d import ConvNN2d
    from mixers.base import TokenLayout
    from mixers.local import MultiHeadLocalAttention, NeighborhoodAttention

    # Feature maps of CIFAR images, ViT-Tiny at 224 / 16, and 4,096 tokens for attention by location: it grows with N, not N^2.
    torch.manual_seed(0)
    images, patches, many = torch.randn(32, 64, 32, 32), torch.randn(64, 197, 192), torch.randn(1, 4096, 192)
    shuffled = ConvNN2d(64, 128, NeighborConfig(K=9), shuffle_pattern="BA")
    windows = ConvNN2d(64, 128, NeighborConfig(K=9, similarity_type="Loc"), padding=1)
    neighbors = NeighborConfig(K=9, magnitude_type="matmul")
    attention = MultiHeadConvNNAttention(192, 3, neighbors, layout=TokenLayout(14, 14, 1))
    kvt, wide = MultiHeadKvtAttention(192, 3, 9), TokenLayout(64, 64)
    local = MultiHeadLocalAttention(192, 3, layout=wide, window_size=24)
    near = NeighborhoodAttention(192, 3, layout=wide, kernel_size=7)
    images16 = torch.randn(16, 16, 32, 32)
    small, random, spatial = (
        ConvNN2d(16, 32, K=9, **sampling)
        for sampling in ({}, {"sampling_type": "random", "num_samples": 64}, {"sampling_type": "spatial", "num_samples": 8})
    )
    return [
        Target("ConvNN2d, BA 2, 64 -> 128, 32 x 32, B = 32", shuffled, images, 1 / 2.2, 1 / 3),
        Target("the same in bfloat16, against float32", shuffled, images, 1 / 4.5, 1 / 4, precision="bf16"),
        Target("ConvNN2d, NA, 16 -> 32, 32 x 32, B = 16", small, images16, 1 / 2, 1 / 4),
        Target("the same, against the published form", small, images16, 1 / 2, None, Published(small)),
        Target("the same among 64 random tokens", random, images16, 1 / 2, None, Published(random)),
        Target("the same among 8 x 8 spatial tokens", spatial, images16, 1 / 2, None, Published(spatial)),
        Target("ConvNN2d Loc, against the Conv2d it equals", windows, images, 1.5, None, nn.Conv2d(64, 128, 3, padding=1)),
        Target("MultiHeadConvNNAttention, B = 64, N = 197, 3 x 64, K = 9", attention, patches, 1 / 3.5, 1 / 4),
        Target("the same, against MultiHeadAttention", attention, patches, 1.3, None, MultiHeadAttention(192, 3)),
        Target("MultiHeadKvtAttention, B = 64, N = 197", kvt, patches, 1 / 1.2, 1 / 1.5),
        Target("the same, against MultiHeadAttention", kvt, patches, 1.1, None, MultiHeadAttention(192, 3)),
        Target("MultiHeadLocalAttention, N = 4096, 49 tokens", local, many, 1 / 5, 1 / 10),
        Target("NeighborhoodAttention, N = 4096, 7 x 7", near, many, 1 / 5, 1 / 10),
    ]


def measure_target(target: Target, repeats: int, device, limits: dict[str, "Limit"]) -> dict:
    """Return a row of the table: the layer, its comparison and the limits of the machine, measured in turns."""
    from experiments.naive import Naive

    layer, x = target.layer.to(device), target.x.to(device)
    other = Naive(layer) if target.against is None else target.against.to(device)
    cases = [Case(layer, x.clone(), precision=target.precision, compiled=False)]
    cases.append(Case(other, x.clone(), precision="fp32", compiled=False))
    # The limits are measured in the same rounds: clock rate and other processes on the machine change by the minute.
    functions = [case.training for case in cases] + [limit.run for limit in limits.values()]
    ours, theirs, *columns = take_turns(functions, repeats, device)
    rates = [
        {name: limit.work / seconds for (name, limit), seconds in zip(limits.items(), times, strict=True)}
        for times in zip(*columns, strict=True)
    ]
    gflops, mb, floor = floor_of(target, rates)
    memory = [peak_memory(case.training, device) for case in cases]
    row = {"case": target.name, "ms": median_ms(ours), "against_ms": median_ms(theirs)}
    row |= spread("time_ratio", ours, theirs) | {"time_target": target.time}
    row |= {"mb": memory[0] / 1e6, "against_mb": memory[1] / 1e6, "memory_ratio": memory[0] / memory[1]}
    row |= {"memory_target": target.memory, "gflops": gflops, "least_mb": mb}
    row |= {"floor_ms": median_ms(floor)} | spread("times_the_floor", ours, floor)
    if target.precision == "bf16" and bfloat16_speed(rates) < 2:
        row["time_target"] = None  # still shown: without fast bfloat16 products no implementation meets it
    misses = [f"{name} ratio" for name in ("time", "memory") if row[f"{name}_ratio"] > (row[f"{name}_target"] or math.inf)]
    return row | {"missed": ", ".join(misses)}


def measure_search(repeats: int, device) -> dict:
    """Measure the search among 1,024 tokens in chunks against all scores at once and `topk`."""
    import torch

    from neighbors import find_neighbors

    x = torch.randn(16, 1024, 64, device=device)
    functions = [lambda: find_neighbors(x, x, 9, "matmul"), lambda: torch.bmm(x, x.mT).topk(9).indices]
    ours, theirs = take_turns(functions, repeats, device)
    row = {"case": "find_neighbors, B = 16, N = 1024, C = 64, K = 9, against bmm and topk"}
    row |= {"ms": median_ms(ours), "against_ms": median_ms(theirs)}
    row |= spread("time_ratio", ours, theirs) | {"time_target": 1.0}
    return row | {"missed": "time ratio" if row["time_ratio"] > 1 else ""}


# ---------------------------------------------------------------------------------------------------------------
# Data: batches on the device against torchvision's way, image by image with PIL in worker processes
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class PerImage:
    """A data set as torchvision's: each image is opened by PIL and transformed by itself."""

    images: object  # array (N, H, W, 3)
    transform: Callable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), 0


def consume(batches: Iterable) -> None:
    for _ in batches:
        pass


def measure_data(resize: int, least: float, images: int, repeats: int, device, batch_size: int = 256) -> dict:
    """Measure images per second with crop and flip of CIFAR-like images against a DataLoader with its best workers.

    least: the target of their ratio.
    """
    import numpy as np
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from dataset import DeviceBatches, Recipe

    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (images, 3, 32, 32)).astype(np.uint8), np.zeros(images, dtype=np.int64)
    ours = DeviceBatches(pixels, labels, np.arange(images), Recipe("cifar10", "train", batch_size, 0, resize, device, True))

    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    steps += [transforms.Resize(resize)] * (resize != 32)
    steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    data = PerImage(pixels.transpose(0, 2, 3, 1), transforms.Compose(steps))

    def per_image(workers: int) -> Callable[[], None]:
        # As torchvision's users load images: transforms in worker processes, which live through the epochs.
        loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        return lambda: consume((images.to(device), labels.to(device)) for images, labels in loader)

    candidates = sorted({0, 1, 2, min(4, cpu_cores()), cpu_cores()})
    best = min(candidates, key=lambda workers: take_turns([per_image(workers)], 1, device)[0][0])
    seconds, theirs = take_turns([lambda: consume(ours.epoch(0)), per_image(best)], repeats, device)
    row = {"case": f"images of {resize} x {resize}", "images_per_s": images / statistics.median(seconds)}
    row |= {"per_image_images_per_s": images / statistics.median(theirs), "workers": best}
    row |= spread("rate_ratio", theirs, seconds) | {"rate_target": least}
    return row | {"missed": "rate ratio" if row["rate_ratio"] < least else ""}


# ---------------------------------------------------------------------------------------------------------------
# Limits of the machine
# ---------------------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """Work that a machine can hardly do faster."""

    run: Callable[[], object]
    work: float  # GFLOP or GB


def make_limits(device) -> dict[str, Limit]:
    """Return large matrix products (GFLOP) and copies (GB), which bound every layer from below."""
    import torch

    products = {"matmul_fp32_gflops": torch.float32, "matmul_bf16_gflops": torch.bfloat16}
    limits = {name: make_product(dtype, device) for name, dtype in products.items()}
    source = torch.randn(2**26, device=device)  # 256 MB: more than any cache holds
    target = torch.empty_like(source)
    limits["copy_gb_per_s"] = Limit(lambda: target.copy_(source), 2 * source.nbytes / 1e9)
    return limits


def make_product(dtype, device, longest: float = 0.5) -> Limit:
    """Return a product of matrices with up to 2,048 rows that takes at most `longest` seconds.

    Without vector instructions for it, a CPU multiplies bfloat16 a hundred times slower than float32.
    """
    import torch

    rows = 256
    while True:
        a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        limit = Limit(lambda a=a, b=b: a @ b, 2 * rows**3 / 1e9)
        seconds_of(limit.run, device)
        if rows == 2048 or 8 * seconds_of(limit.run, device) > longest:
            return limit
        rows *= 2


def bfloat16_speed(rates: Sequence[dict[str, float]]) -> float:
    return statistics.median(rate["matmul_bf16_gflops"] / rate["matmul_fp32_gflops"] for rate in rates)


def floor_of(target: Target, rates: Sequence[dict[str, float]]) -> tuple[float, float, list[float]]:
    """Return GFLOP of forward and backward, MB that they must read or write, and the seconds of the slower one by rate.

    No implementation can be faster than its products at full speed, or than reading and writing its tensors once.
    """
    x = target.x.to(next(target.layer.parameters()).device)
    gflops = training_flops(target.layer, x.clone()) / 1e9
    tensors = (x, target.layer(x), *target.layer.parameters())  # and the gradient of each
    mb = 2 * sum(tensor.nbytes for tensor in tensors) / 1e6
    product = f"matmul_{target.precision}_gflops"
    return gflops, mb, [max(gflops / rate[product], mb / 1e3 / rate["copy_gb_per_s"]) for rate in rates]


def measure(tasks: Sequence[Callable[[], dict]]) -> list[dict]:
    """Return the rows of all tasks; print a line to stderr after each, with the time that the others may take."""
    from tqdm import tqdm

    rows, start = [], time.monotonic()
    for task in tasks:
        row = task()
        rows.append(row)
        name = "time_ratio" if "time_ratio" in row else "rate_ratio"
        left = (time.monotonic() - start) / len(rows) * (len(tasks) - len(rows))
        found = f"{name} {row[name]:.3g} ({row[f'{name}_q1']:.3g} to {row[f'{name}_q3']:.3g})"
        print(f"{len(rows)}/{len(tasks)} {row['case']}: {found}, ETA {tqdm.format_interval(left)}", file=sys.stderr)
    return rows


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmark.py targets", description=__doc__.splitlines()[0], allow_abbrev=False)
    count = number_type(int, 1, 10**6)
    parser.add_argument("--repeats", type=count, default=7, help="pairs of measurements of each; medians count (default: 7)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--images", type=count, default=5000, help="images of the comparison of data (default: 5000)")
    parser.add_argument("--output_dir", default="./Output/targets", help="folder for tables as .csv, and targets.md")
    args = parser.parse_args(argv)
    from runs.devices import pick_device

    folder = Path(args.output_dir)
    try:
        device = pick_device(args.device)
        check_writable(folder, "--output_dir")
    except RunError as error:
        parser.error(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    from experiments.gpu_parts import full_precision

    with full_precision():
        return run(args, argv, folder, device)


def run(args: argparse.Namespace, argv: list[str], folder: Path, device) -> int:
    """Measure everything, write and print the tables; return 1 if a target is missed."""
    limits = make_limits(device)
    seconds = take_turns([limit.run for limit in limits.values()], args.repeats, device)
    rates = {name: limit.work / statistics.median(times) for (name, limit), times in zip(limits.items(), seconds, strict=True)}
    about = f"{device_name(device)}, torch {versions()['torch']}; " + ", ".join(f"{k} {v:,.0f}" for k, v in rates.items())
    targets, speed = make_targets(), bfloat16_speed([rates])
    if speed <= 0.25:  # no vector instructions for bfloat16: its case would take an hour to show it
        targets = [target for target in targets if target.precision != "bf16"]
        about += f"\n\nbfloat16 is left out: its products run at {speed:.2g} of float32's speed here"
    tasks = [partial(measure_target, target, args.repeats, device, limits) for target in targets]
    tasks.append(partial(measure_search, args.repeats, device))
    tasks += [partial(measure_data, resize, least, args.images, args.repeats, device) for resize, least in ((32, 10), (224, 1))]
    rows = measure(tasks)
    tables = {"targets": rows[:-3], "search": rows[-3:-2], "data": rows[-2:]}
    command = shlex.join(["python", "benchmark.py", "targets", *argv])
    text = f"```\n{command}\n```\n\n{about}\n\n" + "\n\n".join(map(as_markdown, tables.values())) + "\n"
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", as_csv(table))
    write_atomically(folder / "targets.md", text)
    print(text + f"\nresults are in {folder}")
    missed = [f"missed: {row['case']}: {row['missed']}" for row in rows if row["missed"]]
    for line in missed:
        print(line)
    return 1 if missed else 0
