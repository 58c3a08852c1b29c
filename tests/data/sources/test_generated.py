"""Shards of generated images: read at random where arithmetic says, and refused in a sentence."""

import json
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxrobust import data
from jaxrobust.config import base
from jaxrobust.data.prepare import generated as writer
from jaxrobust.data.source import DataError
from jaxrobust.data.sources import generated
from jaxrobust.data.stream import loading, pipeline
from jaxrobust.training import build
from tests.support import sweeps

ROWS, SIDE = 130, 8


def images_of(count, seed=0, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def prepared(folder, images, labels, *words):
    """Write shards of 50 images, as the command does."""
    path = Path(folder) / "generated.npz"
    np.savez(path, image=images, label=labels)
    out = Path(folder) / "shards"
    given = ["--out", str(out), "--rows", "50", *words]
    writer.prepare(writer.parse([str(path), *given]))
    return out


class PlacesTest(parameterized.TestCase):
    @sweeps.rows((20, 66_000), (196, 1000), (3076, 100), (3112, 60), (20_000, 12), (140_000, 3))
    def test_records_stand_where_array_record_writes_them(self, length, count):
        """Some begin before a block's header and end behind it, or behind several; of those of 20
        bytes, any number of bytes is behind one.
        """
        rows = np.random.default_rng(length).integers(0, 256, (count, length), np.uint8)
        path = f"{self.create_tempdir().full_path}/shard"
        shard = ArrayRecordWriter(path, "group_size:1,uncompressed")
        for row in rows:
            shard.write(row.tobytes())
        shard.close()
        places = generated.RecordPlaces.of(length)
        with open(path, "rb") as file:
            found = [places.read(file.fileno(), row) for row in range(count)]
        self.assertEqual(found, [row.tobytes() for row in rows])


class GeneratedTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.images, self.labels = images_of(ROWS), np.arange(ROWS) % 10
        self.out = prepared(self.folder, self.images, self.labels)
        self.name = f"generated:{self.out}"

    def test_reads_at_random(self):
        source = data.open_source(self.name, "all")
        self.assertEqual((len(source), source.num_classes, source.channels), (ROWS, 10, 3))
        self.assertEqual(source.image_shape, (SIDE, SIDE, 3))
        order = np.random.default_rng(1).permutation(ROWS).tolist()
        for record, row in zip(source.read(order), order, strict=True):
            self.assertEndsWith(record.image, self.images[row].tobytes())
            self.assertEqual((record.label, type(record.label)), (self.labels[row], int))
        again = pickle.loads(pickle.dumps(source))
        self.assertEqual(again.read([129]), source.read([129]))
        self.assertEndsWith(source.describe(129), "generated-all.array_record-00002-of-00003")
        self.assertIn("record 29 of", source.describe(129))

    def test_pixels_of_0_and_1(self):
        folder = Path(self.create_tempdir())
        out = prepared(folder, self.images % 2, self.labels)
        with self.assertRaisesRegex(
            data.DataError, "have only pixel values 0 and 1, although white is 255"
        ):
            data.open_source(f"generated:{out}", "all")

    @absltest.skipUnless(hasattr(os, "posix_fadvise"), "the system takes no announcements")
    def test_several_records_are_announced_before_the_first_is_read(self):
        source, calls = data.open_source(self.name, "all"), []
        announce, pread = os.posix_fadvise, os.pread
        with (
            mock.patch.object(
                os, "posix_fadvise", lambda *args: (calls.append("announced"), announce(*args))
            ),
            mock.patch.object(os, "pread", lambda *args: (calls.append("read"), pread(*args))[1]),
        ):
            found = source.read([129, 3, 57])
            self.assertEqual(calls, ["announced"] * 3 + ["read"] * 3)
            calls.clear()
            source.read([5])
            self.assertEqual(calls, ["read"])
        with mock.patch.object(generated, "_ANNOUNCES", False):
            self.assertEqual(source.read([129, 3, 57]), found)
        with mock.patch.object(os, "posix_fadvise", side_effect=OSError):
            self.assertEqual(source.read([129, 3, 57]), found)

    def test_a_shard_that_is_gone_before_it_is_read(self):
        source = data.open_source(self.name, "all")
        (self.out / generated.file_name(1, 3)).unlink()
        with self.assertRaisesRegex(DataError, "record 7 of .*00001-of-00003 cannot be read .No"):
            source.read([3, 57])

    def test_any_other_program_reads_the_shards(self):
        reader = ArrayRecordReader(str(self.out / generated.file_name(1, 3)))
        self.assertEqual(reader.num_records(), 50)
        wanted = self.images[57].tobytes() + np.int32(7).tobytes()
        self.assertEqual(reader.read([7]), [wanted])
        reader.close()

    def test_is_loaded_as_any_data_set(self):
        for name in (self.name, str(self.out)):
            found = data.load(name, split="all[60:]", preprocessing="none")
            np.testing.assert_array_equal(np.round(255 * found.images), self.images[60:])
            np.testing.assert_array_equal(found.labels, self.labels[60:])

    def test_other_images_are_another_data_set(self):
        one = data.open_source(self.name, "all").files_sha256
        part = data.open_source(self.name, "all[:60]").files_sha256
        other = prepared(self.create_tempdir(), images_of(ROWS, seed=1), self.labels)
        self.assertLen({one, part, data.open_source(str(other), "all").files_sha256}, 3)

    def test_nothing_is_held(self):
        """Of an array as small, each image would be decoded once and kept."""
        source = data.open_source(self.name, "all")
        for held in (False, True):
            read = loading.DecodedImages(
                loading.dataclasses.replace(source, held=held), 2**30, strict=True
            )
            list(read(range(20)))
            self.assertLen(read._kept, 20 * held)

    @parameterized.parameters(
        ("gone", "there is no folder .*; check the path"),
        ("no info", "has no generated.json, which `jaxrobust prepare generated` writes last"),
        (
            "cut info",
            "generated.json is damaged .*; prepare it again: `jaxrobust prepare generated",
        ),
        ("version", "was written by another version of jaxrobust; prepare it again"),
        ("missing", "00001-of-00003 is missing; prepare it again"),
        ("longer", "00001-of-00003 has .* bytes, not .*; prepare it again"),
        ("label", r"record 0 of .* has the label 0, outside the classes 0 to -1; prepare"),
    )
    def test_refuses(self, what, message):
        path, shard = self.out / generated.INFO, self.out / generated.file_name(1, 3)
        known = json.loads(path.read_text())
        if what == "gone":
            self.out.rename(self.folder / "elsewhere")
        elif what == "no info":
            path.unlink()
        elif what == "missing":
            shard.unlink()
        elif what == "longer":
            shard.write_bytes(shard.read_bytes() + b"more")
        else:
            changes = {"version": {"format": 2}, "label": {"classes": 0}, "cut info": {}}[what]
            text = json.dumps(known | changes)
            path.write_text(text[:40] if what == "cut info" else text)
        with self.assertRaisesRegex(DataError, message):
            data.open_source(self.name, "all")

    def test_refuses_what_cannot_be_chosen(self):
        with self.assertRaisesRegex(DataError, r"no split 'train'.*all \(130\)"):
            data.open_source(self.name, "train")
        ids = self.folder / "ids.txt"
        ids.write_text("a/b.png\n")
        with self.assertRaisesRegex(DataError, "cannot be selected by class or id; prepare"):
            data.open_source(self.name, f"all@{ids}")
        with self.assertRaisesRegex(DataError, "must be on a local disk; copy them there"):
            data.open_source("generated:gs://bucket/shards", "all")

    def test_a_shard_that_is_cut_off_while_it_is_read(self):
        source = data.open_source(self.name, "all")
        shard = self.out / generated.file_name(2, 3)
        shard.write_bytes(shard.read_bytes()[:3000])
        with self.assertRaisesRegex(
            DataError, "record 29 of .*00002-of-00003 is truncated; prepare"
        ):
            source.read([129])


class TrainingTest(parameterized.TestCase):
    """A real source of arrays next to shards."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.images = images_of(ROWS)
        np.savez(self.folder / "real.npz", image=images_of(40, seed=2), label=np.arange(40) % 10)
        self.real = data.open_source(f"npz:{self.folder / 'real.npz'}", "all")

    def stream(self, extra, steps, **settings):
        given = {"batch_size": 16, "seed": 3, "augmentation": "crop|flip", "image_size": SIDE}
        made = pipeline.train_batches(self.real, extra=extra, **given | settings)
        batches = [next(made) for _ in range(steps)]
        made.close()
        return batches

    def opened(self, labels, *words):
        return data.open_source(str(prepared(self.folder, self.images, labels, *words)), "all")

    def test_shares_are_exact_and_a_run_goes_on_in_the_same_bits(self):
        """0.7 of 16 rows are 11: 3 epochs of 8 steps of 5 real images, each once in an epoch."""
        extra = self.opened(np.arange(ROWS) % 10)
        share = {"extra_share": 0.7}
        whole = self.stream(extra, 24, augmentation="flip", **share)
        flips = {x.tobytes(): i for i, x in enumerate(images_of(40, seed=2))}
        flips |= {x[:, ::-1].tobytes(): i for i, x in enumerate(images_of(40, seed=2))}
        for epoch in range(3):
            met = []
            for batch in whole[8 * epoch : 8 * epoch + 8]:
                real = [flips.get(image.tobytes()) for image in batch.images]
                self.assertEqual(sum(place is None for place in real), 11)
                met += [place for place in real if place is not None]
            self.assertEqual(sorted(met), list(range(40)))
        later = self.stream(extra, 5, augmentation="flip", start=16 * 13, **share)
        for one, other in zip(whole[13:], later, strict=False):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_are_the_batches_of_the_same_arrays(self):
        extra = self.opened(np.arange(ROWS) % 10)
        array = data.open_source(f"npz:{self.folder / 'generated.npz'}", "all")
        pairs = (self.stream(source, 9) for source in (extra, array))
        for one, other in zip(*pairs, strict=True):
            np.testing.assert_array_equal(one.images, other.images)
            np.testing.assert_array_equal(one.labels, other.labels)

    def test_soft_labels(self):
        """Rows of the real source are one-hot among them; for the evaluation all are hard."""
        soft = np.random.default_rng(4).dirichlet(np.ones(10), ROWS).astype(np.float32)
        extra = self.opened(soft, "--soft")
        self.assertTrue(generated.soft_labels(extra.name))
        known = {row.tobytes() for row in soft} | {row.tobytes() for row in np.eye(10, dtype="f4")}
        met = set()
        for batch in self.stream(extra, 8):
            self.assertEqual((batch.labels.shape, batch.labels.dtype), ((16, 10), np.float32))
            met |= {row.tobytes() for row in batch.labels}
            self.assertEqual((batch.labels.max(axis=1) == 1).sum(), 8)
        self.assertContainsSubset(met, known)
        self.assertContainsSubset({row.tobytes() for row in np.eye(10, dtype="f4")}, met)
        found = data.load(extra.name, split="all", preprocessing="none")
        np.testing.assert_array_equal(found.labels, soft.argmax(1))
        config = base()
        config.data.extra = extra.name
        labels = build.abstract_batch(config, "train").labels
        self.assertEqual((labels.shape, str(labels.dtype)), ((1024, 1000), "float32"))
        config.data.extra = str(self.folder / "nowhere")
        self.assertEqual(build.abstract_batch(config, "train").labels.shape, (1024,))

    def test_refuses_a_share_that_leaves_no_real_image(self):
        extra = self.opened(np.arange(ROWS) % 10)
        message = "extra_share=1.0 leaves no image of .*real.npz.* batch of 16; use at most 0.9375"
        with self.assertRaisesRegex(DataError, message):
            self.stream(extra, 1, extra_share=1.0)

    def test_refuses_shards_of_another_shape(self):
        self.images = images_of(ROWS, side=9)
        with self.assertRaisesRegex(DataError, "shards'.* has 9x9 images, but the augmentation"):
            self.stream(self.opened(np.arange(ROWS) % 10), 1)
        other = prepared(self.create_tempdir(), images_of(60), np.arange(60) % 9, "--classes", "9")
        with self.assertRaisesRegex(DataError, "shards.* has 9 classes, but .*real.* has 10; give"):
            self.stream(data.open_source(str(other), "all"), 1)


class ProbabilitiesTest(parameterized.TestCase):
    @sweeps.rows(
        (0.5, ""), (np.nan, "negative or not finite"), (-0.5, "negative"), (0.75, "sum to 1.25")
    )
    def test_one_number_of_many(self, number, why):
        labels = np.full((3, 2), 0.5, np.float32)
        labels[1, 0] = number
        self.assertRegex(generated.not_probabilities(labels), why or "^$")
