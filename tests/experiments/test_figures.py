"""The figures of a sweep: what they show, that legends lie inside them, and that marks tell rows apart."""

import csv
import io
import itertools
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.figures import (
    Mark,
    branches_alone,
    dominated,
    draw_curves,
    draw_option,
    draw_tradeoff,
    legend_beside,
    mark_rows,
    panel_option,
    plot_seeds,
    read_metrics,
    swept_options,
)
from experiments.points import Point
from experiments.report import write_summary


def rows_of(**axes):
    """Summary rows of a grid, two runs each."""
    rows = []
    for number, values in enumerate(itertools.product(*axes.values())):
        measures = {"top1": 50 + number % 7, "top1_std": 0.5, "latency_ms_per_image": 1 + number, "mflops_per_image": 2.0}
        measures |= {"parameters": 1000 + number, "peak_memory_mb": 900.0}
        rows.append(dict(zip(axes, values, strict=True)) | {"runs": 2, "of": 2} | measures)
    return rows


LAYERS = [f"Layer{number}" for number in range(20)]
SIXTY = {"layer": LAYERS[:6], "K": [1, 4, 9, 16, 25], "lr": [0.001, 0.003]}
CURVES = [[10.0, 20.0, 30.0], [12.0, 26.0, 28.0]]  # two seeds


def several_programs():
    kinds = [("ViT", 17), ("Peers", 3), ("AllConvNet", 5)]
    rows = [row for program, count in kinds for row in rows_of(program=[program], layer=LAYERS[:count])]
    assert len(rows) == 25
    return rows


def texts_inside(figure, legends):
    """Every entry of these legends, of which each lies inside the figure."""
    FigureCanvasAgg(figure).draw()
    renderer, texts = figure.canvas.get_renderer(), []
    for legend in legends:
        box = legend.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert not any(box.overlaps(axis.bbox) for axis in figure.axes)
        texts += [text.get_text() for text in legend.get_texts()]
    return texts


@pytest.mark.parametrize(
    ("rows", "entries"),
    [
        (rows_of(layer=LAYERS[:2]), 2),
        (rows_of(layer=LAYERS[:6], lr=[0.1, 0.2]), 6 + 2 + 2),
        (several_programs(), 25 + 3),
        (rows_of(**SIXTY), 6 + 10 + 2),
        (rows_of(layer=[f"A layer whose name is long, number {number}" for number in range(60)]), 60),
    ],
)
def test_the_legend_of_the_tradeoff_is_whole(rows, entries):
    figure = draw_tradeoff(rows, swept_options(rows))
    assert len(texts_inside(figure, figure.legends)) == entries
    assert all(axis.bbox.width > 200 and axis.bbox.height > 200 for axis in figure.axes)


@pytest.mark.parametrize("axes", [{"layer": LAYERS}, {"layer": LAYERS, "K": list(range(3))}, SIXTY, {"K": list(range(60))}])
def test_marks_tell_rows_apart(axes):
    rows = rows_of(**axes)
    marks, sections = mark_rows(rows, list(axes))
    assert len(set(marks)) == len(rows)
    if len(sections) == 2:  # a color and a marker, each with an entry
        colors, markers = ({getattr(mark, kind) for mark in marks} for kind in ("color", "marker"))
        assert {mark.color for mark in sections[0].entries.values()} == colors
        assert {mark.marker for mark in sections[1].entries.values()} == markers
    else:
        assert list(sections[0].entries.values()) == marks


def test_an_entry_of_the_legend_names_the_row_of_its_mark():
    rows = rows_of(**SIXTY)
    marks, (layers, rest) = mark_rows(rows, list(SIXTY))
    assert layers.title == "layer" and rest.title == "K, lr"
    for row, mark in zip(rows, marks, strict=True):
        assert layers.entries[row["layer"]].color == mark.color
        assert rest.entries[f"K {row['K']}, lr {row['lr']}"].marker == mark.marker
    rows = several_programs()
    marks, sections = mark_rows(rows, ["program", "layer"])
    assert [section.title for section in sections] == ["ViT", "Peers", "AllConvNet"]
    entries = {section.title: section.entries for section in sections}
    assert all(entries[row["program"]][row["layer"]] == mark for row, mark in zip(rows, marks, strict=True))
    assert len({mark.marker for mark in marks}) == 3 and all(isinstance(mark, Mark) for mark in marks)


def test_rows_of_programs_have_marks_of_their_own():
    rows = [{"program": program, "layer": f"layer {n}"} for program, many in (("ViT", 23), ("Peers", 3)) for n in range(many)]
    marks, sections = mark_rows(rows, ["program", "layer"])
    assert len(set(marks)) == 26 and [len(section.entries) for section in sections] == [23, 3]
    assert not {marker for _, marker in marks[:23]} & {marker for _, marker in marks[23:]}


def test_lines_by_an_option_have_marks_of_their_own():
    rows = rows_of(**SIXTY)
    figure = draw_option(rows, "K", ["layer", "lr"])
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 12
    assert all(list(line.get_xdata()) == SIXTY["K"] for line in lines)
    assert len(texts_inside(figure, figure.legends)) == 6 + 2 + 2


def test_a_layer_alone_is_the_end_of_the_line_of_two_side_by_side():
    def row(layer, compared, share, top1):
        return {"layer": layer, "similarity_type": compared, "branch_ratio": share, "top1": top1, "top1_std": 0.0}

    rows = [row("Conv2d", "", "", 60), row("ConvNN", "Col", "", 50), row("Attention", "", "", 1)]
    rows += [row("Conv2d/ConvNN", compared, 0.5, 70) for compared in ("Col", "Loc_Col")]
    rows += [row("Conv2d/ConvNN", "Loc_Col", 1, 55)]  # in place of ConvNN, which is not there
    ends = branches_alone(rows, ["layer", "similarity_type"])
    assert [(end["similarity_type"], end["branch_ratio"], end["top1"]) for end in ends] == [
        ("Col", 0, 60),
        ("Col", 1, 50),
        ("Loc_Col", 0, 60),
    ]
    assert {end["layer"] for end in ends} == {"Conv2d/ConvNN"}
    # of the ViT's, whose share is that of the first
    rows = [row("ConvNNAttention", "Col", "", 50), row("Attention", "", "", 60), row("BranchAttention", "Col", 0.5, 70)]
    ends = branches_alone(rows, ["layer", "similarity_type"])
    assert [(end["branch_ratio"], end["top1"]) for end in ends] == [(0, 60), (1, 50)]
    shares = [{"branch_ratio": share, "top1": 70, "top1_std": 0.0} for share in (0.25, 0.5)]
    assert branches_alone(shares, []) == []


def test_the_mean_of_seeds_in_a_band_ends_with_the_shortest_run():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    assert plot_seeds(axis, [[10.0, 20.0, 30.0], [12.0, 26.0]], color="C0") == 23
    assert axis.lines[0].get_xydata().tolist() == [[1, 11], [2, 23]]
    band = axis.collections[0].get_paths()[0].vertices.tolist()
    assert [1, 10] in band and [1, 12] in band and [2, 20] in band and [2, 26] in band
    plot_seeds(axis, [[1.0]], color="C0")
    assert len(axis.collections) == 1  # one run has no band


@pytest.mark.parametrize(
    ("rows", "panels", "titles"),
    [
        (rows_of(layer=LAYERS[:2]), [2], [""]),
        (rows_of(layer=LAYERS[:6], lr=[0.1, 0.2]), [12], [""]),
        (several_programs(), [17, 3, 5], ["ViT", "Peers", "AllConvNet"]),
        (rows_of(**SIXTY), [10] * 6, LAYERS[:6]),
        (rows_of(lr=list(range(60))), [60], [""]),
    ],
)
def test_curves_by_epoch(rows, panels, titles):
    figure = draw_curves(rows, [CURVES] * len(rows))
    axes = [axis for axis in figure.axes if axis.lines]
    assert [len(axis.lines) for axis in axes] == [len(axis.collections) for axis in axes] == panels
    assert [axis.get_title() for axis in axes] == titles
    for axis in axes:
        assert {tuple(map(tuple, line.get_xydata().tolist())) for line in axis.lines} == {((1, 11), (2, 23), (3, 29))}
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == len(axis.lines)
    texts = texts_inside(figure, [*figure.legends, *filter(None, (axis.get_legend() for axis in axes))])
    assert len(texts) == len(rows) and all(text.endswith("  29.0") for text in texts)
    assert all(axis.bbox.width > 350 and axis.bbox.height > 350 for axis in axes)


def test_the_best_line_comes_first_in_the_legend_and_is_the_one_named():
    rows = rows_of(layer=["a", "b", "c"])
    figure = draw_curves(rows, [[[1.0, 5.0]], [[2.0, 9.0]], [[3.0, 7.0]]])
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["b  9.0", "c  7.0", "a  5.0"]
    colors = {line.get_color(): line.get_ydata()[-1] for line in figure.axes[0].lines}
    assert [colors[handle.get_color()] for handle in legend.legend_handles] == [9, 7, 5]


def test_a_layer_has_one_color_in_all_panels():
    rows = rows_of(program=["ViT", "AllConvNet"], layer=["Attention", "ConvNN"])[:-1]
    figure = draw_curves(rows, [[[1.0, 5.0 + number]] for number in range(3)])
    first, second = figure.axes
    assert second.lines[0].get_color() == first.lines[0].get_color() != first.lines[1].get_color()


def test_what_panels_are_made_of():
    assert panel_option(rows_of(layer=LAYERS), ["layer"]) is None
    assert panel_option(rows_of(K=[1, 2], layer=LAYERS), ["K", "layer"]) == "K"
    assert panel_option(rows_of(layer=LAYERS, K=[1, 2]), ["layer", "K"]) == "K"  # 20 panels would be too many
    assert panel_option(rows_of(layer=LAYERS * 3), ["layer"]) is None


def test_a_legend_of_many_entries_takes_columns():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2), layout="constrained")
    handles = figure.subplots().plot([[0] * 30, [1] * 30])
    legend_beside(figure, handles, [f"line {number}" for number in range(30)])
    assert figure.get_figwidth() > 7 and len(texts_inside(figure, figure.legends)) == 30


# --- curves.png of a sweep ------------------------------------------------------------------------------------------


def finish(point, folder, test_top1):
    """Write the outputs of the run of a point, with this test top-1 by epoch."""
    folder = folder / point.name
    folder.mkdir(parents=True)
    rows = [
        {"epoch": n + 1, "train_loss": 1, "train_top1": 1, "test_loss": 1, "test_top1": top1, "test_top5": 99.0}
        for n, top1 in enumerate(test_top1)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "metrics.csv").write_text(text.getvalue())
    costs = {"parameters": 1, "flops_per_image": 1, "average_epoch_seconds": 1, "latency_ms_per_image": 1}
    summary = {"finished": True, "epochs": len(rows), "final": rows[-1], "best": rows[-1], "peak_memory_bytes": 1} | costs
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_sweep_draws_the_curves_of_the_runs_that_have_ended(tmp_path, monkeypatch, capsys):
    from experiments import report

    drawn = []
    monkeypatch.setattr(report, "draw", lambda rows: {})
    monkeypatch.setattr(report, "draw_curves", lambda rows, curves: drawn.append((rows, curves)) or draw_curves(rows, curves))
    points = [
        Point(f"{layer}_seed-{seed}", "allconvnet_main.py", {"layer": layer, "seed": seed, "num_epochs": 3}, varying)
        for layer in ("Conv2d", "ConvNN", "Attention")
        for seed in (0, 1)
        for varying in [{"layer": layer, "seed": seed}]
    ]
    write_summary(points, tmp_path)
    assert not drawn and not (tmp_path / "curves.png").exists()
    finish(points[0], tmp_path, [10, 20, 30])
    finish(points[1], tmp_path, [11, 22, 33])
    finish(points[2], tmp_path, [40, 50])  # of three epochs: has not ended
    finish(points[3], tmp_path, [41, 51, 61])
    finish(points[4], tmp_path, [1, 2, 3])
    for damage in ("epoch,test_top1\n1,", "", "\0", "epoch\n1\n"):
        (tmp_path / points[4].name / "metrics.csv").write_text(damage)
        report.warn_once.cache_clear()
        write_summary(points, tmp_path)
        (rows, curves), *_ = drawn
        assert [row["layer"] for row in rows] == ["Conv2d", "ConvNN"]
        assert curves == [[[10, 20, 30], [11, 22, 33]], [[41, 51, 61]]]
        assert (tmp_path / "curves.png").stat().st_size > 5000
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and "Attention_seed-0/metrics.csv" in warning
        drawn.clear()


def test_the_table_of_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics\.csv"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(ValueError, match="cannot be read as the table of a run"):
        read_metrics(tmp_path)


def test_the_front_joins_what_nothing_dominates():
    rows = [{"top1": top1, "cost": cost} for top1, cost in ((80, 4), (70, 2), (75, 3), (74, 3), (80, 5), (70, 2))]
    assert dominated(rows, "cost") == [False, False, False, True, True, False]
