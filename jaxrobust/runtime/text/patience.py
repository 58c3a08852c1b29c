"""A line about what is being waited for, where there would be none for a second."""

import contextlib
import sys
import threading
from collections.abc import Iterator

AFTER_S = 1.0  # what is done by then needs no line: a mistake is answered by one sentence
LOADING = "loading JAX and the package"
_waiting: list[threading.Timer] = []
_told: set[str] = set()


def begin(what: str) -> None:
    """Print on stderr what this process is doing, in a second, unless `end` is called before or it
    was said already.

    It loads nothing, so that a command can call it before its imports.
    """
    end()
    timer = threading.Timer(AFTER_S, _tell, [what])
    timer.daemon = True  # it keeps no process alive
    timer.start()
    _waiting.append(timer)


def end() -> None:
    """Print nothing any more of what was begun."""
    while _waiting:
        _waiting.pop().cancel()


@contextlib.contextmanager
def of(what: str, *, here: bool = True) -> Iterator[None]:
    """Print on stderr what is done inside, where it takes longer than a second; if it is `here`,
    not on another host, that people are told.
    """
    if here:
        begin(what)
    try:
        yield
    finally:
        end()


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        sys.stderr.write(f"{what} ...\n")  # at once: the main thread may end with a sentence
        sys.stderr.flush()
