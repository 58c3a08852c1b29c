"""Import weights: `jaxrobust import SOURCE [--model NAME] --out DIR`.

SOURCE is a file (.safetensors, .pth, .pt, ...), a URL, hf://ORG/REPO[@REVISION][/FILE], a
RobustBench id (Salman2020Do_R18), a timm id (convnext_tiny.fb_in1k), the workdir of a run, or a
folder in the hub's format. This writes `weights.safetensors`, with jaxrobust's names, and
`config.json` to DIR; pass DIR to training as `--config.init.weights=DIR` and to evaluation as
`--weights DIR`. A certificate next to them reports how well they agree with the reference network
(jaxrobust certificate).

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason, which is printed,
such as no network; then nothing is left under DIR.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import READS, shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer, mapping
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience
from jaxrobust.weights.fetch.shipped import KINDS


@dataclass(frozen=True, kw_only=True)
class ImportFlags:
    """The weights to import, their network, and the folder to write."""

    source: str = flag(f"Source of the weights: {KINDS}.", word=True, required=True)
    model: str | None = flag(
        "Architecture: a name from models.available(), or a RobustBench id; default: from the "
        "source.",
        reads=READS["model"],
    )
    out: Path = flag("Folder to write.", required=True)
    image_size: int | None = flag(
        "Image size in pixels; position embeddings are resized to it; default: from the hub, or "
        "224."
    )
    num_classes: int | None = flag(
        "Number of classes; if the file has a different number, the head is newly initialized."
    )
    options: dict[str, Any] | None = flag("Other options of the network, as a dict.", reads=mapping)
    init_stem: bool = flag("Keep the body and initialize a new stem.", False)
    which: str | None = flag(
        "Averaged or raw weights, if the file distinguishes them; default: averaged if available.",
        choices=["ema", "raw"],
    )
    normalize: str = flag(
        "Normalization for weights without a mean and std; default: auto, as specified by the hub "
        "or RobustBench.",
        "auto",
        choices=["auto", "none", "imagenet"],
    )
    sha256: str | None = flag("Expected SHA-256 of SOURCE.")
    cast: bool = flag("Round arrays of other types to float32.", False)
    seed: int = flag("Seed of random draws; default: 0.", 0)
    nocertificate: bool = shared("nocertificate", False)
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and import the weights."""
    flags = fields.read(
        ImportFlags, __doc__, argv, usual="model out image_size num_classes which normalize"
    )
    answer(_imported, flags, "run the same command to continue an unfinished download")


def _imported(flags: ImportFlags) -> dict[str, Any]:
    with patience.of(patience.LOADING):
        from jaxrobust.publish import import_torch
        from jaxrobust.weights.naming.networks import Request

    values = asdict(flags)
    source, out, sha256 = (values.pop(name) for name in ("source", "out", "sha256"))
    certified = not values.pop("nocertificate")
    del values["json"]
    request = Request(**values)
    return import_torch.import_weights(source, out, request, sha256=sha256, certified=certified)
