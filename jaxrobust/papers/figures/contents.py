"""Contents of a figure, independent of the drawing: series with intervals, and the table."""

import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import checked
from jaxrobust.papers.figures import figure_records, latex
from jaxrobust.papers.figures.figure_records import FigureRecord
from jaxrobust.results.comparison import evaluations
from jaxrobust.results.comparison.comparison_findings import LEVEL, compare_all
from jaxrobust.types import fraction

MOST_LINES = 7  # of one figure: the palette has no more distinct colors
MOST_ROWS = 30  # networks of a comparison: more do not fit into a column
EXACT = rf"pointwise exact (Clopper--Pearson) {100 * LEVEL:.0f}\,\% intervals"  # of the images


class Series(NamedTuple):
    """The accuracies of one network, as fractions, with their intervals."""

    name: str
    values: list[float]
    ends: list[tuple[float, float]]


class FigureContent(NamedTuple):
    """A figure and its table, before anything is drawn or written."""

    kind: str
    ticks: list[str]  # of the other axis: attacks, or radii as numbers
    places: list[float]  # positions of a series' values on that axis
    axis: str
    series: list[Series]
    letters: list[str]  # of each series: a shared letter means no significant difference
    caption: str
    rows: list[list[str]]  # of the table, the head first
    sources: list[str]
    notes: list[str]  # for readers: reasons for doubt, omissions

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON; accuracies are fractions."""
        series = [one._asdict() for one in self.series]
        fields = {key: getattr(self, key) for key in ("kind", "ticks", "places", "letters")}
        return fields | {"series": series, "caption": self.caption, "notes": self.notes}


def attacks(
    places: Sequence[str], chosen_names: Sequence[str], threat: str | None
) -> FigureContent:
    """Show each network's clean accuracy and its accuracy after each attack of a cascade."""
    few_enough(places)
    shown = figure_records.cascades(places, threat)
    names = figure_records.names(shown, chosen_names)
    steps = list(dict.fromkeys(key for one in shown for key in one.record.accuracy_after or ()))
    first = shown[0]
    series = []
    for name, one in zip(names, shown, strict=True):
        after = one.record.accuracy_after or {}
        values = [present(one, one.record.clean)]
        for step in steps:  # a step that a record does not list, such as a replay, removed nothing
            value = after.get(step)
            values.append(values[-1] if value is None else value)
        series.append(_series(name, values, one.images))
    words = [latex.escaped_name(step) for step in steps]
    rows = [["network", "clean", *words, rf"{100 * LEVEL:.0f}\,\% interval"]]
    for network in series:
        cells = [latex.percent(value) for value in network.values]
        rows.append([latex.escaped(network.name), *cells, latex.between(network.ends[-1])])
    union = first.record.is_union
    order = "after each threat in turn" if union else "after each attack in turn"
    caption = (
        rf"Accuracy in \% on unmodified images (clean) and {order}: "
        f"{latex.attack_words(first.record)}, {latex.threat_words(first.record)}; "
        f"{latex.images_words(first.record, first.images)}. Intervals of the last column and bars: "
        f"{EXACT}."
    )
    ticks = ["clean", *map(latex.attack_name, steps)]
    return FigureContent(
        *("attacks", ticks, [float(at) for at in range(len(ticks))], "", series, [], caption),
        *(rows, list(sources(names, shown)), notes(names, [[one] for one in shown])),
    )


def radius(places: Sequence[str], chosen_names: Sequence[str], threat: str | None) -> FigureContent:
    """Show each network's accuracy as the radius grows, from ladders."""
    few_enough(places)
    if threat:
        raise ValueError(
            "a ladder has all radii of its norm; leave --threat out, and name one of several "
            "ladders as FOLDER#NUMBER"
        )
    shown = figure_records.ladders(places)
    names = figure_records.names([rungs[-1] for rungs in shown], chosen_names)
    points = [_points(rungs) for rungs in shown]
    largest = shown[0][-1]
    norm = largest.record.threats[0].norm
    radii = sorted({radius for curve in points for radius in curve})
    of_255 = norm == "linf" and all("/255" in fraction(r) for r in radii if r)
    words = [fraction(r) if of_255 else f"{r:.4g}" for r in radii]
    series = [Series(name, *along(curve, radii)) for name, curve in zip(names, points, strict=True)]
    rows = [[rf"${latex.NORMS[norm]}$ radius", *map(latex.escaped, names)]]
    for at in range(len(radii)):
        rows.append([f"${words[at]}$", *cells(series, at)])
    caption = (
        rf"Accuracy in \% within balls of growing ${latex.NORMS[norm]}$ radius; attack: "
        f"{latex.attack_words(largest.record)}, whose points count at every radius that contains "
        f"them; radii 0 to ${words[-1]}$ of pixels in $[0, 1]$; "
        f"{latex.images_words(largest.record, largest.images)}. Radius 0 is clean accuracy. "
        f"Brackets and bands: {EXACT}."
    )
    scale = 255 if of_255 else 1
    axis = rf"${latex.NORMS[norm]}$ radius" + (" (in 1/255)" if of_255 else "")
    return FigureContent(
        *("radius", words, [scale * r for r in radii], axis, series, []),
        *(caption, rows, list(sources(names, [rungs[-1] for rungs in shown]))),
        notes=notes(names, shown),
    )


def _points(rungs: Sequence[FigureRecord]) -> dict[float, tuple[float, int]]:
    """List accuracy and number of images at each radius of a ladder; radius 0 is clean accuracy."""
    points = {0.0: (present(rungs[0], rungs[0].record.clean), rungs[0].images)}
    for one in rungs:
        if one.record.attacks:
            points[one.record.threats[0].epsilon] = (present(one, one.record.robust), one.images)
    return points


def certified(
    places: Sequence[str], chosen_names: Sequence[str], threat: str | None
) -> FigureContent:
    """Show certified accuracy as the L2 radius grows, next to an L2 ladder.

    Curves for different noise have different radii. Between two radii, a curve has the value of
    the larger one, which is certified there too.
    """
    if threat:
        raise ValueError("certificates cover every l2 radius; leave --threat out")
    shown = [one for place in places for one in figure_records.certified(place)]
    few_enough([one.place for one in shown])
    figure_records.check_together(shown)
    facts: list[Any] = [one.record.certified for one in shown]
    noises = [f"noise {fact['sigma']:g}" for fact in facts]
    if len(places) > 1:
        noises = [f"{one.place}, {noise}" for one, noise in zip(shown, noises, strict=True)]
    names = figure_records.names(shown, chosen_names) if chosen_names else noises
    curves = [
        {float(radius): (value, one.images) for radius, value in fact["accuracy"].items()}
        for one, fact in zip(shown, facts, strict=True)
    ]
    ladder = figure_records.ladder_in_l2(places[0], shown[0]) if len(places) == 1 else []
    attacked = _points(ladder) if ladder else {}
    radii = sorted({*attacked, *(radius for curve in curves for radius in curve)})
    series = [
        Series(name, *along(_stepped(curve, radii), radii))
        for name, curve in zip(names, curves, strict=True)
    ]
    if attacked:
        series.append(Series("attacked, no noise", *along(attacked, radii)))
    steps = [radius for radius in curves[-1] if radius in attacked or not attacked]
    rows = [[rf"${latex.NORMS['l2']}$ radius", *(latex.escaped(one.name) for one in series)]]
    for radius in steps:
        at = radii.index(radius)
        cells = [latex.percent(one.values[at]) for one in series]
        rows.append([f"${radius:.4g}$", *cells])
    first = facts[0]
    attacked_words = (
        " For comparison: the network without noise, a different classifier, under "
        f"{latex.attack_words(ladder[-1].record)}."
        if attacked
        else ""
    )
    caption = (
        rf"Accuracy in \% that randomized smoothing certifies within ${latex.NORMS['l2']}$ balls: "
        f"{latex.number(first['draws'])} draws, an image's certificate fails with probability "
        f"{first['alpha']:g}; {latex.images_words(shown[0].record, shown[0].images)}."
        f"{attacked_words} Bands: {EXACT}."
    )
    return FigureContent(
        kind="certified",
        ticks=[f"{radius:.4g}" for radius in radii],
        places=radii,
        axis=rf"${latex.NORMS['l2']}$ radius",
        series=series,
        letters=[],
        caption=caption,
        rows=rows,
        sources=list(sources(names, shown)),
        notes=notes(names, [[one] for one in shown]),
    )


def _stepped(
    curve: dict[float, tuple[float, int]], radii: Sequence[float]
) -> dict[float, tuple[float, int]]:
    """Fill in missing radii of a certified curve with its next value; 0 beyond the last."""
    nothing = (0.0, next(iter(curve.values()))[1])
    return {
        radius: next((curve[larger] for larger in sorted(curve) if larger >= radius), nothing)
        for radius in radii
    }


def along(
    points: dict[float, tuple[float, int]], radii: Sequence[float]
) -> tuple[list[float], list[tuple[float, float]]]:
    """Return accuracies and their intervals at all positions of an axis; NaN if missing."""
    none = float("nan")
    values = [points[r][0] if r in points else none for r in radii]
    ends = [
        checks.binomial_interval(*_of(points[r])) if r in points else (none, none) for r in radii
    ]
    return values, ends


def compare(
    places: Sequence[str], chosen_names: Sequence[str], threat: str | None
) -> FigureContent:
    """Show the robust accuracy of several networks, and which pairs differ significantly."""
    if len(places) > MOST_ROWS:
        raise ValueError(f"a figure shows at most {MOST_ROWS} networks; name fewer records")
    loaded = evaluations.load(places, threat)
    records = [FigureRecord(one.place, one.ours, one.verdicts) for one in loaded]
    figure_records.check_together(records)
    names = figure_records.names(records, chosen_names)
    if not loaded[0].record.attacks:
        raise ValueError(
            "these are evaluations without an attack, which have no robust accuracy; name others, "
            "or another --threat"
        )
    loaded, left_out = evaluations.without_replayed(loaded)
    robust = [one.verdicts.robust for one in loaded]
    n = len(robust[0])
    order = sorted(range(len(loaded)), key=lambda at: (-int(robust[at].sum()), at))
    pairs_of = compare_all([robust[at] for at in order])
    apart = [places_of for places_of, difference in pairs_of.items() if difference.apart]
    series = [_series(names[at], [float(robust[at].mean())], n) for at in order]
    shared_letters = letters_of(len(order), apart)
    clean = [float(loaded[at].verdicts.clean.mean()) for at in order]
    interval = rf"{100 * LEVEL:.0f}\,\% interval"
    rows = [["network", "clean", "robust", interval, "not apart"]]
    for network, clean_accuracy, letter in zip(series, clean, shared_letters, strict=True):
        cells = [
            latex.percent(clean_accuracy),
            latex.percent(network.values[0]),
            latex.between(network.ends[0]),
        ]
        rows.append([latex.escaped(network.name), *cells, letter])
    record = loaded[0].record
    tests = len(pairs_of)
    test = f"exact McNemar {'tests' if tests > 1 else 'test'} on the same images"
    corrected = f", Holm's correction for all {tests} pairs" if tests > 1 else ""
    caption = (
        rf"Clean and robust accuracy in \%: {latex.attack_words(record)}, "
        f"{latex.threat_words(record)}; {latex.images_words(record, n)}. Intervals of robust "
        f"accuracy: {EXACT}. Networks that share a letter cannot be told apart at the level of "
        rf"{100 * (1 - LEVEL):.0f}\,\% ({test}{corrected})."
    )
    remarks = [left_out.replace("*", "")] if left_out else []
    remarks += evaluations.unconfirmed(loaded, names)
    return FigureContent(
        *("compare", [], [], "robust accuracy (%)", series, shared_letters, caption, rows),
        list(sources([names[at] for at in order], [records[at] for at in order])),
        remarks + notes(names, [[one] for one in records]),
    )


def letters_of(count: int, apart: Iterable[tuple[int, int]]) -> list[str]:
    """Assign letters to `count` networks; a shared letter means no significant difference.

    Args:
      count: number of networks, best first.
      apart: pairs of networks that differ significantly.
    Returns:
      For each network its letters, sorted: two networks have a letter in common exactly if they
      are not in `apart`. The first letters are those of the best networks.
    Source: Piepho 2004, doi:10.1198/1061860043515, the algorithm of insertion and absorption.
    """
    columns = [frozenset(range(count))]
    for one, other in apart:
        divided = [
            part
            for column in columns
            for part in ([column - {one}, column - {other}] if {one, other} <= column else [column])
        ]
        largest: list[frozenset[int]] = []
        for column in sorted(set(divided), key=lambda c: (-len(c), sorted(c))):
            if not any(column <= larger for larger in largest):
                largest.append(column)
        columns = largest
    columns.sort(key=sorted)
    if len(columns) > 52:
        raise ValueError("these networks need more than 52 letters; show fewer in one figure")
    return [
        "".join(
            letter
            for letter, column in zip(string.ascii_letters, columns, strict=False)
            if network in column
        )
        for network in range(count)
    ]


def cells(series: Sequence[Series], at: int) -> list[str]:
    """Write the accuracies of a table's row with their intervals; -- if a series has none."""
    return [
        rf"{latex.percent(one.values[at])} {{\footnotesize {latex.between(one.ends[at])}}}"
        if one.values[at] == one.values[at]
        else "--"
        for one in series
    ]


def few_enough(places: Sequence[str]) -> None:
    """Refuse more networks than the palette has colors."""
    if len(places) > MOST_LINES:
        raise ValueError(
            f"a figure of lines shows at most {MOST_LINES} networks, so that colors can be told "
            f"apart; name fewer than these {len(places)}, or use --kind compare"
        )


def present(one: FigureRecord, value: float | None) -> float:
    """Return an accuracy of a record; refuse a record without it."""
    if value is None:
        raise ValueError(
            f"{one.place} has a record without a clean or a robust accuracy, which the figure "
            "needs; name another evaluation"
        )
    return value


def _of(point: tuple[float, int]) -> tuple[int, int]:
    return round(point[0] * point[1]), point[1]


def _series(name: str, values: list[float], n: int) -> Series:
    return Series(name, values, [checks.binomial_interval(*_of((value, n))) for value in values])


def sources(names: Sequence[str], shown: Sequence[FigureRecord]) -> Iterator[str]:
    """Yield a line for each record: file, evaluation and weights."""
    for name, one in zip(names, shown, strict=True):
        record = one.record
        sha = str(record.weights_sha256 or "not known")[:12]
        yield (
            f"{name}: {one.ours.file}, evaluation {record.evaluation}, weights {record.weights}, "
            f"sha256 {sha}, commit {record.commit}, {record.time}"
        )


def notes(names: Sequence[str], of: Sequence[Sequence[FigureRecord]]) -> list[str]:
    """List the reasons to doubt each network's records."""
    every = list[str]()
    for name, records in zip(names, of, strict=True):
        for one in records:
            every += figure_records.doubts(name, one.record)
            if words := checked.missing(one.record, one.ours.file):
                every.append(f"Of {name}: {words}.")
    return list(dict.fromkeys(every))
