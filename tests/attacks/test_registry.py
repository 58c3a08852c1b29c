"""The registry of attacks, and momentum FGSM: one file and one import that are known everywhere."""

import importlib
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.attacks import fixed_steps, registry
from jaxrobust.attacks.mim import mim_machine
from jaxrobust.doctor import config_checks
from jaxrobust.doctor.estimate import work
from jaxrobust.doctor.findings import RED
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.records import of_weights, records
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import commands, sentences
from jaxrobust.training import build
from jaxrobust.training.update import inner
from jaxrobust.weights.trained import history
from tests.support import evaluations, paths, sweeps
from tests.support.ensemble import IMAGES, LABELS, NETS
from tests.support.runs import tiny

EPSILON = 0.1


def momentum_fgsm(gradient, images, norm, steps, decay):
    """Algorithm 1 of Dong et al. 2018 with section 3.4's step in L2, as it is written, in float64.

    Each of the L-inf points is clipped to the ball and to [0, 1].
    """
    points, momentum, alpha = images, np.zeros_like(images), EPSILON / steps
    for _ in range(steps):
        slope = gradient(points)
        momentum = decay * momentum + slope / np.abs(slope).sum((1, 2, 3), keepdims=True)
        if norm == "linf":
            points = points + alpha * np.sign(momentum)
            points = np.clip(points, images - EPSILON, images + EPSILON)
        else:
            length = np.sqrt((momentum**2).sum((1, 2, 3), keepdims=True))
            points = points + alpha * momentum / length
            delta = points - images
            size = np.sqrt((delta**2).sum((1, 2, 3), keepdims=True))
            points = images + delta * np.minimum(1, EPSILON / size)
        points = np.clip(points, 0, 1)
    return points


class MimTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.images = rng.uniform(0, 1, (6, 4, 4, 3))
        self.labels = np.arange(6) % 5
        self.first = rng.normal(size=(48, 16)) * 2
        self.second = rng.normal(size=(16, 5)) * 2

    def gradient(self, points):
        """That of the cross-entropy of a network with one hidden layer, by hand."""
        hidden = np.tanh(points.reshape(len(points), -1) @ self.first)
        logits = hidden @ self.second
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        error = shares - np.eye(5)[self.labels]
        return ((error @ self.second.T) * (1 - hidden**2) @ self.first.T).reshape(points.shape)

    def network(self, points):
        flat = points.reshape(len(points), -1)
        return jnp.tanh(flat @ jnp.asarray(self.first, points.dtype)) @ jnp.asarray(
            self.second, points.dtype
        )

    @sweeps.rows(*itertools.product(("linf", "l2"), (0.0, 1.0)))
    def test_is_the_papers_algorithm(self, norm, decay):
        attack = attacks.mim(norm=norm, epsilon=EPSILON, steps=8, decay=decay)
        found = attack(self.network, None, jnp.asarray(self.images, jnp.float32), self.labels)
        expected = momentum_fgsm(self.gradient, self.images, norm, 8, decay)
        # float32 against float64; no component is so near 0 that its sign would turn.
        np.testing.assert_allclose(found, expected, atol=2e-6)

    def test_the_last_point_of_a_search_is_evaluated(self):
        setting = SimpleNamespace(norm="linf", steps=2)
        machine = importlib.import_module("jaxrobust.attacks.mim")._searching(setting, EPSILON)
        state, done = machine.init(jnp.full((1, 2, 2, 1), 0.5), jnp.zeros(1, jnp.int32)), []
        for _ in range(3):  # the image and the two points
            done.append(bool(machine.finished(state)[0]))
            state = machine.tell(state, None, None, jnp.ones((1, 2, 2, 1)))
        self.assertEqual((done, bool(machine.finished(state)[0])), ([False] * 3, True))

    def test_a_gradient_that_is_not_finite_is_none(self):
        """The step is along the momentum so far, which continues without it."""
        machine = mim_machine(norm="linf", epsilon=EPSILON, steps=3)
        state = machine.init(jnp.full((1, 2, 2, 1), 0.5), jnp.zeros(1, jnp.int32))
        usable = jnp.float32([1, -1, 1, -1]).reshape(1, 2, 2, 1)
        moved = []
        for gradient in (usable, usable.at[0, 0, 0, 0].set(jnp.nan), usable):
            state = machine.tell(state, None, None, gradient)
            moved.append(np.ravel((machine.query(state) - 0.5) / usable * 3 / EPSILON))
        np.testing.assert_allclose(moved, [[1] * 4, [2] * 4, [3] * 4], atol=1e-5)

    @sweeps.rows((None, [2, 4, 6, 6]), (0.03, [3, 6, 6, 6]), (0.01, [1, 2, 3, 4]))
    def test_the_length_of_a_step(self, step_size, hundredths):
        """A third of the radius unless it is given; the ball ends it."""
        machine = mim_machine(norm="linf", epsilon=0.06, steps=3, step_size=step_size)
        state = machine.init(jnp.full((1, 2, 2, 1), 0.5), jnp.zeros(1, jnp.int32))
        self.assertAlmostEqual(state.run.step.item(), hundredths[0] / 100, places=6)
        moved = []
        for _ in hundredths:
            state = machine.tell(state, None, None, jnp.full((1, 2, 2, 1), -1.0))
            moved.append(100 * (0.5 - np.asarray(machine.query(state))[0, 1, 1, 0]))
        np.testing.assert_allclose(moved, hundredths, atol=1e-4)

    def test_what_is_given_reaches_the_machine(self):
        how = {"norm": "l2", "epsilon": 0.5, "steps": 4, "step_size": 0.3, "decay": 0.25}
        how |= {"loss": "dlr", "kept_fraction": 0.1, "l1_rule": "exact"}
        module = importlib.import_module("jaxrobust.attacks.mim")  # not the function
        with (
            mock.patch.object(module, "mim_machine", return_value="machine") as made,
            mock.patch.object(module, "as_attack", return_value="attack") as whole,
        ):
            self.assertEqual(attacks.mim(**how, random_start=True), "attack")
        made.assert_called_once_with(**how)
        whole.assert_called_once_with("machine", random_start=True, info=False, gradient_steps=4)

    @sweeps.rows(-1.0, float("nan"), "1", None)
    def test_no_decay(self, decay):
        with self.assertRaisesRegex(ValueError, "decay="):
            attacks.mim(epsilon=EPSILON, steps=1, decay=decay)


class EverywhereTest(parameterized.TestCase):
    """What an attack needs next to its file: one import."""

    def test_one_file_and_one_import(self):
        package = paths.ROOT / "jaxrobust"
        named = {
            str(path.relative_to(package)): [
                line for line in path.read_text().splitlines() if re.search(r"\bmim\b", line)
            ]
            for path in package.rglob("*.py")
        }
        named = {path: lines for path, lines in named.items() if lines}
        # In the last one, so that a typo is refused before JAX is imported.
        files = ["attacks/mim.py", "attacks/__init__.py", "evaluation/questions/stated.py"]
        self.assertSameElements(named, files)
        self.assertLen(named["attacks/__init__.py"], 1)

    def test_training(self):
        config = tiny(attack__name="mim", attack__steps=3)
        images = jnp.asarray(IMAGES[:8])
        found = inner.training_attack(config, "adversarial")(NETS["lin"], None, images, LABELS[:8])
        expected = attacks.mim(epsilon=0.1, steps=3)(NETS["lin"], None, images, LABELS[:8])
        np.testing.assert_array_equal(found, expected)
        self.assertGreater(float(jnp.abs(found - images).max()), 0.09)
        forward = build.forward_flops(config)
        self.assertEqual(build.flops_per_image(config, "train"), (2 * 3 + 3) * forward)
        self.assertIsNotNone(inner.training_attack(config, "adversarial", extra_steps=3))
        config = tiny(attack__name="mim", attack__start="uniform")
        self.assertIsNotNone(inner.training_attack(config, "adversarial"))

    def test_a_radius_that_grows(self):
        config = tiny(attack__name="mim", attack__steps=2, attack__warmup_epochs=2)
        images, labels = jnp.asarray(IMAGES[:4]), LABELS[:4]
        attack = inner.training_attack(config, "adversarial")
        found = attack(NETS["lin"], None, images, labels, epsilon_share=jnp.float32(0.5))
        whole = attacks.mim(epsilon=0.05, steps=2, step_size=0.05)
        np.testing.assert_allclose(found, whole(NETS["lin"], None, images, labels), atol=1e-7)

    def test_doctor(self):
        plan = config_checks.PlannedRun(tiny(attack__name="mim", attack__step_size=0.01))
        look = next(own.look for own in config_checks.CONFIG_CHECKS if own.name == "step-rule")
        seen = look(plan)
        self.assertEqual(seen.level, RED)
        self.assertIn(
            "2 steps of 0.1 times attack.epsilon=0.1: the radius is never reached", seen.sentence
        )

    def test_estimate(self):
        config = tiny(evaluation__attack="mim-5")
        config.evaluation.unlock().steps = 2
        only = work.work(config)[-1]
        forward = build.forward_flops(config)
        flops = work.evaluation_flops(only, "evaluation")
        self.assertEqual(flops, (2 * 5 + 2) * forward * only.evaluated("evaluation"))

    def test_autoattacks_custom_version(self):
        result = autoattack(
            NETS["lin"],
            IMAGES[:16],
            LABELS[:16],
            norm="linf",
            epsilon=0.01,
            version="custom",
            attacks=("mim",),
            overrides={"mim": {"steps": 4}},
            batch_size=8,
            verbose=False,
        )
        self.assertTrue((result.clean & ~result.robust).any())
        attack = attacks.mim(epsilon=0.01, steps=4)
        last = attack(NETS["lin"], None, jnp.asarray(IMAGES[:16]), jnp.asarray(LABELS[:16]))
        falls = np.asarray(NETS["lin"](last)).argmax(1) != LABELS[:16]
        self.assertFalse((result.robust & falls).any(), "its last point is looked at too")
        record = result.record()
        self.assertEqual(record["costs"][0]["step_rule"], registry.ROWS["mim"].facts.rule)

    def test_what_a_record_says_of_a_training(self):
        config = tiny(attack__name="mim", pretrain__epochs=0)
        found = of_weights.training(
            [history.of_config(config, "train")], dataset="digits", split="test"
        )
        self.assertEqual((found["phases"][-1]["attack"], found["passes"]), ("mim", 3 * (1 + 2)))

    def test_names_that_a_message_lists(self):
        with self.assertRaisesRegex(ValueError, "unknown attack 'mom'; .*one of .*'mim'"):
            inner.training_attack(tiny(attack__name="mom"), "adversarial")
        self.assertIn("mim-K", registry.written())
        self.assertRegex(registry.described(registry.fixed), r"mim +FGSM with momentum")

    @sweeps.rows(
        ("clean", False),
        ("fgsm", False),
        ("pgd-20", False),
        ("pgd-x", False),
        ("mim-20", False),
        ("mim", True),
        ("mim,fab", True),
        ("standard", True),
        ("autoattack", True),
        ("apgd-ce,apgd-t", True),
    )
    def test_what_goes_image_by_image(self, attack, expected):
        self.assertEqual(fixed_steps.is_cascade(attack), expected)

    @sweeps.rows("fgsm-2", "pgd", "pgd-0", "pgd-1e3", "mim", "apgd-20", "nothing-3", "")
    def test_what_is_no_number_of_steps(self, attack):
        self.assertIsNone(registry.parse(attack))


class CommandTest(absltest.TestCase):
    def test_an_evaluation_of_twenty_steps(self):
        text = """
import numpy as np
WEIGHTS = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS
"""
        file, out = self.create_tempfile("net.py", text).full_path, Path(self.create_tempdir())
        how = {"function": f"{file}:logits_fn", "dataset": "digits", "epsilon": "0.1"}
        code, printed, said = evaluations.call(**how, attack="mim-20", n="16", out=str(out))
        self.assertEqual(code, 0, said)
        (record,) = records.read(out)
        attack = {"name": "mim", "norm": "linf", "epsilon": 0.1, "steps": 20, "start": "image"}
        self.assertEqual(record.attacks, [attack | {"step_size": 0.1 / 20}])
        (cost,) = record.costs
        self.assertEqual(cost["step_rule"], registry.ROWS["mim"].facts.rule)
        self.assertEqual((cost["forward"], cost["backward"]), (16 * 22, 16 * 20))
        self.assertIn("attack: mim-20, linf 0.1", printed)
        one = ReportedEvaluation("net", out / "results.jsonl", record, None, [], None, {})
        self.assertEqual(sentences.method(record), "mim-20")
        self.assertIn("--attack mim-20", " ".join(map(str, commands._attack(record))))
        self.assertIn("net", sentences.headline(one))


class AddTest(absltest.TestCase):
    """An attack of one's own."""

    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.dict(registry.ROWS))
        self.enter_context(mock.patch.dict(registry.MACHINES))
        facts = registry.ROWS["pgd"].facts._replace(machine="mine", rule="my own")

        def make(*, step_size=None, random_start, loss, l1_rule="sparse", **settings):
            del random_start
            return attacks.pgd(**settings, step_size=step_size, random_start=False, loss=loss)

        self.row = registry.NamedAttack(
            *("mine", "my own attack", facts),
            searches=registry.StandardSettings(number=1000, steps=3),
            fixed=registry.Fixed(start="image"),
            trains=True,
            make=make,
            length=1.0,
        )
        self.facts = facts

    def test_one_call(self):
        registry.add(self.facts, self.row)
        config = tiny(attack__name="mine")
        images, labels = jnp.asarray(IMAGES[:4]), jnp.asarray(LABELS[:4])
        found = inner.training_attack(config, "adversarial")(NETS["lin"], None, images, labels)
        expected = attacks.pgd(epsilon=0.1, steps=2, step_size=0.05, random_start=False)
        np.testing.assert_array_equal(found, expected(NETS["lin"], None, images, labels))
        self.assertEqual(registry.parse("mine-7"), (self.row, 7))
        self.assertEqual(registry.rule("mine-7"), "my own")
        self.assertEqual(attacks.passes("mine", 4), 8)
        self.assertIn("mine", registry.searching())

    def test_two_of_one_call_that_are_alike(self):
        before = dict(registry.ROWS), dict(registry.MACHINES)
        with self.assertRaisesRegex(ValueError, "an attack named mine already exists"):
            registry.add(self.facts, self.row, self.row._replace(searches=None))
        with self.assertRaisesRegex(
            ValueError, "attack other: number 1000 already belongs to mine.* as 1001"
        ):
            registry.add(self.facts, self.row, self.row._replace(name="other"))
        self.assertEqual((registry.ROWS, registry.MACHINES), before)
        searches = self.row.searches._replace(number=1001)
        registry.add(self.facts, self.row, self.row._replace(name="other", searches=searches))
        self.assertContainsSubset(["mine", "other"], registry.ROWS)

    def test_what_is_there_already(self):
        registry.add(self.facts, self.row)
        with self.assertRaisesRegex(ValueError, "an attack named mine already exists"):
            registry.add(self.facts, self.row)
        with self.assertRaisesRegex(ValueError, "so it needs `make`"):
            registry.add(self.facts, self.row._replace(name="third", searches=None, make=None))
