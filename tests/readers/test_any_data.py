"""Data sets of torchvision and Hugging Face, and class folders in archives: trained, killed, resumed, evaluated, predicted."""

import importlib.util
import json
import shlex
import sys
import tarfile
import zipfile

import pytest
import torch
from PIL import Image

import predict
import train_eval
import vit_main
from dataset import load_data
from options.libraries import TORCHVISION
from options.runs import PROGRAMS, parse_options
from readers.files import import_torchvision
from runs import DataError
from tests.helpers import any_data
from tests.helpers.data import CPU, everything, load, write_folder

needs_hub = pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the extra: pip install datasets")
QUIET = "--num_workers 0 --device cpu --no-download"
MODEL = "--resize 16 --patch_size 8 --num_layers 1 --num_heads 1 --d_model 8 --d_mlp 8 --dropout 0.1 --augment --lr 0.01 "
MODEL += "--batch_size 8 --num_epochs 2 --train_limit 16 --test_limit 8 --save_minutes 1e-9 "
MODEL += QUIET

WRITERS = [
    pytest.param(lambda root, _: any_data.write_archives(root, "tar"), id="tar"),
    pytest.param(lambda root, _: any_data.write_archives(root, "zip"), id="zip"),
    pytest.param(any_data.write_svhn, id="svhn"),
    pytest.param(any_data.write_eurosat, id="eurosat"),
    pytest.param(any_data.write_flowers, id="flowers"),
    pytest.param(any_data.write_saved, id="saved", marks=needs_hub),
    pytest.param(any_data.write_parquet, id="parquet", marks=needs_hub),
]


def run(line, folder, words=""):
    return vit_main.main(shlex.split(f"{line} --output_dir {folder} {words}"))


@pytest.mark.parametrize("write", WRITERS)
def test_trained_killed_resumed_evaluated_and_predicted(write, tmp_path, monkeypatch):
    name, root = write(tmp_path / "data", monkeypatch)
    line = f"{MODEL} --dataset {name} --data_path {root}"
    assert run(line, tmp_path / "whole") == 0
    original, steps = train_eval.train_step, []

    def train_step(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_eval, "train_step", train_step)
        assert run(line, tmp_path / "killed") == 130
    assert run(line, tmp_path / "killed", "--resume") == 0
    whole, killed = (torch.load(tmp_path / folder / "last.pt", weights_only=True) for folder in ("whole", "killed"))
    assert all(torch.equal(killed["model"][key], value) for key, value in whole["model"].items())
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["data"] == json.loads((tmp_path / "killed" / "summary.json").read_text())["data"]

    assert run(f"{QUIET} --test_only --checkpoint {tmp_path / 'whole' / 'best.pt'}", tmp_path / "test") == 0
    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    words = ["--run", str(tmp_path / "whole"), str(tmp_path / "one.png"), "--output", str(tmp_path / "out.csv")]
    assert predict.main(words) == 0
    assert (tmp_path / "out.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_gives_the_batches_and_the_fingerprint_of_its_folder(kind, tmp_path):
    any_data.write_archives(tmp_path, kind)
    plain, packed = (load("folder", tmp_path / name, resize=16, augment=True) for name in ("unpacked", "packed"))
    read_by_worker = load("folder", tmp_path / "packed", resize=16, augment=True, num_workers=1)
    assert packed.fingerprint == plain.fingerprint and packed.class_names == plain.class_names
    images, labels = everything(plain.train, epoch=1)
    for data in (packed, read_by_worker):
        found = everything(data.train, epoch=1)
        assert found[0].equal(images) and found[1].equal(labels)


def test_every_data_set_of_torchvision_exists():
    classes = import_torchvision().datasets
    assert all(hasattr(classes, name) for name in TORCHVISION)


def write_tar(root):
    """Training images in a folder, so that errors are of val.tar, which is left to write."""
    write_folder(root, classes=("a", "b"))
    return tarfile.open(root / "val.tar", "w")


def link_in_tar(root):
    with write_tar(root) as archive:
        member = tarfile.TarInfo("a/0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "1.png"
        archive.addfile(member)


def unknown_class(root):
    with write_tar(root) as archive:
        archive.add(root / "val" / "a", "other")


def no_image(root):
    with write_tar(root) as archive:
        archive.add(__file__, "a/0.png")
        archive.add(__file__, "b/0.png")


def damaged(name):
    def write(root):
        write_folder(root, classes=("a", "b"))
        (root / name).write_bytes(b"no archive" * 100)

    return write


def bzip2(root):
    write_folder(root, classes=("a", "b"))
    with zipfile.ZipFile(root / "val.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.write(root / "val" / "a" / "0.png", "a/0.png")


def one_class(root):
    any_data.write_archives(root, "tar")
    with tarfile.open(root / "train.tar", "w") as archive:
        archive.add(root / "unpacked" / "train" / "ant", "ant")
    (root / "packed" / "val.tar").rename(root / "val.tar")


def saved(root):
    splits = any_data.hub_splits(train=4, test=4)
    splits["train"] = splits["train"].add_column("number", [0.5, 1.5, 2.5, 3.5])
    splits.save_to_disk(root)


def without_train(root):
    any_data.hub_splits(one=4, two=4).save_to_disk(root)


FOLDER, SVHN = "--dataset folder", "--dataset torchvision:SVHN"
WRONG = [
    ("--dataset torchvision:Flower102", None, "did you mean"),
    ("--dataset torchvision:", None, "none of torchvision's data sets"),
    ("--dataset hf:", None, "hf:NAME_OR_FOLDER"),
    (f"{SVHN} --image_column image", None, "is for dataset=hf:NAME_OR_FOLDER only"),
    (f"{SVHN} --no-download", None, "leave out --no-download"),
    ("--dataset torchvision:SUN397 --no-download", None, "--data_path"),
    (FOLDER, link_in_tar, "a/0.png is a link"),
    (FOLDER, unknown_class, "this class folder is missing"),
    (FOLDER, no_image, "val.tar/a/0.png: cannot be read as an image"),
    (FOLDER, damaged("val.tar"), "pack the class folders again"),
    (FOLDER, damaged("val.zip"), "pack the class folders again"),
    (FOLDER, damaged("val.tar.gz"), "decompress it"),
    (FOLDER, bzip2, "pack it again, by zip -0"),
    (FOLDER, one_class, "has 1 class folders in train.tar; it needs at least 2"),
]
WRONG_HUB = [
    ("--dataset hf:DATA --image_column foto", saved, "did you mean"),
    ("--dataset hf:DATA --label_column number", saved, "at least two different numbers or texts"),
    ("--dataset hf:DATA", without_train, "none is named train"),
    ("--dataset hf:DATA/nowhere --no-download", saved, "cannot be opened"),
]


def error_of(line, write, root, capsys) -> str:
    if write:
        write(root)
        if (root / "val").is_dir():
            (root / "val").rename(root / "unpacked_val")
    words = shlex.split(f"{line.replace('DATA', str(root))} --data_path {root} --num_workers 0 --resize 16")
    try:
        options = parse_options(PROGRAMS["allconvnet_main.py"], "", words)[0]
        load_data(options.data, batch_size=4, seed=0, device=CPU)
    except DataError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err.strip().splitlines()[-1]
    raise AssertionError("no error")


@pytest.mark.parametrize(("line", "write", "says"), WRONG)
def test_wrong_uses_are_one_line(line, write, says, tmp_path, capsys):
    message = error_of(line, write, tmp_path, capsys)
    assert says in message and "\n" not in message, message


@needs_hub
@pytest.mark.parametrize(("line", "write", "says"), WRONG_HUB)
def test_wrong_uses_of_hugging_face_are_one_line(line, write, says, tmp_path, capsys):
    message = error_of(line, write, tmp_path, capsys)
    assert says in message and "\n" not in message, message


def test_without_the_extra_the_command_that_installs_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of("--dataset hf:mnist", None, tmp_path, capsys)
