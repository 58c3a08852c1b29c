"""What a folder of photographs is taken for before its images are looked at."""

from pathlib import Path

from absl.testing import parameterized

from jaxrobust.data.prepare import class_folders
from tests.support import sweeps


class FlatTest(parameterized.TestCase):
    @sweeps.rows(
        (["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"], True),
        (["ILSVRC2012_val_00000001.JPEG", "Thumbs.db"], True),
        (["n01440764", "Thumbs.db"], False),
        ([], False),
    )
    def test_validation_images_without_classes_are_known_by_one_name(self, names, expected):
        folder = Path(self.create_tempdir())
        for name in names:
            (folder / name).touch()
        self.assertEqual(class_folders.is_flat(folder), expected)
