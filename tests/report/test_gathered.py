"""What is on disk of runs and evaluations: where it is looked for, and what is made of it."""

import json
from pathlib import Path

from absl.testing import absltest, parameterized

from jaxrobust.commands import report
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report import gathered, page
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.results import listing
from jaxrobust.weights.store import hashes
from tests.support import command_calls, reports


class PlacedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def place(self, *runs: str):
        """Evaluate elsewhere the weights of a config, which each of some runs has."""
        for name in runs:
            reports.run(self.folder / name)
        found = gathered.gather([self.folder])
        sha256 = found.runs[0].config_sha256
        reports.evaluation(self.folder / "elsewhere", config_sha256=sha256)
        (one,) = gathered.gather([self.folder]).evaluations
        return one.name, one.run, one.config == found.runs[0].config

    def test_the_only_run_of_its_config(self):
        self.assertEqual(self.place("run"), ("run", self.folder / "run", True))

    def test_of_two_runs_of_one_config_neither(self):
        self.assertEqual(self.place("first", "second"), ("elsewhere", None, False))


class PhasesTest(absltest.TestCase):
    def test_in_the_order_of_the_config_and_what_it_lacks_last(self):
        folder = Path(self.create_tempdir(), "run")
        reports.run(folder)
        (run,) = gathered.gather([folder]).runs
        curves = {phase: {} for phase in ("extra", "second", "first")}
        for listed, phases in [
            (["first", "unmade", "second"], ["first", "second", "extra"]),
            (None, ["extra", "second", "first"]),
        ]:
            metrics = run.metrics._replace(curves=curves)
            run = run._replace(config=run.config | {"phases": listed}, metrics=metrics)
            self.assertEqual(run.phases, phases)


class FoldersTest(parameterized.TestCase):
    """Which files and folders below a place are read."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir(), "place")
        self.folder.mkdir()

    def put(self, *names: str):
        for name in names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def found(self, place=None) -> list[str]:
        paths = gathered._record_files(place or self.folder)
        return [str(path.relative_to(self.folder)) for path in paths]

    def test_runs_are_known_by_their_metrics_or_by_config_and_data(self):
        self.put("a/metrics.jsonl", "b/config.json", "b/data.json", "c/config.json", "d/data.json")
        self.assertEqual(self.found(), ["a", "b"])

    def test_records_of_a_run_and_of_its_evaluations(self):
        names = ["results.jsonl", "evaluation/results.jsonl", "evaluation-2/results.jsonl"]
        self.put("metrics.jsonl", *names, "train/results.jsonl", "best/evaluation/results.jsonl")
        self.assertEqual(self.found(), [".", *names])

    def test_three_folders_deep_in_their_order_and_none_that_is_hidden(self):
        self.put("b/results.jsonl", "a/1/2/results.jsonl", "a/1/2/3/results.jsonl")
        self.put(".git/results.jsonl", "a/results.jsonl")
        expected = ["a/results.jsonl", "a/1/2/results.jsonl", "b/results.jsonl"]
        self.assertEqual(self.found(), expected)
        self.assertEqual(self.found(Path(f"{self.folder}/")), expected)
        self.assertLen(self.found(self.folder / "a"), 3)

    def test_names_are_as_short_as_they_can_be(self):
        names = ("a/x/one", "b/x/one", "c/two", "c/evaluation", "d/evaluation-2")
        alike = ("e/1/2/3/4/deep", "f/1/2/3/4/deep")
        for name in (*names, *alike):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "d/config.json").write_text("{}")
        found = gathered._names([self.folder / name for name in names])
        expected = ["a/x/one", "b/x/one", "two", "evaluation", "d"]
        self.assertEqual([found[self.folder / name] for name in names], expected)
        found = gathered._names([self.folder / name for name in alike])
        self.assertEqual([found[self.folder / name] for name in alike], [*alike])


class RunTest(parameterized.TestCase):
    def run_of(self, **files: str):
        folder = Path(self.create_tempdir(), "run")
        reports.run(folder)
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        found = gathered.gather([folder])
        return found.runs[0], found.notes

    def test_classes_are_the_lines_of_their_file(self):
        self.assertEqual(self.run_of(classes_txt="a\nb\n\nc\n")[0].classes, ["a", "b", "", "c"])
        self.assertEqual(self.run_of()[0].classes, [])
        self.assertEqual(self.run_of(classes_txt="a\u2028b\nc\n")[0].classes, ["a\u2028b", "c"])

    def test_a_config_that_is_no_object_says_nothing(self):
        for text in ("[1]", '"text"', "3"):
            with self.subTest(text=text):
                self.assertEqual(self.run_of(config_json=text)[0].config, {})

    def test_the_hash_of_a_config_is_that_of_its_records_without_the_version(self):
        run, _ = self.run_of()
        self.assertIn("version", run.config)
        own = {key: value for key, value in run.config.items() if key != "version"}
        self.assertEqual(run.config_sha256, hashes.config_sha256(own))

    def test_what_happened_is_in_the_order_of_steps(self):
        lines = {"why": "loss", "back_to": 3}
        text = "".join(json.dumps({"step": s, **lines}) + "\n" for s in (30, 4, "x"))
        on = json.dumps({"step": 10, "time": "now", "devices": "a CPU"}) + "\n"
        run, notes = self.run_of(train__rollbacks_jsonl=text, train__resumptions_jsonl=on)
        events = [(e.phase, e.step, e.kind) for e in run.metrics.events if e.kind != "alarm"]
        expected = [
            ("train", 4, "rollback"),
            ("train", 10, "resumption"),
            ("train", 30, "rollback"),
        ]
        self.assertEqual(events, expected)
        words = [e.text for e in run.metrics.events if e.kind != "alarm"]
        self.assertEqual(words[0], "loss; back to step 3")
        self.assertEqual(words[1], "another process continued here, now, on a CPU")
        self.assertEmpty(notes)

    def test_damaged_lines_are_noted_the_first_five_by_number(self):
        run, notes = self.run_of(train__rollbacks_jsonl="x\n" * 7 + '{"step": 2}\n')
        (line,) = notes
        self.assertEndsWith(line, "are left out: 1, 2, 3, 4, 5.")
        self.assertIn("None; back to step None", [e.text for e in run.metrics.events])

    def test_goodput(self):
        rows = [
            {"start": "2026-11-30T10:00:00+00:00", "alive": None},
            {"time": "2026-11-30T10:00:09+00:00", "phase": "train", "step": 4}
            | {"seconds": {"training": 8.0, "compiling": 1.0}},
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        run, notes = self.run_of(goodput_jsonl=text)
        line = "Goodput 88.9%. Working time 0:09: training 88.9%, compiling 11.1%."
        self.assertIn(line, page.page(gathered.gather([run.folder])))
        code, said, _ = command_calls.words(
            report.main, run.folder, "--json", "--out", run.folder / "x.html"
        )
        self.assertEqual((code, notes), (0, []))
        self.assertIn(f"run: {line}", said)
        self.assertEqual(json.loads(said.splitlines()[-1])["goodput"]["run"]["share"], 0.8889)
        listed = listing.find(run.folder)
        self.assertEqual(listed.rows[0].goodput["seconds"]["compiling"], 1.0)
        self.assertRegex(listing.text(listed), r"figures\n.* 88.9%")
        run, (note,) = self.run_of(goodput_jsonl='{"time": 3}\n')
        self.assertIsNone(run.goodput)
        self.assertRegex(note, r"goodput.jsonl cannot be read \(.*\); it is left out")

    def test_planned_steps_are_whole_epochs_of_the_data_that_is_known(self):
        for changes, planned in (
            ({}, {"pretrain": 40, "train": 40}),
            ({"train": {"batch_size": 30, "epochs": 4}}, {"pretrain": 40, "train": 12}),
            ({"train": {"batch_size": 10}}, {"pretrain": 40}),
            ({"train": {"batch_size": 0, "epochs": 4}}, {"pretrain": 40}),
            ({"data": {"extra": "npz:x"}}, {}),
            (
                {"train": {"batch_size": 10, "epochs": 4, "changes": {"data": {"name": "x"}}}},
                {"pretrain": 40},
            ),
        ):
            with self.subTest(row=(changes, planned)):
                config = {"pretrain": {"batch_size": 10, "epochs": 4}}
                config |= {"train": {"batch_size": 10, "epochs": 4}} | changes
                held = {"data.train_split.records": 100}
                self.assertEqual(gathered._planned(config, held), planned)
                self.assertEqual(gathered._planned(config, {}), {})

    def test_who_is_at_work(self):
        lock = json.dumps({"pid": 7, "host": "here", "since": "noon"})
        self.assertEqual(self.run_of(lock=lock)[0].at_work, "process 7 on here since noon")
        for text in ("", "[]", "{}", '{"pid": 7}'):
            self.assertIsNone(self.run_of(lock=text)[0].at_work)


class EvaluationTest(parameterized.TestCase):
    def one(self, *, run=None, config=None, **record) -> ReportedEvaluation:
        own = AccuracyRecord(**record)
        return ReportedEvaluation("x", Path("f"), own, None, ["a", "b"], run, config or {})

    def test_the_config_of_the_folder_itself_goes_before_that_above(self):
        folder = Path(self.create_tempdir(), "run")
        reports.evaluation(folder / "evaluation")
        for place, name in ((folder, "above"), (folder / "evaluation", "own")):
            (place / "config.json").write_text(json.dumps({"model": {"name": name}}))
            (place / "classes.txt").write_text(f"{name}\n")
        (one,) = gathered.gather([folder / "evaluation"]).evaluations
        self.assertEqual((one.run, one.classes), (folder / "evaluation", ["own"]))
        self.assertEqual(one.config, {"model": {"name": "own"}})
        (folder / "evaluation" / "config.json").unlink()
        (one,) = gathered.gather([folder / "evaluation"]).evaluations
        self.assertEqual((one.run, one.classes), (folder, ["above"]))

    @parameterized.parameters(
        {"clean": 1.5}, {"robust": -0.1}, {"accuracy_after": {"apgd-ce": 2.0}}, {"clean": True},
        {"accuracy_after": {"apgd-ce": "x"}}, {"interval": {"clean": [0.1], "robust": None}},
        {"interval": {"clean": [0.1, "x"], "robust": None}},
        {"interval": {"clean": [0.1, None], "robust": None}},
        {"costs": ["x"]}, {"costs": [{"attack": "a", "seconds": "x"}]}, {"attacks": ["x"]},
        {"attacks": [{"name": "a", "norm": "linf", "epsilon": None}]},
        {"attacks": [{"name": 1, "norm": "linf", "epsilon": 0.1}]},
        {"attacks": [{"name": "a", "epsilon": 0.1}]},
        {"attacks": [{"name": "a", "norm": "linf", "epsilon": float("nan")}]},
        {"costs": [{"attack": "a", "seconds": float("inf")}]},
    )  # fmt: skip
    def test_records_with_wrong_parts_are_left_out(self, **changes):
        sound = reports.record(reports.found(8), "a1")
        gathered._check_parts(AccuracyRecord.from_json(sound), Path("f"))
        if changes == {"clean": True}:
            return  # as JSON has it, a number of 1
        with self.assertRaisesRegex(ValueError, "fields of the wrong type|AttributeError"):
            gathered._check_parts(AccuracyRecord.from_json(sound | changes), Path("f"))

    def test_a_note_stands_once(self):
        folder = Path(self.create_tempdir())
        for name in ("a", "b"):
            reports.run(folder / name)
        (folder / "a" / "config.json").write_text("{")
        reports.evaluation(folder / "a" / "evaluation")
        notes = gathered.gather([folder]).notes
        self.assertLen(notes, len(set(notes)))
        self.assertLen([note for note in notes if "config.json cannot be read" in note], 1)
