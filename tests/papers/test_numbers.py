"""The numbers of the analyses, against naive formulas; what attacks and networks do is made up."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.papers.networks import (
    analyses,
    attack,
    augmentations,
    convergence,
    network_sample,
    perturbations,
    semantic_score,
)
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.types import Threat

RNG = np.random.default_rng(7)
CLASSES = 6


def sample(count=5, norm="linf", epsilon=0.2) -> NetworkSample:
    network = SimpleNamespace(num_classes=CLASSES, image_size=2, name="net")
    subject = SimpleNamespace(ball=Threat(norm, epsilon), network=network)
    images = RNG.random((count, 2, 2, 3)).astype(np.float32)
    labels, ids = np.arange(count) % 4, np.arange(count) + 10
    return NetworkSample("net (x)", subject, None, images, labels, ids, tuple("abcd"))


def settings(name: str, steps=(3,), **others) -> AnalysisSettings:
    return AnalysisSettings(name, {"workdir": None, "image_size": None}, 4, steps, **others)


def logits(count: int) -> np.ndarray:
    return RNG.normal(size=(count, CLASSES)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values.astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


class AttackTest(parameterized.TestCase):
    def test_batches(self):
        for count, size, lengths in ((5, 2, [2, 2, 1]), (4, 2, [2, 2]), (1, 9, [1]), (0, 2, [])):
            with self.subTest(row=(count, size, lengths)):
                parts = [np.arange(count)[part] for part in attack.batches(count, size)]
                self.assertEqual([len(part) for part in parts], lengths)
                self.assertEqual([int(i) for part in parts for i in part], [*range(count)])

    def test_pgd_in_batches_with_a_key_for_each_image(self):
        seen, calls = sample(5, "l2", 0.8), []

        def ended(logits_fn, drawn, images, labels, **how):
            calls.append((jax.random.key_data(drawn), how))
            return images + 1, labels[:, None] * np.ones((1, CLASSES))

        with mock.patch.object(attack, "_ended", ended):
            points, values = attack.pgd(seen, steps=4, seed=3, batch=2)
        np.testing.assert_array_equal(points, seen.images + 1)
        np.testing.assert_array_equal(values[:, 0], seen.labels)
        how = {"threat": Threat("l2", 0.8), "steps": 4, "step_size": 1.5 * 0.8 / 4}
        self.assertEqual([own for _, own in calls], [how] * 3)
        drawn = np.concatenate([keys for keys, _ in calls])
        for i, number in enumerate(seen.ids):
            own = jax.random.fold_in(jax.random.key(3), int(number))
            np.testing.assert_array_equal(drawn[i], jax.random.key_data(own))

    def test_logits_in_batches(self):
        seen = sample(5)._replace(logits_fn=jax.tree_util.Partial(lambda x: 2 * x.sum((2, 3))))
        found = attack.logits(seen, seen.images, 2)
        np.testing.assert_allclose(found, 2 * seen.images.sum((2, 3)), rtol=1e-6)

    def test_cross_entropy(self):
        values, labels = logits(5), np.arange(5)
        expected = -np.log(softmax(values)[np.arange(5), labels])
        np.testing.assert_allclose(attack.cross_entropy(values, labels), expected, rtol=1e-5)


class ConvergenceTest(absltest.TestCase):
    def test_rows_of_images_that_are_right(self):
        seen, calls = sample(3), []
        before = np.eye(CLASSES, dtype=np.float32)[[0, 3, 2]]  # the second of three is wrong

        def trajectory(logits_fn, drawn, images, labels, *, steps, threat):
            self.assertEqual((steps, threat), (4, Threat("linf", 0.2)))
            calls.append((jax.random.key_data(drawn), images))
            start = 10 * len(calls) + labels  # 10 and 12 from the first start, 20 and 22 from ...
            return np.arange(5)[:, None] + start[None]

        with (
            mock.patch.object(attack, "logits", return_value=before),
            mock.patch.object(convergence, "trajectory", trajectory),
        ):
            rows, losses = convergence.analyse(seen, settings("convergence", (0, 4), seeds=2))
        np.testing.assert_array_equal(calls[0][1], seen.images[[0, 2]])
        for seed, (keys, _) in enumerate(calls):
            for i, number in enumerate((10, 12)):
                own = jax.random.fold_in(jax.random.key(seed), number)
                np.testing.assert_array_equal(keys[i], jax.random.key_data(own))
        self.assertEqual(losses.shape, (2, 5, 2))
        names = ("image", "label", "steps", "ce_least", "ce_mean", "ce_largest", "seeds")
        found = [tuple(row[name] for name in names) for row in rows]
        expected = [(10, 0, 0, 10, 15, 20, 2), (10, 0, 4, 14, 19, 24, 2)]
        expected += [(12, 2, 0, 12, 17, 22, 2), (12, 2, 4, 16, 21, 26, 2)]
        self.assertEqual(found, expected)
        with (
            mock.patch.object(attack, "logits", return_value=before[[1, 0, 0]]),
            self.assertRaisesRegex(ValueError, r"classifies none of the 3 images correctly; give"),
        ):
            convergence.analyse(seen, settings("convergence"))


class PerturbationsTest(parameterized.TestCase):
    def test_the_authors_sign_and_what_is_beyond(self):
        delta, limit = np.float32([[[[0.1, -0.2, 0.4]]]]), np.float32([0.2])
        for sign, values in (("attack", [0.75, 0.0, 1.0]), ("code", [0.25, 1.0, 0.0])):
            shown = perturbations.shown(delta, limit, sign)
            np.testing.assert_allclose(shown.ravel(), values, atol=1e-6)
        none = perturbations.limits(sample(1, "l2"), np.zeros((1, 2, 2, 3), np.float32))
        self.assertGreater(none[0], 0)  # an image that stays where it is


class SemanticScoreTest(parameterized.TestCase):
    def test_five_guesses_of_many_classes(self):
        for classes, top, expected in ((20, None, 1), (21, None, 5), (21, 2, 2)):
            with self.subTest(row=(classes, top, expected)):
                seen = sample(3)
                seen.subject.network.num_classes = classes
                with (
                    mock.patch.object(attack, "pgd", return_value=(seen.images, None)),
                    mock.patch.object(
                        attack, "logits", return_value=np.eye(3, classes, dtype=np.float32)
                    ),
                ):
                    (row,), _ = semantic_score.analyse(seen, settings("semantic-score", top=top))
                self.assertEqual(row["top"], expected)
                self.assertEqual(row["images_top1"], 1.0)
                with self.assertRaisesRegex(
                    ValueError, f"--top={classes} must be below the {classes} cl"
                ):
                    semantic_score.analyse(seen, settings("semantic-score", top=classes))


class AugmentationsTest(absltest.TestCase):
    def pictures(self) -> tuple[Path, np.ndarray]:
        folder = Path(self.create_tempdir().full_path)
        pixels = RNG.integers(0, 256, (3, 12, 12, 3), np.uint8)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{number}.png")
        return folder, pixels.astype(np.float64) / 255

    def analysed(self, folder, chain):
        how = settings("augmentations", (), images=(folder,), chain=chain, views=2)
        how.named["image_size"] = 12
        return augmentations.analyse(None, how)

    def test_rows(self):
        folder, pixels = self.pictures()
        rows, (files, base, ((where, sheet),)) = self.analysed(folder, "flip(1)")
        self.assertEqual([path.name for path in files], ["0.png", "1.png", "2.png"])
        np.testing.assert_allclose(base, pixels, atol=1e-6)
        self.assertEqual((where, sheet.shape), ("host", (3, 2, 12, 12, 3)))
        for at, row in enumerate(rows):
            i, view = divmod(at, 2)
            self.assertEqual((row["file"], row["view"]), (str(files[i]), view))
            self.assertEqual(row["where"], "host")
            self.assertAlmostEqual(row["mean"], pixels[i].mean(), places=5)
            self.assertAlmostEqual(row["std"], pixels[i].std(), places=5)
            away = np.abs(pixels[i] - pixels[i][:, ::-1]).mean()
            self.assertAlmostEqual(row["from_plain"], away, places=5)


class OtherTest(parameterized.TestCase):
    """Networks next to the one that is looked at."""

    def setUp(self):
        super().setUp()
        self.like = sample()
        about = {"dataset": "digits", "split": "test", "data_dir": None, "classes": None}
        self.like.subject.__dict__.update(about)
        self.classes = CLASSES
        flags = network_sample.flags
        weights = ("ema", SimpleNamespace(network=SimpleNamespace(name="their")), "weights")
        origin = lambda given: SimpleNamespace(  # noqa: E731
            network=SimpleNamespace(num_classes=self.classes)
        )
        self.settled = self.enter_context(
            mock.patch.object(network_sample.subjects, "settled", return_value=("s", "source"))
        )
        for name, own in (
            ("check", lambda given: None),
            ("placed", self.placed),
            ("origin", origin),
            ("weights", lambda given, subject, source: weights),
        ):
            self.enter_context(mock.patch.object(flags, name, own))
        self.enter_context(
            mock.patch.object(network_sample, "logits_of", lambda subject, weights: ["function"])
        )

    def placed(self, given):
        self.given = given
        if given.weights == "run":
            return given._replace(weights=None, workdir="run")
        return given

    def test_other_classes(self):
        self.classes = None  # not known
        network_sample.other("published", self.like)
        self.classes = 7
        with self.assertRaisesRegex(ValueError, r"has 7 classes, and net \(x\) 6; name a net"):
            network_sample.other("published", self.like)


class CheckedTest(parameterized.TestCase):
    """The settings of an analysis: its defaults, and what it does not take."""

    def checked(self, name, named=None, **given) -> AnalysisSettings:
        return analyses.checked({"analysis": name} | given, named or {"workdir": "w"})

    def test_settings(self):
        for name, given, expected in (
            ("perturbations", {}, {"n": 16, "steps": (100,), "sign": "attack", "seeds": 3}),
            ("semantic-score", {"judges": ("a",)}, {"n": 256, "steps": (100,), "sign": "code"}),
            ("semantic-score", {"judges": ("a",), "sign": "attack"}, {"sign": "attack"}),
            ("effectiveness", {}, {"n": 256, "steps": (1, 2, 5, 10, 200), "seeds": 3}),
            ("convergence", {}, {"n": 32, "seeds": 20}),
            ("convergence", {"seeds": 2, "n": None, "steps": ()}, {"n": 32, "seeds": 2}),
            ("effectiveness", {"steps": (1,)}, {"steps": (1,)}),
            ("effectiveness", {"steps": (5, 1, 5)}, {"steps": (1, 5)}),  # each once, in order
            ("convergence", {"steps": (1, 0)}, {"steps": (0, 1)}),
            ("perturbations", {"steps": (1,)}, {"steps": (1,)}),
            (
                "synthesis",
                {"step_size": 1e-9, "targets": (1,)},
                {"step_size": 1e-9, "targets": (1,)},
            ),
        ):
            with self.subTest(row=(name, given, expected)):
                found = self.checked(name, **given)
                self.assertEqual((found.analysis, found.named), (name, {"workdir": "w"}))
                self.assertEqual({key: getattr(found, key) for key in expected}, expected)

    def test_mistakes(self):
        for name, given, words in (
            ("effectiveness", {"steps": (0, 5)}, "--steps for effectiveness must be at least 1"),
            ("convergence", {"steps": (-1, 5)}, "--steps for convergence must be at least 0"),
            ("convergence", {"steps": (0,)}, "--steps must name an attack with at least 1 step"),
            ("perturbations", {"steps": (1, 2)}, "perturbations accepts only one value of --steps"),
            ("synthesis", {"step_size": 0.0}, "--step_size=0.0 must be above 0"),
            ("semantic-score", {}, "semantic-score needs --judges"),
            ("perturbations", {"seeds": 2}, "--seeds has no effect on perturbations; leave it out"),
            ("augmentations", {"steps": (3,)}, "--steps has no effect on augmentations"),
            ("augmentations", {}, "--workdir has no effect on augmentations"),
        ):
            with self.subTest(row=(name, given, words)), self.assertRaisesRegex(ValueError, words):
                self.checked(name, **given)

    def test_pictures_need_no_network(self):
        found = self.checked("augmentations", {"workdir": None, "image_size": 32}, views=2)
        self.assertEqual((found.n, found.steps, found.views, found.chain), (6, (), 2, "heavy"))
