"""What the images of a source are, as a hash: of their bytes and labels, whatever their names."""

import hashlib

from jaxrobust.data.source import Source

_READ = 64  # records at a time


def content_sha256(source: Source, images: int) -> str:
    """Hash the encoded bytes and the labels of the first records of a source, in their order."""
    digest = hashlib.sha256()
    for start in range(0, images, _READ):
        for record in source.read(range(start, min(start + _READ, images))):
            digest.update(f"{record.label} {len(record.image)} ".encode())
            digest.update(record.image)
    return digest.hexdigest()
