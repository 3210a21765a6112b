"""Both models on fake CUDA tensors: everything is on the device, and no forward pass asks for the value of a tensor.

Fake tensors have shapes, types and devices but no values: an operator that meets two devices raises, and so does everything
that would make the CPU wait for the GPU, such as `.item()`. Nothing is read from the CPU either, and no operator is one of
those that PyTorch keeps out of CUDA graphs: so a graph can record the pass.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allconvnet import AllConvNet
from mixers import block_masks
from options.allconvnet import AllConvNetConfig
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from options.vit import ViTConfig
from tests.helpers.pools import pool_of
from vit import ViT

SIZES = {"image_size": 32, "patch_size": 4, "num_layers": 1, "num_heads": 2, "d_model": 16, "d_mlp": 16, "kernel_size": 3}
NEIGHBORS = (
    {"sampling_type": "random", "num_samples": 10},
    {"sampling_type": "spatial", "num_samples": 3, "similarity_type": "Loc_Col"},
    {"similarity_type": "Loc"},
)
PLACED = ("LocalAttention", "SparseAttention", "MaskedAttention", "NeighborhoodAttention", "Hybrid")
LONG = SIZES | {"patch_size": 2, "d_model": 32}  # 257 tokens: several blocks of pairs
MODELS = [
    *((ViT, ViTConfig(layer=layer, pool=pool_of(layer), **SIZES)) for layer in LAYERS1D_NAMES),
    *((ViT, ViTConfig(layer=layer, attention_dropout=0.0, **LONG)) for layer in PLACED),
    *((ViT, ViTConfig(layer="ConvNNAttention", **SIZES, **options)) for options in NEIGHBORS),
    (ViT, ViTConfig(layer="GPSA", **SIZES | {"num_layers": 2, "num_local_layers": 1})),
    *((AllConvNet, AllConvNetConfig(layer=layer, channels=(8, 16))) for layer in (*LAYERS2D_NAMES, "Conv2d/ConvNN")),
    *((AllConvNet, AllConvNetConfig(layer="ConvNN", channels=(8,), **options)) for options in NEIGHBORS),
]


class OnlyOnTheDevice(TorchDispatchMode):
    """Raises for an operator that a CUDA graph cannot record."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        on_cpu = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor) and not x.is_cuda]
        if on_cpu or torch.Tag.cudagraph_unsafe in getattr(function, "tags", ()):
            raise AssertionError(f"{function} cannot be in a CUDA graph")
        return output


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None):
    """As torch.autocast("cuda"), which stays off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@pytest.fixture
def by_blocks(monkeypatch):
    """Calls of flex_attention, whose compiler needs a GPU: attention stands in for it."""
    calls = []

    def attention(query, key, value, block_mask):
        assert all(x.is_cuda for x in (block_mask.kv_indices, block_mask.q_indices, block_mask.full_kv_indices))
        calls.append(query.dtype)
        return F.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(block_masks, "compiled_attention", lambda: attention)
    return calls


@pytest.mark.parametrize(("kind", "config"), MODELS, ids=lambda value: getattr(value, "layer", value.__class__.__name__))
def test_forward_stays_on_the_device(kind, config, by_blocks):
    torch._C._ensureCUDADeviceGuardSet()
    model = kind(config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model._apply(lambda x: mode.from_tensor(x).to("cuda"))
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
        assert all(x.is_cuda for x in (*model.parameters(), *model.buffers()))
        images = torch.empty(4, 3, *config.image_size, device="cuda")
        model(images)  # makes tables
        for training, dtypes in ((True, (None, torch.bfloat16)), (False, (None, torch.float16))):
            for dtype in dtypes:
                model.train(training)
                with autocast(dtype), OnlyOnTheDevice():
                    logits = model(images)
                assert logits.is_cuda and logits.shape == (4, 10) and logits.dtype == (dtype or torch.float32)
    assert bool(by_blocks) == (getattr(config, "patch_size", 0) == LONG["patch_size"])
