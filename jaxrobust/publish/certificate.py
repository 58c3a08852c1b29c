"""How well a network agrees with its reference: names, logits, gradients, and attacks on both."""

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED
from jaxrobust.publish import references, side_by_side
from jaxrobust.publish.references import Network, Reference
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.files import jsonl, provenance
from jaxrobust.weights import load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import certificates, weights_folder
from jaxrobust.weights.store.hashes import file_sha256

# max|difference| / max|reference|. In float32, summing in another order may round by more for some
# weights: then the bound is twice the reference's own error against its float64.
LOGITS = {"float32": 1e-5, "float64": 1e-9}
GRADIENTS = {"float64": 1e-7}
# For a user's function: layers such as Flax's batch norm compute in float32, whatever the dtype.
ROUNDED_LOGITS, ROUNDED_GRADIENTS = {"float32": 1e-5, "float64": 1e-6}, {"float64": 1e-5}


class Differs(OSError):
    """Two networks that should be the same compute different values."""


def certify(
    network: Network,
    reference: Reference | None,
    *,
    compared: dict[str, Path],
    images: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure how well a network agrees with its reference; None: no reference is installed."""
    versions = {}
    for name in ("jaxrobust", "jax", "flax", "numpy", "torch", "timm", "robustbench"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    certificate: dict[str, Any] = {
        "model": network.name,
        "num_classes": network.num_classes,
        "image_size": network.image_size,
        "options": network.options,
        "commit": provenance.commit(),
        "versions": versions,
        "weights_sha256": network.weights_sha256,
        "files": {
            whose: {"name": path.name, "sha256": file_sha256(path)}
            for whose, path in compared.items()
        },
        "reference": None,
    }
    if reference is None:
        missing = f"timm is not installed ({references.INSTALL}), or does not have {network.name}"
        return certificate | {"missing": missing, "agrees": None, "faults": []}
    shown = "given" if images is not None else "smooth, seed 0"
    if images is None:
        images = side_by_side.smooth_images(network.image_size, network.in_channels)
    sides = side_by_side.jax_side(network), side_by_side.torch_side(reference.net)
    measured = {"names": _names(network, reference)} | side_by_side.measured(*sides, images)
    faults = _faults(measured, is_function=functions.is_name(network.name))
    origin = {"network": reference.origin, "independent": reference.independent}
    origin |= models.family(network.name).compared
    return certificate | {
        "reference": origin | {"weights": reference.weights},
        "images": {"count": len(images), "what": shown},
        **measured,
        "agrees": not faults,
        "faults": faults,
    }


def checked(certificate: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the certificate unchanged; `Differs` if the two networks disagree."""
    if certificate["agrees"] is False:
        raise Differs(
            f"{name} and its reference differ, so nothing is written (--nocertificate "
            "writes it anyway): " + "\n".join(lines(certificate))
        )
    return certificate


def write(weights: Path, certificate: dict[str, Any]) -> Path:
    """Write a certificate next to a weight file, add the file to it, and return its path."""
    file, compared = {"name": weights.name, "sha256": file_sha256(weights)}, certificate["files"]
    if file not in compared.values():
        compared["ours"] = file
    path = certificates.beside(weights)
    jsonl.replace(path, json.dumps(certificate, indent=2) + "\n")
    return path


def of_import(
    network: Network, source: Path, layout: str, weights_kind: str | None
) -> dict[str, Any]:
    """Certify weights just read from a file of a `layout`; `Differs` if they compute otherwise."""
    try:
        reference = references.reference(network, source, layout, weights_kind)
    except RuntimeError:  # RobustBench's loader takes fewer wrappings of the names than ours
        reference = references.reference(network, source, "timm", weights_kind)
    certificate = certify(network, reference, compared={"theirs": source})
    return checked(certificate, str(source))


def _names(network: Network, reference: Reference) -> dict[str, Any]:
    expected = {k: v.numpy() for k, v in reference.net.state_dict().items()}
    arrays = network.params | network.stats
    if not pytorch.is_name(network.name) and arrays.keys() <= expected.keys():  # a printed module
        expected = {key: expected[key] for key in arrays}
    else:
        normalised = any(key.startswith("normalize.") for key in expected)
        arrays = references.named(network, wrapped=normalised and not network.normalises_itself)
    if (layout := reference.robustbench_id) and not expected.keys() <= arrays.keys():
        weights = (network.params, network.stats)
        arrays = convert.to_torch(network.name, *weights, layout=layout, **network.options)
        unread = PUBLISHED[layout].unused[1:] or ("nothing",)
        expected = {key: array for key, array in expected.items() if not key.startswith(unread)}
    matched = [key for key in expected if key in arrays]
    other = [key for key in matched if not np.array_equal(expected[key], arrays[key])]
    other = [key for key in other if not key.endswith("num_batches_tracked")]
    counts = {"reference": len(expected), "matched": len(matched)}
    return counts | {"equal": len(matched) - len(other), "differing": other[:8]}


def _faults(measured: dict[str, Any], *, is_function: bool = False) -> list[str]:
    faults, names = [], measured["names"]
    if missing := names["reference"] - names["matched"]:
        faults.append(f"{missing} names of the reference are missing here")
    if other := names["matched"] - names["equal"]:
        faults.append(f"{other} arrays differ ({', '.join(names['differing'][:3])})")
    bars_of_logits = ROUNDED_LOGITS if is_function else LOGITS
    bars_of_gradients = ROUNDED_GRADIENTS if is_function else GRADIENTS
    for quantity, bars in (("logits", bars_of_logits), ("gradients", bars_of_gradients)):
        for dtype, bar in bars.items():
            row = measured[quantity][dtype]
            bar = max(bar, 2 * row.get("reference_rounding", 0))
            if not row["relative"] < bar:  # NaN fails too
                faults.append(
                    f"{quantity} differ by {row['relative']:.1e} in {dtype}, more than {bar:.1e}"
                )
    return faults


def lines(certificate: dict[str, Any]) -> list[str]:
    """Format a certificate for people to read."""
    out = [certificates.summary(certificate)]
    if certificate["reference"] is None:
        return out
    names, gradients = certificate["names"], certificate["gradients"]
    out.append(
        f"  names: {names['matched']} of {names['reference']} matched, {names['equal']} equal; "
        f"weights {certificate['reference']['weights']}"
    )
    for dtype in ("float32", "float64"):
        logits, rows = certificate["logits"][dtype], gradients[dtype]
        rounding = rows.get("reference_rounding")
        out.append(
            f"  {dtype}: logits {logits['absolute']:.1e} absolute, {logits['relative']:.1e} "
            f"relative; input gradients {rows['relative']:.1e} relative, cosine "
            f"{rows['cosine']:.8f}, signs {rows['sign_agreement']:.4%}"
            + (f" (the reference's own rounding: {rounding:.1e})" if rounding else "")
        )
    transfer = certificate["transfer"]
    for whose in ("ours", "theirs"):
        on = [transfer[whose][f"on_{other}"] for other in ("ours", "theirs")]
        out.append(
            f"  attack on {whose}, {transfer[whose]['steps']} steps: fools {on[0]['fooled']} of "
            f"{transfer['images']} here, {on[1]['fooled']} there; loss {on[0]['loss']:.6f} here, "
            f"{on[1]['loss']:.6f} there"
        )
    return out


def compare(
    weights: Path,
    against: Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    options: dict[str, Any] | None = None,
    images: Path | None = None,
) -> dict[str, Any]:
    """Compare weights with a reference, write the certificate next to them, and return it."""
    about = (weights_folder.about(weights) or {}) if weights.is_dir() else {}
    layout = str(model if model in PUBLISHED else about.get("published_id") or "timm")
    name = PUBLISHED[layout].model if model in PUBLISHED else model
    options = options or (PUBLISHED[layout].options or None if model in PUBLISHED else None)
    if not against.is_file():
        raise ValueError(f"--against {against}: no such file")
    artifact = reading.artifact_of(sources.at(weights))
    network = load.fitted(artifact, name, image_size=image_size, options=options)
    shown = side_by_side.photographs(images, network.image_size) if images else None
    file = weights / weights_folder.WEIGHTS if weights.is_dir() else weights
    reference = references.reference(network, against, layout)
    compared = {"ours": file, "theirs": against}
    certificate = certify(network, reference, compared=compared, images=shown)
    path = write(file, certificate)
    print("\n".join([*lines(certificate), f"written to {path}"]))
    return certificate
