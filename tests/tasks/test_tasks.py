"""AutoAttack on networks that return anything but logits of classes."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import linen, nnx

from jaxrobust import attacks, tasks
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.bundles import claims, of_task
from jaxrobust.evaluation.network import user_attacks
from tests.support import bundles, sweeps
from tests.support.golden import norm_in_float64
from tests.support.processes import start, wait

VOID, CLASSES, N = 255, 4, 12
DRAW = np.random.default_rng(0)
KERNEL = jnp.asarray(DRAW.normal(size=(3, 3, 3, CLASSES)), jnp.float32)
IMAGES = np.float32(DRAW.random((N, 10, 10, 3)))
WEIGHTS = jnp.asarray(DRAW.normal(size=(300, 8)), jnp.float32)
QUICK = {"apgd-task": {"steps": 10, "restarts": 2}, "square-task": {"steps": 60}}
BRIEF = {"apgd-task": {"steps": 2, "restarts": 1}}
EPSILON = {"linf": 0.12, "l2": 1.2, "l1": 14.0}


def segment(images):
    """Return logits f[B, 10, 10, 4]."""
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, KERNEL, (1, 1), "SAME", dimension_numbers=dims)


def encode(images):
    """Return embeddings f[B, 8]."""
    return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS / 20)


def shares(images):
    """Compute in NumPy the shares of right pixels, of those that count."""
    right = np.asarray(segment(jnp.asarray(images))).argmax(-1) == MASKS[: len(images)]
    counts = MASKS[: len(images)] != VOID
    return (right & counts).sum((1, 2)) / counts.sum((1, 2))


MASKS = np.asarray(segment(IMAGES).argmax(-1)).astype(np.uint8)
MASKS[:, :2] = VOID
MASKS[0, 2:] = (MASKS[0, 2:] + 1) % CLASSES
TASK = tasks.segmentation(least=0.6)
run = functools.partial(
    autoattack, norm="linf", epsilon=0.12, task=TASK, overrides=QUICK, verbose=False
)


CHILD = """
import os, sys
from jaxrobust.runtime.processes.launch import join_hosts
if "JAX_NUM_PROCESSES" in os.environ:
    join_hosts()
import jax, numpy as np
from jaxrobust.evaluation.bundles import of_task
from tests.tasks.test_tasks import IMAGES, MASKS, TASK, run, segment
result = run(segment, IMAGES, MASKS, ledger=f"{sys.argv[1]}.jsonl", batch_size=4)
of_task.write(sys.argv[1], result, segment, IMAGES, MASKS, TASK)
again = run(segment, IMAGES, MASKS, ledger=f"{sys.argv[1]}.jsonl", batch_size=4)
assert sum(cost.backward for cost in again.costs) == 0
names = ("clean", "robust", "fooled_by", "images_adv")
np.savez(f"{sys.argv[1]}-{jax.process_index()}.npz", **{k: getattr(result, k) for k in names})
"""


class SegmentationTest(parameterized.TestCase):
    @sweeps.rows(*EPSILON)
    def test_verdicts_hold(self, norm):
        result = run(segment, IMAGES, MASKS, norm=norm, epsilon=EPSILON[norm])
        fooled = result.clean & ~result.robust
        np.testing.assert_array_equal(result.clean, shares(IMAGES) >= 0.6)
        np.testing.assert_array_equal(result.robust, shares(result.images_adv) >= 0.6)
        self.assertFalse(result.clean[0])
        self.assertBetween(fooled.sum(), 1, N - 2)
        norms = norm_in_float64(result.images_adv.astype(np.float64) - IMAGES, norm)
        self.assertLessEqual(norms.max(), EPSILON[norm] * (1 + 1e-5) + 1e-6)
        self.assertEqual(norms[~fooled].max(), 0)
        alone = attacks.apgd_run(
            segment, IMAGES, MASKS, norm=norm, epsilon=EPSILON[norm], steps=10, loss=TASK.goal
        )
        missed = np.asarray(~alone.correct) & result.robust  # another start
        self.assertLessEqual(missed.sum(), norm == "l1")

    def test_subsets_batches_ledgers_and_replays(self):
        folder = self.create_tempdir().full_path
        result = run(segment, IMAGES, MASKS, ledger=f"{folder}/all.jsonl")
        self.assertEqual(result.flags, {})
        ids = [5, 8, 2]
        part = run(segment, IMAGES[ids], MASKS[ids], image_ids=ids, batch_size=3)
        np.testing.assert_array_equal(part.robust, result.robust[ids])
        np.testing.assert_array_equal(part.images_adv, result.images_adv[ids])
        again = run(segment, IMAGES, MASKS, ledger=f"{folder}/all.jsonl")
        np.testing.assert_array_equal(again.images_adv, result.images_adv)
        self.assertEqual(sum(cost.backward for cost in again.costs), 0)
        larger = run(segment, IMAGES, MASKS, epsilon=0.15, replay=[f"{folder}/all.jsonl"])
        self.assertEqual(larger.about["replayed"][0]["fooled"], (~result.robust).sum() - 1)
        np.savez(f"{folder}/points.npz", ids=np.arange(N), images=result.images_adv)
        points = user_attacks.of_file(f"{folder}/points.npz")
        tried = run(segment, IMAGES, MASKS, attacks=(), overrides=None, users=(points,))
        np.testing.assert_array_equal(tried.robust, result.robust)
        self.assertEqual(set(tried.fooled_by) - {"", "clean"}, {points.name})
        # Also if another version wrote the ledger, whose programs may differ.
        other_version = Path(f"{folder}/older.jsonl")
        lines = Path(f"{folder}/all.jsonl").read_text().replace('"commit": "', '"commit": "0')
        other_version.write_text(lines)
        shutil.copy(f"{folder}/all.images", f"{folder}/older.images")
        run(segment, IMAGES, MASKS, ledger=other_version)
        with self.assertRaisesRegex(ValueError, "older.jsonl.*task"):
            run(segment, IMAGES, MASKS, task=tasks.segmentation(least=0.5), ledger=other_version)
        other_masks = np.where(MASKS == 1, 2, MASKS)
        for masks, task in ((other_masks, TASK), (MASKS, tasks.segmentation(least=0.7))):
            with self.assertRaisesRegex(ValueError, "all.jsonl.*another.*(task|targets)"):
                run(segment, IMAGES, masks, task=task, ledger=f"{folder}/all.jsonl")

    @pytest.mark.slow
    def test_pixels(self):
        """L0: Sparse-PGD and Sparse-RS change as many pixels as they may, on any ledger."""
        lengths = {"sparse-pgd-task": 60, "sparse-pgd-p-task": 60, "sparse-rs-task": 300}
        changes = {name: {"steps": steps} for name, steps in lengths.items()}
        folder = self.create_tempdir().full_path
        few, more = (
            run(
                *(segment, IMAGES, MASKS),
                norm="l0",
                epsilon=pixels,
                overrides=changes,
                ledger=f"{folder}/{pixels}.jsonl",
                replay=[f"{folder}/10.jsonl"] * (pixels > 10),
            )
            for pixels in (10, 14)
        )
        for result, pixels in ((few, 10), (more, 14)):
            np.testing.assert_array_equal(result.robust, shares(result.images_adv) >= 0.6)
            changed = (result.images_adv != IMAGES).any(-1).sum((1, 2))
            self.assertBetween(changed.max(), 1, pixels)
            self.assertEqual(changed[result.robust].max(), 0)
        self.assertGreater(more.about["replayed"][0]["fooled"], 0)
        self.assertLess(more.robust.sum(), few.robust.sum())
        place, fooled = Path(folder) / "bundle", int(np.flatnonzero(few.clean & ~few.robust)[0])
        of_task.write(place, few, segment, IMAGES, MASKS, TASK)
        found = of_task.check(place, segment, IMAGES, MASKS, TASK)
        self.assertTrue(found.whole, found)
        self.assertEqual(found.standing, few.robust.sum())
        bundles.repainted(place, fooled, IMAGES, 11)
        found = of_task.check(place, segment, IMAGES, MASKS, TASK)
        self.assertEqual(found.unconfirmed["outside the ball"], [fooled])

    def test_a_bundle(self):
        folder = Path(self.create_tempdir())
        result, place = run(segment, IMAGES, MASKS), folder / "bundle"
        of_task.write(place, result, segment, IMAGES, MASKS, TASK, model="mine")
        written = {path: path.read_bytes() for path in place.iterdir()}
        self.assertEqual(
            {path.name for path in written},
            {"bundle.json", "images.jsonl", "differences-0.bin", "SHA256SUMS"},
        )
        found = of_task.check(place, segment, IMAGES, MASKS, TASK)
        fooled = int((result.clean & ~result.robust).sum())
        self.assertTrue(found.whole)
        self.assertEqual(found.confirmed["fooled"], fooled)
        self.assertEqual(found.standing, result.robust.sum())
        of_task.write(place, result, segment, IMAGES, MASKS, TASK)  # it is there
        self.assertEqual({path: path.read_bytes() for path in place.iterdir()}, written)
        # Points that the network withstands, images that are not the bundle's, other targets.
        lenient = TASK._replace(goal=TASK.goal._replace(done=lambda score: score < -1))
        found = of_task.check(place, segment, IMAGES, MASKS, lenient)
        self.assertLen(found.unconfirmed["right"], fooled + 1)
        found = of_task.check(place, segment, IMAGES / 2, MASKS, TASK)
        self.assertLen(found.unconfirmed["other image"], N)
        found = of_task.check(place, segment, IMAGES, (MASKS // 254 * 255), TASK)
        self.assertLen(found.unconfirmed["wrong"], N - 1)
        few = run(segment, IMAGES[:3], MASKS[:3], image_ids=[4, 5, 6])
        less = tasks.segmentation(least=0.5)
        for words, call in (
            (
                "is for task segmentation",
                lambda: of_task.check(place, segment, IMAGES, MASKS, less),
            ),
            (
                "is for task segmentation",
                lambda: of_task.write(folder / "b", result, segment, IMAGES, MASKS, less),
            ),
            (
                "images 4..6, but there are 3; bundles need all",
                lambda: of_task.write(folder / "b", few, segment, IMAGES[:3], MASKS[:3], TASK),
            ),
            (
                "bundle is a bundle for a task; use evaluation.bundles.of_task",
                lambda: claims.read(place),
            ),
            (
                "holds the bundle of evaluation",
                lambda: of_task.write(
                    place, run(segment, IMAGES, MASKS, seed=1), segment, IMAGES, MASKS, TASK
                ),
            ),
        ):
            with self.assertRaisesRegex(ValueError, words):
                call()

    @pytest.mark.slow
    def test_two_processes_find_what_one_finds(self):
        folder = self.create_tempdir().full_path
        for processes in (1, 2):
            out = f"{folder}/{processes}"
            codes, said = wait(start(processes, 2 // processes, ["-c", CHILD, out]))
            self.assertEqual(codes, [0] * processes, said)
        found = [np.load(f"{folder}/{name}.npz") for name in ("1-0", "2-0", "2-1")]
        for several in found[1:]:
            for name in found[0].files:
                np.testing.assert_array_equal(several[name], found[0][name], name)
        self.assertBetween(found[0]["robust"].sum(), 1, N - 2)
        self.assertEqual(*(Path(f"{folder}/{k}/images.jsonl").read_text() for k in (1, 2)))

    def test_a_record(self):
        result = run(segment, IMAGES[:3], MASKS[:3])
        self.assertIn(
            "task segmentation(least=0.6, ignore=255): an image counts as right",
            result.table(),
        )
        record = result.record(model="mine")
        self.assertEqual(record["task"], "segmentation(least=0.6, ignore=255)")
        self.assertEqual(record["version"], "task")
        self.assertEqual([attack["name"] for attack in record["attacks"]], [*QUICK])

    def test_no_images(self):
        self.assertEqual(run(segment, IMAGES[:0], MASKS[:0]).robust.shape, (0,))


class EmbeddingTest(parameterized.TestCase):
    @sweeps.rows(("cosine", 0.02), ("l2", 0.25))
    def test_verdicts_hold(self, distance, farthest):
        clean = np.asarray(encode(IMAGES)).astype(np.float64) + 1e-9  # no float32
        task = tasks.embedding(farthest=farthest, distance=distance)
        result = run(encode, IMAGES, clean, task=task, epsilon=0.02)
        moved = np.asarray(encode(result.images_adv), np.float64)
        lengths = [np.linalg.norm(a, axis=1) for a in (moved, clean)]
        away = {
            "cosine": 1 - (moved * clean).sum(1) / lengths[0] / lengths[1],
            "l2": np.linalg.norm(moved - clean, axis=1),
        }
        self.assertTrue(result.clean.all())
        self.assertBetween(result.robust.sum(), 1, N - 1)
        np.testing.assert_array_equal(result.robust, away[distance] <= farthest)

    def test_zero_shot_is_classification(self):
        texts = DRAW.normal(size=(5, 8))
        labels = np.asarray(tasks.zero_shot(encode, texts)(IMAGES).argmax(1))
        quick = {"apgd-ce": {"steps": 5}, "square": {"steps": 20}}
        settings = dict(attacks=(*quick,), overrides=quick, epsilon=0.06)
        first, second = (
            run(tasks.zero_shot(encode, texts), IMAGES, labels, task=task, **settings)
            for task in (None, tasks.classification())
        )
        self.assertTrue(first.clean.all())
        self.assertFalse(first.robust.all())
        np.testing.assert_array_equal(first.images_adv, second.images_adv)

    def test_modules_of_libraries(self):
        features = nnx.Sequential(
            lambda x: x.reshape(len(x), -1), nnx.Linear(300, 4, rngs=nnx.Rngs(0))
        )
        module = linen.Sequential([lambda x: x.reshape(len(x), -1), linen.Dense(4)])
        variables = module.init(jax.random.key(0), IMAGES)
        for network, call in ((features, features), ((module, variables), module.bind(variables))):
            clean = np.asarray(call(IMAGES))
            task = tasks.embedding(farthest=1e6, distance="l2")
            result = run(network, IMAGES, {"e": clean}["e"], task=task)
            self.assertTrue(result.robust.all())


class PrecisionTest(parameterized.TestCase):
    @sweeps.rows(jnp.float16, jnp.bfloat16)
    def test_scores_are_float32(self, dtype):
        """One wrong pixel of 4,096 counts, and long vectors have a direction."""
        images = np.float32(DRAW.random((2, 64, 64, 4)))
        masks = images.argmax(-1)
        masks[0, 0, 0] = (masks[0, 0, 0] + 1) % 4
        network = lambda x: jax.nn.one_hot(x.argmax(-1), 4, dtype=dtype) + 0 * x.astype(dtype)  # noqa: E731
        short = {"square-task": {"steps": 1}}
        settings = dict(epsilon=1e-6, attacks=("square-task",), overrides=short)
        result = run(network, images, masks, task=tasks.segmentation(least=1.0), **settings)
        self.assertEqual(result.clean.tolist(), [False, True])
        long = lambda x: (1000 * encode(x)).astype(dtype)  # noqa: E731
        clean = np.asarray(long(IMAGES).astype(jnp.float32))
        task = tasks.embedding(farthest=0.2)
        self.assertTrue(run(long, IMAGES, clean, task=task, **settings).clean.all())

    def test_a_network_of_one_batch_size(self):
        network = lambda x: segment(x.reshape(8, 10, 10, 3))  # noqa: E731
        result = run(network, IMAGES, MASKS, batch_size=64)
        np.testing.assert_array_equal(result.robust, run(segment, IMAGES, MASKS).robust)


class DictTest(absltest.TestCase):
    def test_outputs_and_targets_are_trees(self):
        """A regression with two heads, whose targets are a dict."""

        def network(images):
            return {"depth": images.mean((1, 2, 3)), "size": images.sum((1, 2, 3))}

        def loss(outputs, targets):
            return (outputs["depth"] - targets["depth"]) ** 2 + 0 * targets["size"]

        def score(outputs, targets):
            return -jnp.abs(outputs["depth"] - targets["depth"])

        task = tasks.Task("depth", attacks.Goal(loss, score, lambda score: score < -0.05))
        targets = {key: np.asarray(value) for key, value in network(IMAGES).items()}
        weak, strong = (run(network, IMAGES, targets, task=task, epsilon=e) for e in (0.04, 0.06))
        self.assertEqual((weak.robust.all(), strong.robust.any()), (True, False))


TEXTS = tasks.zero_shot(encode, np.ones((3, 7)))
EMPTY = np.where(np.arange(N)[:, None, None] == 3, VOID, MASKS)
ANY_DONE = TASK.goal._replace(done=lambda score: (score < 0.5).all())
FLOAT_DONE = TASK.goal._replace(done=lambda score: 0.5 - score)


class BadInputTest(parameterized.TestCase):
    @sweeps.rows(
        ("is not a task with a score; pass one", dict(task=tasks.segmentation)),
        (
            "is not a task with a score",
            dict(task=tasks.Task("mine", attacks.Goal(lambda o, t: o.mean((1, 2, 3))))),
        ),
        ("targets have shape (11, 10, 10) for 12", dict(labels=MASKS[:-1])),
        ("masks are float32[", dict(labels=MASKS.astype(np.float32))),
        ("masks are uint8[8, 10]", dict(labels=MASKS[:, 0])),
        ("masks are NoneType for logits", dict(labels=None)),
        ("for logits [8, 10, 10, 4]; pass the class of each pixel", dict(labels=None)),
        ("needs logits; omit either version or task", dict(version="rand")),
        (
            "version='task' needs a task; pass task=",
            dict(task=None, version="task", labels=np.zeros(N, int)),
        ),
        ("needs logits; omit either version or task", dict(version="fast")),
        (
            "epsilon=2.5 must be a whole number of pixels",
            dict(norm="l0", epsilon=2.5, overrides=None),
        ),
        (
            "choose from sparse-pgd-task",
            dict(norm="l0", epsilon=3, overrides=None, attacks=("apgd-task",)),
        ),
        ("is not in version 'task'; choose from apgd-task", dict(attacks=("apgd-ce",))),
        ("attack 'fab' is not in version 'task'; choose from apgd-task", dict(attacks=("fab",))),
        ("attack 'apgd-t' is not in version 'task'; choose", dict(attacks=("apgd-t", "fab-t"))),
        ("overrides names ['apgd-t']", dict(overrides={"apgd-t": {"steps": 2}})),
        (
            "for 8 images",
            dict(task=tasks.Task("m", attacks.Goal(lambda o, t: o.mean(), TASK.goal.score))),
        ),
        (
            "the score has shape (8, 10, 10) for 8 images",
            dict(task=tasks.Task("m", TASK.goal._replace(score=lambda o, t: o.max(-1)))),
        ),
        ("embeddings of shape", dict(task=tasks.embedding(farthest=1.0))),
        ("have targets of shape None", dict(task=tasks.embedding(farthest=1.0), labels=None)),
        ("or Task(name, Goal(loss, score))", dict(task=tasks.Task("m", TASK.goal.loss))),
        ("or Task(name, Goal(loss, score))", dict(task=tasks.Task(None, TASK.goal))),
        ("or Task(name, Goal(loss, score))", dict(task=TASK.goal)),
        ("do not fit JAX's 32 bits", dict(labels=MASKS.astype(np.int64) + 2**40)),
        ("targets are object", dict(labels=np.array([None] * N))),
        ("masks contain class -1", dict(labels=np.where(MASKS == VOID, -1, MASKS.astype(int)))),
        ("masks contain class 9", dict(labels=np.where(MASKS == 1, 9, MASKS))),
        ("1 of 12 masks have no pixels that count, such as mask 3", dict(labels=EMPTY)),
        (
            "the scores of all 12 images are NaN or infinite",
            dict(
                task=TASK._replace(
                    goal=TASK.goal._replace(score=lambda o, t: jnp.nan * o[:, 0, 0, 0])
                )
            ),
        ),
        ("Goal.done has shape ()", dict(task=tasks.Task("m", ANY_DONE))),
        ("Goal.done is of type float32", dict(task=tasks.Task("m", FLOAT_DONE))),
    )
    def test_a_sentence(self, words, changes):
        arguments = {"labels": MASKS} | changes
        with self.assertRaises(ValueError) as caught:
            run(segment, IMAGES, arguments.pop("labels"), **arguments)
        self.assertIn(words, str(caught.exception))

    def test_networks(self):
        one = lambda image: segment(image[None])[0]  # noqa: E731
        for words, network, task in (
            ("takes a single image, not a batch; wrap it in jax.vmap", one, TASK),
            (r"embeddings of images have shape .*8\), and texts \(3, 7\)", TEXTS, None),
        ):
            with self.assertRaisesRegex(ValueError, words):
                labels = MASKS if task else np.zeros(N, int)
                run(network, IMAGES, labels, task=task, overrides=None)

    @sweeps.rows(
        ("least=0.0 must be a share", tasks.segmentation, dict(least=0.0)),
        (
            "least=90.0 must be a share of the pixels, above 0 and at most 1",
            tasks.segmentation,
            dict(least=90),
        ),
        ("farthest=-1.0 must be a distance", tasks.embedding, dict(farthest=-1)),
        ("farthest=nan must be a distance", tasks.embedding, dict(farthest=np.nan)),
        ("and below 2 (the cosine", tasks.embedding, dict(farthest=3)),
        ("and finite", tasks.embedding, dict(farthest=np.inf, distance="l2")),
        ("distance=[] is unknown", tasks.embedding, dict(farthest=1, distance=[])),
        ("ignore=None must be an int", tasks.segmentation, dict(ignore=None)),
        (
            "loss is a task; pass its goal instead: loss=task.goal",
            attacks.apgd,
            dict(epsilon=0.1, steps=2, loss=TASK),
        ),
        ("choose one of cosine, l2", tasks.embedding, dict(farthest=1, distance="l1")),
        ("texts have shape (8,)", tasks.zero_shot, dict(encoder=encode, texts=np.zeros(8))),
    )
    def test_settings(self, words, make, settings):
        with self.assertRaises(ValueError) as caught:
            make(**settings)
        self.assertIn(words, str(caught.exception))

    @sweeps.rows(
        ("wrong-sign", TASK.goal._replace(loss=lambda o, t: -TASK.goal.loss(o, t))),
        ("nan-loss", TASK.goal._replace(loss=lambda o, t: jnp.nan * TASK.goal.loss(o, t))),
        ("zero-gradients", TASK.goal._replace(loss=lambda o, t: 0 * TASK.goal.loss(o, t))),
        (
            "batch-dependent",
            TASK.goal._replace(score=lambda o, t: o[..., 0].mean((1, 2)) - o.mean()),
        ),
    )
    def test_flags(self, name, goal):
        flags = run(segment, IMAGES, MASKS, task=tasks.Task("mine", goal)).flags
        self.assertIn(name, flags)

    def test_a_score_of_bools(self):
        right = lambda o, t: TASK.goal.score(o, t) >= 0.6  # noqa: E731
        task = tasks.Task("all or none", attacks.Goal(TASK.goal.loss, right))
        found = run(segment, IMAGES, MASKS, task=task, overrides=QUICK | BRIEF)
        np.testing.assert_array_equal(found.robust, shares(found.images_adv) >= 0.6)
        self.assertFalse(found.robust.all())

    def test_the_sign_of_a_distance(self):
        """Whose gradient at the clean image is 0."""
        goal, clean = tasks.embedding(farthest=0.1, distance="l2").goal, np.asarray(encode(IMAGES))
        for sign in (1, -1):
            loss = lambda o, t, sign=sign: sign * goal.loss(o, t)  # noqa: E731
            task = tasks.Task("mine", goal._replace(loss=loss))
            flags = run(encode, IMAGES, clean, task=task, overrides=QUICK | BRIEF).flags
            self.assertEqual("wrong-sign" in flags, sign < 0, flags)


if __name__ == "__main__":
    absltest.main()
