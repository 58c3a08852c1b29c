"""The devices' half of the engine: slots, each holding one image's job, and the steps in all.

The host's half is `schedule` (which slot does which job); `engine` joins both.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxrobust import attacks
from jaxrobust.attacks.geometry import malt
from jaxrobust.attacks.geometry.balls import where
from jaxrobust.attacks.machine import MachineStep, advance
from jaxrobust.attacks.registry import Setting
from jaxrobust.runtime import rooms
from jaxrobust.runtime.devices import cpus
from jaxrobust.types import VERDICT_PRECISION, Array

T = TypeVar("T")
_SHARED, _SPLIT = PartitionSpec(), PartitionSpec("slots")
# Rewrite programs to be fast on CPU; `jaxrobust-attacks` compiles them as they are.
_REWRITING = rooms.optional("jaxrobust.models.kernels.cpu.rewriting")
_NARROWING = rooms.optional("jaxrobust.models.kernels.cpu.narrowing")


class Build(NamedTuple):
    """The settings that an attack's programs depend on, besides the shapes of their arguments."""

    setting: Setting
    operand: str  # the network's second argument: "", "keys" or "ids"
    tally: str  # a row of `attacks.TALLIES`, or ""
    platform: str


class Slots(NamedTuple):
    """The state on the devices; the first axis of every array is the slot."""

    state: Any  # of the machines
    labels: Array  # i32[S]
    keys: Array  # u32[S, 2], of the jobs; for a task u32[S, 1], ids of the images
    live: Array  # bool[S], still undecided
    fooled: Array  # bool[S]
    adversarial: Array  # f[S,H,W,C], the point that fooled the network
    steps: Array  # i32[S], taken in this job
    first: Array  # i32[S], the first step whose point may fool the network
    flat: Array  # bool[S], the gradient at the start was zero everywhere
    # For a randomized network judged by more than one draw, else None:
    strongest: Any = None  # f[S,H,W,C], the point most misclassified by the draws of a step
    excess: Any = None  # f[S], `Tally.excess` of that point; below 0: there is no such point


def begin(
    setting: Setting,
    epsilon: Array,
    root: Array,
    number: Array,
    rows: Any,
    *,
    operand: str = "",
    tally: str = "",
) -> Slots:
    """Begin jobs in all slots; an image's key does not depend on its slot."""

    def key(*numbers: Array) -> Array:
        words = [n.astype(jnp.uint32) for n in numbers]
        return functools.reduce(jax.random.fold_in, words, _wrap(root))

    keys = jax.vmap(key, (0, None, 0, 0))(rows.ids, number, rows.targets, rows.restarts)
    row = attacks.MACHINES[setting.machine]
    init = functools.partial(
        row.make(setting, epsilon).init, rows.images, rows.labels, keys=keys, targets=rows.targets
    )
    first, *others = row.starts[: setting.restarts]  # one per restart
    state = init(start=first)
    for later, start in enumerate(others, 1):
        state = _where(rows.restarts >= later, init(start=start), state)
    return Slots(
        state=state,
        labels=rows.labels,
        keys=rows.ids[:, None] if operand == "ids" else jax.random.key_data(keys),
        live=jnp.ones_like(rows.fresh),
        fooled=jnp.zeros_like(rows.fresh),
        adversarial=rows.images,
        steps=jnp.zeros_like(rows.labels),
        first=rows.first,
        flat=jnp.zeros_like(rows.fresh),
        strongest=rows.images if tally else None,
        excess=jnp.full(rows.labels.shape, -1, jnp.float32) if tally else None,
    )


def _seeker(
    operand: str, platform: str, logits_fn: Any, search_fn: Any, points: Array, keys: Array
) -> tuple[Callable[[], Any], Callable[..., Array]]:
    """Split the guiding network into the part that depends only on its weights, and the rest."""
    # On CPU all calls share the former instead of recomputing it.
    network = _network(search_fn or logits_fn, operand, platform, tiled=True)
    if platform == "cpu" and _REWRITING:
        split: tuple[Callable[[], Any], Callable[..., Array]]
        split = _REWRITING.before_a_loop(network, points, keys)
        return split
    return list, lambda prepared, *operands: network(*operands)


def _advance(
    build: Build,
    logits_fn: Any,
    search_fn: Any,
    epsilon: Array,
    slots: Slots,
    limit: Array,
    floor: Array,
    prepared: Any,
) -> tuple[Slots, Array]:
    """Take steps in all slots until `limit`, or until at most `floor` of them are live."""
    setting, operand, tally, platform = build
    machine = attacks.MACHINES[setting.machine].make(setting, epsilon)
    decider = _network(logits_fn, operand, platform, VERDICT_PRECISION)
    _, prepared_call = _seeker(
        operand, platform, logits_fn, search_fn, slots.adversarial, slots.keys
    )
    seeker = functools.partial(prepared_call, prepared)
    narrow = platform == "cpu" and _narrows()

    def step(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        count, slots = carry
        fold = functools.partial(_fold, slots.keys, slots.steps)
        keys: Callable[[Any], Array] = (lambda _: slots.keys) if operand == "ids" else fold

        def wrong(outputs: Array) -> Array:
            logits = _logits(outputs, operand)
            other = jnp.argmax(logits, axis=1).astype(slots.labels.dtype) != slots.labels
            return other | ~jnp.all(jnp.isfinite(logits), axis=1)  # no answer counts as wrong

        of = (lambda logits: attacks.TALLIES[tally].of(logits, slots.labels)) if tally else None

        def told(state: Any) -> MachineStep:
            with jax.named_scope("attack"):
                asks = lambda points, draw: seeker(points, keys(draw))  # noqa: E731
                return advance(machine, asks, state, draws=setting.eot, tally=of)

        done = (_NARROWING.narrow_products(told) if narrow else told)(slots.state)
        hit = slots.live & wrong(done.outputs) & (slots.steps >= slots.first)
        if machine.counts is not None:
            hit &= machine.counts(done.queried)
        if search_fn is not None:
            sure = lambda: wrong(decider(done.points, keys(0)))  # noqa: E731
            hit &= lax.cond(jnp.any(hit), sure, lambda: hit)
        first, flat = slots.steps == 0, slots.flat
        if done.gradient is not None:
            is_zero = jnp.all(done.gradient.reshape(done.gradient.shape[0], -1) == 0, axis=1)
            flat = jnp.where(first, is_zero, flat)
        # One wrong draw does not end the job of a randomized network: as in the reference, the run
        # continues to the end, and its latest wrong point is tried once more.
        over = machine.finished(done.state) | (False if operand == "keys" else hit)
        strongest, excess = None, None
        if tally:  # the point with the most wrong draws in a step; on ties the latest
            votes = attacks.TALLIES[tally].excess(done.votes / setting.eot, slots.labels)
            better = slots.live & (votes >= jnp.maximum(slots.excess, 0))
            strongest = where(better, done.points, slots.strongest)
            excess = jnp.where(better, votes, slots.excess)
        return count + 1, slots._replace(
            state=done.state,
            live=slots.live & ~over,
            fooled=slots.fooled | hit,
            adversarial=where(hit, done.points, slots.adversarial),
            steps=slots.steps + slots.live.astype(jnp.int32),
            flat=flat,
            strongest=strongest,
            excess=excess,
        )

    def goes_on(carry: tuple[Array, Slots]) -> Array:
        count, slots = carry
        return (count < limit) & (jnp.sum(slots.live, dtype=jnp.int32) > floor[0])

    count, slots = lax.while_loop(goes_on, step, (jnp.zeros_like(floor[0]), slots))
    return slots, count[None]


def _narrows() -> bool:
    """Tell whether a search on this CPU multiplies in bfloat16."""
    return _NARROWING is not None and cpus.kind().narrow


def narrower_products(platform: str) -> str | None:
    """Return the type of a search's matmuls on `platform`; None: float32, as for verdicts."""
    if jax.config.values["jax_default_matmul_precision"] not in (None, "default"):
        return None
    if platform == "cpu":
        return "bfloat16" if _narrows() else None
    return {"tpu": "bfloat16", "gpu": "TF32"}.get(platform)


def _network(
    logits_fn: Any,
    operand: str,
    platform: str,
    precision: str | None = None,
    *,
    tiled: bool = False,
) -> Callable[[Array, Array], Array]:
    """Wrap `logits_fn` as a function of points and `keys`, in float32, fast in loops on CPU."""
    # `precision` is the matmul precision, by default the caller's; it is read while tracing.

    def call(points: Array, keys: Array) -> Array:
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            if operand == "ids":
                outputs = logits_fn(points, keys[:, 0])
            else:
                outputs = logits_fn(points, _wrap(keys)) if operand else logits_fn(points)
        values: Array = outputs.astype(jnp.float32)
        return values

    if platform != "cpu" or not _REWRITING:
        return call
    tiles = _REWRITING.winograd.convolve if tiled else None
    fast: Callable[[Array, Array], Array] = _REWRITING.fast_formulas(call, tiles=tiles)
    return fast


def _fold(keys: Array, steps: Array, draw: Any) -> Array:
    def one(key: Array, step: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, step), draw)

    return jax.random.key_data(jax.vmap(one)(_wrap(keys), steps))


def _wrap(keys: Any) -> Array:
    wrapped: Array = jax.random.wrap_key_data(keys, impl="threefry2x32")
    return wrapped


def _logits(outputs: Array, operand: str) -> Array:
    """Turn a task's [stands, loss] into logits of two classes; leave other logits unchanged."""
    return outputs.at[:, 1].set(0) if operand == "ids" else outputs


def _where(mask: Any, yes: T, no: T) -> T:
    chosen: T = jax.tree.map(functools.partial(where, mask), yes, no)
    return chosen


def programs(
    mesh: Mesh, setting: Setting, operand: str, tally: str
) -> tuple[Callable[..., Slots], Callable[..., Any]]:
    """Make an attack's two programs on all devices of a mesh: begin jobs, and take steps."""
    advance = functools.partial(_advance, Build(setting, operand, tally, _platform(mesh)))
    specs = (_SHARED, _SHARED, _SHARED, _SPLIT, _SHARED, _SPLIT, _SHARED)
    return _refill_program(mesh, setting, operand, tally), _spread(mesh, advance, specs)


def prepare_program(mesh: Mesh, operand: str) -> Callable[..., list[Array]]:
    """Make the program that computes the last argument of `_advance`."""
    specs = (_SHARED, _SHARED, _SPLIT, _SPLIT)

    def prepare(*operands: Any) -> Any:
        return _seeker(operand, _platform(mesh), *operands)[0]()

    return jax.jit(_mapped(mesh, prepare, specs, _SHARED))


@functools.lru_cache(maxsize=64)
def _refill_program(mesh: Mesh, setting: Setting, operand: str, tally: str) -> Callable[..., Slots]:
    def refill(epsilon: Array, root: Array, number: Array, slots: Slots, rows: Any) -> Slots:
        slots = slots._replace(live=slots.live & rows.keep)
        new = begin(setting, epsilon, root, number, rows, operand=operand, tally=tally)
        return _where(rows.fresh, new, slots)

    return _spread(mesh, refill, (_SHARED, _SHARED, _SHARED, _SPLIT, _SPLIT))


def _mapped(mesh: Mesh, function: Callable[..., Any], specs: Any, out: Any = _SPLIT) -> Any:
    """Let every device run its own loop on its own slots: nothing inside is a collective."""
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def _spread(mesh: Mesh, function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
    spread = _mapped(mesh, function, specs)
    return jax.jit(spread, donate_argnums=3, compiler_options=cpus.search_options(_platform(mesh)))


def forward_program(mesh: Mesh, operand: str) -> Callable[..., Array]:
    """Make the forward pass that decides: (network, root, draw, images, ids) -> logits."""

    def run(logits_fn: Any, root: Array, draw: Array, images: Array, ids: Array) -> Array:
        def key(number: Array) -> Array:
            return jax.random.fold_in(jax.random.fold_in(_wrap(root), number), draw)

        keys = ids[:, None] if operand == "ids" else jax.random.key_data(jax.vmap(key)(ids))
        network = _network(logits_fn, operand, _platform(mesh), VERDICT_PRECISION)
        with jax.named_scope("verdict"):
            return _logits(network(images, keys), operand)

    specs = (_SHARED, _SHARED, _SHARED, _SPLIT, _SPLIT)
    return jax.jit(_mapped(mesh, run, specs))


def nearness_program(mesh: Mesh, norm: str) -> Callable[..., Array]:
    """Make the program of `malt.first_order_distances`: (network, images, labels, targets)."""

    def run(logits_fn: Any, images: Array, labels: Array, targets: Array) -> Array:
        keys = jnp.zeros((len(labels), 2), jnp.uint32)  # unused
        network = _network(logits_fn, "", _platform(mesh))
        asks = lambda points: network(points, keys)  # noqa: E731
        with jax.named_scope("attack"):
            return malt.first_order_distances(asks, images, labels, targets, norm=norm)

    return jax.jit(_mapped(mesh, run, (_SHARED, _SPLIT, _SPLIT, _SPLIT)))


def _platform(mesh: Mesh) -> str:
    return str(mesh.devices.flat[0].platform)


def program_of(setting: Setting) -> Setting:
    """Normalize the parts of a setting that its program does not depend on."""
    row = attacks.MACHINES[setting.machine]
    return setting._replace(
        name="",
        targets=min(setting.targets, 1) if row.aims else 0,
        restarts=min(setting.restarts, len(row.starts)),
    )


@functools.lru_cache
def settle_program(norm: str) -> Callable[..., Array]:
    """Make the program of a norm's `Geometry.settle`."""
    ball = attacks.GEOMETRIES.get(norm)
    return jax.jit(ball.settle if ball else lambda points, images: points)
