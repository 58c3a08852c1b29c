"""Weights that are asked for by name: brought here, and made into a network."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxrobust
from jaxrobust import models
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime.files import folders, locks
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Classifier, Params
from jaxrobust.weights import imports
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.fetch.sources import Source
from jaxrobust.weights.imports import Asked
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.compose import compose, head_width
from jaxrobust.weights.store import certificates, files, hashes
from jaxrobust.weights.store import folder as weights_folder
from jaxrobust.weights.trained import runs

Arrays = dict[str, Any]  # np.ndarray, which hash and convert alike


class Stored(NamedTuple):
    """Weights as they are stored: names to arrays, and the network if it is known."""

    arrays: Arrays
    model: str | None
    where: str  # in words
    options: dict[str, Any] | None = None  # of the model; None: nobody says
    which: str | None = None  # "ema" or "raw"; None: nobody says


class Network(NamedTuple):
    """A network of ours with its weights, float32 on the host."""

    name: str
    params: Arrays
    stats: Arrays
    num_classes: int
    image_size: int
    options: dict[str, Any]  # the fields of its row that are replaced

    @property
    def in_channels(self) -> int:
        """Return the number of channels of the images."""
        return len(self.stats["normalize.mean"])

    @property
    def normalised(self) -> bool:
        """Tell whether the network's first layer changes the images."""
        mean, std = self.stats["normalize.mean"], self.stats["normalize.std"]
        return bool((mean != 0).any() or (std != 1).any())


class Loaded(NamedTuple):
    """A network, its weights, and all that is said of them."""

    net: Classifier
    params: Params
    stats: Params
    about: dict[str, Any]


def load(
    source: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    which: str | None = None,
    tell: Callable[[str], None] = say,
    **overrides: Any,
) -> Loaded:
    """Return a network with its weights, by a name or from a path.

    Args:
      source: a file, a folder that an import wrote, the workdir of a run, https://...,
        hf://ORG/REPO[@REVISION][/FILE], a RobustBench id (Salman2020Do_R18), or a timm id
        (convnext_tiny.fb_in1k). What is on the internet is kept in a cache.
      model: network of weights that do not say it: a name of `models.available()`, or the
        RobustBench id under which a file is read.
      image_size: side of the images in pixels, to which positions are resized; default: that of the
        weights.
      which: "ema" or "raw", for averaged or raw weights, of a source that says which it holds;
        default: the averaged ones of a file where it says so, and those that a run evaluates.
      tell: is told what is downloaded; default: stderr.
      **overrides: fields of the network's row, such as `dtype="bfloat16"`; those that make another
        network only where the weights say nothing of them.
    Returns:
      `net`, `params` and `stats`, f32 on the default device, and `about`: `architecture`,
      `options`, `num_classes`, `image_size`, `in_channels`, `preprocessing` (an id of
      `data.evaluation_transform`), `norm`, `epsilon`, `accuracies` (records), `source`,
      `weights_sha256`; None where nobody says it.
    Raises:
      ValueError: no such weights, or weights that do not fit; says what to do.
      OSError: the network or the disk.

    Of a file that is written here, so that nothing has to be downloaded:

    >>> import pathlib, tempfile
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
    path = place(source, model=model, which=which, tell=tell)
    known = None if model in PUBLISHED else model
    found = stored(path, which=which)
    network = fitted(path, found, known, image_size=image_size, options=overrides or None)
    net = models.create(
        network.name,
        num_classes=network.num_classes,
        image_size=network.image_size,
        **({"in_channels": network.in_channels} | network.options | overrides),
    )
    params, stats = jax.device_put((network.params, network.stats))
    return Loaded(net, params, stats, about(path, network, found.where))


def place(
    source: str | Path,
    *,
    model: str | None = None,
    which: str | None = None,
    fresh_stem: bool = False,
    tell: Callable[[str], None] = say,
) -> Path:
    """Return the file, imported folder or run that a source stands for, brought here if need be.

    What says whose weights it holds (a name, a repository of the hub) is imported into a folder of
    the cache; the file of a bare address is the file itself.

    Args:
      source: see `load`.
      model: see `load`.
      which: see `load`.
      fresh_stem: whether the stem will be drawn anew, which takes raw images.
      tell: is told what happens.
    Raises:
      ValueError: no such weights, or none that can be imported.
      OSError: the network or the disk.
    """
    found = sources.parse(str(source))
    if found.path is not None and found.kind != "repository":
        by_id = found.kind == "file" and _published(model, found.path)
        if not by_id:
            return found.path
    path, beside = sources.fetch(found, tell=tell)
    if beside is None and not (found.published or _published(model, path)):
        return path
    said = (beside.read_text() if beside else "", model, which, fresh_stem, jaxrobust.__version__)
    digest = hashlib.sha256(repr((hashes.file_sha256(path), said)).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "-", str(source)).strip("-.")[-60:]
    folder = folders.cache("weights") / "imported" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(folder.name + ".lock")
    with locks.held(lock, what=f"the import of {source}", otherwise="give a file", wait=True):
        if not _there(folder):
            asked = Asked(model=model, keep_head=True, raw=fresh_stem, which=which)
            done = imports.imported(found, asked, tell=tell)
            weights_folder.write(folder, done.start.params, done.start.stats, done.config)
            tell(f"{source}: imported into {folder}")
    return folder


def _published(model: str | None, path: Path) -> str | None:
    """Return the RobustBench id under which a file is read, if it is to be."""
    return imports.published(model, path) if model is None or model in PUBLISHED else None


def _there(folder: Path) -> bool:
    """Tell whether a folder of the cache is whole; a damaged one is removed."""
    try:
        return weights_folder.about(folder) is not None
    except ValueError:
        shutil.rmtree(folder)
        return False


def stored(path: Path, *, which: str | None = None) -> Stored:
    """Return the weights of a file, of an imported folder, or the best ones of a run.

    `which`: "ema" or "raw"; None: see `load`.
    Raises:
      ValueError: there are none, they cannot be read, or they are others than `which`.
    """
    found = sources.parse(str(path)) if path.exists() else Source(str(path), "file", path)
    if found.kind == "file":
        chosen = files.chosen(path, which=which)
        model, options = weights_folder.network(path) or (None, None)
        return Stored(chosen.arrays, model, str(path), options, chosen.which)
    if found.kind == "run":
        config = runs.run_config(path)
        if which not in (None, config.evaluation.weights):
            raise ValueError(
                f"{path} keeps the best of the {files.WHICH[config.evaluation.weights]} weights, "
                f"which it evaluates; the {files.WHICH[which]} ones of its latest checkpoint come "
                f"from `jaxrobust export --workdir {path} --which {which} "
                "--layout jaxrobust --out FOLDER`"
            )
        where, (params, stats) = runs.run_weights(path)
        arrays = {k: np.asarray(a) for k, a in (params | stats).items()}
        kind = config.evaluation.weights
        return Stored(arrays, config.model.name, f"{path} ({where})", config.model.options, kind)
    said = weights_folder.about(path)
    if said is None:
        raise ValueError(
            f"{path} is as the hub has it; import it first: python -m "
            f"jaxrobust import {path} --out FOLDER"
        )
    held = said.get("which")
    if which not in (None, held):
        words = f"the {files.WHICH[held]}" if held in files.WHICH else "one set of"
        raise ValueError(f"{path} holds {words} weights; leave --which out (which={which!r})")
    arrays = files.read(path / weights_folder.WEIGHTS)
    _, options = certificates.network(path) or (None, None)
    return Stored(arrays, said["architecture"], str(path), options, held)


def read(
    path: Path,
    model: str | None = None,
    *,
    image_size: int | None = None,
    which: str | None = None,
    options: dict[str, Any] | None = None,
) -> Network:
    """Return the network of a file, an imported folder or a run; see `stored` and `fitted`."""
    found = stored(path, which=which)
    return fitted(path, found, model, image_size=image_size, options=options)


def fitted(
    path: Path,
    found: Stored,
    model: str | None = None,
    *,
    image_size: int | None = None,
    options: dict[str, Any] | None = None,
) -> Network:
    """Return the network of stored weights.

    Args:
      path: of them.
      found: what is stored there.
      model: of weights that do not say whose they are.
      image_size: side of the images in pixels, to which positions are resized; default: what the
        weights say, or 224.
      options: of the model, for weights that do not say so themselves.
    Raises:
      ValueError: the model is not known, or the weights do not fit.
    """
    if model not in (None, found.model) and found.model is not None:
        raise ValueError(f"{path} holds a {found.model}; leave --model={model} out")
    name = found.model or model
    if name is None:
        raise ValueError(f"{path} does not say whose weights it holds; give --model NAME")
    names = convert.names(models.known(name), found.arrays)
    classes = head_width(name, names)
    mean = names.arrays.get("normalize.mean")
    channels = convert.in_channels(name, names) or (3 if mean is None else mean.size)
    size = image_size or _image_size(path)
    sizes = {"num_classes": classes or 1000, "image_size": size or 224}
    said = None if found.options is None else (name, dict(found.options))
    own = models.computed(name, {})
    given = {key: value for key, value in options.items() if key in own} if options else None
    options = certificates.options(name, options if options == {} else given or None, said, path)
    net = models.create(name, **sizes, in_channels=channels, **options)
    try:
        start = compose(name, net, found.arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if start.resized and image_size is None:
        raise ValueError(
            f"{path} was made for another image size than {size or 224}; give --image_size"
        )
    return Network(name, start.params, start.stats, **sizes, options=options)


def _image_size(path: Path) -> int | None:
    """Return the side of the images that stored weights are for; None: nobody says it."""
    if not path.is_dir():
        return None
    said = weights_folder.about(path)
    return said["image_size"] if said else runs.run_config(path).model.image_size


def about(path: Path, network: Network, where: str = "") -> dict[str, Any]:
    """Return what is said of stored weights, under the keys of an imported folder's config.json.

    `where`: they are in a run, in words.
    """
    known: dict[str, Any] = dict.fromkeys(("preprocessing", "norm", "epsilon", "accuracies"))
    sha256 = hashes.weights_sha256(network.params, network.stats)
    kind = sources.parse(str(path)).kind
    if kind == "run":
        known |= imports.told_of_run(
            path, where.replace(str(path), path.name), network.image_size, sha256
        )
    elif kind == "folder":
        known |= weights_folder.about(path) or {}
    else:
        known |= {"source": path.name, "source_sha256": hashes.file_sha256(path)}
    if known.get("image_size") not in (None, network.image_size):
        known["preprocessing"] = None  # it is for another size
    return known | {
        "architecture": network.name,
        "options": network.options,
        "num_classes": network.num_classes,
        "image_size": network.image_size,
        "in_channels": network.in_channels,
        "weights_sha256": sha256,
    }
