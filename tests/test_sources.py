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
from absl.testing import absltest, parameterized

from jaxrobust.data import decoding, sources
from tests.paths import NO_SHARED, SHARED

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "jaxrobust" / "data" / "digits"
CIFAR = SHARED / "data" / "tensorflow_datasets"


def make_digits():
    spec = importlib.util.spec_from_file_location("make_digits", ROOT / "tools" / "make_digits.py")
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
        shutil.copytree(DIGITS / "digits" / "1.0.0", directory)
        for path in directory.glob("digits-*"):
            path.rename(directory / path.name.replace("digits", name, 1))
        self.edit_info(directory, name=name)
        return directory

    def edit_info(self, directory, **changes):
        path = directory / "dataset_info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def assert_refused(self, *patterns, name="mydigits", split="train", data_dir=None):
        with self.assertRaises(sources.DataError) as caught:
            sources.open_source(name, split, data_dir=data_dir or self.root)
        for pattern in patterns:
            self.assertRegex(str(caught.exception), pattern)


class DigitsTest(TempDirTest):
    @parameterized.parameters(
        ("train", 1400), ("test", 397), ("train[:90%]", 1260), ("train[90%:]", 140)
    )
    def test_sizes(self, split, size):
        source = sources.open_source("digits", split)
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
            for record in sources.open_source("digits", split)
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
        record = sources.open_source("digits", "test")[5]
        np.testing.assert_array_equal(example["image"], decoding.decode(record.image))
        self.assertEqual(example["label"], record.label)

    def test_is_small_and_says_its_licence(self):
        size = sum(path.stat().st_size for path in DIGITS.rglob("*") if path.is_file())
        self.assertLess(size, 700_000)
        self.assertIn("CC BY 4.0", (DIGITS / "LICENSE.md").read_text())


class FakeTest(parameterized.TestCase):
    @parameterized.parameters(
        ("fake", (32, 32, 3), 10),
        ("fake:8x8x1", (8, 8, 1), 10),
        ("fake:64x48x3:1000", (64, 48, 3), 1000),
    )
    def test_shape_and_classes(self, name, shape, classes):
        source = sources.open_source(name, "test")
        self.assertEqual((source.image_shape, source.num_classes), (shape, classes))
        for index in (0, len(source) - 1):
            self.assertEqual(decoding.decode(source[index].image).shape, shape)
            self.assertBetween(source[index].label, 0, classes - 1)

    def test_is_deterministic_and_differs_by_index_and_split(self):
        images = [
            sources.open_source("fake", split)[index].image
            for split, index in (("train", 3), ("train", 4), ("test", 3))
        ]
        self.assertLen(set(images), 3)
        self.assertEqual(images[0], sources.open_source("fake", "train")[3].image)
        # What "deterministic" means across machines and versions.
        digest = hashlib.sha256(b"".join(images)).hexdigest()
        self.assertEqual(digest[:16], "c8cf63aa2931d8f3")

    def test_slices_are_parts(self):
        whole, head, tail = (
            [record.image for record in sources.open_source("fake", split)]
            for split in ("test", "test[:25%]", "test[64:]")
        )
        self.assertEqual(whole, head + tail)

    @parameterized.parameters("valid", "test[300:]", "train[5:2]", "train[")
    def test_unknown_split(self, split):
        with self.assertRaisesRegex(sources.DataError, r"train|256"):
            sources.open_source("fake", split)


class PreparedTest(TempDirTest):
    def test_prefix_version_and_environment(self):
        self.copy_of_digits()
        newer = self.root / "mydigits" / "1.10.0"
        shutil.copytree(self.root / "mydigits" / "1.0.0", newer)
        shutil.copytree(self.root / "mydigits" / "1.0.0", self.root / "mydigits" / "1.9.0")
        self.edit_info(newer, version="1.10.0", splits=self.only_test(newer))
        with mock.patch.dict(os.environ, TFDS_DATA_DIR=str(self.root)):
            self.assertLen(sources.open_source("tfds:mydigits", "test"), 397)
            with self.assertRaisesRegex(sources.DataError, r"it has test \(397\)"):
                sources.open_source("mydigits", "train")  # 1.10.0 is newer than 1.9.0
            self.assertLen(sources.open_source("mydigits:1.0.0", "train"), 1400)

    def only_test(self, directory):
        return json.loads((directory / "dataset_info.json").read_text())["splits"][1:]

    def test_reads_in_any_order_and_after_pickling(self):
        source = sources.open_source("digits", "train[10:20]")
        whole = sources.open_source("digits", "train")
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
        source = sources.open_source("mydigits", "test", data_dir=self.root)
        self.assertEqual(source.num_classes, 10)
        self.assertEqual(source[3], sources.open_source("digits", "test")[3])
        info = json.loads((directory / "dataset_info.json").read_text())
        del info["supervisedKeys"]
        (directory / "dataset_info.json").write_text(json.dumps(info))
        self.assert_refused("2 features of the kind ClassLabel", "names them as its supervised")

    def test_real_cifar10(self):
        if not CIFAR.is_dir():
            self.skipTest(NO_SHARED)
        train = sources.open_source("cifar10", "train[:90%]", data_dir=CIFAR)
        held_out = sources.open_source("tfds:cifar10", "train[90%:]", data_dir=CIFAR)
        self.assertEqual((len(train), len(held_out)), (45_000, 5_000))
        self.assertEqual((train.image_shape, train.num_classes), ((32, 32, 3), 10))
        self.assertEqual(decoding.decode(held_out[0].image).shape, (32, 32, 3))


class RefusalTest(TempDirTest):
    def test_unknown_data_set(self):
        self.copy_of_digits()
        self.assert_refused(
            "unknown data set 'cifar100'",
            "digits, fake.*mydigits",
            "tfds build cifar100 --file_format=array_record",
            "TFDS_DATA_DIR",
            name="cifar100",
        )

    @parameterized.parameters(
        "", "/etc/x", "*", "my*", "..", "../mydigits", "mydigits/", "a/b/c", "tfds:", "a:1:2", "a b"
    )
    def test_what_is_not_a_name(self, name):
        self.copy_of_digits()
        self.assert_refused(
            "^'.*' is not the name of a data set; write digits, fake.* or .tfds:.NAME", name=name
        )

    def test_fake_without_pixels(self):
        self.assert_refused("unknown data set 'fake:0x8x1'", name="fake:0x8x1")

    def test_missing_data_directory(self):
        self.assert_refused(
            "nowhere does not exist",
            "TFDS_DATA_DIR",
            "tfds build cifar10 --file_format=array_record",
            name="cifar10",
            data_dir=self.root / "nowhere",
        )

    def test_another_file_format(self):
        self.edit_info(self.copy_of_digits(), fileFormat="tfrecord")
        self.assert_refused("the format tfrecord", "tfds build mydigits --file_format=array_record")

    def test_broken_description(self):
        (self.copy_of_digits() / "features.json").write_text("{")
        self.assert_refused("does not describe a data set", "tfds build mydigits")

    def test_not_a_classification_data_set(self):
        directory = self.copy_of_digits()
        features = json.loads((directory / "features.json").read_text())
        del features["featuresDict"]["features"]["label"]
        (directory / "features.json").write_text(json.dumps(features))
        self.assert_refused("0 features of the kind ClassLabel", "one image and one class label")

    @parameterized.parameters("valid", "train[90%:", "train[:0]", "train[20:10]")
    def test_unknown_split(self, split):
        self.copy_of_digits()
        self.assert_refused(
            r"no split '", r"train \(1400\), test \(397\)", r"train\[:90%\]", split=split
        )

    def test_missing_file(self):
        next(self.copy_of_digits().glob("*train*")).unlink()
        self.assert_refused("mydigits-train.array_record-00000-of-00001 is missing", "tfds build")

    @parameterized.parameters(0, 100, 65_536, 131_072, 300_000)
    def test_truncated_file(self, size):
        os.truncate(next(self.copy_of_digits().glob("*train*")), size)
        self.assert_refused(
            "split 'train': record 0 .*mydigits-train.array_record-00000-of-00001",
            "truncated",
            "copy the data set again or prepare it again: `tfds build mydigits",
        )

    def test_corrupt_record_is_named(self):
        path = next(self.copy_of_digits().glob("*train*"))
        content = bytearray(path.read_bytes())
        content[100_000] ^= 0xFF
        path.write_bytes(content)
        source = sources.open_source("mydigits", "train[10:]", data_dir=self.root)
        bad = []
        for index in range(len(source)):
            try:
                source[index]
            except sources.DataError as error:
                bad.append(index)
                self.assertRegex(
                    str(error),
                    rf"split 'train\[10:\]': record {index} \(record {index + 10} of .*train.*\) "
                    "cannot be read, the file is truncated or damaged .*tfds build mydigits",
                )
        self.assertNotEmpty(bad)
        self.assertLess(len(bad), len(source))
        with self.assertRaisesRegex(sources.DataError, f"record {bad[0]} "):
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

    def test_label_outside_the_classes(self):
        labels = np.arange(500) % 10
        tool = make_digits()
        tool.write(np.zeros((500, 8, 8), np.uint8), np.where(labels == 3, 12, labels), self.root)
        with (
            mock.patch.dict(sources._SHIPPED, clear=True),
            self.assertRaisesRegex(
                sources.DataError,
                r"split 'test': record \d+ .* has the label 12, outside the classes 0 to 9; ",
            ),
        ):
            sources.open_source("digits", "test", data_dir=self.root).read(range(397))

    def test_message_survives_pickling(self):
        error = pickle.loads(pickle.dumps(sources.DataError("record 3 is bad")))
        self.assertEqual((type(error), str(error)), (sources.DataError, "record 3 is bad"))


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
            sources.open_source("fake", "test").size = 3


if __name__ == "__main__":
    absltest.main()
