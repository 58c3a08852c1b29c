"""The losses that attacks maximize: f[B] per image from logits f[B, C]; larger is worse.

All take unnormalized logits and are differentiable throughout, including sorted logits. A label
outside [0, C) has no defined loss. Soft targets, or fewer classes than a loss needs, raise
`ValueError`. Parity: tests/attacks/test_losses.py.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.types import Array, Labels, Logits, Mask, PerImage, SoftLabels


def ce_loss(logits: Logits, labels: Array) -> PerImage:
    """Compute the cross-entropy with labels i32[B], or soft targets f[B, C] (mixup, smoothing)."""
    if labels.shape == logits.shape[:1]:
        return jax.nn.logsumexp(logits, axis=1) - _pick(logits, labels)
    _need_probabilities("ce", logits, labels, "pass labels i32[B] or soft targets f[B, C]")
    return -jnp.sum(labels.astype(logits.dtype) * jax.nn.log_softmax(logits, axis=1), axis=1)


def kl_loss(logits: Logits, target_probabilities: Array) -> PerImage:
    """Compute the Kullback-Leibler divergence of softmax(logits) from the targets (TRADES).

    Rows of `target_probabilities` sum to 1; zeros are allowed.
    Source: Zhang et al. 2019 (arXiv 1901.08573), eq. 5, inner maximization.
    """
    remedy = "pass the softmax of the clean logits"
    _need_probabilities("kl", logits, target_probabilities, remedy)
    p = target_probabilities.astype(logits.dtype)
    log_q = jax.nn.log_softmax(logits, axis=1)
    return jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, axis=1)


def cw_loss(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the margin: the largest other logit minus the label's; positive means misclassified.

    Source: Carlini & Wagner 2017 (arXiv 1608.04644), f_6 without its bound.
    """
    _need_classes("cw", logits, labels, 2)
    is_label = jnp.arange(logits.shape[1])[None, :] == labels[:, None].astype(int)
    # By index, so that tied runners-up do not share the gradient.
    rival = jnp.argmax(jnp.where(is_label, -jnp.inf, logits), axis=1)
    return _pick(logits, rival) - _pick(logits, labels)


def floored_cw_loss(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the margin, but at most 0: misclassified images have no gradient and stay.

    Source: the "CW" attack of Huang et al. 2022 (arXiv 2212.11005); parity:
      tests/evaluation/engine/test_cifar_attacks.py.
    """
    margin = cw_loss(logits, labels)
    return jnp.where(margin <= 0, margin, 0)


def ce_cw_loss(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the cross-entropy while the label leads by at least 0.5, then the margin.

    Source: Zhong et al. 2024 (arXiv 2405.05075), as in the authors' code.
    """
    margin = cw_loss(logits, labels)
    return jnp.where(margin > -0.5, margin, ce_loss(logits, labels))


def pm_loss(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the probability margin: the largest other probability minus the label's.

    Source: Xie et al. 2024 (arXiv 2411.15210), the loss of PMA.
    """
    _need_classes("pm", logits, labels, 2)
    return cw_loss(jax.nn.softmax(logits, axis=1), labels)


def dlr_loss(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the difference-of-logits-ratio (DLR) loss, for at least 3 classes.

    It is invariant to adding a constant to the logits or scaling them by a positive number, and
    exactly 1, with zero gradient, if the label ranks third.
    Source: Croce & Hein 2020 (arXiv 2003.01690), eq. 6.
    """
    _need_classes("dlr", logits, labels, 3)
    top, index = _largest(logits, 3)
    label_is_top = index[:, 0].astype(labels.dtype) == labels
    other = jnp.where(label_is_top, top[:, 1], top[:, 0])
    return _ratio(-(_pick(logits, labels) - other), top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr_loss(logits: Logits, labels: Labels | SoftLabels, targets: Labels) -> PerImage:
    """Compute the DLR loss towards one target class per image, for at least 4 classes.

    Source: Croce & Hein 2020 (arXiv 2003.01690), eq. 7.
    """
    _need_classes("dlr-targeted", logits, labels, 4)
    top, _ = _largest(logits, 4)
    margin = _pick(logits, labels) - _pick(logits, targets)
    return _ratio(-margin, top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# The losses that attacks maximize, by name, for the argument `loss`.
LOSSES: dict[str, Callable[..., Array]] = {
    "ce": ce_loss,
    "dlr": dlr_loss,
    "dlr-targeted": targeted_dlr_loss,  # the only one with a third argument, the targets
    "cw": cw_loss,
    "cw-floor": floored_cw_loss,
    "ce-cw": ce_cw_loss,
    "pm": pm_loss,
    "kl": kl_loss,
}


# Codes, in place of a target, for the loss of an untargeted APGD run.
CE, DLR = -1, -2


def by_target(logits: Logits, labels: Labels | SoftLabels, targets: Labels) -> PerImage:
    """Compute targeted DLR, or the loss that a target encodes; margins if classes are few."""
    classes, aimed = logits.shape[1], jnp.maximum(targets, 0)
    dlr = dlr_loss if classes >= 3 else cw_loss
    if classes >= 4:
        targeted = targeted_dlr_loss(logits, labels, aimed)
    else:
        targeted = _pick(logits, aimed) - _pick(logits, labels)
    untargeted = jnp.where(targets == CE, ce_loss(logits, labels), dlr(logits, labels))
    return jnp.where(targets < 0, untargeted, targeted)


class Goal(NamedTuple):
    """What an attack works towards: the loss to maximize, and the score that defines success.

    `outputs` come from the network, and `targets` are what the attack receives with its images.
    Both are pytrees of arrays whose first axis is the image.
    """

    loss: Callable[..., Array]  # (outputs, targets) -> f[B]; larger is worse for the network
    score: Callable[[Any, Any], Array] | None = None  # (outputs, targets) -> f[B]; None: no success
    done: Callable[[Array], Array] = lambda score: score <= 0  # bool[B]: the attack has succeeded
    logits: bool = False  # outputs are logits f[B, C]; targets are labels i32[B] or f[B, C]
    aims: bool = False  # the loss takes a third argument, a class i32[B] to pull towards

    def value(self, outputs: Any, targets: Any, dtype: Any, classes: Any = None) -> PerImage:
        """Compute the loss in `dtype`; `ValueError` unless it returns one value per image."""
        batch = jax.tree.leaves(outputs)[0].shape[0]
        outputs = jax.tree.map(
            lambda x: (
                x.astype(dtype) if self.logits or jnp.issubdtype(x.dtype, jnp.floating) else x
            ),
            outputs,
        )
        arguments = [outputs, targets, *([classes] if self.aims else [])]
        if self.logits:
            return self.loss(*arguments)
        return _per_image("the loss", self.loss, arguments, batch, jnp.floating)

    def reached(self, score: Array | None, like: PerImage) -> Mask:
        """Return for each image whether its score means success; without a score, none does."""
        if score is None:
            return jnp.zeros_like(like, bool)
        return _per_image("Goal.done", self.done, [score], len(like), jnp.bool_)

    def state_score(self, state: Any, outputs: Any) -> PerImage:
        """Compute the score of a state with `labels`, as a machine does."""
        return self.scored(outputs, state.labels)

    def scored(self, outputs: Any, targets: Any) -> PerImage:
        """Compute the score; `ValueError` unless it returns one value per image."""
        assert self.score is not None
        batch = jax.tree.leaves(outputs)[0].shape[0]
        outputs = jax.tree.map(functools.partial(wide, votes=self.logits), outputs)
        score = _per_image("the score", self.score, [outputs, targets], batch, jnp.generic)
        return wide(score, votes=True)


def wide(values: Array, *, votes: bool = False) -> Array:
    """Convert floats narrower than 32 bits to float32, for sums and counts; integer `votes` too."""
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    narrow = is_float and jnp.finfo(values.dtype).bits < 32
    return values.astype(jnp.float32) if narrow or (votes and not is_float) else values


def _per_image(
    name: str, function: Callable[..., Any], arguments: list[Any], batch: int, kind: Any
) -> Array:
    """Call a user's function; `ValueError` unless it returns one value of a type per image."""
    try:
        values: PerImage = function(*arguments)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ValueError(
            f"{name} reads the values of arrays while it is traced; write it with jax.numpy, and "
            "use jnp.where instead of if"
        ) from error
    dtype = getattr(values, "dtype", type(values).__name__)
    shape = getattr(values, "shape", () if isinstance(values, float | int) else None)
    if shape == (batch,) and jnp.issubdtype(dtype, kind):
        return values
    problem, wanted = f"is of type {dtype}", "float for each image, f[B]"
    if shape not in (None, (batch,)):
        problem = f"has shape {shape}"
        wanted = "number for each image, f[B], such as a mean over all axes but the first"
    if kind is jnp.bool_:
        wanted = "bool for each image, bool[B], such as score <= 0"
    raise ValueError(f"{name} {problem} for {batch} images; return one {wanted}")


def is_right(logits: Logits, labels: Array) -> PerImage:
    """Score 1 where the largest logit is the label's, else 0."""
    if labels.ndim == 2:
        labels = jnp.argmax(labels, axis=1)
    return (jnp.argmax(logits, axis=1).astype(labels.dtype) == labels).astype(jnp.float32)


BY_TARGET = Goal(by_target, is_right, logits=True, aims=True)  # for AutoAttack's runs of APGD


def goal_of(loss: str | Callable[..., Array] | Goal) -> Goal:
    """Make a goal from a name in `LOSSES`, or from a function `(outputs, targets) -> f[B]`."""
    if callable(loss):
        loss = Goal(loss)
    if isinstance(loss, Goal):
        if not loss.logits:
            _check_takes("loss", loss.loss, "outputs", "targets")
            if loss.score is not None:
                _check_takes("Goal.score", loss.score, "outputs", "targets")
                _check_takes("Goal.done", loss.done, "score")
        return loss
    if isinstance(getattr(loss, "goal", None), Goal):
        raise ValueError("loss is a task; pass its goal instead: loss=task.goal")
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(
            f"loss={loss!r} is unknown; choose one of {', '.join(LOSSES)}, or pass a function "
            "(outputs, targets) -> f[B]"
        )
    return Goal(LOSSES[loss], is_right, logits=True, aims=loss == "dlr-targeted")


def _check_takes(name: str, function: Any, *arguments: str) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise ValueError(
            f"{name}={function!r} must be a function of {' and '.join(arguments)} ({error})"
        ) from error


def _pick(logits: Logits, index: Labels) -> PerImage:
    return jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0]


def _largest(logits: Logits, count: int) -> tuple[Array, Array]:
    """Return the `count` largest logits, descending, and their classes; last of equal ones first.

    The reference reads an ascending stable sort from its end. `top_k` prefers the first of equal
    entries, hence the flip: it decides which one gets the gradient of a tie.
    """
    _, index = jax.lax.top_k(jax.lax.stop_gradient(logits[:, ::-1]), count)
    index = logits.shape[1] - 1 - index
    return jnp.take_along_axis(logits, index, axis=1), index


@jax.custom_jvp
def _ratio(numerator: PerImage, denominator: PerImage) -> PerImage:
    return numerator / denominator


@_ratio.defjvp
def _ratio_jvp(primals: Any, tangents: Any) -> tuple[PerImage, PerImage]:
    # JAX's own rule squares the denominator: its rounding leaves 1e-7 where the two terms cancel
    # (the label ranks third), which sign() would turn into a full step. This form cancels exactly.
    (numerator, denominator), (d_numerator, d_denominator) = primals, tangents
    value = numerator / denominator
    return value, (d_numerator - value * d_denominator) / denominator


def _need_classes(name: str, logits: Array, labels: Array, least: int) -> None:
    if labels.ndim != 1:
        raise ValueError(
            f"loss {name!r} needs class labels i32[B], got shape {labels.shape}; "
            "use loss='ce' or 'kl' with soft targets"
        )
    if logits.shape[1] < least:
        raise ValueError(
            f"loss {name!r} needs at least {least} classes, but the logits have {logits.shape[1]}; "
            "use loss='ce'"
        )


def _need_probabilities(name: str, logits: Array, targets: Array, remedy: str) -> None:
    if targets.shape != logits.shape:  # it would broadcast, or fail far from here
        raise ValueError(
            f"loss {name!r}: targets of shape {targets.shape} do not fit logits of shape "
            f"{logits.shape}; {remedy}"
        )
