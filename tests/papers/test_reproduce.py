"""The papers' tables next to records: what fits a cell, and what is in the way of it."""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from configs import revisiting_at
from jaxrobust.config import base, plain
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models import published
from jaxrobust.papers.commands import reproduce
from jaxrobust.papers.tables import matching, tables
from jaxrobust.results import run_records
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import runs, start_run
from tests.support import paths
from tools.generate import readme_table, refresh_configs

PLOT = importlib.util.find_spec("matplotlib") is not None
_STANDARD = [
    {"name": name, "steps": steps, "restarts": 1, "targets": targets, "norm": "linf"}
    for name, steps, targets in (
        ("apgd-ce", 100, 0),
        ("apgd-t", 100, 9),
        ("fab-t", 100, 9),
        ("square", 5000, 0),
    )
]


def config(**changes) -> dict:
    """The first row of Table 1 of "Revisiting AT": ConvNeXt-T, random start, basic, 50 epochs."""
    made = base()
    made.model.name = "convnext_t"
    made.train.batch_size = 1408
    plain = json.loads(made.to_json())
    for key, value in changes.items():
        *sections, name = key.split("__")
        part = plain
        for section in sections:
            part = part[section]
        part[name] = value
    return plain


def record(plain: dict, **changes) -> dict:
    """An evaluation of it, invented, as `jaxrobust.evaluate` writes them."""
    own = {
        "config_sha256": hashes.config_sha256(plain),
        "weights": "train, step 45, ema",
        "weights_sha256": "ab" * 32,
        "commit": "c" * 40,
        "dataset": "imagenet2012",
        "split": "validation@robustbench",
        "ids_sha256": ROBUSTBENCH_SHA256,
        "image_ids": "0..4999",
        "attacks": [a | {"epsilon": 4 / 255} for a in _STANDARD],
        "clean": 0.6512,
        "robust": 0.3812,
        "flags": {},
        "device": "1 x cpu",
        "method": "autoattack standard",
    }
    sizes = {"num_classes": 1000, "image_size": 224, "in_channels": 3}
    own["model"] = {"name": "convnext_t", "options": {}} | sizes
    return copy.deepcopy(own) | changes


def ours(plain: dict | None = None, **changes) -> run_records.RunRecord:
    plain = plain or config()
    named = start_run.named(plain.get("init", {}).get("weights"))
    return run_records.RunRecord(
        AccuracyRecord.from_json(record(plain, **changes)),
        Path("run/results.jsonl"),
        plain,
        json.loads(_start_of(named)) if named else None,
    )


@functools.cache
def _start_of(named: str) -> str:
    return json.dumps(plain(refresh_configs.load(named)))


def call(*words) -> tuple[int, str, str]:
    out, said, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            reproduce.main([str(word) for word in words])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), said.getvalue()


def first_row():
    (table,) = tables.tables("revisiting_at", "1")
    return table, table.rows[0]


class TablesTest(parameterized.TestCase):
    def test_all_are_there(self):
        for name, count, rows in (
            ("revisiting_at", 21, 171),
            ("xcit_light_recipe", 15, 86),
            ("twenty_architectures", 4, 148),
            ("robust_resnets", 6, 52),
        ):
            with self.subTest(row=(name, count, rows)):
                found = tables.tables(name)
                self.assertLen(found, count)
                self.assertEqual(sum(len(table.rows) for table in found), rows)

    def test_robust_accuracy_is_not_above_clean(self):
        for name in tables.PAPERS:
            with self.subTest(name=name):
                for table in tables.tables(name):
                    for row in table.rows:
                        values = [
                            row.get(k)
                            for k, w in table.attacked().items()
                            if w["attack"] != "clean"
                        ]
                        if row.get("clean") is not None and table.kind == "accuracy":
                            self.assertFalse([v for v in values if v and v > row["clean"]], row)

    def test_published_networks_have_what_robustbench_lists(self):
        seen = 0
        for table in (*tables.tables("revisiting_at"), *tables.tables("xcit_light_recipe")):
            for row in table.rows:
                if (key := row.get("robustbench")) and row.get("linf_4_255"):
                    listed = published.PUBLISHED[key]
                    if "clean" in row.get("uncertain", ()):  # other preprocessing: 18 images
                        self.assertAlmostEqual(row["clean"], listed.clean, delta=0.361)
                        self.assertAlmostEqual(row["linf_4_255"], listed.autoattack, delta=0.021)
                        continue
                    self.assertEqual(
                        (row["model"], row["clean"], row["linf_4_255"]),
                        (listed.model, listed.clean, listed.autoattack),
                    )
                    seen += 1
        self.assertEqual(seen, 14)


class MatchingTest(parameterized.TestCase):
    def test_the_same_in_everything(self):
        table, row = first_row()
        for key in ("clean", "linf_4_255"):
            self.assertEqual(matching.differences(table, row, key, ours()), [])
        (wrong,) = matching.differences(table, row, "l2_2", ours())
        self.assertEqual(wrong, "linf, not l2")

    def test_another_training(self):
        for changes, said in (
            ({"train__epochs": 49}, "epochs 49, not 50"),
            ({"attack__steps": 3}, "attack.steps 3, not 2"),
            ({"attack__name": "pgd"}, "attack.name pgd, not apgd"),
            ({"attack__epsilon": 8 / 255}, "attack.epsilon 0.03137, not 0.01569"),
            ({"attack__norm": "l2"}, "attack.norm l2, not linf"),
            (
                {"data__augmentation": "light"},
                "data.augmentation resized-crop|flip|jitter(0.4), not resized-crop",
            ),
            ({"mixup__mixup": 0.8}, "mixup.mixup 0.8, not 0"),
            ({"erase__probability": 0.25}, "erase.probability 0.25, not 0"),
            ({"label_smoothing": 0.1}, "label_smoothing 0.1, not 0"),
            ({"data__views": 3}, "data.views 3, not 1"),
            ({"data__extra": "npz:more.npz"}, "data.extra_share 0.5, not 0"),
            ({"attack__start": "random"}, "attack.start random, not image"),
            (
                {"model__options": {"drop_path": 0.1}},
                "model.options {'drop_path': 0.1}, not {}",
            ),
            ({"init__stem": "fresh"}, "stem fresh, not keep"),
            ({"train__changes": {"attack": {"steps": 1}}}, "attack.steps 1, not 2"),
            ({"data__classes": "imagenet100"}, "data.classes imagenet100, not None"),
            ({"model__image_size": 192}, "model.image_size 192, not 224"),
            ({"train__lr": 0.01}, "lr 0.01, not 0.001"),
            ({"train__objective": "trades"}, "objective trades, not adversarial"),
            ({"init__weights": "my.safetensors"}, "init.weights my.safetensors, not None"),
            (
                {"init__weights": "convnext_tiny.fb_in1k"},
                "init.weights convnext_tiny.fb_in1k, not None",
            ),
            ({"pretrain__epochs": 100}, "2 phases of training, not 1"),
            (
                {"model__name": "convnext_s"},
                "network convnext_s without options, not convnext_t without options",
            ),
        ):
            with self.subTest(row=(changes, said)):
                table, row = first_row()
                plain = config(**changes)
                self.assertEqual(
                    matching.differences(table, row, "linf_4_255", ours(plain)), [said]
                )

    def test_another_evaluation(self):
        for changes, said in (
            ({"image_ids": "0..511"}, "images 0..511, not all 5000"),
            ({"split": "validation", "ids_sha256": None}, "split validation, not RobustBench's li"),
            ({"dataset": "cifar10", "ids_sha256": None}, "cifar10, not imagenet2012"),
            ({"damaged": ["a"]}, "1 damaged images are left out"),
            ({"weights": "pretrain, step 3, ema"}, "weights from the phase pretrain, not from the"),
            ({"attacks": [], "robust": None}, "clean accuracy only"),
            ({"attacks": [a | {"epsilon": 8 / 255} for a in _STANDARD]}, "linf 0.03137, not 4/255"),
            (
                {"attacks": [_STANDARD[0] | {"epsilon": 4 / 255}]},
                "a different attack than standard Au",
            ),
            (
                {"attacks": [a | {"epsilon": 4 / 255, "steps": 20} for a in _STANDARD]},
                "a different attack than standard AutoAttack",
            ),
        ):
            with self.subTest(row=(changes, said)):
                table, row = first_row()
                found = matching.differences(table, row, "linf_4_255", ours(**changes))
                self.assertStartsWith(found[0], said)

    def test_what_nobody_proves(self):
        table, row = first_row()
        unknown = ours()._replace(config=None)
        (said,) = matching.differences(table, row, "clean", unknown)
        self.assertIn("no config next to the record", said)

    def test_a_table_that_does_not_say_how_it_attacked(self):
        (table,) = tables.tables("xcit_light_recipe", "text_2")
        found = matching.differences(table, table.rows[0], "pgd10_linf_4_255", ours())
        self.assertIn("the paper does not state the settings of its pgd-10", found)

    def test_every_line_of_the_main_paper(self):
        """Each line that the family's docstring gives figures of is the row with these figures."""
        lines = re.findall(
            r"^    ((?:convnext|iso|vit)_\S+)(.*)", revisiting_at.__doc__ or "", re.MULTILINE
        )
        self.assertLen(lines, 45)
        for line, figures in lines:
            run = ours(plain(revisiting_at.get_config(line)))
            found = [
                [table.value(row, key).strip("?") for key in table.attacked()]
                for table in tables.tables("revisiting_at")
                for row in table.rows
                if row.get("model") == run.config["model"]["name"]
                and table.attacked()
                and not matching.differences(table, row, next(iter(table.results)), run)
            ]
            with self.subTest(line):
                self.assertIn(re.findall(r"\d+\.\d+", figures), found)

    def test_published_weights(self):
        about = {"architecture": "convnext_t_cvst", "image_size": 224}
        about["published_id"] = "Singh2023Revisiting_ConvNeXt-T-ConvStem"
        (table,) = tables.tables("revisiting_at", "2")
        found = [matching.differences(table, row, "clean", ours(about)) for row in table.rows]
        self.assertEqual([table.rows[i]["clean"] for i, s in enumerate(found) if not s], [72.72])


class CommandTest(parameterized.TestCase):
    def run_of(self, **changes) -> Path:
        folder = Path(self.create_tempdir()) / "run"
        folder.mkdir()
        plain = config()
        (folder / "config.json").write_text(json.dumps({"version": 1} | plain))
        (folder / "results.jsonl").write_text(json.dumps(record(plain, **changes)) + "\n")
        return folder

    def test_without_records(self):
        code, out, _ = call("--paper", "robust_resnets", "--table", "2")
        self.assertEqual(code, 0)
        self.assertIn("not measured", out)
        self.assertNotIn("## Records", out)
        rows = [line for line in out.splitlines() if line.startswith("| WRN-28-10 ")]
        self.assertIn("| 51.66 | not measured |", rows[0])

    def test_a_record_in_its_cells_alone(self):
        code, out, _ = call(self.run_of(), "--paper", "revisiting_at", "--table", "1")
        self.assertEqual(code, 0)
        self.assertIn("| 64.0 | **65.1** [1] | 37.1 | **38.1** [1] | 28.9 | not measured |", out)
        self.assertEqual(out.count("[1]"), 2)
        self.assertIn("weights sha256 abababababab, commit cccccccc; run/results.jsonl.", out)

    def test_a_config_that_was_edited_by_hand_proves_nothing(self):
        folder = self.run_of()
        path = folder / "config.json"
        edited = json.loads(path.read_text())
        edited["train"]["epochs"] += 1
        path.write_text(json.dumps(edited))
        code, out, _ = call(folder, "--paper", "revisiting_at", "--table", "1")
        self.assertEqual(code, 0)
        self.assertNotIn("[1]", out)
        self.assertIn("run/config.json is not the config that the record was made with, whose", out)

    def test_one_row(self):
        words = ("--paper", "revisiting_at", "--table", "1", "--commands", "--row")
        code, out, _ = call(*words, "2")
        self.assertEqual((code, out.count("- Row ")), (0, 1))
        self.assertIn("- Row 2: ", out)

    def test_commands_as_a_file(self):
        out = Path(self.create_tempdir()) / "new"
        words = ("--paper", "robust_resnets", "--table", "2", "--commands")
        for _ in range(2):  # into a new folder, and into one that is there
            code, said, _ = call(*words, "--out", out)
            self.assertEqual((code, said), (0, f"{out / 'robust_resnets-commands.md'}\n"))
        self.assertEqual((out / "robust_resnets-commands.md").read_text(), call(*words)[1])

    def test_rows_and_tables_that_are_none(self):
        for words, said in (
            (("--table", "1", "--row", "99"), "no such row; give a name, or a number from 1 to "),
            (
                ("--table", "1", "--row", "ConvNeXt-T + CvS"),
                "no such row; did you mean ConvNeXt-T + C",
            ),
            (
                ("--table", "1", "--row", "ConvNeXt-T"),
                "rows have that name; give a number instead, one of",
            ),
            (("--row", "1"), "--row needs --table and --commands; give both"),
            (("--table", "tabel_2"), "no such table; did you mean table_2?"),
        ):
            with self.subTest(row=(words, said)):
                code, _, error = call("--paper", "revisiting_at", "--commands", *words)
                self.assertEqual(code, 2)
                self.assertIn(said, " ".join(error.split()))

    def test_a_record_of_other_images_is_beside(self):
        folder = self.run_of(image_ids="0..99", flags={"zero-gradient": "of 5 images"})
        _, out, _ = call(folder, "--paper", "revisiting_at", "--table", "1")
        self.assertNotIn("[1]", out)
        self.assertIn("**In no cell above**: nearest is table_1, ConvNeXt-T, but images 0..99", out)
        self.assertIn("Doubt about it, zero-gradient: of 5 images.", out)

    @absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
    @pytest.mark.slow
    def test_pictures(self):
        out = Path(self.create_tempdir()) / "new"
        code, said, _ = call("--paper", "robust_resnets", "--table", "2", "--out", out)
        self.assertEqual(code, 0)
        names = {p.name for p in out.iterdir()}
        pictures = {f"robust_resnets-table_2-{data}.png" for data in ("cifar10", "cifar100")}
        self.assertEqual(names, {"robust_resnets.md", *pictures})
        self.assertEqual({Path(line).name for line in said.split()}, names)
        text = (out / "robust_resnets.md").read_text()
        self.assertEqual(set(re.findall(r"\]\((.*?)\)", text)), pictures)

    def test_mistakes(self):
        for words, said in (
            (["--paper", "other"], "--paper other is unknown; one of revisiting_at"),
            (["--table", "2"], "--table needs --paper"),
            (["--paper", "robust_resnets", "--table", "9"], "no such table; one of table_1"),
            (["nowhere"], "nowhere has no records; name a run"),
        ):
            with self.subTest(row=(words, said)):
                code, out, error = call(*words)
                self.assertEqual((code, out), (2, ""))
                self.assertIn(said, error)
                self.assertEqual(error.count("\n"), 1)

    def test_rows_of_what_is_no_run(self):
        for place, said in (
            ("nowhere", "nowhere has no results.jsonl"),
            ("nowhere.py", "no such file"),
        ):
            with self.subTest(row=(place, said)):
                with (
                    contextlib.redirect_stderr(io.StringIO()) as error,
                    self.assertRaises(SystemExit) as end,
                ):
                    readme_table.main([place])
                self.assertEqual(end.exception.code, 2)
                self.assertIn(said, error.getvalue())

    def test_lines_that_are_no_records(self):
        file = Path(self.create_tempdir()) / "metrics.jsonl"
        file.write_text('{"step": 3}\n')
        code, _, error = call(file)
        self.assertEqual(code, 2)
        self.assertIn("not records of jaxrobust evaluate", error)


class ReadmeTest(absltest.TestCase):
    def test_figures_come_from_kept_records(self):
        """README's row of quickstart and the page's row of seed 1 are those of their records."""
        pages = ("README.md", "docs/results/training_recipes.md")
        page = "".join((paths.ROOT / name).read_text() for name in pages)
        kept = readme_table.kept()
        self.assertLen(kept, 2)
        for line in readme_table.rows(kept).splitlines()[2:]:
            figures = re.findall(r"[\d.]+% clean, [\d.]+% robust", line)
            self.assertLen(figures, 2)
            self.assertRegex(page, rf"\| {figures[0]} \| {figures[1]} \|")

    def test_commands(self):
        config = runs.run_config(readme_table.KEPT / "quickstart-seed1")
        self.assertEqual(
            readme_table.command(config), "`--config configs/quickstart.py --config.seed=1`"
        )

    def test_what_nobody_has_run(self):
        folder = Path(self.create_tempdir())
        (folder / "mine.py").write_text(
            "from jaxrobust.config import base\n"
            "def get_config():\n    config = base()\n    config.model.name = 'convnext_t'\n"
            "    config.train.batch_size = 1408\n"
            "    return config\n"
        )
        headline = readme_table.rows([paths.ROOT / "configs" / "convnext_t_cvst.py"])
        self.assertIn("**in the paper** (Table 1): 69.1% clean, 47.5% under AutoAttack", headline)
        rows = readme_table.rows(
            [folder / "mine.py", Path("configs/revisiting_at.py:vit_s,epochs=50")]
        )
        self.assertIn("**in the paper** (Table 1): 64.0% clean, 37.1% under AutoAttack", rows)
