"""Training on a folder of images: what is damaged, missing or renamed, and what the run says."""

import copy
import json
from pathlib import Path
from unittest import mock

import grain  # noqa: F401  # defines flags, which `flagsaver` must not see for the first time
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.data import train_batches
from jaxrobust.data.sources import registry
from jaxrobust.data.transforms import decoding
from jaxrobust.runtime.files import jsonl
from jaxrobust.training.run import run as training_run
from jaxrobust.weights.trained import runs
from tests.support import result_lines, sweeps
from tests.support.evaluations import call
from tests.support.runs import quiet_run, tiny

CLASSES = ("ant", "bee", "cow", "dog")


def folder(root: Path) -> Path:
    """train and val of four classes, from the digits 0 to 3 (PNG, 8x8)."""
    digits = registry.open_source("digits", "train[:400]")
    counts = dict.fromkeys(range(4), 0)
    for index in range(400):
        record = digits[index]
        if record.label in counts:
            split = "train" if counts[record.label] < 16 else "val"
            path = root / split / CLASSES[record.label] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record.image)
            counts[record.label] += 1
    return root


class FolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir().full_path)
        self.data = folder(self.root / "data")
        self.workdir = self.root / "run"
        self.config = tiny(
            data__name=f"folder:{self.data}",
            data__train_split="train",
            data__selection_split="val[:50%]",
            data__test_split="val[50%:]",
            data__augmentation="heavy",
            model__in_channels=3,
            model__num_classes=4,
            pretrain__epochs=0,
            train__epochs=1,
            train__batch_size=32,
            train__from_random=True,
            train__warmup_epochs=0,
            log__every_steps=1,
        )

    def change(self, **changes):
        with self.config.unlocked():
            for key, value in changes.items():
                section, _, name = key.partition("__")
                self.config[section][name] = value

    def images(self, split):
        return sorted((self.data / split).glob("*/*.png"))

    def metrics(self):
        return [line for line in jsonl.read(self.workdir / "metrics.jsonl") if "loss" in line]

    @pytest.mark.slow
    def test_heavy_augmentation_and_the_list_of_classes(self):
        quiet_run(self.config, self.workdir)
        self.assertEqual((self.workdir / "classes.txt").read_text(), "ant\nbee\ncow\ndog\n")
        for line in self.metrics():
            self.assertEqual(line["damaged_images"], 0)
            self.assertBetween(line["data_wait"], 0, 1)
        (record,) = result_lines.read(self.workdir)
        self.assertEqual(record["preprocessing"], "none")  # as their images have one size
        self.assertNotIn("damaged", record)

    @pytest.mark.slow
    def test_damaged_images_are_named_counted_and_replaced(self):
        bad = self.images("train")[5]
        bad.write_bytes(bad.read_bytes()[:50])
        self.images("train")[20].write_bytes(b"")
        for split in (slice(None, 1), slice(-1, None)):  # of the selection, of the test split
            self.images("val")[split][0].write_text("not an image")
        said = quiet_run(self.config, self.workdir)
        for path in (bad, self.images("train")[20], self.images("val")[0], self.images("val")[-1]):
            named = [line for line in said.splitlines() if str(path) in line]
            self.assertLen(named, 1)
            self.assertRegex(named[0], r"is damaged \(not a complete image.*\); \d of at most 50")
        self.assertEqual(self.metrics()[-1]["damaged_images"], 2)
        splits = sorted(row["split"] for row in jsonl.read(self.workdir / "damaged-0.jsonl"))
        self.assertEqual(splits, ["train"] * 2 + ["val[50%:]", "val[:50%]"])
        (record,) = result_lines.read(self.workdir)
        self.assertLen(record["damaged"], 1)
        self.assertIn(str(self.images("val")[-1]), record["damaged"][0])

    @parameterized.parameters(
        ({"data__strict": True}, "is damaged: not a complete image"),
        ({"data__max_damaged": 0}, r"one more than data.max_damaged=0"),
    )
    @pytest.mark.matrix
    def test_it_stops_and_continues_once_the_data_is_whole(self, changes, message):
        bad = self.images("train")[5]
        content = bad.read_bytes()
        bad.write_bytes(content[:50])
        self.change(**changes)
        with self.assertRaisesRegex(
            registry.DataError, f"{bad}.*{message}.*stopped after step \\d"
        ):
            quiet_run(self.config, self.workdir)
        bad.write_bytes(content)
        quiet_run(self.config, self.workdir)
        self.assertLen(result_lines.read(self.workdir), 1)

    def test_other_classes_than_before_are_refused(self):
        training_run.check(self.config, self.workdir)
        self.workdir.mkdir()
        (self.workdir / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
        with self.assertRaisesRegex(
            ValueError, r"other classes than .*classes.txt: 1 .* missing \['cat'\], 1 are new"
        ):
            training_run.check(self.config, self.workdir)

    @pytest.mark.slow
    def test_other_files_than_before_are_refused(self):
        """The same number of them as well."""
        config, root = json.loads(self.config.to_json()), self.data / "train" / "ant"

        def begin():
            *_, data = training_run.check(self.config, self.workdir)
            self.workdir.mkdir(exist_ok=True)
            training_run.claim(self.workdir, config, data)

        begin()
        begin()
        first = self.images("train")[0]
        kept = first.read_bytes()
        first.unlink()
        records = r"data\.train_split\.records: 64 there, 63 now"
        with self.assertRaisesRegex(ValueError, rf"began \(.*{records}\); restore it, or"):
            begin()
        (root / "zebra.png").write_bytes(kept)
        with self.assertRaisesRegex(ValueError, r"began \(data\.train_split\.files_sha256: '"):
            begin()
        (root / "zebra.png").rename(first)
        first.write_bytes(b"damaged")  # which is replaced, and may be repaired
        begin()
        last = self.images("val")[-1]
        last.rename(last.with_name("else.png"))
        with self.assertRaisesRegex(
            ValueError, r"\(data\.selection_split\.files.*test_split\.files"
        ):
            begin()
        (self.workdir / "data.json").unlink()  # a run of before has none
        begin()

    def test_wholly_renamed_classes_are_refused_too(self):
        self.workdir.mkdir()
        (self.workdir / "classes.txt").write_text("a\nb\nc\nd\n")
        with self.assertRaisesRegex(ValueError, r"4 names are missing .* new --workdir"):
            training_run.check(self.config, self.workdir)
        source = registry.open_source(f"folder:{self.data}", "val")
        # Of another data set, for one.
        runs.check_classes(self.workdir / "classes.txt", source, renamed=True)

    def test_splits_of_other_classes_are_refused(self):
        (self.data / "val" / "bee").rename(self.data / "val" / "bat")
        with self.assertRaisesRegex(ValueError, "bat|bee"):
            training_run.check(self.config, self.workdir)

    @sweeps.rows(
        ({"data__preprocessing": "bicubic-16-crop-12"}, "images of 12x12 pixels, but .*size=8"),
        ({"model__num_classes": 5}, "num_classes=5, but .* has 4 classes; set num_classes=4"),
        ({"model__in_channels": 2}, "has 1 channels; set model.in_channels=1"),
    )
    def test_said_before_anything_compiles(self, changes, message):
        with mock.patch.object(self, "config", copy.deepcopy(self.config)):
            self.change(**changes)
            with self.assertRaisesRegex(ValueError, message):
                training_run.check(self.config, self.workdir)


class OtherSourcesTest(parameterized.TestCase):
    """The digits as arrays and as a data set of Hugging Face are the digits."""

    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir().full_path)
        parts = {split: registry.open_source("digits", split) for split in ("train", "test")}
        self.records = {split: part.read(range(len(part))) for split, part in parts.items()}

    def as_npz(self):
        arrays = {}
        for split, records_ in self.records.items():
            pixels = [decoding.decode(record.image)[:, :, 0] for record in records_]
            arrays[f"{split}_images"] = np.stack(pixels)
            arrays[f"{split}_labels"] = [[record.label] for record in records_]
        np.savez_compressed(self.root / "digits.npz", **arrays)
        return f"npz:{self.root}/digits.npz"

    def as_hf(self):
        try:
            import datasets
        except ImportError:
            self.skipTest("needs Hugging Face's datasets: pip install 'jaxrobust[hf]'")
        cache = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", self.root / "cache")
        self.enter_context(cache)
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
        for split, records_ in self.records.items():
            columns = {
                "image": [{"bytes": record.image, "path": None} for record in records_],
                "label": [record.label for record in records_],
            }
            part = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
            part.to_parquet(str(self.root / f"{split}-00000-of-00001.parquet"))
        return f"hf:{self.root}"

    @parameterized.parameters("as_npz", "as_hf")
    def test_the_same_batches(self, kind):
        name = getattr(self, kind)()
        given = {"batch_size": 64, "seed": 3, "augmentation": "crop", "image_size": 8}
        both = [
            train_batches(registry.open_source(n, "train[:256]"), **given) for n in (name, "digits")
        ]
        for batches in both:
            self.addCleanup(batches.close)
        for _ in range(5):
            for ours, digits in zip(*map(next, both), strict=True):
                np.testing.assert_array_equal(ours, digits)

    @parameterized.parameters("as_npz", "as_hf")
    @pytest.mark.slow
    def test_the_same_run_and_the_same_evaluation(self, kind):
        found = []
        for name in (getattr(self, kind)(), "digits"):
            workdir = self.root / f"run-{name.partition(':')[0]}"
            quiet_run(tiny(data__name=name, pretrain__epochs=0, train__epochs=2), workdir)
            (record,) = result_lines.read(workdir)
            self.assertEqual((record["dataset"], record["image_ids"]), (name, "0..79"))
            code, _, said = call(workdir=str(workdir), attack="pgd-2", n=50)
            self.assertEqual(code, 0, said)
            other = result_lines.read(workdir / "evaluation")[-1]
            self.assertEqual((other["dataset"], other["split"]), (name, "test[:80]"))
            keys = ("clean", "robust", "weights_sha256")
            found.append([r[key] for r in (record, other) for key in keys])
            self.assertIn('"data.train_split.records": 256', (workdir / "data.json").read_text())
        self.assertEqual(*found)

    @pytest.mark.slow
    def test_other_arrays_under_the_same_name_are_evaluated_again(self):
        name, out = self.as_npz(), self.root / "out"
        net = models.create("convnext_n", num_classes=10, image_size=8, in_channels=1)
        params, stats = net.init(jax.random.key(0))
        file = self.root / "w.safetensors"
        save_file({k: np.asarray(v) for k, v in (params | stats).items()}, file)
        given = {"model": "convnext_n", "weights": str(file)}
        given |= {"dataset": name, "n": 20, "attack": "clean", "out": str(out)}
        for change, count in ((None, 1), (None, 1), ("other pixels", 2)):
            if change:
                self.records["test"].reverse()
                self.as_npz()
            code, _, said = call(**given)
            self.assertEqual(code, 0, said)
            self.assertLen(result_lines.read(out), count)
        one, other = result_lines.read(out)
        self.assertNotEqual(one["evaluation"], other["evaluation"])


class EvaluateTest(absltest.TestCase):
    @pytest.mark.matrix
    def test_the_order_of_classes_makes_another_number(self):
        root = Path(self.create_tempdir().full_path)
        data = folder(root / "data")
        net = models.create("convnext_n", num_classes=4, image_size=8, in_channels=3)
        params, stats = net.init(jax.random.key(0))
        save_file({k: np.asarray(v) for k, v in (params | stats).items()}, root / "w.safetensors")
        for name, order in (("a", CLASSES), ("b", CLASSES[::-1])):
            (root / name).write_text("".join(f"{c}\n" for c in order))
            code, _, said = call(
                model="convnext_n",
                weights=str(root / "w.safetensors"),
                image_size=8,
                dataset=f"folder:{data}",
                split="val",
                attack="clean",
                classes=str(root / name),
                out=str(root / "out"),
            )
            self.assertEqual(code, 0, said)
        one, other = result_lines.read(root / "out")
        self.assertNotEqual(one["evaluation"], other["evaluation"])
        self.assertNotEqual(one["classes_sha256"], other["classes_sha256"])
        self.assertNotEqual(one["clean"], other["clean"])  # one class is right, then another
