"""Compare networks: `jaxrobust certificate --model M --weights W --against T`.

W is a file with jaxrobust's names or an imported folder; T is the PyTorch file it was made from
or exported to (.pt, .pth, .safetensors, or the .py of an exported module). If M is a RobustBench
id, RobustBench's own loader reads T. `<stem>.certificate.json` is written next to W.

Exit codes: 0 they agree, or no reference network is installed; 1 they differ; 2 a mistake;
3 another reason, which is printed, such as a full disk.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import READS, shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import stop
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class CertificateFlags:
    """The weights, the reference weights, and the images on which they are compared."""

    model: str | None = flag(
        "Architecture: a name from models.available(), or a RobustBench id; not needed for an "
        "imported folder.",
        reads=READS["model"],
    )
    weights: Path = flag(
        "Our weights: a file or an imported folder; the certificate is written next to it.",
        required=True,
    )
    against: Path = flag("Reference weights: a .pt, .pth, .safetensors or .py file.", required=True)
    image_size: int | None = flag("Image size in pixels; default: from the folder, or 224.")
    options: dict[str, Any] | None = shared("options")
    images: Path | None = flag("Folder of photographs; default: smooth random images.")
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and compare the networks."""
    values = asdict(fields.read(CertificateFlags, __doc__, argv))
    as_json, weights, against = (values.pop(name) for name in ("json", "weights", "against"))
    with patience.of(patience.LOADING):
        from jaxrobust.publish import certificate
        from jaxrobust.runtime.devices import compilation

    compilation.use_persistent_cache()
    try:
        result = certificate.compare(weights, against, **values)
    except (ValueError, RuntimeError) as error:  # PyTorch's loader raises RuntimeError
        stop(error, 2)
    except OSError as error:
        stop(error, 3)
    if as_json:
        print(json.dumps(result))
    if result["agrees"] is False:
        sys.exit(1)
