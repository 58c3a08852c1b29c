"""Numbers that claim more than was done: each fault that a rival, forger or defender found."""

import contextlib
import copy
import importlib.util
import itertools
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from safetensors.numpy import save_file

from jaxrobust import data, evaluation
from jaxrobust.attacks import ensembles
from jaxrobust.commands import compare, select
from jaxrobust.config import VERSION
from jaxrobust.evaluation.bundles import claims, findings
from jaxrobust.evaluation.engine import accuracy, engine, outcome, replay
from jaxrobust.evaluation.network import checks, fingerprint, randomised, tracing
from jaxrobust.evaluation.questions import several
from jaxrobust.evaluation.records import of_weights, records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report import gathered
from jaxrobust.report.parts import commands, comparison, sentences
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.devices import sharding
from jaxrobust.training.run import warnings
from jaxrobust.types import Classifier
from jaxrobust.weights.trained import history, kept
from tests.support import (
    bundles,
    command_calls,
    forgeries,
    four_sources,
    images,
    paths,
    reports,
    result_lines,
    rows,
    runs,
    sweeps,
    twins,
)
from tests.support.evaluations import call

RNG = np.random.default_rng(0)
IMAGES = (RNG.integers(0, 256, (12, 4, 4, 1)) / 255).astype(np.float32)  # of 8 bits
WEIGHTS = RNG.standard_normal((16, 10)).astype(np.float32)
LABELS = np.argmax(IMAGES.reshape(12, -1) @ WEIGHTS, axis=1)
TWINS = list(itertools.combinations(twins.FRONTS, 2))


def evaluated(logits_fn, ledger=None, **changes):
    settings = {"norm": "linf", "epsilon": 0.1, "attacks": ("square",), "verbose": False}
    settings |= {"overrides": {"square": {"steps": 2}}, "batch_size": 8, "ledger": ledger}
    given = {"images": IMAGES, "labels": LABELS} | settings | changes
    return evaluation.autoattack(logits_fn, given.pop("images"), given.pop("labels"), **given)


class IdentityTest(parameterized.TestCase):
    """An evaluation is continued by what computes the same on the same images, and nothing else."""

    kept: ClassVar[dict[str, tuple]] = {}  # name of a front -> network, record, ledger

    def setUp(self):
        super().setUp()
        self.ledger = Path(self.create_tempdir()) / "ledger.jsonl"

    def refused(self, message, logits_fn, **changes):
        with self.assertRaisesRegex(ValueError, f"belongs to another evaluation: .*{message}"):
            evaluated(logits_fn, self.ledger, **changes)

    @parameterized.parameters(*TWINS)
    def test_twins_of_equal_arrays_and_logits(self, first, second):
        """Whoever masks gradients leaves a ledger for whoever does not, or the other way round."""
        for name in (first, second):
            if name not in self.kept:
                net = twins.network(twins.FRONTS[name], WEIGHTS)
                ledger = self.ledger.with_stem(f"of-{name}")
                self.kept[name] = net, evaluated(net, ledger).record(), ledger.read_text()
        (one, record, lines), (other, alone, _) = self.kept[first], self.kept[second]
        np.testing.assert_array_equal(one(IMAGES), other(IMAGES))
        self.assertEqual(record["function"], alone["function"])  # the arrays are equal
        self.assertNotEqual(record["evaluation"], alone["evaluation"])
        self.ledger.write_text(lines)
        self.refused("a different program computes its", other)

    def test_a_ledger_of_masked_gradients_made_the_other_look_robust(self):
        masked, open_ = (
            twins.network(twins.FRONTS[name], WEIGHTS) for name in ("masked", "straight through")
        )
        apgd = {"attacks": ("apgd-ce",), "overrides": {"apgd-ce": {"steps": 3}}, "epsilon": 0.2}
        looks = evaluated(masked, self.ledger, **apgd).robust.mean()
        self.refused("a different program computes its", open_, **apgd)
        self.assertGreater(looks, evaluated(open_, **apgd).robust.mean() + 0.2)

    @parameterized.parameters(
        ("its arrays .weights. differ", {"weights": WEIGHTS + 1e-6}),
        ("a different program computes its logits", {"front": lambda x: x * np.float32(0.999)}),
        ("its images or labels", {"images": IMAGES[::-1]}),
        ("its images or labels", {"images": np.where(IMAGES.max() == IMAGES, 0, IMAGES)}),
        ("its images or labels", {"labels": (LABELS + 1) % 10}),
        ("its images or labels", {"image_ids": range(1, 13)}),
        ("epsilon is 0.1 there", {"epsilon": 0.11}),
        ("seed is 0 there", {"seed": 1}),
        ("search used another network", {"search_fn": True}),
    )
    def test_what_else_is_another_evaluation(self, message, changes):
        evaluated(twins.network(lambda x: x, WEIGHTS), self.ledger)
        changes = dict(changes)
        front, weights = changes.pop("front", lambda x: x), changes.pop("weights", WEIGHTS)
        logits_fn = twins.network(front, weights)
        if "search_fn" in changes:
            changes["search_fn"] = twins.network(twins.rounded, WEIGHTS)
        self.refused(message, logits_fn, **changes)

    def test_code_that_a_program_only_calls(self):
        """The programs are equal to the letter; the probe tells them apart."""
        evaluated(twins.network(twins.through_python(1.0), WEIGHTS), self.ledger)
        evaluated(twins.network(twins.through_python(1.0), WEIGHTS), self.ledger)
        other = twins.network(twins.through_python(1.1), WEIGHTS)
        self.refused("logits on eight noisy images differ", other)

    def test_a_search_network_with_masked_gradients(self):
        """It decides nothing, but what it does not find stays robust."""
        net = twins.network(lambda x: x, WEIGHTS)
        masked = twins.network(twins.rounded, WEIGHTS)
        evaluated(net, self.ledger, search_fn=masked)
        self.refused("search used another", net, search_fn=net)

    def test_names_and_addresses_compute_nothing(self):
        def first(w, x):
            return jax.jit(twins.linear)(w, twins.straight_through(x))

        @jax.custom_vjp
        def renamed(x):
            return twins.rounded(x)

        renamed.defvjp(lambda x: (twins.rounded(x), None), lambda _, g: (g,))

        def second(weights, images):
            def inner(weights, images):
                return images.reshape(len(images), -1) @ weights

            return jax.jit(inner)(weights, renamed(images))

        evaluated(twins.Partial(first, WEIGHTS), self.ledger)
        evaluated(twins.Partial(second, WEIGHTS), self.ledger)

    def by_another_version(self, **changes):
        """The ledger as another version wrote it: another text of the program."""
        first, *lines = self.ledger.read_text().splitlines(keepends=True)
        head = json.loads(first)
        known = head["identity"]["fingerprint"]
        known |= {"program": "a" * 64, "gradient": "b" * 64} | changes
        known["versions"] |= {"jax": "0.9.9", "commit": "c" * 40}
        self.ledger.write_text("".join([json.dumps(head) + "\n", *lines]))

    def test_another_version_of_the_same_network_goes_on_and_is_named(self):
        net = twins.network(twins.straight_through, WEIGHTS)
        evaluated(net, self.ledger)
        self.by_another_version()
        found = evaluated(net, self.ledger)
        self.assertEqual(found.costs[0].forward, 0)
        known = found.record()["fingerprint"]
        self.assertEqual(known["begun_by"]["jax"], "0.9.9")
        self.assertEqual(known["versions"]["jax"], jax.__version__)

    @parameterized.parameters("masked", "half the gradient")
    def test_another_version_excuses_no_other_gradient(self, front):
        evaluated(twins.network(twins.FRONTS[front], WEIGHTS), self.ledger)
        self.by_another_version()
        said = r"gradients on eight noisy images differ \(there .*jax 0.9.9"
        self.refused(said, twins.network(twins.straight_through, WEIGHTS))

    @parameterized.parameters("arrays", "images")
    def test_another_version_excuses_no_other_arrays_or_images(self, key):
        evaluated(twins.network(twins.straight_through, WEIGHTS), self.ledger)
        self.by_another_version(**{key: "d" * 64})
        said = {"arrays": "its arrays", "images": "its images or labels"}[key]
        self.refused(said, twins.network(twins.straight_through, WEIGHTS))

    def test_equal_versions_excuse_no_other_program(self):
        evaluated(twins.network(twins.straight_through, WEIGHTS), self.ledger)
        self.by_another_version(versions=fingerprint.versions())
        text = self.ledger.read_text()
        for key in ("jax", "commit"):
            now = fingerprint.versions()[key]
            text = text.replace({"jax": "0.9.9", "commit": "c" * 40}[key], now)
        self.ledger.write_text(text)
        self.refused(
            "a different program computes its logits",
            twins.network(twins.straight_through, WEIGHTS),
        )

    def test_a_replayed_ledger_of_a_twin_counts_as_another_network(self):
        masked, open_ = (
            twins.network(twins.FRONTS[name], WEIGHTS) for name in ("masked", "straight through")
        )
        evaluated(open_, self.ledger)
        taken = tracing.argument("", masked, sharding.make_mesh())
        own = fingerprint.of_network(taken, IMAGES, batch=8)
        self.assertNotEqual(replay.source(self.ledger).network, list(own.exact.values()))


BODY = """
import jax
import jax.numpy as jnp
import numpy as np

weights = np.load("weights.npy")


def front(x):
    return {front}
"""
NETS = """
import jax

import body


def logits_fn(x):
    return body.front(x).reshape(len(x), -1) @ body.weights


def build(num_classes, image_size, in_channels):
    from jaxrobust.types import Classifier

    def apply(params, stats, images, *, train=False, key=None):
        return body.front(images).reshape(len(images), -1) @ params["kernel"], stats

    def init(key):
        return {"kernel": jax.numpy.zeros((image_size**2 * in_channels, num_classes))}, {}

    return Classifier(init, apply)
"""
TORCH = """
import numpy as np
import torch

import body_of_torch


class Net(torch.nn.Module):
    def forward(self, x):
        return body_of_torch.front(x).flatten(1) @ torch.from_numpy(np.load("weights.npy"))


def build():
    return Net().eval()
"""


class AnsweredTest(parameterized.TestCase):
    """The command says "already done" of what it did, by what is computed, not by names."""

    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        self.enter_context(mock.patch.object(sys, "path", [*sys.path]))
        self.enter_context(mock.patch.object(sys, "dont_write_bytecode", True))
        self.addCleanup(self.forget)
        np.save("weights.npy", digits_regression())
        Path("nets.py").write_text(NETS)
        Path("torch_nets.py").write_text(TORCH)

    def forget(self):
        for name in ("body", "body_of_torch"):
            sys.modules.pop(name, None)
        functions._loaded.clear()
        importlib.invalidate_caches()

    def fronts(self, front):
        """What the imported file computes from now on; as a new process would see it."""
        Path("body.py").write_text(BODY.format(front=front))
        Path("body_of_torch.py").write_text(BODY.format(front=front))
        self.forget()

    def ask(self, **given):
        common = {"dataset": "digits", "n": 20, "out": "out", "epsilon": "0.05", "attack": "clean"}
        code, printed, said = call(**common | given)
        self.assertEqual(code, 0, said)
        return result_lines.read(Path(str((common | given)["out"])))[-1], said, printed

    @parameterized.parameters("function", "torch", "model")
    def test_a_file_that_the_named_one_imports(self, flag):
        if flag == "torch" and not importlib.util.find_spec("torch"):
            self.skipTest(paths.PARITY)
        given = {"function": "nets.py:logits_fn", "torch": "torch_nets.py:build"}
        network = {flag: given.get(flag, "nets.py:build")}
        if flag == "model":
            save_file({"kernel": np.load("weights.npy")}, "weights.safetensors")
            network["weights"] = "weights.safetensors"
        self.fronts("x")
        first, *_ = self.ask(**network)
        again, said, _ = self.ask(**network)
        self.assertIn("already done", said)
        self.assertEqual(first, again)
        self.fronts("1 - x")
        changed, said, _ = self.ask(**network)
        self.assertNotIn("already done", said)
        self.assertNotEqual(first["evaluation"], changed["evaluation"])
        self.assertLess(changed["clean"], first["clean"] - 0.3)
        self.fronts("x")
        self.assertIn("already done", self.ask(**network)[1])

    def test_half_a_ledger_of_another_file(self):
        self.fronts("jax.lax.stop_gradient(x)")
        given = {"function": "nets.py:logits_fn", "attack": "apgd-ce", "steps": 3, "n": 8}
        given |= {"epsilon": "0.2"}
        masked, *_ = self.ask(**given)
        Path("out/results.jsonl").unlink()  # as if it had been killed at its end
        self.fronts("x")
        found, *_ = self.ask(**given)
        self.assertLess(found["robust"], masked["robust"])
        self.assertLen(list(Path("out").glob("ledger-*.jsonl")), 2)

    def test_callbacks_whose_code_changed_keep_ledgers_of_their_own(self):
        front = (
            "jax.pure_callback(lambda y: {}(y), jax.ShapeDtypeStruct(x.shape, x.dtype), "
            "jax.lax.stop_gradient(x))"
        )
        given = {"function": "nets.py:logits_fn"}
        self.fronts(front.format("np.asarray"))
        first, *_ = self.ask(**given)
        self.fronts(front.format("np.zeros_like"))
        second, *_ = self.ask(**given)
        self.assertLess(second["clean"], first["clean"])
        _, said, printed = self.ask(**given)
        self.assertIn("already done", said)
        self.assertIn(f"{second['clean']:.1%}", printed)
        self.fronts(front.format("np.asarray"))
        self.assertIn(f"{first['clean']:.1%}", self.ask(**given)[2])

    @parameterized.parameters("npz", "folder", "tfds", "hf")
    def test_other_images_under_the_same_names(self, kind):
        """A model that is right on black pictures, then the pictures are replaced."""
        Path("black.py").write_text(
            "import jax.numpy as jnp\n"
            "def logits_fn(x):\n"
            "    bright = x.mean((1, 2, 3)) > 0.5\n"
            "    return jnp.stack([1.0 - bright, 1.0 * bright], 1)\n"
        )
        if kind == "hf":
            four_sources.cache_hugging_face(self, Path("cache"))
        given = {"function": "black.py:logits_fn", "split": "test[:6]", "n": 6, "image_size": 8}
        given |= {"preprocessing": "none"} if kind == "npz" else {}

        def pictures(grey):
            shutil.rmtree(kind, ignore_errors=True)
            image = np.full((8, 8, 3), grey, np.uint8)
            image = image if kind == "npz" else images.encoded(image, "BMP")  # of one size
            splits = {"test": ([image] * 7, [0] * 6 + [1])}
            named = four_sources.write(kind, Path.cwd(), splits, ["dark", "light"])
            place = {"data_dir": named["data_dir"]} if kind == "tfds" else {}
            return {"dataset": named["name"]} | place

        given |= pictures(0)
        first, *_ = self.ask(**given)
        self.assertEqual(first["clean"], 1)
        self.assertIn("already done", self.ask(**given)[1])
        pictures(255)
        second, said, _ = self.ask(**given)
        self.assertNotIn("already done", said)
        self.assertEqual(second["clean"], 0)

    def test_other_labels_under_the_same_names(self):
        given = {"function": "nets.py:logits_fn", "n": 20}
        self.fronts("x")
        images = data.load("digits", n=20)
        pixels = np.round(images.images * 255).astype(np.uint8)
        found = []
        for labels in (images.labels, (images.labels + 1) % 10):
            names = np.array([*"0123456789"])
            np.savez("set.npz", test_images=pixels, test_labels=labels, classes=names)
            found.append(self.ask(**given, dataset="npz:set.npz")[0])
        self.assertGreater(found[0]["clean"], found[1]["clean"])

    def test_says_which_version_did_it_and_does_it_again(self):
        self.fronts("x")
        given = {"function": "nets.py:logits_fn", "attack": "apgd-ce", "steps": 2, "n": 8}
        first, *_ = self.ask(**given)
        path = Path("out/results.jsonl")
        older = copy.deepcopy(first)
        older["fingerprint"]["versions"] |= {"jaxrobust": "0.0.1", "commit": "f" * 40}
        older["fingerprint"] |= {"program": "a" * 64}  # as that version wrote it
        older["evaluation"] = "0123456789ab"
        path.write_text(json.dumps(older) + "\n")
        next(Path("out").glob("ledger-*.jsonl")).unlink()
        answered, said, _ = self.ask(**given)
        self.assertEqual(answered, older)
        self.assertRegex(said, "already done, .*, by jaxrobust 0.0.1 at ffffffffffff, .*here: ")
        anew, said, _ = self.ask(**given, again=True)
        self.assertNotIn("already done", said)
        self.assertLen(result_lines.read(Path("out")), 2)
        self.assertEqual(anew["robust"], first["robust"])
        self.assertEqual(anew["fingerprint"]["versions"], fingerprint.versions())
        self.ask(**given, again=True)
        self.assertLen({r["evaluation"] for r in result_lines.read(Path("out"))}, 3)

    def test_a_record_of_an_older_version_is_named_and_no_answer(self):
        self.fronts("x")
        given = {"function": "nets.py:logits_fn", "attack": "apgd-ce", "steps": 2, "n": 8}
        record, *_ = self.ask(**given)
        del record["fingerprint"]
        Path("out/results.jsonl").write_text(json.dumps(record | {"evaluation": "0" * 12}) + "\n")
        _, said, _ = self.ask(**given)
        self.assertIn("older version that fingerprinted neither the network nor the images", said)
        self.assertLen(result_lines.read(Path("out")), 2)


def digits_regression() -> np.ndarray:
    """A ridge regression of the digits."""
    train = data.load("digits", split="train")
    x = train.images.reshape(len(train.images), -1)
    return np.linalg.solve(x.T @ x + np.eye(64), x.T @ np.eye(10)[train.labels]).astype("f")


# --- bundles ---


class ForgedTest(parameterized.TestCase):
    """A bundle whose numbers are not those of its images is refused, and nothing is confirmed."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.honest = bundles.honest(Path(directory.name))

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "bundle"
        shutil.copytree(self.honest.folder, self.folder)

    def said(self, net=bundles.logits, **how) -> tuple[bool, str]:
        """Whether everything is confirmed, and what is said."""
        how = {"count": bundles.SPLIT} | how
        how = {"labels": self.honest.labels} | how
        try:
            bundle = claims.read(self.folder)
            found = findings.judge(bundle, lambda _, ids: self.honest.images[list(ids)], net, **how)
        except ValueError as error:
            return False, str(error)
        return found.whole, "\n".join(findings.lines(bundle, found))

    def test_the_honest_one(self):
        whole, said = self.said()
        self.assertTrue(whole, said)
        share = f"{self.honest.record.robust:.2%}"
        self.assertIn(f"claim: at most {share} of 40 images are robust, from a split of 100", said)

    @parameterized.named_parameters((forgery.name, forgery) for forgery in forgeries.ALL)
    def test_forged(self, forgery):
        forgery.edit(self.folder, self.honest)
        whole, said = self.said()
        self.assertFalse(whole)
        self.assertRegex(said, forgery.said)
        self.assertNotRegex(said, "(?m)^Confirmed:")

    @parameterized.named_parameters((forgery.name, forgery) for forgery in forgeries.BETTER)
    def test_forged_to_look_better(self, forgery):
        """Was confirmed where a row said that its image stands: nothing passed it on."""
        forgery.edit(self.folder, self.honest)
        whole, said = self.said()
        self.assertEqual(whole, not forgery.said, said)
        self.assertRegex(said, forgery.said or "Confirmed: robust accuracy")

    def test_labels_of_whoever_claims_are_no_confirmation(self):
        rows = bundles.rows_of(self.folder)
        for row in rows:  # every image is wrong by another label
            if not row["verdict"]:
                row |= {"label": (row["label"] + 1) % 10, "verdict": "clean"}
        bundles.rows_changed(self.folder, rows)
        whole, said = self.said(labels=None)
        self.assertFalse(whole)
        self.assertRegex(
            said, "labels come from the bundle and are not confirmed\nConfirmed except for"
        )
        whole, said = self.said(labels=None, trust_labels=True)
        self.assertTrue(whole)
        self.assertIn("the labels come from the bundle and are taken on trust, as requested", said)
        self.assertFalse(self.said()[0])

    def test_logits_that_are_no_numbers_confirm_nothing(self):
        whole, said = self.said(net=lambda images, ids: np.full((len(images), 10), np.nan))
        self.assertFalse(whole)
        self.assertIn("not confirmed: logits that are not finite", said)

    def test_images_that_were_not_given_are_not_confirmed(self):
        whole, said = self.said(count=20, labels=self.honest.labels[:20])
        self.assertFalse(whole)
        self.assertIn("20 images not confirmed: not among the given images", said)

    def test_a_bundle_of_an_older_version_is_read_with_what_it_lacks(self):
        path = self.folder / claims.ABOUT
        about = json.loads(path.read_text())
        del about["split_images"], about["record"]["fingerprint"]
        path.write_text(json.dumps(about | {"schema": 1}))
        bundles.resigned(self.folder)
        whole, said = self.said()
        self.assertTrue(whole)
        self.assertIn(
            "it lacks the number of images in its split, the fingerprint of its network", said
        )


# --- selection, comparison ---


class ChosenTest(parameterized.TestCase):
    """Weights that were chosen, or trained, on images of the test are reported."""

    def run_of(self, **data_settings) -> Path:
        """A run whose config is there, and which seems to have kept weights."""
        config = runs.tiny(pretrain__epochs=0).unlock()
        config.data.update(data_settings)
        workdir = Path(self.create_tempdir()) / "run"
        (workdir / "train" / kept.FOLDER / "4").mkdir(parents=True)
        own = {"version": VERSION} | json.loads(config.to_json())
        (workdir / "config.json").write_text(json.dumps(own))
        return workdir

    def choosing(self, workdir: Path, split: str) -> str:
        """What the choice stops with; nothing is there to choose from."""
        ended = command_calls.ended(lambda: select.main([str(workdir), "--split", split]))
        self.assertEqual(ended.code, 2)
        self.assertFalse((workdir / kept.SELECTION).exists())
        return ended.error

    def test_no_name_of_test_images_passes(self):
        for name, test, split in (
            ("imagenet2012", "validation@robustbench", "validation@robustbench"),
            ("imagenet2012", "validation@robustbench", "val@robustbench"),
            ("imagenet2012", "validation@robustbench", "validation"),
            ("imagenet2012", "validation@robustbench", "validation[:100%]"),
            ("imagenet2012", "validation@robustbench", "val[10:]"),
            ("imagenet2012", "validation@robustbench", "train+validation"),
            ("imagenet2012", "validation@robustbench", "val@robustbench[:10]"),
            ("imagenet2012", "validation@robustbench", "validation@somewhere.txt"),
            ("imagenet2012", "validation@robustbench", "all"),
            ("cifar10", "test", "test[10:]"),
            ("cifar10", "test", "test@robustbench"),
            ("cifar10", "test[:1000]", "test[999:]"),
            ("cifar10", "test[:1000]", "test[:5%]"),
        ):
            with self.subTest(row=(name, test, split)):
                workdir = self.run_of(name=name, test_split=test, train_split="train[:90%]")
                self.assertIn("test split of", self.choosing(workdir, split))

    @parameterized.parameters("validation@selection", "train[99%:]")
    def test_others_pass(self, split):
        workdir = self.run_of(name="imagenet2012", test_split="validation@robustbench")
        self.assertNotIn("test split of", self.choosing(workdir, split))

    def test_a_choice_on_what_was_trained_on_is_said(self):
        workdir = self.run_of(name="imagenet2012", test_split="validation")
        said = self.choosing(workdir, "train[:300]")
        self.assertRegex(
            said, "WARNING: train.:300. shares images with train.:256., which train is"
        )

    def test_records_of_a_choice(self):
        for name, split, evaluated, expected in (
            ("digits", "test[:8]", "test", True),
            ("digits", "test[10:]", "test", True),
            ("digits", "test[10:]", "test[:10]", False),
            ("tfds:digits", "train+test", "test[:10]", True),
            ("digits", "train[256:320]", "test", False),
            ("digits", "train[256:320]", "train[300:]", True),
            ("cifar10", "test", "test", False),
            ("digits", None, "test", None),
        ):
            with self.subTest(row=(name, split, evaluated, expected)):
                chosen = {"dataset": name, "split": split, "attack": "apgd-ce"}
                on = {"dataset": "digits", "split": evaluated}
                said = of_weights.training(
                    [history.of_config(runs.tiny(), "train", chosen=chosen)], **on
                )
                self.assertIs(said["selection"]["on_evaluated_images"], expected)
                self.assertEqual(
                    "selection" in of_weights.training_flags(said), expected is not False
                )

    def test_records_of_what_was_trained_on(self):
        for more, evaluated, expected in (
            ({}, "train[:20]", True),
            ({}, "train[256:]", False),
            ({"extra": "tfds:digits", "extra_split": "test"}, "test", True),
            ({"extra": "fake:8x8x1:10", "extra_split": "test"}, "test", False),
        ):
            with self.subTest(row=(more, evaluated, expected)):
                config = runs.tiny().unlock()
                config.data.update(more)
                said = of_weights.training(
                    [history.of_config(config, "train")], dataset="digits", split=evaluated
                )
                self.assertEqual(said["on_evaluated_images"], expected)
                self.assertEqual("training" in of_weights.training_flags(said), expected)

    def test_a_run_says_it_first(self):
        for more, said in (
            ({"selection_split": "test[50:]"}, "selected on test images"),
            ({"train_split": "train+test"}, "the test images are also used for training"),
            ({"train_split": "train"}, "selected on training images"),
            (
                {"extra": "tfds:digits", "extra_split": "test"},
                "data.extra_split=test shares images",
            ),
        ):
            with self.subTest(row=(more, said)):
                config = runs.tiny().unlock()
                self.assertEmpty(warnings.lines({"train": config}))
                config.data.update(more)
                self.assertIn(said, " ".join(warnings.lines({"train": config})))

    def test_what_a_choice_looked_at(self):
        """`--selected` hands this to the record.

        Which tests/evaluation/questions/test_selected.py reads.
        """
        workdir = Path(self.create_tempdir())
        told = {"schema": kept.SCHEMA, "candidates": [], "chosen": {}}
        for more in ({"dataset": "digits", "split": "test[5:]", "attack": {"name": "apgd-ce"}}, {}):
            (workdir / kept.SELECTION).write_text(json.dumps(told | more))
            said = kept.chosen_on(workdir)
            self.assertEqual(said["split"], more.get("split"))
            self.assertEqual(said["attack"], "apgd-ce" if more else None)


_LADDER = {"radii": [0.05, 0.1], "robust_beyond": 3, "of_these_attacked_by": ["apgd-ce"]}
# What records say that were made otherwise, on the same images.
ONE_SIDED: dict[str, dict[str, Any]] = {
    "a ladder": {"ladder": _LADDER, "method": "autoattack standard, ladder"},
    "a longer ladder": {"ladder": _LADDER | {"radii": [0.05, 0.1, 0.2]}},
    "plus": {"method": "autoattack plus"},
    "rand": {"method": "apgd-ce + apgd-t, rand"},
    "rand, by a program": {"method": "apgd-ce + apgd-t", "version": "rand"},
    "a union": {"method": "union", "union": {"each_on_all_images": True}},
    "a union in order": {"method": "union", "union": {"each_on_all_images": False}},
    "a worst case": {"method": "union", "worst_case": [{"method": "apgd-ce", "robust": None}]},
    "robust elsewhere": {"robust_beyond": 3},
    "other pictures": {"fingerprint": {"images": "b" * 64}},
    "another order": {"attacks": reports.record(reports.found(9), "a")["attacks"][::-1]},
}


class ComparedTest(parameterized.TestCase):
    """No network is called more robust because the other met more."""

    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir())
        self.a = reports.found(60)

    def write(self, name, seen=None, **changes) -> Path:
        seen, folder = self.a if seen is None else seen, self.root / name
        folder.mkdir()
        plain = {"method": "autoattack standard", "fingerprint": {"images": "a" * 64}}
        record = reports.record(seen, name) | plain | changes
        (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
        verdicts.write(folder / verdicts.file_of(name), name, seen)
        return folder

    def fallen(self, count: int, by: str = "replay") -> Any:
        """Verdicts in which some that stood have fallen by this."""
        fooled_by = np.array(self.a.fooled_by, dtype=object)
        fooled_by[np.flatnonzero(self.a.robust)[:count]] = by
        return self.a._replace(fooled_by=fooled_by.astype(str))

    def compared(self, *places) -> tuple[int, str, str]:
        return command_calls.ended(lambda: compare.main([str(place) for place in places]))

    def differs(self, *places: Path) -> list:
        """What a page says of the difference of robust accuracies."""
        found = gathered.gather(places).evaluations
        return [
            comparison.difference(own[0], other, "robust")
            for own in comparison.groups(found)
            for other in own[1:]
        ]

    @parameterized.parameters(
        (None, "a ladder", "ladder is"),
        ("a ladder", "a longer ladder", "ladder is"),
        (None, "plus", 'version is "standard" there, "plus" here'),
        (None, "rand", 'version is "standard" there, "rand" here'),
        (None, "rand, by a program", 'version is "standard" there, "rand" here'),
        (None, "a union", 'kind is "one threat" there, "union" here'),
        ("a union", "a union in order", "each attack of a union is"),
        ("a union in order", "a worst case", 'kind is "union" there, "worst case" here'),
        (None, "robust elsewhere", "images attacked only by the first attack is 0 there, 3 here"),
        (None, "other pictures", "images or labels with the same names differ"),
        (None, "another order", 'attacks is "apgd-ce, apgd-t" there, "apgd-t, apgd-ce" here'),
    )
    def test_another_procedure(self, first, other, said):
        places = [
            self.write(name, **(ONE_SIDED[kind] if kind else {}))
            for name, kind in (("a1", first), ("b2", other))
        ]
        code, printed, error = self.compared(*places)
        self.assertEqual((code, printed), (2, ""))
        self.assertIn(said, error)
        self.assertEmpty(self.differs(*places))

    @parameterized.parameters(*ONE_SIDED)
    def test_the_same_procedure(self, kind):
        places = [self.write(name, **ONE_SIDED[kind]) for name in ("a1", "b2")]
        code, printed, error = self.compared(*places)
        self.assertEqual(code, 0, error)
        self.assertIn("A and B have the same robust accuracy", printed)
        self.assertLen(self.differs(*places), 1)

    def test_replayed_points_of_one_side(self):
        source = {"ledger": "l", "norm": "linf", "epsilon": 0.05, "tried": 9, "fooled": 9}
        places = self.write("a1"), self.write("b2", self.fallen(9), replayed=[source])
        code, printed, error = self.compared(*places)
        self.assertEqual(code, 0, error)
        low, high = self.a.robust.mean() - 9 / 60, self.a.robust.mean()
        first = printed.split("\n\n")[1]
        self.assertStartsWith(
            first,
            "**9 of 60 images are left out because replayed points decided them (A 0, B 9): the "
            "attacks alone might not have fooled them.** On all images",
        )
        self.assertIn(f"B {100 * low:.2f} to {100 * high:.2f}%", first)
        self.assertIn("**A and B have the same robust accuracy, image by image.**", printed)
        (found,) = self.differs(*places)
        self.assertEqual((found.n, found.gained, found.lost), (51, 0, 0))
        self.assertIn(
            "Images decided by replayed points are left out, because the attacks alone might not "
            "have fooled them: 9 with",
            str(comparison.part(gathered.gather(places).evaluations)),
        )

    def test_replayed_points_that_decided_nothing(self):
        source = {"ledger": "l", "norm": "linf", "epsilon": 0.05, "tried": 9, "fooled": 0}
        code, printed, _ = self.compared(self.write("a1"), self.write("b2", replayed=[source]))
        self.assertEqual(code, 0)
        self.assertIn(
            "B tried replayed points, but these decided none of the compared images.", printed
        )

    def test_nothing_but_replayed_points(self):
        every = self.a._replace(fooled_by=np.full(60, "replay"), clean=np.ones(60, bool))
        places = self.write("a1", every), self.write("b2", every)
        code, _, error = self.compared(*places)
        self.assertEqual(code, 2)
        self.assertIn("replayed points decided all of these images", error)
        self.assertEqual(self.differs(*places), [None])

    def test_ladders_of_the_same_radii_keep_what_they_share(self):
        source = {"ledger": "l", "norm": "linf", "epsilon": 0.05, "tried": 9, "fooled": 9}
        more = ONE_SIDED["a ladder"] | {"replayed": [source]}
        places = self.write("a1", **more), self.write("b2", self.fallen(9), **more)
        code, printed, _ = self.compared(*places)
        self.assertEqual(code, 0)
        self.assertNotIn("left out", printed)
        self.assertEqual(self.differs(*places)[0].lost, 9)
        elsewhere = more | {"replayed": [source | {"epsilon": 0.3}]}
        _, printed, _ = self.compared(places[0], self.write("c3", self.fallen(9), **elsewhere))
        self.assertIn("9 of 60 images are left out", printed)

    def test_a_union_keeps_the_order_of_its_attacks(self):
        balls = [("linf", 0.1), ("l2", 0.5), ("l2", 0.5), ("l1", 6.0)]
        names = ["square", "pgd", "apgd-ce", "apgd-ce"]
        own = [
            {"name": name, "norm": norm, "epsilon": epsilon, "steps": 20}
            for name, (norm, epsilon) in zip(names, balls, strict=True)
        ]
        by = ["l1 6: apgd-ce", "l2 0.5: apgd-ce", "l2 0.5: pgd-20", "linf 0.1: square"]
        fooled_by = np.array(self.a.fooled_by, dtype=object)
        for name, at in zip([*by, "l2 0.5: replay"], np.flatnonzero(self.a.robust), strict=False):
            fooled_by[at] = name
        fooled_by[np.isin(fooled_by, reports.ATTACKS)] = by[0]
        seen = self.a._replace(fooled_by=fooled_by.astype(str))
        places = [self.write(n, seen, **ONE_SIDED["a union"], attacks=own) for n in ("a1", "b2")]
        code, printed, error = self.compared(*places)
        self.assertEqual(code, 0, error)
        self.assertStartsWith(printed.split("\n\n")[1], "**1 of 60 images are left out")
        after = [line.split(" | ")[0] for line in printed.splitlines() if line[:8] == "| after "]
        self.assertEqual(after, [f"| after {name}" for name in by[:0:-1]])

    def test_a_union_of_records_keeps_what_they_replayed(self):
        source = {"ledger": "l", "norm": "linf", "epsilon": 0.05, "tried": 9, "fooled": 9}
        folder = self.write("a1", self.fallen(9), replayed=[source])
        (record,) = records.read(folder)
        self.assertEqual(several._of_record(record, folder).record.replayed, [source])

    def test_a_plain_attack_says_what_was_replayed(self):
        source = {"ledger": "l", "norm": "linf", "epsilon": 0.05, "tried": 9, "fooled": 3}
        folder = self.write("a1", replayed=[source], method="apgd-ce")
        (record,) = result_lines.read(folder)
        said = "apgd-ce, linf 0.1 (3 images decided by replayed points)"
        self.assertEqual(records.attack_line(AccuracyRecord.from_json(record)), said)
        (one,) = gathered.gather([folder]).evaluations
        self.assertIn("3 images decided by replayed points", " ".join(sentences.doubts(one, [])))

    def test_records_of_an_older_version_are_compared(self):
        older = dict.fromkeys(("fingerprint", "method", "search_dtype"))
        code, printed, error = self.compared(self.write("a1", **older), self.write("b2"))
        self.assertEqual(code, 0, error)
        self.assertIn("The images of A are known only by their names", printed)
        self.assertIn("A and B have the same robust accuracy", printed)


# --- randomized networks, numbers that are none ---


def plain(x):
    return x.reshape(len(x), -1) @ WEIGHTS


def unanswered(x):
    return plain(x) * jnp.nan


def half_answered(x):
    return jnp.where(x[:, :1, 0, 0] > 0.5, jnp.nan, plain(x))


def edge(x):
    """The logits are finite of images of 8 bits alone, not of what an attack makes of them."""
    moved = (jnp.abs(x * 255 - jnp.round(x * 255)) > 1e-3).any((1, 2, 3))
    return jnp.where(moved[:, None], jnp.nan, plain(x))


def no_slope(x):
    """The input gradient of sqrt at 0 is infinite, times 0 it is none."""
    return plain(x) + jnp.sqrt(jnp.maximum(x - 2, 0)).sum((1, 2, 3))[:, None]


NAN = """
import jax.numpy as jnp

def logits_fn(x):
    return x.reshape(len(x), -1)[:, :10] * jnp.nan

def half(x):
    return jnp.where(x[:, 0, 2] > 0.3, jnp.nan, 1 - x.reshape(len(x), -1)[:, :10])
"""
METHODS = [{"attack": name} for name in ("clean", "fgsm", "pgd-1", "cw-1", "margin-1", "square")]
METHODS += [
    {"corruptions": "fog-1", "dataset": "npz:set.npz"},
    {"worst_case": True, "threat": ["l2:1", "l1:9", "linf:0.1"]},
]


class NotFiniteTest(parameterized.TestCase):
    """Logits that are NaN or infinite are not an answer: neither right, nor fooled without a
    word.
    """

    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        Path("nets.py").write_text(NAN)
        pixels, names = np.zeros((20, 32, 32, 3), np.uint8), np.array([*"0123456789"])
        np.savez("set.npz", test_images=pixels, test_labels=np.zeros(20, int), classes=names)

    @parameterized.parameters(*METHODS)
    def test_the_command_refuses_a_network_that_never_answers(self, **how):
        given = {"function": "nets.py:logits_fn", "dataset": "digits", "n": 20, "out": "out"}
        given |= {} if "worst_case" in how else {"epsilon": "0.1"}
        code, printed, said = call(**given | how)
        self.assertEqual((code, printed), (2, ""))
        self.assertIn("logits of all 20 images are NaN or infinite before any attack", said)
        self.assertFalse(Path("out/results.jsonl").exists())

    @parameterized.parameters("clean", "pgd-1", "square")
    def test_the_command_says_how_many_images_have_no_answer(self, attack):
        more = {"steps": 2} if attack == "square" else {}
        given = {"function": "nets.py:half", "dataset": "digits", "n": 20, "out": "out", **more}
        code, printed, said = call(**given, epsilon="0.1", attack=attack)
        self.assertEqual(code, 0, said)
        broken = int((data.load("digits", n=20).images[:, 0, 2, 0] > 0.3).sum())
        self.assertBetween(broken, 1, 19)
        self.assertIn(f"flag nan-logits: {broken} of 20 images", printed)
        self.assertIn("nan-logits", result_lines.read(Path("out"))[0]["flags"])

    def test_a_program_is_refused_before_anything_is_attacked(self):
        for ask in (
            lambda: evaluated(unanswered),
            lambda: evaluation.worst_case(
                unanswered, IMAGES, LABELS, radii={"linf": 0.1, "l2": 0.5, "l1": 1}, verbose=False
            ),
        ):
            with (
                mock.patch.object(engine, "decide", side_effect=AssertionError),
                rows.making("pgd", side_effect=AssertionError),
                self.assertRaisesRegex(ValueError, "all 12 images are NaN or infinite before any"),
            ):
                ask()

    def test_images_without_an_answer_are_wrong_and_counted(self):
        found = evaluated(half_answered, epsilon=1e-3)
        broken = IMAGES[:, 0, 0, 0] > 0.5
        np.testing.assert_array_equal(found.clean, ~broken)
        self.assertIn(f"{broken.sum()} of 12 images", found.flags["nan-logits"])
        self.assertNotIn("nan-under-attack", found.flags)
        self.assertEqual(found.record()["flags"]["nan-logits"], found.flags["nan-logits"])

    def test_an_infinite_logit_is_no_answer_either(self):
        logits = np.array([[3, 1, -np.inf], [3, 1, 2], [3, 1, np.inf], [np.nan, 1, 2]])
        np.testing.assert_array_equal(
            checks.is_right(logits, np.zeros(4, int)), [False, True, False, False]
        )
        np.testing.assert_array_equal(outcome.reached(logits, np.zeros(4, int)), [-1, 2, -1, -1])
        net = Classifier(lambda key: ({}, {}), lambda p, s, x: (jnp.asarray(logits, "f4"), s))
        numbers = jnp.zeros(4, jnp.int32)
        batch = (jnp.zeros((4, 1, 1, 3)), numbers, numbers == 0, numbers)
        attack = lambda logits_fn, key, images, labels: images  # noqa: E731
        how = accuracy.Judging(net, attack, "float32", moved=True)
        found = accuracy.judged({}, {}, *batch, jax.random.key(0), judging=how)
        np.testing.assert_array_equal(found["clean"], [False, True, False, False])
        np.testing.assert_array_equal(found["finite"], [False, True, False, False])
        np.testing.assert_array_equal(found["reached"], [-1, 0, -1, -1])

    def test_images_that_lose_their_answer_under_attack_are_counted(self):
        ledger = Path("ledger.jsonl").absolute()
        first, again = (evaluated(edge, ledger) for _ in range(2))
        self.assertEqual((first.clean.sum(), first.robust.sum()), (12, 0))
        self.assertIn("12 of 12 images", first.flags["nan-under-attack"])
        self.assertIn("They count as fooled", first.table())
        self.assertEqual(again.flags, first.flags)

    def test_gradients_that_are_none_are_said(self):
        """No attack that follows them gets anywhere, and that looked like robustness."""
        flags = evaluated(no_slope).flags
        self.assertIn("the input gradients of 12 of 12 noisy images", flags["nan-gradients"])


class SearchSampleTest(parameterized.TestCase):
    """A sample of survivors excludes what it can exclude, and the record says how much that is."""

    def test_the_bound_is_clopper_pearsons(self):
        for fooled, n, expected in (
            (0, 64, 1 - 0.05 ** (1 / 64)),
            (0, 4, 1 - 0.05**0.25),
            (4, 4, 1.0),
        ):
            with self.subTest(row=(fooled, n, expected)):
                self.assertAlmostEqual(checks.upper_bound(fooled, n), expected, places=9)

    def test_the_bound_where_some_differ(self):
        """At the bound, so few or fewer happen in 5% of all cases."""
        for fooled, n in ((1, 64), (7, 64), (3, 5)):
            with self.subTest(row=(fooled, n)):
                p = checks.upper_bound(fooled, n)
                happen = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(fooled + 1))
                self.assertAlmostEqual(happen, 0.05, places=9)

    def searched(self, **changes):
        with mock.patch("jaxrobust.evaluation.engine.turns._SAMPLE", 4):
            return evaluated(plain, **changes)

    def test_none_of_the_sample_fell(self):
        found = self.searched(search_fn=plain, epsilon=0.01)
        survivors = int(found.robust.sum())
        self.assertGreater(survivors, 4)
        said = found.record()["search_sample"]
        bound = 1 - 0.05**0.25
        self.assertEqual((said["survivors"], said["sampled"], said["fooled"]), (survivors, 4, 0))
        self.assertAlmostEqual(said["at_most"], bound)
        self.assertAlmostEqual(
            said["robust_at_least"], (survivors - bound * (survivors - 4)) / len(IMAGES)
        )
        for text in (found.flags["search-gap"], found.table()):
            self.assertIn(f"at most {bound:.1%} of the other {survivors - 4} would fall", text)
            self.assertIn("fall this way (up to ", text)

    def test_some_of_the_sample_fell_so_all_were_searched(self):
        def stubborn(x):  # it gives each image its label, whatever an attack made of it
            apart = jnp.square(x[:, None] - IMAGES[None]).sum((2, 3, 4))
            return jnp.eye(10)[LABELS][apart.argmin(1)]

        found = self.searched(search_fn=stubborn, epsilon=0.2)
        said = found.record()["search_sample"]
        self.assertGreater(said["fooled"], 0)
        self.assertEqual(said["survivors"] - said["fooled_of_all"], found.robust.sum())
        self.assertEqual(said["robust_at_least"], found.robust.mean())
        self.assertEqual(said["at_most"], checks.upper_bound(said["fooled"], 4))
        self.assertIn("search with logits_fn", found.flags["search-gap"])


class OvershootTest(parameterized.TestCase):
    """What a resize leaves outside [0, 1] by rounding is clipped, and the record says so."""

    def overshot(self, low=-3e-8, high=1.0000001):
        images = IMAGES.copy()
        images[0, 0, 0] = low
        images[1, 1, :2] = high
        return images

    @parameterized.parameters(False, True)
    def test_is_clipped_and_said(self, read):
        images = self.overshot()
        found = evaluated(plain, images=Read(images) if read else images)
        inside = evaluated(plain, images=np.clip(images, 0, 1))
        record = found.record()
        about = {"images": 2, "pixels": 3, "largest": float(np.float32(1.0000001)) - 1}
        self.assertEqual(record["clipped"], about)
        self.assertIn("3 pixels of 2 images lay up to 1.2e-07 outside [0, 1]", found.table())
        self.assertEqual(record["evaluation"], inside.record()["evaluation"])
        self.assertNotIn("clipped", inside.record())
        self.assertBetween(np.asarray(found.images_adv[np.arange(12)]).max(), 0, 1)

    @parameterized.parameters((-2e-6, 1.0), (0.0, 1.00001), (np.nan, 1.0))
    def test_more_is_refused(self, low, high):
        for wrong in (self.overshot(low, high), Read(self.overshot(low, high))):
            with self.assertRaisesRegex(ValueError, r"NaN pixels|not \[0, 1\]"):
                evaluated(plain, images=wrong)

    def test_the_worst_case_clips_too(self):
        radii = {"linf": 0.1, "l2": 0.5, "l1": 1.0}
        with (
            mock.patch.object(checks, "check_images", wraps=checks.check_images) as seen,
            self.assertRaisesRegex(ValueError, "NaN or infinite"),
        ):
            evaluation.worst_case(unanswered, self.overshot(), LABELS, radii=radii)
        self.assertEqual(seen.call_count, 1)  # which let it pass


def shaken(x, keys):
    """Logits with noise of their own, so that answers near the boundary are often wrong."""
    return plain(x) + 0.7 * jax.vmap(lambda key: jax.random.normal(key, (10,)))(keys)


def careless(x, keys):
    """It is right in nine of ten draws, whatever the image: no attack changes that."""
    slips = jax.vmap(lambda key: jax.random.bernoulli(key, 0.1))(keys)
    right = jax.nn.one_hot(jnp.zeros(len(x), jnp.int32), 10)
    return jnp.where(slips[:, None], 1 - right, right) + 0 * plain(x)


RULES = ("majority", "mean", "one-draw")


class RandomisedTest(parameterized.TestCase):
    """A randomized network is judged by a rule over draws, and the reference's number stands by."""

    kept: ClassVar[dict[str, tuple]] = {}  # rule -> result, lines of its ledger

    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        self.ledger = Path("ledger.jsonl")

    def drawn(self, logits_fn=shaken, ledger=None, **changes):
        how = {"attacks": ("apgd-ce",), "overrides": {"apgd-ce": {"steps": 3, "eot": 3}}}
        how |= {"version": "rand", "epsilon": 0.05, "batch_size": 16, "draws": 9}
        if changes.get("rule") == "one-draw":
            del how["draws"]
        images = np.concatenate([IMAGES] * 4) if logits_fn is shaken else IMAGES
        labels = np.concatenate([LABELS] * 4) if logits_fn is shaken else np.zeros(12, int)
        return evaluated(logits_fn, ledger, images=images, labels=labels, **how | changes)

    def known(self, rule):
        if rule not in self.kept:
            own = self.ledger.with_stem(f"of-{rule}")
            found = self.drawn(rule=rule, ledger=own)
            points = own.with_suffix(".images").read_bytes()
            self.kept[rule] = found, own.read_text(), points
        return self.kept[rule]

    def leave(self, rule, lines=None):
        """A ledger of that rule, with so many verdicts; default: all."""
        _, text, points = self.known(rule)
        kept = text.splitlines(keepends=True)
        self.ledger.write_text("".join(kept[: None if lines is None else lines + 1]))
        self.ledger.with_suffix(".images").write_bytes(points)

    @parameterized.parameters(
        ("majority", [True, False, False], [1, 1, 2]),
        ("mean", [True, True, False], [1, 1, 2]),
        ("one-draw", [True, True, False], [1, 1, 2]),
    )
    def test_the_rules_in_closed_form(self, rule, right, reached):
        """Of four draws: right in three; in two, and surely; in one."""
        sure, no, never = [9.0, 1, 0], [0, 0.1, 0], [0, 0, 5]
        draws = np.array(
            [[sure, no, sure, sure], [sure, no, sure, no], [never, sure, never, never]]
        )
        draws = draws.transpose(1, 0, 2)
        how = randomised.verdict(rule, None if rule == "one-draw" else 4)
        found = randomised.answers(lambda k: draws[k], how, np.zeros(3, int), 3)
        np.testing.assert_array_equal(found.right, right)
        np.testing.assert_array_equal(found.once, [True, True, False])
        np.testing.assert_array_equal(found.reached, reached)
        if rule == "mean":
            each = np.exp(draws) / np.exp(draws).sum(2, keepdims=True)
            np.testing.assert_array_equal(found.right, each.mean(0).argmax(1) == 0)

    def test_a_draw_that_is_no_number_is_a_wrong_one(self):
        draws = np.array([[[2.0, 1, 0]], [[np.nan, 1, 0]], [[2, np.inf, 0]]])
        for rule in ("majority", "mean"):
            how = randomised.verdict(rule, 3)
            found = randomised.answers(lambda k: draws[k], how, np.zeros(1, int), 3)
            said = (found.right[0], found.finite[0], found.reached[0])
            self.assertEqual(said, (False, False, -1))

    def test_what_one_draw_calls_fooled_and_most_draws_do_not(self):
        """Each image is right in nine of ten draws: it is robust, however often it is asked."""
        found = self.drawn(careless, attacks=None, overrides=None, draws=20)
        self.assertEqual(found.robust.mean(), 1)
        said = found.record()["draws"]
        self.assertEqual((said["rule"], said["draws"]), ("majority", 20))
        self.assertLess(said["one_draw"]["robust"], 1)
        low, high = said["one_draw"]["interval"]["robust"]
        self.assertBetween(said["one_draw"]["robust"], low, high)
        self.assertIn("majority of 20 draws: more than half", found.table())
        self.assertIn(f"robust {said['one_draw']['robust']:.1%}, 95% interval", found.table())

    @parameterized.parameters("majority", "mean")
    def test_the_references_number_is_what_that_rule_gives_alone(self, rule):
        found, alone = self.known(rule)[0], self.known("one-draw")[0]
        own = found.record()["draws"]["one_draw"]
        self.assertEqual((own["clean"], own["robust"]), (alone.clean.mean(), alone.robust.mean()))
        self.assertEqual(alone.record()["draws"]["one_draw"], own)
        self.assertTrue((found.robust != alone.robust).any())

    @parameterized.parameters(*RULES)
    def test_points_fool_by_the_rule(self, rule):
        """The draws that judged are drawn again, here, from the keys of each image."""
        found, *_ = self.known(rule)
        fooled = np.flatnonzero(found.clean & ~found.robust)
        self.assertNotEmpty(fooled)
        root, wrong = jax.random.key(0), []
        for k in range(found.about["draws"]["draws"]):
            number = 1000 + 1 + ensembles.named("apgd-ce").number + 1000 * k
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(root, i), number))(  # noqa: B023
                jnp.asarray(fooled)
            )
            logits = shaken(jnp.asarray(found.images_adv[fooled]), keys)
            wrong.append(np.argmax(logits, 1) != np.tile(LABELS, 4)[fooled])
        if rule != "mean":
            self.assertGreaterEqual(np.mean(wrong, 0).min(), 0.5)
        self.assertGreater(np.mean(wrong), 0.5)

    @sweeps.fast("mean")
    @parameterized.parameters(*RULES)
    def test_no_verdict_depends_on_batch_devices_or_a_kill(self, rule):
        first, *_ = self.known(rule)
        self.leave(rule, lines=9)
        with mock.patch.object(engine, "local_devices", lambda: jax.local_devices()[:1]):
            again = self.drawn(rule=rule, batch_size=5, ledger=self.ledger)
        np.testing.assert_array_equal(first.fooled_by, again.fooled_by)
        # A program of other shapes may round the last bit of a pixel otherwise.
        np.testing.assert_allclose(first.images_adv, again.images_adv, rtol=0, atol=1e-7)
        self.assertEqual(first.about["draws"], again.about["draws"])
        self.leave(rule, lines=9)
        resumed = self.drawn(rule=rule, ledger=self.ledger)
        np.testing.assert_array_equal(first.fooled_by, resumed.fooled_by)
        np.testing.assert_array_equal(first.images_adv, resumed.images_adv)
        self.assertEqual(first.about["draws"], resumed.about["draws"])
        done = self.drawn(rule=rule, ledger=self.ledger)
        self.assertEqual(done.costs[0].forward, 0)
        self.assertEqual(done.about["draws"], first.about["draws"])
        self.assertEqual(done.record()["evaluation"], first.record()["evaluation"])

    @parameterized.parameters({"rule": "mean"}, {"rule": "one-draw"}, {"rule": None, "draws": 10})
    def test_a_ledger_of_another_rule_is_another_evaluation(self, **other):
        self.leave("majority")
        with self.assertRaisesRegex(ValueError, "another evaluation: .*verdict is .*majority"):
            self.drawn(ledger=self.ledger, **other)

    def test_an_older_ledger_is_of_one_draw(self):
        self.leave("one-draw")
        head, *lines = self.ledger.read_text().splitlines()
        identity = json.loads(head)["identity"]
        del identity["verdict"]
        rows = [json.loads(line) for line in lines]
        older = [{key: row[key] for key in row if key != "once"} for row in rows]
        self.ledger.write_text(
            "".join(json.dumps(r) + "\n" for r in ({"identity": identity}, *older))
        )
        with self.assertRaisesRegex(ValueError, "verdict is .*one-draw"):
            self.drawn(ledger=self.ledger)
        found = self.drawn(rule="one-draw", ledger=self.ledger)
        self.assertEqual(found.about["draws"], self.known("one-draw")[0].about["draws"])
        self.assertEqual(found.costs[0].forward, 0)

    def test_rule_and_draws_tell_numbers_apart(self):
        records_of = [self.known(rule)[0].record() for rule in RULES]
        self.assertLen({record["evaluation"] for record in records_of}, 3)
        self.assertIn("majority of 9 draws", records_of[0]["method"])

    def test_the_command(self):
        Path("nets.py").write_text(
            "import jax\n"
            "import numpy as np\n"
            "weights = np.load('weights.npy')\n"
            "def logits_fn(x, keys):\n"
            "    noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(keys)\n"
            "    return x.reshape(len(x), -1) @ weights + 0.2 * noise\n"
        )
        np.save("weights.npy", digits_regression())
        given = {"function": "nets.py:logits_fn", "dataset": "digits", "n": 12, "out": "out"}
        given |= {"version": "rand", "attack": "apgd-ce", "steps": 2, "epsilon": "0.05"}
        code, printed, said = call(**given, draws=5)
        self.assertEqual(code, 0, said)
        record = result_lines.read(Path("out"))[-1]
        self.assertEqual(record["method"], "apgd-ce, rand, steps 2, majority of 5 draws")
        one = record["draws"]["one_draw"]
        self.assertIn(f"clean {one['clean']:.1%}, robust {one['robust']:.1%}", printed)
        self.assertEqual(
            commands._judged(AccuracyRecord.from_json(record)),
            ["--rule", "majority", "--draws", "5"],
        )
        older = {key: record[key] for key in record if key != "draws"}
        self.assertEqual(commands._judged(AccuracyRecord.from_json(older)), ["--rule", "one-draw"])
        self.assertIn("already done", call(**given, draws=5, rule="majority")[2])
        self.assertIn("already done", call(**given, draws=5, noreplay=True)[2])
        code, _, said = call(**given, rule="one-draw")
        self.assertNotIn("already done", said)
        self.assertEqual(result_lines.read(Path("out"))[-1]["robust"], one["robust"])
        for words, message in (
            (
                {"version": "standard", "rule": None},
                "must accept images only (keys are for version rand)",
            ),
            ({"rule": "most"}, "--rule='most' is unknown"),
        ):
            code, _, said = call(**given | words)
            self.assertEqual(code, 2)
            self.assertIn(message, said)


class Read:
    """An image set, of images in memory."""

    def __init__(self, images):
        self.images, self.shape = images, images.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, which):
        return self.images[which]
