"""What balls of one evaluation tell each other: ladders of made-up attacks."""

from types import SimpleNamespace

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.questions import several
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat

N = 6
# The radius that fools each image; the last one is wrong as it is.
FALLS = np.array([0.5, 1.5, 2.5, 9.0, 3.5, 0.0])
CLEAN = FALLS > 0


def found(robust: np.ndarray) -> Verdicts:
    fooled_by = np.where(CLEAN, np.where(robust, "", "apgd-ce"), "clean")
    hit = CLEAN & ~robust
    norms, reached = np.where(hit, 0.25, 0.0), np.where(hit, 3, -1).astype(np.int32)
    ids, labels = np.arange(N, dtype=np.uint32), np.arange(N, dtype=np.int32)
    return Verdicts(ids, labels, CLEAN, fooled_by, norms, reached)


def measured(robust: np.ndarray, threat: Threat) -> Measured:
    own = found(robust)
    attack = {"name": "apgd-ce", "norm": threat.norm, "epsilon": threat.epsilon}
    about = {"clean": float(CLEAN.mean()), "robust": float(own.robust.mean())}
    how = {"attacks": [attack], "costs": [{"attack": str(threat)}]}
    return Measured(AccuracyRecord(**about, **how), own)


class FakeEvaluation:
    """Numbers what it is asked, and keeps what is written."""

    def __init__(self) -> None:
        self.question = GivenFlags(attack="apgd-ce")
        self.calls, self.there = [], {}
        self.robust = {}  # threat -> bool[N]

    def number(self, subject, ladder):
        return f"{subject.ball.epsilon:g} of {len(ladder)}"

    def recorded(self, number):
        return self.there.get(number)

    def announce(self, subject, standing=None):
        self.calls.append(("announce", str(subject.ball), standing))

    def ledgers(self, number):
        return [f"ledger {number}"]

    def measure(self, subject, number, *, standing=None, beyond=None, ledgers=()):
        self.calls.append(("measure", number, standing, beyond, list(ledgers)))
        ball, robust = subject.ball, self.robust[subject.ball]
        for smaller in (own for own in self.robust if own.epsilon < ball.epsilon):
            if f"ledger {smaller.epsilon:g} of 4" in ledgers:  # what fools there, fools here
                robust = robust & self.robust[smaller]
        return measured(robust, ball)

    def write(self, number, method, record, own, begun_by=None):
        return SimpleNamespace(number=number, method=method, record=record, own=own)


def within(norm: str, epsilon: float):
    return SimpleNamespace(ball=Threat(norm, epsilon))


class LadderTest(parameterized.TestCase):
    RADII = (0.0, 1.0, 2.0, 3.0)

    def climbed(self, robust=None, there=()):
        evaluation = FakeEvaluation()
        rungs = [within("l2", radius) for radius in self.RADII]
        for rung in rungs:
            evaluation.robust[rung.ball] = CLEAN & (rung.ball.epsilon < FALLS)
        for radius, own in (robust or {}).items():
            evaluation.robust[Threat("l2", radius)] = np.array(own, bool)
        evaluation.there = dict(there)
        return several.ladder(evaluation, rungs), evaluation.calls

    def test_the_largest_radius_goes_first_and_tells_the_others(self):
        records, calls = self.climbed()
        asked = [call for call in calls if call[0] == "measure"]
        self.assertEqual([call[1] for call in asked], ["3 of 4", "2 of 4", "1 of 4"])
        beyond = [call[3] for call in asked]
        self.assertIsNone(beyond[0])
        self.assertEqual(beyond[1].tolist(), [0, 0, 0, 1, 1, 0])
        self.assertEqual(beyond[2].tolist(), [0, 0, 1, 1, 1, 0])
        ledgers = ["ledger 3 of 4", "ledger 2 of 4"]
        self.assertEqual([call[4] for call in asked], [[], ledgers[:1], ledgers])
        self.assertEqual([r.number for r in records], ["0 of 4", "1 of 4", "2 of 4", "3 of 4"])
        self.assertEqual([r.method for r in records], ["clean", *["apgd-ce, ladder"] * 3])
        shares = [5 / 6, 4 / 6, 3 / 6, 2 / 6]
        self.assertEqual([r.own.robust.mean() for r in records], shares)
        shared = [r.record.ladder for r in records]
        self.assertEqual([own["robust_beyond"] for own in shared], [0, 3, 2, 0])
        self.assertEqual({tuple(own["radii"]) for own in shared}, {self.RADII})
        first = [own["of_these_attacked_by"] for own in shared]
        self.assertEqual(first, [[], ["apgd-ce"], ["apgd-ce"], ["apgd-ce"]])

    def test_at_radius_0_only_what_is_wrong_falls(self):
        (first, *_), _ = self.climbed()
        self.assertEqual(first.own.fooled_by.tolist(), [*[""] * 5, "clean"])
        self.assertEqual(
            (first.own.norms.tolist(), first.own.reached.tolist()), ([0] * N, [-1] * N)
        )
        self.assertEqual((first.record.clean, first.record.robust), (5 / 6, None))
        self.assertEqual((first.record.attacks, first.record.costs), ([], []))

    def test_what_falls_at_a_small_radius_is_tried_at_the_larger_ones(self):
        robust = {1.0: [0, 1, 1, 0, 1, 0]}  # the fourth falls here, and stood at 2 and 3
        records, calls = self.climbed(robust)
        asked = [call for call in calls if call[0] == "measure"]
        again = asked[3:]
        self.assertEqual([call[1] for call in again], ["2 of 4", "3 of 4"])
        self.assertEqual(
            [call[4] for call in again], [["ledger 1 of 4"], ["ledger 1 of 4", "ledger 2 of 4"]]
        )
        self.assertEqual(again[0][3].tolist(), asked[1][3].tolist())
        self.assertIsNone(again[1][3])
        self.assertEqual([len(r.record.costs) for r in records], [0, 1, 2, 2])

    def test_all_that_is_there(self):
        numbers = [f"{radius:g} of 4" for radius in self.RADII]
        records, calls = self.climbed(there={number: f"record {number}" for number in numbers})
        self.assertEqual(records, [f"record {number}" for number in numbers])
        self.assertEmpty(calls)
        records, calls = self.climbed(there={numbers[2]: "record"})
        self.assertEqual(records[2], "record")
        self.assertLen([call for call in calls if call[0] == "measure"], 3)  # which share points
