"""The loss that a training attack maximizes: its objective's, or the one in `attack.loss`."""

import ast
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import Goal
from jaxrobust.attacks.losses import LOSSES, goal_of, is_right
from jaxrobust.config import AttackSection
from jaxrobust.runtime.commandline.functions import Named, explained, find, is_name
from jaxrobust.runtime.text.spelling import near
from jaxrobust.training.update import objectives
from jaxrobust.types import Array

KEY = "attack.loss"
NAMES = tuple(name for name in LOSSES if name not in ("kl", "dlr-targeted"))  # losses of labels
_IMAGES = 4  # number of images to try a loss on
_IMPORTS = (ast.Import, ast.ImportFrom)


def origin(attack: AttackSection) -> Named | None:
    """Find the user's function named in `attack.loss`; None: it names none."""
    loss = attack.get("loss")
    return find(KEY, loss) if loss and is_name(loss) else None


def sha256(function: Named) -> str | None:
    """Hash the file of a function, together with the modules of its folder that it imports."""
    if not function.file:
        return function.sha256
    first = Path(function.file).resolve()
    files, found = [first], {first: function.sha256}
    for file in files:  # which grows
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = [one.name for one in node.names] if isinstance(node, _IMPORTS) else []
            if isinstance(node, ast.ImportFrom):
                names = [".".join(filter(None, (node.module, name))) for name in ("", *names)]
            for parts in (name.split(".") for name in names):
                places = [first.parent.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
                new = (p for at in places for p in (at.with_suffix(".py"), at / "__init__.py"))
                for path in new:
                    if path.is_file() and path not in found:
                        files.append(path)
                        found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    if len(found) == 1:
        return function.sha256
    lines = [f"{path.relative_to(first.parent)} {sha}\n" for path, sha in found.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def of_objective(attack: AttackSection, objective: str) -> objectives.Loss:
    """Return the loss of an objective's attack; `ValueError` if `attack.loss` cannot replace it."""
    loss, default = attack.get("loss"), objectives.named(objective).attack_loss
    assert default is not None, "the objective attacks"
    if loss in (None, default):
        return default
    if default != "ce":
        raise ValueError(
            f"{KEY}={loss!r} does not fit objective={objective!r}, which defines the loss of its "
            f"attack; leave {KEY} out, or set objective='adversarial'"
        )
    if function := origin(attack):
        return Goal(function.function, is_right, logits=True)  # like the built-in losses
    if loss not in NAMES:
        example = f"{loss}:margin" if loss.endswith(".py") else "my_losses.py:margin"
        raise ValueError(
            f"{KEY}={loss!r} is not a loss on labels; {near(loss, NAMES)}choose one of "
            f"{', '.join(NAMES)}, or name your own function, such as {example}"
        )
    return loss


def check_loss(attack: AttackSection, objective: str, *, soft: bool, classes: int) -> None:
    """Try `attack.loss` on a few logits; `ValueError` if no attack can maximize it.

    `soft`: the attack gets probabilities f32[B, C] instead of labels i32[B].
    """
    loss = of_objective(attack, objective)
    if loss == objectives.named(objective).attack_loss:
        return
    function = origin(attack)
    if soft and function is None:
        raise ValueError(
            f"{KEY}={loss!r} needs one class per image, but labels are mixed or smoothed here; set "
            "attack.labels='hard'"
        )
    _try(function or Named(goal_of(loss).loss, str(loss), None, None), soft, classes)


@functools.lru_cache(maxsize=8)  # a run builds a phase repeatedly
def _try(loss: Named, soft: bool, classes: int) -> None:
    logits = np.random.default_rng(0).standard_normal((_IMAGES, classes)).astype(np.float32)
    labels = (logits.argmax(1) + np.arange(_IMAGES) % 2) % classes  # every second one is wrong
    targets: Any = labels.astype(np.int32)
    if soft:
        targets = 0.9 * np.eye(classes, dtype=np.float32)[labels] + np.float32(0.1 / classes)

    def losses(logits: Array) -> tuple[Array, Array]:
        values = loss.function(logits, jnp.asarray(targets))
        returned = type(values).__name__
        if isinstance(values, jax.Array):
            returned = f"{values.dtype}{[*values.shape]}"
        if returned not in (f"float32[{_IMAGES}]", f"float64[{_IMAGES}]"):
            raise ValueError(
                f"{KEY}={loss.name} returns {returned} for {_IMAGES} images; return one float for "
                f"each, float32[{_IMAGES}], without a mean over the images"
            )
        return values, values

    with explained(KEY, loss.name):
        slopes, values = map(np.asarray, jax.jit(jax.jacrev(losses, has_aux=True))(logits))
    if not (np.isfinite(values).all() and np.isfinite(slopes).all()):
        raise ValueError(
            f"{KEY}={loss.name} or its gradient is NaN or infinite for ordinary logits; keep it "
            "finite, for example with jax.nn.log_softmax instead of jnp.log(jax.nn.softmax(...))"
        )
    diagonal = np.eye(_IMAGES, dtype=bool)
    if slopes[~diagonal].any():
        raise ValueError(
            f"{KEY}={loss.name} mixes images: the loss of one depends on the logits of another; "
            "reduce over all axes but the first"
        )
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    climbs = chances - (targets if soft else np.eye(classes)[labels])  # as cross-entropy does
    if ((slopes[diagonal] * climbs).sum(axis=1) < 0).all():
        raise ValueError(
            f"{KEY}={loss.name} falls where cross-entropy rises, so an attack with it helps the "
            "network; change its sign, so that it is larger where the network is worse"
        )
    if not slopes[diagonal].any():
        raise ValueError(
            f"{KEY}={loss.name} has no gradient with respect to the logits, so no attack can raise "
            "it; compute it without argmax, comparisons, rounding or stop_gradient"
        )
