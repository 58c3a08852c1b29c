"""Signs of life where there is nothing to say yet: what is waited for, and for how long."""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxrobust.runtime.text import terminal

AFTER_S = 1.0  # what is done by then needs no line: a mistake is answered by one sentence
LOADING = "loading JAX and the package"
_COUNTED_S = 3.0  # from here on a terminal counts the seconds of what was announced
_LOGGED_S = 5.0  # a log keeps its lines, so what is done by then needs none
_LOOKS_S = 0.25  # between two looks at what is waited for
_announced: set[str] = set()
_now = time.monotonic


class Wait:
    """Something that is waited for, since now or since `again`."""

    def __init__(
        self,
        activity: Callable[[], str],
        *,
        announced: bool = True,
        last: str = "",
        since: str = "so far",
    ) -> None:
        self.activity, self._last, self._counts = activity, last, since
        self._announced = announced
        self.again()

    def again(self) -> None:
        """Count from now on: something else was just said."""
        self._since, self._shown = _now(), 0

    def hear(self, inner: "Wait") -> None:
        """Say nothing at once where something inside of this has just spoken for as long."""
        if inner._shown:
            self._shown = max(self._shown, _last_line(round(_now() - self._since)))

    def look(self) -> None:
        """Write what is due, by the holder of the `terminal.TURN`."""
        passed = _now() - self._since
        if passed < AFTER_S:
            return
        seconds = round(passed)
        columns = _columns()
        if columns is None and not _bars:
            if not self._announced and passed >= _LOGGED_S:
                self._announced = True
                if (activity := self.activity()) not in _announced:
                    _announced.add(activity)
                    terminal.tell(f"{activity} ...")  # at once: the process may end with a sentence
            mark = _last_line(seconds)
            if mark > self._shown:
                self._shown = mark
                sys.stderr.write(f"{self._words(mark, 80)}\n")
                sys.stderr.flush()
        elif seconds > self._shown and (seconds >= _COUNTED_S or not self._announced):
            self._shown = seconds
            show = _bars[-1] if _bars else terminal.in_place
            show(self._words(seconds, columns or 80))

    def _words(self, seconds: int, columns: int) -> str:
        long = f"{seconds // 60} min" if seconds >= 120 else f"{seconds} s"
        activity, counted = self.activity(), f", {long} {self._counts}"
        if self._last and len(line := f"{activity}{counted} ({self._last})") < columns:
            return line
        room = columns - 1 - len(counted)
        short = f"{activity[: max(room - 3, 0)]}..."
        return (activity if len(activity) <= room else short) + counted


def _last_line(seconds: int) -> int:
    """Round seconds down to those at which a pipe gets a line: each full minute."""
    return seconds // 60 * 60


def _columns() -> int | None:
    """Measure the terminal, where a line can be written again; None: where it cannot."""
    return None if terminal.is_dumb() else terminal.width(sys.stderr)


_waits: list[Wait] = []  # the last one is inside of those before
_bars: list[Callable[[str], None]] = []
_begun: list[Wait] = []  # by `begin`
_came = threading.Event()
_watching: list[threading.Thread] = []


def begin(activity: str) -> None:
    """Print on stderr what this process does, from a second on, until `end` is called.

    It loads nothing, so that a command can call it before its imports.
    """
    if any(wait.activity() == activity for wait in _begun):
        return
    end()
    wait = Wait(lambda: activity, announced=False)
    _begun.append(wait)
    _push(wait)


def end() -> None:
    """Print nothing any more of what was begun."""
    while _begun:
        _remove(_begun.pop())


@contextlib.contextmanager
def of(activity: str, *, here: bool = True) -> Iterator[None]:
    """Print on stderr, if `here`, what is done inside for longer than a second, and how long."""
    if here:
        end()
    with _during(Wait(lambda: activity, announced=False), here):
        yield


def lasting(
    activity: str | Callable[[], str], *, last: str = "", since: str = "so far", here: bool = True
) -> contextlib.AbstractContextManager[Wait]:
    """Print on stderr, if `here`, for how long what was announced is going on.

    In a terminal that is a line that is written again each second and goes at the end, else a line
    each minute. `activity` may be a function that says how far it is;
    `last` are the words for how long it took before, `since` those for what is counted.
    """
    words = activity if callable(activity) else lambda: activity
    return _during(Wait(words, last=last, since=since), here)


@contextlib.contextmanager
def shown_by(bar: Callable[[str], None]) -> Iterator[None]:
    """Let a bar show, once a second, what is waited for inside."""
    _bars.append(bar)
    try:
        yield
    finally:
        with terminal.turn():
            _bars.remove(bar)


@contextlib.contextmanager
def _during(wait: Wait, here: bool) -> Iterator[Wait]:
    if not here:
        yield wait
        return
    _push(wait)
    try:
        yield wait
    finally:
        _remove(wait)


def _push(wait: Wait) -> None:
    _waits.append(wait)
    if not _watching:  # the first time
        _watching.append(threading.Thread(target=_watch, name="patience", daemon=True))
        _watching[0].start()  # it keeps no process alive
    _came.set()


def _remove(wait: Wait) -> None:
    with terminal.turn(), contextlib.suppress(ValueError):
        _waits.remove(wait)
        if _waits:
            _waits[-1].hear(wait)


def _watch() -> None:
    while True:
        if not _waits:
            _came.clear()
            if not _waits:  # none came in between
                _came.wait()
        time.sleep(_LOOKS_S)
        look()


def look() -> None:
    """Write what is due of the innermost thing that is waited for."""
    with terminal.TURN, contextlib.suppress(Exception):  # such as that nobody reads stderr any more
        if _waits:
            _waits[-1].look()


@atexit.register
def _forget() -> None:
    """Let nothing be written while Python ends."""
    with terminal.turn():
        _waits.clear()


def _in_a_child() -> None:
    for state in (_waits, _begun, _bars, _watching):
        state.clear()


os.register_at_fork(after_in_child=_in_a_child)
