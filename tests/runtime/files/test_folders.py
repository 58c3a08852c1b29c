"""Folders to write to, and addresses, which are none."""

import errno
import os
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.runtime.files import caches, folders
from tests.support import sweeps


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
        words = rf"--out /there/new \({reason}\); name a folder that can be written"
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


class MountedTest(parameterized.TestCase):
    @sweeps.rows("runs/1", "/bucket/run", "../bucket/a b", "C:/runs")
    def test_a_folder(self, text):
        self.assertEqual(folders.mounted("workdir", text), Path(text))

    def test_a_bucket_is_to_be_mounted(self):
        with self.assertRaises(ValueError) as refused:
            folders.mounted("workdir", "gs://my-bucket/runs/1")
        self.assertEqual(
            str(refused.exception),
            "--workdir gs://my-bucket/runs/1 is an address, and files are written to a folder: "
            "mount the bucket on every host, mkdir -p $HOME/my-bucket && gcsfuse --implicit-dirs "
            "--metadata-cache-ttl-secs=0 my-bucket $HOME/my-bucket, and give --workdir "
            "$HOME/my-bucket/runs/1",
        )

    @sweeps.rows("s3://bucket/run", "hf://org/repo", "gs://", "gs:///run")
    def test_any_other_address(self, text):
        refusal = f"^--out {text} is an address, and .* a folder; give one, such as --out runs/1$"
        with self.assertRaisesRegex(ValueError, refusal):
            folders.mounted("out", text)
