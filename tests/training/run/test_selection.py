"""Which weights of a phase are kept as its best."""

import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import parameterized
from ml_collections import ConfigDict

from jaxrobust import data
from jaxrobust.attacks import fixed_steps
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import jsonl
from jaxrobust.training import build
from jaxrobust.training.run import best_weights, goodput, splits
from tests.support import sweeps
from tests.support.steps import small_config


class SelectionTest(parameterized.TestCase):
    @sweeps.rows(
        ("adversarial", 0.4, False), ("adversarial", 0.5, True), ("adversarial", 0.6, True),
        ("clean", 0.0, True),  # by the clean accuracy
        ("adversarial", 0.0, True, "clean"), ("clean", 0.0, False, "robust"),
    )  # fmt: skip
    def test_the_best_are_kept_and_of_equals_the_last(self, objective, robust, kept, metric=None):
        before, reached = ({"clean": 0.8, "robust": r, "images": 64} for r in (0.5, robust))
        self.check(objective, before, reached, kept, metric)

    @sweeps.rows(
        (0.1, False, 0.2, True, False),  # higher, but of one class
        (0.2, True, 0.1, False, True),
        (0.2, True, 0.1, True, False),
        (0.1, True, 0.2, True, True),
    )
    def test_a_network_of_one_class_is_told_and_is_below_all_others(self, a, ones, b, one, kept):
        both = ({"clean": 0.2, "robust": r, "images": 64} for r in (a, b))
        said = {"collapse": {"proven": True, "words": "has collapsed"}}
        before, now = (
            r | (said if is_one else {}) for r, is_one in zip(both, (ones, one), strict=True)
        )
        with mock.patch.object(best_weights, "say") as told:
            self.check("adversarial", before, now, kept)
        lines = [call.args[0] for call in told.call_args_list]
        self.assertEqual(any("WARNING at step 8: has collapsed" in line for line in lines), one)

    def test_an_evaluation_that_is_made_again_takes_the_place_of_its_line(self):
        reached = {"clean": 0.8, "robust": 0.5, "images": 64}
        lines = [{"step": step} | reached for step in (4, 8, 12)]
        self.check("adversarial", reached, reached, True, lines=lines, stay=lines[:1])

    @sweeps.rows(({}, True), ({"image_choice": "hash"}, False))
    def test_a_choice_that_began_on_the_first_images_goes_on_with_them(self, noted, first):
        """An older version took the first ones: on others, weights are not compared."""
        reached = {"clean": 0.8, "robust": 0.5, "images": 64}
        lines = [{"step": 4} | reached | noted]
        how = {"lines": lines, "stay": lines, "limit": 20, "noted": {} if first else noted}
        self.check("adversarial", reached, reached, True, **how)
        images = accuracy.count.call_args.args[2]
        self.assertEqual(images.places, tuple(range(20)) if first else None)

    def check(
        self, objective, before, reached, kept, metric=None, lines=(), stay=(), limit=0, noted=None
    ):
        folder = Path(self.create_tempdir())
        for line in lines:  # of a run that was killed, or rolled back
            jsonl.append(folder / "selection.jsonl", line)
        numbers = {k: v for k, v in reached.items() if k != "collapse"}
        settings = {"attack": "apgd-ce", "step_size": None, "start": None, "metric": metric}
        settings |= {"steps": 2, "weights": "raw"}
        run = types.SimpleNamespace(
            name="train",
            workdir=folder,
            clock=goodput.NONE,
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
        images = accuracy.EvaluatedImages(
            data.open_source("fake:8x8x1:4", "test"), image_size=8, batch_size=4, limit=limit
        )
        for module, name, value in (
            (splits, "evaluated", images), (build, "evaluation", None), (accuracy, "count", reached)
        ):  # fmt: skip
            self.enter_context(mock.patch.object(module, name, return_value=value))
        select = best_weights.selection(run)
        state = types.SimpleNamespace(params={"w": jnp.ones(1)}, stats={})
        found = select(8, state)
        self.assertEqual(found, {f"selection_{k}": v for k, v in numbers.items()})
        self.assertEqual(run.best.save.called, kept)
        written = jsonl.read(folder / "selection.jsonl")
        self.assertEqual(written, [*stay, {"step": 8} | numbers | (noted or {})])


class AttackTest(parameterized.TestCase):
    @sweeps.rows(
        ({}, ("pgd", 20, 2.5 * 8 / 255 / 20, "random")),
        ({"step_size": 0.8 / 255, "start": "uniform"}, ("pgd", 20, 0.8 / 255, "uniform")),
        ({"attack": "cw-40", "start": "uniform-boxed"}, ("cw", 40, 0.5 / 255, "uniform-boxed")),
        ({"attack": "fgsm"}, ("fgsm", 1, 8 / 255, "image")),
    )
    def test_is_that_of_the_evaluation(self, changes, expected):
        config = small_config()
        config.evaluation.update({"attack": "pgd-20"} | changes)
        with mock.patch.object(fixed_steps, "attack_of") as made:
            best_weights.counter(config, sharding.make_mesh(jax.devices()[:1]))
        (settings,) = made.call_args.args
        self.assertEqual((settings["norm"], settings["epsilon"]), ("linf", 8 / 255))
        name, steps, length, start = expected
        self.assertEqual((settings["name"], settings["steps"]), (name, steps))
        self.assertEqual(settings["start"], start)
        self.assertAlmostEqual(settings["step_size"], length, delta=1e-15)

    @sweeps.rows(
        ({"metric": "best"}, "evaluation.metric='best' must be one of 'clean', 'robust'"),
        ({"attack": "pgd"}, "evaluation.attack='pgd' must be one of 'apgd-ce', fgsm, pgd-K, cw-K"),
        ({"step_size": 0.1}, "evaluation.step_size=0.1 has no effect with .*'apgd-ce'; leave it"),
        ({"start": "image"}, "evaluation.start=image has no effect"),
        (
            {"attack": "pgd-2", "start": "gauss"},
            "evaluation.start='gauss' must be one of 'image', ",
        ),
        ({"attack": "pgd-2", "step_size": -1.0}, "evaluation.step_size=-1.0 must be above 0"),
    )
    def test_refuses(self, changes, message):
        config = small_config()
        config.evaluation.update(changes)
        with self.assertRaisesRegex(ValueError, message):
            best_weights.counter(config, sharding.make_mesh(jax.devices()[:1]))
