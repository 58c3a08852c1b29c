import importlib

import jax
from absl.testing import absltest, parameterized

from jaxrobust.training import build
from tools import refresh_configs


class ConfigsTest(parameterized.TestCase):
    @parameterized.parameters(*refresh_configs.names())
    def test_resolved_text_is_reviewed(self, name):
        self.assertEqual(
            refresh_configs.golden(name).read_text(),
            refresh_configs.resolved(name),
            "run `python tools/refresh_configs.py` and review the difference",
        )

    @parameterized.parameters(*refresh_configs.names())
    def test_builds(self, name):
        config = importlib.import_module(f"configs.{name}").get_config()
        for phase in ("pretrain", "train"):
            if config[phase].epochs:
                with jax.numpy_dtype_promotion("standard"):
                    built = build.phase(config, phase, 49_000, devices=jax.devices()[:1])
                self.assertGreater(built.total_steps, 0)

    @parameterized.parameters(*refresh_configs.names())
    def test_is_locked_and_says_what_it_reaches(self, name):
        module = importlib.import_module(f"configs.{name}")
        with self.assertRaises(AttributeError):
            module.get_config().train.epocs = 3
        self.assertIn(f"--config configs/{name}.py", module.__doc__)
        self.assertRegex(module.__doc__.lower(), "not yet measured|measured")


if __name__ == "__main__":
    absltest.main()
