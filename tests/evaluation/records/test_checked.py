"""A record that contradicts itself or its verdicts is shown by no command without a word."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.commands import compare, report
from jaxrobust.commands.results import runs
from jaxrobust.evaluation.records import checked, records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers.commands import figure, reproduce
from jaxrobust.publish import network_account, robustbench_entry
from jaxrobust.publish.network_account import Account
from jaxrobust.training.run import accuracies
from tests.support import command_calls, reports, sweeps
from tests.support.evaluations import call
from tests.support.paths import ROOT

N = 60
NET = """
import numpy as np
weights = np.random.default_rng({}).normal(size=(64, 10)).astype("f")
weights += np.random.default_rng(0).normal(size=(64, 10)).astype("f")
def logits_fn(x):
    return (x.reshape(len(x), -1) - 0.5) @ weights
"""
BALL = {"norm": "linf", "epsilon": "0.02", "attack": "apgd-ce", "steps": 2}
DATA = {"dataset": "npz:data.npz", "split": "all"}


def words_of(main: Callable, *words: object) -> tuple[int, str]:
    code, printed, said = command_calls.words(main, *words)
    return code, printed + said


def evaluated(**flags) -> tuple[int, str]:
    code, printed, said = call(**({"function": "b.py:logits_fn"} | DATA | BALL | flags))
    return code, printed + said


def by_function(function: Callable) -> Callable[[], tuple[int, str]]:
    """What a command does that needs more than these records, from where it reads them on."""

    def read() -> tuple[int, str]:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return 0, f"{function()} {said.getvalue()}"
        except ValueError as error:
            return 2, str(error)

    return read


def entry() -> AccuracyRecord:
    with (
        mock.patch.object(robustbench_entry, "lacks", lambda record: []),
        mock.patch.object(robustbench_entry, "_KEYS", ()),
    ):
        return robustbench_entry.find(Path("b/results.jsonl"), None, None)  # type: ignore[arg-type]


FILE = Path("b/results.jsonl")
# Each command that reads one record, b, or two: -> exit code, and all that it says.
ONE: dict[str, Callable[[], tuple[int, str]]] = {
    "evaluate": lambda: evaluated(out="b"),
    "union": lambda: evaluated(out="b", norm=None, epsilon=None, threat=["linf:0.02", "linf:0.01"]),
    "report": lambda: words_of(report.main, "a", "b", "--out", "page.html"),
    "figure": lambda: words_of(figure.main, "b", "--kind=attacks", "--out=one.svg"),
    "runs": lambda: words_of(runs.main, "."),
    "reproduce": lambda: words_of(reproduce.main, "b", "--paper=revisiting_at", "--table=1"),
    "export": by_function(lambda: network_account.with_records(Account("x"), FILE, None)),
    "entry": by_function(entry),
}
TWO: dict[str, Callable[[], tuple[int, str]]] = {
    "against": lambda: evaluated(out="c", function="a.py:logits_fn", against="b"),
    "compare": lambda: words_of(compare.main, "a", "b"),
    "groups": lambda: words_of(compare.main, "a", "a2", "against", "b"),
    "figure of two": lambda: words_of(figure.main, "a", "b", "--kind=compare", "--out=two.svg"),
}


def edit(change: Callable[[dict], dict]) -> None:
    row = json.loads(FILE.read_text())
    FILE.write_text(json.dumps(row | change(row)) + "\n")


def turned(*, sealed: bool, equal: bool = False) -> None:
    """Let images fall that survived; `equal`: and as many stand that fell."""
    (path,) = Path("b").glob("verdicts-*.json")
    found = verdicts.read(path)
    fooled_by = found.fooled_by.astype(object)
    fooled_by[np.flatnonzero(found.robust)[:2]] = "apgd-ce"
    if equal:
        fooled_by[np.flatnonzero(found.clean & ~found.robust)[:2]] = ""
    found = found._replace(fooled_by=fooled_by.astype(str))
    if sealed:
        number = path.stem.partition("-")[2]
        verdicts.write(path, number, found)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fooled_by": [*fooled_by]}))


# What is wrong with b -> how it is made, and what has to be said.
WRONG: dict[str, tuple[Callable[[], None], str]] = {
    "contradicting verdicts": (lambda: turned(sealed=True), "does not belong to its record"),
    "edited verdicts": (lambda: turned(sealed=False, equal=True), "has been edited"),
    "edited accuracy": (lambda: edit(lambda row: {"robust": 1.0}), "contradicts itself"),
    "edited throughout": (
        lambda: edit(
            lambda row: {
                "robust": 1.0,
                "accuracy_after": {"apgd-ce": 1.0},
                "interval": records.intervals(row["clean"], 1.0, N),
            }
        ),
        "does not belong to its record",
    ),
    "edited interval": (
        lambda: edit(lambda row: {"interval": {"clean": [0.9, 1.0], "robust": [0.9, 1.0]}}),
        "contradicts itself",
    ),
    "other ids": (lambda: edit(lambda row: {"image_ids": "60..119"}), "its images are not 60..119"),
    "missing verdicts": (
        lambda: [path.unlink() for path in Path("b").glob("verdicts-*.json")],
        "missing",
    ),
}


class CommandsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.made = Path(cls.enterClassContext(tempfile.TemporaryDirectory())) / "made"
        cls.made.mkdir()
        with contextlib.chdir(cls.made):
            x = np.random.default_rng(3).random((N, 8, 8, 1))
            weights = np.random.default_rng(0).normal(size=(64, 10))
            label = ((x.reshape(N, -1) - 0.5) @ weights).argmax(1)
            pixels = np.round(255 * x).astype(np.uint8)
            np.savez("data.npz", image=pixels, label=label)
            for seed, name in enumerate(("a", "a2", "b"), 1):
                Path(f"{name}.py").write_text(NET.format(seed))
                code, said = evaluated(function=f"{name}.py:logits_fn", out=name)
                assert not code, said

    @contextlib.contextmanager
    def records(self) -> Iterator[None]:
        """Stand in a folder of sound records, which nobody has edited yet."""
        folder = Path(self.create_tempdir()) / "here"
        shutil.copytree(self.made, folder)
        with contextlib.chdir(folder):
            yield

    @parameterized.parameters(*ONE, *TWO)
    def test_what_is_wrong_is_said_and_what_is_sound_is_read(self, command):
        """`evaluate`, `report` and `--against` printed such records without a word."""
        with self.records():
            code, said = (ONE | TWO)[command]()
        self.assertEqual(code, 0, said)
        for wrong, (make, words) in WRONG.items():
            self.assertNotIn(words, said)
            with self.subTest(wrong), self.records():
                make()
                code, told = (ONE | TWO)[command]()
                self.assertIn(words, " ".join(told.split()))
                needed = command in (*TWO, "union")
                shown = command in ("report", "runs") or (
                    wrong == "missing verdicts" and not needed
                )
                self.assertEqual(code, 0 if shown else 2, told)

    @sweeps.rows("report", "runs", "compare")
    def test_an_edited_radius(self, command):
        """A record of a smaller radius than that of its points was shown without a word."""
        with self.records():
            edit(lambda row: {"attacks": [attack | {"epsilon": 0.01} for attack in row["attacks"]]})
            said = " ".join((ONE | TWO)[command]()[1].split())
        self.assertIn("0.02 away in linf, but the record's radius is 0.01", said)

    @sweeps.rows(*TWO)
    def test_other_images(self, command):
        with self.records():
            (path,) = Path("b").glob("verdicts-*.json")
            found = verdicts.read(path)
            hashes = np.array([f"f{at:08x}" for at in range(N)])
            verdicts.write(path, path.stem.partition("-")[2], found._replace(hashes=hashes))
            code, said = TWO[command]()
        self.assertEqual(code, 2, said)
        self.assertIn("60 of 60 images with the same names differ", said)


class RecordTest(parameterized.TestCase):
    def test_records_of_all_kinds_are_sound(self):
        """Those that this repository keeps, by several versions, and the golden ones."""
        files = [*ROOT.glob("tools/records/**/results.jsonl")]
        files += [*ROOT.glob("tests/golden/records/*.jsonl")]
        count = 0
        for file in files:
            for line in file.read_text().splitlines():
                record = AccuracyRecord.from_json(json.loads(line))
                checked.if_there(record, file)
                count += 1
        self.assertGreater(count, 200)

    @sweeps.rows(
        ({"clean": 1.5}, "not between 0 and 1"),
        ({"clean": 0.123}, "is not a fraction of its 60 images"),
        ({"accuracy_after": {"apgd-ce": 0.9, "apgd-t": 0.4}}, "after all attacks"),
        ({"image_ids": "0..58"}, "its 59 images"),
        ({"worst_case": [{"method": "x", "robust": 0.5, "images": 60, "interval": [0.0, 1.0]}]},
         "its accuracy under x"),
        ({"corruptions": {"accuracy": {"fog": {"1": 0.5}}, "mean": 0.75}}, "mean under corr"),
        ({"certified": {"accuracy": {"0": 1.2}}}, "its certified accuracy"),
        ({"stopped": {"stopped_after": 50, "of": 60, "alpha": 0.05, "robust": [0, 1]}},
         "stopped after 50 images, but lists 60"),
    )  # fmt: skip
    def test_contradictions(self, changes, words):
        sound = reports.record(reports.found(60), "a1") | {"verdicts": None}
        checked.check(AccuracyRecord.from_json(sound), "here")
        with self.assertRaisesRegex(ValueError, f"here has a record a1 .*{words}"):
            checked.check(AccuracyRecord.from_json(sound | changes), "here")

    def test_a_training_shows_no_edited_record(self):
        folder = Path(self.create_tempdir())
        sound = reports.record(reports.found(60), "a1") | {"verdicts": None, "evaluation": None}
        del sound["evaluation"]
        (folder / "results.jsonl").write_text(json.dumps(sound) + "\n")
        self.assertIn("train, step a1, ema", accuracies.table(folder))
        (folder / "results.jsonl").write_text(json.dumps(sound | {"robust": 0.95}) + "\n")
        with self.assertRaisesRegex(ValueError, "contradicts itself"):
            accuracies.table(folder)

    def test_a_folder_of_weights_with_an_edited_accuracy(self):
        sound = reports.record(reports.found(60), "a1") | {"verdicts": None, "clean": 0.25}
        about = {"accuracies": [sound], "norm": None, "epsilon": None, "preprocessing": None}
        with (
            mock.patch.object(network_account.load, "about", lambda network: about),
            self.assertRaisesRegex(ValueError, "config.json of x has a record a1 that contradicts"),
        ):
            network_account.of_weights(mock.Mock(), "x")
