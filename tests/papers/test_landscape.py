"""The loss around weights: its middle, its directions, its devices, and a table that continues."""

import contextlib
import csv
import functools
import importlib.util
import io
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from PIL import Image
from safetensors.numpy import save_file

from jaxrobust import data, models
from jaxrobust.papers.commands import landscape
from jaxrobust.papers.networks import landscape as surface
from jaxrobust.runtime.devices import sharding
from tests.support import sweeps

PLOT = importlib.util.find_spec("matplotlib") is not None
_folder = tempfile.TemporaryDirectory()


def tearDownModule():
    _folder.cleanup()


OPTIONS = {"stem_strides": (1,), "depths": (1,), "dims": (8,), "in_channels": 1}


@functools.cache
def network():
    """A network, its weights, and 40 images."""
    net = models.create("convnext_n", num_classes=10, image_size=8, **OPTIONS)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params, stats = (
        {k: rng.normal(size=v.shape).astype(np.float32) for k, v in part.items()} for part in shapes
    )
    stats["normalize.std"] = np.ones(1, np.float32)
    loaded = data.load("digits", split="train", n=40)
    return net, params, stats, loaded.images, loaded.labels


@functools.cache
def weights() -> tuple[str, ...]:
    """The words of the command that name it."""
    _, params, stats, *_ = network()
    path = Path(_folder.name) / "net.safetensors"
    save_file(params | stats, path)
    options = {key: value for key, value in OPTIONS.items() if key != "in_channels"}
    given = ("--model", "convnext_n", "--weights", path, "--options", options)
    return *map(str, given), "--dataset", "digits", "--image_size", "8"


@functools.cache
def logits_of():
    net, _, stats, images, _ = network()
    return jax.jit(lambda params: net.apply(params, stats, images)[0])


def loss(params) -> float:
    """The mean cross-entropy, by the shortest way."""
    logits, labels = logits_of()(params), network()[-1]
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())


class DirectionTest(parameterized.TestCase):
    @sweeps.fast("convnext_n")
    @parameterized.parameters("deit_s", "convnext_n", "xcit_n12")
    def test_each_filter_has_the_norm_of_the_weights(self, name):
        net = models.create(name, num_classes=10, image_size=32)
        shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
        rng = np.random.default_rng(3)
        params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}
        found = surface.direction(params, 0, 1)
        self.assertEqual(found.keys(), params.keys())
        for key, value in params.items():
            if value.ndim < 2:
                self.assertFalse(found[key].any(), key)
                continue
            filters = [value, found[key]]
            if key.endswith(".kernel"):  # a row of each, as PyTorch's first axis
                filters = [array.reshape(-1, array.shape[-1]).T for array in filters]
                self.assertLen(filters[0], value.shape[-1])
            else:
                filters = [array.reshape(1, -1) for array in filters]
            norms = [np.linalg.norm(array.astype(np.float64), axis=1) for array in filters]
            np.testing.assert_allclose(*norms, rtol=1e-6)  # kept in float32

    def test_draws(self):
        params = {
            "a.kernel": np.ones((3, 50), np.float32),
            "b.kernel": np.zeros((3, 50), np.float32),
            "c.kernel": np.ones((3, 50), np.float32),
        }
        one, other, seed = (surface.direction(params, s, n) for s, n in ((0, 0), (0, 1), (1, 0)))
        self.assertFalse(one["b.kernel"].any())  # as long as the weights, which are nothing
        pairs = [(one, "a", other, "a"), (one, "a", seed, "a"), (one, "a", one, "c")]
        for first, name, second, same in pairs:
            products = (first[f"{name}.kernel"] * second[f"{same}.kernel"]).sum(0) / 3
            self.assertLess(abs(products.mean()), 0.4)  # of 50 cosines whose spread is 0.58
        alone = surface.direction({"c.kernel": params["c.kernel"]}, 0, 0)
        np.testing.assert_array_equal(alone["c.kernel"], one["c.kernel"])


class SurfaceTest(parameterized.TestCase):
    def at(self, points, *, devices=8, batch=16):
        net, params, stats, images, labels = network()
        both = [surface.direction(params, 5, number) for number in range(2)]
        mesh = sharding.make_mesh(jax.devices()[:devices])
        call = surface.losses_around(
            net, params, stats, both, images, labels, batch=batch, mesh=mesh
        )
        return call(np.array(points))

    def test_the_middle_is_the_loss(self):
        _, params, *_, labels = network()
        found, right = self.at([(0.0, 0.0)])
        # Sums of 40 numbers in float32, in other orders.
        np.testing.assert_allclose(found, [loss(params)], rtol=1e-6)
        answers = logits_of()(params).argmax(-1)
        self.assertAlmostEqual(right[0], float((answers == labels).mean()), places=6)

    def test_any_point_is_the_loss_of_moved_weights(self):
        _, params, *_ = network()
        points = [(0.3, -0.2), (-1.0, 1.0), (0.0, 0.5)]
        found, _ = self.at(points)
        both = [surface.direction(params, 5, number) for number in range(2)]
        for value, (a, b) in zip(found, points, strict=True):
            moved = {
                k: np.asarray(v) + np.float32(a) * both[0][k] + np.float32(b) * both[1][k]
                for k, v in params.items()
            }
            np.testing.assert_allclose(value, loss(moved), rtol=2e-5)  # logits of some tens
        self.assertGreater(np.ptp(found), 0.1)

    def test_an_image_without_an_answer_is_not_right(self):
        """Of logits that are not numbers, argmax takes the first for the largest."""
        net, params, stats, images, _ = network()
        both = [surface.direction(params, 5, number) for number in range(2)]
        mesh = sharding.make_mesh(jax.devices()[:1])
        lost = {key: value * np.float32(np.nan) for key, value in params.items()}
        labels = np.zeros(len(images), np.int32)
        call = surface.losses_around(net, lost, stats, both, images, labels, batch=16, mesh=mesh)
        loss, right = call(np.zeros((1, 2)))
        self.assertTrue(np.isnan(loss).all())
        np.testing.assert_array_equal(right, 0)

    def test_one_device_equals_eight(self):
        points = np.random.default_rng(0).uniform(-1, 1, (11, 2))
        one, eight = (self.at(points, devices=number) for number in (1, 8))
        np.testing.assert_array_equal(one, eight)

    def test_batches_change_nothing(self):
        points = [(0.0, 0.0), (0.4, 0.7)]
        # Another order of float32 sums.
        np.testing.assert_allclose(self.at(points, batch=16), self.at(points, batch=40), rtol=1e-5)


@absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
class CommandTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.out = Path(self.create_tempdir())

    def call(self, *words) -> tuple[int, str, str]:
        given = ("--side", 5, "--n", 40, "--batch", 16, "--points", 4, "--out", self.out)
        own = [word for word in given if str(word).startswith("--")]
        given = [w for k in own if k not in words for w in (k, given[given.index(k) + 1])]
        out, said, code = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(said),
            jax.numpy_dtype_promotion("standard"),
        ):
            try:
                landscape.main([str(word) for word in (*words, *given)])
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return code, out.getvalue(), said.getvalue()

    def table(self) -> list[dict[str, str]]:
        with (self.out / "landscape.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @pytest.mark.slow
    def test_table_and_picture_and_the_way_on(self):
        code, printed, said = self.call(*weights())
        self.assertEqual(code, 0, said)
        self.assertEqual(
            [Path(p).name for p in printed.split()], ["landscape.csv", "landscape.png"]
        )
        with Image.open(self.out / "landscape.png") as image:
            self.assertGreater(min(image.size), 200)
        whole = self.table()
        self.assertLen(whole, 25)
        middle = whole[12]
        self.assertEqual((middle["a"], middle["b"], middle["images"]), ("0.0", "0.0", "40"))
        np.testing.assert_allclose(float(middle["loss"]), loss(network()[1]), rtol=1e-6)
        ends = [(row["a"], row["b"]) for row in (whole[0], whole[1], whole[-1])]
        self.assertEqual(ends, [("-1.0", "-1.0"), ("-1.0", "-0.5"), ("1.0", "1.0")])
        # Stopped in the middle of a line, with a value that shows what is computed again.
        path = self.out / "landscape.csv"
        lines = path.read_text().splitlines(keepends=True)
        changed = lines[7].replace(whole[6]["loss"], "7.5")
        path.write_text("".join([*lines[:7], changed, lines[8], lines[9][:11]]))
        code, _, said = self.call(*weights())
        self.assertEqual(code, 0, said)
        again = self.table()
        self.assertEqual(again[6]["loss"], "7.5")
        np.testing.assert_allclose(
            *([float(r["loss"]) for n, r in enumerate(rows) if n != 6] for rows in (whole, again))
        )
        with mock.patch.object(surface, "losses_around", side_effect=AssertionError("computed")):
            self.assertEqual(self.call(*weights())[0], 0)  # nothing is left to do
        for other in (("--seed", 1), ("--n", 39), ("--side", 3), ("--reach", 2)):
            code, _, said = self.call(*weights(), *other)
            self.assertEqual(code, 2)
            self.assertIn("to other weights, images, directions or points", said)

    def test_refused(self):
        for words, said in (
            ((), "give --workdir RUN, or --model"),
            (("--workdir", "nowhere"), "is not a run"),
            (("--side", 4), "--side=4 has no point in the middle"),
            (("--side", 1), "--side=1 must be at least 3"),
            (("--n", 0), "--n=0 must be at least 1"),
            (("--reach", 0), "--reach=0 must be above 0"),
            (("FILE", "--split", "training"), "no split 'training'"),
            (("--epsilon", 1), "--epsilon is not a flag"),
        ):
            with self.subTest(row=(words, said)):
                words = [w for word in words for w in (weights() if word == "FILE" else [word])]
                code, _, error = self.call(*words)
                self.assertEqual(code, 2)
                self.assertIn(said, error)
                self.assertLen(error.splitlines(), 1)
                self.assertEmpty(list(self.out.iterdir()))
