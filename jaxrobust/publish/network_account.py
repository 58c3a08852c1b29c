"""Accounts of networks that are published: their inputs, their training and their records."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.attacks import registry
from jaxrobust.data import imagenet, resolve
from jaxrobust.evaluation.records import checked, records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.training.update import objectives
from jaxrobust.types import Threat, threats
from jaxrobust.weights import load
from jaxrobust.weights.store.artifact import Network
from jaxrobust.weights.trained import history, runs

UNKNOWN = "unknown"
_NAMED = 20  # classes; longer lists are in a file


class Account(NamedTuple):
    """The facts next to the weights; None or empty: not known."""

    which: str  # the name of the weights
    trained: str = ""  # a sentence
    threat: Threat | None = None  # the threat that it was trained or published for
    preprocessing: str | None = None
    dataset: str | None = None  # of the training
    classes: tuple[str, ...] = ()  # in the order of labels
    imagenet: bool = False  # whether they are ImageNet's 1,000
    records: tuple[AccuracyRecord, ...] = ()  # of exactly these weights
    published: str | None = None  # the RobustBench id
    source: str | None = None  # where imported weights are from
    source_sha256: str | None = None
    license: str | None = None  # SPDX
    training: history.History | None = None


def of_run(
    workdir: Path,
    weights_name: str,
    sha256: str,
    *,
    image_size: int | None = None,
    chosen: dict[str, Any] | None = None,
) -> Account:
    """Take the facts of a run's weights; a preprocessing to its size is nothing for another."""
    phase = weights_name.partition(",")[0]
    config = runs.run_config(workdir, phase)
    attack, objective = config.attack, config[phase].objective
    tested = config.data.get("preprocessing")
    if tested and image_size not in (None, config.model.image_size):
        tested = None if resolve(tested, image_size or 0) == tested else tested
    names = runs.classes_file(workdir, phase)
    classes = tuple(names.read_text().splitlines()) if names.exists() else ()
    balls = threats(attack) if objectives.named(objective).attacks else ()
    trained = f"{objective} training on {config.data.name}, split {config.data.train_split}"
    if balls:
        steps = counted(registry.steps(attack.name, attack.steps), "step")
        trained += f", {attack.name}, {steps}, {', '.join(b.written() for b in balls)}"
    return Account(
        weights_name,
        trained=trained,
        threat=balls[0] if len(balls) == 1 else None,
        preprocessing=tested,
        dataset=config.data.name,
        classes=classes,
        imagenet=classes == imagenet.synsets(),
        records=records_of_run(workdir, sha256),
        training=history.of_run(workdir, phase, chosen=chosen),
    )


def records_of_run(workdir: Path, sha256: str) -> tuple[AccuracyRecord, ...]:
    """Read the records of some weights in a run; refuse those that contradict themselves."""
    return tuple(one for file in runs.record_files(workdir) for one in _records(file, sha256))


def _records(file: Path, sha256: str) -> list[AccuracyRecord]:
    rows = map(AccuracyRecord.from_json, jsonl.read(file))
    of_these = [record for record in rows if record.weights_sha256 == sha256]
    for record in of_these:
        checked.confirmed(record, file)
    return of_these


def of_weights(network: Network, weights_name: str) -> Account:
    """Collect the facts stored in or next to the file or imported folder of a network."""
    about = load.about(network)
    accuracies = tuple(map(AccuracyRecord.from_json, about["accuracies"] or ()))
    for record in accuracies:
        checked.check(record, f"config.json of {weights_name}")
    key = about.get("published_id")
    board = PUBLISHED[key].board if key in PUBLISHED else None
    return Account(
        weights_name,
        threat=None if None in (about["norm"], about["epsilon"]) else Threat.of(about),
        preprocessing=about["preprocessing"],
        dataset=board.data if board and board.dataset != "imagenet" else None,
        imagenet=board is not None and board.dataset == "imagenet",
        records=accuracies,
        published=key,
        source=about.get("source"),
        source_sha256=about.get("source_sha256"),
        license=(PUBLISHED[key].license or None) if key in PUBLISHED else None,
        training=about.get("training"),
    )


def with_records(account: Account, file: Path | None, sha256: str) -> Account:
    """Add the records of these weights in a file of records to an account."""
    of_these = _records(file, sha256) if file else []
    new = tuple(record for record in of_these if record not in account.records)
    expected = (record.preprocessing for record in (*account.records, *new))
    on_imagenet = any(str(record.dataset).startswith("imagenet2012") for record in new)
    return account._replace(
        records=account.records + new,
        preprocessing=account.preprocessing or next(filter(None, expected), None),
        imagenet=account.imagenet or on_imagenet,
    )


def classes(network: Network, account: Account) -> str:
    """Describe the classes of the logits."""
    count = f"{network.num_classes:,}"
    if account.imagenet:
        return f"ImageNet's {count}, in the order of their WordNet ids (n01440764 is 0)"
    if not account.classes:
        if account.dataset is None:
            return f"{count}; their order is {UNKNOWN}: ask the authors of the weights"
        return f"{count}, the labels of {account.dataset}"
    if len(account.classes) <= _NAMED:
        return f"{count}, in this order: {', '.join(account.classes)}"
    ends = f"{account.classes[0]} is 0, {account.classes[-1]} is {len(account.classes) - 1}"
    return f"{count}, in the order of the data set ({ends})"


def channels(network: Network) -> str:
    """Describe the channels."""
    return {1: "1 channel, gray", 3: "3 channels, RGB"}.get(
        network.in_channels, f"{network.in_channels} channels"
    )


def normalisation(network: Network) -> str:
    """Describe mean and std; empty: the network does not normalize."""
    if not network.normalised:
        return ""
    values = (network.stats[f"normalize.{key}"].tolist() for key in ("mean", "std"))
    shown = (", ".join(f"{value:.4g}" for value in row) for row in values)
    return "mean ({}) and std ({})".format(*shown)


def prepared(network: Network, account: Account) -> str:
    """Say how an image file becomes an input."""
    size = network.image_size
    if account.preprocessing in (None, "none"):
        note = "" if account.preprocessing else f"; any preprocessing is {UNKNOWN}"
        return f"images of {size} x {size} px as they are{note}"
    return (
        f"`{account.preprocessing}` to {size} x {size} px (an id of "
        "`jaxrobust.data.evaluation_transform`, which also accepts RobustBench's names)"
    )


def licence(account: Account) -> str:
    """Name the license of the weights; empty: you have to state it."""
    return account.license or ("not stated by the authors" if account.published else "")


def threat(account: Account) -> str:
    """Describe the threat model."""
    if account.threat is None:
        return UNKNOWN if not account.trained else "none: the network was trained on clean images"
    return f"{account.threat.written()}, in units of [0, 1] pixels"


def images(record: AccuracyRecord) -> str:
    """Describe the images of a record."""
    count = records.images_of(record)
    return f"{f'{count:,} of ' if count else ''}{record.dataset}, split {record.split}"


def row(record: AccuracyRecord) -> tuple[str, str, str, str, str]:
    """Return (images, attack, clean, robust, where it stands) of a record."""
    robust = record.robust
    attack = "none"
    if record.attacks and robust is not None:
        attack = records.attack_line(record)
        if not record.is_union:
            attack = f"{attack.partition(',')[0]}, {record.threats[0].written()}"
    by = record.published_by
    number = f"record {record.evaluation} of " if record.evaluation else "record of "
    flags = f", flags: {', '.join(record.flags)}" if record.flags else ""
    origin = f"{number}{record.time}, commit {str(record.commit)[:12]}, {record.device}{flags}"
    stands = f"published by {by}" if by else origin
    shown = "-" if robust is None else f"{robust:.2%}"
    clean = "-" if record.clean is None else f"{record.clean:.2%}"
    return images(record), attack, clean, shown, stands
