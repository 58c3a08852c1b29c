"""What the page shows of a certified network: its sentence, its command, its curves."""

import json
import re
import shlex
from pathlib import Path

from absl.testing import absltest

from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import commands, evaluation, radii, sentences

CERTIFIED = {
    "sigma": 0.25,
    "draws": 1000,
    "selection": 100,
    "alpha": 0.01,
    "accuracy": {"0": 0.75, "0.125": 0.5, "0.25": 0.25, "0.375": 0.0},
    "abstained": 0.25,
    "average_radius": 0.15,
    "images": "smoothing-1.jsonl",
}
NOISE = {"method": "smoothing 0.25", "certified": CERTIFIED}


def attacked(epsilon, robust, norm="l2", **more):
    settings = {"name": "apgd-ce", "norm": norm, "epsilon": epsilon}
    return one(attacks=[settings], method="apgd-ce, ladder", clean=1.0, robust=robust, **more)


def one(**record) -> ReportedEvaluation:
    known = {"dataset": "digits", "split": "test", "image_ids": "0..3"}
    made = AccuracyRecord(**(known | record))
    return ReportedEvaluation("net", Path("r.jsonl"), made, None, [], None, {})


class CertifiedTest(absltest.TestCase):
    def test_sentence(self):
        said = sentences.headline(one(**NOISE))
        self.assertIn("smoothed by noise of 0.25, is certified to classify 75.0% of", said)
        self.assertIn("and 25.0% under any change of at most 0.25 in l2.", said)

    def test_command(self):
        said = shlex.split(commands.evaluate(one(**NOISE), "runs/1"))
        start = said.index("--certify")
        wanted = ["--certify", "0.25", "--draws", "1000", "--alpha", "0.01"]
        self.assertEqual(said[start : start + 6], wanted)
        self.assertNotIn("--attack", said)

    def test_what_is_left_at_radius_0(self):
        (accuracy,) = evaluation.accuracies(one(**NOISE))
        self.assertEqual(accuracy, ("certified at radius 0", 0.75))

    def test_curves_stand_beside_the_ladder_of_the_same_images_in_l2(self):
        rungs = [attacked(0.1, 0.5), attacked(0.2, 0.25)]
        other = [attacked(e, 0.5, dataset="others") for e in (0.1, 0.2)]
        linf = [attacked(e, 0.5, norm="linf") for e in (0.1, 0.2)]
        drawn = radii.certified([one(**NOISE), *rungs], [rungs, other, linf], "c")
        self.assertEqual(drawn.count("<figure"), 1)
        self.assertIn("certified, noise 0.25", drawn)
        self.assertIn("apgd-ce, ladder, no noise", drawn)
        alone = radii.certified([one(**NOISE)], [other, linf], "c")
        self.assertNotIn("no noise", alone)
        self.assertIn("not for the smoothed one", drawn)
        data = json.loads(re.search(r'id="data-c-0">(.*?)</script>', drawn)[1])
        line = data["series"][1]
        self.assertEqual((line["x"], line["y"]), ([0, 0.1, 0.2], [1, 0.5, 0.25]))
        self.assertGreater(line["high"][1], 0.5)

    def test_each_noise_is_a_curve_and_each_set_of_images_a_figure(self):
        more = NOISE | {"certified": CERTIFIED | {"sigma": 0.5}}
        drawn = radii.certified([one(**more), one(**NOISE), one(dataset="d", **NOISE)], [], "c")
        self.assertEqual(drawn.count("<figure"), 2)
        self.assertLess(drawn.index("noise 0.25"), drawn.index("noise 0.5"))
        self.assertNotIn("no noise", drawn)
        self.assertIsNone(radii.certified([attacked(0.1, 0.5)], [], "c"))
