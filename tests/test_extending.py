"""docs/extending.md, applied word by word to a copy of the project."""

import json
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


COMMANDS = """
import json, sys
import torch._dynamo, torchvision  # which all that is forked has then
import forked
forked.start()
for command in json.loads(sys.argv[1]):
    process = forked.Forked(command, cwd=".")
    print(json.dumps(["".join(process.communicate()), process.returncode]))
"""


def run(folder, *lines):
    """Output of commands of Python's, which must end well."""
    commands = [shlex.split(line) for line in lines]
    assert all(command.pop(0) == "python" for command in commands)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for _, status in outputs] == [0] * len(lines), outputs
    return [output for output, _ in outputs]


def test_the_page_counts_its_lines(extended):
    _, added = extended
    assert f"**{len(added)} files, {sum(added.values())} lines**" in PAGE


def test_the_commands_of_the_page(extended):
    folder, _ = extended
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    elsewhere = "python -c \"import sys, options as o; a = o.parse_options(o.PROGRAMS['vit_main.py'], '', sys.argv[1:]); "
    elsewhere += 'o.warn_without_effect(a[0].model, a[1])" --layer Performer --cosine_temperature 0.3'
    flags, training, evaluation, costs, _, tests, warning = run(folder, *block.splitlines(), elsewhere)
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
    assert "--cosine_temperature 0.3 is not used by --layer Performer" in warning


def test_mistakes_are_named_before_anything_runs(extended):
    folder, _ = extended
    for line, message in [
        ("--layer CosinAttention", "did you mean CosineAttention?"),
        ("--layer CosineAttention --cosine_temperature 0", "--cosine_temperature 0.0 must be at least 0.001"),
    ]:
        done = subprocess.run([sys.executable, "vit_main.py", *line.split()], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
