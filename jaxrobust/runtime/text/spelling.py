"""What somebody may have meant by a word that is not known, and how it is said on a terminal."""

import difflib
import re
from collections.abc import Iterable

MOVED = {"log.tensorboard": "log.to=tensorboard"}  # keys of configs that are gone, and what is new


def meant(word: str, known: Iterable[str], *, give: str = "") -> str:
    """Return the end of a message: the known word that is nearest, or all of them.

    `give`: begins the list, where a word of one's own would do as well.

    >>> meant("epoch", ["epochs", "steps"]), meant("x", ["epochs", "steps"])
    ('did you mean epochs?', 'one of epochs, steps')
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else f"{give}one of {', '.join(known)}"


def near(word: str, known: Iterable[str]) -> str:
    """Return the question that a message begins with, or "" where the word is known or none is
    near.

    >>> near("digitz", ["digits", "cifar10"]), near("x", ["digits"])
    ('did you mean digits? ', '')
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, 1) if word not in known else []
    return f"did you mean {close[0]}? " if close else ""


def norm(text: str) -> str:
    """Spell a norm as we do, if it is one in RobustBench's or any spelling; other words stay.

    >>> norm("Linf"), norm(" L2"), norm("l3")
    ('linf', 'l2', 'l3')
    """
    word = text.strip().lower()
    return word if re.fullmatch(r"linf|l1|l2", word) else text


def counted(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"
