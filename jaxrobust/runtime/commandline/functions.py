"""Functions named by the user: `my_package.nets:make`, or `my_nets.py:make` in a file."""

import contextlib
import hashlib
import importlib
import importlib.util
import operator
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxrobust.runtime import pytorch
from jaxrobust.runtime.text import spelling

HOW = "my_package.nets:make, or my_nets.py:make"
_PACKAGE = Path(__file__).parents[2]
_PYTHON = Path(sysconfig.get_path("stdlib"))
_loaded: dict[Path, tuple[str, ModuleType]] = {}  # file -> sha256 of the code run, module


class Named(NamedTuple):
    """A function and its origin."""

    function: Callable[..., Any]
    name: str  # as the user gave it
    file: str | None  # the source file; None: it has none
    sha256: str | None  # of that file

    def record(self) -> dict[str, Any]:
        """Describe the function for a record."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256}


def is_name(text: str) -> bool:
    """Return whether a text names a function rather than one of our networks."""
    return ":" in text


def find(flag: str, name: str) -> Named:
    """Find the function `name` on Python's path or in the current folder.

    A changed file is run again. Files may import their neighbors.
    """
    place, _, attribute = name.rpartition(":")
    if not (place and all(part.isidentifier() for part in attribute.split("."))):
        raise ValueError(f"{flag}={name} does not name a function; write {HOW}")
    of_file = place.endswith(".py")
    with explained(flag, name):
        module = _of_file(flag, name, Path(place)) if of_file else _imported(flag, name, place)
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        names = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        raise ValueError(
            f"{flag}={name}: {place} has no {attribute!r}; {spelling.near(attribute, names)}it has "
            f"{', '.join(names) or 'none'}"
        ) from error
    if not callable(function):
        raise ValueError(
            f"{flag}={name}: {attribute} is not a function, but of type {type(function).__name__}"
        )
    source = Path(getattr(module, "__file__", None) or "")
    sha256 = _loaded[source][0] if source in _loaded else None
    if sha256 is None and source.is_file():
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    file = place if of_file else getattr(module, "__file__", None)
    return Named(function, name, file, sha256)


def _imported(flag: str, name: str, place: str) -> ModuleType:
    look_in(Path.cwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):  # the user's module imports it
            raise
        raise ValueError(
            f"{flag}={name}: the module {error.name} is neither installed nor in {Path.cwd()}; "
            "install it, run the command in its folder, or give its file: path/to/nets.py:make"
        ) from error


def _of_file(flag: str, name: str, path: Path) -> ModuleType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{flag}={name}: cannot read {path} ({error.strerror}); paths are relative to the "
            "folder where the command runs"
        ) from error
    path, sha256 = path.resolve(), hashlib.sha256(source).hexdigest()
    if path in _loaded and _loaded[path][0] == sha256:
        return _loaded[path][1]
    look_in(path.parent)
    module = ModuleType(f"{path.stem}_{sha256[:8]}")  # a name that no import can clash with
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    _loaded[path] = sha256, module
    return module


def tuples(value: Any) -> Any:
    """Turn lists into tuples, at every depth."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def as_dict(value: Any) -> dict[str, Any]:
    """Turn a config section into a plain dict for JSON; `TypeError` if it is not a section."""
    if not hasattr(value, "items"):
        raise TypeError(f"{value!r} is not a section")
    return dict(value.items())


def look_in(folder: Path) -> None:
    """Let Python find modules in a folder, after all other folders."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


@contextlib.contextmanager
def explained(flag: str, name: str) -> Iterator[None]:
    """Turn an error in the user's code into a one-sentence `ValueError` that names its line."""
    try:
        yield
    except Exception as error:
        lines = _lines(error)
        if isinstance(error, ValueError) and lines[-1][0].is_relative_to(_PACKAGE):
            raise
        if isinstance(error, SyntaxError) and error.filename:
            lines.append((Path(error.filename), error.lineno))
        where = _where(lines, name.removeprefix(pytorch.PREFIX).rpartition(":")[0])
        raise ValueError(f"{flag}={name}: {where}{type(error).__name__}: {_text(error)}") from error


def _lines(error: BaseException) -> list[tuple[Path, int | None]]:
    return [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]


def place_of(error: BaseException) -> str:
    """Return "FILE, line N" of the user's code that raised an error, "" for other code."""
    lines = _lines(error)
    in_package = [number for number, (path, _) in enumerate(lines) if path.is_relative_to(_PACKAGE)]
    users = (
        [line for line in lines[in_package[-1] + 1 :] if _is_users(line[0])] if in_package else []
    )
    if not users:
        return ""
    path, line = users[-1]
    here = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if here else path}, line {line}"


def of_users(error: Exception) -> str | None:
    """Describe an error raised by the user's code in one sentence; None: it is not theirs."""
    place = place_of(error)
    return f"{place}: {type(error).__name__}: {_text(error)}" if place else None


def _is_users(path: Path) -> bool:
    """Return whether a file belongs neither to Python nor to an installed package."""
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    return path.is_file() and not installed and not path.is_relative_to(_PYTHON)


def _text(error: Exception) -> str:
    return _TRACING.sub("", " ".join(str(error).partition("\n")[0].split()))


# JAX's note on the traced function, which is one of ours: "f at FILE:LINE traced for jit", as a
# sentence or in brackets.
_TRACING = re.compile(r" ?[(]?[^.(]*\S+ at \S+:\d+ traced for \w+[.)]?")


def _where(lines: Sequence[tuple[Path, int | None]], place: str) -> str:
    """Return "FILE, line N: " of the innermost line in a file or module; "" if there is none."""
    source: str | None = place
    if not place.endswith(".py"):
        source = None
        with contextlib.suppress(ImportError, ValueError):  # no such module, or it has no file
            spec = importlib.util.find_spec(place)
            source = spec.origin if spec else None
    in_source = [
        line for path, line in lines if source and path.resolve() == Path(source).resolve()
    ]
    return f"{source}, line {in_source[-1]}: " if in_source else ""
