"""What a card says of a record, number by number."""

import types

from absl.testing import absltest

from jaxrobust.convert import account


class ImagesTest(absltest.TestCase):
    def test_both_ends_are_counted(self):
        record = types.SimpleNamespace(dataset="digits", split="test", image_ids="0..7")
        self.assertEqual(account.images(record), "8 of digits, split test")
        record.image_ids = "a list"
        self.assertEqual(account.images(record), "digits, split test")


if __name__ == "__main__":
    absltest.main()
