"""Adversarial images of other evaluations, tried before any attack."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.evaluation.engine import replay
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.records import verdicts
from tests.support.ensemble import IMAGES, LABELS, NETS, evaluate, quick
from tests.support.golden import norm_in_float64

FIRST = ("apgd-ce",)
RADII = {"linf": (2 / 255, 6 / 255, 8 / 255), "l2": (0.25, 0.75, 1.0), "l1": (6.0, 11.0, 12.0)}


@pytest.mark.computes
class ReplayTest(parameterized.TestCase):
    def kept(self, name="ledger.jsonl", **asked):
        """A result, and the ledger that it leaves."""
        path = Path(self.create_tempdir()) / name
        return quick(**{"attacks": FIRST, "ledger": path} | asked), path

    @parameterized.parameters(*RADII)
    @pytest.mark.slow
    def test_every_radius_tells_the_others(self, norm):
        small, middle, large = RADII[norm]
        asked = {"net": "conv", "n": 64}
        found = {radius: self.kept(norm=norm, epsilon=radius, **asked) for radius in (small, large)}
        plain = quick(attacks=FIRST, norm=norm, epsilon=middle, **asked)
        ledgers = [ledger for _, ledger in found.values()]
        result = quick(attacks=FIRST, norm=norm, epsilon=middle, **asked, replay=ledgers)
        self.assertFalse((result.robust & ~plain.robust).any())
        self.assertFalse((result.robust & ~found[small][0].robust).any())  # what fell, falls again
        by_replay = result.fooled_by == verdicts.REPLAY
        fell = found[small][0].clean & ~found[small][0].robust
        self.assertTrue(by_replay[fell].all())
        self.assertGreater(by_replay.sum(), fell.sum())  # some of the larger radius, projected
        delta = result.images_adv.astype(np.float64) - IMAGES[: len(by_replay)]
        norms = norm_in_float64(delta, norm)
        np.testing.assert_allclose(norms[by_replay], result.verdicts.norms[by_replay], rtol=1e-6)
        self.assertLessEqual(norms.max(), middle * (1 + 1e-5) + 1e-6)
        predicted = np.asarray(NETS["conv"](result.images_adv)).argmax(1)
        np.testing.assert_array_equal(predicted == LABELS[: len(predicted)], result.robust)
        fooled = result.clean & ~result.robust
        np.testing.assert_array_equal(result.verdicts.reached, np.where(fooled, predicted, -1))
        first, second = result.about["replayed"]
        self.assertEqual((first["epsilon"], second["epsilon"]), (small, large))
        self.assertEqual(first["fooled"], fell.sum())
        self.assertEqual(first["tried"], fell.sum())
        self.assertEqual(first["fooled"] + second["fooled"], by_replay.sum())
        cost, attack = result.costs
        self.assertEqual((cost.attack, cost.forward), ("replay", first["tried"] + second["tried"]))
        self.assertEqual(cost.backward, 0)
        self.assertLess(attack.forward, plain.costs[0].forward)
        self.assertEqual(result.accuracy_after["replay"], 1 - (~result.clean | by_replay).mean())
        self.assertEqual(result.record()["replayed"], result.about["replayed"])

    @pytest.mark.slow
    def test_another_norm_and_another_network(self):
        other, ledger = self.kept(net="conv", epsilon=8 / 255)
        self.assertGreater((other.clean & ~other.robust).sum(), 5)
        plain = quick(attacks=FIRST)
        result = quick(attacks=FIRST, replay=[ledger])
        self.assertFalse((result.robust & ~plain.robust).any())
        self.assertGreater((result.fooled_by == "replay").sum(), 0)
        l2 = quick(attacks=FIRST, norm="l2", epsilon=0.5, replay=[ledger])
        self.assertGreater((l2.fooled_by == "replay").sum(), 0)

    @pytest.mark.slow
    def test_a_point_of_another_network_goes_to_the_rim(self):
        _, ledger = self.kept(net="conv", epsilon=2 / 255, n=64)
        asked = {"norm": "linf", "epsilon": 8 / 255, "attacks": FIRST, "batch_size": 8}
        other = lambda x: 2 * NETS["conv"](x)  # noqa: E731
        result = evaluate(other, IMAGES[:64], LABELS[:64], replay=[ledger], **asked)
        norms = result.verdicts.norms[result.fooled_by == "replay"]
        self.assertNotEmpty(norms)
        np.testing.assert_allclose(norms, 8 / 255, rtol=1e-4)

    def test_part_of_the_images(self):
        _, ledger = self.kept(n=20)
        result = quick(attacks=FIRST, n=40, replay=[ledger])
        self.assertGreater((result.fooled_by[:20] == "replay").sum(), 0)
        self.assertNotIn("replay", result.fooled_by[20:])

    def test_goes_on_where_it_was_killed(self):
        _, ledger = self.kept(epsilon=1 / 255)
        own = Path(self.create_tempdir()) / "own.jsonl"
        whole = quick(attacks=FIRST, replay=[ledger])
        with (
            mock.patch.object(Attack, "run", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            quick(attacks=FIRST, replay=[ledger], ledger=own)
        rows = [json.loads(line) for line in own.read_text().splitlines()[1:]]
        self.assertEqual({row["from"] for row in rows}, {"ledger"})
        resumed = quick(attacks=FIRST, replay=[ledger], ledger=own)
        np.testing.assert_array_equal(resumed.fooled_by, whole.fooled_by)
        np.testing.assert_array_equal(resumed.images_adv, whole.images_adv)
        self.assertEqual(resumed.about["replayed"][0]["tried"], 0)
        # Without a replay, what it found does not count.
        plain = quick(attacks=FIRST, ledger=own)
        np.testing.assert_array_equal(plain.fooled_by, quick(attacks=FIRST).fooled_by)

    def test_what_is_robust_beyond_meets_the_first_attack_only(self):
        both = ("apgd-ce", "apgd-t")
        asked = {"net": "conv", "n": 64, "epsilon": 4 / 255, "attacks": both}
        plain = quick(**asked)
        beyond = plain.robust.copy()
        beyond[np.flatnonzero(plain.fooled_by == "apgd-t")] = True
        beyond[np.flatnonzero(plain.fooled_by == "apgd-ce")] = True
        self.assertIn("apgd-t", plain.fooled_by)
        result = quick(robust_beyond=beyond, **asked)
        np.testing.assert_array_equal(result.fooled_by == "apgd-ce", plain.fooled_by == "apgd-ce")
        self.assertNotIn("apgd-t", result.fooled_by)
        self.assertEqual(result.costs[1].forward, 0)
        self.assertEqual(result.accuracy_after["apgd-t"], result.accuracy_after["apgd-ce"])

    def test_a_damaged_point_does_not_count(self):
        result, ledger = self.kept()
        file = ledger.with_suffix(".images")
        points = np.fromfile(file, np.float32)
        clean = IMAGES[np.flatnonzero(result.clean & ~result.robust)]
        self.assertEqual(points.size, clean.size)
        rows = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
        stored = {row["image"]: row["stored"] for row in rows if row["fooled"]}
        points = points.reshape(clean.shape)
        for image, place in stored.items():
            points[place] = IMAGES[image]  # nothing was added: it fools no more
        points.tofile(file)
        again = quick(attacks=FIRST, replay=[ledger])
        self.assertNotIn("replay", again.fooled_by)
        np.testing.assert_array_equal(again.robust, result.robust)


@pytest.mark.computes
class RefusalTest(parameterized.TestCase):
    def ledger(self) -> Path:
        path = Path(self.create_tempdir()) / "ledger.jsonl"
        quick(attacks=FIRST, ledger=path, n=8)
        return path

    def test_other_images(self):
        asked = {"norm": "linf", "epsilon": 2 / 255, "attacks": FIRST, "batch_size": 8}
        ledger, given = self.ledger(), (NETS["lin"], IMAGES[8:16], LABELS[8:16])
        with self.assertRaisesRegex(ValueError, "is for different images: 8 of 8 images"):
            evaluate(*given, replay=[ledger], **asked)
        head, *rows = ledger.read_text().splitlines()
        head = json.dumps({"identity": json.loads(head)["identity"]})  # as of an older version
        ledger.write_text("\n".join([head, *rows]) + "\n")
        with self.assertRaisesRegex(
            ValueError,
            r"is for different images, .* for image \d+ is [\d.]+ from it in linf, which exceeds "
            "the radius 0.007843; replay an evaluation of these images",
        ):
            evaluate(*given, replay=[ledger], **asked)

    def test_another_size(self):
        network = jax.tree_util.Partial(lambda x: x.reshape(len(x), -1)[:, :10])
        images = IMAGES[:8, :16, :16]
        labels = np.asarray(network(images)).argmax(1)
        asked = {"norm": "linf", "epsilon": 2 / 255, "attacks": FIRST, "batch_size": 8}
        with self.assertRaisesRegex(
            ValueError, "has 32x32x3 images, but these are 16x16x3; replay an evaluation at"
        ):
            evaluate(network, images, labels, replay=[self.ledger()], **asked)

    def test_no_ledger(self):
        folder = Path(self.create_tempdir())
        (folder / "results.jsonl").write_text('{"time": "now"}\n')
        for name in ("results.jsonl", "absent.jsonl"):
            with self.assertRaisesRegex(
                ValueError, f"{name} is not a ledger; replay the ledger.jsonl"
            ):
                quick(replay=[folder / name])

    def test_an_older_ledger(self):
        path = self.ledger()
        first, *rest = path.read_text().splitlines()
        identity = json.loads(first)
        del identity["identity"]["image"]
        path.write_text("\n".join([json.dumps(identity), *rest]) + "\n")
        with self.assertRaisesRegex(ValueError, "older version that did not store the image size"):
            quick(replay=[path])

    def test_images_are_missing(self):
        path = self.ledger()
        path.with_suffix(".images").unlink()
        with self.assertRaisesRegex(ValueError, "lacks adversarial images of ledger.jsonl; copy"):
            quick(attacks=FIRST, replay=[path])

    def test_random_networks(self):
        with self.assertRaisesRegex(
            ValueError, "version='rand' does not support replay; leave it out"
        ):
            evaluate(
                lambda images, keys: NETS["lin"](images),
                IMAGES[:8],
                LABELS[:8],
                norm="linf",
                epsilon=2 / 255,
                version="rand",
                replay=[self.ledger()],
            )

    def test_robust_beyond_of_other_images(self):
        for wrong in (np.ones(3, bool), np.ones(40)):
            with self.assertRaisesRegex(ValueError, "robust_beyond: pass 40 booleans"):
                quick(robust_beyond=wrong)


class SourcesTest(parameterized.TestCase):
    """What is read of ledgers, and in which order they are tried."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def ledger(self, name: str, **identity) -> Path:
        known = {"network": "n", "norm": "linf", "epsilon": 0.1, "image": [1, 2, 1]} | identity
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        rows = [{"identity": known}, {"image": 7, "fooled": True, "stored": 1}]
        rows += [{"image": 9, "fooled": False}, {"image": 4, "fooled": True, "stored": 0}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_those_of_a_folder_alone(self):
        here = [self.ledger("b.jsonl"), self.ledger("a.jsonl")]
        self.ledger("deep/c.jsonl")
        (self.folder / "results.jsonl").write_text('{"clean": 1}\n')
        self.assertEqual(replay.ledgers(self.folder), here[::-1])

    def test_the_likeliest_to_fool_goes_first(self):
        """What has fooled this network within the ball is sure to; then what is most alike."""
        known = {
            "sure": {"epsilon": 0.05},
            "sure at the radius": {},
            "larger": {"epsilon": 0.2},
            "much larger": {"epsilon": 0.4},
            "another norm": {"norm": "l2", "epsilon": 0.1},
            "another network": {"network": "m", "epsilon": 0.15},
            "neither": {"network": "m", "norm": "l2", "epsilon": 0.1},
        }
        sources = [replay.source(self.ledger(f"{k}.jsonl", **v)) for k, v in known.items()]
        asked = {"network": "n", "norm": "linf", "epsilon": 0.1}
        found = replay.ordered(sources[::-1], asked)
        order = ["sure at the radius", "sure", "larger", "much larger", "another norm"]
        order += ["another network", "neither"]
        self.assertEqual([source.path.stem for source in found], order)
