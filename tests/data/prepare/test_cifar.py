"""CIFAR's archives become what TFDS writes of them, record for record; no other archive does."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.commands import prepare
from jaxrobust.data import imagenet
from jaxrobust.data.prepare import cifar, command
from jaxrobust.data.transforms import decoding
from jaxrobust.runtime.files import caches
from tests.support import cifar as made
from tests.support import command_calls, sweeps
from tests.support.paths import NO_SHARED, SHARED
from tests.support.servers import ServedCase

SIZES = {"train": 25, "test": 12}
# Of the ids "train_16399\ntrain_01680\n...", in the order in which tensorflow_datasets 4.9.10 with
# TensorFlow 2.21.0 wrote the 50,000 and the 10,000 records of both data sets.
ORDERS = {
    "train": "2e1d1fbdf7ce802216829441ca3c11040286c55e6dbe455fc904a996516e8c49",
    "test": "f0a30cf847d4f33390560a21d91e59ac61d13ae40748ba8e02cd169900b97830",
}
COPY = SHARED / "data" / "tensorflow_datasets"
FILES = {archive.file: archive for archive in cifar.ARCHIVES}


class CifarCase(parameterized.TestCase):
    """Archives of a few images, which are taken for the official ones."""

    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir())
        self.out = self.root / "out"
        self.enter_context(mock.patch.object(cifar, "SIZES", SIZES))
        cache = {"XDG_CACHE_HOME": str(self.root / "cache")}
        self.enter_context(mock.patch.dict(os.environ, cache))

    def archive(self, file="cifar-10-python.tar.gz", **changes):
        """An archive that counts as official, and what is in it."""
        row = FILES[file]
        images = made.images_of(SIZES, row.dataset)
        files = made.contents(row, images) | changes
        path = made.write(self.root / file, row, {k: v for k, v in files.items() if v is not None})
        self.enter_context(made.official(path, row))
        return path, images

    def run_tool(self, *words, code=0):
        """(stdout, stderr) of the command."""
        argv = [*map(str, words), "--out", str(self.out), "--workers", "1"]
        ended = command_calls.ended(lambda: prepare.main(argv))
        self.assertEqual(ended.code, code, ended.error)
        return ended.out, ended.error

    def refused(self, *words, code=2):
        sentence = self.run_tool(*words, code=code)[1].strip().splitlines()[-1]
        self.assertStartsWith(sentence, "jaxrobust: ")
        self.assertFalse(self.out.exists(), "something was written")
        return sentence


class RecordsTest(CifarCase):
    @parameterized.parameters(*FILES)
    def test_an_archive_becomes_what_tfds_reads(self, file):
        import tensorflow_datasets as tfds

        path, images = self.archive(file)
        name = FILES[file].dataset
        said = json.loads(self.run_tool(name, "--from", path, "--json")[0].splitlines()[-1])
        self.assertEqual(said["written_images"], 37)
        builder = tfds.builder_from_directory(self.out / name / "3.0.2")
        features = builder.info.features
        self.assertEqual((builder.info.name, str(builder.version)), (name, "3.0.2"))
        self.assertEqual(builder.info.supervised_keys, ("image", "label"))
        self.assertEqual(features["image"].shape, (32, 32, 3))
        for key, names in images.classes.items():
            self.assertEqual(features[key].names, list(names))
        for split, size in SIZES.items():
            order = cifar.tfds_order(split, range(size))
            rows = builder.as_data_source(split)
            self.assertLen(rows, size)
            for position, row in zip(order.tolist(), rows, strict=True):
                self.assertEqual(row["id"], f"{split}_{position:05}".encode())
                np.testing.assert_array_equal(row["image"], images.images[split][position])
                for key, labels in images.labels[split].items():
                    self.assertEqual(row[key], labels[position])

    def test_our_reader(self):
        path, images = self.archive("cifar-100-python.tar.gz")
        self.run_tool("cifar100", "--from", path)
        source = data.open_source("cifar100", "test", data_dir=self.out)
        self.assertEqual((source.num_classes, source.image_shape), (100, (32, 32, 3)))
        self.assertEqual(source.classes, images.classes["label"])
        order = cifar.tfds_order("test", range(12))
        self.assertRegex(source.describe(0), rf"^test_{order[0]:05} \(record 0 of ")
        (self.root / "ids").write_text("test_00003\ntest_00001\n")
        chosen = data.open_source("cifar100", f"test@{self.root}/ids", data_dir=self.out)
        expected = images.labels["test"]["label"][[3, 1]].tolist()
        self.assertEqual([record.label for record in chosen], expected)

    @pytest.mark.slow
    def test_robustbench_takes_the_archive_s_order(self):
        with mock.patch.dict(SIZES, {"test": 10_000, "train": 5}):
            path, images = self.archive()
            self.run_tool("cifar10", "--from", path)
        source = data.open_source("cifar10", "test@robustbench", data_dir=self.out)
        self.assertNotEqual(source.ids_sha256, imagenet.ROBUSTBENCH_SHA256)
        np.testing.assert_array_equal(source.labels, images.labels["test"]["label"])
        first = data.load("cifar10", split="test@robustbench", n=20, data_dir=self.out)
        expected = images.images["test"][:20] / np.float32(255)
        np.testing.assert_array_equal(first.images, expected)

    @sweeps.rows(*ORDERS)
    def test_the_order_is_tfds(self, split):
        order = cifar.tfds_order(split, range({"train": 50_000, "test": 10_000}[split]))
        ids = "\n".join(f"{split}_{position:05}" for position in order.tolist())
        self.assertEqual(hashlib.sha256(ids.encode()).hexdigest(), ORDERS[split])

    def test_the_description_says_which_data_it_is_wherever_it_was_made(self):
        """Another zlib writes other PNGs of the same pixels."""
        found, png = set(), cifar.png
        for file, encode in (
            ("cifar-10-python.tar.gz", png),
            ("cifar-10-binary.tar.gz", lambda image: png(image) + b"longer"),
        ):
            self.out = self.root / file[:10] / file
            with mock.patch.object(cifar, "png", encode):
                self.run_tool("cifar10", "--from", self.archive(file)[0])
            found.add(data.open_source("cifar10", "train", data_dir=self.out).files_sha256)
        self.assertLen(found, 1)

    def test_again_and_after_damage(self):
        path, _ = self.archive()
        self.run_tool("cifar10", "--from", path)
        self.assertIn("everything was already there", self.run_tool("cifar10", "--from", path)[0])
        self.assertIn("everything was already there", self.run_tool("cifar10")[0])
        self.assertIn("37 images; all records", self.run_tool("cifar10", "--check")[0])
        (shard,) = (self.out / "cifar10" / "3.0.2").glob("*-train.array_record*")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        said = self.run_tool("cifar10", "--check", code=3)[1]
        self.assertRegex(said, f"{shard.name} .*; remove the damaged files and rerun the command")
        shard.unlink()
        said = self.run_tool("cifar10", "--from", path)[0]
        self.assertIn("wrote 25 images", said)
        self.run_tool("cifar10", "--check")

    def test_what_tfds_wrote_stays(self):
        folder = self.out / "cifar10" / "3.0.2"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
        said = self.run_tool("cifar10", code=2)[1]
        self.assertIn("was written by another tool; use it as it is, or give another --out", said)
        said = self.run_tool("cifar10", "--from", self.archive()[0], code=2)[1]
        self.assertIn("was not written by this tool", said)
        self.assertEqual([path.name for path in folder.iterdir()], ["dataset_info.json"])


class DownloadTest(ServedCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(cifar, "SIZES", SIZES))
        self.enter_context(mock.patch.object(cifar, "ADDRESS", self.server.address))
        row = FILES["cifar-10-python.tar.gz"]
        path = made.write(
            self.folder / row.file, row, made.contents(row, made.images_of(SIZES, "cifar10"))
        )
        self.enter_context(made.official(path, row))
        self.server.files = {f"/{row.file}": path.read_bytes()}
        self.out = self.folder / "out"

    def run_tool(self, code=0):
        ended = command_calls.ended(lambda: prepare.main(["cifar10", "--out", str(self.out)]))
        self.assertEqual(ended.code, code, ended.error)
        return ended.error

    def test_downloaded_once(self):
        self.server.cut_after = [1000]
        self.run_tool()
        self.assertLen(data.open_source("cifar10", "train", data_dir=self.out), 25)
        self.assertLen(self.server.asked, 2)
        self.assertNotEmpty(list(caches.folder("data").glob("*/cifar-10-python.tar.gz")))
        self.out = self.folder / "again"
        self.run_tool()
        self.assertLen(self.server.asked, 2)

    def test_another_file_is_not_kept(self):
        self.server.files["/cifar-10-python.tar.gz"] = b"\x1f\x8b another file"
        self.assertIn("expected", self.run_tool(code=2))
        self.assertEqual(self.left(), [])
        self.assertFalse(self.out.exists())

    def test_forbidden(self):
        self.server.refusals = {"/": (403, "")}
        self.assertRegex(
            self.run_tool(code=2),
            "403 Forbidden: .*browser and give the file, with --from cifar-10-python.tar.gz\n$",
        )

    def test_no_network(self):
        self.server.close()
        said = self.run_tool(code=3)
        self.assertRegex(
            said, "run `curl .*cifar-10-python.tar.gz.*give the file, with --from cifar-10-python"
        )
        self.assertEqual(said.count("jaxrobust: "), 1)
        self.assertFalse(self.out.exists())


class Evil:
    """What a pickle would have called."""

    def __reduce__(self):
        return os.system, ("touch owned",)


class RefusedTest(CifarCase):
    def test_another_data_set_s_archive(self):
        path, _ = self.archive("cifar-100-python.tar.gz")
        self.assertEqual(
            self.refused("cifar10", "--from", path),
            f"jaxrobust: {path} is the archive of cifar100, not of cifar10; run `jaxrobust prepare "
            f"cifar100 --from {path}`",
        )

    def test_no_file(self):
        self.assertRegex(
            self.refused("cifar10", "--from", self.root / "x"),
            "x is not a file, such as cifar-10-pyt",
        )
        self.assertRegex(
            self.refused("cifar10", "--from", self.root), "is a folder; give the archive itself"
        )

    @sweeps.rows(
        (lambda whole: whole[:-1000], r"[\d,]+ bytes of [\d,]+ \(truncated\), sha256 "),
        (lambda whole: b"", "0 bytes, sha256 e3b0c44298fc"),
        (lambda whole: b"<!DOCTYPE html>", "a web page, sha256 "),
        (
            lambda whole: whole[:50] + b"x" + whole[51:],
            r"[\d,]+ bytes, sha256 .* instead of ",
        ),
        (lambda whole: whole + b"x", r"[\d,]+ bytes, sha256 "),
    )
    def test_a_damaged_archive(self, change, why):
        path, _ = self.archive()
        path.write_bytes(change(path.read_bytes()))
        said = self.refused("cifar10", "--from", path)
        self.assertRegex(said, f"is not cifar-10-python.tar.gz: {why}")
        self.assertRegex(said, "remove it and run `jaxrobust prepare cifar10`, which downloads it$")

    @sweeps.rows(
        ({"test_batch": None}, "it does not contain cifar-10-batches-py/test_batch"),
        ({"data_batch_2": made.pickled(
            {"data": np.zeros((0, 3072), np.uint8), "labels": []}
        )}, "its label array is float64"),
        ({"test_batch": made.pickled({"data": np.zeros((12, 3)), "labels": [0] * 12})},
         r"its images are float64\[12, 3\]"),
        ({"test_batch": made.pickled(
            {"data": np.zeros((12, 3072), np.uint8), "labels": [10] * 12}
        )}, "test has label values outside its 10 classes"),
        ({"test_batch": made.pickled(
            {"data": np.zeros((11, 3072), np.uint8), "labels": [1] * 11}
        )}, "it holds {'train': 25, 'test': 11} images"),
        ({"test_batch": made.pickled({"labels": []})}, "KeyError: 'data'"),
        ({"test_batch": made.pickled({"labels": []})[:-5]}, "EOFError"),
        ({"test_batch": made.pickled([1, 2])}, "TypeError"),
        ({"test_batch": pickle.dumps(Evil())}, "asks for posix.system, which is not"),
        ({"batches.meta": pickle.dumps(np.load)}, "asks for numpy.load"),
        ({"batches.meta": b"cnumpy\nndarray\n(I9\ntR."}, "TypeError"),
    )  # fmt: skip
    def test_what_an_archive_must_not_hold(self, changes, why):
        path, _ = self.archive(**changes)
        said = self.refused("cifar10", "--from", path)
        self.assertRegex(said, rf"cifar-10-python.tar.gz is damaged \(.*{why}")
        self.assertRegex(said, r"\); remove it and run `jaxrobust prepare cifar10`, which downl")
        self.assertFalse(Path("owned").exists())

    def test_a_truncated_stream(self):
        row = FILES["cifar-10-python.tar.gz"]
        path, _ = self.archive()
        path.write_bytes(path.read_bytes()[:3000])
        with made.official(path, row):
            self.assertIn("is damaged (EOFError", self.refused("cifar10", "--from", path))

    def test_the_command_line(self):
        for words, why in (
            ((), "prepare needs a data set; choose one of imagenet, cifar10, cifar100"),
            (("mnist",), "prepare does not support 'mnist'; choose one of imagenet, "),
        ):
            ended = command_calls.ended(lambda words=words: prepare.main(list(words)))
            self.assertEqual(ended.code, 2)
            self.assertIn(why, ended.error)
        self.assertIn("--form is not a flag", self.refused("cifar10", "--form", "x"))
        self.assertIn(
            "give either --from, to write", self.refused("cifar10", "--check", "--from", "x")
        )


@absltest.skipUnless(COPY.is_dir(), NO_SHARED)
class CopyTest(parameterized.TestCase):
    """The project's copy of CIFAR-10, whose ids (train_cat_2970) TFDS' own hash ordered."""

    @sweeps.fast("test")
    @parameterized.parameters(*ORDERS)
    def test_its_order_is_tfds_of_its_own_ids(self, split):
        ids = sorted(copy_of(split))
        order = cifar.tfds_order(split, ids)
        self.assertEqual([ids[i] for i in order], list(copy_of(split)))

    @pytest.mark.slow
    def test_prepared_from_an_archive_of_it(self):
        """Labels and pixels equal, bit for bit: what its JPEG changed happened before."""
        found = {split: sorted(copy_of(split).items()) for split in ORDERS}
        pixels = {s: np.stack([decoding.decode(r.image) for _, r in found[s]]) for s in found}
        labels = {s: {"label": np.array([r.label for _, r in found[s]])} for s in found}
        classes = data.open_source("cifar10", "test", data_dir=COPY).classes
        images = cifar.ArchiveContents(pixels, labels, {"label": classes})
        with tempfile.TemporaryDirectory() as holder:
            row = FILES["cifar-10-python.tar.gz"]
            path = made.write(Path(holder) / row.file, row, made.contents(row, images))
            with made.official(path, row), contextlib.redirect_stdout(io.StringIO()):
                cifar.main("cifar10", ["--from", str(path), "--out", holder])
            for split in ORDERS:
                prepared = data.open_source("cifar10", split, data_dir=holder)
                records = prepared.read(range(len(prepared)))
                order = cifar.tfds_order(split, range(len(prepared)))
                self.assertEqual([r.label for r in records], labels[split]["label"][order].tolist())
                decoded = np.stack([decoding.decode(r.image) for r in records])
                np.testing.assert_array_equal(decoded, pixels[split][order])


def copy_of(split):
    """{id: record} of the project's copy, in its order."""
    source = data.open_source("cifar10", split, data_dir=COPY)
    reader = source.read
    names = [reader.name(f).decode() for f in reader.features(range(len(source)))]
    return dict(zip(names, source.read(range(len(source))), strict=True))


class DoneTest(absltest.TestCase):
    def test_a_finished_directory_is_summed_up(self):
        """As it says itself; nothing was written now."""
        folder = Path(self.create_tempdir())
        parts = [("train", ["30", "25"], "700"), ("test", ["9"], "80")]
        splits = [{"name": n, "shardLengths": s, "numBytes": b} for n, s, b in parts]
        info = {"name": "mine", "version": "1.0.0", "splits": splits}
        (folder / command.writer.INFO).write_text(json.dumps(info))
        (folder / "label.labels.txt").write_text("cat\ndog\nowl\n")
        train = {"images": 55, "of": None, "bytes": 700, "shards": 2}
        test = {"images": 9, "of": None, "bytes": 80, "shards": 1}
        about = {"directory": str(folder), "name": "mine", "version": "1.0.0", "classes": 3}
        about |= {"splits": {"train": train, "test": test}, "notes": []}
        self.assertEqual(command.done(folder), about | {"written_images": 0, "written_bytes": 0})

    def test_a_line_every_ten_seconds_in_a_pipe(self):
        """How far it is over all shards, those of before among them, and how fast."""
        every = [mock.Mock(first=0, last=60), mock.Mock(first=60, last=100)]
        events = [command.WorkDone(10, 2_000_000) for _ in range(4)]
        clock, closed = iter([100.0, 104.0, 110.0, 110.5, 120.6]), []

        def work(job, todo, workers):
            self.assertEqual((job, todo, workers), ("job", every[1:], 3))
            try:
                yield from events
            finally:
                closed.append(True)

        with (
            mock.patch.object(command, "work", work),
            mock.patch.object(command.time, "perf_counter", lambda: next(clock)),
            mock.patch.object(command, "say") as say,
            contextlib.redirect_stderr(io.StringIO()) as written,
        ):
            found = list(command.working("job", "writing", every, every[1:], 3))
        self.assertEqual((found, closed), (events, [True]))
        said = [call.args[0] for call in say.call_args_list]
        self.assertLen(said, 2)  # at 10.5 s and at 20.6, and not at just 10
        self.assertRegex(said[0], r"^writing  90% .* 90/100 \[.*1 MB/s")
        self.assertRegex(said[1], r"^writing 100% .* 100/100 \[.*0 MB/s")
        self.assertEqual(written.getvalue(), "")
