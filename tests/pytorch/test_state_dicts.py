"""Starts of a PyTorch module: from its state dict, however wrapped, and with a fresh head."""

import contextlib
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from jaxrobust.config import NetworkSpec
from jaxrobust.pytorch import kept, state_dicts
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.runtime import pytorch
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.naming import compose
from tests.support import paths
from tests.support import runs as training

torch = pytest.importorskip("torch", reason=paths.PARITY)

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_channels, width, tied):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stride=4)
        self.bn = nn.BatchNorm2d(width)
        self.first = nn.Linear(4 * width, 4 * width)
        self.second = nn.Linear(4 * width, 4 * width)
        if tied:
            self.second.weight = self.first.weight
        self.fc = nn.Linear(4 * width, num_classes)
        self.register_buffer("order", torch.arange(4 * width).flip(0))
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x):
        x = self.bn(self.conv(x)).flatten(1)[:, self.order] * self.scale
        return self.fc(self.second(self.first(x)))


def build(num_classes, in_channels, width=2, tied=True):
    return Net(num_classes, in_channels, width, tied)


def named(num_classes, in_channels):
    net = build(num_classes, in_channels)
    net.default_cfg = {"classifier": "fc"}
    return net


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
"""
NAME = "torch:nets.py:build"


def config(weights=None, *, name=NAME, num_classes=10, options=(), **init):
    """One phase of the module `name`, which starts as `init` says."""
    found = training.tiny(pretrain__epochs=0)
    with found.unlocked():
        found.model.update(name=name, num_classes=num_classes)
        found.model.options = ConfigDict(dict(options))
        found.init.update(weights=weights and str(weights), **init)
    return found


class StartTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        self.enter_context(mock.patch.dict(torch_modules._folders, clear=True))
        Path("nets.py").write_text(NETS)

    def module(self, name=NAME, num_classes=10, **options):
        """A module whose weights are not those that it begins with."""
        sizes = {"num_classes": num_classes, "image_size": 8, "in_channels": 1}
        made = torch_modules.build(name, **sizes, **options)
        generator = torch.Generator().manual_seed(1)
        for tensor in [*made.parameters(), made.bn.running_mean]:
            tensor.data.normal_(generator=generator)
        made.bn.num_batches_tracked.fill_(7)
        return made

    def refused(self, *given, **how) -> str:
        with self.assertRaises(ValueError) as caught:
            start_weights.of_config(config(*given, **how))
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def assert_starts_as(self, module, start, but=()):
        state = module.state_dict()
        ours = start.params | start.stats
        names = [name for name in state if name not in ("second.weight", "order", *but)]
        self.assertSameElements([*names, *but, "scale", "normalize.mean", "normalize.std"], ours)
        for name in names:
            self.assertEqual(ours[name].dtype, np.float32)
            np.testing.assert_array_equal(ours[name], state[name].numpy(), name)

    @parameterized.parameters(
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: (
            {k: v for k, v in state.items() if k != "bn.num_batches_tracked"}
            | {"bn.num_batches_tracked": torch.tensor(7)}
        ),
    )
    def test_from_a_file_of_pytorch(self, wrapped):
        module = self.module()
        torch.save(wrapped(module.state_dict()), "own.pt")
        start, record = start_weights.of_config(config("own.pt"))
        self.assert_starts_as(module, start)
        self.assertEqual(record["weights"], "own.pt")
        np.testing.assert_array_equal(start.stats["scale"], [2])

    def test_stored_names_are_the_modules_own(self):
        module = self.module()
        arrays = {key: value.numpy() for key, value in module.state_dict().items()}
        spec = NetworkSpec.of_config(config())
        kept_head = state_dicts.stored(spec, arrays, "keep")
        fresh = state_dicts.stored(spec, arrays, "fresh:fc")
        for found in (kept_head, fresh):
            self.assertTrue(found.our_names)
            self.assertEqual((found.model, found.normalize), (NAME, (0.0, 1.0)))
            self.assertEqual([key for key, *_ in found.matched], [*found.arrays])
            for key, row, targets in found.matched:
                self.assertEqual([row.pattern.sub(row.target, key)], targets)
                self.assertEqual(targets, [key])
                self.assertIsNone(re.fullmatch(found.stem, key))
        heads = [[key for key in f.arrays if re.fullmatch(f.head, key)] for f in (kept_head, fresh)]
        self.assertEqual(heads[0], [])
        self.assertSameElements(fresh.arrays.keys() & {"fc.weight", "fc.bias"}, heads[1])

    def test_the_module_computes_the_same(self):
        module = self.module().eval()
        torch.save(module.state_dict(), "own.pt")
        start, _ = start_weights.of_config(config("own.pt"))
        x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
        got = start.create().apply(start.params, start.stats, x)[0]
        with torch.no_grad():
            want = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)  # rounding of float32

    def test_from_a_safetensors_file_without_the_second_name_of_a_tensor(self):
        module = self.module()
        state = {k: v.numpy() for k, v in module.state_dict().items() if k != "first.weight"}
        save_file(state, "own.safetensors")
        start, _ = start_weights.of_config(config("own.safetensors"))
        self.assert_starts_as(module, start)

    def test_with_the_normalisation_that_an_export_for_robustbench_holds(self):
        module = self.module()
        state = {f"model.{key}": value for key, value in module.state_dict().items()}
        for key, value in (("mean", 0.5), ("std", 0.25)):
            state[f"normalize.{key}"] = torch.full((1, 1, 1, 1), value)
        torch.save(state, "robust.pt")
        start, _ = start_weights.of_config(config("robust.pt"))
        self.assert_starts_as(module, start)
        np.testing.assert_array_equal(start.stats["normalize.std"], [0.25])

    def test_a_counter_that_an_old_file_lacks(self):
        state = self.module().state_dict()
        del state["bn.num_batches_tracked"]
        torch.save(state, "old.pt")
        start, _ = start_weights.of_config(config("old.pt"))
        self.assertEqual(start.stats["bn.num_batches_tracked"], 0)

    def test_a_folder_as_the_hub_has_it(self):
        folder = Path("hub")
        folder.mkdir()
        save_file(
            {k: v.numpy() for k, v in self.module(tied=False).state_dict().items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
        start, _ = start_weights.of_config(config(folder, options={"tied": False}))
        self.assertIn("second.weight", start.params)

    @parameterized.parameters(("fresh:fc", NAME), ("fresh", "torch:nets.py:named"))
    def test_a_fresh_head(self, head, name):
        module = self.module(num_classes=6)
        torch.save(module.state_dict(), "own.pt")
        start, record = start_weights.of_config(config("own.pt", name=name, head=head))
        self.assert_starts_as(module, start, but=("fc.weight", "fc.bias"))
        own = torch_modules.build(name, num_classes=10, image_size=8, in_channels=1)
        np.testing.assert_array_equal(start.params["fc.weight"], own.fc.weight.detach().numpy())
        self.assertSameElements(start.fresh, ["fc.weight", "fc.bias"])
        self.assertIn("2 newly initialized: fc.bias, fc.weight", compose.summary(start))
        self.assertEqual(record["head"], head)

    def test_the_head_of_timms_modules_stays_known_where_the_program_is_kept(self):
        folder, name = Path("run") / pytorch.FOLDER, "torch:nets.py:named"
        torch_modules.keep(folder, name, num_classes=10, image_size=8, in_channels=1)
        self.assertEqual(kept.read(folder).head, ("fc",))

    def test_what_does_not_fit(self):
        module = self.module(num_classes=6)
        state = module.state_dict()
        torch.save(state, "six.pt")
        torch.save(self.module(width=3).state_dict(), "wide.pt")
        torch.save(
            {k: v for k, v in state.items() if "first" not in k} | {"x": state["fc.bias"]},
            "part.pt",
        )
        torch.save(self.module(tied=False).state_dict(), "loose.pt")
        torch.save({k: v.double() for k, v in state.items()}, "double.pt")
        torch.save(state | {"order": state["order"].flip(0)}, "order.pt")
        shape = r"fc.weight \(6, 8\) there and \(10, 8\) here"
        for given, how, message in (
            (
                "six.pt",
                {},
                rf"^init.weights=six.pt: the module's weights do not match: 2 have a different "
                rf"shape \({shape}, fc.bias .*\); for a head with other classes, set init.head=f",
            ),
            ("six.pt", {"name": "torch:nets.py:named"}, "set init.head=fresh$"),
            (
                "wide.pt",
                {},
                "10 have a different shape .*conv.weight .*, ....; give weights of torch:",
            ),
            (
                "part.pt",
                {"num_classes": 6},
                r"1 is missing \(first.bias\), 1 is unexpected "
                r"\(x\); give weights of torch:nets.py:build with these model.options",
            ),
            ("loose.pt", {}, "second.weight and first.weight are the same tensor in the module"),
            ("double.pt", {"num_classes": 6}, "conv.weight is float64 in the file, .*module.float"),
            ("order.pt", {"num_classes": 6}, "order has different integers from the module"),
        ):
            with self.subTest(given, **how):
                self.assertRegex(self.refused(given, **how), message)

    def test_heads_that_cannot_be_drawn(self):
        torch.save(self.module().state_dict(), "own.pt")
        for head, message in {
            "fresh": "the head of .* is unknown; name it, as in init.head=fresh:fc; its parts "
            "with num_classes outputs are fc$",
            "fresh:head": "has no weights under 'head'; name a part as .* outputs are fc$",
            "fresh-torch": "initializes its new head itself; set init.head=fresh$",
            "new": "init.head='new'; use one of keep, fresh, fresh-torch",
        }.items():
            with self.subTest(head):
                self.assertRegex(self.refused("own.pt", head=head), message)
        self.assertRegex(
            self.refused("own.pt", stem="fresh"), "the stem of torch:nets.py:build is unk"
        )

    def test_a_file_of_pytorch_on_a_host_without_it(self):
        torch.save(self.module().state_dict(), "own.pt")
        with mock.patch.dict(sys.modules, {"torch": None}):
            said = self.refused("own.pt")
        self.assertRegex(
            said, "reading .* requires PyTorch: .* as .safetensors on a machine with PyTorch$"
        )

    def test_parts_are_for_modules_of_pytorch(self):
        asked = training.tiny(init__head="fresh:fc", init__weights="own.pt")
        with self.assertRaisesRegex(ValueError, "for convnext_n, set init.head=fresh"):
            start_weights.of_config(asked)

    def test_normalisation(self):
        start, record = start_weights.of_config(config(normalize="half"))
        np.testing.assert_array_equal(start.stats["normalize.mean"], [0.5])
        self.assertEqual(record["where"], "the module's own weights")
        torch.save(self.module().state_dict(), "own.pt")
        start, _ = start_weights.of_config(config("own.pt", normalize="half"))
        np.testing.assert_array_equal(start.stats["normalize.std"], [0.5])
        self.assertTrue(start.normalised)
        x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
        plain, _ = start_weights.of_config(config("own.pt"))
        got = start.create().apply(start.params, start.stats, x)[0]
        want = plain.create().apply(plain.params, plain.stats, (x - 0.5) / 0.5)[0]
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_a_module_that_normalises_under_our_names(self):
        name = "torch:nets.py:Normalized"
        said = self.refused(name=name, normalize="half")
        self.assertRegex(said, "has its own `normalize` layer; change the mean and std")
        own = torch_modules.build(name, num_classes=10, image_size=8, in_channels=1)
        torch.save(own.state_dict(), "own.pt")
        start, _ = start_weights.of_config(config("own.pt", name=name))
        self.assertEqual(start.stats["normalize.mean"].shape, (1, 1, 1, 1))
        self.assertFalse(start.normalised)
