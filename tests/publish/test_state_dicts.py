"""State dicts for PyTorch are byte for byte what they were, for every family."""

import hashlib
import json

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import paths, small_networks

GOLDEN = json.loads((paths.GOLDEN / "models" / "torch_state_dicts.json").read_text())


def digest(state) -> str:
    """Hash names, types, shapes and bytes, in their order."""
    digest = hashlib.sha256()
    for name, array in state.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class StateDictTest(parameterized.TestCase):
    @parameterized.parameters(*small_networks.ROWS)
    def test_bytes(self, label):
        name, _, own = small_networks.ROWS[label]
        net, rng = models.create(name, **small_networks.options(label)), np.random.default_rng(5)
        params, stats = (
            {key: rng.standard_normal(part[key].shape).astype(np.float32) for key in sorted(part)}
            for part in jax.eval_shape(net.init, jax.random.key(0))
        )
        state = convert.reference_names(name, params | stats, wrapped=True, **own)
        self.assertEqual(digest(state), GOLDEN[label]["wrapped"])
        if "to_torch" in GOLDEN[label]:  # not where the size of images decides the names' shapes
            plain = np.zeros(3, np.float32), np.ones(3, np.float32)
            stats |= dict(zip(("normalize.mean", "normalize.std"), plain, strict=True))
            state = convert.to_torch(name, params, stats, **own)
            self.assertEqual(digest(state), GOLDEN[label]["to_torch"])


if __name__ == "__main__":
    absltest.main()
