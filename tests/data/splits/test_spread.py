"""Some images of a split stand for all: spread over its classes, the fewer among the more.

Before, they were the first ones: of a folder, whose records are sorted by class, one class.
"""

import dataclasses
import importlib.util
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.data.splits import balance, spread, subsets
from tests.support import sorted_sources, sweeps

SORTED = np.repeat(np.arange(10), 30)


def counts(labels, classes=10):
    return np.bincount(labels, minlength=classes).tolist()


class OrderTest(parameterized.TestCase):
    @sweeps.rows(1, 7, 10, 39, 100, 299)
    def test_classes_are_as_even_as_can_be(self, n):
        found = counts(SORTED[balance.rows(SORTED, n)])
        self.assertLessEqual(max(found) - min(found), 1)

    def test_the_fewer_are_among_the_more(self):
        labels = np.random.default_rng(0).integers(0, 10, 500) ** 2 // 9  # uneven
        rows = [balance.rows(labels, n).tolist() for n in range(501)]
        for fewer, more in itertools.pairwise(rows):
            self.assertContainsSubset(fewer, more)
        self.assertEqual(rows[-1], [*range(500)])

    def test_each_class_once_then_its_share(self):
        labels = np.repeat([0, 1, 2], [900, 90, 10])
        self.assertEqual(counts(labels[balance.rows(labels, 3)], 3), [1, 1, 1])
        self.assertEqual(counts(labels[balance.rows(labels, 100)], 3), [90, 9, 1])

    def test_within_a_class_it_is_no_order_that_files_have(self):
        """Frames of a video have names in a row, and neighbors resemble each other."""
        found = balance.rows(np.zeros(1000, int), 100)
        self.assertGreater(np.ptp(found), 900)
        self.assertLess(abs(np.mean(found) - 500), 100)

    def test_the_rule_is_what_it_was(self):
        """Records name places: another order would make other images of the same `--n`."""
        self.assertEqual(balance.order(np.zeros(12, int)).tolist(), ORDER)


ORDER = [2, 4, 6, 8, 5, 10, 1, 11, 7, 0, 9, 3]


class PlacesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.source = data.open_source("fake:8x8x1:10", "train")

    def of(self, labels, **changes):
        """A source with these labels, which tells them only when its records are read."""
        self.read = []

        def read(indices):
            self.read += list(indices)
            return [data.Record(b"", int(labels[i])) for i in indices]

        own = {"labels": None, "read": read, "size": len(labels)} | changes
        return dataclasses.replace(self.source, **own)

    def test_a_list_of_labels_and_labels_that_are_read_choose_the_same(self):
        for n in (1, 39, 200):
            found = spread.places(self.of(SORTED), n)
            np.testing.assert_array_equal(found, balance.rows(SORTED, n))

    def test_of_many_records_few_are_read(self):
        labels = np.repeat(np.arange(10), 3000)
        before: list[int] = []
        for n in (39, 4096, 5000, 20_000):
            found = spread.places(self.of(labels), n)
            self.assertLen(np.unique(found), n)
            self.assertTrue((np.diff(found) > 0).all())
            self.assertContainsSubset(before, found.tolist())
            self.assertLessEqual(len(self.read), max(4096, n))
            own = counts(labels[found])
            self.assertLess(max(own) - min(own), 0.2 * n / 10 + 1)
            before = found.tolist()
        self.assertEqual(max(counts(labels[spread.places(self.of(labels), 39)])), 4)

    def test_all_are_all(self):
        for n in (0, None, 300, 1000):
            np.testing.assert_array_equal(spread.places(self.of(SORTED), n), np.arange(300))
            self.assertEqual(spread.choice(self.of(SORTED), n), "all")
        self.assertEmpty(self.read)

    def test_tens_of_millions_are_never_ordered_whole(self):
        found = spread._smallest(10_000_000, 1000)
        self.assertLen(np.unique(found), 1000)
        np.testing.assert_array_equal(found[:10], spread._smallest(10_000_000, 10))

    @sweeps.rows(
        ({"ids_sha256": subsets.ROBUSTBENCH_SHA256}, "robustbench"),
        ({"ids_sha256": subsets.read_ids("robustbench", "cifar10").sha256}, "robustbench"),
        ({"name": "cifar10-c:DIR"}, "robustbench"),  # whose first images RobustBench takes too
        ({"ids_sha256": "of another list"}, "hash"),
        ({}, "hash"),
    )
    def test_the_order_of_robustbench_stays(self, changes, rule):
        source = self.of(SORTED, **changes)
        self.assertEqual(spread.choice(source, 39), rule)
        found = spread.places(source, 39).tolist()
        self.assertEqual(found == [*range(39)], rule == "robustbench")


@parameterized.parameters(*sorted_sources.KINDS)
class SourcesTest(parameterized.TestCase):
    """Every kind of source, through each way to ask for some of its images."""

    def opened(self, kind):
        if kind == "hf" and importlib.util.find_spec("datasets") is None:
            pytest.skip("needs Hugging Face's datasets")
        self.named = sorted_sources.write(kind, Path(self.create_tempdir()))
        how = {"data_dir": self.named.get("data_dir")}
        return data.open_source(self.named["name"], self.named["split"], **how)

    def test_some_images(self, kind):
        source = self.opened(kind)
        how = {"image_size": 8, "preprocessing": "none"}
        prepared = data.Prepared(source, images=39, **how)
        (batch,) = data.evaluation_batches(source, batch_size=39, limit=39, **how)
        loaded = data.load(n=39, **self.named, **how)
        for labels in (prepared.labels(), batch.labels, loaded.labels):
            self.assertEqual((min(counts(labels)), max(counts(labels))), (3, 4))
        for ids in (batch.ids, loaded.ids, spread.places(source, 39)):
            np.testing.assert_array_equal(ids, prepared.ids)
        np.testing.assert_array_equal(loaded.images, prepared[:])
        records = [source[int(place)] for place in prepared.ids]
        self.assertEqual([record.label for record in records], prepared.labels().tolist())
        more = data.Prepared(source, images=100, **how)
        self.assertContainsSubset(prepared.ids.tolist(), more.ids.tolist())

    def test_a_part_is_what_is_written(self, kind):
        """`[:39]` means these images, as it does in TFDS; that they are of one class is said."""
        self.opened(kind)
        self.named["split"] += "[:39]"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded = data.load(**self.named, image_size=8)
        np.testing.assert_array_equal(loaded.ids, np.arange(39))
        words = [str(one.message) for one in said]
        if kind == "fake":  # whose images are of all classes in turn
            self.assertEmpty(words)
        else:
            self.assertIn(
                "39 images cover 2 of 10 classes, and 76.9% of them belong to class 0", words[0]
            )


class LopsidedTest(parameterized.TestCase):
    EVEN = np.full(10, 30)

    @sweeps.rows(39, 100, 200, 270)
    def test_the_first_of_a_sorted_split(self, n):
        words = balance.lopsided(SORTED[:n], 10, self.EVEN)
        self.assertStartsWith(words, f"{n} images cover {-(-n // 30)} of 10 classes")
        self.assertIn("which has 10.0% of the split's 300 images", words)

    @sweeps.rows(1, 20, 39, 100, 200, 299)
    def test_a_random_part_is_none(self, n):
        for seed in range(200):
            some = np.random.default_rng(seed).permutation(SORTED)[:n]
            self.assertEqual(balance.lopsided(some, 10, self.EVEN), "")
            self.assertEqual(balance.lopsided(some, 10), "")

    def test_nor_is_a_split_that_is_uneven_itself(self):
        labels = np.repeat([0, 1, 2], [900, 90, 10])
        some = np.random.default_rng(0).permutation(labels)[:100]
        self.assertEqual(balance.lopsided(some, 3, np.bincount(labels)), "")
        self.assertEqual(balance.lopsided(labels, 3, np.bincount(labels)), "")

    def test_where_the_split_is_not_known(self):
        self.assertEqual(balance.lopsided(SORTED[:150], 10), "")  # half of them
        self.assertIn("120 images cover 4 of 10", balance.lopsided(SORTED[:120], 10))
        self.assertEqual(balance.lopsided(np.arange(3), 1000), "")

    def test_one_class(self):
        words = balance.one_class(SORTED[:30], 10)
        self.assertStartsWith(words, "all 30 images belong to class 0, one of 10 classes, so their")
        for labels, classes in (([0], 10), ([0, 0], 1), ([0, 1], 2), ([], 10)):
            self.assertEqual(balance.one_class(np.array(labels, int), classes), "")
