"""Files of JSON lines: which damage is a kill's, and which is not."""

from pathlib import Path
from unittest import mock

from absl.testing import absltest

from jaxrobust.runtime.files import jsonl


class ReadTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "rows.jsonl"

    def test_a_last_line_that_was_cut_off_does_not_count(self):
        self.assertEqual(jsonl.read(self.path), [])
        self.path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
        self.assertEqual(jsonl.read(self.path), [{"a": 1}, {"a": 2}])
        jsonl.append(self.path, {"a": 3})
        self.assertEqual(self.path.read_text(), '{"a": 1}\n{"a": 2}\n{"a": 3}\n')
        self.path.write_text('{"a": 1}')  # it lacks its end alone
        jsonl.append(self.path, {"a": 2})
        self.assertEqual(jsonl.read(self.path), [{"a": 1}, {"a": 2}])

    def test_a_line_that_was_added_is_on_the_disk(self):
        seen = []
        with mock.patch.object(jsonl.os, "fsync") as synced:
            synced.side_effect = lambda file: seen.append(self.path.read_text())
            jsonl.append(self.path, {"a": 1})
        self.assertEqual(seen, ['{"a": 1}\n'])

    def test_a_line_that_ends_is_damaged_wherever_it_stands(self):
        for damaged, number in (('{"a": 1}\n{"a": \n', 2), ('{"a": \n{"a": 1}\n', 1), ("[1]\n", 1)):
            self.path.write_text(damaged)
            with self.assertRaisesRegex(ValueError, f"line {number} is damaged .*remove that line"):
                jsonl.read(self.path)
