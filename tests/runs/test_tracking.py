"""`--wandb`: offline, by the real package; and by one that fails, which no training may notice."""

import csv
import json
import shlex
import struct
import sys
import types

import pytest
import torch

import allconvnet_main
from runs import tracking

pytestmark = pytest.mark.usefixtures("quick_results")
SMALL = "--dataset digits --layer Conv2d --channels 4 --batch_size 32 --train_limit 40 --test_limit 20 --device cpu"


def run(folder, epochs, more=""):
    return allconvnet_main.main(shlex.split(f"{SMALL} --wandb --num_epochs {epochs} --output_dir '{folder}' {more}"))


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def records(data):
    """The records of a log in LevelDB's format: in blocks of 32 KiB, whole (1) or in parts (2, 3, and 4 the last)."""
    at, record = 7, b""  # after the header of the file
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # no room for the header of a part
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def logged(path):
    """Id, options and rows in a file that wandb wrote."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, options, rows = set(), {}, []
    for record in map(Record.FromString, records(path.read_bytes())):
        ids |= {record.run.run_id} - {""}
        for change in (*record.run.config.update, *record.config.update):
            options[change.key or change.nested_key[0]] = json.loads(change.value_json)
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return ids, options, rows


def test_offline_runs_hold_the_options_and_the_rows_of_metrics_csv_under_one_id(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    assert run(folder, 2) == run(folder, 3, "--resume") == 0
    wandb.teardown()  # its process
    assert "warning" not in capsys.readouterr().err
    first, second = (logged(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")))
    assert first[0] == second[0] == {(folder / "wandb_id.txt").read_text().strip()}
    assert [*first[2], *second[2]] == metrics(folder)
    assert (first[1]["num_epochs"], second[1]["num_epochs"]) == (2, 3) and first[1]["channels"] == [4]
    config = torch.load(folder / "last.pt", weights_only=True)["config"]
    assert second[1].keys() >= config.keys()


class Failing:
    """Stand-in for the package that raises in one call."""

    def __init__(self, where):
        self.where, self.calls = where, []
        self.id, self.config = "an-id", types.SimpleNamespace(update=lambda *_, **__: None)

    def init(self, **options):
        return self._called("init", options) or self

    def log(self, row, step):
        self._called("log", step)

    def finish(self, exit_code):
        self._called("finish", exit_code)

    def _called(self, name, value):
        self.calls.append((name, value))
        if name == self.where:
            raise OSError("no space\nleft")


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        (None, ["init", "log", "log", "finish"]),
        ("init", ["init"]),
        ("log", ["init", "log"]),
        ("finish", ["init", "log", "log", "finish"]),
    ],
)
def test_whatever_fails_is_one_warning(where, calls, tmp_path, monkeypatch, capsys):
    package = Failing(where)
    monkeypatch.setitem(sys.modules, "wandb", package)
    package.Settings = dict
    monkeypatch.setattr("launch.prepare.is_installed", lambda: True)
    assert run(tmp_path / "run", 2) == 0
    assert [name for name, _ in package.calls] == calls and len(metrics(tmp_path / "run")) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "--wandb" in line]
    expected = "warning: --wandb could not {} (OSError: no space left); training goes on without it"
    assert said == [expected.format({"init": "start"}.get(where, where))] * (where is not None)


def test_a_resumed_run_has_the_id_and_one_that_is_written_over_another(tmp_path, monkeypatch, capsys):
    package = Failing(None)
    monkeypatch.setitem(sys.modules, "wandb", package)
    package.Settings = dict
    monkeypatch.setattr("launch.prepare.is_installed", lambda: True)
    for more in ("", "--resume", "--overwrite"):
        assert run(tmp_path / "run", 2 if more == "--resume" else 1, more) == 0
    assert [value["id"] for name, value in package.calls if name == "init"] == [None, "an-id", None]
    assert [value for name, value in package.calls if name == "log"] == [1, 2, 1]


def test_the_epoch_that_a_run_was_killed_after_is_tracked_by_resuming(tmp_path, monkeypatch):
    """Killed between the checkpoint and the results: wandb and TensorBoard have each epoch once."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    package = Failing(None)
    monkeypatch.setitem(sys.modules, "wandb", package)
    package.Settings = dict
    monkeypatch.setattr("launch.prepare.is_installed", lambda: True)
    original = tracking.Tracker.epoch_done
    for at in ("before", "after"):  # of what is sent

        def killed(self, row, at=at):
            if row["epoch"] == 2:
                if at == "after":
                    original(self, row)
                raise KeyboardInterrupt
            original(self, row)

        package.calls.clear()
        folder = tmp_path / at
        monkeypatch.setattr(tracking.Tracker, "epoch_done", killed)
        assert run(folder, 3, "--tensorboard") == 130
        monkeypatch.setattr(tracking.Tracker, "epoch_done", original)
        assert run(folder, 3, "--tensorboard --resume") == 0
        assert [value for name, value in package.calls if name == "log"] == [1, 2] + [2] * (at == "after") + [3]
        events = accumulators.EventAccumulator(str(folder / "tensorboard")).Reload()
        steps = [(event.step, event.value) for event in events.Scalars("test_loss")]
        assert steps == [(row["epoch"], pytest.approx(row["test_loss"])) for row in metrics(folder)]


def test_a_run_that_fails_is_marked(tmp_path, monkeypatch, capsys):
    package = Failing(None)
    monkeypatch.setitem(sys.modules, "wandb", package)
    package.Settings = dict
    with pytest.raises(ZeroDivisionError), tracking.Tracker(tmp_path, {}):
        raise ZeroDivisionError
    assert package.calls[-1] == ("finish", 1)


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # as wandb's own runs leave one; no package
    monkeypatch.setattr(sys, "path", ["", *(one for one in sys.path if "site-packages" not in one)])
    for name in [one for one in sys.modules if one.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", 1)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "--wandb" in error and "pip install wandb" in error
    assert not (tmp_path / "run").exists()
