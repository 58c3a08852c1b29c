"""Flags as the fields of a dataclass: types, defaults, limits, and the same for absl."""

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags as absl_flags
from absl.testing import absltest, parameterized

from jaxrobust.__main__ import COMMANDS, module_of
from jaxrobust.commands.flags import shared
from jaxrobust.commands.flags.evaluation import EvaluateFlags
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.runtime.commandline import fields as flag_fields
from jaxrobust.runtime.commandline.arguments import mapping, number
from jaxrobust.runtime.commandline.fields import flag, read
from tests.support import sweeps
from tests.support.command_line import refused


@dataclass(frozen=True, kw_only=True)
class Example:
    """One field of each kind."""

    run: Path = flag("A run.", word=True, required=True)
    sizes: tuple[int, ...] = flag("Sides.", (), least=1)
    epsilon: float | None = flag("Radius.", reads=number)
    options: dict[str, Any] | None = flag("Row.", reads=mapping)
    batch_size: int = flag("Images.", 4, least=2)
    fast: bool = flag("Hurry.", False)
    attack: str = flag("Attack.", "pgd", choices=["pgd", "fgsm"])


class ReadTest(parameterized.TestCase):
    def test_defaults(self):
        found = read(Example, "A command.", ["there"])
        self.assertEqual(found, Example(run=Path("there")))
        self.assertEqual((found.sizes, found.batch_size, found.fast), ((), 4, False))

    def test_each_kind(self):
        words = ["there", "--sizes", "8", "16", "--epsilon=4/255", "--options={'a': 1}"]
        found = read(Example, "", [*words, "--batch-size=3", "--fast", "--attack=fgsm"])
        self.assertEqual((found.sizes, found.epsilon), ((8, 16), 4 / 255))
        self.assertEqual((found.options, found.batch_size), ({"a": 1}, 3))
        self.assertTrue(found.fast)
        self.assertEqual(found.attack, "fgsm")

    @sweeps.rows(
        ([], "run"),
        (["there", "--batch_size=1"], "--batch_size=1 must be at least 2"),
        (["there", "--sizes", "8", "0"], "--sizes=0 must be at least 1"),
        (["there", "--epsilon=four"], "--epsilon=four is not a number; write one, or a fraction"),
        (["there", "--options=3"], "--options=3 is not a dict"),
        (["there", "--batch_size=x"], "batch"),
        (["there", "--attack=square"], "square"),
        (["there", "--sise=3"], "--sise is not a flag"),
    )
    def test_refused(self, words, said):
        self.assertIn(said, refused(lambda: read(Example, "", words)))


@dataclass(frozen=True, kw_only=True)
class Absl:
    """What a command with a config has."""

    norm: str | None = flag("Norm.")
    n: int = flag("Images.", 7, least=1)
    threat: tuple[str, ...] = flag("Threats.", ())
    epsilon: float | None = flag("Radius.", reads=number)
    again: bool = flag("Anew.", False)


class AbslTest(absltest.TestCase):
    def given(self, *words: str, known: absl_flags.FlagValues | None = None) -> Absl:
        known = known or absl_flags.FlagValues()
        defined = {
            key: functools.partial(make, flag_values=known)
            for key, make in flag_fields._ABSL.items()
        }
        with (
            mock.patch.dict(flag_fields._ABSL, defined),
            mock.patch.object(absl_flags, "FLAGS", known),
        ):
            flag_fields.define(Absl)
            known(["command", *words])
            return flag_fields.given(Absl)

    def test_values(self):
        self.assertEqual(self.given(), Absl())
        found = self.given("--norm=l2", "--epsilon=1/2", "--threat=a", "--threat=b", "--again")
        self.assertEqual(found, Absl(norm="l2", epsilon=0.5, threat=("a", "b"), again=True))

    def test_refused(self):
        with self.assertRaisesRegex(ValueError, "--n=0 must be at least 1"):
            self.given("--n=0")

    def test_flags_of_another_command_are_defined_again(self):
        known = absl_flags.FlagValues()
        absl_flags.DEFINE_integer("n", 99, "Of another.", flag_values=known)
        absl_flags.DEFINE_string("of_it_alone", "kept", "Of another.", flag_values=known)
        self.assertEqual(self.given("--norm=l1", known=known), Absl(norm="l1"))
        self.assertEqual((known["n"].help, known["of_it_alone"].value), ("Images.", "kept"))


class SharedTest(parameterized.TestCase):
    def test_a_text_of_several_commands_stands_once(self):
        """A command that names another default changes that alone."""
        texts = {}
        for kind in (shared.NetworkFlags, shared.ImageFlags, shared.ThreatFlags):
            for field in fields(kind):
                texts[field.name] = field.metadata["about"].text
        for name, text in texts.items():
            self.assertStartsWith(text, shared.TEXTS[name][0].removesuffix("."))
        other = shared.shared("split", default="from the record").metadata["about"].text
        self.assertEqual(other, "Split, such as test[:1000]; default: from the record.")

    def test_evaluate_has_a_flag_for_all_that_it_is_given(self):
        flags = {field.name for field in fields(EvaluateFlags)}
        words = {"shipped", "users"}  # a word of the command line; what --points and --attack name
        threats = {"threat", "ladder", "radius_at"}  # become Threats
        self.assertSameElements(flags - threats | words, GivenFlags._fields)

    @sweeps.rows(*COMMANDS)
    def test_a_command_names_itself(self, name):
        """In the first lines of its help, as people type it."""
        path = Path(shared.__file__).parents[2] / (module_of(name)[10:].replace(".", "/") + ".py")
        head = " ".join(path.read_text().split('"""')[1].split("\n")[:4])
        self.assertIn(f"jaxrobust {name}", head)
