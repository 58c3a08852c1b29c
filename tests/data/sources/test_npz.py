"""Arrays of NumPy's files are a data set, with the keys that MedMNIST and Keras use."""

import importlib.util
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.data.splits import storage
from jaxrobust.data.stream import loading
from tests.support import sweeps

DRAW = np.random.default_rng(0)


def images(count, shape=(6, 6, 3)):
    return DRAW.integers(0, 256, (count, *shape), np.uint8)


def labels(count, classes=4):
    return np.arange(count) * 7 % classes


class NpzCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "set.npz"

    def write(self, save=np.savez, **arrays):
        save(self.path, **arrays)
        return f"npz:{self.path}"

    def refused(self, *patterns, split="test", **arrays):
        with self.assertRaises(data.DataError) as caught:
            data.open_source(self.write(**arrays), split)
        for pattern in patterns:
            self.assertRegex(str(caught.exception), pattern)
        self.assertNotIn("\n", str(caught.exception))


class ReadTest(NpzCase):
    @sweeps.rows(("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X_{}", "y_{}"))
    def test_splits(self, x, y):
        every = {s: (images(n), labels(n)) for s, n in (("train", 30), ("val", 9), ("test", 8))}
        keys = {x.format(s): i for s, (i, _) in every.items()}
        name = self.write(**keys, **{y.format(s): k for s, (_, k) in every.items()})
        for split, (pixels, expected) in [*every.items(), ("validation", every["val"])]:
            source = data.open_source(name, split)
            self.assertEqual((source.num_classes, source.image_shape), (4, (6, 6, 3)))
            np.testing.assert_array_equal(source.labels, expected)
            loaded = data.load(name, split=split)
            np.testing.assert_array_equal(loaded.images, pixels / np.float32(255))
            np.testing.assert_array_equal(loaded.labels, expected)

    def test_classes_are_those_of_all_splits(self):
        """A test split may lack the highest class of training, of which a network has an output."""
        name = self.write(
            train_images=images(6), train_labels=np.array([0, 1, 2, 3, 4, 0]),
            test_images=images(2), test_labels=np.array([1, 0]),
        )  # fmt: skip
        self.assertEqual([data.open_source(name, s).num_classes for s in ("train", "test")], [5, 5])
        names = np.array(["a", "b", "c", "d", "e", "f"])
        name = self.write(images=images(2), labels=np.array([1, 0]), class_names=names)
        self.assertEqual(data.open_source(name, "all").num_classes, 6)

    def test_names_are_a_list_of_texts(self):
        given = {"images": images(2), "labels": np.array([1, 0])}
        for other in (np.array([["a", "b"]]), np.array([3, 4]), np.array("ab")):
            source = data.open_source(self.write(**given, classes=other), "all")
            self.assertEqual((source.classes, source.num_classes), ((), 2))
        as_bytes = np.array([b"a", b"b"])
        name = self.write(**given, classes=np.array([3]), label_names=as_bytes)
        self.assertEqual(data.open_source(name, "all").classes, ("a", "b"))

    def test_as_many_names_as_the_largest_label_says(self):
        given = {"images": images(2), "labels": np.array([1, 0])}
        enough = np.array(["a", "b"])
        source = data.open_source(self.write(**given, classes=enough), "all")
        self.assertEqual(source.classes, ("a", "b"))
        self.refused("labels go up to 1, but the file names 1 classes", split="all", **given,
                     classes=enough[:1])  # fmt: skip

    def test_as_medmnist_publishes(self):
        """Compressed, gray, labels uint8[N,1]."""
        pixels, expected = images(20, (5, 7)), labels(20, 3)
        name = self.write(
            np.savez_compressed,
            train_images=pixels,
            train_labels=expected[:, None].astype(np.uint8),
        )
        source = data.open_source(name, "train[5:]")
        self.assertEqual((source.channels, source.image_shape), (1, (5, 7, 1)))
        again = pickle.loads(pickle.dumps(source))
        for i in (0, 14, 3):
            decoded = loading.decoded(source, again[i].image)
            np.testing.assert_array_equal(decoded[:, :, 0], pixels[5 + i])
            self.assertEqual(again[i].label, expected[5 + i])
        self.assertRegex(source.describe(2), "^image 7 of train_images in .*set.npz$")

    @sweeps.rows("U1", "S1")
    def test_one_split(self, kind):
        name = self.write(images=images(10), labels=labels(10), classes=np.array([*"abcde"], kind))
        source = data.open_source(name, "all[:40%]")
        self.assertEqual((len(source), source.num_classes), (4, 5))
        self.assertEqual(source.classes, tuple("abcde"))
        listed = self.path.with_name("classes")
        listed.write_text("c\na\n")
        chosen = data.open_source(name, "all", classes=str(listed))
        expected = [{2: 0, 0: 1}[k] for k in labels(10).tolist() if k in (0, 2)]
        self.assertEqual([record.label for record in chosen], expected)
        self.assertEqual((chosen.num_classes, chosen.classes), (2, ("c", "a")))

    def test_the_hash_is_of_the_content(self):
        pixels = images(10)

        def of(split="all", **arrays):
            return data.open_source(self.write(**arrays), split).files_sha256

        same = {"images": pixels, "labels": labels(10)}
        first = of(**same)
        self.assertEqual(of(**same, other=np.arange(3)), first)
        changed = pixels.copy()
        changed[3, 0, 0, 0] ^= 1
        others = {of(images=changed, labels=labels(10)), of(images=pixels, labels=labels(10, 3))}
        others |= {of("all[:5]", **same), of(**same, classes=np.array([*"abcd"]))}
        self.assertLen({first, *others}, 5)

    def test_in_a_bucket(self):
        if not importlib.util.find_spec("gcsfs"):
            self.skipTest("needs gcsfs: pip install -e '.[gcs]'")
        name = self.write(x_test=images(5), y_test=labels(5))
        place = storage.place

        def local(text):
            return place(os.fspath(text).replace("gs://bucket", str(self.path.parent)))

        with (
            mock.patch.object(storage, "place", local),
            mock.patch.object(storage, "is_remote", lambda path: True),
        ):
            source = data.open_source("npz:gs://bucket/set.npz", "test")
            self.assertEqual(source[3], data.open_source(name, "test")[3])


class RefusedTest(NpzCase):
    @sweeps.rows("val", "train[", "nothing", "all")
    def test_unknown_split(self, split):
        arrays = {"x_test": images(5), "y_test": labels(5), "x_train": images(3)}
        pattern = r"has no split '.*': it has test \(5\); write parts as train\[:90%\]"
        self.refused(pattern, split=split, **arrays)

    def test_ids(self):
        self.refused(
            "lacks 5000 of the 5000 images of robustbench",
            split="test@robustbench",
            x_test=images(5),
            y_test=labels(5),
        )

    @sweeps.rows(
        ({}, "has x_test, but no y_test; write images and labels"),
        ({"y_test": labels(4)}, r"y_test is int64\[4\], not one integer for each of the"),
        ({"y_test": np.ones(5)}, r"y_test is float64\[5\], not one integer"),
        ({"y_test": np.ones((5, 14), int)}, r"y_test is int64\[5, 14\], not one"),
        ({"y_test": labels(5) - 1}, "y_test holds -1; labels start at 0"),
        ({"y_test": np.array([None] * 5)}, r"y_test is object\[5\], not one integer"),
        ({"y_test": labels(5), "classes": np.array(["a"])}, "y_test go up to 3, but the file nam"),
    )  # fmt: skip
    def test_labels(self, changes, why):
        self.refused(why, x_test=images(5), **changes)

    @sweeps.rows(
        (np.ones((5, 6, 6, 3), np.float32),
         r"x_test is float32\[5, 6, 6, 3\], not uint8.*; write np.round\(255 \* x_test\)"),
        (np.ones((5, 6, 6), np.int64), "write pixels from 0 to 255 as uint8"),
        (np.ones((5, 3, 6, 6), np.uint8), r"write x_test.transpose\(0, 2, 3, 1\)"),
        (np.ones((5, 108), np.uint8), r"uint8\[5, 108\], not uint8.*in one of these shapes"),
        (np.ones((5, 6, 6, 4), np.uint8), "write the images in one of these shapes"),
        (np.ones((0, 6, 6), np.uint8), "write the images in one of these shapes"),
        (np.array([None] * 5), r"x_test is object\[5\]"),
    )  # fmt: skip
    def test_images(self, pixels, why):
        self.refused(why, x_test=pixels, y_test=labels(len(pixels)))

    def test_other_keys(self):
        self.refused(r"set.npz holds a, b; write images and labels", a=images(2), b=labels(2))
        self.refused("set.npz holds nothing; write images and labels")

    def test_a_damaged_file(self):
        name = self.write(x_test=images(50), y_test=labels(50))
        whole = self.path.read_bytes()
        flipped = bytearray(whole)
        flipped[2000] ^= 1
        for content in (whole[:-100], whole[:50], b"", b"\x93NUMPY" + bytes(100), flipped):
            self.path.write_bytes(content)
            with self.assertRaisesRegex(
                data.DataError, "set.npz is damaged, or not a .npz file .*; copy the file again"
            ):
                data.open_source(name, "test")

    def test_no_file(self):
        with self.assertRaisesRegex(data.DataError, "set.npz does not exist; check the path$"):
            data.open_source(f"npz:{self.path}", "test")
        with self.assertRaisesRegex(data.DataError, "is not the name of a data set; .*npz:PATH"):
            data.open_source("npz:", "test")
        with self.assertRaisesRegex(data.DataError, "a local directory or on gs://"):
            data.open_source("npz:s3://bucket/x.npz", "test")
        for kind, path in (("npz", self.path), ("folder", self.path.parent)):
            with self.assertRaisesRegex(data.DataError, f"'{path}' lacks .*; write {kind}:{path}$"):
                data.open_source(str(path), "test")
