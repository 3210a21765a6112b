import os

# Small models are as fast on one core, and the tests, with the programs they start, run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
