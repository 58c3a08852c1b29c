"""Every row of every table has a line whose record fills it, or a sentence why there is none."""

import contextlib
import dataclasses
import functools
import io
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.attacks import fixed_steps, registry
from jaxrobust.commands.flags.evaluation import EvaluateFlags
from jaxrobust.config import Values, phases, plain
from jaxrobust.data import imagenet
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.data.transforms import corruptions
from jaxrobust.doctor.config_checks import CONFIG_CHECKS, PlannedRun
from jaxrobust.doctor.findings import RED, examined
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import PUBLISHED
from jaxrobust.papers.commands import reproduce
from jaxrobust.papers.tables import documents, lines, matching, tables
from jaxrobust.papers.tables.tables_markdown import Filled
from jaxrobust.results import run_records
from jaxrobust.results.run_records import whole_config
from jaxrobust.runtime.commandline.arguments import config_name
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import start_run
from tools.generate import refresh_configs

STANDARD = (("apgd-ce", 100, 0), ("apgd-t", 100, 9), ("fab-t", 100, 9), ("square", 5000, 0))
SEARCHED = ("robnet_large_v2", "advrush_7_96", "racl_7_104")
CLASSES = {"imagenet100": imagenet.imagenet100(), "imagenette": imagenet.IMAGENETTE}


def attacks(what: dict) -> list[dict]:
    """The attacks of a result, as `jaxrobust evaluate` records them."""
    if "members" in what:
        return [attack for member in what["members"] for attack in attacks(member)]
    if what["attack"] in ("clean", "corruptions"):
        return []
    ball = {"norm": what["norm"], "epsilon": float(Fraction(what["epsilon"]))}
    if what["attack"] == "autoattack":
        rows = ({"name": n, "steps": s, "restarts": 1, "targets": t} for n, s, t in STANDARD)
        return [row | ball for row in rows]
    if "name" not in what:  # APGD-CE
        settings = {key: what[key] for key in ("steps", "restarts")}
        return [{"name": what["attack"], "targets": 0} | settings | ball]
    keys = ("name", "steps", "start", "l1_rule")
    length = what.get("step_size") or what["relative_step"] * ball["epsilon"] / what["steps"]
    return [{k: what[k] for k in keys if k in what} | ball | {"step_size": length}]


@functools.cache
def text_of(config: str) -> str:
    return json.dumps(plain(refresh_configs.load(config)))


def config_of(run: lines.Run) -> dict:
    """The config of a run as it writes it."""
    made = json.loads(text_of(run.config))
    for key, value in run.changes:
        *sections, name = key.split(".")
        functools.reduce(lambda part, each: part[each], sections, made)[name] = value
    return made


def images_of(row: dict, what: dict, trained: dict | None) -> dict:
    """What a record says of the images of a row."""
    classes = CLASSES.get(row["dataset"])
    split = row["split"]
    known = {"image_ids": f"0..{row['images'] - 1}", "split": split, "dataset": row["dataset"]}
    if trained:
        known["dataset"] = trained["data"]["name"]
    known["ids_sha256"] = ROBUSTBENCH_SHA256 if str(split).endswith("@robustbench") else None
    known["classes_sha256"] = hashes.classes_sha256(classes) if classes else None
    if what["attack"] == "corruptions":
        rates = {kind: dict.fromkeys("12345", 0.5) for kind in corruptions.KINDS}
        files = row["dataset"] == "cifar10"
        known["corruptions"] = {"images": "files" if files else "computed"}
        known["corruptions"] |= {"accuracy": rates, "mean": 0.5}
        known |= {"clean": None, "dataset": "cifar10-c:CIFAR-10-C"} if files else {}
    return known


def record_of(line: lines.RowLine, row: dict, what: dict, *, of_run: bool) -> run_records.RunRecord:
    """An evaluation of a line, invented: all but its accuracies is as a real one has it."""
    config = config_of(line.run) if of_run else None
    model = (config or {}).get("model", {})
    about = {"architecture": row["model"], "image_size": 224, "published_id": line.published}
    about |= {"source": line.published}
    own = {
        "clean": 0.6,
        "robust": 0.4 if attacks(what) else None,
        "attacks": attacks(what),
        "flags": {},
        "method": what["attack"],
        "model": {key: model.get(key) for key in ("name", "options", "num_classes")},
    }
    own["model"] |= {"image_size": row["image_size"], "in_channels": 3}
    own["weights"] = f"{phases(whole_config(config))[-1]}, step 45, ema" if config else None
    own |= images_of(row, what, config)
    before = config_of(line.start) if of_run and line.start else None
    record = AccuracyRecord.from_json(own)
    return run_records.RunRecord(record, Path("run/results.jsonl"), config or about, before)


class RowsTest(parameterized.TestCase):
    @parameterized.parameters(*tables.PAPERS)
    def test_every_row_has_a_line_or_a_sentence(self, paper):
        for table, row, line in lines.of_tables(paper):
            with self.subTest(f"{table.id}, {row['name']}"):
                self.assertTrue(line.texts() or line.why)
                self.assertNotRegex(line.why + str(line.texts()), r"[{}]|None")
                self.assertRegex(line.why, r"^$|\.$")

    def test_what_a_row_starts_from(self):
        for paper, wanted, starts in (
            # Fine-tuned to a larger radius, or to other data from networks of the larger radius.
            ("revisiting_at", "table_4", {"revisiting_at:{model}", None}),
            ("revisiting_at", "table_6", {"larger_radius:{model}"}),
            ("xcit_light_recipe", "table_7", {"light_recipe:{model},epsilon=8", None}),
            ("xcit_light_recipe", "table_8", {"light_recipe:{model},epsilon=8", None}),
        ):
            with self.subTest(row=(paper, wanted, starts)):
                found = set()
                for table, row, line in lines.of_tables(paper):
                    if table.id == wanted and line.run:
                        start = line.start.config if line.start else None
                        found.add(start and start.replace(f":{row['model']}", ":{model}"))
                self.assertEqual(found, starts)

    def test_counts(self):
        """Of 457 rows 383 are a network that can be had, 42 a command, and 32 a sentence."""
        for paper, networks, commands, sentences in (
            ("revisiting_at", 128, 23, 20),
            ("xcit_light_recipe", 66, 11, 9),
            ("twenty_architectures", 148, 0, 0),
            ("robust_resnets", 41, 8, 3),
        ):
            with self.subTest(row=(paper, networks, commands, sentences)):
                found = Counter(
                    "network"
                    if line.run or line.published
                    else "command"
                    if line.commands
                    else "sentence"
                    for _, _, line in lines.of_tables(paper)
                )
                wanted = {"network": networks, "command": commands, "sentence": sentences}
                self.assertEqual(found, Counter(wanted))

    @parameterized.parameters(*tables.PAPERS)
    def test_a_record_of_a_line_fills_every_cell_of_its_row(self, paper):
        for table, row, line in lines.of_tables(paper):
            for of_run in [True] * bool(line.run) + [False] * bool(line.published):
                for key, what in table.attacked().items():
                    if row.get(key) is None:
                        continue
                    ours = record_of(line, row, what, of_run=of_run)
                    with self.subTest(f"{table.id}, {row['name']}, {key}, {line.run}"):
                        self.assertEqual(matching.differences(table, row, key, ours), [])
                        self.assertIsNotNone(matching.measured(what, ours.record))

    def test_what_robustbench_lists_is_imported(self):
        """Each row with both accuracies of a network of RobustBench has its import."""
        listed = {
            (n.board.data, n.board.norm, str(n.board.epsilon), n.clean, n.autoattack): key
            for key, n in PUBLISHED.items()
        }
        found = []
        for paper in tables.PAPERS:
            for table, row, line in lines.of_tables(paper):
                for key, what in table.attacked().items():
                    if what["attack"] != "autoattack" or row.get(key) is None:
                        continue
                    ball = (what["norm"], str(float(Fraction(what["epsilon"]))))
                    place = (row["dataset"], *ball, row.get("clean"), row[key])
                    if (wanted := listed.get(place)) and row["model"] == PUBLISHED[wanted].model:
                        found.append((wanted, line.published))
                        text = f"jaxrobust import {wanted} --out weights/{wanted}"
                        self.assertIn(text, line.texts(), f"{table.id}, {row['name']}")
        self.assertGreater(len(found), 15)

    def test_the_commands_of_published_weights(self):
        (table,) = tables.tables("revisiting_at", "6")
        wanted = ("xcit_l12_p4", "cifar100")
        (row,) = (r for r in table.rows if (r["model"], r["dataset"]) == wanted)
        key = "cifar100/Linf/Debenedetti2022Light_XCiT-L12"
        self.assertEqual(
            lines.of_row(row).texts(),
            [
                f"jaxrobust import {key} --out weights/{key}",
                f"jaxrobust evaluate --weights weights/{key} --dataset cifar100 "
                "--threat linf:8/255",
            ],
        )
        (table,) = tables.tables("revisiting_at", "4")
        name = "resnet50_linf_eps8.0"
        self.assertEqual(
            lines.of_row(table.rows[0]).texts(),
            [
                f"jaxrobust import hf://madrylab/robust-imagenet-models/{name}.ckpt "
                f"--model resnet50 --out weights/{name}",
                f"jaxrobust evaluate --weights weights/{name} --dataset imagenet2012 "
                "--threat linf:8/255",
            ],
        )

    def test_rows_of_a_table_that_have_one_line_print_the_same(self):
        for paper in tables.PAPERS:
            for table in tables.tables(paper):
                printed: dict = {}
                for row in table.rows:
                    line = lines.of_row(row)
                    place = [row.get(key) for key in tables.PLACES]
                    for key in table.attacked():
                        if (line.run or line.published) and row.get(key) is not None:
                            values = printed.setdefault((line, str(place), key), set())
                            values.add(row[key])
                self.assertEqual({len(values) for values in printed.values()} - {1}, set())

    def test_flags_are_those_of_evaluate(self):
        known = {field.name for field in dataclasses.fields(EvaluateFlags)}
        every = [line for p in tables.PAPERS for *_, line in lines.of_tables(p)]
        texts = {text for line in every for text in line.flags}
        texts |= {
            f"--attack {table.curve['attack']} --image_size {size}"
            for paper in tables.PAPERS
            for table in tables.tables(paper)
            for size in (table.curve or {"sizes": ()})["sizes"]
        }
        self.assertGreater(len(texts), 15)
        for text in texts:
            words = [word.removeprefix("--") for word in text.split() if word.startswith("--")]
            self.assertContainsSubset(words, known, text)
            for attack in re.findall(r"--attack (\S+)", text):
                self.assertTrue(
                    attack == "clean" or fixed_steps.parse(attack) or attack in registry.searching()
                )

    def test_runs_are_where_training_puts_them(self):
        runs = {line.run for p in tables.PAPERS for *_, line in lines.of_tables(p) if line.run}
        self.assertGreater(len(runs), 200)
        for run in runs:
            file, _, arguments = run.config.partition(":")
            if not run.changes:
                self.assertEqual(run.workdir, f"runs/{config_name(f'{file}:{arguments}')}")

    def test_runs_start_from_the_runs_before_them(self):
        rows = [line for paper in tables.PAPERS for *_, line in lines.of_tables(paper)]
        self.assertGreater(sum(line.start is not None for line in rows), 40)
        for line in rows:  # and what starts from a run says from which
            start = config_of(line.run)["init"]["weights"] if line.run else None
            named = start_run.named(start)
            self.assertEqual(named, line.start.config if line.start else None, line.run)
            if named:
                folder = start_run.folder(named, Path(line.run.workdir))
                self.assertEqual(str(folder), line.start.workdir)

    def test_the_commands_of_a_row_leave_its_start_to_the_training(self):
        table = next(iter(tables.tables("revisiting_at", "6")))
        text = documents.command_document("revisiting_at", [Filled(table, {})], measured=False)
        self.assertIn(
            "starts from runs/larger_radius-convnext_t_cvst, which is trained first", text
        )
        self.assertNotIn("configs/larger_radius.py", text)

    def test_every_network_has_the_options_that_it_is_given(self):
        """Those of lines, and of the searched networks without the paper's rows."""
        rows = [line.run for paper in tables.PAPERS for *_, line in lines.of_tables(paper)]
        runs = {run for run in rows if run}
        runs |= {lines.Run(f"cifar_aat:{name},activation=relu") for name in SEARCHED}
        for run in runs:
            model = config_of(run)["model"]
            with self.subTest(run.config):
                models.variant(model["name"], **model["options"])  # refuses what is not an option

    def test_what_is_set_beside_a_config_is_not_red(self):
        """Of the configs themselves tests/doctor/test_config_checks.py shows it."""
        rows = [line.run for paper in tables.PAPERS for *_, line in lines.of_tables(paper)]
        changed = [run for run in rows if run and run.changes]
        self.assertLen(changed, 1)
        for run in changed:
            config = json.loads(json.dumps(config_of(run)), object_hook=Values)
            levels = {f.result.level for f in examined(CONFIG_CHECKS, PlannedRun(config, 8))}
            self.assertNotIn(RED, levels)


class StartTest(parameterized.TestCase):
    """A start that another run trained is followed into the config of that run."""

    def setUp(self):
        super().setUp()
        (self.table,) = tables.tables("revisiting_at", "4")
        self.row = self.table.rows[5]
        self.line = lines.of_row(self.row)
        self.what = self.table.results["linf_8_255"]

    def said(self, **changes):
        ours = record_of(self.line, self.row, self.what, of_run=True)._replace(**changes)
        return matching.differences(self.table, self.row, "linf_8_255", ours)

    def test_it_counts_as_what_that_run_is(self):
        self.assertEqual(self.said(), [])
        unknown = self.said(started=None)
        self.assertEqual(
            unknown,
            [
                "init.weights run:revisiting_at:convnext_b_cvst, not convnext_base.fb_in1k",
                "1 phase of training, not 3",
            ],
        )
        longer = config_of(lines.Run("revisiting_at:convnext_b_cvst,epochs=250"))
        self.assertIn("in an earlier phase, epochs 250, not 50", self.said(started=longer))
        clean = config_of(lines.Run("convstem_pretraining:convnext_b_cvst"))
        self.assertIn("2 phases of training, not 3", self.said(started=clean))

    def test_a_stem_that_another_run_trained(self):
        (table,) = tables.tables("revisiting_at", "16")
        row, key = table.rows[5], "clean"
        run = lines.of_row(row).run
        own = {"init.weights": "runs/convstem_pretraining-convnext_t_cvst"}
        line = lines.of_row(row)._replace(run=run._replace(changes=tuple(own.items())))
        ours = record_of(line, row, table.results[key], of_run=True)
        stem = config_of(lines.Run("convstem_pretraining:convnext_t_cvst"))
        found = matching.differences(table, row, key, ours._replace(started=stem))
        self.assertEqual(found, [])
        other = config_of(lines.Run("convstem_pretraining:convnext_b_cvst"))
        found = matching.differences(table, row, key, ours._replace(started=other))
        self.assertEqual(
            found,
            [
                "init.weights convnext_base.fb_in1k, not convnext_tiny.fb_in1k",
                "in an earlier phase, epochs 50, not 100",
                "in an earlier phase, batch_size 768, not 1408",
                "in an earlier phase, model.name convnext_b_cvst, not convnext_t_cvst",
            ],
        )

    def test_imported_weights_count_as_what_they_are(self):
        """As on a pod without a network, where weights are brought in a folder."""
        for about, said in (
            ({"source": "convnext_tiny.fb_in1k"}, []),
            ({"source": "hf://timm/convnext_tiny.fb_in1k"}, []),
            (
                {"source": "convnext_tiny.fb_in1k", "drawn": {"seed": 0}},
                ["init.weights None, not convnext_tiny.fb_in1k"],
            ),
            (
                {"source": "model.safetensors"},
                ["init.weights model.safetensors, not convnext_tiny.fb_in1k"],
            ),
        ):
            with self.subTest(row=(about, said)):
                (table,) = tables.tables("revisiting_at", "1")
                row = table.rows[2]
                line = lines.of_row(row)
                own = line.run._replace(changes=(("init.weights", "weights/convnext_t"),))
                ours = record_of(line._replace(run=own), row, {"attack": "clean"}, of_run=True)
                about = {"architecture": "convnext_t"} | about
                found = matching.differences(table, row, "clean", ours._replace(started=about))
                self.assertEqual(found, said)

    def test_it_is_found_beside_the_run(self):
        ours = record_of(self.line, self.row, self.what, of_run=True)
        place = Path(self.create_tempdir())
        for name, config in (("revisiting_at-convnext_b_cvst", ours.started), ("own", ours.config)):
            (place / name).mkdir()
            (place / name / "config.json").write_text(json.dumps({"version": 1} | config))
        record = ours.record.to_json() | {"config_sha256": hashes.config_sha256(ours.config)}
        (place / "own" / "results.jsonl").write_text(json.dumps(record) + "\n")
        (found,) = run_records.collect([place / "own"])
        self.assertEqual(found.started["model"]["name"], "convnext_b_cvst")
        self.assertEqual(matching.differences(self.table, self.row, "linf_8_255", found), [])


class OthersTest(parameterized.TestCase):
    """What the rows' new words do not let in."""

    def said(self, paper, number, index, key, changes, **of_record):
        (table,) = tables.tables(paper, number)
        row = table.rows[index]
        line = lines.of_row(row)
        run = line.run._replace(changes=tuple(changes.items()))
        ours = record_of(line._replace(run=run), row, table.results[key], of_run=True)
        record = AccuracyRecord.from_json(ours.record.to_json() | of_record)
        return matching.differences(table, row, key, ours._replace(record=record))

    def test_another_recipe(self):
        for changes, said in (
            ({"train.lr": 0.05}, "lr 0.05, not 0.1"),
            ({"attack.start": "random"}, "attack.start random, not gauss"),
            ({"train.clip_norm": None}, "clip_norm None, not 5"),
            ({"data.augmentation": "crop"}, "data.augmentation crop, not crop|flip"),
            ({"model.options": {"block": "bottleneck"}}, "network wrn_28_10 with block=bottleneck"),
        ):
            with self.subTest(row=(changes, said)):
                found = self.said("robust_resnets", "2", 0, "clean", changes)
                self.assertLen(found, 1)
                self.assertStartsWith(found[0], said)

    def test_other_class_folders(self):
        self.assertEmpty(self.said("twenty_architectures", "4", 2, "clean", {}))
        other = {"classes_sha256": hashes.classes_sha256(imagenet.IMAGENETTE[::-1])}
        found = self.said("twenty_architectures", "4", 2, "clean", {}, **other)
        self.assertEqual(
            found,
            [
                "data.name folder, not imagenette",
                "folder:imagenette2, not imagenette",
            ],
        )


class CommandTest(parameterized.TestCase):
    def call(self, *words) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            reproduce.main([str(word) for word in words])
        return out.getvalue()

    def test_commands(self):
        out = self.call("--commands")
        for paper in tables.PAPERS:
            self.assertIn(f"# {tables.paper(paper)['source']['title']}: commands", out)
        self.assertEqual(len(re.findall(r"^- Row \d+: ", out, re.MULTILINE)), 457)
        train = "      jaxrobust train --config configs/cifar_bat.py:advrush_7_96,selection=test\n"
        self.assertIn(train, out)

    def test_resolutions_that_a_figure_chose(self):
        """Each row of Table 3 has the attack of Figure 3 at its sizes, and the picture of it."""
        out = self.call("--commands", "--paper", "revisiting_at", "--table", "3")
        self.assertEqual(out.count("How its size was chosen (Figure 3)"), 8)
        run = "runs/revisiting_at-vit_s-epochs=300"
        sizes = " ".join(f"--image_size {size}" for size in (192, 224, 256, 288, 320, 352, 384))
        how = "--attack apgd-t --steps 40 --targets 3"
        self.assertIn(f"      jaxrobust evaluate --workdir {run} {how} {sizes}\n", out)
        picture = f"--kind resolution --out {run}/resolution.pdf"
        self.assertIn(f"      jaxrobust figure {run}/evaluation {picture}\n", out)

    def test_what_is_measured_is_counted(self):
        (table,) = tables.tables("robust_resnets", "2")
        line = lines.of_row(table.rows[0])
        ours = record_of(line, table.rows[0], table.results["cw40_linf_8_255"], of_run=True)
        place = Path(self.create_tempdir())
        (place / "config.json").write_text(json.dumps({"version": 1} | ours.config))
        record = ours.record.to_json() | {"config_sha256": hashes.config_sha256(ours.config)}
        (place / "results.jsonl").write_text(json.dumps(record) + "\n")
        out = self.call(place, "--commands", "--paper", "robust_resnets", "--table", "2")
        self.assertEqual(re.findall(r"([1-9]) of (\d) measured", out), [("2", "4")])
