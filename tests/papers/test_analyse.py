"""The analyses: what their CSV holds, against computations that share no code with them."""

import contextlib
import csv
import functools
import importlib.util
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.attacks.geometry.balls import GEOMETRIES
from jaxrobust.config import network_of
from jaxrobust.papers.commands import analyse
from jaxrobust.papers.networks import convergence
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.types import Threat
from jaxrobust.weights.store.checkpoint import Checkpoints, steps
from jaxrobust.weights.trained import runs
from tests.support import evaluations, parity
from tests.support import runs as training

PLOT = importlib.util.find_spec("matplotlib") is not None
EPSILON = 0.1  # of the run
_folder = tempfile.TemporaryDirectory()


def tearDownModule():
    _folder.cleanup()


_LINEAR = """import torch

def linear():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
    net[1].weight.data = (torch.arange(640).reshape(10, 64) % 7).float()
    return net.eval()
"""


@functools.cache
def run() -> Path:
    """A run on digits whose second phase has weights that are right, and hardly robust."""
    workdir = Path(_folder.name) / "run"
    evaluations.trained(workdir)
    return workdir


@functools.cache
def barely() -> Path:
    """A run with weights of its last phase alone, which is there sooner."""
    workdir = Path(_folder.name) / "barely"
    evaluations.trained(workdir, pretrained=False)
    return workdir


def call(*words) -> tuple[int, str, str]:
    out, said, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        jax.numpy_dtype_promotion("standard"),
    ):
        try:
            analyse.main([str(word) for word in words])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), said.getvalue()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], key: str) -> np.ndarray:
    return np.array([float(row[key]) for row in rows])


class Network:
    """The run's network and test images, by the shortest way."""

    def __init__(self, n: int):
        config = runs.run_config(run())
        _, (params, stats) = runs.run_weights(run())
        apply = network_of(config, dtype="float32").apply
        self.logits = jax.jit(lambda x: apply(params, stats, x)[0])
        source = data.open_source("digits", "test[:80]")
        batches = data.evaluation_batches(source, batch_size=n, image_size=8, limit=n)
        with contextlib.closing(batches):
            batch = next(batches)
        self.images = batch.images.astype(np.float32) / np.float32(255)
        self.labels, self.ids = batch.labels, batch.ids
        self.gradient = jax.jit(jax.grad(lambda x, y: self.ce(x, y).sum()))

    def ce(self, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(images), labels)

    def start(self, seed: int) -> np.ndarray:
        keys = [jax.random.fold_in(jax.random.key(seed), int(number)) for number in self.ids]
        radius = jnp.full(len(keys), EPSILON)
        return np.asarray(
            GEOMETRIES["linf"].sample(jnp.stack(keys), jnp.asarray(self.images), radius)
        )

    def pgd(self, seed: int, made: int, length: float) -> np.ndarray:
        """Linf PGD as a textbook has it."""
        points = self.start(seed)
        for _ in range(made):
            points = points + np.float32(length) * np.sign(self.gradient(points, self.labels))
            points = np.clip(points, self.images - EPSILON, self.images + EPSILON).clip(0, 1)
        return points.astype(np.float32)


class LinearTest(absltest.TestCase):
    """A network whose loss is known on paper: two classes, and logits [x, 0] of the one pixel."""

    def test_convergence_states_the_mean_and_both_ends(self):
        subject = SimpleNamespace(ball=Threat("linf", 0.2))
        pixels = np.float32([0.9, 0.7, 0.1]).reshape(3, 1, 1, 1)
        network = jax.tree_util.Partial(
            lambda x: jnp.stack([x[:, 0, 0, 0] - 0.5, 0 * x[:, 0, 0, 0]], 1)
        )
        labels, ids = np.int32([0, 0, 0]), np.int32([4, 5, 6])
        seen = NetworkSample("a line", subject, network, pixels, labels, ids, ())
        settings = AnalysisSettings("convergence", {}, 3, (0, 1, 9), seeds=4, batch=2)
        rows, losses = convergence.analyse(seen, settings)
        self.assertEqual(losses.shape, (4, 10, 2))  # the third image is wrong without an attack
        self.assertEqual([row["image"] for row in rows], [4, 4, 4, 5, 5, 5])
        for row in rows:
            own = losses[:, row["steps"], row["image"] - 4]
            found = row["ce_least"], row["ce_mean"], row["ce_largest"]
            np.testing.assert_allclose(found, (own.min(), own.mean(), own.max()), rtol=1e-6)
        # A start is up to epsilon away, a step 0.03: nine of them end at the ball's edge.
        self.assertLess(rows[0]["ce_least"] + 0.01, rows[0]["ce_largest"])
        for row, x in zip(rows[2::3], (0.7, 0.5), strict=True):
            worst = np.log1p(np.exp(0.5 - x))
            self.assertAlmostEqual(row["ce_largest"], worst, places=5)


@absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
class NumbersTest(parameterized.TestCase):
    # Two programs round differently, and a sign may follow: losses agree to about 1e-4.

    def analysed(self, name: str, *words) -> list[dict[str, str]]:
        out = Path(self.create_tempdir())
        given = () if "--images" in words else ("--workdir", run())
        code, said, error = call(name, *given, "--out", out, *words)
        self.assertEqual(code, 0, error)
        table, picture = map(Path, said.split())
        self.assertEqual((table.name, picture.name), (f"{name}.csv", f"{name}.png"))
        with Image.open(picture) as image:
            self.assertGreater(min(image.size), 200)
        self.assertLen(list(out.iterdir()), 2)
        return read(table)

    @pytest.mark.slow
    def test_perturbations(self):
        rows = self.analysed("perturbations", "--n", 12, "--steps", 3, "--batch", 5)
        net = Network(12)
        ends = net.pgd(0, 3, 1.5 * EPSILON / 3)
        delta = np.abs(ends - net.images)
        self.assertEqual(column(rows, "image").tolist(), net.ids.tolist())
        self.assertEqual(column(rows, "label").tolist(), net.labels.tolist())
        for key, expected in {
            "clean_ce": net.ce(net.images, net.labels),
            "adversarial_ce": net.ce(ends, net.labels),
            "adversarial_prediction": net.logits(ends).argmax(1),
            "largest_change": delta.max((1, 2, 3)),
            "mean_change_of_limit": delta.mean((1, 2, 3)) / EPSILON,
        }.items():
            np.testing.assert_allclose(column(rows, key), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_effectiveness(self):
        words = ("--n", 16, "--steps", 1, 4, "--seeds", 2)
        rows = self.analysed("effectiveness", *words)
        net = Network(16)
        last = [row for row in rows if row["checkpoint"].startswith("train ")]
        self.assertLen(rows, 4)  # of the best weights of two phases
        self.assertEqual(column(last, "attack_steps").tolist(), [1, 4])
        self.assertEqual(column(rows, "step").tolist(), [4, 4, 7, 7])
        losses = []
        for made in (1, 4):
            ends = [net.pgd(seed, made, 1.5 * EPSILON / made) for seed in range(2)]
            losses.append(np.mean([net.ce(points, net.labels) for points in ends]))
        np.testing.assert_allclose(column(last, "ce"), losses, rtol=1e-4)
        left = 100 * (losses[1] - losses[0]) / losses[1]
        np.testing.assert_allclose(column(last, "left_percent"), [left, 0], rtol=1e-2, atol=1e-9)

    @pytest.mark.slow
    def test_synthesis(self):
        words = ("--n", 3, "--steps", 4, "--targets", 7, 2, "--seed", 5)
        rows = self.analysed("synthesis", *words)
        net = Network(3)
        rng = np.random.default_rng(5)
        noise = rng.random((3, 8, 8, 1)) + rng.uniform(-15, 15, (3, 8, 8, 1))
        points = start = noise.clip(0, 1).astype(np.float32)
        targets = np.array([7, 2, 7])
        for _ in range(4):
            points = points - np.float32(0.225) * np.sign(net.gradient(points, targets))
            points = np.clip(points, 0, 1).astype(np.float32)
        probabilities = np.exp(-np.asarray(net.ce(points, targets)))
        for key, expected in {
            "target": targets,
            "start_ce": net.ce(start, targets),
            "end_ce": net.ce(points, targets),
            "probability": probabilities,
        }.items():
            np.testing.assert_allclose(column(rows, key), expected, rtol=1e-4, atol=1e-6)
        self.assertGreater(column(rows, "saturated_at_start").min(), 0.85)

    @pytest.mark.slow
    def test_semantic_score(self):
        words = ("--n", 16, "--steps", 3, "--judges", run(), "--top", 3)
        rows = self.analysed("semantic-score", *words)
        net = Network(16)
        delta = net.images - net.pgd(0, 3, 1.5 * EPSILON / 3)  # the authors' sign
        shown = np.round((delta + EPSILON) / (2 * EPSILON) * 255).clip(0, 255) / 255
        order = np.argsort(-np.asarray(net.logits(shown.astype(np.float32))), axis=1)
        scores = [(order[:, :k] == net.labels[:, None]).any(1).mean() for k in (1, 3)]
        self.assertEqual([row["itself"] for row in rows], ["True", "False"])
        for row in rows:
            found = [float(row[f"perturbations_top{k}"]) for k in (1, 3)]
            np.testing.assert_allclose(found, scores, atol=1 / 16 + 1e-9)  # one image
            clean = (np.asarray(net.logits(net.images)).argmax(1) == net.labels).mean()
            self.assertEqual(float(row["images_top1"]), clean)

    @pytest.mark.slow
    def test_a_judge_of_pytorch(self):
        parity.torch_or_skip(self)
        path = Path(self.create_tempdir()) / "judges.py"
        path.write_text(_LINEAR)
        words = ("--n", 64, "--steps", 1, "--judges", f"torch:{path}:linear", "--top", 3)
        _, row = self.analysed("semantic-score", *words)
        images, labels = Network(64).images, Network(64).labels
        matrix = np.arange(640).reshape(10, 64) % 7
        order = np.argsort(-images.reshape(64, 64) @ matrix.T, axis=1, kind="stable")
        for k in (1, 3):
            expected = (order[:, :k] == labels[:, None]).any(1).mean()
            self.assertAlmostEqual(float(row[f"images_top{k}"]), expected, delta=1 / 64)
        self.assertIn("linear", row["judge"])

    def test_two_chains_of_the_same_seed_are_one(self):
        folder = Path(self.create_tempdir())
        Image.new("RGB", (30, 20), (10, 90, 200)).save(folder / "a.png")
        given = ("--images", folder / "a.png", "--image_size", 16, "--chain", "light")
        again = [self.analysed("augmentations", *given) for _ in range(2)]
        self.assertEqual(*again)

    def test_a_chain_that_keeps_the_size_begins_with_what_evaluation_sees(self):
        folder = Path(self.create_tempdir())
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "a.png")
        given = ("--images", folder / "a.png", "--image_size", 16, "--views", 2)
        same = self.analysed("augmentations", *given, "--chain", "flip(0)")
        self.assertEqual(list(column(same, "from_plain")), [0.0, 0.0])

    def test_mistakes(self):
        """Those of the flags alone are in test_numbers.py."""
        folder = Path(self.create_tempdir())
        (folder / "a.txt").write_text("no picture")
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        stands = {"RUN": barely(), "FILE": folder / "a.txt", "PNG": folder / "a.png"}
        out = folder / "out"
        for words, said in (
            ("perturbations", "give --workdir RUN"),
            ("perturbations --workdir nowhere", "is not a run"),
            ("perturbations --workdir RUN --epsilon 4", "larger than the pixel range"),
            ("perturbations --workdir RUN --epsilon four", "is not a number"),
            ("perturbations --workdir RUN --n 0", "--n=0 must be at least 1"),
            ("perturbations --workdir RUN --model vit_s", "give --workdir RUN, or"),
            ("semantic-score --workdir RUN --judges a=b", "a=b: b does not exist"),
            ("synthesis --workdir RUN --targets 10", ", from 0 to 9"),
            ("augmentations", "--images contains no pictures"),
            ("augmentations --images nowhere", "no such file or folder"),
            ("augmentations --images FILE", "Pillow does not recognize its format"),
            ("augmentations --images PNG --chain turn", "unknown augmentation"),
            ("fourier", "invalid choice"),
        ):
            with self.subTest(words):
                given = (stands.get(word, word) for word in words.split())
                code, printed, error = call(*given, "--out", out)
                self.assertEqual((code, printed), (2, ""), error)
                self.assertIn(said, error)
                self.assertEqual(error.count("\n"), 1, error)
                self.assertFalse(out.exists())


class KeptTest(absltest.TestCase):
    @pytest.mark.slow
    def test_weights_of_every_evaluation(self):
        workdir = Path(self.create_tempdir()) / "run"
        config = training.one_phase(checkpoint__keep_epochs=True)
        training.quiet_run(config, workdir)
        self.assertEqual(steps(workdir / "train" / "epochs"), [4, 8, 12])
        found = steps(workdir / "train" / "best")[-1]
        bests = [workdir / "train" / kind / str(found) for kind in ("best", "epochs")]
        with contextlib.ExitStack() as stack:
            arrays = []
            for place in bests:
                kept = Checkpoints(place.parent, read_only=True)
                stack.enter_context(contextlib.closing(kept))
                self.assertEqual(
                    kept.meta(found).keys() - {"collapse"}, {"clean", "robust", "images"}
                )
                arrays.append(kept.meta(found))
        self.assertEqual(*arrays)
        if PLOT:
            out = workdir / "analyses"
            given = ("--n", 8, "--steps", 1, 2, "--seeds", 1)
            code, _, error = call("effectiveness", "--workdir", workdir, *given)
            self.assertEqual(code, 0, error)
            rows = read(out / "effectiveness.csv")
            self.assertEqual(column(rows, "step").tolist(), [4, 4, 8, 8, 12, 12])
