"""Options of training."""

from pathlib import Path

import pytest

from options.training import KERNELS_IN_ENVIRONMENT
from tests.options.reference import assert_says, error_of, parse, values

pytestmark = pytest.mark.usefixtures("folder")


def test_a_variable_for_kernels_that_are_not_there_is_one_line(monkeypatch, capsys):
    from kernels.backend import BACKENDS

    assert KERNELS_IN_ENVIRONMENT == BACKENDS
    monkeypatch.setenv("CONVNN_KERNELS", "bad")
    assert_says(error_of(parse, "", capsys=capsys), "CONVNN_KERNELS='bad'; auto, chunked, triton, reference")


def test_checkpoints_by_suffix():
    for name in ("a.pt", "a.pth", "a.safetensors"):
        Path(name).touch()
        assert values(f"--checkpoint {name}")["checkpoint"] == name
    assert values("--export a.safetensors")["export"] == "a.safetensors"
