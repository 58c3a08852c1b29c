"""Training that deceives itself: weak attacks, meaningless gradients, unusable batch norms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import mixes
from jaxrobust.config import Config
from jaxrobust.models.interface.network_inputs import cast, unit_range
from jaxrobust.training.update import objectives
from jaxrobust.training.update.objectives import cross_entropy
from jaxrobust.training.update.step import GradientParts
from jaxrobust.types import Array, Attack, Batch, Classifier, LogitsFn, Params

MIX = "worst"  # the search with several norms
STRONGER = 3  # additional steps of the stronger attack
_ROUNDING = 2**-22  # relative, of a probability; a 1 from XLA's softmax may be off by 2**-24


def probe(
    params: Params,
    stats: Params,
    attack_options: dict[str, Array],
    batch: Batch,
    keys: Array,
    *,
    parts: GradientParts,
    net32: Classifier,
    stronger_attack: Attack,
) -> dict[str, Array]:
    """Measure the attack and the gradient that training relies on, on some of its images.

    The network is in evaluation mode, whatever `attack.statistics` says.

    Args:
      params: float32, not split over devices.
      attack_options: as in `step.adversarial_gradients`.
      batch: of a device: images uint8 or f32[B,H,W,C], labels i32[B] or f32[B,C].
      keys: one, or [B] (see `attacks.image_keys`); both attacks start at the same point.
      net32: the network in `parts`, in float32.
      stronger_attack: the attack in `parts` with `STRONGER` more steps.
    Returns:
      f32[] each, the same on every device:
      `alarm_loss`, `alarm_loss_stronger`: cross-entropy on the images that the attacks find.
      `alarm_gradient_zero`: the share of images whose pixel gradient of the cross-entropy is zero
        or mere rounding, since all probabilities are 0 or 1 in float32.
      `alarm_gradient_agreement`: on the other images, the share of pixels where the gradient has
        the same sign in the compute type and in float32 with exact products; 1 if there are none.
    Source: Wong et al. 2020 (arXiv 2001.03994), Andriushchenko & Flammarion 2020 (arXiv
      2007.02617) for the stronger attack; Athalye et al. 2018 (arXiv 1802.00420) for the gradient.
    """
    images, labels = unit_range(batch.images), batch.labels
    computed = cast(params, parts.dtype)

    def logits_fn(x: Array) -> Array:
        return parts.net.apply(computed, stats, x)[0]

    def gradient(logits_fn: LogitsFn) -> tuple[Array, Array]:
        """Return the gradient's signs, and the images where it is more than the rounding of a 1."""

        def loss(x: Array) -> tuple[Array, Array]:
            logits = logits_fn(x)
            return cross_entropy(logits, labels).sum(), jax.nn.softmax(logits)

        slope, probabilities = jax.grad(loss, has_aux=True)(images)
        signs = jnp.sign(slope).reshape(len(images), -1)
        wanted = jax.nn.one_hot(labels, probabilities.shape[1]) if labels.ndim == 1 else labels
        uncertain = (jnp.abs(probabilities - wanted) > _ROUNDING * wanted).any(axis=1)
        return signs, uncertain & (signs != 0).any(axis=1)

    targets = parts.objective.attack_targets(logits_fn, Batch(images, labels))
    signs, has_signs = gradient(logits_fn)
    with jax.default_matmul_precision("highest"):  # on a TPU, float32 would otherwise be bfloat16
        exact, has_exact = gradient(lambda x: net32.apply(params, stats, x)[0])
    counted = ((signs != 0) | (exact != 0)) & (has_signs & has_exact)[:, None]
    adversarial = [
        attack(logits_fn, keys, images, targets, **attack_options)
        for attack in (parts.attack, stronger_attack)
    ]
    same, counted, without, *losses = parts.mean_over_devices(
        [
            (counted & (signs == exact)).mean(dtype=jnp.float32),
            counted.mean(dtype=jnp.float32),
            (~has_signs).mean(dtype=jnp.float32),
            *(cross_entropy(logits_fn(images_adv), labels).mean() for images_adv in adversarial),
        ]
    )
    return {
        "alarm_loss": losses[0],
        "alarm_loss_stronger": losses[1],
        "alarm_gradient_agreement": jnp.where(counted > 0, same / counted, 1.0),
        "alarm_gradient_zero": without,
    }


def warnings(
    values: dict[str, float],
    *,
    loss_ratio: float = 2.0,
    loss_rise: float = 0.5,
    agreement: float = 0.8,
    zero: float = 0.1,
) -> list[str]:
    """Explain the figures of a `probe`, one sentence for each that is out of range; a non-finite
    figure is not mentioned, since the trainer stops at it.

    The stronger attack's loss is suspicious above `loss_ratio` times the training attack's and
    `loss_rise` more than it, which excludes pairs of small losses. `agreement` is the smallest
    share of equal signs, `zero` the largest share of images without a gradient.
    """
    loss, stronger, same, without = (
        values[f"alarm_{key}"]
        for key in ("loss", "loss_stronger", "gradient_agreement", "gradient_zero")
    )
    sentences = []
    if stronger > loss_ratio * loss and stronger > loss + loss_rise:
        sentences.append(
            f"the loss is {stronger:.3g} under an attack with {STRONGER} more steps, but "
            f"{loss:.3g} under the training attack, which misses adversarial examples "
            "(catastrophic overfitting) and so overestimates robust accuracy. Go back to an "
            "earlier checkpoint with more attack.steps, a smaller step or a lower learning rate"
        )
    if without > zero:
        sentences.append(
            f"for {without:.0%} of the images, the input gradient is only rounding error: the "
            "network is so confident that attacks have no gradient to follow (gradient masking), "
            "which looks like robustness. Start from weights that were trained for fewer epochs, "
            "or set label_smoothing"
        )
    if same < agreement:
        sentences.append(
            f"the input gradient has the same sign as in float32 at only {same:.0%} of the pixels: "
            "the compute type is too coarse for this network, so the attack is unreliable. Set "
            "model.dtype='float32', or lower the learning rate if weights or logits have grown"
        )
    return sentences


def overfitting(
    selection: Sequence[float], training: Sequence[float], *, images: int, fall: float = 0.03
) -> str | None:
    """Explain that robust accuracy falls on new images while it grows on training images; None:
    it does not.

    The last two evaluations must both be lower than the best by `fall` and by twice the standard
    error of a difference, so that one bad evaluation, or a small split, raises no alarm.
    `selection`: robust accuracy on the selection split, of this many images, at each evaluation so
    far; `training`: on the batches before each of these; NaN, which raises no alarm, if none was
    logged. Source: Rice et al. 2020 (arXiv 2002.11569).
    """
    if len(selection) < 3:
        return None
    best = max(range(len(selection)), key=selection.__getitem__)
    top, now = selection[best], max(selection[-2:])
    error = math.sqrt(2 * top * (1 - top) / images)
    if top - now <= max(fall, 2 * error) or not training[-1] > training[best]:
        return None
    return (
        f"robust accuracy on the selection split has fallen from {top:.1%} at evaluation "
        f"{best + 1} to {selection[-1]:.1%} at evaluation {len(selection)}, while on training "
        f"batches it has risen from {training[best]:.1%} to {training[-1]:.1%}: robust "
        "overfitting. The best weights are saved; stop here, or train again with fewer epochs, "
        "more augmentation or more weight decay"
    )


_FLOAT32 = 6  # bfloat16 products per full-precision float32 product on a TPU


def check_cost(config: Config, name: str, *, images: int, share: float = 0.01) -> float:
    """Return a `probe`'s cost as a share of the training steps between two of them; reject more
    than `share`.

    Counted in forward passes per image: APGD takes 2K + 1, PGD 2K, an input gradient 2, the update
    3; that of TRADES and MART takes 6, and TRADES' targets 1. Not counted: the poor use of a device
    by few images, and the collectives that gather the parameters once.

    `images`: of a probe in the phase `name`, on all devices together.
    """
    p, a, every = config[name], config.attack, config.alarm.every_steps
    target_passes = int(objectives.named(p.objective).of_probabilities)
    passes = mixes.passes(a, mix=MIX)
    gradients = 2 + 2 * (1 if config.model.dtype == "float32" else _FLOAT32)
    more = 2 * STRONGER * len(mixes.norms_of(a))
    of_probe = target_passes + passes + 1 + (passes + more) + 1 + gradients
    # For a single step.
    cost = of_probe * images / (objectives.passes(p.objective, a) * p.batch_size)
    if cost > share * every:
        raise ValueError(
            f"alarm.every_steps={every} with {images} images adds {cost / every:.2%} to the cost "
            f"of training, more than {share:.0%}; set alarm.every_steps={math.ceil(cost / share)} "
            "or more, or reduce alarm.images"
        )
    return cost / every


class Norms(NamedTuple):
    """Problems in a state's running statistics, one sentence each; empty: none."""

    broken: str  # the network cannot be evaluated: do not keep the state
    dead: str  # a warning


_WORDS = {"mean": "running mean", "var": "running variance"}
_WORDS |= {f"running_{key}": words for key, words in _WORDS.items()}
_DEAD = 1e-10  # running variance; norms add 1e-5 to it
_NAMED = 4  # maximum norms named in a sentence


def of_norms(stats: Mapping[str, Any]) -> Norms:
    """List the problems of batch norms' running means and variances.

    A mean or variance that is not finite, or a negative variance, makes the evaluation NaN or
    arbitrary. A channel whose running variance is at most 1e-10 has returned the same number at
    every pixel of every image for some time: with PyTorch's momentum m a variance of 1 falls that
    far in log(1e-10) / log(1 - m) updates, 219 for m = 0.1, and in a single update for m = 1.
    Arrays of which this host holds only a part are skipped.
    """
    running = {
        name: array
        for name, array in stats.items()
        if name.rpartition(".")[2] in _WORDS and not name.startswith("normalize.")
        if getattr(array, "is_fully_replicated", True)
        or getattr(array, "is_fully_addressable", True)
    }
    broken, dead = [], []
    for name, array in jax.device_get(running).items():
        array = np.asarray(array)
        norm, _, kind = name.rpartition(".")
        below = array < 0 if kind.endswith("var") else np.zeros(array.shape, bool)
        infinite = ~np.isfinite(array)
        for bad, words in ((infinite, "not finite"), (below & ~infinite, "negative")):
            if bad.any():
                worst = f" (lowest {array[bad].min():.2g})" if words == "negative" else ""
                of = f"{bad.sum()} of {array.size} channels"
                broken.append(f"the {_WORDS[kind]} of {norm} is {words} in {of}{worst}")
        still = (array >= 0) & (array <= _DEAD)
        if kind.endswith("var") and still.any():
            dead.append(f"{still.sum()} of {array.size} in {norm}")
    warning = (
        f"{_listed(dead)} channels are dead: a running variance of at most {_DEAD:g} means that "
        "they return the same number for all images. Unless this is intended, as with train.l1, go "
        "back to an earlier checkpoint with a lower learning rate or a longer warm-up"
    )
    return Norms(_listed(broken), warning if dead else "")


def _listed(parts: Sequence[str]) -> str:
    more = [f"{len(parts) - _NAMED} more norms"] * (len(parts) > _NAMED)
    *most, last = [*parts[:_NAMED], *more] or [""]
    return f"{', '.join(most)} and {last}" if most else last
