"""An evaluation that stops when it is decided: the standard verdicts of the images that it met."""

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

from jaxrobust.evaluation import Cost, autoattack
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.network.images import Subset
from jaxrobust.evaluation.records import sequences
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.stopping import StopRule
from tests.support.processes import start, wait

N = 260
IDS = np.arange(1000, 1000 + N)
_RNG = np.random.default_rng(0)
IMAGES = _RNG.random((N, 4, 4, 1), np.float32)
WEIGHTS = _RNG.standard_normal((16, 10)).astype(np.float32)
LABELS = np.argmax(IMAGES.reshape(N, -1) @ WEIGHTS, axis=1)
LABELS[::9] = (LABELS[::9] + 1) % 10  # some are wrong as they are
ATTACKS = ("apgd-ce", "square")
SETTINGS = {
    "norm": "linf",
    "epsilon": 0.05,
    "attacks": ATTACKS,
    "overrides": {"apgd-ce": {"steps": 3}, "square": {"steps": 40}},
    "batch_size": 16,
    "seed": 3,
    "verbose": False,
}


@jax.tree_util.Partial
def net(x):
    """A network of tiny images, whose gradient vanishes on some of them."""
    logits = x.reshape(len(x), -1) @ WEIGHTS
    rounded = jax.lax.stop_gradient(logits)
    return jax.numpy.where(x[:, :1, 0, 0] < 0.5, rounded, logits)


def evaluated(**given):
    return autoattack(net, IMAGES, LABELS, image_ids=IDS, **SETTINGS | given)


def lines(path: Path) -> list[str]:
    """The verdicts of a ledger, but where their images are stored, sorted."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    plain = ({k: v for k, v in row.items() if k != "stored"} for row in rows)
    return sorted(json.dumps(row, sort_keys=True) for row in plain)


def counts(result) -> dict:
    return {c.attack: (c.fooled, c.forward, c.backward) for c in result.costs}


@pytest.mark.computes
class LotsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.whole = evaluated(ledger=cls.folder / "whole.jsonl")
        cls.stopped = evaluated(ledger=cls.folder / "own.jsonl", stop=StopRule(width=0.2))

    def test_stops_with_the_standard_verdicts_of_what_it_met(self):
        about = self.stopped.about["stopped"]
        self.assertEqual((about["rule"], about["of"], about["order_seed"]), ("width", N, 3))
        n = about["stopped_after"]
        self.assertIn(n, sequences.lots(N)[:-1])
        met = np.sort(sequences.order(3, IDS.tolist())[:n])
        np.testing.assert_array_equal(self.stopped.verdicts.image_ids, IDS[met])
        for name in ("clean", "robust", "fooled_by", "images_adv", "answers"):
            np.testing.assert_array_equal(
                getattr(self.stopped, name), getattr(self.whole, name)[met]
            )
        for own, theirs in zip(self.stopped.verdicts, self.whole.verdicts, strict=True):
            np.testing.assert_array_equal(own, theirs[met])
        self.assertSetEqual(set(self.stopped.fooled_by), {"", "clean", *ATTACKS})
        self.assertEqual(self.stopped.accuracy_after["square"], self.stopped.robust.mean())
        fallen = np.isin(self.stopped.fooled_by, ("clean", "apgd-ce"))
        self.assertEqual(self.stopped.accuracy_after["apgd-ce"], 1 - fallen.mean())
        low, high = about["robust"]
        self.assertLess(high - low, 0.2)
        self.assertBetween(self.whole.robust.mean(), low, high)

    def test_the_plain_call_finishes_it_and_does_nothing_twice(self):
        path = self.folder / "finished.jsonl"
        first = evaluated(ledger=path, stop=StopRule(width=0.2))
        known = len(lines(path))
        self.assertBetween(known, len(first.robust) * 0.8, 2 * len(first.robust))
        second = evaluated(ledger=path)
        self.assertEqual(lines(path), lines(self.folder / "whole.jsonl"))
        for name in ("clean", "robust", "fooled_by", "images_adv"):
            np.testing.assert_array_equal(getattr(second, name), getattr(self.whole, name))
        self.assertEqual(second.accuracy_after, self.whole.accuracy_after)
        self.assertEqual(second.flags, self.whole.flags)
        self.assertNotIn("stopped", second.about)
        for name, (_, forward, backward) in counts(self.whole).items():
            both = [counts(result)[name] for result in (first, second)]
            self.assertEqual([sum(c[k] for c in both) for k in (1, 2)], [forward, backward])

    @parameterized.parameters(1, 3, 4)
    def test_goes_on_where_it_was_killed(self, calls):
        path, run, made = self.folder / f"killed-{calls}.jsonl", Attack.run, []

        def killed(attack, later):
            made.append(attack)
            if len(made) == calls:
                run(attack, later)  # its verdicts are in the ledger, the look is not made
                raise KeyboardInterrupt
            return run(attack, later)

        with mock.patch.object(Attack, "run", killed), self.assertRaises(KeyboardInterrupt):
            evaluated(ledger=path, stop=StopRule(width=0.2))
        resumed = evaluated(ledger=path, stop=StopRule(width=0.2), batch_size=24)
        self.assertEqual(resumed.about["stopped"], self.stopped.about["stopped"])
        np.testing.assert_array_equal(resumed.images_adv, self.stopped.images_adv)
        self.assertEqual(resumed.flags, self.stopped.flags)
        self.assertEqual(lines(path), lines(self.folder / "own.jsonl"))

    def test_all_images_without_a_decision_are_the_standard_evaluation(self):
        ended = evaluated(stop=StopRule(width=0.005))
        about = ended.about["stopped"]
        self.assertEqual((about["stopped_after"], about["robust"][0]), (N, about["robust"][1]))
        for name in ("clean", "robust", "fooled_by", "images_adv"):
            np.testing.assert_array_equal(getattr(ended, name), getattr(self.whole, name))
        self.assertEqual(ended.accuracy_after, self.whole.accuracy_after)
        self.assertIn("zero-gradients", self.whole.flags)
        self.assertEqual(ended.flags, self.whole.flags)
        self.assertEqual(counts(ended), counts(self.whole))

    def test_against_verdicts(self):
        weaker = self.whole.verdicts
        names = np.where(np.arange(N) % 5 == 0, "apgd-ce", weaker.fooled_by)
        weaker = weaker._replace(fooled_by=names, clean=weaker.clean | (names == "apgd-ce"))
        result = evaluated(ledger=self.folder / "ahead.jsonl", stop=StopRule(against=weaker))
        about = result.about["stopped"]
        self.assertEqual((about["rule"], about["leads"], about["lost"]), ("ahead", "this", 0))
        self.assertLess(about["stopped_after"], N)
        self.assertEqual(len(result.robust), about["stopped_after"])
        tied = evaluated(stop=StopRule(against=self.whole.verdicts, tie=0.05))
        self.assertEqual(tied.about["stopped"]["rule"], "tie")

    def test_against_an_evaluation_that_stopped_itself(self):
        theirs = self.stopped.verdicts
        result = evaluated(stop=StopRule(against=theirs))
        about = result.about["stopped"]
        self.assertEqual((about["rule"], about["of"]), ("images", len(theirs.labels)))
        np.testing.assert_array_equal(result.verdicts.image_ids, theirs.image_ids)

    def test_images_that_are_not_in_memory(self):
        own = Subset(IMAGES, np.arange(N))
        result = autoattack(net, own, LABELS, image_ids=IDS, **SETTINGS, stop=StopRule(width=0.2))
        np.testing.assert_array_equal(result.robust, self.stopped.robust)
        np.testing.assert_array_equal(result.images_adv[:], self.stopped.images_adv)

    def test_what_is_said(self):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            result = evaluated(verbose=True, stop=StopRule(width=0.2))
        self.assertEqual(said.getvalue().count("looked at 60 of 260 images: not decided yet"), 1)
        self.assertIn(
            "stopped after 120 of 260 images: the interval is narrower than 20", said.getvalue()
        )
        self.assertEqual(said.getvalue().count("apgd-ce: compiling"), 1)
        table = result.table()
        self.assertEqual(repr(result), table)  # not pages of arrays
        self.assertNotIn("95% interval", table)
        self.assertIn("95% confidence sequence", table)

    def test_record(self):
        record = self.stopped.record(model="mine")
        self.assertIsNone(record["interval"])
        self.assertEqual(record["stopped"], self.stopped.about["stopped"])
        self.assertEqual(record["robust"], self.stopped.robust.mean())
        self.assertEqual(len(record["image_ids"].split(", ")) > 10, True)
        self.assertEqual(record["stopped"]["images"], f"1000..{999 + N}")
        read = AccuracyRecord.from_json(json.loads(json.dumps(record)))
        self.assertEqual(read.to_json(), record)
        numbers = {record["evaluation"], self.whole.record()["evaluation"]}
        for rule in (StopRule(width=0.21), StopRule(width=0.2, alpha=0.2)):
            numbers.add(evaluated(stop=rule).record()["evaluation"])
        self.assertLen(numbers, 4)
        again = evaluated(ledger=self.folder / "own.jsonl", stop=StopRule(width=0.2))
        self.assertEqual(again.record()["evaluation"], record["evaluation"])


CHILD = """
import os, signal, sys
from jaxrobust.runtime.processes.launch import join_hosts
join_hosts()
import jax
import numpy as np
from jaxrobust.evaluation.engine.ledger import Ledger
from jaxrobust.evaluation.records.stopping import StopRule
from tests.evaluation.engine import test_lots as of

path, out, dies = sys.argv[1:]
add, added = Ledger.add, []

def counted(*arguments):
    add(*arguments)
    added.append(arguments)
    if len(added) == int(dies) and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

Ledger.add = counted
result = of.evaluated(ledger=path, stop=StopRule(width=0.2))
about = sorted((k, str(v)) for k, v in result.about["stopped"].items())
np.savez(f"{out}-{jax.process_index()}.npz", about=about, robust=result.robust,
         fooled_by=result.fooled_by, flags=sorted(result.flags.items()))
"""


@pytest.mark.slow
class HostsTest(absltest.TestCase):
    def test_all_look_at_agreed_times(self):
        """Two processes stop where one does; one continues with their ledger."""
        folder = Path(self.create_tempdir())
        path = folder / "ledger.jsonl"
        codes, said = wait(start(2, 1, ["-c", CHILD, str(path), str(folder / "out"), "0"]))
        self.assertEqual(codes, [0, 0], said)
        self.check_same(folder, 2)
        whole = evaluated(ledger=path)
        np.testing.assert_array_equal(whole.fooled_by, evaluated().fooled_by)
        self.check_nothing_twice(folder)

    def test_a_pod_that_is_killed_between_two_looks(self):
        """Three processes, of which one dies behind the first lot; two continue."""
        folder = Path(self.create_tempdir())
        command = ["-c", CHILD, str(folder / "ledger.jsonl"), str(folder / "out")]
        codes, said = wait(start(3, 1, [*command, "45"]))
        self.assertEqual(codes[1], -9, said)
        self.assertNotIn(0, codes, said)
        self.assertEmpty(list(folder.glob("*.npz")))
        begun = [line for file in folder.glob("*.jsonl") for line in lines(file)]
        self.assertGreater(len({json.loads(line)["image"] for line in begun}), 60)  # of a lot
        codes, said = wait(start(2, 1, [*command, "0"]))
        self.assertEqual(codes, [0, 0], said)
        self.check_same(folder, 2)
        self.check_nothing_twice(folder)

    def check_same(self, folder, processes):
        alone = evaluated(stop=StopRule(width=0.2))
        for process in range(processes):
            found = np.load(folder / f"out-{process}.npz")
            about = sorted((k, str(v)) for k, v in alone.about["stopped"].items())
            self.assertEqual(found["about"].tolist(), [list(pair) for pair in about])
            np.testing.assert_array_equal(found["robust"], alone.robust)
            np.testing.assert_array_equal(found["fooled_by"], alone.fooled_by)
            flags = [list(pair) for pair in sorted(alone.flags.items())]
            self.assertEqual(found["flags"].tolist(), flags)

    def check_nothing_twice(self, folder):
        rows = [line for file in folder.glob("*.jsonl") for line in lines(file)]
        self.assertEqual(len(rows), len({(r["image"], r["attack"]) for r in map(json.loads, rows)}))


class RefusedTest(parameterized.TestCase):
    def test_what_changes_verdicts_afterwards(self):
        some = {"search_fn": lambda x: net(x)}, {"robust_beyond": np.ones(N, bool)}
        some = *some, {"replay": ["ledger.jsonl"]}
        for given, name in zip(some, ("search_fn", "robust_beyond", "replay"), strict=True):
            message = f"{name} may change verdicts that stop has already used"
            with self.assertRaisesRegex(ValueError, message):
                evaluated(stop=StopRule(width=0.2), **given)
        random = lambda x, keys: net(x)  # noqa: E731
        given = {k: v for k, v in SETTINGS.items() if k not in ("attacks", "overrides")}
        with self.assertRaisesRegex(ValueError, "version='rand' may change verdicts"):
            autoattack(random, IMAGES, LABELS, **given, version="rand", stop=StopRule(width=0.2))

    def test_a_rule_that_cannot_be_meant(self):
        with self.assertRaisesRegex(ValueError, "is too narrow for 260 images"):
            evaluated(stop=StopRule(width=0.001))


class CostTest(absltest.TestCase):
    def test_lots_add_up(self):
        first = Cost("square", 1, 2, 3, 4, 5.0, 6.0)
        second = Cost("square", 10, 20, 30, 40, 50.0, 60.0)
        self.assertEqual(first.plus(second), ("square", 11, 22, 33, 44, 55.0, 66.0))
