"""Gradients that a module's author defines, and values that no image changes, against PyTorch."""

import pickle
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch import torch as interop
from jaxrobust.pytorch.reading import exporting
from tests.support import paths

torch = pytest.importorskip("torch", reason=paths.PARITY)
from tests.support import torch_defences  # noqa: E402
from tests.support.torch_side import converted, differences, ours, theirs  # noqa: E402

IMAGE = (torch_defences.SIDE, torch_defences.SIDE, torch_defences.CHANNELS)
ORTHOGONAL = torch.nn.utils.parametrizations.orthogonal


def images(count=4):
    return np.random.default_rng(0).random((count, *IMAGE))


def parametrised(make):
    """A convolution and a head of weights that are computed of others."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(torch_defences.CHANNELS, torch_defences.CHANNELS, 3, padding=1)
    head = torch.nn.Linear(torch_defences.CHANNELS * torch_defences.SIDE**2, torch_defences.CLASSES)
    return torch.nn.Sequential(make(conv), torch.nn.ReLU(), torch.nn.Flatten(), make(head)).eval()


class OwnGradientsTest(parameterized.TestCase):
    def test_are_the_authors(self):
        net = torch_defences.Several(torch_defences.OWN_GRADIENTS.values()).double()
        network = converted(net, IMAGE)
        logits, gradients = differences(network, images())
        self.assertLess(logits.max(), 1e-12)
        self.assertLess(gradients.max(), 1e-12)

    @parameterized.parameters(*torch_defences.OWN_GRADIENTS)
    @pytest.mark.slow
    def test_each(self, name):
        layer = torch_defences.Layer(torch_defences.OWN_GRADIENTS[name])
        network = converted(torch_defences.network(layer).double(), IMAGE)
        logits, gradients = differences(network, images())
        self.assertLess(max(logits.max(), gradients.max()), 1e-12)
        # It matters: the program without what the author says has another gradient.
        plain = network.program._replace(
            steps=tuple(
                step._replace(operator="aten.alias.default")
                if step.operator == "jaxrobust.stop.default"
                else step
                for step in network.program.steps
                if not step.backward
            )
        )
        if len(plain.steps) == len(network.program.steps):
            function = interop.function_of(plain, network.output)
            other = network.logits_fn.__class__(function, network.weights)
            gradient = ours(other, images())[1]
            self.assertGreater(np.abs(gradient - theirs(network.module, images())[1]).max(), 1e-6)

    @parameterized.parameters(*torch_defences.WRAPPED)
    def test_hooks_of_values_are_written_down(self, name):
        net = torch_defences.network().double()
        for part in (net, net[2]):
            torch_defences.WRAPPED[name](part)
        logits, gradients = differences(converted(net, IMAGE), images())
        self.assertLess(max(logits.max(), gradients.max()), 1e-12)

    def test_programs_are_data(self):
        layer = torch_defences.Layer(torch_defences.OWN_GRADIENTS["clipped backward"])
        network = converted(torch_defences.network(layer).double(), IMAGE)
        again = pickle.loads(pickle.dumps(network.program))
        function = interop.function_of(again, network.output)
        copy = network._replace(logits_fn=jax.tree_util.Partial(function, network.weights))
        self.assertLess(max(map(np.max, differences(copy, images()))), 1e-12)
        self.assertIsNone(agreement.first_difference(copy, images()))

    def exports(self, net):
        """(images, strict) of each try of an export that always fails."""
        tries = []

        def export(module, examples, *, dynamic_shapes, strict):
            (example,) = examples
            self.assertEqual(dynamic_shapes is None, len(example) == 1)
            tries.append((len(example), strict))
            raise RuntimeError(f"try {len(tries)}\nmore")

        with (
            mock.patch.object(torch.export, "export", export),
            self.assertRaisesRegex(
                ValueError, "^torch.export: try 1 at .*test_gradients.py, line "
            ),
        ):
            exporting.exported(net.eval(), IMAGE)
        return tries

    def test_an_own_gradient_is_in_no_strict_export(self):
        """Which reads the source of the forward pass alone."""
        plain = torch_defences.network()
        self.assertEqual(self.exports(plain), [(2, False), (2, True), (1, False), (1, True)])
        layer = torch_defences.Layer(torch_defences.OWN_GRADIENTS["clipped backward"])
        own = torch_defences.network(layer)
        self.assertEqual(self.exports(own), [(2, False), (1, False)])

    def test_leaves_pytorch_as_it_was(self):
        apply, data = vars(torch.autograd.Function)["apply"], torch.Tensor.data
        with self.assertRaises(ValueError):
            net = torch_defences.network()
            torch_defences.REFUSED["input changed in place by a Function"][0](net)
            exporting.exported(net, IMAGE)
        self.assertIs(vars(torch.autograd.Function)["apply"], apply)
        self.assertIs(torch.Tensor.data, data)
        self.assertNotIn("forward", vars(net))


class RefusedTest(parameterized.TestCase):
    @parameterized.parameters(*torch_defences.REFUSED)
    def test_is_refused_by_its_cause(self, name):
        change, message = torch_defences.REFUSED[name]
        module = torch_defences.network()
        change(module)
        with self.assertRaisesRegex(ValueError, message) as caught:
            interop.from_module(module.eval(), images().astype(np.float32))
        self.assertNotIn("\n", str(caught.exception))


class ComputedTest(parameterized.TestCase):
    """What no image changes is computed once, by PyTorch."""

    @parameterized.parameters(
        lambda part: ORTHOGONAL(part, orthogonal_map="matrix_exp"),
        lambda part: ORTHOGONAL(part, orthogonal_map="cayley"),
        lambda part: ORTHOGONAL(part, orthogonal_map="householder"),
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    )
    def test_parametrisations(self, make):
        network = converted(parametrised(make).double(), IMAGE)
        logits, gradients = differences(network, images())
        self.assertLess(max(logits.max(), gradients.max()), 1e-12)
        own = {key for key in network.weights if not key.startswith("computed.")}
        self.assertSameElements(own, {"0.bias", "3.bias"})
        operators = [step.operator.split(".")[1] for step in network.program.steps]
        self.assertSequenceEqual(operators, ["sym_size", "convolution", "relu", "view", "addmm"])

    def test_float64_is_computed_anew(self):
        found = interop.converted(parametrised(ORTHOGONAL), IMAGE)
        with jax.enable_x64(True):
            exact = agreement._weights(found, "float64")
            self.assertSameElements(exact, found.weights)
            wide = agreement._jax_pass(found, lambda f: f)(images(), "float64")
        there = agreement._torch_pass(found)(images(), "float64")
        np.testing.assert_allclose(wide[0], there[0], rtol=0, atol=1e-13)

    def test_questions_to_its_own_numbers(self):
        network = converted(torch_defences.network(torch_defences.Asking()).double(), IMAGE)
        logits, gradients = differences(network, images())
        self.assertLess(max(logits.max(), gradients.max()), 1e-12)
        self.assertNotIn("1.1.scale", network.weights)  # 2, as its code reads it

    def test_torchvisions_normalisation(self):
        transforms = torchvision_transforms()
        normalise = transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        net = torch.nn.Sequential(normalise, torch_defences.network()).double()
        network = converted(net, IMAGE)
        logits, gradients = differences(network, images())
        self.assertLess(max(logits.max(), gradients.max()), 1e-12)


def torchvision_transforms():
    """torchvision next to a PyTorch without a GPU, where two of its operators are missing."""
    try:
        from torchvision import transforms
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_transforms.library = library
        from torchvision import transforms
    except ImportError as error:
        raise absltest.SkipTest(paths.PARITY) from error
    return transforms
