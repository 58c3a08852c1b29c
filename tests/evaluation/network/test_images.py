"""Images that are read in parts: the verdicts of an array, and what stays in memory."""

import gc
import tracemalloc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.network import images
from tests.support.ensemble import IMAGES, LABELS, NETS, QUICK


class Counting:
    """An image set that counts which of the images it gave are still alive."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.alive = self.most = 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, which):
        found = self.array[which].copy()
        self.alive += len(found)
        self.most = max(self.most, self.alive)
        weakref.finalize(found, self.gone, len(found))
        return found

    def gone(self, count):
        self.alive -= count


class Synthetic:
    """N small images that are computed when they are asked for."""

    def __init__(self, count):
        self.shape = (count, 4, 4, 1)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, which):
        seeds = np.asarray(which, np.float64)[:, None] + np.arange(16)
        return (
            np.modf(np.abs(np.sin(seeds * 12.9898) * 43758.5453))[0]
            .astype(np.float32)
            .reshape(len(seeds), *self.shape[1:])
        )


class ImageSetTest(absltest.TestCase):
    @pytest.mark.computes
    @pytest.mark.slow
    def test_verdicts_of_an_array(self):
        settings = {"norm": "linf", "epsilon": 4 / 255, "batch_size": 8, "verbose": False}
        settings |= {"attacks": ("apgd-ce", "square"), "overrides": {"square": QUICK["square"]}}
        dense, counted = IMAGES[:48], Counting(IMAGES[:48])
        expected = autoattack(NETS["conv"], dense, LABELS[:48], **settings)
        ledger = Path(self.create_tempdir()) / "ledger.jsonl"
        for _ in range(2):  # the second time from the ledger
            found = autoattack(NETS["conv"], counted, LABELS[:48], ledger=ledger, **settings)
            for name in ("clean", "robust", "fooled_by"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            np.testing.assert_array_equal(found.images_adv[:], expected.images_adv)
            np.testing.assert_array_equal(found.images_adv[5], expected.images_adv[5])
            self.assertIsInstance(found.images_adv, images.ImageSet)
            self.assertEqual(found.about["images_sha256"], expected.about["images_sha256"])
            for one, other in zip(found.verdicts, expected.verdicts, strict=True):
                np.testing.assert_array_equal(one, other)
        delta = np.abs(expected.images_adv - dense).max(axis=(1, 2, 3))
        np.testing.assert_allclose(expected.verdicts.norms, delta, rtol=1e-6)
        gc.collect()
        self.assertEqual(counted.alive, 0)
        # `doubts` looks at 64, here all 48.
        self.assertLessEqual(counted.most, 48 + 2 * 8)

    def test_few_are_alive_at_a_time(self):
        many = Counting(np.resize(IMAGES[:64], (1024, *IMAGES.shape[1:])))
        weights = np.random.default_rng(0).standard_normal((IMAGES[0].size, 10), np.float32)
        autoattack(
            jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights),
            many,
            np.resize(LABELS[:64], 1024),
            norm="linf",
            epsilon=1 / 255,
            attacks=("apgd-ce",),
            overrides={"apgd-ce": {"steps": 2}},
            batch_size=16,
            ledger=Path(self.create_tempdir()) / "ledger.jsonl",
            verbose=False,
        )
        self.assertLessEqual(many.most, 64 + 2 * 16)

    @pytest.mark.slow
    def test_memory_of_an_image(self):
        """At most 200 bytes of an image stay, in the standard version, whatever its size."""
        weights = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
        logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
        few = {"apgd-ce": {"steps": 2}, "apgd-t": {"steps": 2}, "fab-t": {"steps": 2}}
        peaks = []
        for count in (200, 600, 1800):  # the first compiles
            data = Synthetic(count)
            labels = np.asarray(logits_fn(data[np.arange(count)])).argmax(1)
            ledger = Path(self.create_tempdir()) / "ledger.jsonl"
            tracemalloc.start()
            autoattack(
                logits_fn,
                data,
                labels,
                norm="linf",
                epsilon=0.003,
                overrides=few | {"square": {"steps": 2}},
                batch_size=64,
                ledger=ledger,
                verbose=False,
            )
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        self.assertLess((peaks[2] - peaks[1]) / 1200, 200)


if __name__ == "__main__":
    absltest.main()
