"""`--crop`, `--interpolation`, `--mean`, `--std`: as Pillow and NumPy compute them, and carried by every file of a run."""

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import predict
import vit_main
from dataset import DeviceBatches, Recipe, read_image
from options.data import DataConfig
from readers.augmentation import resize_images
from tests.helpers.data import random_images

ROOT = Path(__file__).parent.parent
LINE = "--dataset digits --num_epochs 1 --train_limit 20 --test_limit 10 --batch_size 10 --device cpu --lr 0.01 --patch_size 4 "
LINE += "--num_layers 1 --num_heads 1 --d_model 8 --d_mlp 8 --resize 8 12"


def picture(path, width=40, height=28):
    image = Image.fromarray(random_images(1, size=64)[0].transpose(1, 2, 0)).resize((width, height), 3)
    image.save(path)
    return image


@pytest.mark.parametrize(("interpolation", "number"), [("bilinear", 2), ("bicubic", 3)])
def test_small_images_are_resized_and_cropped_as_by_pillow(interpolation, number):
    images = random_images(3) // 2 + 64  # Pillow clips between its two passes
    expected = {}
    for crop, size, box in (("squash", (12, 20), None), ("center", (20, 20), (4, 0, 16, 20)), (None, (12, 20), None)):
        pictures = [Image.fromarray(image.transpose(1, 2, 0)).resize(size, number).crop(box) for image in images]
        expected[crop] = np.stack([np.asarray(one).transpose(2, 0, 1) for one in pictures])
    for crop, pixels in expected.items():
        statistics = {"statistics": ((0.0,) * 3, (1.0,) * 3), "interpolation": interpolation, "crop": crop}
        recipe = Recipe("cifar10", "test", 3, 0, (20, 12), torch.device("cpu"), **statistics)
        ours, _ = next(iter(DeviceBatches(images, np.arange(3), np.arange(3), recipe)))
        np.testing.assert_allclose(ours.numpy() * 255, pixels, atol=1.01)


@pytest.mark.parametrize("dataset", ["folder", "cifar10"])
def test_files_are_read_as_by_pillow(dataset, tmp_path):
    image = picture(tmp_path / "a.png")
    how = {"dataset": dataset, "resize": (28, 14), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0), "interpolation": "bicubic"}
    squashed = np.asarray(image.resize((14, 28), 3))
    side = (32, 16) if dataset == "folder" else (28, 14)
    wide = image.resize((side[0] * 40 // 28, side[0]), 3)
    left, top = round((wide.width - 14) / 2), round((wide.height - 28) / 2)
    for crop, pixels in (("squash", squashed), (None, np.asarray(wide.crop((left, top, left + 14, top + 28))))):
        expected = (pixels / 255 - how["mean"]) / how["std"]
        ours = read_image(tmp_path / "a.png", DataConfig(**how, crop=crop))
        np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_resizing_in_cubics_stays_between_black_and_white():
    images = torch.tensor([0.0, 255.0]).repeat(1, 1, 8, 4)
    out = resize_images(images, (8, 21), "bicubic")
    assert out.min() == 0 and out.max() == 255 and torch.equal(out, out.round())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preprocessing")
    words = [*LINE.split(), "--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.25", "1", "--interpolation", "bicubic"]
    pytest.importorskip("onnxruntime")
    for name in ("m.onnx", "w.safetensors"):
        assert vit_main.main([*words, "--output_dir", str(folder / "run"), "--overwrite", "--export", str(folder / name)]) == 0
    return folder


def test_every_file_of_a_run_holds_the_preprocessing(trained):
    noted = json.loads((trained / "run" / "summary.json").read_text())["preprocessing"]
    assert noted == {
        **{"mode": "L", "size": [8, 12], "crop": "center", "cover": [8, 12], "interpolation": "bicubic"},
        **{"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1.0]},
    }
    with safe_open(trained / "w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["preprocessing"]) == noted
        assert json.loads(file.metadata()["class_names"]) == [str(number) for number in range(10)]
    assert torch.load(trained / "run" / "best.pt")["config"]["mean"] == noted["mean"]


def test_onnx_without_torch_gives_the_numbers_of_predict(trained, tmp_path, capsys):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, size in zip(files, ((40, 28), (15, 31)), strict=True):
        picture(file, *size)
    assert predict.main(["--run", str(trained / "run"), *map(str, files), "--output", str(tmp_path / "out.csv")]) == 0
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / "run_onnx.py"))["main"](str(trained / "m.onnx"), *map(str, files))
    with open(tmp_path / "out.csv", newline="") as table:
        for row, line in zip(csv.DictReader(table), capsys.readouterr().out.splitlines(), strict=True):
            name, share = line.rpartition(": ")[2].split()
            assert name == row["class_1"] and abs(float(share) - float(row["probability_1"])) < 1e-5


@pytest.mark.parametrize("file", ["run/best.pt", "w.safetensors"])
def test_fine_tuning_under_other_statistics_is_a_warning(file, trained, tmp_path, quick_results, capsys):
    words = [*LINE.split(), "--output_dir", str(tmp_path / "out"), "--checkpoint", str(trained / file)]
    assert vit_main.main([*words, "--std", "0.5", "0.25", "1", "--mean", "0.5", "0.5", "0.5"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "was trained with" in line]
    assert line.endswith("was trained with --interpolation bicubic, here bilinear; --mean 0.1 0.2 0.3, here 0.5 0.5 0.5")


def test_evaluation_keeps_the_preprocessing_and_refuses_another(trained, tmp_path, capsys):
    words = ["--test_only", "--checkpoint", str(trained / "run" / "best.pt"), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert vit_main.main([*words, "--test_limit", "10"]) == 0
    options = json.loads((tmp_path / "test_results.json").read_text())["options"]
    assert (options["mean"], options["interpolation"], options["resize"]) == ([0.1, 0.2, 0.3], "bicubic", [8, 12])
    with pytest.raises(SystemExit):
        vit_main.main([*words, "--mean", "0", "0", "0"])
    assert "was trained with --mean 0.1 0.2 0.3, not 0.0 0.0 0.0; leave --mean out" in capsys.readouterr().err


def test_a_run_of_before_the_options_is_resumed(tmp_path, quick_results, capsys):
    words = [*LINE.split(), "--output_dir", str(tmp_path / "run"), "--resume"]
    assert vit_main.main(words) == 0
    state = torch.load(tmp_path / "run" / "last.pt")
    for name in ("mean", "std", "crop", "interpolation"):
        del state["config"][name]
    torch.save(state, tmp_path / "run" / "last.pt")
    assert vit_main.main([*words, "--num_epochs", "2"]) == 0
    state["config"]["mean"] = [0.5]
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(SystemExit):
        vit_main.main([*words, "--num_epochs", "3"])
    assert "was trained with --mean 0.5, not 0.3054; give it as it was" in capsys.readouterr().err
