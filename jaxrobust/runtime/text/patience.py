"""Signs of life during silent waits: what the program is waiting for, and how long already."""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxrobust.runtime.text import terminal

AFTER_S = 1.0  # shorter waits need no line; a mistake shows up as one sentence
LOADING = "loading JAX and the package"
_COUNTED_S = 3.0  # after this, a terminal counts the seconds of an announced wait
_LOGGED_S = 5.0  # logs keep every line, so shorter waits are not logged
_LOOKS_S = 0.25  # seconds between two checks
_announced: set[str] = set()
_now = time.monotonic


class Wait:
    """Something the program is waiting for, since now or since `again`."""

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
        """Restart the count, because something else was just printed."""
        self._since, self._shown = _now(), 0

    def hear(self, inner: "Wait") -> None:
        """Stay silent for a while if something inside has just printed."""
        if inner._shown:
            self._shown = max(self._shown, _last_line(round(_now() - self._since)))

    def look(self) -> None:
        """Print what is due; the caller holds `terminal.TURN`."""
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
                    terminal.tell(f"{activity} ...")  # now: the process may end with a sentence
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
    """Round seconds down to the last line due in a pipe: one per full minute."""
    return seconds // 60 * 60


def _columns() -> int | None:
    """Return the width of the terminal if lines can be rewritten there, else None."""
    return None if terminal.is_dumb() else terminal.width(sys.stderr)


_waits: list[Wait] = []  # each is nested in the ones before it
_bars: list[Callable[[str], None]] = []
_begun: list[Wait] = []  # by `begin`
_came = threading.Event()
_watching: list[threading.Thread] = []


def begin(activity: str) -> None:
    """Print what this process is doing on stderr, after a second, until `end` is called.

    It imports nothing, so a command can call it before its imports.
    """
    if any(wait.activity() == activity for wait in _begun):
        return
    end()
    wait = Wait(lambda: activity, announced=False)
    _begun.append(wait)
    _push(wait)


def end() -> None:
    """Stop printing what was begun."""
    while _begun:
        _remove(_begun.pop())


@contextlib.contextmanager
def of(activity: str, *, here: bool = True) -> Iterator[None]:
    """Print on stderr, if `here`, what takes longer than a second inside, and how long."""
    if here:
        end()
    with _during(Wait(lambda: activity, announced=False), here):
        yield


def lasting(
    activity: str | Callable[[], str], *, last: str = "", since: str = "so far", here: bool = True
) -> contextlib.AbstractContextManager[Wait]:
    """Print on stderr, if `here`, how long an announced activity has been running.

    In a terminal, one line is redrawn every second and erased at the end; elsewhere a line is
    printed every minute. `activity` may be a function that describes the progress; `last` says how
    long it took before, `since` what is counted.
    """
    words = activity if callable(activity) else lambda: activity
    return _during(Wait(words, last=last, since=since), here)


@contextlib.contextmanager
def shown_by(bar: Callable[[str], None]) -> Iterator[None]:
    """Show waits inside on a bar, updated once a second."""
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
    if not _watching:  # first use
        _watching.append(threading.Thread(target=_watch, name="patience", daemon=True))
        _watching[0].start()  # a daemon thread
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
            if not _waits:  # none was added meanwhile
                _came.wait()
        time.sleep(_LOOKS_S)
        look()


def look() -> None:
    """Print what is due for the innermost wait."""
    with terminal.TURN, contextlib.suppress(Exception):  # for example, stderr is closed
        if _waits:
            _waits[-1].look()


@atexit.register
def _forget() -> None:
    """Print nothing while Python shuts down."""
    with terminal.turn():
        _waits.clear()


def _in_a_child() -> None:
    for state in (_waits, _begun, _bars, _watching):
        state.clear()


os.register_at_fork(after_in_child=_in_a_child)
