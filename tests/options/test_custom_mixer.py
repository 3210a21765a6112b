"""Layers by the address of a class: what becomes an option, what a run notes, and every mistake in one line."""

import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import allconvnet_main
import benchmark
import run_experiments
import visualize
import vit_main
from allconvnet import AllConvNet
from launch.probe import probe, trials
from models.build import build_network
from options.allconvnet import AllConvNetConfig
from options.layers import layer_label, layers_of
from options.runs import PROGRAMS, parse_options, unused_options
from options.vit import ViTConfig
from vit import ViT

HEAD = """
from __future__ import annotations
from typing import Literal, Optional
import torch
from torch import nn
from layers1d import MultiHeadAttention, MultiHeadKvtAttention
"""
# Attention with every kind of option; `layout` and `window_size` come from the model.
KINDS = '''
class Kinds(MultiHeadAttention):
    """Attention that takes notes.

    Args:
        steps: how often
        rate (float): how fast
    """

    def __init__(self, d_model, num_heads, *, layout, window_size: int = 3, steps: int = 2, rate: float = 1, on: bool = False,
                 name: str = "", kind: Literal["a", "b"] = "a", most: Optional[int] = None,
                 sizes: tuple[int, ...] = (1, 2), names: tuple[str, ...] | None = None,
                 attention_dropout: float = 0.0, bias: bool = True):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        self.got = dict(window_size=window_size, steps=steps, rate=rate, on=on, name=name, kind=kind, most=most,
                        sizes=sizes, names=names)
'''
KVT = """
class Kvt(MultiHeadKvtAttention):
    def __init__(self, d_model, num_heads, *, top: int = 5, attention_dropout: float = 0.0, bias: bool = True):
        super().__init__(d_model, num_heads, top, attention_dropout=attention_dropout, bias=bias)
"""
MAP = """
class Scaled(nn.Conv2d):
    def __init__(self, in_channels, out_channels, *, kernel_size=5, scale: float = 1.0):
        super().__init__(in_channels, out_channels, kernel_size, padding="same")
        self.scale = scale
    def forward(self, x):
        return self.scale * super().forward(x)
class Wide(Scaled):
    def __init__(self, in_channels, out_channels, *, kernel_size, dilation: int = 2, scale: float = 3.0):
        super().__init__(in_channels, out_channels, kernel_size=kernel_size, scale=scale)
"""
TINY = "--dataset digits --num_epochs 1 --train_limit 20 --test_limit 10 --batch_size 10 --device cpu"
VIT = f"{TINY} --resize 8 --patch_size 4 --num_layers 1 --num_heads 2 --d_model 8 --d_mlp 8"
MAPS = f"{TINY} --channels 4 --kernel_size 3"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory; what a file of somebody adds to sys.path and sys.modules goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine.py").write_text(HEAD + KINDS + KVT + MAP)
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def vit(layer, *mixer_option, **values):
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "d_model": 8, "d_mlp": 8}
    return ViTConfig(layer=layer, mixer_option=mixer_option or None, **sizes | values)


def line_of(call, line, capsys):
    """The line that a command line ends in, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        call(line.split() if isinstance(line, str) else line)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1, out + err
    return err.strip()


# --- addresses ------------------------------------------------------------------------------------------------------


def test_names_and_addresses_are_told_apart():
    for parts in itertools.product(["Conv2d", "a.py:M", "b/c.py:M", "/d/e.py:M", "p.q:M", "./Conv2d/f.py:M"], repeat=2):
        assert layers_of("/".join(parts)) == list(parts)
        assert layers_of(parts[0]) == [parts[0]]
    assert layers_of("Conv2d/Attention/ConvNN") == ["Conv2d", "Attention", "ConvNN"]
    assert layers_of("a.py:M/b.py:N/Conv2d") == ["a.py:M", "b.py:N", "Conv2d"]
    assert layer_label("Conv2d//a/b.py:M") == "Conv2d/M" and layer_label("ConvNN") == "ConvNN"


def test_a_class_by_path_is_the_class_and_by_name_too(folder):
    """As the built-in layer it inherits from: the same numbers from one seed."""
    shutil.copytree(folder, folder / "sub" / "pack")
    (folder / "sub" / "pack" / "__init__.py").touch()
    Path("sub/pack/other.py").write_text("from .mine import Kvt\n")
    images = torch.randn(2, 3, 8, 8)

    def logits(config):
        torch.manual_seed(0)
        return ViT(config)(images)

    expected = logits(vit("KvtAttention", K=4))
    assert torch.equal(logits(vit("mine.py:Kvt", "top=4")), expected)
    assert torch.equal(logits(vit(f"{folder}/sub/pack/mine.py:Kvt", "top=4")), expected)
    sys.path.append(f"{folder}/sub")
    configs = [vit("pack.mine:Kvt", "top=4"), vit("pack.other:Kvt", "top=4"), vit("mine.py:Kvt", "top=4")]
    assert all(torch.equal(logits(config), expected) for config in configs)
    assert len({config.layer_sha256 for config in configs}) == 1  # of the file that defines the class
    assert configs[0].layer == "pack.mine:Kvt" and configs[2].layer == f"{folder}/mine.py:Kvt"
    assert not torch.equal(logits(vit("mine.py:Kvt", "top=3")), expected)


def test_neighbors_of_the_file_and_names_of_the_project():
    """A file may be called as a module that is there; what lies beside it can be imported, and so can the project."""
    Path("beside_it.py").write_text("from layers1d import MultiHeadAttention as Base")
    Path("vit.py").write_text("from beside_it import Base\nclass Mine(Base): pass")
    config = vit("vit.py:Mine")
    assert type(ViT(config).blocks[0].mixer).__name__ == "Mine" and sys.modules["vit"].ViT is ViT


def test_a_file_that_changes_is_read_anew():
    first = vit("mine.py:Kvt")
    Path("mine.py").write_text((HEAD + KVT).replace("top: int = 5", "top: int = 3"))
    second = vit("mine.py:Kvt")
    tops = [ViT(config).blocks[0].mixer.K for config in (first, second)]
    assert tops == [5, 3] and first.layer_sha256 != second.layer_sha256


# --- options --------------------------------------------------------------------------------------------------------


def test_arguments_become_options_of_their_kind():
    got = ViT(vit("mine.py:Kinds", window_size=7)).blocks[0].mixer.got
    defaults = {"steps": 2, "rate": 1, "on": False, "name": "", "kind": "a", "most": None}
    assert got == {"window_size": 7, "sizes": (1, 2), "names": None} | defaults
    given = ["steps=4", "rate=1e-3", "on=true", "name=x=y", "kind=b", "most=3", "sizes=5", "names=a, b"]
    config = vit("mine.py:Kinds", *given)
    values = {"steps": 4, "rate": 1e-3, "on": True, "name": "x=y", "kind": "b", "most": 3}
    values |= {"window_size": 16, "sizes": (5,), "names": ("a", "b")}
    assert ViT(config).blocks[0].mixer.got == values
    assert type(ViT(vit("mine.py:Kinds", "rate=2")).blocks[0].mixer.got["rate"]) is float
    # Written out they give the same again, defaults as well: an empty text, None, several values.
    for one in (config, vit("mine.py:Kinds")):
        again = vit("mine.py:Kinds", *yaml.safe_load(yaml.safe_dump([*one.mixer_option])))
        assert again == one and ViT(again).blocks[0].mixer.got == ViT(one).blocks[0].mixer.got
    assert vit("mine.py:Kinds", "most=3", "most=none").mixer_option == vit("mine.py:Kinds").mixer_option


def test_flags_add_to_a_file_and_another_class_drops_what_is_not_its_own():
    Path("c.yaml").write_text("layer: mine.py:Kinds\nmixer_option: [steps=4, rate=0.5]\nlayer_sha256: abc")

    def options(*argv):
        return set(parse_options(PROGRAMS["vit_main.py"], "", ["--config", "c.yaml", *argv])[0].model.mixer_option or ())

    same = ["--layer", "mine.py:Kinds"]  # and so the hash of the file is not asked for
    assert {"steps=4", "rate=0.5"} <= options(*same)
    assert {"steps=7", "rate=0.5", "kind=b"} <= options(*same, "--mixer_option", "steps=7", "--mixer_option", "kind=b")
    assert options("--layer", "mine.py:Kvt") == {"top=5"} and options("--layer", "Attention") == set()


def test_what_the_model_gives_is_not_an_option_and_help_says_so(capsys):
    with pytest.raises(SystemExit):
        vit_main.main(["--layer", "mine.py:Kinds", "--help"])
    text = " ".join(capsys.readouterr().out.split("options of ")[-1].split())
    assert "Attention that takes notes. The model passes layout, --window_size, --attention_dropout, " in text
    assert "--attention_bias (as bias). --mixer_option" in text
    for line in ("steps=INT how often (default: 2)", "rate=FLOAT how fast (default: 1)", "kind={a,b} (default: a)"):
        assert f"--mixer_option {line}" in text
    assert "sizes=INT,INT,... (default: 1,2)" in text


def test_two_side_by_side_and_an_option_of_both():
    def scales(layer, *options):
        config = AllConvNetConfig(layer=layer, mixer_option=options or None, channels=(4, 6), image_size=8)
        return config, [m.scale for m in AllConvNet(config).modules() if hasattr(m, "scale")]

    assert scales("mine.py:Scaled/Conv2d", "scale=2")[1] == [2, 2]
    config, found = scales("mine.py:Scaled/mine.py:Wide")
    assert found == [1, 3, 1, 3] and config.mixer_option == ("dilation=2",)  # of scale each keeps its own default
    config, found = scales("mine.py:Scaled/mine.py:Wide", "scale=2")
    assert found == [2, 2, 2, 2] and set(config.mixer_option) == {"scale=2.0", "dilation=2"}
    assert config.layer_sha256.count("/") == 1
    assert AllConvNet(config)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_flags_that_the_class_does_not_read_are_named(capsys):
    line = "--layer mine.py:Kinds --window_size 4 --attention_dropout 0.2 --K 3"
    resolved, parser = parse_options(PROGRAMS["vit_main.py"], "", line.split())
    for line in unused_options(resolved, parser.given):
        parser.warn(line)
    assert capsys.readouterr().err.count("warning") == 1 and resolved.model.without_effect()["K"] == "layer"


# --- mistakes -------------------------------------------------------------------------------------------------------

# A class, options beside it, and what the line must say.
SIGNATURES = [
    ("class M: pass", "", "there is no torch.nn.Module 'M' in"),
    ("M = 3", "", "there is no torch.nn.Module 'M' in"),
    (
        "class M(nn.Module):\n def __init__(self, d_model, *, heads=3): pass",
        "",
        "does not take d_model and num_heads by position",
    ),
    ("class M(nn.Module): pass", "", "does not take d_model and num_heads by position"),
    ("class M(nn.Module):\n def __init__(self, in_channels, out_channels): pass", "", "is a mixer for allconvnet_main.py"),
    ("class M(nn.Module):\n def __init__(self, d, h, *, need: int): pass", "", "argument need of M has no default"),
    ("class M(nn.Module):\n def __init__(self, d, h, *, free=1): pass", "", "has no annotation; write free: type = 1"),
    ("class M(nn.Module):\n def __init__(self, d, h, *, f: nn.Module = None): pass", "", "its annotation is Module"),
    ("class M(nn.Module):\n def __init__(self, d, h, *, f: dict[str, int] = None): pass", "", "cannot be an option"),
    ("class M(nn.Module):\n def __init__(self, d, h, *, f: Nothing = 1): pass", "", "cannot be evaluated (name 'Nothing'"),
    (
        "class M(nn.Module):\n def __init__(self, d, h, *, f: int = 0.5): pass",
        "",
        "has the default 0.5, which does not match its annotation",
    ),
    ("class M(nn.Module):\n def __init__(self, d, h, **kwargs): pass", "", "takes **kwargs; name every argument"),
    ("def f(:", "", "cannot be imported: SyntaxError: invalid syntax (m.py, line 7)"),
    ("x = 1\ny = 1 / 0", "", "cannot be imported: ZeroDivisionError: division by zero (m.py, line 8)"),
    ("import no_such_module", "", "ModuleNotFoundError: No module named 'no_such_module' (m.py, line 7)"),
    ("import sys; sys.exit(3)", "", "cannot be imported: SystemExit: 3 (m.py, line 7)"),
    ("class N(nn.Module): pass", "", "there is no torch.nn.Module 'M' in"),
]
OPTIONS = [
    ("vit_main.py", "mine.py:Kinds", "stepz=1", "--mixer_option 'stepz=1': Kinds has no option stepz; did you mean steps?"),
    ("vit_main.py", "mine.py:Kinds", "steps=many", "'steps=many': steps='many' is not a whole number"),
    ("vit_main.py", "mine.py:Kinds", "on=maybe", "is not True or False"),
    ("vit_main.py", "mine.py:Kinds", "rate=nan", "is not a finite number"),
    ("vit_main.py", "mine.py:Kinds", "kind=c", "kind='c' is not one of a, b"),
    ("vit_main.py", "mine.py:Kinds", "sizes=1,x", "'x' is not a whole number"),
    ("vit_main.py", "mine.py:Kinds", "steps", "--mixer_option 'steps' is not name=value"),
    ("vit_main.py", "mine.py:Kinds", "window_size=3", "Kinds gets window_size from --window_size"),
    ("vit_main.py", "mine.py:Kinds", "bias=False", "Kinds gets bias from --attention_bias"),
    ("vit_main.py", "mine.py:Kinds", "layout=1", "Kinds gets layout from the model"),
    ("vit_main.py", "Attention", "steps=1", "mixer_option steps=1 needs a custom mixer"),
    ("allconvnet_main.py", "Conv2d/ConvNN", "steps=1", "mixer_option steps=1 needs a custom mixer"),
    ("vit_main.py", "min.py:Kinds", "", "there is no file"),
    ("vit_main.py", "min.py:Kinds", "", "did you mean mine?"),
    ("vit_main.py", "mine.py:Kind", "", "there is no torch.nn.Module 'Kind' in"),
    ("vit_main.py", "mine.py", "", "must name the class too: mine.py:Class"),
    ("allconvnet_main.py", "./mine.py", "", "must name the class too: ./mine.py:Class"),
    ("vit_main.py", "Mine", "", "a custom mixer is FILE.py:Class"),
    ("vit_main.py", "no.such:Kinds", "", "no.such cannot be imported: ModuleNotFoundError: No module named 'no'"),
    ("vit_main.py", "no such:Kinds", "", "an address is FILE.py:Class or package.module:Class"),
    ("vit_main.py", ":Kinds", "", "an address is FILE.py:Class or package.module:Class"),
    ("vit_main.py", "mine.py:", "", "there is no torch.nn.Module ''"),
    ("vit_main.py", "Attention/mine.py:Kinds", "", "must be one layer"),
    ("allconvnet_main.py", "mine.py:Scaled/mine.py:Scaled", "", "A/B of two different ones"),
    ("allconvnet_main.py", "Conv2d/mine.py:Kinds", "", "is a mixer for vit_main.py"),
    ("allconvnet_main.py", "mine.py:Scaled/Performer", "", "is not one of Conv2d, ConvNN"),
]


def parse(program):
    return lambda argv: parse_options(PROGRAMS[program], "", argv)


@pytest.mark.parametrize(("code", "line", "message"), SIGNATURES, ids=[message for *_, message in SIGNATURES])
def test_a_class_that_cannot_be_a_mixer(code, line, message, capsys):
    Path("m.py").write_text(HEAD + code)
    said = line_of(parse("vit_main.py"), f"--layer m.py:M {line}", capsys)
    assert "error: layer='" in said and "m.py:M'" in said and message in said


@pytest.mark.parametrize(("program", "layer", "option", "message"), OPTIONS, ids=[f"{one[1]} {one[2]}" for one in OPTIONS])
def test_an_address_or_an_option_that_is_wrong(program, layer, option, message, capsys):
    argv = ["--layer", layer, *(["--mixer_option", option] if option else [])]
    assert message in line_of(parse(program), argv, capsys)


def test_a_file_that_is_none(folder, capsys):
    Path("d.py").mkdir()
    Path("bytes.py").write_bytes(b"\xff\0")
    os.mkfifo("pipe.py")
    for name, message in [("d.py", "Is a directory"), ("bytes.py", "cannot be imported"), ("pipe.py", "not a regular file")]:
        assert message in line_of(parse("vit_main.py"), f"--layer {name}:M", capsys)


FORWARD = "class M(nn.Module):\n def __init__(self, d_model, num_heads, *, size: int = 0):\n  super().__init__(); "
FORWARD += "self.linear = nn.Linear(d_model, d_model + size)\n def forward(self, x, output_attentions=False):\n  "
# Bodies of forward, and the words of the error line.
TRIALS = [
    ("return self.linear(x)", "", "gave (2, 5, 8) for forward(x, True); under output_attentions it must give a pair"),
    ("return self.linear(x)", "size=1", "gave (2, 5, 9) for forward of (2, 5, 8); it must give (2, 5, 8)"),
    ("return self.linear(x), None", "", "gave a tuple of 2 for forward"),
    ("return None", "", "gave a NoneType for forward"),
    ("return self.linear(x).int()", "", "of torch.int32 for forward"),
    ("return self.linear(x).log()", "", "numbers that are not finite"),
    ("return x @ x", "", "M fails in forward: RuntimeError: "),
    ("return x.no_such", "", "object has no attribute 'no_such' (m.py, line 11)"),
    ("return (x, x) if output_attentions else self.linear(x)", "", "gave (2, 5, 8) for the matrix of forward(x, True)"),
    ("return (x[:1], None) if output_attentions else self.linear(x)", "", "gave (1, 5, 8) for forward(x, True)[0]"),
    ("return self.linear(x)", "size=-9", "M cannot be made: "),
]


@pytest.mark.parametrize(("body", "option", "message"), TRIALS, ids=[f"{body} {option}" for body, option, _ in TRIALS])
def test_a_mixer_that_cannot_train_is_told_before_data_is_read(body, option, message, capsys):
    Path("m.py").write_text(HEAD + FORWARD + body)
    argv = [*"--layer m.py:M --dataset cifar10 --download False".split(), *VIT.split()[2:]]  # which is not there
    said = line_of(vit_main.main, [*argv, *(["--mixer_option", option] if option else [])], capsys)
    assert "error: --layer /" in said and "m.py:M: M " in said and message in said
    assert not Path("Output").exists()


def test_a_map_of_another_size(capsys):
    code = (
        "class M(nn.Conv2d):\n def __init__(self, in_channels, out_channels):\n  super().__init__(in_channels, out_channels, 3)"
    )
    Path("m.py").write_text(HEAD + code)
    said = line_of(allconvnet_main.main, f"--layer Conv2d/m.py:M {MAPS}", capsys)
    assert "M gave (2, 2, 6, 6) for forward of (2, 1, 8, 8); it must give (2, 2, 8, 8)" in said


def test_a_trial_changes_nothing():
    config = AllConvNetConfig(layer="mine.py:Scaled", channels=(4,), image_size=8)
    state = torch.get_rng_state()
    assert probe(config, torch.device("cpu")) == [] and torch.equal(torch.get_rng_state(), state)
    assert probe(AllConvNetConfig(channels=(4,), image_size=8), torch.device("cpu")) == []


def test_each_place_of_a_host_is_tried():
    values = {"model": "resnet18", "image_size": 8, "in_channels": 1, "replace": ("stages", "1", "2")}
    config = AllConvNetConfig(layer="mine.py:Scaled", **values)
    assert [(trial.given[1:], trial.wanted[1:]) for trial in trials(config)] == [
        ((1, 8, 8), (64, 8, 8)),
        ((64, 8, 8), (64, 8, 8)),
        ((64, 8, 8), (128, 4, 4)),  # with a stride, which the class does not know
        ((128, 4, 4), (128, 4, 4)),
    ]
    assert probe(config, torch.device("cpu")) == []
    # As the host has it: the layer of every such place is the class.
    layers = [module for module in build_network(config).modules() if type(module).__name__ == "Scaled"]
    assert [layer.weight.shape[:2] for layer in layers] == [(64, 1), *[(64, 64)] * 4, (128, 64), *[(128, 128)] * 3]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_results")
def test_a_checkpoint_goes_with_the_content_of_the_file(folder, monkeypatch, capsys):
    run = f"--layer mine.py:Kvt --mixer_option top=3 {VIT}".split()
    assert vit_main.main(run) == 0
    best, config = "Output/ViT/Kvt/best.pt", ["--config", f"{folder}/Output/ViT/Kvt/config.yaml"]
    noted = torch.load(best, weights_only=True)["config"]
    assert noted["layer"] == f"{folder}/mine.py:Kvt" and noted["mixer_option"] == ["top=3"]
    # From another folder, and where the file has moved to.
    (folder / "elsewhere").mkdir()
    shutil.copy("mine.py", "elsewhere/moved.py")
    monkeypatch.chdir(folder / "elsewhere")
    here = ["--output_dir", f"{folder}/Output/ViT/Kvt"]
    assert vit_main.main([*config, *here, "--resume", "--num_epochs", "2"]) == 0
    moved = ["--layer", "moved.py:Kvt"]
    assert vit_main.main([*config, *here, *moved, "--resume", "--num_epochs", "3"]) == 0
    assert vit_main.main([*moved, "--dataset", "digits", "--test_only", *here]) == 0
    assert "resumed" in capsys.readouterr().out

    monkeypatch.chdir(folder)
    for path in ("mine.py", "elsewhere/moved.py"):
        Path(path).write_text(Path(path).read_text() + "# another content\n")
    capsys.readouterr()
    refused = [
        [*config, "--resume", "--num_epochs", "4"],
        [*run, "--resume"],
        [*config, "--test_only"],
        ["--test_only", "--checkpoint", best],
        [*run[:4], "--test_only", "--checkpoint", best],
        [*run, "--checkpoint", best, "--output_dir", "new"],
    ]
    for argv in refused:
        said = line_of(vit_main.main, argv, capsys)
        assert noted["layer_sha256"] in said and "former content" in said, said
    said = line_of(visualize.main, ["attention", "Output/ViT/Kvt"], capsys)
    assert noted["layer_sha256"] in said
    override = ["--test_only", "--override", "--checkpoint", best, "--output_dir", "new"]
    assert "--trust_code" in line_of(vit_main.main, override, capsys)
    assert vit_main.main([*override, "--trust_code"]) == 0
    out, err = capsys.readouterr()
    assert "test top-1" in out and err.count("\n") == 1 and noted["layer_sha256"] in err and "warning: --override" in err
    assert vit_main.main(["--layer", "mine.py:Kvt", *config, "--output_dir", "new", "--overwrite"]) == 0  # a new run


@pytest.mark.usefixtures("quick_results")
def test_a_parameter_without_gradient_is_a_line(monkeypatch, capsys):
    code = (
        "class M(MultiHeadAttention):\n def make_projection(self, d_model, bias):\n  super().make_projection(d_model, bias)\n"
    )
    Path("m.py").write_text(f"{HEAD}{code}  self.unused = nn.Linear(2, 2)\n")
    assert vit_main.main(f"--layer m.py:M {VIT}".split()) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: --layer M: no gradient reaches unused.weight, unused.bias"]


@pytest.mark.usefixtures("quick_results")
def test_side_by_side_on_maps(capsys):
    assert allconvnet_main.main(f"--layer Conv2d/mine.py:Scaled --mixer_option scale=0.5 {MAPS}".split()) == 0
    assert (Path("Output/AllConvNet/Conv2d-Scaled") / "best.pt").exists()
    assert capsys.readouterr().out.startswith("Conv2d/Scaled on digits")
    assert allconvnet_main.main("--config Output/AllConvNet/Conv2d-Scaled/config.yaml --test_only".split()) == 0


def test_sweeps_name_points_by_classes_and_options(capsys):
    Path("other.py").write_text(HEAD + KVT)
    sweep = {"program": "vit_main.py", "options": {"dataset": "digits", "resize": 8, "patch_size": 2}}
    grid = [{"layer": "mine.py:Kvt", "mixer_option": ["top=3", "top=4"]}, {"layer": "mine.py:Kinds"}]
    Path("s.yaml").write_text(yaml.safe_dump(sweep | {"grid": grid}))
    assert run_experiments.main(["s.yaml", "--dry_run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["Kvt_top-3", "Kvt_top-4", "Kinds"]
    run = Path("Output/sweeps/s/Kvt_top-3")
    run.mkdir(parents=True)
    resolved = parse_options(PROGRAMS["vit_main.py"], "", "--layer other.py:Kvt --mixer_option top=3".split())[0].as_dict()
    (run / "config.yaml").write_text(yaml.safe_dump({"layer": resolved["layer"], "layer_sha256": resolved["layer_sha256"]}))
    assert f"holds a run with layer_sha256={resolved['layer_sha256']}" in line_of(
        run_experiments.main, "s.yaml --dry_run", capsys
    )
    for axes, message in [
        ({"layer": ["mine.py:Kvt", "other.py:Kvt"]}, "two points would be named Kvt"),
        ({"layer": ["mine.py:Kvt"], "mixer_option": ["tap=3"]}, "Kvt has no option tap; did you mean top?"),
        ({"layer": ["Attention", "mine.py:Kvt"], "mixer_option": ["top=3"]}, "needs a custom mixer"),
        ({"layer": ["mine.py:Kinds"], "mixer_option": ["rate=2", "rate=2.0"]}, "are the same run"),
    ]:
        Path("s.yaml").write_text(yaml.safe_dump(sweep | {"grid": axes}))
        assert message in line_of(run_experiments.main, "s.yaml --dry_run", capsys)


def test_benchmark_gives_each_layer_its_options(capsys):
    names = "Attention mine.py:Kvt mine.py:Kinds"
    _, _, configs = benchmark.parse(f"vit --layer {names} --mixer_option top=3 steps=4 --tokens 16".split())
    assert [config.mixer_option and config.mixer_option[0] for config in configs] == [None, "top=3", "steps=4"]
    for line, message in [
        (f"{names} --mixer_option tap=3", "Kvt has no option tap; did you mean top?"),
        ("Attention --mixer_option top=3", "needs a custom mixer"),
        ("mine.py:Kvt ./mine.py:Kvt", "two layers would be called Kvt"),
    ]:
        assert message in line_of(benchmark.parse, f"vit --layer {line} --tokens 16", capsys)
    Path("m.py").write_text(HEAD + FORWARD + "return x[:1]")
    assert benchmark.main("vit --layer m.py:M --tokens 16 --repeats 1 --device cpu".split()) == 2
    assert "it must give (2, 16, 192)" in capsys.readouterr().err
