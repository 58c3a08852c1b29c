"""The same digits as class folders, arrays, TFDS' records and parquet give the same answers."""

import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.commands.configure import new
from jaxrobust.doctor import command as doctor
from jaxrobust.evaluation.questions import target
from jaxrobust.results.configs import refusals
from jaxrobust.runtime.commandline.arguments import load_config
from jaxrobust.training.run import run as training_run
from jaxrobust.training.run import splits
from tests.support import command_calls, four_sources
from tests.support.evaluations import call
from tests.support.four_sources import KINDS
from tests.support.runs import quiet_run, tiny

NAMES = tuple(f"d{number}" for number in range(10))
NETWORK = """
import numpy as np
from jaxrobust import data

given = data.load("digits", split="train")
means = np.stack([given.images[given.labels == k].mean(0).ravel() for k in range(10)])

def logits_fn(x):
    return 2 * x.reshape(len(x), -1) @ means.T - (means**2).sum(1)[None]
"""


class SourceKindsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        environment = {"XDG_CACHE_HOME": str(cls.root / "cache")}
        cls.enterClassContext(mock.patch.dict(os.environ, environment))
        (cls.root / "net.py").write_text(NETWORK)
        parts = {}
        for split, (images, labels) in four_sources.digits(100).items():
            order = np.argsort(labels, kind="stable")  # as class folders have them
            parts[split] = (images[order], labels[order])
        parts["validation"] = tuple(part[::2] for part in parts["test"])
        cls.splits, cls.written = parts, {}

    def given(self, kind):
        if kind == "hf":
            four_sources.cache_hugging_face(self, self.root / "hf_cache")
        if kind not in self.written:
            self.written[kind] = four_sources.write(kind, self.root, self.splits, NAMES)
        return self.written[kind]

    @parameterized.parameters(*KINDS)
    def test_evaluate(self, kind):
        """A folder of images of the network's own size was resized: 64.4% instead of 94%."""
        own = self.given(kind)
        images, labels = self.splits["test"]
        loaded = data.load(**own, split="test")
        np.testing.assert_array_equal(loaded.images, images / np.float32(255))
        np.testing.assert_array_equal(loaded.labels, labels)
        out = self.root / f"out-{kind}"
        code, _, said = call(
            function=f"{self.root}/net.py:logits_fn",
            dataset=own["name"], data_dir=own["data_dir"], split="test",
            attack="clean", image_size=8, out=str(out), n=100,
        )  # fmt: skip
        self.assertEqual(code, 0, said)
        (record,) = map(json.loads, (out / "results.jsonl").read_text().splitlines())
        self.assertEqual(record["preprocessing"], "none")
        scope: dict = {}
        exec(NETWORK, scope)
        right = scope["logits_fn"](images / np.float32(255)).argmax(1) == labels
        self.assertAlmostEqual(record["clean"], right.mean())
        self.assertGreater(record["clean"], 0.8)

    def test_the_only_split_of_a_file_needs_no_flag(self):
        images, labels = self.splits["test"]
        np.savez(self.root / "one.npz", images=images, labels=labels)
        np.savez(self.root / "train.npz", x_train=images, y_train=labels)
        origin = target.of_function(f"{self.root}/net.py:logits_fn")
        for name, split in (("one", "all"), ("train", "train")):
            _, source = target.settled(origin, dataset=f"npz:{self.root}/{name}.npz")
            self.assertEqual((source.split, len(source)), (split, len(labels)))

    @parameterized.parameters(*KINDS)
    def test_doctor(self, kind):
        own = self.given(kind)
        given = doctor.given_of(
            f"{self.root}/net.py:logits_fn", norm=None,
            dataset=own["name"], data_dir=own["data_dir"], split="test",
        )  # fmt: skip
        _, patient = doctor._read(given, 20)
        self.assertEqual(patient.images.shape, (20, 8, 8, 1))
        self.assertIn(
            patient.images[0].tolist(), (self.splits["test"][0] / np.float32(255)).tolist()
        )

    @parameterized.parameters(*KINDS)
    @pytest.mark.slow
    def test_new_and_check(self, kind):
        own = self.given(kind)
        config = self.root / f"{kind}.py"
        place = own["name"].removeprefix("folder:").removeprefix("npz:")
        environment = {"TFDS_DATA_DIR": own["data_dir"] or str(self.root)}
        with mock.patch.dict(os.environ, environment):
            code, out, said = command_calls.words(new.main, config, "--data", place, "--json")
            self.assertEqual(code, 0, said)
            values = json.loads(out.splitlines()[-1])["values"]
            found = {key: values[f"model.{key}"] for key in ("image_size", "in_channels")}
            self.assertEqual(found, {"image_size": "8", "in_channels": "1"})
            self.assertEqual(values["data.augmentation"], "crop")
            self.assertEqual(refusals.review(load_config(str(config)), 1).refused, [])

    @parameterized.parameters(*KINDS)
    def test_training_is_planned(self, kind):
        """A folder was refused: "has differently sized images", which was false."""
        config = self.config(self.given(kind))
        parts, described = training_run.check(config, self.root / f"check-{kind}")
        self.assertEqual(list(parts), ["train"])
        self.assertEqual(described["data.train_split.records"], 100)

    def test_a_run_in_colour_still_reads_grey_files(self):
        """Runs of before have three channels on gray folders, as torchvision reads them."""
        for kind in ("folder", "npz"):
            config = self.config(self.given(kind))
            config.unlock().model.in_channels = 3
            if kind == "npz":
                with self.assertRaisesRegex(ValueError, "has 1 channels; set model.in_channels=1"):
                    training_run.check(config, self.root / "check-colour")
                continue
            training_run.check(config, self.root / "check-colour")
            source = splits.opened(config, "test_split")
            self.assertEqual(source.image_shape, (8, 8, 3))

    def test_a_background_class(self):
        """Networks of TensorFlow have 1,001 outputs for ImageNet's 1,000 classes."""
        net = self.root / "more.py"
        net.write_text(
            f"{NETWORK}\nimport jax.numpy as jnp\n\n"
            "def more(x):\n    return jnp.pad(logits_fn(x), ((0, 0), (1, 0)))\n"
        )
        own = self.given("folder")
        code, _, said = call(
            function=f"{net}:more", dataset=own["name"], split="test", attack="clean",
            out=str(self.root / "background"),
        )  # fmt: skip
        self.assertEqual(code, 2)
        self.assertIn("returns 11 logits, but", said)
        self.assertIn("without a background class (logits[:, 1:] if it comes first", said)

    @pytest.mark.slow
    def test_training_gives_the_same_numbers(self):
        results = {}
        for kind in ("folder", "npz"):
            workdir = self.root / f"run-{kind}"
            quiet_run(self.config(self.given(kind)), workdir)
            (line,) = map(json.loads, (workdir / "results.jsonl").read_text().splitlines())
            results[kind] = (line["clean"], line["robust"])
        self.assertLen(set(results.values()), 1, results)

    def config(self, own):
        config = tiny(data__name=own["name"], data__augmentation="crop-flip")
        with config.unlocked():
            config.data.update(dir=own["data_dir"], train_split="train")
            config.data.update(selection_split="test", test_split="test")
            config.pretrain.epochs = 0
            config.train.update(epochs=1, batch_size=32, warmup_epochs=0)
        return config
