"""Swap the attention of a vision transformer of timm for ConvNN attention, keep its weights, and fine-tune it.

python examples/timm_swap.py

Needs timm (requirements-dev.txt) and no download: a small model is first trained on the embedded digits with timm's own
attention. ConvNN attention over all tokens gives the same logits. With K = 5 neighbors accuracy drops, and two epochs of
fine-tuning restore it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from timm.models.vision_transformer import VisionTransformer

from dataset import load_data
from models.timm import timm_mixer
from options.data import DataConfig
from options.training import TrainConfig
from runs.optimization import make_loss
from runs.training import Training
from train_eval import evaluate, train_one_epoch

SIDE, PATCH = 8, 2
TOKENS = (SIDE // PATCH) ** 2 + 1
DEVICE = torch.device("cpu")


def make_model(**options) -> VisionTransformer:
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    return VisionTransformer(img_size=SIDE, patch_size=PATCH, in_chans=1, num_classes=10, **sizes, **options)


def train(model: torch.nn.Module, data, epochs: int, lr: float) -> None:
    config = TrainConfig(batch_size=64, num_epochs=epochs, lr=lr, scheduler="cosine")
    training = Training(model, config, DEVICE, len(data.train))
    for training.epoch in range(epochs):
        train_one_epoch(training, data.train, make_loss("CrossEntropy"))
        training.step = 0


def accuracy(model: torch.nn.Module, data) -> float:
    return evaluate(model, data.test, make_loss("CrossEntropy"), device=DEVICE).top1


def swapped(model: VisionTransformer, K: int) -> VisionTransformer:
    """Return the model with ConvNN attention and the same weights; the new convolution over the K slots starts at one."""
    swap = make_model(attn_layer=timm_mixer("ConvNNAttention", K=K, image_size=SIDE, patch_size=PATCH))
    missing, unexpected = swap.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("attn.conv.weight") for name in missing)
    return swap


def main() -> None:
    torch.manual_seed(0)
    data = load_data(DataConfig(dataset="digits", resize=SIDE, num_workers=0), batch_size=64, seed=0, device=DEVICE)
    model = make_model()
    train(model, data, epochs=30, lr=3e-3)
    print(f"timm's attention                 {accuracy(model, data):.1f} %")
    images, _ = next(iter(data.test.epoch(0)))
    with torch.no_grad():
        difference = (swapped(model, TOKENS).eval()(images) - model.eval()(images)).abs().max().item()
    print(f"ConvNN attention, K = N = {TOKENS}     logits differ by at most {difference:.1e}")
    assert difference < 1e-5
    swap = swapped(model, K=5)
    print(f"ConvNN attention, K = 5, before  {accuracy(swap, data):.1f} %")
    train(swap, data, epochs=2, lr=1e-3)
    print(f"                         after   {accuracy(swap, data):.1f} %")


if __name__ == "__main__":
    main()
