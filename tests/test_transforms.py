"""Models under PyTorch's transforms: export, ONNX, torch.func, gradients of gradients, the meta device, checkpointing."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from allconvnet import AllConvNet
from layers2d import ConvNN2d
from models.convit import ConViTConfig, ConViTWithLinearClassifier
from neighbors import aggregate, find_neighbors, find_scored_neighbors, max_neighbors, neighbor_scores, weighted_sum
from options.allconvnet import AllConvNetConfig
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from options.neighbors import NeighborConfig
from options.vit import ViTConfig
from tests.helpers.pools import pool_of
from tests.helpers.side_by_side import SideBySide, in_groups
from vit import ViT

SMALL = {
    "image_size": 16,
    "in_channels": 1,
    "patch_size": 4,
    "num_layers": 1,
    "num_heads": 2,
    "d_model": 8,
    "d_mlp": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "kernel_size": 3,
    "hybrid_dilations": (1,),
    "K": 4,
    "linformer_k": 4,
    "nystrom_landmarks": 4,
    "performer_features": 8,
}
NEIGHBORS = (
    {"sampling_type": "random", "num_samples": 6},
    {"sampling_type": "spatial", "num_samples": 3},
    {"similarity_type": "Loc_Col", "magnitude_type": "euclidean"},
    {"similarity_type": "Loc"},
)


def make(kind, **options):
    if kind is ViT:
        return ViT(ViTConfig(**SMALL | {"pool": pool_of(options["layer"])} | options))
    return AllConvNet(AllConvNetConfig(**{"channels": (8,), "K": 4, "image_size": 16, "in_channels": 1} | options))


MODELS = [
    *((ViT, {"layer": layer}) for layer in LAYERS1D_NAMES),
    *((AllConvNet, {"layer": layer}) for layer in (*LAYERS2D_NAMES, "Conv2d/ConvNN")),
    (ViT, {"layer": "GPSA", "num_local_layers": 0}),
    *((ViT, {"layer": "ConvNNAttention", **options}) for options in NEIGHBORS),
    *((AllConvNet, {"layer": "ConvNN", **options}) for options in NEIGHBORS),
]
models = pytest.mark.parametrize(
    ("kind", "options"), MODELS, ids=[f"{kind.__name__}-{'-'.join(map(str, o.values()))}" for kind, o in MODELS]
)


def batch(images=3):
    return torch.randn(images, 1, 16, 16), torch.randint(0, 10, (images,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's attention, one image at a time
@models
def test_gradients_per_sample_by_torch_func(kind, options):
    """torch.func.grad under vmap over images gives the gradients that autograd gives."""
    model = make(kind, **options).eval()
    images, labels = batch()
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (image[None],)), label[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, images, labels)
    F.cross_entropy(model(images), labels).backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].mean(dim=0), parameter.grad, atol=1e-5, rtol=1e-4)


QUERY, KEY, VALUES, SCORES = (2, 4, 3), (2, 5, 3), (2, 5, 3), (2, 4, 2)
INDEX = torch.tensor([[[0, 1], [3, 4], [2, 2], [4, 0]], [[1, 3], [2, 0], [0, 4], [3, 3]]])
METRICS = ("matmul", "cosine", "euclidean")
DIFFERENTIABLE = {  # operators, and the shapes of their inputs
    **{f"scores {m}": (lambda q, k, m=m: neighbor_scores(q, k, INDEX, m), (QUERY, KEY)) for m in METRICS},
    **{f"search {m}": (lambda q, k, m=m: find_scored_neighbors(q, k, 2, m)[1], (QUERY, KEY)) for m in METRICS},
    "aggregate": (lambda v, w: aggregate(v, INDEX, w), (VALUES, (2, 3, 2))),
    "aggregate scored": (lambda v, w, s: aggregate(v, INDEX, w, s), (VALUES, (2, 3, 2), SCORES)),
    "depthwise": (lambda v, w, s: aggregate(v, INDEX, w, s, depthwise=True), (VALUES, (3, 1, 2), SCORES)),
    "weighted sum": (lambda v, w: weighted_sum(v, INDEX, w), (VALUES, SCORES)),
    "maximum": (lambda v: max_neighbors(v, INDEX), (VALUES,)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_gradients(name):
    """Every operator, differentiated twice by every choice of its inputs, against finite differences of its gradient."""
    operator, shapes = DIFFERENTIABLE[name]
    for wanted in itertools.product([True, False], repeat=len(shapes)):
        if any(wanted):
            inputs = [
                torch.randn(shape, dtype=torch.float64, requires_grad=need) for shape, need in zip(shapes, wanted, strict=True)
            ]
            assert torch.autograd.gradgradcheck(operator, inputs, fast_mode=True), wanted


def test_gradients_of_gradients_where_query_and_key_are_one_tensor():
    same = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    own = find_neighbors(same, same, 2, "matmul")
    assert torch.autograd.gradgradcheck(lambda x: neighbor_scores(x, x, own, "matmul"), (same,))


@models
def test_constant_tables_survive_the_meta_device(kind, options):
    """A model made on the meta device, given memory and loaded is the model, as FSDP and large models are made."""
    model = make(kind, **options).eval()
    with torch.device("meta"):
        other = make(kind, **options).eval()
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    images, _ = batch()
    assert torch.equal(other(images), model(images))
    model.to_empty(device="cpu").load_state_dict(other.state_dict())  # also where there was nothing on the meta device
    assert torch.equal(other(images), model(images))
    for parameter in other.double().parameters():
        assert parameter.dtype == torch.float64
    assert other(images.double()).dtype == torch.float64


LOADED_ELSEWHERE = """
import sys, torch
assert not any(name in sys.modules for name in ("vit", "neighbors", "kernels"))
images, logits = torch.load("tensors.pt")
found = torch.export.load("model.pt2").module()(images)
torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
"""


def test_an_exported_program_needs_none_of_our_modules(tmp_path):
    model = make(ViT, layer="ConvNNAttention").eval()
    images, _ = batch(5)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((images, model(images).detach()), tmp_path / "tensors.pt")
    subprocess.run([sys.executable, "-c", LOADED_ELSEWHERE], cwd=tmp_path, check=True)


def many(kind, every):
    """A model whose one mixer is these side by side: most of an export's time is spent once per model."""
    models = [make(kind, **options) for options in every]
    if kind is ViT:
        models[0].blocks[0].mixer = SideBySide([model.blocks[0].mixer for model in models])
    else:
        models[0].layers[0][0] = SideBySide([model.layers[0][0] for model in models])
    return models[0]


ELSEWHERE = ("ConvNNAttention", "KvtAttention", "ViG", "BiFormer", "BlockTopK")  # exported by kernels/test_ties.py
EXPORTED = {
    **{
        " ".join(names): (ViT, [{"layer": name} for name in names])
        for names in in_groups(tuple(name for name in LAYERS1D_NAMES if name not in ELSEWHERE), 2)
    },
    "class token after local layers": (ViT, [{"layer": "GPSA", "num_layers": 2, "num_local_layers": 1}]),
    "neighbors of tokens": (ViT, [{"layer": "ConvNNAttention", **options} for options in NEIGHBORS[::2]]),
    "layers of AllConvNet and neighbors of pixels": (
        AllConvNet,
        [{"layer": name} for name in ("Attention", "Identity", "Pooling", "Conv2d/ConvNN_Attn")]
        + [{"layer": "ConvNN", **options} for options in NEIGHBORS[1::2]],
    ),
}


@pytest.mark.parametrize(("kind", "every"), EXPORTED.values(), ids=list(EXPORTED))
def test_onnx(kind, every, tmp_path, monkeypatch):
    """`--export FILE.onnx` for another number of images, as onnxruntime computes it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from runs.export import export_onnx

    if len(every) > 1:  # PyTorch's simplification of the graph takes a fifth of the time: once is enough
        monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", lambda program: None)
    model = many(kind, every).eval()
    export_onnx(tmp_path / "model.onnx", model, (1, 16, 16))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 5):  # it was traced with two images
        images, _ = batch(size)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("similarity_type", ["Col", "Loc"])
def test_a_compiled_layer_of_unknown_size_under_checkpointing(similarity_type):
    """Tables that are made in the graph: nothing is stored in the module while a graph is recomputed."""
    layer = ConvNN2d(3, 4, NeighborConfig(K=4, similarity_type=similarity_type))
    images = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    compiled(images).square().sum().backward()
    found = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    layer(images).square().sum().backward()
    for ours, theirs in zip(found, (parameter.grad for parameter in layer.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_zero_scores_keep_their_columns_where_denormals_are_flushed():
    """Tokens of zeros, as after a ReLU, have scores of exactly zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormal numbers")
    try:
        found = find_neighbors(torch.zeros(1, 64, 4), torch.zeros(1, 64, 4), 4, "cosine")
    finally:
        torch.set_flush_denormal(False)
    assert all(len(set(row)) == 4 for row in found[0].tolist())


def test_a_convit_exports_with_a_dynamic_batch():
    config = ConViTConfig(16, 1, 4, num_local_layers=1, num_nonlocal_layers=1, dim=8, num_classes=5, heads=2)
    model, images = ConViTWithLinearClassifier(config).eval(), torch.randn(5, 1, 16, 16)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images), model(images))


def test_modules_that_are_no_models_export_as_well():
    layer = nn.Sequential(ConvNN2d(2, 3, NeighborConfig(K=3), image_size=5), nn.ReLU())
    images = torch.randn(4, 2, 5, 5)
    program = torch.export.export(layer, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not any("convnn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images), layer(images))
