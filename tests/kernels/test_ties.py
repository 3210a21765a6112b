"""Ties go to the smallest index: in every backend, dtype and exported graph one input gives one set of neighbors."""

import onnxruntime
import pytest
import torch
from torch import nn

from kernels import chunked, cpu, reference
from kernels.backend import use
from layers1d import MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import ConvNN2d, ConvNNAttention2d
from mixers.base import TokenLayout
from mixers.graph import GraphConv2d, GraphMixer
from mixers.region import BiLevelRoutingAttention, BlockTopKAttention
from neighbors import find_neighbors, find_scored_neighbors
from options.neighbors import NeighborConfig
from tests.helpers.side_by_side import SideBySide

METRICS = ["cosine", "matmul", "euclidean"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def exact_tokens(kind: str, N: int = 60) -> torch.Tensor:
    """(3, N, 4) whose scores are exact in every dtype: entries of -1 and 1, so that every length is 2, or zero tokens."""
    x = torch.randint(0, 2, (3, N, 4)) * 2 - 1
    if kind == "half blank":
        x[:, : N // 2] = 0
    elif kind == "blank":
        x[:] = 0
    return x.float()  # with 16 different tokens, most are duplicated


def in_order(scores: list[float], K: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:K]


@pytest.mark.parametrize("kind", ["duplicates", "half blank", "blank"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("K", [1, 9, 20, 60])
def test_smallest_index_first_in_every_backend_and_dtype(kind, metric, K):
    x = exact_tokens(kind)
    exact = {"matmul": x @ x.mT, "cosine": x @ x.mT, "euclidean": -torch.cdist(x, x)}[metric]
    expected = torch.tensor([[in_order(row, K) for row in image] for image in exact.tolist()])
    for dtype in DTYPES:
        for backend in ("auto", "chunked", "reference"):
            with use(backend):
                assert torch.equal(find_neighbors(x.to(dtype), x.to(dtype), K, metric), expected), (dtype, backend)
                if metric == "matmul":
                    assert torch.equal(find_scored_neighbors(x.to(dtype), x.to(dtype), K, metric)[0], expected)


@pytest.mark.parametrize("metric", METRICS)
def test_candidates_in_any_order_and_the_token_itself_first(metric):
    x = exact_tokens("half blank")
    candidates, own = torch.randperm(60)[:24], torch.arange(60)
    exact = {"matmul": x @ x.mT, "cosine": x @ x.mT, "euclidean": -torch.cdist(x, x)}[metric].tolist()

    def row(b: int, i: int) -> list[int]:
        others = sorted(set(candidates.tolist()) - {i})
        return [i, *(others[j] for j in in_order([exact[b][i][j] for j in others], 8))]

    expected = torch.tensor([[row(b, i) for i in range(60)] for b in range(3)])
    for backend in ("auto", "chunked", "reference"):
        with use(backend):
            found = find_neighbors(x, x, 9, metric, candidates=candidates, self_index=own)
            assert torch.equal(found, expected), backend


@pytest.mark.parametrize("M", [33, 64, 197, 700, 5000])
@pytest.mark.parametrize("K", [1, 2, 9, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_of_rows_with_many_equal_scores(M, K, dtype):
    scores = torch.randint(-3, 4, (2, 7, M)).to(dtype)
    scores[0, :3] *= -0.0
    scores[1, 0] = -1
    scores[1, 1, :5] = torch.inf
    expected = reference.largest(scores, K)
    for largest in (cpu.largest, chunked.largest, chunked.largest_exactly):
        assert torch.equal(largest(scores.clone(), K), expected), largest


@pytest.mark.parametrize("M", [197, 2061, 4096])
@pytest.mark.parametrize("K", [9, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_of_long_rows(M, K, dtype):
    scores = torch.randn(2, 9, M).to(dtype)
    scores[0, 1:3] = scores[0, 1:3].round()
    scores[0, 3, ::7] = scores[0, 4, 5::9] = torch.inf
    scores[0, 5, : M - K // 2] = -torch.inf
    scores[0, 6, M // 2] = scores[0, 7, ::2] = torch.nan
    finite = ~scores.isnan().any(2)
    expected = scores.double().sort(dim=2, descending=True, stable=True).indices[:, :, :K]
    for largest in (cpu.largest, chunked.largest):
        found = largest(scores, K)
        assert torch.equal(found[finite], expected[finite]), largest
        assert torch.equal(found, chunked.largest_exactly(scores, K)), largest  # NaN counts as infinity


def test_the_exported_form_of_largest(monkeypatch):
    scores = torch.randint(-3, 4, (2, 30, 50)).float()
    expected = [reference.largest(scores, K) for K in (1, 9, 50)]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert all(map(torch.equal, [reference.largest(scores, K) for K in (1, 9, 50)], expected))


# --- layers -------------------------------------------------------------------------------------------------------------

LAYOUT = TokenLayout(8, 8)


def neighbors(metric: str) -> NeighborConfig:
    return NeighborConfig(K=9, magnitude_type=metric)


def on_images() -> nn.Module:
    layers = [ConvNN2d(4, 4, neighbors(metric), padding=1) for metric in METRICS]
    layers += [ConvNNAttention2d(4, 4, neighbors("cosine"))]
    return SideBySide([*layers, GraphConv2d(4, 4, 1, neighbors("euclidean"))])


def on_sequences() -> nn.Module:
    layers = [MultiHeadConvNNAttention(8, 2, neighbors("cosine"), layout=LAYOUT), MultiHeadKvtAttention(8, 2, 9)]
    layers += [GraphMixer(8, 2, neighbors("euclidean"), layout=LAYOUT)]
    layers += [
        kind(8, 2, layout=LAYOUT, region_size=2, top_regions=3) for kind in (BiLevelRoutingAttention, BlockTopKAttention)
    ]
    return SideBySide(layers)


def blank_half(shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape)
    x[:, :, :4] = 0
    return x


@pytest.fixture(params=[18, 20], ids=["images", "sequences"])  # with the opset that they are exported to
def model_and_input(request):
    if request.param == 18:
        return on_images().eval(), blank_half((2, 4, 8, 8))
    return on_sequences().eval(), blank_half((2, 8, 8, 8)).flatten(2).mT.contiguous()


def test_a_half_blank_image_gives_one_answer(model_and_input):
    model, x = model_and_input
    expected = model(x)
    for backend in ("chunked", "reference"):
        with use(backend):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_exported_graphs_give_the_same_answer(model_and_input, request, tmp_path):
    """Sequences: for any number of images, traced with two. test_transforms.py exports layers on maps so."""
    (model, x), opset = model_and_input, request.node.callspec.params["model_and_input"]
    dynamic = opset == 20
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic else None)
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, opset_version=opset, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in (x, x[:1], torch.cat([x.flip(0), x, x[:1]]))[: 3 if dynamic else 1]:
        expected = model(images)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
        if len(images) > 1:  # where one image is given, a program of torch.export may ask for two
            torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
