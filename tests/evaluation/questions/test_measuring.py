"""In which batches an evaluation by the command counts its images."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.questions import measuring
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.types import Threat
from tests.support import sweeps


class CountedTest(parameterized.TestCase):
    @sweeps.rows(
        (None, 4, 1, 4), (None, 4, 4, 4), (None, 4, 3, 6), (3, 4, 1, 3), (3, 4, 4, 4), (9, 4, 1, 4)
    )
    def test_a_batch_is_no_larger_than_the_images_need(self, batch, images, devices, size):
        subject = SimpleNamespace(
            ball=Threat("l2", 0.5), norm="l2", batch_size=100, image_size=8, workers=2,
            create=lambda dtype: f"net in {dtype}",
        )  # fmt: skip
        question = GivenFlags(attack="pgd-3", batch=batch, n=images, seed=7)
        mesh, source = SimpleNamespace(size=devices), SimpleNamespace(num_classes=3)
        with (
            mock.patch.object(measuring, "attack_of", return_value=([{"name": "x"}], "attack")),
            mock.patch.object(measuring.sharding, "make_mesh", return_value=mesh),
            mock.patch.object(measuring.accuracy, "counter"),
            mock.patch.object(measuring.accuracy, "each", side_effect=StopIteration) as each,
            self.assertRaises(StopIteration),
        ):
            measuring.counted(subject, source, "weights", question, np.arange(images))
        given = each.call_args.args[2]
        self.assertEqual((given.batch_size, given.seed, given.workers), (size, 7, 2))
