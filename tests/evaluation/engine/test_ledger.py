"""What a ledger holds after a kill: the verdicts, and the adversarial images they name."""

import contextlib
from pathlib import Path

import numpy as np
from absl.testing import absltest

from jaxrobust.evaluation.engine.ledger import Ledger
from jaxrobust.evaluation.network import fingerprint

IDS = np.arange(4, dtype=np.uint32)
IMAGES = np.random.default_rng(0).random((4, 3, 3, 1), np.float32)


def identity():
    probe = {"logits": [[1.0]], "gradients": [[1.0]]}
    known = fingerprint.Fingerprint("program", "gradient", "network", probe, fingerprint.versions())
    return {"network": None, "fingerprint": known._asdict() | {"images": "images"}, "search": None}


class ResumeTest(absltest.TestCase):
    def test_an_image_that_a_kill_cut_off_is_not_in_the_way_of_the_next(self):
        path = Path(self.create_tempdir()) / "ledger.jsonl"
        record = {"attack": "apgd-ce", "fooled": True, "flat": False}
        with contextlib.closing(Ledger(path, identity(), IDS)) as book:
            book.add(0, record, IMAGES[0])
        with path.with_suffix(".images").open("ab") as images:
            images.write(IMAGES[1].tobytes()[:7])  # its verdict is not in the ledger yet
        with contextlib.closing(Ledger(path, identity(), IDS)) as book:
            self.assertEqual(book.rows("apgd-ce")["known"].tolist(), [True, False, False, False])
            book.add(1, record, IMAGES[1])
            book.add(2, record | {"fooled": False}, None)
            book.add(3, record, IMAGES[3])
        with contextlib.closing(Ledger(path, identity(), IDS)) as book:
            self.assertEqual(book.rows("apgd-ce")["fooled"].tolist(), [True, True, False, True])
            for place in (0, 1, 3):
                found = book.adversarial(place, "apgd-ce", (3, 3, 1))
                np.testing.assert_array_equal(found, IMAGES[place])


if __name__ == "__main__":
    absltest.main()
