"""Run a program, installed or in a checkout: `convnn vit_main.py ...`, or `python -m convnn vit_main.py ...`."""

import runpy
import sys
from pathlib import Path

PROGRAMS = ("allconvnet_main.py", "vit_main.py", "run_experiments.py", "benchmark.py", "visualize.py", "predict.py")


def main() -> None:
    name = f"{sys.argv[1].removesuffix('.py')}.py" if len(sys.argv) > 1 else ""
    if name not in PROGRAMS:
        sys.exit(f"usage: convnn PROGRAM ...; PROGRAM is one of {', '.join(PROGRAMS)}, each with a --help of its own")
    folder = Path(__file__).resolve().parent
    path = folder / name if (folder / name).exists() else folder.parent / name
    sys.argv = [str(path), *sys.argv[2:]]
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
