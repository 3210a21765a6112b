"""Images that are no squares, and a trained model on images of another size than it was trained on."""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import allconvnet_main
import vit_main
from allconvnet import AllConvNet
from dataset import DeviceBatches, Recipe, load_data
from options.allconvnet import AllConvNetConfig
from options.data import DataConfig
from options.layers import LAYERS1D_NAMES
from options.runs import PROGRAMS, parse_options
from options.vit import ViTConfig
from readers.augmentation import resize_images
from tests.helpers.narrow import narrow_backbones
from tests.helpers.pools import pool_of
from vit import ViT

ALONG_THE_SEQUENCE = ("ConvNN", "Conv1d", "Linformer", "RandomMixing", "MlpMixer", "GFNet")  # parameters for every token
SMALL = {"patch_size": 4, "num_layers": 1, "num_heads": 2, "d_model": 16, "d_mlp": 16, "pos_embedding": "learned"}
SMALL |= {"K": 3, "kernel_size": 3, "hybrid_dilations": (1,)}


def resolved(line, program="vit_main.py"):
    return parse_options(PROGRAMS[program], "", shlex.split(line), prog=program)[0]


# --- the option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_number_is_a_square_and_two_are_height_and_width(program, tmp_path):
    for line, size, sides in (("32 48", (32, 48), (32, 48)), ("32", 32, (32, 32)), ("32 32", 32, (32, 32))):
        options = resolved(f"--dataset cifar10 --resize {line}", program)
        assert options.data.resize == size and options.model.image_size == sides
        file = tmp_path / "c.yaml"
        text = "[32, 48]" if line == "32 48" else line.split()[0]
        file.write_text(f"resize: {text}\n")
        assert resolved(f"--config {file}", program).as_dict() == options.as_dict()


@pytest.mark.parametrize("line", ["8 16 24", "0", "16 0", "16 x", "16 1e9", "", "16 -4"])
def test_what_is_no_size_is_one_line(line, capsys):
    with pytest.raises(SystemExit) as end:
        resolved(f"--resize {line}")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "resize" in error


# --- the images -----------------------------------------------------------------------------------------------------


def test_images_on_the_device_are_resized_as_by_pil():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 20)).astype(np.uint8)
    ours = resize_images(torch.from_numpy(images), (12, 28))
    for image, out in zip(images, ours, strict=True):
        pil = Image.fromarray(image.transpose(1, 2, 0)).resize((28, 12), Image.Resampling.BILINEAR)
        assert np.abs(out.permute(1, 2, 0).numpy() - np.array(pil).astype(np.float32)).max() <= 1
    recipe = Recipe("cifar10", "train", 2, 0, (12, 28), torch.device("cpu"), augment=True, noise=0.1)
    batches = DeviceBatches(images, np.arange(3), np.arange(3), recipe)
    assert [tuple(x.shape) for x, _ in batches.epoch(0)] == [(2, 3, 12, 28), (1, 3, 12, 28)]
    native = dataclasses.replace(recipe, part="test", augment=False, noise=0.0, resize=(20, 20))
    square = dataclasses.replace(native, resize=20)
    for one, other in zip(
        *(DeviceBatches(images, np.arange(3), np.arange(3), r).epoch(0) for r in (native, square)), strict=True
    ):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("size", [(40, 30), (30, 47)])
@pytest.mark.parametrize("resize", [(14, 28), (28, 14), (21, 28)])
def test_images_of_files_cover_the_size_and_are_cropped_around_their_center(size, resize, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            picture.save(tmp_path / part / name / "0.png")
    config = DataConfig(dataset="folder", data_path=str(tmp_path), resize=resize, num_workers=0, augment=True)
    data = load_data(config, batch_size=2, seed=0, device=torch.device("cpu"))
    (image, _), _ = next(data.test.epoch(0))
    rows, columns = (round(side * 256 / 224) for side in resize)
    scale = max(rows / size[0], columns / size[1])
    height, width = max(rows, math.floor(size[0] * scale + 1e-9)), max(columns, math.floor(size[1] * scale + 1e-9))
    expected = np.array(picture.resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)
    top, left = round((height - resize[0]) / 2), round((width - resize[1]) / 2)
    expected = torch.from_numpy(expected[top : top + resize[0], left : left + resize[1]]).permute(2, 0, 1)
    mean, std = data.test._mean, data.test._std
    torch.testing.assert_close((image * std + mean) * 255, expected, atol=1e-3, rtol=0)
    assert next(data.train.epoch(0))[0].shape == (2, 3, *resize)


# --- a ViT on other grids -------------------------------------------------------------------------------------------


def interpolated(positions, old, new, class_tokens):
    """Bicubic, antialiased, class token apart: torchvision's resize of the grid as an image."""
    grid = positions[0, class_tokens:].T.unflatten(1, old)[None]
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)[0]
    return torch.cat([positions[0, :class_tokens], grid.flatten(1).T])[None]


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_a_vit_on_images_of_another_size(layer):
    """It is the model made for that size, with its weights and interpolated positions; and then itself again."""
    pool = pool_of(layer, ("cls", "mean")[LAYERS1D_NAMES.index(layer) % 2])
    options = {"sampling_type": "spatial", "num_samples": 3, "similarity_type": "Loc_Col"} if pool == "cls" else {}
    config = ViTConfig(layer=layer, pool=pool, image_size=(16, 24), **SMALL, **options)
    model = ViT(config).double().eval()
    other_config = dataclasses.replace(config, image_size=(32, 24))
    images = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    if layer in ALONG_THE_SEQUENCE:
        with pytest.raises(ValueError, match=f"layer={layer} has parameters for every token .* 4 x 6 .* not on 8 x 6"):
            model(images)
        return
    before = model(torch.ones(1, 3, 16, 24, dtype=torch.float64))
    for _ in range(2):  # weights that change are seen
        other = ViT(other_config).double().eval()
        weights = model.state_dict()
        weights["pos_embedding"] = interpolated(weights["pos_embedding"], (4, 6), (8, 6), int(pool == "cls"))
        other.load_state_dict(weights)
        logits, matrices = model(images, output_attentions=True)
        expected, theirs = other(images, output_attentions=True)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)  # positions are interpolated in float32
        for mine, matrix in zip(matrices, theirs, strict=True):
            assert mine is matrix is None or torch.allclose(mine, matrix)
        assert torch.equal(model(torch.ones(1, 3, 16, 24, dtype=torch.float64)), before)
        with torch.no_grad():
            model.classifier.bias += 1
        before = before + 1
    model.train()(images).sum().backward()
    assert model.pos_embedding.grad.any() and model.classifier.weight.grad.any()
    assert set(model.state_dict()) == set(weights)


def test_what_no_other_grid_can_be_is_one_line():
    model = ViT(ViTConfig(layer="NeighborhoodAttention", image_size=16, **SMALL))
    for size, message in (((16, 18), "patch_size=4 does not divide the 16 x 18 image"), ((8, 16), "kernel_size=3 .* 2 x 4")):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(1, 3, *size))


def test_sinusoidal_positions_and_half_precision():
    model = ViT(ViTConfig(image_size=16, **SMALL | {"pos_embedding": "sinusoidal"})).bfloat16().eval()
    assert model(torch.randn(1, 3, 12, 20).bfloat16()).dtype == torch.bfloat16
    other = ViT(dataclasses.replace(model.config, image_size=(12, 20))).bfloat16().eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 12, 20).bfloat16()
    assert torch.equal(model(images), other(images))


# --- a checkpoint on images of another size -------------------------------------------------------------------------


def run(program, line, *more):
    return program.main([*shlex.split(line), *more])


VIT = "--dataset digits --resize 8 --patch_size 2 --num_layers 1 --num_heads 2 --d_model 8 --d_mlp 8 --pos_embedding learned"
QUICK = "--batch_size 8 --train_limit 16 --test_limit 8 --num_epochs 1 --device cpu"


@pytest.mark.usefixtures("quick_results")
@pytest.mark.parametrize(
    ("program", "line"),
    [
        (vit_main, f"{VIT} --layer MaskedAttention"),
        (
            allconvnet_main,
            "--dataset digits --channels 4 --layer Conv2d/ConvNN --aggregation_type Loc_Col --shuffle_pattern NA",
        ),
        (allconvnet_main, "--dataset digits --model resnet18 --resize 8 --layer ConvNN --replace last 2"),
    ],
)
def test_test_only_on_another_size(program, line, tmp_path, monkeypatch, capsys):
    """A line says so and test_results.json has it; a backbone keeps the K that it was trained with."""
    narrow_backbones(monkeypatch)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run(program, f"{line} {QUICK} --output_dir out") == 0
    capsys.readouterr()
    test = "--test_only --checkpoint out/best.pt --test_limit 8 --device cpu --output_dir out --resize 12 16"
    assert run(program, test) == 0
    warnings = [each for each in capsys.readouterr().err.splitlines() if "warning" in each]
    assert warnings == ["warning: out/best.pt was trained with --resize 8, here 12 16"]
    results = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert results["override"] == {"resize": {"trained": 8, "here": [12, 16]}} and results["options"]["resize"] == [12, 16]
    assert results["images"] == 8 and math.isfinite(results["loss"]) and results["flops_per_image"] > 0


@pytest.mark.usefixtures("quick_results")
def test_parameters_for_every_token_refuse_another_size(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run(vit_main, f"{VIT} --layer Conv1d {QUICK} --output_dir out") == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(vit_main, "--test_only --checkpoint out/best.pt --device cpu --output_dir out --resize 12")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "--layer Conv1d has parameters for every token, so it runs on the 4 x 4 patches" in error
    assert not Path("out/test_results.json").exists()


def test_a_network_of_layers_that_see_no_size_runs_on_another():
    model = AllConvNet(AllConvNetConfig(layer="Conv2d/ConvNN", channels=(8,), K=3, image_size=8, aggregation_type="Loc_Col"))
    other = AllConvNet(dataclasses.replace(model.config, image_size=(12, 10)))
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 12, 10)
    torch.testing.assert_close(model.eval()(images), other.eval()(images))
