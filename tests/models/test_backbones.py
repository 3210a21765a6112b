"""VGG, ResNet and DenseNet, with torchvision's as the reference, and with every layer in place of their convolutions.

torchvision's weights cannot be downloaded here: they are random, which says as much of the architecture.
"""

import itertools
import math
import re
import shlex

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import allconvnet
import allconvnet_main
from layers2d import Attention2d, CoordConv2d
from models.backbones import fitted_options, plan
from models.build import build_network, load_network_weights
from options.allconvnet import AllConvNetConfig
from options.backbones import BACKBONES
from options.layers import LAYERS2D_NAMES
from options.runs import PROGRAMS, parse_options
from runs.measure import count_flops, count_parameters
from tests.helpers.narrow import narrow_backbones

LAYERS = [*LAYERS2D_NAMES, "Conv2d/ConvNN"]


def make(model="resnet18", **options):
    return build_network(AllConvNetConfig(model=model, **{"K": 3, "num_classes": 5} | options))


@pytest.fixture
def narrow(monkeypatch):
    narrow_backbones(monkeypatch)


# --- torchvision ----------------------------------------------------------------------------------------------------


def pair(name, **options):
    """Ours with Conv2d, and torchvision's."""
    plain = name.removesuffix("_bn")
    ours = make(plain, layer="Conv2d", batch_norm=name != plain, num_classes=1000, **options)
    return ours, torchvision.models.get_model(name)


@pytest.mark.parametrize("name", [*BACKBONES, "vgg11_bn"])
def test_with_convolutions_parameters_and_flops_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = pair(name, image_size=224)
        image = torch.empty(1, 3, 224, 224)
        assert count_flops(ours, image) == count_flops(theirs, image) > 1e9
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    assert count_parameters(ours) == count_parameters(theirs)


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "resnet18", "resnet50", "densenet121"])
def test_logits_are_torchvisions_with_its_weights(name):
    """In training too, with all gradients. VGG's 100 million weights of linears are fewer here: the shapes are tested above."""
    is_vgg = name.startswith("vgg")
    size = 32 if is_vgg else 64
    with torch.device("meta"):
        ours, theirs = pair(name, image_size=size, stem="imagenet", classifier_width=32 if is_vgg else None)
        if is_vgg:
            for number, sizes in ((0, (25088, 32)), (3, (32, 32)), (6, (32, 1000))):
                theirs.classifier[number] = nn.Linear(*sizes)
    for module in (*ours.to_empty(device="cpu").modules(), *theirs.to_empty(device="cpu").modules()):
        getattr(module, "reset_parameters", lambda: None)()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1)  # of BatchNorm, where the initial ones and zeros would hide a mistake
    load_network_weights(ours, theirs.state_dict())
    images, labels = torch.randn(2, 3, size, size), torch.tensor([1, 7])
    for model in (ours, theirs):
        torch.manual_seed(1)  # of dropout
        F.cross_entropy(model.train()(images), labels).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
    logits = ours.eval()(images)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, theirs.eval()(images), atol=1e-5, rtol=1e-5)


def test_initialization_is_torchvisions():
    """Moments of the weights of every convolution, all of BatchNorm, and for VGG, which takes long to make, by the formula."""
    for name in ("resnet18", "densenet121"):
        ours, theirs = pair(name, image_size=224)
        for key, value in ours.state_dict().items():
            other = theirs.state_dict()[key]
            if value.ndim == 4:
                torch.testing.assert_close(value.std(), other.std(), rtol=0.1, atol=0)
                assert value.mean().abs() < 0.1 * value.std()
            elif not key.startswith("fc") and key != "classifier.weight":
                assert torch.equal(value, other)
    vgg = make("vgg11", layer="Conv2d", image_size=224, classifier_width=32)
    for module in vgg.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            convolution = isinstance(module, nn.Conv2d)
            expected = math.sqrt(2 / (9 * module.out_channels)) if convolution else 0.01
            torch.testing.assert_close(module.weight.std().item(), expected, rtol=0.1, atol=0)
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "options", "advice"),
    [
        ("vgg11", {}, "--stem imagenet --classifier_width 4096"),
        ("vgg11_bn", {"stem": "imagenet", "classifier_width": 4096}, "--batch_norm"),
        ("vgg11", {"batch_norm": True, "stem": "imagenet", "classifier_width": 4096}, "--no-batch_norm"),
        ("resnet18", {}, "--stem imagenet"),
        ("resnet50", {}, "--stem imagenet"),
        ("densenet121", {}, "--stem imagenet"),
    ],
)
def test_weights_that_do_not_fit_come_with_advice(name, options, advice):
    plain = name.removesuffix("_bn")
    with torch.device("meta"):
        model = build_network(AllConvNetConfig(model=plain, layer="Conv2d", num_classes=1000, **options))
        weights = torchvision.models.get_model(name).state_dict()
    with pytest.raises(ValueError, match=re.escape(advice) + "$"):
        load_network_weights(model, weights)


# --- every layer ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "layer"), [*(("resnet18", layer) for layer in LAYERS), *((name, "ConvNN_Attn") for name in BACKBONES[1:])]
)
def test_every_layer_trains_a_step_in_every_backbone(name, layer):
    vgg = name.startswith("vgg")
    side = 32 if vgg else 16
    model = make(name, layer=layer, num_heads=2, image_size=side, classifier_width=16 if vgg else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(2, 3, side, side), torch.arange(2)
    F.cross_entropy(model(images), labels).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # Before BatchNorm a bias has none by nature, and after a softmax that of the keys.
        assert parameter.grad.any() or key.endswith("bias"), key
    optimizer.step()
    assert F.cross_entropy(model(images), labels).isfinite()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *itertools.product(["vgg11", "resnet18"], [(32, 32), (32, 36)]),
        ("resnet50", (16, 20)),
        ("densenet121", (16, 20)),
    ],
)
def test_by_location_a_backbone_is_its_convolutional_self(name, size):
    """Strides too: what is left of a map are the rows and columns that a convolution with a stride computes."""
    location = {"similarity_type": "Loc", "padding": 1, "K": 9}
    width = 16 if name == "vgg11" else None
    theirs = make(name, layer="Conv2d", image_size=size, classifier_width=width).double()
    ours = make(name, layer="ConvNN", image_size=size, classifier_width=width, **location).double()
    values = iter(theirs.state_dict().values())
    with torch.no_grad():
        for mine in ours.state_dict().values():
            other = next(values)
            mine.copy_(other.flatten(2) if mine.ndim == 3 else other)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), atol=1e-9, rtol=0)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "densenet121"])
@pytest.mark.parametrize(
    "words",
    [("all",), ("last", 1), ("last", "4"), ("stages", 3, 4), ("stages", "1")],
    ids=lambda words: " ".join(map(str, words)),
)
def test_replace_says_which(name, words):
    with torch.device("meta"):
        model = make(name, layer="Attention", num_heads=2, replace=words)
    found = []  # of every 3 x 3 convolution in order: its stage, and whether it is replaced
    for key, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, Attention2d)) and getattr(module, "kernel_size", (3, 3)) == (3, 3):
            found.append((key, isinstance(module, Attention2d)))
    stages = stages_of(name, [key for key, _ in found])
    rest = [int(word) for word in words[1:]]
    expected = [
        words[0] == "all" or (stage in rest if words[0] == "stages" else number >= len(found) - rest[0])
        for number, stage in enumerate(stages)
    ]
    assert [replaced for _, replaced in found] == expected and any(expected)


def stages_of(name, keys):
    """By torchvision's names: layer1.0.conv1 is of stage 1, as is the stem; of VGG by the poolings before it."""
    if name != "vgg11":
        found = [re.search(r"(?:layer|denseblock)(\d)\.", key) for key in keys]
        return [1 if match is None else int(match[1]) for match in found]
    poolings = [2, 5, 10, 15, 20]
    return [1 + sum(pooling < int(key.split(".")[1]) for pooling in poolings) for key in keys]


@pytest.mark.usefixtures("narrow")
def test_layers_fit_their_maps():
    """K, and samples, where a map has fewer tokens; said in a line each."""
    config = AllConvNetConfig(model="vgg11", layer="ConvNN/ConvNN_Attn", sampling_type="random", num_samples=20)
    fitted = [(each.grid[0], each.layer.K, each.layer.num_samples) for each in plan(config)[1]]
    assert fitted == [(32, 9, 20), (16, 9, 20), (8, 9, 20), (8, 9, 20), (4, 9, -1), (4, 9, -1), (2, 4, -1), (2, 4, -1)]
    assert build_network(config).features[16].first.select.neighbors.K == 4
    ring = AllConvNetConfig(model="vgg11", layer="ConvNN", padding=1)
    assert [each.layer.K for each in plan(ring)[1]] == [9] * 8  # a ring around 2 x 2 tokens makes 16

    line = "--model vgg11 --sampling_type spatial --num_samples 3 --replace stages 4 5"
    resolved, _ = parse_options(PROGRAMS["allconvnet_main.py"], "", shlex.split(line), prog="p")
    assert fitted_options(resolved.model) == [
        "--K 9 does not fit all maps of --model vgg11: it is 4 on the 2 x 2 map of stage 5",
        "--num_samples 3 does not fit all maps of --model vgg11: it is all on the 2 x 2 map of stage 5",
    ]
    resolved, _ = parse_options(PROGRAMS["allconvnet_main.py"], "", ["--model", "vgg11", "--replace", "last", "4"], prog="p")
    assert len(fitted_options(resolved.model)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, "model=vgg11 .* 32 x 32, not 8 x 8; use resize"),
        ({"image_size": (8, 7), "model": "densenet121"}, "model=densenet121 .* three times .* 8 x 8, not 8 x 7; use resize"),
        ({"image_size": 28, "model": "densenet121", "stem": "imagenet"}, "five times .* 29 x 29, not 28 x 28"),
        ({"replace": ("some",)}, "replace=some is neither all"),
        ({"replace": ("last",)}, "replace=last is neither"),
        ({"replace": ("last", "x")}, "replace=last x is neither"),
        ({"replace": ("all", "2")}, "replace=all 2 is neither"),
        ({"replace": ("last", "0")}, "last 1 to last 8"),
        ({"replace": ("last", "9")}, "replace=last 9: model=vgg11 has 8 convolutions"),
        ({"replace": ("stages", "6")}, "stages 1 to 5"),
        ({"replace": ("stages", "5"), "model": "resnet18"}, "model=resnet18 has the stages 1 to 4"),
        ({"shuffle_pattern": "B"}, "shuffle_pattern=B .* model=vgg11"),
        (
            {"shuffle_pattern": "BA", "image_size": 40},
            "layer=ConvNN on the 5 x 5 map of stage 4 of model=vgg11: shuffle",
        ),
        ({"layer": "Attention", "num_heads": 3}, "on the 32 x 32 map of stage 1 of model=vgg11: num_heads=3"),
        ({"layer": "Conv2d", "kernel_size": 4, "model": "resnet18"}, "kernel_size=4 must be odd in model=resnet18"),
        ({"sampling_type": "spatial", "num_samples": 2}, "K=9 is more than the 4 candidates"),
        ({"layer": "ConvNN_Attn", "aggregation_type": "Loc_Col", "convolution_type": "depthwise"}, "not depthwise"),
        ({"model": "vgg12"}, "did you mean vgg1"),
        ({"stem": "large"}, "small, imagenet"),
        ({"classifier_width": 0}, "classifier_width=0"),
    ],
)
def test_what_does_not_fit_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        plan(AllConvNetConfig(**{"model": "vgg11"} | options))


# --- scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "more"),
    [
        *((layer, {}) for layer in LAYERS),
        ("ConvNN_Attn", {"convolution_type": "depthwise"}),
        ("ConvNN", {"shuffle_pattern": "BA"}),
        ("ConvNN", {"convolution_type": "depthwise"}),
        ("ConvNN", {"convolution_type": "depthwise-separable"}),
    ],
)
def test_without_batch_norm_layers_keep_the_scale_of_their_input(layer, more):
    """Root mean squares after ReLU over those before the layer; the first layer has three channels, as torchvision's."""
    model = make("vgg11", layer=layer, K=9, replace=("stages", 2, 3), **more).eval()
    ratios = []

    def record(module, given, out):
        ratios.append((out.relu().square().mean() / given[0].square().mean()).item())

    for module in model.features[3:10]:
        if not isinstance(module, (nn.ReLU, nn.MaxPool2d)):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(F.interpolate(torch.randn(2, 3, 8, 8), (32, 32), mode="bicubic"))
    least = 0.03 if layer == "Pooling" else 1 / 3  # averages are about the pixels they are subtracted from
    assert len(ratios) == 3 and all(least < ratio < 3 for ratio in ratios), ratios


# --- coordinates and strides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(5, 7), (1, 4)])
def test_convolution_with_coordinates_appended(size, stride):
    config = AllConvNetConfig(layer="Conv2d", aggregation_type="Loc_Col", channels=(4,), image_size=size)
    layer = allconvnet.make_layer2d(config, 3, 4, stride=stride).double()
    assert type(layer) is CoordConv2d
    for grid in (size, (6, 3)):  # a size that it was not made for, too
        images = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
        along = [torch.linspace(-1, 1, side, dtype=torch.float64) if side > 1 else torch.zeros(1).double() for side in grid]
        rows, columns = torch.meshgrid(*along, indexing="ij")
        joined = torch.cat([images, torch.stack([rows, columns]).expand(2, -1, -1, -1)], dim=1)
        expected = F.conv2d(F.pad(joined, (1, 1, 1, 1)), layer.conv.weight, layer.conv.bias)[:, :, ::stride, ::stride]
        ours = layer(images)
        torch.testing.assert_close(ours, expected)
        direction = torch.randn_like(ours)
        for mine, other in zip(
            *(torch.autograd.grad(out, [images, *layer.parameters()], direction) for out in (ours, expected)), strict=True
        ):
            torch.testing.assert_close(mine, other)


def test_options_of_attention_reach_the_layers():
    config = AllConvNetConfig(
        layer="ConvNN_Attn/Attention", attention_dropout=0.25, convolution_type="depthwise", channels=(8,)
    )
    layer = allconvnet.make_layer2d(config, 3, 8)
    assert layer.first.dropout.p == layer.second.attention_dropout == 0.25
    assert layer.first.conv.groups > 1 and AllConvNetConfig().convolution_type == "standard"


# --- what a run does with them --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "densenet121"])
def test_recomputed_activations_change_nothing(name):
    images, results = torch.randn(8, 3, 32, 32), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = make(name, layer="ConvNN", sampling_type="random", num_samples=9, classifier_width=8 if "vgg" in name else None)
        model.recompute, saved = recompute, []
        pack = lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1]  # noqa: E731
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images).square().sum()
        loss.backward()
        results.append(([p.grad for p in model.parameters()], sum(saved)))
    for mine, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(mine, other)
    assert results[1][1] < results[0][1] / 2


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("name", "layer"), [("vgg11", "Conv2d"), ("resnet18", "Attention")])
def test_compiles_without_a_graph_break(name, layer):
    """The backbones themselves, strides included: layers are compiled in test_allconvnet.py."""
    torch._dynamo.reset()
    model = make(name, layer=layer, replace=("last", 4)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.usefixtures("narrow", "quick_results")
def test_a_run_is_resumed_tested_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    line = "--model resnet18 --layer ConvNN --K 70 --replace last 12 --dataset digits --device cpu --batch_size 8 "
    line += "--train_limit 16 --test_limit 8"
    assert allconvnet_main.main(shlex.split(f"{line} --num_epochs 1")) == 0
    out, err = capsys.readouterr()
    assert "resnet18 with ConvNN on digits" in out
    assert "--K 70 does not fit all maps" in err and err.count("\n") == 1
    folder = tmp_path / "Output" / "resnet18" / "ConvNN"
    assert "K=16" in (folder / "model.txt").read_text() and "replace: last 12" in (folder / "args.txt").read_text()
    assert allconvnet_main.main(shlex.split(f"{line} --num_epochs 2 --resume --export r.safetensors")) == 0
    assert (folder / "metrics.csv").read_text().count("\n") == 3
    assert allconvnet_main.main(shlex.split(f"{line} --test_only")) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the same weights in other places
        allconvnet_main.main(shlex.split(f"{line} --test_only --replace last 11"))
    assert "of another architecture" in capsys.readouterr().err
