"""States of an output folder (empty, a run of ours finished or not, somebody else's), and its lock."""

import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import allconvnet_main
from experiments import runner
from runs import RunError, lock
from runs.folder import RunFolder
from runs.lock import LockedError, locked, release, take
from runs.processes import Processes

ROOT = Path(__file__).parent.parent.parent
LINE = "--dataset digits --layer Conv2d --channels 4 --batch_size 16 --train_limit 32 --test_limit 20 --device cpu"
pytestmark = pytest.mark.usefixtures("quick_results")


def run(line, folder, *, epochs=1):
    return allconvnet_main.main([*shlex.split(f"{LINE} --num_epochs {epochs} {line}"), "--output_dir", str(folder)])


def refused(line, folder, capsys, **more):
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(line, folder, **more)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    return error


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the lock -------------------------------------------------------------------------------------------------------


def test_a_run_waits_for_nobody_and_says_who_writes_there(tmp_path, capsys):
    descriptor = take(tmp_path)
    error = refused("", tmp_path, capsys)
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}" in error and "--output_dir" in error
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    release(tmp_path, descriptor)
    assert run("", tmp_path) == 0 and not list(tmp_path.glob(".*"))


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


HOLD = "import os, sys, time; from pathlib import Path; from runs.lock import take; take(Path(sys.argv[1]))"


def test_the_lock_of_a_killed_process_is_taken_over_with_a_word(tmp_path, capsys):
    """A fork of it, as the processes that read images are, lives on without the lock."""
    code = f"{HOLD}; os.fork() or print(os.getpid(), flush=True); time.sleep(600)"  # the child, once it has let go of the lock
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(LockedError, match=f"process {process.pid} on"):
            take(tmp_path)
        process.kill()
        process.wait()
        descriptor = take(tmp_path)
        assert f"process {process.pid} on {socket.gethostname()}, which has ended; it is taken over" in capsys.readouterr().err
        release(tmp_path, descriptor)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_lock_removed_by_its_holder_is_not_held_twice(tmp_path, monkeypatch):
    """Between our opening the file and our locking it, its holder removes it and a third one makes another."""
    first, real, third = take(tmp_path), lock._flock, []

    def flock(descriptor):
        if not third:
            third.append(None)
            release(tmp_path, first)
            third.append(take(tmp_path))
        return real(descriptor)

    monkeypatch.setattr(lock, "_flock", flock)
    with pytest.raises(LockedError):
        take(tmp_path)
    release(tmp_path, third[1])


def test_a_run_of_a_sweep_does_not_wait_for_the_lock_of_its_sweep(tmp_path, monkeypatch, capsys):
    descriptor = runner.lock(tmp_path / "point")
    monkeypatch.setenv(lock.VARIABLE, lock.identity(descriptor))
    assert run("", tmp_path / "point") == 0
    assert runner.lock(tmp_path / "other") is not None  # the lock of another folder is no excuse
    refused("", tmp_path / "other", capsys)
    release(tmp_path / "point", descriptor)
    assert not (tmp_path / "point" / ".lock").exists()


@pytest.fixture
def no_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_without_flock_a_file_is_the_lock(tmp_path, no_flock, monkeypatch, capsys):
    descriptor = take(tmp_path)
    assert "has no locks (flock)" in capsys.readouterr().err
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    monkeypatch.setattr(os, "getpid", lambda: 1)  # which runs for ever
    with pytest.raises(LockedError, match="is in use by process"):
        take(tmp_path)
    monkeypatch.undo()
    release(tmp_path, descriptor)
    assert not (tmp_path / ".lock").exists()


def test_without_flock_another_machine_is_believed_and_a_dead_process_is_not(tmp_path, no_flock, capsys):
    (tmp_path / ".lock").write_text("77 elsewhere\n")
    with pytest.raises(LockedError, match=r"process 77 on elsewhere.*; if that has ended, remove .*\.lock"):
        take(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / ".lock").write_text(f"{dead.pid} {socket.gethostname()}\n")
    descriptor = take(tmp_path)
    assert f"was left by process {dead.pid}" in capsys.readouterr().err
    release(tmp_path, descriptor)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_without_torchrun_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert Processes.from_environment().world == 1
    monkeypatch.setenv(name, "2")
    with pytest.raises(RunError, match=f"{name}=2 tasks without torchrun"):
        Processes.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun's
    assert Processes.from_environment().world == 1


# --- whose folder it is ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run("", folder) == 0
    return folder


def test_a_finished_run_is_not_written_over(finished, capsys):
    before = contents(finished)
    error = refused("--seed 1", finished, capsys)
    assert "holds a finished run (1 epochs)" in error
    assert all(word in error for word in ("--resume", "--output_dir", "--overwrite"))
    assert contents(finished) == before
    assert run("--resume", finished) == 0  # changes nothing
    assert all(contents(finished)[name] == before[name] for name in ("best.pt", "metrics.csv", "train_eval_results.txt"))


def test_an_unfinished_run_asks_for_resume_or_overwrite(tmp_path, capsys):
    assert run("", tmp_path, epochs=2) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"finished": False, "epochs": 1}))
    error = refused("", tmp_path, capsys)
    assert "an unfinished run (1 of 2 epochs)" in error and "--resume to go on with it" in error and "--overwrite" in error
    assert run("--overwrite", tmp_path) == 0
    assert "holds a finished run" in refused("--config " + str(tmp_path / "config.yaml"), tmp_path, capsys)


def test_a_run_that_has_saved_nothing_can_be_started_again(tmp_path):
    assert run("--lr 1e30 --clip_grad_norm 0 --optimizer sgd", tmp_path, epochs=2) == 1
    assert (tmp_path / "config.yaml").exists() and not (tmp_path / "last.pt").exists()
    assert run("", tmp_path) == 0


def test_a_finished_run_without_weights_is_not_trained_again_by_resuming(tmp_path, capsys):
    run("", tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    assert "without a checkpoint to resume from" in refused("--resume", tmp_path, capsys)


def test_resume_goes_on_from_the_best_where_the_last_is_gone(tmp_path, capsys):
    run("", tmp_path)
    (tmp_path / "last.pt").unlink()
    assert run("--resume", tmp_path, epochs=2) == 0
    assert "last.pt is gone; resuming from" in capsys.readouterr().err
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("name", ["metrics.csv", "best.pt", "config.yaml", "summary.json"])
@pytest.mark.parametrize("more", ["", "--overwrite"])
def test_outputs_of_nobody_we_know_are_not_written_over(name, more, tmp_path, capsys):
    (tmp_path / name).write_text("layer: Conv2d\n")
    before = contents(tmp_path)
    assert f"holds {name} without the config.yaml of a run" in refused(more, tmp_path, capsys)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_an_epoch_that_is_not_ours_is_not_written_over(tmp_path, capsys):
    (tmp_path / "epoch_1.pt").write_text("mine")
    assert "epoch_1.pt" in refused("--save_every 1", tmp_path, capsys)
    assert run("", tmp_path) == 0 and (tmp_path / "epoch_1.pt").read_text() == "mine"  # without the option it is not


def test_overwriting_takes_away_what_the_run_made_and_nothing_else(tmp_path):
    run("--save_every 1", tmp_path)
    run("--test_only", tmp_path)
    foreign = {"pretrained.pt": "a", "epoch_x.pt": "b", "notes/metrics.csv": "c", "tensorboard/events.out.tfevents.9": "d"}
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert run("--overwrite", tmp_path) == 0
    assert all((tmp_path / name).read_text() == text for name, text in foreign.items())
    old = {path.name for path in tmp_path.glob("*.old")}
    assert old == {"last.pt.old", "best.pt.old", "epoch_1.pt.old"} and not (tmp_path / "test_results.json").exists()
    (tmp_path / "epoch_1.pt").write_text("mine")  # this run keeps no epochs
    assert run("--overwrite", tmp_path) == 0 and (tmp_path / "epoch_1.pt").read_text() == "mine"


def test_files_beside_the_outputs_are_no_obstacle(tmp_path):
    (tmp_path / "pretrained.pt").write_text("a")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("b")
    RunFolder(tmp_path).check(resume=False, overwrite=False)
    assert run("", tmp_path) == 0
    assert (tmp_path / "pretrained.pt").read_text() == "a"
    assert (tmp_path / "tensorboard" / "events.out.tfevents.1").read_text() == "b"


@pytest.mark.parametrize("text", ["[1", "3", "\0", "layer: a\n" * 2, "&a [*a]"])
def test_a_config_that_cannot_be_read_is_not_ours(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=r"holds config\.yaml without"):
        RunFolder(tmp_path).check(resume=False, overwrite=True)


# --- files of --export ----------------------------------------------------------------------------------------------


def test_export_over_a_file_is_refused(finished, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    path.write_text("precious")
    error = refused(f"--export {path}", tmp_path / "run", capsys)
    assert f"--export {path} exists; name another file, or write over it with --overwrite" in error
    assert path.read_text() == "precious" and not (tmp_path / "run").exists()
    assert run(f"--export {path} --overwrite", tmp_path / "run") == 0 and path.read_bytes() != b"precious"
    error = refused(f"--export {path} --checkpoint {path}", tmp_path / "other", capsys)
    assert "exists; name another file" in error
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    assert "nowhere, which does not exist" in refused(f"--export {tmp_path / 'link.safetensors'}", tmp_path / "other", capsys)


EDITED = {
    "epoch": (-5, "1", True, 1.0, 2),
    "step": (-1, None, 3),
    "history": ([], ["x"], None, [{}]),
    "predictions": ([], None),
    "best": ([], "x", {"epoch": 1}),
    "sampler": ({}, {"seconds": "x", "lr": 1.0, "sums": []}),
    "rng": ([], None, [{"cpu": torch.zeros(3, dtype=torch.uint8)}]),
    "optimizer": ({}, 3),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of one epoch, without the checkpoints that a resumed one could fall back on."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run("", folder)
    (folder / "best.pt").unlink()
    return folder


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDITED.items() for value in values])
def test_an_edited_state_is_one_line(name, value, half, tmp_path, capsys):
    state = torch.load(half / "last.pt", weights_only=True)
    torch.save(state | {name: value}, tmp_path / "last.pt")
    error = refused("--resume", tmp_path, capsys, epochs=2)
    assert "last.pt" in error and "--resume" in error


def test_state_of_the_optimizer_of_another_shape_is_one_line(half, tmp_path, capsys):
    """A fused step would write beyond the end of it."""
    state = torch.load(half / "last.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, tmp_path / "last.pt")
    assert "last.pt" in refused("--resume", tmp_path, capsys, epochs=2)
