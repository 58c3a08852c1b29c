"""RobustBench's networks that have one of our architectures, and why the others are not loaded.

Its tables are ImageNet (Linf 4/255), CIFAR-10 (Linf 8/255, L2 0.5), CIFAR-100 (Linf 8/255), and
common corruptions of each. Networks of different tables share ids. An id alone is that of ImageNet
or CIFAR-10 under Linf; one of another table has that in front, as in
`cifar10/L2/Wang2023Better_WRN-28-10`, and so has the second of ids that both of these have:
`cifar10/Linf/Engstrom2019Robustness`, `imagenet/Linf/Peng2023Robust`.

Source: RobustBench 1.1.1, robustbench/model_zoo/{imagenet,cifar10,cifar100}.py (builders,
preprocessing, files on Google Drive), architectures/{xcit,deit}.py (files on GitHub),
model_info/*/*.json (authors; of the older rows accuracies too), README.md (accuracies and papers of
`published_rows.json`; its robust accuracy is the lowest that is known, for Gowal2021Improving after
another attack in addition to AutoAttack) and LICENSE (licences of weights); parity:
tests/models/test_table.py.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Leaderboard(NamedTuple):
    """What all networks of one of RobustBench's tables share."""

    dataset: str  # as RobustBench calls it
    norm: str | None  # of the ball, as we call it; None: common corruptions
    num_classes: int
    image_size: int  # side in pixels
    epsilon: float | None  # of the ball
    images: int  # that are attacked
    mean: tuple[float, ...]  # of networks that normalise
    std: tuple[float, ...]
    data: str  # the data set as our records call it
    split: str
    normalisation: str  # whose mean and std, for people

    @property
    def threat(self) -> str:
        """Return the norm as RobustBench calls it."""
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
    """One network: its architecture, its input, what it reaches and the file of its weights."""

    model: str  # our name
    normalised: bool  # with mean and std inside: `normalize.*`, `model.<name>`
    preprocessing: str  # id of `data.evaluation_transform`
    clean: float  # % of the leaderboard's images, as published there
    autoattack: float | None  # the same after AutoAttack; None: of common corruptions
    file: str  # below `model_dir`, or the name in timm's hub cache; empty: no file is looked for
    address: str  # of the file that RobustBench fetches
    sha256: str = ""  # of that file, or how it begins; empty: it is not published
    dataset: str = "imagenet"  # a key of `LEADERBOARDS`
    # What mean and std are called where no layer holds them; (): files are without.
    buffers: tuple[str, ...] | None = None
    buffer_axes: int = 4  # of these
    renamed: tuple[tuple[str, str], ...] = ()  # parts of the reference's names -> those of the file
    made: bool = False  # files hold what follows from the sizes too: `Names.made`
    license: str = ""  # of the weights, SPDX; empty: it is not stated
    options: dict[str, Any] = {}  # noqa: RUF012  # of `model`, read only
    moments: Moments | None = None  # inside; None: the leaderboard's
    unused: tuple[str, ...] = ()  # (part, its copy) of names: files hold a copy that nothing reads

    @property
    def board(self) -> Leaderboard:
        """Return the table that it stands in."""
        return LEADERBOARDS[self.dataset]

    @property
    def inside(self) -> Moments:
        """Return the mean and std by which a normalised one divides."""
        return self.moments or (self.board.mean, self.board.std)


class Paper(NamedTuple):
    """Whose network it is."""

    title: str
    authors: str
    venue: str
    link: str


def own_id(key: str) -> str:
    """Return an id of `PUBLISHED` as RobustBench has it, without the table in front."""
    return key.rpartition("/")[2]


def _read() -> dict[str, Published]:
    """Read `published_rows.json`: what files of a kind share, then the networks in order."""
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
        if not address.startswith("https:"):  # a key of Google Drive
            file = f"{folder}/{name}.pt"
            address = f"https://drive.google.com/uc?export=download&confirm=t&id={address}"
        # `file` of a kind: RobustBench takes torchvision's weights and looks for no file.
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
    """Look up the paper that RobustBench names of a network of `PUBLISHED`."""
    papers = json.loads(Path(__file__).with_name("published_papers.json").read_text())
    return Paper(**papers[own_id(robustbench_id).partition("_")[0]])  # how ids begin
