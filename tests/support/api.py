"""What a room defines, as lines to review: signatures, defaults, fields, tables and constants."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxrobust.models.interface.family import Family
from tests.support import paths

LINE = 400  # characters; a longer table has a line for each entry
MEASURED = {"jaxrobust.commands.estimate.BEGUN"}  # when the process began
MEASURED |= {"jaxrobust.runtime.text.patience.AFTER_S"}  # starting.py sets it
GIVEN = {"__subclasshook__"}  # by a protocol, in some versions of Python
TEXT = 60  # characters of a text that are kept: a sentence may be written better without review


def golden(room: str) -> Path:
    """Name the reviewed text of a room; `tools/generate/refresh_api.py` writes it."""
    return paths.ROOT / "tests" / "golden_api" / f"{room}.txt"


def modules(room: str) -> Iterator[ModuleType]:
    """Import the modules of a room, but for those whose libraries are not installed.

    And but for commands that define absl's flag `config`: a process can import one of them.
    """
    for file in _files(room):
        if "DEFINE_config_file" in file.read_text():
            continue
        try:
            yield importlib.import_module(_name(file))
        except ImportError:
            continue


def lines(module: ModuleType) -> list[str]:
    """List what a module defines by itself, in the order of its text."""
    found, seen = [], set[int]()
    for name in dict.fromkeys(_defined(module)):
        value, place = vars(module).get(name), f"{module.__name__}.{name}"
        if isinstance(value, type):
            own = value.__module__ == module.__name__
            found.append(place + (_class(value) if own else " = ..."))
        elif hasattr(value, "_fields"):
            for key, entry in value._asdict().items():
                found += _entries(f"{place}.{key}", entry, seen)
        elif callable(value) and not isinstance(value, functools.partial):
            own = str(getattr(value, "__module__", "")).startswith("jaxrobust")
            found.append(place + (_signature(value) if own else " = ..."))
        elif place not in MEASURED:
            found += _entries(place, value, seen)
    return found


def _defined(module: ModuleType) -> Iterator[str]:
    assert module.__file__ is not None
    for node in ast.parse(Path(module.__file__).read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)) if name.isupper():  # else it is a memory
                yield name


def _entries(place: str, value: Any, seen: set[int]) -> Iterator[str]:
    """Give a line, or one for each entry of what is too long for a line."""
    text = written(value)
    if len(text) <= LINE:
        yield f"{place} = {text}"
    elif id(value) in seen:
        yield f"{place} stands above"
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _entries(f"{place}[{written(key)}]", entry, seen)
    elif hasattr(value, "_fields"):
        for key, entry in value._asdict().items():
            yield from _entries(f"{place}.{key}", entry, seen)
    elif isinstance(value, tuple | list):
        for number, entry in enumerate(value):
            yield from _entries(f"{place}[{number}]", entry, seen)
    else:
        yield f"{place} = {text}"
    seen.add(id(value))


def _class(value: type) -> str:
    fields = getattr(value, "_fields", None)
    if fields is not None:
        return _fields(fields, getattr(value, "_field_defaults", {}))
    if dataclasses.is_dataclass(value):
        made = {f.name: f.default for f in dataclasses.fields(value)}
        made |= {
            f.name: f.default_factory
            for f in dataclasses.fields(value)
            if f.default_factory is not dataclasses.MISSING
        }
        given = {k: v for k, v in made.items() if v is not dataclasses.MISSING}
        return _fields(tuple(made), given)
    own = {k: v for k, v in vars(value).items() if inspect.isfunction(v) and k not in GIVEN}
    return "{" + "; ".join(f"{k}{_signature(v)}" for k, v in own.items()) + "}"


def _fields(names: tuple[str, ...], defaults: Mapping[str, Any]) -> str:
    return f"({', '.join(n + '=' + written(defaults[n]) if n in defaults else n for n in names)})"


def _signature(function: Any) -> str:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    words, keywords = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keywords:
            words.append("*")
        keywords = keywords or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(star + p.name + ("" if p.default is p.empty else f"={written(p.default)}"))
    return f"({', '.join(words)})"


def written(value: Any) -> str:
    """Write a value without addresses; what is no data by its name, or as "..."."""
    for kind, write in _WRITERS.items():
        if isinstance(value, kind):
            return write(value)
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}({_pairs(vars(value))})"
    return str(getattr(value, "__name__", "...")) if callable(value) else "..."


def _pairs(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={written(v)}" for k, v in given.items())


def _partial(value: Any) -> str:
    words = [*map(written, (value.func, *value.args)), _pairs(value.keywords)]
    return f"partial({', '.join(filter(None, words))})"


def _row(values: Any) -> str:
    named = hasattr(values, "_fields")
    return (
        f"{type(values).__name__}({_pairs(values._asdict())})" if named else _joined("()", values)
    )


def _joined(brackets: str, values: Iterable[Any]) -> str:
    return f"{brackets[0]}{', '.join(map(written, values))}{brackets[1]}"


# The first kind that a value is says how it is written.
_WRITERS: dict[Any, Callable[[Any], str]] = {
    str: lambda v: repr(v if len(v) <= TEXT else v[:TEXT] + "…"),
    float: lambda v: f"{v:.12g}",  # the last digits are those of a machine's library
    np.ndarray | np.generic: lambda v: f"{v.dtype}{written(v.tolist())}",
    bool | int | complex | bytes | type(None) | type(...): repr,
    functools.partial: _partial,
    re.Pattern: lambda v: f"re({v.pattern!r})",
    Family: lambda v: f"Family({v.file})",
    tuple | list: _row,
    set | frozenset: lambda v: _joined("{}", sorted(v, key=written)),
    Mapping: lambda v: "{" + ", ".join(f"{written(k)}: {written(x)}" for k, x in v.items()) + "}",
    type: lambda v: v.__name__,
}


def differences(room: str) -> list[str]:
    """Compare a room with its reviewed text, as lines that begin with "+" or "-".

    Lines of a module that cannot be imported here are not compared.
    """
    here = {module.__name__: lines(module) for module in modules(room)}
    known = golden(room).read_text().splitlines()
    own = [line for found in here.values() for line in found]
    names = sorted(map(_name, _files(room)), key=len)
    gone = [line for line in sorted({*known} - {*own}) if _module(line, names) in here]
    return [f"- {line}" for line in gone] + [f"+ {line}" for line in sorted({*own} - {*known})]


def _module(line: str, names: list[str]) -> str:
    """Find the module of a line; of a file that is gone the folder's."""
    return [name for name in names if line.startswith(f"{name}.")][-1]


def _files(room: str) -> list[Path]:
    return sorted((paths.ROOT / "jaxrobust" / room).rglob("*.py"))


def _name(file: Path) -> str:
    parts = file.relative_to(paths.ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")
