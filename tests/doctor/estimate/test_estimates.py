"""Whole estimates for chips that are not here, page and JSON, as they were reviewed once.

`python -m tests.doctor.estimate.test_estimates` writes them again.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import parameterized

from tests.support import paths
from tests.support.commands import run_command

GOLDEN = paths.ROOT / "tests/golden/estimates"
IMAGENET = """
from jaxrobust.config import base


def get_config():
    config = base().unlock()
    config.model.update(name="convnext_n", options={"depths": (1,), "dims": (32,)})
    config.data.update(dir="/nowhere", augmentation="heavy")
    config.pretrain.epochs = 100
    return config
"""
NORMS = "--config.attack.norm=linf,l2 --config.attack.epsilon=4/255,2 --config.attack.mix=worst"
# Printed only where the compilers are not installed.
HINTS = (
    "; pip install 'jaxrobust[tpu-aot]' installs the compiler",
    "; tools/gpu/make_environment.py creates an environment that compiles for 1 to 8 GPUs",
)
WIDE = os.environ | {"COLUMNS": "100"}
ROWS = {
    "quickstart": "quickstart --on h100:8 --images 100 --robust 0.25 --utilisation 0.4 --price 2.5",
    "shared_state": "quickstart --on v5e:2x4 --fast --batch 3 --fsdp 0 "
    "--config.train.objective=trades --config.attack.start=random",
    "imagenet": "imagenet.py --on v5e:4x4 --fast --price 1.2",
    "halved_chips": "imagenet.py --on v7x:2x2x1 --fast --images 0 --config.train.batch_size=1020",
    "one_chip": f"imagenet.py --on v5e:1x1 --batch 64 --config.model.image_size=32 {NORMS}",
}


def prepare(folder: Path) -> Path:
    (folder / "imagenet.py").write_text(IMAGENET)
    return folder


class EstimatesTest(parameterized.TestCase):
    def assert_close(self, found, expected, where):
        self.assertIs(type(found), type(expected), where)
        if isinstance(expected, dict):
            self.assertEqual(found.keys(), expected.keys(), where)
            for key, value in expected.items():
                self.assert_close(found[key], value, f"{where}.{key}")
        elif isinstance(expected, list):
            self.assertLen(found, len(expected), where)
            for number, value in enumerate(expected):
                self.assert_close(found[number], value, f"{where}[{number}]")
        elif isinstance(expected, float):  # sums may add up in another order
            self.assertAlmostEqual(found, expected, delta=1e-9 * abs(expected), msg=where)
        else:
            self.assertEqual(found, expected, where)

    @parameterized.parameters(*ROWS)
    def test_page_and_json(self, name):
        folder = prepare(Path(self.create_tempdir()))
        code, out, err = run_command(
            ["estimate", *ROWS[name].split(), "--json"], folder, COLUMNS="100"
        )
        self.assertEqual(code, 0, err)
        *page, last = without_hints(out).splitlines()
        *expected, golden = without_hints((GOLDEN / f"{name}.txt").read_text()).splitlines()
        self.assertEqual(page, expected)
        self.assert_close(json.loads(last), json.loads(golden), name)


def without_hints(text: str) -> str:
    """Remove the hints, wherever lines break."""
    patterns = (r"\s+".join(map(re.escape, hint.split())) for hint in HINTS)
    return functools.reduce(lambda text, pattern: re.sub(pattern, "", text), patterns, text)


def write() -> None:
    for name, words in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "jaxrobust", "estimate", *words.split(), "--json"]
            done = subprocess.run(
                command,
                cwd=prepare(Path(folder)),
                capture_output=True,
                text=True,
                check=True,
                env=WIDE,
            )
        (GOLDEN / f"{name}.txt").write_text(done.stdout)


if __name__ == "__main__":
    write()
