"""Checks, their findings, and the format of findings."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import counted

GREEN, YELLOW, RED, SKIPPED = "green", "yellow", "red", "skipped"
_NARROWEST = 40  # columns of a terminal
_COLOURS = {GREEN: 32, YELLOW: 33, RED: 31, SKIPPED: 2}  # of terminals, ECMA-48

Examined = TypeVar("Examined")


class CheckResult(NamedTuple):
    """The result of a check; a cause or remedy here replaces that of the check."""

    level: str
    sentence: str
    value: Any = None
    cause: str | None = None
    remedy: str | None = None


class Check(NamedTuple, Generic[Examined]):
    """A row in a table of checks."""

    name: str
    measures: str  # and when it is yellow or red
    cause: str
    remedy: str
    paper: str  # with its section, if that could be looked up
    look: Callable[[Examined], CheckResult]
    follows: tuple[str, ...] = ()  # checks whose faults also show here


class Finding(NamedTuple):
    """The result of a check."""

    check: Check[Any]
    result: CheckResult
    after: str | None = None  # the check that found the cause

    def plain(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        check, result, faulty = self.check, self.result, self.result.level in (YELLOW, RED)
        return {
            "check": check.name,
            "level": result.level,
            "measures": check.measures,
            "said": result.sentence,
            "value": result.value,
            "cause": result.cause if faulty else None,
            "remedy": result.remedy if faulty else None,
            "follows_from": self.after,
            "paper": check.paper,
        }


Tell = Callable[["Finding | str"], None]  # gets a finding, or a description of the subject


def examined(
    checks: Sequence[Check[Examined]], patient: Examined, tell: Tell | None = None
) -> list[Finding]:
    """Run all checks of a table in order; `tell` gets each finding immediately.

    A fault that shows in several rows is red in the first one, and yellow in those that follow.
    """
    findings: list[Finding] = []
    for check in checks:
        with patience.of(f"checking {check.name}", here=tell is not None):
            result = check.look(patient)
        reds = [f.check.name for f in findings if f.result.level == RED]
        after = next((name for name in reds if name in check.follows), None)
        cause, remedy = result.cause or check.cause, result.remedy or check.remedy
        if after and result.level in (YELLOW, RED):
            cause, remedy = f"it follows from {after}; see that check", f"fix {after} first"
            result = result._replace(level=YELLOW)
        else:
            after = None
        findings.append(Finding(check, result._replace(cause=cause, remedy=remedy), after))
        if tell:
            tell(findings[-1])
    return findings


_LEVEL, _NAME = 8, 23  # columns of a line before the observation


def line(finding: Finding, *, coloured: bool, columns: int | None = None) -> str:
    """Format a finding, with cause, remedy and paper if something is wrong.

    `columns`: width of the terminal, for wrapping; None: a single line.
    """
    level, sentence = finding.result.level, finding.result.sentence
    parts = []
    if level in (YELLOW, RED):
        paper = f" ({finding.check.paper})" if finding.check.paper and not finding.after else ""
        parts = [f"Cause: {finding.result.cause}", f"Remedy: {finding.result.remedy}{paper}"]
    start = f"{level:{_LEVEL}}{finding.check.name:{_NAME}}"
    if columns is None:
        text = ". ".join([f"{start}{sentence}", *parts])
    else:  # further lines are aligned with the observation if they fit
        indent = len(start) if columns >= 2 * len(start) else _LEVEL
        width = max(columns, _NARROWEST)
        more = [_filled(part, " " * _LEVEL, _LEVEL + 2, width) for part in parts]
        text = "\n".join([_filled(sentence, start, indent, width), *more])
    return text.replace(level, f"\033[{_COLOURS[level]}m{level}\033[0m", 1) if coloured else text


def _filled(text: str, start: str, indent: int, width: int) -> str:
    options: Any = {"initial_indent": start, "subsequent_indent": " " * indent}
    options |= {"break_on_hyphens": False, "break_long_words": False}
    return textwrap.fill(text, width, **options)


def summary(findings: Sequence[Finding]) -> str:
    """Count the checks by their outcome, in one line."""
    levels = [finding.result.level for finding in findings]
    counts = [f"{levels.count(level)} {level}" for level in _COLOURS if level in levels]
    return f"{counted(len(findings), 'check')}: {', '.join(counts)}"
