"""At which value each check changes its level, at both sides of each limit, and what it says."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl.testing import parameterized
from PIL import Image

from jaxrobust.data import open_source
from jaxrobust.doctor import config_checks, explanations
from jaxrobust.doctor.config_checks import CONFIG_CHECKS, PlannedRun
from jaxrobust.doctor.explanations import CHANNELS, MISSING, RANGE, TWICE, Tried
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, CheckResult
from jaxrobust.doctor.network_checks import NETWORK_CHECKS
from jaxrobust.doctor.patient import Recorded
from tests.support import sweeps
from tests.support.runs import tiny


def look(name: str, patient, table=NETWORK_CHECKS) -> CheckResult:
    (check,) = [check for check in table if check.name == name]
    return check.look(patient)


def planned(devices: int = 1, *, replaced: dict | None = None, **changes) -> PlannedRun:
    """A run of tiny phases, the second of which attacks; `replaced` are attributes of the run."""
    usual = {"train__epochs": 8, "pretrain__epochs": 4, "pretrain__warmup_epochs": 1}
    usual |= {"train__warmup_epochs": 1, "train__batch_size": 16, "pretrain__batch_size": 16}
    return type("Run", (PlannedRun,), replaced or {})(tiny(**(usual | changes)), devices)


def config_look(name: str, **changes) -> CheckResult:
    return look(name, planned(**changes), CONFIG_CHECKS)


def ema_look(steps: int | None, decay: float, weights: str = "ema") -> CheckResult:
    changes = {"train__ema_decay": decay, "evaluation__weights": weights}
    plan = planned(replaced={"steps": lambda self, name: steps}, **changes)
    return config_checks._ema(plan, "train", plan.phases["train"])


class ConfigLevelsTest(parameterized.TestCase):
    @sweeps.rows(
        (3, 0.2, RED, "the radius is never reached"),
        (5, 0.2, GREEN, "5 steps of 0.2 times attack.epsilon"),
        (1, 2.0, GREEN, "1 step of 2 times"),
        (1, 2.1, RED, "each step overshoots the ball"),
    )
    def test_a_step(self, steps, share, level, said):
        how = {
            "attack__steps": steps,
            "attack__relative_step": share,
            "attack__name": "pgd",
        }
        found = config_look("step-rule", **how, attack__start="random")
        self.assertEqual(found.level, level, str(found))
        self.assertIn(said, found.sentence)
        self.assertAlmostEqual(found.value, share)

    def test_a_step_that_is_not_asked_for(self):
        found = config_look("step-rule", attack__name="apgd")
        self.assertEqual(found.level, GREEN)
        self.assertIn("apgd chooses its steps itself", found.sentence)

    @sweeps.rows(
        (1, "linf", 8 / 255, "image", RED),
        (1, "linf", 8 / 255, "random", YELLOW),
        (1, "linf", 7.9 / 255, "image", GREEN),
        (1, "l2", 8 / 255, "image", GREEN),
        (2, "linf", 16 / 255, "image", GREEN),
    )
    def test_one_step(self, steps, norm, epsilon, start, level):
        found = config_look(
            "one-step", attack__steps=steps, attack__norm=norm, attack__epsilon=epsilon,
            attack__start=start, attack__name="pgd",
        )  # fmt: skip
        self.assertEqual((found.level, found.value), (level, steps), str(found))
        self.assertIn(f"start={start}", found.sentence)

    @sweeps.rows(
        (0.99, "ema", 100, GREEN),  # a horizon of 100 of 100 steps
        (0.99, "ema", 99, RED),
        (0.99, "raw", 9, GREEN),
        (0.9, "ema", 16, GREEN),  # 0.9^16 is 0.185
        (0.9, "ema", 15, YELLOW),  # and 0.9^15 is 0.206
        (0.9, "ema", None, SKIPPED),
    )
    def test_the_horizon_of_an_average(self, decay, weights, steps, level):
        found = ema_look(steps, decay, weights)
        # The start is worth more than a fifth at a horizon of all steps as well.
        expected = YELLOW if (decay, steps) == (0.99, 100) else level
        self.assertEqual(found.level, expected, str(found))
        if steps and weights == "ema":
            self.assertEqual(found.value["steps"], steps)
            self.assertAlmostEqual(found.value["horizon"], 1 / (1 - decay))
            lower = float(found.remedy.partition("=")[2].split()[0])
            self.assertAlmostEqual(lower, 1 - 10 / steps, delta=1e-3)

    def test_the_average_of_few_steps_is_none(self):
        """Of five steps no ten fit into the horizon, and a decay is not below 0."""
        found = ema_look(5, 0.9)
        self.assertEqual((found.level, found.remedy), (RED, "set train.ema_decay=0 or lower"))

    @sweeps.rows(
        (4, 1, GREEN), (5, 1, YELLOW), (7, 1, YELLOW), (8, 1, RED), (1, 5, YELLOW), (1, 8, RED)
    )
    def test_a_warm_up(self, rate, radius, level):
        plan = planned(train__warmup_epochs=rate, attack__warmup_epochs=radius)
        found = config_checks._warmup(plan, "train", plan.phases["train"])
        self.assertEqual((found.level, found.value), (level, max(rate, radius) / 8))
        found = config_checks._warmup(plan, "pretrain", plan.phases["pretrain"])
        self.assertEqual((found.level, found.value), (GREEN, 0.25))  # which attacks nothing

    @sweeps.rows((100, GREEN), (99, YELLOW), (80, YELLOW), (79, RED), (200, GREEN))
    def test_the_size_of_images(self, side, level):
        plan = SimpleNamespace(
            source="opened", side=side, config=SimpleNamespace(data=SimpleNamespace(name="d"))
        )
        plan.source = SimpleNamespace(channels=3)
        seen = SimpleNamespace(model=SimpleNamespace(image_size=100, in_channels=3))
        found = config_checks._size(plan, "train", seen)
        self.assertEqual((found.level, found.value), (level, {"images": side, "network": 100}))
        plan.source = "it is not there"
        self.assertEqual(config_checks._size(plan, "train", seen).level, SKIPPED)

    def test_the_usual_side_of_images_of_several_sizes(self):
        folder = Path(self.create_tempdir().full_path)
        (folder / "train" / "one").mkdir(parents=True)
        for width, height in ((40, 50), (90, 30), (60, 80), (10, 99)):
            image = Image.new("RGB", (width, height))
            image.save(folder / "train" / "one" / f"{width}.png")
        source = open_source(f"folder:{folder}", "train")
        self.assertEqual(planned(replaced={"source": source}).side, 35)  # of 40, 30, 60 and 10
        source = open_source("fake:70x50x3", "train")
        self.assertEqual(planned(replaced={"source": source}).side, 50)

    @sweeps.rows(
        ((GREEN, GREEN), 0, 1),
        ((GREEN, YELLOW), 1, 1),
        ((YELLOW, RED), 1, 1),
        ((SKIPPED, GREEN), 0, 0),
        ((YELLOW, SKIPPED), 0, 0),
        ((RED, RED), 0, 0),
    )
    def test_the_worst_phase_counts(self, levels, of_attacks, of_all):
        plan = SimpleNamespace(phases={"a": 0, "b": 1}, attacked={"a": 0, "b": 1})
        seen = lambda plan, name, config: CheckResult(levels[config], name)  # noqa: E731
        found = config_checks._of_phases(seen, attacked=True)(plan)
        self.assertEqual(found.sentence, "ab"[of_attacks])
        self.assertEqual(config_checks._of_phases(seen)(plan).sentence, "ab"[of_all])
        plan.attacked = {}
        self.assertEqual(config_checks._of_phases(seen, attacked=True)(plan).level, SKIPPED)

    @sweeps.rows(
        ("trades", "both", "batch", True, YELLOW),
        ("trades", "both", "batch", False, GREEN),
        ("trades", "adversarial", "batch", True, GREEN),
        ("trades", "both", "running", True, GREEN),
        ("adversarial", "both", "batch", True, GREEN),
    )
    def test_statistics_of_both_kinds_of_images(self, objective, moves, statistics, norms, level):
        stats = {"normalize.mean": 0} | ({"bn.mean": 0} if norms else {})
        net = SimpleNamespace(init=lambda key: ({}, {k: np.float32(v) for k, v in stats.items()}))
        changes = {"train__objective": objective, "attack__statistics": statistics}
        plan = planned(replaced={"net": net}, **changes)
        phase = plan.phases["train"]
        phase.unlock().train.bn_statistics = moves
        self.assertEqual(config_checks._statistics(plan, "train", phase).level, level)

    def test_a_batch(self):
        for devices, changes, level in (
            (2, {}, GREEN),
            (3, {"train__batch_size": 48, "pretrain__batch_size": 48, "mesh__fsdp": 2}, RED),
            (1, {"train__microbatches": 5}, RED),
        ):
            found = config_look("batch-and-mesh", devices=devices, **changes)
            self.assertEqual(found.level, level, str(found))


def network(**about):
    """A patient of 100 images in 10 classes, all of which are right."""
    n = about.pop("n", 100)
    labels = np.arange(n) % 10
    logits = np.eye(10)[labels] * 5.0
    usual = {"labels": labels, "logits": logits, "flags": {}, "recorded": None, "memo": {}}
    usual |= {"right": np.ones(n, bool), "arrays": None, "images": np.zeros((n, 2, 2, 3))}
    return SimpleNamespace(**(usual | about))


class NetworkLevelsTest(parameterized.TestCase):
    @sweeps.rows(
        (0.8, 0.9, GREEN),  # 3.3 deviations
        (0.7, 0.9, RED),
        (0.94, 0.9899, GREEN),  # 5 deviations, but less than 5 points
        (0.93, 0.99, RED),
        (0.9, 0.8, GREEN),
        (0.94, 1.0, RED),
        (0.95, 0.9999, GREEN),
    )
    def test_an_accuracy_beside_its_record(self, here, recorded, level):
        right = np.arange(100) < round(100 * here)
        known = SimpleNamespace(clean=recorded, where="run/results.jsonl")
        found = look("accuracy", network(right=right, recorded=known))
        self.assertEqual(found.level, level, str(found))
        self.assertIn(
            f"{here:.1%} of 100 clean images are classified correctly, and {recorded:.1%} in run/",
            found.sentence,
        )

    @sweeps.rows((0.0, 1.0, GREEN), (1.0, 1.0, GREEN), (1.0, 0.9, RED), (0.0, 0.0, GREEN))
    def test_a_record_of_all_or_nothing(self, recorded, here, level):
        """Its standard error is taken as of one image more or less, which is not 0."""
        right = np.arange(100) < 100 * here
        found = look("accuracy", network(right=right, recorded=Recorded(recorded, "a file")))
        self.assertEqual(found.level, level, found.sentence)
        self.assertIn(f"{recorded:.1%} in a file", found.sentence)

    def test_an_accuracy_alone(self):
        found = look("accuracy", network(n=31))
        self.assertEqual(found.level, SKIPPED)
        self.assertEqual(look("accuracy", network(n=32)).level, GREEN)
        found = look("accuracy", network(flags={"low-accuracy": "x"}))
        self.assertEqual((found.level, found.value), (RED, {"here": 1.0}))

    @sweeps.rows(
        (100, 5, 0, GREEN),
        (100, 6, 0, GREEN),
        (100, 12, 0, GREEN),
        (100, 13, 0, RED),
        (100, 18, 2, RED),
        (100, 16, 3, GREEN),
        (100, 0, 13, GREEN),
        (100, 15, 1, GREEN),  # just 3.5 deviations
        (100, 16, 1, RED),
        (400, 20, 0, GREEN),  # 4.5 deviations, and just 5 points
        (400, 21, 0, RED),
        (400, 24, 4, GREEN),
        (400, 25, 4, RED),
    )
    def test_resizing(self, n, won, lost, level):
        own, right = np.ones(n, bool), np.ones(n, bool)
        own[:won], right[-lost or n :] = False, False
        labels = np.arange(n) % 10
        made = np.where(right[:, None], np.eye(10)[labels], np.eye(10)[(labels + 1) % 10])
        images = np.full((n + 20, 1, 1, 1), 0.5)
        arrays = np.full((n, 1, 1, 1), 0.5 + 2 / 255)
        patient = network(right=np.r_[own, np.ones(20, bool)], images=images, arrays=arrays)
        patient.labels, patient.forward = np.r_[labels, labels[:20]], lambda images: made
        found = look("resizing", patient)
        self.assertEqual(found.level, level, str(found))
        self.assertEqual(
            found.sentence,
            f"{1 - won / n:.1%} correct if resized by PIL, {1 - lost / n:.1%} as arrays without "
            "antialiasing; pixels differ by 2 of 255",
        )
        self.assertEqual(found.value, {"pil": own.mean(), "arrays": right.mean()})
        self.assertEqual(look("resizing", network()).level, SKIPPED)

    def explained(self, *tried: Tried, name=MISSING, n=100) -> CheckResult:
        return look(name, network(n=n, memo={"tried": list(tried)}))

    @sweeps.rows((0.1, YELLOW), (0.11, RED), (0.041, YELLOW), (0.04, GREEN))
    def test_an_explanation(self, gain, level):
        found = self.explained(Tried(MISSING, "words", 0.9, 0.5, gain, 9.0))
        self.assertEqual(found.level, level, str(found))
        if level != GREEN:
            self.assertEqual(found.value, {"as it is": 0.9 - gain, "words": 0.9})

    def test_an_explanation_of_another_kind_is_no_fault_of_this_one(self):
        better = Tried(TWICE, "the x normalization", 0.95, 0.1, 0.3, 9.0)
        own = [Tried(MISSING, "a", 0.5, 1.0, 0.2, 9.0), Tried(MISSING, "b", 0.6, 2.0, 0.1, 9.0)]
        found = self.explained(better, *own)
        self.assertEqual(found.level, GREEN)
        self.assertEndsWith(found.sentence, "accuracy 100.0%; with b: 2 and 60.0%")
        found = self.explained(better, *own, name=TWICE)
        self.assertEqual(found.level, RED)
        self.assertEndsWith(found.sentence, "with the x normalization undone")

    def test_few_or_grey_images_explain_nothing(self):
        own = Tried(MISSING, "a", 0.5, 1.0, 0.2, 9.0)
        self.assertEqual(self.explained(own, n=31).level, SKIPPED)
        self.assertEqual(self.explained(own, n=32).level, RED)
        self.assertIn("the images are gray", self.explained(own, name=CHANNELS).sentence)

    def test_flags_of_reliability(self):
        found = look("determinism", network(flags={"retraced": "it differs; mend it; or not"}))
        self.assertEqual((found.level, found.sentence), (RED, "it differs"))
        self.assertEqual((found.remedy, found.value), ("mend it; or not", ["retraced"]))
        self.assertEqual(look("determinism", network(flags={"softmax": "x"})).level, GREEN)
        both = {"retraced": "by traces; keep none", "randomized": "by passes; draw none"}
        found = look("determinism", network(flags=both))  # what five passes show comes first
        self.assertEqual((found.sentence, found.remedy), ("by passes", "draw none"))
        self.assertEqual(found.value, ["randomized", "retraced"])

    def test_one_class(self):
        labels = np.arange(100) % 10
        logits = np.tile(np.eye(10)[3], (100, 1))
        found = look("one-class", network(logits=logits))
        self.assertEqual(found.level, RED)
        few = network(n=9, logits=logits[:9])
        self.assertEqual(look("one-class", few).level, YELLOW)
        for missing in (4, 0):  # where there is no answer, none is counted, the first class neither
            sound = np.eye(10)[labels]
            sound[labels == missing] = np.nan
            found = look("one-class", network(logits=sound))
            self.assertEqual(
                (found.level, found.sentence), (GREEN, "9 of 10 classes are predicted")
            )


class ExplanationsLevelsTest(parameterized.TestCase):
    def tried(self, accuracy, loss=1.0, gain=0.5, deviations=9.0, check=MISSING):
        return Tried(check, "x", accuracy, loss, gain, deviations)

    def best(self, *tried, classes=10, count=100):
        return explanations.best(list(tried), classes, count)

    def test_the_best(self):
        first, second = self.tried(0.901, 2.0), self.tried(0.899, 1.0)
        self.assertEqual(self.best(first, second), second)  # of equal ones that of the lower loss
        self.assertEqual(self.best(self.tried(0.92, 2.0), second).accuracy, 0.92)
        self.assertIsNone(self.best())

    @sweeps.rows(
        ({"gain": 0.04}, False), ({"gain": 0.05}, True), ({"deviations": 3.5}, False),
        ({"deviations": 3.6}, True), ({"accuracy": 0.19}, False), ({"accuracy": 0.2}, True),
    )  # fmt: skip
    def test_what_matters(self, changes, found):
        own = self.tried(**({"accuracy": 0.9} | changes))
        self.assertEqual(self.best(own), own if found else None)

    def test_losses(self):
        logits = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, -1e4]])
        expected = [np.log(np.exp(2) + 2) - 2, np.log(1 + np.e)]
        np.testing.assert_allclose(explanations.losses(logits, np.array([0, 0])), expected)
        broken = np.array([[0.0, np.nan], [0.0, 0.0]])
        self.assertTrue(np.isinf(explanations.losses(broken, np.array([0, 0]))).all())

    def test_compared_by_verdicts(self):
        labels = np.zeros(10, int)
        logits = lambda right: np.where(np.arange(10)[:, None] < right, [[1.0, 0]], [[0, 1.0]])  # noqa: E731
        found = explanations.compared("c", "d", logits(2), logits(3), labels)
        self.assertEqual(found[:3], ("c", "d", 0.3))
        self.assertAlmostEqual(found.gain, 0.1)
        self.assertAlmostEqual(found.deviations, 1.0)  # below two, losses do not count
        found = explanations.compared("c", "d", logits(6), logits(2), labels)
        self.assertAlmostEqual(found.deviations, -2.0)
        same = explanations.compared("c", "d", logits(2), logits(2), labels)
        self.assertEqual((same.gain, same.deviations), (0, 0))

    def test_changes_of_images(self):
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        imagenet, half = "the imagenet normalization", "[-1, 1] (mean 0.5, std 0.5)"
        x = np.float32([[[[0.2, 0.4, 0.6]]]])
        for channels, image, expected in (
            (
                3,
                x,
                {
                    (RANGE, "images in 0..255"): 255 * x,
                    (CHANNELS, "BGR"): x[..., ::-1],
                    (MISSING, half): 2 * x - 1,
                    (TWICE, half): x / 2 + 0.5,
                    (MISSING, imagenet): (x - mean) / std,
                },
            ),
            (1, x[..., :1], {(MISSING, imagenet): (x[..., :1] - mean.mean()) / std.mean()}),
        ):
            changes = {(check, words): f for check, words, f in explanations._changes(channels)}
            self.assertEqual((CHANNELS, "BGR") in changes, channels == 3)
            for name, changed in expected.items():
                np.testing.assert_allclose(changes[name](image), changed, rtol=1e-5, atol=1e-6)

    def test_orders_that_people_number_classes_by(self):
        names = ("b", "C", "a")
        orders = {words: order.tolist() for words, order in explanations._usual_orders(names, 3)}
        self.assertEqual(orders["classes shifted by -1"], [2, 0, 1])
        self.assertEqual(orders["classes shifted by 1"], [1, 2, 0])
        self.assertEqual(orders["classes in the opposite order"], [2, 1, 0])
        self.assertEqual(orders["classes sorted by their names"], [1, 2, 0])
        self.assertEqual(orders["classes as before they were sorted by their names"], [2, 0, 1])
        self.assertEqual(orders["classes sorted by their names in lower case"], [2, 0, 1])
        self.assertNotIn("classes sorted by their numbers as text (10 before 2)", orders)
        orders = dict(explanations._usual_orders(names, 11))
        text = orders["classes sorted by their numbers as text (10 before 2)"]
        self.assertEqual(text.tolist(), [0, 1, 10, *range(2, 10)])

    @sweeps.rows((39, False), (40, True))
    def test_four_images_a_class_suggest_an_order(self, count, there):
        labels = np.arange(count) % 10
        swapped = np.array([1, 0, *range(2, 10)])
        logits = np.eye(10)[swapped[labels]]
        patient = SimpleNamespace(logits=logits, labels=labels, classes=())
        words = [tried.done for tried in explanations._of_orders(patient)]
        self.assertEqual("output 0 is class 1, output 1 is class 0" in words, there)
        patient.logits = np.where(labels[:, None] == 0, np.nan, logits)
        self.assertEqual([*explanations._of_orders(patient)], [])

    def test_an_order_in_words(self):
        names = ("zero", "1", *map(str, range(2, 14)))
        order = np.arange(14)
        order[[0, 5]] = 5, 0
        found = explanations._described(order, names)
        self.assertEqual(found, "output 0 is class 5, output 5 is class 0 (zero)")
        self.assertEqual(
            explanations._described(np.roll(order * 0 + np.arange(14), 1), ()),
            "classes shifted by -1",
        )
        mixed = np.array([*range(2, 14), 1, 0])
        text = explanations._described(mixed, ())
        self.assertEqual(text.count("output"), 10)
        self.assertEndsWith(text, ", ...")
        ten = np.array([1, 2, 3, 4, 0, 6, 7, 8, 9, 5, 10, 11, 12, 13])
        text = explanations._described(ten, ())
        self.assertEqual(text.count("output"), 10)
        self.assertEndsWith(text, "output 9 is class 5")  # there are no more
