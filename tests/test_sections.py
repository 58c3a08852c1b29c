"""The types of a config's sections name the keys that there are."""

from typing import Any, get_type_hints

from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from jaxrobust import sections
from jaxrobust.config import base, phase


def keys(section: Any) -> set[str]:
    return set(get_type_hints(section))


class SectionsTest(parameterized.TestCase):
    @parameterized.parameters(*sections.SECTIONS.items())
    def test_a_section(self, name, section):
        self.assertEqual(keys(section), set(base()[name]))

    def test_a_phase(self):
        self.assertEqual(keys(sections.PhaseSection), set(phase()))

    def test_the_whole(self):
        config = base()
        self.assertEqual(keys(sections.Config), set(config) - set(config.phases))
        ours = {name for name in set(config) - set(config.phases) if _is_section(config, name)}
        self.assertEqual(sections.SECTIONS.keys(), ours)
        for name, section in sections.SECTIONS.items():
            self.assertIs(get_type_hints(sections.Config)[name], section)


def _is_section(config: ConfigDict, name: str) -> bool:
    return isinstance(config[name], ConfigDict)


if __name__ == "__main__":
    absltest.main()
