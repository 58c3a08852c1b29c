"""Files at `gs://` addresses, on a server of this machine."""

import contextlib
import importlib.util
import io
import json
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from jaxrobust.evaluation.engine import ledger
from jaxrobust.evaluation.questions import flags as flag_rules
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.runtime.files import buckets, jsonl, locks
from jaxrobust.runtime.text import terminal
from tests.support import sweeps
from tests.support.bucket import BucketCase
from tests.support.stored_verdicts import VERDICT, evaluated


class FilesTest(BucketCase):
    def test_appended_lines_are_parts(self):
        run = self.opened()
        self.assertFalse(run.exists())
        run.mkdir(parents=True)
        for step in (1, 2):
            jsonl.append(run / "metrics.jsonl", {"step": step})
            buckets.upload(run)
        self.assertEqual(self.names(), [f"metrics.jsonl.part-00000{n}" for n in (1, 2)])
        buckets.close()
        run = self.opened()
        rows = jsonl.read(run / "metrics.jsonl")
        self.assertEqual([row["step"] for row in rows], [1, 2])
        jsonl.replace(run / "metrics.jsonl", '{"step": 1}\n')
        jsonl.append(run / "metrics.jsonl", {"step": 7})
        buckets.upload(run)
        self.assertEqual(self.names(), ["metrics.jsonl.part-000003-all"])
        jsonl.append(run / "metrics.jsonl", {"step": 8})
        buckets.close()
        rows = jsonl.read(self.opened() / "metrics.jsonl")
        self.assertEqual([row["step"] for row in rows], [1, 7, 8])

    def test_other_files_are_replaced_or_removed(self):
        run = self.opened()
        (run / "train").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"where": f"{run} (best)"}))
        (run / "train" / "x.txt").write_text("x")
        (run / ".config.json.part-01234567").write_text("half")
        (run / "lock").write_text("of this machine")
        buckets.upload(run)
        (run / "train" / "x.txt").unlink()
        buckets.upload(run)
        self.assertEqual(self.names(), ["config.json"])
        text = (self.objects / "runs" / "1" / "config.json").read_text()
        self.assertEqual(json.loads(text), {"where": f"{self.address} (best)"})
        self.assertEqual(terminal.fitted(f"saved in {run}", None), f"saved in {self.address}")

    def test_lines_that_are_cut_off_wait(self):
        run = self.opened()
        run.mkdir(parents=True)
        file = run / "ledger.jsonl"
        file.write_text('{"a": 1}\n{"b"')
        buckets.upload(run)
        with file.open("a") as lines:
            lines.write(": 2}\n")
        buckets.upload(run)
        parts = [(self.objects / "runs" / "1" / name).read_text() for name in self.names()]
        self.assertEqual(parts, ['{"a": 1}\n', '{"b": 2}\n'])

    def test_another_machine_may_append_too(self):
        run = self.opened()
        run.mkdir(parents=True)
        file = run / "results.jsonl"
        jsonl.append(file, {"of": "this"})
        buckets.upload(run)
        theirs = self.objects / "runs" / "1" / "results.jsonl.part-000002"
        theirs.write_text('{"of": "another"}\n')
        jsonl.append(file, {"of": "this again"})
        buckets.close()
        self.assertEqual(
            [row["of"] for row in jsonl.read(self.opened() / "results.jsonl")],
            ["this", "another", "this again"],
        )

    def test_listings_do_without_checkpoints_and_images(self):
        for name in ("config.json", "train/latest/8/meta/metadata", "evaluation/ledger-1.images"):
            file = self.objects / "runs" / "1" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
        (self.objects / "runs" / "11").mkdir()
        (self.objects / "runs" / "11" / "config.json").write_text("{}")
        for light, names in ((True, []), (False, ["evaluation/ledger-1.images"])):
            run = self.opened(light=light)
            files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
            self.assertEqual(files, ["config.json", *names])
            self.assertFalse(run.with_name("11").exists())
        self.assertTrue(buckets.fetched(run.with_name("11")).exists())

    def test_what_cannot_be_uploaded_stays(self):
        run = self.opened()
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        said = self.killed()
        root = run.parents[1]
        self.assertRegex(
            said,
            rf"^jaxrobust: gs://{self.objects.name}, whose local copy is in {root.parent}, is not "
            r"accessible to this account \(.*\); grant it roles/storage.objectUser and .* on the "
            rf"bucket; upload the files later: gcloud storage rsync --recursive {root} gs://",
        )
        self.assertTrue((run / "config.json").exists())

    def test_a_bucket_that_is_away_for_a_while(self):
        with (
            mock.patch.object(buckets, "EVERY_S", 0.05),
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            run = self.opened()
            with self.server.refusing("^POST"):
                run.mkdir(parents=True)
                (run / "config.json").write_text("{}")
                self.wait(lambda: "trying again" in said.getvalue())
            self.wait(lambda: self.names() == ["config.json"])
        self.assertRegex(
            said.getvalue(),
            "^WARNING: gs://.* is not accessible to this account .*; trying again every 0 s\n$",
        )

    def wait(self, until) -> None:
        stop = time.monotonic() + 20
        while not until():
            self.assertLess(time.monotonic(), stop)
            time.sleep(0.02)


class RefusedTest(BucketCase):
    def test_several_hosts_that_evaluate(self):
        words = (
            "--workdir in a bucket needs a single host, .*; mount the bucket with gcsfuse on each"
        )
        with (
            mock.patch.object(jax, "process_count", return_value=2),
            self.assertRaisesRegex(ValueError, words),
        ):
            flag_rules.placed(GivenFlags(workdir=self.address))

    @sweeps.rows(
        ("s3://bucket/run", "is neither a folder nor gs://BUCKET/FOLDER; give one of these$"),
        ("gs://", "is neither a folder nor gs://BUCKET/FOLDER"),
        ("gs:///run", "is neither a folder nor gs://BUCKET/FOLDER"),
        ("gs://bucket/", "is neither a folder nor gs://BUCKET/FOLDER"),
        ("gs://bucket-of-nobody/run", r"does not exist \(.*\); check its name$"),
    )
    def test_addresses(self, text, words):
        with self.assertRaisesRegex(ValueError, f"^--out {text}.* {words}"):
            buckets.opened("out", text)

    @sweeps.rows(
        (403, "is not accessible to this account .*/storage.legacyBucketReader on the bucket$"),
        (401, "needs a login: gcloud auth application-default login$"),
        (400, r"does not answer \(.*\); check the network and the bucket$"),
    )
    def test_rights(self, status, words):
        refused = rf"^--workdir {self.address}: gs://{self.objects.name} {words}"
        with self.server.refusing("^GET", status), self.assertRaisesRegex(ValueError, refused):
            self.opened()

    def test_without_the_package(self):
        with (
            mock.patch.object(importlib.util, "find_spec", return_value=None),
            self.assertRaisesRegex(ValueError, r"pip install 'jaxrobust\[gcs\]', or mount the .*"),
        ):
            self.opened()

    def test_a_path_is_taken_as_it_is(self):
        for text in ("runs/1", "/bucket/run", "../bucket/a b", "C:/runs"):
            self.assertEqual(buckets.opened("workdir", text), Path(text))
            self.assertIsNone(buckets.address(Path(text)))


class LockTest(BucketCase):
    def held(self):
        path = self.opened() / "lock"
        return locks.held(path, resource="it", otherwise="take another")

    def note(self, **changes) -> dict:
        """What the holder wrote."""
        return json.loads((self.objects / "runs" / "1" / "lock").read_text()) | changes

    def test_an_object_says_who_holds_it(self):
        with self.held():
            self.assertEqual(self.note()["host"], socket.gethostname())
        self.assertEqual((self.objects / "runs" / "1" / "lock").read_bytes(), b"")

    def test_another_host_that_lives_or_is_gone(self):
        with self.held():
            note = self.note(host="elsewhere", pid=7)
        lock = self.objects / "runs" / "1" / "lock"
        lock.write_text(json.dumps(note))
        beat = threading.Timer(0.3, self.beat, [lock, note | {"sign": "000000001"}])
        beat.start()
        self.addCleanup(beat.join)
        refusal = (
            "it is in use by process 7 on elsewhere since .*; wait for it, end it, or take another,"
            " or remove .*/runs/1/lock if that host is gone"
        )
        with self.assertRaisesRegex(ValueError, refusal), self.held():
            pass
        with mock.patch.object(locks, "_PATIENCE", 0.1), self.held():
            self.assertEqual(self.note()["host"], socket.gethostname())

    def beat(self, lock: Path, note: dict) -> None:
        new = self.objects / "new"
        new.write_text(json.dumps(note))
        new.replace(lock)

    def test_of_two_that_come_at_once_one_gets_it(self):
        run = self.opened()
        first, second = (locks.ELSEWHERE[run.parents[1]](run / "lock") for _ in range(2))
        self.assertEqual((first.read(), second.read()), (b"", b""))
        first.write(b"first")
        first.write(b"first, alive")
        with self.assertRaisesRegex(FileExistsError, f"{self.address}/lock was taken by another"):
            second.write(b"second")
        self.assertEqual(second.read(), b"first, alive")


class LedgerTest(BucketCase):
    def test_continues_after_a_kill(self):
        points = np.arange(12, dtype=np.float32).reshape(3, 2, 2, 1)
        ids = np.arange(3, dtype=np.uint32)
        run = self.opened()
        book = ledger.Ledger(run / "ledger.jsonl", evaluated("it"), ids)
        fooled = VERDICT | {"fooled": True, "norm": 0.5, "reached": 3}
        for place in (0, 2):
            book.add(place, fooled, points[place])
            buckets.upload(run)
        book.add(1, fooled, points[1])  # which the kill loses
        self.killed()
        book.close()
        suffixes = ("images.part-000001", "images.part-000002")
        self.assertContainsSubset({f"ledger.{suffix}" for suffix in suffixes}, self.names())
        run = self.opened()
        with contextlib.closing(ledger.Ledger(run / "ledger.jsonl", evaluated("it"), ids)) as book:
            self.assertEqual(book.rows("square")["known"].tolist(), [True, False, True])
            np.testing.assert_array_equal(book.adversarial(2, "square", (2, 2, 1)), points[2])
            book.add(1, fooled, points[1])
        buckets.close()
        run = self.opened()
        with contextlib.closing(ledger.Ledger(run / "ledger.jsonl", evaluated("it"), ids)) as book:
            for place in range(3):
                stored = book.adversarial(place, "square", (2, 2, 1))
                np.testing.assert_array_equal(stored, points[place])
        buckets.close()
        run = self.opened()
        with self.assertRaisesRegex(ValueError, "belongs to another evaluation"):
            ledger.Ledger(run / "ledger.jsonl", evaluated("another"), ids)


if __name__ == "__main__":
    absltest.main()
