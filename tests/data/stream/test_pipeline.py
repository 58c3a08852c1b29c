"""The global sequence is a function of (seed, position) only, and damage arrives as a sentence."""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import loading, pipeline
from jaxrobust.data.transforms import preparing
from tests.support import sweeps
from tests.support.numbered import numbered, read_numbered, taken

DIGITS = Path(pipeline.__file__).parents[1] / "digits"


train = functools.partial(taken, batch_size=8)


def tuple_of(load):
    """Batches are tuples with a constructor; here one of a single array."""
    batch = collections.namedtuple("batch", "rows")
    return lambda position, *, rows: batch(*load(position, rows=rows))


def order(source, steps, **options):
    """The records of the first `steps` batches of a `numbered` source."""
    images, labels = train(source, steps, **options)
    np.testing.assert_array_equal(images[:, 0, 0, 0] % 10, labels)
    return images[:, 0, 0, 0].tolist()


class SameSequenceTest(parameterized.TestCase):
    """Order and augmentation, whoever computes them."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.source = registry.open_source("digits", "train[:100]")
        # 100 records in batches of 24: epochs of 96; 14 steps are 3.5 of them.
        cls.options = {"batch_size": 24, "augmentation": "crop-flip"}
        cls.images, cls.labels = train(cls.source, 14, **cls.options)

    def assert_is_sequence(self, found, start=0):
        stop = start + len(found[0])
        np.testing.assert_array_equal(found[1], self.labels[start:stop])
        np.testing.assert_array_equal(found[0], self.images[start:stop])

    def test_shapes_and_types(self):
        self.assertEqual((self.images.shape, self.images.dtype), ((336, 8, 8, 1), np.uint8))
        self.assertEqual((self.labels.shape, self.labels.dtype), ((336,), np.int32))

    @sweeps.rows(1, 2, 4)
    def test_processes_take_consecutive_rows(self, count):
        parts = [
            train(self.source, 14, process_index=index, process_count=count, **self.options)
            for index in range(count)
        ]
        images = [part[0].reshape(14, 24 // count, 8, 8, 1) for part in parts]
        labels = [part[1].reshape(14, 24 // count) for part in parts]
        joined = np.concatenate(images, axis=1).reshape(-1, 8, 8, 1)
        self.assert_is_sequence((joined, np.concatenate(labels, axis=1).reshape(-1)))

    @sweeps.rows(24, 96, 192, 5, 101)
    def test_resume(self, start):
        steps = (336 - start) // 24
        self.assert_is_sequence(train(self.source, steps, start=start, **self.options), start)

    @pytest.mark.slow
    def test_resume_with_workers_and_processes(self):
        for process in range(2):
            images, labels = train(
                self.source,
                9,
                start=120,
                workers=2,
                process_index=process,
                process_count=2,
                **self.options,
            )
            rows = [120 + step * 24 + process * 12 + row for step in range(9) for row in range(12)]
            np.testing.assert_array_equal(labels, self.labels[rows])
            np.testing.assert_array_equal(images, self.images[rows])

    def test_without_the_cache(self):
        with absltest.mock.patch.object(pipeline, "CACHE_BYTES", 0):
            self.assert_is_sequence(train(self.source, 14, **self.options))

    def test_another_batch_size_augments_a_record_of_an_epoch_alike(self):
        # Batches of 20 consume the epoch whole; the first 96 positions of it are the same.
        other = train(self.source, 10, **self.options | {"batch_size": 20})
        np.testing.assert_array_equal(other[0][:96], self.images[:96])
        np.testing.assert_array_equal(other[0][100:196], self.images[96:192])

    def test_bits_of_the_sequence(self):
        """A run must continue after an upgrade of NumPy, Pillow or grain."""
        self.assertEqual(
            order(numbered(), 2), [25, 8, 30, 14, 10, 21, 35, 27, 17, 32, 28, 4, 3, 9, 36, 33]
        )
        sums = self.images[:6].sum((1, 2, 3)).tolist()
        self.assertEqual(sums, [5006, 4830, 4352, 4607, 4878, 3682])


class PartsTest(parameterized.TestCase):
    """A batch is made in parts of at most 64 rows, whatever divides it."""

    @sweeps.rows((1, 1), (64, 1), (65, 2), (67, 2), (127, 2), (131, 3), (1021, 16))
    def test_few_parts(self, rows, parts):
        made = []

        def load(position, *, rows):
            made.append((position, rows))
            return (np.arange(position, position + rows),)

        # Another process' rows lie before and behind each batch.
        batches = pipeline._batches(tuple_of(load), 5, 2000, rows, steps=2, workers=0)
        found = [batch[0].tolist() for batch in batches]
        batches.close()
        self.assertEqual(found, [list(range(5, 5 + rows)), list(range(2005, 2005 + rows))])
        self.assertEqual(len(made), 2 * parts)
        sizes = {size for _, size in made}
        self.assertLessEqual(max(sizes), 64)
        self.assertLessEqual(max(sizes) - min(sizes), 1)

    def test_the_same_sequence(self):
        source = numbered(151)
        whole = order(source, 2, batch_size=151, start=3)
        with absltest.mock.patch.object(pipeline, "_PART", 1):
            self.assertEqual(order(source, 2, batch_size=151, start=3), whole)
        ids = [
            np.concatenate([batch.ids for batch in batches]).tolist()
            for batches in (
                pipeline.evaluation_batches(source, batch_size=size, image_size=8)
                for size in (67, 151)
            )
        ]
        self.assertEqual(ids[0][:151], ids[1])


class EpochTest(parameterized.TestCase):
    @sweeps.rows((37, 8), (37, 37), (36, 6), (8, 3))
    def test_every_record_at_most_once_per_epoch_and_the_rest_left_out(self, size, batch_size):
        source = numbered(size)
        steps = pipeline.steps_per_epoch(source, batch_size)
        self.assertEqual(steps, size // batch_size)
        found = np.array(order(source, 4 * steps, batch_size=batch_size))
        epochs = found.reshape(4, steps * batch_size)
        for epoch in epochs:
            self.assertLen(set(epoch.tolist()), steps * batch_size)
        self.assertLen({tuple(epoch.tolist()) for epoch in epochs}, 4)
        if size == 37 and batch_size == 8:  # over epochs, nobody stays left out
            many = order(source, 20 * steps, batch_size=batch_size)
            self.assertLen(set(many), 37)

    def test_augmentations_differ_between_epochs_and_records(self):
        source = registry.open_source("digits", "train[:32]")
        plain, _ = train(source, 4, batch_size=32)
        images, _ = train(source, 4, batch_size=32, augmentation="crop-flip")
        same = np.mean([np.array_equal(a, b) for a, b in zip(plain, images, strict=True)])
        self.assertLess(same, 0.25)  # 1 in 18 draws neither shifts nor mirrors
        record = plain[0]  # its four epochs
        seen = {
            image.tobytes() for image, p in zip(images, plain, strict=True) if (p == record).all()
        }
        self.assertGreater(len(seen), 1)

    def test_seeds_differ_and_augmentation_leaves_the_order(self):
        source = registry.open_source("digits", "train[:64]")
        labels = {
            (seed, name): tuple(train(source, 4, seed=seed, augmentation=name)[1].tolist())
            for seed in (0, 1, 2**40)
            for name in ("none", "crop-flip")
        }
        self.assertLen(set(labels.values()), 3)
        self.assertEqual(labels[0, "none"], labels[0, "crop-flip"])

    @pytest.mark.slow
    def test_shuffle_reaches_every_place(self):
        source = numbered(6)
        first = [order(source, 1, batch_size=1, start=6 * epoch)[0] for epoch in range(120)]
        # 120 draws of 6: mean 20, standard deviation 4.
        self.assertTrue(np.all(np.abs(np.bincount(first, minlength=6) - 20) < 16))

    def test_resizing_augmentation_on_mixed_sizes(self):
        mixed = dataclasses.replace(
            numbered(),
            image_shape=None,
            read=functools.partial(read_numbered, side=12, wrong=range(0, 37, 2)),
        )
        images, _ = train(mixed, 2, augmentation="resized-crop-flip")
        self.assertEqual(images.shape, (16, 8, 8, 1))


class EvaluationTest(parameterized.TestCase):
    def evaluate(self, source, **options):
        options = {"image_size": 8, "batch_size": 8} | options
        batches = pipeline.evaluation_batches(source, **options)
        taken = list(batches)
        batches.close()
        return taken

    @sweeps.rows((37, 8, None), (16, 8, None), (37, 8, 11), (3, 8, None), (9, 8, 99))
    def test_order_padding_and_mask(self, size, batch_size, limit):
        batches = self.evaluate(numbered(size), batch_size=batch_size, limit=limit)
        count = min(size, limit or size)
        self.assertLen(batches, -(-count // batch_size))
        for batch in batches:
            self.assertEqual(batch.images.shape, (batch_size, 8, 8, 1))
            types = (batch.images.dtype, batch.labels.dtype, batch.mask.dtype, batch.ids.dtype)
            self.assertEqual(types, (np.uint8, np.int32, np.bool_, np.int32))
        images, labels, mask, ids, damaged = (
            np.concatenate(arrays) for arrays in zip(*batches, strict=True)
        )
        places = spread.places(numbered(size), limit)
        self.assertLen(places, count)
        np.testing.assert_array_equal(ids[mask], places)
        np.testing.assert_array_equal(images[mask][:, 0, 0, 0], places)
        np.testing.assert_array_equal(labels[mask], places % 10)
        self.assertFalse(mask[count:].any())
        self.assertTrue(np.all(ids[count:] == -1))
        self.assertFalse(images[count:].any() or labels[count:].any())
        self.assertTrue(np.all(damaged == -1))

    def test_only_some_places(self):
        """They keep their ids, by which an evaluation draws."""
        places = (2, 3, 5, 30, 31, 36, 11)
        batches = self.evaluate(numbered(37), batch_size=4, places=places)
        images, labels, mask, ids, _ = map(np.concatenate, zip(*batches, strict=True))
        self.assertLen(batches, 2)
        np.testing.assert_array_equal(ids, [*places, -1])
        np.testing.assert_array_equal(mask, 7 * [True] + [False])
        np.testing.assert_array_equal(images[mask][:, 0, 0, 0], places)
        np.testing.assert_array_equal(labels[mask], np.array(places) % 10)

    @sweeps.rows(2, 4)
    def test_processes_split_rows_and_agree_on_the_number_of_batches(self, count):
        whole = self.evaluate(numbered())
        parts = [
            self.evaluate(numbered(), process_index=index, process_count=count)
            for index in range(count)
        ]
        for step, batch in enumerate(whole):
            for field in range(5):
                rows = np.concatenate([part[step][field] for part in parts])
                np.testing.assert_array_equal(rows, batch[field])
        self.assertEqual({len(part) for part in parts}, {len(whole)})

    def test_resizes_what_has_another_size(self):
        source = registry.open_source("fake:40x56x3", "test")
        how = {"image_size": 28, "places": range(3)}
        (batch,) = self.evaluate(source, **how)
        transform = preparing.evaluation_transform("bicubic-32-crop-28")
        for row in range(3):
            np.testing.assert_array_equal(batch.images[row], transform(source[row].image))
        (named,) = self.evaluate(source, preprocessing="bilinear-28-crop-28", **how)
        self.assertFalse(np.array_equal(named.images, batch.images))

    def test_preprocessing_of_another_size_is_refused(self):
        with self.assertRaisesRegex(
            registry.DataError,
            r"'Res224' gives record 0 the shape \(224, 224, 3\), not \(28, 28, 3\); set",
        ):
            self.evaluate(
                registry.open_source("fake", "test"), image_size=28, preprocessing="Res224"
            )


class ArgumentTest(parameterized.TestCase):
    @sweeps.rows(
        ({"batch_size": 0}, "batch_size=0 must be between 1 and the 37 records of data set"),
        ({"batch_size": 64}, "batch_size=64 must be between 1 and the 37 records"),
        ({"process_count": 3}, "batch_size=8 .* a multiple of process_count=3"),
        ({"process_index": 1}, "process_index=1 must be at least 0 and below process_count=1"),
        ({"augmentation": "corp"}, "unknown augmentation 'corp': presets are none, basic, light"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2\*\*63\)"),
        ({"start": -8}, "start=-8 and workers=0 must not be negative"),
        ({"image_size": 16}, "has 8x8 images, but .*'none' does not resize them to image_size=16"),
    )
    def test_train(self, options, message):
        with self.assertRaisesRegex(registry.DataError, message):
            train(numbered(), 1, **options)

    def test_mixed_sizes_need_a_resizing_augmentation(self):
        mixed = dataclasses.replace(numbered(), image_shape=None)
        with self.assertRaisesRegex(
            registry.DataError, "differently sized images.* or begin the .* with resized-crop"
        ):
            train(mixed, 1, augmentation="crop-flip")

    @sweeps.rows(
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"process_count": 3}, "a multiple of process_count=3"),
        ({"preprocessing": "Res9"}, "unknown preprocessing 'Res9'"),
    )
    def test_evaluation(self, options, message):
        options = {"batch_size": 8, "image_size": 8} | options
        with self.assertRaisesRegex(ValueError, message):
            pipeline.evaluation_batches(numbered(), **options)


class DamageTest(parameterized.TestCase):
    """What goes wrong in a thread or worker arrives whole and soon."""

    def damaged(self, **options):
        read = functools.partial(read_numbered, side=8, **options)
        return dataclasses.replace(numbered(), read=read)

    @sweeps.rows(
        ({"broken": [5]}, "not a complete image file"),
        ({"wrong": [5]}, r"its shape is \(9, 9, 1\), not \(8, 8, 1\)"),
    )
    def test_strictly_a_damaged_image_is_an_error(self, damage, reason):
        message = (
            "data set 'numbered', split 'train': the image of record 5 is damaged: "
            f"{reason}.*; prepare the data set again"
        )
        with self.assertRaisesRegex(registry.DataError, message):
            train(self.damaged(**damage), 37, batch_size=1)
        with self.assertRaisesRegex(registry.DataError, message):
            list(pipeline.evaluation_batches(self.damaged(**damage), batch_size=4, image_size=8))

    def lenient(self, source, steps, **options):
        options = {"augmentation": "none", "image_size": 8, "seed": 3, "strict": False} | options
        with contextlib.closing(pipeline.train_batches(source, **options)) as batches:
            return [next(batches) for _ in range(steps)]

    @sweeps.fast(0)
    @parameterized.parameters(0, 2)
    def test_otherwise_the_next_whole_image_takes_its_place(self, workers):
        source = self.damaged(broken=[5, 36], wrong=[6])
        batches = self.lenient(source, 2, batch_size=37, workers=workers)
        clean = np.array(order(numbered(), 2, batch_size=37))
        instead = {5: 7, 6: 7, 36: 0}
        images = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches])
        self.assertEqual(images.tolist(), [instead.get(i, i) for i in clean.tolist()])
        labels = np.concatenate([batch.labels for batch in batches])
        np.testing.assert_array_equal(labels, images % 10)
        damaged = np.concatenate([batch.damaged for batch in batches])
        np.testing.assert_array_equal(damaged, np.where(np.isin(clean, list(instead)), clean, -1))

    def test_augmentation_is_that_of_the_place(self):
        """The draws belong to the record that is missing, whatever is put there."""
        options = {"batch_size": 37, "augmentation": "crop-flip"}
        (batch,) = self.lenient(self.damaged(broken=[5]), 1, **options)
        (whole,) = self.lenient(numbered(), 1, **options)
        others = batch.damaged == -1
        np.testing.assert_array_equal(batch.images[others], whole.images[others])

    def test_evaluation_leaves_it_out(self):
        batches = list(
            pipeline.evaluation_batches(
                self.damaged(broken=[5]), batch_size=4, image_size=8, strict=False
            )
        )
        self.assertEqual(batches[1].damaged.tolist(), [-1, 5, -1, -1])
        self.assertEqual(batches[1].mask.tolist(), [True, False, True, True])
        self.assertEqual(batches[1].ids.tolist(), [4, -1, 6, 7])
        self.assertEqual(sum(batch.mask.sum() for batch in batches), 36)

    def test_each_is_named_once_and_too_many_stop(self):
        said = []
        damage = pipeline.Damage(self.damaged(broken=[5, 9, 11]), 2, said.append)
        for damaged in ([-1, 5], [5, 9], [-1, -1], [9, 5]):
            damage.add(np.array(damaged, np.int32))
        self.assertLen(said, 2)
        self.assertRegex(
            said[0],
            r"data set 'numbered', split 'train': the image of record 5 is damaged \(not a "
            r"complete image file.*\); 1 of at most 2",
        )
        self.assertEqual(damage.new, {5, 9})
        with self.assertRaisesRegex(
            registry.DataError,
            r"record 11 is damaged \(.*\), one more than data.max_damaged=2 allows; prepare",
        ):
            damage.add(np.array([11], np.int32))

    def test_what_was_met_before_counts_and_is_not_named_again(self):
        said, noted = [], []
        source = self.damaged(broken=[5, 9, 11])
        damage = pipeline.Damage(source, 2, said.append, known=[5], note=noted.append)
        damage.add(np.array([5, 9], np.int32))
        self.assertEqual((noted, damage.known, damage.met), ([9], {5}, {5, 9}))
        self.assertLen(said, 1)
        for _ in range(2):  # a restart stops there again
            with self.assertRaisesRegex(registry.DataError, "more than data.max_damaged=2"):
                damage.add(np.array([11], np.int32))
        self.assertEqual(noted, [9])

    def test_nothing_whole_is_an_error(self):
        with self.assertRaisesRegex(
            registry.DataError, "all its possible replacements are damaged"
        ):
            self.lenient(self.damaged(broken=range(37)), 1, batch_size=4)

    def test_good_batches_before_the_damage_arrive(self):
        source = numbered()
        clean = order(source, 37, batch_size=1)
        bad = clean[20]
        batches = pipeline.train_batches(
            self.damaged(broken=[bad]),
            batch_size=1,
            seed=3,
            augmentation="none",
            image_size=8,
        )
        found = [int(next(batches).images[0, 0, 0, 0]) for _ in range(20)]
        self.assertEqual(found, clean[:20])
        with self.assertRaisesRegex(registry.DataError, f"record {bad} "):
            next(batches)
        batches.close()

    def test_corrupt_record_file(self):
        self.check_corrupt(0)

    @pytest.mark.slow
    def test_corrupt_record_file_in_a_worker(self):
        self.check_corrupt(2)

    def check_corrupt(self, workers):
        with tempfile.TemporaryDirectory() as root:
            shutil.copytree(DIGITS / "digits", Path(root) / "digits")
            path = next(Path(root).rglob("*train*"))
            content = bytearray(path.read_bytes())
            content[100_000] ^= 0xFF
            path.write_bytes(content)
            with absltest.mock.patch.dict(registry._SHIPPED, clear=True):
                source = registry.open_source("digits", "train", data_dir=root)
            started = time.monotonic()
            with self.assertRaisesRegex(
                registry.DataError,
                r"split 'train': record \d+ .*digits-train.array_record.* cannot be read.*; copy "
                "the data set again or prepare it again: `tfds build digits",
            ) as caught:
                train(source, 90, batch_size=16, workers=workers)
            self.assertNotIn("\n", str(caught.exception))
            self.assertLess(time.monotonic() - started, 60)


class LifetimeTest(absltest.TestCase):
    def test_read_ahead_is_bounded_and_close_ends_the_threads(self):
        seen = []

        def read(indices):
            seen.extend(indices)
            return read_numbered(indices, side=8)

        source = dataclasses.replace(numbered(200), read=read)
        before = set(threading.enumerate())
        with absltest.mock.patch.object(pipeline, "CACHE_BYTES", 0):
            batches = pipeline.train_batches(
                source, batch_size=2, seed=0, augmentation="none", image_size=8
            )
            next(batches)
        time.sleep(0.3)
        self.assertBetween(len(seen), 4, 2 * 10)  # at least one batch ahead, at most 8 and one
        batches.close()
        for thread in set(threading.enumerate()) - before:
            thread.join(5)
            self.assertFalse(thread.is_alive(), thread)

    def test_small_data_is_decoded_once_per_process(self):
        counts = np.zeros(37, int)

        def read(indices):
            counts[indices] += 1
            return read_numbered(indices, side=8)

        source = dataclasses.replace(numbered(), read=read)
        images = loading.DecodedImages(source, 37 * 64, True)
        for indices in ([0, 1, 2], [2, 3, 0], [3]):
            self.assertEqual([image[0, 0, 0] for image, _ in images(indices)], indices)
        self.assertEqual(counts[:5].tolist(), [1, 1, 1, 1, 0])
        with self.assertRaisesRegex(ValueError, "read-only"):  # augmentations cannot spoil it
            next(images([0]))[0][0] = 1
        images = loading.DecodedImages(source, 37 * 64 - 1, True)
        list(images([4])), list(images([4]))
        self.assertEqual(counts[4], 2)

    @pytest.mark.slow
    def test_close_ends_the_workers(self):
        batches = pipeline.evaluation_batches(numbered(), batch_size=8, image_size=8, workers=1)
        np.testing.assert_array_equal(next(batches).ids, np.arange(8))
        self.assertLen(multiprocessing.active_children(), 1)
        batches.close()
        self.assertEmpty(multiprocessing.active_children())

    def start(self, body):
        """A process that reads digits with two workers and prints their ids, and those ids."""
        code = (
            "import jaxrobust.data as data, contextlib, multiprocessing, signal, time\n"
            "def main():\n"
            # A test run in the background ignores Ctrl-C, and hands that down.
            "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "    batches = data.train_batches(data.open_source('digits', 'train'), batch_size=8,\n"
            "        seed=0, augmentation='none', image_size=8, workers=2)\n"
            "    with contextlib.closing(batches):\n"
            "        kept = [next(batches) for _ in range(9)]\n"
            "        print(*[c.pid for c in multiprocessing.active_children()], flush=True)\n"
            f"        {body}\n"
            "if __name__ == '__main__':\n"
            "    main()\n"
        )
        script = Path(self.create_tempdir().full_path) / "script.py"
        script.write_text(code)
        process = subprocess.Popen(
            [sys.executable, script],
            env=os.environ | {"PYTHONPATH": str(DIGITS.parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        workers = [int(pid) for pid in process.stdout.readline().split()]
        self.assertLen(workers, 2)
        return process, workers

    def assert_gone(self, workers):
        for pid in workers:
            with self.assertRaises(ProcessLookupError):
                for _ in range(100):
                    os.kill(pid, 0)
                    time.sleep(0.1)

    @pytest.mark.slow
    def test_interrupt_is_the_main_process_alone(self):
        """Ctrl-C goes to the whole process group; workers stay silent and end with it."""
        process, workers = self.start("time.sleep(60)")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(errors.count("Traceback"), 1, errors)
        self.assert_gone(workers)

    @pytest.mark.slow
    def test_workers_end_when_the_main_process_is_killed(self):
        process, workers = self.start("time.sleep(60)")
        process.kill()
        process.communicate(timeout=60)
        self.assert_gone(workers)

    @pytest.mark.slow
    def test_the_end_is_silent_and_frees_what_workers_shared(self):
        process, workers = self.start("pass")
        _, errors = process.communicate(timeout=60)
        grains = "multiprocess worker profiling requires|version 448 or later"  # than jaxlib 0.10
        said = [line for line in errors.splitlines() if not re.search(grains, line)]
        self.assertEqual((process.returncode, said), (0, []))
        self.assert_gone(workers)
