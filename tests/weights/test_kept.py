"""Weights that a run kept beside its best ones."""

import json
from pathlib import Path

import jax
import numpy as np
from absl.testing import absltest

from jaxrobust.config import VERSION, network_of
from jaxrobust.weights.trained import kept
from tests.support import runs


class KeptTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        config = runs.tiny()
        self.workdir = Path(self.create_tempdir())
        own = {"version": VERSION} | json.loads(config.to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))
        params, stats = jax.jit(network_of(config).init)(jax.random.key(0))
        moved = {name: array + 1 for name, array in params.items()}
        self.both = kept.Kept(params, stats, moved, stats)
        kept.keep(self.workdir, "train", 6, self.both, steps_per_epoch=4)

    def test_both_weights_and_the_epoch_that_ended(self):
        self.assertEqual(kept.steps_of(self.workdir, "train"), [6])
        epoch, both = kept.read(self.workdir, "train", 6)
        self.assertEqual(epoch, 1.5)
        for which in kept.WHICH:
            for part, expected in zip(both.of(which), self.both.of(which), strict=True):
                self.assertEqual(part.keys(), expected.keys())
                for name in part:
                    np.testing.assert_array_equal(part[name], expected[name])

    def test_what_is_not_kept_is_named(self):
        with self.assertRaisesRegex(ValueError, r"train/\w+ has no step 4 \(any more\)"):
            kept.read(self.workdir, "train", 4)


if __name__ == "__main__":
    absltest.main()
