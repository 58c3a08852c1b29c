"""Text as wide as the terminal it appears on, one line at a time."""

import contextlib
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any, TextIO

TURN = threading.RLock()  # held to write; reentrant for signal handlers in the same thread
_HELD_UP_S = 1.0  # a blocked stream must not keep a process from ending
ADDRESSES: dict[str, str] = {}  # of folders that follow a bucket, for texts that name them
_below: list[tuple[TextIO, int]] = []  # the line written in place, and its width


def width(stream: TextIO) -> int | None:
    """Return the width of a stream's terminal; None if it is not a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError, AttributeError):  # closed, or a notebook
        return None


def is_dumb() -> bool:
    """Return whether the terminal declares that it cannot overwrite its text."""
    return os.environ.get("TERM") in ("dumb", "unknown")


def fitted(text: str, columns: int | None) -> str:
    """Wrap longer lines between words; in a pipe (None) leave them, for `grep`.

    Buckets are named instead of the folders that follow them.
    """
    for folder, address in ADDRESSES.items():
        text = text.replace(folder, address)
    if columns is None:
        return text
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
        options: Any = {"break_long_words": False, "break_on_hyphens": False}  # keeps paths, flags
        options |= {"replace_whitespace": False, "subsequent_indent": indent}
        fits = len(line) <= columns
        lines.append(line if fits else textwrap.fill(line, max(columns, 20), **options))
    return "\n".join(lines)


def show(text: str) -> None:
    """Print text on stdout, wrapped to its terminal."""
    with turn():
        print(fitted(text, width(sys.stdout)), flush=True)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Keep other threads from writing inside; a line written in place is erased."""
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
    """Print a line on stderr immediately, unchanged."""
    with turn():
        print(text, file=sys.stderr, flush=True)


def in_place(text: str) -> None:
    """Overwrite the line that was last written in place on stderr; the caller holds `TURN`."""
    blank = " " * (max((columns for _, columns in _below), default=0) - len(text))
    sys.stderr.write(f"\r{text}{blank}\r")  # other output starts at the line's beginning
    sys.stderr.flush()
    _below[:] = [(sys.stderr, len(text))]


def _in_a_child() -> None:
    global TURN
    TURN = threading.RLock()  # another thread may have held it
    _below.clear()


os.register_at_fork(after_in_child=_in_a_child)
