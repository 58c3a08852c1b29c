"""Checkpoints of MadryLab/robustness: two copies of a network, and pickled objects of others."""

import builtins
import contextlib
import functools
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

import jaxrobust
from jaxrobust import models
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import files
from tests.support import parity


class Foreign:
    """An object of a class that is not there when the file is read."""

    def __init__(self):
        self.epsilon = 8.0


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@contextlib.contextmanager
def in_package(thing: Any, name: str):
    """Let a class or a function be pickled as one of another package."""
    package = types.ModuleType(name)
    setattr(package, thing.__name__, thing)
    there = {name.partition(".")[0]: types.ModuleType("parent"), name: package}
    with mock.patch.dict(sys.modules, there), mock.patch.object(thing, "__module__", name):
        yield


def touch(path: str) -> None:
    """Write a file."""
    Path(path).touch()


@functools.cache
def arrays(**options) -> dict[str, np.ndarray]:
    """A ResNet-18 of small random weights under torchvision's names."""
    net = models.create("resnet18", **options)
    draw = np.random.default_rng(0)
    filled = {
        key: draw.uniform(0.1, 0.2, a.shape).astype(np.float32)
        for part in jax.eval_shape(net.init, jax.random.key(0))
        for key, a in part.items()
    }
    filled |= {"normalize.mean": np.zeros(3, np.float32), "normalize.std": np.ones(3, np.float32)}
    return convert.reference_names("resnet18", filled, wrapped=False, **options)


class RobustnessTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.torch = parity.torch_or_skip(self)
        self.folder = Path(self.create_tempdir())

    def file(self, plain: dict, *, older: bool = False, **more) -> Path:
        """A checkpoint as `robustness.train` writes it."""
        torch = self.torch
        moments = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        network = {f"model.{key}": torch.tensor(a) for key, a in plain.items()}
        state = {f"normalizer.new_{k}": torch.tensor(v).view(3, 1, 1) for k, v in moments.items()}
        state |= network
        state |= {f"attacker.normalize.new_{k}": state[f"normalizer.new_{k}"] for k in moments}
        state |= {f"attacker.{key}": tensor for key, tensor in network.items()}
        path = self.folder / "resnet18_linf_eps8.0.ckpt"
        content = {"model": {f"module.{key}": tensor for key, tensor in state.items()}}
        content |= {"optimizer": {"state": {}}, "amp": "N/A", "epoch": 90} | more
        torch.save(content, path, _use_new_zipfile_serialization=not older)
        return path

    @parameterized.parameters(False, True)
    def test_is_read_in_both_formats(self, older):
        plain = arrays()
        with in_package(Foreign, "cox.utils"):
            objects = {"args": Foreign(), "adv_prec1": np.float64(33.5), "dtype": np.dtype("f4")}
            path = self.file(plain, older=older, **objects)
        found = jaxrobust.load(path, model="resnet18", tell=lambda line: None)
        np.testing.assert_array_equal(found.params["fc.bias"], plain["fc.bias"])
        np.testing.assert_array_equal(found.stats["bn1.mean"], plain["bn1.running_mean"])
        np.testing.assert_array_equal(found.stats["normalize.mean"], np.float32(IMAGENET_MEAN))
        np.testing.assert_array_equal(found.stats["normalize.std"], np.float32(IMAGENET_STD))
        self.assertEqual(found.about["num_classes"], 1000)

    @parameterized.parameters(False, True)
    def test_nothing_in_it_runs(self, older):
        marker = self.folder / "marker"
        plain = {"fc.bias": np.ones(2, np.float32)}
        for function, *words in (
            (os.system, f"touch {marker}"),
            (builtins.exec, f"open({str(marker)!r}, 'w')"),
            (Path, "/"),
        ):
            path = self.file(plain, older=older, hook=Call(function, *words))
            with self.assertRaisesRegex(
                ValueError, "contains more than tensors and would run code"
            ):
                files.read(path)
        with in_package(touch, "dill"):  # whose objects become inert
            path = self.file(plain, older=older, hook=Call(touch, str(marker)))
        with mock.patch.dict(sys.modules, dill=types.SimpleNamespace(touch=touch)):
            self.assertLen(files.read(path), 6)
        self.assertFalse(marker.exists())

    def test_without_its_mean(self):
        path = self.file(arrays())
        content = self.torch.load(path, weights_only=False)
        for name in ("mean", "std"):
            del content["model"][f"module.normalizer.new_{name}"]
        self.torch.save(content, path)
        with self.assertRaisesRegex(ValueError, "no module.normalizer.new_mean, so its mean"):
            jaxrobust.load(path, model="resnet18", tell=lambda line: None)

    def test_another_depth(self):
        path = self.file(arrays(depths=(1, 2, 2, 2)))
        with self.assertRaisesRegex(
            ValueError,
            r"do not fit; their shapes match depths=\(1, 2, 2, 2\), but this resnet18 has "
            r"depths=\(2, 2, 2, 2\); set depths=\(1, 2, 2, 2\) in the options",
        ):
            jaxrobust.load(path, model="resnet18", tell=lambda line: None)
        options = {"depths": (1, 2, 2, 2)}
        found = jaxrobust.load(path, model="resnet18", tell=lambda line: None, **options)
        self.assertEqual(found.about["options"], {"depths": [1, 2, 2, 2]})

    def test_another_network(self):
        """Its blocks tell what it is: a wide ResNet-50 has other widths."""
        depths = {"depths": (1, 1, 1, 1)}
        net = models.create("wide_resnet50_2", **depths)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        small = {k: np.broadcast_to(np.float32(0.5), a.shape) for p in shapes for k, a in p.items()}
        path = self.file(convert.reference_names("wide_resnet50_2", small, wrapped=False, **depths))
        with self.assertRaisesRegex(ValueError, "match width=128, but this resnet50 has width=64"):
            jaxrobust.load(path, model="resnet50", tell=lambda line: None, **depths)
