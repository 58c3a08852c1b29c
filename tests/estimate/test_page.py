"""The lines for people: what they say, and that they fit."""

import pytest
from absl.testing import absltest, parameterized

from jaxrobust.config import phase
from jaxrobust.estimate import account, account_lines, elsewhere
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

    @parameterized.parameters(60, 80, 120, 200)
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

    def test_columns_are_straight(self):
        (head,) = (line for line in self.lines(200) if line.startswith("phase "))
        (row,) = (line for line in self.lines(200) if line.startswith("objective "))
        for word, below in (("pretrain", "clean"), ("low", "adversarial")):
            self.assertEqual(head.index(word), row.index(below))

    @pytest.mark.slow
    def test_a_roofline_says_what_bounds_it(self):
        lines = [" ".join(line.split()) for line in self.lines(60)]
        for row in ("roofline per step 29.1 ms, by memory traffic", "arithmetic 15.6 ms"):
            self.assertEqual(lines.count(row), 3, row)

    def test_what_a_phase_does_not_have_is_a_dash(self):
        (row,) = (line for line in self.lines(200) if line.startswith("  alarm "))
        self.assertEqual(row.split()[1], "-")  # nothing is attacked in clean training

    def test_sums_stand_under_their_heads(self):
        (row,) = (line for line in self.lines(80) if line.startswith("training "))
        money = self.found["training"]["money"]
        self.assertEndsWith(row, f"  {money:,.2f}")
        self.assertIn(f"{self.found['training']['chip_hours']:,.3g}", row)

    def test_every_assumption_is_said(self):
        text = " ".join(" ".join(self.lines(60)).split())
        for line in (*self.found["known"], *self.found["assumed"]):
            self.assertIn(line, text)

    def test_a_step_has_a_shortest_time_and_the_page_says_so(self):
        config = imagenet()
        config.model.image_size = 32
        found = account.account(config, H100, utilisation=0.2)
        self.assertEqual(found["phases"][0]["step_s"], elsewhere.SHORTEST)
        text = " ".join(account_lines.page(found).split())
        self.assertIn("A step takes 5 ms at least", text)
        self.assertIn("AutoAttack's passes are so short", text)


if __name__ == "__main__":
    absltest.main()
