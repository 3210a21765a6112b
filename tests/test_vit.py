import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from layers1d import (
    BranchingAttention,
    BranchingConv,
    MultiHeadAttention,
    MultiHeadConv1d,
    MultiHeadConv1dAttention,
    MultiHeadConvNN,
    MultiHeadConvNNAttention,
    MultiHeadKvtAttention,
)
from mixers.base import TokenLayout
from mixers.linear import HybridAttention, LinformerAttention, NystromformerAttention, PerformerAttention
from mixers.local import (
    GatedPositionalSelfAttention,
    MultiHeadLocalAttention,
    MultiHeadMaskedAttention,
    MultiHeadSparseAttention,
    NeighborhoodAttention,
)
from models.pretrained import load_vit_weights
from options.layers import LAYERS1D_NAMES, LAYERS1D_ROWS
from options.vit import ViTConfig
from runs.measure import count_flops, count_parameters
from runs.optimization import make_optimizer
from tests.helpers.pools import pool_of
from tests.helpers.side_by_side import SideBySide, in_groups
from vit import ViT, make_layer1d

TYPES = {
    "Attention": MultiHeadAttention,
    "ConvNN": MultiHeadConvNN,
    "ConvNNAttention": MultiHeadConvNNAttention,
    "Conv1d": MultiHeadConv1d,
    "Conv1dAttention": MultiHeadConv1dAttention,
    "KvtAttention": MultiHeadKvtAttention,
    "LocalAttention": MultiHeadLocalAttention,
    "SparseAttention": MultiHeadSparseAttention,
    "MaskedAttention": MultiHeadMaskedAttention,
    "NeighborhoodAttention": NeighborhoodAttention,
    "Linformer": LinformerAttention,
    "Performer": PerformerAttention,
    "Nystromformer": NystromformerAttention,
    "Hybrid": HybridAttention,
    "GPSA": GatedPositionalSelfAttention,
    "BranchConv": BranchingConv,
    "BranchAttention": BranchingAttention,
}
WITHOUT_MATRIX = ("Conv1d", "Conv1dAttention", "ViG", "GreedyViG", "Identity", "Pointwise")
WITHOUT_MATRIX += ("MlpMixer", "FNet", "GFNet", "XCiT", "FocalModulation")


def make_config(**options):
    """12 patches in 3 rows of 4, by default after a class token: 13 tokens."""
    defaults = {
        "image_size": (12, 16),
        "patch_size": 4,
        "num_layers": 2,
        "num_heads": 2,
        "d_model": 16,
        "d_mlp": 24,
        "K": 4,
        "kernel_size": 3,
        "window_size": 2,
        "sparse_context_window": 3,
        "linformer_k": 6,
        "performer_features": 10,
        "nystrom_landmarks": 5,
        "nystrom_conv_kernel": 3,
        "hybrid_dilations": (1,),
        "region_size": 1,
        "value_convolution": 3,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "num_classes": 5,
        "initializer_range": 0.2,
        "pool": pool_of(options.get("layer", "Attention")),
    }
    return ViTConfig(**defaults | options)


def make(**options):
    return ViT(make_config(**options))


def images(batch=2, channels=3, size=(12, 16)):
    return torch.randn(batch, channels, *size)


# --- the registry ---------------------------------------------------------------------------------------------------


def test_option_names_are_the_registry():
    assert LAYERS1D_NAMES[: len(TYPES)] == tuple(TYPES)


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_layers_are_what_the_name_says_and_follow_the_flags(layer):
    config = make_config(
        layer=layer,
        K=5,
        kernel_size=1,
        window_size=7,
        sparse_mode="local",
        sparse_context_window=6,
        dilation=2 if layer == "ViG" else 3,  # of its K * dilation nearest neighbors, there are 13
        mask_type="1d_cardinal",
        expansion_step=2,
        linformer_k=7,
        performer_features=11,
        performer_kernel="relu",
        nystrom_landmarks=4,
        nystrom_conv_kernel=5,
        hybrid_window=1,
        hybrid_dilations=(3, 1, 2),
        locality_strength=3.0,
        graph_aggregation="mean",
        top_regions=3,
        value_convolution=5,
        num_clusters=7,
        branch_ratio=0.25,
        convolution_type="standard",
        softmax_topk_val=False,
        attention_dropout=0.3,
        attention_bias=False,
        magnitude_type="distance",
        num_heads=4,
    )
    mixer = make_layer1d(config, TokenLayout(3, 4, config.class_tokens))
    # A layer that is new, and not in the list above, is what its row says.
    assert type(mixer) is TYPES[layer] if layer in TYPES else LAYERS1D_ROWS[layer].target.endswith(type(mixer).__name__)
    assert not any("bias" in name for name, _ in mixer.named_parameters() if name != "pos_proj.bias")
    parts = [mixer.first, mixer.second] if layer.startswith("Branch") else [mixer]
    for part in parts:
        assert part.num_heads == 4
        if "attention_dropout" in LAYERS1D_ROWS[layer].options and not isinstance(part, MultiHeadConv1dAttention):
            assert part.attention_dropout == 0.3
        if isinstance(part, MultiHeadConvNNAttention):
            assert part.select.neighbors == config.neighbors and not part.softmax_topk_val
            assert part.conv.weight.shape == (part.head_dim, part.head_dim, 5)
        if isinstance(part, MultiHeadConv1dAttention):
            assert part.conv.weight.shape == (part.head_dim, part.head_dim, 1)
    if layer.startswith("Branch"):
        assert mixer.widths == (4, 12)
    if layer == "KvtAttention":
        assert mixer.K == 5
    if layer == "ViG":
        assert mixer.dilation == 2 and mixer.select.neighbors.K == 10 and mixer.graph.kind == "mean"
    if layer in ("BiFormer", "BlockTopK"):
        assert mixer.tables.first.regions.shape == (12, 1) and mixer.top_regions == 3
    if layer == "BiFormer":
        assert mixer.conv.weight.shape == (16, 1, 5, 5)
    if layer == "PaCa":
        assert mixer.cluster.weight.shape == (7, 16)
    if layer == "Linformer":
        assert mixer.key_projection.shape == mixer.value_projection.shape == (7, 13)
    if layer == "Performer":
        assert mixer.random.features.shape == (11, 4) and mixer.random.kernel == "relu"
    if layer == "Nystromformer":
        assert mixer.tables.first.segments.shape == (4, 13) and mixer.conv.weight.shape == (4, 1, 5, 1)
    if layer == "Hybrid":
        assert len(mixer.regional) == 3 and mixer.gate.weight.shape == (4, 16)
        assert mixer.context.features.shape == (11, 4) and mixer.context.kernel == "relu"
    if layer == "GPSA":
        assert (mixer.pos_proj.weight[:, 2] == -3).all()
    reaches = {"LocalAttention": 7, "SparseAttention": 3, "MaskedAttention": 4, "NeighborhoodAttention": 0, "Hybrid": 0}
    if layer in reaches:
        reach = reaches[layer]
        pattern = (mixer.regional[0] if layer == "Hybrid" else mixer.patterns).first
        patches = pattern.make_mask(torch.device("cpu"))[1:, 1:]
        far = torch.tensor([[abs(i - j) <= reach for j in range(12)] for i in range(12)])
        assert torch.equal(patches, far)


@pytest.mark.parametrize(
    ("ratio", "kinds"), [(0.0, (MultiHeadConv1dAttention, MultiHeadAttention)), (1.0, (MultiHeadConvNNAttention,) * 2)]
)
def test_branch_ratio_of_0_and_1_builds_the_single_layer(ratio, kinds):
    for layer, kind in zip(("BranchConv", "BranchAttention"), kinds, strict=True):
        assert type(make_layer1d(make_config(layer=layer, branch_ratio=ratio), TokenLayout(3, 4, 1))) is kind


# --- every layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_every_layer_trains_a_step(layer, pool):
    pool = pool_of(layer, pool)
    windows = {"image_size": (16, 16), "region_size": 2} if layer == "Swin" else {}  # of more than one patch
    model = make(layer=layer, pool=pool, pos_embedding="learned", **windows)
    tokens = math.prod(model.config.grid) + (pool == "cls")  # odd and even
    x, labels = images(4, size=model.config.image_size), torch.arange(4)
    before = F.cross_entropy(model(x), labels)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Parameters for locations in the last block do not reach the class token.
        by_place = {"GPSA": ("blocks.1.mixer.gate", "blocks.1.mixer.pos_proj"), "BiFormer": ("blocks.1.mixer.conv",)}
        by_place |= {"GFNet": ("blocks.1.mixer.filter",), "Swin": ("blocks.1.mixer.offsets",)}
        unread = pool == "cls" and name.startswith(by_place.get(layer, ()))
        assert unread or parameter.grad.abs().sum() > 0, name
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert F.cross_entropy(model(x), labels) < before
    logits, matrices = model.eval()(x, output_attentions=True)
    torch.testing.assert_close(logits, model(x))
    assert logits.shape == (4, 5) and len(matrices) == 2
    for matrix in matrices:
        if layer in WITHOUT_MATRIX:
            assert matrix is None
        else:
            assert matrix.shape == (4, 2, tokens, tokens)
            if layer not in ("Linformer", "Nystromformer", "ContextCluster"):
                total = torch.zeros if layer == "Pooling" else torch.ones  # an average, minus the token
                torch.testing.assert_close(matrix.sum(3), total(4, 2, tokens))


@pytest.mark.parametrize("magnitude_type", ["cosine", "distance"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("layer", ["ConvNN", "ConvNNAttention", "BranchConv"])
@pytest.mark.parametrize(("sampling", "samples"), [("all", -1), ("random", 5), ("spatial", 2)])
def test_neighbors_give_every_parameter_a_gradient(layer, magnitude_type, softmax, sampling, samples):
    model = make(
        layer=layer,
        magnitude_type=magnitude_type,
        softmax_topk_val=softmax,
        sampling_type=sampling,
        num_samples=samples,
        coordinate_encoding=True,
    )
    model(images(4)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
@pytest.mark.parametrize(("channels", "batch", "size"), [(1, 1, (12, 12)), (3, 1, (20, 12)), (1, 3, (12, 12))])
def test_grey_and_colour_odd_grids_and_a_batch_of_one(layer, channels, batch, size):
    model = make(layer=layer, in_channels=channels, image_size=size)
    assert model(images(batch, channels, size)).shape == (batch, 5)


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_an_image_is_the_same_alone_and_in_a_batch(layer):
    model = make(layer=layer, sampling_type="random", num_samples=4, similarity_type="Loc_Col").double().eval()
    x = images(3).double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_bfloat16_autocast(layer):
    model, x = make(layer=layer, K=12), images()  # a choice among near ties would differ between the precisions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(x), atol=0.1, rtol=0.1)
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("layers", in_groups(LAYERS1D_NAMES, 2), ids="-".join)
def test_compiles_without_a_graph_break(layers):
    """Once for all batches, in training, with activations that are recomputed and candidates drawn inside the graph."""
    options = {"sampling_type": "random", "num_samples": 5, "similarity_type": "Loc_Col"}
    model, x = make(num_layers=1), images().double()
    model.blocks[0].mixer = SideBySide([make(layer=layer, num_layers=1, **options).blocks[0].mixer for layer in layers])
    model.double()
    model.blocks[0].drop_path.rate = 0.5  # which the last of several blocks has
    model.recompute = True
    torch._dynamo.reset()
    results, counter = [], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for call in (compiled, model):
        torch.manual_seed(1)
        logits = call(x)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), model.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    compiled(torch.randn_like(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("layer", ["ConvNNAttention"])
def test_inductor_gives_the_same_gradients(layer):
    # Compiled, attention of float64 on the CPU has no backward pass in PyTorch 2.11 (it finds a float32).
    dtype, tolerance = (torch.float64, 1e-9) if torch.__version__ >= "2.12" else (torch.float32, 1e-4)
    mixer, x = make(layer=layer).blocks[0].mixer.to(dtype), torch.randn(2, 13, 16).to(dtype)
    expected = torch.autograd.grad(mixer(x).square().sum(), mixer.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), mixer.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=tolerance)


def test_recomputed_activations_give_the_same_gradients():
    model, x = make(layer="ConvNNAttention", sampling_type="random", num_samples=5, dropout=0.3), images()
    gradients, calls = [], []
    model.blocks[1].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.recompute, count in ((False, 1), (True, 3)):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(model(x).square().sum(), model.parameters()))
        assert len(calls) == count  # forward, and once more for the backward pass
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_copies_and_state_dicts(layer):
    model = make(layer=layer).eval()
    twin = make(layer=layer).eval()
    twin.load_state_dict(model.state_dict())
    x = images()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        assert torch.equal(copied(x), model(x))
    # Random ones, saved with the model.
    buffers = {name for name in model.state_dict() if name.endswith((".features", ".random_matrix"))}
    assert set(model.state_dict()) - buffers == {name for name, _ in model.named_parameters()}
    assert len(buffers) == (2 if layer in ("Performer", "Hybrid", "RandomMixing") else 0)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_heads": 3}, 5_479_306),
        ({"layer": "ConvNNAttention", "num_heads": 1}, 5_500_042),
        ({"layer": "ConvNNAttention", "num_heads": 1, "convolution_type": "standard"}, 9_460_618),
    ],
)
def test_parameter_counts(options, expected):
    config = ViTConfig(image_size=224, num_layers=12, d_model=192, d_mlp=768, attention_bias=False, K=9, **options)
    assert count_parameters(ViT(config)) == expected


def test_flops_against_a_hand_count():
    """Multiply-adds times two: patches, projections, scores and their products with values, MLP, classifier."""
    N, d, mlp = 13, 16, 24
    block = N * d * 3 * d + 2 * N * N * d + N * d * d + 2 * N * d * mlp
    expected = 2 * (12 * 4 * 4 * 3 * d + 2 * block + d * 5)
    assert count_flops(make(), images(1)) == expected


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("pos_embedding", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize(("patch_norm", "final_norm"), [(True, False), (False, True)])
def test_the_model_step_by_step(pool, pos_embedding, patch_norm, final_norm):
    model = make(pool=pool, pos_embedding=pos_embedding, patch_norm=patch_norm, final_norm=final_norm).double().eval()
    x = images().double()
    rows = [
        x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1) @ model.patch_embedding.weight.flatten(1).T
        for i in range(3)
        for j in range(4)
    ]
    tokens = torch.stack(rows, dim=1) + model.patch_embedding.bias

    def norm(layer, tokens):
        centered = tokens - tokens.mean(-1, keepdim=True)
        return layer.weight * centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() + layer.bias

    if patch_norm:
        tokens = norm(model.patch_norm, tokens)
    if pool == "cls":
        tokens = torch.cat([model.class_token.expand(2, -1, -1), tokens], dim=1)
    if pos_embedding == "sinusoidal":
        table = [
            [(math.sin if n % 2 == 0 else math.cos)(i / 10000 ** ((n - n % 2) / 16)) for n in range(16)]
            for i in range(tokens.shape[1])
        ]
        tokens = tokens + torch.tensor(table, dtype=torch.float64).float().double()
    elif pos_embedding == "learned":
        tokens = tokens + model.pos_embedding
    for block in model.blocks:
        tokens = tokens + block.mixer(norm(block.norm1, tokens))
        hidden = F.linear(norm(block.norm2, tokens), block.mlp[0].weight, block.mlp[0].bias)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        tokens = tokens + F.linear(hidden, block.mlp[2].weight, block.mlp[2].bias)
    if final_norm:
        tokens = norm(model.norm, tokens)
    pooled = tokens[:, 0] if pool == "cls" else tokens.mean(1)
    torch.testing.assert_close(model(x), pooled @ model.classifier.weight.T + model.classifier.bias, atol=1e-9, rtol=0)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_local_layers_come_first_and_the_class_token_after_them(n, pool):
    model = make(layer="NeighborhoodAttention", num_layers=3, num_local_layers=n, pool=pool, pos_embedding="learned")
    kinds = [type(block.mixer) for block in model.blocks]
    assert kinds == [NeighborhoodAttention] * n + [MultiHeadAttention] * (3 - n)
    plan = make(layer="NeighborhoodAttention", num_layers=3, num_local_layers=n, attention_bias=False, attention_dropout=0.3)
    for block in plan.blocks:
        assert block.mixer.qkv.bias is None is block.mixer.proj.bias and block.mixer.attention_dropout == 0.3
    assert model.pos_embedding.shape == (1, 12, 16)
    sizes = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[1]))
    logits, matrices = model(images(), output_attentions=True)
    assert sizes == [12] * n + [12 + (pool == "cls")] * (3 - n)
    assert [matrix.shape[2] for matrix in matrices] == sizes and logits.shape == (2, 5)


def test_attention_in_every_block_is_the_plan_without_local_layers():
    with pytest.raises(ValueError, match="num_local_layers=2 must be below num_layers=2"):
        make(num_local_layers=2)


@pytest.mark.parametrize("part", ["mixer", "mlp"])
def test_dropout_drops_what_mixer_and_mlp_add_in_training_only(part):
    """With the other part adding zeros, each token's features are the input's, plus twice or none of what is added."""
    block = make(dropout=0.5).double().blocks[0]
    silent = block.mixer.proj if part == "mlp" else block.mlp[2]
    nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
    x = torch.randn(2, 13, 16).double()
    added = block.eval()(x) - x
    dropped = block.train()(x) - x
    kept = dropped != 0
    torch.testing.assert_close(dropped, 2 * added * kept)
    assert 0.3 < kept.double().mean() < 0.7 and added.abs().min() > 0


def test_initialisation():
    torch.manual_seed(1)
    model = ViT(
        ViTConfig(
            image_size=32,
            patch_size=4,
            d_model=128,
            num_heads=4,
            num_layers=2,
            initializer_range=0.05,
            layer="ConvNNAttention",
            pos_embedding="learned",
        )
    )
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.05)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.Conv1d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
    assert model.pos_embedding.std().item() == pytest.approx(0.05, rel=0.1) and model.class_token.abs().sum() > 0
    # 8 channels and 4 slots. Under a softmax over the slots each is a projection (Xavier), else torch's own initialization.
    for softmax, bound in ((True, (6 / (8 + 8)) ** 0.5), (False, (8 * 4) ** -0.5)):
        standard = make(layer="ConvNNAttention", convolution_type="standard", softmax_topk_val=softmax)
        weight = standard.blocks[0].mixer.conv.weight
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_initialisation_leaves_gpsa_and_random_features_alone():
    mixer = make(layer="GPSA", d_model=18, num_heads=9, locality_strength=2.0).blocks[1].mixer
    assert torch.equal(mixer.qkv.weight[36:], torch.eye(18)) and not mixer.qkv.bias.any()
    assert mixer.qkv.weight[:36].std().item() == pytest.approx(0.2, rel=0.2)
    assert torch.equal(mixer.pos_proj.weight[0], torch.tensor([-4.0, -4.0, -2.0])) and not mixer.pos_proj.bias.any()
    assert torch.equal(mixer.gate, torch.ones(9))
    linformer = make(layer="Linformer", linformer_k=4).blocks[0].mixer
    N = linformer.layout.num_tokens
    assert linformer.key_projection.std().item() == pytest.approx(N**-0.5, rel=0.3)


def test_images_that_patches_do_not_divide_are_refused():  # other sizes: test_resize.py
    with pytest.raises(ValueError, match="does not divide the 16 x 13 image"):
        make()(images(size=(16, 13)))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizer_moves_every_parameter(name):
    from options.training import TrainConfig

    model = make(layer="BranchAttention", pos_embedding="learned")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    make_optimizer(model, TrainConfig(optimizer=name)).step()
    for name, parameter in model.named_parameters():
        assert (parameter != before[name]).all(), name


# --- weights of torchvision and timm --------------------------------------------------------------------------------

SAME_AS_OTHERS = {"patch_norm": False, "final_norm": True, "pos_embedding": "learned"}


def random_weights(model):
    """Weights large enough for a mistake anywhere to show in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5)
            if "ln" in name or "norm" in name:
                parameter.add_("weight" in name)
    return model.eval()


def test_vit_b16_is_that_of_torchvision():
    stated = yaml.safe_load((Path(__file__).parent.parent / "configs" / "vit_b16.yaml").read_text())
    names = {name: value for name, value in stated.items() if name in ViTConfig.__dataclass_fields__}
    reference = torchvision.models.vit_b_16(num_classes=10).eval()
    nn.init.normal_(reference.heads.head.weight, std=0.02)
    model = ViT(ViTConfig(**names)).eval()
    assert count_parameters(model) == count_parameters(reference)
    load_vit_weights(model, reference.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = model(x), reference(x)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("separate", [False, True])
def test_torchvision_state_dicts_by_weights_that_matter(separate):
    reference = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 24, num_classes=5)
    random_weights(reference.double())
    model = make(image_size=16, separate_qkv=separate, **SAME_AS_OTHERS).double().eval()
    load_vit_weights(model, reference.state_dict())
    x = images(size=(16, 16)).double()
    torch.testing.assert_close(model(x), reference(x), atol=1e-9, rtol=1e-9)
    other = make(image_size=16, separate_qkv=not separate, **SAME_AS_OTHERS).double().eval()
    load_vit_weights(other, model.state_dict())  # joins q, k and v, or splits them
    torch.testing.assert_close(other(x), model(x))
    names = {name.split(".")[-2] for name, _ in model.blocks[0].mixer.named_parameters(prefix="mixer")}
    assert names == ({"query", "key", "value", "proj"} if separate else {"qkv", "proj"})


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm_state_dicts(pool):
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "num_classes": 5}
    if pool == "mean":
        kwargs |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    reference = random_weights(timm.models.vision_transformer.VisionTransformer(**kwargs).double())
    model = make(image_size=16, pool=pool, **SAME_AS_OTHERS).double().eval()
    load_vit_weights(model, reference.state_dict())
    x = images(size=(16, 16)).double()
    torch.testing.assert_close(model(x), reference(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("class_token", [True, False])
def test_timm_models_that_normalize_after_pooling_are_refused(class_token):
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "num_classes": 5}
    reference = timm.models.vision_transformer.VisionTransformer(**kwargs, global_pool="avg", class_token=class_token)
    model = make(image_size=16, pool="cls" if class_token else "mean", **SAME_AS_OTHERS)
    with pytest.raises(ValueError, match=r"norm\.weight"):
        load_vit_weights(model, reference.state_dict())


def test_own_state_dicts_and_what_does_not_fit():
    model = make()
    load_vit_weights(make(), model.state_dict())
    with pytest.raises(ValueError, match=r"number of classes: classifier\.weight is .5, 16. there, .7, 16. here"):
        load_vit_weights(make(num_classes=7), model.state_dict())
    with pytest.raises(ValueError, match=r"it has no blocks\.0\.mixer\.conv\.weight"):
        load_vit_weights(make(layer="ConvNNAttention"), model.state_dict())
    with pytest.raises(ValueError, match=r"this model has no blocks\.1\.norm1\.weight"):
        load_vit_weights(make(num_layers=1), model.state_dict())
    reference = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 24, num_classes=5)
    with pytest.raises(ValueError, match=r"no patch_norm\.weight; .* need --no-patch_norm$"):
        load_vit_weights(make(image_size=16, final_norm=True, pos_embedding="learned"), reference.state_dict())
