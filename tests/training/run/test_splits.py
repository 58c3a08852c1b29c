"""The streams of images that the phases of a run train on."""

import contextlib

import numpy as np
from absl.testing import absltest

from jaxrobust.training.run import splits
from tests.support import runs


class StreamTest(absltest.TestCase):
    def images(self, name, start=0, **changes):
        """One batch, whatever was drawn for its augmentation."""
        config = runs.tiny(data__augmentation="none", **changes)
        source = splits.opened(config, "train_split")
        with contextlib.closing(splits.batches(config, name, source, start)) as batches:
            return next(batches).images

    def test_phases_of_one_seed_have_orders_of_their_own(self):
        first, second = self.images("pretrain"), self.images("train")
        self.assertEqual(first.shape, second.shape)
        self.assertTrue((first != second).any())
        np.testing.assert_array_equal(self.images("train"), second)

    def test_a_seed_moves_both(self):
        for name in ("pretrain", "train"):
            self.assertTrue((self.images(name) != self.images(name, seed=7)).any())


if __name__ == "__main__":
    absltest.main()
