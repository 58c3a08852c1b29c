"""Certified accuracy against the radius: a lower bound, beside what attacks leave."""

from collections.abc import Sequence

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.drawing import figures
from jaxrobust.report.drawing.figures import Axis, Line
from jaxrobust.report.drawing.markup import Html, tag
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import sentences

_ACCURACY = Axis("accuracy", percent=True, low=0.0, high=1.0)
_RADIUS = Axis("l2 radius, pixels in [0, 1]", low=0.0)


def curves(
    evaluations: Sequence[ReportedEvaluation],
    ladders: Sequence[Sequence[ReportedEvaluation]],
    key: str,
) -> Html | None:
    """Draw for each network what is certified at each noise, and its ladders in l2 on the same
    images.

    Args:
      ladders: groups of `evaluation.ladders`.
    """
    groups: dict[str, list[ReportedEvaluation]] = {}
    for one in evaluations:
        if one.record.certified:
            groups.setdefault(_images(one), []).append(one)
    drawn = []
    for number, (same, certified) in enumerate(groups.items()):
        order = sorted(certified, key=lambda one: (one.record.certified or {})["sigma"])
        shown = [_certified(one) for one in order]
        attacked = [group for group in ladders if _images(group[0]) == same and _in_l2(group[0])]
        shown += [_attacked(group) for group in attacked]
        note = (
            "Certified: no attack in l2 takes more from the smoothed network, but with the stated "
            "probability for each image."
        )
        if attacked:
            note += (
                " Attacked was the network itself, without noise, which is another classifier: its "
                "line bounds from above what it withstands itself, not what the smoothed one does. "
                "Bars: exact 95 % intervals."
            )
        title = f"Certified accuracy: {order[0].name}"
        drawn.append(figures.lines(f"{key}-{number}", title, shown, _RADIUS, _ACCURACY, note=note))
    heading = tag("h2", "Certified accuracy")
    return tag("section", heading, tag("div", drawn, class_="figures")) if drawn else None


def _images(one: ReportedEvaluation) -> str:
    record: AccuracyRecord = one.record
    images = [record.dataset, record.split, record.image_ids, record.preprocessing]
    return str([sentences.identity(one), *images])


def _in_l2(one: ReportedEvaluation) -> bool:
    return one.record.threats[0].norm == "l2"


def _certified(one: ReportedEvaluation) -> Line:
    found = one.record.certified or {}
    radii = [float(radius) for radius in found["accuracy"]]
    return Line(f"certified, noise {found['sigma']:g}", radii, [*found["accuracy"].values()])


def _attacked(group: Sequence[ReportedEvaluation]) -> Line:
    points = [(one.record.threats[0].epsilon, one.record.robust or 0.0) for one in group]
    first, n = group[0], group[0].images
    if points[0][0] > 0 and first.record.clean is not None:  # at radius 0 nothing can be changed
        points.insert(0, (0.0, first.record.clean))
    radii, values = zip(*points, strict=True)
    ends = [checks.binomial_interval(round(v * n), n) if n else (v, v) for v in values]
    low, high = ([end[at] for end in ends] for at in (0, 1))
    return Line(f"{sentences.method(first.record)}, no noise", radii, values, low, high)
