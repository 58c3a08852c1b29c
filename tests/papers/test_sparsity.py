"""The share of weights next to nothing, against a count by hand."""

import contextlib
import csv
import importlib.util
import io
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from PIL import Image
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.papers.commands import sparsity as command
from jaxrobust.papers.networks import sparsity

PLOT = importlib.util.find_spec("matplotlib") is not None


class CountTest(parameterized.TestCase):
    def params(self):
        rng = np.random.default_rng(0)
        return {
            "stem.kernel": np.float32([[[[1.0, 0.0099, -0.0101]]]]),
            "stem.bias": np.float32([0.001, 200.0]),
            "norm.scale": np.ones(3, np.float32),
            "blocks.0.attn.qkv.kernel": rng.normal(size=(4, 12)).astype(np.float32),
            "blocks.0.attn.proj.kernel": np.float32([[0.0, 3.0]]),
            "blocks.0.mlp.fc1.kernel": np.float32([[-0.5, 0.004, 0.005, 0.006]]),
            "pos_embed": np.zeros((1, 2, 3), np.float32),
        }

    def test_sets(self):
        params = self.params()
        found = {part.name: part for part in sparsity.parts(params)}
        self.assertEqual(list(found), ["whole", "convolution", "qkv", "feed-forward"])
        self.assertAlmostEqual(found["convolution"].ratio, 1 / 3)
        self.assertAlmostEqual(found["feed-forward"].ratio, 1 / 4)  # 0.005 is not below 0.005
        qkv = np.abs(params["blocks.0.attn.qkv.kernel"])
        self.assertAlmostEqual(found["qkv"].ratio, (qkv < 0.01 * qkv.max()).mean())
        kernels = [np.abs(v).ravel() for k, v in params.items() if k.endswith(".kernel")]
        kernels = np.concatenate(kernels)
        self.assertEqual((found["whole"].tensors, found["whole"].weights.size), (4, kernels.size))
        self.assertAlmostEqual(found["whole"].ratio, (kernels < 0.01 * kernels.max()).mean())
        every = np.abs(np.concatenate([v.ravel() for v in params.values()]))
        self.assertAlmostEqual(found["whole"].ratio_of_all, (every < 2).mean())

    def test_a_part_of_an_mlp_is_that_whatever_it_computes(self):
        for name, axes, expected in (
            ("blocks.0.mlp.dwconv.kernel", 4, "feed-forward"),
            ("blocks.0.mlp.kv.kernel", 2, "feed-forward"),
            ("blocks.0.attn.kv.kernel", 4, "qkv"),
            ("stem.kernel", 4, "convolution"),
            ("stem.kernel", 2, None),
            ("stem.bias", 1, None),
        ):
            with self.subTest(row=(name, axes, expected)):
                self.assertEqual(sparsity.of_name(name, axes), expected)

    def test_histogram_holds_all_weights(self):
        for part in sparsity.parts(self.params()):
            own = sparsity.rows([part])
            self.assertLen(own, 200)
            whole = sum(row["density"] * (row["to"] - row["from"]) for row in own)
            self.assertAlmostEqual(whole, 1)

    def test_the_largest_weight_may_be_negative(self):
        """Of -4 a hundredth is 0.04, which 0.04 itself is not below."""
        weights = np.array([-4, 1, 0.5, 0.04, 0.02, -0.01], np.float32)
        (*_, last) = own = sparsity.rows(sparsity.parts({"a.kernel": weights}))
        self.assertEqual((own[0]["from"], last["to"]), (-4, 1))
        self.assertEqual({(r["largest"], r["weights"], r["tensors"]) for r in own}, {(4, 6, 1)})
        self.assertAlmostEqual(last["ratio"], 2 / 6)

    @parameterized.parameters(
        ("vit_s", {"qkv": (384, 1152), "feed-forward": (384, 1536)}, 12),
        ("xcit_n12", {"qkv": (128, 384), "feed-forward": (128, 512)}, 12),
    )
    def test_our_networks(self, name, firsts, count):
        """The sets of real names: the first array of each, and how many there are."""
        net = models.create(name, num_classes=10, image_size=224)
        shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
        sets: dict[str, list] = {}
        for key in sorted(shapes):
            which = sparsity.of_name(key, len(shapes[key].shape))
            if key.endswith(".kernel"):
                sets.setdefault(str(which), []).append(shapes[key].shape)
        for which, shape in firsts.items():
            self.assertIn(shape, sets[which])
        which = next(iter(firsts))
        own = [s for s in sets[which] if len(s) == len(firsts[which])]
        if count and name != "xcit_n12":  # whose class attention has three maps
            self.assertLen(own, count)


@absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
class CommandTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        net = models.create("convnext_n", num_classes=10, image_size=32)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        rng = np.random.default_rng(0)
        cls.params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        cls.file = str(Path(directory.name) / "net.safetensors")
        save_file(
            cls.params | {k: np.ones(v.shape, np.float32) for k, v in stats.items()}, cls.file
        )

    def call(self, *words) -> tuple[int, str, str]:
        out, said, code = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(said),
            jax.numpy_dtype_promotion("standard"),
        ):
            try:
                command.main([str(word) for word in words])
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return code, out.getvalue(), said.getvalue()

    @pytest.mark.slow
    def test_of_a_file(self):
        out = Path(self.create_tempdir())
        given = ("--model", "convnext_n", "--num_classes", 10, "--image_size", 32)
        code, printed, said = self.call(*given, "--weights", self.file, "--out", out)
        self.assertEqual(code, 0, said)
        table, picture = map(Path, printed.split())
        with Image.open(picture) as image:
            self.assertGreater(min(image.size), 200)
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        kernels = [np.abs(v).ravel() for k, v in self.params.items() if k.endswith(".kernel")]
        kernels = np.concatenate(kernels)
        whole = [row for row in rows if row["set"] == "whole"]
        self.assertLen(whole, 200)
        expected = (kernels < 0.01 * kernels.max()).mean()
        self.assertAlmostEqual(float(whole[0]["ratio"]), expected)

    @parameterized.parameters(
        ((), "give --workdir RUN, or --model"),
        (("--workdir", "nowhere"), "is not a run"),
        (("--weights", "FILE", "--model", "convnext_n"), "give --num_classes"),
        (("--epsilon", "3"), "--epsilon is not a flag"),
    )
    def test_refused(self, words, said):
        words = [self.file if word == "FILE" else word for word in words]
        code, _, error = self.call(*words, "--out", self.create_tempdir().full_path)
        self.assertEqual(code, 2)
        self.assertIn(said, error)
        self.assertLen(error.splitlines(), 1)
