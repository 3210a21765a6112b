"""Every mixer of both registries in other hands: hooks, pruning, adapters, float16, empty batches, gradients of gradients."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune

from allconvnet import AllConvNet
from layers1d import MultiHeadConvNNAttention
from layers2d import ConvNN2d, ConvNNAttention2d
from mixers.base import TokenLayout
from mixers.classical import FocalModulation
from options.allconvnet import AllConvNetConfig
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from options.neighbors import NeighborConfig
from options.vit import ViTConfig
from tests.helpers.pools import pool_of
from vit import ViT

TOKENS = {"image_size": 16, "in_channels": 1, "patch_size": 4, "num_layers": 1, "num_heads": 2, "d_model": 32, "d_mlp": 8}
TOKENS |= {"attention_dropout": 0.0, "kernel_size": 3, "hybrid_dilations": (1,), "K": 4}
TOKENS |= {"linformer_k": 4, "nystrom_landmarks": 4, "performer_features": 8, "value_convolution": 3}
IMAGES = {"channels": (4,), "K": 4, "image_size": 8, "in_channels": 2}
PARAMETERLESS = ("Identity", "Pooling", "FNet")
MIXERS = [
    *((ViT, {"layer": name}) for name in LAYERS1D_NAMES if name not in PARAMETERLESS),
    (ViT, {"layer": "ConvNNAttention", "convolution_type": "depthwise-separable", "topk": "gumbel"}),
    *((AllConvNet, {"layer": name, "shuffle_pattern": "BA"}) for name in LAYERS2D_NAMES),
    (AllConvNet, {"layer": "ConvNN", "similarity_type": "Loc", "K": 9, "padding": 1, "shuffle_pattern": "NA"}),
    *((AllConvNet, {"layer": "ConvNN", "convolution_type": kind}) for kind in ("depthwise", "depthwise-separable")),
    (AllConvNet, {"layer": "ConvNN_Attn", "convolution_type": "depthwise-separable", "topk": "straight_through"}),
]
MIXERS += [(ViT, {"layer": name}) for name in PARAMETERLESS]
NAMES = [f"{kind.__name__}-{'-'.join(map(str, options.values()))}" for kind, options in MIXERS]
WEIGHTED = nn.Linear, nn.Conv1d, nn.Conv2d
every_mixer = pytest.mark.parametrize("number", range(len(MIXERS)), ids=NAMES)
with_parameters = pytest.mark.parametrize("number", range(len(MIXERS) - len(PARAMETERLESS)), ids=NAMES[: -len(PARAMETERLESS)])


@functools.cache
def made(number):
    torch.manual_seed(0)
    kind, options = MIXERS[number]
    if kind is ViT:
        return ViT(ViTConfig(**TOKENS | {"pool": pool_of(options["layer"])} | options)).blocks[0].mixer, (2, 17, 32)
    return AllConvNet(AllConvNetConfig(**IMAGES | options)).layers[0][0], (2, 2, 8, 8)


def make(number):
    """Return a mixer and an input."""
    mixer, shape = made(number)
    torch.manual_seed(1)
    return copy.deepcopy(mixer), torch.randn(shape)


def weighted(mixer):
    return [(name, part) for name, part in mixer.named_modules() if isinstance(part, WEIGHTED)]


def replace(mixer, wrap):
    """Put wrap(module) in the place of every module with a weight; return the mixer."""
    for name, part in weighted(mixer):
        if not name:
            return wrap(part)
        parent, _, last = name.rpartition(".")
        setattr(mixer.get_submodule(parent), last, wrap(part))
    return mixer


def doubled(mixer):
    with torch.no_grad():
        for _, part in weighted(mixer):
            part.weight *= 2
    return mixer


# --- weights are used through their modules ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@with_parameters
def test_hooks_fire_and_change_nothing(number):
    mixer, x = make(number)
    hooked, fired = copy.deepcopy(mixer), set()
    for name, part in hooked.named_modules():
        part.register_forward_hook(lambda *_, name=name: fired.add(name))
        part.register_full_backward_hook(lambda *_, name=name: fired.add(f"{name} backward"))
    for training in (False, True):
        fired.clear()
        torch.manual_seed(2)
        expected = mixer.train(training)(x)
        torch.manual_seed(2)
        found = hooked.train(training)(x)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(found)
        found.backward(direction)
        expected.backward(direction)
        names = {name for name, _ in weighted(mixer)}
        assert names | {f"{name} backward" for name in names} <= fired
    for (name, ours), theirs in zip(hooked.named_parameters(), mixer.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@with_parameters
def test_a_hook_changes_the_output_of_its_module(number):
    mixer, x = make(number)
    expected = doubled(replace(copy.deepcopy(mixer), without_bias)).eval()(x)
    mixer = replace(mixer, without_bias)
    for _, part in weighted(mixer):
        part.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(mixer.eval()(x), expected)


def without_bias(part):
    part.bias = None
    return part


@with_parameters
def test_pruned_mixers_train(number):
    mixer, x = make(number)
    for _, part in weighted(mixer):
        prune.l1_unstructured(part, "weight", 0.5)
    optimizer = torch.optim.SGD(mixer.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        mixer.train()(x).square().mean().backward()
        optimizer.step()
    found = mixer.eval()(x)
    for _, part in weighted(mixer):
        assert (part.weight == 0).float().mean() >= 0.4
        prune.remove(part, "weight")
    torch.testing.assert_close(mixer(x), found)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Adapter(nn.Module):
    """A module beside a module, as LoRA adds it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.change = base, copy.deepcopy(base)
        self.change.bias = None

    def forward(self, x):
        return self.base(x) + self.change(x)


@with_parameters
def test_parametrized_and_wrapped_weights(number):
    mixer, x = make(number)
    expected = doubled(copy.deepcopy(mixer)).eval()(x)
    wrapped = replace(copy.deepcopy(mixer), Adapter).eval()
    for _, part in weighted(mixer):
        parametrize.register_parametrization(part, "weight", Doubled())
    for changed in (wrapped, mixer.eval()):
        torch.testing.assert_close(changed(x), expected)
        torch.manual_seed(2)
        changed.train()(x).square().mean().backward()
        assert all(p.grad is not None for name, p in changed.named_parameters() if name.endswith("proj.base.weight"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@with_parameters
def test_quantized_linears_are_called(number):
    mixer, x = make(number)
    if isinstance(mixer, WEIGHTED):
        return
    quantized, fired = torch.ao.quantization.quantize_dynamic(mixer.eval(), {nn.Linear}, dtype=torch.qint8), set()
    names = {name for name, part in mixer.named_modules() if isinstance(part, nn.Linear)}
    for name in names:
        part = quantized.get_submodule(name)
        assert "quantized" in type(part).__module__
        part.register_forward_hook(lambda *_, name=name: fired.add(name))
    found, expected = quantized(x), mixer(x)
    assert fired == names
    assert (found - expected).abs().median() < 0.1 * expected.abs().max()


def test_learned_top_k_reaches_candidates_through_a_wrapped_convolution():
    for convolution_type in ("standard", "depthwise", "depthwise-separable"):
        layout, neighbors = TokenLayout(3, 4), NeighborConfig(K=3)
        layer = MultiHeadConvNNAttention(
            8, 2, neighbors, layout=layout, convolution_type=convolution_type, topk="straight_through"
        )
        other = copy.deepcopy(layer)
        other.conv.register_forward_hook(lambda *_: None)
        x = torch.randn(2, 12, 8)
        for each in (layer, other):
            each(x).square().sum().backward()
        for ours, theirs in zip(other.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


# --- float16 ----------------------------------------------------------------------------------------------------------


def loud(mixer, x):
    """Scale the input so that the largest product of a query and a key is 120,000, above the largest float16."""
    if not hasattr(mixer, "qkv") or x.ndim == 4:
        return 10 * x if isinstance(mixer, FocalModulation) else 100 * x  # its output is a product of three projections
    given = (mixer.layout,) if mixer.takes_layout else ()
    for _ in range(4):
        query, key = mixer.project(x, *given)[:2]
        x = x * (120_000 / (query @ key.mT).abs().max()).sqrt()
    return x.detach()


@with_parameters
@pytest.mark.parametrize("way", ["evaluation", "output_attentions", "training"])
def test_float16_where_products_are_large(number, way):
    mixer, x = make(number)
    if way == "output_attentions" and x.ndim == 4:
        return
    half = mixer.half()
    for part in mixer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
        elif hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.2
    x = loud(copy.deepcopy(half).float(), x).half()
    results = []
    for each, images in ((half, x), (copy.deepcopy(half).float(), x.float())):
        torch.manual_seed(2)
        found = each.train(way == "training")(images, *[True] * (way == "output_attentions"))
        out, matrix = found if isinstance(found, tuple) else (found, None)
        results.append((out.float(), None if matrix is None else matrix.float()))
        out.float().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in each.parameters())
    (ours, matrix), (theirs, other) = results
    assert ours.isfinite().all()
    close = (ours - theirs).abs() < 0.02 * theirs.abs().max()
    # Rounding to float16 may turn the choice among neighbors or scores that are nearly equal.
    assert close.float().mean() > 0.9
    if matrix is not None:
        assert ((matrix - other).abs() < 0.02).float().mean() > 0.97


# --- empty batches and gradients of gradients ---------------------------------------------------------------------------


@every_mixer
def test_a_batch_of_nothing(number):
    mixer, x = make(number)
    x.requires_grad_()
    for training in (False, True):
        out = mixer.train(training)(x[:0])
        out.sum().backward()
        assert out.shape == (0, *mixer(x).shape[1:])
    if x.ndim == 3:
        assert mixer.eval()(x[:0], True)[0].shape == x[:0].shape


@with_parameters
@pytest.mark.parametrize("frozen", ["input", "half of the weights"])
def test_gradients_of_gradients(number, frozen):
    """The gradient of a squared gradient, along a direction, against a difference of squared gradients."""
    mixer, x = make(number)
    mixer, x = mixer.double().eval(), x.double().requires_grad_(frozen != "input")
    parameters = list(mixer.parameters())
    for parameter in parameters[::2] if frozen != "input" else []:
        parameter.requires_grad_(False)
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]

    def squared_gradient(create_graph):
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(mixer(x).square().sum(), wanted, create_graph=create_graph, allow_unused=True)
        return sum(grad.square().sum() for grad in grads if grad is not None)

    second = torch.autograd.grad(squared_gradient(True), wanted, allow_unused=True)
    directions = [torch.randn_like(tensor) for tensor in wanted]
    slope = sum((grad * along).sum() for grad, along in zip(second, directions, strict=True) if grad is not None)
    step, values = 1e-5, []
    for sign in (1, -2):  # to one side, then to the other
        for tensor, along in zip(wanted, directions, strict=True):
            tensor.data.add_(along, alpha=sign * step)
        values.append(squared_gradient(False))
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [ConvNN2d, ConvNNAttention2d])
def test_a_layer_of_two_convolutions_shares_no_hook(kind):
    """One layer with a hook gathers its slots, the other, without, does not."""
    layer = kind(3, 4, NeighborConfig(K=3))
    x, shapes = torch.randn(2, 3, 4, 4), []
    layer.conv.register_forward_hook(lambda module, inputs, output: shapes.append((inputs[0].shape[2], output.shape[2])))
    layer(x)
    copy.deepcopy(layer)
    assert shapes == [(48, 16)]
