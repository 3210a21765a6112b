import math
import os

# Small models are as fast on one core, and the tests, with the programs they start, run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where more are asked for, none may take a core to wait on it

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def quick_results():
    """Runs of both programs without what takes most of a short one, its picture and the latency of its model, and on any
    machine without a line of progress.

    Both have tests of their own, and so have runs that make them.
    """
    import utils

    with pytest.MonkeyPatch.context() as patch:  # which outlasts a test's own monkeypatch.undo()
        patch.setattr(utils, "draw_curves", lambda history, path: utils.write_atomically(path, b"a picture"))
        patch.setattr(utils, "measure_latency", lambda model, image: 1.0)
        patch.setattr(utils.Progress, "LINE_EVERY", math.inf)  # no line on stderr where a machine is slow
        yield
