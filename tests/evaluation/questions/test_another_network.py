"""A record or ledger of another network, or of other images of the same names, answers nothing."""

import contextlib
import json
import re
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust import evaluation
from jaxrobust.commands import compare
from jaxrobust.evaluation.network import fingerprint
from jaxrobust.evaluation.records.stopping import StopRule
from tests.support import command_calls, sweeps
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

N = 120
NET = """
import jax
import jax.numpy as jnp
import numpy as np
weights = np.random.default_rng(0).normal(size=(64, 10)).astype("f")
def logits_fn(x):
    logits = x.reshape(len(x), -1) @ weights
    return {}
"""
SAME = "1.0 * logits"  # as another program
NEGATED = "jnp.where(x.mean((1, 2, 3), keepdims=False)[:, None] > 0.5, -logits, logits)"
MASKED = "jnp.where(x.mean((1, 2, 3))[:, None] > 0.5, jax.lax.stop_gradient(logits), logits)"
BALL = {"norm": "linf", "epsilon": "0.01", "attack": "apgd-ce", "steps": 2}


def images(seed: int = 1) -> np.ndarray:
    """Dark images of a class in front, bright ones at the end, as of a sorted folder."""
    x = np.random.default_rng(seed).random((N, 8, 8, 1))
    return np.sort(np.linspace(0.2, 0.8, N))[:, None, None, None] + 0.4 * (x - 0.5)


def labels(x: np.ndarray) -> np.ndarray:
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype("f")
    return (np.round(255 * x).reshape(len(x), -1) @ weights).argmax(1)


class CommandCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        self.data(images())

    def data(self, x: np.ndarray, label: np.ndarray | None = None) -> None:
        label = labels(x) if label is None else label
        np.savez("data.npz", image=np.round(255 * x).astype(np.uint8), label=label)

    def net(self, returned: str = "logits") -> None:
        Path("nets.py").write_text(NET.format(returned))

    def evaluate(self, **flags) -> tuple[dict, str]:
        given = {"function": "nets.py:logits_fn", "dataset": "npz:data.npz", "split": "all"}
        printed, said = ended(call(**(given | BALL | {"out": "out"} | flags)))
        folder = Path(flags.get("out", "out"))
        last = re.findall(r"^record (\w+) in", printed, re.M)[-1]
        rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
        return [row for row in rows if row["evaluation"] == last][-1], said


@contextlib.contextmanager
def other_version():
    """As after a commit, which may write every program otherwise."""
    known = fingerprint.versions()
    with mock.patch.object(fingerprint, "versions", lambda: known | {"commit": "f" * 40}):
        yield


class RecordTest(CommandCase):
    def test_the_same_network_as_another_program_is_answered(self):
        self.net()
        first, _ = self.evaluate()
        self.net(SAME)
        with other_version():
            again, said = self.evaluate()
        self.assertEqual(again["evaluation"], first["evaluation"])
        self.assertIn("already done", said)

    def test_a_network_that_differs_on_bright_images(self):
        """Was answered by the old record: it was probed with eight dark images of one class."""
        self.net()
        first, _ = self.evaluate()
        self.net(NEGATED)
        with other_version():
            other, said = self.evaluate()
        self.assertNotIn("already done", said)
        self.assertLess(other["clean"], first["clean"] - 0.2)

    def test_a_network_that_hides_its_gradient_on_bright_images(self):
        self.net()
        first, _ = self.evaluate()
        self.net(MASKED)
        with other_version():
            other, said = self.evaluate()
        self.assertNotIn("already done", said)
        self.assertEqual(other["clean"], first["clean"])

    @parameterized.parameters((SAME, True), (NEGATED, False))
    def test_the_record_of_an_older_version(self, returned, answers):
        """Its eight images prove little: the clean answers of all images are compared too."""
        self.net()
        first, _ = self.evaluate()
        path = Path("out/results.jsonl")
        row = json.loads(path.read_text())
        for name in ("spread_logits", "spread_gradients"):
            del row["fingerprint"]["probe"][name]
        path.write_text(json.dumps(row) + "\n")
        for ledger in Path("out").glob("ledger*"):
            ledger.unlink()
        self.net(returned)
        with other_version():
            other, said = self.evaluate()
        self.assertEqual(other["evaluation"] == first["evaluation"], answers)
        if answers:
            self.assertIn(f"only {N} clean answers show that it is for this network", said)
        else:
            self.assertRegex(said, rf"\d+ of {N} clean answers differ, so it is not used")


class SpreadTest(parameterized.TestCase):
    @sweeps.rows((0, 0), (5, 0), (9, 1), (64, 56), (65, 56), (500, 56))
    def test_all_of_few_images_and_some_of_many(self, n, count):
        x = np.random.default_rng(0).random((n, 4, 4, 1)).astype("f")
        places = fingerprint.spread(x, np.arange(n) // 50)
        self.assertLen(places, count)
        self.assertLen(set(places.tolist()), count)
        self.assertTrue((places >= 8).all() and (places < max(n, 1)).all())

    def test_extremes_and_classes(self):
        draws = np.random.default_rng(0)
        x = draws.random((500, 4, 4, 1)) * draws.random((500, 1, 1, 1)) ** 2
        of = np.arange(500) // 50
        places = fingerprint.spread(x.astype("f"), of)
        bright, rich = x.mean((1, 2, 3))[8:], x.std((1, 2, 3))[8:]
        for end in (bright.argmin(), bright.argmax(), rich.argmin(), rich.argmax()):
            self.assertIn(end + 8, places)
        self.assertLen(set(of[places].tolist()), 10)

    def test_images_that_cannot_be_read_are_left_out(self):
        class Damaged:
            shape = (200, 2, 2, 1)

            def __len__(self):
                return 200

            def __getitem__(self, which):
                if (np.asarray(which) == 20).any():
                    raise ValueError("damaged")
                return np.random.default_rng(0).random((len(which), 2, 2, 1), np.float32)

        places = fingerprint.spread(Damaged())
        self.assertLen(places, 56)
        self.assertGreaterEqual(places.min(), 40)


def linear(factors: np.ndarray):
    """A network of one program, whose callback negates the logits of some images."""
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype("f")

    def logits_fn(w, x):
        flip = jax.pure_callback(
            lambda m: np.where(m > 0.5, *factors).astype("f"),
            jax.ShapeDtypeStruct(x.shape[:1], np.float32),
            jax.lax.stop_gradient(x.mean((1, 2, 3))),
        )
        return (x.reshape(len(x), -1) @ w) * flip[:, None]

    return jax.tree_util.Partial(logits_fn, weights)


class LedgerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "ledger.jsonl"
        self.images = np.clip(images(), 0, 1).astype(np.float32)
        self.labels = labels(images())

    def evaluate(self, network, **more):
        how = {"norm": "linf", "epsilon": 0.01, "attacks": ("apgd-ce",), "verbose": False}
        how |= {"overrides": {"apgd-ce": {"steps": 2}}, "ledger": self.path}
        return evaluation.autoattack(network, self.images, self.labels, **(how | more))

    @parameterized.parameters(True, False)
    def test_clean_answers_of_all_images(self, older):
        """A ledger was continued by another network whose first eight images agree."""
        first = self.evaluate(linear((1, 1)))
        self.assertEqual(self.evaluate(linear((1, 1))).robust.tolist(), first.robust.tolist())
        head, *rows = self.path.read_text().splitlines()
        about = json.loads(head)
        self.assertLen(about["answers"], N)
        for name in ("logits", "gradients"):  # as if the probe had seen nothing
            del about["identity"]["fingerprint"]["probe"][f"spread_{name}"]
        if older:
            about = {"identity": about["identity"]}
        before = "\n".join([json.dumps(about), *rows]) + "\n"
        self.path.write_text(before)
        words = rf"its network gave different answers on \d+ of {N} clean images. Pass another"
        with self.assertRaisesRegex(ValueError, words):
            self.evaluate(linear((-1, 1)))
        self.assertEqual(self.path.read_text(), before)
        with mock.patch("jaxrobust.evaluation.engine.ledger.say") as said:
            self.evaluate(linear((1, 1)))
        self.assertEqual(said.called, older)
        if older:
            self.assertIn("an older version that stored no answers", said.call_args.args[0])

    def test_other_images_of_the_same_ids(self):
        """Were compared as if they were the same, and their points replayed."""
        network = linear((1, 1))
        first = self.evaluate(network, ledger=None)
        self.images = self.images[:60, ::-1].copy()
        self.labels = np.asarray(network(self.images)).argmax(1)
        against = first.verdicts._replace(labels=np.resize(self.labels, N))
        words = "are for different images: 60 of 60 images with the same names differ"
        with self.assertRaisesRegex(ValueError, words):
            self.evaluate(network, ledger=None, stop=StopRule(against=against))


class OtherImagesTest(CommandCase):
    """Two data sets of one name, of which fewer images were evaluated the second time."""

    def setUp(self):
        super().setUp()
        self.net()
        self.evaluate(out="first", n=N)
        self.data(images()[:, ::-1], labels(images()))

    def test_compare(self):
        """Said that a network is more robust than itself, on images that were not the same."""
        self.evaluate(out="second", n=90)
        said = refused(command_calls.words(compare.main, "first", "second"))
        self.assertIn("90 of 90 images with the same names differ", said)

    def test_against(self):
        given = {"function": "nets.py:logits_fn", "dataset": "npz:data.npz", "split": "all"}
        said = refused(call(**(given | BALL), n=90, out="second", against="first"))
        self.assertIn("--against=first evaluated different images: 90 of 90 images", said)

    def test_replay(self):
        given = {"function": "nets.py:logits_fn", "dataset": "npz:data.npz", "split": "all"}
        said = refused(call(**(given | BALL), n=90, out="second", replay=["first"]))
        self.assertRegex(said, "ledger-.* is for different images: 90 of 90 images with the same")

    def test_the_same_images_are_compared(self):
        self.data(images())
        self.evaluate(out="second", n=90)
        printed, _ = ended(command_calls.words(compare.main, "first", "second"))
        self.assertIn("A and B have the same robust accuracy", printed)
        self.assertNotIn("Only the images' names show", printed)

    def test_what_older_records_cannot_show_is_said(self):
        self.data(images())
        self.evaluate(out="second", n=90)
        (path,) = Path("second").glob("verdicts-*.json")
        found = json.loads(path.read_text())
        del found["hashes"]
        path.write_text(json.dumps(found))
        printed, _ = ended(command_calls.words(compare.main, "first", "second"))
        self.assertIn("Only the images' names show that B evaluated the same images as A", printed)
