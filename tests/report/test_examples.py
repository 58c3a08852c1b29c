"""Images in a page: which are chosen, and that they are those of the ledger and the data set."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from absl.testing import absltest
from PIL import Image

from jaxrobust.data import Prepared, sources
from jaxrobust.report import examples, gathered, page
from jaxrobust.report.examples import Fooled
from tests.support import reports


def ledger(folder: Path, fooled: dict[int, tuple[str, int]], number: str = "a1") -> np.ndarray:
    """Write a ledger of digits, whose adversarial images are 0.25 brighter; return the images."""
    source = sources.open_source("digits", "test")
    images = Prepared(source, image_size=8, preprocessing="none", images=60)[:]
    rows = [{"identity": {"image": [8, 8, 1], "norm": "linf", "epsilon": 0.25}}]
    with (folder / f"ledger-{number}.images").open("wb") as file:
        for stored, (image, (attack, iterations)) in enumerate(fooled.items()):
            file.write(np.minimum(images[image] + 0.25, 1).astype(np.float32).tobytes())
            verdict = {"image": image, "attack": attack, "fooled": True, "stored": stored}
            rows.append(verdict | {"iterations": iterations, "flat": False})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"ledger-{number}.jsonl").write_text(lines)
    return images


class ExamplesTest(absltest.TestCase):
    def test_pictures_are_those_of_the_ledger_and_the_data(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder)
        images = ledger(folder, {7: ("apgd-ce", 3), 9: ("apgd-t", 9), 11: ("apgd-ce", 1)})
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album(found.runs).part)
        _, said, tags = reports.read(text)
        seen = {own["alt"]: own["src"] for name, own in tags if name == "img"}
        self.assertLen(seen, 9)
        alts = list(seen)
        self.assertEqual(
            [alts[at].split(",")[0] for at in (0, 3, 6)], ["image 11", "image 7", "image 9"]
        )
        for at, wanted in ((3, images[7]), (4, np.minimum(images[7] + 0.25, 1))):
            encoded = seen[alts[at]].removeprefix("data:image/png;base64,")
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
            np.testing.assert_allclose(pixels / 255, wanted[..., 0], atol=0.5 / 255 + 1e-6)
        self.assertIn("apgd-t, 9 iterations, amplified 2 times", said)
        self.assertIn("Ties go to the smaller number", said)

    def test_the_rule(self):
        rows = [(3, "a", 2), (1, "a", 2), (2, "a", 1), (5, "b", 4), (6, "b", 7), (4, "b", 7)]
        found = [Fooled(i, attack, k, Path(), 0) for i, attack, k in rows]
        easy, hard = examples.choose(found, ["a", "b"])
        self.assertEqual([f.image for f in easy], [2, 1, 3])
        self.assertEqual([f.image for f in hard], [4, 6, 5])

    def test_data_that_are_not_at_hand_are_a_sentence(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder, dataset="folder:/nowhere/at/all")
        ledger(folder, {7: ("apgd-ce", 3)})
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album(found.runs).part)
        self.assertIn("Its images cannot be shown: ", text)
        self.assertNotIn("<img", text)

    def test_a_full_page_shows_no_more_images(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder)
        ledger(folder, {7: ("apgd-ce", 3)})
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album(found.runs, budget=0).part)
        self.assertIn("the page would be too large", text)


if __name__ == "__main__":
    absltest.main()
