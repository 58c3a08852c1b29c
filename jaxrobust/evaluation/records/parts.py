"""The parts of a record that are dictionaries themselves: their keys, as JSON has them."""

from typing import Any, TypedDict

from jaxrobust.evaluation.network.images import ClippedPixels as ClippedPixels

Interval = list[float]  # low, high: the exact 95 % interval of an accuracy


class AttackSettings(TypedDict, total=False):
    """The settings of one attack, its ball among them; which ones there are depends on it."""

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
    file: str  # of the user's points, or the name of the user's function; others have none
    sha256: str | None  # of that file


class AttackCost(TypedDict, total=False):
    """What an attack took; a pass is that of one image."""

    attack: str
    fooled: int
    forward: int
    backward: int
    idle: int  # forward passes in slots without an image
    seconds: float
    compile_seconds: float
    step_rule: str | None  # what its steps are


class Intervals(TypedDict):
    """The exact 95 % intervals of the accuracies; None: of one that is not known."""

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
    options: dict[str, Any] | None  # fields of its row that are replaced


class UserFunction(TypedDict, total=False):
    """A user's function that is the network, or makes it; `torch` and its like have more keys."""

    name: str | None
    file: str | None
    sha256: str | None
    arrays_sha256: str | None
    torch: str
    arguments: Any
    output: Any


class SelectionImages(TypedDict, total=False):
    """The images that weights were chosen on."""

    dataset: str
    split: str | None
    attack: Any
    on_evaluated_images: bool | None  # whether these are among those of the record


class TrainingFacts(TypedDict):
    """How weights were trained, up to those that the record is of; None: it is not known."""

    phases: list[dict[str, Any]]  # objective, epochs and attack of each, of all runs
    passes: float | None  # over an image, of all phases and of the runs before
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
    """The radii that share their adversarial images with that of the record."""

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
    selection: int  # draws before these, that choose the class
    alpha: float  # probability that the certificate of an image is wrong
    accuracy: dict[str, float]  # radius -> share of images that are right and certified in it
    abstained: float  # share of images without an answer
    average_radius: float  # of all images, 0 where the answer is wrong or there is none
    images: str  # the file beside the record that has them image by image


class NetworkFingerprint(TypedDict, total=False):
    """What a network computes, and on which images, as `network.fingerprint` finds it."""

    program: str
    gradient: str
    arrays: str
    probe: dict[str, list[list[float]]]
    versions: dict[str, str]
    question: str
    images: str
    begun_by: dict[str, str]  # versions that began the evaluation, if they were others


class SampledSearch(TypedDict):
    """What a search in full precision found of survivors of one in lower precision."""

    survivors: int  # of the search in lower precision
    sampled: int  # of them, at random, were searched again
    fooled: int  # of these
    at_most: float  # share of all survivors that would be, with 95 % confidence
    fooled_of_all: int | None  # once all of them were searched again; None: they were not
    robust_at_least: float  # accuracy that such a search of all would have left, so far as known


class FastSample(TypedDict):
    """What the standard version's other attacks found of a sample of the fast version's survivors.

    Source of the bound: the hypergeometric distribution, see `survivors.most_fooled`.
    """

    survivors: int  # of the attacks that all images met
    sampled: int  # of them, at random, met all that the standard version has left
    fooled: int  # of these
    fallen: list[int]  # ids of those, which stood under what all images met
    at_most: int  # of the other survivors that would be, too, with probability `level`
    level: float
    robust_at_least: float  # accuracy that the standard version would leave, with that probability


class StoppedSequence(TypedDict, total=False):
    """When and why an evaluation stopped before its images ended, and what it knows of all."""

    stopped_after: int  # images that were decided, the first ones of the order
    of: int  # images that could be met
    images: str  # ids of all images of the evaluation
    rule: str  # what stopped it: "ahead", "tie", "width", or "images", which ended
    alpha: float  # probability of an error, of each claim, over all looks together
    order_seed: int  # of the order of the images
    clean: Interval  # the sequence's bounds of the accuracies on all those images
    robust: Interval
    until_width: float  # that was asked for, a share
    tie: float  # the same
    leads: str  # "this" or "other"
    difference: Interval  # of the robust accuracies, this minus the other
    gained: int  # images that this network alone withstands
    lost: int
    e_value: float  # the largest, that their shares are not equal
    against_sha256: str  # of the ids and verdicts that it was compared with
    against: dict[str, Any]  # the record that has these: its evaluation, model and weights
