"""A check, what it found, and how that is told."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

GREEN, YELLOW, RED, SKIPPED = "green", "yellow", "red", "skipped"
_COLOURS = {GREEN: 32, YELLOW: 33, RED: 31, SKIPPED: 2}  # of terminals, ECMA-48

Examined = TypeVar("Examined")


class Seen(NamedTuple):
    """What a check saw: one of the levels, a sentence with the value, and the value itself.

    Cause and remedy replace those of the check where this case has others.
    """

    level: str
    said: str
    value: Any = None
    cause: str | None = None
    remedy: str | None = None


class Check(NamedTuple, Generic[Examined]):
    """A row of a table."""

    name: str
    measures: str  # and when it is yellow or red
    cause: str
    remedy: str
    paper: str  # with its section where that could be looked up
    look: Callable[[Examined], Seen]
    follows: tuple[str, ...] = ()  # checks whose fault shows here too


class Finding(NamedTuple):
    """The result of a check."""

    check: Check[Any]
    seen: Seen
    after: str | None = None  # the check that has found the cause

    @property
    def cause(self) -> str:
        """Return where that comes from."""
        if self.after:
            return f"it follows from {self.after}, see there"
        return self.seen.cause or self.check.cause

    @property
    def remedy(self) -> str:
        """Return what to do."""
        return f"mend {self.after} first" if self.after else self.seen.remedy or self.check.remedy

    def plain(self) -> dict[str, Any]:
        """Return it as values that JSON has."""
        faulty = self.seen.level in (YELLOW, RED)
        return {
            "check": self.check.name,
            "level": self.seen.level,
            "measures": self.check.measures,
            "said": self.seen.said,
            "value": self.seen.value,
            "cause": self.cause if faulty else None,
            "remedy": self.remedy if faulty else None,
            "follows_from": self.after,
            "paper": self.check.paper,
        }


def examined(checks: Sequence[Check[Examined]], patient: Examined) -> list[Finding]:
    """Return what all checks of a table find, in its order.

    A fault that shows in several rows is red in the first of them; those that follow are yellow.
    """
    found: list[Finding] = []
    for check in checks:
        seen = check.look(patient)
        reds = [f.check.name for f in found if f.seen.level == RED]
        after = next((name for name in reds if name in check.follows), None)
        if after and seen.level in (YELLOW, RED):
            found.append(Finding(check, seen._replace(level=YELLOW), after))
        else:
            found.append(Finding(check, seen))
    return found


def line(finding: Finding, *, coloured: bool, width: int = 22) -> str:
    """Return a finding as one line; with its cause, remedy and paper where something is wrong."""
    level = finding.seen.level
    word = f"{level:7}"
    shown = f"\033[{_COLOURS[level]}m{word}\033[0m" if coloured else word
    text = f"{shown} {finding.check.name:{width}} {finding.seen.said}"
    if level in (GREEN, SKIPPED):
        return text
    paper = f" ({finding.check.paper})" if finding.check.paper and not finding.after else ""
    return f"{text}. Cause: {finding.cause}. Remedy: {finding.remedy}{paper}"


def summary(findings: Sequence[Finding]) -> str:
    """Return how many checks found what, in one line."""
    levels = [finding.seen.level for finding in findings]
    counted = [f"{levels.count(level)} {level}" for level in _COLOURS if level in levels]
    return f"{len(findings)} checks: {', '.join(counted)}"
