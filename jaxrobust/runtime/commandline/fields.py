"""Command flags as dataclass fields: each has a type, a default and a one-sentence help.

`read` fills a dataclass with argparse; `define` and `given` do the same with absl's flags, which
commands with `--config.key=value` need.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from absl import flags

from jaxrobust.runtime.commandline.arguments import Arguments, stop
from jaxrobust.runtime.files import buckets

flags.disclaim_key_flags()  # the flags from `define` appear in --help of the caller

Flags = TypeVar("Flags")
_ABSL: dict[tuple[type, bool], Callable[..., Any]] = {
    (str, False): flags.DEFINE_string,
    (int, False): flags.DEFINE_integer,
    (bool, False): flags.DEFINE_boolean,
    (str, True): flags.DEFINE_multi_string,
    (int, True): flags.DEFINE_multi_integer,
}


class _About(NamedTuple):
    text: str
    word: bool  # a positional argument
    least: float | None
    reads: Callable[[str, Any], Any] | None
    options: dict[str, Any]  # for argparse
    name: str  # of the flag if Python reserves that word; empty: as the field


def flag(
    text: str,
    default: Any = None,
    *,
    required: bool = False,
    word: bool = False,
    least: float | None = None,
    reads: Callable[[str, Any], Any] | None = None,
    name: str = "",
    **options: Any,
) -> Any:
    """Declare a dataclass field that is a flag of a command.

    Args:
      text: the help text.
      default: the value if the flag is not given.
      required: whether the flag must be given.
      word: whether users write only the value, without `--name`.
      least: the smallest number accepted; applies to each of several.
      reads: turns (name, text) into the value, or raises a `ValueError` that explains the format.
      name: of the flag, if Python reserves that word: `from`.
      options: further argparse arguments, such as `choices`.
    """
    if required and not word:
        options["required"] = True
    about = {"about": _About(text, word, least, reads, options, name)}
    optional = {} if required else {"default": default}
    return dataclasses.field(metadata=about, **optional)  # type: ignore[call-overload]


def read(
    kind: type[Flags], doc: str | None, argv: Sequence[str] | None = None, **options: Any
) -> Flags:
    """Read a command line into a dataclass; exit with one sentence on an error."""
    parser = Arguments(doc or "", **options)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        about: _About = field.metadata["about"]
        plain, several = _plain(hints[field.name], about)
        words: dict[str, Any] = {"help": about.text} | ({"nargs": "+"} if several else {})
        words |= {"action": "store_true"} if plain is bool else {"type": plain}
        if field.default is not dataclasses.MISSING:
            words["default"] = field.default
        add = parser.add_argument if about.word else parser.flag
        add(about.name or field.name, **(words | about.options))
    try:
        return _made(kind, vars(parser.parse_args(argv)))
    except ValueError as error:
        stop(error, 2)


def define(kind: type) -> None:
    """Define absl's flags for the fields of a dataclass; commands may share flags."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        about: _About = field.metadata["about"]
        make = _ABSL[_plain(hints[field.name], about)]
        default = None if field.default == () else field.default
        make(field.name, default, about.text, allow_override=True)


def given(kind: type[Flags]) -> Flags:
    """Return the dataclass filled from absl's flags."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return _made(kind, {name: flags.FLAGS[name].value for name in names})


def _plain(hint: Any, about: _About) -> tuple[type, bool]:
    """Return the type of a single value, and whether the flag takes several."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return (str, False) if about.reads else (hint, False)


def _local(flag: str, value: Any) -> Any:
    """Return the folder that follows a `gs://` address, of which `Path` dropped a slash."""
    if isinstance(value, Path) and value.parts[:1] == ("gs:",):
        return buckets.opened(flag, "gs://" + "/".join(value.parts[1:]), light=True)
    return value


def _made(kind: type[Flags], values: dict[str, Any]) -> Flags:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, about = field.name, field.metadata["about"]
        value = values.pop(about.name or name)
        if _plain(hints[name], about)[1]:
            one = isinstance(value, (str, int))
            value = (value,) if one else () if value is None else tuple(value)
        elif about.reads and value is not None:
            value = about.reads(name, value)
        several = isinstance(value, tuple)
        value = tuple(_local(name, one) for one in value) if several else _local(name, value)
        for number in value if isinstance(value, tuple) else (value,):
            if about.least is not None and number is not None and number < about.least:
                raise ValueError(f"--{name}={number} must be at least {about.least}")
        values[name] = value
    return kind(**values)
