"""What a count comes to, image by image, and what may be asked, at both sides of each limit."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.evaluation.questions import measuring, questions
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.papers import three_norms
from jaxrobust.types import Threat, check_threat

REACHED = {
    "clean": np.array([True, True, False, True]),
    "robust": np.array([True, False, False, False]),
    "finite": np.array([True, True, True, True]),
    "labels": np.array([0, 1, 2, 0]),
    "norms": np.array([0.25, 0.5, 0.75, 1.0], np.float32),
    "answers": np.array([0, 1, 0, 0]),
    "reached": np.array([1, 2, 0, 1]),
}
PLACES = np.array([2, 3, 5, 7])


class AnsweredTest(parameterized.TestCase):
    def test_verdicts(self):
        own = measuring.verdicts_of(REACHED, "pgd-3", PLACES)
        self.assertEqual(own.fooled_by.tolist(), ["", "pgd-3", "clean", "pgd-3"])
        self.assertEqual(own.norms.tolist(), [0, 0.5, 0, 1])
        self.assertEqual(own.reached.tolist(), [-1, 2, -1, 1])
        self.assertEqual(own.image_ids.tolist(), PLACES.tolist())

    @parameterized.parameters(
        ("pgd-3", 4 * (3 + 2), 4 * 3, 0.25, {"pgd-3": 0.25}),  # and two passes that judge
        ("fgsm", 4 * (1 + 2), 4, 0.25, {"fgsm": 0.25}),
        ("clean", 4, 0, None, {}),
    )
    def test_a_record(self, attack, forward, backward, robust, after):
        settings = [{"name": attack}]
        measured = measuring.answered(REACHED, Question(attack), PLACES, settings, 7.0, 3)
        record, (cost,) = measured.record, measured.record.costs
        self.assertEqual((record.clean, record.robust), (0.75, robust))
        self.assertEqual((record.accuracy_after, record.attacks), (after, settings))
        self.assertEqual(
            (cost["attack"], cost["forward"], cost["backward"]), (attack, forward, backward)
        )
        self.assertEqual((cost["fooled"], cost["seconds"]), (2, 7.0))

    def test_of_no_images_no_accuracy_is_known(self):
        none = {key: value[:0] for key, value in REACHED.items()}
        record = measuring.answered(none, Question("pgd-3"), PLACES[:0], [], 0.0, 3).record
        self.assertEqual((record.clean, record.robust), (None, None))


class CountedTest(parameterized.TestCase):
    """Which images are counted, in which batches, and what is told of them."""

    def counted(self, question: Question, *, devices=4, places=PLACES):
        subject = SimpleNamespace(
            ball=Threat("l2", 0.5), norm="l2", batch_size=100, image_size=8, workers=2,
            create=lambda dtype: f"net in {dtype}",
        )  # fmt: skip
        more = {"stable": np.array([1.0, 0, 0, 0]), "local_lipschitz": np.arange(4.0)}
        self.each = mock.Mock(return_value=REACHED | more | {"clean_top5": np.ones(4)})
        mesh, source = SimpleNamespace(size=devices), SimpleNamespace(num_classes=3)
        with (
            mock.patch.object(measuring, "attack_of", return_value=([{"name": "x"}], "attack")),
            mock.patch.object(measuring.sharding, "make_mesh", return_value=mesh),
            mock.patch.object(measuring.accuracy, "counter") as counter,
            mock.patch.object(measuring.accuracy, "each", self.each),
        ):
            found = measuring.counted(subject, source, "weights", question, places)
        counter.assert_called_once_with("net in float32", "attack", mesh=mesh, top5=True, each="l2")
        return found

    @parameterized.parameters(
        (None, 4, 1, 4), (None, 4, 4, 4), (None, 4, 3, 6), (3, 4, 1, 3), (3, 4, 4, 4), (9, 4, 1, 4)
    )
    def test_a_batch_is_no_larger_than_the_images_need(self, batch, images, devices, size):
        question = Question("pgd-3", batch=batch, images=images, seed=7)
        self.counted(question, devices=devices)
        _, weights, given, _ = self.each.call_args.args
        self.assertEqual((weights, given.batch_size), ("weights", size))
        self.assertEqual((given.seed, given.workers), (7, 2))

    def test_only_images_that_stand_are_counted(self):
        found = self.counted(Question("pgd-3", images=8))
        self.assertEqual(self.each.call_args.args[2].places, tuple(PLACES.tolist()))
        self.assertEqual(found.verdicts.image_ids.tolist(), PLACES.tolist())
        none = self.counted(Question("pgd-3", images=8), places=PLACES[:0])
        self.each.assert_not_called()
        self.assertIsNone(none.record.clean_top5)

    def test_only_an_attack_moves_answers(self):
        record = self.counted(Question("pgd-3", images=4)).record
        self.assertEqual((record.clean_top5, record.stable, record.local_lipschitz), (1, 0.25, 1.5))
        record = self.counted(Question("clean", images=4)).record
        self.assertEqual((record.clean_top5, record.stable), (1, None))
        self.assertIsNone(record.local_lipschitz)


class LimitsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("linf", 1.0, None),
        ("l2", 8.0, None),  # the diagonal of 64 pixels
        ("l2", 8.01, "two of which are at most 8 apart"),
        ("l1", 64.0, None),
        ("l1", 64.1, "at most 64 apart"),
        ("l1", 1.0, None),
        ("l1", 0.99, "changes less than one pixel"),
        ("l1", 0.0, None),
    )
    def test_a_radius(self, norm, epsilon, said):
        if said is None:
            return check_threat(Threat(norm, epsilon), 8, 1)
        with self.assertRaisesRegex(ValueError, said):
            check_threat(Threat(norm, epsilon), 8, 1)

    @parameterized.parameters(
        ({"images": 0, "batch": 1, "seed": 2**32 - 1}, None),
        ({"images": -1}, "--n=-1 must be at least 0"),
        ({"batch": 0}, "--batch=0 must be at least 1"),
        ({"seed": -1}, "--seed=-1 must be at least 0"),
        ({"seed": 2**32}, "must be below 2.32"),
        ({"attack": "apgd-ce", "steps": 1, "restarts": 1}, None),
        ({"attack": "apgd-ce,apgd-t", "targets": 3}, None),
        ({"attack": "apgd-ce", "targets": 3}, "--targets=3 has no effect on --attack=apgd-ce"),
        ({"attack": "apgd-ce", "steps": 0}, "--steps=0 must be at least 1"),
        ({"attack": "apgd-ce", "restarts": 0}, "--restarts=0 must be at least 1"),
        ({"steps": 3}, "--steps=3 has no effect on --attack=autoattack; name an attack of it"),
        ({"attack": "pgd-2", "steps": 3}, "--steps=3 has no effect on --attack=pgd-2; leave it"),
        ({"attack": "pgd-2", "step": 0.1, "relative_step": 1.0}, "both say how long a step is"),
        ({"attack": "pgd-2", "step": 0.0}, "--step=0 must be above 0"),
        ({"attack": "pgd-2", "relative_step": float("inf")}, "--relative_step=inf must be above 0"),
        ({"attack": "pgd-2", "start": "uniform"}, None),
        ({"attack": "pgd-2", "start": "here"}, "--start=here is unknown; one of image, random"),
        ({"attack": "pgd-2", "l1_rule": "art"}, "--l1_rule=art is of l1, not of linf"),
        ({"attack": "apgd-ce", "start": "image"}, "--start=image has no effect on --attack=apgd"),
        ({"attack": "pgd-2", "search_dtype": "bfloat16"}, "search_dtype=bfloat16 has no effect"),
        ({"search_dtype": "float16"}, "--search_dtype=float16 is unknown"),
        ({"version": "rand", "search_dtype": "bfloat16"}, "--version=rand searches in float32"),
        ({"version": "custom"}, "--version=custom needs its attacks"),
        ({"draws": 3}, "--draws=3 judges randomised networks"),
        ({"attack": "pgd-2", "union_only": True}, "--union_only needs attacks that go on"),
        ({"attack": "pgd-2", "replay": ("a",)}, "--replay has no effect on --attack=pgd-2; leave"),
        ({"replay": ("a",), "noreplay": True}, "--noreplay contradicts --replay"),
        ({"attack": "apgd_ce"}, "--attack=apgd_ce is unknown; did you mean apgd-ce"),
    )
    def test_a_question(self, fields, said):
        network = SimpleNamespace(in_channels=1)
        subject = SimpleNamespace(
            threat=Threat("linf", 0.1), norm="linf", image_size=8, network=network
        )
        given = Question(**fields), subject, data.open_source("digits", "test")
        if said is None:
            return questions.check(*given)
        with self.assertRaisesRegex(ValueError, said):
            questions.check(*given)


class ThreeNormsTest(parameterized.TestCase):
    def test_the_cheap_ones_come_first_where_each_skips(self):
        table = [("linf", "pgd-20"), ("linf", "autoattack"), ("l2", "pgd-20"), ("l1", "pgd-20")]
        own = [(part.norm, part.attack) for part in three_norms.parts(skips=False)]
        self.assertEqual(own, table)
        own = [(part.norm, part.attack) for part in three_norms.parts(skips=True)]
        self.assertEqual(own, [table[0], *table[2:], table[1]])

    def test_the_study_has_radii_for_small_and_for_large_images(self):
        rows = {
            side: [(ball.norm, ball.epsilon) for ball in balls]
            for side, balls in three_norms.RADII.items()
        }
        linf = ("linf", 8 / 255)
        expected = {
            32: [linf, ("l2", 1.5), ("l1", 40.0)],
            224: [linf, ("l2", 8.0), ("l1", 1600.0)],
        }
        self.assertEqual(rows, expected)

    def test_radii_of_the_study_and_given_ones(self):
        found = three_norms.radii(224, [Threat("l2", 3.0)])
        self.assertEqual(
            [*found.values()], [Threat("linf", 8 / 255), Threat("l2", 3.0), Threat("l1", 1600.0)]
        )
        self.assertEqual(three_norms.radii(32, [])["l2"], Threat("l2", 1.5))
        with self.assertRaisesRegex(
            ValueError, "64 px .*give --threat=l2:RADIUS --threat=l1:RADIUS"
        ):
            three_norms.radii(64, [Threat("linf", 0.1)])

    def test_pgd_alone_searches_in_float32_without_replay(self):
        given = Question(replay=("a",), search_dtype="bfloat16", union_only=True)
        for norm, own in three_norms.questions(given, skips=True):
            with self.subTest(f"{norm} {own.attack}"):
                searches = own.attack == "autoattack"
                self.assertEqual(own.replay, ("a",) if searches else ())
                self.assertEqual(own.search_dtype, "bfloat16" if searches else "float32")
                self.assertEqual(own.relative_step, None if searches else 1.5)
                self.assertFalse(own.union_only)


if __name__ == "__main__":
    absltest.main()
