"""Bundles of common corruptions: what is confirmed, what is found out, and the program in them."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.bundles import bundle, claims, findings
from jaxrobust.evaluation.network import checks
from tests.support import bundles, corrupted_bundles, sweeps
from tests.support.corrupted_bundles import NAMES, SPLIT

N, TORCH = bundles.N, importlib.util.find_spec("torch") is not None


class Case(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.honest = corrupted_bundles.corrupted(cls.root)

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "bundle"
        shutil.copytree(self.honest.folder, self.folder)

    def judged(self, net=bundles.logits, *, shown=None, **how):
        read = claims.read(self.folder)
        how = {"count": SPLIT, "labels": np.resize(self.honest.labels, SPLIT), "batch": 9} | how
        judged = findings.judge(read, shown or self.honest.shown, net, **how)
        return judged, "\n".join(findings.lines(read, judged))

    def read(self) -> str:
        """Return why the folder is not a bundle."""
        with self.assertRaises(ValueError) as caught:
            claims.read(self.folder)
        return str(caught.exception)


class JudgedTest(Case):
    def test_everything_is_confirmed(self):
        found, said = self.judged()
        right = np.stack([self.honest.right[name] for name in NAMES[1:]], axis=1)
        mean = right.mean(axis=1)
        self.assertTrue(found.whole)
        self.assertEqual((found.answers, found.confirmed), (4 * N, 4 * N))
        self.assertEqual((found.undecided, found.unconfirmed), (0, {}))
        self.assertAlmostEqual(found.mean, right.mean(), places=12)
        half = 1.959963984540054 * mean.std(ddof=1) / N**0.5
        np.testing.assert_allclose(found.interval, [mean.mean() - half, mean.mean() + half])
        self.assertGreater(np.ptp(right.mean(axis=0)), 0)  # corruptions differ
        self.assertIn(f"claim: 1 - mean error {right.mean():.2%}, clean accuracy", said)
        self.assertIn(f"{4 * N} of {4 * N} answers: confirmed", said)
        self.assertIn("Confirmed: the accuracy on these images under these corruptions is", said)

    def test_a_record_without_clean_images(self):
        with tempfile.TemporaryDirectory() as directory:
            self.honest = corrupted_bundles.corrupted(Path(directory), clean=False)
            self.folder = self.honest.folder
            found, said = self.judged()
        self.assertTrue(found.whole)
        self.assertEqual(found.answers, 3 * N)
        self.assertNotIn("clean accuracy", said)

    @sweeps.rows("fog-1", "snow-2", "clean")
    def test_another_network_is_found_out_both_ways(self, name):
        """One that is better on a single image, and one that is worse."""
        for better in (True, False):
            wanted = self.honest.right[name] != better
            place = int(np.flatnonzero(wanted)[0])
            image = self.honest.images[name][place]

            def net(images, ids, image=image, place=place, better=better):
                scores = bundles.logits(images)
                same = (images == image).all(axis=(1, 2, 3))
                scores[same, self.honest.labels[place]] = 99 if better else -99
                return scores

            found, said = self.judged(net)
            self.assertFalse(found.whole)
            self.assertEqual(found.unconfirmed, {"other answer": [place]})
            self.assertIn(f"1 image not confirmed: a different answer here (image {place})", said)
            self.assertIn("Not confirmed: the accuracy on these images", said)

    def test_an_answer_that_rounding_turns(self):
        image, place = self.honest.images["fog-4"][5], 5
        right = bool(self.honest.right["fog-4"][5])

        def net(images, ids):
            scores = bundles.logits(images)
            same = (images == image).all(axis=(1, 2, 3))
            label = self.honest.labels[place]
            others = np.delete(scores[same], label, axis=1).max(axis=1)
            scores[same, label] = others + (-1e-4 if right else 1e-4)
            return scores

        found, said = self.judged(net)
        self.assertTrue(found.whole)
        self.assertEqual((found.undecided, found.confirmed), (1, 4 * N - 1))
        self.assertIn("1 answers differ here only by float32 rounding", said)

    @parameterized.parameters(-1e9, -np.inf)
    def test_a_network_that_makes_all_its_margins_small(self, lowest):
        """One class that is far below all others: then every answer is near the boundary."""

        def net(images, ids):
            return np.column_stack([bundles.logits(images), np.full(len(images), lowest)])

        forged = bundles.rows_of(self.folder)
        for row in forged:
            row["right"] = "1" * len(NAMES)
        corrupted_bundles.rows_changed(self.folder, forged)
        found, said = self.judged(net)
        self.assertFalse(found.whole)
        wrong = ~np.stack([self.honest.right[name] for name in NAMES]).all(axis=0)
        if np.isfinite(lowest):
            places = np.flatnonzero(wrong).tolist()
            self.assertEqual(found.unconfirmed, {"other answer": places})
            self.assertEqual((found.undecided, found.confirmed), (0, 4 * int((~wrong).sum())))
        else:  # logits that are not finite count as wrong
            self.assertLen(found.unconfirmed["other answer"], N)
        self.assertIn("Not confirmed: the accuracy on these images", said)

    def test_other_images_and_labels(self):
        def shown(name, ids):
            images = self.honest.shown(name, ids).copy()
            if name == "snow-2":
                images[np.asarray(ids) == 3] = 0
            return images

        self.assertEqual(self.judged(shown=shown)[0].unconfirmed, {"other image": [3]})
        labels = np.resize(self.honest.labels, SPLIT)
        labels[[2, 8]] += 1
        found, said = self.judged(labels=labels)
        self.assertEqual(found.unconfirmed, {"other label": [2, 8]})
        self.assertIn(
            "2 images not confirmed: a label that differs from the data set's (image 2, 8)", said
        )
        self.assertEqual(self.judged(count=N - 2)[0].unconfirmed, {"missing": [N - 2, N - 1]})
        found, said = self.judged(labels=None)
        self.assertFalse(found.whole)
        self.assertIn("Confirmed except for the labels", said)
        self.assertTrue(self.judged(labels=None, trust_labels=True)[0].whole)


class ForgedTest(Case):
    def test_answers_that_a_careful_forger_changed(self):
        rows = bundles.rows_of(self.folder)
        place = next(i for i, row in enumerate(rows) if row["right"][2] == "0")
        marks = list(rows[place]["right"])
        marks[2] = "1"
        rows[place]["right"] = "".join(marks)
        corrupted_bundles.rows_changed(self.folder, rows)
        found, _ = self.judged()
        self.assertEqual(found.unconfirmed, {"other answer": [place]})
        self.assertFalse(found.whole)

    @parameterized.parameters(
        ({"clean": 0.99}, "gives the accuracy 0.99 for clean, but its rows give"),
        ({"robust": 0.5}, "gives the robust accuracy 0.5, which it does not measure"),
        ({"image_ids": "0..50"}, "lacks 11 of the 51 images of its record, such as 40"),
        ({"image_ids": "0..9"}, "has image 39, but its record covers 10 images, 0..9"),
        ({"interval": {"clean": [0.1, 0.2]}}, "gives [0.1, 0.2] as the 95% interval of clean"),
    )
    def test_numbers_of_the_record(self, record, said):
        bundles.changed(self.folder, record=record)
        self.assertIn(said, self.read())

    @parameterized.parameters(
        (("mean",), 0.9, "gives the accuracy 0.9 for mean, but its rows give"),
        (("accuracy", "fog", "4"), 0.9, "gives the accuracy 0.9 for fog-4, but its rows give"),
        (("accuracy", "fog"), {"1": 0.9}, "covers ['clean', 'fog-1', 'fog-4', 'snow-2'], but its"),
    )
    def test_numbers_of_corruptions(self, path, value, said):
        own = json.loads((self.folder / claims.ABOUT).read_text())["record"]["corruptions"]
        place = own
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        bundles.changed(self.folder, record={"corruptions": own})
        self.assertIn(said, self.read())

    @parameterized.parameters(
        ({"right": "01"}, "has '01' for image 3, but needs 4 digits (0 or 1)"),
        ({"right": 11}, "has the invalid right 11 in line 4"),
        ({"label": 10}, "has the label 10 for image 3, which is not a class"),
        ({"image": 4}, "has image 4 twice"),
        ({"sha256": "x"}, "has the invalid sha256 'x' for image 3"),
    )
    def test_lines(self, changes, said):
        bundles.row_changed(self.folder, 3, **changes)
        self.assertIn(said, self.read())

    def test_lines_in_another_order(self):
        rows = bundles.rows_of(self.folder)
        corrupted_bundles.rows_changed(self.folder, rows[::-1])
        self.assertIn(f"has image {N - 2} out of order, in line 2", self.read())

    @parameterized.parameters(
        ({"split_images": 7}, "covers 40 images of a split with 7"),
        ({"corruptions": ["fog-1"]}, "covers ['fog-1'], but its record covers clean, fog-1, fog-4"),
        ({"image": [8, 9, 3]}, "has images of shape [8, 9, 3], but its record says 8 pixels"),
        ({"schema": 2}, "it has the invalid verdict None in line 1"),
    )
    def test_facts(self, changes, said):
        bundles.changed(self.folder, **changes)
        self.assertIn(said, self.read())

    def test_another_evaluation_at_the_same_place(self):
        self.assertTrue(bundle.check_place(self.folder, "c1"))
        with self.assertRaisesRegex(ValueError, "holds the bundle of evaluation c1, not of c2"):
            bundle.check_place(self.folder, "c2")


class IntervalTest(parameterized.TestCase):
    def test_of_one_corruption_it_is_that_of_a_share(self):
        """By the standard error, as Wald's; the exact one is near for many images."""
        right = np.arange(2000) < 1400
        low, high = findings.mean_interval(right.astype(float))
        exact = checks.binomial_interval(1400, 2000)
        np.testing.assert_allclose([low, high], exact, atol=1e-3)

    def test_one_image_says_nothing(self):
        self.assertEqual(findings.mean_interval(np.array([0.5])), (0.0, 1.0))


@pytest.mark.slow
@absltest.skipUnless(TORCH, "the program needs PyTorch")
class ProgramTest(Case):
    def setUp(self):
        super().setUp()
        self.place = Path(self.create_tempdir())
        (self.place / "net.py").write_text(bundles.LINEAR_MODULE)
        np.save(self.place / "net.npy", bundles._WEIGHTS)
        self.images = corrupted_bundles.stored(
            self.place / "images", self.honest.images, self.honest.labels
        )

    def ran(self, *words) -> tuple[int, str]:
        given = ("--images", self.images, "--module", f"{self.place}/net.py:load", *words)
        command = [sys.executable, self.folder / "verify.py", *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.place)
        return done.returncode, done.stdout + done.stderr

    def test_it_confirms_with_numpy_and_torch_alone(self):
        code, said = self.ran()
        self.assertEqual(code, 0, said)
        self.assertIn(f"{4 * N} of {4 * N} answers: confirmed", said)
        self.assertNotIn("jaxrobust", (self.folder / "verify.py").read_text().split('"""')[2])

    def test_it_finds_out_another_network(self):
        np.save(self.place / "net.npy", bundles._WEIGHTS[:, ::-1].copy())
        code, said = self.ran()
        self.assertEqual(code, 1, said)
        self.assertIn("a different answer here", said)

    def test_wrong_inputs(self):
        self.assertEqual(
            self.ran("--labels", self.images / "labels.npy"),
            (2, "verify: --labels has no effect on common corruptions, whose folder has labels\n"),
        )
        np.save(self.images / "snow.npy", np.zeros((35, 8, 8, 3), np.uint8))
        self.assertIn("snow.npy has 7 images of each severity, not 40", self.ran()[1])
        np.save(self.images / "fog.npy", np.zeros((36, 8, 8, 3), np.uint8))
        self.assertIn("fog.npy is uint8(36, 8, 8, 3); the bundle needs uint8 [5", self.ran()[1])
        (self.images / "fog.npy").unlink()
        code, said = self.ran()
        self.assertEqual((code, said.count("\n")), (2, 1), said)
        self.assertIn("fog.npy cannot be read as a .npy file", said)
        shutil.rmtree(self.images)
        self.images.touch()
        self.assertIn("is not a folder; a bundle of common corruptions needs a", self.ran()[1])
