"""What the end of a phase says of its weights."""

import json
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.config import of_phase
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.training.run import accuracies
from jaxrobust.types import Weights
from tests.support import result_lines, sweeps
from tests.support.runs import tiny

IMAGES = accuracy.EvaluatedImages(
    data.open_source("fake:8x8x1:4", "test"), image_size=8, batch_size=4
)


def of_test(workdir, config, step, **reached) -> dict[str, float]:
    """Test made-up weights of the phase train, which reach these accuracies."""
    phase = types.SimpleNamespace(mesh=sharding.make_mesh(jax.devices()[:1]))
    how = {"config": of_phase(config, "train"), "workdir": workdir, "name": "train"}
    with (
        mock.patch.object(build, "evaluation"),
        mock.patch.object(accuracy, "count", return_value={"images": 80, **reached}),
    ):
        run = types.SimpleNamespace(**how, phase=phase)
        weights = Weights({"w": np.ones(1, np.float32)}, {})
        return accuracies.test(run, json.loads(config.to_json()), step, weights)


class RecordedTest(parameterized.TestCase):
    def test_what_is_recorded_is_not_tested_again_and_another_question_is(self):
        workdir, reached = Path(self.create_tempdir()), {"clean": 0.5, "robust": 0.25}
        asked = (
            (tiny(), 8),
            (tiny(), 12),
            (tiny(test__steps=4), 8),
            (tiny(attack__epsilon=0.05), 8),
            (tiny(data__test_split="test[:40]"), 8),
        )
        for number, (config, step) in enumerate(asked, 1):
            first = of_test(workdir, config, step, **reached)
            self.assertEqual(first["robust"], 0.25)
            self.assertLen(result_lines.read(workdir), number)
        for config, step in asked:
            self.assertEmpty(of_test(workdir, config, step, **reached))
        self.assertLen(result_lines.read(workdir), len(asked))


class CollapsedTest(parameterized.TestCase):
    def test_of_several_norms_an_image_withstands_all(self):
        config = tiny()
        config.attack.update(norm=("linf", "l2"), epsilon=(0.1, 0.5))
        run = types.SimpleNamespace(
            config=of_phase(config, "train"), phase=types.SimpleNamespace(mesh=None)
        )
        reached = [np.array([True, True, False, False]), np.array([True, False, True, False])]
        same = {"clean": np.ones(4), "answers": np.arange(4), "labels": np.arange(4)}
        with (
            mock.patch.object(accuracies, "network_of"),
            mock.patch.object(accuracy, "counter"),
            mock.patch.object(
                accuracy, "each", side_effect=[{"robust": r} | same for r in reached]
            ),
        ):
            found = accuracies._scores(run, None, IMAGES)
        self.assertEqual(list(found["after"].values()), [0.5, 0.25])
        self.assertEqual((found["robust"], found["clean"]), (0.25, 1.0))

    @sweeps.rows(True, False)
    def test_the_record_and_the_table_say_so(self, collapsed):
        workdir, config = Path(self.create_tempdir()), tiny()
        reached = {"clean": 0.125, "robust": 0.125}
        if collapsed:
            reached["collapse"] = {"proven": True, "words": "all get class 3"}
        of_test(workdir, config, 8, **reached)
        (record,) = result_lines.read(workdir)
        self.assertEqual(record["flags"].get("collapsed"), "all get class 3" if collapsed else None)
        line = "WARNING: train, step 8, ema: all get class 3"
        self.assertEqual(line in accuracies.table(workdir).splitlines(), collapsed)
