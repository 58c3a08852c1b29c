"""Contents of a figure of accuracy against test resolution."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from jaxrobust.papers.figures import contents, figure_records, latex
from jaxrobust.papers.figures.contents import FigureContent, Series
from jaxrobust.papers.figures.figure_records import FigureRecord
from jaxrobust.types import fraction

SEVERAL = "varying radius"  # radii differ between resolutions, such as ones that grow with them


def resolution(
    places: Sequence[str], chosen_names: Sequence[str], threat: str | None
) -> FigureContent:
    """Show clean and robust accuracy of each network at its test resolutions.

    A norm is one curve if every size has another radius; otherwise each radius is one.
    """
    shown = [figure_records.of_resolutions(place, threat) for place in places]
    figure_records.check_resolutions(shown)
    names = figure_records.names([records[-1] for records in shown], chosen_names)
    curves = [curve for name, of in zip(names, shown, strict=True) for curve in _curves(of, name)]
    if len(shown) == 1:
        curves = [(accuracy, "", curve) for accuracy, _, curve in curves]
    contents.few_enough([accuracy for accuracy, _, _ in curves])
    sizes = sorted({_size(one) for records in shown for one in records})
    series = []
    for accuracy, name, curve in curves:
        points = {
            float(size): (contents.present(one, _accuracy(one, accuracy)), one.images)
            for size, one in curve.items()
        }
        series.append(
            Series(", ".join(filter(None, (name, accuracy))), *contents.along(points, sizes))
        )
    rows = [["resolution", *(latex.escaped(one.name) for one in series)]]
    rows += [[str(size), *contents.cells(series, at)] for at, size in enumerate(sizes)]
    last = shown[0][-1]
    attack = latex.attack_words(last.record) if last.record.attacks else "no attack"
    caption = (
        rf"Accuracy in \% at several test resolutions, in pixels, of networks that were not "
        f"retrained for them: {attack}{_radii_words(curves)}; "
        f"{latex.images_words(last.record, last.images)}. Brackets and bands: {contents.EXACT}."
    )
    records = [one for of in shown for one in of]
    called = [
        f"{name} at {_size(one)} px" for name, of in zip(names, shown, strict=True) for one in of
    ]
    return FigureContent(
        kind="resolution",
        ticks=[str(size) for size in sizes],
        places=[float(size) for size in sizes],
        axis="test resolution (pixels)",
        series=series,
        letters=[],
        caption=caption,
        rows=rows,
        sources=list(contents.sources(called, records)),
        notes=[_preprocessing(records), *contents.notes(called, [[one] for one in records])],
    )


def _curves(
    records: Sequence[FigureRecord], name: str
) -> Iterator[tuple[str, str, dict[int, FigureRecord]]]:
    """Yield the key of each curve of a network, and its records by image size."""
    yield "clean", name, {_size(one): one for one in records}
    norms: dict[str, list[FigureRecord]] = defaultdict(list)
    for one in records:
        if one.record.attacks:
            norms[one.record.threats[0].norm].append(one)
    for norm, of_norm in norms.items():
        radii = {_radius(one) for one in of_norm}
        if len(radii) > 1 and len(radii) == len(of_norm) == len({_size(one) for one in of_norm}):
            yield f"{norm}, {SEVERAL}", name, {_size(one): one for one in of_norm}
            continue
        for radius in sorted(radii):
            at = {_size(one): one for one in of_norm if _radius(one) == radius}
            yield f"{norm} {fraction(radius)}", name, at


def _preprocessing(records: Sequence[FigureRecord]) -> str:
    """Describe the preprocessing, which differs for each size."""
    ids = {_size(one): one.record.preprocessing or "not known" for one in records}
    return f"Preprocessing: {', '.join(f'{ids[size]} at {size} px' for size in sorted(ids))}."


def _radii_words(curves: Sequence[tuple[str, str, dict[int, FigureRecord]]]) -> str:
    """List for the caption the radii of curves that have one for each resolution."""
    texts = []
    for accuracy, _, curve in curves:
        norm, _, radius_words = accuracy.partition(", ")
        if radius_words == SEVERAL:
            of = ", ".join(f"{fraction(_radius(curve[size]))} at {size}" for size in sorted(curve))
            texts.append(rf"${latex.NORMS[norm]}$ radii {of}")
    return "".join(f"; {text}" for text in dict.fromkeys(texts))


def _size(one: FigureRecord) -> int:
    return one.record.image_size or 0


def _radius(one: FigureRecord) -> float:
    return one.record.threats[0].epsilon


def _accuracy(one: FigureRecord, accuracy: str) -> float | None:
    return one.record.clean if accuracy == "clean" else one.record.robust
