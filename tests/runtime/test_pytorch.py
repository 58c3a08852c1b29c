"""The core and the room `pytorch`: neither training nor evaluation loads it without `torch:`."""

import subprocess
import sys

from absl.testing import absltest

from tests.support import paths

CODE = """
import sys

import jaxrobust.publish.export_torch
import jaxrobust.evaluation.questions.command
import jaxrobust.training.run.run
from jaxrobust.config import of_phase, phases
from jaxrobust.runtime.commandline.arguments import load_config
from jaxrobust.training import build

config = load_config("quickstart")
for name in phases(config):
    build.phase(of_phase(config, name), name, examples=10_000)
print(*(name.removeprefix("jaxrobust.") for name in sys.modules))
"""
# Of the room; all commands may look into its `names.py`.
NAMES = {"pytorch", "pytorch.names"}


class PyTorchTest(absltest.TestCase):
    def test_other_networks_load_nothing_of_the_room(self):
        done = subprocess.run(
            [sys.executable, "-c", CODE], cwd=paths.ROOT, capture_output=True, text=True, check=True
        )
        loaded = done.stdout.split()
        self.assertIn("models.interface.foreign", loaded)
        self.assertEmpty([n for n in loaded if n.startswith("pytorch.") and n not in NAMES])
