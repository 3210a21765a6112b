"""Fixtures of the tests of options."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory: no ./Data, and what is written shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
