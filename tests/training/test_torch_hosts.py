"""Several hosts train a PyTorch module of which one alone has PyTorch."""

import contextlib
import re
from pathlib import Path

import pytest
from absl.testing import absltest
from safetensors.torch import save_file

from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.runtime import pytorch
from tests.support import paths
from tests.support.processes import start, wait
from tests.support.runs import tiny, write_config
from tools import bench_resume

torch = pytest.importorskip("torch", reason=paths.PARITY)

NETS = """
from torch import nn


def build(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
"""
# As on a machine where nobody installed it: Python's own search does not find it.
WITHOUT = """
import os
import sys
from importlib.machinery import PathFinder


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm"):
            return None
        return super().find_spec(name, path, target)


if os.environ.get("JAX_PROCESS_ID", "0") in os.environ["WITHOUT_PYTORCH"]:
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
# What `jaxrobust train` does; each host says what it trains, whenever it saves.
TRAINING = """
import hashlib, sys
import numpy as np
from jaxrobust.__main__ import run
from jaxrobust.weights.store import checkpoint

save = checkpoint.Checkpoints.save

def saved(self, step, state, *given, **named):
    params = getattr(state, "params", None)
    if params is not None:
        digest = hashlib.sha256()
        for name in sorted(params):
            digest.update(np.asarray(params[name].addressable_data(0)).tobytes())
        print(f"holds {step} {digest.hexdigest()}", file=sys.stderr)
    return save(self, step, state, *given, **named)

checkpoint.Checkpoints.save = saved
run("train")
"""


@pytest.mark.slow
class HostsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "nets.py").write_text(NETS)
        (self.folder / "path").mkdir()
        (self.folder / "path" / "sitecustomize.py").write_text(WITHOUT)

    def trained(self, workdir: str, without: str, **changes) -> tuple[list[int], list[str]]:
        """Two steps on two hosts; exit codes and what they said."""
        changes = {"pretrain__epochs": 0, "train__epochs": 1, "train__warmup_epochs": 0} | changes
        config = tiny(data__train_split="train[:128]", test__steps=1, **changes)
        with config.unlocked():
            config.model.name = f"torch:{self.folder / 'nets.py'}:build"
            config.model.options = {}
        write_config(self.folder / "config.py", config)
        given = [
            "--multihost",
            f"--config={self.folder / 'config.py'}",
            f"--workdir={self.folder / workdir}",
        ]
        path = f"{self.folder / 'path'}:{paths.ROOT}"
        hosts = start(
            2, 1, ["-c", TRAINING, *given], WITHOUT_PYTORCH=without or "none", PYTHONPATH=path
        )
        return wait(hosts)

    def held(self, said: list[str]) -> list[str]:
        return [re.findall("holds 2 [0-9a-f]{64}", text)[0] for text in said]

    def test_the_second_host_reads_what_the_first_writes(self):
        codes, said = self.trained("one", "1")
        self.assertEqual(codes, [0, 0], said)
        first, second = self.held(said)
        self.assertEqual(first, second)
        self.assertTrue(pytorch.has_programs(self.folder / "one" / pytorch.FOLDER))
        with self.subTest("as where both have PyTorch"):
            codes, said = self.trained("both", "")
            self.assertEqual(codes, [0, 0], said)
            self.assertEqual(self.held(said), [first, second])
            ends = (
                bench_resume.outcome(self.folder / k, phases=("train",)) for k in ("one", "both")
            )
            bench_resume.same(*ends, "a run of hosts of which one has PyTorch")

    def test_they_start_from_a_file(self):
        with contextlib.chdir(self.folder):
            own = torch_modules.build("torch:nets.py:build", num_classes=6, in_channels=1)
        save_file(own.state_dict(), self.folder / "own.safetensors")
        start = {"init__weights": str(self.folder / "own.safetensors"), "init__head": "fresh:5"}
        codes, said = self.trained("started", "1", **start)
        self.assertEqual(codes, [0, 0], said)
        self.assertEqual(*self.held(said))
        self.assertIn("2 newly initialized: 5.bias, 5.weight", said[0])

    def test_where_the_first_has_none(self):
        codes, said = self.trained("none", "01")
        self.assertEqual(codes, [2, 2], said)
        for text in said:
            self.assertRegex(
                text, "jaxrobust: model.name=torch:.* needs PyTorch to write the module"
            )
            self.assertNotIn("Traceback", text)
