"""From flags to a plan: what is estimated, which records count, what is written."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import parameterized

from jaxrobust.papers.planning import answer
from jaxrobust.results import key_sources
from jaxrobust.results.key_sources import ConfigKey


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
            (answer.scripts, "write", [Path("a.sh"), Path("b.sh")]),
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
        self.mocks["write"].assert_not_called()

    def test_what_is_here_is_not_assumed(self):
        with self.assertRaisesRegex(ValueError, "--on cpu is no chip that can be assumed"):
            answer.of(self.flags(on="cpu"), "typed")


class KeysTest(parameterized.TestCase):
    """What `jaxrobust why` shows of the keys of a config."""

    KEYS = (
        ConfigKey("train.lr", 0.5, "Table 1", False),
        ConfigKey("train.l1", 0.0, None, True),
        ConfigKey("train.epochs", 9, "section 4.2", True),
        ConfigKey("trainer", "x", None, False),
    )

    def names(self, name=None, everything=False):
        return [key.name for key in key_sources.chosen(self.KEYS, name, everything)]

    def test_which(self):
        every = [key.name for key in self.KEYS]
        self.assertEqual(self.names(), ["train.lr", "trainer"])
        self.assertEqual(self.names(everything=True), every)
        self.assertEqual(self.names("train"), every[:3])  # a section, with its defaults
        self.assertEqual(self.names("train.l1"), ["train.l1"])
        with self.assertRaisesRegex(ValueError, "train.l is no key of this config; did you mean"):
            self.names("train.l")

    def test_text(self):
        self.assertEqual(
            key_sources.text(self.KEYS, 80).splitlines(),
            [
                "train.lr      0.5: Table 1",
                "train.l1      0.0: a default",
                "train.epochs  9: section 4.2 (the default, as the main paper has it)",
                'trainer       "x": nothing says where it comes from',
            ],
        )
        lines = key_sources.text(self.KEYS[3:], 30).splitlines()
        self.assertEqual(lines[1][:6], " " * 6)
        self.assertLessEqual(max(map(len, lines)), 30)

    def test_text(self):
        self.assertEqual(
            key_sources.text(self.KEYS, 80).splitlines(),
            [
                "train.lr      0.5: Table 1",
                "train.l1      0.0: a default",
                "train.epochs  9: section 4.2 (the default, as the main paper has it)",
                'trainer       "x": nothing says where it comes from',
            ],
        )
        lines = key_sources.text(self.KEYS[3:], 30).splitlines()
        self.assertEqual(lines[1][:6], " " * 6)
        self.assertLessEqual(max(map(len, lines)), 30)

    def test_sources_of_a_file(self):
        file = self.create_tempfile("own.py", "SOURCES = {'a': 'Table 1'}\n").full_path
        self.assertEqual(key_sources.of_recipe(f"{file}:words"), {"a": "Table 1"})
        none = self.create_tempfile("none.py", "x = 1\n").full_path
        self.assertEqual(key_sources.of_recipe(none), {})

    def test_what_the_command_line_changes(self):
        for changed, own in (
            (("train",), ["train.lr", "train.steps"]),
            (("train.lr",), ["train.lr"]),
            (("train.l",), []),
            ((), []),
        ):
            with self.subTest(row=(changed, own)):
                config = {"train": {"lr": 0.5, "steps": 3}, "lr": 1}
                with (
                    mock.patch.object(key_sources, "plain", lambda config: config),
                    mock.patch.object(key_sources, "base", lambda: {"train": {"lr": 0.5}}),
                ):
                    keys = key_sources.of_config(config, {"*": "ours"}, changed)
                found = [key.name for key in keys if key.source == key_sources.COMMAND_LINE]
                self.assertEqual(found, own)
                self.assertEqual([key.default for key in keys], [True, False, False])
