"""Lines at the start of a run, about what its config does and nobody may have meant."""

from typing import Any

from jaxrobust.data.presets import PRESETS
from jaxrobust.training import build


def lines(config: Any, first: str, *, begun: bool) -> list[str]:
    """Return what to say before the phase `first`, the run's first one, trains or goes on."""
    found = _step(config, first)
    return found if begun else found + _random_weights(config, first)


def _step(config: Any, first: str) -> list[str]:
    """Warn of a step in pixels: it stays where it is when somebody changes the radius."""
    a = config.attack
    objectives = {config[name].objective for name in (first, "train") if config[name].epochs}
    key = "step_size" if a.step_size is not None else "relative_step"
    if objectives <= {"clean"} or a[key] is None:
        return []
    if a.name == "apgd":
        return [f"attack.{key}={a[key]:.4g} is not read: APGD chooses its steps itself"]
    if key == "relative_step" or not a.epsilon:
        return []
    share = f"{a.step_size / a.epsilon:.3g}"
    return [
        f"attack.step_size={a.step_size:.4g} is {share} of attack.epsilon={a.epsilon:.4g}; written "
        f"as attack.relative_step={share} it stays so whatever the radius"
    ]


def _random_weights(config: Any, first: str) -> list[str]:
    """Warn of an attack on random weights under heavy augmentation (Singh, Croce, Hein 2023)."""
    named = config.data.augmentation
    chain = PRESETS[named].chain if named in PRESETS else named
    mixup, cutmix, *_ = build.mixes_and_erases(config)
    heavy = mixup or cutmix or "randaugment" in chain
    if config.init.weights or config[first].objective == "clean" or not heavy:
        return []
    return [
        f"{first} attacks a network of random weights under heavy augmentation, which the paper "
        "(arXiv 2303.01870) reports as failing. Start from clean weights, init.weights=FOLDER of "
        "jaxrobust.convert.import_torch (of a ConvStem with --init-stem, and pretrain.epochs=50 to "
        "100 for the stem),",
        "or, without such weights, train clean first (pretrain.epochs=100), or with light "
        "augmentation (data.augmentation=basic)",
    ]
