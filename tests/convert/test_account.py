"""What a card says of a record, number by number."""

from absl.testing import absltest

from jaxrobust.convert import account


class ImagesTest(absltest.TestCase):
    def test_both_ends_are_counted(self):
        record = {"dataset": "digits", "split": "test", "image_ids": "0..7"}
        self.assertEqual(account.images(record), "8 of digits, split test")
        self.assertEqual(account.images(record | {"image_ids": "a list"}), "digits, split test")


if __name__ == "__main__":
    absltest.main()
