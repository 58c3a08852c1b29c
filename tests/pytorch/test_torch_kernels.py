"""The package's kernels for PyTorch's operators, next to the plain rows that PyTorch has
checked.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.networks import torch_kernels
from jaxrobust.pytorch.networks.torch_kernels import KERNELS
from jaxrobust.pytorch.operators import TABLE, TRAINING
from jaxrobust.pytorch.program import OperatorCall
from tests.support import sweeps

ROWS = TABLE | TRAINING
CONV, NORM = "aten.convolution.default", "aten._native_batch_norm_legit"
ATTENTION, POOL = (
    "aten.scaled_dot_product_attention.default",
    "aten.max_pool2d_with_indices.default",
)
MAP, VECTOR, HEADS = (2, 6, 8, 8), (6,), (2, 3, 5, 4)


def conv(shape, stride=1, padding=1, dilation=1, groups=1, transposed=False):
    how = [[n, n] for n in (stride, padding, dilation)]
    return CONV, [MAP, shape, (shape[0],)], [*how, transposed, [0, 0], groups]


def square(value):
    return [value, value]


TAKEN = {
    "convolution": conv((4, 6, 3, 3)),
    "a stride": conv((4, 6, 3, 3), 2),
    "patches": conv((4, 6, 2, 2), 2, 0),
    "dilated": conv((4, 6, 3, 3), 1, 2, 2),
    "groups": conv((4, 3, 3, 3), groups=2),
    "depthwise": conv((6, 1, 3, 3), groups=6),
    "layer norm": ("aten.native_layer_norm.default", [HEADS, (4,), (4,)], [1e-2]),
    "batch norm": (f"{NORM}_no_training.default", [MAP, *[VECTOR] * 4], [0.1, 1e-2]),
    "batch norm of a batch": (
        f"{NORM}_functional.default",
        [MAP, *[VECTOR] * 4],
        [True, 0.3, 1e-2],
    ),
    "gelu": ("aten.gelu.default", [MAP], []),
    "gelu by tanh": ("aten.gelu.default", [MAP], ["tanh"]),
    "product": ("aten.mm.default", [(7, 4), (4, 3)], []),
    "product and bias": ("aten.addmm.default", [(3,), (7, 4), (4, 3)], []),
    "pooling": (POOL, [MAP], [*map(square, (3, 2, 1, 1)), False]),
    "pooling of whole windows": (POOL, [MAP], [*map(square, (3, 2, 0, 1)), False]),
    "attention": (ATTENTION, [HEADS] * 3, [None, 0.0, False]),
    "attention, another scale": (ATTENTION, [HEADS] * 3, [None, 0.0, False, 0.3]),
    "attention with a bias": (ATTENTION, [HEADS] * 3 + [(1, 3, 5, 5)], [0.0, False]),
    "attention with one bias": (ATTENTION, [HEADS] * 3 + [(5, 5)], [0.0, False]),
    "attention of a class token": (ATTENTION, [(2, 3, 1, 4), HEADS, HEADS], [None, 0.0, False]),
    "attention of wider values": (ATTENTION, [HEADS, HEADS, (2, 3, 5, 7)], [None, 0.0, False]),
}
LEFT = {
    "transposed": conv((6, 4, 3, 3), transposed=True),
    "not square": (CONV, [MAP, (4, 6, 3, 1), (4,)], [[1, 1], [1, 0], [1, 1], False, [0, 0], 1]),
    "two strides": (CONV, [MAP, (4, 6, 3, 3), (4,)], [[1, 2], *[[1, 1]] * 2, False, [0, 0], 1]),
    "even depthwise": conv((6, 1, 2, 2), groups=6),
    "norm of two axes": ("aten.native_layer_norm.default", [HEADS, (5, 4), (5, 4)], [1e-6]),
    "scaled product": ("aten.addmm.default", [(3,), (7, 4), (4, 3)], [0.5, 1]),
    "product scaled otherwise": ("aten.addmm.default", [(3,), (7, 4), (4, 3)], [1, 0.5]),
    "both scaled": ("aten.addmm.default", [(3,), (7, 4), (4, 3)], [2, 2]),
    "bias of a matrix": ("aten.addmm.default", [(7, 3), (7, 4), (4, 3)], []),
    "pooling of two": (POOL, [MAP], [*map(square, (2, 2, 0, 1)), False]),
    "pooling step by step": (POOL, [MAP], [*map(square, (3, 1, 1, 1)), False]),
    "pooling with holes": (POOL, [MAP], [*map(square, (3, 2, 1, 2)), False]),
    "pooling of windows on their own": (POOL, [MAP], [[3, 3]]),
    "pooling beyond the end": (POOL, [MAP], [*map(square, (3, 2, 1, 1)), True]),
    "pooling of one image": (POOL, [(6, 8, 8)], [*map(square, (3, 2, 1, 1)), False]),
    "causal": (ATTENTION, [HEADS] * 3, [None, 0.0, True]),
    "dropout": (ATTENTION, [HEADS] * 3, [None, 0.1, False]),
    "three axes": (ATTENTION, [(2, 5, 4)] * 3, [None, 0.0, False]),
    "shared keys": (ATTENTION, [HEADS] * 3, [None, 0.0, False, None, True]),
}


def operands(operator, shapes, rest):
    """Arrays, and what stands behind them; variances are positive, sizes of a norm stand second."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
    if NORM in operator:
        arrays[4] = jnp.abs(arrays[4]) + 0.5
    if "layer_norm" in operator:
        shape = tuple(shapes[1])
        return arrays, lambda a: [a[0], shape, *a[1:], *rest]
    return arrays, lambda a: [*a, *rest]


def value(table, operator, given, last):
    def read(operand):
        return tuple(operand) if isinstance(operand, list) else operand

    known = {f"x{i}": a for i, a in enumerate(given) if hasattr(a, "ndim")}
    if last:
        known["x0"] = programs.ChannelsLast(jnp.moveaxis(known["x0"], 1, -1))
    names = [programs.Of(f"x{i}") if f"x{i}" in known else read(a) for i, a in enumerate(given)]
    step = OperatorCall("step", operator, tuple(names), {}, "line 1")
    made = programs.compute(step, table, known, {})
    if made is None:
        return None
    if isinstance(made, list | tuple) and not isinstance(made, programs.ChannelsLast):
        return [programs.plain(each) for each in made if each is not None]
    return [programs.plain(made[0] if operator == POOL else made)]


class KernelRowsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(jax.enable_x64(True))
        # As PyTorch's operators join numbers of several types and ranks.
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.enter_context(jax.numpy_rank_promotion("allow"))

    @parameterized.named_parameters((name, *case) for name, case in TAKEN.items())
    def test_same_values_and_gradients(self, operator, shapes, rest):
        arrays, whole = operands(operator, shapes, rest)
        last = KERNELS[operator].last is not None

        def made(table):
            def run(arrays):
                out = value(table, operator, whole(arrays), last)
                weights = np.random.default_rng(1).standard_normal(out[0].shape)
                return (out[0] * weights).sum(), (
                    out[0],
                    out[-2:] if "functional" in operator else [],
                )

            return jax.jit(jax.grad(run, has_aux=True))(arrays)

        for ours, plain in zip(*(jax.tree.leaves(made(t)) for t in (KERNELS, ROWS)), strict=True):
            np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-12)

    @parameterized.named_parameters((name, *case) for name, case in LEFT.items())
    def test_left_to_the_plain_row(self, operator, shapes, rest):
        arrays, whole = operands(operator, shapes, rest)
        last = KERNELS[operator].last is not None
        self.assertIsNone(value(KERNELS, operator, whole(arrays), last))

    def test_norms_without_weights_or_of_single_values_are_left(self):
        operator, shapes, rest = TAKEN["batch norm of a batch"]
        for change in ({1: None}, {2: None}, {0: jnp.ones((1, 6, 1, 1))}):
            for name, more in ((operator, rest), (TAKEN["batch norm"][0], rest[1:])):
                arrays, _ = operands(name, shapes, more)
                given = [change.get(i, array) for i, array in enumerate(arrays)]
                # The statistics of one value for each channel are nothing; given ones are some.
                left = 0 not in change or name == operator
                self.assertEqual(value(KERNELS, name, [*given, *more], True) is None, left)
        operator, shapes, rest = TAKEN["layer norm"]
        (x, *weights), _ = operands(operator, shapes, rest)
        for absent in (0, 1):
            given = [None if i == absent else array for i, array in enumerate(weights)]
            self.assertIsNone(value(KERNELS, operator, [x, (4,), *given, *rest], False))

    def test_a_mask_of_booleans_is_left(self):
        arrays, _ = operands(ATTENTION, [HEADS] * 3, [])
        given = [*arrays, jnp.ones((5, 5), bool), 0.0, False]
        self.assertIsNone(value(KERNELS, ATTENTION, given, False))

    def test_scores_of_bfloat16_are_float32(self):
        """As PyTorch's fused attention has them: the plain row rounds its softmax's operand."""
        arrays, whole = operands(ATTENTION, [(2, 3, 40, 16)] * 3, [None, 0.0, False])
        (exact,) = value(ROWS, ATTENTION, whole(arrays), False)
        short = [a.astype(jnp.bfloat16) for a in arrays]
        errors = [
            float(jnp.abs(value(table, ATTENTION, whole(short), False)[0] - exact).mean())
            for table in (KERNELS, ROWS)
        ]
        self.assertLess(errors[0], 0.9 * errors[1])


class TapsTest(parameterized.TestCase):
    @sweeps.rows((5, 4, 3, 3), (5, 4, 1, 1), (6, 1, 7, 7), (1, 2, 2, 3))
    def test_there_and_back(self, *shape):
        weight = jnp.asarray(np.random.default_rng(0).random(shape, np.float32))
        kernel, back = jax.vjp(torch_kernels._taps_first, weight)
        np.testing.assert_array_equal(kernel, np.transpose(weight, (2, 3, 1, 0)))
        np.testing.assert_array_equal(back(kernel)[0], weight)

    def test_two_steps_on_cpu_alone(self):
        weight = jnp.ones((5, 4, 3, 3))
        lowered = {
            platform: jax.jit(torch_kernels._taps_first)
            .trace(weight)
            .lower(lowering_platforms=(platform,))
            .as_text()
            for platform in ("cpu", "tpu")
        }
        steps = {platform: text.count("stablehlo.transpose") for platform, text in lowered.items()}
        self.assertEqual(steps, {"cpu": 2, "tpu": 1})
