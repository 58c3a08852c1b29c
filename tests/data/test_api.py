"""The room's signatures, defaults and tables are the reviewed ones."""

from absl.testing import absltest

from tests.support import api


class DataApiTest(absltest.TestCase):
    def test_every_default_and_table_was_reviewed(self):
        """After a change that is meant: python tools/generate/refresh_api.py data."""
        self.assertEqual(api.differences("data"), [])


if __name__ == "__main__":
    absltest.main()
