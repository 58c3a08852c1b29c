"""Every figure of README and docs/results has a record, or something that computes it again."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED
from tests.support.paths import ROOT

PAGES = ("README.md", *sorted(f"docs/results/{p.name}" for p in ROOT.glob("docs/results/*.md")))
# A section, and what its figures come from: records, and files that contain or compute them.
with Path(__file__).with_name("figures_of_pages.tsv").open() as file:
    SOURCES = {(r[0], r[1]): r[2].split() for r in [*csv.reader(file, delimiter="\t")][1:]}
RECORDS = "tools/records/"
# The tables of studies have tests of their own, which write them again: tests/tools/test_study.py.
STUDIES = ("_study", "augmentation_begun")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w/])")
_SCALES = (1, 100, 1e3, 1e-3, 1e-6, 1e-9, 1e-12)  # accuracies in percent; s in ms; bytes in GB


def sections(page: str) -> Iterator[tuple[str, str]]:
    """Yield the headings of a page and the text below each, without code and links."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for part in re.split(r"^(?=#+ )", text, flags=re.M)[1:]:
        title, _, below = part.partition("\n")
        yield title.lstrip("# "), re.sub(r"`[^`]*`|\]\([^)]*\)|<img[^>]*>", "", below)


def values(record: Any) -> Iterator[float]:
    """Yield all numbers of a record, also those in its texts."""
    if isinstance(record, dict | list):
        for value in record.values() if isinstance(record, dict) else record:
            yield from values(value)
    elif isinstance(record, str):
        yield from (float(number.replace(",", "")) for number in _NUMBER.findall(record))
    elif isinstance(record, int | float):
        yield float(record)


def recorded(source: str) -> Iterator[float]:
    """Yield all numbers in a file of records, or in the files of a folder."""
    path = ROOT / source
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.suffix in (".json", ".jsonl"):
            for line in file.read_text().splitlines() if file.suffix == ".jsonl" else ():
                yield from values(json.loads(line))
        elif file.suffix == ".txt":
            yield from values(file.read_text())


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Yield the cells of a section's tables below their column's heading; no computed columns."""
    heads: list[str] = []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        heads = heads or row if row else []
        for head, cell in zip(heads, row, strict=True):
            if row is not heads and not re.search("ratio|relative|hardware|what", head):
                yield head, cell


class SourcesTest(parameterized.TestCase):
    @parameterized.parameters(*PAGES)
    def test_every_section_with_figures_has_one(self, page):
        named = {title for title, text in sections(page) if re.search(r"\d", text)}
        self.assertEqual(named - {"Learn more"}, {title for of, title in SOURCES if of == page})

    def test_they_are_there(self):
        for sources in SOURCES.values():
            self.assertNotEmpty(sources)
            for source in sources:
                self.assertTrue((ROOT / source).exists(), source)

    def test_every_record_is_shown(self):
        shown = [source for sources in SOURCES.values() for source in sources]
        for folder in (ROOT / RECORDS).iterdir():
            if folder.is_dir():
                name = f"{RECORDS}{folder.name}"
                self.assertTrue(any(source.startswith(name) for source in shown), name)


class TablesTest(parameterized.TestCase):
    @parameterized.parameters(*SOURCES)
    def test_their_numbers_are_those_of_the_records(self, page, title):
        sources = [s for s in SOURCES[page, title] if s.startswith(RECORDS)]
        if not sources or any(s.endswith(STUDIES) for s in sources):
            return
        known = {value * scale for s in sources for value in recorded(s) for scale in _SCALES}
        texts = {f"{value:.{digits}f}" for value in known for digits in range(4)}
        text = dict(sections(page))[title]
        for head, cell in cells(text):
            for number in _NUMBER.findall(cell):
                self.assertIn(number.replace(",", ""), texts, f"{head}: {cell}")


class CountsTest(absltest.TestCase):
    def test_readme(self):
        text = (ROOT / "README.md").read_text()
        self.assertIn(f"RobustBench ({len(PUBLISHED)} ids)", text)
        self.assertIn(f"lists {len(models.available())} architectures", text)


if __name__ == "__main__":
    absltest.main()
