"""The speed that the project promises: ratios of time and memory to plain forms, run in the same process.

python benchmark.py targets
"""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from options import NeighborConfig, OneLineParser


class Target(NamedTuple):
    """A layer, what it is compared with (None: its naive form), and the largest ratios of time and memory to that.

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

    from layers1d import MultiHeadAttention, MultiHeadConvNNAttention, MultiHeadKvtAttention, TokenLayout
    from layers2d import ConvNN2d
    from place_attention import MultiHeadLocalAttention, NeighborhoodAttention

    torch.manual_seed(0)
    images, patches, many = torch.randn(32, 64, 32, 32), torch.randn(64, 197, 192), torch.randn(1, 4096, 192)
    shuffled = ConvNN2d(64, 128, NeighborConfig(K=9), shuffle_pattern="BA")
    windows = ConvNN2d(64, 128, NeighborConfig(K=9, similarity_type="Loc"), padding=1)
    neighbors = NeighborConfig(K=9, magnitude_type="matmul")
    attention = MultiHeadConvNNAttention(192, 3, neighbors, layout=TokenLayout(14, 14, 1))
    wide = TokenLayout(64, 64)
    local = MultiHeadLocalAttention(192, 3, layout=wide, window_size=24)
    near = NeighborhoodAttention(192, 3, layout=wide, kernel_size=7)
    small = ConvNN2d(16, 32, NeighborConfig(K=9))
    return [
        Target("ConvNN2d, BA 2, 64 -> 128, 32 x 32, B = 32", shuffled, images, 1 / 2.2, 1 / 3),
        Target("the same in bfloat16, against float32", shuffled, images, 1 / 4.5, 1 / 4, precision="bf16"),
        Target("ConvNN2d, NA, 16 -> 32, 32 x 32, B = 16", small, torch.randn(16, 16, 32, 32), 1 / 2, 1 / 4),
        Target("ConvNN2d Loc, against the Conv2d it equals", windows, images, 1.5, None, nn.Conv2d(64, 128, 3, padding=1)),
        Target("MultiHeadConvNNAttention, B = 64, N = 197, 3 x 64, K = 9", attention, patches, 1 / 3.5, 1 / 4),
        Target("the same, against MultiHeadAttention", attention, patches, 2, None, MultiHeadAttention(192, 3)),
        Target("MultiHeadKvtAttention, B = 64, N = 197", MultiHeadKvtAttention(192, 3, 9), patches, 1 / 1.2, 1 / 1.5),
        Target("MultiHeadLocalAttention, N = 4096, 49 tokens", local, many, 1 / 5, 1 / 10),
        Target("NeighborhoodAttention, N = 4096, 7 x 7", near, many, 1 / 5, 1 / 10),
    ]


def measure_target(target: Target, repeats: int, device) -> dict:
    """The two take turns; medians, warm-up excluded."""
    from benchmark import Case, peak_memory, seconds_of
    from naive_layers import Naive

    layer, x = target.layer.to(device), target.x.to(device)
    other = Naive(layer) if target.against is None else target.against.to(device)
    cases = [Case(layer, x.clone(), precision=target.precision, compiled=False)]
    cases.append(Case(other, x.clone(), precision="fp32", compiled=False))
    times = [[seconds_of(case.training, device) for case in cases] for _ in range(repeats + 1)][1:]
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    memory = [peak_memory(case.training, device) for case in cases]
    row = {"case": target.name, "ms": 1e3 * seconds[0], "against_ms": 1e3 * seconds[1]}
    row |= {"time_ratio": seconds[0] / seconds[1], "time_target": target.time}
    row |= {"mb": memory[0] / 1e6, "against_mb": memory[1] / 1e6, "memory_ratio": memory[0] / memory[1]}
    return row | {"memory_target": target.memory}


# ---------------------------------------------------------------------------------------------------------------
# Data: batches on the device against torchvision's way, image by image with PIL in worker processes
# ---------------------------------------------------------------------------------------------------------------


class PerImage:
    """A data set of torchvision's kind: an image as PIL, cropped, flipped, resized and normalized by itself."""

    def __init__(self, images, labels, size: int, resize: int):
        from torchvision import transforms

        self.images, self.labels = images.transpose(0, 2, 3, 1), labels
        steps = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()]
        steps += [transforms.Resize(resize)] * (resize != size)
        steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[place])), int(self.labels[place])


def images_per_second(batches: Callable[[], Iterable], images: int, device) -> float:
    """Of a whole pass, the second one: in the first, workers start."""
    from benchmark import seconds_of

    def whole_pass():
        for _ in batches():
            pass

    whole_pass()
    return images / seconds_of(whole_pass, device)


def measure_data(resize: int, images: int, device, batch_size: int = 256) -> dict:
    """Images per second with crop and flip of CIFAR-like images, ours and those of a DataLoader with its best workers."""
    import numpy as np
    from torch.utils.data import DataLoader

    from dataset import DeviceBatches, Recipe

    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (images, 3, 32, 32)).astype(np.uint8), np.zeros(images, dtype=np.int64)
    ours = DeviceBatches(pixels, labels, np.arange(images), Recipe("cifar10", "train", batch_size, 0, resize, device, True))
    row = {"resize": resize, "images_per_s": images_per_second(lambda: ours.epoch(0), images, device)}
    best = (0.0, 0)
    for workers in sorted({0, 1, 2, min(4, os.cpu_count() or 1), os.cpu_count() or 1}):
        data = PerImage(pixels, labels, 32, resize)
        loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

        def batches(loader=loader):
            return ((images.to(device), labels.to(device)) for images, labels in loader)

        best = max(best, (images_per_second(batches, images, device), workers))
        del loader
    return row | {"per_image_images_per_s": best[0], "workers": best[1], "ratio": row["images_per_s"] / best[0]}


# ---------------------------------------------------------------------------------------------------------------
# What the machine can do at most
# ---------------------------------------------------------------------------------------------------------------


def machine_rates(device) -> dict:
    """GFLOP/s of large matrix products and GB/s of copies, which bound every layer from below."""
    import torch

    from benchmark import seconds_of

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
        seconds = statistics.median([seconds_of(lambda a=a, b=b: a @ b, device) for _ in range(7)][2:])
        found[f"matmul_{name}_gflops"] = 2 * 2048**3 / seconds / 1e9
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median([seconds_of(lambda: target.copy_(source), device) for _ in range(7)][2:])
    return found | {"copy_gb_per_s": 2 * source.nbytes / seconds / 1e9}


def floor_of(target: Target, rates: dict) -> dict:
    """GFLOP of forward and backward, MB that must be read or written for them, and the time of the slower of the two, ms."""
    from benchmark import training_flops

    x = target.x.to(next(target.layer.parameters()).device)
    gflops = training_flops(target.layer, x.clone()) / 1e9
    tensors = (x, target.layer(x), *target.layer.parameters())  # and the gradient of each
    mb = 2 * sum(tensor.nbytes for tensor in tensors) / 1e6
    floor = 1e3 * max(gflops / rates[f"matmul_{target.precision}_gflops"], mb / 1e3 / rates["copy_gb_per_s"])
    return {"gflops": gflops, "least_mb": mb, "floor_ms": floor}


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmark.py targets", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each, in turns; medians count (default: 7)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--images", type=int, default=5000, help="images of the comparison of data (default: 5000)")
    parser.add_argument("--output_dir", default="./Output/targets", help="folder for targets.csv, data.csv and targets.md")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.images < 1:
        parser.error("--repeats and --images must be at least 1")
    from tqdm import tqdm

    from benchmark import as_markdown
    from utils import RunError, as_csv, check_writable, device_name, pick_device, versions, write_atomically

    folder = Path(args.output_dir)
    try:
        device = pick_device(args.device)
        check_writable(folder, "--output_dir")
    except RunError as error:
        parser.error(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    rates, rows = machine_rates(device), []
    for target in tqdm(make_targets(), unit=" targets", disable=None):
        row = measure_target(target, args.repeats, device)
        row |= floor_of(target, rates)
        rows.append(row | {"times_the_floor": row["ms"] / row["floor_ms"]})
    data = [measure_data(resize, args.images, device) for resize in (32, 224)]
    about = f"{device_name(device)}, torch {versions()['torch']}; " + ", ".join(f"{k} {v:,.0f}" for k, v in rates.items())
    command = shlex.join(["python", "benchmark.py", "targets", *argv])
    text = f"```\n{command}\n```\n\n{about}\n\n{as_markdown(rows)}\n\n{as_markdown(data)}\n"
    write_atomically(folder / "targets.csv", as_csv(rows))
    write_atomically(folder / "data.csv", as_csv(data))
    write_atomically(folder / "targets.md", text)
    print(text + f"\nresults are in {folder}")
    return 0
