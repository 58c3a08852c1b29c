"""`jaxrobust plan`: every run once, behind its start; what a budget buys; scripts that continue."""

import json
import subprocess
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.config import plain
from jaxrobust.doctor.estimate import devices
from jaxrobust.papers.planning import answer, costs, progress, runs
from jaxrobust.papers.planning.costs import RunCost
from jaxrobust.papers.planning.progress import BEGUN, BEYOND, DONE, PLANNED
from jaxrobust.papers.tables import lines, matching, tables
from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parents[2]


class RunsTest(parameterized.TestCase):
    @parameterized.parameters(*tables.PAPERS)
    def test_each_row_with_a_run_has_it_once_behind_what_it_needs(self, paper):
        planned = runs.of_paper(paper)
        places = [place for each in planned for place in each.rows]
        wanted = [line for _, _, line in lines.of_tables(paper) if line.run]
        self.assertLen(set(places), len(wanted))
        self.assertLen(places, len(wanted))
        seen = set()
        for each in planned:
            self.assertContainsSubset(each.needs, seen)
            self.assertNotIn(each.folder, seen)
            seen.add(each.folder)

    def test_a_new_stem_is_trained_once_and_the_row_is_still_measured(self):
        planned = {each.folder: each for each in runs.of_paper("revisiting_at", "table_1")}
        stem, heavy = (
            planned[f"runs/{name}-convnext_t_cvst"]
            for name in ("convstem_pretraining", "revisiting_at")
        )
        self.assertEqual(stem.rows, ())
        self.assertEqual(heavy.needs, (stem.folder,))
        basic = planned["runs/revisiting_at-convnext_t_cvst-augmentation=basic"]
        self.assertEqual(basic.needs, (stem.folder,))
        config, started = (plain(each.run.load()) for each in (heavy, stem))
        self.assertEqual(config["init"]["weights"], f"run:{stem.run.config}")
        self.assertEqual((config["init"]["stem"], config["pretrain"]["epochs"]), ("keep", 0))
        (table,) = tables.tables("revisiting_at", "table_1")
        row = table.rows[heavy.rows[0].row]
        self.assertEmpty([*matching.other_training(row, config, started)])
        self.assertNotEmpty([*matching.other_training(row, config)])
        self.assertEqual(
            heavy.commands()[0],
            "jaxrobust train --config configs/revisiting_at.py:convnext_t_cvst",
        )

    def test_one_row(self):
        (own,) = [p for p in runs.of_paper("revisiting_at", "table_12", "1") if p.rows]
        self.assertEqual(own.rows, (runs.RowPlace("table_12", 0),))

    def test_starts_of_starts(self):
        """8/255 begins where 4/255 ended, and that where a clean stem did."""
        planned = {each.folder: each for each in runs.of_paper("revisiting_at", "table_4")}
        large = planned["runs/larger_radius-convnext_b_cvst-start=trained"]
        self.assertEqual(large.needs, ("runs/revisiting_at-convnext_b_cvst",))
        (needed,) = large.needs
        self.assertEqual(planned[needed].needs, ("runs/convstem_pretraining-convnext_b_cvst",))


def run(name, *, needs=(), rows=1):
    places = tuple(runs.RowPlace("table_12", row) for row in range(rows))
    return runs.PaperRun(f"runs/{name}", lines.Run(f"{name}:x"), needs, places, ("--attack x",))


class BudgetTest(absltest.TestCase):
    def states(self, planned, budget, done=None, evaluated=()):
        root = Path(self.create_tempdir().full_path)
        for folder, config in (done or {}).items():
            (root / folder).mkdir(parents=True)
            (root / folder / "config.json").write_text(json.dumps({"version": 1} | config))
            line = json.dumps({"weights": "pretrain, step 9, ema"})
            (root / folder / "results.jsonl").write_text(f"{line}\n")
            (root / folder / "pretrain" / "best" / "9").mkdir(parents=True)
        for folder in evaluated:
            (root / folder / "evaluation").mkdir()
            (root / folder / "evaluation" / "results.jsonl").write_text("{}\n")
        steps = progress.in_order("revisiting_at", planned, [], root=root, budget=budget)
        return {step.planned.folder.removeprefix("runs/"): step.state for step in steps}

    def test_a_start_that_is_done_costs_nothing(self):
        start = runs.of_paper("revisiting_at", "table_1")
        start = next(each for each in start if each.folder.endswith("pretraining-vit_s_cvst"))
        planned = [(start, RunCost(6, 0)), (run("large", needs=(start.folder,)), RunCost(5, 0))]
        name = start.folder.removeprefix("runs/")
        config = plain(start.run.load())
        states = self.states(planned, 5, done={start.folder: config})
        self.assertEqual(states, {name: DONE, "large": PLANNED})
        config["pretrain"]["epochs"] = 1  # another run in its place
        states = self.states(planned, 5, done={start.folder: config})
        self.assertEqual(states, {name: BEYOND, "large": BEYOND})

    def test_a_run_of_a_figure_is_done_when_it_is_evaluated(self):
        start = runs.of_paper("revisiting_at", "table_1")
        start = next(each for each in start if each.folder.endswith("pretraining-vit_s_cvst"))
        own = start._replace(rows=(runs.RowPlace(tables.FIGURES, 0),), flags=("--attack x",))
        done = {own.folder: plain(own.run.load())}
        for evaluated, state in (((), BEGUN), ((own.folder,), DONE)):
            states = self.states([(own, RunCost(6, 0))], None, done, evaluated)
            self.assertEqual(set(states.values()), {state})


class CostsTest(absltest.TestCase):
    def test_what_is_remembered_is_not_estimated_again_nor_what_costs_the_same(self):
        file = Path(self.create_tempdir().full_path) / "deep" / "estimates.jsonl"
        planned = runs.of_paper("revisiting_at", "table_17")
        target = devices.target("v5e:8x8")
        found = (2.0, 0.5)
        with mock.patch.object(costs.account, "hours", return_value=found) as estimated:
            first = list(costs.of_runs(planned, target, utilisation=0.2, file=file))
            # Weight decay and label smoothing cost nothing: two networks and their two stems.
            self.assertEqual(estimated.call_count, 4)
            self.assertEqual(
                list(costs.of_runs(planned, target, utilisation=0.2, file=file)), first
            )
            self.assertEqual(estimated.call_count, 4)
            list(costs.of_runs(planned, target, utilisation=0.4, file=file))
            self.assertEqual(estimated.call_count, 8)
            estimated.side_effect = ValueError("use 64")
            (one, *_) = costs.of_runs(planned, target, utilisation=0.5, file=file)
            self.assertEqual(one[1].refused, "use 64")
        by_folder = {each.folder: cost for each, cost in first}
        self.assertEqual(by_folder["runs/convstem_pretraining-vit_s_cvst"].hours, 2.0)
        self.assertEqual(by_folder["runs/revisiting_at-vit_s_cvst"].hours, 2.5)


class ScriptsTest(absltest.TestCase):
    def test_a_run_that_fails_ends_the_script_and_the_next_does_not_begin(self):
        folder = Path(self.create_tempdir().full_path)
        steps = [
            progress.PlannedStep(run(name), RunCost(1, 0), PLANNED, (0, 1)) for name in ("a", "b")
        ]
        answer.write_scripts(steps, folder, "jaxrobust plan x")
        (folder / "jaxrobust").write_text('#!/bin/bash\necho "$@" >> said\nexit 75\n')
        (folder / "jaxrobust").chmod(0o755)
        done = subprocess.run(
            ["./runs.sh"], cwd=folder, env={"PATH": f"{folder}:/usr/bin:/bin"}, check=False
        )
        self.assertEqual(done.returncode, 75)
        self.assertEqual((folder / "said").read_text(), "train --config configs/a.py:x\n")


class CommandTest(absltest.TestCase):
    def test_mistakes(self):
        for words, said in (
            (["revisiting", "--on", "v5e:8x8"], "is not a paper; did you mean revisiting_at?"),
            (["revisiting_at", "--on", "v5e:8x8", "--budget=0"], "must be above 0 hours; leave it"),
            (["revisiting_at", "--on", "v5e:8x8", "--table=99"], "has no such table; one of table"),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--table=12", "--row=9"],
                "--row 9: Table 12 of revisiting_at has no such row; give a name, or a number",
            ),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--row=9"],
                "--row 9 needs a table; name it with --table",
            ),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--table=18", "--row=1"],
                "nothing is trained for that row; jaxrobust reproduce --commands --paper re",
            ),
            (
                ["revisiting_at", "--on", "cpu"],
                "--on cpu is not a known chip; write, for example, v5e",
            ),
            (["revisiting_at", "--on", "v5e:8x8", "--utilisation=2"], "above 0 and at most 1"),
        ):
            with self.subTest(words):
                code, _, error = run_command(["plan", *words], ROOT)
                self.assertEqual(code, 2)
                self.assertIn(said, error)

    def test_a_plan_from_remembered_estimates(self):
        folder = Path(self.create_tempdir().full_path)
        target = devices.target("v5e:8x8")
        file = folder / "runs" / "estimates.jsonl"
        found = (2.0, 0.5)
        with mock.patch.object(costs.account, "hours", return_value=found):
            list(
                costs.of_runs(
                    runs.of_paper("revisiting_at", "12"), target, utilisation=0.2, file=file
                )
            )
        words = ["plan", "revisiting_at", "--table=12", "--on=v5e:8x8", "--write=scripts"]
        code, out, _ = run_command([*words, "--budget=4"], folder)
        self.assertEqual(code, 0)
        self.assertIn("2 runs, of which 0 are done", out)
        self.assertIn("within a budget of 4 hours; 1 runs exceed it", out)
        self.assertIn("scripts/submit.sh", out)
        self.assertIn("attack=pgd", (folder / "scripts" / "runs.sh").read_text())
        self.assertLen([json.loads(line) for line in file.read_text().splitlines()], 2)
