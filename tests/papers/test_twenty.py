"""The tables of the study of twenty architectures next to records: which measure which value."""

import contextlib
import io
import json
from pathlib import Path

from absl.testing import parameterized

from configs import cifar_aligned
from jaxrobust import models
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.data.transforms import corruptions
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers.commands import reproduce
from jaxrobust.papers.tables import matching, tables, tables_markdown
from jaxrobust.results import run_records
from jaxrobust.weights.store import hashes

LINF = 8 / 255
AUTOATTACK = [
    {"name": name, "steps": steps, "restarts": 1, "targets": targets, "norm": "linf"}
    for name, steps, targets in (
        ("apgd-ce", 100, 0),
        ("apgd-t", 100, 9),
        ("fab-t", 100, 9),
        ("square", 5000, 0),
    )
]
AUTOATTACK = [attack | {"epsilon": LINF} for attack in AUTOATTACK]


def pgd(norm: str, **changes) -> dict:
    """The study's PGD, as a record has it."""
    epsilon = {"linf": LINF, "l2": 1.5, "l1": 40.0}[norm]
    rule = {"start": "random", "l1_rule": "art"} if norm == "l1" else {"start": "uniform-boxed"}
    own = {"name": "pgd", "norm": norm, "epsilon": epsilon, "steps": 20}
    return own | {"step_size": 1.5 * epsilon / 20} | rule | changes


WORST = [pgd("linf"), *AUTOATTACK, pgd("l2"), pgd("l1")]


def config(**changes) -> dict:
    """ResNet of the study, by adversarial training."""
    made = cifar_aligned.get_config("cifar_resnet50")
    made.model.name, made.model.options = "resnet50", {"small_stem": True}  # the same
    plain = json.loads(made.to_json())
    for key, value in changes.items():
        *sections, name = key.split("__")
        part = plain
        for section in sections:
            part = part[section]
        part[name] = value
    return plain


def ours(plain: dict | None = None, **changes) -> run_records.RunRecord:
    plain = plain or config()
    model = plain["model"]
    keys = ("name", "options", "num_classes", "image_size")
    own = {
        "config_sha256": hashes.config_sha256(plain),
        "weights": "train, step 45, ema",
        "weights_sha256": "ab" * 32,
        "commit": "c" * 40,
        "dataset": "cifar10",
        "split": "test",
        "image_ids": "0..9999",
        "attacks": WORST,
        "clean": 0.8012,
        "robust": 0.1534,
        "method": "union",
        "flags": {},
        "device": "1 x cpu",
        "model": {key: model[key] for key in keys} | {"in_channels": 3},
    }
    return run_records.RunRecord(
        AccuracyRecord.from_json(own | changes), Path("run/results.jsonl"), plain
    )


def row(table: str = "1", objective: str = "adversarial", name: str = "ResNet", **wanted):
    (found,) = tables.tables("twenty_architectures", table)
    rows = [r for r in found.rows if (r["name"], r["objective"]) == (name, objective)]
    return found, next(r for r in rows if all(r[k] == v for k, v in wanted.items()))


def corrupted(images: str = "files", kinds: int = 15) -> dict:
    names = list(corruptions.KINDS)[:kinds]
    accuracy = {name: {str(s): 0.7 for s in corruptions.SEVERITIES} for name in names}
    return {"images": images, "accuracy": accuracy, "mean": 0.7}


class RowsTest(parameterized.TestCase):
    def test_every_row_has_a_network(self):
        rows = [r for table in tables.tables("twenty_architectures") for r in table.rows]
        self.assertLen(rows, 148)
        self.assertLen({r["model"] for r in rows if r["image_size"] == 32}, 20)
        self.assertLen({r["model"] for r in rows if r["image_size"] == 224}, 20)
        for found in rows:
            if "cifar_vit" in models.available():  # else not all of them are there yet
                models.computed(found["model"], found["options"])  # refuses what is not there

    def test_options(self):
        for table, name, model, options in (
            ("2", "CoAtNet-CTTC", "cifar_coatnet", {"order": "CTTC"}),
            ("3", "PVTv2", "cifar_pvt_v2", {"patch": 4}),
            ("1", "ResNet", "cifar_resnet50", {}),
        ):
            with self.subTest(row=(table, name, model, options)):
                _, found = row(table, name=name)
                self.assertEqual((found["model"], found["options"]), (model, options))
                _, large = row("4", name="ResNet", image_size=224)
                self.assertEqual((large["model"], large["options"]), ("resnet50", {}))


class MatchingTest(parameterized.TestCase):
    def said(self, key, record, **wanted):
        table, found = row(**wanted)
        return matching.differences(table, found, key, record)

    def test_the_same_in_everything(self):
        for key, attacks, method in (
            ("worst_case", WORST, "union"),
            ("pgd_linf_8_255", [pgd("linf")], "pgd-20"),
            ("pgd_l2_1p5", [pgd("l2")], "pgd-20"),
            ("pgd_l1_40", [pgd("l1")], "pgd-20"),
            ("linf_8_255", AUTOATTACK, "autoattack standard"),
            ("clean", [], "clean"),
        ):
            with self.subTest(row=(key, attacks, method)):
                table, _ = row()
                record = ours(attacks=attacks, method=method)
                self.assertEqual(self.said(key, record), [])
                renamed = config(model__name="cifar_resnet50", model__options={})
                again = ours(renamed, attacks=attacks, method=method)
                self.assertEqual(self.said(key, again), [])  # the same under its other name
                for other in table.attacked():
                    if other not in (key, "clean"):
                        self.assertNotEmpty(self.said(other, record), other)

    def test_another_pgd(self):
        for key, attack in (
            ("pgd_linf_8_255", pgd("linf", steps=10)),
            ("pgd_linf_8_255", pgd("linf", step_size=LINF / 10)),
            ("pgd_linf_8_255", pgd("linf", start="random")),
            ("pgd_l1_40", pgd("l1", l1_rule="sparse")),
        ):
            with self.subTest(row=(key, attack)):
                (said,) = self.said(key, ours(attacks=[attack], method="pgd-20"))
                self.assertIn("a different attack than PGD, 20 steps", said)

    def test_another_worst_case(self):
        without = [attack for attack in WORST if attack["name"] != "square"]
        (said,) = self.said("worst_case", ours(attacks=without))
        self.assertEqual(said, "a different attack than standard AutoAttack")
        (said,) = self.said("worst_case", ours(attacks=WORST[:-1]))
        self.assertIn("a different PGD than the study's", said)
        (said,) = self.said("worst_case", ours(attacks=AUTOATTACK, method="autoattack standard"))
        self.assertIn("not the worst case", said)

    def test_another_network_or_training(self):
        for changes, said in (
            ({"model__options": {}}, "network resnet50 without options, not cifar_res"),
            ({"model__name": "wide_resnet50_2"}, "network wide_resnet50_2 with small_stem=True, n"),
            ({"model__name": "cifar_vgg16", "model__options": {}}, "network cifar_vgg16 without o"),
            ({"train__epochs": 3}, "epochs 3, not 100"),
            ({"train__batch_size": 64}, "batch_size 64, not 128"),
            ({"attack__start": "random"}, "attack.start random, not uniform-boxed"),
            (
                {"data__augmentation": "autoaugment"},
                "data.augmentation autoaugment(128)|crop|flip, not autoaugment-robustart|crop|flip",
            ),
            ({"attack__steps": 10}, "attack.steps 10, not 15"),
            ({"attack__epsilon": 4 / 255}, "attack.epsilon 0.01569, not 0.03137"),
        ):
            with self.subTest(row=(changes, said)):
                (found,) = self.said("worst_case", ours(config(**changes)))
                self.assertStartsWith(found, said)

    def test_corruptions(self):
        given = {"attacks": [], "robust": None, "method": "corruptions", "clean": None}
        given |= {"dataset": "cifar10-c:there", "split": "gaussian_noise-1"}
        wanted = {"table": "4", "dataset": "cifar10"}
        record = ours(**given, corruptions=corrupted())
        self.assertEqual(self.said("corruptions", record, **wanted), [])
        (table, _) = row(**wanted)
        self.assertEqual(matching.measured(table.results["corruptions"], record.record), 70)
        self.assertIsNone(matching.measured(table.results["clean"], record.record))
        few = ours(**given, corruptions=corrupted(kinds=14))
        self.assertEqual(self.said("corruptions", few, **wanted), ["70 corruptions, not 75"])
        here = ours(attacks=[], robust=None, corruptions=corrupted("computed"))
        (said,) = self.said("corruptions", here, **wanted)
        self.assertIn("computed corruptions, not the files", said)
        self.assertEqual(self.said("corruptions", ours(), **wanted), ["no corruptions"])


class TableTest(parameterized.TestCase):
    def call(self, *words) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            reproduce.main([*map(str, words), "--paper", "twenty_architectures", "--table", "1"])
        return out.getvalue()

    def folder(self, *found: run_records.RunRecord) -> Path:
        place = Path(self.create_tempdir())
        (place / "config.json").write_text(json.dumps({"version": 1} | (found[0].config or {})))
        lines = "".join(json.dumps(each.record.to_json()) + "\n" for each in found)
        (place / "results.jsonl").write_text(lines)
        return place

    def test_alike_is_in_italics(self):
        place = self.folder(ours(config(train__epochs=3), image_ids="0..999", split="test[:1000]"))
        strict = self.call(place)
        self.assertNotIn("[1]", strict)
        self.assertIn("**In no cell above**: nearest is table_1, ResNet, but", strict)
        alike = self.call(place, "--alike")
        (line,) = [text for text in alike.splitlines() if "*15.34* [1]" in text]
        self.assertStartsWith(line, "| ResNet |")
        self.assertIn("| 87.92 | *80.12* [1] |", line)
        self.assertIn("| 14.32 | *15.34* [1] |", line)
        self.assertEqual(line.count("[1]"), 2)  # no other attack
        self.assertIn("**Only in cells in italics**: nearest is table_1, ResNet, but", alike)
        self.assertIn("epochs 3, not 100", alike)

    def test_alike_is_never_of_another_objective(self):
        place = self.folder(ours(config(train__objective="trades")))
        self.assertNotIn("* [1]", self.call(place, "--alike"))

    def test_what_is_the_same_comes_first(self):
        """Here of a published network, whose training nobody has to prove."""
        about = {"architecture": "convnext_t_cvst", "image_size": 224}
        about["published_id"] = "Singh2023Revisiting_ConvNeXt-T-ConvStem"
        (table,) = tables.tables("revisiting_at", "2")
        (place,) = (n for n, r in enumerate(table.rows) if r["clean"] == 72.72)
        whole = {"dataset": "imagenet2012", "split": "validation@robustbench"}
        whole |= {"ids_sha256": ROBUSTBENCH_SHA256, "image_ids": "0..4999", "model": None}
        whole |= {"clean": 0.7}
        changes = whole, whole | {"clean": 0.6, "image_ids": "0..99"}
        found = [ours(**each)._replace(config=about) for each in changes]
        for records, cell in ((found, (70.0, 0, False)), (found[1:], (60.0, 0, True))):
            filled = tables_markdown.filled(table, records, alike=True)
            self.assertEqual(filled.cells[place, "clean"], tables_markdown.Cell(*cell))
