"""What standard AutoAttack costs on the network that a config makes: passes, and their seconds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks.machine import Setting
from jaxrobust.config import Config, network_of
from jaxrobust.evaluation import autoattack, engine, plan
from jaxrobust.models.inputs import cast
from jaxrobust.runtime.progress import say
from jaxrobust.training import build

# So much of each attack is measured, in slots that are all full.
_SHORT: dict[str, dict[str, int]] = {
    "apgd-ce": {"steps": 10},
    "apgd-t": {"steps": 10, "targets": 1},
    "fab-t": {"steps": 5, "targets": 1},
    "square": {"steps": 40},
}
_TINY = 1e-7  # a radius in which nothing is fooled


class Attacked(NamedTuple):
    """Passes per image of standard AutoAttack, by attack, and seconds of a pass."""

    passes: dict[str, int]  # of an image that is never fooled
    seconds: dict[str, float]  # of a pass of one image, on all devices together
    compile: float


def seconds_of(found: dict[str, Any], *, images: int, robust: float) -> float:
    """Return the seconds for so many images, a share of which is robust.

    An image that is fooled counts APGD-CE as a whole and nothing else, which is more than it takes
    where it falls at once, and less where only a later attack fools it.

    Args:
      found: `passes_per_image`, `pass_s` and `compile_s` of an account.
    """
    passes, seconds = found["passes_per_image"], found["pass_s"]
    each = {name: count * seconds[name] for name, count in passes.items()}
    first = next(iter(each.values()))
    attacking = images * (robust * sum(each.values()) + (1 - robust) * first)
    return attacking + found["compile_s"]


def computed(config: Config, *, flops_per_s: float) -> Attacked:
    """Return what chips take that are not here, at so many operations a second together."""
    passes = _passes(_settings(config), config)
    seconds = build.forward_flops(config) / flops_per_s  # backward to the image: the same
    return Attacked(passes, dict.fromkeys(passes, seconds), 0.0)


def measured(config: Config) -> Attacked:
    """Attack a network of random weights for a moment on all devices of this process.

    Its own answers are the labels and the radius is next to nothing, so that all slots stay full.
    """
    net, model = network_of(config, dtype="float32"), config.model
    params, stats = jax.jit(net.init)(jax.random.key(config.seed))
    params = cast(params, jnp.float32)
    logits_fn = jax.tree_util.Partial(lambda *p: net.apply(*p)[0], params, stats)
    slots = engine.make(logits_fn, image_size=model.image_size).slots
    shape = (slots, model.image_size, model.image_size, model.in_channels)
    images = np.random.default_rng(0).random(shape, np.float32)
    labels = np.asarray(jax.jit(logits_fn)(images)).argmax(-1)
    settings = _settings(config)
    say(f"AutoAttack: compiling and trying its {len(settings)} attacks on {slots} images")
    how: dict[str, Any] = {"norm": config.attack.norm, "epsilon": _TINY, "verbose": False}
    short = {name: _short(name, settings) for name in _passes(settings, config)}
    first = autoattack(logits_fn, images, labels, overrides=short, **how)
    again = autoattack(logits_fn, images, labels, overrides=short, **how)
    return Attacked(
        passes=_passes(settings, config),
        seconds={c.attack: c.seconds / max(c.forward + c.backward, 1) for c in again.costs},
        compile=sum(c.compile_seconds for c in first.costs),
    )


def _short(name: str, settings: list[Setting]) -> dict[str, int]:
    (setting,) = (s for s in settings if s.name == name)
    wanted = _SHORT[name] | {"restarts": 1}
    targets = {} if setting.targets else {"targets"}
    return {key: value for key, value in wanted.items() if key not in targets}


def _settings(config: Config) -> list[Setting]:
    settings = plan.plan(config.attack.norm, "standard", None, None)
    return [plan.fit(s, config.model.num_classes, lambda message: None) for s in settings]


def _passes(settings: list[Setting], config: Config) -> dict[str, int]:
    return {s.name: plan.most_passes(s, config.model.num_classes) for s in settings}
