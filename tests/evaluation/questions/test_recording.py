"""What an evaluation asks, measures and writes, with images, networks and attacks made up."""

import contextlib
import dataclasses
import io
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.config import NetworkSpec
from jaxrobust.evaluation.network.fingerprint import Fingerprint
from jaxrobust.evaluation.questions import flags, recording
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.runtime.files import locks
from jaxrobust.types import Threat, Weights
from tests.support import result_lines, sweeps
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

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
        with mock.patch.object(recording.of_weights, "training_flags", return_value=doubts):
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


NETS = """
import jax.numpy as jnp
import numpy as np
weights = np.random.default_rng(0).normal(size=(16, 4)).astype("f")
def logits_fn(x):
    return x.reshape(len(x), -1) @ weights
def wrong(x):
    return -logits_fn(x)
def pooled(x):
    return x.mean((1, 2)) @ weights[:1]
def cornered(x):
    return logits_fn(x) + 0 * jnp.sqrt(0 * x).reshape(len(x), -1).sum(1, keepdims=True)
def silent(x):
    return logits_fn(x) + jnp.nan
"""


FLAGS = {"function": "nets.py:logits_fn", "dataset": "npz:data.npz", "split": "all"}
FLAGS |= {"norm": "linf", "epsilon": "0.02", "batch": 8}


class CommandTest(parameterized.TestCase):
    """A linear network, evaluated by the command."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.enterClassContext(contextlib.chdir(folder))
        Path("nets.py").write_text(NETS)
        images = np.random.default_rng(2).integers(0, 256, (24, 4, 4, 1), np.uint8)
        weights = np.random.default_rng(0).normal(size=(16, 4))
        np.savez("data.npz", image=images, label=(images.reshape(24, -1) @ weights).argmax(1))
        for attack in ("apgd-ce", "clean"):
            cls.call(attack, attack=attack, **{"steps": 2} if attack == "apgd-ce" else {})

    @staticmethod
    def call(out, net="logits_fn", **changes) -> tuple[list[dict], str]:
        """The records of a folder after a command, and what that says."""
        _, said = ended(call(**FLAGS | {"function": f"nets.py:{net}", "out": out} | changes))
        return result_lines.read(Path(out)), said

    @sweeps.rows(
        ("apgd-ce", {}, False),
        ("apgd-ce", {"batch": 16}, False),
        ("apgd-ce", {"noreplay": True}, False),  # nothing was replayed
        ("apgd-ce", {"seed": 1}, True),
        ("apgd-ce", {"steps": 3}, True),
        ("apgd-ce", {"n": 20}, True),
        ("apgd-ce", {"again": True}, True),
        ("clean", {"seed": 1, "epsilon": "0.03"}, False),  # of no attack
        ("clean", {"n": 20}, True),
    )
    def test_which_question_is_another(self, attack, changes, other):
        folder = f"{self.create_tempdir().full_path}/copy"
        shutil.copytree(attack, folder)
        steps = {"steps": 2} if attack == "apgd-ce" else {}
        rows, said = self.call(folder, **{"attack": attack} | steps | changes)
        self.assertEqual((len(rows), "already done" in said), (1 + other, not other))

    def test_a_radius_without_an_attack_is_said_to_have_no_effect(self):
        for changes, words in (
            ({}, "--norm and --epsilon have no effect with --attack=clean"),
            ({"norm": None, "epsilon": "0.5"}, "--epsilon has no effect with --attack=clean"),
        ):
            _, said = self.call("clean", attack="clean", **changes)
            self.assertIn(words, said)
        self.assertNotIn("no effect", self.call("apgd-ce", attack="apgd-ce", steps=2)[1])

    def test_the_same_command_twice_at_once_is_refused_before_any_work(self):
        self.call("twice", attack="clean")
        (lock,) = Path("twice").glob("command-*.lock")
        reads = mock.patch.object(flags, "weights", side_effect=AssertionError)
        with locks.held(lock, resource="it", otherwise="wait"), reads:
            said = refused(call(**FLAGS, out="twice", attack="clean"))
        self.assertRegex(said, "the evaluation in twice is in use by process .*another --out")
        self.assertIn("already done", self.call("twice", attack="clean")[1])

    def test_which_ledgers_are_replayed(self):
        """Those of this network and norm at other radii, and not if a flag says so."""
        short = {"attack": "apgd-ce", "steps": 2}
        self.call("replayed", **short)
        self.call("replayed", **short | {"norm": "l2", "epsilon": "0.1"})
        for net, changes, count in (
            ("logits_fn", {"epsilon": "0.03"}, 1),
            ("logits_fn", {"epsilon": "0.04"}, 2),
            ("logits_fn", {"epsilon": "0.05", "noreplay": True}, 0),
            ("wrong", {"epsilon": "0.03"}, 0),
            ("logits_fn", {"epsilon": "0.06", "attack": "pgd-2", "steps": None}, 0),
        ):
            rows, _ = self.call("replayed", net, **short | changes)
            self.assertLen(rows[-1].get("replayed") or [], count, changes)
            names = ["replay", "apgd-ce"] if count else [rows[-1]["attacks"][0]["name"]]
            self.assertEqual(
                [name.partition("-2")[0] for name in rows[-1]["accuracy_after"]], names
            )
        # The same command finds its record, though there is more to replay by now.
        count = len(rows)
        self.assertLen(self.call("replayed", **short | {"epsilon": "0.03"})[0], count)
        # The plain number of the first one is there: nothing was replayed in it.
        self.assertLen(self.call("replayed", **short | {"noreplay": True})[0], count)

    def test_several_sizes(self):
        """A record each; with --radius_at each has the radius that has grown with its size."""
        flags = {"norm": None, "epsilon": None, "attack": "fgsm", "threat": ["l2:0.1"]}
        rows, _ = self.call("sizes", "pooled", **flags, image_size=[4, 6], radius_at=4)
        self.assertEqual([row["model"]["image_size"] for row in rows], [4, 6])
        radii = [row["attacks"][0]["epsilon"] for row in rows]
        np.testing.assert_allclose(radii, [0.1, 0.15])

    def test_a_ladder_and_several_threats(self):
        """The largest radius goes first; a union has each threat's robust images in common."""
        flags = {"norm": None, "epsilon": None, "attack": "apgd-ce", "steps": 2}
        rows, _ = self.call("ladder", **flags, ladder="linf:0:0.04:3")
        self.assertEqual([row["ladder"]["radii"] for row in rows], [[0.0, 0.02, 0.04]] * 3)
        self.assertEqual([len(row["attacks"]) for row in rows], [0, 1, 1])
        self.assertGreaterEqual(rows[1]["robust"], rows[2]["robust"])
        *both, union = self.call("union", **flags, threat=["linf:0.02", "l2:0.1"])[0]
        self.assertEqual([row["attacks"][0]["norm"] for row in both], ["linf", "l2"])
        robust = [verdicts.read(Path("union", row["verdicts"])).robust for row in both]
        self.assertEqual(union["robust"], (robust[0] & robust[1]).mean())
        (alone,), _ = self.call("only", **flags, threat=["linf:0.02", "l2:0.1"], union_only=True)
        self.assertEqual((alone["method"], alone["robust"]), ("union", union["robust"]))

    @sweeps.rows(
        ("logits_fn", {}, False), ("wrong", {}, True), ("wrong", {"attack": "pgd-2"}, False)
    )
    def test_a_network_that_is_mostly_wrong_may_expect_other_images(self, net, changes, told):
        flags = {"attack": "square"} | changes
        flags |= {"steps": 2} if flags["attack"] == "square" else {}
        _, said = self.call(self.create_tempdir().full_path, net, **flags)
        self.assertEqual("jaxrobust doctor --function" in said, told)

    @sweeps.rows(("pgd-2", True), ("clean", False))
    def test_attacks_of_fixed_steps_are_warned_of_gradients(self, attack, told):
        rows, _ = self.call(self.create_tempdir().full_path, "cornered", attack=attack)
        self.assertEqual("nan-gradients" in rows[0]["flags"], told)

    def test_a_network_without_answers(self):
        for attack in ("pgd-2", "clean"):
            flags = {"function": "nets.py:silent", "dataset": "npz:data.npz", "split": "all"}
            flags |= {"epsilon": "0.02", "out": "silent", "attack": attack}
            said = refused(call(**flags))
            self.assertIn("the logits of all 24 images are NaN or infinite", said)


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
