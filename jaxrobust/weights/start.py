"""The weights that a run starts from, and those that its phases hand on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.config import Config, network_of, of_phase, plain
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Weights
from jaxrobust.weights import load
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.load import Stored, stored
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.compose import CHOICES, Start, compose, head_width, normalized
from jaxrobust.weights.store import certificates, hashes

RECORD = "init.json"  # in a run's workdir
# Fields of the families' rows.
_OF_STEM = {"stem_widths", "stem_strides", "stem_kernels", "small_stem", "patch"}


def of_config(config: Any) -> tuple[Start, dict[str, Any]] | None:
    """Return the weights that a config starts from, and their record; None: random ones.

    Raises:
      ValueError: no such weights, or weights of another network, before anything compiles.
    """
    asked, model = config.init, config.model
    for key in ("stem", "head"):
        if asked[key] not in CHOICES[key]:
            raise ValueError(f"init.{key}={asked[key]!r}; one of {', '.join(CHOICES[key])}")
    if not asked.weights:
        return None if asked.normalize == "keep" else _random(config)
    try:
        path = load.place(asked.weights, fresh_stem=asked.stem == "fresh")
        source = stored(path)
        start = _composed(source, config, asked)
    except ValueError as error:
        reason = str(error).removeprefix(f"{Path(asked.weights)}: ")
        raise ValueError(f"init.weights={asked.weights}: {reason}") from error
    if line := certificates.said(path):
        say(line)
    theirs, ours = (row.get("stem_strides") for row in _rows(source, model))
    if asked.stem == "keep" and theirs != ours:
        say(f"init.weights={asked.weights}: trained with stem_strides={theirs}, here {ours}")
    record = {"weights": str(asked.weights), "where": source.where}
    record |= {"stem": asked.stem, "head": asked.head}
    if asked.normalize != "keep":
        record["normalize"] = asked.normalize
    record |= {"weights_sha256": hashes.weights_sha256(source.arrays, {})}
    record |= {"start_sha256": hashes.weights_sha256(start.params, start.stats)}
    return start, record


def _keeps(asked: Any) -> bool:
    return asked.stem == asked.head == asked.normalize == "keep"


def _composed(source: Stored, config: Config, asked: Any) -> Start:
    """Return weights as those of a config's network; `asked` says stem, head, normalisation."""
    _belongs(source, config, asked)
    start = compose(
        config.model.name,
        network_of(config),
        source.arrays,
        stem=asked.stem,
        head=asked.head,
        seed=config.seed,
    )
    return normalized(start, asked.normalize)


def check_phases(config: Config, names: Sequence[str]) -> None:
    """Refuse phases that start from what is not there, or is no such network.

    Raises:
      ValueError: one sentence, before anything is trained.
    """
    first = config[names[0]]
    for key in ("start", "stem", "head", "normalize"):
        if first[key] not in (None, "keep"):
            raise ValueError(
                f"{names[0]}.{key}={first[key]!r}: the first phase starts from init; set "
                f"init.{'weights' if key == 'start' else key}"
            )
    for i, name in enumerate(names[1:], 1):
        before = config[name].start or names[i - 1]
        if before not in names[:i]:
            raise ValueError(
                f"{name}.start={before!r}: a phase starts from an earlier one that happens, "
                f"{' or '.join(names[:i])}"
            )
        theirs, ours = of_phase(config, before), of_phase(config, name)
        params, stats = jax.eval_shape(network_of(theirs).init, jax.random.key(0))
        halves = {k: np.broadcast_to(np.float32(0.5), a.shape) for k, a in (params | stats).items()}
        handed_on(theirs, ours, name, Weights(halves, {}))  # type: ignore[arg-type]


def handed_on(before: Config, config: Config, name: str, weights: Weights) -> Weights:
    """Return the weights of an earlier phase as those of the phase `name`.

    Args:
      before, config: as these phases see it.
      weights: float32, on the host.
    Raises:
      ValueError: they do not fit its network.
    """
    asked = config[name]
    if plain(before.model) == plain(config.model) and _keeps(asked):
        return weights
    arrays = {key: np.asarray(array) for key, array in (weights.params | weights.stats).items()}
    source = Stored(arrays, before.model.name, "the phase before", before.model.options)
    try:
        start = _composed(source, config, asked)
    except ValueError as error:
        reason = str(error).replace("init.", f"{name}.")
        raise ValueError(f"{name} starts from another network's weights: {reason}") from error
    return Weights(start.params, start.stats)


def _random(config: Config) -> tuple[Start, dict[str, Any]]:
    """Return the weights that the run would draw itself, behind another normalisation."""
    key, _ = jax.random.split(jax.random.key(config.seed))  # as `step.init_state` does
    init, how = network_of(config).init, config.init.normalize
    shapes, moved = jax.eval_shape(init, key)
    normalized(Start(shapes, moved, [], [], {}, {}), how)  # refuses before it compiles
    program = compilation.program(f"{config.model.name}: random weights", shapes)
    with compilation.waiting("compiling the draw of the weights", program, say):
        params, stats = jax.device_get(jax.jit(init)(key))
    start = normalized(Start(params, stats, [], [*params], {}, {}), how)
    sha256 = hashes.weights_sha256(start.params, start.stats)
    where = f"random weights of seed {config.seed}"
    record = {"weights": None, "where": where, "normalize": config.init.normalize}
    return start, record | {"weights_sha256": sha256, "start_sha256": sha256}


def _belongs(source: Stored, config: Config, asked: Any) -> None:
    """Refuse weights that no drawing makes fit, each with its remedy."""
    model = config.model
    theirs, ours = _rows(source, model)
    differing = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    if asked.stem == "fresh":
        differing -= _OF_STEM
    elif source.model != model.name or "stem_strides" in model.options:
        differing -= {"stem_strides"}  # meant: patches of 16 px become 4; shapes tell what fits
    if differing and source.model != model.name:
        with_stem = f", or init.stem=fresh and model.name={source.model}_cvst"
        raise ValueError(
            f"they are those of {source.model}; set model.name={source.model}"
            + (with_stem if model.name == f"{source.model}_cvst" else "")
        )
    if differing:
        assert source.model is not None and source.options is not None
        raise ValueError(
            f"they are those of {models.words(source.model, source.options)}, and the config has "
            f"{models.words(model.name, model.options)}; set model.options to theirs"
        )
    found = convert.names(model.name, source.arrays)
    width, channels = head_width(model.name, found), convert.in_channels(model.name, found)
    if asked.head == "keep" and width not in (None, model.num_classes):
        raise ValueError(
            f"their head has {width} classes, and model.num_classes={model.num_classes}; set "
            "init.head=fresh for a new one"
        )
    if asked.stem == "keep" and channels not in (None, model.in_channels):
        raise ValueError(
            f"they take images with {channels} channels, and model.in_channels="
            f"{model.in_channels}; give data with {channels}, or set init.stem=fresh for a new stem"
        )
    mean = found.arrays.get("normalize.mean")
    if mean is not None and mean.size != model.in_channels:
        raise ValueError(
            f"they normalise images with {mean.size} channels, and model.in_channels="
            f"{model.in_channels}; give data with {mean.size}"
        )


def _rows(source: Stored, model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is known of the network of stored weights and of the config's; both empty:
    nothing.
    """
    if source.model is None:
        return {}, {}
    own = ({}, {}) if source.options is None else (source.options, model.options)
    return models.computed(source.model, own[0]), models.computed(model.name, own[1])


def record_of(workdir: Path) -> dict[str, Any] | None:
    """Return what a run started from, as it wrote it down; None: from random weights."""
    path = workdir / RECORD
    return json.loads(path.read_text()) if path.exists() else None


def changed(config: Config, workdir: Path) -> str:
    """Return a sentence if the weights that a run started from are others by now; else empty."""
    before = record_of(workdir)
    if before is None or not config.init.weights:
        return ""
    try:
        named = sources.parse(config.init.weights)
        if named.path is None:  # on the internet, which a run that has begun does not need
            return ""
        now = hashes.weights_sha256(stored(load.place(named.path)).arrays, {})
    except ValueError:  # gone: it does not need them either
        return ""
    if now == before["weights_sha256"]:
        return ""
    return (
        f"init.weights={config.init.weights} holds other weights now ({now[:12]}) than when this "
        f"run started ({before['weights_sha256'][:12]}); it continues from its own checkpoint"
    )
