"""What is known of a network's weights: those that a run keeps, its first layer, its options."""

import types
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.weights.naming import rename
from jaxrobust.weights.store.artifact import Network
from jaxrobust.weights.trained import kept
from tests.support import sweeps


class KeptTest(absltest.TestCase):
    def test_steps_of_a_phase(self):
        workdir = Path(self.create_tempdir())
        self.assertEqual(kept.steps_of(workdir, "train"), [])
        for step in ("12", "4", "100", "100.tmp"):
            (workdir / "train" / kept.FOLDER / step).mkdir(parents=True)
        self.assertEqual(kept.steps_of(workdir, "train"), [4, 12, 100])
        self.assertEqual(kept.steps_of(workdir, "pretrain"), [])


class NormalisedTest(parameterized.TestCase):
    @sweeps.rows((0, 1, False), (0.5, 1, True), (0, 0.5, True))
    def test_tells_whether_the_first_layer_changes_images(self, mean, std, expected):
        stats = {"normalize.mean": np.array([0, 0, mean]), "normalize.std": np.array([1, std, 1])}
        network = Network("resnet18", {}, stats, num_classes=10, image_size=32, options={})
        self.assertEqual(network.normalised, expected)


class OptionsTest(absltest.TestCase):
    def test_only_those_that_differ_are_named(self):
        names = types.SimpleNamespace(names=types.SimpleNamespace(options=lambda shapes: shapes))
        stored = {"depth": 3, "width": 8}
        with mock.patch.object(models, "family", return_value=names):
            self.assertEqual(rename.compared("net", stored, dict(stored)), "")
            said = rename.compared("net", stored, stored | {"depth": 4})
        self.assertEqual(
            said,
            "their shapes match depth=3, but this net has depth=4; set depth=3 in the "
            "options of the network",
        )
