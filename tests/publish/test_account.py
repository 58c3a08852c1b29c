"""What is known of a network that is handed on, and what cards and layouts say of it."""

import json
import types
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.data import imagenet
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED
from jaxrobust.publish import layouts, network_account
from jaxrobust.publish.network_account import Account
from jaxrobust.pytorch import users_module
from jaxrobust.types import Threat
from jaxrobust.weights import load
from jaxrobust.weights.store.artifact import Network
from jaxrobust.weights.trained import runs
from tests.support import paths, sweeps
from tests.support.runs import tiny

try:
    import torch  # noqa: F401

    from jaxrobust.publish import hub
except ImportError:
    hub = None

ROW = {
    "weights_sha256": "a" * 64,
    "time": "2026-11-21T10:00:00+00:00",
    "commit": "0123456789abcdef",
    "dataset": "cifar10",
    "split": "test",
    "image_ids": "0..99",
    "preprocessing": "none",
    "method": "autoattack standard",
    "attacks": [{"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255}],
    "clean": 0.8123,
    "robust": 0.4567,
    "device": "1 x cpu",
}


def record(**changes) -> AccuracyRecord:
    return AccuracyRecord.from_json(ROW | changes)


def blank(name, classes=10, size=32, moments=((0.0,) * 3, (1.0,) * 3), **options) -> Network:
    """A network whose weights are zeros that take no memory."""
    net = models.create(name, num_classes=classes, image_size=size, **options)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    zeros = [
        {k: np.broadcast_to(np.float32(0), a.shape) for k, a in part.items()} for part in shapes
    ]
    fixed = zip(("normalize.mean", "normalize.std"), moments, strict=True)
    zeros[1] |= {key: np.float32(values) for key, values in fixed}
    return Network(name, *zeros, classes, size, options)


class ImagesTest(absltest.TestCase):
    def test_both_ends_are_counted(self):
        record = types.SimpleNamespace(
            dataset="digits", split="test", image_ids="0..7", damaged=None
        )
        self.assertEqual(network_account.images(record), "8 of digits, split test")
        record.image_ids = "2..7"
        self.assertEqual(network_account.images(record), "6 of digits, split test")
        record.image_ids = "a list"
        self.assertEqual(network_account.images(record), "digits, split test")


class PublishedTest(parameterized.TestCase):
    @sweeps.rows("imagenet", "cifar10")
    def test_the_leaderboard_says_the_data_set(self, dataset):
        key = next(key for key, net in PUBLISHED.items() if net.board.dataset == dataset)
        about = {"published_id": key, "norm": "linf", "epsilon": 0.25, "accuracies": None}
        about["preprocessing"] = None
        with mock.patch.object(load, "about", return_value=about):
            found = network_account.of_weights(mock.Mock(), key)
        # ImageNet's images are known by the list of classes alone: there are several names of it.
        self.assertEqual(found.imagenet, dataset == "imagenet")
        self.assertEqual(found.dataset, None if dataset == "imagenet" else "cifar10")
        self.assertEqual((found.published, found.threat), (key, Threat("linf", 0.25)))

    def test_what_a_folder_says_of_itself(self):
        about = {"norm": "l2", "epsilon": None, "accuracies": [ROW], "preprocessing": "Res224"}
        about |= {"source": "here", "source_sha256": "b" * 64}
        with mock.patch.object(load, "about", return_value=about):
            found = network_account.of_weights(mock.Mock(), "net.pt, ema")
        expected = Account("net.pt, ema", preprocessing="Res224", source="here")
        expected = expected._replace(source_sha256="b" * 64, records=(record(),))
        self.assertEqual(found, expected)


class RunTest(parameterized.TestCase):
    """A run's config stands in for the run."""

    def account(self, size=None, names=(), objective="adversarial", attack="apgd", **data):
        config = tiny().unlock()
        config.data.update(data)
        config.attack.name = attack
        config.train.objective = objective
        folder = Path(self.create_tempdir())
        if names:
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
        with (
            mock.patch.object(runs, "run_config", lambda workdir, phase: config),
            mock.patch.object(runs, "whole_config", lambda workdir: config),
        ):
            (folder / "results.jsonl").write_text(json.dumps(ROW) + "\n")
            which = "train, epoch 3, ema"
            return network_account.of_run(folder, which, ROW["weights_sha256"], image_size=size)

    def test_of_clean_images_there_is_no_ball(self):
        found = self.account(objective="clean")
        self.assertEqual(found.trained, "clean training on digits, split train[:256]")
        self.assertIsNone(found.threat)

    @sweeps.rows(("apgd", "2 steps"), ("fgsm", "1 step"))
    def test_steps_of_the_training(self, attack, steps):
        self.assertIn(f", {attack}, {steps}, linf", self.account(attack=attack).trained)

    def test_imagenets_classes_are_known_by_their_names(self):
        self.assertTrue(self.account(names=imagenet.synsets()).imagenet)
        self.assertFalse(self.account(names=imagenet.synsets()[::-1]).imagenet)

    @sweeps.rows(
        ("bicubic-36-crop-32", None, "bicubic-36-crop-32"),
        ("bicubic-36-crop-32", 8, "bicubic-36-crop-32"),  # the run's own side
        ("bicubic-36-crop-32", 16, None),  # made for another one
        ("bicubic-0.875", 16, "bicubic-0.875"),  # a share is of any side
        (None, 16, None),
    )
    def test_preprocessing_of_another_size(self, given, size, expected):
        self.assertEqual(self.account(size, preprocessing=given).preprocessing, expected)


class RecordsTest(absltest.TestCase):
    def with_records(self, known, *rows):
        file = Path(self.create_tempfile("results.jsonl").full_path)
        file.write_text("".join(json.dumps(ROW | row) + "\n" for row in rows))
        return network_account.with_records(known, file, "a" * 64)

    def test_none_twice_and_none_of_other_weights(self):
        known = Account("x", records=(record(),))
        other = {"weights_sha256": "b" * 64, "preprocessing": "Res224", "dataset": "imagenet2012"}
        found = self.with_records(known, {}, {"robust": 0.4}, other)
        self.assertEqual(found.records, (record(), record(robust=0.4)))
        self.assertEqual((found.preprocessing, found.imagenet), ("none", False))

    def test_without_a_file_what_is_known_counts(self):
        found = network_account.with_records(Account("x", records=(record(),)), None, "a" * 64)
        self.assertEqual((found.records, found.preprocessing), ((record(),), "none"))
        self.assertIsNone(network_account.with_records(Account("x"), None, "").preprocessing)

    def test_what_is_known_is_not_overwritten(self):
        known = Account("x", preprocessing="Res224", imagenet=True)
        found = self.with_records(known, {})
        self.assertEqual((found.preprocessing, found.imagenet), ("Res224", True))
        found = self.with_records(Account("x"), {"dataset": "imagenet2012:5.1.0"})
        self.assertTrue(found.imagenet)

    def test_a_row(self):
        self.assertEqual(
            network_account.row(record(evaluation="e7", flags={"weak": "why", "odd": "so"})),
            (
                "100 of cifar10, split test",
                "autoattack standard, linf 8/255",
                "81.23%",
                "45.67%",
                "record e7 of 2026-11-21T10:00:00+00:00, commit 0123456789ab, 1 x cpu, flags: "
                "weak, odd",
            ),
        )
        bare = network_account.row(record(attacks=[], robust=None, clean=None, published_by="me"))
        self.assertEqual(bare[1:], ("none", "-", "-", "published by me"))
        two = [*ROW["attacks"], {"name": "apgd-ce", "norm": "l2", "epsilon": 0.5}]
        union = record(
            method="union",
            attacks=two,
            union={"each_on_all_images": True},
            accuracy_after={"a": 0.5},
        )
        self.assertEqual(network_account.row(union)[1], "union of a")


class WordsTest(parameterized.TestCase):
    def test_classes(self):
        def said(count, **known):
            return network_account.classes(mock.Mock(num_classes=count), Account("x", **known))

        self.assertEqual(said(10), "10; their order is unknown: ask the authors of the weights")
        self.assertEqual(said(10, dataset="mine"), "10, the labels of mine")
        few = tuple(f"c{i}" for i in range(20))
        self.assertEqual(
            said(20, classes=few, dataset="mine"), f"20, in this order: {', '.join(few)}"
        )
        more = "21, in the order of the data set (c0 is 0, d is 20)"
        self.assertEqual(said(21, classes=(*few, "d")), more)
        self.assertStartsWith(said(1000, imagenet=True, classes=few), "ImageNet's 1,000, in the")

    @sweeps.rows(
        (None, "images of 32 x 32 px as they are; any preprocessing is unknown"),
        ("none", "images of 32 x 32 px as they are"),
        ("Res224", "`Res224` to 32 x 32 px (an id of `jaxrobust.data.evaluation_transform`, which"),
    )
    def test_images(self, preprocessing, expected):
        known = Account("x", preprocessing=preprocessing)
        found = network_account.prepared(mock.Mock(image_size=32), known)
        self.assertStartsWith(found, expected)
        self.assertEqual("unknown" in found, preprocessing is None)

    def test_threat_and_channels(self):
        self.assertEqual(network_account.threat(Account("x")), "unknown")
        clean = network_account.threat(Account("x", trained="clean training"))
        self.assertEqual(clean, "none: the network was trained on clean images")
        ball = network_account.threat(Account("x", trained="so", threat=Threat("l1", 75)))
        self.assertEqual(ball, "l1 75, in units of [0, 1] pixels")
        words = [network_account.channels(mock.Mock(in_channels=n)) for n in (1, 3, 4)]
        self.assertEqual(words, ["1 channel, gray", "3 channels, RGB", "4 channels"])

    def test_normalisation(self):
        self.assertEqual(network_account.normalisation(blank("convnext_n")), "")
        one = blank("convnext_n", moments=(IMAGENET_MEAN, IMAGENET_STD))
        expected = "mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225)"
        self.assertEqual(network_account.normalisation(one), expected)


class LayoutTest(parameterized.TestCase):
    def test_described(self):
        known = Account("train, epoch 30, raw", preprocessing="none", threat=Threat("l2", 0.5))
        network = blank("convnext_n", depths=(1,), dims=(8,), drop_path=0.1)
        found = layouts.described(network, known._replace(records=(record(),)))
        expected = {
            "architecture": "convnext_n",
            "options": {"depths": [1], "dims": [8]},
            "num_classes": 10,
            "image_size": 32,
            "in_channels": 3,
            "preprocessing": "none",
            "norm": "l2",
            "epsilon": 0.5,
            "training": None,
            "published_id": None,
            "source": "train, epoch 30, raw",
            "source_sha256": None,
            "which": "raw",
            "drawn": None,
        }
        self.assertEqual({k: v for k, v in found.items() if k != "accuracies"}, expected)
        self.assertEqual([row["robust"] for row in found["accuracies"]], [0.4567])
        bare = layouts.described(network, Account("emac.pt", source="https://a/b"))
        nothing = {"norm": None, "epsilon": None, "accuracies": None, "which": None}
        self.assertEqual({key: bare[key] for key in nothing}, nothing)
        self.assertEqual(bare["source"], "https://a/b")
        self.assertEqual(layouts.described(network, Account("a.pt, ema"))["which"], "ema")

    @absltest.skipIf(hub is None, paths.PARITY)
    @sweeps.rows(
        ("jaxrobust", "convnext_n", {}, "--config.init.weights=out trains.* --weights out eval"),
        ("module", "convnext_n", {}, "^in out: `from convnext_n import load; net = load..`$"),
        ("hub", "convnext_n", {}, "^in out: `from convnext_n import load.*hf upload ORG/REPO out"),
        ("hub", "resnet18", {}, r"^timm.create_model\('local-dir:out', pretrained=True\); .*hf up"),
        (
            *("timm", "resnet18", {}),
            r"^timm.create_model\('resnet18', num_classes=10, "
            r"checkpoint_path='out/resnet18.safetensors'\)$",
        ),
        (
            *("timm", "resnet18", {"classes": 1000}),
            r"^timm.create_model\('resnet18', checkpoint_path=",
        ),
        (
            "timm",
            "convnext_n",
            {},
            "^timm lacks this network; to run it in PyTorch, export with",
        ),
        (
            *("Debenedetti2022Light_XCiT-S12", "xcit_s12", {}),
            r"^with TORCH_HOME=out: robustbench.utils.load_model\('Debenedetti2022Light_XCiT-S12', "
            "model_dir='out', dataset='imagenet', threat_model='Linf'",
        ),
        (
            *("Singh2023Revisiting_ConvNeXt-T-ConvStem", "convnext_t_cvst", {}),
            r"^robustbench.utils.load_model\('Singh2023",
        ),
    )
    def test_usage(self, layout, name, sizes, expected):
        network = blank(name, **sizes) if name in ("convnext_n", "resnet18") else mock.Mock()
        self.assertRegex(layouts.usage(network, layout, Path("out")), expected)

    @absltest.skipIf(hub is None, paths.PARITY)
    def test_usage_of_a_users_module(self):
        stats = {"normalize.mean": np.float32([0.5, 0.25]), "normalize.std": np.float32([0.5, 1])}
        network = SimpleNamespace(name="torch:nets.py:build", normalised=False, stats=stats)
        how = "build().load_state_dict(torch.load('out/state_dict.pt'), strict=True)"
        self.assertEqual(layouts.usage(network, "state-dict", Path("out")), how)
        network.normalised = True
        said = layouts.usage(network, "state-dict", Path("out"))
        self.assertEqual(said, f"{how}; it expects (images - [0.5, 0.25]) / [0.5, 1.0]")
        said = layouts.usage(network, "robustbench", Path("out"))
        label = users_module.label(network.name)
        self.assertStartsWith(said, f"in out: `from {label} import load; net = load()`; its row")
        self.assertIn(f'{{"model": {label}.network, "gdrive_id": ID of {label}.pt}}', said)

    @absltest.skipIf(hub is None, paths.PARITY)
    def test_the_file_of_a_published_network_is_where_its_loader_looks(self):
        folder, key, calls = Path(self.create_tempdir()), "Debenedetti2022Light_XCiT-S12", []

        def to_torch(*given, **how):
            calls.append((given, how))
            return {"w": np.float32([1, 2])}

        network = SimpleNamespace(name="xcit_s12", params="p", stats="s", options={"a": 1})
        with (
            mock.patch.object(layouts, "check"),
            mock.patch.object(layouts.convert, "to_torch", to_torch),
        ):
            file = layouts.stage(folder, network, Account("w.pt"), key)
            self.assertEqual(layouts.arrays(network, "timm").keys(), {"w"})
        self.assertEqual(file, layouts.references.place(folder, key))
        import torch

        found = torch.load(file, weights_only=True)
        self.assertEqual({k: v.tolist() for k, v in found.items()}, {"w": [1, 2]})
        names = ("xcit_s12", "p", "s")
        self.assertEqual(calls, [(names, {"layout": key, "a": 1}), (names, {})])

    def test_the_file_with_the_weights(self):
        folder = Path(self.create_tempdir())
        code = folder / "net.py"
        self.assertEqual(layouts.weights_of(code), folder / "model.safetensors")
        (folder / "net.pt").write_text("")
        self.assertEqual(layouts.weights_of(code), folder / "net.pt")
        self.assertEqual(layouts.weights_of(folder / "a.safetensors"), folder / "a.safetensors")


@absltest.skipIf(hub is None, paths.PARITY)
class HubTest(parameterized.TestCase):
    def config(self, network, **known):
        return hub.config(network, Account("x", **known), "c" * 64)

    def test_of_timms_network(self):
        network = blank("resnet18", 4, 48, moments=(IMAGENET_MEAN, IMAGENET_STD))
        known = {"preprocessing": "bicubic-54-crop-48", "license": "mit", "classes": tuple("abcd")}
        known |= {"threat": Threat("linf", 0.25), "records": (record(),), "imagenet": True}
        found = self.config(network, **known)
        self.assertEqual((found["architecture"], found["num_classes"]), ("resnet18", 4))
        self.assertEqual(found["label_names"], ["a", "b", "c", "d"])
        self.assertNotIn("model_args", found)
        timm = found["pretrained_cfg"]
        self.assertEqual(timm["input_size"], [3, 48, 48])
        self.assertFalse(timm["fixed_input_size"])
        np.testing.assert_allclose(timm["mean"], IMAGENET_MEAN, rtol=1e-6)
        np.testing.assert_allclose(timm["std"], IMAGENET_STD, rtol=1e-6)
        expected = {"crop_pct": 48 / 54, "interpolation": "bicubic", "num_classes": 4}
        expected |= {"first_conv": "conv1", "classifier": "fc", "license": "mit"}
        self.assertEqual({key: timm[key] for key in expected}, expected)
        ours = found["jaxrobust"]
        expected = {"architecture": "resnet18", "preprocessing": "bicubic-54-crop-48"}
        expected |= {"norm": "linf", "epsilon": 0.25, "weights_sha256": "c" * 64}
        self.assertEqual({key: ours[key] for key in expected}, expected)
        self.assertEqual([row["robust"] for row in ours["accuracies"]], [0.4567])

    def test_papers(self):
        key = "Salman2020Do_R18"
        auto, fixed = record(), record(method="apgd-ce")
        for published, records, papers, by_hand in (
            (None, (), 0, True),
            (None, (fixed,), 0, True),
            (None, (fixed, auto), 1, True),
            (key, (), 1, False),
            (key, (auto,), 2, False),
        ):
            lines = hub._citation(Account("x", published=published, records=records))
            self.assertLen(lines, papers + by_hand, (published, records))
            self.assertEqual("BY HAND" in lines[0], by_hand)
