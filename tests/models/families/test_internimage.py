"""InternImage-T next to the authors' network: golden numbers of internimage.npz.

They were made by running OpenGVLab/InternImage (31c962d) with its operator in PyTorch; weights and
images of 224 px are those of the other golden logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import parity, reference, sweeps

NAMES = ("internimage_t", "internimage_t_ps")
# Blocks of a stage are compiled once: 30 of them alike take minutes.
SCANNED = {"scan": True}


def golden(key: str) -> np.ndarray:
    return np.load(parity.MODELS / "internimage.npz")[key]


def loaded(name: str, dtype: str = "float32"):
    """Our parameters and statistics of the authors' golden weights."""
    weights = reference.seeded_weights(parity.MODELS / f"{name}.tsv")
    weights = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in weights.items()}
    return convert.from_torch(name, weights)


class InternImageTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_weights_both_ways(self, name):
        """The authors' file under `model`, as they store it, becomes ours and their names again."""
        weights = {
            key: np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)
            for key, shape, dtype in reference.entries(parity.MODELS / f"{name}.tsv")
        }
        wrapped = {f"model.{key}": array for key, array in weights.items()}
        params, stats = convert.from_torch(name, wrapped)
        back = convert.to_torch(name, params, stats)
        self.assertEqual(list(back), list(weights))
        for key, array in weights.items():
            np.testing.assert_array_equal(back[key], array, key)

    def test_initialisation_is_the_authors(self):
        quarter = {"dims": (16, 32, 64, 128), "groups": (1, 2, 4, 8), "stem_widths": (8, 16)}
        net = models.create("internimage_t", depths=(1, 1, 1, 1), **quarter)
        params, stats = jax.jit(net.init)(jax.random.key(0))
        for name in ("offset", "mask"):
            for part in ("kernel", "bias"):
                self.assertFalse(np.asarray(params[f"stages.2.blocks.0.dcn.{name}.{part}"]).any())
        bound = np.sqrt(6 / (64 + 64))  # Xavier's
        kernel = params["stages.2.blocks.0.dcn.input_proj.kernel"]
        self.assertBetween(float(jnp.abs(kernel).max()), 0.99 * bound, bound)
        self.assertAlmostEqual(float(params["head.kernel"].std()), 0.02, 3)
        self.assertAlmostEqual(float(params["stages.3.blocks.0.mlp.fc1.kernel"].std()), 0.02, 3)
        self.assertNotIn("stages.0.blocks.0.gamma1", params)
        self.assertEqual(stats["features.norm.mean"].shape, (768,))

    @pytest.mark.slow
    def test_keeps_little_for_the_backward_pass(self):
        """At most 1.3 times what ConvNeXt-T keeps, weights included; 1.74 times with all of it."""

        def kept(name):
            net = models.create(name, **SCANNED)
            params, stats = jax.eval_shape(net.init, jax.random.key(0))

            def pull(params, stats, images):
                return jax.vjp(lambda p: net.apply(p, stats, images, train=True)[0], params)[1]

            images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
            arrays = jax.tree.leaves(jax.eval_shape(pull, params, stats, images))
            return sum(a.size * a.dtype.itemsize for a in arrays)

        self.assertLess(kept("internimage_t"), 1.3 * kept("convnext_t"))

    @sweeps.rows(
        ({"image_size": 16}, "image_size=16 is smaller than the 32 px that become one feature"),
        ({"groups": (4, 8, 12, 32)}, r"must divide dims=.*: 256 channels cannot form 12 groups"),
        ({"groups": (4, 8)}, r"groups=\(4, 8\) and dims=.* must have the same length"),
        ({"stem_widths": (32, 48)}, r"the last of stem_widths=\(32, 48\) must be dims\[0\]=64"),
        ({"offset_scale": 0.0}, "offset_scale=0.0 must be above 0; InternImage-T uses 1.0"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
    )
    def test_errors(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("internimage_t", **changes)

    def test_weights_of_another_head(self):
        shapes = reference.entries(parity.MODELS / "internimage_t.tsv")
        weights = {key: np.zeros(shape, dtype) for key, shape, dtype in shapes}
        weights |= {"head.weight": np.zeros((10, 768), np.float32), "head.bias": np.zeros(10, "f4")}
        with self.assertRaisesRegex(
            ValueError, "2 weights do not fit; check the model name, num_cl"
        ):
            convert.from_torch("internimage_t", weights)

    def test_weights_of_another_size(self):
        """InternImage-S has 80 channels at first and 21 blocks in its third stage."""
        shapes = parity.MODELS / "internimage_t.tsv"
        weights = {}
        for key, shape, dtype in reference.entries(shapes):
            wide = tuple(n * 80 // 64 if n >= 64 and n != 1000 else n for n in shape)
            weights[key] = np.zeros(wide, dtype)
        for key in [key for key in weights if key.startswith("levels.2.blocks.0.")]:
            for number in (18, 19, 20):
                weights[key.replace("blocks.0", f"blocks.{number}")] = weights[key]
        message = (
            r"their shapes match dims=\(80, 160, 320, 640\), depths=\(4, 4, 21, 4\), but "
            r"this internimage_t has dims=\(64, 128, 256, 512\), depths=\(4, 4, 18, 4\)"
        )
        with self.assertRaisesRegex(ValueError, message):
            convert.from_torch("internimage_t", weights)


class GoldenTest(parameterized.TestCase):
    @sweeps.rows(*NAMES)
    @pytest.mark.slow
    def test_float32(self, name):
        params, stats = loaded(name)
        net = models.create(name, **SCANNED)
        logits = jax.jit(net.apply)(params, stats, reference.golden_images())[0]
        # PyTorch's float32 is 4e-7 from its own float64.
        self.assertLess(parity.relative(logits, golden(f"{name}__f32")), 1e-5)

    @parameterized.parameters(*NAMES)
    @pytest.mark.matrix
    def test_float64(self, name):
        with jax.enable_x64(True):
            params, stats = loaded(name, "float64")
            net = models.create(name, dtype="float64", **SCANNED)
            images = jnp.asarray(reference.golden_images(), jnp.float64)

            def total(images):
                logits = net.apply(params, stats, images)[0]
                return logits[:, 0].sum(), logits

            (_, logits), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(images)
        self.assertLess(parity.relative(logits, golden(f"{name}__f64")), 1e-9)
        sampled = gradient.transpose(0, 3, 1, 2)[:, :, ::7, ::7]
        # Golden gradients are of float64 throughout: rounding alone, as with other networks.
        self.assertLess(parity.relative(sampled, golden(f"{name}__grad0_f64_every7")), 1e-7)
        sums = np.abs(np.asarray(gradient)).sum((1, 2, 3))
        self.assertLess(parity.relative(sums, golden(f"{name}__grad0_l1_f64")), 1e-7)

    @pytest.mark.slow
    def test_statistics_of_the_head(self):
        """Training mode in float64: logits and running statistics after four images of 64 px."""
        drawn = np.random.RandomState(9).random_sample((4, 3, 64, 64)).astype(np.float32)
        images = drawn.transpose(0, 2, 3, 1).astype(np.float64)  # golden images are of float32
        with jax.enable_x64(True):
            params, stats = loaded("internimage_t", "float64")
            net = models.create("internimage_t", dtype="float64", image_size=64, **SCANNED)
            train = jax.jit(lambda p, s, x: net.apply(p, s, x, train=True))
            logits, moved = train(params, stats, jnp.asarray(images))
            frozen, same = jax.jit(net.apply)(params, stats, jnp.asarray(images))
        self.assertLess(parity.relative(logits, golden("internimage_t__train_64_f64")), 1e-9)
        for part in ("mean", "var"):
            wanted = golden(f"internimage_t__train_64_running_{part}")
            self.assertLess(parity.relative(moved[f"features.norm.{part}"], wanted), 1e-9)
            # What an attack asks reads the running ones and moves nothing.
            np.testing.assert_array_equal(
                same[f"features.norm.{part}"], stats[f"features.norm.{part}"]
            )
        self.assertGreater(parity.relative(frozen, logits), 1e-3)
