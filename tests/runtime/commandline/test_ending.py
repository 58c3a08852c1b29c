"""How commands end that are asked to, and those whose pod loses a process."""

import functools
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from absl.testing import absltest, parameterized

from jaxrobust.runtime.commandline import ending
from jaxrobust.runtime.processes import lifeline
from tests.support import evaluations
from tests.support.processes import start, wait, written

TERM, CTRL_C, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


class Ended(BaseException):
    """The process would have ended."""


class HostsTest(absltest.TestCase):
    def test_any_flag_of_a_pod_means_one(self):
        known = flags.FlagValues()
        kinds = ("DEFINE_bool", "DEFINE_string", "DEFINE_integer", "DEFINE_float")
        own = {kind: functools.partial(getattr(flags, kind), flag_values=known) for kind in kinds}
        with mock.patch.multiple(ending.flags, **own):
            for _ in range(2):  # as several commands do
                ending.define_host_flags()
        known(["command"])
        found = {name: known[name].value for name in known}
        names = ("coordinator_address", "num_processes", "process_id", "coordinator_timeout")
        self.assertEqual(found, dict.fromkeys(names) | {"multihost": False})
        words = ("--multihost", "--coordinator_address=h:1", "--num_processes=2", "--process_id=0",
                 "--coordinator_timeout=2.5")  # fmt: skip
        values = {"coordinator": "h:1", "processes": 2, "process": 0, "timeout_s": 2.5}
        none = dict.fromkeys(values)
        alone = [none, *(none | {key: value} for key, value in values.items())]
        rows = [((), None), (words, values), *zip(zip(words), alone, strict=True)]
        for given, expected in rows:
            for name in found:
                known[name].unparse()
            known(["command", *given])
            with mock.patch.object(ending.flags, "FLAGS", known):
                self.assertEqual(ending.hosts(), expected)


class EndingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.exit = self.enterContext(mock.patch.object(os, "_exit", side_effect=Ended))
        self.enterContext(mock.patch.object(ending, "_PATIENCE", 0.01))
        self.said = self.enterContext(mock.patch.object(sys, "stderr"))

    def pod(self, line):
        end = ending.Ending(lambda: "run the same command to continue")
        with (
            mock.patch.object(ending, "join_hosts"),
            mock.patch.object(lifeline, "joined", lambda *_: line),
        ):
            end.join({})
        return end

    def words(self):
        return "".join(call.args[0] for call in self.said.write.call_args_list)

    def test_alone_it_stops_as_python_does(self):
        with self.assertRaises(SystemExit) as stopped:
            ending.Ending(lambda: "")("a mistake", 2)
        self.assertEqual(stopped.exception.code, 2)

    def test_in_a_pod_the_others_are_told(self):
        line = mock.Mock()
        with self.assertRaises(Ended):
            self.pod(line)("a mistake", 2)
        line.tell.assert_called_once_with(2)
        self.exit.assert_called_once_with(2)
        self.assertEqual(self.words(), "jaxrobust: a mistake\n")

    @parameterized.parameters(None, mock.Mock())
    def test_what_comes_of_the_end_of_another_is_no_mistake(self, line):
        with self.assertRaises(Ended), self.pod(line):
            raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [::1]")
        self.exit.assert_called_once_with(75)
        self.assertRegex(self.words(), "the connection to another .*Gloo.*; run the same command")

    def test_a_mistake_stays_one(self):
        with self.assertRaisesRegex(ValueError, "epsilon"), self.pod(mock.Mock()):
            raise ValueError("epsilon=4 is too large")
        self.exit.assert_not_called()

    def test_whoever_is_first_has_the_last_word(self):
        end, codes = self.pod(None), queue.Queue()
        self.exit.side_effect = lambda code: codes.put(code) or threading.Event().wait()
        for code in (75, 2):
            threading.Thread(target=end.at_once, args=("", code), daemon=True).start()
        codes.get(timeout=5)
        with self.assertRaises(queue.Empty):
            codes.get(timeout=0.1)


def signalled(hosts, line: str, number: int, which: int):
    """Exit codes, what was said, and seconds of each host until it ended after a signal to one."""
    said, began = "", time.monotonic()
    for text in hosts[0].stderr:
        said += text
        if line in text:
            break
    time.sleep(0.5)
    sent, seconds = time.monotonic(), [0.0] * len(hosts)

    def time_it(index, host):
        host.wait()
        seconds[index] = time.monotonic() - sent

    hosts[which].send_signal(number)
    watches = [threading.Thread(target=time_it, args=each) for each in enumerate(hosts)]
    for watch in watches:
        watch.start()
    codes, rest = wait(hosts)
    for watch in watches:
        watch.join()
    print(f"{sent - began:.0f} s, {codes}, after the signal {seconds}", file=sys.stderr)
    return codes, [said + rest[0], *rest[1:]], seconds


ASKED = {TERM: 143, KILL: -9}
SENTENCE = {
    TERM: "jaxrobust: process {} was asked to stop (SIGTERM) and is gone; run the same command ",
    KILL: "jaxrobust: process {} is gone; run the same command ",
}


@pytest.mark.slow
class PodTest(parameterized.TestCase):
    """Two hosts, one of which is ended; the other says so and ends with what launchers repeat."""

    def check(self, command, line, number, which, again):
        pod = start(2, 1, [*command, "--multihost"])
        codes, said, seconds = signalled(pod, line, number, which)
        other = 1 - which
        self.assertEqual((codes[which], codes[other]), (ASKED[number], 75), said)
        words = f"{SENTENCE[number].format(which)}{again}\n"
        self.assertIn(words, said[other])
        self.assertNotIn("Traceback", said[other])
        self.assertNotIn("still busy", said[other])
        self.assertLess(max(seconds), 15)
        if number == TERM:
            self.assertIn(
                f"jaxrobust: stopped (SIGTERM); run the same command {again}\n", said[which]
            )

    @parameterized.product(number=(TERM, KILL), which=(0, 1))
    def test_while_the_step_compiles(self, number, which):
        folder = Path(self.create_tempdir())
        command = [*written(folder), f"--workdir={folder / 'run'}"]
        again = "to start over, because nothing was saved yet"
        self.check(command, "compiling the step", number, which, again)

    @parameterized.product(number=(TERM, KILL), which=(0, 1))
    def test_while_they_evaluate(self, number, which):
        folder = Path(self.create_tempdir())
        evaluations.trained(folder / "run")
        flags = ["--epsilon=0.01", "--n=200", "--attack=apgd-ce,square", f"--out={folder / 'out'}"]
        command = ["-m", "jaxrobust.evaluate", f"--workdir={folder / 'run'}", *flags]
        self.check(command, "apgd-ce", number, which, "to continue with the verdicts so far")

    def test_while_they_train(self):
        folder = Path(self.create_tempdir())
        command = [*written(folder, train__epochs=200), f"--workdir={folder / 'run'}"]
        pod = start(2, 1, [*command, "--multihost"])
        codes, said, seconds = signalled(pod, "train 5/", KILL, 1)
        self.assertEqual(codes, [75, -9], said)
        self.assertRegex(
            said[0], r"process 1 is gone; run the same command to continue after step \d+ of"
        )
        self.assertNotIn("Traceback", said[0])
        self.assertLess(max(seconds), 15)


# Python code that waits for a library for some seconds, as JAX's does for XLA.
COMPILER = """
import hashlib
def compiled():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 40_000_000)
"""
WAITS = f"""
from jaxrobust.runtime.commandline.ending import Ending
from jaxrobust.runtime.text.progress import say
end, space = Ending(lambda: "run the same command to start over"), {{}}
exec(compile({COMPILER!r}, "/jax/_src/compiler.py", "exec"), space)
try:
    with end:
        say("compiling", every_process=True)
        space["compiled"]()
        say("compiled", every_process=True)
except KeyboardInterrupt:
    end(f"interrupted; {{end.again()}}", 130)
"""


@pytest.mark.slow
class AloneTest(parameterized.TestCase):
    """One process that is asked to stop while something compiles."""

    def asked(self, command, *numbers):
        """Its exit code, the lines it said, and the seconds from the last signal to its end."""
        (host,) = start(1, 1, command)
        said, awaited = [], "compiling"
        for number in numbers:
            while not said or awaited not in said[-1]:
                said.append(host.stderr.readline())
                self.assertNotEqual(said[-1], "", said)
            time.sleep(0.5)
            sent, awaited = time.monotonic(), "once the compiler is done"
            host.send_signal(number)
        said += host.communicate(timeout=100)[1].splitlines()
        seconds = time.monotonic() - sent
        print(f"{numbers}: {seconds:.1f} s", file=sys.stderr)
        return host.returncode, said, seconds

    def test_sigterm_before_the_first_step_does_not_wait(self):
        folder = Path(self.create_tempdir())
        command = [*written(folder), f"--workdir={folder / 'run'}"]
        code, said, seconds = self.asked(command, TERM)
        again = "run the same command to start over, because nothing was saved yet"
        self.assertEqual((code, said[-1]), (143, f"jaxrobust: stopped (SIGTERM); {again}"))
        self.assertFalse([line for line in said if "step compiled in" in line])
        self.assertLess(seconds, 2)

    def test_ctrl_c_says_what_it_waits_for(self):
        code, said, seconds = self.asked(["-c", WAITS], CTRL_C)
        self.assertEqual(code, 130, said)
        waits, ended = said[1:]
        self.assertRegex(waits, "^stopping once the compiler is done.*again: stop at once")
        self.assertEqual(ended, "jaxrobust: interrupted; run the same command to start over")
        self.assertGreater(seconds, 0.5)

    def test_ctrl_c_twice_does_not_wait(self):
        code, said, seconds = self.asked(["-c", WAITS], CTRL_C, CTRL_C)
        again = "jaxrobust: interrupted while compiling; run the same command to start over"
        self.assertEqual((code, said[-1]), (130, again), said)
        self.assertLess(seconds, 2)
