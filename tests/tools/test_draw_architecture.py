"""The pictures of docs/ are those of today's code."""

import functools
import re
import xml.etree.ElementTree as ElementTree
from unittest import mock

from absl.testing import parameterized

from tests.support.paths import ROOT
from tools.generate import draw_architecture

rooms = functools.cache(draw_architecture.rooms)


@functools.cache
def drawn_pictures() -> dict[str, str]:
    with mock.patch.object(draw_architecture, "rooms", rooms):  # reads all files
        return draw_architecture.pictures()


class PicturesTest(parameterized.TestCase):
    def test_are_up_to_date(self):
        for name in ("rooms.svg", "image.svg", "step.svg"):
            with self.subTest(name=name):
                drawn = drawn_pictures()[name]
                message = "run python tools/generate/draw_architecture.py"
                self.assertEqual((ROOT / "docs" / name).read_text(), drawn, message)
                self.assertIn(f"({name})", (ROOT / "docs" / "architecture.md").read_text())
                ElementTree.fromstring(drawn)

    def test_every_arrow_that_is_left_out_follows(self):
        below = draw_architecture._direct({"a": {"b", "c"}, "b": {"c"}, "c": set()})
        self.assertEqual(below, {"a": {"b"}, "b": {"c"}, "c": set()})

    def test_rooms_stand_above_what_they_import(self):
        _, below = rooms()
        rows = draw_architecture.levels(below, from_top=False)
        at = {name: number for number, row in enumerate(rows) for name in row}
        for name, others in below.items():
            for other in others:
                self.assertLess(at[name], at[other])
        self.assertLess(at["commands"], at["attacks"])

    def test_a_name_that_the_code_does_not_have(self):
        with self.assertRaises(AttributeError):
            draw_architecture.flow({"a": draw_architecture.Step("A", "types:Nothing")})

    def test_text_stays_inside_of_its_box(self):
        for drawn in drawn_pictures().values():
            for text in re.findall(r'text-anchor="middle" [^>]*>([^<]+)<', drawn):
                self.assertLessEqual(len(text), 40, text)
