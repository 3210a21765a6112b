"""Runs note their data, and compare them wherever weights meet data again."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import allconvnet_main
import predict
import visualize
from runs.fingerprint import compare, make_fingerprint
from tests.helpers.data import write_folder

LINE = "--layer Conv2d --channels 4 --dataset folder --resize 8 --batch_size 4 --num_workers 0 --device cpu"
pytestmark = pytest.mark.usefixtures("quick_results")


@pytest.fixture
def trained(tmp_path, capsys):
    """A run of one epoch on three classes, the words that repeat it, and its data."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_folder(data, train=3)
    words = [*LINE.split(), "--data_path", str(data), "--output_dir", str(run)]
    assert allconvnet_main.main([*words, "--num_epochs", "1"]) == 0
    capsys.readouterr()
    return data, run, words


def refused(words, capsys, main=allconvnet_main.main) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1, error
    assert "damaged" not in error
    return error


def warned(words, capsys) -> str:
    capsys.readouterr()
    assert allconvnet_main.main(words) == 0
    return capsys.readouterr().err


def rename(data, before, after):
    for part in ("train", "val"):
        (data / part / before).rename(data / part / after)


def add_image(data, name="train/ant/more.png"):
    (data / name).parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(data / name)


def test_a_run_notes_its_data(trained):
    _, run, _ = trained
    noted = json.loads((run / "summary.json").read_text())["data"]
    assert noted["class_names"] == ["ant", "bee", "cat"] and noted["images"] == {"train": [3, 3, 3], "test": [2, 2, 2]}
    assert noted["files"].keys() == {"train", "test"} and len(set(noted["files"].values())) == 2
    for name in ("last.pt", "best.pt"):
        assert torch.load(run / name, weights_only=True)["data"] == noted


def test_a_renamed_class_is_noticed(trained, tmp_path, capsys):
    data, run, words = trained
    test, again = [*words, "--test_only"], [*words, "--resume", "--num_epochs", "2"]
    assert warned(test, capsys) == ""
    rename(data, "ant", "wasp")
    assert "trained on class 0 named ant, here bee; give the class folders" in refused(test, capsys)
    assert "--override" in refused(test, capsys)
    assert "class 0 named ant, here bee" in warned([*test, "--override"], capsys)
    assert "class 0 named ant, here bee; give the data back" in refused(again, capsys)
    assert "--override" not in refused(again, capsys)
    start = [*words[:-1], str(tmp_path / "new"), "--num_epochs", "1", "--checkpoint", str(run / "best.pt")]
    assert "its head is of other classes (class 0 named ant, here bee)" in warned(start, capsys)
    add_image(data, "only.png")
    picture = ["--run", str(run), str(data / "only.png"), "--output", str(tmp_path / "table.csv")]
    assert predict.main(picture) == 0  # by the names that the run noted
    assert "class 0 named ant, here bee" in refused(["neighbors", str(run), "--images", "2"], capsys, visualize.main)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"class_names": ["x", "y", "z"]}))
    assert "class 0 named ant, here x" in refused([*picture, "--overwrite"], capsys, predict.main)
    rename(data, "wasp", "ant")
    (data / "only.png").unlink()
    assert warned(again, capsys) == ""


def test_a_class_that_is_added_or_removed_is_noticed(trained, capsys):
    data, _, words = trained
    add_image(data, "train/dog/1.png")
    assert "3 classes, here 4 (with dog)" in refused([*words, "--resume", "--num_epochs", "2"], capsys)
    assert "trained on 3 classes, and --data_path" in refused([*words, "--test_only"], capsys)
    for part in ("train/dog", "train/cat", "val/cat"):
        shutil.rmtree(data / part)
    assert "3 classes, here 2 (without cat)" in refused([*words, "--resume", "--num_epochs", "2"], capsys)


def test_images_that_are_added_or_changed_are_noticed(trained, capsys):
    data, _, words = trained
    again = [*words, "--resume", "--num_epochs", "2"]
    add_image(data)
    error = refused(again, capsys)
    assert "9 train images, here 10 (first difference: class ant, 3 and 4)" in error and "--override" in error
    assert "going on with those that are there" in warned([*again, "--override"], capsys)
    add_image(data, "train/bee/1.png")
    assert "train images of other names or sizes; going on" in warned([*again[:-1], "3"], capsys)
    assert warned([*words, "--test_only"], capsys) == ""
    add_image(data, "val/bee/1.png")
    assert "test images of other names or sizes" in warned([*words, "--test_only"], capsys)


def test_a_checkpoint_without_a_fingerprint_loads_with_one_line(trained, capsys):
    data, run, words = trained
    for name in ("last.pt", "best.pt"):
        state = torch.load(run / name, weights_only=True)
        del state["data"]
        torch.save(state, run / name)
    assert warned([*words, "--test_only"], capsys).count("does not say which classes") == 1
    add_image(data, "train/dog/1.png")
    assert "of another architecture or number of classes" in refused([*words, "--resume", "--num_epochs", "2"], capsys)
    shutil.rmtree(data / "train" / "dog")
    error = warned([*words, "--resume", "--num_epochs", "2"], capsys)
    assert error.count("\n") == 1 and "does not say what it was trained on" in error


def test_arrays_are_compared_by_classes_and_counts():
    one = make_fingerprint(["a", "b"], {"train": [2, 3], "test": [1, 1]}, {})
    assert compare(one, one) is None and compare(None, one) is None
    other = make_fingerprint(["a", "b"], {"train": [2, 4]}, {})
    assert compare(one, other).of_numbers and compare(one, other, ("test",)) is None
    assert compare(one, make_fingerprint(["b", "a"], {}, {})).of_classes
