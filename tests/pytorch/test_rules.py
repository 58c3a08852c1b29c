"""Rows of the table of operators at their edges, called as a program calls them, next to
PyTorch.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.operators import TABLE, ordering, reductions, resampling
from jaxrobust.pytorch.program import ChannelsLast, Of, OperatorCall
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)

DRAW = np.random.default_rng(0)
LINE = np.array([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.0, 3.0])
TABLEAU = np.array([[3.0, 1.0, 2.0, 1.0], [0.0, 5.0, 5.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
HOLES = np.array([[3.0, np.nan, 2.0, 1.0], [np.nan, 5.0, np.nan, -1.0], [2.0, 1.0, 0.0, 4.0]])
MAP = DRAW.normal(size=(2, 4, 5, 7))
VOLUME = DRAW.normal(size=(1, 2, 3, 4, 5))
MATRIX = DRAW.normal(size=(2, 3, 3)) + 3 * np.eye(3)
INTS = np.array([-7, -4, -1, 0, 3, 8])
PLACES = np.array([[2, 0], [1, 1]])
SPLIT = DRAW.normal(size=(4, 6)) + 1j * DRAW.normal(size=(4, 6))

# Operator, its arguments. With channels last too where the row takes images so.
ROWS: list[tuple[Any, ...]] = [
    ("clamp", LINE, -1.0, 1.0),  # of numbers at the ends, too
    ("clamp", LINE, None, 0.25),
    ("clamp.Tensor", LINE, np.full(8, -0.5), np.linspace(-1, 2, 8)),
    ("hardtanh", LINE, -1.0, 1.0),
    ("relu", LINE),
    ("leaky_relu", LINE, 0.1),
    ("gelu", LINE, "tanh"),
    ("div.Tensor_mode", LINE, np.full(8, -0.4), "floor"),
    ("div.Tensor_mode", LINE, np.full(8, -0.4), "trunc"),
    ("div.Tensor_mode", INTS, np.array([2, 3, -4, 5, -2, 3]), "floor"),
    ("div.Tensor_mode", INTS, np.array([2, 3, -4, 5, -2, 3]), "trunc"),
    ("div.Tensor_mode", INTS, np.array([2, 3, -4, 5, -2, 3]), None),
    ("div.Tensor", INTS, np.array([2, 3, -4, 5, -2, 3])),
    ("remainder.Tensor", LINE, np.full(8, -0.4)),
    ("fmod.Tensor", LINE, np.full(8, -0.4)),
    ("remainder.Scalar", INTS, 3),
    ("fmod.Scalar", INTS, 3),
    ("pow.Tensor_Scalar", LINE, 3.0),
    ("pow.Tensor_Scalar", LINE[LINE != 0], -2.0),
    ("pow.Tensor_Tensor", np.abs(LINE) + 0.5, LINE),
    ("pow.Scalar", 2.0, LINE),
    ("add.Tensor", LINE, LINE[::-1].copy(), {"alpha": -3}),
    ("sub.Scalar", LINE, 2.0, 3),
    *((f"{name}.Tensor", LINE, LINE[::-1].copy(), {"alpha": 2}) for name in ("add", "sub")),
    *((f"{name}.Tensor", LINE, LINE[::-1].copy()) for name in ("add", "sub")),
    ("atan2", LINE, LINE[::-1].copy() + 0.1),
    *(("linalg_vector_norm", HOLES[2:] + 1, p, [1]) for p in (0.0, 0.5, 1.0, 2.0, 3.0)),
    *(("linalg_vector_norm", MAP, p, [1, 3], True) for p in (np.inf, -np.inf, -1.0)),
    ("linalg_vector_norm", MAP, 2.0, None),
    ("linalg_vector_norm", TABLEAU * 0, 2.0, [0]),
    ("var.correction", MAP, [2], {"correction": None}),
    ("var.correction", MAP, None, {"correction": 0}),
    ("var.correction", MAP, [0, 3], {"correction": 2, "keepdim": True}),
    ("sum.dim_IntList", MAP, []),
    ("sum.dim_IntList", MAP, [-1, 1]),
    ("sum.dim_IntList", INTS.reshape(2, 3), [1], True),
    ("mean.dim", MAP, [3], True),
    ("mean.dim", MAP, [1]),
    ("amax", TABLEAU, [1]),
    ("amin", MAP, [2, 3]),
    ("prod.dim_int", TABLEAU, 0, True),
    ("any.dim", TABLEAU > 2, 1, True),
    ("argmax", TABLEAU, 1, True),
    ("argmax", TABLEAU, None),
    ("argmin", TABLEAU, 0),
    ("max.dim", TABLEAU, 1, True),
    ("min.dim", TABLEAU, 0),
    ("cumsum", TABLEAU, -1),
    ("logcumsumexp", TABLEAU, -2),
    ("_softmax", MAP, -3, False),
    ("_log_softmax", MAP, 0, False),
    ("sort", TABLEAU + np.arange(4) / 8, -1, False),
    ("sort", TABLEAU + np.arange(4) / 8, 0, True),
    ("topk", TABLEAU + np.arange(4) / 8, 2, 1, False, True),
    ("topk", MAP, 3, -2, True, True),
    ("median.dim", TABLEAU + np.arange(4) / 8, 1, True),
    ("median.dim", HOLES, 1),
    ("nanmedian.dim", HOLES, 1),
    ("nanmedian.dim", HOLES, 0, True),
    ("kthvalue", TABLEAU + np.arange(4) / 8, 3, -1, True),
    ("mode", TABLEAU, 1, True),
    ("cummax", TABLEAU, 1),
    ("cummax", HOLES, 1),
    ("cummin", HOLES, 0),
    ("histc", TABLEAU, 4, 0, 3),
    ("bucketize.Tensor", TABLEAU, np.array([0.0, 1.0, 2.0, 5.0])),
    (
        "bucketize.Tensor",
        TABLEAU,
        np.array([0.0, 1.0, 2.0, 5.0]),
        {"right": True, "out_int32": True},
    ),
    ("searchsorted.Tensor", np.sort(TABLEAU, 1), TABLEAU[:, ::2].copy()),
    ("searchsorted.Tensor", np.sort(TABLEAU, 1), TABLEAU[:, ::2].copy(), {"side": "right"}),
    ("searchsorted.Tensor", np.sort(TABLEAU, 1), TABLEAU[:, ::2].copy(), {"right": True}),
    ("searchsorted.Tensor", np.sort(LINE), TABLEAU, {"side": "right"}),  # bounds of all rows
    ("searchsorted.Tensor", LINE[::-1].copy(), TABLEAU, {"sorter": np.arange(8)[::-1].copy()}),
    ("gather", TABLEAU, 1, PLACES),
    ("gather", TABLEAU, -2, PLACES),
    ("scatter.src", TABLEAU, 1, PLACES[:1], TABLEAU + 10),
    ("scatter.value", TABLEAU, 0, PLACES, 7.0),
    ("scatter_add", TABLEAU, 1, PLACES[1:], TABLEAU + 10),
    *(
        ("scatter_reduce.two", TABLEAU, 1, PLACES, TABLEAU[:2, :2] - 3, kind, {"include_self": own})
        for kind in ("sum", "mean", "prod", "amax", "amin")
        for own in (True, False)
    ),
    ("scatter_reduce.two", INTS.reshape(2, 3), 1, PLACES, INTS[:4].reshape(2, 2), "mean"),
    ("index.Tensor", MAP, [None, np.array([3, 0])]),
    ("index.Tensor", MAP, [np.array([1, 0]), None, np.array([2, -1])]),
    ("index_put", TABLEAU, [np.array([1, 1])], np.ones((2, 4)), True),
    ("index_put", TABLEAU, [None, np.array([3, 0])], TABLEAU[:, :2].copy() * 2, False),
    *(("index_put", TABLEAU, [TABLEAU > 2], np.array(7.0), add) for add in (True, False)),
    ("index_put", TABLEAU, [None, np.array([True, False, False, True])], np.array(7.0), False),
    ("index_put", TABLEAU, [np.array([True, False, True])], np.array(7.0), True),
    ("put", TABLEAU, np.array([3, 3, -1]), np.array([1.0, 2.0, 4.0]), True),
    ("index_select", MAP, -1, np.array([6, 0, 0])),
    ("embedding", TABLEAU, PLACES),
    *(("_fft_c2c", SPLIT, [1], norm, forward) for norm in (0, 1, 2) for forward in (True, False)),
    *(("_fft_r2c", MAP[0, 0], [0, 1], norm, half) for norm in (0, 1, 2) for half in (True, False)),
    *(("_fft_r2c", MAP[0], [dim], 0, half) for dim, half in ((0, True), (1, False))),
    *(("_fft_c2r", SPLIT, [0, 1], norm, last) for norm, last in ((0, 11), (1, 10), (2, 11))),
    ("_cdist_forward", TABLEAU, TABLEAU[:2] + 0.5, 1.5, None),
    *(("_cdist_forward", TABLEAU, TABLEAU[:2] + 0.5, p, None) for p in (0.0, np.inf)),
    ("_pdist_forward", TABLEAU, 1.0),
    ("_pdist_forward", TABLEAU[:, :2].copy(), 2.0),
    ("slice.Tensor", MAP, 2, 1, 9, 2),
    ("slice.Tensor", MAP, -1, -3, None, 1),
    ("select.int", MAP, -2, -1),
    ("split_with_sizes", MAP, [1, 3], 1),
    ("split_with_sizes", MAP, [2, 4, 1], -1),
    ("cat", [MAP, MAP[:, :1] * 2], 1),
    ("cat", [MAP, MAP[..., :2] * 2], -1),
    ("cat", [LINE, np.zeros(0), LINE * 2], 0),
    ("expand", TABLEAU[:, :1].copy(), [2, -1, 4]),
    ("repeat", TABLEAU, [2, 1, 3]),
    ("flip", MAP, [1, -1]),
    ("as_strided", TABLEAU, [2, 3], [5, 1], 2),
    ("as_strided", TABLEAU, [2, 2], [4, 2]),
    ("unfold", MAP, -1, 3, 2),
    ("diagonal", MAP, 1, 3, 2),
    ("diagonal", MAP, -2),
    ("slice_scatter", TABLEAU, np.ones((3, 2)), 1, 0, 4, 2),
    ("slice_scatter", TABLEAU, np.ones((1, 4)), 0, -2, -1),
    ("constant_pad_nd", MAP, [1, -2, 0, 3], 0.5),
    ("constant_pad_nd", MAP, [0, 0, 2, 0, -1, 1], -1.0),
    ("squeeze.dims", MAP[:1, :, :1], [0, 2, 3]),
    (
        *("convolution", MAP, DRAW.normal(size=(6, 2, 3, 2)), DRAW.normal(size=6)),
        *([2, 1], [1, 0], [1, 2], False, [0, 0], 2),
    ),
    (
        *("convolution", MAP, DRAW.normal(size=(4, 3, 2, 3)), None),
        *([2, 3], [1, 0], [1, 2], True, [1, 0], 2),
    ),
    (
        *("convolution", MAP, DRAW.normal(size=(4, 2, 3, 3)), DRAW.normal(size=2)),
        *([1, 1], [2, 1], [2, 1], True, [0, 0], 1),
    ),
    ("max_pool2d_with_indices", MAP, [3, 2], [2, 3], [1, 1], [1, 2], True),
    ("max_pool2d_with_indices", np.round(MAP), [2, 2], [], [0, 0], [1, 1], False),  # of equal ones
    ("max_pool2d_with_indices", MAP, [1, 1], [5, 7], [0, 0], [1, 1], True),  # none begins behind
    ("avg_pool2d", MAP, [3, 2], [2, 3], [1, 0], True, False),
    ("avg_pool2d", MAP, [3, 3], [1, 1], [1, 1], False, False),
    ("avg_pool2d", MAP, [2, 3], [], [1, 1], False, True, 5),
    ("avg_pool3d", VOLUME, [2, 1, 3], [1, 2, 2], [1, 0, 1], False, True),
    ("_adaptive_avg_pool2d", MAP, [2, 7]),
    ("_adaptive_avg_pool2d", MAP, [6, 9]),  # more than there are pixels
    ("adaptive_max_pool2d", MAP, [3, 2]),
    ("upsample_nearest2d.vec", MAP, [8, 3], None),
    ("upsample_nearest2d.vec", MAP, None, [1.5, 0.7]),
    ("upsample_bilinear2d.vec", MAP, [8, 3], False, None),
    ("upsample_bilinear2d.vec", MAP, [1, 9], True, None),
    ("upsample_bilinear2d.vec", MAP, None, False, [1.5, 0.7]),
    ("_upsample_bilinear2d_aa", MAP, [3, 9], False, None, None),
    ("_upsample_bilinear2d_aa", MAP, [2, 5], True, None, None),
    ("_upsample_bicubic2d_aa", MAP, [3, 4], False, 0.55, None),
    ("native_layer_norm", MAP, [5, 7], None, None, 1e-2),
    ("native_layer_norm", MAP, [7], np.arange(7.0), np.arange(7.0)[::-1].copy(), 1e-2),
    ("native_group_norm", MAP, np.arange(4.0), np.ones(4), 2, 4, 35, 2, 1e-2),
    (
        *("_native_batch_norm_legit_no_training", MAP, np.arange(4.0), None),
        *(np.ones(4), np.arange(1.0, 5), 0.1, 1e-2),
    ),
    (
        *("_native_batch_norm_legit_no_training", MAP, None, np.arange(4.0)),
        *(np.ones(4), np.arange(1.0, 5), 0.1, 1e-2),
    ),
    ("addmm", TABLEAU[:, :3] + 0, TABLEAU, TABLEAU.T.copy(), {"beta": 0.5, "alpha": -2}),
    ("linalg_inv_ex", MATRIX),
    ("_linalg_solve_ex", MATRIX, MATRIX[..., :2] + 1),
    ("_linalg_solve_ex", MATRIX, MATRIX[:, :2] + 1, {"left": False}),
    ("_linalg_solve_ex", MATRIX, MATRIX[..., 0] + 1),
    *(
        (
            *("linalg_solve_triangular", np.triu(MATRIX) if upper else np.tril(MATRIX)),
            *(MATRIX + 1, {"upper": upper, "left": left, "unitriangular": unit}),
        )
        for upper, left, unit in ((True, True, False), (False, False, True), (True, False, False))
    ),
    ("linalg_cholesky_ex", MATRIX @ MATRIX.mT, {"upper": True}),
    ("cholesky", MATRIX @ MATRIX.mT, False),
    ("scaled_dot_product_attention", MAP, MAP + 0.5, MAP[..., :3].copy(), {"scale": 0.3}),
    ("scaled_dot_product_attention", MAP, MAP + 0.5, MAP[..., :3].copy()),
]
# PyTorch has no gradient of these, or another one on purpose.
VALUES = {"_cdist_forward", "_pdist_forward", "cholesky", "linalg_cholesky_ex", "index.Tensor"}
VALUES |= {"median.dim", "nanmedian.dim", "cummax", "cummin"}  # of NaN


def leaves(value: Any) -> list[np.ndarray]:
    return [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, np.ndarray)]


def bound(row: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """PyTorch's operator, and its arguments by name, as an exported program writes them."""
    name, *args = row
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    named = args.pop() if isinstance(args[-1], dict) else {}
    given = dict(zip([a.name for a in operator._schema.arguments], args, strict=False)) | named
    whole = {a.name: given.get(a.name, a.default_value) for a in operator._schema.arguments}
    return operator, whole


def theirs(row: tuple[Any, ...]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Values and the gradient in the first array."""
    operator, given = bound(row)
    first: list[Any] = []

    def tensor(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor(each) for each in value]
        if not isinstance(value, np.ndarray):
            return value
        made = torch.from_numpy(np.array(value))
        if not first:
            first.append(made.requires_grad_(made.is_floating_point()))
        return made

    kind = {a.name: a.kwarg_only for a in operator._schema.arguments}
    tensors = {key: tensor(value) for key, value in given.items()}
    args = [value for key, value in tensors.items() if not kind[key]]
    result = operator(*args, **{key: value for key, value in tensors.items() if kind[key]})
    found = [*result] if isinstance(result, tuple | list) else [result]
    values, gradient = [r.detach().numpy() for r in found], None
    smooth = [r for r in found[:1] if r.requires_grad]
    if smooth and row[0] not in VALUES:
        real = [(r.abs() if r.is_complex() else r, weights(r.detach().numpy())) for r in smooth]
        total = sum((r * torch.from_numpy(own)).sum() for r, own in real)
        (slope,) = torch.autograd.grad(total, first[0], allow_unused=True)
        gradient = None if slope is None else slope.numpy()
    return values, gradient


def weights(value: Any) -> np.ndarray:
    return np.cos(np.arange(value.size)).reshape(value.shape)


def ours(row: tuple[Any, ...], arrays: list[Any], last: bool) -> list[Any]:
    """What the program's step gives, of arrays in the places of the row's."""
    operator, given = bound(row)
    places, values = iter(range(len(arrays))), {}

    def operand(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(operand(each) for each in value)
        if not isinstance(value, np.ndarray):
            return value
        place = next(places)
        array = arrays[place]
        images = last and array.ndim >= 4
        values[f"v{place}"] = ChannelsLast(jnp.moveaxis(array, 1, -1)) if images else array
        return Of(f"v{place}")

    dropped = {"layout", "device", "pin_memory", "memory_format", "generator"}
    operands, keywords = [], {}
    for argument in operator._schema.arguments:
        value = operand(given[argument.name])
        if argument.name in dropped:
            continue
        if argument.kwarg_only:
            keywords[argument.name] = value
        else:
            operands.append(value)
    step = OperatorCall("out", str(operator), tuple(operands), keywords, "a line")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = programs.compute(step, TABLE, values, {})
    several = not hasattr(result, "shape") and not isinstance(result, ChannelsLast)
    return [programs.plain(each) for each in result] if several else [programs.plain(result)]


def with_gradient(row: tuple[Any, ...], arrays: list[Any], last: bool) -> tuple[Any, Any]:
    def total(first: Any, rest: list[Any]) -> Any:
        found = ours(row, [first, *rest], last)
        smooth = [v for v in found[:1] if jnp.issubdtype(v.dtype, jnp.inexact)]
        sums = [((jnp.abs(v) if jnp.iscomplexobj(v) else v) * weights(v)).sum() for v in smooth]
        return (sum(sums) if sums else jnp.float64(0)), found

    if not jnp.issubdtype(arrays[0].dtype, jnp.floating) or row[0] in VALUES:
        return ours(row, arrays, last), None
    gradient, found = jax.grad(total, has_aux=True)(arrays[0], arrays[1:])
    return found, gradient


def takes_last(row: tuple[Any, ...]) -> bool:
    rule, array = TABLE[str(bound(row)[0])], leaves(row)[0]
    return array.ndim >= 4 and (rule.last is not None or rule.joins)


class RulesTest(parameterized.TestCase):
    """All rows in a few programs."""

    @sweeps.rows((False, [2, 3, 3, 2]), (True, [3, 3, 3, 3]))
    def test_how_many_numbers_an_average_is_of(self, with_padding, expected):
        axis = resampling._Axis(1, side=4, size=3, stride=1, padding=1, dilation=1, windows=4)
        np.testing.assert_array_equal(axis.counted(with_padding), expected)

    @sweeps.rows(*itertools.product((1, 2), (False, True)))
    def test_equal_bounds_are_to_the_left_or_right(self, axes, right):
        bounds = np.array([[1, 2, 2, 3], [0, 2, 5, 7]])[slice(None) if axes == 2 else 0]
        numbers = np.array([[2, 9], [2, 5]])
        expected = torch.searchsorted(torch.tensor(bounds), torch.tensor(numbers), right=right)
        for how in ({"right": right}, {"side": "right" if right else "left"}):
            found = ordering._searchsorted(jnp.asarray(bounds), numbers, **how)
            np.testing.assert_array_equal(found, expected)

    def test_a_spectrum_is_along_its_axes_alone(self):
        x = np.random.default_rng(0).normal(size=(2, 3, 4))
        with jax.enable_x64(True):
            for dim, half in ((1, True), (2, False)):
                found = reductions._fourier_of_reals(jnp.asarray(x), [dim], 0, half)
                expected = (np.fft.rfft if half else np.fft.fft)(x, axis=dim)
                np.testing.assert_allclose(found, expected, atol=1e-12)

    @parameterized.parameters(*range(4))
    def test_values_and_gradients(self, part):
        rows = list(enumerate(ROWS))[part::4]
        cases = {
            f"{number} {row[0]}{' last' if last else ''}": (row, last)
            for number, row in rows
            for last in ([False, True] if takes_last(row) else [False])
        }

        @jax.jit
        def run(arrays: dict[str, list[Any]]) -> dict[str, Any]:
            return {
                key: with_gradient(*cases[key][:1], arrays[key], cases[key][1]) for key in cases
            }

        with jax.enable_x64(True):
            given = {k: [jnp.asarray(a) for a in leaves(row)] for k, (row, _) in cases.items()}
            found = jax.device_get(run(given))
        for key, (row, _) in cases.items():
            expected, slope = theirs(row)
            values, gradient = found[key]
            self.assertLen(values, len(expected), key)
            for value, wanted in zip(values, expected, strict=True):
                if value is None:  # which no program reads
                    continue
                self.assertEqual(value.shape, wanted.shape, key)
                # Of whole numbers PyTorch divides in float32.
                bar = 1e-7 if wanted.dtype == np.float32 else 1e-9
                np.testing.assert_allclose(value, wanted, rtol=bar, atol=bar, err_msg=key)
            if slope is not None:
                np.testing.assert_allclose(gradient, slope, rtol=1e-8, atol=1e-8, err_msg=key)

    def test_a_relu_hides_no_nan(self):
        got = TABLE["aten.relu.default"].plain(jnp.asarray([np.nan, -1.0, 0.0, 2.0]))
        np.testing.assert_array_equal(got, [np.nan, 0, 0, 2])

    def test_numbers_keep_their_type_where_only_whole_ones_become_floats(self):
        with jax.enable_x64(True):
            for kind in (jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64):
                x = jnp.asarray([0.25, 4.0], kind)
                for name in ("sqrt", "exp"):
                    self.assertEqual(TABLE[f"aten.{name}.default"].plain(x).dtype, kind)
                self.assertEqual(TABLE["aten.div.Tensor"].plain(x, x).dtype, kind)
            turned = TABLE["aten.sqrt.default"].plain(jnp.asarray([-4 + 0j]))
            np.testing.assert_allclose(turned, [2j], atol=1e-12)
        for whole in (jnp.asarray([1, 4]), jnp.asarray([True, True])):
            found = TABLE["aten.sqrt.default"].plain(whole)
            self.assertEqual(found.dtype, jnp.float32)
            np.testing.assert_array_equal(found, np.sqrt(np.asarray(whole, np.float32)))

    @parameterized.parameters((4, 2, True), (2, 4, True), (3, 3, True), (4, 2, False))
    def test_singular_vectors_make_the_matrix_and_a_basis(self, height, width, full):
        matrix = DRAW.normal(size=(2, height, width))
        svd, few = TABLE["aten._linalg_svd.default"].plain, min(height, width)
        with jax.enable_x64(True):
            left, values, right = map(np.asarray, svd(jnp.asarray(matrix), full))
            alone = svd(jnp.asarray(matrix), full, False)
        sides = (height, width) if full else (few, few)
        self.assertEqual((left.shape, right.shape), ((2, height, sides[0]), (2, sides[1], width)))
        made = left[..., :few] * values[:, None] @ right[:, :few]
        np.testing.assert_allclose(made, matrix, atol=1e-12)
        for basis in (left.mT @ left, right @ right.mT):
            np.testing.assert_allclose(basis, np.broadcast_to(np.eye(len(basis[0])), basis.shape),
                                       atol=1e-12)  # fmt: skip
        np.testing.assert_allclose(values, np.linalg.svd(matrix)[1], atol=1e-12)
        np.testing.assert_allclose(alone[1], values, atol=1e-12)
        self.assertEqual([each.shape for each in (alone[0], alone[2])], [(0,), (0,)])

    def test_whole_numbers_are_as_long_as_asked_for(self):
        """The rows above compare values; places of bounds come in 64 bits or, asked for, in 32."""
        bounds, x = np.array([0.0, 1.0, 2.0]), np.array([[1.0, 5.0]])
        with jax.enable_x64(True):
            for row in (("bucketize.Tensor", x, bounds), ("searchsorted.Tensor", bounds, x)):
                for narrow, kind in ((False, np.int64), (True, np.int32)):
                    asked = (*row, {"out_int32": narrow})
                    (found,) = ours(asked, [jnp.asarray(a) for a in leaves(asked)], False)
                    self.assertEqual(found.dtype, kind)
