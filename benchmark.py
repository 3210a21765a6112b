"""What a mixer costs: parameters, FLOPs, latency, throughput, time and peak memory, layer by layer and size by size.

python benchmark.py vit --layer Attention Performer --resolution 16 32 64
python benchmark.py allconvnet --layer ConvNN --channels 64 128 --resolution 32 --batch_size 32 --against naive
python benchmark.py allconvnet --model resnet18 --layer Conv2d ConvNN --resolution 32
python benchmark.py targets
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.tables import as_markdown
from options.allconvnet import AllConvNetConfig
from options.backbones import VGG
from options.benchmark import BenchmarkConfig
from options.fields import build
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES, layer_label
from options.parser import read_values
from options.runs import check_environment
from options.vit import ViTConfig
from runs.measure import MEASURED, Case, training_flops
from runs.streams import run_program

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
KEYS = ("layer", "tokens", "precision", "execution")
RATIOS = {"time_ratio": "forward_backward_ms", "memory_ratio": "peak_memory_mb"}  # to the naive form
UNSEEN = "FLOPs do not include top-K, gather, softmax, normalization and element-wise work, which the counter does not see."


class Family(NamedTuple):
    """The mixers of one of the two models."""

    config: type
    layers: tuple[str, ...]
    defaults: dict


FAMILIES = {
    "vit": Family(ViTConfig, LAYERS1D_NAMES, {"d_model": 192, "num_heads": 3, "pool": "mean", "attention_dropout": 0.0}),
    "allconvnet": Family(AllConvNetConfig, LAYERS2D_NAMES, {"channels": (64, 128)}),
}


def parse(argv: list[str]) -> tuple[str, BenchmarkConfig, list[ViTConfig | AllConvNetConfig]]:
    """The family, what to measure, and a config for every layer at every resolution; ends in one line on a mistake."""
    prog = Path(sys.argv[0]).name
    if not argv or argv[0] not in FAMILIES:
        words = (*FAMILIES, "targets")
        names = " or ".join(words)
        if argv and argv[0] in ("-h", "--help"):
            print(f"usage: {prog} {{{','.join(words)}}} [options]\n\n{__doc__}\n{prog} vit --help lists the options")
            raise SystemExit(0)
        print(
            f"{prog}: error: the first word is {argv[0]!r}; give {names}" if argv else f"{prog}: error: give {names}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    family = FAMILIES[argv[0]]
    defaults = family.defaults
    others, about = (BenchmarkConfig,), "What a mixer costs."
    values, parser = read_values(family.config, others, about, argv[1:], defaults, prog=f"{prog} {argv[0]}")
    try:
        check_environment()
        bench = build(BenchmarkConfig, values)
        values = defaults | values
        one_layer = family.config is AllConvNetConfig and values.get("model", "allconvnet") == "allconvnet"
        if one_layer and len(values["channels"]) != 2:
            raise ValueError(
                f"channels={' '.join(map(str, values['channels']))} must be two numbers here: those into a layer and out of it"
            )
        configs, layers = [], bench.layer or family.layers
        labels = [layer_label(layer) for layer in dict.fromkeys(layers)]
        if twin := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"layer={' '.join(layers)}: two layers would be called {twin}; give the classes different names")
        given = mixer_options(family, layers, values.pop("mixer_option", None) or ())
        for side, layer in itertools.product(bench.resolution, layers):
            if family.config is ViTConfig:
                side *= values.get("patch_size", ViTConfig.patch_size)
            configs.append(build(family.config, values, layer=layer, mixer_option=given[layer] or None, image_size=side))
    except ValueError as error:
        parser.error(str(error))
    if bench.baseline and not any(map(has_baseline, configs)):
        parser.warn("--baseline True is not used: only the Attention of vit and a host (model) of Conv2d have one")
    return argv[0], bench, configs


def has_baseline(config: ViTConfig | AllConvNetConfig) -> bool:
    """Whether `make_mixers` knows another form of this layer or network to compare it with."""
    return config.layer == "Attention" if isinstance(config, ViTConfig) else config.is_host and config.layer == "Conv2d"


def mixer_options(family: Family, layers: tuple[str, ...], given: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Those of the `name=value` texts that each layer has. What none has goes to all that could: their configs refuse it."""
    own = {layer: {name for mixer in family.config.custom_mixers(layer) for name in mixer.arguments} for layer in layers}
    known = set().union(*own.values())
    could = [layer for layer in layers if ":" in layer] or layers
    return {
        layer: tuple(
            text for text in given if (name := text.partition("=")[0]) in own[layer] or (name not in known and layer in could)
        )
        for layer in layers
    }


# ---------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------


def make_mixers(
    config: ViTConfig | AllConvNetConfig, batch_size: int, baseline: bool = False
) -> Iterator[tuple[str, object, object]]:
    """(name, mixer, input) of the layer, or, of a host (--model), the whole network.

    With `baseline` what it is compared with as well: attention with separate projections of q, k and v, and torchvision's
    network beside a host of convolutions.
    """
    import torch
    from torch import nn

    if isinstance(config, AllConvNetConfig) and config.is_host:
        from models.build import build_network

        images = torch.randn(batch_size, config.in_channels, *config.image_size)
        yield config.title, build_network(config), images
        if baseline and has_baseline(config):
            yield f"{config.model} of torchvision", torchvisions(config), images.clone()
        return
    if isinstance(config, AllConvNetConfig):
        from allconvnet import make_layer2d

        inputs, outputs = config.channels
        x = torch.randn(batch_size, inputs, *config.image_size)
        yield layer_label(config.layer), make_layer2d(config, inputs, outputs), x
        return
    from layers1d import MultiHeadAttention
    from mixers.base import TokenLayout
    from vit import make_layer1d

    class Separate(MultiHeadAttention):
        """Attention whose queries, keys and values are three projections instead of a merged one."""

        def make_projection(self, d_model: int, bias: bool) -> None:
            self.parts = nn.ModuleList(nn.Linear(d_model, d_model, bias=bias) for _ in range(3))

        def project(self, x):
            return tuple(self.split_heads(part(x)) for part in self.parts)

    layout = TokenLayout(*config.grid, config.class_tokens)
    x = torch.randn(batch_size, layout.num_tokens, config.d_model)
    yield layer_label(config.layer), make_layer1d(config, layout), x
    if baseline and has_baseline(config):
        apart = Separate(config.d_model, config.num_heads, attention_dropout=config.attention_dropout, bias=config.bias)
        yield "Attention (q, k, v apart)", apart, x.clone()


def torchvisions(config: AllConvNetConfig):
    """torchvision's network of the name of this host; for the small stem, with the two changes that are usual."""
    from torch import nn

    from readers.files import import_torchvision

    name = config.model + "_bn" * config.batch_norm
    network = import_torchvision().models.get_model(name, num_classes=config.num_classes)
    if config.model in VGG:
        side, width = 1 if config.stem == "small" else 7, config.classifier_width
        network.avgpool = nn.AdaptiveAvgPool2d(side)
        for number, sizes in ((0, (512 * side**2, width)), (3, (width, width)), (6, (width, config.num_classes))):
            network.classifier[number] = nn.Linear(*sizes)
    elif config.stem == "small":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


def with_naive_form(label: str, mixer, x) -> Iterator[tuple[str, object, object]]:
    """The mixer, and its naive form if it has one."""
    from experiments.naive import Naive, has_naive_form

    yield label, mixer, x
    if has_naive_form(mixer):
        yield f"{label} (naive)", Naive(mixer), x.clone()


def measure(bench: BenchmarkConfig, configs: list, device, progress) -> Iterator[dict]:
    """Rows of layers at one resolution, measured in turns: a slow minute of the machine hits all of them."""
    import torch

    from runs.measure import count_flops, count_parameters
    from runs.memory import is_out_of_memory

    torch._dynamo.reset()
    # Each case compiles a graph for one image, a batch and training; beyond the limit torch falls back to eager execution.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    cases, rows = [], []
    for config in configs:
        torch.manual_seed(bench.seed)
        mixers = [
            (label, mixer.to(device), x.to(device)) for label, mixer, x in make_mixers(config, bench.batch_size, bench.baseline)
        ]
        if bench.against:
            plain, mixers = mixers, [one for mixer in mixers for one in with_naive_form(*mixer)]
            more = (len(mixers) - len(plain)) * len(bench.precision) * len(bench.execution)
            progress.total += more * (bench.repeats + 1)
        for label, mixer, x in mixers:
            tokens = config.image_size[0] * config.image_size[1] if isinstance(config, AllConvNetConfig) else x.shape[1]
            facts = {"parameters": count_parameters(mixer), "forward_mflops": count_flops(mixer, x[:1]) / 1e6}
            # FLOPs are per image, and the same in every precision and execution.
            facts["forward_backward_mflops"] = training_flops(mixer, x[:1].clone()) / 1e6
            for precision, execution in itertools.product(bench.precision, bench.execution):
                case = Case(mixer, x.clone(), precision=precision, compiled=execution == "compiled")
                cases.append(case)
                rows.append({"layer": label, "tokens": tokens, "precision": precision, "execution": execution} | facts)
    for case in cases:
        try:
            case.measure()  # warm-up: tables are built, graphs compiled
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            case.is_too_large = True
        progress.update()
        case.times = {name: [] for name in case.times}
    for _ in range(bench.repeats):
        for case in cases:
            if not case.is_too_large:
                case.measure()
            progress.update()
    measured = [
        row | (dict.fromkeys(MEASURED, math.nan) if c.is_too_large else c.row()) for c, row in zip(cases, rows, strict=True)
    ]
    yield from add_ratios(measured) if bench.against else measured


def add_ratios(rows: list[dict]) -> list[dict]:
    """Time and memory of each row over those of its naive form, run in the same way; None where there is none."""
    naive = {tuple(row[name] for name in KEYS): row for row in rows}
    result = []
    for row in rows:
        other = naive.get((f"{row['layer']} (naive)", *(row[name] for name in KEYS[1:])))
        result.append(row | {name: other and row[column] / other[column] for name, column in RATIOS.items()})
    return result


# ---------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------


def draw_scaling(rows: list[dict], title: str) -> bytes:
    """Time and peak memory against the number of tokens, both axes logarithmic, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    from runs.files import as_png

    lines: dict[str, list[dict]] = {}
    many = [name for name in ("precision", "execution") if len({row[name] for row in rows}) > 1]
    for row in rows:
        lines.setdefault(", ".join([row["layer"], *(row[name] for name in many)]), []).append(row)
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(1, 2)
    looks = itertools.product([("o", "-"), ("s", "--"), ("^", ":")], [f"C{number}" for number in range(10)])
    styles = itertools.cycle((marker, style, color) for (marker, style), color in looks)
    for (label, of_line), (marker, style, color) in zip(lines.items(), styles, strict=False):
        for axis, key in zip(axes, ("forward_backward_ms", "peak_memory_mb"), strict=True):
            axis.plot(
                [row["tokens"] for row in of_line],
                [row[key] for row in of_line],
                marker=marker,
                ls=style,
                color=color,
                ms=4,
                lw=1.2,
                label=label,
            )
    tokens = sorted({row["tokens"] for row in rows})
    for axis, label in zip(axes, ("forward + backward (ms)", "peak memory of it (MB)"), strict=True):
        axis.set_xscale("log")
        axis.set_xticks(tokens, [f"{number:,}" for number in tokens])
        if any(number > 0 for line in axis.lines for number in line.get_ydata()):  # nothing was measured where all failed
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return as_png(figure)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["targets"]:
        from experiments import targets

        return targets.main(argv[1:])
    _, bench, configs = parse(argv)
    # torch takes seconds to import: only once the options are known to be right.
    from tqdm import tqdm

    from launch.probe import probe
    from runs import RunError
    from runs.devices import choose_kernels, pick_device
    from runs.files import WriteError, check_writable
    from runs.measure import device_name, versions
    from runs.memory import OutOfMemory, making

    folder = Path(bench.output_dir)
    try:
        device = pick_device(bench.device)
        choose_kernels(bench.kernels, device)
        check_writable(folder, "--output_dir")
        for config in configs:
            if isinstance(config, AllConvNetConfig):  # of one layer, from as many channels as are measured
                inputs, *outputs = config.channels
                config = dataclasses.replace(config, in_channels=inputs, channels=outputs, num_layers=None)
            with contextlib.suppress(OutOfMemory), making("a trial of it"):  # its row will say so
                probe(config, device)
    except (RunError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    layers = len(configs) // len(bench.resolution)
    more = sum(has_baseline(config) for config in configs[:layers]) * bench.baseline
    cases = (layers + more) * len(bench.precision) * len(bench.execution)
    found = versions()
    machine = f"{device_name(device)}, torch {found['torch']}, batch of {bench.batch_size}"
    command = shlex.join(["python", "benchmark.py", *argv])
    rows = []
    try:
        with tqdm(total=cases * len(bench.resolution) * (bench.repeats + 1), unit=" measurements", disable=None) as progress:
            for start, side in zip(range(0, len(configs), layers), bench.resolution, strict=True):
                with making(f"the layers at --resolution {side}", "smaller sizes, or fewer layers, need less"):
                    rows += measure(bench, configs[start : start + layers], device, progress)
                write(rows, folder, command, machine)  # what there is, in case a larger size does not end well
    except (OutOfMemory, WriteError) as error:
        print(f"stopped: {error}" + f"; results so far are in {folder}" * bool(rows), file=sys.stderr)
        return 1
    print(f"{machine}\n\n{as_markdown(rows)}\n\n{UNSEEN}")
    print(f"results are in {folder}")
    return 0


def write(rows: list[dict], folder: Path, command: str, machine: str) -> None:
    """benchmark.csv, benchmark.md, and with more than one size scaling.png."""
    from runs.files import as_csv, write_atomically

    write_atomically(folder / "benchmark.csv", as_csv(rows))
    write_atomically(folder / "benchmark.md", f"```\n{command}\n```\n\n{machine}\n\n{as_markdown(rows)}\n\n{UNSEEN}\n")
    fits = any(not math.isnan(row["forward_backward_ms"]) for row in rows)
    if fits and len({row["tokens"] for row in rows}) > 1:
        write_atomically(folder / "scaling.png", draw_scaling(rows, machine))


if __name__ == "__main__":
    sys.exit(run_program(main))
