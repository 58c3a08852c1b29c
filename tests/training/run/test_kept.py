"""Copies of the weights that a run keeps on its way: `checkpoint.keep_every_epochs`."""

import contextlib
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.devices import sharding
from jaxrobust.training.update.step import averaged
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import kept
from tests.support.runs import final_state, one_phase, quiet_run, stop_after


def same(one, other):
    for a, b in zip(*(jax.tree.leaves(jax.device_get(x)) for x in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


class KeptTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        reached = {"clean": 0.5, "robust": 0.25, "images": 80}
        self.enter_context(mock.patch.object(accuracy, "count", return_value=reached))

    def read(self, workdir, step):
        with jax.numpy_dtype_promotion("standard"):
            return kept.read(workdir, "train", step)

    @pytest.mark.slow
    def test_every_second_epoch_and_the_last(self):
        """Stopped and continued, killed before a copy, and from a run that kept none."""
        config = one_phase(checkpoint__keep_every_epochs=2)
        whole, parts = self.folder / "whole", self.folder / "parts"
        quiet_run(config, whole)
        self.assertEqual(kept.steps_of(whole, "train"), [8, 12])
        state, _ = final_state(whole, config)
        epoch, both = self.read(whole, 12)
        self.assertEqual(epoch, 3)
        same(both.of("raw"), (state.params, state.stats))
        same(both.of("ema"), averaged(state))
        self.assertEqual(self.read(whole, 8)[0], 2)
        with mock.patch.object(sharding, "SMALL", 64):  # else nothing is split
            spread = one_phase(checkpoint__keep_every_epochs=2, mesh__fsdp=8)
            quiet_run(spread, self.folder / "spread")
        _, split = self.read(self.folder / "spread", 12)
        self.assertTrue(split.params["head.fc.kernel"].sharding.is_fully_replicated)
        for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(both), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)  # sums of gradients in another order

        with self.assertRaisesRegex(ValueError, "kept has no step 4"):
            self.read(whole, 4)

        quiet_run(one_phase(), self.folder / "none")
        self.assertFalse((self.folder / "none" / "train" / kept.FOLDER).exists())
        same(final_state(self.folder / "none", one_phase())[0].params, state.params)

        stop_after(5, lambda: quiet_run(one_phase(), parts))  # the key may come later
        real = kept.keep

        def killed(workdir, phase, step, *rest, **how):
            if step == 8:  # latest has step 8 by now
                raise KeyboardInterrupt
            real(workdir, phase, step, *rest, **how)

        with mock.patch.object(kept, "keep", killed), contextlib.suppress(KeyboardInterrupt):
            quiet_run(config, parts)
        self.assertEqual(kept.steps_of(parts, "train"), [])
        with contextlib.closing(Checkpoints(parts / "train" / "latest")) as latest:
            self.assertEqual(latest.latest_step(), 8)
        quiet_run(config, parts)
        self.assertEqual(kept.steps_of(parts, "train"), [8, 12])
        for step in (8, 12):
            same(self.read(parts, step), self.read(whole, step))
