"""What an evaluation asks, measures and writes, with images, networks and attacks made up."""

import contextlib
import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.config import NetworkSpec
from jaxrobust.evaluation.network.fingerprint import Fingerprint
from jaxrobust.evaluation.questions import measuring, recording
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat, Weights

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
        question = Question(attack="apgd-ce", images=3, preprocessing="none")
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

    @parameterized.parameters(({}, False), ({"selection": "doubtful"}, True))
    def test_where_weights_were_chosen_tells_where_the_record_says_so(self, doubts, told):
        chosen = dataclasses.replace(SUBJECT, chosen={"split": "test"})
        with mock.patch.object(recording.trained, "flags", return_value=doubts):
            self.assertEqual("chosen" in self.own.identity(chosen), told)

    def test_a_number_is_kept_with_its_question_which_programs_do_not_change(self):
        with mock.patch.object(recording.earlier, "number", return_value="7") as number:
            self.assertEqual(self.own.number(SUBJECT, more=1), "7")
            out, identity, question, network = number.call_args.args
            self.assertEqual((out, network), (self.out, OWN))
            self.assertEqual(identity, self.own.identity(SUBJECT) | {"more": 1})
            how = {"again": False, "confirmed": self.own._confirms}
            self.assertEqual(number.call_args.kwargs, how)
            self.assertEqual(self.own.questions, {"7": question})
            self.own.fingerprint = OWN._replace(program="another", gradient="one more")
            self.ask(again=True).number(SUBJECT, more=1)
            self.assertEqual(number.call_args.args[2], question)
            self.assertEqual(number.call_args.kwargs, how | {"again": True})
            self.own.number(SUBJECT)
            self.assertNotEqual(number.call_args.args[2], question)


class AskingTest(EvaluationCase):
    def test_another_question_keeps_images_and_their_preparation(self):
        same = Question(attack="apgd-ce")
        self.assertIs(self.own.with_question(same), self.own)
        self.own.given = ["a ledger"]
        other = self.own.with_question(Question(attack="square", preprocessing="x", replay=("r",)))
        self.assertEqual((other.question.images, other.question.preprocessing), (3, "none"))
        self.assertEqual((other.question.attack, other.given), ("square", ["a ledger"]))
        self.assertEqual(self.own.question.attack, "apgd-ce")
        self.assertEqual(self.own.with_question(Question(attack="square")).given, [])

    @parameterized.parameters((None, 3), (2, 2), (9, 3))
    def test_a_batch_is_no_larger_than_the_images(self, batch, expected):
        self.assertEqual(self.ask(batch=batch).batch, expected)
        self.assertEqual(self.ask(batch=None, images=9).batch, 5)

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

    @parameterized.parameters(
        ({"noreplay": True}, (), True),
        ({"noreplay": True}, ["x"], False),  # in which points were tried
        ({"noreplay": True, "again": True}, (), False),
        ({}, (), False),
    )
    def test_a_record_that_had_nothing_to_replay(self, changes, replayed, found):
        there = AccuracyRecord(evaluation="7", replayed=list(replayed) or None)
        self.ask(**changes)
        with (
            mock.patch.object(Evaluation, "recorded", return_value=there),
            mock.patch.object(Evaluation, "numbered", return_value="7") as numbered,
        ):
            self.assertEqual(self.own._without_replay(SUBJECT), there if found else None)
        if found:
            self.assertNotIn("replay", numbered.call_args.args[0])

    def test_what_begins(self):
        with mock.patch.object(recording.hardware, "left_idle", return_value="4 cores idle"):
            self.own.announce(SUBJECT)
            self.own.which = "train, step 3"
            self.ask(attack="clean").announce(SUBJECT, np.array([True, False, True]))
        first, warning, second, _ = self.said.getvalue().splitlines()
        self.assertStartsWith(first, "net on digits test: apgd-ce, linf 0.1 on 3 images, ")
        self.assertEqual(warning, "WARNING: 4 cores idle")
        self.assertStartsWith(second, "net (train, step 3) on digits test: clean on 2 images, ")

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

    def test_attacks_that_search(self):
        self.own.given = ["given"]
        standing, beyond = np.array([True, False, True]), np.array([False, False, True])
        made = self.own.measure(
            SUBJECT, "7-1", standing=standing, beyond=beyond, ledgers=["beside"]
        )
        self.assertIs(made, self.searched.return_value)
        place = (SUBJECT, self.own.images, "logits_of", self.own.question)
        self.assertEqual(self.searched.call_args.args, place)
        how = self.searched.call_args.kwargs
        self.assertEqual(how["known"], OWN._replace(question="question"))
        self.assertEqual(how["ledger"], self.out / "ledger-7-1.jsonl")
        self.assertIs(how["standing"], standing)
        self.assertIs(how["beyond"], beyond)
        self.assertEqual(how["replay"], ["beside", "given"])
        self.counted.assert_not_called()

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

    def test_a_record_with_its_verdicts(self):
        made = self.write(verdicts_of())
        self.assertEqual(made.verdicts, verdicts.file_of("7"))
        read = verdicts.read(self.out / made.verdicts)
        self.assertEqual(read.image_ids.tolist(), [0, 1, 2])
        self.assertEqual((made.evaluation, made.method, made.image_ids), ("7", "apgd-ce", "0..2"))
        self.assertEqual((made.dataset, made.split), ("digits", "test"))
        self.assertEqual((made.seed, made.search_dtype, made.dtype), (0, "float32", "float32"))
        self.assertEqual(made.interval, records.intervals(2 / 3, 1 / 3, 3))
        self.assertIn("step_rule", made.costs[0])
        self.assertEqual(made.fingerprint["images"], "content")
        self.assertEqual(made.fingerprint["question"], "question")
        self.assertNotIn("begun_by", made.fingerprint)
        self.assertEqual(made.model["name"], "net")
        self.assertIsNone(made.ids_sha256)
        self.assertIsNotNone(made.weights_sha256)
        self.assertEqual((made.size["parameters"], made.flags), (4, {"a": "b"}))
        self.assertIsNotNone(made.time)

    def test_what_is_not_known(self):
        self.own.subject = dataclasses.replace(SUBJECT, net="a function's")
        self.own.source.ids_sha256 = "ids"
        self.own.question = self.own.question._replace(preprocessing=None, seed=5)
        made = self.write(begun_by={"jax": "0"})
        self.assertIsNone(made.verdicts)
        self.assertEqual((made.weights_sha256, made.dtype), (None, None))
        self.assertEqual((made.ids_sha256, made.preprocessing, made.seed), ("ids", "", 5))
        self.assertEqual(made.fingerprint["begun_by"], {"jax": "0"})

    def test_doubts_about_the_training(self):
        with (
            mock.patch.object(recording, "_training", return_value={"phases": []}),
            mock.patch.object(recording.trained, "flags", return_value={"selection": "c"}),
        ):
            made = self.write()
        self.assertEqual(made.flags, {"a": "b", "selection": "c"})
        self.assertEqual(made.training, {"phases": []})

    def test_the_first_process_writes(self):
        self.own.questions = {"7": "question"}
        with mock.patch.object(recording.jax, "process_index", return_value=1):
            self.own.write("7", "apgd-ce", AccuracyRecord(), verdicts_of())
        self.assertEmpty([*self.out.iterdir()])

    def test_a_ball_is_measured_unless_it_is_there(self):
        calls = mock.Mock(wraps=None)
        result = Measured(AccuracyRecord(clean=1.0), verdicts_of(), {"jax": "0"})
        with (
            mock.patch.object(Evaluation, "number", return_value="7"),
            mock.patch.object(Evaluation, "recorded", side_effect=["there", None, None]),
            mock.patch.object(Evaluation, "_without_replay", side_effect=["too", None]),
            mock.patch.object(Evaluation, "ledgers_to_replay", return_value=["a"]),
            mock.patch.object(Evaluation, "announce"),
            mock.patch.object(recording.earlier, "warn_of_older") as warn,
            mock.patch.object(Evaluation, "measure", return_value=result) as measure,
            mock.patch.object(Evaluation, "write", new=calls.write),
        ):
            self.assertEqual([self.own.record(SUBJECT) for _ in range(2)], ["there", "too"])
            measure.assert_not_called()
            self.assertIs(self.own.record(SUBJECT), calls.write.return_value)
        measure.assert_called_once_with(SUBJECT, "7", ledgers=["a"])
        calls.write.assert_called_once_with("7", "apgd-ce", *result)
        ours = {"dataset": "digits", "split": "test", "method": "apgd-ce", "seed": 0}
        ours |= {"weights": None, "image_ids": "0..2"}
        warn.assert_called_once_with(self.out, ours, Threat("linf", 0.1))


class NetworkTest(parameterized.TestCase):
    """The network as attacks take it."""

    def test_one_of_each_type_with_weights_of_that_type(self):
        applied = []

        def apply(params, stats, x, key):
            applied.append((params["w"].dtype.name, stats, key))
            return x, stats

        made = []
        create = lambda dtype: made.append(dtype) or SimpleNamespace(apply=apply)  # noqa: E731
        subject = SimpleNamespace(create=create, keyed=False)
        weights = Weights({"w": np.ones(2, np.float32)}, {"s": 1})
        of = measuring.networks_of(subject, weights)
        self.assertIs(of("float32"), of("float32"))
        self.assertEqual(of("bfloat16")("x"), "x")
        self.assertEqual(made, ["float32", "bfloat16"])
        self.assertEqual(applied, [("bfloat16", {"s": 1}, None)])
        subject.keyed = True
        of("float32")("x", "key")
        self.assertEqual(applied[1], ("float32", {"s": 1}, "key"))

    @parameterized.parameters((None,), (np.array([False, True, False, True]),))
    def test_what_autoattack_is_asked(self, standing):
        prepared = SimpleNamespace(labels=lambda: np.arange(4) + 10, shape=(4, 1, 1, 1))
        prepared = mock.MagicMock(wraps=prepared, shape=(4, 1, 1, 1))
        prepared.__len__.return_value = 4
        prepared.labels.return_value = np.arange(4) + 10
        prepared.ids = np.arange(4)
        question = Question(attack="apgd-ce,square", steps=3, seed=5, batch=None, rule=None)
        subject = mock.Mock(ball=Threat("l2", 0.5), keyed=False)
        subject.slots_for.side_effect = lambda count: 100 + count
        with mock.patch.object(measuring, "autoattack") as autoattack:
            made = measuring.searched(
                subject, prepared, str, question, known=OWN, ledger=Path("l"),
                standing=standing, beyond=np.array([1, 0, 0, 1], bool), replay=["r"],
            )  # fmt: skip
        self.assertIs(made, autoattack.return_value.measured.return_value)
        network, images, labels = autoattack.call_args.args
        how = autoattack.call_args.kwargs
        places = [0, 1, 2, 3] if standing is None else [1, 3]
        self.assertEqual(network, "float32")
        self.assertLen(images, len(places))
        self.assertEqual(labels.tolist(), [10 + place for place in places])
        self.assertEqual(how["image_ids"], places)
        self.assertEqual(how["robust_beyond"].tolist(), [bool(p in (0, 3)) for p in places])
        self.assertEqual((how["norm"], how["epsilon"]), ("l2", 0.5))
        self.assertEqual((how["attacks"], how["version"]), (("apgd-ce", "square"), "standard"))
        self.assertEqual(how["overrides"], {"apgd-ce": {"steps": 3}, "square": {"steps": 3}})
        self.assertEqual((how["seed"], how["ledger"], how["replay"]), (5, Path("l"), ["r"]))
        self.assertEqual((how["identity"], how["search_fn"]), (OWN, None))
        self.assertEqual(how["batch_size"], 100 + len(places))
        self.assertEqual((how["rule"], how["draws"]), (None, None))

    def test_draws_and_low_precision(self):
        prepared = mock.MagicMock(shape=(1, 1, 1, 1))
        prepared.__len__.return_value = 1
        prepared.labels.return_value = np.zeros(1, int)
        how = {"known": OWN, "ledger": Path("l")}
        with mock.patch.object(measuring, "autoattack") as autoattack:
            question = Question(version="rand", rule="mean", draws=3, batch=7)
            of = lambda dtype: lambda x: f"{dtype} of {x}"  # noqa: E731
            subject = mock.Mock(ball=Threat("linf", 0.5), keyed=False)
            measuring.searched(subject, prepared, of, question, **how)
            self.assertEqual(autoattack.call_args.args[0]("x", "keys"), "float32 of x")
            given = autoattack.call_args.kwargs
            self.assertEqual((given["rule"], given["draws"], given["batch_size"]), ("mean", 3, 7))
            self.assertIsNone(given["robust_beyond"])
            subject.keyed = True
            measuring.searched(subject, prepared, str, question, **how)
            self.assertEqual(autoattack.call_args.args[0], "float32")
            question = Question(search_dtype="bfloat16")
            measuring.searched(subject, prepared, str, question, **how)
            self.assertEqual(autoattack.call_args.kwargs["search_fn"], "bfloat16")


if __name__ == "__main__":
    absltest.main()
