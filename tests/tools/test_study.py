"""The study on CIFAR-10: its budgets, what is done, and its table."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from configs import (
    aligned_study,
    augmentation_study,
    cifar_study,
    norms_study,
    objectives_study,
    residual_study,
    stem_study,
)
from jaxrobust.config import of_phase, phases
from jaxrobust.evaluation.records import verdicts
from jaxrobust.papers.tables import tables
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
    @parameterized.parameters(*cifar_study.RUNS, cifar_study.CONTROL)
    def test_costs_the_same(self, run):
        self.assertAlmostEqual(units(cifar_study.get_config(run)), 30, delta=1)

    def test_differs_in_one_answer(self):
        self.assertEqual(cifar_study.get_config("patch").model.name, "convnext_n")
        self.assertEqual(phases(cifar_study.get_config("random")), ["train"])
        self.assertEqual(cifar_study.get_config("one-step").attack.steps, 1)
        self.assertEqual(cifar_study.get_config("heavy").mixup.cutmix, 1.0)
        self.assertEqual(phases(cifar_study.get_config("low-first")), ["pretrain", "low", "train"])
        self.assertEqual(cifar_study.get_config("base,seed=1").seed, 1)

    @parameterized.parameters(*objectives_study.RUNS)
    def test_objectives_cost_as_many_passes(self, run):
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

    @parameterized.parameters(*(p.name for p in (study.ROOT / "tools/records").glob("*_study")))
    def test_readme_shows_the_records(self, name):
        text = (study.ROOT / "tools" / "README.md").read_text()
        said = study.table(study.ROOT / "tools/records" / name, study.study(name))
        rows, _, _ = said.partition("\n\n")
        self.assertIn(rows, text)
        self.assertNotIn("not yet measured", rows)

    def test_one_seed(self):
        code, commands = self.run_study(Path(self.create_tempdir()), "--seed=1")
        self.assertEqual(code, 0)
        self.assertLen(commands, 2 * len(cifar_study.RUNS))
        self.assertEqual(commands[0], ("jaxrobust.main", "base-1"))

    def test_the_paper_is_quoted_for_every_run(self):
        for name in (n for n in study.STUDIES if n != "augmentation_study"):
            found = study.study(name)
            self.assertCountEqual(found.PAPER, found.RUNS[1:])
        self.assertContainsSubset(augmentation_study.PAPER, augmentation_study.RUNS)

    def test_the_worst_case_quoted_is_of_this_order_and_patch(self):
        """PVTv2 with patches of 2 beside the paper's PVTv2 with patches of 2."""
        rows = [
            row
            for table in tables.tables("twenty_architectures")
            for row in table.rows
            if row.get("worst_case") is not None and row["objective"] == "adversarial"
        ]

        def found(run):
            model = aligned_study.get_config(run).model
            own = {k: v for k, v in model.options.items() if k in ("order", "patch")}
            return {
                r["worst_case"] for r in rows if (r["model"], r["options"]) == (model.name, own)
            }

        (base,) = found("resnet")
        for run, said in aligned_study.PAPER.items():
            with self.subTest(run):
                self.assertEqual({f"{value} instead of {base}" for value in found(run)}, {said})

    def test_readme_claims_no_order_that_the_figures_lack(self):
        text = (study.ROOT / "tools" / "README.md").read_text()
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

    def test_a_study_of_one_seed(self):
        out = Path(self.create_tempdir())
        for run in residual_study.RUNS:
            folder = out / f"{run}-0" / "evaluation"
            folder.mkdir(parents=True)
            write_records(folder / "results.jsonl", ["linf"], method=residual_study.METHOD)
        said = study.table(out, residual_study)
        self.assertIn("| run | clean, seed 0 | robust, seed 0 | the paper |", said)
        self.assertIn("| robust | 50.0 | 25.0 | 54.42 instead of 51.66 |", said)

    def test_three_norms_of_five_seeds(self):
        out = Path(self.create_tempdir())
        for run in stem_study.RUNS:
            for seed in stem_study.SEEDS:
                folder = out / f"{run}-{seed}" / "evaluation"
                folder.mkdir(parents=True)
                fooled = [0] * (run == "pgd")
                write_records(
                    folder / "results.jsonl", ("linf", "l2", "l1"), fooled, stem_study.METHOD
                )
        study.write_pairs(out, stem_study)
        said = study.table(out, stem_study)
        self.assertIn("| convstem | 50.0 (50.0 to 50.0) |" + " 25.0 (25.0 to 25.0) |" * 3, said)
        said = study.paired_table(out, stem_study)
        alike = "+0.0, +0.0, +0.0, +0.0, +0.0 | +0.0 (+0.0 to +0.0) | 1, 1, 1, 1, 1 |"
        self.assertIn(f"| patchstem | convstem | l1:12 | {alike}", said)
        lost = "-12.5, -12.5, -12.5, -12.5, -12.5 | -12.5 (-12.5 to -12.5) | 1, 1, 1, 1, 1 |"
        self.assertIn(f"| pgd | convstem | linf:8/255 | {lost}", said)

    def test_union_and_start(self):
        out, commands = Path(self.create_tempdir()), []
        with mock.patch.object(
            study.subprocess,
            "run",
            lambda c, **unused: commands.append(c) or mock.Mock(returncode=0),
        ):
            for run in norms_study.RUNS:
                folder = out / f"{run}-0" / "evaluation"
                folder.mkdir(parents=True)
                args = mock.Mock(study="norms_study", out=out, data_dir=None)
                self.assertTrue(study._made(args, run, 0, float("inf")))
                path = folder / "results.jsonl"
                write_records(path, ("linf", "l2", "l1"), method=norms_study.METHOD)
                three = path.read_text()
                write_records(path, ["union"], fooled=[0] * (run == "linf"), method="union")
                path.write_text(three + path.read_text())
        starts = [word for c in commands for word in c if "init.weights" in word]
        self.assertEqual(starts, [f"--config.init.weights={out / 'linf-0'}"] * 2)
        threats = [word for word in commands[-1] if "threat" in word]
        self.assertEqual(threats, [f"--threat={threat}" for threat in norms_study.THREATS])
        self.assertEqual(
            [r.method for r in study.attacked(out / "e-at-0", norms_study)][-1], "union"
        )
        study.write_pairs(out, norms_study)
        paired = study.paired_table(out, norms_study)
        self.assertIn("| e-at | linf | union | +12.5 |", paired)
        self.assertIn("| e-at | linf-more | union | +0.0 |", paired)
        self.assertIn("| mean of the union | the paper |", study.table(out, norms_study))

    def test_interval_is_students(self):
        self.assertEqual(study.interval([1.0, 2.0, 3.0]), "+2.0 (-0.5 to +4.5)")  # 4.303 / 3^0.5
        self.assertEqual(study.interval([1.0, 2.0]), "+1.5")

    def test_ends_are_compared_with_their_own_base(self):
        self.assertEqual(study.against(augmentation_study, "heavy-rate"), ("base-rate",))
        self.assertEqual(study.against(augmentation_study, "cutmix"), ("base",))
        self.assertEqual(study.against(augmentation_study, "base-rate"), ())
        self.assertEqual(study.against(norms_study, "e-at"), ("linf", "linf-more"))

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


if __name__ == "__main__":
    absltest.main()
