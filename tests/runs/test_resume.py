"""Runs that are stopped, killed, starved of disk or given bad files: nothing is lost or silently wrong.

A run that was interrupted must leave, bit for bit, what an undisturbed one leaves.
"""

import contextlib
import csv
import io
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allconvnet_main
import train_eval
import vit_main
from launch import prepare
from runs import RunError, Stopped
from runs.checkpoints import STATE, DamagedError, load_checkpoint, save_checkpoint
from runs.files import atomic_file, remove_temporaries, write_atomically
from runs.folder import RunFolder
from runs.metrics import Meter
from runs.resume import resumable_state
from runs.training import Training
from tests.helpers.forked import Forked
from tests.helpers.pools import pool_of

ROOT = Path(__file__).parent.parent.parent
CONVNET = "--dataset digits --layer Conv2d/ConvNN --channels 4 8 --batch_size 16 --train_limit 100 --test_limit 37"
VIT = (
    "--dataset digits --resize 8 --patch_size 2 --num_layers 2 --num_heads 2 --d_model 16 --d_mlp 16 --batch_size 16 "
    "--train_limit 100 --test_limit 37"
)
# Workers on a machine with one core are as good a test as on any other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.usefixtures("quick_results"),
]


def run(line, folder, *, program=allconvnet_main, epochs=2):
    return program.main([*shlex.split(f"{line} --device cpu --num_epochs {epochs}"), "--output_dir", str(folder)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run, made when it is first asked for."""
    folders = {}

    def folder(line, *, program=allconvnet_main, epochs=2):
        key = (line, program, epochs)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole") / "run"
            assert run(line, folders[key], program=program, epochs=epochs) == 0
        return folders[key]

    return folder


def state_of(folder, name="last.pt"):
    """Return the parts that must be equal: all of a checkpoint but times and the options, which name folder and --resume."""
    state = torch.load(folder / name, weights_only=True)
    del state["config"], state["sampler"]["seconds"]
    for row in (*state["history"], state["best"]):
        row.pop("seconds", None), row.pop("images_per_s", None)
    return state


def same(a, b):
    """Equal bit for bit, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in csv.DictReader(file)]


def kill_at(monkeypatch, owner, name, call, number=signal.SIGTERM, after=True):
    """Send this process a signal in the `call`-th call of owner.name, before or after what it does."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if len(calls) == call and after:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of small images in folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, n in (("train", 15), ("val", 5)):
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (20, 20, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


# --- exact resume ---------------------------------------------------------------------------------------------------

# Sampled so that each pair of (where, option) that could matter together stands somewhere.
FOLDER = "--dataset folder --resize 16 --layer Conv2d --channels 4 --batch_size 8 --augment"
BEFORE, WITHIN, EVALUATION, END = ("train_one_epoch", 1), ("train_step", 9), ("evaluate", 2), ("epoch_done", 1)
CASES = [
    (allconvnet_main, f"{CONVNET} --ema_decay 0.9 --mixup 0.4", BEFORE),
    (allconvnet_main, f"{CONVNET} --layer ConvNN --sampling_type random --num_samples 12 --accumulate_steps 2", WITHIN),
    (allconvnet_main, f"{CONVNET} --ema_decay 0.9 --scheduler plateau --lr_step 1 --val_fraction 0.2", EVALUATION),
    (allconvnet_main, f"{FOLDER} --num_workers 0 --ema_decay 0.8 --noise 0.1", ("train_step", 6)),
    (allconvnet_main, f"{FOLDER} --num_workers 2 --cutmix 0.5 --accumulate_steps 2", ("train_step", 6)),
    (allconvnet_main, f"{FOLDER} --num_workers 2 --optimizer sgd --momentum 0.9", END),
    (allconvnet_main, f"{FOLDER} --num_workers 2 --mixup 0.5", BEFORE),
    (vit_main, f"{VIT} --dropout 0.3 --attention_dropout 0.2 --ema_decay 0.9 --mixup 0.4", WITHIN),
    (vit_main, f"{VIT} --layer ConvNNAttention --K 4 --sampling_type random --num_samples 6 --accumulate_steps 3", END),
    (vit_main, f"{VIT} --layer Performer --performer_features 8 --use_amp --scheduler cosine --warmup_epochs 1", WITHIN),
    (vit_main, f"{VIT} --dropout 0.3 --early_stopping 3 --save_every 1 --augment --mixup 0.4 --cutmix 1", EVALUATION),
    (vit_main, f"{VIT} --layer KvtAttention --K 4 --dropout 0.1 --optimizer adam --scheduler step --lr_step 1", BEFORE),
]


@pytest.mark.parametrize(("program", "line", "where"), CASES)
def test_a_stopped_run_ends_as_one_that_was_not(program, line, where, images, tmp_path, monkeypatch, capsys):
    line += f" --data_path {images}"
    assert run(line, tmp_path / "whole", program=program) == 0
    name, call = where
    owner = Training if name == "epoch_done" else train_eval
    kill_at(monkeypatch, owner, name, call, after=name in ("train_step", "epoch_done"))
    assert run(line, tmp_path / "run", program=program) == 143
    monkeypatch.undo()
    assert "stopped by SIGTERM; --resume continues from" in capsys.readouterr().err
    stopped = state_of(tmp_path / "run")
    steps = 4 if "folder" in line else 5 if "val_fraction" in line else 7
    evaluated = 0 if "val_fraction" in line else 1  # the second evaluation is of the test images, or of the second epoch
    expected = {BEFORE: (0, 0), END: (1, 0), EVALUATION: (evaluated, steps)}.get(where) or divmod(call, steps)
    assert (stopped["epoch"], stopped["step"]) == expected
    torch.manual_seed(77)  # what a process drew before must not matter
    assert run(f"{line} --resume", tmp_path / "run", program=program) == 0
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert same(state_of(tmp_path / "run", "best.pt"), state_of(tmp_path / "whole", "best.pt"))
    assert table(tmp_path / "run") == table(tmp_path / "whole") and len(table(tmp_path / "run")) == 2
    text = (tmp_path / "run" / "train_eval_results.txt").read_text().splitlines()
    assert [line.split()[:2] for line in text[:2]] == [["epoch", "1"], ["epoch", "2"]] and len(text) == 5
    assert not list((tmp_path / "run").glob(".*")) and not (tmp_path / "run" / "previous.pt").exists()


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "ema", "rng", "sampler", "step"])
def test_without_a_part_of_the_state_the_end_is_another(part, whole, tmp_path, monkeypatch):
    """The control: the comparison above sees each part that is left out."""
    line = f"{VIT} --dropout 0.3 --ema_decay 0.9 --mixup 0.4 --scheduler cosine --augment"
    undisturbed = state_of(whole(line, program=vit_main))
    kill_at(monkeypatch, train_eval, "train_step", 4)
    run(line, tmp_path / "run", program=vit_main)
    monkeypatch.undo()
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    if part in ("model", "ema"):
        state[part] = {name: torch.zeros_like(value) for name, value in state[part].items()}
    elif part == "optimizer":
        state[part]["state"] = {}
    elif part == "scheduler":
        state[part]["by_step"]["last_epoch"] = 0
    elif part == "rng":
        state[part] = [{"cpu": torch.Generator().manual_seed(5).get_state()}]
    elif part == "sampler":
        state[part]["sums"] = [torch.zeros(4, dtype=torch.float64)]
    else:
        state["step"] = 3
    torch.save(state, path)
    assert run(f"{line} --resume", tmp_path / "run", program=vit_main) == 0
    assert not same(state_of(tmp_path / "run"), undisturbed)


def test_a_run_stopped_again_and_again(tmp_path, monkeypatch):
    line = f"{VIT} --dropout 0.3 --ema_decay 0.9 --accumulate_steps 2"
    run(line, tmp_path / "whole", program=vit_main)
    for more in ("", "--resume", "--resume", "--resume"):
        kill_at(monkeypatch, train_eval, "train_step", 3)
        assert run(f"{line} {more}", tmp_path / "run", program=vit_main) == 143
        monkeypatch.undo()
    assert state_of(tmp_path / "run")["step"] == 12 - 7
    assert run(f"{line} --resume", tmp_path / "run", program=vit_main) == 0
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


def test_a_compiled_run_stopped_before_a_short_batch(tmp_path, monkeypatch):
    """The resumed one begins with a size of batch that the whole one saw last."""
    line = f"{CONVNET} --layer Conv2d --channels 4 --use_compiled --train_limit 20 --test_limit 16"
    run(line, tmp_path / "whole")
    kill_at(monkeypatch, train_eval, "train_step", 1)
    torch._dynamo.reset()
    run(line, tmp_path / "run")
    monkeypatch.undo()
    torch._dynamo.reset()
    assert run(f"{line} --resume", tmp_path / "run") == 0
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert not any("_orig_mod" in name for name in state_of(tmp_path / "run")["model"])


def test_a_finished_run_resumed_for_fewer_epochs_stays_as_it_is(tmp_path):
    run(CONVNET, tmp_path / "run", epochs=3)
    before = state_of(tmp_path / "run")
    assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=2) == 0
    assert same(state_of(tmp_path / "run"), before) and len(table(tmp_path / "run")) == 3


def test_results_that_were_not_written_are_written_by_resuming(whole, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the results of the last epoch."""
    undisturbed = table(whole(CONVNET))
    original = RunFolder.epoch_done

    def killed(self, history, *args, **kwargs):
        if len(history) == 2:
            raise KeyboardInterrupt
        original(self, history, *args, **kwargs)

    monkeypatch.setattr(RunFolder, "epoch_done", killed)
    assert run(CONVNET, tmp_path / "run") == 130
    monkeypatch.undo()
    assert len(table(tmp_path / "run")) == 1
    assert run(f"{CONVNET} --resume", tmp_path / "run") == 0
    assert table(tmp_path / "run") == undisturbed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_has_its_status(number, tmp_path, monkeypatch, capsys):
    kill_at(monkeypatch, train_eval, "train_step", 2, number)
    assert run(CONVNET, tmp_path / "run") == 128 + number
    assert capsys.readouterr().err.startswith(f"stopped by {signal.Signals(number).name}; --resume continues from")
    assert state_of(tmp_path / "run")["step"] == 2


def test_a_signal_while_only_testing(tmp_path, monkeypatch, capsys):
    run(CONVNET, tmp_path / "run", epochs=1)
    kill_at(monkeypatch, Meter, "tally", 1)
    assert run(f"{CONVNET} --test_only", tmp_path / "run", epochs=1) == 143
    assert "stopped by SIGTERM\n" in capsys.readouterr().err and not (tmp_path / "run" / "test_results.json").exists()


def test_a_signal_before_anything_was_done(tmp_path, monkeypatch, capsys):
    run(CONVNET, tmp_path / "earlier", epochs=1)
    kill_at(monkeypatch, prepare, "load_data", 1, signal.SIGINT)
    capsys.readouterr()
    assert run(f"{CONVNET} --overwrite", tmp_path / "earlier") == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"  # what is there is another run
    monkeypatch.undo()
    kill_at(monkeypatch, prepare, "load_data", 1, signal.SIGINT)
    assert run(CONVNET, tmp_path / "run") == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n" and not (tmp_path / "run").exists()


def test_a_signal_to_the_whole_group_from_outside(images, tmp_path):
    """As clusters send it: to the program and to the processes that read images for it."""
    line = f"{FOLDER} --num_workers 2 --data_path {images} --device cpu --num_epochs 4000 --save_minutes 0 --output_dir"
    command = ["allconvnet_main.py", *shlex.split(line), str(tmp_path / "run")]
    process = Forked(command, cwd=ROOT, start_new_session=True)
    for text in process.stdout:
        if text.startswith("epoch   3"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=1800)
    assert process.returncode == 143
    assert error.splitlines()[-1].startswith("stopped by SIGTERM") and "Traceback" not in error, error
    assert len(state_of(tmp_path / "run")["history"]) >= 3
    assert not list((tmp_path / "run").glob(".*"))


# --- kill and disk --------------------------------------------------------------------------------------------------


def die_within_a_save(how: str, size: int) -> None:
    """Make the next save of last.pt end with SIGKILL: within its bytes, before the flush, or before the rename."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    save, replace = torch.save, os.replace

    def half(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[:size])
        file.flush()
        die()

    if how == "write":
        torch.save = half
    elif how == "flush":
        os.fsync = die
    else:
        os.replace = lambda a, b: die() if Path(b).name == "last.pt" else replace(a, b)


def test_a_kill_within_a_save_leaves_a_good_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    names = dict.fromkeys(STATE, 0) | {"sampler": {"seconds": 0.0, "lr": 0.0}, "rng": [0], "config": {}}

    def state(n):
        history = [{"epoch": epoch} for epoch in range(1, n + 1)]
        model = {"w": torch.full((5000,), float(n))}
        return names | {"model": model, "epoch": n, "history": history, "best": history[-1] if history else {}}

    folder.save(state(0))
    draw, good = random.Random(0), 0
    for n in range(1, 21):
        how = ("write", "flush", "rename")[n % 3]
        child = os.fork()
        if child == 0:
            die_within_a_save(how, draw.randrange(1, 20000))
            folder.save(state(n))
            os._exit(0)
        draw.random()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found, path = resumable_state(folder, {})
        assert path == folder.last and found["epoch"] == good and same(found["model"], state(good)["model"])
        assert list(tmp_path.glob(".*.tmp"))
        if n % 4 == 0:  # and a save that succeeds
            folder.save(state(n))
            good = n
            assert resumable_state(folder, {})[0]["epoch"] == n and load_checkpoint(folder.previous)["epoch"] < n
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


KILLED = """
import sys, vit_main
from runs.folder import RunFolder
from tests.runs.test_resume import die_within_a_save
original, saves = RunFolder.save, []
def save(self, *args):
    saves.append(1)
    if len(saves) == 2:
        die_within_a_save("write", 30000)
    original(self, *args)
RunFolder.save = save
vit_main.main(sys.argv[1:])
"""


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    """Within the bytes of a save; what the other places leave is the same, as the test above shows."""

    def run_in_a_fork(folder, *program):
        line = f"{VIT} --dropout 0.2 --ema_decay 0.9 --device cpu --num_epochs 3 --output_dir {folder} --resume"
        process = Forked([*program, *shlex.split(line)], cwd=ROOT)
        return process.communicate() and process.returncode

    assert run_in_a_fork(tmp_path / "run", "-c", KILLED) == -signal.SIGKILL
    assert list((tmp_path / "run").glob(".*.tmp"))
    assert run_in_a_fork(tmp_path / "run", "vit_main.py") == 0
    assert not list((tmp_path / "run").glob(".*"))
    assert run_in_a_fork(tmp_path / "whole", "vit_main.py") == 0
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert table(tmp_path / "run") == table(tmp_path / "whole")


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_a_full_disk_is_one_line_and_changes_no_checkpoint(share, whole, tmp_path, capsys):
    run(CONVNET, tmp_path / "run", epochs=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    capsys.readouterr()
    with full_disk(int(len(before["last.pt"]) * share)):
        assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=3) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written (File too large)" in error and ".pt" in error
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    assert after["last.pt"] == before["last.pt"] and after["best.pt"] == before["best.pt"]
    assert not list((tmp_path / "run").glob(".*"))
    assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=3) == 0
    assert same(state_of(tmp_path / "run"), state_of(whole(CONVNET, epochs=3)))


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    for write in (
        lambda path: write_atomically(path, "x" * 2000),
        lambda path: save_checkpoint({"a": torch.zeros(1000)}, path),
    ):
        with full_disk(1000), pytest.raises(Stopped, match=r"file cannot be written \(File too large\)"):
            write(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="not of the disk"), atomic_file(tmp_path / "file"):
        raise RuntimeError("not of the disk")


# --- files that are not what they should be -------------------------------------------------------------------------


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "a bit":  # of the weights, which torch itself would not notice
        content[len(content) // 3] ^= 16
    elif how == "empty":
        content = b""
    elif how == "foreign":
        buffer = io.BytesIO()
        torch.save({"epoch": 3}, buffer)
        content = buffer.getvalue()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "a bit", "empty", "foreign"])
def test_resume_falls_back_on_the_checkpoint_before(how, whole, tmp_path, monkeypatch, capsys):
    undisturbed = state_of(whole(CONVNET, epochs=4))
    kill_at(monkeypatch, train_eval, "train_step", 16)
    run(CONVNET, tmp_path / "run", epochs=4)
    monkeypatch.undo()
    assert (tmp_path / "run" / "previous.pt").exists()
    damage(tmp_path / "run" / "last.pt", how)
    capsys.readouterr()
    assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=4) == 0
    out, error = capsys.readouterr()
    assert error.startswith(f"warning: {tmp_path / 'run' / 'last.pt'} is not") and error.count("\n") == 1
    assert "previous.pt" in error and "previous.pt: 2 epochs and 0 steps" in out
    assert same(state_of(tmp_path / "run"), undisturbed)


def test_the_checkpoint_fallen_back_on_stays_until_there_is_another(whole, tmp_path, monkeypatch, capsys):
    """Killed in the first save after falling back, the run still has a good state."""
    kill_at(monkeypatch, train_eval, "train_step", 10)
    run(CONVNET, tmp_path / "run", epochs=3)
    monkeypatch.undo()
    damage(tmp_path / "run" / "last.pt", "truncated")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("runs.folder.save_checkpoint", fail)
    assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=3) == 130
    monkeypatch.undo()
    for name in ("last.pt", "previous.pt"):
        assert load_checkpoint(tmp_path / "run" / name)["epoch"] == 1
    run(f"{CONVNET} --resume", tmp_path / "run", epochs=3)
    assert same(state_of(tmp_path / "run"), state_of(whole(CONVNET, epochs=3)))


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path, capsys):
    run(CONVNET, tmp_path / "run", epochs=1)
    (tmp_path / "run" / "best.pt").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(f"{CONVNET} --resume --export {tmp_path / 'w.safetensors'}", tmp_path / "run", epochs=2)
    assert "best.pt of epoch 1 is gone" in capsys.readouterr().err
    run(f"{CONVNET} --resume", tmp_path / "run", epochs=2)
    assert "best.pt of epoch 1 is gone" in capsys.readouterr().err


def test_a_state_of_another_form_is_damaged(tmp_path, capsys):
    run(CONVNET, tmp_path / "run", epochs=1)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["sampler"]["sums"] = torch.zeros(4)
    torch.save(state, tmp_path / "run" / "last.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(f"{CONVNET} --resume", tmp_path / "run", epochs=2)
    assert "last.pt is damaged" in capsys.readouterr().err


def test_resume_falls_back_on_the_best_and_else_says_so(whole, tmp_path, capsys):
    run(CONVNET, tmp_path / "run", epochs=1)
    damage(tmp_path / "run" / "last.pt", "truncated")
    assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=2) == 0
    assert "resuming from" in capsys.readouterr().err
    assert same(state_of(tmp_path / "run"), state_of(whole(CONVNET)))
    for name in ("last.pt", "best.pt"):
        damage(tmp_path / "run" / name, "empty")
    with pytest.raises(RunError, match=r"--resume: .*last.pt .*best.pt .*nothing to resume from"):
        resumable_state(RunFolder(tmp_path / "run"), {})


def test_every_bit_counts(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint({"model": {"w": torch.arange(400.0)}, "epoch": 3}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for place in sorted(draw.sample(range(len(whole)), 60)):
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            state = load_checkpoint(path)
        except DamagedError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # a bit of padding
            assert torch.equal(state["model"]["w"], torch.arange(400.0)) and state["epoch"] == 3


def test_a_state_that_would_run_code_is_stepped_over(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    run(CONVNET, tmp_path / "run", epochs=1)
    torch.save({name: Evil() for name in STATE}, tmp_path / "run" / "last.pt")
    assert run(f"{CONVNET} --resume", tmp_path / "run", epochs=2) == 0
    assert "more than tensors and plain values" in capsys.readouterr().err and not (tmp_path / "touched").exists()


def test_a_reader_killed_while_the_run_is_elsewhere_is_one_line(tmp_path, monkeypatch, capsys):
    """torch raises it from its handler of signals, wherever the run is: a checkpoint that is there is named."""

    def die(*args, **kwargs):
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(prepare, "load_data", die)
        run(CONVNET, tmp_path / "run")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "--num_workers 0" in error

    train_step = train_eval.train_step

    def step_or_die(*args):
        (die if (tmp_path / "run" / "last.pt").exists() else train_step)(*args)

    monkeypatch.setattr(train_eval, "train_step", step_or_die)
    assert run(CONVNET, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--num_workers 0" in error
    assert error.endswith(f"; --resume continues from {tmp_path / 'run' / 'last.pt'}\n")


def test_other_outputs_that_cannot_be_written_are_one_line(tmp_path, capsys):
    (tmp_path / "run" / "tensorboard").parent.mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    assert run(f"{CONVNET} --tensorboard", tmp_path / "run", epochs=1) == 1
    assert re.fullmatch(r"stopped: .*tensorboard.*\n", capsys.readouterr().err)
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(SystemExit):
        run(f"{CONVNET} --export {tmp_path / 'x.safetensors'}", tmp_path / "run", epochs=1)
    assert "--export" in capsys.readouterr().err


# --- determinism and warnings ---------------------------------------------------------------------------------------


BOTH = """
import sys, allconvnet_main, vit_main
first, second = sys.argv[1 : {words} + 1], sys.argv[{words} + 1 :]
sys.exit(allconvnet_main.main(first) or vit_main.main(second))
"""


def test_our_code_warns_of_nothing(tmp_path):
    """Both programs, in one process with all they import, and with their pictures."""
    more = "--mixup 0.4 --ema_decay 0.9 --use_amp --scheduler cosine --augment --device cpu --num_epochs 2 --output_dir"
    lines = [f"{line} {more} {tmp_path / name}".split() for name, line in (("conv", CONVNET), ("vit", VIT))]
    script = BOTH.format(words=len(lines[0]))
    command = [sys.executable, "-c", script, *lines[0], *lines[1]]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    unforeseen = [line for line in done.stderr.splitlines() if "ETA" not in line]  # progress, where a machine is slow
    assert done.returncode == 0 and not unforeseen, done.stderr
    for name in ("conv", "vit"):
        assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / name / "summary.json").read_text())["finished"]


@pytest.fixture
def deterministic():
    yield
    assert torch.are_deterministic_algorithms_enabled()  # by --deterministic
    torch.use_deterministic_algorithms(False)


def steps(program, line, folder):
    assert run(f"{line} --deterministic --train_limit 32", folder, program=program, epochs=1) == 0
    return state_of(folder)["model"]


def layers():
    from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES

    vit = f"{VIT} --K 4 --kernel_size 3 --hybrid_dilations 1 --nystrom_landmarks 4"
    return [(vit_main, f"{vit} --layer {name} --pool {pool_of(name)}") for name in LAYERS1D_NAMES] + [
        (allconvnet_main, f"{CONVNET} --layer {name} --augment") for name in (*LAYERS2D_NAMES, "Conv2d/ConvNN")
    ]


@pytest.mark.parametrize(("program", "line"), layers())
def test_every_layer_trains_deterministically(program, line, tmp_path, deterministic):
    first, second = (steps(program, line, tmp_path / name) for name in "ab")
    assert same(first, second)


def test_a_step_without_a_deterministic_form_is_named(tmp_path, monkeypatch, capsys, deterministic):
    def train_step(*args):
        raise RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set\n'torch.use...'")

    monkeypatch.setattr(train_eval, "train_step", train_step)
    with pytest.raises(SystemExit) as end:
        run(f"{CONVNET} --deterministic", tmp_path / "run")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "--layer Conv2d/ConvNN" in error and "some_backward_cuda" in error
