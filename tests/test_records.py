import numpy as np
from absl.testing import absltest

from jaxrobust import records


class RecordsTest(absltest.TestCase):
    def test_hashes_see_names_shapes_types_and_values(self):
        weights = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}
        variants = [
            weights,
            {"b": weights["b"], "c": weights["a"]},
            weights | {"a": np.zeros((2, 2), np.float32)},
            weights | {"a": np.zeros(4, np.int32)},
            weights | {"a": np.array([0, 0, 0, 1e-9], np.float32)},
        ]
        self.assertLen({records.weights_sha256(v, {}) for v in variants}, len(variants))
        reordered = dict(reversed(weights.items()))
        self.assertEqual(records.weights_sha256(reordered, {}), records.weights_sha256(weights, {}))

    def test_config_hash_ignores_the_order_of_keys(self):
        a, b = {"x": 1, "y": {"z": 2.5}}, {"y": {"z": 2.5}, "x": 1}
        self.assertEqual(records.config_sha256(a), records.config_sha256(b))
        self.assertNotEqual(records.config_sha256(a), records.config_sha256(a | {"x": 2}))


if __name__ == "__main__":
    absltest.main()
