"""The types that the packages share: image batches, networks, threats and attacks.

Shape letters, project-wide: `B` batch, `H W` pixels, `C` classes (or image channels after `H W`).
Images are float in [0, 1] with radii in the same units; `uint8` only between host and device.

`Images` to `Keys` are arrays with a shape. For type checkers and programs they are plain arrays.
The tests check each call against them (tests/support/starting.py), where a letter means one size
within a call. So they are used only where nothing else is ever valid, and where no `ValueError` of
ours says more.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Key, Shaped

from jaxrobust.runtime.threats import *  # noqa: F403  # which needs no JAX

Array = jax.Array
Images = Float[Array, "B H W channels"]
GivenImages = Shaped[Array | np.ndarray, "B H W channels"]  # before the check of their dtype
Points = Float[Array, "B *pixels"]  # images, or any points that an attack makes from them
Logits = Float[Array, "B C"]
SoftLabels = Float[Array, "B C"]  # probabilities
Labels = Integer[Array, " B"]  # classes
PerImage = Float[Array, " B"]
Counts = Integer[Array, " B"]  # also ids, levels
Mask = Bool[Array, " B"]
Keys = Key[Array, " B"]
Start = str | Array | np.ndarray  # "image", "random", or the points themselves
Params = dict[str, Array]  # flat, dotted names that mirror timm's
LogitsFn = Callable[[Array], Array]  # f[B,H,W,C] in [0,1] -> f[B,C]
ModuleMaker = Callable[[Any], Any]  # `Draws` -> a network's module
# (network, key or keys or None, images, targets) -> images_adv, or with `info` a pair
Attack = Callable[[Any, Array | None, Array, Any], Any]

# Precision of matrix products in the passes that decide verdicts: by default a TPU multiplies
# float32 numbers in bfloat16, and an NVIDIA GPU may do so in TF32.
VERDICT_PRECISION = "highest"


class Batch(NamedTuple):
    """A training batch: `images` f32[B,H,W,C], `labels` i32[B] or soft targets f32[B,C]."""

    images: Array
    labels: Array


class Classifier(NamedTuple):
    """A network as two pure functions.

    `init(key) -> (params, stats)`;
    `apply(params, stats, images, *, train=False, key=None) -> (logits, stats)`; with keys [B], an
    image's draws do not depend on the other images.
    """

    init: Callable[[Array], tuple[Params, Params]]
    apply: Callable[..., tuple[Array, Params]]


class Weights(NamedTuple):
    """The weights to evaluate a network with."""

    params: Params
    stats: Params


# A masked class is below -500, and by this factor below the others' largest logit.
_MASKED, _FACTOR = -500.0, 200


def unmasked(logits: np.ndarray) -> np.ndarray:
    """Return the classes of logits f[n,K] that no large negative constant masks, bool[K].

    The scale of logits is computed from these only. Rows with NaN or infinities are skipped.

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
    # At least two classes remain.
    below = highest[order][2:] < np.minimum(_MASKED, -_FACTOR * size[1:-1])
    count = int(below.argmax()) + 2 if below.any() else len(order)
    return np.isin(np.arange(len(order)), order[:count])


def is_count(value: Any) -> bool:
    """Return whether a value is an int of at least 1; NumPy's integers count."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        return False


class Geometry(NamedTuple):
    """The geometry of one norm; every function works per image on `[B, ...]` arrays.

    `sample(keys, images, epsilon) -> points`: AutoAttack's random start, inside the box.
    `project(points, images, epsilon) -> points`: into ball and box [0, 1].
    `ascend(points, gradient, step, kept) -> points`: one steepest-ascent step, not projected;
    only L1 uses `kept` f[B], the fraction of entries that move.
    `settle(points, images) -> points`: an iterate to return, free of rounding residue.
    `fill(keys, images, epsilon) -> points`: uniform in the ball, ignoring the box; None: unknown.
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
    does not need. `query(state) -> points`, `loss(state, outputs) -> f[B]`,
    `score(state, outputs) -> f[B]` (None: the machine uses no score),
    `tell(state, loss f[B], score f[B], gradient) -> state`, `finished(state) -> bool[B]`,
    `result(state) -> images_adv`.
    The gradient is that of the *sum* of the losses, with respect to the points, or None for a
    machine without `gradient`. A loss f[B, T] has T of them, one per class; `tell` then gets the
    loss and gradient of the class with the smallest `distance(state, loss f[B], gradient, class)`,
    the first of equal ones.
    One step is query and tell. With a `check(state, score) -> state`, a second query without
    gradient follows, and only its points can be adversarial examples.
    `counts(state) -> bool[B]` is True if the point to evaluate is inside the ball, so that it is an
    adversarial example if misclassified; None: always.
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
