"""What a conversion of weights was measured to be: the JSON beside them, for the loaders.

jaxrobust certificate measures and writes it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust import models
from jaxrobust.weights.store import folder as weights_folder
from jaxrobust.weights.store.folder import WEIGHTS
from jaxrobust.weights.store.hashes import file_sha256


def beside(weights: Path) -> Path:
    """Return where the certificate of a weight file lies."""
    return weights.with_name(weights.stem + ".certificate.json")


def said(weights: Path) -> str | None:
    """Return one line about the certificate of a file or an imported folder; None: there is none.

    Raises:
      ValueError: it is damaged.
    """
    weights = weights / WEIGHTS if weights.is_dir() else weights
    if (found := _read(weights)) is None:
        return None
    path, (line, _, own) = beside(weights), found
    if not own:
        return f"{path.name} belongs to another file than {weights.name} (another sha256)"
    return f"{path.name}: {line}"


def network(weights: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the architecture and its options whose weights a file or folder holds; None: nobody
    says so.

    A folder's config.json says so, or the file's own metadata; of PyTorch's, the certificate.
    Raises:
      ValueError: what says so is damaged.
    """
    if weights.is_dir():
        about = weights_folder.about(weights) or {}
        if about.get("options") is not None:
            return about["architecture"], about["options"]
        weights = weights / WEIGHTS
    if (told := weights_folder.network(weights)) is not None:
        return told
    found = _read(weights)
    return found.network if found and found.own else None


def options(
    name: str, given: dict[str, Any] | None, said: tuple[str, dict[str, Any]] | None, path: Path
) -> dict[str, Any]:
    """Return the options of stored weights of `name`: what is `said` of the file, else what is
    given.

    Raises:
      ValueError: they are those of another network, or there is no such option.
    """
    model, theirs = said or (name, given or {})
    ours = (theirs if model == name else {}) if given is None else given
    if models.computed(name, ours) != models.computed(model, theirs):
        raise ValueError(
            f"{path} holds the weights of {models.words(model, theirs)}, as is written in or "
            f"beside it, not of {models.words(name, ours)}; leave out the flag that says otherwise"
        )
    return models.essential(name, ours)


class _Certificate(NamedTuple):
    line: str
    network: tuple[str, dict[str, Any]]
    own: bool  # of this very file


def _read(weights: Path) -> _Certificate | None:
    """Return what a file's certificate says; None: there is none. `ValueError`: damaged."""
    path = beside(weights)
    if not (weights.is_file() and path.is_file()):
        return None
    try:
        certificate = json.loads(path.read_text())
        files = [file["sha256"] for file in certificate["files"].values()]
        whose = str(certificate["model"]), dict(certificate["options"])
        return _Certificate(summary(certificate), whose, file_sha256(weights) in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it") from error


def summary(certificate: dict[str, Any]) -> str:
    """Return a certificate in one line."""
    reference = certificate["reference"]
    if reference is None:
        return f"compared with no reference: {certificate['missing']}"
    logits, gradients = certificate["logits"], certificate["gradients"]
    shown = (
        f"logits {logits['float32']['relative']:.1e} (float32) and "
        f"{logits['float64']['relative']:.1e} (float64) off, top-1 {logits['top1_agreement']:.0%}, "
        f"input gradients' cosine {gradients['float64']['cosine']:.6f}"
    )
    whose = reference["network"] + ("" if reference["independent"] else " (ours)")
    verdict = "agrees with" if certificate["agrees"] else "DIFFERS FROM"
    faults = "".join(f"; {fault}" for fault in certificate["faults"])
    return f"{verdict} {whose}: {shown}{faults}"
