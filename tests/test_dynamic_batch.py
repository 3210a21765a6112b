"""An exported program serves batches of any size: nothing in a forward turns the size of the batch into a plain number."""

import pytest
import torch

from allconvnet import LAYERS2D, AllConvNet, AllConvNetConfig
from convit import ConViTConfig, ConViTWithLinearClassifier
from vit import LAYERS1D, ViT, ViTConfig

# 3 x 4 patches of 4 x 4 pixels
SIZES = {"image_size": (12, 16), "patch_size": 4, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_mlp": 8, "num_classes": 5}
OPTIONS = {
    "K": 4,
    "kernel_size": 3,
    "window_size": 2,
    "sparse_context_window": 3,
    "linformer_k": 6,
    "performer_features": 10,
    "nystrom_landmarks": 5,
    "nystrom_conv_kernel": 3,
    "hybrid_dilations": (1,),
}


def check_batches(model, size):
    """Exported with a batch of 3 images, the program gives what the model gives for 1, 3 and 7 of them."""
    model = model.double().eval()
    example = torch.randn(3, 3, *size, dtype=torch.float64)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()
    for images in (example, example[:1], torch.randn(7, 3, *size, dtype=torch.float64)):
        torch.testing.assert_close(program(images), model(images))


@pytest.mark.parametrize("layer", LAYERS1D)
def test_every_layer_of_the_vit(layer):
    check_batches(ViT(ViTConfig(layer=layer, **SIZES, **OPTIONS)), (12, 16))


@pytest.mark.parametrize(
    "options",
    [
        {"layer": "ConvNN", "sampling_type": "random", "num_samples": 6, "similarity_type": "Loc_Col"},
        {"layer": "ConvNNAttention", "sampling_type": "spatial", "num_samples": 2, "pool": "mean"},
        {"layer": "ConvNNAttention", "similarity_type": "Loc"},
        {"layer": "GPSA", "num_local_layers": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_samples_places_and_a_class_token_that_joins_later(options):
    check_batches(ViT(ViTConfig(**SIZES, **OPTIONS | options)), (12, 16))


@pytest.mark.parametrize("layer", [*LAYERS2D, "Conv2d/ConvNN", "Attention/ConvNN_Attn"])
def test_every_layer_of_the_allconvnet(layer):
    config = AllConvNetConfig(layer=layer, channels=(4, 8), K=3, num_heads=2, image_size=(4, 6), num_classes=5)
    check_batches(AllConvNet(config), (4, 6))


def test_convit():
    config = ConViTConfig((8, 12), 3, 2, 1, 1, 18, 5, heads=9)
    check_batches(ConViTWithLinearClassifier(config), (8, 12))
