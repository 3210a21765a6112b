"""Folders of images: which are found, their classes, and kinds of files."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from options.data import DataConfig
from options.runs import PROGRAMS, parse_options
from readers.folders import read_folders
from runs import DataError
from tests.helpers.data import everything, fails, load, pixels, random_images, write_folder


def test_where_folders_are_found(tmp_path):
    write_folder(tmp_path / "imagenette2", classes=[f"n{i}" for i in range(10)], train=1, val=1)
    assert load("imagenette", tmp_path).train.num_samples == 10
    assert load("imagenette", tmp_path / "imagenette2", resize=32).test.num_samples == 10
    (tmp_path / "imagenette2").rename(tmp_path / "imagenette")
    assert load("imagenette", tmp_path, train_limit=4).train.num_samples == 4


def test_classes_of_validation_are_those_of_training(tmp_path):
    write_folder(tmp_path, classes=("a", "b", "c"))
    for file in (tmp_path / "val" / "a").iterdir():
        file.unlink()
    (tmp_path / "val" / "a").rmdir()
    (tmp_path / "val" / "file").write_text("")
    for test_only in (False, True):
        data = load("folder", tmp_path, resize=8, test_only=test_only)
        assert everything(data.test)[1].tolist() == [1, 1, 2, 2] and data.class_names == ["a", "b", "c"]
    (tmp_path / "val" / "d").mkdir()
    assert str(tmp_path / "val" / "d") in fails("folder", tmp_path)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    write_folder(tmp_path, classes=("a", "b"))
    message = fails("imagenette", tmp_path)
    assert "2 class folders" in message and "10" in message and "imagenette" in message
    (tmp_path / "train" / "aa").mkdir()
    assert str(tmp_path / "train" / "aa") in fails("folder", tmp_path)
    (tmp_path / "train" / "aa").rmdir()
    for file in tmp_path.glob("val/b/*"):
        file.unlink()
    assert str(tmp_path / "val" / "b") in fails("folder", tmp_path)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    assert "no class folders" in fails("folder", tmp_path)
    assert "--dataset digits" in fails("folder", tmp_path / "train")
    message = fails("imagenet", tmp_path / "nowhere", download=True)
    assert "downloaded by hand" in message and not (tmp_path / "nowhere").exists()


def test_files_below_a_class_are_listed_folder_by_folder(tmp_path):
    write_folder(tmp_path, classes=("a",), train=1)
    image = Image.new("RGB", (8, 8))
    for name in ("z.png", "c/1.png", "b/y.PNG", "b/deep/0.png", "b/x.jpg"):
        path = tmp_path / "train" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (tmp_path / "elsewhere").mkdir()
    image.save(tmp_path / "elsewhere" / "image.png")
    (tmp_path / "train" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    source = read_folders(DataConfig(dataset="folder", data_path=str(tmp_path)), ("train",))
    names = [os.fsdecode(path).removeprefix(str(tmp_path / "train" / "a") + "/") for path in source.parts["train"].data]
    assert names == ["0.png", "z.png", "b/x.jpg", "b/y.PNG", "b/deep/0.png", "c/1.png", "link/image.png"]


def test_folder_test_images_are_resized_and_cropped_as_by_pil(tmp_path):
    write_folder(tmp_path)
    data = load("folder", tmp_path, resize=16)
    images, labels = everything(data.test)
    assert data.class_names == ["ant", "bee", "cat"] and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    files = [tmp_path / "val" / name / f"{i}.png" for name in data.class_names for i in range(2)]
    for file, out in zip(files, pixels(images, "folder"), strict=True):
        with Image.open(file) as image:
            width, height = image.size  # 40 x 30 or 33; the short side becomes 16 * 256 / 224
            small = np.array(image.resize((int(18 * width / height), 18), Image.Resampling.BILINEAR)).astype(np.float32)
        left = round((small.shape[1] - 16) / 2)
        assert np.abs(out.permute(1, 2, 0).numpy() - small[1:17, left : left + 16]).max() < 1e-3


def modes(folder):
    """Files of every kind of pixel, all of the colour (200, 100, 50) or its nearest grey -> expected colours by name."""
    colour, grey = (200, 100, 50), (100, 100, 100)
    Image.new("L", (20, 20), 100).save(folder / "grey.png")
    Image.new("L", (20, 20), 100).save(folder / "grey.jpg")
    Image.new("LA", (20, 20), (100, 30)).save(folder / "grey_alpha.png")
    Image.new("RGBA", (20, 20), (*colour, 30)).save(folder / "rgba.png")
    Image.new("RGB", (20, 20), colour).quantize(4).save(folder / "palette.png")
    Image.new("RGB", (20, 20), colour).save(folder / "rgb.bmp")
    Image.new("CMYK", (20, 20), (55, 155, 205, 0)).save(folder / "cmyk.JPEG", quality=100)
    Image.fromarray(np.full((20, 20), 100 * 256 + 9, np.uint16)).save(folder / "grey16.png")
    Image.new("1", (20, 20), 1).save(folder / "one.png")
    return {
        path: (255, 255, 255) if path == "one.png" else grey if path.startswith("grey") else colour
        for path in sorted(file.name for file in folder.iterdir())
    }


def test_kinds_of_image_files(tmp_path):
    write_folder(tmp_path, classes=("a", "b"), val=0)
    expected = modes(tmp_path / "val" / "b")
    (tmp_path / "val" / "a").rmdir()
    (tmp_path / "val" / "b" / "notes.txt").write_text("not an image")
    images, labels = everything(load("folder", tmp_path, resize=8).test)
    assert len(expected) == 9 and labels.tolist() == [1] * 9
    for (name, colour), out in zip(expected.items(), pixels(images, "folder"), strict=True):
        assert (out - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3, name


def test_images_that_cannot_be_right_are_refused_before_training(tmp_path):
    write_folder(tmp_path, classes=("a", "b"), train=2)
    image, val = Image.fromarray(random_images(1)[0].transpose(1, 2, 0)), tmp_path / "val" / "b"
    image.save(tmp_path / "whole.jpg")
    image.save(tmp_path / "whole.png")
    image.save(tmp_path / "whole.webp")
    whole = {suffix: (tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("jpg", "png", "webp")}

    def check(name, write, says):
        file = val / name
        write(file)
        message = fails_to_load(tmp_path)
        assert str(file) in message and says in message, message
        file.unlink()

    for suffix, raw in whole.items():
        check(f"half.{suffix}", lambda file, raw=raw: file.write_bytes(raw[: len(raw) // 2]), "cannot be read as an image")
    check("long.tif", Image.fromarray(np.full((8, 8), 70000, np.int32)).save, "mode I")
    check("real.tif", Image.fromarray(np.full((8, 8), 0.5, np.float32)).save, "mode F")
    check("program.png", lambda file: image.save(file, format="EPS"), "its content is none of")
    check("pipe.png", os.mkfifo, "not a regular file")
    check("gone.png", lambda file: file.symlink_to("nowhere.png"), "No such file")
    check("folder", lambda file: file.symlink_to(tmp_path / "val"), "Too many levels of symbolic links")
    load("folder", tmp_path)
    image.quantize().save(val / "still.gif")
    image.save(val / "photo.jfif", format="JPEG")
    # Bytes that a camera appends are no reason to refuse an image.
    (val / "appended.jpg").write_bytes(whole["jpg"] + b"more")
    assert load("folder", tmp_path).test.num_samples == 4 + 3


def fails_to_load(path) -> str:
    with pytest.raises(DataError) as caught:
        load("folder", path)
    return str(caught.value)


HIDDEN = (".ipynb_checkpoints", "__MACOSX", ".thumbnails", "@eaDir", "$RECYCLE.BIN")


def test_hidden_and_system_entries_are_skipped_at_every_depth(tmp_path, capsys):
    write_folder(tmp_path, classes=("a", "b"))
    data = load("folder", tmp_path, resize=8)
    assert capsys.readouterr().err == ""
    for place in (tmp_path / "train", tmp_path / "train" / "a", tmp_path / "val" / "b"):
        for name in HIDDEN:
            shutil.copytree(tmp_path / "val" / "a", place / name)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "train" / "b" / name).write_bytes(b"no image")
    again = load("folder", tmp_path, resize=8)
    assert again.class_names == ["a", "b"] and again.train.num_samples == 10 and again.test.num_samples == 4
    assert everything(again.test)[0].equal(everything(data.test)[0])
    lines = capsys.readouterr().err.replace(f"warning: {tmp_path}", "").splitlines()
    assert [line.partition("hidden")[0] for line in lines] == ["/train: 14 ", "/val: 5 "]
    words = f"--dataset folder --data_path {tmp_path}".split()
    assert parse_options(PROGRAMS["vit_main.py"], "", words)[0].model.num_classes == 2


def warnings_of(path, capsys) -> list[str]:
    load("folder", path, resize=8)
    return capsys.readouterr().err.replace(str(path), "").splitlines()


def test_images_that_are_left_out_and_classes_that_are_not_tested_are_named(tmp_path, capsys):
    write_folder(tmp_path, classes=("a", "b", "c"))
    shutil.rmtree(tmp_path / "val" / "b")
    for name in ("a/1.heic", "a/2.HEIC", "c/deep/3.avif", "notes.txt", "4.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"")
    assert warnings_of(tmp_path, capsys) == [
        "warning: /train: left out, in no class folder: 1 image",
        "warning: /train: images in formats that are not read are left out: 1 of .avif, 2 of .heic",
        "warning: /val: 1 of 3 classes have no images and are not tested: b",
    ]


def test_training_images_in_val_are_named(tmp_path, capsys):
    write_folder(tmp_path / "0", classes=("a", "b"))
    assert warnings_of(tmp_path / "0", capsys) == []
    for number in "1234":
        shutil.copytree(tmp_path / "0" / "train", tmp_path / number / "train")
    (tmp_path / "1" / "val").symlink_to("train")
    (tmp_path / "2" / "val").mkdir()
    for name in ("a", "b"):
        (tmp_path / "2" / "val" / name).symlink_to(tmp_path / "2" / "train" / name)
    linked = "warning: /val: 10 of 10 images are files of /train too: tests are on training images"
    for number in "12":
        assert warnings_of(tmp_path / number, capsys) == [linked]
    shutil.copytree(tmp_path / "0" / "val", tmp_path / "3" / "val")
    (tmp_path / "3" / "val" / "b" / "more.png").hardlink_to(tmp_path / "3" / "train" / "a" / "3.png")
    assert warnings_of(tmp_path / "3", capsys) == [linked.replace("10 of 10", "1 of 5")]
    shutil.copytree(tmp_path / "4" / "train", tmp_path / "4" / "val")
    assert "/val/a/0.png: is a copy of /train/a/0.png" in warnings_of(tmp_path / "4", capsys)[0]


def test_other_images_of_equal_names_and_sizes_are_no_copies(tmp_path, capsys):
    write_folder(tmp_path, train=3, val=3, suffix="bmp")
    assert warnings_of(tmp_path, capsys) == []
