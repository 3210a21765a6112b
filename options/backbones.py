"""Torchvision networks in which `--layer` replaces 3 x 3 convolutions: names, stems and smallest images, without torch.

VGG (Simonyan and Zisserman, arXiv 1409.1556), ResNet (He et al., arXiv 1512.03385) and DenseNet (Huang et al., arXiv
1608.06993). `models/backbones.py` builds them.
"""

from options.neighbors import as_sides

VGG = ("vgg11", "vgg13", "vgg16", "vgg19")
RESNET = ("resnet18", "resnet34", "resnet50")
DENSENET = ("densenet121",)
BACKBONES = VGG + RESNET + DENSENET
STEMS = ("small", "imagenet")
SMALL = 128  # pixels; images with a shorter side below it get the small stem by default
CLASSIFIER_WIDTHS = {"small": 512, "imagenet": 4096}  # hidden features of a VGG classifier, by the stem


def default_stem(image_size: tuple[int, int]) -> str:
    return "small" if min(image_size) < SMALL else "imagenet"


def check_image_size(model: str, stem: str, image_size: tuple[int, int]) -> None:
    """Raise ValueError for an image that is too small for the strides and poolings of a network."""
    least, times = (32, "five") if model in VGG else (1, "no")  # a ResNet rounds up
    if model in DENSENET:
        least, times = (8, "three") if stem == "small" else (29, "five")
    if min(image_size) < least:
        raise ValueError(
            f"model={model} halves the map {times} times and needs images of at least {least} x {least}, not "
            f"{as_sides(image_size)}; use resize"
        )
