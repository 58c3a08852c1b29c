"""What you see during a run: one bar on a terminal or in a notebook, else lines."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import jax

from jaxrobust.runtime.text import terminal

try:
    from tqdm.auto import tqdm as tqdm
except ModuleNotFoundError:  # the wheel `jaxrobust-attacks` does not need it
    tqdm = None

NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in getattr(tqdm, "__mro__", ()))
_YELLOW, _PLAIN = "\033[33m", "\033[0m"


def say(message: str, *, every_process: bool = False) -> None:
    """Print a line on stderr, above any bar, from the first process; warnings are yellow."""
    if "WARNING" in message and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        message = f"{_YELLOW}{message}{_PLAIN}"
    if every_process or jax.process_index() == 0:
        with terminal.turn():
            write = tqdm.write if tqdm else print
            write(terminal.fitted(message, terminal.width(sys.stderr)), file=sys.stderr)


def watched() -> bool:
    """Return whether a panel can be drawn: in notebooks and, with rich, on most terminals."""
    on_terminal = sys.stderr.isatty() and not terminal.is_dumb()
    return NOTEBOOK or (on_terminal and find_spec("rich") is not None)


def columns() -> int:
    """Return the terminal's width; 80 without one."""
    return terminal.width(sys.stderr) or 80


class LinePart(NamedTuple):
    """A piece of a line; the highest `rank` is dropped first if space is short."""

    text: str
    rank: int = 0


def fitted(head: str, parts: Sequence[LinePart], room: int) -> str:
    """Make tqdm's `bar_format` for `room` columns; the bar takes up to 20 of them, or none."""
    taken = len(f"{head} 100%  ")
    line = joined("", parts, room - taken)
    width = min(room - taken - len(line) - 4, 20)
    bar = f"|{{bar:{width}}}| " if width > 5 else ""
    return f"{head} {{percentage:3.0f}}% {'{bar} ' if NOTEBOOK else bar}{line}"


def joined(head: str, parts: Sequence[LinePart], room: int) -> str:
    """Join head and parts to a line shorter than `room` columns, dropping parts that do not fit."""
    shown = [part for part in parts if part.text]
    while True:
        line = " ".join([*([head] if head else []), *(part.text for part in shown)])
        if len(shown) < 2 or len(line) < room:
            return line.removesuffix(",")
        shown.remove(max(shown, key=lambda part: part.rank))


def clock(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, for people."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
