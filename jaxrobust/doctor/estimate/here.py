"""Cost of a phase on present devices: its programs are compiled and briefly run."""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from jaxrobust.doctor.estimate.work import PhaseCost, PhaseWork
from jaxrobust.doctor.programs import topology
from jaxrobust.runtime.devices import sharding, tpus
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.run import best_weights, splits
from jaxrobust.training.run.phase_progress import peak_memory
from jaxrobust.types import Batch
from jaxrobust.weights.store.checkpoint import Checkpoints

MOST_STEPS = 50  # measured, or fewer if time runs out


def measured(work: PhaseWork, devices: list[Any], *, seconds: float) -> PhaseCost:
    """Compile and run the programs of a phase, the step for about `seconds`."""
    try:
        return _measured(work, devices, seconds)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        less = max(work.batch_size // len(devices) // 2, 1)
        raise ValueError(
            f"{work.name}: the programs for a batch of {work.batch_size} images need more memory "
            f"than the devices have; try --batch {less} or --fsdp 0"
        ) from error


def _measured(work: PhaseWork, devices: list[Any], seconds: float) -> PhaseCost:
    config, name = work.config, work.name
    phase = build.phase(config, name, work.rows, devices=devices)
    say(f"{name}: compiling its programs for {len(devices)} x {devices[0].device_kind}")
    total, runs = 0.0, {}
    with jax.set_mesh(phase.mesh):
        start = time.perf_counter()
        with patience.of(f"{name}: compiling the weight initialization"):
            state = jax.block_until_ready(phase.init(jax.random.key(config.seed)))
        total += time.perf_counter() - start
        arguments = build.abstract_arguments(config, name, phase)
        with patience.of(f"{name}: compiling the step"):
            step, took, _ = tpus.compile_timed(phase.step, *arguments)
        total += took
        probe = build.probe(config, name, phase) if work.probes else None
        tested: dict[str, Any] = {"steps": config.test.steps, "dtype": "float32", "top5": True}
        programs = {
            "evaluation": best_weights.counter(config, phase.mesh),
            "test": build.evaluation(config, phase.mesh, **tested),
        }
        for key, run in programs.items():
            with patience.of(f"{name}: compiling and measuring the {key}"):
                weights = state.params, state.stats
                runs[key], took = _evaluation(work, key, phase, weights, run)
            total += took
        control = build.control(phase.mesh)
        with _batches(work, phase) as batches:
            first = next(batches)
            if probe is not None:
                probe, took, _ = tpus.compile_timed(probe, *arguments)
                total += took
                alarm = _timed(lambda: probe(state, first, control))
            saved = _saved(state)
            number, step_s = _steps(step, state, batches, control, seconds)
    return PhaseCost(
        compile=total,
        step=step_s,
        probe=alarm if probe is not None else 0.0,
        selection=runs["evaluation"],
        test=runs["test"],
        save=saved,
        figures={"measured_steps": number, "measured_with_data": work.train.source is not None},
        memory=peak_memory() or topology.memory_of(topology.sizes(step)),
    )


def _evaluation(
    work: PhaseWork, key: str, phase: Any, weights: Any, run: Any
) -> tuple[float, float]:
    size = work.config[key].batch_size
    build.divides(size, phase.mesh.size, f"{key}.batch_size")
    images, labels = _random(work, size)
    batch = (images, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))
    replicated = sharding.replicated(phase.mesh)
    arrays = (
        *jax.device_put(weights, replicated),
        *sharding.global_arrays(phase.mesh, batch),
        jax.device_put(jax.random.key(0), replicated),
    )
    program, took, _ = tpus.compile_timed(run, *arrays)
    batches = -(-work.evaluated(key) // size)
    return batches * _timed(lambda: program(*arrays)), took


def _random(work: PhaseWork, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng, model = np.random.default_rng(0), work.config.model
    shape = (size, model.image_size, model.image_size, model.in_channels)
    images = rng.integers(0, 256, shape, np.uint8)
    return images, rng.integers(0, model.num_classes, size).astype(np.int32)


@contextlib.contextmanager
def _batches(work: PhaseWork, phase: build.Phase) -> Iterator[Iterator[Batch]]:
    """Yield batches on the devices: from the data set if it is here, else random ones."""
    if work.train.source is None:
        batch = Batch(*sharding.global_arrays(phase.mesh, _random(work, work.batch_size)))
        yield itertools.repeat(batch)
        return
    stream = splits.batches(work.config, work.name, work.train.source, 0)
    with contextlib.closing(stream):
        yield (splits.device_batch(phase.mesh, batch) for batch in stream)


def _steps(
    step: Any, state: Any, batches: Iterator[Batch], control: Any, seconds: float
) -> tuple[int, float]:
    """Run steps for about `seconds`; return their number and mean time. As in training, the next
    batch is prepared while the device computes.
    """
    batch, number = next(batches), -1  # the first step does not count
    start = end = time.perf_counter()
    while number < 1 or (number < MOST_STEPS and end - start < seconds):
        state, values = step(state, batch, control)
        batch = next(batches)
        jax.block_until_ready(values)
        end, number = time.perf_counter(), number + 1
        if number == 0:
            start = end
    return number, (end - start) / number


def _saved(state: Any) -> float:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
        for number in (1, 2):  # only the second counts: the first includes one-time setup
            start = time.perf_counter()
            checkpoints.save(number, state, {})
            checkpoints.wait()
        return time.perf_counter() - start


def _timed(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
