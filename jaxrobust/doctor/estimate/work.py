"""The amount of work in a config: images, steps and evaluations of each phase."""

import math
from typing import Any, NamedTuple

from jaxrobust.attacks import fixed_steps
from jaxrobust.config import Config, TestSection, of_phase, phases
from jaxrobust.data.source import DataError, Source
from jaxrobust.data.splits import grammar, known_sizes, subsets
from jaxrobust.training import build
from jaxrobust.training.run import splits
from jaxrobust.training.update import objectives
from jaxrobust.types import threats


class SizedSplit(NamedTuple):
    """A split of a data set, opened if it is here."""

    images: int
    source: Source | None  # None: `images` is the published number


class PhaseWork(NamedTuple):
    """The work of one phase."""

    name: str
    config: Config  # as the phase sees it
    train: SizedSplit
    rows: int  # images per epoch, with repetitions
    steps: int  # of the whole phase
    probes: int  # checks by the alarm
    selections: int  # evaluations on the selection split
    selection: SizedSplit
    test: SizedSplit

    @property
    def batch_size(self) -> int:
        """The number of images per step on all devices together."""
        return self.config[self.name].batch_size

    def evaluated(self, key: str) -> int:
        """Count the images of one evaluation; `key` is "evaluation" or "test"."""
        split = self.selection if key == "evaluation" else self.test
        return min(split.images, self.evaluation(key).images or split.images)

    def evaluation(self, key: str) -> TestSection:
        """Look up the section of an evaluation; `key` is "evaluation" or "test"."""
        return self.config.evaluation if key == "evaluation" else self.config.test


class PhaseCost(NamedTuple):
    """Seconds of each part of a phase, once, and the memory of its step."""

    step: float
    probe: float
    selection: float  # of one complete evaluation
    test: float
    memory: int  # bytes per device
    figures: dict[str, Any]  # further facts about the step
    compile: float = 0.0  # of all programs
    save: float = 0.0  # of the weights and the state


def work(config: Config) -> list[PhaseWork]:
    """Count the work of all phases that run."""
    counted = []
    for name in phases(config):
        of = of_phase(config, name)
        p, train = of[name], split(of, "train_split")
        rows = _rows(of, name, train)
        if p.batch_size < 1 or p.batch_size > rows:
            raise ValueError(
                f"{name}.batch_size={p.batch_size} must be at least 1, at most the split's {rows}"
            )
        steps = p.epochs * (rows // p.batch_size)
        looks = of.alarm.every_steps if objectives.named(p.objective).attacks else 0
        probes = steps // looks if looks else 0
        selections = math.ceil(p.epochs / of.evaluation.every_epochs)
        splits_of = (split(of, "selection_split"), split(of, "test_split"))
        counted.append(PhaseWork(name, of, train, rows, steps, probes, selections, *splits_of))
    return counted


def _rows(config: Config, name: str, train: SizedSplit) -> int:
    """Count the rows of an epoch, using known sizes if its sources are not here."""
    data, here = config.data, train.source is not None
    counted = data.extra is not None and data.epoch_images is not None
    if here and counted:
        try:
            splits.extra(config)
        except DataError:
            here = False
    if here:
        return splits.examples(config, name, train.source)  # type: ignore[arg-type]
    if counted:
        return data.epoch_images  # type: ignore[return-value]
    fresh = 1 - data.extra_share if data.extra else 1
    return round(train.images * data.views / fresh)


def split(config: Config, key: str) -> SizedSplit:
    """Open a split of the config's data set, or look up its published size if it is not here."""
    try:
        source = splits.opened(config, key)
        return SizedSplit(len(source), source)
    except DataError as error:
        is_here = "num_classes" in str(error) and "is whole" in str(error)
        images = (
            None if is_here else _published_size(config, key)
        )  # the data set is here but does not match the config
        if images is None:
            raise
        return SizedSplit(images, None)


def _published_size(config: Config, key: str) -> int | None:
    data, wanted = config.data, grammar.parse(config.data[key])
    name = data.name.removeprefix("tfds:").partition(":")[0]
    sizes = known_sizes.IMAGES.get(name)
    if sizes is None or wanted is None:
        return None
    if wanted.ids is None:
        total = sizes.get(grammar.present(wanted.name, sizes) or "")
    elif name == "imagenet2012":
        total = known_sizes.LISTS.get(wanted.ids)
    else:
        total = sizes.get(wanted.name)
    if total is None:
        return None
    if data.classes is not None:  # assumes classes of equal size
        total = round(total * len(subsets.read_classes(data.classes)) / known_sizes.CLASSES[name])
    return len(grammar.rows(wanted.part, total, f"{data.name}, split {data[key]!r}"))


def evaluation_flops(work: PhaseWork, key: str) -> float:
    """Count the model's operations in one evaluation."""
    attack = fixed_steps.parse(work.config.evaluation.attack) if key == "evaluation" else None
    apgd = 2 * work.evaluation(key).steps + 1
    per_norm = attack.forward + attack.backward if attack else apgd
    norms = len(threats(work.config.attack))
    passes = 2 + norms * per_norm + norms - 1  # 2: verdicts before and after; one between norms
    return passes * build.forward_flops(work.config) * work.evaluated(key)
