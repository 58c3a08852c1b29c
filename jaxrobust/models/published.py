"""RobustBench's networks with one of our architectures, and why the others are not loaded.

Its tables are ImageNet (Linf 4/255), CIFAR-10 (Linf 8/255, L2 0.5), CIFAR-100 (Linf 8/255), and
common corruptions of each. Networks of different tables share ids. A bare id means ImageNet or
CIFAR-10 under Linf; ids of other tables start with the table, as in
`cifar10/L2/Wang2023Better_WRN-28-10`. So does the second network if both of these have an id:
`cifar10/Linf/Engstrom2019Robustness`, `imagenet/Linf/Peng2023Robust`.

Source: RobustBench 1.1.1, robustbench/model_zoo/{imagenet,cifar10,cifar100}.py (builders,
preprocessing, files on Google Drive), architectures/{xcit,deit}.py (files on GitHub),
model_info/*/*.json (authors; for older rows also accuracies), README.md (accuracies and papers in
`published_rows.json`; its robust accuracy is the lowest known, for Gowal2021Improving after another
attack besides AutoAttack) and LICENSE (licenses of weights); parity: tests/models/test_table.py.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Leaderboard(NamedTuple):
    """What all networks in one of RobustBench's tables share."""

    dataset: str  # RobustBench's name
    norm: str | None  # of the ball, our name; None: common corruptions
    num_classes: int
    image_size: int  # side in pixels
    epsilon: float | None  # of the ball
    images: int  # number of images that are attacked
    mean: tuple[float, ...]  # for networks that normalize
    std: tuple[float, ...]
    data: str  # our records' name for the data set
    split: str
    normalisation: str  # where mean and std come from, for people

    @property
    def threat(self) -> str:
        """Return RobustBench's name of the norm."""
        return {"linf": "Linf", "l2": "L2", None: "corruptions"}[self.norm]

    @property
    def folder(self) -> str:
        """Return the folder in which RobustBench keeps its files, below its `model_dir`."""
        return f"{self.dataset}/{self.threat}"


_CIFAR10 = Leaderboard(
    *("cifar10", "linf", 10, 32, 8 / 255, 10_000),
    *((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    *("cifar10", "test", "CIFAR-10's"),
)
LEADERBOARDS = {
    "imagenet": Leaderboard(
        *("imagenet", "linf", 1000, 224, 4 / 255, 5_000, IMAGENET_MEAN, IMAGENET_STD),
        *("imagenet2012", "validation@robustbench", "ImageNet's"),
    ),
    "cifar10": _CIFAR10,
    "cifar10-L2": _CIFAR10._replace(norm="l2", epsilon=0.5),
    "cifar100": Leaderboard(
        *("cifar100", "linf", 100, 32, 8 / 255, 10_000),
        *((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        *("cifar100", "test", "CIFAR-100's"),
    ),
}
LEADERBOARDS |= {
    f"{key}-corruptions": LEADERBOARDS[key]._replace(norm=None, epsilon=None)
    for key in ("imagenet", "cifar10", "cifar100")
}


class Published(NamedTuple):
    """A network: its architecture, its input, its accuracies and its weight file."""

    model: str  # our name
    normalised: bool  # mean and std are inside: `normalize.*`, `model.<name>`
    preprocessing: str  # id of `data.evaluation_transform`
    clean: float  # % of the leaderboard's images, as published
    autoattack: float | None  # the same after AutoAttack; None: common corruptions
    file: str  # below `model_dir`, or the name in timm's hub cache; empty: no file is looked for
    address: str  # of the file that RobustBench downloads
    sha256: str = ""  # of that file, or its first digits; empty: not published
    dataset: str = "imagenet"  # a key of `LEADERBOARDS`
    # Names of mean and std if no layer holds them; (): the files lack them.
    buffers: tuple[str, ...] | None = None
    buffer_axes: int = 4  # of these
    renamed: tuple[tuple[str, str], ...] = ()  # parts of the reference's names -> those of the file
    made: bool = False  # files also hold values that follow from the sizes: `Names.made`
    license: str = ""  # of the weights, SPDX; empty: not stated
    options: dict[str, Any] = {}  # noqa: RUF012  # of `model`, read only
    moments: Moments | None = None  # used inside; None: the leaderboard's
    unused: tuple[str, ...] = ()  # (part, its copy) of names: the files hold an unused copy

    @property
    def board(self) -> Leaderboard:
        """Return the leaderboard that lists it."""
        return LEADERBOARDS[self.dataset]

    @property
    def inside(self) -> Moments:
        """Return the mean and std with which it normalizes."""
        return self.moments or (self.board.mean, self.board.std)


class Paper(NamedTuple):
    """The paper that a network comes from."""

    title: str
    authors: str
    venue: str
    link: str


def own_id(key: str) -> str:
    """Return an id of `PUBLISHED` as in RobustBench, without the table prefix."""
    return key.rpartition("/")[2]


def _read() -> dict[str, Published]:
    """Read `published_rows.json`: what files of a kind share, then the networks, in order."""
    stored = json.loads(Path(__file__).with_name("published_rows.json").read_text())
    published = {}
    kinds = stored["kinds"]
    for name, model, dataset, kind, clean, autoattack, address, *further in stored["networks"]:
        shared = dict(kinds[kind])
        fields = {"license": "MIT"} | kinds.get(shared.pop("like", ""), {}) | shared
        fields |= further[0] if further else {}
        for key in fields.keys() & {"buffers", "renamed", "moments", "unused"}:
            fields[key] = tuple(tuple(v) if isinstance(v, list) else v for v in fields[key])
        folder, file = LEADERBOARDS[dataset].folder, address.rpartition("/")[2]
        if not address.startswith("https:"):  # a Google Drive key
            file = f"{folder}/{name}.pt"
            address = f"https://drive.google.com/uc?export=download&confirm=t&id={address}"
        # `file` of a kind: RobustBench uses torchvision's weights and has no file.
        fields = {"file": file} | fields
        is_first = dataset in ("imagenet", "cifar10") and name not in published
        key = name if is_first else f"{folder}/{name}"
        published[key] = Published(
            model, clean=clean, autoattack=autoattack, address=address, dataset=dataset, **fields
        )
    return published


# RobustBench id -> network. Wong2020Fast is listed there as a ResNet-18 and built as a ResNet-50;
# Huang2021Exploring is listed as a WideResNet-34-10 and built with 320, 640 and 512 channels.
# The file of Huang2022Revisiting_WRN-A4 may lack mean and std, which its constructor sets.
PUBLISHED = _read()


@functools.cache
def others() -> dict[str, tuple[str, bool]]:
    """Read the ids that are not loaded: why, and whether `torch:` runs RobustBench's module."""
    stored = json.loads(Path(__file__).with_name("published_rows.json").read_text())
    return {
        key: (reason, part == "through_torch")
        for part in ("through_torch", "refused")
        for reason, keys in stored[part].items()
        for key in keys
    }


@functools.cache
def paper(robustbench_id: str) -> Paper:
    """Look up the paper that RobustBench gives for a network of `PUBLISHED`."""
    papers = json.loads(Path(__file__).with_name("published_papers.json").read_text())
    return Paper(**papers[own_id(robustbench_id).partition("_")[0]])  # an id starts with the paper
