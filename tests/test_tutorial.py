"""The commands of docs/tutorial.md, one after the other, on a few of its images and with a smaller model."""

import json
import re
import shlex

import predict
import visualize
import vit_main
from tests.test_docs import ROOT

PROGRAMS = {"vit_main.py": vit_main.main, "visualize.py": visualize.main, "predict.py": predict.main}
SMALL = "--resize 32 --num_layers 1 --d_model 16 --d_mlp 16 --K 4 --num_epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu"


def test_the_tutorial_runs(tmp_path, monkeypatch, quick_results):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (images,) = (code for language, code in blocks if language == "python")
    fewer = images.replace('("train", 100), ("val", 30)', '("train", 10), ("val", 2)')
    assert fewer != images
    exec(fewer, {})
    commands = [line for language, code in blocks if not language for line in code.splitlines()]
    assert len(commands) == 10
    for command in commands:
        _, program, *words = shlex.split(command)
        small = SMALL.split() if "configs/photos.yaml" in words else []
        assert PROGRAMS[program]([*words, *small]) == 0, command
    run = tmp_path / "Output" / "ViT" / "ConvNNAttention"
    assert json.loads((run / "test_results.json").read_text())["classes"].keys() == {"rows", "columns", "checks"}
    assert len((run / "predictions.csv").read_text().splitlines()) == 1 + 6
    for name in ("photos.png", "curves.png", "photos.safetensors"):
        assert (tmp_path / "Output" / name).stat().st_size > 0
    for name in ("confusion.png", "neighbors.png", "predictions.png"):
        assert (run / name).stat().st_size > 0
