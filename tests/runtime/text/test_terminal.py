"""Lines on a terminal of 80 columns."""

import io
import os
import pty
from pathlib import Path

from absl.testing import absltest

from jaxrobust.runtime.text import terminal

LONG = (
    "convnext_n (train, step 380, ema) on data set 'digits', split 'test': autoattack standard, "
    "linf 0.1 on 100 images, 2 x cpu"
)


class TerminalTest(absltest.TestCase):
    def test_lines_break_between_words(self):
        path = "/data/" + 100 * "x"
        rows = ["short", LONG, f"  indented {LONG}", f"{path} stays whole", ""]
        broken = terminal.fitted("\n".join(rows), 80).split("\n")
        self.assertEqual(broken[:3], ["short", LONG[: LONG.index(" standard")], *broken[2:3]])
        self.assertStartsWith(broken[2], "  standard, linf")
        self.assertStartsWith(broken[4], "    ")
        self.assertIn(path, [line.strip() for line in broken])
        self.assertEqual(" ".join("\n".join(broken).split()), " ".join("\n".join(rows).split()))
        self.assertLessEqual(max(len(line) for line in broken if path not in line), 80)

    def test_no_line_is_narrower_than_20_columns(self):
        text = "a bc def " * 20
        for columns, width in ((21, 21), (20, 20), (19, 20), (1, 20)):
            lines = terminal.fitted(text, columns).split("\n")
            self.assertEqual({len(line) <= width for line in lines}, {True})
            self.assertGreater(max(map(len, lines)), width - 5)
        exact = "0123456789 012345678"  # 20 columns
        for columns in (20, 19):
            self.assertEqual(terminal.fitted(exact, columns), exact)
        self.assertEqual(terminal.fitted(f"{exact}9", 20), "0123456789\n  0123456789")

    def test_a_pipe_keeps_its_lines(self):
        self.assertIsNone(terminal.width(io.StringIO()))
        with Path(os.devnull).open() as null:
            self.assertIsNone(terminal.width(null))
        self.assertEqual(terminal.fitted(LONG, None), LONG)

    def test_a_terminal_has_its_columns(self):
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        with os.fdopen(theirs, "w") as stream:
            os.system(f"stty cols 72 < {os.ttyname(stream.fileno())}")
            self.assertEqual(terminal.width(stream), 72)
