"""Float32 matrix products in bfloat16, for CPUs with faster instructions for these.

Factors are rounded but sums are not, as on a TPU at its default precision.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import dot_general_p

from jaxrobust.types import Array


def narrow_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with bfloat16 products for float32 ones without an explicit precision.

    This includes loops, conditions and functions with custom gradients. Operations with an explicit
    precision, such as those of verdicts, stay as they are, and so do convolutions. Take gradients
    inside `function`; its result is not differentiated further.

    Args:
      function: takes and returns pytrees of arrays; it may close over tracers.
    """

    @functools.wraps(function)
    def narrowed(*operands: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*operands)
        results = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(operands))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return narrowed


def _is_wide(eqn: JaxprEqn) -> bool:
    precision = eqn.params.get("precision")
    default = precision is None or precision == (lax.Precision.DEFAULT, lax.Precision.DEFAULT)
    avals: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    types = {aval.dtype for aval in avals}
    return default and types == {jnp.dtype(jnp.float32)}


def _narrow(eqn: JaxprEqn, x: Array, y: Array) -> Array:
    settings = eqn.params | {"preferred_element_type": jnp.float32}
    return dot_general_p.bind(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), **settings)


def _inside(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr):
        return _rewritten(value.jaxpr, value.consts)
    if isinstance(value, Jaxpr):
        return _rewritten(value, ()).jaxpr
    return tuple(map(_inside, value)) if isinstance(value, tuple) else value


def _rewritten(jaxpr: Any, consts: Any) -> Any:
    inner = functools.partial(_evaluate, jaxpr, consts)
    return jax.make_jaxpr(inner)(*(v.aval for v in jaxpr.invars))


def _changes(eqn: JaxprEqn) -> bool:
    """Return whether an operation, or a program in it, is one that `_is_wide` describes."""
    if eqn.primitive is dot_general_p:
        return _is_wide(eqn)
    return any(_changes(inner) for p in _programs(eqn.params.values()) for inner in p.eqns)


def _programs(values: Any) -> list[Any]:
    programs = []
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            programs.append(getattr(value, "jaxpr", value))
        elif isinstance(value, tuple):
            programs += _programs(value)
    return programs


def _evaluate(jaxpr: Any, consts: Any, *operands: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        arguments = map(read, eqn.invars)
        with eqn.ctx.manager:
            if eqn.primitive is dot_general_p and _is_wide(eqn):
                results = [_narrow(eqn, *arguments)]
            else:
                results = _bound(eqn, arguments)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bound(eqn: JaxprEqn, arguments: Any) -> list[Any]:
    params = eqn.params
    if _changes(eqn):
        params = {name: _inside(value) for name, value in params.items()}
    parameters = eqn.primitive.get_bind_params(params)
    results = eqn.primitive.bind(*arguments, **parameters)
    return results if eqn.primitive.multiple_results else [results]
