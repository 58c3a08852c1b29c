"""The rules by which curves are read and thinned, and axes, legends and matrices are drawn."""

import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.report import pictures
from jaxrobust.report.drawing import curves, figures, markup, matrix
from jaxrobust.report.drawing.curves import Curve
from jaxrobust.report.drawing.figures import Axis, Bar, Line, Mark
from jaxrobust.report.drawing.markup import Html

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
        values = np.zeros(20)
        values[[2, 3, 4, 9]] = [1, 2, 1, 5]
        own = {"train": {"skipped": self.curve(np.arange(20) * 100, values)}}
        first, second = curves._skipped(own)
        self.assertEqual((first.phase, first.step, first.kind), ("train", 200, "skipped"))
        self.assertEqual(first.text, "4 steps had no finite gradient, up to step 400")
        self.assertEqual((second.step, second.text), (900, "5 steps had no finite gradient"))
        two = {"train": {"skipped": self.curve([1, 2], [1, 1])}}
        self.assertEqual(
            curves._skipped(two)[0].text, "2 steps had no finite gradient, up to step 2"
        )
        none = {"train": {"skipped": self.curve([1, 2], [0, 0])}}
        self.assertEqual(curves._skipped(none), [])

    def test_twenty_stretches_are_told_one_by_one(self):
        for count, events in ((20, 20), (21, 21), (25, 21)):
            with self.subTest(row=(count, events)):
                values = np.zeros(2 * count)
                values[::2] = 3
                own = {"train": {"skipped": self.curve(np.arange(2 * count), values)}}
                found = curves._skipped(own)
                self.assertLen(found, events)
                if count > 20:
                    text = f"{3 * (count - 20)} more steps from here on"
                    self.assertEqual((found[-1].step, found[-1].text), (40, text))

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
            (Y, [], (0, 1)),
        ):
            with self.subTest(row=(axis, values, ends)):
                frame = figures._frame(axis, values, 10, 110)
                self.assertEqual((frame.low, frame.high), ends)
                self.assertEqual((frame(ends[0]), frame(ends[1])), (10, 110))
                self.assertEqual(frame.log, axis.log)

    def test_nothing_above_zero_is_not_drawn_on_a_log_axis(self):
        frame = figures._frame(Axis("", log=True, low=0.0), [1, 9], 0, 1)
        self.assertFalse(frame.log)

    def test_values_for_people(self):
        for value, percent, text in (
            (None, False, "not finite"), (math.inf, False, "not finite"),
            (0.12345, True, "12.35 %"),
            (999.9, False, "999.9"), (1234.5, False, "1,234"), (-1500, False, "-1,500"),
        ):  # fmt: skip
            with self.subTest(row=(value, percent, text)):
                self.assertEqual(figures.spelled(value, percent), text)

    def test_the_last_number_stays_in_the_picture(self):
        frame = figures._Frame(0, 4, 44, 330, False)
        *others, last = figures._numbers(frame, X, 20)
        self.assertIn('class="end"', last)
        self.assertIn('x="339"', last)
        self.assertEqual([text.count('class="middle"') for text in others], [1] * 4)


class LinesTest(parameterized.TestCase):
    def test_a_summary_in_words(self):
        for count, more in ((8, ""), (9, "; and 1 more")):
            with self.subTest(row=(count, more)):
                lines = [Line(f"n{i}", [0, 1, 2, 3], [2.0, 9.0, 1.0, 4.0]) for i in range(count)]
                text = figures._summary(lines, Y)
                self.assertStartsWith(
                    text, "n0 begins at 2, ends at 4, lowest 1, highest 9; n1 begins"
                )
                self.assertEqual(text.count("begins"), 8)
                self.assertEqual(text.endswith("more"), bool(more))
                self.assertEqual(figures._summary([Line("a", [0], [math.nan])], Y), "")

    def test_forty_marks(self):
        marks = [Mark(i / 50, f"m{i}", i % 2 == 0) for i in range(41)]
        figure = drawn(Line("a", [0, 1], [0.0, 1.0]), marks=marks)
        self.assertEqual(figure.count('class="mark"') + figure.count('class="mark harmless"'), 40)
        self.assertEqual(figure.count('class="mark harmless"'), 20)
        self.assertLen(content(figure)["marks"], 41)

    def test_nothing_to_draw(self):
        log = Axis("value", log=True)
        self.assertIn("no value is positive and finite", drawn(Line("a", [0], [-1.0]), y=log))
        self.assertIn("no value is finite", drawn(Line("a", [0], [math.inf])))
        empty = figures.rows("id", "t", [], X)
        self.assertIn("no value is there", empty)
        self.assertIn("no value is known", figures.rows("id", "t", [Bar("a", None)], X))

    def test_rows(self):
        bars = [Bar("a" * 18, 0.5, 0.25, 0.75, 1.0), Bar("b" * 19, None, strong=True)]
        bars += [Bar("c", 0.0, strong=True)]
        figure = figures.rows("id", "t", bars, Axis("share"), names=("right", ""))
        self.assertIn(f">{'a' * 18}<", figure)
        self.assertIn(f">{'b' * 17}…<", figure)
        self.assertEqual(figure.count('class="ring"'), 1)
        self.assertEqual((figure.count('class="dot c1"'), figure.count('class="dot c2"')), (1, 1))
        frame = content(figure)["frame"]["x"]
        self.assertEqual(frame[:2], [0, 1])  # the second value too
        self.assertIn("grid zero", figure)
        self.assertEqual(figure.count('class="sign"'), 1)
        many = figures.rows("id", "t", [Bar(f"n{i}", 1.0) for i in range(14)], Axis("share"))
        self.assertIn("n11 1; and 2 more", many)


class MarkupTest(parameterized.TestCase):
    def test_attributes(self):
        text = markup.tag("a", "x", href='"<', hidden=True, off=False, none=None, n=0, class_="c")
        self.assertEqual(text, '<a href="&quot;&lt;" hidden n="0" class="c">x</a>')
        self.assertEqual(markup.tag("img", src="a"), '<img src="a"/>')
        self.assertEqual(markup.tag("p"), "<p></p>")
        self.assertEqual(markup.tag("p", ["a", None, [Html("<b>"), 3]]), "<p>a<b>3</p>")

    def test_a_text_to_copy_has_a_button(self):
        made = markup.copied("The <title>", "a & b")
        button = '<button type="button" class="copy">Copy</button>'
        inside = f'<summary>The &lt;title&gt;</summary>{button}<pre tabindex="0">a &amp; b</pre>'
        self.assertEqual(made, f'<details class="copyonly">{inside}</details>')

    def test_a_percent_sign_stays_at_its_number(self):
        self.assertEqual(markup.join(["<5 %"]), "&lt;5\u00a0%")

    def test_data_cannot_end_their_element(self):
        text = markup.data("i", {"a": "</script>&\u2028\u2029", "b": [0.123456789, math.nan, 2.0]})
        inside = text[text.index(">") + 1 : text.rindex("<")]
        self.assertNoCommonElements(inside, "<>&\u2028\u2029")
        found = json.loads(inside)
        self.assertEqual(found, {"a": "</script>&\u2028\u2029", "b": [0.12346, None, 2]})
        self.assertIn("2]", inside)  # a whole number, without a point
        self.assertEqual(markup.plain(np.array([1.5])), [1.5])

    def test_numbers_of_a_table_stand_to_the_right(self):
        text = markup.table("c", ("a", "b", "d"), [("x", 1, 2)], words=1)
        self.assertIn('<td>x</td><td class="n">1</td><td class="n">2</td>', text)
        text = markup.table("c", ("a", "b"), [("x", 1)], words=0, of=": more")
        self.assertIn('<td class="n">x</td>', text)
        self.assertIn('aria-label="c: more"', text)
        self.assertIsNone(markup.remark(""))
        self.assertIsNone(markup.doubts([]))


class MatrixTest(parameterized.TestCase):
    def cells(self, counts, size=None) -> str:
        counts = np.array(counts)
        names = [f"class {i}" for i in range(size or len(counts))]
        return matrix.cells("id", "t", names, counts, alt="", note="")

    def test_rows_are_labels_and_shades_are_shares_of_the_most(self):
        text = self.cells([[0, 6], [1, 0]])
        side = matrix._SIDE / 2
        shades = re.findall(r'<path d="([^"]*)" class="heat" fill-opacity="([\d.]+)"', text)
        right = f"M{matrix._LEFT + side:.1f} {matrix._TOP:.1f}"
        below = f"M{matrix._LEFT:.1f} {matrix._TOP + side:.1f}"
        self.assertEqual([shade for _, shade in shades], ["0.08", "0.50"])
        self.assertStartsWith(shades[0][0], below)
        self.assertStartsWith(shades[1][0], right)
        numbers = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*ink">(\d+)<', text)
        x = [f"{matrix._LEFT + side * (at + 0.5):.1f}" for at in (0, 1)]
        y = [f"{matrix._TOP + side * (at + 0.5):.1f}" for at in (0, 1)]
        self.assertEqual(numbers, [(x[1], y[0], "6"), (x[0], y[1], "1")])

    def test_numbers_where_they_fit(self):
        for size, there in ((11, True), (12, False)):
            with self.subTest(row=(size, there)):
                text = self.cells(np.eye(size, dtype=int))
                self.assertEqual("middle ink" in text, there)


class StandaloneTest(parameterized.TestCase):
    def legend(self, *names: str) -> tuple[list[str], float]:
        lines = [Line(name, [0, 1], [0.0, 1.0]) for name in names]
        (_, text), *_ = pictures.standalone(Html(drawn(*lines)))
        places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', text)
        height = float(re.search(r'height="([\d.]+)" xmlns|height="([\d.]+)">', text)[1] or 0)
        return [place for place in places if place[2] in names], height

    def test_names_of_a_legend_fill_lines(self):
        short, _ = self.legend("a", "b", "c")
        self.assertLen({y for _, y, _ in short}, 1)
        self.assertEqual([x for x, _, _ in short], sorted([x for x, _, _ in short], key=float))
        long, _ = self.legend("a" * 40, "b" * 40, "c")
        ys = [float(y) for _, y, _ in long]
        self.assertEqual([ys[1] - ys[0], ys[2] - ys[1]], [15, 0])
        self.assertEqual(long[0][0], long[1][0])
        huge, _ = self.legend("a" * 80, "b")
        self.assertEqual(float(huge[0][1]), float(short[0][1]))  # no empty line before it

    def test_a_rule_counts_where_all_its_classes_do(self):
        style = lambda name, *classes: pictures._style(name, {*classes})  # noqa: E731
        self.assertEqual(style("path"), style("path", "unknown"))
        self.assertNotEqual(style("path", "line", "c1"), style("path", "line", "c2"))
        self.assertIn("stroke-dasharray", style("path", "line", "c1", "dashed"))
        self.assertNotIn("stroke-dasharray", style("path", "line", "c1"))
        self.assertNotIn("var(", style("path", "line", "c1", "interval", "dots"))
