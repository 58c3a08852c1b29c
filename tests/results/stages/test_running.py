"""Stages one after the other: what each is asked, what is noted, and what is not made again."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import parameterized

from jaxrobust.results.stages import running, stage
from jaxrobust.weights.store.hashes import file_sha256


class RunningTest(parameterized.TestCase):
    """A run's folder; what selects, attacks and exports is a mock that writes what those write."""

    def setUp(self):
        super().setUp()
        self.run = Path(self.create_tempdir(), "run")
        self.run.mkdir()
        self.config = SimpleNamespace(test=SimpleNamespace(images=7))
        self.calls = mock.Mock()
        self.calls.select.side_effect = self.select
        self.calls.evaluated.side_effect = self.evaluated
        self.calls.export.side_effect = self.export
        self.chosen, self.known, self.files = "a" * 64, [], {"model.pt": "weights"}
        for name, own in (
            ("choice.select", self.calls.select),
            ("command.evaluated", self.calls.evaluated),
            ("export_torch.export", self.calls.export),
            ("command.told", lambda written, place: f"told {len(written)}"),
            ("runs.phase_of", lambda run: "train"),
            ("records.read", self.read),
        ):
            self.enter_context(mock.patch.object(running, name.split(".")[0], self.of(name, own)))

    def of(self, name, own):
        module = getattr(running, name.split(".")[0])
        kept = {key: getattr(module, key) for key in dir(module) if not key.startswith("__")}
        return SimpleNamespace(**(kept | {name.split(".")[1]: own}))

    def select(self, given):
        (given.run / "selection.json").write_text("{}")
        chosen = {"step": 9, "weights": "ema", "weights_sha256": self.chosen, "more": 1}
        return {"chosen": chosen}

    def evaluated(self, given, threats):
        made = [SimpleNamespace(evaluation=f"{given.attack} {t}") for t in threats or ("own",)]
        self.known += made
        return made, self.run / "evaluation"

    def export(self, given):
        given.out.mkdir(parents=True)
        for name, text in self.files.items():
            (given.out / name).write_text(text)
        print(f"made {given.out}")
        return {"files": {name: file_sha256(given.out / name) for name in self.files}}

    def read(self, folder):
        if folder.name == "evaluation":
            return self.known
        tested = ["pretrain, step 1, ema", "train, step 2, ema", "train, step 3, raw", "other"]
        return [SimpleNamespace(weights=w, weights_sha256=f"of {w}") for w in tested]

    def ran(self, text: str) -> tuple[list[str], str, str]:
        """Run stages; what began, and what is printed and said."""
        begun, out, said = [], io.StringIO(), io.StringIO()
        selected = SimpleNamespace(weights_sha256=self.chosen)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(said),
            mock.patch.object(running.kept, "selected", return_value=selected),
        ):
            stages = stage.parse(text)
            running.run(stages, self.config, self.run, begin=lambda one: begun.append(one.text))
        return begun, out.getvalue(), said.getvalue()

    @property
    def notes(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / running.NOTES).read_text().splitlines()]

    def test_each_stage_is_asked_once_and_noted(self):
        text = "select,autoattack:linf:4/255+l2:2,clean,export:module"
        begun, out, said = self.ran(text)
        self.assertEqual(begun, text.split(","))
        self.calls.select.assert_called_once()
        self.assertEqual(self.calls.select.call_args.args[0].run, self.run)
        first, second = self.calls.evaluated.call_args_list
        self.assertEqual(first.kwargs["threats"], ("linf:4/255", "l2:2"))
        self.assertEqual(second.kwargs["threats"], ())
        given = first.args[0]
        self.assertEqual((given.workdir, given.attack, given.n), (str(self.run), "autoattack", 7))
        self.assertEqual((given.selected, given.noreplay), (True, False))
        self.assertIn("told 2\n", out)
        asked = self.calls.export.call_args.args[0]
        self.assertEqual((asked.workdir, asked.layout, asked.selected), (self.run, "module", True))
        self.assertEqual((asked.record, asked.id), (None, None))
        self.assertEqual((self.run / "export/module/model.pt").read_text(), "weights")
        self.assertFalse((self.run / "export/unfinished").exists())
        self.assertIn(f"made {self.run / 'export/module'}\n", out)  # not where it was unfinished
        self.assertEqual(said.count(": begins"), 4)
        rows = self.notes
        self.assertEqual([row["stage"] for row in rows], text.split(","))
        self.assertEqual({row["images"] for row in rows}, {7})
        self.assertEqual([row.get("weights_sha256") for row in rows], [None, *[self.chosen] * 3])
        chosen = {"step": 9, "weights": "ema", "weights_sha256": self.chosen}
        self.assertEqual(rows[0]["chosen"], chosen)
        self.assertEqual(list(rows[0]["files"]), ["selection.json"])
        self.assertEqual(rows[1]["evaluations"], ["autoattack linf:4/255", "autoattack l2:2"])
        self.assertEqual(list(rows[3]["files"]), ["export/module/model.pt"])

    def test_what_is_done_is_passed_over(self):
        text = "select,autoattack,export:module"
        self.ran(text)
        begun, out, said = self.ran(text)
        self.assertEqual((begun, out), (text.split(","), ""))
        self.assertEqual(said.count(f"already done, see {self.run / running.NOTES}"), 3)
        self.assertLen(self.notes, 3)

    @parameterized.parameters(
        ("weights", ["autoattack", "export:module"]),
        ("images", ["select", "autoattack", "export:module"]),
        ("record", ["autoattack"]),
        ("selection", ["select"]),
        ("export", ["export:module"]),
        ("file", ["export:module"]),
    )
    def test_what_is_not_there_any_more_is_made_again(self, gone, again):
        text = "select,autoattack,export:module"
        self.ran(text)
        match gone:
            case "weights":
                self.chosen, self.files = "b" * 64, {"model.pt": "weights"}
            case "images":
                self.config.test.images = 8
            case "record":
                self.known.clear()
            case "selection":
                (self.run / "selection.json").write_text("another")
            case "export":
                (self.run / "export/module/model.pt").unlink()
                (self.run / "export/module").rmdir()
            case "file":
                (self.run / "export/module/model.pt").write_text("weights")
                self.notes_with(files={"export/module/model.pt": "0" * 64})
        before = len(self.notes)
        self.ran(text)
        self.assertEqual([row["stage"] for row in self.notes[before:]], again)

    def notes_with(self, **changes):
        """Change the last note."""
        *rows, last = self.notes
        lines = [json.dumps(row) + "\n" for row in (*rows, last | changes)]
        (self.run / running.NOTES).write_text("".join(lines))

    def test_the_last_note_of_a_stage_counts(self):
        self.ran("autoattack")
        self.config.test.images = 8
        self.ran("autoattack")
        self.config.test.images = 7
        self.ran("autoattack")
        self.assertLen(self.notes, 3)

    def test_an_entry_of_robustbench_wants_attacks_without_replay(self):
        self.ran("autoattack,apgd-ce,export:module:Me2026Robust")
        replays = [call.args[0].noreplay for call in self.calls.evaluated.call_args_list]
        self.assertEqual(replays, [True, False])
        asked = self.calls.export.call_args.args[0]
        self.assertEqual(asked.record, self.run / "evaluation" / "results.jsonl")
        self.assertEqual(asked.id, "Me2026Robust")

    def test_another_export_is_not_overwritten(self):
        self.ran("export:module")
        place = self.run / "export/module"
        (place / "model.pt").write_text("somebody's")
        with self.assertRaisesRegex(ValueError, "contains something other .* move it away"):
            self.ran("export:module")
        self.assertEqual((place / "model.pt").read_text(), "somebody's")

    def test_a_certificate_may_be_another_one(self):
        self.files = {"model.pt": "weights", "model.certificate.json": "yesterday"}
        self.ran("export:module")
        self.files["model.certificate.json"] = "today"
        (self.run / running.NOTES).unlink()
        self.ran("export:module")
        text = (self.run / "export/module/model.certificate.json").read_text()
        self.assertEqual(text, "today")

    def test_what_a_kill_left_is_not_in_the_way(self):
        left = self.run / "export/unfinished/module"
        left.mkdir(parents=True)
        (left / "half").write_text("")
        self.ran("export:module")
        names = {path.name for path in (self.run / "export/module").iterdir()}
        self.assertEqual(names, {"model.pt"})

    def test_another_process_does_the_same(self):
        with running._alone(self.run), self.assertRaisesRegex(ValueError, "copy the run"):
            self.ran("autoattack")
