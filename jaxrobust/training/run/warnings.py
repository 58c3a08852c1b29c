"""Warnings and checks at the start of a run, for configs that may not mean what they say."""

import math
from collections.abc import Mapping
from typing import Any

from jaxrobust.attacks import registry
from jaxrobust.config import AttackSection, Config, of_phase, phases
from jaxrobust.data.splits import grammar
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.training import build
from jaxrobust.training.update import inner, objectives
from jaxrobust.types import Threat


def lines(configs: Mapping[str, Config]) -> list[str]:
    """List the warnings before a run starts or continues, for the config as each phase sees it."""
    every = (
        of_step(phase_config, name) + _splits(phase_config)
        for name, phase_config in configs.items()
    )
    return list(dict.fromkeys(line for sentences in every for line in sentences))


# Why two splits in a config must not share images.
_SHARED = {
    ("selection_split", "test_split"): "the best weights are selected on test images, so the "
    "record carries a flag",
    (
        "train_split",
        "test_split",
    ): "the test images are also used for training, so the record carries a flag",
    ("train_split", "selection_split"): "the best weights are selected on training images, which "
    "hides overfitting",
}


def _splits(config: Config) -> list[str]:
    data, sentences = config.data, []
    for (one, other), why in _SHARED.items():
        splits = {one: (data.name, data[one])}
        if one == "train_split" and data.extra:
            splits["extra_split"] = data.extra, data.extra_split
        for key, images in splits.items():
            if grammar.same_images(images, (data.name, data[other])):
                says = f"data.{key}={images[1]} shares images with data.{other}={data[other]}"
                sentences.append(f"{says}: {why}")
    return sentences


def of_step(config: Config, name: str) -> list[str]:
    """Warn about a step in pixels: it does not follow when the radius changes."""
    if not objectives.named(config[name].objective).attacks:
        return []
    of_norms = (_of_step(attack) for attack in inner.by_norm(config.attack))
    return list(dict.fromkeys(sentence for sentences in of_norms for sentence in sentences))


def _of_step(a: AttackSection) -> list[str]:
    key = "step_size" if a.step_size is not None else "relative_step"
    if a[key] is None:
        return []
    if registry.trained(a.name).length is None:
        return [f"attack.{key}={a[key]:.4g} has no effect: {a.name.upper()} chooses its own steps"]
    (size,) = inner.step_sizes(a)
    if size is None or not a.epsilon:
        return []
    epsilon = Threat.of(a).epsilon
    share = f"{size / epsilon:.3g}"
    return [
        f"attack.step_size={size:.4g} is {share} times attack.epsilon={epsilon:.4g}; set "
        f"attack.relative_step={share} instead to keep this ratio at any radius"
    ]


def check_start(config: Config, first: str) -> None:
    """Refuse to attack random weights under heavy augmentation (Singh, Croce, Hein 2023), unless
    `from_random` confirms it, and a helper network with random weights; `config`: as the phase
    `first` sees it.
    """
    if objectives.named(config[first].objective).helped and not config.init.weights:
        raise ValueError(
            f"{first}.objective={config[first].objective!r} takes labels from the initial weights, "
            "which would be random; start from clean weights (init.weights), or add a clean phase "
            "first (pretrain.epochs)"
        )
    augmentation = config.data.augmentation
    chain = PRESETS[augmentation].chain if augmentation in PRESETS else augmentation
    mixup, cutmix, *_ = build.mixes_and_erases(config)
    heavy = mixup or cutmix or "randaugment" in chain
    random = not config.init.weights and not config[first].from_random
    if heavy and random and objectives.named(config[first].objective).attacks:
        raise ValueError(
            f"{first} would attack random weights under heavy augmentation, which fails according "
            "to arXiv 2303.01870. Start from clean weights (init.weights=convnext_tiny.fb_in1k; "
            "for a ConvStem also init.stem=fresh and pretrain.epochs=100), use "
            f"data.augmentation=basic, or, if you really want this, set {first}.from_random=True"
        )


# Batches that the devices do not divide, such as those that papers use on 256 chips.
FARTHEST = 0.5  # maximum relative change of a batch; larger changes are left to the user


def fitted_batches(config: Any, devices: int) -> tuple[Any, list[str]]:
    """Give each phase the nearest batch size that this many devices divide, and say so.

    If one device could not take the batch either, because mixing groups, microbatches or batch-norm
    groups do not divide it, that is another mistake, unless the devices do not divide it.

    Returns:
      the config, copied if a batch size changes, and a sentence for each change. A batch without a
      valid size nearby stays, for `build` to reject.
    """
    sizes, sentences = {}, []
    for name in phases(config):
        p = config[name]
        at_a_time = _at_a_time(of_phase(config, name), name)
        unit = devices * at_a_time
        # Of two equally near sizes, the larger.
        nearest = max(math.floor(p.batch_size / unit + 0.5), 1) * unit
        parted = p.batch_size % devices == 0
        wrong = p.batch_size % (unit if p.batch_size % at_a_time == 0 else devices)
        if wrong and abs(nearest - p.batch_size) <= FARTHEST * p.batch_size:
            sizes[name] = nearest
            part = f"into parts of {p.batch_size // devices} images, as {at_a_time} belong together"
            sentences.append(
                f"{name}.batch_size={p.batch_size} cannot be split over {devices} "
                f"devices{f' {part}' if parted else ''}: using {nearest} instead, the nearest size "
                f"that fits, without changing {name}.lr={p.lr:g}"
            )
    if sizes:
        config = config.copy_and_resolve_references()
    for name, size in sizes.items():
        config[name].batch_size = size
    return config, sentences


def _at_a_time(config: Config, name: str) -> int:
    """Return the images per device that belong together: mixed, normalized or taken in parts."""
    p = config[name]
    mixes = any(build.mixes_and_erases(config)[:2])
    norm = config.model.options.get("bn_group", 0) or 1
    return math.lcm(max(p.microbatches, 1) * norm, max(config.mixup.group, 1) if mixes else 1)
