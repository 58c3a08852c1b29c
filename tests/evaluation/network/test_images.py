"""Images that are read in parts: the verdicts of an array, and what stays in memory."""

import tracemalloc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.evaluation import autoattack
from tests.support.ensemble import IMAGES, LABELS


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
