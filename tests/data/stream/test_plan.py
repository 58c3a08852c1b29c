"""Views of an image in one batch, and a second source: what stands where in the stream."""

import collections
import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.data.sources.registry import DataError, Record
from jaxrobust.data.stream import loading
from jaxrobust.data.stream import plan as plans
from jaxrobust.data.stream.plan import plan
from jaxrobust.data.transforms import augmentations
from tests.support import sweeps
from tests.support.numbered import numbered, taken

CROP = "crop(2)|flip"


def extra(size=21, **changes):
    """A second source whose images are brighter than any of the first."""
    source = numbered(size, offset=100)
    return dataclasses.replace(source, name="generated", split="all", **changes)


class PlanTest(parameterized.TestCase):
    def test_without_either_it_is_the_sequence_of_before(self):
        """Permutation and draws by their definition; runs of before these keys continue."""
        source, size, seed, batch = numbered(37), 37, 11, 8
        found = plan(source, batch_size=batch, seed=seed)
        self.assertEqual((found.steps, found.examples), (4, 32))
        images, labels = taken(source, 9, batch_size=batch, seed=seed, augmentation=CROP)
        augment = augmentations.chain(CROP, 8).augment
        read = loading.DecodedImages(source, 0, True)
        for position in range(9 * batch):
            epoch, offset = divmod(position, 32)
            order = np.random.Generator(
                np.random.Philox(key=[seed, 0], counter=[0, 0, 0, epoch])
            ).permutation(size)
            index = int(order[offset])
            ((image, label),) = read([index])
            draws = np.random.Philox(key=[seed, 1], counter=[0, 0, epoch, index])
            expected = augment(image, np.random.Generator(draws))
            np.testing.assert_array_equal(images[position], expected)
            self.assertEqual(labels[position], label)
            placed = found.place(position, 1)
            self.assertEqual((placed.epochs[0], placed.record[0]), (epoch, index))


class ViewsTest(parameterized.TestCase):
    def test_an_image_stands_so_often_in_its_batch(self):
        source = numbered(37)
        found = plan(source, batch_size=12, views=3)
        self.assertEqual((found.steps, found.examples), (9, 108))  # 4 images a batch
        seen = collections.Counter()
        for step in range(found.steps):
            placed = found.place(12 * step, 12)
            self.assertEqual(set(collections.Counter(placed.record.tolist()).values()), {3})
            for view in range(3):  # neighbors, which mix with each other, are different images
                here = placed.record[4 * view : 4 * view + 4]
                np.testing.assert_array_equal(here, placed.record[:4])
                np.testing.assert_array_equal(placed.view[4 * view : 4 * view + 4], view)
            seen.update(placed.record.tolist())
        self.assertEqual((len(seen), set(seen.values())), (36, {3}))
        other = found.place(found.examples, 12)  # of the next epoch
        self.assertFalse(np.array_equal(other.record, found.place(0, 12).record))

    def test_views_are_augmented_differently(self):
        source = numbered(16, side=8)
        gradient = dataclasses.replace(source, read=read_gradients)
        options = {"batch_size": 12, "views": 3, "augmentation": "crop(3)|flip"}
        images, labels = taken(gradient, 4, **options)
        images = images.reshape(4, 3, 4, 8, 8)
        np.testing.assert_array_equal(labels.reshape(4, 3, 4)[:, 0], labels.reshape(4, 3, 4)[:, 2])
        different = [
            (images[:, a] != images[:, b]).any((-1, -2)).mean() for a, b in ((0, 1), (1, 2), (0, 2))
        ]
        self.assertGreater(min(different), 0.8)  # 49 places and 2 sides: some agree by chance
        with self.subTest("the first one is that of a stream of its own images"):
            alone, _ = taken(gradient, 4, batch_size=4, augmentation="crop(3)|flip")
            np.testing.assert_array_equal(images[:, 0].reshape(-1, 8, 8), alone[..., 0])
        with self.subTest("the first one may be augmented less"):
            plain, _ = taken(gradient, 4, **options, first_view="none")
            plain = plain.reshape(4, 3, 4, 8, 8)
            np.testing.assert_array_equal(plain[:, 1:], images[:, 1:])
            for image in plain[:, 0].reshape(-1, 8, 8):
                self.assertEqual(image[0, 0], image[0, 1] - 1)  # neither cut nor flipped


class ExtraTest(parameterized.TestCase):
    def test_each_batch_has_its_share_and_an_epoch_ends_with_the_first_source(self):
        for share, size, steps, each in (
            (0.5, 21, 4, 5),  # floor(0.5 * 11) generated, 6 real: 37 // 6 = 6, 21 // 5 = 4
            (0.7, 99, 9, 7),  # 4 real: 37 // 4 = 9
            (0.0, 21, 3, 0),
            (0.9, 30, 3, 9),
        ):
            found = plan(numbered(37), batch_size=11, extra=extra(size), extra_share=share)
            self.assertEqual((found.steps, found.rows), (steps, (11 - each, each)))
            for epoch in range(2):
                records = collections.Counter()
                for step in range(steps):
                    placed = found.place((epoch * steps + step) * 11, 11)
                    np.testing.assert_array_equal(placed.epochs, epoch)
                    self.assertEqual(placed.source.sum(), each)
                    records.update(zip(placed.source.tolist(), placed.record.tolist(), strict=True))
                self.assertEqual(set(records.values()), {1})  # nothing twice in an epoch
        with self.subTest("the rows are in another order in each step"):
            found = plan(numbered(37), batch_size=10, extra=extra())
            orders = {tuple(found.place(10 * step, 10).source.tolist()) for step in range(8)}
            self.assertGreater(len(orders), 4)

    def test_a_share_is_that_of_the_decimal_number(self):
        """0.29 times 100 is 28.999999999999996 in binary, and 29 to whoever writes it."""
        for size in (1, 10, 100, 1000, 1024):
            for percent in range(100):
                sources = numbered(size + 1), extra(size + 1)
                found = plan(
                    sources[0], batch_size=size, extra=sources[1], extra_share=percent / 100
                )
                self.assertEqual(found.rows[1], percent * size // 100, (percent, size))

    def test_both_orders_and_both_augmentations_by_their_definition(self):
        """No stream of draws is another one's: keys 0 and 1 of the first source, 2 and 3 of the
        second.
        """
        first, second, seed, batch = numbered(37), extra(33), 11, 10
        images, _ = taken(
            first, 9, batch_size=batch, seed=seed, augmentation=CROP, extra=second
        )  # epochs of 6 steps
        found = plan(first, batch_size=batch, seed=seed, extra=second)
        augment, half = augmentations.chain(CROP, 8).augment, batch // 2
        placed = found.place(0, 9 * batch)
        met = [collections.Counter(), collections.Counter()]
        for position in range(9 * batch):
            epoch, which = int(placed.epochs[position]), int(placed.source[position])
            record = int(placed.record[position])
            order = np.random.Philox(key=[seed, 2 * which], counter=[0, 0, 0, epoch])
            order = np.random.Generator(order).permutation((37, 33)[which])
            step = position // batch % found.steps
            self.assertIn(record, order[half * step : half * (step + 1)])
            met[which][epoch, step] += 1
            source = (first, second)[which]
            ((image, _),) = loading.DecodedImages(source, 0, True)([record])
            draws = np.random.Philox(key=[seed, 2 * which + 1], counter=[0, 0, epoch, record])
            expected = augment(image, np.random.Generator(draws))
            np.testing.assert_array_equal(images[position], expected)
        self.assertEqual([set(one.values()) for one in met], [{half}, {half}])

    def test_images_and_labels_are_those_of_their_source(self):
        first, second = numbered(37), extra()
        images, labels = taken(first, 8, batch_size=10, extra=second)
        values = images[:, 0, 0, 0].astype(int)
        found = values >= 100
        np.testing.assert_array_equal(found.reshape(8, 10).sum(1), 5)
        np.testing.assert_array_equal(labels, np.where(found, values - 100, values) % 10)

    @sweeps.rows(1, 2, 5)
    def test_same_for_processes_and_from_any_step(self, count):
        options = {"batch_size": 10, "extra": extra(), "augmentation": CROP, "views": 5}
        whole, _ = taken(numbered(37), 9, **options)
        parts = [
            taken(numbered(37), 6, start=30, process_index=i, process_count=count, **options)[0]
            for i in range(count)
        ]
        joined = np.concatenate([p.reshape(6, -1, 8, 8, 1) for p in parts], axis=1)
        np.testing.assert_array_equal(joined.reshape(whole[30:].shape), whole[30:])

    @pytest.mark.slow
    def test_same_for_workers(self):
        options = {"batch_size": 10, "extra": extra(), "augmentation": CROP}
        one, two = (taken(numbered(37), 9, workers=n, **options) for n in (0, 2))
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])

    @sweeps.rows(
        ({"extra_share": 1.5}, r"data.extra_share=1.5 must be between 0 and 1"),
        (
            {"extra_share": 1.0, "extra": extra()},
            "data.extra_share=1.0 leaves no image of .*'numbered'.* in a batch of 16; use at most",
        ),
        ({"extra_share": -0.1}, r"data.extra_share=-0.1 must be between 0 and 1"),
        ({"extra_share": float("nan")}, "data.extra_share=nan must be between 0 and 1"),
        (
            {"extra": extra(num_classes=7)},
            "'generated', split 'all' has 7 classes, but .*'numbered'.* has 10; give a",
        ),
        ({"extra": extra(channels=3)}, "has 3 channels, but .* has 1; give .* with the same"),
        (
            {"extra": extra(classes=tuple("abcdefghij"))},
            r"names its classes differently .* \('a', ... and '0', ...\)",
        ),
        ({"extra": extra(4)}, "a batch of 16 needs 8 images of .*'generated'.* which has 4"),
        ({"views": 0}, r"data.views=0 does not divide the 16 rows .* one of \[1, 2, 4, 8, 16\]"),
        ({"views": 3}, "data.views=3 does not divide the 16 rows"),
        ({"views": 3, "extra": extra()}, "data.views=3 does not divide the 8 rows"),
        ({"first_view": "flop"}, "flop"),
    )
    def test_refuses(self, changes, message):
        source = dataclasses.replace(numbered(37), classes=tuple("0123456789"))
        with self.assertRaisesRegex(DataError, message):
            taken(source, 1, batch_size=16, **changes)

    @sweeps.rows(*range(6))
    def test_draws_forget_what_those_of_the_image_before_left(self, drawn):
        """Half of a 64-bit number, and a part of a block of four, are left by some of them."""
        numbers = []
        for before in (0, drawn):
            bits = np.random.Philox(key=[3, 1])
            rng = np.random.Generator(bits)
            rng.integers(0, 1 << 32, size=before, dtype=np.uint32)
            loading._restart(bits, epoch=2, index=5, view=1)
            numbers.append(rng.integers(0, 1 << 32, size=9, dtype=np.uint32))
        np.testing.assert_array_equal(*numbers)
        own = np.random.Philox(key=[3, 1], counter=[0, 1, 2, 5])
        wanted = np.random.Generator(own).integers(0, 1 << 32, size=9, dtype=np.uint32)
        np.testing.assert_array_equal(numbers[0], wanted)

    def test_refuses_images_of_another_size(self):
        other = dataclasses.replace(numbered(37, side=9), name="generated")
        with self.assertRaisesRegex(DataError, "'generated'.* has 9x9 images"):
            taken(numbered(37), 1, batch_size=8, extra=other)


class PermutedTest(parameterized.TestCase):
    """Orders of sources too large for a permutation in memory."""

    @sweeps.rows(2, 3, 4095, 4096, 4097, 20_000, 2**15 + 1)
    def test_every_record_has_one_place(self, size):
        for epoch in (0, 7):
            found = plans.permuted((5, 2), epoch, size, np.arange(size))
            np.testing.assert_array_equal(np.sort(found), np.arange(size))

    def test_is_a_function_of_seed_source_and_epoch(self):
        places = np.arange(2000)
        orders = [
            plans.permuted(key, epoch, 50_000_000, places)
            for key, epoch in (((5, 2), 0), ((5, 2), 1), ((6, 2), 0), ((5, 0), 0))
        ]
        for one, other in itertools.combinations(orders, 2):
            self.assertLess((one == other).sum(), 3)
        again = [plans.permuted((5, 2), 0, 50_000_000, places[[k]])[0] for k in (3, 1999, 0)]
        np.testing.assert_array_equal(again, orders[0][[3, 1999, 0]])

    def test_is_as_even_as_random_numbers(self):
        """Chi-squared of 100 ranges, of neighbors and of last bits, each about its freedom."""
        count, size = 100_000, 30_000_000
        found = plans.permuted((5, 2), 3, size, np.arange(count))
        steps = np.diff(found) % size
        for values, cells in ((found * 100 // size, 100), (steps * 100 // size, 100)):
            met = np.bincount(values, minlength=cells)
            chi = ((met - len(values) / cells) ** 2 / (len(values) / cells)).sum()
            self.assertBetween(chi, 50, 160)  # of 99 degrees of freedom, 4 deviations
        met = np.bincount(found % 64, minlength=64)
        self.assertBetween(((met - count / 64) ** 2 / (count / 64)).sum(), 25, 110)

    def test_an_epoch_of_a_large_source_has_nothing_twice(self):
        with mock.patch.object(plans, "HELD", 30):
            found = plan(numbered(37), batch_size=10, extra=extra(), extra_share=0.7)
            placed = found.place(0, 2 * found.examples)
        held = plan(numbered(37), batch_size=10, extra=extra(), extra_share=0.7)
        same = held.place(0, 2 * held.examples)
        self.assertFalse((placed.record == same.record).all())
        for epoch in (0, 1):
            here = placed.epochs == epoch
            pairs = list(zip(placed.source[here], placed.record[here], strict=True))
            self.assertLen(set(pairs), len(pairs))
            shares = placed.source[here].reshape(-1, 10).sum(1)
            np.testing.assert_array_equal(shares, 7)


def read_gradients(indices):
    """Images whose pixels say where they were."""
    image = bytes(10 * y + x + 1 for y in range(8) for x in range(8))
    return [Record(b"P5 8 8 255\n" + image, index % 10) for index in indices]
