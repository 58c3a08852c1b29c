"""What NVIDIA's GPUs compute otherwise, on this platform: the same values and gradients."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.models.kernels import attention, convolutions, depthwise
from jaxrobust.models.kernels.cuda import fused_attention

# Scores of bfloat16 are rounded elsewhere: one step of it (2 ** -8) of the largest, and a rounding.
ROUNDED = 2 * 2.0**-8


class _Lax:
    """JAX's, which takes the rules of CUDA where there are such."""

    def __init__(self, lax):
        self.lax, self.taken = lax, []

    def __getattr__(self, name):
        return getattr(self.lax, name)

    def platform_dependent(self, *operands, **rules):
        self.taken.append("cuda" if "cuda" in rules else "default")
        return rules[self.taken[-1]](*operands)


def vjp(function, *operands):
    def run(*operands):
        value, pull = jax.vjp(function, *operands)
        return value, *pull(normal(9, *value.shape).astype(value.dtype))

    return jax.jit(run)(*operands)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class CudaTest(parameterized.TestCase):
    def on_cuda(self, module):
        lax = _Lax(module.lax)
        self.enter_context(mock.patch.object(module, "lax", lax))
        return lax.taken

    def compare(self, results, expected, limit):
        for result, wanted in zip(results, expected, strict=True):
            self.assertEqual(result.dtype, wanted.dtype)
            result, wanted = (np.asarray(a, np.float64) for a in (result, wanted))
            self.assertLess(np.abs(result - wanted).max(), limit * np.abs(wanted).max())

    @parameterized.product(
        case=(
            (224 // 8, 3, 5, 16, 4, 0),  # patches
            (28, 3, 5, 3, 2, 1),  # a stem of convolutions
            (27, 3, 5, 3, 2, 1),  # with an odd side
            (30, 3, 4, 7, 2, 3),  # of a ResNet
            (30, 1, 4, 5, 3, 2),
            (13, 3, 4, 2, 2, 0),  # windows side by side, and a rest
            (12, 7, 4, 1, 2, 0),
            (10, 8, 4, 3, 2, 1),  # eight channels: cuDNN's own
            (10, 3, 4, 3, 1, 1),
        )
    )
    def test_convolutions(self, case):
        size, ins, outs, window, stride, padding = case
        x, kernel = normal(0, 2, size, size + 2, ins), normal(1, window, window, ins, outs)

        def function(x, kernel):
            return convolutions.conv(x, kernel, stride=stride, padding=padding)

        expected = vjp(function, x, kernel)
        taken = self.on_cuda(convolutions)
        results = vjp(lambda *given: function(*given), x, kernel)
        self.assertSameElements(taken, ["cuda"])
        self.compare(results, expected, 2e-6)  # float32, in another order

    @parameterized.parameters(
        ((16, 16, 3, 8), 16, 0, "dot_general"),  # patches
        ((4, 4, 3, 8), 4, 0, "dot_general"),
        ((3, 3, 3, 8), 2, 1, "window_strides=(1, 1)"),  # in depth, where an image has 12 channels
        ((2, 2, 96, 8), 2, 0, "window_strides=(2, 2)"),
        ((3, 3, 48, 8), 2, 1, "window_strides=(2, 2)"),
        ((3, 3, 3, 8), 1, 1, "window_strides=(1, 1)"),
    )
    def test_which_formula(self, shape, stride, padding, operation):
        self.on_cuda(convolutions)
        conv = functools.partial(convolutions.conv, stride=stride, padding=padding)
        x = jax.ShapeDtypeStruct((2, 32, 32, shape[2]), jnp.float32)
        text = str(jax.make_jaxpr(conv)(x, jax.ShapeDtypeStruct(shape, jnp.float32)))
        self.assertIn(operation, text)
        self.assertEqual("dot_general" in text, operation == "dot_general")

    def test_depthwise_convolutions_are_the_library_s(self):
        for part in (0, 1, 2):
            with self.subTest(part):
                taken = mock.Mock(
                    side_effect=lambda *operands, **rules: rules["default"](*operands)
                )
                lax = mock.Mock(wraps=depthwise.lax, platform_dependent=taken)
                x, kernel = normal(0, 1, 6, 6, 4), normal(1, 3, 3, 1, 4)
                operands = [(x, kernel), (x, kernel), (x, kernel, x)][part]
                how = {"stride": 1, "dilation": 1} | ({"sizes": (6, 6)} if part == 1 else {})
                with mock.patch.object(depthwise, "lax", lax):
                    text = str(
                        jax.make_jaxpr(functools.partial(depthwise._rule, part, None, **how))(
                            *operands
                        )
                    )
                self.assertNotIn("cuda", taken.call_args.kwargs)
                self.assertIn("feature_group_count=4" if part < 2 else "_group_count=4", text)

    @parameterized.product(
        dtype=("float32", "bfloat16"), case=((2, 65, 3, 64), (6, 48, 4, 32), (1, 197, 2, 96))
    )
    def test_attention(self, dtype, case):
        """By JAX's own formula in place of cuDNN's, with the same lengths."""
        batch, tokens, heads, width = case
        qkv = normal(0, batch, tokens, 3 * heads * width).astype(dtype)

        def function(x):
            return attention.self_attention(x, heads, scale=heads / 16)

        expected = vjp(function, qkv)
        taken = self.on_cuda(attention)
        for name in ("forward", "backward"):
            by_xla = functools.partial(getattr(fused_attention, name), by="xla")
            self.enter_context(mock.patch.object(fused_attention, name, by_xla))
        self.enter_context(mock.patch.object(fused_attention, "applies", lambda *given: True))
        self.enter_context(jax.numpy_dtype_promotion("standard"))  # JAX's formula mixes types
        results = vjp(lambda x: function(x), qkv)
        self.assertEqual(taken, ["cuda"] * 2)
        self.compare(results, expected, ROUNDED if dtype == "bfloat16" else 5e-6)

    @parameterized.parameters(
        ("bfloat16", 64, True, True),
        ("float16", 128, True, True),
        ("float32", 64, True, False),
        ("bfloat16", 136, True, False),
        ("bfloat16", 36, True, False),
        ("bfloat16", 64, False, False),
    )
    def test_what_cudnn_takes(self, dtype, width, there, takes):
        self.enter_context(mock.patch.object(fused_attention, "_on_nvidia", lambda: there))
        qkv = jax.ShapeDtypeStruct((2, 5, 3 * 2 * width), jnp.dtype(dtype))
        self.assertEqual(fused_attention.applies(qkv, 2), takes)

    @parameterized.parameters(("gpu", "cuda 13000", True), ("gpu", "rocm 60200", False))
    def test_whose_gpu(self, backend, version, expected):
        device = mock.Mock()
        device.client.platform_version = f"PJRT C API\n{version}"
        self.enter_context(mock.patch.object(jax, "default_backend", lambda: backend))
        self.enter_context(mock.patch.object(jax, "local_devices", lambda: [device]))
        fused_attention._on_nvidia.cache_clear()
        self.addCleanup(fused_attention._on_nvidia.cache_clear)
        self.assertEqual(fused_attention._on_nvidia(), expected)

    def test_no_cudnn_without_a_gpu(self):
        fused_attention._on_nvidia.cache_clear()
        self.assertEqual(fused_attention._on_nvidia(), jax.default_backend() == "gpu")

    def test_a_bias_takes_the_plain_path(self):
        self.enter_context(mock.patch.object(fused_attention, "applies", lambda *given: True))
        taken = self.on_cuda(attention)
        qkv, bias = normal(0, 2, 16, 3 * 64), normal(1, 1, 2, 16, 16)
        attention.self_attention(qkv, 2, bias=bias)
        self.assertEqual(taken, ["default"])

    @parameterized.parameters(
        ("vit_s_cvst", {"depth": 1}),
        ("convnext_t", {"depths": (1, 1), "dims": (32, 64)}),
        ("xcit_n12", {"depth": 1}),
    )
    def test_an_attack_s_gradient_lowers(self, name, blocks):
        """As far as JAX goes without a GPU: each layer has a rule for it."""
        net = models.create(name, num_classes=5, image_size=64, dtype="bfloat16", **blocks)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

        def gradient(params, stats, images):
            return jax.grad(lambda x: net.apply(params, stats, x)[0].sum())(images)

        traced = jax.jit(gradient).trace(params, stats, images)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        self.assertNotIn("tpu_custom_call", text)
