"""Repositories of the hub that we write: timm's own loaders read them, and so does ours."""

import contextlib
import functools
import importlib.util
import io
import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from safetensors.numpy import load_file

import jaxrobust
from jaxrobust import models
from jaxrobust.data import imagenet
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD
from jaxrobust.types import Threat
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import hashes, weights_folder
from tests.support import parity, paths, sweeps
from tests.support.random_weights import drawn
from tests.support.servers import ServedCase

try:
    import torch
except ImportError:
    torch = None
else:
    from jaxrobust.commands.conversion import export_weights
    from jaxrobust.publish import hub, network_account, torch_networks
    from jaxrobust.publish.references import Network

RECORD = {
    "time": "2026-11-21T10:00:00+00:00",
    "evaluation": "abc123",
    "commit": "0123456789abcdef",
    "weights": "train, step 7, ema",
    "dataset": "cifar10",
    "split": "test",
    "image_ids": "0..9999",
    "preprocessing": "none",
    "dtype": "float32",
    "method": "autoattack standard",
    "attacks": [{"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255}],
    "clean": 0.8123,
    "robust": 0.4567,
    "seed": 0,
    "flags": {"randomised": "logits differ"},
    "device": "1 x cpu",
}


class Case(ServedCase):
    """Networks that are exported with `--layout hub`."""

    def setUp(self):
        super().setUp()
        if torch is None:
            self.skipTest(paths.PARITY)
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.out = self.folder / "out"

    def export(self, name: str, *more: str, normalised=False, sizes=None, **options) -> Path:
        """Random weights in an imported folder, and what the command makes of them."""
        sizes = {"num_classes": 10, "image_size": 32} | (sizes or {})
        self.params, self.stats = drawn(name, normalised=normalised, **sizes, **options)
        about = {"architecture": name, "options": models.essential(name, options)}
        about |= {"in_channels": len(self.stats["normalize.mean"])} | sizes
        source = self.folder / "imported"
        weights_folder.write(source, self.params, self.stats, about)
        net = models.create(name, **sizes, **options)
        self.forward = jax.jit(lambda *args: net.apply(*args)[0])
        shape = (2, sizes["image_size"], sizes["image_size"], about["in_channels"])
        self.images = np.random.default_rng(1).random(shape, np.float32)
        self.printed = io.StringIO()
        arguments = [f"--weights={source}", "--layout=hub", f"--out={self.out}", *more]
        with contextlib.redirect_stdout(self.printed):
            export_weights.main(["--nocertificate", "--json", *arguments])
        return self.out

    def ours(self):
        return np.asarray(self.forward(self.params, self.stats, self.images))

    def check(self, net, *, normalise=None) -> None:
        """A network in PyTorch gives our logits."""
        images = self.images.transpose(0, 3, 1, 2).copy()
        if normalise:
            mean, std = (np.float32(row).reshape(1, -1, 1, 1) for row in normalise)
            images = (images - mean) / std
        with torch.no_grad():
            theirs = net.eval()(torch.from_numpy(images)).numpy()
        # float32, other orders of the sums
        self.assertLess(parity.relative(theirs, self.ours()), 1e-5)

    def from_timm(self, **how):
        """What timm makes of the repository, fetched by the hub's own client from this machine."""
        timm = torch_networks.import_timm()
        import huggingface_hub
        from timm.models import _hub

        self.server.repository(
            "me/net", {p.name: p.read_bytes() for p in self.out.iterdir() if p.is_file()}
        )
        get = functools.partial(
            huggingface_hub.hf_hub_download,
            endpoint=self.server.address,
            cache_dir=self.folder / "cache",
        )
        # timm 1.0.9 does not import the client of today: it lacks names that only uploads need.
        client = {
            "hf_hub_download": get,
            "_has_hf_hub": True,
            "EntryNotFoundError": huggingface_hub.errors.EntryNotFoundError,
        }
        with mock.patch.multiple(_hub, create=True, **client):
            return timm.create_model("hf-hub:me/net", pretrained=True, **how)

    def check_back(self) -> None:
        """Our own import gives the same bits, without being told anything."""
        found = jaxrobust.load(self.out, tell=lambda line: None)
        for key, array in (self.params | self.stats).items():
            np.testing.assert_array_equal((found.params | found.stats)[key], array, err_msg=key)
        sha256 = hashes.weights_sha256(self.params, self.stats)
        self.assertEqual(found.about["weights_sha256"], sha256)
        self.about = found.about


class TimmTest(Case):
    @pytest.mark.slow
    def test_loads_it(self):
        self.hub()
        self.export("resnet18", sizes={"num_classes": 7})
        self.assertEqual(
            sorted(p.name for p in self.out.iterdir()),
            ["README.md", "config.json", "model.safetensors"],
        )
        net = self.from_timm()
        found = torch_networks.state_arrays(net)
        expected = convert.to_torch("resnet18", self.params, self.stats)
        self.assertEqual(found.keys(), expected.keys())
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)
        self.assertEqual(net.num_classes, 7)
        self.assertEqual(self.from_timm(num_classes=3).fc.out_features, 3)  # finds the head
        self.check_back()
        self.assertIn("timm.create_model('local-dir:", self.printed.getvalue())

    @pytest.mark.slow
    def test_normalisation_is_timms_transforms(self):
        self.hub()
        self.export("resnet18", normalised=True)
        net = self.from_timm()
        self.check(net, normalise=(IMAGENET_MEAN, IMAGENET_STD))
        from timm.data import resolve_model_data_config

        found = resolve_model_data_config(net)
        np.testing.assert_allclose(found["mean"], IMAGENET_MEAN, rtol=1e-6)  # float32
        np.testing.assert_allclose(found["std"], IMAGENET_STD, rtol=1e-6)
        self.check_back()

    @pytest.mark.slow
    def test_a_local_folder(self):
        from timm.models import _hub

        if not hasattr(_hub, "load_model_config_from_path"):
            self.skipTest("local-dir: needs timm 1.0.16 or newer")
        self.export("resnet18")
        timm = torch_networks.import_timm()
        self.check(timm.create_model(f"local-dir:{self.out}", pretrained=True))

    @parameterized.parameters(
        ("vit_s", {"image_size": 32}, {}),  # learned positions: img_size
        ("xcit_m12", {"image_size": 32}, {}),  # depth and eta
        ("resnet50_gelu", {"image_size": 32}, {}),  # act_layer
        ("resnet18", {"image_size": 32}, {}),
        ("resnet18", {"image_size": 32}, {"in_channels": 1}),
        ("convnext_t", {"num_classes": 1000}, {}),
    )
    @pytest.mark.matrix
    def test_arguments(self, name, sizes, options):
        self.hub()
        self.export(name, sizes=sizes, **options)
        self.check(self.from_timm())
        self.check_back()


class ModuleTest(Case):
    """Of networks that timm does not have."""

    OPTIONS = {"depths": (1, 1, 1), "dims": (8, 16, 32)}  # noqa: RUF012

    def test_carries_the_module(self):
        options = self.OPTIONS | {"stem_widths": (4, 8)}
        out = self.export("convnext_n_cvst", normalised=True, **options)
        self.assertEqual(
            sorted(p.name for p in out.iterdir()),
            ["README.md", "config.json", "convnext_n_cvst.py", "model.safetensors"],
        )
        spec = importlib.util.spec_from_file_location("alone", out / "convnext_n_cvst.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.check(module.load())
        self.assertIn("normalize.mean", load_file(out / "model.safetensors"))
        self.check_back()
        self.assertEqual(self.about["options"]["dims"], [8, 16, 32])
        text = (out / "README.md").read_text()
        self.assertIn("from convnext_n_cvst import load", text)
        self.assertNotIn("import timm", text)
        self.assertIn("library_name: pytorch", text)
        self.assertNotIn("architecture", json.loads((out / "config.json").read_text()))
        (out / "model.safetensors").write_bytes(b"another")
        with self.assertRaisesRegex(ValueError, "is not the file that was exported next to this"):
            module.load()

    def test_what_timm_builds(self):
        def name(model, **options):
            params, stats = drawn(model, num_classes=10, image_size=32, **options)
            return hub.timm_name(Network(model, params, stats, 10, 32, options))

        self.assertEqual(name("resnet18"), ("resnet18", {}))
        self.assertEqual(name("resnet18", in_channels=1), ("resnet18", {"in_chans": 1}))
        self.assertIsNone(name("resnet18", small_stem=True))
        self.assertIsNone(name("convnext_n"))
        self.assertIsNone(name("xcit_n12_p4", depth=1))

    @pytest.mark.slow
    def test_certificate(self):
        """What is written is what was compared, normalized or not."""
        from jaxrobust.publish import layouts, references

        for model, options in (("convnext_n", self.OPTIONS), ("resnet18", {})):
            params, stats = drawn(model, num_classes=3, image_size=32, normalised=True, **options)
            network = Network(model, params, stats, 3, 32, options)
            folder = self.folder / model
            folder.mkdir()
            file = layouts.stage(folder, network, network_account.Account("drawn"), "hub")
            reference = references.reference(network, file, "hub")
            self.assertEqual(layouts.weights_of(file).name, "model.safetensors")
            images = np.random.default_rng(1).random((2, 32, 32, 3), np.float32)
            net = models.create(model, num_classes=3, image_size=32, **options)
            ours, _ = jax.jit(net.apply)(params, stats, images)
            with torch.no_grad():
                theirs = reference.net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            self.assertLess(parity.relative(theirs.numpy(), np.asarray(ours)), 1e-5)


class CardTest(parameterized.TestCase):
    """The card, from what is known."""

    def setUp(self):
        super().setUp()
        if torch is None:
            self.skipTest(paths.PARITY)

    def card(self, name="resnet18", num_classes=10, **known) -> str:
        params, stats = drawn(name, num_classes=num_classes, image_size=32)
        network = Network(name, params, stats, num_classes, 32, {})
        return hub.card(network, network_account.Account("train, step 7, ema", **known))

    def test_of_a_run(self):
        text = self.card(
            trained="adversarial training on cifar10",
            threat=Threat("linf", 8 / 255),
            preprocessing="none",
            classes=tuple("abcdefghij"),
            records=(AccuracyRecord.from_json(RECORD),),
            license="mit",
        )
        for part in (
            "license: mit",
            "library_name: timm",
            "- adversarial-robustness",
            "# resnet18, 10 classes, threat model linf 8/255",
            "- **Images**: 3 channels, RGB in [0, 1], images of 32 x 32 px as they are",
            "- **Normalization**: none: raw [0, 1] images",
            "- **Classes**: 10, in this order: a, b, c, d, e, f, g, h, i, j",
            "- **Threat model**: linf 8/255, in units of [0, 1] pixels",
            "- **Training**: adversarial training on cifar10",
            "| 10,000 of cifar10, split test | autoattack standard, linf 8/255 | 81.23% | 45.67% | "
            "record abc123 of 2026-11-21T10:00:00+00:00, commit 0123456789ab, 1 x cpu, flags: "
            "randomised |",
            'timm.create_model("hf-hub:ORG/REPO", pretrained=True)',
            'jaxrobust.load("hf://ORG/REPO")',
            "Reliable evaluation of adversarial robustness",
            "(TO BE FILLED IN BY HAND: the paper of these weights)",
        ):
            self.assertIn(part, text)
        self.assertNotIn("imagenet-1k", text)

    def test_of_published_weights(self):
        text = self.card(
            num_classes=1000,
            threat=Threat("linf", 4 / 255),
            preprocessing="Res256Crop224",
            imagenet=True,
            published="Salman2020Do_R18",
            source="Salman2020Do_R18",
            source_sha256="f" * 64,
        )
        for part in (
            "license: unknown",
            "- **License**: not stated by the authors\n",
            "datasets:\n- imagenet-1k",
            "ImageNet's 1,000, in the order of their WordNet ids (n01440764 is 0)",
            f"from Salman2020Do_R18 (sha256 {'f' * 64})",
            "There is no record of these weights",
            "Do Adversarially Robust ImageNet Models Transfer Better?. NeurIPS 2020. "
            "<https://arxiv.org/abs/2007.08489>",
        ):
            self.assertIn(part, text)

    @sweeps.rows(
        ("bicubic-248-crop-224", "bicubic", 224 / 248),
        ("Res256Crop224", "bilinear", 0.875),
        ("BicubicRes256Crop224", "bicubic", 0.875),
        ("bicubic-0.875", "bicubic", 0.875),
        ("none", "bicubic", 1.0),
        ("Res224", None, None),  # squashes, which timm's words cannot say
        (None, None, None),
    )
    def test_timms_words_for_a_preprocessing(self, preprocessing, how, share):
        found = hub._resized(preprocessing)
        self.assertEqual((found.get("interpolation"), found.get("crop_pct")), (how, share))

    @pytest.mark.slow
    def test_settings(self):
        def settings(preprocessing, **known):
            params, stats = drawn("resnet18", num_classes=1000, image_size=224)
            network = Network("resnet18", params, stats, 1000, 224, {})
            given = network_account.Account("x", preprocessing=preprocessing, **known)
            return hub.config(network, given, "0")

        self.assertEqual(settings(None, imagenet=True)["label_names"], list(imagenet.synsets()))
        self.assertNotIn("label_names", settings(None, classes=("a", "b")))
        found = settings(None)["pretrained_cfg"]
        self.assertEqual((found["first_conv"], found["classifier"]), ("conv1", "fc"))

    @sweeps.fast(1, 2)
    @parameterized.parameters(
        ("convnext_t", {"depths": (1, 1, 1, 1)}),
        ("resnet18", {}),
        ("vit_s", {"depth": 1}),
        ("xcit_n12", {"depth": 1}),
        ("cait_xxs24", {"depth": 1}),
        ("swin_b", {"depths": (1, 1, 1, 1)}),
    )
    def test_first_and_last_layers_are_timms(self, name, options):
        params, stats = drawn(name, num_classes=2, **options)
        base = models.member(name).reference.base
        timm = torch_networks.import_timm()
        theirs = timm.get_pretrained_cfg(timm.list_pretrained(f"{base}.*")[0])
        found = hub._ends(Network(name, params, stats, 2, 224, options))
        self.assertEqual(found["classifier"], theirs.classifier)
        self.assertEqual(found["first_conv"], theirs.first_conv)
