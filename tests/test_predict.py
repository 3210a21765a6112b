"""predict.py, and what --test_only says of the classes: the same as the model's own logits on the same images."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import visualize
import vit_main
from dataset import load_data, read_image
from experiments.trained import load_model, read_options
from options.data import DataConfig
from runs.metrics import Predictions, by_class

LINE = (
    "--dataset digits --num_epochs 1 --train_limit 40 --test_limit 20 --batch_size 20 --device cpu --patch_size 4 --resize 8 "
)
LINE += "--num_layers 1 --num_heads 1 --d_model 8 --d_mlp 8 --lr 0.01"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained and evaluated run, and its first test images as files in a folder beside it."""
    folder = tmp_path_factory.mktemp("predict")
    words = [*LINE.split(), "--output_dir", str(folder / "run")]
    assert vit_main.main(words) == 0 and vit_main.main([*words, "--test_only"]) == 0
    data = load_data(
        DataConfig(dataset="digits", resize=8, num_workers=0, test_limit=20),
        batch_size=20,
        seed=0,
        device=torch.device("cpu"),
        test_only=True,
    )
    images, labels = next(iter(data.test.epoch(0)))
    (folder / "images" / "more").mkdir(parents=True)
    for number, image in enumerate(images):
        pixels = (image * 0.3760 + 0.3054).mul(255).round().byte().squeeze(0).numpy()
        Image.fromarray(pixels).save(folder / "images" / ("more" if number > 9 else "") / f"{number:02}.png")
    (folder / "images" / "notes.txt").write_text("no image")
    return folder, images, labels


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_the_softmax_of_the_model(run, tmp_path, capsys):
    folder, images, _ = run
    output = tmp_path / "out.csv"
    words = ["--run", str(folder / "run"), str(folder / "images"), "--output", str(output), "--top", "3", "--batch_size", "7"]
    assert predict.main(words) == 0
    assert str(output) in capsys.readouterr().out
    model = load_model(folder / "run", read_options(folder / "run"))
    shares, classes = model(images).softmax(1).topk(3)
    rows = table(output)
    assert [row["file"][-6:] for row in rows] == [f"{number:02}.png" for number in range(20)]
    for row, of_image, numbers in zip(rows, shares.tolist(), classes.tolist(), strict=True):
        for rank in range(3):
            assert row[f"class_{rank + 1}"] == str(numbers[rank])  # the digits are called by themselves
            assert float(row[f"probability_{rank + 1}"]) == pytest.approx(of_image[rank], abs=1e-5)
        assert "class_4" not in row
    assert Image.open(output.with_suffix(".png")).size[0] > 400
    with pytest.raises(SystemExit):
        predict.main(words)
    assert "--overwrite" in capsys.readouterr().err
    assert predict.main([*words, "--overwrite"]) == 0


def test_the_contact_sheet_shows_every_image_with_its_classes(run, tmp_path):
    files = predict.list_images([run[0] / "images"])
    rows, pictures = predict.predict(run[0] / "run", files, "cpu", 7, 2)
    figure = predict.draw_sheet(rows, pictures)
    figure.savefig(tmp_path / "sheet.png", dpi=figure.dpi)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(float)
    assert len(figure.axes) == 24 and len(pictures) == 20
    centers = (np.arange(8) + 0.5) / 8
    tiles = []
    for axis, row, picture in zip(figure.axes, rows, pictures, strict=False):
        left, bottom, right, top = axis.get_window_extent().extents
        below = (len(sheet) - top + centers * (top - bottom)).astype(int)
        tiles.append(sheet[np.ix_(below, (left + centers * (right - left)).astype(int))])
        assert np.abs(tiles[-1] - 255 * picture).max() <= 2
        assert axis.get_title().split()[0] == row["class_1"] and axis.get_title().count("%") == 2
    assert len({tile.tobytes() for tile in tiles}) == 20 and min(np.ptp(tile) for tile in tiles) > 100
    assert not any(axis.axison for axis in figure.axes[20:])


def test_an_image_of_another_shape_is_cut_to_its_middle(tmp_path):
    """And a colored one becomes grey."""
    picture = Image.new("RGB", (40, 16), (0, 0, 0))
    picture.paste((255, 255, 255), (12, 0, 28, 16))
    picture.save(tmp_path / "wide.png")
    config = DataConfig(dataset="digits", resize=8)
    middle = read_image(tmp_path / "wide.png", config)
    assert middle.shape == (1, 8, 8)
    # Resizing blends the border.
    torch.testing.assert_close(middle[:, :, 1:-1], torch.full((1, 8, 6), (1 - 0.3054) / 0.3760))
    assert read_image(tmp_path / "wide.png", DataConfig(dataset="cifar10", resize=(4, 12))).shape == (3, 4, 12)
    assert read_image(tmp_path / "wide.png", DataConfig(dataset="folder", resize=32)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "{run}", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--run", "{run}", "{empty}"], "no image files in this folder"),
        (["--run", "{empty}", "{images}"], "holds no run"),
        (["--run", "{run}", "{images}/notes.txt"], "cannot be read as an image"),
        (["--run", "{run}", "{images}", "--top", "0"], "--top: '0' is not a whole number of at least 1"),
        (["--run", "{run}", "{images}", "--output", "x.txt"], "not a .csv file"),
        (["--run", "{run}", "{images}", "--device", "cuda"], "--device cuda"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, said):
    if said == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    places = {"run": run[0] / "run", "images": run[0] / "images", "empty": tmp_path / "empty"}
    words = [word.format(**places) for word in words]
    if "--output" not in words:
        words += ["--output", str(tmp_path / "out.csv")]
    with pytest.raises(SystemExit) as end:
        predict.main(words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and said in err


def test_test_only_counts_every_class(run, tmp_path):
    folder, images, labels = run
    results = json.loads((folder / "run" / "test_results.json").read_text())
    predicted = load_model(folder / "run", read_options(folder / "run"))(images).argmax(1).tolist()
    counts = [[0] * 10 for _ in range(10)]
    for label, other in zip(labels.tolist(), predicted, strict=True):
        counts[label][other] += 1
    assert results["confusion"] == counts
    for name, row in zip("0123456789", counts, strict=True):
        right = 100 * row[int(name)] / sum(row)
        assert results["classes"][name] == {"images": sum(row), "top1": pytest.approx(right)}
    assert sum(row[n] for n, row in enumerate(counts)) / 0.2 == pytest.approx(results["top1"])
    training, evaluation = (np.load(folder / "run" / f"test_predictions{end}.npz") for end in ("", "-1"))
    assert evaluation["labels"].tolist() == training["labels"].tolist() == labels.tolist()
    assert evaluation["predicted"].tolist() == training["best"].tolist() == predicted
    assert visualize.main(["confusion", str(folder / "run"), "--output", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_predictions_of_the_last_and_the_best_epoch_outlive_a_resume(tmp_path):
    words = [*LINE.split(), "--output_dir", str(tmp_path / "run"), "--lr", "0.05", "--scheduler", "step", "--lr_step", "1"]
    words += ["--lr_gamma", "0.0", "--num_epochs"]
    assert vit_main.main([*words, "1"]) == 0
    first = dict(np.load(tmp_path / "run" / "test_predictions.npz"))
    assert first["last"].tolist() == first["best"].tolist()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["predictions"]["best"] = state["predictions"]["best"] + 1  # recognizable
    torch.save(state, tmp_path / "run" / "last.pt")
    assert vit_main.main([*words, "2", "--resume"]) == 0  # with a learning rate of 0: no better epoch
    second = dict(np.load(tmp_path / "run" / "test_predictions.npz"))
    assert second["last"].tolist() == first["last"].tolist() == (second["best"] - 1).tolist()


def test_confusion_is_asked_for_too_early(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        visualize.main(["confusion", str(tmp_path)])
    assert "--test_only first" in capsys.readouterr().err


def test_a_class_without_images_has_no_accuracy():
    batches = SimpleNamespace(num_samples=4, recipe=SimpleNamespace(batch_size=3))
    predictions = Predictions(batches, torch.device("cpu"))
    predictions.add(1, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1]))
    predictions.add(0, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([1, 1, 0]))
    assert predictions.table.tolist() == [[1, 1, 0, 1], [1, 0, 1, 1]]
    confusion = predictions.confusion(3)
    assert confusion.tolist() == [[0, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert by_class(confusion, ["a", "b", "c"]) == {
        "a": {"images": 1, "top1": 0.0},
        "b": {"images": 3, "top1": pytest.approx(200 / 3)},
        "c": {"images": 0, "top1": None},
    }


def test_hidden_files_are_not_predicted(tmp_path, capsys):
    for name in ("a.png", "._a.png", "b/c.png", ".thumbnails/a.png", "b/__MACOSX/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in predict.list_images([tmp_path])] == ["a.png", "c.png"]
    assert capsys.readouterr().err == "warning: 3 images in hidden or system entries are skipped\n"
    assert len(predict.list_images([tmp_path / "._a.png"])) == 1  # named by the user
