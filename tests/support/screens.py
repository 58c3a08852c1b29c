"""What stands on a terminal of a live panel, from what was written on it."""

import re

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_UP = "\x1b[1A"  # by which a panel goes back to its first line


def plain(written: str) -> str:
    """The same without colors and movements."""
    return _CODES.sub("", written)


def last_frame(written: str) -> list[str]:
    """The lines of a panel as they were drawn last; those above it are not among them."""
    frame = written.rstrip("\n").split(_UP)[-1] if _UP in written else written
    return [line.rstrip() for line in plain(frame).replace("\r", "").splitlines() if line.strip()]
