"""Existing records and ledgers of a folder: which can be reused or replayed."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrobust.evaluation.engine import replay
from jaxrobust.evaluation.network import fingerprint
from jaxrobust.evaluation.network.fingerprint import Fingerprint, difference
from jaxrobust.evaluation.records import checked, records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import HashedImages
from jaxrobust.evaluation.records.verdicts import other_images as other_hashes
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Threat


def number(
    out: Path,
    identity: dict[str, Any],
    question: str,
    network: Fingerprint,
    *,
    again: bool,
    confirmed: Callable[[AccuracyRecord], bool] = lambda record: True,
) -> str:
    """Choose an evaluation's number, reusing that of a finished or begun one of this network.

    `confirmed` judges the record of an older version if its fingerprint does not prove equality.
    """
    exact = records.number_of(identity)
    done = {record.evaluation: record for record in records.read(out)}
    if again:
        numbers = (records.number_of(identity | {"again": k}) for k in itertools.count(1))
        return next(number for number in numbers if number not in done)
    prints: dict[str, Any] = {key: record.fingerprint for key, record in done.items() if key}
    for path in replay.ledgers(out):
        prints.setdefault(_number_in(path), replay.header(path).get("fingerprint"))
    here = network._asdict()
    same = {k: there for k, there in prints.items() if there and not difference(there, here)}
    for key in [key for key in same if key in done]:
        asked = key == exact or same[key].get("question") == question
        if asked and not fingerprint.is_shown(same[key], here) and not confirmed(done[key]):
            del same[key]
    if exact in same or exact not in prints:
        equal = [key for key, there in same.items() if there.get("question") == question]
        return min(equal, key=lambda key: (key not in done, key != exact), default=exact)
    # A program calls code that its text does not show, such as a callback, and this has changed.
    numbers = (records.number_of(identity | {"unlike": k}) for k in itertools.count(1))
    return next(number for number in numbers if number in same or number not in prints)


def _number_in(path: Path) -> str:
    return path.stem.removeprefix("ledger-").partition(".")[0].partition("-")[0]


def recorded(out: Path, number: str, versions: dict[str, str]) -> AccuracyRecord | None:
    """Find the record of an earlier evaluation and announce it; None if there is none."""
    done = [record for record in records.read(out) if record.evaluation == number]
    if not hosts.first(bool(done)):
        return None
    file = out / "results.jsonl"
    hosts.together(lambda: checked.confirmed(done[-1], file) if done else None)
    if not done:  # this host cannot see the first host's records
        return AccuracyRecord(evaluation=number)
    old_versions, by = (done[-1].fingerprint or {}).get("versions") or {}, ""
    if fingerprint.other_versions(old_versions, versions):
        by = f", by {fingerprint.words(old_versions)} (here: {fingerprint.words(versions)})"
    say(f"already done, {done[-1].time}{by}; nothing is computed (--again adds a second record)")
    return done[-1]


def warn_of_older(out: Path, expected: Mapping[str, Any], threat: Threat) -> None:
    """Warn of a matching record of an older version that does not identify its network."""
    for record in records.read(out):
        alike = all(getattr(record, name) == value for name, value in expected.items())
        alike = alike and record.threats[:1] in ([], [threat])
        if alike and record.evaluation and "fingerprint" in record.absent:
            say(
                f"the record of {record.time} (commit {str(record.commit)[:12]}) in {out}"
                " was written by an older version that fingerprinted neither the network nor the "
                "images, which may differ, so the record is not reused"
            )
            return


def ledgers_named(folder: Path, images: Mapping[str, Any]) -> list[Path]:
    """Find the ledgers in a folder of --replay; raise if one has other images."""
    ledgers = replay.ledgers(folder)
    if not ledgers:
        raise ValueError(
            f"--replay={folder} has no ledger; name the folder of an evaluation, such as "
            "RUN/evaluation"
        )
    for record in records.read(folder):
        if words := other_images(record, images):
            raise ValueError(
                f"--replay={folder} is for different images: {words}; replay an evaluation of "
                "these images"
            )
    return ledgers


def ledgers_beside(
    out: Path,
    number: str,
    network: Fingerprint,
    norm: str,
    images: Mapping[str, Any],
    hashed: HashedImages | None = None,
) -> Iterator[Path]:
    """Yield a folder's ledgers of this network and norm at other radii.

    Ledgers of other images are skipped, judged by `images`, fields of records, and `hashed`.
    """
    done = {record.evaluation: record for record in records.read(out)}
    for path in replay.ledgers(out):
        of = _number_in(path)
        if of == number or of not in done or other_images(done[of], images):
            continue
        if hashed is not None and other_hashes(replay.images(path), hashed):
            continue
        head = replay.header(path)
        if replay.network_of(head) == list(network.exact.values()) and head["norm"] == norm:
            yield path


def other_images(record: AccuracyRecord, images: Mapping[str, Any]) -> str:
    """Describe how the fields of a record's images differ from `images`; "" if none is known."""
    recorded_fields = {name: getattr(record, name) for name in images}
    noted = {name: value for name, value in recorded_fields.items() if value is not None}
    return hosts.differences(noted, {name: images[name] for name in noted})
