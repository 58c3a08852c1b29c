"""Turns stored weights into a network of ours: name, options, sizes and inputs."""

from typing import Any, NamedTuple

from jaxrobust.config import NetworkSpec
from jaxrobust.models.published import PUBLISHED, Moments
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.compose import NORMALIZATIONS, compose
from jaxrobust.weights.naming.convert import StoredNames
from jaxrobust.weights.store import certificates
from jaxrobust.weights.store.artifact import Artifact, Network, WeightFacts


class Request(NamedTuple):
    """The network to make from stored weights; None: as the weights say."""

    model: str | None = None  # a name of models.available(), or a RobustBench id
    num_classes: int | None = None  # the head is redrawn if the source's has another width
    keep_head: bool = False  # keep it whatever its width, if the number of classes is not given
    image_size: int | None = None  # pixels; positions are resized
    options: dict[str, Any] | None = None  # further fields of the network's row
    init_stem: bool = False  # draw a new stem
    raw: bool = False  # allow images without normalization settings, for a stem that is drawn later
    which: str | None = None  # ema or raw; None: the averaged ones if the source names them
    normalize: str = "auto"  # or none, imagenet: for weights without mean and std
    cast: bool = False  # round other types to float32
    seed: int = 0  # for new weights


def network(artifact: Artifact, request: Request) -> Network:
    """Rename stored arrays to ours, and complete them to a network's weights."""
    facts = artifact.facts
    name = _name(facts, request.model)
    has_facts = facts.model is not None and facts.options is not None
    stated = (str(facts.model), dict(facts.options or {})) if has_facts else None
    options = certificates.options(name, request.options, stated, facts.where)
    stored = convert.names(name, artifact.arrays, **options)
    values, normalized_by = normalisation(stored, facts, request)
    try:
        width = convert.head_width(stored)
        spec = NetworkSpec(name, *_sizes(stored, width, facts, request), options)
        keep = request.num_classes in (None, width)
        network = compose(
            spec,
            stored,
            stem="fresh" if request.init_stem else "keep",
            head="keep" if keep else "fresh",
            normalize=values,
            seed=request.seed,
        )
    except ValueError as error:
        raise ValueError(f"{facts.where}: {error}") from error
    network = network._replace(facts=facts, normalized_by=normalized_by)
    exported = (facts.settings.get("jaxrobust") or {}).get("weights_sha256")
    as_stored = not (network.fresh or network.resized or request.raw or request.normalize != "auto")
    if exported and as_stored and network.weights_sha256 != exported:
        raise ValueError(
            f"{facts.where} does not hold the weights that config.json next to it describes (the "
            "sha256 differs); download both again"
        )
    return network


def normalisation(
    stored: StoredNames, facts: WeightFacts, request: Request
) -> tuple[Moments | None, str]:
    """Choose (mean and std, their origin); None: the weights or their names determine them."""
    if {"normalize.mean", "normalize.std"} & stored.arrays.keys():
        if request.normalize != "auto":
            raise ValueError("the file holds its own mean and std; leave --normalize out")
        return None, "stored with the weights"
    if request.normalize != "auto":
        return NORMALIZATIONS[request.normalize], "--normalize"
    if key := facts.published:
        net = PUBLISHED[key]
        return net.inside if net.normalised else NORMALIZATIONS["none"], f"RobustBench's {key}"
    mean, std = facts.settings.get("mean"), facts.settings.get("std")
    if mean and std and not (request.init_stem or request.raw):
        return (tuple(mean), tuple(std)), "the hub's config.json"
    if stored.normalize != (0.0, 1.0):
        return None, "the convention for files with these names"
    return None, "none is stored: raw [0, 1] images; change this with --normalize imagenet"


def _name(facts: WeightFacts, model: str | None) -> str:
    if model and model not in PUBLISHED:
        return model
    if facts.published:
        return PUBLISHED[facts.published].model
    if facts.model is None:
        raise ValueError(
            f"{facts.where} does not name its network; give --model NAME, as listed "
            "by `jaxrobust models`"
        )
    return facts.model


def _sizes(
    stored: StoredNames, width: int | None, facts: WeightFacts, request: Request
) -> tuple[int, int, int]:
    classes = request.num_classes or facts.num_classes or 1000
    if request.num_classes is None and width not in (None, classes):
        if facts.published:
            raise ValueError(
                f"its head has {width} classes, but RobustBench's {facts.published} has {classes}: "
                "these weights belong to another table or network; give its id"
            )
        if not request.keep_head:
            raise ValueError(
                f"its head has {width} classes, not {classes}; --num_classes {width} keeps it, any "
                "other number initializes a new one"
            )
        classes = int(width or 0)
    mean = stored.arrays.get("normalize.mean")
    stem_channels = None if request.init_stem else convert.in_channels(stored)
    channels = stem_channels or (3 if mean is None else mean.size)
    return classes, request.image_size or facts.image_size or 224, channels
