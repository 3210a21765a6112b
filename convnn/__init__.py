"""Token mixers between convolution and attention: `from convnn import ConvNN2d, MultiHeadConvNNAttention, train`.

`__init__.pyi` lists the public names. Each is imported when it is first used: in a checkout from the modules at its root, in an
installed package from the modules beside this file.
"""

import ast
import importlib
import sys
from pathlib import Path

__version__ = "0.1.0"

_STUB = Path(__file__).with_suffix(".pyi")
_MODULES = {
    name.name: imported.module
    for imported in ast.parse(_STUB.read_text(encoding="utf-8")).body
    if isinstance(imported, ast.ImportFrom)
    for name in imported.names
}
__all__ = [*_MODULES]

_CHECKOUT = Path(__file__).resolve().parent.parent
if not _STUB.with_name("vit.py").exists() and str(_CHECKOUT) not in sys.path:  # the modules are not in this package
    sys.path.insert(0, str(_CHECKOUT))


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
