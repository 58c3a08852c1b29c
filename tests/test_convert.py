"""Reading weight files; the rows and their engine are tested beside each architecture."""

import functools
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust import convert, models
from tests import paths

KWARGS = {"num_classes": 10, "image_size": 16}


@functools.cache
def random_weights(**overrides) -> dict[str, np.ndarray]:
    """Params and stats of convnext_n under our names."""
    net = models.create("convnext_n", **KWARGS, **overrides)
    params, stats = jax.jit(net.init)(jax.random.key(0))
    return {name: np.array(array) for name, array in (params | stats).items()}


def as_timm(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under timm's names, without normalisation."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}
    return {
        name.replace(".kernel", ".weight").replace(".scale", ".weight"): np.ascontiguousarray(
            array.transpose(order[array.ndim]) if name.endswith(".kernel") else array
        )
        for name, array in weights.items()
        if not name.startswith("normalize.")
    }


class LoadTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.weights = dict(random_weights())

    def saved(self, arrays, name="weights.safetensors") -> Path:
        save_file(arrays, self.folder / name)
        return self.folder / name

    def assert_loads(self, path):
        params, stats = convert.load("convnext_n", path, **KWARGS)
        self.assertEqual((params | stats).keys(), self.weights.keys())
        for name, array in (params | stats).items():
            np.testing.assert_array_equal(array, self.weights[name], err_msg=name)

    def test_our_names_and_timms(self):
        self.assert_loads(self.saved(self.weights))
        self.assert_loads(self.saved(as_timm(self.weights)))

    def test_channels_are_those_of_the_normalisation(self):
        path = self.saved(random_weights(in_channels=1))
        _, stats = convert.load("convnext_n", path, **KWARGS)
        self.assertEqual(stats["normalize.mean"].shape, (1,))

    def test_our_names_that_do_not_fit_are_listed(self):
        self.weights["extra.kernel"] = np.zeros(3, np.float32)
        self.weights["head.fc.bias"] = np.zeros(7, np.float32)
        del self.weights["normalize.std"]
        with self.assertRaisesRegex(
            ValueError,
            r"(?s)4 weights do not fit; check the model name, num_classes.*extra\.kernel: maps to "
            r".*head\.fc\.bias: shape \(7,\).*normalize\.std: not filled",
        ):
            convert.load("convnext_n", self.saved(self.weights), **KWARGS)

    @parameterized.parameters("state_dict", "model", None)
    def test_torch_files(self, key):
        torch = self.torch()
        arrays = {f"module.{k}": torch.tensor(v) for k, v in as_timm(self.weights).items()}
        path = self.folder / "weights.pth"
        torch.save({key: arrays, "epoch": 3} if key else arrays, path)
        self.assert_loads(path)

    def test_half_precision_is_widened(self):
        torch = self.torch()
        path = self.folder / "half.pt"
        torch.save({"a": torch.full((2,), 1 / 3, dtype=torch.bfloat16), "n": torch.tensor(4)}, path)
        read = convert.read(path)
        self.assertEqual((read["a"].dtype, read["n"].dtype), (np.float32, np.int64))
        self.assertAlmostEqual(read["a"][0], 1 / 3, delta=1e-3)

    def torch(self):
        try:
            import torch
        except ImportError:
            self.skipTest(paths.PARITY)
        return torch

    @parameterized.parameters(
        ("none.safetensors", None, r"none\.safetensors: no such file"),
        ("weights.bin", b"", r"unknown kind of file; give one of \.safetensors, \.pth, \.pt"),
        ("cut.safetensors", b"123", "not a whole safetensors file .*get it again"),
        ("cut.pth", b"", "not a whole PyTorch file"),
        ("cut.pth", b"PK\x03\x04", "not a whole PyTorch file"),
    )
    def test_bad_files_are_refused(self, name, content, message):
        if name.endswith(".pth"):
            self.torch()
        if content is not None:
            (self.folder / name).write_bytes(content)
        with self.assertRaisesRegex(ValueError, message):
            convert.read(self.folder / name)

    def test_files_that_would_run_code_are_refused(self):
        torch, path = self.torch(), self.folder / "bad.pt"
        torch.save({"state_dict": {}, "hook": Path("/")}, path)
        with self.assertRaisesRegex(ValueError, "would run code.*torch.save.model.state_dict"):
            convert.read(path)

    def test_files_without_a_state_dict_are_refused(self):
        torch, path = self.torch(), self.folder / "list.pt"
        torch.save([torch.zeros(2)], path)
        with self.assertRaisesRegex(ValueError, "holds no state dict"):
            convert.read(path)

    def test_without_torch(self):
        path = self.folder / "weights.pth"
        path.write_bytes(b"")
        with (
            mock.patch.dict(sys.modules, {"torch": None}),
            self.assertRaisesRegex(ValueError, r"pip install -e '\.\[torch\]'"),
        ):
            convert.read(path)


if __name__ == "__main__":
    absltest.main()
