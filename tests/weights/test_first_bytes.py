"""What a file of weights is, by its first bytes."""

from pathlib import Path

import numpy as np
from absl.testing import absltest
from safetensors.numpy import save_file

from jaxrobust.weights.store import files
from tests.support.modules import hidden


class FirstBytesTest(absltest.TestCase):
    def test_a_header_as_long_as_a_pickle_begins(self):
        """128 modulo 256 bytes: the first byte of the length is that of a pickle."""
        path = Path(self.create_tempdir()) / "weights.safetensors"
        array = np.arange(3, dtype=np.float32)
        lengths = set()
        for more in range(0, 512, 8):
            save_file({"a": array}, path, metadata={"note": "x" * more})
            lengths.add(path.read_bytes()[0])
            with hidden("torch"):
                np.testing.assert_array_equal(files.read(path)["a"], array)
        self.assertIn(0x80, lengths)
