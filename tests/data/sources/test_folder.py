"""`folder:PATH` has torchvision's classes and order; what would shift labels is refused."""

import hashlib
import os
import pickle
import tempfile
from pathlib import Path
from unittest import mock

from absl.testing import parameterized

from jaxrobust.data import imagenet
from jaxrobust.data.sources import image_folder, registry
from jaxrobust.training.run import run as training_run
from tests.support import sweeps
from tests.support.datasets import image_bytes, write_tree
from tests.support.images import torchvision
from tests.support.paths import SHARED
from tests.support.runs import tiny

PHOTOGRAPHS = SHARED / "data" / "imagenet_samples"


class FolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.root = Path(holder.name)
        self.name = f"folder:{self.root}"

    def open(self, split="train", **options):
        return registry.open_source(self.name, split, **options)

    def assert_refused(self, *patterns, split="train", **options):
        with self.assertRaises(registry.DataError) as caught:
            self.open(split, **options)
        for pattern in patterns:
            self.assertRegex(str(caught.exception), pattern)

    def paths(self, source):
        return [os.path.relpath(source.describe(i), self.root) for i in range(len(source))]


class ForeignClassesTest(FolderTest):
    """Training on some classes, selection on others."""

    def setUp(self):
        super().setUp()
        write_tree(self.root / "train", [f"{c}/{i}.jpg" for c in "abcd" for i in range(5)])
        write_tree(self.root / "val", [f"{c}/0.jpg" for c in "abcd"])

    def between(self, train, other):
        return registry.foreign_classes(self.open(train), self.open(other))

    def test_parts_of_a_folder_are_refused(self):
        with self.assertRaisesRegex(
            registry.DataError,
            r"100% of the records of .* split 'train\[75%:\]' belong to 1 class without "
            r"records in split 'train\[:75%\]'. .*sorted by class.*; give another split, or SPLIT@",
        ):
            self.between("train[:75%]", "train[75%:]")

    def test_a_few_are_told(self):
        self.assertIn("25% of the records", self.between("train[:75%]", "val"))
        with self.assertRaisesRegex(registry.DataError, "75% of the records .* to 3 classes"):
            self.between("train[:25%]", "val")

    def test_a_half_is_told_and_more_is_refused(self):
        self.assertIn("50% of the records", self.between("train[:50%]", "val"))
        (self.root / "ids").write_text("a/0.jpg\nb/0.jpg\nc/0.jpg\n")
        self.assertIn("to 1 class", self.between("train[:50%]", f"val@{self.root}/ids"))
        (self.root / "ids").write_text("a/0.jpg\nd/0.jpg\nc/0.jpg\n")
        with self.assertRaisesRegex(registry.DataError, "67% of the records .* to 2 classes"):
            self.between("train[:50%]", f"val@{self.root}/ids")

    def test_one_class_of_many_is_told(self):
        write_tree(self.root / "train", [f"d/{i}.jpg" for i in range(5, 15)])
        # The last class is on both sides, the others are on one.
        self.assertIn("holds only 1 of the 4 classes", self.between("train[:20]", "train[20:]"))
        self.assertEqual(self.between("train[:20]", "train[24:]"), "")  # 6 records might be so

    def test_nothing_to_say(self):
        self.assertEqual(self.between("train", "val"), "")
        (self.root / "ids").write_text("".join(f"{c}/4.jpg\n" for c in "abcd"))
        self.assertEqual(self.between("train", f"train@{self.root}/ids"), "")
        unknown = registry.open_source("digits", "train[:5]")
        known = self.open("train[75%:]")
        for pair in ((unknown, unknown), (unknown, known), (known, unknown)):
            self.assertEqual(registry.foreign_classes(*pair), "")

    def test_the_trainer_asks(self):
        config = tiny(data__name=self.name, data__augmentation="resized-crop")
        with config.unlocked():
            config.model.update(num_classes=4, in_channels=3)
            config.data.update(train_split="train[:75%]", selection_split="train[75%:]")
            config.data.test_split = "val"
            config.train.update(batch_size=8, epochs=1, warmup_epochs=0)
        with self.assertRaisesRegex(registry.DataError, "1 class without records in"):
            training_run.check(config, self.root)


class ReadingTest(FolderTest):
    def test_records_are_the_files(self):
        write_tree(self.root / "train", ["cat/1.jpg", "cat/0.png", "ape/x.jpeg"])
        source = self.open()
        self.assertEqual(
            self.paths(source), ["train/ape/x.jpeg", "train/cat/0.png", "train/cat/1.jpg"]
        )
        self.assertEqual((source.classes, source.num_classes), (("ape", "cat"), 2))
        self.assertEqual([record.label for record in source], [0, 1, 1])
        self.assertEqual((source.channels, source.image_shape), (3, (7, 9, 3)))
        self.assertEqual(source[2].image, image_bytes(0))
        self.assertEqual(source.read([2, 0, 2]), [source[2], source[0], source[2]])
        self.assertEqual(pickle.loads(pickle.dumps(source)).read([1]), [source[1]])

    def test_the_hash_is_of_names_and_order(self):
        def of(root, names, split="all", **options):
            write_tree(self.root / root, names, b"x")
            return registry.open_source(f"folder:{self.root / root}", split, **options).files_sha256

        names = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
        same = of("one", names)
        self.assertEqual(of("elsewhere", names), same)
        (self.root / "one" / "a" / "1.jpg").write_bytes(b"other")  # may have been repaired
        (self.root / "listed").write_text("b\na\n")
        others = [
            of("renamed", ["a/1.jpg", "a/3.jpg", "b/1.jpg"]),
            of("moved", ["a/1.jpg", "b/1.jpg", "b/2.jpg"]),
            of("class", ["a/1.jpg", "a/2.jpg", "c/1.jpg"]),
            of("fewer", names[1:]),
            of("one", [], "all[:2]"),
            of("one", [], "all[1:]"),
            of("one", [], classes=str(self.root / "listed")),
        ]
        self.assertEqual(of("one", []), same)
        self.assertLen({same, *others}, 1 + len(others))

    def test_what_counts_as_an_image(self):
        files = ["a/1.JPEG", "a/deep/er/2.Png", "a/deep/0.webp", "a/z.tiff", "a/a.BMP", "b/1.jpg"]
        ignored = ["a/notes.txt", "a/.hidden.jpg", "a/.deep/1.jpg", ".git/1.jpg", "a/x.jpg.part"]
        write_tree(self.root / "train", [*files, *ignored])
        (self.root / "train" / "readme.jpg").write_bytes(b"")
        expected = [
            "a/1.JPEG",
            "a/a.BMP",
            "a/z.tiff",
            "a/deep/0.webp",
            "a/deep/er/2.Png",
            "b/1.jpg",
        ]
        self.assertEqual(self.paths(self.open()), [f"train/{path}" for path in expected])

    def test_links_to_folders_are_followed(self):
        write_tree(self.root, ["elsewhere/1.jpg", "deep/2.jpg"])
        (self.root / "train" / "b").mkdir(parents=True)
        (self.root / "train" / "a").symlink_to(self.root / "elsewhere")
        (self.root / "train" / "b" / "c").symlink_to(self.root / "deep")
        self.assertEqual(self.paths(self.open()), ["train/a/1.jpg", "train/b/c/2.jpg"])

    def test_names_that_are_not_unicode(self):
        (self.root / "train" / "a").mkdir(parents=True)
        with open(os.fsencode(self.root / "train" / "a") + b"/\xff\xe9.jpg", "wb") as file:
            file.write(b"content")
        self.assertEqual(self.open()[0].image, b"content")

    @parameterized.parameters(("val", "validation"), ("validation", "val"))
    def test_val_is_validation(self, there, asked):
        write_tree(self.root, [f"{there}/a/1.jpg", "train/a/2.jpg"])
        self.assertEqual(self.paths(self.open(asked)), [f"{there}/a/1.jpg"])
        self.assertEqual(self.open(asked).split, asked)

    def test_without_splits_there_is_all(self):
        write_tree(self.root, ["cat/1.jpg", "train/1.jpg"])  # "train" is a class here
        source = self.open("all")
        self.assertEqual(source.classes, ("cat", "train"))
        self.assertLen(self.open("all[1:]"), 1)
        self.assert_refused(
            "has no split 'test': it has only the split all, whose .* directly inside: cat, train ",
            split="test",
        )

    def test_parts_take_whole_classes(self):
        write_tree(self.root / "train", [f"{c}/{i}.jpg" for c in "ab" for i in range(10)])
        self.assertEqual({record.label for record in self.open("train[:50%]")}, {0})
        self.assertEqual(self.paths(self.open("train[9:11]")), ["train/a/9.jpg", "train/b/0.jpg"])
        self.assertLen(self.open("train[-5%:]"), 1)

    def test_labels_are_known_before_reading(self):
        write_tree(self.root / "train", ["a/0.jpg", "b/0.jpg", "b/1.jpg", "c/0.jpg"])
        (self.root / "ids").write_text("c/0.jpg\na/0.jpg\n")
        (self.root / "classes").write_text("c\nb\n")
        for split, options in (
            ("train", {}),
            ("train[1:]", {}),
            (f"train@{self.root}/ids", {}),
            ("train[:2]", {"classes": f"{self.root}/classes"}),
        ):
            source = self.open(split, **options)
            read = [record.label for record in source]
            self.assertEqual(source.labels.tolist(), read, split)

    def test_splits_there(self):
        self.assertEqual(image_folder.splits_there(self.root / "nowhere"), [])
        write_tree(self.root, ["val/a/1.jpg", "train/1.jpg", "cat/1/1.jpg"])
        self.assertEqual(image_folder.splits_there(self.root), ["val"])
        write_tree(self.root, ["train/a/1.jpg"])
        self.assertEqual(image_folder.splits_there(str(self.root)), ["train", "val"])

    def test_is_torchvisions_image_folder(self):
        _, vision = torchvision(self)
        deep = [
            "a/z.jpg",
            "a/b/c.jpg",
            "a/b-c/d.jpg",
            "a/b/a.jpg",
            "B/1.JPG",
            "a b/10.png",
            "a b/9.ppm",
        ]
        write_tree(self.root, deep)
        roots = [self.root] + [PHOTOGRAPHS] * PHOTOGRAPHS.is_dir()
        for root in roots:
            reference = vision.datasets.ImageFolder(root)
            source = registry.open_source(f"folder:{root}", "all")
            self.assertEqual(list(source.classes), reference.classes)
            found = [(source.describe(i), r.label) for i, r in enumerate(source)]
            self.assertEqual(found, reference.samples)

    def test_a_source_of_many_files_is_small(self):
        write_tree(self.root / "train", [f"a/n01440764_{i:05d}.JPEG" for i in range(2000)], b"")
        self.assertLess(len(pickle.dumps(self.open())), 2000 * 35)  # 20 of name, 12 of numbers


class RefusalTest(FolderTest):
    @sweeps.rows(
        (["val/a/1.jpg"], "train", "no split 'train': it has val"),
        (["train/a/1.jpg", "val/a/1.jpg"], "test", "has no split 'test': it has train, val; write"),
        (
            ["train/a/1.jpg", "val/a/1.jpg"],
            *("train[5:", "has no split 'train.5:': it has train, val"),
        ),
        (["train/a/1.jpg", "val/a/1.jpg"], "all", "has no split 'all': it has train, val"),
        (["1.jpg"], "train", "has no folders; arrange its files as SPLIT/CLASS/FILE or CLASS/FILE"),
        (
            ["train/a/1.jpg", "train/b/readme.txt", "train/c/readme.txt"],
            *("train", r"hold no images \(.jpg, .*\): b, c \(2\); unpack them again"),
        ),
        *(
            (["train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg"], f"train{part}", pattern)
            for part, pattern in (
                ("[5:]", "exceeds the 3 available records"),
                ("[2:1]", "is empty; 3 records are available"),
                ("[:0]", "is empty; 3 records are available"),
                ("[x:]", r"\[x:\] is not a valid part"),
                ("[:]", r"\[:\] is not a valid part"),
            )
        ),
        *(
            ([f"{first}/a/1.jpg", f"{second}/a/2.jpg"], split, f"split '{split}': .* holds both "
             f"{first}/ and {second}/; move one away")
            for first, second, split in (
                ("val", "validation", "val"),
                ("val", "validation", "validation"),
                ("Train", "train", "train"),
            )
        ),
    )  # fmt: skip
    def test_what_a_folder_must_not_be(self, paths, split, pattern):
        self.root = Path(self.create_tempdir())
        self.name = f"folder:{self.root}"
        write_tree(self.root, paths)
        if "Train" in pattern and len(list(self.root.iterdir())) == 1:
            self.skipTest("needs a file system that tells Train from train")
        self.assert_refused(pattern, split=split)

    def test_missing_directory_and_an_archive(self):
        self.name = f"folder:{self.root}/nowhere"
        self.assert_refused("nowhere does not exist")
        (self.root / "images.zip").write_bytes(b"PK")
        self.name = f"folder:{self.root}/images.zip"
        self.assert_refused("images.zip is a file; unpack it, and name the folder with train/")

    def test_files_beside_a_split_do_not_count(self):
        write_tree(self.root, ["val/a/1.jpg", "validation/2.jpg"])
        self.assertEqual(self.paths(self.open("validation")), ["val/a/1.jpg"])

    def test_file_that_vanished(self):
        write_tree(self.root / "train", ["a/1.jpg", "a/2.jpg"])
        source = self.open()
        (self.root / "train/a/2.jpg").unlink()
        with self.assertRaisesRegex(
            registry.DataError, "train/a/2.jpg cannot be read .No such file.*"
        ):
            source.read([0, 1])

    def test_empty_file_is_given_as_it_is(self):
        write_tree(self.root / "train", ["a/1.jpg"], b"")
        self.assertEqual(self.open()[0].image, b"")

    def test_unreadable_directory(self):
        write_tree(self.root / "train", ["a/1.jpg"])
        with mock.patch.object(os, "scandir", side_effect=PermissionError(13, "Permission denied")):
            self.assert_refused(
                f"^{self.root} cannot be read .*Permission denied.*check it and its"
            )

    def test_number_of_classes(self):
        write_tree(self.root / "train", ["a/1.jpg", "b/1.jpg"])
        self.assert_refused(
            "num_classes=10, but .* has 2 classes; set num_classes=2 if",
            num_classes=10,
        )
        self.assertLen(self.open(num_classes=2), 2)

    def test_a_list_of_images_says_itself_which_they_are(self):
        """So that the record of a list is the same, whatever else the folder holds."""
        write_tree(self.root, ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
        (self.root / "ids").write_text("b/1.jpg\na/1.jpg\n")
        listed, whole = self.open(f"train@{self.root}/ids"), self.open("train")
        self.assertIsNone(listed.files_sha256)
        self.assertIsNotNone(listed.ids_sha256)
        self.assertIsNotNone(whole.files_sha256)
        self.assertIsNone(whole.ids_sha256)

    def test_sets_with_other_classes(self):
        write_tree(self.root, ["train/a/1.jpg", "train/b/1.jpg", "other/val/b/1.jpg"])
        train = self.open("train")
        other = registry.open_source(f"folder:{self.root}/other", "val")
        registry.same_classes([train, train])
        for pair in ([train, other], [other, train]):
            with self.assertRaisesRegex(
                registry.DataError,
                r"split 'val' lacks classes of split 'train', .* differ: a \(1\)",
            ):
                registry.same_classes(pair)
        registry.same_classes([train, registry.open_source("fake", "test")])


class ClassOrderTest(FolderTest):
    """Each split counted its own folders: val {b, c} beside train {a, b, c} had the labels 0, 1."""

    def labels(self, split, **options):
        source = self.open(split, **options)
        return [record.label for record in source], source.num_classes, source.classes

    @parameterized.parameters("val", "validation", "test", "dev", "holdout")
    def test_every_split_has_the_classes_of_train(self, split):
        write_tree(self.root, [f"train/{c}/1.jpg" for c in "abc"])
        write_tree(self.root / split, ["b/1.jpg", "c/1.jpg", "c/2.jpg"])
        expected = [1, 2, 2], 3, ("a", "b", "c")
        self.assertEqual(self.labels(split), expected)
        self.assertEqual(self.open(split).labels.tolist(), expected[0])
        self.assertEqual(self.labels(f"{split}[1:]")[0], [2, 2])
        (self.root / "ids").write_text("c/2.jpg\nb/1.jpg\n")
        self.assertEqual(self.labels(f"{split}@{self.root}/ids")[0], [2, 1])
        registry.same_classes([self.open("train"), self.open(split)])
        self.open(split, num_classes=3)
        self.assert_refused("num_classes=2, but .* has 3 classes", split=split, num_classes=2)

    @sweeps.rows("Train", "TRAIN", "training")
    def test_how_train_is_written(self, folder):
        write_tree(self.root, [f"{folder}/{c}/1.jpg" for c in "abc"] + ["val/c/1.jpg"])
        self.assertEqual(self.labels("val")[:2], ([2], 3))

    def test_nested_folders(self):
        """As Tiny ImageNet lays them out, where each class has a folder images."""
        names = [f"train/{c}/images/1.jpg" for c in "abc"] + ["val/b/images/1.jpg"]
        write_tree(self.root, names)
        self.assertEqual(self.labels("val")[:2], ([1], 3))

    def test_a_class_that_train_lacks(self):
        write_tree(self.root, ["train/a/1.jpg", "train/c/1.jpg", "val/b/1.jpg", "val/c/1.jpg"])
        self.assert_refused(
            r"split 'val': .*/train has no class folder for b \(1\), so a .* lacks these classes",
            split="val",
        )
        self.assertEqual(self.labels("train")[0], [0, 1])
        (self.root / "classes").write_text("c\na\n")
        chosen = {"classes": f"{self.root}/classes"}
        self.assertEqual(self.labels("val", **chosen), ([0], 2, ("c", "a")))

    def test_a_folder_of_classes_without_images(self):
        """A class folder that is there and empty is one that was not unpacked."""
        write_tree(self.root, [f"train/{c}/1.jpg" for c in "abc"] + ["val/b/1.jpg"])
        (self.root / "val" / "c").mkdir()
        self.assert_refused(r"hold no images .*: c \(1\)", split="val")

    def test_without_train_and_without_splits(self):
        write_tree(self.root, ["val/b/1.jpg", "val/c/1.jpg", "test/c/1.jpg"])
        self.assertEqual(self.labels("val")[:2], ([0, 1], 2))
        self.assertEqual(self.labels("test")[:2], ([0], 1))
        write_tree(self.root / "flat", ["train/1.jpg", "zebra/1.jpg"])
        flat = registry.open_source(f"folder:{self.root}/flat", "all")
        self.assertEqual((flat.classes, flat.labels.tolist()), (("train", "zebra"), [0, 1]))


class ImageNetTest(FolderTest):
    """Class folders that mean ImageNet's 1,000; the images are empty files."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        cls.whole = Path(holder.name)
        write_tree(cls.whole / "val", imagenet.robustbench(), b"x")
        for synset in imagenet.synsets():  # three have no image among the 5,000
            (cls.whole / "val" / synset).mkdir(exist_ok=True)

    def make(self, folders):
        write_tree(self.root / "train", [f"{folder}/1.jpg" for folder in folders])

    def test_all_thousand(self):
        name = f"folder:{self.whole}"
        source = registry.open_source(name, "validation@robustbench", num_classes=1000)
        lines = imagenet.robustbench()
        self.assertLen(source, 5000)
        self.assertEqual(source.ids_sha256, imagenet.ROBUSTBENCH_SHA256)
        self.assertEqual(source.describe(7), str(self.whole / "val" / lines[7]))
        synsets = imagenet.synsets()
        self.assertEqual(source.classes, synsets)
        labels = [record.label for record in source]
        self.assertEqual(labels, [synsets.index(line.partition("/")[0]) for line in lines])
        part = registry.open_source(name, "val@robustbench[:10]")
        self.assertEqual(part.read(range(10)), source.read(range(10)))
        self.assertEqual(part.ids_sha256, imagenet.ROBUSTBENCH_SHA256)
        self.assertEqual(pickle.loads(pickle.dumps(part))[3], source[3])
        with self.assertRaisesRegex(registry.DataError, r"hold no images .* \(3\); unpack"):
            registry.open_source(name, "val")
        with self.assertRaisesRegex(
            registry.DataError, "lacks 4000 of the 4000 images of selection"
        ):
            registry.open_source(name, "val@selection")

    def test_images_of_the_list_are_missing(self):
        lines = imagenet.robustbench()
        gone = self.whole / "val" / lines[17]
        gone.rename(self.root / "kept")
        self.addCleanup((self.root / "kept").rename, gone)
        with self.assertRaisesRegex(
            registry.DataError, rf"lacks 1 of the 5000 images of robustbench: {lines[17]} \(1\)"
        ):
            registry.open_source(f"folder:{self.whole}", "val@robustbench")

    def test_one_class_is_missing(self):
        gone = self.whole / "val" / "n02123045"
        gone.rename(self.root / "kept")
        self.addCleanup((self.root / "kept").rename, gone)
        name = f"folder:{self.whole}"
        for classes in (None, 1000, 999):
            with self.assertRaisesRegex(
                registry.DataError,
                r"/val has only 999 of ImageNet's 1,000 class folders, so labels would shift; "
                r"missing: n02123045 \(1\); restore them, or .* data.classes",
            ):
                registry.open_source(name, "val", num_classes=classes)
        chosen = self.root / "classes.txt"
        chosen.write_text("n01443537\nn01440764\n")
        source = registry.open_source(name, "val", classes=str(chosen))
        self.assertEqual(source.classes, ("n01443537", "n01440764"))

    def test_additional_folders(self):
        self.make([*imagenet.synsets()[:600], "n00000000", "new"])
        self.assert_refused(r"has 600 of .*, and others .*: n00000000, new \(2\); move")

    def test_a_head_of_a_thousand_classes_means_imagenet(self):
        self.make(imagenet.imagenet100())
        self.assertEqual(self.open(num_classes=100).num_classes, 100)
        self.assert_refused(
            r"has only 100 of ImageNet's 1,000.*missing: n01440764, .* \(900\)", num_classes=1000
        )

    def test_half_of_them_are_other_data(self):
        self.make([*imagenet.synsets()[:500], "new"])
        self.assertEqual(self.open().num_classes, 501)

    def test_imagenet_100(self):
        source = registry.open_source(f"folder:{self.whole}", "val", classes="imagenet100")
        self.assertEqual(source.classes, imagenet.imagenet100())
        self.assertEqual(
            {(source.describe(i).split("/")[-2], r.label) for i, r in enumerate(source)},
            {(name, label) for label, name in enumerate(imagenet.imagenet100())},
        )
        with self.assertRaisesRegex(
            registry.DataError,
            "ids of robustbench belong to classes that .*data.classes.*n01440764",
        ):
            registry.open_source(f"folder:{self.whole}", "val@robustbench", classes="imagenet100")


class ListsTest(FolderTest):
    def test_robustbench_list_that_was_changed(self):
        for name in ("robustbench.txt", "synsets.txt"):
            content = (imagenet._LISTS / name).read_bytes()
            (self.root / name).write_bytes(content.replace(b"n09468604", b"n09468605", 1))
        imagenet._shipped.cache_clear()
        self.addCleanup(imagenet._shipped.cache_clear)
        with mock.patch.object(imagenet, "_LISTS", self.root):
            # Before the data set is looked for, which does not exist.
            self.assert_refused(
                f"robustbench.txt has sha256 [0-9a-f]+, expected {imagenet.ROBUSTBENCH_SHA256}",
                split="val@robustbench",
            )
            (self.root / "robustbench.txt").unlink()
            self.assert_refused("robustbench.txt is missing.*reinstall", split="val@robustbench")

    def test_lists_are_those_of_their_sources(self):
        import tensorflow_datasets as tfds

        labels = Path(tfds.__file__).parent / "datasets/imagenet2012/labels.txt"
        self.assertEqual(list(imagenet.synsets()), labels.read_text().split())
        self.assertEqual(list(imagenet.synsets()), sorted(imagenet.synsets()))
        lines = imagenet.robustbench()
        self.assertLen(set(lines), 5000)
        self.assertEqual(lines[0], "n09468604/ILSVRC2012_val_00015253.JPEG")
        self.assertEqual(lines[-1], "n13133613/ILSVRC2012_val_00025432.JPEG")
        self.assertLen({line.partition("/")[0] for line in lines}, 997)
        indices = [imagenet.synsets().index(name) for name in imagenet.imagenet100()]
        self.assertEqual(indices[:10], [2, 12, 21, 29, 33, 43, 45, 47, 61, 68])
        self.assertLen(set(indices), 100)

    def test_selection_never_changes(self):
        names = imagenet.selection()
        self.assertLen(set(names), 4000)
        self.assertEmpty(set(names) & {line.rpartition("/")[2] for line in imagenet.robustbench()})
        numbers = [
            int(name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")) for name in names
        ]
        self.assertBetween(min(numbers), 1, 50)
        self.assertBetween(max(numbers), 49_950, 50_000)
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        self.assertEqual(digest, "e6ccffe36ed15dc203e070c246fa7a6c8e3040d4cced217396d85a6947a5e602")
