"""Write the bundle of an evaluation under common corruptions: its answers, image by image.

The corrupted images are not stored: whoever checks a bundle has the files of the data set, or
computes them from the seed of the record. Their hashes are stored, one for each image.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxrobust.evaluation.bundles import bundle, claims
from jaxrobust.evaluation.bundles.claims_corrupted import pixels
from jaxrobust.evaluation.bundles.contradictions import BundleFacts, ImageRow
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.text.progress import say

_ENCODING = (
    "images.jsonl has a line for each image: its place in the split, label, `right`, which has a 1 "
    "for each of `corruptions`, in their order, under which the network classifies it correctly, "
    "and the sha256 of the image under all of these corruptions in this order, uint8[H,W,C] each. "
    "`clean` is the image as it is, KIND-SEVERITY a common corruption."
)


def of_record(
    place: Path,
    record: AccuracyRecord,
    images: Mapping[str, ImageSet],
    labels: np.ndarray,
    right: Mapping[str, np.ndarray],
    *,
    ids: np.ndarray,
    split_images: int,
    batch: int = 64,
) -> None:
    """Write the bundle of an evaluation under common corruptions, unless it is there.

    Args:
      images, right: for each corruption by its name, and for `clean` where that was measured, the
        images, and bool[N], which of them the network classifies correctly.
      labels, ids: i[N]; ids are the images' places in the split.
      split_images: images of the split.
    Raises:
      ValueError: the folder is taken.
    """
    if bundle.check_place(place, str(record.evaluation)):
        say(f"the bundle {place} is there already; nothing is written")
        return
    about: BundleFacts = {
        "schema": claims.CORRUPTED_SCHEMA,
        "image": list(next(iter(images.values())).shape[1:]),
        "encoding": _ENCODING,
        "corruptions": list(images),
        "record": record.to_json(),
        "split_images": split_images,
    }
    marks = np.stack([right[name] for name in images], axis=1)
    with bundle.written(place) as part:
        (part / claims.ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        with (part / claims.ROWS).open("w") as rows:
            for start in range(0, len(labels), batch):
                which = np.arange(start, min(start + batch, len(labels)))
                sums = [hashlib.sha256() for _ in which]
                for own in images.values():
                    for digest, image in zip(sums, own[which], strict=True):
                        digest.update(pixels(image))
                for number, digest in zip(which.tolist(), sums, strict=True):
                    row: ImageRow = {
                        "image": int(ids[number]),
                        "label": int(labels[number]),
                        "sha256": digest.hexdigest(),
                        "right": "".join(str(int(mark)) for mark in marks[number]),
                    }
                    rows.write(json.dumps(row) + "\n")
    answers = f"{len(labels):,} images under {len(images)} corruptions"
    size = sum(file.stat().st_size for file in place.iterdir())
    say(f"bundle {place}: the answers to {answers}, {size / 2**20:.1f} MiB")
