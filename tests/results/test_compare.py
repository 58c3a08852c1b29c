"""Comparing evaluations image by image: the numbers, the words, and what is refused."""

import contextlib
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image
from scipy import stats

from jaxrobust.commands import compare
from jaxrobust.config import base, plain
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.results.comparison import comparison_findings, evaluations
from tests.support.compared import N, attacks, found, write

PLOT = importlib.util.find_spec("matplotlib") is not None


def call(*words) -> tuple[int, str, str]:
    out, said, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            compare.main([str(word) for word in words])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), said.getvalue()


class Folders(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def write(self, name: str, seen: Verdicts, *args, **changes) -> Path:
        return write(self.folder / name, seen, *args, **changes)

    def compared(self, *words) -> tuple[dict[str, Any], str]:
        code, said, error = call(*words, "--json")
        self.assertEqual(code, 0, error)
        text, _, last = said.rstrip("\n").rpartition("\n")
        return json.loads(last), text

    def refused(self, *words) -> str:
        """Return the one sentence of a mistake, which leaves nothing behind."""
        out = self.folder / "out"
        code, said, error = call(*words, "--out", out)
        self.assertEqual((code, said), (2, ""), error)
        self.assertEqual(error.count("\n"), 1, error)
        self.assertFalse(out.exists())
        return error


class NumbersTest(Folders):
    def test_two(self):
        """Against counts and SciPy's test, by the shortest way."""
        a, b = found(1), found(2, share=0.55)
        plain, text = self.compared(self.write("a", a), self.write("b", b))
        self.assertEqual(plain["images"], N)
        pair = plain["pairs"][0]
        for what, one, two in (("clean", a.clean, b.clean), ("robust", a.robust, b.robust)):
            lost, gained = int((one & ~two).sum()), int((two & ~one).sum())
            of = pair[what]
            self.assertEqual([of[k] for k in ("n", "lost", "gained")], [N, lost, gained])
            self.assertAlmostEqual(of["difference"], two.mean() - one.mean())
            p = stats.binomtest(lost, lost + gained).pvalue
            self.assertAlmostEqual(of["p"], p)
            self.assertEqual(of["p_corrected"], of["p"])
            self.assertEqual(of["apart"], p < 0.05)
            row = f"| {what} | {100 * one.mean():.2f} | {100 * two.mean():.2f} | {lost} | {gained} "
            self.assertIn(row, text)
        self.assertIn("**The robust accuracy of B is higher than that of A.**", text)
        left = [v.clean & (v.fooled_by != "apgd-ce") for v in (a, b)]
        after = pair["after"]["apgd-ce"]
        self.assertEqual([after["first"], after["second"]], [int(v.sum()) for v in left])
        self.assertEqual(pair["after"]["apgd-t"]["difference"], pair["robust"]["difference"])
        counts = [int((v.fooled_by == "apgd-ce").sum()) for v in (a, b)]
        self.assertIn(f"| apgd-ce | {counts[0]} | {counts[1]} |", text)
        self.assertEqual(plain["evaluations"][1]["removed"]["apgd-ce"], counts[1])

    def test_classes(self):
        a = found(1)
        of_three = a.labels == 3
        worse = a._replace(fooled_by=np.where(of_three & a.robust, "apgd-t", a.fooled_by))
        plain, text = self.compared(self.write("a", a), self.write("b", worse))
        rows = plain["pairs"][0]["classes"]
        self.assertEqual([row["label"] for row in rows], list(range(10)))
        lost = int((of_three & a.robust).sum())
        self.assertEqual([row["lost"] for row in rows], [0, 0, 0, lost, 0, 0, 0, 0, 0, 0])
        p = stats.binomtest(0, lost).pvalue
        self.assertAlmostEqual(rows[3]["p_corrected"], 10 * p)
        points = f"{100 * -lost / of_three.sum():+.2f}"
        self.assertIn(
            f"told apart on 1 of 10 classes (corrected for all of them; points of "
            f"B minus A): 3 ({points}).",
            text,
        )
        self.assertIn("**A and B have the same clean accuracy, image by image.**", text)

    def test_a_task_has_no_classes(self):
        paths = [
            self.write(n, found(k), task="segmentation(least=0.5)") for k, n in ((1, "a"), (2, "b"))
        ]
        plain, text = self.compared(*paths)
        self.assertEqual(plain["pairs"][0]["classes"], [])
        self.assertNotRegex(text, "Classes that differ|of [0-9]+ classes|covers the classes")
        self.assertIn("Neither p nor the intervals are corrected for multiple comparisons.", text)

    def test_common_images_only(self):
        a, b = found(1), found(2, n=400, first=350)
        plain, text = self.compared(self.write("a", a), self.write("b", b))
        self.assertEqual(plain["images"], 250)
        self.assertEqual(plain["pairs"][0]["robust"]["first"], int(a.robust[350:].sum()))
        self.assertEqual(plain["pairs"][0]["robust"]["second"], int(b.robust[:250].sum()))
        self.assertIn(
            "The comparison uses the 250 images common to all; the evaluations have A 600, B 400.",
            text,
        )

    def test_ids_in_another_order(self):
        a, b = found(1), found(2)
        mixed = np.random.default_rng(0).permutation(N)
        turned = Verdicts(*(column[mixed] for column in b))
        plain, _ = self.compared(self.write("a", a), self.write("b", b))
        again, _ = self.compared(self.folder / "a", self.write("c", turned))
        self.assertEqual(plain["pairs"], again["pairs"])

    def test_several_are_compared_with_the_first(self):
        of = {name: found(at, share=0.5 + at / 80) for at, name in enumerate("abc")}
        places = [self.write(name, seen, f"{name}1") for name, seen in of.items()]
        plain, text = self.compared(*places)
        self.assertEqual([p["second"] for p in plain["pairs"]], ["B", "C"])
        alone = [self.compared(places[0], place)[0]["pairs"][0] for place in places[1:]]
        given = [pair["robust"]["p"] for pair in plain["pairs"]]
        self.assertEqual(given, [pair["robust"]["p"] for pair in alone])
        corrected = [pair["robust"]["p_corrected"] for pair in plain["pairs"]]
        low, high = sorted(given)
        self.assertEqual(sorted(corrected), [min(2 * low, 1), max(high, min(2 * low, 1))])
        self.assertIn("| A, C | robust |", text)
        self.assertIn("corrected for 2 pairs", text)
        self.assertIn("# A, B and C, image by image", text)

    def test_a_config_that_is_not_the_records(self):
        places = [self.write("a", found(1)), self.write("b", found(2))]
        for text, count in (({}, 0), ({"seed": 3}, 2)):
            if text:
                whole = {"version": 1} | plain(base()) | text
                (Path(places[0]).parent / "config.json").write_text(json.dumps(whole))
            _, said = self.compared(*places)
            self.assertEqual(said.count("config.json is not the config that the record was"), count)

    def test_intervals_cover_a_known_difference(self):
        """2,000 pairs of networks with 0.5 and 0.55, each of them the images of one class."""
        n, times = 100, 2000
        drawn = np.random.default_rng(0).random(n * times)
        ids = np.arange(n * times, dtype=np.uint32)
        seen = []
        for right in (drawn < 0.5, (drawn >= 0.1) & (drawn < 0.65)):
            fooled = np.where(right, "", "apgd-ce")
            labels, clean = (ids // n).astype(np.int32), np.ones(n * times, bool)
            none = (np.zeros(n * times), np.full(n * times, -1))
            seen.append(Verdicts(ids, labels, clean, fooled, *none))
        ours = mock.Mock(record=AccuracyRecord(attacks=attacks()[:1]))
        given = [evaluations.ComparedEvaluation("", ours, v, n * times) for v in seen]
        each = comparison_findings.find(given).pairs[0].by_class
        self.assertLen(each.low, times)
        covered = ((each.low <= 0.05) & (each.high >= 0.05)).mean()
        self.assertBetween(covered, 0.93, 0.97)


class SearchedTest(Folders):
    def test_two_networks_under_apgd(self):
        """Nothing is made up: linear networks on noise, the second of which has lost a class."""
        images = np.random.default_rng(0).random((60, 4, 4, 1), np.float32)
        weights = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)
        labels = np.argmax(images.reshape(60, 16) @ weights, axis=1)
        labels[::9] = (labels[::9] + 1) % 5
        logits = lambda w, x: x.reshape(len(x), -1) @ w  # noqa: E731
        other = np.where(np.arange(5) == 2, np.float32(-9), weights)
        places, results = [], []
        for name, of in (("a", weights), ("b", other)):
            result = autoattack(
                jax.tree_util.Partial(logits, of),
                images,
                labels,
                norm="linf",
                epsilon=0.02,
                attacks=("apgd-ce",),
                overrides={"apgd-ce": {"steps": 5}},
                verbose=False,
            )
            known = {"dataset": "noise", "split": "test", "preprocessing": "none", "model": name}
            places.append(self.folder / name)
            places[-1].mkdir()
            result.save(places[-1] / "results.jsonl", **known)
            results.append(result)
        plain, text = self.compared(*places)
        for at, result in enumerate(results):
            self.assertEqual(plain["evaluations"][at]["robust"], result.robust.mean())
            for name, share in result.accuracy_after.items():
                key = ("first", "second")[at]
                self.assertEqual(plain["pairs"][0]["after"][name][key], round(60 * share))
        rows = plain["pairs"][0]["classes"]
        self.assertEqual([row["second"] for row in rows if row["label"] == 2], [0])
        self.assertIn("60 images of noise, split test, preprocessing none", text)


@absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
class FilesTest(Folders):
    def test_three_files(self):
        places = [self.write(k, found(at), f"{k}1") for at, k in enumerate("abc")]
        out = self.folder / "new" / "out"
        for given in (places[:2], places):
            shutil.rmtree(out, ignore_errors=True)
            code, said, error = call(*given, "--out", out)
            self.assertEqual((code, error), (0, ""))
            names = sorted(path.name for path in out.iterdir())
            self.assertEqual(names, [f"comparison.{kind}" for kind in ("json", "md", "png")])
            text = (out / "comparison.md").read_text()
            self.assertEqual(text.replace("![Differences](comparison.png)\n\n", ""), said)
            self.assertLen(
                json.loads((out / "comparison.json").read_text())["pairs"], len(given) - 1
            )
            with Image.open(out / "comparison.png") as image:
                self.assertGreater(min(image.size), 300)
                self.assertGreater(image.width, 1200)

    def test_another_comparison_is_not_overwritten(self):
        places = [self.write(k, found(at), f"{k}1") for at, k in enumerate("abc")]
        out = self.folder / "out"
        self.assertEqual(call(*places[:2], "--out", out)[0], 0)
        self.assertEqual(call(*places[:2], "--out", out)[0], 0)  # the same one again
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        code, said, error = call(places[0], places[2], "--out", out)
        self.assertEqual((code, said), (2, ""))
        self.assertIn("comparison.json compares different evaluations; name another folder", error)
        self.assertEqual({path.name: path.read_bytes() for path in out.iterdir()}, before)
        (out / "comparison.json").write_text("{")  # damaged: it may be of others
        self.assertEqual(call(*places[:2], "--out", out)[0], 2)
        self.assertEqual((out / "comparison.json").read_text(), "{")
        code, _, error = call(*places, "--out", self.folder / "a" / "results.jsonl")
        self.assertEqual(code, 2)
        self.assertIn("is a file; name a folder", error)


class RefusedTest(Folders):
    def test_a_file_that_is_not_text(self):
        np.savez(self.folder / "images.npz", images=np.arange(9))
        error = self.refused(self.write("a", found(1)), self.folder / "images.npz")
        self.assertIn("images.npz is not a text file; give a results.jsonl", error)

    def test_without_matplotlib(self):
        places = [self.write(k, found(at)) for at, k in enumerate("ab")]
        with mock.patch.dict(sys.modules, {"matplotlib": None}):
            self.assertIn("pip install -e '.[plot]'", self.refused(*places))

    def test_other_questions(self):
        for changes, said in (
            ({"dataset": "cifar100"}, 'data set is "cifar10" there, "cifar100" here'),
            ({"split": "test@list"}, 'split is "test" there, "test@list" here'),
            ({"preprocessing": "bicubic-32-crop-32"}, 'preprocessing is "none" there, "bicubic-32'),
            ({"attacks": attacks(epsilon=16 / 255)}, 'radius is "0.0313725" there, "0.0627451" he'),
            ({"attacks": attacks(norm="l2")}, 'norm is "linf" there, "l2" here'),
            ({"attacks": attacks()[:1]}, 'attacks is "apgd-ce, apgd-t" there, "apgd-ce" here; eva'),
            ({"attacks": attacks(steps=10)}, "apgd-ce: steps is 100 there, 10 here; apgd-t: steps"),
            ({"attacks": attacks(eot=20)}, "apgd-ce: eot is null there, 20 here"),
            ({"search_dtype": "bfloat16"}, 'search dtype is "float32" there, "bfloat16" her'),
            ({"ids_sha256": "b" * 64}, 'list of images is "aaaaaaaaaa'),
            ({"classes_sha256": "b" * 64}, 'list of classes is "aaaaaaaaaa'),
            ({"model": {"name": "resnet18", "image_size": 64}}, "image size is 32 there, 64 here"),
        ):
            with self.subTest(row=(changes, said)):
                lists = {"ids_sha256": "a" * 64, "classes_sha256": "a" * 64}
                a = self.write("a", found(1), **lists)
                error = self.refused(a, self.write("b", found(2), **(lists | changes)))
                self.assertIn(f"cannot be compared with {a} (there): ", error)
                self.assertIn(said, error)
                self.assertIn("; evaluate all of them on the same images, with the same", error)

    def test_all_differences_are_named_at_once(self):
        other = {"preprocessing": "bicubic-32-crop-32", "attacks": attacks(norm="l2", epsilon=0.5)}
        a, b = self.write("a", found(1)), self.write("b", found(2), **other)
        c = self.write("c", found(3)._replace(labels=(found(3).labels + 1) % 10))
        error = self.refused(a, b, c)
        for said in ("preprocessing is", "norm is", "radius is", f"{b} (here)", f"{c} (here)"):
            self.assertIn(said, error)
        self.assertIn(
            "the labels of 600 of 600 images differ, such as image 0 with 0 there, 1 here", error
        )

    def test_no_common_image(self):
        a, b = self.write("a", found(1)), self.write("b", found(1, first=1000, n=50))
        said = "no images in common, 0..599 there, 1000..1049 here"
        self.assertIn(said, self.refused(a, b))
        c = self.write("c", found(1, first=590, n=460))
        self.assertIn("these evaluations have no image in common", self.refused(c, a, b))

    def test_what_only_one_record_says_is_no_difference(self):
        lists = {"ids_sha256": "a" * 64, "classes_sha256": "a" * 64, "search_dtype": None}
        self.compared(self.write("a", found(1), **lists), self.write("b", found(2)))

    def test_names_of_others_for_the_same_preprocessing(self):
        a = self.write("a", found(1), preprocessing="Res256Crop224")
        self.compared(a, self.write("b", found(2), preprocessing="bilinear-256-crop-224"))

    def test_one_is_not_enough(self):
        a = self.write("a", found(1))
        self.assertIn("one evaluation has nothing to compare with", self.refused(a))
        self.assertIn("is the same evaluation as", self.refused(a, a / "results.jsonl"))

    def test_several_in_a_folder(self):
        a, b = self.write("a", found(1), "a1"), self.write("b", found(2), "b1")
        self.write("b", found(3), "b2", method="apgd-ce + apgd-t")
        error = self.refused(a, b)
        said = (
            f"{b} holds 2 evaluations, of which these can be compared with {a}: {b}#b1 (autoattack"
        )
        self.assertIn(said, error)
        c = self.write("c", found(1), "c1", dataset="cifar100")
        error = self.refused(c, b)
        self.assertIn(f"{b} holds 2 evaluations; name one of them: {b}#b1 (autoattack", error)
        self.assertIn(f"{b}#b2 (apgd-ce + apgd-t, linf 0.03137)", error)
        plain, _ = self.compared(a, f"{b}#b2")
        self.assertEqual(plain["evaluations"][1]["evaluation"], "b2")
        self.assertIn("has no evaluation x; name one of them", self.refused(a, f"{b}#x"))
        self.assertIn(f"{b} holds 2 evaluations; name one of them", self.refused(b, b))
        two, _ = self.compared(f"{b}#b1", f"{b}#b2")  # two of one folder
        self.assertEqual(two["pairs"][0]["robust"]["first"], int(found(2).robust.sum()))

    def test_other_images_of_the_same_names_do_not_fit(self):
        """The refused evaluation itself was named as one that "can be" compared."""
        seen = found(1)
        hashes = np.array([f"p{number:x}" for number in range(len(seen.labels))])
        a = self.write("a", seen._replace(hashes=hashes), "a1")
        b = self.write("b", found(2)._replace(hashes=hashes[::-1]), "b1")
        error = self.refused(a, b)
        self.assertIn("600 of 600 images with the same names differ; evaluate all", error)
        self.write("b", found(3)._replace(hashes=hashes), "b2")
        said = f"of which these can be compared with {a}: {b}#b2 (autoattack standard, linf 0.03137"
        self.assertIn(f"{said}); name one of them", self.refused(a, b))
        self.assertIn(f"{b}#b2 (autoattack standard", self.refused(a, f"{b}#b1"))

    def test_threats(self):
        l2 = {"attacks": attacks(norm="l2", epsilon=0.5)}
        both = {"attacks": attacks() + l2["attacks"]}
        nothing = {"attacks": [], "robust": None}
        for name, seed in (("a", 1), ("b", 2)):
            seen = found(seed)
            place = self.write(name, seen, "linf")
            self.write(name, seen, "l2", **l2)
            self.write(name, seen, "union", **both)
            clean = seen._replace(fooled_by=np.where(seen.clean, "", "clean"))
            self.write(name, clean, "clean", **nothing)
        places = self.folder / "a", place
        self.assertIn("l2 0.5), ", error := self.refused(*places))
        self.assertIn(", or give --threat NORM:RADIUS\n", error)
        for threat, number in (("linf:8/255", "linf"), ("l2:0.5", "l2"), ("clean", "clean")):
            plain, _ = self.compared(*places, "--threat", threat)
            self.assertEqual([e["evaluation"] for e in plain["evaluations"]], [number] * 2)
        said = "has no evaluation under linf:4/255; name one of them: "
        self.assertIn(said, self.refused(*places, "--threat", "linf:4/255"))
        for threat, said in (
            ("linf", "has no radius; write linf:RADIUS, such as linf:4/255"),
            ("max:1", "the norm 'max' is unknown; choose one of linf, l2, l1, l0"),
            ("l2:four", "is not a number"),
        ):
            error = self.refused(*places, "--threat", threat)
            self.assertIn(f"--threat={threat}", error)
            self.assertIn(said, error)

    def test_records_without_verdicts(self):
        a, b = self.write("a", found(1)), self.write("b", found(2), verdicts=None)
        said = "no per-image verdicts, because it comes from a training run or an older version;"
        self.assertIn(said, self.refused(a, b))
        self.write("b", found(3), "b2")  # next to one that has some, it is not meant
        self.assertEqual(self.compared(a, b)[0]["evaluations"][1]["evaluation"], "b2")

    @parameterized.parameters(3, "new")
    def test_newer(self, schema):
        error = self.refused(self.write("a", found(1)), self.write("b", found(2), schema=schema))
        self.assertIn(f"record of schema {schema}, but this version only reads up to 2; ins", error)

    def test_verdict_files(self):
        for what, said in (
            ("missing", "is missing; copy it with its record"),
            ("cut", "is damaged"),
            ("newer", "has schema 9, but this version only reads up to 2"),
            ("other", "does not belong to its record in"),
            ("empty", "no images in common"),
        ):
            with self.subTest(row=(what, said)):
                a, b = self.write("a", found(1)), self.write("b", found(2))
                path = b / verdicts.file_of("a1")
                if what == "missing":
                    path.unlink()
                elif what == "cut":
                    path.write_text(path.read_text()[:-40])
                elif what == "newer":
                    path.write_text(path.read_text().replace('"schema": 2', '"schema": 9'))
                elif what == "empty":
                    verdicts.write(path, "a1", Verdicts(*(column[:0] for column in found(2))))
                else:
                    verdicts.write(path, "a1", found(5, share=0.3))
                self.assertIn(said, self.refused(a, b))

    def test_no_records(self):
        a = self.write("a", found(1))
        self.assertIn("has no records; name a run", self.refused(a, self.folder / "nowhere"))
        (self.folder / "results.jsonl").write_text('{"loss": 1}\n')
        self.assertIn("hold", self.refused(a, self.folder / "results.jsonl"))
