"""The command of evaluation with the weights that `jaxrobust/commands/select.py` chose."""

import contextlib
import json
from pathlib import Path

import jax
from absl.testing import absltest

from jaxrobust.config import VERSION, network_of
from jaxrobust.runtime.files import jsonl
from jaxrobust.weights.store import hashes
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import kept
from tests.support import evaluations
from tests.support import runs as training
from tests.support.outcomes import ended, refused


class SelectedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir, config = Path(self.create_tempdir()) / "run", training.tiny()
        self.workdir.mkdir()
        own = {"version": VERSION} | json.loads(config.to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))
        init = jax.jit(network_of(config).init)
        best, self.raw, ema = (init(jax.random.key(seed)) for seed in range(3))
        with contextlib.closing(Checkpoints(self.workdir / "train" / "best")) as files:
            files.save(8, kept.Weights(*best), {})
        kept.keep(self.workdir, "train", 4, kept.Kept(*self.raw, *ema), steps_per_epoch=4)

    def test_selected(self):
        given = {"workdir": str(self.workdir), "attack": "clean", "n": 16, "selected": True}
        said = refused(evaluations.call(**given))
        self.assertRegex(said, "--selected: no weights are selected in .* yet; run jaxrobust s")
        self.assertFalse((self.workdir / "evaluation").exists())
        sha256 = hashes.weights_sha256(*self.raw)
        chosen = kept.ChosenWeights("train", 4, 1.0, "raw", 8, sha256)._asdict()
        # Not on the split of the config, train[256:320]: on images of the test.
        on = {"dataset": "digits", "split": "test[5:]", "attack": {"name": "apgd-ce"}}
        text = json.dumps({"schema": kept.SCHEMA, "candidates": [], "chosen": chosen} | on)
        (self.workdir / kept.SELECTION).write_text(text)
        printed, _ = ended(evaluations.call(**given))
        self.assertIn("train, epoch 1, raw", printed)
        (record,) = jsonl.read(self.workdir / "evaluation" / "results.jsonl")
        self.assertEqual(record["weights"], "train, epoch 1, raw")
        self.assertEqual(record["weights_sha256"], sha256)
        said = {"dataset": "digits", "split": "test[5:]", "attack": "apgd-ce"}
        self.assertEqual(record["training"]["selection"], said | {"on_evaluated_images": True})
        # 2 clean epochs, and 3 of an update and an attack of 2 steps.
        self.assertEqual(record["training"]["passes"], 2 + 3 * (1 + 2))
        self.assertIn("selected on images of test[5:]", printed)
        for more, message in (
            ({"phase": "train"}, "--selected also chooses the phase; leave --phase out"),
            ({"workdir": None}, "--selected chooses weights of a run; give its --workdir RUN"),
        ):
            self.assertIn(message, refused(evaluations.call(**given | more)))
