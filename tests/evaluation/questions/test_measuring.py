"""What a count comes to, image by image, and what may be asked, at both sides of each limit."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.questions import measuring
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.types import Threat
from tests.support import sweeps

REACHED = {
    "clean": np.array([True, True, False, True]),
    "robust": np.array([True, False, False, False]),
    "finite": np.array([True, True, True, True]),
    "labels": np.array([0, 1, 2, 0]),
    "norms": np.array([0.25, 0.5, 0.75, 1.0], np.float32),
    "answers": np.array([0, 1, 0, 0]),
    "reached": np.array([1, 2, 0, 1]),
}
PLACES = np.array([2, 3, 5, 7])


class CountedTest(parameterized.TestCase):
    """Which images are counted, in which batches, and what is told of them."""

    def counted(self, question: Question, *, devices=4, places=PLACES):
        subject = SimpleNamespace(
            ball=Threat("l2", 0.5), norm="l2", batch_size=100, image_size=8, workers=2,
            create=lambda dtype: f"net in {dtype}",
        )  # fmt: skip
        more = {"stable": np.array([1.0, 0, 0, 0]), "local_lipschitz": np.arange(4.0)}
        self.each = mock.Mock(return_value=REACHED | more | {"clean_top5": np.ones(4)})
        mesh, source = SimpleNamespace(size=devices), SimpleNamespace(num_classes=3)
        with (
            mock.patch.object(measuring, "attack_of", return_value=([{"name": "x"}], "attack")),
            mock.patch.object(measuring.sharding, "make_mesh", return_value=mesh),
            mock.patch.object(measuring.accuracy, "counter") as counter,
            mock.patch.object(measuring.accuracy, "each", self.each),
        ):
            found = measuring.counted(subject, source, "weights", question, places)
        counter.assert_called_once_with("net in float32", "attack", mesh=mesh, top5=True, each="l2")
        return found

    @sweeps.rows(
        (None, 4, 1, 4), (None, 4, 4, 4), (None, 4, 3, 6), (3, 4, 1, 3), (3, 4, 4, 4), (9, 4, 1, 4)
    )
    def test_a_batch_is_no_larger_than_the_images_need(self, batch, images, devices, size):
        question = Question("pgd-3", batch=batch, images=images, seed=7)
        self.counted(question, devices=devices)
        _, weights, given, _ = self.each.call_args.args
        self.assertEqual((weights, given.batch_size), ("weights", size))
        self.assertEqual((given.seed, given.workers), (7, 2))
