"""The entries of a board: facts about networks, only from verified bundles."""

import itertools
import json
import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import models
from jaxrobust.data.transforms.corruptions import KINDS, SEVERITIES
from jaxrobust.evaluation.bundles import claims, contradictions, findings
from jaxrobust.evaluation.bundles.contradictions import CLEAN, Rows, rights
from jaxrobust.evaluation.bundles.findings import CorruptionFindings
from jaxrobust.evaluation.questions import verification
from jaxrobust.evaluation.questions.verification import Verification, VerificationSettings
from jaxrobust.evaluation.records import checked, stopping
from jaxrobust.evaluation.records import record as records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.records import replayed_line
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report.parts import sentences
from jaxrobust.results.board.listing import NETWORKS, ListedBundle
from jaxrobust.runtime.commandline import functions


class BoardEntry(NamedTuple):
    """A network under one threat, or under several at once, or under common corruptions."""

    name: str
    weights: str  # their name: "train, step 440, ema"
    network: str  # unique key of the network
    data: str  # data set and split
    images: str  # split and list of ids: equal if places mean the same images
    threats: tuple[tuple[str, float], ...]  # norm, radius
    attack: str
    settings: str  # of its attacks; equal for entries that are compared
    verdicts: Verdicts
    sha256: np.ndarray  # str[N], of the prepared clean images
    split_images: int | None
    flags: dict[str, str]
    passes: float | None  # forward and backward, over all images; None: the bundle does not say
    seconds: float | None
    device: str
    numbers: tuple[str, ...]  # of the bundles
    commands: tuple[str, ...]  # that verify them
    corruptions: tuple[str, ...] = ()  # fog-1 and so on; empty: it was attacked
    withstood: np.ndarray | None = None  # share of the corruptions under which each image is right
    falling: tuple[int, int] = (0, 0)  # bounds on standing images that the board's attacks fool

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.verdicts.labels)

    @property
    def clean(self) -> float | None:
        """Compute the clean accuracy; None if it was not measured."""
        return float(self.verdicts.clean.mean()) if len(self.verdicts.clean) else None

    @property
    def robust(self) -> float:
        """Compute the upper bound on robust accuracy; under corruptions, 1 - mean error."""
        shares = self.verdicts.robust if self.withstood is None else self.withstood
        return float(shares.mean()) - self.falling[0] / self.n

    @property
    def at_least(self) -> float:
        """Bound the accuracy under the board's attacks from below, with 95% confidence."""
        return self.robust - (self.falling[1] - self.falling[0]) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Compute the 95% interval of `robust`, which is exact except under corruptions."""
        if self.withstood is not None:
            return findings.mean_interval(self.withstood)
        return contradictions.interval(round(self.robust * self.n), self.n)


def verified(listed: ListedBundle, **settings: Any) -> BoardEntry | str:
    """Verify a bundle; return its entry, or the reason why verification fails.

    `settings` are `batch`, `sample` and `seed`, as for `jaxrobust verify`.

    Bundles come from others, so any fault becomes a reason and does not stop the board.
    """
    if not listed.flags:
        return f"{NETWORKS} does not name its network; add the weights under [{listed.folder.name}]"
    try:
        flags: dict[str, Any] = {**listed.flags, **settings}
        done = verification.check(VerificationSettings(listed.folder, **flags))
        return entry(listed, done) if done.confirmed else "; ".join(done.why_not)
    except (ValueError, OSError) as error:
        return functions.of_users(error) or str(error)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if message := functions.of_users(error):
            return message
        return f"its record cannot be read ({type(error).__name__}: {error})"
    except Exception as error:  # raised by the user's network
        if message := functions.of_users(error):
            return message
        raise


def entry(listed: ListedBundle, done: Verification) -> BoardEntry:
    """Make the entry of a verified bundle; `ValueError` if its record is invalid."""
    about = done.bundle.about
    record = AccuracyRecord.from_json(done.bundle.record)
    records.check(record, str(listed.folder))
    checked.check(record, listed.folder)
    if record.fast or record.method == stopping.FAST_METHOD:
        raise ValueError(
            "its record comes from the fast version, whose accuracy is not AutoAttack's; "
            "complete it with --finish and bundle the result"
        )
    model, function = record.model or {}, record.function or {}
    name = str(model.get("name"))
    network = [  # the identity of the network, and the preparation of its images
        *(name.rpartition(":")[2], models.essential(name, model.get("options") or {})),
        *(function.get("sha256"), function.get("arrays_sha256") or record.weights_sha256),
        record.preprocessing,
    ]
    words = ["jaxrobust", "verify", listed.folder.resolve().name]
    words += [word for key, value in listed.flags.items() for word in (f"--{key}", value)]
    images = [record.dataset, record.split, record.ids_sha256, record.classes_sha256]
    fields = _corrupted if done.bundle.corrupted else _attacked
    data = f"{listed.given.get('data') or record.dataset}, {record.split}"
    return BoardEntry(
        name=listed.given.get("name") or name.rpartition(":")[2],
        weights=str(record.weights or ""),
        network=json.dumps(network),
        images=json.dumps(images),
        threats=tuple(sorted({(t.norm, float(t.epsilon)) for t in record.threats})),
        sha256=np.array([row["sha256"] for row in done.bundle.rows]),
        split_images=about.get("split_images"),
        device=str(record.device or ""),
        numbers=(done.bundle.number,),
        commands=(shlex.join(words),),
        **{"data": data, **fields(done, record, listed)},
    )


def _attacked(done: Verification, record: AccuracyRecord, listed: ListedBundle) -> dict[str, Any]:
    """Make the fields of an attacked entry, from the bundle's and the board's attacks."""
    del listed
    assert done.sample is not None
    parts = [str(record.method)]  # the attack, and facts that make verdicts incomparable
    if record.search_dtype not in (None, "float32"):
        parts.append(f"searched in {record.search_dtype}")
    if record.ladder:
        parts.append(f"a ladder of {len(record.ladder['radii'])} radii")
    ball = ("norm", "epsilon", "step_size")  # a step is a share of the radius
    settings = [{k: v for k, v in attack.items() if k not in ball} for attack in record.attacks]
    procedure = checked.procedure(record) | {"images attacked only by the first attack": None}
    fallen = {image: f"{name} of the board" for image, name in done.sample.fallen.items()}
    rows: Rows = [
        {**row, "verdict": fallen.get(row["image"], row["verdict"])} for row in done.bundle.rows
    ]
    return {
        "attack": ", ".join(parts),
        "settings": json.dumps([settings, procedure, record.search_dtype], sort_keys=True),
        "flags": done.flags | _flags(record),
        "verdicts": _verdicts(rows),
        "falling": (done.sample.least - len(fallen), done.sample.most - len(fallen)),
        "passes": _sum(record, "forward", "backward"),
        "seconds": _sum(record, "seconds"),
    }


def _verdicts(rows: Rows) -> Verdicts:
    return Verdicts(
        np.array([row["image"] for row in rows], np.int64),
        np.array([row["label"] for row in rows]),
        np.array([row["verdict"] != "clean" for row in rows]),
        np.array([row["verdict"] for row in rows]),
        np.zeros(len(rows)),
        np.full(len(rows), -1),
    )


def _corrupted(done: Verification, record: AccuracyRecord, listed: ListedBundle) -> dict[str, Any]:
    """Make the fields of an entry under common corruptions."""
    assert isinstance(done.findings, CorruptionFindings)
    rows, names = done.bundle.rows, done.bundle.about["corruptions"]
    right, measured = rights(rows), record.corruptions or {}
    clean = right[:, names.index(CLEAN)] if CLEAN in names else np.zeros(0, bool)
    published = measured.get("images") == "files"
    drawn = f"computed with seed {record.seed}"
    if frost := measured.get("frost_sha256"):
        drawn += f", frost from photographs {frost[:12]}"
    where = {"data": listed.given.get("data") or str(record.dataset).partition(":")[0]}
    flags = done.flags | _flags(record)
    if (findings := done.findings).undecided:
        of = f"{findings.undecided:,} of {findings.answers:,} answers"
        flags["rounding"] = f"Float32 rounding decides {of}, which differ here."
    return {
        **(where if published else {}),
        "flags": flags,
        "attack": "the published files" if published else drawn,
        "settings": json.dumps([names, published, frost, record.seed]),
        "verdicts": _verdicts([{**row, "verdict": ""} for row in rows])._replace(clean=clean),
        "corruptions": tuple(name for name in names if name != CLEAN),
        "withstood": claims.withstood(done.bundle),
        "passes": float(right.size),
        "seconds": _duration(measured.get("seconds")),
    }


def _flags(record: AccuracyRecord) -> dict[str, str]:
    flags = {str(name): str(text) for name, text in record.flags.items()}
    if tried := replayed_line(record):
        flags["replayed"] = f"{tried}, which the attacks alone might not have fooled."
    if str(record.split).startswith("train"):
        flags["training split"] = "The network may have been trained on these images."
    if "+changes" in str(record.commit):
        flags["changed code"] = "The code differed from its commit when this was measured."
    return flags


def _sum(record: AccuracyRecord, *keys: str) -> float | None:
    """Sum a record's costs; None if one is missing or not a number."""
    costs: list[Any] = list(record.costs or ())
    values = [_duration(cost.get(key)) for cost in costs for key in keys]
    numbers = [value for value in values if value is not None]
    return sum(numbers) if values and len(numbers) == len(values) else None


def _duration(value: Any) -> float | None:
    """Read a number of seconds or passes; None unless it is finite and at least 0."""
    sound = type(value) in (int, float) and math.isfinite(value) and value >= 0
    return float(value) if sound else None


def corruptions_of(one: BoardEntry) -> str:
    """Describe an entry's corruptions; a kind with all its severities is written as the kind."""
    kinds: dict[str, list[str]] = {}
    for name in one.corruptions:
        kinds.setdefault(name.rpartition("-")[0], []).append(name)
    complete = [kind for kind, names in kinds.items() if len(names) == len(SEVERITIES)]
    without_frost = [kind for kind in KINDS if kind != "frost"]
    if len(complete) == len(kinds) and complete in (list(KINDS), without_frost):
        without = "" if len(complete) == len(KINDS) else ", without frost"
        return f"{len(complete)} common corruptions at {len(SEVERITIES)} severities{without}"
    shown = [[kind] if kind in complete else names for kind, names in kinds.items()]
    return f"common corruptions: {', '.join(itertools.chain(*shown))}"


def ball(norm: str, epsilon: float) -> str:
    """Format a threat for people: L∞ 8/255."""
    return sentences.ball({"norm": norm, "epsilon": epsilon})


def union(several: Sequence[BoardEntry]) -> BoardEntry | None:
    """Combine a network's entries under several threats; None if they share no image.

    An image stands if it stands in each entry. As every verdict is confirmed, so is the union.
    """
    first, ids = several[0], several[0].verdicts.image_ids
    for one in several[1:]:
        ids = np.intersect1d(ids, one.verdicts.image_ids)
    at = [np.intersect1d(ids, e.verdicts.image_ids, return_indices=True)[2] for e in several]
    pictures = np.array([one.sha256[rows] for one, rows in zip(several, at, strict=True)])
    same = (pictures == pictures[0]).all(axis=0)
    if not same.any():
        return None
    at = [rows[same] for rows in at]
    fooled_by, clean = np.full(int(same.sum()), "", object), np.ones(int(same.sum()), bool)
    for one, rows in zip(several, at, strict=True):
        threat = ball(*one.threats[0])
        names = [f"{threat}: {name}" if name else "" for name in one.verdicts.fooled_by[rows]]
        fooled_by = np.where(fooled_by == "", np.array(names, object), fooled_by)
        clean &= one.verdicts.clean[rows]
    verdicts = Verdicts(*(column[at[0]] for column in first.verdicts))
    flags = {}  # the threat follows the name unless all entries share the flag
    for one in several:
        for name, text in one.flags.items():
            everywhere = all(other.flags.get(name) == text for other in several)
            flags[name if everywhere else f"{name} ({ball(*one.threats[0])})"] = text
    costs = [[getattr(one, key) for one in several] for key in ("passes", "seconds")]
    passes, seconds = (None if None in values else sum(values) for values in costs)
    return first._replace(
        threats=tuple(sorted(threat for one in several for threat in one.threats)),
        attack=f"{first.attack}, each threat alone",
        settings=json.dumps([one.settings for one in several]),
        verdicts=verdicts._replace(
            clean=clean, fooled_by=np.where(clean, fooled_by, "clean").astype(str)
        ),
        sha256=first.sha256[at[0]],
        flags=flags,
        falling=(0, sum(one.falling[1] for one in several)),
        passes=passes,
        seconds=seconds,
        device=", ".join(sorted({one.device for one in several})),
        numbers=tuple(number for one in several for number in one.numbers),
        commands=tuple(command for one in several for command in one.commands),
    )
