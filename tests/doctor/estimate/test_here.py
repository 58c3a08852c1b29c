"""What is measured on devices that are present, where it fails."""

import itertools
from unittest import mock

import jax
from absl.testing import absltest, parameterized
from jax.errors import JaxRuntimeError

from jaxrobust.config import base
from jaxrobust.doctor.estimate import here
from jaxrobust.doctor.estimate.work import work
from tests.support import sweeps


def digits():
    """Return the work of a phase on the digits that ship."""
    config = base().unlock()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, in_channels=1)
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}
    config.data.update(name="digits", selection_split="test[:50]", test_split="test")
    config.train.update(epochs=11, batch_size=32)
    return work(config)[0]


class MemoryTest(parameterized.TestCase):
    def test_too_little_memory_is_a_sentence_with_a_smaller_batch(self):
        full = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9G")
        with (
            mock.patch.object(here.build, "phase", side_effect=full),
            self.assertRaisesRegex(
                ValueError, "train: the programs of a batch of 32 .* --batch 16"
            ),
        ):
            here.measured(digits(), jax.devices()[:1], seconds=0.1)

    def test_another_failure_is_not_hidden(self):
        with (
            mock.patch.object(here.build, "phase", side_effect=JaxRuntimeError("INTERNAL: none")),
            self.assertRaisesRegex(JaxRuntimeError, "INTERNAL"),
        ):
            here.measured(digits(), jax.devices()[:1], seconds=0.1)


class EvaluationTest(absltest.TestCase):
    def test_an_evaluation_is_all_its_batches(self):
        part = digits()
        part.config.test.update(batch_size=64, images=130)  # two whole batches, and one of two
        phase = mock.Mock(mesh=jax.sharding.Mesh(jax.devices()[:1], ("data",)))
        with (
            mock.patch.object(here.compilation, "compiled", return_value=(mock.Mock(), 7.0, False)),
            mock.patch.object(here.sharding, "global_arrays", return_value=[]),
            mock.patch.object(here, "_timed", return_value=2.0),
        ):
            self.assertEqual(here._evaluation(part, "test", phase, (), None), (3 * 2.0, 7.0))
            part.config.evaluation.update(batch_size=25, images=50)
            self.assertEqual(here._evaluation(part, "evaluation", phase, (), None), (2 * 2.0, 7.0))


class StepsTest(parameterized.TestCase):
    @sweeps.rows(
        (2.0, 2),  # as many as fit into the seconds, behind the first
        (0.0, 1),  # but one
        (1e9, here.MOST_STEPS),
    )
    def test_the_first_step_does_not_count(self, seconds, counted):
        clock, made = [0.0], []

        def step(state, batch, control):
            clock[0] += 100.0 if not made else 1.0
            made.append((state, batch, control))
            return state + 1, ()

        with mock.patch.object(here.time, "perf_counter", lambda: clock[0]):
            found = here._steps(step, 0, itertools.count(), "control", seconds)
        self.assertEqual(found, (counted, 1.0))
        self.assertEqual(made, [(i, i, "control") for i in range(counted + 1)])
