"""docs/extending.md, applied word by word to a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The project, with the mixer of the page; and how many lines each file has got."""
    folder = tmp_path_factory.mktemp("extended")
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml"):
            shutil.copy(path, folder)
        elif path.name in ("configs", "data") or (not path.name.startswith(".") and path.is_dir() and any(path.glob("*.py"))):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    added: dict[str, int] = {}
    place = r"(New file|In) `([\w.]+)`(?:, below the line that starts with `([^`]+)`)?"
    steps = re.findall(rf"\*\*\d\. The \w+\.\*\* {place}:\n\n```python\n(.*?)```", PAGE, flags=re.S)
    assert len(steps) == 3
    for how, name, anchor, code in steps:
        file = folder / name
        if how == "New file":
            assert not file.exists() and not anchor
            file.write_text(code)
        else:
            lines = file.read_text().splitlines(keepends=True)
            (below,) = [number for number, line in enumerate(lines, 1) if line.strip().startswith(anchor)]
            file.write_text("".join([*lines[:below], code, *lines[below:]]))
        added[name] = added.get(name, 0) + code.count("\n")
    return folder, added


def run(folder, line):
    """Output of a command, which must end well."""
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_page_counts_its_lines(extended):
    _, added = extended
    assert f"**{len(added)} files, {sum(added.values())} lines**" in PAGE


def test_the_commands_of_the_page(extended):
    folder, _ = extended
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    outputs = [run(folder, line) for line in block.splitlines()]
    flags, training, evaluation, costs, _, tests = outputs
    said = " ".join(flags.split())
    assert (
        "CosineAttention}" in said
        and "--cosine_temperature FLOAT CosineAttention: what cosines are divided by (default: 0.1)" in said
    )
    assert "warning" not in training and "top-1" in evaluation
    assert "cosine_temperature: 0.2" in (folder / "Output/ViT/CosineAttention/config.yaml").read_text()
    assert "CosineAttention(" in (folder / "Output/ViT/CosineAttention/model.txt").read_text()
    assert costs.count("| CosineAttention") == 2
    assert list((folder / "Output/ViT/CosineAttention").glob("*attention*.png"))
    assert int(re.search(r"(\d+) passed", tests)[1]) > 10
    assert "--cosine_temperature 0.3 is not used by --layer Performer" in run(
        folder,
        "python -c \"import sys, options as o; a = o.parse_options(o.PROGRAMS['vit_main.py'], '', sys.argv[1:]); "
        'o.warn_without_effect(a[0].model, a[1])" --layer Performer --cosine_temperature 0.3',
    )


def test_mistakes_are_named_before_anything_runs(extended):
    folder, _ = extended
    for line, message in [
        ("--layer CosinAttention", "did you mean CosineAttention?"),
        ("--layer CosineAttention --cosine_temperature 0", "--cosine_temperature 0.0 must be at least 0.001"),
    ]:
        done = subprocess.run([sys.executable, "vit_main.py", *line.split()], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
