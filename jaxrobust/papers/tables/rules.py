"""How rows of a paper are turned into the lines that measure them: what a rule is made of.

A rule says which rows it is of, and what makes their network: a config with arguments that are read
from the row, published weights, a command that prints the figures, or a sentence why nothing does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
ANY: Sequence[Any] = ("any value that is one",)


class Argument(NamedTuple):
    """An argument of a config, by what a row says."""

    name: str  # in the config; empty: the first one, which needs none
    key: str | Callable[[Row], Any]  # of the row, or what reads it
    default: Any = None  # of the config, which is not written
    words: Mapping[Any, Any] = {}  # the row's word -> the config's, if it has another


class Rule(NamedTuple):
    """Rows that are measured alike."""

    of: Mapping[str, Sequence[Any]]  # keys of a row, and `table`: their values, or `ANY`
    config: str = ""  # of configs/, which trains them
    arguments: tuple[Argument, ...] = ()
    changes: Callable[[Row], Mapping[str, Any]] | None = None  # keys of the config, beside them
    start: Callable[[Row], str | None] | None = None  # a run whose weights it needs, as a config
    split: str = "test"  # which the config tests on
    published: bool = False  # whether their weights are published under `robustbench`
    commands: tuple[str, ...] = ()  # others, with keys of the row in braces
    why: str = ""  # nothing measures them; with keys of the row in braces

    def fits(self, row: Row) -> bool:
        """Tell whether a row has all the values that the rule asks for."""
        return all(_has(row.get(key), values) for key, values in self.of.items())

    def words(self, row: Row) -> str:
        """Return the arguments of the config for a row."""
        given = []
        for name, key, default, words in self.arguments:
            value = key(row) if callable(key) else row.get(key)
            value = words.get(value, value) if isinstance(value, str | int | float) else value
            if value is not None and value != default:
                given.append(f"{name}={value}" if name else str(value))
        return ",".join(given)


def _has(value: Any, values: Sequence[Any]) -> bool:
    return value is not None if values is ANY else value in values
