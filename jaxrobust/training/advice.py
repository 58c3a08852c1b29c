"""What is said or refused at the start of a run: what its config does and nobody may have meant."""

from collections.abc import Mapping

from jaxrobust.config import Config
from jaxrobust.data import splits
from jaxrobust.data.presets import PRESETS
from jaxrobust.training import build


def lines(configs: Mapping[str, Config]) -> list[str]:
    """Return what to say before a run trains or goes on, of the config as each phase sees it."""
    every = (of_step(seen, name) + _selection(seen) for name, seen in configs.items())
    return list(dict.fromkeys(line for told in every for line in told))


def _selection(config: Config) -> list[str]:
    """Warn of weights that are chosen on the images that are reported."""
    selection, test = config.data.selection_split, config.data.test_split
    if not splits.overlap(selection, test):
        return []
    return [
        f"data.selection_split={selection} holds images of data.test_split={test}: the weights are "
        "chosen on what is reported, and the record says so"
    ]


def of_step(config: Config, name: str) -> list[str]:
    """Warn of a step in pixels: it stays where it is when somebody changes the radius."""
    a = config.attack
    key = "step_size" if a.step_size is not None else "relative_step"
    if config[name].objective == "clean" or a[key] is None:
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


def check_start(config: Config, first: str) -> None:
    """Refuse to attack random weights under heavy augmentation (Singh, Croce, Hein 2023).

    Args:
      config: as the first phase sees it.
      first: the name of that phase.
    Raises:
      ValueError: that is what it would do, and `from_random` does not say that it is meant.
    """
    named = config.data.augmentation
    chain = PRESETS[named].chain if named in PRESETS else named
    mixup, cutmix, *_ = build.mixes_and_erases(config)
    heavy = mixup or cutmix or "randaugment" in chain
    random = not config.init.weights and not config[first].from_random
    if heavy and random and config[first].objective != "clean":
        raise ValueError(
            f"{first} would attack random weights under heavy augmentation, which the paper (arXiv "
            "2303.01870) reports as failing; give clean weights (init.weights=convnext_tiny."
            "fb_in1k, for a ConvStem with init.stem=fresh and pretrain.epochs=100), take "
            f"data.augmentation=basic, or, where it is meant, {first}.from_random=True"
        )
