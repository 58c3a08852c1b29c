"""Pictures for the tests of the data package, and the references that look at them."""

import hashlib
import io
import warnings

import numpy as np
from PIL import Image

from tests.paths import PARITY, SHARED


def pattern(height, width, channels=3):
    """A picture with edges and slopes, the same on every machine."""
    y, x, c = np.indices((height, width, channels))
    return ((x * (c + 3) + y * 5 + (x // 7 % 2) * 90 + (y // 11 % 2) * (40 + 30 * c)) % 256).astype(
        np.uint8
    )


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind, **options)
    return buffer.getvalue()


def photographs(count):
    return sorted((SHARED / "data" / "imagenet_samples").glob("*/*.JPEG"))[:count]


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def torchvision(test):
    """torch and torchvision; the test is skipped without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        try:
            from tools import torch_reference
        except ImportError:
            test.skipTest(PARITY)
        torch_reference.import_timm()  # declares what torchvision misses on a CPU build
        import torch
        import torchvision

    return torch, torchvision
