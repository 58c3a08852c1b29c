"""PyTorch's modules as functions in JAX: what they compute in, what they return, every refusal."""

import gc
import gzip
import re
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.pytorch import agreement, named
from jaxrobust.pytorch import torch as interop
from jaxrobust.pytorch.operators import TABLE
from jaxrobust.pytorch.program import OperatorRule
from jaxrobust.pytorch.reading import refusals
from jaxrobust.pytorch.torch import converted, from_file, from_module
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)
from tests.support import torch_faults  # noqa: E402

IMAGE = (torch_faults.SIDE, torch_faults.SIDE, torch_faults.CHANNELS)


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).random((count, *IMAGE), np.float32)


def reference(module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()


class FromModuleTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.module = torch_faults.Convolutional().eval()

    def test_is_a_partial_over_named_weights(self):
        logits_fn, weights = from_module(self.module, images())
        self.assertIsInstance(logits_fn, jax.tree_util.Partial)
        self.assertIs(logits_fn.args[0], weights)
        used = {k for k in self.module.state_dict() if "num_batches" not in k}
        self.assertSameElements(weights, used)

    @sweeps.fast("7")
    @parameterized.parameters(1, 2, 7)
    def test_any_number_of_images(self, count):
        logits_fn, _ = from_module(self.module, images(2))
        x = images(count)
        np.testing.assert_allclose(jax.jit(logits_fn)(x), reference(self.module, x), atol=1e-6)

    def test_takes_a_tensor_too(self):
        logits_fn, _ = from_module(self.module, torch.zeros(1, *IMAGE[2:], *IMAGE[:2]))
        np.testing.assert_allclose(logits_fn(images()), reference(self.module, images()), atol=1e-6)

    @pytest.mark.slow
    def test_computes_in_the_type_of_its_weights(self):
        logits_fn, weights = from_module(self.module, images())
        exact = reference(self.module.double(), images().astype("d"))
        with jax.enable_x64(True):
            double = {k: jnp.asarray(np.asarray(v), jnp.float64) for k, v in weights.items()}
            ours = jax.tree_util.Partial(logits_fn.func, double)(images().astype("d"))
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-14)
        half = {k: v.astype(jnp.bfloat16) for k, v in weights.items()}
        coarse = jax.tree_util.Partial(logits_fn.func, half)(images())
        self.assertEqual(coarse.dtype, jnp.float32)
        # bfloat16 has 8 bits, in each of three layers.
        np.testing.assert_allclose(coarse, exact, atol=3 * 2**-8 * np.abs(exact).max())

    def test_one_compilation(self):
        logits_fn, weights = from_module(self.module, images())
        compiled = jax.jit(lambda weights, x: jax.tree_util.Partial(logits_fn.func, weights)(x))
        for scale in (1, 2):
            compiled(jax.tree.map(lambda w, s=scale: w * s, weights), images())
        self.assertEqual(compiled._cache_size(), 1)

    @pytest.mark.slow
    def test_holds_no_module(self):
        logits_fn, _ = from_module(self.module, images())
        module = weakref.ref(self.module)
        del self.module
        gc.collect()
        self.assertIsNone(module())
        logits_fn(images())

    def test_shared_weights_are_held_once(self):
        module = torch_faults.Tied().eval()
        logits_fn, weights = from_module(module, images())
        self.assertLen(weights, 2)
        np.testing.assert_allclose(logits_fn(images()), reference(module, images()), atol=1e-5)

    def test_branches_on_its_own_numbers(self):
        module = torch_faults.Thresholded().eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        logits_fn, weights = from_module(module, images())
        expected = reference(module, images())
        self.assertIn(np.float32(0.1), expected)  # some are near the center, and some are not
        self.assertNotAlmostEqual(np.abs(expected).max(), 0.1)
        np.testing.assert_allclose(logits_fn(images()), expected, atol=1e-6)
        self.assertSameElements(weights, {"center", "threshold", "head.weight", "head.bias"})
        self.assertSequenceEqual(list(before), list(module.state_dict()))
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)

    @parameterized.parameters(
        (torch_faults.Both, "0", lambda found: found[0]),
        (torch_faults.Named, "logits", lambda found: found["logits"]),
        (torch_faults.WithFeatures, None, lambda found: found["logits"]),
    )
    def test_several_results(self, make, output, chosen):
        module = make().eval()
        logits_fn, _ = from_module(module, images(), output=output)
        expected = chosen(module(torch.from_numpy(images().transpose(0, 3, 1, 2).copy())))
        np.testing.assert_allclose(logits_fn(images()), expected.detach().numpy(), atol=1e-6)

    @parameterized.parameters(
        (torch_faults.Branch, r"data-dependent .* at .*torch_faults\.py, line \d+ \(if x\.sum\(\)"),
        (torch_faults.Branch, r"use torch\.where"),
        (torch_faults.Random, r"torch_faults\.py, line \d+ .*randn_like.* draws random numbers"),
        (torch_faults.Dropping, r"torch_faults\.py, line \d+ .*draws random numbers in eval mode"),
        (torch_faults.Bessel, r"torch_faults\.py, line \d+ .*bessel_j0.* is not supported"),
        (
            torch_faults.Choosing,
            r"torch_faults\.py, line \d+ .*mask that depends .*sizes that depend on the images",
        ),
        (torch_faults.Replacing, r"torch_faults\.py, line \d+ .*mask that depends .*torch\.where"),
        (
            torch_faults.Counting,
            r"torch_faults\.py, line \d+ .*nonzero .*sizes that depend on the im",
        ),
        (torch_faults.Binning, r"torch_faults\.py, line \d+ .*bincount .*images .*scatter_add"),
        (
            torch_faults.Overwriting,
            r"torch_faults\.py, line \d+ \(y = x\.exp\(\)\): PyTorch itself cannot .*in place",
        ),
        (torch_faults.Reading, r"torch_faults\.py, line \d+ .*plain number .*depend on the images"),
        (torch_faults.Casting, r"torch\.autocast inside it computes in bfloat16, but verdicts are"),
        (torch_faults.Containing, r"its net is a TorchScript module inside another module"),
        (
            lambda: torch_faults.quantised(),
            r"^1 is torch\.ao\.nn\.quantized.* quantized, .*give the float module",
        ),
        (
            lambda: torch_faults.of_larger_images().eval(),
            r"images are \[B,3,8,8\], but its 2, Linear\(.* fails .*"
            r"module accepts \[B,3,32,32\]; give image_size=32$",
        ),
        (
            lambda: torch_faults.of_grey_images().eval(),
            r"images are \[B,3,8,8\], but its 0, Conv2d\(1.* fails .*module accepts \[B,1,8,8\]$",
        ),
        (
            lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, 10)).eval(),
            r"its 1, Linear\(.* fails on them; PyTorch reports: mat1 .*, or check that its layers",
        ),
        (torch_faults.Both, r"returns 0 \[B, 10\], 1 \[B, 3\]; .*--torch_output NAME"),
        (torch_faults.Named, r"returns logits \[B, 10\], features \[B, 3\]; .*--torch_output NAME"),
        (torch_faults.NoLogits, r"returns a tensor \[B\], but no logits \[B,K\]"),
        (lambda: torch_faults.Convolutional().train(), r"^the module is in training mode; call"),
        (lambda: _half_trained(), r"module is in training mode \(body\.1\); call module\.eval\(\)"),
        (
            lambda: torch_faults.Linear().eval().double(),
            r"head\.weight .* is float64; .*module\.float",
        ),
        (
            lambda: torch_faults.Linear().eval().to("meta"),
            r"head\.weight .* is on meta; .*module\.cpu",
        ),
        (lambda: torch_faults.Linear().state_dict(), r"it is a state dict"),
        (lambda: 3, r"it is a int, not a torch\.nn\.Module"),
    )
    def test_refuses(self, make, message):
        module = make()
        if isinstance(module, torch.nn.Module) and type(module) is make:
            module = module.eval()
        with self.assertRaises(ValueError) as caught:
            from_module(module, images())
        self.assertRegex(str(caught.exception), message)
        self.assertNotIn("\n", str(caught.exception))

    @parameterized.parameters(
        lambda: torch_faults.Unpooling(),
        lambda: torch_faults.Masked(),
        lambda: torch_faults.CastingElsewhere(),
        lambda: torch_faults.Thermometer(),
        lambda: torch.jit.script(torch_faults.Convolutional().eval()),
        lambda: torch.jit.trace(torch_faults.Convolutional().eval(), torch.zeros(1, 3, 8, 8)),
        lambda: torch_faults.EachByItself(),  # code for a number of images
        lambda: torch_faults.Changing(),  # its images
        lambda: torch_faults.NormalisingItself(),  # its weights
    )
    def test_is_the_modules(self, make):
        module = make().eval()
        network = converted(module, IMAGE)
        ours = network.logits_fn(images())
        np.testing.assert_allclose(ours, reference(module, images()), atol=1e-6)
        self.assertLess(agreement.compared(network, images()).gradients, 1e-4)

    @parameterized.parameters(
        (torch_faults.Underived, r"\(.*gammainc.*\): PyTorch itself .*not implemented.*detach"),
        (torch_faults.Overwriting, r"line \d+ \(y = x\.exp.*: PyTorch itself .*y\.clone\(\)$"),
    )
    def test_what_pytorch_cannot_differentiate_is_named(self, make, message):
        with self.assertRaisesRegex(ValueError, message):
            refusals.without_gradient(make().eval(), images(), [])

    def test_conditions_of_images_are_refused(self):
        with self.assertRaisesRegex(ValueError, r"cond"):
            from_module(torch_faults.Conditional().eval(), images())

    def test_refuses_another_result(self):
        with self.assertRaisesRegex(
            ValueError, r"returns logits .*, but no logits 'logit' \[B,K\]"
        ):
            from_module(torch_faults.Named().eval(), images(), output="logit")

    def test_refuses_images_of_another_shape(self):
        with self.assertRaisesRegex(ValueError, r"images have shape \(8, 8, 3\)"):
            from_module(self.module, images()[0])

    def test_refuses_tensors_and_channels_first(self):
        first = images().transpose(0, 3, 1, 2)
        with self.assertRaisesRegex(ValueError, r"accepts \[B,3,8,8\]; pass NumPy images as \[B,H"):
            from_module(self.module, first)
        logits_fn, _ = from_module(self.module, torch.from_numpy(first))
        for wrong in (torch.from_numpy(first), images()[0]):
            with self.assertRaisesRegex(ValueError, r"^images are (Tensor|ndarray) .*permute"):
                logits_fn(wrong)
        attack = attacks.fgsm(epsilon=0.1)
        with self.assertRaisesRegex(ValueError, "look channels-first"):
            attack(logits_fn, None, first, np.zeros(len(first), int))
        with self.assertRaisesRegex(ValueError, "is a PyTorch module; convert it with"):
            attack(self.module, None, images(), np.zeros(len(first), int))


def _half_trained():
    module = torch_faults.Convolutional().eval()
    module.body[1].train()
    return module


class GradientsTest(parameterized.TestCase):
    @sweeps.rows(torch_faults.Thermometer, torch_faults.Rounded)
    def test_of_which_none_reach_the_images(self, make):
        module, x = make().eval(), images()
        said = refusals.without_gradient(module, x, ())
        self.assertRegex(said, "no gradient reaches the images .*; only gradient-free attacks")
        with self.assertRaisesRegex(
            ValueError, r"apgd-ce, apgd-t would .*straight-through.*square"
        ):
            refusals.without_gradient(module, x, ("apgd-ce", "apgd-t"))

    def test_which_reach_them(self):
        module = torch_faults.Named().eval()
        self.assertEqual(refusals.without_gradient(module, images(), ("apgd-ce",)), "")


class FileTest(parameterized.TestCase):
    def saved(self, *, example=2, dynamic=True) -> str:
        module = torch_faults.Convolutional().eval()
        shape = (example, *IMAGE[2:], *IMAGE[:2])
        sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
        exported = torch.export.export(module, (torch.zeros(shape),), dynamic_shapes=sizes)
        path = self.create_tempfile("net.pt2").full_path
        torch.export.save(exported, path)
        return path

    @parameterized.parameters({"dynamic": True}, {"dynamic": False, "example": 1})
    def test_is_the_module(self, **how):
        logits_fn, _ = from_file(self.saved(**how))
        expected = reference(torch_faults.Convolutional().eval(), images())
        np.testing.assert_allclose(logits_fn(images()), expected, atol=1e-6)

    @pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
        reason="PyTorch before 2.9 does not read what 2.9 wrote",
    )
    @pytest.mark.slow
    def test_of_another_version(self):
        golden = paths.GOLDEN / "interop"
        path = self.create_tempfile("net.pt2").full_path
        Path(path).write_bytes(gzip.decompress((golden / "torch_2_9_1.pt2.gz").read_bytes()))
        theirs = np.load(golden / "torch_2_9_1.npz")
        logits_fn, _ = from_file(path)
        x = jnp.asarray(np.random.default_rng(0).random((3, 16, 16, 3), np.float32))
        logits, gradient = jax.device_get(
            (logits_fn(x), jax.grad(lambda x: logits_fn(x)[:, 0].sum())(x))
        )
        # Both round in float32; the logits are about 1, the gradients up to 0.02.
        np.testing.assert_allclose(logits, theirs["logits"], atol=1e-6)
        np.testing.assert_allclose(gradient, theirs["gradient"], atol=1e-8)

    def test_of_torchscript(self):
        module = torch_faults.Convolutional().eval()
        path = Path(self.create_tempdir().full_path) / "net.pt"
        torch.jit.save(torch.jit.script(module), path)
        built = named.built("--torch", str(path), None, None)
        logits_fn, _ = from_module(built.network, images())
        np.testing.assert_allclose(logits_fn(images()), reference(module, images()), atol=1e-6)

    def test_refuses_a_fixed_number_of_images(self):
        with self.assertRaisesRegex(ValueError, "only accepts 4 images at a time; export it"):
            from_file(self.saved(dynamic=False, example=4))

    def test_refuses_what_it_cannot_read(self):
        path = self.create_tempfile("net.pt2", "no archive").full_path
        said = rf"cannot read it with PyTorch {re.escape(torch.__version__)} \(.*save it again"
        with self.assertRaisesRegex(ValueError, said):
            from_file(path)


class AgreementTest(parameterized.TestCase):
    def test_of_a_right_conversion(self):
        network = converted(torch_faults.Convolutional().eval(), IMAGE)
        found = agreement.compared(network, images())
        self.assertLess(max(found.logits, found.gradients), 1e-5)
        self.assertGreater(min(found.seconds), 0)
        self.assertRegex(found.words(), r"agree on 5 images .* ms in JAX, .* ms in PyTorch")

    @pytest.mark.slow
    def test_names_the_first_operator_that_differs(self):
        network = converted(torch_faults.Convolutional().eval(), IMAGE)
        relu = "aten.relu.default"
        row, TABLE[relu] = TABLE[relu], OperatorRule(lambda x: jnp.maximum(x, -1e-3), joins=True)
        self.addCleanup(TABLE.__setitem__, relu, row)
        with self.assertRaisesRegex(
            ValueError, r"first operator .* is aten\.relu\.default at .*torch_faults\.py, line \d+"
        ):
            agreement.compared(network, images())

    def test_sees_a_wrong_gradient(self):
        network = converted(torch_faults.Convolutional().eval(), IMAGE)
        relu = "aten.relu.default"
        row, right = TABLE[relu], TABLE[relu].plain

        @jax.custom_jvp
        def wrong(x):
            return right(x)

        wrong.defjvp(lambda primals, tangents: (right(*primals), tangents[0]))
        TABLE[relu] = OperatorRule(wrong, joins=True)
        self.addCleanup(TABLE.__setitem__, relu, row)
        with self.assertRaisesRegex(ValueError, "All operators return the same values, so either"):
            agreement.compared(network, images())


class ShownTest(absltest.TestCase):
    """The images on which a network is compared with its module."""

    def setUp(self):
        super().setUp()
        self.images = np.random.default_rng(1).random((4, 5, 6, 3), np.float32)

    def test_are_spread_over_those_given(self):
        shown = interop._some(self.images, 2)
        np.testing.assert_array_equal(shown, self.images[[0, -1]])
        tensor = torch.from_numpy(self.images.transpose(0, 3, 1, 2)).requires_grad_()
        np.testing.assert_array_equal(interop._some(tensor, 2), shown)
        self.assertEqual(interop._image(tensor), interop._image(self.images))

    def test_are_noise_where_one_shows_nothing(self):
        self.images[1] = 0.5
        shown = interop._some(self.images, 3)
        self.assertEqual(shown.shape, (3, 5, 6, 3))
        self.assertGreater(shown.std((1, 2, 3)).min(), 0.2)
        self.assertLen(interop._some(self.images[:0], 3), 3)
