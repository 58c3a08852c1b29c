"""Weights of files, URLs, the hub, timm and RobustBench as a folder of this package.

`jaxrobust import` calls `import_weights`; the certificate beside the weights says how well they
agree with the reference network.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the imports below, which take seconds
    runpy.run_module(
        "jaxrobust.commands.conversion.import_weights", run_name="__main__", alter_sys=True
    )
    sys.exit()

from jaxrobust.convert import certificate
from jaxrobust.convert.references import Network
from jaxrobust.runtime.text import patience
from jaxrobust.weights import imports
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import compose
from jaxrobust.weights.store import certificates, files
from jaxrobust.weights.store import folder as weights_folder


def import_weights(
    source: str,
    out: Path,
    settings: imports.Asked = imports.Asked(),  # noqa: B008  # it cannot be changed
    *,
    sha256: str | None = None,
    certified: bool = True,
) -> dict[str, Any]:
    """Import weights into a new folder, and say what was done.

    Args:
      source: a file, a URL, hf://ORG/REPO, a RobustBench or timm id, a run, or a folder of the hub.
      out: the folder that is written.
      settings: of which network, at which size, and what is drawn anew.
      sha256: what the file must have.
      certified: whether the weights are compared with their reference network.
    Raises:
      ValueError: what is named is not there, or does not fit; one sentence.
      OSError: the network or the disk.
    """
    weights_folder.check_free(out)
    _check_numbers(settings)
    imports.check_model(settings.model)
    with patience.of(f"reading {source}"):
        found = imports.imported(sources.parse(source), settings, sha256=sha256)
    start, config = found.start, found.config
    if found.file:
        print(f"{found.file}: sha256 {config['source_sha256']}")
    compared = None
    if found.file and certified:
        sizes = (config["num_classes"], config["image_size"])
        name, options = config["architecture"], config["options"]
        network = Network(name, start.params, start.stats, *sizes, options)
        layout = found.published if found.published and not options else "timm"
        with patience.of("comparing the weights with their reference, which compiles both"):
            compared = certificate.of_import(network, found.file, layout, settings.which)
    config = weights_folder.write(out, start.params, start.stats, config)
    if compared:
        certificate.write(out / weights_folder.WEIGHTS, compared)
    mean, std = (start.stats[f"normalize.{k}"].tolist() for k in ("mean", "std"))
    done = config | {
        "out": str(out),
        "matched": len(start.matched),
        "fresh": len(start.fresh),
        "left_out": start.dropped,
        "resized": start.resized,
        "normalize": {"mean": mean, "std": std, "origin": found.normalized_by},
        "certificate": compared and certificates.summary(compared),
    }
    _print(out, found, done)
    return done


def _print(out: Path, found: imports.Imported, done: dict[str, Any]) -> None:
    """Say what was done, for people."""
    what = f"{done['architecture']}, {done['num_classes']} classes, {done['image_size']} px"
    print(f"{out}: {what}, sha256 {done['sha256']}")
    for line in compose.summary(found.start):
        print(f"  {line}")
    if found.file and done["which"]:
        print(f"  the {files.WHICH[done['which']]} weights, which are under {found.place!r}")
    moments = (done["normalize"][key] for key in ("mean", "std"))
    shown = (" ".join(f"{value:.4g}" for value in values) for values in moments)
    print("  normalisation: mean {}, std {} ({})".format(*shown, done["normalize"]["origin"]))
    if done["certificate"]:
        print(f"  certificate: {done['certificate']}")


def _check_numbers(settings: imports.Asked) -> None:
    for flag in ("num_classes", "image_size"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag}={value} must be at least 1")
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"--seed={settings.seed} must be from 0 to 2^32 - 1")
