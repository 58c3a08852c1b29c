"""The weights that a network starts from: stored ones, with stem or head drawn anew."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.config import Config, network_of
from jaxrobust.runtime.progress import say
from jaxrobust.types import Classifier
from jaxrobust.weights import certificates, convert, files, hashes, runs
from jaxrobust.weights import folder as weights_folder

Arrays = dict[str, Any]  # np.ndarray, which hash and convert alike

CHOICES = ("keep", "fresh")
RECORD = "init.json"  # in a run's workdir
_OF_STEM = {"stem_widths", "stem_strides", "small_stem", "patch"}  # fields of the families' rows


class Start(NamedTuple):
    """Complete weights of a network, float32 on the host, and how they came about."""

    params: Arrays
    stats: Arrays
    matched: list[str]  # our names, from the stored weights
    fresh: list[str]  # our names, drawn
    dropped: dict[str, str]  # stored name -> why it is left out
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # our name -> shapes from, to


class Stored(NamedTuple):
    """Weights as they are stored: names to arrays, and the network if it is known."""

    arrays: Arrays
    model: str | None
    where: str  # in words
    options: dict[str, Any] | None = None  # of the model; None: nobody says


def head_width(name: str, found: convert.Names) -> int | None:
    """Return the number of classes of stored weights; None if they have no head."""
    head = re.compile(models.family(name).names.head)
    biases = [
        found.arrays[key]
        for key, _, targets in convert.matched(found)
        if any(head.fullmatch(t) and t.endswith(".bias") for t in targets)
    ]
    if not biases:
        return None
    if biases[0].ndim != 1 or not biases[0].size:
        raise ValueError(f"its head is damaged: the bias has shape {biases[0].shape}")
    return biases[0].size


def compose(
    name: str,
    net: Classifier,
    arrays: Mapping[str, np.ndarray],
    *,
    stem: str = "keep",
    head: str = "keep",
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    seed: int = 0,
) -> Start:
    """Return stored weights as those of a network, with stem and head drawn anew where that is
    asked for.

    Args:
      name: of the architecture, whose rows name the weights.
      net: the network, with any options, classes and image size.
      arrays: under our names, timm's or its authors'; float32.
      stem, head: "keep" or "fresh", which is the network's own initialisation (of a ConvStem:
        PyTorch's default). What is stored under their names is then left out, if there is any.
      normalize: mean and std of the first layer, for weights that do not hold theirs.
      seed: of the draws.
    Raises:
      ValueError: weights that do not fit, all in one message.
    """
    for key, value in (("stem", stem), ("head", head)):
        if value not in CHOICES:
            raise ValueError(f"init.{key}={value!r}; one of {', '.join(CHOICES)}")
    found = convert.names(name, arrays)
    if strange := [k for k, a in arrays.items() if a.dtype.kind == "f" and a.dtype != np.float32]:
        raise ValueError(
            f"{len(strange)} weights are {arrays[strange[0]].dtype} ({strange[0]}, ...), expected "
            "float32; where rounding them is meant, import them first with "
            "`python -m jaxrobust.convert.import_torch --cast`"
        )
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    shapes = {key: tuple(array.shape) for key, array in (params | stats).items()}
    names = models.family(name).names
    patterns = [p for p, how in ((names.stem, stem), (names.head, head)) if how == "fresh"]
    anew = re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)")
    fresh = [key for key in shapes if anew.fullmatch(key)]

    dropped, resized = {}, {}
    for key, which, targets in convert.matched(found):
        if which.target is None:
            dropped[key] = which.reason
        elif all(anew.fullmatch(t) for t in targets):
            dropped[key] = "is drawn anew"
        elif which.resize and (to := shapes.get(targets[0])) not in (None, found.arrays[key].shape):
            resized[targets[0]] = (found.arrays[key].shape, to)
    kept = {k: a for k, a in found.arrays.items() if dropped.get(k) != "is drawn anew"}
    values = normalize or tuple((v,) for v in found.normalize)
    added = {} if found.ours else _normalize(kept, values, shapes)
    expected = {key: shape for key, shape in shapes.items() if key not in fresh}
    try:
        filled = convert.rename(found.rows, kept | added, expected)
    except ValueError as error:
        if stem == "keep" and _fits_but_for(names.stem, found, kept | added, expected):
            raise ValueError(
                "only the stem is another one: for a new one set init.stem=fresh (--init-stem of "
                f"jaxrobust.convert.import_torch). {error}"
            ) from error
        raise
    matched = [key for key in expected if key not in added]
    filled |= _drawn(net, fresh, seed)
    ours, moved = ({key: filled[key] for key in group} for group in (params, stats))
    return Start(ours, moved, matched, fresh, dropped, resized)


def _fits_but_for(pattern: str, found: convert.Names, arrays: Arrays, expected) -> bool:
    """Tell whether all weights fit but for those whose names of ours match."""
    left = re.compile(pattern)
    out = {k for k, _, targets in convert.matched(found) if any(left.fullmatch(t) for t in targets)}
    rest = {key: shape for key, shape in expected.items() if not left.fullmatch(key)}
    try:
        convert.rename(found.rows, {k: a for k, a in arrays.items() if k not in out}, rest)
    except ValueError:
        return False
    return True


def _normalize(arrays: Arrays, values, shapes) -> Arrays:
    """Return the normalisation that arrays lack, under the names of both namings."""
    if {"normalize.mean", "normalize.std"} & arrays.keys():
        return {}
    shape = shapes["normalize.mean"]
    if any(len(value) not in (1, *shape) for value in values):
        raise ValueError(f"a mean and std of {len(values[0])} channels for images with {shape[0]}")
    return {
        f"normalize.{key}": np.broadcast_to(np.float32(value), shape).copy()
        for key, value in zip(("mean", "std"), values, strict=True)
    }


def _drawn(net: Classifier, fresh: list[str], seed: int) -> Arrays:
    """Return some of a network's initial weights; the others are not computed."""
    if not fresh:
        return {}

    def some(key):
        params, stats = net.init(key)
        return {k: a for k, a in (params | stats).items() if k in fresh}

    return jax.device_get(jax.jit(some)(jax.random.key(seed)))


def stored(path: Path, *, which: str = "ema") -> Stored:
    """Return the weights of a file, of an imported folder, or the best ones of a run.

    `which`: "ema" or "raw", where a file holds both.
    Raises:
      ValueError: there are none, or they cannot be read.
    """
    if not path.is_dir():
        arrays = files.read(path, which=which)
        model, options = weights_folder.network(path) or (None, None)
        return Stored(arrays, model, str(path), options)
    if config := weights_folder.about(path):
        arrays = files.read(path / weights_folder.WEIGHTS)
        _, options = certificates.network(path) or (None, None)
        return Stored(arrays, config["architecture"], str(path), options)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds no weights; give a file, a folder that jaxrobust.convert.import_torch "
            "wrote, or the workdir of a run"
        )
    config = runs.run_config(path)
    which, (params, stats) = runs.run_weights(path)
    arrays = {k: np.asarray(a) for k, a in (params | stats).items()}
    return Stored(arrays, config.model.name, f"{path} ({which})", config.model.options)


def of_config(config: Any) -> tuple[Start, dict[str, Any]] | None:
    """Return the weights that a config starts from, and their record; None: random ones.

    Raises:
      ValueError: no such weights, or weights of another network, before anything compiles.
    """
    asked, model = config.init, config.model
    for key in ("stem", "head"):
        if asked[key] not in CHOICES:
            raise ValueError(f"init.{key}={asked[key]!r}; one of {', '.join(CHOICES)}")
    if not asked.weights:
        return None
    try:
        source = stored(Path(asked.weights))
        _belongs(source, config)
        start = compose(
            model.name,
            network_of(config),
            source.arrays,
            stem=asked.stem,
            head=asked.head,
            seed=config.seed,
        )
    except ValueError as error:
        reason = str(error).removeprefix(f"{Path(asked.weights)}: ")
        raise ValueError(f"init.weights={asked.weights}: {reason}") from error
    if line := certificates.said(Path(asked.weights)):
        say(line)
    theirs, ours = (row.get("stem_strides") for row in _rows(source, model))
    if asked.stem == "keep" and theirs != ours:
        say(f"init.weights={asked.weights}: trained with stem_strides={theirs}, here {ours}")
    record = {"weights": str(asked.weights), "where": source.where}
    record |= {"stem": asked.stem, "head": asked.head}
    record |= {"weights_sha256": hashes.weights_sha256(source.arrays, {})}
    record |= {"start_sha256": hashes.weights_sha256(start.params, start.stats)}
    return start, record


def _belongs(source: Stored, config) -> None:
    """Refuse weights that no drawing makes fit, each with its remedy."""
    asked, model = config.init, config.model
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


def summary(start: Start) -> list[str]:
    """Say how weights came about, for people."""
    lines = [f"{len(start.matched)} arrays from the stored weights"]
    if start.fresh:
        lines += [f"{len(start.fresh)} drawn anew: {_some(start.fresh)}"]
    for reason in dict.fromkeys(start.dropped.values()):
        keys = [key for key, why in start.dropped.items() if why == reason]
        lines += [f"{len(keys)} left out ({reason}): {_some(keys)}"]
    lines += [f"{k} resized from {a} to {b}" for k, (a, b) in start.resized.items()]
    return lines


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + ", ..." * (len(keys) > 4)


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
        now = hashes.weights_sha256(stored(Path(config.init.weights)).arrays, {})
    except ValueError:  # gone: a run that has begun does not need them
        return ""
    if now == before["weights_sha256"]:
        return ""
    return (
        f"init.weights={config.init.weights} holds other weights now ({now[:12]}) than when this "
        f"run started ({before['weights_sha256'][:12]}); it continues from its own checkpoint"
    )
