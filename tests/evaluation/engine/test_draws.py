"""Adversarial images of a network that draws: judged by one draw, by the rule, or by both."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.engine import cascade, outcome
from jaxrobust.evaluation.engine.outcome import AttackContext, Outcome, Sample
from jaxrobust.evaluation.engine.schedule import ImageVerdict
from jaxrobust.evaluation.network import randomised
from jaxrobust.types import Threat

N, NAN = 4, float("nan")


class Book:
    def __init__(self):
        self.records = {}

    def add(self, place, record, adversarial):
        self.records[place] = record, adversarial

    def rows(self, name):
        """Of a part of an attack, of which nothing is known."""
        return np.zeros(N, [("flat", bool), ("doubtful", bool)])


class UndecidedTest(parameterized.TestCase):
    """A point is the number of one draw's verdict: above 0 wrong; the rule wants above 1."""

    def setUp(self):
        super().setUp()
        # The engine settles points; here that is to add nothing, but shapes are as there.
        settled = lambda runner, norm, points, images: points  # noqa: E731
        self.enter_context(mock.patch.object(cascade.engine, "settled", settled))
        self.enter_context(mock.patch.object(outcome, "answers_of", self.answers))
        within = lambda points, images, labels, sample: (  # noqa: E731
            np.isfinite(points).ravel() & (points.ravel() < 9),
            points.ravel().astype(np.float64) / 10,
        )
        self.enter_context(mock.patch.object(outcome, "within", within))
        self.asked = []

    def answers(self, runner, how, points, labels, ids, *, seed, draw):
        self.asked.append((how.rule, seed, draw))
        least = 0 if how.rule == randomised.ONE else 1
        right = ~(points.ravel() > least)
        reached = np.full(len(points), 5 + (how.rule == "mean"))
        return SimpleNamespace(right=right, reached=reached)

    def attack(self, rule="mean", standing=(1,) * N, once=(1,) * N):
        held = np.zeros((N, 1, 1, 1), np.float32)
        labels, ids = np.zeros(N, np.int32), np.arange(N, dtype=np.uint32)
        clean = np.ones(N, bool)
        sample = Sample(held, labels, ids, clean, labels[:, None], 3, Threat("l2", 1.0), 7)
        settings = [SimpleNamespace(name="apgd-ce")]
        own = Outcome.of(np.array(standing, bool), settings, {}, np.array(once, bool))
        how = randomised.verdict(rule, None)
        self.book = Book()
        runner = SimpleNamespace(slots=8, logits_fn=None)
        context = AttackContext(runner, sample, own, self.book, how)
        setting = mock.Mock()
        setting.configure_mock(name="apgd-ce", norm="l2")
        meter = mock.Mock()
        made = cascade.Attack(context, setting, meter)
        self.enter_context(mock.patch.object(cascade.ensembles, "passes", return_value=1))
        return made

    def judge(self, attack, **points):
        """Judge the points {image: (latest, strongest)}; the images that are still undecided."""
        part = [
            ImageVerdict(
                int(name[1:]), True, 0, 0, 3, 0, False, np.float32(own).reshape(2, 1, 1, 1)
            )
            for name, own in points.items()
        ]
        return [verdict.image for verdict in attack.undecided(part)]

    def test_one_draw_and_the_rule(self):
        attack = self.attack()
        left = self.judge(attack, i0=(1, 2), i1=(1, 1), i2=(NAN, 2), i3=(0, 2))
        self.assertEqual(left, [1, 2])  # of 1 the rule may say more, of 2 one draw
        (first, seed, draw), (second, _, _) = self.asked
        self.assertEqual((first, second, seed), ("one-draw", "mean", 7))
        self.assertEqual(draw, attack.draw())
        record, point = self.book.records[0]
        self.assertEqual((record["fooled"], record["once"], record["norm"]), (True, True, 0.2))
        self.assertEqual((record["reached"], point.item()), (6, 2))  # by the rule
        record, _ = self.book.records[3]
        self.assertEqual((record["fooled"], record["once"]), (True, False))
        own = attack.evaluation.outcome
        self.assertEqual(own.standing.tolist(), [False, True, True, False])
        self.assertEqual(own.once.tolist(), [False, True, True, True])

    def test_what_was_judged_before_stays(self):
        attack = self.attack()
        self.assertEqual(self.judge(attack, i0=(1, 0), i1=(NAN, 2), i2=(NAN, NAN)), [0, 1, 2])
        self.assertEqual(self.judge(attack, i0=(0, 3), i1=(0, 3), i2=(NAN, 2)), [2])
        self.assertEqual(self.judge(attack, i2=(1, 0)), [])
        found = {i: (r["fooled"], r["once"], r["norm"]) for i, (r, _) in self.book.records.items()}
        # Of the first, one draw had judged; of the second, the rule had its point.
        expected = {0: (True, True, 0.3), 1: (True, False, 0.2), 2: (True, True, 0.2)}
        self.assertEqual(found, expected)
        self.assertEmpty(attack.judged)

    def test_by_one_draw_alone_it_is_over_with_the_first_point(self):
        attack = self.attack("one-draw")
        self.assertEqual(self.judge(attack, i0=(1, 2), i1=(0, 0)), [])
        found = {i: (r["fooled"], r["once"]) for i, (r, _) in self.book.records.items()}
        self.assertEqual(found, {0: (True, True), 1: (False, False)})

    def test_what_is_decided_by_one_of_them_waits_for_the_other_alone(self):
        attack = self.attack(standing=(1, 0, 1, 0), once=(0, 1, 0, 1))
        self.assertEqual(
            self.judge(attack, i0=(NAN, 2), i1=(1, NAN), i2=(1, 1), i3=(NAN, 2)), [2, 3]
        )
        record, point = self.book.records[1]
        self.assertEqual((record["fooled"], record["once"], point), (False, True, None))
        self.assertEqual(self.book.records[0][0]["fooled"], True)

    def test_points_outside_of_the_ball_fool_nobody(self):
        attack = self.attack()
        self.assertEqual(self.judge(attack, i0=(9.5, 9.5)), [0])
        self.assertEqual(attack.judged[0].once, False)
        self.assertIsNone(attack.judged[0].point)

    def test_a_job_that_survives_is_written_with_what_is_known(self):
        attack = self.attack()
        self.judge(attack, i0=(1, 0))
        attack.write(ImageVerdict(0, False, 0, 0, 3, 0, False, None))
        record, point = self.book.records[0]
        self.assertEqual((record["fooled"], record["once"], point), (False, True, None))
        self.assertFalse(attack.evaluation.outcome.once[0])
        self.assertTrue(attack.evaluation.outcome.standing[0])


class JoinTest(parameterized.TestCase):
    """What several processes found of their images."""

    def test_verdicts_flags_and_sums_of_all(self):
        rows = np.zeros(N, [("fooled", "?"), ("once", "?"), ("known", "?"), ("flat", "?")])
        rows["fooled"][[0]], rows["once"][[0, 2]] = True, True
        book = mock.Mock()
        book.rows.return_value = rows
        book.results.side_effect = lambda places, name: ("rows", places.tolist())
        settings = [SimpleNamespace(name="apgd-ce")]
        ones = np.ones(N, bool)
        own = Outcome.of(ones, settings, {}, ones)
        context = AttackContext(mock.Mock(), mock.Mock(classes=3), own, book, None)
        setting = mock.Mock()
        setting.configure_mock(name="apgd-ce")
        attack = cascade.Attack(context, setting, mock.Mock())
        attack.steps, attack.idle, attack.flat = 5, 2, [True, False, True]
        attack.doubtful = {2, 0}
        theirs = (np.array([3]), "theirs", [True], np.array([10, 20, 4]), np.array([1]))
        with mock.patch.object(cascade.hosts, "everyone", lambda mine: [mine, theirs]):
            attack.join(np.array([0, 2]), known=1)
        self.assertEqual(own.standing.tolist(), [False, True, True, False])
        self.assertEqual(own.once.tolist(), [False, False, False, True])
        # The second process's flag stands behind those of the first; one was in the ledger.
        self.assertEqual(attack.flat, [True, False, True, True])
        self.assertEqual((attack.steps, attack.idle), (15, 22))
        self.assertEqual(attack.unconfirmed, 6)  # both of ours stand when they are counted
        taken = [call.args for call in book.take_over.call_args_list]
        self.assertEqual(
            [(process, name) for process, _, name, _ in taken], [(0, "apgd-ce"), (1, "apgd-ce")]
        )
        self.assertEqual([which.tolist() for _, which, _, _ in taken], [[0], [3]])


if __name__ == "__main__":
    absltest.main()
