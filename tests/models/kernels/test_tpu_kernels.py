"""Kernels for TPUs, run by JAX's interpreter, against the formulas that other platforms compute."""

import functools
import importlib.util
import json
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.doctor.programs import topology
from jaxrobust.models.kernels import (
    attention,
    channel_attention,
    convnext_layers,
    convolutions,
    layers,
    local_interaction,
    primitives,
    stem_layers,
)
from jaxrobust.models.kernels import talking_heads as heads_path
from jaxrobust.models.kernels.convnext_layers import BlockParameters, HalvingParameters
from jaxrobust.models.kernels.tpu import (
    batch_stem,
    calls,
    conv_stem,
    depthwise_norm,
    stem_blocks,
    token_attention,
    token_interaction,
    token_norm,
)
from jaxrobust.models.kernels.tpu import channel_attention as channels
from jaxrobust.models.kernels.tpu import convnext_block as block_kernel
from jaxrobust.models.kernels.tpu import norm_halving as halving_kernel
from jaxrobust.models.kernels.tpu import talking_heads as heads_kernel
from jaxrobust.runtime.devices import cpus
from tests.support import paths, sweeps
from tests.support.interpreted import PlatformRules, on_tpu

# In bfloat16 the plain formulas round probabilities, or what is normalized, before the backward
# pass reads them; the kernels keep float32, so a value of the gradient may be one step of bfloat16
# (2 ** -8 of the largest) and its rounding apart.
ROUNDED = 2 * 2.0**-8


def vjp(function, *operands):
    """Value and gradients for a random cotangent."""

    def run(*operands):
        value, pull = jax.vjp(function, *operands)
        g = jax.tree.map(lambda v: normal(9, *v.shape).astype(v.dtype), value)
        return value, pull(g)

    return jax.tree.leaves(jax.jit(run)(*operands))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def apart(results, expected):
    """The largest difference, as a share of the largest value of its array."""
    wide = [[np.asarray(a, np.float64) for a in arrays] for arrays in (results, expected)]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*wide, strict=True))


def exactly(function, *operands):
    """Value and gradients in float64."""
    with jax.enable_x64(True):
        return vjp(function, *(jnp.asarray(np.asarray(a), jnp.float64) for a in operands))


class KernelsTest(parameterized.TestCase):
    def compare(self, function, results, expected, *operands, which=()):
        """Sums are in another order: float32 is as close to float64 as the plain formula is."""
        exact = exactly(function, *operands)
        exact = [exact[i] for i in which] if which else exact
        if operands[0].dtype == jnp.bfloat16:  # XLA's own sums may be off by more, as JAX 0.12's
            self.assertLess(min(apart(results, expected), apart(results, exact)), ROUNDED)
            return
        self.assertLess(apart(results, exact), max(1e-6, 2 * apart(expected, exact)))

    def as_on_tpu(self, *modules):
        for patch in on_tpu(*modules):
            self.enter_context(patch)

    def both(self, module, function, *operands, free=None):
        """What XLA's path gives, and the kernel; one of any size if it is `free`."""
        expected = vjp(function, *operands)
        self.as_on_tpu(module)
        if free is not None:
            self.enter_context(mock.patch.object(free, "refused", lambda *_: None))
        results = vjp(lambda *arrays: function(*arrays), *operands)
        self.assertEqual([r.dtype for r in results], [e.dtype for e in expected])
        return expected, results

    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=((2, 65, 3, 64), (6, 49, 4, 32), (1, 197, 2, 96)),
    )
    def test_attention(self, dtype, case):
        batch, tokens, heads, width = case
        qkv = normal(0, batch, tokens, 3 * heads * width).astype(dtype)

        def function(x):
            return attention.self_attention(x, heads, scale=heads / 16)

        expected, results = self.both(attention, function, qkv)
        self.compare(function, results, expected, qkv)

    @parameterized.product(
        dtype=("float32", "bfloat16"), shape=((2, 49, 49), (1, 1, 49, 49), (4, 2, 49, 49))
    )
    def test_attention_with_a_bias(self, dtype, shape):
        qkv, bias = normal(0, 8, 49, 3 * 64).astype(dtype), normal(1, *shape)
        bias = bias.at[..., 0, 7].set(-jnp.inf)  # between strangers, in shifted windows

        def both(qkv, bias):
            return attention.self_attention(qkv, 2, bias=bias)

        def attacked(qkv):
            return both(qkv, bias)

        expected, alone = vjp(both, qkv, bias), vjp(attacked, qkv)
        self.as_on_tpu(attention)
        self.compare(both, vjp(both, qkv, bias), expected, qkv, bias)
        self.assertLess(apart(vjp(attacked, qkv), alone), ROUNDED if dtype == "bfloat16" else 1e-6)

    def test_biases_of_windows_beside_numbers_of_64_bits(self):
        qkv, bias = normal(0, 8, 49, 3 * 64), normal(1, 4, 2, 49, 49)
        with jax.enable_x64(True):  # every platform's path is traced
            out = jax.eval_shape(lambda *a: attention.self_attention(a[0], 2, bias=a[1]), qkv, bias)
        self.assertEqual((out.shape, out.dtype), ((8, 49, 64), jnp.float32))

    @sweeps.rows(
        (1025, 64, 1, "bfloat16", "1025 tokens of bfloat16 are more than 1024"),
        (897, 64, 1, "float32", "897 tokens of float32 are more than 896"),
        (9, 40, 1, "float32", "the head width 40 is not a multiple of 32"),
        (9, 64, 1, "float16", "float16 is neither float32 nor bfloat16"),
        (9, 64, 2, "float32", None),
    )
    def test_what_attention_does_not_take(self, tokens, dim, heads, dtype, reason):
        self.assertEqual(token_attention.refused(tokens, dim, heads, jnp.dtype(dtype)), reason)

    @parameterized.parameters(
        ("cifar_vit", "token_attention"),
        ("cifar_cpvt", "token_attention"),
        ("cifar_ceit", "token_attention"),
        ("cifar_cct", "token_attention"),
        ("cifar_coatnet", "token_attention"),
        ("cait_xxs24", "talking_heads"),
        ("xcit_n12", "channel_attention", "token_interaction_residual", "batch_stem_third"),
    )
    def test_networks_that_take_kernels(self, name, *kernels):
        size = 64 if name in ("xcit_n12", "cait_xxs24") else 32
        net = models.create(name, num_classes=10, image_size=size, dtype="bfloat16")
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        text = str(jax.make_jaxpr(lambda p, s, x: net.apply(p, s, x)[0])(*shapes, images))
        for kernel in kernels:
            self.assertIn(f"name={kernel}", text)

    @sweeps.fast(0, 2, 9)
    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=((2, 49, 8, 48), (3, 30, 4, 32), (1, 196, 2, 64), (2, 17, 3, 16), (2, 17, 4, 48)),
    )
    def test_channel_attention(self, dtype, case):
        batch, tokens, heads, width = case
        qkv = normal(0, batch, tokens, 3 * heads * width).astype(dtype)
        temperature = (3 + normal(1, heads, 1, 1)).astype(dtype)
        function = channel_attention.self_cross_covariance

        def attacked(qkv):
            return function(qkv, temperature)

        alone = vjp(attacked, qkv)
        expected, results = self.both(channel_attention, function, qkv, temperature)
        self.compare(function, results, expected, qkv, temperature)
        bound = ROUNDED if dtype == "bfloat16" else 2e-6  # as far as both are from float64
        self.assertLess(apart(vjp(lambda qkv: attacked(qkv), qkv), alone), bound)

    @sweeps.fast(0, 1, 4)
    @parameterized.product(
        dtype=("float32", "bfloat16"), case=((2, 49, 8, 48), (3, 30, 4, 24), (1, 196, 2, 64))
    )
    def test_talking_heads(self, dtype, case):
        batch, tokens, heads, width = case
        qkv = normal(0, batch, tokens, 3 * heads * width).astype(dtype)
        shapes = [(heads, heads), (heads,)] * 2
        mixes = [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes, 1)]

        def function(qkv, *mixes):
            return heads_path.talking_heads(qkv, mixes[:2], mixes[2:])

        def attacked(qkv):
            return function(qkv, *mixes)

        alone = vjp(attacked, qkv)
        expected, results = self.both(heads_path, function, qkv, *mixes)
        # No probability knows of the first mix's bias: its gradient is 0 but for rounding.
        self.assertFalse(np.asarray(results[3]).any())
        del results[3], expected[3]
        self.compare(function, results, expected, qkv, *mixes, which=(0, 1, 2, 4, 5))
        bound = ROUNDED if dtype == "bfloat16" else 2e-6  # as far as both are from float64
        self.assertLess(apart(vjp(lambda qkv: attacked(qkv), qkv), alone), bound)

    @sweeps.rows(
        (2500, 384, 8, "bfloat16", "2500 tokens of 384 channels are larger than .* of a chip"),
        (196, 384, 8, "float16", "float16 is neither float32 nor bfloat16"),
        (
            196,
            392,
            8,
            "float32",
            "392 channels are not a multiple of 32 and of 8 heads",
        ),
        (784, 384, 8, "bfloat16", "784 tokens of 384 channels are larger than .* of a chip"),
        (676, 384, 8, "bfloat16", None),
    )
    def test_what_talking_heads_do_not_take(self, tokens, dim, heads, dtype, reason):
        found = heads_kernel.refused(tokens, dim, heads, jnp.dtype(dtype))
        self.assertIsNone(found) if reason is None else self.assertRegex(found, reason)

    def test_channel_attention_of_a_channel_without_length(self):
        qkv = normal(0, 2, 9, 3 * 64).at[0, :, 2].set(0).at[1, :, 64 + 5].multiply(1e-14)
        temperature = 1 + normal(1, 2, 1, 1)
        function = channel_attention.self_cross_covariance
        expected, results = self.both(channel_attention, function, qkv, temperature)
        large = np.abs(expected[1]) > 1e6  # gradients that are divided by 1e-12
        self.assertTrue(large.any())
        for part in (large, ~large):
            both = (np.where(part, r[1], 0) for r in (results, expected))
            self.assertLess(apart(*([a] for a in both)), 2e-6)
        self.assertLess(apart(results[::2], expected[::2]), 2e-6)

    @sweeps.rows(
        (1600, 384, 8, "bfloat16", "1600 tokens of 384 channels are larger than .* of a chip"),
        (196, 384, 8, "float16", "float16 is neither float32 nor bfloat16"),
        (196, 385, 8, "float32", "8 heads do not divide 385 channels"),
        (784, 384, 8, "bfloat16", None),
    )
    def test_what_channel_attention_does_not_take(self, tokens, dim, heads, dtype, reason):
        found = channels.refused(tokens, dim, heads, jnp.dtype(dtype))
        self.assertIsNone(found) if reason is None else self.assertRegex(found, reason)

    @sweeps.fast(0, 2, 7)
    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=((2, 7, 7, 96, 7), (1, 8, 12, 136, 7), (2, 14, 6, 40, 3), (1, 5, 9, 128, 5)),
    )
    def test_depthwise_norm(self, dtype, case):
        batch, height, width, channels, side = case
        x = normal(0, batch, height, width, channels).astype(dtype)
        parameters = [normal(1, side, side, 1, channels) / side]
        parameters += [normal(seed, channels) for seed in (2, 3, 4)]
        parameters = [p.astype(dtype) for p in parameters]
        function = convnext_layers.depthwise_norm
        expected, results = self.both(convnext_layers, function, x, *parameters)
        self.compare(function, results, expected, x, *parameters)
        attacked = vjp(lambda x: function(x, *parameters), x)
        self.assertLess(apart(attacked, results[:3]), ROUNDED if dtype == "bfloat16" else 1e-6)

    @sweeps.rows(
        ((1, 8, 8, 32), (7, 5), "float32", "a window of 7x5 is not square and odd"),
        ((1, 8, 8, 32), (4, 4), "float32", "a window of 4x4 is not square and odd"),
        ((1, 8, 8, 32), (7, 7), "float16", "float16 is neither float32 nor bfloat16"),
        ((1, 96, 96, 192), (7, 7), "bfloat16", "an image of 96x96x192 is larger than .* of a chip"),
    )
    def test_what_depthwise_norm_does_not_take(self, shape, window, dtype, reason):
        x = jax.ShapeDtypeStruct(shape, dtype)
        kernel = jax.ShapeDtypeStruct((*window, 1, shape[3]), jnp.float32)
        self.assertRegex(depthwise_norm.refused(x, kernel), reason)

    def interaction(self, dtype, side, dim):
        shapes = (dim,), (dim,), (side, side, 1, dim), (dim,)
        shapes = *shapes, (dim,), (dim,), *shapes[2:], (dim,)
        parameters = [normal(i, *shape) / (len(shape) + 1) for i, shape in enumerate(shapes)]
        return local_interaction.Interaction(*(p.astype(dtype) for p in parameters))

    @sweeps.fast(0, 3, 13)
    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=(
            (6, 4, 3, 40, 3, 2),
            (2, 7, 7, 200, 3, 0),
            (2, 6, 9, 128, 5, 1),
            (2, 5, 4, 24, 3, -1),
        ),
        drop=(False, True),
    )
    def test_local_interaction(self, dtype, case, drop):
        """In bfloat16 the plain formula rounds six arrays in each direction, the kernels two: they
        must be as close to float64.
        """
        batch, height, width, dim, side, group = case
        parameters = self.interaction(dtype, side, dim)
        x = normal(10, batch, height * width, dim).astype(dtype)
        statistics = (normal(11, dim) / 9, 1 + normal(12, dim) ** 2) if group < 0 else None
        path = functools.partial(layers.drop_path, key=jax.random.key(3), rate=0.3)
        how = {"width": width, "group": 64 if group < 0 else group}

        def function(x, *parameters):
            parameters = local_interaction.Interaction(*parameters)
            drawn, wide = path if drop else None, x.dtype if x.dtype == jnp.float64 else jnp.float32
            given = jax.tree.map(lambda s: s.astype(wide), statistics)
            out = local_interaction.local_interaction(x, parameters, given, drawn, **how)
            return out[0], *jax.tree.map(jax.lax.stop_gradient, out[1])

        exact = exactly(function, x, *parameters)
        expected, results = self.both(local_interaction, function, x, *parameters)
        for part in (slice(4), slice(4, None)):
            own, plain = (apart(r[part], exact[part]) for r in (results, expected))
            least = 2e-6 if dtype == "float32" else ROUNDED
            self.assertLess(own, max(least, 2 * plain))
        attacked = vjp(lambda x: function(x, *parameters), x)
        self.assertLess(apart(attacked, results[:4]), 1e-6 if dtype == "float32" else ROUNDED)

    def test_groups_that_do_not_divide_a_batch_are_refused_by_every_path(self):
        """A kernel would fail with a sentence about shapes."""
        layers = (stem_layers.BatchLayer(None, None, None),) * 2
        parameters = local_interaction.Interaction(*[None] * 9)
        shape = jax.ShapeDtypeStruct((6, 4, 4, 3), jnp.float32)
        self.as_on_tpu(local_interaction, stem_layers)
        for group in (4, 12, -1):
            for run in (
                lambda x, n=group: local_interaction.local_interaction(
                    x, parameters, None, width=2, group=n
                ),
                lambda x, n=group: stem_layers.batch_stem_layers(x, layers, None, group=n),
            ):
                with self.assertRaisesRegex(
                    ValueError, f"^group={group} does not divide the batch of 6; give a divisor"
                ):
                    jax.eval_shape(run, shape)

    def block(self, dtype, batch, height, width, channels, side):
        hidden, c = 4 * channels, (channels,)
        shapes = (side, side, 1, *c), c, c, c, (*c, hidden), (hidden,), (hidden, *c), c, c
        parameters = [normal(i, *shape) for i, shape in enumerate(shapes)]
        for i, inputs in ((0, side), (4, channels**0.5), (6, hidden**0.5)):
            parameters[i] /= inputs
        x = normal(9, batch, height, width, channels)
        return [a.astype(dtype) for a in (x, *parameters)]

    def test_convnext_block_of_few_pixels(self):
        self.check_convnext_block("bfloat16", (2, 4, 8, 32, 3), drops=False)

    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=((4, 7, 7, 32, 7), (2, 14, 14, 96, 7), (1, 8, 24, 160, 5), (1, 16, 32, 32, 3)),
        drops=(False, True),
    )
    @pytest.mark.slow
    def test_convnext_block(self, dtype, case, drops):
        self.check_convnext_block(dtype, case, drops)

    def check_convnext_block(self, dtype, case, drops):
        """In bfloat16 the plain formula rounds seven arrays on the way there, the kernel four: its
        value and image gradient must be as close to float64, and its sums over few pixels, in which
        the kept convolution is rounded in both, within a quarter.
        """
        x, *parameters = self.block(dtype, *case)
        share = jnp.asarray([1.25, 0, 1.25, 0][: len(x)], jnp.float32) if drops else None

        def function(x, *parameters):
            path = None if share is None else lambda y: y * share.astype(y.dtype)
            return convnext_layers.convnext_block(x, BlockParameters(*parameters), path)

        def plain(x, *parameters):
            return convnext_layers._plain_block(x, share, *parameters, eps=1e-6)

        expected, exact = vjp(plain, x, *parameters), exactly(plain, x, *parameters)
        self.as_on_tpu(convnext_layers)
        self.enter_context(mock.patch.object(block_kernel, "refused", lambda *_: None))
        results = vjp(lambda *operands: function(*operands), x, *parameters)
        self.assertEqual([r.dtype for r in results], [e.dtype for e in expected])
        if dtype == "float32":
            self.assertLess(apart(results, exact), max(1e-6, 2 * apart(expected, exact)))
        else:
            self.assertLess(apart(results[:2], exact[:2]), apart(expected[:2], exact[:2]))
            self.assertLess(apart(results[2:], exact[2:]), 1.25 * apart(expected[2:], exact[2:]))
        # The same sums in another program, of which XLA may fuse the interpreter's operations
        # otherwise: a rounding of float32 where nothing is rounded to bfloat16.
        attacked = vjp(lambda x: function(x, *parameters), x)
        self.assertLess(apart(attacked, results[:2]), 1e-6 if dtype == "float32" else ROUNDED)
        alone = jax.jit(lambda x: function(x, *parameters))(x)
        self.assertLess(apart([alone], results[:1]), 1e-6 if dtype == "float32" else ROUNDED)

    def test_a_block_without_a_layer_scale_is_one_of_ones(self):
        x, *parameters = self.block("float32", 1, 3, 4, 8, 3)
        p = BlockParameters(*parameters)
        ones, none = p._replace(gamma=jnp.ones(8)), p._replace(gamma=None)
        blocks = [lambda x, p=p: convnext_layers.convnext_block(x, p) for p in (ones, none)]
        by_steps = jax.jit(lambda x: [block(x) for block in blocks])(x)

        lax = PlatformRules(convnext_layers.lax, "default")
        with (
            mock.patch.object(block_kernel, "refused", lambda *_: None),
            mock.patch.object(convnext_layers, "lax", lax),
        ):
            at_once = jax.jit(lambda x: [block(x) for block in blocks])(x)
        for found in (*by_steps[1:], *at_once):
            np.testing.assert_allclose(found, by_steps[0], rtol=1e-6, atol=1e-6)

    def test_the_image_gradient_of_depthwise_norm_is_the_same_alone(self):
        x, z, g, beside = (normal(i, 1, 3, 4, 8) for i in range(4))
        parameters = normal(4, 3, 3, 1, 8), *(normal(i, 8) for i in (5, 6, 7))

        def gradients(needed):
            rest = {"eps": 1e-6, "needed": needed}
            return convnext_layers._plain_norm_gradients(x, z, g, beside, *parameters, **rest)

        (alone,), (first, *others) = jax.jit(lambda: (gradients(False), gradients(True)))()
        np.testing.assert_allclose(alone, first, rtol=1e-6, atol=1e-6)
        self.assertEqual([o.shape for o in others], [p.shape for p in parameters])

    @parameterized.parameters("float32", "bfloat16")
    def test_a_convnext_block_elsewhere_is_its_layers(self, dtype):
        x, *parameters = self.block(dtype, 2, 7, 7, 32, 7)
        results = vjp(
            lambda x, *p: convnext_layers.convnext_block(x, BlockParameters(*p)), x, *parameters
        )
        plain = functools.partial(convnext_layers._plain_block, eps=1e-6)
        expected = vjp(lambda x, *p: plain(x, None, *p), x, *parameters)
        for result, right in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, right)

    @parameterized.parameters(
        ("float32", (1, 7, 7, 32), "cpu", "float32 is not bfloat16"),
        ("bfloat16", (1, 7, 7, 40), "cpu", "160 hidden channels are not a multiple of 128"),
        ("bfloat16", (1, 96, 96, 192), "cpu", "an image of 96x96x192 is larger than .* of a chip"),
        ("bfloat16", (88, 7, 7, 1536), "cpu", "7x7 with its weights is larger than .* of a chip"),
        ("bfloat16", (88, 7, 7, 768), "TPU v4", "7x7 with its weights is larger than .* a chip"),
        ("bfloat16", (88, 7, 7, 1024), "cpu", None),
        ("bfloat16", (88, 14, 14, 384), "TPU v4", None),
    )
    def test_what_convnext_block_does_not_take(self, dtype, shape, chip, reason):
        x, *parameters = jax.eval_shape(lambda: self.block(dtype, *shape, 7))
        chips = [mock.Mock(device_kind=chip)]
        with mock.patch.object(calls.jax, "devices", lambda: chips):
            found = block_kernel.refused(x, BlockParameters(*parameters))
        self.assertIsNone(found) if reason is None else self.assertRegex(found or "", reason)

    @sweeps.rows(
        ((1, 196, 384), (3, 5), "float32", "a window of 3x5 is not square and odd"),
        ((1, 196, 384), (4, 4), "float32", "a window of 4x4 is not square and odd"),
        ((1, 196, 384), (3, 3), "float16", "float16 is neither float32 nor bfloat16"),
        ((1, 3136, 384), (3, 3), "bfloat16", "3136 tokens of 384 channels are larger than .* chip"),
        ((1, 784, 384), (3, 3), "bfloat16", None),
    )
    def test_what_the_exchange_between_neighbours_does_not_take(self, shape, window, dtype, reason):
        x = jax.ShapeDtypeStruct(shape, dtype)
        taps = jax.ShapeDtypeStruct((*window, 1, shape[2]), jnp.float32)
        found = token_interaction.refused(x, taps, 14)
        self.assertIsNone(found) if reason is None else self.assertRegex(found, reason)

    def halving(self, dtype, batch, height, width, ins, outs):
        shapes = (ins,), (ins,), (2, 2, ins, outs), (outs,)
        parameters = [normal(i, *shape) for i, shape in enumerate(shapes)]
        parameters[2] /= 2 * ins**0.5
        x = normal(9, batch, height, width, ins)
        return [a.astype(dtype) for a in (x, *parameters)]

    @sweeps.fast(0, 4)
    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=((4, 14, 14, 32, 64), (2, 8, 56, 160, 40), (3, 6, 10, 24, 8)),
    )
    def test_norm_halving(self, dtype, case):
        x, *parameters = self.halving(dtype, *case)

        def function(x, *parameters):
            return convnext_layers.norm_halving(x, HalvingParameters(*parameters), stride=2)

        expected, results = self.both(
            convnext_layers, function, x, *parameters, free=halving_kernel
        )
        plain = functools.partial(convnext_layers._plain_halving, stride=2, eps=1e-6)
        self.compare(plain, results, expected, x, *parameters)
        attacked = vjp(lambda x: function(x, *parameters), x)
        self.assertLess(apart(attacked, results[:2]), 1e-6 if dtype == "float32" else ROUNDED)

    @sweeps.rows(
        ("float32", 8, 2, 2, "float32 is not bfloat16"),
        ("bfloat16", 8, 2, 1, "its windows are not 2x2 with stride 2"),
        ("bfloat16", 8, 3, 2, "its windows are not 2x2 with stride 2"),
        ("bfloat16", 9, 2, 2, "9x8 px are not even"),
        ("bfloat16", 8, 2, 2, None),
    )
    def test_what_norm_halving_does_not_take(self, dtype, height, side, stride, reason):
        x, *parameters = jax.eval_shape(lambda: self.halving(dtype, 2, height, 8, 32, 64))
        p = HalvingParameters(*parameters)
        p = p._replace(kernel=jax.ShapeDtypeStruct((side, side, 32, 64), dtype))
        self.assertEqual(halving_kernel.refused(x, p, stride), reason)

    def stem(self, dtype, height, width, c, d):
        shapes = (3, 3, 3, c), (c,), (c,), (c,), (3, 3, c, d), (d,), (d,), (d,)
        parameters = [normal(i, *shape) / (len(shape) + 1) for i, shape in enumerate(shapes)]
        x = normal(9, 2, height, width, 3)
        return [a.astype(dtype) for a in (x, *parameters)]

    def test_conv_stem_of_few_pixels(self):
        self.check_conv_stem("float32", (32, 8, 16, 16))

    @parameterized.product(
        dtype=("float32", "bfloat16"), case=((32, 48, 16, 32), (64, 256, 16, 16), (32, 32, 48, 96))
    )
    @pytest.mark.slow
    def test_conv_stem(self, dtype, case):
        self.check_conv_stem(dtype, case)

    def check_conv_stem(self, dtype, case):
        """In bfloat16 the plain formula rounds six arrays on the way there and six on the way
        back, the kernel two of each: it must be as close to float64, in sums over few pixels too.
        """
        x, *parameters = self.stem(dtype, *case)
        function = stem_layers.stem_layers
        exact = exactly(function, x, *parameters)
        expected, results = self.both(stem_layers, function, x, *parameters, free=conv_stem)
        own, plain = (
            [apart(r[:2], exact[:2]), apart(r[2:], exact[2:])] for r in (results, expected)
        )
        if dtype == "float32":
            self.assertLess(max(own), max(1e-6, 2 * max(plain)))
        else:
            self.assertLess(own[0], ROUNDED)
            self.assertLess(own[1], plain[1])
        # The same kernel in another program, of which XLA may fuse the interpreter's operations
        # otherwise: a rounding of float32 where nothing is rounded to bfloat16.
        attacked = vjp(lambda x: function(x, *parameters), x)
        self.assertLess(apart(attacked, results[:2]), 1e-6 if dtype == "float32" else ROUNDED)

    def test_batch_stem_of_few_pixels(self):
        self.check_batch_stem("bfloat16", (32, 8, 16, 16, -1))

    @parameterized.product(
        dtype=("float32", "bfloat16"),
        case=((32, 48, 16, 32, 2), (64, 256, 16, 16, 0), (32, 32, 48, 96, -1)),
    )
    @pytest.mark.slow
    def test_batch_stem(self, dtype, case):
        self.check_batch_stem(dtype, case)

    def check_batch_stem(self, dtype, case):
        """In bfloat16 the plain formula rounds six arrays on the way there and six on the way
        back, the kernels two of each: they must be as close to float64.
        """
        *sizes, group = case
        x, *parameters = self.stem(dtype, *sizes)
        x, parameters = jnp.concatenate([x, x[::-1] ** 2]), [*parameters[:3], *parameters[4:7]]
        widths = sizes[2:]
        statistics = [(normal(i, n) / 9, 1 + normal(i + 2, n) ** 2) for i, n in enumerate(widths)]

        def function(x, *parameters):
            layers = (stem_layers.BatchLayer(*parameters[i : i + 3]) for i in (0, 3))
            wide = x.dtype if x.dtype == jnp.float64 else jnp.float32
            given = jax.tree.map(lambda s: s.astype(wide), (*statistics,)) if group < 0 else None
            how = {"group": 64 if group < 0 else group}
            out, moved = stem_layers.batch_stem_layers(x, (*layers,), given, **how)
            return out, *jax.tree.leaves(jax.lax.stop_gradient(moved))

        exact = exactly(function, x, *parameters)
        expected, results = self.both(stem_layers, function, x, *parameters, free=batch_stem)
        for part in (slice(6), slice(6, None)):
            own, plain = (apart(r[part], exact[part]) for r in (results, expected))
            least = 2e-6 if dtype == "float32" else ROUNDED
            self.assertLess(own, max(least, 2 * plain if dtype == "float32" else plain))
        attacked = vjp(lambda x: function(x, *parameters), x)
        self.assertLess(apart(attacked, results[:6]), 1e-6 if dtype == "float32" else ROUNDED)

    @parameterized.parameters("float32", "bfloat16")
    def test_a_conv_stem_elsewhere_is_its_layers(self, dtype):
        x, *parameters = self.stem(dtype, 32, 32, 16, 32)
        results = vjp(stem_layers.stem_layers, x, *parameters)
        expected = vjp(stem_layers._plain, x, *parameters)
        for result, right in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, right)

    @sweeps.rows(
        ("float32", 224, 224, 48, 96, "float32 is not bfloat16"),
        ("bfloat16", 224, 224, 48, 100, "its channels are not multiples of 16"),
        ("bfloat16", 240, 224, 48, 96, "240x224 px are not multiples of 32 and 4, .* most 256"),
        ("bfloat16", 224, 260, 48, 96, "224x260 px are not multiples of 32 and 4, .* most 256"),
        ("bfloat16", 512, 256, 48, 96, "512x256 px are too large for the fast memory of a chip"),
        ("bfloat16", 224, 224, 96, 144, None),
    )
    def test_what_conv_stem_does_not_take(self, dtype, height, width, c, d, reason):
        x, *parameters = jax.eval_shape(lambda: self.stem(dtype, height, width, c, d))
        found = conv_stem.refused(x, *parameters)
        self.assertIsNone(found) if reason is None else self.assertRegex(found, reason)
        wide = jax.ShapeDtypeStruct((1, 224, 224, 4), "bfloat16")
        self.assertIn("on images with 3 channels", conv_stem.refused(wide, *parameters) or "")

    def test_gelu_of_the_conv_stem(self):
        with jax.enable_x64(True):
            x = jnp.linspace(-12, 12, 100001, dtype=jnp.float64)
            for formula in (stem_blocks.gelu, stem_blocks.gelu_slope):
                self.assertLess(np.abs(formula(x, False) - formula(x, True)).max(), 4e-6)
        ends = jnp.asarray([-(2.0**99), 0, 2.0**99])
        np.testing.assert_array_equal(stem_blocks.gelu(ends, False), [0, 0, 2.0**99])

    @parameterized.product(dtype=("float32", "bfloat16"), drop=(False, True))
    def test_linear_residual(self, dtype, drop):
        """In bfloat16 the plain formula rounds the branch before and after its scale, the other
        the scaled kernel: it must be about as close to float64.
        """
        shapes = (6, 9, 24), (6, 9, 40), (40, 24), (24,), (24,)
        operands = [
            (normal(i, *shape) / len(shape)).astype(dtype) for i, shape in enumerate(shapes)
        ]
        path = functools.partial(layers.drop_path, key=jax.random.key(3), rate=0.3)

        def function(*operands):
            return layers.linear_residual(*operands, path if drop else None)

        exact = exactly(function, *operands)
        expected, results = self.both(layers, function, *operands)
        for own, plain, right in zip(results, expected, exact, strict=True):
            least = 1e-6 if dtype == "float32" else ROUNDED
            self.assertLess(apart([own], [right]), max(least, 2 * apart([plain], [right])))

    @parameterized.product(
        dtype=("float32", "bfloat16"),
        # More rows than stay in registers, several images at once, rows of a map, more than a step.
        shape=((2, 197, 192), (6, 5, 40), (2, 7, 7, 96), (12, 300, 768)),
    )
    def test_norm_and_tokens(self, dtype, shape):
        """The attack's gradient is that of training; what comes back to the tokens is added."""
        x = (3 * normal(0, *shape) + 1).astype(dtype)
        affine = [(1 + normal(i, shape[-1]) / 4).astype(dtype) for i in (1, 2)]
        function = layers.norm_and_tokens

        expected, results = self.both(layers, function, x, *affine)
        self.compare(function, results, expected, x, *affine)
        attacked = vjp(lambda x: function(x, *affine), x)
        if len(shape) == 3:
            alone, (value, *_) = layers.layer_norm, results
            results = vjp(lambda *operands: alone(*operands), x, *affine)
            np.testing.assert_array_equal(results[0], value)
            with mock.patch.object(token_norm, "refused", lambda x: "it is compared"):
                expected = vjp(lambda *operands: alone(*operands), x, *affine)
            self.compare(alone, results, expected, x, *affine)
            attacked = [None, *vjp(lambda x: alone(x, *affine), x)]
            results = [None, *results]
        self.assertLess(apart(attacked[2:], results[2:3]), 1e-6 if dtype == "float32" else ROUNDED)

    @sweeps.rows(
        ((8, 384), "bfloat16", r"\(8, 384\) has fewer than 4 tokens in a row"),
        ((8, 1, 384), "bfloat16", "has fewer than 4 tokens in a row"),
        ((8, 197, 384), "float16", "float16 is neither float32 nor bfloat16"),
        ((8, 197, 4096), "bfloat16", "197 tokens of width 4096 are too many for a step"),
        ((8, 4096, 768), "bfloat16", "4096 tokens of width 768 are too many"),
        ((8, 7, 7, 384), "float32", None),
    )
    def test_what_a_norm_of_tokens_does_not_take(self, shape, dtype, reason):
        found = token_norm.refused(jax.ShapeDtypeStruct(shape, dtype))
        self.assertIsNone(found) if reason is None else self.assertRegex(found, reason)

    @parameterized.parameters((16, 16, 3, 8, True), (12, 4, 5, 6, True), (9, 2, 3, 4, False))
    @mock.patch.object(cpus, "kind", lambda: cpus.KINDS[1])  # where products are not convolutions
    def test_patches_are_products(self, size, side, ins, outs, product):
        x, kernel = normal(0, 2, size, size, ins), normal(1, side, side, ins, outs)
        convolve = functools.partial(convolutions.conv, stride=side)
        expected = vjp(convolve, x, kernel)
        self.as_on_tpu(convolutions)
        self.assertLess(apart(vjp(convolve, x, kernel), expected), 1e-6)
        text = str(jax.make_jaxpr(convolve)(x, kernel))
        self.assertEqual("conv_general_dilated" not in text, product)

    def test_what_takes_the_plain_path_is_said_once_on_a_tpu(self):
        x = normal(0, 1, 5, 3 * 40)
        primitives._say_once.cache_clear()
        with (
            mock.patch.object(primitives.jax, "default_backend", lambda: "tpu"),
            mock.patch.object(primitives, "say") as say,
        ):
            for _ in range(2):
                attention.self_attention(x, 1)
        say.assert_called_once_with(
            "attention falls back to XLA: the head width 40 is not a multiple of 32"
        )

    def test_images_of_a_step_have_512_tokens_and_divide_the_batch_and_the_windows(self):
        for batch, tokens, period, expected in (
            (8, 49, 1, 8),  # ten would do
            (64, 49, 1, 8),
            (64, 49, 16, 8),
            (64, 49, 4, 4),
            (7, 128, 1, 1),
            (8, 256, 1, 2),
            (8, 257, 1, 1),
            (8, 4000, 1, 1),
        ):
            bias = [jax.ShapeDtypeStruct((period, 1, tokens, tokens), "float32")] * (period > 1)
            qkv = jax.ShapeDtypeStruct((batch, tokens, 96), "bfloat16")
            attend = functools.partial(token_attention.forward, heads=1, scale=1)
            with mock.patch.object(token_attention, "over_images") as run:
                run.return_value = [jnp.zeros(())]
                jax.eval_shape(attend, qkv, *bias)
            self.assertEqual(run.call_args[1]["per"], expected, (batch, tokens, period))

    def test_cycles_by_hand(self):
        # 197 rows through two tiles of keys, four units: 98.5 cycles.
        self.assertEqual(calls.product(197, 64, 197), (2 * 197 * 64 * 197, 0, 98.5))
        self.assertEqual(calls.elementwise(56, 96, 2), (56 * 96 * 2, 0, 3.5))
        both = calls.product(1, 1, 1) + calls.elementwise(1, 1, 4, powers=1)
        self.assertEqual(both * 2, (12, 2, 4.5))


COMPILE = """
import sys
from jaxrobust.doctor.programs import hlo, hlo_costs, topology
chips = topology.devices(sys.argv[1])
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxrobust.models.kernels import (
    attention, channel_attention, convnext_layers, layers, local_interaction,
    stem_layers, talking_heads,
)
mesh = Mesh(np.array(chips[:1]), ("x",))
def array(*shape):
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, sys.argv[2], sharding=sharding)
def both(function):
    return jax.jit(lambda x: (lambda y, pull: pull(y))(*jax.vjp(function, x)))
def norm(x):
    channels = x.shape[3]
    taps, ones = jnp.ones((7, 7, 1, channels), x.dtype), jnp.ones(channels, x.dtype)
    return convnext_layers.depthwise_norm(x, taps, ones, ones, ones)
def ones(*shape):
    return jnp.ones(shape, sys.argv[2])
def block(x, scale=None):
    c, d = x.shape[3], 4 * x.shape[3]
    scale = ones(c) if scale is None else scale
    parameters = ones(7, 7, 1, c), ones(c), scale, ones(c), ones(c, d), ones(d), ones(d, c)
    p = convnext_layers.BlockParameters(*parameters, ones(c), ones(c))
    return convnext_layers.convnext_block(x, p)
def halving(x, scale=None):
    c = x.shape[3]
    scale = ones(c) if scale is None else scale
    p = convnext_layers.HalvingParameters(scale, ones(c), ones(2, 2, c, 2 * c), ones(2 * c))
    return convnext_layers.norm_halving(x, p, stride=2)
def stem(x, taps=None):
    taps = ones(3, 3, 3, 48) if taps is None else taps
    norms = [[ones(n)] * 3 for n in (48, 96)]
    return stem_layers.stem_layers(x, taps, *norms[0], ones(3, 3, 48, 96), *norms[1])
def interaction(x, taps=None):
    n = x.shape[2]
    taps = ones(3, 3, 1, n) if taps is None else taps
    rows = [ones(n)] * 7
    parameters = local_interaction.Interaction(*rows[:2], taps, *rows[2:5], taps, *rows[5:])
    return local_interaction.local_interaction(x, parameters, None, width=14)[0]
def batch_stem(x, taps=None):
    taps = ones(3, 3, 3, 48) if taps is None else taps
    layers = ((taps, ones(48), ones(48)), (ones(3, 3, 48, 96), ones(96), ones(96)))
    layers = tuple(stem_layers.BatchLayer(*layer) for layer in layers)
    return stem_layers.batch_stem_layers(x, layers, None)[0]
def tokens(x, scale=None):
    scale = ones(x.shape[-1]) if scale is None else scale
    y, x = layers.norm_and_tokens(x, scale, ones(x.shape[-1]))
    return x * y
def talking(x, kernel=None):
    kernel = ones(8, 8) if kernel is None else kernel
    heads = ones(len(kernel))
    return talking_heads.talking_heads(x, (kernel, heads), (kernel, heads))
found = []
jax.config.update("jax_default_matmul_precision", sys.argv[3])
for function, x in (
    (functools.partial(attention.self_attention, heads=6), array(8, 197, 1152)),
    (functools.partial(attention.self_attention, heads=2), array(2, int(sys.argv[4]), 384)),
    (lambda x: channel_attention.self_cross_covariance(x, ones(8, 1, 1)), array(8, 196, 1152)),
    (norm, array(4, 56, 56, 96)),
    (norm, array(4, 7, 7, 768)),
    (stem, array(4, 224, 224, 3)),
    (lambda taps: stem(ones(4, 224, 224, 3), taps), array(3, 3, 3, 48)),
    (interaction, array(4, 196, 384)),
    (lambda taps: interaction(ones(4, 196, 768), taps), array(3, 3, 1, 768)),
    (batch_stem, array(4, 224, 224, 3)),
    (lambda taps: batch_stem(ones(4, 224, 224, 3), taps), array(3, 3, 3, 48)),
    (block, array(4, 56, 56, 96)),
    (lambda scale: block(ones(4, 14, 14, 384), scale), array(384)),
    (halving, array(4, 56, 56, 96)),
    (lambda scale: halving(ones(4, 14, 14, 384), scale), array(384)),
    (block, array(4, 7, 7, 768)),
    (tokens, array(8, 197, 384)),
    (lambda scale: tokens(ones(8, 784, 384), scale), array(384)),
    (tokens, array(4, 7, 7, 1024)),
    (talking, array(4, 196, 1152)),
    (lambda kernel: talking(ones(4, 196, 576), kernel), array(4, 4)),
):
    with jax.set_mesh(mesh):
        lowered = both(function).lower(x)
    module = hlo.parse(lowered.compile().as_text())
    found += [(k.name, k.calls, k.cycles > 0) for k in hlo_costs.kernels(module)]
print(json.dumps(found))
"""


@pytest.mark.slow
@absltest.skipIf(importlib.util.find_spec("libtpu") is None, "pip install -e '.[test,tpu-aot]'")
class CompiledTest(parameterized.TestCase):
    @parameterized.product(
        slice_=("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
        how=(
            ("bfloat16", "default", "1024"),
            ("bfloat16", "highest", "8"),
            ("float32", "default", "896"),
            ("float32", "highest", "896"),
        ),
    )
    def test_compile(self, slice_, how):
        """In what attacks search with, and in the exact products that decide."""
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, slice_, *how],
            cwd=paths.ROOT,
            env={**topology.ENVIRONMENT, "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        norm = [["depthwise_norm", 1, True], ["depthwise_norm_gradient", 1, True]]
        tokens = [["token_attention", 1, True], ["token_attention_gradient", 1, True]]
        names = ["conv_stem", "conv_stem_gradient", "conv_stem", "conv_stem_sums"]
        batch = [f"batch_stem_{name}" for name in ("first", "first_sums", "second", "second_sums")]
        batch += ["batch_stem_third"]
        more = [sorted([*batch, f"batch_stem_{name}"]) for name in ("gradient", "sums")]
        stem = [[[name, 1, True] for name in part] for part in (names, [*more[0], *more[1]])]
        channel = [["channel_attention", 1, True], ["channel_attention_gradient", 1, True]]
        names = "", "_gradient", "_residual", "_sums"
        interaction = [[f"token_interaction{name}", 1, True] for name in names] * 2
        names = "", "_gradient", "", "_sums"
        block = [[f"convnext_block{name}", 1, True] for name in names]
        halving = [[f"norm_halving{name}", 1, True] for name in names]
        # Float32 takes XLA's path, or the smaller kernel, whose gradient the one of a layer scale
        # does not need.
        if how[0] == "float32":
            stem, block, halving = [[], []], [*norm, norm[0]], []
        expected = [*tokens, *tokens, *channel, *norm, *norm, *stem[0], *interaction, *stem[1]]
        # The weights of the last stage are too large for a v4, and so are the sums of the halving.
        small = slice_.startswith("v4")
        last, halving = (norm, halving[:2]) if small else (block[:2], halving)
        names = "", "_gradient", "", "_sums", "", "_gradient"
        tokens = [[f"token_norm{name}", 1, True] for name in names]
        names = "", "_gradient", "", "_sums"
        heads = [[f"talking_heads{name}", 1, True] for name in names]
        self.assertEqual(found, [*expected, *block, *halving, *last, *tokens, *heads])
