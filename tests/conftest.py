import atexit
import gc
import math
import os
import shutil
import signal
import tempfile

# Small models are as fast on one core, and the tests, with the programs they start, run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers is more processes that import torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where more are asked for, none may take a core to wait on it

import pytest
from hypothesis import settings

if os.environ.get("ATEN_CPU_CAPABILITY") == "default":  # inductor uses vectors all the same, whose header is missing then
    import torch._inductor.config

    torch._inductor.config.cpp.simdlen = 1

# The cache of checked images is the user's; tests have their own.
os.environ["CONVNN_CACHE"] = tempfile.mkdtemp(prefix="convnn-tests-")
atexit.register(shutil.rmtree, os.environ["CONVNN_CACHE"], ignore_errors=True)

# Under nohup it is ignored, by the programs that the tests start too, and runs keep to that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ci")


# With tests of many seconds: of two processes, one would wait for the other if such a test came last.
SLOW = ("test_processes", "test_cuda", "test_transforms", "test_layers", "test_vit", "test_allconvnet", "test_train_eval")
SLOW += ("test_run_experiments", "test_resume", "test_cli", "test_local", "test_dataset", "test_stream")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def pytest_collection_finish(session):
    """Where tests are about to run, with their modules imported and nothing computed yet."""
    from tests.helpers import forked

    # Imported modules stay: garbage collection need not search them, nor run after every 700 objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    forked.start()


# torch and what needs it are imported in fixtures: the process that hands out tests to others does without.
@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["cpu dense", "cpu bags", "cpu gathered", "chunked"])
def backend(request, monkeypatch):
    """Every way in which the operators can compute here: a test that takes this fixture runs once for each."""
    import kernels.cpu
    from kernels.backend import use

    device, _, strategy = request.param.partition(" ")
    if strategy:
        monkeypatch.setattr(kernels.cpu, "_dense_pays", lambda index, tokens: strategy == "dense")
        if strategy == "gathered":
            monkeypatch.setattr(kernels.cpu, "_bag_width", lambda values, index: 0)
    with use("auto" if device == "cpu" else device):
        yield request.param


@pytest.fixture
def quick_results():
    """Runs of both programs without what takes most of a short one, its picture and the latency of its model, and on any
    machine without a line of progress.

    Both have tests of their own, and so have runs that make them.
    """
    from runs.files import write_atomically

    with pytest.MonkeyPatch.context() as patch:  # which outlasts a test's own monkeypatch.undo()
        patch.setattr("runs.folder.draw_curves", lambda history, path: write_atomically(path, b"a picture"))
        patch.setattr("runs.folder.measure_latency", lambda model, image: 1.0)
        patch.setattr("runs.progress.Progress.LINE_EVERY", math.inf)  # no line on stderr where a machine is slow
        yield
