"""Who stops a run, when, and with which exit code."""

import signal
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from jaxrobust.data import sources
from jaxrobust.runtime.progress import StopSignals
from jaxrobust.training import stopping, trouble


def stops(asked=0, processes=1):
    signals = StopSignals()
    signals.asked = int(asked)
    with mock.patch.object(jax, "process_count", lambda: processes):
        return stopping.Stops(signals)


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
        self.assertEqual(one.failed(sources.DataError("x")), 0)  # not before all others
        self.assertNotIn(one.to_tell(), (0, signal.SIGINT))
        alone = stops()
        self.assertGreater(alone.failed(sources.DataError("x")), 0)

    @parameterized.parameters(
        (signal.SIGTERM, stopping.Preempted, 75),
        (signal.SIGINT, stopping.Interrupted, 130),
    )
    def test_signals(self, number, kind, code):
        error = stops(number).exception(number, "all is saved")
        self.assertIs(type(error), kind)
        self.assertEqual((error.code, str(error)), (code, "all is saved"))

    def test_the_host_that_cannot_read_its_data_names_it_the_others_say_so(self):
        one, other = stops(processes=2), stops(processes=2)
        one.failed(sources.DataError("record 7 is damaged"))
        why = one.to_tell()
        error = one.exception(why, "all is saved")
        self.assertIsInstance(error, stopping.BadData)
        self.assertIsInstance(error, sources.DataError)
        self.assertEqual(error.code, 2)
        self.assertRegex(str(error), "record 7 is damaged; the other hosts .*Repair .* all is sav")
        error = other.exception(why, "all is saved")
        self.assertIsInstance(error, stopping.HostStopped)
        self.assertEqual(error.code, 3)

    def test_every_end_of_a_run_has_its_exit_code(self):
        codes = {75: stopping.Preempted, 3: trouble.Diverged, 130: stopping.Interrupted}
        for code, kind in codes.items():
            self.assertEqual(kind("").code, code)
            self.assertIsInstance(kind(""), stopping.Stopped)


if __name__ == "__main__":
    absltest.main()
