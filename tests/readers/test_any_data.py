"""Data sets of torchvision and Hugging Face, and class folders in archives: trained, killed, resumed, evaluated, predicted."""

import importlib.util
import json
import shlex

import pytest
import torch
from PIL import Image

import predict
import train_eval
import vit_main
from dataset import load_data
from options.data import DataConfig, info_of
from options.libraries import TORCHVISION, open_hub
from options.storage import find_part
from readers.libraries import _class_names
from tests.helpers import any_data
from tests.helpers.data import CPU, everything, load, write_folder

needs_hub = pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the extra: pip install datasets")
MODEL = "--resize 16 --patch_size 8 --num_layers 1 --num_heads 1 --d_model 8 --d_mlp 8 --dropout 0.1 --augment --lr 0.01 "
MODEL += "--batch_size 4 --num_epochs 2 --num_workers 0 --device cpu --save_minutes 1e-9 --no-download"

WRITERS = [
    pytest.param(lambda root, _: any_data.write_archives(root, "tar"), id="tar"),
    pytest.param(lambda root, _: any_data.write_archives(root, "zip"), id="zip"),
    pytest.param(any_data.write_svhn, id="svhn"),
    pytest.param(any_data.write_eurosat, id="eurosat"),
    pytest.param(any_data.write_flowers, id="flowers"),
    pytest.param(any_data.write_saved, id="saved", marks=needs_hub),
    pytest.param(any_data.write_parquet, id="parquet", marks=needs_hub),
]


def run(line, folder, words=""):
    return vit_main.main(shlex.split(f"{line} --output_dir {folder} {words}"))


@pytest.mark.parametrize("write", WRITERS)
def test_trained_killed_resumed_evaluated_and_predicted(write, tmp_path, monkeypatch):
    name, root = write(tmp_path / "data", monkeypatch)
    line = f"{MODEL} --dataset {name} --data_path {root}"
    assert run(line, tmp_path / "whole") == 0
    original, steps = train_eval.train_step, []

    def train_step(*args):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_eval, "train_step", train_step)
        assert run(line, tmp_path / "killed") == 130
    assert run(line, tmp_path / "killed", "--resume") == 0
    whole, killed = (torch.load(tmp_path / folder / "last.pt", weights_only=True) for folder in ("whole", "killed"))
    assert all(torch.equal(killed["model"][key], value) for key, value in whole["model"].items())
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["data"] == json.loads((tmp_path / "killed" / "summary.json").read_text())["data"]

    assert run(f"--device cpu --num_workers 0 --no-download --test_only --checkpoint {tmp_path / 'whole' / 'best.pt'}", "x") == 0
    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    words = ["--run", str(tmp_path / "whole"), str(tmp_path / "one.png"), "--output", str(tmp_path / "out.csv")]
    assert predict.main(words) == 0
    assert (tmp_path / "out.csv").read_text().count("\n") == 2
