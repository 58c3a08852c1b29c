"""The rules of records: what is written, what is absent, what is damaged, how numbers are told."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.network import checks, collapse, reliability
from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.verdicts import Verdicts
from tests.support import sweeps

ATTACK = {"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255, "steps": 20}


class JsonTest(parameterized.TestCase):
    def test_what_is_not_known(self):
        training, own = AccuracyRecord().to_json(), AccuracyRecord(evaluation="7").to_json()
        self.assertContainsSubset(("clean", "flags", "attacks", "interval"), training)
        self.assertEqual((training["clean"], training["flags"]), (None, {}))
        self.assertNoCommonElements(("evaluation", "method", "fingerprint", "draws"), training)
        self.assertContainsSubset(("method", "fingerprint", "accuracy_after"), own)
        self.assertNoCommonElements(("draws", "ladder", "clean_top5"), own)
        self.assertEqual(AccuracyRecord(clean_top5=0.0).to_json()["clean_top5"], 0.0)

    def test_null_is_the_empty_list(self):
        read = AccuracyRecord.from_json({"attacks": None, "flags": None})
        self.assertEqual((read.attacks, read.flags), ([], {}))

    def test_what_is_a_record(self):
        line = AccuracyRecord(schema=2, clean=1, robust=0.5).to_json()
        check(AccuracyRecord.from_json(line), "there")  # whole numbers are numbers
        line.pop("size")
        with self.assertRaisesRegex(ValueError, "whose size is None"):
            check(AccuracyRecord.from_json(line), "there")
        line.pop("schema")  # then it is one of before, in which keys may lack
        check(AccuracyRecord.from_json(line), "there")
        own = AccuracyRecord(schema=2, evaluation="7").to_json()
        own.pop("method")
        check(AccuracyRecord.from_json(own), "there")


class NumbersTest(parameterized.TestCase):
    def test_intervals(self):
        share = 29 / 50  # of which the product is 28.999...
        self.assertEqual(records.interval(share, 50), list(checks.binomial_interval(29, 50)))
        self.assertIsNone(records.interval(None, 50))
        self.assertIsNone(records.intervals(0.5, 0.5, 0))
        both = records.intervals(0.5, None, 10)
        self.assertEqual(
            (both["clean"], both["robust"]), (list(checks.binomial_interval(5, 10)), None)
        )

    def test_what_tells_evaluations_apart(self):
        known = {"program": "p", "probe": {"logits": []}, "versions": {"jax": "1"}}
        result = {"seed": 0, "fingerprint": known, "search_sample": 1, "clipped": 2}
        result["draws"] = {"rule": "mean", "draws": 3, "one_draw": {"robust": 0.5}}
        own = records.identity(result)
        expected = {
            "seed": 0,
            "fingerprint": {"program": "p"},
            "draws": {"rule": "mean", "draws": 3},
        }
        self.assertEqual(own, expected)
        self.assertLen(records.number_of(own), 12)
        self.assertNotEqual(records.number_of(own), records.number_of(own | {"seed": 1}))

    @sweeps.rows(
        ([], ""),
        ([5], "5"),
        ([0, 1, 2], "0..2"),
        ([0, 1, 7, 200, 201], "0..1, 7, 200..201"),
        ([3, 2, 1], "3, 2, 1"),
        ([1, 2, 4, 5], "1..2, 4..5"),
        ([1, 1], "1, 1"),
    )
    def test_ranges(self, ids, words):
        self.assertEqual(records.ranges(ids), words)

    def test_lines_of_attacks(self):
        def line(**known):
            return records.attack_line(AccuracyRecord(**({"attacks": [ATTACK]} | known)))

        self.assertEqual(line(attacks=[]), "none")
        self.assertEqual(line(), "APGD-CE 20 steps, linf 0.03137")
        self.assertEqual(line(method="apgd-ce"), "apgd-ce, linf 0.03137")
        after = {"linf 1": 0.5, "l2 2": 0.4}
        self.assertEqual(line(method="union", accuracy_after=after), "union of linf 1, l2 2")
        worst = line(method="union", accuracy_after=after, worst_case=[{}])
        self.assertEqual(worst, "worst case of linf 1, l2 2")
        self.assertEndsWith(
            line(replayed=[{"fooled": 2}]), " (2 images decided by replayed points)"
        )

    def test_notes(self):
        pixels = {"pixels": 3, "images": 2, "largest": 5e-7}
        draws = {"rule": "mean", "draws": 4}
        first, second = records.notes_of(AccuracyRecord(clipped=pixels, draws=draws))
        self.assertStartsWith(first, "3 pixels of 2 images lay up to 5e-07 outside [0, 1]")
        self.assertEqual(second, records.draws_line(draws))
        self.assertEqual(records.notes_of(AccuracyRecord()), [])

    def test_draws_in_words(self):
        ends = {"clean": None, "robust": [0.25, 0.5]}
        own = {"clean": 0.8, "robust": 0.4, "interval": ends}
        line = records.draws_line({"rule": "mean", "draws": 4, "one_draw": own})
        self.assertEndsWith(line, "clean 80.0%, robust 40.0%, 95% interval 25.0% to 50.0%")
        line = records.draws_line({"rule": "mean", "draws": 4, "one_draw": own | {"at_most": True}})
        self.assertIn("robust at most 40.0%, 95%", line)
        line = records.draws_line(
            {"rule": "mean", "draws": 4, "one_draw": own | {"interval": None}}
        )
        self.assertEndsWith(line, "robust 40.0%")
        self.assertIn(
            "the result for one draw is unknown", records.draws_line({"rule": "mean", "draws": 4})
        )
        line = records.draws_line({"rule": "one-draw", "draws": 1, "one_draw": own})
        self.assertNotIn("robust 40.0%", line)

    def test_rules_of_steps(self):
        costs = records.with_step_rules([{"attack": "replay"}, {"attack": "apgd-ce", "fooled": 1}])
        self.assertEqual(costs[0]["step_rule"], "none: what fooled elsewhere, projected")
        self.assertEqual(costs[1]["fooled"], 1)
        self.assertNotEqual(costs[1]["step_rule"], costs[0]["step_rule"])

    def test_a_record_is_saved_with_its_verdicts_by_the_first_process(self):
        own = verdicts_of(["", "clean"])
        folder = Path(self.create_tempdir())
        make = lambda: AccuracyRecord(evaluation="7", schema=2).stamped()  # noqa: E731
        with mock.patch.object(records.jax, "process_index", return_value=1):
            records.save(folder / "x.jsonl", own, make)
        self.assertEmpty([*folder.iterdir()])
        line = records.save(folder / "new" / "x.jsonl", own, make)
        self.assertEqual(json.loads((folder / "new" / "x.jsonl").read_text()), line)


def verdicts_of(fooled_by, ids=None) -> Verdicts:
    names = np.array(fooled_by)
    n = len(names)
    ids = np.arange(n, dtype=np.uint32) if ids is None else np.array(ids, np.uint32)
    columns = (ids, ids.astype(np.int32) % 3, names != "clean", names)
    return Verdicts(*columns, np.arange(n) / 4, np.arange(n, dtype=np.int32))


class VerdictsTest(parameterized.TestCase):
    def test_images_that_all_have_in_the_order_of_their_places(self):
        one = verdicts_of(["a", "b", "c", "d"], ids=[9, 2, 5, 7])
        other = verdicts_of(["e", "f", "g"], ids=[5, 9, 1])
        first, second = verdicts.aligned([one, other])
        self.assertEqual(first.image_ids.tolist(), [5, 9])
        self.assertEqual(
            (first.fooled_by.tolist(), second.fooled_by.tolist()), (["c", "a"], ["e", "f"])
        )
        self.assertEqual(first.norms.tolist(), [0.5, 0.0])
        (alone,) = verdicts.aligned([one])
        self.assertEqual(alone.fooled_by.tolist(), ["b", "c", "d", "a"])


class ReliabilityRulesTest(parameterized.TestCase):
    @sweeps.rows((0.62, 64, False), (0.64, 64, True), (0.62, 10_000, True))
    def test_above_chance(self, share, n, above):
        right = np.arange(n) < round(share * n)
        # Three deviations of 64 coins are 0.1875.
        expected = above if n > 64 else share > 0.5 + 0.1875
        self.assertEqual(reliability._above_chance(right, 2), expected)

    def test_probabilities(self):
        rows = np.array([[0.25, 0.75], [1.0, 0.0]])
        self.assertIn("sum to 1", reliability._softmax(rows)["softmax"])
        self.assertEqual(reliability._softmax(np.add(rows, [[0.1, 0.0], [0.0, 0.0]])), {})
        self.assertEqual(reliability._softmax(np.add(rows, [[1.0, -1.0]])), {})  # not in [0, 1]
        self.assertEqual(reliability._softmax(rows[:0]), {})
        mixed = np.vstack([rows, [[np.nan, 1.0]]])
        self.assertIn("softmax", reliability._softmax(mixed))

    def test_passes_that_differ(self):
        one = np.eye(10)[np.arange(10)] * 3
        labels = np.arange(10)
        self.assertEqual(reliability._randomized([one, one], labels), {})
        near = one + 1e-5
        self.assertEqual(reliability._randomized([one, near], labels), {})
        tie = one.copy()
        tie[0, 1] = 3.0001  # another class by next to nothing
        self.assertIn(
            "9 to 10 images", reliability._randomized([one, one, tie], labels)["randomized"]
        )
        far = one + 0.01
        self.assertIn("randomized", reliability._randomized([one, far], labels))


class CollapseRulesTest(parameterized.TestCase):
    def of(self, answers, labels):
        return collapse.of(np.array(answers), np.array(labels))

    def test_class_zero_is_a_class(self):
        labels = np.arange(60) % 3
        self.assertTrue(self.of([0] * 60, labels).proven)
        self.assertTrue(self.of([2] * 60, labels).proven)
        self.assertIsNone(self.of([-1] * 60, labels))

    @sweeps.rows((4, None), (5, False), (28, False), (29, True))
    def test_how_many_others_show_it(self, others, proven):
        labels = [0] * 10 + [1] * others
        found = self.of([0] * len(labels), labels)
        self.assertEqual(found and found.proven, proven)
