"""Bundles: what is stored comes back, is small, and every fault in one is found and named."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.evaluation.bundles import bundle, claims, contradictions, findings
from jaxrobust.evaluation.network import checks
from jaxrobust.types import Threat
from tests.support import bundles, paths, sweeps
from tests.support.bundles import (
    SHAPE,
    attacked,
    changed,
    logits,
    photographs,
    repainted,
    row_changed,
)
from tests.support.evaluations import call, run_for
from tests.support.outcomes import ended

LONE = (np.array([0]), np.array([0]))  # label and id of an image
BALLS = (("linf", 8 / 255), ("l2", 0.7), ("l1", 6.0), ("l0", 10.0))


class DifferenceTest(parameterized.TestCase):
    @sweeps.rows(*BALLS)
    def test_the_fewest_levels_that_fool(self, norm, epsilon):
        images, labels = photographs(24), np.arange(24) % 10
        right = logits(images).argmax(1)
        points = attacked(images, right, norm, epsilon)
        hit = logits(points).argmax(1) != right
        self.assertGreater(hit.sum(), 2)
        images, labels, points = images[hit], right[hit], points[hit]
        coded = bundle.encoded(points, images, labels, labels, logits, Threat(norm, epsilon))
        self.assertLen(coded, hit.sum())
        for image, label, point, found in zip(images, labels, points, coded, strict=True):
            back = claims.restored(found.code, image, found.levels, found.step)
            self.assertIsNone(claims.outside(back, image, norm=norm, epsilon=epsilon))
            ok, _ = checks.verified(
                back[None], image[None], label[None], logits(back[None]), Threat(norm, epsilon)
            )
            self.assertTrue(ok.all())
            for fewer in bundle.LEVELS:
                if fewer == found.levels or not found.sure:
                    break
                step, code = bundle._coded(point, image, fewer, Threat(norm, epsilon))
                less = claims.restored(code, image, fewer, step)[None]
                by = claims.margin(logits(less), label[None])
                self.assertGreater(by[0], -claims.MARGIN)

    def test_what_only_the_exact_image_fools_is_exact(self):
        image = photographs(1)
        points = np.clip(image + np.random.default_rng(3).uniform(-0.01, 0.01, SHAPE), 0, 1)
        points = points.astype(np.float32)

        def fussy(images, ids):  # only of the very image
            same = (images == points[0]).all(axis=(1, 2, 3))
            return np.eye(2, dtype=np.float32)[np.where(same, 1, 0)]

        ball = {"norm": "linf", "epsilon": 0.01}
        (found,) = bundle.encoded(points, image, *LONE, fussy, Threat(**ball))
        self.assertEqual((found.levels, found.sure), (0, True))
        back = claims.restored(found.code, image[0], 0, 0.0)  # bit for bit
        np.testing.assert_array_equal(back.view("u4"), points[0].view("u4"))

    def test_a_thin_margin_takes_more_levels_or_is_said(self):
        image = photographs(1)
        points = np.clip(image + 0.01, 0, 1)
        thin = np.float32([[1, 1 + claims.BOUNDARY / 2, 0]])  # of class 1, by little
        how = {"norm": "linf", "epsilon": 0.01}
        (found,) = bundle.encoded(points, image, *LONE, lambda x, ids: thin, Threat(**how))
        self.assertEqual((found.levels, found.sure), (1, False))
        calls = []

        def from_the_third(images, ids):
            calls.append(len(images))
            return thin if len(calls) < 3 else np.float32([[0, 1, 0]])

        (found,) = bundle.encoded(points, image, *LONE, from_the_third, Threat(**how))
        self.assertEqual((found.levels, found.sure), (bundle.LEVELS[2], True))

    def test_photographs_under_a_full_perturbation_stay_small(self):
        """Signs at random, which nothing compresses below 1 bit: 5,000 images stay below 400 MB."""
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (224, 224, 3), np.uint8) / np.float32(255)
        signs = rng.choice([-1, 1], image.shape) * np.float32(4 / 255)
        _, code = bundle._coded(np.clip(image + signs, 0, 1), image, 1, Threat("linf", 4 / 255))
        self.assertLess(5000 * len(code), 400e6 / 2)


class ClaimsTest(parameterized.TestCase):
    def test_right_and_wrong_are_those_of_the_evaluation(self):
        labels = np.arange(6) % 3
        rows = np.random.default_rng(0).integers(0, 3, (6, 3)).astype(np.float32)  # with ties
        rows[0, 1], rows[1, 2], rows[2, 2] = np.nan, np.inf, -np.inf
        rows[3], rows[4], rows[5] = (np.inf, 1, 0), (-np.inf, 1, 0), (0, 0, 1)
        ours, theirs = claims.is_right(rows, labels), checks.is_right(rows, labels)
        np.testing.assert_array_equal(ours, theirs)
        self.assertSequenceEqual(ours[3:].tolist(), [False, False, True])  # infinite: no answer
        by = claims.margin(np.float32([[3, 1, 0], [1, 3, 0]]), np.array([0, 0]))
        np.testing.assert_allclose(by, [2 / 3, -2 / 3])

    @sweeps.rows(*BALLS)
    def test_the_ball_is_that_of_the_evaluation(self, norm, epsilon):
        images, labels = photographs(40), np.zeros(40, int)
        shares = np.linspace(0.9, 1.1, 40)
        rows = [slice(i, i + 1) for i in range(40)]
        points = np.concatenate(
            [attacked(images[r], labels[:1], norm, epsilon, shares[r][0]) for r in rows]
        )
        points[5, 0, 0, 0], points[6, 0, 0, 0] = np.nan, 1.0001
        wrong = np.tile(np.eye(10, dtype=np.float32)[1], (40, 1))
        theirs, _ = checks.verified(points, images, labels, wrong, Threat(norm, epsilon))
        how = {"norm": norm, "epsilon": epsilon}
        ours = [claims.outside(p, x, **how) is None for p, x in zip(points, images, strict=True)]
        self.assertEqual(ours, theirs.tolist())
        self.assertBetween(sum(ours), 5, 37)


class WrittenTest(parameterized.TestCase):
    """A bundle of a linear network on made-up images."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        made = bundles.honest(Path(directory.name))
        cls.images, cls.labels, cls.found = made.images, made.labels, made.found
        cls.record, cls.out, cls.whole = made.record, made.out, made.folder

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "bundle"
        shutil.copytree(self.whole, self.folder)

    def judged(self, images=None, **how):
        images = self.images if images is None else images
        how = {"count": len(images), "batch": 9, "labels": self.labels[: len(images)]} | how
        net = how.pop("net", logits)
        return findings.judge(
            claims.read(self.folder), lambda _, ids: images[list(ids)], net, **how
        )

    def place(self, verdict):
        return int(np.flatnonzero(self.found.fooled_by == verdict)[0])

    def test_everything_is_confirmed(self):
        fooled = int((self.found.clean & ~self.found.robust).sum())
        self.assertBetween(fooled, 5, 31)
        found = self.judged()
        claimed = {"misclassified": 8, "fooled": fooled, "standing": 32 - fooled}
        self.assertEqual(found.claimed, claimed)
        self.assertTrue(found.whole)
        self.assertEqual(found.unconfirmed, {})
        self.assertEqual(found.standing, int(self.found.robust.sum()))
        said = "\n".join(findings.lines(claims.read(self.folder), found))
        self.assertIn(f"{fooled} of {fooled} fooled: confirmed", said)
        low, high = checks.binomial_interval(found.standing, 40)
        self.assertIn(
            f"Confirmed: robust accuracy on these images is at most {found.standing / 40:.2%} "
            f"({found.standing} of 40; 95% interval of this share {low:.2%} to {high:.2%})",
            said,
        )
        plain = json.loads(json.dumps(found.plain()))
        self.assertEqual(plain["robust_at_most"], found.standing / 40)

    def test_sha256sum_reads_its_list(self):
        for line in (self.folder / claims.SUMS).read_text().splitlines():
            sha256, name = line.split("  ")
            self.assertEqual(hashlib.sha256((self.folder / name).read_bytes()).hexdigest(), sha256)
        names = {path.name for path in self.folder.iterdir()}
        self.assertEqual(
            names, {"bundle.json", "images.jsonl", "SHA256SUMS", "verify.py", "differences-0.bin"}
        )

    def test_large_differences_are_several_files(self):
        with mock.patch.object(bundle, "_PART_BYTES", 300):
            place = self.folder.with_name("parts")
            bundle.of_record(place, self.record, self.out, self.images, logits, batch=7)
        self.assertGreater(len(list(place.glob("differences-*.bin"))), 2)
        shutil.rmtree(self.folder)
        place.rename(self.folder)
        self.assertTrue(self.judged().whole)

    def test_one_changed_byte_anywhere(self):
        for path in sorted(self.folder.iterdir()):
            whole = path.read_bytes()
            for place in (0, len(whole) // 2, len(whole) - 1):
                if path.name == claims.SUMS and place == len(whole) - 1:
                    continue  # the end of the last line, which says nothing
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
                with self.assertRaisesRegex(ValueError, "download the bundle again"):
                    claims.read(self.folder)
            path.write_bytes(whole)
        claims.read(self.folder)

    def test_faults_of_a_bundle(self):
        for name in ("bundle.json", "differences-0.bin"):
            folder = Path(self.create_tempdir()) / "b"
            shutil.copytree(self.whole, folder)
            (folder / name).unlink()
            with self.assertRaisesRegex(ValueError, f"{name} is missing; download the bundle"):
                claims.read(folder)
        with self.assertRaisesRegex(ValueError, "not a bundle: it has no SHA256SUMS; give"):
            claims.read(self.folder / "nowhere")
        changed(self.folder, schema=contradictions.TASK_SCHEMA + 1)
        with self.assertRaisesRegex(ValueError, "schema 5, but this program only reads up to 4;"):
            claims.read(self.folder)

    def test_what_is_not_confirmed_is_named(self):
        fooled, wrong = self.place("apgd-ce"), self.place("clean")
        robust = self.place("")
        other = np.array(self.images)
        other[[fooled, robust], 0, 0, 0] += np.float32(1e-6)
        found = self.judged(other)
        self.assertEqual(found.unconfirmed, {"other image": sorted([fooled, robust])})
        self.assertEqual(found.confirmed["fooled"], found.claimed["fooled"] - 1)
        self.assertFalse(found.whole)
        self.assertEqual(found.standing, int(self.found.robust.sum()) + 1)
        labels = np.array(self.labels)
        labels[wrong] += 1
        self.assertEqual(self.judged(labels=labels).unconfirmed, {"other label": [wrong]})
        unchecked = self.judged(labels=None)
        self.assertEqual(unchecked.confirmed, unchecked.claimed)
        self.assertFalse(unchecked.whole)
        self.assertTrue(self.judged(labels=None, trust_labels=True).whole)
        last = int(np.flatnonzero(~self.found.robust)[-1])
        missing = list(range(last, 40))
        self.assertEqual(self.judged(self.images[:last]).unconfirmed, {"missing": missing})
        said = "\n".join(findings.lines(claims.read(self.folder), self.judged(self.images[:last])))
        self.assertIn(
            f"{len(missing)} images not confirmed: {findings.WHY['missing']} (image {last}", said
        )
        self.assertIn("Not confirmed: robust accuracy on these images is at most", said)

    def test_images_outside_the_ball_or_the_range(self):
        fooled = self.place("apgd-ce")
        row = json.loads((self.folder / claims.ROWS).read_text().splitlines()[fooled])
        row_changed(self.folder, fooled, step=row["step"] * 1.01)
        self.assertEqual(self.judged().unconfirmed, {"outside the ball": [fooled]})
        row_changed(self.folder, fooled, step=float("nan"))
        with self.assertRaisesRegex(ValueError, "the invalid step nan in line"):
            claims.read(self.folder)

    def test_a_difference_of_other_images(self):
        row_changed(self.folder, self.place("apgd-ce"), offset=1)
        with self.assertRaisesRegex(ValueError, "cannot be decompressed"):
            self.judged()

    def test_right_answers_and_those_at_the_boundary(self):
        wrong = self.place("clean")
        label = self.labels[wrong]

        def by(share):
            def net(images, ids):
                found = np.array(logits(images), np.float64)
                which = (images == self.images[wrong]).all(axis=(1, 2, 3))
                spread = np.ptp(np.delete(found, label, axis=1), axis=1)
                most = np.delete(found, label, axis=1).max(axis=1)
                found[which, label] = (most + share * spread)[which]
                return found

            return net

        self.assertEqual(self.judged(net=by(0.5)).unconfirmed, {"right": [wrong]})
        near = self.judged(net=by(claims.BOUNDARY / 2))
        self.assertEqual(near.unconfirmed, {"at the boundary": [wrong]})
        self.assertTrue(self.judged(net=by(-claims.BOUNDARY / 2)).whole)

    def test_a_network_of_other_classes(self):
        with self.assertRaisesRegex(ValueError, r"returns an array \(9, 3\) .* labels up to"):
            self.judged(net=lambda images, ids: logits(images)[:, :3])

    def test_written_again(self):
        before = {path: path.read_bytes() for path in self.folder.iterdir()}
        bundle.of_record(self.folder, self.record, self.out, self.images, None)
        self.assertEqual({path: path.read_bytes() for path in self.folder.iterdir()}, before)
        with self.assertRaisesRegex(ValueError, "holds the bundle of evaluation a1, not of b2"):
            bundle.of_record(
                self.folder,
                dataclasses.replace(self.record, evaluation="b2"),
                self.out,
                self.images,
                logits,
            )

    def test_a_ledger_that_lacks_images(self):
        out, place = Path(self.create_tempdir()) / "out", self.folder.with_name("new")
        shutil.copytree(self.out, out)
        stored = (out / "ledger-a1.images").read_bytes()
        (out / "ledger-a1.images").write_bytes(stored[:-1])
        with self.assertRaisesRegex(ValueError, "is truncated; for --bundle, evaluate again with"):
            bundle.of_record(place, self.record, out, self.images, logits)
        lines = (out / "ledger-a1.jsonl").read_text().splitlines()
        (out / "ledger-a1.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        with self.assertRaisesRegex(
            ValueError, r"lacks the adversarial images for 1 verdicts, which --bundle"
        ):
            bundle.of_record(place, self.record, out, self.images, logits)
        with self.assertRaisesRegex(ValueError, "records from older versions; evaluate again"):
            bundle.of_record(
                place, dataclasses.replace(self.record, verdicts=None), out, self.images, logits
            )
        self.assertEqual([path.name for path in place.parent.iterdir()], ["bundle"])

    def test_the_verdicts_of_several_processes(self):
        out = Path(self.create_tempdir()) / "out"
        shutil.copytree(self.out, out)
        lines = (out / "ledger-a1.jsonl").read_text().splitlines()
        (out / "ledger-a1.jsonl").write_text("\n".join(lines[:3]) + "\n")
        theirs = [json.loads(line) for line in lines[3:]]
        text = "".join(json.dumps(row | {"stored": row["stored"] - 2}) + "\n" for row in theirs)
        (out / "ledger-a1.process-1.jsonl").write_text(lines[0] + "\n" + text)
        stored = (out / "ledger-a1.images").read_bytes()
        size = 2 * self.images[0].nbytes
        (out / "ledger-a1.images").write_bytes(stored[:size])
        (out / "ledger-a1.process-1.images").write_bytes(stored[size:])
        shutil.rmtree(self.folder)
        bundle.of_record(self.folder, self.record, out, self.images, logits)
        name = "differences-0.bin"
        self.assertEqual((self.folder / name).read_bytes(), (self.whole / name).read_bytes())

    def test_the_program_needs_numpy_and_torch_alone(self):
        text = (self.folder / "verify.py").read_text()
        tree = ast.parse(text)
        whole = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        parts = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = {name.partition(".")[0] for name in whole + parts}
        self.assertEqual(names - sys.stdlib_module_names, {"numpy", "torch"})
        self.assertLess(max(map(len, text.splitlines())), 101)


class PixelsTest(absltest.TestCase):
    """L0: the pixels that an attack changed, and no others, change in its bundle."""

    def setUp(self):
        super().setUp()
        self.honest = bundles.honest(Path(self.create_tempdir()), "l0", 10)
        self.folder = self.honest.folder
        self.place = int(np.flatnonzero(self.honest.found.fooled_by == "apgd-ce")[0])

    def judged(self):
        images = self.honest.images
        opened, labels = claims.read(self.folder), self.honest.labels
        return findings.judge(
            opened, lambda _, ids: images[list(ids)], logits, count=len(images), labels=labels
        )

    def test_the_same_pixels_change(self):
        found, honest = self.judged(), self.honest
        self.assertTrue(found.whole, found)
        self.assertGreater(found.claimed["fooled"], 5)
        stored = np.fromfile(honest.out / "ledger-a1.images", np.float32).reshape(-1, *SHAPE)
        opened, levels = claims.read(self.folder), set()
        fooled = [row for row in opened.rows if row["verdict"] not in ("", "clean")]
        for row, theirs in zip(fooled, stored, strict=True):
            image = honest.images[row["image"]]
            ours, _ = claims.point_of(opened, row, image)
            np.testing.assert_array_equal((ours != image).any(-1), (theirs != image).any(-1))
            levels.add(row["levels"])
        self.assertLess(min(levels), 127)

    def test_one_pixel_more(self):
        repainted(self.folder, self.place, self.honest.images, 10)
        self.assertNotIn("outside the ball", self.judged().unconfirmed)
        repainted(self.folder, self.place, self.honest.images, 11)
        self.assertEqual(self.judged().unconfirmed["outside the ball"], [self.place])

    def test_in_pytorch(self):
        if not importlib.util.find_spec("torch"):
            self.skipTest(paths.PARITY)
        root = self.folder.parent
        for name, array in (
            ("images", self.honest.images),
            ("labels", self.honest.labels),
            ("net", bundles._WEIGHTS),
        ):
            np.save(root / f"{name}.npy", array)
        (root / "net.py").write_text(bundles.LINEAR_MODULE)
        words = [sys.executable, "-I", self.folder / "verify.py", "--device=cpu"]
        words += ["--images=images.npy", "--labels=labels.npy", "--module=net.py:load"]
        for more, code, line in (
            (0, 0, "Confirmed: robust accuracy on these images is at most"),
            (11, 1, "1 image not confirmed: an adversarial image outside the ball"),
        ):
            if more:
                repainted(self.folder, self.place, self.honest.images, more)
            done = subprocess.run(words, capture_output=True, text=True, cwd=root)
            self.assertEqual(done.returncode, code, done.stdout + done.stderr)
            self.assertIn(line, done.stdout)


@pytest.mark.slow
class CommandTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = run_for(cls, pretrained=False)

    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir())
        self.flags = {
            "workdir": str(self.workdir), "out": str(self.root / "out"), "attack": "apgd-ce",
            "epsilon": "0.03", "n": 32,
        }  # fmt: skip

    @pytest.mark.slow
    def test_what_was_replayed_is_there_too(self):
        """Images that were fooled at a smaller radius, whose ledger another evaluation has."""
        self.assertEqual(call(**self.flags)[0], 0)
        place = self.root / "bundle"
        ended(call(**self.flags | {"epsilon": "0.05"}, bundle=str(place)))
        found = claims.read(place)
        self.assertIn("replay", {row["verdict"] for row in found.rows})
        source = data.open_source("digits", "test")
        prepared = data.Prepared(source, image_size=8, preprocessing="none", images=len(source))
        for row in found.rows:
            if row["verdict"] not in ("", "clean"):
                image = prepared[np.array([row["image"]])][0]
                point, _ = claims.point_of(found, row, image)
                self.assertIsNone(claims.outside(point, image, **found.threat))
