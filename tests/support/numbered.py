"""A source whose images say which record they are, and batches of it."""

import functools

import numpy as np

from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline


def numbered(size=37, side=8, *, offset=0):
    """A source whose image of record i is filled with i + offset, label i % 10."""
    return registry.Source(
        name="numbered",
        split="train",
        size=size,
        num_classes=10,
        channels=1,
        image_shape=(side, side, 1),
        read=functools.partial(read_numbered, side=side, offset=offset),
    )


def read_numbered(indices, *, side, offset=0, broken=(), wrong=()):
    """Its records; `broken` ones are not images, `wrong` ones are larger."""
    records = []
    for index in indices:
        here = side + 1 if index in wrong else side
        image = b"P5 %d %d 255\n" % (here, here) + bytes([index + offset]) * here**2
        records.append(registry.Record(b"nonsense" if index in broken else image, index % 10))
    return records


def taken(source, steps, **options):
    """The first `steps` batches, as images and labels."""
    options = {"augmentation": "none", "image_size": 8, "seed": 3} | options
    batches = pipeline.train_batches(source, **options)
    try:
        found = [next(batches) for _ in range(steps)]
    finally:
        batches.close()
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))[:2]
