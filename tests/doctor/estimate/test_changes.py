"""Which words of a command line change the config."""

import sys
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.doctor.estimate import changes
from tests.support import sweeps


class DividedTest(parameterized.TestCase):
    @sweeps.rows(
        ("quickstart --on cpu", "quickstart --on cpu", ""),
        ("--config.seed=1 quickstart --on cpu", "quickstart --on cpu", "--config.seed=1"),
        ("quickstart --config.seed 1 --on cpu", "quickstart --on cpu", "--config.seed 1"),
        # A negative number is a value, and a flag is none.
        ("quickstart --config.seed -1 --on cpu", "quickstart --on cpu", "--config.seed -1"),
        ("q --config.data.strict --on cpu", "q --on cpu", "--config.data.strict"),
        ("q --noconfig.data.strict --on cpu", "q --on cpu", "--noconfig.data.strict"),
        ("q --config.data.strict -on cpu", "q -on cpu", "--config.data.strict"),
        ("q --config.train.lr .5 -fast", "q -fast", "--config.train.lr .5"),
        ("q -config.seed=1 --on cpu", "q --on cpu", "-config.seed=1"),
        ("q --configs.seed=1", "q --configs.seed=1", ""),
    )
    def test_each_word_goes_to_one_side(self, words, own, changing):
        found = changes.divided(words.split())
        self.assertEqual(found, (own.split(), changing.split()))


class ConfiguredTest(absltest.TestCase):
    def test_absl_sees_the_config_and_its_changes_alone(self):
        known, seen = SimpleNamespace(value=mock.Mock()), []
        with (
            mock.patch.object(sys, "argv", ["estimate", "quickstart", "--on", "cpu", "--fast"]),
            mock.patch.object(changes.flags, "FLAGS", {"config": known}),
            mock.patch.object(changes.arguments, "parse", lambda argv: seen.append([*argv])),
        ):
            config = changes.configured("quickstart", ["--config.seed", "1"])
        self.assertEqual(seen, [["estimate", "--config=quickstart", "--config.seed", "1"]])
        self.assertIs(config, known.value.unlock())
