"""The weights that a run starts from, and those that one phase passes to the next."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.config import (
    Config,
    ModelSection,
    NetworkSpec,
    StartSection,
    network_of,
    of_phase,
    phases,
    plain,
)
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Weights
from jaxrobust.weights import imports, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.compose import check_choices, compose, normalized
from jaxrobust.weights.naming.convert import StoredNames
from jaxrobust.weights.store import certificates, hashes
from jaxrobust.weights.store.artifact import Artifact, Network, WeightFacts
from jaxrobust.weights.trained import history, start_run

# Fields in the families' rows.
_OF_STEM = {"stem_widths", "stem_strides", "stem_kernels", "small_stem", "patch"}


def of_config(config: Config, workdir: Path = Path()) -> tuple[Network, dict[str, Any]] | None:
    """Return the weights that a config starts from, and their record; None: random ones.

    `workdir`: the folder next to it holds the run named by `run:CONFIG`.
    """
    init = config.init
    check_choices(config.model.name, init.stem, init.head)
    if not init.weights:
        return None if init.normalize == "keep" else _random(config)
    source = str(init.weights)
    try:
        parsed = _parsed(source, workdir)
        of_torch = pytorch.is_name(config.model.name)
        here = imports.local(parsed, fresh_stem=init.stem == "fresh", as_it_is=of_torch)
        artifact = reading.artifact_of(here)
        start = _composed(artifact, config, init)
    except ValueError as error:
        reason = str(error).removeprefix(f"{Path(source)}: ")
        raise ValueError(f"init.weights={source}: {reason}") from error
    if here.path and (line := certificates.line(here.path)):
        say(line)
    start_strides, strides = (
        row.get("stem_strides") for row in _rows(artifact.facts, config.model)
    )
    if init.stem == "keep" and start_strides != strides:
        say(f"init.weights={source}: trained with stem_strides={start_strides}, here {strides}")
    record: dict[str, Any] = {"weights": source, "where": artifact.facts.where}
    record |= {"stem": init.stem, "head": init.head}
    if init.normalize != "keep":
        record["normalize"] = init.normalize
    record |= {"weights_sha256": hashes.weights_sha256(artifact.arrays, {})}
    record["training"] = history.checked(artifact.facts.training)
    return start, record | {"start_sha256": start.weights_sha256}


def _parsed(weights: str, workdir: Path) -> sources.WeightSource:
    start_name = start_run.named(weights)
    return sources.parse(str(start_run.folder(start_name, workdir)) if start_name else weights)


def _composed(artifact: Artifact, config: Config, init: StartSection) -> Network:
    stored = convert.names(config.model.name, artifact.arrays)
    _belongs(artifact.facts, stored, config, init)
    spec = NetworkSpec.of_config(config)
    start = compose(spec, stored, stem=init.stem, head=init.head, seed=config.seed)
    return normalized(start, init.normalize)


def check_phases(config: Config, names: Sequence[str]) -> None:
    """Reject, before training, phases whose start is missing or another network."""
    first = config[names[0]]
    for key in ("start", "stem", "head", "normalize"):
        if first[key] not in (None, "keep"):
            raise ValueError(
                f"{names[0]}.{key}={first[key]!r}: the first phase starts from init; set "
                f"init.{'weights' if key == 'start' else key}"
            )
    for i, name in enumerate(names[1:], 1):
        start_phase = config[name].start or names[i - 1]
        if start_phase not in names[:i]:
            raise ValueError(
                f"{name}.start={start_phase!r}: a phase must start from an earlier one that runs, "
                f"{' or '.join(names[:i])}"
            )
        start_config, phase_config = of_phase(config, start_phase), of_phase(config, name)
        handed_on(start_config, phase_config, name, Weights(_halves(start_config), {}))


def _halves(config: Config) -> Any:
    """Return the shapes of a config's network; only names and shapes of the arrays matter."""
    params, stats = jax.eval_shape(network_of(config).init, jax.random.key(0))
    return {k: np.broadcast_to(np.float32(0.5), a.shape) for k, a in (params | stats).items()}


def check_run(start: Config, config: Config) -> None:
    """Refuse to start from a config's run if its weights do not fit the network."""
    start_config = of_phase(start, phases(start)[-1])
    run_config = of_phase(config, phases(config)[0])
    model, options = start_config.model.name, dict(start_config.model.options)
    facts = WeightFacts(where="the run", model=model, options=options)
    try:
        _composed(Artifact(_halves(start_config), facts), run_config, config.init)
    except ValueError as error:
        raise ValueError(f"init.weights={config.init.weights}: {error}") from error


def handed_on(start_config: Config, config: Config, name: str, weights: Weights) -> Weights:
    """Turn an earlier phase's weights (float32, on the host) into those of the phase `name`."""
    section = config[name]
    keeps = section.stem == section.head == section.normalize == "keep"
    if keeps and plain(start_config.model) == plain(config.model):
        return weights
    arrays = {key: np.asarray(array) for key, array in (weights.params | weights.stats).items()}
    model, options = start_config.model.name, dict(start_config.model.options)
    facts = WeightFacts(where="the phase before", model=model, options=options)
    try:
        start = _composed(Artifact(arrays, facts), config, section)
    except ValueError as error:
        reason = str(error).replace("init.", f"{name}.")
        raise ValueError(f"{name} starts from another network's weights: {reason}") from error
    return Weights(start.params, start.stats)


def _random(config: Config) -> tuple[Network, dict[str, Any]]:
    key, _ = jax.random.split(jax.random.key(config.seed))  # as `step.init_state` does
    init, normalize, model = network_of(config).init, config.init.normalize, config.model
    shapes, moved = jax.eval_shape(init, key)
    sizes = (model.num_classes, model.image_size, dict(model.options))
    normalized(Network(model.name, shapes, moved, *sizes), normalize)  # fails before compiling
    program = compilation.program(f"{model.name}: random weights", shapes)
    with compilation.waiting("compiling the initialization of the weights", program, say):
        params, stats = jax.device_get(jax.jit(init)(key))
    of_torch = pytorch.is_name(model.name)  # it has drawn or loaded its own
    fresh = () if of_torch else (*params,)
    drawn = Network(model.name, params, stats, *sizes, fresh=fresh, seed=config.seed)
    start = normalized(drawn, normalize)
    sha256 = hashes.weights_sha256(start.params, start.stats)
    where = "the module's own weights" if of_torch else f"random weights of seed {config.seed}"
    record: dict[str, Any] = {"weights": None, "where": where, "normalize": normalize}
    record["training"] = [None] if of_torch else []
    return start, record | {"weights_sha256": sha256, "start_sha256": sha256}


def _belongs(facts: WeightFacts, stored: StoredNames, config: Config, init: StartSection) -> None:
    """Reject weights that redrawing cannot make fit, each with its remedy."""
    model = config.model
    start_row, row = _rows(facts, model)
    differing = {key for key in start_row.keys() | row.keys() if start_row.get(key) != row.get(key)}
    if init.stem == "fresh":
        differing -= _OF_STEM
    elif facts.model != model.name or "stem_strides" in model.options:
        differing -= {"stem_strides"}  # intended: patches of 16 px become 4; shapes tell what fits
    if differing and facts.model != model.name:
        with_stem = f", or init.stem=fresh and model.name={facts.model}_cvst"
        raise ValueError(
            f"they are weights of {facts.model}; set model.name={facts.model}"
            + (with_stem if model.name == f"{facts.model}_cvst" else "")
        )
    if differing:
        assert facts.model is not None and facts.options is not None
        raise ValueError(
            f"they are weights of {models.words(facts.model, facts.options)}, but the config has "
            f"{models.words(model.name, model.options)}; set model.options to match"
        )
    width, channels = convert.head_width(stored), convert.in_channels(stored)
    if init.head == "keep" and width not in (None, model.num_classes):
        raise ValueError(
            f"their head has {width} classes, but model.num_classes={model.num_classes}; set "
            "init.head=fresh for a new head"
        )
    if init.stem == "keep" and channels not in (None, model.in_channels):
        raise ValueError(
            f"they expect images with {channels} channels, but model.in_channels="
            f"{model.in_channels}; give data with {channels}, or set init.stem=fresh for a new stem"
        )
    mean = stored.arrays.get("normalize.mean")
    if mean is not None and mean.size != model.in_channels:
        raise ValueError(
            f"they normalize images with {mean.size} channels, but model.in_channels="
            f"{model.in_channels}; give data with {mean.size}"
        )


def _rows(facts: WeightFacts, model: ModelSection) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that determine the stored and the config's network; empty: unknown."""
    if facts.model is None:
        return {}, {}
    pair = ({}, {}) if facts.options is None else (facts.options, model.options)
    return models.computed(facts.model, pair[0]), models.computed(model.name, pair[1])


def changed(config: Config, workdir: Path) -> str:
    """Warn if the weights that a run started from have changed; empty: they have not."""
    old_start = history.start_of(workdir)
    if old_start is None or not config.init.weights:
        return ""
    try:
        parsed = _parsed(config.init.weights, workdir)
        if parsed.path is None:  # remote; a run that has begun does not need it
            return ""
        here = imports.local(parsed, as_it_is=pytorch.is_name(config.model.name))
        now = hashes.weights_sha256(reading.artifact_of(here).arrays, {})
    except ValueError:  # gone, and no longer needed
        return ""
    if now == old_start["weights_sha256"]:
        return ""
    return (
        f"init.weights={config.init.weights} now holds different weights ({now[:12]}) than at the "
        f"start of this run ({old_start['weights_sha256'][:12]}), which continues from its own "
        "checkpoint"
    )
