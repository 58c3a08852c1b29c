"""Lengths in pixels of [0, 1]: whatever can only be meant in 0..255 is refused with its remedy."""

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jaxrobust.configs import quickstart

from jaxrobust import attacks
from jaxrobust.doctor.patient import Patient
from jaxrobust.evaluation.engine import autoattack, smoothing
from jaxrobust.evaluation.questions import questions
from jaxrobust.papers import worst_case
from jaxrobust.papers.networks import analyses
from jaxrobust.results.configs import chosen_values
from jaxrobust.runtime.commandline import threats
from jaxrobust.training.run import best_weights
from jaxrobust.training.update import inner
from jaxrobust.types import Threat

IMAGES, LABELS = np.full((2, 8, 8, 1), 0.5, np.float32), np.zeros(2, np.int32)


def logits_fn(x):
    return x.reshape(len(x), -1)[:, :4]


def config(**keys):
    made = quickstart.get_config()
    for name, value in keys.items():
        section, key = name.split("__")
        made[section][key] = value
    return made


def checked(**keys):
    made = config(**keys)
    inner.check(made.attack, epochs=5, phase="train")
    return inner.training_attack(made, "adversarial")


PGD = {"attack__name": "pgd"}
GAUSS = PGD | {"attack__start": "gauss"}


# What takes a length, by its name; called with the length.
LENGTHS = {
    "epsilon of pgd": lambda v: attacks.pgd(epsilon=v, steps=2),
    "epsilon of an array": lambda v: attacks.pgd(epsilon=jnp.float32(v), steps=2),
    "epsilon of apgd": lambda v: attacks.apgd(epsilon=v, steps=2),
    "epsilon of fab": lambda v: attacks.fab(epsilon=v),
    "epsilon of square": lambda v: attacks.square(epsilon=v),
    "epsilon of fgsm": lambda v: attacks.fgsm(epsilon=v),
    "epsilon of mim": lambda v: attacks.mim(epsilon=v, steps=2),
    "step_size of pgd": lambda v: attacks.pgd(epsilon=0.1, steps=2, step_size=v),
    "step_size of fgsm": lambda v: attacks.fgsm(epsilon=0.1, step_size=v),
    "step_size of mim": lambda v: attacks.mim(epsilon=0.1, steps=2, step_size=v),
    "step_size of a machine": lambda v: attacks.pgd_machine(
        norm="linf", epsilon=0.1, steps=2, step_size=v
    ),
    "std": lambda v: attacks.pgd(
        epsilon=0.1, steps=2, random_start=attacks.Noise(normal=True, std=v)
    ),
    "std of l2": lambda v: attacks.pgd(
        norm="l2", epsilon=1.0, steps=2, random_start=attacks.Noise(normal=True, std=v)
    ),
    "epsilon of a threat": lambda v: Threat("linf", v),
    "epsilon of --threat": lambda v: threats.parse(f"linf:{v}"),
    "epsilon of --ladder": lambda v: threats.ladder(f"linf:0:{v}:3"),
    "epsilon of autoattack": lambda v: autoattack.autoattack(
        logits_fn, IMAGES, LABELS, norm="linf", epsilon=v
    ),
    "epsilon of worst_case": lambda v: worst_case.worst_case(
        logits_fn, IMAGES, LABELS, radii={"linf": v}
    ),
    "epsilon of doctor": lambda v: Patient(logits_fn, IMAGES, LABELS, Threat("linf", v)),
    "epsilon of new": lambda v: chosen_values._threat(
        chosen_values.NetworkChoice(norm="linf", epsilon=f"{v:g}"), 32
    ),
    "sigma": lambda v: smoothing.check(smoothing.Smoothing(v)),
    "--step": lambda v: questions._check_fixed(questions.GivenFlags(step=v), "linf"),
    "--step_size": lambda v: analyses.checked({"analysis": "synthesis", "step_size": v}, {}),
    "epsilon of a config": lambda v: checked(attack__epsilon=v),
    "attack.step_size": lambda v: checked(**PGD, attack__step_size=v),
    "attack.start_std": lambda v: checked(**GAUSS, attack__start_std=v),
    "evaluation.step_size": lambda v: best_weights.counter(
        config(evaluation__attack="pgd-10", evaluation__step_size=v), None
    ),
}
# Of other norms, whose balls are larger: as `epsilon` is taken there.
LARGER = {
    "epsilon of l2": lambda v: Threat("l2", v),
    "step_size of l2": lambda v: attacks.pgd(norm="l2", epsilon=v, steps=2, step_size=v),
    "step_size of l1": lambda v: attacks.pgd(norm="l1", epsilon=v, steps=2, step_size=v),
    "--step of l2": lambda v: questions._check_fixed(questions.GivenFlags(step=v), "l2"),
    "attack.step_size of l2": lambda v: checked(
        **PGD, attack__norm="l2", attack__epsilon=v, attack__step_size=v
    ),
}


class LengthsTest(parameterized.TestCase):
    @parameterized.product(name=tuple(LENGTHS), value=(2.0, 8.0, 64.0))
    def test_0_to_255_is_refused(self, name, value):
        own = name.split(" of ")[0]
        with self.assertRaises(ValueError) as raised:
            LENGTHS[name](value)
        said = f"{own}={value} is larger than the pixel range [0, 1]; write {value:g}/255"
        self.assertIn(said, str(raised.exception))

    def test_what_no_pixel_has_is_refused(self):
        with self.assertRaisesRegex(ValueError, "range .0, 1.; pass a value of at most 1$"):
            Threat("linf", 1e9)

    def test_other_norms_reach_further(self):
        for name in LARGER:
            with self.subTest(name=name):
                LARGER[name](3.0)
