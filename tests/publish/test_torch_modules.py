import inspect
import json
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights.naming import convert
from tests.support import paths, reference, small_networks, sweeps
from tests.support.families import CASES, all_families
from tests.support.torch_modules import LISTINGS, NETWORKS, built, relative, row

try:
    import torch
except ImportError:
    torch = None


# Networks whose reference is a file of ours -> their listings as they are, if there are any.
OURS = {
    name: [of for of, (called, options) in NETWORKS.items() if called == name and not options]
    for name in models.available()
    if models.member(name).reference.base.endswith(".py")
}


def logits_and_gradient(listing, weights, images, dtype):
    """Logits, and the gradient of sum_b log p(class 0) in the NHWC images, NCHW."""
    net = built(listing).eval().to(dtype)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype).requires_grad_()
    logits = net(x)
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), x)
    return logits.detach().numpy(), gradient.numpy()


@absltest.skipIf(torch is None, paths.PARITY)
class NamesTest(parameterized.TestCase):
    @sweeps.fast(0, 10, 20, 30, 40)
    @parameterized.parameters(*NETWORKS)
    def test_names_shapes_types_and_order(self, listing):
        with torch.device("meta"):
            state = built(listing).state_dict()
        ours = [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state.items()]
        self.assertEqual(ours, reference.entries(LISTINGS / f"{listing}.tsv"))


@absltest.skipIf(torch is None, paths.PARITY)
class DefaultsTest(parameterized.TestCase):
    """What a file builds where only what a network's row changes is named."""

    @parameterized.parameters(*OURS)
    def test_are_the_networks_as_they_are_counted_and_listed(self, name):
        from jaxrobust.publish import torch_networks

        counted = table.architecture(name)
        with torch.device("meta"):
            more = {"num_classes": 10} if name in ("cifar_resnet50", "resnet18_32px") else {}
            net = torch_networks.network(name, img_size=counted.image_size, **more)
        trained = [p.numel() for p in net.parameters() if p.requires_grad]
        self.assertEqual(sum(trained), counted.parameters)
        state = net.state_dict().items()
        found = [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state]
        for listing in OURS[name]:
            self.assertEqual(found, reference.entries(LISTINGS / f"{listing}.tsv"))


@absltest.skipIf(torch is None, paths.PARITY)
class SignaturesTest(parameterized.TestCase):
    @parameterized.parameters(*(family.file for family in all_families()))
    def test_what_may_be_left_out_is_as_in_the_rows(self, file):
        from jaxrobust.publish import torch_networks

        given = inspect.signature(torch_networks.module(file).model).parameters.items()
        found = {key: p.default for key, p in given if p.default is not inspect.Parameter.empty}
        (variants,) = [family.variants for family in all_families() if family.file == file]
        defaults = type(next(iter(variants.values())))._field_defaults
        self.assertEqual(found.get("in_channels"), 3)
        for key in found.keys() & defaults.keys():
            if found[key] is not None:  # as an empty tuple there
                self.assertEqual(found[key], defaults[key], key)

    def test_convolutions_of_wide_residual_networks_are_xaviers(self):
        from jaxrobust.publish import torch_networks

        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = torch_networks.module("cifar_wide_resnet").model((1, 1), 1)
        convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        self.assertLen(convs, 6)  # and one shortcut's
        for conv in convs:
            np.testing.assert_array_equal(conv.bias.detach(), 0)
            pixels = conv.kernel_size[0] ** 2
            bound = (2 * 6 / (pixels * (conv.in_channels + conv.out_channels))) ** 0.5
            largest = float(conv.weight.detach().abs().max())
            self.assertBetween(largest, 0.97 * bound, bound)


@absltest.skipIf(torch is None, paths.PARITY)
class BuffersTest(parameterized.TestCase):
    @parameterized.parameters("cifar_swin", "cifar_levit", "cifar_coatnet")
    def test_what_follows_from_sizes_comes_back_as_pytorch_has_it(self, label):
        name, options = small_networks.ROWS[label][0], small_networks.options(label)
        state = small_networks.made(label).state_dict()
        arrays = {k: v.numpy() for k, v in state.items()}
        ours = convert.from_torch(name, arrays, **options)
        own = {k: v for k, v in options.items() if k not in ("num_classes", "image_size")}
        back = convert.to_torch(name, *ours, **own)
        self.assertEqual([*back], [*arrays])
        made = [key for key in back if key.endswith(("mask", "index", "idxs"))]
        self.assertNotEmpty(made)
        for key, array in back.items():
            np.testing.assert_array_equal(array, arrays[key], key)


# Family -> how what is not a layer's own is drawn: names, and the deviation of a normal draw.
TOKENS = {
    "vit": {"pos_embed": 0.02, "cls_token": 0.0},
    "cait": {"pos_embed": 0.02, "cls_token": 0.02},
    "xcit": {"cls_token": 0.02},
    "swin": {"relative_position_bias_table": 0.02},
    "cifar_vit": {"pos_embedding": 1.0, "cls_token": 1.0},
    "cifar_ceit": {"pos_embedding": 1.0, "cls_token": 1.0},
    "cifar_cct": {"positional_emb": 0.2},
    "cifar_cpvt": {"cls_token": 1.0},
    "cifar_mixer": {"cls_token": 1.0},
    "cifar_swin": {"pos_embedding": 1.0},
    "cifar_botnet": {"rel_h": 1.0, "rel_w": 1.0},
    "cifar_levit": {"attention_biases": 0.0},
    "cifar_coatnet": {"relative_bias_table": 0.0},
}


@absltest.skipIf(torch is None, paths.PARITY)
class TokensTest(parameterized.TestCase):
    @parameterized.parameters(*TOKENS)
    def test_are_drawn_as_the_references_do(self, family):
        rows = small_networks.ROWS.items()
        label = next(key for key, (name, *_) in rows if models.family(name).file == family)
        with (
            torch.random.fork_rng(),
            mock.patch.object(small_networks, "weights", lambda state: state),
            mock.patch.object(torch, "from_numpy", lambda value: value),
        ):
            torch.manual_seed(0)
            net = small_networks.made(label)
        for ending, deviation in TOKENS[family].items():
            values = [p.flatten() for key, p in net.named_parameters() if key.endswith(ending)]
            (drawn,) = (torch.cat(values).detach().numpy(),)
            if deviation:
                self.assertBetween(np.sqrt((drawn**2).mean()) / deviation, 0.5, 1.6, ending)
                self.assertLess(np.abs(drawn).max(), 5 * deviation)
            else:
                np.testing.assert_array_equal(drawn, 0)


def check_seeded(test, listing):
    weights = reference.seeded_weights(LISTINGS / f"{listing}.tsv")
    golden = {}
    for file in LISTINGS.glob("logits_seeded_weights*.npz"):
        golden |= dict(np.load(file))
    images = reference.golden_images()
    logits, gradient = logits_and_gradient(listing, weights, images, torch.float64)
    test.assertLess(relative(logits, golden[f"{listing}__f64"]), 1e-9)
    if f"{listing}__grad_f64" in golden:
        difference = np.abs(gradient[:, :, ::16, ::16] - golden[f"{listing}__grad_f64"])
        test.assertLess(difference.max() / golden[f"{listing}__gradmax_f64"].max(), 1e-7)
    logits, _ = logits_and_gradient(listing, weights, images, torch.float32)
    test.assertLess(relative(logits, golden[f"{listing}__f32"]), 1e-5)


def check_filled(test, listing):
    weights = reference.forward_weights(LISTINGS / f"{listing}.tsv")
    golden = json.loads((LISTINGS / "golden_forward.json").read_text())[listing]
    images = reference.forward_images(golden["input_size"])
    logits, gradient = logits_and_gradient(listing, weights, images, torch.float64)
    for found, name in zip(logits, ("logits0", "logits1"), strict=True):
        test.assertLess(relative(found[: len(golden[name])], np.array(golden[name])), 1e-9)
    test.assertLess(abs(logits.sum() - golden["logit_sum"]), 1e-9 * np.abs(logits).sum())
    test.assertAlmostEqual(np.abs(gradient).sum() / golden["grad_abs_sum"], 1, delta=1e-7)
    difference = gradient[0, 0, 5, 5] - golden["grad_0_0_5_5"]
    test.assertLess(abs(difference), 1e-7 * np.abs(gradient).max())
    single, _ = logits_and_gradient(listing, weights, images, torch.float32)
    test.assertLess(relative(single, logits), 1e-5)


@absltest.skipIf(torch is None, paths.PARITY)
class RowsTest(parameterized.TestCase):
    @sweeps.fast("cifar_vgg16", "convnext_n", "resnet18", "vit_s", "xcit_n12")
    @parameterized.parameters(*models.available())
    def test_the_rows_of_the_jax_networks_fit(self, name):
        file = models.family(name).file
        from jaxrobust.publish import torch_networks

        with torch.device("meta"):
            net = torch_networks.module(file).model(**row(name))
        self.assertEqual(list(net.state_dict()), models.torch_keys(name))


@absltest.skipIf(torch is None, paths.PARITY)
class SmallTest(parameterized.TestCase):
    """Every branch of every file; the same numbers are those of the JAX networks, of which
    tests/models/families/test_small_networks.py makes sure.
    """

    @parameterized.parameters(*small_networks.ROWS)
    def test_computes_what_is_stored(self, label):
        found, stored = small_networks.in_pytorch(label), small_networks.stored()[label]
        for what in ("evaluated", "trained"):
            np.testing.assert_allclose(found[what], stored[what], rtol=1e-7, atol=1e-8)
        self.assertEqual(found["moved"].keys(), stored["moved"].keys())
        for name, value in stored["moved"].items():
            self.assertAlmostEqual(found["moved"][name], value, delta=1e-7, msg=name)

    def test_every_file_has_rows(self):
        files = {models.family(name).file for name, *_ in small_networks.ROWS.values()}
        self.assertEqual(files, {family.file for family in all_families()})


@pytest.mark.matrix
@absltest.skipIf(torch is None, paths.PARITY)
class GoldenTest(parameterized.TestCase):
    """The measure is max|difference| / max|reference|: 1e-5 in float32, 1e-9 in float64."""

    @parameterized.parameters(*(x for case in CASES.values() for x in case.golden64.values()))
    def test_seeded_weights(self, listing):
        check_seeded(self, listing)

    @parameterized.parameters(*(listing for case in CASES.values() for listing in case.forward))
    def test_filled_weights(self, listing):
        check_filled(self, listing)
