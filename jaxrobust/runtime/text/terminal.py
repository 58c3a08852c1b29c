"""Text as wide as the terminal that shows it, one line at a time."""

import contextlib
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any, TextIO

TURN = threading.RLock()  # of who writes; a handler of signals may interrupt its own thread
_HELD_UP_S = 1.0  # a stream that takes nothing must not keep a process from ending
_below: list[tuple[TextIO, int]] = []  # the line that is written in place, and its columns


def width(stream: TextIO) -> int | None:
    """Measure the columns of the terminal that a stream is; None if it is not a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError, AttributeError):  # closed, or a notebook's
        return None


def is_dumb() -> bool:
    """Tell whether the terminal says of itself that it cannot write over what it shows."""
    return os.environ.get("TERM") in ("dumb", "unknown")


def fitted(text: str, columns: int | None) -> str:
    """Break longer lines between words; in a pipe (None) they stay, for `grep`."""
    if columns is None:
        return text
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
        options: Any = {"break_long_words": False, "break_on_hyphens": False}  # paths, and flags
        options |= {"replace_whitespace": False, "subsequent_indent": indent}
        fits = len(line) <= columns
        lines.append(line if fits else textwrap.fill(line, max(columns, 20), **options))
    return "\n".join(lines)


def show(text: str) -> None:
    """Print text on stdout, as wide as what shows it."""
    with turn():
        print(fitted(text, width(sys.stdout)), flush=True)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Keep other threads from writing inside; a line that is written in place is gone there."""
    has_turn = TURN.acquire(timeout=_HELD_UP_S)
    try:
        while _below:
            stream, columns = _below.pop()
            stream.write(f"\r{' ' * columns}\r")
            stream.flush()
        yield
    finally:
        if has_turn:
            TURN.release()


def tell(text: str) -> None:
    """Print a line on stderr at once, as it is."""
    with turn():
        print(text, file=sys.stderr, flush=True)


def in_place(text: str) -> None:
    """Write a line on stderr over the one that was written so before; by who has the `TURN`."""
    blank = " " * (max((columns for _, columns in _below), default=0) - len(text))
    sys.stderr.write(f"\r{text}{blank}\r")  # what others write begins where it did
    sys.stderr.flush()
    _below[:] = [(sys.stderr, len(text))]


def _in_a_child() -> None:
    global TURN
    TURN = threading.RLock()  # another thread may have had it
    _below.clear()


os.register_at_fork(after_in_child=_in_a_child)
