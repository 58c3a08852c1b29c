"""The lines for people: what they say, and that they fit."""

from absl.testing import parameterized

from jaxrobust.config import phase
from jaxrobust.doctor.estimate import account, account_lines
from tests.support import sweeps
from tests.support.estimates import H100, imagenet

ROOFLINE = {
    **{"flops_s": 0.0156, "hbm_s": 0.0291, "cycles_s": 0.0211, "ici_s": 0.0012},
    "roofline_step_s": 0.0291,
    "roofline_images_per_s_per_chip": 2201.0,
    "bound_by": "hbm",
}


class PageTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        config = imagenet()
        config.phases = ("pretrain", "low", "train")
        config.low = phase(epochs=20, objective="adversarial")
        found = account.account(config, H100, utilisation=0.2)
        for row in found["phases"]:
            row["roofline"] = ROOFLINE
        cls.found = account.priced(found, 2.0)

    def lines(self, width):
        return account_lines.page(self.found, width=width).splitlines()

    @sweeps.rows(60, 80, 120, 200)
    def test_no_line_is_wider_than_the_terminal(self, width):
        self.assertLessEqual(max(map(len, self.lines(width))), width)

    def test_phases_stand_beside_each_other_as_far_as_they_fit(self):
        for width, heads in ((60, 3), (80, 2), (200, 1)):
            rows = [line.split()[1:] for line in self.lines(width) if line.startswith("phase ")]
            self.assertLen(rows, heads, width)
            self.assertEqual([w for row in rows for w in row], ["pretrain", "low", "train"])

    def test_the_gaps_between_phases_count(self):
        """What fits to the column is one table; with a column less it is two."""
        first, *_ = [i for i, line in enumerate(self.lines(300)) if line.startswith("phase ")]
        table = self.lines(300)[first:]
        widest = max(map(len, table[: table.index("")]))
        for width, heads in ((widest, 1), (widest - 1, 2)):
            rows = [line for line in self.lines(width) if line.startswith("phase ")]
            self.assertLen(rows, heads, width)


ROW = {
    **{"phase": "train", "objective": "trades", "attack_steps": 2, "images_per_epoch": 50_000},
    **{"image_size": 32, "epochs": 1_000, "steps": 390_000, "batch_size": 1_024, "mfu": 0.125},
    **{"flops_per_image": 1.234e10, "step_s": 0.0512, "images_per_s": 20_000.0, "seconds": 7_199.0},
    **{"images_per_s_per_chip": 2_500.0, "memory_bytes": 3 * 2**30, "chip_hours": 12.346},
    **{"parts_s": {"steps": 119.96, "selection": 0.25, "alarm": 0.0, "test": 7_200.0}},
    **{"activation_bytes": 99 * 2**20, "roofline": ROOFLINE, "money": 0.004},
}
RESULT = {
    **{"model": "vit_s", "dataset": "cifar10", "device": "TPU v5e", "on": "v5e:2x4", "chips": 8},
    **{"chip_memory": 16 * 2**30, "phases": [ROW], "known": ["It is known."], "assumed": ["20%."]},
    "training": {"seconds": 120.0, "chip_hours": 12.346, "money": 1_234.5},
    "autoattack": {
        **{"images": 5_000, "robust": 0.5, "passes_per_image": {"apgd-ce": 203, "fab-t": 7_000}},
        "expected": {"seconds": 0.9994, "chip_hours": 0.02, "money": 0.01},
        "at_most": {"seconds": 360_000.0, "chip_hours": 1.0, "money": 2.0},
    },
}
PAGE = """\
vit_s on cifar10, TPU v5e (v5e:2x4)

phase                    train
objective                trades, 2-step attack
images                   50,000 of 32 px
epochs                   1,000
steps                    390,000 of 1,024 images
GFLOP per image          12.3
seconds per step         0.0512
images/s                 20,000 (2,500 a chip)
share of peak FLOP/s     12.5%
memory per chip          3.0 GiB of 16 GiB
  activations, counted   99.0 MiB
roofline per step        29.1 ms, by memory traffic
  arithmetic             15.6 ms
  memory traffic         29.1 ms
  cycles                 21.1 ms
  interconnect           1.2 ms
  images/s at best       2,201 a chip
time                     120.0 min
  steps                  120.0 s
  selection split        250 ms
  test split             2.0 h
chip-hours               12.3
money                    < 0.01

                                            time  chip-hours       money
training                                 2.0 min        12.3    1,234.50
AutoAttack, 5,000 images, 50% robust      999 ms        0.02        0.01
  all robust, 7,203 passes each          100.0 h           1        2.00

It is known.
Assumed: 20%.
"""


class WholePageTest(parameterized.TestCase):
    def test_each_quantity_has_its_unit(self):
        self.assertEqual(account_lines.page(RESULT) + "\n", PAGE)

    @sweeps.rows(
        (0.0004, "0 ms"), (0.9994, "999 ms"), (1, "1.0 s"), (119.9, "119.9 s"), (120, "2.0 min"),
        (7199, "120.0 min"), (7200, "2.0 h"), (36e6, "10,000.0 h"),
    )  # fmt: skip
    def test_durations(self, seconds, text):
        self.assertEqual(account_lines.duration(seconds), text)

    @sweeps.rows(
        ({"money": 0.01}, "0.01"), ({"money": 0.0099}, "< 0.01"),
        ({"money": 12345.678}, "12,345.68"),
        ({"memory_bytes": 2**30 / 10}, "0.1 GiB of 16 GiB"),
        ({"memory_bytes": 2**30 / 10 - 1}, "102.4 MiB of 16 GiB"),
    )  # fmt: skip
    def test_money_and_bytes(self, changes, text):
        lines = account_lines.page(RESULT | {"phases": [ROW | changes]}).splitlines()
        name = "money" if "money" in changes else "memory per chip"
        self.assertIn(f"{name:25}{text}", lines)

    def test_of_several_slices(self):
        row = ROW | {"network_bytes": 2**20, "network_s": 0.0123}
        lines = account_lines.page(RESULT | {"slices": 2, "phases": [row]}).splitlines()
        self.assertEqual(lines[0], "vit_s on cifar10, TPU v5e (2 slices of v5e:2x4)")
        self.assertIn(f"{'to other slices per step':27}1.0 MiB, 12.3 ms", lines)

    def test_of_a_cpu_there_are_no_chips(self):
        row = ROW | {"attack_steps": 0, "mfu": None}
        here = RESULT | {"on": "cpu", "chips": 1, "chip_memory": None, "phases": [row]}
        lines = account_lines.page(here).splitlines()
        for line in (
            "objective                trades",
            "images/s                 20,000",
            "memory                   3.0 GiB",
        ):
            self.assertIn(line, lines)
        self.assertNotIn("chip-hours", account_lines.page(here))
        self.assertNotIn("share of peak", account_lines.page(here))

    def test_of_one_chip_and_of_a_network_that_stands(self):
        """What is told of each chip of several, or of less than all images, is not told twice."""
        attacked = RESULT["autoattack"] | {"robust": 1.0}
        result = RESULT | {"on": "h100:1", "chips": 1, "autoattack": attacked}
        lines = account_lines.page(result).splitlines()
        for line in ("images/s                 20,000", "chip-hours               12.3"):
            self.assertIn(line, lines)
        self.assertLen([line for line in lines if line.startswith("AutoAttack")], 1)
        self.assertFalse([line for line in lines if "all robust" in line])
