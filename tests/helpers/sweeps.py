"""Sweeps whose program takes no time, and their tables."""

import csv
from pathlib import Path

import yaml

from experiments import points


def make_sweep(tmp_path, monkeypatch, program: str, sweep: dict) -> None:
    """Write sweep.yaml into tmp_path, the current folder from now on, with a program that stands in for vit_main.py."""
    (tmp_path / "vit_main.py").write_text(program)
    monkeypatch.setattr(points, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))
