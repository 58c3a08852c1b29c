"""Small data sets on disk for tests: folders of images, TFDS directories."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def image_bytes(number: int, kind: str = "JPEG", size: tuple[int, int] = (9, 7)) -> bytes:
    """A tiny image file of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 5)).save(buffer, kind)
    return buffer.getvalue()


def write_tree(root: Path, paths: Iterable[str], content: bytes | None = None) -> None:
    """Files at `root/PATH`, each an image of its own unless `content` is said."""
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(number) if content is None else content)


def write_tfds(
    directory: Path,
    name: str,
    features: Mapping,
    splits: Mapping[str, list[Mapping]],
    *,
    shards: int = 1,
) -> None:
    """The data set `name` in `directory`, a version's; a record maps features to bytes or label."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    directory.mkdir(parents=True)
    tfds.features.FeaturesDict(dict(features)).save_config(directory)
    infos = []
    for split, records in splits.items():
        lengths = []
        for shard, rows in enumerate(np.array_split(np.arange(len(records)), shards)):
            file = f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"
            writer = ArrayRecordWriter(str(directory / file), "group_size:1")
            for row in rows:
                message = tf_example_pb2.Example()
                for key, value in records[row].items():
                    feature = message.features.feature[key]
                    if isinstance(value, bytes):
                        feature.bytes_list.value.append(value)
                    else:
                        feature.int64_list.value.append(value)
                writer.write(message.SerializeToString())
            writer.close()
            lengths.append(str(len(rows)))
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1",
                "shardLengths": lengths,
            }
        )
    info = {
        "fileFormat": "array_record",
        "moduleName": "tests.datasets",
        "name": name,
        "splits": infos,
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": directory.name,
    }
    (directory / "dataset_info.json").write_text(json.dumps(info))
