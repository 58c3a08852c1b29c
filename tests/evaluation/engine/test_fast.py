"""The fast version: a part of the standard jobs, the standard call continues with the others."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.attacks import ensembles
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.engine import turns
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.engine.ledger import PART
from jaxrobust.evaluation.engine.turns import Budget
from jaxrobust.evaluation.records import stopping
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.stopping import StopRule
from tests.support import sweeps
from tests.support.processes import start, wait

N = 120
IDS = np.arange(300, 300 + N)
_RNG = np.random.default_rng(0)
IMAGES = _RNG.random((N, 4, 4, 1), np.float32)
WEIGHTS = _RNG.standard_normal((16, 10)).astype(np.float32)
LABELS = np.argmax(IMAGES.reshape(N, -1) @ WEIGHTS, axis=1)
LABELS[::9] = (LABELS[::9] + 1) % 10  # some are wrong as they are
STEPS = {"apgd-ce": 6, "apgd-t": 6, "fab-t": 4, "square": 60}
RADII = {"linf": 0.05, "l1": 0.5}
_BASE = ensembles.base


@jax.tree_util.Partial
def net(x):
    """A network of tiny images, whose gradient vanishes on some of them: Square finds those."""
    logits = x.reshape(len(x), -1) @ WEIGHTS
    rounded = jax.lax.stop_gradient(logits)
    return jax.numpy.where(x[:, :1, 0, 0] < 0.5, rounded, logits)


def short(name: str, norm: str):
    """Few steps, and with them the same versions."""
    return _BASE(name, norm)._replace(steps=STEPS[name])


def evaluated(version: str = "fast", norm: str = "linf", **given):
    """The version with few steps; a sample of a quarter or so of what survives."""
    how = {"epsilon": RADII[norm], "batch_size": 16, "seed": 3, "verbose": False} | given
    with (
        mock.patch.object(ensembles, "base", short),
        mock.patch.object(turns, "SHARE", 0.6),
    ):
        return autoattack(net, IMAGES, LABELS, norm=norm, version=version, image_ids=IDS, **how)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def jobs(path: Path) -> list[tuple]:
    """The jobs of survivors that a ledger says were made: attack, image, target, restart."""
    made = []
    for row in rows(path):
        name, tried = row["attack"].removesuffix(PART), row.get("tried")
        targets = tried["targets"] if tried else [None]
        made += [(name, row["image"], t, bool(tried)) for t in targets]
    return made


class _OfANorm:
    """What holds in any norm."""

    NORM = ""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.whole = evaluated("standard", cls.NORM, ledger=cls.folder / "all.jsonl")
        cls.fast = evaluated("fast", cls.NORM, ledger=cls.folder / "fast.jsonl")

    def test_finds_what_the_standard_version_finds_or_less(self):
        fast, whole = self.fast, self.whole
        np.testing.assert_array_equal(fast.clean, whole.clean)
        self.assertTrue((whole.robust <= fast.robust).all())
        self.assertGreater(fast.robust.sum(), whole.robust.sum())
        about = fast.about["fast"]
        fallen = np.isin(IDS, about["fallen"])
        stood = fast.robust | fallen
        self.assertEqual(about["survivors"], stood.sum())
        with self.subTest("a sampled image has the standard verdict"):
            chosen = stopping.draw_survivors(3, IDS, stood, about["sampled"])
            self.assertBetween(about["sampled"], 4, stood.sum() - 4)
            np.testing.assert_array_equal(fast.robust[chosen], whole.robust[chosen])
            np.testing.assert_array_equal(fallen, chosen & ~whole.robust)
            self.assertTrue(fallen.any())
        self.assertEqual(about["fooled"], fallen.sum())
        left = stopping.most_fooled(about["fooled"], about["sampled"], about["survivors"])
        self.assertEqual(about["at_most"], left - about["fooled"])
        self.assertEqual(fast.flags["fast"], stopping.fast_line(about))

    def test_the_nearest_meet_all_of_apgd(self):
        """The network is linear, so that the distances are known; some images have no gradient."""
        name = {"linf": "apgd-t", "l1": "apgd-ce"}[self.NORM]  # whose part is not the whole
        found = rows(self.folder / "fast.jsonl")
        begun = {row["image"] for row in found if row["attack"] == name + PART}
        ended = {row["image"] for row in found if row["attack"] == name} & begun
        early = {row["image"] for row in found if row["attack"] == "apgd-t" and row["fooled"]}
        if self.NORM == "linf":
            early -= ended  # whose first targets had found nothing
        stood = np.array(sorted(begun - early))
        x = IMAGES[stood - 300].reshape(len(stood), -1)
        own = np.argmax(x @ WEIGHTS, axis=1)
        apart = WEIGHTS.T[own][:, None] - WEIGHTS.T[None]  # [n, classes, pixels]
        slopes = np.linalg.norm(apart, {"linf": 1, "l1": np.inf}[self.NORM], axis=2)
        gaps = np.einsum("ni,nki->nk", x, apart)
        far = np.where((x[:, :1] < 0.5) | (slopes == 0), np.inf, gaps / np.maximum(slopes, 1e-9))
        if self.NORM == "l1":  # whose APGD-T aims at five
            far = np.where(np.argsort(np.argsort(gaps, axis=1), axis=1) <= 5, far, np.inf)
        near = set(stood[np.argsort(far.min(axis=1), kind="stable")][: round(len(stood) / 8)])
        sampled = set(
            IDS[
                stopping.draw_survivors(
                    3, IDS, np.isin(IDS, self.survivors()), self.fast.about["fast"]["sampled"]
                )
            ]
        )
        self.assertContainsSubset(near, ended)
        with self.subTest("and FAB-T at few targets"):
            fab = {row["image"] for row in found if row["attack"] == f"fab-t{PART}"}
            whole = {row["image"] for row in found if row["attack"] == "fab-t"}
            fooled = {row["image"] for row in found if row["fooled"]}
            self.assertContainsSubset(near - fooled, fab)
            self.assertContainsSubset(fab, near)
            self.assertContainsSubset(whole - near, sampled)
        self.assertContainsSubset(ended - near, sampled)
        self.assertNotEmpty(near - sampled)
        self.assertTrue(np.isfinite(far.min(axis=1)[np.isin(stood, list(near))]).all())

    def survivors(self) -> np.ndarray:
        fallen = self.fast.about["fast"]["fallen"]
        return IDS[self.fast.robust | np.isin(IDS, fallen)]

    def test_the_standard_call_goes_on_and_does_nothing_twice(self):
        path = self.folder / "finished.jsonl"
        first = evaluated("fast", self.NORM, ledger=path)
        begun = path.read_text()
        second = evaluated("standard", self.NORM, ledger=path)
        whole = self.whole
        self.assertStartsWith(path.read_text(), begun)
        for name in ("clean", "robust", "fooled_by", "answers"):
            np.testing.assert_array_equal(getattr(second, name), getattr(whole, name))
        self.assertEqual(second.accuracy_after, whole.accuracy_after)
        self.assertEqual(second.flags, whole.flags)
        self.assertNotIn("fast", second.about)
        self.assertEqual(second.record()["evaluation"], whole.record()["evaluation"])
        made = [(r["attack"], r["image"]) for r in rows(path)]
        self.assertLen(set(made), len(made))
        with self.subTest("an image that nothing fools costs what it costs in one run"):
            each = {}
            for row in rows(path):
                name = row["attack"].removesuffix(PART)
                if row["image"] in IDS[whole.robust]:
                    each[name] = each.get(name, 0) + row["iterations"]
            alone = {}
            for row in rows(self.folder / "all.jsonl"):
                if row["image"] in IDS[whole.robust]:
                    alone[row["attack"]] = alone.get(row["attack"], 0) + row["iterations"]
            self.assertEqual(each, alone)
            forward = [result.costs[-1].forward for result in (first, second, whole)]
            self.assertEqual(forward[0] + forward[1], forward[2])

    def test_again_on_its_ledger_and_on_the_finished_one(self):
        path = self.folder / "again.jsonl"
        first = evaluated("fast", self.NORM, ledger=path)
        evaluated("standard", self.NORM, ledger=path)
        again = evaluated("fast", self.NORM, ledger=path)
        self.assertEqual(again.about["fast"], first.about["fast"])
        self.assertEqual([c.forward for c in again.costs], [0] * 4)

    def test_accuracies_and_costs_belong_together(self):
        left = self.fast.clean.mean()
        self.assertEqual([c.attack for c in self.fast.costs], list(STEPS))
        for cost in self.fast.costs:
            self.assertEqual(cost.fooled, (self.fast.fooled_by == cost.attack).sum())
            left -= cost.fooled / N
            self.assertAlmostEqual(self.fast.accuracy_after[cost.attack], left)


@pytest.mark.slow
@pytest.mark.computes
class L1Test(_OfANorm, absltest.TestCase):
    NORM = "l1"

    def test_the_part_is_of_restarts_too(self):
        made = [row for row in rows(self.folder / "fast.jsonl") if "tried" in row]
        parts = {(row["attack"], len(row["tried"]["targets"])) for row in made}
        expected = {"apgd-ce": 1, "apgd-t": 4, "fab-t": 4}
        self.assertEqual(parts, {(name + PART, count) for name, count in expected.items()})
        self.assertEqual({row["tried"]["restarts"] for row in made}, {1})


@pytest.mark.computes
class LinfTest(_OfANorm, parameterized.TestCase):
    NORM = "linf"

    def test_the_part_notes_its_jobs(self):
        made = rows(self.folder / "fast.jsonl")
        part = [row for row in made if row["attack"] == f"apgd-t{PART}"]
        self.assertLen(part, self.fast.about["fast"]["survivors"])
        for row in part:
            self.assertFalse(row["fooled"])
            self.assertLen(set(row["tried"]["targets"]), 4)
            self.assertNotIn(LABELS[row["image"] - 300], row["tried"]["targets"])
        self.assertGreater(self.fast.costs[1].backward, self.fast.costs[1].forward)

    def test_targets_are_the_nearest_ones(self):
        """Of a linear network the order is that of the distances to its boundaries."""
        logits = IMAGES.reshape(N, -1) @ WEIGHTS
        checked = 0
        for row in rows(self.folder / "fast.jsonl"):
            place = row["image"] - 300
            if "tried" not in row or IMAGES[place, 0, 0, 0] < 0.5:
                continue  # where there is no gradient there is no order
            label = LABELS[place]
            gaps = logits[place, label] - logits[place]
            slopes = np.abs(WEIGHTS - WEIGHTS[:, label : label + 1]).sum(0)
            slopes[label] = 1e-9  # which comes last: it is not a target
            order = np.argsort(np.where(np.arange(10) == label, np.inf, gaps / slopes))
            self.assertEqual(row["tried"]["targets"], order[:4].tolist())
            checked += 1
        self.assertGreater(checked, 5)

    @parameterized.parameters(1, 2, 3, 4)
    def test_goes_on_where_it_was_killed(self, calls):
        path, run, made = self.folder / f"killed-{calls}.jsonl", Attack.run, []

        def killed(attack, later):
            made.append(attack)
            cost = run(attack, later)  # its verdicts are in the ledger
            if len(made) == calls:
                raise KeyboardInterrupt
            return cost

        with mock.patch.object(Attack, "run", killed), self.assertRaises(KeyboardInterrupt):
            evaluated(ledger=path)
        resumed = evaluated(ledger=path, batch_size=24)
        self.assertEqual(resumed.about["fast"], self.fast.about["fast"])
        np.testing.assert_array_equal(resumed.fooled_by, self.fast.fooled_by)
        self.assertEqual(resumed.flags, self.fast.flags)
        self.assertCountEqual(jobs(path), jobs(self.folder / "fast.jsonl"))

    def test_what_is_in_doubt_stays_in_doubt(self):
        """A point that a last pass does not confirm is flagged, also by who continues."""
        path = self.folder / "doubt.jsonl"
        evaluated("fast", ledger=path)
        text = path.read_text().splitlines()
        changed = [json.loads(line) for line in text[1:]]
        standing = set(IDS[self.whole.robust].tolist())
        standing -= {r["image"] for r in changed if r["attack"] == "apgd-t"}  # of the sample
        row = next(r for r in changed if r["attack"] == f"apgd-t{PART}" and r["image"] in standing)
        row["doubtful"] = True
        path.write_text("\n".join([text[0], *map(json.dumps, changed)]) + "\n")
        for version in ("fast", "standard", "standard"):
            self.assertIn("unconfirmed by apgd-t", evaluated(version, ledger=path).flags)

    def test_record(self):
        record = self.fast.record(model="mine")
        self.assertEqual((record["method"], record["version"]), ("fast version", "fast"))
        self.assertEqual(record["fast"], self.fast.about["fast"])
        self.assertIn("fast", record["flags"])
        read = AccuracyRecord.from_json(json.loads(json.dumps(record)))
        self.assertEqual(read.to_json(), record)
        self.assertNotEqual(record["evaluation"], self.whole.record()["evaluation"])
        self.assertIn("not from AutoAttack", self.fast.table())

    def test_what_is_said(self):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            evaluated(verbose=True)
        about = self.fast.about["fast"]
        words = (
            f"{about['survivors']} images survive; running all remaining attacks on "
            f"{about['sampled']} of them, chosen at random"
        )
        self.assertIn(words, said.getvalue())
        nearest = r"running apgd-t and fab-t on the \d+ near a boundary\n"
        self.assertRegex(said.getvalue(), nearest)


CHILD = """
import sys
from jaxrobust.runtime.processes.launch import join_hosts
join_hosts()
import jax
import numpy as np
from tests.evaluation.engine import test_fast as of

path, out = sys.argv[1:]
result = of.evaluated(ledger=path)
np.savez(f"{out}-{jax.process_index()}.npz", about=str(result.about["fast"]),
         fooled_by=result.fooled_by, flags=sorted(result.flags.items()))
"""


@pytest.mark.slow
class HostsTest(absltest.TestCase):
    def test_two_processes_do_what_one_does(self):
        folder = Path(self.create_tempdir())
        path = folder / "ledger.jsonl"
        codes, said = wait(start(2, 1, ["-c", CHILD, str(path), str(folder / "out")]))
        self.assertEqual(codes, [0, 0], said)
        alone = evaluated()
        for process in range(2):
            found = np.load(folder / f"out-{process}.npz")
            self.assertEqual(str(found["about"]), str(alone.about["fast"]))
            np.testing.assert_array_equal(found["fooled_by"], alone.fooled_by)
            flags = [list(pair) for pair in sorted(alone.flags.items())]
            self.assertEqual(found["flags"].tolist(), flags)
        finished = evaluated("standard", ledger=path)
        np.testing.assert_array_equal(finished.fooled_by, evaluated("standard").fooled_by)
        made = [(r["image"], r["attack"]) for file in folder.glob("*.jsonl") for r in rows(file)]
        self.assertLen(set(made), len(made))


class BudgetTest(parameterized.TestCase):
    # CIFAR-10 in linf: 9,721 passes of the standard version, 1,030 of the part, 2,220 of the other
    # targets of APGD-T and four of FAB-T, 8,711 of the rest.
    @sweeps.rows((1000, 0, 50), (1000, 400_000, 13), (20, 5_000, 1), (1, 0, 1), (0, 10**6, 0))
    def test_spends_what_is_left_of_the_share(self, standing, fallen, count):
        budget, near = Budget(total=9721, first=1030, near=2220, remaining=8711), standing // 8
        self.assertEqual(budget.sampled(standing, near, fallen), count)
        if count > 1:
            spent = fallen + standing * 1030 + near * 2220 + count * 8711
            self.assertBetween(0.18 * (fallen + standing * 9721) - spent, 0, 8711)

    def test_a_part_that_is_all(self):
        self.assertEqual(Budget(total=100, first=100, near=0, remaining=0).sampled(7, 0, 0), 1)


class FewClassesTest(absltest.TestCase):
    def test_all_targets_of_four_classes_are_met_at_once(self):
        """APGD-T has no other targets then: the nearest images meet FAB-T alone, at all three."""
        random = np.random.default_rng(0)
        weights = random.standard_normal((16, 4)).astype(np.float32)
        logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
        images = random.random((40, 4, 4, 1), np.float32)
        labels = np.asarray(logits_fn(images)).argmax(1)
        how = {"norm": "linf", "epsilon": 0.05, "version": "fast", "verbose": False}
        found = autoattack(logits_fn, images, labels, **how)
        (fab,) = (cost for cost in found.costs if cost.attack == "fab-t")
        self.assertEqual(int(found.robust.sum()), 16)
        # An eighth of the 16 survivors and one of the sample, 100 steps at each of 3 targets.
        self.assertEqual((fab.forward, fab.backward), (3 * 3 * 200, 3 * 3 * 100))


class RefusedTest(parameterized.TestCase):
    @sweeps.rows(
        ({"attacks": ("apgd-ce",)}, "fixes the attacks and their settings; leave attacks out"),
        ({"overrides": {"apgd-ce": {"steps": 2}}}, "and their settings; leave overrides out"),
        ({"stop": StopRule(width=0.2)}, "version='fast' cannot be combined with stop; omit one"),
        ({"robust_beyond": np.ones(N, bool)}, "cannot be combined with robust_beyond"),
        ({"search_fn": lambda x: net(x)}, "cannot be combined with search_fn"),
        ({"rule": "mean"}, "is for randomized networks; pass version='rand'"),
    )
    def test_what_contradicts_it(self, given, message):
        with self.assertRaisesRegex(ValueError, message):
            evaluated(**given)

    def test_a_ledger_of_parts_without_their_jobs(self):
        path = Path(self.create_tempdir()) / "ledger.jsonl"
        evaluated(ledger=path)
        path.write_text(path.read_text().replace('"tried": {"targets"', '"tried": {"aims"'))
        with self.assertRaisesRegex(ValueError, r"line \d+ is not a verdict; remove that line"):
            evaluated(ledger=path)
