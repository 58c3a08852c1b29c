"""Which weights of a phase are kept as its best."""

import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from jaxrobust.evaluation import accuracy
from jaxrobust.runtime import jsonl, sharding
from jaxrobust.training import build, selection, splits


class SelectionTest(parameterized.TestCase):
    @parameterized.parameters(
        ("adversarial", 0.4, False), ("adversarial", 0.5, True), ("adversarial", 0.6, True),
        ("clean", 0.0, True),  # by the clean accuracy
    )  # fmt: skip
    def test_the_best_are_kept_and_of_equals_the_last(self, objective, robust, kept):
        folder = Path(self.create_tempdir())
        before, reached = ({"clean": 0.8, "robust": r, "images": 64} for r in (0.5, robust))
        settings = {"steps": 2, "weights": "raw"}
        run = types.SimpleNamespace(
            name="train",
            workdir=folder,
            config=ConfigDict(
                {
                    "evaluation": settings,
                    "checkpoint": {"keep_epochs": False},
                    "train": {"objective": objective},
                }
            ),
            phase=types.SimpleNamespace(mesh=sharding.make_mesh(jax.devices()[:1])),
            latest=mock.Mock(),
            best=mock.Mock(**{"latest_step.return_value": 4, "meta.return_value": before}),
            file=lambda name: folder / name,
        )
        for module, name, value in (
            (splits, "evaluated", None), (build, "evaluation", None), (accuracy, "count", reached)
        ):  # fmt: skip
            self.enter_context(mock.patch.object(module, name, return_value=value))
        select = selection.selection(run)
        state = types.SimpleNamespace(params={"w": jnp.ones(1)}, stats={})
        found = select(8, state)
        self.assertEqual(found["selection_robust"], robust)
        self.assertEqual(run.best.save.called, kept)
        self.assertEqual(jsonl.read(folder / "selection.jsonl"), [{"step": 8} | reached])


if __name__ == "__main__":
    absltest.main()
