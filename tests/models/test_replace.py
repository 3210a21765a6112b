"""`--model timm:NAME` and `replace_attention`: the same logits at K = N, whole runs, and errors of one line."""

import copy
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import benchmark
import visualize
import vit_main
from convnn import replace_attention, timm_mixer
from dataset import load_data
from experiments.trained import read_options
from models.build import build_network
from options.data import DataConfig
from options.layers import LAYERS1D_ROWS
from options.vit import ViTConfig
from runs.parameters import freeze, layer_scales
from vit import ViT

timm = pytest.importorskip("timm")
from tests.helpers.timm_models import FAMILIES  # noqa: E402  it needs timm

GOOD = sorted(FAMILIES.keys() - {"tiny_scale_norm"})
OWN = '''from convnn import MultiHeadAttention
class Own(MultiHeadAttention):
    """Attention by another name."""
'''
LINE = "--dataset digits --num_epochs 1 --train_limit 20 --test_limit 10 --batch_size 10 --device cpu --lr 0.01"


def random_weights(model):
    """In float64, and large enough for a mistake anywhere to show in the logits."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            nn.init.normal_(parameter, 0.2, std=0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


# --- replace_attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["KvtAttention", "ConvNNAttention", "Attention"])
@pytest.mark.parametrize("name", GOOD)
def test_logits_of_timm_stay_at_K_of_all_tokens(name, layer):
    model, x = random_weights(timm.create_model(name, num_classes=5)), torch.randn(2, 3, 8, 8).double()
    before, tokens = model(x), 16 + FAMILIES[name][0]
    for K in (tokens, 3):
        swapped = replace_attention(copy.deepcopy(model), layer, K=K)
        assert torch.allclose(swapped(x), before, atol=1e-9, rtol=1e-9) == (K == tokens or layer == "Attention")
        assert {key for key in swapped.state_dict() if "conv" not in key} == model.state_dict().keys()
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), swapped(x))


def test_logits_of_torchvision_stay():
    from torchvision.models.vision_transformer import VisionTransformer

    model = random_weights(VisionTransformer(8, 2, 2, 4, 16, 32, num_classes=5))
    x = torch.randn(2, 3, 8, 8).double()
    before = model(x)
    torch.testing.assert_close(replace_attention(copy.deepcopy(model), "KvtAttention", K=17)(x), before, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(replace_attention(model, "KvtAttention", K=3)(x), before)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_logits_of_hugging_face_stay(qkv_bias):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=8, patch_size=2, num_labels=5, qkv_bias=qkv_bias, **sizes)
    model, x = random_weights(transformers.ViTForImageClassification(config)), torch.randn(2, 3, 8, 8).double()
    before = model(x).logits
    swapped = replace_attention(copy.deepcopy(model), "KvtAttention", K=17)
    torch.testing.assert_close(swapped(x).logits, before, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(replace_attention(model, "KvtAttention", K=3)(x).logits, before)


@pytest.mark.parametrize("layer", [layer for layer, row in LAYERS1D_ROWS.items() if row.mixes])
def test_every_mixer_trains_beside_registers(layer):
    options = {"K": 3, "kernel_size": 3, "hybrid_dilations": (1,), "num_clusters": 4, "linformer_k": 4}
    model = replace_attention(timm.create_model("tiny_registers", num_classes=5), layer, **options)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "attn" in name)


def test_windows_shift_in_every_second_block():
    model = replace_attention(timm.create_model("tiny_plain"), "Swin")
    ours = ViT(ViTConfig(layer="Swin", image_size=8, patch_size=2, num_layers=2, d_model=16, num_heads=4, d_mlp=32)).blocks
    x = torch.randn(1, 17, 16)
    for block, attention in zip(ours, (block.attn for block in model.blocks), strict=True):
        block.mixer.load_state_dict(attention.state_dict())
        torch.testing.assert_close(attention.eval()(x), block.mixer.eval()(x))


def test_a_dynamic_image_size_is_the_grid_of_that_size():
    made = {}
    for size in (8, 12):
        mixer = timm_mixer("NeighborhoodAttention", kernel_size=3, image_size=size, patch_size=2, prefix_tokens=5)
        made[size] = mixer(16, num_heads=4).eval()
    made[12].load_state_dict(made[8].state_dict())
    x = torch.randn(2, 5 + 36, 16)
    torch.testing.assert_close(made[8](x), made[12](x), atol=1e-6, rtol=1e-5)
    kwargs = {"dynamic_img_size": True, "num_classes": 5}
    model = random_weights(timm.create_model("tiny_registers", **kwargs))
    x = torch.randn(1, 3, 12, 12).double()
    before = model(x)
    torch.testing.assert_close(replace_attention(model, "Attention")(x), before, atol=1e-9, rtol=1e-9)


def test_a_custom_mixer_by_address(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    model, x = random_weights(timm.create_model("tiny_plain", num_classes=5)), torch.randn(2, 3, 8, 8).double()
    before = model(x)
    swapped = replace_attention(model, f"{tmp_path}/own.py:Own")
    assert type(swapped.blocks[0].attn).__name__ == "Own"
    torch.testing.assert_close(swapped(x), before, atol=1e-9, rtol=1e-9)


# --- runs -----------------------------------------------------------------------------------------------------------


def run(folder, *words):
    return vit_main.main([*LINE.split(), "--output_dir", str(folder), *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of every family."""
    folder = tmp_path_factory.mktemp("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runs.folder.draw_curves", lambda history, path: path.write_bytes(b""))
        patch.setattr("runs.folder.measure_latency", lambda model, image: {"latency_ms_per_image": 1.0})
        for name in GOOD:
            assert run(folder / name, "--model", f"timm:{name}", "--layer", "KvtAttention", "--K", "16") == 0
    return folder


@pytest.mark.parametrize("name", GOOD)
def test_options_follow_from_the_model(trained, name):
    values = yaml.safe_load((trained / name / "config.yaml").read_text())
    assert (values["resize"], values["interpolation"]) == (8, "bicubic")
    assert (values["mean"], values["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    sizes = ("patch_size", "d_model", "num_layers", "num_heads", "d_mlp", "proj_bias", "dropout")
    assert [values[size] for size in sizes] == [2, 16, 2, 4, 32, name != "tiny_qk_norm", 0.0]
    own = timm.create_model(name, num_classes=10).state_dict()
    saved = torch.load(trained / name / "best.pt")["model"]
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in own.items()}


def test_evaluated_for_four_K_drawn_and_measured(trained, tmp_path, quick_results):
    folder, losses = trained / "tiny_registers", []
    for K in (1, 4, 16, 21):
        line = f"--test_only --checkpoint {folder}/best.pt --K {K} --override --output_dir {tmp_path}/{K} --device cpu"
        assert vit_main.main([*line.split(), "--test_limit", "10"]) == 0
        losses.append(json.loads((tmp_path / f"{K}" / "test_results.json").read_text())["loss"])
    assert len(set(losses)) == 4
    for figure in ("attention", "neighbors"):
        assert visualize.main([figure, str(folder), "--images", "2"]) == 0
    words = "vit --model timm:tiny_registers --layer Attention KvtAttention --K 4 --resolution 4 --repeats 1 --batch_size 1"
    assert benchmark.main([*words.split(), "--device", "cpu", "--output_dir", str(tmp_path / "b")]) == 0
    assert "timm:tiny_registers with KvtAttention,21," in (tmp_path / "b" / "benchmark.csv").read_text()


def test_weights_of_timm_at_another_size_are_as_timm_resamples_them(trained, tmp_path, quick_results, capsys):
    """A file without a classifier starts a training on other classes; its positions are resampled as by timm."""
    from safetensors.torch import save_file
    from timm.layers import resample_abs_pos_embed

    weights = timm.create_model("tiny_registers", num_classes=0).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    words = ["--model", "timm:tiny_registers", "--layer", "Attention", "--checkpoint", str(tmp_path / "w.safetensors")]
    assert run(tmp_path / "run", *words, "--resize", "12", "--lr", "0", "--export", str(tmp_path / "out.safetensors")) == 0
    out = capsys.readouterr()
    assert "a new head, head.weight is not there" in out.err and "(positions from 4 x 4 to 6 x 6 patches)" in out.out
    saved = torch.load(tmp_path / "run" / "best.pt")["model"]
    expected = resample_abs_pos_embed(weights["pos_embed"], [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(saved["pos_embed"], expected, atol=1e-6, rtol=0)
    assert torch.equal(saved["blocks.1.attn.qkv.weight"], weights["blocks.1.attn.qkv.weight"])


def test_gray_images_are_repeated_before_they_are_normalized():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 1.0)
    plain = DataConfig(dataset="digits", resize=8, num_workers=0, mean=(0.0,), std=(1.0,), noise=0.1)
    (gray, _), (color, _) = (
        next(iter(load_data(config, batch_size=5, seed=0, device=torch.device("cpu"), test_only=True).test))
        for config in (plain, dataclasses.replace(plain, mean=mean, std=std))
    )
    expected = (gray.numpy() - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    np.testing.assert_allclose(color.numpy(), expected, atol=1e-6)


def test_freezing_and_layer_decay_take_timms_names(trained):
    model = build_network(read_options(trained / "tiny_distilled").model)
    scales = layer_scales(model, 0.5)
    assert [scales[name] for name in ("pos_embed", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "norm.weight")] == [
        *(0.125, 0.25, 0.5, 0.5)
    ]
    assert scales["head.weight"] == 1
    freeze(model, "backbone")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    {
        "--model timm:": "timm has no model ''",
        "--model timm:vit_tiny_patch16": "timm has no model 'vit_tiny_patch16'; did you mean vit_tiny_patch16_",
        "--model vit_tiny_patch16_224": "is not one of vit, convit_ti,",
        "--model timm:resnet18": "ResNet has no blocks of attention on one grid of patches; use a vit_*",
        "--model timm:swin_tiny_patch4_window7_224": "SwinTransformer has no blocks of attention",
        "--model timm:tiny_plain --d_model 32": "d_model=32: model=timm:tiny_plain has 16; drop d_model",
        "--model timm:tiny_plain --patch_size 4": "patch_size=4: model=timm:tiny_plain has 2; drop patch_size",
        "--model timm:tiny_plain --num_local_layers 1": "num_local_layers=1: model=timm:tiny_plain has None; drop",
        "--model timm:tiny_plain --layer KvtAttention --K 18": "K=18 is more than the 17 tokens",
        "--model timm:tiny_plain --resize 9": "patch_size=2 does not divide the 9 x 9 image",
        "--model timm:tiny_plain --mean 0.5 0.5": "mean=0.5 0.5: images of dataset=digits have 1 channel: give 1 number, or 3",
        "--model timm:tiny_plain --mean 0.5": "mean=0.5 and std=0.229 0.224 0.225 differ in length; give both",
        "--model timm:tiny_plain --interpolation cubic": "interpolation='cubic' is not one of bilinear, bicubic",
        "--model timm:tiny_qk_norm --layer ViG --K 3": "ViG has no norm of queries and keys",
        "--model timm:tiny_plain --layer Identity": "a class token sees no patch without mixing; use a model without one",
        "--model timm:tiny_scale_norm --layer KvtAttention --K 3": "its output has a gate or a norm, and no mixer has one",
        "--model timm:eva02_tiny_patch14_224 --layer KvtAttention --resize 28 --K 3": "Eva has no attention that a mixer can",
        "--model timm:tiny_plain --checkpoint W.pt": "of another architecture: it has no cls_token",
    }.items(),
)
def test_wrong_uses_are_one_line(line, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"patch_embed.proj.weight": torch.zeros(16, 3, 2, 2)}, "W.pt")
    with pytest.raises(SystemExit) as stop:
        run("out", *line.split())
    (text,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and says in text


@pytest.mark.parametrize(
    ("layer", "options", "says"),
    [
        ("KvtAttention", {"k": 3}, "k=3 is no option of a mixer; did you mean K?"),
        ("KvtAttention", {"K": 3, "d_model": 8}, "d_model comes from the model; drop it"),
        ("KvtAttention", {"K": 3, "image_size": 8}, "image_size comes from the model; drop it"),
        ("KvtAttention", {"K": 99}, "K=99 is more than the 17 tokens"),
        ("Kvt", {}, "layer='Kvt' is not one of"),
    ],
)
def test_wrong_options_in_python(layer, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        replace_attention(timm.create_model("tiny_plain"), layer, **options)


def test_a_model_without_attention_or_replaced_before():
    replaced = replace_attention(timm.create_model("tiny_plain"), "KvtAttention", K=3)
    for model, says in (
        (nn.Linear(2, 2), "has no attention that a mixer can replace; a ViT, "),
        (replaced, "is replaced already"),
    ):
        with pytest.raises(ValueError, match=says):
            replace_attention(model, "KvtAttention", K=3)


def test_weights_of_timm_without_a_model_say_what_loads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm.list_models", lambda pattern: ["tiny_plain", "tiny_registers"])
    torch.save(timm.create_model("tiny_registers", num_classes=3, img_size=12).state_dict(), tmp_path / "w.pt")
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--checkpoint", str(tmp_path / "w.pt"), "--resize", "16")
    (text,) = capsys.readouterr().err.splitlines()
    assert text.endswith("; it is timm's tiny_registers, which --model timm:tiny_registers loads")
