"""The evaluator's engine: a fixed number of slots, each running one job on one image.

A job is one run of an attack on one image: one target, one restart. The engine alone calls the
network: it asks the machines of all slots for their points, runs one forward pass (and one
backward pass) over them, and tells them the result. A slot is free as soon as its image is fooled
or its machine has finished; the host then assigns the next job. Shapes never change, so one program
serves any number of images, any radius, seed, target and restart. When slots fall idle at the end
of a long attack, the remaining jobs move to fewer slots and another program.
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
from jaxrobust.attacks.registry import Setting
from jaxrobust.evaluation.engine import slots as devices
from jaxrobust.evaluation.engine.schedule import Aims, ImageVerdict, Jobs, Sample, SlotRows
from jaxrobust.evaluation.engine.slots import Slots, begin
from jaxrobust.evaluation.network import tracing
from jaxrobust.types import Array, LogitsFn

Confirm = Callable[[list[ImageVerdict], bool], list[ImageVerdict]]
_DRAWS = 1000  # from this number on, draws are of forward passes outside the attacks
CALL_SECONDS = 0.5  # between two checks of the slots by the host
WORTH = 20.0  # seconds that fewer slots must save to justify compiling another program
COMPILE_ONLY = 0  # steps of the first call of a program


class Engine(NamedTuple):
    """A network on slots: `logits_fn` decides, `search_fn` (None: the same) guides the search.

    With `operand` "keys" both also take one key per image; with "ids" one id per image, and they
    return [stands, loss] of a task. `tally` names a row of `attacks.TALLIES` that judges points in
    the search in addition to one draw; with "" one draw judges alone.
    """

    mesh: Mesh
    slots: int
    logits_fn: LogitsFn
    search_fn: LogitsFn | None
    operand: str  # "", "keys" or "ids"
    functions: dict[str, LogitsFn]  # the user's functions; programs hold them weakly
    compiled: Callable[..., Any]  # (a function that makes a program, its arguments) -> the program
    traces: tuple[tracing.TracedNetwork, ...] = ()  # of one or both networks, after `trace`
    tally: str = ""

    @property
    def keyed(self) -> bool:
        """Tell whether the network draws random numbers."""
        return self.operand == "keys"


class Call(NamedTuple):
    """The work of one call of a program."""

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
    operand: str = "",
    tally: str = "",
) -> Engine:
    """Make an engine on all devices of this process.

    `slots` is rounded up to a multiple of the devices; default: `device_slots` on each.
    """
    if slots is not None and not (isinstance(slots, int | np.integer) and slots >= 1):
        raise ValueError(f"batch_size={slots!r} must be an int >= 1, or None")
    here = local_devices()
    if slots is None:
        slots = device_slots(here[0].platform, image_size) * len(here)
    slots += -slots % len(here)
    mesh = Mesh(np.array(here), ("slots",), axis_types=(AxisType.Auto,))
    functions = {"logits_fn": logits_fn}
    if search_fn is not None:
        functions["search_fn"] = search_fn
    decides, *guides = (tracing.argument(name, f, mesh) for name, f in functions.items())
    guide = guides[0] if guides else None
    return Engine(mesh, slots, decides, guide, operand, functions, _compiled(), tally=tally)


def device_slots(platform: str, image_size: int) -> int:
    """Return the default number of slots on a device.

    On a CPU, more than 8 slots do not make a pass cheaper; elsewhere small images get more.
    """
    return 8 if platform == "cpu" else 512 if image_size <= 64 else 64


def trace(engine: Engine, image: tuple[int, ...]) -> Engine:
    """Trace the networks for images of shape (H, W, C); reuse their compiled programs."""
    per_device = engine.slots // engine.mesh.size
    networks = [engine.logits_fn, engine.search_fn][: len(engine.functions)]
    traces = [
        tracing.trace(name, function, network, image, per_device, engine.operand)
        for (name, function), network in zip(engine.functions.items(), networks, strict=True)
    ]
    if len({trace.classes for trace in traces}) > 1:
        raise ValueError(
            f"search_fn returns {traces[1].classes} logits, but logits_fn returns "
            f"{traces[0].classes}; pass the same network in lower precision"
        )
    use, programs = (image, engine.operand), " ".join(trace.program for trace in traces)
    compiled = tracing.keep(networks, use, programs, _compiled)
    return engine._replace(compiled=compiled, traces=tuple(traces))


def _compiled() -> Callable[..., Any]:
    """Make a cache of a network's programs, keyed by their factory and its arguments."""
    return functools.cache(lambda make, mesh, *settings: make(mesh, *settings))


def forward(
    engine: Engine,
    images: np.ndarray,
    ids: np.ndarray | None = None,
    *,
    seed: int = 0,
    draw: int = 0,
) -> np.ndarray:
    """Compute logits f32[n, K] of n images with one program for any n.

    A randomized network gets keys derived from the seed, the image's id and `draw`. A task's logits
    have two classes: the image stands, or it does not.
    """
    if not len(images):
        return np.zeros((0, engine.traces[0].classes), np.float32)
    program = engine.compiled(devices.forward_program, engine.mesh, engine.operand)
    ids = np.zeros(len(images), np.uint32) if ids is None else ids
    network = functools.partial(program, engine.logits_fn, _root(seed), np.uint32(_DRAWS + draw))
    return _by_parts(engine, network, images, ids)


def nearness(
    engine: Engine, norm: str, images: np.ndarray, labels: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Estimate the distances f32[n, T] of n images to the boundaries of targets i32[n, T]."""
    if not len(images):
        return np.zeros((0, targets.shape[1]), np.float32)
    program = engine.compiled(devices.nearness_program, engine.mesh, norm)
    distances = functools.partial(program, engine.logits_fn)
    return _by_parts(engine, distances, images, labels, targets)


def _by_parts(engine: Engine, program: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
    """Call a program on arrays of n >= 1 rows, in batches of one row per slot."""
    sharding, results = NamedSharding(engine.mesh, PartitionSpec("slots")), []
    for start in range(0, len(arrays[0]), engine.slots):
        rows = tuple(padded(a[start : start + engine.slots], engine.slots) for a in arrays)
        results.append(np.asarray(program(*jax.device_put(rows, sharding))))
    return np.concatenate(results)[: len(arrays[0])]


def settled(engine: Engine, norm: str, points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Remove the rounding residue of an L1 iterate from up to `engine.slots` points."""
    program = devices.settle_program(norm)
    rows = (padded(points, engine.slots), padded(images, engine.slots))
    return np.asarray(program(*rows))[: len(points)]


def padded(array: np.ndarray, length: int) -> np.ndarray:
    """Pad an array with rows of zeros to `length` rows."""
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _root(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))


def decide(
    engine: Engine,
    setting: Setting,
    sample: Sample,
    places: np.ndarray,
    aims: Aims,
    *,
    confirm: Confirm,
) -> Iterator[Call]:
    """Run one attack; yield the work done by each call of its program.

    Args:
      sample: images, labels, ids, radius and seed; an image's draws derive from its id.
      places: i[n], the images to attack; all of them are classified correctly.
      aims: the classes to target on each of these images, in order, and the jobs to skip.
      confirm: called with the new verdicts and whether they are the last; returns the verdicts,
        new or earlier, that do not hold. Such images are attacked further.
    """
    programs = _Programs(engine, setting, sample.threat.epsilon, sample.seed)
    jobs = Jobs(engine.slots, engine.mesh.size, places, aims, setting.restarts, not engine.keyed)
    slots, length = None, COMPILE_ONLY
    while True:
        while not jobs.assign():
            if not confirm_and_requeue(jobs, confirm, last=True):
                return
        start = time.perf_counter()
        slots = programs.load(slots, jobs.rows(sample))
        slots, taken = programs.advance(slots, length, jobs.floor())
        live, fooled, steps, flat = _host_arrays(slots)
        useful = jobs.collect(live, fooled, steps, flat, functools.partial(_points, slots))
        seconds = time.perf_counter() - start
        yield Call(int(taken.sum()) * jobs.width, useful, seconds, length == COMPILE_ONLY)
        confirm_and_requeue(jobs, confirm, last=False)
        step_seconds = seconds / max(int(taken.max()), 1)
        steps_left = programs.steps - int(steps[live].min(initial=programs.steps))
        if length and should_narrow(
            engine, jobs, sample.images.shape[1:], steps_left * step_seconds
        ):
            slots, length = programs.moved(slots, jobs.narrow()), COMPILE_ONLY
        else:
            length = next_call_length(length, step_seconds)


def next_call_length(length: int, step_seconds: float) -> int:
    """Choose the next call's steps: about `CALL_SECONDS` worth, at most 4 times the last."""
    if length == COMPILE_ONLY:
        return 8
    return int(min(max(CALL_SECONDS / step_seconds, 4), 4 * length, 10_000))


def should_narrow(engine: Engine, jobs: Jobs, image: tuple[int, ...], seconds: float) -> bool:
    """Tell whether fewer slots would save more than `WORTH` of the `seconds` left."""
    fewer = jobs.needed()
    if seconds * (1 - fewer / jobs.width) <= WORTH:
        return False
    networks = [engine.logits_fn, engine.search_fn][: len(engine.functions)]
    return all(tracing.takes(network, image, fewer, engine.operand) for network in networks)


def confirm_and_requeue(jobs: Jobs, confirm: Confirm, *, last: bool) -> list[ImageVerdict]:
    """Confirm the new verdicts; return the ones that do not hold and continue their jobs."""
    refuted = confirm(list(jobs.verdicts()), last)
    jobs.refute(refuted)
    return refuted


class _Programs:
    """The programs of one attack, and their arguments besides the slots."""

    def __init__(self, engine: Engine, setting: Setting, epsilon: float, seed: int) -> None:
        self.engine, self.program_setting = engine, devices.program_of(setting)
        self.steps = setting.steps + MACHINES[setting.machine].extra  # of a job, at most
        mesh, operand, tally = engine.mesh, engine.operand, engine.tally
        self._refill, self._proceed = engine.compiled(
            devices.programs, mesh, self.program_setting, operand, tally
        )
        self._prepare = engine.compiled(devices.prepare_program, mesh, operand)
        self._sharding = NamedSharding(mesh, PartitionSpec("slots"))
        number = np.uint32(ensembles.named(setting.name).number)
        self._settings = (np.float32(epsilon), _root(seed), number)
        self._networks = (engine.logits_fn, engine.search_fn)
        self._prepared: list[Array] = []

    def load(self, slots: Slots | None, rows: SlotRows | None) -> Slots:
        """Begin the jobs of `rows` in their slots; without `slots`, create empty ones."""
        if slots is None:
            kind: Any = {"operand": self.engine.operand, "tally": self.engine.tally}
            empty = functools.partial(begin, self.program_setting, **kind)
            shapes = jax.eval_shape(empty, *self._settings, rows)
            zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
            slots = jax.device_put(zeros, self._sharding)
        if rows is not None:
            slots = self._refill(*self._settings, slots, jax.device_put(rows, self._sharding))
        return slots

    def advance(self, slots: Slots, length: int, floor: np.ndarray) -> tuple[Slots, np.ndarray]:
        """Take up to `length` steps in all slots; return the slots and each device's steps."""
        if length == COMPILE_ONLY:
            self._prepared = self._prepare(*self._networks, slots.adversarial, slots.keys)
        slots, count = self._proceed(
            *(*self._networks, self._settings[0], slots, np.int32(length)),
            *(jax.device_put(floor, self._sharding), self._prepared),
        )
        return slots, np.asarray(count)

    def moved(self, slots: Slots, places: np.ndarray) -> Slots:
        """Gather the slots at `places`, i[S]; -1 makes a slot without a job."""
        moved: Slots = jax.tree.map(lambda a: a[np.maximum(places, 0)], slots)
        moved = moved._replace(live=moved.live & (places >= 0))
        return Slots(*jax.device_put(moved, self._sharding))


def _host_arrays(slots: Slots) -> tuple[np.ndarray, ...]:
    """Fetch `live`, whether a point may be adversarial, `steps` and `flat` of all slots."""
    live, fooled, steps, flat = map(np.asarray, (slots.live, slots.fooled, slots.steps, slots.flat))
    if slots.excess is not None:
        fooled = fooled | (np.asarray(slots.excess) >= 0)
    return live, fooled, steps, flat


def _points(slots: Slots) -> np.ndarray:
    """Fetch the points that may be adversarial, f32[S,H,W,C]."""
    # With a tally, f32[S,2,H,W,C]: the latest point that one draw misclassified and the strongest
    # point by the tally, NaN if there is none.
    latest = np.asarray(slots.adversarial)
    if slots.excess is None:
        return latest
    pairs = np.stack([latest, np.asarray(slots.strongest)], axis=1)
    exists = np.stack([np.asarray(slots.fooled), np.asarray(slots.excess) >= 0], axis=1)
    return np.where(exists[..., None, None, None], pairs, np.float32(np.nan))
