"""Networks of the papers from training to RobustBench's loader, on photographs at 64 px.

Every class of ImageNet has one photograph: its own for 200 of them, another class's for the rest.
Networks see eight of them, which they learn by heart: accuracies mean nothing here.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl.testing import absltest, parameterized

import jaxrobust
from jaxrobust.data.imagenet import synsets
from jaxrobust.evaluation.records import records
from tests.support import images, parity, paths, processes

try:
    import safetensors.torch
    import torch

    from jaxrobust.publish import references, torch_networks
except ImportError:
    torch = None

SIZE, IMAGES, EPOCHS = 64, 8, 24
SHORT = {"batch_size": IMAGES, "warmup_epochs": 1, "ema_decay": 0.5}
# Per network: timm's weights to start from (random ones), the RobustBench id, and the radius of
# AutoAttack in 1/255. At 4/255 most images withstand all attacks, which takes the longest.
NETWORKS = {
    "convnext_t_cvst": ("convnext_tiny", "Singh2023Revisiting_ConvNeXt-T-ConvStem", 4),
    "vit_s_cvst": ("vit_small_patch16_224", None, 4),  # RobustBench's takes 224 px alone
    "xcit_s12": (None, "Debenedetti2022Light_XCiT-S12", 4),
    # Neither timm nor RobustBench has it; its DCNv3 layers are slow on a CPU.
    "revisiting_at:internimage_t": (None, None, 32),
}


def photographs(folder: Path) -> None:
    """Link one photograph per class, and list those of the first classes with one of their own."""
    files = {path.parent.name: path for path in images.photographs(200)}
    others = list(files.values())
    for label, name in enumerate(synsets()):
        path = files.get(name, others[label % len(others)])
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / path.name).symlink_to(path)
    lines = [f"{name}/{path.name}\n" for name, path in files.items()]
    (folder / "few.txt").write_text("".join(lines[:IMAGES]))


@pytest.mark.slow
class SeedsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if not images.photographs(1):
            self.skipTest(paths.NO_SHARED)
        if torch is None:
            self.skipTest(paths.PARITY)
        self.folder = Path(self.create_tempdir())
        photographs(self.folder / "photographs")

    def train_words(self, config: str, weights: str | None, epochs: int = EPOCHS) -> list[str]:
        """Write the command that trains a paper's config, a few images per step."""
        name, _, arguments = config.partition(":")
        folder = self.folder / "photographs"
        data = {"name": f"folder:{folder}", "augmentation": "basic", "workers": 0}
        data |= dict.fromkeys(("selection_split", "test_split"), f"val@{folder}/few.txt")
        changes = {
            "model": {"image_size": SIZE, "dtype": "float32"},
            "data": data | {"train_split": f"train@{folder}/few.txt"},
            "init": {"weights": weights} if weights else {"weights": None, "stem": "keep"},
            "pretrain": SHORT | {"epochs": epochs if weights else 0},
            "train": SHORT | {"epochs": epochs},
            "evaluation": {"batch_size": IMAGES, "steps": 1, "every_epochs": epochs},
            "test": {"batch_size": IMAGES, "steps": 2},
            "checkpoint": {"every_epochs": epochs},
        }
        config = f"{paths.ROOT}/configs/{name}.py" + (arguments and f":{arguments}")
        flags = [f"--config.{s}.{k}={v}" for s, part in changes.items() for k, v in part.items()]
        flags += [f"--config.model.options.bn_group={IMAGES}"] * name.startswith("xcit")
        return ["train", "--config", config, "--workdir", "run", *flags]

    def call(self, *words: str) -> str:
        """Run a command in a process of its own, and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "jaxrobust", *words],
            cwd=self.folder,
            env=processes.environment(),
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, f"{done.stderr[-2000:]}\n{words}")
        return done.stdout + done.stderr

    def timm_file(self, name: str) -> str:
        """Write timm's network with random weights."""
        torch.manual_seed(0)
        net = torch_networks.import_timm().create_model(name)
        safetensors.torch.save_file(net.state_dict(), self.folder / "timm.safetensors")
        return str(self.folder / "timm.safetensors")

    def exported(self, robustbench_id: str | None) -> Any:
        """Export the run, and load it as RobustBench does, or as the module that it is."""
        layout = robustbench_id or "module"
        self.call("export", "--workdir", "run", "--layout", layout, "--out", "ship")
        if robustbench_id:
            return references.load_model(self.folder / "ship", robustbench_id)
        (file,) = (self.folder / "ship").glob("*.py")
        spec = importlib.util.spec_from_file_location("shipped", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.load()

    @parameterized.parameters(*NETWORKS)
    def test_from_training_to_pytorch(self, config):
        timm_name, robustbench_id, radius = NETWORKS[config]
        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        weights = self.timm_file(timm_name) if timm_name else None
        printed = self.call(*self.train_words(config, weights))
        if weights:
            self.assertIn("pretrain: step 0 of 24, clean", printed)
        self.assertIn("train: step 0 of 24, ", printed)

        threat = f"linf:{radius}/255"
        self.call("evaluate", "--workdir", "run", "--n", str(IMAGES), "--threat", threat)
        (record,) = records.read(self.folder / "run" / "evaluation")
        self.assertEqual((record.method, record.image_ids), ("autoattack standard", "0..7"))
        self.assertGreater(record.clean, 0)  # else there is nothing to attack

        pixels = np.random.default_rng(0).random((2, SIZE, SIZE, 3), np.float32)
        with torch.no_grad():
            inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            torch_logits = self.exported(robustbench_id)(inputs).numpy()
        logits = jaxrobust.load(self.folder / "run").logits_fn(pixels)
        # float32, other orders of the sums
        self.assertLess(parity.relative(torch_logits, logits), 1e-5)

    def losses(self, number: int, devices: int, *flags: str, killed: bool = False) -> list[float]:
        """Train in so many processes, kill the second one on request, and start all again."""
        weights = self.timm_file("vit_small_patch16_224")
        words = self.train_words("vit_s_cvst", weights, epochs=4)
        words += ["--config.log.every_steps=1", *flags, *["--multihost"] * (number > 1)]
        words[words.index("run")] = str(self.folder / "run")
        if killed:
            pod = processes.start(number, devices, ["-m", "jaxrobust", *words])
            while not (self.folder / "run" / "metrics.jsonl").exists():
                self.assertIsNone(pod[0].poll())
                time.sleep(0.1)
            pod[1].kill()
            codes, _ = processes.wait(pod, 600)
            self.assertNotEqual(codes[0], 0)
        codes, said = processes.wait(
            processes.start(number, devices, ["-m", "jaxrobust", *words]), 3000
        )
        self.assertEqual(codes, [0] * number, said)
        rows = map(json.loads, (self.folder / "run" / "metrics.jsonl").read_text().splitlines())
        steps = [row for row in rows if "loss" in row]
        self.assertEqual([row["step"] for row in steps], [1, 2, 3, 4] * 2)
        shutil.rmtree(self.folder / "run")
        return [row["loss"] for row in steps]

    def test_parallel_runs(self):
        expected = self.losses(1, 1)
        for found in (self.losses(1, 8, "--config.mesh.fsdp=2"), self.losses(2, 1, killed=True)):
            # float32, other orders of the sums
            self.assertAlmostEqual(found[0], expected[0], delta=1e-4 * expected[0])
            # AdamW divides gradients that are all rounding by their size: whole steps differ
            np.testing.assert_allclose(found, expected, rtol=1e-2)


if __name__ == "__main__":
    absltest.main()
