"""Data sets are found, sliced and read; a missing or damaged one is refused with an instruction."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.data.sources import registry, tfds
from jaxrobust.data.splits import grammar, storage
from jaxrobust.data.transforms import decoding
from tests.support import paths, sweeps
from tests.support.bucket import Bucket
from tests.support.datasets import image_bytes, write_tfds, write_tree

ROOT = paths.ROOT
DIGITS = ROOT / "jaxrobust" / "data" / "digits"


def make_digits():
    path = ROOT / "tools" / "generate" / "make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TempDirTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.root = Path(holder.name)

    def copy_of_digits(self, name="mydigits"):
        """The shipped data set as `root/NAME/1.0.0`, to damage."""
        directory = self.root / name / "1.0.0"
        shutil.copytree(DIGITS / "digits" / "1.0.0", directory, dirs_exist_ok=True)
        for path in directory.glob("digits-*"):
            path.rename(directory / path.name.replace("digits", name, 1))
        self.edit_info(directory, name=name)
        return directory

    def edit_info(self, directory, **changes):
        path = directory / "dataset_info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def assert_refused(self, *patterns, name="mydigits", split="train", data_dir=None):
        with self.assertRaises(registry.DataError) as caught:
            registry.open_source(name, split, data_dir=data_dir or self.root)
        for pattern in patterns:
            self.assertRegex(str(caught.exception), pattern)


class DigitsTest(TempDirTest):
    @sweeps.rows(("train", 1400), ("test", 397), ("train[:90%]", 1260), ("train[90%:]", 140))
    def test_sizes(self, split, size):
        source = registry.open_source("digits", split)
        self.assertLen(source, size)
        self.assertEqual((source.name, source.split), ("digits", split))
        self.assertEqual((source.num_classes, source.image_shape), (10, (8, 8, 1)))

    def test_are_the_pixels_of_scikit_learn(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            self.skipTest("needs scikit-learn: pip install scikit-learn")
        pixels, labels = load_digits(return_X_y=True)
        expected = sorted(
            (np.rint(row * 255 / 16).astype(np.uint8).tobytes(), int(label))
            for row, label in zip(pixels, labels, strict=True)
        )
        found = sorted(
            (decoding.decode(record.image).tobytes(), record.label)
            for split in ("train", "test")
            for record in registry.open_source("digits", split)
        )
        self.assertEqual(found, expected)
        make_digits().main(["--target", str(self.root)])
        for path in sorted((DIGITS / "digits" / "1.0.0").iterdir()):
            again = self.root / "digits" / "1.0.0" / path.name
            self.assertEqual(again.read_bytes(), path.read_bytes(), path.name)

    def test_tfds_reads_the_directory(self):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(DIGITS / "digits" / "1.0.0")
        example = builder.as_data_source(split="test")[5]
        record = registry.open_source("digits", "test")[5]
        np.testing.assert_array_equal(example["image"], decoding.decode(record.image))
        self.assertEqual(example["label"], record.label)

    def test_is_small_and_says_its_licence(self):
        size = sum(path.stat().st_size for path in DIGITS.rglob("*") if path.is_file())
        self.assertLess(size, 700_000)
        self.assertIn("CC BY 4.0", (DIGITS / "LICENSE.md").read_text())


class FakeTest(parameterized.TestCase):
    @sweeps.rows(
        ("fake", (32, 32, 3), 10),
        ("fake:8x8x1", (8, 8, 1), 10),
        ("fake:64x48x3:1000", (64, 48, 3), 1000),
    )
    def test_shape_and_classes(self, name, shape, classes):
        source = registry.open_source(name, "test")
        self.assertEqual((source.image_shape, source.num_classes), (shape, classes))
        for index in (0, len(source) - 1):
            self.assertEqual(decoding.decode(source[index].image).shape, shape)
            self.assertBetween(source[index].label, 0, classes - 1)

    def test_is_deterministic_and_differs_by_index_and_split(self):
        images = [
            registry.open_source("fake", split)[index].image
            for split, index in (("train", 3), ("train", 4), ("test", 3))
        ]
        self.assertLen(set(images), 3)
        self.assertEqual(images[0], registry.open_source("fake", "train")[3].image)
        # What "deterministic" means across machines and versions.
        digest = hashlib.sha256(b"".join(images)).hexdigest()
        self.assertEqual(digest[:16], "c8cf63aa2931d8f3")

    def test_slices_are_parts(self):
        whole, head, tail = (
            [record.image for record in registry.open_source("fake", split)]
            for split in ("test", "test[:25%]", "test[64:]")
        )
        self.assertEqual(whole, head + tail)

    @sweeps.rows("valid", "test[300:]", "train[5:2]", "train[")
    def test_unknown_split(self, split):
        with self.assertRaisesRegex(registry.DataError, r"train|256"):
            registry.open_source("fake", split)


class PartsTest(parameterized.TestCase):
    @sweeps.rows(
        *("", "[:90%]", "[90%:]", "[10%:20%]", "[10:20%]", "[:12.5%]", "[-10%:]", "[:-5]", "[3:]"),
        *("[:1000]", "[:1400]", "[-1400:]", "[5:6]", "[33%:67%]", "[:33.4%]", "[1:0%]", "[:1401]"),
        *("[7:5]", "[:0]", "[1400:]", "[:]", "[5]", "[a:b]", "[:101%]", "[-1401:]", "[1:2:3]"),
        "[0:100%]",
    )
    def test_are_those_of_tfds(self, part):
        import tensorflow_datasets as tfds

        known = tfds.builder_from_directory(DIGITS / "digits" / "1.0.0").info.splits
        try:
            (file,) = known["train" + part].file_instructions
            expected = range(file.skip, file.skip + file.take)
        except (ValueError, AssertionError):
            expected = range(0)
        try:
            found = grammar.rows(part or None, 1400, "here")
        except registry.DataError as error:
            self.assertRegex(str(error), r"^here: ")
            found = range(0)
        self.assertEqual(found, expected)

    @sweeps.rows(
        ("val", "val", None, None),
        ("val[:5]", "val", None, "[:5]"),
        ("val@robustbench", "val", "robustbench", None),
        ("val@robustbench[:5]", "val", "robustbench", "[:5]"),
        ("val@/a b/c@d.txt[5%:]", "val", "/a b/c@d.txt", "[5%:]"),
        ("val@f#sha256=00", "val", "f#sha256=00", None),
    )
    def test_pieces(self, split, name, ids, part):
        self.assertEqual(grammar.parse(split), (name, ids, part))

    @sweeps.rows("", "val[", "val]", "val[:5][:2]", "a+b", "a/b", "val[:5]@x", "val@")
    def test_what_is_no_split(self, split):
        self.assertIsNone(grammar.parse(split))


class BuildersTest(TempDirTest):
    """Records with the features of TFDS' own builders, which cannot be downloaded here."""

    def make(self, place, extra=(), label=("a", "b", "c"), **image):
        import tensorflow_datasets as tfds

        features = {
            "image": tfds.features.Image(**image),
            "label": tfds.features.ClassLabel(names=list(label)),
        }
        records = [{"image": image_bytes(i), "label": i % len(label)} for i in range(5)]
        for key in extra:
            coarse = key == "coarse_label"
            features[key] = (
                tfds.features.ClassLabel(num_classes=20) if coarse else tfds.features.Text()
            )
            for number, record in enumerate(records):
                record[key] = number if coarse else b"image_%04d.jpg" % number
        directory = self.root / place
        write_tfds(directory, place.partition("/")[0], features, {"train": records}, shards=2)

    @sweeps.rows(
        ("oxford_flowers102/2.1.1", ("file_name",), "image_0003.jpg "),
        ("caltech101/3.0.2", ("image/file_name",), "image_0003.jpg "),
        ("cifar100/3.0.2", ("id", "coarse_label"), "image_0003.jpg "),
        ("imagenette/full-size-v2/1.0.0", (), "record 0 of "),
        ("imagenet2012/5.1.0", ("file_name",), "image_0003.jpg "),
    )
    def test_open(self, place, extra, description):
        self.make(place, extra)
        name = place.partition("/")[0]
        source = registry.open_source(f"tfds:{name}", "train", data_dir=self.root, num_classes=3)
        self.assertEqual((source.name, len(source)), (name, 5))
        self.assertEqual((source.classes, source.image_shape), (("a", "b", "c"), (7, 9, 3)))
        self.assertEqual([record.image for record in source], [image_bytes(i) for i in range(5)])
        self.assertEqual([record.label for record in source], [0, 1, 2, 0, 1])
        self.assertStartsWith(source.describe(3), description)
        self.assertIn("-00001-of-00002", source.describe(3))
        registry.same_classes([source, source])

    def test_configurations(self):
        self.make("imagenette/full-size-v2/1.0.0")
        self.make("imagenette/320px-v2/1.0.0")
        self.make("imagenette/320px-v2/1.2.0")
        self.assert_refused(
            "'imagenette' is prepared in several configurations; write one of "
            "imagenette/320px-v2, imagenette/full-size-v2$",
            name="imagenette",
        )
        self.assert_refused(
            "unknown data set 'imagenette:2.0.0'.*imagenette/320px-v2, imagenette/full-size-v2",
            name="imagenette:2.0.0",
        )
        for name in ("imagenette/320px-v2", "imagenette:1.2.0", "imagenette/320px-v2:1.0.0"):
            self.assertLen(registry.open_source(name, "train", data_dir=self.root), 5)

    def test_names_of_classes_must_be_names(self):
        self.assertEqual(registry.open_source("digits", "test").classes, ())

    def test_same_classes(self):
        self.make("one/1.0.0")
        self.make("other/1.0.0", label=("b", "a", "c"))
        both = [registry.open_source(n, "train", data_dir=self.root) for n in ("one", "other")]
        with self.assertRaisesRegex(
            registry.DataError, "'one', split 'train' has the classes of split 'train' in another"
        ):
            registry.same_classes(both)


class PlacesTest(TempDirTest):
    def test_other_schemes(self):
        for name in ("folder:s3://bucket/x", "folder:https://host/x"):
            self.assert_refused("data must be in a local directory or on gs://", name=name)

    def test_without_the_package_for_buckets(self):
        with mock.patch.object(storage.importlib.util, "find_spec", return_value=None):
            for name, place in (("folder:gs://b/x", self.root), ("mydigits", "gs://b/x")):
                self.assert_refused(
                    r"^gs://b/x: to use Google .*, pip install 'jaxrobust\[gcs\]'.*gcsfuse",
                    name=name,
                    data_dir=place,
                )

    def test_bucket(self):
        if not importlib.util.find_spec("gcsfs"):
            self.skipTest("needs gcsfs: pip install -e '.[gcs]'")
        home = self.root / "bucket" / "tfds"
        shutil.copytree(DIGITS / "digits", home / "mydigits")
        for path in (home / "mydigits" / "1.0.0").glob("digits-*"):
            path.rename(path.with_name(f"my{path.name}"))
        self.edit_info(home / "mydigits" / "1.0.0", name="mydigits")
        write_tree(
            self.root / "bucket" / "tree", ["train/b/1.jpg", "train/a/x/2[*].JPG", "val/b/3.png"]
        )
        write_tree(self.root / "bucket" / "tree", ["train/a/.hidden.jpg", "train/a/readme.txt"])
        (self.root / "bucket" / "ids.txt").write_text("b/1.jpg\n")
        bucket = Bucket(self.root)
        self.addCleanup(bucket.close)
        environment = os.environ | bucket.environment
        environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.root / "cache")}
        environment["TREE"] = str(self.root / "bucket" / "tree")
        with bucket.refusing("^(POST|PUT)"):
            done = subprocess.run(
                [sys.executable, "-c", IN_A_BUCKET], env=environment, capture_output=True, text=True
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        expected = registry.open_source("digits", "train")
        self.assertEqual(found["size"], 1400)
        self.assertEqual(found["record"], hashlib.sha256(expected[1399].image).hexdigest())
        self.assertEqual(
            found["tree"], ["gs://bucket/tree/train/" + p for p in ("a/x/2[*].JPG", "b/1.jpg")]
        )
        contents = [image_bytes(1).hex(), image_bytes(0).hex()]
        self.assertEqual(found["contents"], contents)
        self.assertEqual(found["chosen"], contents[1:])
        self.assertRegex(found["digits of class 3"], r"^\d+ in the cache$")
        for key, pattern in (
            (
                "no bucket",
                "'folder:gs://none/x': the directory gs://none/x does not exist or cannot ",
            ),
            ("no data", "the data directory gs://none/tfds does not exist"),
            (
                "unknown",
                "unknown data set 'cifar10': available: digits.* in gs://bucket/tfds, mydig",
            ),
            ("gone", "gs://bucket/tree/train/b/1.jpg cannot be read .*restore the file"),
            (
                "no answer",
                "^gs://bucket/tree cannot be read .*gcloud auth application-default login",
            ),
        ):
            self.assertRegex(found[key], pattern)


# What a user does with data in a bucket; in a process of its own, as the libraries remember.
IN_A_BUCKET = """
import hashlib, json, os, pickle, sys
from unittest import mock
from jaxrobust.data.sources import registry as sources
from jaxrobust.data.splits import subsets

def refused(*arguments, **options):
    try:
        sources.open_source(*arguments, **options)
    except sources.DataError as error:
        return str(error)

digits = sources.open_source("mydigits", "train", data_dir="gs://bucket/tfds")
digits = pickle.loads(pickle.dumps(digits))
tree = pickle.loads(pickle.dumps(sources.open_source("folder:gs://bucket/tree", "train")))
found = {
    "size": len(digits),
    "record": hashlib.sha256(digits.read([7, 1399])[1].image).hexdigest(),
    "tree": [tree.describe(index) for index in range(len(tree))],
    "contents": [record.image.hex() for record in tree.read([0, 1])],
    "no bucket": refused("folder:gs://none/x", "train"),
    "no data": refused("mydigits", "train", data_dir="gs://none/tfds"),
    "unknown": refused("cifar10", "train", data_dir="gs://bucket/tfds"),
}
chosen = sources.open_source("folder:gs://bucket/tree", "train@gs://bucket/ids.txt")
found["chosen"] = [record.image.hex() for record in chosen]
# This bucket cannot be written, so that the index goes to the cache.
with open(os.environ["XDG_CACHE_HOME"] + ".txt", "w") as file:
    file.write("3\\tthree")
three = sources.open_source(
    "mydigits", "test", data_dir="gs://bucket/tfds", classes=file.name
)
places = [path.name for path in subsets.index_cache().glob("*/*.npz")]
assert places == ["jaxrobust-index-test.npz"], places
found["digits of class 3"] = f"{len(three)} in the cache"
os.remove(os.environ["TREE"] + "/train/b/1.jpg")
for indices in ([0, 1], [1]):
    try:
        tree.read(indices)
    except sources.DataError as error:
        found["gone"] = str(error)
import fsspec
with mock.patch.object(fsspec.core, "url_to_fs", side_effect=RuntimeError("Forbidden")):
    found["no answer"] = refused("folder:gs://bucket/tree", "train")
print(json.dumps(found))
"""


class PreparedTest(TempDirTest):
    def test_prefix_version_and_environment(self):
        self.copy_of_digits()
        newer = self.root / "mydigits" / "1.10.0"
        shutil.copytree(self.root / "mydigits" / "1.0.0", newer)
        shutil.copytree(self.root / "mydigits" / "1.0.0", self.root / "mydigits" / "1.9.0")
        self.edit_info(newer, version="1.10.0", splits=self.only_test(newer))
        with mock.patch.dict(os.environ, TFDS_DATA_DIR=str(self.root)):
            self.assertLen(registry.open_source("tfds:mydigits", "test"), 397)
            with self.assertRaisesRegex(registry.DataError, r"it has test \(397\)"):
                registry.open_source("mydigits", "train")  # 1.10.0 is newer than 1.9.0
            self.assertLen(registry.open_source("mydigits:1.0.0", "train"), 1400)

    def test_a_place_that_is_given_comes_before_the_environment(self):
        with mock.patch.dict(os.environ, TFDS_DATA_DIR="/there"):
            self.assertEqual(tfds.data_directory(Path("/given")), "/given")
            self.assertEqual(tfds.data_directory(), "/there")
            self.assertEqual(tfds.data_directory(""), "/there")
        with mock.patch.dict(os.environ, TFDS_DATA_DIR=""):
            self.assertEqual(tfds.data_directory(), "~/tensorflow_datasets")

    def test_both_ends_are_read_when_it_is_opened(self):
        """A file that is cut off opens with its full length, and fails where it is read."""
        with mock.patch.object(tfds._Reader, "__call__", return_value=[]) as read:
            registry.open_source("digits", "test")
            registry.open_source("digits", "test[:1]")
        self.assertEqual([call.args for call in read.call_args_list], [([0, 396],), ([0],)])

    def test_the_hash_is_of_version_and_shards(self):
        directory = self.copy_of_digits()
        train, test = json.loads((directory / "dataset_info.json").read_text())["splits"]

        def of(split="train", **changes):
            self.edit_info(directory, **changes)
            return registry.open_source("mydigits", split, data_dir=self.root).files_sha256

        same = of()
        self.assertEqual(of(splits=[train], description="in other words"), same)
        others = [of("train[:10]"), of("train[10:20]"), of("test", splits=[train, test])]
        others += [of(splits=[train | {"numBytes": "7"}])]
        others += [of(splits=[train | {"shardLengths": ["1399"]}])]
        directory = directory.rename(directory.with_name("1.0.1"))
        others += [of(splits=[train], version="1.0.1")]
        self.assertLen({same, *others}, 1 + len(others))

    def only_test(self, directory):
        return json.loads((directory / "dataset_info.json").read_text())["splits"][1:]

    def test_reads_in_any_order_and_after_pickling(self):
        source = registry.open_source("digits", "train[10:20]")
        whole = registry.open_source("digits", "train")
        again = pickle.loads(pickle.dumps(source))
        self.assertEqual(again.read([7, 0, 7]), [whole[17], whole[10], whole[17]])
        with self.assertRaisesRegex(IndexError, "records 0 to 9, not 10"):
            source[10]

    def test_supervised_key_chooses_between_labels(self):
        directory = self.copy_of_digits()
        features = json.loads((directory / "features.json").read_text())
        labels = features["featuresDict"]["features"]
        labels["coarse_label"] = labels["label"] | {"classLabel": {"numClasses": "2"}}
        (directory / "features.json").write_text(json.dumps(features))
        source = registry.open_source("mydigits", "test", data_dir=self.root)
        self.assertEqual(source.num_classes, 10)
        self.assertEqual(source[3], registry.open_source("digits", "test")[3])
        info = json.loads((directory / "dataset_info.json").read_text())
        del info["supervisedKeys"]
        (directory / "dataset_info.json").write_text(json.dumps(info))
        self.assert_refused("2 features of type ClassLabel", "name them as its supervised")


class RefusalTest(TempDirTest):
    def test_unknown_data_set(self):
        self.copy_of_digits()
        self.assert_refused(
            "unknown data set 'cifar100'",
            "digits, fake.*mydigits",
            f"with `jaxrobust prepare cifar100 --out {self.root}`, or",
            "TFDS_DATA_DIR",
            name="cifar100",
        )
        self.assert_refused("unknown data set 'fake:0x8x1'", name="fake:0x8x1")
        self.assert_refused(
            "nowhere does not exist",
            "TFDS_DATA_DIR",
            "prepare it: `jaxrobust prepare cifar10 --out .*/nowhere`",
            name="cifar10",
            data_dir=self.root / "nowhere",
        )

    @sweeps.rows(
        "", "/etc/x", "*", "my*", "../mydigits", "mydigits/", "a/b/c", "tfds:", "a:1:2", "a b"
    )
    def test_what_is_not_a_name(self, name):
        self.assert_refused(
            "^'.*' is not the name of a data set; write digits, fake.* or .tfds:.NAME", name=name
        )

    @sweeps.rows("valid", "train[90%:", "train[:0]", "train[20:10]")
    def test_unknown_split(self, split):
        self.copy_of_digits()
        self.assert_refused(
            r"no split '", r"train \(1400\), test \(397\)", r"train\[:90%\]", split=split
        )

    def test_descriptions(self):
        """Another format, one that is broken, and one without labels; then a file is missing."""
        directory = self.copy_of_digits()
        next(directory.glob("*train*")).unlink()
        self.assert_refused("mydigits-train.array_record-00000-of-00001 is missing", "tfds build")
        path = directory / "features.json"
        features = json.loads(path.read_text())
        del features["featuresDict"]["features"]["label"]
        path.write_text(json.dumps(features))
        self.assert_refused("0 features of type ClassLabel", "one image and one class label")
        path.write_text("{")
        self.assert_refused("does not describe a data set", "tfds build mydigits")
        self.edit_info(self.copy_of_digits(), fileFormat="tfrecord")
        self.assert_refused("the format tfrecord", "tfds build mydigits --file_format=array_record")

    @sweeps.rows(0, 100, 65_536, 131_072, 300_000)
    def test_truncated_file(self, size):
        os.truncate(next(self.copy_of_digits().glob("*train*")), size)
        self.assert_refused(
            "split 'train': record 0 .*mydigits-train.array_record-00000-of-00001",
            "truncated",
            "copy the data set again or prepare it again: `tfds build mydigits",
        )

    @pytest.mark.slow
    def test_corrupt_record_is_named(self):
        path = next(self.copy_of_digits().glob("*train*"))
        content = bytearray(path.read_bytes())
        content[100_000] ^= 0xFF
        path.write_bytes(content)
        source = registry.open_source("mydigits", "train[10:]", data_dir=self.root)
        bad = []
        for index in range(len(source)):
            try:
                source[index]
            except registry.DataError as error:
                bad.append(index)
                self.assertRegex(
                    str(error),
                    rf"split 'train\[10:\]': record {index} \(record {index + 10} of .*train.*\) "
                    "cannot be read: the file is truncated or damaged .*tfds build mydigits",
                )
        self.assertNotEmpty(bad)
        self.assertLess(len(bad), len(source))
        with self.assertRaisesRegex(registry.DataError, f"record {bad[0]} "):
            source.read([0, bad[0], 1])

    def test_record_that_is_no_example(self):
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(next(self.copy_of_digits().glob("*test*"))), "group_size:1")
        for _ in range(397):
            writer.write(b"\xff\xff")
        writer.close()
        self.assert_refused(
            "record 0 .* is not an example with 'image' and 'label'", "tfds build", split="test"
        )

    def test_example_without_an_image_or_a_label(self):
        """The one before it has both, which must not count for it."""
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.proto import tf_example_pb2

        path = str(next(self.copy_of_digits().glob("*test*")))
        for lacks in ("image", "label"):
            writer = ArrayRecordWriter(path, "group_size:1")
            for number in range(397):
                example = tf_example_pb2.Example()
                features = example.features.feature
                if number != 5 or lacks != "image":
                    features["image"].bytes_list.value.append(image_bytes(1))
                if number != 5 or lacks != "label":
                    features["label"].int64_list.value.append(3)
                writer.write(example.SerializeToString())
            writer.close()
            source = registry.open_source("mydigits", "test", data_dir=self.root)
            self.assertEqual([record.label for record in source.read([3, 4])], [3, 3])
            with self.assertRaisesRegex(
                registry.DataError, "record 5 .* is not an example with 'image' and 'label'"
            ):
                source.read([4, 5])

    def test_label_outside_the_classes(self):
        labels = np.arange(500) % 10
        tool = make_digits()
        tool.write(np.zeros((500, 8, 8), np.uint8), np.where(labels == 3, 10, labels), self.root)
        with (
            mock.patch.dict(registry._SHIPPED, clear=True),
            self.assertRaisesRegex(
                registry.DataError,
                r"split 'test': record \d+ .* has the label 10, outside the classes 0 to 9; ",
            ),
        ):
            registry.open_source("digits", "test", data_dir=self.root).read(range(397))

    def test_message_survives_pickling(self):
        error = pickle.loads(pickle.dumps(registry.DataError("record 3 is bad")))
        self.assertEqual((type(error), str(error)), (registry.DataError, "record 3 is bad"))


class ImportTest(absltest.TestCase):
    def test_importing_is_light_and_reading_needs_no_tensorflow(self):
        code = (
            "import sys, jaxrobust.data as data\n"
            "heavy = {'jax', 'grain', 'tensorflow_datasets', 'tensorflow', 'torch'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
            "data.open_source('digits', 'train')[3]\n"
            "batches = data.train_batches(data.open_source('digits', 'train'), batch_size=8,\n"
            "    seed=0, augmentation='none', image_size=8)\n"
            "next(batches); batches.close()\n"
            "assert 'jax' not in sys.modules or not sys.modules['jax']._src.xla_bridge._backends\n"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_source_is_frozen(self):
        with self.assertRaises(dataclasses.FrozenInstanceError):
            registry.open_source("fake", "test").size = 3
