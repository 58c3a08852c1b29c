"""What a conversion of weights was measured to be: the JSON beside them, for the loaders.

tools/certificate.py measures and writes it.
"""

import json
from pathlib import Path
from typing import Any

from jaxrobust.distribution import WEIGHTS
from jaxrobust.download import file_sha256


def beside(weights: Path) -> Path:
    """Where the certificate of a weight file lies."""
    return weights.with_name(weights.stem + ".certificate.json")


def said(weights: Path) -> str | None:
    """One line about the certificate of a file or an imported folder; None: there is none.

    Raises:
      ValueError: it is damaged.
    """
    weights = weights / WEIGHTS if weights.is_dir() else weights
    path = beside(weights)
    if not (weights.is_file() and path.is_file()):
        return None
    try:
        certificate = json.loads(path.read_text())
        files = [file["sha256"] for file in certificate["files"].values()]
        line = summary(certificate)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it") from error
    if file_sha256(weights) not in files:
        return f"{path.name} belongs to another file than {weights.name} (another sha256)"
    return f"{path.name}: {line}"


def summary(certificate: dict[str, Any]) -> str:
    """A certificate in one line."""
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
