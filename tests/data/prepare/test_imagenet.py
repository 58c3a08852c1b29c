"""Tar files and folders become the same records, whatever interrupts; bad sources are refused."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.data.imagenet import synsets
from jaxrobust.data.prepare import command, imagenet, writer
from jaxrobust.data.prepare.imagenet_source import SIZES, validation_synsets
from jaxrobust.data.splits.subsets import Index, read_index
from tests.support import command_calls, four_sources, paths, sweeps

ROOT = paths.ROOT
COMMAND = ("-m", "jaxrobust", "prepare", "imagenet")
SHARD = "*.array_record-*-of-*"


def jpeg(number):
    """A small photograph-like file that is different for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((20 + number % 7, 16)).save(content, "JPEG")
    return content.getvalue()


def tar(entries):
    """A tar file of {name: bytes}."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, body in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def train_images(classes, each):
    """{synset: {file name: bytes}} of the first classes."""
    return {
        synset: {f"{synset}_{i}.JPEG": jpeg(100 * c + i) for i in range(each)}
        for c, synset in enumerate(synsets()[:classes])
    }


def validation_images(numbers):
    """{file name: bytes}."""
    return {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(10**6 + number) for number in numbers}


class PrepareTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.root = Path(holder.name)
        self.out = self.root / "out"

    def run_tool(self, *arguments, code=0, out=None, workers=1):
        """(stdout, stderr) of the tool, in this process unless there are workers."""
        argv = [*map(str, arguments), "--out", str(out or self.out), "--workers", str(workers)]
        ended = command_calls.ended(lambda: imagenet.main(argv))
        self.assertEqual(ended.code, code, ended.error)
        return ended.out, ended.error

    def start(self, *arguments, **how):
        """The tool as a process of its own."""
        command = [sys.executable, *COMMAND, *map(str, arguments)]
        how = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True} | how
        return subprocess.Popen(command, **how)

    def refused(self, pattern, *arguments, code=2):
        _, complained = self.run_tool(*arguments, code=code)
        sentence = complained.strip().splitlines()[-1]
        self.assertStartsWith(sentence, "jaxrobust: ")
        self.assertRegex(sentence, pattern)

    def tars(self, train=None, validation=None):
        """A folder with the official files."""
        folder = self.root / "tars"
        folder.mkdir(exist_ok=True)
        if train is not None:
            inner = {f"{synset}.tar": tar(images) for synset, images in train.items()}
            (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
        if validation is not None:
            (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))
        return folder

    def folder(self, splits, name="folder"):
        """An ImageFolder of {split: {class: {name: bytes}}}."""
        for split, classes in splits.items():
            for label, images in classes.items():
                path = self.root / name / split / label
                path.mkdir(parents=True)
                for file, body in images.items():
                    (path / file).parent.mkdir(exist_ok=True)
                    (path / file).write_bytes(body)
        return self.root / name

    def contents(self, out=None):
        """{file name: bytes} of the one data set in `out`, but not where it came from."""
        (info,) = (out or self.out).glob("*/*/dataset_info.json")
        files = {path.name: path.read_bytes() for path in info.parent.iterdir()}
        del files["jaxrobust-prepare.json"]
        return files

    def assert_holds(self, name, split, expected, out=None):
        """The records of a split are {file name: (label, bytes)}."""
        import tensorflow_datasets as tfds

        source = data.open_source(name, split, data_dir=out or self.out)
        (info,) = (out or self.out).glob(f"{name}/*/dataset_info.json")
        raw = tfds.builder_from_directory(info.parent).as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        self.assertLen(source, len(expected))
        self.assertLen(raw, len(expected))
        with np.load(info.parent / f"jaxrobust-index-{split}.npz") as index:
            labels, names = index["labels"], index["names"]
        self.assertEqual((labels.dtype, names.dtype.kind), (np.int32, "S"))
        for i, row in enumerate(raw):
            key = row["file_name"].decode() if isinstance(row["file_name"], bytes) else None
            label, image = expected[key]
            self.assertEqual((row["label"], row["image"]), (label, image))
            self.assertEqual(tuple(source[i]), (image, label))
            self.assertEqual((labels[i], names[i]), (label, key.encode()))
        self.assertSameElements(names.tolist(), [key.encode() for key in expected])


class RecordsTest(PrepareTest):
    def test_tar_files_become_what_tfds_reads(self):
        train, validation = train_images(3, 5), validation_images([1, 7, 50_000])
        source = self.tars(train, validation)
        said, _ = self.run_tool(source, "--allow-partial", "--shards", 4, 2, "--json")
        labels = {synset: label for label, synset in enumerate(synsets())}
        expected = {
            name: (labels[synset], body)
            for synset, images in train.items()
            for name, body in images.items()
        }
        self.assert_holds("imagenet2012", "train", expected)
        numbers = (int(name[15:23]) for name in validation)
        right = [labels[validation_synsets()[number - 1]] for number in numbers]
        expected = dict(zip(validation, zip(right, validation.values(), strict=True), strict=True))
        self.assert_holds("imagenet2012", "validation", expected)
        self.assertIn("15 images of ImageNet's 1,281,167", said)
        self.assertIn("3 images of ImageNet's 50,000", said)
        done = json.loads(said.splitlines()[-1])
        self.assertEqual(done["splits"]["train"]["images"], 15)
        self.assertEqual(done["written_images"], 18)
        self.assertEqual(
            done["written_bytes"],
            sum(len(b) for i in (*train.values(), validation) for b in i.values()),
        )
        self.assertLen(list(self.out.glob(f"imagenet2012/5.1.0/*-train{SHARD}")), 4)

    def test_tfds_decodes_the_images(self):
        import tensorflow_datasets as tfds

        train = train_images(2, 2)
        self.run_tool(self.tars(train), "--allow-partial")
        builder = tfds.builder_from_directory(self.out / "imagenet2012" / "5.1.0")
        self.assertEqual(builder.info.features["label"].names, list(synsets()))
        self.assertEqual(builder.info.features["label"].num_classes, 1000)
        self.assertEqual(builder.info.supervised_keys, ("image", "label"))
        for row in builder.as_data_source("train"):
            name = row["file_name"].decode()
            with Image.open(io.BytesIO(train[name[:9]][name])) as image:
                # One step of the inverse DCT's rounding between Pillow's and TFDS' libjpeg.
                np.testing.assert_allclose(row["image"].astype(int), np.asarray(image), atol=1)

    def test_the_whole_imagenet_needs_no_flags(self):
        train = train_images(1000, 1)
        first = {synset: i + 1 for i, synset in reversed(list(enumerate(validation_synsets())))}
        source = self.tars(train, validation_images(first.values()))
        with (
            mock.patch.dict(SIZES, {"train": 1000, "validation": 1000}),
            mock.patch.dict(imagenet._SHARDS, {"train": 8, "validation": 3}),
        ):
            said, _ = self.run_tool(source)
        self.assertRegex(said, "train: 1,000 images, as many as ImageNet has;.* in 8 shards")
        self.assertRegex(said, "validation: 1,000 images, as many as ImageNet has;.* in 3 shards")

    def test_a_folder_and_kaggles_flat_one_give_the_same_bytes_as_the_tar_files(self):
        train, validation = train_images(3, 4), validation_images([5, 6])
        flags = ("--allow-partial", "--shards", 2, 1)
        self.run_tool(self.tars(train, validation), *flags)
        synset = lambda name: validation_synsets()[int(name[15:23]) - 1]  # noqa: E731
        folders = {}
        for name, body in validation.items():
            folders.setdefault(synset(name), {})[name] = body
        self.run_tool(self.folder({"train": train, "val": folders}), *flags, out=self.root / "b")
        flat = self.folder({"train": train, "val": {".": validation}}, "flat")
        (flat / "val" / "Thumbs.db").touch()
        self.run_tool(flat, *flags, out=self.root / "c")
        for out in ("b", "c"):
            found = {k: v for k, v in self.contents(self.root / out).items() if SHARD[1:5] in k}
            self.assertNotEmpty(found)
            for name, body in found.items():
                self.assertEqual(body, self.contents()[name], name)

    def test_a_folder_of_other_classes(self):
        splits = {
            "train": {"dog": {"1.jpg": jpeg(1), "deep/2.JPG": jpeg(2)}, "cat": {"1.jpg": jpeg(3)}},
            "validation": {"dog": {"9.jpg": jpeg(4), ".DS_Store": b"x"}, "cat": {"a.txt": b"x"}},
        }
        source = self.folder(splits)
        (source / "validation" / "cat" / "é.jpeg").write_bytes(jpeg(5))
        said, _ = self.run_tool(source, "--name", "pets")
        self.assertIn("left out: 1 hidden files", said)
        self.assertIn("left out: 1 files without an image extension", said)
        self.assert_holds("pets", "validation", {"9.jpg": (1, jpeg(4)), "é.jpeg": (0, jpeg(5))})
        for split, size in {"val": 2, "val[:1]": 1, "validation[1:]": 1}.items():  # either name
            self.assertLen(data.open_source("pets", split, data_dir=self.out), size)
        read = data.open_source("pets", "train", data_dir=self.out)
        found = {(record.image, record.label) for record in map(read.__getitem__, range(3))}
        self.assertEqual(found, {(jpeg(1), 1), (jpeg(2), 1), (jpeg(3), 0)})
        self.assertTrue((self.out / "pets" / "1.0.0" / "label.labels.txt").exists())

    @parameterized.parameters(1, 3)
    def test_images_of_one_size_are_read_as_the_folder_is(self, channels):
        """They were resized in evaluation, and gray ones had three channels."""
        draw = np.random.default_rng(0).integers(0, 256, (9, 8, 8, channels), np.uint8)
        files = [four_sources.png(image) for image in draw]
        of = lambda numbers: {f"{number}.png": files[number] for number in numbers}  # noqa: E731
        splits = {"train": {"a": of((0, 1)), "b": of((2,)), "c": of((3,))}}
        splits |= {"val": {c: of((at,)) for at, c in enumerate("abc", 4)}}
        splits |= {"test": {"b": of((7,)), "c": of((8,))}}
        source = self.folder(splits)
        said, _ = self.run_tool(source, "--name", "shapes", "--allow-partial")
        self.assertIn("test: 2 images", said)
        for split in ("train", "val", "test"):
            folder = data.load(f"folder:{source}", split=split)
            prepared = data.load("shapes", split=split, data_dir=self.out)
            self.assertEqual(prepared.images.shape, (len(folder.labels), 8, 8, channels))
            same = lambda one: sorted(zip(one.labels, one.images.tolist(), strict=True))  # noqa: E731
            self.assertEqual(same(prepared), same(folder))

    def test_classes_are_in_the_order_of_their_bytes(self):
        """As ImageFolder sorts them: capital letters come first, so that labels agree with it."""
        names = ("Zebra", "ant", "Bee", "_wasp")
        images = {name: {"1.jpg": jpeg(at)} for at, name in enumerate(names)}
        self.run_tool(self.folder({"train": images}), "--name", "insects", "--allow-partial")
        read = data.open_source("insects", "train", data_dir=self.out)
        self.assertEqual(read.classes, ("Bee", "Zebra", "_wasp", "ant"))
        found = {(record.image, record.label) for record in map(read.__getitem__, range(4))}
        self.assertEqual(found, {(jpeg(2), 0), (jpeg(0), 1), (jpeg(3), 2), (jpeg(1), 3)})

    def test_the_order_is_fixed(self):
        rows = np.array(
            [(f"{name}.JPEG".encode(), label) for name in "abc" for label in (0, 1)],
            [("name", "S6"), ("label", "i4")],
        )
        keys = [b"x/a.JPEG", b"y/a.JPEG", b"x/b.JPEG", b"y/b.JPEG", b"x/c.JPEG", b"y/c.JPEG"]
        digests = [hashlib.sha256(b"jaxrobust/prepare_imagenet/1/" + key).digest() for key in keys]
        self.assertEqual(np.argsort(digests).tolist(), [1, 2, 4, 0, 3, 5])
        self.assertEqual(imagenet.order(rows, ("x", "y")).tolist(), [1, 2, 4, 0, 3, 5])

    def test_one_split_alone(self):
        source = self.tars(None, validation_images([1, 2]))
        said, _ = self.run_tool(source / "ILSVRC2012_img_val.tar", "--allow-partial")
        self.assertIn("has no train split", said)


class InterruptedTest(PrepareTest):
    def test_killed_in_the_middle_of_a_shard(self):
        source = self.tars(train_images(4, 25))
        flags = (source, "--allow-partial", "--shards", 5, 1)
        self.run_tool(*flags, out=self.root / "whole")
        program = (
            "import os, signal, sys; from jaxrobust.data.prepare import imagenet, writer; "
            "example = writer.example; calls = []\n"
            "def dies(*row):\n"
            "    calls.append(row)\n"
            "    return os.kill(os.getpid(), 9) if len(calls) == 47 else example(*row)\n"
            "writer.example = dies; imagenet.main(sys.argv[1:])"
        )
        killed = subprocess.run(
            [sys.executable, "-c", program, *map(str, flags), "--out", self.out, "--workers", "1"],
            cwd=ROOT,
            capture_output=True,
        )
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        directory = self.out / "imagenet2012" / "5.1.0"
        self.assertLen(list(directory.glob("*-of-00005")), 2)
        self.assertNotEmpty(list(directory.glob("*.partial")))
        with self.assertRaises(data.DataError):  # nobody takes it for a data set
            data.open_source("imagenet2012", "train", data_dir=self.out)
        self.refused("is incomplete; rerun", "--check")
        (directory / "SHA256SUMS").write_text("")  # as if killed before the lines were written
        said, complained = self.run_tool(*flags)
        self.assertIn("writing 3 of 5 shards", complained)
        self.assertIn("wrote 60 images", said)
        self.assertEqual(self.contents(), self.contents(self.root / "whole"))
        self.assertIn("everything was already there", self.run_tool(*flags)[0])
        self.assertEqual(self.contents(), self.contents(self.root / "whole"))

    @parameterized.parameters(signal.SIGKILL, signal.SIGINT)
    @pytest.mark.slow
    def test_several_processes(self, number):
        source = self.tars(train_images(10, 60))
        flags = (source, "--allow-partial", "--shards", 600, 1)
        self.run_tool(*flags, out=self.root / "whole")
        flags += ("--out", self.out, "--workers", 2)
        # A background job of a shell ignores Ctrl-C, and so does what it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        process = self.start(*flags, start_new_session=True)
        directory = self.out / "imagenet2012" / "5.1.0"
        while len(list(directory.glob("*-of-00600"))) < 5:
            self.assertIsNone(process.poll())
            time.sleep(0.002)
        if number == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, complained = process.communicate()
        self.assertFalse((directory / "dataset_info.json").exists(), complained)
        if number == signal.SIGINT:
            self.assertEqual(process.returncode, 130)
            self.assertRegex(
                complained, r"\njaxrobust: interrupted; run the same command to continue\n$"
            )
            self.assertEmpty(list(directory.glob("*.partial")))
        done = len(list(directory.glob("*-of-00600")))
        self.assertBetween(done, 5, 599)
        again = self.start(*flags)
        _, complained = again.communicate()
        self.assertEqual(again.returncode, 0, complained)
        self.assertNotIn("writing 600 of 600", complained)
        self.assertEqual(self.contents(), self.contents(self.root / "whole"))

    @pytest.mark.slow
    def test_a_full_disk_while_writing(self):
        source = self.tars(train_images(2, 40))
        flags = [str(source), "--allow-partial", "--shards", "2", "1"]
        arguments = [*flags, "--out", str(self.out), "--workers", "2"]
        done = subprocess.run(
            [
                "bash",
                "-c",
                'ulimit -f 8; exec "$@"',
                "-",
                sys.executable,
                "-B",
                *COMMAND,
                *arguments,
            ],
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertRegex(
            done.stderr.splitlines()[-1],
            "jaxrobust: .*File too large.*run the same command to continue",
        )
        self.assertEmpty(list(self.out.glob("*/*/*.partial")))
        self.run_tool(*flags)
        self.run_tool("--check", workers=2)

    def test_a_full_disk_is_seen_before(self):
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100, 100)
        with mock.patch("shutil.disk_usage", return_value=usage):
            self.refused(
                r"GB must be written, .* GB are free in .*run the same command to continue",
                self.tars(train_images(2, 4)),
                "--allow-partial",
                code=3,
            )

    def test_another_source_or_other_options_are_refused(self):
        source = self.tars(train_images(2, 5))
        self.run_tool(source, "--allow-partial", "--shards", 2, 1)
        self.refused("started with other --shards: train 2", source, "--allow-partial")
        self.tars(train_images(2, 6))
        self.refused(
            r"started from another source \(.*; images: train 10\); give another --out",
            source,
            *("--allow-partial", "--shards", 2, 1),
        )

    def test_two_at_once_are_refused(self):
        import fcntl

        source = self.tars(train_images(2, 2))
        self.run_tool(source, "--allow-partial")
        with (self.out / "imagenet2012/5.1.0/jaxrobust-prepare.json").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.refused("another process is writing", source, "--allow-partial")

    def test_another_ones_directory_is_refused(self):
        (self.out / "imagenet2012" / "5.1.0").mkdir(parents=True)
        (self.out / "imagenet2012" / "5.1.0" / "features.json").write_text("{}")
        source = self.tars(train_images(2, 2))
        self.refused("was not written by this tool", source, "--allow-partial")


class CheckTest(PrepareTest):
    def setUp(self):
        super().setUp()
        self.source = self.tars(train_images(4, 10), validation_images([1, 2, 3]))
        self.flags = (self.source, "--allow-partial", "--shards", 4, 1)
        self.run_tool(*self.flags)
        self.directory = self.out / "imagenet2012" / "5.1.0"
        self.shard = self.directory / "imagenet2012-train.array_record-00002-of-00004"

    def test_all_is_well(self):
        said, _ = self.run_tool("--check", "--json")
        self.assertEqual(json.loads(said.splitlines()[-1])["images"], 43)
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=self.directory, check=True)
        listed = set(writer.read_sums(self.directory))
        self.assertEqual(listed | {"SHA256SUMS"}, set(self.contents()))

    def test_a_flipped_byte_and_a_cut_shard(self):
        content = bytearray(self.shard.read_bytes())
        content[content.index(b"\xff\xd8") + 200] ^= 1
        self.shard.write_bytes(content)
        self.refused(f"{self.shard.name} .*remove the damaged files", "--check", code=3)
        self.shard.unlink()
        self.refused(f"{self.shard.name} is missing", "--check", code=3)
        for cut in (False, True):
            if cut:
                self.shard.write_bytes(self.shard.read_bytes()[:-5000])
                self.refused(self.shard.name, "--check", code=3)
            _, complained = self.run_tool(*self.flags)
            self.assertIn("writing 1 of 5 shards", complained)
            self.run_tool("--check")

    def test_shards_that_changed_places(self):
        other = self.shard.with_name(self.shard.name.replace("00002-", "00001-"))
        content = self.shard.read_bytes()
        self.shard.write_bytes(other.read_bytes())
        other.write_bytes(content)
        self.refused(r"record \d+ differs from the index \(and 1 more\)", "--check", code=3)

    def test_other_labels_than_those_of_the_index(self):
        def shifted(*where):
            labels, names = read_index(*where)
            return Index(labels + 1, names)

        command._index.cache_clear()
        with mock.patch.object(command, "read_index", shifted):
            self.refused(r"record \d+ differs from the index", "--check", code=3)

    def test_a_changed_index(self):
        (self.directory / "jaxrobust-index-train.npz").write_bytes(b"x")
        self.refused("jaxrobust-index-train.npz is missing or has changed", "--check", code=3)

    def test_nothing_there(self):
        with tempfile.TemporaryDirectory() as empty:
            _, complained = self.run_tool("--check", out=empty, code=2)
        self.assertIn("holds no data set written by", complained)


class BegunTest(parameterized.TestCase):
    """What is begun continues from the same source alone."""

    def plan(self, names=(b"a", b"b"), labels=(0, 1), sizes=(7, 9), classes=("x", "y")):
        columns = [("name", "S1"), ("label", np.int32), ("size", np.int64)]
        rows = np.array(list(zip(names, labels, sizes, strict=True)), columns)
        about = writer.About("mine", "1.0.0", "", "", {"label": classes}, ())
        splits = {"train": writer.RawSplit(Path("from"), rows)}
        return writer.DatasetPlan(self.folder / "set", about, splits, {"train": 1}, "as it comes")

    @sweeps.rows(
        {"names": (b"a", b"c")},
        {"labels": (1, 0)},
        {"sizes": (9, 7)},
        {"classes": ("x", "z")},
    )
    def test_another_source(self, **changes):
        self.folder = Path(self.create_tempdir())
        for _ in range(2):  # begun, and continued with
            with writer.claimed_for(self.plan()):
                pass
        with (
            self.assertRaisesRegex(ValueError, r"started from another source \(from; images: tr"),
            writer.claimed_for(self.plan(**changes)),
        ):
            pass


class RefusedTest(PrepareTest):
    def test_an_incomplete_imagenet(self):
        source = self.tars(train_images(999, 1))
        self.refused(
            r"no images of 1 of ImageNet's 1,000 classes \(n15075141\); give --allow_partial",
            source,
        )
        source = self.tars(train_images(1000, 1))
        self.refused(
            "train has 1,000 images, but ImageNet's has 1,281,167; give --allow_partial", source
        )

    def test_too_few_validation_images(self):
        first = {synset: i + 1 for i, synset in reversed(list(enumerate(validation_synsets())))}
        source = self.tars(None, validation_images(first.values()))
        self.refused("validation has 1,000 images, but ImageNet's has 50,000", source)

    @sweeps.rows(
        (b"\x1f\x8b", r"compressed \(gzip\); decompress it first"),
        (b"\xfd7zXZ\0", r"compressed \(xz\)"),
        (b"<!DOCTYPE html>", "a web page"),
        (bytes(range(256)) * 8, "is not a tar file"),
        (b"", "is truncated or damaged"),
        (tar({"a.txt": b"hello"}), "begins with 'a.txt': it is neither"),
        (tar({"n01440764.tar": b"\x1f\x8b" + bytes(900)}), "n01440764.tar is compressed"),
        (tar({"n01440764.tar": tar({}), "n00000001.tar": b""}), "n00000001.tar is not"),
        (
            tar({"n01440764.tar": tar({"n01443537_1.JPEG": b"x"})}),
            "n01443537_1.JPEG belongs to class n01443537, not n01440764",
        ),
        (
            tar({"n01440764.tar": tar({"n01440764_1.JPEG": b""})}),
            "n01440764_1.JPEG is empty; copy it again",
        ),
        (tar({"ILSVRC2012_val_00050001.JPEG": b"x"}), "00050001.JPEG is not the name"),
    )
    def test_a_tar_file(self, content, pattern):
        path = self.root / "a.tar"
        path.write_bytes(content)
        self.refused(pattern, path, "--allow-partial")

    def test_a_truncated_tar_file_wherever_it_ends(self):
        path = self.tars(train_images(2, 3)) / "ILSVRC2012_img_train.tar"
        whole = path.read_bytes()
        used = len(whole.rstrip(b"\0"))
        for size in (300, 512, 700, 2000, used // 2, used // 2 + 512, used):
            path.write_bytes(whole[:size])
            self.refused("is truncated or damaged|n.*tar is trunc", path, "--allow-partial")

    def test_a_damaged_inner_tar_file(self):
        inner = bytearray(tar({"n01440764_1.JPEG": jpeg(1), "n01440764_2.JPEG": jpeg(2)}))
        inner[inner.index(b"n01440764_2") + 3] ^= 1  # the second header's checksum is wrong now
        path = self.root / "train.tar"
        path.write_bytes(tar({"n01440764.tar": bytes(inner)}))
        self.refused("train.tar: n01440764.tar is truncated or damaged", path, "--allow-partial")

    def test_two_of_the_same(self):
        path = self.tars(train_images(1, 1)) / "ILSVRC2012_img_train.tar"
        self.refused("both hold the train split", path, path, "--allow-partial")
        twice = self.root / "twice.tar"
        inner = tar({"n01440764_1.JPEG": b"x"})
        twice.write_bytes(tar({"n01440764.tar": inner, "./n01440764.tar": inner}))
        self.refused("holds n01440764_1.JPEG twice", twice, "--allow-partial")

    @sweeps.rows(
        ({"train": {"cat": {"1.jpg": b"x"}}}, (), "none of ImageNet's.*--name NAME"),
        (
            {"train": {"n01440764": {"1.jpg": b"x"}}},
            (),
            "no folder for 999 .*n01443537.* to keep ImageNet's labels, or give --name NAME",
        ),
        (
            {"train": {"n01440764": {"1.jpg": b"x"}, "cat": {"1.jpg": b"x"}}},
            ("--allow-partial",),
            r"1 of ImageNet's 1,000 classes and 1 others \(cat\)",
        ),
        (
            {"train": {"cat": {"1.jpg": b"x"}}, "val": {"dog": {"1.jpg": b"x"}}},
            ("--name", "pets"),
            "train has no folder for the class 'dog'",
        ),
        (
            {
                "train": {"cat": {"1.jpg": b"x"}, "dog": {"1.jpg": b"x"}},
                "val": {"dog": {"1.jpg": b"x"}},
            },
            ("--name", "pets"),
            "validation has no folder for the class 'cat'",
        ),
        (
            {"train": {"cat": {"1.jpg": b"x"}}, "test": {"dog": {"1.jpg": b"x"}}},
            ("--name", "pets"),
            "train has no folder for the class 'dog' of test",
        ),
        (
            {"train": {"cat": {"1.jpg": b"x"}, "dog": {"1.txt": b"x"}}},
            ("--name", "pets"),
            "dog holds no image",
        ),
        ({"train": {"cat": {"1.jpg": b""}}}, ("--name", "pets"), "cat/1.jpg is empty"),
        (
            {"val": {"cat": {"1.jpg": b"x"}}, "validation": {"cat": {"1.jpg": b"x"}}},
            ("--name", "pets"),
            "holds both val/ and validation/",
        ),
        ({"other": {"cat": {"1.jpg": b"x"}}}, (), "holds neither the official tar"),
        ({"train": {".": {"1.jpg": b"x"}}}, ("--name", "pets"), "has no class folders"),
        (
            {"val": {"n01440764": {"ILSVRC2012_val_00000001.JPEG": b"x"}}},
            ("--allow-partial",),
            "00000001.JPEG belongs to class n01751748, not n01440764",
        ),
        ({"train": {"cat": {"1.jpg": b"x"}}}, ("--name", "My-Pets"), "lowercase letters"),
        ({"train": {"cat": {"1.jpg": b"x"}}}, ("--name", "digits"), "not digits or fake"),
        (
            {"train": {"cat": {"1.jpg": b"x"}}},
            ("--name", "pets", "--shards", "2", "1"),
            "can't split 1 train images into 2",
        ),
    )
    def test_a_folder(self, splits, flags, pattern):
        name = f"folder{len(list(self.root.iterdir()))}"
        self.refused(pattern, self.folder(splits, name), *flags)

    def test_a_folder_that_changes(self):
        source = self.folder({"train": {"cat": {"1.jpg": jpeg(1)}}})
        work = command.work

        def change(*arguments):
            (source / "train" / "cat" / "1.jpg").write_bytes(b"x")
            return work(*arguments)

        with mock.patch.object(command, "work", change):
            self.refused("1.jpg has changed", source, "--name", "pets")

    def test_the_command_line(self):
        for arguments, pattern in (
            ((), "give either a SOURCE or --check"),
            (("x", "--check"), "give either a SOURCE or --check"),
        ):
            self.assertRegex(self.run_tool(*arguments, code=2)[1], pattern)
        self.refused("no such file or folder", self.root / "x")
        self.refused("not a local path", "gs://bucket/x")
        self.assertIn("at least 1", self.run_tool(self.root, workers=0, code=2)[1])
        _, complained = self.run_tool(self.root, out="gs://bucket/x", code=2)
        self.assertIn("gcloud storage cp -r", complained)
        (self.root / "file").write_text("")
        source = self.tars(train_images(1, 1))
        _, complained = self.run_tool(source, "--allow-partial", out=self.root / "file", code=2)
        self.assertIn("is not a folder", complained)
