"""The package `convnn`: forwarding in a checkout, and built, installed and used in a folder that has modules of our names."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convnn
import vit_main
from options.layers import LAYERS1D_ROWS, LAYERS2D_ROWS

ROOT = Path(__file__).parent.parent
MIXER = """
from convnn import MultiHeadKvtAttention

class MyMixer(MultiHeadKvtAttention):
    pass
"""
TINY = (
    "--dataset digits --patch_size 4 --resize 8 --num_layers 1 --num_heads 2 --d_model 8 --d_mlp 8 --K 3 --num_epochs 1".split()
)
TINY += ["--train_limit", "64", "--test_limit", "64", "--layer", "mine.py:MyMixer"]


@pytest.fixture
def flat_layout(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    return importlib.import_module("flat_layout")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of a user, with modules that have the names of ours."""
    for name in ("utils.py", "dataset.py", "vit.py", "models/__init__.py", "mixers/__init__.py"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("THEIRS = True")
    (tmp_path / "project" / "mine.py").write_text(MIXER)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


# --- a checkout ------------------------------------------------------------------------------------------------------


def test_every_public_name_is_that_of_its_module():
    for name, module in convnn._MODULES.items():
        assert getattr(convnn, name) is getattr(importlib.import_module(module), name)
    assert len(convnn.__all__) > 50 and set(convnn.__all__) < set(dir(convnn))
    with pytest.raises(AttributeError, match="module 'convnn' has no attribute 'ConvNN3d'"):
        _ = convnn.ConvNN3d
    with pytest.raises(ImportError, match="cannot import name 'ConvNN3d' from 'convnn'"):
        from convnn import ConvNN3d  # noqa: F401


def test_names_of_options_come_without_torch_and_from_a_checkout_that_is_not_on_the_path(tmp_path):
    (tmp_path / "convnn").symlink_to(ROOT / "convnn")
    code = "import sys; from convnn import NeighborConfig; print(NeighborConfig(K=3).K, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_the_version_is_in_the_change_log():
    assert f"\n## {convnn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_extras_are_among_the_packages_of_the_tests():
    """Their lowest versions are those that the tests may run on; transformers is not tested everywhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {line for name, lines in project["optional-dependencies"].items() if name != "huggingface" for line in lines}
    assert extras <= set((ROOT / "requirements-dev.txt").read_text().split())


# --- the build -------------------------------------------------------------------------------------------------------


def test_imports_move_and_nothing_else(flat_layout):
    source = """
import math, torch.utils.data
from utils import keys
from utils.data import nothing_of_ours  # a comment from utils import keys
from torch.utils import data
from options.fields import (
    option,
)
é = "é"; from kernels import cuda
def late():
    from runs import RunError
    return "from utils import keys", "layers2d:ConvNN2d", ["mixers.graph:GraphMixer", "--layer utils:x y", "other:Class"]
"""
    names = {"utils", "options", "kernels", "runs", "layers2d", "mixers"}
    moved = source
    for old in ("utils import keys\n", "utils.data", "options.fields", "kernels import", "runs import"):
        moved = moved.replace(f"\nfrom {old}", f"\nfrom convnn.{old}").replace(f" from {old}", f" from convnn.{old}")
    moved = moved.replace("a comment from convnn.", "a comment from ")
    for old in ("layers2d:", "mixers.graph:"):
        moved = moved.replace(f'"{old}', f'"convnn.{old}')
    assert flat_layout.move_imports(source, names) == moved
    assert moved.count("convnn.") == 7
    for line in ("import utils", "import math, options.fields as fields"):
        with pytest.raises(ValueError, match=r"a\.py:1: write `from module import name`"):
            flat_layout.move_imports(line, names, "a.py")


def test_every_import_of_the_moved_modules_leads_to_one(flat_layout, tmp_path):
    flat_layout.move_into_package(ROOT, tmp_path / "convnn")
    names = {path.stem for path in flat_layout.flat_modules(ROOT)}
    assert len(names) > 20
    for path in (one for one in tmp_path.rglob("*.py*") if one.suffix in (".py", ".pyi")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                first, place = node.module.split(".")[0], tmp_path / node.module.replace(".", "/")
                assert first not in names, f"{path.name}:{node.lineno}"
                assert first != "convnn" or place.is_dir() or place.with_suffix(".py").exists(), f"{path.name}:{node.lineno}"
    table = (tmp_path / "convnn" / "options" / "layers.py").read_text()
    for row in (*LAYERS1D_ROWS.values(), *LAYERS2D_ROWS.values()):
        assert f'"convnn.{row.target}"' in table


PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target"]
BUILD = "import flat_layout; flat_layout.build_sdist(r'{0}')"
# Code that the installed package runs in a folder with modules of our names.
DRIVER = """
import runpy, sys
import convnn
values = [getattr(convnn, name) for name in convnn.__all__]
assert all(value.__module__.startswith(("convnn.", "types")) for value in values), values
import dataset, mixers, models, utils, vit
assert all(one.THEIRS for one in (dataset, mixers, models, utils, vit))
import pytest
assert pytest.main(["tests", "-k", "by_location or all_neighbors", "-x", "-q", "-p", "no:cacheprovider"]) == 0
from convnn.runs import folder
folder.draw_curves = folder.measure_latency = lambda *_: None  # they take seconds
sys.argv = ["convnn", "vit_main", *sys.argv[1:]]
runpy.run_module("convnn", run_name="__main__", alter_sys=True)
"""
SEEDED = """
import pytest, torch

@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
"""


def test_installed(tmp_path, project, flat_layout):
    run = {"check": True, "capture_output": True, "text": True}
    built, site, version = tmp_path / "built", tmp_path / "site", convnn.__version__
    path = {"PYTHONPATH": str(ROOT / "build_backend"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", BUILD.format(built)], cwd=ROOT, env=path, **run)
    subprocess.run([*PIP, site, built / f"convnn-{version}.tar.gz"], env=path, **run)
    assert {one.name for one in site.iterdir()} == {"bin", "convnn", f"convnn-{version}.dist-info"}
    # A wheel of the source distribution, whose modules have moved, is one of the checkout.
    flat_layout.move_into_package(ROOT, tmp_path / "moved")
    installed, moved = (
        {one.relative_to(root): one.read_bytes() for one in root.rglob("*") if one.is_file()}
        for root in (site / "convnn", tmp_path / "moved")
    )
    assert installed == moved
    metadata = (site / f"convnn-{version}.dist-info" / "METADATA").read_text()
    for name in ("py.typed", "__init__.pyi", "data/digits.npz", "configs/demo.yaml", "experiments/explorer.html"):
        assert (site / "convnn" / name).exists()
    for line in (ROOT / "requirements.txt").read_text().split():
        assert f"\nRequires-Dist: {line}\n" in metadata
    assert f"\nVersion: {version}\n" in metadata

    names = {one.stem for one in flat_layout.flat_modules(ROOT)}
    for name in ("__init__.py", "test_layers.py", "helpers/__init__.py", "helpers/naive.py", "helpers/side_by_side.py"):
        (project / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "tests" / name).write_text(flat_layout.move_imports((ROOT / "tests" / name).read_text(), names))
    (project / "tests" / "conftest.py").write_text(SEEDED)
    env = path | {"PYTHONPATH": str(site), "CONVNN_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", DRIVER, *TINY], env=env, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MyMixer on digits" in done.stdout and "best test top-1" in done.stdout
    assert f"layer: {project}/mine.py:MyMixer" in (project / "Output/ViT/MyMixer/config.yaml").read_text()


def test_a_program_of_the_checkout_uses_the_modules_of_the_checkout(project, tmp_path, monkeypatch, flat_layout, quick_results):
    """With both, a file that imports from the package gets the modules of the program: operators cannot register twice."""
    flat_layout.move_into_package(ROOT, tmp_path / "site" / "convnn")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(tmp_path / "site")])
    assert vit_main.main(TINY) == 0
    (mine,) = (module for module in sys.modules.values() if getattr(module, "__file__", None) == str(project / "mine.py"))
    assert mine.MultiHeadKvtAttention is convnn.MultiHeadKvtAttention is sys.modules["layers1d"].MultiHeadKvtAttention
    assert not any(name.startswith("convnn.") for name in sys.modules)
