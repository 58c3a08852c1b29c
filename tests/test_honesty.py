"""Numbers that claim more than was done: each fault that a rival, forger or defender found."""

import contextlib
import copy
import importlib.util
import itertools
import json
import shutil
import sys
import unittest
from pathlib import Path
from typing import ClassVar
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust import data, evaluation
from jaxrobust.evaluation import fingerprint, networks, records, replay
from jaxrobust.runtime import functions, sharding
from tests.support import datasets, images, paths, twins
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
        self.refused("the program of its", other)

    def test_a_ledger_of_masked_gradients_made_the_other_look_robust(self):
        masked, open_ = (
            twins.network(twins.FRONTS[name], WEIGHTS) for name in ("masked", "straight through")
        )
        apgd = {"attacks": ("apgd-ce",), "overrides": {"apgd-ce": {"steps": 3}}, "epsilon": 0.2}
        found = [evaluated(net, **apgd).robust.mean() for net in (masked, open_)]
        self.assertGreater(found[0], found[1] + 0.2)  # which a shared ledger would have hidden

    @parameterized.parameters(
        ("its arrays .weights. are others", {"weights": WEIGHTS + 1e-6}),
        ("program of its logits", {"front": lambda x: x * np.float32(0.999)}),
        ("its images or labels", {"images": IMAGES[::-1]}),
        ("its images or labels", {"images": np.where(IMAGES.max() == IMAGES, 0, IMAGES)}),
        ("its images or labels", {"labels": (LABELS + 1) % 10}),
        ("its images or labels", {"image_ids": range(1, 13)}),
        ("epsilon is 0.1 there", {"epsilon": 0.11}),
        ("seed is 0 there", {"seed": 1}),
        ("searched with another network", {"search_fn": True}),
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
        self.refused("logits on eight noisy images are others", other)

    def test_a_search_network_with_masked_gradients(self):
        """It decides nothing, but what it does not find stays robust."""
        net = twins.network(lambda x: x, WEIGHTS)
        masked = twins.network(twins.rounded, WEIGHTS)
        evaluated(net, self.ledger, search_fn=masked)
        self.refused("searched with another", net, search_fn=net)

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
        said = r"gradients on eight noisy images are others \(there .*jax 0.9.9"
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
        self.refused("program of its logits", twins.network(twins.straight_through, WEIGHTS))

    def test_a_replayed_ledger_of_a_twin_counts_as_another_network(self):
        masked, open_ = (
            twins.network(twins.FRONTS[name], WEIGHTS) for name in ("masked", "straight through")
        )
        evaluated(open_, self.ledger)
        taken = networks.argument("", masked, sharding.make_mesh())
        own = fingerprint.of_network(taken, IMAGES, each=8)
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
    """The command says "done before" of what it did, by what is computed, not by names."""

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
        return records.read(Path(str((common | given)["out"])))[-1], said, printed

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
        self.assertIn("done before", said)
        self.assertEqual(first, again)
        self.fronts("1 - x")
        changed, said, _ = self.ask(**network)
        self.assertNotIn("done before", said)
        self.assertNotEqual(first["evaluation"], changed["evaluation"])
        self.assertLess(changed["clean"], first["clean"] - 0.3)
        self.fronts("x")
        self.assertIn("done before", self.ask(**network)[1])

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
        self.assertIn("done before", said)
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
        given = {"function": "black.py:logits_fn", "n": 6, "image_size": 8}
        wide = {"preprocessing": "none"} if kind == "npz" else {}
        first, *_ = self.ask(**given, **wide, **pictures(kind, 0))
        self.assertEqual(first["clean"], 1)
        self.assertIn("done before", self.ask(**given, **wide, **pictures(kind, None))[1])
        second, said, _ = self.ask(**given, **wide, **pictures(kind, 255))
        self.assertNotIn("done before", said)
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
        self.assertRegex(said, "done before, .*, by jaxrobust 0.0.1 at ffffffffffff, .*here: ")
        anew, said, _ = self.ask(**given, again=True)
        self.assertNotIn("done before", said)
        self.assertLen(records.read(Path("out")), 2)
        self.assertEqual(anew["robust"], first["robust"])
        self.assertEqual(anew["fingerprint"]["versions"], fingerprint.versions())
        self.ask(**given, again=True)
        self.assertLen({r["evaluation"] for r in records.read(Path("out"))}, 3)

    def test_a_record_of_an_older_version_is_named_and_no_answer(self):
        self.fronts("x")
        given = {"function": "nets.py:logits_fn", "attack": "apgd-ce", "steps": 2, "n": 8}
        record, *_ = self.ask(**given)
        del record["fingerprint"]
        Path("out/results.jsonl").write_text(json.dumps(record | {"evaluation": "0" * 12}) + "\n")
        _, said, _ = self.ask(**given)
        self.assertIn("noted neither what the network computes nor the images' bytes", said)
        self.assertLen(records.read(Path("out")), 2)


def digits_regression() -> np.ndarray:
    """A ridge regression of the digits."""
    train = data.load("digits", split="train")
    x = train.images.reshape(len(train.images), -1)
    return np.linalg.solve(x.T @ x + np.eye(64), x.T @ np.eye(10)[train.labels]).astype("f")


def pictures(kind: str, grey: int | None) -> dict[str, str]:
    """Write six pictures of one grey (None: leave them as they are); the flags that name them."""
    labels = np.zeros(6, int)
    image = None if grey is None else np.full((8, 8, 3), grey, np.uint8)
    if kind == "npz":
        if image is not None:
            names = np.array(["dark", "bright"])
            np.savez(
                "set.npz", test_images=np.stack([image] * 6), test_labels=labels, classes=names
            )
        return {"dataset": "npz:set.npz"}
    png = None if image is None else images.encoded(image, "BMP")  # of one size
    if kind == "folder":
        files = [*(f"set/test/dark/{i}.bmp" for i in range(6)), "set/test/light/0.bmp"]
        if png:
            datasets.write_tree(Path(), files, png)
        return {"dataset": "folder:set"}
    if kind == "hf":
        if not importlib.util.find_spec("datasets"):
            raise unittest.SkipTest("needs Hugging Face's datasets: pip install -e '.[test]'")
        if png:
            hf_parquet(Path("hf/test-00000-of-00001.parquet"), png, labels)
        return {"dataset": "hf:./hf"}
    if png:
        import tensorflow_datasets as tfds

        shutil.rmtree("tfds", ignore_errors=True)
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        rows = [{"image": png, "label": 0}] * 6
        datasets.write_tfds(Path("tfds/two/1.0.0"), "two", features, {"test": rows})
    return {"dataset": "two", "data_dir": "tfds"}


def hf_parquet(path: Path, png: bytes, labels: np.ndarray) -> None:
    import datasets as hf

    path.parent.mkdir(exist_ok=True)
    names = hf.ClassLabel(names=["dark", "bright"])
    kinds = hf.Features({"image": hf.Image(), "label": names})
    rows = {"image": [{"bytes": png, "path": f"{i}.png"} for i in range(6)], "label": labels}
    hf.Dataset.from_dict(rows, features=kinds).to_parquet(str(path))


# --- bundles ---


# --- selection, comparison ---


# --- randomised networks, numbers that are none ---


# --- PyTorch's networks ---


class TorchNetworksTest(parameterized.TestCase):
    """What is more than its layers is converted with its gradients, or refused by its cause."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if importlib.util.find_spec("torch") is None:
            raise absltest.SkipTest(paths.PARITY)
        from tests.support import torch_defences

        cls.nets = torch_defences
        shape = (4, torch_defences.SIDE, torch_defences.SIDE, torch_defences.CHANNELS)
        cls.images = np.random.default_rng(0).random(shape, np.float32)

    def from_module(self, module, **how):
        from jaxrobust.interop.torch import from_module

        return from_module(module, self.images, **how)

    @parameterized.parameters(
        "full backward hook",
        "hook before backward",
        "hook of a tensor",
        "hook of a tensor where it needs a gradient",
        "input changed in place by a Function",
        "change in place without gradients",
        "noise of NumPy's",
        "state",
        "a batch",
        "the number of images",
        "a question to the images",
        "randomness",
    )
    def test_is_refused_by_its_cause(self, name):
        change, message = self.nets.REFUSED[name]
        module = self.nets.network()
        change(module)
        with self.assertRaisesRegex(ValueError, message) as caught:
            self.from_module(module.eval())
        self.assertNotIn("\n", str(caught.exception))

    def test_all_of_them_are_here(self):
        method = "test_is_refused_by_its_cause"
        count = sum(name.startswith(method) for name in dir(self))
        self.assertEqual(count, len(self.nets.REFUSED))

    def test_the_authors_gradients(self):
        functions = ("BPDA by the identity", "BPDA by detach", "statistics without gradients")
        layers = [self.nets.Layer(self.nets.OWN_GRADIENTS[name]) for name in functions]
        module = self.nets.network(*layers)
        self.from_module(module)  # which compares
        forgetting = mock.patch("jaxrobust.interop.gradients.kept", lambda program: program)
        differs = self.assertRaisesRegex(ValueError, "same values, so a gradient differs")
        with forgetting, differs:
            self.from_module(module)

    def test_questions_to_constants(self):
        self.from_module(self.nets.network(self.nets.Asking()))

    def test_noise_that_is_meant(self):
        noisy = self.nets.network(self.nets.Layer(self.nets.DRAWS["randn_like"]))
        logits_fn, _ = self.from_module(noisy, random=True, compare=False)
        logits = [logits_fn(self.images, jax.random.split(jax.random.key(k), 4)) for k in (0, 0, 1)]
        np.testing.assert_array_equal(logits[0], logits[1])
        self.assertGreater(np.abs(logits[0] - logits[2]).max(), 1e-3)


if __name__ == "__main__":
    absltest.main()
