"""The page of runs and evaluations: its data, its words, and what it makes of bad input."""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.commands import report as command
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import comparisons, verdicts
from jaxrobust.report import figures, gathered, page
from jaxrobust.report.figures import Axis, Line
from jaxrobust.runtime.files import whole
from tests.support import reports
from tests.support.runs import one_phase, quiet_run, stop_after


class PageCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir().full_path)

    def page(self, *places: Path):
        return reports.read(page.page(gathered.gather(places)))

    def call(self, *words) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, said, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            try:
                command.main([str(word) for word in words])
            except SystemExit as error:
                code = error.code
        return code, out.getvalue(), said.getvalue()


class RunTest(PageCase):
    def test_figures_hold_the_metrics(self):
        run = reports.run(self.folder / "run", lines=40)
        data, text, _ = self.page(run)
        loss = data["t0-1-loss"]
        self.assertEqual(loss["title"], "Loss, train")
        (series,) = loss["series"]
        self.assertEqual(series["x"], list(range(1, 41)))
        np.testing.assert_allclose(series["y"], [2 / s for s in range(1, 41)], rtol=1e-4)
        names = [s["name"] for s in data["t0-1-accuracy"]["series"]]
        self.assertEqual(names[0], "batches, under attack")
        self.assertIn("selection, under attack", names)
        self.assertIn("phase train is at step 40 of 40", text)
        self.assertIn("No alarm was raised", text)
        self.assertIn("It has not been tested yet", text)
        self.assertNoCommonElements(data, {"t0-1-wait", "t0-1-skipped"})  # there was nothing to see

    def test_losses_that_are_not_finite_are_gaps_and_said(self):
        run = reports.run(self.folder / "run", lines=8)
        bad = {"phase": "train", "loss": math.nan, "skipped": 2, "data_wait": 0.2}
        rows = [bad | {"step": step} for step in (9, 10)]
        with (run / "metrics.jsonl").open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        data, text, _ = self.page(run)
        self.assertEqual(data["t0-1-loss"]["series"][0]["y"][-2:], [None, None])
        self.assertIn("Not finite: loss at 2 of 10 points, steps 9 to 10", text)
        self.assertIn("train 9 skipped 4 steps had no finite gradient, up to step 10", text)
        self.assertEqual([at for at, _ in data["t0-1-loss"]["marks"]], [9])
        self.assertIn("Dashed: skipped steps.", text)
        self.assertEqual(data["t0-1-skipped"]["series"][0]["y"][-1], 2)
        self.assertEqual(data["t0-1-wait"]["series"][0]["y"][-1], 0.2)

    def test_figures_without_a_value_are_sentences(self):
        run = reports.run(self.folder / "run", lines=2)
        rows = [{"phase": "other", "step": s, "loss": math.nan} for s in (1, 2)]
        with (run / "metrics.jsonl").open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        data, text, _ = self.page(run)
        self.assertNotIn("t0-2-loss", data)
        self.assertIn(": no value is finite.", text)
        self.assertIn("Not finite: loss at 2 of 2 points", text)

    def test_damaged_lines_are_left_out_and_said(self):
        run = reports.run(self.folder / "run", lines=8)
        path = run / "metrics.jsonl"
        path.write_bytes(b'\xff\n[1]\n{"step": "x", "phase": 3}\n' + path.read_bytes())
        data, text, _ = self.page(run)
        self.assertLen(data["t0-1-loss"]["series"][0]["x"], 8)
        self.assertRegex(text, r"3 damaged lines of .*metrics.jsonl are left out: 1, 2, 3\.")

    def test_alarms_and_rollbacks_are_marks_in_words(self):
        run = reports.run(self.folder / "run", lines=8)
        bad = {"alarm_loss": 0.1, "alarm_loss_stronger": 5.0}
        bad |= {"alarm_gradient_agreement": 1.0, "alarm_gradient_zero": 0.0}
        with (run / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"phase": "train", "step": 9, "loss": 1.0} | bad) + "\n")
        (run / "train").mkdir()
        note = {"step": 7, "back_to": 4, "lr_scale": 0.5, "why": "the loss is nan"}
        (run / "train" / "rollbacks.jsonl").write_text(json.dumps(note) + "\n")
        data, text, _ = self.page(run)
        marks = data["t0-1-loss"]["marks"]
        self.assertEqual([at for at, _ in marks], [7, 9])
        self.assertEqual(marks[0][1], "rollback: the loss is nan; back to step 4")
        self.assertIn("catastrophic overfitting", marks[1][1])
        self.assertEmpty(data["t0-0-loss"]["marks"])
        self.assertIn("run, train, step 9: the loss is", text)

    def test_resumptions_are_marks_and_no_doubts(self):
        run = reports.run(self.folder / "run", lines=8)
        (run / "train").mkdir()
        note = {"step": 4, "time": "2026-11-22T10:00:00+00:00", "devices": "4 x TPU v4"}
        torn = json.dumps(note) + '\n{"step": 7, "ti'
        (run / "train" / "resumptions.jsonl").write_text(torn)
        data, text, tags = self.page(run)
        said = "another process continued here, 2026-11-22T10:00:00+00:00, on 4 x TPU v4"
        self.assertEqual(data["t0-1-loss"]["marks"], [[4, f"resumption: {said}"]])
        self.assertEmpty(data["t0-0-loss"]["marks"])
        self.assertIn("Dashed: resumptions.", text)
        self.assertIn(f"train 4 resumption {said}", text)
        self.assertTrue([1 for _, own in tags if own.get("class") == "mark harmless"])
        self.assertNotIn("doubts", [own.get("class") for _, own in tags])

    def test_a_run_in_progress_says_who_is_at_work(self):
        run = reports.run(self.folder / "run", lines=8)
        holder = {"host": "tpu-3", "pid": 12, "since": "today", "started": "1", "sign": "0"}
        (run / "lock").write_text(json.dumps(holder))
        reports.evaluation(run / "evaluation")
        _, text, _ = self.page(run)
        self.assertIn("Running: process 12 on tpu-3 since today", text)
        self.assertIn("The run is still training", text)

    def test_a_run_without_metrics_is_a_page(self):
        run = reports.run(self.folder / "run", lines=8)
        (run / "metrics.jsonl").write_text("")
        self.assertIn("has no metrics yet", self.page(run)[1])

    @pytest.mark.slow
    def test_a_run_that_was_continued_twice_has_two_marks(self):
        run, config = self.folder / "run", one_phase()
        stop_after(3, lambda: quiet_run(config, run))
        stop_after(4, lambda: quiet_run(config, run))
        quiet_run(config, run)
        quiet_run(config, run)  # ended before: nothing continues
        data, text, _ = reports.read(page.page(gathered.gather([run])))
        marks = data["t0-0-loss"]["marks"]
        self.assertEqual([at for at, _ in marks], [3, 7])
        for _, said in marks:
            self.assertRegex(said, r"resumption: another process continued here, 2\d{3}-.* x cpu")
        self.assertIn("phase train is at step 12 of 12", text)


class EvaluationTest(PageCase):
    def test_figures_hold_the_verdicts(self):
        seen = reports.evaluation(self.folder / "mine", n=60)
        data, text, _ = self.page(self.folder / "mine")
        left = data["e0-left"]["rows"]
        self.assertEqual([r["name"] for r in left], ["clean", "after apgd-ce", "after apgd-t"])
        self.assertAlmostEqual(left[-1]["value"], seen.robust.mean(), places=4)
        low, high = checks.binomial_interval(int(seen.robust.sum()), 60)
        np.testing.assert_allclose([left[-1]["low"], left[-1]["high"]], [low, high], rtol=1e-4)
        rows = {r["name"]: r for r in data["e0-classes"]["rows"]}
        for label in range(4):
            of = seen.labels == label
            row = rows[f"class {label}"]
            self.assertAlmostEqual(row["value"], seen.robust[of].mean(), places=4)
            self.assertAlmostEqual(row["second"], seen.clean[of].mean(), places=4)
        self.assertIn(f"{100 * seen.robust.mean():.1f}%", text)
        self.assertIn("Only 60 images were evaluated", text)
        self.assertIn("not the standard version of AutoAttack", text)
        fooled = int((seen.fooled_by == "apgd-ce").sum())
        self.assertIn(f"apgd-ce {fooled} 30 20 1 1.5 s 0.5 s", text)
        self.assertIn("--attack apgd-ce,apgd-t --steps 20 --seed 0", text)
        self.assertIn("RobustBench would not accept it, so there is no entry", text)

    def test_what_robustbench_counts_has_its_json(self):
        names = ("apgd-ce", "apgd-t", "fab-t", "square")
        attacks = [{"name": n, "norm": "linf", "epsilon": 8 / 255} for n in names]
        counts = {"dataset": "cifar10", "image_ids": "0..9999", "method": "autoattack standard"}
        counts |= {"interval": None, "verdicts": None}
        reports.evaluation(self.folder / "mine", attacks=attacks, **counts)
        _, text, _ = self.page(self.folder)
        self.assertIn('"eps": "8/255"', text)
        self.assertIn("[New Model] AuthorYearTitle", text)
        self.assertIn("--epsilon 8/255 --attack autoattack --version standard", text)

    def test_idle_passes_are_beside_the_others(self):
        """Of 30 forward ones there may be 210 idle ones: they are in slots without an image."""
        cost = {"attack": "apgd-ce", "fooled": 1, "forward": 126, "backward": 100, "idle": 210}
        cost |= {"seconds": 1.0, "compile_seconds": 0.5}
        reports.evaluation(self.folder / "mine", costs=[cost])
        text = self.page(self.folder)[1]
        self.assertIn("passes forward backward idle seconds", text)
        self.assertNotIn("of them idle", text)

    def test_radii_of_one_network_are_one_curve(self):
        robust = {}
        for number, epsilon in enumerate((0.04, 0.02, 0.08)):
            seen = reports.evaluation(
                self.folder / "mine", f"b{number}", seed=number, epsilon=epsilon,
                weights_sha256="w" * 64,
            )  # fmt: skip
            robust[epsilon] = seen.robust.mean(), seen.clean.mean()
        data, _, _ = self.page(self.folder)
        (series,) = data["radii-0"]["series"]
        self.assertEqual(series["x"], [0, 0.02, 0.04, 0.08])
        wanted = [robust[0.02][1], *(robust[e][0] for e in (0.02, 0.04, 0.08))]
        np.testing.assert_allclose(series["y"], wanted, rtol=1e-4)
        self.assertLess(series["low"][1], series["y"][1])

    def test_two_networks_are_compared_image_by_image(self):
        first = reports.evaluation(self.folder / "a", "a1", n=200, seed=1)
        other = reports.evaluation(self.folder / "b", "b1", n=120, seed=2)
        data, text, _ = self.page(self.folder / "a", self.folder / "b")
        wanted = comparisons.compare(first.robust[:120], other.robust)  # the images of both
        (row,) = data["pairs-0-robust"]["rows"]
        values = [row["value"], row["low"], row["high"]]
        expected = [wanted.difference, wanted.low, wanted.high]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
        self.assertRegex(text, rf"b train robust .* 120 {wanted.gained} {wanted.lost} ")

    def test_class_names_are_escaped(self):
        evil = "</script><script>alert(1)</script>"
        run = reports.run(self.folder / "run")
        (run / "classes.txt").write_text(f"{evil}\na&b\nc\nd\n")
        reports.evaluation(run / "evaluation", weights=evil, dataset=evil)
        text = page.page(gathered.gather([run]))
        self.assertNotIn("<script>alert", text)
        data, _, tags = reports.read(text)
        self.assertIn(evil, [r["name"] for r in data["e0-classes"]["rows"]])
        self.assertLen([1 for name, own in tags if name == "script" and "id" not in own], 1)

    def test_another_schema_is_left_out_and_said(self):
        reports.evaluation(self.folder / "mine", "a1")
        reports.evaluation(self.folder / "mine", "a2", schema=9)
        data, text, _ = self.page(self.folder)
        self.assertNotIn("e1-left", data)
        self.assertRegex(text, "has a record of schema 9, but this version only reads up to 2")

    def test_missing_verdicts_are_said(self):
        reports.evaluation(self.folder / "mine")
        (self.folder / "mine" / "verdicts-a1.json").unlink()
        data, text, _ = self.page(self.folder)
        self.assertIn("e0-left", data)
        self.assertNotIn("e0-classes", data)
        self.assertIn("Parts that need the verdicts are left out", text)
        self.assertIn("Classes, confusion and images are not shown, because there are no", text)

    def test_an_old_record_is_a_page(self):
        old = {"clean": 0.5, "robust": 0.2, "dataset": "cifar10", "attacks": [], "time": "2026"}
        (self.folder / "results.jsonl").write_text(json.dumps(old) + "\n")
        self.assertIn("classifies 50.0% of the images of cifar10", self.page(self.folder)[1])


class ConfusionTest(PageCase):
    def page(self):
        return super().page(self.folder)

    def test_few_classes_are_a_matrix_of_the_verdicts(self):
        seen = reports.evaluation(self.folder, n=200)
        data, text, tags = self.page()
        told = data["e0-confusion"]
        self.assertEqual(told["names"], [f"class {label}" for label in range(4)])
        wanted = np.zeros((4, 4), int)
        for label, reached, clean, by in zip(
            seen.labels, seen.reached, seen.clean, seen.fooled_by, strict=True
        ):
            wanted[label, reached] += bool(clean and by)
        self.assertGreater(wanted.sum(), 50)
        self.assertEqual(told["counts"], wanted.tolist())
        self.assertEqual(np.trace(wanted), 0)
        most = tuple(np.argwhere(wanted == wanted.max())[0])
        alts = [own["aria-label"] for name, own in tags if name == "svg" and own.get("role")]
        said = "Classes that the attacks reached. class {} became class {} {} times".format(
            *most, wanted.max()
        )
        self.assertTrue(any(alt.startswith(said) for alt in alts), alts)
        for count in wanted[wanted > 0].tolist():
            self.assertIn(f" {count} ", text)

    def test_many_classes_are_a_table_of_the_most_frequent_pairs(self):
        seen = reports.evaluation(self.folder, n=3000, classes=1000)
        data, text, _ = self.page()
        self.assertNotIn("e0-confusion", data)
        known = seen.reached >= 0
        both, counts = np.unique(
            np.stack([seen.labels, seen.reached])[:, known], axis=1, return_counts=True
        )
        order = np.lexsort((both[1], both[0], -counts))[:20]
        self.assertIn(f"the 20 most frequent of {len(counts)} pairs", text)
        shares = 100 * counts / np.bincount(seen.labels[known])[both[0]]
        rows = [
            f"class {both[0, i]} class {both[1, i]} {counts[i]} {shares[i]:.0f}%" for i in order
        ]
        self.assertIn(rows[0], text)
        places = [text.index(row) for row in rows]
        self.assertEqual(places, sorted(places))
        self.assertGreater(len(both[0]), figures.CLASSES)

    def test_an_older_file_is_a_sentence_and_part_of_one_is_counted(self):
        seen = reports.evaluation(self.folder, n=200)
        path = self.folder / verdicts.file_of("a1")
        there = json.loads(path.read_text())
        fooled = int((seen.clean & ~seen.robust).sum())
        kept = np.flatnonzero(seen.reached >= 0)[:3]
        there["reached"] = np.where(np.isin(np.arange(200), kept), seen.reached, -1).tolist()
        path.write_text(json.dumps(there))
        data, text, _ = self.page()
        self.assertEqual(np.sum(data["e0-confusion"]["counts"]), 3)
        self.assertIn(f"{fooled - 3} more fooled images lack a recorded prediction.", text)
        del there["reached"]
        path.write_text(json.dumps(there))
        data, text, _ = self.page()
        self.assertNotIn("e0-confusion", data)
        self.assertIn(
            "Which classes the attacks reached is unknown: these verdicts come from",
            text,
        )


class FileTest(PageCase):
    def test_the_page_loads_nothing_and_can_be_read_without_seeing(self):
        run = reports.run(self.folder / "run")
        reports.evaluation(run / "evaluation")
        text = page.page(gathered.gather([run]))
        _, _, tags = reports.read(text)
        self.assertNotRegex(text, r"https?://(?!www\.w3\.org)\S+\.(js|css|png|svg)")
        for name, own in tags:
            self.assertNotIn("src", own, name)
            if name == "link":
                self.fail("a page has no links to other files")
            if name == "svg" and own.get("aria-hidden") != "true":
                self.assertEqual(own["role"], "img")
                self.assertEqual(own["tabindex"], "0")
                self.assertGreater(len(own["aria-label"]), 20)
        identities = [own["id"] for _, own in tags if "id" in own]
        self.assertLen(set(identities), len(identities))

    def test_the_command_writes_one_file_and_says_so(self):
        run = reports.run(self.folder / "run")
        code, out, said = self.call(run, "--json")
        self.assertEqual((code, said), (0, ""))
        made = json.loads(out.splitlines()[-1])
        self.assertEqual(made["file"], str(run / "report.html"))
        self.assertEqual((run / "report.html").stat().st_size, made["bytes"])
        self.assertEqual((made["runs"], made["evaluations"]), (1, 0))
        self.assertNotIn("note: ", out)

    def test_the_page_of_a_file_of_records_lies_beside_it(self):
        reports.evaluation(self.folder / "evaluation", n=8)
        code, out, said = self.call(self.folder / "evaluation" / "results.jsonl")
        self.assertEqual((code, said), (0, ""))
        page_file = self.folder / "evaluation" / "report.html"
        self.assertRegex(out, f"^{page_file}: 0 runs, 1 evaluation, 0.[0-9]+ MB\n")
        self.assertTrue(page_file.is_file())
        elsewhere = self.folder / "own.html"
        code, out, _ = self.call(self.folder / "evaluation", "--out", elsewhere)
        self.assertEqual(code, 0)
        timeless = (  # a page says when it was made, to the second
            re.sub(r"\d\d:\d\d:\d\d\+00:00", "", file.read_text())
            for file in (elsewhere, page_file)
        )
        self.assertEqual(*timeless)

    def test_the_command_says_what_the_page_lacks(self):
        run = reports.run(self.folder / "run", lines=8)
        with (run / "metrics.jsonl").open("a") as lines:
            lines.write('{"phase": "train", "step": 9, "lo')
        code, out, _ = self.call(run)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"\nnote: The last line of .*metrics.jsonl was cut off; the 18")

    @pytest.mark.slow
    def test_a_folder_of_many_runs_is_small(self):
        for number in range(40):
            run = reports.run(self.folder / f"run{number}", lines=300)
            reports.evaluation(run / "evaluation", f"a{number}", seed=number)
        found = gathered.gather([self.folder])
        self.assertLen(found.runs, 40)
        text = page.page(found)
        self.assertLess(len(text.encode()), 10e6)
        data, said, _ = reports.read(text)
        self.assertLen(data["pairs-0-robust"]["rows"], 39)
        a, b = (one.verdicts for one in found.evaluations[:2])
        wanted = comparisons.compare(a.robust, b.robust)
        row = data["pairs-0-robust"]["rows"][0]
        values = [row["value"], row["low"], row["high"]]
        np.testing.assert_allclose(
            values, [wanted.difference, wanted.low, wanted.high], rtol=1e-4, atol=1e-6
        )
        self.assertIn("and 37 more", said)

    def test_what_cannot_be_shown_is_one_sentence(self):
        (self.folder / "empty").mkdir()
        (self.folder / "text.txt").write_text("hello\n")
        reports.evaluation(self.folder / "newer", schema=9)
        for name, wanted in (
            ("nothing", "nothing does not exist; name a run, its evaluation, or a parent folder"),
            ("empty", "holds neither a run .metrics.jsonl. nor records .results.jsonl.; name the"),
            ("text.txt", "Damaged lines of .*text.txt .*: 1. There is nothing else to show; name"),
            ("newer", "has a record of schema 9"),
        ):
            with self.subTest(row=(name, wanted)):
                code, out, said = self.call(self.folder / name)
                self.assertEqual((code, out), (2, ""))
                self.assertRegex(said, wanted)
                self.assertEqual(said.count("\n"), 1)
                self.assertNotIn("Traceback", said)

    @pytest.mark.slow
    def test_values_of_any_type_are_never_a_traceback(self):
        """Each value of config, data, metrics and record is replaced by each of these."""
        run = reports.run(self.folder / "run", lines=4)
        reports.evaluation(run / "evaluation", n=8)
        files = [run / "config.json", run / "data.json", run / "metrics.jsonl"]
        for file in (*files, run / "evaluation" / "results.jsonl"):
            text = file.read_text()
            first, _, rest = text.partition("\n") if file.suffix == ".jsonl" else (text, "", "")
            for place in _places(json.loads(first)):
                for value in ("x", [1], {"y": 2}, 1e400):
                    changed = json.loads(first)
                    inside = changed
                    for key in place[:-1]:
                        inside = inside[key]
                    inside[place[-1]] = value
                    file.write_text(json.dumps(changed) + ("\n" + rest if rest else "\n"))
                    with self.subTest(f"{file.name} {place} {value}"):
                        try:
                            page.page(gathered.gather([run]))
                        except ValueError as error:
                            self.assertNotIn("Error", str(error))
            file.write_text(text)

    def test_a_folder_as_file_is_refused(self):
        run = reports.run(self.folder / "run")
        code, _, said = self.call(run, "--out", self.folder)
        self.assertEqual(code, 2)
        self.assertIn("is a folder; name a file", said)

    def test_a_file_that_cannot_be_written_is_a_sentence(self):
        run = reports.run(self.folder / "run")
        code, _, said = self.call(run, "--out", self.folder / "none" / "report.html")
        self.assertEqual(code, 2)
        self.assertRegex(said, "the folder .*/none does not exist; create it first")
        with mock.patch.object(whole, "writing", side_effect=PermissionError(13, "Not allowed")):
            code, out, said = self.call(run)
        self.assertEqual((code, out), (3, ""))
        self.assertRegex(said, "cannot write .*report.html .Not allowed.; name another file with")
        self.assertEqual(list(run.glob("*.html*")), [])


def _places(value, place=()):
    """The paths of keys to all values."""
    found = [place] if place else []
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, one in inside:
        found += _places(one, (*place, key))
    return found


class FigureTest(absltest.TestCase):
    def test_a_constant_a_single_and_an_empty_curve_are_drawn(self):
        for x, y in (([1.0, 2.0], [3.0, 3.0]), ([1.0], [0.0]), ([], []), ([1.0], [math.nan])):
            for log in (False, True):
                drawn = figures.lines("a", "b", [Line("c", x, y)], Axis("x"), Axis("y", log=log))
                self.assertNotIn("nan", drawn.partition("<script")[0], (x, y, log))
