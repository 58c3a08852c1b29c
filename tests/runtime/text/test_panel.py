"""The live panel: what it shows on terminals of all kinds, and what goes above it."""

import contextlib
import io
import os
import sys
from unittest import mock

from absl.testing import parameterized

from jaxrobust.runtime.text import panel, patience, progress, terminal
from jaxrobust.runtime.text.panel import PanelRow
from jaxrobust.runtime.text.progress import LinePart
from tests.support import screens, sweeps

ROWS = (
    PanelRow("attacks", panel.stages(["apgd-ce", "apgd-t", "fab-t", "square"], "apgd-t")),
    PanelRow("robust", [LinePart("at most 96.0%"), LinePart("(93.5% to 97.7%)", 1)]),
    PanelRow("left", [LinePart("at most 9:01")]),
    PanelRow("empty", [LinePart("")]),
)


@contextlib.contextmanager
def screen(columns: int = 100, encoding: str = "utf-8", **environment: str):
    """What is written on stderr, a terminal of so many columns."""
    written = io.StringIO()
    stream = mock.Mock(wraps=written, encoding=encoding, isatty=lambda: True, fileno=lambda: 2)
    size = os.terminal_size((columns, 30))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    with (
        mock.patch.dict(os.environ, kept | {"TERM": "xterm-256color"} | environment, clear=True),
        mock.patch.object(sys, "stderr", stream),
        mock.patch.object(os, "get_terminal_size", lambda *_: size),
        mock.patch.object(panel, "_EVERY_S", -1.0),
    ):
        yield written


class PanelTest(parameterized.TestCase):
    def shown(self, rows=ROWS, *, waits: str = "", **how) -> tuple[list[str], str]:
        """The lines of the panel, and all that was written."""
        with screen(**how) as written, panel.opened("AutoAttack") as meter:
            meter.show(rows, 1, 4)
            if waits:
                meter.waits(waits)
            lines = screens.last_frame(written.getvalue())
        return lines, written.getvalue()

    def test_a_wide_terminal(self):
        lines, _ = self.shown(waits="compiling, 5 s so far (took 50 s last time)")
        self.assertStartsWith(lines[0], "╭─ AutoAttack ─")
        rows = [line.strip("│ ") for line in lines[1:-1]]
        self.assertRegex(rows[0], "^25% ━+╸?")
        self.assertEqual(
            rows[1:],
            [
                "attacks apgd-ce done, apgd-t now, fab-t, square",
                "robust  at most 96.0% (93.5% to 97.7%)",
                "left    at most 9:01",
                "now     compiling, 5 s so far (took 50 s last time)",
            ],
        )
        self.assertEqual({len(line) for line in lines}, {99})

    def test_a_terminal_of_40_columns(self):
        lines, _ = self.shown(columns=40, waits="x" * 99)
        self.assertEqual(lines[0], "AutoAttack")
        self.assertLess(max(map(len, lines)), 40)
        self.assertEqual(lines[2], "attacks apgd-t now, fab-t, square")
        self.assertEqual(lines[4], "left    at most 9:01")
        self.assertEqual(lines[5], f"now     {'x' * 30}…")

    def test_a_frame_begins_at_60_columns(self):
        for columns, first in ((61, "╭─ AutoAttack ─"), (60, "AutoAttack")):
            self.assertStartsWith(self.shown(columns=columns)[0][0], first)

    @sweeps.rows((0, 79), (12, 11))
    def test_a_terminal_of_no_width_or_hardly_any(self, columns, widest):
        lines, _ = self.shown(columns=columns)
        self.assertEqual(max(map(len, lines)) <= widest, True, lines)
        self.assertIn("at", " ".join(lines))

    @sweeps.rows(({}, True), ({"NO_COLOR": "1"}, False))
    def test_a_terminal_without_colours(self, environment, coloured):
        lines, written = self.shown(**environment)
        self.assertEqual("\x1b[36m" in written, coloured)  # of the labels
        self.assertIn("attacks apgd-ce done, apgd-t now, fab-t, square", lines[2])

    def test_a_terminal_that_has_only_ascii(self):
        lines, written = self.shown(encoding="ascii")
        self.assertTrue(written.isascii(), lines)
        self.assertStartsWith(lines[0], "+- AutoAttack")

    @sweeps.rows("dumb", "unknown")
    def test_a_terminal_that_cannot_move_is_a_pipe(self, kind):
        with screen(TERM=kind) as written, panel.opened("AutoAttack") as meter:
            self.assertFalse(progress.watched())
            self.assertIsNone(patience._columns())
            self.assertEqual(terminal.width(sys.stderr), 100)  # lines are broken there still
            meter.show(ROWS, 1, 4)
            meter.waits("compiling")
            meter.close()
        self.assertEqual(written.getvalue(), "")

    def test_a_pipe_and_another_process_have_none(self):
        with contextlib.redirect_stderr(io.StringIO()) as said, panel.opened("a") as meter:
            meter.show(ROWS, 1, 4)
        self.assertEqual(said.getvalue(), "")
        with screen() as written, panel.opened("a", here=False) as meter:
            meter.show(ROWS, 1, 4)
        self.assertEqual(written.getvalue(), "")

    def test_what_others_print_goes_above_it(self):
        with screen() as written, panel.opened("training") as meter:
            meter.show(ROWS, 1, 4)
            progress.say("step 95: clean 95.7%")
            print("a line of a library", file=sys.stderr)
            text = screens.plain(written.getvalue())
            for line in ("step 95: clean 95.7%", "a line of a library"):
                self.assertRegex(text, rf"{line} *\n╭─ training")
            self.assertStartsWith(screens.last_frame(written.getvalue())[-1], "╰")

    def test_a_panel_in_a_panel_is_the_outer_one(self):
        with screen() as written, panel.opened("training"):
            with panel.opened("testing") as inner:
                inner.show(ROWS, 1, 4)
            self.assertNotIn("testing", written.getvalue())
            self.assertTrue(panel._live)
        self.assertFalse(panel._live)

    def test_one_of_the_same_title_goes_on(self):
        with screen() as written, panel.opened("training", keep=True) as outer:
            outer.show(ROWS[:1], 0, 4)
            panel.waits("compiling the step (took 12 s last time)")
            frame = screens.last_frame(written.getvalue())
            self.assertIn("│ now     compiling the step (took 12 s last time)", frame[-2])
            with panel.opened("training") as inner:
                self.assertIs(inner, outer)
                inner.show(ROWS, 1, 4)
            self.assertTrue(panel.is_live())  # who opened it closes it
            self.assertIn("left    at most 9:01", screens.last_frame(written.getvalue())[-2])
            text = screens.plain(written.getvalue())
        self.assertNotIn("now", screens.last_frame(written.getvalue())[-2])
        self.assertNotIn("╯\n╭", text.replace("\r", ""))
        self.assertFalse(panel._live or panel._opened)

    @sweeps.rows((True, True), (False, False))
    def test_the_last_state_stays_where_it_is_to(self, keep, stays):
        with screen() as written, panel.opened("training", keep=keep) as meter:
            meter.show(ROWS, 1, 4)
            before = len(written.getvalue())
        removed = "\x1b[2K" in written.getvalue()[before:].rpartition("╯")[2]
        self.assertEqual(removed, not stays)

    def test_an_error_gives_the_terminal_back(self):
        with screen() as written:
            stream = sys.stderr
            with self.assertRaises(KeyError), panel.opened("training"):
                self.assertIsNot(sys.stderr, stream)
                raise KeyError
            self.assertIs(sys.stderr, stream)
        shown, hidden = (written.getvalue().rfind(f"\x1b[?25{end}") for end in "hl")
        self.assertGreater(shown, hidden)  # the cursor
        self.assertFalse(panel._live)

    def test_a_notebook_has_a_bar(self):
        with (
            mock.patch.object(panel, "NOTEBOOK", True),
            mock.patch.object(panel, "watched", return_value=True),
            mock.patch.object(panel, "tqdm", return_value=mock.Mock(n=0)) as made,
            panel.opened("AutoAttack") as meter,
        ):
            bar = made.return_value
            meter.show(ROWS[1:], 2, 5)
            bar.update.assert_called_once_with(2)
            self.assertEqual(bar.total, 5)
            meter.waits("compiling")
            self.assertRegex(bar.bar_format, "^AutoAttack .*compiling at most 96.0%")
            bar.close.assert_not_called()
        bar.close.assert_called_once_with()


class StagesTest(parameterized.TestCase):
    @sweeps.rows(
        ("b", 99, "a done, b now, c"),
        ("b", 13, "b now, c"),
        ("b", 8, "b now"),
        ("a", 99, "a now, b, c"),
        ("c", 99, "a done, b done, c now"),
        ("c", 18, "b done, c now"),
        ("other", 99, "other"),
    )
    def test_what_goes_on_now_stays(self, now, room, line):
        self.assertEqual(progress.joined("", panel.stages("abc", now), room), line)
