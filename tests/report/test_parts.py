"""The rules of the page's parts: commands, differences, confusions, classes, radii, examples."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
from absl import flags
from absl.testing import parameterized

from jaxrobust.commands import evaluate  # noqa: F401  # defines the flags
from jaxrobust.data.transforms.corruptions import KINDS
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report.curves import Curve, CurveEvent, Metrics
from jaxrobust.report.gathered import ReportedEvaluation, ReportedRun
from jaxrobust.report.parts import (
    commands,
    comparison,
    evaluation,
    examples,
    radii,
    training,
)
from jaxrobust.report.parts.examples import Fooled

ATTACK = {"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255, "steps": 20}
FIFTY = {"dataset": "cifar10", "split": "test", "image_ids": "0..49", "seed": 3}
FIFTY |= {"method": "apgd-ce, steps 20"}


def verdicts(fooled_by, labels=None, reached=None, ids=None) -> Verdicts:
    names = np.array(fooled_by)
    n, clean = len(names), names != "clean"
    of = lambda values, usual, kind: np.array(usual if values is None else values, kind)  # noqa: E731
    none = [-1] * n
    columns = (of(ids, range(n), np.uint32), of(labels, [0] * n, np.int32), clean, names)
    return Verdicts(*columns, np.zeros(n), of(reached, none, np.int32))


def one(seen=None, *, name="net", file="r.jsonl", classes=(), run=None, config=None, **record):
    known = {"dataset": "digits", "split": "test", "attacks": [ATTACK], "method": "apgd-ce"}
    made = AccuracyRecord(**(known | record))
    own = ReportedEvaluation(name, Path(file), made, seen, list(classes), run, config or {})
    return own


def data_of(drawn: str, key: str = "k") -> dict:
    """The data of a figure."""
    return json.loads(re.search(f'id="data-{key}">(.*?)</script>', drawn)[1])


def words(workdir=None, seen=None, **record) -> list[str]:
    return shlex.split(commands.evaluate(one(seen, **record), workdir))


def after(said: list[str], flag: str) -> str | None:
    return said[said.index(flag) + 1] if flag in said else None


class CommandsTest(parameterized.TestCase):
    def test_a_run_and_its_phase(self):
        said = words("runs/1", weights="train, step 3, ema", seed=None)
        self.assertEqual(
            said[:6], ["jaxrobust", "evaluate", "--workdir", "runs/1", "--phase", "train"]
        )
        self.assertEqual(after(said, "--seed"), "0")
        self.assertNotIn("--phase", words("runs/1", weights="weights.safetensors"))
        self.assertNotIn("--model", said)

    def test_a_number_of_images(self):
        for ids, choice, n, split in (
            ("0..59", None, None, "test[:60]"),  # older, of the first ones or of all
            ("5..59", None, None, "test"),
            (None, None, None, "test"),
            ("0..59", "all", None, "test"),
            ("0..9, 20, 29..31", "hash", "14", "test"),
            ("0..59", "robustbench", "60", "test"),
        ):
            with self.subTest(row=(ids, choice, n, split)):
                said = words(image_ids=ids, image_choice=choice, split="test", dataset="digits")
                self.assertEqual((after(said, "--n"), after(said, "--split")), (n, split))
                old = words(image_ids="0..9", split="test[:90]", dataset="digits")
                self.assertEqual((after(old, "--n"), after(old, "--split")), ("10", "test[:90]"))

    def test_draws(self):
        for record, rule, draws in (
            ({"method": "autoattack rand, majority of 5 draws"}, "majority", "5"),
            ({"method": "autoattack rand"}, "one-draw", None),  # of an older version
            ({"method": "apgd-ce, rand, steps 3"}, "one-draw", None),
            ({"method": "autoattack standard"}, None, None),
        ):
            with self.subTest(row=(record, rule, draws)):
                own = {"draws": {"rule": "majority", "draws": 5}} if draws else {}
                said = words(**record, **own)
                self.assertEqual((after(said, "--rule"), after(said, "--draws")), (rule, draws))
                once = {"rule": "mean", "draws": 1}
                said = words(method="autoattack rand", draws=once)
                self.assertEqual((after(said, "--rule"), after(said, "--draws")), ("mean", "1"))

    def attack(self, **record) -> list[str]:
        said = words(**record)
        start = next(
            i
            for i, word in enumerate(said)
            if word in ("--norm", "--threat", "--attack", "--worst_case")
        )
        return said[start : said.index("--seed")]

    def test_attacks(self):
        ball = "--norm linf --epsilon 8/255 --attack"
        square, l2 = ATTACK | {"name": "square"}, ATTACK | {"norm": "l2", "epsilon": 0.5}
        every = [ATTACK | {"name": name} for name in ("apgd-ce", "apgd-t", "fab-t", "square")]
        for record, said in (
            ({"attacks": []}, "--attack clean"),
            ({"method": "autoattack plus"}, f"{ball} autoattack --version plus"),
            (
                {"method": "apgd-ce + square, custom, steps 5, step 0.003"},
                f"{ball} apgd-ce,square --version custom --steps 5 --step 0.003",
            ),
            ({"method": "pgd-20, start uniform-boxed"}, f"{ball} pgd-20 --start uniform-boxed"),
            ({"method": None}, f"{ball} apgd-ce --steps 20"),
            (
                {"method": None, "attacks": [ATTACK, square | {"steps": 9}]},
                f"{ball} apgd-ce,square",
            ),
            (
                {"method": "union", "attacks": [ATTACK, l2]},
                "--threat linf:8/255 --threat l2:0.5 --attack apgd-ce --steps 20",
            ),
            ({"method": None, "attacks": every}, f"{ball} autoattack"),
        ):
            with self.subTest(str(record)):
                self.assertEqual(self.attack(**record), said.split())

    def test_a_worst_case(self):
        for shares, alone in (((0.5, 0.4), False), ((0.5, None), True), ((None, None), True)):
            with self.subTest(row=(shares, alone)):
                parts = [{"robust": share} for share in shares]
                said = self.attack(worst_case=parts, attacks=[ATTACK, ATTACK])
                expected = ["--worst_case", "--threat", "linf:8/255", *["--union_only"] * alone]
                self.assertEqual(said, expected)

    def test_what_is_said_beside_a_command(self):
        for record, start in (
            ({"method": None}, "This is the test of a training"),
            ({"method": None, "attacks": []}, "The command gives the same verdicts"),
            ({}, "The command gives the same verdicts"),
            ({"task": "maps"}, "No command supports tasks: call this in Python"),
        ):
            self.assertStartsWith(commands.about(one(**record)), start)
        for record, end in (
            ({}, "Add --noreplay if the folder now contains evaluations at other radii."),
            ({"replayed": []}, "were tried first here, as the record says."),
            ({"method": "apgd-ce, ladder"}, "were tried first here, as the record says."),
        ):
            self.assertEndsWith(commands.about(one(**record)), end)

    def test_names_a_network_that_is_none_of_ours(self):
        for function, expected in (
            ({"name": "net.py:f"}, ["--function", "net.py:f"]),
            ({"name": "net.pt2", "torch": "2.13.0"}, ["--torch", "net.pt2"]),
            (
                {
                    "name": "n.py:f",
                    "torch": "2.13.0",
                    "arguments": {"width": 6},
                    "output": "logits",
                },
                ["--torch", "n.py:f", "--torch_args", '{"width": 6}', "--torch_output", "logits"],
            ),
        ):
            with self.subTest(row=(function, expected)):
                said = words(function=function, **FIFTY)
                self.assertEqual(said[2 : 2 + len(expected)], expected)
                self.assertIn("--steps", said)

    def test_names_corruptions(self):
        whole = {str(severity): 0.5 for severity in range(1, 6)}
        some = {"images": "computed", "accuracy": {"fog": whole, "contrast": {"3": 0.5, "4": 0.4}}}
        said = words(attacks=[], corruptions=some, **FIFTY)
        self.assertStartsWith(said[said.index("--split") + 1], "test")
        self.assertEqual(
            said[said.index("--corruptions") :],
            ["--corruptions", "fog,contrast-3,contrast-4", "--seed", "3"],
        )
        every = {"images": "files", "accuracy": dict.fromkeys(KINDS, whole)}
        own = {"dataset": "cifar10-c:there", "split": "fog-1"}
        said = words(attacks=[], corruptions=every, **FIFTY | own)
        self.assertNotIn("--split", said)
        self.assertEqual(said[said.index("--corruptions") + 1], "all")
        frost = every | {"images": "computed", "frost_sha256": "ab"}
        said = words(attacks=[], corruptions=frost, **FIFTY)
        self.assertEqual(said[said.index("--frost") + 1], "PHOTOGRAPHS")
        self.assertEmpty({word[2:] for word in said if word.startswith("--")} - set(flags.FLAGS))

    def test_of_a_task_it_is_a_call(self):
        self.assertStartsWith(words(task="maps")[0], "evaluation.autoattack(network,")

    def test_has_no_flag_that_the_command_lacks(self):
        said = words(function={"name": "n.py:f", "torch": "2", "arguments": {"a": 1}}, **FIFTY)
        named = {word[2:] for word in said if word.startswith("--")}
        self.assertEmpty(named - set(flags.FLAGS))


class ComparisonTest(parameterized.TestCase):
    def test_groups_have_each_network_once(self):
        seen = verdicts([""])
        own = [one(seen, name=n, weights_sha256=w) for n, w in (("a", "1"), ("b", "2"), ("c", "1"))]
        own += [one(seen, name="d", weights_sha256="3", split="train")]
        own += [one(None, name="e", weights_sha256="4")]
        (group,) = comparison.groups(own)
        self.assertEqual([each.name for each in group], ["a", "b"])

    def test_a_difference_is_the_second_minus_the_first(self):
        a = one(verdicts(["", "", "x", "replay"], ids=[0, 1, 2, 3]))
        b = one(verdicts(["", "x", "x", "x", "x"], ids=[0, 1, 2, 3, 9]))
        found = comparison.difference(a, b, "robust")
        self.assertEqual((found.n, found.gained, found.lost), (3, 0, 1))  # without the replayed one
        self.assertEqual(comparison.difference(b, a, "robust").gained, 1)
        self.assertEqual(comparison.difference(a, b, "clean").lost, 0)
        other = one(verdicts([""] * 4, labels=[0, 0, 1, 0]))
        self.assertIsNone(comparison.difference(a, other, "robust"))
        self.assertIsNone(comparison.difference(a, one(verdicts([""], ids=[7])), "robust"))
        every = one(verdicts(["replay"] * 4))
        self.assertIsNone(comparison.difference(a, every, "robust"))

    def test_what_is_told_apart_alone_need_not_be_among_several(self):
        """Six images of forty are gained: p is 2 / 2^6, and twice that by Holm's correction."""
        seen = [verdicts(["x"] * 6 + [""] * 34), verdicts([""] * 40), verdicts([""] * 40)]
        group = [one(v, name=n, weights_sha256=n) for v, n in zip(seen, "abc", strict=True)]
        for some, p, strong in ((group[:2], "0.0312", [True]), (group, "0.0625", [False] * 2)):
            text = comparison.part(some)
            self.assertIn(f">{p}<", text)
            bars = data_of(text, "pairs-0-robust")["rows"]
            self.assertEqual([bar["strong"] for bar in bars], strong)


class ConfusionTest(parameterized.TestCase):
    def of(self, labels, reached, classes=(), robust=0.5):
        fooled_by = ["x" if r is not None else "" for r in reached]
        codes = [-1 if r is None else r for r in reached]
        seen = verdicts(fooled_by, labels, codes)
        return one(seen, classes=classes, robust=robust)

    def test_the_most_frequent_pair_first_and_ties_by_the_label(self):
        of = self.of([2, 2, 1, 0, 1, 3], [1, 1, 0, 2, 2, None])
        self.assertEqual(evaluation.confused(of), [(2, 1, 2), (0, 2, 1), (1, 0, 1), (1, 2, 1)])
        self.assertEqual(evaluation.confused(one()), [])

    def test_what_is_not_known(self):
        self.assertIn(
            "there are no per-image verdicts", evaluation.confusion(one(robust=0.5), "k")[1]
        )
        self.assertFalse(evaluation.confusion(one(), "k")[1])
        wrong = one(verdicts(["clean", ""]), robust=0.5)
        self.assertIn("No attack fooled an image", evaluation.confusion(wrong, "k")[1])
        self.assertFalse(evaluation.confusion(one(verdicts(["clean", ""])), "k")[1])
        older = self.of([0, 1], [-1, -1])
        self.assertIn(
            "is unknown: these verdicts come from an older version",
            evaluation.confusion(older, "k")[1],
        )
        some = one(verdicts(["x", "x", "clean"], [0, 1, 2], [1, -1, -1]), robust=0.0)
        self.assertIn(
            "1 more fooled images lack a recorded prediction.", evaluation.confusion(some, "k")[0]
        )


class EvaluationPartTest(parameterized.TestCase):
    def after(self, **record):
        return evaluation.accuracies(one(**record))

    def test_what_is_left(self):
        left = {"a": 0.5, "b": None, "c": 0.0}
        self.assertEqual(
            self.after(clean=0.9, robust=0.0, accuracy_after=left),
            [("clean", 0.9), ("after a", 0.5), ("after c", 0.0)],
        )
        self.assertEqual(self.after(clean=0.9), [("clean", 0.9)])
        expected = [("clean", 0.9), ("under attack", 0.5)]
        self.assertEqual(self.after(clean=0.9, robust=0.5), expected)
        of_union = {"method": "union", "clean": 0.9, "robust": 0.1, "accuracy_after": {"l2": 0.2}}
        union = [("clean", 0.9), ("after l2", 0.2), ("under all", 0.1)]
        self.assertEqual(self.after(**of_union), union)
        parts = [{"robust": 0.3}]
        worst = [("clean", 0.9), ("under l2", 0.3), ("under all", 0.1)]
        self.assertEqual(self.after(**of_union, worst_case=parts), worst)
        self.assertEqual(self.after(**of_union, worst_case=[{"robust": None}]), union)
        of_union["accuracy_after"] = {"linf": 0.4, "l2": 0.2}  # of what stood before it
        parts = [{"robust": 0.4}, {"robust": None}]
        union = [("clean", 0.9), ("after linf", 0.4), ("after l2", 0.2), ("under all", 0.1)]
        self.assertEqual(self.after(**of_union, worst_case=parts), union)
        fog = {"mean": 0.7}
        self.assertEqual(self.after(corruptions=fog), [("under corruptions", 0.7)])

    def test_costs_are_added_up(self):
        costs = [
            {"attack": "a", "fooled": 0, "forward": 1000, "seconds": 1.25, "step_rule": "rule"},
            {"attack": "b", "fooled": 2, "forward": 500, "seconds": 2.0},
        ]
        text = evaluation.part(one(costs=costs), "k", [])
        rows = [re.findall('<td class="n">(.*?)</td>', row) for row in text.split("<tr>")]
        first, second, every = (row for row in rows if row)
        self.assertEqual(first, ["a", "0", "1,000", "-", "-", "1.2 s", "-", "rule"])
        self.assertEqual(second[-1], "-")
        self.assertEqual(every, ["all", "2", "1,500", "0", "0", "3.2 s", "0.0 s", ""])

    def test_classes_are_sorted_by_their_robust_share_of_all_their_images(self):
        seen = verdicts(["", "x", "clean", "", "", "x"], [2, 2, 2, 2, 0, 0])
        self.assertEqual(evaluation.by_class(seen), {0: (2, 2, 1), 2: (4, 3, 2)})
        drawn = evaluation.part(one(seen, classes="abc"), "k", [])
        first, second = data_of(drawn, "k-classes")["rows"]
        self.assertEqual((first["name"], first["value"], first["second"]), ("a", 0.5, 1))
        self.assertEqual((second["name"], second["value"], second["second"]), ("c", 0.5, 0.75))
        ends = [second["low"], second["high"]]
        np.testing.assert_allclose(ends, checks.binomial_interval(2, 4), rtol=1e-4)  # five digits

    def test_forty_classes_are_shown(self):
        for count in (40, 41, 60):
            with self.subTest(count=count):
                labels = np.repeat(np.arange(count), 60)
                robust = np.arange(60)[None] < np.arange(count)[:, None]
                seen = verdicts(np.where(robust.ravel(), "", "x"), labels)
                text = evaluation.part(one(seen), "k", [])
                bars = data_of(text, "k-classes")["rows"]
                shown = [int(bar["name"].split()[1]) for bar in bars]
                ends = [*range(30), *range(count - 10, count)] if count > 40 else [*range(40)]
                self.assertEqual(shown, ends)
                lead = (
                    f"The 30 lowest and the 10 highest of {count} classes. "
                    if count > 40
                    else "Sorted"
                )
                self.assertIn(f'<p class="note">{lead}', text)

    def rung(self, epsilon, **more):
        own = {"weights_sha256": "w", "robust": 0.5, "attacks": [ATTACK | {"epsilon": epsilon}]}
        return one(**(own | more))

    def test_ladders(self):
        later = self.rung(0.1, robust=0.4)
        own = [self.rung(0.2), self.rung(0.1), later, self.rung(0.3, search_dtype="bfloat16")]
        own += [self.rung(0.4, weights_sha256="v"), self.rung(0.5, robust=None)]
        own += [self.rung(0.6, attacks=[ATTACK, ATTACK | {"norm": "l2"}])]
        own += [self.rung(0.7, split="train"), self.rung(0.8, method="square")]
        (group,) = radii.ladders(own)
        self.assertEqual([each.record.threats[0].epsilon for each in group], [0.1, 0.2])
        self.assertIs(group[0], later)  # the last of its radius


class ExamplesTest(parameterized.TestCase):
    def point(self, image, attack="a", iterations=1):
        return Fooled(image, attack, iterations, Path("f"), 0)

    def ids(self, points, attacks=("a", "b")):
        easy, hard = examples.choose(points, attacks)
        return [f.image for f in easy], [f.image for f in hard]

    def test_easy_and_hard(self):
        points = [self.point(i, iterations=n) for i, n in enumerate((3, 1, 3, 2, 9, 9, 4, 5, 6, 7))]
        self.assertEqual(self.ids(points), ([1, 3, 0, 2], [4, 5, 9, 8]))
        points = [self.point(0, "b"), self.point(1, "a", 99), self.point(2, "a (full)")]
        points += [self.point(3, "replay", 50)]
        self.assertEqual(self.ids(points), ([3, 1], [2, 0]))
        self.assertEqual(self.ids([self.point(0)]), ([0], []))
        self.assertEqual(self.ids([self.point(0), self.point(1)]), ([0], [1]))
        self.assertEqual(self.ids([self.point(i) for i in range(3)]), ([0, 1], [2]))

    def test_a_ledger_of_several_processes(self):
        folder = Path(self.create_tempdir())
        head = json.dumps({"identity": {"image": [2, 3, 1]}}) + "\n"
        row = {"image": 4, "attack": "a", "fooled": True, "stored": 7, "iterations": 3}
        lines = [row, row | {"fooled": False}, {"image": 5, "attack": "b", "fooled": True}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "ledger-1.jsonl").write_text(head + text)
        other = json.dumps(row | {"image": 6, "iterations": None}) + "\n"
        (folder / "ledger-1.process-1.jsonl").write_text(head + other)
        (folder / "ledger-1-0.jsonl").write_text(head + other)
        shape, points = examples.fooled(folder / "ledger-1.jsonl")
        self.assertEqual(shape, (2, 3, 1))
        expected = [Fooled(4, "a", 3, folder / "ledger-1.images", 7)]
        expected.append(Fooled(6, "a", 0, folder / "ledger-1.process-1.images", 7))
        self.assertEqual(points, expected)
        (folder / "ledger-2.jsonl").write_text('{"identity": {}}\n')
        with self.assertRaisesRegex(ValueError, "does not store the size of its images"):
            examples.fooled(folder / "ledger-2.jsonl")

    def test_the_last_record_that_asks_about_one_threat_alone(self):
        file = Path(self.create_tempdir(), "results.jsonl")
        l2 = ATTACK | {"norm": "l2"}
        about = {"dataset": "digits", "split": "test", "seed": 1, "weights_sha256": "w"}
        rows = [about | {"attacks": [ATTACK], "evaluation": number} for number in ("1", "2")]
        rows += [about | {"attacks": [l2], "evaluation": "3"}]
        rows += [about | {"attacks": [ATTACK], "seed": 2, "evaluation": "4"}]
        rows += [about | {"attacks": [ATTACK], "weights_sha256": "v", "evaluation": "5"}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("ledger-2", "ledger-U-1"):
            (file.parent / f"{name}.jsonl").write_text("")
        about |= {"attacks": [ATTACK, l2], "method": "union", "evaluation": "U"}
        union = one(file=str(file), **about)
        found = [(s.prefix, s.ledger.stem) for s in examples.searched(union)]
        self.assertEqual([stem for _, stem in found], ["ledger-2", "ledger-U-1"])


class TrainingTest(parameterized.TestCase):
    def part(self, name="loss", values=(1.0, 2.0), events=(), most=400) -> str:
        curve = Curve(np.arange(len(values)) * 1.0, np.array(values, float))
        logged = {quantity: curve for quantity in list(training.PANELS[name].quantities)[:2]}
        metrics = Metrics({"train": logged, "other": {"lr": curve}}, list(events), [])
        return training.part(ReportedRun("a", Path("a"), {}, metrics, {}, [], None), "k", most)

    def test_a_wide_span_is_logarithmic(self):
        for values, log in (
            ((1, 300), False), ((1, 301), True), ((0, 301), False), ((2, 601, np.inf), True),
            ((100, 20_000), False),
        ):  # fmt: skip
            for name in ("loss", "lr"):
                with self.subTest(row=(values, log, name)):
                    frame = data_of(self.part(name, values), f"k-0-{name}")["frame"]["y"]
                    self.assertEqual(frame[-1], log and name == "loss")

    def test_notes(self):
        values = [1.0, np.inf, np.nan, *[1.0] * 7]
        note = '<p class="note">{}</p>'.format
        text = self.part("loss", values)
        self.assertIn(note("Not finite: loss at 2 of 10 points, steps 1 to 2."), text)
        self.assertIn("Thinned to the lowest", self.part("loss", range(1, 50), most=10))
        events = [CurveEvent("train", 3, kind, "t") for kind in ("skipped", "alarm")]
        events.append(CurveEvent("other", 4, "rollback", "t"))
        text = self.part("loss", events=events)
        self.assertIn(note("Dashed: alarms and skipped steps."), text)
        self.assertEqual(data_of(text, "k-0-loss")["marks"], [[3, "skipped: t"], [3, "alarm: t"]])
        figure = text.partition('id="data-k-0-loss"')[0]
        self.assertEqual(re.findall('class="(mark[^"]*)"', figure), ["mark harmless", "mark"])

    def test_fifty_events(self):
        for count, more in ((50, ""), (51, " (and 1 more)")):
            with self.subTest(row=(count, more)):
                events = [CurveEvent("train", 1000 + i, "alarm", "t") for i in range(count)]
                text = self.part(events=events)
                self.assertIn(f"<caption>Events{more}</caption>", text)
                row = "<td>train</td><td>1,{:03}</td><td>alarm</td><td>t</td>"
                self.assertEqual([row.format(i) in text for i in (0, 49, 50)], [True, True, False])
