"""Convolutions, matrix products, and linear algebra: inverses, solutions, factorizations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array


class ConvolutionSettings(NamedTuple):
    """Arguments of `aten.convolution` after its arrays; one integer per side, or one for all."""

    stride: Ints
    padding: Ints
    dilation: Ints
    transposed: bool
    output_padding: Ints
    groups: int


def _convolution(x: Array, weight: Array, bias: Array | None, *settings: Any) -> ChannelsLast:
    """Convolve [B,sides...,in] with PyTorch's weight [out,in/groups,taps...]."""
    stride, padding, dilation, transposed, output_padding, groups = ConvolutionSettings(*settings)
    sides = x.ndim - 2
    taps = weight.shape[2:]
    steps, pads, holes, more = (
        tuple(value) * (sides if len(value) == 1 else 1)
        for value in (stride, padding, dilation, output_padding)
    )
    spread = (1,) * sides
    if transposed:  # the gradient of a convolution: its weight is [in,out/groups,taps...]
        weight = jnp.flip(weight, range(2, weight.ndim))
        weight = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(-1, *weight.shape[2:])
        reach = [hole * (tap - 1) for hole, tap in zip(holes, taps, strict=True)]
        around = [(r - p, r - p + m) for r, p, m in zip(reach, pads, more, strict=True)]
        steps, spread = spread, steps
    else:
        around = [(pad, pad) for pad in pads]
    kernel = jnp.moveaxis(weight, (0, 1), (-1, -2))
    names = "DHW"[-sides:]
    out = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=steps,
        padding=around,
        lhs_dilation=spread,
        rhs_dilation=holes,
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
        feature_group_count=groups,
    )
    return ChannelsLast(out if bias is None else out + bias)


def _addmm(bias: Array, x: Array, y: Array, beta: Any = 1, alpha: Any = 1) -> Array:
    product = x @ y
    return (bias if beta == 1 else beta * bias) + (product if alpha == 1 else alpha * product)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Compute attention of [..., L, E] to [..., S, E]; a fully masked row is zero."""
    assert not dropout_p, "a module in eval mode"
    if enable_gqa:  # several queries share a key
        key, value = (jnp.repeat(a, query.shape[-3] // a.shape[-3], -3) for a in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if mask is None:
        return jax.nn.softmax(scores, axis=-1) @ value
    if mask.dtype != bool:
        return jax.nn.softmax(scores + mask, axis=-1) @ value
    shares = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, shares, 0) @ value


def _failures(result: Array, axes: tuple[int, ...] = (-2, -1)) -> Array:
    """Return LAPACK's `info`, int32[...]: 0 for finite results, else 1 where PyTorch has more."""
    return (~jnp.isfinite(result).all(axes)).astype(jnp.int32)


def _inverse(matrix: Array, check_errors: bool = False) -> tuple[Array, Array]:
    inverse = jnp.linalg.inv(matrix)
    return inverse, _failures(inverse)


def _solve(
    matrix: Array, right: Array, *, left: bool = True, check_errors: bool = False
) -> tuple[Array | None, ...]:
    is_vector = right.ndim == 1 or right.shape == matrix.shape[:-1]
    columns = right[..., None] if is_vector else right
    solution = (
        jnp.linalg.solve(matrix, columns) if left else jnp.linalg.solve(matrix.mT, columns.mT).mT
    )
    return solution[..., 0] if is_vector else solution, None, None, _failures(solution)


def _solve_triangular(
    matrix: Array, right: Array, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Array:
    batch = jnp.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
    matrix, right = (jnp.broadcast_to(x, batch + x.shape[-2:]) for x in (matrix, right))
    if not left:  # X M = B is M' X' = B'
        matrix, right, upper = matrix.mT, right.mT, not upper
    solution = solve_triangular(matrix, right, lower=not upper, unit_diagonal=unitriangular)
    return solution if left else solution.mT


def _cholesky(matrix: Array, upper: bool = False) -> Array:
    """Factor a symmetric matrix; only one half is read, but both get the gradient."""
    values = lax.stop_gradient(matrix)
    half = jnp.tril(values.mT if upper else values)
    zero = matrix - values
    symmetric = half + jnp.tril(half, -1).mT + (zero + zero.mT) / 2
    lower = lax.linalg.cholesky(symmetric, symmetrize_input=False)
    return lower.mT if upper else lower


def _cholesky_and_info(
    matrix: Array, *, upper: bool = False, check_errors: bool = False
) -> tuple[Array, Array]:
    factor = _cholesky(matrix, upper)
    return factor, _failures(factor)


def _singular(
    matrix: Array,
    full_matrices: bool = False,
    compute_uv: bool = True,
    *,
    driver: str | None = None,
) -> tuple[Array, Array, Array]:
    """Return U, the singular values and V' of matrices [..., M, N]; vectors up to their signs."""
    # Vectors beyond the singular values have no gradient, as in PyTorch.
    none: Any = jnp.zeros((0,), matrix.dtype)
    if not compute_uv:
        return none, jnp.linalg.svd(matrix, compute_uv=False), none
    u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
    few = values.shape[-1]
    if full_matrices and matrix.shape[-2] != matrix.shape[-1]:
        full_u, _, full_vt = jnp.linalg.svd(lax.stop_gradient(matrix), full_matrices=True)
        u = jnp.concatenate([u, full_u[..., few:]], -1)
        vt = jnp.concatenate([vt, full_vt[..., few:, :]], -2)
    return u, values, vt


TABLE = {
    "aten.convolution.default": OperatorRule(None, _convolution),
    "aten.mm.default": OperatorRule(jnp.matmul),
    "aten.bmm.default": OperatorRule(jnp.matmul),
    "aten.addmm.default": OperatorRule(_addmm),
    "aten.scaled_dot_product_attention.default": OperatorRule(_attention),
    "aten.linalg_inv_ex.default": OperatorRule(_inverse),
    "aten._linalg_solve_ex.default": OperatorRule(_solve),
    "aten.linalg_solve_triangular.default": OperatorRule(_solve_triangular),
    "aten.linalg_cholesky_ex.default": OperatorRule(_cholesky_and_info),
    "aten.cholesky.default": OperatorRule(_cholesky),
    "aten._linalg_svd.default": OperatorRule(_singular),
}
