"""What AutoAttack costs: passes of the plan, waves of the engine."""

import types
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.attacks import ensembles
from jaxrobust.config import base
from jaxrobust.doctor.estimate import attacked
from jaxrobust.evaluation.engine import engine
from jaxrobust.models.table import multiply_adds
from tests.support import sweeps
from tests.support.estimates import H100, NET, SHAPES, imagenet


def account(**changes):
    """Return an account of two attacks, of 1 and 9 jobs an image, in 16 slots."""
    known = {
        "slots": 16,
        "jobs_per_image": {"first": 1, "second": 9},
        "passes_per_image": {"first": 100, "second": 1800},
        "pass_s": {"first": 1e-3, "second": 2e-3},
        "compile_s": 5.0,
        "once_s": 2.0,
    }
    return known | changes


class WavesTest(parameterized.TestCase):
    @sweeps.rows(
        (16, 1, 9),  # full waves alone
        (17, 2, 10),  # a last wave of one job, 153 jobs in ten waves
        (1, 1, 1),
        (0, 0, 0),
    )
    def test_a_wave_costs_all_slots(self, standing, first, second):
        by_hand = first * 16 * 100 * 1e-3 + second * 16 * 200 * 2e-3
        seconds = attacked.seconds_of(account(), images=standing, robust=1.0)
        self.assertAlmostEqual(seconds, by_hand + 5 + 2)

    def test_fallen_images_cost_a_little_of_the_first_attack(self):
        seconds = attacked.seconds_of(account(), images=50, robust=0.0)
        self.assertAlmostEqual(seconds, 50 * attacked.FALLEN * 100 * 1e-3 + 7)

    def test_many_images_leave_no_slot_empty(self):
        seconds = attacked.seconds_of(account(), images=160_000, robust=0.5) - 7
        full = 80_000 * (100 * 1e-3 + 1800 * 2e-3)
        fallen = 80_000 * attacked.FALLEN * 100 * 1e-3
        self.assertAlmostEqual(seconds / (full + fallen), 1, delta=1e-3)


class ComputedTest(parameterized.TestCase):
    def test_passes_are_those_of_the_plan_and_seconds_operations_over_speed(self):
        found = attacked.computed(imagenet(), H100, utilisation=0.25)
        for setting in ensembles.plan("linf", "standard", None, None):
            self.assertEqual(
                found.passes_per_image[setting.name], ensembles.most_passes(setting, 1000)
            )
        adds = multiply_adds(NET, *SHAPES, image_size=224)
        # In TF32, for which NVIDIA quotes half of bfloat16's speed.
        by_hand = 2 * adds / (8 * 989e12 / 2 * 0.25)
        for seconds in found.pass_s.values():
            self.assertAlmostEqual(seconds / by_hand, 1, delta=1e-6)
        self.assertEqual(found.slots, 8 * 64)

    def test_a_tpu_rounds_to_bfloat16(self):
        tpu = H100._replace(kind="TPU v5e")
        slow, fast = (
            attacked.computed(imagenet(), on, utilisation=0.2).pass_s["square"]
            for on in (H100, tpu)
        )
        self.assertAlmostEqual(slow / fast, 2)

    @sweeps.rows(32, 64, 65, 224)
    def test_slots_are_those_of_the_engine_on_an_accelerator(self, size):
        chip = types.SimpleNamespace(platform="gpu")
        with (
            mock.patch.object(engine, "local_devices", return_value=[chip]),
            mock.patch.object(engine, "Mesh"),
            mock.patch.object(engine.tracing, "argument"),
        ):
            made = engine.make(lambda x: x, image_size=size)
        self.assertEqual(attacked.slots_of_chip(size), made.slots)


class MeasuredTest(absltest.TestCase):
    def test_each_attack_is_tried_on_full_slots_of_whole_images(self):
        config = imagenet()
        images = np.zeros((16, 8, 6, 3), np.float32)
        runner = mock.Mock(slots=40, mesh=jax.make_mesh((1,), ("data",)))
        with (
            mock.patch.object(attacked, "_network", return_value=(None, images, np.arange(16))),
            mock.patch.object(attacked, "_once", return_value=2.0),
            mock.patch.object(
                attacked, "_tried", side_effect=[(1.0, n) for n in range(4)]
            ) as tried,
            mock.patch.object(engine, "make", return_value=runner),
            mock.patch.object(engine, "trace", return_value=runner) as trace,
        ):
            found = attacked.measured(config, seconds=0.5)
        trace.assert_called_once_with(runner, (8, 6, 3))
        names = list(ensembles.VERSIONS["standard"])
        self.assertEqual([call.args[1].name for call in tried.mock_calls], names)
        for call in tried.mock_calls:
            self.assertEqual(call.args[2].shape, (40, 8, 6, 3))
            self.assertEqual(call.args[3].tolist(), [*range(16), *range(16), *range(8)])
        self.assertEqual(found.pass_s, {name: n for n, name in enumerate(names)})
        self.assertEqual((found.slots, found.compile_s, found.once_s), (40, 4.0, 2.0))
        self.assertEqual(found.jobs_per_image, {"apgd-ce": 1, "apgd-t": 9, "fab-t": 9, "square": 1})

    @pytest.mark.slow
    def test_every_attack_is_tried_with_its_own_program(self):
        config = base().unlock()
        config.model.update(name="convnext_n", num_classes=4, image_size=8, in_channels=1)
        config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}
        found = attacked.measured(config, seconds=0.05)
        self.assertEqual(list(found.pass_s), list(ensembles.VERSIONS["standard"]))
        self.assertEqual(found.jobs_per_image, {"apgd-ce": 1, "apgd-t": 3, "fab-t": 3, "square": 1})
        self.assertEqual(found.slots, 8 * jax.local_device_count())
        for seconds in (*found.pass_s.values(), found.compile_s, found.once_s):
            self.assertTrue(0 < seconds < np.inf)
