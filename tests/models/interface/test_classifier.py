"""Networks as pairs of functions: what they are given, what they give back, blocks in a row."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from jaxrobust.models.interface import classifier, network_inputs
from jaxrobust.models.modules.basic import BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import branches, dropouts
from tests.support import paths, sweeps

TRACED_AT_FIRST_USE = """
import importlib, pkgutil
import jax
from jaxrobust import models

net = models.create("convnext_n", num_classes=2, image_size=8)
traces = []

@jax.jit
def imported(x):
    traces.append(x)
    for module in pkgutil.walk_packages(models.__path__, "jaxrobust.models."):
        importlib.import_module(module.name)
    return x

imported(1.0), imported(1.0)
assert len(traces) == 1, len(traces)
"""


class Block(nnx.Module):
    """x + a linear map of normed x, which may be left out; and dropout."""

    def __init__(self, rngs):
        self.bn, self.map = BatchNorm(3), Linear(3, 3, rngs=rngs)

    def __call__(self, x, drop, train):
        (path,), (within,) = branches(drop, 1), dropouts(drop, 1, 0.25, paths=1)
        return x + path(within(self.map(self.bn(x, train))))


class Net(nnx.Module):
    def __init__(self, rngs, rates=(), how=None, dtype=jnp.float32):
        self.dtype = jnp.dtype(dtype)
        self.normalize = Normalize(3)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.unused = BatchNorm(3)
        self.rates, self.how = rates, how or {}

    def __call__(self, images, train=False, key=None):
        x = self.normalize(images).astype(self.dtype)
        how = {"train": train, "key": key, "rates": self.rates} | self.how
        x = classifier.run_blocks(self.blocks, x, **how)
        return x.mean((1, 2))


IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 2, 3, 3), np.float32))


def made(dtype=jnp.float32, **how):
    net = classifier.classifier(lambda rngs: Net(rngs, dtype=dtype, **how), dtype=dtype)
    params, stats = net.init(jax.random.key(0))
    stats = {k: a + 0.25 if k.startswith("blocks") else a for k, a in stats.items()}
    return net, params, stats


class InputsTest(absltest.TestCase):
    def test_pixels_are_divided_to_the_bit(self):
        pixels = np.arange(256, dtype=np.uint8)
        found = jax.jit(network_inputs.unit_range)(pixels)
        np.testing.assert_array_equal(found, pixels.astype(np.float32) / np.float32(255))
        floats = jnp.float32([0.5, 200.0])
        self.assertIs(network_inputs.unit_range(floats), floats)

    def test_parameters_in_the_compute_type(self):
        params = {"a": jnp.float32([1.0]), "b": jnp.float32([[1 / 3]])}
        found = network_inputs.cast(params, jnp.dtype("bfloat16"))
        self.assertEqual(
            {k: a.dtype.name for k, a in found.items()}, dict.fromkeys("ab", "bfloat16")
        )


class ClassifierTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_imports_during_a_trace_do_not_repeat_it(self):
        subprocess.run([sys.executable, "-c", TRACED_AT_FIRST_USE], cwd=paths.ROOT, check=True)

    def test_statistics_move_in_training_only(self):
        net, params, stats = made()
        _, same = net.apply(params, stats, IMAGES)
        self.assertIs(same, stats)
        logits, moved = net.apply(params, stats, IMAGES, train=True, key=None)
        self.assertEqual(moved.keys(), stats.keys())
        self.assertEqual(logits.shape, (4, 3))
        x = np.asarray(IMAGES).reshape(-1, 3)
        np.testing.assert_allclose(
            moved["blocks.0.bn.mean"], 0.9 * stats["blocks.0.bn.mean"] + 0.1 * x.mean(0), rtol=1e-5
        )
        var = x.var(0, ddof=1)
        np.testing.assert_allclose(
            moved["blocks.0.bn.var"], 0.9 * stats["blocks.0.bn.var"] + 0.1 * var, rtol=1e-4
        )
        for key in ("normalize.mean", "normalize.std", "unused.mean", "unused.var"):
            np.testing.assert_array_equal(moved[key], stats[key])

    def test_statistics_of_the_images_alone(self):
        net, params, stats = made()
        shown = classifier.showing_batches(net)
        assert shown is not None
        logits, moved = shown.apply(params, stats, IMAGES, train=True)
        expected, _ = net.apply(params, stats, IMAGES, train=True)
        np.testing.assert_allclose(logits, expected, rtol=1e-5)
        x = np.asarray(IMAGES).reshape(-1, 3)
        np.testing.assert_allclose(moved["blocks.0.bn.mean"], x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(moved["blocks.0.bn.var"], x.var(0, ddof=1), rtol=1e-4)
        np.testing.assert_array_equal(moved["unused.var"], stats["unused.var"])
        self.assertEqual(shown.dtype, net.dtype)
        self.assertIsNone(classifier.showing_batches(classifier.Classifier(net.init, net.apply)))

    def test_types(self):
        net, params, stats = made(dtype="bfloat16")
        self.assertEqual({a.dtype for a in (params | stats).values()}, {jnp.dtype("float32")})
        logits, _ = net.apply(params, stats, IMAGES)
        self.assertEqual(logits.dtype, jnp.float32)
        exact, _ = made()[0].apply(params, stats, IMAGES)
        apart = float(jnp.abs(logits - exact).max())
        self.assertBetween(apart, 1e-6, 0.1)

    @sweeps.rows(
        (jnp.zeros((2, 4, 4, 3), jnp.uint8), "images are uint8; divide by 255"),
        (jnp.zeros((2, 4, 4, 1)), r"images have shape \(2, 4, 4, 1\), expected \[B, H, W, 3\]"),
        (jnp.zeros((4, 4, 3)), "images have shape"),
    )
    def test_refuses_images(self, images, message):
        net, params, stats = made()
        with self.assertRaisesRegex(ValueError, message):
            net.apply(params, stats, images)

    def test_refuses_weights(self):
        net, params, stats = made()
        key = "blocks.1.map.kernel"
        for changed, message in (
            ({k: a for k, a in params.items() if k != key}, f"not belong to this network.*{key}"),
            (params | {"more": params[key]}, "not belong to this network.*more"),
            (params | {key: params[key][:2]}, rf"{key} has shape \(2, 3\), expected \(3, 3\)"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                net.apply(changed, stats, IMAGES)


class BlocksTest(parameterized.TestCase):
    def test_remat_and_scan_draw_and_move_the_same(self):
        hows = ({}, {"remat": True}, {"scan": True}, {"remat": True, "scan": True})
        nets = [made(rates=(0.0, 0.4, 0.6), how=how) for how in hows]
        _, params, stats = nets[0]
        keys = jax.random.split(jax.random.key(3), 4)

        @jax.jit
        def run(*given):
            return [net.apply(*given, train=True, key=keys) for net, *_ in nets]

        (logits, moved), *others = run(params, stats, IMAGES)
        for found, new in others:
            np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-6)
            for key, value in moved.items():
                np.testing.assert_allclose(new[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
        programs = [
            str(jax.make_jaxpr(lambda x, net=net: net.apply(params, stats, x)[0])(IMAGES))
            for net, *_ in nets
        ]
        found = [("remat" in text or "checkpoint" in text, "scan[" in text) for text in programs]
        expected = [(False, False), (True, False), (False, True), (True, True)]
        self.assertEqual(found, expected)

    def test_a_key_is_needed_where_something_is_drawn(self):
        net, params, stats = made(rates=(0.0, 0.0, 0.5))
        said = "drop_path above 0 needs randomness in training.*with a key"
        with self.assertRaisesRegex(ValueError, said):
            net.apply(params, stats, IMAGES, train=True)
        net.apply(params, stats, IMAGES)  # in evaluation nothing is
        net, params, stats = made(how={"draws": True})
        said = "dropout above 0 needs randomness in training.*with a key"
        with self.assertRaisesRegex(ValueError, said):
            net.apply(params, stats, IMAGES, train=True)

    def test_branches_are_left_out_at_the_rate_of_their_block(self):
        """A rate of nearly 1 is as a block whose branch is zero."""
        keys = jax.random.split(jax.random.key(5), 4)
        plain, params, stats = made(how={"draws": True})
        params = {k: a + 1 if k.endswith("bias") else a for k, a in params.items()}
        for gone in (0, 2):
            rates = tuple(0.999999 * (block == gone) for block in range(3))
            found, _ = made(rates=rates)[0].apply(params, stats, IMAGES, train=True, key=keys)
            zero = {
                k: 0 * a if k.startswith(f"blocks.{gone}.map") else a for k, a in params.items()
            }
            expected, _ = plain.apply(zero, stats, IMAGES, train=True, key=keys)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
