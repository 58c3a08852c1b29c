"""The pictures of reports: what Chromium shows, small enough for the repository."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest
from PIL import Image

from tests.support import reports
from tools.generate import report_pictures


class PicturesTest(absltest.TestCase):
    @pytest.mark.slow
    def test_a_picture_shows_the_beginning_of_a_report(self):
        if not (shutil.which("chromium") or shutil.which("google-chrome")):
            self.skipTest("needs Chromium: apt-get install chromium")
        folder = Path(self.create_tempdir().full_path)
        run = reports.run(folder / "run")
        reports.evaluation(run / "evaluation")
        with self.assertRaises(SystemExit):
            report_pictures.main(["no path"])
        report_pictures.main([f"mine={run}", f"--out={folder}", "--width=700", "--height=900"])
        image = Image.open(folder / "mine.png")
        self.assertEqual(image.width, 700)
        self.assertBetween(image.height, 700, 900)
        self.assertLess((folder / "mine.png").stat().st_size, report_pictures.LARGEST)
        self.assertGreater(len(np.unique(np.asarray(image))), 10)
