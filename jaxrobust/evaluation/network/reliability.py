"""Reliability checks: is the network what the attacks assume, and is the result what it seems?

A flag is a name and one sentence: the observation, with its number, and the remedy. `randomized`,
`softmax` (the reference's range check), `zero-gradients` and `square-improves` are the checks of
AutoAttack (auto-attack a392200). The others find mistakes that silently lower or raise robust
accuracy. Everything here is a pure function of NumPy arrays.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from jaxrobust.data.splits import balance
from jaxrobust.evaluation.network import collapse, tracing
from jaxrobust.evaluation.network.checks import answered, is_right
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.types import LogitsFn, unmasked

Flags = dict[str, str]
Forward = Callable[[np.ndarray], np.ndarray]  # f32[n,H,W,C] -> f[n,K], any n
_LOOKED_AT = 64  # images
ENOUGH = 32  # images for a statement about accuracy
_PASSES = 5
_ROUNDING = 1e-6  # of float32 sums, relative to the logits
_NORMALISATIONS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
}


def check_network(
    forward: Forward,
    logits_fn: LogitsFn,
    images: ImageSet,
    labels: np.ndarray,
    *,
    batch_size: int | None = None,
) -> Flags:
    """Flag what nine forward passes over at most 64 of the images show about a network.

    Args:
      forward: the compiled network.
      logits_fn: the function that `forward` compiles; only traced.
      images: f[N,H,W,C] in [0, 1], N = 0 included. The 64 are spread over the classes.
      batch_size: the batch to trace with, for a `logits_fn` that takes no other; default: all of
        these images.
    Returns:
      Any of `randomized`, `retraced`, `batch-dependent`, `nan-logits`, `constant-logits`,
      `softmax`, `low-accuracy`, `double-normalization`; empty for a healthy network. With fewer
      than 32 images, `low-accuracy` also reports that they cannot tell; the last flag needs 32
      images with three channels.
    """
    if not len(images):
        return {}
    chosen = balance.rows(labels, _LOOKED_AT)
    images = np.asarray(images[chosen], np.float32)
    labels = np.asarray(labels)[chosen]

    def logits_of(points: np.ndarray) -> np.ndarray:
        return np.asarray(forward(points)).astype(np.float64)

    passes = [logits_of(images) for _ in range(_PASSES)]
    logits, right = passes[0], is_right(passes[0], labels)
    flags = _randomized(passes, labels)
    flags |= _retraced(logits_fn, (batch_size or len(images), *images.shape[1:]))
    if "randomized" not in flags:  # else two passes differ anyway
        flags |= _batch_dependent(logits_of, images, logits)
    flags |= _degenerate(images, logits, labels)
    flags |= _softmax(logits)
    flags |= check_accuracy(right, int(unmasked(logits).sum()))
    if len(images) >= ENOUGH and images.shape[-1] == 3:
        flags |= _normalised_twice(logits_of, images, labels, right)
    return flags


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute a - b: 0 if both are NaN or the same infinity, infinite if only one is."""
    with np.errstate(invalid="ignore"):
        delta = np.nan_to_num(a - b, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, delta)


def _randomized(passes: Sequence[np.ndarray], labels: np.ndarray) -> Flags:
    classes = unmasked(passes[0])
    pairs = itertools.combinations([logits[:, classes] for logits in passes], 2)
    distance = max(_apart(a, b).max() for a, b in pairs)
    correct = {int(is_right(logits, labels).sum()) for logits in passes}
    if distance <= 1e-4 and len(correct) == 1:
        return {}
    return {
        "randomized": f"{len(passes)} passes over the same {len(labels)} images differ (normalized "
        f"logits by up to {distance:.2g}, {min(correct)} to {max(correct)} images correct). A "
        "random network looks robust to attacks that expect a deterministic one; use "
        "version='rand' with a logits_fn(images, keys), or turn off the randomness"
    }


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the distance of logits f[n,K] relative to their length without the mean, f[n]."""
    with np.errstate(invalid="ignore"):  # infinity - infinity
        length = np.linalg.norm(a - a.mean(axis=1, keepdims=True), axis=1)
        length = np.maximum(length, 2e-3 * np.linalg.norm(a, axis=1))  # float32 resolves no more
    moved = np.linalg.norm(_difference(a, b), axis=1)
    return np.asarray(moved / (np.where(np.isfinite(length), length, 1) + 1e-10))


def _retraced(logits_fn: LogitsFn, shape: tuple[int, ...]) -> Flags:
    remedy = (
        "so its results depend on when it is compiled; do not draw NumPy or Python random numbers "
        "or change state inside logits_fn (use evaluation mode: no dropout, train=False)"
    )
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        # Lambdas, because a second trace of the same function would come from the cache.
        first = jax.make_jaxpr(lambda images: logits_fn(images))(images)
        # A jitted function would also hit its cache; metadata is part of the key.
        with set_xla_metadata(jaxrobust_check="retrace"):
            second = jax.make_jaxpr(lambda images: logits_fn(images))(images)
    except jax.errors.UnexpectedTracerError:
        return {"retraced": f"tracing logits_fn twice fails: it stores traced values, {remedy}"}
    # A value from an earlier trace has no hash.
    constants = (*tracing.constants(first), *tracing.constants(second))
    if not any(isinstance(constant, jax.core.Tracer) for constant in constants):
        programs = tracing.Programs()
        if programs.hashed(first) == programs.hashed(second):
            return {}
    return {"retraced": f"tracing logits_fn twice gives two different programs, {remedy}"}


def _batch_dependent(logits_of: Forward, images: np.ndarray, logits: np.ndarray) -> Flags:
    # Every image moves to another place, among bright ones of low contrast. Mean and variance of a
    # batch change, even if all images fit into one batch.
    others = 1 - images[::-1] / 10
    among = np.stack([others, images], axis=1).reshape(-1, *images.shape[1:])
    classes = unmasked(logits)
    moved = np.abs(_difference(logits, logits_of(among)[1::2])[:, classes]).max()
    finite = logits[:, classes][np.isfinite(logits[:, classes])]
    spread, largest = (np.ptp(finite), np.abs(finite).max()) if finite.size else (0, 0)
    if moved <= max(1e-3 * spread, _ROUNDING * largest):
        return {}
    return {
        "batch-dependent": f"the logits of an image change by up to {moved:.3g} (logits span "
        f"{spread:.3g}) when the other images in its batch change, as with batch norm or dropout "
        "in train mode. Attacked images then protect each other; evaluate with train=False"
    }


_OVERFLOW = "look for overflow in a half-precision type, division by zero, log(0) or broken weights"
_BROKEN = {
    "logits": f"{_OVERFLOW}, and mask classes with a large negative number such as -1e9, not -inf",
    "scores": f"{_OVERFLOW}, and for NaN in the targets",
}


def _unanswered(finite: np.ndarray, of: str = "logits") -> Flags:
    if not (broken := int((~finite).sum())):
        return {}
    return {
        f"nan-{of}": f"{broken} of {finite.size} images have NaN or infinite {of}, which attacks "
        f"cannot use, so these images count as wrong; {_BROKEN[of]}"
    }


def check_answers(
    finite: np.ndarray,
    fooled_by: Sequence[str] | np.ndarray = (),
    reached: Any = (),
    of: str = "logits",
) -> Flags:
    """Flag `nan-logits`, or `nan-scores`, of clean images bool[N], and `nan-under-attack`.

    An image without finite logits counts as wrong, clean or attacked. `reached` is i[N], the class
    predicted under the attack; -1: none.
    """
    if finite.size and not finite.any():
        raise ValueError(
            f"the {of} of all {finite.size} images are NaN or infinite before any attack, so no "
            f"accuracy of this network is meaningful; {_BROKEN[of]}"
        )
    flags = _unanswered(finite, of)
    hit = ~np.isin(fooled_by, ("", "clean")) & (np.asarray(reached) < 0)
    if silent := int(hit.sum()):
        flags["nan-under-attack"] = (
            f"{silent} of {finite.size} images have NaN or infinite {of} or pixels under an "
            "attack. They count as fooled, although the network does not predict another class; "
            f"{_BROKEN[of]}, and for undefined gradients, such as the gradient of sqrt at 0"
        )
    return flags


def check_slopes(probe: dict[str, list[list[float]]]) -> Flags:
    """Flag `nan-gradients` if a probe's logits are finite but its input gradients are not."""
    logits, gradients = (
        [*probe[name], *probe.get(f"spread_{name}", ())] for name in ("logits", "gradients")
    )
    broken = sum(row[0] >= 0 > slope[0] for row, slope in zip(logits, gradients, strict=True))
    if not broken:
        return {}
    return {
        "nan-gradients": f"the input gradients of {broken} of {len(logits)} noisy images "
        "are NaN or infinite, though their logits are finite: gradient-based attacks fail, and "
        "the network looks robust; look for sqrt, norm or log at 0, and make their arguments safe "
        "before jnp.where selects a result"
    }


def _degenerate(images: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> Flags:
    is_finite = answered(logits)
    flags, finite = _unanswered(is_finite), logits[is_finite]
    if not len(finite):
        return flags
    answers = finite[:, unmasked(finite)]
    # One class may be constant and large; rounding scales with the size of most classes.
    sizes = np.abs(answers).max(axis=0)
    sizes = np.maximum(sizes, np.sort(sizes)[(len(sizes) - 1) // 2])
    same = len(finite) > 1 and (np.ptp(answers, axis=0) <= _ROUNDING * sizes).all()
    guesses = collapse.beyond_chance(finite.argmax(axis=1), labels[is_finite]) <= 0
    if same and guesses and np.ptp(images, axis=0).any():
        flags["constant-logits"] = (
            f"all {len(finite)} images have the same logits: the network ignores its input; "
            "check that the weights are loaded and that logits_fn uses its argument"
        )
    elif flat := int((np.ptp(answers, axis=1) == 0).sum()):
        flags["constant-logits"] = (
            f"all logits are equal for {flat} of {len(logits)} images: they have no class and no "
            "gradient; return the logits before any ReLU, threshold or clipping"
        )
    return flags


def _softmax(logits: np.ndarray) -> Flags:
    # Log-softmax is harmless: it shifts the logits of an image by a constant, and all losses (CE,
    # DLR, the margins of FAB and Square) ignore such a shift.
    logits = logits[answered(logits)][:, unmasked(logits)]
    inside = logits.size and logits.min() > -1e-5 and logits.max() < 1 + 1e-5
    if not inside or np.abs(logits.sum(axis=1) - 1).max() >= 1e-5:
        return {}
    return {
        "softmax": f"the outputs lie in [{logits.min():.3g}, {logits.max():.3g}] and sum to 1: "
        "they are probabilities, in which float32 hides the gradients of confident images; return "
        "the logits before the softmax"
    }


def _above_chance(correct: np.ndarray, classes: int) -> bool:
    chance = 1 / classes
    return bool(correct.mean() > chance + 3 * math.sqrt(chance * (1 - chance) / len(correct)))


def check_accuracy(correct: np.ndarray, classes: int) -> Flags:
    """Flag `low-accuracy` if clean images, bool[n], are right no more often than by guessing.

    If there are too few images to tell at the 5% level, the flag is raised unless all are right.
    """
    n, right = len(correct), int(correct.sum())
    words = f"{right} of {n} clean images are classified correctly"
    if n >= ENOUGH:
        if _above_chance(correct, classes):
            return {}
        return {
            "low-accuracy": f"{words}, no better than guessing among {classes} classes; "
            "check the weights, the order of the classes, the order of the channels (RGB) and the "
            "normalization inside logits_fn"
        }
    from scipy.special import bdtrc  # its import takes 0.1 s

    by_chance = float(bdtrc(right - 1, n, 1 / classes)) if right else 1.0
    if right == n or by_chance <= 0.05:
        return {}
    return {
        "low-accuracy": f"{words}; guessing among {classes} classes does as well with "
        f"probability {by_chance:.2g}, so these images are too few to tell this network from "
        f"guessing; evaluate {ENOUGH} or more before you quote an accuracy"
    }


def _normalised_twice(
    logits_of: Forward, images: np.ndarray, labels: np.ndarray, correct: np.ndarray
) -> Flags:
    """Flag a `logits_fn` that computes net(n(n(x))): `x * std + mean`, n's inverse, cancels one n.

    A sound network loses accuracy on such pale images (the golden networks 20 and 40 points). A
    guessing network may gain by guessing another class, hence the second condition. A defect that
    costs under 10 points goes unnoticed: adversarially trained networks tolerate much contrast.
    """
    best, constants_of = 0, ""
    for name, constants in _NORMALISATIONS.items():
        mean, std = (np.asarray(c, np.float32) for c in constants)
        logits = logits_of(images * std + mean)
        undone = is_right(logits, labels)
        classes = int(unmasked(logits).sum())
        if undone.sum() > best and _above_chance(undone, classes):
            best, constants_of = int(undone.sum()), name
    if best - correct.sum() <= 0.1 * len(labels):
        return {}
    return {
        "double-normalization": f"{correct.sum()} of {len(labels)} clean images are classified "
        f"correctly, but {best} once the {constants_of} normalization is undone: logits_fn "
        "normalizes before a network that normalizes itself; remove one of the two"
    }


def check_gradients(zero: np.ndarray) -> Flags:
    """Flag `zero-gradients` if too many first gradients of an untargeted attack vanish, bool[n]."""
    zero = np.asarray(zero, bool)
    if not zero.size or zero.mean() <= 0.01:
        return {}
    return {
        "zero-gradients": f"the first gradient is exactly zero for {zero.sum()} of {zero.size} "
        f"images ({zero.mean():.1%}): gradients are masked (a saturated softmax in float32, "
        "rounding or quantization, a straight-through step), and the gradient attacks overstate "
        "robustness; attack the network before that operation, and trust only Square and a "
        "transfer attack"
    }


def check_cascade(accuracy_after: dict[str, float]) -> Flags:
    """Flag `square-improves` if the black-box attack beats the gradient attacks.

    `accuracy_after` has the accuracy after each attack, the clean one among them, in any order.
    """
    others = [value for name, value in accuracy_after.items() if name != "square"]
    if "square" not in accuracy_after or len(others) < 2:
        return {}
    square = accuracy_after["square"]
    if square >= min(others) - 0.002:
        return {}
    return {
        "square-improves": f"Square lowers the accuracy from {min(others):.2%} to {square:.2%} "
        "without gradients, so gradients are masked, and the true robustness is probably even "
        "lower; add an adaptive attack on the operation that masks them, or Square with more "
        "queries"
    }
