"""How the processes of a pod learn that one of them has ended, for whatever reason.

Each is connected to process 0. Its system closes the connection when the process ends, and process
0 notices within 15 s that a machine does not answer. A process that exists but hangs, such as a
stopped one (SIGSTOP), sends no heartbeats. JAX tells the others after 50 to 100 s, or aborts them
at once if it was process 0.
"""

import atexit
import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxrobust.runtime.processes.launch import listening

_KEY = "jaxrobust/lifeline"
_PATIENCE = 60  # seconds to find process 0 and connect to it
_GRACE = 2.0  # seconds for a process to end by itself, with its own message
LINGER = 10.0  # seconds for which process 0, which JAX needs, waits for the others to end
# A machine is gone if it does not answer: idle seconds, seconds between probes, probes.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}
_BEAT = 5.0  # seconds between two heartbeats
_SILENT = 30.0  # seconds without one: the process hangs; JAX waits longer, then aborts
_LONGEST = 4096  # maximum bytes per message
STANDS_STILL = -1  # used as an exit code
_LOST = re.compile(
    "(closed|reset) by peer|Socket closed|Timed out waiting|UNAVAILABLE|heartbeat|another task"
)


class Notice(NamedTuple):
    """The end of a process. Code None: not reported; `STANDS_STILL`: it hangs but has not ended."""

    process: int
    code: int | None


def verdict(notice: Notice, again: str) -> tuple[str, int]:
    """Return the last message and exit code of a process whose pod has lost a process."""
    who, solved = f"process {notice.process}", f"once this is fixed, {again}"
    if notice.code is None:
        return f"{who} is gone; {again}", 75
    if notice.code == STANDS_STILL:
        return f"{who} has not answered for {_SILENT:.0f} s; {again}", 75
    if notice.code in (75, 143):
        return f"{who} was asked to stop (SIGTERM) and is gone; {again}", 75
    if notice.code == 130:
        return f"{who} was interrupted (Ctrl-C); {again}", 130
    return f"{who} ended with an error (exit code {notice.code}), which it printed; {solved}", 3


def lost(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, comes from losing another process of the pod."""
    while error is not None:
        if _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class Lifeline:
    """The end of the connections in process number `process`.

    `ended` is called once, in a thread, with the first notice of an ended process.
    """

    def __init__(self, process: int, ended: Callable[[Notice], None]) -> None:
        self._process, self._ended = process, ended
        self._only_once = threading.Lock()  # whoever holds it has heard of the first end
        self._gone = threading.Event()  # all others have closed their connections
        self._peers: dict[int, socket.socket] = {}
        self._done: set[int] = set()  # processes that ended together with all others
        self._lived: dict[int, float] = {}  # when each was last heard from

    def serve(self, token: str) -> int:
        """Wait for the others, as process 0; return the port."""
        self._server = listening(0, backlog=1024)
        _thread(self._serve, token)
        _thread(self._live)
        return int(self._server.getsockname()[1])

    def connect(self, host: str, port: int, token: str, timeout_s: float = _PATIENCE) -> None:
        """Connect to process 0 from any other process; OSError if that fails."""
        peer = socket.create_connection((host, port), timeout=timeout_s)
        peer.settimeout(None)
        _keep_alive(peer)
        _send(peer, {"token": token, "process": self._process})
        self._peers[0] = peer
        _thread(self._live)
        _thread(self._follow, peer)

    def tell(self, code: int) -> None:
        """Report that this process ends alone; in process 0, return when the others have ended."""
        self._send_all({"process": self._process, "code": code})
        if self._process == 0 and self._peers:
            self._gone.wait(LINGER)

    def done(self) -> None:
        """Report that this process ends like all others, so that none of them thinks it is lost."""
        self._send_all({"process": self._process, "done": True})

    def _live(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(_BEAT)
            now, last_look = time.monotonic(), looked
            looked = now
            self._send_all({"alive": True})
            if now - last_look > 2 * _BEAT:  # this process itself was stopped
                self._lived.clear()
            for process in {*self._peers} - self._done:
                if now - self._lived.setdefault(process, now) > _SILENT:
                    self._without(process)
                    self._heard({"process": process, "code": STANDS_STILL})

    def _send_all(self, message: dict[str, Any]) -> None:
        for peer in [*self._peers.values()]:
            _send(peer, message)

    def _heard(self, message: dict[str, Any]) -> None:
        """Record what a process says about itself or, from process 0, about another."""
        if message.get("alive"):
            return
        process = int(message["process"])
        if message.get("done"):
            self._done.add(process)
        elif process not in self._done and self._only_once.acquire(blocking=False):
            first = Notice(process, message.get("code"))
            if self._process == 0:
                self._send_all({"process": process, "code": first.code})
            _thread(self._ended, first)

    def _follow(self, peer: socket.socket) -> None:
        """In a process other than 0, listen to process 0 until it closes the connection."""
        for message in _messages(peer):
            self._lived[0] = time.monotonic()
            self._heard(message)
        self._heard({"process": 0})

    def _serve(self, token: str) -> None:
        with self._server, contextlib.suppress(OSError):  # the server was shut down
            while True:
                peer, _ = self._server.accept()
                _keep_alive(peer)
                _thread(self._listen, peer, token)

    def _listen(self, peer: socket.socket, token: str) -> None:
        """In process 0, read who another process is and what it reports, until it is gone."""
        process = None  # unknown until it identifies itself
        for message in _messages(peer):
            if process is not None:
                self._lived[process] = time.monotonic()
                self._heard({**message, "process": process})
            elif message.get("token") == token:
                process = int(message["process"])
                self._peers[process] = peer
        if process is not None:
            self._heard({"process": process})
            self._without(process)

    def _without(self, process: int) -> None:
        self._peers.pop(process, None)
        if not self._peers:
            self._gone.set()


def _messages(peer: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield the messages of a connection, until it is closed or sends anything else."""
    with peer, peer.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
        while (line := lines.readline(_LONGEST)).endswith(b"\n"):
            if not isinstance(message := json.loads(line), dict):
                return
            yield message


def _thread(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, name="lifeline", daemon=True).start()


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # already gone, which its thread notices
        return


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if option := getattr(socket, name, None):  # not available on every system
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


def joined(end: Callable[[str, int], None], again: Callable[[], str]) -> Lifeline | None:
    """Connect this process to its pod, after `launch.join_hosts`; None: it is alone."""
    from jax._src import distributed  # the coordination service has no public name

    state = distributed.global_state
    if state.client is None or state.num_processes < 2:
        return None

    def ended(notice: Notice) -> None:
        if notice.code is not None:  # this process may fail likewise and report it itself
            time.sleep(_GRACE)
        end(*verdict(notice, again()))

    line = Lifeline(state.process_id, ended)
    try:
        if state.process_id == 0:
            token = secrets.token_hex(16)
            address = {"port": line.serve(token), "token": token}
            state.client.key_value_set(_KEY, json.dumps(address))
        else:
            address = json.loads(state.client.blocking_key_value_get(_KEY, 1000 * _PATIENCE))
            host = str(state.coordinator_address).rpartition(":")[0].strip("[]")
            line.connect(host, address["port"], address["token"])
    except OSError as error:
        from jaxrobust.runtime.text.progress import say  # imports JAX, which commands do late

        say(
            f"WARNING: process {state.process_id} has no direct connection to process 0 "
            f"({os.strerror(error.errno or 0)}); if one of them dies, the other only notices "
            "through JAX, after 100 s",
            every_process=True,
        )
        return None
    atexit.register(line.done)
    return line
