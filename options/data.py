"""`DataConfig` and the table of data sets."""

from dataclasses import dataclass
from typing import NamedTuple

from options.fields import IMAGES, SIDE, as_words, check_fields, option


class DatasetInfo(NamedTuple):
    """Sizes of a data set, known before reading it."""

    size: int  # default side of the images in pixels
    channels: int
    classes: int | None  # None: counted in the training folder
    streamed: bool  # read from files during training, instead of kept in device memory
    images: tuple[int, int] | None  # training and test images; None: unknown until the folder is read


DATASETS = {
    "cifar10": DatasetInfo(32, 3, 10, False, (50_000, 10_000)),
    "cifar100": DatasetInfo(32, 3, 100, False, (50_000, 10_000)),
    "imagenet": DatasetInfo(224, 3, 1000, True, (1_281_167, 50_000)),
    "imagenet100": DatasetInfo(224, 3, 100, True, None),
    "imagenette": DatasetInfo(224, 3, 10, True, (9_469, 3_925)),
    "mnist": DatasetInfo(28, 1, 10, False, (60_000, 10_000)),
    "fashion_mnist": DatasetInfo(28, 1, 10, False, (60_000, 10_000)),
    "digits": DatasetInfo(8, 1, 10, False, (1_437, 360)),
    "folder": DatasetInfo(224, 3, None, True, None),
}
CELL = 4  # side of a cell of a generated task in pixels
TASKS = {"find": 4, "locate": 9, "beside": 4, "opposite": 4, "recall": 4, "count": 8, "duplicate": 2, "joined": 2}  # classes
DATASETS |= {f"task_{task}": DatasetInfo(6 * CELL, 3, classes, False, (50_000, 5_000)) for task, classes in TASKS.items()}


@dataclass(frozen=True)
class DataConfig:
    """Data set, image size, augmentation and limits."""

    heading = "data"

    dataset: str = option(
        "cifar10",
        "data set; digits comes with the code, folder reads train/ and val/ in --data_path, task_* are generated",
        choices=tuple(DATASETS),
    )
    task_size: int = option(6, "task_*: cells of 4 x 4 pixels along a side", low=3, high=32)
    task_symbols: int | None = option(
        None, "task_*: patterns that a cell can hold (default: 8; task_recall: 6)", kind=int, low=6, high=15
    )
    data_path: str = option("./Data", "folder that holds the data sets", path=True)
    resize: int | tuple[int, int] | None = option(
        None, "side the images are resized to, or height and width", kind=int, many=True, low=1, high=SIDE
    )
    val_fraction: float = option(
        0.0, "share of the training set held out for validation, which then selects the best epoch", low=0, below=1
    )
    augment: bool = option(False, "random crop, and horizontal flip where it keeps the class")
    auto_augment: str = option(
        "none",
        "after --augment, torchvision's RandAugment (two operations of magnitude 9) or TrivialAugmentWide (one operation)",
        choices=("none", "rand", "trivial"),
    )
    random_erasing: float = option(
        0.0,
        "probability of torchvision's RandomErasing, which fills a box of a training image with the mean color",
        low=0,
        high=1,
    )
    noise: float = option(
        0.0, "standard deviation of Gaussian noise on training and test images, whose values run from 0 to 1", low=0, high=1000
    )
    download: bool = option(True, "download the data set if it is not there")
    num_workers: int | None = option(
        None, "processes that read images (default: one per core, at most 8)", kind=int, low=0, high=1024
    )
    train_limit: int | None = option(None, "train on the first n images, balanced by class", kind=int, low=1, high=IMAGES)
    test_limit: int | None = option(
        None, "test (and validate task_*) on the first n images, balanced by class", kind=int, low=1, high=IMAGES
    )

    def __post_init__(self):
        if self.resize is not None and not isinstance(self.resize, (list, tuple)):
            object.__setattr__(self, "resize", (self.resize,))
        check_fields(self)
        if self.resize is not None:
            if len(self.resize) > 2:
                raise ValueError(f"resize={as_words(self.resize)} is neither a side nor height and width")
            if len(set(self.resize)) == 1:
                object.__setattr__(self, "resize", self.resize[0])
        for name in ("val_fraction", "augment"):
            if self.is_task and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} does not fit dataset={self.dataset}, which has validation images of its own "
                    "and classes that cropping and flipping would change; drop it"
                )

    @property
    def is_task(self) -> bool:
        """Whether the images are generated."""
        return self.dataset.startswith("task_")

    @property
    def size(self) -> int:
        """Side of the images in pixels before `resize`."""
        return CELL * self.task_size if self.is_task else DATASETS[self.dataset].size


def sides_of(resize: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width; one number is a square."""
    return (resize, resize) if isinstance(resize, int) else tuple(resize)
