"""Whether the cores of the hosts decode images as fast as the chips want them."""

import math
from typing import NamedTuple

from jaxrobust.config import SPARED
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.doctor.estimate.work import PhaseWork
from jaxrobust.runtime.text.spelling import counted

# Images/s of one core: photographs of 110 kB to 224 px, `python tools/bench_data.py FOLDER`, the
# table "Data" of tools/README.md; of other chains nothing is known.
PER_CORE = {"basic": 546, "light": 452, "3-augment": 378, "heavy": 405}
_PHOTOGRAPHS = 224  # px; of smaller images no rate is known


class Host(NamedTuple):
    """The machine that so many chips, as JAX counts them, are in."""

    chips: int
    cores: int  # vCPUs


# vCPUs of a host of each machine type for slices, as Google Cloud lists them: those of v5e and of
# TPU7x were looked up, the others are from memory. The hosts of GPUs are whatever people rent.
HOSTS = {
    "TPU v4": Host(4, 240),
    "TPU v5e": Host(4, 112),
    "TPU v5p": Host(4, 208),
    "TPU v6e": Host(4, 180),
    "TPU7x": Host(8, 224),  # four chips, which JAX counts twice
}


def cores(work: PhaseWork, images_per_s: float) -> float | None:
    """Count the cores that decode so many images/s; None: no rate is known of such images."""
    data, size = work.config.data, work.config.model.image_size
    chains = {PRESETS[name].chain: name for name in PER_CORE}
    chain = PRESETS[data.augmentation].chain if data.augmentation in PRESETS else data.augmentation
    encoded = (
        data.name.removeprefix("tfds:").startswith("imagenet")
        if work.train.source is None
        else work.train.source.image_shape is None
    )
    if not encoded or size != _PHOTOGRAPHS or chain not in chains:
        return None
    return images_per_s / PER_CORE[chains[chain]]


def line(work: PhaseWork, target: Target, images_per_s: float) -> str | None:
    """Say what decoding takes, and warn where the hosts do not have it; None: nothing is known."""
    wanted = cores(work, images_per_s)
    if wanted is None or target.here:  # where a step is measured with its data
        return None
    needs = (
        f"{work.name}: {images_per_s:,.0f} images/s keep {math.ceil(wanted):,} cores busy with "
        f"decoding and data.augmentation={work.config.data.augmentation}"
    )
    host = HOSTS.get(target.kind)
    if host is None:
        return f"{needs}, {wanted / target.chips:.1f} for each {target.kind}."
    number = math.ceil(target.chips / host.chips)
    there = number * (host.cores * min(target.chips / host.chips, 1) - SPARED)
    if wanted <= there:
        return f"{needs}, of {there:,.0f} on {counted(number, 'host')}."
    return (
        f"WARNING: {needs}, and there are {there:,.0f} on {counted(number, 'host')}: the chips "
        f"wait for data {1 - there / wanted:.0%} of the time at least; take a cheaper "
        "data.augmentation."
    )
