"""`DataConfig` and the table of data sets."""

from dataclasses import dataclass
from typing import NamedTuple

from options.fields import IMAGES, SIDE, as_words, check_fields, did_you_mean, option
from options.libraries import TORCHVISION, is_hub

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation
INTERPOLATIONS = ("bilinear", "bicubic")
OTHERS = ("torchvision:NAME", "hf:NAME_OR_FOLDER")  # data sets of other libraries


class DatasetInfo(NamedTuple):
    """Sizes of a data set, known before reading it."""

    size: int  # default side of the images in pixels
    channels: int
    classes: int | None  # None: counted in the training folder
    streamed: bool  # read from files during training, instead of kept in device memory
    images: tuple[int, int] | None  # training and test images; None: unknown until the folder is read
    mean: tuple[float, ...] = IMAGENET[0]  # per channel, of pixels from 0 to 1
    std: tuple[float, ...] = IMAGENET[1]


DATASETS = {
    "cifar10": DatasetInfo(32, 3, 10, False, (50_000, 10_000), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DatasetInfo(32, 3, 100, False, (50_000, 10_000), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": DatasetInfo(224, 3, 1000, True, (1_281_167, 50_000)),
    "imagenet100": DatasetInfo(224, 3, 100, True, None),
    "imagenette": DatasetInfo(224, 3, 10, True, (9_469, 3_925)),
    "mnist": DatasetInfo(28, 1, 10, False, (60_000, 10_000), (0.1307,), (0.3081,)),
    "fashion_mnist": DatasetInfo(28, 1, 10, False, (60_000, 10_000), (0.2860,), (0.3530,)),
    "digits": DatasetInfo(8, 1, 10, False, (1_437, 360), (0.3054,), (0.3760,)),
    "folder": DatasetInfo(224, 3, None, True, None),
}
CELL = 4  # side of a cell of a generated task in pixels
TASKS = {"find": 4, "locate": 9, "beside": 4, "opposite": 4, "recall": 4, "count": 8, "duplicate": 2, "joined": 2}  # classes
DATASETS |= {
    f"task_{task}": DatasetInfo(6 * CELL, 3, classes, False, (50_000, 5_000), (0.16,) * 3, (0.22,) * 3)
    for task, classes in TASKS.items()
}


def info_of(dataset: object) -> DatasetInfo | None:
    """Return the sizes of a data set; None for an unknown one."""
    library, _, name = str(dataset).partition(":")
    if library == "torchvision" and name in TORCHVISION:
        return DATASETS["folder"]._replace(size=TORCHVISION[name].size, classes=TORCHVISION[name].classes)
    return DATASETS["folder"] if is_hub(dataset) else DATASETS.get(str(dataset))


def is_task(dataset: object) -> bool:
    """Return True for a data set of generated images."""
    return str(dataset).startswith("task_")


@dataclass(frozen=True)
class DataConfig:
    """Data set, image size, augmentation and limits."""

    heading = "data"

    dataset: str = option(
        "cifar10",
        "data set; digits comes with the code, folder reads train/ and val/ (or train.zip, val.tar) in --data_path, task_* are "
        "generated; torchvision: a classification set of torchvision.datasets; hf: a set on the Hugging Face hub, a folder "
        "saved by datasets, or a parquet file",
        metavar="{" + ",".join((*DATASETS, *OTHERS)) + "}",
    )
    image_column: str | None = option(None, "hf: column of the images (default: the only one of their type)", kind=str)
    label_column: str | None = option(None, "hf: column of the classes (default: the only one of their type)", kind=str)
    task_size: int = option(6, "task_*: cells of 4 x 4 pixels along a side", low=3, high=32)
    task_symbols: int | None = option(
        None, "task_*: patterns that a cell can hold (default: 8; task_recall: 6)", kind=int, low=6, high=15
    )
    data_path: str = option("./Data", "folder that holds the data sets", path=True)
    resize: int | tuple[int, int] | None = option(
        None, "side the images are resized to, or height and width", kind=int, many=True, low=1, high=SIDE
    )
    crop: str | None = option(
        None,
        "center: resize in proportion, then crop around the center; squash: resize height and width apart (default: squash for "
        "small data sets, center for folders and in predict.py)",
        kind=str,
        choices=("center", "squash"),
    )
    interpolation: str = option("bilinear", "interpolation of resized images, antialiased", choices=INTERPOLATIONS)
    mean: tuple[float, ...] | None = option(
        None,
        "mean of each channel, of pixels from 0 to 1 (default: the data set's); three numbers make gray images three channels",
        kind=float,
        many=True,
        low=-1000,
        high=1000,
    )
    std: tuple[float, ...] | None = option(
        None, "standard deviation of each channel (default: the data set's)", kind=float, many=True, low=1e-6, high=1000
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
        info = info_of(self.dataset)
        if info is None:
            library, _, name = self.dataset.partition(":")
            if library == "torchvision":
                line = f"is none of torchvision's data sets for classification: {', '.join(TORCHVISION)}"
                raise ValueError(f"dataset={self.dataset!r} {line}{did_you_mean(name, TORCHVISION)}")
            line = f"is not one of {', '.join(DATASETS)}; there are also {' and '.join(OTHERS)}"
            raise ValueError(f"dataset={self.dataset!r} {line}{did_you_mean(self.dataset, DATASETS)}")
        for name in ("image_column", "label_column"):
            if getattr(self, name) is not None and not is_hub(self.dataset):
                raise ValueError(f"{name}={getattr(self, name)!r} is for dataset=hf:NAME_OR_FOLDER only; leave it out")
        for name in ("mean", "std"):
            numbers = getattr(self, name) or getattr(info, name)
            if len(numbers) not in (info.channels, 3):
                channels = "1 channel: give 1 number, or 3 to repeat it" if info.channels == 1 else "3 channels: give 3 numbers"
                raise ValueError(f"{name}={as_words(numbers)}: images of dataset={self.dataset} have {channels}")
        if len(self.statistics[0]) != len(self.statistics[1]):
            raise ValueError(
                f"mean={as_words(self.statistics[0])} and std={as_words(self.statistics[1])} differ in length; give both"
            )
        for name in ("val_fraction", "augment"):
            if self.is_task and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} does not fit dataset={self.dataset}, which has validation images of its own "
                    "and classes that cropping and flipping would change; drop it"
                )

    @property
    def is_task(self) -> bool:
        """True for generated images."""
        return is_task(self.dataset)

    @property
    def size(self) -> int:
        """Side of the images in pixels before `resize`."""
        return CELL * self.task_size if self.is_task else info_of(self.dataset).size

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels: those given, else the data set's."""
        info = info_of(self.dataset)
        return self.mean or info.mean, self.std or info.std

    @property
    def preprocessing(self) -> dict:
        """Description of how an image file becomes the input of a model, as plain values; `resize` must be set."""
        info, size = info_of(self.dataset), sides_of(self.resize)
        mean, std = self.statistics
        return {
            "mode": "L" if info.channels == 1 else "RGB",
            "size": list(size),
            "crop": self.crop or "center",
            "cover": [round(side * 256 / 224) for side in size] if info.streamed else list(size),
            "interpolation": self.interpolation,
            "mean": list(mean),
            "std": list(std),
        }


def default_statistics(values: dict) -> set[str]:
    """Return the names among mean and std where options by name hold the numbers of their data set."""
    info = info_of(values.get("dataset"))
    given = {name: values.get(name) for name in ("mean", "std")}
    return {
        name
        for name, numbers in given.items()
        if info and isinstance(numbers, (list, tuple)) and tuple(numbers) == getattr(info, name)
    }


def sides_of(resize: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width; one number is a square."""
    return (resize, resize) if isinstance(resize, int) else tuple(resize)
