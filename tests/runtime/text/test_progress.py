"""What is said of progress: times for people, and lines that fit a terminal."""

import contextlib
import io
import os
from unittest import mock

from absl.testing import parameterized

from jaxrobust.runtime.text import progress
from tests.support import sweeps


class ClockTest(parameterized.TestCase):
    @sweeps.rows(
        (0, "0:00"), (59.9, "0:59"), (61, "1:01"), (600, "10:00"),
        (3600, "1:00:00"), (3 * 3600 + 4 * 60 + 5, "3:04:05"), (100 * 3600, "100:00:00"),
    )  # fmt: skip
    def test_times(self, seconds, said):
        self.assertEqual(progress.clock(seconds), said)


class LineTest(parameterized.TestCase):
    PARTS = (
        progress.LinePart("loss 0.5,", 0),
        progress.LinePart("", 9),
        progress.LinePart("step 3,", 2),
        progress.LinePart("eta 1:00", 1),
    )

    @sweeps.rows(
        (29, "a: loss 0.5, eta 1:00"),
        (30, "a: loss 0.5, step 3, eta 1:00"),
        (21, "a: loss 0.5"),
        (22, "a: loss 0.5, eta 1:00"),
        (1, "a: loss 0.5"),  # the last one stays
    )
    def test_what_does_not_fit_is_left_out_by_its_rank(self, room, line):
        self.assertEqual(progress.joined("a:", self.PARTS, room), line)

    @sweeps.rows((60, 18), (62, 20), (90, 20))
    def test_a_bar_takes_what_is_left(self, room, bar):
        line = progress.fitted("train", self.PARTS, room)
        end = "loss 0.5, step 3, eta 1:00"
        self.assertEqual(line, f"train {{percentage:3.0f}}% |{{bar:{bar}}}| {end}")

    def test_no_bar_is_better_than_a_tiny_one(self):
        line = progress.fitted(
            "train", self.PARTS, len("train 100%  loss 0.5, step 3, eta 1:00") + 9
        )
        self.assertEqual(line, "train {percentage:3.0f}% loss 0.5, step 3, eta 1:00")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class SayTest(parameterized.TestCase):
    def said(self, text, stream, *, process=0, never="", **options) -> str:
        environment = mock.patch.dict(os.environ, NO_COLOR=never)
        pod = mock.patch("jax.process_index", return_value=process)
        with environment, pod, contextlib.redirect_stderr(stream):
            progress.say(text, **options)
        return stream.getvalue()

    @sweeps.rows(
        ("WARNING: x", Terminal, "", True),
        ("x", Terminal, "", False),
        ("WARNING: x", io.StringIO, "", False),
        ("WARNING: x", Terminal, "1", False),
    )
    def test_warnings_are_yellow_on_a_terminal(self, text, stream, never, yellow):
        line = f"\033[33m{text}\033[0m\n" if yellow else f"{text}\n"
        self.assertEqual(self.said(text, stream(), never=never), line)

    @sweeps.rows((0, False, "x\n"), (1, False, ""), (1, True, "x\n"))
    def test_one_process_speaks_for_all(self, process, every, line):
        options = {"process": process, "every_process": every}
        self.assertEqual(self.said("x", io.StringIO(), **options), line)


class WithoutLibrariesTest(parameterized.TestCase):
    """As the wheel `jaxrobust-attacks` may be installed."""

    def test_lines_without_tqdm(self):
        with (
            mock.patch.object(progress, "tqdm", None),
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            progress.say("a line")
        self.assertEqual(said.getvalue(), "a line\n")

    @parameterized.parameters((None, False), ("a spec", True))
    def test_a_panel_needs_rich(self, spec, watched):
        terminal = mock.Mock(isatty=lambda: True)
        with (
            mock.patch.object(progress, "find_spec", lambda name: spec),
            mock.patch.object(progress.sys, "stderr", terminal),
            mock.patch.dict("os.environ", TERM="xterm"),
        ):
            self.assertEqual(progress.watched(), watched)
