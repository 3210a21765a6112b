"""Build backend: setuptools on a copy of the project whose root modules and packages have moved into `convnn/`.

Imports among them get the prefix `convnn.`, and so do texts of the form "module:name", so that no other name reaches an
environment. A source distribution holds the moved modules; building it moves nothing more. Editable installs have no such copy,
and pip says so.
"""

import ast
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from setuptools import build_meta

PACKAGE = "convnn"
FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "CITATION.cff")
DATA = ("configs", "data")  # folders that the modules read
NOT_OURS = (PACKAGE, "tests", "examples", "build_backend")


def flat_modules(root: Path) -> list[Path]:
    """Return the modules and packages at the root that belong into the package."""
    packages = [path.parent for path in root.glob("*/__init__.py")]
    return sorted(path for path in [*root.glob("*.py"), *packages] if path.name not in NOT_OURS)


def move_imports(source: str, names: set[str], file: str = "") -> str:
    """Prefix the modules in `names` where a module imports them, or names them in a text "module:name".

    Raises ValueError for `import module`, which would bind another name.
    """
    lines = source.encode().splitlines(keepends=True)
    ours = re.compile(rf"({'|'.join(sorted(names))})(\.\w+)*:[A-Za-z_]\w*")
    places = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in names:
            places.append((node.lineno, node.col_offset + len("from ")))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ours.fullmatch(node.value):
            places.append((node.lineno, node.col_offset + len('"')))
        elif isinstance(node, ast.Import) and names & {alias.name.split(".")[0] for alias in node.names}:
            raise ValueError(f"{file}:{node.lineno}: write `from module import name`, which can move into {PACKAGE}/")
    for line, column in sorted(places, reverse=True):  # from the end, so that earlier columns stay
        text = lines[line - 1]
        lines[line - 1] = text[:column] + f"{PACKAGE}.".encode() + text[column:]
    return b"".join(lines).decode()


def move_into_package(root: Path, target: Path) -> None:
    """Write the package, with all modules in it and their imports moved, to the folder `target`."""
    ignored = shutil.ignore_patterns("__pycache__")
    modules = flat_modules(root)
    shutil.copytree(root / PACKAGE, target, ignore=ignored)
    for path in [*modules, *(root / name for name in DATA if (root / name).exists())]:
        if path.is_dir():
            shutil.copytree(path, target / path.name, ignore=ignored)
        else:
            shutil.copy(path, target)
    names = {path.stem for path in modules}
    for path in target.rglob("*.py*") if names else ():
        path.write_text(move_imports(path.read_text(encoding="utf-8"), names, path.name), encoding="utf-8")


@contextlib.contextmanager
def moved() -> Iterator[None]:
    """Work in a temporary copy of the project in the current folder, with its modules in the package."""
    root = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            shutil.copy(root / name, folder)
        shutil.copytree(root / "build_backend", Path(folder, "build_backend"), ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, "MANIFEST.in").write_text("graft build_backend\ninclude CITATION.cff\n", encoding="utf-8")
        move_into_package(root, Path(folder, PACKAGE))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(root)


def in_copy(hook: Callable[..., str]) -> Callable[..., str]:
    """Make a hook of setuptools work in the copy; its first argument is the folder for the result."""

    def build(directory: str, *settings) -> str:
        target = os.path.abspath(directory)
        with moved():
            return hook(target, *settings)

    return build


prepare_metadata_for_build_wheel = in_copy(build_meta.prepare_metadata_for_build_wheel)
build_wheel = in_copy(build_meta.build_wheel)
build_sdist = in_copy(build_meta.build_sdist)
