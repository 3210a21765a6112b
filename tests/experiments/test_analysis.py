import csv
import shutil

import pytest
import torch
from torch.nn import functional as F

import visualize
from dataset import channel_stats
from experiments.analysis import PANELS, analyze_runs, draw_analysis, kept_epochs
from experiments.trained import load_run
from neighbors import grid_locations
from options.data import DataConfig
from tests.helpers.tiny_runs import write_run

VIT = {"resize": 8, "patch_size": 2, "num_layers": 2, "num_heads": 2, "d_model": 8, "d_mlp": 8, "K": 4, "kernel_size": 3}
RUNS = {
    "convnn": VIT | {"layer": "ConvNNAttention", "magnitude_type": "matmul"},
    "place": VIT | {"layer": "ConvNNAttention", "similarity_type": "Loc", "pool": "mean"},
    "attention": VIT | {"layer": "Attention"},
    "scores": VIT | {"layer": "ConvNNAttention", "softmax_topk_val": False},
    "conv": VIT | {"layer": "Conv1dAttention"},
    "images": {"layer": "ConvNN", "channels": [4, 6], "K": 4, "padding": 1, "shuffle_pattern": "NA"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, values in RUNS.items():
        write_run(root / name, values)
    return root


def rows_of(runs, *names, images=3, pairs=None, noise=0.1):
    return analyze_runs([runs / name for name in names], images, pairs, noise, None)


def value(rows, run, layer, measure, of=None):
    found = [row for row in rows if (row["run"], row["layer"], row["measure"]) == (run, layer, measure)]
    (row,) = [row for row in found if of is None or row["of"] == of]
    return row["value"]


def gini(counts):
    return (counts[:, None] - counts).abs().mean() / (2 * counts.mean())


def test_measures_are_those_of_the_mixing_matrix(runs):
    """Of ConvNN attention: what is not 0 in its matrix are its neighbors, head by head."""
    rows = rows_of(runs, "convnn")
    model, images, _, _ = load_run(runs / "convnn", 3, None)[3:]
    projections = []
    for block in model.blocks:
        block.mixer.qkv.register_forward_hook(lambda module, inputs, output: projections.append(output.detach()))
    with torch.no_grad():
        _, matrices = model(images, output_attentions=True)
    places = F.pad(grid_locations((4, 4)).float(), (0, 0, 1, 0))
    apart = torch.cdist(places, places).expand(3, 2, -1, -1)
    between_patches = torch.ones(17, 17, dtype=torch.bool)
    between_patches[0] = between_patches[:, 0] = False
    for number, (matrix, qkv) in enumerate(zip(matrices, projections, strict=True), 1):
        chosen, layer = matrix > 0, f"block {number}"
        known = chosen & between_patches
        assert value(rows, "convnn", layer, "mean distance") == pytest.approx(float(apart[known].mean()))
        weighed = float((apart * matrix)[known].sum() / matrix[known].sum())
        assert value(rows, "convnn", layer, "weighed mean distance") == pytest.approx(weighed)
        for start in range(4):
            is_there = (apart[known] >= start) & ((apart[known] < start + 1) | (start == 3))
            share = value(rows, "convnn", layer, "share of distances", f"from {start}")
            assert share == pytest.approx(float(is_there.float().mean()))
        counts = chosen.sum(dim=2).flatten(0, 1).float()
        assert value(rows, "convnn", layer, "gini") == pytest.approx(float(torch.stack([*map(gini, counts)]).mean()))
        common = (chosen[:, 0] & chosen[:, 1]).sum(dim=-1) / 4
        assert value(rows, "convnn", layer, "overlap of heads") == pytest.approx(float(common.mean()))
        query, key = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, dim=2)[:2])
        mass = (query @ key.mT / 2).softmax(dim=-1)[chosen].view(3, 2, 17, 4).sum(dim=-1)
        assert value(rows, "convnn", layer, "softmax mass") == pytest.approx(float(mass.mean()), rel=1e-5)
        assert value(rows, "chance", layer, "overlap of heads") == pytest.approx(4 / 17)


def test_overlaps_are_those_with_the_changed_images(runs):
    rows = rows_of(runs, "convnn", noise=0.3)
    model, images, _, _ = load_run(runs / "convnn", 3, None)[3:]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    _, std = channel_stats(DataConfig(dataset="digits"))
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(16).view(4, 4).flip(1).flatten()])
    with torch.no_grad():
        one, flipped, noisy = (model(x, output_attentions=True)[1] for x in (images, images.flip(3), images + noise / std))
    for number in (0, 1):
        chosen = one[number] > 0
        back = flipped[number][:, :, order][:, :, :, order] > 0
        for measure, other in (("overlap under a flip", back), ("overlap under noise", noisy[number] > 0)):
            expected = float((chosen & other).sum(dim=-1).float().mean() / 4)
            assert value(rows, "convnn", f"block {number + 1}", measure) == pytest.approx(expected)


def test_a_choice_by_location_is_a_window(runs):
    rows = rows_of(runs, "place")
    for layer in ("block 1", "block 2"):
        for measure in ("mean distance", "gini", "skewness"):
            assert value(rows, "place", layer, measure) == pytest.approx(value(rows, "window", layer, measure))
            assert value(rows, "chance", layer, measure) != pytest.approx(value(rows, "window", layer, measure), rel=0.05)
        assert value(rows, "place", layer, "overlap of heads") == 1
        assert value(rows, "place", layer, "overlap under noise") == 1


def test_all_pairs_hold_everything(runs):
    rows = rows_of(runs, "attention", pairs=16)
    places = grid_locations((4, 4)).float()
    model, images, _, _ = load_run(runs / "attention", 3, None)[3:]
    with torch.no_grad():
        matrices = model(images, output_attentions=True)[1]
    for number, matrix in enumerate(matrices, 1):
        mass = float((1 - matrix.amin(dim=-1)).mean())  # 16 of 17
        assert value(rows, "attention", f"block {number}", "softmax mass") == pytest.approx(mass)
    rows = rows_of(runs, "attention", pairs=17)
    assert value(rows, "attention", "block 1", "mean distance") == pytest.approx(float(torch.cdist(places, places).mean()))
    assert value(rows, "attention", "block 1", "gini") == pytest.approx(0, abs=1e-6)
    assert value(rows, "attention", "block 2", "overlap under a flip") == 1
    assert not [row for row in rows if row["measure"] == "softmax mass"]  # nothing is left out


def test_measures_that_a_layer_has_not_are_left_out(runs):
    measures = {row["measure"] for row in rows_of(runs, "images") if row["run"] == "images"}
    assert not measures & {"softmax mass", "overlap of heads", "overlap of epochs"} and "gini" in measures
    assert "softmax mass" not in {row["measure"] for row in rows_of(runs, "scores")}


def test_overlap_of_runs(runs, tmp_path):
    shutil.copytree(runs / "convnn", tmp_path / "same")
    rows = analyze_runs([runs / "convnn", tmp_path / "same", runs / "attention", runs / "images"], 2, None, 0.1, None)
    found = [row for row in rows if row["measure"] == "overlap of runs"]
    assert {(row["run"], row["of"]) for row in found} == {("convnn", "same"), ("convnn", "attention"), ("same", "attention")}
    assert all((row["value"] == 1) == (row["of"] == "same") for row in found) and len(found) == 6


def test_overlap_of_epochs(tmp_path):
    names = ["best.pt", "epoch_2.pt", "epoch_10.pt"]
    run = write_run(tmp_path / "run", RUNS["convnn"], tuple(names))
    shutil.copy(run / "epoch_10.pt", run / "epoch_12.pt")
    assert kept_epochs(run) == [2, 10, 12]
    rows = analyze_runs([run], 2, None, 0.1, None)
    assert value(rows, "run", "block 1", "overlap of epochs", "10 and 12") == 1
    model, images, _, _ = load_run(run, 2, None)[3:]
    matrices = []
    for name in names[1:]:
        model.load_state_dict(torch.load(run / name)["model"])
        with torch.no_grad():
            matrices.append(model(images, output_attentions=True)[1][1] > 0)
    expected = float((matrices[0] & matrices[1]).sum(dim=-1).float().mean() / 4)
    assert value(rows, "run", "block 2", "overlap of epochs", "2 and 10") == pytest.approx(expected)


def test_the_table_and_the_figure_hold_the_rows(runs, tmp_path, capsys):
    output = tmp_path / "deep" / "found.png"
    names = ["convnn", "attention"]
    line = ["analyze", *(str(runs / name) for name in names), "--images", "3", "--output", str(output)]
    assert visualize.main(line) == 0
    assert capsys.readouterr().out.split() == [str(output.with_suffix(".csv")), str(output)]
    rows = rows_of(runs, *names)
    with output.with_suffix(".csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row | {"value": float(row["value"])} for row in read] == rows
    axes = draw_analysis(rows).axes
    assert [axis.get_title() for axis in axes[:2]] == names
    shown = [axis for axis in axes if axis.get_ylabel() == PANELS["gini"]]
    lines = {line.get_label(): list(line.get_ydata()) for line in shown[0].lines}
    assert set(lines) == {*names, "window", "chance"}
    for name, values in lines.items():
        assert values == [value(rows, name, f"block {number}", "gini") for number in (1, 2)]
    assert len([axis for axis in axes if axis.lines]) == 2 + len(PANELS) + 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("analyze nowhere", "nowhere holds no run"),
        ("analyze conv", "layer=Conv1dAttention has no neighbors"),
        ("analyze convnn --noise -1", "'-1' is not a number of at least 0"),
        ("analyze convnn --noise x", "'x' is not a number"),
        ("analyze convnn --output found.csv", "--output found.csv is not a file of .png or .pdf or .svg"),
    ],
)
def test_errors_are_one_line(line, says, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as end:
        visualize.main(line.split())
    text = capsys.readouterr().err
    assert end.value.code == 2 and says in text and text.count("\n") == 1
