"""Custom mixers, named by the address of a class: FILE.py:Class or package.module:Class.

Import the class and turn the arguments of its constructor into options. Nothing is imported before an address asks for it.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from options.fields import KINDS, Spec, check_option, convert, did_you_mean
from options.reading import open_regular, sha256_of


class CustomMixer(NamedTuple):
    """A class found by its address."""

    address: str  # with the absolute path of its file, so that it is found from any folder
    target: str  # "module:Class", importable in this process
    sha256: str  # of the file that defines the class
    takes: dict[str, str]  # arguments that the model passes, and their sources: a flag, or "the model"
    arguments: dict[str, Spec]  # arguments that --mixer_option sets
    about: str  # first line of its docstring

    @property
    def name(self) -> str:
        return self.target.partition(":")[2]


def is_address(layer: str) -> bool:
    return ":" in layer


def file_of(address: str) -> str | None:
    """Return the absolute path of an address FILE.py:Class, and None for package.module:Class."""
    place = address.rpartition(":")[0]
    is_file = place.endswith(".py") or os.sep in place
    return os.path.abspath(os.path.expanduser(place)) if is_file else None


def check_unchanged(layer: str, then: str | None, now: str) -> None:
    """Raise ValueError if the files of a layer had another hash when they were noted."""
    if then not in (None, now):
        raise ValueError(
            f"layer={layer} has changed: its SHA-256 was {then} and is now {now}; restore its former content, or accept the "
            "change: with --layer in a new run, with --override under --test_only"
        )


# ---------------------------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------------------------


def describe_error(error: BaseException, file: str = "") -> str:
    """Describe an error of a custom mixer in one line, with the line number in its file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, text = [error.lineno], error.msg
    place = f" ({os.path.basename(file)}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(text.split())}{place}"


_sha256_of_imported = functools.cache(sha256_of)  # the file as it was when Python imported it


@functools.cache
def _run_file(path: str, source: bytes) -> types.ModuleType:
    """Run a file with this content, and return its module, registered under a unique name.

    The file can import modules in its folder, unless this project has a module of the same name.
    """
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    unique = hashlib.sha256(path.encode() + b"\0" + source).hexdigest()[:12]
    name = re.sub(r"\W", "_", Path(path).stem) + f"_{unique}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module
    try:
        # Run the bytes that were hashed: an import would read the file again, or a cached version of it.
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_file(path: str) -> types.ModuleType:
    try:
        with open_regular(path) as file:
            source = file.read()
    except FileNotFoundError:
        stems = [one.stem for one in Path(path).parent.glob("*.py")]  # without the ending, which all of them share
        raise ValueError(f"there is no file {path}{did_you_mean(Path(path).stem, stems)}") from None
    try:
        return _run_file(path, source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be imported: {describe_error(error, path)}") from None


def _import_module(name: str) -> types.ModuleType:
    """Import a module by name; the current folder is searched last."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("an address is FILE.py:Class or package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be imported: {describe_error(error)}") from None


def _find_class(module: types.ModuleType, name: str, where: str) -> type:
    from torch import nn

    mixers = {key: one for key, one in vars(module).items() if isinstance(one, type) and issubclass(one, nn.Module)}
    if name not in mixers:
        defined = [key for key, one in mixers.items() if one.__module__ == module.__name__]
        listing = f"; it has {', '.join(defined)}" if defined else ""
        raise ValueError(f"there is no torch.nn.Module {name!r} in {where}{did_you_mean(name, defined) or listing}")
    return mixers[name]


def load(address: str, sizes: tuple[str, str], sources: dict[str, str]) -> CustomMixer:
    """Import the class at an address and read its constructor.

    Args:
        sizes: names of the two positional arguments.
        sources: arguments that the model passes, and the source of each.

    Raises ValueError if there is no such class or it cannot be a mixer.
    """
    place, _, name = address.rpartition(":")
    file = file_of(address)
    if file:
        place, address = file, f"{file}:{name}"
    try:
        module = _import_file(file) if file else _import_module(place)
        cls = _find_class(module, name, place)
        defined = sys.modules[cls.__module__]
        sha256 = sha256_of(file) if file and defined is module else _sha256_of_imported(defined.__file__)
        takes, arguments = _read_constructor(cls, sizes, sources)
    except OSError as error:
        raise ValueError(f"layer={address!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"layer={address!r}: {error}") from None
    about = (cls.__doc__ or "").strip().partition("\n")[0]
    return CustomMixer(address, f"{module.__name__}:{name}", sha256, takes, arguments, about)


# ---------------------------------------------------------------------------------------------------------------
# Constructors
# ---------------------------------------------------------------------------------------------------------------


def _read_constructor(cls: type, sizes: tuple[str, str], sources: dict[str, str]) -> tuple[dict[str, str], dict[str, Spec]]:
    """Split the arguments of a constructor into those that the model passes (with their sources) and options (with specs)."""
    parameters = list(inspect.signature(cls).parameters.values())
    signature = f"{cls.__name__}({', '.join(map(str, parameters[:3]))}{', ...' * (len(parameters) > 3)})"
    wanted = f"({', '.join(sizes)}, *, name: type = default, ...)"
    if len(parameters) < 2 or any(one.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for one in parameters[:2]):
        raise ValueError(f"{signature} does not take {' and '.join(sizes)} by position; a mixer here takes {wanted}")
    programs = {"d_model": "vit_main.py", "in_channels": "allconvnet_main.py"}
    if parameters[0].name in programs and parameters[0].name != sizes[0]:
        raise ValueError(f"{signature} is a mixer for {programs[parameters[0].name]}; here it takes {wanted}")
    for one in parameters[2:]:
        if one.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise ValueError(f"{cls.__name__} takes {one}; name every argument, so that it can be an option")
    takes = {one.name: sources[one.name] for one in parameters[2:] if one.name in sources}
    return takes, {one.name: _spec_of(cls, one) for one in parameters[2:] if one.name not in sources}


def _spec_of(cls: type, parameter: inspect.Parameter) -> Spec:
    """Return the spec of the option for an argument. Raises ValueError if the argument cannot be an option."""
    name, annotation, default = parameter.name, parameter.annotation, parameter.default
    where = f"argument {name} of {cls.__name__}"
    if default is parameter.empty:
        raise ValueError(f"{where} has no default, and no option of the model has its name")
    if annotation is parameter.empty:
        raise ValueError(f"{where} has no annotation; write {name}: type = {default!r}")
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, cls.__init__.__globals__)
        except Exception as error:
            raise ValueError(f"{where} has the annotation {annotation}, which cannot be evaluated ({error})") from None
    spec = _spec_of_annotation(annotation)
    if spec is None:
        raise ValueError(
            f"{where} cannot be an option: its annotation is {getattr(annotation, '__name__', annotation)}; an option is int, "
            "float, bool, str, a Literal of texts, a tuple[int, ...] of one of them, or Optional"
        )
    documented = re.search(rf"^\s*{name}\s*(?:\([^)\n]*\))?\s*:\s*(\S.*)$", cls.__doc__ or "", flags=re.M)
    spec = spec._replace(help=documented[1].strip() if documented else "", default=default)
    try:
        if default != "":
            check_option(name, default, spec)
    except ValueError:
        raise ValueError(f"{where} has the default {default!r}, which does not match its annotation") from None
    return spec


def _spec_of_annotation(annotation) -> Spec | None:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        spec = _spec_of_annotation(next(one for one in arguments if one is not type(None)))
        return spec and spec._replace(optional=True)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        spec = _spec_of_annotation(arguments[0])
        return spec and spec._replace(many=True)
    if origin is typing.Literal and all(isinstance(one, str) for one in arguments):
        return Spec(str, "", choices=arguments)
    return Spec(annotation, "") if annotation in tuple(KINDS) else None


# ---------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------


def as_text(value) -> str:
    """Write a value as --mixer_option takes it: lists as 1,2."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _read_value(name: str, text: str, spec: Spec):
    if text == as_text(spec.default):
        return spec.default  # may be an empty text
    words = [word.strip() for word in text.split(",")] if spec.many else text
    return check_option(name, convert(name, words, spec), spec)


def settle(mixers: Sequence[CustomMixer], given: Sequence[str]) -> tuple[list[dict], tuple[str, ...]]:
    """Return the values of each mixer by name, and all options as `name=value` texts, defaults included.

    An option of two mixers is set in both; the last value of a repeated option counts. Raises ValueError.
    """
    texts = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--mixer_option {text!r} is not name=value")
        if not any(name in mixer.arguments for mixer in mixers):
            raise ValueError(f"--mixer_option {text!r}: {_why_unknown(name, mixers)}")
        texts[name] = value
    values, settled = [], {}
    for mixer in mixers:
        found = {}
        for name, spec in mixer.arguments.items():
            if name in texts:
                try:
                    found[name] = _read_value(name, texts[name], spec)
                except ValueError as error:
                    raise ValueError(f"--mixer_option '{name}={texts[name]}': {error}") from None
            settled.setdefault(name, set()).add(as_text(found.get(name, spec.default)))
        values.append(found)
    # Leave out an option that differs between two mixers: written out, its value would be set in both.
    return values, tuple(f"{name}={text}" for name, found in settled.items() if len(found) == 1 for text in found)


def _why_unknown(name: str, mixers: Sequence[CustomMixer]) -> str:
    for mixer in mixers:
        if name in mixer.takes:
            return f"{mixer.name} gets {name} from {mixer.takes[name]}"
    names = [key for mixer in mixers for key in mixer.arguments]
    hint = did_you_mean(name, names) or (f"; it has {', '.join(names)}" if names else "")
    return f"{' and '.join(mixer.name for mixer in mixers)} has no option {name}{hint}"


def help_of(mixer: CustomMixer) -> tuple[str, str, dict[str, str]]:
    """Return the --help of a mixer: title, text, and a line per option."""
    lines = {}
    for name, spec in mixer.arguments.items():
        kind = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.kind.__name__.upper()
        kind = f"{kind},{kind},..." if spec.many else kind
        lines[f"mixer_option {name}={kind}"] = f"{spec.help} (default: {as_text(spec.default)})".strip()
    given = [
        name if source == "the model" else source + f" (as {name})" * (source != f"--{name}")
        for name, source in mixer.takes.items()
    ]
    text = f"{mixer.about} The model passes {', '.join(given)}." if given else mixer.about
    return f"options of {mixer.address}", text, lines
