"""How processes hear that another one has ended, and what they end with then."""

import contextlib
import json
import queue
import socket
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.runtime.processes import lifeline
from jaxrobust.runtime.processes.lifeline import Notice
from tests.support import sweeps

AGAIN = "run the same command to continue"


class VerdictTest(parameterized.TestCase):
    @sweeps.rows(
        (None, 75, "process 1 is gone; run the same command to continue"),
        (
            lifeline.STANDS_STILL,
            75,
            "process 1 has not answered for 30 s; run the same command to continue",
        ),
        (
            143,
            75,
            "process 1 was asked to stop (SIGTERM) and is gone; run the same command to continue",
        ),
        (
            75,
            75,
            "process 1 was asked to stop (SIGTERM) and is gone; run the same command to continue",
        ),
        (130, 130, "process 1 was interrupted (Ctrl-C); run the same command to continue"),
        (
            2,
            3,
            "process 1 ended with an error (exit code 2), which it printed; once this is fixed, "
            "run the same command to continue",
        ),
    )
    def test_sentence_and_exit_code(self, code, ends, words):
        self.assertEqual(lifeline.verdict(Notice(1, code), AGAIN), (words, ends))

    @sweeps.rows(
        # As JAX 0.10.2 and its Gloo say it.
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
        "Connection closed by peer [127.0.0.1]:44233",
        "Gloo all-reduce failed: Read error [127.0.0.1]:1: Connection reset by peer",
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)",
    )
    def test_errors_that_come_of_it(self, text):
        self.assertTrue(lifeline.lost(ValueError(text)))
        outer = RuntimeError("cannot save")
        outer.__cause__ = ValueError(text)
        self.assertTrue(lifeline.lost(outer))
        outer.__cause__, outer.__context__ = None, ValueError(text)
        self.assertTrue(lifeline.lost(outer))

    @sweeps.rows(
        "epsilon=4 is larger than 1", "RESOURCE_EXHAUSTED: out of memory", "Gloo all-reduce failed"
    )
    def test_other_errors(self, text):
        self.assertFalse(lifeline.lost(ValueError(text)))
        self.assertFalse(lifeline.lost(None))


class LifelineTest(absltest.TestCase):
    """Process 0 and others, in one process."""

    def setUp(self):
        super().setUp()
        self.heard = [queue.Queue() for _ in range(3)]
        self.lines = [lifeline.Lifeline(i, self.heard[i].put) for i in range(3)]
        port = self.lines[0].serve("secret")
        self.port, joined = port, threading.Event()
        for line in self.lines[1:]:
            line.connect("localhost", port, "secret", timeout_s=5)
        while len(self.lines[0]._peers) < 2:
            joined.wait(0.01)
        self.addCleanup(self.close)

    def close(self):
        for peer in [p for line in self.lines for p in line._peers.values()]:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        while self.lines[0]._peers:
            time.sleep(0.01)
        self.lines[0]._server.shutdown(socket.SHUT_RDWR)

    def cut(self, process):
        """End a process as its system does."""
        self.lines[process]._peers[0].shutdown(socket.SHUT_RDWR)

    def expect(self, process, notice):
        self.assertEqual(self.heard[process].get(timeout=5), notice)

    def quiet(self, *processes):
        for process in processes:
            with self.assertRaises(queue.Empty):
                self.heard[process].get(timeout=0.2)

    def test_one_that_is_gone(self):
        self.cut(1)
        self.expect(0, Notice(1, None))
        self.expect(2, Notice(1, None))

    def test_process_0_is_gone(self):
        self.lines[0]._peers[1].shutdown(socket.SHUT_RDWR)
        self.expect(1, Notice(0, None))

    def test_one_that_says_why(self):
        self.lines[1].tell(143)
        self.expect(0, Notice(1, 143))
        self.expect(2, Notice(1, 143))
        self.cut(1)
        self.cut(2)  # of several, the first one is named
        self.quiet(0)

    def test_process_0_stays_until_the_others_have_ended(self):
        tells = threading.Thread(target=self.lines[0].tell, args=(143,))
        tells.start()
        self.expect(1, Notice(0, 143))
        self.expect(2, Notice(0, 143))
        self.cut(1)
        tells.join(0.2)
        self.assertTrue(tells.is_alive())
        self.cut(2)
        tells.join(5)
        self.assertFalse(tells.is_alive())

    def test_all_that_end_together_are_not_missed(self):
        for line in self.lines:
            line.done()
        self.cut(1)
        self.cut(2)
        self.quiet(0, 1, 2)

    def test_strangers_end_nobody(self):
        for words in (b'{"process": 2}\n', b"GET / HTTP/1.1\n", b"[1]\n", b"x" * 5000):
            with socket.create_connection(("localhost", self.port), timeout=5) as stranger:
                stranger.sendall(words)
        self.quiet(0)
        self.cut(2)
        self.expect(0, Notice(2, None))

    def test_a_machine_that_does_not_answer_is_found_out_by_the_system(self):
        peer = self.lines[1]._peers[0]
        self.assertEqual(peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
        idle, between, probes = (
            peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        )
        self.assertLessEqual(idle + between * probes, 15)


class SignsOfLifeTest(absltest.TestCase):
    """Process 0, one that lives, and one that is there but says nothing, as after SIGSTOP."""

    def test_one_that_stands_still_is_found_out(self):
        times = {"_BEAT": 0.1, "_SILENT": 0.6}
        self.enterContext(mock.patch.multiple(lifeline, **times))
        heard = [queue.Queue() for _ in range(2)]
        first, other = (lifeline.Lifeline(i, heard[i].put) for i in range(2))
        port = first.serve("secret")
        other.connect("localhost", port, "secret", timeout_s=5)
        time.sleep(1.0)  # longer than anybody may be silent
        self.assertTrue(heard[0].empty() and heard[1].empty())
        with socket.create_connection(("localhost", port)) as still:
            still.sendall(b'{"token": "secret", "process": 2}\n')
            for each in heard:
                self.assertEqual(each.get(timeout=5), Notice(2, lifeline.STANDS_STILL))
        self.assertEqual(first._peers.keys(), {1})
        for peer in [*first._peers.values(), *other._peers.values()]:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


class _Enough(Exception):
    """The clock of a test has no more seconds."""


class SilenceTest(absltest.TestCase):
    """When a process that says nothing counts as one that stands still, by a clock of ours."""

    def setUp(self):
        super().setUp()
        self.line, self.now, self.heard = lifeline.Lifeline(0, mock.Mock()), 0.0, []
        self.line._peers = {1: mock.Mock(), 2: mock.Mock()}
        self.enter_context(mock.patch.object(lifeline, "_send"))
        self.enter_context(
            mock.patch.object(self.line, "_heard", lambda m: self.heard.append((self.now, m)))
        )

    def lives(self, *seconds: float, says=()) -> None:
        """Let so many seconds go by, one after the other; those in `says` are heard each time."""
        left = list(seconds)

        def sleep(_):
            if not left:
                raise _Enough
            self.now += left.pop(0)
            self.line._lived |= dict.fromkeys(says, self.now)

        clock = mock.Mock(sleep=sleep, monotonic=lambda: self.now)
        with mock.patch.object(lifeline, "time", clock), self.assertRaises(_Enough):
            self.line._live()

    def test_after_thirty_seconds_without_a_word(self):
        self.lives(*[5.0] * 9, says=[2])
        still = {"process": 1, "code": lifeline.STANDS_STILL}
        self.assertEqual(self.heard, [(40.0, still)])  # first looked for at 5 s
        self.assertEqual(list(self.line._peers), [2])

    def test_one_that_came_to_its_end_is_not_missed(self):
        self.line._done = {1, 2}
        self.lives(*[5.0] * 9)
        self.assertEqual(self.heard, [])

    def test_who_stood_still_itself_blames_nobody(self):
        self.lives(5.0, 5.0, 100.0, 5.0)
        self.assertEqual(self.heard, [])
        self.lives(*[5.0] * 6)
        self.assertLen(self.heard, 2)


class JoinedTest(absltest.TestCase):
    def test_a_process_that_is_alone_has_none(self):
        state = mock.Mock(client=None)
        with mock.patch("jax._src.distributed.global_state", state):
            self.assertIsNone(lifeline.joined(None, None))

    def joined(self, process, **line):
        line = {"serve.return_value": 4321} | line
        state = mock.Mock(process_id=process, num_processes=2)
        state.coordinator_address = "[fe80::1]:77"
        address = {"port": 88, "token": "secret"}
        state.client.blocking_key_value_get.return_value = json.dumps(address)
        with (
            mock.patch("jax._src.distributed.global_state", state),
            mock.patch.object(lifeline, "Lifeline", return_value=mock.Mock(**line)) as made,
            mock.patch.object(lifeline.atexit, "register") as at_end,
            mock.patch("jaxrobust.runtime.text.progress.say") as say,
        ):
            found = lifeline.joined(self.ended.append, lambda: "begins anew")
        self.assertEqual(made.call_args.args[0], process)
        self.assertEqual(at_end.call_args_list, [mock.call(found.done)] if found else [])
        return found, state.client, made.call_args.args[1], say.call_args_list

    def setUp(self):
        super().setUp()
        self.ended = []

    def test_the_others_find_it_there(self):
        line, client, _, _ = self.joined(1)
        client.blocking_key_value_get.assert_called_once_with(lifeline._KEY, 60_000)
        line.connect.assert_called_once_with("fe80::1", 88, "secret")
        line.serve.assert_not_called()
        client.key_value_set.assert_not_called()

    def test_without_a_connection_it_is_said(self):
        line, _, _, said = self.joined(
            1, **{"connect.side_effect": ConnectionRefusedError(111, "x")}
        )
        self.assertIsNone(line)
        (call,) = said
        self.assertStartsWith(
            call.args[0], "WARNING: process 1 has no direct connection to process"
        )
        self.assertIn("(Connection refused); if one of them dies", call.args[0])
        self.assertEqual(call.kwargs, {"every_process": True})

    def test_an_end_leaves_time_for_own_words(self):
        _, _, ended, _ = self.joined(0)
        for code, waits in ((3, [mock.call(lifeline._GRACE)]), (None, [])):
            notice = mock.Mock(code=code)
            with (
                mock.patch.object(lifeline.time, "sleep") as sleep,
                mock.patch.object(lifeline, "verdict", return_value=("words",)) as verdict,
            ):
                ended(notice)
            verdict.assert_called_once_with(notice, "begins anew")
            beat = mock.call(lifeline._BEAT)  # of another test's thread
            self.assertEqual([call for call in sleep.mock_calls if call != beat], waits)
        self.assertEqual(self.ended, ["words"] * 2)
