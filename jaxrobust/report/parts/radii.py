"""Accuracy against the radius: under attack, and certified on the same images."""

from collections.abc import Sequence

from markupsafe import Markup

from jaxrobust.evaluation.network import checks
from jaxrobust.report import figures, markup
from jaxrobust.report.figures import Axis, Line
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import sentences

ACCURACY = Axis("accuracy", percent=True, low=0.0, high=1.0)


def ladders(evaluations: Sequence[ReportedEvaluation]) -> list[list[ReportedEvaluation]]:
    """Return groups of evaluations that differ only in their radius, smallest radius first."""
    groups: dict[str, dict[float, ReportedEvaluation]] = {}
    for one in evaluations:
        record = one.record
        if record.robust is None or len(set(record.threats)) != 1:
            continue
        search = [record.attacks[0]["norm"], record.method, record.search_dtype]
        group = groups.setdefault(str([_images(one), search]), {})
        group[record.threats[0].epsilon] = one
    return [[group[e] for e in sorted(group)] for group in groups.values() if len(group) > 1]


def attacked(groups: Sequence[Sequence[ReportedEvaluation]], key: str) -> Markup | None:
    """Return figures of robust accuracy against the radius, one per group of `ladders`."""
    drawn = []
    for number, group in enumerate(groups):
        first = group[0]
        points = [
            (
                one.record.threats[0].epsilon,
                one.record.robust or 0.0,
                *(sentences.interval(one, "robust") or (float("nan"),) * 2),
            )
            for one in group
        ]
        if points[0][0] > 0 and first.record.clean is not None:  # radius 0 changes nothing
            ends = sentences.interval(first, "clean") or (float("nan"),) * 2
            points.insert(0, (0.0, first.record.clean, *ends))
        norm = sentences.ball(first.record.attacks[0]).partition(" ")[0]
        name = f"{first.name}, {sentences.method(first.record)}"
        drawn.append(
            figures.lines(
                f"{key}-{number}",
                f"Accuracy against the {norm} radius: {name}",
                [Line("right", *zip(*points, strict=True))],
                Axis("radius, pixels in [0, 1]", low=0.0),
                ACCURACY,
                note="Bars: exact 95% intervals. Radius 0 is clean accuracy.",
            )
        )
    return markup.parts.section("Accuracy against radius", figures=drawn) if drawn else None


def certified(
    evaluations: Sequence[ReportedEvaluation],
    ladders: Sequence[Sequence[ReportedEvaluation]],
    key: str,
) -> Markup | None:
    """Draw certified accuracy at each noise for each network, with l2 ladders on its images."""
    groups: dict[str, list[ReportedEvaluation]] = {}
    for one in evaluations:
        if one.record.certified:
            groups.setdefault(_images(one), []).append(one)
    drawn = []
    for number, (images, group) in enumerate(groups.items()):
        group.sort(key=lambda one: (one.record.certified or {})["sigma"])
        curves = []
        for one in group:
            result = one.record.certified or {}
            radii = [float(radius) for radius in result["accuracy"]]
            name = f"certified, noise {result['sigma']:g}"
            curves.append(Line(name, radii, [*result["accuracy"].values()]))
        note = (
            "Certified: with the stated probability for each image, no l2 attack reduces the "
            "smoothed network's accuracy further."
        )
        in_l2 = [ladder for ladder in ladders if ladder[0].record.threats[0].norm == "l2"]
        if shown := [_without_noise(one) for one in in_l2 if _images(one[0]) == images]:
            curves += shown
            note += (
                " The attacks targeted the network itself, without noise, which is a different "
                "classifier: the line is an upper bound for that network, not for the smoothed "
                "one. Bars: exact 95% intervals."
            )
        title = f"Certified accuracy: {group[0].name}"
        radius = Axis("l2 radius, pixels in [0, 1]", low=0.0)
        drawn.append(figures.lines(f"{key}-{number}", title, curves, radius, ACCURACY, note=note))
    return markup.parts.section("Certified accuracy", figures=drawn) if drawn else None


def _images(one: ReportedEvaluation) -> str:
    record = one.record
    images = [record.dataset, record.split, record.image_ids, record.preprocessing]
    return str([sentences.identity(one), *images])


def _without_noise(group: Sequence[ReportedEvaluation]) -> Line:
    points = [(one.record.threats[0].epsilon, one.record.robust or 0.0) for one in group]
    first, n = group[0], group[0].images
    if points[0][0] > 0 and first.record.clean is not None:  # radius 0 changes nothing
        points.insert(0, (0.0, first.record.clean))
    radii, values = zip(*points, strict=True)
    ends = [checks.binomial_interval(round(v * n), n) if n else (v, v) for v in values]
    low, high = zip(*ends, strict=True)
    return Line(f"{sentences.method(first.record)}, no noise", radii, values, low, high)
