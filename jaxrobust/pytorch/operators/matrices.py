"""Operators of whole matrices: inverses, solutions, Cholesky factors, singular values."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxrobust.pytorch.program import OperatorRule
from jaxrobust.types import Array


def _failures(result: Array, axes: tuple[int, ...] = (-2, -1)) -> Array:
    """Return LAPACK's `info`, int32[...]: 0 where a result is finite, 1 where PyTorch has more."""
    return (~jnp.isfinite(result).all(axes)).astype(jnp.int32)


def _inverse(matrix: Array, check_errors: bool = False) -> tuple[Array, Array]:
    inverse = jnp.linalg.inv(matrix)
    return inverse, _failures(inverse)


def _solve(
    matrix: Array, given: Array, *, left: bool = True, check_errors: bool = False
) -> tuple[Array | None, ...]:
    vector = given.ndim == 1 or given.shape == matrix.shape[:-1]
    wide = given[..., None] if vector else given
    solution = jnp.linalg.solve(matrix, wide) if left else jnp.linalg.solve(matrix.mT, wide.mT).mT
    return solution[..., 0] if vector else solution, None, None, _failures(solution)


def _solve_triangular(
    matrix: Array, given: Array, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Array:
    batch = jnp.broadcast_shapes(matrix.shape[:-2], given.shape[:-2])
    matrix, given = (jnp.broadcast_to(x, batch + x.shape[-2:]) for x in (matrix, given))
    if not left:  # X M = B is M' X' = B'
        matrix, given, upper = matrix.mT, given.mT, not upper
    solution = solve_triangular(matrix, given, lower=not upper, unit_diagonal=unitriangular)
    return solution if left else solution.mT


def _cholesky(matrix: Array, upper: bool = False) -> Array:
    """Factor a symmetric matrix, of which one half is read; both have the gradient."""
    held = lax.stop_gradient(matrix)
    half = jnp.tril(held.mT if upper else held)
    apart = matrix - held  # zero
    symmetric = half + jnp.tril(half, -1).mT + (apart + apart.mT) / 2
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
    """Return U, the singular values, V' of matrices [..., M, N]; vectors are up to their signs.

    The vectors beyond the values have no gradient, in PyTorch neither.
    """
    none: Any = jnp.zeros((0,), matrix.dtype)
    if not compute_uv:
        return none, jnp.linalg.svd(matrix, compute_uv=False), none
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    few = values.shape[-1]
    if full_matrices and matrix.shape[-2] != matrix.shape[-1]:
        held = jnp.linalg.svd(lax.stop_gradient(matrix), full_matrices=True)
        left = jnp.concatenate([left, held[0][..., few:]], -1)
        right = jnp.concatenate([right, held[2][..., few:, :]], -2)
    return left, values, right


TABLE = {
    "aten.linalg_inv_ex.default": OperatorRule(_inverse),
    "aten._linalg_solve_ex.default": OperatorRule(_solve),
    "aten.linalg_solve_triangular.default": OperatorRule(_solve_triangular),
    "aten.linalg_cholesky_ex.default": OperatorRule(_cholesky_and_info),
    "aten.cholesky.default": OperatorRule(_cholesky),
    "aten._linalg_svd.default": OperatorRule(_singular),
}
