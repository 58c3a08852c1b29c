"""Which folders are checkpoints, and which of them is the newest."""

import contextlib
import errno
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import absltest

from jaxrobust.runtime.files import buckets
from jaxrobust.types import Weights
from jaxrobust.weights.store import checkpoint
from jaxrobust.weights.store.steps import MARKER, UNFINISHED
from tests.support import sweeps
from tests.support.bucket import BucketCase


class StepsTest(absltest.TestCase):
    def test_names_are_those_of_orbax(self):
        self.assertEqual(MARKER, ocp.path.atomicity.COMMIT_SUCCESS_FILE)
        self.assertEqual(UNFINISHED, ocp.path.atomicity.TMP_DIR_SUFFIX)

    def test_they_are_in_the_order_of_their_numbers(self):
        folder = Path(self.create_tempdir())
        for name in ("9", "10", "100", "0", "007", "12.orbax-checkpoint-tmp", "latest"):
            (folder / name).mkdir()
        (folder / "11").write_text("a file")
        self.assertEqual(checkpoint.steps(folder), [0, 9, 10, 100])


class KeptTest(absltest.TestCase):
    def opened(self, folder: Path, **how) -> checkpoint.Checkpoints:
        made = checkpoint.Checkpoints(folder, **how)
        self.addCleanup(made.close)
        return made

    def test_a_new_step_replaces_the_one_before(self):
        folder = Path(self.create_tempdir())
        last = self.opened(folder)
        for step in (3, 5):
            last.save(step, {"w": np.full(2, step, np.float32)}, {"step": step})
        last.wait()
        self.assertEqual((checkpoint.steps(folder), last.latest_step()), ([5], 5))
        self.assertEqual(last.meta(5), {"step": 5})

    def test_only_who_keeps_the_last_removes_those_before(self):
        """At the start too: a kill may have left two."""
        folder = Path(self.create_tempdir())
        every = self.opened(folder, keep_all=True)
        for step in (3, 5):
            every.save(step, {"w": np.full(2, step, np.float32)}, {})
        every.wait()
        for how in ({"read_only": True}, {"keep_all": True}):
            self.opened(folder, **how)
            self.assertEqual(checkpoint.steps(folder), [3, 5], how)
        self.opened(folder)
        self.assertEqual(checkpoint.steps(folder), [5])

    def test_arrays_come_back_of_any_step(self):
        folder = Path(self.create_tempdir())
        every = self.opened(folder, keep_all=True)
        for step in (3, 12):
            weights = Weights(
                {"w": np.full((2, 3), step, np.float32)}, {"m": np.ones(1, np.float32)}
            )
            every.save(step, weights, {"step": step})
            every.save(step, weights, {"step": "a second time"})  # which stays as it is
        every.wait()
        shape = jax.ShapeDtypeStruct((2, 3), np.float32)
        abstract = Weights({"w": shape}, {"m": jax.ShapeDtypeStruct((1,), np.float32)})
        for asked, step in ((None, 12), (3, 3)):
            number, arrays, meta = checkpoint.read(folder, abstract, asked)
            self.assertEqual((number, meta), (step, {"step": step}))
            np.testing.assert_array_equal(arrays.params["w"], np.full((2, 3), step))
        other = abstract._replace(params={"v": shape})
        with self.assertRaisesRegex(
            ValueError, r"12 holds another network \(2 para(.|\n)*v: saved None"
        ):
            checkpoint.read(folder, other)
        wider = abstract._replace(params={"w": jax.ShapeDtypeStruct((2, 4), np.float32)})
        with self.assertRaisesRegex(ValueError, r"w: saved \(2, 3\), wanted \(2, 4\)"):
            checkpoint.read(folder, wider)

    def test_cleared(self):
        folder = Path(self.create_tempdir())
        last = self.opened(folder)
        last.save(3, {"w": np.ones(2, np.float32)}, {})
        last.clear()
        self.assertEqual((checkpoint.steps(folder), last.latest_step()), ([], None))
        self.assertEmpty(list(folder.glob("*tmp*")))
        last.save(2, {"w": np.ones(2, np.float32)}, {})
        last.wait()
        self.assertEqual((checkpoint.steps(folder), last.latest_step()), ([2], 2))

    def test_half_a_checkpoint_is_not_taken(self):
        folder = Path(self.create_tempdir())
        (folder / "7" / "arrays").mkdir(parents=True)
        with self.assertRaisesRegex(ValueError, "/7 is not a complete checkpoint: .*at the start"):
            self.opened(folder)
        for item in ("arrays", "meta"):
            (folder / "4" / item).mkdir(parents=True)
        with self.assertRaisesRegex(
            ValueError, "/7 is not a complete checkpoint: .*continue at step 4"
        ):
            self.opened(folder)

    def test_a_full_disk_is_one_sentence(self):
        folder = Path(self.create_tempdir())
        last = self.opened(folder)
        last.save(3, {"w": np.ones(2, np.float32)}, {})
        last.wait()
        half = folder / "5.orbax-checkpoint-tmp"

        def full(*unused, **how):
            half.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")

        with (
            mock.patch.object(last._manager, "save", full),
            self.assertRaisesRegex(
                OSError, "a checkpoint of .* could not.* last good one is step 3"
            ),
        ):
            last.save(5, {"w": np.ones(2, np.float32)}, {})
        self.assertFalse(half.exists())

        def broken(*unused, **how):
            raise OSError(errno.EACCES, "Permission denied")

        with (
            mock.patch.object(last._manager, "save", broken),
            self.assertRaisesRegex(OSError, "Permission denied"),
        ):
            last.save(5, {"w": np.ones(2, np.float32)}, {})


class BucketTest(BucketCase):
    """Checkpoints that Orbax writes to a bucket itself."""

    def opened_at(self, folder: Path, **options) -> checkpoint.Checkpoints:
        opened = checkpoint.Checkpoints(folder, **options)
        self.addCleanup(opened.close)
        return opened

    def saved(self, checkpoints: checkpoint.Checkpoints, *steps: int) -> None:
        for step in steps:
            weights = Weights({"w": np.full(3, step, np.float32)}, {})
            checkpoints.save(step, weights, {"step": step})
        checkpoints.wait()

    def stored(self) -> set[str]:
        """The names below `latest`, without those inside of items."""
        names = (name.removeprefix("train/latest/") for name in self.names())
        return {"/".join(name.split("/")[:2]) for name in names} - {"metrics.jsonl.part-000001"}

    def test_a_step_without_its_marker_is_neither_used_nor_removed(self):
        run = self.opened()
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("{}\n")
        latest = run / "train" / "latest"
        checkpoints = self.opened_at(latest)
        self.saved(checkpoints, 3, 5)
        items = ("_CHECKPOINT_METADATA", "arrays", "commit_success.txt", "meta")
        self.assertEqual(self.stored(), {f"5/{item}" for item in items})
        self.assertIn("metrics.jsonl.part-000001", self.names())  # it comes before
        shapes = Weights({"w": jax.ShapeDtypeStruct((3,), np.float32)}, {})
        step, weights, meta = checkpoint.read(latest, shapes)
        self.assertEqual((step, meta), (5, {"step": 5}))
        np.testing.assert_array_equal(weights.params["w"], np.full(3, 5, np.float32))
        # As gs://.../latest/5, copied from a disk where an older Orbax wrote it.
        (self.objects / "runs/1/train/latest/5/commit_success.txt").unlink()
        words = "/runs/1/train/latest/5 has no commit_success.txt, so it may be incomplete. If the"
        with self.assertRaisesRegex(ValueError, f"^gs://.*{words} .* complete, .* at the start$"):
            self.opened_at(latest)
        self.assertEqual(self.stored(), {f"5/{item}" for item in items} - {"5/commit_success.txt"})
        self.saved(checkpoints, 6)  # of the process that has 5 in memory
        (self.objects / "runs/1/train/latest/4/arrays").mkdir(parents=True)
        (self.objects / "runs/1/train/latest/4/arrays/x").write_text("")
        self.assertEqual(self.opened_at(latest).latest_step(), 6)
        self.assertIn("4/arrays", self.stored())

    # Tasks of Orbax fail after the first one that did, and nothing awaits them.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @sweeps.rows("POST .*/7/arrays/", "POST .*/7/commit_success")
    def test_a_write_that_fails_in_the_middle(self, pattern):
        latest = self.opened() / "train" / "latest"
        checkpoints = self.opened_at(latest)
        self.saved(checkpoints, 5)
        refusal = f"gs://{self.objects.name}/.* written or read .*; last .* there: step 5$"
        with (
            self.server.refusing(pattern),
            self.assertRaisesRegex(buckets.BucketError, refusal),
        ):
            self.saved(checkpoints, 7)
        self.assertIn("7.orbax-checkpoint-tmp", self.stored())
        self.assertEqual(checkpoint.steps(latest), [5])
        reader = self.opened_at(latest, read_only=True)
        self.assertEqual(reader.latest_step(), 5)
        self.assertIn("7.orbax-checkpoint-tmp", self.stored())  # the run may continue
        again = self.opened_at(latest)
        self.assertEqual({name.partition("/")[0] for name in self.stored()}, {"5"})
        self.saved(again, 7)
        self.assertEqual({name.partition("/")[0] for name in self.stored()}, {"7"})
        again.clear()
        self.assertEqual(self.stored(), set())

    def test_a_bucket_that_is_gone_is_no_damage(self):
        latest = self.opened() / "train" / "latest"
        checkpoints = self.opened_at(latest)
        self.saved(checkpoints, 5)
        with (
            self.server.refusing("^GET"),
            self.assertRaisesRegex(buckets.BucketError, "is not accessible to this account"),
        ):
            checkpoints.meta(5)


class MarkersTest(absltest.TestCase):
    def test_a_renamed_folder_is_complete_without_the_file(self):
        """As older versions of Orbax left it on disks."""
        folder = Path(self.create_tempdir())
        with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
            checkpoints.save(5, Weights({"w": np.ones(3, np.float32)}, {}), {"step": 5})
            checkpoints.wait()
        for marker in folder.rglob("commit_success.txt"):
            marker.unlink()
        with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
            self.assertEqual((checkpoints.latest_step(), checkpoints.meta(5)), (5, {"step": 5}))
        shapes = Weights({"w": jax.ShapeDtypeStruct((3,), np.float32)}, {})
        self.assertEqual(checkpoint.read(folder, shapes)[0], 5)
