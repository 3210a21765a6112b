"""The models of other libraries in our loop: examples/compare_with_timm.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "examples" / "compare_with_timm.py"
LINE = "--dataset digits --resize 8 --patch_size 2 --num_heads 2 --num_layers 1 --d_mlp 8 --train_limit 32 --test_limit 20"


@pytest.fixture
def peers(monkeypatch):
    spec = importlib.util.spec_from_file_location("compare_with_timm", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_with_timm", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layer", ["timm", "vit-pytorch", "vit-pytorch-simple"])
def test_models_of_other_libraries_train(layer, peers, tmp_path, quick_results, capsys):
    pytest.importorskip(peers.PEERS[layer])
    words = f"{LINE} --layer {layer} --d_model 8 --num_epochs 1 --device cpu".split()
    assert peers.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    assert layer in capsys.readouterr().out and (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--layer timm --d_model 7", "num_heads=2 does not divide d_model=7"),
        ("--layer vit-pytorch-simple --d_model 6", "d_model=6 is not a multiple of 4"),
        ("--layer Attention", "layer='Attention' is not one of timm, vit-pytorch"),
        ("--layer vit-pytorch --d_model 8", "--layer vit-pytorch needs a package: pip install vit-pytorch"),
    ],
)
def test_what_is_wrong_is_one_line(line, says, peers, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vit_pytorch" else find(name, *more))
    with pytest.raises(SystemExit) as end:
        peers.main(f"{LINE} {line}".split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and says in error
