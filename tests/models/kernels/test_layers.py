"""`kernels/layers.py` against plain formulas in float64, between implementations, and PyTorch."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.models.kernels import (
    batch_norms,
    convnext_layers,
    convolutions,
    depthwise,
    layers,
    pooling,
    primitives,
    windows,
)
from jaxrobust.models.kernels.tpu import depthwise_norm
from jaxrobust.runtime.devices import cpus
from tests.support import sweeps

try:
    import torch
except ImportError:
    torch = None

SHAPE = (2, 9, 11, 5)  # nothing divides by 8


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def _vjp(function, operands, g):
    """Value and gradients of `function`, compiled; everything in one list."""

    def run(*operands):
        value, pull = jax.vjp(function, *operands)
        return value, *pull(g)

    return jax.jit(run)(*operands)


def _plain_layer_norm(x, scale, bias):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + scale.shape
    out = (x - mean) / jnp.sqrt(variance + 1e-6)
    return out * scale.reshape(shape) + bias.reshape(shape)


def _plain_gelu(x, bias):
    x = x + bias[None, None, None]
    return x * 0.5 * jax.scipy.special.erfc(-x / np.sqrt(2))


def _plain_residual(x, y, bias, gamma):
    return x + (y + bias[None, None, None]) * gamma[None, None, None]


def _plain_linear(x, kernel, bias):
    return jnp.einsum("bhwi,io->bhwo", x, kernel) + bias[None, None, None]


def _plain_depthwise(x, kernel, bias, stride=1, dilation=1):
    out = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(dilation * (k // 2),) * 2 for k in kernel.shape[:2]],
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )
    return out + bias[None, None, None]


_C = SHAPE[-1:]
# name, function, plain formula, shapes of the operands
FORMULAS = [
    ("layer_norm", layers.layer_norm, _plain_layer_norm, [SHAPE, _C, _C]),
    ("layer_norm_2d", layers.layer_norm, _plain_layer_norm, [(7, 5), _C, _C]),
    ("gelu", layers.gelu, _plain_gelu, [SHAPE, _C]),
    ("scaled_residual", layers.scaled_residual, _plain_residual, [SHAPE, SHAPE, _C, _C]),
    ("linear_wider", layers.linear, _plain_linear, [SHAPE, (5, 12), (12,)]),
    ("linear_narrower", layers.linear, _plain_linear, [SHAPE, (5, 3), (3,)]),
    ("linear_on_tpus", layers._without_copies, jnp.matmul, [SHAPE, (5, 12)]),
    ("depthwise_7", convolutions.depthwise_conv, _plain_depthwise, [SHAPE, (7, 7, 1, 5), _C]),
    ("depthwise_3", convolutions.depthwise_conv, _plain_depthwise, [SHAPE, (3, 3, 1, 5), _C]),
]
# image, kernel, stride, padding
CONVS = [
    ((2, 9, 11, 3), (3, 3, 3, 6), 2, 1),
    ((2, 8, 12, 3), (3, 3, 3, 6), 1, 1),
    ((2, 8, 12, 3), (2, 2, 3, 6), 2, 0),
    ((2, 9, 11, 3), (2, 2, 3, 6), 2, 0),
    ((2, 8, 12, 3), (4, 4, 3, 6), 4, 0),
    ((2, 5, 6, 3), (1, 1, 3, 6), 1, 0),
    ((2, 6, 8, 5), (1, 1, 5, 6), 2, 0),  # ResNets' shortcuts
    ((2, 5, 7, 5), (1, 1, 5, 6), 2, 0),
    ((2, 16, 20, 3), (7, 7, 3, 6), 2, 3),  # and their first layer
    ((2, 15, 21, 3), (7, 7, 3, 6), 2, 3),
    ((2, 9, 8, 24), (3, 3, 24, 5), 1, 1),
    ((2, 9, 8, 64), (3, 3, 64, 5), 2, 1),
    ((2, 9, 8, 16), (2, 2, 16, 24), 1, 0),
    ((1, 4, 3, 32), (3, 3, 32, 33), 1, 1),  # a kernel larger than the image
    ((1, 5, 4, 32), (3, 3, 32, 33), 2, 1),
    ((2, 9, 8, 5), (2, 3, 5, 6), 2, 1),
]


# image, kernel, stride, padding, groups, and dilation where it is not 1
GROUPED = [
    ((2, 8, 7, 20), (3, 3, 5, 20), 1, 1, 4),
    ((2, 8, 7, 20), (3, 3, 5, 40), 2, 1, 4),
    ((2, 6, 5, 56), (3, 3, 14, 56), 1, 1, 4),  # two pairs
    ((2, 6, 5, 6), (3, 3, 3, 6), 1, 1, 2),
    ((2, 5, 4, 80), (3, 3, 40, 80), 2, 1, 2),  # wide groups: one convolution for each
    ((2, 5, 4, 6), (3, 3, 1, 6), 2, 1, 6),  # depthwise
    ((2, 5, 4, 99), (3, 3, 11, 27), 2, 1, 9),  # many: a product of matrices for each
    ((2, 9, 8, 3), (7, 7, 3, 5), 4, 5, 1, 2),
    ((2, 7, 8, 6), (3, 3, 6, 4), 2, 3, 1, 3),
    ((2, 7, 8, 6), (3, 3, 2, 6), 1, 2, 3, 2),
    ((2, 7, 8, 6), (3, 3, 1, 6), 1, 2, 6, 2),  # depthwise
]


class LayersTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        for flag, value in (("dtype", "strict"), ("rank", "raise")):
            name = f"jax_numpy_{flag}_promotion"
            self.addCleanup(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)

    def assert_close(self, results, references, tolerance):
        for result, reference in zip(results, references, strict=True):
            reference = np.asarray(reference, np.float64)
            self.assertEqual(result.shape, reference.shape)
            error = np.abs(np.asarray(result, np.float64) - reference).max()
            self.assertLessEqual(error, tolerance * np.abs(reference).max())

    @sweeps.fast(0, 4, 8)
    @parameterized.product(
        implementation=[*sorted(depthwise.IMPLEMENTATIONS), None],
        case=(
            (3, SHAPE, np.float32),
            (7, SHAPE, np.float32),
            (7, SHAPE, jnp.bfloat16),
            (7, (1, 4, 3, 16), np.float32),
        ),
    )
    def test_depthwise_implementations_agree(self, implementation, case):
        size, shape, dtype = case
        x, g = (jnp.asarray(_normal(seed, *shape), dtype) for seed in (0, 1))
        kernel = jnp.asarray(_normal(2, size, size, 1, shape[-1]), dtype)

        def conv(x, kernel):
            return convolutions.depthwise_conv(x, kernel, implementation=implementation)

        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel, g)]
            zero = jnp.zeros(shape[-1])
            expected = _vjp(lambda x, k: _plain_depthwise(x, k, zero), wide[:2], wide[2])
        results = _vjp(conv, (x, kernel), g)
        self.assertEqual([r.dtype for r in results], [dtype] * 3)
        self.assert_close(results, expected, 1e-6 if dtype == np.float32 else 1e-2)

    def test_depthwise_gradients_that_are_asked_for_alone(self):
        """Of the input only, as an attack asks; also through scan, rematerialization and vmap."""
        operands = [
            _normal(seed, *shape) for seed, shape in enumerate([(2, 3, 4, 2), (3, 3, 1, 2)])
        ]

        def forms(conv):
            once = lambda x, k: jnp.sin(conv(x, k))  # noqa: E731
            step = lambda k: jax.checkpoint(lambda x, _: (once(x, k), None))  # noqa: E731
            both = jax.jit(lambda x, k: (once(x, k), 2 * x))
            return [
                once,
                lambda x, k: jax.lax.scan(step(k), x, None, length=2)[0],
                jax.vmap(lambda x, k: once(x[None], k)[0], (0, None)),
                lambda x, k: both(x, k)[1],
            ]

        def gradients(x, kernel, conv, asked):
            losses = [lambda x, k, f=f: (f(x, k) ** 2).sum() for f in forms(conv)]
            return [[jax.grad(loss, places)(x, kernel) for places in asked] for loss in losses]

        with jax.enable_x64(True):
            plain = functools.partial(_plain_depthwise, bias=jnp.zeros(2))
            ours = lambda x, k: gradients(x, k, convolutions.depthwise_conv, ((0,), (1,)))  # noqa: E731
            found = jax.jit(ours)(*operands)
            expected = jax.jit(lambda x, k: gradients(x, k, plain, ((0, 1),)))(*operands)
        for (image, kernel), (both,) in zip(found, expected, strict=True):
            self.assert_close([*image, *kernel], both, 1e-12)

    @parameterized.named_parameters(FORMULAS)
    def test_formula(self, function, plain, shapes):
        operands = [_normal(seed, *shape) for seed, shape in enumerate(shapes)]
        with jax.enable_x64(True):
            wide = [jnp.asarray(a) for a in operands]
            g = _normal(9, *jax.eval_shape(plain, *wide).shape)
            expected = _vjp(plain, wide, jnp.asarray(g))
            self.assert_close(_vjp(function, wide, jnp.asarray(g)), expected, 1e-12)
        for dtype, tolerance in ((jnp.float32, 3e-6), (jnp.bfloat16, 4e-2)):
            narrow = [jnp.asarray(a, dtype) for a in operands]
            results = _vjp(function, narrow, jnp.asarray(g, dtype))
            self.assertEqual([r.dtype for r in results], [dtype] * len(results))
            self.assert_close(results, expected, tolerance)

    @pytest.mark.landing
    @sweeps.rows(CONVS[0], GROUPED[3])
    def test_conv(self, *row):
        self.check_conv(*row)

    @pytest.mark.slow
    @sweeps.rows(*CONVS, *GROUPED)
    def test_every_conv(self, *row):
        self.check_conv(*row)

    def check_conv(self, image, kernel, stride, padding, groups=1, dilation=1):
        def plain(x, kernel):
            return convolutions._xla_conv(x, kernel, stride, padding, groups, dilation)

        def conv(x, kernel):
            how = {"stride": stride, "padding": padding, "groups": groups, "dilation": dilation}
            return convolutions.conv(x, kernel, **how)

        operands = _normal(0, *image), _normal(1, *kernel)
        with jax.enable_x64(True):
            wide = [jnp.asarray(a) for a in operands]
            g = _normal(2, *jax.eval_shape(plain, *wide).shape)
            expected = _vjp(plain, wide, jnp.asarray(g))
            self.assert_close(_vjp(conv, wide, jnp.asarray(g)), expected, 1e-12)
        for dtype, tolerance in ((jnp.float32, 3e-6), (jnp.bfloat16, 4e-2)):
            narrow = [jnp.asarray(a, dtype) for a in operands]
            self.assert_close(_vjp(conv, narrow, jnp.asarray(g, dtype)), expected, tolerance)

    @sweeps.rows((1, 1, 1), (2, 1, 1), (1, 2, 2))
    def test_many_groups_by_one_call(self, stride, padding, dilation):
        x, kernel = np.float32(_normal(0, 2, 5, 6, 6)), np.float32(_normal(1, 3, 2, 2, 9))
        how = {"groups": 3, "dilation": dilation}

        def both(x, kernel):
            plain = convolutions._xla_conv(x, kernel, stride, padding, 3, dilation)
            return windows.group_conv(x, kernel, stride, padding, **how), plain

        found, expected = jax.jit(both)(x, kernel)
        self.assertEqual(found.shape, expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-5)  # float32

    # On CPUs: shapes, stride, padding, groups, dilation; then how many convolutions of XLA and
    # how many products of matrices compute it.
    @sweeps.rows(
        ((1, 8, 8, 16), (3, 3, 16, 8), 1, 1, 1, 1, (1, 0)),
        ((1, 8, 8, 16), (3, 3, 16, 8), 1, 2, 1, 2, (0, 1)),  # XLA's with dilation are plain loops
        ((1, 8, 8, 16), (2, 2, 16, 8), 2, 0, 1, 1, (0, 1)),  # patches
        ((1, 8, 8, 16), (2, 2, 16, 8), 2, 1, 1, 1, (1, 0)),
        ((1, 9, 8, 16), (2, 2, 16, 8), 2, 0, 1, 1, (1, 0)),  # that leave a row over
        ((1, 8, 8, 4), (3, 3, 4, 8), 1, 1, 1, 1, (0, 1)),  # few channels
        ((1, 8, 8, 5), (3, 3, 5, 8), 1, 1, 1, 1, (1, 0)),
        ((1, 8, 8, 4), (7, 7, 4, 8), 1, 3, 1, 1, (1, 0)),
        ((1, 3, 6, 8), (3, 3, 8, 8), 1, 1, 1, 1, (1, 0)),  # a kernel four times as large as images
        ((1, 3, 5, 8), (3, 3, 8, 8), 1, 1, 1, 1, (0, 1)),
        ((1, 12, 12, 64), (3, 3, 32, 8), 1, 1, 2, 1, (2, 0)),  # groups next to each other
        ((1, 12, 12, 32), (3, 3, 16, 8), 1, 1, 2, 1, (1, 0)),  # joined
        ((1, 12, 12, 32), (3, 3, 16, 8), 1, 2, 2, 2, (0, 1)),
        ((1, 12, 12, 8 * 32), (3, 3, 32, 8), 1, 1, 8, 1, (8, 0)),
        ((1, 12, 12, 9 * 32), (3, 3, 32, 9), 1, 1, 9, 1, (0, 1)),  # many: one call for all
    )
    def test_the_formula_that_is_fast(self, image, kernel, stride, padding, groups, dilation, of):
        settings = convolutions._Settings(stride, padding, groups, dilation)
        value = functools.partial(convolutions._on_cpu, 0, settings)
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel)]
        with mock.patch.object(cpus, "kind", return_value=cpus.KINDS[1]):  # as with AVX-512
            text = str(jax.make_jaxpr(value)(*operands))
        kinds = "conv_general_dilated[", "dot_general["
        self.assertEqual(tuple(map(text.count, kinds)), of)

    @sweeps.rows(
        ((3, 3, 16), 1, "canonical", True),
        ((3, 3, 15), 1, "canonical", False),  # of few channels, by windows in one matrix
        ((3, 3, 63), 2, "interleaved", True),
        ((3, 3, 64), 2, "canonical", True),
        ((3, 2, 16), 2, "canonical", True),
    )
    def test_the_gradients_that_are_fast(self, window, stride, of_input, by_taps):
        x = jax.ShapeDtypeStruct((2, 20, 20, window[2]), jnp.float32)
        kernel = jax.ShapeDtypeStruct((*window, 8), jnp.float32)
        _, to_x, to_kernel = convolutions._cpu_conv(x, kernel, stride, 1)
        self.assertIs(to_x, getattr(convolutions, f"_{of_input}_input_gradient"))
        self.assertEqual(to_kernel is convolutions._tap_kernel_gradient, by_taps)

    @sweeps.fast(4, 8, 16)
    @parameterized.product(
        implementation=[*sorted(depthwise.IMPLEMENTATIONS), None],
        case=((3, 2, 1), (5, 2, 1), (3, 1, 2), (3, 2, 2)),
        side=(8, 7),
    )
    def test_depthwise_with_stride_and_dilation(self, implementation, case, side):
        size, stride, dilation = case
        operands = _normal(0, 2, side, 6, 5), _normal(1, size, size, 1, 5)
        how = {"stride": stride, "dilation": dilation}

        def plain(x, kernel):
            return _plain_depthwise(x, kernel, jnp.zeros(5), **how)

        def conv(x, kernel):
            return convolutions.depthwise_conv(x, kernel, implementation=implementation, **how)

        with jax.enable_x64(True):
            wide = [jnp.asarray(a) for a in operands]
            g = jnp.asarray(_normal(2, *jax.eval_shape(plain, *wide).shape))
            self.assert_close(_vjp(conv, wide, g), _vjp(plain, wide, g), 1e-12)

    def test_conv_and_linear_add_their_bias(self):
        x, bias = jnp.ones((1, 4, 4, 2)), jnp.arange(3.0)
        for out in (
            convolutions.conv(x, jnp.zeros((1, 1, 2, 3)), bias),
            layers.linear(x, jnp.zeros((2, 3)), bias),
        ):
            np.testing.assert_array_equal(out[0, 0, 0], bias)

    @sweeps.rows((197, 0), (200, 2))
    def test_tokens_that_fill_no_tiles_stay_where_they_lie_on_tpus(self, tokens, reshapes):
        x, kernel = jnp.asarray(_normal(0, 2, tokens, 4)), jnp.asarray(_normal(1, 4, 8))

        def count(platform):
            traced = jax.jit(lambda x, kernel: layers.linear(x, kernel)).trace(x, kernel)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            return text.count("stablehlo.reshape")

        self.assertEqual((count("tpu"), count("cuda")), (reshapes, 2))

    @sweeps.rows(("tpu", True), ("tpu", False), ("cpu", True), ("cuda", True))
    def test_operands_of_gradients_are_made_before_them(self, platform, alone):
        x, kernel = jnp.asarray(_normal(0, 2, 6, 6, 4)), jnp.asarray(_normal(1, 3, 3, 4, 8))

        def gradients(x, kernel, alone=alone):
            def total(x, kernel):
                return jnp.sin(convolutions.conv(x, kernel, padding=1, alone=alone)).sum()

            return jax.grad(total, (0, 1))(x, kernel)

        lowered = jax.jit(gradients).trace(x, kernel).lower(lowering_platforms=(platform,))
        barrier = platform == "tpu" and alone
        self.assertEqual("optimization_barrier" in lowered.as_text(), barrier)
        both = [jax.jit(gradients, static_argnums=2)(x, kernel, a) for a in (True, False)]
        jax.tree.map(np.testing.assert_array_equal, *both)

    @sweeps.rows(4032, 1536, 509)
    def test_the_logits_of_one_image_are_added_up_in_pieces(self, features):
        x = np.abs(_normal(0, 1, features)).astype(np.float32)
        kernel = (_normal(1, features, 100) / np.sqrt(features)).astype(np.float32)
        exact = x.astype(np.float64) @ kernel
        found = np.asarray(jax.jit(layers.linear)(x, kernel), np.float64)
        off = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
        # One by one, 4,032 terms are off by 1.1e-6; 509 is a prime, which has one piece.
        self.assertLess(off, 6e-7 if features == 509 else 2.5e-7)
        wide = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
        self.assertEqual(layers.linear(*wide).dtype, jnp.bfloat16)

    @sweeps.fast(3, 5, 7)
    @parameterized.parameters(*CONVS)
    def test_convolutions_in_a_loop_are_canonical(self, image, kernel, stride, padding):
        def conv(x, kernel):
            return convolutions.conv(x, kernel, stride=stride, padding=padding)

        def gradients(x, kernel):
            def body(carry):
                step, x, kernel = carry
                value, pull = jax.vjp(conv, x, kernel)
                dx, dkernel = pull(value)
                return step + 1, x + dx, kernel + dkernel

            return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x, kernel))

        if jax.default_backend() != "cpu":
            self.skipTest("the layouts that XLA's CPU back end computes by blocks")
        text = jax.jit(gradients).lower(jnp.ones(image), jnp.ones(kernel)).compile().as_text()
        layouts = re.findall(r"convolution\(.*dim_labels=([^,\s]*)", text)
        self.assertContainsSubset(layouts, ["b01f_01io->b01f"])
        self.assertTrue(layouts or " dot(" in text, "no convolution and no product in the loop")

    def test_batch_norm_by_given_statistics(self):
        shapes = [SHAPE, _C, _C, _C, _C]
        operands = [_normal(seed, *shape) for seed, shape in enumerate(shapes)]
        operands[4] = np.abs(operands[4]) + 0.1
        g = _normal(9, *SHAPE)

        def plain(x, *vectors):
            scale, bias, mean, var = (v[None, None, None] for v in vectors)
            return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

        with jax.enable_x64(True):
            wide = [jnp.asarray(a) for a in operands]
            expected = _vjp(plain, wide, jnp.asarray(g))
            self.assert_close(_vjp(batch_norms.batch_norm, wide, jnp.asarray(g)), expected, 1e-13)
        for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-2)):
            narrow = [jnp.asarray(a, dtype) for a in operands]
            results = _vjp(batch_norms.batch_norm, narrow, jnp.asarray(g, dtype))
            self.assertEqual({r.dtype for r in results}, {jnp.dtype(dtype)})
            self.assert_close(results, expected, tolerance)

    @sweeps.fast(0, 1)
    @parameterized.parameters(0, 6, 2, 3)
    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_batch_norm_in_training(self, group):
        x, scale, bias = (_normal(s, *shape) for s, shape in enumerate([(6, 5, 4, 3), [3], [3]]))
        x, g = x * np.array([1, 3, 0.1]) + np.array([0, 5, 0.1]), _normal(9, *x.shape)
        tensors = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
        outs, buffers = [], []
        for images in tensors[0].split(group or 6):
            norm = torch.nn.BatchNorm2d(3, dtype=torch.float64)
            parameters = {"weight": tensors[1], "bias": tensors[2]}
            nchw = images.permute(0, 3, 1, 2)
            outs.append(torch.func.functional_call(norm, parameters, nchw).permute(0, 2, 3, 1))
            buffers.append([norm.running_mean, norm.running_var])
        torch.cat(outs).backward(torch.tensor(g))
        gradients = [t.grad.numpy() for t in tensors]
        running = [torch.stack(b).mean(0).numpy() for b in zip(*buffers, strict=True)]
        expected = [torch.cat(outs).detach().numpy(), *gradients, *running]

        def run(x, scale, bias, g):
            def train(*operands):
                y, *statistics = batch_norms.batch_norm_train(*operands, group=group)
                return y, statistics

            y, pull, (mean, var) = jax.vjp(train, x, scale, bias, has_aux=True)
            start = jnp.zeros(3, mean.dtype), jnp.ones(3, var.dtype)
            updated = [0.9 * old + 0.1 * new for old, new in zip(start, (mean, var), strict=True)]
            return y, *pull(g), *updated

        with jax.enable_x64(True):
            operands = [jnp.asarray(a) for a in (x, scale, bias, g)]
            self.assert_close(jax.jit(run)(*operands), expected, 1e-13)
        narrow = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias, g)]
        self.assert_close(
            jax.jit(run)(*narrow), expected, 1e-5
        )  # a channel's mean is 50 times its scale
        halves = jax.jit(run)(*(jnp.asarray(a, jnp.bfloat16) for a in (x, scale, bias, g)))
        self.assertEqual([h.dtype for h in halves], [jnp.bfloat16] * 4 + [jnp.float32] * 2)
        self.assert_close(halves, expected, 6e-2)

    def test_batch_norm_sums_many_values_exactly(self):
        x = (_normal(0, 4, 112, 112, 2) + 3).astype(np.float32)
        _, mean, var = jax.jit(batch_norms.batch_norm_train)(
            jnp.asarray(x), jnp.ones(2), jnp.zeros(2)
        )
        flat = x.reshape(-1, 2).astype(np.float64)
        self.assert_close([mean, var], [flat.mean(0), flat.var(0, ddof=1)], 1e-6)

    def test_batch_norm_refuses(self):
        ones = jnp.ones(3)
        with self.assertRaisesRegex(ValueError, "group=4 does not divide the batch of 6"):
            batch_norms.batch_norm_train(jnp.ones((6, 2, 2, 3)), ones, ones, group=4)
        with self.assertRaisesRegex(ValueError, "no variance"):
            batch_norms.batch_norm_train(jnp.ones((6, 1, 1, 3)), ones, ones, group=1)

    def pooled(self, pool, x):
        """Value and gradient of a pool in PyTorch, and the cotangent."""
        tensor = torch.tensor(x, requires_grad=True)
        out = pool(tensor.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        g = _normal(1, *out.shape).astype(x.dtype)
        out.backward(torch.tensor(g))
        return [out.detach().numpy(), tensor.grad.numpy()], g

    @sweeps.fast(2, 5, 6, 9)
    @parameterized.product(stride=(1, 2), counted=(True, False), side=(8, 7, 1))
    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_avg_pool(self, stride, counted, side):
        x, window = _normal(0, 2, side, 6, 3), (3, stride, 1)
        avg_pool2d = functools.partial(torch.nn.functional.avg_pool2d, count_include_pad=counted)
        theirs, g = self.pooled(lambda x: avg_pool2d(x, *window), x)
        pool = functools.partial(pooling.avg_pool, stride=stride, count_padding=counted)
        with jax.enable_x64(True):
            results = _vjp(pool, [jnp.asarray(x)], jnp.asarray(g))
        self.assert_close(results, theirs, 1e-14)

    @sweeps.fast(1, 3)
    @parameterized.parameters((8, 8), (14, 7), (9, 16), (1, 2), (5, 4))
    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_adaptive_avg_pool(self, height, width):
        x = _normal(0, 2, height, width, 3)
        theirs, g = self.pooled(lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 7), x)
        pool = functools.partial(pooling.adaptive_avg_pool, count=7)
        with jax.enable_x64(True):
            results = _vjp(pool, [jnp.asarray(x)], jnp.asarray(g))
            self.assert_close(results, theirs, 1e-14)
        results = _vjp(pool, [jnp.asarray(x, jnp.bfloat16)], jnp.asarray(g, jnp.bfloat16))
        self.assertEqual([r.dtype for r in results], [jnp.bfloat16] * 2)
        self.assert_close(results, theirs, 1e-2)

    @sweeps.fast(1)
    @parameterized.parameters((8, 8), (7, 9), (1, 2), (5, 6), (8, 7, 0), (5, 3, 0))
    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_max_pool(self, height, width, padding=1):
        # Whole numbers: most windows have their largest value more than once.
        x = np.random.default_rng(0).integers(-2, 2, (2, height, width, 5)).astype(np.float32)
        theirs, g = self.pooled(lambda x: torch.nn.functional.max_pool2d(x, 3, 2, padding), x)
        for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
            pool = functools.partial(pooling.max_pool, padding=padding)
            results = _vjp(pool, [jnp.asarray(x, dtype)], jnp.asarray(g, dtype))
            self.assertEqual([r.dtype for r in results], [dtype] * 2)
            self.assert_close(results, theirs, tolerance)

    @sweeps.fast(1)
    @parameterized.parameters((8, 8), (7, 9), (2, 3), (5, 6))
    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_pools_of_2x2(self, height, width):
        # Whole numbers: many windows have their largest value more than once.
        x = np.random.default_rng(0).integers(-2, 2, (2, height, width, 5)).astype(np.float32)
        x[0, 0, 1, 0] = np.nan
        for kind in ("max_pool", "avg_pool"):
            of_torch = getattr(torch.nn.functional, f"{kind}2d")
            theirs, g = self.pooled(lambda x, pool=of_torch: pool(x, 2), x)
            results = _vjp(getattr(pooling, f"{kind}_2x2"), [jnp.asarray(x)], jnp.asarray(g))
            for result, wanted in zip(results, theirs, strict=True):
                np.testing.assert_allclose(result, wanted, rtol=1e-6)

    def test_dropout(self):
        x, key = jnp.ones((300, 4, 5)), jax.random.key(0)
        self.assertIs(layers.dropout(x, None, 0.5), x)
        self.assertIs(layers.dropout(x, key, 0.0), x)
        out = np.asarray(layers.dropout(x, key, 0.25))
        self.assertEqual(set(np.unique(out)), {0, np.float32(1 / 0.75)})
        self.assertAlmostEqual((out != 0).mean(), 0.75, delta=0.023)  # four standard deviations
        keys = jax.random.split(key, 300)
        each = np.asarray(layers.dropout(x, keys, 0.25))
        alone = np.asarray(layers.dropout(x[:1], keys[7:8], 0.25))
        np.testing.assert_array_equal(each[7:8], alone)  # a draw is the image's own
        self.assertGreater(len(np.unique(each.reshape(300, -1) != 0, axis=0)), 290)

    def test_drop_path(self):
        y = jnp.asarray(_normal(0, 4000, 2, 3), jnp.float32)
        key = jax.random.key(0)
        self.assertIs(layers.drop_path(y, None, 0.5), y)
        self.assertIs(layers.drop_path(y, key, 0.0), y)
        out = np.asarray(jax.jit(layers.drop_path, static_argnums=2)(y, key, 0.25))
        kept = out[:, 0, 0] != 0
        np.testing.assert_allclose(out, np.where(kept[:, None, None], y / 0.75, 0), 1e-6)
        self.assertAlmostEqual(kept.mean(), 0.75, delta=0.03)  # four standard deviations
        other = np.asarray(layers.drop_path(y, jax.random.key(1), 0.25))[:, 0, 0] != 0
        self.assertBetween((kept == other).mean(), 0.5, 0.75)

    def test_layer_norm_is_accurate_far_from_zero(self):
        x = (_normal(0, 16, 96) + 1e3).astype(np.float32)
        ones, zeros = jnp.ones(96), jnp.zeros(96)
        with jax.enable_x64(True):
            wide = (jnp.asarray(x, jnp.float64), jnp.ones(96), jnp.zeros(96))
            expected = _plain_layer_norm(*wide)
        self.assert_close([layers.layer_norm(jnp.asarray(x), ones, zeros)], [expected], 1e-4)

    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_torch(self):
        x, scale, bias = (_normal(s, *shape) for s, shape in enumerate(([4, 6, 8, 16], [16], [16])))
        kernel = _normal(3, 7, 7, 1, 16)
        stem = _normal(4, 3, 3, 16, 12)
        arrays = [np.asarray(a, np.float32) for a in (x, scale, bias, kernel, stem)]

        def ours(x, scale, bias, kernel, stem):
            y = convolutions.depthwise_conv(x, kernel, bias)
            y = layers.gelu(layers.layer_norm(y, scale, bias))
            return convolutions.conv(
                layers.scaled_residual(x, y, bias, scale), stem, stride=2, padding=1
            )

        tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
        tx, tscale, tbias, tkernel, tstem = tensors
        nchw = tx.permute(0, 3, 1, 2)
        conv, norm = torch.nn.functional.conv2d, torch.nn.functional.layer_norm
        y = conv(nchw, tkernel.permute(3, 2, 0, 1), tbias, padding=3, groups=16)
        y = norm(y.permute(0, 2, 3, 1), (16,), tscale, tbias, 1e-6)
        y = tx + (torch.nn.functional.gelu(y) + tbias) * tscale
        out = conv(y.permute(0, 3, 1, 2), tstem.permute(3, 2, 0, 1), stride=2, padding=1)
        out = out.permute(0, 2, 3, 1)
        g = _normal(5, *out.shape).astype(np.float32)
        out.backward(torch.tensor(g))
        expected = [out.detach().numpy(), *(t.grad.numpy() for t in tensors)]
        self.assert_close(_vjp(ours, [jnp.asarray(a) for a in arrays], g), expected, 5e-6)

    @pytest.mark.slow
    def test_walls_survive_compilation_and_unused_gradients_do_not(self):
        x, kernel = jnp.ones((1, 8, 8, 8)), jnp.ones((7, 7, 1, 8))
        scale, bias = jnp.ones(8), jnp.zeros(8)

        def loss(x, scale, bias, kernel):
            y = layers.layer_norm(convolutions.depthwise_conv(x, kernel), scale, bias)
            return layers.gelu(y).sum()

        def calls(arguments):
            gradient = jax.jit(jax.grad(loss, arguments))
            text = gradient.lower(x, scale, bias, kernel).compile().as_text()
            return set(re.findall(r" call\(.*to_apply=%_([a-z_]*[a-z])", text))

        if jax.default_backend() != "cpu":
            self.skipTest("walls are built on CPU only")
        parameters_only = {"shifted_kernel_gradient", "norm_scale_gradient", "column_sum"}
        needed = {"shifted", "norm_forward", "norm_input_gradient", "gelu_input_gradient"}
        self.assertContainsSubset(needed, calls(0))
        self.assertEmpty(parameters_only & calls(0))
        self.assertContainsSubset(parameters_only - {"column_sum"}, calls((0, 1, 2, 3)))

    @sweeps.rows("tpu", "cuda")
    def test_other_platforms_get_xla_convolutions_and_no_walls(self, platform):
        def loss(x, kernel):
            y = convolutions.depthwise_conv(
                convolutions.conv(x, kernel, stride=2, padding=0), kernel[:1, :1]
            )
            return layers.gelu(y).sum()

        kernel = jnp.ones((2, 2, 1, 1))
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(jnp.ones((1, 8, 8, 1)), kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        self.assertIn("stablehlo.convolution", text)
        self.assertNotIn("inlineable", text)


class SeveralDevicesTest(absltest.TestCase):
    def test_a_kernels_gradient_gathers_no_images(self):
        """Each device sums over its own; a loop over images would send all of them to all."""
        devices = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        along = functools.partial(jax.sharding.NamedSharding, devices)
        x = jax.ShapeDtypeStruct(
            (8, 56, 56, 64), jnp.float32, sharding=along(jax.sharding.PartitionSpec("data"))
        )
        kernel = jax.ShapeDtypeStruct(
            (3, 3, 64, 64), jnp.float32, sharding=along(jax.sharding.PartitionSpec())
        )

        def gradient(x, kernel):
            return jax.grad(lambda k: convolutions.conv(x, k, padding=1).sum())(kernel)

        text = jax.jit(gradient).lower(x, kernel).compile().as_text()
        self.assertIn("all-reduce(", text)
        self.assertNotIn("all-gather(", text)


class SmallMapsTest(parameterized.TestCase):
    @sweeps.rows((2, 64, True), (3, 64, False), (2, 63, False))
    def test_maps_of_2x2_go_by_columns(self, size, channels, expected):
        x, kernel = jnp.ones((256, size, size, channels)), jnp.ones((3, 3, channels, 64))
        forward = convolutions._cpu_conv(x, kernel, 1, 1)[0]
        self.assertEqual(forward is windows.column_conv, expected)


class TracedOnceTest(absltest.TestCase):
    def test_layers_of_one_size(self):
        calls = []

        @primitives.traced_once
        def layer(x, *, power):
            calls.append((x.shape, power))
            return x**power

        def network(x):
            first = layer(layer(x, power=2), power=2)
            return first, layer(x[:2], power=2), layer(x, power=3)

        text = jax.jit(network).lower(jnp.ones(3)).as_text()
        self.assertEqual(calls, [((3,), 2), ((2,), 2), ((3,), 3)])
        self.assertNotIn("call", text)  # the operations stand in the program themselves
        self.assertEqual(text.count("stablehlo.multiply"), 5)
        np.testing.assert_array_equal(network(jnp.full(3, 2.0))[0], 16)

    def test_a_kernel_for_tpus(self):
        x, parameters = jnp.ones((1, 5, 6, 24)), [jnp.ones((3, 3, 1, 24)), *[jnp.ones(24)] * 3]
        traced = mock.patch.object(
            depthwise_norm, "over_images", side_effect=depthwise_norm.over_images
        )
        with traced as called:
            text = str(
                jax.make_jaxpr(
                    lambda x: [convnext_layers.depthwise_norm(x, *parameters)[0] for _ in range(5)]
                )(x)
            )
        self.assertEqual(called.call_count, 1)
        self.assertIn("name=depthwise_norm", text)


class WindowsTest(parameterized.TestCase):
    @sweeps.rows(((2, 3), 1, 0), ((3, 1), 1, 1), ((1, 2), 2, 0), ((2, 3), 2, 1))
    def test_pixels_that_an_entry_of_a_window_meets(self, window, stride, padding):
        x = np.arange(4 * 7 * 2.0).reshape(1, 4, 7, 2)
        wide = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        found = windows.taps(jnp.asarray(x), window, stride, padding)
        self.assertLen(found, window[0] * window[1])
        for k, (i, j) in enumerate(np.ndindex(*window)):
            rows = wide.shape[1] - window[0] + 1
            columns = wide.shape[2] - window[1] + 1
            expected = wide[:, i : i + rows, j : j + columns][:, ::stride, ::stride]
            np.testing.assert_array_equal(found[k], expected)

    def test_neighbours_in_a_kernel_lie_the_dilation_apart(self):
        x = np.arange(5 * 6.0).reshape(1, 5, 6, 1)
        kernel = np.array([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1)
        found = windows.column_conv(jnp.asarray(x), jnp.asarray(kernel), 1, 0, 2)
        expected = sum(
            kernel[a, b] * x[:, 2 * a : 2 * a + 3, 2 * b : 2 * b + 4] for a, b in np.ndindex(2, 2)
        )
        np.testing.assert_allclose(found, expected)
