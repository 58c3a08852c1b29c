"""`kernels/cpu/rewriting.py` against plain `lax` in float64, and the layouts XLA gets to see."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxrobust import attacks
from jaxrobust.models.kernels import primitives
from jaxrobust.models.kernels.cpu.rewriting import fast_formulas
from tests.support import sweeps

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
NWC, NCW = ("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW")
CANONICAL = {"b01f_01io->b01f", "b0f_0io->b0f"}

# name, numbers, window of the kernel, strides, padding, everything else
CASES = [
    ("1x1", NHWC, (1, 1), (1, 1), "SAME", {}),
    ("2x2_stride_2", NHWC, (2, 2), (2, 2), "VALID", {}),
    ("3x3", NHWC, (3, 3), (1, 1), "SAME", {}),
    ("3x3_stride_2", NHWC, (3, 3), (2, 2), "SAME", {}),
    ("3x3_stride_3_1", NHWC, (3, 3), (3, 1), ((1, 2), (0, 3)), {}),
    ("3x3_precise", NHWC, (3, 3), (1, 1), ((2, 0), (1, 1)), {"precision": "highest"}),
    ("3x3_cropping", NHWC, (3, 3), (2, 1), ((-1, 2), (1, -2)), {}),
    ("3x2_dilated", NHWC, (3, 2), (2, 1), ((2, 2), (1, 2)), {"rhs_dilation": (2, 3)}),
    ("7x7_stride_2", NHWC, (7, 7), (2, 2), ((3, 3), (3, 3)), {}),
    ("transposed", NHWC, (3, 3), (1, 1), ((2, 1), (1, 1)), {"lhs_dilation": (2, 2)}),
    ("first_3x3", NCHW, (3, 3), (1, 1), "SAME", {}),
    ("first_3x3_stride_2", NCHW, (3, 3), (2, 2), ((1, 1), (1, 1)), {}),
    ("first_2x7_stride_3", NCHW, (2, 7), (3, 3), "VALID", {"rhs_dilation": (1, 1)}),
    ("mixed", ("CWNH", "IHOW", "HNCW"), (3, 2), (2, 1), ((0, 1), (1, 1)), {}),
    ("line", NWC, (3,), (2,), "SAME", {}),
    ("first_line", NCW, (7,), (1,), ((3, 2),), {"rhs_dilation": (2,)}),
    ("groups", NCHW, (3, 3), (2, 1), "SAME", {"feature_group_count": 2}),
    ("depthwise_3x3", NHWC, (3, 3), (1, 1), "SAME", {"feature_group_count": 16}),
    ("depthwise_5x3_valid", NCHW, (5, 3), (1, 1), "VALID", {"feature_group_count": 16}),
    ("depthwise_strided", NHWC, (3, 5), (2, 3), ((1, 1), (0, 2)), {"feature_group_count": 16}),
]


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _operands(numbers, window, options):
    """Image and kernel in the layout `numbers`, odd sizes, in float64."""
    groups = options.get("feature_group_count", 1)
    sizes = dict(zip("NHWC", (2, 11, 13, 3 if groups == 1 else 16), strict=True))
    spatial = [c for c in numbers[1] if c in "HW"]
    taps = dict(zip(sorted(spatial), window, strict=True))
    taps |= {"I": sizes["C"] // groups, "O": 5 if groups == 1 else 16}
    return (
        _normal(0, *(sizes[c] for c in numbers[0])),
        _normal(1, *(taps[c] for c in numbers[1])),
    )


def _value_and_gradients(function, *operands):
    value, pull = jax.vjp(function, *operands)
    return value, *pull(jnp.sin(jnp.arange(value.size)).reshape(value.shape).astype(value.dtype))


def _labels(text):
    return re.findall(r"dim_labels=([^\s,]+)", text)


def _conv(x, kernel, numbers=NCHW, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


@jax.custom_vjp
def _rounded(x):
    return jnp.round(x * 8) / 8


_rounded.defvjp(lambda x: (_rounded(x), None), lambda _, g: (g,))  # straight through


def _network(params, x, *, erf=True):
    """NCHW inside, with layers behind `jit`, `checkpoint` and gradients of their own."""

    @jax.jit
    def block(x, kernel):
        return jax.nn.relu(_conv(x, kernel) * 0.5) + x

    policy = jax.checkpoint_policies.save_only_these_names("never")
    x = _rounded(_conv((x - 0.5).transpose(0, 3, 1, 2), params["stem"], stride=2))
    x = block(x, params["a"])
    x = jax.checkpoint(block, policy=policy, prevent_cse=False)(x, params["b"])
    x = jax.checkpoint(functools.partial(jax.nn.gelu, approximate=not erf))(x)
    x = _conv(x.transpose(0, 2, 3, 1), params["depthwise"], NHWC, groups=8)
    x = _conv(x, params["last"], NHWC)
    return {"logits": x.mean((1, 2)), "shape": jnp.asarray(x.shape)}


def _parameters():
    shapes = {
        "stem": (8, 3, 3, 3),
        "a": (8, 8, 3, 3),
        "b": (8, 8, 1, 3),
        "depthwise": (3, 3, 1, 8),
        "last": (1, 1, 8, 5),
    }
    return {k: _normal(i, *s).astype(jnp.float32) / 3 for i, (k, s) in enumerate(shapes.items())}


class ConvolutionsTest(parameterized.TestCase):
    def assert_close(self, results, references, tolerance):
        for result, reference in zip(
            jax.tree.leaves(results), jax.tree.leaves(references), strict=True
        ):
            self.assertEqual(result.shape, reference.shape)
            reference = np.asarray(reference, np.float64)
            error = np.abs(np.asarray(result, np.float64) - reference).max()
            self.assertLessEqual(error, tolerance * np.abs(reference).max())

    @parameterized.named_parameters(CASES)
    def test_value_and_both_gradients(self, numbers, window, strides, padding, options):
        def conv(x, kernel):
            return lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=numbers, **options
            )

        canonical = fast_formulas(conv)

        @jax.jit
        def run(*operands):
            narrow = [a.astype(jnp.float32) for a in operands]
            functions = (conv, *operands), (canonical, *operands), (canonical, *narrow)
            return [_value_and_gradients(*f) for f in functions]

        with jax.enable_x64(True):
            operands = _operands(numbers, window, options)
            expected, wide, narrow = run(*operands)
            gradients = jax.jit(functools.partial(_value_and_gradients, canonical))
            text = gradients.lower(*operands).as_text("hlo")
        self.assertEqual({a.dtype for a in narrow}, {jnp.dtype(np.float32)})
        self.assert_close(wide, expected, 1e-12)
        self.assert_close(narrow, expected, 1e-5)
        foreign = [label for label in _labels(text) if label not in CANONICAL]
        # The kernel gradient of groups is one with batch groups, which no attack asks for.
        self.assertLen(foreign, options.get("feature_group_count", 1) == 2)
        self.assertEqual("convolution(" in text, options.get("feature_group_count") != 16)

    @sweeps.fast(1)
    @parameterized.parameters(False, True)
    def test_network_with_traced_parameters(self, compiled):
        def loss(wrap, params, x):
            # Inside of `jit` and `grad` the parameters that the `Partial` holds are tracers.
            out = wrap(jax.tree_util.Partial(_network, params))(x)
            return jax.nn.logsumexp(out["logits"], 1).sum(), out

        images = jnp.abs(_normal(9, 2, 12, 10, 3)).astype(jnp.float32)
        plain, canonical = (
            jax.value_and_grad(functools.partial(loss, wrap), (0, 1), has_aux=True)
            for wrap in (lambda f: f, fast_formulas)
        )
        expected = jax.jit(plain)(_parameters(), images)
        run = jax.jit(canonical) if compiled else canonical
        result, gradients = run(_parameters(), images)
        self.assertEqual(jax.tree.structure(result[1]), jax.tree.structure(expected[0][1]))
        self.assertEqual(result[1]["shape"].dtype, jnp.int32)
        self.assert_close((result, gradients), expected, 1e-5)

    def test_vmap_of_pullback_and_of_kernels(self):
        x, kernel = (a.astype(jnp.float32) for a in _operands(NCHW, (3, 3), {}))
        g = _normal(2, 4, *_conv(x, kernel).shape).astype(jnp.float32)

        def run(conv, x, kernel, g):
            _, pull = jax.vjp(conv, x, kernel)
            kernels = jnp.stack([kernel, 2 * kernel])
            return jax.vmap(pull)(g), jax.vmap(lambda k: conv(x, k))(kernels)

        expected, results = (
            jax.jit(functools.partial(run, f))(x, kernel, g) for f in (_conv, fast_formulas(_conv))
        )
        self.assert_close(results, expected, 1e-5)

    @sweeps.fast(1)
    @parameterized.parameters(
        ("auto", True), ("manual", False), ("manual", True), ("unchecked", True)
    )
    def test_on_several_devices(self, axes, erf):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        split, whole = PartitionSpec("data"), PartitionSpec()
        images = jnp.abs(_normal(9, 8, 6, 6, 3)).astype(jnp.float32)
        network = functools.partial(_network, erf=erf)

        def gradients(wrap, params, x):
            def loss(params, x):
                return jax.nn.logsumexp(wrap(network)(params, x)["logits"], 1).sum()

            gradients = jax.grad(loss, (0, 1))(params, x)
            # Without its check, `shard_map` does not sum the gradient of what all devices share.
            return gradients[1:] if axes == "unchecked" else gradients

        def spread(wrap):
            run = functools.partial(gradients, wrap)
            if axes == "auto":
                return jax.jit(run)
            specs = (split,) if axes == "unchecked" else (whole, split)
            checked = axes == "manual"
            return jax.jit(
                jax.shard_map(run, in_specs=(whole, split), out_specs=specs, check_vma=checked)
            )

        expected = jax.jit(functools.partial(gradients, lambda f: f))(_parameters(), images)
        with jax.set_mesh(mesh):
            images = jax.device_put(images, split)
            try:
                spread(lambda f: f).lower(_parameters(), images)
            except ValueError as error:  # JAX 0.12.0: the gradient of erf is a bare `polynomial`
                self.assertIn("Primitive polynomial requires varying manual axes", str(error))
                self.assertTrue(erf)
                self.skipTest(f"JAX {jax.__version__} itself has no gradient of erf there")
            lowered = spread(fast_formulas).lower(_parameters(), images)
            self.assertEqual(set(_labels(lowered.as_text("hlo"))), {"b01f_01io->b01f"})
            result = lowered.compile()(_parameters(), images)
        self.assert_close(result, expected, 1e-5)

    @pytest.mark.slow
    def test_attacks_image_by_image(self):
        """The gradients of an attack, in its loop, on 8 devices with `shard_map`'s type checks."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        images = jnp.abs(_normal(9, 8, 6, 6, 3)).astype(jnp.float32) % 1
        labels = jnp.arange(8) % 5
        attack = attacks.pgd(norm="l2", epsilon=0.5, steps=3, random_start=False)
        keys = jax.random.key_data(jax.random.split(jax.random.key(0), 8))

        def run(wrap, params, keys, x, y):
            logits = wrap(lambda x: _network(params, x, erf=False)["logits"])
            return attack(logits, jax.random.wrap_key_data(keys[0]), x, y)

        operands = (_parameters(), keys, images, labels)
        expected = jax.jit(functools.partial(run, lambda f: f))(*operands)
        split = PartitionSpec("data")
        spread = jax.shard_map(
            functools.partial(run, fast_formulas),
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split, split),
            out_specs=split,
        )
        result = jax.jit(spread)(*operands)
        self.assertGreater(float(jnp.abs(result - images).max()), 0.05)
        self.assert_close(result, expected, 1e-5)

    def test_keeps_walls(self):
        wall = primitives.walled(lambda x: x + 1)

        def text(function):
            return jax.jit(function).lower(*_operands(NCHW, (3, 3), {})).as_text()

        walled = fast_formulas(lambda x, kernel: wall(_conv(x, kernel)))
        self.assertIn("inlineable", text(walled))
        self.assertNotIn("inlineable", text(_conv))

    def test_layouts_inside_of_a_loop(self):
        images = jnp.abs(_normal(9, 2, 12, 10, 3)).astype(jnp.float32)

        def labels(wrap):
            def ascend(params, x):
                def loss(x):
                    return wrap(functools.partial(_network, params))(x)["logits"].sum()

                return lax.fori_loop(0, 5, lambda _, x: x + 1e-3 * jax.grad(loss)(x), x)

            text = jax.jit(ascend).lower(_parameters(), images).compile().as_text()
            self.assertIn("while(", text)
            return set(_labels(text))

        if jax.default_backend() != "cpu":
            self.skipTest("the layouts of the CPU back end")
        # If this fails, XLA has learned to do without this file.
        self.assertNotEmpty(labels(lambda f: f) - CANONICAL)
        self.assertEqual(labels(fast_formulas), {"b01f_01io->b01f"})
