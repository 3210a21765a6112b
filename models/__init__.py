"""Networks around the mixers: ConViT, torchvision's backbones, timm; building and pretrained weights."""
