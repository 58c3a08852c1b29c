"""What is known of a network that is handed on: what it expects, and what it reached by which
record.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.data import imagenet, resolve
from jaxrobust.evaluation.records import records
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime.files import jsonl
from jaxrobust.weights import load
from jaxrobust.weights.load import Network
from jaxrobust.weights.trained import runs

UNKNOWN = "not known"
_RADII = (1, 2, 3, 4, 6, 8, 12, 16)  # of 255, as papers write them
_NAMED = 20  # classes; more stand in a file


class Account(NamedTuple):
    """What is known beside the weights; None or empty: nothing."""

    which: str  # a description of the weights
    trained: str = ""  # a description of the training
    norm: str | None = None  # of the ball that it was trained or published for
    epsilon: float | None = None  # in units of [0, 1] pixels
    preprocessing: str | None = None
    dataset: str | None = None  # of the training
    classes: tuple[str, ...] = ()  # in the order of labels
    imagenet: bool = False  # whether they are ImageNet's 1,000
    records: tuple[dict[str, Any], ...] = ()  # of exactly these weights
    published: str | None = None  # the RobustBench id
    source: str | None = None  # where imported weights are from
    source_sha256: str | None = None
    license: str | None = None  # SPDX


def of_run(workdir: Path, which: str, sha256: str, *, image_size: int | None = None) -> Account:
    """Return what a run says of weights of it, whose sha256 is given.

    A preprocessing to the size of its images is nothing for another `image_size`.
    """
    phase = which.partition(",")[0]
    config = runs.run_config(workdir, phase)
    attack, objective = config.attack, config[phase].objective
    tested = config.data.get("preprocessing")
    if tested and image_size not in (None, config.model.image_size):
        tested = None if resolve(tested, image_size or 0) == tested else tested
    names = runs.classes_file(workdir, phase)
    classes = tuple(names.read_text().splitlines()) if names.exists() else ()
    ball = {} if objective == "clean" else {"norm": attack.norm, "epsilon": attack.epsilon}
    how = f"{objective} training on {config.data.name}, split {config.data.train_split}"
    if ball:
        how += f", {attack.name}, {attack.steps} steps, {radius(attack.norm, attack.epsilon)}"
    return Account(
        which,
        trained=how,
        **ball,
        preprocessing=tested,
        dataset=config.data.name,
        classes=classes,
        imagenet=classes == imagenet.synsets(),
        records=tuple(runs.records_of(workdir, sha256)),
    )


def of_weights(path: Path, network: Network, which: str) -> Account:
    """Return what stands in or beside a file or imported folder."""
    about = load.about(path, network)
    key = about.get("published_id")
    board = PUBLISHED[key].board if key in PUBLISHED else None
    return Account(
        which,
        norm=about["norm"],
        epsilon=about["epsilon"],
        preprocessing=about["preprocessing"],
        dataset=board.data if board and board.dataset != "imagenet" else None,
        imagenet=board is not None and board.dataset == "imagenet",
        records=tuple(about["accuracies"] or ()),
        published=key,
        source=about.get("source"),
        source_sha256=about.get("source_sha256"),
    )


def with_records(known: Account, file: Path | None, sha256: str) -> Account:
    """Return an account with the records of these weights in a file of records added."""
    rows = [row for row in jsonl.read(file) if row.get("weights_sha256") == sha256] if file else []
    new = tuple(row for row in rows if row not in known.records)
    first = next((row for row in (*known.records, *new) if row.get("preprocessing")), {})
    on_imagenet = any(str(row.get("dataset")).startswith("imagenet2012") for row in new)
    return known._replace(
        records=known.records + new,
        preprocessing=known.preprocessing or first.get("preprocessing"),
        imagenet=known.imagenet or on_imagenet,
    )


def radius(norm: str, epsilon: float) -> str:
    """Return a ball as papers write it: "linf 8/255", "l2 0.5"."""
    for count in _RADII:
        if norm == "linf" and abs(epsilon * 255 - count) < 1e-4:
            return f"{norm} {count}/255"
    return f"{norm} {epsilon:.4g}"


def classes(network: Network, known: Account) -> str:
    """Say what the logits stand for."""
    count = f"{network.num_classes:,}"
    if known.imagenet:
        return f"ImageNet's {count}, in the order of their WordNet ids (n01440764 is 0)"
    if not known.classes:
        asked = f"their order is {UNKNOWN}: ask who trained it"
        return (
            f"{count}; {asked}"
            if known.dataset is None
            else f"{count}, the labels of {known.dataset}"
        )
    if len(known.classes) <= _NAMED:
        return f"{count}, in this order: {', '.join(known.classes)}"
    ends = f"{known.classes[0]} is 0, {known.classes[-1]} is {len(known.classes) - 1}"
    return f"{count}, in the order of the data set ({ends})"


def channels(network: Network) -> str:
    """Describe the channels."""
    return {1: "1 channel, grey", 3: "3 channels, RGB"}.get(
        network.in_channels, f"{network.in_channels} channels"
    )


def normalisation(network: Network) -> str:
    """Describe mean and std; empty: the network takes images as they are."""
    if not network.normalised:
        return ""
    values = (network.stats[f"normalize.{key}"].tolist() for key in ("mean", "std"))
    shown = (", ".join(f"{value:.4g}" for value in row) for row in values)
    return "mean ({}) and std ({})".format(*shown)


def prepared(network: Network, known: Account) -> str:
    """Say how an image file becomes an input."""
    size = network.image_size
    if known.preprocessing in (None, "none"):
        said = "" if known.preprocessing else f"; a preprocessing is {UNKNOWN}"
        return f"images of {size} x {size} px as they are{said}"
    return (
        f"`{known.preprocessing}` to {size} x {size} px (an id of "
        "`jaxrobust.data.evaluation_transform`, RobustBench's names among them)"
    )


def threat(known: Account) -> str:
    """Describe the threat model."""
    if known.norm is None or known.epsilon is None:
        return UNKNOWN if not known.trained else "none: it was trained on clean images"
    return f"{radius(known.norm, known.epsilon)}, in units of [0, 1] pixels"


def images(record: dict[str, Any]) -> str:
    """Describe the images of a record."""
    first, _, last = str(record.get("image_ids", "")).partition("..")
    count = f"{int(last) - int(first) + 1:,} of " if first.isdigit() and last.isdigit() else ""
    return f"{count}{record.get('dataset')}, split {record.get('split')}"


def row(record: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Return (images, attack, clean, robust, where it stands) of a record."""
    robust = record.get("robust")
    attack = _attack(record) if record["attacks"] and robust is not None else "none"
    by = record.get("published_by")
    stands = f"published by {by}" if by else _stands(record)
    shown = "-" if robust is None else f"{robust:.2%}"
    clean = "-" if record["clean"] is None else f"{record['clean']:.2%}"
    return images(record), attack, clean, shown, stands


def _attack(record: dict[str, Any]) -> str:
    if record.get("method") == "union":
        return records.how(record)
    ball = record["attacks"][0]
    name = records.how(record).partition(",")[0]
    return f"{name}, {radius(ball['norm'], ball['epsilon'])}"


def _stands(record: dict[str, Any]) -> str:
    number = f"record {record['evaluation']} of " if "evaluation" in record else "record of "
    flags = f", flags: {', '.join(record['flags'])}" if record.get("flags") else ""
    return f"{number}{record['time']}, commit {record['commit'][:12]}, {record['device']}{flags}"
