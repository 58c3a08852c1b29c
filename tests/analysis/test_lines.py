"""Every row of every table has a line whose record fills it, or a sentence why there is none."""

import functools
from collections import Counter
from fractions import Fraction
from pathlib import Path

from absl.testing import absltest, parameterized

from jaxrobust.analysis.papers import lines, matching, tables
from jaxrobust.data import imagenet
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.data.transforms import corruptions
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.resolved import phases, plain
from jaxrobust.weights.store import hashes
from tools.generate import refresh_configs

STANDARD = (("apgd-ce", 100, 0), ("apgd-t", 100, 9), ("fab-t", 100, 9), ("square", 5000, 0))
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
def config_of(run: lines.Run | str) -> dict:
    """The config of a run as it writes it."""
    made = refresh_configs.load(run.config)
    for key, value in run.changes:
        *sections, name = key.split(".")
        section = functools.reduce(lambda part, each: part[each], sections, made)
        with section.unlocked():
            section[name] = value
    return plain(made)


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


def record_of(line: lines.RowLine, row: dict, what: dict, *, of_run: bool) -> matching.Ours:
    """An evaluation of a line, invented: all but its accuracies is as a real one has it."""
    config = config_of(line.run) if of_run else None
    model = (config or {}).get("model", {})
    about = {"architecture": row["model"], "image_size": 224, "published_id": line.published}
    own = {
        "clean": 0.6,
        "robust": 0.4 if attacks(what) else None,
        "attacks": attacks(what),
        "flags": {},
        "method": what["attack"],
        "model": {key: model.get(key) for key in ("name", "options", "num_classes")},
    }
    own["model"] |= {"image_size": row["image_size"], "in_channels": 3}
    own["weights"] = (
        f"{phases(refresh_configs.load(line.run.config))[-1]}, step 45, ema" if (of_run) else None
    )
    own |= images_of(row, what, config)
    before = config_of(line.before[-1]) if of_run and line.before else None
    record = AccuracyRecord.from_json(own)
    return matching.Ours(record, Path("run/results.jsonl"), config or about, before)


class RowsTest(parameterized.TestCase):
    @parameterized.parameters(*tables.PAPERS)
    def test_every_row_has_a_line_or_a_sentence(self, paper):
        for table, row, line in lines.of_tables(paper):
            with self.subTest(f"{table.id}, {row['name']}"):
                self.assertTrue(line.texts() or line.why)
                self.assertNotRegex(line.why + str(line.texts()), r"[{}]|None")
                self.assertRegex(line.why, r"^$|\.$")

    @parameterized.parameters(
        ("revisiting_at", 120, 21, 30),
        ("xcit_light_recipe", 61, 11, 14),
        ("twenty_architectures", 148, 0, 0),
        ("robust_resnets", 41, 8, 3),
    )
    def test_counts(self, paper, networks, commands, sentences):
        """Of 457 rows 370 are a network that can be had, 40 a command, and 47 a sentence."""
        found = Counter(
            "network" if line.run or line.published else "command" if line.commands else "sentence"
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


if __name__ == "__main__":
    absltest.main()
