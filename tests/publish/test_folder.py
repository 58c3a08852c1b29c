"""A run as our own folder: what is exported trains, evaluates and loads as the run does."""

import contextlib
import json
import tempfile
from pathlib import Path

import grain  # noqa: F401  # defines flags, which absltest must not see for the first time later
import jax
import numpy as np
import pytest
from absl.testing import absltest

import jaxrobust
from jaxrobust.commands.conversion import export_weights
from jaxrobust.config import VERSION, network_of
from jaxrobust.runtime.files import jsonl
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store import hashes, weights_folder
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import kept
from tests.support import command_calls, evaluations
from tests.support import runs as training
from tests.support.modules import hidden


class FolderTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.workdir, config = Path(directory.name) / "run", training.tiny().unlock()
        config.model.options.update(dims=(32,), gamma_init=5.0)
        cls.workdir.mkdir()
        own = {"version": VERSION} | json.loads(config.to_json())
        (cls.workdir / "config.json").write_text(json.dumps(own))
        cls.images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
        with jax.numpy_dtype_promotion("standard"):
            cls.weights = evaluations.fitted(config)
        with contextlib.closing(Checkpoints(cls.workdir / "train" / "best")) as best:
            best.save(4, cls.weights, {})
            best.wait()
        cls.sha256 = hashes.weights_sha256(*cls.weights)
        cls.config = config
        cls.own = {"weights_sha256": cls.sha256, "clean": 0.5, "robust": 0.25}
        (cls.workdir / "results.jsonl").write_text(json.dumps(cls.own) + "\n")

    def setUp(self):
        super().setUp()
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.folder = Path(self.create_tempdir())
        self.out = self.folder / "out"

    def export(self, *words, code=0) -> str:
        given = ["--workdir", self.workdir, "--layout=jaxrobust", f"--out={self.out}", *words]
        ended = command_calls.ended(lambda: export_weights.main([str(word) for word in given]))
        self.assertEqual(ended.code, code, ended.error)
        self.assertEmpty([*self.folder.glob("*.part*")])
        return ended.error if code else ended.out

    def logits(self, net, params, stats):
        return np.asarray(jax.jit(lambda *args: net.apply(*args)[0])(params, stats, self.images))

    def test_loads_and_trains(self):
        evaluated = self.own | {"evaluation": "e1", "robust": 0.125, "preprocessing": "none"}
        records = self.folder / "results.jsonl"
        records.write_text(json.dumps(evaluated) + "\n")
        with hidden("torch"):
            printed = self.export("--record", records)
        self.assertIn(f"--config.init.weights={self.out}", printed)
        self.assertSameElements(
            [path.name for path in self.out.iterdir()],
            [weights_folder.WEIGHTS, weights_folder.CONFIG],
        )

        with self.subTest("what it says"):
            about = json.loads((self.out / "config.json").read_text())
            expected = {
                "architecture": "convnext_n",
                "options": {"stem_strides": [1], "depths": [1], "dims": [32]},
                "num_classes": 10,
                "image_size": 8,
                "in_channels": 1,
                "preprocessing": "none",
                "norm": "linf",
                "epsilon": 0.1,
                "accuracies": [self.own, evaluated],
                "source": "train, step 4, ema",
                "which": "ema",
                "weights_sha256": self.sha256,
            }
            self.assertEqual({key: about[key] for key in expected}, expected)

        with self.subTest("jaxrobust.load: the same logits, bit for bit"):
            ours = self.logits(network_of(self.config), *self.weights)
            loaded = jaxrobust.load(self.out)
            np.testing.assert_array_equal(
                self.logits(loaded.net, loaded.params, loaded.stats), ours
            )
            self.assertEqual(loaded.about["accuracies"], about["accuracies"])

        with self.subTest("init.weights: a training starts from it"):
            config = self.config.copy_and_resolve_references()
            config.init.weights = str(self.out)
            start, _ = start_weights.of_config(config)
            self.assertEqual(hashes.weights_sha256(start.params, start.stats), self.sha256)

        with self.subTest("the same again, and something else at that place"):
            self.export("--record", records)
            said = self.export(code=2)  # without the record
            self.assertRegex(said, "exists with different content; name a new --out\n$")
            self.assertEqual(json.loads((self.out / "config.json").read_text()), about)

    @pytest.mark.slow
    def test_is_evaluated_to_the_same_figures(self):
        self.export()
        data = {"dataset": "digits", "split": "test[:80]"}
        found = []
        for given in ({"workdir": str(self.workdir)}, {"weights": str(self.out)} | data):
            out = self.folder / next(iter(given))
            attacked = {"attack": "pgd-3", "epsilon": "0.01", "n": 48}
            code, _, said = evaluations.call(**attacked, out=str(out), **given)
            self.assertEqual(code, 0, said)
            (row,) = jsonl.read(out / "results.jsonl")
            same = ("clean", "robust", "weights_sha256", "image_ids", "attacks", "preprocessing")
            found.append({key: row[key] for key in same})
        self.assertEqual(*found)
        self.assertGreater(found[0]["clean"], found[0]["robust"])
        self.assertGreater(found[0]["robust"], 0)

    def test_the_chosen_weights(self):
        raw = self.weights._replace(params={k: 2 * v for k, v in self.weights.params.items()})
        both = kept.Kept(*raw, *self.weights)
        self.assertRegex(
            self.export("--selected", code=2), "no weights are selected in .*jaxrobust select"
        )
        kept.keep(self.workdir, "train", 8, both, steps_per_epoch=4)
        choice = kept.ChosenWeights("train", 8, 2.0, "raw", 16, hashes.weights_sha256(*raw))
        text = {"schema": kept.SCHEMA, "candidates": [], "chosen": choice._asdict()}
        file = self.workdir / kept.SELECTION
        self.addCleanup(file.unlink)
        file.write_text(json.dumps(text))
        self.export("--selected")
        about = json.loads((self.out / "config.json").read_text())
        found = {key: about[key] for key in ("source", "which", "image_size", "weights_sha256")}
        expected = {"source": "train, epoch 2, raw", "which": "raw", "image_size": 16}
        self.assertEqual(found, expected | {"weights_sha256": choice.weights_sha256})
        self.assertIsNone(about["accuracies"])

    def test_mistakes(self):
        other = self.folder / "results.jsonl"
        other.write_text(json.dumps({"weights_sha256": "0" * 64, "clean": 1.0}) + "\n")
        for words, message in (
            (["--record", other], "has no record of these weights"),
            (["--record", other, "--id=Me2026Own_ConvNeXt-N"], "choose --layout module"),
            (["--selected", "--which=raw"], "leave --which out"),
            (["--selected", "--phase=train"], "leave --phase out"),
            (["--license=mit"], "or use --layout hub"),
        ):
            with self.subTest(words[-1]):
                said = self.export(*words, code=2)
                self.assertIn(message, said)
                self.assertEqual(said.count("\n"), 1, said)
                self.assertEqual([*self.folder.iterdir()], [other])
