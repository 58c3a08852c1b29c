"""A config for a data set and a network: its values, each with a reason, and its text."""

import os
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.config import base, network_of
from jaxrobust.results.configs.data_facts import DataFacts
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.types import check_radius
from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources

_COLUMNS = 100  # of a config
_SIDES = (8, 16, 28, 32, 48, 64, 96, 128, 160, 224)  # usual image sizes of networks, in pixels
_SMALL = 64  # pixels up to which networks for small images are chosen
_CLEAN_UPDATES, _ATTACKED_UPDATES = 600, 1500  # of a first run
_MOST_EPOCHS = 40
# norm -> usual radii for small images (CIFAR-10) and larger ones (ImageNet).
RADII = {"linf": ("8/255", "4/255"), "l2": ("0.5", "2"), "l1": ("12", "75")}
_PUBLIC = "convnext_tiny.fb_in1k"  # from timm; the paper's clean start of ConvNeXt-T


class ConfigLine(NamedTuple):
    """A key of a config, its value, and the reason for it."""

    key: str
    value: Any  # plain, or `Expression`
    reason: str


class Expression(str):
    """An expression that is written to the config literally, such as 8 / 255."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """The user's choice of network and threat; None means choose automatically."""

    torch: str | None = None  # my_models.py:build
    torch_args: dict[str, Any] | None = None
    weights: str | None = None  # to start from
    model: str | None = None  # the network of these weights, or a network of the package
    classes: int | None = None  # of the head of these weights
    norm: str = "linf"
    epsilon: str | None = None
    image_size: int | None = None


def look(data: DataFacts, **fields: Any) -> NetworkChoice:
    """Inspect the network that `fields` of `NetworkChoice` name: does it export, and what are its
    weights for?

    Raises:
      ValueError: the network cannot be traced, or the weights are missing or do not name their
        network; says what to do.
    """
    choice = NetworkChoice(**fields)
    if choice.torch and (choice.weights or choice.model):
        raise ValueError("--torch already contains its weights; leave --from and --model out")
    if choice.torch_args and not choice.torch:
        raise ValueError("--torch_args belongs to --torch; name the network too")
    if choice.torch:  # traced for images as in the config; errors are worded for --torch
        config = base()
        config.model.update(
            name=f"torch:{choice.torch}",
            num_classes=len(data.classes),
            image_size=choice.image_size or side(data),
            in_channels=data.channels,
            options=choice.torch_args or {},
        )
        network_of(config)
    if not choice.weights:
        return choice
    path = imports.local(sources.parse(str(choice.weights)), model=choice.model)  # downloads
    network = load.fitted(reading.artifact_of(path), choice.model)
    if network.in_channels != data.channels:
        raise ValueError(
            f"{choice.weights} take images with {network.in_channels} channels, but those of "
            f"{data.name} have {data.channels}; leave --from out"
        )
    size = choice.image_size or min(network.image_size, side(data))
    return replace(choice, model=network.name, classes=network.num_classes, image_size=size)


def lines(data: DataFacts, choice: NetworkChoice) -> list[ConfigLine]:
    """Choose a value for each key that depends on the data, the network and the threat."""
    size = choice.image_size or side(data)
    network = _network(data, choice, size)
    starts = any(line.key == "init.weights" for line in network)
    return [
        *network,
        *_data(data, size),
        *_training(data, size, starts),
        *_threat(choice, size),
        ConfigLine(
            "evaluation.every_epochs", 5, "epochs between evaluations on the selection split"
        ),
        ConfigLine("test.images", 1000, "at most; 0: all of the test split"),
        ConfigLine("alarm.images", 16, "few images suffice to detect overfitting to the attack"),
    ]


def side(data: DataFacts) -> int:
    """Choose the network's image size: the common size of all images, or a usual size below."""
    usual = data.sides[1]
    if data.same_size and usual <= _SIDES[-1]:
        return usual
    return max((s for s in _SIDES if s <= usual), default=_SIDES[0])


def _network(data: DataFacts, choice: NetworkChoice, size: int) -> list[ConfigLine]:
    names, (smallest, usual, largest) = data.classes, data.sides
    few = ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
    why = f"all images have {usual} px on their shorter side"
    if not data.same_size:
        why = f"shorter sides are {smallest} to {largest} px, mostly near {usual}"
        why += "; smaller ones are upsampled" if smallest < size else ""
    lines = [
        ConfigLine("model.num_classes", len(names), f"classes: {few}"),
        ConfigLine("model.image_size", size, why),
        ConfigLine("model.in_channels", data.channels, "gray" if data.channels == 1 else "color"),
    ]
    if choice.torch:
        name = ConfigLine("model.name", f"torch:{choice.torch}", "your PyTorch network")
        if not choice.torch_args:
            return [name, *lines]
        options = ConfigLine("model.options", choice.torch_args, "arguments of that function")
        return [name, *lines, options]
    if choice.weights:
        name = ConfigLine("model.name", choice.model, "the network of the weights below")
        start = ConfigLine("init.weights", choice.weights, "the weights that you named")
        if choice.classes in (None, len(data.classes)):
            return [name, *lines, start]
        reason = f"they have {choice.classes} classes, and your data has {len(data.classes)}"
        return [name, *lines, start, ConfigLine("init.head", "fresh", reason)]
    if choice.model or size <= _SMALL or data.channels != 3:
        small = "convnext_n" if size < 16 else "convnext_n_cvst"
        why = "the network that you named" if choice.model else "small, made for 8 to 64 px"
        return [ConfigLine("model.name", choice.model or small, why), *lines]
    return [
        ConfigLine("model.name", "convnext_t_cvst", "the paper's smallest, with its ConvStem"),
        *lines,
        ConfigLine("init.weights", _PUBLIC, "public clean weights, to download; None: random"),
        ConfigLine("init.stem", "fresh", "these weights have a different stem"),
        ConfigLine("init.head", "fresh", "these weights are for ImageNet's 1,000 classes"),
        ConfigLine("init.normalize", "imagenet", "as these weights were trained"),
    ]


def _data(data: DataFacts, size: int) -> list[ConfigLine]:
    # A crop of a padded image keeps its size; only resized crops take images of several sizes.
    crop = "crop" if data.same_size and size <= _SMALL and size == data.sides[1] else "basic"
    mirrored = {"crop": "crop-flip", "basic": "resized-crop-flip"}[crop]
    grey = data.channels == 1  # mostly characters
    why = "mirroring may change the class" if grey else f"use {crop} if mirroring changes the class"
    augmentation = ConfigLine("data.augmentation", crop if grey else mirrored, why)
    return [
        ConfigLine("data.name", data.name, f"{data.images:,} images to train on"),
        ConfigLine("data.train_split", data.splits["train"], data.divided),
        ConfigLine(
            "data.selection_split", data.splits["selection"], "the best weights are chosen on these"
        ),
        ConfigLine("data.test_split", data.splits["test"], "the result is reported on these"),
        augmentation,
    ]


def _training(data: DataFacts, size: int, starts: bool) -> list[ConfigLine]:
    batch = 256 if size <= _SMALL else 64
    while batch > 8 and batch > data.images // 16:
        batch //= 2
    per_epoch = max(data.images // batch, 1)
    clean = "for the fresh parts, before the attack" if starts else "first, as in the paper"
    refusals = []
    for phase, updates, why in (
        ("pretrain", _CLEAN_UPDATES, f"clean epochs {clean}"),
        ("train", _ATTACKED_UPDATES, "a first run; papers train far longer"),
    ):
        epochs = min(max(round(updates / per_epoch), 3), _MOST_EPOCHS)
        steps = epochs * per_epoch
        decay = float(f"{min(max(1 - 10 / steps, 0.5), 0.9999):.3g}")
        refusals += [
            ConfigLine(f"{phase}.epochs", epochs, why),
            ConfigLine(f"{phase}.batch_size", batch, f"{counted(per_epoch, 'update')} per epoch"),
            ConfigLine(f"{phase}.warmup_epochs", max(epochs // 10, 1), "a tenth of the epochs"),
            ConfigLine(f"{phase}.ema_decay", decay, f"averages over a tenth of {steps:,} updates"),
        ]
    return refusals


def _threat(choice: NetworkChoice, size: int) -> list[ConfigLine]:
    small = size <= _SMALL
    usual = RADII[choice.norm][0 if small else 1]
    written = choice.epsilon or usual
    reason = "the radius that you chose"
    if choice.epsilon is None:
        reason = f"the usual radius for images {'up to' if small else 'above'} {_SMALL} px"
    check_radius(choice.norm, float(Fraction(written.replace(" ", ""))))
    value = Expression(" / ".join(part.strip() for part in written.split("/")))
    wide = choice.norm == "linf" and Fraction(written.replace(" ", "")) >= Fraction(8, 255)
    usual_steps = base().attack.steps
    few = "with few steps, training overfits to the attack at this radius"
    steps, why = (5, few) if wide else (usual_steps, "the paper's number of APGD steps")
    return [
        ConfigLine("attack.norm", choice.norm, "the norm of the perturbations"),
        ConfigLine("attack.epsilon", value, f"{reason}, pixels are in [0, 1]"),
        ConfigLine("attack.steps", steps, why),
    ]


def text(data: DataFacts, lines: Sequence[ConfigLine], file: str) -> str:
    """Format the lines with their reasons as a config, headed by its usage."""
    first = f"{data.name}: {data.images:,} images to train on, {len(data.classes)} classes."
    body, section = [], ""
    for line in lines:
        if line.key.partition(".")[0] != section:
            section = line.key.partition(".")[0]
            body.append("")
        value = line.value if isinstance(line.value, Expression) else repr(line.value)
        if isinstance(line.value, str) and not isinstance(line.value, Expression):
            value = value if '"' in line.value else f'"{line.value}"'
        code = f"    config.{line.key} = {value}"
        if len(code) + len(line.reason) + 4 <= _COLUMNS:
            body.append(f"{code}  # {line.reason}")
        else:
            above = textwrap.wrap(line.reason, _COLUMNS - 6)
            body += [*(f"    # {part}" for part in above), code]
    return "\n".join(
        [
            f'"""{first}',
            "",
            f"    jaxrobust check {shlex.quote(file)}",
            f"    jaxrobust train {shlex.quote(file)}",
            "",
            "Written by jaxrobust new, based on the data. Edit it as needed.",
            '"""',
            "",
            "from jaxrobust.config import base",
            "",
            "# `jaxrobust why` prints this.",
            'SOURCES = {"*": "ours: jaxrobust new chose it for these images"}',
            "",
            "",
            "def get_config():",
            "    config = base()",
            *body[1:],
            "    return config",
            "",
        ]
    )


def write(file: Path, content: str, lists: dict[str, list[str]]) -> None:
    """Write a config and its lists of images; raise if a file exists."""
    for path in (file, *map(Path, lists)):
        if os.path.lexists(path):
            raise ValueError(f"{path} already exists; name another file, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, images in lists.items():
        Path(name).write_text("\n".join(images) + "\n")
    file.write_text(content)
