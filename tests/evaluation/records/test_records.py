import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, check, keys_of
from jaxrobust.runtime.files import jsonl
from jaxrobust.weights.store import hashes
from tests.support import paths, result_lines, sweeps


class RecordsTest(absltest.TestCase):
    def test_hashes_see_names_shapes_types_and_values(self):
        weights = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}
        variants = [
            weights,
            {"b": weights["b"], "c": weights["a"]},
            weights | {"a": np.zeros((2, 2), np.float32)},
            weights | {"a": np.zeros(4, np.int32)},
            weights | {"a": np.array([0, 0, 0, 1e-9], np.float32)},
        ]
        self.assertLen({hashes.weights_sha256(v, {}) for v in variants}, len(variants))
        reordered = dict(reversed(weights.items()))
        self.assertEqual(hashes.weights_sha256(reordered, {}), hashes.weights_sha256(weights, {}))

    def test_config_hash_ignores_the_order_of_keys(self):
        a, b = {"x": 1, "y": {"z": 2.5}}, {"y": {"z": 2.5}, "x": 1}
        self.assertEqual(hashes.config_sha256(a), hashes.config_sha256(b))
        self.assertNotEqual(hashes.config_sha256(a), hashes.config_sha256(a | {"x": 2}))


class ResultTest(parameterized.TestCase):
    """The record of the library's call has the keys of the package's own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        rng = np.random.default_rng(0)
        cls.weights = rng.standard_normal((16, 10)).astype(np.float32)
        cls.images = rng.random((12, 4, 4, 1), np.float32)
        cls.labels = np.argmax(cls.images.reshape(12, -1) @ cls.weights, axis=1)
        cls.ids = [7, 8, 9, 3, 20, 21, 22, 23, 24, 25, 26, 40]
        cls.result = cls.evaluate(image_ids=cls.ids)

    @classmethod
    def evaluate(cls, version="custom", scale=1.0, **how):
        logits_fn = jax.tree_util.Partial(
            lambda w, x: x.reshape(x.shape[0], -1) @ w, scale * cls.weights
        )
        how = {"attacks": ("square",), "overrides": {"square": {"steps": 3}}} | how
        ball = {"norm": "l2", "epsilon": 0.5}
        return autoattack(
            logits_fn, cls.images, cls.labels, **ball, version=version, verbose=False, **how
        )

    def test_an_attack_that_leaves_nothing(self):
        left = self.result._replace(accuracy_after={"square": 0.0})
        self.assertEqual(left.record()["accuracy_after"], {"square": 0.0})

    @pytest.mark.slow
    def test_hashes_tell_networks_and_images_apart(self):
        first, again = self.result.record(), self.evaluate(image_ids=self.ids).record()
        other = self.evaluate(scale=2.0, identity="mine").record()
        arrays = [r["function"]["arrays_sha256"] for r in (first, again, other)]
        self.assertEqual(arrays[0], arrays[1])
        self.assertNotEqual(arrays[0], arrays[2])
        images = [r["images_sha256"] for r in (first, again, other)]
        self.assertEqual(images[0], images[1])
        self.assertNotEqual(images[0], images[2])  # other ids
        self.assertEqual(other["image_ids"], "0..11")

    def test_saves_a_line_each_time(self):
        path = Path(self.create_tempdir()) / "results.jsonl"
        first = self.result.save(path, model="mine")
        second = self.result.save(str(path), model="another")
        self.assertEqual(jsonl.read(path), [first, second])
        found = verdicts.read(path.with_name(first["verdicts"]))
        self.assertEqual(found.image_ids.tolist(), self.ids)
        self.assertEqual(found.fooled_by.tolist(), self.result.fooled_by.tolist())
        self.assertEqual(first["costs"][0]["attack"], "square")
        self.assertEqual(first["costs"][0]["step_rule"], "random squares of a shrinking size")
        self.assertEqual(result_lines.read(path.parent)[1]["model"]["name"], "another")

    @sweeps.rows(
        (
            {"schema": 3},
            "has a record of schema 3, but this version only reads up to 2; install a newer",
        ),
        ({"schema": "2"}, "has a record of schema 2, but"),
        ({"schema": None}, "has a record of schema None, but"),
        ({"attacks": {}}, "has a record whose attacks is {}"),
        ({"evaluation": 7}, "has a record whose evaluation is 7"),
        ({"clean": "0.5"}, "has a record whose clean is '0.5'; remove that line, or restore"),
        ({"costs": 3}, "whose costs is 3"),
    )
    def test_what_is_no_record_is_refused(self, changes, message):
        folder = Path(self.create_tempdir())
        record = self.result.record() | changes
        with self.assertRaisesRegex(ValueError, message):
            records.append(folder / "results.jsonl", AccuracyRecord.from_json(record))
        self.assertEqual(list(folder.iterdir()), [])
        jsonl.append(folder / "results.jsonl", record)
        with self.assertRaisesRegex(ValueError, message):
            result_lines.read(folder)

    def test_records_before_schema_2_are_read(self):
        folder = Path(self.create_tempdir())
        new = ("schema", "verdicts", "interval", "costs", "size", "training")
        old = {key: value for key, value in self.result.record().items() if key not in new}
        jsonl.append(folder / "results.jsonl", old)
        self.assertEqual(result_lines.read(folder), [old])
        self.assertSameElements(records.read(folder)[0].absent, new)
        with self.assertRaisesRegex(ValueError, "whose size is None"):
            short = {k: v for k, v in self.result.record().items() if k != "size"}
            check(AccuracyRecord.from_json(short), "it")

    def test_the_keys_are_the_fields(self):
        names = [key.name for key in keys_of(AccuracyRecord)]
        whole = dict.fromkeys(names, "x") | {"schema": 2}
        record = AccuracyRecord.from_json(whole)
        self.assertEqual(record.to_json(), whole)
        self.assertEqual((record.absent, record.others), ((), {}))

    def test_a_field_is_all_that_a_new_key_needs(self):
        @dataclasses.dataclass(frozen=True)
        class Longer(AccuracyRecord):
            watts: float | None = None

        record = Longer(clean=0.5, watts=3.5).stamped()
        check(record, "it")
        self.assertEqual(record.to_json()["watts"], 3.5)
        self.assertEqual(Longer.from_json(record.to_json()), record)
        self.assertNotIn("watts", Longer(clean=0.5).to_json())
        with self.assertRaisesRegex(ValueError, "whose watts is 'many'"):
            check(Longer.from_json(record.to_json() | {"watts": "many"}), "it")

    def test_what_another_version_wrote_is_kept(self):
        old = {"dataset": "digits", "attacks": [], "ids_sha256": None, "unheard_of": {"a": 1}}
        record = AccuracyRecord.from_json(old)
        self.assertEqual(record.to_json(), old)
        self.assertEqual(record.others, {"ids_sha256": None, "unheard_of": {"a": 1}})
        self.assertIn("clean", record.absent)
        changed = dataclasses.replace(record, clean=0.5)
        self.assertEqual(changed.to_json(), old | {"clean": 0.5})

    def test_every_record_of_this_repository_is_read_and_written_as_it_is(self):
        lines = [
            line
            for folder in (paths.ROOT / "tools" / "records", paths.GOLDEN / "records")
            for file in folder.rglob("*.jsonl")
            for line in file.read_text().splitlines()
            if '"attacks"' in line
        ]
        self.assertNotEmpty(lines)
        for line in lines:
            values = json.loads(line)
            record = AccuracyRecord.from_json(values)
            self.assertEqual(record.to_json(), values)
            self.assertEmpty(record.others)

    def test_mistakes(self):
        with self.assertRaisesRegex(ValueError, "a record has no name; pass only model, weights"):
            self.result.record(name="mine")
        folder = Path(self.create_tempdir())
        with self.assertRaisesRegex(ValueError, "out.json must be a .jsonl file, such"):
            self.result.save(folder / "out.json")
        self.assertEmpty(list(folder.iterdir()))
