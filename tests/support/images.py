"""Pictures for the tests of the data package, and the references that look at them."""

import functools
import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, features

from tests.support.paths import PARITY, SHARED


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
            from jaxrobust.publish import torch_networks
        except ImportError:
            test.skipTest(PARITY)
        torch_networks.import_timm()  # declares what torchvision misses on a CPU build
        import torch
        import torchvision

    return torch, torchvision


def png(rows, depth, kind):
    """A PNG of the big-endian rows; for what Pillow reads but does not write."""

    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def odd_images(height=61, width=93):
    """{what it is: a file} of every kind that people find among photographs."""
    pixels, grey = pattern(height, width), pattern(height, width, 1)[:, :, 0]
    picture = Image.fromarray(pixels)

    def saved(image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    deep = pattern(height, width).astype(">u2") * 257 + 13
    palette = picture.quantize(16)
    alpha = Image.fromarray(255 - grey)
    transparent = picture.copy()
    transparent.putalpha(alpha)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    cmyk = saved(picture.convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"Adobe")
    wide = np.arange(height * width, dtype=np.int32).reshape(height, width) * 23 - 40000
    images = {
        "JPEG 4:4:4": saved(picture, "JPEG", subsampling=0),
        "JPEG 4:2:2": saved(picture, "JPEG", subsampling=1),
        "JPEG 4:2:0": saved(picture, "JPEG", subsampling=2, quality=95),
        "JPEG of quality 3": saved(picture, "JPEG", quality=3),
        "progressive JPEG": saved(picture, "JPEG", progressive=True),
        "JPEG with restarts": saved(picture, "JPEG", restart_marker_blocks=3),
        "JPEG turned by EXIF": saved(picture, "JPEG", exif=rotated),
        "RGB JPEG": saved(picture, "JPEG", keep_rgb=True),
        "gray JPEG": saved(Image.fromarray(grey), "JPEG"),
        "JPEG 1 wide": saved(picture.crop((0, 0, 1, height)), "JPEG"),
        "JPEG 1 high": saved(picture.crop((0, 0, width, 1)), "JPEG"),
        "JPEG of 1 pixel": saved(picture.crop((0, 0, 1, 1)), "JPEG"),
        "JPEG with a tail": saved(picture, "JPEG") + b"tail\xff\xd8\xff",
        "MPO": saved(picture, "MPO", save_all=True, append_images=[picture.rotate(180)]),
        "inverted CMYK JPEG": cmyk,
        "plain CMYK JPEG": cmyk[: adobe - 4] + cmyk[adobe + 12 :],
        "YCCK JPEG": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
        "palette PNG": saved(palette, "PNG"),
        "palette PNG, one color transparent": saved(palette, "PNG", transparency=3),
        "palette PNG, transparent": saved(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "RGB PNG, one color transparent": saved(picture, "PNG", transparency=(1, 2, 3)),
        "gray PNG": saved(Image.fromarray(grey), "PNG"),
        "PNG of 1 bit": saved(picture.convert("1"), "PNG"),
        "LA PNG": saved(transparent.convert("LA"), "PNG"),
        "RGBA PNG": saved(transparent, "PNG"),
        "PNG 1 wide": saved(picture.crop((0, 0, 1, height)), "PNG"),
        "PNG 1 high": saved(picture.crop((0, 0, width, 1)), "PNG"),
        "gray PNG of 16 bits": png(deep[:, :, 0], 16, 0),
        "LA PNG of 16 bits": png(deep[:, :, :2], 16, 4),
        "RGB PNG of 16 bits": png(deep, 16, 2),
        "TIFF of 16 bits": saved(Image.fromarray(deep[:, :, 0].astype(np.uint16)), "TIFF"),
        "TIFF of 32 bits": saved(Image.fromarray(wide), "TIFF"),
        "TIFF of floats": saved(Image.fromarray((wide / 50).astype(np.float32)), "TIFF"),
        "CMYK TIFF": saved(picture.convert("CMYK"), "TIFF"),
        "LAB TIFF": saved(Image.merge("LAB", picture.split()), "TIFF"),
        "GIF": saved(palette, "GIF", transparency=2),
        "moving GIF": saved(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        "BMP": saved(picture, "BMP"),
        "PPM": saved(picture, "PPM"),
    }
    if features.check("webp"):
        images["WebP"] = saved(transparent, "WEBP", lossless=True)
    if features.check("libtiff"):
        images["TIFF with JPEG inside"] = saved(picture, "TIFF", compression="jpeg")
    return images


def pillow(data):
    """The reference: what Pillow makes of the file, or None for what it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency that is lost, broken EXIF
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        except Exception:
            return None
