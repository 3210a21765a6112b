"""Options of the data set."""

from pathlib import Path

import pytest
import yaml

from options.data import TASKS
from options.runs import PROGRAMS, parse_options
from tests.options.reference import assert_says, error_of, parse

pytestmark = pytest.mark.usefixtures("folder")


def test_sizes_follow_the_data_set():
    sizes = {"cifar10": 32, "cifar100": 32, "mnist": 28, "fashion_mnist": 28, "digits": 8}
    sizes |= dict.fromkeys(["imagenet", "imagenet100", "imagenette"], 224)
    classes = {"cifar100": 100, "imagenet": 1000, "imagenet100": 100}
    for name, size in sizes.items():
        model, data, _ = parse(f"--dataset {name}")
        assert data.resize == size and model.image_size == (size, size)
        assert model.in_channels == (1 if size in (28, 8) else 3)
        assert model.num_classes == classes.get(name, 10)
        assert parse(f"--dataset {name} --resize 48").model.image_size == (48, 48)


def test_classes_of_a_folder_are_counted(capsys):
    assert_says(error_of(parse, "--dataset folder --data_path pets", capsys=capsys), "data_path='pets'; train/; val/")
    Path("pets/train/cat").mkdir(parents=True)
    assert_says(error_of(parse, "--dataset folder --data_path pets", capsys=capsys), "data_path='pets'; train/; val/")
    Path("pets/val").mkdir()
    assert_says(error_of(parse, "--dataset folder --data_path pets", capsys=capsys), "data_path='pets'; 1; at least 2")
    Path("pets/train/notes.txt").touch()
    Path("pets/train/dog").mkdir()
    assert parse("--dataset folder --data_path pets").model.num_classes == 2


def test_a_cell_of_a_generated_task_is_a_patch():
    vit = PROGRAMS["vit_main.py"]
    for task, classes in TASKS.items():
        model, data, _ = parse(f"--dataset task_{task} --task_size 5")
        assert data.resize == 20 and (model.in_channels, model.num_classes) == (3, classes)
        model = parse_options(vit, "", ["--dataset", f"task_{task}"])[0].model
        assert (model.image_size, model.patch_size, model.num_classes) == ((24, 24), 4, classes)
    model = parse_options(vit, "", "--dataset task_find --resize 48 --patch_size 8".split())[0].model
    assert (model.image_size, model.patch_size) == ((48, 48), 8)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_config_of_a_run_keeps_no_size_of_another_task_size(name):
    options = parse_options(PROGRAMS[name], "", ["--dataset", "task_find"])[0].as_dict()
    Path("config.yaml").write_text(yaml.safe_dump(options))
    for words, size in ("", 24), ("--task_size 9", 36), ("--task_size 9 --resize 48", 48):
        assert parse_options(PROGRAMS[name], "", ["--config", "config.yaml", *words.split()])[0].data.resize == size
