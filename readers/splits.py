"""Hold out images, the same ones whatever the seed."""

import numpy as np
import torch

from readers.augmentation import ORDER
from utils import keys


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, ascending, to keep and to hold out: `fraction` of every class, always the same images."""
    shuffle = keys(0, 0, torch.arange(len(labels)), ORDER).numpy()  # hashes differ, so they are an order
    by_class = np.lexsort((shuffle, labels))
    # Hold out an image where the rounded share of the images so far grows by one: round(n * fraction) in all and, as they are
    # sorted by class, the right number of each class to within one.
    due = np.floor(np.arange(len(labels) + 1) * fraction + 0.5)
    held = np.diff(due) > 0
    return np.sort(by_class[~held]), np.sort(by_class[held])
