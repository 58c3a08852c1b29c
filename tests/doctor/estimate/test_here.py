"""What is measured on devices that are present: how often, and where it fails."""

import itertools
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized
from jax.errors import JaxRuntimeError

from jaxrobust.doctor.estimate import here
from jaxrobust.doctor.estimate.work import SizedSplit, work
from tests.support import sweeps
from tests.support.estimates import digits


class HereTest(parameterized.TestCase):
    @sweeps.rows(
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9G", ValueError,
         "train: the programs for a batch of 32 .* --batch 16"),
        ("INTERNAL: none", JaxRuntimeError, "INTERNAL"),
    )  # fmt: skip
    def test_too_little_memory_is_a_sentence_and_other_failures_stay(self, error, kind, message):
        with (
            mock.patch.object(here.build, "phase", side_effect=JaxRuntimeError(error)),
            self.assertRaisesRegex(kind, message),
        ):
            here.measured(work(digits())[0], jax.devices()[:1], seconds=0.1)

    def test_batches_are_random_where_the_data_are_not_here(self):
        part = work(digits())[0]
        part.config.train.batch_size = 500
        phase = SimpleNamespace(mesh=here.build.mesh_of(part.config, jax.devices()[:1]))
        with here._batches(part._replace(train=SizedSplit(9, None)), phase) as batches:
            images, labels = map(np.asarray, next(batches)[:2])
            self.assertEqual((images.shape, images.dtype), ((500, 8, 8, 1), np.uint8))
            self.assertEqual((images.min(), images.max()), (0, 255))
            self.assertEqual(({*labels.tolist()}, labels.dtype), ({*range(10)}, np.int32))
            np.testing.assert_array_equal(next(batches)[0], images)


class ClockTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.now = 0.0
        self.enter_context(mock.patch.object(here.time, "perf_counter", lambda: self.now))

    def test_an_evaluation_is_all_its_batches(self):
        part = work(digits())[0]
        part.config.test.update(batch_size=64, images=130)  # two whole batches, and one of two
        part.config.evaluation.update(batch_size=25, images=50)
        phase = SimpleNamespace(mesh=here.build.mesh_of(part.config, jax.devices()[:1]))

        def program(*arrays):
            self.now += 2.0

        with mock.patch.object(here.tpus, "compile_timed", return_value=(program, 7.0, False)):
            self.assertEqual(here._evaluation(part, "test", phase, (), None), (3 * 2.0, 7.0))
            self.assertEqual(here._evaluation(part, "evaluation", phase, (), None), (2 * 2.0, 7.0))

    @sweeps.rows(
        (2.0, 2),  # as many as fit into the seconds, behind the first
        (0.0, 1),  # but one
        (1e9, here.MOST_STEPS),
    )
    def test_the_first_step_does_not_count(self, seconds, counted):
        self.now, calls = 0.0, []

        def step(state, batch, control):
            self.now += 100.0 if not calls else 1.0
            calls.append((state, batch, control))
            return state + 1, ()

        timed = here._steps(step, 0, itertools.count(), "control", seconds)
        self.assertEqual(timed, (counted, 1.0))
        self.assertEqual(calls, [(i, i, "control") for i in range(counted + 1)])

    def test_the_second_run_and_the_second_checkpoint_are_timed(self):
        durations = iter([100.0, 3.0, 50.0, 4.0])

        def run(*of):
            self.now += next(durations)

        self.assertEqual(here._timed(run), 3.0)
        checkpoints = mock.MagicMock(**{"wait.side_effect": run})
        with mock.patch.object(here, "Checkpoints", return_value=checkpoints):
            self.assertEqual(here._saved("state"), 4)
        saved = [call.args for call in checkpoints.save.call_args_list]
        self.assertEqual(saved, [(1, "state", {}), (2, "state", {})])
        checkpoints.close.assert_called_once_with()
