"""The room's signatures, defaults and tables are the reviewed ones."""

from absl.testing import absltest

from tests.support import api


class EvaluationApiTest(absltest.TestCase):
    def test_every_default_and_table_was_reviewed(self):
        """After a change that is meant: python tools/generate/refresh_api.py evaluation."""
        self.assertEqual(api.differences("evaluation"), [])


if __name__ == "__main__":
    absltest.main()
