"""The confusion that attacks cause: which class the network gives for what fooled it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxrobust.report.drawing import matrix
from jaxrobust.report.drawing.markup import Html, remark, table, tag
from jaxrobust.report.gathered import ReportedEvaluation

_PAIRS = 20  # of a table, where there are too many classes for a matrix
_TITLE = "Classes that the attacks reached"
_UNKNOWN = (
    "Which classes the attacks reached is not known: an older version, which did not note them, "
    "wrote these verdicts. The same evaluation with another --out notes them."
)
_NO_VERDICTS = (
    "Classes, the confusion and images are not shown: there are no verdicts image by image, as "
    "jaxrobust evaluate writes them. A training writes none, nor did older versions."
)
_NONE = "No attack fooled an image that is right as it is, so no class was reached."
_HEAD = ("label", "class reached", "images", "of the fooled with this label")


def pairs(one: ReportedEvaluation) -> list[tuple[int, int, int]]:
    """Return label, class reached, images; the most frequent pair first, ties by the label."""
    seen = one.verdicts
    if seen is None:
        return []
    known = seen.reached >= 0
    both = np.stack([seen.labels[known], seen.reached[known]], axis=1)
    there, counts = np.unique(both, axis=0, return_counts=True)
    counted = [(int(a), int(b), int(n)) for (a, b), n in zip(there, counts, strict=True)]
    return sorted(counted, key=lambda pair: (-pair[2], pair[:2]))


def part(one: ReportedEvaluation, key: str) -> tuple[Html | None, Html | None]:
    """Return the confusion as a matrix, and what stands below: many classes, nothing known."""
    seen, reached = one.verdicts, pairs(one)
    attacked = one.record.robust is not None
    if seen is None:
        return None, remark(_NO_VERDICTS if attacked else "")
    fooled = int((seen.clean & ~seen.robust).sum())
    if not fooled:
        return None, remark(_NONE if attacked else "")
    if not reached:
        return None, remark(_UNKNOWN)
    unknown = fooled - sum(n for _, _, n in reached)
    lacking = f" Of {unknown:,} more fooled images it is not known." if unknown > 0 else ""
    size = max(len(one.classes), *(1 + max(a, b) for a, b, _ in reached))
    if 1 < size <= matrix.MOST and min(a for a, _, _ in reached) >= 0:
        return _matrix(one, key, reached, size, lacking), None
    return None, tag("div", _table(one, reached), remark(lacking.strip()))


def _matrix(
    one: ReportedEvaluation,
    key: str,
    reached: Sequence[tuple[int, int, int]],
    size: int,
    lacking: str,
) -> Html:
    counts = np.zeros((size, size), int)
    for a, b, n in reached:
        counts[a, b] = n
    names = [one.class_name(label) for label in range(size)]
    alt = "; ".join(f"{names[a]} became {names[b]} {n} times" for a, b, n in reached[:5])
    note = (
        "Rows: the label. Columns: what the network says of the image that fooled it. Images that "
        f"were wrong without an attack do not count.{lacking}"
    )
    return matrix.cells(key, _TITLE, names, counts, alt=alt, note=note)


def _table(one: ReportedEvaluation, reached: Sequence[tuple[int, int, int]]) -> Html:
    more = len(reached) > _PAIRS
    of = f": the {_PAIRS} most frequent of {len(reached):,} pairs" if more else ""
    totals: Counter[int] = Counter()
    for a, _, n in reached:
        totals[a] += n
    rows = [
        (one.class_name(a), one.class_name(b), f"{n:,}", f"{100 * n / totals[a]:.0f} %")
        for a, b, n in reached[:_PAIRS]
    ]
    return table(f"{_TITLE}{of}", _HEAD, rows, words=2, of=f": {one.name}, {one.file}")
