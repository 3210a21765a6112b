"""Follow docs/custom_mixers.md literally: by path from an empty folder, and with a row in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import benchmark
import run_experiments
import visualize
import vit_main
from experiments import runner

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "custom_mixers.md").read_text()
BY_PATH, WITH_A_ROW = PAGE.split("\n## With a row\n")
MAINS = {"vit_main.py": vit_main, "run_experiments.py": run_experiments, "benchmark.py": benchmark, "visualize.py": visualize}


def blocks(kind, text):
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.S)


class InThisProcess:
    """Stands in for the process of a run: Python, a program and its words."""

    def __init__(self, command, stdout, env, **_):
        with pytest.MonkeyPatch.context() as patch:
            for name in env.keys() - os.environ.keys():
                patch.setenv(name, env[name])
            self.returncode = MAINS[Path(command[1]).name].main(command[2:])

    def poll(self):
        return self.returncode

    wait = terminate = poll


@pytest.mark.usefixtures("quick_results")
def test_by_path_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=InThisProcess, DEVNULL=subprocess.DEVNULL))
    (minimal, code), (sweep,), commands = (blocks(kind, BY_PATH) for kind in ("python", "yaml", "sh"))
    Path("mean_mixer.py").write_text(minimal)
    Path("cosine_attention.py").write_text(code)
    Path("small.yaml").write_text(sweep)
    said = []
    for line in "".join(commands).splitlines():
        python, program, *words = shlex.split(line)
        folder, name = program.split("/")
        assert (python, folder) == ("python", "$CONVNN") and (ROOT / name).exists()
        if "--help" in words:
            with pytest.raises(SystemExit) as stop:
                MAINS[name].main(words)
            assert not stop.value.code
        else:
            assert MAINS[name].main(words) == 0
        said.append(capsys.readouterr())
    assert all("warning" not in err for _, err in said)
    first, flags, training, resumed, tested, swept, costs, drawn = (" ".join(out.split()) for out, _ in said)
    assert "--mixer_option temperature=FLOAT divisor of the cosines (default: 0.1)" in flags
    assert "--attention_dropout, --attention_bias (as bias)" in flags
    assert first.startswith("MeanMixer on digits")
    assert training.startswith("CosineAttention on digits") and "1 epochs and" in resumed and "top-1" in tested

    run = Path("Output/ViT/CosineAttention")
    options = yaml.safe_load((run / "config.yaml").read_text())
    checkpoint = torch.load(run / "best.pt", weights_only=True)["config"]
    for noted in (options, checkpoint):
        assert noted["layer"] == f"{tmp_path}/cosine_attention.py:CosineAttention"
        assert noted["mixer_option"] == ["temperature=0.2"] and len(noted["layer_sha256"]) == 64
    assert "mixer_option: temperature=0.2\n" in (run / "args.txt").read_text()
    assert "CosineAttention(" in (run / "model.txt").read_text()
    points = ["Attention", "CosineAttention_temperature-0.1", "CosineAttention_temperature-0.2"]
    assert sorted(path.parent.name for path in Path("Output/sweeps/small").glob("*/summary.json")) == points
    assert "| CosineAttention | 0.2 |" in swept
    assert costs.count("| CosineAttention") == 2 and costs.count("| Attention |") == 2
    assert Path(drawn).read_bytes().startswith(b"\x89PNG")


# Commands of the copy, in one process: the commands of the page, two mistakes, and the option beside two layers.
DRIVER = """
import shlex, sys
import pytest, vit_main
from options.runs import PROGRAMS, parse_options, unused_options
for line in sys.argv[1].splitlines():
    python, *words = shlex.split(line)
    assert python == "python"
    print("$", line, flush=True)
    try:
        code = pytest.main(words[2:]) if words[0] == "-m" else vit_main.main(words[1:])
    except SystemExit as stop:
        code = stop.code
    print("ended with", int(code or 0), flush=True)
for layer in ("CosineAttention", "Performer"):
    line = ["--layer", layer, "--cosine_temperature", "0.2"]
    resolved, parser = parse_options(PROGRAMS["vit_main.py"], "", line)
    for line in unused_options(resolved, parser.given):
        parser.warn(line)
    print(layer, resolved.as_dict()["cosine_temperature"])
"""


def test_with_a_row_in_a_copy(tmp_path):
    for path in ROOT.iterdir():  # with times and compiled files, which save a second
        if path.suffix in (".py", ".toml"):
            shutil.copy2(path, tmp_path)
        elif path.name in ("configs", "data", "__pycache__") or (path.name[0] != "." and any(path.glob("*.py"))):
            shutil.copytree(path, tmp_path / path.name)
    _, code = blocks("python", BY_PATH)
    code = code.replace("from convnn import", "from mixers.base import")
    (tmp_path / "mixers" / "cosine_attention.py").write_text(code)
    added = {"mixers/cosine_attention.py": code.count("\n")}
    location = r"In `([\w./]+)`, below the line that starts with `([^`]+)`"
    steps = re.findall(rf"{location}:\n\n```python\n(.*?)```", WITH_A_ROW, flags=re.S)
    assert len(steps) == 4
    for name, anchor, line in steps:
        lines = (tmp_path / name).read_text().splitlines(keepends=True)
        (below,) = [number for number, one in enumerate(lines, 1) if one.strip().startswith(anchor)]
        (tmp_path / name).write_text("".join([*lines[:below], line, *lines[below:]]))
        added[name] = added.get(name, 0) + line.count("\n")
    assert f"**{len(added)} files, {sum(added.values())} lines**" in WITH_A_ROW

    (commands,) = blocks("sh", WITH_A_ROW)
    more = ["--layer CosinAttention", "--layer CosineAttention --cosine_temperature 0"]
    script = commands + "".join(f"python vit_main.py {one}\n" for one in more)
    done = subprocess.run([sys.executable, "-c", DRIVER, script], cwd=tmp_path, capture_output=True, text=True)
    flags, tests, reference, *_ = done.stdout.split("\n$ ")
    assert re.findall(r"^ended with (\d)", done.stdout, flags=re.M) == ["0", "0", "0", "2", "2"], done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", tests)[1]) >= 10 and "passed" in reference
    said = " ".join(flags.split())
    assert "GPSA,CosineAttention," in said
    assert "--cosine_temperature FLOAT CosineAttention: divisor of the cosines (default: 0.1)" in said
    assert "CosineAttention 0.2\nPerformer 0.2\n" in done.stdout
    assert done.stderr.count("warning") == 1 and "--cosine_temperature 0.2 is not used by --layer Performer" in done.stderr
    assert "did you mean CosineAttention?" in done.stderr
    assert "cosine_temperature=0.0 must be at least 0.001" in done.stderr
