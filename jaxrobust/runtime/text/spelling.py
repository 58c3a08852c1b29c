"""What somebody may have meant by a word that is not known, and how it is said on a terminal."""

import difflib
import re
from collections.abc import Iterable

# As others write the names of data sets, without hyphens, and what they are here.
DATASETS = {
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "imagenet": "imagenet2012",
    "imagenet1k": "imagenet2012",
    "imagenet2012": "imagenet2012",
}
# timm's names of architectures that it builds as we do; a test compares them with those of models.
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
MOVED = {"log.tensorboard": "log.to=tensorboard"}  # keys of configs that are gone, and what is new


def meant(word: str, names: Iterable[str], *, give: str = "") -> str:
    """Return the end of a message: the nearest name, or all of them.

    `give`: begins the list, where a word of one's own would do as well.

    >>> meant("epoch", ["epochs", "steps"]), meant("x", ["epochs", "steps"])
    ('did you mean epochs?', 'one of epochs, steps')
    """
    names = list(names)
    close = difflib.get_close_matches(word, names, 1)
    return f"did you mean {close[0]}?" if close else f"{give}one of {', '.join(names)}"


def near(word: str, names: Iterable[str]) -> str:
    """Return the question that a message begins with, or "" where the word is known or none is
    near.

    >>> near("digitz", ["digits", "cifar10"]), near("x", ["digits"])
    ('did you mean digits? ', '')
    """
    names = list(names)
    close = difflib.get_close_matches(word, names, 1) if word not in names else []
    return f"did you mean {close[0]}? " if close else ""


def norm(text: str) -> str:
    """Spell a norm as we do, if it is one in RobustBench's or any spelling; other words stay.

    >>> norm("Linf"), norm(" L2"), norm("l3")
    ('linf', 'l2', 'l3')
    """
    word = str(text).strip().lower()
    return word if re.fullmatch(r"linf|l[012]", word) else text


def dataset(text: str) -> str:
    """Spell a data set as we do, if it is one in RobustBench's or timm's spelling; others stay.

    >>> dataset("CIFAR-10"), dataset("imagenet"), dataset("torch/cifar10"), dataset("dir:CIFAR10")
    ('cifar10', 'imagenet2012', 'cifar10', 'dir:CIFAR10')
    """
    # timm says before a name from which library it reads it.
    return DATASETS.get(re.sub(r"^(torch|tfds)/|[-_ ]", "", text.strip().lower()), text)


def network(text: str) -> str:
    """Spell an architecture as we do, if timm builds the same under another name; others stay.

    >>> network("convnext_tiny"), network("resnet50"), network("convnext_tiny.fb_in1k")
    ('convnext_t', 'resnet50', 'convnext_tiny.fb_in1k')
    """
    return NETWORKS.get(text, text)


def counted(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
