"""What stands for weights: a file, a folder, a run, an address, or a name.

`--weights`, `init.weights`, the SOURCE of an import and `jaxrobust.load` all read it here.
"""

import difflib
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED
from jaxrobust.weights.fetch import KINDS, download
from jaxrobust.weights.fetch.download import SETTINGS, Fetched, Tell
from jaxrobust.weights.store import files
from jaxrobust.weights.store import folder as weights_folder

_TIMM = re.compile(r"([a-z][a-z0-9_]*)\.([a-z0-9_]+)")


class Source(NamedTuple):
    """Where weights are."""

    text: str  # as it was given
    kind: str  # file, folder (an imported one), run, repository (a folder as the hub's) or remote
    path: Path | None = None  # None: it is remote
    address: str = ""  # https://... or hf://..., where it is remote
    model: str | None = None  # our name of the network, where the words say it
    published: str | None = None  # the RobustBench id
    sha256: str | None = None  # of the file, or how it begins


def parse(text: str) -> Source:
    """Return what stands for weights; a path that is there is what it is, whatever its name.

    Raises:
      ValueError: nothing is there and nothing has this name; says what to give.
    """
    if "://" in text:
        if text.startswith("hf://"):
            download.parse_hub(text)  # refuses
        return Source(text, "remote", address=text)
    path = Path(text)
    if path.is_dir():
        return Source(text, _kind(path), path)
    if path.is_file():
        return Source(text, "file", path)
    if text in PUBLISHED:
        net = PUBLISHED[text]
        named = {"model": net.model, "published": text, "sha256": net.sha256 or None}
        return Source(text, "remote", address=net.address, **named)
    timm = _TIMM.fullmatch(text) if path.suffix not in files.SUFFIXES else None
    if timm and timm[1] in timm_names():
        return Source(text, "remote", address=f"hf://timm/{text}", model=timm_names()[timm[1]])
    raise ValueError(f"{text}: {_unknown(text, timm)}")


def is_missing_file(text: str) -> bool:
    """Tell whether a text is the name of a file of weights that is not there."""
    path = Path(text)
    return "://" not in text and path.suffix in files.SUFFIXES and not path.exists()


def _kind(folder: Path) -> str:
    """Return what a folder is.

    Raises:
      ValueError: nothing that holds weights.
    """
    if (folder / weights_folder.WEIGHTS).is_file():
        return "folder"
    if any((folder / name).is_file() for name in download.WEIGHTS):
        return "repository"
    if (folder / SETTINGS).is_file():
        return "folder" if weights_folder.about(folder) else "run"
    inside = sorted(p.name for p in folder.iterdir() if p.suffix in files.SUFFIXES)
    raise ValueError(
        f"{folder} holds no weights; give a file, a folder that jaxrobust import "
        "wrote, or the workdir of a run"
        + (f" (the file may be {folder / inside[0]})" if inside else "")
    )


@functools.cache
def timm_names() -> dict[str, str]:
    """Return timm's name -> ours of the networks that timm builds as they are."""
    found = {}
    for name in models.available():
        known, row = models.member(name).reference, models.variant(name)
        changed = known.options or known.strides or getattr(row, "stem_widths", ())
        if not (changed or known.base.endswith(".py")):
            found[known.base] = name
    return found


def _unknown(text: str, timm: re.Match | None) -> str:
    """Say what a text is that names no weights."""
    if text in models.available():
        return (
            "that is an architecture, which has no weights of its own; "
            f"`jaxrobust models {text}` lists the published ones"
        )
    if near := difflib.get_close_matches(text, PUBLISHED, n=3, cutoff=0.7):
        return f"nothing is there, and no id of RobustBench; did you mean {', '.join(near)}?"
    near = difflib.get_close_matches(timm[1], timm_names(), n=2, cutoff=0.7) if timm else []
    if timm and near:
        ids = ", ".join(f"{name}.{timm[2]}" for name in near)
        return f"nothing is there, and timm's {timm[1]} is no network here; did you mean {ids}?"
    known = ", ".join(files.SUFFIXES)
    return f"no such file; give one of {known}, or {KINDS.partition(', ')[2]}"


def fetch(source: Source, *, sha256: str | None = None, tell: Tell = print) -> Fetched:
    """Return the file of weights of a source and the settings beside it, downloaded if need be.

    Args:
      source: not a run.
      sha256: of the file, if known; default: what is published.
    Raises:
      ValueError: see `download.fetch`; a repository that holds no weights.
      download.Unreachable: no answer.
    """
    wanted = sha256 or source.sha256
    if source.path is None:
        name = f"{source.published}.pt" if source.published else None
        return download.fetch(source.address, sha256=wanted, name=name, tell=tell)
    found = Fetched(source.path)
    if source.kind == "repository":
        file = next(p for name in download.WEIGHTS if (p := source.path / name).is_file())
        settings = source.path / SETTINGS
        found = Fetched(file, settings if settings.is_file() else None)
    elif source.kind == "folder":
        found = Fetched(source.path / weights_folder.WEIGHTS, source.path / SETTINGS)
    download.check_sha256(found.path, wanted)
    return found


def settings_of(path: Path | None) -> dict:
    """Return what a `config.json` beside weights says, timm's `pretrained_cfg` included.

    Raises:
      ValueError: it is damaged.
    """
    if path is None:
        return {}
    try:
        whole = json.loads(path.read_text())
        return whole | (whole.get("pretrained_cfg") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error
