"""Batches that the devices do not divide, such as those of papers on 256 chips."""

import math
from typing import Any

from jaxrobust.config import Config, of_phase, phases
from jaxrobust.training import build

FARTHEST = 0.5  # of a batch, by which the nearest one may differ; a wider step is left to people


def fitted(config: Any, devices: int) -> tuple[Any, list[str]]:
    """Give each phase the nearest batch that so many devices divide, and say it.

    A batch that one device could not take either, because mixing groups, microbatches or groups of
    a batch norm do not divide it, is a mistake of another kind, unless devices do not divide it.

    Returns:
      the config, a changed copy where a batch changes, and a sentence for each that does. A batch
      without another one nearby stays, for `build` to refuse.
    """
    sizes, sentences = {}, []
    for name in phases(config):
        p = config[name]
        at_a_time = _at_a_time(of_phase(config, name), name)
        unit = devices * at_a_time
        # Of two that are as near, the larger.
        nearest = max(math.floor(p.batch_size / unit + 0.5), 1) * unit
        parted = p.batch_size % devices == 0
        wrong = p.batch_size % (unit if p.batch_size % at_a_time == 0 else devices)
        if wrong and abs(nearest - p.batch_size) <= FARTHEST * p.batch_size:
            sizes[name] = nearest
            each = (
                f"into parts of {p.batch_size // devices} images, because {at_a_time} go together"
            )
            sentences.append(
                f"{name}.batch_size={p.batch_size} cannot be split over {devices} devices"
                f"{f' {each}' if parted else ''}: it becomes {nearest}, the nearest that can, and "
                f"{name}.lr stays {p.lr:g}"
            )
    return (_copied(config, sizes) if sizes else config), sentences


def _at_a_time(seen: Config, name: str) -> int:
    """Count the images of a device that go together: to be mixed, normalised, taken in parts."""
    p = seen[name]
    mixes = any(build.mixes_and_erases(seen)[:2])
    norm = seen.model.options.get("bn_group", 0) or 1
    return math.lcm(max(p.microbatches, 1) * norm, max(seen.mixup.group, 1) if mixes else 1)


def _copied(config: Any, sizes: dict[str, int]) -> Any:
    copied = config.copy_and_resolve_references()
    for name, size in sizes.items():
        copied[name].batch_size = size
    return copied
