import csv
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import allconvnet_main
import visualize
import vit_main
from dataset import load_data
from experiments.mixing import Mixing
from experiments.pictures import draw_attention, draw_lines, draw_neighbors
from experiments.trained import as_picture, load_run
from launch.mask import draw_mask
from mixers.local import local_mask
from mixers.selection import NeighborSelection
from options.data import DataConfig
from options.layers import LOCAL_MASKS
from options.neighbors import NeighborConfig
from runs.files import as_figure

COMMON = "--dataset digits --num_epochs 2 --train_limit 40 --test_limit 20 --batch_size 20 --device cpu --download False"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs, by name."""
    root = tmp_path_factory.mktemp("runs")
    vit = f"{COMMON} --resize 8 --patch_size 2 --num_layers 2 --num_heads 2 --d_model 8 --d_mlp 8 --K 4 --kernel_size 3"
    lines = {
        "convnn": (vit_main, f"{vit} --layer ConvNNAttention --seed 0"),
        "convnn-1": (vit_main, f"{vit} --layer ConvNNAttention --seed 1"),
        "gpsa": (vit_main, f"{vit} --layer GPSA --num_local_layers 1"),
        "mean": (vit_main, f"{vit} --pool mean"),
        "masked": (vit_main, f"{vit} --layer MaskedAttention --mask_type 2d_cardinal --expansion_step 2"),
        "vig": (vit_main, f"{vit} --layer ViG --dilation 3"),
        "conv": (vit_main, f"{vit} --layer Conv1dAttention"),
        "images": (allconvnet_main, f"{COMMON} --layer Conv2d/ConvNN --channels 4 6 --K 4 --padding 1 --shuffle_pattern NA"),
        "conv2d": (allconvnet_main, f"{COMMON} --layer Conv2d --channels 4"),
    }
    for name, (program, line) in lines.items():
        assert program.main([*shlex.split(line), "--output_dir", str(root / name)]) == 0
    return root


def drawn(*line):
    """The figure of a command line."""
    args = visualize.make_parser().parse_args([*map(str, line)])
    return visualize.DRAW[args.figure](args)


def test_the_file_holds_the_figure(runs, tmp_path):
    output = tmp_path / "a" / "figure.png"
    for line in (["masks", "--grid", 3, 4], ["attention", runs / "mean", "--images", 2]):
        assert visualize.main([*map(str, line), "--output", str(output)]) == 0
        assert output.read_bytes() == as_figure(drawn(*line))
        with Image.open(output) as picture:
            assert len(picture.convert("L").getcolors()) > 10


def test_texts_of_a_pdf_and_an_svg_are_texts(tmp_path):
    for name in ("masks.pdf", "masks.SVG"):
        assert visualize.main(["masks", "--grid", "2", "3", "--expansion_step", "1", "--output", str(tmp_path / name)]) == 0
    pdf = (tmp_path / "masks.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, which journals ask for
    texts = {node.text for node in ElementTree.parse(tmp_path / "masks.SVG").iter("{http://www.w3.org/2000/svg}text")}
    assert {"2d_cardinal", "expansion step 1", "6 patches"} <= texts


def test_curves_are_the_columns_of_the_table(runs):
    with (runs / "mean" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    for axis, key in zip(drawn("curves", runs / "mean").axes, ("loss", "top1"), strict=True):
        lines = {line.get_linestyle(): line for line in axis.lines if len(line.get_xdata())}
        assert set(lines) == {"-", ":"}
        for style, part in (("-", "test"), (":", "train")):
            assert list(lines[style].get_xdata()) == [1, 2]
            assert list(lines[style].get_ydata()) == [float(row[f"{part}_{key}"]) for row in table]


def lines_of_curves(folders):
    """(label, x, y) of the lines in the panel of accuracies, and its bands."""
    args = visualize.make_parser().parse_args(["curves", *map(str, folders)])
    axis = visualize.draw_curves(args).axes[1]
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}, axis.collections


def test_seeds_are_one_line_in_a_band(runs):
    lines, bands = lines_of_curves([runs / "convnn", runs / "convnn-1", runs / "mean"])
    assert list(lines) == ["ConvNNAttention, pool cls (2 seeds)", "Attention, pool mean"] and len(bands) == 2
    tables = [csv.DictReader((runs / name / "metrics.csv").open()) for name in ("convnn", "convnn-1")]
    seeds = [[float(row["test_top1"]) for row in table] for table in tables]
    mean = lines["ConvNNAttention, pool cls (2 seeds)"]
    assert list(mean.get_xdata()) == [1, 2]
    assert list(mean.get_ydata()) == pytest.approx([(a + b) / 2 for a, b in zip(*seeds, strict=True)])
    only, bands = lines_of_curves([runs / "mean"])
    assert list(only) == ["Attention"] and not bands


def test_the_folder_of_a_sweep_is_its_runs(runs, tmp_path):
    names = ["convnn", "convnn-1", "mean"]
    for name in names:
        (tmp_path / name).symlink_to(runs / name)
    (tmp_path / "summary.csv").write_text("layer\n")
    (tmp_path / "not_a_run").mkdir()
    lines, bands = lines_of_curves([tmp_path])
    expected, _ = lines_of_curves([runs / name for name in names])
    assert list(lines) == list(expected) and len(bands) == 2
    for label, line in lines.items():
        assert list(line.get_ydata()) == list(expected[label].get_ydata())


def test_a_run_with_a_mask_leaves_its_picture(runs):
    (mixer, *_) = (block.mixer for block in load_run(runs / "masked", 1, None).model.blocks)
    figure = draw_mask(mixer)
    whole, around = (axis.images[0].get_array() for axis in figure.axes)
    query = [[(y == 2) + (x == 2) for x in range(4)] for y in range(4)]  # the row and the column of the patch in the middle
    assert around.tolist() == [[min(one, 1) for one in row] for row in query]
    assert whole.shape == (17, 17) and whole[0].all() and whole[:, 0].all()  # the class token
    assert whole[11, 1:].tolist() == around.flatten().tolist()
    assert (runs / "masked" / "mask.png").read_bytes() == as_figure(figure)
    assert not list(runs.glob("[!m]*/mask.png"))


def test_attention_maps_are_those_of_the_patches(runs):
    for name in ("convnn", "gpsa", "mean"):
        args = visualize.make_parser().parse_args(["attention", str(runs / name), "--images", "3"])
        axes = draw_attention(args).axes
        model, images, labels, names = load_run(runs / name, 3, None)[3:]
        logits, matrices = model(images, output_attentions=True)
        assert len(axes) == 3 * 4  # image, two blocks, average
        for image in range(3):
            picture, first, second, average = axes[4 * image : 4 * image + 4]
            is_right = logits[image].argmax() == labels[image]
            assert picture.title.get_color() == ("tab:green" if is_right else "tab:red")
            assert names[labels[image]] in picture.title.get_text()
            maps = []
            for axis, matrix in zip((first, second), matrices, strict=True):
                heads = matrix[image].mean(0)
                row = heads[0, 1:] if len(heads) > 16 else heads.mean(0)  # GPSA has no class token at first
                maps.append(row.detach().view(4, 4))
                torch.testing.assert_close(torch.tensor(axis.images[0].get_array()), maps[-1])
            torch.testing.assert_close(torch.tensor(average.images[0].get_array()), sum(maps) / 2)


def test_neighbors_in_a_ring_of_padding(runs):
    """Each token and what it picks among 10 x 10, of which the inner 8 x 8 are the image."""
    figure = drawn("neighbors", runs / "images", "--images", 2, "--queries", "0.2,0.3", "1,1")
    model, images, _, _ = load_run(runs / "images", 2, None)[3:]
    found = []
    for block in model.layers:
        block[0].second.select.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(images)
    assert len(figure.axes) == 2 * len(found) == 4
    for number, axis in enumerate(figure.axes):
        image, layer = divmod(number, 2)
        stars = [line for line in axis.lines if line.get_marker() == "*"]
        assert [(float(s.get_xdata()[0]) * 8, float(s.get_ydata()[0]) * 8) for s in stars] == [(2.5, 1.5), (7.5, 7.5)]
        for color, query in (("C0", 1 * 8 + 2), ("C1", 7 * 8 + 7)):
            ends = [line.get_data() for line in axis.lines if line.get_marker() == "o" and line.get_color() == color]
            places = [(round(float(y[0]) * 8 + 0.5), round(float(x[0]) * 8 + 0.5)) for x, y in ends]
            assert [10 * row + column for row, column in places] == found[layer][image, query].tolist()


@pytest.mark.parametrize("head", [1, 2])
def test_neighbors_are_those_of_the_image_and_the_head(runs, head):
    """Lines end where the mixing matrix of that image and head is not zero."""
    line = ["neighbors", str(runs / "convnn"), "--images", "3", "--queries", "0.6,0.3", "--head", str(head)]
    figure = draw_neighbors(visualize.make_parser().parse_args(line))
    model, images, _, _ = load_run(runs / "convnn", 3, None)[3:]
    _, matrices = model(images, output_attentions=True)
    query = 1 + 2 * 4 + 1  # of the 4 x 4 patches after the class token
    for number, axis in enumerate(figure.axes):
        image, layer = divmod(number, 2)
        chosen = matrices[layer][image, head - 1, query].nonzero().flatten().tolist()
        expected = {((j - 1) % 4, (j - 1) // 4) for j in chosen if j > 0}
        ends = [line.get_data() for line in axis.lines if line.get_linestyle() == "-"]
        assert {(round(float(x[-1]) * 4 - 0.5), round(float(y[-1]) * 4 - 0.5)) for x, y in ends} == expected
        assert any(line.get_markersize() == 8 for line in axis.lines) == (0 in chosen)


def test_of_a_dilated_graph_every_nth_neighbor_is_drawn(runs):
    """Of 4 x 3 nearest the first, the fourth and so on: the ones that the maximum is taken over."""
    figure = drawn("neighbors", runs / "vig", "--images", 1, "--queries", "0.6,0.3")
    model, images, _, _ = load_run(runs / "vig", 1, None)[3:]
    found = []
    for block in model.blocks:
        block.mixer.graph.register_forward_hook(lambda module, inputs, output: found.append(inputs[1]))
    model(images)
    query = 2 * 4 + 1  # the index is of patches
    for axis, index in zip(figure.axes, found, strict=True):
        patches = [token for token in index[0, query].tolist() if token > 0]  # the class token is a ring
        ends = [line.get_data() for line in axis.lines if line.get_linestyle() == "-"]
        assert [(round(float(y[-1]) * 4 - 0.5), round(float(x[-1]) * 4 - 0.5)) for x, y in ends] == [
            divmod(token - 1, 4) for token in patches
        ]


@pytest.mark.parametrize(("class_tokens", "padding"), [(0, 0), (1, 0), (0, 2)])
def test_neighbors_are_drawn_where_they_are(class_tokens, padding):
    """Nearest by place: lines from the query end on the patches around it."""
    from matplotlib.figure import Figure

    rows, columns = 5, 8
    grid = rows + 2 * padding, columns + 2 * padding
    config = NeighborConfig(K=9, similarity_type="Loc")
    select = NeighborSelection(config, axes=2, self_first=False, padding=padding, class_tokens=class_tokens, grid=grid)
    tokens = torch.randn(1, class_tokens + grid[0] * grid[1], 3)
    index = select(tokens, tokens, grid)[0]
    layer = Mixing("", "", grid, padding, class_tokens, index[None, None], torch.ones(()), torch.ones(()))
    axis = Figure().subplots()
    draw_lines(axis, layer, index, (0.5, 0.2), "C0")
    ends = {
        tuple(round(float(value[-1]), 6) for value in line.get_data()) for line in axis.lines if line.get_marker() in ("o", "*")
    }
    row, column = int(0.5 * rows), int(0.2 * columns)
    around = {((column + dx + 0.5) / columns, (row + dy + 0.5) / rows) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
    around = {(round(x, 6), round(y, 6)) for x, y in around}
    assert ends == around or (class_tokens and len(ends - around) == 0 and len(ends) == 8)


@pytest.mark.parametrize(
    ("line", "grid", "patch", "steps"),
    [("--grid 4 7 --expansion_step 0 2", (4, 7), (2, 3), (0, 2)), ("--grid 1 5", (1, 5), (0, 2), (1, 2, 3))],
)
def test_masks(line, grid, patch, steps):
    figure = drawn("masks", *line.split())
    axes = iter(figure.axes)
    for name in LOCAL_MASKS:
        for step in steps:
            mask = local_mask(name, step, *grid)
            whole, around = next(axes), next(axes)
            row = mask[patch[0] * grid[1] + patch[1]]
            assert torch.equal(torch.tensor(whole.images[0].get_array()), mask)
            assert torch.equal(torch.tensor(around.images[0].get_array()), row.view(grid))
            assert around.get_title() == f"{int(row.sum())} patches"
            assert (around.lines[0].get_xdata()[0], around.lines[0].get_ydata()[0]) == (patch[1], patch[0])
    assert next(axes, None) is None


@pytest.mark.parametrize("more", ["", "--augment --auto_augment rand --random_erasing 1 --noise 0.2 --resize 12"])
def test_samples_are_the_first_training_images(more):
    axes = drawn("samples", "--images", 10, "--seed", 3, *more.split()).axes
    options = (
        {"resize": 12, "augment": True, "auto_augment": "rand", "random_erasing": 1.0, "noise": 0.2} if more else {"resize": 8}
    )
    config = DataConfig(dataset="digits", num_workers=0, **options)
    data = load_data(config, batch_size=10, seed=3, device=torch.device("cpu"))
    images, labels = next(iter(data.train.epoch(0)))
    assert len(axes) == 16 and not any(axis.images for axis in axes[10:])  # two rows of eight
    for axis, image, label in zip(axes, images, labels, strict=False):
        shown, expected = axis.images[0].get_array(), as_picture(image, DataConfig(dataset="digits"))
        torch.testing.assert_close(torch.tensor(shown), torch.tensor(expected))
        assert axis.get_title() == data.class_names[label]


def test_a_picture_is_the_image_before_it_was_normalized():
    config = DataConfig(dataset="digits", resize=8, num_workers=0)
    data = load_data(config, batch_size=3, seed=0, device=torch.device("cpu"), test_only=True)
    images, _ = next(iter(data.test.epoch(0)))
    raw = data.test._images[:3, 0].float() / 255
    for image, pixels in zip(images, raw, strict=True):
        torch.testing.assert_close(torch.tensor(as_picture(image, DataConfig(dataset="digits"))), pixels)


def test_default_places_of_figures(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for line in (
        ["masks"],
        ["samples"],
        ["curves", runs / "mean"],
        ["curves", runs / "mean", runs / "gpsa"],
        ["neighbors", runs / "convnn"],
    ):
        assert visualize.main([*map(str, line)]) == 0
    shown = capsys.readouterr().out.split()
    expected = [Path("Output/masks.png"), Path("Output/digits.png"), runs / "mean" / "curves.png", runs / "curves.png"]
    assert [Path(path) for path in shown] == [*expected, runs / "convnn" / "neighbors.png"]
    assert all(Path(path).exists() for path in shown)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("pictures", "invalid choice: 'pictures'"),
        ("curves nowhere", "nowhere holds no metrics.csv"),
        ("attention nowhere", "nowhere holds no run"),
        ("attention images", "of allconvnet_main.py"),
        ("attention conv", "layer=Conv1dAttention returns no mixing matrix"),
        ("neighbors mean", "layer=Attention searches no neighbors"),
        ("neighbors conv2d", "layer=Conv2d searches no neighbors"),
        ("neighbors convnn --queries 2,0", "'2,0' is not two numbers from 0 to 1"),
        ("neighbors convnn --queries 2", "'2' is not two numbers"),
        ("neighbors convnn --head 3", "--head 3: the layers have heads 1 to 2"),
        ("neighbors convnn --head 0", "'0' is not a whole number of at least 1"),
        ("masks --output masks.jpg", "--output masks.jpg is not a file of .png or .pdf or .svg"),
        ("attention nowhere --output x", "--output x is not a file of .png or .pdf or .svg"),
        ("attention mean --images 0", "'0' is not a whole number of at least 1"),
        ("attention mean --images 9999", "9999"),
        ("samples --dataset cifar10 --data_path nowhere", "nowhere"),
        ("samples --noise -1", "noise=-1.0"),
        ("samples --images 401", "'401' is more than 400"),
        ("masks --grid 1 \u00b2", "'\u00b2' is not a whole number of at least 1"),
        ("masks --output a\0.png", "--output: 'a\\x00.png'"),
        ("masks --output picture.png", "picture.png cannot be written (Is a directory)"),
        ("samples --resize 16385", "resize=16385"),
    ],
)
def test_errors_are_one_line(line, says, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    Path("picture.png").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as end:
        visualize.main(line.split(" "))
    text = capsys.readouterr().err
    assert end.value.code == 2 and says in text.splitlines()[-1] and "Traceback" not in text
    assert text.count("\n") == 1


def test_curves_of_unlike_runs_have_labels_that_leave_them_room(runs, tmp_path):
    """Runs of two programs differ in dozens of options: then the folders name them, and seeds share a name."""
    folders = [tmp_path / name for name in ("a_seed-0", "a_seed-1", "b", "images")]
    for folder, source in zip(folders, ("convnn", "convnn-1", "gpsa", "images"), strict=True):
        shutil.copytree(runs / source, folder)
    assert list(lines_of_curves(folders)[0]) == ["a (2 seeds)", "b", "images"]
    args = visualize.make_parser().parse_args(["curves", *map(str, folders)])
    figure = visualize.draw_curves(args)
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert all(axis.bbox.width > 300 and not box.overlaps(axis.bbox) for axis in figure.axes)
    assert box.x1 <= figure.bbox.x1 + 1


def test_many_runs_are_told_apart(runs, tmp_path):
    folders = [tmp_path / f"run{number}" for number in range(25)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        shutil.copy(runs / "mean" / "metrics.csv", folder)
        (folder / "config.yaml").write_text((runs / "mean" / "config.yaml").read_text() + f"\nextra: {number}\n")
    lines, _ = lines_of_curves(folders)
    assert list(lines) == [f"extra {number}" for number in range(25)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == 25


def test_curves_of_all_that_a_folder_holds_can_be_drawn_twice(runs, tmp_path, capsys):
    """`Output/ViT/*` of the shell: runs, the figure that was drawn of them, a run in its first epoch, other files."""
    shutil.copytree(runs / "mean", tmp_path / "mean")
    shutil.copytree(runs / "gpsa", tmp_path / "gpsa")
    for more in ([], ["begun"]):
        for _ in range(2):
            assert visualize.main(["curves", *map(str, sorted(tmp_path.iterdir()))]) == 0
            out, err = capsys.readouterr()
            assert out.strip() == str(tmp_path / "curves.png")
            left_out = ", ".join(str(tmp_path / name) for name in more)
            assert err == (f"left out, as there is no metrics.csv in them: {left_out}\n" if more else "")
        (tmp_path / "begun").mkdir(exist_ok=True)
        (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SystemExit):  # what is not there is an error, whatever else is
        visualize.main(["curves", str(tmp_path / "mean"), str(tmp_path / "nowhere")])
    assert "nowhere holds no metrics.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        visualize.main(["curves", str(tmp_path / "begun"), str(tmp_path / "notes.txt")])
    assert "begun holds no metrics.csv; give folders of runs" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_figure_that_does_not_fit_into_memory_is_one_line(error, monkeypatch, capsys):
    def draw(args):
        raise error

    monkeypatch.setitem(visualize.DRAW, "masks", draw)
    with pytest.raises(SystemExit):
        visualize.main(["masks"])
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "out of memory while drawing masks" in text
