"""Every number of a bundle, changed by one: what it is accused of; and nothing as it is."""

import copy

import numpy as np
from absl.testing import parameterized
from scipy.stats import beta

from jaxrobust.evaluation.bundles import contradictions
from tests.support import sweeps


def clopper_pearson(successes: int, n: int) -> list[float]:
    """The exact 95% interval, by its formula."""
    low = beta.ppf(0.025, successes, n - successes + 1) if successes else 0.0
    high = beta.ppf(0.975, successes + 1, n - successes) if successes < n else 1.0
    return [float(low), float(high)]


def row(image: int, verdict: str) -> dict:
    own = {"image": image, "label": image % 3, "verdict": verdict, "sha256": "0f" * 32}
    stored = {"file": "differences-0.bin", "offset": 10 * image, "bytes": 10, "levels": 127}
    return own | (stored | {"step": 0.0} if verdict not in ("", "clean") else {})


# 5 of 8 images are right; the attacks fool one, one, and one more where both begin again.
ROWS = [row(i, v) for i, v in enumerate(["", "clean", "a", "b", "b (full)", "", "clean", "clean"])]
RECORD = {
    "image_ids": "0..7",
    "attacks": [{"name": name, "norm": "linf", "epsilon": 0.1} for name in "ab"],
    "model": {"num_classes": 3, "image_size": 2},
    "clean": 5 / 8,
    "robust": 2 / 8,
    "interval": {"clean": clopper_pearson(5, 8), "robust": clopper_pearson(2, 8)},
    "accuracy_after": {"a": 4 / 8, "b": 3 / 8, "full": 2 / 8},
    "costs": [{"attack": name, "fooled": 1} for name in ("a", "b", "full")],
    "fingerprint": {},
}
ABOUT = {"schema": 2, "image": [2, 2, 1], "split_images": 8, "record": RECORD}
SIZES = {"differences-0.bin": 50}


def fault(place: str, value: object) -> str | None:
    """The fault of the bundle whose `part.key.key` has this value."""
    bundle = copy.deepcopy({"about": ABOUT, "rows": ROWS, "sizes": SIZES})
    *path, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    target = bundle
    for key in path:
        target = target[key]
    target[last] = value
    return contradictions.fault(**bundle)


class FaultTest(parameterized.TestCase):
    def test_none(self):
        self.assertIsNone(contradictions.fault(ABOUT, ROWS, SIZES))
        self.assertEqual(contradictions.lacking(ABOUT), [])

    @sweeps.rows(
        ("rows", [], "has no images"),
        ("rows/1", 7, "has 7 in line 2, which is not an object"),
        ("rows/1/label", True, "has the invalid label True in line 2"),
        ("rows/2/step", float("nan"), "has the invalid step nan in line 3"),
        ("rows/2/levels", 1.0, "has the invalid levels 1.0 in line 3"),
        ("rows/0/image", -1, "has image -1, but images are"),
        ("rows/0/image", 1, "has image 1 twice"),
        ("rows/7/image", 8, "has image 8, but its record covers 8 images, 0..7"),
        ("about/record/image_ids", "1..8", "covers images '1..8'"),
        ("about/record/image_ids", "0..8", "lacks 1 of the 9 images of its record, such as 8"),
        ("about/split_images", 7, "covers 8 images of a split with 7"),
        ("about/split_images", None, "covers 8 images of a split with None"),
        ("about/record/attacks", [], "lacks attacks"),
        ("about/record/attacks/1/epsilon", 0.2, "has attacks with several norms or radii"),
        ("about/record/attacks/1/norm", "l2", "has attacks with several norms or radii"),
        (
            "about/record/attacks/0/norm",
            "l3",
            "has the norm 'l3', which is not one of linf, l2, l1, l0",
        ),
        ("about/record/attacks/0", {"norm": "l0", "epsilon": 2.5}, "has the invalid radius 2.5"),
        ("about/record/attacks/0/epsilon", 0, "has the invalid radius 0"),
        ("about/image", [2, 2], r"has the invalid image shape \[2, 2\]"),
        ("about/image", [2, 2, 0], r"has the invalid image shape \[2, 2, 0\]"),
        ("about/image", [2, 3, 1], "but its record says 2 pixels"),
        ("rows/2/verdict", "c", "has the verdict 'c' on image 2"),
        ("rows/2/verdict", "replay", "has the verdict 'replay' on image 2"),
        ("rows/2/label", 3, "has the label 3 for image 2, which is not a class"),
        ("rows/2/label", -1, "has the label -1 for image 2, which is not a class"),
        ("rows/2/sha256", "0F" * 32, "has the invalid sha256 .* for image 2"),
        ("rows/2/file", "differences-1.bin", "a file that SHA256SUMS does not list"),
        ("rows/4/bytes", 11, "at bytes 40 to 51 of differences-0.bin, which has only 50"),
        ("rows/4/bytes", 0, "at bytes 40 to 40"),
        ("rows/2/offset", -1, "at bytes -1 to 9"),
        ("rows/2/levels", 128, "has invalid levels for image 2: 128 of"),
        ("rows/2/levels", -1, "has invalid levels for image 2: -1 of"),
        ("rows/2/step", -0.5, "has invalid levels for image 2: 127 of -0.5"),
        ("about/record/robust", 3 / 8, "has 2 robust images of 8, but its record says 37.50%"),
        ("about/record/clean", 4 / 8, "has 5 correctly classified images of 8, .* says 50.00%"),
        ("about/record/clean", None, "has 5 correctly classified images of 8, .* says None"),
        ("about/record/interval/robust", clopper_pearson(2, 9), "as the 95% interval of robust"),
        ("about/record/interval/clean", [0.5], "as the 95% interval of clean"),
        ("about/record/accuracy_after/a", 5 / 8, "gives 0.625 after a, but its rows give 0.5"),
        ("about/record/accuracy_after/b", 4 / 8, "gives 0.5 after b, but its rows give 0.375"),
        (
            "about/record/accuracy_after",
            {"b": 0.5, "full": 0.25},
            "gives accuracies after b, full, not",
        ),
        ("about/record/costs/1/fooled", 2, "says that b fooled 2 images, but has 1"),
        ("about/record/costs/2/attack", "b", "says that b fooled 2 images, but has 1"),
        ("about/record/costs/2/attack", "c", "says that full fooled None images, but has 1"),
        (
            "about/record/costs",
            [*RECORD["costs"], {"attack": "c", "fooled": 1}],
            "says that c fooled 1 images, but has 0",
        ),
    )
    def test_what_is_wrong(self, place, value, said):
        self.assertRegex(fault(place, value) or "nothing", said)

    @sweeps.rows(
        ("about/schema", 1),
        ("about/split_images", 9),
        ("rows/4/bytes", 9),
        ("rows/2/levels", 0),
        ("rows/2/step", 1),
        ("about/record/model/image_size", None),
        ("about/record/model/num_classes", None),
        ("about/record/interval", None),
        ("about/record/costs", None),
        ("about/record/robust", 2 / 8 + 9e-7),
    )
    def test_what_may_be(self, place, value):
        self.assertIsNone(fault(place, value))

    def test_what_older_ones_lack(self):
        about = ABOUT | {"record": RECORD | {"costs": None}}
        del about["split_images"]
        lacking = [
            "the number of images in its split",
            "the number of images that each attack fooled",
        ]
        self.assertEqual(contradictions.lacking(about), lacking)

    @sweeps.rows((0, 1), (1, 1), (0, 9), (9, 9), (3, 40), (731, 1000))
    def test_interval(self, successes, n):
        ours = contradictions.interval(successes, n)
        np.testing.assert_allclose(ours, clopper_pearson(successes, n), atol=1e-9)
