import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allconvnet import AllConvNet, make_layer2d
from layers2d import Attention2d, Branching2d, ConvNN2d, ConvNNAttention2d, ShuffledConv2d
from mixers.controls import Pooling2d
from mixers.graph import GraphConv2d
from options.allconvnet import AllConvNetConfig
from options.layers import LAYERS2D_NAMES
from runs.measure import count_flops, count_parameters

OTHERS = ("Conv2d_New", "Identity", "Pooling")
MIXERS = [name for name in LAYERS2D_NAMES if name not in OTHERS]
PAIRS = [*(f"{a}/{b}" for a, b in itertools.combinations(MIXERS, 2)), *(f"{name}/ConvNN" for name in OTHERS)]
LAYERS = [*LAYERS2D_NAMES, *PAIRS]


def make(**options):
    defaults = {"channels": (4, 8), "K": 3, "num_heads": 2, "image_size": (4, 6), "num_classes": 5}
    return AllConvNet(AllConvNetConfig(**defaults | options))


def combinations():
    """Every layer with every value of the options that it looks at."""
    for layer in LAYERS:
        patterns = ["BA"] if layer in ("Conv2d", *OTHERS) else ["BA", "NA"]
        samplings = [("all", -1), ("random", 5), ("spatial", 2)] if "ConvNN" in layer else [("all", -1)]
        metrics = ["similarity", "distance", "matmul"] if "ConvNN" in layer else ["similarity"]
        if "/" in layer:
            samplings, metrics = samplings[1:2] or samplings, metrics[:1]
        yield from ((layer, *sampling, *rest) for sampling, *rest in itertools.product(samplings, metrics, patterns))


@pytest.mark.parametrize(("layer", "sampling", "samples", "magnitude_type", "pattern"), list(combinations()))
def test_every_layer_trains_a_step(layer, sampling, samples, magnitude_type, pattern):
    model = make(
        layer=layer,
        channels=(16, 16),  # fewer, and ReLU can be dead for all that a branch of attention puts out
        sampling_type=sampling,
        num_samples=samples,
        magnitude_type=magnitude_type,
        shuffle_pattern=pattern,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = torch.randn(4, 3, 4, 6), torch.arange(4)
    before = F.cross_entropy(model(x), labels)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias right before BatchNorm has a gradient of zero by nature.
        assert parameter.grad.abs().sum() > 0 or (name.endswith("bias") and "/" not in layer), name
    optimizer.step()
    assert F.cross_entropy(model(x), labels).isfinite()


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_what_the_name_says(layer):
    types = {"Conv2d": nn.Conv2d, "ConvNN": ConvNN2d, "ConvNN_Attn": ConvNNAttention2d, "Attention": Attention2d}
    types |= {"Conv2d_New": ShuffledConv2d, "ViG": GraphConv2d, "Identity": nn.Conv2d, "Pooling": Pooling2d}
    config = AllConvNetConfig(layer=layer, channels=[8], K=3, image_size=4, branch_ratio=0.25)
    mixer = make_layer2d(config, 3, 8)
    if "/" not in layer:
        assert type(mixer) is types[layer]
        return
    first, second = layer.split("/")
    assert type(mixer) is Branching2d and type(mixer.first) is types[first] and type(mixer.second) is types[second]
    x = torch.randn(1, 3, 4, 4)
    assert mixer.first(x).shape[1] == 6 and mixer.second(x).shape[1] == 2


@pytest.mark.parametrize("pattern", ["BA", "NA", "B", "A"])
def test_conv2d_new_convolves_unshuffled_tokens_and_their_coordinates(pattern):
    for kind in ("Col", "Loc_Col"):
        config = AllConvNetConfig(
            layer="Conv2d_New", channels=(4,), image_size=(4, 6), aggregation_type=kind, shuffle_pattern=pattern
        )
        layer, x = make_layer2d(config, 3, 4).double(), torch.randn(2, 3, 4, 6).double()
        tokens = F.pixel_unshuffle(x, 2) if "B" in pattern else x
        if kind == "Loc_Col":
            rows, columns = (torch.linspace(-1, 1, side).double() for side in tokens.shape[2:])
            plane = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
            tokens = torch.cat([tokens, plane.expand(2, -1, -1, -1)], dim=1)
        (weight, bias) = layer.parameters()
        expected = F.conv2d(tokens, weight, bias, padding=1)
        expected = F.pixel_shuffle(expected, 2) if "A" in pattern.replace("NA", "") else expected
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)  # linspace is of float32
        if "B" in pattern:
            with pytest.raises(ValueError, match="shuffle_scale=2 does not divide the 3 x 6 input"):
                layer(x[:, :, 1:])


@pytest.mark.parametrize(("ratio", "kind"), [(0, nn.Conv2d), (1, ConvNN2d), (0.5, Branching2d)])
def test_branch_ratio_of_0_and_1_builds_the_single_layer(ratio, kind):
    config = AllConvNetConfig(layer="Conv2d/ConvNN", channels=[8], K=3, image_size=4, branch_ratio=float(ratio))
    assert type(make_layer2d(config, 3, 8)) is kind


def test_pair_of_layers_is_relu_and_concatenation():
    model = make(layer="Conv2d/Attention", channels=(8,)).eval()
    x = torch.randn(2, 3, 4, 6)
    mixer, norm, _ = model.layers[0]
    features = norm(torch.cat([mixer.first(x).relu(), mixer.second(x).relu()], 1)).relu().mean((2, 3))
    torch.testing.assert_close(model(x), model.classifier(features))


@pytest.mark.parametrize("layer", LAYERS2D_NAMES)
@pytest.mark.parametrize(("channels", "batch"), [(1, 1), (3, 1), (1, 3)])
def test_grey_and_colour_and_a_batch_of_one(layer, channels, batch):
    model = make(layer=layer, in_channels=channels)
    assert model(torch.randn(batch, channels, 4, 6)).shape == (batch, 5)


@pytest.mark.parametrize("layer", ["ConvNN", "ConvNN_Attn", "ConvNN/ConvNN_Attn"])
@pytest.mark.parametrize("K", [1, 6])
def test_one_neighbor_and_all_neighbors(layer, K):
    model = make(layer=layer, K=K)  # BA: 4 x 6 pixels are 6 tokens
    assert model(torch.randn(2, 3, 4, 6)).isfinite().all()


@pytest.mark.parametrize("layer", LAYERS)
def test_an_image_is_the_same_alone_and_in_a_batch(layer):
    model = make(layer=layer, sampling_type="random", num_samples=4, similarity_type="Loc_Col").double().eval()
    x = torch.randn(3, 3, 4, 6).double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("layer", ["ConvNN", "ConvNN_Attn", "Attention", "ConvNN/Attention"])
def test_a_network_that_selects_by_content_is_blind_to_place(layer):
    """Shuffled pixels give equal logits: no rule looks at the order of tokens. (Ties do: a token that ReLU left without
    any feature is as near to all others, which does not happen with 16 channels here.)"""
    model = make(layer=layer, channels=(16, 16), shuffle_pattern="NA").double().eval()
    x = torch.randn(2, 3, 4, 6).double()
    shuffled = x.flatten(2)[:, :, torch.randperm(24)].view_as(x)
    torch.testing.assert_close(model(shuffled), model(x))
    by_place = make(layer=layer, channels=(16, 16), shuffle_pattern="NA", similarity_type="Loc").double().eval()
    assert layer == "Attention" or not torch.allclose(by_place(shuffled), by_place(x))


@pytest.mark.parametrize(("pattern", "sizes"), [("B", [(8, 12), (4, 6), (2, 3)]), ("A", [(4, 4), (8, 8), (16, 16)])])
@pytest.mark.parametrize("layer", ["ConvNN", "Attention/ConvNN_Attn"])
def test_patterns_that_change_the_size_of_the_map(layer, pattern, sizes):
    channels = (4, 4, 4)[: len(sizes)]
    if pattern == "B":
        channels = channels[:2]  # a third layer would have fewer tokens than neighbors
    model = make(layer=layer, channels=channels, shuffle_pattern=pattern, image_size=sizes[0])
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    model(torch.randn(1, 3, *sizes[0]))
    assert seen == [*sizes[1:], (32, 32)][: len(channels)] if pattern == "A" else seen == sizes[1:]


@pytest.mark.parametrize("layer", LAYERS2D_NAMES)
def test_compiles_without_a_graph_break(layer):
    """In training, with candidates that are drawn inside the graph."""
    model, x = make(layer=layer, sampling_type="random", num_samples=4).double(), torch.randn(2, 3, 4, 6).double()
    torch._dynamo.reset()
    results = []
    for call in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        torch.manual_seed(1)
        logits = call(x)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), model.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_inductor_equals_eager():
    """Of a network the mixer: the rest is PyTorch's own. Gradients in test_layers.py and test_vit.py."""
    torch._dynamo.reset()
    mixer, x = make(layer="ConvNN_Attn", channels=(8,)).layers[0][0].double(), torch.randn(2, 3, 4, 6).double()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True)(x), mixer(x), atol=1e-9, rtol=0)


def test_recomputed_activations_change_nothing():
    """The compile mode reduce-memory: gradients with the same random candidates, statistics of BatchNorm counted once."""
    x = torch.randn(128, 3, 4, 6)  # enough for activations to outweigh the parameters
    results = []
    for recompute in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make(layer="ConvNN_Attn", sampling_type="random", num_samples=4)
        model.recompute = recompute
        saved = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t):
            y = torch.compile(model, backend="aot_eager_decomp_partition")(x)
        y.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append((gradients, dict(model.named_buffers()), sum(saved)))
    (gradients, buffers, saved), (again, buffers_again, saved_again) = results
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(a, b)
    for name, value in buffers.items():
        torch.testing.assert_close(value, buffers_again[name])
    assert saved_again < saved


def test_parameters_and_flops_by_hand():
    """Two layers 3 -> 4 -> 8 on 4 x 6 pixels, K = 3, five classes; a multiply-add is two FLOPs."""
    pixels, tokens, K = 24, 6, 3  # BA with scale 2: a quarter of the tokens, 4 times the channels
    head = 8 * 5 + 5
    norms = 2 * 4 + 2 * 8

    conv = make(layer="Conv2d")
    assert count_parameters(conv) == (3 * 4 * 9 + 4) + (4 * 8 * 9 + 8) + norms + head
    assert count_flops(conv, torch.zeros(1, 3, 4, 6)) == 2 * pixels * 9 * (3 * 4 + 4 * 8) + 2 * 8 * 5

    convnn = make(layer="ConvNN")
    assert count_parameters(convnn) == (12 * 16 * K + 16) + (16 * 32 * K + 32) + norms + head
    search = 2 * tokens * tokens * (12 + 16)
    mix = 2 * tokens * K * (12 * 16 + 16 * 32)
    assert count_flops(convnn, torch.zeros(1, 3, 4, 6)) == search + mix + 2 * 8 * 5

    attention = make(layer="Attention")
    weights = (12 * 48 + 48) + (16 * 16 + 16) + (16 * 96 + 96) + (32 * 32 + 32)
    assert count_parameters(attention) == weights + norms + head
    projections = 2 * tokens * (12 * 48 + 16 * 16 + 16 * 96 + 32 * 32)
    products = 2 * 2 * tokens * tokens * (16 + 32)
    assert count_flops(attention, torch.zeros(1, 3, 4, 6)) == projections + products + 2 * 8 * 5

    both = make(layer="ConvNN_Attn")
    assert count_parameters(both) == weights + (16 * 16 * K + 32 * 32 * K) + norms + head
    search = 2 * tokens * tokens * (16 + 32)
    mix = 2 * tokens * K * (16 * 16 + 32 * 32)
    assert count_flops(both, torch.zeros(1, 3, 4, 6)) == projections + search + mix + 2 * 8 * 5  # scores come with the search


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 7}, "K=7 .* 1 to 6"),
        ({"image_size": (4, 7)}, "shuffle_scale=2 does not divide the 4 x 7 map"),
        ({"layer": "Attention", "num_heads": 3}, "num_heads=3"),
        ({"layer": "Conv2D"}, "did you mean Conv2d"),
        ({"layer": "Conv2d/Conv2d"}, "two different ones"),
        ({"layer": "Conv2d/ConvNN", "shuffle_pattern": "B"}, "shuffle_pattern=B"),
        ({"num_layers": 3}, "num_layers=3 does not match channels=4 8"),
    ],
)
def test_errors_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
