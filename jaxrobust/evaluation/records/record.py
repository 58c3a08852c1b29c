"""The record of an accuracy: one type, whose fields are the keys of a line of results.jsonl.

A new key is a field of `AccuracyRecord`, and the place that knows its value.
"""

import datetime
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

from jaxrobust.evaluation.records import parts
from jaxrobust.evaluation.records.verdicts import SCHEMA, Verdicts
from jaxrobust.runtime.devices import hardware
from jaxrobust.runtime.files import provenance
from jaxrobust.types import VERDICT_PRECISION, Threat

# When a field is written though its value is not known, as null: else it is written if it is known.
_ALWAYS, _OF_EVALUATION = {"written": "always"}, {"written": "of an evaluation"}
_NEVER = {"written": "never"}  # as a key of the JSON


def always(kind: Any = None) -> Any:
    """Make a field that is written, as null where its value is not known; empty: of `kind`."""
    empty: dict[str, Any] = {"default_factory": kind} if kind else {"default": None}
    return field(**empty, metadata=_ALWAYS)


def of_evaluation() -> Any:
    """Make a field that every record of an evaluation has, as null where it is not known."""
    return field(default=None, metadata=_OF_EVALUATION)


@dataclass(frozen=True)
class AccuracyRecord:
    """One network's accuracy on some images, with all that is needed to repeat it.

    A field is None where its value is not known, as of a user's function, or does not exist.

    Attributes:
      absent: keys of the schema that the JSON of an older version lacked.
      others: what the JSON had beside the schema; it is kept.
    """

    time: str | None = always()
    commit: str | None = always()
    config_sha256: str | None = always()  # of the resolved config that made the network
    weights: str | None = always()  # which ones: "train, step 440, ema"
    weights_sha256: str | None = always()
    dataset: str | None = always()
    split: str | None = always()
    image_ids: str | None = always()  # by their place in the split: "0..999"
    preprocessing: str | None = always()
    dtype: str | None = always()  # the network's compute type
    matmul_precision: str | None = always()  # of products wherever a verdict falls
    attacks: list[parts.AttackSettings] = always(list)  # empty: there was none
    clean: float | None = always()  # accuracy, a fraction of the images
    robust: float | None = always()  # after all attacks
    seed: int | None = always()  # of the attacks' draws
    flags: dict[str, str] = always(dict)  # what puts the number in doubt, and why
    versions: dict[str, str] | None = always()
    device: str | None = always()
    schema: int | None = always()
    verdicts: str | None = always()  # the file beside the record that has them image by image
    interval: parts.Intervals | None = always()
    costs: list[parts.AttackCost] | None = always()  # of each attack
    size: parts.NetworkSize | None = always()
    training: parts.TrainingFacts | None = always()
    # all, hash or robustbench, see `spread.choice`; None: of an older version, the first ones.
    image_choice: str | None = None
    ids_sha256: str | None = None  # of the list of ids that makes the split
    classes_sha256: str | None = None  # of the classes' names in the order of labels
    init: dict[str, Any] | None = None  # what the training started from
    evaluation: str | None = of_evaluation()  # its number
    model: parts.Architecture | None = of_evaluation()
    method: str | None = of_evaluation()  # of the attack, as the command line says it
    search_dtype: str | None = of_evaluation()
    accuracy_after: dict[str, float | None] | None = of_evaluation()  # after each attack
    version: str | None = None  # of AutoAttack
    images_sha256: str | None = None
    fingerprint: parts.NetworkFingerprint | None = of_evaluation()
    clean_top5: float | None = None
    stable: float | None = None  # share whose answer an attack of fixed steps leaves
    local_lipschitz: float | None = None
    ladder: parts.LadderSettings | None = None
    corruptions: parts.CorruptionAccuracies | None = None
    certified: parts.CertifiedAccuracies | None = None
    worst_case: list[parts.WorstCasePart] | None = None
    union: dict[str, bool] | None = None  # "each_on_all_images": how its threats were attacked
    replayed: list[parts.ReplayedLedger] | None = None
    robust_beyond: int | None = None  # images that a larger radius found robust
    draws: parts.DrawsJudged | None = None  # of a randomised network
    search_sample: parts.SampledSearch | None = None
    clipped: parts.ClippedPixels | None = None
    fast: parts.FastSample | None = None  # it is of the fast version: no number of AutoAttack
    stopped: parts.StoppedSequence | None = None  # it ended once it was decided: `interval` is None
    function: parts.UserFunction | None = None
    damaged: list[str] | None = None  # images that a test could not read
    published_by: str | None = None  # who measured it, where that was not this package
    absent: tuple[str, ...] = field(default=(), metadata=_NEVER)
    others: Mapping[str, Any] = field(default_factory=dict, metadata=_NEVER)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Make the record of a line of any version; `check` tells whether it is sound."""
        names = {key.name for key in keys_of(cls)}
        record = cls(**{k: v for k, v in values.items() if k in names and v is not None})
        written = record.to_json()
        return replace(
            record,
            absent=tuple(key for key in written if key not in values),
            others={key: value for key, value in values.items() if key not in written},
        )

    def to_json(self) -> dict[str, Any]:
        """Make the line, without the keys that its version did not have."""
        values = {}
        due = ["always"] if self.evaluation is None else ["always", "of an evaluation"]
        for key in keys_of(type(self)):
            value = getattr(self, key.name)
            empty = key.default if key.default_factory is MISSING else key.default_factory()
            is_known = value is not None and value != empty
            if is_known or (key.metadata.get("written") in due and key.name not in self.absent):
                values[key.name] = value
        return values | dict(self.others)

    def stamped(self) -> Self:
        """Add what belongs to every number that is measured here and now."""
        return replace(
            self,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            commit=provenance.commit(),
            matmul_precision=VERDICT_PRECISION,
            versions=provenance.versions(),
            device=hardware.devices(),
            schema=SCHEMA,
        )

    @property
    def threats(self) -> list[Threat]:
        """List norm and radius of each attack."""
        return [Threat(attack["norm"], attack["epsilon"]) for attack in self.attacks]

    @property
    def image_size(self) -> int | None:
        """Give the side of the images, in pixels."""
        return (self.model or {}).get("image_size")

    @property
    def is_union(self) -> bool:
        """Tell whether several attacks or threats count together."""
        return self.method == "union"


class Measured(NamedTuple):
    """What an evaluation measured, whatever network and images it is of."""

    record: AccuracyRecord  # attacks, accuracies, flags, costs, and what only some have
    verdicts: Verdicts
    begun_by: dict[str, str] | None = None  # versions that began it, if they were others

    def noting(self, **fields: Any) -> "Measured":
        """Replace fields of the record."""
        return self._replace(record=replace(self.record, **fields))


def keys_of(kind: type[AccuracyRecord]) -> list[Field]:
    """List the fields that are keys of the JSON, in their order."""
    return [key for key in fields(kind) if key.metadata != _NEVER]


def check(record: AccuracyRecord, where: str) -> None:
    """Refuse what is no record of this schema or an older one."""
    number = 1 if "schema" in record.absent else record.schema
    if not isinstance(number, int) or number > SCHEMA:
        raise ValueError(
            f"{where} has a record of schema {number}, and this version knows up to "
            f"{SCHEMA}; install a newer jaxrobust"
        )
    kind: Any = type(record)
    hints = _hints(kind)
    for key in keys_of(kind):
        value = getattr(record, key.name)
        missing = number > 1 and key.metadata == _ALWAYS and key.name in record.absent
        if missing or not (value is None or isinstance(value, _types(hints[key.name]))):
            shown = None if missing else value
            raise ValueError(
                f"{where} has a record whose {key.name} is {shown!r:.40}; remove that line, or "
                "get the file again"
            )


_hints = functools.cache(typing.get_type_hints)


@functools.cache
def _types(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType):
        return tuple(one for each in typing.get_args(hint) for one in _types(each))
    if typing.is_typeddict(hint):
        return (dict,)
    return (float, int) if hint is float else (typing.get_origin(hint) or hint,)
