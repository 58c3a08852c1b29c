"""The result of AutoAttack: the verdicts and their record."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from jaxrobust.evaluation.engine.outcome import Cost
from jaxrobust.evaluation.network import checks, randomised
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records import records, stopping
from jaxrobust.evaluation.records.record import (
    AccuracyRecord,
    ClippedPixels,
    DrawsJudged,
    FastSample,
    Measured,
    NetworkFingerprint,
    ReplayedLedger,
    SampledSearch,
    StoppedSequence,
)
from jaxrobust.evaluation.records.verdicts import Verdicts


class CallerFacts(TypedDict, total=False):
    """Facts about the network and images that only the caller of `autoattack` knows."""

    model: str | None  # the network's name
    weights: str | None  # their name
    weights_sha256: str | None
    dataset: str | None
    split: str | None
    preprocessing: str | None
    dtype: str | None  # of the network


class ResultFacts(TypedDict, total=False):
    """The facts that identify an evaluation, and the facts that only some evaluations have."""

    norm: str
    epsilon: float
    version: str
    seed: int
    image_ids: str
    images_sha256: str
    classes: int
    image: tuple[int, ...]  # H, W, C
    chosen: bool  # the attacks are not those of the version
    arrays_sha256: str
    fingerprint: NetworkFingerprint
    replayed: list[ReplayedLedger]
    robust_beyond: int
    draws: DrawsJudged
    search_sample: SampledSearch
    clipped: ClippedPixels
    stopped: StoppedSequence
    fast: FastSample
    task: str  # its name; None: classes


class AutoAttackResult(NamedTuple):
    """The verdicts on N images; if a rule stopped the evaluation, on the images attacked."""

    clean: np.ndarray  # bool[N], classified correctly
    robust: np.ndarray  # bool[N], no attack found anything
    fooled_by: np.ndarray  # str[N]: the attack; "clean" if misclassified unattacked; "" if robust
    images_adv: ImageSet  # f32[N,H,W,C]; the image itself if no attack succeeded
    flags: dict[str, str]  # reasons to doubt the numbers, with remedies
    accuracy_after: dict[str, float]  # robust accuracy after each attack
    attacks: list[dict[str, Any]]  # their settings, without norm and radius
    costs: list[Cost]
    about: ResultFacts
    verdicts: Verdicts  # all facts about single images
    answers: np.ndarray = np.zeros(0, int)  # i[N], predicted classes of the clean images; -1: none

    def __repr__(self) -> str:
        """Return the table, because the arrays would fill pages."""
        return self.table()

    def table(self, *, brief: bool = False) -> str:
        """Format a table of each attack: the accuracy after it, images fooled, and cost.

        `brief`: without the accuracies, notes and flags, which a record has too.
        """
        n, width = len(self.clean), max([10, *(len(c.attack) for c in self.costs)])
        accuracy = "" if brief else f"{'accuracy':>8}  "
        lines = [
            f"{'attack':{width}}  {accuracy}{'fooled':>6}  {'forward':>9}  {'backward':>9}  time"
        ]
        lines += [] if brief else [f"{'clean':{width}}  {_share(self.clean.sum(), n)}"]
        for c in self.costs:
            accuracy = "" if brief else f"{_share(self.accuracy_after[c.attack] * n, n)}  "
            lines.append(
                f"{c.attack:{width}}  {accuracy}{c.fooled:6d}  {c.forward:9,d}  {c.backward:9,d}  "
                f"{c.seconds:.1f} s + {c.compile_seconds:.1f} s compiling"
            )
        robust = int(self.robust.sum())
        low, high = checks.binomial_interval(robust, n)
        within = f", 95% interval {low:.1%} to {high:.1%}" if "stopped" not in self.about else ""
        lines.append(f"robust {robust} of {n}{within}")
        if brief:
            return "\n".join(lines)
        lines += records.notes_of(self.measured().record)
        lines += [f"flag {name}: {text}" for name, text in self.flags.items()]
        return "\n".join(lines)

    def measured(self) -> Measured:
        """Gather the measurements for a record."""
        about, n = self.about, len(self.clean)
        ball = {"norm": about["norm"], "epsilon": about["epsilon"]}
        attacks: list[Any] = [ball | settings for settings in self.attacks]
        costs: list[Any] = [cost._asdict() for cost in self.costs]
        names = ("replayed", "robust_beyond", "draws", "search_sample", "clipped", "stopped")
        facts: dict[str, Any] = {name: about.get(name) for name in (*names, "fast", "task")}
        if "stopped" in about:
            facts["image_ids"] = about["image_ids"]
        record = AccuracyRecord(
            attacks=attacks,
            clean=float(self.clean.mean()) if n else None,
            robust=float(self.robust.mean()) if n else None,
            accuracy_after=dict(self.accuracy_after),
            flags=dict(self.flags),
            costs=costs,
            **facts,
        )
        return Measured(record, self.verdicts, about["fingerprint"].get("begun_by"))

    def typed_record(self, **facts: Unpack[CallerFacts]) -> AccuracyRecord:
        """Return the record as an `AccuracyRecord`; see `record`."""
        names = CallerFacts.__annotations__
        if unknown := sorted(facts.keys() - names):
            raise ValueError(f"a record has no {', '.join(unknown)}; pass only {', '.join(names)}")
        about, n, record = self.about, len(self.clean), self.measured().record
        height, width, channels = about["image"]
        keys = ("image_ids", "seed", "version", "images_sha256", "fingerprint")
        evaluated: Any = {key: value for key, value in about.items() if key in keys}
        stated: Any = {key: value for key, value in facts.items() if key != "model"}
        function: Any = dict.fromkeys(("name", "file", "sha256"))
        after = record.accuracy_after or {}
        return dataclasses.replace(
            record,
            **stated,
            **evaluated,
            interval=None if record.stopped else records.intervals(record.clean, record.robust, n),
            costs=records.with_step_rules(record.costs or ()),
            evaluation=records.number_of(records.identity(about) | {"attacks": self.attacks}),
            model={
                "name": facts.get("model"),
                "num_classes": about["classes"],
                "options": None,
                "image_size": height if height == width else None,
                "in_channels": channels,
            },
            method=self._method(),
            accuracy_after={name: float(v or 0) if n else None for name, v in after.items()},
            function=function | {"arrays_sha256": about["arrays_sha256"]},
        ).stamped()

    def _method(self) -> str:
        if "fast" in self.about:
            return stopping.FAST_METHOD
        version = [] if self.about["chosen"] else [f"autoattack {self.about['version']}"]
        names = [one["name"] for one in self.attacks if not version or "sha256" in one]
        method = " + ".join(version + names)
        if draws := self.about.get("draws"):
            method += f", {randomised.VerdictRule(draws['rule'], draws['draws']).words()}"
        return f"{method}, stopped" if "stopped" in self.about else method

    def record(self, **facts: Unpack[CallerFacts]) -> dict[str, Any]:
        """Return the record of the accuracies: versions, device, attacks, threat, seed, hashes.

        It has the keys of the package's own records (`AccuracyRecord`); missing facts are None.
        Call it in the process that evaluated.

        Args:
          **facts: facts that only you know: `model` (its name), `weights` (their name),
            `weights_sha256`, `dataset`, `split`, `preprocessing`, `dtype` (of the network).
        """
        return self.typed_record(**facts).to_json()

    def save(self, path: str | Path, **facts: Unpack[CallerFacts]) -> dict[str, Any]:
        """Append the record to a file of JSON lines, such as results.jsonl, and return it.

        The verdicts on single images go to a second file, which the record names. With several
        processes, only the first writes. For `facts` see `record`. Raises `ValueError` if the
        file's name does not end in .jsonl.
        """
        return records.save(Path(path), self.verdicts, lambda: self.typed_record(**facts))


def _share(count: float, n: int) -> str:
    return f"{count / n:8.2%}" if n else f"{'-':>8}"
