"""The rules of a question: which flags contradict each other, what is evaluated, what is told."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.config import VERSION, NetworkSpec
from jaxrobust.evaluation.bundles import bundle
from jaxrobust.evaluation.questions import command, flags, questions, target, verification
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.questions.verification import VerificationSettings
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.types import Threat, check_threat
from tests.support import runs as training
from tests.support import sweeps

LINF, L2 = Threat("linf", 0.1), Threat("l2", 0.5)
LADDER = "linf:0:0.1:2"
SPEC = NetworkSpec("net", num_classes=10, image_size=8, in_channels=3)


class ContradictionTest(parameterized.TestCase):
    """Flags that are refused before anything is read."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory())) / "run"
        cls.run_folder.mkdir()
        norms = {"attack__norm": ("linf", "l2"), "attack__epsilon": (0.1, 0.5)}
        config = training.tiny(**norms, attack__mix="worst")
        stored = {"version": VERSION} | json.loads(config.to_json())
        (cls.run_folder / "config.json").write_text(json.dumps(stored))

    def ask(self, *, sizes=(), threats=(), ladder=None, radius_at=None, **changes):
        network = {} if "workdir" in changes else {"function": "nets.py:f", "dataset": "digits"}
        return command.evaluated(GivenFlags(**network | changes), sizes, threats, ladder, radius_at)

    @sweeps.rows(
        (
            {"version": "fast"},
            "--version=fast only works for one evaluation, but .* trained with 2 norms",
        ),
        (
            {"finish": True},
            "--finish only works for one evaluation, .*; choose one .*: --threat=linf:0.1",
        ),
        ({"until_width": 1.0}, "--until_width only works for one .*=linf:0.1 or --threat=l2:0.5"),
        ({"bundle": "new"}, "--bundle supports one threat and image size"),
    )
    def test_what_takes_one_norm(self, changes, words):
        with self.assertRaisesRegex(ValueError, words):
            self.ask(workdir=str(self.run_folder), **changes)

    def test_a_run_of_several_norms_is_attacked_in_all(self):
        """Unless a flag names another ball, or the question has none."""
        of_run = GivenFlags(workdir=str(self.run_folder))
        self.assertEqual(flags.own_balls(of_run), [LINF, L2])
        self.assertEqual(flags.own_balls(of_run._replace(attack="pgd-20")), [LINF, L2])
        for changes in ({"norm": "l2"}, {"epsilon": 0.1}, {"attack": "clean"}, {"certify": 0.5}):
            self.assertEqual(flags.own_balls(of_run._replace(**changes)), [], changes)

    @sweeps.rows(
        ({"norm": "l2"}, 0.5), ({"norm": "l1"}, None), ({"norm": "l2", "epsilon": 0.25}, 0.25)
    )
    def test_a_norm_alone_has_the_radius_of_the_training(self, changes, epsilon):
        _, subject, _ = flags.settled(GivenFlags(workdir=str(self.run_folder), **changes))
        expected = None if epsilon is None else Threat(changes["norm"], epsilon)
        self.assertEqual((subject.threat, subject.norm), (expected, changes["norm"]))

    @sweeps.rows(
        ({"sizes": (32, 64, 32)}, "--image_size=32, 64, 32 repeats a size"),
        (
            {"corruptions": "fog", "attack": "clean", "sizes": (32, 64)},
            "--corruptions supports only one --image_size",
        ),
        ({"norm": "l2", "threats": ["linf:0.1"]}, "--threat sets norm and radius; leave --norm"),
        ({"epsilon": 0.0, "threats": ["linf:0.1"]}, "--threat sets norm and radius; leave --norm"),
        ({"threats": ["linf:0.1", "linf:1/10"]}, "repeats a threat; give each once"),
        (
            {"attack": "clean", "threats": ["linf:0.1"]},
            "--threat has no effect with --attack=clean",
        ),
        ({"union_only": True, "threats": ["linf:0.1"]}, "--union_only needs more than one --thr"),
        ({"union_only": True}, "--union_only needs more than one --threat"),
        ({"norm": "l2", "ladder": LADDER}, "leave --threat, --norm and --epsilon out"),
        ({"epsilon": 0.0, "ladder": LADDER}, "leave --threat, --norm and --epsilon out"),
        ({"threats": ["linf:0.1"], "ladder": LADDER}, "leave --threat, --norm and --epsilon out"),
        ({"union_only": True, "ladder": LADDER}, "radii; leave --union_only out"),
        ({"noreplay": True, "ladder": LADDER}, "radii; leave --noreplay out"),
        ({"attack": "pgd-20", "ladder": LADDER}, "leave out pgd-20"),
        ({"version": "rand", "ladder": LADDER}, "leave out --version=rand"),
        (
            {"corruptions": "fog", "attack": "clean", "sizes": (32, 64)},
            "--corruptions supports only one",
        ),
        ({"bundle": "new", "sizes": (32, 64)}, "--bundle supports one threat and image size"),
        ({"bundle": "new", "version": "rand"}, "not --version=rand"),
        ({"bundle": "new", "attack": "pgd-20"}, "which --attack=pgd-20 does not store"),
        (
            {"radius_at": 224, "sizes": (192,)},
            "--radius_at=224 must be .*; also give --threat, the ra",
        ),
        ({"radius_at": 224, "threats": ["l2:2"]}, "and --image_size, the sizes to scale to"),
        (
            {"radius_at": 0, "sizes": (192,), "threats": ["l2:2"]},
            "must be an image size in pixels;",
        ),
    )
    def test_flags_that_contradict(self, changes, words):
        with self.assertRaisesRegex(ValueError, words):
            self.ask(**changes)


def record(**changes) -> AccuracyRecord:
    attack = {"name": "apgd-ce", "norm": "linf", "epsilon": 0.1}
    known = {"model": {"name": "net", "image_size": 8}, "dataset": "digits", "split": "test"}
    known |= {"image_ids": "0..9", "attacks": [attack], "method": "apgd-ce", "evaluation": "7"}
    return AccuracyRecord(**(known | changes))


class ToldTest(parameterized.TestCase):
    def test_one_record(self):
        after = {"apgd-ce": 0.5, "none": None, "square": 0.0}
        flags_ = {"a": "b"}
        one = record(
            clean=0.9, accuracy_after=after, weights="train", dtype="float32", flags=flags_
        )
        lines = command.told([one], Path("out")).splitlines()
        self.assertEqual(
            lines,
            [
                "",
                "net (train), float32",
                "digits, split test, images 0..9",
                "attack: apgd-ce, linf 0.1",
                "clean              90.0%",
                "after apgd-ce      50.0%",
                "after square        0.0%",
                "flag a: b",
                "record 7 in out/results.jsonl",
            ],
        )
        self.assertNotIn("clean", command.told([record(attacks=[], method="x")], Path("out")))

    def test_several_records(self):
        ends = {"clean": [0.8, 0.95], "robust": [0.4, 0.6]}
        both = {"a": "b", "c": "d"}
        rows = [
            record(clean=0.9, robust=0.5, interval=ends, flags=both),
            record(clean=0.9, interval=ends | {"robust": None}, flags={"a": "b"}, evaluation="8"),
            record(method="clean", attacks=[], evaluation="9"),
        ]
        lines = command.told(rows, Path("out")).splitlines()
        self.assertEqual(lines[1:3], ["net", "digits, split test, images 0..9"])
        self.assertEqual(lines[3].split()[:4], ["attack", "px", "clean", "robust"])
        self.assertEqual(lines[4].split()[-6:], ["8", "90.0%", "50.0%", "40.0%", "to", "60.0%"])
        self.assertEqual(lines[5].split()[-6:], ["8", "90.0%", "-", "80.0%", "to", "95.0%"])
        self.assertEqual(lines[6].split(), ["clean", "8", "-", "-", "nan%", "to", "nan%"])
        self.assertEqual(
            lines[7:], ["flag a: b", "flag c: d", "records 7, 8, 9 in out/results.jsonl"]
        )


class QuestionTest(parameterized.TestCase):
    def test_methods(self):
        for question, method in (
            (GivenFlags(), "autoattack standard"),
            (GivenFlags(version="plus"), "autoattack plus"),
            (GivenFlags(version="rand"), "autoattack rand, majority of 20 draws"),
            (GivenFlags(version="rand", rule="one-draw"), "autoattack rand, one draw"),
            (
                GivenFlags(attack="apgd-ce,square", version="custom", steps=5),
                "apgd-ce + square, custom, steps 5",
            ),
            (GivenFlags(attack="pgd-20", step=0.1 + 0.2), "pgd-20, step 0.30000000000000004"),
            (GivenFlags(attack="pgd-20", relative_step=1 / 3), "pgd-20, relative_step 0.333333"),
            (GivenFlags(attack="pgd-20", start="image"), "pgd-20, start image"),
        ):
            self.assertEqual(question.method, method)

    def test_what_a_question_does(self):
        named = GivenFlags(attack="apgd-ce,apgd-t,square", steps=3, targets=2)
        steps = {name: {"steps": 3} for name in named.names}
        self.assertEqual(named.overrides(), steps | {"apgd-t": {"steps": 3, "targets": 2}})
        self.assertEqual(
            GivenFlags(attack="apgd-ce,apgd-t", targets=2).overrides(), {"apgd-t": {"targets": 2}}
        )
        self.assertIsNone(GivenFlags(attack="apgd-ce").overrides())
        self.assertEqual((GivenFlags().names, GivenFlags(attack="a,b").names), (None, ("a", "b")))
        cases = {
            "autoattack": (True, True),
            "apgd-ce,square": (True, True),
            "pgd-20": (False, False),
        }
        for attack, (searches, replays) in cases.items():
            own = GivenFlags(attack=attack)
            self.assertEqual((own.searches, own.replays), (searches, replays))
            self.assertFalse(own._replace(version="rand").replays)
        self.assertFalse(GivenFlags(attack="apgd-ce,pgd-20").searches)

    def test_attacks_that_follow_a_gradient(self):
        self.assertEqual(questions.following("pgd-20", "standard", "linf"), ("pgd-20",))
        found = questions.following("autoattack", "standard", "linf")
        self.assertEqual(found, ("apgd-ce", "apgd-t", "fab-t"))
        self.assertEqual(questions.following("square,apgd-ce", "custom", "linf"), ("apgd-ce",))
        self.assertEqual(questions.following("clean", "standard", "linf"), ())

    @sweeps.rows(
        ("l1", 0.5, None),
        ("l1", 1.0, "fits"),
        ("l1", 192.0, "fits"),
        ("l1", 193.0, None),
        ("l2", math.sqrt(192), "fits"),
        ("l2", 13.9, None),
        ("linf", 1.0, "fits"),
        ("l1", 0.0, "fits"),
    )
    def test_radii(self, norm, epsilon, fits):
        if fits:
            check_threat(Threat(norm, epsilon), 8, 3)
            return
        words = "less than one pixel" if epsilon < 1 else "contains all 8x8 images"
        with self.assertRaisesRegex(ValueError, words):
            check_threat(Threat(norm, epsilon), 8, 3)

    def check(self, subject=Subject(SPEC, threat=LINF), channels=3, **changes):  # noqa: B008
        source = SimpleNamespace(channels=channels, where=lambda: "there", image_shape=(8, 8, 3))
        questions.check(GivenFlags(**changes), subject, source)

    @sweeps.rows(
        {},
        {"attack": "clean"},
        {"attack": "pgd-20", "start": "uniform-boxed", "relative_step": 2.0},
        {"attack": "apgd-ce,apgd-t", "targets": 1, "steps": 1, "restarts": 1},
        {"version": "rand", "rule": "mean", "draws": 1},
        {"seed": 2**32 - 1},
        {"batch": 1},
        {"attack": "apgd-ce", "search_dtype": "bfloat16"},
        {"replay": ("x",)},
        {"attack": "apgd-ce", "version": "custom"},
    )
    def test_what_can_be_asked(self, **changes):
        self.check(**changes)

    @sweeps.rows(
        ({"attack": "pgd"}, "--attack=pgd is unknown"),
        ({"attack": "apgd_ce"}, "--attack=apgd_ce is unknown; did you mean apgd-ce"),
        ({"attack": "apgd-ce", "targets": 3}, "--targets=3 has no effect with --attack=apgd-ce"),
        ({"attack": "apgd-ce", "steps": 0}, "--steps=0 must be at least 1"),
        ({"attack": "apgd-ce", "restarts": 0}, "--restarts=0 must be at least 1"),
        ({"version": "custom"}, "--version=custom needs a list of attacks"),
        ({"version": "best"}, "--version=best is unknown; choose one of standard, plus"),
        ({"search_dtype": "float16"}, "--search_dtype=float16 is unknown"),
        (
            {"attack": "pgd-20", "version": "plus"},
            "--version=plus has no effect with --attack=pgd-20",
        ),
        ({"attack": "clean", "search_dtype": "bfloat16"}, "--search_dtype=bfloat16 has no effect"),
        ({"rule": "mean"}, "--rule=mean is for randomized networks"),
        ({"draws": 0}, "--draws=0 is for randomized networks"),
        ({"version": "rand", "draws": 0}, "--draws=0 must be an int >= 1"),
        (
            {"version": "rand", "search_dtype": "bfloat16"},
            "searches in float32; leave --search_dtype",
        ),
        ({"attack": "pgd-20", "union_only": True}, "--union_only needs attacks that work"),
        ({"attack": "pgd-20", "replay": ("x",)}, "--replay has no effect with --attack=pgd-20;"),
        (
            {"version": "rand", "replay": ("x",)},
            "no effect with --attack=autoattack and --version=rand",
        ),
        ({"replay": ("x",), "noreplay": True}, "--noreplay contradicts --replay"),
        ({"steps": 3}, "--steps=3 has no effect with --attack=autoattack; name one of its attacks"),
        (
            {"attack": "pgd-20", "steps": 3},
            "--steps=3 has no effect with --attack=pgd-20; leave it",
        ),
        ({"attack": "apgd-ce", "start": "image"}, "--start=image has no effect"),
        ({"attack": "pgd-20", "step": 0.1, "relative_step": 1.0}, "both set the step size"),
        ({"attack": "pgd-20", "step": 0.0}, "--step=0 must be above 0"),
        ({"attack": "pgd-20", "relative_step": math.inf}, "--relative_step=inf must be above 0"),
        ({"attack": "pgd-20", "start": "there"}, "--start=there is unknown"),
        ({"attack": "pgd-20", "l1_rule": "art"}, "--l1_rule=art is for l1, not linf"),
        ({"batch": 0}, "--batch=0 must be at least 1"),
        ({"n": -1}, "--n=-1 must be at least 0"),
        ({"seed": -1}, "--seed=-1 must be at least 0"),
        ({"seed": 2**32}, r"--seed=4294967296 must be below 2\^32"),
        ({"attack": "apgd-t", "targets": 0}, "--targets=0 must be at least 1"),
        ({"channels": 1}, "the network takes 3 channels, but there has 1"),
        ({"preprocessing": "Crop"}, "Crop"),
    )
    def test_what_cannot_be_asked(self, changes, words):
        with self.assertRaisesRegex(ValueError, words):
            self.check(**changes)

    def test_a_radius_is_needed_by_attacks(self):
        none = Subject(SPEC)
        self.check(none, attack="clean")
        for attack in ("autoattack", "pgd-20"):
            with self.assertRaisesRegex(ValueError, "give --epsilon, in units of the"):
                self.check(none, attack=attack)
        l1 = Subject(SPEC, threat=Threat("l1", 12.0), norm="l1")
        self.check(l1, attack="pgd-20", l1_rule="art")
        with self.assertRaisesRegex(ValueError, "--start=uniform is for .*, not l1"):
            self.check(l1, attack="pgd-20", start="uniform")


class SubjectTest(parameterized.TestCase):
    def test_a_threat_brings_its_norm(self):
        subject = Subject(SPEC, norm="l2")
        self.assertEqual(subject.ball, Threat("l2", 0.0))
        self.assertEqual((subject.within(LINF).norm, subject.within(LINF).ball), ("linf", LINF))

    def test_slots_are_full_eight_times(self):
        subject = Subject(SPEC, slots=4)
        self.assertEqual([subject.slots_for(n) for n in (31, 32, 33)], [None, 4, 4])
        self.assertIsNone(Subject(SPEC).slots_for(1000))

    def test_whose_network_it_is(self):
        function = SimpleNamespace(record=lambda: {"name": "f"})
        own = Subject(SPEC, function=function, arrays_sha256="a")
        self.assertEqual(
            (own.flag, own.origin()), ("--function", {"name": "f", "arrays_sha256": "a"})
        )
        built = SimpleNamespace(record=(("torch", "2"),))
        own = Subject(SPEC, function=function, built=built)
        self.assertEqual((own.flag, own.origin()["torch"]), ("--torch", "2"))
        self.assertIsNone(Subject(SPEC).flag)

    def settled(self, origin, shape=(8, 8, 3), **changes):
        source = mock.Mock(image_shape=shape, num_classes=7, channels=1)
        with mock.patch.object(target.registry, "open_source", return_value=source) as opened:
            subject, _ = target.settled(origin, **changes)
        return subject, opened.call_args

    def test_changes_of_a_threat(self):
        origin = Subject(SPEC, dataset="digits", threat=L2, norm="l2")
        for changes, threat, norm in (
            ({}, L2, "l2"),
            ({"norm": "l2"}, L2, "l2"),
            ({"norm": "linf"}, None, "linf"),  # a radius of one norm says nothing in another
            ({"epsilon": 0.25}, Threat("l2", 0.25), "l2"),
            ({"epsilon": 0.0}, Threat("l2", 0.0), "l2"),
            ({"norm": "linf", "epsilon": 0.1}, LINF, "linf"),
        ):
            subject, _ = self.settled(origin, **changes)
            self.assertEqual((subject.threat, subject.norm), (threat, norm), str(changes))

    def test_splits(self):
        origin = Subject(SPEC, dataset="digits", split="test[:9]")
        for changes, split in (
            ({}, "test[:9]"),
            ({"dataset": "digits"}, "test[:9]"),
            ({"dataset": "cifar10"}, "test"),
            ({"dataset": "imagenet2012"}, "validation@robustbench"),
            ({"dataset": "tfds:imagenet2012:5.1"}, "validation@robustbench"),
            ({"dataset": "imagenet2012_corrupted"}, "test"),
            ({"dataset": "cifar10", "split": "train"}, "train"),
        ):
            subject, call = self.settled(origin, **changes)
            self.assertEqual((subject.split, call.args[1]), (split, split), str(changes))
        with self.assertRaisesRegex(ValueError, "a network that is not a run needs --dataset NAME"):
            target.settled(Subject(SPEC))

    def test_sizes_are_the_flags_then_the_networks_then_the_images(self):
        none = NetworkSpec("net.py:f")
        sizes = lambda s: (s.network.image_size, s.network.num_classes, s.network.in_channels)  # noqa: E731
        own = Subject(none, dataset="d", function="f")
        self.assertEqual(sizes(self.settled(own)[0]), (8, 7, 1))
        self.assertEqual(sizes(self.settled(own, shape=(8, 9, 3))[0])[0], 224)
        self.assertEqual(sizes(self.settled(own, shape=None)[0])[0], 224)
        given = {"image_size": 16, "num_classes": None}
        self.assertEqual(
            sizes(self.settled(Subject(SPEC, dataset="d"), network=given)[0]), (16, 10, 3)
        )
        ours = Subject(NetworkSpec("vit_s"), dataset="d")
        self.assertIsNone(self.settled(ours)[0].network.in_channels)  # its weights say it

    @sweeps.rows(
        # what a run tests with, what weights expect, what is given -> what is taken
        ("Res9Crop8", None, None, 8, "Res9Crop8"),
        ("Res9Crop8", "Res12Crop8", None, 8, "Res9Crop8"),
        (None, "Res12Crop8", None, 8, "Res12Crop8"),
        (None, None, "Res10Crop8", 8, "Res10Crop8"),
        ("Res9Crop8", None, "Res10Crop8", 8, "Res10Crop8"),
        ("Res9Crop8", None, None, 16, None),
        ("bicubic-0.9", None, None, 16, "bicubic-0.9"),
    )
    def test_preprocessing(self, tested, expected, given, size, taken):
        origin = Subject(SPEC, tested=tested, expected=expected)
        source = SimpleNamespace(image_shape=None, name="x")
        with mock.patch.object(target.pipeline, "preprocessing_id", return_value="other"):
            self.assertEqual(target.preprocessing(origin, size, source, given), taken)

    def test_arrays_in_lower_precision(self):
        seen = []
        apply = lambda p, arrays, x, **key: seen.append((arrays["0"].dtype.name, x, key))  # noqa: E731
        net = target.Classifier(None, apply)
        subject = Subject(SPEC, net=net, built="torch")
        arrays = {"0": np.ones(2, np.float32)}
        subject.create("bfloat16").apply({}, arrays, "x", key=3)
        self.assertEqual(seen, [("bfloat16", "x", {"key": 3})])
        self.assertIs(Subject(SPEC, net=net).create("bfloat16"), net)


MODEL = {"name": "net", "num_classes": 10, "image_size": 8, "options": {"a": 1}}


class VerificationTest(parameterized.TestCase):
    def test_whose_weights(self):
        folder = self.create_tempdir()
        folder.mkdir("train")
        run, of = GivenFlags(workdir=folder.full_path), VerificationSettings(Path("b"))
        with mock.patch.object(
            flags, "placed", side_effect=lambda own: run if own.weights else own
        ):
            for words, phase in (("train, step 3", "train"), (", ema", None), (None, None)):
                found = verification._given(of._replace(weights="w"), {"weights": words})
                self.assertEqual(found.phase, phase)
            self.assertIsNone(verification._given(of._replace(function="f"), {}).model)
        for options in ({"a": 1}, {}):
            record = {"model": MODEL | {"options": options}}
            with mock.patch.object(flags, "placed", side_effect=lambda own: own):
                found = verification._given(of._replace(weights="w.pt"), record)
            self.assertEqual((found.model, found.options), ("net", options or None))

    @sweeps.rows(
        ("dataset", "npz:x.npz", False),
        ("dataset", "folder:x", False),
        ("dataset", "hf:./x", False),
        ("dataset", "hf:~/x", False),
        ("dataset", "hf:org/x", True),
        ("dataset", "cifar10", True),
        ("split", "test@x.txt", False),
        ("split", "test@robustbench", True),
        ("split", "train@selection[:5]", True),
        ("split", "test[:9]", True),
    )
    def test_images_that_a_record_names_by_a_path(self, flag, value, fine):
        known = {"dataset": "digits", "split": "test"} | {flag: value}
        plain = VerificationSettings(Path("b"), data_dir="d")
        if fine:
            found = verification._source_of(plain, known)
            self.assertEqual(found, known | {"classes": None, "data_dir": "d"})
        else:
            with self.assertRaisesRegex(ValueError, f"give your own path, as in --{flag} "):
                verification._source_of(plain, known)
        own = plain._replace(**{flag: "mine"})
        self.assertEqual(verification._source_of(own, known)[flag], "mine")

    def test_another_network(self):
        subject = Subject(dataclasses.replace(SPEC, options={"a": 1}))
        known = {"model": MODEL, "weights_sha256": "s" * 64}
        with (
            mock.patch.object(verification.models, "essential", lambda name, options: options),
            mock.patch.object(Subject, "origin", lambda self: None),
        ):
            self.assertIsNone(verification._other(known, subject, "s" * 64))
            said = verification._other(known, subject, "t" * 64)
            self.assertIn(f"(net, sha256 {'t' * 12}...; there net, {'s' * 12}...)", said)
            for changes in ({"name": "other"}, {"options": {}}):
                other = known | {"model": MODEL | changes}
                self.assertIsNotNone(verification._other(other, subject, "s" * 64))
        named = {"model": MODEL | {"name": "/a/nets.py:f"}, "weights_sha256": None}
        function = {"sha256": "file", "arrays_sha256": "arrays"}
        subject = Subject(dataclasses.replace(SPEC, name="/b/mine.py:f", options={"a": 1}))
        with (
            mock.patch.object(verification.models, "essential", lambda name, options: options),
            mock.patch.object(Subject, "origin", lambda self: function),
        ):
            own = named | {"function": function}
            self.assertIsNone(verification._other(own, subject, "arrays"))
            self.assertIsNotNone(verification._other(own, subject, "others"))
            changed = named | {"function": function | {"sha256": "other"}}
            self.assertIsNotNone(verification._other(changed, subject, "arrays"))

    def test_a_network_is_named_once(self):
        for how in ({}, {"weights": "w", "function": "f"}):
            with self.assertRaisesRegex(ValueError, "give the network: --weights W, or --function"):
                verification.verify(VerificationSettings(Path("b"), **how))


class BundleTest(parameterized.TestCase):
    def test_where_a_bundle_can_be(self):
        folder = self.create_tempdir()
        place = SimpleNamespace(bundle=folder.full_path, attack="clean", corruptions="fog")
        bundle.check(place, 1)  # an empty folder
        file = folder.create_file("mine.txt")
        for path in (folder.full_path, file.full_path):
            place.bundle = path
            with self.assertRaisesRegex(ValueError, "exists but is not a bundle; name a new fold"):
                bundle.check(place, 1)
        folder.create_file("SHA256SUMS")
        place.bundle = folder.full_path
        bundle.check(place, 1)


class PlacedWeightsTest(parameterized.TestCase):
    """What `--weights` names: a run, an imported folder, a file."""

    def placed(self, kind, **given):
        here = SimpleNamespace(kind=kind, path=Path("there"))
        with (
            mock.patch.object(flags.imports, "local", return_value=here),
            mock.patch.object(flags.weights_sources, "parse"),
        ):
            found = flags.placed(GivenFlags(**{"weights": "w"} | given))
        return found.workdir, found.weights, found.model

    @sweeps.rows(
        ("run", {}, ("there", None, None)),
        ("folder", {}, (None, "there", None)),
        ("folder", {"model": "Salman2020Do_R18"}, (None, "there", None)),  # an id of RobustBench
        ("folder", {"model": "vit_s"}, (None, "there", "vit_s")),
        ("file", {"model": "vit_s"}, (None, "there", "vit_s")),
        ("file", {"model": "Salman2020Do_R18"}, (None, "there", "Salman2020Do_R18")),
        ("run", {"workdir": "own"}, ("own", "w", None)),  # which `check` refuses
        ("run", {"function": "f"}, (None, "w", None)),
        ("run", {"torch": "t"}, (None, "w", None)),
        ("run", {"weights": None}, (None, None, None)),
        ("run", {"weights": "no.pt", "model": "vit_s"}, (None, "no.pt", "vit_s")),
    )
    def test_where_they_are(self, kind, given, expected):
        self.assertEqual(self.placed(kind, **given), expected)

    def test_a_run_says_its_model(self):
        with self.assertRaisesRegex(ValueError, "--weights there is a run, .*; leave --model out"):
            self.placed("run", model="vit_s")
