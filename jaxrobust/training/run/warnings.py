"""What is said or refused at the start of a run: what its config does and may not mean."""

from collections.abc import Mapping

from jaxrobust.attacks import registry
from jaxrobust.config import AttackSection, Config
from jaxrobust.data.splits import grammar
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.training import build
from jaxrobust.training.update import inner, objectives
from jaxrobust.types import Threat


def lines(configs: Mapping[str, Config]) -> list[str]:
    """List the warnings before a run trains or goes on, of the config as each phase sees it."""
    every = (of_step(seen, name) + _splits(seen) for name, seen in configs.items())
    return list(dict.fromkeys(line for sentences in every for line in sentences))


# Why two splits of a config must not share images.
_SHARED = {
    ("selection_split", "test_split"): "the weights are chosen on what is reported, and the record "
    "says so",
    ("train_split", "test_split"): "what is reported was trained on, and the record says so",
    ("train_split", "selection_split"): "the weights are chosen on what they were trained on, "
    "which does not show where they overfit",
}


def _splits(config: Config) -> list[str]:
    data, sentences = config.data, []
    for (one, other), why in _SHARED.items():
        own = {one: (data.name, data[one])}
        if one == "train_split" and data.extra:
            own["extra_split"] = data.extra, data.extra_split
        for key, images in own.items():
            if grammar.same_images(images, (data.name, data[other])):
                says = f"data.{key}={images[1]} holds images of data.{other}={data[other]}"
                sentences.append(f"{says}: {why}")
    return sentences


def of_step(config: Config, name: str) -> list[str]:
    """Warn of a step in pixels: it stays where it is when somebody changes the radius."""
    if not objectives.named(config[name].objective).attacks:
        return []
    each = [_of_step(own) for own in inner.alone(config.attack)]
    return list(dict.fromkeys(sentence for own in each for sentence in own))


def _of_step(a: AttackSection) -> list[str]:
    key = "step_size" if a.step_size is not None else "relative_step"
    if a[key] is None:
        return []
    if registry.trained(a.name).length is None:
        return [f"attack.{key}={a[key]:.4g} is not read: {a.name.upper()} chooses its steps itself"]
    (size,) = inner.step_sizes(a)
    if size is None or not a.epsilon:
        return []
    epsilon = Threat.of(a).epsilon
    share = f"{size / epsilon:.3g}"
    return [
        f"attack.step_size={size:.4g} is {share} of attack.epsilon={epsilon:.4g}; written "
        f"as attack.relative_step={share} it stays so whatever the radius"
    ]


def check_start(config: Config, first: str) -> None:
    """Refuse to attack random weights under heavy augmentation (Singh, Croce, Hein 2023), unless
    `from_random` says that it is meant, and a helper network of random weights; `config`: as the
    phase `first` sees it.
    """
    if objectives.named(config[first].objective).helped and not config.init.weights:
        raise ValueError(
            f"{first}.objective={config[first].objective!r} takes labels of the weights that it "
            "starts from, which would be random; give clean weights (init.weights), or epochs of a "
            "clean phase before it (pretrain.epochs)"
        )
    named = config.data.augmentation
    chain = PRESETS[named].chain if named in PRESETS else named
    mixup, cutmix, *_ = build.mixes_and_erases(config)
    heavy = mixup or cutmix or "randaugment" in chain
    random = not config.init.weights and not config[first].from_random
    if heavy and random and objectives.named(config[first].objective).attacks:
        raise ValueError(
            f"{first} would attack random weights under heavy augmentation, which the paper (arXiv "
            "2303.01870) reports as failing; give clean weights (init.weights=convnext_tiny."
            "fb_in1k, for a ConvStem with init.stem=fresh and pretrain.epochs=100), take "
            f"data.augmentation=basic, or, where it is meant, {first}.from_random=True"
        )
