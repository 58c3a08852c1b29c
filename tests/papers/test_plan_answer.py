"""From flags to a plan: what is estimated, which records count, what is written."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import parameterized

from jaxrobust.papers.planning import answer


class AnswerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.run = Path(self.create_tempdir(), "begun")
        self.run.mkdir()
        (self.run / "config.json").write_text("{}")
        self.planned = [SimpleNamespace(folder=f) for f in (str(self.run), "runs/nowhere")]
        self.mocks = {}
        for place, name, value in (
            (answer.runs, "of_paper", self.planned),
            (answer.costs, "of_runs", iter(["priced"])),
            (answer.matching, "collect_checked", ["one", "two", "three"]),
            (answer.progress, "in_order", ["steps"]),
            (answer, "text", "the page"),
            (answer, "write_scripts", [Path("a.sh"), Path("b.sh")]),
        ):
            self.mocks[name] = self.enter_context(
                mock.patch.object(place, name, return_value=value)
            )
        doubts = {"one": "other config", "two": None, "three": "other config"}
        self.enter_context(mock.patch.object(answer.run_records, "other_config", doubts.get))

    def flags(self, **changes):
        known = {"paper": "p", "table": "2", "row": "3", "on": "v5e:8x8", "utilisation": 0.25}
        known |= {"budget": 9.0, "estimates": Path("e.jsonl"), "records": (Path("more"),)}
        return SimpleNamespace(**(known | {"write": None} | changes))

    def test_a_plan(self):
        text = answer.of(self.flags(), "typed")
        self.assertEqual(text, "the page\nnot counted: other config")  # each doubt once
        self.mocks["of_paper"].assert_called_once_with("p", "2", "3")
        target = self.mocks["of_runs"].call_args.args[1]
        self.assertEqual((target.name, target.chips), ("v5e:8x8", 64))
        how = self.mocks["of_runs"].call_args.kwargs
        self.assertEqual(how, {"utilisation": 0.25, "file": Path("e.jsonl")})
        self.mocks["collect_checked"].assert_called_once_with([self.run, Path("more")])
        self.assertEqual(
            self.mocks["in_order"].mock_calls,
            [mock.call("p", ["priced"], ["one", "two", "three"], root=Path(), budget=9.0)],
        )
        self.mocks["text"].assert_called_once_with(["steps"], "p", target, 0.25, 9.0)
        self.mocks["write_scripts"].assert_not_called()

    def test_a_whole_paper_names_the_runs_of_its_figures(self):
        more = [*self.planned, SimpleNamespace(folder="runs/figure")]
        self.mocks["of_paper"].side_effect = [self.planned, more]
        text = answer.of(self.flags(table=None, row=None), "typed")
        self.assertEndsWith(text, "\nfigures and text need 1 more run: --table figures")

    def test_what_is_here_is_not_assumed(self):
        said = "--on cpu is not a known chip; write, for example, v5e:8x8"
        with self.assertRaisesRegex(ValueError, said):
            answer.of(self.flags(on="cpu"), "typed")
