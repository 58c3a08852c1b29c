"""Reads a local source: its arrays and what is known about them, with one reader per kind."""

from typing import Any

import numpy as np

from jaxrobust.models.published import PUBLISHED
from jaxrobust.types import Threat
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.fetch.sources import WeightSource
from jaxrobust.weights.store import certificates, files, weights_folder
from jaxrobust.weights.store.artifact import Artifact, WeightFacts
from jaxrobust.weights.trained import history, runs

_SIZES = {"img_size", "in_chans", "num_classes"}  # timm's arguments that do not change the network


def artifact_of(
    source: WeightSource, *, weights_kind: str | None = None, cast: bool = False
) -> Artifact:
    """Read the arrays of a local source, and the facts stored with them or next to them."""
    artifact = READERS[source.kind](source, weights_kind, cast)
    if source.published is None:
        return artifact
    facts, net = artifact.facts, PUBLISHED[source.published]
    board = net.board
    if net.options and facts.options is None:
        facts = facts._replace(model=net.model, options=net.options)
    facts = facts._replace(
        published=source.published,
        num_classes=facts.num_classes or board.num_classes,
        image_size=facts.image_size or board.image_size,
    )
    return Artifact(artifact.arrays, facts)


def _expected(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("preprocessing", "norm", "epsilon", "accuracies", "training")
    return {key: config.get(key) for key in keys}


def _file(source: WeightSource, weights_kind: str | None, cast: bool) -> Artifact:
    assert source.file is not None
    certificates.check(source.file)
    settings = sources.settings_of(source.settings)
    arrays, stored = files.artifact(source.file, weights_kind=weights_kind, cast=cast)
    own_settings = settings.get("jaxrobust") or {}
    model, options = own_settings.get("architecture") or source.model, own_settings.get("options")
    plain = not (settings.get("model_args") or {}).keys() - _SIZES
    if model is None and plain:
        model = sources.timm_names().get(str(settings.get("architecture")))
    model, options = weights_folder.stated(source.file) or (model, options)
    remote = source.kind == "remote"
    facts = stored._replace(
        where=source.text if remote else str(source.file),
        source=source.text if remote else source.file.name,
        file=source.file,
        model=model,
        options=options,
        num_classes=settings.get("num_classes"),
        image_size=(settings.get("input_size") or [None])[-1],
        settings=settings,
        **_expected(own_settings),
    )
    return Artifact(arrays, facts)


def _folder(source: WeightSource, weights_kind: str | None, cast: bool) -> Artifact:
    assert source.path is not None and source.file is not None
    record = weights_folder.about(source.path)
    if record is None:
        raise ValueError(
            f"{source.path} is in the hub's format; import it first: "
            f"jaxrobust import {source.path} --out FOLDER"
        )
    stored_kind = record.get("which")
    if weights_kind not in (None, stored_kind):
        words = f"the {files.WHICH[stored_kind]}" if stored_kind in files.WHICH else "one set of"
        raise ValueError(
            f"{source.path} holds {words} weights; leave --which out (which={weights_kind!r})"
        )
    options = record["options"]
    if options is None:
        _, options = certificates.stated(source.file) or (None, None)
    facts = WeightFacts(
        where=str(source.path),
        source=source.file.name,
        file=source.file,
        model=record["architecture"],
        options=options,
        num_classes=record["num_classes"],
        image_size=record["image_size"],
        which=stored_kind,
        record=record,
        **_expected(record),
    )
    return Artifact(files.artifact(source.file, cast=cast).arrays, facts)


def _run(source: WeightSource, weights_kind: str | None, cast: bool) -> Artifact:
    del cast  # they are float32
    workdir = source.path
    assert workdir is not None
    config = runs.run_config(workdir)
    stored_kind = config.evaluation.weights
    if weights_kind not in (None, stored_kind):
        words = files.WHICH[stored_kind]
        raise ValueError(
            f"{workdir} keeps only its best {words} weights, which it evaluates; for the "
            f"{files.WHICH[weights_kind]} weights of its latest checkpoint, run `jaxrobust "
            f"export --workdir {workdir} --which {weights_kind} --layout jaxrobust --out FOLDER`"
        )
    words, (params, stats) = runs.run_weights(workdir)
    ball = Threat.only(config.attack)
    facts = WeightFacts(
        where=f"{workdir} ({words})",
        source=f"{workdir.name} ({words})",
        workdir=workdir,
        model=config.model.name,
        options=dict(config.model.options),
        num_classes=config.model.num_classes,
        image_size=config.model.image_size,
        preprocessing=config.data.get("preprocessing"),
        norm=ball.norm if ball else None,
        epsilon=ball.epsilon if ball else None,
        training=history.of_run(workdir, runs.phase_of(workdir)),
        which=stored_kind,
    )
    arrays: dict[str, Any] = {k: np.asarray(a) for k, a in (params | stats).items()}
    return Artifact(arrays, facts)


# A source on the hub, of RobustBench or at an address is a file once it is local.
READERS = {"file": _file, "repository": _file, "remote": _file, "folder": _folder, "run": _run}
