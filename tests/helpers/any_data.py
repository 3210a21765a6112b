"""Small data sets in the formats of other libraries and in archives."""

import tarfile
import zipfile

import numpy as np
from PIL import Image

from tests.helpers.data import random_images, write_folder


def pack(source, folder, kind):
    """Pack train/ and val/ of `source` into `folder`: class folders at the top of a .zip, or below train/ in a .tar."""
    folder.mkdir()
    for part in ("train", "val"):
        if kind == "tar":
            with tarfile.open(folder / f"{part}.tar", "w") as archive:
                archive.add(source / part, part)
        else:
            with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted((source / part).rglob("*")):
                    archive.write(path, path.relative_to(source / part))


def write_archives(root, kind):
    write_folder(root / "unpacked", train=8, val=4)
    pack(root / "unpacked", root / "packed", kind)
    return "folder", root / "packed"


def accept(monkeypatch, module, root):
    """Let a data set of torchvision accept other files than those of its hashes, where they exist."""
    monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: (root / path).exists())


def write_svhn(root, monkeypatch):
    from scipy.io import savemat

    root.mkdir()
    for seed, part in enumerate(("train", "test")):
        images = random_images(24, seed=seed).transpose(2, 3, 1, 0)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": np.arange(24)[:, None] % 10 + 1})
    accept(monkeypatch, "svhn", root)
    return "torchvision:SVHN", root


def write_eurosat(root, monkeypatch):
    write_folder(root / "eurosat", classes=[f"Crop{number}" for number in range(10)], train=4, val=0, suffix="jpg")
    (root / "eurosat" / "train").rename(root / "eurosat" / "2750")
    return "torchvision:EuroSAT", root


def write_flowers(root, monkeypatch):
    from scipy.io import savemat

    (root / "flowers-102" / "jpg").mkdir(parents=True)
    for number, image in enumerate(random_images(30).transpose(0, 2, 3, 1), 1):
        Image.fromarray(image).save(root / "flowers-102" / "jpg" / f"image_{number:05}.jpg")
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.arange(30) % 102 + 1})
    sets = {"trnid": np.arange(1, 20), "valid": np.arange(20, 21), "tstid": np.arange(21, 31)}
    savemat(root / "flowers-102" / "setid.mat", sets)
    accept(monkeypatch, "flowers102", root)
    return "torchvision:Flowers102", root


def hub_splits(**sizes):
    """A `datasets.DatasetDict` of PNG images in the column `photo` and classes in the column `kind`."""
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    splits = {}
    for seed, (name, size) in enumerate(sizes.items()):
        images = [Image.fromarray(image) for image in random_images(size, seed=seed).transpose(0, 2, 3, 1)]
        columns = {"photo": images, "kind": [number % 3 for number in range(size)]}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)


def write_saved(root, monkeypatch):
    hub_splits(train=24, test=9).save_to_disk(root)
    return f"hf:{root}", root


def write_parquet(root, monkeypatch):
    """One parquet file per split, as the hub holds them; the classes are plain texts."""
    import datasets

    root.mkdir()
    for name, split in hub_splits(train=24, validation=9).items():
        texts = [split.features["kind"].int2str(kind) for kind in split["kind"]]
        split = split.remove_columns("kind").add_column("label", texts)
        split.to_parquet(root / f"{name}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root.parent / "cache")
    return f"hf:{root}", root
