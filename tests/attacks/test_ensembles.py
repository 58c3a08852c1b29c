"""What AutoAttack's attacks cost, against a count by hand from their papers."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.attacks import ensembles
from tests.support import sweeps


class CostTest(parameterized.TestCase):
    @sweeps.rows(
        # A step of APGD is one forward and one backward pass; the start takes one more of each.
        ("apgd-ce", "linf", 1, 1, 101 * 2),
        ("apgd-t", "linf", 1, 1, 9 * 101 * 2),
        # FAB differentiates all ten logits, or one difference; then it looks where it has come.
        ("fab", "linf", 2, 10, 5 * 100 * 12),
        ("fab-t", "l2", 2, 1, 9 * 100 * 3),
        ("square", "linf", 1, 0, 5001),
    )
    def test_passes(self, name, norm, forward, backward, most):
        setting = ensembles.base(name, norm)
        self.assertEqual(ensembles.forward(setting), forward)
        self.assertEqual(ensembles.backward(setting, 10), backward)
        self.assertEqual(ensembles.passes(setting, 10), forward + backward)
        self.assertEqual(ensembles.most_passes(setting, 10), most)

    def test_draws_of_a_random_network_are_passes(self):
        of_rand = ensembles.plan("linf", "rand", None, None)[0]
        self.assertEqual((ensembles.forward(of_rand), ensembles.backward(of_rand, 10)), (20, 20))


class PlanTest(parameterized.TestCase):
    """Steps, restarts, target classes and averaged gradients of each version, as in its paper."""

    @sweeps.rows(
        *((norm, "standard", "apgd-ce 100 1 0 1, apgd-t 100 1 9 1") for norm in ("linf", "l2")),
        ("l1", "standard", "apgd-ce 100 5 0 1, apgd-t 100 1 5 1"),
        (
            *("linf", "plus"),
            "apgd-ce 100 5 0 1, apgd-dlr 100 5 0 1, fab 100 5 0 1, square 5000 1 0 1, "
            "apgd-t 100 1 9 1, fab-t 100 1 9 1",
        ),
        ("l2", "rand", "apgd-ce 100 1 0 20, apgd-dlr 100 1 0 20"),
    )
    def test_versions(self, norm, version, expected):
        settings = ensembles.plan(norm, version, None, None)
        if version == "standard":
            expected += ", fab-t 100 1 9 1, square 5000 1 0 1"
        rows = (f"{s.name} {s.steps} {s.restarts} {s.targets} {s.eot}" for s in settings)
        self.assertEqual(", ".join(rows), expected)
        self.assertEqual({s.norm for s in settings}, {norm})
        own = {s.name: s.machine for s in settings}
        three = {"apgd-ce", "apgd-t"} if norm == "l1" else set()
        self.assertEqual({k for k, m in own.items() if m == "apgd-multi-radius"}, three)
        for name, machine in own.items():
            if name not in three:
                self.assertEqual(machine, name.partition("-")[0])

    def test_l0(self):
        """Sparse-AutoAttack, as its authors run it."""
        settings = ensembles.plan("l0", "standard", None, None)
        rows = [(s.name, s.machine, s.norm, s.steps, s.restarts, s.targets) for s in settings]
        names = ("sparse-pgd", "sparse-pgd-p", "sparse-rs")
        self.assertEqual(rows, [(name, name, "l0", 10_000, 1, 0) for name in names])
        passes = [ensembles.most_passes(s, 10) for s in settings]
        self.assertEqual(passes, [20_002, 20_002, 10_000])
        self.assertEqual(ensembles.versions("l0"), {"standard": names, "custom": names})
        for norm in ("linf", "l2", "l1"):
            self.assertNoCommonElements(ensembles.versions(norm)["custom"], names)

    @sweeps.rows("linf", "l2", "l1")
    def test_the_fast_version_is_a_part_of_the_standard_one(self, norm):
        fast, whole = (ensembles.plan(norm, name, None, None) for name in ("fast", "standard"))
        for part, full in zip(fast, whole, strict=True):
            self.assertEqual(
                part._replace(restarts=0, targets=0), full._replace(restarts=0, targets=0)
            )
            self.assertLessEqual(part.restarts, full.restarts)
            self.assertLessEqual(part.targets, full.targets)
        passes = [
            sum(ensembles.most_passes(s, 10) for s in those)
            for those in ([s for s in fast if s.name in ensembles.ON_ALL], whole)
        ]
        self.assertLess(passes[0], 0.15 * passes[1])  # what is left of a fifth is for the sample

    def test_custom_and_what_is_overridden(self):
        over = {"apgd-t": {"steps": 7, "targets": 3}, "apgd-ce": {"restarts": np.int64(2)}}
        found = ensembles.plan("l1", "custom", ("square", "apgd-t", "apgd-ce", "fab"), over)
        rows = [(s.name, s.machine, s.steps, s.restarts, s.targets) for s in found]
        expected = [("square", "square", 5000, 1, 0), ("apgd-t", "apgd", 7, 1, 3)]
        expected += [("apgd-ce", "apgd", 100, 2, 0), ("fab", "fab", 100, 5, 0)]
        self.assertEqual(rows, expected)
        self.assertIs(type(found[2].restarts), int)
        one = ensembles.plan("linf", "standard", ("square",), {"square": {"steps": 1}})
        self.assertEqual([(s.name, s.steps) for s in one], [("square", 1)])

    @sweeps.rows(
        ({"norm": "l3"}, "norm='l3' is unknown; choose one of linf, l2, l1, l0"),
        ({"norm": "l0"}, "version='plus' has no attacks for l0; choose one of standard, custom"),
        (
            {"norm": "l0", "version": "custom"},
            "attack 'fab' is not in version 'custom'; choose from sparse-pgd, sparse-pgd-p, ",
        ),
        ({"attacks": ("sparse-rs",)}, "attack 'sparse-rs' is not in version 'plus'"),
        ({"version": "quick"}, "version='quick' is unknown; .*plus, rand, fast, custom"),
        ({"version": "fast"}, "version='fast' already fixes the attacks and .*; leave attacks out"),
        ({"version": "fast", "attacks": None, "overrides": {"apgd-ce": {}}}, "leave overrides out"),
        ({"version": "custom", "attacks": None}, "'custom' needs attacks=.*choose from .*apgd-ce"),
        ({"attacks": "fab"}, r"attacks='fab' is a string; pass \('fab',\)"),
        ({"version": "rand"}, "attack 'fab' is not in version 'rand'; choose from a"),
        (
            {"overrides": {"fab-t": {}}},
            r"overrides names \['fab-t'\], which will not run; choose from \['fab'\]",
        ),
        ({"attacks": ()}, "is empty or repeats an attack"),
        ({"attacks": ("fab", "fab")}, "is empty or repeats an attack"),
        ({"overrides": {"fab": {"eot": 2}}}, "fab has no setting 'eot'; choose from"),
        ({"overrides": {"fab": {"targets": 2}}}, "fab has no setting 'targets'"),
        ({"overrides": {"fab": {"steps": 0}}}, "steps=0 must be an int >= 1"),
        ({"overrides": {"fab": {"steps": True}}}, "steps=True must be an int >= 1"),
        ({"overrides": {"fab": {"steps": 2.0}}}, "steps=2.0 must be an int >= 1"),
    )
    def test_refuses(self, changes, message):
        given = {"norm": "linf", "version": "plus", "attacks": ("fab",), "overrides": {}} | changes
        with self.assertRaisesRegex(ValueError, message):
            ensembles.plan(*given.values())

    def test_refuses_too_few_steps_for_three_stages(self):
        with self.assertRaisesRegex(ValueError, "steps=4 must be an int >= 5"):
            ensembles.plan("l1", "standard", ("apgd-ce",), {"apgd-ce": {"steps": 4}})

    # What each setting aims at, and what is said, of ten, four, three and two classes.
    @parameterized.parameters(
        ("apgd-t", {10: (9, 0), 9: (8, 1), 4: (3, 1), 3: (2, 2), 2: (1, 2)}),
        ("fab-t", {10: (9, 0), 4: (3, 1), 3: (2, 1), 2: (1, 1)}),
        ("apgd-dlr", {10: (0, 0), 4: (0, 0), 3: (0, 0), 2: (0, 1)}),
        ("apgd-ce", {10: (0, 0), 2: (0, 0)}),
        ("square", {10: (0, 0), 2: (0, 0)}),
    )
    def test_few_classes(self, name, expected):
        for classes, (aims, sentences) in expected.items():
            told: list[str] = []
            setting = ensembles.fit(ensembles.base(name, "linf"), classes, told.append)
            self.assertEqual((setting.targets, len(told)), (aims, sentences), (name, classes, told))
            self.assertTrue(all(line.startswith(f"{name}: ") for line in told), told)
        if name == "apgd-t":
            self.assertRegex(told[0], "1 target classes instead of 9, because the logits have 2")

    def test_what_an_attack_aims_at(self):
        likely = np.array([[3, 1, 2], [0, 2, 1]])
        own = ensembles.base("apgd-t", "linf")._replace(targets=2)
        self.assertEqual(ensembles.targets(own, likely).tolist(), [[3, 1], [0, 2]])
        codes = {"apgd-ce": -1, "apgd-dlr": -2, "fab": -1, "square": -1}
        for name, code in codes.items():
            found = ensembles.targets(ensembles.base(name, "l2"), likely)
            self.assertEqual((found.tolist(), found.dtype), ([[code], [code]], np.int32), name)

    def test_ranks_leave_the_label_out_and_the_logits_as_they_are(self):
        logits = np.random.default_rng(0).random((5, 6), np.float32)
        labels = np.array([0, 5, 2, 2, 3])
        before = logits.copy()
        found = ensembles.ranks(logits, labels, 5)
        for row, label, own in zip(logits, labels, found, strict=True):
            wrong = sorted(set(range(6)) - {label}, key=lambda c, r=row: -r[c])
            self.assertEqual(own.tolist(), wrong)
        np.testing.assert_array_equal(logits, before)
        self.assertEqual(found.dtype, np.uint8)
        many = ensembles.ranks(np.zeros((1, 1000), np.float32), np.array([999]), 2)
        self.assertEqual((many.tolist(), many.dtype), ([[998, 997]], np.uint16))


class TargetsTest(absltest.TestCase):
    def test_of_equal_logits_the_last_class_comes_first(self):
        logits = np.float32([[0.5, 3.0, 0.5, 1.0, 0.5], [9.0, 2.0, 2.0, 2.0, 2.0]])
        likely = ensembles.ranks(logits, np.array([1, 0]), 3)
        self.assertEqual(likely.tolist(), [[3, 4, 2], [4, 3, 2]])
