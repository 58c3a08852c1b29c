"""What architectures refuse, at both sides of each limit."""

from types import SimpleNamespace

from absl.testing import parameterized

from jaxrobust.models.interface import architecture_checks as checks
from tests.support import sweeps

ROW = SimpleNamespace(dim=8, depths=(1, 2), dims=(4, 8), none=(), zero=(1, 0), one=(3,))


class ChecksTest(parameterized.TestCase):
    @sweeps.rows(
        (checks.check_least, {"dim": 8}, None),
        (checks.check_least, {"dim": 9}, "dim=8 must be at least 9"),
        (checks.check_tuples, "depths", None),
        (checks.check_tuples, "none", r"none=\(\) must be a tuple of positive integers"),
        (checks.check_tuples, "zero", r"zero=\(1, 0\) must be a tuple of positive integers"),
        (checks.check_stages, "depths dims", None),
        (checks.check_stages, "depths one", r"one=\(3,\) and depths=\(1, 2\) must have the same"),
        (checks.check_stages, "depths zero", "zero"),
    )
    def test_refused(self, check, given, said):
        names = given.split() if isinstance(given, str) else ()
        how = given if isinstance(given, dict) else {}
        first = ROW if names or how else given
        if said is None:
            return check(first, *names, **how)
        with self.assertRaisesRegex(ValueError, said):
            check(first, *names, **how)

    def test_nothing_may_stand_where_empty_is_allowed(self):
        checks.check_tuples(ROW, "none", empty=True)
        with self.assertRaisesRegex(ValueError, "zero"):
            checks.check_tuples(ROW, "zero", empty=True)

    def test_positions_belong_to_one_size_of_images(self):
        images = SimpleNamespace(shape=(2, 8, 12, 3))
        checks.check_fits(True, images, "6 tokens", "positions for 4")
        said = (
            "^images of 8x12 px give 6 tokens, but this network has positions for 4; create it, and"
        )
        with self.assertRaisesRegex(ValueError, said):
            checks.check_fits(False, images, "6 tokens", "positions for 4")

    @sweeps.rows((6, 1), (24, 4))
    def test_whole_patches(self, size, patches):
        self.assertEqual(checks.whole_patches(SimpleNamespace(stem_strides=(2, 3)), size), patches)

    @sweeps.rows((1, 6), (5, 6), (20, 18), (22, 24))
    def test_the_nearest_whole_number_of_patches(self, size, near):
        with self.assertRaisesRegex(ValueError, f"patches of 6 px; use image_size={near},"):
            checks.whole_patches(SimpleNamespace(stem_strides=(2, 3)), size)
