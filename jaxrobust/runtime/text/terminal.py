"""Text as wide as the terminal that shows it."""

import os
import re
import sys
import textwrap
from typing import TextIO


def width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream is; None where it is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError, AttributeError):  # closed, or a notebook's
        return None


def fitted(text: str, columns: int | None) -> str:
    """Return text whose lines of more than so many columns are broken between words.

    A terminal would break them anywhere. In a pipe (None) a line stays one, for `grep`.
    """
    if columns is None:
        return text
    return "\n".join(
        line if len(line) <= columns else _broken(line, columns) for line in text.split("\n")
    )


def show(text: str) -> None:
    """Print text on stdout, as wide as what shows it."""
    print(fitted(text, width(sys.stdout)), flush=True)


def _broken(line: str, columns: int) -> str:
    indent = re.match(r" *", line)[0] + "  "  # type: ignore[index]
    return textwrap.fill(
        line,
        max(columns, 20),
        subsequent_indent=indent,
        break_long_words=False,  # of paths
        break_on_hyphens=False,  # of flags
        drop_whitespace=True,
        replace_whitespace=False,
    )
