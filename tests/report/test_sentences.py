"""What a number is of and what puts it in doubt, in the units that the page is read in."""

from pathlib import Path

from absl.testing import parameterized

from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import sentences

WHOLE = [{"name": n, "norm": "linf", "epsilon": 8 / 255} for n in ("apgd-ce", "apgd-t", "fab-t")]
WHOLE += [WHOLE[0] | {"name": "square"}]


def evaluation(**record):
    row = {"clean": 0.8, "robust": 0.5, "attacks": [{"name": "pgd", "steps": 20}], **record}
    made = AccuracyRecord.from_json(row)
    return ReportedEvaluation("net", Path("results.jsonl"), made, None, [], None, {})


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
            ({"split": "train[:10%]"}, "The images are of the training split"),
            ({"split": "train@x"}, "The images are of the training split"),
            ({"split": "pretrain"}, None),
            ({"commit": "0123+changes"}, "The code differed from its commit"),
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
        self.assertIn("Only 100 images were evaluated, so the 95 % interval is 23.6 points", found)
        self.assertIn("The attack was pgd, steps 20, not the standard version", found)


class HeadlineTest(parameterized.TestCase):
    def test_a_sentence(self):
        for record, expected in (
            ({}, "and 50.0 % (46.9 to 53.1 %) also when autoattack standard may change them withi"),
            ({"method": "union"}, "also when the attacks may change them within L∞ 8/255."),
            ({"robust": None}, "classifies 80.0 % of 1,000 images of digits (split test) correctl"),
            ({"robust": None}, "(95 % interval 77.4 to 82.4 %); it was not attacked."),
            ({"attacks": [*WHOLE, {"norm": "l2", "epsilon": 0.5}]}, "all of L∞ 8/255, L2 0.5."),
            ({"model": {"name": "vit_s"}, "weights": "ema"}, "net: vit_s (ema) classifies"),
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
