"""Cost of a phase on chips that are not here, from operations and peaks, or by compilation."""

import functools
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust import models
from jaxrobust.config import Config, Values, attributes, network_of, plain
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.doctor.estimate.work import PhaseCost, PhaseWork, evaluation_flops
from jaxrobust.doctor.programs import topology
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.update import objectives, optim
from jaxrobust.training.update import step as training_step
from jaxrobust.training.update.memory import remembering

# Assumed minimum seconds of a step: its launch, and the transfer of its batch to the chips.
SHORTEST = 5e-3


def computed(
    work: PhaseWork, target: Target, *, utilisation: float, chips: list[Any] | None
) -> PhaseCost:
    """Estimate a phase at a share of the chips' peak, or at the roofline if that is slower.

    `chips`: from `topology.devices`, to compile the step for; None: do not compile.
    """
    assert target.chip is not None, "only listed chips have names"
    config, name = work.config, work.name
    check(work, target)
    figures: dict[str, Any]
    if chips is not None:
        say(f"{name}: compiling the step for {target.name} (minutes for a large network)")
        phase = build.phase(config, name, work.rows, devices=chips)
        arguments = build.abstract_arguments(config, name, phase)
        remedy = f"--batch {max(work.batch_size // target.chips // 2, 1)} or --fsdp 0"
        compiled = topology.compiled(phase.step, *arguments, remedy=remedy).figures
        images = work.batch_size / target.chips
        flops = build.flops_per_image(config, name) * images
        roofline = topology.roofline(compiled, target.chip, flops=flops, images=images)
        least = roofline["roofline_step_s"]
        memory, executed = topology.memory_of(compiled), compiled["flops_executable"] / images
        keys = (*topology.SECONDS, "roofline_step_s", "roofline_images_per_s_per_chip", "bound_by")
        figures = {"executed_flops_per_image": executed}
        figures["roofline"] = {key: roofline[key] for key in keys if key in roofline}
    else:
        least = 0.0
        activations = kept(config, name, images=work.batch_size // target.chips)
        memory, figures = state(work, target) + activations, {"activation_bytes": activations}
        if target.slices > 1:
            figures["network_bytes"] = sent = _sent_to_slices(config, target)
            figures["network_s"] = target.chip.network and sent / target.chip.network
            least = figures["network_s"] or 0.0
    cost = timed(work, target, utilisation=utilisation, least=least)
    return cost._replace(memory=memory, figures=figures)


def timed(work: PhaseWork, target: Target, *, utilisation: float, least: float = 0.0) -> PhaseCost:
    """Estimate the times of a phase, with `least` seconds per step, without its memory."""
    assert target.chip is not None, "only listed chips have names"
    images = work.batch_size / target.chips
    flops = build.flops_per_image(work.config, work.name) * images
    step = max(flops / (target.chip.flops * utilisation), least, SHORTEST)
    speed = target.chips * target.chip.flops * utilisation
    every = work.config.alarm.every_steps or 1
    return PhaseCost(
        step=step,
        probe=step * every * 0.01,  # the maximum that `alarm.check_cost` allows
        selection=evaluation_flops(work, "evaluation") / speed,
        test=evaluation_flops(work, "test") / (target.float32 * utilisation),
        memory=0,
        figures={},
    )


def state(work: PhaseWork, target: Target) -> int:
    """Count the bytes of a chip's state; raise a `ValueError` if they exceed its memory."""
    assert target.chip is not None, "only listed chips have names"
    count = state_bytes(work, work.config.mesh.fsdp or target.chips // target.slices)
    if count > target.chip.memory:
        raise ValueError(
            f"{work.name}: parameters, their average and the optimizer's state alone take "
            f"{count / 2**30:.1f} GiB of a chip that has {target.chip.memory / 2**30:.0f}; shard "
            "them with --fsdp 0"
        )
    return count


def kept(config: Config, name: str, *, images: int) -> int:
    """Count the bytes of activations that a phase's backward pass needs, in the traced network:
    about the memory of an update besides the state.

    A compiler keeps less if it fuses layers, and more if it copies; the attack's passes keep no
    more than this. `images`: per chip and step; with `microbatches` only one part counts.
    """
    model = json.dumps(plain(config.model), sort_keys=True)
    passes = 2 if objectives.named(config[name].objective).both else 1  # clean and attacked images
    return passes * _residual_bytes(model, images // config[name].microbatches)


@functools.cache  # the runs of a paper share networks
def _residual_bytes(model: str, images: int) -> int:
    config = attributes({"model": json.loads(model)})
    net, size = network_of(config), config.model.image_size
    params, stats = jax.eval_shape(net.init, jax.random.key(0))

    def backward(params: Any, stats: Any, x: Any) -> Any:
        def logits(params: Any) -> Any:
            return net.apply(params, stats, x, train=True, key=jax.random.key(0))[0]

        return jax.vjp(logits, params)[1]  # a tree of the residuals

    x = jax.ShapeDtypeStruct((images, size, size, config.model.in_channels), jnp.float32)
    residuals = jax.tree.leaves(jax.eval_shape(backward, params, stats, x))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)


def _sent_to_slices(config: Config, target: Target) -> float:
    """Return the bytes that a chip sends to other slices per step: gradients, summed in float32."""
    params, _ = jax.eval_shape(network_of(config).init, jax.random.key(0))
    gradients = 4 * sum(leaf.size for leaf in params.values())
    return topology.network_bytes(gradients * target.slices / target.chips, target.slices)


def check(work: PhaseWork, target: Target) -> None:
    """Raise training's errors for these chips."""
    config, name, size = work.config, work.name, work.batch_size
    chips, slices = target.chips, target.slices
    build.divides(size, chips, f"{name}.batch_size", slices=slices)
    for key in ("evaluation", "test"):
        build.divides(config[key].batch_size, chips, f"{key}.batch_size", slices=slices)
    if fsdp := config.mesh.fsdp:
        noun = "chips" if slices == 1 else "chips of a slice"
        sharding.check_groups(fsdp, chips // slices, noun)
    # Build a chip's share on one present device, for checks that do not depend on the number.
    share = json.loads(json.dumps(plain(config)), object_hook=Values)
    share["mesh"]["fsdp"], share[name]["batch_size"] = 1, size // chips
    build.phase(share, name, work.rows, devices=jax.devices()[:1])


def state_bytes(work: PhaseWork, shares: int) -> int:
    """Count the bytes of parameters, their average, the optimizer's state and the memory of steps
    on a device.

    `shares`: how many devices share them.
    """
    config, mask = work.config, models.decay_mask(work.config.model.name)
    per_epoch = work.rows // work.batch_size
    section = config[work.name]
    _, tx = optim.of_phase(section, work.name, decay_mask=mask, steps_per_epoch=per_epoch)
    setup = remembering(tx, build.memory_of(config, section, per_epoch))
    init = partial(training_step.init_state, network_of(config), setup)
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    arrays = (leaf for leaf in leaves if leaf.dtype in (jnp.float32, jnp.int32))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    return total // shares
