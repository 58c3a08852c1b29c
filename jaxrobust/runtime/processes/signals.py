"""What a process says and does when asked to stop, whatever its main thread is doing.

Python runs a signal handler between two Python instructions, so a compilation delays it, silently,
for minutes. A separate thread notices each signal immediately.
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

_MOMENT = 0.5  # seconds within which a main thread that runs Python handles the signal
_LOST = 0  # sent to a listener in place of a signal number: a KeyboardInterrupt was lost
_DEEP = 12  # maximum number of compiler frames above the frame that calls it


class Reaction(NamedTuple):
    """A message, and the exit code to end with at once; None: the main thread continues."""

    text: str
    code: int | None


def reaction(number: int, *, asked_before: bool, saves: bool, compiling: bool) -> Reaction | None:
    """Choose the response to SIGTERM or SIGINT on top of Python's handler; None: no response.

    A training loop `saves`: it takes note and ends later. Nothing can interrupt a compilation.
    """
    if number == signal.SIGTERM and not saves:
        return Reaction("stopped (SIGTERM)", 143)
    if not compiling:
        return None
    if number == signal.SIGINT and asked_before:
        return Reaction("interrupted while compiling", 130)
    if asked_before:
        return None
    also = ", without saving" if saves else ""
    then = "saving and stopping" if saves else "stopping"
    once_more = " again" if number == signal.SIGINT else ""
    at_once = f"Ctrl-C{once_more}: stop at once{also}"
    return Reaction(f"{then} once the compiler is done, which may take minutes ({at_once})", None)


def compiles(frame: FrameType | None) -> bool:
    """Return whether a thread with this innermost frame is waiting for XLA's compiler."""
    for _ in range(_DEEP):
        if frame is None:
            return False
        if Path(frame.f_code.co_filename).parts[-3:] == ("jax", "_src", "compiler.py"):
            return True
        frame = frame.f_back
    return False


class Listener:
    """Handles SIGTERM and Ctrl-C inside its context, which the main thread enters.

    Python raises KeyboardInterrupt wherever that thread is, and drops it inside a callback of the
    garbage collector, such as JAX's; it is then raised again. `interrupted` says whether Ctrl-C
    came. `end` ends the process at once with a sentence and a code; `again` says what is saved.
    """

    def __init__(self, end: Callable[[str, int], None], again: Callable[[], str]) -> None:
        self._end, self._again, self.interrupted = end, again, False
        self._main = threading.main_thread().ident or 0
        self._requested = False
        self._saves = False  # whether a training loop noted the last signal
        self._goes_on = 0  # the signal after which the main thread may still enter the compiler
        self._repeated = 0  # pending signals that we sent

    def __enter__(self) -> "Listener":
        if threading.get_ident() != self._main:  # Python delivers signals to the main thread only
            return self
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._before = signal.getsignal(signal.SIGTERM)
        if self._before == signal.SIG_DFL:  # otherwise the caller handles it
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
        self._writes.close()  # ends the thread

    def _noted(self, number: int, frame: FrameType | None) -> None:
        """Replace the default handler, which would end the process silently."""

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _dropped(self, dropped: Any) -> None:
        """Replace `sys.unraisablehook`, which receives exceptions that are lost."""
        if dropped.exc_type is KeyboardInterrupt and threading.get_ident() == self._main:
            with contextlib.suppress(OSError):  # nobody is listening
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
                    time.sleep(0.02)  # until the main thread leaves that callback
                    self._repeated += 1
                    signal.pthread_kill(self._main, signal.SIGINT)
                elif came[0] == signal.SIGINT and self._repeated:
                    self._repeated -= 1
                elif came[0] in (signal.SIGTERM, signal.SIGINT):
                    # Check now: a moment later, the loop may be over while the command still runs.
                    self._saves = signal.getsignal(signal.SIGTERM) != self._noted
                    if self._saves or came[0] != signal.SIGTERM:
                        time.sleep(_MOMENT)
                    self._look(came[0], asked_before=self._requested)
                    self._requested = True

    def _look(self, number: int, *, asked_before: bool) -> None:
        """Respond to a signal, depending on what the main thread is doing now."""
        compiling = compiles(sys._current_frames().get(self._main))
        state = {"asked_before": asked_before, "saves": self._saves, "compiling": compiling}
        response = reaction(number, **state)
        if response is None:  # it may still enter the compiler
            self._goes_on = self._goes_on if asked_before else number
        elif response.code is not None:
            self._end(f"{response.text}; {self._again()}", response.code)
        else:
            # Imports JAX, which commands do late.
            from jaxrobust.runtime.text.progress import say

            self._goes_on = 0
            say(response.text, every_process=True)


_entered: list[Listener] = []


def _in_a_child() -> None:
    """Leave the parent's signals alone: stopping a worker must not stop the parent."""
    for listener in _entered:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, listener._before)
    _entered.clear()


os.register_at_fork(after_in_child=_in_a_child)
