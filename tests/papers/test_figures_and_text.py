"""Experiments in the papers' figures and text: each is commands that work, or a sentence."""

import re
import shlex
from types import SimpleNamespace

import grain  # noqa: F401  # defines flags, which `flagsaver` must not see for the first time
from absl import flags
from absl.testing import flagsaver, parameterized

from jaxrobust import models
from jaxrobust.commands import evaluate  # noqa: F401  # defines its flags
from jaxrobust.commands.flags.evaluation import EvaluateFlags
from jaxrobust.config import NetworkSpec
from jaxrobust.doctor.config_checks import CONFIG_CHECKS, PlannedRun
from jaxrobust.doctor.findings import RED, examined
from jaxrobust.evaluation.questions import questions
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.models.published import PUBLISHED
from jaxrobust.papers import studies
from jaxrobust.papers.commands import analyse, figure, landscape, reproduce, scaling, sparsity
from jaxrobust.papers.networks import analyses
from jaxrobust.papers.planning import runs
from jaxrobust.papers.tables import documents, lines, tables
from jaxrobust.runtime.commandline import fields, threats
from tests.support import command_calls, paths
from tools.generate import refresh_configs

# Figures that the sheets of the papers name, and experiments of the text that no table has.
FIGURES = {
    "revisiting_at": {1, 3, 4, 5, 6, 7},
    "xcit_light_recipe": {1, 11, 12, 13, 14},
    "twenty_architectures": {1, 2, 3, 4},
    "robust_resnets": {1, 3, 4, 5, 6, 7, 8, 9, 10},
}
TEXT = {
    "revisiting_at": ("Appendix D.5",),
    "xcit_light_recipe": ("Section 4.1.9",),
    "twenty_architectures": ("Activations", "TRADES"),
    "robust_resnets": ("Figure 5c", "Figure 5d", "Figure 9c and d", "FGSM", "Tiny-ImageNet"),
}
# Where the sheets name figures: of paper_tables/README.md by the paper's seed, and of a sheet.
SHEETS = {
    "revisiting_at": ("000", "revisiting_at.md"),
    "xcit_light_recipe": ("002", "xcit_light_recipe.md"),
    "twenty_architectures": ("003", ""),
    "robust_resnets": ("004", ""),
}


def numbers(text: str) -> set[int]:
    """Return the numbers of the figures that a text names, such as "Figures 1 and 3 to 5"."""
    found = set[int]()
    for listed in re.findall(
        r"\b[Ff]ig(?:ures?|s?\.) ((?:\d\d?(?!\d)[a-d]?(?:, | and | to )?)+)", text
    ):
        found |= {int(number) for number in re.findall(r"\d+", listed)}
        for first, last in re.findall(r"(\d+)[a-d]? to (\d+)", listed):
            found |= {*range(int(first), int(last) + 1)}
    return found


class CommandsTest(parameterized.TestCase):
    """Each command is read by the parser and the checks of its own."""

    @parameterized.parameters(*tables.PAPERS)
    def test_every_command(self, paper):
        # Rows of the tables have the tests of theirs: tests/papers/test_lines.py.
        self.configs = {line.run.config for *_, line in lines.of_tables(paper) if line.run}
        self.folders: set[str] = set()
        for row in tables.figures(paper).rows:
            line = lines.of_row(row)
            self.assertTrue(line.texts() or line.why, row["name"])
            self.assertRegex(line.why, r"^$|\.$")
            for run in line.runs:
                self.folders.add(run.workdir)
            for text in line.texts():
                with self.subTest(text):
                    program, name, *words = shlex.split(text)
                    self.assertEqual(program, "jaxrobust")
                    getattr(self, name)(words)

    @parameterized.parameters(*FIGURES.items())
    def test_none_is_missing(self, paper, wanted):
        names = [row["name"] for row in tables.figures(paper).rows]
        self.assertEqual(set().union(*map(numbers, names)), wanted)
        for name in TEXT[paper]:
            self.assertTrue(any(each.startswith(name) for each in names), name)

    @parameterized.parameters(*SHEETS.items())
    def test_figures_of_the_sheets(self, paper, where):
        folder = paths.SHARED / "reference"
        if not folder.is_dir():
            self.skipTest(paths.NO_SHARED)
        seed, sheet = where
        text = (folder / "paper_tables" / "README.md").read_text()
        named = "".join(re.findall(rf"^- Seed {seed}: .*|^\d. Seed {seed}, .*", text, re.M))
        named += (folder / "paper_tables" / f"{paper}.json").read_text()
        named += (folder / sheet).read_text() if sheet else ""
        self.assertContainsSubset(numbers(named), FIGURES[paper])

    def train(self, words):
        flag, text = words
        file, _, arguments = text.removeprefix("configs/").partition(":")
        self.assertEqual(flag, "--config")
        name = f"{file.removesuffix('.py')}:{arguments}"
        if name in self.configs:
            return
        self.configs.add(name)
        config = refresh_configs.load(name)
        model = config.model
        sizes = {"num_classes": model.num_classes, "image_size": model.image_size}
        row = models.variant(model.name, **model.options)
        models.family(model.name).maker(row, **sizes)  # refuses options and values
        found = examined(CONFIG_CHECKS, PlannedRun(config, 8))
        self.assertNotIn(RED, {one.result.level for one in found})

    def evaluate(self, words):
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            _, *target = flags.FLAGS(["evaluate", *words])
            asked = fields.given(EvaluateFlags)
        if target:
            self.assertIn(target[0], PUBLISHED)
            self.folders.add(asked.out)
        else:
            self.assertIn(asked.workdir, self.folders)
            self.folders.add(f"{asked.workdir}/evaluation")
        if asked.worst_case:
            return
        side = 224 if asked.image_size or "light_recipe" in str(asked.workdir) else 32
        taken = ("attack", "steps", "targets", "step", "start", "relative_step", "n")
        question = GivenFlags(**{name: getattr(asked, name) for name in taken})
        source = SimpleNamespace(channels=3, where=lambda: "there", image_shape=(side, side, 3))
        self.assertNotEmpty(asked.threat)
        for text in asked.threat:
            for size in asked.image_size or [side]:
                ball = threats.grown(threats.parse(text), size / (asked.radius_at or size))
                spec = NetworkSpec("net", num_classes=10, image_size=size, in_channels=3)
                questions.check(question, Subject(spec).within(ball), source)

    def figure(self, words):
        asked = fields.read(figure.FigureFlags, "", words)
        self.assertContainsSubset(asked.records, self.folders)

    def analyse(self, words):
        asked = vars(fields.read(analyse.AnalyseFlags, "", words)).copy()
        named = {name: asked.pop(name) for name in analyse._NAMED}
        analyses.checked(asked, named)
        self.assertTrue(named["weights"] in PUBLISHED or named["weights"].endswith("_in1k"))

    def sparsity(self, words):
        self.assertIn(fields.read(sparsity.SparsityFlags, "", words).workdir, self.folders)

    def landscape(self, words):
        self.assertIn(fields.read(landscape.LandscapeFlags, "", words).workdir, self.folders)

    def scaling(self, words):
        asked = fields.read(scaling.ScalingFlags, "", words)
        self.assertNotEmpty(studies.study(asked.study, capacity=asked.capacity))

    def reproduce(self, words):
        asked = fields.read(reproduce.ReproduceFlags, "", words)
        self.assertLen(tables.tables(asked.paper, asked.table), 1)


class ShownTest(parameterized.TestCase):
    def test_they_stand_behind_the_tables(self):
        for paper in tables.PAPERS:
            text = documents.answer([], paper=paper, commands=True)
            behind = text.partition("## Figures and text: experiments outside the paper")[2]
            entries = tables.figures(paper).rows
            self.assertEqual(behind.count("\n- "), len(entries))
            self.assertIn(f"- {entries[0]['name']}: {entries[0]['caption']}\n", behind)

    def test_one_entry(self):
        only = {"paper": "robust_resnets", "table": "figures", "commands": True}
        text = documents.answer([], row="Figure 6", **only)
        self.assertIn("      jaxrobust scaling --study activation\n", text)
        self.assertNotIn("Figure 3", text)

    def test_messages(self):
        for words, message in (
            (["--paper", "robust_resnets", "--table", "figures"], "has no numbers .* add --comm"),
            (["--paper", "robust_resnets", "--table", "figure"], "did you mean figures?"),
        ):
            found = command_calls.words(reproduce.main, *words)
            self.assertRegex(found.error, message)

    @parameterized.parameters(*tables.PAPERS)
    def test_a_plan_of_them(self, paper):
        planned = runs.of_paper(paper, tables.FIGURES)
        wanted = {
            run.workdir for row in tables.figures(paper).rows for run in lines.of_row(row).runs
        }
        self.assertNotEmpty(wanted)
        self.assertContainsSubset(wanted, {each.folder for each in planned})
        for each in planned:
            places = {place.table for place in each.rows}
            self.assertEqual(places, {tables.FIGURES} if each.folder in wanted else set())
