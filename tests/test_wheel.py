"""The wheel alone, in a fresh environment and an empty folder: what the README says works there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from absl.testing import absltest
from PIL import Image

from tests.support import compiling, paths, servers

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "jaxrobust", "configs")
OWN_CONFIG = """
from jaxrobust.config import base


def get_config():
    config = base()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, in_channels=1)
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (32,)}
    config.data.update(name="digits", train_split="train", selection_split="test[:64]")
    config.data.update(test_split="test[:64]", augmentation="none")
    config.pretrain.update(epochs=0)
    config.train.update(epochs=3, batch_size=64, warmup_epochs=1, ema_decay=0.9)
    config.attack.update(epsilon=0.1, steps=2)
    config.evaluation.update(batch_size=64, steps=1)
    config.test.update(batch_size=64, steps=1)
    return config
"""


def built(folder: Path) -> Path:
    """The wheel, of a copy: setuptools leaves files next to what it builds."""
    for name in SOURCES:
        source, target = paths.ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels)]
    done = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True)
    if done.returncode:
        raise absltest.SkipTest(f"no wheel can be built here: {done.stderr[-300:]}")
    (wheel,) = wheels.glob("jaxrobust-*.whl")
    return wheel


def environment(folder: Path, wheel: Path) -> Path:
    """The programs of a new environment: the wheel, and the dependencies installed here.

    The line of a .pth file adds a folder without the .pth files in it, and so without the checkout
    that may be installed there.
    """
    venv.create(folder / "new", with_pip=False)
    programs = folder / "new" / "bin"
    command = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install"]
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # a checkout
    subprocess.run(
        [*command, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, env=own
    )
    (site,) = (folder / "new").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def figures(said: str) -> list[str]:
    """The lines with the accuracies that an evaluation prints."""
    return re.findall(r"^(?:clean|after pgd-2) +[\d.]+%$", said, re.MULTILINE)


@pytest.mark.slow
class WheelTest(absltest.TestCase):
    def run_here(self, *words: str, code: int = 0, **environment: str) -> str:
        """What a command in the empty folder prints."""
        own = ("PYTHONPATH", "JAX_", "XLA_", "HF_", "TFDS_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        kept |= {"PATH": f"{self.programs}:{kept['PATH']}", "JAX_PLATFORMS": "cpu"}
        # Not what XLA makes of programs is looked at here.
        kept |= {"XLA_FLAGS": compiling.FLAGS} | environment
        kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # the next process has all
        kept |= {"XDG_CACHE_HOME": str(self.empty.parent / "cache")}
        done = subprocess.run(
            words, cwd=self.empty, env=kept, capture_output=True, text=True, timeout=300
        )
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def test_everything(self):
        folder = Path(self.create_tempdir())
        self.programs = environment(folder, built(folder))
        self.empty = folder / "empty"
        self.empty.mkdir()

        where = self.run_here("python", "-c", "import jaxrobust; print(jaxrobust.__file__)")
        self.assertIn(str(folder / "new"), where)
        self.assertIn("train CONFIG", self.run_here("jaxrobust"))
        self.assertStartsWith(self.run_here("jaxrobust", "--version"), "jaxrobust 0.")

        words = ["jaxrobust", "train", "--config", "quickstart", "--config.data.name=nowhere"]
        self.assertIn("nowhere", self.run_here(*words, code=2))
        words = ["python", "-m", "jaxrobust.main", "--config", "configs/quickstart.py"]
        self.assertIn("nowhere", self.run_here(*words, "--config.data.name=nowhere", code=2))
        words = ["jaxrobust", "train", "--config", "xcit_s12", "--config.data.name=folder:nowhere"]
        self.assertIn("nowhere", self.run_here(*words, code=2))  # a recipe made of another one
        (self.empty / "own").mkdir()
        (self.empty / "own" / "mine.py").write_text(OWN_CONFIG.replace("epochs=0", "epocs=0"))
        said = self.run_here("jaxrobust", "train", "--config", "own/mine.py", code=2)
        wrong = "own/mine.py, line 11: unknown config key 'epocs'; did you mean 'epochs'?"
        self.assertEqual(said.strip().splitlines()[-1], f"jaxrobust: {wrong}")
        (self.empty / "own" / "mine.py").write_text(OWN_CONFIG)
        said = self.run_here("jaxrobust", "train", "--config", "own/mine.py")
        self.assertIn("digits, split test[:64]", said)
        self.assertIn("records: runs/mine/results.jsonl", said)
        self.run_here("jaxrobust", "report", "runs/mine")  # of templates, which the wheel holds
        self.assertIn("Training of mine", (self.empty / "runs/mine/report.html").read_text())

        run = ["--workdir", "runs/mine"]
        words = ["jaxrobust", "export", *run, "--layout", "module", "--out", "ship"]
        self.run_here(*words)
        attack = ["--epsilon", "0.1", "--attack", "pgd-2", "--n", "32"]
        ours = self.run_here("jaxrobust", "evaluate", *run, *attack)
        attack += ["--dataset", "digits", "--split", "test[:64]"]  # the run's
        words = ["jaxrobust", "evaluate", "--weights", "ship/convnext_n.pt", *attack]
        said = self.run_here(*words, "--model", "convnext_n", "--options", self.options())
        self.assertLen(figures(ours), 2)
        self.assertEqual(figures(said), figures(ours))
        self.comes_back_from_a_hub(attack, figures(ours))
        self.prepares_photographs()

    def comes_back_from_a_hub(self, attack: list[str], figures_of_the_run: list[str]):
        words = ["--workdir", "runs/mine", "--layout", "hub", "--out", "repository"]
        self.run_here("jaxrobust", "export", *words)
        server = servers.Server({})
        self.addCleanup(server.close)
        files = {path.name: path.read_bytes() for path in (self.empty / "repository").iterdir()}
        server.repository("me/robust", files)
        hub = {"HF_ENDPOINT": server.address}
        words = ["jaxrobust", "import", "hf://me/robust", "--out", "imported"]
        self.run_here(*words, **hub)
        self.assertNotEmpty(server.asked)
        said = self.run_here("jaxrobust", "evaluate", "--weights", "imported", *attack)
        self.assertEqual(figures(said), figures_of_the_run)
        words = ["certificate", "--weights", "imported", "--against", "ship/convnext_n.py"]
        self.assertIn("agree", self.run_here("jaxrobust", *words))

    def prepares_photographs(self):
        for split, many in (("train", 3), ("val", 2)):
            for colour in ("blue", "red"):
                (self.empty / "photos" / split / colour).mkdir(parents=True)
                for i in range(many):
                    path = self.empty / "photos" / split / colour / f"{i}.png"
                    Image.new("RGB", (8, 8), colour).save(path)
        words = ["prepare", "imagenet", "photos", "--name", "colours", "--out", "sets"]
        self.run_here("jaxrobust", *words)
        program = "from jaxrobust import data; print(*data.load('colors', split='val').classes)"
        self.assertEqual(
            self.run_here("python", "-c", program, TFDS_DATA_DIR="sets").split(), ["blue", "red"]
        )

    def options(self) -> str:
        return "{'stem_strides': (1,), 'depths': (1,), 'dims': (32,)}"
