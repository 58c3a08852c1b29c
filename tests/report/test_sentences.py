"""What puts a number in doubt, in the units that the page is read in."""

from pathlib import Path

from absl.testing import absltest

from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import sentences


def evaluation(**record):
    row = {"clean": 0.8, "robust": 0.5, "attacks": [{"name": "pgd", "steps": 20}], **record}
    made = AccuracyRecord.from_json(row)
    return ReportedEvaluation("net", Path("results.jsonl"), made, None, [], None, {})


class DoubtsTest(absltest.TestCase):
    def test_an_interval_is_as_wide_as_its_ends_are_apart_in_points(self):
        ends = {"clean": (0.7, 0.9), "robust": (0.382, 0.618)}
        one = evaluation(image_ids="0..99", interval=ends)
        self.assertEqual(one.images, 100)
        found = " ".join(sentences.doubts(one, []))
        self.assertIn("Only 100 images were evaluated, so the 95 % interval is 23.6 points", found)
        self.assertIn("The attack was pgd, steps 20, not the standard version", found)


if __name__ == "__main__":
    absltest.main()
