"""Convolutions and GELUs rewritten for loops on CPU: values, gradients, layouts, formulas."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from jaxrobust.models.kernels.cpu import rewriting
from jaxrobust.runtime.devices import cpus
from tests.support import sweeps


class Case(NamedTuple):
    """A convolution by PyTorch's words, in a layout of its own."""

    image: str
    kernel: str
    out: str
    channels: tuple[int, int] = (5, 6)  # in and out
    taps: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: Any = ((1, 1), (1, 1))
    groups: int = 1
    dilation: tuple[int, ...] = (1, 1)
    spread: tuple[int, ...] = (1, 1)
    rewritten: bool = True
    windows: bool = False  # by copies of windows, and no convolution is left in the value


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CASES = {
    "as it is": Case(*LAST),
    "channels first": Case(*FIRST),
    "turned": Case("HWNC", "OHWI", "CNHW"),
    "stride, uneven padding": Case(*FIRST, stride=(2, 2), padding=((2, 0), (0, 3))),
    "two strides": Case(*FIRST, taps=(3, 2), stride=(2, 1)),
    "cut off": Case(*FIRST, padding=((-1, 0), (1, -1))),
    "dilated": Case(*FIRST, dilation=(2, 1), padding=((2, 2), (1, 1))),
    "spread": Case(*FIRST, spread=(2, 2)),
    "a line": Case(
        *("NCH", "OIH", "NCH"),
        **{"taps": (3,), "stride": (2,), "padding": ((1, 0),), "dilation": (1,), "spread": (1,)},
    ),
    "few channels": Case(*FIRST, channels=(3, 5), windows=True, stride=(2, 2)),
    "few channels, taps": Case(
        *LAST, channels=(3, 4), windows=True, taps=(5, 3), padding=((2, 1), (0, 2))
    ),
    "depthwise": Case(*FIRST, channels=(8, 8), groups=8),
    "depthwise, strided": Case(
        *FIRST, channels=(8, 8), groups=8, stride=(2, 3), padding=((1, 1), (1, 0))
    ),
    "depthwise, even": Case(*FIRST, channels=(8, 8), groups=8, taps=(2, 2), rewritten=False),
    "depthwise, wide": Case(
        *FIRST, channels=(8, 8), groups=8, padding=((2, 2), (1, 1)), rewritten=False
    ),
    "many groups": Case(*FIRST, channels=(8, 8), groups=2, rewritten=False),
    "few outputs of a group": Case(*FIRST, channels=(16, 8), groups=2, rewritten=False),
    "wide groups": Case(*FIRST, channels=(16, 32), groups=2),
}


def shape(order: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in order)


def made(case: Case) -> tuple[Callable[..., Any], jax.Array, jax.Array]:
    """The function of images and kernel, and both."""
    draw = np.random.default_rng(0)
    ins, outs = case.channels
    sides, taps = dict(zip("HW", (7, 9), strict=True)), dict(zip("HW", case.taps, strict=False))
    x = draw.standard_normal(shape(case.image, sides | {"N": 2, "C": ins}), np.float32)
    kernel = draw.standard_normal(
        shape(case.kernel, taps | {"I": ins // case.groups, "O": outs}), "f"
    )

    def function(x, kernel):
        return lax.conv_general_dilated(
            *(x, kernel, case.stride, case.padding, case.spread, case.dilation),
            dimension_numbers=(case.image, case.kernel, case.out),
            feature_group_count=case.groups,
        )

    return function, jnp.asarray(x), jnp.asarray(kernel)


def convolutions(function: Callable[..., Any], *operands: Any) -> list[Any]:
    """Dimension numbers of all convolutions of a program, those in its parts included."""
    found: list[Any] = []

    def look(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                found.append((eqn.params["dimension_numbers"], eqn.invars[0].aval.ndim))
            for value in eqn.params.values():
                for part in value if isinstance(value, tuple | list) else [value]:
                    part = getattr(part, "jaxpr", part)
                    if hasattr(part, "eqns"):
                        look(part)

    look(jax.make_jaxpr(function)(*operands).jaxpr)
    return found


def is_last(numbers: Any, axes: int) -> bool:
    last, between = axes - 1, tuple(range(1, axes - 1))
    image, kernel = (0, last, *between), (last, last - 1, *range(last - 1))
    return (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (image, kernel, image)


class ConvolutionsTest(parameterized.TestCase):
    def test_values_and_gradients(self):
        """Of all cases in one program."""
        cases = {name: made(case) for name, case in CASES.items()}

        def both(function, x, kernel):
            def total(x, kernel):
                out = function(x, kernel)
                weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
                return (out * weights).sum(), out

            return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, kernel)

        @jax.jit
        def run(operands):
            return {
                name: (
                    both(function, *operands[name]),
                    both(rewriting.fast_formulas(function), *operands[name]),
                )
                for name, (function, *_) in cases.items()
            }

        found = jax.device_get(run({name: case[1:] for name, case in cases.items()}))
        for name, (plain, ours) in found.items():
            for expected, value in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
                np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=name)

    @parameterized.parameters(*CASES)
    @mock.patch.object(cpus, "kind", lambda: cpus.KINDS[1])  # where products are not convolutions
    def test_layouts(self, name):
        case, (function, *operands) = CASES[name], made(CASES[name])
        ours = rewriting.fast_formulas(function)
        numbers = convolutions(ours, *operands)
        depthwise = 1 < case.groups == case.channels[0]
        if not case.rewritten:
            self.assertEqual(numbers, convolutions(function, *operands))
        elif case.windows or depthwise:
            self.assertEmpty([n for n in numbers if not is_last(*n)])
            if case.windows:
                self.assertEmpty(numbers)
        else:
            self.assertLen(numbers, 1)
            self.assertTrue(is_last(*numbers[0]), numbers)

        def total(x, kernel):
            return ours(x, kernel).sum()

        slopes = convolutions(jax.grad(total, (0, 1)), *operands)
        if case.rewritten and not depthwise and case.groups == 1:
            self.assertEqual([is_last(*n) for n in slopes], [True] * len(slopes))

    @sweeps.rows((3, 5, 1), (8, 8, 8), (8, 8, 1))
    def test_a_wider_result_stays_as_wide(self, ins, outs, groups):
        """Of few channels, depthwise and plain: float64 is what was asked for."""
        with jax.enable_x64(True):
            x = jnp.arange(64 * ins, dtype=jnp.float32).reshape(1, 8, 8, ins) / 9
            kernel = jnp.ones((3, 3, ins // groups, outs), jnp.float32) / 7

            def wide(x, kernel):
                return lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=LAST, feature_group_count=groups,
                    preferred_element_type=jnp.float64,
                )  # fmt: skip

            shapes = jax.eval_shape(rewriting.fast_formulas(wide), x, kernel)
        self.assertEqual((shapes.shape, shapes.dtype), ((1, 8, 8, outs), jnp.float64))

    def test_inside_of_functions(self):
        function, x, kernel = made(CASES["channels first"])
        inner = jax.checkpoint(jax.jit(lambda x: function(x, kernel)), prevent_cse=False)
        ours = rewriting.fast_formulas(lambda pair: {"a": inner(pair[0]) + pair[1]})
        self.assertTrue(all(is_last(*n) for n in convolutions(ours, (x, 1.0))))
        np.testing.assert_allclose(
            ours((x, 1.0))["a"], function(x, kernel) + 1, rtol=1e-4, atol=1e-4
        )
        text = str(jax.make_jaxpr(ours)((x, 1.0)))
        self.assertIn("prevent_cse=False", text)
        self.assertNotIn("prevent_cse=True", text)

    def test_what_is_left_alone(self):
        function, x, kernel = made(CASES["channels first"])

        def tells(x):
            jax.debug.print("{}", x.sum())
            return function(x, kernel)

        for other, given in ((tells, x), (lambda x: jnp.sin(x), x), (lambda x: x, jnp.int32([1]))):
            ours = rewriting.fast_formulas(other)
            self.assertEqual(str(jax.make_jaxpr(ours)(given)), str(jax.make_jaxpr(other)(given)))
        whole = (jnp.ones(x.shape, jnp.int32), jnp.ones(kernel.shape, jnp.int32))
        ours = rewriting.fast_formulas(function)
        self.assertFalse(any(is_last(*n) for n in convolutions(ours, *whole)))


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def by_hand(x):
    return lax.erfc(np.float32(0.5**0.5) * -x) * (x * 0.5)


def has_erfc(function, x):
    return '/erfc"' in jax.jit(function).lower(x).compile().as_text()


class GeluTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("jax", gelu),
        ("by_hand", by_hand),
        ("jit", jax.jit(gelu)),
        ("checkpoint", jax.checkpoint(gelu)),
        ("twice", lambda x: gelu(gelu(x).reshape(-1)).reshape(x.shape)),
    )
    def test_values_and_gradients(self, function):
        ours, x = rewriting.fast_formulas(function), jnp.linspace(-9, 9, 1801).reshape(-1, 1)
        self.assertTrue(has_erfc(function, x))
        self.assertFalse(has_erfc(ours, x))
        # erf and erfc have errors of two roundings, of numbers up to 1, and x is up to 9.
        np.testing.assert_allclose(ours(x), function(x), rtol=3e-7, atol=9 * 1.2e-7)
        slopes = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (ours, function)]
        np.testing.assert_allclose(*slopes, rtol=1e-6, atol=1e-6)

    @parameterized.named_parameters(
        ("approximation", lambda x: jax.nn.gelu(x, approximate=True)),
        ("logarithm", lambda x: jnp.log(lax.erfc(x))),
        ("other_sign", lambda x: (0.5 * x) * lax.erfc(x * np.float32(0.5**0.5))),
        ("other_factor", lambda x: (0.5 * x) * lax.erfc(-x * 0.7)),
        ("other_half", lambda x: (0.25 * x) * lax.erfc(-x * np.float32(0.5**0.5))),
        ("of_another", lambda x: (0.5 * x[::-1]) * lax.erfc(-x * np.float32(0.5**0.5))),
        ("halves", lambda x: gelu(x.astype(jnp.bfloat16))),
    )
    def test_what_is_left_alone(self, function):
        x = jnp.linspace(-2, 2, 8)
        ours = rewriting.fast_formulas(function)
        self.assertEqual(str(jax.make_jaxpr(ours)(x)), str(jax.make_jaxpr(function)(x)))

    def test_float64(self):
        with jax.enable_x64(True):
            x = jnp.linspace(-2, 2, 8)
            ours = rewriting.fast_formulas(gelu)
            self.assertEqual(str(jax.make_jaxpr(ours)(x)), str(jax.make_jaxpr(gelu)(x)))

    def test_beside_convolutions(self):
        function, x, kernel = made(CASES["channels first"])
        ours = rewriting.fast_formulas(lambda x: gelu(function(x, kernel)))
        self.assertFalse(has_erfc(ours, x))
        np.testing.assert_allclose(ours(x), gelu(function(x, kernel)), rtol=1e-4, atol=1e-4)


class LoopTest(absltest.TestCase):
    def test_what_the_weights_determine_is_made_before(self):
        weights = jnp.arange(6.0).reshape(2, 3)
        scale = jnp.float32([2.0])

        def function(x, y):
            prepared = jnp.sin(weights * scale[None]) @ weights.T  # of weights alone
            wide = jnp.broadcast_to(scale, (100,))  # much larger than what it is made from
            return (x @ prepared).sum() * wide.sum() + y["a"].sum() + jnp.cos(scale).sum()

        given = jnp.float32([[1.0, -2.0]]), {"a": jnp.float32([3.0])}
        make, body = rewriting.before_a_loop(function, *given)
        before = make()
        shapes = [array.shape for array in before]
        self.assertIn((2, 2), shapes)
        self.assertNotIn((100,), shapes)
        np.testing.assert_allclose(body(before, *given), function(*given), rtol=1e-6)
        other = jnp.float32([[0.5, 4.0]]), {"a": jnp.float32([-1.0])}
        np.testing.assert_allclose(body(before, *other), function(*other), rtol=1e-6)
        inside = str(jax.make_jaxpr(lambda made, *operands: body(made, *operands))(before, *given))
        self.assertNotIn(" sin ", inside)
        self.assertIn("broadcast_in_dim[", inside)

    def test_nothing_to_make(self):
        make, body = rewriting.before_a_loop(lambda x: x * 2, jnp.ones(3))
        self.assertEqual(make(), [])
        np.testing.assert_array_equal(body([], jnp.arange(3.0)), [0, 2, 4])
