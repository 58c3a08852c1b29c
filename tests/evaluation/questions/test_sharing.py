"""What balls of one evaluation tell each other: unions and ladders of made-up attacks."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.questions import several
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.questions.several import ThreatMember
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.papers import three_norms
from jaxrobust.types import Threat

N = 6
# The radius that fools each image; the last one is wrong as it is.
FALLS = np.array([0.5, 1.5, 2.5, 9.0, 3.5, 0.0])
CLEAN = FALLS > 0


def found(robust: np.ndarray, name: str = "apgd-ce") -> Verdicts:
    fooled_by = np.where(CLEAN, np.where(robust, "", name), "clean")
    hit = CLEAN & ~robust
    norms, reached = np.where(hit, 0.25, 0.0), np.where(hit, 3, -1).astype(np.int32)
    ids, labels = np.arange(N, dtype=np.uint32), np.arange(N, dtype=np.int32)
    return Verdicts(ids, labels, CLEAN, fooled_by, norms, reached)


def measured(robust: np.ndarray, threat: Threat, **more) -> Measured:
    own = found(robust)
    attack = {"name": "apgd-ce", "norm": threat.norm, "epsilon": threat.epsilon}
    about = {"clean": float(CLEAN.mean()), "robust": float(own.robust.mean())}
    after = {"apgd-ce": about["robust"]}
    how = {"attacks": [attack], "accuracy_after": after, "costs": [{"attack": str(threat)}]}
    return Measured(AccuracyRecord(**(about | how | more)), own)


class FakeEvaluation:
    """Numbers what it is asked, and keeps what is written."""

    def __init__(self, out: Path, question: Question | None = None) -> None:
        self.out, self.question = out, question or Question(attack="apgd-ce")
        self.asked, self.calls, self.there = [], [], {}
        self.robust = {}  # threat -> bool[N]

    def identity(self, subject):
        return {"ball": str(subject.ball), "attack": self.question.attack}

    def number(self, subject, ladder):
        return f"{subject.ball.epsilon:g} of {len(ladder)}"

    def numbered(self, identity):
        self.asked.append(identity)
        return "number"

    def recorded(self, number):
        return self.there.get(number)

    def announce(self, subject, standing=None):
        self.calls.append(("announce", str(subject.ball), standing))

    def ledgers_to_replay(self, subject, number):
        return [f"{number}, {subject.ball}"]

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


class UnionTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.evaluation = FakeEvaluation(Path(self.create_tempdir()))
        self.subjects = [within("linf", 1.0), within("l2", 2.0), within("l1", 3.0)]
        falls = [[0], [1, 0], [2]]
        for subject, own in zip(self.subjects, falls, strict=True):
            robust = CLEAN.copy()
            robust[own] = False
            self.evaluation.robust[subject.ball] = robust
        self.members = [ThreatMember(self.evaluation, subject) for subject in self.subjects]

    def check(self, made, *, on_all: bool):
        self.assertEqual((made.number, made.method), ("number", "union"))
        expected = ["linf 1: apgd-ce", "l2 2: apgd-ce", "l1 3: apgd-ce", "", "", "clean"]
        self.assertEqual(made.own.fooled_by.tolist(), expected)
        self.assertEqual(made.record.robust, 2 / 6)
        self.assertEqual(made.record.union, {"each_on_all_images": on_all})
        after = {"linf 1": 4 / 6, "l2 2": 3 / 6, "l1 3": 2 / 6}
        self.assertEqual(made.record.accuracy_after, after)
        (identity,) = self.evaluation.asked
        balls = [{"ball": str(s.ball), "attack": "apgd-ce"} for s in self.subjects]
        self.assertEqual(identity, {"union": balls, "all": on_all})

    def test_each_ball_meets_what_stands_before_it(self):
        made = several.union(self.evaluation, self.members, [])
        self.check(made, on_all=False)
        said = [call for call in self.evaluation.calls if call[0] == "announce"]
        asked = [call for call in self.evaluation.calls if call[0] == "measure"]
        stood = [None, [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]
        for number, (one, other, expected) in enumerate(zip(said, asked, stood, strict=True)):
            self.assertEqual(other[1], f"number-{number}")
            self.assertEqual(other[4], [f"number, {self.subjects[number].ball}"])
            for standing in (one[2], other[2]):
                self.assertEqual(None if standing is None else standing.tolist(), expected)

    def records(self) -> list[AccuracyRecord]:
        made = []
        for number, subject in enumerate(self.subjects):
            one = measured(self.evaluation.robust[subject.ball], subject.ball)
            file = f"verdicts-{number}.json"
            verdicts.write(self.evaluation.out / file, str(number), one.verdicts)
            how = {"verdicts": file, "evaluation": str(number), "method": "apgd-ce"}
            made.append(one.noting(**how).record)
        return made

    def test_records_of_each_ball_are_joined(self):
        made = several.union(self.evaluation, self.members, self.records())
        self.check(made, on_all=True)
        self.assertEmpty(self.evaluation.calls)
        self.assertEqual([cost["attack"] for cost in made.record.costs], ["linf 1", "l2 2", "l1 3"])
        self.assertIsNone(made.record.verdicts)  # those of the union are others

    def test_a_worst_case_names_attacks(self):
        made = several.union(self.evaluation, self.members, self.records(), worst_case=True)
        self.assertTrue(self.evaluation.asked[0]["worst_case"])
        rows = made.record.worst_case
        self.assertEqual([row["evaluation"] for row in rows], ["0", "1", "2"])
        self.assertEqual([row["robust"] for row in rows], [4 / 6, 3 / 6, 4 / 6])
        self.assertEqual({row["method"] for row in rows}, {"apgd-ce"})
        names = [f"{s.ball} apgd-ce" for s in self.subjects]
        self.assertEqual(list(made.record.accuracy_after), names)
        self.assertIsNone(made.record.union)
        made = several.union(self.evaluation, self.members, [], worst_case=True)
        self.assertEqual([row["robust"] for row in made.record.worst_case], [4 / 6, None, None])
        self.assertEqual([row["evaluation"] for row in made.record.worst_case], [None] * 3)

    def test_what_is_recorded_is_not_measured(self):
        self.evaluation.there["number"] = "there"
        self.assertEqual(several.union(self.evaluation, self.members, []), "there")
        self.assertEmpty(self.evaluation.calls)

    def test_other_hosts_leave_records_to_the_first(self):
        with mock.patch.object(several.jax, "process_index", return_value=1):
            made = several.union(self.evaluation, self.members, self.records())
            self.assertEqual(made, AccuracyRecord(evaluation="number"))
            self.evaluation.asked.clear()
            self.check(several.union(self.evaluation, self.members, []), on_all=False)


class LadderTest(parameterized.TestCase):
    RADII = (0.0, 1.0, 2.0, 3.0)

    def climbed(self, robust=None, there=()):
        evaluation = FakeEvaluation(Path("out"))
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


class ThreeNormsTest(parameterized.TestCase):
    def test_given_radii_go_before_the_studys(self):
        given = [Threat("l2", 0.25)]
        found = three_norms.radii(32, given)
        self.assertEqual(list(found), ["linf", "l2", "l1"])
        self.assertEqual([found[norm].epsilon for norm in found], [8 / 255, 0.25, 40.0])
        self.assertEqual(three_norms.radii(224, [])["l1"].epsilon, 1600.0)
        every = [Threat("l1", 1.0), Threat("linf", 0.5), Threat("l2", 0.25)]
        self.assertEqual(list(three_norms.radii(8, every)), ["linf", "l2", "l1"])
        words = "for images of 8 px .*; give --threat=linf:RADIUS --threat=l1:RADIUS"
        with self.assertRaisesRegex(ValueError, words):
            three_norms.radii(8, given)
        with self.assertRaisesRegex(ValueError, r"give radii of \['linf', 'l1'\]"):
            three_norms.radii(8, given, write="radii of {}".format)

    def test_one_radius_of_each_norm(self):
        found = three_norms.balls(["l2:1/2", "linf:8/255"])
        self.assertEqual(found, [Threat("l2", 0.5), Threat("linf", 8 / 255)])
        with self.assertRaisesRegex(ValueError, "--threat=l2:1: .* l2 has one already"):
            three_norms.balls(["l2:1/2", "l2:1"])

    def test_cheap_attacks_first_where_each_skips_what_fell(self):
        question = Question(attack="x", union_only=True, replay=("a",), search_dtype="bfloat16")
        question = question._replace(noreplay=True, seed=7)
        alone = three_norms.questions(question, skips=False)
        names = [("linf", "pgd-20"), ("linf", "autoattack"), ("l2", "pgd-20"), ("l1", "pgd-20")]
        self.assertEqual([(norm, own.attack) for norm, own in alone], names)
        ordered = three_norms.questions(question, skips=True)
        last = [names[i] for i in (0, 2, 3, 1)]
        self.assertEqual([(norm, own.attack) for norm, own in ordered], last)
        for _, own in alone:
            engine = own.attack == "autoattack"
            self.assertEqual((own.union_only, own.seed), (False, 7))
            self.assertEqual(own.replay, ("a",) if engine else ())
            self.assertEqual(own.noreplay, engine)
            self.assertEqual(own.search_dtype, "bfloat16" if engine else "float32")
        self.assertEqual(
            [own.start for _, own in alone], ["uniform-boxed", None, "uniform-boxed", "random"]
        )
        self.assertEqual([own.l1_rule for _, own in alone], [None, None, None, "art"])

    @parameterized.parameters(
        ({"corruptions": "fog"}, None, "--worst_case contradicts --corruptions; give one"),
        ({}, "linf:0:1:2", "--worst_case contradicts --ladder"),
        ({"norm": "l2", "epsilon": 0.0}, None, "so leave --norm and --epsilon out"),
        ({"epsilon": 0.0, "steps": 3}, None, "so leave --epsilon out"),
        ({"attack": "pgd-20", "start": "image"}, None, "leave --attack, --start out"),
        ({"steps": 0}, None, "leave --steps out"),
        ({"version": "plus"}, None, "leave --version out"),
        ({"bundle": "x"}, None, "--bundle is of one attack under one threat"),
    )
    def test_flags_that_it_goes_without(self, flags, ladder, words):
        known = {"attack": "autoattack", "version": "standard", "bundle": None, "corruptions": None}
        names = ("norm", "epsilon", "steps", "targets", "restarts", "relative_step", "step")
        given = dict.fromkeys((*names, "start", "l1_rule")) | known | flags
        with self.assertRaisesRegex(ValueError, words):
            three_norms.check(SimpleNamespace(**given), ladder)
        three_norms.check(SimpleNamespace(**(given | dict.fromkeys(flags) | known)), None)


if __name__ == "__main__":
    absltest.main()
