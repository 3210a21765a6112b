"""The layout of the project: files at the root, length of modules, floors, imports; and openings of docstrings and comments."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOT_FILES = """
    allconvnet.py allconvnet_main.py benchmark.py dataset.py layers1d.py layers2d.py neighbors.py predict.py run_experiments.py
    train_eval.py utils.py visualize.py vit.py vit_main.py
""".split()
# From the top; a module imports from its own floor or from below.
FLOORS = [
    ["convnn"],
    ["allconvnet_main", "vit_main"],
    ["run_experiments", "benchmark", "visualize", "predict"],
    ["experiments"],
    ["train_eval"],
    ["launch"],
    ["models"],
    ["allconvnet", "vit"],
    ["mixers", "layers1d", "layers2d"],
    ["dataset"],
    ["neighbors"],
    ["readers"],
    ["runs"],
    ["kernels"],
    ["options"],
    ["utils"],
]
FLOOR = {name: -number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    packages = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").exists() and folder.name != "tests"]
    paths = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports: anywhere in it, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner | ({node.module} if len(inner) < len(node.names) else set())
    return found & known


def test_the_root_holds_fourteen_files():
    assert sorted(path.name for path in modules().values() if path.parent == ROOT) == ROOT_FILES


def test_no_module_is_long():
    long = {name: count for name, path in modules().items() if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_no_import_goes_up():
    found = modules()
    upward = [
        f"{name} imports {other}"
        for name, path in found.items()
        for other in imports(path, found.keys())
        if FLOOR[other.split(".")[0]] > FLOOR[name.split(".")[0]]
    ]
    assert not upward


def test_no_circle_of_imports():
    found = modules()
    graph = {name: imports(path, found.keys()) - {name} for name, path in found.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_every_folder_of_tests_is_a_package():
    """Without, `import models` in a test could find the tests."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders) and len(folders) > 5


def test_no_docstring_or_comment_opens_with_a_question_word():
    opening = re.compile(r'(?:"""|#:?\s)\s*(?:What|Which|Whether|Whose|How|Those|That)\b')
    paths = [path for pattern in ("*.py", "*/*.py", "tests/*/*.py") for path in ROOT.glob(pattern)]
    found = [
        f"{path}: {line}" for path in paths for line in path.read_text(encoding="utf-8").splitlines() if opening.search(line)
    ]
    assert not found
