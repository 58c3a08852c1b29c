"""The confusion that attacks cause, as a page shows it."""

import json
from pathlib import Path

import numpy as np
from absl.testing import absltest

from jaxrobust.evaluation.records import verdicts
from jaxrobust.report import figures, gathered, page
from tests.support import reports


class ConfusionTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir().full_path)

    def page(self):
        return reports.read(page.page(gathered.gather([self.folder])))

    def test_few_classes_are_a_matrix_of_the_verdicts(self):
        seen = reports.evaluation(self.folder, n=200)
        data, text, tags = self.page()
        told = data["e0-confusion"]
        self.assertEqual(told["names"], [f"class {label}" for label in range(4)])
        wanted = np.zeros((4, 4), int)
        for label, reached, clean, by in zip(
            seen.labels, seen.reached, seen.clean, seen.fooled_by, strict=True
        ):
            wanted[label, reached] += bool(clean and by)
        self.assertGreater(wanted.sum(), 50)
        self.assertEqual(told["counts"], wanted.tolist())
        self.assertEqual(np.trace(wanted), 0)
        most = tuple(np.argwhere(wanted == wanted.max())[0])
        alts = [own["aria-label"] for name, own in tags if name == "svg" and own.get("role")]
        said = "Classes that the attacks reached. class {} became class {} {} times".format(
            *most, wanted.max()
        )
        self.assertTrue(any(alt.startswith(said) for alt in alts), alts)
        for count in wanted[wanted > 0].tolist():
            self.assertIn(f" {count} ", text)

    def test_many_classes_are_a_table_of_the_most_frequent_pairs(self):
        seen = reports.evaluation(self.folder, n=3000, classes=1000)
        data, text, _ = self.page()
        self.assertNotIn("e0-confusion", data)
        known = seen.reached >= 0
        both, counts = np.unique(
            np.stack([seen.labels, seen.reached])[:, known], axis=1, return_counts=True
        )
        order = np.lexsort((both[1], both[0], -counts))[:20]
        self.assertIn(f"the 20 most frequent of {len(counts)} pairs", text)
        shares = 100 * counts / np.bincount(seen.labels[known])[both[0]]
        rows = [
            f"class {both[0, i]} class {both[1, i]} {counts[i]} {shares[i]:.0f} %" for i in order
        ]
        self.assertIn(rows[0], text)
        places = [text.index(row) for row in rows]
        self.assertEqual(places, sorted(places))
        self.assertGreater(len(both[0]), figures.CLASSES)

    def test_an_older_file_is_a_sentence_and_part_of_one_is_counted(self):
        seen = reports.evaluation(self.folder, n=200)
        path = self.folder / verdicts.file_of("a1")
        there = json.loads(path.read_text())
        fooled = int((seen.clean & ~seen.robust).sum())
        kept = np.flatnonzero(seen.reached >= 0)[:3]
        there["reached"] = np.where(np.isin(np.arange(200), kept), seen.reached, -1).tolist()
        path.write_text(json.dumps(there))
        data, text, _ = self.page()
        self.assertEqual(np.sum(data["e0-confusion"]["counts"]), 3)
        self.assertIn(f"For {fooled - 3} more fooled images it is unknown.", text)
        del there["reached"]
        path.write_text(json.dumps(there))
        data, text, _ = self.page()
        self.assertNotIn("e0-confusion", data)
        self.assertIn("Which classes the attacks reached is unknown: an older version", text)
