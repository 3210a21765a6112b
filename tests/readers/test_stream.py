"""Images that worker processes decode: the same in any number of them, and an end in every case."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allconvnet_main
import dataset
from readers import stream
from runs import DataError
from runs.processes import Interrupted, Signals
from tests.helpers.data import everything, load, pixels, write_folder

# Workers on a machine with one core are as good a test as on any other.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_workers_give_the_same_batches_and_epochs_can_be_left_and_resumed(tmp_path):
    write_folder(tmp_path, train=7, suffix="jpg")
    options = {"resize": 16, "batch_size": 4, "augment": True, "noise": 0.1, "val_fraction": 0.2}
    options |= {"auto_augment": "trivial", "random_erasing": 0.5}
    alone, workers = (load("folder", tmp_path, num_workers=n, **options) for n in (0, 2))
    assert (alone.train.num_samples, alone.val.num_samples) == (17, 4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    epochs = {}
    for epoch in (0, 1):
        a, b = list(alone.train.epoch(epoch)), list(workers.train.epoch(epoch))
        assert len(a) == len(b) == len(alone.train) == 5
        for (images, labels), (others, others_labels) in zip(a, b, strict=True):
            assert torch.equal(images, others) and torch.equal(labels, others_labels)
        epochs[epoch] = a
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    pids = {worker.pid for worker in workers.train._stream.loader._iterator._workers}
    half = workers.train.epoch(0)
    next(half)  # and never finished
    for data in (workers, alone):
        for start in (3, 5, 0):
            rest = list(data.train.epoch(1, start))
            assert len(rest) == 5 - start
            for (images, labels), (others, others_labels) in zip(rest, epochs[1][start:], strict=True):
                assert torch.equal(images, others) and torch.equal(labels, others_labels)
    assert pids == {worker.pid for worker in workers.train._stream.loader._iterator._workers}  # kept between epochs
    torch.testing.assert_close(everything(alone.val, 0), everything(workers.val, 1), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_of_folders_depends_on_the_image_not_on_the_batch(tmp_path):
    write_folder(tmp_path, classes=("a",), train=12)
    sorted_images = []
    for batch_size in (1, 5):
        train = load("folder", tmp_path, resize=16, augment=True, batch_size=batch_size).train
        sorted_images.append(everything(train, 2)[0][train.order(2).argsort()])
    assert torch.equal(*sorted_images)
    plain = load("folder", tmp_path, resize=16, batch_size=5).train
    assert not torch.equal(everything(plain, 2)[0][plain.order(2).argsort()], sorted_images[0])


def test_augmentation_of_folders_crops_and_flips(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    for part, n in (("train", 60), ("val", 1)):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(image).save(tmp_path / part / "a" / f"{i}.png")
    images = pixels(everything(load("folder", tmp_path, resize=16, augment=True).train)[0], "folder")
    assert len({out.numpy().tobytes() for out in images}) > 30
    # The bright side, where the crop has both.
    difference = images[:, 0, :, -1].mean(1) - images[:, 0, :, 0].mean(1)
    assert (difference > 200).sum() > 10 and (difference < -200).sum() > 10


def test_resuming_does_not_decode_what_is_skipped(tmp_path, monkeypatch):
    write_folder(tmp_path)
    train = load("folder", tmp_path, resize=16, batch_size=4).train
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kwargs: (opened.append(path), original(path, **kwargs))[1])
    assert len(list(train.epoch(0, start=2))) == 2 and len(opened) == 15 - 8


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no image", None])
def test_corrupt_image_is_named(tmp_path, damage, num_workers):
    write_folder(tmp_path, classes=("a", "b"), suffix="jpg")
    data = load("folder", tmp_path, resize=16, num_workers=num_workers)
    file = tmp_path / "train" / "b" / "2.jpg"
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    message = ""
    try:  # `pytest.raises` would keep the workers alive in the traceback
        list(data.train.epoch(0))
    except DataError as error:
        message = str(error)
    assert str(file) in message and "\n" not in message and len(message) < 400
    assert data.test.num_samples == len(everything(data.test)[0])


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    write_folder(tmp_path)
    train = load("folder", tmp_path, resize=16).train

    def loader(message):
        yield [torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1), torch.zeros(1)]
        raise RuntimeError(message)

    monkeypatch.setattr(train._stream, "loader", loader("DataLoader worker (pid 5) is killed by signal: Killed.\nmore"))
    with pytest.raises(DataError, match=r"pid 5.*--num_workers 0") as caught:
        list(train.epoch(0))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(train._stream, "loader", loader("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(train.epoch(0))


CANNOT = {  # what fails in the worker or beside it, and the words of the reason
    "AF_UNIX path too long": None,
    "unable to allocate shared memory": ("torch.UntypedStorage._share_fd_cpu_", RuntimeError),
    "Resource temporarily unavailable": ("multiprocessing.process.BaseProcess.start", BlockingIOError),
    "Too many open files": ("multiprocessing.queues.Queue.get", RuntimeError),
}


@pytest.mark.parametrize("reason", CANNOT)
def test_a_worker_that_cannot_hand_over_its_batch_ends_the_run_with_its_state_saved(reason, tmp_path, quick_results, capsys):
    write_folder(tmp_path / "data")
    line = "--layer Conv2d --channels 4 --dataset folder --resize 8 --batch_size 4 --num_epochs 1 --device cpu".split()
    line += ["--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        if CANNOT[reason] is None:
            patch.setitem(multiprocessing.current_process()._config, "tempdir", str(tmp_path / ("x" * 120)))
        else:
            target, error = CANNOT[reason]
            patch.setattr(target, lambda *_, **__: (_ for _ in ()).throw(error(reason)))
        assert allconvnet_main.main([*line, "--num_workers", "1"]) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("stopped: a process that reads images failed") and reason in error
    assert "--num_workers 0" in error and f"--resume continues from {tmp_path / 'run' / 'last.pt'}" in error
    assert allconvnet_main.main([*line, "--num_workers", "0", "--resume"]) == 0


def test_a_signal_ends_the_wait_for_a_worker_that_is_stuck(tmp_path, monkeypatch):
    write_folder(tmp_path)
    data = load("folder", tmp_path, resize=16, num_workers=1)

    def stuck(image):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(3600)

    monkeypatch.setattr(data.train._stream.loader.dataset, "transform", stuck)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with Signals() as signals, signals.deferred():
        batches = signals.interruptible(data.train.epoch(0))
        with contextlib.suppress(Interrupted):
            next(batches)
        assert signals.received == signal.SIGTERM
    worker = data.train._stream.loader._iterator._workers[0]
    assert worker.is_alive()
    del data, batches
    worker.join()
    assert worker.exitcode == -signal.SIGKILL  # it ignores SIGTERM


def test_workers_beyond_the_cores_or_the_shared_memory_are_warned_of_once(tmp_path, monkeypatch, capfd):
    write_folder(tmp_path)
    monkeypatch.setattr(stream, "cpu_cores", lambda: 2)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3 * 2**20))
    load("folder", tmp_path, resize=256, batch_size=4, num_workers=2)  # 2 batches x 2 workers x 4 images of 192 KiB
    assert "warning" not in capfd.readouterr().err
    load("folder", tmp_path, resize=256, batch_size=5, num_workers=3)
    cores, memory = capfd.readouterr().err.splitlines()
    assert cores == "warning: --num_workers 3 exceeds the number of CPU cores, 2; reading may slow down"
    assert memory.startswith("warning: /dev/shm has 3 MiB free, and batches of --num_workers 3 may need 6: ")
    load("digits", tmp_path, num_workers=3)
    assert capfd.readouterr().err == ""


WORKER_SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import dataset, torch
from options.data import DataConfig
assert "torchvision" not in sys.modules and "sklearn" not in sys.modules

def inherited(number, frame):
    os.write(1, b"inherited")

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, inherited)
leaves = os.fork() == 0  # one that leaves its workers, and then one whose worker is killed
if not leaves:
    print(os.waitstatus_to_exitcode(os.wait()[1]))
config = DataConfig(dataset="folder", data_path=sys.argv[1], resize=8, num_workers=2)
data = dataset.load_data(config, batch_size=1, seed=0, device=torch.device("cpu"))
train, test = data.train.epoch(0), data.test.epoch(0)
next(train), next(test)
worker = data.train._stream.loader._iterator._workers[0]
for name in ("INT", "TERM", "USR1"):
    subprocess.run(["kill", f"-{name}", str(worker.pid)])
next(train)  # which the worker reads now, or has died
print(worker.is_alive(), flush=True)
try:
    if leaves:
        sys.exit()
    subprocess.run(["kill", "-KILL", str(worker.pid)])
    time.sleep(3600)
except RuntimeError:  # torch's handler of SIGCHLD
    print(worker.exitcode == -signal.SIGKILL)
"""


def test_workers_leave_signals_to_the_main_process_and_end_quietly_with_it(tmp_path):
    write_folder(tmp_path)
    command = [sys.executable, "-c", WORKER_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(dataset.__file__).parent, timeout=1800)
    assert done.stdout.split() == ["True", "0", "True", "True"] and done.returncode == 0
    # Nothing of torch's on the number of workers.
    assert done.stderr.splitlines() == 2 * [
        "warning: --num_workers 2 exceeds the number of CPU cores, 1; reading may slow down"
    ]


@pytest.mark.parametrize("corrupt", [False, True])
def test_workers_stop_at_once_with_their_batches(tmp_path, corrupt, monkeypatch):
    write_folder(tmp_path)
    data = load("folder", tmp_path, resize=16, num_workers=1)
    next(data.train.epoch(0))
    worker = data.train._stream.loader._iterator._workers[0]
    if corrupt:
        (tmp_path / "train" / "ant" / "0.png").write_bytes(b"")
        with contextlib.suppress(DataError):
            list(data.train.epoch(0))
    # torch waits this long for a worker that cannot be told, and then terminates it.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)
    del data
    assert not worker.is_alive() and worker.exitcode == 0
