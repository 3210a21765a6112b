"""Every figure, as pixels: no panel is blank, no text is cut off, and names of any letters are drawn."""

import io
import shlex

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import allconvnet_main
import benchmark
import predict
import visualize
import vit_main
from experiments import figures, panels, pictures
from launch.mask import draw_mask
from mixers.base import TokenLayout
from mixers.local import MultiHeadMaskedAttention
from runs import files, folder
from runs.files import drawable
from tests.experiments.test_figures import CURVES, rows_of

COMMON = "--dataset digits --num_epochs 2 --train_limit 40 --test_limit 20 --batch_size 20 --device cpu"
NAMES = ["a$b$", "c_$\\frac$", "caf\udce9", "猫" * 30, "a long name of a class " * 3, *"fghij"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in a folder with an odd name, and its classes."""
    place = tmp_path_factory.mktemp("$runs$") / "猫$1$"
    patch = pytest.MonkeyPatch()
    patch.setattr("runs.folder.draw_curves", lambda history, path: None)
    patch.setattr("runs.folder.measure_latency", lambda model, image: {"latency_ms_per_image": 1.0})
    vit = f"{COMMON} --resize 8 --patch_size 2 --num_layers 1 --num_heads 2 --d_model 8 --d_mlp 8 --K 4 --layer ConvNNAttention"
    assert vit_main.main([*shlex.split(vit), "--output_dir", str(place)]) == 0
    second = f"{COMMON} --layer Conv2d --channels 4"
    assert allconvnet_main.main([*shlex.split(second), "--output_dir", str(place.with_name("$2$"))]) == 0
    patch.undo()
    patch.setattr("readers.files.DIGIT_NAMES", NAMES)
    patch.setattr("experiments.trained.check_classes", lambda *_: None)
    yield place
    patch.undo()


def drawn(*line):
    args = visualize.make_parser().parse_args([*map(str, line)])
    return visualize.DRAW[args.figure](args)


def sheet_of(classes):
    rows = [{"file": f"{name[:40]}.png", "class_1": name, "probability_1": 1.0} for name in classes]
    return predict.draw_sheet(rows, [np.eye(8)] * len(rows))


def curves_of_a_run(tmp_path):
    row = {f"{part}_{key}": 1.0 for part in ("train", "val", "test") for key in ("loss", "top1")}
    folder.draw_curves([row | {"epoch": 1}, row | {"epoch": 2, "test_loss": 2.0}], tmp_path / "curves.png")
    return (tmp_path / "curves.png").read_bytes()


def scaling():
    rows = [{"layer": "A", "precision": "float32", "execution": "eager", "tokens": 64 * n} for n in (1, 2)]
    return benchmark.draw_scaling([row | {"forward_backward_ms": 2.0, "peak_memory_mb": 3.0} for row in rows], "a machine")


MASKED = MultiHeadMaskedAttention(8, 2, layout=TokenLayout(4, 5, 1), mask_type="2d_cardinal", expansion_step=1)
COUNTS = np.eye(10, dtype=int).tolist()
FIGURES = {
    "curves of a run": lambda run, tmp_path: curves_of_a_run(tmp_path),
    "curves": lambda run, _: drawn("curves", run, run.with_name("$2$")),
    "confusion": lambda run, _: pictures.draw_confusion(NAMES, COUNTS),
    "confusion of two": lambda run, _: pictures.draw_confusion(["a", "b" * 18], [[3, 1], [0, 9]]),
    "attention": lambda run, _: drawn("attention", run, "--images", 2),
    "neighbors": lambda run, _: drawn("neighbors", run, "--images", 2),
    "analysis": lambda run, _: drawn("analyze", run, "--images", 1),
    "masks": lambda run, _: drawn("masks", "--grid", 4, 5, "--expansion_step", 1),
    "mask of a run": lambda run, _: draw_mask(MASKED),
    "samples": lambda run, _: drawn("samples", "--images", 10),
    "sheet": lambda run, _: sheet_of(NAMES),
    "sheet of one": lambda run, _: sheet_of(NAMES[:1]),
    "tradeoff": lambda run, _: figures.draw_tradeoff(rows_of(layer=NAMES), ["layer"]),
    "option": lambda run, _: figures.draw_option(rows_of(layer=NAMES[:4], K=[1, 4, 9]), "K", ["layer"]),
    "curves of a sweep": lambda run, _: figures.draw_curves(rows_of(layer=NAMES), [CURVES] * 10),
    "scaling": lambda run, _: scaling(),
}


@pytest.mark.filterwarnings("error:Glyph")  # of a letter that is drawn as a box
@pytest.mark.parametrize("name", FIGURES)
def test_figures_show_something_and_cut_nothing_off(name, run, tmp_path):
    figure = FIGURES[name](run, tmp_path)
    if isinstance(figure, bytes):
        picture = np.asarray(Image.open(io.BytesIO(figure)).convert("RGB"))
    else:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
    assert all((side == 255).all() for side in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    assert len(np.unique(picture)) > 20
    if isinstance(figure, bytes):
        return
    assert figure.get_figwidth() <= panels.PAGE + 1e-9 and figure.dpi == 200
    box = figure.get_tightbbox(canvas.get_renderer())  # of everything drawn, in inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()
    for axis in figure.axes:
        left, bottom, right, top = axis.get_window_extent().extents.round().astype(int)
        inside = picture[len(picture) - top + 2 : len(picture) - bottom - 2, left + 2 : right - 2]
        assert not axis.axison or np.ptp(inside) > 50


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a$b$", "a$b$"), ("caf\udce9", r"caf\udce9"), ("é", "é"), ("a\nb", r"a\nb"), ("\U0010ffff", r"\U0010ffff")],
)
def test_names_are_drawn_as_they_are_or_escaped(name, shown):
    assert drawable(name) == shown and drawable(name, 2) == shown[:2]


def test_a_font_that_has_the_letters_is_used(monkeypatch):
    """No font with Chinese letters need be here: another one stands for it."""
    files.figure_fonts.cache_clear()
    monkeypatch.setattr(files, "CJK_FONTS", ("No such font", "DejaVu Serif"))
    try:
        assert [font.family_name for font in files.figure_fonts()] == ["DejaVu Sans", "DejaVu Serif"]
    finally:
        files.figure_fonts.cache_clear()
