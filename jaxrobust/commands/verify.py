"""Check a bundle with our network: `jaxrobust verify BUNDLE --weights W`.

`jaxrobust evaluate --bundle BUNDLE` wrote it. W is what --weights of an evaluation takes: a run, an
imported folder, a file, an id. The images come from the data set of the record. One forward pass
for each image that is said to be misclassified confirms that the robust accuracy is at most what
the record says; what is not confirmed is said by name. Another network than the record's is judged
too: what comes out is said of it, and the claim is not confirmed. Where the record names images or
a list of them by a path, which may be of whoever made the bundle, --dataset or --split has to name
your own.

Exit codes: 0 everything is confirmed; 1 something is not; 2 a mistake, with one sentence on stderr;
3 another reason that it names, such as a full disk; 130 interrupted.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

_RECORD = "that of the record"


@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """A bundle, the network that is to confirm it, and where its images are."""

    bundle: Path = flag("Folder of the bundle.", word=True, required=True, metavar="BUNDLE")
    weights: str | None = shared("weights")
    function: str | None = shared("function")
    dataset: str | None = shared("dataset", default=_RECORD)
    split: str | None = shared("split", default=_RECORD)
    classes: str | None = shared("classes", default="all")
    data_dir: str | None = shared("data_dir", default="$TFDS_DATA_DIR")
    batch: int | None = flag("Images at a time.", least=1)
    write_images: Path | None = flag(
        "File .npy for the images as they are prepared, uint8[N,H,W,C], which verify.py of the "
        "bundle takes; a file .labels.npy beside it gets their labels. Needs no weights."
    )
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> int:
    """Check a bundle and print the outcome; return the exit code."""
    flags = fields.read(VerifyFlags, __doc__, argv)
    result = answer(_verified, flags, "the same command starts again")
    return 0 if result.get("whole", True) else 1


def _verified(flags: VerifyFlags) -> dict[str, Any]:
    given = asdict(flags)
    del given["json"], given["write_images"]
    with patience.of(patience.LOADING):
        from jaxrobust.evaluation.questions import verification

    settings = verification.VerificationSettings(**given)
    if flags.write_images:
        return verification.write_images(settings, flags.write_images)
    return verification.verify(settings)
