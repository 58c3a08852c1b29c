"""The pictures of the papers' tables: which networks stand where, in which color and words."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.papers.tables import matching
from jaxrobust.papers.tables.pictures import resolutions, scatter
from jaxrobust.papers.tables.pictures.scatter import Point
from jaxrobust.papers.tables.tables import Table
from jaxrobust.papers.tables.tables_markdown import Cell, Filled
from jaxrobust.results import run_records

LINF = {"attack": "autoattack", "norm": "linf", "epsilon": "4/255"}
RESULTS = {"clean": {"attack": "clean"}, "aa": LINF}


def row(name: str, robust: float | None = 50.0, **more) -> dict:
    known = {"name": name, "origin": "authors", "dataset": "imagenet"}
    known |= {"params_m": 20.0, "clean": 70.0, "aa": robust}
    return known | more


def filled(rows: list[dict], cells: dict | None = None, results: dict | None = None) -> Filled:
    about = {"caption": "A caption", "kind": "accuracy", "decimals": 2, "notes": []}
    table = Table("revisiting_at", "table_2", results=results or RESULTS, rows=rows, **about)
    return Filled(table, cells or {})


def ours(robust: float, name: str = "net") -> run_records.RunRecord:
    """A record of AutoAttack in linf; the name tells it."""
    about = {"clean": 0.8, "robust": robust, "dataset": "imagenet", "image_ids": "0..9"}
    return run_records.RunRecord(SimpleNamespace(**about, name=name), Path("r"), None)


class PointsTest(parameterized.TestCase):
    def test_the_ordinate(self):
        for attacks, place in (
            (("clean", "apgd-ce", "autoattack"), 2),
            (("pgd-20", "apgd-ce"), 1),
            (("pgd-20", "cw-40"), 0),
            (("autoattack", "autoattack"), 0),  # the first of equals
            (("clean", "union", "corruptions"), None),
        ):
            with self.subTest(row=(attacks, place)):
                results = {f"key {i}": {"attack": attack} for i, attack in enumerate(attacks)}
                results["size"] = {"unit": "M"}  # no accuracy
                found = scatter.robust_key(filled([row("a")], results=results))
                self.assertEqual(found, None if place is None else f"key {place}")

    def test_no_ordinate_no_points(self):
        table = filled([row("a")], results={"clean": {"attack": "clean"}})
        self.assertEqual(scatter.points(table, []), [])

    def test_each_network_has_its_number_and_ours_the_same(self):
        rows = [row("a", epochs=5), row("b", None), row("a", 51.0, epochs=7, attack_steps=2)]
        rows += [row("c", origin="others", params_m=None)]
        cells = {(0, "aa"): Cell(48.0, 1), (0, "clean"): Cell(69.0, 1)}
        cells |= {(2, "aa"): Cell(47.0, 0, alike=True), (3, "aa"): Cell(46.0, 2)}
        with mock.patch.object(scatter, "_beside", return_value=["beside"]) as beside:
            found = scatter.points(filled(rows, cells), [])
        self.assertEqual(
            found,
            [
                Point("1", "a, 5 epochs", {"params_m": 20, "clean": 70, "robust": 50}, "authors"),
                Point("1", "", {"params_m": 20, "clean": 69, "robust": 48}, "ours"),
                Point(
                    *("2", "a, 7 epochs, 2 steps"),
                    *({"params_m": 20, "clean": 70, "robust": 51}, "authors"),
                ),
                Point("3", "c [others]", {"clean": 70, "robust": 50}, "others"),
                Point("3", "", {"clean": 70, "robust": 46}, "ours"),
                "beside",
            ],
        )
        self.assertEqual(beside.call_args.args, (LINF, [], {1, 2}))  # what is alike is next to

    def test_other_records_of_the_attack_stand_beside(self):
        records = [ours(0.1 * i, f"net {i}") for i in range(30)]
        none = lambda what, record: ["another norm"] if record.name == "net 3" else []  # noqa: E731
        with (
            mock.patch.object(matching, "other_attack", none),
            mock.patch.object(matching, "label", lambda ours: ours.record.name),
            mock.patch.object(matching, "sizes", lambda ours: {"params_m": 5.0}),
        ):
            found = scatter._beside(LINF, records, {0, 7})
        self.assertLen(found, 27)
        self.assertEqual([p.label for p in found][24:], ["y", "z", "a"])
        names = [p.name.partition(",")[0] for p in found]
        self.assertEqual(names[:6], [f"net {i}" for i in (1, 2, 4, 5, 6, 8)])
        self.assertEqual(found[0].name, "net 1, imagenet, images 0..9")
        expected = {"clean": 80.0, "robust": 10.0, "params_m": 5.0}
        self.assertEqual((found[0].values, found[0].kind), (expected, "beside"))


class DrawnTest(parameterized.TestCase):
    def test_a_picture_for_each_data_set(self):
        rows = [row("a"), row("b", dataset="cifar"), row("c"), row("d", dataset="cifar")]
        cells = {(1, "aa"): Cell(1.0, 0), (2, "aa"): Cell(2.0, 1), (3, "clean"): Cell(3.0, 2)}
        with mock.patch.object(scatter, "_drawn", side_effect=[True, False]) as drawn:
            made = scatter.draw(filled(rows, cells), ["r"], Path("out"))
        self.assertEqual(made, [Path("out/revisiting_at-table_2-imagenet.png")])
        first, second = (call.args for call in drawn.call_args_list)
        self.assertEqual([r["name"] for r in first[0].table.rows], ["a", "c"])
        self.assertEqual(first[0].cells, {(1, "aa"): Cell(2.0, 1)})
        self.assertEqual(second[0].cells, {(0, "aa"): Cell(1.0, 0), (1, "clean"): Cell(3.0, 2)})
        self.assertEqual(first[1:], (["r"], made[0], "imagenet"))
        with mock.patch.object(scatter, "_drawn", return_value=True):
            (path,) = scatter.draw(filled([row("a")]), [], Path("out"))
        self.assertEqual(path, Path("out/revisiting_at-table_2.png"))

    def test_a_label_is_beside_its_point_and_off_the_others(self):
        shown = [Point(str(i), "", {"clean": float(i), "robust": 0.0}, "ours") for i in range(2)]
        shown.append(Point("x", "", {"params_m": 1.0, "robust": 0.0}, "authors"))
        panel = mock.MagicMock()
        panel.transData.transform = lambda place: (14 * place[0], place[1])
        scatter._label(panel, "clean", shown)
        calls = panel.annotate.call_args_list
        self.assertEqual([call.args for call in calls], [("0", (0.0, 0.0)), ("1", (1.0, 0.0))])
        labels = [np.add((14 * i, 0), call.kwargs["xytext"]) for i, call in enumerate(calls)]
        points = [(0, 0), (14, 0)]
        self.assertGreater(np.abs(labels[0] - labels[1]).max(), 10)
        for label in labels:
            self.assertGreater(min(np.abs(np.subtract(label, p)).max() for p in points), 10)

    def test_the_nearest_free_place_and_above_first(self):
        self.assertEqual(scatter._free((0, 0), [(0, 0)]), (0, 12))
        dx, dy = scatter._free((0, 0), [(0, 0), (0, 12)])
        self.assertEqual((round(dx, 6), dy), (15.6, 0))  # to the right, as labels are wide


class ResolutionsTest(parameterized.TestCase):
    def table(self, cells=None, more=()):
        rows = [row("a", 40.0 + i, image_size=size) for i, size in enumerate((288, 160, 224))]
        rows += [row("b", image_size=224), row("c"), *more]
        return filled(rows, cells)

    def test_three_resolutions_make_a_curve(self):
        cells = {(0, "aa"): Cell(39.0, 0), (2, "aa"): Cell(38.0, 1, alike=True)}
        clean, robust = resolutions.curves(self.table(cells))
        self.assertEqual((clean.network, clean.result, robust.result), ("a", "clean", "linf 4/255"))
        self.assertEqual(robust.printed, {288: 40.0, 160: 41.0, 224: 42.0})
        self.assertEqual((robust.ours, clean.ours), ({288: 39.0}, {}))

    def test_runs_are_told_apart(self):
        more = [row("a", 30.0, image_size=size, run="second") for size in (160, 224)]
        self.assertLen(resolutions.curves(self.table(more=more)), 2)
        more.append(row("a", 30.0, image_size=288, run="second"))
        found = resolutions.curves(self.table(more=more))
        self.assertEqual([len(curve.printed) for curve in found], [3] * 4)
