"""The list of runs: what stands in it, in which order, and what is damaged."""

import json
import os
import time
from pathlib import Path
from unittest import mock

from absl.testing import parameterized

from jaxrobust.commands.results import runs
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.results import listing, plotting
from tests.support import command_calls
from tests.support.compared import attacks, found, write

NIGHT = "2026-01-02T03:04:05+00:00"
DAY = "2026-01-02T14:30:00+02:00"  # 12:30 in UTC


class Folders(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "runs"
        self.folder.mkdir()

    def run_of(self, name: str, *, records: bool = True, when: str = NIGHT) -> Path:
        """A training as it lies on disk, of two phases, with numbers or before them."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        config = {"model": {"name": "vit_s"}, "data": {"name": "digits"}, "phases": ["a", "b"]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "data.json").write_text("{}")
        lines = [{"phase": "b", "step": 20 * at, "loss": 1.0} for at in range(1, 400)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        for weights, robust, at in (
            ("a, step 9, ema", 0.1, NIGHT),
            ("b, step 8000, ema", 0.4, when),
        ):
            record = AccuracyRecord(
                time=at,
                weights=weights,
                dataset="digits",
                split="test",
                image_ids="0..399",
                attacks=[{"name": "apgd-ce", "norm": "linf", "epsilon": 4 / 255, "steps": 40}],
                clean=0.9,
                robust=robust,
                schema=2,
            )
            if records:
                with (folder / "results.jsonl").open("a") as file:
                    file.write(json.dumps(record.to_json()) + "\n")
        return folder

    def evaluation(self, place: Path, number: str = "e1", **changes) -> Path:
        own = {"image_ids": "0..599", "time": NIGHT}
        return write(place, found(1), number, **(own | changes))


class ListTest(Folders):
    def test_newest_first(self):
        self.evaluation(self.run_of("old") / "evaluation", time="2026-01-03T00:00:00+00:00")
        self.run_of("deep/er/new", when=DAY)
        given = listing.find(self.folder)
        rows = [(row.time, row.kind, row.folder) for row in given.rows]
        self.assertEqual(
            rows,
            [
                ("2026-01-03 00:00:00", "evaluation", "old/evaluation"),
                ("2026-01-02 12:30:00", "training", "deep/er/new"),
                ("2026-01-02 03:04:05", "training", "old"),
            ],
        )
        self.assertEqual(given.notes, [])

    def test_what_a_row_says(self):
        folder = self.run_of("one", when=DAY)
        l2 = attacks(norm="l2", epsilon=0.5)
        both = {"attacks": attacks() + l2, "method": "union", "flags": {"steps": "too few"}}
        self.evaluation(folder / "evaluation", **both)
        (folder / "report.html").write_text("")
        (folder / "evaluation" / "attacks.pdf").write_bytes(b"")
        training, evaluation = listing.find(self.folder).rows
        self.assertEqual(training.weights, "b, step 8000, ema")  # the last phase alone
        self.assertEqual((training.clean, training.robust, training.images), (0.9, 0.4, 400))
        self.assertEqual((training.network, training.threats), ("vit_s", ["linf 4/255"]))
        self.assertEqual(
            (training.attack, training.figures), ("apgd-ce, steps 40", ["report.html"])
        )
        self.assertEqual(evaluation.threats, ["linf 8/255", "l2 0.5"])
        self.assertEqual((evaluation.network, evaluation.images), ("resnet18", 600))
        self.assertEqual(evaluation.robust, float(found(1).robust.mean()))
        self.assertEqual((evaluation.evaluation, evaluation.figures), ("e1", ["attacks.pdf"]))
        self.assertEqual(evaluation.flags, {"steps": "too few"})

    def test_the_command(self):
        self.evaluation(self.run_of("one") / "evaluation", flags={"steps": "too few"})
        for words in ((self.folder,), (self.folder, "--json")):
            code, said, error = command_calls.words(runs.main, *words)
            self.assertEqual((code, error), (0, ""))
        *lines, last = said.splitlines()
        self.assertLen(lines, 4)
        self.assertRegex(lines[0], r"^date, UTC +kind +folder +network +clean +robust +n +threat ")
        robust = 100 * found(1).robust.mean()
        for line, words in zip(
            lines[1:3],
            (
                f"evaluation one/evaluation resnet18 .* {robust:.1f}%\\? 600 linf 8/255 autoattack",
                "training one vit_s 90.0% 40.0% 400 linf 4/255 apgd-ce, steps 40 b, step 8000, ema",
            ),
            strict=True,
        ):
            self.assertRegex(" ".join(line.split()), f"2026-01-02 03:04 {words}")
        self.assertStartsWith(lines[3], "?: flags of the record put the number in doubt")
        rows = json.loads(last)["rows"]
        self.assertEqual([row["kind"] for row in rows], ["evaluation", "training"])
        self.assertEqual(rows[1]["dataset"], "digits")

    def test_a_training_without_numbers(self):
        self.run_of("one", records=False)
        (row,) = listing.find(self.folder).rows
        self.assertEqual(row.weights, "no numbers yet; b, step 7980")
        self.assertEqual((row.network, row.dataset, row.clean), ("vit_s", "digits", None))
        metrics = self.folder / "one" / "metrics.jsonl"
        with metrics.open("a") as file:
            file.write('{"phase": "b", "st')  # at work
        (row,) = listing.find(self.folder).rows
        self.assertEqual(row.weights, "no numbers yet; b, step 7980")
        metrics.write_text("")
        (row,) = listing.find(self.folder).rows
        self.assertEqual(row.weights, "no numbers yet; its metrics contain no step")
        metrics.unlink()
        (row,) = listing.find(self.folder).rows
        self.assertEqual(row.weights, "no numbers yet; it has not begun")

    def test_figures_elsewhere(self):
        self.run_of("one")
        place = self.folder / "figures"
        place.mkdir()
        (place / "a.pdf").write_bytes(b"")
        (place / "a.tex").write_text(f"{plotting.MARK}; more\n")
        (place / "paper.pdf").write_bytes(b"")
        (place / "paper.tex").write_text("somebody's")
        given = listing.find(self.folder)
        self.assertEqual(given.figures, ["figures/a.pdf"])
        self.assertIn("\nfigure: figures/a.pdf", listing.text(given))

    def test_links_are_followed_once(self):
        self.run_of("one")
        (self.folder / "one" / "circle").symlink_to(self.folder)
        other = Path(self.create_tempdir()) / "elsewhere"
        self.evaluation(other)
        (self.folder / "linked").symlink_to(other)
        self.assertCountEqual([r.folder for r in listing.find(self.folder).rows], ["one", "linked"])

    def test_the_folder_itself(self):
        folder = self.run_of("one")
        self.assertEqual([row.folder for row in listing.find(folder).rows], ["."])

    def test_quick(self):
        """200 runs without numbers and 1 MB of metrics each: no metrics are read whole."""
        line = (json.dumps({"phase": "b", "step": 7, "loss": 1.0}) + "\n").encode()
        for at in range(200):
            folder = self.folder / f"r{at}"
            folder.mkdir()
            with (folder / "metrics.jsonl").open("wb") as file:
                file.seek(2**20)
                file.write(b"\n" + line)
        begun = time.process_time()
        rows = listing.find(self.folder).rows
        self.assertLess(time.process_time() - begun, 1)  # 0.1 s, and 2 s if they were
        self.assertEqual({row.weights for row in rows}, {"no numbers yet; b, step 7"})
        self.assertLen(rows, 200)


class DamagedTest(Folders):
    def refused(self, *words) -> str:
        code, said, error = command_calls.words(runs.main, *words)
        self.assertEqual((code, said, error.count("\n")), (2, "", 1), error)
        return error

    def test_missing_and_empty(self):
        said = "nowhere does not exist; name a folder of runs; jaxrobust train --config quickstart"
        self.assertIn(said, self.refused(self.folder / "nowhere"))
        said = (
            f"{self.folder} holds neither a run (metrics.jsonl) nor records (results.jsonl); name"
        )
        self.assertIn(said, self.refused(self.folder))
        (self.folder / "file").write_text("")
        self.assertIn("file is a file; name a folder", self.refused(self.folder / "file"))

    def test_the_default_is_runs(self):
        here = os.getcwd()
        try:
            os.chdir(Path(self.create_tempdir()))
            self.assertIn("runs does not exist", self.refused())
        finally:
            os.chdir(here)

    def test_damaged_files_lose_nothing_else(self):
        """Each leaves a sentence, and all that can be read is listed."""
        self.run_of("sound")
        bad = self.run_of("bad line")
        with (bad / "results.jsonl").open("a") as file:
            file.write("{cut\n{}\n")
        config = self.run_of("bad config")
        (config / "config.json").write_text("{")
        other = self.folder / "other"
        other.mkdir()
        (other / "results.jsonl").write_text('{"loss": 1}\n')
        newer = self.evaluation(self.folder / "newer", "n", schema=9)
        self.evaluation(newer, "o")
        part = self.evaluation(self.folder / "part", attacks=[{"name": "apgd-ce"}])
        given = listing.find(self.folder)
        folders = [row.folder for row in given.rows]
        self.assertCountEqual(folders, ["sound", "bad line", "bad config", "newer"])
        notes = "\n".join(given.notes)
        for said in (
            f"Damaged lines of {bad / 'results.jsonl'} are left out: 3.",
            f"{config / 'config.json'} cannot be read (",
            f"{other / 'results.jsonl'} holds a line that is not a record of jaxrobust evaluate; "
            f"it",
            f"{newer / 'results.jsonl'} has a record of schema 9, but this version only reads up "
            f"to 2;",
            f"{part / 'results.jsonl'} has a record with fields of the wrong type",
        ):
            self.assertIn(said, notes)
        self.assertIn("\nnote: Damaged lines of", listing.text(given))

    def test_nothing_but_damage(self):
        (self.folder / "results.jsonl").write_text("{cut\n")
        error = self.refused(self.folder)
        self.assertIn("holds neither a run", error)
        self.assertIn(f"(Damaged lines of {self.folder / 'results.jsonl'} are left out: 1.)", error)

    def test_a_date_that_is_none(self):
        place = self.evaluation(self.folder / "one", time="yesterday")
        os.utime(place / "results.jsonl", (0, 86400))
        (row,) = listing.find(self.folder).rows
        self.assertEqual(row.time, "1970-01-02 00:00:00")

    def test_what_cannot_be_opened(self):
        self.run_of("sound")
        (self.folder / "closed").mkdir()
        walked = os.scandir

        def scandir(path):
            if Path(path).name == "closed":
                raise PermissionError(13, "Permission denied")
            return walked(path)

        with mock.patch.object(listing.os, "scandir", scandir):
            given = listing.find(self.folder)
        self.assertLen(given.rows, 1)
        said = [f"{self.folder / 'closed'} cannot be read (Permission denied); it is left out."]
        self.assertEqual(given.notes, said)
