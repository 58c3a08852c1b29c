"""Weights of others as networks of ours, kept in a folder of the cache."""

import hashlib
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jaxrobust
from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, Published, own_id
from jaxrobust.runtime.files import caches, locks
from jaxrobust.runtime.files.download import Tell
from jaxrobust.runtime.text.progress import say
from jaxrobust.weights import reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.fetch.sources import WeightSource
from jaxrobust.weights.naming import networks
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store import hashes, weights_folder
from jaxrobust.weights.store.artifact import Network
from jaxrobust.weights.trained import runs


def local(
    source: WeightSource,
    *,
    model: str | None = None,
    weights_kind: str | None = None,
    fresh_stem: bool = False,
    as_it_is: bool = False,
    tell: Tell = say,
) -> WeightSource:
    """Fetch a source: return the file, imported folder or run that it stands for.

    Sources that say whose weights they hold (a name, a hub repository) are imported into a cache
    folder. The file at a plain address is used as it is; with `as_it_is`, so are all others.
    """
    if source.kind in ("folder", "run"):
        return source
    if as_it_is:
        here = sources.fetch(source, tell=tell)
        return WeightSource(source.text, "file", here.file, file=here.file)
    if source.kind == "file" and not _named(model, source.path):
        return source
    here = sources.fetch(source, tell=tell)
    assert here.file is not None
    if here.settings is None and not (here.published or _named(model, here.file)):
        return here._replace(kind="file", path=here.file)
    settings_text = here.settings.read_text() if here.settings else ""
    digest_parts = (settings_text, model, weights_kind, fresh_stem, jaxrobust.__version__)
    digest = hashlib.sha256(
        repr((hashes.file_sha256(here.file), digest_parts)).encode()
    ).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "-", source.text).strip("-.")[-60:]
    folder = caches.folder("weights") / "imported" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(folder.name + ".lock")
    with locks.held(
        lock, resource=f"the import of {source.text}", otherwise="give a file", wait=True
    ):
        if not _there(folder):
            request = Request(model=model, keep_head=True, raw=fresh_stem, which=weights_kind)
            network = imported(here, request)
            weights_folder.write(folder, network.params, network.stats, described(network))
            tell(f"{source.text}: imported into {folder}")
    return WeightSource(source.text, "folder", folder, file=folder / weights_folder.WEIGHTS)


def _named(model: str | None, path: Path | None) -> str | None:
    if path is None or not (model is None or model in PUBLISHED):
        return None
    return published(model, path)


def _there(folder: Path) -> bool:
    try:
        return weights_folder.about(folder) is not None
    except ValueError:
        shutil.rmtree(folder)
        return False


def imported(source: WeightSource, request: Request) -> Network:
    """Read a local source as a network of ours."""
    check_model(request.model)
    if source.kind == "run":
        changes = {k for k, v in request._asdict().items() if v != Request._field_defaults[k]}
        if extra := sorted(changes - {"image_size", "keep_head", "model"}):
            raise ValueError(
                f"--{extra[0]} only applies to foreign weights; the weights of a run are used as "
                "they are (for a new stem or head, set init.stem or init.head in a config)"
            )
    published_source = source._replace(published=_id(source, request.model))
    artifact = reading.artifact_of(published_source, weights_kind=request.which, cast=request.cast)
    model_name = artifact.facts.model
    if source.kind == "run" and request.model not in (None, model_name):
        raise ValueError(f"{source.path} holds a {model_name}; leave --model={request.model} out")
    return networks.network(artifact, request)


def check_model(model: str | None) -> None:
    """Raise `ValueError` unless this is one of our networks or a RobustBench id."""
    if model and model not in PUBLISHED:
        models.known(model)


def published(model: str | None, path: Path) -> str | None:
    """Return the RobustBench id of a file: given as the model, or found from the file name.

    Raises:
      ValueError: several networks use this file name, and the folders do not tell which it is.
    """
    if model in PUBLISHED:
        return model
    candidates = {
        key: net
        for key, net in PUBLISHED.items()
        if path.name in (f"{own_id(key)}.pt", Path(net.file).name) and model in (None, net.model)
    }
    if len(candidates) > 1:
        here = path.absolute().as_posix()
        of_folder = [key for key, net in candidates.items() if here.endswith(f"/{net.file}")]
        if len(of_folder) != 1:
            raise ValueError(
                f"{path.name} is RobustBench's file name for {', '.join(candidates)}; run "
                f"`jaxrobust import {path} --model ID --out FOLDER`, or keep it in RobustBench's "
                f"folders, as in {next(iter(candidates.values())).file}"
            )
        return of_folder[0]
    return next(iter(candidates), None)


def _id(source: WeightSource, model: str | None) -> str | None:
    if source.file is None:
        return None
    if model:
        return published(model, source.file)
    return source.published or (None if source.model else published(None, source.file))


def described(network: Network) -> dict[str, Any]:
    """Describe a network like the `config.json` of an imported folder; None: unknown."""
    facts, size, file = network.facts, network.image_size, network.facts.file
    key = facts.published
    net = PUBLISHED[key] if key else None
    if (
        net is None
        or network.fresh
        or (size, network.options) != (net.board.image_size, net.options)
    ):
        net = key = None
    board_preprocessing = facts.preprocessing if size == (facts.image_size or 224) else None
    expected: dict[str, Any] = {
        "preprocessing": board_preprocessing or preprocessing(facts.settings, size)
    }
    expected |= {"norm": facts.norm, "epsilon": facts.epsilon, "accuracies": facts.accuracies}
    if net is not None:
        ball = {"norm": net.board.norm, "epsilon": net.board.epsilon}
        expected = {"preprocessing": net.preprocessing} | ball
        robust = net.autoattack
        expected["accuracies"] = (
            None if robust is None else [_published_accuracy(net, ball, robust)]
        )
    elif facts.workdir is not None:
        expected["accuracies"] = runs.records_of(facts.workdir, network.weights_sha256) or None
    return {
        "architecture": network.name,
        "options": network.options,
        "num_classes": network.num_classes,
        "image_size": size,
        "in_channels": network.in_channels,
        **expected,
        "training": facts.training,
        "published_id": key,
        "source": facts.source,
        "source_sha256": facts.record.get("sha256") or (file and hashes.file_sha256(file)),
        "which": facts.which,
        "drawn": {"seed": network.seed, "names": [*network.fresh]} if network.fresh else None,
    }


def preprocessing(settings: dict[str, Any], size: int) -> str | None:
    """Translate timm's preprocessing for `size` px into an id of `evaluation_transform`."""
    interpolation, share = settings.get("interpolation"), settings.get("crop_pct")
    if interpolation not in ("bicubic", "bilinear") or not share:
        return None
    return f"{interpolation}-{math.floor(size / share)}-crop-{size}"


def _published_accuracy(net: Published, ball: dict[str, Any], robust: float) -> dict[str, Any]:
    return {
        "published_by": "RobustBench",
        "dataset": net.board.data,
        "split": net.board.split,
        "image_ids": f"0..{net.board.images - 1}",
        "preprocessing": net.preprocessing,
        "method": "autoattack standard",
        "attacks": [ball],
        "clean": round(net.clean / 100, 6),
        "robust": round(robust / 100, 6),
    }
