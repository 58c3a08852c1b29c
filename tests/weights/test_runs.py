"""What the workdir of a run holds for others."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import parameterized

from jaxrobust.config import VERSION
from jaxrobust.runtime import pytorch
from jaxrobust.weights.trained import runs
from tests.support import sweeps
from tests.support.runs import tiny


class RunsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir())
        own = {"version": VERSION} | json.loads(tiny().to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))

    @parameterized.parameters(
        ([], None, "train"),  # the last one, where none has weights
        (["pretrain"], None, "pretrain"),
        (["pretrain", "train"], None, "train"),
        (["train"], "pretrain", "pretrain"),
    )
    def test_the_phase_is_the_last_that_has_weights(self, trained, given, phase):
        for name in trained:
            (self.workdir / name / "best" / "4").mkdir(parents=True)
        self.assertEqual(runs.phase_of(self.workdir, given), phase)

    def test_no_phase_and_no_weights(self):
        with self.assertRaisesRegex(ValueError, "--phase=low is unknown; choose one of pretrain"):
            runs.phase_of(self.workdir, "low")
        with self.assertRaisesRegex(ValueError, "no best checkpoint of train or pretrain; train"):
            runs.run_weights(self.workdir)
        with self.assertRaisesRegex(ValueError, "no best checkpoint of pretrain; train"):
            runs.run_weights(self.workdir, "pretrain")

    @sweeps.rows(
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"model": 1, "data": 2, "attack": 3, "evaluation": 4}', r"lacks \['test'\]"),
    )
    def test_no_config(self, text, said):
        (self.workdir / "config.json").write_text(text)
        with self.assertRaisesRegex(ValueError, said):
            runs.run_config(self.workdir)
        (self.workdir / "config.json").unlink()
        with self.assertRaisesRegex(ValueError, "is not a run: config.json is missing"):
            runs.run_config(self.workdir)

    def test_the_programs_of_a_run_and_of_its_phases_are_remembered(self):
        parts = (self.workdir, self.workdir / "pretrain", self.workdir / "train")
        expected = [part / pytorch.FOLDER for part in parts]
        with mock.patch.object(pytorch, "find") as find:
            runs.whole_config(self.workdir)
            find.assert_not_called()
            for folder in expected:
                folder.mkdir(parents=True)
                (folder / pytorch.PROGRAMS).touch()
            runs.whole_config(self.workdir)
        find.assert_called_with("remember")
        calls = find.return_value.call_args_list
        self.assertEqual([call.args for call in calls], [(folder,) for folder in expected])

    def test_another_version_of_the_keys(self):
        path = self.workdir / "config.json"
        with self.assertRaisesRegex(ValueError, f"has version 0 .*this code has {VERSION}"):
            runs.of_this_version({"version": 0}, path)
        own = {"version": VERSION, "seed": 3}
        self.assertEqual(runs.of_this_version(own, path), {"seed": 3})

    def test_classes_of_a_phase_come_before_those_of_the_run(self):
        whole, own = self.workdir / "classes.txt", self.workdir / "train" / "classes.txt"
        self.assertEqual(runs.classes_file(self.workdir, "train"), whole)
        own.parent.mkdir()
        own.write_text("a\n")
        self.assertEqual(runs.classes_file(self.workdir, "train"), own)

    @sweeps.rows(
        ("a b", "a b", False, None),
        ("a b", "b a", False, "0 names are missing .* give a new --workdir"),
        ("a b c", "a d", False, r"2 names are missing \['b', 'c'\], 1 are new \['d'\]"),
        ("a b", "", False, None),
        ("", "a", False, None),
        ("a b", "c d", True, None),  # another data set names the same classes its way
        ("a b", "b c", True, "choose them with --classes"),
        ("a b", "c d", False, r"2 names are missing .* 2 are new .* give a new --workdir"),
    )
    def test_other_classes(self, known, there, renamed, said):
        path = self.workdir / "classes.txt"
        path.write_text("\n".join(known.split()))
        source = SimpleNamespace(classes=tuple(there.split()), where=lambda: "data set 'x'")
        if said is None:
            return runs.check_classes(path, source, renamed=renamed)
        with self.assertRaisesRegex(ValueError, said):
            runs.check_classes(path, source, renamed=renamed)

    def test_a_file_that_has_changed_since(self):
        now = {"name": "own.py:make", "file": "own.py", "sha256": "b" * 64}
        self.assertEqual(runs.rewritten(self.workdir, now), "")
        (self.workdir / runs.FUNCTION).write_text(json.dumps(now | {"sha256": "a" * 64}))
        said = runs.rewritten(self.workdir, now)
        self.assertIn(f"sha256 {'a' * 12} then, {'b' * 12} now", said)
        module = now | {"name": "torch:own.py:make"}
        self.assertStartsWith(runs.rewritten(self.workdir, module), "WARNING: own.py has changed")
        program = self.workdir / pytorch.FOLDER / pytorch.PROGRAMS  # which the run keeps
        program.parent.mkdir()
        program.touch()
        self.assertStartsWith(runs.rewritten(self.workdir, module), "own.py has changed since the")
        self.assertEqual(runs.rewritten(self.workdir, now | {"sha256": "a" * 64}), "")
        self.assertEqual(runs.rewritten(self.workdir, None), "")

    def test_records_of_some_weights(self):
        rows = [{"weights_sha256": sha, "at": at} for at, sha in enumerate("aba")]
        (self.workdir / "evaluation").mkdir()
        for file, own in (("results.jsonl", rows[:2]), ("evaluation/results.jsonl", rows[2:])):
            (self.workdir / file).write_text("".join(json.dumps(row) + "\n" for row in own))
        self.assertEqual([row["at"] for row in runs.records_of(self.workdir, "a")], [0, 2])
