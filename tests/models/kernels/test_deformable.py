"""DCNv3's sampling next to the authors' operator, whose numbers are in internimage.npz.

They were made by running OpenGVLab/InternImage (31c962d) in float64, with N=2, H=7, W=9, G=4 and 16
channels a group, and are 5e-15 from a loop over pixels, groups, points and corners.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.deformable import bounded, operator
from jaxrobust.models.kernels.deformable.operator import deformable
from jaxrobust.models.kernels.deformable.places import GridGeometry
from tests.support import parity, sweeps

GROUPS = 4
# case -> offset scale, and what is made of the stored offsets. Of integers only the value is
# compared: there is no derivative for offsets.
CASES = {
    "a": (1.0, lambda offset: offset),
    "scale2": (2.0, lambda offset: offset),
    "zero": (1.0, np.zeros_like),
    "integer": (1.0, np.round),
    "far": (1.0, lambda offset: 20 * offset),
}


def stored():
    return np.load(parity.MODELS / "internimage.npz")


def operands(*names, dtype=jnp.float64):
    golden = stored()
    return [jnp.asarray(golden[f"dcn_{name}"], dtype) for name in names]


def by_definition(value, offsets, mask, *, groups, scale=1.0, stride=1, padding=1, dilation=1):
    """Each pixel, group, point and corner by itself, in NumPy."""
    batch, height, width, channels = value.shape
    rows, columns = mask.shape[1:3]
    out, each = np.zeros((batch, rows, columns, channels)), channels // groups
    for n, i, j, g, p in np.ndindex(batch, rows, columns, groups, 9):
        kx, ky = divmod(p, 3)
        at = 18 * g + 2 * p
        x = j * stride - padding + dilation
        x += scale * (dilation * (kx - 1) + offsets[n, i, j, at])
        y = i * stride - padding + dilation
        y += scale * (dilation * (ky - 1) + offsets[n, i, j, at + 1])
        part = slice(g * each, (g + 1) * each)
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    weight = mask[n, i, j, 9 * g + p] * (1 - abs(y - row)) * (1 - abs(x - column))
                    out[n, i, j, part] += weight * value[n, row, column, part]
    return out


class DeformableTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(CASES))
    def test_authors_numbers(self, case):
        self.check_authors_numbers(case, "gathers")

    @parameterized.parameters(*sorted(CASES))
    @pytest.mark.slow
    def test_authors_numbers_by_the_kernel(self, case):
        self.check_authors_numbers(case, "kernel")

    def check_authors_numbers(self, case, formula):
        scale, change = CASES[case]
        golden = stored()
        how = {"groups": GROUPS, "offset_scale": scale, "implementation": formula}
        is_kernel = formula == "kernel"
        dtype = jnp.float32 if is_kernel else jnp.float64
        with jax.enable_x64(not is_kernel), tpu.interpreted(is_kernel):
            names = ("value", "offset", "mask", "cotangent")
            value, offset, mask, cotangent = operands(*names, dtype=dtype)
            offset = jnp.asarray(change(np.asarray(offset)))

            def run(value, offset, mask, cotangent):
                out, back = jax.vjp(lambda *a: deformable(*a, **how), value, offset, mask)
                return out, back(cotangent)

            out, gradients = jax.jit(run)(value, offset, mask, cotangent)
        # Float64, sums of 36 terms of size 1: some units in the last place, and 16 times as many
        # terms in the gradients for offsets and mask.
        allowed = 5e-6 if is_kernel else 1e-12
        np.testing.assert_allclose(out, golden[f"dcn_{case}_out"], rtol=0, atol=allowed)
        if f"dcn_{case}_dvalue" in golden:
            for name, got in zip(("value", "offset", "mask"), gradients, strict=True):
                wanted = golden[f"dcn_{case}_d{name}"]
                allowed = 2e-6 * np.abs(wanted).max() if is_kernel else 1e-10
                np.testing.assert_allclose(got, wanted, rtol=0, atol=allowed, err_msg=name)

    def test_two_pixels_by_definition(self):
        """What they make of weights that are not one, and of points beyond the map."""
        random = np.random.default_rng(3)
        value, mask = random.standard_normal((1, 2, 3, 1)), random.random((1, 2, 3, 9))
        offsets = random.uniform(-2, 2, (1, 2, 3, 18))
        with jax.enable_x64(True):
            given = [jnp.asarray(a) for a in (value, offsets, mask)]
            got = jax.jit(lambda *a: deformable(*a, groups=1))(*given)
        wanted = by_definition(value, offsets, mask, groups=1)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)

    def test_windows_and_what_they_leave_out(self):
        """Offsets on both sides of two pixels, which the counter tells apart."""
        random = np.random.default_rng(0)
        value, mask = random.standard_normal((1, 5, 6, 4)), random.random((1, 5, 6, 18))
        offsets = random.uniform(-4, 4, (1, 5, 6, 36))
        offsets[0, 0, 0, :4] = (-2, 1.5, 2, 0)  # the first lies inside, the second does not
        mask[0, 1, 1, :] = 0  # whose gradient is none the less that of a sample
        with jax.enable_x64(True):
            given = [jnp.asarray(a) for a in (value, offsets, mask)]

            def run(*a):
                out, back = jax.vjp(lambda *b: deformable(*b, groups=2), *a)
                return out, *back(jnp.cos(out))

            out, *gradients = jax.device_get(jax.jit(run)(*given))
            pairs = offsets.reshape(-1, 2)
            beyond = ((pairs < -2) | (pairs >= 2)).any(1).sum()
            self.assertEqual(int(operator.outside(given[1])), beyond)
            self.assertEqual(int(operator.outside(given[1] / 4)), 0)
            # A scale stretches the grid too, by one pixel at its ends: no point is left inside.
            self.assertEqual(int(operator.outside(0 * given[1], offset_scale=4.0)), 30 * 2 * 8)
        wanted = by_definition(value, offsets, mask, groups=2)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)
        self.assertGreater(np.abs(gradients[2][0, 1, 1]).max(), 1e-3)

    @parameterized.parameters(
        {"stride": 2}, {"padding": 0}, {"dilation": 2, "padding": 2}, {"stride": 2, "padding": 2}
    )
    def test_other_grids(self, **how):
        """Stride, padding and dilation, of a map that is not square, by the definition."""
        random = np.random.default_rng(1)
        value = random.standard_normal((1, 6, 5, 4))
        reach = {"stride": 1, "padding": 1, "dilation": 1} | how
        sides = [
            (n + 2 * reach["padding"] - 2 * reach["dilation"] - 1) // reach["stride"] + 1
            for n in (6, 5)
        ]
        offsets, mask = random.standard_normal((1, *sides, 36)), random.random((1, *sides, 18))
        with jax.enable_x64(True):
            given = [jnp.asarray(a) for a in (value, offsets, mask)]
            out = jax.jit(lambda *a: deformable(*a, groups=2, **how))(*given)
        wanted = by_definition(value, offsets, mask, groups=2, **how)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)

    def test_gradients_at_whole_numbers_are_those_to_the_right(self):
        value = jnp.asarray([[0.0, 1.0, 3.0, 7.0]]).reshape(1, 1, 4, 1)
        offsets, mask = jnp.zeros((1, 1, 4, 18)), jnp.zeros((1, 1, 4, 9)).at[..., 4].set(1)
        chosen = jax.jit(jax.grad(lambda o: deformable(value, o, mask, groups=1)[0, 0, 1, 0]))
        gradient = chosen(offsets)
        # The center's column: 3 - 1 to its right, where to its left it were 1 - 0. Its row: 0 - 1.
        np.testing.assert_allclose(gradient[0, 0, 1, 8:10], (2, -1), atol=1e-6)

    def test_a_grid_is_that_of_the_network_unless_told_otherwise(self):
        plain = GridGeometry((7, 9), 4)
        self.assertEqual(plain, ((7, 9), 4, 1.0, 1, 1, 1))
        self.assertTrue(plain.is_plain)
        self.assertEqual(plain.out, (7, 9))
        for change, out in (
            ({"stride": 2}, (4, 5)),
            ({"padding": 0}, (5, 7)),
            ({"dilation": 2}, (5, 7)),
            ({"dilation": 2, "padding": 2}, (7, 9)),
        ):
            other = plain._replace(**change)
            self.assertEqual((other.out, other.is_plain), (out, False))
        self.assertTrue(plain._replace(scale=2.0).is_plain)

    @parameterized.parameters(*sorted(operator.IMPLEMENTATIONS))
    def test_places_are_float32_in_bfloat16(self, formula):
        self.enter_context(tpu.interpreted(True))
        value, offset, mask = operands("value", "offset", "mask", dtype=jnp.float32)
        how = {"groups": GROUPS, "implementation": formula}
        rounded = value.astype(jnp.bfloat16)
        out = deformable(rounded, offset, mask, **how)
        self.assertEqual(out.dtype, jnp.bfloat16)
        wanted = deformable(rounded.astype(jnp.float32), offset, mask, **how)
        # One rounding to 8 bits of a sum, and with products one of its weights, which are about 1:
        # half a unit each. Offsets rounded to bfloat16 would be off by 2e-2.
        np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=0, atol=1.2e-2)

    @sweeps.rows(
        ((1, 4, 4, 16), 2, jnp.float64, "float64 is neither float32 nor bfloat16"),
        ((1, 4, 4, 12), 2, jnp.float32, "6 channels in a group are not a multiple of 8"),
        ((1, 4, 136, 16), 2, jnp.float32, "136 columns are more than 128"),
        ((1, 512, 128, 128), 8, jnp.float32, "an image of 512x128x128 is larger than the fast"),
        ((1, 56, 56, 64), 4, jnp.bfloat16, None),
    )
    def test_maps_that_the_kernel_does_not_support(self, shape, groups, dtype, reason):
        """They take gathers."""
        with jax.enable_x64(True):
            value, offsets, mask = (
                jax.ShapeDtypeStruct((*shape[:3], n), dtype)
                for n in (shape[3], groups * 18, groups * 9)
            )
            geometry = GridGeometry(shape[1:3], groups)
            found = tpu.deformable_windows.refused(geometry, value, offsets, mask)
        self.assertEqual(found and found[: len(reason or "")], reason)

    def test_gradients_by_the_kernel(self):
        self.check_gradients_by_the_kernel("float32")

    @pytest.mark.slow
    def test_gradients_by_the_kernel_in_bfloat16(self):
        self.check_gradients_by_the_kernel("bfloat16")

    def check_gradients_by_the_kernel(self, dtype):
        """In float32 1e-6; in bfloat16 at most twice the error of gathers, at large values."""
        random = np.random.default_rng(4)
        value, mask = 1e3 * random.standard_normal((2, 2, 3, 16)), random.random((2, 2, 3, 18))
        offsets = random.uniform(-1.9, 1.9, (2, 2, 3, 36))
        offsets[0, 0, 0] = random.integers(-2, 2, 36)
        given = [jnp.asarray(a, dtype) for a in (value, offsets, mask)]

        def gradients(formula, *given):
            how = {"groups": 2, "implementation": formula}
            out, back = jax.vjp(lambda *a: deformable(*a, **how), *given)
            return jax.tree.map(lambda a: np.asarray(a, np.float64), (out, *back(given[0])))

        with tpu.interpreted(True):
            found = gradients("kernel", *given)
        plain = gradients("gathers", *given)
        with jax.enable_x64(True):
            exact = gradients("gathers", *(jnp.asarray(np.asarray(a), jnp.float64) for a in given))
        for got, other, wanted in zip(found, plain, exact, strict=True):
            error, allowed = np.abs(got - wanted).max(), 2 * np.abs(other - wanted).max()
            self.assertLessEqual(error, max(allowed, 1e-6 * np.abs(wanted).max()))

    def test_only_images_with_points_beyond_windows_take_gathers(self):
        """Of three images one has such a point; the kernel samples the others alone."""
        random = np.random.default_rng(1)
        value, mask = random.standard_normal((3, 3, 4, 8)), random.random((3, 3, 4, 9))
        offsets = random.uniform(-1, 1, (3, 3, 4, 18))
        offsets[1, 2, 2, 7] = -2.5
        given = [jnp.asarray(a, jnp.float32) for a in (value, offsets, mask)]
        taken = []

        def more(part, geometry, beyond, totals, *operands):
            jax.debug.callback(lambda b: taken.append(bool(b)), beyond)
            return with_beyond(part, geometry, beyond, totals, *operands)

        with_beyond = bounded.with_beyond
        self.enter_context(tpu.interpreted(True))
        self.enter_context(mock.patch.object(bounded, "with_beyond", more))
        out = jax.block_until_ready(deformable(*given, groups=1, implementation="kernel"))
        jax.effects_barrier()
        np.testing.assert_allclose(
            out, by_definition(value, offsets, mask, groups=1), rtol=0, atol=2e-6
        )
        self.assertEqual(sorted(taken), [False, False, True])

    def test_an_offset_that_is_no_number_shows(self):
        value, offset, mask = operands("value", "offset", "mask", dtype=jnp.float32)
        offset = offset.at[0, 3, 4, 5].set(jnp.nan)
        self.enter_context(tpu.interpreted(True))
        for formula in operator.IMPLEMENTATIONS:
            run = jax.jit(lambda *a, f=formula: deformable(*a, groups=GROUPS, implementation=f))
            bad = np.isnan(run(value, offset, mask))
            self.assertTrue(bad[0, 3, 4, :16].all(), formula)
            self.assertEqual(bad.sum(), 16, formula)
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            with self.assertRaisesRegex(
                ValueError, "^offsets contain NaN or infinity; look for the first layer whose"
            ):
                deformable(value, offset.at[0, 3, 4, 5].set(bad), mask, groups=GROUPS)

    @sweeps.rows(
        ({"groups": 0}, "64 channels cannot form 0 groups of equal size"),
        (
            {"groups": 3},
            "64 channels cannot form 3 groups of equal size; choose groups that divide",
        ),
        (
            {"dilation": 5},
            "a map of 7x9 with padding=1 is smaller than the grid of 3x3 points with",
        ),
        ({"offset": (2, 7, 9, 36)}, r"shape \(2, 7, 9, 36\) of offsets must be \(2, 7, 9, 72\)"),
        ({"mask": (2, 7, 9, 72)}, r"shape \(2, 7, 9, 72\) of mask must be \(2, 7, 9, 36\) for 4"),
        ({"type": jnp.int32}, "offsets are int32; give floats, offsets in pixels"),
    )
    def test_bad_input(self, changes, message):
        offset = jnp.zeros(changes.pop("offset", (2, 7, 9, 72)), changes.pop("type", jnp.float32))
        mask = jnp.zeros(changes.pop("mask", (2, 7, 9, 36)))
        with self.assertRaisesRegex(ValueError, message):
            deformable(jnp.zeros((2, 7, 9, 64)), offset, mask, **{"groups": GROUPS} | changes)
