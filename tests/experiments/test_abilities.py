"""The map of abilities, from folders of runs as a sweep leaves them."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

import visualize
from experiments.abilities import Result, draw_abilities, draw_tasks, mean_solved, read_results
from options.data import TASKS
from readers.tasks import class_names, generate


def finish(sweep, layer, task, seed, top1, *, finished=True):
    """A run whose top-1 on validation and test images was `top1`, by epoch."""
    folder = sweep / f"{task}_{layer}_{seed}"
    folder.mkdir(parents=True)
    best = {"test_top1": max(top1), "test_top5": 100.0}
    costs = ("parameters", "flops_per_image", "average_epoch_seconds", "latency_ms_per_image", "peak_memory_bytes")
    summary = {
        "finished": finished,
        "epochs": len(top1),
        "final": best,
        "best": best,
        "train_images": 90,
        **dict.fromkeys(costs, 1.0),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"dataset": f"task_{task}", "layer": layer, "seed": seed, "batch_size": 20})
    )
    rows = "".join(f"{epoch},1,1,1,1,{value}\n" for epoch, value in enumerate(top1, 1))
    (folder / "metrics.csv").write_text("epoch,train_loss,train_top1,test_loss,test_top1,val_top1\n" + rows)


@pytest.fixture
def sweep(tmp_path):
    finish(tmp_path, "Pointwise", "find", 0, [50, 100])
    finish(tmp_path, "Pointwise", "recall", 0, [20, 25])
    finish(tmp_path, "Attention", "recall", 0, [25, 95, 97])
    finish(tmp_path, "Attention", "recall", 1, [25, 25, 62.5])
    finish(tmp_path, "Attention", "joined", 0, [90], finished=False)
    return tmp_path


def test_chance_is_0_and_steps_are_counted_to_the_first_epoch_above_90_percent(sweep):
    results = read_results(sweep)
    assert results == {
        "Attention": {"recall": {0: Result(97, pytest.approx(72 / 75), 10), 1: Result(62.5, 0.5, None)}},
        "Pointwise": {"find": {0: Result(100, 1, 10)}, "recall": {0: Result(25, 0, None)}},
    }
    assert mean_solved(results["Attention"]) == pytest.approx((72 / 75 + 0.5) / 2 / 8)


def test_the_map_shows_every_run(sweep):
    figure = draw_abilities(read_results(sweep))
    solved, steps = figure.axes
    assert [label.get_text() for label in solved.get_yticklabels()] == ["Pointwise", "Attention"]  # the best first
    assert [label.get_text() for label in solved.get_xticklabels()] == list(TASKS)
    columns = {(task, seed): 2 * number + seed for number, task in enumerate(TASKS) for seed in range(2)}
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in solved.texts}
    recall = columns["recall", 0]
    assert shown == {(0, 0): "100", (0, recall): "25", (1, recall): "97", (1, recall + 1): "62"}
    assert [text.get_text() for text in steps.texts] == ["0", "0"]  # hundreds of steps


def test_the_file(sweep, tmp_path, capsys):
    assert visualize.main(["abilities", str(sweep)]) == 0
    drawn = Image.open(sweep / "abilities.png")
    assert drawn.width > 600
    assert read_results(sweep / "abilities.csv") == read_results(sweep)
    assert visualize.main(["abilities", str(sweep / "abilities.csv"), "--output", str(tmp_path / "again.png")]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == drawn.tobytes()
    with pytest.raises(SystemExit):
        visualize.main(["abilities", str(tmp_path / "none")])
    assert "holds no finished run of a generated task" in capsys.readouterr().err


def test_pictures_of_the_tasks_show_their_classes():
    axes = np.array(draw_tasks(images=1).axes).reshape(len(TASKS), 2)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == list(TASKS)
    for task, (_, of_test) in zip(TASKS, axes, strict=True):
        image, label = (array[0] for array in generate(task, 0, "test", np.arange(1)))
        assert (of_test.images[0].get_array() == image.transpose(1, 2, 0)).all()
        assert of_test.get_title() == class_names(task)[label]
