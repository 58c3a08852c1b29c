"""Each flag of several words may have hyphens or underscores, and help shows it with the latter."""

import argparse
import contextlib
import functools
import importlib
import re
import sys
from unittest import mock

import grain  # noqa: F401  # defines flags, which absl must not see for the first time here
from absl import flags
from absl.testing import parameterized

from jaxrobust import __main__ as overview
from jaxrobust.commands import prepare
from jaxrobust.runtime.commandline import arguments
from tests.support.command_calls import with_config
from tests.support.command_line import refused

HYPHENS = re.compile(r"--\w+(?:-\w+)+")
# The words that make a command read its flags, where it has several sets of them; else none.
WORDS = {"prepare": [(name,) for name in prepare.COMMANDS], "estimate": [(), ("--target=65",)]}
ABSL = ("train", "evaluate", "doctor")
ROWS = [(name, words) for name in overview.COMMANDS for words in WORDS.get(name, [()])]
ROWS = [row for row in ROWS if row[0] not in ABSL]


@functools.cache
def parser_of(name: str, words: tuple[str, ...]) -> arguments.Arguments:
    """The parser of a command, which takes any words, and none that have to be there."""

    kept = []

    def keep(parser, *_):
        kept.append(parser)
        sys.exit()  # it is complete; the command has nothing to do

    main = importlib.import_module(overview.module_of(name)).main
    with (
        mock.patch.object(sys, "argv", [name, *words]),
        mock.patch.object(arguments.Arguments, "parse_args", keep),
        contextlib.suppress(SystemExit),
    ):
        main()
    return kept[0]


def several(action: argparse.Action) -> bool:
    return bool(action.option_strings) and "_" in action.dest


class SpellingsTest(parameterized.TestCase):
    def test_both_are_read_and_one_is_shown(self):
        for name, words in ROWS:
            with self.subTest(row=(name, words)):
                parser = parser_of(name, words)
                self.assertEqual(HYPHENS.findall(parser.format_help()), [])
                for action in parser._actions:
                    action.required, action.type, action.choices = False, None, None
                    action.nargs = action.nargs if action.option_strings else "*"
                for action in filter(several, parser._actions):
                    number = action.nargs if isinstance(action.nargs, int) else 1
                    values = ["3"] * (1 if action.nargs is None else number)
                    word = f"--{action.dest}"
                    with self.subTest(word):
                        self.assertIn(f"  {word}", parser.format_help())
                        own, other = (
                            vars(parser.parse_args([spelled, *values]))[action.dest]
                            for spelled in (word, word.replace("_", "-"))
                        )
                        self.assertEqual(own, other)
                        self.assertNotEqual(own, action.default)
                        twice = [word, *values, word.replace("_", "-"), *values]
                        said = refused(functools.partial(parser.parse_args, twice))
                        self.assertIn(f"{word} is given more than once", said)

    def test_of_more_than_ten_flags_the_usual_ones_are_shown(self):
        for name, words in ROWS:
            with self.subTest(row=(name, words)):
                parser = parser_of(name, words)
                own = [a for a in parser._actions if a.option_strings and a.dest != "help"]
                flags_of = [action.option_strings[0].removeprefix("--") for action in own]
                self.assertEqual(bool(parser.usual), len(flags_of) > 10)
                for usual in {"", parser.usual}:
                    page = parser.page(usual)
                    shown = re.findall(r"^  --(\w+)  ", page, re.MULTILINE)
                    self.assertCountEqual(shown, usual.split() or flags_of)
                    self.assertNotIn("[no]", page)

    def test_those_of_absl(self):
        for name in ABSL:
            with self.subTest(name=name), with_config(name) as module:
                own = flags.FLAGS.get_key_flags_for_module(module.__name__)
                self.assertEqual(HYPHENS.findall(flags.FLAGS.module_help(module.__name__)), [])
                for flag in own:
                    self.assertNotIn("-", flag.name)
                long = [flags.FLAGS[flag.name] for flag in own if "_" in flag.name]
                self.assertNotEmpty(long)
                for flag in long:
                    value = next(iter(getattr(flag.parser, "enum_values", [])), "3")
                    value = "false" if flag.boolean else value
                    read = []
                    for word in (flag.name, flag.name.replace("_", "-")):
                        flag.unparse()
                        arguments.parse([name, f"--{word}={value}"])
                        self.assertTrue(flag.present, word)
                        read.append(flag.value)
                    self.assertEqual(read[0], read[1])

    def test_all_commands_are_here(self):
        self.assertSameElements([name for name, _ in ROWS], {*overview.COMMANDS} - {*ABSL})
        known = [a.dest for row in ROWS for a in filter(several, parser_of(*row)._actions)]
        self.assertContainsSubset(["image_size", "allow_partial"], known)
        self.assertGreater(len(known), 20)
