"""The rules of records: what is written, what is absent, what is damaged, how numbers are told."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.config import Values
from jaxrobust.evaluation.network import checks, collapse, randomised, reliability
from jaxrobust.evaluation.records import pairs, records, trained, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.weights.trained import history

ATTACK = {"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255, "steps": 20}


class JsonTest(parameterized.TestCase):
    def test_what_is_not_known(self):
        training, own = AccuracyRecord().to_json(), AccuracyRecord(evaluation="7").to_json()
        self.assertContainsSubset(("clean", "flags", "attacks", "interval"), training)
        self.assertEqual((training["clean"], training["flags"]), (None, {}))
        self.assertNoCommonElements(("evaluation", "method", "fingerprint", "draws"), training)
        self.assertContainsSubset(("method", "fingerprint", "accuracy_after"), own)
        self.assertNoCommonElements(("draws", "ladder", "clean_top5"), own)
        self.assertEqual(AccuracyRecord(clean_top5=0.0).to_json()["clean_top5"], 0.0)

    def test_there_and_back(self):
        line = AccuracyRecord(evaluation="7", clean=0.5, attacks=[ATTACK]).to_json()
        line.pop("size")  # as an older version
        line |= {"mine": 3, "draws": None}
        read = AccuracyRecord.from_json(line)
        self.assertEqual(read.absent, ("size",))
        self.assertEqual(read.others, {"mine": 3, "draws": None})
        self.assertEqual(read.to_json(), line)
        self.assertEqual(dataclasses.replace(read, size={"a": 1}).to_json()["size"], {"a": 1})

    def test_null_is_the_empty_list(self):
        read = AccuracyRecord.from_json({"attacks": None, "flags": None})
        self.assertEqual((read.attacks, read.flags), ([], {}))

    @parameterized.parameters(
        ({"schema": 3}, "schema 3, and this version knows up to 2; install"),
        ({"schema": "2"}, "schema 2"),
        ({"schema": None}, "schema None"),
        ({"clean": "0.5"}, "whose clean is '0.5'"),
        ({"attacks": {}}, "whose attacks is {}"),
        ({"evaluation": 7}, "whose evaluation is 7"),
    )
    def test_what_is_no_record(self, changes, words):
        line = AccuracyRecord(schema=2).to_json() | changes
        if changes.get("schema", 0) is None:
            line["schema"] = None
        with self.assertRaisesRegex(ValueError, words):
            check(AccuracyRecord.from_json(line), "there")

    def test_what_is_a_record(self):
        line = AccuracyRecord(schema=2, clean=1, robust=0.5).to_json()
        check(AccuracyRecord.from_json(line), "there")  # whole numbers are numbers
        line.pop("size")
        with self.assertRaisesRegex(ValueError, "whose size is None"):
            check(AccuracyRecord.from_json(line), "there")
        line.pop("schema")  # then it is one of before, in which keys may lack
        check(AccuracyRecord.from_json(line), "there")
        own = AccuracyRecord(schema=2, evaluation="7").to_json()
        own.pop("method")
        check(AccuracyRecord.from_json(own), "there")

    def test_properties(self):
        one = AccuracyRecord(attacks=[ATTACK], model={"image_size": 8})
        self.assertEqual((one.image_size, AccuracyRecord().image_size), (8, None))
        self.assertEqual([str(t.norm) for t in one.threats], ["linf"])
        self.assertEqual((AccuracyRecord(method="union").is_union, one.is_union), (True, False))


class NumbersTest(parameterized.TestCase):
    def test_intervals(self):
        share = 29 / 50  # of which the product is 28.999...
        self.assertEqual(records.interval(share, 50), list(checks.binomial_interval(29, 50)))
        self.assertIsNone(records.interval(None, 50))
        self.assertIsNone(records.intervals(0.5, 0.5, 0))
        both = records.intervals(0.5, None, 10)
        self.assertEqual(
            (both["clean"], both["robust"]), (list(checks.binomial_interval(5, 10)), None)
        )

    def test_one_draw(self):
        robust = np.array([True, False, True, True, False])
        found = records.one_draw(0.8, robust)
        self.assertEqual((found["clean"], found["robust"]), (0.8, 0.6))
        self.assertEqual(found["interval"], records.intervals(0.8, 0.6, 5))
        np.testing.assert_array_equal(randomised.unpacked(found["bits"], 5), robust)
        self.assertEqual(records.one_draw(0.0, np.zeros(0, bool))["robust"], 0.0)

    def test_what_tells_evaluations_apart(self):
        known = {"program": "p", "probe": {"logits": []}, "versions": {"jax": "1"}}
        result = {"seed": 0, "fingerprint": known, "search_sample": 1, "clipped": 2}
        result["draws"] = {"rule": "mean", "draws": 3, "one_draw": {"robust": 0.5}}
        own = records.identity(result)
        expected = {
            "seed": 0,
            "fingerprint": {"program": "p"},
            "draws": {"rule": "mean", "draws": 3},
        }
        self.assertEqual(own, expected)
        self.assertLen(records.number_of(own), 12)
        self.assertNotEqual(records.number_of(own), records.number_of(own | {"seed": 1}))

    @parameterized.parameters(
        ([], ""),
        ([5], "5"),
        ([0, 1, 2], "0..2"),
        ([0, 1, 7, 200, 201], "0..1, 7, 200..201"),
        ([3, 2, 1], "3, 2, 1"),
        ([1, 2, 4, 5], "1..2, 4..5"),
        ([1, 1], "1, 1"),
    )
    def test_ranges(self, ids, words):
        self.assertEqual(records.ranges(ids), words)

    def test_sizes(self):
        weights = SimpleNamespace(params={}, stats={"0": np.zeros((2, 3)), "1": np.zeros(4)})
        net = mock.MagicMock()
        with mock.patch.object(records, "multiply_adds", return_value=9):
            make = lambda: records.size(net, _Pair(weights), 8, 3)  # noqa: E731
            self.assertEqual(make(), {"parameters": 10, "multiply_adds": 9})
            weights.params = {"w": np.zeros((5, 5))}
            self.assertEqual(make()["parameters"], 25)

    def test_lines_of_attacks(self):
        def line(**known):
            return records.attack_line(AccuracyRecord(**({"attacks": [ATTACK]} | known)))

        self.assertEqual(line(attacks=[]), "none")
        self.assertEqual(line(), "APGD-CE 20 steps, linf 0.03137")
        self.assertEqual(line(method="apgd-ce"), "apgd-ce, linf 0.03137")
        after = {"linf 1": 0.5, "l2 2": 0.4}
        self.assertEqual(line(method="union", accuracy_after=after), "union of linf 1, l2 2")
        worst = line(method="union", accuracy_after=after, worst_case=[{}])
        self.assertEqual(worst, "worst case of linf 1, l2 2")
        self.assertEndsWith(
            line(replayed=[{"fooled": 2}]), " (2 images decided by replayed points)"
        )

    def test_notes(self):
        pixels = {"pixels": 3, "images": 2, "largest": 5e-7}
        draws = {"rule": "mean", "draws": 4}
        first, second = records.notes_of(AccuracyRecord(clipped=pixels, draws=draws))
        self.assertStartsWith(first, "3 pixels of 2 images lay up to 5e-07 outside [0, 1]")
        self.assertEqual(second, records.draws_line(draws))
        self.assertEqual(records.notes_of(AccuracyRecord()), [])

    def test_draws_in_words(self):
        ends = {"clean": None, "robust": [0.25, 0.5]}
        own = {"clean": 0.8, "robust": 0.4, "interval": ends}
        line = records.draws_line({"rule": "mean", "draws": 4, "one_draw": own})
        self.assertEndsWith(line, "clean 80.0%, robust 40.0%, 95 % interval 25.0% to 50.0%")
        line = records.draws_line({"rule": "mean", "draws": 4, "one_draw": own | {"at_most": True}})
        self.assertIn("robust at most 40.0%, 95 %", line)
        line = records.draws_line(
            {"rule": "mean", "draws": 4, "one_draw": own | {"interval": None}}
        )
        self.assertEndsWith(line, "robust 40.0%")
        self.assertIn(
            "by one draw it is not known", records.draws_line({"rule": "mean", "draws": 4})
        )
        line = records.draws_line({"rule": "one-draw", "draws": 1, "one_draw": own})
        self.assertNotIn("robust 40.0%", line)

    def test_rules_of_steps(self):
        costs = records.with_step_rules([{"attack": "replay"}, {"attack": "apgd-ce", "fooled": 1}])
        self.assertEqual(costs[0]["step_rule"], "none: what fooled elsewhere, projected")
        self.assertEqual(costs[1]["fooled"], 1)
        self.assertNotEqual(costs[1]["step_rule"], costs[0]["step_rule"])

    def test_a_record_is_saved_with_its_verdicts_by_the_first_process(self):
        own = verdicts_of(["", "clean"])
        folder = Path(self.create_tempdir())
        make = lambda: AccuracyRecord(evaluation="7", schema=2).stamped()  # noqa: E731
        with mock.patch.object(records.jax, "process_index", return_value=1):
            records.save(folder / "x.jsonl", own, make)
        self.assertEmpty([*folder.iterdir()])
        line = records.save(folder / "new" / "x.jsonl", own, make)
        self.assertEqual(json.loads((folder / "new" / "x.jsonl").read_text()), line)
        read = verdicts.read(folder / "new" / line["verdicts"])
        self.assertEqual(read.fooled_by.tolist(), ["", "clean"])
        with self.assertRaisesRegex(ValueError, "gets a line of JSON; give a file such as"):
            records.save(folder / "x.json", own, make)


class _Pair:
    """Weights as a tuple that also has names."""

    def __init__(self, weights) -> None:
        self.params, self.stats = weights.params, weights.stats

    def __iter__(self):
        return iter((self.params, self.stats))


def verdicts_of(fooled_by, ids=None) -> Verdicts:
    names = np.array(fooled_by)
    n = len(names)
    ids = np.arange(n, dtype=np.uint32) if ids is None else np.array(ids, np.uint32)
    columns = (ids, ids.astype(np.int32) % 3, names != "clean", names)
    return Verdicts(*columns, np.arange(n) / 4, np.arange(n, dtype=np.int32))


class VerdictsTest(parameterized.TestCase):
    def test_images_that_all_have_in_the_order_of_their_places(self):
        one = verdicts_of(["a", "b", "c", "d"], ids=[9, 2, 5, 7])
        other = verdicts_of(["e", "f", "g"], ids=[5, 9, 1])
        first, second = verdicts.aligned([one, other])
        self.assertEqual(first.image_ids.tolist(), [5, 9])
        self.assertEqual(
            (first.fooled_by.tolist(), second.fooled_by.tolist()), (["c", "a"], ["e", "f"])
        )
        self.assertEqual(first.norms.tolist(), [0.5, 0.0])
        (alone,) = verdicts.aligned([one])
        self.assertEqual(alone.fooled_by.tolist(), ["b", "c", "d", "a"])

    def test_a_file(self):
        path = Path(self.create_tempdir()) / "verdicts-7.json"
        own = verdicts_of(["", "clean", "a"])
        verdicts.write(path, "7", own)
        for one, other in zip(verdicts.read(path), own, strict=True):
            np.testing.assert_array_equal(one, other)
            self.assertEqual(one.dtype.kind, other.dtype.kind)
        stored = json.loads(path.read_text())
        self.assertEqual((stored["schema"], stored["evaluation"]), (2, "7"))
        for changes, words in (
            ({"schema": 3}, "has schema 3, and this version knows up to 2"),
            ({"norms": [0, 1]}, "its columns have different lengths"),
            ({"norms": [[0, 1, 2]]}, "different lengths"),
            ({"clean": [True, True, True]}, "clean and fooled_by disagree"),
            ({"clean": [True, False, False]}, "clean and fooled_by disagree"),
            ({"labels": ["x", 1, 2]}, "is damaged"),
        ):
            path.write_text(json.dumps(stored | changes))
            with self.assertRaisesRegex(ValueError, words):
                verdicts.read(path)
        del stored["reached"]
        path.write_text(json.dumps(stored))
        self.assertEqual(verdicts.read(path).reached.tolist(), [-1, -1, -1])


class NeededTest(parameterized.TestCase):
    """Connor's number of images for a test at 95 % with a power of 80 %."""

    @parameterized.parameters(
        # (1.959964 sqrt(0.3) + 0.841621 sqrt(0.3 - 0.1^2))^2 / 0.1^2 = 233.1
        (100, 10, 20, 234),
        (100, 20, 10, 234),
        (1000, 100, 200, 234),
        (100, 7, 7, None),
    )
    def test_by_hand(self, n, gained, lost, images):
        found = pairs.Paired(n, 0, 0, gained, lost, (gained - lost) / n, 0, 0, 0)
        self.assertEqual(pairs.images_needed(found), images)


class TrainedTest(parameterized.TestCase):
    def facts(self, phase="b", chosen=None, split="test", **changes):
        attack = {"name": "pgd", "steps": 3, "norm": "linf", "epsilon": 0.1, "step_size": None}
        attack |= {"relative_step": 0.5, "start": "random", "start_std": None}

        def own(objective, epochs):
            return SimpleNamespace(objective=objective, epochs=epochs, start=None)

        phases = {"a": own("clean", 4), "b": own("adversarial", 2), "c": own("adversarial", 5)}
        data = {"name": "digits", "train_split": "train", "selection_split": "train[90%:]"}
        data |= {"extra": None, "extra_split": None} | changes.pop("data", {})
        phases |= changes
        config = Values({"phases": ["a", "b", "c"], **phases})

        class Section(SimpleNamespace):
            get = lambda self, key: getattr(self, key, None)  # noqa: E731
            __getitem__ = lambda self, key: getattr(self, key)  # noqa: E731

        seen = Section(
            attack=Section(**attack),
            data=Section(**data),
            evaluation={"attack": "apgd-5"},
            **phases,
        )
        with mock.patch.object(history, "of_phase", lambda config, name: seen):
            return trained.training(
                [history.of_config(config, phase, chosen=chosen)], dataset="digits", split=split
            )

    def test_phases_up_to_that_of_the_weights(self):
        found = self.facts()
        self.assertEqual([each["phase"] for each in found["phases"]], ["a", "b"])
        first, second = found["phases"]
        self.assertEqual((first["attack"], first["attack_steps"]), (None, 0))
        self.assertNotIn("epsilon", first)
        self.assertEqual((second["attack"], second["attack_steps"]), ("pgd", 3))
        self.assertEqual((second["relative_step"], second["start"]), (0.5, "random"))
        self.assertNotIn("step_size", second)
        self.assertEqual(found["passes"], 4 * 1 + 2 * (1 + 3))
        self.assertEqual(found["selection"]["attack"], "apgd-5")
        self.assertEqual(self.facts("a")["passes"], 4)

    @parameterized.parameters(
        ("test", {}, False),
        ("train[:10%]", {}, True),
        ("test", {"train_split": "test"}, True),
        ("test", {"extra": "digits", "extra_split": "test"}, True),
        ("test", {"extra": "other", "extra_split": "test"}, False),
    )
    def test_images_that_were_trained_on(self, split, data, seen):
        self.assertEqual(self.facts(split=split, data=data)["on_evaluated_images"], seen)

    def test_a_phase_without_epochs_trained_on_nothing(self):
        none = SimpleNamespace(objective="clean", epochs=0, start=None)
        self.assertFalse(self.facts("a", split="train", a=none)["on_evaluated_images"])

    @parameterized.parameters(
        (None, {}, False),
        (None, {"selection_split": "test"}, True),
        (None, {"selection_split": ""}, None),
        ({"dataset": "digits", "split": "test[:5]"}, {}, True),
        ({"dataset": "other", "split": "test"}, {}, False),
    )
    def test_images_that_weights_were_chosen_on(self, chosen, data, same):
        found = self.facts(chosen=chosen, data=data)["selection"]
        self.assertEqual(found["on_evaluated_images"], same)
        if chosen:
            self.assertEqual(found["dataset"], chosen["dataset"])
            self.assertNotIn("attack", found)


class PairsTest(parameterized.TestCase):
    def test_by_hand(self):
        self.assertEqual(pairs.mcnemar(np.array([0]), np.array([0]))[0], 1)
        self.assertAlmostEqual(pairs.mcnemar(np.array([1]), np.array([4]))[0], 2 * 6 / 32)
        self.assertEqual(pairs.mcnemar(np.array([3]), np.array([3]))[0], 1)

    @parameterized.parameters(0.0, 1.0)
    def test_levels_are_inside(self, level):
        one = np.array([1])
        with self.assertRaisesRegex(ValueError, "is not a probability"):
            pairs.difference_interval(one, one, 5 * one, level)

    def test_holm_is_at_most_one(self):
        np.testing.assert_allclose(pairs.holm(np.array([0.6, 0.5, 0.01])), [1.0, 1.0, 0.03])

    def test_an_empty_group_is_none(self):
        first, second = np.array([True, False, True]), np.array([True, True, False])
        names, found = pairs.compare_groups(first, second, np.array([7, 3, 7]))
        self.assertEqual(names.tolist(), [3, 7])
        self.assertEqual((found.n.tolist(), found.first.tolist()), ([1, 2], [0, 2]))
        self.assertEqual((found.gained.tolist(), found.lost.tolist()), ([1, 0], [0, 1]))


class ReliabilityRulesTest(parameterized.TestCase):
    def test_gradients(self):
        zero = lambda n: np.arange(100) < n  # noqa: E731
        found = [bool(reliability.check_gradients(zero(n))) for n in (0, 1, 2)]
        self.assertEqual(found, [False, False, True])

    def test_squares(self):
        flagged = lambda **after: bool(reliability.check_cascade(after))  # noqa: E731
        self.assertTrue(flagged(clean=0.9, a=0.5, square=0.4979))
        self.assertFalse(flagged(clean=0.9, a=0.5, square=0.4981))
        self.assertFalse(flagged(clean=0.9, square=0.1))  # nothing followed gradients
        self.assertFalse(flagged(square=0.1))
        self.assertFalse(flagged(clean=0.9, a=0.5))

    def test_answers(self):
        self.assertEqual(reliability.check_answers(np.zeros(0, bool)), {})
        found = reliability.check_answers(np.array([True, False]), ["a", "clean"], [0, -1])
        self.assertEqual([*found], ["nan-logits"])
        self.assertStartsWith(found["nan-logits"], "1 of 2 images")
        found = reliability.check_answers(np.ones(3, bool), ["a", "", "b"], [-1, -1, 0])
        self.assertStartsWith(found["nan-under-attack"], "1 of 3 images")
        with self.assertRaisesRegex(ValueError, "the logits of all 2 images are NaN"):
            reliability.check_answers(np.zeros(2, bool))

    def test_probes(self):
        probe = {"logits": [[1.0], [-1.0], [0.0]], "gradients": [[-1.0], [-1.0], [-1.0]]}
        self.assertStartsWith(
            reliability.check_slopes(probe)["nan-gradients"], "the input gradients of 2 of 3 noisy"
        )
        self.assertEqual(reliability.check_slopes(probe | {"gradients": [[0.0]] * 3}), {})

    @parameterized.parameters((0.62, 64, False), (0.64, 64, True), (0.62, 10_000, True))
    def test_above_chance(self, share, n, above):
        right = np.arange(n) < round(share * n)
        # Three deviations of 64 coins are 0.1875.
        expected = above if n > 64 else share > 0.5 + 0.1875
        self.assertEqual(reliability._above_chance(right, 2), expected)

    @parameterized.parameters(
        (0, 4, True), (2, 4, True), (3, 4, False), (4, 4, False), (1, 1, False)
    )
    def test_few_images(self, right, n, flagged):
        # Of 4 guesses among 4 classes 3 or more are right with probability 0.051, of 2 with 0.26.
        found = reliability._too_few(right, n, 5)
        self.assertEqual(bool(found), flagged)

    def test_constant_networks(self):
        images = np.random.default_rng(0).random((4, 2, 2, 1))
        logits = np.tile([[1.0, 2.0]], (4, 1))
        flags = lambda x, z: reliability._degenerate(x, z, np.zeros(len(z), int))  # noqa: E731
        self.assertIn("all 4 images have the same", flags(images, logits)["constant-logits"])
        self.assertEqual(flags(images[[0] * 4], logits), {})  # as equal images may
        self.assertEqual(flags(images[:1], logits[:1]), {})
        logits[0] += 1e-3
        self.assertEqual(flags(images, logits), {})
        logits[1] = 2.0
        self.assertIn("all logits are equal for 1 of 4", flags(images, logits)["constant-logits"])
        broken = logits.copy()
        broken[:3] = np.nan
        self.assertEqual([*flags(images, broken)], ["nan-logits"])

    def test_probabilities(self):
        rows = np.array([[0.25, 0.75], [1.0, 0.0]])
        self.assertIn("sum to 1", reliability._softmax(rows)["softmax"])
        self.assertEqual(reliability._softmax(np.add(rows, [[0.1, 0.0], [0.0, 0.0]])), {})
        self.assertEqual(reliability._softmax(np.add(rows, [[1.0, -1.0]])), {})  # not in [0, 1]
        self.assertEqual(reliability._softmax(rows[:0]), {})
        mixed = np.vstack([rows, [[np.nan, 1.0]]])
        self.assertIn("softmax", reliability._softmax(mixed))

    def test_passes_that_differ(self):
        one = np.eye(10)[np.arange(10)] * 3
        labels = np.arange(10)
        self.assertEqual(reliability._randomized([one, one], labels), {})
        near = one + 1e-5
        self.assertEqual(reliability._randomized([one, near], labels), {})
        tie = one.copy()
        tie[0, 1] = 3.0001  # another class by next to nothing
        self.assertIn(
            "9 to 10 images", reliability._randomized([one, one, tie], labels)["randomized"]
        )
        far = one + 0.01
        self.assertIn("randomized", reliability._randomized([one, far], labels))


class CollapseRulesTest(parameterized.TestCase):
    def of(self, answers, labels):
        return collapse.of(np.array(answers), np.array(labels))

    def test_class_zero_is_a_class(self):
        labels = np.arange(60) % 3
        self.assertTrue(self.of([0] * 60, labels).proven)
        self.assertTrue(self.of([2] * 60, labels).proven)
        self.assertIsNone(self.of([-1] * 60, labels))

    def test_images_of_the_answer_itself_say_nothing(self):
        labels = [0] * 300 + [1] * 20
        self.assertIsNone(self.of([0] * 300 + [1] * 20, labels))
        self.assertFalse(self.of([0] * 320, labels).proven)  # 20 of 20 are too few

    @parameterized.parameters((4, None), (5, False), (28, False), (29, True))
    def test_how_many_others_show_it(self, others, proven):
        labels = [0] * 10 + [1] * others
        found = self.of([0] * len(labels), labels)
        self.assertEqual(found and found.proven, proven)

    def test_proven(self):
        for reached, expected in (
            ({}, False),
            ({"collapse": None}, False),
            ({"collapse": {"proven": False}}, False),
            ({"collapse": {"proven": True}}, True),
        ):
            self.assertEqual(collapse.proven(reached), expected)


if __name__ == "__main__":
    absltest.main()
