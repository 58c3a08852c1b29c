"""Training against several norms at once: points, turns, costs, refusals, the union."""

import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.attacks import mixes
from jaxrobust.doctor import config_checks
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.records import of_weights, records
from jaxrobust.training import build
from jaxrobust.training.run import warnings
from jaxrobust.training.update import inner, objectives, step
from jaxrobust.training.update.memory import Remembering
from jaxrobust.types import Threat
from jaxrobust.weights.trained import history
from jaxrobust.zoo.objectives import several
from tests.support import rows, sweeps
from tests.support.runs import final_state, one_phase, quiet_run, stop_after
from tests.support.steps import batch_of, small_config, standard

NORMS = {"attack__norm": ("linf", "l2", "l1"), "attack__epsilon": (8 / 255, 0.5, 3.0)}
OF = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}
IMAGES = jnp.asarray(np.random.default_rng(0).random((6, 4, 4, 3)), jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 0, 1, 2], jnp.int32)
KEYS = attacks.image_keys(jax.random.key(1), 6)


def network(images):
    """Logits of some sums of pixels, bent, so that norms differ in what they find."""
    weights = jnp.sin(jnp.arange(images[0].size * 3.0) ** 1.3).reshape(-1, 3)
    return 3 * jnp.tanh(images.reshape(len(images), -1) @ weights)


def shift(seed):
    """An attack that adds noise, whatever the network and its keys."""
    noise = jnp.asarray(np.random.default_rng(seed).normal(size=IMAGES.shape), jnp.float32)
    return lambda logits_fn, keys, images, labels: (images + noise).clip(0, 1)


SHIFTS = (1, 2, 3)


class PointsTest(parameterized.TestCase):
    def test_worst_has_of_each_image_the_highest_loss(self):
        found = jnp.stack([shift(by)(None, None, IMAGES, None) for by in SHIFTS])
        losses = jnp.stack([attacks.ce_loss(network(own), LABELS) for own in found])
        best = losses.argmax(0)
        self.assertLen(set(np.asarray(best).tolist()), 3)  # else it shows less
        attack = several.mixed([*map(shift, SHIFTS)], "worst", "ce")
        expected = found[best, jnp.arange(6)]
        np.testing.assert_array_equal(attack(network, KEYS, IMAGES, LABELS), expected)

    def test_average_has_them_all(self):
        attack = several.mixed([*map(shift, SHIFTS)], "average", "ce")
        found = jnp.stack([shift(by)(None, None, IMAGES, None) for by in SHIFTS], axis=1)
        np.testing.assert_array_equal(attack(network, KEYS, IMAGES, LABELS), found)

    @sweeps.rows("alternate", "extreme")
    def test_a_turn_is_the_attack_of_one_norm(self, mix):
        attack = several.mixed([*map(shift, SHIFTS)], mix, "ce")
        for i, by in enumerate(SHIFTS):
            found = attack(network, KEYS, IMAGES, LABELS, turn=jnp.int32(i))
            np.testing.assert_array_equal(found, shift(by)(None, None, IMAGES, None))

    def test_the_norms_of_a_config_are_its_attacks(self):
        """Of extreme only linf and l1; the alarm, which takes no turns, is told the worst."""
        for mix, norms in (("worst", tuple(OF)), ("extreme", ("linf", "l1"))):
            config = small_config(**NORMS, attack__mix=mix)
            with mock.patch.object(several, "mixed") as mixed, rows.making("apgd") as made:
                inner.training_attack(config, "adversarial", extra_steps=2, mix="worst")
            made_of = [(call.kwargs["norm"], call.kwargs["epsilon"]) for call in made.mock_calls]
            self.assertEqual(made_of, [(norm, OF[norm]) for norm in norms])
            self.assertEqual({call.kwargs["steps"] for call in made.mock_calls}, {5})
            self.assertEqual(mixed.call_args.args[1:], ("worst", "ce"))

    def test_average_of_a_loss(self):
        one = objectives.adversarial()

        class Net:
            @staticmethod
            def apply(params, stats, images, *, train, key):
                return network(images), {"n": stats["n"] + 1}

        batch = step.Batch(IMAGES, LABELS)
        other = shift(1)(None, None, IMAGES, None)
        stacked = jnp.stack([IMAGES, other], axis=1)
        value, (stats, metrics) = several.averaged(one, 2).loss(
            Net, {}, {"n": 0}, batch, stacked, None
        )
        each = [one.loss(Net, {}, {"n": 0}, batch, x, None) for x in (IMAGES, other)]
        np.testing.assert_allclose(value, np.mean([each[0][0], each[1][0]]), rtol=1e-6)
        mean = np.mean([part[1][1]["robust"] for part in each])
        np.testing.assert_allclose(metrics["robust"], mean, rtol=1e-6)
        self.assertEqual(stats["n"], 2)


def phase_of(count=1, **changes):
    devices = jax.devices()[:count]
    return build.phase(small_config(**changes), "train", 64, devices=devices, donate=False)


class StepTest(absltest.TestCase):
    def test_one_norm_written_as_several_is_the_step_of_today(self):
        """The same program, so the same bits."""
        texts = []
        for norm, epsilon in (("l2", 0.5), (("l2",), (0.5,))):
            config = small_config(attack__norm=norm, attack__epsilon=epsilon)
            with standard():
                phase = build.phase(config, "train", 64)
                arguments = build.abstract_arguments(config, "train", phase)
                texts.append(phase.step.lower(*arguments).as_text())
        self.assertEqual(*texts)

    def test_extreme_remembers_and_chooses_by_errors(self):
        with standard():
            phase = phase_of(**NORMS, attack__mix="extreme")
            state, told = phase.init(jax.random.key(0)), []
            batch, control = batch_of(), build.control(phase.mesh)
            for _ in range(6):
                state, metrics = phase.step(state, batch, control)
                told.append({k: float(v) for k, v in metrics.items()})
        memory = state.opt_state.memory
        for i, norm in enumerate(("linf", "l1")):
            own = [1 - each["robust"] for each in told if each[f"trained_{norm}"]]
            self.assertEqual(int(memory["turns"][i]), len(own))
            np.testing.assert_allclose(memory["errors"][i], np.mean(own or [0.0]), rtol=1e-5)
        self.assertEqual([each["trained_linf"] + each["trained_l1"] for each in told], [1.0] * 6)

    @pytest.mark.slow
    def test_alternate_is_the_step_of_each_norm_in_turn(self):
        """From the same state, each update is that of a config of that norm alone."""
        with standard():
            both = {"attack__norm": ("linf", "l2"), "attack__epsilon": (8 / 255, 0.5)}
            phase = phase_of(**both, attack__mix="alternate")
            state = phase.init(jax.random.key(0))
            batch, control = batch_of(), build.control(phase.mesh)
            for norm in ("linf", "l2", "linf"):
                single = phase_of(attack__norm=norm, attack__epsilon=OF[norm])
                expected = single.step(state, batch, control)
                state, metrics = phase.step(state, batch, control)
                self.assertEqual(metrics[f"trained_{norm}"], 1)
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                    state.params,
                    expected[0].params,
                )


class TurnTest(absltest.TestCase):
    def test_probabilities_are_as_errors(self):
        config = small_config(**NORMS, attack__mix="extreme")
        memory = several.memory(config.attack)
        told = {"turns": jnp.array([3, 5]), "errors": jnp.array([0.6, 0.2])}

        def turns(**changes):
            held = several_state({**told, **changes})
            turn = jax.vmap(lambda i: memory.turn(held(i)))
            return float(turn(jnp.arange(4000)).mean())

        self.assertAlmostEqual(turns(), 0.25, delta=0.03)
        self.assertAlmostEqual(turns(turns=jnp.array([3, 0])), 0.5, delta=0.03)
        self.assertAlmostEqual(turns(errors=jnp.zeros(2)), 0.5, delta=0.03)
        self.assertEqual(turns(errors=jnp.array([0.3, 0.0])), 0)


def several_state(told):
    return lambda i: step.TrainState(i, {}, {}, {}, Remembering((), told), jax.random.key(0))


class CostTest(parameterized.TestCase):
    def test_passes(self):
        """APGD of 3 steps takes 7 passes, and an update 3."""
        plain = small_config().attack
        self.assertEqual(objectives.passes("adversarial", plain), 7 + 3)
        self.assertEqual(mixes.passes(plain, mix="worst"), 7)  # the alarm of one norm
        expected = {
            "worst": 3 * 7 + 3 + 3,  # and a look at each of the three points
            "average": 3 * 7 + 3 * 3,
            "alternate": 7 + 3,
            "extreme": 7 + 3,
            "pair": 2 * 7 + 2 * 3,  # of linf and l1
        }
        for mix, count in expected.items():
            own = small_config(**NORMS, attack__mix=mix).attack
            self.assertEqual(objectives.passes("adversarial", own), count, mix)
            self.assertEqual(objectives.passes("clean", own), 3)

    @parameterized.parameters("worst", "average", "alternate")
    def test_passes_are_those_that_are_made(self, mix):
        made = []

        def counted(images):
            made.append(1)
            return network(images)

        how = {"attack__norm": ("linf", "l2"), "attack__epsilon": (8 / 255, 0.5)}
        how |= {"attack__mix": mix, "attack__name": "pgd", "attack__steps": 1}
        attack = inner.training_attack(small_config(**how), "adversarial")
        turn = {"turn": jnp.int32(0)} if mix == "alternate" else {}
        attack(counted, KEYS, IMAGES, LABELS, **turn)
        looks = 2 if mix == "worst" else 0
        self.assertLen(made, 2 + looks)  # each norm's gradient is traced once
        passes = mixes.passes(small_config(**how).attack)
        self.assertEqual(passes, 2 * (1 if mix == "alternate" else 2) + looks)

    def test_a_record_counts_them_too(self):
        steps = {"worst": 3 * 3, "extreme": 3, "msd": 3 + 3 * 3 / 2, "pair": 2 * 3}
        for mix, count in steps.items():
            passes = math.ceil(3 * (1 + count))
            config = small_config(**NORMS, attack__mix=mix)
            facts = of_weights.training(
                [history.of_config(config, "train")], dataset="d", split="test"
            )
            self.assertEqual(facts["passes"], passes, mix)
            self.assertEqual(facts["phases"][-1]["mix"], mix)
            self.assertNotIn("at_once", facts["phases"][-1])

    def test_the_doctor_says_them(self):
        look = next(own.look for own in config_checks.CONFIG_CHECKS if own.name == "one-step")
        for mix, name, words in (
            ("worst", "apgd", "24 passes per step, and a single norm needs 7"),
            ("msd", "pgd", "15 passes per step, and a single norm needs 6"),
            ("pair", "apgd", "14 passes per step, and a single norm needs 7"),
        ):
            config = small_config(**NORMS, attack__mix=mix, attack__name=name)
            config.train.objective = "ramp" if mix == "pair" else "adversarial"
            expected = f"; {mix} of linf, l2, l1 attacks with {words}"
            self.assertEndsWith(look(config_checks.PlannedRun(config)).sentence, expected)


class GrowingTest(parameterized.TestCase):
    @parameterized.parameters("worst", "average", "alternate", "extreme")
    def test_radii_grow_alike_and_steps_stay(self, mix):
        """At half of the way each norm's attack has half its radius, and the whole one's step."""
        config = small_config(
            **NORMS, attack__mix=mix, attack__name="pgd", attack__start="random",
            attack__warmup_epochs=2,
        )  # fmt: skip
        norms = ("linf", "l1") if mix == "extreme" else tuple(OF)
        halves = [
            attacks.pgd(norm=n, epsilon=OF[n] / 2, steps=3, step_size=2.5 * OF[n] / 3)
            for n in norms
        ]
        takes_turns = mix in ("alternate", "extreme")  # here the last norm's
        turn = {"turn": jnp.int32(len(norms) - 1)} if takes_turns else {}
        attack = inner.training_attack(config, "adversarial")
        found = attack(network, KEYS, IMAGES, LABELS, epsilon_share=jnp.float32(0.5), **turn)
        expected = several.mixed(halves, mix, "ce")(network, KEYS, IMAGES, LABELS, **turn)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    @parameterized.parameters(("fgsm", "worst"), ("pgd", "msd"))
    def test_a_radius_of_0_stays_while_others_grow(self, name, mix):
        config = small_config(
            attack__norm=("linf", "l2"), attack__epsilon=(0.0, 0.5), attack__mix=mix,
            attack__name=name, attack__steps=1, attack__warmup_epochs=2,
        )  # fmt: skip
        attack = inner.training_attack(config, "adversarial")
        found = attack(network, KEYS, IMAGES, LABELS, epsilon_share=jnp.float32(0.5))
        far = jnp.sqrt(((found - IMAGES) ** 2).sum((1, 2, 3)))
        self.assertBetween(float(far.max()), 0.1, 0.25 + 1e-6)

    def test_a_step_for_each_norm(self):
        config = small_config(
            **NORMS, attack__mix="worst", attack__name="pgd", attack__step_size=(0.01, 0.2, 1)
        )
        with mock.patch.object(several, "mixed"), rows.making("pgd") as made:
            inner.training_attack(config, "adversarial")
        sizes = [call.kwargs["step_size"] for call in made.mock_calls]
        self.assertEqual(sizes, [0.01, 0.2, 1.0])
        said = warnings.of_step(config, "train")
        self.assertLen(said, 3)
        self.assertStartsWith(said[1], "attack.step_size=0.2 is 0.4 times attack.epsilon=0.5; set")

    @pytest.mark.slow
    def test_one_program(self):
        config = small_config(**NORMS, attack__mix="extreme", attack__warmup_epochs=1)
        with standard():
            phase = build.phase(config, "train", 64, devices=jax.devices()[:1], donate=False)
            state, batch = phase.init(jax.random.key(0)), batch_of()
            told = [
                phase.step(state, batch, build.control(phase.mesh, epsilon_share=share))[1]
                for share in (0.0, 0.5, 1.0)
            ]
        self.assertEqual(phase.step._cache_size(), 1)
        losses = [float(each["loss"]) for each in told]
        self.assertEqual(losses, sorted(set(losses)))


class RunTest(absltest.TestCase):
    @pytest.mark.slow
    def test_a_run_that_was_stopped_goes_on_in_its_turns(self):
        """The errors that extreme chooses by stand in the checkpoint, so the bits are the same."""
        self.enter_context(
            mock.patch.object(
                accuracy, "count", return_value={"clean": 0.5, "robust": 0.25, "images": 80}
            )
        )
        of_four = ([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0])
        each = [np.tile(bits, 20).astype(bool) for bits in of_four]
        clean, answers = (np.tile(row, 20) for row in ([True, True, True, False], [0, 1, 2, 3]))
        told = {"clean": clean, "answers": answers, "labels": answers}
        judged = [told | {"robust": robust & clean} for robust in each]
        self.enter_context(mock.patch.object(accuracy, "each", side_effect=judged * 2))
        folder = Path(self.create_tempdir())
        config = one_phase(
            **NORMS, train__epochs=3, attack__mix="extreme", attack__name="pgd", attack__steps=1,
            test__steps=1,
        )  # fmt: skip
        quiet_run(config, folder / "whole")
        stop_after(6, lambda: quiet_run(config, folder / "stopped"))
        quiet_run(config, folder / "stopped")
        whole, stopped = (final_state(folder / name, config)[0] for name in ("whole", "stopped"))
        self.assertEqual(int(whole.opt_state.memory["turns"].sum()), 12)
        states = (state._replace(key=jax.random.key_data(state.key)) for state in (whole, stopped))
        jax.tree.map(np.testing.assert_array_equal, *states)
        (record,) = records.read(folder / "whole")
        self.assertEqual([attack["norm"] for attack in record.attacks], list(OF))
        self.assertTrue(record.is_union)
        self.assertEqual((record.clean, record.robust), (0.75, 0.25))
        after = {"linf 0.03137": 0.5, "l2 0.5": 0.25, "l1 3": 0.25}
        self.assertEqual(record.accuracy_after, after)


ONE = {"norm": "linf", "epsilon": 0.1}
TWO = {"norm": ("linf", "l2"), "epsilon": (0.1, 0.5)}


class RefusalTest(parameterized.TestCase):
    @sweeps.rows(
        ({"epsilon": 8 / 255}, "norm=linf,l2,l1 and epsilon=.*: give one radius per norm"),
        ({"epsilon": (0.1, 0.5)}, "give one radius per norm, in the same order"),
        ({"norm": ("linf", "l2", "linf")}, "names linf twice; name it once"),
        ({"mix": None}, "names several norms; set attack.mix, which combines them"),
        ({"mix": "max"}, "attack.mix='max' must be one of 'worst', 'average', 'alternate', 'ext"),
        ({"step_size": 0.1}, "step_size=0.1 pixels would apply to all norms linf,l2,l1, .*; give"),
        (
            {"step_size": (0.1, 0.2)},
            "=0.1,0.2 does not match attack.norm=linf,l2,l1; give a step",
        ),
        ({"step_size": (0.1, 0.2, 0.0)}, "attack.step_size=0.0 must be above 0"),
        ({"start_std": 0.1}, "attack.start_std=0.1 pixels would apply to all norms"),
        ({"warmup_epochs": 1, "epsilon": (0.0, 0.0, 0.0)}, "has no effect with attack.epsilon=0"),
        (
            {"mix": "msd"},
            "needs the steps of attack.name='pgd', .*, but attack.name='apgd' st",
        ),
        (
            ONE | {"mix": "msd"},
            "attack.mix='msd' mixes several norms, but attack.norm=linf names one;",
        ),
        ({"mix": "msd", "norm": ("l2", "l2", "l1")}, "names l2 twice; name it once"),
        ({"mix": "msd", "epsilon": (0.1, 0.5)}, "give one radius per norm, in the same order"),
        (ONE, "attack.mix='worst' mixes several norms, but attack.norm=linf names one; list more"),
        (ONE | {"mix": "extreme"}, "chooses between linf and l1, but attack.norm=linf lacks one"),
        (
            TWO | {"mix": "extreme"},
            "between linf and l1, but attack.norm=linf,l2 lacks one of them",
        ),
    )
    def test_what_a_phase_refuses(self, changes, message):
        config = small_config(**NORMS, attack__mix="worst")
        config.attack.update(changes)
        with self.assertRaisesRegex(ValueError, message):
            build.phase(config, "train", 64)

    def test_where_one_is_meant(self):
        with self.assertRaisesRegex(ValueError, "linf 0.1, l2 0.5.*, but .* only one; choose one"):
            Threat.of(TWO)
        self.assertIsNone(Threat.only(TWO))
        self.assertEqual(Threat.only({"norm": ["l2"], "epsilon": [0.5]}), Threat("l2", 0.5))

    def test_types_of_a_config(self):
        config = small_config()
        for value, message in (
            (("a", 0.5), "each item of .* must be of type float"),
            ("a", "float"),
        ):
            with self.assertRaisesRegex(TypeError, message):
                config.attack.epsilon = value
        config.attack.epsilon = [1, 0.5]
        self.assertEqual(config.attack.epsilon, (1.0, 0.5))
        self.assertIsInstance(config.attack.epsilon[0], float)


class UnionTest(absltest.TestCase):
    def test_an_image_counts_when_it_withstands_all(self):
        labels = network(IMAGES).argmax(-1)
        searches = [shift(by) for by in (1, 2, 3)]
        stands = []
        for own in searches:
            found = own(network, KEYS, IMAGES, labels)
            stands.append(np.asarray(network(found).argmax(-1) == labels))
        union = accuracy.of_union(searches)(network, KEYS, IMAGES, labels)
        both = np.asarray(network(union).argmax(-1) == labels)
        np.testing.assert_array_equal(both, np.logical_and.reduce(stands))
        self.assertLess(both.sum(), min(one.sum() for one in stands))

    def test_of_one_norm_nothing_changes(self):
        search = mock.Mock()
        self.assertIs(accuracy.of_union([search]), search)
