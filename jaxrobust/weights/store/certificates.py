"""Certificates: JSON next to weights that says how closely a conversion agrees, for loaders.

`jaxrobust certificate` measures and writes them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust import models
from jaxrobust.runtime import pytorch
from jaxrobust.weights.store import weights_folder
from jaxrobust.weights.store.hashes import file_sha256
from jaxrobust.weights.store.weights_folder import WEIGHTS


def beside(weights: Path) -> Path:
    """Return the file for the certificate of a weight file."""
    return weights.with_name(weights.stem + ".certificate.json")


def line(weights: Path) -> str | None:
    """Summarize the certificate of a file or imported folder in one line; None: there is none."""
    weights = weights / WEIGHTS if weights.is_dir() else weights
    if (certificate := _read(weights)) is None:
        return None
    return f"{beside(weights).name}: {certificate.line}"


def check(weights: Path) -> None:
    """Reject a file that differs from what a certificate or `config.json` next to it describes."""
    _read(weights)
    if weights.name == WEIGHTS:
        weights_folder.about(weights.parent)


def stated(weights: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the architecture and options of a file's or folder's weights; None: unknown.

    They are in a folder's config.json or the file's metadata; for PyTorch files, the certificate.
    """
    if weights.is_dir():
        about = weights_folder.about(weights) or {}
        if about.get("options") is not None:
            return about["architecture"], about["options"]
        weights = weights / WEIGHTS
    if (in_file := weights_folder.stated(weights)) is not None:
        return in_file
    certificate = _read(weights)
    return certificate.network if certificate else None


def options(
    name: str,
    overrides: dict[str, Any] | None,
    stored: tuple[str, dict[str, Any]] | None,
    where: Path | str,
) -> dict[str, Any]:
    """Return the options of stored weights of `name`: those stored with them, else `overrides`."""
    fields = models.computed(name if pytorch.is_name(name) else models.known(name), overrides or {})
    if overrides:  # fields that do not change the network cannot contradict
        overrides = {key: value for key, value in overrides.items() if key in fields} or None
    model, stored_options = stored or (name, overrides or {})
    chosen_options = (stored_options if model == name else {}) if overrides is None else overrides
    if models.computed(name, chosen_options) != models.computed(model, stored_options):
        raise ValueError(
            f"{where} describes its network as {models.words(model, stored_options)}, not "
            f"{models.words(name, chosen_options)}; leave out the flag that contradicts it"
        )
    return models.essential(name, chosen_options)


class _Certificate(NamedTuple):
    line: str
    network: tuple[str, dict[str, Any]]


def _read(weights: Path) -> _Certificate | None:
    path = beside(weights)
    if not (weights.is_file() and path.is_file()):
        return None
    try:
        certificate = json.loads(path.read_text())
        files = [file["sha256"] for file in certificate["files"].values()]
        whose = str(certificate["model"]), dict(certificate["options"])
        parsed = _Certificate(summary(certificate), whose)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it") from error
    if file_sha256(weights) not in files:
        raise ValueError(
            f"{weights} is not the file that {path.name} describes (the sha256 differs): get it "
            "again, or remove the certificate if you replaced the weights"
        )
    return parsed


def summary(certificate: dict[str, Any]) -> str:
    """Summarize a certificate in one line."""
    reference = certificate["reference"]
    if reference is None:
        return f"not compared with a reference: {certificate['missing']}"
    logits, gradients = certificate["logits"], certificate["gradients"]
    shown = (
        f"logits differ by {logits['float32']['relative']:.1e} (float32) and "
        f"{logits['float64']['relative']:.1e} (float64), top-1 agrees for "
        f"{logits['top1_agreement']:.0%}, cosine of input gradients "
        f"{gradients['float64']['cosine']:.6f}"
    )
    whose = reference["network"] + ("" if reference["independent"] else " (not independent)")
    verdict = "agrees with" if certificate["agrees"] else "DIFFERS FROM"
    faults = "".join(f"; {fault}" for fault in certificate["faults"])
    return f"{verdict} {whose}: {shown}{faults}"
