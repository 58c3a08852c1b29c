"""The benchmark of the input pipeline compares the same work, and runs without photographs."""

import contextlib
import io
import json
import subprocess
import sys
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from PIL import ImageOps

from tests.images import encoded, pattern, torchvision
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
                self.assertBetween(image.min(), 0, image.max())  # not normalised
                self.assertLessEqual(image.max(), 1)

    def test_timms_posterize_may_ask_for_no_bits(self):
        torch, _ = torchvision(self)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        bench_data.theirs()
        from PIL import Image
        from timm.data.auto_augment import posterize

        image = Image.fromarray(pattern(9, 9))
        self.assertEqual(np.asarray(posterize(image, 0)).max(), 0)
        self.assertEqual(np.asarray(posterize(image, 1)).max(), 128)

    @parameterized.parameters(True, False)
    def test_made_up_photographs(self, torch_is_there):
        hidden = {} if torch_is_there else {"torch": None}
        argv = [
            "bench_data",
            "--images",
            "3",
            "--rounds",
            "1",
            "--batch",
            "2",
            "--batches",
            "2",
            "--workers",
            "--json",
        ]
        with (
            mock.patch.dict(sys.modules, hidden),
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            bench_data.main()
        result = json.loads(out.getvalue().splitlines()[-1])
        self.assertEqual((result["images"], result["photographs"]), (3, "made up"))
        self.assertEqual(list(result["pipelines"]), ["decode", "evaluation", *bench_data.PRESETS])
        for row in result["pipelines"].values():
            self.assertGreater(row["images_per_s"], 0)
            self.assertAlmostEqual(sum(row["milliseconds"].values()), 1e3 / row["images_per_s"])
            if not torch_is_there:
                self.assertNotIn("ratio", row)
        self.assertEqual(result["batches"]["batch"], 2)

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


if __name__ == "__main__":
    absltest.main()
