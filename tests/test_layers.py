"""layers1d.py and layers2d.py: one file, since the 2-D layers are the 1-D ones over a folded grid."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layers1d import Attention1d, ConvNN1d, ConvNNAttention1d, MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import Attention2d, Branching2d, ConvNN2d, ConvNNAttention2d, convnn_plain, make_conv2d
from mixers.base import PixelShuffle, PixelUnshuffle
from neighbors import attend_to_neighbors, coordinates, grid_locations, random_candidates, spatial_candidates
from options.neighbors import NeighborConfig
from tests.helpers.naive import aggregate, neighbors, pairs, window
from tests.helpers.side_by_side import SideBySide

SAMPLING = [("all", -1), ("random", 9), ("spatial", 3)]


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude_type", ["cosine", "euclidean", "matmul"])
@pytest.mark.parametrize("size", [(6, 6), (5, 8), (3, 1)])
@pytest.mark.parametrize("p", [1, 2])
def test_convnn_by_location_is_conv2d(p, size, magnitude_type):
    conv = nn.Conv2d(3, 4, 2 * p + 1, padding=p).double()
    cfg = NeighborConfig(K=(2 * p + 1) ** 2, similarity_type="Loc", magnitude_type=magnitude_type)
    layer = ConvNN2d(3, 4, cfg, padding=p, image_size=size).double()
    layer.conv.load_state_dict({"weight": conv.weight.flatten(2), "bias": conv.bias})
    x = torch.randn(2, 3, *size).double().requires_grad_()
    for shortcut in (True, False):  # F.conv2d, and the general path through the table of places
        layer.is_convolution = shortcut
        ours, theirs = layer(x), conv(x)
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
        direction = torch.randn_like(ours)
        ours = torch.autograd.grad(ours, [x, layer.conv.weight, layer.conv.bias], direction)
        theirs = torch.autograd.grad(theirs, [x, conv.weight, conv.bias], direction)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_convnn_by_location_is_conv1d(p):
    conv = nn.Conv1d(3, 4, 2 * p + 1, padding=p).double()
    layer = ConvNN1d(3, 4, NeighborConfig(K=2 * p + 1, similarity_type="Loc"), padding=p).double()
    layer.conv.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 10).double()
    torch.testing.assert_close(layer(x), conv(x), atol=1e-9, rtol=0)


def matching(kind, sides, K, convolution_type, groups):
    """A ConvNN by location and the convolutions, one after the other, that it must be: 3 channels to 6."""
    layer = kind(3, 6, NeighborConfig(K=K, similarity_type="Loc"), convolution_type=convolution_type, padding=1).double()
    parts = layer.conv if isinstance(layer.conv, nn.Sequential) else [layer.conv]
    convolution = {1: nn.Conv1d, 2: nn.Conv2d}[sides]
    convs = [convolution(3, parts[0].out_channels, 3, padding=1, groups=groups, bias=parts[0].bias is not None)]
    convs += [convolution(3, 6, 1) for _ in parts[1:]]
    for conv, part in zip(convs, parts, strict=True):
        conv.load_state_dict({name: value.view_as(conv.state_dict()[name]) for name, value in part.state_dict().items()})
    return layer, nn.Sequential(*convs).double()


@pytest.mark.parametrize("convolution_type", ["depthwise", "depthwise-separable"])
@pytest.mark.parametrize(("kind", "size"), [(ConvNN2d, (5, 8)), (ConvNN2d, (3, 1)), (ConvNN1d, (7,))])
def test_depthwise_convnn_by_location_is_the_depthwise_convolution(kind, size, convolution_type):
    """Outputs and gradients, with two output channels for each input channel."""
    layer, convs = matching(kind, len(size), 3 ** len(size), convolution_type, groups=3)
    x = torch.randn(2, 3, *size).double().requires_grad_()
    expected = convs(x)
    direction = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, [x, *convs.parameters()], direction, retain_graph=True)
    assert layer.is_convolution
    for layer.is_convolution in (True, False):  # PyTorch's convolution, and the general path through the table of places
        out = layer(x)
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
        ours = torch.autograd.grad(out, [x, *layer.parameters()], direction)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("pattern", "channels"), [("NA", (3, 6)), ("BA", (2, 2)), ("NA", (1, 4))])
def test_depthwise_convnn_by_content_is_the_standard_one_with_other_weights_zero(pattern, channels):
    options = {"neighbors": NeighborConfig(K=4), "shuffle_pattern": pattern}
    layer, standard = ConvNN2d(*channels, **options, convolution_type="depthwise"), ConvNN2d(*channels, **options)
    weight = torch.zeros_like(standard.conv.weight)
    for channel, row in enumerate(layer.conv.weight):
        weight[channel, channel * weight.shape[1] // weight.shape[0]] = row[0]
    standard.conv.load_state_dict({"weight": weight, "bias": layer.conv.bias})
    x = torch.randn(2, channels[0], 4, 6).double().requires_grad_()
    outs = layer.double()(x), standard.double()(x)
    torch.testing.assert_close(*outs, atol=1e-9, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs), atol=1e-9, rtol=0)


def test_depthwise_convnn_of_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="a multiple of its 3 channels, not 8; use depthwise-separable"):
        ConvNN2d(3, 8, NeighborConfig(K=4), convolution_type="depthwise")
    assert ConvNN2d(3, 8, NeighborConfig(K=4), convolution_type="depthwise-separable")(torch.randn(1, 3, 4, 4)).shape[1] == 8


def test_convnn_by_location_without_padding_uses_the_nearest_inside():
    cfg = NeighborConfig(K=5, similarity_type="Loc")
    layer = ConvNN2d(2, 3, cfg).double()
    x = torch.randn(2, 2, 4, 5).double()
    index = torch.tensor([window((4, 5), i, 5) for i in range(20)]).expand(2, -1, -1)
    expected = aggregate(tokens_of(x), index, layer.conv.weight) + layer.conv.bias
    torch.testing.assert_close(tokens_of(layer(x)), expected)


@pytest.mark.parametrize("pattern", ["NA", "BA"])
def test_convnn_attention_with_all_neighbors_is_attention(pattern):
    attention = Attention2d(3, 4, 1, shuffle_pattern=pattern).double()
    tokens = 24 // (4 if pattern == "BA" else 1)
    cfg = NeighborConfig(K=tokens, magnitude_type="matmul")
    layer = ConvNNAttention2d(3, 4, cfg, convolution_type="depthwise", shuffle_pattern=pattern).double()
    layer.load_state_dict(attention.state_dict(), strict=False)
    x = torch.randn(2, 3, 4, 6).double().requires_grad_()
    torch.testing.assert_close(layer(x), attention(x), atol=1e-9, rtol=0)
    (ours,), (theirs,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (layer, attention))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_against_torch_multihead(heads):
    layer = Attention2d(3, 8, heads).double()
    reference = nn.MultiheadAttention(8, heads, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 3, 3, 4).double()
    # nn.MultiheadAttention projects from its own width: widen the input with zeros and the weights with it.
    weight = F.pad(layer.qkv.weight, (0, 5))
    reference.load_state_dict(
        {
            "in_proj_weight": weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    tokens = F.pad(tokens_of(x), (0, 5))
    expected = reference(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(tokens_of(layer(x)), expected, atol=1e-9, rtol=0)


# --- against the plain form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("sampling", "samples"), SAMPLING)
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "matmul"])
@pytest.mark.parametrize("similarity", ["Col", "Loc_Col"])
def test_convnn_against_the_plain_form(similarity, metric, sampling, samples, padding):
    cfg = NeighborConfig(
        K=5,
        sampling_type=sampling,
        num_samples=samples,
        magnitude_type=metric,
        similarity_type=similarity,
        aggregation_type="Col" if padding else "Loc_Col",  # the tokens of the ring tie: all must be worth the same
        lambda_param=0.7,
    )
    layer = ConvNN2d(3, 4, cfg, padding=padding).double().eval()
    x = torch.randn(2, 3, 5, 6).double().requires_grad_()
    grid = (5 + 2 * padding, 6 + 2 * padding)
    tokens = tokens_of(F.pad(x, [padding] * 4))
    places = coordinates(grid_locations(grid), grid, torch.float64).expand(2, -1, -1)
    values = tokens if padding else torch.cat([tokens, places], dim=2)
    key = tokens.detach()
    if similarity == "Loc_Col":
        key = torch.cat([0.7 * key / key.std(dim=(1, 2), keepdim=True), 0.3 * places], dim=2)
    inner = torch.arange(math.prod(grid)).view(grid)
    inner = inner[padding : grid[0] - padding, padding : grid[1] - padding].flatten()
    candidates = torch.arange(math.prod(grid))
    if sampling == "random":
        candidates = random_candidates(math.prod(grid), samples, fixed=True)
    if sampling == "spatial":
        candidates = spatial_candidates(grid, samples)
    # The token itself, then the nearest candidates other than it: the plain way, token by token.
    ranked = neighbors(key[:, inner], key, len(candidates), metric, candidates).tolist()
    index = [[[i, *(j for j in row if j != i)][:5] for i, row in zip(inner.tolist(), image, strict=True)] for image in ranked]
    expected = aggregate(values, torch.tensor(index), layer.conv.weight) + layer.conv.bias
    ours = tokens_of(layer(x))
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    inputs = [x, layer.conv.weight, layer.conv.bias]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "matmul"])
@pytest.mark.parametrize("convolution_type", ["standard", "depthwise", "depthwise-separable"])
def test_convnn_attention_against_the_plain_form(convolution_type, metric, softmax):
    cfg = NeighborConfig(K=4, magnitude_type=metric)
    layer = ConvNNAttention2d(3, 4, cfg, convolution_type=convolution_type, softmax_topk_val=softmax).double()
    x = torch.randn(2, 3, 3, 4).double().requires_grad_()
    query, key, value = layer.qkv(tokens_of(x)).chunk(3, dim=-1)
    index = neighbors(query, key, 4, metric)
    scores = pairs(query, key, index, metric)
    if softmax:
        weights = scores.softmax(-1)
    else:
        weights = 1 / (-scores + 1e-8) if metric == "euclidean" else scores
    if convolution_type == "standard":
        mixed = aggregate(value, index, layer.conv.weight, weights)
    else:
        depthwise = layer.conv[0] if convolution_type == "depthwise-separable" else layer.conv
        assert torch.equal(depthwise.weight, torch.ones(4, 1, 4, dtype=torch.float64))
        nn.init.normal_(depthwise.weight)
        mixed = aggregate(value, index, depthwise.weight, weights, groups=4)
        if convolution_type == "depthwise-separable":
            mixed = F.conv1d(mixed.transpose(1, 2), layer.conv[1].weight).transpose(1, 2)
    ours, theirs = tokens_of(layer(x)), layer.proj(mixed)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    inputs = [x, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
@pytest.mark.parametrize(("sampling", "samples"), SAMPLING)
def test_sampled_attention_has_the_token_itself_first(sampling, samples, similarity):
    cfg = NeighborConfig(K=3, sampling_type=sampling, num_samples=samples, similarity_type=similarity)
    layer = ConvNNAttention2d(3, 4, cfg)
    tokens = torch.randn(2, 20, 4)
    index = layer.select(*(layer.select.search_features(t, (4, 5)) for t in (tokens, torch.randn(2, 20, 4))), (4, 5))
    assert index.shape == (2, 20, 3)
    if sampling != "all":
        assert torch.equal(index[:, :, 0], torch.arange(20).expand(2, -1))


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", [ConvNN2d, ConvNNAttention2d])
@pytest.mark.parametrize("similarity", ["Col", "Loc"])
def test_random_candidates_vary_in_training_and_not_in_evaluation(layer_type, similarity):
    cfg = NeighborConfig(K=4, sampling_type="random", num_samples=5, similarity_type=similarity)
    layer = layer_type(3, 4, cfg)
    x = torch.randn(2, 3, 6, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    torch.testing.assert_close(first[1:], layer(x[1:]))  # and an image is the same alone


# --- shuffles and shapes --------------------------------------------------------------------------------------------


def test_pixel_shuffle_1d():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    down = PixelUnshuffle(2)(x)
    assert down.shape == (2, 6, 4)
    assert torch.equal(down[:, 1], x[:, 0, 1::2]) and torch.equal(down[:, 4], x[:, 2, 0::2])
    assert torch.equal(PixelShuffle(2)(down), x)
    assert PixelUnshuffle(2)(x[:0]).shape == (0, *down.shape[1:]) and PixelShuffle(2)(down[:0]).shape == (0, *x.shape[1:])


def make(layer_type, **kwargs):
    what = 2 if issubclass(layer_type, Attention2d) else NeighborConfig(K=3)
    return layer_type(4, 6, what, **kwargs)


@pytest.mark.parametrize("layer_type", [ConvNN1d, ConvNNAttention1d, Attention1d, ConvNN2d, ConvNNAttention2d, Attention2d])
@pytest.mark.parametrize(("pattern", "factor"), [("NA", 1), ("BA", 1), ("A", 2), ("B", 0.5)])
def test_shapes_by_shuffle_pattern(layer_type, pattern, factor):
    layer = make(layer_type, shuffle_pattern=pattern)
    for size in [(8,), (2,)] if layer.axes == 1 else [(8, 4), (4, 4)]:
        if layer.axes == 1 and size == (2,) and not isinstance(layer, Attention2d):
            continue  # fewer tokens than neighbors
        y = layer(torch.randn(1, 4, *size))
        assert y.shape == (1, 6, *(int(side * factor) for side in size)) and y.isfinite().all()


@pytest.mark.parametrize("layer_type", [ConvNN2d, ConvNNAttention2d, Attention2d])
def test_shuffled_layer_is_the_layer_between_shuffles(layer_type):
    """BA equals: unshuffle, the same layer without shuffles at 4 times the channels, shuffle."""
    what = 2 if layer_type is Attention2d else NeighborConfig(K=3)
    layer = layer_type(3, 4, what, shuffle_pattern="BA").double()
    inside = layer_type(12, 16, what).double()
    inside.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 8).double()
    torch.testing.assert_close(layer(x), F.pixel_shuffle(inside(F.pixel_unshuffle(x, 2)), 2))


@pytest.mark.parametrize("make", [MultiHeadConvNNAttention, MultiHeadKvtAttention])
def test_one_operator_computes_what_its_steps_do(make, monkeypatch):
    """On CUDA, and here on a CPU; not with dropout, and not where the matrix of weights is asked for."""
    layer, x = make(8, 2, K=3, score_temperature=0.5, attention_dropout=0.5), torch.randn(2, 9, 8)
    calls = []

    def counted(*given, **more):
        calls.append(1)
        return attend_to_neighbors(*given, **more)

    monkeypatch.setattr("layers1d.attend_to_neighbors", counted)
    expected = layer.eval()(x)
    monkeypatch.setattr("kernels.attention.pays", lambda query: True)
    torch.testing.assert_close(layer(x), expected)
    assert calls == [1]
    torch.testing.assert_close(layer(x, True)[0], expected)
    layer.train()(x)
    assert calls == [1]


def test_branching():
    first, second = nn.Conv2d(3, 2, 1), ConvNN2d(3, 5, NeighborConfig(K=2))
    x = torch.randn(2, 3, 4, 4)
    y = Branching2d(first, second)(x)
    assert torch.equal(y[:, :2], first(x).relu()) and torch.equal(y[:, 2:], second(x).relu())
    join = nn.Conv2d(7, 7, 1)
    expected = join(torch.cat([first(x), second(x)], dim=1))
    torch.testing.assert_close(Branching2d(first, second, join)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer_type", [ConvNN2d, ConvNNAttention2d, Attention2d])
def test_autocast(layer_type, dtype):
    # All tokens as neighbors: a choice among near ties would differ between the precisions.
    layer = layer_type(4, 6, 2 if layer_type is Attention2d else NeighborConfig(K=36 if layer_type is ConvNNAttention2d else 1))
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), atol=0.03, rtol=0.03)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(
    ("layer_type", "sampling", "samples"), [*((ConvNN2d, *one) for one in SAMPLING), (ConvNNAttention2d, *SAMPLING[1])]
)
def test_compiles_without_a_graph_break(layer_type, sampling, samples):
    """In training, with random candidates drawn inside the graph.

    Tables are made on the first forward for all layers, and in the constructor for those that then have one.
    """
    layers = []
    for similarity in ("Col", "Loc", "Loc_Col"):
        cfg = NeighborConfig(K=3, sampling_type=sampling, num_samples=samples, similarity_type=similarity)
        has_table = similarity == "Loc" or (sampling, similarity) == ("spatial", "Col")
        layers += [layer_type(3, 4, cfg, image_size=size) for size in (None, (4, 6))[: 1 + has_table]]
    model = SideBySide(layers).double()
    torch._dynamo.reset()
    x, results = torch.randn(2, 3, 4, 6).double(), []
    for call in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        torch.manual_seed(1)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), model.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_an_even_kernel_keeps_the_size(kernel_size):
    """With one row less of zeros before than after, and without a warning."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    with warnings.catch_warnings(action="error"):
        layer, x = make_conv2d(2, 3, kernel_size), torch.randn(2, 2, 5, 6)
        y = layer(x)
    torch.testing.assert_close(y, F.conv2d(F.pad(x, (before, after) * 2), layer.weight, layer.bias))


def test_convnn_under_inductor_equals_eager():
    """Forward and backward by the kernels that torch.compile makes; in float64, where no two neighbors are as near as noise."""
    torch._dynamo.reset()
    neighbors = NeighborConfig(K=4, similarity_type="Loc_Col", aggregation_type="Loc_Col")
    layer = ConvNN2d(3, 4, neighbors, shuffle_pattern="BA").double()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 3, 4, 6).double().requires_grad_()
    ours, theirs = compiled(x), layer(x)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    inputs, direction = [x, *layer.parameters()], torch.randn_like(theirs)
    gradients = torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction)
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
def test_state_dict_holds_weights_only(similarity):
    cfg = NeighborConfig(K=3, sampling_type="random", num_samples=4, similarity_type=similarity)
    layer = ConvNN2d(3, 4, cfg, image_size=6)
    layer(torch.randn(1, 3, 4, 4))  # another shape
    assert set(layer.state_dict()) == {"conv.weight", "conv.bias"}


def test_tables_made_in_inference_mode_serve_training():
    layer = ConvNN2d(1, 2, NeighborConfig(K=2, similarity_type="Loc"))
    x = torch.randn(1, 1, 4, 4)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()


def test_tables_in_float64_are_exact():
    """Coordinates must not be rounded to float32 on the way."""
    cfg = NeighborConfig(K=1, aggregation_type="Loc_Col")
    layer = ConvNN2d(1, 2, cfg, image_size=7, bias=False).double()
    layer.conv.weight.data = torch.tensor([[0, 1.0, 0], [0, 0, 1]]).double()[:, :, None]
    y = layer(torch.zeros(1, 1, 7, 7).double())
    assert torch.equal(y[0, 1, 0], torch.arange(-3, 4).double() / 3)
    assert torch.equal(y[0, 0, :, 0], torch.arange(-3, 4).double() / 3)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvNN2d(3, 4, NeighborConfig(K=17), image_size=4), "K=17 .* 1 to 16"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(K=37), padding=1, image_size=4), "K=37 .* 1 to 36"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(K=5), shuffle_pattern="BA", image_size=4), "K=5 .* 4 (tokens|candidates)"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(K=10, sampling_type="random", num_samples=9)), "K=10 .* 9 candidates"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(K=5, sampling_type="spatial", num_samples=2)), "K=5 .* 4 (tokens|candidates)"),
        (lambda: ConvNN1d(3, 4, NeighborConfig(K=3, sampling_type="spatial", num_samples=2)), "K=3 .* 2 candidates"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(sampling_type="random", num_samples=17), image_size=4), "num_samples=17"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(K=4, sampling_type="spatial", num_samples=5), image_size=(4, 9)), "at most 4"),
        (
            lambda: ConvNN2d(3, 4, NeighborConfig(K=4, sampling_type="spatial", num_samples=3, sample_padding=1), image_size=4),
            "at most 2",
        ),
        (lambda: ConvNN2d(3, 4, NeighborConfig(), padding=-1), "padding=-1"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(), shuffle_pattern="AB"), "BA, NA, B, A"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(), shuffle_pattern="BA", shuffle_scale=0), "shuffle_scale=0 must be at least 1"),
        (lambda: ConvNN1d(3, 4, NeighborConfig(), shuffle_pattern="A", shuffle_scale=-2), "shuffle_scale=-2"),
        (lambda: Attention2d(3, 4, 2, attention_dropout=1.5), "attention_dropout=1.5"),
        (lambda: ConvNN2d(3, 4, NeighborConfig(), shuffle_pattern="BA", image_size=(6, 7)), "shuffle_scale=2 .* 6 x 7"),
        (lambda: ConvNNAttention2d(3, 4, NeighborConfig(), convolution_type="dense"), "standard, depthwise"),
        (
            lambda: ConvNNAttention2d(3, 4, NeighborConfig(aggregation_type="Loc_Col"), convolution_type="depthwise"),
            "standard or depthwise-separable",
        ),
        (lambda: Attention2d(3, 6, 4), "num_heads=4 .* 6 channels"),
    ],
)
def test_errors_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("layer", "size", "message"),
    [
        (ConvNN2d(3, 4, NeighborConfig(K=9)), (2, 4), "K=9 .* 1 to 8"),
        (ConvNNAttention2d(3, 4, NeighborConfig(K=9)), (2, 4), "K=9 .* 1 to 8"),
        (ConvNN2d(3, 4, NeighborConfig(K=1), shuffle_pattern="B"), (3, 4), "shuffle_scale=2"),
        (Attention2d(3, 4, 1, shuffle_pattern="BA"), (3, 4), "shuffle_scale=2"),
        (ConvNN1d(3, 4, NeighborConfig(K=2), shuffle_pattern="BA"), (5,), "shuffle_scale=2"),
    ],
)
def test_errors_on_the_first_forward(layer, size, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 3, *size))


@pytest.mark.parametrize(("size", "K"), [((4, 5), 6), ((3, 3), 1), ((2, 4), 8)], ids=str)
def test_convnn_written_plainly_is_the_layer(size, K):
    layer, x = ConvNN2d(3, 7, NeighborConfig(K=K)).double(), torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    plain = convnn_plain(x, layer.conv.weight, layer.conv.bias, K)
    torch.testing.assert_close(plain, out, atol=1e-9, rtol=1e-9)
    loss = torch.randn_like(out)
    for found, expected in zip(*(torch.autograd.grad(y, (x, *layer.parameters()), loss) for y in (plain, out)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
