"""All errors and warnings that training would raise for a config, without compiling."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust.config import Config, network_of, of_phase, phases
from jaxrobust.doctor.config_checks import CONFIG_CHECKS, PlannedRun
from jaxrobust.doctor.estimate import elsewhere
from jaxrobust.doctor.estimate.work import work
from jaxrobust.doctor.findings import RED, YELLOW, examined
from jaxrobust.runtime import pytorch
from jaxrobust.training import build
from jaxrobust.training.run import run, splits, start_runs, warnings
from jaxrobust.training.update import inner, objectives, optim, value_checks
from jaxrobust.types import threats
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.trained import start_run

_SPLITS = ("train_split", "selection_split", "test_split")


class Review(NamedTuple):
    """The findings on a config."""

    refused: list[str]  # errors that would end training
    warned: list[str]  # warnings of training or the doctor
    memory: list[str]  # a line for each phase

    def plain(self) -> dict[str, list[str]]:
        """Return the findings for JSON."""
        return self._asdict()


def parts_refused(config: Config) -> list[str]:
    """List the mistakes of a config, checking each part separately, without duplicates.

    Training would end with the first one.
    """
    with value_checks.collected() as refused:
        for check in _checks(config):
            before = len(refused)
            try:
                check()
            except (ValueError, OSError) as error:  # DataError too
                refused.append(str(error))
            except Exception:
                if len(refused) == before:  # else it follows from a value that is listed
                    raise
    return list(dict.fromkeys(refused))


def review(config: Config, devices: int) -> Review:
    """Find everything wrong with a config for this many devices."""
    config, fitted = warnings.fitted_batches(config, devices)
    refused = parts_refused(config)
    memory: list[str] = []
    if not refused:
        try:
            run.check(config, Path("runs/check"))  # mistakes in combinations of parts
            memory = _memory(config, devices)
        except (ValueError, OSError) as error:
            refused.append(str(error))
    return Review(refused, _warnings(config, devices, fitted), memory)


def _checks(config: Config) -> Iterator[Callable[[], Any]]:
    try:
        names = phases(config)
    except ValueError:
        yield partial(phases, config)  # which raises again
        return
    yield partial(start_weights.check_phases, config, names)
    yield partial(run.check_numbers, config)
    yield partial(start_runs.fitting, config, Path("runs/check"))
    if (weights := config.init.weights) and not start_run.named(weights):
        yield partial(sources.parse, weights)
    yield partial(warnings.check_start, of_phase(config, names[0]), names[0])
    for name in names:
        config_of_phase = of_phase(config, name)
        yield partial(run.check_numbers, config_of_phase)
        yield partial(network_of, config_of_phase)
        for key in _SPLITS:
            yield partial(_split, config_of_phase, key)
        yield from _phase(config_of_phase, name)


def _phase(config: Config, name: str) -> Iterator[Callable[[], Any]]:
    p = config[name]
    if p.objective in objectives.ROWS and objectives.named(p.objective).attacks:
        yield partial(threats, config.attack)
        yield partial(inner.check, config.attack, epochs=p.epochs, phase=name)
        yield partial(inner.training_attack, config, p.objective)
    yield partial(optim.of_phase, p, name, decay_mask="all", steps_per_epoch=1000)
    yield partial(build.mesh_of, config)
    yield partial(build.batch_augmentation, config, name, devices=1)
    yield partial(build.phase, config, name, 10**9)  # more images than any batch
    for key in ("evaluation", "test"):
        size, count = config[key].batch_size, jax.device_count()
        yield partial(build.divides, size, count, f"{key}.batch_size")


def _split(config: Config, key: str) -> None:
    source = splits.opened(config, key)
    if key != "train_split":
        splits.check_preprocessing(config, source)


def _warnings(config: Config, devices: int, fitted: list[str]) -> list[str]:
    try:
        of_phases = {name: of_phase(config, name) for name in phases(config)}
        sentences = [*fitted, *warnings.lines(of_phases)]
        findings = examined(CONFIG_CHECKS, PlannedRun(config, devices))
    except (ValueError, OSError):  # already listed as refused
        return fitted
    for finding in findings:
        if finding.result.level in (RED, YELLOW):
            sentences.append(
                f"{finding.check.name}: {finding.result.sentence}; {finding.result.remedy}"
            )
    return list(dict.fromkeys(sentences))


def _memory(config: Config, devices: int) -> list[str]:
    """Estimate the device memory of a step of each phase, compared with the capacity."""
    lines = []
    for part in work(config):
        state = elsewhere.state_bytes(part, part.config.mesh.fsdp or devices)
        images = part.batch_size // devices
        torch = pytorch.is_name(part.config.model.name)
        activations = elsewhere.kept(part.config, part.name, images=images)
        has = _capacity() // (devices if jax.default_backend() == "cpu" else 1)
        total = f"about {_gigabytes(state + activations)} GB of {_gigabytes(has)}"
        line = f"{part.name}: {total} for {images} images per device at a time"
        if state + activations > has:
            line += f"; lower {part.name}.batch_size, or set {part.name}.microbatches=2 or more"
            line += "" if torch else ", or model.remat=True"
        lines.append(line)
    return lines


def _capacity() -> int:
    """Return the bytes of memory of a device, or of this machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2g}" if count < 1e10 else f"{count / 1e9:.0f}"
