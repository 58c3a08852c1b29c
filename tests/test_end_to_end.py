"""The way of the paper in small, on CIFAR-10: clean, a new stem, against the attack, to PyTorch."""

import importlib.util
import re
from pathlib import Path

import pytest
from absl.testing import absltest

from jaxrobust.evaluation.records import records
from jaxrobust.publish import confirm
from tests.support import paths, result_lines
from tests.support.commands import run_command

CONFIG = """
from jaxrobust.config import base, phase


def get_config():
    config = base().unlock()
    size = {"depths": (1, 1), "dims": (32, 64)}
    config.model.update(name="convnext_n_cvst", num_classes=10, image_size=32)
    config.model.options = size | {"stem_widths": (16, 32)}
    config.data.update(name="cifar10", augmentation="crop-flip", train_split="train[:4000]")
    config.data.update(selection_split="train[49000:49200]", test_split="test[:256]")
    config.attack.update(epsilon=4 / 255, steps=2)
    config.evaluation.update(batch_size=100, steps=2)
    config.test.update(batch_size=128, steps=5)
    short = {"batch_size": 50, "warmup_epochs": 1, "ema_decay": 0.9, "lr": 5e-3}
    config.phases = ("clean", "stem", "train")
    config.clean = phase(objective="clean", epochs=8, **short)
    config.clean.changes = {"model": {"name": "convnext_n", "options": size}}
    config.stem = phase(objective="clean", epochs=3, stem="fresh", **short)
    config.train.update(epochs=5, **short)
    return config.lock()
"""


@pytest.mark.slow
class EndToEndTest(absltest.TestCase):
    def test_from_clean_training_to_pyautoattack(self):
        data = paths.SHARED / "data" / "tensorflow_datasets"
        if not data.is_dir():
            self.skipTest(paths.NO_SHARED)
        try:
            import pyautoattack  # noqa: F401
        except ImportError:
            self.skipTest(paths.PARITY)
        folder = Path(self.create_tempdir())
        (folder / "own.py").write_text(CONFIG)
        run = "runs/own"

        def said(*words):
            done = run_command(list(words), folder)
            self.assertEqual(done.code, 0, done.error)
            return done.out + done.error

        where = f"--config.data.dir={data}"
        out = said("train", "--config", "own.py", where)
        self.assertIn("stem: step 0 of 240, clean", out)
        rows = result_lines.read(folder / run)
        clean, stem, robust = ([row["clean"], row["robust"]] for row in rows)
        self.assertGreater(min(clean[0], stem[0], robust[0]), 0.2)  # 0.1 is chance
        self.assertGreater(robust[1], max(clean[1], stem[1]) + 0.05)

        flags = ["--workdir", run, "--n", "64", "--data_dir", str(data)]
        said("evaluate", *flags)
        (record,) = records.read(folder / run / "evaluation")
        self.assertEqual(record.method, "autoattack standard")
        said("export", "--workdir", run, "--layout", "module", "--out", "ship")
        spec = importlib.util.spec_from_file_location("shipped", folder / "ship/convnext_n_cvst.py")
        shipped = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(shipped)
        ledger = folder / run / "evaluation" / f"ledger-{record.evaluation}.jsonl"
        told = confirm.verdicts(shipped.load(), record, ledger, 64, data_dir=str(data))
        (equal,) = re.findall(r"(\d+) of 64 verdicts agree", told)
        # An image at the boundary may fall to the other side with another order of the sums.
        self.assertGreaterEqual(int(equal), 63, told)
        self.assertLess(record.robust, record.clean)
