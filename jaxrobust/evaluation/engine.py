"""The evaluator's engine: a fixed number of slots, each of which takes one image through a job.

A job is one run of an attack on one image: one target, one restart. The engine alone calls the
network: it asks the machines of all slots for their points, runs one forward pass (and one
backward pass) over them, and tells them. A slot is free as soon as its image is fooled or its
machine has finished, and the host gives it the next job. Shapes never change, so that a program
serves any number of images, any radius, seed, target and restart.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, local_devices
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrobust import attacks
from jaxrobust.attacks.balls import where
from jaxrobust.attacks.machine import Row, Setting, advance
from jaxrobust.evaluation import networks, plan
from jaxrobust.evaluation.convolutions import canonical_convolutions
from jaxrobust.evaluation.schedule import Jobs, Rows, Verdict
from jaxrobust.types import VERDICT_PRECISION, Array, LogitsFn

_DRAWS = 1000  # numbers from here on are draws of forward passes outside the attacks
CALL_SECONDS = 0.5  # between two looks of the host at its slots


class Engine(NamedTuple):
    """A network on slots: `logits_fn` decides, `search_fn` (None: the same) guides the search.

    If `keyed`, both take the images and one key for each of them.
    """

    mesh: Mesh
    slots: int
    logits_fn: LogitsFn
    search_fn: LogitsFn | None
    keyed: bool
    given: dict[str, LogitsFn]  # as the user did: programs hold them weakly
    compiled: "Compiled"
    traces: tuple[networks.Trace, ...] = ()  # of one or both, after `trace`


class Slots(NamedTuple):
    """What the devices hold; the first axis of every array is the slot."""

    state: Any  # of the machines
    labels: Array  # i32[S]
    keys: Array  # u32[S, 2], of the jobs
    live: Array  # bool[S], still undecided
    fooled: Array  # bool[S]
    adversarial: Array  # f[S,H,W,C], the point that fooled the network
    steps: Array  # i32[S], made in this job
    first: Array  # i32[S], the first of them whose point may fool the network
    flat: Array  # bool[S], the gradient at the start was zero everywhere


class Call(NamedTuple):
    """What one call of a program did."""

    slot_steps: int  # idle slots included
    useful_steps: int
    seconds: float
    compiles: bool  # the first call: it makes no step


def make(
    logits_fn: LogitsFn,
    *,
    search_fn: LogitsFn | None = None,
    slots: int | None = None,
    image_size: int = 32,
    keyed: bool = False,
) -> Engine:
    """Return an engine on all devices of this process.

    `slots` is rounded up to what the devices divide. By default there are 8 on a CPU device (more
    do not make a pass cheaper there), else 512 for small images and 64 for large ones.

    Raises:
      ValueError: `slots` is not an int >= 1.
    """
    if slots is not None and not (isinstance(slots, int | np.integer) and slots >= 1):
        raise ValueError(
            f"batch_size={slots!r} is not a number of images; pass an int >= 1, or None"
        )
    devices = local_devices()
    if slots is None:
        each = 8 if devices[0].platform == "cpu" else 512 if image_size <= 64 else 64
        slots = each * len(devices)
    slots += -slots % len(devices)
    mesh = Mesh(np.array(devices), ("slots",), axis_types=(AxisType.Auto,))
    given = {"logits_fn": logits_fn} | ({"search_fn": search_fn} if search_fn is not None else {})
    taken = {name: networks.argument(name, given[name], mesh) for name in given}
    decides, guides = taken["logits_fn"], taken.get("search_fn")
    return Engine(mesh, slots, decides, guides, keyed, given, _compiled())


def trace(engine: Engine, image: tuple[int, ...]) -> Engine:
    """Return the engine with `traces`, and with what was compiled before for these networks.

    Args:
      engine: as made.
      image: H, W, C.
    Raises:
      ValueError: one of them is no such network, or they have different numbers of classes.
    """
    each, both = engine.slots // engine.mesh.size, [engine.logits_fn, engine.search_fn]
    both = both[: len(engine.given)]
    traces = [
        networks.trace(name, function, network, image, each, engine.keyed)
        for (name, function), network in zip(engine.given.items(), both, strict=True)
    ]
    if len({trace.classes for trace in traces}) > 1:
        raise ValueError(
            f"search_fn gives {traces[1].classes} logits, logits_fn {traces[0].classes}; pass the "
            "same network in lower precision"
        )
    use, programs = (image, engine.keyed), " ".join(trace.program for trace in traces)
    compiled = networks.keep(both, use, programs, _compiled)
    return engine._replace(compiled=compiled, traces=tuple(traces))


# --- On the devices ---


def _initial(row: Row, setting: Setting, epsilon: Array, rows: Rows, keys: Array) -> Any:
    """Return the machines' states at the start, which is that of the row for this restart."""
    init = functools.partial(
        row.make(setting, epsilon).init, rows.images, rows.labels, keys=keys, targets=rows.targets
    )
    first, *others = row.starts[: setting.restarts]
    state = init(start=first)
    for number, start in enumerate(others, 1):
        state = _where(rows.restarts >= number, init(start=start), state)
    return state


def _begin(setting: Setting, epsilon: Array, root: Array, number: Array, rows: Any) -> Slots:
    """Slots at the beginning of their jobs; an image's key does not depend on its slot."""

    def key(*numbers):
        key = _wrap(root)
        for n in numbers:
            key = jax.random.fold_in(key, n.astype(jnp.uint32))
        return key

    keys = jax.vmap(key, (0, None, 0, 0))(rows.ids, number, rows.targets, rows.restarts)
    return Slots(
        state=_initial(attacks.ROWS[setting.machine], setting, epsilon, rows, keys),
        labels=rows.labels,
        keys=jax.random.key_data(keys),
        live=jnp.ones_like(rows.fresh),
        fooled=jnp.zeros_like(rows.fresh),
        adversarial=rows.images,
        steps=jnp.zeros_like(rows.labels),
        first=rows.first,
        flat=jnp.zeros_like(rows.fresh),
    )


def _refill(setting, epsilon, root, number, slots, rows):
    """Begins jobs in fresh slots, and ends those that are not kept."""
    slots = slots._replace(live=slots.live & rows.keep)
    return _where(rows.fresh, _begin(setting, epsilon, root, number, rows), slots)


def _advance(setting, keyed, platform, logits_fn, search_fn, epsilon, slots, limit, floor):
    """Make steps in all slots until `limit`, or until no more than `floor` of them are live.

    Returns the slots and i32[1], the number of steps.
    """
    machine = attacks.ROWS[setting.machine].make(setting, epsilon)
    decider = _network(logits_fn, keyed, platform, VERDICT_PRECISION)
    seeker = _network(search_fn or logits_fn, keyed, platform)

    def step(carry):
        count, slots = carry
        keys = functools.partial(_fold, slots.keys, slots.steps)
        asks = lambda points, draw: seeker(points, keys(draw))  # noqa: E731
        made = advance(machine, asks, slots.state, draws=setting.eot)
        hit = slots.live & _wrong(made.logits, slots.labels) & (slots.steps >= slots.first)
        if machine.counts is not None:
            hit &= machine.counts(made.asked)
        if search_fn is not None:
            sure = lambda: _wrong(decider(made.points, keys(0)), slots.labels)  # noqa: E731
            hit &= lax.cond(jnp.any(hit), sure, lambda: hit)
        first, flat = slots.steps == 0, slots.flat
        if made.gradient is not None:
            flat = jnp.where(first, _zero(made.gradient), flat)
        # One wrong draw of a randomised network ends nothing: as in the reference, its run goes on
        # to the end, and its latest wrong point is tried once more.
        over = machine.finished(made.state) | (False if keyed else hit)
        return count + 1, Slots(
            state=made.state,
            labels=slots.labels,
            keys=slots.keys,
            live=slots.live & ~over,
            fooled=slots.fooled | hit,
            adversarial=where(hit, made.points, slots.adversarial),
            steps=slots.steps + slots.live.astype(jnp.int32),
            first=slots.first,
            flat=flat,
        )

    def goes_on(carry):
        count, slots = carry
        return (count < limit) & (jnp.sum(slots.live, dtype=jnp.int32) > floor[0])

    count, slots = lax.while_loop(goes_on, step, (jnp.zeros_like(floor[0]), slots))
    return slots, count[None]


def _network(logits_fn, keyed, platform, precision=None):
    """`logits_fn` of points and u32[B, 2], in float32, and fast inside loops on CPU.

    `precision` is that of products, by default the caller's; it is read while they are traced.
    """

    def call(points, keys):
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            logits = logits_fn(points, _wrap(keys)) if keyed else logits_fn(points)
        return logits.astype(jnp.float32)

    return canonical_convolutions(call) if platform == "cpu" else call


def _fold(keys, steps, draw):
    """u32[B, 2] for one draw of a network's own randomness in one step."""

    def one(key, step):
        return jax.random.fold_in(jax.random.fold_in(key, step), draw)

    return jax.random.key_data(jax.vmap(one)(_wrap(keys), steps))


def _wrap(keys):
    return jax.random.wrap_key_data(keys, impl="threefry2x32")


def _wrong(logits, labels):
    other = jnp.argmax(logits, axis=1).astype(labels.dtype) != labels
    return other | jnp.any(jnp.isnan(logits), axis=1)  # no answer is no right one


def _zero(gradient):
    gradient = gradient[0] if isinstance(gradient, tuple) else gradient
    return jnp.all(gradient.reshape(gradient.shape[0], -1) == 0, axis=1)


def _where(mask, yes, no):
    return jax.tree.map(functools.partial(where, mask), yes, no)


class _Programs(NamedTuple):
    refill: Callable[..., Any]
    advance: Callable[..., Any]


class Compiled(NamedTuple):
    """The programs of one network, by what else they depend on."""

    programs: Callable[[Mesh, Setting, bool], _Programs]
    forward: Callable[[Mesh, bool], Callable[..., Array]]


def _compiled() -> Compiled:
    return Compiled(functools.cache(_programs), functools.cache(_forward_program))


def _programs(mesh: Mesh, setting: Setting, keyed: bool) -> _Programs:
    shared, split = PartitionSpec(), PartitionSpec("slots")
    advance = functools.partial(_advance, setting, keyed, _platform(mesh))
    specs = (shared, shared, shared, split, shared, split)
    return _Programs(_refill_program(mesh, setting), _spread(mesh, advance, specs))


@functools.lru_cache(maxsize=64)
def _refill_program(mesh: Mesh, setting: Setting) -> Callable[..., Slots]:
    shared, split = PartitionSpec(), PartitionSpec("slots")
    specs = (shared, shared, shared, split, split)
    return _spread(mesh, functools.partial(_refill, setting), specs)


def _spread(mesh, function, specs):
    """Every device runs its own loop on its own slots: nothing inside is a collective."""
    split = PartitionSpec("slots")
    spread = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return jax.jit(spread, donate_argnums=3)


def _forward_program(mesh: Mesh, keyed: bool) -> Callable[..., Array]:
    def run(logits_fn, root, draw, images, ids):
        def key(number):
            return jax.random.fold_in(jax.random.fold_in(_wrap(root), number), draw)

        keys = jax.random.key_data(jax.vmap(key)(ids))
        network = _network(logits_fn, keyed, _platform(mesh), VERDICT_PRECISION)
        return network(images, keys)

    shared, split = PartitionSpec(), PartitionSpec("slots")
    specs = (shared, shared, shared, split, split)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))


@functools.lru_cache
def _settle_program(norm: str) -> Callable[..., Array]:
    return jax.jit(attacks.BALLS[norm].settle)


def _platform(mesh):
    return mesh.devices.flat[0].platform


# --- On the host ---


def forward(
    engine: Engine, images: np.ndarray, ids: np.ndarray | None = None, *, seed: int = 0, draw=0
) -> np.ndarray:
    """Logits f32[n, K] of n >= 1 images, by one program for any n.

    A randomised network gets keys made of the seed, the image's id and `draw`.
    """
    program = engine.compiled.forward(engine.mesh, engine.keyed)
    sharding = NamedSharding(engine.mesh, PartitionSpec("slots"))
    ids = np.zeros(len(images), np.uint32) if ids is None else ids
    settings = (_root(seed), np.uint32(_DRAWS + draw))
    logits = []
    for start in range(0, len(images), engine.slots):
        part = slice(start, start + engine.slots)
        padded = (_padded(images[part], engine.slots), _padded(ids[part], engine.slots))
        operands = jax.device_put(padded, sharding)
        logits.append(np.asarray(program(engine.logits_fn, *settings, *operands)))
    return np.concatenate(logits)[: len(images)]


def _root(seed):
    return np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))


def settled(engine: Engine, norm: str, points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Up to `engine.slots` points without the rounding residue of an L1 iterate."""
    program = _settle_program(norm)
    padded = (_padded(points, engine.slots), _padded(images, engine.slots))
    return np.asarray(program(*padded))[: len(points)]


def _padded(array, length):
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def decide(
    engine: Engine,
    setting: Setting,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    which: np.ndarray,
    targets: np.ndarray,
    *,
    epsilon: float,
    seed: int,
    confirm: Callable[[list[Verdict], bool], list[Verdict]],
) -> Iterator[Call]:
    """Run one attack; yield what each call of its program did.

    Args:
      engine: the network and its slots.
      setting: the attack.
      images: f32[N,H,W,C].
      labels: i32[N].
      ids: u32[N], from which all randomness of an image derives.
      which: i[n], the images to attack; all of them are classified correctly.
      targets: i32[n, T], the classes to aim at in turn, or the code of a loss (T = 1).
      epsilon: radius.
      seed: of the evaluation.
      confirm: is told the verdicts as they become known, and whether all are; returns those, of
        them or of earlier ones, that do not hold. Such an image is attacked further.
    """
    programs = engine.compiled.programs(engine.mesh, _program_of(setting), engine.keyed)
    sharding = NamedSharding(engine.mesh, PartitionSpec("slots"))
    settings = (np.float32(epsilon), _root(seed), np.uint32(plan.named(setting.name).number))
    jobs = Jobs(engine.slots, engine.mesh.size, which, targets, setting.restarts)
    width = engine.slots // engine.mesh.size
    slots, limit = None, 0  # the first call compiles and makes no step
    while True:
        if not jobs.assign():
            jobs.refute(confirm([], True))
            if not jobs.assign():
                return
        start = time.perf_counter()
        rows = jobs.rows(images, labels, ids)
        if slots is None:
            slots = jax.device_put(_no_slots(_program_of(setting), settings, rows), sharding)
        if rows is not None:
            slots = programs.refill(*settings, slots, jax.device_put(rows, sharding))
        floor = jax.device_put(jobs.floor(), sharding)
        slots, count = programs.advance(
            engine.logits_fn, engine.search_fn, settings[0], slots, np.int32(limit), floor
        )
        count, live, fooled, steps, flat = (
            np.asarray(a) for a in (count, slots.live, slots.fooled, slots.steps, slots.flat)
        )
        made = jobs.collect(live, fooled, steps, flat, lambda: np.asarray(slots.adversarial))  # noqa: B023
        seconds = time.perf_counter() - start
        yield Call(int(count.sum()) * width, made, seconds, limit == 0)
        jobs.refute(confirm(list(jobs.verdicts()), False))
        fitting = CALL_SECONDS * max(int(count.max()), 1) / seconds
        limit = 8 if limit == 0 else int(min(max(fitting, 4), 4 * limit, 10_000))


def _program_of(setting: Setting) -> Setting:
    """Return the setting without what its program does not depend on."""
    row = attacks.ROWS[setting.machine]
    return setting._replace(
        name="",
        targets=min(setting.targets, 1) if row.aims else 0,
        restarts=min(setting.restarts, len(row.starts)),
    )


def _no_slots(setting, settings, rows):
    """Slots without jobs."""
    shapes = jax.eval_shape(functools.partial(_begin, setting), *settings, rows)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
