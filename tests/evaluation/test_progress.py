"""What an evaluation says of its progress: bounds are called so, and in a pipe only changes."""

import contextlib
import io
import time
from unittest import mock

from absl.testing import absltest

from jaxrobust.evaluation.progress import Decisions


def said(images: int, known: int, calls: int, decide: int = 0) -> list[str]:
    """The lines in a pipe of an attack whose calls come 11 seconds after each other."""
    lines, clock = io.StringIO(), iter(range(1000, 10_000, 11))
    with (
        contextlib.redirect_stderr(lines),
        mock.patch.object(time, "perf_counter", lambda: next(clock)),
        Decisions(images, interval=lambda k, n: (0.0, 1.0), enabled=True) as meter,
    ):
        meter.begin("square", images, known, images)
        for call in range(calls):
            if call < decide:
                meter.decided(images)
            meter.advance(100, 1.0, False, 5000, 0)
    return lines.getvalue().splitlines()


class ProgressTest(absltest.TestCase):
    def test_nothing_compiles_where_no_image_is_left(self):
        self.assertEqual(said(0, 0, 0), [])
        self.assertEqual(said(3, 3, 0), ["square: 3 of 3 images are in the ledger"])
        self.assertIn("compiling", said(3, 0, 0)[0])

    def test_a_bound_is_called_one_and_told_once(self):
        lines = said(4, 0, 5)
        self.assertLen(lines, 3)  # compiling, the bound of all, where it stands
        self.assertIn("if none is fooled", lines[1])
        self.assertRegex(lines[2], r"square at most [\d:]+ left, 0/4 images decided")
        self.assertLen(said(4, 0, 5, decide=3), 5)
        self.assertLessEqual(max(map(len, said(4, 0, 5))), 80)


if __name__ == "__main__":
    absltest.main()
