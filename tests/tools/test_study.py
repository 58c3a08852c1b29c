"""The study on CIFAR-10: its budgets, what is done, and its table."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from configs import (
    aligned_study,
    cifar_study,
    objectives_study,
)
from jaxrobust.config import of_phase, phases
from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.training.update import objectives
from tools import study


def units(config) -> float:
    """The cost of a run: passes over the images, a quarter of one at half the resolution."""
    total = 0.0
    for name in phases(config):
        seen = of_phase(config, name)
        passes = 1 if seen[name].objective == "clean" else seen.attack.steps + 1
        total += seen[name].epochs * passes * (seen.model.image_size / 32) ** 2
    return total


def write_records(path: Path, norms, fooled=(), method="autoattack standard") -> None:
    """Records of a run in each norm, with verdicts on eight images of which two are robust."""
    lines = []
    for norm in norms:
        file = f"verdicts-{norm}.json"
        found = np.array(["", "", *["square"] * 6])
        found[list(fooled)] = "square"
        columns = [np.arange(8), np.zeros(8, int), found != "clean", found]
        columns += [np.zeros(8), np.full(8, -1)]
        verdicts.write(path.parent / file, norm, verdicts.Verdicts(*columns))
        row = {"weights": "train, step 3, ema", "method": method}
        row |= {"clean": 0.5, "robust": 0.25, "verdicts": file, "attacks": [{"norm": norm}]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


class ConfigTest(parameterized.TestCase):
    def test_costs_the_same(self):
        for run in (*cifar_study.RUNS, cifar_study.CONTROL):
            with self.subTest(run=run):
                self.assertAlmostEqual(units(cifar_study.get_config(run)), 30, delta=1)

    def test_objectives_cost_as_many_passes(self):
        for run in objectives_study.RUNS:
            with self.subTest(run=run):
                config = objectives_study.get_config(run)
                one = objectives.passes(config.train.objective, config.attack)
                self.assertEqual(config.train.epochs * one, 6 * 12)


class StudyTest(parameterized.TestCase):
    def run_study(self, out, *more, minutes="60", fails=()):
        """(exit code, commands) where commands write the records that they would."""
        commands = []

        def run(command, **unused):
            words = [word.partition("=") for word in command]
            workdir = Path(next(value for key, _, value in words if key == "--workdir"))
            commands.append((command[2], workdir.name))
            code = int(workdir.name in fails)
            if not code:
                folder = workdir / "evaluation" if "evaluate" in command[2] else workdir
                path = folder / "results.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_records(path, ["linf"])
            return mock.Mock(returncode=code)

        words = ["study.py", "--out", str(out), "--minutes", minutes, *more]
        with (
            mock.patch.object(study.subprocess, "run", run),
            mock.patch.object(study.sys, "argv", words),
            mock.patch("builtins.print"),
            self.assertRaises(SystemExit) as left,
        ):
            study.main()
        return left.exception.code, commands

    def test_goes_on_with_what_is_left(self):
        out = Path(self.create_tempdir())
        code, commands = self.run_study(out, fails=("patch-0",))
        self.assertEqual(code, 1)
        self.assertEqual(
            commands,
            [
                ("jaxrobust.main", "base-0"),
                ("jaxrobust.evaluate", "base-0"),
                ("jaxrobust.main", "patch-0"),
            ],
        )
        code, commands = self.run_study(out)
        self.assertEqual(code, 0)
        self.assertEqual(commands[0], ("jaxrobust.main", "patch-0"))
        self.assertLen(commands, 2 * 2 * len(cifar_study.RUNS) - 2)
        self.assertEqual(self.run_study(out), (0, []))
        said = study.table(out, cifar_study)
        self.assertIn("| one-step | 50.0, 50.0 | 25.0, 25.0 | 25.0 (+0.0) | 46.4 instead", said)

    def test_pages_show_the_records(self):
        text = "".join(p.read_text() for p in (study.ROOT / "docs/results").glob("*.md"))
        for name in (p.name for p in (study.ROOT / "tools/records").glob("*_study")):
            with self.subTest(name=name):
                folder, module = study.ROOT / "tools/records" / name, study.study(name)
                rows, _, _ = study.table(folder, module).partition("\n\n")
                self.assertIn(rows, text)
                self.assertNotIn("not yet measured", rows)
                if (folder / "pairs.jsonl").is_file():
                    self.assertIn(study.paired_table(folder, module).partition("\n\n")[0], text)

    def test_pages_show_the_records_of_augmentation(self):
        text = (study.ROOT / "docs/results/training_recipes.md").read_text()
        for run in (study.ROOT / "tools/records/augmentation_begun").glob("*/evaluation"):
            row = next(r for r in records.read(run) if r.method == "autoattack standard")
            found = rf"{100 * row.clean:.1f} \| {100 * row.robust:.1f} \|\n"
            self.assertRegex(text, rf"\| `{run.parent.name}` \| .* \| {found}")

    def test_pages_claim_no_order_that_the_figures_lack(self):
        text = (study.ROOT / "docs/results/architectures.md").read_text()
        kept = study.ROOT / "tools/records/aligned_study"
        means = {
            run: sum(
                study.attacked(kept / f"{run}-{seed}", aligned_study)[0].robust
                for seed in aligned_study.SEEDS
            )
            for run in aligned_study.PAPER
        }
        paper = {run: float(said.split()[0]) for run, said in aligned_study.PAPER.items()}
        ours, theirs = (sorted(each, key=each.get) for each in (means, paper))
        self.assertEqual(ours == theirs, "in the paper's order" in text)
        self.assertNotIn("The order is not the paper's", text)

    def test_interval_is_students(self):
        self.assertEqual(study.interval([1.0, 2.0, 3.0]), "+2.0 (-0.5 to +4.5)")  # 4.303 / 3^0.5
        self.assertEqual(study.interval([1.0, 2.0]), "+1.5")

    def test_begins_nothing_after_its_time(self):
        out = Path(self.create_tempdir())
        ticks = iter(range(0, 10**6, 100))  # of this module alone: other threads have clocks too
        with mock.patch.object(study, "time", mock.Mock(monotonic=ticks.__next__)):
            code, commands = self.run_study(out, minutes="5")
        self.assertEqual(code, 1)
        self.assertLen(commands, 3)
        self.assertIn("| base | 50.0, not yet measured |", study.table(out, cifar_study))
        self.assertEqual(self.run_study(out, minutes="0")[0], 2)

    def test_a_seed_that_the_study_has_not(self):
        said = io.StringIO()
        with (
            mock.patch("sys.argv", ["study.py", "--seed=4"]),
            contextlib.redirect_stderr(said),
            self.assertRaises(SystemExit) as left,
        ):
            study.main()
        self.assertEqual(left.exception.code, 2)
        self.assertIn("--seed 4: cifar_study has the seeds [0, 1]", said.getvalue())
