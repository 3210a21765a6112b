"""Generated tasks: an exact solver reads the pixels of each, and what must not tell the classes apart does not."""

import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vit_main
from options.data import TASKS
from options.vit import ViTConfig
from readers import tasks
from readers.tasks import generate
from tests.helpers.data import everything, load
from vit import ViT

NEED_MIXING = [task for task in TASKS if task not in ("find", "locate")]
HUES = np.array([(0.99, 0.26, 0.26), (0.5, 0.92, 0.08), (0.01, 0.74, 0.74), (0.5, 0.08, 0.92)])  # red, green, cyan, violet
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))


class Cell(NamedTuple):
    marked: bool
    filled: bool
    color: int  # of HUES
    pattern: int  # its 16 pixels as bits


def read_images(images):
    """Cells of images (B, 3, 4 S, 4 S), read from the pixels: for each image a dict by place (row, column)."""
    size = images.shape[-1] // 4
    blocks = images.reshape(-1, 3, size, 4, size, 4).transpose(0, 2, 4, 1, 3, 5) / 255  # (B, S, S, 3, 4, 4)
    marked = blocks.min(axis=(3, 4, 5)) > 0.35
    ink = (blocks - 0.4 * marked[..., None, None, None]) / 0.6
    bits = (ink.mean(axis=3) > 0.25).reshape(*marked.shape, 16)
    color = np.abs(ink.max(axis=(4, 5))[..., None, :] - HUES).sum(axis=-1).argmin(axis=-1)
    arrays = [array.tolist() for array in (marked, bits.any(axis=-1), color, bits @ (1 << np.arange(16)))]
    places = list(itertools.product(range(size), repeat=2))
    return [
        {(row, column): Cell(*(array[n][row][column] for array in arrays)) for row, column in places}
        for n in range(len(images))
    ]


def solve(task, cells):
    size = max(cells)[0] + 1
    marks = [place for place, cell in cells.items() if cell.marked]
    if task == "duplicate":
        patterns = [cell.pattern for cell in cells.values() if cell.filled and cell.color == 0]
        return int(len(set(patterns)) < len(patterns))
    row, column = marks[0]
    if task == "joined":
        reached, todo = set(), marks[:1]
        while todo:
            row, column = place = todo.pop()
            reached.add(place)
            near = [(row + down, column + right) for down, right in STEPS]
            todo += [place for place in near if place in cells and cells[place].filled and place not in reached]
        return int(marks[1] in reached)
    same = [cell for cell in cells.values() if cell.pattern == cells[marks[0]].pattern and cell.filled and not cell.marked]
    if task == "count":
        return len(same)
    if task == "locate":
        return row * 3 // size * 3 + column * 3 // size
    if task == "recall":
        assert len(same) == 1
    asked = {"find": (row, column), "beside": (row, column + 1), "opposite": (size - 1 - row, size - 1 - column)}
    return cells[asked[task]].color if task in asked else same[0].color


def guess(task, cells):
    """The likeliest class for a solver that sees every cell, but not how the marked one and its partner belong together."""
    others = [cell for cell in cells.values() if cell.filled and not cell.marked]
    if task in ("beside", "opposite", "recall"):
        size = max(cells)[0] + 1
        allowed = {"beside": lambda place: place[1] > 0, "opposite": lambda place: {0, size - 1} & set(place)}
        could = [
            cell.color for place, cell in cells.items() if not cell.marked and allowed.get(task, lambda place: True)(place)
        ]
        return max(range(4), key=could.count)
    if task == "count":  # the length of a run
        patterns = [cell.pattern for cell in cells.values()]
        counts = [patterns.count(pattern) - 1 for pattern in sorted(set(patterns))]
        return max(counts, key=lambda count: (counts.count(count), count))
    if task == "duplicate":
        return int(sum(cell.color == 0 for cell in others) > 3)
    (row, column), (other_row, other_column) = (place for place, cell in cells.items() if cell.marked)
    return int(abs(row - other_row) + abs(column - other_column) + len(others) / 36 < 4.5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part, size, symbols", [("train", 6, None), ("test", 6, None), ("train", 5, 15), ("test", 9, 6)])
def test_solver_is_right_on_every_image(task, part, size, symbols):
    images, labels = generate(task, 1, part, np.arange(50), size, symbols)
    assert images.shape == (50, 3, 4 * size, 4 * size) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert [solve(task, cells) for cells in read_images(images)] == labels.tolist()


@pytest.mark.parametrize("task", TASKS)
def test_cells(task):
    """Test images are full; training images hold any number of cells, and few as often as many."""
    marks = {"joined": 2, "duplicate": 0}.get(task, 1)
    for part in ("train", "test"):
        scenes = [cells.values() for cells in read_images(generate(task, 0, part, np.arange(200)).data)]
        assert all(sum(cell.marked for cell in cells) == marks for cells in scenes)
        filled = np.array([sum(cell.filled for cell in cells) for cells in scenes])
        if task != "joined" and part == "test":
            assert (filled == 36).all()
        elif task != "joined":  # log-uniform: half of the images are below the geometric mean of the bounds
            assert 0.25 < (filled < (37 * filled.min()) ** 0.5).mean() < 0.65 and filled.max() > 30


@pytest.mark.parametrize("task", TASKS)
def test_classes_are_balanced(task):
    for part in ("train", "test"):
        counts = np.bincount(generate(task, 0, part, np.arange(1000)).labels)
        assert len(counts) == TASKS[task] and abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


@pytest.mark.parametrize("task", NEED_MIXING)
def test_nothing_but_the_partner_tells_the_class(task):
    """Guesses from all cells, and linear models of pixels and of contents by place, are near chance on full images."""
    images, labels = generate(task, 0, "test", np.arange(1200))
    scenes, chance = read_images(images), 1 / TASKS[task]
    assert abs(np.mean([guess(task, cells) == label for cells, label in zip(scenes, labels, strict=True)]) - chance) < 0.05
    pixels = images.reshape(len(images), -1) / 255
    histogram = np.zeros((len(images), 600))
    kinds = {}
    for row, cells in enumerate(scenes):
        for place, cell in cells.items():
            for kind in (cell, (place, cell.filled, cell.marked)):
                histogram[row, kinds.setdefault(kind, len(kinds))] += 1
    for inputs in (pixels, histogram):
        seen, unseen = inputs[:600] - inputs[:600].mean(axis=0), inputs[600:] - inputs[:600].mean(axis=0)
        weights = seen.T @ np.linalg.solve(seen @ seen.T + 10 * np.eye(600), np.eye(TASKS[task])[labels[:600]])
        assert abs(((unseen @ weights).argmax(axis=1) == labels[600:]).mean() - chance) < 0.08  # 4 deviations


def test_no_mixing_stays_at_chance():
    """A short training without mixing learns `locate`, and none of the tasks that need a partner."""
    accuracy = {}
    for task in ("locate", *NEED_MIXING):
        torch.manual_seed(0)
        size = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 1, "d_model": 32, "d_mlp": 64}
        options = {"pool": "mean", "dropout": 0.0, "final_norm": True, "pos_embedding": "learned"}
        model = ViT(ViTConfig(layer="Pointwise", num_classes=TASKS[task], **size, **options))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        images, labels = map(torch.from_numpy, generate(task, 0, "train", np.arange(1600), 4))
        for part, targets in zip((images / 64 - 0.6).split(32), labels.split(32), strict=True):
            F.cross_entropy(model(part), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        images, labels = map(torch.from_numpy, generate(task, 0, "test", np.arange(500), 4))
        with torch.no_grad():
            accuracy[task] = (model(images / 64 - 0.6).argmax(1) == labels).float().mean().item()
    assert accuracy.pop("locate") > 0.25
    assert all(abs(value - 1 / TASKS[task]) < 0.09 for task, value in accuracy.items()), accuracy


@pytest.mark.parametrize("task", TASKS)
def test_images_are_functions_of_seed_part_and_index(task):
    whole, labels = generate(task, 3, "train", np.arange(60))
    some = np.array([7, 40, 41, 59])
    again, same_labels = generate(task, 3, "train", some)
    assert (again == whole[some]).all() and (same_labels == labels[some]).all()
    assert (generate(task, 4, "train", some).data != again).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("task", TASKS)
def test_parts_share_no_image(task):
    parts = [{image.tobytes() for image in generate(task, 0, part, np.arange(400)).data} for part in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) and len(parts[1]) == len(parts[2]) == 400


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tasks, "SIZES", {"train": 96, "val": 40, "test": 24})


@pytest.mark.parametrize("task", TASKS)
def test_data_set(task, small, tmp_path):
    data = load(f"task_{task}", tmp_path, test_limit=20)
    assert [part.num_samples for part in (data.train, data.val, data.test)] == [96, 20, 20]
    assert len(data.class_names) == len(set(data.class_names)) == TASKS[task]
    images, _ = everything(data.test)
    assert images.shape[1:] == (3, 24, 24) and abs(images.mean()) < 0.4 and abs(images.std() - 1) < 0.2
    assert data.fingerprint["files"] == load(f"task_{task}", tmp_path).fingerprint["files"]
    other = load(f"task_{task}", tmp_path, task_symbols=9, resize=24).fingerprint["files"]
    assert all(other[part] != value for part, value in data.fingerprint["files"].items())
    assert load(f"task_{task}", tmp_path, test_only=True).val is None


def test_run_from_the_command_line(small, quick_results, tmp_path, capsys):
    model = "--layer NeighborhoodAttention --kernel_size 3 --pool mean --num_layers 1 --num_heads 1 --d_model 8 --d_mlp 8"
    folder = ["--output_dir", str(tmp_path / "run")]
    words = [
        *"--dataset task_recall --num_epochs 1 --batch_size 32 --warmup_steps 2 --device cpu".split(),
        *model.split(),
        *folder,
    ]
    assert vit_main.main(words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["image_shape"] == [3, 24, 24] and summary["class_names"] == ["red", "green", "cyan", "violet"]
    assert summary["best_epoch_chosen_on"] == "validation set" and set(summary["data"]["files"]) == {"train", "val", "test"}
    assert vit_main.main([*folder, "--test_only", "--task_size", "9"]) == 0  # the same model on larger images
    results = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert results["options"]["resize"] == 36 and results["options"]["patch_size"] == 4
