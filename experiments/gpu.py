"""Checks and measurements on a GPU, in under ten minutes: `make gpu`.

Tests on the device, the targets of the benchmark, epochs of ViT-Tiny, and profiles of training steps. Tables and traces go to
Output/gpu, and tables into docs/dev/gpu.md between its marks `<!-- measured -->`. Without a GPU it names the parts it skips.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from options.vit import ViTConfig
from vit import ViT

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("Output/gpu")
LAYERS = ("Attention", "ConvNNAttention", "KvtAttention")
MARKED = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.S)
STEPS = 5  # of training in a profile


def run(*words: str, **environment: str) -> int:
    """Run a program with this interpreter and show its output; return its exit status."""
    print("$", *words, flush=True)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | environment).returncode


def run_tests() -> str:
    """Test the kernels against the plain form, and all models against themselves on the CPU."""
    failed = run("-m", "pytest", "-m", "gpu", "tests") or run(
        "-m", "pytest", "tests/kernels/interpreted_cuda.py", CONVNN_TEST_DEVICE="cuda"
    )
    return f"Tests on the device: {'failed' if failed else 'passed'}."


def run_targets() -> str:
    missed = run("benchmark.py", "targets", "--device", "cuda", "--output_dir", str(FOLDER / "targets"))
    table = ROOT / FOLDER / "targets" / "targets.md"
    return f"Targets: {'missed' if missed else 'met'}.\n\n" + (table.read_text(encoding="utf-8") if table.exists() else "")


def run_epochs() -> str:
    """Train ViT-Tiny at 224 x 224 on the embedded digits for two epochs; the second one counts."""
    rows = ["| layer | kernels | precision | seconds of the second epoch | peak memory, MB |", "|---|---|---|---|---|"]
    for layer in LAYERS:
        for kernels, compiled in (("auto", False), ("auto", True), ("chunked", False)):
            if layer == "Attention" and kernels == "chunked":
                continue
            folder = FOLDER / f"{layer}-{kernels}-{'compiled' if compiled else 'eager'}"
            line = "vit_main.py --config configs/vit_tiny.yaml --dataset digits --num_epochs 2 --batch_size 128 --use_amp"
            line += f" --device cuda --layer {layer} --kernels {kernels} --use_compiled {compiled} --output_dir {folder}"
            if run(*line.split()):
                rows.append(f"| {layer} | {kernels} | failed | | |")
                continue
            summary = json.loads((ROOT / folder / "summary.json").read_text(encoding="utf-8"))
            precision = "bf16, compiled" if compiled else "bf16"
            seconds, memory = summary["final"]["seconds"], summary["peak_memory_bytes"] / 1e6
            rows.append(f"| {layer} | {summary['kernels']} | {precision} | {seconds:.2f} | {memory:,.0f} |")
    return "\n".join(rows)


def run_profiles() -> str:
    texts = []
    for layer in LAYERS[:2]:
        model = ViT(ViTConfig(layer=layer, num_layers=12, num_heads=3, d_model=192, d_mlp=768)).cuda()
        images, labels = torch.randn(64, 3, 224, 224, device="cuda"), torch.randint(0, 10, (64,), device="cuda")

        def step(model=model, images=images, labels=labels):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()

        step()  # compiles the kernels
        with torch.profiler.profile() as profile:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(ROOT / FOLDER / f"trace-{layer}.json"))
        table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=12, max_name_column_width=50)
        texts.append(f"{STEPS} steps of ViT-Tiny with {layer}, 64 images, bf16:\n\n```\n{table}\n```")
    return "\n\n".join(texts)


PARTS = {"tests on the device": run_tests, "targets": run_targets, "epochs of ViT-Tiny": run_epochs, "profiles": run_profiles}


def main() -> int:
    if not torch.cuda.is_available():
        print(f"no CUDA device here; skipped: {', '.join(PARTS)}")
        return 0
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, `make gpu`"
    measured = "\n\n".join([about, *(part() for part in PARTS.values())])
    (ROOT / FOLDER / "measured.md").write_text(measured + "\n", encoding="utf-8")
    page = ROOT / "docs" / "dev" / "gpu.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(MARKED.sub(lambda marks: f"{marks[1]}{measured}\n{marks[2]}", text), encoding="utf-8")
    print(f"results are in {FOLDER} and {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
