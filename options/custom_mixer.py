"""A mixer of one's own, by the address of its class: FILE.py:Class or package.module:Class.

Here addresses are told from names, classes are imported, and the arguments of their constructors become options. Nothing is
imported before an address asks for it; torch comes with the file that it names.
"""

from __future__ import annotations

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
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from options.fields import KINDS, Spec, check_one, convert, did_you_mean
from options.reading import open_regular, read_at_most

MOST_BYTES = 2**24  # of the file of a class
NO_FLAGS = ("neighbors", "layout", "image_size", "stride", "bias")  # what the model makes of its options


class Argument(NamedTuple):
    """An argument of a constructor that --mixer_option sets."""

    spec: Spec
    container: type | None  # tuple or list, where it takes several values
    length: int | None  # how many, where that is fixed


class OwnMixer(NamedTuple):
    """A class by its address."""

    address: str  # with the whole path of its file, so that it is found from any folder
    target: str  # "module:Class", to be imported in this process
    sha256: str  # of the file that defines it
    file: str
    takes: dict[str, str]  # arguments that options of the model give: argument -> option
    arguments: dict[str, Argument]  # those that are options of the mixer
    about: str  # first line of its docstring

    @property
    def name(self) -> str:
        return self.target.partition(":")[2]


# ---------------------------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------------------------


def is_address(layer: str) -> bool:
    return ":" in layer


def split_layers(layer: str, built_in: Collection[str]) -> list[str]:
    """The layers of A/B, or the one there is; each a name or an address, whose path has slashes as well.

    A name of `built_in` before the first slash is a layer; a folder of this name is written ./Conv2d/file.py:Class.
    """
    if not is_address(layer):
        return layer.split("/")
    first, slash, rest = layer.partition("/")
    if slash and first in built_in:
        return [first, *split_layers(rest, built_in)]
    found = re.fullmatch(r"(.+?:[^/:]*)(?:/(.*))?", layer, flags=re.S)  # a class ends an address
    if found is None or found[2] is None:
        return [layer]
    return [found[1], *split_layers(found[2], built_in)]


def label_of(layer: str, built_in: Collection[str]) -> str:
    """A layer as folders and figures call it: an address by its class."""
    return "/".join(part.rpartition(":")[2] if is_address(part) else part for part in split_layers(layer, built_in))


# ---------------------------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------------------------


def what_failed(error: BaseException, file: str) -> str:
    """An error of somebody's code in a few words, with the line of their file in which it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, text = [error.lineno], error.msg
    said = f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__
    return said + (f" ({os.path.basename(file)}, line {lines[-1]})" if lines else "")


def _is_free(name: str, path: str) -> bool:
    """Whether a module may be called so: no other one is, or would be found under this name."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return name not in sys.modules and (found is None or found.origin == path)


@functools.cache
def _run_file(path: str, source: bytes) -> types.ModuleType:
    """The module of a file with this content, under a name by which `importlib` finds it in this process.

    It may import from this project, and what lies beside it where the project has no module of that name.
    """
    folder, stem = os.path.dirname(path), re.sub(r"\W", "_", Path(path).stem)
    if folder not in sys.path:
        sys.path.append(folder)
    unique = hashlib.sha256(path.encode() + b"\0" + source).hexdigest()[:12]
    name = stem if _is_free(stem, path) else f"{stem}_{unique}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module
    try:
        # What is run is what was hashed: an import would read the file again, or a cache of the file as it was.
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _read(path: str) -> bytes:
    with open_regular(path) as file:
        source = read_at_most(file, MOST_BYTES + 1)
    if len(source) > MOST_BYTES:
        raise OSError(0, f"is larger than {MOST_BYTES:,} bytes")
    return source


@functools.cache  # a module is imported once in a process, and so is its file
def _hash_of_imported(file: str) -> str:
    return hashlib.sha256(_read(file)).hexdigest()


def _import_file(path: str) -> tuple[types.ModuleType, str]:
    """The module of a file, and the SHA-256 of what was run."""
    try:
        source = _read(path)
    except OSError as error:
        if not os.path.lexists(path):
            folder = os.path.dirname(path)
            stems = [one.stem for one in Path(folder).glob("*.py")]  # the ending, which all have, says nothing
            raise ValueError(f"there is no file {path}{did_you_mean(Path(path).stem, stems)}") from None
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        return _run_file(path, source), hashlib.sha256(source).hexdigest()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be imported: {what_failed(error, path)}") from None


def _import_module(name: str) -> types.ModuleType:
    """Raises ValueError, also for what is no name of a module. The current folder is looked in last."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("an address is FILE.py:Class or package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"there is no module {error.name} among those installed, in PYTHONPATH or in {os.getcwd()}"
            ) from None
        frames = traceback.extract_tb(error.__traceback__)
        own = error.filename if isinstance(error, SyntaxError) else frames[-1].filename if frames else ""
        raise ValueError(f"{name} cannot be imported: {what_failed(error, own or '')}") from None


def _find_class(module: types.ModuleType, name: str, where: str) -> type:
    from torch import nn

    mixers = [key for key, one in vars(module).items() if isinstance(one, type) and issubclass(one, nn.Module)]
    own = [key for key in mixers if getattr(module, key).__module__ == module.__name__]
    if not hasattr(module, name):
        there = f"; it has {', '.join(own)}" if own else ""
        raise ValueError(f"there is no class {name!r} in {where}{did_you_mean(name, own) or there}")
    if name not in mixers:
        kind = "a class, but not one of torch.nn.Module" if isinstance(getattr(module, name), type) else "not a class"
        raise ValueError(f"{name} in {where} is {kind}; a mixer is a class that inherits from torch.nn.Module")
    return getattr(module, name)


def load(address: str, sizes: tuple[str, str], words: dict[str, str]) -> OwnMixer:
    """Import the class at an address and read its constructor. Raises ValueError, in one line, if it cannot be a mixer.

    sizes: what it gets by position; words: arguments that the model gives, and the option behind each.
    """
    place, _, name = address.rpartition(":")
    is_file = place.endswith(".py") or os.sep in place
    path = os.path.abspath(os.path.expanduser(place))
    address = f"{path}:{name}" if is_file else address
    try:
        module, sha256 = _import_file(path) if is_file else (_import_module(place), "")
        cls = _find_class(module, name, path if is_file else place)
        defined = sys.modules[cls.__module__]
        if defined is not module or not is_file:  # the class comes from elsewhere
            path, sha256 = defined.__file__, _hash_of_imported(defined.__file__)
        takes, arguments = read_arguments(cls, sizes, words)
    except (ValueError, OSError) as error:
        raise ValueError(f"layer={address!r}: {error}") from None
    about = (cls.__doc__ or "").strip().partition("\n")[0]
    return OwnMixer(address, f"{module.__name__}:{name}", sha256, path, takes, arguments, about)


# ---------------------------------------------------------------------------------------------------------------
# Constructors
# ---------------------------------------------------------------------------------------------------------------


def read_arguments(cls: type, sizes: tuple[str, str], words: dict[str, str]) -> tuple[dict[str, str], dict[str, Argument]]:
    """Of a constructor: the arguments that the model gives, with the option behind each, and those that are options.

    Raises ValueError for a signature that cannot be called so.
    """
    parameters = list(inspect.signature(cls).parameters.values())
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = f"{cls.__name__}({', '.join(map(str, parameters[:3]))}{', ...' * (len(parameters) > 3)})"
    wanted = f"({', '.join(sizes)}, *, name: type = default, ...)"
    if len(parameters) < 2 or any(one.kind not in by_position for one in parameters[:2]):
        raise ValueError(f"{signature} does not take {' and '.join(sizes)} by position; a mixer here takes {wanted}")
    other = {"d_model": "vit_main.py", "in_channels": "allconvnet_main.py"}
    if parameters[0].name in other and parameters[0].name != sizes[0]:
        raise ValueError(f"{signature} is a mixer for {other[parameters[0].name]}; here it takes {wanted}")
    takes, arguments = {}, {}
    for one in parameters[2:]:
        if one.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise ValueError(f"{cls.__name__} takes {one}; name every argument, so that it can be an option")
        if one.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(f"{cls.__name__} takes {one.name} by position only; write it after *")
        if one.name in words:
            takes[one.name] = words[one.name]
        else:
            arguments[one.name] = _read_argument(cls, one)
    return takes, arguments


def _read_argument(cls: type, parameter: inspect.Parameter) -> Argument:
    name, annotation, default = parameter.name, parameter.annotation, parameter.default
    if default is parameter.empty:
        raise ValueError(f"argument {name} of {cls.__name__} has no default, and no option of the model is called so")
    if annotation is parameter.empty:
        raise ValueError(f"argument {name} of {cls.__name__} has no annotation; write {name}: type = {default!r}")
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, vars(sys.modules[_definer(cls).__module__]))
        except Exception as error:
            raise ValueError(
                f"the annotation of {name}: {annotation} of {cls.__name__} cannot be evaluated ({error})"
            ) from None
    argument = _of_annotation(annotation)
    if argument is None:
        shown = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", annotation)
        raise ValueError(
            f"argument {name} of {cls.__name__} cannot be an option: its annotation is {shown}; an option is int, float, bool, "
            "str, a Literal, a tuple or list of one of them, or Optional"
        )
    spec = argument.spec._replace(help=_line_of_docstring(cls, name), default=default)
    argument = argument._replace(spec=spec)
    if not _fits(default, argument):
        raise ValueError(
            f"argument {name} of {cls.__name__} has the default {default!r}, which is not what its annotation says"
        )
    return argument


def _definer(cls: type) -> type:
    """The class whose constructor a class has: annotations are evaluated where they are written."""
    return next(one for one in cls.__mro__ if "__init__" in vars(one))


def _of_annotation(annotation) -> Argument | None:
    """What an annotation allows, None if it cannot be an option."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        rest = [one for one in arguments if one is not type(None)]
        found = _of_annotation(rest[0]) if len(rest) == 1 else None
        return found and found._replace(spec=found.spec._replace(optional=True))
    if origin in (tuple, list) and arguments:
        items = [one for one in arguments if one is not Ellipsis]
        found = _of_annotation(items[0]) if len(set(items)) == 1 else None
        if found is None or found.container or found.spec.optional:
            return None
        length = len(items) if origin is tuple and Ellipsis not in arguments else None
        return Argument(found.spec._replace(many=True), origin, length)
    if origin is typing.Literal:
        kinds = {type(one) for one in arguments}
        return Argument(Spec(kinds.pop(), "", choices=arguments), None, None) if kinds <= {str} or kinds <= {int} else None
    return Argument(Spec(annotation, ""), None, None) if annotation in tuple(KINDS) else None


def _fits(value, argument: Argument) -> bool:
    """Whether a default is of the kind that the annotation names."""
    spec = argument.spec
    if value is None:
        return spec.optional
    if argument.container and not isinstance(value, (tuple, list)):
        return False
    values = value if argument.container else [value]
    kinds = (int, float) if spec.kind is float else (spec.kind,)
    return all(type(one) in kinds and (not spec.choices or one in spec.choices) for one in values)


def _line_of_docstring(cls: type, name: str) -> str:
    """What the docstring of the class or of its constructor says of an argument, in its first line."""
    texts = [cls.__doc__ or "", _definer(cls).__doc__ or "", cls.__init__.__doc__ or ""]
    found = re.search(rf"^\s*{name}\s*(?:\([^)\n]*\))?\s*:\s*(\S.*)$", "\n".join(texts), flags=re.M)
    return found[1].strip() if found else ""


# ---------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------


def as_text(value) -> str:
    """A value as it stands behind the = of --mixer_option."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_value(name: str, text: str, argument: Argument):
    """The value that a text says. Raises ValueError."""
    spec = argument.spec
    if text == as_text(spec.default):
        return spec.default
    if spec.optional and text.lower() == "none":
        return None
    one = spec._replace(many=False, optional=False)
    if not argument.container:
        return check_one(name, convert(name, text, one), one)
    values = argument.container(check_one(name, convert(name, part.strip(), one), one) for part in text.split(","))
    if argument.length not in (None, len(values)):
        raise ValueError(f"{name}={text} has {len(values)} values, not {argument.length}")
    return values


def settle(mixers: Sequence[OwnMixer], given: Sequence[str]) -> tuple[list[dict], tuple[str, ...]]:
    """From `name=value` texts: the values that each mixer gets by name, and all options written out, defaults as well.

    An option that two mixers have goes to both; of a name that is given twice the last one counts. Raises ValueError.
    """
    texts = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--mixer_option {text!r} is not name=value")
        if not any(name in mixer.arguments for mixer in mixers):
            raise ValueError(f"--mixer_option {text!r}: {_why_unknown(name, mixers)}")
        texts[name] = value
    values = []
    for mixer in mixers:
        values.append({})
        for name in mixer.arguments.keys() & texts.keys():
            try:
                values[-1][name] = read_value(name, texts[name], mixer.arguments[name])
            except ValueError as error:
                raise ValueError(f"--mixer_option '{name}={texts[name]}': {error}") from None
    settled: dict[str, set[str]] = {}
    for mixer, own in zip(mixers, values, strict=True):
        for name, argument in mixer.arguments.items():
            settled.setdefault(name, set()).add(as_text(own.get(name, argument.spec.default)))
    # Two mixers with different defaults of one name keep them: written out, one of them would be given to both.
    return values, tuple(f"{name}={text}" for name, found in settled.items() if len(found) == 1 for text in found)


def flag_of(option: str) -> str | None:
    """The flag behind what a row may name, None for what the model makes of several."""
    return None if option in NO_FLAGS else "--attention_bias" if option == "biases" else f"--{option}"


def _why_unknown(name: str, mixers: Sequence[OwnMixer]) -> str:
    for mixer in mixers:
        if name in mixer.takes:
            return f"{mixer.name} gets {name} from {flag_of(mixer.takes[name]) or 'the model'}"
    names = [key for mixer in mixers for key in mixer.arguments]
    hint = did_you_mean(name, names) or (f"; it has {', '.join(names)}" if names else "")
    return f"{' and '.join(mixer.name for mixer in mixers)} has no option {name}{hint}"


def lines_of_help(mixer: OwnMixer) -> dict[str, str]:
    """A line for each option of a mixer, and its help."""
    lines = {}
    for name, (spec, container, length) in mixer.arguments.items():
        kind = "{" + ",".join(map(str, spec.choices)) + "}" if spec.choices else spec.kind.__name__.upper()
        kind = ",".join([kind] * (length or 2)) + ",..." * (length is None) if container else kind
        lines[f"mixer_option {name}={kind}"] = f"{spec.help} (default: {as_text(spec.default)})".strip()
    return lines
