"""Values read from files, and the encoding of text."""

import ast
import os
from pathlib import Path

import pytest

import predict
import run_experiments
import visualize
from options.reading import open_regular, path_problem, read_at_most, read_text
from options.runs import PROGRAMS, oversized_default, parse_options

ROOT = Path(__file__).parent.parent.parent


def opens_text(call: ast.Call) -> bool:
    """Tell from its source if a call opens a file as text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name in ("read_text", "write_text"):
        return name != "read_text" or isinstance(call.func, ast.Attribute)
    if name not in ("open", "fdopen") or owner in ("gzip", "Image", "tarfile", "storage") or (owner == "os" and name == "open"):
        return False
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    modes += [word.value.value for word in call.keywords if word.arg == "mode"]
    return not any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes)


def test_text_is_utf8_whatever_the_locale():
    sources = [path for pattern in ("*.py", "[a-z]*/*.py") for path in ROOT.glob(pattern) if "tests" not in path.parts]
    assert len(sources) > 40
    calls = [
        (path.name, call.lineno, [word.arg for word in call.keywords])
        for path in sources
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and opens_text(call)
    ]
    assert calls and not [call for call in calls if "encoding" not in call[2]]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "gone", "/dev/zero", "a\0b"):
        with pytest.raises(OSError) as error:
            open_regular(path)
        assert error.value.strerror


def test_no_more_is_read_than_is_wanted(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    for most, expected in ((0, b""), (3, b"123"), (5, b"12345"), (10**18, b"12345")):
        with open_regular(tmp_path / "file") as file:
            assert read_at_most(file, most) == expected
    assert read_text(tmp_path / "file", 5) == "12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_text(tmp_path / "file", 4)


def test_what_is_wrong_with_a_path(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "link").symlink_to("file")
    for good in ("", "new", "new/deeper", "file", "link"):
        assert path_problem(str(tmp_path / good)) is None
    for bad, says in [
        ("loop", "symbolic links"),
        ("loop/below", "symbolic links"),
        ("dangling", "gone, which does not exist"),
        ("dangling/below", "gone, which does not exist"),
        ("file/below", "a file"),
        ("x" * 300, "too long"),
    ]:
        assert says in path_problem(str(tmp_path / bad)), bad


@pytest.mark.parametrize("flag", ["--output_dir", "--data_path", "--export"])
def test_paths_that_nothing_can_be_at_are_refused_with_their_flag(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop.onnx").symlink_to("loop.onnx")
    Path("dangling.onnx").symlink_to("gone")
    for value in ("loop.onnx", "dangling.onnx", "caf\udce9.onnx", "nul\0.onnx", "line\nbreak.onnx", "x" * 300 + ".onnx"):
        with pytest.raises(SystemExit) as stop:
            parse_options(PROGRAMS["allconvnet_main.py"], "Train.", ["--dataset", "digits", "--K", "4", flag, value])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and f"error: {flag[2:]}=" in err, err
    assert sorted(os.listdir()) == ["dangling.onnx", "loop.onnx"]


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "c.yaml").write_text("data_path: ~/data\nexport: ~/a.onnx\n")
    line = ["--config=~/c.yaml", "--output_dir=~/run", "--checkpoint=~/w.pt"]
    options = parse_options(PROGRAMS["allconvnet_main.py"], "Train.", line)[0]
    found = [options.data.data_path, *(getattr(options.train, name) for name in ("export", "output_dir", "checkpoint"))]
    assert found == [str(tmp_path / name) for name in ("data", "a.onnx", "run", "w.pt")]
    for module, line in (
        (predict, ["--run=~/run", "--output=~/run", "~/run"]),
        (visualize, ["confusion", "--output=~/run", "~/run"]),
        (run_experiments, ["x.yaml", "--output_dir=~/run", "--published=~/run"]),
    ):
        given = vars(module.make_parser().parse_args(line)).values()
        paths = [path for value in given for path in (value if isinstance(value, list) else [value]) if isinstance(path, Path)]
        assert len(paths) >= 2 and set(paths) == {tmp_path / "run"}


def test_the_default_network_warns_of_images_that_it_is_too_large_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def warned(line: str) -> str:
        options, parser = parse_options(PROGRAMS["allconvnet_main.py"], "Train.", line.split())
        return "".join(f"warning: {line}\n" for line in oversized_default(options.model, parser.given))

    for line in ("--dataset digits", "--dataset cifar10 --resize 8"):
        err = warned(line)
        assert err.count("\n") == 1 and "warning: " in err and "8 x 8" in err and "--channels 16 32 64" in err
    for line in (
        "",
        "--dataset mnist",
        "--dataset digits --channels 16 32 64",
        "--dataset digits --channels 32 64 128 256 512",
    ):
        assert warned(line) == ""
