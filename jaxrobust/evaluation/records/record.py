"""The record of an accuracy: a type whose fields are the keys of a line of results.jsonl.

To add a key, add a field to `AccuracyRecord` and set it where its value is known.
"""

import datetime
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, NamedTuple, Self, TypedDict

from jaxrobust.evaluation.network.images import ClippedPixels as ClippedPixels
from jaxrobust.evaluation.records.verdicts import SCHEMA, Verdicts
from jaxrobust.runtime.devices import in_use
from jaxrobust.runtime.files import provenance
from jaxrobust.types import VERDICT_PRECISION, Threat

Interval = list[float]  # low, high: the exact 95% interval of an accuracy


class AttackSettings(TypedDict, total=False):
    """The settings of one attack, with norm and radius; the keys depend on the attack."""

    norm: str
    epsilon: float  # in units of pixels in [0, 1]
    name: str
    machine: str
    steps: int
    restarts: int
    targets: int
    eot: int  # gradients that one step averages
    start: str
    start_std: float
    step_size: float
    relative_step: float
    l1_rule: str
    file: str  # of the user's points, or the name of the user's function; else absent
    sha256: str | None  # of that file


class AttackCost(TypedDict, total=False):
    """The cost of an attack; a pass is of one image."""

    attack: str
    fooled: int
    forward: int
    backward: int
    idle: int  # forward passes in slots without an image
    seconds: float
    compile_seconds: float
    step_rule: str | None  # the rule for its steps


class Intervals(TypedDict):
    """The exact 95% intervals of the accuracies; None if an accuracy is unknown."""

    clean: Interval | None
    robust: Interval | None


class NetworkSize(TypedDict):
    """The size of a network."""

    parameters: int
    multiply_adds: int  # of one image


class Architecture(TypedDict, total=False):
    """The architecture of a network."""

    name: str | None
    num_classes: int | None
    image_size: int | None
    in_channels: int | None
    options: dict[str, Any] | None  # fields of its row that are overridden


class UserFunction(TypedDict, total=False):
    """A user's function that is or makes the network; PyTorch networks have more keys."""

    name: str | None
    file: str | None
    sha256: str | None
    arrays_sha256: str | None
    torch: str
    arguments: Any
    output: Any


class SelectionImages(TypedDict, total=False):
    """The images on which weights were chosen."""

    dataset: str
    split: str | None
    attack: Any
    on_evaluated_images: bool | None  # whether some of these are evaluated in the record


class TrainingFacts(TypedDict):
    """The training history of the record's weights; None means unknown."""

    phases: list[dict[str, Any]]  # objective, epochs and attack of each phase, over all runs
    passes: float | None  # per image, summed over all phases and earlier runs
    on_evaluated_images: bool | None
    selection: SelectionImages


class ReplayedLedger(TypedDict, total=False):
    """The points of one other evaluation that were tried before the attacks."""

    ledger: str
    sha256: str
    norm: str
    epsilon: float
    tried: int
    fooled: int


class OneDraw(TypedDict, total=False):
    """The accuracies of a randomised network by one draw, as auto-attack judges."""

    clean: float
    robust: float
    interval: Intervals | None
    bits: str  # which images are robust: `randomised.unpacked`
    at_most: bool  # the robust accuracy is a bound


class DrawsJudged(TypedDict, total=False):
    """The rule that judged a randomised network's answers."""

    rule: str
    draws: int
    one_draw: OneDraw | None


class LadderSettings(TypedDict, total=False):
    """The radii that share adversarial images with the record's radius."""

    radii: list[float]
    robust_beyond: int  # images that the next larger radius found robust
    of_these_attacked_by: list[str]


class WorstCasePart(TypedDict, total=False):
    """One attack of a worst case over several."""

    method: str
    norm: str
    epsilon: float
    attacks: list[str]
    images: int
    robust: float | None  # the accuracy under it alone
    interval: Interval | None
    evaluation: str | None  # the number of its own record


class CorruptionAccuracies(TypedDict, total=False):
    """The accuracies under common corruptions."""

    images: str  # "files" or "computed"
    accuracy: dict[str, dict[str, float]]  # kind -> severity
    mean: float
    frost_sha256: str | None
    seconds: float


class CertifiedAccuracies(TypedDict, total=False):
    """The accuracies that randomised smoothing certifies in L2."""

    sigma: float  # of the noise
    draws: int
    selection: int  # earlier draws that choose the class
    alpha: float  # probability that the certificate of an image is wrong
    accuracy: dict[str, float]  # radius -> share of images that are right and certified in it
    abstained: float  # share of images without an answer
    average_radius: float  # over all images, 0 if the answer is wrong or missing
    images: str  # the file next to the record with the results per image


class NetworkFingerprint(TypedDict, total=False):
    """The fingerprint of a network and its images, see `network.fingerprint`."""

    program: str
    gradient: str
    arrays: str
    probe: dict[str, list[list[float]]]
    versions: dict[str, str]
    question: str
    images: str
    begun_by: dict[str, str]  # versions that began the evaluation, if different


class SampledSearch(TypedDict):
    """A search in full precision on survivors of a search in lower precision."""

    survivors: int  # of the search in lower precision
    sampled: int  # number of them searched again, drawn at random
    fooled: int  # number of these that were fooled
    at_most: float  # share of all survivors that would be fooled, with 95% confidence
    fooled_of_all: int | None  # if all survivors were searched again; None: they were not
    robust_at_least: float  # bound on the accuracy after such a search of all survivors


class FastSample(TypedDict):
    """The rest of the standard version's attacks on a sample of the fast version's survivors.

    Source of the bound: the hypergeometric distribution, see `stopping.most_fooled`.
    """

    survivors: int  # of the attacks run on all images
    sampled: int  # number of them, drawn at random, that went through the other attacks
    fooled: int  # number of these that were fooled
    fallen: list[int]  # ids of the fooled images, which survived the attacks run on all
    at_most: int  # bound on the other survivors that would be fooled too, at confidence `level`
    level: float
    robust_at_least: float  # bound on the standard version's accuracy, at that confidence


class StoppedSequence(TypedDict, total=False):
    """When and why an evaluation stopped early, and its bounds for all images."""

    stopped_after: int  # images decided, the first of the order
    of: int  # images available
    images: str  # ids of all images of the evaluation
    rule: str  # what stopped it: "ahead", "tie", "width", or "images" if they ran out
    alpha: float  # error probability of each claim, over all looks together
    order_seed: int  # of the order of the images
    clean: Interval  # the sequence's bounds on the accuracies on all these images
    robust: Interval
    until_width: float  # as requested, a share
    tie: float  # likewise
    leads: str  # "this" or "other"
    difference: Interval  # of the robust accuracies, this minus the other
    gained: int  # images on which only this network is robust
    lost: int
    e_value: float  # the largest e-value against equal accuracies
    against_sha256: str  # of the ids and verdicts it was compared with
    against: dict[str, Any]  # the record of these: its evaluation, model and weights


# Fields that are written as null if unknown; all others are written only if known.
_ALWAYS, _OF_EVALUATION = {"written": "always"}, {"written": "of an evaluation"}
_NEVER = {"written": "never"}  # as a key of the JSON


def always(kind: Any = None) -> Any:
    """Make a field that is always written, as null if unknown; its default is an empty `kind`."""
    empty: dict[str, Any] = {"default_factory": kind} if kind else {"default": None}
    return field(**empty, metadata=_ALWAYS)


def of_evaluation() -> Any:
    """Make a field that every record of an evaluation has, as null if unknown."""
    return field(default=None, metadata=_OF_EVALUATION)


@dataclass(frozen=True)
class AccuracyRecord:
    """One network's accuracy on some images, with everything needed to reproduce it.

    A field is None if its value is unknown, as for a user's function, or does not exist.

    Attributes:
      absent: keys of the schema missing in the JSON of an older version.
      others: keys of the JSON outside the schema, which are preserved.
    """

    time: str | None = always()
    commit: str | None = always()
    config_sha256: str | None = always()  # of the resolved config that made the network
    weights: str | None = always()  # their name: "train, step 440, ema"
    weights_sha256: str | None = always()
    dataset: str | None = always()
    split: str | None = always()
    image_ids: str | None = always()  # by their place in the split: "0..999"
    preprocessing: str | None = always()
    dtype: str | None = always()  # the network's compute type
    matmul_precision: str | None = always()  # of the forward passes that decide verdicts
    attacks: list[AttackSettings] = always(list)  # empty: no attack
    clean: float | None = always()  # accuracy, a fraction of the images
    robust: float | None = always()  # after all attacks
    seed: int | None = always()  # of the attacks' draws
    flags: dict[str, str] = always(dict)  # reasons to doubt the number
    versions: dict[str, str] | None = always()
    device: str | None = always()
    schema: int | None = always()
    verdicts: str | None = always()  # the file next to the record with the verdicts per image
    interval: Intervals | None = always()
    costs: list[AttackCost] | None = always()  # of each attack
    size: NetworkSize | None = always()
    training: TrainingFacts | None = always()
    # all, hash or robustbench, see `spread.choice`; None: older version, the first images.
    image_choice: str | None = None
    ids_sha256: str | None = None  # of the list of ids that defines the split
    classes_sha256: str | None = None  # of the classes' names in the order of labels
    init: dict[str, Any] | None = None  # the weights that training started from
    evaluation: str | None = of_evaluation()  # its number
    model: Architecture | None = of_evaluation()
    method: str | None = of_evaluation()  # the attack, as on the command line
    search_dtype: str | None = of_evaluation()
    accuracy_after: dict[str, float | None] | None = of_evaluation()  # after each attack
    version: str | None = None  # of AutoAttack
    images_sha256: str | None = None
    fingerprint: NetworkFingerprint | None = of_evaluation()
    clean_top5: float | None = None
    stable: float | None = None  # share whose answer survives an attack with fixed steps
    local_lipschitz: float | None = None
    ladder: LadderSettings | None = None
    corruptions: CorruptionAccuracies | None = None
    certified: CertifiedAccuracies | None = None
    worst_case: list[WorstCasePart] | None = None
    union: dict[str, bool] | None = None  # "each_on_all_images": how its threats were attacked
    replayed: list[ReplayedLedger] | None = None
    robust_beyond: int | None = None  # images that a larger radius found robust
    draws: DrawsJudged | None = None  # of a randomised network
    search_sample: SampledSearch | None = None
    clipped: ClippedPixels | None = None
    fast: FastSample | None = None  # fast version, which is not an AutoAttack result
    task: str | None = None  # the task, if outputs are not logits, `tasks.Task.name`
    stopped: StoppedSequence | None = None  # stopped once decided; then `interval` is None
    function: UserFunction | None = None
    damaged: list[str] | None = None  # images that a test could not read
    published_by: str | None = None  # who measured it, if not this package
    absent: tuple[str, ...] = field(default=(), metadata=_NEVER)
    others: Mapping[str, Any] = field(default_factory=dict, metadata=_NEVER)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Make the record from a line of any version; `check` validates it."""
        names = {key.name for key in keys_of(cls)}
        record = cls(**{k: v for k, v in values.items() if k in names and v is not None})
        written = record.to_json()
        return replace(
            record,
            absent=tuple(key for key in written if key not in values),
            others={key: value for key, value in values.items() if key not in written},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the line as a dict, without the keys that its version lacked."""
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
        """Add the facts of every new measurement: time, commit, versions, device."""
        return replace(
            self,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            commit=provenance.commit(),
            matmul_precision=VERDICT_PRECISION,
            versions=provenance.versions(),
            device=in_use.devices(),
            schema=SCHEMA,
        )

    @property
    def threats(self) -> list[Threat]:
        """The norm and radius of each attack."""
        return [Threat(attack["norm"], attack["epsilon"]) for attack in self.attacks]

    @property
    def image_size(self) -> int | None:
        """The side length of the images, in pixels."""
        return (self.model or {}).get("image_size")

    @property
    def is_union(self) -> bool:
        """Whether several attacks or threats are combined."""
        return self.method == "union"


class Measured(NamedTuple):
    """An evaluation's measurements, without the facts about its network and images."""

    record: AccuracyRecord  # attacks, accuracies, flags, costs, and optional facts
    verdicts: Verdicts
    begun_by: dict[str, str] | None = None  # versions that began it, if different

    def noting(self, **fields: Any) -> "Measured":
        """Replace fields of the record."""
        return self._replace(record=replace(self.record, **fields))


def keys_of(kind: type[AccuracyRecord]) -> list[Field[Any]]:
    """List the fields that are keys of the JSON, in order."""
    return [key for key in fields(kind) if key.metadata != _NEVER]


def check(record: AccuracyRecord, where: str) -> None:
    """Raise unless a record follows this schema or an older one."""
    number = 1 if "schema" in record.absent else record.schema
    if not isinstance(number, int) or number > SCHEMA:
        raise ValueError(
            f"{where} has a record of schema {number}, but this version only reads up to "
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
                "restore the original"
            )


_hints = functools.cache(typing.get_type_hints)


@functools.cache
def _types(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType):
        return tuple(one for member in typing.get_args(hint) for one in _types(member))
    if typing.is_typeddict(hint):
        return (dict,)
    return (float, int) if hint is float else (typing.get_origin(hint) or hint,)
