"""Files that are written whole or not at all, and who may read them."""

import os
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust.data.splits import subsets
from jaxrobust.runtime.files import jsonl, whole
from jaxrobust.weights.store import files
from jaxrobust.weights.store import folder as weights_folder


def modes(folder: Path) -> dict[str, str]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): oct(p.stat().st_mode & 0o777) for p in found}


class PermissionsTest(parameterized.TestCase):
    @parameterized.parameters((0o022, "0o644"), (0o027, "0o640"), (0o077, "0o600"))
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


if __name__ == "__main__":
    absltest.main()
