"""What a comparison says: edges of its sentences, orders of its tables, which lines are red."""

import re
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.records import comparisons
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import REPLAY, Verdicts
from jaxrobust.results.comparison import (
    comparison_findings,
    comparison_markdown,
    evaluations,
    picture,
)
from jaxrobust.results.comparison.comparison_findings import ComparisonFindings, Difference, Pair
from jaxrobust.results.comparison.evaluations import ComparedEvaluation
from jaxrobust.results.run_records import RunRecord
from tests.support.compared import attacks

L2 = {"norm": "l2", "epsilon": 0.5}
LINF = {"norm": "linf", "epsilon": 8 / 255}


def verdicts(*, fooled, clean=None, labels=None) -> Verdicts:
    fooled = np.array(fooled)
    n = len(fooled)
    clean = fooled != "clean" if clean is None else np.array(clean)
    labels = np.zeros(n, np.int32) if labels is None else np.asarray(labels, np.int32)
    return Verdicts(np.arange(n), labels, clean, fooled, np.zeros(n), np.full(n, -1))


def evaluated(seen: Verdicts, images: int | None = None, **about) -> ComparedEvaluation:
    known = {"attacks": attacks(), "dataset": "cifar10", "split": "test", "preprocessing": "none"}
    known |= {"method": "autoattack standard", "evaluation": "e", "weights": "train"}
    record = AccuracyRecord(**(known | about))
    count = len(seen.labels) if images is None else images
    return ComparedEvaluation("place", RunRecord(record, Path("results.jsonl"), None), seen, count)


def counted(gained: int, lost: int, n: int, both: int = 0) -> comparisons.Paired:
    """Compare two lists of which these many images are right in one alone."""
    at = np.arange(n)
    common = (at >= gained + lost) & (at < gained + lost + both)
    return comparisons.compare(
        common | (at >= gained) & (at < gained + lost), common | (at < gained)
    )


def pair(
    one: comparisons.Paired, *, p=None, p_by_class=(1.0,), classes=None, n=50, robust=True
) -> Pair:
    """A pair with this clean accuracy, and groups of which only the corrected p is known."""
    count = len(p_by_class)
    same = Difference(counted(0, 0, one.n), 1.0)
    columns = [np.full(count, n), *[np.arange(count)] * 4, np.arange(count) / 100]
    by_class = comparisons.Paired(*columns, *[np.zeros(count)] * 2, np.ones(count))
    classes = np.arange(count) if classes is None else classes
    difference = Difference(one, one.p if p is None else p)
    return Pair("A", "B", difference, same if robust else None, {}, classes, by_class,
                np.array(p_by_class))  # fmt: skip


class SentenceTest(parameterized.TestCase):
    def said(self, one: Pair, count: int = 1) -> str:
        """The sentence on clean accuracy."""
        *_, sentence, _ = comparison_markdown.in_words(one, count)
        return sentence

    def test_who_is_higher(self):
        for gained, lost, winner, loser in ((30, 2, "B", "A"), (2, 30, "A", "B")):
            with self.subTest(row=(gained, lost, winner, loser)):
                said = self.said(pair(counted(gained, lost, 200, both=50)))
                shares = f"A has {(50 + lost) / 2:.2f}%, B {(50 + gained) / 2:.2f}%"
                higher = f"**The clean accuracy of {winner} is higher than that of {loser}.**"
                self.assertStartsWith(said, f"{higher} {shares}")
                self.assertIn(f"images: {(gained - lost) / 2:+.2f} points", said)
                self.assertEndsWith(
                    said, f"A alone is right on {lost} images, B alone on {gained}."
                )
                self.assertNotIn("corrected", said)

    def test_the_corrected_one_decides_and_is_said_of_several(self):
        said = self.said(pair(counted(30, 10, 2000), p=0.0123), count=3)
        self.assertIn(" p = 0.0022, p = 0.012 corrected for 3 pairs. A alone", said)
        said = self.said(pair(counted(30, 10, 2000), p=0.06), count=2)
        self.assertStartsWith(said, "**A and B cannot be told apart in clean accuracy.**")

    def test_nobody_is_higher(self):
        said = self.said(pair(counted(0, 0, 1000, both=400)))
        self.assertStartsWith(
            said, "**A and B have the same clean accuracy, image by image.** Both have 40.00%."
        )
        self.assertRegex(said, r"lies within -0\.\d\d to \+0\.\d\d points\.$")
        said = self.said(pair(counted(7, 7, 1000)))
        self.assertIn("cannot be told apart", said)
        self.assertEndsWith(said, "B alone on 7.")  # no number of images shows no difference

    def test_a_hair(self):
        for gained, lost, hair in (
            (5, 0, True),
            (0, 5, True),
            (3, 0, False),
            (0, 3, False),
            (12, 8, False),
        ):
            with self.subTest(row=(gained, lost, hair)):
                said = self.said(pair(counted(gained, lost, 5000)))
                self.assertIn("cannot be told apart", said)
                self.assertEqual("barely excludes 0" in said, hair, said)

    def test_an_interval_that_ends_at_0_leaves_nothing_out(self):
        for low, high, hair in ((-0.01, 0.02, False), (0.0, 0.02, False), (1e-6, 0.02, True),
                                  (-0.02, 0.0, False), (-0.02, -1e-6, True)):  # fmt: skip
            with self.subTest(row=(low, high, hair)):
                said = self.said(pair(counted(5, 3, 500)._replace(low=low, high=high)))
                self.assertIn("cannot be told apart", said)
                self.assertEqual("barely excludes 0" in said, hair)

    def test_p(self):
        for value, text in (
            (1.0, "1"), (0.05, "0.05"), (0.012345, "0.012"), (1e-4, "0.0001"), (9.9e-5, "< 0.0001"),
            (0.0, "< 0.0001"),
        ):  # fmt: skip
            with self.subTest(row=(value, text)):
                self.assertEqual(comparison_markdown.p_value(value), text)
                said = comparison_markdown.said_p(value)
                self.assertEqual(said, f"p {text}" if text[0] == "<" else f"p = {text}")


class ClassesTest(parameterized.TestCase):
    def said(self, p, **how) -> str:
        *_, sentence = comparison_markdown.in_words(pair(counted(1, 0, 9), p_by_class=p, **how), 1)
        return sentence

    def test_those_apart_the_surest_first(self):
        said = self.said([0.9, 0.04, 0.051, 0.001, 0.04], classes=[10, 11, 12, 13, 14])
        self.assertEndsWith(
            said,
            "can be told apart on 3 of 5 classes (corrected for all of them; points of B minus A):"
            " 13 (+3.00), 11 (+1.00), 14 (+4.00).",
        )

    def test_twenty_are_named(self):
        for count, more in ((20, ""), (21, ", and 1 more"), (33, ", and 13 more")):
            with self.subTest(row=(count, more)):
                said = self.said([*np.linspace(0.001, 0.04, count), 0.9])
                self.assertIn(f"on {count} of {count + 1} classes", said)
                self.assertEndsWith(said, f"19 (+19.00){more}.")
                self.assertNotIn(" 20 (", said)

    def test_too_few_images_a_class(self):
        """Whether the smallest p of n images, in as many tests, is below 0.05."""
        for n, count, few in ((8, 10, True), (9, 10, False), (5, 1, True), (6, 1, False)):
            with self.subTest(row=(n, count, few)):
                said = self.said([1.0] * count, n=n)
                self.assertEqual("could not be told apart on any class" in said, few)
                self.assertEqual(f"{n} images per class are too few for {count} tests" in said, few)
                self.assertEqual("cannot be told apart on any single one" in said, not few)


class FoundTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        drawn = np.random.default_rng(3)
        self.labels = drawn.integers(5, 9, 300)
        names = ["clean", "apgd-ce", "apgd-t", ""]
        self.seen = [
            verdicts(fooled=drawn.choice(names, 300, p=p), labels=self.labels)
            for p in ([0.2, 0.3, 0.1, 0.4], [0.3, 0.2, 0.1, 0.4], [0.1, 0.1, 0.1, 0.7])
        ]

    def test_without_attacks_classes_are_those_of_clean_accuracy(self):
        found = comparison_findings.find([evaluated(v, attacks=[]) for v in self.seen[:2]])
        self.assertEqual([one.cells[2] for one in found.evaluations], ["", ""])
        (one,) = found.pairs
        self.assertIsNone(one.robust)
        self.assertEqual(one.by_class.first.sum(), self.seen[0].clean.sum())

    def test_a_document_of_two_and_of_three(self):
        found = comparison_findings.find([evaluated(v) for v in self.seen[:2]])
        text = comparison_markdown.document(found._replace(left_out="Left out."), "c.png")
        self.assertStartsWith(text, "# A and B, image by image\n\nLeft out.\n\n300 images of cifar")
        wrong = [int((~v.clean).sum()) for v in self.seen]
        self.assertIn(f"| wrong without an attack | {wrong[0]} | {wrong[1]} |\n| apgd-ce |", text)
        self.assertIn("![Differences](c.png)\n\n## Differences", text)
        of_b = [f"{100 * of.mean():.2f}" for of in (self.seen[1].clean, self.seen[1].robust)]
        self.assertIn(f"| B | a network (train) | {' | '.join(of_b)} | e in results.jsonl |", text)
        rows = re.findall(r"^\| (clean|after [\w-]+|robust) \|", text, re.MULTILINE)
        self.assertEqual(rows, ["clean", "after apgd-ce", "robust"])
        self.assertIn("## Classes that differ most", text)
        self.assertIn("only A right | only B right | B - A, points", text)
        self.assertIn("(1979) covers the classes; clean and robust", text)
        found = comparison_findings.find([evaluated(v) for v in self.seen])
        text = comparison_markdown.document(found)
        self.assertNotIn("![", text)
        self.assertNotIn("## Classes that differ most", text)
        self.assertIn("| A, B | clean |", text)
        self.assertIn("only first right | only second right | second - first, points", text)
        self.assertIn("covers the 2 pairs of one accuracy", text)


class OrderTest(parameterized.TestCase):
    def order(self, fooled, own, method="autoattack standard"):
        seen = verdicts(fooled=[*fooled, "", "clean"])
        return comparison_findings._attacks([evaluated(seen, attacks=own, method=method)])

    def test_of_one_ball(self):
        own = attacks()
        self.assertEqual(self.order([], own), ["apgd-ce", "apgd-t"])
        fooled = ["apgd-t", "apgd-t (full)", "z", "b", REPLAY]
        expected = ["b", "z", REPLAY, "apgd-ce", "apgd-t", "apgd-t (full)"]
        self.assertEqual(self.order(fooled, own), expected)
        fixed = [attack | {"name": "pgd", "steps": 20} for attack in own[:1]]
        self.assertEqual(self.order(["pgd-20"], fixed, "pgd"), ["pgd-20"])
        self.assertEqual(self.order(["pgd"], fixed, "pgd"), ["pgd"])

    def test_of_a_union_replayed_points_come_before_their_ball(self):
        own = [attack | ball for ball in (L2, LINF) for attack in attacks()]
        l2, linf = "l2 0.5: ", "linf 0.03137: "
        fooled = [f"{linf}{REPLAY}", f"{l2}{REPLAY}", f"{linf}apgd-t"]
        names = (REPLAY, "apgd-ce", "apgd-t")
        expected = [f"{ball}{name}" for ball in (l2, linf) for name in names]
        self.assertEqual(self.order(fooled, own, "union"), expected)


class RemarksTest(parameterized.TestCase):
    def test_letters_and_lists(self):
        letters = [evaluations.letter(at) for at in (0, 1, 25, 26, 27)]
        self.assertEqual(letters, ["A", "B", "Z", "N27", "N28"])
        said = [evaluations._and(list("ABC")[:n]) for n in (1, 2, 3)]
        self.assertEqual(said, ["A", "A and B", "A, B and C"])
        self.assertEqual(evaluations.few(list("abcdef")), "a, b, c, d, e, f")
        self.assertEqual(evaluations.few(list("abcdefgh")), "a, b, c, d, e, f, and 2 more")

    def test_remarks(self):
        seen = verdicts(fooled=["", "apgd-ce"])
        images = {"images": "0" * 9}
        a = {"seed": 1, "weights_sha256": "1", "fingerprint": images}
        b = {"seed": 2, "weights_sha256": "2", "replayed": [{"fooled": 0}], "fingerprint": None}
        c = {"seed": 1, "weights_sha256": "1", "flags": {"x": "odd"}, "fingerprint": None}

        def said(*about, **more):
            return evaluations.remarks([evaluated(seen, **own, **more) for own in about])

        self.assertEqual(
            said(a, b, c),
            [
                "B tried replayed points, but these decided none of the compared images.",
                "The images of B and C are known only by their names: the record comes from an "
                "older version, which did not store their hashes.",
                "The attacks used different random seeds: A 1, B 2, C 1.",
                "A and C have the same weights.",
                "Doubt about C, x: odd.",
            ],
        )
        self.assertEmpty(said(a, a | {"weights_sha256": "2"}))
        decided = verdicts(fooled=[REPLAY, ""])  # one image is enough for another sentence
        met = a | {"weights_sha256": None, "replayed": [{"fooled": 1}]}
        self.assertEmpty(evaluations.remarks([evaluated(decided, **met)] * 2))
        self.assertEmpty(said(a, a | {"weights_sha256": None, "seed": 3}, attacks=[]))
        unknown = a | {"weights_sha256": None}
        self.assertEmpty(said(unknown, unknown))
        same = [evaluated(seen, n, **own) for n, own in ((9, unknown), (2, unknown))]
        (one,) = evaluations.remarks(same)
        self.assertEqual(
            one, "The comparison uses the 2 images common to all; the evaluations have A 9, B 2."
        )

    def test_replayed_images_are_left_out(self):
        seen = [
            verdicts(fooled=[REPLAY, "", "apgd-ce", f"l2 1: {REPLAY}", "clean"]),
            verdicts(fooled=["", "", REPLAY, "apgd-t", ""]),
        ]
        given = [evaluated(v) for v in seen]
        kept, said = evaluations.without_replayed(given)
        self.assertEqual([one.verdicts.image_ids.tolist() for one in kept], [[1, 4]] * 2)
        self.assertEqual(kept[0].verdicts.fooled_by.tolist(), ["", "clean"])
        left = "**3 of 5 images are left out because replayed points decided them (A 2, B 1): "
        self.assertStartsWith(said, left)
        ends = "lies within: A 20.00 to 60.00%, B 60.00 to 80.00%; --noreplay"
        self.assertIn(ends, said)
        others = [evaluated(verdicts(fooled=["", "clean"]))] * 2
        same, none = evaluations.without_replayed(others)
        self.assertEqual((len(same), none), (2, ""))
        with self.assertRaisesRegex(ValueError, "nothing is left to compare; evaluate again with"):
            evaluations.without_replayed([evaluated(verdicts(fooled=[REPLAY] * 3))] * 2)

    def test_a_share_of_the_image_is_a_size_at_one_size(self):
        """At 32 pixels 0.875 of 36 are cropped, at 224, which is usual, of 256."""
        for side, same in ((32, True), (224, False), (None, False)):
            with self.subTest(row=(side, same)):
                how = ("bicubic-0.875", "bicubic-36-crop-32")
                both = [
                    evaluated(
                        verdicts(fooled=["clean"]), preprocessing=each, model={"image_size": side}
                    )
                    for each in how
                ]
                self.assertEqual(evaluations.differences(*both) == "", same)


class PictureTest(parameterized.TestCase):
    """What is drawn, without files."""

    def found(self, classes: int, apart: int = 0, others: int = 1) -> ComparisonFindings:
        """Networks that differ on some classes, the later a class the more; these are apart."""
        n = 40
        labels = np.repeat(np.arange(classes), n)
        right = np.zeros((classes, n), bool)
        for at in range(classes):
            right[at, : 30 if at >= classes - apart else at % 3] = True
        none = verdicts(fooled=["apgd-ce"] * n * classes, labels=labels,
                        clean=np.ones(n * classes, bool))  # fmt: skip
        other = none._replace(fooled_by=np.where(right.ravel(), "", "apgd-ce"))
        return comparison_findings.find([evaluated(v) for v in (none, *[other] * others)])

    def drawn(self, found):
        made = {}

        def figure(about, width, height):
            import matplotlib.figure

            made["size"] = (about, width, height)
            return matplotlib.figure.Figure()

        with mock.patch.object(picture.plotting, "figure", figure):
            return picture.draw(found).axes, made["size"]

    def test_twelve_of_many_are_named(self):
        (_, right), _ = self.drawn(self.found(60, apart=15))
        self.assertEqual([t.get_text() for t in right.texts], [f" {at}" for at in range(45, 57)])

    def test_several(self):
        panels, (_, width, height) = self.drawn(self.found(2, apart=1, others=3))
        self.assertEqual((width, height), (11.5, 3.0))
        titles = [panel.get_title() for panel in panels]
        self.assertEqual(
            titles,
            ["robust accuracy; red: significant", "clean accuracy; none is significant"],
        )
        names = [label.get_text() for label in panels[0].get_yticklabels()]
        self.assertEqual(names, [f"{letter}: a network (train)" for letter in "BCD"])
        self.assertEqual(panels[0].get_xlabel(), "minus A: points, with 95% intervals")
