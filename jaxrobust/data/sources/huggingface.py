"""Image classification sets of Hugging Face's `datasets` (the extra `hf`): `hf:NAME`, `hf:FOLDER`.

The `datasets` library downloads them to its own cache (HF_HOME) and keeps them as Arrow files
there. Records are the encoded images in these files, memory-mapped.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data.source import DataError, Record, Source, first_few
from jaxrobust.data.sources import headers, plausibility
from jaxrobust.data.splits import choosing, grammar, storage, subsets
from jaxrobust.runtime.files import download

PREFIX = "hf:"
INSTALL = "pip install 'jaxrobust[hf]'"
_HUB = re.compile(
    r"(?P<id>(?:[\w.-]+/)?[\w.-]+)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[^#\s]+))?"
)
_IMAGES = ("image", "img")  # usual column names, if the types do not decide
_LABELS = ("label", "labels", "fine_label", "cls")
_IMAGENET_NAME = re.compile(r"(ILSVRC2012_val_\d{8})_n\d{8}(\.JPEG)")  # has the class
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes

Table = Any  # pyarrow's type


class _Address(NamedTuple):
    """The parts of a name; `folder` if it is a local one."""

    id: str
    config: str | None
    revision: str | None
    label: str | None
    folder: Path | None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads records of a `datasets.Dataset` and can be pickled; `labels` int32[N]."""

    data: Any
    image_key: str
    labels: np.ndarray
    where: str

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        pairs = zip(indices, self.heads(indices), strict=True)
        return [Record(data, int(self.labels[index])) for index, data in pairs]

    def heads(self, indices: Sequence[int]) -> list[bytes]:
        """Return the image files."""
        rows = self.data[list(map(int, indices))][self.image_key] if len(indices) else []
        return [self._bytes(row) for row in rows]

    def _bytes(self, row: Mapping[str, Any] | None) -> bytes:
        if row and row["bytes"] is None and row["path"]:
            return storage.read_files([row["path"]], "restore the file")[0]
        return (row and row["bytes"]) or b""  # treat a missing image as damaged

    def describe(self, index: int) -> str:
        """Return the file's name, if there is one, and the record's number."""
        row = self.data[[int(index)]][self.image_key][0]
        name = os.path.basename((row and row["path"]) or "")
        return f"{name} (record {index})" if name else f"record {index}"


def open_hf(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Return the split `split` of `hf:NAME[:CONFIG][@REVISION][#LABEL]` or of `hf:FOLDER[#LABEL]`.

    FOLDER holds parquet files, SPLIT.parquet, SPLIT-00000-of-00002.parquet or SPLIT/0000.parquet,
    or what `save_to_disk` wrote. LABEL names the column of labels where several could be meant.
    `val` and `validation` are synonyms.
    """
    address = _parse(name)
    loaded = _load(name, address)
    import datasets  # `_load` explains how to install it

    sizes = {key: f"{len(data):,}" for key, data in loaded.items()}
    parsed, part = grammar.find(name, split, sizes)
    where = f"data set {name!r}, split {parsed.name!r}"
    image_key, label_key = _columns(loaded[part].features, address.label, name)
    labels, names = _labels(loaded, part, label_key, where)
    encoded = datasets.Image(decode=False)
    data = loaded[part].select_columns([image_key]).cast_column(image_key, encoded)
    reader = _Reader(data, image_key, labels, where)
    trained = labels
    if "train" in loaded and label_key in loaded["train"].features:
        trained, _ = _labels(loaded, "train", label_key, where)
    classes = names if isinstance(names, tuple) else ()
    files, lengths = _files(data.with_format("arrow")[:].column(image_key))
    content = labels.tobytes() + repr((files, lengths, names)).encode()
    described = hashlib.sha256(content).hexdigest()
    facts = headers.look(
        reader.heads,
        len(labels),
        where,
        reader.describe,
        lambda: f"{name} {getattr(data, '_fingerprint', '')} {described}",
        several_grey=True,
    )
    if facts is None:
        looked = [f"record {place}" for place in range(min(len(labels), 32))]
        raise DataError(f"{where}: none of {first_few(looked)} is an image")
    source = Source(
        name=name,
        split=parsed.name,
        size=len(labels),
        num_classes=len(names) if isinstance(names, tuple) else names,
        channels=facts.channels,
        image_shape=facts.image_shape,
        read=reader,
        remedy=_remedy(address),
        classes=classes,
        describe=reader.describe,
        files_sha256=described,
        labels=labels,
        notes=(*facts.notes, *plausibility.foreign(labels, trained, classes, where)),
    )
    return choosing.choose(source, parsed, split, choice, lambda: (labels, files))


def _parse(name: str) -> _Address:
    text, _, label = name.removeprefix(PREFIX).partition("#")
    folder = Path(text).expanduser()
    if text.startswith(("/", "./", "../", "~")) or folder.is_dir():
        if not folder.is_dir():
            raise DataError(f"data set {name!r}: there is no directory {folder}; check the path")
        return _Address(text, None, None, label or None, folder)
    match = _HUB.fullmatch(text)
    if match is None:
        raise DataError(
            f"{name!r} is not the name of a data set; write hf:NAME[:CONFIG][@REVISION][#LABEL], "
            "such as hf:uoft-cs/cifar100, or hf:FOLDER with parquet files"
        )
    return _Address(match["id"], match["config"], match["revision"], label or None, None)


def _load(name: str, address: _Address) -> dict[str, Any]:
    try:
        import datasets
        from datasets import exceptions
    except ImportError as error:
        raise DataError(f"{name} needs Hugging Face's datasets: {INSTALL}") from error
    try:
        if address.folder and any((address.folder / file).is_file() for file in _SAVED):
            dataset = datasets.load_from_disk(os.fspath(address.folder))
        elif address.folder:
            files = _parquet(address.folder)
            dataset = datasets.load_dataset(os.fspath(address.folder), data_files=files or None)
        else:
            with download.quiet_hub():
                dataset = _from_hub(address)
    except exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{name}: {_first(error)}; check the name and the revision, or log in with `hf auth "
            "login` if the data set is gated"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: the hub does not answer ({_first(error)}), and the data set is not in the "
            "cache; try again, or give a folder with its parquet files as hf:FOLDER"
        ) from error
    except (FileNotFoundError, StopIteration) as error:  # `datasets` found no files it knows
        raise DataError(
            f"{name} holds no parquet files; put SPLIT.parquet there, or write folder:PATH if "
            "PATH holds class folders"
        ) from error
    except (DataError, OSError):  # for example, a full disk
        raise
    except Exception as error:  # ValueError, RuntimeError, pyarrow's own types
        raise DataError(f"{name} cannot be loaded: {_why(error, address)}") from error
    return dict(dataset) if isinstance(dataset, dict) else {str(dataset.split or "all"): dataset}


def _parquet(folder: Path) -> dict[str, list[str]]:
    """Map splits to the parquet files of a folder; empty if a dataset card says more about them."""
    files: dict[str, list[str]] = {}
    if (folder / "README.md").is_file():
        return files
    for path in sorted(folder.rglob("*.parquet")):
        split = path.stem.partition("-")[0]
        split = path.parent.name if split.isdigit() else split
        files.setdefault(split, []).append(os.fspath(path.relative_to(folder)))
    return files


def _from_hub(address: _Address) -> Mapping[str, Any]:
    """Load a data set at its revision; `datasets` may otherwise take any other from its cache."""
    import datasets
    import huggingface_hub

    from jaxrobust.runtime.text.progress import say  # imports JAX, which reading does not need

    commit = address.revision
    if commit and not _COMMIT.fullmatch(commit):
        try:
            commit = huggingface_hub.HfApi().dataset_info(address.id, revision=commit).sha
        except huggingface_hub.errors.RevisionNotFoundError as error:
            raise DataError(f"hf:{address.id} has no revision {address.revision}") from error
        except Exception as error:  # no network, or no such data set: reported below
            if not isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
                raise ConnectionError(
                    f"cannot resolve the revision {address.revision}: {_first(error)}"
                ) from error
    say(f"hf:{address.id}: contacting the hub")
    dataset = datasets.load_dataset(address.id, address.config, revision=commit)
    files = [file["filename"] for data in dataset.values() for file in data.cache_files]
    if commit and files and not any(commit in Path(file).parts for file in files):
        raise DataError(f"hf:{address.id} has no revision {address.revision}")
    return dataset


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _remedy(address: _Address) -> str:
    if address.folder:
        return "copy its files again"
    return "remove its folder under HF_HOME to download it again, or give another revision"


def _why(error: Exception, address: _Address) -> str:
    text = " ".join(str(error).split())
    if configs := re.search(r"(?:available configs|Available): \[(.*?)\]", text):
        listed = configs[1].replace("'", "")
        return f"its configurations are {listed}; write hf:{address.id}:CONFIG to choose one"
    if "scripts are no longer supported" in text:
        other = "hf:NAME@refs/convert/parquet may hold the data"
        return f"it is a loading script, which is never run; {other}"
    return f"{_first(error)}; {_remedy(address)}"


def _columns(features: Mapping[str, Any], label: str | None, name: str) -> tuple[str, str]:
    import datasets

    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [key for key in _IMAGES if _is_bytes(features.get(key))]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels:
        dtypes = {key: f"{getattr(features.get(key), 'dtype', '')}" for key in _LABELS}
        labels = [key for key, dtype in dtypes.items() if "int" in dtype or "str" in dtype]
    image = _chosen(images, _IMAGES)
    kinds = {key: getattr(kind, "dtype", type(kind).__name__) for key, kind in features.items()}
    there = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
    if image is None:
        raise DataError(f"data set {name!r} has no image column: its columns are {there}")
    if label is not None and label not in features:
        raise DataError(f"data set {name!r} has no column {label!r}: its columns are {there}")
    chosen = label or _chosen(labels, _LABELS)
    if chosen is None:
        raise DataError(
            f"the label column of data set {name!r} is unclear; write "
            f"{name}#COLUMN, where COLUMN is one of {', '.join(labels) or there}"
        )
    return image, chosen


def _is_bytes(kind: Any) -> bool:
    """Recognize columns that may hold files: bytes, or images as `datasets` stores them."""
    return "bytes" in kind if isinstance(kind, dict) else "binary" in getattr(kind, "dtype", "")


def _chosen(keys: Sequence[str], usual: Sequence[str]) -> str | None:
    return keys[0] if len(keys) == 1 else next((key for key in usual if key in keys), None)


def _labels(
    loaded: Mapping[str, Any], split: str, key: str, where: str
) -> tuple[np.ndarray, tuple[str, ...] | int]:
    """Read labels int32[N] and the class names, sorted over all splits, or their number."""
    import datasets

    kind = loaded[split].features[key]
    columns = {
        name: data.with_format("arrow").select_columns([key])[:].column(key)
        for name, data in loaded.items()
        if key in data.features
    }
    if columns[split].null_count:
        raise DataError(f"{where}: {key} is missing in some records; give a labeled split")
    has_names, dtype = isinstance(kind, datasets.ClassLabel), str(getattr(kind, "dtype", kind))
    if not has_names and dtype.endswith("string"):
        every = (column.drop_null().unique().to_pylist() for column in columns.values())
        names = tuple(sorted(set().union(*every)))
        labels = np.searchsorted(names, columns[split].to_pylist())
        return labels.astype(np.int32), names
    if not has_names and not re.fullmatch(r"u?int\d+", dtype):
        one_hot = "; for one-hot labels, write the argmax" if "List" in dtype else ""
        numbers = "; write whole numbers as int64" if "float" in dtype else ""
        raise DataError(
            f"{where}: {key} is {dtype}; labels must be integers or strings{one_hot}{numbers}"
        )
    labels = columns[split].to_numpy()
    largest = max(int(c.drop_null().to_numpy().max(initial=-1)) for c in columns.values())
    count = kind.num_classes if has_names else largest + 1
    if not len(labels) or labels.min() < 0 or labels.max() >= count:
        raise DataError(
            f"{where}: {key} holds {labels.min() if len(labels) else 'nothing'}, which is not a "
            "class; a split published without labels cannot be used"
        )
    train = loaded["train"].features[key] if "train" in columns else kind
    if has_names and isinstance(train, datasets.ClassLabel) and train.names != kind.names:
        return _in_order(labels, kind.names, train.names, where), tuple(train.names)
    return labels.astype(np.int32), tuple(kind.names) if has_names else count


def _in_order(
    labels: np.ndarray, names: Sequence[str], trained: Sequence[str], where: str
) -> np.ndarray:
    """Map labels to the places of their classes among those of `train`."""
    used = [names[label] for label in np.unique(labels)]
    if foreign := [name for name in used if name not in set(trained)]:
        raise DataError(
            f"{where} has records of classes that split 'train' lacks: {first_few(foreign)}; "
            "remove these records, or write both splits with the same classes"
        )
    places = [trained.index(name) if name in used else -1 for name in names]
    return np.array(places, np.int32)[labels]


def _files(images: Table) -> tuple[list[str] | None, list[int]]:
    """Return the image file names, None if there are none, and the file sizes in bytes."""
    import pyarrow.compute as pc

    sizes = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), 0).to_pylist()
    paths = pc.struct_field(images, "path")
    if paths.null_count == len(paths):
        return None, sizes
    names = [os.path.basename(path or "") for path in paths.to_pylist()]
    return [_IMAGENET_NAME.sub(r"\1\2", name) for name in names], sizes
