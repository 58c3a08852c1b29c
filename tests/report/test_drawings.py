"""How curves are read and thinned, and how axes, curves, rows, matrices and legends are drawn."""

import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from markupsafe import Markup

from jaxrobust.report import curves, figures, markup, pictures
from jaxrobust.report.curves import Curve
from jaxrobust.report.figures import Axis, Bar, Line, Mark

NAN = math.nan
X, Y = Axis("step"), Axis("value")


def drawn(*lines: Line, x: Axis = X, y: Axis = Y, **how) -> str:
    return figures.lines("id", "A title", lines, x, y, **how)


def content(figure: str) -> dict:
    return json.loads(re.search(r'<script [^>]*id="data-id">(.*?)</script>', figure)[1])


class CurvesTest(parameterized.TestCase):
    def curve(self, steps, values) -> Curve:
        return Curve(np.array(steps, float), np.array(values, float))

    def test_thinned_curves_keep_ends_extremes_and_gaps(self):
        values = np.sin(np.arange(1000.0))
        values[500], values[730], values[10:12] = 9.0, -9.0, np.nan
        whole = self.curve(np.arange(1000), values)
        found = curves.thinned(whole, 100)
        self.assertLess(len(found.steps), 210)
        self.assertEqual((found.steps[0], found.steps[-1]), (0, 999))
        self.assertTrue(({500, 730, 10}) <= {*found.steps.astype(int).tolist()})
        np.testing.assert_array_equal(found.values, values[found.steps.astype(int)])
        self.assertTrue((np.diff(found.steps) > 0).all())
        for start in range(0, 1000, 20):  # of each stretch the least and the greatest
            part = values[start : start + 20]
            kept = {v for s, v in zip(*found, strict=True) if start <= s < start + 20}
            self.assertLessEqual({np.nanmin(part), np.nanmax(part)}, kept)
        self.assertIs(curves.thinned(whole, 1000), whole)
        self.assertIsNot(curves.thinned(whole, 999), whole)
        none = self.curve(np.arange(9), [np.inf] * 9)
        self.assertGreaterEqual(len(curves.thinned(none, 4).steps), 2)

    def test_overfitting_is_looked_for_in_what_went_before(self):
        for counted, images in ((0.0, 1), (7.0, 7), (math.nan, 1)):
            with self.subTest(row=(counted, images)):
                own = {
                    "selection_robust": self.curve([10, 20, 30], [0.5, 0.4, 0.3]),
                    "selection_images": self.curve([10, 20, 30], [3, 3, counted]),
                    "robust": self.curve([5, 10, 15, 20], [0.25, 0.75, 0.5, 1.0]),
                }
                with mock.patch.object(curves.alarm, "overfitting", return_value="") as asked:
                    self.assertEmpty(curves._overfitting({"train": own}))
                self.assertLen(asked.call_args_list, 3)
                for number, call in enumerate(asked.call_args_list, 1):
                    self.assertEqual(call.args[0], [0.5, 0.4, 0.3][:number])
                    self.assertEqual(call.kwargs, {"images": images})
                np.testing.assert_array_equal(call.args[1], [0.5, 0.75, np.nan])
        with mock.patch.object(curves.alarm, "overfitting", side_effect=["", "so", "so"]):
            (event,) = curves._overfitting({"train": own})
        self.assertEqual(event, ("train", 20, "alarm", "so"))

    def test_stretches_of_skipped_steps(self):
        """Twenty are told one by one, the others together."""
        some = np.zeros(20)
        some[[2, 3, 4, 9]] = [1, 2, 1, 5]
        of = "steps had no finite gradient"
        rows = [
            (np.arange(20) * 100, some, [(200, f"4 {of}, up to step 400"), (900, f"5 {of}")]),
            ([1, 2], [1, 1], [(1, f"2 {of}, up to step 2")]),
            ([1, 2], [0, 0], []),
        ]
        for count in (20, 21, 25):
            events = [(2 * n, f"3 {of}") for n in range(20)]
            events += (
                [(40, f"{3 * (count - 20)} more skipped steps from here on")] if count > 20 else []
            )
            rows.append((np.arange(2 * count), np.tile([3.0, 0.0], count), events))
        for steps, values, events in rows:
            with self.subTest(events=events):
                skipped = curves._skipped({"train": {"skipped": self.curve(steps, values)}})
                self.assertEqual([(e.step, e.text) for e in skipped], events)
                self.assertEqual(
                    {(e.phase, e.kind) for e in skipped},
                    {("train", "skipped")} if events else set(),
                )

    def read(self, text: str):
        path = Path(self.create_tempdir(), "metrics.jsonl")
        path.write_text(text)
        return curves.read(path)

    def test_what_is_a_curve(self):
        row = {"phase": "train", "step": 0, "loss": 1, "on": True, "name": "x", "lr": 0.5}
        found = self.read(json.dumps(row) + "\n")
        self.assertEqual(list(found.curves["train"]), ["loss", "lr"])
        self.assertEqual(found.curves["train"]["loss"].steps.tolist(), [0])
        self.assertEmpty(found.notes)

    def test_five_damaged_lines_are_shown(self):
        for count in (5, 6):
            with self.subTest(count=count):
                (note,) = self.read("x\n" * count + '{"phase": "a", "step": 1, "v": 1}\n').notes
                more = " and others" if count > 5 else ""
                self.assertStartsWith(note, f"{count} damaged lines of")
                self.assertEndsWith(note, f"are left out: 1, 2, 3, 4, 5{more}.")


class AxesTest(parameterized.TestCase):
    def test_ends(self):
        for axis, values, ends in (
            (Y, [1, 4], (0, 4)),  # what grows from near zero is drawn from zero
            (Y, [1.6, 4], (1.6, 4)),
            (Y, [-1, 4], (-1, 4)),
            (Y, [0, 4], (0, 4)),
            (Y, [3, 3], (2.5, 3.5)),
            (Y, [math.nan, 2, math.inf, 3], (2, 3)),
            (Axis("", low=0.0, high=1.0), [0.4, 0.5], (0, 1)),
            (Axis("", low=2.0), [3, 4], (2, 4)),
            (Axis("", log=True), [-1, 0, 1, 1000], (1, 1000)),
            (Axis("", log=True), [5, 5], (2.5, 10)),
        ):
            with self.subTest(row=(axis, values, ends)):
                frame = content(drawn(Line("a", [*range(len(values))], values), y=axis))["frame"][
                    "y"
                ]
                self.assertEqual(frame, [*ends, 158, 8, axis.log])
        frame = figures._frame(Axis("", log=True), [1.0, 100.0], 0, 200)
        self.assertAlmostEqual(frame(10), 100)  # equal steps for equal factors
        # Nothing above zero is not drawn on a log axis.
        self.assertFalse(figures._frame(Axis("", log=True, low=0.0), [1, 9], 0, 1).log)

    def test_values_for_people(self):
        for value, percent, text in (
            (None, False, "not finite"), (math.inf, False, "not finite"),
            (0.12345, True, "12.35%"),
            (999.9, False, "999.9"), (1234.5, False, "1,234"), (-1500, False, "-1,500"),
        ):  # fmt: skip
            with self.subTest(row=(value, percent, text)):
                self.assertEqual(figures.spelled(value, percent), text)

    def test_ticks(self):
        for low, high, log, ticks in (
            (0, 1, False, ["0", "0.25", "0.5", "0.75", "1"]),
            (0, 10, False, ["0", "2.5", "5", "7.5", "10"]),
            (3, 17, False, ["5", "10", "15"]),
            (-1, 1, False, ["-1", "-0.5", "0", "0.5", "1"]),
            (0.5, 2000, True, ["1", "10", "100", "1k"]),
            (1e-6, 1e6, True, ["1e-6", "0.001", "1", "1k", "1M"]),
        ):
            with self.subTest(row=(low, high, log, ticks)):
                figure = drawn(Line("a", [0, 1], [low, high]), y=Axis("", False, log, low, high))
                numbers = re.findall(r'<text x="40"[^>]*>([^<]*)<', figure)
                self.assertEqual(numbers, ticks)

    def test_numbers(self):
        for value, percent, text in (
            (0, False, "0"), (0.5, True, "50%"), (999, False, "999"), (1000, False, "1k"),
            (1_281_167, False, "1.281M"), (-2.5e9, False, "-2.5G"), (0.001, False, "0.001"),
            (0.00025, False, "2.5e-4"), (0.00002, False, "2e-5"),
        ):  # fmt: skip
            with self.subTest(row=(value, percent, text)):
                self.assertEqual(figures._short(value, percent), text)

    def test_the_last_number_stays_in_the_picture(self):
        figure = drawn(Line("a", [0, 4], [0.0, 1.0]))
        numbers = re.findall(r'<text x="([\d.]+)" y="172" class="(\w+)">(\d)<', figure)
        self.assertEqual([kind for _, kind, _ in numbers], ["middle"] * 4 + ["end"])
        self.assertEqual(numbers[-1], ("339", "end", "4"))


class LinesTest(parameterized.TestCase):
    def paths(self, log=False, **line) -> list[str]:
        """The paths of a curve, on axes whose units are ten and ten units of the picture."""
        x, y = Axis("x", low=0, high=28.6), Axis("y", low=0, high=15)
        y = Axis("y", log=True, low=1, high=10) if log else y
        figure = drawn(Line("a", **line), x=x, y=y)
        return re.findall(r'<path d="([^"]*)" class="line', figure)

    def test_paths(self):
        for line, paths in (
            # What is not finite is a gap, and so is 0 on a logarithm; intervals are upright.
            (
                {"x": [0, 1, 2, 3], "y": [1, 10, NAN, 5.5]},
                ["M44.0 148.0L54.0 58.0M74.0 103.0", "M44.0 148.0h0M54.0 58.0h0M74.0 103.0h0"],
            ),
            (
                {"log": True, "x": [0, 1, 2], "y": [1, 0, 10]},
                ["M44.0 158.0M64.0 8.0", "M44.0 158.0h0M64.0 8.0h0"],
            ),
            (
                {"x": [0, 1], "y": [2, 3], "low": [1, NAN], "high": [10, 4]},
                ["M44.0 148.0V58.0", "M44.0 138.0L54.0 128.0", "M44.0 138.0h0M54.0 128.0h0"],
            ),
        ):
            with self.subTest(line=line):
                self.assertEqual(self.paths(**line), paths)
        for count, number in ((30, 2), (31, 1)):  # many points have no dots
            self.assertLen(self.paths(x=[1] * count, y=[1] * count), number)

    def test_a_summary_in_words(self):
        for count, more in ((8, ""), (9, "; and 1 more")):
            with self.subTest(row=(count, more)):
                lines = [Line(f"n{i}", [0, 1, 2, 3], [2.0, 9.0, 1.0, 4.0]) for i in range(count)]
                text = re.search('aria-label="A title. ([^"]*)"', drawn(*lines))[1]
                self.assertStartsWith(
                    text, "n0 begins at 2, ends at 4, lowest 1, highest 9; n1 begins"
                )
                self.assertEqual(text.count("begins"), 8)
                self.assertEqual(text.endswith("more"), bool(more))

    def test_forty_marks(self):
        marks = [Mark(i / 50, f"m{i}", i % 2 == 0) for i in range(41)]
        figure = drawn(Line("a", [0, 1], [0.0, 1.0]), marks=marks)
        self.assertEqual(figure.count('class="mark"') + figure.count('class="mark harmless"'), 40)
        self.assertEqual(figure.count('class="mark harmless"'), 20)
        self.assertLen(content(figure)["marks"], 41)

    def test_nothing_to_draw(self):
        log = Axis("value", log=True)
        for figure, kind in (
            (drawn(Line("a", [0], [-1.0]), y=log), "positive and finite"),
            (drawn(Line("a", [0], [math.inf])), "finite"),
            (figures.rows("id", "t", [], X), "there"),
            (figures.rows("id", "t", [Bar("a", None)], X), "known"),
        ):
            self.assertIn(f": no value is {kind}.", figure)
            self.assertNotIn("<svg", figure)
            self.assertNotIn("<figure", figure)

    def test_rows(self):
        bars = [Bar("a" * 18, 0.5, 0.25, 0.75, 1.0), Bar("b" * 19, None, strong=True)]
        bars += [Bar("c", 0.0, strong=True)]
        figure = figures.rows("id", "t", bars, Axis("share"), names=("right", ""))
        self.assertIn(f">{'a' * 18}<", figure)
        self.assertIn(f">{'b' * 17}…<", figure)
        self.assertIn('<path d="M171.0 14.5H277.0" class="line c1 interval"/>', figure)
        self.assertIn('<circle cx="330.0" cy="14.5" r="3.5" class="ring"/>', figure)
        dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.5" class="dot (c\d)"', figure)
        self.assertEqual(dots, [("224.0", "14.5", "c1"), ("118.0", "48.5", "c2")])
        self.assertEqual(content(figure)["frame"]["x"][:2], [0, 1])  # the second value too
        self.assertIn("grid zero", figure)
        self.assertNotIn('class="legend"', figure)  # one kind of sign needs none
        both = figures.rows("id", "t", bars, Axis("share"), names=("robust", "clean"))
        self.assertEqual(both.count('class="sign"'), 2)
        many = figures.rows("id", "t", [Bar(f"n{i}", 1.0) for i in range(14)], Axis("share"))
        self.assertIn("n11 1; and 2 more", many)


class MarkupTest(parameterized.TestCase):
    def test_text_is_escaped_and_a_percent_sign_stays_at_its_number(self):
        text = markup.parts.table("c", ("a",), [("<5%",), (Markup("<b>x</b>"),), (None,)])
        self.assertIn("<td>&lt;5%</td>", text)
        self.assertIn("<td><b>x</b></td>", text)
        self.assertIn("<td></td>", text)

    def test_a_text_to_copy_is_as_it_is(self):
        text = markup.parts.copied("The <title>", "a & 5%")
        self.assertIn("<summary>The &lt;title&gt;</summary>", text)
        self.assertIn('<pre tabindex="0">a &amp; 5%</pre>', text)

    def test_data_cannot_end_their_element(self):
        text = markup.data({"a": "</script>&\u2028\u2029", "b": [0.123456789, math.nan, 2.0]})
        self.assertNoCommonElements(text, "<>&\u2028\u2029")
        values = {"a": "</script>&\u2028\u2029", "b": [0.12346, None, 2]}
        self.assertEqual(json.loads(text), values)
        self.assertIn("2]", text)  # a whole number, without a point
        self.assertEqual(markup.plain(np.array([1.5])), [1.5])

    def test_numbers_of_a_table_stand_to_the_right(self):
        text = markup.parts.table("c", ("a", "b", "d"), [("x", 1, 2)], words=1)
        self.assertIn('<td>x</td><td class="n">1</td><td class="n">2</td>', text)
        text = markup.parts.table("c", ("a", "b"), [("x", 1)], words=0, of=": more")
        self.assertIn('<td class="n">x</td>', text)
        self.assertIn('aria-label="c: more"', text)


class MatrixTest(parameterized.TestCase):
    def cells(self, counts) -> str:
        counts = np.array(counts)
        names = [f"class {i}" for i in range(len(counts))]
        return figures.cells("id", "t", names, counts, alt="", note="")

    def test_rows_are_labels_and_shades_are_shares_of_the_most(self):
        text = self.cells([[0, 6], [1, 0]])
        shades = re.findall(r'<path d="([^"]*)" class="heat" fill-opacity="([\d.]+)"', text)
        cell = "h127.0v127.0h-127.0z"
        expected = [(f"M78.0 133.0{cell}", "0.08"), (f"M205.0 6.0{cell}", "0.50")]
        self.assertEqual(shades, expected)
        numbers = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*ink">(\d+)<', text)
        self.assertEqual(numbers, [("268.5", "69.5", "6"), ("141.5", "196.5", "1")])
        text = self.cells([[0, 60, 1], [11, 0, 0], [59, 21, 0]])
        shades = re.findall(r'class="heat" fill-opacity="([\d.]+)"', text)
        self.assertEqual(shades, [f"{0.5 * level / 6:.2f}" for level in (1, 2, 3, 6)])
        self.assertEqual(text.count("v84.7"), 5)  # cells

    def test_numbers_where_they_fit(self):
        for size, there in ((11, True), (12, False)):
            with self.subTest(row=(size, there)):
                text = self.cells(np.eye(size, dtype=int))
                self.assertEqual("middle ink" in text, there)


class StandaloneTest(parameterized.TestCase):
    def legend(self, *names: str) -> list[tuple[str, str, str]]:
        lines = [Line(name, [0, 1], [0.0, 1.0]) for name in names]
        (_, text), *_ = pictures.standalone(Markup(drawn(*lines)))
        places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', text)
        return [place for place in places if place[2] in names]

    def test_names_of_a_legend_fill_lines(self):
        short = self.legend("a", "b", "c")
        self.assertLen({y for _, y, _ in short}, 1)
        self.assertEqual([x for x, _, _ in short], sorted([x for x, _, _ in short], key=float))
        long = self.legend("a" * 40, "b" * 40, "c")
        ys = [float(y) for _, y, _ in long]
        self.assertEqual([ys[1] - ys[0], ys[2] - ys[1]], [15, 0])
        self.assertEqual(long[0][0], long[1][0])
        huge = self.legend("a" * 80, "b")
        self.assertEqual(float(huge[0][1]), float(short[0][1]))  # no empty line before it
