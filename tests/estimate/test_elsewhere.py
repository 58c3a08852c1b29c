"""What chips take that are not here: against arithmetic by hand."""

import json

import pytest
from absl.testing import absltest, parameterized

from jaxrobust.estimate import account
from jaxrobust.models.table import multiply_adds
from tests.support import sweeps
from tests.support.estimates import H100, NET, SHAPES, imagenet


class ElsewhereTest(parameterized.TestCase):
    def test_time_is_operations_over_peak_and_utilisation(self):
        found = account.account(imagenet(), H100, utilisation=0.01)
        adds = multiply_adds(NET, *SHAPES, image_size=224)
        clean, train = found["phases"]
        by_hand = 3 * 2 * adds * 1024 / (8 * 989e12 * 0.01)
        self.assertAlmostEqual(clean["step_s"] / by_hand, 1, delta=1e-6)
        # Two steps of APGD are five passes to the image, and the update costs three.
        self.assertAlmostEqual(train["step_s"] / by_hand, (2 * 2 + 4) / 3, delta=1e-6)
        self.assertAlmostEqual(clean["mfu"], 0.01)
        self.assertAlmostEqual(clean["parts_s"]["steps"], 125_100 * by_hand, delta=1e-3)
        total = sum(row["seconds"] for row in found["phases"])
        self.assertAlmostEqual(found["training"]["chip_hours"], 8 * total / 3600)
        self.assertFalse(found["measured"])
        self.assertIn("reach 1% of", found["assumed"][0])
        self.assertTrue(any("imagenet2012 is not here" in line for line in found["assumed"]))

    @pytest.mark.slow
    def test_half_the_utilisation_takes_twice_as_long(self):
        half, whole = (
            account.account(imagenet(), H100, utilisation=u)["training"]["hours"]
            for u in (0.004, 0.008)
        )
        self.assertAlmostEqual(half / whole, 2)

    @pytest.mark.slow
    def test_state_is_parameters_average_and_two_moments(self):
        config = imagenet()
        four = 4 * 4 * sum(array.size for array in SHAPES[0].values())
        whole = account.account(config, H100, utilisation=0.2)["phases"][0]["memory_bytes"]
        self.assertAlmostEqual(whole / four, 1, delta=1e-3)
        config.mesh.fsdp = 0
        shared = account.account(config, H100, utilisation=0.2)["phases"][0]["memory_bytes"]
        self.assertAlmostEqual(shared / whole, 1 / 8, delta=1e-3)

    def test_a_batch_that_the_chips_do_not_divide_is_refused(self):
        with self.assertRaisesRegex(ValueError, "batch_size=1024 cannot be split over 3 devices"):
            account.account(imagenet(), H100._replace(chips=3), utilisation=0.2)

    def test_every_batch_has_to_be_divided(self):
        for key in ("evaluation", "test"):
            config = imagenet()
            config[key].batch_size = 12
            with self.assertRaisesRegex(ValueError, f"{key}.batch_size=12 cannot be split over 8"):
                account.account(config, H100, utilisation=0.2)

    def test_chips_that_share_the_state_are_a_divisor(self):
        config = imagenet()
        config.mesh.fsdp = 3
        with self.assertRaisesRegex(
            ValueError, "mesh.fsdp=3 does not divide the 8 chips; one of 1, 2, 4, 8"
        ):
            account.account(config, H100, utilisation=0.2)

    def test_what_training_refuses_of_a_chips_share_is_refused(self):
        config = imagenet()
        config.train.microbatches = 3
        with self.assertRaisesRegex(ValueError, "microbatches=3 does not divide the 128 images"):
            account.account(config, H100, utilisation=0.2)

    def test_a_state_that_no_chip_holds_is_refused(self):
        chip = H100.chip._replace(memory=10**5)
        with self.assertRaisesRegex(
            ValueError, "GiB of a chip that has 0; share them with --fsdp 0"
        ):
            account.account(imagenet(), H100._replace(chip=chip), utilisation=0.2)

    @sweeps.fast(0)
    @parameterized.parameters(
        ("TPU v5e", 8, False, "pip install 'jaxrobust[tpu-aot]'"),
        ("TPU v5e", 1, False, "libtpu compiles for four chips at least"),
        ("TPU v5e", 8, True, "was not compiled."),  # --fast
        ("NVIDIA H100 SXM", 8, False, "was not compiled."),
    )
    def test_why_memory_is_that_of_the_state_alone(self, kind, chips, compiles, said):
        on = H100._replace(kind=kind, chips=chips, compiles=compiles)
        found = account.account(imagenet(), on, utilisation=0.2, images=0)
        self.assertIn(said, " ".join(found["assumed"]))

    def test_price_counts_every_chip_hour(self):
        found = account.account(imagenet(), H100, utilisation=0.2)
        priced = account.priced(found, 2.5)
        for part in (*priced["phases"], priced["training"], priced["autoattack"]["expected"]):
            self.assertAlmostEqual(part["money"], 2.5 * part["chip_hours"])
        self.assertNotIn("money", json.dumps(found))


if __name__ == "__main__":
    absltest.main()
