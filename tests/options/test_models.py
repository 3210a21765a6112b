"""Options that both models share."""

import pytest

from options.allconvnet import AllConvNetConfig
from options.vit import ViTConfig

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("model", [AllConvNetConfig, ViTConfig])
@pytest.mark.parametrize(
    "bad",
    [
        {"num_classes": -3},
        {"num_classes": 0},
        {"num_classes": 2.0},
        {"in_channels": 0},
        {"in_channels": True},
        {"image_size": 0},
        {"image_size": (32, -1)},
        {"image_size": "32"},
        {"image_size": (32, 32, 32)},
        {"image_size": 10**6},
    ],
)
def test_what_the_data_set_decides_is_checked_too(model, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"^{name}="):
        model(**bad)
