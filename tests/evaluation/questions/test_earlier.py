"""Which records and ledgers of a folder answer a question, and which can be replayed."""

import itertools
import json
from pathlib import Path

from absl.testing import parameterized

from jaxrobust.evaluation.network.fingerprint import Fingerprint
from jaxrobust.evaluation.questions import earlier
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord

VERSIONS = {"jaxrobust": "1", "jax": "2"}
PROBE = {"logits": [[1.0, 2.0]], "gradients": [[1.0, 2.0]]}
OURS = Fingerprint("program", "gradient", "arrays", PROBE, VERSIONS)
ASKED = "question"


def known(**changes) -> dict:
    """The fingerprint that a record has of our network and question, but for some entries."""
    return OURS._asdict() | {"question": ASKED} | changes


class FolderCase(parameterized.TestCase):
    """A folder whose records and ledgers the test writes."""

    def setUp(self):
        super().setUp()
        self.out = Path(self.create_tempdir().full_path)

    def record(self, number: str, **fields) -> None:
        record = AccuracyRecord(evaluation=number, **fields).stamped()
        records.append(self.out / "results.jsonl", record)

    def ledger(self, name: str, **identity) -> None:
        (self.out / name).write_text(json.dumps({"identity": identity}) + "\n")


IDENTITY = {"attack": "x", "fingerprint": {}}


class NumberTest(FolderCase):
    def setUp(self):
        super().setUp()
        self.exact = records.number_of(IDENTITY)
        count = itertools.count
        self.again, self.unlike = (
            [records.number_of(IDENTITY | {key: k}) for k in itertools.islice(count(1), 3)]
            for key in ("again", "unlike")
        )

    def number(self, again: bool = False) -> str:
        return earlier.number(self.out, IDENTITY, ASKED, OURS, again=again)

    def done(self, number: str, **changes):
        self.record(number, fingerprint=known(**changes))

    def begun(self, number: str, name: str = "ledger-{}.jsonl", **changes):
        self.ledger(name.format(number), fingerprint=known(**changes))

    def test_nothing_is_there(self):
        self.assertEqual(self.number(), self.exact)
        self.ledger("ledger-none.jsonl")
        self.assertEqual(self.number(), self.exact)

    def test_ours_is_there(self):
        self.done("another")
        self.done(self.exact)
        self.assertEqual(self.number(), self.exact)

    def test_an_equal_question_to_an_equal_network_under_another_number(self):
        self.begun("begun")
        self.assertEqual(self.number(), "begun")
        self.done("done")
        self.assertEqual(self.number(), "done")  # before one that is begun
        self.begun(self.exact)
        self.assertEqual(self.number(), "done")
        self.done(self.exact)
        self.assertEqual(self.number(), self.exact)

    @parameterized.parameters({"question": "another"}, {"question": ""}, {"arrays": "others"})
    def test_another_question_or_network(self, **changes):
        self.done("other", **changes)
        self.assertEqual(self.number(), self.exact)

    def test_a_record_counts_before_the_ledger_of_its_number(self):
        self.done("x", arrays="others")
        self.begun("x")
        self.assertEqual(self.number(), self.exact)

    def test_the_parts_of_a_union_and_of_a_pod_are_of_one_number(self):
        for name in ("ledger-{}-1.jsonl", "ledger-{}.process-1.jsonl", "ledger-{}.jsonl"):
            self.begun("abc", name)
            self.assertEqual(self.number(), "abc", name)
            (self.out / name.format("abc")).unlink()

    def test_code_that_the_program_does_not_show_has_changed(self):
        self.done(self.exact, probe={"logits": [[9.0, 2.0]], "gradients": [[1.0, 2.0]]})
        self.assertEqual(self.number(), self.unlike[0])
        self.done(self.unlike[0], arrays="others")
        self.assertEqual(self.number(), self.unlike[1])
        self.done(self.unlike[1])
        self.assertEqual(self.number(), self.unlike[1])  # which is ours

    def test_again(self):
        self.done(self.exact)
        self.assertEqual(self.number(again=True), self.again[0])
        self.done(self.again[0])
        self.begun(self.again[1])  # is continued
        self.assertEqual(self.number(again=True), self.again[1])


IMAGES = {"dataset": "digits", "split": "test", "image_size": 8}


class ReplayTest(FolderCase):
    def done(self, number: str, size: int = 8, split: str | None = "test") -> None:
        self.record(number, dataset="digits", split=split, model={"image_size": size})

    @parameterized.parameters(({}, ""), ({"split": None}, ""), ({"size": 9}, "image_size"))
    def test_images_of_others(self, changes, words):
        self.done("1", **changes)
        (record,) = records.read(self.out)
        found = earlier.other_images(record, IMAGES)
        self.assertEqual(words in found, bool(words) or not found)

    def test_a_folder_that_is_named(self):
        with self.assertRaisesRegex(ValueError, "--replay=.* has no ledger; name the folder"):
            earlier.ledgers_named(self.out, IMAGES)
        names = ["ledger-1.jsonl", "ledger-2.jsonl"]
        for name in names:
            self.ledger(name)
        self.done("1"), self.done("3")
        found = earlier.ledgers_named(self.out, IMAGES)
        self.assertEqual(found, [self.out / name for name in names])
        self.done("4", split="train")
        with self.assertRaisesRegex(ValueError, "--replay=.* is for different images: .*split"):
            earlier.ledgers_named(self.out, IMAGES)

    def test_ledgers_beside(self):
        """Of 3 there is no record, and 6 is of other images."""
        other = {"4": {"norm": "l2"}, "5": {"fingerprint": OURS.exact | {"arrays": "others"}}}
        for name in ("1", "2", "2-1", "3", "4", "5", "6"):
            head = {"fingerprint": OURS.exact, "norm": "linf"} | other.get(name, {})
            self.ledger(f"ledger-{name}.jsonl", **head)
        for number in ("1", "2", "4", "5", "6"):
            self.done(number, split="train" if number == "6" else "test")
        found = earlier.ledgers_beside(self.out, "1", OURS, "linf", IMAGES)
        self.assertCountEqual([path.stem for path in found], ["ledger-2", "ledger-2-1"])
