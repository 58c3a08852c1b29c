"""Whether two splits share images, as far as their names say."""

import importlib
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.data.splits import grammar, storage, subsets
from tests.support import sweeps
from tests.support.modules import needs


class OverlapTest(parameterized.TestCase):
    @sweeps.rows(
        ("test", "test", True),
        ("test", "test[:1000]", True),
        ("test[:1000]", "test[1000:]", False),
        ("test[:1000]", "test[999:]", True),
        ("train[98%:]", "train[:98%]", False),
        ("train[90%:]", "train[:98%]", True),
        ("val", "validation", True),
        ("train", "test", False),
        ("validation@selection", "validation@robustbench", False),
        ("validation@robustbench[:1000]", "validation@robustbench[:500]", True),
        ("validation", "val@robustbench", True),
        ("test[:1000]", "test[90%:]", True),  # it may
        ("test[-100:]", "test[:50]", True),  # it may
        ("test[:-100]", "test[-100:]", False),
        ("validation[:100%]", "val", True),
        ("validation[:1shard]", "validation[90%:]", True),
        ("train+test", "test", True),
        ("train + test[10:]", "test[:10]", False),
        ("train+validation[:10]", "val@robustbench", True),
        ("all", "test", True),
        ("all[:80%]", "all[80%:]", False),
        ("all[:81%]", "all[80%:]", True),
        ("validation@nowhere.txt", "validation@robustbench", True),  # it may
    )
    def test_by_their_names(self, one, other, expected):
        self.assertEqual(grammar.overlap(one, other), expected)
        self.assertEqual(grammar.overlap(other, one), expected)

    def test_lists_of_ids_by_their_lines(self):
        folder = Path(self.create_tempdir())
        lines = subsets.read_ids("robustbench").lines
        for name, held in (("one", lines[7:9]), ("two", ["n01440764/x.JPEG", "y.JPEG"])):
            (folder / name).write_text("\n".join(line.rpartition("/")[2] for line in held) + "\n")
        test = "validation@robustbench"
        self.assertTrue(grammar.overlap(f"val@{folder}/one[:1]", test))
        self.assertFalse(grammar.overlap(f"val@{folder}/two", test))

    def test_files_of_one_name_in_two_class_folders_are_two(self):
        folder = Path(self.create_tempdir())
        for name, line in (("one", "owl/0.png"), ("two", "wren/0.png"), ("three", "0.png")):
            (folder / name).write_text(line + "\n")
        self.assertFalse(grammar.overlap(f"all@{folder}/one", f"all@{folder}/two"))
        self.assertTrue(grammar.overlap(f"all@{folder}/one", f"all@{folder}/three"))

    @sweeps.rows(
        ("cifar10", "tfds:cifar10", True),
        ("cifar10", "cifar10:3.0.2", True),
        ("cifar10", "hf:uoft-cs/cifar10:plain_text@main", True),
        ("cifar10", "cifar100", False),
        ("npz:a/../set.npz", "npz:set.npz", True),
        ("npz:set.npz", "npz:other.npz", False),
        ("folder:set/", "folder:./set", True),
        ("imagenet2012", "tfds:imagenet2012:5.1.0", True),
        ("fake:8x8x3", "fake", False),
    )
    def test_names_of_one_data_set(self, one, other, expected):
        self.assertEqual(grammar.same_images((one, "test"), (other, "test")), expected)
        self.assertFalse(grammar.same_images((one, "test"), (other, "train")))


@needs("fsspec", "pip install fsspec")
class BucketTest(absltest.TestCase):
    """Files of a bucket, in a made-up one that is held in memory."""

    def setUp(self):
        super().setUp()
        fsspec = importlib.import_module("fsspec")
        self.files = fsspec.filesystem("memory")
        self.files.store.clear()
        self.addCleanup(self.files.store.clear)
        for name in ("set/b/2.jpg", "set/b/10.jpg", "set/a/x/1.jpg", "set/.hidden", "set/z.txt"):
            self.files.pipe(f"/bucket/{name}", name.encode())
        patched = mock.patch.object(
            storage, "file_system", lambda path: (self.files, str(path).replace("gs:/", ""))
        )
        self.enter_context(patched)

    def test_entries_are_sorted_and_hidden_ones_left_out(self):
        found = storage.entries("gs://bucket/set")
        self.assertEqual([list(names) for names in found], [["a", "b"], ["z.txt"]])
        self.assertIsNone(storage.entries("gs://bucket/none"))

    def test_files_below_folder_by_folder(self):
        found = storage.files_below("gs://bucket/set")
        self.assertEqual(found, ["z.txt", "a/x/1.jpg", "b/10.jpg", "b/2.jpg"])

    def test_files_are_read_at_once_and_one_that_is_missing_is_named(self):
        with mock.patch.object(self.files, "cat_ranges", create=True) as asked:
            asked.return_value = [b"one", b"two"]
            self.assertEqual(storage.read_files(["gs://b/1", "gs://b/2"], "so"), [b"one", b"two"])
            asked.assert_called_once_with(["gs://b/1", "gs://b/2"], None, None, on_error="return")
            for error, words in ((FileNotFoundError("no\n object"), "no object"),
                                 (TimeoutError(), "TimeoutError")):  # fmt: skip
                asked.return_value = [b"one", error]
                with self.assertRaisesRegex(
                    storage.DataError, rf"^gs://b/2 cannot be read \({words}\); copy it again$"
                ):
                    storage.read_files(["gs://b/1", "gs://b/2"], "copy it again")
        self.assertEqual(storage.read_files([], "so"), [])
