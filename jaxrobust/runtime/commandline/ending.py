"""How a command ends that other processes may run with it: one sentence, and its exit code."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from jaxrobust.runtime.commandline.arguments import stop
from jaxrobust.runtime.processes import lifeline
from jaxrobust.runtime.processes.launch import join_hosts
from jaxrobust.runtime.processes.signals import Listener
from jaxrobust.runtime.text import terminal

_PATIENCE = 20  # seconds; after 15 a machine that does not answer is known to be gone


class Ending:
    """Ends this process where it has to, and tells the others of its pod.

    While it is entered, SIGTERM and Ctrl-C are answered at once, also while something compiles.
    An error inside that comes of the end of another process ends this one with what is known of
    that.

    Attributes:
      again: says what the same command does with what is saved.
    """

    def __init__(self, again: Callable[[], str]) -> None:
        self.again = again
        self._line: lifeline.Lifeline | None = None
        self._pod = False
        self._ends = threading.Lock()  # whoever has it says the last words
        self._listener = Listener(self.at_once, self.again)

    def join(self, pod: dict[str, Any]) -> None:
        """Join the processes of a pod; the arguments are those of `join_hosts`."""
        self._pod = True
        join_hosts(**pod)
        self._line = lifeline.joined(self.at_once, self.again)

    def __enter__(self) -> "Ending":
        self._listener.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pod and lifeline.lost(error):
            threading.Event().wait(_PATIENCE if self._line else 0)  # its thread ends the process
            reason = str(error).splitlines()[0]
            self.at_once(f"the connection to another process broke ({reason}); {self.again()}", 75)
        self._listener.__exit__()

    def __call__(self, message: object, code: int) -> NoReturn:
        """End with a sentence: at once in a pod or after Ctrl-C, where Python may crash."""
        if self._pod or self._listener.interrupted:
            self.at_once(message, code)
        stop(message, code)

    def at_once(self, message: object, code: int) -> NoReturn:
        """End with a sentence, from any thread, whatever the others of this process do."""
        self._ends.acquire()
        said = terminal.fitted(f"jaxrobust: {message}", terminal.width(sys.stderr))
        with terminal.turn():
            print(said, file=sys.stderr, flush=True)
        if self._line is not None:
            self._line.tell(code)
        os._exit(code)
