"""`--layout robustbench`: a user's PyTorch module with the weights of its training, as files."""

import contextlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish import export_torch, layouts, robustbench_entry, torch_networks
from jaxrobust.publish.export_torch import ExportSettings
from jaxrobust.publish.references import Network
from jaxrobust.pytorch import users_module
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.runtime import pytorch
from jaxrobust.weights.store import weights_folder
from tests.support import paths

torch = pytest.importorskip("torch", reason=paths.PARITY)

NETS = """
import dataclasses

import torch
from torch import nn


@dataclasses.dataclass
class Shape:
    width: int


def build(num_classes, in_channels, width=2, widths=(2,)):
    return nn.Sequential(
        nn.Conv2d(in_channels, Shape(width).width, 3, stride=4),
        nn.BatchNorm2d(width),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


class Normalize(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.4))
        self.register_buffer("std", torch.full((1, channels, 1, 1), 0.2))

    def forward(self, x):
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.normalize = Normalize(in_channels)
        self.fc = nn.Linear(64 * in_channels, num_classes)

    def forward(self, x):
        return self.fc(self.normalize(x).flatten(1))


class Named(nn.Module):  # names that the loader of RobustBench cuts
    def __init__(self, num_classes, in_channels, other="submodel"):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(in_channels, 4, 8), nn.Flatten())
        self.add_module(other, nn.Sequential(nn.Linear(4, num_classes)))
        self.last = other

    def forward(self, x):
        return getattr(self, self.last)(self.model(x))


class Two(Normalized):
    def forward(self, x):
        logits = super().forward(x)
        return {"features": logits + 1, "logits": logits}
"""
NAME = "torch:nets.py:build"
SIZES = {"num_classes": 4, "image_size": 8, "in_channels": 3}


class ExportTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        self.enter_context(mock.patch.dict(torch_modules._folders, clear=True))
        Path("nets.py").write_text(NETS)

    def network(self, name=NAME, moments=None, **options) -> Network:
        """Other weights than those that the module begins with."""
        net = torch_modules.create(name, dtype="float32", **SIZES, **options)
        params, stats = jax.device_get(net.init(jax.random.key(0)))
        draw = np.random.default_rng(0)
        params = {k: draw.normal(size=a.shape).astype(np.float32) for k, a in params.items()}
        stats = {k: np.array(a) for k, a in stats.items()}
        for key, value in (moments or {}).items():
            stats[f"normalize.{key}"] = np.full(3, value, np.float32)
        return Network(name, params, stats, 4, 8, options)

    def exported(self, network: Network, layout="robustbench", **how) -> dict:
        shutil.rmtree("weights", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
        described = layouts.described(network, export_torch.Account("mine"))
        weights_folder.write(Path("weights"), network.params, network.stats, described)
        given = ExportSettings(layout, Path("out"), weights="weights", **how)
        return export_torch.export(given)

    def refused(self, network: Network, **how) -> str:
        with self.assertRaises(ValueError) as caught:
            self.exported(network, **how)
        self.assertNotIn("\n", str(caught.exception))
        self.assertFalse(Path("out").exists())
        return str(caught.exception)

    def assert_runs_elsewhere(self, network: Network, label: str):
        """In another process and folder, without the original file and without this package."""
        Path("nets.py").unlink()
        torch_modules._written_down.cache_clear()
        code = (
            f"import sys, numpy, torch\nsys.path.insert(0, sys.argv[1])\nfrom {label} import load\n"
            "x = torch.from_numpy(numpy.load(sys.argv[2]))\n"
            "numpy.save(sys.argv[3], load()(x).detach().numpy())\n"
            "assert 'jaxrobust' not in sys.modules\n"
        )
        x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
        np.save("x.npy", x.transpose(0, 3, 1, 2))
        places = [str(Path(p).absolute()) for p in ("out", "x.npy", "y.npy")]
        Path("elsewhere").mkdir()
        subprocess.run([sys.executable, "-c", code, *places], check=True, cwd="elsewhere")
        Path("nets.py").write_text(NETS)
        want = network.create().apply(network.params, network.stats, x)[0]
        np.testing.assert_allclose(np.load("y.npy"), want, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(({},), ({"mean": 0.5, "std": 0.25},))
    def test_a_module_of_a_file(self, moments):
        network = self.network(moments=moments, width=3, widths=[1, 2])
        with mock.patch.object(sys, "dont_write_bytecode", False):
            done = self.exported(network)
        files = ["nets.py", "robust_nets.certificate.json", "robust_nets.pt", "robust_nets.py"]
        self.assertSameElements(done["files"], files)
        self.assertSameElements([path.name for path in Path("out").iterdir()], files)
        self.assertEqual(Path("out/nets.py").read_text(), NETS)
        certificate = json.loads(Path("out/robust_nets.certificate.json").read_text())
        self.assertTrue(certificate["agrees"])
        self.assertTrue(certificate["reference"]["independent"])
        self.assertLess(certificate["gradients"]["float64"]["relative"], 1e-9)
        self.assertIn("`from robust_nets import load; net = load()`", done["usage"])
        text = Path("out/robust_nets.py").read_text()
        sha256 = torch_modules.origin(NAME)["sha256"]
        self.assertIn(f"Source: build of nets.py, sha256 {sha256}.", " ".join(text.split()))
        self.assertIn('"widths": (1, 2),', text)
        self.assert_runs_elsewhere(network, "robust_nets")

    def test_a_module_that_normalises_under_our_names(self):
        for layout in ("robustbench", "state-dict"):
            with self.subTest(layout):
                network = self.network("torch:nets.py:Normalized")
                self.assertEqual(network.in_channels, 3)
                done = self.exported(network, layout)
                self.assertNotIn("expects (images", done["usage"])

    def test_a_module_of_a_package(self):
        Path("package").mkdir()
        Path("package/__init__.py").touch()
        Path("package/models.py").write_text(NETS)
        network = self.network("torch:package.models:build")
        done = self.exported(network)
        label = "robust_package_models"
        self.assertSameElements(
            done["files"], [f"{label}.py", f"{label}.pt", f"{label}.certificate.json"]
        )
        self.assertIn('import_module("package.models").build', Path(f"out/{label}.py").read_text())

    def test_a_module_of_timm(self):
        try:
            torch_networks.import_timm()
        except ImportError as error:
            raise absltest.SkipTest(paths.PARITY) from error
        tiny = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "img_size": 8}
        network = self.network("torch:timm/vit_tiny_patch16_224", **tiny)
        self.exported(network)
        text = Path("out/robust_vit_tiny_patch16_224.py").read_text()
        self.assertIn('import_module("timm").create_model', text)
        self.assertIn('"pretrained": False', text)

    @parameterized.parameters(
        ("build", {}),
        ("build", {"mean": 0.5, "std": 0.25}),
        ("Normalized", {}),
        ("Named", {}),
        ("Named", {"mean": 0.5, "std": 0.25}),
    )
    def test_in_robustbenchs_zoo(self, name, moments):
        """Its loader cuts names, and for ImageNet puts others before them."""
        network = self.network(f"torch:nets.py:{name}", moments=moments)
        self.exported(network)
        module = runpy.run_path("out/robust_nets.py")
        x = torch.rand(2, 3, 8, 8)
        want = module["load"]()(x)
        for imagenet in (False, True):
            state = torch.load("out/robust_nets.pt", weights_only=True)
            for word in ("module.", "model."):
                state = {k[len(word) :] if word in k else k: a for k, a in state.items()}
            if imagenet:
                state = {f"model.{k}": a for k, a in state.items()}
            net = module["network"]()
            net.load_state_dict(state, strict=True)
            torch.testing.assert_close(net.eval()(x), want, rtol=0, atol=0)
            with self.assertRaisesRegex(RuntimeError, "Missing key"):
                net.load_state_dict(dict(list(state.items())[1:]))

    @parameterized.product(
        name=("build", "Named"),
        moments=({}, {"mean": 0.5, "std": 0.25}),
        dataset=("cifar10", "imagenet"),
    )
    @pytest.mark.matrix
    def test_robustbenchs_own_loader(self, name, moments, dataset):
        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        from robustbench import utils
        from robustbench.model_zoo import enums

        self.exported(self.network(f"torch:nets.py:{name}", moments=moments))
        module = runpy.run_path("out/robust_nets.py")
        threats = utils.all_models[enums.BenchmarkDataset(dataset)]
        row = {"model": module["network"], "gdrive_id": "none is asked for it"}
        zoo = threats[enums.ThreatModel.Linf]
        self.enter_context(mock.patch.dict(zoo, {"Me2026Small": row}))
        folder = Path("models", dataset, "Linf")
        folder.mkdir(parents=True)
        shutil.copy("out/robust_nets.pt", folder / "Me2026Small.pt")
        net = utils.load_model("Me2026Small", "models", dataset, "Linf")
        x = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(net(x), module["load"]()(x), rtol=0, atol=0)

    def test_names_that_robustbenchs_loader_would_not_tell_apart(self):
        said = self.refused(self.network("torch:nets.py:Named", other="module"))
        self.assertRegex(
            said,
            "shortens the names model.0.weight and module.0.weight to the same 0.weight, .* rename",
        )

    def test_several_results(self):
        network = self.network("torch:nets.py:Two", torch_output="logits")
        said = self.refused(network)
        self.assertRegex(said, "returns several results, but RobustBench needs .*layout state-dict")
        self.exported(network, "state-dict")
        certificate = json.loads(Path("out/state_dict.certificate.json").read_text())
        self.assertTrue(certificate["agrees"])

    def test_a_file_that_is_gone_or_another(self):
        folder = Path("run") / pytorch.FOLDER
        torch_modules.keep(folder, NAME, **SIZES)
        network = self.network()
        Path("nets.py").write_text(NETS.replace("stride=4", "stride=4, bias=True"))
        said = self.refused(network)
        self.assertRegex(said, "nets.py has changed since the run began .*; bring back")
        Path("nets.py").unlink()
        said = self.refused(network)
        self.assertRegex(said, "nets.py does not exist; run the command in .* --layout jaxrobust")
        Path("nets.py").write_text("def build(:")
        self.assertRegex(self.refused(network), "nets.py has changed since")

    def test_a_file_that_needs_its_neighbours(self):
        Path("parts.py").write_text("from torch import nn\n")
        Path("nets.py").write_text("import parts\n" + NETS)
        self.addCleanup(sys.modules.pop, "parts", None)
        said = self.refused(self.network())
        self.assertRegex(said, "nets.py imports parts, which is next to it, but only one file is")

    def test_networks_of_ours_have_other_layouts(self):
        ours = Network("convnext_n", {}, {}, 10, 32, {})
        with self.assertRaisesRegex(ValueError, "robustbench does not support convnext_n: .* timm"):
            layouts.check(ours, "robustbench")

    def test_an_entry_beside_the_files(self):
        network, ball = self.network(), {"norm": "linf", "epsilon": 8 / 255}
        record = AccuracyRecord(
            config_sha256="0" * 64,
            weights="train, step 7, ema",
            weights_sha256=network.weights_sha256,
            dataset="cifar10",
            split="test",
            image_ids="0..9999",
            dtype="float32",
            attacks=[ball | {"name": name} for name in ("apgd-ce", "apgd-t", "fab-t", "square")],
            clean=0.8,
            robust=0.5,
            seed=3,
            evaluation="abc123",
            model={"name": NAME, "num_classes": 4, "image_size": 8, "options": {}},
            method="autoattack standard",
        )
        Path("results.jsonl").write_text(json.dumps(record.stamped().to_json()) + "\n")
        done = self.exported(network, record=Path("results.jsonl"), id="Me2026Small")
        entry = json.loads(Path("out/model_info/cifar10/Linf/Me2026Small.json").read_text())
        self.assertEqual(entry["autoattack_acc"], "50.00")
        self.assertIn("architecture", done["by_hand"])
        issue = Path("out/new_model_issue.md").read_text()
        self.assertIn("robust_nets.pt", issue)
        self.assertIn(done["files"]["robust_nets.pt"], issue)

    def test_its_name_on_a_leaderboard(self):
        architecture = robustbench_entry.architecture
        self.assertEqual(architecture(NAME, {}), robustbench_entry.BY_HAND)
        self.assertEqual(architecture("torch:timm/resnet18", {"a": 1}), "resnet18, a=1")

    def test_names_of_files(self):
        self.assertEqual(users_module.label("torch:my-nets.py:build"), "robust_my_nets")
