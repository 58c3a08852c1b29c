"""The benchmark of the input pipeline compares the same work, and runs without photographs."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import ImageOps

from tests.support import sweeps
from tests.support.datasets import write_tree
from tests.support.images import encoded, pattern, torchvision
from tests.support.modules import hidden
from tools import bench_data


class BenchDataTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # The tool changes it for timm's sake.
        self.enterContext(mock.patch.object(ImageOps, "posterize", ImageOps.posterize))
        self.data = encoded(pattern(375, 500), "JPEG")

    def test_both_do_the_same(self):
        torch, _ = torchvision(self)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        ours, theirs = bench_data.ours(), bench_data.theirs()
        self.assertEqual(list(ours), list(theirs))
        np.testing.assert_array_equal(ours["decode"](self.data), theirs["decode"](self.data))
        np.testing.assert_array_equal(
            np.float32(ours["evaluation"](self.data)) / np.float32(255),
            theirs["evaluation"](self.data).permute(1, 2, 0).numpy(),
        )
        for name in bench_data.PRESETS:
            self.assertEqual(ours[name](self.data).shape, (224, 224, 3))
            for _ in range(3):
                image = theirs[name](self.data)
                self.assertEqual((image.shape, image.dtype), ((3, 224, 224), torch.float32))
                self.assertBetween(image.min(), 0, image.max())  # mean 0, std 1
                self.assertLessEqual(image.max(), 1)

    def test_timms_recipes_are_whole(self):
        torch, _ = torchvision(self)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        theirs = bench_data.theirs()
        for name in ("light", "3-augment", "heavy"):
            (whole,) = theirs[name].keywords["transform"].transforms
            steps = [type(step).__name__ for step in whole.transforms]
            self.assertEqual(steps[0], "RandomResizedCropAndInterpolation")
            self.assertEqual(steps[-1], "Normalize")
            self.assertEqual(whole.transforms[-1].mean.tolist(), [0, 0, 0])
            self.assertEqual(whole.transforms[-1].std.tolist(), [1, 1, 1])

    def test_timms_posterize_may_ask_for_no_bits(self):
        torch, _ = torchvision(self)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        bench_data.theirs()
        from PIL import Image
        from timm.data.auto_augment import posterize

        image = Image.fromarray(pattern(9, 9))
        self.assertEqual(np.asarray(posterize(image, 0)).max(), 0)
        self.assertEqual(np.asarray(posterize(image, 1)).max(), 128)

    def measured(self, *arguments):
        """What the tool finds, without worker processes."""
        argv = ["bench_data", *arguments, "--images=3", "--rounds=1", "--workers", "--json"]
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            bench_data.main()
        return json.loads(out.getvalue().splitlines()[-1])

    @sweeps.fast(1)
    @parameterized.parameters(True, False)
    def test_made_up_photographs(self, torch_is_there):
        if torch_is_there:
            torch, _ = torchvision(self)
            self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        else:
            self.enterContext(hidden("torch"))
        result = self.measured("--batch=2", "--batches=2")
        self.assertEqual((result["images"], result["photographs"]), (3, "made up"))
        self.assertEqual(list(result["pipelines"]), ["decode", "evaluation", *bench_data.PRESETS])
        for row in result["pipelines"].values():
            self.assertGreater(row["images_per_s"], 0)
            self.assertAlmostEqual(sum(row["milliseconds"].values()), 1e3 / row["images_per_s"])
        ratios = [name for name, row in result["pipelines"].items() if "ratio" in row]
        self.assertEqual(ratios, list(result["pipelines"]) if torch_is_there else [])
        self.assertEqual(result["batches"]["batch"], 2)

    @parameterized.parameters(
        (["val/a/1.jpg"], "val", 1),
        (["val/a/1.jpg", "train/a/1.jpg", "train/b/1.jpg"], "train", 2),
        (["validation/a/1.jpg", "test/b/1.jpg"], "validation", 1),
        (["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"], "all", 3),
    )
    def test_split_of_a_folder(self, files, split, count):
        root = self.create_tempdir().full_path
        write_tree(Path(root), files)
        with hidden("torch"):
            result = self.measured(root, "--batches=0")
        self.assertEqual(
            (result["images"], result["photographs"]), (count, f"{root}, split {split}")
        )

    def test_file_that_does_not_decode(self):
        for batches in (1, 0):
            with self.subTest(batches=batches):
                root = self.create_tempdir().full_path
                write_tree(Path(root), [f"train/a/{number}.jpg" for number in range(7)])
                damaged = Path(
                    root, "train", "a", f"{batches}.jpg"
                )  # of 7 files, 0, 3 and 6 are timed
                damaged.write_bytes(b"not an image")
                with (
                    hidden("torch"),
                    self.assertRaisesRegex(ValueError, f"^{damaged}: not a complete image"),
                ):
                    self.measured(root, f"--batches={batches * 40}")

    @parameterized.parameters(
        (["/nowhere"], "/nowhere"),
        (["--rounds", "0"], "--rounds"),
    )
    def test_mistakes(self, arguments, message):
        done = subprocess.run(
            [sys.executable, bench_data.__file__, *arguments],
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 2)
        self.assertRegex(done.stderr, rf"\Abench_data: .*{message}.*\n\Z")
