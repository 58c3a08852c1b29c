"""Who stops a run, when, and with which exit code."""

import os
import signal
from pathlib import Path
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.data.sources import registry
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.files import jsonl
from jaxrobust.training.run import stopping
from jaxrobust.training.run.stopping import StopSignals
from tests.support import sweeps
from tests.support.runs import one_phase, quiet_run


def stops(asked=0, processes=1):
    signals = StopSignals()
    signals.signal = int(asked)
    with mock.patch.object(jax, "process_count", lambda: processes):
        return stopping.Stops(signals)


class StopSignalsTest(parameterized.TestCase):
    """SIGTERM may come twice, and Ctrl-C stops at once the second time."""

    def setUp(self):
        super().setUp()
        self.said = self.enter_context(mock.patch.object(stopping, "say"))

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
    def test_the_first_is_noted_and_the_next_ctrl_c_raised(self, first):
        with StopSignals() as asked:
            self.assertEqual(asked.signal, 0)
            os.kill(os.getpid(), first)
            self.assertEqual(asked.signal, first)
            os.kill(os.getpid(), signal.SIGTERM)
            self.assertEqual(asked.signal, first)
            self.said.assert_called_once()
            with self.assertRaises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_handlers_are_those_of_before(self):
        both = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in both]
        with StopSignals():
            self.assertNoCommonElements([signal.getsignal(number) for number in both], before)
        self.assertEqual([signal.getsignal(number) for number in both], before)


class StopsTest(parameterized.TestCase):
    def test_a_process_that_is_alone_stops_at_once(self):
        self.assertEqual(stops().at_once(), 0)
        self.assertEqual(stops(signal.SIGTERM).at_once(), signal.SIGTERM)
        self.assertEqual(stops(signal.SIGTERM).to_tell(), 0)

    def test_one_of_several_tells_it_with_its_next_step(self):
        one = stops(signal.SIGINT, processes=2)
        self.assertEqual((one.at_once(), one.to_tell()), (0, signal.SIGINT))

    def test_data_comes_before_a_signal(self):
        one = stops(signal.SIGINT, processes=2)
        self.assertEqual(one.failed(registry.DataError("x")), 0)  # not before all others
        self.assertNotIn(one.to_tell(), (0, signal.SIGINT))
        alone = stops()
        self.assertGreater(alone.failed(registry.DataError("x")), 0)

    @sweeps.rows(
        (signal.SIGTERM, stopping.Preempted, 75),
        (signal.SIGINT, stopping.Interrupted, 130),
    )
    def test_signals(self, number, kind, code):
        error = stops(number).exception(number, "all is saved")
        self.assertIs(type(error), kind)
        self.assertEqual((error.code, str(error)), (code, "all is saved"))

    def test_the_host_that_cannot_read_its_data_names_it_the_others_say_so(self):
        one, other = stops(processes=2), stops(processes=2)
        one.failed(registry.DataError("record 7 is damaged"))
        why = one.to_tell()
        error = one.exception(why, "all is saved")
        self.assertIsInstance(error, stopping.BadData)
        self.assertIsInstance(error, registry.DataError)
        self.assertEqual(error.code, 2)
        self.assertRegex(str(error), "record 7 is damaged; the other hosts .*Repair .* all is sav")
        error = other.exception(why, "all is saved")
        self.assertIsInstance(error, stopping.HostStopped)
        self.assertEqual(error.code, 3)

    def test_every_end_of_a_run_has_its_exit_code(self):
        codes = {75: stopping.Preempted, 3: stopping.Diverged, 130: stopping.Interrupted}
        for code, kind in codes.items():
            self.assertEqual(kind("").code, code)
            self.assertIsInstance(kind(""), stopping.Stopped)

    def test_what_the_same_command_does(self):
        workdir, phases = Path(self.create_tempdir()), ("pretrain", "train")
        anew = "run the same command to start over, because nothing was saved yet"
        self.assertEqual(stopping.again(workdir / "none", phases), anew)
        (workdir / "pretrain" / "latest" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
        self.assertEqual(stopping.again(workdir, phases), anew)
        for folder, words in (
            ("pretrain/latest/4", "step 4 of pretrain"),
            ("train/latest/12", "step 12 of train"),
            ("train/stopped/15", "step 15 of train"),
            ("train/best/16", "step 15 of train"),  # the weights alone
        ):
            (workdir / folder).mkdir(parents=True)
            words = f"run the same command to continue after {words}"
            self.assertEqual(stopping.again(workdir, phases), words)


class EvaluationTest(absltest.TestCase):
    @pytest.mark.slow
    def test_it_ends_with_the_batch_in_which_a_stop_was_asked_for(self):
        """Such as the first one, which compiles; the same command evaluates what was saved."""
        workdir, config = Path(self.create_tempdir()) / "run", one_phase(train__epochs=1)
        config.unlock().train.warmup_epochs = 0
        reached, asks = {"clean": 0.5, "robust": 0.25, "images": 80}, [True]

        def count(*unused, between=lambda: None, **how):
            if asks.pop():
                os.kill(os.getpid(), signal.SIGTERM)
                between()
                raise AssertionError("it continues")
            between()
            return reached

        self.enter_context(mock.patch.object(accuracy, "count", count))
        with self.assertRaisesRegex(stopping.Preempted, "stopped after step 4 of 4, saved in"):
            quiet_run(config, workdir)
        asks += [False, False]  # of the selection, of the test
        said = quiet_run(config, workdir)
        self.assertIn("train: step 4 of 4", said)
        rows = jsonl.read(workdir / "metrics.jsonl")
        scored = [row["step"] for row in rows if "selection_robust" in row]
        self.assertEqual(
            (scored, [row["step"] for row in rows if "loss" in row]), ([4], [1, 2, 3, 4])
        )
