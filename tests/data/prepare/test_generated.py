"""Files of generated images become shards: streamed, continued, checked, refused in a sentence."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.commands import prepare
from jaxrobust.data.prepare import generated, writer
from tests.support import command_calls, sweeps


class GeneratedCommandTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.images = np.random.default_rng(0).integers(0, 256, (130, 8, 8, 3), np.uint8)
        self.labels = np.arange(130) % 10
        self.enter_context(mock.patch.object(generated, "_BLOCK", 32))

    def write(self, name, rows=slice(None), save=np.savez, **changes):
        arrays = {"image": self.images[rows], "label": self.labels[rows]} | changes
        save(self.folder / name, **arrays)
        return self.folder / name

    def run_on(self, *files, out="shards", code=0, words=()):
        """What the command prints."""
        given = [*map(str, files), "--out", str(self.folder / out), "--rows", "50", *words]
        ended = command_calls.ended(lambda: prepare.main(["generated", *given]))
        self.assertEqual(ended.code, code, ended.error)
        return ended.out + ended.error

    def sums(self, out="shards"):
        return sorted((self.folder / out / "SHA256SUMS").read_text().splitlines())

    def test_several_files_are_one_data_set(self):
        """Shards begin in one file and end in another, of which one is compressed."""
        first = self.write("a.npz", slice(60), label=self.labels[:60, None].astype(np.uint8))
        second = self.write("b.npz", slice(60, None), save=np.savez_compressed)
        printed = self.run_on(first, second, words=["--json"])
        self.assertIn(f"--config.data.extra=generated:{self.folder / 'shards'}", printed)
        about = json.loads(printed.strip().splitlines()[-1])
        self.assertEqual((about["images"], about["written_images"]), (130, 130))
        found = data.load(f"generated:{self.folder / 'shards'}", split="all", preprocessing="none")
        np.testing.assert_array_equal(np.round(255 * found.images), self.images)
        np.testing.assert_array_equal(found.labels, self.labels)
        self.assertIn("130 images; all records", self.run_on(first, words=["--check"]))
        self.assertIn("all were already there", self.run_on(first, second))

    @parameterized.parameters(0, 1, 2)
    def test_continues_where_it_was_stopped(self, stopped):
        """In any shard: what is whole is not written again, and all is as if never stopped."""
        files = self.write("a.npz", slice(60)), self.write("b.npz", slice(60, None))
        self.run_on(*files, out="whole")
        count, writing = [], writer.writing

        @contextlib.contextmanager
        def interrupted(path, rows):
            with writing(path, rows) as add:
                count.append(path)
                if len(count) == stopped + 1:
                    raise KeyboardInterrupt
                yield add

        with mock.patch.object(writer, "writing", interrupted):
            said = self.run_on(*files, code=130)
        self.assertIn("interrupted; run the same command to continue", said)
        out = self.folder / "shards"
        self.assertEmpty([p for p in out.iterdir() if writer.PARTIAL in p.name])
        with self.assertRaisesRegex(data.DataError, "repeat that command"):
            data.open_source(f"generated:{out}", "all")
        printed = self.run_on(*files, words=["--json"])
        about = json.loads(printed.strip().splitlines()[-1])
        self.assertEqual(about["written_images"], 130 - 50 * stopped)
        self.assertEqual(self.sums(), self.sums("whole"))

    def test_files_whose_images_are_written_are_not_read_again(self):
        files = self.write("a.npz", slice(60)), self.write("b.npz", slice(60, None))
        self.run_on(*files)
        (self.folder / "shards" / generated.file_name(2, 3)).unlink()
        with mock.patch.object(generated, "blocks", wraps=generated.blocks) as read:
            self.run_on(*files)
        self.assertEqual([call.args[0].path.name for call in read.call_args_list], ["b.npz"])
        self.assertIn("all records", self.run_on(*files, words=["--check"]))

    def test_check_finds_what_has_changed(self):
        file = self.write("a.npz")
        self.run_on(file)
        shard = self.folder / "shards" / generated.file_name(1, 3)
        content = bytearray(shard.read_bytes())
        content[5000] ^= 1
        shard.write_bytes(content)
        said = self.run_on(file, words=["--check"], code=2)
        changed = "00001-of-00003 has changed since it was written .*; remove it and repeat"
        self.assertRegex(said, changed)
        shard.unlink()
        self.run_on(file)
        self.assertIn("all records", self.run_on(file, words=["--check"]))

    @sweeps.rows(
        ({"image": np.zeros((130, 8, 8, 3), np.float32)}, r"float32\[130, 8, 8, 3\], not uint8"),
        ({"image": np.zeros((130, 3, 8, 8), np.uint8)}, r"write image.transpose\(0, 2, 3, 1\)"),
        (
            {"label": np.zeros(129, int)},
            r"label is int64\[129\], not one integer for each of the 130 images; write class",
        ),
        ({"label": np.zeros((130, 10), "f4")}, "or give --soft for probabilities"),
        (
            {"label": np.full(130, 10)},
            "labels go from 10 to 10, outside 0 to 9; remove the images",
        ),
        ({"label": np.full(130, -1)}, "labels go from -1 to -1, outside 0 to 9"),
        ({"image": np.asfortranarray(np.zeros((130, 8, 8, 3), np.uint8))}, "in Fortran order"),
    )
    def test_refuses_arrays(self, changes, message):
        self.folder = Path(self.create_tempdir())
        self.assertRegex(self.run_on(self.write("a.npz", **changes), code=2), message)

    @sweeps.rows(
        (np.zeros(130, int), r"label is int64\[130\], not floats\[130, 10\], .*; leave --soft out"),
        (np.zeros((130, 9), "f4"), "set --classes, or change the labels"),
        (np.full((130, 10), 0.2, "f4"), "images 0 to 31 sum to 2 instead of 1; write class"),
        (np.full((130, 10), np.nan, "f4"), "are negative or not finite; write class probabilities"),
    )
    def test_refuses_soft_labels(self, labels, message):
        self.folder = Path(self.create_tempdir())
        file = self.write("a.npz", label=labels)
        self.assertRegex(self.run_on(file, words=["--soft"], code=2), message)

    def test_refuses_a_file_that_is_cut_off_or_damaged(self):
        file = self.write("a.npz")
        whole = file.read_bytes()
        file.write_bytes(whole[:9000])
        said = self.run_on(file, code=2)
        self.assertRegex(said, r"a.npz is damaged, or not a .npz file \(.*\); copy the file again")
        flipped = bytearray(whole)
        flipped[9000] ^= 1
        file.write_bytes(flipped)
        self.assertRegex(self.run_on(file, code=2), r"is damaged, .*Bad CRC.*; copy the file again")
        self.assertFalse((self.folder / "shards" / generated.INFO).exists())

    def test_refuses_files_that_do_not_fit(self):
        one, two = self.write("a.npz"), self.write("b.npz", image=np.zeros((130, 9, 9, 3), "u1"))
        said = self.run_on(one, two, code=2)
        self.assertRegex(said, "b.npz has 9x9x3 images, but .*a.npz has 8x8x3 images; prepare each")
        self.assertRegex(self.run_on(one, one, code=2), "a file is given twice")
        np.savez(self.folder / "d.npz", pixels=self.images)
        self.assertRegex(self.run_on(self.folder / "d.npz", code=2), "d.npz holds pixels; write it")
        self.assertRegex(self.run_on(self.folder / "e.npz", code=2), "e.npz does not exist; check")

    def test_refuses_a_folder_of_something_else(self):
        one, two = self.write("a.npz"), self.write("b.npz", slice(90))
        self.run_on(one)
        said = self.run_on(two, code=2)
        self.assertRegex(said, "was started with other files, --classes, --soft or --rows; repeat")
        (self.folder / "full").mkdir()
        (self.folder / "full" / "notes.txt").write_text("mine")
        said = self.run_on(one, out="full", code=2)
        self.assertRegex(said, "full was not written by this tool; give another --out")
        said = self.run_on(one, words=["--classes", "0"], code=2)
        self.assertRegex(said, "--classes 0 must be at least 1")
