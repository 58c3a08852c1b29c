"""How a command joins a pod, and how it exits: with a sentence and an exit code."""

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags

from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.commandline.arguments import show, stop
from jaxrobust.runtime.files import buckets
from jaxrobust.runtime.processes import lifeline
from jaxrobust.runtime.processes.launch import join_hosts
from jaxrobust.runtime.processes.signals import Listener

_PATIENCE = 20  # seconds; an unresponsive machine counts as gone after 15
flags.disclaim_key_flags()  # each command's --help decides which of the flags below it shows


def define_host_flags() -> None:
    """Define the flags that `hosts` reads, for a command that several hosts run together."""
    join = "Join the other hosts of a TPU or GPU pod; start the command on every host."
    flags.DEFINE_bool("multihost", False, join, allow_override=True)
    default = "Implies --multihost; default: detected on Cloud TPU, Slurm, GKE and others."
    address = f"Address of process 0, HOST:PORT, where it waits for the others. {default}"
    flags.DEFINE_string("coordinator_address", None, address, allow_override=True)
    count, index = f"Number of processes. {default}", f"Number of this process, from 0. {default}"
    flags.DEFINE_integer("num_processes", None, count, allow_override=True)
    flags.DEFINE_integer("process_id", None, index, allow_override=True)
    waits = "Seconds to wait for the other processes; default: 300. Implies --multihost."
    flags.DEFINE_float("coordinator_timeout", None, waits, allow_override=True)


def hosts() -> dict[str, Any] | None:
    """Return the arguments of `launch.join_hosts` from the flags; None: this process is alone."""
    arguments = {
        "coordinator": flags.FLAGS.coordinator_address,
        "processes": flags.FLAGS.num_processes,
        "process": flags.FLAGS.process_id,
        "timeout_s": flags.FLAGS.coordinator_timeout,
    }
    several = flags.FLAGS.multihost or any(value is not None for value in arguments.values())
    return arguments if several else None


class Ending:
    """Ends this process when necessary, and tells the other processes of its pod.

    Inside the context, SIGTERM and Ctrl-C are answered at once, even during a compilation. An error
    caused by another process's end ends this one, with what is known about that end. `again` says
    how to continue with the same command from what is saved.
    """

    def __init__(self, again: Callable[[], str]) -> None:
        self.again = again
        self._line: lifeline.Lifeline | None = None
        self._pod = False
        self._ends = threading.Lock()  # whoever holds it prints the last message
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
            threading.Event().wait(_PATIENCE if self._line else 0)  # its thread will end us
            reason = str(error).splitlines()[0]
            self.at_once(f"the connection to another process broke ({reason}); {self.again()}", 75)
        self._listener.__exit__()

    def __call__(self, message: object, code: int) -> NoReturn:
        """Exit with a sentence: immediately in a pod or after Ctrl-C, when Python may crash."""
        if self._pod or self._listener.interrupted:
            self.at_once(message, code)
        stop(message, code)

    def fault(self, error: Exception, *, in_pod: bool) -> None:
        """Exit for a fault in the user's code or, in a pod, in ours; else the caller raises it."""
        if message := functions.of_users(error):
            self(message, 2)
        if in_pod:
            traceback.print_exc()  # and exit, or the others would wait for this process
            self(error, 1)

    def at_once(self, message: object, code: int) -> NoReturn:
        """Exit the process with a message, from any thread, whatever the others are doing."""
        self._ends.acquire()
        show(message)
        uploading = threading.Thread(target=buckets.close, daemon=True)
        uploading.start()
        uploading.join(_PATIENCE)
        if self._line is not None:
            self._line.tell(code)
        os._exit(code)
