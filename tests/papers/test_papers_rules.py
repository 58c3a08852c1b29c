"""The papers' tables next to our records, rule by rule: made-up tables and records."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.config import base, plain
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers.tables import documents, matching, tables, tables_markdown
from jaxrobust.papers.tables.tables import Table
from jaxrobust.papers.tables.tables_markdown import Cell, Filled
from jaxrobust.results import run_records
from jaxrobust.results.run_records import RunRecord

LINF = {"norm": "linf", "epsilon": 4 / 255}
STANDARD = [
    {"name": name, "steps": steps, "restarts": 1, "targets": targets, **LINF}
    for name, steps, targets in (
        ("apgd-ce", 100, 0), ("apgd-t", 100, 9), ("fab-t", 100, 9), ("square", 5000, 0)
    )
]  # fmt: skip
AA = {"attack": "autoattack", "norm": "linf", "epsilon": "4/255"}
APGD = {"attack": "apgd-ce", "norm": "linf", "epsilon": "4/255", "steps": 20, "restarts": 2}
RESULTS = {"clean": {"attack": "clean"}, "aa": AA, "params_m": {"unit": "M"}}


def row(name="net", **more) -> dict:
    known = {"name": name, "model": name, "origin": "authors", "dataset": "cifar10"}
    known |= {"split": "test", "images": 10, "image_size": 32, "clean": 70.0, "aa": 50.0}
    return known | more


def table(rows, results=None, **more) -> Table:
    known = {"paper": "revisiting_at", "id": "table_2", "caption": "About", "kind": "accuracy"}
    known |= {"decimals": 2, "results": results or RESULTS, "notes": []}
    return Table(**(known | more), rows=rows)


def record(**more) -> AccuracyRecord:
    known = {"dataset": "cifar10", "split": "test", "image_ids": "0..9", "attacks": STANDARD}
    known |= {"clean": 0.7, "robust": 0.5, "method": "autoattack standard", "weights": "train, ema"}
    return AccuracyRecord(**(known | more))


def ours(**more) -> RunRecord:
    return RunRecord(record(**more), Path("run/results.jsonl"), None)


class TablesTest(parameterized.TestCase):
    def test_a_row_by_number_or_name(self):
        of = table([row("a"), row("b"), row("b"), row("c", origin="others"), row("7")])
        for wanted, place in (("1", 0), ("5", 4), ("a", 0), ("c [others]", 3), ("7", 4)):
            self.assertEqual(tables.row(of, wanted), place)
        for wanted, said in (
            ("b", "has 2 rows with that name; give a number instead, one of 2, 3"),
            ("0", "no such row; give a name, or a number from 1 to 5"),
            ("6", "no such row"),
            ("c", "no such row"),
        ):
            with self.assertRaisesRegex(ValueError, f"--row {wanted}: Table 2 of revis.* {said}"):
                tables.row(of, wanted)

    def test_same(self):
        for one, other, same in (
            ("4/255", 4 / 255, True), (0.5, "1/2", True), (1, 1.0, True), ("1", 1, True),
            (1.0, 1.0 + 1e-8, False), (1e-9, 2e-9, False), ("a", "a", True), ("a", "b", False),
            (None, None, False), (None, 0, False), (True, True, True), ((1,), (1,), True),
        ):  # fmt: skip
            with self.subTest(row=(one, other, same)):
                self.assertEqual(tables.same(one, other), same)
                self.assertEqual(tables.same(other, one), same)

    def test_values_as_they_are_printed(self):
        of = table([], decimals=1)
        own = row(clean=70, aa=None, params_m=28.59, uncertain=["clean"], other="text")
        values = [of.value(own, key) for key in ("clean", "aa", "params_m", "other", "none")]
        self.assertEqual(values, ["70.0?", "", "28.59", "text", ""])
        self.assertEqual([*of.attacked()], ["clean", "aa"])


class AttackTest(parameterized.TestCase):
    def test_other_attack(self):
        for what, changes, said in (
            (AA, {}, []),
            (AA, {"attacks": STANDARD[:3]}, ["a different attack than standard AutoAttack"]),
            (AA, {"fast": {"sampled": 3}},
             ["the fast version, whose verdicts are not AutoAttack's"]),
            (AA, {"attacks": []}, ["clean accuracy only"]),
            (AA, {"robust": None}, ["clean accuracy only"]),
            (AA | {"epsilon": "8/255"}, {}, ["linf 0.01569, not 8/255"]),
            (AA | {"norm": "l2"}, {}, ["linf, not l2"]),
            (AA | {"epsilon": 4 / 255}, {}, []),
            (APGD, {}, ["a different attack than APGD-CE, 20 steps, 2 restarts"]),
            ({"attack": "pgd", "norm": "linf", "epsilon": "4/255"}, {},
             ["the paper does not state the settings of its pgd"]),
            ({"attack": "clean"}, {}, []),
            ({"attack": "clean"}, {"clean": None}, ["no clean images"]),
            ({"attack": "clean"}, {"attacks": [], "robust": None}, []),
            ({"members": [AA], "attack": "union"}, {},
             ["one attack, not the worst case of several"]),
            ({"members": [AA], "attack": "union"}, {"method": "union"}, []),
            ({"members": [AA], "attack": "union"}, {"method": "union", "attacks": STANDARD[1:]},
             ["a different attack than standard AutoAttack"]),
        ):  # fmt: skip
            with self.subTest(row=(what, changes, said)):
                self.assertEqual([*matching.other_attack(what, record(**changes))], said)

    def test_apgd_of_steps_and_restarts(self):
        for steps, restarts, same in ((20, 2, True), (21, 2, False), (20, 1, False)):
            with self.subTest(row=(steps, restarts, same)):
                own = [{"name": "apgd-ce", "steps": steps, "restarts": restarts, **LINF}]
                found = [*matching.other_attack(APGD, record(attacks=own))]
                self.assertEqual(not found, same)

    def test_measured(self):
        for attack, value in (
            ("clean", 70.0),
            ("autoattack", 50.0),
            ("union", 50.0),
            ("corruptions", 30.0),
        ):
            with self.subTest(row=(attack, value)):
                own = record(corruptions={"mean": 0.3})
                self.assertEqual(matching.measured({"attack": attack}, own), value)
                none = replace(own, corruptions=None, clean=None, robust=None)
                self.assertIsNone(matching.measured({"attack": attack}, none))

    def test_other_images(self):
        for wanted, changes, said in (
            ({}, {}, []),
            ({"split": "val"}, {}, ["split test, not val"]),
            ({"dataset": "cifar100"}, {}, ["cifar10, not cifar100"]),
            ({"images": 11}, {}, ["images 0..9, not all 11"]),
            ({"images": None}, {}, ["the paper does not state the number of images"]),
            ({}, {"damaged": [1, 2]}, ["2 damaged images are left out"]),
            ({"split": "val@robustbench"}, {}, ["split test, not RobustBench's list of images"]),
            ({"split": "val@robustbench", "dataset": "imagenet2012"},
             {"ids_sha256": ROBUSTBENCH_SHA256, "dataset": "folder:x"}, []),
            ({}, {"dataset": "cifar10-c:files", "split": "any"}, []),
            ({"dataset": "imagenet100"}, {}, ["cifar10 with classes other than imagenet100"]),
        ):  # fmt: skip
            with self.subTest(row=(wanted, changes, said)):
                own = row(**wanted)
                self.assertEqual([*matching._other_images(own, record(**changes), True)], said)


class MarkdownTest(parameterized.TestCase):
    def filled(self, of, records, differing, **how):
        """`differing`: (name of a row, weights of a record, strictly) -> words."""

        def differences(of, own, key, given, *, of_training=True):
            return differing.get((own["name"], given.record.weights, of_training), [])

        with mock.patch.object(tables_markdown.matching, "differences", differences):
            return tables_markdown.filled(of, records, **how).cells

    def test_the_last_record_that_fits_strictly_counts(self):
        of = table([row("a")], results={"aa": AA})
        records = [ours(weights=str(at), robust=0.5 + at / 10) for at in range(3)]
        self.assertEqual(self.filled(of, records, {}), {(0, "aa"): Cell(70.0, 2, False)})
        last = {("a", "2", True): ["epochs"]}
        for alike in (False, True):  # a strict one before an alike one
            cells = self.filled(of, records, last, alike=alike)
            self.assertEqual(cells, {(0, "aa"): Cell(60.0, 1, False)})
        other = {("a", str(at), True): ["epochs"] for at in range(3)}
        self.assertEmpty(self.filled(of, records, other))
        found = self.filled(of, records, other, alike=True)
        self.assertEqual(found, {(0, "aa"): Cell(70.0, 2, True)})
        none = [ours(weights="0", robust=None)]
        self.assertEmpty(self.filled(of, none, {}, alike=True))
        nothing = [ours(weights="0", robust=0.0)]  # which is a result
        self.assertEqual(self.filled(of, nothing, {}), {(0, "aa"): Cell(0.0, 0, False)})

    def test_a_record_that_fits_two_rows(self):
        """Only rows that print the same value may share a record."""
        of = table([row("a"), row("b")], results={"aa": AA})
        cells = self.filled(of, [ours(robust=0.5)], {})
        self.assertEqual([*cells], [(0, "aa"), (1, "aa")])
        of.rows[1]["aa"] = 49.0
        with self.assertRaisesRegex(
            ValueError,
            r"^run/results.jsonl: a record matches rows 1 and 2 of Table 2 in revisiting_at, which "
            r"print 50.00 and 49.00; correct one of these rows in .*/revisiting_at.json$",
        ):
            self.filled(of, [ours(robust=0.5)], {})
        differing = {("a", "train, ema", True): ["epochs"]}  # and is alike
        self.assertLen(self.filled(of, [ours(robust=0.5)], differing, alike=True), 2)

    def test_cells(self):
        of = table([row("a"), row("b")], decimals=0)
        cells = {(0, "aa"): Cell(51.26, 1), (1, "aa"): Cell(49.0, 0, alike=True)}
        shown = Filled(of, cells)
        for index, key, printed, text in (
            (0, "aa", "50", "**51.3** [2]"), (1, "aa", "50", "*49.0* [1]"),
            (0, "clean", "70", "not measured"), (0, "clean", "", ""), (0, "aa", "", "**51.3** [2]"),
        ):  # fmt: skip
            self.assertEqual(tables_markdown._ours(shown, index, key, printed), text)

    def test_a_table(self):
        notes = ["of all", "of all"]
        of = table([row("a", epochs=5, flag=True, note="odd"), row("b", epochs=7, flag=True)],
                   notes=notes)  # fmt: skip
        text = tables_markdown._table(Filled(of, {(1, "aa"): Cell(40, 0)}))
        self.assertEqual(
            text,
            "## Table 2: About\n\nAll rows: dataset cifar10, split test, images 10, image_size 32, "
            "flag yes.\n\n| network | epochs | clean: paper | ours | autoattack linf 4/255: paper |"
            " ours | parameters, M |\n| --- | --- | --- | --- | --- | --- | --- |\n"
            "| a | 5 | 70.00 | not measured | 50.00 | not measured |  |\n"
            "| b | 7 | 70.00 | not measured | 50.00 | **40.00** [1] |  |\n\n- of all\n- a: odd",
        )

    def test_records(self):
        """What stands in no cell says to what it is nearest, by the fewest differences."""
        shown = Filled(table([row("a"), row("b"), row("c", aa=None)], results={"aa": AA}), {})
        records = [ours(robust=0.5), ours(robust=0.25, flags={"x": "odd"}, weights="other")]
        records += [ours(robust=None, attacks=[], weights="w")]
        counts = {"a": 5, "b": 4, "c": 1}

        def differences(of, own, key, given, *, of_training=True):
            return [f"{own['name']}{at}" for at in range(counts[own["name"]])]

        with mock.patch.object(tables_markdown.matching, "differences", differences):
            cells = {(0, "aa"): Cell(50.0, 0)}
            lines = tables_markdown._records(records, [shown._replace(cells=cells)]).splitlines()
            self.assertStartsWith(
                lines[2],
                "1. a network (train): 70.00% clean, 50.00% robust; cifar10, split test, images "
                "0..9; autoattack standard, linf",
            )
            self.assertEndsWith(lines[2], "; run/results.jsonl.")
            self.assertEndsWith(
                lines[3],
                " Doubt about it, x: odd. **In no cell above**: nearest is table_2, b, but b0; b1; "
                "b2; and 1 more.",
            )
            self.assertIn("; no attack; ", lines[4])
            self.assertEndsWith(lines[4], "**: no table above has such a value.")
            cells = {(0, "aa"): Cell(50.0, 1, alike=True), (1, "aa"): Cell(50.0, 2, alike=True)}
            lines = tables_markdown._records(records, [shown._replace(cells=cells)]).splitlines()
            self.assertIn(" **Only in cells in italics**: nearest", lines[3])
            self.assertIn(" **In no cell above**: nearest", lines[2])

    def test_a_document(self):
        name, none = "robust_resnets", tables_markdown.NOT_MEASURED
        every = [Filled(each, {}) for each in tables.tables(name)]
        text = tables_markdown.document(name, every, [])
        places = [text.index(words) for words in ("# ", "its numbers next to ours", f"`{none}`: ",
                  "## Table 1:", "## Table 2:", "## Where the paper contradicts")]  # fmt: skip
        self.assertEqual(places, sorted(places))
        self.assertNotIn("In italics", text)
        self.assertNotIn("## Records", text)
        self.assertIn(f"jaxrobust reproduce --paper {name} --commands", text)
        one = Filled(table([row()], results={"aa": AA}), {(0, "aa"): Cell(50.0, 0, alike=True)})
        with mock.patch.object(tables_markdown, "_records", return_value="the records"):
            text = tables_markdown.document(name, [one], ["a record"])
        self.assertIn("*In italics*", text)
        self.assertEndsWith(text, "| *50.00* [1] |\n\nthe records\n")
        self.assertNotIn(none, text)

    def test_contradictions(self):
        rows = [{"where": "Table 1", "says": [1, None], "likely": [2, 3], "why": "a | b"}]
        lines = tables_markdown._contradictions(rows).splitlines()
        self.assertEqual(lines[-1], "| Table 1 | 1 /  | 2 3 | a \\| b |")


class DocumentsTest(parameterized.TestCase):
    def test_pictures_stand_under_their_title(self):
        of = [table([row()]), table([row()], id="table_21")]
        text = "# P\n\n## Table 2: About\n\nrows\n\n## Table 21: About\n\nrows"
        draw = lambda filled, records, out: [out / f"{filled.table.id}.png"]  # noqa: E731
        with (
            mock.patch.object(documents.scatter, "draw", draw),
            mock.patch.object(documents.resolutions, "draw", lambda filled, out: []),
        ):
            shown = [Filled(each, {}) for each in of]
            text, drawn = documents.with_pictures(text, shown, [], Path("out"))
        self.assertEqual([path.name for path in drawn], ["table_2.png", "table_21.png"])
        self.assertEqual(
            text,
            "# P\n\n![About](table_2.png)\n\n## Table 2: About\n\nrows\n\n"
            "![About](table_21.png)\n\n## Table 21: About\n\nrows",
        )


class FoundTest(absltest.TestCase):
    """Configs and records of a folder."""

    def test_a_config_is_found_under_each_of_its_hashes(self):
        folder = Path(self.create_tempdir())
        whole = plain(base())
        (folder / "config.json").write_text(json.dumps({"version": 1} | whole))
        found = list(run_records._read(folder))
        hashed = [sha256 for sha256, _ in found]
        self.assertEqual(hashed[0], run_records.hashes.config_sha256(json.loads(json.dumps(whole))))
        self.assertLen(found, 4)  # as it is, completed, and as each of two phases sees it
        self.assertTrue(all(config["model"] == whole["model"] for _, config in found))
        about = {"architecture": "convnext_t", "image_size": 224}
        (folder / "config.json").write_text(json.dumps({"version": 3} | about))
        self.assertEqual(
            list(run_records._read(folder)), [(run_records.hashes.config_sha256(about), about)]
        )
        for text in ("{", "[1]"):
            (folder / "config.json").write_text(text)
            with self.assertRaisesRegex(
                ValueError, "config.json is damaged .*; restore the original"
            ):
                list(run_records._read(folder))

    def test_lines_that_are_no_records_are_refused(self):
        file = Path(self.create_tempdir()) / "results.jsonl"
        whole = {"clean": 0.5, "attacks": [], "config_sha256": "ab", "dataset": "digits"}
        file.write_text(json.dumps(whole) + "\n")
        (found,) = run_records._records(file)
        self.assertEqual((found.clean, found.dataset), (0.5, "digits"))
        for key in whole:
            line = {name: value for name, value in whole.items() if name != key}
            file.write_text(json.dumps(whole) + "\n" + json.dumps(line) + "\n")
            with self.assertRaisesRegex(
                ValueError, "holds lines that are not records of jaxrobust"
            ):
                list(run_records._records(file))
