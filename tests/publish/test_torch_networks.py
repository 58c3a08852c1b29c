import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from tests.support import paths, reference, sweeps, torch_modules
from tests.support.families import CASES
from tests.support.modules import hidden
from tests.support.torch_modules import LISTINGS, built, relative

try:
    import torch

    from jaxrobust.publish import torch_networks
    from tools.bench import torch_reference

    torch_networks.import_timm()
except ImportError:
    torch = torch_reference = None

# Our name -> listing of the same network, of those for ImageNet.
LISTED = {
    name: listing
    for case in CASES.values()
    for name, listing in case.listings.items()
    if models.member(name).num_classes == 1000
}
FAST = ("convnext_t_cvst", "vit_s_cvst", "xcit_n12", "cait_xxs24", "resnet18", "resnet50_gelu")
# timm's, but for L: other sizes of the same code, and gigabytes in float64.
TIMMS = re.compile("(convnext_[tsb]|vit|deit|xcit_[nts]|cait|resnet|swin_b)")
TIMMS_ANY_SIZE = re.compile("convnext|xcit|resnet")
PUBLISHED = [
    "Singh2023Revisiting_ConvNeXt-T-ConvStem",
    "Singh2023Revisiting_ConvNeXt-S-ConvStem",
    "Singh2023Revisiting_ConvNeXt-B-ConvStem",
    "Singh2023Revisiting_ConvNeXt-L-ConvStem",
    "Singh2023Revisiting_ViT-S-ConvStem",
    "Singh2023Revisiting_ViT-B-ConvStem",
    "Debenedetti2022Light_XCiT-S12",
    "Debenedetti2022Light_XCiT-M12",
    "Debenedetti2022Light_XCiT-L12",
    "Liu2023Comprehensive_ConvNeXt-B",
    "Liu2023Comprehensive_ConvNeXt-L",
    "Liu2023Comprehensive_Swin-B",
    "Liu2023Comprehensive_Swin-L",
    "RodriguezMunoz2024Characterizing_Swin-B",
    "RodriguezMunoz2024Characterizing_Swin-L",
    "Mo2022When_Swin-B",
    "Mo2022When_ViT-B",
    "Salman2020Do_R50",
    "Salman2020Do_50_2",
    "Engstrom2019Robustness",
    "Standard_R50",
    "Wong2020Fast",
    "Chen2024Data_WRN_50_2",
]


def listed(name: str, wrapped: bool = True):
    """(name, shape, type) of each weight; without the wrapper of a normalized network if asked."""
    rows = reference.entries(LISTINGS / f"{name}.tsv")
    if wrapped:
        return rows
    rows = [row for row in rows if not row[0].startswith("normalize.")]
    return [(key.removeprefix("model."), *rest) for key, *rest in rows]


def state(net):
    items = net.state_dict().items()
    return [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in items]


def gradient(net, images):
    x = images.clone().requires_grad_()
    logits = net(x)
    (g,) = torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), x)
    return logits.detach().numpy(), g.numpy()


def check_is_the_module(test, name, listing):
    """Two networks written apart, the same random weights: float64 logits and gradients."""
    theirs = torch_reference.randomised(torch_modules.network(name), seed=0).eval().double()
    ours = built(listing).eval().double()
    ours = getattr(ours, "model", ours)
    ours.load_state_dict(theirs.state_dict())
    side = 96 if TIMMS_ANY_SIZE.match(name) else 224
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((2, 3, side, side), generator=generator, dtype=torch.float64)
    for mine, reference_s in zip(gradient(ours, images), gradient(theirs, images), strict=True):
        test.assertLess(relative(mine, reference_s), 1e-9)


def needs_robustbench(test):
    try:
        return torch_networks.import_robustbench()
    except ImportError as error:
        test.skipTest(str(error))


@absltest.skipIf(torch is None, paths.PARITY)
class NetworkTest(parameterized.TestCase):
    @sweeps.fast(*FAST)
    @parameterized.parameters(*LISTED.items())
    def test_names_shapes_types_and_order(self, name, listing):
        self.assertEqual(state(torch_modules.network(name)), listed(listing, wrapped=False))

    @sweeps.fast("resnet18")
    @parameterized.parameters("xcit_n12", "resnet18", "convnext_t_cvst")
    def test_is_the_module(self, name):
        check_is_the_module(self, name, LISTED[name])

    @pytest.mark.slow
    def test_smaller_patches_are_smaller_strides(self):
        net = torch_modules.network("xcit_s12_p4", num_classes=10).eval().double()
        weights = reference.forward_weights(LISTINGS / "xcit_small_12_p4_32_c10.tsv")
        net.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        images = torch.from_numpy(reference.forward_images(32).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            logits = net(images).numpy()
        golden = [0.008580659607671355, 0.5852080540377306, 1.0936275152602195]
        np.testing.assert_allclose(logits[0, :3], golden, rtol=1e-9)

    def test_options(self):
        for name, size in (("vit_s_cvst", 96), ("convnext_n", 28), ("xcit_n12_p8", 32)):
            net = torch_modules.network(name, num_classes=7, in_chans=1, img_size=size).eval()
            with torch.no_grad():
                self.assertEqual(net(torch.zeros(2, 1, size, size)).shape, (2, 7), name)

    def test_source(self):
        self.assertEqual(torch_networks.source("iso_convnext_s"), "")
        self.assertStartsWith(torch_networks.source("resnet50_gelu"), "timm 1.")

    def test_every_part_shows_in_randomised_weights(self):
        net = torch_reference.randomised(torch_modules.network("xcit_n12"), seed=0)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                self.assertGreater(value.abs().max(), 0.01, name)


@absltest.skipIf(torch is None, paths.PARITY)
class TrainerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # Beside other work two threads wait for each other most of the time.
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)

    @parameterized.parameters(
        ("xcit_n12", "matrices", {"attn.temperature", "cls_token"}, {"norm1.weight", "gamma1"}),
        # The paper's rule goes by names: a shortcut's batch norm is not called `bn`.
        ("resnet18", "not-bias", {"downsample.1.weight"}, {"bn1.weight", "bn1.bias", "fc.bias"}),
        ("convnext_n", "not-bias", {"norm.weight", "gamma"}, {"norm.bias"}),
    )
    def test_weight_decay(self, name, decay_mask, decayed, spared):
        net = torch_modules.network(name)
        trainer = torch_reference.Trainer(
            net,
            lr=1e-3,
            weight_decay=0.5,
            ema_decay=0.9,
            epsilon=0,
            attack_steps=1,
            decay_mask=decay_mask,
        )
        groups = trainer.optimiser.param_groups
        self.assertEqual([group["weight_decay"] for group in groups], [0.5, 0])
        for group, endings in zip(groups, (decayed, spared), strict=True):
            members = {id(p) for p in group["params"]}
            for ending in endings:
                found = [id(p) for key, p in net.named_parameters() if key.endswith(ending)]
                self.assertNotEmpty(found)
                self.assertLessEqual(set(found), members, ending)

    def test_attack_leaves_the_running_statistics_and_the_average_has_them(self):
        net = torch_modules.network("resnet18", num_classes=5)
        trainer = torch_reference.Trainer(
            net, lr=0.0, weight_decay=0.0, ema_decay=0.75, epsilon=0.1, attack_steps=2
        )
        trainer.step(torch.rand(4, 3, 32, 32), torch.arange(4))
        self.assertEqual(net.bn1.num_batches_tracked, 1)  # one forward pass in training mode
        average = trainer.average.bn1.running_var
        torch.testing.assert_close(average, 0.75 + 0.25 * net.bn1.running_var)

    def losses(self, steps=2, **options):
        """Of a few updates of one small network with batch norm."""
        torch.manual_seed(0)
        net = torch_modules.network("resnet18", num_classes=5)
        options = {"epsilon": 0.1, "attack_steps": 3, **options}
        trainer = torch_reference.Trainer(net, lr=1e-3, weight_decay=0.1, ema_decay=0.9, **options)
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(5, 3, 32, 32, generator=generator)
        return trainer, [trainer.step(images, torch.arange(5)) for _ in range(steps)]

    @pytest.mark.slow
    def test_two_compiled_graphs_and_one_that_has_no_gradient(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        def compiled(net):
            return torch_compile(net, backend=backend)

        torch_compile = torch.compile
        with mock.patch.object(torch, "compile", compiled):
            _, found = self.losses(compiled=True)
        _, expected = self.losses()
        self.assertLen(graphs, 3)  # attack, its last evaluation, update
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    @pytest.mark.slow
    def test_bfloat16_and_channels_last(self):
        trainer, found = self.losses(dtype=torch.bfloat16, channels_last=True)
        _, expected = self.losses()
        self.assertTrue(trainer.net.conv1.weight.is_contiguous(memory_format=torch.channels_last))
        self.assertFalse(trainer.net.conv1.weight.is_contiguous())
        self.assertEqual(trainer.net.conv1.weight.dtype, torch.float32)
        images = torch.rand(5, 3, 32, 32)
        self.assertEqual(trainer.logits(images).dtype, torch.float32)
        self.assertNotEqual(found[0], expected[0])
        # 8 bits of mantissa, in 20 layers with batch norms over 5 images.
        np.testing.assert_allclose(found[0], expected[0], rtol=0.05)

    def test_trades_adds_the_divergence_of_what_pgd_finds_from_noise(self):
        (clean,) = self.losses(steps=1, attack_steps=0)[1]
        about = {"steps": 1, "step_size": 0.03}
        (weightless,) = self.losses(trades_beta=0.0, **about)[1]
        self.assertAlmostEqual(weightless, clean, places=5)
        (near,) = self.losses(trades_beta=2.0, epsilon=1e-4, **about)[1]
        (far,) = self.losses(trades_beta=2.0, **about)[1]
        (twice,) = self.losses(trades_beta=4.0, **about)[1]
        self.assertGreater(far - clean, 10 * abs(near - clean))
        self.assertAlmostEqual(twice - clean, 2 * (far - clean), delta=1e-3 * far)

    def test_divergence_is_kullback_leiblers(self):
        logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
        p, q = logits.softmax(-1)
        expected = (p * (p / q).log()).sum(-1)
        torch.testing.assert_close(torch_reference.divergence(logits[1], p), expected)

    def test_the_attack_needs_no_gradients_of_weights(self):
        trainer, _ = self.losses(steps=0)
        seen = []

        def backward(net, images, labels, epsilon, steps):
            seen.extend(p.requires_grad for p in trainer.net.parameters())
            self.assertFalse(trainer.net.training)
            return images

        with mock.patch.object(torch_reference, "apgd", backward):
            trainer.step(torch.rand(5, 3, 32, 32), torch.arange(5))
        self.assertNotEmpty(seen)
        self.assertFalse(any(seen))
        self.assertTrue(all(p.requires_grad for p in trainer.net.parameters()))


class RobustbenchTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        if torch is None:
            self.skipTest(paths.PARITY)

    def test_names_shapes_types_and_order(self):
        needs_robustbench(self)
        net = torch_networks.published("Salman2020Do_R18")
        self.assertEqual(state(net), listed("Salman2020Do_R18"))

    def test_absence_names_the_command(self):
        message = "needs robustbench .*: bash tools/setup_reference_env.sh"
        with hidden("robustbench"), self.assertRaisesRegex(ImportError, message):
            torch_networks.import_robustbench()
        with hidden("robustbench"), self.assertRaisesRegex(ImportError, message):
            torch_networks.published("Salman2020Do_R18")

    def test_a_published_network_is_its_builders(self):
        """Of XCiT's timm's, without weights; and those that would fetch some take another's."""
        built = {name: mock.MagicMock() for name in ("Salman2020Do_R50", "Wong2020Fast")}
        rows = {name: {"model": made} for name, made in built.items()}
        keys = SimpleNamespace(
            BenchmarkDataset=lambda name: name, ThreatModel=SimpleNamespace(Linf="linf")
        )
        zoo = SimpleNamespace(model_dicts={"imagenet": {"linf": rows}})
        timm = mock.Mock(
            is_model=lambda name: name == "debenedetti2022light_xcit_s12_imagenet_linf"
        )
        modules = {"robustbench.model_zoo": zoo, "robustbench.model_zoo.enums": keys}
        with (
            mock.patch.object(torch_networks, "import_robustbench") as imported,
            mock.patch.dict("sys.modules", modules | {"timm": timm, "robustbench": mock.Mock()}),
        ):
            for name, made in (("Standard_R50", "Salman2020Do_R50"), ("Wong2020Fast", None)):
                found = torch_networks.published(name)
                self.assertIs(found, built[made or name].return_value.eval.return_value)
            found = torch_networks.published("Debenedetti2022Light_XCiT-S12")
        self.assertIs(found, timm.create_model.return_value.eval.return_value)
        name = "debenedetti2022light_xcit_s12_imagenet_linf"
        timm.create_model.assert_called_once_with(name, pretrained=False)
        self.assertEqual(imported.call_count, 3)


@pytest.mark.matrix
@absltest.skipIf(torch is None, paths.PARITY)
class SlowNetworkTest(parameterized.TestCase):
    @parameterized.parameters(*(item for item in LISTED.items() if TIMMS.match(item[0])))
    def test_is_the_module(self, name, listing):
        check_is_the_module(self, name, listing)

    @parameterized.parameters(*[(name,) for name in PUBLISHED])
    def test_published_names(self, name):
        needs_robustbench(self)
        self.assertEqual(state(torch_networks.published(name)), listed(name))
