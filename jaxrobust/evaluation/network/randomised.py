"""Verdicts on randomized networks: a rule over several draws of their answers to one image.

auto-attack a392200 judges by one draw, before the attacks and after each of them, at the latest
point that one draw of the search misclassified. So an image that is nearly always classified right
may count as fooled. That lower accuracy is recorded too (`one-draw`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrobust.attacks import TALLIES
from jaxrobust.evaluation.network import checks

DRAWS = 20
ONE = "one-draw"
RULES = {  # when the answers of K draws count as right
    "majority": "more than half of the draws are right",
    "mean": "the label has the largest mean softmax probability over the draws",
    ONE: "the only draw is right, as in auto-attack",
}


class VerdictRule(NamedTuple):
    """How the answers of a randomized network are judged."""

    rule: str
    draws: int

    @property
    def tally(self) -> str:
        """Name the row of `attacks.TALLIES` that judges points in the search; "": one draw."""
        return self.rule if self.rule in TALLIES else ""

    def words(self) -> str:
        """Format the rule."""
        return "one draw" if self.rule == ONE else f"{self.rule} of {self.draws} draws"


def verdict(rule: str | None = None, draws: int | None = None) -> VerdictRule:
    """Make the rule that judges answers; by default the majority of 20 draws."""
    rule = "majority" if rule is None else rule
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {', '.join(RULES)}")
    if rule == ONE:
        if draws not in (None, 1):
            raise ValueError(f"draws={draws!r} contradicts the rule {ONE}; leave draws out")
        return VerdictRule(rule, 1)
    draws = DRAWS if draws is None else draws
    if not isinstance(draws, int | np.integer) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws={draws!r} must be an int >= 1")
    return VerdictRule(rule, int(draws))


class Answers(NamedTuple):
    """The answers of a randomized network to n images."""

    right: np.ndarray  # bool[n], by the rule
    once: np.ndarray  # bool[n], by the first draw
    finite: np.ndarray  # bool[n], the logits of all draws
    reached: np.ndarray  # i[n], the likeliest wrong class by the rule; -1: some draw has no answer
    logits: np.ndarray  # f32[n, C], of the first draw


def answers(
    forward: Callable[[int], np.ndarray], rule: VerdictRule, labels: np.ndarray, classes: int
) -> Answers:
    """Judge the answers of all draws to images with labels i[n].

    A draw with logits that are not finite is wrong, and makes the mean undefined. `forward` maps
    the number of a draw to its logits f32[n, C]; the rule `one-draw` uses the first.
    """
    n = len(labels)
    first = np.zeros((n, classes), np.float32)
    votes, mean = np.zeros((n, classes)), np.zeros((n, classes))
    right, finite, rows = np.zeros(n, int), np.ones(n, bool), np.arange(n)
    for number in range(rule.draws if n else 0):
        logits = forward(number)
        first = logits if number == 0 else first
        answered = checks.answered(logits)
        right += checks.is_right(logits, labels)
        finite &= answered
        votes[rows[answered], logits[answered].argmax(axis=1)] += 1
        with np.errstate(invalid="ignore"):  # infinity - infinity
            powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        mean += np.where(answered[:, None], powers / powers.sum(1, keepdims=True), np.nan)
    counts = mean if rule.rule == "mean" else votes
    by_rule = checks.is_right(mean, labels) if rule.rule == "mean" else 2 * right > rule.draws
    wrong = np.array(counts)
    wrong[rows, labels] = -np.inf
    return Answers(
        right=by_rule,
        once=checks.is_right(first, labels),
        finite=finite,
        reached=np.where(finite, wrong.argmax(axis=1), -1) if n else np.zeros(0, int),
        logits=first,
    )


def packed(values: np.ndarray) -> str:
    """Encode bool[N] as N / 4 hexadecimal digits, for records."""
    return np.packbits(values).tobytes().hex()


def unpacked(text: str, n: int) -> np.ndarray:
    """Decode bool[n] from a result of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)
