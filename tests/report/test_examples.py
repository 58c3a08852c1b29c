"""Images in a page: which are chosen, and that they are those of the ledger and the data set."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from absl.testing import absltest
from PIL import Image

from jaxrobust.evaluation.records import verdicts
from jaxrobust.report import gathered, page
from jaxrobust.report.parts import examples
from tests.support import reports


class ExamplesTest(absltest.TestCase):
    def test_pictures_are_those_of_the_ledger_and_the_data(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder)
        images = reports.ledger(folder, {7: ("apgd-ce", 3), 9: ("apgd-t", 9), 11: ("apgd-ce", 1)})
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album().part)
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
        self.assertIn("Ties go to the smaller image number", said)

    def test_a_union_shows_what_each_threat_fooled_first(self):
        """The first threat fools 7 and 9; the second 7, 9 and 11, of which it has 11 alone."""
        for numbers in (("u1-0", "u1-1"), ("a1", "a2")):  # the union's own, or of each alone
            folder = Path(self.create_tempdir().full_path)
            threats, attacks = ("linf 0.1", "l2 0.5"), []
            for norm, epsilon in (("linf", 0.1), ("l2", 0.5)):
                ball = {"norm": norm, "epsilon": epsilon}
                attacks.append([{"name": name, "steps": 20} | ball for name in reports.ATTACKS])
                if numbers[0] == "a1":
                    number = numbers[len(attacks) - 1]
                    same = {"weights_sha256": "w", "attacks": attacks[-1]}
                    reports.evaluation(folder, number, **same)
            union = {"method": "union", "attacks": attacks[0] + attacks[1], "weights_sha256": "w"}
            after = dict(zip(threats, (58 / 60, 57 / 60), strict=True))
            union |= {"clean": 1.0, "robust": 57 / 60, "interval": None, "accuracy_after": after}
            there = reports.evaluation(folder, "u1", **union)
            fooled_by = np.full(60, "", object)
            fooled_by[[7, 9, 11]] = "linf 0.1: apgd-ce", "linf 0.1: apgd-t", "l2 0.5: apgd-ce"
            there = there._replace(clean=np.ones(60, bool), fooled_by=fooled_by.astype(str))
            verdicts.write(folder / verdicts.file_of("u1"), "u1", there)
            reports.ledger(folder, {7: ("apgd-ce", 3), 9: ("apgd-t", 9)}, numbers[0])
            reports.ledger(
                folder, {7: ("apgd-ce", 1), 9: ("apgd-t", 2), 11: ("apgd-ce", 1)}, numbers[1]
            )
            (one,) = (e for e in gathered.gather([folder]).evaluations if "u1" in str(e.record))
            _, said, tags = reports.read(examples.Album().part(one))
            alts = [own["alt"].split(",")[0] for name, own in tags if name == "img"]
            self.assertEqual(alts[::3], ["image 7", "image 9", "image 11"])
            self.assertIn("linf 0.1: apgd-t, 9 iterations", said)
            self.assertIn("l2 0.5: apgd-ce, 1 iterations", said)
            self.assertIn("The attacks of one threat come before those of the next.", said)

    def test_large_images_stay_small_in_the_page(self):
        """5,000 images of 224 pixels; the adversarial ones are noise, which PNG cannot shrink."""
        folder = Path(self.create_tempdir().full_path)
        name, shape = "fake:224x224x3:10", (224, 224, 3)
        seen = reports.evaluation(folder, n=5000, classes=10, dataset=name)
        drawn = np.random.default_rng(0)
        with (folder / "ledger-a1.images").open("wb") as file:
            for _ in range(8):
                file.write(drawn.random(shape, np.float32).tobytes())
        rows = [{"identity": {"image": shape, "norm": "linf", "epsilon": 0.25}}]
        fallen = np.flatnonzero(seen.clean & ~seen.robust)
        for image in fallen.tolist():
            about = {"attack": str(seen.fooled_by[image]), "iterations": 1 if image < 128 else 9}
            rows.append({"image": image, "fooled": True, "stored": image % 8} | about)
        hardest = fallen[(seen.fooled_by[fallen] == "apgd-t") & (fallen < 256)]
        for row in rows[1:]:  # the data set has 256 images
            row["iterations"] += 90 * (row["image"] in hardest)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "ledger-a1.jsonl").write_text(text)
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album().part)
        _, said, tags = reports.read(text)
        pictures = [own["src"] for name, own in tags if name == "img"]
        self.assertLen(pictures, 24)
        encoded = pictures[1].removeprefix("data:image/png;base64,")
        self.assertEqual(Image.open(io.BytesIO(base64.b64decode(encoded))).size, (96, 96))
        self.assertIn("Pictures are reduced to 96 pixels.", said)
        self.assertLess(len(text.encode()), 1_200_000)  # of 3 MB, which a long run fills no further

    def test_data_that_are_not_at_hand_are_a_sentence(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder, dataset="folder:/nowhere/at/all")
        reports.ledger(folder, {7: ("apgd-ce", 3)})
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album().part)
        self.assertIn("The images cannot be shown: ", text)
        self.assertNotIn("<img", text)

    def test_points_that_are_cut_off_are_a_sentence(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder)
        reports.ledger(folder, {7: ("apgd-ce", 3)})
        (file,) = folder.glob("*.images")
        file.write_bytes(file.read_bytes()[:-4])
        text = page.page(gathered.gather([folder]), pictures=examples.Album().part)
        self.assertIn("is truncated; copy it again", text)

    def test_a_full_page_shows_no_more_images(self):
        folder = Path(self.create_tempdir().full_path)
        reports.evaluation(folder)
        reports.ledger(folder, {7: ("apgd-ce", 3)})
        found = gathered.gather([folder])
        text = page.page(found, pictures=examples.Album(budget=0).part)
        self.assertIn("the page would be too large", text)
