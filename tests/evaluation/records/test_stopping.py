"""The rules that stop an evaluation: what they say of verdicts, and what they refuse."""

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.records import sequences, stopping
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.evaluation.records.verdicts import Verdicts
from tests.support import sweeps

IDS = np.arange(10, 210, dtype=np.uint32)
LABELS = (np.arange(200) % 10).astype(np.int32)


def verdicts(robust, ids=IDS, labels=LABELS) -> Verdicts:
    robust = np.asarray(robust, bool)
    fooled_by = np.where(robust, "", "apgd-ce")
    none = np.zeros(len(robust))
    return Verdicts(ids, labels, np.ones(len(robust), bool), fooled_by, none, none.astype(int) - 1)


def looked(rule: StopRule, robust, n: int, seed: int = 0) -> dict:
    """What the rule says of the first n images of its order, with verdicts on all of IDS."""
    places = rule.places(seed, IDS)
    met = places[:n]
    robust = np.asarray(robust, bool)[met]
    return dict(rule.look(IDS[met], np.ones(len(met), bool), robust, len(places)))


class LookTest(parameterized.TestCase):
    @sweeps.rows((True, "this"), (False, "other"))
    def test_who_is_ahead(self, better, leads):
        weak, strong = np.zeros(200, bool), np.arange(200) % 4 == 0
        own, other = (strong, weak) if better else (weak, strong)
        rule = StopRule(against=verdicts(other))
        self.assertNotIn("rule", looked(rule, own, 4))
        seen = looked(rule, own, 100)
        self.assertEqual((seen["rule"], seen["leads"]), (stopping.AHEAD, leads))
        more, fewer = (seen["gained"], seen["lost"])[:: 1 if better else -1]
        self.assertGreater(more, 8)
        self.assertEqual(fewer, 0)
        low, high = seen["difference"]
        self.assertBetween(0.25 if better else -0.25, low, high)
        self.assertGreater((low if better else -high), 0)
        expected = np.exp(sequences.evidence(np.array(more), np.array(0)))
        self.assertAlmostEqual(seen["e_value"] / expected, 1)

    def test_what_was_decided_stays_so(self):
        """Anytime-valid: the e-value of an earlier image decides, though later ones lower it."""
        rule = StopRule(against=verdicts(np.zeros(200)))
        order = rule.places(0, IDS)
        own, other = np.zeros(200, bool), np.zeros(200, bool)
        own[order[:12]], other[order[12:24]] = True, True
        rule = StopRule(against=verdicts(other))
        seen = looked(rule, own, 24)
        self.assertEqual((seen["gained"], seen["lost"]), (12, 12))
        self.assertEqual((seen["rule"], seen["leads"]), (stopping.AHEAD, "this"))

    def test_ties(self):
        own = np.arange(200) % 2 == 0
        rule = StopRule(against=verdicts(own), tie=0.05)
        self.assertNotIn("rule", looked(rule, own, 20))
        seen = looked(rule, own, 180)
        self.assertEqual(seen["rule"], stopping.TIE)
        self.assertNotIn("leads", seen)
        self.assertBetween(max(np.abs(seen["difference"])), 0, 0.05)
        met = rule.places(0, IDS)[:180]
        uneven = own.copy()
        uneven[met[170:]] ^= ~own[met[170:]]  # late, when the tie was established already
        seen = looked(rule, uneven, 180)
        self.assertEqual(seen["rule"], stopping.TIE)
        self.assertLess(max(np.abs(seen["difference"])), 0.05)
        plain = StopRule(against=verdicts(own))
        self.assertNotIn("rule", looked(plain, own, 180))
        self.assertEqual(looked(plain, own, 200)["rule"], stopping.ENDED)

    def test_a_tie_of_one_point_is_a_count_of_images(self):
        rule = StopRule(against=verdicts(np.zeros(200)), tie=0.02)
        own = np.zeros(200, bool)
        own[rule.places(0, IDS)[:4]] = True  # by exactly as much as would be no tie
        for n in (199, 200):
            self.assertNotEqual(looked(rule, own, n).get("rule"), stopping.TIE)
        own[rule.places(0, IDS)[3]] = False
        self.assertEqual(looked(rule, own, 200)["rule"], stopping.TIE)

    @sweeps.rows((3.6, False), (3.7, True))
    def test_each_side_of_a_tie_has_half_of_alpha(self, evidence, tied):
        """exp(3.69) is 2 / 0.05."""
        rule = StopRule(against=verdicts(np.zeros(200)), tie=0.05)
        grown = np.array([0.0, evidence, 1.0])
        with mock.patch.object(sequences, "difference_evidence", lambda *_: (grown, grown)):
            found = looked(rule, np.zeros(200, bool), 150).get("rule")
        self.assertEqual(found, stopping.TIE if tied else None)

    def test_width(self):
        own = np.arange(200) % 2 == 0
        for width, n, rule in ((0.3, 20, None), (0.3, 120, stopping.WIDTH), (0.1, 120, None)):
            seen = looked(StopRule(width=width), own, n)
            self.assertEqual(seen.get("rule"), rule)
            low, high = seen["robust"]
            self.assertEqual(high - low < width, rule is not None)
            self.assertBetween(0.5, low, high)
            self.assertEqual(seen["clean"][1], 1.0)
        self.assertEqual(looked(StopRule(width=0.006), own, 200)["robust"], [0.5, 0.5])

    def test_only_images_that_both_have(self):
        part = verdicts(np.ones(50), IDS[30:80], LABELS[30:80])
        rule = StopRule(against=part)
        places = rule.places(0, IDS)
        self.assertEqual(sorted(places), list(range(30, 80)))
        whole = [p for p in StopRule(width=0.1).places(0, IDS).tolist() if 30 <= p < 80]
        self.assertEqual(places.tolist(), whole)
        self.assertEqual(looked(rule, np.ones(200), 50)["rule"], stopping.ENDED)


class RefusedTest(parameterized.TestCase):
    @sweeps.rows(
        ({"width": 0.02, "alpha": 0.0}, r"alpha=0 must be .* between 0 and 1"),
        ({"width": 0.02, "alpha": 1.0}, r"alpha=1 must be "),
        ({}, "give one of them"),
        ({"width": 0.02, "against": verdicts(np.ones(200))}, "give one of them"),
        ({"width": 0.02, "tie": 0.01}, r"tie=0\.01 needs verdicts"),
        ({"against": verdicts(np.ones(200)), "tie": 1.5}, r"tie=1\.5 is not a share"),
        ({"width": 0.005}, r"0\.5 points is too narrow for 200 images, each worth 0\.5 points"),
        ({"width": 1.2}, "the width must be between 0 and 100 points, not 120"),
        ({"against": verdicts(np.ones(3), IDS[:3] + 500, LABELS[:3])}, "none of these images"),
        ({"against": verdicts(np.ones(200), labels=LABELS + 1)}, "different labels on 200 of 200"),
    )
    def test_rules_that_cannot_be_meant(self, given, message):
        with self.assertRaisesRegex(ValueError, message):
            StopRule(**given).check(IDS, LABELS)

    def test_no_images(self):
        with self.assertRaisesRegex(ValueError, "there are no images to evaluate"):
            StopRule(width=0.1).check(IDS[:0], LABELS[:0])

    def test_those_that_can(self):
        StopRule(width=0.0051).check(IDS, LABELS)
        StopRule(against=verdicts(np.ones(200)), tie=0.01, alpha=0.2).check(IDS, LABELS)


class LineTest(absltest.TestCase):
    def test_each_rule_has_its_words(self):
        own, other = np.arange(200) % 2 == 0, np.arange(200) % 2 == 1
        behind = looked(StopRule(against=verdicts(own | other)), own, 60)
        texts = {
            "the interval is narrower than 30 points": looked(StopRule(width=0.3), own, 120),
            "the other network is ahead": behind,
            "they differ by less than 5 points": looked(
                StopRule(against=verdicts(own), tie=0.05), own, 180
            ),
            "without a decision": looked(StopRule(against=verdicts(own)), own, 200),
            "not decided yet": looked(StopRule(against=verdicts(own)), own, 50),
        }
        for words, seen in texts.items():
            self.assertIn(words, stopping.line(seen))
        text = stopping.line(behind | {"against": {"evaluation": "abc"}})
        self.assertRegex(text, r"^stopped after 60 of 200 images: .*95% confidence sequence\)")
        self.assertRegex(text, r"the difference from evaluation abc is -.*, 0 gained, \d+ lost")
