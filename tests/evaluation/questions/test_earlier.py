"""Which records and ledgers of a folder answer a question, and which can be replayed."""

import contextlib
import io
import itertools
from pathlib import Path
from unittest import mock

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
    """A folder whose records and ledgers the test says."""

    def setUp(self):
        super().setUp()
        self.records: list[AccuracyRecord] = []
        self.ledgers: dict[str, dict] = {}  # name -> the first line
        self.out = Path("out")
        own = earlier.records
        reads = mock.patch.object(own, "read", side_effect=lambda folder: self.records)
        self.enter_context(reads)
        paths = lambda folder: [folder / name for name in self.ledgers]  # noqa: E731
        self.enter_context(mock.patch.object(earlier.replay, "ledgers", side_effect=paths))
        head = lambda path: self.ledgers[path.name]  # noqa: E731
        self.enter_context(mock.patch.object(earlier.replay, "header", side_effect=head))
        self.said = io.StringIO()
        self.enter_context(contextlib.redirect_stderr(self.said))


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
        self.records.append(AccuracyRecord(evaluation=number, fingerprint=known(**changes)))

    def begun(self, number: str, name: str = "ledger-{}.jsonl", **changes):
        self.ledgers[name.format(number)] = {"fingerprint": known(**changes)}

    def test_nothing_is_there(self):
        self.assertEqual(self.number(), self.exact)
        self.begun("none")
        self.ledgers["ledger-none.jsonl"].pop("fingerprint")
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
            self.ledgers.clear()
            self.begun("abc", name)
            self.assertEqual(self.number(), "abc", name)

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
    def record(self, number: str, **changes) -> AccuracyRecord:
        about = {"dataset": "digits", "split": "test", "model": {"image_size": 8}}
        return AccuracyRecord(evaluation=number, **(about | changes))

    def test_images_of_others(self):
        self.assertEqual(earlier.other_images(self.record("1"), IMAGES), "")
        unknown = self.record("1", split=None)
        self.assertEqual(earlier.other_images(unknown, IMAGES), "")
        other = earlier.other_images(self.record("1", model={"image_size": 9}), IMAGES)
        self.assertIn("image_size", other)

    def test_a_folder_that_is_named(self):
        with self.assertRaisesRegex(ValueError, "--replay=out has no ledger; name the folder"):
            earlier.ledgers_named(self.out, IMAGES)
        self.ledgers = {"ledger-1.jsonl": {}, "ledger-2.jsonl": {}}
        self.records = [self.record("1"), self.record("3")]
        found = earlier.ledgers_named(self.out, IMAGES)
        self.assertEqual(found, [self.out / name for name in self.ledgers])
        self.records.append(self.record("4", split="train"))
        with self.assertRaisesRegex(ValueError, "--replay=out is of other images: .*split"):
            earlier.ledgers_named(self.out, IMAGES)

    def test_ledgers_beside(self):
        ours = {key: OURS.exact[key] for key in ("program", "gradient", "arrays")}
        head = {"fingerprint": ours, "norm": "linf"}
        names = ["1", "2", "2-1", "3", "4", "5", "6"]
        self.ledgers = {f"ledger-{name}.jsonl": dict(head) for name in names}
        self.ledgers["ledger-4.jsonl"]["norm"] = "l2"
        self.ledgers["ledger-5.jsonl"]["fingerprint"] = ours | {"arrays": "others"}
        self.records = [self.record(n) for n in ("1", "2", "4", "5")]
        self.records.append(self.record("6", split="train"))  # and 3 is not done
        found = earlier.ledgers_beside(self.out, "1", OURS, "linf", IMAGES)
        self.assertEqual([path.stem for path in found], ["ledger-2", "ledger-2-1"])
