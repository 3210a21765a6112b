"""Custom mixers that a checkpoint or a run folder names: which run, and which are refused."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import predict
import run_experiments
import visualize
import vit_main
from options.machine import cache_folder
from tests.options.test_custom_mixer import HEAD, KVT, VIT, line_of

MIXER = f"{HEAD}{KVT}\nimport os\nopen(os.path.join({{folder!r}}, 'ran'), 'w').close()\n"
pytestmark = pytest.mark.usefixtures("quick_results")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """The run of another user, with best.pt, and the file of its mixer, which notes that it ran."""
    folder = tmp_path / "theirs"
    for name in ("pack", "bare"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mixer.py").write_text(MIXER.format(folder=str(tmp_path)))
    (folder / "pack" / "__init__.py").write_text("# a package\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "their cache"))
    yield folder
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def train(layer, *words) -> Path:
    assert vit_main.main(["--layer", layer, *VIT.split(), *words]) == 0
    return Path("Output/ViT/Kvt").resolve()


def test_code_that_a_checkpoint_names_runs_only_if_it_is_known_or_trusted(shared, tmp_path, monkeypatch, capsys):
    run = train(f"{shared}/bare/mixer.py:Kvt")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    image = Path(run.parents[2], "image.png")
    Image.new("L", (8, 8)).save(image)
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "my cache"))
    (tmp_path / "ran").unlink()
    capsys.readouterr()
    test = ["--test_only", "--checkpoint", str(run / "best.pt"), "--output_dir", "new"]
    calls = {
        vit_main.main: test,
        predict.main: ["--run", str(run), str(image), "--output", "table.csv"],
        visualize.main: ["attention", str(run), "--images", "1", "--output", "attention.png"],
    }
    for main, words in calls.items():
        said = line_of(main, words, capsys)
        assert f"the code in {shared}/bare/mixer.py would run, and you have not trained with it" in said, said
        assert "add --trust_code" in said and str(run) in said
    assert "bare/mixer.py" in line_of(visualize.main, ["analyze", str(run)], capsys)
    assert not (tmp_path / "ran").exists() and [*Path().iterdir()] == []

    for main, words in calls.items():
        assert main([*words, "--trust_code"]) == 0
        line_of(main, [*words, "--overwrite"] if main is predict.main else words, capsys_cleared(capsys))
    # An address from the command line, or from the file that it names, is the user's.
    assert vit_main.main([*test, "--layer", f"{shared}/bare/mixer.py:Kvt"]) == 0
    assert vit_main.main([*test, "--config", str(run / "config.yaml")]) == 0
    # Once this user trains with a file of that content, wherever it lies, it is known.
    shutil.copy(shared / "bare" / "mixer.py", "same.py")
    train("same.py:Kvt")
    for main, words in calls.items():
        assert main([*words, "--overwrite"] if main is predict.main else words) == 0
    with open(shared / "bare" / "mixer.py", "a") as file:
        file.write("# another content\n")
    assert "has changed" in line_of(vit_main.main, test, capsys_cleared(capsys))


def capsys_cleared(capsys):
    capsys.readouterr()
    return capsys


def test_code_in_a_package_is_found_without_importing_it(shared, tmp_path, monkeypatch, capsys):
    run = train("pack.mixer:Kvt")
    test = ["--test_only", "--checkpoint", str(run / "best.pt"), "--output_dir", str(tmp_path / "new")]
    for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
        del sys.modules[name]
    assert vit_main.main(test) == 0  # this user's
    for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
        del sys.modules[name]
    (shared / "pack" / "__init__.py").write_text("# changed\n")
    assert f"the code in {shared}/pack/__init__.py would run" in line_of(vit_main.main, test, capsys_cleared(capsys))
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "my cache"))
    (shared / "pack" / "__init__.py").write_text("")
    assert f"the code in {shared}/pack/__init__.py would run" in line_of(vit_main.main, test, capsys)
    shutil.move("pack", "moved")
    assert "the module pack.mixer cannot be found" in line_of(vit_main.main, test, capsys)
    assert "pack" not in sys.modules


def test_a_users_own_runs_resumes_and_sweeps_go_on_without_a_flag(shared, capsys):
    run = train("bare/mixer.py:Kvt")
    train("bare/mixer.py:Kvt", "--resume", "--num_epochs", "2")
    assert vit_main.main(["--config", str(run / "config.yaml"), "--resume", "--num_epochs", "3"]) == 0
    assert vit_main.main(["--test_only", "--output_dir", str(run)]) == 0
    assert visualize.main(["attention", str(run), "--images", "1"]) == 0
    assert (cache_folder() / "trained_code.txt").read_text().count("\n") == 1
    given = VIT.split()
    options = ", ".join(f"{flag[2:]}: {value}" for flag, value in zip(given[::2], given[1::2], strict=True))
    Path("sweep.yaml").write_text(f"program: vit_main.py\noptions: {{{options}}}\ngrid:\n  layer: [bare/mixer.py:Kvt]\n")
    assert run_experiments.main(["sweep.yaml", "--output_dir", "sweep", "--dry_run"]) == 0


def test_notes_of_another_user_are_not_believed(shared, tmp_path, monkeypatch, capsys):
    run = train("bare/mixer.py:Kvt")
    test = ["--test_only", "--output_dir", str(run)]
    notes = cache_folder() / "trained_code.txt"
    assert notes.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "--trust_code" in line_of(vit_main.main, test, capsys_cleared(capsys))
    monkeypatch.undo()
    notes.unlink()
    os.mkfifo(notes)
    monkeypatch.chdir(shared)
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "their cache"))
    assert "--trust_code" in line_of(vit_main.main, test, capsys)
