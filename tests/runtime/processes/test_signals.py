"""What a process does at once when it is asked to stop, also while it compiles."""

import contextlib
import gc
import os
import queue
import signal
import threading
import time
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxrobust.runtime.processes import signals
from jaxrobust.runtime.text import progress
from jaxrobust.training.run import stopping
from jaxrobust.training.run.stopping import StopSignals
from tests.support import sweeps

TERM, CTRL_C = signal.SIGTERM, signal.SIGINT


def frames(*files: str) -> SimpleNamespace | None:
    """A stack, its innermost frame first."""
    frame = None
    for file in reversed(files):
        frame = SimpleNamespace(f_code=SimpleNamespace(co_filename=file), f_back=frame)
    return frame


class ReactionTest(parameterized.TestCase):
    @sweeps.rows(
        # number, asked before, saves, compiles: exit code, words
        (TERM, False, False, True, 143, r"stopped \(SIGTERM\)"),
        (TERM, False, False, False, 143, r"stopped \(SIGTERM\)"),
        (CTRL_C, True, False, True, 130, "interrupted while compiling"),
        (CTRL_C, True, True, True, 130, "interrupted while compiling"),
        (CTRL_C, False, False, True, None, "stopping once the compiler .* again: stop at "),
        (TERM, False, True, True, None, r"saving and stopping once .*Ctrl-C: .*without saving"),
        (TERM, True, True, True, None, None),  # a second one says nothing new
        # Where nothing compiles, Python does the rest.
        *(
            (number, before, True, False, None, None)
            for number in (TERM, CTRL_C)
            for before in (0, 1)
        ),
    )
    def test_what_is_said_and_done(self, number, before, saves, compiling, code, words):
        known = {"asked_before": before, "saves": saves, "compiling": compiling}
        found = signals.reaction(number, **known)
        if words is None:
            self.assertIsNone(found)
            return
        self.assertEqual(found.code, code)
        self.assertRegex(found.text, words)

    def test_who_compiles(self):
        jax_file = os.path.join(os.path.dirname(jax.__file__), "_src", "compiler.py")
        self.assertTrue(signals.compiles(frames(jax_file)))
        self.assertTrue(signals.compiles(frames("profiler.py", jax_file, "main.py")))
        self.assertTrue(signals.compiles(frames(*["profiler.py"] * 11, jax_file)))
        self.assertFalse(signals.compiles(frames("main.py", "compiler.py")))
        self.assertFalse(signals.compiles(frames(*["main.py"] * 20, jax_file)))
        self.assertFalse(signals.compiles(None))

    def test_jax_compiles_there(self):
        """In the file of the installed JAX that a listener looks for."""
        found = []

        def look():
            while not done.is_set():
                found.append(signals.compiles(signals.sys._current_frames()[main]))
                time.sleep(0.001)

        main, done = threading.get_ident(), threading.Event()
        looks = threading.Thread(target=look)
        looks.start()
        for size in range(17, 67):  # a busy machine may not let the other thread look at once
            program = jax.jit(lambda x: jnp.sin(x) * 0.12345 + jnp.linalg.norm(x))
            program.lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
            if True in found:
                break
        done.set()
        looks.join()
        self.assertIn(True, found)


class ListenerTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.ended, self.said = queue.Queue(), queue.Queue()
        # As in a shell: a process in the background ignores Ctrl-C, and so do those that it starts.
        before = signal.signal(CTRL_C, signal.default_int_handler)
        self.addCleanup(signal.signal, CTRL_C, before)
        # A test before may have left a use of its own for it, which a listener would not touch.
        before = signal.signal(TERM, signal.SIG_DFL)
        self.addCleanup(signal.signal, TERM, before or signal.SIG_DFL)
        self.enterContext(mock.patch.object(signals, "_MOMENT", 0.01))
        for module in (progress, stopping):
            say = mock.patch.object(module, "say", lambda text, **_: self.said.put(text))
            self.enterContext(say)
        self.compiles = mock.patch.object(signals, "compiles", lambda frame: True)

    def listener(self):
        return signals.Listener(lambda *given: self.ended.put(given), lambda: "begins anew")

    def test_sigterm_ends_at_once_where_nothing_saves(self):
        before = signal.getsignal(TERM)
        with self.listener():
            os.kill(os.getpid(), TERM)
            self.assertEqual(self.ended.get(timeout=5), ("stopped (SIGTERM); begins anew", 143))
        self.assertEqual(signal.getsignal(TERM), before)

    def test_what_was_there_before_comes_back(self):
        def own(number, frame):
            pass

        for term, ctrl_c in ((signal.SIG_DFL, signal.default_int_handler), (own, own)):
            signal.signal(TERM, term)
            signal.signal(CTRL_C, ctrl_c)
            hook = signals.sys.unraisablehook
            with self.listener() as listener:
                within = signal.getsignal(TERM), signal.getsignal(CTRL_C)
                if term is own:  # which has a use for it, and keeps it
                    self.assertEqual(within, (own, own))
                else:
                    self.assertEqual(within, (listener._noted, listener._interrupt))
                self.assertEqual(signals.sys.unraisablehook, listener._dropped)
            self.assertEqual((signal.getsignal(TERM), signal.getsignal(CTRL_C)), (term, ctrl_c))
            self.assertEqual(signals.sys.unraisablehook, hook)
            self.assertEqual(signal.set_wakeup_fd(-1), -1)
            self.assertNotIn(listener, signals._entered)
            listener.__exit__()  # a second time does nothing
        with self.listener():  # one that somebody sets meanwhile is his
            signal.signal(TERM, own)
            signal.signal(CTRL_C, own)
        self.assertEqual((signal.getsignal(TERM), signal.getsignal(CTRL_C)), (own, own))

    def test_a_loop_saves_and_is_told_that_the_compiler_holds_it_up(self):
        with self.listener(), StopSignals() as stop, self.compiles:
            os.kill(os.getpid(), TERM)
            while "once the compiler is done" not in self.said.get(timeout=5):
                pass
            self.assertEqual(stop.signal, TERM)
        self.assertTrue(self.ended.empty())

    def test_a_loop_that_ends_within_a_moment_says_its_own_words(self):
        """And has its own exit code: 143 in the place of 75 is not started again by Slurm."""
        with self.listener(), mock.patch.object(signals, "_MOMENT", 0.5):
            with StopSignals() as stop:
                os.kill(os.getpid(), TERM)
                self.assertIn("stopping after this step", self.said.get(timeout=5))
                time.sleep(0.1)
            time.sleep(0.8)
            self.assertEqual(stop.signal, TERM)
        self.assertTrue(self.ended.empty())

    def test_a_loop_that_comes_to_the_compiler_later_is_told_then(self):
        with self.listener(), StopSignals():
            os.kill(os.getpid(), TERM)
            self.assertIn("stopping after this step", self.said.get(timeout=5))
            time.sleep(0.1)
            self.assertTrue(self.said.empty())
            with self.compiles:
                self.assertIn("once the compiler is done", self.said.get(timeout=5))
                time.sleep(0.1)
        self.assertTrue(self.said.empty() and self.ended.empty())

    def test_ctrl_c_after_sigterm_ends_at_once(self):
        with self.listener(), StopSignals(), self.compiles:
            os.kill(os.getpid(), TERM)
            self.said.get(timeout=5)
            with self.assertRaises(KeyboardInterrupt):
                os.kill(os.getpid(), CTRL_C)
                time.sleep(1)
            self.assertEqual(self.ended.get(timeout=5)[1], 130)

    def test_ctrl_c_is_told_that_it_waits_and_ends_the_second_time(self):
        with self.listener(), self.compiles:
            for _ in range(2):
                with self.assertRaises(KeyboardInterrupt):
                    os.kill(os.getpid(), CTRL_C)
                    time.sleep(1)
            self.assertEqual(
                self.ended.get(timeout=5), ("interrupted while compiling; begins anew", 130)
            )
        self.assertIn("stopping once the compiler is done", self.said.get(timeout=5))

    def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(self):
        """As it was in JAX's while it traced: the run continued to its end."""
        calls = []

        def collecting(phase, info):
            calls.append(phase)
            if len(calls) < 4:  # more than once in vain
                with contextlib.suppress(ValueError):
                    gc.callbacks.remove(collecting)
                os.kill(os.getpid(), CTRL_C)
                for _ in range(1000):
                    pass

        with self.listener():
            with self.assertRaises(KeyboardInterrupt):
                gc.callbacks.append(collecting)
                gc.collect()
                time.sleep(5)
            self.assertTrue(self.ended.empty())
        self.assertNotEmpty(calls)

    def test_a_child_leaves_the_signals_of_its_parent_alone(self):
        """A worker that is ended would else tell its parent that it was asked to stop."""
        before = signal.getsignal(TERM)
        with self.listener():
            signals._in_a_child()  # as after a fork, which JAX does not survive
            self.assertEqual(signal.set_wakeup_fd(-1), -1)
            self.assertEqual(signal.getsignal(TERM), before)

    def test_elsewhere_than_in_the_main_thread_it_leaves_signals_alone(self):
        found = []

        def enter():
            with self.listener():
                found.append(signal.getsignal(TERM))

        before = signal.getsignal(TERM)
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        self.assertEqual(found, [before])
