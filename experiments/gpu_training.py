"""First contact, parts `epochs` and `profile`: ViT-Tiny at 224 x 224, epoch by epoch and kernel by kernel."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.gpu_parts import Part
from options.vit import ViTConfig
from vit import ViT

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("Attention", "ConvNNAttention", "KvtAttention")
STEPS = 5  # of training in a profile
EPOCH = 1.2  # largest allowed ratio of ConvNN attention's epoch to attention's


def run(words: list[str], seconds: float) -> int:
    """Run a program with this interpreter for at most this long; return its exit status."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def epochs(part: Part) -> None:
    """Train on the embedded digits for two epochs; the second one counts."""
    cases = [(layer, kernels, mode) for mode in (False, True) for kernels in ("auto", "chunked") for layer in LAYERS]
    seconds: dict[str, float] = {}
    for layer, kernels, compiled in cases:
        if kernels == "chunked" and (compiled or layer == "Attention"):
            continue
        name = f"{layer}, {kernels}, {'compiled' if compiled else 'eager'}"
        if part.device != "cuda" or part.is_over():
            part.add(name, f"skipped: {'no CUDA device' if part.device != 'cuda' else 'the time of this part is up'}")
            continue
        folder = part.rows.parent.resolve() / "epochs" / name.replace(", ", "-")
        line = (
            "vit_main.py --config configs/vit_tiny.yaml --dataset digits --num_epochs 2 --batch_size 256 --use_amp --overwrite"
        )
        line += f" --device cuda --layer {layer} --kernels {kernels} --use_compiled {compiled} --output_dir"
        if run([*line.split(), str(folder)], part.deadline - time.time()):
            part.add(name, "failed: see its output")
            continue
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        memory = summary["peak_memory_bytes"] / 1e6
        seconds[name] = summary["final"]["seconds"]
        part.add(name, "ok", seconds=seconds[name], peak_mb=memory, kernels=summary["kernels"])
    for execution in ("eager", "compiled"):
        theirs = [seconds[name] for name in (f"Attention, auto, {execution}",) if name in seconds]
        ours = seconds.get(f"ConvNNAttention, auto, {execution}")
        part.add_target(f"ConvNN attention / attention, {execution}", ours, theirs, EPOCH)


def profile(part: Part) -> None:
    """Write the most expensive kernels of training steps, and traces of them, beside the rows."""
    for layer in LAYERS:
        if part.device != "cuda" or part.is_over():
            part.add(layer, f"skipped: {'no CUDA device' if part.device != 'cuda' else 'the time of this part is up'}")
            continue
        model = ViT(ViTConfig(layer=layer, num_layers=12, num_heads=3, d_model=192, d_mlp=768)).cuda()
        images, labels = torch.randn(64, 3, 224, 224, device="cuda"), torch.randint(0, 10, (64,), device="cuda")

        def step(model=model, images=images, labels=labels):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()

        step()  # compiles the kernels
        with torch.profiler.profile() as profiler:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        averages = profiler.key_averages()
        table = averages.table(sort_by="self_device_time_total", row_limit=12, max_name_column_width=50)
        part.rows.with_name(f"profile-{layer}.txt").write_text(table, encoding="utf-8")
        device_ms = sum(event.self_device_time_total for event in averages) / 1e3 / STEPS
        part.add(layer, "ok", device_ms_per_step=device_ms)
