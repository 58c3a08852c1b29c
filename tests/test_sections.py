"""A config has the keys that its sections list, of the types that they list."""

from typing import Any, get_type_hints

from absl.testing import parameterized
from ml_collections import ConfigDict

from jaxrobust import config as sections
from jaxrobust.config import base, phase

SECTIONS = {
    name: kind
    for name, kind in get_type_hints(sections.Config).items()
    if sections.Section in getattr(kind, "__mro__", ())
}


def keys(section: Any) -> set[str]:
    return set(get_type_hints(section))


class SectionsTest(parameterized.TestCase):
    def test_a_section(self):
        for name, section in SECTIONS.items():
            with self.subTest(row=(name, section)):
                self.assertEqual(keys(section), set(base()[name]))

    def test_a_phase(self):
        self.assertEqual(keys(sections.PhaseSection), set(phase()))

    def test_the_whole(self):
        config = base()
        self.assertEqual(keys(sections.Config), set(config) - set(config.phases))
        ours = {name for name in set(config) - set(config.phases) if _is_section(config, name)}
        self.assertEqual(SECTIONS.keys(), ours)

    def test_a_key_that_is_none_keeps_its_type(self):
        self.assertIs(phase().get_type("warmup_lr"), float)
        with self.assertRaises(TypeError):
            base().train.warmup_lr = "slow"

    def test_each_config_has_its_own_options(self):
        base().unlock().model.options.width = 32
        self.assertFalse(base().model.options)


def _is_section(config: ConfigDict, name: str) -> bool:
    return isinstance(config[name], ConfigDict)
