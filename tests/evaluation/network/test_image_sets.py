"""Images that are read when they are needed: clipped, chosen, hashed."""

import hashlib
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.network import images
from jaxrobust.evaluation.network.images import Adversarial, InRange, Subset

OVER = np.float32(5e-7)


class Lazy:
    """An image set over an array."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __len__(self):
        return len(self.array)

    def __getitem__(self, which):
        return self.array[which].copy()


def pictures(n: int = 5) -> np.ndarray:
    made = np.random.default_rng(0).uniform(0.1, 0.9, (n, 2, 2, 1)).astype(np.float32)
    return made


class ClippedTest(parameterized.TestCase):
    def test_what_is_inside_stays_the_same_array(self):
        inside = pictures()
        inside[0, 0, 0], inside[1, 0, 0] = 0, 1
        found, pixels = images.clipped(inside)
        self.assertIs(found, inside)
        self.assertIsNone(pixels)
        self.assertIsNone(images.clipped(np.zeros((0, 2, 2, 1)))[1])

    def test_an_image_set_counts_each_image_once_however_often_it_is_read(self):
        some = pictures()
        some[1, 0], some[3, 1, 1], some[4, 0, 0] = -OVER, 1 + OVER, -OVER / 2
        seen = InRange(Lazy(some))
        self.assertEqual((len(seen), seen.shape), (5, (5, 2, 2, 1)))
        self.assertIsNone(seen.overshot())
        self.assertEqual(seen[np.array([0, 2])].tolist(), some[[0, 2]].tolist())
        self.assertIsNone(seen.overshot())
        self.assertEqual(seen[np.array([3, 1])].max(), 1)
        self.assertEqual(seen[1].shape, (2, 2, 1))
        self.assertEqual((seen[1:4].min(), seen[1:4].max()), (0, 1))
        found = seen.overshot()
        self.assertEqual((found["images"], found["pixels"]), (2, 3))
        self.assertAlmostEqual(found["largest"], OVER, delta=2e-7)
        seen[-1]
        self.assertEqual(seen.overshot()["images"], 3)
        theirs = {1: {"images": 1, "pixels": 2, "largest": 9.0}}
        theirs |= {0: {"images": 1, "pixels": 1, "largest": 0.5}}
        everyone = lambda own: [own, theirs]  # noqa: E731
        with mock.patch.object(images.hosts, "everyone", everyone):  # a place counts once
            whole = seen.overshot()
        self.assertEqual((whole["images"], whole["pixels"], whole["largest"]), (4, 5, 9.0))

    def test_a_hash_of_its_own_is_kept(self):
        inside = Lazy(pictures())
        self.assertFalse(hasattr(InRange(inside), "content_sha256"))
        inside.content_sha256 = lambda: "own"
        self.assertEqual(InRange(inside).content_sha256(), "own")


class ChosenTest(parameterized.TestCase):
    def test_adversarial_images_stand_in_the_place_of_those_that_fell(self):
        some = pictures(4)
        book = mock.Mock()
        book.adversarial.side_effect = lambda place, attack, shape: np.full(shape, 10 + place)
        fooled_by = np.array(["", "clean", "square", "replay"])
        seen = Adversarial(Lazy(some), book, fooled_by)
        self.assertEqual((len(seen), seen.shape), (4, (4, 2, 2, 1)))
        found = seen[np.array([3, 0, 1])]
        self.assertEqual(found[0].max(), 13)
        np.testing.assert_array_equal(found[1:], some[:2])
        self.assertEqual((seen[2].shape, seen[2].max()), ((2, 2, 1), 12))
        self.assertEqual([seen[:][i].max() >= 10 for i in range(4)], [False, False, True, True])
        self.assertEqual(book.adversarial.call_args_list[0].args, (3, "replay", (2, 2, 1)))

    def test_some_of_the_images(self):
        some = pictures()
        own = Subset(Lazy(some), np.array([4, 1]))
        self.assertEqual((len(own), own.shape), (2, (2, 2, 2, 1)))
        np.testing.assert_array_equal(own[np.array([1, 0])], some[[1, 4]])
        hashes = {Subset(Lazy(some), np.array(p)).content_sha256() for p in ([4, 1], [1, 4], [1])}
        hashes.add(Subset(Lazy(some + OVER), np.array([4, 1])).content_sha256())
        self.assertLen(hashes, 4)

    def test_a_hash_is_of_type_shape_and_bytes_of_all(self):
        some, labels = pictures(40), np.arange(40)
        text = hashlib.sha256(b"float32 (40, 2, 2, 1)" + some.tobytes())
        self.assertEqual(images.hashed(some), text.hexdigest())
        self.assertEqual(images.hashed(Lazy(some)), text.hexdigest())
        text.update(f"int32 (40,){''}".encode() + labels.astype(np.int32).tobytes())
        self.assertEqual(images.hashed(some, labels.astype(np.int32)), text.hexdigest())
        others = [
            images.hashed(some, labels.astype(np.int64)),
            images.hashed(some, labels.astype(np.int32).reshape(2, 20)),
            images.hashed(some.reshape(40, 4, 1, 1), labels.astype(np.int32)),
            images.hashed(some),
            text.hexdigest(),
        ]
        self.assertLen({*others}, 5)
        own = Lazy(some)
        own.content_sha256 = lambda: "own"
        expected = hashlib.sha256(b"float32 (40, 2, 2, 1)own").hexdigest()
        self.assertEqual(images.hashed(own), expected)
