"""The worst case, rule by rule: which images each attack sees, in which batches, what is said."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.engine.outcome import Cost
from jaxrobust.evaluation.engine.result import AutoAttackResult
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.questions import corrupted, measuring
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.papers import three_norms, worst_case
from jaxrobust.types import Threat

N = 7
IMAGES = np.random.default_rng(0).random((N, 32, 32, 3)).astype(np.float32)
LABELS = np.arange(N)


class Attacked:
    """What fools which images, by the attack's norm and kind; image 0 is wrong as it is."""

    FOOLS = (("linf", "pgd-20", [1, 2]), ("linf", "autoattack", [1, 3]), ("l2", "pgd-20", [2, 4]),
             ("l1", "pgd-20", []))  # fmt: skip

    def __init__(self):
        self.asked = []

    def measured(self, norm, kind, ids) -> Measured:
        (which,) = (f for n, k, f in self.FOOLS if (n, k) == (norm, kind))
        ids = np.asarray(ids)
        self.asked.append((norm, kind, ids.tolist()))
        clean = ids != 0
        fooled = np.where(np.isin(ids, which), kind, np.where(clean, "", "clean"))
        seen = Verdicts(ids, LABELS[ids], clean, fooled, np.zeros(len(ids)), np.full(len(ids), -1))
        own = AccuracyRecord(
            attacks=[{"name": kind, "norm": norm, "epsilon": 1.0}], flags={}, costs=[],
            clean=float(clean.mean()), robust=float(seen.robust.mean()),
        )  # fmt: skip
        return Measured(own, seen)

    def stepped(self, logits_fn, images, labels, ids, ball, question, *, batch_size):
        assert len(images) == len(labels) == N
        self.batch_size = batch_size
        return self.measured(ball.norm, question.attack, ids)

    def autoattack(self, logits_fn, images, labels, *, norm, image_ids, **how):
        np.testing.assert_array_equal(images, IMAGES[image_ids])
        np.testing.assert_array_equal(labels, LABELS[image_ids])
        self.how = how
        found = self.measured(norm, "autoattack", image_ids)
        about = {"fingerprint": {"arrays": "a"}, "classes": 4}
        return SimpleNamespace(measured=lambda: found, about=about)


class FlowTest(parameterized.TestCase):
    def run_with(self, **how):
        self.attacked = Attacked()
        known = SimpleNamespace()
        with (
            mock.patch.object(worst_case, "_stepped", self.attacked.stepped),
            mock.patch.object(worst_case, "autoattack", self.attacked.autoattack),
            mock.patch.object(worst_case, "_answering", return_value=known),
            mock.patch.object(worst_case, "_number", return_value="number"),
        ):
            how = {"verbose": False} | how
            return worst_case.worst_case(None, IMAGES, LABELS, **how)

    def test_each_sees_all_images(self):
        result = self.run_with(seed=5, batch_size=3, ledger="there")
        everything = list(range(N))
        order = [("linf", "pgd-20"), ("linf", "autoattack"), ("l2", "pgd-20"), ("l1", "pgd-20")]
        self.assertEqual(self.attacked.asked, [(*attack, everything) for attack in order])
        self.assertEqual(self.attacked.batch_size, 3)
        self.assertEqual((self.attacked.how["seed"], self.attacked.how["ledger"]), (5, "there"))
        self.assertEqual(self.attacked.how["epsilon"], 8 / 255)
        self.assertEqual(result.robust.tolist(), [False] * 5 + [True] * 2)
        self.assertEqual(result.clean.tolist(), [False] + [True] * 6)
        self.assertEqual(result.fooled_by.tolist()[:5], [
            "clean", "linf 0.03137: pgd-20", "linf 0.03137: pgd-20", "linf 0.03137: autoattack",
            "l2 1.5: pgd-20"])  # fmt: skip
        self.assertEqual([part["robust"] for part in result.parts], [4 / 7, 4 / 7, 4 / 7, 6 / 7])
        self.assertEqual([part["images"] for part in result.parts], [N] * 4)
        after = list(result.accuracy_after.items())
        self.assertEqual(
            after,
            [("linf 0.03137 pgd-20", 4 / 7), ("linf 0.03137 autoattack", 3 / 7),
             ("l2 1.5 pgd-20", 2 / 7), ("l1 40 pgd-20", 2 / 7)],
        )  # fmt: skip
        self.assertEqual(result.own.image_ids, "0..6")
        self.assertEqual(result.own.evaluation, "number")
        self.assertEqual(result.own.fingerprint["images"], result.own.images_sha256)
        table = result.table().splitlines()
        self.assertEqual(table[0], f"{'clean':28}   85.71% of 7")
        self.assertEqual(table[4], f"{'l1 40 pgd-20':28}   85.71% of 7")
        low, high = checks.binomial_interval(2, 7)
        words = f"{'worst case':28}   28.57%, 95 % interval {low:.1%} to {high:.1%}"
        self.assertEqual(table[5], words)
        self.assertFalse(self.attacked.how["verbose"])

    def test_its_table_is_printed_where_it_is_asked_for(self):
        for verbose in (True, False):
            with mock.patch.object(worst_case, "say") as say:
                result = self.run_with(verbose=verbose)
            said = [call.args for call in say.call_args_list]
            self.assertEqual(said, [(result.table(),)] if verbose else [])
            self.assertEqual(self.attacked.how["verbose"], verbose)

    def test_each_sees_what_stands_before_it(self):
        result = self.run_with(union_only=True)
        self.assertEqual(
            self.attacked.asked,
            [
                ("linf", "pgd-20", [0, 1, 2, 3, 4, 5, 6]),
                ("l2", "pgd-20", [3, 4, 5, 6]),
                ("l1", "pgd-20", [3, 5, 6]),
                ("linf", "autoattack", [3, 5, 6]),
            ],
        )
        self.assertEqual(result.robust.tolist(), [False] * 5 + [True] * 2)
        self.assertEqual([part["images"] for part in result.parts], [7, 4, 3, 3])
        self.assertEqual([part["robust"] for part in result.parts], [4 / 7, None, None, None])
        table = result.table().splitlines()
        self.assertEqual(table[1], f"{'linf 0.03137 pgd-20':28}   57.14% of 7")
        self.assertEqual(table[2], f"{'l2 1.5 pgd-20':28}   42.86% left of 7")

    def test_one_image_at_a_time(self):
        self.run_with(batch_size=1)
        self.assertEqual(self.attacked.batch_size, 1)

    def test_radii_that_are_given(self):
        result = self.run_with(radii={"l2": 2.0})
        self.assertEqual([part["epsilon"] for part in result.parts], [8 / 255, 8 / 255, 2.0, 40.0])

    @parameterized.parameters(
        ({"batch_size": 0}, "batch_size=0: pass an int of at least 1"),
        ({"radii": {"l3": 1}}, "radii has l3, which is no norm; one of linf, l2, l1"),
        ({"radii": {"linf": 4.0}}, "larger than the pixel range"),
        ({"radii": {"linf": "four"}}, "epsilon"),
    )
    def test_mistakes(self, how, words):
        with self.assertRaisesRegex((ValueError, TypeError), words):
            self.run_with(**how)

    def test_images_of_a_size_without_radii(self):
        for side in ((30, 32), (31, 31)):
            with self.assertRaisesRegex(ValueError, "no radii.*give radii={'linf': RADIUS, 'l2'"):
                worst_case._radii((*side, 3), {})
            found = worst_case._radii((*side, 3), {"linf": 0.1, "l2": 1, "l1": 5})
            self.assertEqual(found["l1"], Threat("l1", 5.0))
        with self.assertRaisesRegex(ValueError, "give radii={'l2': RADIUS}"):
            worst_case._radii((31, 31, 3), {"linf": 0.1, "l1": 5})


class SteppedTest(parameterized.TestCase):
    @parameterized.parameters((7, 3), (6, 3), (2, 4), (0, 3))
    def test_batches_of_one_shape(self, count, size):
        """The network is right where the first pixel is bright; the attack does nothing."""
        ids = np.array([6, 1, 5, 0, 2, 4, 3])[:count]
        question, calls = Question("pgd-20", seed=9), []

        def judged(params, stats, images, labels, mask, which, key, *, how):
            n = len(labels)
            calls.append((which.tolist(), mask.tolist()))
            np.testing.assert_array_equal(images, IMAGES[which])
            np.testing.assert_array_equal(labels, LABELS[which])
            bright = images[:, 0, 0, 0] > 0.5
            none = np.zeros(n, np.int32)
            return {"clean": bright & mask, "robust": bright & mask, "labels": labels,
                    "norms": np.zeros(n), "answers": none, "reached": none, "finite": mask,
                    "count": mask}  # fmt: skip

        with (
            mock.patch.object(accuracy, "judged", judged),
            mock.patch.object(worst_case.jax, "jit", lambda function: function),
            mock.patch.object(worst_case.jax, "device_get", lambda values: values),
            mock.patch.object(worst_case.tracing, "argument", lambda *given: None),
            mock.patch.object(measuring, "answered", lambda reached, *rest: (reached, *rest[:-1])),
        ):
            reached, asked, places, (settings,), seconds = worst_case._stepped(
                None, IMAGES, LABELS, ids, Threat("linf", 0.1), question, batch_size=size
            )
        self.assertLen(calls, max(-(-count // size), 1))
        self.assertEqual({len(which) for which, _ in calls}, {size})
        seen = [i for which, mask in calls for i, there in zip(which, mask, strict=True) if there]
        self.assertEqual(seen, ids.tolist())
        np.testing.assert_array_equal(reached["labels"], LABELS[ids])
        np.testing.assert_array_equal(reached["clean"], IMAGES[ids][:, 0, 0, 0] > 0.5)
        self.assertEqual((asked, places.tolist()), (question, ids.tolist()))
        self.assertEqual((settings["norm"], settings["epsilon"], settings["steps"]),
                         ("linf", 0.1, 20))  # fmt: skip
        self.assertGreaterEqual(seconds, 0)


class FlagsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({}, None, None),
        ({"corruptions": "all"}, None, "--worst_case contradicts --corruptions"),
        ({}, "0.1,0.2", "--worst_case contradicts --ladder"),
        ({"norm": "l2"}, None, "of three norms, so leave --norm out; give --threat"),
        ({"norm": "l2", "epsilon": 0.0}, None, "so leave --norm and --epsilon out"),
        ({"steps": 5, "version": "plus"}, None, "leave --version, --steps out, or ask for one"),
        ({"attack": "apgd-ce"}, None, "leave --attack out"),
        ({"start": "zero"}, None, "leave --start out"),
        ({"l1_rule": "art"}, None, "leave --l1_rule out"),
        ({"bundle": "there"}, None, "--bundle is of one attack under one threat"),
    )
    def test_flags(self, changes, ladder, words):
        given = GivenFlags(worst_case=True, **changes)
        if words is None:
            three_norms.check(given, ladder)
        else:
            with self.assertRaisesRegex(ValueError, words):
                three_norms.check(given, ladder)

    def test_balls(self):
        found = three_norms.balls(["l2:2", "linf:4/255"])
        self.assertEqual(found, [Threat("l2", 2.0), Threat("linf", 4 / 255)])
        with self.assertRaisesRegex(ValueError, "--threat=l2:3: .*and l2 has one already"):
            three_norms.balls(["l2:2", "l2:3"])


class CorruptedTest(parameterized.TestCase):
    def test_table(self):
        accuracies = {"fog": {"1": 0.5, "3": 0.25}, "snow": {"3": 1.0}}
        self.assertEqual(
            corrupted.table({"accuracy": accuracies, "mean": 0.5833}),
            [
                f"{'severity':18}       1       3    mean",
                f"{'fog':18}   50.0%   25.0%   37.5%",
                f"{'snow':18}       -  100.0%  100.0%",
                f"{'1 - mean error':18}   58.3%",
            ],
        )

    def test_what_is_done(self):
        rows = [{"kind": "fog", "severity": 1, "accuracy": 0.5, "not_finite": 2},
                {"kind": "fog", "severity": 2, "accuracy": 0.4}]  # fmt: skip
        with mock.patch.object(corrupted.jsonl, "read", return_value=rows):
            reached = corrupted._done("ledger")
        self.assertEqual(reached, {"fog-1": rows[0], "fog-2": rows[1]})

    @parameterized.parameters(
        ({"frost": "f"}, "--frost=f has no effect without --corruptions"),
        ({"corruptions": "fog"}, "measured without an attack; leave --attack=autoattack out"),
        ({"corruptions": "fog", "attack": "clean", "frost": "f"}, "without the corruption frost"),
        ({"corruptions": "fgo", "attack": "clean"}, "^--corruptions=fgo: "),
        ({"corruptions": "fog", "attack": "clean", "dataset": "cifar10-c:x", "split": "test"},
         "--split=test has no effect on the files of cifar10-c:x; leave it out"),
        ({"corruptions": "frost", "attack": "clean", "dataset": "cifar10-c:x", "frost": "f"},
         "--frost=f has no effect on the files"),
    )  # fmt: skip
    def test_flags_that_contradict(self, changes, words):
        with self.assertRaisesRegex(ValueError, words):
            corrupted.settled(GivenFlags(**changes))

    def test_settled(self):
        for given in (
            GivenFlags(),
            GivenFlags(corruptions="frost", attack="clean", frost="f", dataset="cifar10"),
        ):
            self.assertEqual(corrupted.settled(given), given)
        given = GivenFlags(corruptions="all", attack="clean", dataset="cifar10-c:x")
        found = corrupted.settled(given)
        first = corrupted.wanted(given)[0]
        self.assertEqual(found, given._replace(split=str(first)))


class ResultTest(parameterized.TestCase):
    """AutoAttack's result as a table and a record."""

    def result(self, n=4, **more):
        robust = np.array([True, False, False, False])[:n]
        clean = np.array([True, True, True, False])[:n]
        fooled = np.array(["", "apgd-ce", "apgd-t", "clean"])[:n]
        ids = np.arange(n)
        seen = Verdicts(ids, ids, clean, fooled, np.zeros(n), np.full(n, -1))
        settings = [{"name": name, "steps": 9} for name in ("apgd-ce", "apgd-t")]
        costs = [Cost("apgd-ce", 1, 1000, 20, 3, 1.25, 0.5), Cost("apgd-t", 1, 7, 5, 0, 2.0, 0.0)]
        about = {"norm": "l2", "epsilon": 0.5, "version": "standard", "seed": 3, "chosen": False,
                 "image_ids": "0..3", "images_sha256": "i", "classes": 10, "image": (8, 8, 3),
                 "arrays_sha256": "a", "fingerprint": {"arrays": "a", "begun_by": {"jax": "1"}},
                 "robust_beyond": 2}  # fmt: skip
        known = {"about": about | more.pop("about", {}), "flags": {"x": "odd"}, "clean": clean}
        known |= {"robust": robust, "fooled_by": fooled, "images_adv": None, "attacks": settings}
        known |= {"accuracy_after": {"apgd-ce": 0.5, "apgd-t": 0.25}, "costs": costs}
        return AutoAttackResult(**(known | {"verdicts": seen} | more))

    def test_table(self):
        low, high = checks.binomial_interval(1, 4)
        self.assertEqual(
            self.result().table().splitlines(),
            [
                "attack      accuracy  fooled    forward   backward  time",
                "clean         75.00%",
                "apgd-ce       50.00%       1      1,000         20  1.2 s + 0.5 s compiling",
                "apgd-t        25.00%       1          7          5  2.0 s + 0.0 s compiling",
                f"robust 1 of 4, 95 % interval {low:.1%} to {high:.1%}",
                "flag x: odd",
            ],
        )
        self.assertIn(f"clean       {'-':>8}", self.result(n=0).table())

    def test_measured(self):
        own, seen, begun_by = self.result().measured()
        self.assertEqual((own.clean, own.robust, own.robust_beyond), (0.75, 0.25, 2))
        self.assertEqual([a["name"] for a in own.attacks], ["apgd-ce", "apgd-t"])
        self.assertEqual({(a["norm"], a["epsilon"], a["steps"]) for a in own.attacks},
                         {("l2", 0.5, 9)})  # fmt: skip
        self.assertEqual(own.accuracy_after, {"apgd-ce": 0.5, "apgd-t": 0.25})
        self.assertEqual([cost["backward"] for cost in own.costs], [20, 5])
        self.assertEqual(begun_by, {"jax": "1"})
        self.assertLen(seen.labels, 4)
        none, _, _ = self.result(n=0).measured()
        self.assertEqual((none.clean, none.robust), (None, None))

    @parameterized.parameters(
        ({}, "autoattack standard"),
        ({"chosen": True}, "apgd-ce + apgd-t"),
        ({"version": "rand"}, "autoattack rand"),
        ({"draws": {"rule": "majority", "draws": 5}}, "autoattack standard, "),
    )
    def test_method(self, about, method):
        found = self.result(about=about)._method()
        self.assertStartsWith(found, method)
        self.assertEqual(found == method, "draws" not in about)

    def test_record(self):
        known = {"model": "net", "weights": "mine", "dataset": "cifar10"}
        found = self.result().typed_record(**known)
        fields = dataclasses.asdict(found)
        self.assertEqual(found.model, {"name": "net", "num_classes": 10, "options": None,
                                       "image_size": 8, "in_channels": 3})  # fmt: skip
        expected = {"weights": "mine", "dataset": "cifar10", "split": None, "seed": 3,
                    "image_ids": "0..3", "images_sha256": "i", "version": "standard",
                    "robust": 0.25, "clean": 0.75, "method": "autoattack standard"}  # fmt: skip
        self.assertEqual({key: fields[key] for key in expected}, expected)
        self.assertEqual(found.function["arrays_sha256"], "a")
        low, high = checks.binomial_interval(1, 4)
        self.assertEqual(list(found.interval["robust"]), [low, high])
        wide = self.result(about={"image": (8, 9, 3)}).typed_record()
        self.assertIsNone(wide.model["image_size"])
        self.assertNotEqual(found.evaluation, None)
        same = self.result().typed_record(**known | {"model": "else"})
        self.assertEqual(same.evaluation, found.evaluation)
        other = self.result(about={"seed": 4}).typed_record(**known)
        self.assertNotEqual(other.evaluation, found.evaluation)
        with self.assertRaisesRegex(ValueError, "a record has no colour; one of model"):
            self.result().typed_record(colour="red")


if __name__ == "__main__":
    absltest.main()
