"""Checks of a network's gradients and of attacks on it."""

import itertools
from collections.abc import Callable

import numpy as np

from jaxrobust.doctor import explanations
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, Check, CheckResult
from jaxrobust.doctor.patient import STEPS, Patient
from jaxrobust.evaluation.network import reliability

_FEW = 16  # correctly classified images; with fewer, attacks show little
_BEFORE = (
    *("determinism", "train-mode", "finite-logits", "softmax", *explanations.ALL),
    *("one-class", "accuracy"),
)
_MASKS = (*_BEFORE, "zero-gradients")


def _share_of_zeros(patient: Patient, loss: str, dtype: str) -> np.ndarray:
    slopes = patient.slopes(loss, dtype)
    return (slopes == 0) | ~np.isfinite(slopes)  # neither moves an image


def _zero(patient: Patient) -> CheckResult:
    if patient.without_gradient:
        return CheckResult(
            RED,
            f"the network cannot be differentiated: {patient.without_gradient}",
            cause="a callback, or an operation without a derivative",
            remedy="write that operation in JAX, or give it a derivative; until then only Square "
            "can attack the network",
        )
    types = ("float32", *patient.others)
    zero = {dtype: _share_of_zeros(patient, "ce", dtype) for dtype in types}
    value = {dtype: float(of.mean()) for dtype, of in zero.items()}
    sentence = "zero for " + ", ".join(f"{v:.1%} ({k})" for k, v in value.items())
    sentence += f" of {len(zero['float32'])} images"
    if reliability.check_gradients(zero["float32"]):
        # Behind a saturated softmax the margin still has a gradient; masking removes that too.
        margin = float(_share_of_zeros(patient, "cw", "float32").mean())
        cause = remedy = None
        if margin < 0.5 * value["float32"]:
            cause = "the softmax saturates: logits are so large that the cross-entropy is 0 in "
            cause += "float32"
            remedy = "divide the logits by their range, or attack with DLR (apgd-t, fab-t)"
        value |= {"margin, float32": margin}
        return CheckResult(
            RED, f"{sentence}; the margin's gradient is zero for {margin:.1%}", value, cause, remedy
        )
    for dtype in (dtype for dtype in patient.others if value[dtype] > 0.1):
        cause = f"{dtype} is not precise enough for this network's logits"
        remedy = f"search in float32 (not --search_dtype={dtype})"
        return CheckResult(YELLOW, sentence, value, cause, remedy)
    return CheckResult(GREEN, sentence, value)


def _attacking(look: Callable[[Patient], CheckResult]) -> Callable[[Patient], CheckResult]:
    """Skip a check that attacks if attacks would show little."""

    def looks(patient: Patient) -> CheckResult:
        count = len(patient.attacked)
        if patient.threat.epsilon <= 0:
            return CheckResult(SKIPPED, "the radius is 0")
        if patient.without_gradient:
            return CheckResult(SKIPPED, "the network cannot be differentiated")
        few = CheckResult(SKIPPED, f"only {count} clean images are classified correctly")
        return few if count < _FEW else look(patient)

    return looks


@_attacking
def _losses(patient: Patient) -> CheckResult:
    if patient.logits.shape[1] < 3:
        return CheckResult(SKIPPED, "DLR needs three classes")
    ce, dlr = (patient.after_pgd(patient.threat.epsilon, loss) > 0 for loss in ("ce", "dlr"))
    value = {"ce": 1 - float(ce.mean()), "dlr": 1 - float(dlr.mean())}
    sentence = f"{value['ce']:.1%} of images withstand PGD with CE, {value['dlr']:.1%} with DLR"
    only_dlr, only_ce = int((dlr & ~ce).sum()), int((ce & ~dlr).sum())
    apart = (only_dlr - only_ce) / max(only_dlr + only_ce, 1) ** 0.5
    gap = (only_dlr - only_ce) / len(ce)
    if gap > 0.1 and apart > 3.5:
        return CheckResult(RED, sentence, value)
    if gap < -0.3 and apart < -3.5:
        cause = "DLR divides by the distance to the third logit, which is large or zero"
        remedy = "report both CE and DLR, and also attack with the CW margin"
        return CheckResult(YELLOW, sentence, value, cause, remedy)
    return CheckResult(GREEN, sentence, value)


@_attacking
def _noise(patient: Patient) -> CheckResult:
    pgd, noise = patient.after_pgd(patient.threat.epsilon), patient.after_noise
    better = float((noise > pgd).mean())
    sentence = (
        f"PGD fools {(pgd > 0).mean():.1%}, noise of the same size {(noise > 0).mean():.1%}; noise "
        f"comes closer on {better:.1%} of {len(pgd)} images"
    )
    level = RED if better > 0.33 else YELLOW if better > 0.15 else GREEN
    return CheckResult(level, sentence, {"noise is better": better})


@_attacking
def _radius(patient: Patient) -> CheckResult:
    eps = patient.threat.epsilon
    radii = [r for r in (eps / 2, eps, 2 * eps) if r < patient.everything] + [patient.everything]
    fooled = [patient.after_pgd(radius) > 0 for radius in radii]
    robust = [1 - float(of.mean()) for of in fooled]
    points = [f"{r:.3g}: {v:.1%}" for r, v in zip(radii, robust, strict=True)]
    sentence = f"robust at {', '.join(points)}"
    value = dict(zip(map("{:.4g}".format, radii), robust, strict=True))
    for small, large in itertools.pairwise(fooled):
        up, down = int((small & ~large).sum()), int((large & ~small).sum())
        if up - down > 0.05 * len(small) and up - down > 3 * (up + down) ** 0.5:
            return CheckResult(RED, f"accuracy rises with the radius: {sentence}", value)
    if robust[-1] > 0.3:
        grey = "images withstand a radius at which they can all become the same gray"
        return CheckResult(RED, f"{grey}: {sentence}", value)
    return CheckResult(YELLOW if robust[-1] > 0.15 else GREEN, sentence, value)


_SIGNS = "Athalye et al. 2018, arXiv 1802.00420, section 3.1"
_MASKED = (
    "attack the part of the network before the masking operation (Athalye et al. 2018, section 4), "
    "and trust only Square and transfer attacks"
)

ATTACK_CHECKS: tuple[Check[Patient], ...] = (
    Check(
        "zero-gradients",
        "Share of images for which the gradient of the cross-entropy is exactly zero or not "
        "finite, by compute dtype; red above 1% in float32, yellow above 10% in another dtype.",
        "gradients are masked: rounding, quantization, a threshold or stop_gradient",
        _MASKED,
        "Croce & Hein 2020, arXiv 2003.01690, section 4; " + _SIGNS,
        _zero,
        _BEFORE,
    ),
    Check(
        "dlr-against-ce",
        f"Accuracy under PGD with {STEPS} steps for each loss, CE and DLR; red if it is more than "
        "10 points lower for DLR, yellow if it is more than 30 points lower for CE.",
        "the cross-entropy hides the gradient: logits are large, and only rounding error remains",
        "attack with DLR and its targeted form (apgd-t), or divide the logits by their range",
        "Croce & Hein 2020, arXiv 2003.01690, section 4",
        _losses,
        _MASKS,
    ),
    Check(
        "pgd-against-noise",
        f"Margins after PGD with {STEPS} steps and after the best of {STEPS} random noise samples "
        "of the same size; red if noise comes closer on more than 33% of the images, yellow from "
        "15%.",
        "the gradient does not point uphill: it is masked, shattered or from another network",
        _MASKED,
        _SIGNS,
        _noise,
        (*_MASKS, "dlr-against-ce"),
    ),
    Check(
        "radius",
        "Accuracy under PGD at growing radii, up to one at which all images can become the same "
        "gray; red if it rises by more than 5 points, or ends above 30%, yellow from 15%.",
        "PGD loses its way: gradients are masked, or the step does not scale with the radius",
        _MASKED,
        f"{_SIGNS}; Carlini et al. 2019, arXiv 1902.06705",
        _radius,
        (*_MASKS, "dlr-against-ce", "pgd-against-noise"),
    ),
)
