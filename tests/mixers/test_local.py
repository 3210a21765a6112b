"""place_attention.py: every mixer against dense attention under a mask that is written out pair by pair."""

import itertools
import math

import pytest
import torch

from layers1d import MultiHeadAttention
from mixers import local as place_attention
from mixers.base import TokenLayout
from mixers.local import (
    GatedPositionalSelfAttention,
    MultiHeadLocalAttention,
    MultiHeadMaskedAttention,
    MultiHeadSparseAttention,
    NeighborhoodAttention,
    local_mask,
    rotate,
)
from options.layers import LOCAL_MASKS, MASK_TYPES
from runs.measure import peak_memory
from tests.helpers.side_by_side import SideBySide

CPU = torch.device("cpu")
LAYOUTS = [TokenLayout(7, 5, 1), TokenLayout(6, 7), TokenLayout(1, 37, 2)]


@pytest.fixture(params=[0, math.inf], ids=["tiles", "dense"])
def strategy(request, monkeypatch):
    """Both ways: tiles always, and one dense attention always."""
    monkeypatch.setattr(place_attention, "TILES_PAY", request.param)
    return request.param


def plain_mask(layout, sees):
    """(N, N): class tokens see all and are seen by all; `sees` says it of patches, one pair at a time."""
    c, N = layout.class_tokens, layout.num_tokens
    return torch.tensor([[i < c or j < c or sees(i - c, j - c) for j in range(N)] for i in range(N)])


def plain_rotation(x):
    """Rotary positions by complex numbers: features (n, n + d/2) of token i are one number, times e^(i angle)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def plain_attention(layer, x, mask, turn=lambda t: t):
    """Dense attention of every head under a mask, and its matrix."""
    heads = [part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2)]
    query, key, value = turn(heads[0]), turn(heads[1]), heads[2]
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    matrix = scores.softmax(-1)
    return layer.proj((matrix @ value).transpose(1, 2).flatten(2)), matrix


def check(layer, mask, turn=lambda t: t):
    """Outputs, gradients and matrix are those of dense attention under the mask."""
    layer = layer.double()
    assert layer.patterns.first.is_dense == bool(place_attention.TILES_PAY > 0 or mask.all())
    x = torch.randn(2, layer.layout.num_tokens, layer.proj.in_features).double().requires_grad_()
    expected, matrix = plain_attention(layer, x, mask, turn)
    ours = layer(x)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)
    direction, inputs = torch.randn_like(ours), [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    out, found = layer(x, output_attentions=True)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(found, matrix, atol=1e-9, rtol=0)


# --- local ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [0, 1, 7, 20, 99])
def test_place_attention(strategy, layout, window):
    layer = MultiHeadLocalAttention(12, 2, layout=layout, window_size=window)
    check(layer, plain_mask(layout, lambda i, j: abs(i - j) <= window), plain_rotation)


def test_place_attention_of_odd_heads_leaves_the_last_feature():
    layout = TokenLayout(1, 40, 1)
    check(
        MultiHeadLocalAttention(10, 2, layout=layout, window_size=3),
        plain_mask(layout, lambda i, j: abs(i - j) <= 3),
        plain_rotation,
    )


def test_rotation_keeps_lengths_and_sees_distances_only():
    query, key = torch.randn(2, 1, 1, 1, 8).double().unbind()
    positions = torch.arange(20)
    turned_query, turned_key = (rotate(t.expand(1, 1, 20, 8), positions) for t in (query, key))
    torch.testing.assert_close(turned_query.norm(dim=-1), query.norm(dim=-1).expand(1, 1, 20))
    products = (turned_query @ turned_key.mT)[0, 0]
    for shift in (1, 5):
        along = products.diagonal(shift)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.isclose(products[0, 1], products[0, 5])


# --- sparse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("context", [1, 2, 5, 14, 60])
@pytest.mark.parametrize("mode", ["local", "strided"])
def test_sparse_attention(strategy, layout, mode, context):
    def sees(i, j):
        return abs(i - j) <= context / 2 or (mode == "strided" and (i - j) % context == 0)

    check(MultiHeadSparseAttention(12, 2, layout=layout, mode=mode, context=context), plain_mask(layout, sees))


def test_sparse_attention_all_is_attention():
    layout = TokenLayout(3, 5, 1)
    layer = MultiHeadSparseAttention(12, 3, layout=layout, mode="all", context=4)
    check(layer, torch.ones(16, 16, dtype=torch.bool))
    attention = MultiHeadAttention(12, 3).double()
    attention.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16, 12).double()
    torch.testing.assert_close(layer.double()(x), attention(x), atol=1e-9, rtol=0)


# --- neighborhood ---------------------------------------------------------------------------------------------------


def plain_window(position, side, kernel_size, dilation):
    """Positions along one side that one position sees, after Hassani et al.: slide until the window is inside."""
    group = range(position % dilation, side, dilation)
    start = group.index(position) - kernel_size // 2
    while start < 0:
        start += 1
    while start + kernel_size > len(group):
        start -= 1
    return set(group[start : start + kernel_size])


GRIDS = [TokenLayout(7, 5, 1), TokenLayout(6, 7), TokenLayout(11, 9, 2), TokenLayout(1, 17, 1), TokenLayout(13, 1)]


@pytest.mark.parametrize("layout", GRIDS, ids=str)
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (5, 1), (1, 2), (1, 5), (3, 2), (3, 3)])
def test_neighborhood_attention(strategy, layout, kernel_size, dilation):
    if kernel_size * dilation > min(layout.grid):
        with pytest.raises(ValueError, match=f"kernel_size={kernel_size} with dilation={dilation} spans"):
            NeighborhoodAttention(12, 2, layout=layout, kernel_size=kernel_size, dilation=dilation)
        return

    def sees(i, j):
        """Along the sides that are more than one patch."""
        places = zip(divmod(i, layout.width), divmod(j, layout.width), (layout.height, layout.width), strict=True)
        return all(side == 1 or b in plain_window(a, side, kernel_size, dilation) for a, b, side in places)

    mask = plain_mask(layout, sees)
    assert (mask[layout.class_tokens :, layout.class_tokens :].sum(1) == kernel_size ** len(layout.grid)).all()
    check(NeighborhoodAttention(12, 2, layout=layout, kernel_size=kernel_size, dilation=dilation), mask)


def test_a_window_as_large_as_the_grid_is_attention(strategy):
    layout = TokenLayout(5, 5, 1)
    layer = NeighborhoodAttention(12, 3, layout=layout, kernel_size=5).double()
    attention = MultiHeadAttention(12, 3).double()
    attention.load_state_dict(layer.state_dict())
    x = torch.randn(2, 26, 12).double()
    torch.testing.assert_close(layer(x), attention(x), atol=1e-9, rtol=0)


# --- masked ---------------------------------------------------------------------------------------------------------


def sees_masked(mask_type, step, width):
    """One pair at a time; the windows on the sequence have as many neighbors as the shapes on the grid."""

    def sees(i, j):
        (y, x), (row, column) = divmod(i, width), divmod(j, width)
        dy, dx = abs(row - y), abs(column - x)
        return {
            "1d_cardinal": abs(i - j) <= 2 * step,
            "1d_all_neighbors": abs(i - j) <= ((2 * step + 1) ** 2 - 1) / 2,
            "2d_cardinal": (dy == 0 and dx <= step) or (dx == 0 and dy <= step),
            "2d_all_neighbors": dy <= step and dx <= step,
            "full": True,
        }[mask_type]

    return sees


def masks():
    """Both strategies, but where the mask lets all see all: that is dense attention by either."""
    for layout, mask_type, step in itertools.product([*LAYOUTS, TokenLayout(11, 9, 2)], MASK_TYPES, [0, 1, 2, 5, 40]):
        mask = plain_mask(layout, sees_masked(mask_type, step, layout.width))
        for pays in (0,) if mask.all() else (0, math.inf):
            yield pytest.param(pays, layout, mask_type, step, mask, id=f"{layout}-{mask_type}-{step}-{pays}")


@pytest.mark.parametrize(("pays", "layout", "mask_type", "step", "mask"), list(masks()))
def test_masked_attention(pays, layout, mask_type, step, mask, monkeypatch):
    monkeypatch.setattr(place_attention, "TILES_PAY", pays)
    check(MultiHeadMaskedAttention(12, 2, layout=layout, mask_type=mask_type, expansion_step=step), mask)
    c = layout.class_tokens
    assert torch.equal(local_mask(mask_type, step, layout.height, layout.width), mask[c:, c:])


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_mask_that_allows_everything_is_attention(strategy, mask_type):
    layout = TokenLayout(1, 40, 1) if mask_type == "2d_cardinal" else TokenLayout(6, 7, 1)  # no cross covers a grid
    layer = MultiHeadMaskedAttention(12, 3, layout=layout, mask_type=mask_type, expansion_step=40).double()
    attention = MultiHeadAttention(12, 3).double()
    attention.load_state_dict(layer.state_dict())
    x = torch.randn(2, layout.num_tokens, 12).double()
    torch.testing.assert_close(layer(x), attention(x), atol=1e-9, rtol=0)


# --- gated positional -----------------------------------------------------------------------------------------------


def plain_gpsa(layer, x):
    """Equation by equation over all pairs of patches; class tokens by content only."""
    layout, c = layer.layout, layer.layout.class_tokens
    query, key, value = (part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2))
    content = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    places = [divmod(i, layout.width) for i in range(layout.num_patches)]
    relative = torch.tensor(
        [[[v - x, u - y, (v - x) ** 2 + (u - y) ** 2] for u, v in places] for y, x in places], dtype=torch.float64
    )
    place = layer.pos_proj(relative).permute(2, 0, 1).softmax(-1)
    gate = layer.gate.sigmoid()[:, None, None]
    matrix = content.clone()
    matrix[:, :, c:] = (1 - gate) * content[:, :, c:]
    matrix[:, :, c:, c:] = matrix[:, :, c:, c:] + gate * place
    return layer.proj((matrix @ value).transpose(1, 2).flatten(2)), matrix


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_gpsa_against_the_plain_form(layout, heads):
    layer = GatedPositionalSelfAttention(12, heads, layout=layout, locality_strength=0.3).double()
    for parameter in (layer.gate, layer.pos_proj.weight, layer.pos_proj.bias):
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, layout.num_tokens, 12).double().requires_grad_()
    expected, matrix = plain_gpsa(layer, x)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    inputs, direction = [x, *layer.parameters()], torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, direction)
    (out, found), bare = layer(x, output_attentions=True), layer(x)
    torch.testing.assert_close(found, matrix, atol=1e-9, rtol=0)
    for ours in (out, bare):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)
        for a, b in zip(torch.autograd.grad(ours, inputs, direction), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gpsa_with_closed_gates_is_attention(layout):
    layer, attention = GatedPositionalSelfAttention(12, 3, layout=layout).double(), MultiHeadAttention(12, 3).double()
    attention.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if "pos" not in name and name != "gate"}
    )
    torch.nn.init.constant_(layer.gate, -800)
    x = torch.randn(2, layout.num_tokens, 12).double().requires_grad_()
    torch.testing.assert_close(layer(x), attention(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(layer(x, True)[1], attention(x, True)[1], atol=1e-9, rtol=0)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, attention))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_gpsa_starts_as_a_convolution():
    """Gates open, nine heads, sharp: head k brings its features from tap k of a 3 x 3 kernel, and proj mixes them."""
    height, width, d = 6, 5, 18
    layer = GatedPositionalSelfAttention(d, 9, layout=TokenLayout(height, width), locality_strength=50.0).double()
    torch.nn.init.constant_(layer.gate, 800)
    weight = torch.zeros(d, d, 9).double()
    for feature in range(d):
        weight[:, feature, feature // 2] = layer.proj.weight[:, feature]
    images = torch.randn(2, d, height, width).double()
    expected = torch.nn.functional.conv2d(images, weight.unflatten(2, (3, 3)), layer.proj.bias, padding=1)
    ours = layer(images.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (height, width))
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(ours[inside], expected[inside], atol=1e-9, rtol=0)
    assert not torch.allclose(ours, expected)  # at the border heads look at the nearest patch there is, not at zeros


@pytest.mark.parametrize("heads", range(1, 17))
def test_gpsa_heads_start_at_offsets_around_the_center(heads):
    layer = GatedPositionalSelfAttention(48 * heads, heads, layout=TokenLayout(3, 4), locality_strength=2.0)
    weight = layer.pos_proj.weight.double()
    assert (weight[:, 2] == -2).all() and (layer.pos_proj.bias == 0).all() and (layer.gate == 1).all()
    offsets = [tuple(pair) for pair in (weight[:, :2] / 4).tolist()]
    side = next(side for side in range(1, 9) if side**2 >= heads)
    half = (side - 1) / 2
    square = [(x - half, y - half) for y in range(side) for x in range(side)]
    assert len(set(offsets)) == heads and offsets == [tap for tap in square if tap in offsets]
    left_out = [x**2 + y**2 for x, y in square if (x, y) not in offsets]
    assert min(left_out, default=99) >= max(x**2 + y**2 for x, y in offsets)
    alone = [tap for tap in offsets if (-tap[0], -tap[1]) not in offsets]
    assert len(alone) <= 1  # opposite to each other, but for the last one
    value = layer.qkv.weight[2 * 48 * heads :]
    assert torch.equal(value, torch.eye(48 * heads)) and (layer.qkv.bias[2 * 48 * heads :] == 0).all()


def test_gpsa_positions_are_exact_under_autocast():
    layer = GatedPositionalSelfAttention(18, 9, layout=TokenLayout(14, 14), locality_strength=1.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, columns = layer.positions(layer.layout)
    for ours, exact in zip((rows, columns), layer.positions(layer.layout), strict=True):
        assert torch.equal(ours, exact)


# --- cost, dropout, errors ------------------------------------------------------------------------------------------

MIXERS = {
    "local": lambda layout, **more: MultiHeadLocalAttention(16, 2, layout=layout, window_size=16, **more),
    "sparse local": lambda layout, **more: MultiHeadSparseAttention(16, 2, layout=layout, mode="local", context=32, **more),
    "strided": lambda layout, **more: MultiHeadSparseAttention(16, 2, layout=layout, mode="strided", context=32, **more),
    "neighborhood": lambda layout, **more: NeighborhoodAttention(16, 2, layout=layout, kernel_size=5, **more),
    "cross": lambda layout, **more: MultiHeadMaskedAttention(
        16, 2, layout=layout, mask_type="2d_cardinal", expansion_step=2, **more
    ),
    "square": lambda layout, **more: MultiHeadMaskedAttention(
        16, 2, layout=layout, mask_type="2d_all_neighbors", expansion_step=2, **more
    ),
    "gated": lambda layout, **more: GatedPositionalSelfAttention(16, 2, layout=layout, locality_strength=0.1, **more),
}
TILED = [name for name in MIXERS if name != "gated"]


def training_peak(layer, N):
    x = torch.randn(1, N, 16, requires_grad=True)
    layer(x)  # makes nothing that stays
    return peak_memory(lambda: layer(x).sum().backward(), CPU)


@pytest.mark.parametrize("name", TILED)
def test_memory_grows_with_tokens_times_window(name):
    """Four times the tokens: about four times the memory (a stride of 32 brings N / 32 keys), where a mask needs 16 times."""
    peaks = []
    for side in (32, 64):
        built = []
        layout = TokenLayout(side, side, 1)
        building = peak_memory(lambda built=built, layout=layout: built.append(MIXERS[name](layout)), CPU)
        assert side < 64 or (
            building < layout.num_tokens**2 and not built[0].patterns.first.is_dense
        )  # not even a mask of bytes
        peaks.append(training_peak(built[0], layout.num_tokens))
    assert peaks[1] < (10 if name == "strided" else 5) * peaks[0]
    assert peaks[1] < 4 * 2 * 4097**2 / (4 if name == "strided" else 8)  # bytes of two heads' scores


@pytest.mark.parametrize("name", MIXERS)
def test_dropout_drops_weights_in_training_only(strategy, name):
    layer, x = MIXERS[name](TokenLayout(6, 6, 1), attention_dropout=0.5), torch.randn(2, 37, 16)
    assert (layer(x) != layer(x)).any(dim=2).all()  # patches and class token
    mean = layer(x.repeat(500, 1, 1)).view(500, 2, 37, 16).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(mean, layer(x), atol=0.1, rtol=0)
    torch.testing.assert_close(layer(x, output_attentions=True)[0], layer(x))


@pytest.mark.parametrize("name", MIXERS)
def test_under_autocast(strategy, name):
    layer, x = MIXERS[name](TokenLayout(6, 6, 1)), torch.randn(2, 37, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("strategy", [0], ids=["tiles"], indirect=True)  # dense attention is compiled in test_vit.py
def test_compiled(strategy):
    layers = SideBySide([make(TokenLayout(6, 6, 1)) for make in MIXERS.values()]).double()
    x, results = torch.randn(2, 37, 16).double(), []
    torch._dynamo.reset()
    for call in (torch.compile(layers, backend="aot_eager", fullgraph=True), layers):
        out = call(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), layers.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mask_type", LOCAL_MASKS)
@pytest.mark.parametrize("step", [1, 5, 12])
def test_long_sequences_make_no_dense_mask(mask_type, step):
    layout = TokenLayout(34, 34, 1)
    layer = MultiHeadMaskedAttention(8, 2, layout=layout, mask_type=mask_type, expansion_step=step).double()
    assert not layer.patterns.first.is_dense
    x = torch.randn(1, layout.num_tokens, 8).double()
    torch.testing.assert_close(layer(x), layer(x, output_attentions=True)[0], atol=1e-9, rtol=0)


def test_a_long_sequence_that_sees_all_needs_no_mask():
    layer = MultiHeadMaskedAttention(8, 2, layout=TokenLayout(34, 34), mask_type="2d_all_neighbors", expansion_step=33)
    assert layer.patterns.first.is_dense and layer.patterns.first.mask is None
    attention = MultiHeadAttention(8, 2)
    attention.load_state_dict(layer.state_dict())
    x = torch.randn(1, 34 * 34, 8)
    assert torch.equal(layer(x), attention(x))


def test_state_dicts_hold_weights_only(strategy):
    for name in TILED:
        assert set(MIXERS[name](TokenLayout(6, 6, 1)).state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiHeadLocalAttention(8, 2, layout=LAYOUTS[0], window_size=-1), "window_size=-1"),
        (lambda: MultiHeadSparseAttention(8, 2, layout=LAYOUTS[0], mode="some", context=4), "all, local, strided"),
        (lambda: MultiHeadSparseAttention(8, 2, layout=LAYOUTS[0], mode="local", context=0), "context=0"),
        (
            lambda: MultiHeadMaskedAttention(8, 2, layout=LAYOUTS[0], mask_type="3d", expansion_step=1),
            "1d_cardinal, 1d_all_neighbors, 2d_cardinal, 2d_all_neighbors",
        ),
        (
            lambda: MultiHeadMaskedAttention(8, 2, layout=LAYOUTS[0], mask_type="2d_cardinal", expansion_step=-1),
            "expansion_step=-1",
        ),
        (lambda: NeighborhoodAttention(8, 2, layout=LAYOUTS[0], kernel_size=4), "kernel_size=4 must be odd"),
        (lambda: NeighborhoodAttention(8, 2, layout=LAYOUTS[0], kernel_size=3, dilation=0), "dilation=0"),
        (lambda: NeighborhoodAttention(8, 2, layout=LAYOUTS[0], kernel_size=7), "at most 5"),
        (lambda: NeighborhoodAttention(8, 3, layout=LAYOUTS[0], kernel_size=3), "num_heads=3"),
        (lambda: NeighborhoodAttention(8, 2, layout=LAYOUTS[0], kernel_size=3)(torch.randn(1, 35, 8)), "35 tokens"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_tiles_of_a_side_are_about_equal():
    from mixers.tilings import tile_size

    assert [tile_size(length, 7) for length in (64, 41, 14, 7, 6)] == [8, 7, 7, 7, 6]
    assert tile_size(64, 3) in (3, 4) and tile_size(5, 1) == 1
