"""What the end of a phase says of its weights."""

import json
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.engine import accuracy
from jaxrobust.resolved import of_phase
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.training.run import accuracies
from jaxrobust.types import Weights
from tests.support import result_lines
from tests.support.runs import tiny


class CollapsedTest(parameterized.TestCase):
    @parameterized.parameters(True, False)
    def test_the_record_and_the_table_say_so(self, collapsed):
        workdir, config = Path(self.create_tempdir()), tiny()
        reached = {"clean": 0.125, "robust": 0.125, "images": 80}
        if collapsed:
            reached["collapse"] = {"proven": True, "words": "all get class 3"}
        phase = types.SimpleNamespace(mesh=sharding.make_mesh(jax.devices()[:1]))
        weights = Weights({"w": np.ones(1, np.float32)}, {})
        with (
            mock.patch.object(build, "evaluation"),
            mock.patch.object(accuracy, "count", return_value=reached),
        ):
            plain = json.loads(config.to_json())
            run = types.SimpleNamespace(
                config=of_phase(config, "train"), workdir=workdir, name="train", phase=phase
            )
            accuracies.test(run, plain, 8, weights)
        (record,) = result_lines.read(workdir)
        self.assertEqual(record["flags"].get("collapsed"), "all get class 3" if collapsed else None)
        line = "WARNING: train, step 8, ema: all get class 3"
        self.assertEqual(line in accuracies.table(workdir).splitlines(), collapsed)
