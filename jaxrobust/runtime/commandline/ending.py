"""How a command joins others of a pod, and how it ends: by a sentence and an exit code."""

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags

from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.commandline.arguments import show, stop
from jaxrobust.runtime.processes import lifeline
from jaxrobust.runtime.processes.launch import join_hosts
from jaxrobust.runtime.processes.signals import Listener

_PATIENCE = 20  # seconds; after 15 a machine that does not answer is known to be gone
flags.disclaim_key_flags()  # the flags below are in the --help of the command that asks for them


def define_host_flags() -> None:
    """Define the flags of a command that several hosts run together, for `hosts`."""
    join = "Join the other hosts of a TPU or GPU pod; the command is started on each of them."
    flags.DEFINE_bool("multihost", False, join, allow_override=True)
    default = "It implies --multihost; default: what Cloud TPU, Slurm, GKE and others say."
    address = f"Address of process 0, HOST:PORT, where it waits for the others. {default}"
    flags.DEFINE_string("coordinator_address", None, address, allow_override=True)
    count, index = f"Number of processes. {default}", f"Number of this process, from 0. {default}"
    flags.DEFINE_integer("num_processes", None, count, allow_override=True)
    flags.DEFINE_integer("process_id", None, index, allow_override=True)
    waits = "Seconds to wait for the other processes; default: 300. It implies --multihost."
    flags.DEFINE_float("coordinator_timeout", None, waits, allow_override=True)


def hosts() -> dict[str, Any] | None:
    """Read the arguments of `launch.join_hosts` in the flags; None: this process is alone."""
    arguments = {
        "coordinator": flags.FLAGS.coordinator_address,
        "processes": flags.FLAGS.num_processes,
        "process": flags.FLAGS.process_id,
        "timeout_s": flags.FLAGS.coordinator_timeout,
    }
    several = flags.FLAGS.multihost or any(value is not None for value in arguments.values())
    return arguments if several else None


class Ending:
    """Ends this process where it has to, and tells the others of its pod.

    While it is entered, SIGTERM and Ctrl-C are answered at once, also while something compiles. An
    error inside that comes of another process's end ends this one with what is known of that.
    `again` says what the same command does with what is saved.
    """

    def __init__(self, again: Callable[[], str]) -> None:
        self.again = again
        self._line: lifeline.Lifeline | None = None
        self._pod = False
        self._ends = threading.Lock()  # its holder says the last words
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

    def fault(self, error: Exception, *, in_pod: bool) -> None:
        """End for a fault of the user's code or, in a pod, of ours; else the caller raises it."""
        if message := functions.of_users(error):
            self(message, 2)
        if in_pod:
            traceback.print_exc()  # and go, else the others wait for this one
            self(error, 1)

    def at_once(self, message: object, code: int) -> NoReturn:
        """End the process with a message, from any thread, whatever the other threads do."""
        self._ends.acquire()
        show(message)
        if self._line is not None:
            self._line.tell(code)
        os._exit(code)
