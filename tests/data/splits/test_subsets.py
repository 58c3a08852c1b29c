"""Lists of images and of classes choose the right records; lists that do not fit are refused."""

import hashlib
import os
import pickle
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.data import imagenet
from jaxrobust.data.sources import registry
from jaxrobust.data.sources import tfds as tfds_source
from jaxrobust.data.splits import subsets
from tests.support.datasets import write_tfds, write_tree

KINDS = ("folder", "prepared")


class SubsetTest(parameterized.TestCase):
    """One data set of 4 classes with 3 files each, as a folder and as TFDS records."""

    CLASSES = ("ant", "bee", "cat", "dog")
    FILES = tuple(f"{c}/{c}_{i}.jpg" for c in ("ant", "bee", "cat", "dog") for i in range(3))

    def setUp(self):
        super().setUp()
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.root = Path(holder.name)
        environment = mock.patch.dict(os.environ, XDG_CACHE_HOME=str(self.root / "cache"))
        environment.start()
        self.addCleanup(environment.stop)

    @property
    def directory(self):
        return self.root / "pets" / "1.0.0"

    def write_prepared(self, files=FILES, names=CLASSES, shards=2, with_names=True):
        """TFDS records in an order that is not the folders'; the content is the path."""
        import tensorflow_datasets as tfds

        label = tfds.features.ClassLabel(names=list(names))
        features = {"image": tfds.features.Image(), "label": label}
        if with_names:
            features["file_name"] = tfds.features.Text()
        records = []
        for file in sorted(files, key=lambda f: hashlib.sha256(f.encode()).digest()):
            folder, _, name = file.partition("/")
            values = {"image": file.encode(), "label": names.index(folder)}
            records.append(values | ({"file_name": name.encode()} if with_names else {}))
        write_tfds(self.directory, "pets", features, {"val": records}, shards=shards)

    def write(self, kind):
        if kind == "prepared":
            return self.write_prepared()
        for file in self.FILES:
            write_tree(self.root / "tree" / "val", [file], file.encode())

    def open(self, kind, split, **options):
        if kind == "folder":
            return registry.open_source(f"folder:{self.root}/tree", split, **options)
        return registry.open_source("pets", split, data_dir=self.root, **options)

    def list(self, *lines, name="list.txt", end="\n"):
        path = self.root / name
        path.write_text("\n".join(lines) + end)
        return str(path)

    def assert_refused(self, pattern, kind, split, **options):
        with self.assertRaisesRegex(registry.DataError, pattern):
            self.open(kind, split, **options)


def files(source):
    return [record.image.decode() for record in source]


def labels(source):
    return [record.label for record in source]


@parameterized.parameters(*KINDS)
class IdsTest(SubsetTest):
    def test_order_labels_and_digest(self, kind):
        self.write(kind)
        lines = ("dog/dog_1.jpg", "ant_2.jpg", "bee/bee_0.jpg", "ant_0.jpg")
        source = self.open(kind, f"val@{self.list(*lines)}")
        expected = ["dog/dog_1.jpg", "ant/ant_2.jpg", "bee/bee_0.jpg", "ant/ant_0.jpg"]
        self.assertEqual(files(source), expected)
        self.assertEqual(labels(source), [3, 0, 1, 0])
        self.assertEqual((source.num_classes, source.classes), (4, self.CLASSES))
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        self.assertEqual(source.ids_sha256, digest)
        self.assertIn("dog_1.jpg", source.describe(0))
        again = pickle.loads(pickle.dumps(source))
        self.assertEqual(again.read([3, 0]), source.read([3, 0]))
        self.assertIsNone(self.open(kind, "val").ids_sha256)

    def test_part_of_a_list(self, kind):
        self.write(kind)
        path = self.list("dog_1.jpg", "ant_2.jpg", "bee_0.jpg", end="")
        whole = self.open(kind, f"val@{path}")
        part = self.open(kind, f"val@{path}[1:]")
        self.assertEqual(files(part), files(whole)[1:])
        self.assertEqual(part.ids_sha256, whole.ids_sha256)
        self.assert_refused("exceeds the 3 available records", kind, f"val@{path}[:4]")

    def test_pinned_list(self, kind):
        self.write(kind)
        path = self.list("dog_1.jpg", "ant_2.jpg")
        of_file = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        of_lines = self.open(kind, f"val@{path}").ids_sha256
        self.assertNotEqual(of_file, of_lines)
        for digest in (of_file, of_lines.upper()):
            self.assertLen(self.open(kind, f"val@{path}#sha256={digest}[:1]"), 1)
        self.assert_refused(
            f"{path} has sha256 {of_file}, expected {'0' * 64}",
            kind,
            f"val@{path}#sha256={'0' * 64}",
        )
        self.assert_refused("FILE#sha256=HEX, with 64", kind, f"val@{path}#sha256=12")

    def test_refused_lists(self, kind):
        self.write(kind)
        twice = self.list("ant_0.jpg", "bee_0.jpg", "ant_0.jpg", name="twice")
        self.assert_refused(r"names images twice: ant_0.jpg \(1\)", kind, f"val@{twice}")
        lacking = self.list("ant_0.jpg", "ant/ant_7.jpg", "x.jpg", name="lacking")
        self.assert_refused(
            r"lacks 2 of the 3 images of .*lacking: ant/ant_7.jpg, x.jpg \(2\)",
            kind,
            f"val@{lacking}",
        )
        empty = self.list("", " ", name="empty")
        self.assert_refused("empty is empty; write one name per line", kind, f"val@{empty}")
        self.assert_refused(
            "@nothing is neither robustbench, selection nor a readable file", kind, "val@nothing"
        )
        (self.root / "binary").write_bytes(b"\xff\xfe\x00")
        self.assert_refused("binary is not a text file", kind, f"val@{self.root / 'binary'}")
        other = self.list("eel/eel_0.jpg", "ant_0.jpg", name="other")
        self.assert_refused(
            r"ids of .*other belong to classes that .* does not have: eel \(1\)",
            kind,
            f"val@{other}",
        )
        wrong = self.list("bee_1.jpg", "bee/ant_0.jpg", name="wrong")
        self.assert_refused(
            r"disagrees with .*wrong about 1 of 2 ids: it has the label 0 \(ant\) for "
            "bee/ant_0.jpg",
            kind,
            f"val@{wrong}",
        )

    def test_absolute_paths_are_refused(self, kind):
        self.write(kind)
        for line in ("/data/val/ant/ant_0.jpg", r"C:\val\ant\ant_0.jpg", "gs://b/ant/ant_0.jpg"):
            path = self.list("bee_0.jpg", line)
            self.assert_refused(
                rf"{path} has absolute paths: {re.escape(line)} \(1\); ids are CLASS/FILE or FILE",
                kind,
                f"val@{path}",
            )

    def test_lists_of_windows_and_of_careless_people(self, kind):
        self.write(kind)
        path = self.root / "list.txt"
        path.write_bytes(b"\xef\xbb\xbfdog/dog_1.jpg  \r\n\r\n \t\r\n bee_0.jpg\t\r\n\r\n")
        source = self.open(kind, f"val@{path}")
        self.assertEqual(files(source), ["dog/dog_1.jpg", "bee/bee_0.jpg"])
        self.assertEqual(source.ids_sha256, hashlib.sha256(b"dog/dog_1.jpg\nbee_0.jpg").hexdigest())
        path.write_bytes(b"\xef\xbb\xbfdog \r\n\r\n1\tbee \r\n")
        self.assertEqual(self.open(kind, "val", classes=str(path)).classes, ("dog", "bee"))
        path.write_bytes(b"\xef\xbb\xbf\r\n")
        self.assert_refused("list.txt is empty", kind, f"val@{path}")

    def test_names_that_fit_several_files(self, kind):
        same = ("ant/1.jpg", "bee/1.jpg", "cat/2.jpg", "dog/3.jpg")
        if kind == "folder":
            write_tree(self.root / "tree" / "val", same)
        else:
            self.write_prepared(same)
        path = self.list("1.jpg", "2.jpg")
        self.assert_refused(
            r"several files for ids of .*: 1.jpg \(1\); write CLASS/FILE", kind, f"val@{path}"
        )
        path = self.list("bee/1.jpg", "2.jpg", "ant/1.jpg")
        self.assertEqual(labels(self.open(kind, f"val@{path}")), [1, 2, 0])


@parameterized.parameters(*KINDS)
class ClassesTest(SubsetTest):
    def test_order_of_the_list_is_that_of_labels(self, kind):
        self.write(kind)
        source = self.open(kind, "val", classes=self.list("dog", "bee"))
        self.assertEqual((source.num_classes, source.classes), (2, ("dog", "bee")))
        found = sorted(zip(files(source), labels(source), strict=True))
        expected = [(f, ("dog", "bee").index(f[:3])) for f in self.FILES if f[:3] in ("dog", "bee")]
        self.assertEqual(found, sorted(expected))
        self.assertEqual(self.open(kind, "val", classes=self.list("1\tdog")).classes, ("dog",))

    def test_with_parts_and_ids(self, kind):
        self.write(kind)
        classes = self.list("dog", "bee", name="classes")
        whole = self.open(kind, "val", classes=classes)
        part = self.open(kind, "val[50%:]", classes=classes, num_classes=2)
        self.assertEqual(files(part), files(whole)[3:])
        ids = self.list("bee/bee_1.jpg", "dog_2.jpg", name="ids")
        chosen = self.open(kind, f"val@{ids}", classes=classes)
        self.assertEqual(files(chosen), ["bee/bee_1.jpg", "dog/dog_2.jpg"])
        self.assertEqual(labels(chosen), [1, 0])
        outside = self.list("bee/bee_1.jpg", "ant/ant_0.jpg", name="outside")
        self.assert_refused(
            r"ids of .*outside.* data.classes.*: ant", kind, f"val@{outside}", classes=classes
        )

    def test_refused_lists(self, kind):
        self.write(kind)
        for lines, pattern in (
            (
                ("dog", "eel", "emu"),
                r"not have the classes eel, emu \(2\); its 4 classes are ant, ",
            ),
            (("dog", "bee", "dog"), r"names classes twice: dog \(1\)"),
            (("",), "is empty"),
        ):
            self.assert_refused(pattern, kind, "val", classes=self.list(*lines))
        self.assert_refused(
            "data.classes=no is neither imagenet100 nor a readable file", kind, "val", classes="no"
        )
        self.assert_refused(
            "num_classes=4, but .* has 1 classes; set num_classes=1",
            kind,
            "val",
            classes=self.list("dog"),
            num_classes=4,
        )


class PreparedTest(SubsetTest):
    def index(self):
        return self.directory / "jaxrobust-index-val.npz"

    def chosen(self):
        return files(self.open("prepared", f"val@{self.list('dog_1.jpg', 'ant_2.jpg')}"))

    def test_index_is_written_once(self):
        self.write_prepared()
        self.open("prepared", "val[:50%]")
        self.assertFalse(self.index().exists())  # parts need none
        expected = self.chosen()
        self.assertTrue(self.index().exists())
        self.assertEqual([p.name for p in self.directory.glob(".*")], [])
        with mock.patch.object(subsets, "write_index", side_effect=AssertionError):
            self.assertEqual(self.chosen(), expected)

    @parameterized.parameters(
        {"content": b"nonsense"},
        {"content": b""},
        {"rows": 11},
        {"label": 1},
        {"name": b"other.jpg"},
    )
    def test_index_that_does_not_fit_is_made_again(self, content=None, rows=12, label=0, name=None):
        self.write_prepared()
        expected = self.chosen()
        right = subsets.read_index(self.directory, "val")
        if content is not None:
            self.index().write_bytes(content)
        else:
            names = right.names[:rows].copy()
            names[-1:] = name or names[-1:]
            subsets.write_index(self.directory, "val", (right.labels[:rows] + label) % 4, names)
        self.assertEqual(self.chosen(), expected)
        again = subsets.read_index(self.directory, "val")
        np.testing.assert_array_equal(again.labels, right.labels)
        np.testing.assert_array_equal(again.names, right.names)

    def test_an_index_of_other_arrays_is_none(self):
        place = Path(self.create_tempdir())
        labels, names = np.arange(3, dtype=np.int32), np.array([b"a", b"b", b"c"])
        wrong = [(labels, names[:2]), (labels, np.array(["a", "b", "c"])), (labels[:, None],) * 2]
        wrong += [(labels[:, None], names[:, None]), (labels, labels)]
        for own_labels, own_names in [(labels, names), *wrong]:
            np.savez(place / subsets.index_name("val"), labels=own_labels, names=own_names)
            found = subsets.read_index(place, "val")
            self.assertEqual(found is not None, own_names is names, own_names)
        self.assertIsNone(subsets.read_index(place, "train"))

    def test_read_only_directory_stays_as_it_is_for_root_too(self):
        self.write_prepared()
        before = sorted(path.name for path in self.directory.iterdir())
        self.directory.chmod(0o555)
        self.addCleanup(self.directory.chmod, 0o755)
        expected = self.chosen()
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), before)
        self.assertLen(list(subsets.index_cache().glob(f"*/{self.index().name}")), 1)
        self.assertEqual(self.chosen(), expected)

    def test_without_file_names(self):
        self.write_prepared(with_names=False)
        self.assert_refused(
            "'pets', split 'val' has no file names, so ids",
            "prepared",
            f"val@{self.list('ant_0.jpg')}",
        )
        source = self.open("prepared", "val", classes=self.list("cat"))
        self.assertEqual({file[:3] for file in files(source)}, {"cat"})
        self.assertRegex(source.describe(0), r"^record \d of .*pets-val.array_record-0000\d-of-")

    def test_classes_without_a_record(self):
        """It was an IndexError."""
        self.write_prepared(("ant/1.jpg", "dog/2.jpg"))
        for split in ("val", "val[:50%]"):
            self.assert_refused(
                "'pets', split 'val' has no records of the classes in data.classes; choose other",
                "prepared",
                split,
                classes=self.list("bee"),
            )

    def test_without_class_names(self):
        digits = [f"{c}/{c}_{i}.jpg" for c in range(4) for i in range(3)]
        self.write_prepared(digits, names=("0", "1", "2", "3"))
        self.assertEqual(self.open("prepared", "val").classes, ())
        source = self.open("prepared", "val", classes=self.list("2\ttwo", "0\tzero"))
        self.assertEqual(source.classes, ("two", "zero"))
        self.assertEqual(
            {(f[0], label) for f, label in zip(files(source), labels(source), strict=True)},
            {("2", 0), ("0", 1)},
        )
        self.assert_refused(
            r"does not name its 4 classes.*INDEX<TAB>NAME.*including two, nine \(2\)",
            "prepared",
            "val",
            classes=self.list("two", "9\tnine"),
        )
        self.assert_refused(
            "does not name its classes; write ids as bare file names",
            "prepared",
            f"val@{self.list('2/2_0.jpg')}",
        )
        self.assertEqual(files(self.open("prepared", f"val@{self.list('2_0.jpg')}")), ["2/2_0.jpg"])

    def test_unknown_split_and_sums_of_splits(self):
        self.write_prepared()
        path = self.list("ant_0.jpg")
        for split in (f"test@{path}", f"val+val@{path}", f"val[:2]@{path}"):
            self.assert_refused(r"no split .* it has val \(12\)", "prepared", split)
        self.assert_refused("no split 'test'", "prepared", "test", classes=self.list("ant"))

    def test_damaged_record_of_a_choice_is_named(self):
        self.write_prepared(shards=1)
        source = self.open("prepared", f"val@{self.list('dog_1.jpg')}")
        shard = next(self.directory.glob("pets-val*"))
        os.truncate(shard, 100)
        again = pickle.loads(pickle.dumps(source))
        with self.assertRaisesRegex(registry.DataError, r"record \d+ \(record \d+ of .*pets-val"):
            again[0]
        self.assertRegex(again.describe(0), r"^record \d+ of .*pets-val")


class ImageNetRecordsTest(SubsetTest):
    def write_imagenet(self, names):
        """RobustBench's images and 100 others, labeled by the classes `names`."""
        import tensorflow_datasets as tfds

        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(names)),
        }
        labels = {synset: label for label, synset in enumerate(names)}
        lines = [*sorted(imagenet.robustbench(), key=lambda line: line[-13:])]
        lines += [f"n01440764/{name}" for name in imagenet.selection()[:100]]
        records = []
        for line in lines:
            folder, _, name = line.partition("/")
            record = {"image": line.encode(), "label": labels[folder], "file_name": name.encode()}
            records.append(record)
        directory = self.root / "imagenet2012" / "5.1.0"
        write_tfds(directory, "imagenet2012", features, {"validation": records}, shards=3)

    def open_imagenet(self, split):
        return registry.open_source("imagenet2012", split, data_dir=self.root, num_classes=1000)

    @pytest.mark.slow
    def test_robustbench_of_records(self):
        self.write_imagenet(imagenet.synsets())
        source = self.open_imagenet("validation@robustbench")
        lines = imagenet.robustbench()
        self.assertEqual(files(source), list(lines))
        synsets = imagenet.synsets()
        self.assertEqual(labels(source), [synsets.index(line[:9]) for line in lines])
        self.assertEqual(source.ids_sha256, imagenet.ROBUSTBENCH_SHA256)
        self.assertLen(self.open_imagenet("validation@robustbench[:1000]"), 1000)
        with self.assertRaisesRegex(
            registry.DataError, "lacks 3900 of the 4000 images of selection: ILSVRC2012_val_"
        ):
            self.open_imagenet("validation@selection")
        self.assertStartsWith(source.describe(0), f"{lines[0][10:]} (record ")

    def test_labels_in_another_order(self):
        self.write_imagenet(imagenet.synsets()[::-1])
        with self.assertRaisesRegex(
            registry.DataError,
            r"has the label \d+ for n09468604/.*15253.JPEG, which is class \d+ of",
        ):
            self.open_imagenet("validation@robustbench")


class SyntheticTest(absltest.TestCase):
    def test_synthetic_data_has_neither(self):
        with self.assertRaisesRegex(registry.DataError, "'fake' is synthetic: it has no files"):
            registry.open_source("fake", "test@robustbench")
        with self.assertRaisesRegex(registry.DataError, "'fake' is synthetic: it has no classes"):
            registry.open_source("fake", "test", classes="imagenet100")

    def test_chunks_do_not_matter(self):
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, XDG_CACHE_HOME=cache),
            mock.patch.object(tfds_source, "_CHUNK", 100),
            mock.patch.object(subsets, "write_index", side_effect=OSError),
            tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen,
        ):
            chosen.write("3\tthree\n")
            chosen.flush()
            source = registry.open_source("digits", "test", classes=chosen.name)
        whole = registry.open_source("digits", "test")
        expected = [record.image for record in whole if record.label == 3]
        self.assertEqual([record.image for record in source], expected)
