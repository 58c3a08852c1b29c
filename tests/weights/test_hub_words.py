"""The hub's words for loading and publishing, and the names that others have for what is here."""

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized
from ml_collections import ConfigDict

import jaxrobust
from jaxrobust import attacks, convert, models
from jaxrobust.commands.flags import shared
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.text import spelling
from jaxrobust.weights import load
from jaxrobust.weights.fetch import sources
from tests.support import sweeps
from tests.support.modules import hidden, replaced


class LoadTest(parameterized.TestCase):
    @sweeps.rows(
        ("ORG/net", "hf://ORG/net"),
        ("ORG/net@v1", "hf://ORG/net@v1"),
        ("quickstart", "quickstart"),
        ("hf://ORG/net", "hf://ORG/net"),
        ("cifar10/L2/Wang2023Better_WRN-70-16", "cifar10/L2/Wang2023Better_WRN-70-16"),
        ("convnext_tiny.fb_in1k", "convnext_tiny.fb_in1k"),
    )
    def test_from_pretrained_is_load(self, text, source):
        with mock.patch.object(load, "load", return_value="net") as called:
            self.assertEqual(jaxrobust.from_pretrained(text, image_size=32), "net")
        called.assert_called_once_with(source, image_size=32)

    def test_a_path_is_a_path(self):
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(self.create_tempdir())
        Path("runs/a").mkdir(parents=True)
        with mock.patch.object(load, "load") as called:
            load.from_pretrained("runs/a")
        called.assert_called_once_with("runs/a")


class PushTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.seen: dict = {}
        self.hub = mock.Mock()
        self.hub.upload_folder.side_effect = self.upload
        client = SimpleNamespace(HfApi=mock.Mock(return_value=self.hub))
        self.client = client
        self.enter_context(replaced({"huggingface_hub": client}))

    def upload(self, folder_path, **about):
        self.seen = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(repo_url="https://hub/ORG/digits")

    def test_uploads_what_the_export_writes(self):
        """The kept run's network: its weights, a config that says whose they are, and the card."""
        how = {"private": True, "token": "t", "license": "MIT", "certificate": False}
        address = jaxrobust.push_to_hub("quickstart", "ORG/digits", **how)
        self.assertEqual(address, "https://hub/ORG/digits")
        self.client.HfApi.assert_called_once_with(token="t")
        self.hub.create_repo.assert_called_once_with("ORG/digits", private=True, exist_ok=True)
        about = self.hub.upload_folder.call_args.kwargs
        self.assertEqual((about["repo_id"], about["revision"]), ("ORG/digits", None))
        self.assertContainsSubset(["model.safetensors", "config.json", "README.md"], self.seen)
        ours = json.loads(self.seen["config.json"])["jaxrobust"]
        loaded = load.load("quickstart")
        self.assertLess(len(repr(loaded)), 400)  # no weights in a notebook
        self.assertEqual(ours["weights_sha256"], loaded.about["weights_sha256"])
        self.assertIn("license: mit", self.seen["README.md"].decode())
        with tempfile.TemporaryDirectory() as folder:  # and it comes back as it went
            for name, content in self.seen.items():
                (Path(folder) / name).write_bytes(content)
            again = load.load(folder)
        for name, array in loaded.params.items():
            np.testing.assert_array_equal(again.params[name], array)

    @sweeps.rows("digits", "https://host/a/b", "a/b/c", "")
    def test_no_repository(self, name):
        with self.assertRaisesRegex(ValueError, "is not a repository of the hub; write ORG/REPO"):
            convert.push_to_hub("quickstart", name)
        self.hub.create_repo.assert_not_called()

    def test_without_the_client(self):
        with (
            hidden("huggingface_hub"),
            self.assertRaisesRegex(ImportError, r"pip install 'jaxrobust\[hub\]'"),
        ):
            convert.push_to_hub("quickstart", "ORG/digits")


class AliasesTest(parameterized.TestCase):
    def test_timms_names_are_those_of_the_models(self):
        theirs = {timm: ours for timm, ours in sources.timm_names().items() if timm != ours}
        self.assertEqual(spelling.NETWORKS, theirs)
        self.assertNoCommonElements(spelling.NETWORKS, models.available())

    def test_a_network_by_timms_name(self):
        self.assertEqual(models.known("convnext_tiny"), "convnext_t")
        self.assertEqual(models.variant("convnext_tiny"), models.variant("convnext_t"))
        self.assertEqual(models.member("vit_small_patch16_224"), models.member("vit_s"))
        self.assertEqual(models.decay_mask("convnext_tiny"), models.decay_mask("convnext_t"))
        small = {"num_classes": 3, "image_size": 32, "depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}
        theirs, ours = (
            jax.eval_shape(models.create(name, **small).init, jax.random.key(0))
            for name in ("convnext_tiny", "convnext_t")
        )
        self.assertEqual(theirs, ours)
        with self.assertRaisesRegex(ValueError, "unknown model 'convnext_tinny'; did you mean"):
            models.create("convnext_tinny")

    @sweeps.rows("Linf", "L2", "L1", "LINF")
    def test_norms(self, norm):
        for make in (attacks.pgd_machine, attacks.apgd_machine, attacks.fab_machine):
            make(norm=norm, epsilon=0.1, steps=2)
        attacks.square_machine(norm=norm, epsilon=0.1, queries=2)
        with self.assertRaisesRegex(ValueError, "norm='L3' is unknown; choose one of linf"):
            attacks.pgd(norm="L3", epsilon=0.1, steps=2)

    def test_a_data_set_is_opened_by_its_name_here(self):
        with self.assertRaisesRegex(ValueError, "cifar10"):
            jaxrobust.data.load("CIFAR-10", data_dir=self.create_tempdir())

    def test_flags(self):
        self.assertEqual(shared.READS["norm"]("norm", "Linf"), "linf")
        self.assertEqual(shared.READS["model"]("model", "convnext_tiny"), "convnext_t")

    def test_configs(self):
        changes = {"attack": {"norm": "L2"}, "data": {"name": "ImageNet"}}
        config = ConfigDict(
            {
                "attack": {"norm": "Linf"},
                "model": {"name": "convnext_tiny"},
                "data": {"name": "CIFAR10"},
                "train": {"changes": changes},
            }
        )
        arguments._spell(config)
        self.assertEqual(config.attack.norm, "linf")
        self.assertEqual((config.model.name, config.data.name), ("convnext_t", "cifar10"))
        self.assertEqual(config.train.changes.attack.norm, "l2")
        self.assertEqual(config.train.changes.data.name, "imagenet2012")
