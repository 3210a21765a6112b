"""A ViT and its layers are one module at every image size: what is done to them holds at each, and nothing piles up."""

import copy
import dataclasses
import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.utils import prune

from layers1d import MultiHeadConv1d, MultiHeadConvNNAttention
from layers2d import ConvNN2d, ConvNNAttention2d
from mixers.base import TokenLayout
from mixers.local import NeighborhoodAttention
from mixers.tables import KEPT, PerGrid
from options.layers import LAYERS1D_NAMES
from options.neighbors import NeighborConfig
from options.vit import ViTConfig
from tests.helpers.pools import pool_of
from tests.test_resize import ALONG_THE_SEQUENCE, SMALL
from vit import Block, ViT, resample_positions

RESIZABLE = [name for name in LAYERS1D_NAMES if name not in ALONG_THE_SEQUENCE]
FIRST, SECOND = (16, 24), (32, 24)
OPTIONS = SMALL | {"num_layers": 2, "nystrom_landmarks": 4}
every_layer = pytest.mark.parametrize("layer", RESIZABLE)


def make(layer="NeighborhoodAttention", **options):
    options = {"image_size": FIRST, "pool": pool_of(layer) if layer in LAYERS1D_NAMES else "cls"} | options
    return ViT(ViTConfig(**OPTIONS | {"layer": layer} | options)).eval()


def made_for(size, model):
    """A ViT built for another size with the weights of this one, its learned positions resampled."""
    new = ViT(dataclasses.replace(model.config, image_size=size)).eval()
    weights = model.state_dict()
    if "pos_embedding" in weights:
        grids = model.config.grid, new.config.grid
        weights["pos_embedding"] = resample_positions(weights["pos_embedding"], *grids, model.config.class_tokens)
    new.load_state_dict(weights)
    return new


def images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def tables_of(model):
    return [module for module in model.modules() if isinstance(module, PerGrid)]


# --- what is done to a model holds at every size --------------------------------------------------------------------


class Adapter(nn.Module):
    """A linear beside a linear, as LoRA adds it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.change = base, nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.constant_(self.change.weight, 0.1)

    def forward(self, x):
        return self.base(x) + self.change(x)


class Recording(nn.Module):
    """A module around a mixer, as those of other libraries."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, *args, **kwargs):
        return 2 * self.mixer(*args, **kwargs)


def linears(model):
    """Modules with linears of mixers, and the names of those."""
    found = []
    for block in model.blocks:
        for module in block.mixer.modules():
            found += [(module, name) for name, part in module.named_children() if isinstance(part, nn.Linear)]
    return found


def adapt(model):
    for parent, name in linears(model):
        setattr(parent, name, Adapter(getattr(parent, name)))
    return model


def pruned(model):
    for parent, name in linears(model):
        prune.l1_unstructured(getattr(parent, name), "weight", 0.5)
    return model


def quantized(model):
    chosen = {getattr(parent, name) for parent, name in linears(model)}
    names = {name for name, module in model.named_modules() if module in chosen}
    return torch.ao.quantization.quantize_dynamic(model, names | {"classifier"}, dtype=torch.qint8)


def with_new_parts(model):
    model.classifier = nn.Linear(16, 3)
    nn.init.constant_(model.classifier.weight, 0.1)
    nn.init.zeros_(model.classifier.bias)
    model.blocks[0].mlp[1] = nn.ReLU()
    model.blocks[1].mixer = Recording(model.blocks[1].mixer)
    return model


def with_an_identity(model):
    model.blocks[0] = nn.Identity()
    return model


def shortened(model):
    model.blocks = model.blocks[:1]
    return model


def tied(model):
    model.blocks[1] = model.blocks[0]
    return model


CHANGES = (adapt, pruned, quantized, with_new_parts, with_an_identity, shortened, tied)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of quantization
@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (change, layer)
        for change in CHANGES
        for layer in (RESIZABLE if change is adapt else ("ConvNNAttention", "GPSA", "PaCa"))
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_changed_model_is_changed_at_every_size(layer, change):
    model = make(layer)
    before, other = model(images(SECOND)), made_for(SECOND, model)
    model, other = change(model), change(other)
    for _ in range(2):
        at_first = model(images(FIRST))
        torch.testing.assert_close(model(images(SECOND)), other(images(SECOND)), atol=1e-5, rtol=1e-5)
    assert torch.equal(model(images(FIRST)), at_first)
    after = model(images(SECOND))
    unchanged = change in (adapt, pruned) and not linears(model)  # a mixer without linears
    assert after.shape != before.shape or torch.allclose(after, before) == unchanged


@every_layer
def test_hooks_fire_copies_work_and_transforms_follow(layer):
    model, calls = make(layer), []
    hooks = [
        block.mixer.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
        for block in model.blocks
    ]
    results = {size: model(images(size)) for size in (FIRST, SECOND)}
    c = model.config.class_tokens
    assert calls == [24 + c, 24 + c, 48 + c, 48 + c]
    for hook in hooks:
        hook.remove()  # a lambda cannot be pickled
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), torch.load(file, weights_only=False), copy.deepcopy(model).double().float()
    for size, result in results.items():
        for other in copies:
            assert torch.equal(other(images(size)), result)
    # Also where tables are made inside of a transform, and used after it.
    fresh = copy.deepcopy(model).double().float()  # it has no tables of the second size
    for each in (model, fresh):
        found = torch.func.vmap(lambda image, each=each: each(image[None])[0])(images(SECOND))
        torch.testing.assert_close(found, results[SECOND], atol=1e-5, rtol=1e-5)
        torch.func.grad(lambda x, each=each: each(x).sum())(images((48, 24)))
        torch.testing.assert_close(each(images((48, 24))), model(images((48, 24))))
        torch.testing.assert_close(each(images(SECOND)), results[SECOND], atol=1e-5, rtol=1e-5)


@every_layer
def test_tables_do_not_pile_up(layer):
    model = make(layer, num_layers=1, pos_embedding="sinusoidal")
    buffers = dict(model.named_buffers())
    for rows in range(1, 21):
        size = (16 + 8 * rows, 24)
        model(images(size, batch=1))
    assert all(len(tables.recent) == KEPT and not tables.compiled for tables in tables_of(model))
    assert dict(model.named_buffers()).keys() == buffers.keys()
    torch.testing.assert_close(model(images(size)), made_for(size, model)(images(size)), atol=1e-5, rtol=1e-5)
    model.double()
    assert not any(tables.recent for tables in tables_of(model))
    expected = made_for(size, model.float()).double()(images(size).double())
    torch.testing.assert_close(model.double()(images(size).double()), expected, atol=1e-6, rtol=1e-6)


@every_layer
def test_as_many_patches_on_another_grid(layer):
    model = make(layer, image_size=(32, 32))
    for size in ((16, 64), (64, 16)):
        torch.testing.assert_close(model(images(size)), made_for(size, model)(images(size)), atol=1e-5, rtol=1e-5)


def test_attributes_of_mixers_hold_at_every_size():
    model = make("KvtAttention")
    for block in model.blocks:
        block.mixer.K = 7
    other = made_for(SECOND, make("KvtAttention", K=7))
    other.load_state_dict(made_for(SECOND, model).state_dict())
    torch.testing.assert_close(model(images(SECOND)), other(images(SECOND)))
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    torch.testing.assert_close(model(images(SECOND)), other(images(SECOND)))
    with pytest.raises(ValueError, match=r"K=7 must be 1 to [45]"):
        model(images((8, 8)))


def test_a_class_token_that_joins_late():
    model = make("GPSA", num_local_layers=1, pool="cls")
    torch.testing.assert_close(model(images(SECOND)), made_for(SECOND, model)(images(SECOND)))


def test_models_of_the_meta_device_run_at_other_sizes():
    model = make(pos_embedding="sinusoidal")
    with torch.device("meta"):
        empty = ViT(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    x = images(SECOND)
    with torch.device("meta"), torch.inference_mode():
        result = empty.eval()(x)
    assert torch.equal(result, model(x))
    empty(x).sum().backward()  # through tables that were made in that pass


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_and_exported(recompute):
    """One graph for every size, also after other sizes."""
    model = make(num_layers=1, pos_embedding="sinusoidal", dropout=0.0, attention_dropout=0.0)
    model.train().recompute = recompute
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    sizes = (SECOND, FIRST, (48, 24))
    for size in (*sizes, *sizes):
        torch.testing.assert_close(compiled(images(size)), model(images(size)))
        compiled(images(size)).sum().backward()
    assert counter.frame_count == len(sizes)
    if not recompute:
        program = torch.export.export(model.eval(), (images(SECOND),)).module()
        torch.testing.assert_close(program(images(SECOND)), model(images(SECOND)))


# --- layers on their own --------------------------------------------------------------------------------------------


def test_a_mixer_takes_a_layout():
    layer = NeighborhoodAttention(16, 2, layout=TokenLayout(4, 6, 1), kernel_size=3)
    other = NeighborhoodAttention(16, 2, layout=TokenLayout(3, 8, 1), kernel_size=3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 25, 16)
    assert torch.equal(layer(x, layout=other.layout), other(x)) and not torch.equal(layer(x), other(x))
    block = Block(16, 16, layer, 0.0)
    assert not torch.equal(block(x, layout=other.layout), block(x))
    with pytest.raises(ValueError, match=r"24 tokens were given, and the layer was made for .*height=4, width=6"):
        layer(x[:, 1:])
    with pytest.raises(ValueError, match=r"25 tokens were given, and the layer was made for .*height=5"):
        layer(x, layout=TokenLayout(5, 5, 1))
    with pytest.raises(ValueError, match=r"kernel_size=3 .* 2 x 12"):
        layer(x, layout=TokenLayout(2, 12, 1))
    fixed = MultiHeadConv1d(16, 2, 3, layout=TokenLayout(4, 6, 1))
    with pytest.raises(ValueError, match=r"tokens of .*height=3.* were given, and the layer was made for .*height=4"):
        fixed(x, layout=other.layout)


@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
@pytest.mark.parametrize("kind", [ConvNN2d, ConvNNAttention2d])
def test_layers_on_images(kind, similarity):
    neighbors = NeighborConfig(K=4, similarity_type=similarity, sampling_type="spatial", num_samples=3)
    layer = kind(3, 3, neighbors, image_size=(6, 7))
    buffers = len(list(layer.buffers()))
    for size in range(7, 27):
        x = torch.randn(1, 3, size, 7)
        other = kind(3, 3, neighbors, image_size=(size, 7))
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), other(x))
    assert len(layer.select.tables.recent) == KEPT and len(list(layer.buffers())) == buffers
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_layers_on_images_are_compiled_without_a_size():
    layer = ConvNN2d(3, 3, NeighborConfig(K=4, similarity_type="Loc"))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for side in (5, 6, 5, 6):
        x = torch.randn(1, 3, side, side)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 2


def test_twenty_layouts_of_a_layer():
    layer = MultiHeadConvNNAttention(8, 2, NeighborConfig(K=4, similarity_type="Loc"), layout=TokenLayout(3, 3))
    for side in range(4, 24):
        layer(torch.randn(1, side**2, 8), layout=TokenLayout(side, side))
    assert len(layer.select.tables.recent) == KEPT


# --- custom mixers --------------------------------------------------------------------------------------------------

CUSTOM = '''
from torch import nn
from mixers.base import MultiHeadMixer, TokenLayout, attend

class Plain(nn.Module):
    """It sees no layout."""
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
    def forward(self, x, output_attentions=False):
        return (self.linear(x), None) if output_attentions else self.linear(x)

class Fixed(Plain):
    """It knows the layout of its construction only."""
    def __init__(self, d_model, num_heads, *, layout):
        super().__init__(d_model, num_heads)
        self.layout = layout

class Asking(Fixed):
    def forward(self, x, output_attentions=False, layout=None):
        assert x.shape[1] == (layout or self.layout).num_tokens
        return super().forward(x, output_attentions)

class Mixer(MultiHeadMixer):
    def __init__(self, d_model, num_heads, *, layout):
        super().__init__(d_model, num_heads, layout=layout)
    def mix(self, query, key, value, output_matrix):
        return attend(query, key, value, output_matrix=output_matrix)

class AnyMixer(Mixer):
    takes_layout = True
    def mix(self, query, key, value, output_matrix, layout):
        assert query.shape[2] == layout.num_tokens
        return super().mix(query, key, value, output_matrix)
'''
FIXED = "so it runs on the 4 x 6 patches that it was made for, not on 8 x 6"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Plain", None),
        ("Fixed", f"Fixed has no argument layout in forward, {FIXED}"),
        ("Asking", None),
        ("Mixer", f"Mixer does not set takes_layout, {FIXED}"),
        ("AnyMixer", None),
    ],
)
def test_custom_mixers(name, error, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    model = make(f"{file}:{name}")
    model(images(FIRST))
    if error is None:
        torch.testing.assert_close(model(images(SECOND)), made_for(SECOND, model)(images(SECOND)))
        assert model(images(SECOND), output_attentions=True)[0].shape == (2, model.config.num_classes)
        return
    with pytest.raises(ValueError, match=error):
        model(images(SECOND))
    model.blocks = nn.ModuleList([nn.Identity()])  # its mixers are gone
    model(images(SECOND))
