"""A union of threats on a randomized network: its number by the rule, and that of one draw."""

from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.questions import several
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat
from tests.support import result_lines
from tests.support.evaluations import call
from tests.support.outcomes import ended

BALLS = [Threat("linf", 0.1), Threat("l2", 0.5)]
NET = (
    "import jax\n"
    "import numpy as np\n"
    "weights = np.random.default_rng(0).normal(size=(64, 10)).astype('f')\n"
    "def logits_fn(x, keys):\n"
    "    noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(keys)\n"
    "    return x.reshape(len(x), -1) @ weights + 2 * noise\n"
)


def found(robust, once, ids=range(6), clean=(1, 1, 1, 1, 1, 0), **one):
    """What a ball's evaluation says of images that are all right but the last."""
    right = np.array(clean, bool)[list(ids)]
    robust, once = np.array(robust, bool), np.array(once, bool)
    fooled_by = np.where(right, np.where(robust, "", "apgd-ce"), "clean")
    n, none = len(right), np.zeros(len(right))
    given = (np.array(ids, np.uint32), none.astype(np.int32), right, fooled_by, none)
    draws = {"clean": 5 / 6, "robust": once.mean(), "bits": randomised.packed(once)} | one
    judged = {"rule": "majority", "draws": 20, "one_draw": draws}
    verdicts = Verdicts(*given, np.full(n, -1, np.int32))
    return Measured(AccuracyRecord(draws=judged, costs=[]), verdicts)


class OneDrawTest(parameterized.TestCase):
    def test_is_of_all_balls_image_by_image(self):
        first = found([1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0])
        other = found([1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 1, 0])
        whole = several.united([first, other], BALLS, [*map(str, BALLS)]).record
        self.assertEqual(whole.robust, 3 / 6)
        one = whole.draws["one_draw"]
        self.assertEqual((one["clean"], one["robust"], one["at_most"]), (5 / 6, 2 / 6, False))
        self.assertEqual(one["interval"]["robust"], records.interval(2 / 6, 6))
        np.testing.assert_array_equal(
            randomised.unpacked(one["bits"], 6), np.array([1, 0, 0, 1, 0, 0], bool)
        )
        line = records.draws_line(whole.draws)
        self.assertIn("by one draw, as in auto-attack: clean 83.3%, robust 33.3%", line)

    def test_what_was_not_attacked_makes_it_a_bound(self):
        first = found([1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0])
        other = found([1, 1, 0, 1], [1, 0, 0, 1], ids=range(4))
        one = several.united([first, other], BALLS, ["a", "b"]).record.draws["one_draw"]
        self.assertEqual((one["robust"], one["at_most"]), (3 / 6, True))
        told = {"rule": "majority", "draws": 20, "one_draw": one}
        self.assertIn("robust at most 50.0%", records.draws_line(told))

    def test_what_one_draw_fools_already_need_not_be_attacked(self):
        first = found([1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0])
        other = found([1, 1, 0, 1], [1, 0, 0, 1], ids=range(4))
        one = several.united([first, other], BALLS, ["a", "b"]).record.draws["one_draw"]
        self.assertEqual((one["robust"], one["at_most"]), (2 / 6, False))

    def test_parts_of_before_do_not_know_it(self):
        first, other = (found([1] * 5 + [0], [1] * 5 + [0]) for _ in range(2))
        del first.record.draws["one_draw"]["bits"]
        draws = several.united([first, other], BALLS, ["a", "b"]).record.draws
        self.assertIsNone(draws["one_draw"])
        self.assertIn("the result for one draw is unknown", records.draws_line(draws))


class JoinedTest(absltest.TestCase):
    def test_the_first_ball_that_fools_an_image_names_it(self):
        first = found([1, 0, 1, 0, 1, 0], [1] * 6)
        other = found([0, 0, 1, 1, 1, 0], [1] * 6)
        joined = several.joined([first, other], BALLS)
        l2, linf = (f"{ball}: apgd-ce" for ball in reversed(BALLS))
        self.assertEqual(joined.fooled_by.tolist(), [l2, linf, "", linf, "", "clean"])


class UnitedTest(absltest.TestCase):
    def test_a_record_has_what_all_balls_have(self):
        first, other = found([1, 1, 1, 0, 0, 0], [1] * 6), found([1, 0, 1, 1, 1, 0], [1] * 6)
        first, other = (
            one.noting(
                attacks=[{"name": name}],
                costs=[{"attack": name, "forward": n}],
                flags={"nan": name},
                replayed=[{"ledger": name}] * n,
                draws=None,
            )
            for one, name, n in ((first, "a", 0), (other, "b", 1))
        )
        whole = several.united([first, other], BALLS, ["in a", "in b"]).record
        self.assertEqual(whole.accuracy_after, {"in a": 3 / 6, "in b": 2 / 6})
        self.assertEqual((whole.clean, whole.robust, whole.draws), (5 / 6, 2 / 6, None))
        self.assertEqual([own["name"] for own in whole.attacks], ["a", "b"])
        self.assertEqual([own["attack"] for own in whole.costs], ["a", "b"])
        self.assertEqual(
            whole.flags, {f"{ball}: nan": n for ball, n in zip(BALLS, "ab", strict=True)}
        )
        self.assertEqual(whole.replayed, [{"ledger": "b"}])

    def test_parts_of_a_worst_case(self):
        measured = [found([1, 1, 1, 0, 0, 0], [1] * 6), found([1, 0, 1], [1] * 3, ids=range(3))]
        measured = [one.noting(robust=float(one.verdicts.robust.mean())) for one in measured]
        how = (measured, BALLS, ["pgd-20", "autoattack"], ["1", "2"])
        whole = several.parts_of(*how, skips=False)
        self.assertEqual([row["robust"] for row in whole], [3 / 6, 2 / 3])
        self.assertEqual([row["images"] for row in whole], [6, 3])
        self.assertEqual([row["method"] for row in whole], ["pgd-20", "autoattack"])
        self.assertEqual(
            [(row["norm"], row["epsilon"]) for row in whole], [("linf", 0.1), ("l2", 0.5)]
        )
        self.assertEqual(whole[0]["interval"], records.interval(3 / 6, 6))
        # Of what attacks only those that survive, nothing is known of all images.
        skipping = several.parts_of(*how, skips=True)
        self.assertEqual([row["robust"] for row in skipping], [3 / 6, None])
        self.assertEqual([row["evaluation"] for row in skipping], ["1", "2"])


@pytest.mark.slow
class CommandTest(absltest.TestCase):
    def test_the_number_of_one_draw_is_that_of_the_rule_one_draw(self):
        folder = Path(self.create_tempdir())
        (folder / "nets.py").write_text(NET)
        x = np.random.default_rng(1).random((12, 8, 8, 1)).astype("f")
        label = (x.reshape(12, -1) @ np.random.default_rng(0).normal(size=(64, 10))).argmax(1)
        np.savez(folder / "data.npz", image=(255 * x).astype(np.uint8), label=label)
        given = {"function": f"{folder}/nets.py:logits_fn", "dataset": f"npz:{folder}/data.npz"}
        given |= {"split": "all", "out": f"{folder}/out", "version": "rand", "steps": 3}
        given |= {"attack": "apgd-ce", "threat": ["linf:0.01", "l2:0.05"]}
        unions_of = {}
        for rule, draws in (("majority", 5), ("one-draw", None)):
            ended(call(**given, rule=rule, draws=draws))
            unions_of[rule] = result_lines.read(folder / "out")[-1]
            self.assertEqual(unions_of[rule]["method"], "union")
        one = unions_of["majority"]["draws"]["one_draw"]
        self.assertEqual(one["robust"], unions_of["one-draw"]["robust"])
        self.assertEqual(one["clean"], unions_of["one-draw"]["clean"])
        self.assertFalse(one["at_most"])
