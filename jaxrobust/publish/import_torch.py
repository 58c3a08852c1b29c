"""Weights from files, URLs, the hub, timm and RobustBench, as a folder of this package."""

from pathlib import Path
from typing import Any

from jaxrobust.models.published import PUBLISHED
from jaxrobust.publish import certificate, network_account
from jaxrobust.runtime.text import patience
from jaxrobust.weights import imports
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import compose
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store import certificates, files, weights_folder
from jaxrobust.weights.store.artifact import Network


def import_weights(
    source: str,
    out: Path,
    request: Request = Request(),  # noqa: B008  # it cannot be changed
    *,
    sha256: str | None = None,
    certified: bool = True,
) -> dict[str, Any]:
    """Import weights of any source into a new folder `out`, and say what was done."""
    weights_folder.check_free(out)
    _check_numbers(request)
    imports.check_model(request.model)
    with patience.of(f"reading {source}"):
        network = imports.imported(sources.fetch(sources.parse(source), sha256=sha256), request)
    config, facts, compared = imports.described(network), network.facts, None
    if facts.workdir is not None:
        network_account.records_of_run(facts.workdir, network.weights_sha256)  # refuses
    if facts.file:
        print(f"{facts.file}: sha256 {config['source_sha256']}")
    if facts.file and certified:
        key = facts.published
        layout = key if key and network.options == PUBLISHED[key].options else "timm"
        with patience.of("compiling the network and its reference to compare them"):
            compared = certificate.of_import(network, facts.file, layout, request.which)
    config = weights_folder.write(out, network.params, network.stats, config)
    if compared:
        certificate.write(out / weights_folder.WEIGHTS, compared)
    mean, std = (network.stats[f"normalize.{k}"].tolist() for k in ("mean", "std"))
    done = config | {
        "out": str(out),
        "matched": len(network.matched),
        "fresh": len(network.fresh),
        "left_out": network.dropped,
        "resized": network.resized,
        "normalize": {"mean": mean, "std": std, "origin": network.normalized_by},
        "certificate": compared and certificates.summary(compared),
    }
    _print(out, network, done)
    return done


def _print(out: Path, network: Network, done: dict[str, Any]) -> None:
    description = f"{done['architecture']}, {done['num_classes']} classes, {done['image_size']} px"
    print(f"{out}: {description}, sha256 {done['sha256']}")
    for line in compose.summary(network):
        print(f"  {line}")
    if done["which"] and network.facts.place:
        kind = files.WHICH[done["which"]]
        print(f"  {kind} weights, stored under {network.facts.place!r}")
    moments = (done["normalize"][key] for key in ("mean", "std"))
    shown = (" ".join(f"{value:.4g}" for value in values) for values in moments)
    print("  normalization: mean {}, std {} ({})".format(*shown, done["normalize"]["origin"]))
    if done["certificate"]:
        print(f"  certificate: {done['certificate']}")


def _check_numbers(request: Request) -> None:
    for flag in ("num_classes", "image_size"):
        value = getattr(request, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag}={value} must be at least 1")
    if not 0 <= request.seed < 2**32:
        raise ValueError(f"--seed={request.seed} must be from 0 to 2^32 - 1")
