"""Folders to write to."""

import errno
import os
from pathlib import Path
from unittest import mock

from absl.testing import absltest

from jaxrobust.runtime.files import caches, folders


class CacheTest(absltest.TestCase):
    def test_is_where_the_system_keeps_its_own(self):
        with mock.patch.dict(os.environ, XDG_CACHE_HOME="/kept", HOME="/made/up"):
            self.assertEqual(caches.folder("weights"), Path("/kept/jaxrobust/weights"))
            for nothing in ({"XDG_CACHE_HOME": ""}, None):
                os.environ.update(nothing or {})
                if nothing is None:
                    del os.environ["XDG_CACHE_HOME"]
                self.assertEqual(caches.folder("data"), Path("/made/up/.cache/jaxrobust/data"))


class SimilarTest(absltest.TestCase):
    def test_a_path_beside_it(self):
        folder = Path(self.create_tempdir())
        (folder / "quickstart").mkdir()
        near = f"; did you mean {folder / 'quickstart'}?"
        self.assertEqual(folders.similar(folder / "quikstart"), near)
        for other in (folder / "quickstart", folder / "nothing", folder / "nowhere" / "quickstart"):
            self.assertEqual(folders.similar(other), "")


class WritingTest(absltest.TestCase):
    def test_a_folder_that_cannot_be_written(self):
        there, reason = Path("/there/new"), os.strerror(errno.EROFS)
        words = rf"--out /there/new \({reason}\); name a writable folder"
        with (
            mock.patch.object(Path, "mkdir", side_effect=OSError(errno.EROFS, reason, "/there")),
            self.assertRaisesRegex(ValueError, words),
            folders.writing("out", there),
        ):
            there.mkdir()

    def test_a_full_disk_stays_one(self):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with self.assertRaises(OSError) as raised, folders.writing("out", Path("x")):
            raise full
        self.assertIs(raised.exception, full)


class RenamesTest(absltest.TestCase):
    def test_a_flat_bucket_mounted_by_gcsfuse(self):
        """Which renames files, but no folder with a file in it."""
        folder = Path(self.create_tempdir())
        folders.check_renames("workdir", folder)
        words = os.strerror(errno.EMFILE)
        with (
            mock.patch.object(Path, "rename", side_effect=OSError(errno.EMFILE, words)),
            self.assertRaisesRegex(
                ValueError,
                rf"^--workdir {folder} is on a file system that cannot rename folders \({words}\), "
                "such as a flat bucket mounted by gcsfuse: give --workdir gs://BUCKET/FOLDER, or "
                "mount a bucket with a hierarchical namespace .*--enable-hierarchical-namespace",
            ),
        ):
            folders.check_renames("workdir", folder)
        self.assertEmpty(list(folder.iterdir()))
