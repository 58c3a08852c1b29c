"""The room's signatures, defaults and tables are the reviewed ones."""

from absl.testing import absltest

from tests.support import api


class AttacksApiTest(absltest.TestCase):
    def test_every_default_and_table_was_reviewed(self):
        """After a change that is meant: python tools/generate/refresh_api.py attacks."""
        self.assertEqual(api.differences("attacks"), [])


if __name__ == "__main__":
    absltest.main()
