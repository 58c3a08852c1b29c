"""A run that was stopped and continued: its page marks where."""

from pathlib import Path

import pytest
from absl.testing import absltest

from jaxrobust.report import gathered, page
from tests.support import reports
from tests.support.runs import one_phase, quiet_run, stop_after


class ResumedTest(absltest.TestCase):
    @pytest.mark.slow
    def test_a_run_that_was_continued_twice_has_two_marks(self):
        run, config = Path(self.create_tempdir()) / "run", one_phase()
        stop_after(3, lambda: quiet_run(config, run))
        stop_after(4, lambda: quiet_run(config, run))
        quiet_run(config, run)
        quiet_run(config, run)  # ended before: nothing goes on
        data, text, _ = reports.read(page.page(gathered.gather([run])))
        marks = data["t0-0-loss"]["marks"]
        self.assertEqual([at for at, _ in marks], [3, 7])
        for _, said in marks:
            self.assertRegex(said, r"resumption: another process continued here, 2\d{3}-.* x cpu")
        self.assertIn("phase train is at step 12 of 12", text)
