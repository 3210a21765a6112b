"""Cost of mixers: parameters, FLOPs, latency, throughput, time and peak memory, layer by layer and size by size.

python benchmark.py vit --layer Attention Performer --resolution 16 32 64
python benchmark.py allconvnet --layer ConvNN --channels 64 128 --resolution 32 --batch_size 32 --against naive
python benchmark.py allconvnet --model resnet18 --layer Conv2d ConvNN --resolution 32
python benchmark.py targets
python benchmark.py host
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.panels import PAGE, legend_below, log_locator, make_panels, short_number, wrapped
from experiments.tables import as_markdown
from options.allconvnet import AllConvNetConfig
from options.benchmark import BenchmarkConfig
from options.fields import build, specs
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES, layer_label
from options.parser import OneLineParser, read_values
from options.runs import check_environment
from options.timm import describe, is_timm
from options.vit import ViTConfig
from runs import RunError, Stopped
from runs.files import as_csv, as_figure, check_writable, write_atomically
from runs.measure import MEASURED, Case, count_flops, count_parameters, device_name, training_flops, versions
from runs.streams import run_program

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
KEYS = ("layer", "tokens", "precision", "execution")
RATIOS = {"time_ratio": "forward_backward_ms", "memory_ratio": "peak_memory_mb"}  # to the naive form
UNSEEN = "FLOPs do not include top-K, gather, softmax, normalization and element-wise work, which the counter does not see."


class Family(NamedTuple):
    config: type
    layers: tuple[str, ...]
    defaults: dict


FAMILIES = {
    "vit": Family(ViTConfig, LAYERS1D_NAMES, {"d_model": 192, "num_heads": 3, "pool": "mean", "attention_dropout": 0.0}),
    "allconvnet": Family(AllConvNetConfig, LAYERS2D_NAMES, {"channels": (64, 128)}),
}


def parse(argv: list[str]) -> tuple[str, BenchmarkConfig, list[ViTConfig | AllConvNetConfig]]:
    """Return the family, the options of the benchmark, and a config for every layer at every resolution."""
    prog = Path(sys.argv[0]).name
    words = OneLineParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("family", choices=(*FAMILIES, "targets", "host"), help="`benchmark.py vit --help` lists the options")
    name = words.parse_args(argv[:1]).family
    family = FAMILIES[name]
    about = "Measure single layers, or a backbone with its layers."
    values, parser = read_values(family.config, (BenchmarkConfig,), about, argv[1:], family.defaults, prog=f"{prog} {name}")
    try:
        check_environment()
        bench = build(BenchmarkConfig, values)
        timm = describe(values["model"]).sizes if is_timm(values.get("model")) else {}
        values = ({} if timm else family.defaults) | values
        one_layer = family.config is AllConvNetConfig and values.get("model", "allconvnet") == "allconvnet"
        if one_layer and len(values["channels"]) != 2:
            raise ValueError(
                f"channels={' '.join(map(str, values['channels']))} must be two numbers here: channels into and out of a layer"
            )
        configs, layers = [], bench.layer or family.layers
        labels = [layer_label(layer) for layer in dict.fromkeys(layers)]
        if twin := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"layer={' '.join(layers)}: two layers would be called {twin}; give the classes different names")
        given = mixer_options(family, layers, values.pop("mixer_option", None) or ())
        for side, layer in itertools.product(bench.resolution, layers):
            if family.config is ViTConfig:
                side *= (timm or values).get("patch_size", specs(ViTConfig)["patch_size"].default)
            configs.append(build(family.config, values, layer=layer, mixer_option=given[layer] or None, image_size=side))
    except ValueError as error:
        parser.error(str(error))
    if bench.baseline and (name != "vit" or "Attention" not in layers):
        parser.warn("--baseline is not used: only Attention of vit has another form")
    return name, bench, configs


def mixer_options(family: Family, layers: tuple[str, ...], given: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Give each layer its `name=value` texts. Unknown names go to all custom mixers, whose configs refuse them."""
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
# Measurements
# ---------------------------------------------------------------------------------------------------------------


def make_mixers(
    config: ViTConfig | AllConvNetConfig, batch_size: int, baseline: bool = False
) -> Iterator[tuple[str, object, object]]:
    """Yield (name, mixer, input) of the layer or, with a backbone (`--model`), of the whole network.

    With `baseline`, Attention is followed by attention with separate projections of q, k and v.
    """
    import torch

    if config.is_backbone:
        from models.build import build_network

        yield config.title, build_network(config), torch.randn(batch_size, config.in_channels, *config.image_size)
        return
    if isinstance(config, AllConvNetConfig):
        from allconvnet import make_layer2d

        x = torch.randn(batch_size, config.channels[0], *config.image_size)
        yield config.title, make_layer2d(config, *config.channels), x
        return
    from mixers.base import TokenLayout
    from vit import make_layer1d

    layout = TokenLayout(*config.grid, config.class_tokens)
    x = torch.randn(batch_size, layout.num_tokens, config.d_model)
    yield layer_label(config.layer), make_layer1d(config, layout), x
    if baseline and config.layer == "Attention":
        apart = dataclasses.replace(config, separate_qkv=True)
        yield "Attention (q, k, v apart)", make_layer1d(apart, layout), x.clone()


def measure(bench: BenchmarkConfig, configs: list, device, progress) -> list[dict]:
    """Return the rows of all layers at one resolution, measured in turns: a slow minute of the machine hits all of them."""
    import torch

    from experiments.naive import Naive, has_naive_form
    from runs.memory import is_out_of_memory

    torch._dynamo.reset()
    # Each case compiles a graph for one image, a batch and training; beyond the limit torch falls back to eager execution.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    cases, rows = [], []
    for config in configs:
        torch.manual_seed(bench.seed)
        mixers = []
        for label, mixer, x in make_mixers(config, bench.batch_size, bench.baseline):
            mixers.append((label, mixer.to(device), x.to(device)))
            if bench.against and has_naive_form(mixer):
                mixers.append((f"{label} (naive)", Naive(mixer), x.to(device)))
        for label, mixer, x in mixers:
            sides = config.image_size if isinstance(config, AllConvNetConfig) else config.grid
            tokens = math.prod(sides) + (0 if isinstance(config, AllConvNetConfig) else config.class_tokens)
            # FLOPs are per image, and the same in every precision and execution.
            facts = {"parameters": count_parameters(mixer), "forward_mflops": count_flops(mixer, x[:1]) / 1e6}
            facts["forward_backward_mflops"] = training_flops(mixer, x[:1].clone()) / 1e6
            for precision, execution in itertools.product(bench.precision, bench.execution):
                cases.append(Case(mixer, x.clone(), precision=precision, compiled=execution == "compiled"))
                rows.append(dict(zip(KEYS, (label, tokens, precision, execution), strict=True)) | facts)
    progress.total += len(cases) * (bench.repeats + 1)
    for case in cases:
        try:
            case.measure()  # warm-up: tables are built, graphs compiled
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            case.is_too_large = True
        progress.update()
        case.times = {name: [] for name in case.times}
    for case in cases * bench.repeats:
        if not case.is_too_large:
            case.measure()
        progress.update()
    rows = [
        row | (dict.fromkeys(MEASURED, math.nan) if c.is_too_large else c.row()) for c, row in zip(cases, rows, strict=True)
    ]
    return add_ratios(rows) if bench.against else rows


def add_ratios(rows: list[dict]) -> list[dict]:
    """Add time and memory of each row over those of its naive form, run in the same way; None without a naive form."""
    naive = {tuple(row[name] for name in KEYS): row for row in rows}
    result = []
    for row in rows:
        other = naive.get((f"{row['layer']} (naive)", *(row[name] for name in KEYS[1:])))
        result.append(row | {name: other and row[column] / other[column] for name, column in RATIOS.items()})
    return result


# ---------------------------------------------------------------------------------------------------------------
# Figure and files
# ---------------------------------------------------------------------------------------------------------------


def draw_scaling(rows: list[dict], title: str):
    """Plot time and peak memory against the number of tokens, all axes logarithmic."""
    from matplotlib import cycler, rcParams

    lines: dict[str, list[dict]] = {}
    many = [name for name in ("precision", "execution") if len({row[name] for row in rows}) > 1]
    for row in rows:
        lines.setdefault(", ".join([row["layer"], *(row[name] for name in many)]), []).append(row)
    panels = {"forward_backward_ms": "forward + backward (ms)", "peak_memory_mb": "peak memory of it (MB)"}
    figure, axes = make_panels(2, 2, PAGE / 2, 2.6)
    figure.suptitle(wrapped(title, figure), fontsize=7)
    tokens = sorted({row["tokens"] for row in rows})
    looks = cycler(marker=["o", "s", "^"], ls=["-", "--", ":"]) * rcParams["axes.prop_cycle"]
    for axis, (key, name) in zip(axes, panels.items(), strict=True):
        axis.set_prop_cycle(looks)
        for label, of_line in lines.items():
            axis.plot([row["tokens"] for row in of_line], [row[key] for row in of_line], ms=3, label=label)
        axis.set_xscale("log")
        axis.set_xticks(tokens, [f"{number:,}" for number in tokens])
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(log_locator([row[key] for row in rows]))
        axis.yaxis.set_major_formatter(short_number)
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


def write(rows: list[dict], folder: Path, command: str, machine: str) -> None:
    """Write benchmark.csv, benchmark.md and, with more than one size, scaling.png."""
    write_atomically(folder / "benchmark.csv", as_csv(rows))
    write_atomically(folder / "benchmark.md", f"```\n{command}\n```\n\n{machine}\n\n{as_markdown(rows)}\n\n{UNSEEN}\n")
    fits = any(not math.isnan(row["forward_backward_ms"]) for row in rows)
    if fits and len({row["tokens"] for row in rows}) > 1:
        write_atomically(folder / "scaling.png", as_figure(draw_scaling(rows, machine)))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["targets"]:
        from experiments import targets

        return targets.main(argv[1:])
    if argv[:1] == ["host"]:
        if importlib.util.find_spec("triton") is None:
            print(
                "benchmark.py: error: host measures Triton kernels; install PyTorch for CUDA, which brings Triton",
                file=sys.stderr,
            )
            return 2
        from experiments import host

        return host.main(argv[1:])
    _, bench, configs = parse(argv)
    # torch takes seconds to import: only once the options are known to be right.
    from tqdm import tqdm

    from launch.probe import probe
    from runs.devices import choose_kernels, pick_device
    from runs.memory import stop_if_out_of_memory

    folder = Path(bench.output_dir)
    try:
        device = pick_device(bench.device)
        choose_kernels(bench.kernels, device)
        check_writable(folder, "--output_dir")
        for config in configs:
            if isinstance(config, AllConvNetConfig):  # a network of the one layer that is measured
                config = dataclasses.replace(
                    config, in_channels=config.channels[0], channels=config.channels[1:], num_layers=None
                )
            with contextlib.suppress(Stopped), stop_if_out_of_memory("a trial of it"):  # its row will say so
                probe(config, device)
    except (RunError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    layers = len(configs) // len(bench.resolution)
    machine = f"{device_name(device)}, torch {versions()['torch']}, batch of {bench.batch_size}"
    command = shlex.join(["python", "benchmark.py", *argv])
    rows = []
    try:
        with tqdm(total=0, unit=" measurements", disable=None) as progress:
            for start, side in zip(range(0, len(configs), layers), bench.resolution, strict=True):
                with stop_if_out_of_memory(f"the layers at --resolution {side}", "smaller sizes, or fewer layers, need less"):
                    rows += measure(bench, configs[start : start + layers], device, progress)
                write(rows, folder, command, machine)  # what there is, in case a larger size does not end well
    except Stopped as error:
        print(f"stopped: {error}" + f"; results so far are in {folder}" * bool(rows), file=sys.stderr)
        return 1
    print(f"{machine}\n\n{as_markdown(rows)}\n\n{UNSEEN}")
    print(f"results are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
