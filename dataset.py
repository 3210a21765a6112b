"""Data sets by name, as batches on the device: `load_data`.

Small sets stay on the device as one uint8 tensor and are cropped, flipped, resized and normalised there, a batch at a
time. Folders of images are decoded by worker processes; noise and normalisation follow on the device.

Nothing here draws from a global random number generator: order, augmentation and noise are functions of (seed, epoch,
index of the image), so they do not depend on batch size, workers, or where a run was interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import math
import os
import pickle
import signal
import socket
import sys
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from options import DATASETS, DataConfig
from runs.processes import Signals

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATS = {  # mean and standard deviation of each channel, of pixels from 0 to 1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.3054,), (0.3760,)),
}
NO_FLIP = ("mnist", "digits")  # a mirrored 2 is no digit
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DIGIT_NAMES = [str(digit) for digit in range(10)]
FASHION_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
    forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
""".split()


class DataError(Exception):
    """Data that is missing or wrong, said in one line: a program prints it and exits with status 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def import_torchvision():
    """The torchvision package. Raises DataError, with what to install, if it is absent or made for another torch."""
    try:
        import torchvision
        import torchvision.datasets
        import torchvision.transforms.v2
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        release = ".".join(torch.__version__.split(".")[:2])
        raise DataError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); run `pip install --upgrade torch "
            f"torchvision`, or install the torchvision release made for torch {release}"
        ) from None
    return torchvision


# ---------------------------------------------------------------------------------------------------------------
# Random numbers that are functions of (seed, epoch, index)
# ---------------------------------------------------------------------------------------------------------------

CROP, ORDER, WORKER, NOISE = range(4)  # streams: independent numbers for independent purposes
NOISE_STREAM = {"train": NOISE, "val": NOISE + 1, "test": NOISE + 2}


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, in place on int32: a bijection after which every bit depends on every bit.

    Products wrap around; the masks make the shifts, which are arithmetic on int32, logical.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x85EBCA6B - 2**32
    x ^= (x >> 13) & 0x7FFFF
    x *= 0xC2B2AE35 - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def _keys(seed: int, epoch: int, index: Tensor, stream: int, salt: int = 0) -> Tensor:
    """One int32 per index; different indices never share one within the same (seed, epoch, stream)."""
    x = index.to(torch.int32, copy=True)
    for word in (stream, epoch, seed):
        word = (word * 0x9E3779B9 + salt + 1) % 2**32
        x = _mix(x.add_(word - 2**32 if word >= 2**31 else word))
    return x


def uniform(seed: int, epoch: int, index: Tensor, n: int, stream: int = 0) -> Tensor:
    """`n` numbers in [0, 1) for each image: index (B,) -> float32 (B, n), in steps of 2^-24.

    Row b depends on (seed, epoch, index[b], stream) only.
    """
    start = _keys(seed, epoch, index, stream)[:, None]
    # A stride of its own for every image: otherwise two images could share a stretch of their sequences.
    stride = _keys(seed, epoch, index, stream, salt=1)[:, None] | 1
    columns = _mix(torch.arange(1, n + 1, dtype=torch.int32, device=index.device))
    x = _mix(stride * columns + start)
    return ((x >> 8) & 0xFFFFFF).float().mul_(2**-24)


def gaussian(seed: int, epoch: int, index: Tensor, n: int, stream: int = 0) -> Tensor:
    """`n` standard normal numbers for each image: index (B,) -> float32 (B, n), by Box and Muller's method."""
    half = (n + 1) // 2
    first, second = uniform(seed, epoch, index, 2 * half, stream).split(half, dim=1)
    radius = torch.log1p(-first).mul_(-2).sqrt_()
    angle = second * (2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :n]


# ---------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Images (B, C, H, W) in a black border, cut back to (H, W) at (top, left) from 0 to 2 padding, some then mirrored.

    `top`, `left` (B,) are int64, `flip` (B,) is bool: each image has its own.
    """
    B, C, H, W = images.shape
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
    cols = torch.arange(W, device=images.device).expand(B, W)
    cols = left[:, None] + torch.where(flip[:, None], W - 1 - cols, cols)  # (B, W), read backwards where mirrored
    pixel = rows[:, :, None] * (W + 2 * padding) + cols[:, None, :]  # (B, H, W)
    return padded.gather(2, pixel.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


def resize_images(images: Tensor, size: int) -> Tensor:
    """Pixels from 0 to 255 (B, C, H, W) -> float32 (B, C, size, size), whole numbers as PIL's bilinear resize gives."""
    images = F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return images.round_().clamp_(0, 255)


@dataclass(frozen=True)
class Recipe:
    """How the images of one part of a data set become batches."""

    dataset: str
    part: str  # train (a new order every epoch), val or test
    batch_size: int
    seed: int
    resize: int  # side of the images that leave
    device: torch.device
    augment: bool = False
    noise: float = 0.0  # standard deviation, of pixels from 0 to 1
    rank: int = 0  # of `world` processes this one's share of the images
    world: int = 1


class Batches:
    """What both kinds of batches share. `index` (n,) is each image's place in the data set before any was left out.

    Several processes share every training batch, and take turns with whole batches of the other parts, so that each of
    those is computed exactly as one process would. All get equally many batches, some of which may then be empty.
    """

    def __init__(self, index: np.ndarray, recipe: Recipe):
        self.num_samples = len(index)
        self.recipe = recipe
        mean, std = STATS.get(recipe.dataset, IMAGENET_STATS)
        self._mean = torch.tensor(mean, device=recipe.device).view(-1, 1, 1)
        self._std = torch.tensor(std, device=recipe.device).view(-1, 1, 1)

    @property
    def _images_per_step(self) -> int:
        return self.recipe.batch_size * (1 if self.recipe.part == "train" else self.recipe.world)

    def __len__(self) -> int:
        """Batches per epoch; the last may be short."""
        return -(-self.num_samples // self._images_per_step)

    def images_in(self, step: int) -> int:
        """Images that all processes together see in batch number `step` of an epoch."""
        return min(self._images_per_step, self.num_samples - step * self._images_per_step)

    def chunks(self, epoch: int) -> list[Tensor]:
        """Places of the images of every batch of this process, on the CPU."""
        recipe, batches = self.recipe, self.order(epoch).split(self.recipe.batch_size)
        if recipe.part == "train":
            return [batch.tensor_split(recipe.world)[recipe.rank] for batch in batches]
        mine = list(batches[recipe.rank :: recipe.world])
        return mine + [batches[0][:0]] * (len(self) - len(mine))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, resize, resize) float32, normalised, and labels (B,) int64, both on the device.

        Begins at batch number `start`, with exactly the batches that `epoch(epoch)` gives from there on. Raises DataError
        for an image that cannot be read.
        """
        raise NotImplementedError

    def order(self, epoch: int) -> Tensor:
        """Places of the images (n,) in the order of this epoch, on the CPU."""
        if self.recipe.part != "train":
            return torch.arange(self.num_samples)
        # Hashed first: a CPU generator takes the low 32 bits of its seed only.
        key = _keys(self.recipe.seed, epoch, torch.zeros(1), ORDER).item()
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(key % 2**32))

    def _nothing(self, channels: int) -> tuple[Tensor, Tensor]:
        """A batch without images."""
        size, device = self.recipe.resize, self.recipe.device
        return torch.empty(0, channels, size, size, device=device), torch.empty(0, dtype=torch.int64, device=device)

    def _finish(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """float32 pixels from 0 to 255, changed in place -> noisy and normalised."""
        recipe = self.recipe
        images.div_(255)
        if recipe.noise:
            epoch = epoch if recipe.part == "train" else 0
            n, stream = images[0].numel(), NOISE_STREAM[recipe.part]
            noise = gaussian(recipe.seed, epoch, index, n, stream)
            images.add_(noise.reshape(images.shape), alpha=recipe.noise)
        return images.sub_(self._mean).div_(self._std)


class DeviceBatches(Batches):
    """A small data set that stays on the device. images (n, C, H, W) uint8, labels (n,), index (n,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe):
        super().__init__(index, recipe)
        self._images = torch.from_numpy(images).to(recipe.device)
        self._labels = torch.from_numpy(labels).to(recipe.device, torch.int64)
        self._index = torch.from_numpy(index).to(recipe.device, torch.int64)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = self.chunks(epoch)[start:]
        if not chunks:
            return
        order = torch.cat(chunks).to(self.recipe.device)  # at once, not a copy to the device for every batch
        for chosen in order.split([len(chunk) for chunk in chunks]):
            if not len(chosen):
                yield self._nothing(self._images.shape[1])
                continue
            images, index = self._images[chosen], self._index[chosen]
            if self.recipe.augment:
                images = self._augment(images, index, epoch)
            native = images.shape[-1] == self.recipe.resize
            images = images.float() if native else resize_images(images, self.recipe.resize)
            yield self._finish(images, index, epoch), self._labels[chosen]

    def _augment(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        padding = 1 if self.recipe.dataset == "digits" else 4
        draws = uniform(self.recipe.seed, epoch, index, 3, CROP)
        top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
        flip = (draws[:, 2] < 0.5) & (self.recipe.dataset not in NO_FLIP)
        return crop_and_flip(images, top, left, flip, padding)


class _ImageFiles(Dataset):
    """(epoch, place) -> image (3, S, S) uint8, label, index; or the DataError, which the main process then raises."""

    def __init__(self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe):
        # NumPy arrays: the workers share their memory, whereas counting references would copy a list into each.
        self.files, self.labels, self.index = files, labels, index
        self.seed = recipe.seed
        v2 = import_torchvision().transforms.v2
        if recipe.augment:
            steps = [v2.RandomResizedCrop(recipe.resize), v2.RandomHorizontalFlip()]
        else:
            steps = [v2.Resize(round(recipe.resize * 256 / 224)), v2.CenterCrop(recipe.resize)]
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | DataError:
        from PIL import Image

        epoch, place = key
        path, index = os.fsdecode(self.files[place]), int(self.index[place])
        try:
            with Image.open(path) as file:
                if file.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to white
                    file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
                image = file.convert("RGB")  # transparency is dropped, not composited
        except Exception as error:  # decoders raise nearly anything on a damaged file
            return DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})")
        with torch.random.fork_rng(devices=[]):
            # The CPU generator alone: without workers, torch.manual_seed would reset the GPU's for dropout as well.
            torch.default_generator.manual_seed(_keys(self.seed, epoch, torch.tensor([index]), WORKER).item() % 2**32)
            return self.transform(image), int(self.labels[place]), index


class _Plan:
    """The batch sampler of a loader that lives for many epochs: lists of (epoch, place).

    It does not know its batches: as part of a reference cycle the loader would take seconds to stop its workers.
    """

    def __init__(self):
        self.epoch, self.chunks = 0, ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        return ([(epoch, place) for place in chunk.tolist()] for chunk in self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def _collate(samples: list) -> tuple[Tensor, Tensor, Tensor] | DataError | None:
    if not samples:
        return None
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels, index = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(index)


def _start_worker(worker: int) -> None:
    """Leave signals to the main process, which finishes a step, for which it needs its workers, and then ends them.

    Clusters and torchrun signal the whole group of processes. A worker ends when it is told to, or when its parent is gone.
    """
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(iterator: weakref.ref) -> None:
    """At exit: multiprocessing would send them SIGTERM and wait."""
    if iterator() is not None:
        iterator()._shutdown_workers()


class StreamedBatches(Batches):
    """Image files, decoded as they are needed. files (n,) byte strings, labels (n,), index (n,).

    The workers live from the first epoch on; one iterator at a time can be in use.
    """

    def __init__(self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe, num_workers: int):
        super().__init__(index, recipe)
        self._plan = _Plan()
        self._ends_at_exit = num_workers == 0
        self._loader = DataLoader(
            _ImageFiles(files, labels, index, recipe),
            batch_sampler=self._plan,
            collate_fn=_collate,
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=recipe.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each epoch draws from the global generator, and a resumed one twice
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._plan.epoch, self._plan.chunks = epoch, self.chunks(epoch)[start:]
        try:
            batches = iter(self._loader)
            if not self._ends_at_exit:
                atexit.register(_end_workers, weakref.ref(batches))
                self._ends_at_exit = True
            for batch in batches:
                if isinstance(batch, DataError):
                    raise DataError(str(batch))  # a copy: `batch` would hold its own traceback, and that the workers
                if batch is None:
                    yield self._nothing(3)
                    continue
                images, labels, index = (tensor.to(self.recipe.device, non_blocking=True) for tensor in batch)
                yield self._finish(images.float(), index, epoch), labels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that reads images died ({error}); try --num_workers 0") from None


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """One part of a data set as read: pixels (n, C, H, W) uint8, or files (n,) as byte strings, and labels (n,) int64."""

    data: np.ndarray
    labels: np.ndarray


class Source(NamedTuple):
    parts: dict[str, Images]  # train and test, or test alone
    class_names: list[str]


def _find(config: DataConfig, find: Callable, expected: str, download: str | None = None):
    """What `find()` finds, if need be after a download by the torchvision class of that name. Raises DataError."""
    missing = f"--data_path {config.data_path} does not hold --dataset {config.dataset}: expected {expected}"
    found = find()
    if found is None and config.download and download:
        _download(config, download, missing)
        found = find()
    if found is None:
        why = " (it cannot be downloaded from here)" if config.download and not download else ""
        raise DataError(f"{missing}{why}; put it there, or take --dataset digits, which needs no files")
    return found


def _download(config: DataConfig, name: str, missing: str) -> None:
    """Download through `torchvision.datasets.<name>` to a folder aside, then move: a failure leaves nothing behind."""
    root = Path(config.data_path)
    parent = root
    while not parent.exists():
        parent = parent.parent
    timeout = socket.getdefaulttimeout()
    try:
        make = getattr(import_torchvision().datasets, name)
        socket.setdefaulttimeout(30)  # a compute node behind a firewall would wait for minutes
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as aside:
            with contextlib.redirect_stdout(sys.stderr):
                make(root=aside, download=True)
            for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
                target = root / file.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{missing}, and the download failed ({why}); put it there, or take --dataset digits, which needs no files"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _checked(path: Path, labels, classes: int, images: int) -> np.ndarray:
    """The labels as int64. Raises DataError unless there is one for each image, from 0 to classes - 1."""
    try:
        labels = np.asarray(labels)
    except ValueError:  # lists of unequal lengths
        labels = np.empty(0)
    if images == 0:
        raise DataError(f"{path}: holds no images")
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels do not match the {images} images")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise DataError(f"{path}: label {label} is out of range, 0 to {classes - 1}")
    return labels.astype(np.int64)


def _read_digits(config: DataConfig, parts: tuple[str, ...]) -> Source:
    with np.load(Path(__file__).parent / "data" / "digits.npz", allow_pickle=False) as arrays:
        return Source({part: _digits_part(arrays, part) for part in parts}, DIGIT_NAMES)


def _digits_part(arrays, part: str) -> Images:
    pixels = np.rint(arrays[f"{part}_images"][:, None] * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    return Images(pixels, arrays[f"{part}_labels"].astype(np.int64))


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An idx file of bytes, gzipped or not -> uint8 (n, *shape). Raises DataError if it is anything else."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    header = 4 + 4 * (1 + len(shape))
    sizes = tuple(np.frombuffer(raw[4:header], ">u4").tolist()) if len(raw) >= header else ()
    if raw[:4] != bytes((0, 0, 8, 1 + len(shape))) or sizes[1:] != shape:
        raise DataError(f"{path}: is not an idx file of {'x'.join(map(str, ('n', *shape)))} bytes")
    if len(raw) - header != math.prod(sizes):
        raise DataError(f"{path}: has {len(raw) - header} bytes of data where its header says {math.prod(sizes)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(sizes)


def _read_mnist(config: DataConfig, parts: tuple[str, ...]) -> Source:
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[config.dataset]
    root = Path(config.data_path)
    prefix = {"train": "train", "test": "t10k"}
    wanted = [f"{prefix[part]}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]

    def find() -> dict[str, Path] | None:
        for folder in (root / name / "raw", root):
            paths = [path for file in wanted for path in (folder / file, folder / f"{file}.gz") if path.is_file()]
            paths = {path.name.removesuffix(".gz"): path for path in reversed(paths)}  # the plain file, where both are
            if len(paths) == len(wanted):
                return paths
        return None

    paths = _find(config, find, f"{', '.join(wanted)} (or .gz) there or in {root / name / 'raw'}", name)
    read = {}
    for part in parts:
        pixels = read_idx(paths[f"{prefix[part]}-images-idx3-ubyte"], (28, 28))
        path = paths[f"{prefix[part]}-labels-idx1-ubyte"]
        read[part] = Images(pixels[:, None], _checked(path, read_idx(path, ()), 10, len(pixels)))
    return Source(read, FASHION_NAMES if name == "FashionMNIST" else DIGIT_NAMES)


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` for the one codec with which Python 2 pickles carry bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(1).__reduce_ex__(5)[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain values, and nothing that could run code."""

    ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of images")
        return self.ALLOWED[module, name]


def _read_cifar_batch(path: Path, key: str, classes: int) -> Images:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
        batch = {name.decode("latin1") if isinstance(name, bytes) else name: value for name, value in batch.items()}
        pixels, labels = batch["data"], batch[key]
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: is not a batch of CIFAR images ({type(error).__name__}: {error})") from None
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(pixels), 3072)):
        raise DataError(f"{path}: is not a batch of CIFAR images (data must be n x 3072 bytes)")
    return Images(pixels.reshape(-1, 3, 32, 32), _checked(path, labels, classes, len(pixels)))


def _read_cifar(config: DataConfig, parts: tuple[str, ...]) -> Source:
    if config.dataset == "cifar10":
        name, key, folder = "CIFAR10", "labels", "cifar-10-batches-py"
        files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    else:
        name, key, folder = "CIFAR100", "fine_labels", "cifar-100-python"
        files = {"train": ["train"], "test": ["test"]}
    paths = {part: [Path(config.data_path) / folder / file for file in files[part]] for part in parts}

    def find() -> dict[str, list[Path]] | None:
        return paths if all(path.is_file() for part in parts for path in paths[part]) else None

    _find(config, find, f"{folder}/ with {', '.join(file for part in parts for file in files[part])}", name)
    class_names = CIFAR10_NAMES if name == "CIFAR10" else CIFAR100_NAMES
    read = {}
    for part in parts:
        batches = [_read_cifar_batch(path, key, len(class_names)) for path in paths[part]]
        read[part] = Images(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    return Source(read, class_names)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _fail(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that may not be read


def _scan(folder: Path, classes: list[str], *, may_be_empty: bool) -> Images:
    """The image files below one folder per class, sorted. Raises DataError for a class without any, unless it may."""
    files, labels = [], []
    for label, name in enumerate(classes):
        before = len(files)
        walk = os.walk(folder / name, onerror=_fail, followlinks=True) if (folder / name).is_dir() else ()
        for path, folders, names in walk:
            folders.sort()
            files += [os.fsencode(os.path.join(path, n)) for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)]
        if len(files) == before and not may_be_empty:
            raise DataError(f"{folder / name}: a class folder without images ({' '.join(IMAGE_SUFFIXES)})")
        labels += [label] * (len(files) - before)
    if not files:
        raise DataError(f"{folder}: has no images ({' '.join(IMAGE_SUFFIXES)}) in its class folders")
    return Images(np.array(files), np.array(labels, dtype=np.int64))


def _read_folders(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """`train/` and `val/` with one folder per class; the test images are those of `val/`."""
    root = Path(config.data_path)
    folders = [root, root / config.dataset] + [root / "imagenette2"] * (config.dataset == "imagenette")
    needed = [{"train": "train", "test": "val"}[part] for part in parts]

    def find() -> Path | None:
        return next((folder for folder in folders if all((folder / name).is_dir() for name in needed)), None)

    expected = f"{'/ and '.join(needed)}/ with one folder per class there or in {' or '.join(map(str, folders[1:]))}"
    folder = _find(config, find, expected, "Imagenette" if config.dataset == "imagenette" else None)
    # Labels are places in the list of training classes. To test, a copy without train/ will do if it has every class.
    listed = folder / ("train" if (folder / "train").is_dir() else "val")
    classes = _class_folders(listed)
    count = DATASETS[config.dataset].classes
    if not classes or len(classes) != (count or len(classes)):
        raise DataError(f"{listed}: has {len(classes)} class folders; --dataset {config.dataset} has {count or 'at least 1'}")
    for name in _class_folders(folder / "val"):
        if name not in classes:
            raise DataError(f"{folder / 'val' / name}: a class folder that {folder / 'train'} lacks")
    read = {"test": _scan(folder / "val", classes, may_be_empty=True)}
    if "train" in parts:
        read["train"] = _scan(folder / "train", classes, may_be_empty=False)
    return Source(read, classes)


READERS = {"digits": _read_digits, "mnist": _read_mnist, "fashion_mnist": _read_mnist}
READERS |= {"cifar10": _read_cifar, "cifar100": _read_cifar}
READERS |= {name: _read_folders for name, info in DATASETS.items() if info.streamed}


# ---------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many images of its class come before each image: (n,) -> (n,)."""
    order = np.argsort(labels, kind="stable")
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(first, sizes)
    return ranks


def balanced_subset(labels: np.ndarray, n: int) -> np.ndarray:
    """Places, ascending, of the first n images taken class by class in turn: the classes differ by one at most."""
    return np.sort(np.argsort(_rank_in_class(labels), kind="stable")[:n])


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Places, ascending, of the images to keep and of the `fraction` of every class to hold out; always the same ones."""
    shuffle = _keys(0, 0, torch.arange(len(labels)), ORDER).numpy()  # hashes differ, so they are an order
    by_class = np.lexsort((shuffle, labels))
    # round(n * fraction) in all, and per class to within one image
    due = np.floor(np.arange(len(labels) + 1) * fraction + 0.5)
    held = np.diff(due) > 0
    return np.sort(by_class[~held]), np.sort(by_class[held])


class Data(NamedTuple):
    train: Batches | None  # None if only the test set was asked for
    val: Batches | None  # None without --val_fraction
    test: Batches
    class_names: list[str]


def _limited(labels: np.ndarray, config: DataConfig, part: str) -> np.ndarray:
    limit = getattr(config, f"{part}_limit")
    if limit is None:
        return np.arange(len(labels))
    if limit > len(labels):
        what = {"train": "training", "test": "test"}[part]
        raise DataError(f"--{part}_limit {limit} is more than the {len(labels)} {what} images of --dataset {config.dataset}")
    return balanced_subset(labels, limit)


def load_data(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    test_only: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """The batches of the data set that `config` names; `config.resize` and `config.num_workers` must be numbers by now.

    batch_size: images of a batch, over all `world` processes, of which this is number `rank`. With `test_only` the training
    images are not read. Raises DataError if data is missing or wrong, and for limits and fractions that it cannot meet.
    """
    assert config.resize is not None and config.num_workers is not None
    try:
        source = READERS[config.dataset](config, ("test",) if test_only else ("train", "test"))
    except OSError as error:
        raise DataError(f"--data_path {config.data_path}: {error}") from None

    def batches(images: Images, index: np.ndarray, part: str) -> Batches:
        augment = config.augment and part == "train"
        recipe = Recipe(config.dataset, part, batch_size, seed, config.resize, device, augment, config.noise, rank, world)
        data, labels = images.data[index], images.labels[index]
        if DATASETS[config.dataset].streamed:
            return StreamedBatches(data, labels, index, recipe, config.num_workers)
        return DeviceBatches(data, labels, index, recipe)

    train = val = None
    if not test_only:
        images = source.parts["train"]
        index = _limited(images.labels, config, "train")
        if config.val_fraction:
            kept, held = stratified_split(images.labels[index], config.val_fraction)
            if not len(kept) or not len(held):
                what = "to train on" if not len(kept) else "for validation"
                raise DataError(f"--val_fraction {config.val_fraction} of {len(index)} training images leaves none {what}")
            val = batches(images, index[held], "val")
            index = index[kept]
        train = batches(images, index, "train")
    test = batches(source.parts["test"], _limited(source.parts["test"].labels, config, "test"), "test")
    return Data(train, val, test, source.class_names)
