"""Which folders are checkpoints, and which of them is the newest."""

import errno
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from jaxrobust.types import Weights
from jaxrobust.weights.store import checkpoint


class StepsTest(absltest.TestCase):
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
            ValueError, "/7 is not a complete checkpoint: .*continues at step 4"
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
