"""What a card says of a record, number by number."""

import types
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.convert import network_account
from jaxrobust.models.published import PUBLISHED
from jaxrobust.types import Threat
from jaxrobust.weights import load


class ImagesTest(absltest.TestCase):
    def test_both_ends_are_counted(self):
        record = types.SimpleNamespace(dataset="digits", split="test", image_ids="0..7")
        self.assertEqual(network_account.images(record), "8 of digits, split test")
        record.image_ids = "a list"
        self.assertEqual(network_account.images(record), "digits, split test")


class PublishedTest(parameterized.TestCase):
    @parameterized.parameters("imagenet", "cifar10")
    def test_the_leaderboard_says_the_data_set(self, dataset):
        key = next(key for key, net in PUBLISHED.items() if net.board.dataset == dataset)
        about = {"published_id": key, "norm": "linf", "epsilon": 0.25, "accuracies": None}
        about["preprocessing"] = None
        with mock.patch.object(load, "about", return_value=about):
            found = network_account.of_weights(mock.Mock(), key)
        # ImageNet's images are known by the list of classes alone: there are several names of it.
        self.assertEqual(found.imagenet, dataset == "imagenet")
        self.assertEqual(found.dataset, None if dataset == "imagenet" else "cifar10")
        self.assertEqual((found.published, found.threat), (key, Threat("linf", 0.25)))


if __name__ == "__main__":
    absltest.main()
