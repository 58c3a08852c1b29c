"""Write the bundled data set `jaxrobust/data/digits`: `python tools/generate/make_digits.py`.

The 1,797 handwritten digits in scikit-learn (a test part of UCI "Optical Recognition of Handwritten
Digits", CC BY 4.0) as a TFDS data set in ArrayRecord, without TensorFlow.
The bytes depend only on the pixels, on `SEED` and on the ArrayRecord library.
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from jaxrobust.data.prepare import writer
from jaxrobust.runtime.commandline.arguments import Arguments

SEED = 0
TEST_SIZE = 397
TARGET = Path(__file__).resolve().parents[2] / "jaxrobust" / "data" / "digits"
ABOUT = writer.About(
    name="digits",
    version="1.0.0",
    description="Handwritten digits, 8x8 gray: the test part of UCI 'Optical Recognition of "
    "Handwritten Digits' as scikit-learn carries it, 0..16 scaled to 0..255. CC BY 4.0, Alpaydin & "
    "Kaynak 1998.",
    module="jaxrobust.tools.make_digits",
    labels={"label": [str(digit) for digit in range(10)]},
    shape=(8, 8, 1),
    encoding="png",
    citation="Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. UCI "
    "Machine Learning Repository. https://doi.org/10.24432/C50P49",
)


def png(image: np.ndarray) -> bytes:
    """Encode a gray image u8[H,W] as an uncompressed PNG: the same bytes for any zlib."""
    height, width = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # filter 0 before every row
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stored += struct.pack(">I", zlib.adler32(rows))

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, gray
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def write(images: np.ndarray, labels: np.ndarray, target: Path) -> None:
    """Write `images` u8[N,8,8] and `labels` i[N] as `target/digits/VERSION`, split by `SEED`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = target / "digits" / ABOUT.version
    folder.mkdir(parents=True, exist_ok=True)
    # PCG64's `permutation` may change with NumPy; sorting raw 64-bit draws cannot.
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(images)), kind="stable")
    lengths, sizes = {}, {}
    for split, rows in {"train": order[TEST_SIZE:], "test": order[:TEST_SIZE]}.items():
        pairs = [(png(images[row]), int(labels[row])) for row in rows]
        records = [writer.example({"image": image, "label": label}) for image, label in pairs]
        path = folder / writer.file_name("digits", split, 0, 1)
        shard = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            shard.write(record)
        shard.close()
        lengths[split], sizes[split] = [len(records)], sum(map(len, records))
    info = writer.info(ABOUT, lengths, sizes)
    writer.write_json(folder / writer.INFO, info)
    writer.write_json(folder / writer.FEATURES, writer.features(ABOUT))
    (folder / "label.labels.txt").write_text("".join(f"{n}\n" for n in ABOUT.labels["label"]))


def main(argv: list[str] | None = None) -> int:
    parser = Arguments(__doc__)
    parser.flag(
        "target", type=Path, default=TARGET, help="Folder that is written; default: %(default)s."
    )
    arguments = parser.parse_args(argv)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("scikit-learn carries the pixels: pip install scikit-learn", file=sys.stderr)
        return 2
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    write(images, labels, arguments.target)
    print(f"wrote {len(images)} digits to {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
