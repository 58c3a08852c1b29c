"""What a person may have meant otherwise is said or refused, of each kind of source.

The table follows what users of torchvision, timm, Keras, TFDS and Pillow report: names in the order
of texts, folders of programs, labels from 1, one-hot labels, 16 bits, alpha, CMYK, EXIF, floats.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import Image

from jaxrobust import data
from tests.support import four_sources, sweeps
from tests.support.datasets import write_tree
from tests.support.four_sources import FILES, KINDS
from tests.support.images import png as deep_png

RNG = np.random.default_rng(0)
SIZE = (8, 8)


def colours(top=256, channels=3):
    return RNG.integers(0, top, (*SIZE, channels), np.uint8)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_with_transparency():
    image = Image.fromarray(colours()).convert("P")
    return saved(image, transparency=bytes(range(256)))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(colours()), "JPEG", exif=exif)


def of_mode(mode, kind="PNG"):
    return saved(Image.fromarray(colours()).convert(mode), kind)


def animation():
    frames = [Image.fromarray(colours()) for _ in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


ENCODED = {  # kind -> (file, what is said, whether it is refused)
    "16 bits of gray": (
        saved(Image.fromarray(RNG.integers(0, 65536, SIZE, np.uint16))),
        "1 of 8 .* have 16-bit or float gray values, .* clipped .*; save them with 8 bits",
        True,
    ),
    "32 bits of gray": (
        saved(Image.fromarray(RNG.integers(0, 65536, SIZE, np.int32)), "TIFF"),
        "16-bit or float gray values",
        True,
    ),
    "floats": (
        saved(Image.fromarray(RNG.random(SIZE, np.float32)), "TIFF"),
        "16-bit or float gray values",
        True,
    ),
    "16 bits of color": (
        deep_png(RNG.integers(0, 65536, (*SIZE, 3)).astype(">u2"), 16, 2),
        "1 of 8 inspected images, .*, have 16 bits per channel, of which only the upper 8 are read",
        False,
    ),
    "alpha": (of_mode("RGBA"), "1 of 8 .* have transparency, which is ignored", False),
    "gray and alpha": (of_mode("LA"), "1 of 8 .* have transparency, which is ignored", False),
    "palette": (palette_with_transparency(), "1 of 8 .* have transparency", False),
    "CMYK": (of_mode("CMYK", "JPEG"), "1 of 8 .* have CMYK colors", False),
    "EXIF": (turned(), "1 of 8 .* have an EXIF orientation, which is not applied", False),
    "GIF": (animation(), "1 of 8 .* have several frames or pages, of which only the first", False),
}


class ConventionsCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        environment = {"XDG_CACHE_HOME": str(self.root / "cache")}
        self.enter_context(mock.patch.dict(os.environ, environment))

    def write(self, kind, splits, names):
        self.root = Path(self.create_tempdir())
        if kind == "hf":
            four_sources.cache_hugging_face(self, self.root / "hf_cache")
        return four_sources.write(kind, self.root, splits, names)

    def open(self, given, split="train"):
        return data.open_source(given["name"], split, data_dir=given["data_dir"])

    def says(self, given, pattern, split="train"):
        self.assertRegex("\n".join(self.open(given, split).notes), pattern)

    def refuses(self, given, pattern, split="train"):
        with self.assertRaisesRegex(data.DataError, pattern) as caught:
            self.open(given, split)
        self.assertNotIn("\n", str(caught.exception))

    def npz(self, **arrays):
        np.savez(self.root / "own.npz", **arrays)
        return {"name": f"npz:{self.root}/own.npz", "data_dir": None}


class ImagesTest(ConventionsCase):
    @sweeps.rows(*sweeps.product(source=FILES, kind=tuple(ENCODED)))
    def test_files(self, source, kind):
        file, pattern, refused = ENCODED[kind]
        if (source, kind) == ("folder", "GIF"):  # by its ending, which torchvision leaves out
            write_tree(self.root / "own", ["a/1.png", "b/1.png"])
            (self.root / "own" / "a" / "2.gif").write_bytes(file)
            given = {"name": f"folder:{self.root}/own", "data_dir": None}
            return self.says(given, "files that do not end in .* are left out: 1 .gif", "all")
        files = [colours() for _ in range(7)]
        given = self.write(source, {"train": ([*files, file], [0] * 4 + [1] * 4)}, "ab")
        (self.refuses if refused else self.says)(given, pattern)

    @sweeps.rows(*KINDS)
    def test_pixels_of_0_and_1(self, source):
        """They passed in silence, and 8/255 was eight times their range."""
        images = [colours(2) for _ in range(8)]
        given = self.write(source, {"train": (images, [0, 1] * 4)}, "ab")
        self.refuses(
            given, "have only pixel values 0 and 1, although white is 255, .*; save 255 . x"
        )

    @sweeps.rows(*sweeps.product(source=KINDS, top=(17, 1)))
    def test_dark_pixels(self, source, top):
        """Of 0 to 16, and black ones, which `astype("uint8")` leaves of pixels below 1."""
        given = self.write(source, {"train": ([colours(top) for _ in range(8)], [0, 1] * 4)}, "ab")
        self.says(
            given, f"have no pixel above {top - 1}, although white is 255; scale them to 0..255"
        )

    @sweeps.rows(*KINDS)
    def test_usual_pixels_say_nothing(self, source):
        for channels in (1, 3):
            images = [colours(256, channels) for _ in range(8)]
            given = self.write(source, {"train": (images, [0, 1] * 4)}, "ab")
            self.assertEqual(self.open(given).notes, ())

    @sweeps.rows(*FILES)
    def test_one_bit_is_black_and_white(self, source):
        file = saved(Image.fromarray(colours()).convert("1"))
        given = self.write(source, {"train": ([file, file], [0, 1])}, "ab")
        self.assertEqual(self.open(given).notes, ())
        loaded = data.load(**given, split="train")
        self.assertEqual(set(np.unique(loaded.images).tolist()), {0.0, 1.0})

    @sweeps.rows(*FILES)
    def test_deep_pixels_that_were_not_looked_at(self, source):
        """Among images of several sizes a few are looked at; others are refused when decoded."""
        files = [colours() for _ in range(80)]
        files[1] = RNG.integers(0, 256, (9, 9, 3), np.uint8)
        files[-1] = RNG.integers(0, 256, (9, 9, 3), np.uint8)
        files[6] = ENCODED["16 bits of gray"][0]
        given = self.write(source, {"train": (files, [0] * 40 + [1] * 40)}, "ab")
        self.assertIsNone(self.open(given).image_shape)
        with self.assertRaisesRegex(data.DataError, "values .I;16. do not fit in 8 bits; save it"):
            data.load(**given, split="train", image_size=8)

    @sweeps.rows(
        (RNG.random((4, 8, 8), np.float32), r"write np.round\(255 \* x_train\)"),
        (RNG.random((4, 8, 8)), r"write np.round\(255 \* x_train\)"),
        (  # whose advice was np.round(x_train), which leaves 0 and 1
            np.linspace(-0.001, 1.001, 256, dtype=np.float32).reshape(4, 8, 8),
            r"write np.round\(255 \* np.clip\(x_train, 0, 1\)\)",
        ),
        (RNG.random((4, 8, 8)).astype("float16"), r"np.round\(255 \* x_train\)"),
        (255 * RNG.random((4, 8, 8)), r"here np.round\(x_train\).astype"),
        (2 * RNG.random((4, 8, 8)) - 1, r"np.round\(127.5 \* \(x_train \+ 1\)\)"),
        (4 * RNG.random((4, 8, 8)) - 2, "after undoing their scaling to -[12].* to"),
        (RNG.integers(0, 65536, (4, 8, 8), np.uint16), r"round\(x_train / 257\)"),
        (RNG.integers(0, 256, (4, 8, 8)), r"here x_train.astype\('uint8'\)"),
        (RNG.random((4, 8, 8)) > 0.5, r"write 255 \* x_train.astype\('uint8'\)"),
        (RNG.integers(0, 256, (4, 3, 8, 8), np.uint8), r"transpose\(0, 2, 3, 1\)"),
        (RNG.integers(0, 256, (4, 8, 8, 4), np.uint8), "not uint8.N,H,W. or uint8"),
    )
    def test_arrays(self, pixels, pattern):
        self.refuses(self.npz(x_train=pixels, y_train=np.arange(4)), pattern)

    def test_tfds_of_more_than_8_bits(self):
        """TFDS keeps floats in the bytes of colors, which passed for an image of noise."""
        import tensorflow_datasets as tfds

        from tests.support.datasets import write_tfds

        for dtype in (np.uint16, np.float32):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 1), dtype=dtype),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            rows = [{"image": saved(Image.fromarray(colours())), "label": i} for i in range(2)]
            directory = self.root / np.dtype(dtype).name
            write_tfds(directory / "mine" / "1.0.0", "mine", features, {"train": rows})
            given = {"name": "mine", "data_dir": str(directory)}
            self.refuses(given, f"its images are {np.dtype(dtype)}; prepare it with uint8 images")


class LabelsTest(ConventionsCase):
    @sweeps.rows("npz", "tfds", "hf")
    def test_counted_from_1(self, source):
        """As MATLAB's and ImageNet's lists count; or ImageNet's with a background class."""
        images, labels = [colours() for _ in range(8)], [1, 2, 3, 1, 2, 3, 1, 2]
        given = self.write(source, {"train": (images, labels)}, ["none", "a", "b", "c"])
        self.says(
            given, r"has no images of 1 of its 4 classes: none \(1\); if .* start at 1, subtract 1"
        )

    def test_a_part_of_a_folder_is_not_counted_from_1(self):
        """Its labels are those of the folders; that of the first one is not in the second half."""
        write_tree(self.root, [f"train/{name}/{i}.png" for name in "abc" for i in range(4)])
        notes = self.open({"name": f"folder:{self.root}", "data_dir": None}, "train[50%:]").notes
        self.assertRegex("\n".join(notes), r"has no images of 1 of its 3 classes: a \(1\)$")

    def test_folders_counted_from_1(self):
        write_tree(self.root, [f"train/{number}/1.png" for number in range(1, 5)])
        given = {"name": f"folder:{self.root}", "data_dir": None}
        self.says(given, "has label 0 for class '1': labels start at 0")

    @sweeps.rows(*KINDS)
    def test_a_class_without_images(self, source):
        images, labels = [colours() for _ in range(12)], np.arange(12) % 4
        few = [label for label in labels if label != 2]
        given = self.write(source, {"train": (images, labels), "test": (images[:9], few)}, "abcd")
        self.says(given, r"split 'test' has no images of 1 of its 4 classes: c \(1\)", "test")
        self.assertEqual(self.open(given).notes, ())
        self.assertEqual(self.open(given, "test").num_classes, 4)

    @sweeps.rows("npz", "hf")
    def test_a_class_that_train_lacks(self, source):
        images, labels = [colours() for _ in range(12)], np.arange(12) % 4
        few = [label for label in labels if label != 2]
        given = self.write(source, {"train": (images[:9], few), "test": (images, labels)}, "abcd")
        self.says(given, r"classes that are absent from split 'train': c \(1\)", "test")

    def test_hugging_faces_splits_with_names_of_their_own(self):
        """The labels of `val` {b, c} beside `train` {a, b, c} were 0 and 1 there."""
        images = [colours() for _ in range(3)]
        given = self.write("hf", {"train": (images, [0, 1, 2])}, "abc")
        import datasets

        folder = self.root / "hf"

        def split(names, labels):
            kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
            files = [{"bytes": four_sources.png(i), "path": None} for i in images[: len(labels)]]
            return datasets.Dataset.from_dict(
                {"image": files, "label": labels}, features=datasets.Features(kinds)
            )

        def saved_to_disk(names):
            both = {"train": split(["a", "b", "c"], [0, 1, 2]), "val": split(names, [0, 1])}
            place = folder.parent / "_".join(names)
            datasets.DatasetDict(both).save_to_disk(place)
            return {"name": f"hf:{place}", "data_dir": None}

        given = saved_to_disk(["b", "c"])
        source = self.open(given, "val")
        self.assertEqual((source.labels.tolist(), source.num_classes), ([1, 2], 3))
        self.assertEqual(source.classes, ("a", "b", "c"))
        pattern = r"records of classes that split 'train' lacks: d \(1\); remove"
        self.refuses(saved_to_disk(["b", "d"]), pattern, "val")

    @sweeps.rows(
        (
            np.eye(4, dtype=np.int64),
            r"y_train is int64\[4, 4\].*such as y_train.argmax\(1\) for one",
        ),
        (np.eye(4, dtype=np.float32), r"such as y_train.argmax\(1\) for one-hot"),
        (np.arange(4.0), r"y_train is float64\[4\].*such as y_train.astype\('int64'\)"),
        (np.arange(4) - 1, "holds -1; labels start at 0"),
    )
    def test_arrays(self, labels, pattern):
        images = np.stack([colours() for _ in range(4)])
        self.refuses(self.npz(x_train=images, y_train=labels), pattern)

    @sweeps.rows(
        (
            "float32",
            [0.0, 1.0],
            "label is float32; labels must be integers or strings; write whole",
        ),
        (
            "list",
            [[1, 0], [0, 1]],
            "labels must be integers or strings; for one-hot labels, write the",
        ),
    )
    def test_columns_of_hugging_face(self, kind, labels, pattern):
        images = [colours() for _ in range(2)]
        self.write("hf", {"test": (images, [0, 1])}, "ab")
        import datasets

        own = (
            datasets.Value("float32")
            if kind == "float32"
            else datasets.List(datasets.Value("int64"))
        )
        features = datasets.Features({"image": datasets.Image(), "label": own})
        files = [{"bytes": four_sources.png(i), "path": None} for i in images]
        table = datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)
        table.to_parquet(str(self.root / "hf" / "train.parquet"))
        (self.root / "hf" / "test.parquet").unlink()
        self.refuses({"name": f"hf:{self.root}/hf#label", "data_dir": None}, pattern)


class NamesTest(ConventionsCase):
    @sweeps.rows(*sweeps.product(source=KINDS, names=("0 1 10 11 2 3", "c1 c10 c11 c2 c3 c4")))
    def test_order_of_texts(self, source, names):
        """The most reported surprise of torchvision's ImageFolder; timm sorts by numbers."""
        names = names.split()
        images = [colours() for _ in range(12)]
        given = self.write(source, {"train": (images, np.arange(12) // 2)}, names)
        at = names.index(min(names, key=len)) + (2 if "0" in names else 1)
        self.says(given, f"as text: label {at} is class '{names[at]}', but would be '.?2' .*timm")

    @sweeps.rows(*KINDS)
    def test_an_order_that_is_the_same(self, source):
        images = [colours() for _ in range(12)]
        given = self.write(source, {"train": (images, np.arange(12) // 2)}, "012345")
        self.assertEqual(self.open(given).notes, ())

    @sweeps.rows(*KINDS)
    def test_names_that_differ_in_case(self, source):
        if os.path.exists(str(self.root).upper()):
            self.skipTest("needs a file system that tells Cat from cat")
        images = [colours() for _ in range(6)]
        given = self.write(source, {"train": (images, np.arange(6) // 2)}, ["Cat", "ape", "cat"])
        self.says(given, r"classes that differ only in case: Cat, cat \(2\)")

    @sweeps.rows(*KINDS)
    def test_one_class(self, source):
        images = [colours() for _ in range(3)]
        given = self.write(source, {"train": (images, [0, 0, 0])}, ["cat"])
        self.says(given, "has only one class, cat: a network with one output is always right")


class ToldTest(ConventionsCase):
    def test_sentences_are_told_once_on_each_stream(self):
        images = [colours(17) for _ in range(8)]
        given = self.write("npz", {"train": (images, [0, 1] * 4)}, "ab")
        for _ in range(2):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                loaded = [data.load(**given, split="train") for _ in range(2)]
            self.assertEqual(said.getvalue().count("WARNING: "), 1)
            self.assertIn("no pixel above 16", said.getvalue())
            self.assertEqual(loaded[0].images.max(), np.float32(16) / np.float32(255))


class FoldersTest(ConventionsCase):
    def folder(self, *paths):
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(saved(Image.fromarray(colours())))
        return {"name": f"folder:{self.root}", "data_dir": None}

    @parameterized.parameters("__MACOSX", "@eaDir", "lost+found")
    def test_folders_of_programs(self, name):
        """An archive of macOS was refused, "unpack them again", or had a class more."""
        given = self.folder("train/a/1.png", "train/b/1.png", f"train/{name}/._1.png")
        self.says(given, f"not counted as classes in .*: {name}".replace("+", "."))
        self.assertEqual(self.open(given).classes, ("a", "b"))
        flat = self.folder("a/1.png", "b/1.png", f"{name}/1.png")["name"]
        (self.root / "train").rename(self.root / ".train")
        self.assertEqual(data.open_source(flat, "all").classes, ("a", "b"))

    @sweeps.rows(
        (
            ["train/a/1.png", "train/b/1.png", "train/1.png", "train/2.JPG"],
            *("train", "2 images in .*train are outside its class folders and left out"),
        ),
        (
            ["a/1.png", "b/1.png", "a/2.HEIC", "b/2.jfif", "a/3.heic", "a/notes.txt", "a/4.PNG"],
            *("all", "not end in .jpg, .* are left out: 2 .heic, 1 .jfif"),
        ),
        (  # splits under other names are taken for classes
            [f"{split}ing/{name}/1.png" for split in ("train", "test") for name in "ab"],
            *("all", "class folders of .* hold subfolders of images .a, b .2.."),
        ),
        (["images/a/1.png", "images/b/1.png"], "all", "has only one class, images"),
        (["images/a/1.png", "images/b/1.png"], "all", "subfolders of images .a, b .2.."),
        (["train/a/images/1.png", "train/b/images/1.png"], "train", "^$"),  # a habit
    )
    def test_what_is_left_out_or_taken_for_classes(self, paths, split, pattern):
        self.root = Path(self.create_tempdir())
        self.says(self.folder(*paths), pattern, split)
