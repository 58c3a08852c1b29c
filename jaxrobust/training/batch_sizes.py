"""Batches that the devices do not divide, such as those of papers on 256 chips."""

import math
from typing import Any

from jaxrobust.config import Config
from jaxrobust.resolved import of_phase, phases
from jaxrobust.training import build

FARTHEST = 0.5  # of a batch, by which the nearest one may differ; a wider step is left to people


def fitted(config: Any, devices: int) -> tuple[Any, list[str]]:
    """Give each phase the nearest batch that so many devices divide, and say it.

    Returns:
      the config, a changed copy where a batch changes, and a sentence for each that does. A batch
      without another one nearby stays, for `build.divides` to refuse.
    """
    sizes, sentences = {}, []
    for name in phases(config):
        p = config[name]
        nearest = _nearest(of_phase(config, name), name, devices)
        if p.batch_size % devices and abs(nearest - p.batch_size) <= FARTHEST * p.batch_size:
            sizes[name] = nearest
            sentences.append(
                f"{name}.batch_size={p.batch_size} cannot be split over {devices} devices: it "
                f"becomes {nearest}, the nearest that can, and {name}.lr stays {p.lr:g}"
            )
    return (_copied(config, sizes) if sizes else config), sentences


def _nearest(seen: Config, name: str, devices: int) -> int:
    """Find the nearest batch whose share on a device can be mixed and taken in parts as asked.

    Of two that are as near, the larger.
    """
    p = seen[name]
    mixes = any(build.mixes_and_erases(seen)[:2])
    norm = seen.model.options.get("bn_group", 0) or 1
    at_a_time = math.lcm(max(p.microbatches, 1) * norm, max(seen.mixup.group, 1) if mixes else 1)
    unit = devices * at_a_time
    return max(math.floor(p.batch_size / unit + 0.5), 1) * unit


def _copied(config: Any, sizes: dict[str, int]) -> Any:
    copied = config.copy_and_resolve_references()
    for name, size in sizes.items():
        copied[name].batch_size = size
    return copied
