"""Loss and accuracy as sums over images, and the row of an epoch in the history."""

from typing import NamedTuple

import torch
from torch import Tensor


class Metrics(NamedTuple):
    """Means over images; accuracies in percent."""

    loss: float
    top1: float
    top5: float


class Meter:
    """Sums over images, on the device: loss, correct top-1 and top-5, images. Top-5 of n < 5 classes is top-n."""

    def __init__(self, device: torch.device):
        # In float64, which MPS does not have: float32 stops counting single images at 2^24.
        self.sums = torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add images. loss: their mean; logits (B, classes); targets (B,), or (B, classes), where the largest share counts."""
        self.sums += self.tally(loss, logits, targets)

    def tally(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sums over these images alone (4,)."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        hits = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        count = torch.full_like(self.sums[0], len(labels))
        return torch.stack([loss.detach() * count, hits[:, 0].sum(), hits.sum(), count])

    def read(self, sums: Tensor | None = None) -> Metrics:
        """Return the means of `sums`, by default of this meter. Synchronizes with the device."""
        loss, top1, top5, seen = (self.sums if sums is None else sums).tolist()
        seen = max(seen, 1)
        return Metrics(loss / seen, 100 * top1 / seen, 100 * top5 / seen)


class Predictions:
    """Label and predicted class of every image, in the order of the data set, on the device.

    With several processes each fills in its own batches and leaves zeros elsewhere: their sum is whole.
    """

    def __init__(self, batches, device: torch.device):
        self.batch_size = batches.recipe.batch_size
        self.table = torch.zeros(2, batches.num_samples, device=device, dtype=torch.int64)

    def add(self, number: int, logits: Tensor, labels: Tensor) -> None:
        """Note the batch of this number, counted from 0: logits (B, classes), labels (B,)."""
        start = number * self.batch_size
        self.table[:, start : start + len(labels)] = torch.stack([labels, logits.argmax(dim=1)])

    def confusion(self, classes: int) -> Tensor:
        """Count images by (class, predicted class): (classes, classes)."""
        cells = self.table[0] * classes + self.table[1]
        return cells.cpu().bincount(minlength=classes**2).view(classes, classes)


def by_class(confusion: Tensor, names: list[str]) -> dict[str, dict]:
    """Return images and top-1 (percent, None without images) of every class, by name."""
    images, right = confusion.sum(dim=1).tolist(), confusion.diagonal().tolist()
    return {
        name: {"images": n, "top1": 100 * correct / n if n else None}
        for name, n, correct in zip(names, images, right, strict=True)
    }


def stalled(history: list[dict], split: str, patience: int) -> bool:
    """Return whether the last `patience` epochs brought no better loss; 0: never."""
    if not patience or len(history) <= patience:
        return False
    losses = [row[f"{split}_loss"] for row in history]
    return min(losses[-patience:]) >= min(losses[:-patience])


def history_row(epoch: int, lr: float, metrics: dict[str, Metrics], images: int, seconds: float) -> dict:
    """Return the row of an epoch from the metrics of "train", "test" and perhaps "val"; `seconds` of training on `images`."""
    part = {name: {f"{name}_{key}": value for key, value in means._asdict().items()} for name, means in metrics.items()}
    return {
        "epoch": epoch,
        "lr": lr,
        **part["train"],
        **part["test"],
        "seconds": seconds,
        "images_per_s": images / max(seconds, 1e-9),
        **part.get("val", {}),  # last, as its columns are in metrics.csv
    }
