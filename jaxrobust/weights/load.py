"""Load networks: fetch a source, read it, and make a network with its weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime.text import spelling
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Classifier, Params
from jaxrobust.weights import imports, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import networks
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store.artifact import Artifact, Network

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", re.ASCII)
_OWN = ("architecture", "options", "num_classes", "image_size", "in_channels")  # of the network


class LoadedNetwork(NamedTuple):
    """A network, its weights, and everything known about them."""

    net: Classifier
    params: Params
    stats: Params
    about: dict[str, Any]

    @property
    def logits_fn(self) -> Partial:
        """Map images f32[B,H,W,C] in [0, 1] to logits f32[B,K]; weights are arguments under jit."""
        return Partial(lambda p, s, x: self.net.apply(p, s, x)[0], self.params, self.stats)

    def __repr__(self) -> str:  # without the numbers
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        about = {key: self.about.get(key) for key in (*_OWN, "source")}
        return f"LoadedNetwork({size:,} parameters, about={about})"


def load(
    source: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    which: str | None = None,
    tell: Callable[[str], None] = say,
    **overrides: Any,
) -> LoadedNetwork:
    """Load a network with its weights, by a name or from a path.

    Args:
      source: a file, an imported folder, the workdir of a run, https://...,
        hf://ORG/REPO[@REVISION][/FILE], a RobustBench id (Salman2020Do_R18), or a timm id
        (convnext_tiny.fb_in1k). Downloads are cached.
      model: the network, for weights that do not name it: a name from `models.available()`, or the
        RobustBench id under which to read a file.
      image_size: side of the images in pixels, to which positions are resized; default: the size of
        the weights.
      which: "ema" or "raw", for averaged or raw weights, if the source says which it holds;
        default: a file's averaged ones if labeled, and those that a run evaluates.
      tell: receives one line per download; default: print to stderr.
      **overrides: fields of the network's row, such as `dtype="bfloat16"`; fields that change the
        network are allowed only if the weights do not specify them.
    Returns:
      `net`, `params` and `stats`, f32 on the default device, and `about`: `architecture`,
      `options`, `num_classes`, `image_size`, `in_channels`, `preprocessing` (an id of
      `data.evaluation_transform`), `norm`, `epsilon`, `accuracies` (records), `source`,
      `weights_sha256`; None if unknown.
    Raises:
      ValueError: no such weights, or weights that do not fit; the message says what to do.
      OSError: the network or the disk.

    This example writes a file first, so that nothing has to be downloaded:

    >>> import pathlib, tempfile
    >>> from jaxrobust import models
    >>> from jaxrobust.weights.store import files, weights_folder
    >>> options = {"depths": (1, 1, 1), "dims": (8, 8, 8)}
    >>> net = models.create("convnext_n", num_classes=10, image_size=32, **options)
    >>> params, stats = jax.jit(net.init)(jax.random.key(0))
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "mine.safetensors"
    >>> files.write(path, jax.device_get(params | stats), weights_folder.metadata(
    ...     "convnext_n", options))
    >>> net, params, stats, about = load(path, image_size=32)
    >>> logits, _ = net.apply(params, stats, jax.numpy.zeros((2, 32, 32, 3)))
    >>> logits.shape, about["architecture"], about["num_classes"]
    ((2, 10), 'convnext_n', 10)
    """
    model = model and spelling.network(model)
    here = imports.local(sources.parse(str(source)), model=model, weights_kind=which, tell=tell)
    artifact = reading.artifact_of(here, weights_kind=which)
    own_name = None if model in PUBLISHED else model
    network = fitted(artifact, own_name, image_size=image_size, options=overrides or None)
    params, stats = jax.device_put((network.params, network.stats))
    return LoadedNetwork(network.create(**overrides), params, stats, about(network))


def from_pretrained(source: str | Path, **options: Any) -> LoadedNetwork:
    """Load a network; `load` under the name that libraries around the hub use, with its arguments.

    An `ORG/REPO` that is not a local path is a repository of the hub, `hf://ORG/REPO`.
    """
    text = str(source)
    on_hub = _REPOSITORY.fullmatch(text) and text not in PUBLISHED and not Path(text).exists()
    return load(f"hf://{text}" if on_hub else source, **options)


def fitted(
    artifact: Artifact,
    model: str | None = None,
    *,
    image_size: int | None = None,
    options: dict[str, Any] | None = None,
) -> Network:
    """Make a network from stored weights; `model` and `options` if they do not name them."""
    facts = artifact.facts
    if facts.model is not None and model not in (None, facts.model):
        raise ValueError(f"{facts.where} holds a {facts.model}; leave --model={model} out")
    request = Request(model=model, keep_head=True, image_size=image_size, options=options)
    network = networks.network(artifact, request)
    if network.resized and image_size is None:
        raise ValueError(
            f"{facts.where} does not fit image size {network.image_size}; give --image_size"
        )
    return network


def about(network: Network) -> dict[str, Any]:
    """Describe loaded weights with the keys of an imported folder's config.json."""
    described = imports.described(network)
    record = network.facts.record
    if record:
        described |= record | {key: described[key] for key in _OWN}
    if record.get("image_size") not in (None, network.image_size):
        described["preprocessing"] = None  # it applies to another size
    return described | {"weights_sha256": network.weights_sha256}
