"""Kernels for Hopper GPUs, run by Mosaic's interpreter with its detector of races."""

import functools
import os
import re
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from jaxrobust import models
from jaxrobust.models.families import vit
from jaxrobust.models.kernels import convnext_layers, layers
from jaxrobust.models.kernels.convnext_layers import BlockParameters
from jaxrobust.models.kernels.cuda import fused_attention, hopper
from jaxrobust.models.kernels.tpu import interpreted
from jaxrobust.models.modules.draws import Draws
from tests.support.interpreted import PlatformRules

OLD = jax.__version_info__[:2] < (0, 12)
SHARE = jnp.asarray([0, 1.25, 1.25, 0, 1.25, 1.25])  # stochastic depth of six images


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def parameters(channels, hidden):
    vectors = [normal(seed, channels) for seed in range(5)]
    return BlockParameters(
        normal(5, 3, 3, 1, channels) / 3,
        *(vectors[0], 1 + vectors[1] / 4, vectors[2] / 2),
        *(normal(6, channels, hidden) / channels**0.5, normal(7, hidden) / 4),
        *(normal(8, hidden, channels) / hidden**0.5, vectors[3], vectors[4]),
    )


def block(x, *p, drops):
    path = (lambda y: y * SHARE.astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))) if drops else None
    return convnext_layers.convnext_block(x, BlockParameters(*p), path)


def vjp(function, *operands):
    value, pull = jax.vjp(function, *operands)
    return [value, *pull(normal(9, *value.shape).astype(value.dtype))]


def errors(results, exact):
    """The largest difference of each array, as a share of its largest value."""
    wide = [[np.asarray(a, np.float64) for a in arrays] for arrays in (results, exact)]
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*wide, strict=True)]


class HopperKernelsTest(parameterized.TestCase):
    @unittest.skipIf(OLD, "JAX 0.12 is the first whose interpreter runs these kernels")
    @parameterized.parameters(
        ("float32", 32, 128, True, 1),
        ("bfloat16", 96, 384, True, 1),
        ("bfloat16", 192, 256, False, 1000),
        ("float32", 192, 256, False, 1000),
    )
    def test_block(self, dtype, channels, hidden, drops, size):
        from jaxrobust.models.kernels.cuda import convnext_mlp

        function = functools.partial(block, drops=drops)
        x = size * normal(0, 6, 8, 8, channels)
        operands = [a.astype(dtype) for a in (x, *parameters(channels, hidden))]
        attacked = lambda x: function(x, *operands[1:])  # noqa: E731
        expected = [*vjp(function, *operands), *vjp(attacked, operands[0])]
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in operands]
            exact = vjp(function, *wide)
        rules = PlatformRules(convnext_layers.lax, "cuda")
        with (
            mock.patch.object(convnext_layers, "lax", rules),
            mock.patch.object(hopper, "takes", lambda *_: True),
            mock.patch.object(convnext_mlp, "PROCESSORS", 1),  # so slots of tiles are used again
            interpreted(True),
        ):
            results = [*vjp(function, *operands), *vjp(attacked, operands[0])]
        self.assertEqual([r.dtype for r in results], [e.dtype for e in expected])
        exact += exact[:2]
        pairs = zip(errors(results, exact), errors(expected, exact), strict=True)
        for i, (error, plain) in enumerate(pairs):
            with self.subTest(array=i):
                self.assertLess(error, max(1e-6, 2 * plain))

    @parameterized.parameters(
        (
            "NVIDIA A100-SXM4-80GB",
            "bfloat16",
            96,
            384,
            128,
            "NVIDIA A100-SXM4-80GB is not a Hopper GPU",
        ),
        ("NVIDIA H200", "float32", 96, 384, 128, "float32 is not bfloat16"),
        (
            "NVIDIA H200",
            "bfloat16",
            384,
            1536,
            128,
            "the channel count 384 is not one of 96, 128, 192",
        ),
        ("NVIDIA H200", "bfloat16", 96, 96, 128, "96 hidden channels are not a multiple of 128"),
        ("NVIDIA H200", "bfloat16", 96, 384, 196, "196 pixels are not a multiple of 128"),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 96, 384, 128, None),
        ("NVIDIA GH200 480GB", "bfloat16", 192, 768, 256, None),
    )
    def test_what_the_kernel_takes(self, kind, dtype, channels, hidden, pixels, reason):
        if reason is None and OLD:
            reason = f"JAX {jax.__version__} is older than 0.12"
        x = jax.ShapeDtypeStruct((1, 1, pixels, channels), jnp.dtype(dtype))
        self.assertEqual(hopper.refused(x, channels, hidden, kind), reason)

    @parameterized.parameters(("float32", 1), ("bfloat16", 1), ("float32", 1000))
    def test_padded_tokens_and_stored_slopes(self, dtype, largest):
        """A network of 17 tokens, which it pads; `largest` is about the largest logit of attention.

        On this platform, JAX's formula computes the attention.
        """
        options = {"dim": 32, "depth": 2, "heads": 2, "stem_strides": (4,)}
        make = functools.partial(models.create, "vit_s", image_size=16, num_classes=5, **options)
        params, stats = jax.jit(make().init)(jax.random.key(0))
        params = {k: p + normal(i, *p.shape) / 8 for i, (k, p) in enumerate(params.items())}
        params |= {k: largest**0.5 * p for k, p in params.items() if ".qkv." in k}
        images = normal(99, 3, 16, 16, 3)

        def run(dtype):
            net = make(dtype=dtype)

            @jax.jit
            def values(*operands):
                value, pull = jax.vjp(lambda *x: net.apply(x[0], stats, x[1])[0], *operands)
                return [value, *jax.tree.leaves(pull(value))]

            return values(params, images)

        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            params, stats, images = jax.tree.map(
                lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, stats, images)
            )
            exact = run("float64")
        params, stats, images = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float32), (params, stats, images)
        )
        expected = run(dtype)
        with (
            mock.patch.object(hopper, "takes_tokens", lambda *_: True),
            mock.patch.object(hopper, "stores_slopes", lambda *_: True),
            jax.numpy_dtype_promotion("standard"),  # JAX's formula mixes types
        ):
            self.assertIn("[3,18,32]", str(jax.make_jaxpr(lambda: run(dtype))()))
            results = run(dtype)
        pairs = zip(errors(results, exact), errors(expected, exact), strict=True)
        for i, (error, plain) in enumerate(pairs):
            with self.subTest(array=i):
                self.assertLess(error, max(1e-6, 2 * plain))

    def test_nothing_is_copied_around_attention(self):
        """Traced as for a GPU: whole arrays reach cuDNN, and the forward pass runs once."""
        block = vit.Block(vit.VARIANTS["vit_s"], 197, Draws(jax.random.key(0)))
        graph, params = nnx.split(block)
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        x = jax.ShapeDtypeStruct((2, 198, 384), jnp.bfloat16)

        def gradient(params, x):
            return jax.vjp(lambda x: nnx.merge(graph, params)(x, None, False), x)[1](x)

        for name in ("check_cudnn_version", "check_compute_capability"):
            answer = lambda *_: 91000  # noqa: E731
            self.enter_context(mock.patch.object(fused_attention_stablehlo, name, answer))
        self.enter_context(mock.patch.object(fused_attention, "_on_nvidia", lambda: True))
        self.enter_context(mock.patch.object(hopper, "takes_tokens", lambda *_: True))
        traced = jax.jit(gradient).trace(params, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        calls = re.findall(r"@__cudnn\$(\w+)", text)
        self.assertEqual(sorted(calls), ["fmhaSoftmax", "fmhaSoftmaxBackward"])
        moves = r"stablehlo\.(?:pad|slice|concatenate|dynamic_slice) .*-> tensor<2x\d+x"
        self.assertEmpty(re.findall(moves, text))

    @parameterized.parameters(True, False)
    def test_a_gradient_multiplies_stored_slopes(self, stores):
        x, bias = normal(0, 8, 16), normal(1, 16)
        with mock.patch.object(hopper, "stores_slopes", lambda *_: stores):
            pull = jax.vjp(layers.product_gelu, x, bias)[1]
        self.assertEqual("erf" in str(jax.make_jaxpr(pull)(x)), not stores)

    @parameterized.parameters(
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 64, "NVIDIA A100-SXM4-80GB is not a Hopper GPU"),
        ("NVIDIA H200", "float32", 64, "float32 is neither bfloat16 nor float16"),
        ("NVIDIA H200", "bfloat16", 20, "the head width 20 is not a multiple of 8 up to 128"),
        ("NVIDIA H200", "bfloat16", 64, None),
    )
    def test_which_tokens_are_padded(self, kind, dtype, width, reason):
        x = jax.ShapeDtypeStruct((2, 197, 6 * width), jnp.dtype(dtype))
        self.assertEqual(hopper.refused_tokens(x, 6, kind), reason)

    @parameterized.parameters("", "0", "1")
    def test_off_by_default_and_without_a_gpu(self, value):
        self.enter_context(mock.patch.dict(os.environ, {hopper.FLAG: value}))
        self.assertEqual(hopper.requested(), value == "1")
        self.assertFalse(hopper.takes(jnp.zeros((1, 8, 16, 96), jnp.bfloat16), 96, 384))
        self.assertFalse(hopper.takes_tokens(jnp.zeros((1, 17, 384), jnp.bfloat16), 6))
        self.assertFalse(hopper.stores_slopes(jnp.zeros((1, 17, 384), jnp.bfloat16)))


if __name__ == "__main__":
    absltest.main()
