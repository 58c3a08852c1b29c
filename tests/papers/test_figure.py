"""Figures of records: what is drawn and tabled, and which records do not belong together."""

import contextlib
import importlib.util
import io
import itertools
import json
import re
import string
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import comparisons, records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers.commands import figure as command
from jaxrobust.papers.figures import contents, drawing, figure, latex
from jaxrobust.results.plotting import SUFFIXES
from tests.support import command_calls
from tests.support.compared import N, attacks, found, write
from tests.support.paths import ROOT

PLOT = importlib.util.find_spec("matplotlib") is not None
KEPT = ROOT / "tools" / "records"
RADII = [0.0, 2 / 255, 8 / 255]


class Folders(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def write(self, name: str, seed: int, *args, share: float = 0.5, **changes) -> Path:
        seen = found(seed, share=share)
        left = seen.clean & (seen.fooled_by != "apgd-ce")
        after = {"apgd-ce": float(left.mean()), "apgd-t": float(seen.robust.mean())}
        known = {"image_ids": f"0..{N - 1}", "accuracy_after": after}
        return write(self.folder / name, seen, *args, **(known | changes))

    def ladder(self, name: str, seed: int, radii=RADII, number: str = "r", **changes) -> Path:
        for at, radius in enumerate(radii):
            own = {"attacks": attacks(epsilon=radius), "method": "autoattack standard, ladder"}
            if not radius:
                own = {"attacks": [], "robust": None, "method": "clean", "accuracy_after": {}}
            shared = {"radii": RADII, "robust_beyond": 5, "of_these_attacked_by": ["apgd-ce"]}
            own |= {"ladder": shared, "weights_sha256": str(seed) * 64}
            self.write(name, seed, f"{number}{at}", share=0.7 - 10 * radius, **(own | changes))
        return self.folder / name

    def resolutions(self, name: str, seed: int, balls, number: str = "s", **changes) -> Path:
        """Write evaluations of a network at image sizes: (size, norm, radius, share robust)."""
        for at, (size, norm, radius, share) in enumerate(balls):
            own = {
                "attacks": attacks(norm=norm, epsilon=radius),
                "model": {"name": "vit_s", "image_size": size, "num_classes": 10},
                "preprocessing": f"bicubic-{size}",
                "weights_sha256": str(seed) * 64,
            }
            self.write(name, seed, f"{number}{at}", share=share, **(own | changes))
        return self.folder / name

    def certified(self, name, sigma, accuracy, **changes):
        facts = {"sigma": sigma, "draws": 1000, "selection": 100, "alpha": 0.01}
        facts |= {
            "accuracy": accuracy,
            "abstained": 0.0,
            "average_radius": 0.1,
            "images": "s.jsonl",
        }
        own = {"attacks": [], "method": f"smoothing {sigma:g}", "certified": facts}
        own |= {"clean": None, "robust": None, "accuracy_after": {}, "weights_sha256": "1" * 64}
        own |= {"verdicts": None}
        return self.write(name, 1, f"c{100 * sigma:.0f}", **(own | changes))

    def made(self, kind: str, *places: object, suffix: str = "svg", **how):
        """Make a figure and return its numbers and its table."""
        out = self.folder / f"figure_{kind}.{suffix}"
        made = figure.make([*map(str, places)], kind, out, **({"threat": None} | how))
        return made, out.with_suffix(".tex").read_text()

    def refused(self, kind: str, *places: object, out: str = "out/figure.pdf", words=()) -> str:
        """Return the one sentence of a mistake, which leaves nothing behind."""
        given = (*places, "--kind", kind, "--out", self.folder / out, *words)
        code, said, error = command_calls.words(command.main, *given)
        self.assertEqual((code, said), (2, ""), error)
        self.assertEqual(error.count("\n"), 1, error)
        self.assertFalse((self.folder / "out").exists())
        return error


@absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
class FigureTest(Folders):
    def test_attacks_of_kept_records(self):
        """Their numbers are those of the files, whose verdicts are not at hand."""
        places = [KEPT / "cifar_study" / name for name in ("base-0", "patch-1")]
        made, table = self.made("attacks", *places)
        self.assertEqual(made["ticks"], ["clean", "APGD-CE", "APGD-T", "FAB-T", "Square"])
        for place, series in zip(places, made["series"], strict=True):
            (record,) = records.read(place / "evaluation")
            self.assertEqual(series["name"], place.name)
            values = [record.clean, *(record.accuracy_after or {}).values()]
            self.assertEqual(series["values"], values)
            ends = [checks.binomial_interval(round(1000 * value), 1000) for value in values]
            self.assertEqual([tuple(each) for each in series["ends"]], ends)
        self.assertIn(r"base-0 & 41.9 & 26.8 & 23.2 & 23.2 & 23.2 & [20.6, 25.9] \\", table)
        for said in (
            r"AutoAttack (standard version), $\ell_\infty$ radius $8/255$; $n=1{,}000$ images of "
            r"cifar10 (split test)",
            r"exact (Clopper--Pearson) 95\,\% intervals",
            r"\label{tab:figure_attacks}",
            "% base-0: " + str(places[0]),
            "evaluation 2d9d41c51586",
        ):
            self.assertIn(said, table)

    def test_a_network_is_named_after_its_folder(self):
        for folder, name in (("runs/a/evaluation", "a"), ("runs/evaluation-b", "b"), ("c", "c")):
            made, _ = self.made("attacks", self.write(folder, 1))
            self.assertEqual([one["name"] for one in made["series"]], [name])

    def test_resolutions_of_one_network(self):
        """Each radius is a curve where sizes share it; sizes that have none are gaps."""
        linf = [(192, 4, 0.3), (256, 4, 0.45), (224, 4, 0.4), (224, 8, 0.2), (256, 8, 0.25)]
        place = self.resolutions("a", 1, [(s, "linf", e / 255, share) for s, e, share in linf])
        made, table = self.made("resolution", place)
        self.assertEqual(made["ticks"], ["192", "224", "256"])
        self.assertEqual(made["places"], [192.0, 224.0, 256.0])
        names = [one["name"] for one in made["series"]]
        self.assertEqual(names, ["clean", "linf 4/255", "linf 8/255"])
        by_size = {(s, e): float(found(1, share=share).robust.mean()) for s, e, share in linf}
        four, eight = (one["values"] for one in made["series"][1:])
        self.assertEqual(four, [by_size[size, 4] for size in (192, 224, 256)])
        self.assertEqual(eight[1:], [by_size[size, 8] for size in (224, 256)])
        self.assertNotEqual(eight[0], eight[0])  # NaN
        clean = [float(found(1, share=share).clean.mean()) for share in (0.3, 0.2, 0.25)]
        self.assertEqual(made["series"][0]["values"], clean)  # the last record of a size
        self.assertIn(rf"192 & {100 * clean[0]:.1f} {{\footnotesize [", table)
        self.assertIn(r" & -- \\", table)
        self.assertIn("networks that were not retrained", table)
        how = ", ".join(f"bicubic-{size} at {size} px" for size in (192, 224, 256))
        self.assertIn(f"% Preprocessing: {how}.\n", table)
        self.assertIn("$n=600$ images of cifar10", table)

    def test_radii_that_grow_with_the_resolution(self):
        balls = [(size, "l2", size / 112, 0.3) for size in (192, 224)]
        made, table = self.made("resolution", self.resolutions("a", 1, balls))
        self.assertEqual([one["name"] for one in made["series"]], ["clean", "l2, varying radius"])
        self.assertIn(r"$\ell_2$ radii 1.714 at 192, 2 at 224", table)

    def test_a_union_names_its_threats(self):
        place = KEPT / "aligned_study" / "pvt_v2-0"
        made, table = self.made("attacks", place)
        self.assertEqual(
            made["ticks"][1:3], [r"PGD-20 $\ell_\infty$ 8/255", r"PGD-20 $\ell_2$ 1.5"]
        )
        self.assertEqual(made["ticks"][4], r"AutoAttack $\ell_\infty$ 8/255")
        self.assertIn("after each threat in turn: the worst case of PGD-20", table)
        self.assertIn(r"$\ell_2$ radius $1.5$ and $\ell_1$ radius $40$", table)
        self.assertIn(r"pvt\_v2-0 & 29.0", table)

    def test_radius(self):
        a, b = self.ladder("a", 1), self.ladder("b", 2)
        made, table = self.made("radius", a, b, names=("our_way", "50% & more"))
        self.assertEqual(made["ticks"], ["0", "2/255", "8/255"])
        np.testing.assert_allclose(made["places"], [0, 2, 8])
        for seed, series in zip((1, 2), made["series"], strict=True):
            own = [found(seed, share=0.7 - 10 * r) for r in RADII]
            robust = [seen.robust for seen in own[1:]]
            shares = [own[0].clean.mean(), *(seen.mean() for seen in robust)]
            self.assertEqual(series["values"], [*map(float, shares)])
            last = checks.binomial_interval(int(robust[-1].sum()), N)
            self.assertEqual(tuple(series["ends"][-1]), last)
        self.assertIn(r"$\ell_\infty$ radius & our\_way & 50\% \& more \\", table)
        self.assertIn(r"$0$ & 98.0 {\footnotesize [96.5, 99.0]}", table)
        self.assertIn("radii 0 to $8/255$ of pixels in $[0, 1]$; $n=600$ images", table)

    def test_ladders_of_two_norms_share_radius_0(self):
        place = self.ladder("a", 1)
        for at, radius in enumerate(RADII[1:]):
            own = {"attacks": attacks(epsilon=radius, norm="l2"), "ladder": {"radii": RADII}}
            own |= {"weights_sha256": "1" * 64}
            self.write("a", 5, f"s{at}", **own)
        self.assertIn("holds 2 ladders", self.refused("radius", place))
        linf, l2 = (self.made("radius", f"{place}#{of}")[0] for of in ("r1", "s1"))
        clean = float(found(1, share=0.7).clean.mean())
        self.assertEqual([own["series"][0]["values"][0] for own in (linf, l2)], [clean] * 2)
        self.assertEqual(l2["series"][0]["values"][-1], float(found(5).robust.mean()))
        alone, _ = self.made("radius", self.ladder("b", 1), names="a")
        self.assertEqual(linf["series"], alone["series"])

    def test_compare(self):
        shares = (0.5, 0.58, 0.51, 0.47)
        places = [
            self.write(k, at, share=s) for at, (k, s) in enumerate(zip("abcd", shares, strict=True))
        ]
        made, table = self.made("compare", *places)
        seen = {k: found(at, share=s) for at, (k, s) in enumerate(zip("abcd", shares, strict=True))}
        names = [series["name"] for series in made["series"]]
        self.assertEqual(names, sorted("abcd", key=lambda k: -seen[k].robust.sum()))
        self.assertEqual(names[0], "b")
        couples = list(itertools.combinations(names, 2))
        p = [comparisons.compare(seen[one].robust, seen[other].robust).p for one, other in couples]
        apart = {
            c for c, own in zip(couples, comparisons.holm(np.array(p)), strict=True) if own < 0.05
        }
        self.assertBetween(len(apart), 1, len(couples) - 1)
        self.assertGreater(sum(own < 0.05 for own in p), len(apart))  # the correction counts
        own = dict(zip(names, made["letters"], strict=True))
        for one, other in couples:
            self.assertEqual(bool({*own[one]} & {*own[other]}), (one, other) not in apart)
        for series in made["series"]:
            ends = checks.binomial_interval(int(seen[series["name"]].robust.sum()), N)
            self.assertEqual(tuple(series["ends"][0]), ends)
        said = r"apart at the level of 5\,\% (exact McNemar tests on the same images, Holm's"
        self.assertIn(said, table)
        self.assertIn("correction for all 6 pairs", table)

    def test_doubts_are_said(self):
        place = self.write("a", 1, flags={"gradients": "some are zero"})
        made, table = self.made("attacks", place)
        self.assertEqual(made["notes"], ["Doubt about a, gradients: some are zero."])
        self.assertIn("% Doubt about a, gradients: some are zero.", table)
        self.assertIn("note: Doubt about a", "\n".join(figure.lines(made)))

    @parameterized.parameters(*SUFFIXES)
    def test_files(self, suffix):
        """Of one column's width, letters as TrueType in a PDF, and the same bytes twice."""
        places = [self.ladder("a", 1), self.ladder("b", 2)]
        self.made("radius", *places, suffix=suffix)
        path = self.folder / f"figure_radius.{suffix}"
        first = path.read_bytes()
        self.made("radius", *places, suffix=suffix)
        self.assertEqual(path.read_bytes(), first)
        if suffix == "png":
            with Image.open(path) as image:
                self.assertEqual(image.width, round(300 * drawing.WIDTH))
            return
        text = first.decode("latin-1")
        if suffix == "svg":
            self.assertIn(f'width="{72 * drawing.WIDTH:g}pt"', text)
            return
        box = re.search(r"/MediaBox \[ 0 0 ([\d.]+) ", text)
        self.assertAlmostEqual(float(box[1]), 72 * drawing.WIDTH)
        self.assertIn("STIXGeneral", text)
        self.assertIn("/FontFile2", text)  # TrueType, embedded
        self.assertNotIn("/Type3", text)

    @parameterized.parameters(*figure.KINDS)
    def test_nothing_overlaps_or_is_cut(self, kind):
        """With names as long as they come: texts lie inside, and do not touch each other."""
        if kind == "radius":
            places = [self.ladder(f"a longer name {at}", at) for at in range(1, 8)]
        elif kind == "certified":
            known = {"0": 0.5, "0.5": 0.25}
            places = [self.certified(f"a longer name {at}", 0.25, known) for at in range(1, 8)]
        elif kind == "resolution":
            norms = [("linf", 4 / 255), ("linf", 8 / 255), ("l2", 2.0)]
            balls = [(s, *b, 0.3) for s in range(192, 385, 32) for b in norms]
            places = [self.resolutions("one", 1, balls)]
        else:
            places = [self.write(f"a longer name {at}", at) for at in range(1, 8)]
        content = figure.KINDS[kind]([*map(str, places)], (), None)
        with drawing._style():
            drawn = drawing._DRAW[kind](content)
            drawn.canvas.draw()
            (panel,) = drawn.axes
            axes = (panel.xaxis, panel.yaxis)
            ticks = [tick.label1 for axis in axes for tick in axis._update_ticks()]
            named = [text for legend in drawn.legends for text in legend.get_texts()]
            every = [*ticks, *named, *panel.texts, *(axis.label for axis in axes)]
            shown = [text for text in every if text.get_text()]
            self.assertGreater(len(shown), 10)
            styles = {bars.lines[0].get_linestyle() for bars in panel.containers}
            self.assertEqual(styles, {"None"} if kind == "attacks" else set())
            boxes = [text.get_window_extent() for text in shown]
            width, height = drawn.canvas.get_width_height()
            for text, box in zip(shown, boxes, strict=True):
                inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
                self.assertTrue(inside, text.get_text())
            for (one, a), (other, b) in itertools.combinations(zip(shown, boxes, strict=True), 2):
                apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
                self.assertTrue(apart, f"{one.get_text()} and {other.get_text()}")
                self.assertGreaterEqual(one.get_fontsize(), 8)

    @parameterized.parameters("attacks", "radius")
    def test_one_network_has_no_legend(self, kind):
        place = self.ladder("a", 1) if kind == "radius" else self.write("a", 1)
        with drawing._style():
            content = figure.KINDS[kind]([str(place)], (), None)
            self.assertEmpty(drawing._DRAW[kind](content).legends)

    def test_the_command(self):
        same = {"fingerprint": {"images": "1" * 64}}
        places = self.write("a", 1, **same), self.write("b", 2, **same)
        out = self.folder / "new" / "figure.png"
        given = (*places, "--kind=compare", f"--out={out}", "--json", "--names", "x", "y z")
        code, said, error = command_calls.words(command.main, *given)
        self.assertEqual((code, error), (0, ""))
        first, last = said.splitlines()
        self.assertStartsWith(first, f"{out} and {out.with_suffix('.tex')}: compare of ")
        self.assertEqual(json.loads(last)["figure"], str(out))
        self.assertCountEqual([own["name"] for own in json.loads(last)["series"]], ["x", "y z"])

    def test_a_users_files_are_not_overwritten(self):
        places = self.write("a", 1), self.write("b", 2)
        paper = self.folder / "paper.tex"
        paper.write_text(r"\documentclass{article}")
        said = "paper.tex exists, and paper.tex was not written by jaxrobust figure"
        self.assertIn(said, self.refused("compare", *places, out="paper.pdf"))
        self.assertEqual(paper.read_text(), r"\documentclass{article}")
        (self.folder / "photo.png").write_bytes(b"mine")
        said = "photo.png exists, and photo.tex was not written"
        self.assertIn(said, self.refused("compare", *places, out="photo.png"))
        self.assertEqual((self.folder / "photo.png").read_bytes(), b"mine")


class RefusedTest(Folders):
    def test_without_matplotlib(self):
        with mock.patch.dict(sys.modules, {"matplotlib": None}):
            self.assertIn("pip install -e '.[plot]'", self.refused("attacks", self.write("a", 1)))

    def test_a_suffix_that_is_none(self):
        for name in ("figure", "figure.jpg", "figure.PDF", "figure.tex"):
            with self.subTest(name=name):
                said = f"{name} does not end with one of .pdf, .svg, .png; name a file such as"
                self.assertIn(said, self.refused("attacks", self.write("a", 1), out=name))

    def test_a_folder_for_a_file(self):
        (self.folder / "there.pdf").mkdir()
        said = "there.pdf is a folder; name a file, such as "
        self.assertIn(said, self.refused("attacks", self.write("a", 1), out="there.pdf"))

    def test_an_unknown_kind(self):
        self.assertIn("invalid choice: 'pie'", self.refused("pie", self.write("a", 1)))

    @parameterized.product(
        case=(
            ({"dataset": "cifar100"}, 'data set is "cifar10" there, "cifar100" here'),
            ({"image_ids": "600..1199", "verdicts": None}, "images are 0..599 there, 600..1199 h"),
            ({"attacks": attacks(epsilon=4 / 255)}, 'radius is "0.0313725" there, "0.0156863" h'),
            ({"attacks": attacks(norm="l2")}, 'norm is "linf" there, "l2" here'),
            ({"preprocessing": "other"}, 'preprocessing is "none" there, "other" here'),
        ),
        kind=("attacks", "compare"),
    )
    def test_other_questions(self, case, kind):
        changes, said = case
        if kind == "compare" and "verdicts" in changes:
            return  # which compares common images
        a, b = self.write("a", 1), self.write("b", 2, **changes)
        error = self.refused(kind, a, b)
        self.assertRegex(error, rf"th(es)?e.* with {re.escape(str(a))} \(there\): {b} \(here\): ")
        self.assertIn(said, error)
        self.assertIn("; evaluate all of them on the same images, with the same", error)

    def test_what_the_records_cannot_give(self):
        a, b = self.write("a", 1), self.write("b", 2, accuracy_after=None)
        said = f"{a} has no ladder of radii, so there is nothing to draw for --kind radius; eval"
        self.assertIn(said, self.refused("radius", a))
        said = f"{b} has no evaluation with several attacks, so there is nothing to draw for --kind"
        self.assertIn(said, self.refused("attacks", a, b))
        said = "has no per-image verdicts, because it comes from a training run or an older version"
        old = KEPT / "cifar_study"
        self.assertIn(said, self.refused("compare", old / "base-0", old / "base-1"))
        self.assertIn("one evaluation has nothing to compare", self.refused("compare", a))
        clean = {"attacks": [], "robust": None, "method": "clean", "accuracy_after": {}}
        places = [self.folder / name for name in "cd"]
        for at, place in enumerate(places):
            seen = found(at)._replace(fooled_by=np.where(found(at).clean, "", "clean"))
            write(place, seen, image_ids="0..599", **clean)
        self.assertIn("without an attack", self.refused("compare", *places))

    def test_evaluations_at_one_resolution(self):
        place = self.resolutions("a", 1, [(224, "linf", 4 / 255, 0.3), (224, "linf", 0.1, 0.2)])
        error = self.refused("resolution", place)
        self.assertIn(f"{place} has no evaluations of the same attack at several image", error)
        self.assertIn("evaluate with --image_size=192 --image_size=224", error)

    def test_two_attacks_at_several_resolutions(self):
        sizes = [(192, "linf", 4 / 255, 0.3), (224, "linf", 4 / 255, 0.4)]
        place = self.resolutions("a", 1, sizes)
        self.resolutions("a", 1, sizes, "q", method="apgd-t")
        error = self.refused("resolution", place)
        self.assertIn(f"{place} holds 2 attacks at several image sizes; name one", error)
        self.assertIn(f"{place}#q0", error)
        made, _ = self.made("resolution", f"{place}#q0")
        self.assertEqual(len(made["series"]), 2)

    def test_resolutions_of_other_images_or_attacks(self):
        sizes = [(192, "linf", 4 / 255, 0.3), (224, "linf", 4 / 255, 0.4)]
        a = self.resolutions("a", 1, sizes)
        other = self.resolutions("b", 2, sizes, dataset="cifar100")
        self.assertIn('data set is "cifar10" there, "cifar1', self.refused("resolution", a, other))
        other = self.resolutions("d", 2, sizes, preprocessing="bilinear-256")
        said = "at 192 px, these evaluations differ in preprocessing: bicubic-192, bilinear-256; "
        self.assertIn(said, self.refused("resolution", a, other))
        l2 = [(192, "l2", 0.5, 0.3), (224, "l2", 0.5, 0.4)]
        other = self.resolutions("c", 2, l2, dataset="cifar100")
        said = f"{other} and {a} were evaluated on different images"
        self.assertIn(said, self.refused("resolution", a, other))

    def test_a_ladder_that_is_not_finished(self):
        place = self.ladder("a", 1, RADII[:1] + RADII[2:])
        self.assertIn("lacks 0.007843 of its radii; repeat", self.refused("radius", place))
        zero = self.ladder("b", 1, RADII[:1], ladder={"radii": [0.0]})
        self.assertIn("only has radius 0", self.refused("radius", zero))

    def test_two_ladders_in_a_folder(self):
        place = self.ladder("a", 1)
        self.ladder("a", 2, number="q")
        error = self.refused("radius", place)
        self.assertIn(f"{place} holds 2 ladders; name one radius of one: {place}#r1", error)
        self.assertIn(f"{place}#q1", error)

    def test_a_folder_without_records(self):
        (self.folder / "empty").mkdir()
        for kind in figure.KINDS:
            error = self.refused(kind, self.folder / "empty", self.write(kind, 1))
            self.assertIn("has no records; name a run", error)
            error = self.refused(kind, "nowhere", self.folder / kind)
            self.assertIn("nowhere has no records", error)

    def test_which_evaluation_is_meant(self):
        place = self.write("a", 1, "a1")
        self.write("a", 2, "a2", attacks=attacks(epsilon=4 / 255))
        error = self.refused("attacks", place)
        self.assertIn(f"{place} holds 2 such evaluations; name one of them: {place}#a1", error)
        self.assertIn("or give --threat NORM:RADIUS", error)
        for kind in ("attacks", "radius"):
            said = "has no evaluation x; name one of them"
            self.assertIn(said, self.refused(kind, f"{place}#x"))
        said = f"{place}#a1 is the same evaluation as {place}#a; name each once"
        self.assertIn(said.replace("#a;", "#a1;"), self.refused("attacks", *[f"{place}#a1"] * 2))
        words = ("--threat=linf:2/255",)
        self.assertIn("under linf:2/255", self.refused("attacks", place, words=words))
        ladder = self.ladder("b", 1)
        self.assertIn("leave --threat out", self.refused("radius", ladder, words=words))

    def test_names(self):
        a, b = self.write("a", 1), self.write("b", 2)
        error = self.refused("attacks", a, b, words=("--names", "x"))
        self.assertIn("--names has 1 names, but the figure shows 2 networks; give one", error)
        error = self.refused("attacks", a, b, words=("--names", "x", "x"))
        self.assertIn("--names repeats a name", error)

    def test_too_many(self):
        places = [self.write(f"n{at}", at) for at in range(8)]
        self.assertIn("shows at most 7 networks, so that colors", self.refused("attacks", *places))
        self.assertIn("at most 30 networks", self.refused("compare", *places, *places * 3))

    def test_a_number_of_images_that_is_not_known(self):
        for ids in (None, "some", "0..a"):
            place = self.write(f"of {ids}", 1, image_ids=ids)
            self.assertIn(f"images {ids}, whose number is unk", self.refused("attacks", place))


@absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
class CertifiedTest(Folders):
    """Curves of noise 0.25 and 0.5, whose radii differ, next to a ladder in L2."""

    def both(self, name="a"):
        self.certified(name, 0.5, {"0": 0.6, "0.2": 0.5, "0.4": 0.3, "0.6": 0.1})
        self.certified(name, 0.25, {"0": 0.8, "0.1": 0.7, "0.2": 0.4})
        return self.folder / name

    def test_a_curve_of_each_noise(self):
        made, table = self.made("certified", self.both())
        self.assertEqual([one["name"] for one in made["series"]], ["noise 0.25", "noise 0.5"])
        self.assertEqual(made["places"], [0, 0.1, 0.2, 0.4, 0.6])
        small, large = (one["values"] for one in made["series"])
        self.assertEqual(small, [0.8, 0.7, 0.4, 0, 0])  # beyond its last radius nothing
        self.assertEqual(large, [0.6, 0.5, 0.5, 0.3, 0.1])  # between, what the next one certifies
        ends = [checks.binomial_interval(round(N * value), N) for value in large]
        self.assertEqual([tuple(each) for each in made["series"][1]["ends"]], ends)
        self.assertIn("1{,}000 draws", table)
        self.assertIn("fails with probability 0.01", table)
        self.assertIn(r"$0.4$ & 0.0 & 30.0 \\", table)
        self.assertNotIn("no noise", table)

    def test_refuses(self):
        self.assertIn("has no certificates to draw", self.refused("certified", self.write("b", 1)))
        words = ("--threat", "l2:0.5")
        said = self.refused("certified", self.both(), words=words)
        self.assertIn("certificates cover every l2 radius; leave --threat out", said)
        other = self.certified("c", 0.25, {"0": 0.5}, dataset="others")
        said = self.refused("certified", self.folder / "a", other)
        self.assertIn("cannot share a figure", said)


class LettersTest(absltest.TestCase):
    def test_they_say_what_the_tests_say(self):
        """Of 300 random lists of pairs: a letter is shared exactly where nothing is told apart."""
        draws = np.random.default_rng(0)
        for _ in range(300):
            count = int(draws.integers(1, 8))
            all_pairs = list(itertools.combinations(range(count), 2))
            apart = {pair for pair in all_pairs if draws.random() < 0.5}
            own = contents.letters_of(count, sorted(apart))
            self.assertTrue(all(own))
            for one, other in all_pairs:
                shared = {*own[one]} & {*own[other]}
                self.assertEqual(not shared, (one, other) in apart)
            columns = {c: {at for at, o in enumerate(own) if c in o} for c in {*"".join(own)}}
            for one, other in itertools.permutations(columns.values(), 2):
                self.assertFalse(one <= other, "a letter that says nothing")

    def test_a_chain(self):
        self.assertEqual(contents.letters_of(3, [(0, 2)]), ["a", "ab", "b"])
        self.assertEqual(contents.letters_of(2, []), ["a", "a"])

    def test_names_of_letters(self):
        apart = [*itertools.combinations(range(52), 2)]
        self.assertEqual("".join(contents.letters_of(52, apart)), string.ascii_letters)
        with self.assertRaisesRegex(ValueError, "more than 52 letters; show fewer in one figure"):
            contents.letters_of(53, itertools.combinations(range(53), 2))


class LatexTest(parameterized.TestCase):
    def test_special_characters(self):
        given = 'a_b 50% {x} $y$ c&d #1 ~ ^ \\ <>|"'
        expected = (
            r"a\_b 50\% \{x\} \$y\$ c\&d \#1 \textasciitilde{} \textasciicircum{} "
            r"\textbackslash{} \textless{}\textgreater{}\textbar{}''"
        )
        self.assertEqual(latex.escaped(given), expected)
        self.assertEqual(latex.escaped("two\nlines"), "two lines")

    def test_names_of_attacks(self):
        for name, written in (
            ("apgd-ce", "APGD-CE"),
            ("square", "Square"),
            ("replay", "replayed points"),
            ("apgd-ce (full)", "APGD-CE (full)"),
            ("l2 0.5", r"$\ell_2$ 0.5"),
            ("linf 0.03137", r"$\ell_\infty$ 8/255"),
            ("linf 0.03137 pgd-20", r"PGD-20 $\ell_\infty$ 8/255"),
            ("l1 40 pgd-20", r"PGD-20 $\ell_1$ 40"),
            ("by_hand", "BY_HAND"),
        ):
            with self.subTest(row=(name, written)):
                self.assertEqual(latex.attack_name(name), written)
                self.assertEqual(latex.escaped_name(name), written.replace("BY_H", r"BY\_H"))

    def test_words_of_a_method(self):
        for method, words in (
            ("autoattack standard", "AutoAttack (standard version)"),
            ("autoattack plus, ladder", "AutoAttack (plus version)"),
            ("autoattack rand, most of 5 draws", "AutoAttack (rand version, most of 5 draws)"),
            ("apgd-ce + my_way", r"APGD-CE and MY\_WAY"),
            ("apgd-ce + apgd-t, custom, steps 40, ladder", "APGD-CE and APGD-T (custom, steps 40)"),
        ):
            with self.subTest(row=(method, words)):
                self.assertEqual(latex.attack_words(AccuracyRecord(method=method)), words)

    def test_braces_are_even_and_rows_have_all_cells(self):
        rows = [["a", "b"], ["1", "2"], ["3", "4"]]
        text = latex.table("my figure_1", "A caption.", rows, ["two\nlines"])
        self.assertEqual(text.count("{"), text.count("}"))
        self.assertEqual([line.count("&") for line in text.splitlines() if "&" in line], [1] * 3)
        self.assertIn(r"\label{tab:my-figure_1}", text)
        self.assertIn("% two lines\n", text)
        self.assertEqual(len(re.findall(r"\\(top|mid|bottom)rule", text)), 3)
        for name in ("table", "tabular"):
            self.assertEqual(text.count(f"{{{name}}}"), 2)


class HelpTest(absltest.TestCase):
    def test_the_kinds_of_the_help_are_those_that_exist(self):
        self.assertEqual([*command.KINDS], [*figure.KINDS])
        self.assertEqual([*figure.KINDS], [*drawing._DRAW])
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            command.main(["--help"])
        self.assertIn(
            "attacks, radius, compare, certified or resolution", " ".join(out.getvalue().split())
        )
