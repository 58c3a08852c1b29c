"""Downloads that break off: what is there is kept, and what is missing is asked for once."""

import hashlib

from absl.testing import absltest

from jaxrobust.runtime.files import download
from tests.support.servers import ServedCase

CONTENT = bytes(range(256)) * 100


class ResumeTest(ServedCase):
    def setUp(self):
        super().setUp()
        self.server.files = {"/data.bin": CONTENT}
        self.said = []

    def fetch(self, **how):
        url = f"{self.server.address}/data.bin"
        return download.fetch(url, "data", tell=self.said.append, **how)

    def test_only_what_is_missing_is_asked_for(self):
        self.server.cut_after = [10_000, 5_000]
        path = self.fetch(sha256=hashlib.sha256(CONTENT).hexdigest())
        self.assertEqual(path.read_bytes(), CONTENT)
        ranges = [asked[2] for asked in self.server.asked]
        self.assertEqual(ranges, [None, "bytes=10000-", "bytes=15000-"])
        self.assertIn("25,600 bytes, from 10,000", " ".join(self.said))
        self.assertEqual(self.left(), ["data.bin"])

    def test_a_file_of_another_hash_goes(self):
        with self.assertRaisesRegex(ValueError, "expected 00.*the same command gets it again"):
            self.fetch(sha256="00")
        self.assertEmpty(self.left())


if __name__ == "__main__":
    absltest.main()
