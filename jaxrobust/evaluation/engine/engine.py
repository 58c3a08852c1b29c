"""The evaluator's engine: a fixed number of slots, each of which takes one image through a job.

A job is one run of an attack on one image: one target, one restart. The engine alone calls the
network: it asks the machines of all slots for their points, runs one forward pass (and one
backward pass) over them, and tells them. A slot is free as soon as its image is fooled or its
machine has finished, and the host gives it the next job. Shapes do not change, so that a program
serves any number of images, any radius, seed, target and restart; but where slots stand idle
at the end of a long attack, what is left goes on in fewer, by another program.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import local_devices
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrobust.attacks import MACHINES, ensembles
from jaxrobust.attacks.geometry import malt
from jaxrobust.attacks.registry import Setting
from jaxrobust.evaluation.engine import slots as devices
from jaxrobust.evaluation.engine.schedule import Aims, ImageVerdict, Jobs
from jaxrobust.evaluation.engine.slots import Slots, begin
from jaxrobust.evaluation.network import tracing
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.types import Array, LogitsFn

_DRAWS = 1000  # numbers from here on are draws of forward passes outside the attacks
CALL_SECONDS = 0.5  # between two looks of the host at its slots
WORTH = 20.0  # seconds that fewer slots save, for which another program is compiled


class Engine(NamedTuple):
    """A network on slots: `logits_fn` decides, `search_fn` (None: the same) guides the search.

    If `keyed`, both take the images and one key for each of them. `tally` is a row of
    `attacks.TALLIES`, by which points are judged in the search beside one draw; "": by that alone.
    """

    mesh: Mesh
    slots: int
    logits_fn: LogitsFn
    search_fn: LogitsFn | None
    keyed: bool
    given: dict[str, LogitsFn]  # as the user did: programs hold them weakly
    compiled: Callable[..., Any]  # what makes a program, and its arguments -> the program
    traces: tuple[tracing.TracedNetwork, ...] = ()  # of one or both, after `trace`
    tally: str = ""


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
    tally: str = "",
) -> Engine:
    """Make an engine on all devices of this process.

    `slots` is rounded up to what the devices divide. By default there are 8 on a CPU device (more
    do not make a pass cheaper there), else 512 for small images and 64 for large ones.
    """
    if slots is not None and not (isinstance(slots, int | np.integer) and slots >= 1):
        raise ValueError(
            f"batch_size={slots!r} is not a number of images; pass an int >= 1, or None"
        )
    here = local_devices()
    if slots is None:
        each = 8 if here[0].platform == "cpu" else 512 if image_size <= 64 else 64
        slots = each * len(here)
    slots += -slots % len(here)
    mesh = Mesh(np.array(here), ("slots",), axis_types=(AxisType.Auto,))
    given = {"logits_fn": logits_fn} | ({"search_fn": search_fn} if search_fn is not None else {})
    taken = {name: tracing.argument(name, given[name], mesh) for name in given}
    decides, guides = taken["logits_fn"], taken.get("search_fn")
    return Engine(mesh, slots, decides, guides, keyed, given, _compiled(), tally=tally)


def trace(engine: Engine, image: tuple[int, ...]) -> Engine:
    """Add the `traces` of its networks for images H, W, C, and what was compiled before."""
    each, both = engine.slots // engine.mesh.size, [engine.logits_fn, engine.search_fn]
    both = both[: len(engine.given)]
    traces = [
        tracing.trace(name, function, network, image, each, engine.keyed)
        for (name, function), network in zip(engine.given.items(), both, strict=True)
    ]
    if len({trace.classes for trace in traces}) > 1:
        raise ValueError(
            f"search_fn gives {traces[1].classes} logits, logits_fn {traces[0].classes}; pass the "
            "same network in lower precision"
        )
    use, programs = (image, engine.keyed), " ".join(trace.program for trace in traces)
    compiled = tracing.keep(both, use, programs, _compiled)
    return engine._replace(compiled=compiled, traces=tuple(traces))


def _compiled() -> Callable[..., Any]:
    """Make a memory of the programs of one network, by what makes them and of what."""
    return functools.cache(lambda make, mesh, *how: make(mesh, *how))


# --- On the host ---


def forward(
    engine: Engine,
    images: np.ndarray,
    ids: np.ndarray | None = None,
    *,
    seed: int = 0,
    draw: int = 0,
) -> np.ndarray:
    """Compute logits f32[n, K] of n >= 1 images, by one program for any n.

    A randomised network gets keys made of the seed, the image's id and `draw`.
    """
    program = engine.compiled(devices.forward_program, engine.mesh, engine.keyed)
    sharding = NamedSharding(engine.mesh, PartitionSpec("slots"))
    ids = np.zeros(len(images), np.uint32) if ids is None else ids
    settings = (_root(seed), np.uint32(_DRAWS + draw))
    logits = []
    for start in range(0, len(images), engine.slots):
        part = slice(start, start + engine.slots)
        rows = (padded(images[part], engine.slots), padded(ids[part], engine.slots))
        operands = jax.device_put(rows, sharding)
        logits.append(np.asarray(program(engine.logits_fn, *settings, *operands)))
    return np.concatenate(logits)[: len(images)]


def nearest_first(
    engine: Engine, norm: str, images: np.ndarray, labels: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Reorder the targets i32[n, T] of n images by how near their boundary seems to be."""
    distances = nearness(engine, norm, images, labels, targets)
    return malt.nearest_first(distances, targets)


def nearness(
    engine: Engine, norm: str, images: np.ndarray, labels: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Estimate how far away the boundaries to the targets i32[n, T] of n images are, f32[n, T]."""
    program = engine.compiled(devices.nearness_program, engine.mesh, norm)
    sharding = NamedSharding(engine.mesh, PartitionSpec("slots"))
    distances = [np.zeros((0, targets.shape[1]), np.float32)]
    for start in range(0, len(images), engine.slots):
        part = slice(start, start + engine.slots)
        rows = tuple(padded(array[part], engine.slots) for array in (images, labels, targets))
        found = program(engine.logits_fn, *jax.device_put(rows, sharding))
        distances.append(np.asarray(found)[: len(images[part])])
    return np.concatenate(distances)


def _root(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))


def settled(engine: Engine, norm: str, points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Free up to `engine.slots` points of the rounding residue of an L1 iterate."""
    program = devices.settle_program(norm)
    rows = (padded(points, engine.slots), padded(images, engine.slots))
    return np.asarray(program(*rows))[: len(points)]


def padded(array: np.ndarray, length: int) -> np.ndarray:
    """Add rows of zeros behind an array, up to `length` in all."""
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def decide(
    engine: Engine,
    setting: Setting,
    images: ImageSet,
    labels: np.ndarray,
    ids: np.ndarray,
    which: np.ndarray,
    aims: Aims,
    *,
    epsilon: float,
    seed: int,
    confirm: Callable[[list[ImageVerdict], bool], list[ImageVerdict]],
) -> Iterator[Call]:
    """Run one attack; yield what each call of its program did.

    Args:
      images, labels, ids: f32[N,H,W,C], i32[N], u32[N]; all randomness of an image is of its id.
      which: i[n], the images to attack; all of them are classified correctly.
      aims: of these images, the classes to aim at in turn; the jobs that are left out.
      confirm: is told the verdicts as they become known, and whether all are; returns those, of
        them or of earlier ones, that do not hold. Such an image is attacked further.
    """
    made_for = devices.program_of(setting)
    mesh, keyed = engine.mesh, engine.keyed
    refill, proceed = engine.compiled(devices.programs, mesh, made_for, keyed, engine.tally)
    prepare = engine.compiled(devices.prepare_program, mesh, keyed)
    sharding = NamedSharding(engine.mesh, PartitionSpec("slots"))
    settings = (np.float32(epsilon), _root(seed), np.uint32(ensembles.named(setting.name).number))
    repeats = not engine.keyed  # whose draws are the same again
    jobs = Jobs(
        *(engine.slots, engine.mesh.size, which, aims.targets, setting.restarts),
        repeats,
        aims.made,
    )
    width = engine.slots // engine.mesh.size
    both = (engine.logits_fn, engine.search_fn)
    slots: Any = None
    prepared: list[Array] = []
    limit = 0  # the first call compiles and makes no step
    most = setting.steps + MACHINES[setting.machine].extra
    while True:
        while not jobs.assign():
            wrong = confirm(list(jobs.verdicts()), True)
            if not wrong:
                return
            jobs.refute(wrong)
        start = time.perf_counter()
        rows = jobs.rows(images, labels, ids)
        if slots is None:
            empty = functools.partial(begin, made_for, tally=engine.tally)
            shapes = jax.eval_shape(empty, *settings, rows)
            none = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
            slots = jax.device_put(none, sharding)
        if rows is not None:
            slots = refill(*settings, slots, jax.device_put(rows, sharding))
        floor = jax.device_put(jobs.floor(), sharding)
        if limit == 0:
            prepared = prepare(*both, slots.adversarial, slots.keys)
        slots, count = proceed(*both, settings[0], slots, np.int32(limit), floor, prepared)
        count, live, fooled, steps, flat = (
            np.asarray(a) for a in (count, slots.live, _fooled(slots), slots.steps, slots.flat)
        )
        made = jobs.collect(live, fooled, steps, flat, lambda: _points(slots))  # noqa: B023
        seconds = time.perf_counter() - start
        yield Call(int(count.sum()) * width, made, seconds, limit == 0)
        jobs.refute(confirm(list(jobs.verdicts()), False))
        a_step = seconds / max(int(count.max()), 1)
        left, fewer = most - int(steps[live].min(initial=most)), jobs.needed()
        saves = limit > 0 and left * a_step * (1 - fewer / width) > WORTH
        takes = functools.partial(tracing.takes, image=images.shape[1:], each=fewer, keyed=keyed)
        if saves and all(takes(network) for network in both if network is not None):
            slots, width = _moved(slots, jobs.narrow(fewer), sharding), fewer
            limit = 0
        else:
            limit = int(min(max(CALL_SECONDS / a_step, 4), 4 * limit, 10_000)) if limit else 8


def _moved(slots: Slots, places: np.ndarray, sharding: Any) -> Slots:
    """Gather the slots that were in `places`, i[S]; -1 is one without a job."""
    moved = jax.tree.map(lambda a: a[np.maximum(places, 0)], slots)
    return jax.device_put(moved._replace(live=moved.live & (places >= 0)), sharding)


def _fooled(slots: Slots) -> np.ndarray:
    """Tell in which slots a point may be an adversarial one, bool[S]."""
    fooled = np.asarray(slots.fooled)
    return fooled if slots.excess is None else fooled | (np.asarray(slots.excess) >= 0)


def _points(slots: Slots) -> np.ndarray:
    """Fetch those points, f32[S,H,W,C].

    Where draws are tallied, f32[S,2,H,W,C]: the latest that one draw called wrong and the strongest
    by the tally, NaN where there is none.
    """
    latest = np.asarray(slots.adversarial)
    if slots.excess is None:
        return latest
    pairs = np.stack([latest, np.asarray(slots.strongest)], axis=1)
    there = np.stack([np.asarray(slots.fooled), np.asarray(slots.excess) >= 0], axis=1)
    return np.where(there[..., None, None, None], pairs, np.float32(np.nan))
