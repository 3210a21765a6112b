"""linear_attention.py: each mixer against its formula over the full matrix, and attention where it must be that."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from layers1d import MultiHeadAttention
from mixers import linear as linear_attention
from mixers.base import TokenLayout
from mixers.linear import (
    HybridAttention,
    LinformerAttention,
    NystromformerAttention,
    PerformerAttention,
    orthogonal_features,
    pseudo_inverse,
)
from mixers.local import NeighborhoodAttention
from runs.measure import peak_memory

CPU = torch.device("cpu")
LAYOUTS = [TokenLayout(5, 4, 1), TokenLayout(4, 4), TokenLayout(1, 13, 2)]
N = 21


def heads_of(layer, x):
    """query, key, value of every head, (B, H, N, d)."""
    return [part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2)]


def joined(layer, mixed):
    return layer.proj(mixed.transpose(1, 2).flatten(2))


def check(layer, plain):
    """Output, gradients and matrix are those of `plain(query, key)`, the mixing matrix of every head."""
    layer = layer.double()
    tokens = layer.layout.num_tokens if layer.layout else N
    x = torch.randn(2, tokens, layer.proj.in_features).double().requires_grad_()
    query, key, value = heads_of(layer, x)
    matrix = plain(query, key, x)
    expected = joined(layer, matrix @ value)
    out, found = layer(x, output_attentions=True)
    torch.testing.assert_close(found, matrix, atol=1e-9, rtol=0)
    inputs, direction = [x, *layer.parameters()], torch.randn_like(out)
    wanted = torch.autograd.grad(expected, inputs, direction)
    for ours in (out, layer(x)):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)
        for a, b in zip(torch.autograd.grad(ours, inputs, direction), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def scores(query, key):
    return query @ key.mT / query.shape[-1] ** 0.5


def same_as_attention(layer):
    attention = MultiHeadAttention(12, 3).double()
    layer = layer.double()
    layer.load_state_dict(attention.state_dict(), strict=False)
    x = torch.randn(2, layer.layout.num_tokens, 12).double().requires_grad_()
    torch.testing.assert_close(layer(x), attention(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(layer(x, True)[1], attention(x, True)[1], atol=1e-9, rtol=0)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, attention))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


# --- Linformer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("k", [1, 6, 30])
def test_linformer(layout, k):
    layer = LinformerAttention(12, 3, k, layout=layout)
    check(layer, lambda query, key, x: scores(query, layer.key_projection @ key).softmax(-1) @ layer.value_projection)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_linformer_with_identities_is_attention(layout):
    layer = LinformerAttention(12, 3, layout.num_tokens, layout=layout)
    torch.nn.init.eye_(layer.key_projection)
    torch.nn.init.eye_(layer.value_projection)
    same_as_attention(layer)


# --- Performer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("features", [1, 3, 16])
def test_performer(kernel, features):
    """The quotient of the paper: phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1)."""
    layer = PerformerAttention(12, 3, features, kernel=kernel)

    def phi(x):
        projected = torch.einsum("bhnd,md->bhnm", x / x.shape[-1] ** 0.25, layer.random.features)
        if kernel == "relu":
            return projected.clamp(min=0) + 1e-3
        return torch.exp(projected - (x**2).sum(-1, keepdim=True) / (2 * x.shape[-1] ** 0.5)) / features**0.5

    def plain(query, key, x):
        weights = phi(query) @ phi(key).mT
        return weights / weights.sum(-1, keepdim=True)

    check(layer, plain)


def test_performer_estimates_the_softmax_kernel_without_bias():
    """The mean over many draws of phi(q) phi(k) is exp(q k / sqrt(d))."""
    query, key = (0.7 * torch.randn(2, 1, 1, 5, 4).double()).unbind()
    layer, total = PerformerAttention(4, 1, 8).double(), 0
    for seed in range(3000):
        layer.random.redraw(seed)
        total += layer.random.log_features(query).exp() @ layer.random.log_features(key).exp().mT / 8
    torch.testing.assert_close(total / 3000, scores(query, key).exp(), rtol=0.05, atol=0)


def test_performer_comes_closer_to_attention_with_more_features():
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 2).double()
    x = torch.randn(2, 50, 16).double()
    exact = attention(x, True)[1]
    errors = []
    for features in (16, 64, 256, 1024):
        layer, of_seeds = PerformerAttention(16, 2, features).double(), []
        layer.load_state_dict(attention.state_dict(), strict=False)
        for seed in range(10):
            layer.random.redraw(seed)
            of_seeds.append((layer(x, True)[1] - exact).norm() / exact.norm())
        errors.append(torch.stack(of_seeds).mean().item())
    assert all(more < 0.8 * fewer for fewer, more in itertools.pairwise(errors))
    assert errors[-1] < 0.15


def test_features_are_orthogonal_in_blocks_with_lengths_of_normal_vectors():
    features = orthogonal_features(4000, 8).double()
    for block in features.unflatten(0, (-1, 8)):
        product = block @ block.T
        torch.testing.assert_close(product, product.diagonal().diag(), atol=1e-4, rtol=0)  # made in float32
    assert features.square().sum(1).mean().item() == pytest.approx(8, rel=0.05)
    assert features.square().sum(1).var().item() == pytest.approx(16, rel=0.15)
    assert features.mean(0).abs().max() < 0.1 and orthogonal_features(5, 8).shape == (5, 8)


def test_features_are_drawn_by_a_seed_and_saved():
    torch.manual_seed(3)
    first = PerformerAttention(12, 3, 16)
    torch.manual_seed(3)
    assert torch.equal(first.random.features, PerformerAttention(12, 3, 16).random.features)
    other = PerformerAttention(12, 3, 16)
    assert not torch.equal(first.random.features, other.random.features)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.random.features, other.random.features)
    first.random.redraw(7)
    assert not torch.equal(first.random.features, other.random.features)
    other.random.redraw(7)
    assert torch.equal(first.random.features, other.random.features)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 100.0, 1e4])
def test_performer_stays_finite_and_its_rows_sum_to_one(kernel, scale):
    layer = PerformerAttention(16, 2, 8, kernel=kernel)
    x = (scale * torch.randn(2, 30, 16)).requires_grad_()
    out, matrix = layer(x, output_attentions=True)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 30))


# --- Nystromformer --------------------------------------------------------------------------------------------------


def plain_means(tokens, landmarks):
    """Runs of tokens, one after the other, as long as each other but for one token."""
    runs = [[j for j in range(tokens) if j * landmarks // tokens == i] for i in range(landmarks)]
    lengths = [len(run) for run in runs]
    assert [*itertools.chain(*runs)] == list(range(tokens)) and max(lengths) - min(lengths) <= 1
    return lambda x: torch.stack([x[:, :, run].mean(2) for run in runs], dim=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("landmarks", "conv_kernel"), [(1, 0), (2, 3), (5, 4), (7, 1)])
def test_nystromformer(layout, landmarks, conv_kernel):
    """Softmax to landmarks, the inverse by the paper's iteration for one matrix after the other, softmax to keys."""
    layer = NystromformerAttention(12, 3, landmarks, layout=layout, conv_kernel=conv_kernel)
    tokens = layout.num_tokens
    means = plain_means(tokens, landmarks)

    def plain(query, key, x):
        near = [[], []]
        for b in range(len(query)):
            kernel = scores(means(query), means(key)).softmax(-1)[b]
            near[b] = torch.stack([iterate(one) for one in kernel])
        first, last = scores(query, means(key)).softmax(-1), scores(means(query), key).softmax(-1)
        matrix = first @ torch.stack(near) @ last
        for i in range(tokens):
            for tap in range(conv_kernel):
                j = i + tap - (conv_kernel - 1) // 2
                if 0 <= j < tokens:
                    one = torch.zeros(tokens, tokens).double()
                    one[i, j] = 1
                    matrix = matrix + layer.conv.weight[:, 0, tap, :, None] * one
        return matrix

    check(layer, plain)


def iterate(matrix):
    inverse = matrix.T / (matrix.abs().sum(0).max() * matrix.abs().sum(1).max())
    one = torch.eye(len(matrix)).double()
    for _ in range(6):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return inverse


def test_pseudo_inverse_converges_and_keeps_the_batch_apart():
    rows = torch.randn(3, 2, 6, 6).double().softmax(-1) + 0.5 * torch.eye(6).double()
    torch.testing.assert_close(pseudo_inverse(rows, iterations=40), torch.linalg.pinv(rows), atol=1e-9, rtol=1e-9)
    rows[0] *= 1000  # another scale for one matrix does nothing to the others
    torch.testing.assert_close(pseudo_inverse(rows)[1], pseudo_inverse(rows[1:2])[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("more", [0, 5])
def test_nystromformer_with_a_landmark_for_every_token_is_attention(layout, more):
    same_as_attention(NystromformerAttention(12, 3, layout.num_tokens + more, layout=layout))


def test_the_convolution_of_nystromformer_is_added_to_exact_attention_too():
    layout = LAYOUTS[0]
    layer = NystromformerAttention(12, 3, 99, layout=layout, conv_kernel=3)
    attention = NystromformerAttention(12, 3, 99, layout=layout)
    attention.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, layout.num_tokens, 12)
    value = heads_of(layer, x)[2]
    padded = F.pad(value, (0, 0, 1, 1))
    conv = sum(layer.conv.weight[:, 0, tap, :, None] * padded[:, :, tap : tap + layout.num_tokens] for tap in range(3))
    torch.testing.assert_close(layer(x), attention(x) + F.linear(conv.transpose(1, 2).flatten(2), layer.proj.weight))


# --- Hybrid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("dilations", [(1,), (1, 2), (2, 1, 3)])
@pytest.mark.parametrize("layout", [TokenLayout(9, 10, 1), TokenLayout(9, 9)], ids=str)
def test_hybrid_is_its_branches_by_their_shares(layout, dilations, kernel):
    layer = HybridAttention(
        12, 3, layout=layout, window=3, dilations=dilations, num_features=8, kernel=kernel, bias=True
    ).double()
    branches = [NeighborhoodAttention(12, 3, layout=layout, kernel_size=3, dilation=step) for step in dilations]
    branches.append(PerformerAttention(12, 3, 8, kernel=kernel))
    branches[-1].random.features = layer.context.features
    for branch in branches:
        branch.double().load_state_dict(layer.state_dict(), strict=False)

    def plain(query, key, x):
        shares = layer.gate(x).softmax(-1)
        return sum(shares[:, None, :, n : n + 1] * branch(x, output_attentions=True)[1] for n, branch in enumerate(branches))

    check_branches = [
        layer(x := torch.randn(1, layout.num_tokens, 12).double()),
        joined(layer, plain(None, None, x) @ heads_of(layer, x)[2]),
    ]
    torch.testing.assert_close(*check_branches, atol=1e-9, rtol=0)
    for branch in branches:  # the same parameters, so that gradients can be compared
        branch.qkv, branch.proj = layer.qkv, layer.proj
    check(layer, plain)


# --- all ------------------------------------------------------------------------------------------------------------

MIXERS = {
    "Linformer": lambda layout, **more: LinformerAttention(16, 2, 12, layout=layout, **more),
    "Performer": lambda layout, **more: PerformerAttention(16, 2, 12, **more),
    "Performer relu": lambda layout, **more: PerformerAttention(16, 2, 12, kernel="relu", **more),
    "Nystromformer": lambda layout, **more: NystromformerAttention(16, 2, 12, layout=layout, conv_kernel=3, **more),
    "Hybrid": lambda layout, **more: HybridAttention(16, 2, layout=layout, window=3, dilations=(1, 2), num_features=12, **more),
}


@pytest.mark.parametrize("name", MIXERS)
def test_memory_grows_linearly(name):
    peaks = []
    for side in (16, 32, 64):
        layer, x = MIXERS[name](TokenLayout(side, side, 1)), torch.randn(1, side**2 + 1, 16, requires_grad=True)
        layer(x)
        peaks.append(peak_memory(lambda layer=layer, x=x: layer(x).sum().backward(), CPU))
    assert peaks[2] < 5 * peaks[1] and peaks[1] < 6 * peaks[0]
    assert peaks[2] < 4 * 2 * 4097**2 / 4  # bytes of two heads' scores


@pytest.mark.parametrize("name", MIXERS)
def test_dropout_drops_weights_in_training_only(name):
    layer, x = MIXERS[name](TokenLayout(6, 6, 1), attention_dropout=0.5), torch.randn(2, 37, 16)
    assert (layer(x) != layer(x)).any(dim=2).float().mean() > 0.95
    mean = layer(x.repeat(1000, 1, 1)).unflatten(0, (1000, 2)).mean(0)  # each image of a batch has draws of its own
    matrix = layer(x, output_attentions=True)[1]
    layer.eval()
    torch.testing.assert_close(layer(x, output_attentions=True)[1], matrix)  # that of the mixer, with nothing dropped
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(mean, layer(x), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", MIXERS)
def test_the_matrix_is_what_mixes_the_values(name):
    layer, x = MIXERS[name](TokenLayout(6, 6, 1)).double(), torch.randn(2, 37, 16).double()
    out, matrix = layer(x, output_attentions=True)
    assert matrix.shape == (2, 2, 37, 37)
    torch.testing.assert_close(joined(layer, matrix @ heads_of(layer, x)[2]), out)


@pytest.mark.parametrize("name", MIXERS)
def test_a_head_changes_itself_only(name):
    layer, head, seen = MIXERS[name](TokenLayout(6, 6, 1)).double(), None, []

    def perturb(module, inputs, output):
        if head is None:
            return output
        output = output.clone()
        output[:, :, 32 + 8 * head : 40 + 8 * head] += 1
        output[:, :, 8 * head : 8 * head + 3] *= 2
        return output

    layer.qkv.register_forward_hook(perturb)
    layer.proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 37, 16).double()
    layer(x)
    for head in range(2):
        layer(x)
        assert (seen[-1] != seen[0]).any(dim=(0, 1)).tolist() == [i // 8 == head for i in range(16)]


@pytest.mark.parametrize("name", MIXERS)
def test_autocast(name):
    layer, x = MIXERS[name](TokenLayout(6, 6, 1)), torch.randn(2, 37, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logarithms_of_features_are_float32(kernel, dtype):
    random, x = PerformerAttention(16, 2, 12, kernel=kernel).random, torch.randn(2, 2, 9, 8).to(dtype)
    expected = random.log_features(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = random.log_features(x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert random.to(dtype).log_features(x).dtype == torch.float32


def test_pseudo_inverse_is_float32_under_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr(linear_attention, "pseudo_inverse", lambda matrix: seen.append(pseudo_inverse(matrix)) or seen[-1])
    layer, x = MIXERS["Nystromformer"](TokenLayout(6, 6, 1)), torch.randn(2, 37, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert [inverse.dtype for inverse in seen] == [torch.float32]


def test_nystromformer_drops_what_queries_read_only(monkeypatch):
    dropouts = []
    real = linear_attention.attend

    def attend(*args, dropout=0.0, **more):
        dropouts.append(dropout)
        return real(*args, dropout=dropout, **more)

    monkeypatch.setattr(linear_attention, "attend", attend)
    MIXERS["Nystromformer"](TokenLayout(6, 6, 1), attention_dropout=0.5)(torch.randn(2, 37, 16))
    assert dropouts == [0.0, 0.5]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinformerAttention(8, 2, 0, layout=LAYOUTS[0]), "k=0"),
        (lambda: LinformerAttention(8, 2, 4, layout=LAYOUTS[0])(torch.randn(1, 20, 8)), "20 tokens"),
        (lambda: PerformerAttention(8, 2, 0), "num_features=0"),
        (lambda: PerformerAttention(8, 2, 4, kernel="cosine"), "softmax, relu"),
        (lambda: NystromformerAttention(8, 2, 0, layout=LAYOUTS[0]), "num_landmarks=0"),
        (lambda: NystromformerAttention(8, 2, 2, layout=LAYOUTS[0], conv_kernel=-1), "conv_kernel=-1"),
        (lambda: HybridAttention(8, 2, layout=LAYOUTS[0], window=2, dilations=(1,), num_features=4), "window=2 must be odd"),
        (lambda: HybridAttention(8, 2, layout=LAYOUTS[0], window=3, dilations=(1, 2), num_features=4), "dilations=2 spans 6"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_segments_need_no_padding():
    """Landmarks of constant tokens are that constant, however many tokens there are."""
    for tokens in range(2, 40):
        for landmarks in range(1, tokens):
            segments = NystromformerAttention(4, 1, landmarks, layout=TokenLayout(1, tokens)).tables.first.segments
            assert segments.sum(0).eq(1).all() and segments.sum() == tokens
            assert segments.sum(1).max() - segments.sum(1).min() <= 1
