"""The cost of standard AutoAttack on the network of a config: passes, waves, seconds.

The engine has a fixed number of slots (`evaluation.engine`). A job is one run of an attack on an
image: one target, one restart. So an attack on n images takes n x jobs / slots waves, rounded up.
Each wave costs as much as all slots, full or empty.
"""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import ensembles
from jaxrobust.attacks.registry import Setting
from jaxrobust.config import Config, network_of
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.schedule import Aims, Sample
from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.types import Threat, threats

_TINY = 1e-7  # a radius at which no image is fooled
# Share of APGD-CE that a fooled or misclassified image costs. In twelve evaluations of 1,000
# CIFAR-10 images (tools/records/cifar_study) APGD-CE fooled in 2 of 101 steps, APGD-T in 16 to 55.
FALLEN = 0.07


class Attacked(NamedTuple):
    """The cost of each attack in the engine, by its name."""

    slots: int  # on all devices together
    jobs_per_image: dict[str, int]  # for an image that is never fooled
    passes_per_image: dict[str, int]  # in all its jobs
    pass_s: dict[str, float]  # seconds of one pass in one slot, all devices together
    compile_s: float = 0.0  # of all programs
    once_s: float = 0.0  # of one-time work, such as the checks of the network


def seconds_of(estimate: dict[str, Any], *, images: int, robust: float) -> float:
    """Estimate AutoAttack's seconds on this many images with a `robust` share, from the figures
    of an account.
    """
    standing, slots, total = round(robust * images), estimate["slots"], 0.0
    for name, passes in estimate["passes_per_image"].items():
        jobs = estimate["jobs_per_image"][name]
        waves = math.ceil(standing * jobs / slots)
        total += waves * slots * passes / jobs * estimate["pass_s"][name]
    first, passes = next(iter(estimate["passes_per_image"].items()))
    fallen = (images - standing) * FALLEN * passes * estimate["pass_s"][first]
    return total + fallen + estimate["compile_s"] + estimate["once_s"]


def computed(config: Config, target: Target, *, utilisation: float) -> Attacked:
    """Estimate the time on chips that are not here, at an assumed share of their peak."""
    # The backward pass to the image counts the same.
    seconds = build.forward_flops(config) / (target.float32 * utilisation)
    settings = _settings(config)
    slots = engine.device_slots(target.kind, config.model.image_size) * target.chips
    return _attacked(config, settings, slots, dict.fromkeys((s.name for s in settings), seconds))


def measured(config: Config, *, seconds: float) -> Attacked:
    """Run each attack for `seconds` on random weights, with the programs of evaluation.

    The labels are the network's answers and the radius is tiny, so slots stay full.
    """
    net, model = network_of(config, dtype="float32"), config.model
    params, stats = jax.jit(net.init)(jax.random.key(config.seed))
    params = cast(params, jnp.dtype("float32"))
    logits_fn = jax.tree_util.Partial(lambda *p: net.apply(*p)[0], params, stats)
    shape = (16, model.image_size, model.image_size, model.in_channels)
    images = np.random.default_rng(0).random(shape, np.float32)
    labels = np.asarray(jax.jit(logits_fn)(images)).argmax(-1)
    settings = _settings(config)
    once = _once(logits_fn, images, labels, config)
    runner = engine.make(logits_fn, image_size=config.model.image_size)
    filled = np.arange(runner.slots) % len(images)
    images, labels = images[filled], labels[filled]
    say(f"AutoAttack: compiling and trying its {len(settings)} attacks on {runner.slots} slots")
    compiling, pass_s = 0.0, {}
    with jax.set_mesh(runner.mesh):
        runner = engine.trace(runner, images.shape[1:])
        for setting in settings:
            with patience.of(f"AutoAttack: compiling and measuring {setting.name}"):
                took, pass_s[setting.name] = _tried(runner, setting, images, labels, seconds)
            compiling += took
    return _attacked(config, settings, runner.slots, pass_s, compiling, once)


def _once(logits_fn: Any, images: np.ndarray, labels: np.ndarray, config: Config) -> float:
    """Time an evaluation without its attacks: the clean pass and the checks."""
    start = time.perf_counter()
    result = autoattack(
        logits_fn,
        images,
        labels,
        norm=threats(config.attack)[0].norm,
        epsilon=_TINY,
        attacks=("apgd-ce",),
        overrides={"apgd-ce": {"steps": 1, "restarts": 1}},
        verbose=False,
    )
    attacks = sum(cost.seconds + cost.compile_seconds for cost in result.costs)
    return time.perf_counter() - start - attacks


def _tried(
    runner: engine.Engine, setting: Setting, images: np.ndarray, labels: np.ndarray, seconds: float
) -> tuple[float, float]:
    number, classes = len(images), runner.traces[0].classes
    ranks = ensembles.ranks(engine.forward(runner, images), labels, max(setting.targets, 1))
    rows = (images, labels.astype(np.int32), np.arange(number, dtype=np.uint32))
    calls = engine.decide(
        runner,
        setting,
        Sample(*rows, np.ones(number, bool), ranks, classes, Threat(setting.norm, _TINY), seed=0),
        np.arange(number),
        Aims(ensembles.targets(setting, ranks)),
        confirm=lambda verdicts, last: [],
    )
    compiling, steps, spent = 0.0, 0, 0.0
    for call in calls:
        if call.compiles:
            compiling += call.seconds
        else:
            steps, spent = steps + call.slot_steps, spent + call.seconds
        if spent > seconds:
            break
    return compiling, spent / max(steps * ensembles.passes(setting, classes), 1)


def _settings(config: Config) -> list[Setting]:
    settings = ensembles.plan(threats(config.attack)[0].norm, "standard", None, None)
    return [ensembles.fit(s, config.model.num_classes, lambda message: None) for s in settings]


def _attacked(
    config: Config, settings: list[Setting], slots: int, pass_s: dict[str, float], *once: float
) -> Attacked:
    jobs = {s.name: s.restarts * max(s.targets, 1) for s in settings}
    passes = {s.name: ensembles.most_passes(s, config.model.num_classes) for s in settings}
    return Attacked(slots, jobs, passes, pass_s, *once)
