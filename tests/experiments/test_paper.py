"""The published experiments: their sweep files, what was published beside what we find, and sweeps made small."""

import json
from pathlib import Path

import pytest

import run_experiments
from experiments import published as table
from experiments import report
from experiments.points import check_points, find_config, name_points, options_of, read_sweep
from experiments.published import is_outside, match, plain, read_published
from experiments.runner import ClusterRun
from experiments.scaling import LEAST_PER_CLASS, scale_points, share
from options.data import DATASETS
from tests import test_run_experiments
from tests.helpers.sweeps import read_csv
from tests.test_run_experiments import ROOT, notes, points_of

sweep = test_run_experiments.sweep
FOLDER = Path("Output/sweeps/sweep")
PAPER = sorted((ROOT / "configs" / "sweeps" / "paper").glob("*.yaml"))
SIZES = {
    "vgg_branch_ratio": 50,
    "vgg_candidates": 126,
    "vgg_k": 102,
    "vgg_pixel_shuffle": 16,
    "vgg_similarity": 16,
    "vit_baselines": 18,
    "vit_candidates": 46,
    "vit_convolution_types": 18,
    "vit_k": 88,
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than all the rest, and do not know of what was published."""
    monkeypatch.setattr(report, "draw", lambda rows: {})
    monkeypatch.setattr(report, "draw_curves", None)  # there are no curves


def refused(*argv, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run_experiments.main(list(argv))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and not Path("Output").exists()
    return line


# --- the published experiments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_sweeps(path, monkeypatch, capsys):
    """Each runs dry and knows published numbers; the first line of the file is its command."""
    monkeypatch.chdir(ROOT)
    argv = [f"configs/sweeps/paper/{path.name}", "--published", "docs/published.csv"]
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python run_experiments.py {' '.join(argv)} --gpus 4 --set seed=")
    assert run_experiments.main([*argv, "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"\n{SIZES[path.stem]} runs in Output/sweeps/{path.stem}\n") and err == ""


def test_a_paper_sweep_small(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_experiments.main("configs/sweeps/paper/vit_baselines.yaml --scale 0.05 --dry_run".split()) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    images = "8 of 150 epochs, 2,500 of 50,000 training"
    assert first == (
        f"--scale 0.05: cifar10: {images} and 500 of 10,000 test images; cifar100: {images} and 1,000 of 10,000 test images"
    )
    assert last == "18 runs in Output/sweeps/vit_baselines_scale-0.05"


def test_the_page_names_them_all_and_counts_right():
    assert [path.stem for path in PAPER] == sorted(SIZES)
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert all(f"| `{name}.yaml` | {size} | " in page for name, size in SIZES.items())
    with open(ROOT / "docs" / "published.csv") as file:
        assert f"holds {len(file.readlines()) - 1} published runs" in page


def points_with(name: str, **wanted) -> list:
    """The points of this sweep with these options."""
    path = str(ROOT / "configs" / "sweeps" / "paper" / f"{name}.yaml")
    points = find_config(name_points(*read_sweep(path, [])), path)
    return [point for point in points if all(point.values.get(name) == value for name, value in wanted.items())]


def published_in(name: str, **wanted) -> table.Published:
    """Return the rows of docs/published.csv for the one point of this sweep with these options."""
    points = points_with(name, **wanted)
    rows = read_published(str(ROOT / "docs" / "published.csv"), points)
    (found,) = match(rows, check_points(points, Path("Output/nowhere"))).values()
    return found


@pytest.mark.parametrize(
    ("wanted", "best", "seconds"),
    [
        ({"layer": "Attention", "num_heads": 1}, (77.64, 77.64), (35.93, 35.93)),
        ({"layer": "Attention", "num_heads": 3}, (78.37, 78.37), (41.22, 41.22)),
        ({"layer": "ConvNNAttention", "num_samples": 32}, (79.37, 80.27), None),  # two runs were published
        ({"layer": "KvtAttention"}, (75.77, 75.77), (41.28, 41.28)),
        ({"layer": "LocalAttention", "num_heads": 1}, (76.65, 76.65), (38.84, 38.84)),
        ({"layer": "SparseAttention", "sparse_mode": "local"}, (73.34, 73.34), (41.57, 41.57)),
    ],
)
def test_what_was_published(wanted, best, seconds):
    found = published_in("vit_baselines", dataset="cifar10", **wanted)
    assert found.measures["best_top1"] == best and found.measures.get("epoch_seconds") == seconds
    assert found.is_whole and found.source.startswith("Convolutional-Nearest-Neighbor-Attention: ")


@pytest.mark.parametrize(
    ("name", "wanted", "parameters"),
    [
        ("vit_k", {"layer": "Attention"}, 5_479_306),
        ("vit_k", {"layer": "KvtAttention", "K": 16}, 5_479_306),
        ("vit_k", {"layer": "ConvNNAttention", "K": 12, "num_samples": None}, 5_506_954),
        ("vit_convolution_types", {"convolution_type": "standard", "num_heads": 1, "K": 16}, 12_557_194),
        ("vgg_branch_ratio", {"branch_ratio": 0.25, "similarity_type": "Col"}, 130_015_690),
        ("vgg_k", {"kernel_size": 3, "layer": "Conv2d/ConvNN", "K": 9}, 130_015_690),
    ],
)
def test_the_networks_have_as_many_parameters_as_the_published_ones(name, wanted, parameters):
    """total_params of their args.txt, on CIFAR-10."""
    import torch

    from models.build import build_network
    from vit import ViT

    (point,) = points_with(name, dataset="cifar10", **wanted)
    config = options_of(point, Path("Output/nowhere"))[0].model
    with torch.device("meta"):
        model = ViT(config) if point.program == "vit_main.py" else build_network(config)
    assert sum(weights.numel() for weights in model.parameters()) == parameters


def test_several_published_runs_are_a_range():
    """ConvNN attention with K 9 was run three times, by three versions of the code."""
    found = published_in("vit_k", dataset="cifar10", layer="ConvNNAttention", K=9, num_samples=None)
    assert found.measures["best_top1"] == (74.39, 75.33) and found.measures["epoch_seconds"] == (63.95, 64.0)
    assert found.source.count("; ") == 2


# --- what was published, beside ours ----------------------------------------------------------------------------------

TABLE = """layer,dataset,top1,best_top1,epoch_seconds,epochs,source
Attention,digits,53..54,,64.0,2,a paper
ConvNN,digits,52..62,57,,2,its code
"""


def beside(text, *changes):
    """summary.csv and summary.md of the sweep with this table, once its runs have ended.

    Ours are 51 and 61, with a deviation of 1.41 over two seeds.
    """
    Path("published.csv").write_text(text)
    for point in name_points(*read_sweep("sweep.yaml", list(changes))):
        row = {"test_top1": {"Attention": 50, "ConvNN": 60}[point.values["layer"]] + 2 * point.values["seed"], "test_top5": 90}
        summary = {"finished": True, "epochs": 2, "final": row, "best": row, "parameters": 1000, "flops_per_image": 2e6}
        summary |= {"average_epoch_seconds": 1.5, "latency_ms_per_image": 3.0, "peak_memory_bytes": 4e6}
        (FOLDER / point.name).mkdir(parents=True)
        (FOLDER / point.name / "summary.json").write_text(json.dumps(summary))
    set_them = [word for change in changes for word in ("--set", change)]
    assert run_experiments.main(["sweep.yaml", "--published", "published.csv", *set_them]) == 0
    return read_csv(FOLDER / "summary.csv"), (FOLDER / "summary.md").read_text()


def test_published_numbers_stand_beside_ours(sweep):
    rows, text = beside(TABLE)
    attention, convnn = rows
    assert attention["published_top1"] == "53.0" and attention["published_top1_high"] == "54.0"
    assert attention["published_top1_is"] == "within"  # 2.5 from the middle, and two deviations are 2.83
    assert convnn["published_top1_is"] == "within"  # 4 from the middle, and the range reaches 5
    assert convnn["published_best_top1"] == "57.0" and convnn["published_best_top1_is"] == "outside"
    assert attention["published_best_top1"] == "" and attention["published_best_top1_is"] == ""
    assert attention["published_epoch_seconds"] == "64.0" and "published_epoch_seconds_is" not in attention
    assert (attention["published_source"], convnn["published_source"]) == ("a paper", "its code")
    names = list(attention)
    assert names[names.index("top1") :][:3] == ["top1", "top1_std", "published_top1"]
    head = "| layer | runs | of | top1 | published top1 | top5 | best_top1 | published best_top1 | "
    assert head in text and "| 61 ± 1.4 | 52 to 62 | 90 ± 0 | 61 ± 1.4 | 57 (outside) |" in text
    assert "| 51 ± 1.4 | 53 to 54 | 90 ± 0 | 51 ± 1.4 |  |" in text and table.NOTE in text


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (TABLE, ["seed=0"]),  # one seed has no deviation
        (TABLE.replace(",2,", ",3,"), []),  # other epochs
        (TABLE, ["train_limit=20"]),  # other images
        (TABLE, ["test_limit=20"]),
    ],
)
def test_what_is_no_repetition_is_shown_and_not_marked(text, changes, sweep):
    rows, text = beside(text, *changes)
    assert [row["published_top1"] for row in rows] == ["53.0", "52.0"] and "outside)" not in text
    assert {row["published_top1_is"] for row in rows} == {row["published_best_top1_is"] for row in rows} == {""}


def test_rows_of_as_many_epochs_count_alone(sweep):
    more = "ConvNN,digits,10,10,1,150,elsewhere\nConvNN,digits,64,,,,always\nConvNN,digits,1,1,1,2,\n"
    rows, _ = beside(TABLE + more.replace("ConvNN,digits,1,1,1", "ConvNN,cifar10,1,1,1"))
    assert (rows[1]["published_top1"], rows[1]["published_top1_high"]) == ("52.0", "64.0")
    assert rows[1]["published_source"] == "its code; always"


def test_what_none_has_published_changes_nothing(sweep, capsys):
    rows, text = beside(TABLE.replace("digits", "mnist"))
    assert capsys.readouterr().err.endswith(
        "warning: --published published.csv: none of its rows matches a run of this sweep\n"
    )
    assert not any(name.startswith("published") for name in rows[0]) and "published" not in text


def test_rows_match_by_resolved_options_however_they_are_written(sweep):
    """By defaults and configs too, with 1e-4 for 0.0001, and empty cells that match anything."""
    Path("published.csv").write_text(
        "layer,lr,magnitude_type,resize,augment,train_limit,hybrid_dilations,num_layers,top1\n"
        "ConvNN,1e-4,matmul,8,False,none,1 2,,1\nConvNN,,,8 8,,,,8.0,2\nConvNN,,cosine,,,,,,3\nConvNN,,,,,,,7,4\n"
    )
    points = name_points(*read_sweep("sweep.yaml", []))
    found = match(read_published("published.csv", points), check_points(points, FOLDER))
    assert {name: one.measures for name, one in found.items()} == {
        f"ConvNN_seed-{seed}": {"top1": (1.0, 2.0)} for seed in (0, 1)
    }
    assert plain("magnitude_type", "similarity") == plain("magnitude_type", ["cosine"])


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((70.0, 1.0), (72.0, 72.0), False),
        ((70.0, 1.0), (72.1, 72.1), True),
        ((70.0, 1.0), (67.9, 67.9), True),
        ((70.0, 0.1), (69.0, 75.0), False),  # inside the range, which is the wider one
        ((68.9, 0.1), (69.0, 75.0), True),
        ((70.0, 0.0), (70.0, 70.0), False),
    ],
)
def test_outside_the_wider_of_the_two_spreads(ours, theirs, expected):
    assert is_outside(*ours, *theirs) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "--published published.csv: No such file or directory"),
        (b"\xff\xfe\x00", "published.csv is not a CSV file"),
        (b'layer,top1\n"ConvNN,1\n', "published.csv is not a CSV file: unexpected end of data"),
        (b"", "has none of the columns top1, best_top1, epoch_seconds"),
        (b"layer,K\n", "has none of the columns top1, best_top1, epoch_seconds"),
        (
            b"layr,top1\n",
            "its column 'layr' is no option, nor one of top1, best_top1, epoch_seconds, epochs, source; did you mean",
        ),
        (b"layer,top1,top1\n", "two columns 'top1'"),
        (b"layer,top1\nConvNN\n", "row 1: not as many cells as the first line has names"),
        (b"layer,top1\nConvNN,1\nConvNN,1,2\n", "row 2: not as many cells"),
        (b"layer,top1\nConvNN,77%\n", "row 1: top1 '77%' is neither a number nor two as in 77.6..78.4"),
        (b"layer,top1\nConvNN,nan\n", "'nan' is neither a number"),
        (b"layer,top1\nConvNN,78..77\n", "'78..77' is neither a number"),
        (b"layer,top1,epochs\nConvNN,1,1.5\n", "row 1: epochs '1.5' is not a whole number"),
        (b"magnitude_type,top1\nangle,1\n", "row 1: metric='angle' is not one of cosine"),
    ],
)
def test_bad_tables(text, says, sweep, capsys):
    if text is not None:
        Path("published.csv").write_bytes(text)
    assert says in refused("sweep.yaml", "--published", "published.csv", capsys=capsys)


def test_options_of_another_program_are_options(sweep):
    """A table serves sweeps of all programs: a column that only another one has is no mistake."""
    rows, _ = beside(TABLE.replace("layer,", "shuffle_pattern,layer,").replace("\nA", "\n,A").replace("\nC", "\nBA,C"))
    assert [row["published_top1"] for row in rows] == ["53.0", ""]


def test_jobs_of_a_cluster_get_the_small_points_and_the_published(sweep, monkeypatch):
    Path("published.csv").write_text(TABLE)
    calls = []
    monkeypatch.setattr(run_experiments, "submit", lambda *given: calls.append(given) or [])
    argv = ["sweep.yaml", "--scale", "0.5", "--published", "published.csv", "--slurm", "timeout_min=5"]
    assert run_experiments.main(argv) == 0
    ((points, folder, parameters, gpus_per_run, found),) = calls
    assert folder == Path("Output/sweeps/sweep_scale-0.5") and parameters == {"timeout_min": 5} and gpus_per_run == 1
    assert {point.values["num_epochs"] for point in points} == {1} and found.published.keys() == {
        point.name for point in points
    }
    run = ClusterRun()
    assert run(points[0], points, folder, 1, found) == points[0].name
    assert read_csv(folder / "summary.csv")[0]["published_top1"] == "53.0"


# --- small ------------------------------------------------------------------------------------------------------------


def test_a_small_sweep_has_a_folder_of_its_own(sweep, capsys):
    Path("published.csv").write_text(TABLE)
    argv = ["sweep.yaml", "--set", "layer=ConvNN"]
    assert run_experiments.main(argv) == 0
    assert run_experiments.main([*argv, "--scale", "0.25", "--published", "published.csv"]) == 0
    assert "--scale 0.25: digits: 1 of 2 epochs, 359 of 1,437 training and 100 of 360 test images\n" in capsys.readouterr().out
    small = Path("Output/sweeps/sweep_scale-0.25")
    assert sum(what == "end" for what, _ in notes(small)) == 2 == sum(what == "end" for what, _ in notes())
    assert sum(what.startswith("epoch") for what, _ in notes(small)) == 2  # one each
    log = (small / "ConvNN_seed-1" / "log.txt").read_text()
    assert "--num_epochs 1 " in log and "--train_limit 359 --test_limit 100 --output_dir" in log
    (row,) = read_csv(small / "summary.csv")
    assert row["published_top1"] == "52.0" and row["published_top1_is"] == ""  # of two epochs


def scaled(text, scale):
    points = points_of("program: vit_main.py\n" + text)
    small, line = scale_points(points, scale, FOLDER)
    check_points(small, FOLDER)
    return small, line


def test_all_that_counts_epochs_shrinks_and_never_to_nothing(sweep):
    options = "options: {dataset: cifar10, num_epochs: 90, scheduler: step, lr_step: 30, warmup_epochs: 5, early_stopping: 4}"
    (point,), _ = scaled(options, 0.1)
    expected = {"num_epochs": 9, "lr_step": 3, "warmup_epochs": 1, "early_stopping": 1}
    assert expected | {"train_limit": 5000, "test_limit": 1000} == {
        name: value for name, value in point.values.items() if name in expected or name.endswith("limit")
    }
    (point,), _ = scaled("options: {dataset: cifar100, num_epochs: 90, lr_step: 30}", 0.001)
    small, _ = options_of(point, FOLDER)
    assert (small.train.num_epochs, small.train.lr_step, small.train.warmup_epochs, small.train.early_stopping) == (1, 30, 0, 0)
    assert small.data.train_limit == small.data.test_limit == LEAST_PER_CLASS * 100
    assert share(150, 0.05) == 8 and share(5, 0.5) == 3 and share(3, 0.5) == 2


def test_limits_that_are_given_are_scaled_and_names_follow(sweep):
    small, line = scaled("options: {dataset: mnist, test_limit: 50}\ngrid: {train_limit: [3000, 6000], num_epochs: 20}", 0.1)
    assert [point.name for point in small] == ["train_limit-300_num_epochs-2", "train_limit-600_num_epochs-2"]
    assert [point.values["test_limit"] for point in small] == [50, 50]  # no more than there are
    assert line == (
        "--scale 0.1: mnist: 2 of 20 epochs, 300 of 3,000 training and 50 of 50 test images; "
        "mnist: 2 of 20 epochs, 600 of 6,000 training and 50 of 50 test images"
    )


def test_folders_of_unknown_size_need_limits(sweep, capsys):
    line = refused("sweep.yaml", "--scale", "0.1", "--set", "dataset=imagenet100", capsys=capsys)
    assert "how many images dataset=imagenet100 has; give train_limit and test_limit, as in --set train_limit=N --set t" in line
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (Path("pets") / part / name).mkdir(parents=True)
    line = refused(
        *"sweep.yaml --scale 0.1 --set dataset=folder --set data_path=pets --set train_limit=9".split(), capsys=capsys
    )
    assert "give test_limit, as in --set test_limit=N\n" in line
    text = "options: {dataset: folder, data_path: pets, train_limit: 1000, test_limit: 100}"
    (point,), _ = scaled(text, 0.1)
    assert (point.values["train_limit"], point.values["test_limit"]) == (100, 2 * LEAST_PER_CLASS)


def test_an_evaluation_of_a_checkpoint_is_neither_scaled_nor_compared(sweep, capsys):
    Path("a.pt").write_bytes(b"")
    evaluation = "sweep.yaml --set test_only=true --set checkpoint=a.pt".split()
    assert "--scale is of training, and test_only evaluates a checkpoint" in refused(
        *evaluation, "--scale", "0.1", capsys=capsys
    )
    Path("published.csv").write_text(TABLE)
    assert run_experiments.main([*evaluation, "--published", "published.csv", "--dry_run"]) == 0
    assert "none of its rows matches a run of this sweep" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "1", "-0.1", "nan", "inf", "half"])
def test_scales_that_make_no_sense(scale, sweep, capsys):
    assert "--scale" in refused("sweep.yaml", "--scale", scale, capsys=capsys)


def test_sizes_of_data_sets():
    """The one that is here has as many images as validation says."""
    import numpy as np

    with np.load(ROOT / "data" / "digits.npz", allow_pickle=False) as arrays:
        assert DATASETS["digits"].images == (len(arrays["train_labels"]), len(arrays["test_labels"]))
