"""Small PyTorch computations with whole matrices: inverses, solutions, factors."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


def _regular(x):
    """Return matrices [B, 9, 9] that are neither symmetric nor near singular ones."""
    return x[:, 0] @ x[:, 1].mT + 4 * torch.eye(x.shape[-1]).to(x)


def _positive(x):
    """Return the same, whose halves are those of different positive ones."""
    return (x[:, 0] @ x[:, 0].mT) * (1 + 0.1 * x[:, 1]) + 4 * torch.eye(x.shape[-1]).to(x)


def _inverses(x):
    found, failures = torch.linalg.inv_ex(_regular(x))
    return found + torch.inverse(x[:, 2] + 9 * torch.eye(x.shape[-1]).to(x)) + failures.sum()


def _solutions(x):
    matrix = _regular(x)
    columns = torch.linalg.solve(matrix, x[:, 2, :, :4]).flatten(1)
    rows = torch.linalg.solve(matrix, x[:, 2, :4], left=False).flatten(1)
    half = torch.linalg.solve_triangular(matrix, x[:, 3], upper=True).flatten(1)
    other = torch.linalg.solve_triangular(matrix.tril(), x[:, 3], upper=False, left=False)
    one = torch.linalg.solve(matrix, x[:, 2, :, 0])
    return torch.cat([columns, rows, half, other.flatten(1), one], 1)


def _factors(x):
    matrix = _positive(x)
    upper = torch.linalg.cholesky(matrix, upper=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch names the newer one
        older = torch.cholesky(matrix + matrix.mT)
    return torch.linalg.cholesky(matrix) + 2 * upper + older.sin()


def _singular(x):
    """Of values and of what no sign of a vector changes."""
    wide = x[:, 0, :5] + 2 * torch.eye(5, x.shape[-1]).to(x)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    cut = left @ torch.diag_embed(values.sin()) @ right
    whole = torch.linalg.svd(wide.mT, full_matrices=True)
    outside = whole[0][..., 5:] @ whole[0][..., 5:].mT
    norms = torch.linalg.svdvals(x[:, 1])
    # The vectors beyond the values have no gradient in PyTorch.
    return torch.cat([cut.flatten(1), values, norms, outside.detach().flatten(1)], 1)


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "inverses": _inverses,
    "solutions": _solutions,
    "factors": _factors,
    "singular values": _singular,
}
