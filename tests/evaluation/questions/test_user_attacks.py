"""Adversarial images and attacks that a user brings: what they lower, and what is refused."""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.commands import compare, report, verify
from jaxrobust.evaluation.bundles import claims
from jaxrobust.evaluation.records import verdicts
from tests.support import digits_network, paths, result_lines, sweeps
from tests.support.command_line import called
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

TORCH = importlib.util.find_spec("torch") is not None
N, EPSILON = 32, 0.5
SHAPE = (2, 8, 8, 1)
CODE = """
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
WEIGHTS = jnp.asarray(np.load(Path(__file__).with_name("weights.npy")))
def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS
def in_ball(points, images):
    for _ in range(20):
        delta = points - images
        norm = np.linalg.norm(delta.reshape(len(delta), -1), axis=1)
        delta = delta * np.minimum(1, EPSILON / np.maximum(norm, 1e-9)).reshape(-1, 1, 1, 1)
        points = np.clip(images + delta, 0, 1)
    return points.astype(np.float32)
EPSILON = 0.499
def in_jax(logits_fn, key, images, labels):
    '''The runner-up, along the gradient.'''
    def loss(x):
        logits = logits_fn(x)
        own = jax.nn.one_hot(labels, 10)
        return ((logits - 1e3 * own).max(1) - (logits * own).sum(1)).sum()
    return in_ball(np.asarray(images + 10 * jax.grad(loss)(images)), np.asarray(images))
def in_numpy(logits_fn, key, images, labels):
    '''The best of random points; float64.'''
    images, labels = np.array(images), np.array(labels)
    rng, best = np.random.default_rng(0), np.array(images)
    for _ in range(20):
        points = in_ball(images + rng.standard_normal(images.shape), images)
        wrong = np.asarray(logits_fn(points)).argmax(1) != labels
        best[wrong] = points[wrong]
    return best.astype(np.float64)
def in_torch(logits_fn, key, images, labels):
    import torch
    points = in_ball(np.asarray(in_jax(logits_fn, key, images, labels)), np.asarray(images))
    return torch.from_numpy(points)
def raising(logits_fn, key, images, labels):
    raise RuntimeError("no gradient")
def few(logits_fn, key, images, labels):
    return images[:-1]
def whole_numbers(logits_fn, key, images, labels):
    return (images * 255).astype(jnp.uint8)
def truth(logits_fn, key, images, labels):
    return labels
def nan(logits_fn, key, images, labels):
    return images * jnp.nan
def far(logits_fn, key, images, labels):
    return 1 - images
def beyond(logits_fn, key, images, labels):
    return images + 0.01
def nothing(logits_fn, key, images, labels):
    return None
def three(logits_fn, key):
    return None
FOUR = 4
"""


class Case(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.weights = digits_network.ridge()
        np.save(cls.root / "weights.npy", cls.weights)
        (cls.root / "nets.py").write_text(CODE)
        test = data.open_source("digits", "test")
        cls.images = data.Prepared(test, image_size=8, preprocessing="none", places=range(N))[:]
        (cls.whole,) = cls.found(out="whole", attack="apgd-ce,apgd-t")
        cls.robust = verdicts.read(cls.root / "whole" / cls.whole["verdicts"]).robust

    @classmethod
    def called(cls, *, out: str, **how) -> tuple[int, str, str]:
        settings = {"attack": "apgd-ce", "steps": 2} if "attack" not in how else {}
        return call(
            function=f"{cls.root}/nets.py:logits_fn", dataset="digits", norm="l2",
            epsilon=str(EPSILON), split=f"test[:{N}]", out=str(cls.root / out), **settings | how,
        )  # fmt: skip

    @classmethod
    def found(cls, *, out: str, **how) -> list[dict]:
        code, printed, said = cls.called(out=out, **how)
        assert code == 0, said
        cls.printed = printed
        return result_lines.read(cls.root / out)

    def users(self, name: str, **how) -> dict:
        return self.found(out=f"alone-{name}", attack=f"{self.root}/nets.py:{name}", **how)[-1]

    def own_points(self) -> np.ndarray:
        """Points in the ball, of which those of images that fall fool the network."""
        import jax

        module: dict = {"__file__": str(self.root / "nets.py")}
        exec(CODE, module)
        labels = data.Prepared(
            data.open_source("digits", "test"), image_size=8, preprocessing="none", places=range(N)
        ).labels()
        images = jax.numpy.asarray(self.images)
        return module["in_jax"](module["logits_fn"], None, images, labels)

    def saved(self, name: str = "adv.npz", **arrays) -> str:
        path = Path(self.create_tempdir()) / name
        np.savez(path, **arrays)
        return str(path)


class LoweredTest(Case):
    def test_points_lower_the_union(self):
        """Nothing read points: an adaptive attack could not be counted."""
        (plain,) = self.found(out="plain")
        points = self.own_points()
        file = self.saved(ids=np.arange(N), images=points)
        rows = self.found(out="plain", points=[file])
        self.assertLen(rows, 2)
        record = rows[-1]
        sha256 = claims.file_sha256(Path(file))
        name = f"adv.npz ({sha256[:8]})"
        self.assertEqual(record["attacks"][-1], {
            "norm": "l2", "epsilon": EPSILON, "name": name, "file": "adv.npz", "sha256": sha256,
        })  # fmt: skip
        self.assertEqual(record["method"], f"apgd-ce + {name}, steps 2")
        own = verdicts.read(self.root / "plain" / record["verdicts"])
        before = verdicts.read(self.root / "plain" / plain["verdicts"])
        logits = points.reshape(N, -1) @ self.weights
        fooled = before.robust & (logits.argmax(1) != own.labels)
        self.assertTrue(fooled.any())
        np.testing.assert_array_equal(own.robust, before.robust & ~fooled)
        self.assertEqual(set(own.fooled_by[fooled]), {name})
        self.assertEqual(record["accuracy_after"]["apgd-ce"], plain["robust"])
        self.assertLess(record["robust"], plain["robust"])
        self.assertIn(f"after {name}", self.printed)

    def test_points_alone_and_of_every_type(self):
        points = self.own_points()
        outcomes = []
        for kind in (np.float32, np.float64):
            file = self.saved(ids=np.arange(N), images=points.astype(kind))
            outcomes.append(self.found(out=f"kind-{kind.__name__}", attack="clean", points=[file]))
        ((first,), (second,)) = outcomes
        self.assertEqual(first["robust"], second["robust"])
        self.assertLess(first["robust"], first["clean"])
        self.assertLen(first["attacks"], 1)
        levels = np.rint(self.images * 255).astype(np.uint8)
        (same,) = self.found(
            out="bytes", attack="clean", points=[self.saved(ids=np.arange(N), images=levels)]
        )
        self.assertEqual(same["robust"], same["clean"])  # the images as they are fool nothing

    def test_alone_they_replay_nothing(self):
        """Beside a ledger of AutoAttack, images as they are count what they find: nothing."""
        file = self.saved(ids=np.arange(N), images=self.images)
        record = self.found(out="whole", attack="clean", points=[file])[-1]
        self.assertEqual(record["robust"], record["clean"])
        self.assertNotIn("replayed", record)

    def test_a_wrong_point_lowers_nothing(self):
        standing = np.flatnonzero(self.robust)
        file = self.saved(ids=standing, images=self.own_points()[standing])
        record = self.found(out="whole", attack="apgd-ce,apgd-t", points=[file])[-1]
        self.assertEqual(record["robust"], self.whole["robust"])
        self.assertEqual(record["costs"][-1]["fooled"], 0)
        self.assertEqual(record["costs"][-1]["forward"], len(standing))

    def test_the_ledger_goes_on(self):
        self.found(out="resumed", points=[self.saved(ids=[0], images=self.images[:1])])
        ledger = next((self.root / "resumed").glob("ledger-*.jsonl"))
        lines = ledger.read_text().splitlines()
        file = self.saved(ids=np.arange(N), images=self.own_points())
        for count in (2, 2):  # already done
            self.assertLen(self.found(out="resumed", points=[file]), count)
        self.assertEqual(ledger.read_text().splitlines()[: len(lines)], lines)
        self.assertLen([*(self.root / "resumed").glob("ledger-*.jsonl")], 1)
        plain = self.found(out="resumed")[-1]  # its verdicts are those of the attack alone
        (alone,) = self.found(out="resumed-alone")
        self.assertEqual(plain["robust"], alone["robust"])

    @sweeps.rows("in_jax", "in_numpy", "in_torch")
    def test_a_function(self, name):
        if name == "in_torch" and not TORCH:
            self.skipTest(paths.PARITY)
        record = self.users(name)
        self.assertLess(record["robust"], record["clean"])
        self.assertStartsWith(record["attacks"][0]["name"], f"nets.py:{name} (")
        self.assertEqual(record["attacks"][0]["sha256"], claims.file_sha256(self.root / "nets.py"))
        again = self.found(
            out=f"both-{name}", attack=f"apgd-ce,{self.root}/nets.py:{name}", steps=1
        )[-1]
        self.assertLen(again["attacks"], 2)
        self.assertLessEqual(again["robust"], record["robust"])

    def test_the_bundle_verifies(self):
        file = self.saved(ids=np.arange(N), images=self.own_points())
        folder = self.root / "bundle"
        record = self.found(out="bundled", points=[file], bundle=str(folder))[-1]
        network = ("--function", f"{self.root}/nets.py:logits_fn")
        printed, _ = ended(called(verify, folder, *network, "--json", "--sample=1"))
        plain = json.loads(printed.splitlines()[-1])
        self.assertEqual(plain["confirmed"]["standing"], round(record["robust"] * N))
        verdicts_of = {row["verdict"] for row in claims.read(folder).rows}
        self.assertIn(record["attacks"][-1]["name"], verdicts_of)
        shutil.copytree(self.root / "bundled", self.root / "elsewhere")
        self.assertLen(self.found(out="elsewhere", points=[file], bundle=str(folder)), 1)

    def test_a_bundle_of_points_alone(self):
        file = self.saved(ids=np.arange(N), images=self.own_points())
        folder = self.root / "alone"
        self.found(out="alone-bundle", attack="clean", points=[file], bundle=str(folder))
        network = ("--function", f"{self.root}/nets.py:logits_fn")
        printed, _ = ended(called(verify, folder, *network, "--sample=1"))
        self.assertIn("adv.npz (", printed)

    def test_reports_and_comparisons_read_the_record(self):
        file = self.saved(ids=np.arange(N), images=self.own_points())
        attack = f"apgd-ce,{self.root}/nets.py:in_jax"
        self.found(out="reported", points=[file], attack=attack, steps=2)
        code, _, said = called(report, self.root / "reported", "--out", self.root / "page.html")
        self.assertIn(code, (None, 0), said)
        page = (self.root / "page.html").read_text()
        self.assertIn("--points adv.npz", page)
        self.assertIn("--attack apgd-ce,nets.py:in_jax", page)
        self.found(out="compared")
        said = refused(called(compare, self.root / "reported", self.root / "compared"))
        self.assertIn('attacks is "apgd-ce, nets.py:in_jax (', said)  # other attacks, other numbers


class MistakesTest(Case):
    def refused(self, pattern: str, **how) -> None:
        out = Path(self.create_tempdir()).name
        said = refused(self.called(out=out, **how))
        self.assertRegex(said.splitlines()[-1], pattern)
        self.assertFalse((self.root / out / "results.jsonl").exists())

    @sweeps.rows(
        ({'ids': [0, 400]}, '1 id outside the 32 images .* as 400; leave'),
        ({'ids': [3, 3]}, 'repeats 1 id, such as 3; save one point'),
        ({'ids': [-1, 3]}, '1 id outside the 32 .* as -1'),
        ({'ids': [0.0, 1.0]}, 'ids are float64\\[2\\]; save integers'),
        ({'ids': [0]}, 'shape \\(2, 8, 8, 1\\) for 1 ids; save one image for each'),
        ({'images': np.zeros((2, 1, 8, 8))}, 'images have shape .1, 8, 8., .* channels last'),
        ({'images': np.zeros((2, 9, 9, 1))}, 'images have shape .9, 9, 1., but the'),
        ({'images': np.zeros((2, 64))}, 'shape \\(2, 64\\) for 2 ids'),
        ({'images': np.full(SHAPE, np.nan)}, '2 of 2 images have NaN or infinite'),
        ({'images': np.ones(SHAPE)}, '2 of 2 points are outside .* radius 0.5, .* by \\d'),
        ({'images': np.full(SHAPE, 1.001)}, '2 of 2 images are outside .* by 0.001; clip'),
        ({'images': np.full(SHAPE, 200.0)}, 'by 199; divide by 255, or save uint8'),
        ({'images': np.zeros(SHAPE, np.int64)}, 'are int64; give floats in .0, 1.,'),
        ({'ids': np.zeros(0, int), 'images': np.zeros((0, 8, 8, 1))}, 'has no points;'),
        ({'images': np.array([None, None])}, 'of plain arrays .Object arrays cannot'),
        ({'images': None, 'x': [1]}, "has no array 'images' .it has ids, x.; save ids"),
    )  # fmt: skip
    def test_points(self, changes, said):
        arrays = {"ids": np.array([0, 3]), "images": self.images[[0, 3]]} | changes
        arrays = {key: value for key, value in arrays.items() if value is not None}
        self.refused(said, points=[self.saved(**arrays)])

    def test_files(self):
        text = self.create_tempfile("a.npz", content="no archive").full_path
        one = self.saved("one.npy.npz", ids=[0], images=self.images[:1])
        self.refused("--points .*none.npz cannot be read .No such file", points=["none.npz"])
        self.refused("a.npz is not an .npz file of plain arrays", points=[text])
        self.refused("is given twice; give it once", points=[one, one])
        file = Path(self.create_tempdir()) / "x.npy"
        np.save(file, self.images)
        self.refused("x.npy has no array 'ids' .it has no named ones.; save", points=[str(file)])

    @sweeps.rows(
        ("none", "nets.py has no 'none'; it has"),
        ("FOUR", "FOUR is not a function, but of type int"),
        ("raising", "nets.py, line \\d+: RuntimeError: no gradient"),
        ("three", "TypeError: three.. takes 2 positional arguments"),
        ("few", "returned an array \\(\\d+, 8, 8, 1\\) for images .32, 8, 8, 1.|for images"),
        ("whole_numbers", "returned uint8; return floats"),
        ("truth", "returned an array \\(\\d+,\\) for images"),
        ("nothing", "returned an array \\(\\) for images"),
        ("nan", "(\\d+) of \\1 images have NaN or infinite pixels"),
        ("far", "(\\d+) of \\1 points are outside the l2 ball of radius 0.5, the one for"),
        ("beyond", "(\\d+) of \\1 images are outside .0, 1., image \\d+ by 0.01; clip them"),
    )
    def test_functions(self, name, said):
        self.refused(said, attack=f"{self.root}/nets.py:{name}")

    def test_a_file_without_a_function(self):
        self.refused("does not name a function; write", attack="nets.py")
        self.refused("cannot read .*gone.py", attack="gone.py:attack")

    @sweeps.rows(
        (
            {"attack": "pgd-2"},
            "needs attacks that work image by image, not --attack",
        ),
        ({"attack": "autoattack", "version": "rand"}, "leave --version=rand out"),
        ({"attack": "autoattack", "version": "fast"}, "leave --version=fast out"),
        ({"attack": "autoattack", "until_width": "2"}, "leave --until_width out"),
        ({"attack": "autoattack", "worst_case": True}, "leave --worst_case out"),
        ({"attack": "clean", "corruptions": "fog"}, "leave --corruptions out"),
        (
            {"attack": "clean", "steps": 3},
            "--steps=3 has no effect with --attack=adv.npz; leave it",
        ),
        ({"attack": "clean", "version": "plus"}, "--version=plus has no effect with"),
    )
    def test_what_it_does_not_go_with(self, given, said):
        points = [self.saved(ids=[0], images=self.images[:1])]
        self.refused(said, points=points, **given)
