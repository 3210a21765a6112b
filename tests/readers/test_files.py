"""Files of small data sets, written small, and downloads that are played."""

import builtins
import functools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from options.data import DATASETS
from readers.files import import_torchvision
from tests.helpers.data import (
    FASHION,
    everything,
    fails,
    idx,
    load,
    pixels,
    random_images,
    write_cifar,
    write_folder,
    write_mnist,
)


def test_digits_are_those_of_scikit_learn(tmp_path):
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load("digits", tmp_path)
    train, labels = everything(data.train)
    test, test_labels = everything(data.test)
    assert train.shape == (1437, 1, 8, 8) and test.shape == (360, 1, 8, 8)
    assert abs(train.mean()) < 1e-3 and abs(train.std() - 1) < 1e-3
    values = pixels(torch.cat((train, test)), "digits") * 16 / 255
    ours = sorted([*image, label] for image, label in zip(values.flatten(1).round().int().tolist(), [*labels, *test_labels]))  # noqa: B905
    source = load_digits()
    assert ours == sorted([*image, label] for image, label in zip(source.data.astype(int).tolist(), source.target, strict=True))
    assert data.class_names == list("0123456789")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name, below", [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")])
def test_idx_files(tmp_path, name, below, gz):
    arrays = write_mnist(tmp_path / below, gz=gz)
    data = load(name, tmp_path)
    images, labels = everything(data.test)
    assert torch.equal(pixels(images, name).round()[:, 0].byte(), torch.from_numpy(arrays["t10k"][0]))
    assert labels.tolist() == arrays["t10k"][1].tolist()
    assert data.train.num_samples == 20 and len(data.class_names) == 10


def test_test_only_does_not_need_the_training_files(tmp_path):
    write_mnist(tmp_path, parts=("t10k",))
    assert load("mnist", tmp_path, test_only=True).test.num_samples == 20
    assert "train-images-idx3-ubyte" in fails("mnist", tmp_path)


@pytest.mark.parametrize(
    "file, damage, complaint",
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "15679 bytes of data; its header says 15680"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"x", "15681 bytes"),
        ("train-images-idx3-ubyte", lambda raw: raw[:10], "nx28x28"),
        ("train-images-idx3-ubyte", lambda raw: b"", "nx28x28"),
        ("t10k-images-idx3-ubyte", lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "nx28x28"),
        ("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((20, 28, 27))), "nx28x28"),
        ("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((0, 28, 28))), "20 labels for 0 images"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.zeros(19)), "20 images"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.arange(20)), "label 10 is out of range"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, file, damage, complaint):
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    message = fails("mnist", tmp_path)
    # Where there are no images, it is the labels that do not fit.
    assert str(tmp_path / file) in message or "0 images" in message
    assert complaint in message


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: b"no gzip", lambda raw: raw[:40] + b"x" * 40])
def test_damaged_gzip_files_are_named(tmp_path, damage):
    write_mnist(tmp_path, gz=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in fails("mnist", tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_real_fashion_mnist(tmp_path):
    data = load("fashion_mnist", FASHION, batch_size=10000)
    assert data.train.num_samples == 60000 and data.test.num_samples == 10000
    images, labels = everything(data.train)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    assert data.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name, protocol):
    written = write_cifar(tmp_path, name, protocol=protocol)
    data = load(name, tmp_path)
    *train, test = written.values()
    images, labels = everything(data.test)
    assert torch.equal(pixels(images, name).round().byte().flatten(1), torch.from_numpy(test))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    order = data.train.order(0)
    images, _ = everything(data.train)
    assert torch.equal(pixels(images, name).round().byte().flatten(1), torch.from_numpy(np.concatenate(train))[order])
    assert len(data.class_names) == len(set(data.class_names)) == DATASETS[name].classes
    assert data.class_names == sorted(data.class_names)


def python2_batch(images, labels):
    """Pickle as Python 2 does: byte strings for text and pixels alike."""
    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K"
    array += (
        bytes([len(images)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
    )
    array += b"\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels](" + b"".join(b"K" + bytes([y]) for y in labels) + b"eu."


def test_cifar_as_python_2_wrote_it(tmp_path):
    write_cifar(tmp_path)
    images = random_images(4, seed=7)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(python2_batch(images, [3, 0, 9, 1]))
    out, labels = everything(load("cifar10", tmp_path, test_only=True).test)
    assert labels.tolist() == [3, 0, 9, 1]
    assert torch.equal(pixels(out, "cifar10").round().byte(), torch.from_numpy(images))


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_malicious_pickles_run_nothing(tmp_path):
    write_cifar(tmp_path)
    file, trace = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "trace"
    good = {"data": random_images(2).reshape(2, 3072), "labels": [0, 1]}
    attacks = [
        Malicious(os.system, f"touch {trace}"),
        Malicious(builtins.eval, f"open({str(trace)!r}, 'w')"),
        Malicious(builtins.getattr, "", "join"),
        Malicious(np.load, str(trace)),
        Malicious(np.memmap, str(trace), np.uint8, "w+", 0, 1),
    ]
    for attack in attacks:
        for protocol in (0, 2, 5):
            file.write_bytes(pickle.dumps({"extra": attack} | good, protocol))
            message = fails("cifar10", tmp_path)
            assert str(file) in message and "not allowed" in message
            assert not trace.exists()
    pickle.loads(pickle.dumps(attacks[0]))
    assert trace.exists()  # the attack would have worked


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
        pickle.dumps({"data": np.zeros(3072, np.uint8), "labels": [0]}),
        b"\x80\x02}r\xff\xff\xff\x1f.",  # an entry of the memo far away: gigabytes in C
        pickle.dumps({"data": np.array(7, np.uint8), "labels": [0]}),  # without axes
        pickle.dumps({"data": np.zeros((1, 1, 3072), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}),
        pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": functools.reduce(lambda x, _: [x] * 10, range(40), 0)}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0.5]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, [1]]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})[:-100],
    ],
)
def test_damaged_cifar_files_are_named(tmp_path, batch):
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(batch)
    assert str(file) in fails("cifar10", tmp_path)


def test_missing_cifar_file(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert "data_batch_3" in fails("cifar10", tmp_path)
    assert load("cifar10", tmp_path, test_only=True).test.num_samples == 12


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits" and "task" not in name])
def test_missing_data_says_where_and_what(tmp_path, name):
    message = fails(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and f"--dataset {name}" in message and "--dataset digits" in message
    assert "expected " in message
    assert not list(tmp_path.iterdir())


def test_failed_download_leaves_nothing(tmp_path, monkeypatch, capsys):
    def download(root, download):
        folder = Path(root) / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half")
        print("Downloading")
        raise RuntimeError("Error downloading\nsecond line")

    monkeypatch.setattr(import_torchvision().datasets, "FashionMNIST", download)
    for path in (tmp_path / "not" / "there", tmp_path):
        message = fails("fashion_mnist", path, download=True)
        assert "Error downloading second line" in message and str(path) in message and "--dataset digits" in message
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "--dataset digits" in fails("fashion_mnist", tmp_path / "file", download=True)
    assert capsys.readouterr().out == ""


def test_download(tmp_path, monkeypatch, capsys):
    def download(root, download):
        print("Downloading")
        write_mnist(Path(root) / "FashionMNIST" / "raw", gz=True)

    monkeypatch.setattr(import_torchvision().datasets, "FashionMNIST", download)
    path = tmp_path / "new" / "Data"
    (path / "FashionMNIST" / "raw").mkdir(parents=True)  # left by something else
    data = load("fashion_mnist", path, download=True)
    assert data.train.num_samples == 20 and capsys.readouterr().out == ""
    assert [entry.name for entry in path.iterdir()] == ["FashionMNIST"]
    monkeypatch.delattr(import_torchvision().datasets, "FashionMNIST")  # a second time there is no need
    load("fashion_mnist", path, download=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        ModuleNotFoundError("No module named 'torchvision'"),
        OSError("libtorch_cuda.so: undefined symbol\nsecond line"),
    ],
)
def test_torchvision_made_for_another_torch(tmp_path, monkeypatch, error):
    write_folder(tmp_path)
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.split(".")[0] == "torchvision":
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    for message in (fails("folder", tmp_path), fails("mnist", tmp_path, download=True)):
        assert "pip install --upgrade torch torchvision" in message and f"made for torch {torch.__version__}" in message
        assert str(error).splitlines()[0] in message
