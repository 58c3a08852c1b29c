"""kill -9 in the middle of a run changes nothing; `tools/bench_resume.py` does it more often."""

import tempfile
from pathlib import Path

import pytest
from absl.testing import absltest

from tools import bench_resume


@pytest.mark.matrix
class KillsTest(absltest.TestCase):
    def test_ends_in_the_same_bits(self):
        with tempfile.TemporaryDirectory() as folder:
            found = bench_resume.kills(Path(folder), 4, seed=1)
        self.assertLen(found["kills"], 4)
