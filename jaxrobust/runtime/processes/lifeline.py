"""How the processes of a pod hear that one of them has ended, whatever ended it.

Each has a connection to process 0, which its system closes when it ends and which finds out within
15 s that a machine does not answer. A process that is there but stands still, as one that was
stopped (SIGSTOP), sends no sign of life any more. JAX tells the others after 50 to 100 s, or aborts
them at once where it was process 0.
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
_PATIENCE = 60  # seconds to find process 0 in, and to connect to it
_GRACE = 2.0  # seconds in which a process may end by itself, with what it has to say
LINGER = 10.0  # seconds for which process 0, which JAX needs, stays for the others to end
# A machine that does not answer for so long is gone: idle seconds, seconds between probes, probes.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}
_BEAT = 5.0  # seconds between two signs of life
_SILENT = 30.0  # without one, a process stands still; less than JAX waits, which aborts
_LONGEST = 4096  # bytes of a message
STANDS_STILL = -1  # in place of an exit code
_LOST = re.compile(
    "(closed|reset) by peer|Socket closed|Timed out waiting|UNAVAILABLE|heartbeat|another task"
)


class Notice(NamedTuple):
    """The end of a process; a code of None: it did not say; `STANDS_STILL`: it has not ended."""

    process: int
    code: int | None


def verdict(notice: Notice, again: str) -> tuple[str, int]:
    """Write the last sentence of a process whose pod has lost a process, with its exit code."""
    who, solved = f"process {notice.process}", f"with that solved, {again}"
    if notice.code is None:
        return f"{who} is gone; {again}", 75
    if notice.code == STANDS_STILL:
        return f"{who} has not answered for {_SILENT:.0f} s; {again}", 75
    if notice.code in (75, 143):
        return f"{who} was asked to stop (SIGTERM) and is gone; {again}", 75
    if notice.code == 130:
        return f"{who} was interrupted (Ctrl-C); {again}", 130
    return f"{who} ended with an error (exit code {notice.code}), which it names; {solved}", 3


def lost(error: BaseException | None) -> bool:
    """Tell whether an error, or one behind it, is what a process meets whose pod loses another."""
    while error is not None:
        if _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class Lifeline:
    """The end of the connections that is in process number `process`.

    `ended` is called once, in a thread, with the first notice of a process that has ended.
    """

    def __init__(self, process: int, ended: Callable[[Notice], None]) -> None:
        self._process, self._ended = process, ended
        self._only_once = threading.Lock()  # whose holder has heard of the first end
        self._gone = threading.Event()  # all others have closed their connections
        self._peers: dict[int, socket.socket] = {}
        self._done: set[int] = set()  # processes that came to their end with all others
        self._lived: dict[int, float] = {}  # when each was heard of last

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
        """Say that this process ends alone; of process 0, return when the others have ended."""
        self._send_all({"process": self._process, "code": code})
        if self._process == 0 and self._peers:
            self._gone.wait(LINGER)

    def done(self) -> None:
        """Say that this process ends as all others do, so that no other takes it for lost."""
        self._send_all({"process": self._process, "done": True})

    def _live(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(_BEAT)
            now, last_look = time.monotonic(), looked
            looked = now
            self._send_all({"alive": True})
            if now - last_look > 2 * _BEAT:  # it is this process that stood still
                self._lived.clear()
            for process in {*self._peers} - self._done:
                if now - self._lived.setdefault(process, now) > _SILENT:
                    self._without(process)
                    self._heard({"process": process, "code": STANDS_STILL})

    def _send_all(self, message: dict[str, Any]) -> None:
        for peer in [*self._peers.values()]:
            _send(peer, message)

    def _heard(self, message: dict[str, Any]) -> None:
        """Take note of what a process says of itself or, as process 0, of another."""
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
        """Hear, as another process, what process 0 says until it closes the connection."""
        for message in _messages(peer):
            self._lived[0] = time.monotonic()
            self._heard(message)
        self._heard({"process": 0})

    def _serve(self, token: str) -> None:
        with self._server, contextlib.suppress(OSError):  # it is shut down
            while True:
                peer, _ = self._server.accept()
                _keep_alive(peer)
                _thread(self._listen, peer, token)

    def _listen(self, peer: socket.socket, token: str) -> None:
        """As process 0, read who another process is and what it reports, until it is gone."""
        process = None  # as long as it may be a stranger
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
    """Wait for the messages of a connection, until it is closed or speaks otherwise."""
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
    except OSError:  # it is gone already, which its thread finds out
        return


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if option := getattr(socket, name, None):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


def joined(end: Callable[[str, int], None], again: Callable[[], str]) -> Lifeline | None:
    """Connect this process to its pod, after `launch.join_hosts`; None: it is alone."""
    from jax._src import distributed  # the coordination service has no public name

    state = distributed.global_state
    if state.client is None or state.num_processes < 2:
        return None

    def ended(notice: Notice) -> None:
        if notice.code is not None:  # this process may meet the same, and say so itself
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
        from jaxrobust.runtime.text.progress import say  # with JAX, which a command imports late

        say(
            f"WARNING: process {state.process_id} has no direct connection to process 0 "
            f"({os.strerror(error.errno or 0)}); if one of them dies, the other hears of it by "
            "JAX, after 100 s",
            every_process=True,
        )
        return None
    atexit.register(line.done)
    return line
