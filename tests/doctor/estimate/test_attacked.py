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
    figures = {
        "slots": 16,
        "jobs_per_image": {"first": 1, "second": 9},
        "passes_per_image": {"first": 100, "second": 1800},
        "pass_s": {"first": 1e-3, "second": 2e-3},
        "compile_s": 5.0,
        "once_s": 2.0,
    }
    return figures | changes


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

    @sweeps.rows(("gpu", 32, 512), ("gpu", 64, 512), ("gpu", 65, 64), ("cpu", 32, 8))
    def test_slots_are_those_of_the_engine(self, platform, size, slots):
        chip = types.SimpleNamespace(platform=platform)
        replaced = {"local_devices": lambda: [chip], "Mesh": mock.DEFAULT, "tracing": mock.DEFAULT}
        with mock.patch.multiple(engine, **replaced):
            runner = engine.make(lambda x: x, image_size=size)
        config = imagenet()
        config.model.image_size = size
        on = H100._replace(kind="cpu" if platform == "cpu" else H100.kind)
        found = attacked.computed(config, on, utilisation=0.2)
        self.assertEqual((runner.slots, found.slots), (slots, slots * H100.chips))


class MeasuredTest(absltest.TestCase):
    def test_calls_are_timed_until_the_seconds_are_over(self):
        rows = ((0, 9.0, True), (40, 2.0, False), (60, 2.0, False), (99, 9.0, False))
        calls = iter([engine.Call(steps, steps, took, new) for steps, took, new in rows])
        runner = types.SimpleNamespace(traces=[types.SimpleNamespace(classes=10)])
        setting, labels = ensembles.plan("linf", "standard", None, None)[0], np.arange(5)
        with (
            mock.patch.object(engine, "forward", return_value=np.zeros((5, 10), np.float32)),
            mock.patch.object(engine, "decide", return_value=calls) as decide,
        ):
            timed = attacked._tried(runner, setting, np.zeros((5, 1)), labels, 3.5)
        self.assertEqual(timed, (9.0, 4.0 / (100 * ensembles.passes(setting, 10))))
        self.assertLen([*calls], 1)  # which was not made
        sample = decide.call_args.args[2]
        self.assertEqual((sample.threat.epsilon, sample.seed), (1e-7, 0))
        self.assertEqual(decide.call_args.kwargs["confirm"]([1], True), [])

    def test_what_is_done_once_is_without_the_attacks(self):
        cost = types.SimpleNamespace(seconds=-20.0, compile_seconds=-50.0)
        result = types.SimpleNamespace(costs=[cost])
        with mock.patch.object(attacked, "autoattack", return_value=result) as autoattack:
            self.assertBetween(attacked._once("f", "x", "y", imagenet()), 70, 71)
        options = autoattack.call_args.kwargs
        expected = {"norm": "linf", "epsilon": 1e-7, "attacks": ("apgd-ce",)}
        expected |= {"overrides": {"apgd-ce": {"steps": 1, "restarts": 1}}, "verbose": False}
        self.assertEqual(options, expected)

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
