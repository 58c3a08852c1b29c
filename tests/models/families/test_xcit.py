import copy
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models.families import xcit
from jaxrobust.models.modules import positions
from jaxrobust.models.modules.draws import Draws, Drop
from jaxrobust.weights.naming import convert
from tests.support import behaviour, parity, reference
from tests.support.families import reference_here, stored_waves

TINY = {"dim": 8, "depth": 2, "heads": 2, "stem_strides": (4,), "image_size": 12}


class XcitTest(parameterized.TestCase):
    def test_parameters_for_small_images(self):
        for classes, count in ((10, 25_872_154), (100, 25_906_804)):
            options = {"image_size": 32, "num_classes": classes}
            self.assertEqual(parity.parameters("xcit_s12_p4", **options), count)

    @parameterized.parameters(8, 14)
    def test_waves(self, length):
        # The last bit of a float32 just below 1.
        theirs = stored_waves(length)
        np.testing.assert_allclose(positions.waves(length), theirs, rtol=1.2e-7, atol=6e-8)

    def test_strides_of_fine_tuning_are_those_of_p4(self):
        small = models.variant("xcit_s12", stem_strides=(1, 1, 2, 2))
        self.assertEqual(small, models.variant("xcit_s12_p4"))

    def test_all_blocks_drop_at_one_rate(self):
        """As the authors' and timm's, and unlike those of a ViT, whose rates grow."""
        tiny = TINY | {"depth": 3}
        with jax.enable_x64(True):
            apply, params, stats, images = behaviour.small("xcit_s12", drop_path=0.3, **tiny)
            with mock.patch.object(xcit, "run_blocks", wraps=xcit.run_blocks) as run:
                train = lambda key: apply(params, stats, images, train=True, key=key)  # noqa: E731
                jax.eval_shape(train, jax.random.key(0))
        self.assertEqual([tuple(c.kwargs["rates"]) for c in run.call_args_list], [(0.3,) * 3])

    @pytest.mark.slow
    def test_any_image_size(self):
        apply, params, stats, _ = behaviour.small("xcit_s12", dtype="float32", **TINY)
        logits, _ = jax.jit(apply)(params, stats, jnp.ones((1, 13, 20, 3)))
        self.assertTrue(np.isfinite(logits).all())

    @pytest.mark.matrix
    def test_initialisation_is_the_references(self):
        params, stats = jax.jit(models.create("xcit_t24", depth=1).init)(jax.random.key(0))
        for name in ("blocks.0.attn.qkv", "cls_attn_blocks.1.attn.k", "head"):
            self.assertAlmostEqual(float(params[f"{name}.kernel"].std()), 0.02, 3)
            np.testing.assert_array_equal(params[f"{name}.bias"], 0)
        self.assertAlmostEqual(float(params["cls_token"].std()), 0.02, 2)
        # torch's default for convolutions: 1 / sqrt(fan in).
        bounds = {
            "patch_embed.proj.0.0.kernel": 0.19245,
            "blocks.0.local_mp.conv1.kernel": 1 / 3,
            "blocks.0.local_mp.conv2.bias": 1 / 3,
            "pos_embed.token_projection.bias": 1 / 8,
        }
        for name, bound in bounds.items():
            self.assertBetween(float(jnp.abs(params[name]).max()), 0.95 * bound, bound)
        self.assertNotIn("patch_embed.proj.0.0.bias", params)
        np.testing.assert_array_equal(params["blocks.0.gamma3"], np.float32(1e-5))
        np.testing.assert_array_equal(params["blocks.0.attn.temperature"], np.ones((4, 1, 1)))
        np.testing.assert_array_equal(stats["patch_embed.proj.6.1.var"], 1)
        self.assertEqual(models.variant("xcit_s12").gamma_init, 1.0)
        self.assertFalse(any(p.weak_type for p in params.values()))

    @pytest.mark.slow
    def test_stem_and_head_are_all_that_another_stem_or_classes_change(self):
        def shapes(name, **options):
            params, _ = jax.eval_shape(models.create(name, **options).init, jax.random.key(0))
            return {k: p.shape for k, p in params.items()}

        plain = shapes("xcit_n12")
        names = xcit.NAMES
        changes = {
            names.stem: shapes("xcit_n12_p8"),
            names.head: shapes("xcit_n12", num_classes=10),
        }
        for pattern, other in changes.items():
            self.assertNotEmpty(plain.items() ^ other.items())
            for name, _ in plain.items() ^ other.items():
                self.assertRegex(name, rf"^{pattern}$")

    @parameterized.parameters(
        ({"image_size": 8}, "image_size=8 is smaller than a patch of 16 px; use a larger"),
        ({"stem_strides": 2}, "stem_strides=2 of xcit_s12 must be a tuple of integers"),
        ({"stem_strides": (2, 0)}, r"stem_strides=\(2, 0\) must be a tuple of positive"),
        ({"heads": 5}, "and heads must divide dim"),
        ({"in_channels": 0}, "in_channels=0 must be positive"),
        ({"dim": 132, "heads": 4}, "dim=132 cannot be reached by doubling the channels 3 times"),
        ({"bn_group": -1}, "bn_group=-1 must be a number of images, or 0"),
        ({"stem_widths": (8,)}, r"unknown option \['stem_widths'\] for xcit_s12"),
    )
    def test_errors(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("xcit_s12", **changes)


class ConversionTest(absltest.TestCase):
    @pytest.mark.slow
    def test_facebooks_names(self):
        weights = reference.seeded_weights(parity.MODELS / "xcit_nano_12_p16_224.tsv")
        theirs = {k.replace("pos_embed.", "pos_embeder."): v for k, v in weights.items()}
        for i in range(2):
            place = f"cls_attn_blocks.{i}.attn"
            for part in ("weight", "bias"):
                separate = [theirs.pop(f"{place}.{layer}.{part}") for layer in "qkv"]
                theirs[f"{place}.qkv.{part}"] = np.concatenate(separate)
        half = {k.replace("pos_embeder.", "pos_embed."): v for k, v in theirs.items()}
        expected = convert.from_torch("xcit_n12", weights)
        for naming in (theirs, half):
            ours = convert.from_torch("xcit_n12", naming)
            for got, wanted in zip(ours, expected, strict=True):
                self.assertEqual(got.keys(), wanted.keys())
                for name, array in wanted.items():
                    np.testing.assert_array_equal(got[name], array, name)

    def test_fused_and_separate_together_are_refused(self):
        weights = reference.seeded_weights(parity.MODELS / "xcit_nano_12_p16_224.tsv")
        weights["cls_attn_blocks.0.attn.qkv.weight"] = np.zeros((384, 128), np.float32)
        with self.assertRaisesRegex(ValueError, "fills cls_attn_blocks.0.attn.q.kernel a second"):
            convert.from_torch("xcit_n12", weights)


class BatchStatisticsTest(absltest.TestCase):
    group = 2

    @pytest.mark.slow
    def test_batch_statistics(self):
        """Training mode in float64: values, statistics and gradients of one step."""
        with reference_here():
            self._check_batch_statistics(self.group)

    def _check_batch_statistics(self, group):
        import torch

        from jaxrobust.publish.torch_networks import state_arrays

        net = copy.deepcopy(parity.torch_network("xcit_n12", 10, 64)).double()
        images, labels = np.random.default_rng(0).random((4, 64, 64, 3)), np.array([1, 3, 5, 7])
        theirs, gradients, moved = [], [], []
        for part in np.split(np.arange(4), 4 // (group or 4)):
            each = copy.deepcopy(net).train()  # what one process of the reference would see
            logits = each(torch.tensor(images[part].transpose(0, 3, 1, 2)))
            target = torch.tensor(labels[part])
            torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
            theirs.append(logits.detach().numpy())
            gradients.append({k: p.grad.numpy() for k, p in each.named_parameters()})
            moved.append({k: v.numpy() for k, v in each.state_dict().items() if "running" in k})
        options = {"num_classes": 10, "image_size": 64}
        with jax.enable_x64(True):
            params, stats = convert.from_torch("xcit_n12", state_arrays(net), **options)
            how = {"dtype": "float64", "bn_group": group, "scan": True}
            ours = models.create("xcit_n12", **how, **options)

            def loss(params, stats, images):
                logits, new = ours.apply(params, stats, images, train=True)
                picked = jax.nn.log_softmax(logits)[jnp.arange(4), jnp.asarray(labels)]
                return -picked.sum(), (logits, new)

            run = jax.jit(jax.grad(loss, has_aux=True))
            grads, (logits, new) = jax.device_get(run(params, stats, jnp.asarray(images)))
        self.assertLess(parity.relative(logits, np.concatenate(theirs)), 1e-9)
        summed = {k: sum(g[k] for g in gradients) for k in gradients[0]}
        mean = {k: np.mean([m[k] for m in moved], 0) for k in moved[0]}
        counts = dict.fromkeys((k for k in net.state_dict() if k.endswith("tracked")), np.zeros(()))
        wanted_params, wanted_stats = convert.from_torch(
            "xcit_n12", summed | mean | counts, **options
        )
        largest = max(np.abs(g).max() for g in wanted_params.values())
        for name, wanted in wanted_params.items():
            # Rounding is relative to the largest; some, as of the keys' biases, are nearly 0.
            self.assertLess(np.abs(grads[name] - wanted).max(), 1e-9 * largest, name)
        for name, wanted in wanted_stats.items():
            np.testing.assert_allclose(new[name], wanted, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.matrix
class WholeBatchTest(BatchStatisticsTest):
    """The same with statistics of the whole batch."""

    group = 0


@pytest.mark.matrix
class SlowXcitTest(parameterized.TestCase):
    def test_golden_float64_with_our_own_positions(self):
        listing = "Debenedetti2022Light_XCiT-S12"
        weights = reference.seeded_weights(parity.MODELS / f"{listing}.tsv")
        images = reference.golden_images()
        logits, _ = parity.logits_and_gradients("xcit_s12", weights, images, dtype="float64")
        # See `rounded_as`; float32 itself is 4e-7 off.
        self.assertLess(parity.relative(logits, parity.golden_logits(listing)["f64"]), 5e-9)


@pytest.mark.matrix
class SlowBehaviourTest(parameterized.TestCase):
    def test_statistics_move_alike_with_scan_and_remat(self):
        moved = []
        with jax.enable_x64(True):
            for how in ({}, {"scan": True}, {"remat": True}):
                apply, params, stats, images = behaviour.small(
                    "xcit_s12", batch=4, bn_group=2, drop_path=0.3, **TINY, **how
                )
                key = jax.random.key(1)
                new = jax.jit(lambda p, s, x, f=apply, k=key: f(p, s, x, train=True, key=k)[1])
                moved.append(jax.device_get(new(params, stats, images)))
        plain, *others = moved
        self.assertGreater(np.abs(plain["blocks.1.local_mp.bn.mean"]).max(), 1e-3)
        self.assertGreater(
            np.ptp([plain[f"blocks.{i}.local_mp.bn.var"] for i in (0, 1)], 0).max(), 0
        )
        for other in others:
            self.assertEqual(plain.keys(), other.keys())
            for name, array in plain.items():
                # The same operations, in another order at most.
                np.testing.assert_allclose(other[name], array, rtol=1e-11, atol=1e-13)

    def test_drop_path_keeps_the_expectation(self):
        v = xcit.Variant(8, 1, 2)
        block = xcit.Block(v, Draws(jax.random.key(0)))
        one = jax.random.normal(jax.random.key(1), (1, 4, 8))
        x = xcit.TokenMap(jnp.broadcast_to(one, (4096, 4, 8)), 2)
        out = np.asarray(block(x, Drop(jax.random.key(2), 0.25), False).tokens)
        outcomes, counts = np.unique(out.round(4).reshape(4096, -1), axis=0, return_counts=True)
        self.assertLen(outcomes, 8)
        shares = sorted(0.25 ** (3 - kept) * 0.75**kept for kept in (0, 1, 1, 1, 2, 2, 2, 3))
        # Four standard deviations of a share, at most 0.0077.
        np.testing.assert_allclose(np.sort(counts) / 4096, shares, atol=0.031)
        first = block.attn.proj(block.attn.hidden(block.norm1(one)))  # gamma is 1
        kept = one + first / 0.75
        only_first = (np.abs(out - np.asarray(kept)).max((1, 2)) < 1e-5).mean()
        self.assertAlmostEqual(only_first, 0.75 * 0.25**2, delta=0.02)

    def test_half_precision_with_scan_and_drop_path(self):
        apply, params, stats, images = behaviour.small(
            "xcit_s12", dtype="bfloat16", scan=True, drop_path=0.3, **TINY
        )
        train = jax.jit(lambda k: apply(params, stats, images, train=True, key=k))
        logits, moved = train(jax.random.key(0))
        self.assertTrue(np.isfinite(logits).all())
        self.assertEqual({v.dtype for v in moved.values()}, {jnp.dtype("float32")})
