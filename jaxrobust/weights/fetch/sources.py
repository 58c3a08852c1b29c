"""Sources of weights: a file, a folder, a run, an address, or a name.

`--weights`, `init.weights`, the SOURCE of an import and `jaxrobust.load` are parsed here.
"""

import difflib
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, others, own_id
from jaxrobust.runtime.files import buckets
from jaxrobust.weights.fetch import remote_weights, shipped
from jaxrobust.weights.fetch.remote_weights import SETTINGS, Tell
from jaxrobust.weights.fetch.shipped import KINDS
from jaxrobust.weights.store import files, weights_folder

_TIMM = re.compile(r"([a-z][a-z0-9_]*)\.([a-z0-9_]+)")


class WeightSource(NamedTuple):
    """The place of weights: the user's text, and the files it stands for once they are here."""

    text: str  # as the user gave it
    kind: str  # file, folder (imported), run, repository (a folder as on the hub) or remote
    path: Path | None = None  # None: it is remote
    address: str = ""  # https://... or hf://..., if remote
    model: str | None = None  # our name of the network, if the text contains it
    published: str | None = None  # the RobustBench id
    sha256: str | None = None  # of the file, or its first digits
    file: Path | None = None  # of the arrays; None: not here yet, or a run's
    settings: Path | None = None  # the `config.json` next to it


def parse(text: str) -> WeightSource:
    """Parse the name of a source; an existing path takes precedence over other meanings."""
    path = buckets.opened("weights", text) if text.startswith("gs://") else Path(text)
    if "://" in text and path == Path(text):
        if text.startswith("hf://"):
            remote_weights.parse_hub(text)  # refuses
        return WeightSource(text, "remote", address=text)
    if path.is_dir():
        return folder(text, path)
    if path.is_file():
        return WeightSource(text, "file", path, file=path)
    if own_run := shipped.weights(text):
        return folder(text, own_run)
    if text in PUBLISHED:
        net = PUBLISHED[text]
        source = WeightSource(text, "remote", address=net.address, model=net.model)
        return source._replace(published=text, sha256=net.sha256 or None)
    timm = _TIMM.fullmatch(text) if path.suffix not in files.SUFFIXES else None
    if timm and timm[1] in timm_names():
        timm_name = timm_names()[timm[1]]
        return WeightSource(text, "remote", address=f"hf://timm/{text}", model=timm_name)
    raise ValueError(f"{text}: {_unknown(text, timm)}")


def at(path: Path) -> WeightSource:
    """Make a source from a local path; if it is missing, reading says what to give."""
    return parse(str(path)) if path.exists() else WeightSource(str(path), "file", path, file=path)


def is_missing_file(text: str) -> bool:
    """Return whether a text names a weight file that does not exist."""
    path = Path(text)
    return "://" not in text and path.suffix in files.SUFFIXES and not path.exists()


def folder(text: str, path: Path) -> WeightSource:
    """Parse a folder; the files in it decide its kind."""
    config = path / SETTINGS
    if (file := path / weights_folder.WEIGHTS).is_file():
        return WeightSource(text, "folder", path, file=file, settings=config)
    for name in remote_weights.WEIGHTS:
        if (path / name).is_file():
            settings = config if config.is_file() else None
            return WeightSource(text, "repository", path, file=path / name, settings=settings)
    if config.is_file():
        weights_folder.about(path)  # rejects a folder whose weights are missing
        return WeightSource(text, "run", path)
    inside = sorted(p.name for p in path.iterdir() if p.suffix in files.SUFFIXES)
    raise ValueError(
        f"{path} holds no weights; give a file, a folder that jaxrobust import "
        "wrote, or the workdir of a run"
        + (f" (the file may be {path / inside[0]})" if inside else "")
    )


@functools.cache
def timm_names() -> dict[str, str]:
    """Map timm's names to ours, for networks that timm builds identically."""
    names = {}
    for name in models.available():
        reference, row = models.member(name).reference, models.variant(name)
        changed = reference.options or reference.strides or getattr(row, "stem_widths", ())
        if not (changed or reference.base.endswith(".py")):
            names[reference.base] = name
    return names


def _unknown(text: str, timm: re.Match | None) -> str:
    if text in models.available():
        return (
            "this is an architecture, not weights; "
            f"`jaxrobust models {text}` lists its published weights"
        )
    if keys := [key for key in PUBLISHED if own_id(key) == text]:
        return f"not found; RobustBench's networks with that id are {' and '.join(keys)}"
    if key := next((key for key in others() if text in (key, own_id(key))), None):
        return _refusal(key)
    if (published_id := own_id(text)) in PUBLISHED and PUBLISHED[published_id].file == f"{text}.pt":
        return f"not found; for RobustBench's network in that table, give just {published_id}"
    here = (str(path) for path in Path(text).parent.glob("[!_.]*"))
    names = {*shipped.RUNS, *PUBLISHED, *here}  # each once: a folder may have a network's name
    if near := difflib.get_close_matches(text, sorted(names), n=3, cutoff=0.7):
        return f"not found; did you mean {', '.join(near)}?"
    near = difflib.get_close_matches(timm[1], timm_names(), n=2, cutoff=0.7) if timm else []
    if timm and near:
        ids = ", ".join(f"{name}.{timm[2]}" for name in near)
        return f"not found, and timm's {timm[1]} is not supported here; did you mean {ids}?"
    suffixes = ", ".join(files.SUFFIXES)
    return f"no such file; give one of {suffixes}, or {KINDS.partition(', ')[2]}"


def _refusal(key: str) -> str:
    """Say why a RobustBench network is not loaded, and whether its module can be attacked."""
    reason, through_torch = others()[key]
    dataset, threat, name = key.split("/")
    if not through_torch:
        return f"RobustBench's network {reason}, which cannot be translated; choose another id"
    return (
        f"RobustBench's network {reason}, unlike those of `jaxrobust models`; write FILE.py "
        f"with `def build(): return robustbench.utils.load_model({name!r}, dataset={dataset!r}, "
        f"threat_model={threat!r})`, and give torch:FILE.py:build"
    )


def fetch(source: WeightSource, *, sha256: str | None = None, tell: Tell = print) -> WeightSource:
    """Fetch a source's file and the settings next to it; runs are local already."""
    wanted = sha256 or source.sha256
    if source.kind == "remote":
        name = f"{own_id(source.published)}.pt" if source.published else None
        file, settings = remote_weights.fetch(source.address, sha256=wanted, name=name, tell=tell)
        return source._replace(file=file, settings=settings)
    if source.file is not None and wanted:
        remote_weights.check_sha256(source.file, wanted)
    elif wanted:
        raise ValueError(
            f"{source.path} is a run, which has more than one file; leave --sha256 out"
        )
    return source


def settings_of(path: Path | None) -> dict:
    """Read a `config.json` next to weights, including timm's `pretrained_cfg`."""
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text())
        return settings | (settings.get("pretrained_cfg") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error
