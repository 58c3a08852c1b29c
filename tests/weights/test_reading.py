"""Artifacts: the arrays of each kind of source, and the facts beside them."""

import json
from pathlib import Path

import numpy as np
from absl.testing import absltest
from safetensors.numpy import save_file

from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store import certificates, weights_folder
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

    def test_every_kind_has_a_reader(self):
        kinds = {"file", "folder", "run", "repository", "remote"}
        self.assertEqual(reading.READERS.keys(), kinds)

    def test_a_missing_file(self):
        with self.assertRaisesRegex(ValueError, "none.pt: no such file; give one of"):
            reading.artifact_of(sources.at(self.folder / "none.pt"))


class OptionsTest(absltest.TestCase):
    def test_fields_that_make_no_other_network_contradict_nothing(self):
        stored = ("convnext_n", OPTIONS)
        for given in (None, {"drop_path": 0.1}, {"drop_path": 0.1, **OPTIONS}):
            self.assertEqual(
                certificates.options("convnext_n", given, stored, "w.pt"),
                dict(sorted(OPTIONS.items())),
            )
        with self.assertRaisesRegex(ValueError, "w.pt holds the weights of convnext_n with"):
            certificates.options("convnext_n", {}, stored, "w.pt")
        with self.assertRaisesRegex(ValueError, "unknown option .'dropp'. for convnext_n"):
            certificates.options("convnext_n", {"dropp": 0.1}, stored, "w.pt")


if __name__ == "__main__":
    absltest.main()
