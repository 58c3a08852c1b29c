"""What a process says and does at once when it is asked to stop, wherever its main thread is.

Python runs its handler of a signal between two instructions of Python, so that a compilation of
minutes holds it up without a word. A thread hears of each signal when it comes.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

_MOMENT = 0.5  # seconds in which a main thread that runs Python has met the signal
_LOST = 0  # what a listener is told, in addition to signal numbers: Ctrl-C was raised in vain
_DEEP = 12  # frames of the compiler's own that may lie above the one which calls it


class Reaction(NamedTuple):
    """What to say, and the exit code to end with at once; None: the main thread continues."""

    text: str
    code: int | None


def reaction(number: int, *, asked_before: bool, saves: bool, compiling: bool) -> Reaction | None:
    """Choose the response to SIGTERM or SIGINT in addition to Python's handler; None: there is
    none.

    A training loop `saves`: it takes note and ends. Nothing interrupts a main thread that compiles.
    """
    if number == signal.SIGTERM and not saves:
        return Reaction("stopped (SIGTERM)", 143)
    if not compiling:
        return None
    if number == signal.SIGINT and asked_before:
        return Reaction("interrupted while it compiled", 130)
    if asked_before:
        return None
    also = ", without saving" if saves else ""
    then = "saving and stopping" if saves else "stopping"
    once_more = " again" if number == signal.SIGINT else ""
    at_once = f"Ctrl-C{once_more}: stop at once{also}"
    return Reaction(f"{then} as soon as the compiler is done, perhaps in minutes ({at_once})", None)


def compiles(frame: FrameType | None) -> bool:
    """Tell whether a thread with this innermost frame waits for XLA's compiler."""
    for _ in range(_DEEP):
        if frame is None:
            return False
        if Path(frame.f_code.co_filename).parts[-3:] == ("jax", "_src", "compiler.py"):
            return True
        frame = frame.f_back
    return False


class Listener:
    """Hears SIGTERM and Ctrl-C while it is entered, by the main thread.

    Python raises KeyboardInterrupt wherever that thread is, and drops it in a callback of the
    garbage collector, such as JAX's: it is raised again then. `interrupted` tells that Ctrl-C came.
    `end` ends the process at once, by a sentence and a code; `again` says what is saved.
    """

    def __init__(self, end: Callable[[str, int], None], again: Callable[[], str]) -> None:
        self._end, self._again, self.interrupted = end, again, False
        self._main = threading.main_thread().ident or 0
        self._requested = False
        self._saves = False  # whether a training loop took note of the last signal
        self._goes_on = 0  # the signal after which the main thread may come to the compiler
        self._repeated = 0  # signals on their way that are ours

    def __enter__(self) -> "Listener":
        if threading.get_ident() != self._main:  # Python gives signals to the main thread alone
            return self
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._before = signal.getsignal(signal.SIGTERM)
        if self._before == signal.SIG_DFL:  # else somebody has a use of his own for it
            signal.signal(signal.SIGTERM, self._noted)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        self._fd_before = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._dropped
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        _entered.append(self)
        return self

    def __exit__(self, *unused: object) -> None:
        if self not in _entered:
            return
        _entered.remove(self)
        signal.set_wakeup_fd(self._fd_before)
        if sys.unraisablehook == self._dropped:
            sys.unraisablehook = self._hook_before
        if signal.getsignal(signal.SIGTERM) == self._noted:
            signal.signal(signal.SIGTERM, self._before)
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._writes.close()  # which ends the thread

    def _noted(self, number: int, frame: FrameType | None) -> None:
        """Stand in the place of the default, which would end the process without a word."""

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _dropped(self, dropped: Any) -> None:
        """Stand in the place of `sys.unraisablehook`, which is told of exceptions that are lost."""
        if dropped.exc_type is KeyboardInterrupt and threading.get_ident() == self._main:
            with contextlib.suppress(OSError):  # nobody listens any more
                self._writes.send(bytes([_LOST]))
        else:
            self._hook_before(dropped)

    def _listen(self) -> None:
        with self._reads:
            while True:
                self._reads.settimeout(_MOMENT if self._goes_on else None)
                try:
                    came = self._reads.recv(1)
                except TimeoutError:
                    self._look(self._goes_on, asked_before=False)
                    continue
                if not came:
                    return
                if came[0] == _LOST:
                    time.sleep(0.02)  # for the main thread to leave that callback
                    self._repeated += 1
                    signal.pthread_kill(self._main, signal.SIGINT)
                elif came[0] == signal.SIGINT and self._repeated:
                    self._repeated -= 1
                elif came[0] in (signal.SIGTERM, signal.SIGINT):
                    # Now: by the end of a moment the loop may be over, and the command not yet.
                    self._saves = signal.getsignal(signal.SIGTERM) != self._noted
                    if self._saves or came[0] != signal.SIGTERM:
                        time.sleep(_MOMENT)
                    self._look(came[0], asked_before=self._requested)
                    self._requested = True

    def _look(self, number: int, *, asked_before: bool) -> None:
        """React to a signal, by what the main thread does by now."""
        compiling = compiles(sys._current_frames().get(self._main))
        state = {"asked_before": asked_before, "saves": self._saves, "compiling": compiling}
        response = reaction(number, **state)
        if response is None:  # it may come to the compiler yet
            self._goes_on = self._goes_on if asked_before else number
        elif response.code is not None:
            self._end(f"{response.text}; {self._again()}", response.code)
        else:
            # With JAX, which a command imports late.
            from jaxrobust.runtime.text.progress import say

            self._goes_on = 0
            say(response.text, every_process=True)


_entered: list[Listener] = []


def _in_a_child() -> None:
    """Leave the parent's signals alone: a worker that is ended must not end it."""
    for listener in _entered:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, listener._before)
    _entered.clear()


os.register_at_fork(after_in_child=_in_a_child)
