"""Commands in this process: their words, what they print, and their exit code."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from absl import flags
from absl.testing import flagsaver


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    error: str


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ended(call: Callable[[], Any], *, terminal: bool = False) -> Ended:
    """Call a command, and keep what it prints, to a terminal or not."""
    out, said, code = _Terminal() if terminal else io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        mock.patch.dict(os.environ),
    ):
        try:
            call()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Ended(code, out.getvalue(), said.getvalue())


def words(main: Callable[..., Any], *given: object) -> Ended:
    """Call a command as if these words had been typed behind its name."""
    argv = ["command", *map(str, given)]
    with mock.patch.object(sys, "argv", argv):
        return ended(main)


@contextlib.contextmanager
def with_config(name: str) -> Iterator[ModuleType]:
    """Yield the module of a command that takes --config, with flags that are its own meanwhile.

    absl has one list of flags for all commands, and --config can stand there once. The module is
    imported anew: another test may have imported it, and defined or removed its flags.
    """
    held = flags.FLAGS._flags()
    before = dict(held)
    try:
        if name not in _OWN:
            for module, defined in flags.FLAGS.flags_by_module_dict().items():
                for flag in defined if module.startswith(("jaxrobust.", "__main__")) else ():
                    held.pop(flag.name, None)
            held.pop("config", None)
            sys.modules.pop(f"jaxrobust.commands.{name}", None)
            module = importlib.import_module(f"jaxrobust.commands.{name}")
            _OWN[name] = module, dict(held)
        module, own = _OWN[name]
        held.clear()
        held.update(own)
        with flagsaver.flagsaver(), mock.patch.object(sys, "argv", [name]):
            yield module
    finally:
        held.clear()
        held.update(before)


_OWN: dict[str, tuple[ModuleType, dict[str, Any]]] = {}
