"""`jaxrobust plan`: every run once, behind its start; what a budget buys; scripts that go on."""

import json
import subprocess
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.config import plain
from jaxrobust.doctor.estimate import devices
from jaxrobust.papers.planning import answer, claims, costs, progress, runs, scripts
from jaxrobust.papers.planning.costs import RunCost
from jaxrobust.papers.planning.progress import APART, BEGUN, BEYOND, DONE, PLANNED, REFUSED
from jaxrobust.papers.tables import lines, tables, training_words
from tests.support import compared
from tests.support.commands import commands

THREATS = (("linf", 4 / 255), ("l2", 2.0), ("l1", 75.0))
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
        config, started = (plain(runs.config_of(each.run)) for each in (heavy, stem))
        self.assertEqual(config["init"]["weights"], f"run:{stem.run.config}")
        self.assertEqual((config["init"]["stem"], config["pretrain"]["epochs"]), ("keep", 0))
        (table,) = tables.tables("revisiting_at", "table_1")
        row = table.rows[heavy.rows[0].row]
        self.assertEmpty([*training_words.differences(table, row, config, started)])
        self.assertNotEmpty([*training_words.differences(table, row, config)])
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
    def states(self, planned, budget, done=None):
        root = Path(self.create_tempdir().full_path)
        for folder, config in (done or {}).items():
            (root / folder).mkdir(parents=True)
            (root / folder / "config.json").write_text(json.dumps({"version": 1} | config))
            line = json.dumps({"weights": "pretrain, step 9, ema"})
            (root / folder / "results.jsonl").write_text(f"{line}\n")
            (root / folder / "pretrain" / "best" / "9").mkdir(parents=True)
        steps = progress.in_order("revisiting_at", planned, [], root=root, budget=budget)
        return {step.planned.folder.removeprefix("runs/"): step.state for step in steps}

    def test_a_run_is_paid_with_its_start_or_waits(self):
        start = run("start", rows=0)
        planned = [
            (start, RunCost(6, 0)),
            (run("large", needs=(start.folder,)), RunCost(5, 1)),
            (run("small"), RunCost(3, 1)),
            (run("later", needs=(start.folder,)), RunCost(1, 0)),
        ]
        self.assertEqual(
            self.states(planned, 11),  # 12 would pay the first with its start; 4 the second
            {"start": PLANNED, "large": BEYOND, "small": PLANNED, "later": PLANNED},
        )
        self.assertEqual(
            self.states(planned, 12),
            {"start": PLANNED, "large": PLANNED, "small": BEYOND, "later": BEYOND},
        )
        self.assertEqual(self.states(planned, 5)["start"], BEYOND)
        self.assertEqual(set(self.states(planned, None).values()), {PLANNED})

    def test_what_the_devices_refuse_waits_for_others_with_what_needs_it(self):
        first, second = run("first"), run("second", needs=("runs/first",))
        no = RunCost(0, 0, "train.batch_size=32 cannot be split over 64 devices; use 64")
        planned = [(first, no), (second, RunCost(1, 0)), (run("third"), RunCost(1, 0))]
        states = {"first": REFUSED, "second": REFUSED, "third": PLANNED}
        self.assertEqual(self.states(planned, 5), states)
        self.assertEqual(self.states(planned, None), states)
        step = progress.PlannedStep(first, no, REFUSED, (0, 1))
        text = answer.text([step], "revisiting_at", devices.target("v5e:8x8"), 0.2, None)
        self.assertIn("      -           first  refused  table_12 1", text)
        self.assertIn("\nrefused: train.batch_size=32 cannot be split over 64 devices", text)

    def test_a_start_that_is_done_costs_nothing(self):
        start = runs.of_paper("revisiting_at", "table_1")
        start = next(each for each in start if each.folder.endswith("pretraining-vit_s_cvst"))
        planned = [(start, RunCost(6, 0)), (run("large", needs=(start.folder,)), RunCost(5, 0))]
        name = start.folder.removeprefix("runs/")
        config = plain(runs.config_of(start.run))
        states = self.states(planned, 5, done={start.folder: config})
        self.assertEqual(states, {name: DONE, "large": PLANNED})
        config["pretrain"]["epochs"] = 1  # another run in its place
        states = self.states(planned, 5, done={start.folder: config})
        self.assertEqual(states, {name: BEYOND, "large": BEYOND})


class ClaimsTest(absltest.TestCase):
    def test_rows_that_differ_in_one_thing_are_compared(self):
        planned = runs.of_paper("revisiting_at", "table_1")
        found = {frozenset(pair) for *pair, _ in claims.compared("revisiting_at", planned)}
        name = "runs/revisiting_at-convnext_t"
        wanted = [
            (name, f"{name}-augmentation=basic"),
            (name, f"{name}_cvst"),
            (f"{name}-start=random-augmentation=basic", f"{name}-augmentation=basic"),
            (name, f"{name}-epochs=300"),
        ]
        self.assertContainsSubset(map(frozenset, wanted), found)
        for pair in (
            (name, f"{name}-start=random-augmentation=basic"),  # two things
            (name, "runs/revisiting_at-vit_s"),
            (f"{name}-augmentation=basic", f"{name}_cvst"),
        ):
            self.assertNotIn(frozenset(pair), found)

    def test_nothing_more_is_asked_of_what_is_told_apart(self):
        root = Path(self.create_tempdir().full_path)
        planned = runs.of_paper("revisiting_at", "table_12")
        priced = [(each, RunCost(5, 1)) for each in planned]

        def states(shares):
            for each, share in zip(planned, shares, strict=True):
                folder = root / each.folder / "evaluation"
                folder.mkdir(parents=True, exist_ok=True)
                (folder.parent / "config.json").write_text("{}")
                for number, (norm, epsilon) in enumerate(THREATS):
                    ball = {"norm": norm, "epsilon": epsilon}
                    own = [attack | ball for attack in compared.attacks()]
                    seen = compared.found(5, share=share)
                    compared.write(folder, seen, f"a{number}", attacks=own)
            steps = progress.in_order("revisiting_at", priced, [], root=root, budget=None)
            return [step.state for step in steps]

        self.assertEqual(states([0.3, 0.6]), [APART, APART])
        for path in root.rglob("results.jsonl"):
            path.unlink()
        self.assertEqual(states([0.5, 0.5]), [BEGUN, BEGUN])


class CostsTest(absltest.TestCase):
    def test_what_is_remembered_is_not_estimated_again_nor_what_costs_the_same(self):
        file = Path(self.create_tempdir().full_path) / "deep" / "estimates.jsonl"
        planned = runs.of_paper("revisiting_at", "table_17")
        target = devices.target("v5e:8x8")
        found = {"training": {"hours": 2.0}, "autoattack": {"expected": {"hours": 0.5}}}
        with mock.patch.object(costs.account, "account", return_value=found) as estimated:
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
    def test_lines_go_on_and_generations_wait(self):
        folder = Path(self.create_tempdir().full_path)
        start, other = run("start", rows=0), run("other")
        planned = [start, run("large", needs=(start.folder,)), other, run("beyond"), run("done")]
        states = [PLANNED, PLANNED, PLANNED, BEYOND, DONE]
        steps = [
            progress.PlannedStep(each, RunCost(1, 0), state, (0, 1))
            for each, state in zip(planned, states, strict=True)
        ]
        scripts.write(steps, folder, "jaxrobust plan x")
        first, second = ((folder / f"generation-{n}.txt").read_text() for n in (1, 2))
        self.assertEqual(first.count("jaxrobust train"), 2)
        self.assertIn("configs/large.py:x", second)
        self.assertNotIn("beyond", first + second)
        submit = (folder / "submit.sh").read_text()
        self.assertIn("--array=1-2 ", submit)
        self.assertIn("--array=1-1 --dependency=afterok:$job ", submit)
        for path in folder.glob("*.s*"):
            subprocess.run(["bash", "-n", path], check=True)

    def test_a_run_that_fails_ends_the_script_and_the_next_does_not_begin(self):
        folder = Path(self.create_tempdir().full_path)
        steps = [
            progress.PlannedStep(run(name), RunCost(1, 0), PLANNED, (0, 1)) for name in ("a", "b")
        ]
        scripts.write(steps, folder, "jaxrobust plan x")
        (folder / "jaxrobust").write_text('#!/bin/bash\necho "$@" >> said\nexit 75\n')
        (folder / "jaxrobust").chmod(0o755)
        done = subprocess.run(
            ["./runs.sh"], cwd=folder, env={"PATH": f"{folder}:/usr/bin:/bin"}, check=False
        )
        self.assertEqual(done.returncode, 75)
        self.assertEqual((folder / "said").read_text(), "train --config configs/a.py:x\n")


class PageTest(absltest.TestCase):
    def test_sums_are_of_what_is_left(self):
        start = run("start", rows=0)
        steps = [
            progress.PlannedStep(start, RunCost(6, 0), DONE, (0, 0)),
            progress.PlannedStep(run("a", needs=(start.folder,)), RunCost(5, 1), PLANNED, (1, 2)),
            progress.PlannedStep(run("b", rows=2), RunCost(30, 0), BEYOND, (0, 4)),
        ]
        text = answer.text(steps, "revisiting_at", devices.target("v5e:8x8"), 0.2, 10.0)
        self.assertIn("records fill 1 of the 6 cells", text)
        self.assertIn("1 runs to make: 6 hours, 384 chip-hours, within a budget of 10", text)
        self.assertIn("    6.0      6.0  a      planned  table_12 1 (after start)", text)
        self.assertIn("   30.0           b      beyond   table_12 1, 2", text)


class CommandTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_command = cls.enterClassContext(commands())

    def test_mistakes(self):
        for words, said in (
            (["revisiting", "--on", "v5e:8x8"], "is no paper; did you mean revisiting_at?"),
            (["revisiting_at", "--on", "v5e:8x8", "--budget=0"], "must be above 0 hours; leave it"),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--table=99"],
                "has no such table; one of table_",
            ),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--table=12", "--row=9"],
                "--row 9: Table 12 of revisiting_at has no such row; give a name, or a number",
            ),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--row=9"],
                "is one of a table; name it with --t",
            ),
            (
                ["revisiting_at", "--on", "v5e:8x8", "--table=18", "--row=1"],
                "nothing is trained for that row; jaxrobust reproduce --commands --paper re",
            ),
            (["revisiting_at", "--on", "cpu"], "is no chip that can be assumed; name some, as v5e"),
            (["revisiting_at", "--on", "v5e:8x8", "--utilisation=2"], "above 0 and at most 1"),
        ):
            with self.subTest(words):
                code, _, error = self.run_command(["plan", *words], ROOT)
                self.assertEqual(code, 2)
                self.assertIn(said, error)

    def test_a_plan_from_remembered_estimates(self):
        folder = Path(self.create_tempdir().full_path)
        target = devices.target("v5e:8x8")
        file = folder / "runs" / "estimates.jsonl"
        found = {"training": {"hours": 2.0}, "autoattack": {"expected": {"hours": 0.5}}}
        with mock.patch.object(costs.account, "account", return_value=found):
            list(
                costs.of_runs(
                    runs.of_paper("revisiting_at", "12"), target, utilisation=0.2, file=file
                )
            )
        words = ["plan", "revisiting_at", "--table=12", "--on=v5e:8x8", "--write=scripts"]
        code, out, _ = self.run_command([*words, "--budget=4"], folder)
        self.assertEqual(code, 0)
        self.assertIn("2 runs, of which 0 are done", out)
        self.assertIn("within a budget of 4 hours; 1 runs are beyond it", out)
        self.assertIn("scripts/submit.sh", out)
        self.assertIn("attack=pgd", (folder / "scripts" / "runs.sh").read_text())
        self.assertLen([json.loads(line) for line in file.read_text().splitlines()], 2)


if __name__ == "__main__":
    absltest.main()
