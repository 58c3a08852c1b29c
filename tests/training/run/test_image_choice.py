"""`test.images` and `evaluation.images` of a data set that is sorted by class.

Before, they were its first ones, so that a run reported and chose its weights by one class.
"""

import json
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.config import of_phase
from jaxrobust.data.splits import spread
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.records import records
from jaxrobust.results.selection import candidates
from jaxrobust.runtime.devices import sharding
from jaxrobust.training.run import accuracies, splits
from jaxrobust.types import Weights
from tests.support import result_lines, sorted_sources
from tests.support.runs import tiny


class ImagesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        named = sorted_sources.write("npz", self.folder)
        self.config = tiny(
            data__name=named["name"], data__test_split="test", data__selection_split="test",
            data__train_split="test", test__images=39, evaluation__images=39, test__batch_size=16,
        ).unlock()  # fmt: skip
        self.config.model.in_channels = 3
        source = data.open_source(named["name"], "test")
        self.places = spread.places(source, 39)

    @parameterized.parameters(("test_split", "test"), ("selection_split", "evaluation"))
    def test_they_are_of_all_classes(self, key, section):
        images = splits.evaluated(self.config, key, self.config[section], self.folder)
        met: dict[str, np.ndarray] = {}

        def counter(params, stats, shown, labels, mask, ids, key):
            for name, values in (("labels", labels), ("ids", ids)):
                before = met.get(name, np.zeros(0, int))
                met[name] = np.concatenate([before, np.asarray(values)[np.asarray(mask)]])
            right = mask & (labels == 0)  # a network that knows one class
            return {
                "mask": mask, "count": mask.sum(), "clean": right.sum(), "robust": right.sum(),
                "answers": labels * 0, "labels": labels,
            }  # fmt: skip

        mesh = sharding.make_mesh(jax.devices()[:1])
        found = accuracy.count(counter, Weights({}, {}), images, mesh)
        counts = np.bincount(met["labels"], minlength=10)
        self.assertEqual((counts.min(), counts.max()), (3, 4))
        np.testing.assert_array_equal(met["ids"], self.places)
        self.assertEqual((found["images"], found["clean"]), (39, 4 / 39))
        self.assertIn("4 of 39 clean images", found["doubts"]["low-accuracy"])

    def test_the_record_and_the_table_name_them(self):
        run = types.SimpleNamespace(
            config=of_phase(self.config, "train"), workdir=self.folder, name="train",
            phase=types.SimpleNamespace(mesh=sharding.make_mesh(jax.devices()[:1])),
        )  # fmt: skip
        reached = {
            "images": 39,
            "clean": 20 / 39,
            "robust": 10 / 39,
            "doubts": {"one-class": "words"},
        }
        plain, weights = (
            json.loads(self.config.to_json()),
            Weights({"w": np.ones(1, np.float32)}, {}),
        )
        with mock.patch.object(accuracy, "count", return_value=reached):
            accuracies.test(run, plain, 3, weights)
        (row,) = result_lines.read(self.folder)
        self.assertEqual(row["image_ids"], records.ranges(self.places.tolist()))
        self.assertEqual((row["image_choice"], row["flags"]["one-class"]), ("hash", "words"))
        self.assertRegex(accuracies.table(self.folder), r" 25\.6%      39  APGD")

    def test_the_choice_of_weights(self):
        of_run = mock.patch.object(candidates.subjects, "of_run")
        how = mock.patch.object(candidates.subjects, "preprocessing", return_value=None)
        with of_run, how:
            size = candidates.at_size(
                self.folder, "train", self.config, 8, steps=None, folder=self.folder
            )
        np.testing.assert_array_equal(size.images.ids, self.places)
        self.assertEqual(size.images.choice, "hash")
