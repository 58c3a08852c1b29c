"""What a number is of and what puts it in doubt, in the units that the page is read in."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.curves import Curve, Metrics
from jaxrobust.report.gathered import Gathered, ReportedEvaluation, ReportedRun
from jaxrobust.report.parts import sentences

ATTACK = {"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255, "steps": 20}
WHOLE = [{"name": n, "norm": "linf", "epsilon": 8 / 255} for n in ("apgd-ce", "apgd-t", "fab-t")]
WHOLE += [WHOLE[0] | {"name": "square"}]


def one(*, name="net", run=None, **record):
    values = {"dataset": "digits", "split": "test", "attacks": [ATTACK], "method": "apgd-ce"}
    made = AccuracyRecord(**(values | record))
    return ReportedEvaluation(name, Path("r.jsonl"), made, None, [], run, {})


def evaluation(**record):
    row = {"clean": 0.8, "robust": 0.5, "attacks": [{"name": "pgd", "steps": 20}], **record}
    row = AccuracyRecord.from_json(row)
    return ReportedEvaluation("net", Path("results.jsonl"), row, None, [], None, {})


def standard(**record):
    """An evaluation without a doubt."""
    own = {"method": "autoattack standard", "attacks": WHOLE, "image_ids": "0..999"}
    own |= {"split": "test", "commit": "0123", "search_dtype": "float32", "dataset": "digits"}
    return evaluation(**(own | record))


class DoubtsTest(parameterized.TestCase):
    def test_each_doubt_alone(self):
        for record, expected in (
            ({}, None),
            ({"method": "union"}, None),  # of all four attacks
            ({"method": "union", "attacks": WHOLE[:3]}, "The attack was union, not the standard"),
            ({"method": "apgd-ce"}, "The attack was apgd-ce, not the standard version"),
            ({"robust": None, "method": None, "attacks": []}, None),
            ({"image_ids": "0..998"}, "Only 999 images were evaluated"),
            ({"split": "train[:10%]"}, "The images come from the training split"),
            ({"split": "train@x"}, "The images come from the training split"),
            ({"split": "pretrain"}, None),
            ({"commit": "0123+changes"}, "The code had uncommitted changes"),
            ({"search_dtype": "bfloat16"}, "The attacks searched in bfloat16"),
            ({"flags": {"nan": "it is none"}}, "Flag nan: it is none"),
        ):
            with self.subTest(row=(record, expected)):
                found = sentences.doubts(standard(**record), [])
                self.assertLen(found, expected is not None, found)
                self.assertStartsWith("".join(found), expected or "")

    def test_an_interval_is_as_wide_as_its_ends_are_apart_in_points(self):
        ends = {"clean": (0.7, 0.9), "robust": (0.382, 0.618)}
        one = evaluation(image_ids="0..99", interval=ends)
        self.assertEqual(one.images, 100)
        found = " ".join(sentences.doubts(one, []))
        self.assertIn("Only 100 images were evaluated, so the 95% interval is 23.6 points", found)
        self.assertIn("The attack was pgd, steps 20, not the standard version", found)
        whole = evaluation(method="autoattack task", task="maps(x=1)")
        self.assertNotIn("The attack was", " ".join(sentences.doubts(whole, [])))


class HeadlineTest(parameterized.TestCase):
    def test_a_sentence(self):
        for record, expected in (
            ({}, "and 50.0% (46.9 to 53.1%) under attack by autoattack standard within L∞ 8/255"),
            ({"method": "union"}, "under attack within L∞ 8/255."),
            ({"robust": None}, "classifies 80.0% of 1,000 images of digits (split test) correctl"),
            ({"robust": None}, "(95% interval 77.4 to 82.4%); it was not attacked."),
            ({"attacks": [*WHOLE, {"norm": "l2", "epsilon": 0.5}]}, "all of L∞ 8/255, L2 0.5."),
            ({"model": {"name": "vit_s"}, "weights": "ema"}, "net: vit_s (ema) classifies"),
            ({"task": "maps(x=1)"}, "is correct on 80.0% of 1,000 images of digits (split test)"),
            ({"task": "maps(x=1)"}, "in the task maps(x=1) (95% interval"),
            ({"image_ids": "3..3"}, "of 1 images of"),
            ({"image_ids": "unknown"}, "of the images of"),
        ):
            with self.subTest(row=(record, expected)):
                self.assertIn(expected, sentences.headline(standard(**record)))

    def test_a_method(self):
        for record, expected in (
            ({"attacks": []}, "no attack"),
            ({}, "pgd, steps 20"),
            ({"method": "mim-20"}, "mim-20"),
            ({"method": "union", "worst_case": [{"robust": 0.5}]}, "worst case"),
        ):
            with self.subTest(row=(record, expected)):
                self.assertEqual(sentences.method(evaluation(**record).record), expected)


class SentencesTest(parameterized.TestCase):
    def test_an_interval_of_the_record_or_of_its_images(self):
        of = one(
            clean=0.9, robust=0.5, image_ids="0..9", interval={"clean": [0.1, 0.2], "robust": None}
        )
        self.assertEqual(sentences.interval(of, "clean"), [0.1, 0.2])
        self.assertEqual(tuple(sentences.interval(of, "robust")), checks.binomial_interval(5, 10))
        self.assertIsNone(sentences.interval(one(clean=0.9), "clean"))

    def test_a_run_that_is_at_work(self):
        run = SimpleNamespace(at_work="somebody", folder=Path("r"))
        for place, said in ((Path("r"), True), (Path("other"), False), (None, False)):
            found = " ".join(sentences.doubts(one(run=place), [run]))
            self.assertEqual("still training" in found, said)
        run.at_work = None
        self.assertNotIn("still training", " ".join(sentences.doubts(one(run=Path("r")), [run])))

    def test_the_strongest_evaluation_of_a_run(self):
        for worse, better in (
            # What is better stands second; all else is equal.
            ({"image_ids": "0..98"}, {"image_ids": "0..99"}),
            ({"robust": None, "image_ids": "0..999"}, {"robust": 0.1, "image_ids": "0..99"}),
            ({"method": "apgd-ce", "image_ids": "0..999"}, {"method": "autoattack standard"}),
            ({"method": "union"}, {"method": "apgd-ce"}),
            ({"attacks": [ATTACK | {"epsilon": 0.5}], "image_ids": "0..999"}, {}),
            ({}, {"image_ids": "0..100"}),
            ({}, {"attacks": [ATTACK, ATTACK | {"epsilon": 0.5}]}),
            ({"time": "2025"}, {"time": "2026"}),
        ):
            with self.subTest(row=(worse, better)):
                usual = {"robust": 0.5, "image_ids": "0..99", "run": Path("r")}
                run = SimpleNamespace(folder=Path("r"), config={"attack": {"epsilon": 8 / 255}})
                pair = [one(**(usual | changes)) for changes in (worse, better)]
                for own in (pair, pair[::-1]):
                    self.assertEqual(sentences.chosen(Gathered([run], own, [])), [pair[1]])

    def test_equal_ones_are_the_first_and_the_most_robust_network_is_first(self):
        own = [
            one(robust=0.2, clean=0.9, weights_sha256="a", name="x"),
            one(robust=0.2, weights_sha256="a"),
        ]
        own += [one(robust=0.3, clean=0.5, weights_sha256="b"), one(weights_sha256="c")]
        found = sentences.chosen(Gathered([], own, []))
        self.assertEqual([each.record.robust for each in found], [0.3, 0.2, None])
        self.assertEqual(found[1].name, "x")

    def test_what_two_questions_share(self):
        keys = ("dataset", "split", "ids_sha256", "classes_sha256", "preprocessing", "search_dtype")
        others = [{key: "other"} for key in keys] + [{"attacks": []}, {"model": {"image_size": 9}}]
        for changes in others:
            with self.subTest(changes=changes):
                self.assertNotEqual(sentences.question(one(**changes)), sentences.question(one()))
        self.assertEqual(sentences.question(one(weights_sha256="w")), sentences.question(one()))

    def test_how_far_a_run_is(self):
        curve = lambda *values: Curve(np.arange(len(values)) * 10.0, np.array(values, float))  # noqa: E731
        own = {"loss": curve(3, 2, 1), "selection_clean": curve(0.1, 0.9)}
        own["selection_robust"] = curve(0.2, 0.5)
        phases = {"pretrain": {"loss": curve(*range(9))}, "train": own}
        metrics = Metrics(phases, [], [])
        run = ReportedRun(
            "a", Path("a"), {"phases": ["pretrain", "train"]}, metrics, {"train": 4000}, [], None
        )
        self.assertEqual(
            sentences.state(run),
            "a: phase train is at step 20 of 4,000; on the selection split, 90% of the images are "
            "classified correctly, and 50% under the selection attack. No process is running.",
        )
        self.assertEndsWith(sentences.state(run._replace(at_work="me")), "Running: me.")
