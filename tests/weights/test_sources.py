"""What stands for weights, and what is said where nothing does."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, paper
from jaxrobust.weights.fetch import sources
from tests.support import paths, sweeps


class ParseTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def file(self, name: str, content=b"x") -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    @parameterized.parameters(
        ("file", {"w.pt": b"x"}, "w.pt"),
        ("folder", {"f/weights.safetensors": b"x", "f/config.json": b"{}"}, "f"),
        ("repository", {"r/model.safetensors": b"x", "r/config.json": b"{}"}, "r"),
        ("repository", {"r/pytorch_model.bin": b"x"}, "r"),
        ("run", {"run/config.json": b'{"model": {}, "train": {}}'}, "run"),
    )
    def test_paths(self, kind, files, name):
        for file, content in files.items():
            self.file(file, content)
        found = sources.parse(str(self.folder / name))
        self.assertEqual((found.kind, found.path), (kind, self.folder / name))
        beside = {f"{name}/config.json"} & files.keys() if kind != "run" else set()
        settings = None if found.settings is None else {str(found.settings)}
        self.assertEqual(settings or set(), {str(self.folder / file) for file in beside})

    def test_names(self):
        found = sources.parse("Salman2020Do_R18")
        self.assertEqual((found.kind, found.model, found.path), ("remote", "resnet18", None))
        self.assertEqual(found.published, "Salman2020Do_R18")
        self.assertEqual(found.address, PUBLISHED["Salman2020Do_R18"].address)
        found = sources.parse("convnext_tiny.fb_in1k")
        self.assertEqual(found.address, "hf://timm/convnext_tiny.fb_in1k")
        self.assertEqual(found.model, "convnext_t")
        for address in ("hf://a/b@v1/c.pt", "https://host/c.pt"):
            self.assertEqual(sources.parse(address).address, address)

    def test_a_path_that_is_there_is_what_it_is(self):
        for name in ("convnext_tiny.fb_in1k", "Salman2020Do_R18"):
            path = self.file(name)
            self.assertEqual(sources.parse(str(path)).kind, "file")

    def test_a_folder_that_has_a_networks_name_is_suggested_once(self):
        folder = Path(self.create_tempdir())
        for name in ("quickstart", "__init__.py"):
            (folder / name).mkdir()
        self.enter_context(contextlib.chdir(folder))
        with self.assertRaisesRegex(ValueError, r"not found; did you mean quickstart\?$"):
            sources.parse("quickstat")

    @sweeps.rows(
        ("nowhere.pth", "no such file; give one of .safetensors, .* or an imported folder, .*"
         "timm id such as convnext_tiny.fb_in1k, or quickstart, which ships with the package$"),
        ("weights/mine", "no such file"),
        ("convnext_t", "this is an architecture.*`jaxrobust models convnext_t` lists"),
        ("Salman2020Do_R19", "not found; did you mean Salman2020Do_R18"),
        (
            "Chen2020Adversarial",
            "RobustBench's network averages the probabilities of three networks, unlike those "
            r"of `jaxrobust models`; write FILE.py with `def build\(\): return "
            r"robustbench.utils.load_model\('Chen2020Adversarial', dataset='cifar10', "
            r"threat_model='Linf'\)`, and give torch:FILE.py:build$",
        ),
        (
            "cifar10/Linf/Kang2021Stable",
            "RobustBench's network solves an ODE in as many steps as its images need, which cannot "
            "be translated; choose another id$",
        ),
        ("convnext_tinny.fb_in1k", "timm's convnext_tinny is not .*mean convnext_tiny.fb_in1k"),
        ("efficientnet_b0.ra_in1k", "no such file"),
        ("hf://timm", "write hf://ORG/REPO"),
    )  # fmt: skip
    def test_what_is_nothing(self, text, message):
        with self.assertRaisesRegex(ValueError, f"^{text}: (not found, and )?{message}"):
            sources.parse(text)

    def test_folders_without_weights(self):
        self.file("empty/notes.txt")
        with self.assertRaisesRegex(ValueError, "holds no weights; give a file, a .* of a run$"):
            sources.parse(str(self.folder / "empty"))
        self.file("exported/convnext_n.safetensors")
        with self.assertRaisesRegex(
            ValueError, r"of a run \(the file may be .*exported/convnext_n.safetensors\)"
        ):
            sources.parse(str(self.folder / "exported"))

    def test_a_local_repository_is_checked_as_any_file(self):
        save_file({"a": np.zeros(1)}, self.file("r/model.safetensors"))
        self.file("r/config.json", json.dumps({"num_classes": 3}).encode())
        found = sources.parse(str(self.folder / "r"))
        fetched = sources.fetch(found)
        self.assertEqual(fetched.file.name, "model.safetensors")
        self.assertEqual(sources.settings_of(fetched.settings), {"num_classes": 3})
        with self.assertRaisesRegex(ValueError, "has sha256 .*, expected 00"):
            sources.fetch(found, sha256="00")


class FetchTest(parameterized.TestCase):
    @sweeps.rows((None, "own"), ("asked", "asked"))
    def test_a_hash_that_is_asked_for_goes_before_the_published_one(self, asked, wanted):
        source = sources.WeightSource("Id", "remote", address="a", published="Id", sha256="own")
        path = mock.Mock()
        with mock.patch.object(sources.remote_weights, "fetch") as fetch:
            fetch.return_value = path, None
            found = sources.fetch(source, sha256=asked)
        fetch.assert_called_once_with("a", sha256=wanted, name="Id.pt", tell=print)
        self.assertEqual((found.file, found.settings), (path, None))

    def test_a_run_has_no_one_file(self):
        source = sources.WeightSource("r", "run", Path("r"))
        self.assertIs(sources.fetch(source), source)
        with self.assertRaisesRegex(
            ValueError, "r is a run, which has more than one file; leave --sha"
        ):
            sources.fetch(source, sha256="00")

    def test_five_files_of_a_repository_are_named(self):
        api = mock.Mock()
        api.list_repo_files.return_value = ["a.txt", *(f"{n}.pth" for n in range(9))]
        found = sources.remote_weights._weights_in(api, "a/b", "refs/pr/1")
        self.assertEqual(found, [f"hf://a/b@refs%2Fpr%2F1/{n}.pth" for n in range(5)])
        api.list_repo_files.side_effect = OSError
        found = sources.remote_weights._weights_in(api, "a/b", None)
        self.assertEqual(found, ["hf://a/b/FILE"])

    def test_what_timm_says_of_pretraining_goes_before_the_rest(self):
        path = Path(self.create_tempdir(), "config.json")
        path.write_text('{"mean": [0.1], "x": 1, "pretrained_cfg": {"mean": [0.5]}}')
        found = sources.settings_of(path)
        self.assertEqual((found["mean"], found["x"]), ([0.5], 1))
        self.assertEqual(sources.settings_of(None), {})
        path.write_text("[]")
        with self.assertRaisesRegex(ValueError, "is damaged"):
            sources.settings_of(path)

    @sweeps.rows(
        ("none.pt", True), ("none.safetensors", True), ("none", False), ("https://x/a.pt", False)
    )
    def test_a_missing_file(self, text, missing):
        self.assertEqual(sources.is_missing_file(text), missing)


class TablesTest(parameterized.TestCase):
    @sweeps.rows(*PUBLISHED)
    def test_published(self, key):
        net = PUBLISHED[key]
        self.assertRegex(net.address, r"^https://(drive\.google|github|download\.pytorch)\.\w+/")
        self.assertRegex(net.sha256, "^([0-9a-f]{8,64})?$")
        self.assertRegex(paper(key).link, "^https://")
        if "drive.google" in net.address:
            self.assertRegex(net.address, r"id=[\w-]{33}$")
        if net.sha256:  # as the publisher writes it into the name
            self.assertIn(f"-{net.sha256}.", net.address)

    def test_addresses_differ(self):
        """But for networks of several tables: those of common corruptions, and `Standard`."""
        of_balls = [net.address for net in PUBLISHED.values() if net.board.norm]
        self.assertLen(set(of_balls), len(of_balls) - 1)

    def test_names_of_timm(self):
        """Each is at hf://timm/NAME.TAG, but for CLIP's networks without a classifier."""
        try:
            from jaxrobust.publish import torch_networks

            timm = torch_networks.import_timm()
        except ImportError:
            self.skipTest(paths.PARITY)
        names = sources.timm_names()
        self.assertEqual(names["convnext_tiny"], "convnext_t")
        self.assertNotIn("deit3_medium", names)
        seen = 0
        for base, ours in names.items():
            self.assertEqual(models.member(ours).reference.base, base)
            for name in timm.list_pretrained(f"{base}.*"):
                where = timm.get_pretrained_cfg(name).hf_hub_id
                if not name.partition(".")[2].startswith("clip_lai"):
                    self.assertEqual(where, f"timm/{name}")
                    self.assertEqual(sources.parse(name).address, f"hf://{where}")
                    seen += 1
        self.assertGreater(seen, 90)
