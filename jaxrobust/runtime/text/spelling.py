"""Suggestions for misspelt words, and common spellings of names."""

import difflib
import re
from collections.abc import Iterable

# Other libraries' names of data sets, without hyphens, and ours.
DATASETS = {
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "imagenet": "imagenet2012",
    "imagenet1k": "imagenet2012",
    "imagenet2012": "imagenet2012",
}
# timm's names of architectures that are the same here; a test compares them with models.
NETWORKS = {
    "cait_s24_224": "cait_s24",
    "cait_xxs24_224": "cait_xxs24",
    "convnext_base": "convnext_b",
    "convnext_large": "convnext_l",
    "convnext_small": "convnext_s",
    "convnext_tiny": "convnext_t",
    "deit3_medium_patch16_224": "vit_m",
    "deit_small_patch16_224": "deit_s",
    "swin_base_patch4_window7_224": "swin_b",
    "swin_large_patch4_window7_224": "swin_l",
    "vit_base_patch16_224": "vit_b",
    "vit_small_patch16_224": "vit_s",
    "xcit_nano_12_p16_224": "xcit_n12",
    "xcit_nano_12_p8_224": "xcit_n12_p8",
    "xcit_small_12_p16_224": "xcit_s12",
    "xcit_small_12_p8_224": "xcit_s12_p8",
    "xcit_small_24_p16_224": "xcit_s24",
    "xcit_small_24_p8_224": "xcit_s24_p8",
    "xcit_tiny_12_p16_224": "xcit_t12",
    "xcit_tiny_12_p8_224": "xcit_t12_p8",
    "xcit_tiny_24_p16_224": "xcit_t24",
    "xcit_tiny_24_p8_224": "xcit_t24_p8",
}
MOVED = {"log.tensorboard": "log.to=tensorboard"}  # removed config keys, and what to use


def meant(word: str, names: Iterable[str], *, give: str = "") -> str:
    """Return the end of a message: the closest name, or all of them.

    `give` introduces the list if another word would also be valid.

    >>> meant("epoch", ["epochs", "steps"]), meant("x", ["epochs", "steps"])
    ('did you mean epochs?', 'one of epochs, steps')
    """
    names = list(names)
    close = difflib.get_close_matches(word, names, 1)
    return f"did you mean {close[0]}?" if close else f"{give}one of {', '.join(names)}"


def near(word: str, names: Iterable[str]) -> str:
    """Return the question that starts a message, or "" if the word is known or nothing is close.

    >>> near("digitz", ["digits", "cifar10"]), near("x", ["digits"])
    ('did you mean digits? ', '')
    """
    names = list(names)
    close = difflib.get_close_matches(word, names, 1) if word not in names else []
    return f"did you mean {close[0]}? " if close else ""


def norm(text: str) -> str:
    """Normalize the spelling of a norm, RobustBench's or any other; other words are unchanged.

    >>> norm("Linf"), norm(" L2"), norm("l3")
    ('linf', 'l2', 'l3')
    """
    word = str(text).strip().lower()
    return word if re.fullmatch(r"linf|l[012]", word) else text


def dataset(text: str) -> str:
    """Normalize RobustBench's or timm's spelling of a data set; other words are unchanged.

    >>> dataset("CIFAR-10"), dataset("imagenet"), dataset("torch/cifar10"), dataset("dir:CIFAR10")
    ('cifar10', 'imagenet2012', 'cifar10', 'dir:CIFAR10')
    """
    # timm prefixes the library that it reads a data set from.
    return DATASETS.get(re.sub(r"^(torch|tfds)/|[-_ ]", "", text.strip().lower()), text)


def network(text: str) -> str:
    """Translate timm's name of an architecture that is the same here; others are unchanged.

    >>> network("convnext_tiny"), network("resnet50"), network("convnext_tiny.fb_in1k")
    ('convnext_t', 'resnet50', 'convnext_tiny.fb_in1k')
    """
    return NETWORKS.get(text, text)


def counted(number: int, noun: str) -> str:
    """Format a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
