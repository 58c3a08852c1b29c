"""Examine the network, the config or the run named on the command line."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust.config import Config, of_phase, phases
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import balance
from jaxrobust.data.stream import pipeline
from jaxrobust.doctor import patient
from jaxrobust.doctor.config_checks import CONFIG_CHECKS, PlannedRun
from jaxrobust.doctor.findings import Finding, Tell, examined, summary
from jaxrobust.doctor.network_checks import NETWORK_CHECKS
from jaxrobust.doctor.patient import Patient, Recorded
from jaxrobust.evaluation.questions import flags, measuring
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.records import checked, records
from jaxrobust.models.kernels.cuda import hopper
from jaxrobust.runtime.commandline import targets
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.runtime.text.spelling import norm as spelled
from jaxrobust.training.run import start_runs
from jaxrobust.types import Threat, threats
from jaxrobust.weights.fetch import shipped
from jaxrobust.weights.trained import runs

_RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}  # the defaults, as for CIFAR-10


class Examination(NamedTuple):
    """A description of the examined network, and the findings."""

    of: str
    findings: list[Finding]


def given_of(place: str | None, **values: Any) -> GivenFlags:
    """Fill evaluate's flags; `place` is a run, weights, or a function given without a flag."""
    values["norm"] = values.get("norm") and spelled(values["norm"])
    defaults: dict[str, Any] = {"attack": "clean", "version": "standard", "n": None}
    defaults |= {"search_dtype": "float32", "seed": 0}
    if place is not None:
        values = targets.with_target(values, place, weights=shipped.RUNS)
    return GivenFlags(**(defaults | values))


def of_network(network_flags: GivenFlags, *, images: int, tell: Tell) -> Examination:
    """Examine the network named by flags on `images` images of its test split; raise `ValueError`
    if flags contradict each other or the weights.
    """
    network_flags = flags.placed(network_flags)
    flags.check(network_flags)
    f = network_flags
    with patience.of(f"reading {f.workdir or f.weights or f.function or f.torch} and its images"):
        of, subject = _read(network_flags, images)
    return _examined(of, NETWORK_CHECKS, subject, tell)


def _examined(of: str, checks: Any, subject: Any, tell: Tell) -> Examination:
    tell(of)
    findings = examined(checks, subject, tell)
    tell(summary(findings))
    return Examination(of, findings)


def _read(network_flags: GivenFlags, images: int) -> tuple[str, Patient]:
    run = Path(network_flags.workdir) if network_flags.workdir else None
    compilation.use_persistent_cache((run or Path("runs/doctor")).parent)
    origin, subject, source = flags.settled(network_flags)
    size = subject.image_size
    weights_name, subject, weights = flags.weights(network_flags, subject, source)
    requested = subjects.preprocessing(origin, size, source, network_flags.preprocessing)
    preprocessing = pipeline.preprocessing_id(source, size, requested)
    prepared = Prepared(source, image_size=size, preprocessing=preprocessing, images=images)
    labels = prepared.labels()
    spread_out = balance.order(labels, prepared.ids)  # so that the first images are balanced too
    places = prepared.ids[spread_out]
    logits_of = measuring.networks_of(subject, weights)
    examined_network = Patient(
        logits_fn=logits_of("float32"),
        images=prepared[spread_out],
        labels=labels[spread_out],
        threat=subject.threat or Threat(subject.norm, _RADII[subject.norm]),
        others={} if subject.net else {"bfloat16": logits_of("bfloat16")},
        arrays=patient.resized(source, places, preprocessing=preprocessing, image_size=size),
        recorded=_recorded(run, weights_name, source),
        classes=source.classes,
        seed=network_flags.seed,
    )
    of = f"{subject.network.name} ({weights_name})" if weights_name else subject.network.name
    return f"{of} on {len(places)} images of {source.where()}", examined_network


def _recorded(
    run: Path | None, weights_name: str | None, source: registry.Source
) -> Recorded | None:
    """Find the run's record of these weights on this split, if there is one."""
    if run is None or not (run / "results.jsonl").is_file():
        return None
    requested = (source.name, source.split, weights_name)
    for record in reversed(records.read(run)):
        same, clean = (record.dataset, record.split, record.weights) == requested, record.clean
        if same and clean is not None and math.isfinite(clean):
            checked.confirmed(record, run / "results.jsonl")
            return Recorded(float(clean), f"{run.name}/results.jsonl")
    return None


def of_config(config: Config, *, devices: int, name: str, tell: Tell) -> Examination:
    """Examine a config for training on this many devices, without compiling."""
    for phase in phases(config):
        threats(of_phase(config, phase).attack)  # raises on a mistake
    start_runs.fitting(config, Path("runs/doctor"))  # likewise
    of = f"{name} on {counted(devices, 'device')}"
    if hopper.requested():
        tell(hopper.NOTE)
    return _examined(of, CONFIG_CHECKS, PlannedRun(config, devices), tell)


def answer(
    values: dict[str, Any],
    place: str | None,
    *,
    config: Config | None,
    config_name: str | None,
    devices: int | None,
    tell: Tell,
) -> list[Examination]:
    """Examine the config and the network on the command line; `tell` gets each line immediately.

    Args:
      values: flags of evaluate, and `n`; place: the word without a flag.
      config: a config, named `config_name`.
      devices: number of devices; None: those present, where a CPU counts as one.
    """
    devices = devices or (1 if jax.default_backend() == "cpu" else jax.device_count())
    named_by = {key: value for key, value in values.items() if key not in ("n", "seed")}
    names_network = place is not None or any(value is not None for value in named_by.values())
    if config is None and not names_network:
        raise ValueError(
            "name a run, weights, a function or a config: RUN, --model NAME --weights PATH "
            "--dataset NAME, my_net.py:logits_fn --dataset NAME, or --config FILE"
        )
    done = []
    if config is not None:
        done.append(of_config(config, devices=devices, name=str(config_name), tell=tell))
    if names_network:
        network_flags = given_of(place, **values)
        if network_flags.workdir and config is None:
            run = Path(network_flags.workdir)
            name = f"{run}/config.json"
            done.append(of_config(runs.run_config(run), devices=devices, name=name, tell=tell))
        if done:
            tell("")
        done.append(of_network(network_flags, images=values["n"], tell=tell))
    return done
