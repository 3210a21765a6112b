"""Both models on fake CUDA tensors: everything is on the device, and no forward pass asks for the value of a tensor.

Fake tensors have shapes, types and devices but no values: an operator that meets two devices raises, and so does everything
that would make the CPU wait for the GPU, such as `.item()`.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from allconvnet import AllConvNet, AllConvNetConfig
from options import LAYERS1D_NAMES, LAYERS2D_NAMES
from vit import ViT, ViTConfig

SIZES = {"image_size": 32, "patch_size": 4, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_mlp": 16, "kernel_size": 3}
NEIGHBORS = (
    {"sampling_type": "random", "num_samples": 10},
    {"sampling_type": "spatial", "num_samples": 3, "similarity_type": "Loc_Col"},
    {"similarity_type": "Loc"},
)
MODELS = [
    *((ViT, ViTConfig(layer=layer, **SIZES)) for layer in LAYERS1D_NAMES),
    *((ViT, ViTConfig(layer="ConvNNAttention", **SIZES, **options)) for options in NEIGHBORS),
    (ViT, ViTConfig(layer="GPSA", num_local_layers=1, **SIZES)),
    *((AllConvNet, AllConvNetConfig(layer=layer, channels=(8, 16))) for layer in (*LAYERS2D_NAMES, "Conv2d/ConvNN")),
    *((AllConvNet, AllConvNetConfig(layer="ConvNN", channels=(8,), **options)) for options in NEIGHBORS),
]


@pytest.mark.parametrize(("kind", "config"), MODELS, ids=lambda value: getattr(value, "layer", value.__class__.__name__))
def test_forward_stays_on_the_device(kind, config):
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
        for training in (True, False):
            for dtype in (None, torch.bfloat16, torch.float16):
                with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    logits = model.train(training)(images)
                assert logits.is_cuda and logits.shape == (4, 10)
