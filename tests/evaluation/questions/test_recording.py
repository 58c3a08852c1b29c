"""What an evaluation asks, measures and writes, with images, networks and attacks made up."""

import contextlib
import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.config import NetworkSpec
from jaxrobust.evaluation.network.fingerprint import Fingerprint
from jaxrobust.evaluation.questions import measuring, recording
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat, Weights
from tests.support import sweeps

PROBE = {"logits": [[1.0]], "gradients": [[1.0]]}
OWN = Fingerprint("program-hash", "gradient-hash", "arrays", PROBE, {"jax": "1"})
SPEC = NetworkSpec("net", num_classes=4, image_size=8, in_channels=3)
SUBJECT = Subject(SPEC, dataset="digits", threat=Threat("linf", 0.1), batch_size=5)
ATTACK = {"name": "apgd-ce", "norm": "linf", "epsilon": 0.1}


def verdicts_of(n: int = 3) -> Verdicts:
    ids, clean = np.arange(n, dtype=np.uint32), np.ones(n, bool)
    none = np.array([""] * n)
    return Verdicts(ids, np.arange(n, dtype=np.int32), clean, none, np.zeros(n), np.full(n, -1))


class EvaluationCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.out = Path(self.create_tempdir())
        source = SimpleNamespace(name="digits", split="test", ids_sha256="", classes=("a", "b"))
        source.num_classes, source.split_counts, source.labels = 4, None, None
        source.files_sha256 = None
        source.where = lambda: "digits test"
        hashes = np.array(["f0", "f1", "f2"])
        images = SimpleNamespace(content_sha256=lambda: "content", image_hashes=lambda: hashes)
        images.ids, images.choice, images.labels = np.arange(3), None, lambda: np.arange(3)
        self.own = object.__new__(Evaluation)
        weights = Weights({"w": np.ones((2, 2), np.float32)}, {})
        question = GivenFlags(attack="apgd-ce", n=3, preprocessing="none")
        self.own.__dict__.update(
            question=question, subject=SUBJECT, source=source, which=None, weights=weights,
            out=self.out, function=None, logits_of="logits_of", images=images, given=[],
            fingerprint=OWN, questions={}, _size=[{"parameters": 4, "multiply_adds": 9}],
        )  # fmt: skip
        self.said = io.StringIO()
        self.enter_context(contextlib.redirect_stderr(self.said))

    def ask(self, **changes) -> Evaluation:
        self.own.question = self.own.question._replace(**changes)
        return self.own


class IdentityTest(EvaluationCase):
    def test_what_tells_evaluations_apart(self):
        plain = self.own.identity(SUBJECT)
        self.assertEqual(
            plain,
            {
                "network": ["net", "program-hash", "gradient-hash", "arrays"],
                "data": ["digits", "test", 3, "none", "content"],
                "attack": ["apgd-ce", "linf", 0.1, 0, "float32"],
            },
        )
        self.ask(noreplay=True)
        self.assertEqual(self.own.identity(SUBJECT), plain | {"replay": None})
        self.ask(noreplay=False)
        self.own.given = [Path("x/ledger-2.jsonl"), Path("a/ledger-1.jsonl")]
        self.assertEqual(self.own.identity(SUBJECT)["replay"], ["ledger-1", "ledger-2"])

    @parameterized.parameters(("seed", 1), ("search_dtype", "bfloat16"))
    def test_draws_do_not_tell_clean_images_apart(self, key, value):
        plain = self.own.identity(SUBJECT)
        self.assertNotEqual(self.ask(**{key: value}).identity(SUBJECT), plain)
        clean = self.ask(attack="clean").identity(SUBJECT)
        self.assertEqual(clean["attack"], ["clean"])

    def test_a_choice_of_classes_tells(self):
        some = dataclasses.replace(SUBJECT, classes="imagenet100")
        data = self.own.identity(some)["data"]
        self.assertEqual(data[:-1], self.own.identity(SUBJECT)["data"])
        self.own.source.classes = ("a", "c")
        self.assertNotEqual(self.own.identity(some)["data"], data)

    @sweeps.rows(({}, False), ({"selection": "doubtful"}, True))
    def test_where_weights_were_chosen_tells_where_the_record_says_so(self, doubts, told):
        chosen = dataclasses.replace(SUBJECT, chosen={"split": "test"})
        with mock.patch.object(recording.trained, "flags", return_value=doubts):
            self.assertEqual("chosen" in self.own.identity(chosen), told)


class AskingTest(EvaluationCase):
    @parameterized.parameters((None, 3), (2, 2), (9, 3))
    def test_a_batch_is_no_larger_than_the_images(self, batch, expected):
        self.assertEqual(self.ask(batch=batch).batch, expected)
        self.assertEqual(self.ask(batch=None, n=9).batch, 5)

    def test_ledgers_of_all_processes(self):
        for name in ("7", "7.process-2", "7.process-1", "8", "7-1"):
            (self.out / f"ledger-{name}.jsonl").write_text('{"identity": {}}\n')
        (self.out / "ledger-7.process-3.jsonl").write_text("")  # of a process that was killed
        names = [path.name for path in self.own.ledgers("7")]
        self.assertEqual(names, [f"ledger-7{n}.jsonl" for n in ("", ".process-1", ".process-2")])
        self.assertEqual(self.own.ledgers("9"), [])

    @parameterized.parameters(
        ({}, True), ({"noreplay": True}, False), ({"attack": "pgd-20"}, False),
        ({"version": "rand"}, False),
    )  # fmt: skip
    def test_what_is_replayed(self, changes, expected):
        with mock.patch.object(
            recording.earlier, "ledgers_beside", return_value=iter(["a"])
        ) as own:
            found = self.ask(**changes).ledgers_to_replay(SUBJECT, "7")
        self.assertEqual(found, ["a"] if expected else [])
        if expected:
            images = {"dataset": "digits", "split": "test", "ids_sha256": "", "image_size": 8}
            images |= {"preprocessing": "none"}
            *given, hashed = own.call_args.args
            self.assertEqual(given, [self.out, "7", OWN, "linf", images])
            self.assertEqual(hashed.hashes.tolist(), ["f0", "f1", "f2"])

    def test_a_folder_that_cannot_be_written(self):
        recording.claim(self.out / "a" / "b")
        self.assertTrue((self.out / "a" / "b").is_dir())
        with (
            mock.patch.object(recording.os, "access", return_value=False) as access,
            self.assertRaisesRegex(ValueError, r"cannot write to --out .*\(Permission denied\)"),
        ):
            recording.claim(self.out)
        access.assert_called_once_with(self.out, recording.os.W_OK)
        (self.out / "file").write_text("")
        with self.assertRaisesRegex(ValueError, "cannot write to --out"):
            recording.claim(self.out / "file")


class MeasureTest(EvaluationCase):
    def setUp(self):
        super().setUp()
        result = Measured(AccuracyRecord(clean=0.9, flags={"a": "b"}), verdicts_of())
        self.searched = self.enter_context(
            mock.patch.object(measuring, "searched", return_value=result)
        )
        self.counted = self.enter_context(
            mock.patch.object(measuring, "counted", return_value=result)
        )
        self.own.questions = {"7": "question"}

    @parameterized.parameters(
        ("--function", 0.4999, False, True),
        ("--function", 0.5, False, False),
        ("--function", 0.1, True, False),  # of a part of the images
        (None, 0.1, False, False),
    )
    def test_a_network_that_is_mostly_wrong_may_expect_other_images(self, flag, clean, part, said):
        record = AccuracyRecord(clean=clean)
        self.searched.return_value = Measured(record, verdicts_of())
        standing = np.ones(3, bool) if part else None
        with mock.patch.object(Subject, "flag", flag):
            self.own.measure(SUBJECT, "7", standing=standing)
        self.assertEqual("jaxrobust doctor" in self.said.getvalue(), said)

    def test_attacks_of_fixed_steps_are_warned_of_gradients(self):
        broken = {"logits": [[1.0]], "gradients": [[-1.0]]}
        self.own.fingerprint = OWN._replace(probe=broken)
        standing = np.array([True, False, True])
        made = self.ask(attack="pgd-20").measure(SUBJECT, "7", standing=standing)
        self.assertEqual([*made.record.flags], ["a", "nan-gradients"])
        np.testing.assert_array_equal(self.counted.call_args.args[4], [0, 2])
        made = self.ask(attack="clean").measure(SUBJECT, "7")
        self.assertEqual(made.record.flags, {"a": "b"})  # nothing follows a gradient
        self.assertEqual(self.counted.call_count, 2)

    def test_a_network_without_answers_is_looked_at_clean_before(self):
        self.own.fingerprint = OWN._replace(probe={"logits": [[-1.0]], "gradients": [[1.0]]})
        self.ask(attack="pgd-20", start="image").measure(SUBJECT, "7")
        first, second = (call.args[3] for call in self.counted.call_args_list)
        self.assertEqual((first.attack, first.start), ("clean", None))
        self.assertEqual((second.attack, second.start), ("pgd-20", "image"))


class WriteTest(EvaluationCase):
    def write(self, own=None, begun_by=None) -> AccuracyRecord:
        self.own.questions = {"7": "question"}
        record = AccuracyRecord(
            attacks=[ATTACK], clean=2 / 3, robust=1 / 3, flags={"a": "b"},
            costs=[{"attack": "apgd-ce"}],
        )  # fmt: skip
        made = self.own.write("7", "apgd-ce", record, own, begun_by)
        (read,) = records.read(self.out)
        self.assertEqual(read.to_json(), made.to_json())
        return made

    def test_what_is_not_known(self):
        self.own.subject = dataclasses.replace(SUBJECT, net="a function's")
        self.own.source.ids_sha256 = "ids"
        self.own.question = self.own.question._replace(preprocessing=None, seed=5)
        made = self.write(begun_by={"jax": "0"})
        self.assertIsNone(made.verdicts)
        self.assertEqual((made.weights_sha256, made.dtype), (None, None))
        self.assertEqual((made.ids_sha256, made.preprocessing, made.seed), ("ids", "", 5))
        self.assertEqual(made.fingerprint["begun_by"], {"jax": "0"})
