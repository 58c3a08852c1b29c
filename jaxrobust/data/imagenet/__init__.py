"""What is fixed about ImageNet-1k: its classes, and the image lists that results refer to.

Sources and licenses of the lists: README.md here.
"""

import functools
import hashlib
from pathlib import Path

from jaxrobust.data.source import DataError, first_few

ROBUSTBENCH_SHA256 = "d4121626d07722a0126c35b1563042e46a546f1a05ce705f2cdc635896d58574"
_SYNSETS_SHA256 = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"
_IMAGENET100_SHA256 = "614a27815e254bd7741b25a80da3237b3b22e37b45ef92d257f4f7d3e935d24a"
_LISTS = Path(__file__).parent
# The ten ImageNet classes of Imagenette (fast.ai), by their folder names.
IMAGENETTE = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)
_SELECTION_SIZE = 4_000
_CLAIM = 500  # from this many of the 1,000 class folders on, all are expected


def synsets() -> tuple[str, ...]:
    """List the 1,000 classes, such as n01440764, in the order of labels."""
    return _shipped("synsets.txt", _SYNSETS_SHA256)


def imagenet100() -> tuple[str, ...]:
    """List the 100 classes that "A Light Recipe to Train Robust ViTs" draws from ImageNet."""
    return _shipped("imagenet100.txt", _IMAGENET100_SHA256)


def robustbench() -> tuple[str, ...]:
    """List RobustBench's 5,000 validation images, `SYNSET/NAME.JPEG`, in its order."""
    return _shipped("robustbench.txt", ROBUSTBENCH_SHA256)


@functools.cache
def selection() -> tuple[str, ...]:
    """Return the first 4,000 names outside that list, by sha256 of "jaxrobust selection 0 NAME"."""
    tested = {line.rpartition("/")[2] for line in robustbench()}
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    names.sort(key=lambda name: hashlib.sha256(f"jaxrobust selection 0 {name}".encode()).digest())
    return tuple(name for name in names if name not in tested)[:_SELECTION_SIZE]


def check_folders(folders: list[str], num_classes: int | None, where: str) -> None:
    """Reject class folders that look like ImageNet's 1,000 classes but are not exactly these.

    They do when more than 500 of them are ImageNet's, or when all are and the head has 1,000
    classes. A missing or additional folder would shift the labels.
    """
    imagenet_folders = set(synsets())
    extra = [folder for folder in folders if folder not in imagenet_folders]
    present = len(folders) - len(extra)
    if present <= _CLAIM and not (num_classes == 1000 and not extra):
        return
    if extra:
        raise DataError(
            f"{where} has {present} of ImageNet's 1,000 class folders, and others that would shift "
            f"labels: {first_few(extra)}; move the others away, or list the classes in data.classes"
        )
    missing = [name for name in synsets() if name not in set(folders)]
    if missing:
        raise DataError(
            f"{where} has only {present} of ImageNet's 1,000 class folders, so labels would shift; "
            f"missing: {first_few(missing)}; restore them, or list the intended classes in "
            "data.classes"
        )


@functools.cache
def _shipped(name: str, sha256: str) -> tuple[str, ...]:
    path = _LISTS / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is missing ({error.strerror}); reinstall jaxrobust") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(f"{path} has sha256 {digest}, expected {sha256}; reinstall jaxrobust")
    return tuple(content.decode().splitlines())
