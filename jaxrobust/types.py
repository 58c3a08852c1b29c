"""The types that the packages share: what an image batch, a network, a threat and an attack are.

Shape letters, project-wide: `B` batch, `H W` pixels, `C` classes (or image channels after `H W`).
Images are float in [0, 1] with radii in the same units; `uint8` only between host and device.

`Images` to `Keys` are arrays of a shape. To a type checker and to a program they are plain arrays;
the tests have each call compared with them (tests/support/starting.py), where a letter is one size
within a call. So they stand only where nothing else is ever valid, and where no `ValueError` of
ours says more.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Key, Shaped

Array = jax.Array
Images = Float[Array, "B H W channels"]
GivenImages = Shaped[Array | np.ndarray, "B H W channels"]  # before a look at their dtype
Points = Float[Array, "B *pixels"]  # images, whatever an attack makes of them
Logits = Float[Array, "B C"]
SoftLabels = Float[Array, "B C"]  # probabilities
Labels = Integer[Array, " B"]  # classes
PerImage = Float[Array, " B"]
Counts = Integer[Array, " B"]  # and ids, levels
Mask = Bool[Array, " B"]
Keys = Key[Array, " B"]
Start = str | Array | np.ndarray  # "image", "random", or the points themselves
Params = dict[str, Array]  # flat, dotted names that mirror timm's
LogitsFn = Callable[[Array], Array]  # f[B,H,W,C] in [0,1] -> f[B,C]
ModuleMaker = Callable[[Any], Any]  # `Draws` -> the module that a network is made of
# (network, key or keys or None, images, targets) -> images_adv, or with `info` a pair
Attack = Callable[[Any, Array | None, Array, Any], Any]

# How the forward passes that decide multiply: by default a TPU makes one bfloat16 product of two
# float32 numbers, and an NVIDIA GPU may make one of TF32.
VERDICT_PRECISION = "highest"


class Batch(NamedTuple):
    """A training batch: `images` f32[B,H,W,C], `labels` i32[B] or soft targets f32[B,C]."""

    images: Array
    labels: Array


class Classifier(NamedTuple):
    """A network as two pure functions.

    `init(key) -> (params, stats)`;
    `apply(params, stats, images, *, train=False, key=None) -> (logits, stats)`; with keys [B] no
    draw of an image depends on the others.
    """

    init: Callable[[Array], tuple[Params, Params]]
    apply: Callable[..., tuple[Array, Params]]


class Weights(NamedTuple):
    """What a network is evaluated with."""

    params: Params
    stats: Params


NORMS = ("linf", "l2", "l1")  # of balls that most attacks project onto
THREAT_NORMS = (*NORMS, "l0")  # l0 counts changed pixels, each in all of its channels


@dataclass(frozen=True)
class Threat:
    """A ball that adversarial images lie in.

    Raises:
      ValueError: no norm, or no radius; see `check_norm` and `check_radius`.

    >>> str(Threat("linf", 4 / 255)), Threat("l2", 0.5).settings()
    ('linf 0.01569', {'norm': 'l2', 'epsilon': 0.5})
    """

    norm: str
    epsilon: float  # in units of pixels in [0, 1]; in l0 the number of pixels

    def __post_init__(self) -> None:
        """Refuse what is not a ball."""
        check_norm(self.norm, THREAT_NORMS)
        check_radius(self.norm, self.epsilon)

    def __str__(self) -> str:
        return f"{self.norm} {self.epsilon:.4g}"

    @classmethod
    def of(cls, settings: Any) -> "Threat":
        """Read the ball of an attack's settings, of a record or of a config; refuse several."""
        own, *others = threats(settings)
        if others:
            raise ValueError(
                f"several norms, {', '.join(map(str, (own, *others)))}, are trained, selected and "
                "tested together, but this takes one; name it"
            )
        return own

    @classmethod
    def only(cls, settings: Any) -> "Threat | None":
        """Read the ball as `of` does; None: there are several."""
        own, *others = threats(settings)
        return None if others else own

    def written(self) -> str:
        """Write the threat as papers do: "linf 8/255", "l2 0.5"."""
        return f"{self.norm} {fraction(self.epsilon)}"

    def settings(self) -> dict[str, Any]:
        """Write the ball as records have it and functions take it."""
        return {"norm": self.norm, "epsilon": self.epsilon}


def threats(settings: Any) -> tuple[Threat, ...]:
    """Read one ball or several of an attack's settings: `norm` and `epsilon` are one, or lists.

    >>> [str(ball) for ball in threats({"norm": ("linf", "l2"), "epsilon": (0.03125, 0.5)})]
    ['linf 0.03125', 'l2 0.5']

    Raises:
      ValueError: no radius for each norm, a norm twice, or what is not a ball.
    """
    norms, radii = settings["norm"], settings["epsilon"]
    norms = (norms,) if isinstance(norms, str) else tuple(norms)
    radii = tuple(radii) if isinstance(radii, list | tuple) else (radii,)
    if len(norms) != len(radii) or not norms:
        raise ValueError(
            f"norm={','.join(map(str, norms))} and epsilon={','.join(map(str, radii))}: give a "
            "radius for each norm, in their order"
        )
    for norm in norms:
        if norms.count(norm) > 1:
            raise ValueError(f"norm={','.join(map(str, norms))} names {norm} twice; name it once")
    return tuple(map(Threat, norms, radii))


def fraction(epsilon: float) -> str:
    """Write a radius as people do: 4/255, or 0.1."""
    levels = 255 * epsilon
    whole = 0 < round(levels) <= 64 and abs(levels - round(levels)) < 1e-3
    return f"{round(levels)}/255" if whole else f"{epsilon:.4g}"


def check_norm(norm: str, norms: tuple[str, ...] = NORMS) -> None:
    """Refuse an unknown norm."""
    if norm not in norms:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(norms)}")


def check_radius(norm: str, epsilon: float) -> None:
    """Refuse a radius that is not a number, below 0, not finite, above 1 on Linf, or no count on
    L0.
    """
    epsilon = check_number("epsilon", epsilon)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon={epsilon} is not a radius; pass a finite number >= 0")
    check_length("epsilon", epsilon, norm)
    if norm == "l0" and epsilon % 1:
        raise ValueError(f"epsilon={epsilon} is not a number of pixels; pass one, such as 24")


def check_length(name: str, value: float, norm: str = "linf") -> None:
    """Refuse a length of pixels above 1 on Linf, which is meant in 0..255.

    >>> check_length("step_size", 2 / 255), check_length("step_size", 1.5, "l2")
    (None, None)
    """
    if norm == "linf" and value > 1:
        remedy = f"write {value:g}/255" if value <= 255 else "pass a value of at most 1"
        raise ValueError(f"{name}={value} is larger than the pixel range [0, 1]; {remedy}")


def check_threat(threat: Threat, size: int, channels: int) -> None:
    """Refuse a radius that is probably meant in another norm, or holds every image."""
    norm, epsilon = threat.norm, threat.epsilon
    if norm == "l1" and 0 < epsilon < 1:
        raise ValueError(
            f"a radius of {epsilon:.4g} in l1 changes less than one pixel; it is the radius of an "
            "Linf ball: write linf, or an l1 radius such as 12"
        )
    pixels = channels * size**2
    largest = {"linf": 1, "l2": math.sqrt(pixels), "l1": pixels, "l0": size**2}[norm]
    if epsilon > largest:
        raise ValueError(
            f"a radius of {epsilon:g} in {norm} holds every image of {size}x{size} pixels in "
            f"[0, 1], two of which are at most {largest:.4g} apart; give it in that range"
        )


def check_number(name: str, value: Any) -> float:
    """Read a setting as a number; `ValueError` if it is not one."""
    try:
        if not isinstance(value, str):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name}={value!r} is not a number; pass one, without quotes (4/255)")


# A masked class lies below -500, and by this factor below the largest logit of the others.
_MASKED, _FACTOR = -500.0, 200


def unmasked(logits: np.ndarray) -> np.ndarray:
    """Find the classes of logits f[n,K] that no large negative constant masks, bool[K].

    A scale of logits is taken over these alone. Rows with NaN or infinities are left out.

    >>> unmasked(np.array([[2.0, -1.0, -1e9], [0.5, 3.0, -1e9]]))
    array([ True,  True, False])
    """
    logits = np.asarray(logits, np.float64)
    logits = logits[np.isfinite(logits).all(axis=1)]
    if not len(logits):
        return np.ones(logits.shape[1], bool)
    highest = logits.max(axis=0)
    order = np.argsort(-highest, kind="stable")
    size = np.maximum.accumulate(np.abs(logits[:, order]).max(axis=0))
    # Two classes at least are answers.
    below = highest[order][2:] < np.minimum(_MASKED, -_FACTOR * size[1:-1])
    count = int(below.argmax()) + 2 if below.any() else len(order)
    return np.isin(np.arange(len(order)), order[:count])


def is_count(value: Any) -> bool:
    """Tell whether a value is an int of at least 1, also one of NumPy."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        return False


class Geometry(NamedTuple):
    """The geometry of one norm; every function works per image on `[B, ...]` arrays.

    `sample(keys, images, epsilon) -> points`: AutoAttack's random start, inside the box.
    `project(points, images, epsilon) -> points`: into ball and box [0, 1].
    `ascend(points, gradient, step, kept) -> points`: one steepest-ascent step, not projected;
    only L1 reads `kept` f[B], the fraction of entries that move.
    `settle(points, images) -> points`: an iterate as it is handed out, free of rounding residue.
    `fill(keys, images, epsilon) -> points`: uniform in the ball, whatever the box; None: not known.
    """

    sample: Callable[..., Array]
    project: Callable[..., Array]
    ascend: Callable[..., Array]
    settle: Callable[[Array, Array], Array]
    fill: Callable[..., Array] | None = None


class Machine(NamedTuple):
    """An iterative attack that asks for evaluations instead of calling the network.

    `init(images, labels, *, keys=None, targets=None, start="image") -> state` with keys [B], target
    classes i32[B] and a start "image", "random" or an array of points; a machine ignores what it
    does not read. `query(state) -> points`, `loss(state, outputs) -> f[B]`,
    `score(state, outputs) -> f[B]` (None: the machine reads no score),
    `tell(state, loss f[B], score f[B], gradient) -> state`, `finished(state) -> bool[B]`,
    `result(state) -> images_adv`.
    The gradient is that of the *sum* of the losses in the points, or None for a machine without
    `gradient`. A loss f[B, T] has T of them, one for each class; `tell` then gets the loss and the
    gradient of the class of least `distance(state, loss f[B], gradient, class)`, the first of
    equals.
    One step is query and tell. With a `check(state, score) -> state`, a second query without
    gradient follows, and only its points are adversarial examples.
    `counts(state) -> bool[B]` is True where the point to be evaluated is inside the ball, so that
    it is an adversarial example if misclassified; None: always.
    `logits`: the network must return logits f[B, C], and the targets are classes.
    """

    init: Callable[..., Any]
    query: Callable[[Any], Array]
    loss: Callable[[Any, Any], Array]
    tell: Callable[[Any, Array, Any, Any], Any]
    finished: Callable[[Any], Array]
    result: Callable[[Any], Array]
    score: Callable[[Any, Any], Array] | None = None
    check: Callable[[Any, Any], Any] | None = None
    counts: Callable[[Any], Array] | None = None
    distance: Callable[[Any, Array, Array, Array], Array] | None = None
    gradient: bool = True
    logits: bool = True
