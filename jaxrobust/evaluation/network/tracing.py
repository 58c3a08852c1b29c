"""A user's network as an argument of programs: arrays are arguments, all else is closed over.

JAX keeps compiled programs, and everything they refer to, as long as the compiled function lives.
So programs hold a network's function weakly, are dropped together with it, and are recompiled if
it closes over something different.
"""

import contextlib
import functools
import hashlib
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrobust.attacks.refused_network import TRAINING, of_one_image, remedy
from jaxrobust.types import LogitsFn

T = TypeVar("T")

_FEW = 8  # batch of the trace that is searched for constants
_SCALARS = (bool, int, float, complex, str, bytes, np.generic)
_ARRAY = object()  # placeholder for an array among the leaves
# Parts of a program that compute nothing: names of jitted functions, placement, addresses.
_SILENT_KEYS = re.compile(r"^name$|^ctx_mesh$|sharding")
_ADDRESSES = re.compile(r"\b0x[0-9a-f]+")
_kept: dict[Any, tuple[str, Any]] = {}  # networks and use -> (hash of the programs, the programs)


class TracedNetwork(NamedTuple):
    """The results of tracing a network."""

    classes: int
    program: str  # hash of the computation with its constants, whatever the arrays contain
    constants: tuple[str, ...]  # hashes of the arrays that it closes over, sorted


class _Rest:
    """A network without its arrays: its function and the other leaves of its arguments."""

    def __init__(self, function: Callable[..., Any], tree: Any, leaves: tuple[Any, ...]):
        self.function: Callable[[], Any] = lambda: function
        kind: Any = weakref.WeakMethod if inspect.ismethod(function) else weakref.ref
        with contextlib.suppress(TypeError):
            self.function = kind(function, _forget)
        self.tree, self.leaves = tree, leaves
        self.key: Any = (self.function, tree, tuple((type(leaf), leaf) for leaf in leaves))
        try:
            hash(self.key)
            self.lasts = isinstance(self.function, weakref.ref)
        except TypeError:
            self.key, self.lasts = object(), False

    def __call__(self, arrays: list[Any], *operands: Any) -> Any:
        function = self.function()
        assert function is not None, "the network is no longer held"
        arguments, keywords = self.arguments(arrays)
        return function(*arguments, *operands, **keywords)

    def arguments(self, arrays: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rebuild the arguments and keywords of a `Partial`."""
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in self.leaves]
        positional, keywords = jax.tree.unflatten(self.tree, leaves)
        return positional, keywords

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _forget(function: Any) -> None:
    for key in list(_kept or ()):  # None while Python exits
        if any(network.function is function for network in key[0]):
            del _kept[key]


def keep(networks: Sequence[Any], use: Any, programs: str, make: Callable[[], T]) -> T:
    """Cache the result of `make` for a use of the same networks with the same `programs`."""
    rests = tuple(network.func for network in networks)
    if not all(network.func.lasts for network in networks):
        return make()
    shapes = tuple((a.shape, a.dtype) for network in networks for a in network.args[0])
    old_programs, old = _kept.get((rests, shapes, use), ("", None))
    if old_programs != programs:
        old = make()
        _kept[rests, shapes, use] = programs, old
    value: T = old
    return value


def argument(name: str, function: LogitsFn, mesh: Mesh) -> jax.tree_util.Partial:
    """Wrap a function for `jit`: arrays in a `Partial` become arguments of the program.

    The caller must hold `function`. If an array is replicated over processes, this process's copy
    is used.
    """
    called: Any = function
    arguments: Any = ((), {})
    if isinstance(function, jax.tree_util.Partial):
        called, arguments = function.func, (function.args, function.keywords)
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [_local(name, leaf, mesh) for leaf in leaves if _is_array(leaf)]
    others = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
    return jax.tree_util.Partial(_Rest(called, tree, others), arrays)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _local(name: str, array: Any, mesh: Mesh) -> Any:
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    if not array.is_fully_replicated:
        raise ValueError(
            f"an array {array.shape} of {name} is spread over several processes; put a copy "
            "on every device with jax.device_put(array, NamedSharding(mesh, PartitionSpec()))"
        )
    return jax.device_put(array.addressable_data(0), NamedSharding(mesh, PartitionSpec()))


# --- Traces of networks ---


def trace(
    name: str, function: LogitsFn, network: Any, image: tuple[int, ...], batch: int, operand: str
) -> TracedNetwork:
    """Trace a network before computing anything; raise `ValueError` if it is not a network."""
    operands = _operands((batch,), image, operand)
    if not callable(function):
        raise ValueError(
            f"{name} is a {type(function).__name__}, not a function; pass a function of images, "
            "such as jax.tree_util.Partial(net.apply, variables, train=False)"
        )
    single = functools.partial(of_one_image, network, *_operands((), image, operand))
    try:
        inspect.signature(function).bind(*operands)
    except TypeError as error:
        takes = "images and keys [B]" if operand else "images only (keys are for version rand)"
        raise ValueError(f"{name} must accept {takes} for this version: {error}") from error
    except ValueError:  # it has no signature to read
        pass
    try:
        closed, logits = _traced(network, operands)
    except Exception as error:
        if words := remedy(error, function) or single():
            raise ValueError(f"{name} {words}") from error
        error.add_note(f"{name} was called with {', '.join(map(str, operands))}")
        raise
    shape: Sequence[int] = getattr(logits, "shape", ())
    if len(shape) != 2 or shape[0] != batch or shape[1] < 2:
        wrong = (
            f"returns {shape or type(logits).__name__} for {batch} images; return logits f[B, K] "
            "with K >= 2, and nothing else"
        )
        raise ValueError(f"{name} {single() or wrong}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name} returns {logits.dtype}; return floating-point logits")
    leak = f"{name} {TRAINING.format('a traced value outlived its trace')}"
    try:
        closed, _ = _traced(network, _operands((_FEW,), image, operand))
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(leak) from error
    except Exception:  # the network takes only batches of `batch` images
        pass
    if any(isinstance(constant, jax.core.Tracer) for constant in constants(closed)):
        raise ValueError(leak)
    programs = Programs()
    return TracedNetwork(int(shape[1]), programs.hashed(closed), programs.constants(closed))


def takes(network: Any, image: tuple[int, ...], batch: int, operand: str) -> bool:
    """Tell whether a network takes this batch size; for the arguments see `trace`."""
    try:
        return bool(_traced(network, _operands((batch,), image, operand))[1].shape[0] == batch)
    except Exception:  # the network takes only another batch size
        return False


def _operands(batch: tuple[int, ...], image: tuple[int, ...], operand: str) -> tuple[Any, ...]:
    """Describe a network's inputs: points and, for each, the key or id that `operand` names."""
    points = jax.ShapeDtypeStruct((*batch, *image), jnp.float32)
    keys = jax.eval_shape(lambda: jnp.broadcast_to(jax.random.key(0), batch))
    ids = jax.ShapeDtypeStruct(batch, jnp.uint32)
    return (points, *{"": (), "keys": (keys,), "ids": (ids,)}[operand])


def _traced(network: Any, operands: tuple[Any, ...]) -> Any:
    # A lambda, because a second trace of the same function would come from a cache.
    call = lambda network, *operands: network(*operands)  # noqa: E731
    return jax.make_jaxpr(call, return_shape=True)(network, *operands)


def weights(network: Any, constants: Sequence[str]) -> str:
    """Hash all arrays of a network; `constants` are hashes of the arrays it closes over."""
    digest = hashlib.sha256()
    arguments = network.func.arguments(network.args[0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        text = hashed(leaf) if _is_array(leaf) else type(leaf).__qualname__
        text += repr(leaf) if isinstance(leaf, _SCALARS) else ""
        digest.update(f"{jax.tree_util.keystr(path)} {text}\n".encode())
    digest.update(" ".join(constants).encode())
    return digest.hexdigest()


def constants(jaxpr: Any) -> Iterator[Any]:
    """Yield the constants of a jaxpr and its inner jaxprs in order, including scalars."""
    yield from getattr(jaxpr, "consts", ())  # only a closed jaxpr has them
    for equation in jaxpr.eqns:
        yield from (operand.val for operand in equation.invars if hasattr(operand, "val"))
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from constants(inner)


class Programs:
    """Hashes of traced programs; shared parts are hashed once.

    Two programs have the same hash if they run the same operations on the same constants in the
    same order, whatever the names of jitted functions and the placement of arrays.
    """

    def __init__(self) -> None:
        self._hashes: dict[int, tuple[Any, str]] = {}  # by address; holds the object alive

    def hashed(self, jaxpr: Any) -> str:
        """Hash a jaxpr and its inner jaxprs, with all constants."""
        return self._once(jaxpr, self._hashed)

    def constants(self, jaxpr: Any) -> tuple[str, ...]:
        """Return the sorted hashes of the arrays in a jaxpr, without single numbers."""
        arrays = [constant for constant in constants(jaxpr) if np.size(constant) > 1]
        return tuple(sorted(self._once(array, hashed) for array in arrays))

    def _once(self, value: Any, hash_of: Callable[[Any], str]) -> str:
        if id(value) not in self._hashes:
            self._hashes[id(value)] = value, hash_of(value)
        return self._hashes[id(value)][1]

    def _hashed(self, jaxpr: Any) -> str:
        numbers: dict[Any, int] = {}  # variables are numbered in order of first occurrence
        lines = [" ".join(self._once(array, hashed) for array in getattr(jaxpr, "consts", ()))]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # an open jaxpr has no constants

        def operand(v: Any) -> Any:
            if hasattr(v, "val"):
                return self._value(v.val), _type(v.aval)
            return numbers.setdefault(v, len(numbers))

        def result(v: Any) -> str:
            return f"{operand(v)}:{_type(v.aval)}"

        lines += map(result, (*jaxpr.constvars, *jaxpr.invars))
        for equation in jaxpr.eqns:
            settings = [
                f"{key}={self._value(value)}"
                for key, value in sorted(equation.params.items())
                if not _SILENT_KEYS.search(key)
            ]
            inputs, outputs = map(operand, equation.invars), map(result, equation.outvars)
            lines.append(f"{equation.primitive.name} {settings} {[*inputs]} {[*outputs]}")
        lines.append(str([operand(v) for v in jaxpr.outvars]))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _value(self, value: Any) -> str:
        if isinstance(value, _SCALARS) or value is None:
            return repr(value)
        if hasattr(value, "eqns"):
            return self.hashed(value)
        if isinstance(value, tuple | list):
            return f"({','.join(map(self._value, value))})"
        if isinstance(value, set | frozenset):  # their order differs between processes
            return f"({','.join(sorted(map(self._value, value)))})"
        if _is_array(value):
            return self._once(value, hashed)
        return _ADDRESSES.sub("", repr(value))


@functools.lru_cache(4096)
def _type(aval: Any) -> str:
    return str(aval)


def hashed(array: Any) -> str:
    """Hash the type, shape and bytes of an array."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
