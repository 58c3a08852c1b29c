"""The streams of images that the phases of a run train on."""

import contextlib
import types
from unittest import mock

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


class PreprocessingTest(absltest.TestCase):
    def test_no_image_is_made_of_a_size_that_is_refused(self):
        config = runs.tiny(model__image_size=100_000)
        making = mock.patch.object(splits, "evaluation_transform", side_effect=AssertionError)
        with making, self.assertRaisesRegex(ValueError, "image_size=100000 must be at most 8192"):
            splits.check_preprocessing(config, mock.Mock())


class BlankTest(absltest.TestCase):
    def test_images_that_no_host_takes_are_whole_and_hold_nothing(self):
        config = runs.tiny(train__batch_size=24)
        run = types.SimpleNamespace(config=config, name="train")
        for processes in (1, 3):
            with mock.patch.object(splits.jax, "process_count", return_value=processes):
                blank = splits.blank(run)
            rows, side = 24 // processes, config.model.image_size
            shape = (rows, side, side, config.model.in_channels)
            self.assertEqual((blank.images.shape, blank.images.dtype), (shape, np.uint8))
            self.assertEqual((blank.labels.shape, blank.labels.dtype), ((rows,), np.int32))
            self.assertEqual((blank.images.any(), blank.labels.any()), (False, False))
            self.assertEqual(blank.damaged.tolist(), [-1] * rows)
