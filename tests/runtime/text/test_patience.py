"""What a person is told while a command has nothing to say yet."""

import contextlib
import io
import os
import threading
import time

from absl.testing import absltest

from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text import patience, terminal


class Clock:
    """The seconds that `patience` sees, and what it writes on stderr by then."""

    def __init__(self, columns: int | None = None) -> None:
        self.seconds, self.out, self._columns = 0.0, io.StringIO(), columns

    @contextlib.contextmanager
    def running(self):
        patience._announced.clear()
        mocks = {"AFTER_S": 1.0, "_LOOKS_S": 1e6, "_now": lambda: self.seconds}
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(self.out))
            width = absltest.mock.patch.object(terminal, "width", lambda stream: self._columns)
            stack.enter_context(width)
            stack.enter_context(absltest.mock.patch.dict(os.environ, TERM="xterm"))
            stack.enter_context(absltest.mock.patch.object(patience, "_watching", [None]))
            # A thread that an earlier test started would sleep for `_LOOKS_S`.
            stack.enter_context(absltest.mock.patch.object(patience, "_came", threading.Event()))
            for name, value in mocks.items():
                stack.enter_context(absltest.mock.patch.object(patience, name, value))
            yield self

    def wait(self, seconds: float) -> str:
        """Look four times a second, and return what was written meanwhile."""
        before = len(self.out.getvalue())
        for _ in range(int(4 * seconds)):
            self.seconds += 0.25
            patience.look()
        return self.out.getvalue()[before:]


class PatienceTest(absltest.TestCase):
    def test_what_takes_long_is_said_once(self):
        with Clock().running() as clock:
            for said in ("loading ...\n", ""):
                with patience.of("loading"):
                    self.assertEqual(clock.wait(4.75), "")
                    self.assertEqual(clock.wait(1), said)

    def test_a_terminal_counts_at_once_and_keeps_no_line(self):
        with Clock(40).running() as clock:
            with patience.of("loading"):
                self.assertEqual(clock.wait(1), "\rloading, 1 s so far\r")
            self.assertTrue(clock.out.getvalue().endswith(f"\r{' ' * 19}\r"))

    def test_what_is_begun_twice_is_counted_once(self):
        with Clock().running() as clock:
            patience.begin("loading")
            self.assertEqual(clock.wait(4.75), "")
            patience.begin("loading")
            self.assertEqual(clock.wait(0.5), "loading ...\n")
            patience.end()

    def test_what_is_done_at_once_is_not(self):
        with Clock().running() as clock:
            with patience.of("loading"):
                self.assertEqual(clock.wait(0.75), "")
            with patience.of("loading", here=False), patience.lasting("loading", here=False):
                self.assertEqual(clock.wait(100), "")
            self.assertEqual(clock.wait(100), "")  # nothing is waited for

    def test_a_pipe_gets_a_line_now_and_then(self):
        with Clock().running() as clock, patience.lasting("compiling", last="21 s last time"):
            self.assertEqual(clock.wait(58), "")
            self.assertEqual(clock.wait(2), "compiling, 60 s so far (21 s last time)\n")
            self.assertEqual(clock.wait(121).count("\n"), 2)
        self.assertTrue(clock.out.getvalue().endswith(" 3 min so far (21 s last time)\n"))

    def test_a_terminal_gets_one_line_that_counts_and_goes(self):
        with Clock(40).running() as clock:
            with patience.lasting("compiling", last="21 s last time"):
                self.assertEqual(clock.wait(2.5), "")
                said = clock.wait(1.5).split("\r")
                line = "compiling, 4 s so far (21 s last time)"
                self.assertEqual(said, ["", line.replace("4", "3"), "", line, ""])
                with terminal.turn():
                    print("a line of somebody else")
                self.assertTrue(clock.out.getvalue().endswith(f"\r{' ' * len(line)}\r"))
                clock.wait(1)
            self.assertTrue(clock.out.getvalue().endswith(f"\r{' ' * len(line)}\r"))
            self.assertEqual(clock.wait(5), "")

    def test_a_line_is_no_wider_than_the_terminal(self):
        for columns in (None, 40, 80):
            with Clock(columns).running() as clock, patience.lasting("x" * 99, last="y" * 50):
                lines = [line.strip() for line in clock.wait(200).replace("\r", "\n").split("\n")]
            self.assertLess(max(map(len, lines)), columns or 80)
            self.assertIn(", 60 s so far", " ".join(lines))

    def test_what_is_inside_speaks_alone(self):
        with Clock().running() as clock, patience.lasting("reading"):
            with patience.of("compiling"):
                self.assertEqual(clock.wait(62), "compiling ...\ncompiling, 60 s so far\n")
            self.assertEqual(clock.wait(60), "reading, 2 min so far\n")

    def test_a_bar_shows_the_time_itself(self):
        seen = []
        with Clock(80).running() as clock, patience.lasting("compiling"):
            with patience.shown_by(seen.append):
                self.assertEqual(clock.wait(4), "")
            self.assertNotEqual(clock.wait(1), "")
        self.assertEqual(seen, ["compiling, 3 s so far", "compiling, 4 s so far"])

    def test_what_was_said_meanwhile_begins_anew(self):
        step = iter(range(100))
        wait = patience.lasting(lambda: f"step {next(step)}", since="since a line")
        with Clock().running() as clock, wait as counted:
            clock.wait(59)
            counted.again()
            self.assertEqual(clock.wait(59), "")
            self.assertEqual(clock.wait(2), "step 0, 60 s since a line\n")

    def test_a_mistake_is_one_sentence(self):
        with Clock().running() as clock:
            patience.begin("loading")
            with self.assertRaises(SystemExit):
                arguments.stop("no such file", 2)
            self.assertEqual(clock.wait(20), "")
        self.assertEqual(clock.out.getvalue(), "jaxrobust: no such file\n")

    def test_a_stream_that_nobody_reads_ends_nothing(self):
        clock = Clock()
        with clock.running(), patience.lasting("compiling"):
            clock.out.close()
            clock.seconds = 12
            patience.look()

    def test_nothing_is_written_while_python_ends_or_in_a_child(self):
        for ends in (patience._forget, patience._in_a_child):
            with Clock().running() as clock, patience.lasting("compiling"):
                self.assertEqual(clock.wait(60), "compiling, 60 s so far\n")
                patience.begin("loading")
                ends()
                self.assertEqual(patience._waits, [])
                self.assertEqual(clock.wait(30), "")
                self.assertEqual(len(patience._begun), ends is patience._forget)
                patience.end()  # of what is forgotten, without an error

    def test_the_thread_writes_whole_lines_and_ends_with_the_wait(self):
        out, stop = io.StringIO(), threading.Event()

        def talk():
            while not stop.is_set():
                with terminal.turn():
                    print("somebody", "else", file=out)
                time.sleep(0.001)  # a lock is not fair

        with (
            contextlib.redirect_stderr(out),
            absltest.mock.patch.multiple(
                patience,
                AFTER_S=0.0,
                _LOOKS_S=0.001,
                _now=lambda: 40 * time.monotonic(),
                _watching=[],  # a thread of this test's
            ),
        ):
            other = threading.Thread(target=talk)
            other.start()
            with patience.lasting("compiling"):
                for _ in range(200):
                    if "60 s so far" in out.getvalue():
                        break
                    time.sleep(0.1)
            stop.set()
            other.join()
            before = out.getvalue()
            time.sleep(0.3)
        self.assertEqual(out.getvalue(), before)
        lines = set(before.splitlines())
        self.assertContainsSubset({"compiling, 60 s so far", "somebody else"}, lines)
        self.assertTrue(all(line.startswith("compiling, ") for line in lines - {"somebody else"}))

    def test_compiling_counts_beside_what_it_took(self):
        known = {"step": {"seconds": 21.0, "hit": False, "cold": 21.0}}
        quiet = {"_remembered": lambda: known, "remember": lambda *seen, **hit: None}
        wait = compilation.waiting("compiling the step", "step", lambda said: None)
        with absltest.mock.patch.multiple(compilation, **quiet), Clock().running() as clock, wait:
            clock.wait(60.5)
        said = "compiling the step, 60 s so far (took 21 s last time)\n"
        self.assertEqual(clock.out.getvalue(), said)
