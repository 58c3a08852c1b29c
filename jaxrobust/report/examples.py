"""Images of an evaluation."""

from jaxrobust.report.gathered import Evaluation


def part(one: Evaluation) -> None:
    """Return nothing yet."""
    del one
