"""The worst case, rule by rule: which images each attack sees, in which batches, what is said."""

import dataclasses

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.engine.outcome import Cost
from jaxrobust.evaluation.engine.result import AutoAttackResult
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.questions import corrupted, mistakes
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.papers import three_norms
from jaxrobust.types import Threat


class FlagsTest(parameterized.TestCase):
    def test_flags(self):
        for changes, ladder, words in (
            ({}, None, None),
            ({"corruptions": "all"}, None, "--worst_case cannot be combined with --corruptions"),
            ({}, "0.1,0.2", "--worst_case cannot be combined with --ladder"),
            ({"norm": "l2"}, None, "covers three norms, so leave --norm out; give --threat"),
            ({"norm": "l2", "epsilon": 0.0}, None, "so leave --norm and --epsilon out"),
            ({"steps": 5, "version": "plus"}, None, "leave --version, --steps out, or ask for one"),
            ({"attack": "apgd-ce"}, None, "leave --attack out"),
            ({"start": "zero"}, None, "leave --start out"),
            ({"l1_rule": "art"}, None, "leave --l1_rule out"),
            ({"bundle": "there"}, None, "--bundle covers one attack under one threat"),
        ):
            with self.subTest(row=(changes, ladder, words)):
                given = GivenFlags(worst_case=True, **changes)
                if words is None:
                    three_norms.check(given, ladder)
                else:
                    with self.assertRaisesRegex(ValueError, words):
                        three_norms.check(given, ladder)

    def test_balls(self):
        found = three_norms.balls(["l2:2", "linf:4/255"])
        self.assertEqual(found, [Threat("l2", 2.0), Threat("linf", 4 / 255)])
        with self.assertRaisesRegex(ValueError, "--threat=l2:3: .*and l2 already has one"):
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

    def test_flags_that_contradict(self):
        for changes, words in (
            ({"frost": "f"}, "--frost=f has no effect without --corruptions"),
            ({"corruptions": "fog"}, "runs without an attack; leave --attack=autoattack out"),
            ({"corruptions": "fog", "attack": "clean", "frost": "f"}, "without the corruption fro"),
            ({"corruptions": "fgo", "attack": "clean"}, "^--corruptions=fgo: "),
            ({"corruptions": "fog", "attack": "clean", "dataset": "cifar10-c:x", "split": "test"},
             "--split=test has no effect on the files of cifar10-c:x; leave it out"),
            ({"corruptions": "frost", "attack": "clean", "dataset": "cifar10-c:x", "frost": "f"},
             "--frost=f has no effect on the files"),
        ):  # fmt: skip
            with self.subTest(row=(changes, words)), self.assertRaisesRegex(ValueError, words):
                mistakes.of_corruptions(GivenFlags(**changes))

    def test_settled(self):
        for given in (
            GivenFlags(),
            GivenFlags(corruptions="frost", attack="clean", frost="f", dataset="cifar10"),
        ):
            self.assertEqual(mistakes.of_corruptions(given), given)
        given = GivenFlags(corruptions="all", attack="clean", dataset="cifar10-c:x")
        found = mistakes.of_corruptions(given)
        first = mistakes.corruptions_of(given)[0]
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
                f"robust 1 of 4, 95% interval {low:.1%} to {high:.1%}",
                "flag x: odd",
            ],
        )
        self.assertIn(f"clean       {'-':>8}", self.result(n=0).table())

    def test_method(self):
        for about, method in (
            ({}, "autoattack standard"),
            ({"chosen": True}, "apgd-ce + apgd-t"),
            ({"version": "rand"}, "autoattack rand"),
            ({"draws": {"rule": "majority", "draws": 5}}, "autoattack standard, "),
        ):
            with self.subTest(row=(about, method)):
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
        with self.assertRaisesRegex(ValueError, "a record has no colour; pass only model"):
            self.result().typed_record(colour="red")
