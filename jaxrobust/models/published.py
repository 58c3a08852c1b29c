"""RobustBench's networks that have one of our architectures: of ImageNet (Linf 4/255), CIFAR-10
(Linf 8/255 and L2 0.5) and CIFAR-100 (Linf 8/255).

Networks of different tables share ids. An id alone is that of CIFAR-10 or ImageNet under Linf; one
of another table has that in front, as in `cifar10/L2/Wang2023Better_WRN-28-10`, and so has the one
id that both of these have, `imagenet/Linf/Peng2023Robust`.

Source: RobustBench 1.1.1, robustbench/model_zoo/{imagenet,cifar10,cifar100}.py (builders,
preprocessing, files on Google Drive), architectures/xcit.py (files on GitHub), model_info/*/*.json
(authors; of the older rows accuracies too), README.md (accuracies and papers of
`published_rows.json`; its robust accuracy is the lowest that is known, for Gowal2021Improving after
another attack beside AutoAttack) and LICENSE (licences of weights); parity:
tests/models/test_table.py.
"""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Leaderboard(NamedTuple):
    """What all networks of one of RobustBench's tables share."""

    dataset: str  # as RobustBench calls it
    norm: str  # of the ball, as we call it
    num_classes: int
    image_size: int  # side in pixels
    epsilon: float  # of the ball
    images: int  # that are attacked
    mean: tuple[float, ...]  # of networks that normalise
    std: tuple[float, ...]
    data: str  # the data set as our records call it
    split: str
    normalisation: str  # whose mean and std, for people

    @property
    def threat(self) -> str:
        """Return the norm as RobustBench calls it."""
        return {"linf": "Linf", "l2": "L2"}[self.norm]

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
_PLAIN = ("imagenet", "cifar10")  # whose ids stand alone


class Published(NamedTuple):
    """One network: its architecture, its input, what it reaches and the file of its weights."""

    model: str  # our name
    normalised: bool  # with the leaderboard's mean and std inside: `normalize.*`, `model.<name>`
    preprocessing: str  # id of `data.evaluation_transform`
    clean: float  # % of the leaderboard's images, as published there
    autoattack: float  # the same after AutoAttack
    file: str  # below `model_dir`, or the name in timm's hub cache; empty: no file is looked for
    address: str  # of the file that RobustBench fetches
    sha256: str = ""  # of that file, or how it begins; empty: it is not published
    dataset: str = "imagenet"  # a key of `LEADERBOARDS`
    # What mean and std are called where no layer holds them; (): files are without.
    buffers: tuple[str, ...] | None = None
    renamed: tuple[tuple[str, str], ...] = ()  # parts of the reference's names -> those of the file
    made: bool = False  # files hold what follows from the sizes too: `Names.made`
    license: str = ""  # of the weights, SPDX; empty: it is not stated

    @property
    def board(self) -> Leaderboard:
        """Return the table that it stands in."""
        return LEADERBOARDS[self.dataset]


class Paper(NamedTuple):
    """Whose network it is."""

    title: str
    authors: str
    venue: str
    link: str


def _drive(key: str) -> str:
    return f"https://drive.google.com/uc?export=download&confirm=t&id={key}"


def _linf(ids: str, preprocessing: str, *rows: tuple[str, str, float, float, str], normalised=True):
    """Make ImageNet's networks: what stands in the id, our name, clean, AutoAttack, Drive's key."""
    return {
        ids.format(part): Published(
            *(model, normalised, preprocessing, clean, autoattack),
            *("{}.pt", _drive(drive)),
        )
        for part, model, clean, autoattack, drive in rows
    }


_bare = partial(_linf, normalised=False)


def _cifar10(model, clean, autoattack, drive, **more):
    row = ("buffers" in more, "none", clean, autoattack, "{}.pt", _drive(drive))
    return Published(model, *row, dataset="cifar10", **more)


_BICUBIC, _BILINEAR = "BicubicRes256Crop224", "Res256Crop224"
_RELEASE = "https://github.com/RobustBench/robustbench/releases/download/v1.1/"


def _light(size, clean, autoattack):
    file = f"debenedetti2022light-xcit-{size}-imagenet-linf.pth.tar"
    kind = (f"xcit_{size}12", False, "bicubic-224-crop-224")
    return Published(*kind, clean, autoattack, file, _RELEASE + file)


_SINGH = ("Singh2023Revisiting_{}-ConvStem", _BICUBIC)
_ROWS: dict[str, Any] = {
    **_bare(
        *_SINGH,
        ("ConvNeXt-T", "convnext_t_cvst", 72.72, 49.46, "1-FjtOF6LJ3-bf4VezsmWwncCxYSx-USP"),
        ("ConvNeXt-S", "convnext_s_cvst", 74.10, 52.42, "1-ZrMYajCCnrtV4oT0wa3qJJoQy1nUSnL"),
        ("ConvNeXt-B", "convnext_b_cvst", 75.90, 56.14, "1-lE-waaVvfL7lgBrydmZIM9UJimmHnVe"),
        ("ConvNeXt-L", "convnext_l_cvst", 77.00, 57.70, "10-YOVdM2EQjHemSi9x2H44qKRSOXVQmh"),
    ),
    **_linf(*_SINGH, ("ViT-S", "vit_s_cvst", 72.56, 48.08, "1-1sUYXnj6bDXacIKI3KKqn4rlkmL-ZI2")),
    **_bare(*_SINGH, ("ViT-B", "vit_b_cvst", 76.30, 54.66, "1-JBbfi_eH3tKMXObvPPHprrZae0RiQGT")),
    "Debenedetti2022Light_XCiT-S12": _light("s", 72.34, 41.78),
    "Debenedetti2022Light_XCiT-M12": _light("m", 74.04, 45.24),
    "Debenedetti2022Light_XCiT-L12": _light("l", 73.76, 47.60),
    **_linf(
        *("Liu2023Comprehensive_{}", _BICUBIC),
        ("ConvNeXt-B", "convnext_b", 76.02, 55.82, "10-nSm-qUftvfKXHeOAakBQl8rxm-jCbk"),
        ("ConvNeXt-L", "convnext_l", 78.02, 58.48, "1dIPLNfdQtAnqZrKPyuy3_zDI-FVgJ2FH"),
        ("Swin-B", "swin_b", 76.16, 56.16, "1-4mtxQCkThJUVdS3wvQ6NnmMZuySqR3c"),
        ("Swin-L", "swin_l", 78.92, 59.56, "1-57sQfcrsDsslfDR18nRD7FnpQmsSBk7"),
    ),
    **_linf(
        *("RodriguezMunoz2024Characterizing_{}", _BICUBIC),
        ("Swin-B", "swin_b", 77.76, 51.56, "1-BSUjoFXx3PP-TfeE5fjbofO2lLyUf56"),
        ("Swin-L", "swin_l", 79.36, 53.82, "1-Dc9WhPU2wv4OMskLo1U57n5O8VbpNXv"),
    ),
    **_linf(
        *("Mo2022When_{}", "Res224"),
        ("Swin-B", "swin_b", 74.66, 38.30, "1-SXi4Z2X6Zo_j8EO4slJcBMXNej8fKUd"),
        ("ViT-B", "vit_b", 68.38, 34.40, "1-dUFdvDBflqMsMLjZv3wlPJTm-Jm7net"),
    ),
    **_linf(
        *("{}", _BILINEAR),
        ("Salman2020Do_R18", "resnet18", 52.92, 25.32, "1OThCOQCOxY6lAgxZxgiK3YuZDD7PPfPx"),
        ("Salman2020Do_R50", "resnet50", 64.02, 34.96, "1TmT5oGa1UvVjM3d-XeSj_XmKqBNRUg8r"),
        ("Salman2020Do_50_2", "wide_resnet50_2", 68.46, 38.14, "1OT7xaQYljrTr3vGbM37xK9SPoPJvbSKB"),
        ("Engstrom2019Robustness", "resnet50", 62.56, 29.22, "1T2Fvi1eCJTeAOEzrH_4TAIwO8HTOYVyn"),
    ),
    # RobustBench takes torchvision's own weights and looks for no file.
    "Standard_R50": Published(
        *("resnet50", True, _BILINEAR, 76.52, 0.0, ""),
        address="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        sha256="0676ba61",
    ),
    # Listed there as a ResNet-18; the network that is built is a ResNet-50.
    **_linf(
        *("Wong2020Fast", "Crop288"),
        ("", "resnet50", 55.62, 26.24, "1deM2ZNS5tf3S_-eRURJi-IlvUL8WJQ_w"),
    ),
    **_bare(
        *("Chen2024Data_{}", _BILINEAR),
        ("WRN_50_2", "wide_resnet50_2", 68.76, 41.92, "1-PBlZVILAKFQ7mF8srKjdkTKJZAr61Uf"),
    ),
    # The file itself may lack mean and std: RobustBench's network has them from its constructor.
    "Huang2022Revisiting_WRN-A4": _cifar10(
        "wrn_a4_silu", 91.58, 65.79, "1okHk4XPgunmqHG3alXfVF84qRwlu6Oqe", buffers=("mu", "sigma")
    ),
    # Listed there as a WideResNet-34-10; built with 320, 640 and 512 channels.
    **{
        f"Huang2021Exploring{ema}": _cifar10(
            "wrn_34_r",
            *(clean, autoattack, drive),
            renamed=((".shortcut.0.", ".convShortcut."), ("norm1.", "bn1.")),
        )
        for ema, clean, autoattack, drive in (
            ("", 90.56, 61.56, "1-2ram-xtoEidOh1SCYY5KTiyKieINkZe"),
            ("_ema", 91.23, 62.54, "1-GRwO5t9HxOS2y6RFK8QEsDXjdcgmVu6"),
        )
    },
}


# How files differ from the reference's names of a network, and what they hold beside them.
_DEEPMIND = {"normalised": True, "buffers": ()}  # mean and std are constants of the class
_TRADES = (
    *(("stem_conv.", "conv1."), *((f"blocks.{i}.", f"block{i + 1}.") for i in range(3))),
    *((".shortcut.0.", ".convShortcut."), ("norm1.", "bn1.")),
)
_MICROSOFT = (
    *((f"layers.{i + 1}.downsample.", f"layers.{i}.downsample.") for i in range(3)),
    ("head.fc.", "head."),
)
_FILES: dict[str, dict[str, Any]] = {
    "dm": _DEEPMIND,
    "ra": _DEEPMIND,
    "ra_wrn_101_2": {
        **{"normalised": True, "buffers": ("normalization.mean", "normalization.std")},
        "preprocessing": _BILINEAR,
    },
    "wrn": {"renamed": _TRADES},
    "resnet18": {"renamed": ((".downsample.", ".shortcut."), ("fc.", "linear."))},
    "swin": {"renamed": _MICROSOFT, "made": True, "preprocessing": _BICUBIC},
}


def _key(board: str, robustbench_id: str) -> str:
    """Put the table in front of an id, where it would not be told apart alone."""
    alone = board in _PLAIN and (board, robustbench_id) != ("imagenet", "Peng2023Robust")
    return robustbench_id if alone else f"{LEADERBOARDS[board].folder}/{robustbench_id}"


def _listed() -> dict[str, Published]:
    """Read the rows of `published_rows.json`: id, our name, clean, AutoAttack, Drive's key."""
    rows = json.loads(Path(__file__).with_name("published_rows.json").read_text())
    return {
        _key(board, robustbench_id): (
            Published(
                **{"model": model, "normalised": False, "preprocessing": "none"}
                | {"clean": clean, "autoattack": autoattack, "dataset": board}
                | {"file": "{}.pt", "address": _drive(drive)}
                | (_FILES.get(model) or _FILES[model.partition("_")[0]])
            )
        )
        for board, networks in rows.items()
        for robustbench_id, model, clean, autoattack, drive in networks
    }


# Where ids begin so, the weights are not under the zoo's MIT licence; torchvision states none of
# the weights of `Standard_R50`.
_LICENSES = {
    **dict.fromkeys(
        ("Gowal2020Uncovering", "Rebuffi2021Fixing", "Gowal2021Improving"), "Apache-2.0"
    ),
    "Standard_R50": "",
}


def own_id(key: str) -> str:
    """Return an id of `PUBLISHED` as RobustBench has it, without the table in front."""
    return key.rpartition("/")[2]


def _finished(key: str, net: Published) -> Published:
    name = own_id(key)
    licences = [value for start, value in _LICENSES.items() if name.startswith(start)]
    file = net.file.format(name)
    return net._replace(
        # In timm's cache, or below `model_dir`.
        file=f"{net.board.folder}/{file}" if file == f"{name}.pt" else file,
        license=licences[0] if licences else "MIT",
    )


# RobustBench id -> network. Of ImageNet not there, for they are other architectures:
# Amini2024MeanSparse_* (MeanSparse layers inside Liu's networks), Bai2024MixedNUTS (an ensemble).
PUBLISHED = {key: _finished(key, net) for key, net in (_ROWS | _listed()).items()}


@functools.cache
def paper(robustbench_id: str) -> Paper:
    """Look up the paper that RobustBench names of a network of `PUBLISHED`."""
    papers = json.loads(Path(__file__).with_name("published_papers.json").read_text())
    return Paper(**papers[own_id(robustbench_id).partition("_")[0]])  # how ids begin
