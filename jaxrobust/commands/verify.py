"""Check a bundle with your own network: `jaxrobust verify BUNDLE --weights W`.

`jaxrobust evaluate --bundle BUNDLE` wrote it. W is the same as for `jaxrobust evaluate --weights`:
a run, an imported folder, a file or an id. The images come from the data set of the record. One
forward pass per image, and one more per adversarial image, confirm the clean accuracy, and that the
robust accuracy is at most the recorded one; unconfirmed images are listed. Then APGD-CE and APGD-T,
or Sparse-PGD in l0, attack a sample of the surviving images, drawn with your seed; the number that
they fool bounds how many of all surviving images they would fool. A network other than the recorded
one is checked too, but does not confirm the claim. If the record refers to images or a list of
images by a path, the author of the bundle may have prepared them; then name your own with --dataset
or --split.

Exit codes: 0 everything is confirmed; 1 something is not, or images fell to attacks that they
withstand according to the record; 2 a mistake, with one sentence on stderr; 3 another reason, which
is printed, such as a full disk; 130 interrupted.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

_RECORD = "from the record"


@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """A bundle, the network to check it with, and the location of its images."""

    bundle: Path = flag("Folder of the bundle.", word=True, required=True, metavar="BUNDLE")
    weights: str | None = shared("weights")
    function: str | None = shared("function")
    dataset: str | None = shared("dataset", default=_RECORD)
    split: str | None = shared("split", default=_RECORD)
    classes: str | None = shared("classes", default="all")
    data_dir: str | None = shared("data_dir", default="$TFDS_DATA_DIR")
    frost: str | None = flag("Folder of the frost photographs, for a bundle of common corruptions.")
    batch: int | None = flag("Batch size.", least=1)
    sample: int = flag("Number of surviving images to attack.", 60, least=1)
    seed: int | None = flag(
        "Seed of the sample and the attacks; default: random, and printed.", least=0
    )
    write_images: Path | None = flag(
        "File (.npy) for the prepared images, uint8[N,H,W,C], which the bundle's verify.py reads; "
        "the labels go to a .labels.npy file next to it. For common corruptions, a folder in the "
        "layout of CIFAR-10-C. Needs no weights."
    )
    write_adversarial: Path | None = flag(
        "File (.pt) for the adversarial images, a PyTorch tensor f32[N,C,H,W] in [0, 1]. Needs no "
        "weights. With weights, if everything is confirmed and RobustBench has a leaderboard for "
        'it, the text of a "New external evaluation" issue goes to an .issue.md file next to it.'
    )
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> int:
    """Check a bundle and print the outcome; return the exit code."""
    flags = fields.read(
        VerifyFlags, __doc__, argv, usual="weights function dataset data_dir sample json"
    )
    result = answer(_verified, flags, "run the same command to start again")
    return 0 if result.get("whole", True) else 1


def _verified(flags: VerifyFlags) -> dict[str, Any]:
    values = asdict(flags)
    del values["json"], values["write_images"], values["write_adversarial"]
    with patience.of(patience.LOADING):
        from jaxrobust.evaluation.questions import verification

    settings = verification.VerificationSettings(**values)
    result: dict[str, Any] = {}
    if flags.write_images:
        result |= verification.write_images(settings, flags.write_images)
    if flags.weights or flags.function or not (flags.write_images or flags.write_adversarial):
        result |= verification.verify(settings)
    if flags.write_adversarial:
        confirmed = result.get("whole", False)
        result |= _write_adversarial(settings, flags.write_adversarial, confirmed=confirmed)
    return result


def _write_adversarial(settings: Any, file: Path, *, confirmed: bool) -> dict[str, Any]:
    """Write a bundle's adversarial images and, if it is confirmed, RobustBench's issue."""
    from jaxrobust.evaluation.questions import verification
    from jaxrobust.publish import layouts, robustbench_entry
    from jaxrobust.runtime.files import whole
    from jaxrobust.weights.store import hashes

    if file.suffix != ".pt":
        raise ValueError(f"--write_adversarial {file}: name a file that ends in .pt")
    record, points = verification.adversarial_images(settings)
    with whole.writing(file, points.nbytes) as part:
        layouts.save_pt(part, points.transpose(0, 3, 1, 2))
    print(f"{len(points)} images in {file}")
    sha256 = hashes.file_sha256(file)
    written = {"adversarial_images": len(points), "sha256": sha256}
    if not confirmed:
        print("No issue is written: no network has confirmed the bundle; pass its --weights")
        return written
    try:
        issue = robustbench_entry.external_evaluation(record, file.name, sha256)
    except ValueError as error:
        print(f"No issue is written: {error}")
        return written
    text = file.with_suffix(".issue.md")
    text.write_text(issue)
    print(
        f"{text} is the issue for RobustBench; {issue.count(robustbench_entry.BY_HAND)} places "
        "must be filled in by hand"
    )
    return written | {"issue": str(text)}
