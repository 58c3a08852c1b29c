"""Artifacts: the arrays of each kind of source, and the facts next to them."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store import certificates, weights_folder
from tests.support import sweeps
from tests.support.stored import as_timm, weights

OPTIONS = {"stem_strides": [1], "depths": [1], "dims": [8]}


class ReadingTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.arrays = weights(
            "convnext_n", image_size=8, in_channels=1, **{k: tuple(v) for k, v in OPTIONS.items()}
        )

    def read(self, path: Path, **how):
        return reading.artifact_of(sources.parse(str(path)), **how)

    def clone(self) -> Path:
        """A repository as the hub has it."""
        clone = self.folder / "clone"
        clone.mkdir()
        save_file(as_timm(self.arrays), clone / "model.safetensors")
        own = {"architecture": "convnext_n", "options": OPTIONS, "norm": "l2", "epsilon": 0.5}
        settings = {"num_classes": 10, "jaxrobust": own}
        settings["pretrained_cfg"] = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]}
        (clone / "config.json").write_text(json.dumps(settings))
        return clone

    def test_a_source_is_read_as_it_is_unless_asked(self):
        own, calls = reading.Artifact({"w": 1}, reading.WeightFacts(num_classes=7)), []

        def read(source, *how):
            calls.append((source, *how))
            return own

        source = sources.WeightSource("w.pt", "file")
        known = source._replace(published="Huang2022Revisiting_WRN-A4")
        with mock.patch.dict(reading.READERS, {"file": read}):
            self.assertIs(reading.artifact_of(source), own)
            arrays, facts = reading.artifact_of(known, weights_kind="ema", cast=True)
        self.assertEqual(calls, [(source, None, False), (known, "ema", True)])
        # Of CIFAR-10; what the file says comes first.
        self.assertEqual((facts.num_classes, facts.image_size), (7, 32))
        self.assertEqual((arrays, facts.published), (own.arrays, known.published))

    def test_a_file_with_metadata(self):
        file = self.folder / "w.safetensors"
        save_file(self.arrays, file, metadata=weights_folder.metadata("convnext_n", OPTIONS))
        arrays, facts = self.read(file)
        self.assertEqual(arrays.keys(), self.arrays.keys())
        self.assertEqual((facts.model, facts.options), ("convnext_n", OPTIONS))
        self.assertEqual((facts.where, facts.source, facts.file), (str(file), file.name, file))
        self.assertIsNone(facts.image_size)

    def test_a_repository_of_the_hub(self):
        facts = self.read(self.clone()).facts
        self.assertEqual((facts.model, facts.options), ("convnext_n", OPTIONS))
        self.assertEqual((facts.num_classes, facts.image_size), (10, 8))
        self.assertEqual((facts.norm, facts.epsilon, facts.settings["std"]), ("l2", 0.5, [0.25]))

    def test_timms_name_is_enough_unless_its_arguments_make_another_network(self):
        clone = self.clone()
        own = {"architecture": "convnext_tiny", "num_classes": 10}
        for arguments, model in (
            ({}, "convnext_t"),
            ({"img_size": 64, "in_chans": 1, "num_classes": 5}, "convnext_t"),
            ({"depths": [1]}, None),
        ):
            settings = own | {"model_args": arguments}
            (clone / "config.json").write_text(json.dumps(settings))
            self.assertEqual(self.read(clone).facts.model, model)

    def test_an_imported_folder_has_the_facts_of_what_it_was_made_of(self):
        source = sources.parse(str(self.clone()))
        network = imports.imported(source, Request(keep_head=True))
        config = imports.described(network)
        weights_folder.write(self.folder / "imported", network.params, network.stats, config)
        facts = self.read(self.folder / "imported").facts
        theirs = reading.artifact_of(source).facts
        for key in ("model", "num_classes", "image_size", "norm", "epsilon", "preprocessing"):
            self.assertEqual(getattr(facts, key), getattr(theirs, key), key)
        again = load.fitted(self.read(self.folder / "imported"))
        self.assertEqual(again.weights_sha256, network.weights_sha256)
        self.assertEqual(again.facts.record["source_sha256"], config["source_sha256"])
        np.testing.assert_array_equal(again.stats["normalize.std"], np.float32([0.25]))


class FolderTest(parameterized.TestCase):
    """What stands in a folder that may hold weights."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "weights.safetensors").write_bytes(b"weights")
        sha256 = hashlib.sha256(b"weights").hexdigest()
        self.own = {"architecture": "n", "num_classes": 10, "image_size": 8, "in_channels": 1}
        self.own |= {"sha256": sha256}

    def about(self, **changes):
        (self.folder / "config.json").write_text(json.dumps(self.own | changes))
        return weights_folder.about(self.folder)

    def test_what_is_not_known_is_null(self):
        none = dict.fromkeys(("options", "preprocessing", "norm", "epsilon"))
        self.assertEqual(self.about(), none | self.own)
        for key in ("num_classes", "image_size", "in_channels", "epsilon"):
            self.assertEqual(self.about(**{key: None}), none | self.own | {key: None})
        self.assertEqual(self.about(epsilon=1)["epsilon"], 1)

    @sweeps.rows(
        ("architecture", None), ("sha256", None), ("num_classes", "10"), ("num_classes", 10.0),
        ("options", []), ("epsilon", "1"), ("norm", 2),
    )  # fmt: skip
    def test_what_is_damaged(self, key, value):
        with self.assertRaises(ValueError) as refused:
            self.about(**{key: value})
        self.assertIn(f"config.json is damaged ({key}={value!r})", str(refused.exception))

    def test_a_folder_is_free_where_nothing_is_or_such_weights(self):
        self.about()
        weights_folder.check_free(self.folder)
        for name in ("empty", "others"):
            (self.folder / name).mkdir()
        for name in ("empty", "none"):
            weights_folder.check_free(self.folder / name)
        (self.folder / "others" / "config.json").write_text("{}")
        with self.assertRaisesRegex(ValueError, "others holds other files; name a new folder"):
            weights_folder.check_free(self.folder / "others")
        with self.assertRaisesRegex(ValueError, "config.json is a file; name a folder"):
            weights_folder.check_free(self.folder / "others" / "config.json")


class ImportedTest(parameterized.TestCase):
    """Into which folder of the cache weights of others go, and what may be asked of them."""

    def setUp(self):
        super().setUp()
        self.cache = Path(self.create_tempdir())
        self.settings = self.cache / "settings.json"
        self.settings.write_text("{}")
        put = lambda *place, **how: self.enter_context(mock.patch.object(*place, **how))  # noqa: E731
        put(imports.caches, "folder", return_value=self.cache)
        put(imports, "_there", return_value=True)
        put(imports.hashes, "file_sha256", side_effect=lambda path: f"hash of {path.name}")

    def place(self, text="hf://a/b", file="w.pt", **how) -> Path:
        source = sources.WeightSource(text, "remote", address=text)
        here = source._replace(file=self.cache / file, settings=self.settings)
        with mock.patch.object(imports.sources, "fetch", return_value=here):
            found = imports.local(source, **how)
        self.assertEqual((found.kind, found.file), ("folder", found.path / "weights.safetensors"))
        return found.path

    def test_all_that_makes_other_weights_makes_another_folder(self):
        places = [
            self.place(),
            self.place(file="other.pt"),
            self.place(model="n"),
            self.place(weights_kind="raw"),
            self.place(fresh_stem=True),
        ]
        self.settings.write_text('{"num_classes": 5}')
        places.append(self.place())
        with mock.patch.object(imports.jaxrobust, "__version__", "0"):
            places.append(self.place())
        self.assertLen(set(places), len(places))
        self.assertEqual(self.place(), places[5])

    def test_a_name_is_the_end_of_what_was_given(self):
        long = f"hf://{'a' * 40}/{'b' * 40}"
        name, _, digest = self.place(long).name.rpartition("-")
        self.assertEqual(name, f"{'a' * 19}-{'b' * 40}")
        self.assertLen(digest, 12)

    @sweeps.rows(
        ({"init_stem": True}, "--init_stem"), ({"seed": 3}, "--seed"), ({"which": "raw"}, "--which")
    )
    def test_weights_of_a_run_are_taken_as_they_are(self, asked, flag):
        run = sources.WeightSource("runs/1", "run", Path("runs/1"))
        with self.assertRaisesRegex(
            ValueError, f"^{flag} only applies to foreign weights; the weights of a run"
        ):
            imports.imported(run, Request(**asked))

    def test_a_run_may_be_called_by_its_network_and_have_another_size(self):
        run = sources.WeightSource("runs/1", "run", Path("runs/1"))
        asked = Request(model="resnet18", keep_head=True, image_size=64)
        facts = reading.WeightFacts(model="resnet18")
        with (
            mock.patch.object(reading, "artifact_of", return_value=reading.Artifact({}, facts)),
            mock.patch.object(imports.networks, "network") as made,
        ):
            self.assertIs(imports.imported(run, asked), made.return_value)
            with self.assertRaisesRegex(ValueError, "holds a resnet18; leave --model=resnet50 out"):
                imports.imported(run, asked._replace(model="resnet50"))

    @sweeps.rows(
        ({"interpolation": "bicubic", "crop_pct": 0.875}, 224, "bicubic-256-crop-224"),
        ({"interpolation": "bicubic", "crop_pct": 0.95}, 224, "bicubic-235-crop-224"),  # of 235.8
        ({"interpolation": "bilinear", "crop_pct": 1.0}, 32, "bilinear-32-crop-32"),
        ({"interpolation": "nearest", "crop_pct": 1.0}, 32, None),
        ({"interpolation": "bicubic"}, 32, None),
        ({}, 32, None),
    )
    def test_timms_preprocessing(self, settings, size, expected):
        self.assertEqual(imports.preprocessing(settings, size), expected)


class ThereTest(absltest.TestCase):
    def test_a_damaged_folder_is_imported_again(self):
        folder = Path(self.create_tempdir(), "damaged")
        folder.mkdir()
        self.assertFalse(imports._there(folder))
        self.assertTrue(folder.exists())
        (folder / "config.json").write_text("{")
        self.assertFalse(imports._there(folder))
        self.assertFalse(folder.exists())


class OptionsTest(absltest.TestCase):
    def test_fields_that_make_no_other_network_contradict_nothing(self):
        stored = ("convnext_n", OPTIONS)
        for given in (None, {"drop_path": 0.1}, {"drop_path": 0.1, **OPTIONS}):
            self.assertEqual(
                certificates.options("convnext_n", given, stored, "w.pt"),
                dict(sorted(OPTIONS.items())),
            )
        with self.assertRaisesRegex(ValueError, "w.pt describes its network as convnext_n"):
            certificates.options("convnext_n", {}, stored, "w.pt")
        with self.assertRaisesRegex(ValueError, "unknown option .'dropp'. for convnext_n"):
            certificates.options("convnext_n", {"dropp": 0.1}, stored, "w.pt")
