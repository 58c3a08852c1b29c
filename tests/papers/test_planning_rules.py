"""Plans, rule by rule: which runs are compared, what they cost, what is paid, what is written."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.doctor.estimate import devices
from jaxrobust.papers.planning import answer, costs, progress, runs
from jaxrobust.papers.planning.costs import RunCost
from jaxrobust.papers.planning.progress import (
    APART,
    BEGUN,
    BEYOND,
    DONE,
    PLANNED,
    REFUSED,
    PlannedStep,
)
from jaxrobust.papers.planning.runs import PaperRun, RowPlace
from jaxrobust.papers.tables import lines
from jaxrobust.papers.tables.tables import Table
from tests.support.runs import tiny

TARGET = devices.target("v5e:8x8")
RESULTS = {
    "clean": {"attack": "clean"},
    "linf": {"attack": "autoattack", "norm": "linf", "epsilon": "4/255"},
    "l2": {"attack": "autoattack", "norm": "l2", "epsilon": 2},
    "apgd": {"attack": "apgd-ce", "norm": "linf", "epsilon": "4/255"},
}


def run(name, *, needs=(), rows=1, flags=()) -> PaperRun:
    places = tuple(RowPlace("table_1", row) for row in range(rows))
    needs = tuple(f"runs/{need}" for need in needs)
    return PaperRun(f"runs/{name}", lines.Run(f"{name}:x"), needs, places, flags)


def table(rows, name="table_1") -> Table:
    known = {"paper": "p", "caption": "", "kind": "accuracy", "decimals": 2, "notes": []}
    return Table(**known, id=name, results=RESULTS, rows=rows)


class ClaimsTest(parameterized.TestCase):
    def test_alike(self):
        for one, other, alike in (
            ({"epochs": 50}, {"epochs": 300}, True),
            ({"epochs": 50}, {"epochs": 50}, False),
            ({"epochs": 50, "lr": 1}, {"epochs": 60, "lr": 2}, False),
            ({"epochs": 50}, {}, True),  # what one does not say is a difference
            ({"image_size": 32}, {"image_size": 64}, False),
            ({"image_size": 32, "epochs": 1}, {"image_size": 64, "epochs": 2}, False),
            ({"model": "a"}, {"model": "b"}, False),
            ({"model": "a"}, {"model": "a_cvst"}, True),
            (
                {"model": "a", "start": 1, "stem": 2},
                {"model": "a_cvst", "start": 2, "stem": 3},
                True,
            ),
            ({"model": "a", "epochs": 1}, {"model": "a_cvst", "epochs": 2}, False),
            ({"clean": 1, "name": "x"}, {"clean": 2, "name": "y"}, False),
        ):
            with self.subTest(row=(one, other, alike)):
                rows = [{"model": "net", "image_size": 32} | own for own in (one, other)]
                self.assertEqual(progress._alike(table(rows), *rows), alike)
                self.assertEqual(progress._alike(table(rows), *rows[::-1]), alike)

    def test_pairs_are_of_one_table_and_two_runs_and_each_stands_once(self):
        rows = [{"model": "net", "image_size": 32, "epochs": e, "linf": 9.0} for e in (1, 2, 1)]
        both = [table(rows), table(rows, "table_2")]
        planned = [
            run("a", rows=0)._replace(rows=(RowPlace("table_1", 0), RowPlace("table_1", 2))),
            run("b", rows=0)._replace(rows=(RowPlace("table_1", 1),)),
            run("c", rows=0)._replace(rows=(RowPlace("table_2", 1),)),
        ]
        with mock.patch.object(progress.tables, "tables", return_value=both):
            found = [*progress.compared("p", planned)]
        self.assertEqual(found, [("runs/a", "runs/b", "linf:4/255")])

    def test_told_apart(self):
        for lost, method, apart in (
            (6, "autoattack standard", True),  # p is 2 x 0.5**6
            (5, "autoattack standard", False),
            (6, "autoattack standard, 2 of 4", True),
            (6, "apgd-ce", False),
        ):
            with self.subTest(row=(lost, method, apart)):
                folders = [Path(self.create_tempdir(name).full_path) for name in ("one", "other")]
                right = np.ones(50, bool)
                seen = [right, np.arange(50) >= lost]
                loaded = [
                    SimpleNamespace(
                        verdicts=SimpleNamespace(robust=r), record=SimpleNamespace(method=m)
                    )
                    for r, m in zip(seen, ("autoattack standard", method), strict=True)
                ]
                with mock.patch.object(progress.evaluations, "load", return_value=loaded) as load:
                    self.assertFalse(progress._told_apart(*folders, "l2:2"))
                    for folder in folders:
                        self.assertFalse(progress._told_apart(*folders, "l2:2"))
                        (folder / "evaluation").mkdir()
                        (folder / "evaluation" / "results.jsonl").write_text("")
                    load.assert_not_called()
                    self.assertEqual(progress._told_apart(*folders, "l2:2"), apart)
                    places = [str(folder / "evaluation") for folder in folders]
                    load.assert_called_once_with(places, "l2:2")
                    load.side_effect = ValueError("other images")
                    self.assertFalse(progress._told_apart(*folders, "l2:2"))


class CostsTest(parameterized.TestCase):
    def test_autoattack_counts_in_each_threat(self):
        for flags, threats in (
            ((), 0),
            (("--threat linf:1 --threat l2:1", "--threat l1:1"), 3),
            (("--attack pgd-20 --threat linf:1", "--threat l2:1"), 1),
            (("--worst_case",), 3),
            (("--worst_case", "--threat l2:1"), 4),
            (("--attack clean", "--corruptions all"), 0),
        ):
            with self.subTest(row=(flags, threats)):
                file = Path(self.create_tempdir().full_path) / "new" / "estimates.jsonl"
                found = (2.0, 0.5)
                with (
                    mock.patch.object(lines.Run, "load", return_value=tiny()),
                    mock.patch.object(costs.account, "hours", return_value=found) as account,
                ):
                    ((_, cost),) = costs.of_runs(
                        [run("a", flags=flags)], TARGET, utilisation=0.3, file=file
                    )
                self.assertEqual(cost, RunCost(2.0, threats * 0.5))
                self.assertEqual(cost.hours, 2.0 + threats * 0.5)
                self.assertEqual(account.call_args.kwargs, {"utilisation": 0.3})
                self.assertEqual(account.call_args.args[1], TARGET)
                (line,) = map(json.loads, file.read_text().splitlines())
                self.assertEqual((line["training"], line["autoattack"]), (2.0, 0.5))

    def test_what_changes_a_cost_changes_the_key(self):
        def key(target=TARGET, utilisation=0.3, **changes):
            return costs._key(tiny(**changes), target, utilisation)

        own = key()
        for changes in (
            {"seed": 9},
            {"train__lr": 0.5},
            {"train__weight_decay": 0.5},
            {"train__ema_decay": 0.1},
            {"log__every_steps": 99},
            {"label_smoothing": 0.2},
            {"pretrain__lr": 1.0},
        ):
            self.assertEqual(key(**changes), own, changes)
        for changes in (
            {"train__epochs": 9},
            {"train__batch_size": 32},
            {"pretrain__epochs": 1},
            {"model__image_size": 16},
            {"attack__steps": 7},
            {"evaluation__steps": 9},
            {"test__steps": 9},
            {"utilisation": 0.4},
            {"target": devices.target("v5e:4x8")},
        ):
            self.assertNotEqual(key(**changes), own, changes)
        # A phase of no epochs costs nothing, whatever else it says.
        none = {"pretrain__epochs": 0}
        self.assertEqual(key(**none), key(**none, pretrain__batch_size=32))
        with mock.patch.object(costs, "__version__", "another"):
            self.assertNotEqual(key(), own)
        self.assertLen(own, len(hashlib.sha256().hexdigest()) // 4)


class ProgressTest(parameterized.TestCase):
    def states(self, priced, budget, states=None, decided=()):
        known = {own.folder: PLANNED for own, _ in priced} | (states or {})
        with (
            mock.patch.object(progress.tables, "tables", return_value=[]),
            mock.patch.object(progress, "_cells", return_value=(1, 2)),
            mock.patch.object(progress, "_state", lambda own, cells, root: known[own.folder]),
            mock.patch.object(progress, "apart", return_value=set(decided)),
        ):
            steps = progress.in_order("p", priced, [], root=Path(), budget=budget)
        self.assertEqual([step.planned for step in steps], [own for own, _ in priced])
        return [step.state for step in steps]

    def test_what_is_refused_takes_with_it_all_that_needs_it(self):
        no = RunCost(0, 0, "no")
        priced = [(run("a", rows=0), no), (run("b", needs=["a"]), RunCost(1, 0)),
                  (run("c", needs=["b"]), RunCost(1, 0)), (run("d"), RunCost(1, 0))]  # fmt: skip
        self.assertEqual(self.states(priced, 1), [REFUSED] * 3 + [PLANNED])
        self.assertEqual(self.states(priced, 0.5), [REFUSED] * 3 + [BEYOND])
        done = self.states(priced, None, {"runs/b": DONE})
        self.assertEqual(done, [REFUSED, DONE, PLANNED, PLANNED])

    def test_a_budget_is_spent_to_the_last_hour(self):
        start = run("start", rows=0)
        runs_here = [start, run("a", needs=["start"]), run("b", needs=["start"]), run("c")]
        hours = [RunCost(2, 0), RunCost(1, 1), RunCost(1, 0), RunCost(1, 0)]
        priced = list(zip(runs_here, hours, strict=True))
        for budget, states in (
            (6, [PLANNED] * 4),
            (5, [PLANNED, PLANNED, PLANNED, BEYOND]),
            (4, [PLANNED, PLANNED, BEYOND, BEYOND]),
            (3, [PLANNED, BEYOND, PLANNED, BEYOND]),
            (2, [BEYOND, BEYOND, BEYOND, PLANNED]),
            (0.5, [BEYOND] * 4),
        ):
            self.assertEqual(self.states(priced, budget), states, budget)
        # A start that nobody needs any more is not paid; one that is done costs nothing.
        done = {"runs/start": DONE}
        expected = [DONE, PLANNED, BEYOND, BEYOND]
        self.assertEqual(self.states(priced, 2, done), expected)

    def test_state(self):
        for cells, begun, state in (
            ((2, 2), True, DONE), ((1, 2), True, BEGUN), ((0, 0), True, BEGUN),
            ((1, 2), False, PLANNED), ((0, 0), False, PLANNED), ((2, 2), False, DONE),
        ):  # fmt: skip
            with self.subTest(row=(cells, begun, state)):
                root = Path(self.create_tempdir().full_path)
                own = run("a")
                if begun:
                    (root / own.folder).mkdir(parents=True)
                    (root / own.folder / "config.json").write_text("{}")
                self.assertEqual(progress._state(own, cells, root), state)


class PageTest(parameterized.TestCase):
    def test_lines(self):
        places = (RowPlace("table_1", 0), RowPlace("table_2", 4), RowPlace("table_1", 2))
        steps = [
            PlannedStep(run("start", rows=0), RunCost(1000, 0), PLANNED, (0, 0)),
            PlannedStep(run("b", needs=["start", "a"])._replace(rows=places), RunCost(2, 0.25),
                        BEGUN, (1, 3)),
            PlannedStep(run("c"), RunCost(3, 0), APART, (0, 2)),
            PlannedStep(run("e"), RunCost(0, 0, "no"), REFUSED, (0, 1)),
            PlannedStep(run("f"), RunCost(0, 0, "no"), REFUSED, (0, 1)),
        ]  # fmt: skip
        head, *_ = text = answer.text(steps, "p", TARGET, 0.25, None).splitlines()
        self.assertEqual(head, "p on v5e:8x8 (64 x TPU v5e), at an assumed 25% of the peak")
        self.assertEqual(
            text[1],
            "5 runs, of which 0 are done; records fill 1 of the 7 cells of their rows; McNemar's "
            "test already separates 1 from what they are compared with",
        )
        self.assertEqual(text[2], "2 remaining runs: 1,002 hours, 64,144 chip-hours")
        self.assertEqual(
            text[5:],
            [
                "1,000.0  1,000.0  start  planned  a start",
                "    2.2  1,002.2  b      begun    table_1 1, 3; table_2 5 (after start, a)",
                "    3.0           c      apart    table_1 1",
                "      -           e      refused  table_1 1",
                "      -           f      refused  table_1 1",
                "refused: no",
            ],
        )
        beyond = [step._replace(state=BEYOND) for step in steps[1:3]]
        said = answer.text(beyond, "p", TARGET, 0.25, 9.0).splitlines()
        self.assertEqual(said[1][:29], "2 runs, of which 0 are done; ")
        self.assertEndsWith(said[2], ", within a budget of 9 hours; 2 runs exceed it")


class ScriptsTest(parameterized.TestCase):
    def test_generations(self):
        """Each behind all it needs, as far as these are to be made."""
        steps = [
            PlannedStep(run(name, needs=needs), RunCost(1, 0), PLANNED, (0, 1))
            for name, needs in (
                ("a", []), ("b", ["a"]), ("c", ["b"]), ("d", ["a", "c"]), ("e", ["done"]),
                ("f", ["a"]),
            )
        ]  # fmt: skip
        levels = answer._levels(steps)
        names = [[step.planned.folder.removeprefix("runs/") for step in level] for level in levels]
        self.assertEqual(names, [["a", "e"], ["b", "f"], ["c"], ["d"]])
        self.assertEqual(answer._levels([]), [])

    def test_each_generation_waits_for_the_one_before_it(self):
        folder = Path(self.create_tempdir().full_path, "a b", "new")
        steps = [PlannedStep(run(name, needs=needs, flags=("--attack x", "--attack y")),
                             RunCost(1, 0), state, (0, 1))
                 for name, needs, state in (("a", [], PLANNED), ("b", ["a"], BEGUN),
                                            ("c", ["b"], PLANNED), ("d", [], REFUSED),
                                            ("e", [], APART))]  # fmt: skip
        paths = answer.write_scripts(steps, folder, "jaxrobust plan p")
        names = [
            "runs.sh",
            "array.sbatch",
            *(f"generation-{n}.txt" for n in (1, 2, 3)),
            "submit.sh",
        ]
        self.assertEqual([path.name for path in paths], names)
        submit = (folder / "submit.sh").read_text()
        jobs = [line for line in submit.splitlines() if line.startswith("job=")]
        waits = [" --dependency=afterok:$job " in job for job in jobs]
        self.assertEqual(waits, [False, True, True])
        for number, job in enumerate(jobs, 1):
            self.assertEndsWith(job, f"'{folder}/array.sbatch' '{folder}/generation-{number}.txt')")
        self.assertIn("# Made by `jaxrobust plan p`.", submit)
        one = (folder / "generation-2.txt").read_text()
        self.assertEqual(
            one,
            "jaxrobust train --config configs/b.py:x && jaxrobust evaluate --workdir runs/b "
            "--attack x && jaxrobust evaluate --workdir runs/b --attack y\n",
        )
        pod = (folder / "runs.sh").read_text()
        self.assertEqual(pod.count(" || exit\n"), 3)
        for path in (paths[0], paths[-1]):
            self.assertEqual(path.stat().st_mode & 0o777, 0o755)


class RunsTest(parameterized.TestCase):
    def test_tables_of_claims_come_first_in_their_order(self):
        order = runs.CLAIMS["xcit_light_recipe"]
        planned = runs.of_paper("xcit_light_recipe")
        first = [each.rows[0].table for each in planned if each.rows]
        places = [order.index(name) if name in order else len(order) for name in first]
        self.assertEqual(places, sorted(places))
