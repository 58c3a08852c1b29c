"""Files that are written whole or not at all, and who may read them."""

import contextlib
import errno
import os
import resource
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust.data.splits import subsets
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.runtime.files import jsonl, whole
from jaxrobust.weights.store import files, weights_folder
from tests.support import sweeps


def modes(folder: Path) -> dict[str, str]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): oct(p.stat().st_mode & 0o777) for p in found}


class PermissionsTest(parameterized.TestCase):
    @sweeps.rows((0o022, "0o644"), (0o027, "0o640"), (0o077, "0o600"))
    def test_are_the_umasks(self, umask, expected):
        folder = Path(self.create_tempdir())
        self.addCleanup(os.umask, os.umask(umask))
        arrays = {"a": np.zeros(3, np.float32)}
        save_file(arrays, folder / "alone")
        if modes(folder) != {"alone": "0o600"}:
            self.skipTest("this version of safetensors writes with the umask's permissions itself")
        (folder / "alone").unlink()

        files.write(folder / "file.safetensors", arrays, {"format": "pt"})
        jsonl.replace(folder / "text", "x")
        jsonl.append(folder / "lines", {"x": 1})
        subsets.write_index(folder, "val", np.zeros(2), [b"a", b"b"])
        about = {"architecture": "convnext_n", "options": {}}
        weights_folder.write(folder / "imported", arrays, {}, about)
        found = modes(folder)
        self.assertLen(found, 6)
        self.assertEqual(set(found.values()), {expected}, found)

    def test_of_a_file_that_was_there(self):
        """It is another file, as with any editor that replaces."""
        folder = Path(self.create_tempdir())
        self.addCleanup(os.umask, os.umask(0o022))
        (folder / "text").write_text("old")
        (folder / "text").chmod(0o600)
        jsonl.replace(folder / "text", "new")
        self.assertEqual(modes(folder), {"text": "0o644"})


class WholeTest(absltest.TestCase):
    def test_nothing_is_left_of_a_block_that_raises(self):
        folder = Path(self.create_tempdir())
        (folder / "file").write_text("old")
        for error in (ZeroDivisionError, KeyboardInterrupt):
            with self.assertRaises(error), whole.writing(folder / "file") as part:
                part.write_text("half")
                raise error
        self.assertEqual([p.name for p in folder.iterdir()], ["file"])
        self.assertEqual((folder / "file").read_text(), "old")

    def test_two_at_once(self):
        folder = Path(self.create_tempdir())
        with whole.writing(folder / "file") as one, whole.writing(folder / "file") as other:
            one.write_text("one")
            other.write_text("other")
        self.assertEqual((folder / "file").read_text(), "one")
        self.assertEqual([p.name for p in folder.iterdir()], ["file"])


class WordsTest(parameterized.TestCase):
    @sweeps.rows(
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (2**30 - 2**20, "1023.0 MiB"),
        (2**30, "1.0 GiB"),
        (3 * 2**40, "3072.0 GiB"),
    )
    def test_bytes_for_people(self, size, words):
        self.assertEqual(whole.amount(size), words)

    def error(self, *, cause=None, context=None) -> Exception:
        outer = ValueError("a checkpoint failed")
        outer.__cause__, outer.__context__ = cause, context
        return outer

    @sweeps.rows(errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    def test_a_full_disk_is_found_behind_other_errors(self, number):
        full = OSError(number, "")
        self.assertTrue(whole.disk_full(full))
        self.assertTrue(whole.disk_full(self.error(cause=full)))
        self.assertTrue(whole.disk_full(self.error(context=full)))
        self.assertTrue(whole.disk_full(self.error(context=self.error(cause=full))))
        self.assertTrue(whole.disk_full(ValueError(f"x: {os.strerror(number)}")))

    def test_no_other_error_is_one(self):
        for error in (None, OSError(errno.EACCES, ""), self.error(cause=OSError("gone"))):
            self.assertFalse(whole.disk_full(error))


WEIGHTS = {"a": np.zeros(5000, np.float32)}
VERDICTS = Verdicts(*(np.zeros(5000, int) for _ in Verdicts._fields))


class FullDiskTest(parameterized.TestCase):
    """The system refuses to write on, as on a full disk: `ulimit -f` does it to a process."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "kept.jsonl").write_text("{}\n" * 1000)

    @contextlib.contextmanager
    def full(self):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @sweeps.rows(
        ("text", lambda path: jsonl.replace(path, "x" * 5000), "4.9 KiB"),
        ("weights", lambda path: files.write(path, WEIGHTS, {"format": "pt"}), "19.5 KiB"),
        ("verdicts", lambda path: verdicts.write(path, "1", VERDICTS), "KiB"),
        (
            "imported.part-",
            lambda path: weights_folder.write(path.with_name("imported"), WEIGHTS, {}, {}),
            "19.5 KiB",
        ),
    )
    def test_is_one_sentence_and_leaves_no_half_file(self, name, write, size):
        said = (
            rf"cannot write .*{name}.* \(File too large\): it needs .*{size}, but only .* is free"
        )
        with self.full(), self.assertRaisesRegex(whole.DiskFull, f"{said} there; free some space"):
            write(self.folder / name)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["kept.jsonl"])

    def test_of_a_line_that_is_added(self):
        path = self.folder / "kept.jsonl"
        with self.full(), self.assertRaisesRegex(whole.DiskFull, "kept.jsonl .File too large.:"):
            jsonl.append(path, {"x": "y" * 5000})
        self.assertLen(jsonl.read(path), 1000)

    def test_other_errors_stay_what_they_are(self):
        with self.assertRaises(FileNotFoundError):
            jsonl.replace(self.folder / "none" / "text", "x")
