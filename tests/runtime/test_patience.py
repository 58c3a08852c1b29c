"""What a person is told while a command has nothing to say yet."""

import contextlib
import io
import time

from absl.testing import absltest

from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.text import patience


class PatienceTest(absltest.TestCase):
    def said(self, work) -> str:
        out = io.StringIO()
        patience._told.clear()
        with contextlib.redirect_stderr(out), absltest.mock.patch.object(patience, "AFTER_S", 0.05):
            work()
            time.sleep(0.15)
        return out.getvalue()

    def test_what_takes_long_is_said_once(self):
        def slow():
            with patience.of("loading"):
                time.sleep(0.2)
            with patience.of("loading"):
                time.sleep(0.2)

        self.assertEqual(self.said(slow), "loading ...\n")

    def test_what_is_done_at_once_is_not(self):
        def quick():
            with patience.of("loading"):
                pass
            with patience.of("loading", here=False):
                time.sleep(0.2)

        self.assertEqual(self.said(quick), "")

    def test_a_mistake_is_one_sentence(self):
        def wrong():
            patience.begin("loading")
            with self.assertRaises(SystemExit):
                arguments.stop("no such file", 2)

        self.assertEqual(self.said(wrong), "jaxrobust: no such file\n")


if __name__ == "__main__":
    absltest.main()
