"""Write the data set that ships in `jaxrobust/data/digits`: `python tools/make_digits.py`.

The 1,797 handwritten digits that scikit-learn carries (a test part of UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0) as a TFDS data set in ArrayRecord, without TensorFlow.
The bytes depend only on the pixels, on `SEED` and on the ArrayRecord library.
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from jaxrobust.runtime.commandline.arguments import Arguments

SEED = 0
TEST_SIZE = 397
VERSION = "1.0.0"
TARGET = Path(__file__).resolve().parents[1] / "jaxrobust" / "data" / "digits"
DESCRIPTION = (
    "Handwritten digits, 8x8 grey: the test part of UCI 'Optical Recognition of Handwritten "
    "Digits' as scikit-learn carries it, 0..16 scaled to 0..255. CC BY 4.0, Alpaydin & Kaynak 1998."
)


def png(image: np.ndarray) -> bytes:
    """PNG of a grey image u8[H,W], stored: the same bytes whatever the zlib behind Python."""
    height, width = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # filter 0 before every row
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stored += struct.pack(">I", zlib.adler32(rows))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def example(image: np.ndarray, label: int) -> bytes:
    """One serialised `tf.train.Example` with the features `image` (PNG) and `label`."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    message.features.feature["image"].bytes_list.value.append(png(image))
    message.features.feature["label"].int64_list.value.append(label)
    return message.SerializeToString(deterministic=True)


def info(sizes: dict[str, tuple[int, int]]) -> dict:
    """Return the content of `dataset_info.json`; `sizes` maps a split to (records, bytes)."""
    return {
        "citation": "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten "
        "Digits. UCI Machine Learning Repository. https://doi.org/10.24432/C50P49",
        "description": DESCRIPTION,
        "fileFormat": "array_record",
        "moduleName": "jaxrobust.tools.make_digits",
        "name": "digits",
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(count_bytes),
                "shardLengths": [str(count)],
            }
            for split, (count, count_bytes) in sizes.items()
        ],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": VERSION,
    }


FEATURES = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": {
                "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
                "image": {
                    "shape": {"dimensions": ["8", "8", "1"]},
                    "dtype": "uint8",
                    "encodingFormat": "png",
                },
            },
            "label": {
                "pythonClassName": (
                    "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
                ),
                "classLabel": {"numClasses": "10"},
            },
        }
    },
}


def write(images: np.ndarray, labels: np.ndarray, target: Path) -> None:
    """Write `images` u8[N,8,8] and `labels` i[N] as `target/digits/VERSION`, split by `SEED`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = target / "digits" / VERSION
    directory.mkdir(parents=True, exist_ok=True)
    # PCG64's `permutation` may change with NumPy; sorting raw 64-bit draws cannot.
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(images)), kind="stable")
    sizes = {}
    for split, rows in {"train": order[TEST_SIZE:], "test": order[:TEST_SIZE]}.items():
        records = [example(images[row], int(labels[row])) for row in rows]
        path = directory / f"digits-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        sizes[split] = (len(records), sum(map(len, records)))
    for name, content in {"dataset_info.json": info(sizes), "features.json": FEATURES}.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (directory / "label.labels.txt").write_text("".join(f"{digit}\n" for digit in range(10)))


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
