import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models.families import swin
from jaxrobust.models.modules.draws import Draws
from jaxrobust.weights.naming import convert
from tests.support import behaviour, parity, paths, reference, sweeps
from tests.support.families import CASES

# A map of 5, padded to 6 and shifted, and one of 3 in windows of 2, padded to 4.
TINY = {
    "dim": 6,
    "depths": (2, 1),
    "heads": (1, 2),
    "patch": 2,
    "window": 3,
    "image_size": 10,
}


def brute_force(block, x):
    """The attention of a block for each position by itself, from the definition, in NumPy."""
    w, shift = block.window, block.shift
    side = x.shape[0]
    whole = side + -side % w
    table = np.asarray(block.attn.relative_position_bias_table[...]).reshape(
        2 * w - 1, 2 * w - 1, -1
    )
    kernel, bias = (np.asarray(p[...]) for p in (block.attn.qkv.kernel, block.attn.qkv.bias))
    padded = np.zeros((whole, whole, x.shape[2]))
    padded[:side, :side] = np.roll(x, (-shift, -shift), (0, 1))
    q, k, v = np.split(padded @ kernel + bias, 3, -1)
    heads, out = table.shape[2], np.zeros_like(padded)
    size = x.shape[2] // heads

    def band(at):
        return (at >= whole - w) + (at >= whole - shift) if shift else 0

    for row, column, head in np.ndindex(whole, whole, heads):
        part = slice(head * size, (head + 1) * size)
        places = [(row - row % w + i, column - column % w + j) for i in range(w) for j in range(w)]
        logits = [
            q[row, column, part] @ k[r, c, part] * size**-0.5
            + table[row - r + w - 1, column - c + w - 1, head]
            - 100 * ((band(r), band(c)) != (band(row), band(column)))
            for r, c in places
        ]
        powers = np.exp(np.array(logits) - np.max(logits))
        values = np.stack([v[r, c, part] for r, c in places])
        out[row, column, part] = powers @ values / powers.sum()
    out = np.roll(out[:side, :side], (shift, shift), (0, 1))
    return out @ np.asarray(block.attn.proj.kernel[...]) + np.asarray(block.attn.proj.bias[...])


class SwinTest(parameterized.TestCase):
    @sweeps.fast(1, 3)
    @parameterized.parameters((6, 2, 0), (6, 2, 1), (5, 3, 1), (7, 3, 0))
    def test_windows_by_definition(self, side, window, shift):
        with jax.enable_x64(True):
            block = swin.Block(4, 2, window, shift, 1e-5, Draws(jax.random.key(0)))
            random = np.random.default_rng(0)
            drawn = lambda p: jnp.asarray(random.standard_normal(p.shape))  # noqa: E731
            nnx.update(block, jax.tree.map(drawn, nnx.state(block)))
            self.assertGreater(float(block.attn.relative_position_bias_table[...].std()), 0.5)
            x = random.standard_normal((2, side, side, 4))
            ours = block.windowed(jnp.asarray(x))
        for got, image in zip(ours, x, strict=True):
            np.testing.assert_allclose(got, brute_force(block, image), rtol=1e-10, atol=1e-10)

    def test_initialisation_is_the_references(self):
        net = models.create("swin_b", depths=(1, 1), heads=(4, 8), image_size=56)
        params, _ = jax.jit(net.init)(jax.random.key(0))
        for name in ("blocks.0.attn.qkv.kernel", "downsample.reduction.kernel"):
            self.assertAlmostEqual(float(params[f"layers.1.{name}"].std()), 0.02, 3)
        tables = params["layers.1.blocks.0.attn.relative_position_bias_table"]
        self.assertAlmostEqual(float(tables.std()), 0.02, 2)
        bound = 1 / np.sqrt(3 * 4 * 4)  # torch's default for the convolution, bias too
        for name in ("patch_embed.proj.kernel", "patch_embed.proj.bias"):
            self.assertBetween(float(jnp.abs(params[name]).max()), 0.95 * bound, bound)
        np.testing.assert_array_equal(params["layers.0.blocks.0.mlp.fc1.bias"], 0)
        self.assertFalse(any(p.weak_type for p in params.values()))

    @pytest.mark.slow
    def test_epsilon_of_the_layer_norms_is_of_the_row(self):
        outs = []
        for eps in (1e-5, 1e-6):
            apply, params, stats, images = behaviour.small(
                "swin_b", dtype="float32", eps=eps, **TINY
            )
            outs.append(jax.jit(apply)(params, stats, images)[0])
        self.assertEqual(models.variant("swin_b").eps, 1e-5)
        self.assertGreater(np.abs(outs[0] - outs[1]).max(), 0)

    @parameterized.parameters(
        (
            {"image_size": 226},
            "image_size=226 is not a whole number of patches of 4 px; use 224 or",
        ),
        ({"image_size": 2}, "use 4 or 8"),
        ({"heads": (4, 8)}, "must have the same length"),
        ({"heads": (3, 8, 16, 32)}, "must divide dim=128, which doubles at every stage"),
        ({"depths": (2, 0)}, r"depths=\(2, 0\) must be a tuple of positive integers"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"eps": -1.0}, "eps=-1.0 must be above 0"),
        ({"eps": float("nan")}, "eps=nan of swin_b must be a finite number"),
        ({"eps": "1e-5"}, "eps='1e-5' of swin_b must be a finite number"),
        ({"dim": 128.0}, "dim=128.0 of swin_b must be an integer"),
        ({"dim": True}, "dim=True of swin_b must be an integer"),
        ({"depths": 2}, "depths=2 of swin_b must be a tuple of integers"),
        ({"remat": 1}, "remat=1 of swin_b must be True or False"),
        ({"dtype": None}, "dtype=None of swin_b must be a string"),
        ({"scan": True}, r"unknown option \['scan'\] for swin_b"),
    )
    def test_errors(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("swin_b", **changes)

    def test_images_of_another_size(self):
        apply, params, stats, _ = behaviour.small("swin_b", dtype="float32", **TINY)
        with self.assertRaisesRegex(ValueError, "created with image_size=10; create it with"):
            apply(params, stats, jnp.ones((1, 12, 12, 3)))


@pytest.mark.slow
class ConversionTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.weights = reference.seeded_weights(
            parity.MODELS / f"{CASES['swin'].listings['swin_b']}.tsv"
        )
        cls.expected = convert.from_torch("swin_b", cls.weights)[0]

    def check_same(self, weights):
        ours, _ = convert.from_torch("swin_b", weights)
        self.assertEqual(ours.keys(), self.expected.keys())
        for name, array in self.expected.items():
            np.testing.assert_array_equal(ours[name], array, name)

    def buffers(self):
        index = {f"layers.{i}.blocks.0.attn.relative_position_index": (49, 49) for i in range(4)}
        mask = {f"layers.{i}.blocks.1.attn_mask": (64 // 4**i, 49, 49) for i in range(3)}
        zeros = {k: np.zeros(shape, np.int64) for k, shape in index.items()}
        return zeros | {k: np.zeros(shape, np.float32) for k, shape in mask.items()}

    def test_old_names(self):
        old = {}
        for name, array in self.weights.items():
            for i in range(3):
                name = name.replace(f"layers.{i + 1}.downsample", f"layers.{i}.DOWNSAMPLE")
            old[name.replace("DOWNSAMPLE", "downsample").replace("head.fc", "head")] = array
        self.assertIn("layers.0.downsample.norm.bias", old)
        self.assertNotIn("layers.3.downsample.norm.bias", old)
        self.check_same(old)
        self.check_same(old | self.buffers())

    def test_buffers_beside_new_names(self):
        self.check_same(self.weights | self.buffers())

    def test_smaller_window_keeps_the_bias_of_each_offset(self):
        ours, _ = convert.from_torch("swin_b", self.weights, image_size=192)
        place = "layers.3.blocks.1.attn.relative_position_bias_table"
        whole = self.weights[place].reshape(13, 13, 32)
        np.testing.assert_array_equal(ours[place].reshape(11, 11, 32), whole[1:12, 1:12])
        same = "layers.2.blocks.1.attn.relative_position_bias_table"
        np.testing.assert_array_equal(ours[same], self.weights[same])

    def with_tables(self, shape):
        """The weights with tables of another shape, after the number of heads is filled in."""
        return {
            k: np.zeros(shape(v.shape[1]), np.float32) if k.endswith("bias_table") else v
            for k, v in self.weights.items()
        }

    @parameterized.parameters(8, 12, 14)
    def test_weights_of_another_window_are_refused(self, window):
        weights = self.with_tables(lambda heads: ((2 * window - 1) ** 2, heads))
        message = f"belong to a window of {window}; create the network with window={window}"
        for size in (192, 224):
            with self.assertRaisesRegex(ValueError, message):
                convert.from_torch("swin_b", weights, image_size=size)

    def test_weights_of_another_window_in_its_network(self):
        weights = self.with_tables(lambda heads: (23**2, heads))
        ours, _ = convert.from_torch("swin_b", weights, image_size=384, window=12)
        table = ours["layers.3.blocks.1.attn.relative_position_bias_table"]
        self.assertEqual(table.shape, (23**2, 32))

    @parameterized.parameters(((),), ((169,),), ((168, 4),), ((144, 4),), ((169, 5),))
    def test_no_table_is_left_for_the_engine_to_report(self, shape):
        array = np.zeros(shape, np.float32)
        self.assertIs(swin.fitted(array, (121, 4)), array)

    def test_message_on_what_is_no_table(self):
        weights = self.with_tables(lambda heads: (heads, 13, 13))
        message = r"shape \(4, 13, 13\) for .*relative_position_bias_table \(169, 4\)"
        with self.assertRaisesRegex(ValueError, message):
            convert.from_torch("swin_b", weights, image_size=192)


class FittedTest(absltest.TestCase):
    def test_tables_are_cut_around_the_middle_up_to_the_known_window(self):
        table = np.arange(169 * 2, dtype=np.float32).reshape(169, 2)
        cut = swin.fitted(table, (25, 2)).reshape(5, 5, 2)
        np.testing.assert_array_equal(cut, table.reshape(13, 13, 2)[4:9, 4:9])
        np.testing.assert_array_equal(swin.fitted(table, (169, 2)), table)
        for after in (7, 9):
            with self.assertRaisesRegex(ValueError, "a window of 8; create the network with win"):
                swin.fitted(np.zeros((225, 2)), ((2 * after - 1) ** 2, 2))

    def test_of_a_larger_window_they_are_interpolated_as_pytorch_does(self):
        torch = parity.torch_or_skip(self)
        table = np.random.default_rng(0).standard_normal((13**2, 3))
        theirs = torch.from_numpy(table).T.reshape(1, 3, 13, 13)
        theirs = torch.nn.functional.interpolate(theirs, size=(27, 27), mode="bicubic")
        found = swin.fitted(table.astype(np.float32), (27**2, 3))
        self.assertEqual(found.dtype, np.float32)
        expected = theirs.reshape(3, -1).T.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)  # of numbers to 3, in float32
        np.testing.assert_allclose(swin.fitted(table, (27**2, 3)), expected, rtol=0, atol=1e-12)

    def test_another_window_of_a_whole_network(self):
        """Weights of one window start a network of a larger one; offsets 0 keep their bias best."""
        sizes = {"num_classes": 3, "image_size": 16, "depths": (1,), "heads": (2,), "dim": 4}
        small = models.create("swin_b", window=4, patch=2, **sizes)
        arrays = {
            k: np.asarray(a) for part in small.init(jax.random.key(0)) for k, a in part.items()
        }
        params, stats = (arrays, {})
        theirs = convert.reference_names("swin_b", params | stats, wrapped=False, depths=(1,))
        ours, _ = convert.from_torch("swin_b", theirs, window=8, patch=2, **sizes)
        place = "layers.0.blocks.0.attn.relative_position_bias_table"
        self.assertEqual(ours[place].shape, (15**2, 2))
        np.testing.assert_array_equal(ours[place], swin.fitted(arrays[place], ours[place].shape))


class WindowTest(parameterized.TestCase):
    """Networks that are not padded, as Microsoft's and MIMIR's are."""

    @parameterized.parameters(
        (
            "swin_l_mimir",
            {"image_size": 256},
            "window=14 .*stage 1, whose side is 64 at image_size="
            "256; use window=16, or padded=True, which pads with zeros",
        ),
        ("swin_b_mimir", {"image_size": 192}, "window=7 does not divide the map of stage 1, .* 48"),
        ("swin_b", {"padded": False, "window": 9}, "stage 1, whose side is 56 .*use window=7,"),
        ("swin_b", {"padded": False, "image_size": 364}, "stage 2, whose side is 45 .*window=91"),
    )
    def test_one_that_does_not_divide_the_map_is_refused(self, name, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create(name, **changes)

    def test_sizes_that_it_divides(self):
        models.create("swin_l_mimir", image_size=224)
        models.create("swin_l_mimir", image_size=256, padded=True)
        models.create("swin_b_mimir", image_size=448)
        self.assertEqual(models.essential("swin_b", {"padded": False}), {})


class ReferenceTest(parameterized.TestCase):
    # Sides that halve to odd ones: windows go by the quotient rounded down, maps are padded up.
    @sweeps.fast(2)
    @parameterized.parameters(100, 200, 208, 240)
    def test_sides_that_do_not_halve(self, side):
        try:
            import torch

            from jaxrobust.publish import torch_networks
        except ImportError:
            self.skipTest(paths.PARITY)
        shape = {"depths": (1, 1, 1, 2), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
        net = torch_networks.network("swin_b", num_classes=10, img_size=side, **shape)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        images = np.random.default_rng(1).random((1, side, side, 3), np.float32)
        with torch.no_grad():
            theirs = net.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        options = {"dim": 8, "depths": (1, 1, 1, 2), "heads": (1, 1, 2, 2)}
        options |= {"num_classes": 10, "image_size": side}
        weights = torch_networks.state_arrays(net)
        params, stats = convert.from_torch("swin_b", weights, **options)
        apply = jax.jit(models.create("swin_b", **options).apply)
        self.assertLess(parity.relative(apply(params, stats, images)[0], theirs), 1e-5)

    @pytest.mark.slow
    def test_small_network(self):
        """Maps of 10 and 5: padded to 14 and shifted, and one window of 5."""
        try:
            import torch

            from jaxrobust.publish import torch_networks
        except ImportError:
            self.skipTest(paths.PARITY)
        shape = {"depths": (2, 2), "embed_dim": 8, "num_heads": (2, 4)}
        net = torch_networks.network("swin_b", num_classes=10, img_size=40, **shape)
        random = np.random.default_rng(0)
        weights = {
            k: random.normal(k.endswith("norm.weight"), 0.3, v.shape).astype(np.float32)
            for k, v in torch_networks.state_arrays(net).items()
        }
        net.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
        images = random.random((2, 40, 40, 3))
        theirs = parity.torch_logits_and_gradients(net, images, "float64")
        with jax.enable_x64(True):
            options = {"dim": 8, "depths": (2, 2), "heads": (2, 4), "dtype": "float64"}
            ours = models.create("swin_b", num_classes=10, image_size=40, **options)
            params, _ = jax.eval_shape(ours.init, jax.random.key(0))
            shapes = {k: p.shape for k, p in params.items()}
            weights = {k: v.astype(np.float64) for k, v in weights.items()}
            params = convert.rename(models.torch_names("swin_b"), weights, shapes)
            stats = {"normalize.mean": np.zeros(3), "normalize.std": np.ones(3)}
            params, stats = jax.tree.map(jnp.asarray, (params, stats))

            def loss(x):
                logits, _ = ours.apply(params, stats, x)
                return jax.nn.log_softmax(logits)[:, 0].sum(), logits

            gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(images))
        self.assertLess(parity.relative(logits, theirs[0]), 1e-9)
        self.assertLess(parity.relative(gradient, theirs[1]), 1e-7)


@pytest.mark.matrix
class SlowSwinTest(parameterized.TestCase):
    # At 96 px maps of 24, 12, 6 and 3: windows of 7, 7, 6 and 3, padded, shifted and whole.
    @parameterized.parameters(("swin_b", 64), ("swin_b", 96), ("swin_b", 224), ("swin_l", 256))
    def test_reference(self, name, side):
        parity.check_reference(self, name, image_size=side, batch=1)


@pytest.mark.matrix
class SlowBehaviourTest(parameterized.TestCase):
    def test_remat_changes_nothing(self):
        values = []
        with jax.enable_x64(True):
            for remat in (False, True):
                apply, params, stats, images = behaviour.small(
                    "swin_b", drop_path=0.3, remat=remat, **TINY
                )
                key = jax.random.key(3)

                def total(params, images, apply=apply, stats=stats, key=key):
                    logits = apply(params, stats, images, train=True, key=key)[0]
                    return (logits * jnp.arange(5.0)[None]).sum()

                run = jax.jit(jax.grad(total, (0, 1)))
                values.append(jax.device_get(run(params, images)))
        (plain, plain_images), (params, images) = values
        self.assertLess(parity.relative(images, plain_images), 1e-12)
        for name, array in plain.items():
            largest = max(np.abs(array).max(), 1e-3)
            self.assertLess(np.abs(params[name] - array).max(), 1e-11 * largest, name)
