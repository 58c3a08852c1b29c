"""What the hosts' cores decode beside what the chips want, by hand."""

from absl.testing import parameterized

from jaxrobust.config import base
from jaxrobust.doctor.estimate import feeding
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.doctor.estimate.work import PhaseWork, SizedSplit
from jaxrobust.runtime.devices import hardware
from tests.support import sweeps


def target(kind, chips):
    return Target("there", kind, chips, hardware.chip(kind), False, False)


def phase(augmentation="heavy", name="imagenet2012", size=224):
    config = base().unlock()
    config.data.update(name=name, augmentation=augmentation)
    config.model.image_size = size
    split = SizedSplit(1_281_167, None)
    return PhaseWork("train", config, split, 1_281_167, 100, 0, 1, split, split)


class FeedingTest(parameterized.TestCase):
    @sweeps.rows(
        ("heavy", "imagenet2012", 224, 405_000 / 405),
        ("basic", "tfds:imagenet2012", 224, 405_000 / 546),
        ("resized-crop|flip|randaugment", "imagenet2012", 224, 405_000 / 405),  # heavy's chain
        ("crop|flip", "imagenet2012", 224, None),
        ("basic", "cifar10", 224, None),
        ("basic", "imagenet2012", 64, None),
        ("basic", "imagenet2012", 288, None),  # larger ones take longer, how much is not known
    )
    def test_cores(self, augmentation, name, size, expected):
        self.assertEqual(feeding.cores(phase(augmentation, name, size), 405_000), expected)

    def test_hosts_that_are_too_slow(self):
        # 16 chips are in 4 hosts of 112 cores, of which 108 decode 405 images/s each.
        line = feeding.line(phase(), target("TPU v5e", 16), 200_000)
        self.assertEqual(
            line,
            "WARNING: train: 200,000 images/s keep 494 cores busy with decoding and "
            "data.augmentation=heavy, and there are 432 on 4 hosts: the chips wait for data 13% of "
            "the time at least; take a cheaper data.augmentation.",
        )

    def test_hosts_that_are_fast_enough(self):
        line = feeding.line(phase(), target("TPU v5e", 16), 174_000)
        end = "430 cores busy with decoding and data.augmentation=heavy, of 432 on 4 hosts."
        self.assertEndsWith(line, end)
        line = feeding.line(phase(), target("TPU v5e", 2), 40_500)  # half of a host
        self.assertStartsWith(line, "WARNING: train: 40,500 images/s keep 100 cores")
        self.assertIn("there are 52 on 1 host:", line)

    def test_hosts_of_which_nothing_is_known(self):
        line = feeding.line(phase(), target("NVIDIA H100 SXM", 8), 40_500)
        self.assertEndsWith(line, "=heavy, 12.5 for each NVIDIA H100 SXM.")
        self.assertIsNone(feeding.line(phase("crop"), target("NVIDIA H100 SXM", 8), 40_500))

    def test_what_is_measured_with_its_data(self):
        here = target("TPU v5e", 16)._replace(here=True)
        self.assertIsNone(feeding.line(phase(), here, 200_000))

    def test_hosts_of_slices(self):
        """Of ct4p, ct5lp-hightpu-4t, ct5p-hightpu-4t and ct6e-standard-4t, four chips each."""
        found = {kind: (host.chips, host.cores) for kind, host in feeding.HOSTS.items()}
        cores = {"TPU v4": 240, "TPU v5e": 112, "TPU v5p": 208, "TPU v6e": 180}
        ironwood = {"TPU7x": (8, 224)}  # whose chips JAX counts twice
        self.assertEqual(found, {kind: (4, many) for kind, many in cores.items()} | ironwood)
        for kind, many in cores.items():  # 16 chips are four hosts
            there = 4 * (many - 4)
            line = feeding.line(phase(), target(kind, 16), 405)
            self.assertIn(f"of {there:,} on 4 hosts", line)
