"""The analysed network and its images, as named by the flags of `jaxrobust evaluate`."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.questions import flags
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.types import Array, LogitsFn, Params, Threat, Weights
from jaxrobust.weights.store.checkpoint import Checkpoints, abstract_state
from jaxrobust.weights.store.steps import steps
from jaxrobust.weights.trained import runs

_NONE: dict[str, Any] = dict.fromkeys(flags.GivenFlags._fields)
_NONE |= {"attack": "clean", "version": "standard", "search_dtype": "float32", "n": 0, "seed": 0}


class NetworkSample(NamedTuple):
    """A network, and images for its analysis."""

    name: str
    subject: Subject
    logits_fn: LogitsFn
    images: np.ndarray  # f32[N,H,W,C] in [0, 1]
    labels: np.ndarray  # i32[N]
    ids: np.ndarray  # i32[N], places in the split
    classes: tuple[str, ...]

    @property
    def threat(self) -> Threat:
        """Return the threat of the analysis."""
        return self.subject.ball

    def called(self, label: int) -> str:
        """Return the name of a class, shortened to fit next to a picture."""
        name = self.classes[label] if label < len(self.classes) else str(label)
        return name if len(name) <= 18 else name[:17] + "…"


def seen(network_flags: dict[str, Any], *, attacked: bool = True) -> NetworkSample:
    """Read the network that flags name, and `n` images of its test split (0: all)."""
    values = flags.GivenFlags(**_NONE | network_flags)
    if values.n < 0 or values.n > 100_000:
        raise ValueError(f"--n={values.n} must be from 1 to 100000 images")
    values = flags.placed(values)
    flags.check(values)
    origin, subject, source = flags.settled(values)
    weights_name, subject, weights = flags.weights(values, subject, source)
    source = source.for_channels(subject.network.in_channels)
    if attacked and subject.threat is None:
        raise ValueError("give --epsilon, in units of the [0, 1] pixel range, such as 4/255")
    if source.channels != subject.network.in_channels:
        raise ValueError(
            f"the network takes {subject.network.in_channels} channels, but {source.where()} has "
            f"{source.channels}; give the --dataset that it was trained for"
        )
    size = subject.network.image_size or 0
    wanted = subjects.preprocessing(origin, size, source, values.preprocessing)
    images, labels, ids = _images(source, subject, values.n, wanted)
    name = f"{subject.network.name} ({weights_name})" if weights_name else subject.network.name
    (function,) = logits_of(subject, weights)
    return NetworkSample(name, subject, function, images, labels, ids, tuple(source.classes))


def weights_of(network_flags: dict[str, Any]) -> tuple[str, Weights]:
    """Return the weights that flags name, and their name; no images are needed."""
    values = flags.placed(flags.GivenFlags(**_NONE | network_flags))
    flags.check(values)
    network = flags.origin(values).network
    if values.workdir:
        weights_name, weights = runs.run_weights(Path(values.workdir), values.phase)
        return f"{network.name} ({weights_name})", weights
    classes = network.num_classes or values.num_classes
    if classes is None:
        raise ValueError("give --num_classes, which these weights do not store")
    size = values.image_size or network.image_size or 224
    network = dataclasses.replace(network, num_classes=classes, image_size=size)
    weights_name, network, weights = subjects.file_weights(network, Path(str(values.weights)))
    return f"{network.name} ({weights_name})", weights


def logits_of(subject: Subject, *all_weights: Weights) -> list[LogitsFn]:
    """Return a network's logits function per set of weights; it compiles once for all."""
    net = subject.create("float32")

    def forward(params: Params, stats: Params, images: Array) -> Array:
        return net.apply(params, stats, images)[0]

    return [jax.tree_util.Partial(forward, *weights) for weights in all_weights]


def _images(source: registry.Source, subject: Subject, n: int, wanted: str | None) -> Any:
    batches = pipeline.evaluation_batches(
        source,
        batch_size=min(n or len(source), 256),
        image_size=subject.network.image_size or 0,
        preprocessing=wanted,
        limit=n or None,
        workers=subject.workers,
    )
    with contextlib.closing(batches):
        parts = [(b.images[b.mask], b.labels[b.mask], b.ids[b.mask]) for b in batches]
    images, labels, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images.astype(np.float32) / np.float32(255), labels, ids


def other(place: str, like: NetworkSample) -> tuple[str, Subject, LogitsFn]:
    """Return name, subject and logits of another network: a place, NAME=FILE or torch:BUILDER."""
    name, equals, file = place.partition("=")
    about = like.subject
    network_flags: dict[str, Any] = {"weights": place}
    if place.startswith("torch:"):
        network_flags = {"torch": place.removeprefix("torch:")}
    elif equals:
        if not Path(file).is_file():
            raise ValueError(f"{place}: {file} does not exist")
        network_flags = {"model": name, "weights": file, "num_classes": about.network.num_classes}
    values = flags.placed(flags.GivenFlags(**_NONE | network_flags))
    flags.check(values)
    origin = flags.origin(values)
    classes = origin.network.num_classes
    if classes not in (None, about.network.num_classes):
        raise ValueError(
            f"{place} has {classes} classes, and {like.name} {about.network.num_classes}; name a "
            "network with the same classes"
        )
    data: dict[str, Any] = {"dataset": about.dataset, "split": about.split}
    data |= {"data_dir": about.data_dir, "classes": about.classes}
    subject, source = subjects.settled(origin, **({} if values.workdir else data))
    weights_name, subject, weights = flags.weights(values, subject, source)
    (function,) = logits_of(subject, weights)
    return f"{subject.network.name} ({weights_name})", subject, function


def epochs(workdir: Path, subject: Subject, only: str | None) -> list[tuple[int, str, LogitsFn]]:
    """Return the networks of a run by step: (step over all phases, name, network).

    Weights are from `PHASE/epochs` if the run kept them (`checkpoint.keep_epochs=True`), else the
    best of each phase; from the phase `only`, or (None) from all with the last phase's network.
    """
    net = subject.create("float32")
    shapes = Weights(*jax.eval_shape(net.init, jax.random.key(0)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names: list[tuple[int, str]] = []
    weights: list[Weights] = []
    steps_before, config = 0, subject.config
    model = {name: dict(config[name].changes).get("model") for name in config.phases}
    phases = [
        n for n in config.phases if model[n] == model[config.phases[-1]] and only in (None, n)
    ]
    for phase in phases:
        folder = next((k for k in ("epochs", "best") if steps(workdir / phase / k)), None)
        if folder is None:
            continue
        with contextlib.closing(Checkpoints(workdir / phase / folder, read_only=True)) as files:
            for step in steps(workdir / phase / folder):
                weights.append(files.restore(step, abstract_state(shapes, place)))
                names.append((steps_before + step, f"{phase} {step}"))
        steps_before = names[-1][0]
    logits_fns = logits_of(subject, *weights)
    return [(*name, logits_fn) for name, logits_fn in zip(names, logits_fns, strict=True)]


def keys(sample: NetworkSample, seed: int) -> Array:
    """Return a key for each image, as in evaluation, independent of the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), sample.ids)
