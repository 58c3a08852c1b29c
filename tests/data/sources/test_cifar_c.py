"""The files of CIFAR-10-C are data sets of one corruption in one severity each."""

from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.data.transforms import decoding
from tests.support import sweeps


def labels(count=50_000):
    return (np.arange(count) % 10_000 * 7 % 10).astype(np.uint8)


class FilesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def write(self, kind="fog", count=50_000, dtype=np.uint8, given=None):
        """An array of which most is a hole in the file, and the labels."""
        images = np.lib.format.open_memmap(
            self.folder / f"{kind}.npy", "w+", dtype, (count, 32, 32, 3)
        )
        for row in (20_000, 20_001, min(count, 50_000) - 1):
            if row < count:
                images[row] = row % 251 + np.arange(3)
        images.flush()
        np.save(self.folder / "labels.npy", labels() if given is None else given)
        return f"cifar10-c:{self.folder}"

    def refused(self, said, split="fog-3", name=None):
        with self.assertRaisesRegex(data.DataError, said) as caught:
            data.open_source(name or f"cifar10-c:{self.folder}", split)
        self.assertNotIn("\n", str(caught.exception))

    @sweeps.rows(10_000, 50_000)
    def test_rows_of_a_severity(self, count):
        name = self.write(given=labels(count))
        source = data.open_source(name, "fog-3")
        self.assertEqual((len(source), source.num_classes), (10_000, 10))
        self.assertEqual((source.split, source.image_shape), ("fog-3", (32, 32, 3)))
        np.testing.assert_array_equal(source.labels, labels(10_000))
        for index, record in zip((1, 0), source.read([1, 0]), strict=True):
            image = decoding.decode(record.image, channels=3)
            value = (20_000 + index) % 251 + np.arange(3)
            np.testing.assert_array_equal(image, np.broadcast_to(value, (32, 32, 3)))
            self.assertEqual(record.label, 7 * index % 10)
        last = data.open_source(name, "fog-5")[9_999]
        self.assertEqual(decoding.decode(last.image, channels=3)[0, 0, 0], 49_999 % 251)

    def test_a_record_is_named_by_its_row_in_the_file(self):
        source = data.open_source(self.write(), "fog-3")
        self.assertEqual(source.describe(7), f"row 20007 of {self.folder}/fog.npy")

    def test_labels_of_the_severity_itself(self):
        given = labels()
        given[20_000:30_000] = 3
        self.assertEqual(data.open_source(self.write(given=given), "fog-3")[5].label, 3)
        self.assertEqual(data.open_source(f"cifar10-c:{self.folder}", "fog-2")[5].label, 5)

    def test_a_part(self):
        name = self.write()
        source = data.open_source(name, "fog-3[1:3]")
        self.assertLen(source, 2)
        self.assertEqual(decoding.decode(source[0].image, channels=3)[0, 0, 0], 20_001 % 251)

    def test_identity_follows_the_content(self):
        sums = {data.open_source(self.write(), f"fog-{s}").files_sha256 for s in (2, 3, 4)}
        self.assertLen(sums, 2)  # severities 2 and 4 hold nothing, and the same labels

    def test_files_that_were_replaced_are_read_again(self):
        """In one process: `labels.npy` of before was remembered."""
        name = self.write()
        before = data.open_source(name, "fog-3")
        new, images = labels(10_000)[::-1], self.folder / "new.npy"
        self.write(given=new)
        after = data.open_source(name, "fog-3")
        np.testing.assert_array_equal(after.labels, new)
        self.assertEqual([record.label for record in after.read([0, 1])], new[:2].tolist())
        np.save(images, np.full((50_000, 32, 32, 3), 9, np.uint8))
        images.replace(self.folder / "fog.npy")
        last = data.open_source(name, "fog-3")
        self.assertEqual(decoding.decode(last[0].image, channels=3)[0, 0, 0], 9)
        self.assertLen({each.files_sha256 for each in (before, after, last)}, 3)

    def test_another_length(self):
        self.write(count=10_000)
        self.refused(r"fog.npy is uint8\[10000, 32, 32, 3\], not uint8\[50000, 32, 32, 3\]")

    def test_another_type(self):
        self.write(dtype=np.float32)
        self.refused(r"fog.npy is float32\[50000.*download CIFAR-10-C again")

    def test_no_labels(self):
        self.write()
        (self.folder / "labels.npy").unlink()
        self.refused("has no labels.npy in .*; download CIFAR-10-C again")

    @parameterized.parameters(
        (np.zeros(9_999, np.uint8), r"uint8\[9999\], not the 10000 or 50000 labels"),
        (np.zeros(10_000, np.float32), r"float32\[10000\]"),
        (np.full(10_000, 10, np.uint8), "labels outside 0 to 9"),
    )
    def test_other_labels(self, given, said):
        self.write(given=given)
        self.refused(said)

    def test_no_such_corruption_or_file(self):
        self.write()
        self.refused("has no snow.npy in", "snow-1")
        self.refused("no split 'fgo-1': there is no corruption 'fgo'; did you mean fog", "fgo-1")
        self.refused("no split 'fog-6': fog has no severity '6'", "fog-6")
        for split in ("test", "fog", "all-1"):
            self.refused("name one corruption and severity, such as fog-3", split)
        self.refused("there is no folder .*nowhere", name="cifar10-c:nowhere")

    def test_damaged(self):
        self.write()
        (self.folder / "fog.npy").write_bytes(b"no array")
        self.refused("fog.npy is damaged, or not a .npy file")
