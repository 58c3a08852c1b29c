"""What a comparison of two networks measures, of two linear maps whose numbers are known."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.models.modules import positions
from jaxrobust.publish import side_by_side
from jaxrobust.publish.side_by_side import Side
from tests.support import paths

try:
    import torch

    from jaxrobust.publish import torch_networks
except ImportError:
    torch = None

CLASSES = 4
DRAW = np.random.default_rng(0)
WEIGHTS, OTHER = DRAW.normal(size=(12, CLASSES)), 0.2 * DRAW.normal(size=(12, CLASSES))
IMAGES = DRAW.random((6, 2, 2, 3)).astype(np.float32)


def side(weights, rounds, shift) -> Side:
    """Linear logits of summed-up cross-entropy; float32 is off by `rounds`, attacks move by
    `shift`.
    """

    def logits_and_gradient(images, labels, dtype):
        x = images.reshape(len(images), -1).astype(np.float64)
        logits = x @ weights * (1 + rounds * (dtype == "float32"))
        powers = np.exp(logits - logits.max(1, keepdims=True))
        shares = powers / powers.sum(1, keepdims=True)
        gradient = (shares - np.eye(CLASSES)[labels]) @ weights.T
        return logits.astype(dtype), gradient.reshape(images.shape).astype(dtype)

    return Side(logits_and_gradient, lambda images, labels: images + np.float32(shift))


@absltest.skipIf(torch is None, paths.PARITY)
class PositionsTest(absltest.TestCase):
    def test_are_rounded_as_pytorchs_sines_are(self):
        ours = positions.waves
        with side_by_side._positions_of_pytorch():
            found = positions.waves(7)
            self.assertIsNot(positions.waves, ours)
        self.assertIs(positions.waves, ours)
        self.assertEqual((found.shape, found.dtype), ((7, 32), np.float32))
        at = np.arange(1, 8) / (7 + 1e-6) * 2 * np.pi
        angles = at[:, None] / 10000 ** (np.arange(0, 32, 2) / 32)
        expected = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(7, 32)
        np.testing.assert_allclose(found, expected, atol=1e-6)  # float32
        np.testing.assert_allclose(found, ours(7), atol=3e-7)


class MeasuredTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.ours = side(WEIGHTS + 1e-3 * OTHER, 0.0, 0.1)
        self.theirs = side(WEIGHTS, 1e-4, 0.3)
        self.found = side_by_side.measured(self.ours, self.theirs, IMAGES)
        self.labels = self.theirs.logits_and_gradient(IMAGES, [0] * 6, "float32")[0].argmax(1)

    def parts(self, dtype):
        both = (self.ours, self.theirs)
        return [one.logits_and_gradient(IMAGES, self.labels, dtype) for one in both]

    def test_logits_and_gradients(self):
        for dtype in ("float32", "float64"):
            (ours, slope), (theirs, their_slope) = self.parts(dtype)
            row, slopes = self.found["logits"][dtype], self.found["gradients"][dtype]
            apart = np.abs(ours.astype(np.float64) - theirs).max()
            self.assertAlmostEqual(row["absolute"], apart, delta=1e-6 * apart)
            self.assertAlmostEqual(row["relative"], apart / np.abs(theirs).max(), delta=1e-8)
            apart = np.abs(slope.astype(np.float64) - their_slope).max()
            self.assertAlmostEqual(
                slopes["relative"], apart / np.abs(their_slope).max(), delta=1e-8
            )
            flat = [g.reshape(6, -1).astype(np.float64) for g in (slope, their_slope)]
            cosines = [
                a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*flat, strict=True)
            ]
            self.assertAlmostEqual(slopes["cosine"], min(cosines), delta=1e-12)
            same = np.mean(np.sign(slope) == np.sign(their_slope))
            self.assertEqual(slopes["sign_agreement"], same)
        self.assertLess(min(cosines), sum(cosines) / 6 - 1e-12)

    def test_the_references_own_rounding_is_between_its_two_types(self):
        (_, single), (_, double) = self.parts("float32"), self.parts("float64")
        for place, what in enumerate(("logits", "gradients")):
            apart = np.abs(single[place].astype(np.float64) - double[place]).max()
            own = self.found[what]["float32"]["reference_rounding"]
            self.assertAlmostEqual(own, apart / np.abs(double[place]).max(), delta=1e-9)
            self.assertNotIn("reference_rounding", self.found[what]["float64"])
        self.assertAlmostEqual(
            self.found["logits"]["float32"]["reference_rounding"], 1e-4, delta=1e-6
        )

    def test_labels_are_the_references(self):
        other = side(-WEIGHTS, 0.0, 0.0)
        agreement = np.mean(
            other.logits_and_gradient(IMAGES, self.labels, "float32")[0].argmax(1) == self.labels
        )
        found = side_by_side.measured(other, self.theirs, IMAGES)
        self.assertEqual(found["logits"]["top1_agreement"], agreement)
        self.assertEqual(self.found["logits"]["top1_agreement"], 1)

    def test_attacks_on_each_are_shown_to_both(self):
        transfer = self.found["transfer"]
        self.assertEqual(transfer["images"], 4)
        self.assertEqual((transfer["norm"], transfer["epsilon"]), ("linf", 4 / 255))
        self.assertEqual((transfer["ours"]["steps"], transfer["theirs"]["steps"]), (10, 9))
        labels = self.labels[:4]
        for whose, shift in (("ours", 0.1), ("theirs", 0.3)):
            for on, weights in (
                ("on_ours", WEIGHTS + 1e-3 * OTHER),
                ("on_theirs", 1.0001 * WEIGHTS),
            ):
                logits = (IMAGES[:4].reshape(4, -1) + shift) @ weights
                loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]
                row = transfer[whose][on]
                self.assertEqual(row["fooled"], (logits.argmax(1) != labels).sum())
                self.assertAlmostEqual(row["loss"], loss.mean(), delta=1e-5)
                self.assertEqual(transfer[whose]["attack"], "apgd-ce")

    def test_large_logits_have_a_finite_loss(self):
        large = side(1e4 * WEIGHTS, 0.0, 0.0)
        found = side_by_side._transfer(large, large, IMAGES, self.labels)
        loss = found["ours"]["on_ours"]["loss"]
        self.assertTrue(np.isfinite(loss))

    def test_few_images_at_a_time_are_all_of_them_in_order(self):
        seen = []

        def run(images, labels, dtype):
            seen.append(len(images))
            return images * 2, labels[:, None].astype(dtype)

        images, labels = np.arange(5.0)[:, None], np.arange(5) + 10
        doubled, own = side_by_side._in_parts(run)(images, labels, "float32")
        self.assertEqual(seen, [2, 2, 1])
        np.testing.assert_array_equal(doubled, images * 2)
        np.testing.assert_array_equal(own, labels[:, None])
        one = side_by_side._in_parts(lambda images, labels: images + labels[:, None])
        np.testing.assert_array_equal(one(images, labels), images + labels[:, None])


class ImagesTest(parameterized.TestCase):
    """The images on which two networks are compared."""

    def read(self, *names: str, size: int = 7) -> tuple[list[str], np.ndarray]:
        folder = Path(self.create_tempdir())
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(name.encode())
        seen = []

        def transform(content: bytes) -> np.ndarray:
            seen.append(content.decode())
            return np.full((size, size, 3), 51, np.uint8)

        made = mock.Mock(return_value=transform)
        with mock.patch.object(side_by_side, "evaluation_transform", made):
            found = side_by_side.photographs(folder, size)
        self.how = made.call_args.args[0]
        return seen, found

    def test_eight_photographs_of_any_spelling(self):
        names = ["b.JPEG", "a.jpg", "c.png", "d.WebP", "deep/e.jpeg", "notes.txt", "z.npy"]
        seen, found = self.read(*names)
        self.assertEqual(seen, ["a.jpg", "b.JPEG", "c.png", "d.WebP", "deep/e.jpeg"])
        self.assertEqual((found.shape, found.dtype), ((5, 7, 7, 3), np.float32))
        self.assertAlmostEqual(float(found.max()), 0.2)  # 51 of 255
        self.assertEqual(self.how, "bicubic-8-crop-7")
        seen, _ = self.read(*(f"{n}.png" for n in range(10, 22)), size=224)
        self.assertLen(seen, 8)
        seen, _ = self.read(*(f"{c}/{n}.png" for c in "abcdefgh" for n in range(9)), size=224)
        self.assertEqual([Path(name).parent.name for name in seen], [*"abcdefgh"])
        self.assertEqual(self.how, "bicubic-256-crop-224")

    def test_a_folder_without_photographs(self):
        with self.assertRaisesRegex(ValueError, "holds no .jpeg, .jpg, .png, .webp"):
            self.read("notes.txt")

    def test_smooth_images_are_the_same_each_time_and_of_whole_levels(self):
        found = side_by_side.smooth_images(70, 2, 3)
        self.assertEqual((found.shape, found.dtype), ((3, 70, 70, 2), np.float32))
        np.testing.assert_array_equal(found, side_by_side.smooth_images(70, 2, 3))
        np.testing.assert_allclose(found * 255, np.rint(found * 255), atol=1e-4)
        self.assertBetween(float(found.min()), 0, 0.1)
        self.assertBetween(float(found.max()), 0.9, 1)
        self.assertLess(np.abs(np.diff(found, axis=1)).max(), 0.25)  # neighbors are alike


@absltest.skipIf(torch is None, paths.PARITY)
class AttackTest(parameterized.TestCase):
    """The attack in PyTorch makes the steps of ours, where all iterations are checkpoints."""

    @parameterized.parameters(1, 2, 9)
    def test_is_apgd(self, steps):
        # Two layers and a sine: the loss falls here and there, so that steps are halved.
        draw = np.random.default_rng(3)
        first, second = 3 * draw.normal(size=(12, 9)), draw.normal(size=(9, CLASSES))
        images, labels = draw.random((8, 2, 2, 3)), np.arange(8) % CLASSES
        images[0] = 0.0
        images[1] = 1.0
        epsilon = 0.4

        def net(x):
            x = x.permute(0, 2, 3, 1).flatten(1)
            return torch.sin(x @ torch.from_numpy(first)) @ torch.from_numpy(second)

        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        theirs = torch_networks.apgd(net, x, torch.from_numpy(labels), epsilon, steps)
        with jax.enable_x64(True):
            a, b = jnp.asarray(first), jnp.asarray(second)
            attack = attacks.apgd(norm="linf", epsilon=epsilon, steps=steps)

            def logits(x):
                return jnp.sin(x.reshape(len(x), -1) @ a) @ b

            ours = jax.jit(lambda x, y: attack(logits, None, x, y))(images, labels.astype(np.int32))
        np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), ours, atol=1e-9)

    def test_of_equal_losses_the_first_image_is_kept(self):
        images = torch.from_numpy(DRAW.random((2, 3, 2, 2)))
        images[0, 0, 0, 0] = 1.25
        weights, passes = torch.from_numpy(WEIGHTS), []

        def net(x):
            passes.append(x.requires_grad)
            logits = x.flatten(1) @ weights
            return logits - logits.detach()  # always 0, with gradients that move the image

        found = torch_networks.apgd(net, images, torch.tensor([0, 1]), 0.1, 3)
        np.testing.assert_array_equal(found, images.clamp(0, 1))
        self.assertEqual(passes, [True, True, True, False])
        for steps in (0, 10):
            with self.assertRaises(AssertionError):
                torch_networks.apgd(net, images, torch.tensor([0, 1]), 0.1, steps)

    def test_one_step_goes_to_the_corner_of_the_ball(self):
        images, labels = torch.from_numpy(DRAW.random((4, 3, 2, 2))), torch.arange(4)
        net = lambda x: x.flatten(1) @ torch.from_numpy(WEIGHTS)  # noqa: E731
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), labels), x)
        corner = (images + 0.1 * slope.sign()).clamp(0, 1)
        found = torch_networks.apgd(net, images, labels, 0.1, 1)
        np.testing.assert_allclose(found, corner, atol=1e-12)
