"""Flags that several commands share: help texts and defaults, written once."""

from dataclasses import dataclass
from typing import Any

from jaxrobust.runtime.commandline.arguments import mapping, number
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import spelling
from jaxrobust.weights.fetch.shipped import KINDS

# A flag -> its help, and the default that the help names unless a command overrides it.
TEXTS: dict[str, tuple[str, str | None]] = {
    "workdir": ("Run whose network, data, norm and radius to use.", None),
    "phase": ("Phase of the run, such as pretrain or train", "the last one that has weights"),
    "model": ("Architecture, for weights without a run: a name from models.available().", None),
    "weights": (f"Weights: {KINDS}.", None),
    "options": (
        "Options of --model that its weights do not store, such as {'stem_strides': (1,)}.",
        None,
    ),
    "num_classes": ("Number of classes of --model", "from the data set"),
    "image_size": ("Image size in pixels", "from the run or data set"),
    "function": (
        "Function from images in [0, 1] to logits, instead of weights: my_net.py:logits_fn, or "
        "my_package.nets:logits_fn.",
        None,
    ),
    "torch": (
        "PyTorch network, instead of weights: my_models.py:build or my_package.nets:build, a "
        "function that returns the module (its code is run), or a file from torch.export.save or "
        "torch.jit.save.",
        None,
    ),
    "torch_args": ('Arguments of that function, as JSON, such as {"depth": 28}.', None),
    "torch_output": ("Key or index of the logits, if the network returns several outputs.", None),
    "dataset": (
        "Data set: digits, cifar10, imagenet2012, folder:PATH, npz:PATH, hf:NAME, or cifar10-c:DIR",
        "from the run",
    ),
    "split": (
        "Split, such as test[:1000]",
        "the run's; without a run, test, an .npz's only split, or imagenet2012's @robustbench",
    ),
    "classes": (
        "Classes to keep: imagenet100, or a file of class names",
        "from the run",
    ),
    "data_dir": ("Folder of data sets", "from the run, or $TFDS_DATA_DIR"),
    "preprocessing": ("Preprocessing, such as Res256Crop224", "from the run's tests"),
    "norm": ("Norm of the attacks: linf, l2, l1 or l0", "from the run, or linf"),
    "epsilon": ("Radius, such as 4/255, in units of [0, 1] pixels", "from the run"),
    "seed": ("Seed of all random draws", "0"),
    "nocertificate": ("Do not compare with a reference network.", None),
    "json": ("Print one JSON object on the last line.", None),
    "out": ("Folder for both files", "RUN/analyses, or analyses"),
}
READS: dict[str, Any] = {"options": mapping, "torch_args": mapping, "epsilon": number}
_NAMES = {"model": spelling.network, "dataset": spelling.dataset, "norm": spelling.norm}
READS |= {name: lambda _, text, spell=spell: spell(text) for name, spell in _NAMES.items()}


def shared(name: str, value: Any = None, *, default: str | None = None, **options: Any) -> Any:
    """Build a field for a flag of several commands; `name` is a key of `TEXTS`.

    `value`: the default if the flag is not given; `default`: its description, if it differs from
    that of most commands; `options`: further arguments of `flag`.
    """
    text, usual = TEXTS[name]
    words = default or usual
    help_text = f"{text.removesuffix('.')}; default: {words}." if words else text
    if name in READS:
        options["reads"] = READS[name]
    return flag(help_text, value, **options)


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """Flags that name a network of this package and its weights."""

    workdir: str | None = shared("workdir")
    phase: str | None = shared("phase")
    model: str | None = shared("model")
    weights: str | None = shared("weights")
    options: dict[str, Any] | None = shared("options")
    num_classes: int | None = shared("num_classes")
    image_size: int | None = shared("image_size")


@dataclass(frozen=True, kw_only=True)
class FunctionFlags:
    """Flags that name a network of any library instead."""

    function: str | None = shared("function")
    torch: str | None = shared("torch")
    torch_args: dict[str, Any] | None = shared("torch_args")
    torch_output: str | None = shared("torch_output")


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Flags that name images and their preprocessing."""

    dataset: str | None = shared("dataset")
    split: str | None = shared("split")
    classes: str | None = shared("classes")
    data_dir: str | None = shared("data_dir")
    preprocessing: str | None = shared("preprocessing")


@dataclass(frozen=True, kw_only=True)
class ThreatFlags:
    """Flags that name the norm and the radius of attacks."""

    norm: str | None = shared("norm")
    epsilon: float | None = shared("epsilon")


@dataclass(frozen=True, kw_only=True)
class SubjectFlags(NetworkFlags, FunctionFlags, ImageFlags, ThreatFlags):
    """Flags that name any network, its images, and the threat to withstand."""
