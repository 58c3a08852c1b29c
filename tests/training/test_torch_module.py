"""A run of a PyTorch module, from its first step to the state dict that goes back."""

import contextlib
import json
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest
from ml_collections import ConfigDict

from jaxrobust.commands.conversion import export_weights
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.runtime import pytorch
from jaxrobust.training.run import run as training_run
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.trained import runs
from tests.support import paths, result_lines
from tests.support import runs as training
from tests.support.evaluations import call

torch = pytest.importorskip("torch", reason=paths.PARITY)

NETS = """
from torch import nn


def build(num_classes, in_channels, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(16 * width, num_classes),
    )


def pooled(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""
NAME = "torch:nets.py:build"


def config(**changes):
    found = training.tiny(
        **{"pretrain__epochs": 1, "pretrain__warmup_epochs": 0, "train__epochs": 2} | changes
    )
    with found.unlocked():
        found.model.name, found.model.options = NAME, ConfigDict({"width": 4})
    return found


def forget():
    """Be another process, which has not seen the module."""
    torch_modules._folders.clear()
    torch_modules._written_down.cache_clear()


@pytest.mark.slow
class RunTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.enterClassContext(contextlib.chdir(folder))
        Path("nets.py").write_text(NETS)
        forget()
        cls.said = training.quiet_run(config(), Path("run"))

    def setUp(self):
        super().setUp()
        forget()

    def test_both_phases_are_recorded_with_the_module(self):
        self.assertIn(f"{NAME} on digits", self.said)
        for record in result_lines.read(Path("run")):
            self.assertEqual(record["function"]["file"], "nets.py")
            self.assertLen(record["function"]["sha256"], 64)
        self.assertTrue(pytorch.has_programs(Path("run") / pytorch.FOLDER))

    def test_an_interrupted_run_ends_in_the_same_bits_without_pytorch(self):
        training.stop_after(7, lambda: training.quiet_run(config(), Path("stopped")))
        forget()
        with mock.patch.object(torch_modules, "installed", return_value=False):
            training.quiet_run(config(), Path("stopped"))
        ours, theirs = (training.final_state(Path(p), config())[0] for p in ("stopped", "run"))
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        jax.tree.map(np.testing.assert_array_equal, ours.stats, theirs.stats)

    def test_is_evaluated_where_its_file_is_gone(self):
        trained = result_lines.read(Path("run"))[-1]
        text = Path("nets.py").read_text()
        Path("nets.py").unlink()
        self.addCleanup(Path("nets.py").write_text, text)
        with mock.patch.object(torch_modules, "installed", return_value=False):
            code, _, said = call(workdir="run", attack="clean", out="out")
        self.assertEqual(code, 0, said)
        (record,) = result_lines.read(Path("out"))
        for key in ("weights", "weights_sha256", "clean"):
            self.assertEqual(record[key], trained[key], key)

    def test_a_file_that_changed_is_said_and_changes_nothing(self):
        text = Path("nets.py").read_text()
        self.addCleanup(Path("nets.py").write_text, text)
        Path("nets.py").write_text(text.replace("GELU", "ReLU"))
        said = training.quiet_run(config(), Path("run"))
        self.assertRegex(said, "nets.py has changed since the run in run began; the run continues")

    def test_goes_back_as_a_state_dict(self):
        export_weights.main(["--workdir", "run", "--layout", "state-dict", "--out", "ship"])
        module = torch_modules.build(NAME, num_classes=10, in_channels=1, image_size=8, width=4)
        module.load_state_dict(torch.load("ship/state_dict.pt", weights_only=True), strict=True)
        _, (params, stats) = runs.run_weights(Path("run"))
        np.testing.assert_array_equal(module[5].weight.detach(), params["5.weight"])
        np.testing.assert_array_equal(module[1].running_var, stats["1.running_var"])
        certificate = json.loads(Path("ship/state_dict.certificate.json").read_text())
        self.assertTrue(certificate["agrees"])
        self.assertTrue(certificate["reference"]["independent"])
        # The certificate's own bars, which are those of an export of ours.
        self.assertLess(certificate["logits"]["float64"]["relative"], 1e-9)

    def test_another_run_starts_from_it_with_other_classes(self):
        _, (params, stats) = runs.run_weights(Path("run"))
        asked = config(init__weights="run")
        with asked.unlocked():
            asked.model.num_classes = 4
        with self.assertRaisesRegex(
            ValueError, r"^init.weights=run: .*5.bias .10,. there and .4,. here.; .*head=fresh:5$"
        ):
            start_weights.of_config(asked)
        with asked.unlocked():
            asked.init.head = "fresh:5"
        start, _ = start_weights.of_config(asked)
        np.testing.assert_array_equal(start.params["0.weight"], params["0.weight"])
        np.testing.assert_array_equal(start.stats["1.running_var"], stats["1.running_var"])
        own = torch_modules.build(NAME, num_classes=4, in_channels=1, image_size=8, width=4)
        np.testing.assert_array_equal(start.params["5.weight"], own[5].weight.detach().numpy())

    def test_an_exported_folder_and_state_dict_are_starts(self):
        _, (params, stats) = runs.run_weights(Path("run"))
        for layout, place in (("jaxrobust", "folder"), ("state-dict", "folder/state_dict.pt")):
            out = Path(f"start_{layout}")
            export_weights.main(["--workdir", "run", "--layout", layout, "--out", str(out)])
            weights = str(Path(out, *Path(place).parts[1:]))
            start, _ = start_weights.of_config(config(init__weights=weights))
            for name, array in params.items():
                np.testing.assert_array_equal(start.params[name], array)
            for name, array in stats.items():  # a state dict counts in whole numbers
                np.testing.assert_allclose(start.stats[name], array, atol=0.5 * ("num_" in name))

    def test_what_was_exported_is_evaluated(self):
        trained = result_lines.read(Path("run"))[-1]
        for layout, file in (("jaxrobust", ""), ("state-dict", "state_dict.pt")):
            out = Path(f"evaluated_{layout}")
            export_weights.main(["--workdir", "run", "--layout", layout, "--out", str(out)])
            given = {"weights": str(out / file), "dataset": "digits", "split": "test[:80]"}
            own = {"model": NAME, "options": "{'width': 4}"} if file else {}
            code, _, said = call(**given, **own, attack="clean", out=f"{out}_records")
            self.assertEqual(code, 0, said)
            (record,) = result_lines.read(Path(f"{out}_records"))
            self.assertEqual(record["clean"], trained["clean"])

    def test_a_file_of_another_module_is_not_evaluated(self):
        torch.save({"fc.weight": torch.zeros(10, 4)}, "other.pt")
        given = {"model": NAME, "weights": "other.pt", "dataset": "digits", "split": "test[:80]"}
        code, _, said = call(**given, attack="clean", out="no_records")
        self.assertEqual(code, 2)
        self.assertRegex(said, r"other.pt: .* weights 8 are missing .*, 1 is unexpected .fc.weight")

    def test_goes_to_robustbench_as_its_file_with_these_weights(self):
        export_weights.main(["--workdir", "run", "--layout", "robustbench", "--out", "rb"])
        self.assertEqual(Path("rb/nets.py").read_text(), NETS)
        state = torch.load("rb/robust_nets.pt", weights_only=True)
        _, (params, _) = runs.run_weights(Path("run"))
        np.testing.assert_array_equal(state["5.weight"], params["5.weight"])
        text = Path("rb/robust_nets.py").read_text()
        self.assertIn("adversarial training on digits", text)
        self.assertIn("% clean", text)  # of the run's records
        certificate = json.loads(Path("rb/robust_nets.certificate.json").read_text())
        self.assertTrue(certificate["agrees"])

    def test_a_file_that_changed_does_not_go_to_robustbench(self):
        self.addCleanup(Path("nets.py").write_text, NETS)
        Path("nets.py").write_text(NETS.replace("GELU", "ReLU"))
        forget()
        with self.assertRaises(SystemExit), mock.patch("sys.stderr") as said:
            export_weights.main(["--workdir", "run", "--layout", "robustbench", "--out", "no"])
        printed = "".join(str(c.args[0]) for c in said.write.call_args_list)
        self.assertRegex(printed, "nets.py has changed since the run began .*bring back")
        self.assertFalse(Path("no").exists())

    def test_other_layouts_are_refused(self):
        for layout in ("timm", "hub", "module"):
            with self.assertRaises(SystemExit), mock.patch("sys.stderr") as said:
                export_weights.main(["--workdir", "run", "--layout", layout, "--out", "no"])
            printed = "".join(str(c.args[0]) for c in said.write.call_args_list)
            self.assertIn("choose --layout state-dict or robustbench", printed)

    def test_a_phase_of_another_size_keeps_its_own_program(self):
        asked = config(train__epochs=1, train__warmup_epochs=0)
        with asked.unlocked():
            asked.model.name, asked.model.options = "torch:nets.py:pooled", ConfigDict()
            asked.data.augmentation = "basic"
            asked.train.changes = ConfigDict({"model": {"image_size": 12}})
        training.quiet_run(asked, Path("sizes"))
        self.assertTrue(pytorch.has_programs(Path("sizes/train") / pytorch.FOLDER))
        self.assertFalse(pytorch.has_programs(Path("sizes/pretrain") / pytorch.FOLDER))
        forget()
        with mock.patch.object(torch_modules, "installed", return_value=False):
            training.quiet_run(asked, Path("sizes"))
            forget()
            code, _, said = call(workdir="sizes", attack="clean", out="out_sizes")
        self.assertEqual(code, 0, said)

    def test_mistakes_leave_nothing(self):
        asked = config()
        with asked.unlocked():
            asked.model.name = "torch:nets.py:bild"
        with self.assertRaisesRegex(ValueError, "nets.py has no 'bild'"):
            training_run.run(asked, Path("none"))
        self.assertFalse(Path("none").exists())
