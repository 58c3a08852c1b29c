"""`torch:FILE.py:build` and `torch:timm/NAME`: whose module it is, and what is said of mistakes."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from jaxrobust import models
from jaxrobust.publish import torch_networks
from jaxrobust.pytorch import kept, trainable
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from tests.support import paths

pytest.importorskip("torch", reason=paths.PARITY)

NAME = "torch:nets.py:build"
SIZES = {"num_classes": 4, "image_size": 8, "in_channels": 1}
NETS = """
from torch import nn


def build(num_classes, in_channels=3, width=8, drop=0.0):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, stride=4),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(drop),
        nn.Linear(4 * width, num_classes),
    )


def fixed():
    return build(10)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build(4, 1)

    def forward(self, x):
        logits = self.net(x)
        return {"features": logits + 1, "logits": logits}


def two():
    return Two()


def nothing(num_classes):
    pass


def broken(num_classes):
    return nn.Linear("many", num_classes)
"""


class NamesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        Path("nets.py").write_text(NETS)
        self.enter_context(mock.patch.dict(torch_modules._folders, clear=True))

    def refused(self, name, **options):
        with self.assertRaises(ValueError) as caught:
            models.create(name, **SIZES | options)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def test_is_called_with_sizes_and_options(self):
        net = models.create(NAME, **SIZES, width=6)
        params, stats = net.init(jax.random.key(0))
        self.assertEqual(params["0.weight"].shape, (6, 1, 3, 3))
        self.assertEqual(params["5.weight"].shape, (4, 24))
        self.assertSameElements(
            stats,
            [
                *(f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
                *("normalize.mean", "normalize.std"),
            ],
        )

    def test_computes_in_the_type_that_is_asked_for(self):
        params, stats = models.create(NAME, **SIZES).init(jax.random.key(0))
        x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
        low = models.create(NAME, **SIZES, dtype="bfloat16")
        exact = models.create(NAME, **SIZES)
        text = jax.jit(low.apply).lower(params, stats, x).as_text()
        self.assertRegex(text, r"dot_general.*bf16")
        got, want = low.apply(params, stats, x)[0], exact.apply(params, stats, x)[0]
        self.assertEqual(got.dtype, jnp.float32)
        np.testing.assert_allclose(got, want, atol=0.05)
        self.assertGreater(np.abs(got - want).max(), 0)

    def test_how_it_is_computed_is_not_for_its_function(self):
        name, given = "torch:nets.py:build", {**SIZES, "scan": True}
        plain = torch_modules.identified(name, SIZES)
        self.assertEqual(torch_modules.identified(name, given), plain)
        torch_modules.build(name, **given)
        with mock.patch.object(torch_modules.trained, "classifier") as classifier:
            torch_modules.create(name, dtype="float32", remat=True, **given)
        self.assertEqual(classifier.call_args.kwargs, {"remat": True, "scan": True})

    def test_what_is_wrong_with_a_name(self):
        for name, message in {
            "torch:nets.py": "does not name a function; write torch:my_nets.py:build",
            "torch:nets.py:bild": (
                r"has no 'bild'; did you mean build\? it has build, fixed, Two, two, nothing"
            ),
            "torch:net.py:build": "cannot read net.py",
            "torch:nets.py:nothing": "returns nothing; return a torch.nn.Module",
            "torch:nets.py:broken": r"nets.py, line \d+: TypeError",
            "torch:nets.py:fixed": r"logits of 2 images are float32\[2,10\].*num_classes=4",
        }.items():
            with self.subTest(name):
                given = {"in_channels": 3} if name.endswith("fixed") else {}
                self.assertRegex(self.refused(name, **given), message)

    def test_a_network_is_told_from_others_by_plain_values(self):
        name, given = "torch:nets.py:build", SIZES | {"width": 3, "more": ConfigDict({"a": [1]})}
        found = torch_modules.identified(name, given)
        expected = {"name": name, **SIZES, "width": 3, "more": {"a": [1]}}
        self.assertEqual(json.loads(found), expected)
        turned = dict(reversed(given.items()))
        self.assertEqual(torch_modules.identified(name, turned), found)
        self.assertNotEqual(torch_modules.identified(name, given | {"width": 4}), found)
        with self.assertRaisesRegex(
            ValueError, f"model.name={name}: options must be plain values; .*o"
        ):
            torch_modules.identified(name, {"of": object()})
        with self.assertRaisesRegex(TypeError, "^3 is not a section$"):
            functions.as_dict(3)

    def test_what_is_kept_is_compared_with_the_module_first(self):
        name = "torch:nets.py:build"
        check = "jaxrobust.pytorch.reading.training_mode.check_agreement"
        written = mock.patch.object(torch_modules, "_written_down", return_value="network")
        with (
            written,
            mock.patch.object(torch_modules.trained, "classifier") as made,
            mock.patch(check, side_effect=ValueError("they differ")) as compared,
            self.assertRaisesRegex(ValueError, f"^model.name={name}: they differ$"),
        ):
            torch_modules.keep(Path("run") / pytorch.FOLDER, name, **SIZES)
        module, network, net = compared.call_args.args
        self.assertEqual((type(module).__name__, network), ("Sequential", "network"))
        self.assertIs(net, made.return_value)
        kernels = torch_modules.torch_kernels.KERNELS | torch_modules.torch_fusions.KERNELS
        faster = trainable.Faster(
            kernels, torch_modules.torch_blocks.PATTERNS, torch_modules.torch_fusions.fused
        )
        made.assert_called_once_with("network", faster)
        self.assertFalse(pytorch.has_programs(Path("run") / pytorch.FOLDER))

    def test_options(self):
        said = self.refused(NAME, depth=3)
        self.assertRegex(said, "got an unexpected keyword argument 'depth'")

    def test_one_of_several_results(self):
        said = self.refused("torch:nets.py:two")
        self.assertRegex(said, "features .B, 4., logits .*with model.options.torch_output=NAME")
        name, x = "torch:nets.py:two", np.ones((1, 8, 8, 1), np.float32)
        first, second = (
            models.create(name, **SIZES, torch_output=key) for key in ("features", "logits")
        )
        weights = first.init(jax.random.key(0))
        ours, theirs = first.apply(*weights, x)[0], second.apply(*weights, x)[0]
        np.testing.assert_allclose(ours, theirs + 1, rtol=1e-6)

    def test_without_pytorch(self):
        with mock.patch.object(torch_modules, "installed", return_value=False):
            torch_modules._written_down.cache_clear()
            said = self.refused(NAME)
        self.assertRegex(said, "needs PyTorch to export the module: pip install .*workdir")

    def test_a_kept_network_needs_neither_pytorch_nor_the_file(self):
        folder = Path("run") / pytorch.FOLDER
        torch_modules.keep(folder, NAME, **SIZES)
        want = models.create(NAME, **SIZES).init(jax.random.key(0))
        Path("nets.py").unlink()
        torch_modules._written_down.cache_clear()
        torch_modules._folders.clear()
        torch_modules.remember(folder)
        with mock.patch.object(torch_modules, "installed", return_value=False):
            got = models.create(NAME, **SIZES).init(jax.random.key(0))
            jax.tree.map(np.testing.assert_array_equal, got, want)
            with self.subTest("another one is another"):
                with self.assertRaisesRegex(ValueError, "contains another network; give a new --w"):
                    torch_modules.keep(folder, NAME, **SIZES, width=2)
                self.assertIn("needs PyTorch", self.refused(NAME, width=2))

    def test_two_runs_whose_file_changed_between_them(self):
        """The second would be evaluated, or start, as the network of the first."""
        name, first, second = NAME, Path("a") / pytorch.FOLDER, Path("b") / pytorch.FOLDER
        torch_modules.keep(first, name, **SIZES)
        began = models.origin(name, **SIZES)
        Path("nets.py").write_text(NETS.replace("ReLU", "GELU"))
        self.assertEqual(models.origin(name, **SIZES), began)  # what the run computes
        self.assertNotEqual(models.origin(name)["sha256"], began["sha256"])
        message = "a/.* and b/.* contain different networks called"
        with self.assertRaisesRegex(ValueError, message):
            torch_modules.keep(second, name, **SIZES)
        torch_modules._folders.clear()
        torch_modules.remember(second)
        self.assertNotEqual(models.origin(name, **SIZES)["program_sha256"], began["program_sha256"])
        with self.assertRaisesRegex(ValueError, "name them in separate commands, or export"):
            torch_modules.remember(first)

    def test_two_runs_of_one_file(self):
        folders = Path("a") / pytorch.FOLDER, Path("b") / pytorch.FOLDER
        for folder in folders:
            torch_modules.keep(folder, NAME, **SIZES)
        torch_modules.remember(folders[0])
        self.assertEqual(*map(kept.program_sha256, folders))

    def test_where_it_is_from(self):
        record = models.origin(NAME)
        self.assertEqual(record["name"], "torch:nets.py:build")
        self.assertEqual(record["file"], "nets.py")
        self.assertLen(record["sha256"], 64)
        Path("nets.py").write_text(NETS + "\n# more\n")
        self.assertNotEqual(models.origin(NAME)["sha256"], record["sha256"])
        Path("nets.py").unlink()
        self.assertIsNone(models.origin(NAME)["sha256"])

    def test_of_timm(self):
        try:
            timm = torch_networks.import_timm()
        except ImportError as error:
            raise absltest.SkipTest(paths.PARITY) from error
        tiny = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "img_size": 8}
        net = models.create("torch:timm/vit_tiny_patch16_224", **SIZES, **tiny)
        params, _ = net.init(jax.random.key(0))
        self.assertEqual(params["head.weight"].shape, (4, 8))
        self.assertEqual(params["patch_embed.proj.weight"].shape, (8, 1, 4, 4))
        self.assertEqual(models.origin("torch:timm/x")["timm"], timm.__version__)
        with self.subTest("it says which part is its head"):
            written = torch_modules.program("torch:timm/vit_tiny_patch16_224", **SIZES, **tiny)
            self.assertEqual(written.head, ("head",))
