"""Figures that stand alone: the page's own curves, with nothing left that only a browser knows."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from absl.testing import absltest
from PIL import Image

from jaxrobust.report import gathered, page, pictures
from jaxrobust.runtime.text import raster
from tests.support import reports
from tests.support.modules import needs


class PicturesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.run = reports.run(Path(self.create_tempdir().full_path) / "run", lines=40)

    def test_they_are_the_figures_of_the_page(self):
        drawn = pictures.of_phase(self.run, "train")
        self.assertContainsSubset(["loss", "accuracy", "learning-rate"], drawn)
        shown = page.page(gathered.gather([self.run]))
        for name, svg in drawn.items():
            ElementTree.fromstring(svg)
            self.assertNotRegex(svg, r"var\(|system-ui|currentColor", name)
            for path in re.findall(r' d="(M[^"]+)"', svg):
                self.assertIn(f' d="{path}"', shown, name)
        self.assertIn("selection, under attack", drawn["accuracy"])  # its legend
        self.assertIn("Loss, train", drawn["loss"])

    def test_another_phase_is_not_in_them(self):
        rows = (self.run / "metrics.jsonl").read_text().splitlines()
        other = [row for row in rows if json.loads(row)["phase"] == "pretrain"]
        (self.run / "metrics.jsonl").write_text("\n".join(other) + "\n")
        self.assertEmpty(pictures.of_phase(self.run, "train"))

    @needs("resvg_py", "pip install resvg-py")
    def test_as_a_picture_a_curve_has_its_colour_and_the_title_its_letters(self):
        made = raster.png(pictures.of_phase(self.run, "train")["loss"])
        file = self.create_tempfile(content=made).full_path
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        blue = (abs(pixels - [0x0B, 0x5F, 0xA5]).max(axis=-1) < 8).sum()
        self.assertGreater(blue, 200)
        if not raster.lacking():
            self.assertGreater((pixels[:40].max(axis=-1) < 60).sum(), 100)  # the title
