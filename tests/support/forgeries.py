"""Forged bundles: how each is made of an honest one, and why it is refused.

Every forger signs anew, and most compute the numbers of the record from what they wrote.
"""

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles import claims
from tests.support import bundles
from tests.support.bundles import Honest, changed, resigned, row_changed, rows_changed, rows_of

Edit = Callable[[Path, Honest], Any]


class Forgery(NamedTuple):
    name: str
    edit: Edit
    said: str  # a pattern of the refusal, or of what is said after the forward passes


def place(honest: Honest, verdict: str, at: int = 0) -> int:
    """The place of an image with this verdict."""
    return int(np.flatnonzero(honest.found.fooled_by == verdict)[at])


def record(**changes: Any) -> Edit:
    """One that says something else in its record."""
    return lambda folder, honest: changed(folder, record=changes)


def about(**changes: Any) -> Edit:
    return lambda folder, honest: changed(folder, **changes)


def row(of: str, /, **changes: Any) -> Edit:
    """One that says something else of an image with this verdict, and counts again."""

    def edit(folder: Path, honest: Honest) -> None:
        rows = rows_of(folder)
        rows[place(honest, of)] |= changes
        rows_changed(folder, rows)

    return edit


def other_label(of: str) -> Edit:
    def edit(folder: Path, honest: Honest) -> None:
        which = place(honest, of)
        row_changed(folder, which, label=int(honest.labels[which] + 1) % 10)

    return edit


def keys(key: str, **changes: Any) -> Edit:
    """One that changes a part of a number of the record."""
    return lambda folder, honest: changed(
        folder, record={key: honest.record.to_json()[key] | changes}
    )


def counted_twice(folder: Path, honest: Honest) -> None:
    """A fooled image stands in for one that stands, by the id that arrays count from the end."""
    rows, fooled = rows_of(folder), place(honest, "apgd-ce")
    rows[place(honest, "")] = rows[fooled] | {"image": fooled - bundles.N}
    rows_changed(folder, rows)


def again(folder: Path, honest: Honest) -> None:
    rows = rows_of(folder)
    rows[place(honest, "")] = rows[place(honest, "apgd-ce")]
    rows_changed(folder, rows)


def left_out(folder: Path, honest: Honest) -> None:
    rows_changed(folder, [r for r in rows_of(folder) if r["verdict"]])


def chosen(folder: Path, honest: Honest) -> None:
    rows = [r for r in rows_of(folder) if r["verdict"]]
    ids = ", ".join(str(r["image"]) for r in rows)
    rows_changed(folder, rows, image_ids=ids)


def numbered_anew(folder: Path, honest: Honest) -> None:
    """Those that fell, numbered from 0 as if they were the first ones."""
    rows = [r for r in rows_of(folder) if r["verdict"]]
    rows = [r | {"image": at} for at, r in enumerate(rows)]
    rows_changed(folder, rows, image_ids=f"0..{len(rows) - 1}")


def no_lines(folder: Path, honest: Honest) -> None:
    (folder / claims.ROWS).write_text("")
    resigned(folder)


def stored(code: Callable[[Honest, int], bytes], **changes: Any) -> Edit:
    """One with another difference, of the first image that APGD fooled."""

    def edit(folder: Path, honest: Honest) -> None:
        which = place(honest, "apgd-ce")
        file = folder / "differences-0.bin"
        there, made = file.read_bytes(), code(honest, which)
        file.write_bytes(there + made)
        row_changed(folder, which, offset=len(there), bytes=len(made), **changes)

    return edit


def exact(value: float) -> Callable[[Honest, int], bytes]:
    """The difference, bit by bit, of an image that has a pixel of this value."""

    def code(honest: Honest, which: int) -> bytes:
        clean = honest.images[which]
        point = np.array(clean)
        point[0, 0, 0] = value
        bits = point.view("<u4") - clean.view("<u4")
        return zlib.compress(bits.ravel().view(np.uint8).reshape(-1, 4).T.copy().tobytes())

    return code


def steps(value: int, count: int = 192) -> bytes:
    return zlib.compress(np.full(count, value, np.int8).tobytes())


def pickled(honest: Honest, which: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def swapped(*fields: str) -> Edit:
    """One in which two fooled images have each other's."""

    def edit(folder: Path, honest: Honest) -> None:
        rows = rows_of(folder)
        one, other = (rows[place(honest, "apgd-ce", at)] for at in (0, 1))
        for field in fields:
            one[field], other[field] = other[field], one[field]
        rows_changed(folder, rows)

    return edit


def swapped_exact(folder: Path, honest: Honest) -> None:
    """The exact difference of another image, which is far from this one."""
    one, other = (place(honest, "apgd-ce", at) for at in (0, 1))
    shift = honest.images[one].view("<u4") - honest.images[other].view("<u4")
    code = zlib.compress(shift.ravel().view(np.uint8).reshape(-1, 4).T.copy().tobytes())
    stored(lambda *_: code, levels=0, step=0.0)(folder, honest)


def standing_as_fooled(folder: Path, honest: Honest) -> None:
    """All that stand, with the difference of one that fell."""
    rows = rows_of(folder)
    fallen = rows[place(honest, "apgd-ce")]
    kept = ("verdict", "levels", "step", "file", "offset", "bytes")
    for at in np.flatnonzero(honest.found.robust):
        rows[at] |= {key: fallen[key] for key in kept} | {"step": 0.0}
    rows_changed(folder, rows)


def cut(folder: Path, honest: Honest) -> None:
    file = folder / "differences-0.bin"
    file.write_bytes(file.read_bytes()[:-20])
    resigned(folder)


def byte(folder: Path, honest: Honest) -> None:
    file = folder / "differences-0.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def gone(folder: Path, honest: Honest) -> None:
    (folder / "images.jsonl").unlink()


def listed(name: str) -> Edit:
    """One that brings a file which a program may take for its own."""

    def edit(folder: Path, honest: Honest) -> None:
        (folder / name).write_text("print('Confirmed')\n")
        sums = folder / claims.SUMS
        sums.write_text(sums.read_text() + f"{claims.file_sha256(folder / name)}  {name}\n")

    return edit


def said_twice(folder: Path, honest: Honest) -> None:
    path = folder / claims.ABOUT
    path.write_text(path.read_text().replace('"robust":', '"robust": 0.0,\n  "robust":', 1))
    resigned(folder)


def text(content: str) -> Edit:
    def edit(folder: Path, honest: Honest) -> None:
        (folder / claims.ROWS).write_text(content)
        resigned(folder)

    return edit


def without(*names: str) -> Edit:
    """One that leaves keys of the record away."""

    def edit(folder: Path, honest: Honest) -> None:
        told = json.loads((folder / claims.ABOUT).read_text())
        for name in names:
            del told["record"][name]
        (folder / claims.ABOUT).write_text(json.dumps(told))
        resigned(folder)

    return edit


BALL = {"norm": bundles.NORM, "epsilon": bundles.EPSILON}


def attacks(*balls: dict[str, Any]) -> Edit:
    """One that names other balls for its attacks."""
    names = ("apgd-ce", "square")
    own = [{"name": n} | BALL | b for n, b in zip(names, balls * 2, strict=False)]
    return record(attacks=own)


# Forgers count images, or leave them out.
IMAGES = [
    Forgery("a negative id", counted_twice, "has image -3., but images are numbered from 0"),
    Forgery("an image twice", again, r"has image \d+ twice"),
    Forgery("those that survive left out", left_out, r"lacks \d+ of the 40 images of its record"),
    Forgery("a choice of images", chosen, "covers images '0, .*, which are not the first"),
    Forgery("numbered anew", numbered_anew, r"not confirmed: not the image that was evaluated"),
    Forgery("a float for an id", row("", image=3.0), "has the invalid image 3.0 in line"),
    Forgery("true for an id", row("", image=True), "has the invalid image True in line"),
    Forgery("a text for an id", row("", image="3"), "has the invalid image '3' in line"),
    Forgery("an id beyond", row("", image=77), "has image 77, but its record covers 40 images, 0"),
    Forgery("more ids in the record", record(image_ids="0..49"), "lacks 10 of the 50 images"),
    Forgery(
        "an endless record", record(image_ids="0.." + "9" * 40), "not the first images of a split"
    ),
    Forgery("no lines", no_lines, "it has no images"),
    Forgery("a split smaller than its images", about(split_images=30), "of a split with 30"),
    Forgery("a split of no size", about(split_images=None), "of a split with None"),
]
# They change numbers.
NUMBERS = [
    Forgery("robust", record(robust=0.123), r"has \d+ robust images of 40, .* says 12.30%"),
    Forgery("robust, by one image", record(robust=0.3), r"has \d+ robust images of 40, .* 30.00%"),
    Forgery("robust as nothing", record(robust=None), r"robust images of 40, .* says None"),
    Forgery("robust as NaN", record(robust=float("nan")), "robust images of 40, .* says nan"),
    Forgery("clean", record(clean=0.95), "has 32 correctly classified images of 40, .* 95.00%"),
    Forgery("interval", keys("interval", robust=[0, 0.1]), r"gives \[0, 0.1\] as the 95% interval"),
    Forgery("what an attack left", keys("accuracy_after", **{"apgd-ce": 0.2}), "0.2 after apgd-ce"),
    Forgery("another attack", keys("accuracy_after", fab=0.1), ", not apgd-ce"),
    Forgery(
        "costs",
        record(costs=[{"attack": "apgd-ce", "fooled": 39}, {"attack": "square", "fooled": 1}]),
        r"says that apgd-ce fooled 39 images, but has \d+",
    ),
    Forgery("a lost model", without("model"), "it lacks 'model'"),
    Forgery("a number twice", said_twice, "is not JSON .a name appears twice"),
]
# They change what is said of an image.
VERDICTS = [
    Forgery("fooled by nothing", row("", verdict="apgd-ce"), "has the invalid file None in line"),
    Forgery(
        "fooled by no attack", row("apgd-ce", verdict="magic"), "verdict 'magic' .* no such attack"
    ),
    Forgery(
        "misclassified as it is", row("", verdict="clean"), "1 image not confirmed: classified "
    ),
    Forgery("a difference of nothing", standing_as_fooled, "not confirmed: classified correctly"),
    Forgery("another label", other_label("clean"), "a label that differs from the data set's"),
    Forgery("another label of one that stands", other_label(""), "a label that differs from"),
    Forgery("a label of no class", row("clean", label=99), "label 99 .*, which is not a class"),
    Forgery("hashes swapped", swapped("sha256"), "2 images not confirmed: not the image that"),
    Forgery("a hash of nothing", row("clean", sha256=""), "has the invalid sha256 '' for"),
    Forgery("lines that are none", text("[1]\n"), "has .1. in line 1, which"),
    Forgery("lines of no JSON", text("{image: 1}\n"), "images.jsonl is not JSON"),
]
# They change the ball, or the points.
POINTS = [
    Forgery("a smaller radius", attacks({"epsilon": 4 / 255}), "image outside the ball"),
    Forgery("an infinite radius", attacks({"epsilon": float("inf")}), "has the invalid radius inf"),
    Forgery("a radius of NaN", attacks({"epsilon": float("nan")}), "has the invalid radius nan"),
    Forgery("a negative radius", attacks({"epsilon": -1}), "has the invalid radius -1"),
    Forgery("a norm of nothing", attacks({"norm": "l3"}), "norm 'l3', which is not one of linf"),
    Forgery("a part of a pixel", attacks({"norm": "l0"}), "has the invalid radius 0.03"),
    Forgery("more pixels", attacks({"norm": "l0", "epsilon": 4}), "image outside the ball"),
    Forgery("another norm", attacks({"norm": "l2"}), "image outside the ball"),
    Forgery("two radii", attacks({}, {"epsilon": 0.5}), "attacks with several norms or radii"),
    Forgery("a longer step", row("apgd-ce", step=0.1), "image outside the ball"),
    Forgery("a step of NaN", row("apgd-ce", step=float("nan")), "has the invalid step nan in line"),
    Forgery("a pixel of NaN", stored(exact(np.nan), levels=0, step=0.0), "image outside .0, 1."),
    Forgery("a pixel above 1", stored(exact(1.1), levels=0, step=0.0), "image outside .0, 1."),
    Forgery("another image", swapped_exact, "image outside the ball|outside .0, 1."),
    Forgery("another shape", about(image=[4, 4, 12]), "shape .4, 4, 12., but its record says 8"),
    Forgery("a shape of nothing", about(image=[8, 8, -3]), "invalid image shape"),
    Forgery(
        "too many levels", row("apgd-ce", levels=300), "has invalid levels for image .*: 300 of"
    ),
]
# They change files.
FILES = [
    Forgery("a file elsewhere", row("apgd-ce", file="../x.bin"), "in '../x.bin', a file that SHA"),
    Forgery("beyond the end", row("apgd-ce", offset=10**6), "at bytes 1000000 to .*, which has"),
    Forgery("before the start", row("apgd-ce", offset=-1), "at bytes -1 to"),
    Forgery("a file that is cut off", cut, "at bytes .* of differences-0.bin, which has"),
    Forgery("a byte", byte, "differences-0.bin differs from the file in the original bundle"),
    Forgery("a file that is gone", gone, "images.jsonl is missing; download the bundle again"),
    Forgery("pickled arrays", stored(pickled), r"image \d+: a difference cannot be decompressed"),
    Forgery(
        "too few pixels", stored(lambda *_: steps(1, 100)), "difference of 100 bytes does not fit"
    ),
    Forgery("steps as bits", stored(lambda *_: steps(1), levels=0), "of 192 bytes does not fit a"),
    Forgery(
        "a bomb",
        stored(lambda *_: steps(0, 10**7)),
        "difference of more than 192 bytes does not fit",
    ),
    Forgery(
        "something behind it", stored(lambda *_: steps(1) + b"more"), "of 192 bytes does not fit"
    ),
    Forgery(
        "a numpy of its own", listed("numpy.py"), "lists numpy.py, which is not part of a bundle"
    ),
    Forgery("a schema of nothing", about(schema=None), "has no schema; download the bundle again"),
    Forgery("a schema of the future", about(schema=9), "schema 9, but this program only reads"),
]
ALL = [*IMAGES, *NUMBERS, *VERDICTS, *POINTS, *FILES]


def erased(*verdicts: str) -> Edit:
    """One whose images with these verdicts stand."""

    def edit(folder: Path, honest: Any) -> None:
        rows = rows_of(folder)
        for own in rows:
            if own["verdict"] in verdicts:
                own["verdict"] = ""
        rows_changed(folder, rows)

    return edit


def misclassified_as_fooled(folder: Path, honest: Any) -> None:
    """All that are misclassified as they are count as right, with the image itself for a point."""
    rows = rows_of(folder)
    stored = next(own for own in rows if own.get("file"))
    for own in rows:
        if own["verdict"] == "clean":
            own |= stored | {key: own[key] for key in ("image", "label", "sha256")} | {"step": 0.0}
    rows_changed(folder, rows)


def ball(larger: float = 1, **changes: Any) -> Edit:
    """One that claims another ball for all its attacks."""

    def edit(folder: Path, honest: Any) -> None:
        own = json.loads((folder / claims.ABOUT).read_text())["record"]["attacks"]
        own = [one | {"epsilon": one["epsilon"] * larger} | changes for one in own]
        changed(folder, record={"attacks": own})

    return edit


def points_of_nothing(folder: Path, honest: Any) -> None:
    """The clean images for the adversarial ones."""
    rows = rows_of(folder)
    rows_changed(folder, [own | ({"step": 0.0} if own.get("file") else {}) for own in rows])


def other_hash(folder: Path, honest: Any) -> None:
    """Another image in the place of each that stands."""
    rows = rows_of(folder)
    for own in rows:
        own["sha256"] = own["sha256"] if own["verdict"] else "0f" * 32
    rows_changed(folder, rows)


def without_the_hard(renumbered: bool) -> Edit:
    """One that keeps the images that survive alone."""

    def edit(folder: Path, honest: Any) -> None:
        rows = [own for own in rows_of(folder) if not own["verdict"]]
        if renumbered:
            rows = [own | {"image": at} for at, own in enumerate(rows)]
        rows_changed(folder, rows, image_ids=f"0..{len(rows) - 1}")

    return edit


def easy_twice(folder: Path, honest: Any) -> None:
    """Images that stand in the place of those that fell."""
    rows = rows_of(folder)
    easy = next(own for own in rows if not own["verdict"])
    rows_changed(folder, [easy if own["verdict"] else own for own in rows])


def labels_as_answered(folder: Path, honest: Any) -> None:
    """What is misclassified gets another label, and stands."""
    rows = rows_of(folder)
    for own in rows:
        if own["verdict"] == "clean":
            own |= {"label": (own["label"] + 1) % 10, "verdict": ""}
    rows_changed(folder, rows)


# They make their own network look better, with numbers that follow from their rows. Each says what
# forward passes find; "" where only an attack on standing images does.
WRONG = "claimed correct without an attack, but misclassified here"
REACH = "the points do not use the claimed radius"
BETTER = [
    Forgery("all verdicts erased", erased("clean", "apgd-ce", "apgd-t", "square"), WRONG),
    Forgery("clean errors erased", erased("clean"), WRONG),
    Forgery("clean errors as fooled", misclassified_as_fooled, WRONG),
    Forgery("labels as answered", labels_as_answered, "a label that differs from the data set's"),
    Forgery("other images that survive", other_hash, "not the image that was evaluated"),
    Forgery("hard images left out", without_the_hard(False), r"has image \d+, but its record"),
    Forgery("hard images renumbered", without_the_hard(True), "not the image that was evaluated"),
    Forgery("easy images twice", easy_twice, r"has image \d+ twice"),
    Forgery("twice the radius", ball(2), REACH),
    Forgery("clean images as points", points_of_nothing, "classified correctly here"),
    Forgery("fooled ones erased", erased("apgd-ce", "apgd-t", "square"), ""),
]
