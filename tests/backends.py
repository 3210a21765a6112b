"""Every way in which the operators can compute here: a test that takes the fixture `backend` runs once for each."""

import pytest

import kernels.cpu
from kernels.backend import use

BACKENDS = ("cpu dense", "cpu bags", "cpu gathered", "chunked", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    device, _, strategy = request.param.partition(" ")
    if strategy:
        monkeypatch.setattr(kernels.cpu, "_dense_pays", lambda index, tokens: strategy == "dense")
        monkeypatch.setattr(kernels.cpu, "_has_bags", lambda: strategy != "gathered")
    with use("auto" if device == "cpu" else device):
        yield request.param
