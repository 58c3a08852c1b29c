"""Weights of any source as those of a network of ours, with all that is said of them."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED
from jaxrobust.weights.fetch import download, sources
from jaxrobust.weights.fetch.download import Tell
from jaxrobust.weights.fetch.sources import Source
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.compose import Start, compose, head_width
from jaxrobust.weights.store import certificates, files, hashes
from jaxrobust.weights.store import folder as weights_folder
from jaxrobust.weights.trained import runs

Arrays = dict[str, np.ndarray]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

_NONE: Normalisation = ((0.0,), (1.0,))
_IMAGENET: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)
_SIZES = {"img_size", "in_chans", "num_classes"}  # timm's arguments that make no other network


class Asked(NamedTuple):
    """What an import is to do; None: as the source says."""

    model: str | None = None  # a name of models.available(), or a RobustBench id
    num_classes: int | None = None  # the head is drawn anew where the source's has another width
    keep_head: bool = False  # whatever its width is, where nobody says what it should be
    image_size: int | None = None  # pixels; positions are resized
    options: dict[str, Any] | None = None  # other fields of the network's row
    init_stem: bool = False  # draws the stem anew
    raw: bool = False  # takes images that no settings normalise, as a stem that is drawn later does
    which: str | None = None  # ema or raw; None: the averaged ones where the source says so
    normalize: str = "auto"  # or none, imagenet: of weights that hold no mean and std
    cast: bool = False  # rounds other types to float32
    seed: int = 0  # of what is drawn


class Facts(NamedTuple):
    """What is said beside weights; None: nothing."""

    model: str | None = None
    options: dict[str, Any] | None = None
    num_classes: int | None = None
    image_size: int | None = None
    preprocessing: str | None = None
    norm: str | None = None
    epsilon: float | None = None
    accuracies: list[dict[str, Any]] | None = None  # records, or what others published
    settings: dict[str, Any] = {}  # noqa: RUF012  # timm's, read only


class Imported(NamedTuple):
    """Weights, and the `config.json` of the folder that they make."""

    start: Start
    config: dict[str, Any]
    file: Path | None  # that was read; None: a run's checkpoint
    published: str | None  # the RobustBench id under which the file was read
    normalized_by: str  # who says with which mean and std
    place: str = ""  # the key of the checkpoint under which they are; empty: it has none


def imported(
    source: Source, asked: Asked, *, sha256: str | None = None, tell: Tell = print
) -> Imported:
    """Return the weights of a source as those of a network of ours.

    Args:
      sha256: that the file must have; default: what is published of it.
      tell: is told what is downloaded.
    Raises:
      ValueError: weights that cannot be read, that are nobody's, or that do not fit, all in one
        message.
      download.Unreachable: they are on the internet, which does not answer.
    """
    check_model(asked.model)
    if source.kind == "run":
        if sha256:
            raise ValueError(f"{source.path} is a run, which has no one file; leave --sha256 out")
        return _of_run(source, asked)
    path, beside = sources.fetch(source, sha256=sha256, tell=tell)
    facts = _facts(source, beside)
    chosen = files.chosen(path, which=asked.which, cast=asked.cast)
    arrays = chosen.arrays
    key = source.published if not asked.model else published(asked.model, path)
    key = key or (published(None, path) if not (asked.model or source.model) else None)
    if key:
        facts = _of_leaderboard(facts, key)
    name = _name(asked, key, facts, source, path)
    said = weights_folder.network(path) or _of_another(facts, name)
    options = certificates.options(name, asked.options, said, path)
    found = convert.names(name, arrays, **options)
    values, normalized_by = normalisation(asked, key, facts.settings, found)
    try:
        start, sizes = _composed(name, options, arrays, found, facts, asked, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = key is not None and sizes["image_size"] == PUBLISHED[key].board.image_size
    whole = key if own and not (start.fresh or options) else None
    config = (
        {"architecture": name, "options": options, **sizes}
        | _expected(facts, whole, sizes["image_size"])
        | {
            "published_id": whole,
            "source": source.text if source.path is None else path.name,
            "source_sha256": download.check_sha256(path, None),
            "which": chosen.which,
            "drawn": {"seed": asked.seed, "names": start.fresh} if start.fresh else None,
        }
    )
    return Imported(start, config, path, key, normalized_by, chosen.place)


def check_model(model: str | None) -> None:
    """Raise `ValueError` for what is neither a network of ours nor a RobustBench id."""
    if model and model not in PUBLISHED:
        models.known(model)


def published(model: str | None, path: Path) -> str | None:
    """Return the RobustBench id of a file: given as the model, or by the name of the file.

    `model`: None where nobody says whose weights they are.
    """
    if model in PUBLISHED:
        return model
    for key, net in PUBLISHED.items():
        if path.name in (f"{key}.pt", Path(net.file).name) and model in (None, net.model):
            return key
    return None


def preprocessing(settings: dict[str, Any], size: int) -> str | None:
    """Return timm's preprocessing to `size` px as an id of `evaluation_transform`."""
    how, share = settings.get("interpolation"), settings.get("crop_pct")
    if how not in ("bicubic", "bilinear") or not share:
        return None
    return f"{how}-{math.floor(size / share)}-crop-{size}"


def normalisation(
    asked: Asked, key: str | None, settings: dict[str, Any], found: convert.Names
) -> tuple[Normalisation | None, str]:
    """Return (mean and std, who says so); None: the weights or their names say it themselves."""
    if {"normalize.mean", "normalize.std"} & found.arrays.keys():
        if asked.normalize != "auto":
            raise ValueError("the file holds its own mean and std; leave --normalize out")
        return None, "stored with the weights"
    if asked.normalize != "auto":
        return {"none": _NONE, "imagenet": _IMAGENET}[asked.normalize], "--normalize"
    if key:
        board = PUBLISHED[key].board
        inside = (board.mean, board.std) if PUBLISHED[key].normalised else _NONE
        return inside, f"RobustBench's {key}"
    if settings.get("mean") and settings.get("std") and not (asked.init_stem or asked.raw):
        return (tuple(settings["mean"]), tuple(settings["std"])), "the hub's config.json"
    if found.normalize != (0.0, 1.0):
        return None, "what files with these names assume"
    return None, "none is stored: raw [0, 1] images; --normalize imagenet says otherwise"


def _facts(source: Source, beside: Path | None) -> Facts:
    """Return what a source and the `config.json` beside its file say."""
    settings = sources.settings_of(beside)
    if source.kind == "folder":
        return Facts(**_told((beside and weights_folder.about(beside.parent)) or {}))
    plain = not (settings.get("model_args") or {}).keys() - _SIZES
    theirs = sources.timm_names().get(str(settings.get("architecture"))) if plain else None
    told = _told(settings.get("jaxrobust") or {})
    told["model"] = told["model"] or source.model or theirs
    told["num_classes"] = settings.get("num_classes")
    told["image_size"] = (settings.get("input_size") or [None])[-1]
    return Facts(**told, settings=settings)


def _of_leaderboard(facts: Facts, key: str) -> Facts:
    """Return facts with the classes and the image size of a RobustBench id, where they say none."""
    board = PUBLISHED[key].board
    sizes = {"num_classes": board.num_classes, "image_size": board.image_size}
    return facts._replace(**{k: getattr(facts, k) or size for k, size in sizes.items()})


def _told(about: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Facts` that a `config.json` of ours says."""
    own = {"model": about.get("architecture")}
    return own | {key: about.get(key) for key in Facts._fields if key not in ("model", "settings")}


def _name(asked: Asked, key: str | None, facts: Facts, source: Source, path: Path) -> str:
    """Return our name of the network."""
    if asked.model and asked.model not in PUBLISHED:
        return asked.model
    if key:
        return PUBLISHED[key].model
    metadata = weights_folder.network(path)
    if name := facts.model or (metadata and metadata[0]):
        return models.known(name)
    raise ValueError(
        f"{source.text} does not say whose weights it holds; give --model NAME, one of "
        "`jaxrobust models`"
    )


def _of_another(facts: Facts, name: str) -> tuple[str, dict[str, Any]] | None:
    """Return the network and its options that stand beside the file, if they say options."""
    if facts.model is None or facts.options is None:
        return None
    return facts.model, facts.options


def _composed(
    name: str,
    options: dict[str, Any],
    arrays: Arrays,
    found: convert.Names,
    facts: Facts,
    asked: Asked,
    values: Normalisation | None,
) -> tuple[Start, dict[str, int]]:
    """Return complete weights, and the sizes of the network that they are of."""
    width = head_width(name, found)
    classes = asked.num_classes or facts.num_classes or 1000
    if asked.num_classes is None and width not in (None, classes):
        if not asked.keep_head:
            raise ValueError(
                f"its head has {width} classes, not {classes}; --num-classes {width} keeps it, "
                "another number draws a new one"
            )
        classes = int(width or 0)
    mean = found.arrays.get("normalize.mean")
    stem_channels = None if asked.init_stem else convert.in_channels(name, found)
    sizes = {
        "num_classes": classes,
        "image_size": asked.image_size or facts.image_size or 224,
        "in_channels": stem_channels or (3 if mean is None else mean.size),
    }
    start = compose(
        name,
        models.create(name, **sizes, **options),
        arrays,
        stem="fresh" if asked.init_stem else "keep",
        head="keep" if width == classes or asked.num_classes is None else "fresh",
        normalize=values,
        seed=asked.seed,
    )
    return start, sizes


def _expected(facts: Facts, key: str | None, size: int) -> dict[str, Any]:
    """Return what is known of a network's input and robustness, of a published one or by others."""
    if key:
        ball = {"norm": "linf", "epsilon": PUBLISHED[key].board.epsilon}
        preprocessed = {"preprocessing": PUBLISHED[key].preprocessing}
        return preprocessed | ball | {"accuracies": [_published_accuracy(key, ball)]}
    theirs = preprocessing(facts.settings, size)
    return {
        "preprocessing": (facts.preprocessing if size == facts.image_size else None) or theirs,
        "norm": facts.norm,
        "epsilon": facts.epsilon,
        "accuracies": facts.accuracies,
    }


def _published_accuracy(key: str, ball: dict[str, Any]) -> dict[str, Any]:
    """Return what RobustBench says that a network reaches, in the words of our records."""
    net = PUBLISHED[key]
    return {
        "published_by": "RobustBench",
        "dataset": net.board.data,
        "split": net.board.split,
        "image_ids": f"0..{net.board.images - 1}",
        "preprocessing": net.preprocessing,
        "method": "autoattack standard",
        "attacks": [ball],
        "clean": round(net.clean / 100, 6),
        "robust": round(net.autoattack / 100, 6),
    }


def _of_run(source: Source, asked: Asked) -> Imported:
    """Return the best weights of a run, which says all of itself.

    Raises:
      ValueError: something else is asked for than the weights themselves.
    """
    assert source.path is not None
    changes = {k: v for k, v in asked._asdict().items() if v != Asked._field_defaults[k]}
    if extra := sorted(changes.keys() - {"image_size", "keep_head", "model"}):
        raise ValueError(
            f"--{extra[0].replace('_', '-')} is for weights of others; a run's are taken as they "
            "are (init.stem and init.head of a config draw anew)"
        )
    config = runs.run_config(source.path)
    if asked.model not in (None, config.model.name):
        raise ValueError(
            f"{source.path} holds a {config.model.name}; leave --model={asked.model} out"
        )
    where, weights = runs.run_weights(source.path, image_size=asked.image_size)
    params, stats = jax.device_get(tuple(weights))
    size = asked.image_size or config.model.image_size
    words = f"{source.path.name} ({where})"
    told = told_of_run(source.path, words, size, hashes.weights_sha256(params, stats))
    start = Start(params, stats, [*params, *stats], [], {}, {})
    return Imported(start, told, None, None, "stored with the weights")


def told_of_run(workdir: Path, where: str, size: int, sha256: str) -> dict[str, Any]:
    """Return what a run says of its best weights, as the `config.json` of an imported folder does.

    Args:
      workdir: of the run.
      where: they are, in words.
      size: side of the images in pixels, of the network.
      sha256: of the weights, as records have it.
    """
    config = runs.run_config(workdir)
    own, attack = config.model, config.attack
    return {
        "architecture": own.name,
        "options": models.essential(own.name, own.options),
        "num_classes": own.num_classes,
        "image_size": size,
        "in_channels": own.in_channels,
        "preprocessing": config.data.get("preprocessing") if size == own.image_size else None,
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "accuracies": runs.records_of(workdir, sha256) or None,
        "published_id": None,
        "source": where,
        "source_sha256": None,
        "which": config.evaluation.weights,
        "drawn": None,
    }
