"""Steps that update nothing: how many may follow each other, and what going back writes down."""

import types
from pathlib import Path
from unittest import mock

import jax
from absl.testing import absltest

from jaxrobust.runtime import jsonl, sharding
from jaxrobust.training import loop, trouble

ROW = {"loss": float("nan"), "gradient_norm": float("nan"), "step": 9}


class TroubleTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.enter_context(mock.patch.object(trouble, "say"))

    def run_of(self, rollbacks=1, *, lr=0.5, skips=2, last=4):
        settings = types.SimpleNamespace(rollbacks=rollbacks, lr=lr, skips=skips)
        return mock.Mock(
            file=lambda name: self.folder / name,
            config=types.SimpleNamespace(trouble=settings),
            latest=mock.Mock(**{"latest_step.return_value": last}, directory=self.folder),
        )

    def ahead(self, skipped):
        return types.SimpleNamespace(skipped=skipped, last=ROW)

    def test_how_many_may_be_skipped(self):
        found = trouble.Trouble(self.run_of())
        self.assertFalse(found.too_much(self.ahead(2)))
        self.assertTrue(found.too_much(self.ahead(3)))

    def test_each_rollback_lowers_the_rate(self):
        for number, scale in enumerate((1.0, 0.5, 0.25)):
            found = trouble.Trouble(self.run_of(2))
            self.assertEqual((found.rollbacks, found.lr_scale), (number, scale))
            if number < 2:
                found.roll_back(self.ahead(3))
        rows = jsonl.read(self.folder / "rollbacks.jsonl")
        self.assertEqual([row["lr_scale"] for row in rows], [0.5, 0.25])
        self.assertEqual([(row["step"], row["back_to"]) for row in rows], [(9, 4)] * 2)

    def test_a_step_is_told_the_rate_of_all_rollbacks(self):
        mesh = sharding.make_mesh(jax.devices()[:1])
        for scale in (1.0, 0.5, 0.25):
            found = trouble.Trouble(self.run_of(3))
            phase = types.SimpleNamespace(mesh=mesh)
            its = types.SimpleNamespace(trouble=found, run=types.SimpleNamespace(phase=phase))
            self.assertEqual(loop._Loop._control(its, 0, 1.0).lr_scale, scale)
            found.roll_back(self.ahead(3))

    def test_the_last_one_is_noted_and_refused(self):
        run = self.run_of(0)
        message = r"(?s)loss is nan at step 9.*3 steps in a row.* step 4 .*trouble.rollbacks=1"
        with self.assertRaisesRegex(trouble.Diverged, message):
            trouble.Trouble(run).roll_back(self.ahead(3))
        run.stopped.clear.assert_called_once()
        self.assertLen(jsonl.read(self.folder / "rollbacks.jsonl"), 1)
        with self.assertRaisesRegex(trouble.Diverged, "loss is nan at step 9"):
            trouble.Trouble(run)  # the same command again says it at once
        self.assertEqual(trouble.Trouble(self.run_of(1)).rollbacks, 1)

    def test_before_any_checkpoint(self):
        with self.assertRaisesRegex(trouble.Diverged, "none was written yet"):
            trouble.Trouble(self.run_of(0, last=None)).roll_back(self.ahead(3))


if __name__ == "__main__":
    absltest.main()
