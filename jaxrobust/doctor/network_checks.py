"""Checks of a network, from causes to consequences: outputs, inputs, accuracy, gradients."""

from collections.abc import Callable

import numpy as np

from jaxrobust.doctor import explanations
from jaxrobust.doctor.attack_checks import ATTACK_CHECKS
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, Check, CheckResult
from jaxrobust.doctor.patient import Patient
from jaxrobust.evaluation.network import checks, collapse
from jaxrobust.types import unmasked

Look = Callable[[Patient], CheckResult]
_ENOUGH = 32  # images for a statement about accuracy


def _reliability(*names: str, healthy: str) -> Look:
    """Make a check from flags of `evaluation.network.reliability`, all of which are faults."""

    def look(patient: Patient) -> CheckResult:
        raised = [name for name in names if name in patient.flags]
        if not raised:
            return CheckResult(GREEN, healthy)
        sentence, _, remedy = patient.flags[raised[0]].partition("; ")
        return CheckResult(RED, sentence, raised, remedy=remedy or None)

    return look


def _range(patient: Patient) -> CheckResult:
    try:
        checks.check_images(patient.images, patient.labels, classes=patient.logits.shape[1])
    except ValueError as error:
        sentence, _, remedy = str(error).partition("; ")
        cause = "attacks cannot use this data"
        return CheckResult(RED, sentence, cause=cause, remedy=remedy or None)
    low, high = float(patient.images.min()), float(patient.images.max())
    return _explained(explanations.RANGE, f"images span [{low:.3g}, {high:.3g}]")(patient)


def _explained(name: str, healthy: str) -> Look:
    def look(patient: Patient) -> CheckResult:
        if len(patient.labels) < _ENOUGH:
            return CheckResult(SKIPPED, f"{len(patient.labels)} images are too few for an estimate")
        if "tried" not in patient.memo:
            patient.memo["tried"] = explanations.tried(patient)
        all_tried = patient.memo["tried"]
        of_check = [explanation for explanation in all_tried if explanation.check == name]
        if not of_check:
            return CheckResult(SKIPPED, "not checked: the images are gray")
        classes = int(unmasked(patient.logits).sum())
        best = explanations.best(all_tried, classes, len(patient.labels))
        undone = " undone" if name == explanations.TWICE else ""
        if best is None or best.check != name:
            other = max(of_check, key=lambda explanation: explanation.accuracy)
            loss = float(explanations.losses(patient.logits, patient.labels).mean())
            sentence = f"{healthy}; loss {loss:.3g} and accuracy {patient.right.mean():.1%}; with "
            sentence += f"{other.done}{undone}: {other.loss:.3g} and {other.accuracy:.1%}"
            return CheckResult(GREEN, sentence)
        level = RED if best.gain > explanations.GAIN else YELLOW
        current = best.accuracy - best.gain
        sentence = f"accuracy is {current:.1%}, and {best.accuracy:.1%} with {best.done}{undone}"
        return CheckResult(level, sentence, {"as it is": current, best.done: best.accuracy})

    return look


def _one_class(patient: Patient) -> CheckResult:
    answers = np.where(checks.answered(patient.logits), patient.logits.argmax(axis=1), -1)
    constant = collapse.of(answers, patient.labels)
    if constant is None:
        answered = len(np.unique(answers[answers >= 0]))
        return CheckResult(GREEN, f"{answered} of {patient.logits.shape[1]} classes are predicted")
    sentence, _, remedy = constant.words.partition("; ")
    return CheckResult(RED if constant.proven else YELLOW, sentence, remedy=remedy)


def _accuracy(patient: Patient) -> CheckResult:
    n, accuracy = len(patient.labels), float(patient.right.mean())
    sentence = f"{accuracy:.1%} of {n} clean images are classified correctly"
    if n < _ENOUGH:
        return CheckResult(SKIPPED, f"{sentence}; this is too few images to judge")
    if record := patient.recorded:
        p = min(max(record.clean, 1 / n), 1 - 1 / n)
        short = (record.clean - accuracy) / (p * (1 - p) / n) ** 0.5
        sentence += f", and {record.clean:.1%} in {record.where}"
        if short > 4 and record.clean - accuracy > 0.05:
            return CheckResult(RED, sentence, {"here": accuracy, "recorded": record.clean})
    if "low-accuracy" in patient.flags:
        return CheckResult(RED, f"{sentence}, no better than guessing", {"here": accuracy})
    return CheckResult(GREEN, sentence, {"here": accuracy})


def _arrays(patient: Patient) -> CheckResult:
    arrays = patient.arrays
    if arrays is None:
        return CheckResult(SKIPPED, "the images have the network's size: nothing is resized")
    n = len(arrays)
    pil, right = patient.right[:n], checks.is_right(patient.forward(arrays), patient.labels[:n])
    apart = float(np.abs(arrays - patient.images[:n]).mean()) * 255
    won, lost = int((right & ~pil).sum()), int((pil & ~right).sum())
    sentence = (
        f"{pil.mean():.1%} correct if resized by PIL, {right.mean():.1%} as arrays without "
        f"antialiasing; pixels differ by {apart:.2g} of 255"
    )
    value = {"pil": float(pil.mean()), "arrays": float(right.mean())}
    better = won - lost > 0.05 * n and won - lost > 3.5 * (won + lost) ** 0.5
    return CheckResult(RED if better else GREEN, sentence, value)


_INPUTS = (*explanations.ALL, "resizing")
_OUTPUTS = ("determinism", "train-mode", "finite-logits", "softmax")

NETWORK_CHECKS: tuple[Check[Patient], ...] = (
    Check(
        "determinism",
        "Five passes over the same images, and two traces of the function; red if they differ.",
        "the network draws random numbers, or keeps state",
        "turn off the randomness, or evaluate with --version=rand",
        "Athalye et al. 2018, arXiv 1802.00420, section 3 (stochastic gradients)",
        _reliability("randomized", "retraced", healthy="the same logits in five passes"),
    ),
    Check(
        "train-mode",
        "Change of an image's logits if its batch changes; red above 1e-3 of their range.",
        "batch norm or dropout in train mode",
        "evaluate with train=False",
        "Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.1",
        _reliability("batch-dependent", healthy="logits do not depend on the batch"),
        ("determinism",),
    ),
    Check(
        "finite-logits",
        "Logits that are NaN, infinite or equal for all images or classes; red if there are any.",
        "overflow, broken weights, or an operation after the logits",
        "check the weights, and return the logits before any ReLU or clipping",
        "Carlini et al. 2019, arXiv 1902.06705",
        _reliability("nan-logits", "constant-logits", healthy="logits are finite and differ"),
    ),
    Check(
        "softmax",
        "Whether outputs lie in [0, 1] and sum to 1; red if all do.",
        "the network ends with a softmax, whose rounding hides gradients of confident images",
        "return the logits before the softmax",
        "Carlini & Wagner 2017, arXiv 1608.04644, section IV; Croce & Hein 2020, arXiv 2003.01690, "
        "section 4",
        _reliability("softmax", healthy="outputs are logits"),
    ),
    Check(
        explanations.RANGE,
        "Whether images lie in [0, 1], and accuracy on images in 0..255; red if that is more than "
        "10 points better, yellow from 4.",
        "the network expects images in 0..255, or divides by 255 a second time",
        "multiply or divide by 255 only once, so that the network takes images in [0, 1]",
        "Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _range,
        _OUTPUTS,
    ),
    Check(
        explanations.MISSING,
        "Accuracy and loss on normalized images; red if they are more than 10 points better, "
        "yellow from 4.",
        "the network expects normalized images and does not normalize itself",
        "put mean and std into the network (init.normalize=..., or the first line of the function)",
        "Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _explained(explanations.MISSING, "not missing"),
        _OUTPUTS,
    ),
    Check(
        explanations.TWICE,
        "Accuracy and loss with a normalization undone; red if that is more than 10 points better, "
        "yellow from 4.",
        "images are normalized before a network that normalizes itself",
        "remove one of the two",
        "Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _explained(explanations.TWICE, "not twice"),
        _OUTPUTS,
    ),
    Check(
        explanations.CHANNELS,
        "Accuracy with red and blue swapped; red if that is more than 10 points better.",
        "the network was trained on images in BGR, as OpenCV reads them",
        "reverse the channels before the network: images[..., ::-1]",
        "Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _explained(explanations.CHANNELS, "RGB"),
        _OUTPUTS,
    ),
    Check(
        explanations.ORDER,
        "Accuracy with the classes in other common orders (from 1, as text, by name) and, with "
        "four images per class, in the order that half of the images suggests, on the other half; "
        "red if that is more than 10 points better, yellow from 4.",
        "the network and the data set number the classes differently",
        "return the outputs in the data set's class order",
        "Kuhn 1955 (the assignment); Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _explained(explanations.ORDER, "the data set's"),
        _OUTPUTS,
    ),
    Check(
        "resizing",
        "Accuracy on images that are resized as arrays, without PIL's antialiasing; red if that is "
        "more than 5 points better.",
        "the weights were trained on images that were resized differently than by --preprocessing",
        "use the preprocessing of the training, or train with images resized by PIL",
        "Parmar et al. 2022, arXiv 2104.11222",
        _arrays,
        _OUTPUTS,
    ),
    Check(
        "one-class",
        "Whether nearly all images are assigned one class, and no more are correct than this "
        "explains; red if shown at 95% confidence, yellow if there are too few images.",
        "training collapsed to a constant prediction, or not all weights are loaded",
        "go back to earlier weights",
        "Hoeffding 1951, Ann. Math. Statist. 22 (right answers of all orders); Carlini et al. "
        "2019, arXiv 1902.06705 (clean accuracy next to robust accuracy)",
        _one_class,
        (*_OUTPUTS, *_INPUTS),
    ),
    Check(
        "accuracy",
        "Clean accuracy compared with the record and with guessing; red if it is 4 standard errors "
        "and 5 points below the record, or no better than guessing.",
        "different weights, a different split, or a preprocessing that no check here covers",
        "compare the weights' sha256, the split and the preprocessing with those of the record",
        "Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _accuracy,
        (*_OUTPUTS, *_INPUTS, "one-class"),
    ),
    *ATTACK_CHECKS,
)
