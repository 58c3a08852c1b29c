"""A kind of data set is a row: one call, and it is opened, told apart, listed and fingerprinted."""

import hashlib
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.data import source as sources
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import grammar
from jaxrobust.data.transforms import decoding
from tests.support import sweeps


def open_stripes(name, split, choice):
    """Gray images of eight pixels, half of them bright: the first rows, or the first columns."""
    del choice
    bright = 255 if name.endswith("bright") else 128

    def read(indices):
        made = []
        for index in indices:
            image = np.zeros((8, 8, 1), np.uint8)
            image[:4] = bright
            image = image if index % 2 else image.swapaxes(0, 1)
            made.append(sources.Record(decoding.encode(image), int(index % 2)))
        return made

    return sources.Source(name, split, 6, 2, 1, (8, 8, 1), read)


class RowsTest(absltest.TestCase):
    def test_which_are_paths_and_which_their_contents_tell_apart(self):
        """Paths are of whoever names them; a folder and a set of the hub say their files."""
        paths = {name for name, kind in sources.KINDS.items() if kind.is_path}
        self.assertEqual(paths, {"folder", "npz", "cifar10-c", "generated"})
        contents = {name for name, kind in sources.KINDS.items() if kind.contents}
        self.assertEqual(contents, {"npz", "cifar10-c"})
        for name in paths:
            same = grammar.same_data(f"{name}:/a/b/../c", f"{name}:/a/c")
            self.assertTrue(same, name)


class KindsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.dict(sources.KINDS))
        kind = sources.SourceKind("stripes", "stripes:PATH", "two stripes", open_stripes)
        self.kind = kind._replace(is_path=True, contents=True)
        sources.KINDS["stripes"] = self.kind

    def test_it_is_opened_and_loaded(self):
        source = data.open_source("stripes:here", "train", num_classes=2)
        self.assertEqual(
            (len(source), source.where()), (6, "data set 'stripes:here', split 'train'")
        )
        found = data.load("stripes:here", split="train")
        self.assertEqual(found.images.shape, (6, 8, 8, 1))
        np.testing.assert_array_equal(found.labels, [0, 1, 0, 1, 0, 1])

    def test_its_contents_enter_the_fingerprint(self):
        plain = data.open_source("stripes:here", "train")
        other = data.open_source("stripes:bright", "train")
        self.assertEqual(plain.files_sha256, sources.content_sha256(plain, range(6)))
        self.assertNotEqual(plain.files_sha256, other.files_sha256)
        sources.KINDS["stripes"] = self.kind._replace(contents=False)
        self.assertIsNone(data.open_source("stripes:here", "train").files_sha256)

    def test_a_source_that_says_it_itself_is_not_read(self):
        def told(*given, **settings):
            source = open_stripes(*given, **settings)
            sha256 = hashlib.sha256(b"its files").hexdigest()
            return sources.dataclasses.replace(source, files_sha256=sha256, read=self.fail)

        sources.KINDS["stripes"] = self.kind._replace(open=told)
        self.assertIsNotNone(data.open_source("stripes:here", "train").files_sha256)

    def test_its_names_are_places(self):
        self.assertTrue(grammar.same_data("stripes:a/../b", "stripes:b"))
        self.assertFalse(grammar.same_data("stripes:a", "stripes:b"))

    def test_it_is_listed(self):
        self.assertIn("stripes:PATH", registry.written())
        with self.assertRaisesRegex(data.DataError, "write digits, .*fake.*, stripes:PATH or"):
            data.open_source("stripes:", "train")

    @sweeps.rows(
        ("npz:a.npz", "npz"),
        ("folder:/a b/c", "folder"),
        ("hf:org/name@main", "hf"),
        ("cifar10-c:x", "cifar10-c"),
        ("fake", "fake"),
        ("fake:8x8x1:3", "fake"),
        ("fake:8", None),
        ("npz:", None),
        ("generated:a", "generated"),
        ("cifar10", None),
        ("tfds:cifar10:3.0.2", None),
        (None, None),
    )
    def test_which_kind(self, name, expected):
        found = sources.kind_of(name)
        self.assertEqual(found.name if found else None, expected)
