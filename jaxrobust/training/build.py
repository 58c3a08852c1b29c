"""Builds functions from a config, and makes every check that involves more than one part."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import attacks, models
from jaxrobust.attacks import mixes
from jaxrobust.config import (
    Config,
    PhaseSection,
    attributes,
    network_of,
    of_phase,
    phases,
    plain,
)
from jaxrobust.data.sources import generated
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.models.interface import classifier
from jaxrobust.models.kernels.cpu import rewriting
from jaxrobust.models.table import COUNTED, multiply_adds
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.devices import cpus, sharding, tpus
from jaxrobust.training.update import alarm, averages, inner, mixing, objectives, optim, step
from jaxrobust.training.update.attack_losses import check_loss
from jaxrobust.training.update.inner import training_attack
from jaxrobust.training.update.memory import NO_MEMORY, Memory, joined, remembering
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Batch, Classifier, Params, check_threat, threats


class Phase(NamedTuple):
    """A run of the optimizer, ready to compile; `step(state, batch, control)`."""

    net: Classifier
    mesh: jax.sharding.Mesh
    step: Callable[..., Any]
    abstract_state: step.TrainState  # with shardings
    init: Callable[[jax.Array], step.TrainState]
    state_of: Callable[..., step.TrainState]  # (key, params, stats): `init` without drawing weights
    total_steps: int
    steps_per_epoch: int
    schedule: Callable[[Any], jax.Array]
    bn_group: int  # images per group of batch statistics; 0: no batch norm


def mixes_and_erases(config: Config) -> tuple[float, ...]:
    """Return MixUp's and CutMix's parameters, the probability of erasing, and label smoothing.

    A None in the config means the value of the preset that `data.augmentation` names, or 0 for a
    chain that is not a preset.
    """
    preset = PRESETS.get(config.data.augmentation, PRESETS["none"])
    m, erase = config.mixup, config.erase
    values = (m.mixup, m.cutmix, erase.probability, config.label_smoothing)
    defaults = (preset.mixup, preset.cutmix, preset.erase, preset.label_smoothing)
    return tuple(b if a is None else a for a, b in zip(values, defaults, strict=True))


def batch_augmentation(config: Config, name: str, *, devices: int) -> mixing.BatchAugmentation:
    """Build the augmentation of a batch on the device, before the attack, in the phase `name`."""
    m, noise = config.mixup, config.erase.noise
    mixup, cutmix, erasing, smoothing = mixes_and_erases(config)
    fraction = "between 0 and 1"
    must_be("mixup.mixup", mixup, 0 <= mixup < math.inf, "at least 0 (0 turns it off)")
    must_be("mixup.cutmix", cutmix, 0 <= cutmix < math.inf, "at least 0 (0 turns it off)")
    must_be("mixup.switch", m.switch, 0 <= m.switch <= 1, fraction)
    must_be("mixup.probability", m.probability, 0 <= m.probability <= 1, fraction)
    must_be("mixup.group", m.group, m.group > 0 and m.group % 2 == 0, "even, at least 2")
    must_be("erase.probability", erasing, 0 <= erasing <= 1, fraction)
    must_be("label_smoothing", smoothing, 0 <= smoothing < 1, "at least 0 and below 1")
    one_of("erase.noise", noise, mixing.NOISES)
    images = config[name].batch_size // devices
    if (mixup or cutmix) and images % m.group:
        fits = [n for n in range(2, images + 1, 2) if images % n == 0]
        group = f"mixup.group={min(fits, key=lambda n: abs(n - m.group))} or " if fits else ""
        raise ValueError(
            f"mixup.group={m.group} does not divide the {images} images per device; use "
            f"{group}{name}.batch_size={max(round(images / m.group), 1) * m.group * devices}"
        )
    classes = config.model.num_classes
    settings = mixing.Mixing(classes, mixup, cutmix, m.switch, m.probability, m.group, smoothing)
    return mixing.batch_augmentation(settings, erasing=erasing, noise=noise)


def divides(batch_size: int, devices: int, key: str, *, slices: int = 1) -> None:
    """Reject a batch that cannot be split over the devices, and name the nearest sizes that can."""
    if batch_size < 1 or batch_size % devices:
        low = max(batch_size // devices, 1) * devices
        places = f"{slices} slices of {devices // slices}" if slices > 1 else devices
        raise ValueError(
            f"{key}={batch_size} cannot be split over {places} devices; use {low} or "
            f"{low + devices}"
        )


def check_phase(config: Config, name: str) -> None:
    """Reject values of the phase `name` that cannot work on any device."""
    p = config[name]
    row = objectives.named(p.objective)
    must_be(f"{name}.epochs", p.epochs, p.epochs >= 1, "at least 1 (0 leaves the phase out)")
    for key in row.weights:
        if key not in p:
            raise ValueError(
                f"{name}.objective={p.objective!r} needs {name}.{key}, which the config does not "
                f"set; add it as in phase({key}=..., ...)"
            )
        must_be(f"{name}.{key}", p[key], 0 <= p[key] < math.inf, "at least 0")
    must_be(f"{name}.l1", p.l1, 0 <= p.l1 < math.inf, "at least 0")
    must_be(f"{name}.microbatches", p.microbatches, p.microbatches >= 1, "at least 1")
    one_of(f"{name}.bn_statistics", p.bn_statistics, objectives.STATISTICS)
    if row.attacks:
        inner.check(config.attack, epochs=p.epochs, phase=name)
        for ball in threats(config.attack):
            check_threat(ball, config.model.image_size, config.model.in_channels)
        mixup, cutmix, _, smoothing = mixes_and_erases(config)
        soft = mixup or cutmix or smoothing or generated.soft_labels(config.data.get("extra"))
        soft = bool(soft) and config.attack.labels != "hard"
        check_loss(config.attack, p.objective, soft=soft, classes=config.model.num_classes)
    one_of("attack.statistics", config.attack.statistics, ("running", "batch"))
    if config.model.dtype == "float16":
        raise ValueError(
            "model.dtype='float16' is not supported in training: without loss scaling, gradients "
            "below 6e-8 become 0; set model.dtype='bfloat16' or 'float32'"
        )
    if row.displaces and config.model.dtype == "bfloat16":
        raise ValueError(
            f"{name}.objective={p.objective!r} perturbs weights by amounts that bfloat16 cannot "
            "represent; set model.dtype='float32'"
        )


def check_batch(config: Config, name: str, examples: int, mesh: jax.sharding.Mesh) -> None:
    """Reject a batch that devices, microbatches or norms cannot split, or the data cannot fill."""
    p = config[name]
    divides(p.batch_size, mesh.size, f"{name}.batch_size", slices=sharding.slices_of(mesh))
    images = p.batch_size // mesh.size
    if images % p.microbatches:
        raise ValueError(
            f"{name}.microbatches={p.microbatches} does not divide the {images} images per device; "
            f"use one of {[n for n in range(1, images + 1) if images % n == 0]}"
        )
    group = config.model.options.get("bn_group", 0)
    if group and images // p.microbatches % group:
        raise ValueError(
            f"model.options.bn_group={group} does not divide the {images // p.microbatches} "
            f"images per device; change bn_group, {name}.batch_size or {name}.microbatches"
        )
    if examples < p.batch_size:
        raise ValueError(
            f"{name}.batch_size={p.batch_size} exceeds the {examples} images of the split"
        )


def phase(
    config: Config,
    name: str,
    examples: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    donate: bool = True,
) -> Phase:
    """Build a phase ("pretrain" or "train") of a config for a split of `examples` images.

    Nothing is compiled and no array is created: the trainer, the benchmark and an ahead-of-time
    compiler lower exactly the same function.

    Raises:
      ValueError: settings that cannot work together; says what to set.
    """
    check_phase(config, name)
    p, net, mesh = config[name], network_of(config), mesh_of(config, devices)
    check_batch(config, name, examples, mesh)
    steps_per_epoch = examples // p.batch_size
    schedule, tx = optim.of_phase(
        p, name, decay_mask=models.decay_mask(config.model.name), steps_per_epoch=steps_per_epoch
    )
    memory = memory_of(config, p, steps_per_epoch)
    optimizer = remembering(tx, memory)
    init = partial(step.init_state, net, optimizer)
    shapes = jax.eval_shape(init, jax.random.key(0))
    if p.l1 and not objectives.kernels(shapes.params):
        raise ValueError(f"{name}.l1={p.l1}: no weights are named 'kernel'; set {name}.l1=0")

    spread, platform = sharding.spread(mesh, shapes.params), mesh.devices.flat[0].platform
    gradient_parts = _gradient_parts(config, name, _training_network(net, p, name), spread)
    cpu_parts = {}
    if platform == "cpu":
        gradient_parts = gradient_parts._replace(prepare_for_attack=rewriting.ready)
        cpu_parts = {"to_rows": step.in_rows}
    device_gradients = partial(
        step.device_gradients, parts=gradient_parts, spread=spread, microbatches=p.microbatches
    )
    parts = step.StepParts(
        augment=batch_augmentation(config, name, devices=mesh.size),
        attack_options=_attack_options(config, p, memory),
        device_gradients=spread.each(device_gradients, copies=2, split=2, gradients=True),
        optimizer=optimizer,
        update_ema=averages.averaging(p, name, steps_per_epoch=steps_per_epoch),
        update_batch_stats=averages.running_statistics(p, name),
        memory=memory,
        global_norm=step.norm_in_rows if mesh.shape[sharding.FSDP] == 1 else spread.norm,
        **cpu_parts,
    )
    placed, copied = sharding.of_state(mesh, shapes), sharding.replicated(mesh)
    has_batch_norms = bool(step.without_normalisation(shapes.stats))
    at_a_time = p.batch_size // mesh.size // p.microbatches
    return Phase(
        net=net,
        mesh=mesh,
        step=jax.jit(
            partial(step.train_step, parts=parts),
            in_shardings=(placed, *_input_shardings(mesh)),
            out_shardings=(placed, copied),
            donate_argnums=(0,) if donate else (),
            compiler_options=cpus.step_options(platform) or tpus.step_options(mesh),
        ),
        abstract_state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            placed,
        ),
        init=jax.jit(init, out_shardings=placed),
        state_of=jax.jit(partial(step.state_of, optimizer), out_shardings=placed),
        total_steps=p.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        bn_group=(config.model.options.get("bn_group", 0) or at_a_time) if has_batch_norms else 0,
    )


def memory_of(config: Config, p: PhaseSection, steps_per_epoch: int) -> Memory:
    """Build a step's memory: which norm's turn it is, and what its objective stores."""
    row = objectives.named(p.objective)
    memories = []
    if row.attacks and mixes.is_mixed(config.attack):
        memories.append(inner.several_norms("memory")(config.attack))
    if row.remembers:
        memories.append(row.remembers(config.model.num_classes, steps_per_epoch))
    return joined(memories)


def _gradient_parts(
    config: Config, name: str, net: Classifier, spread: sharding.Spread
) -> step.GradientParts:
    p, attack = config[name], config.attack
    row = objectives.named(p.objective)
    objective = row.make(p, attack)
    if row.attacks and not row.pairs and (count := mixes.updates(attack)) > 1:
        objective = inner.several_norms("averaged")(objective, count)
    return step.GradientParts(
        net=net,
        attack=training_attack(config, p.objective),
        objective=objectives.sparse(objective, p.l1) if p.l1 else objective,
        attack_in_train_mode=attack.statistics == "batch",
        dtype=jnp.dtype(config.model.dtype),
        mean_over_devices=spread.mean,
    )


def _attack_options(config: Config, p: PhaseSection, memory: Memory) -> Callable[..., Any]:
    grows = objectives.named(p.objective).attacks and inner.grows(config.attack)

    def options(state: step.TrainState, control: step.Control) -> dict[str, Any]:
        options = {"epsilon_share": control.epsilon_share} if grows else {}
        return options if memory.turn is None else options | {"turn": memory.turn(state)}

    return options


def _training_network(net: Classifier, p: PhaseSection, name: str) -> Classifier:
    """Choose the network that returns its images' statistics, if the phase moves running ones, and
    that omits a helper network's arrays, if its objective has one.
    """
    if helped := objectives.named(p.objective).helped:
        net = helped(net)
    if not p.bn_momentum:
        return net
    if (showing := classifier.showing_batches(net)) is None:
        raise ValueError(
            f"{name}.bn_momentum={tuple(p.bn_momentum)} has no effect on your own network; set the "
            f"momentum in your function, and set {name}.bn_momentum=()"
        )
    return showing


def _input_shardings(mesh: jax.sharding.Mesh) -> Any:
    """Return the shardings of a step's batch and its `Control`."""
    split, copied = sharding.by_image(mesh), sharding.replicated(mesh)
    return split, step.Control(split, copied, copied)  # type: ignore[arg-type]


def probe(config: Config, name: str, phase: Phase) -> Callable[..., Any] | None:
    """Build `alarm.probe` on some images per device: (state, batch, control) -> figures."""
    p, every = config[name], config.alarm.every_steps
    if not (objectives.named(p.objective).attacks and every):
        return None
    devices = phase.mesh.size
    images = max(min(config.alarm.images, p.batch_size) // devices, 1)
    alarm.check_cost(config, name, images=images * devices)
    spread = sharding.spread(phase.mesh, phase.abstract_state.params)
    weaker, stronger = (
        training_attack(config, p.objective, extra_steps=n, mix=alarm.MIX)
        for n in (0, alarm.STRONGER)
    )
    look = partial(
        alarm.probe,
        parts=_gradient_parts(config, name, phase.net, spread)._replace(attack=weaker),
        net32=network_of(config, dtype="float32"),
        stronger_attack=stronger,
    )

    def of_device(params: Params, stats: Params, options: Any, batch: Batch, keys: Any) -> Any:
        batch, keys = jax.tree.map(lambda x: x[:images], (batch, keys))
        return look(spread.gather(params), stats, options, batch, keys)

    attack_options = _attack_options(config, p, NO_MEMORY)

    def of_state(state: step.TrainState, batch: Batch, control: step.Control) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        keys = attacks.image_keys(key, batch.images.shape[0])
        options = attack_options(state, control)
        measure = spread.each(of_device, copies=2, split=2)
        return measure(state.params, state.stats, options, batch, keys)

    placed = jax.tree.map(lambda leaf: leaf.sharding, phase.abstract_state)
    return jax.jit(of_state, in_shardings=(placed, *_input_shardings(phase.mesh)))


def one_device(config: Config, cores: int) -> str | None:
    """Say why training on CPU should not use a device per core; None: it should.

    Its images must split evenly, and no batch norm may notice that a device has fewer; a user's
    network may contain batch norms.
    """
    for name in phases(config):
        phase_config, p = of_phase(config, name), config[name]
        mixes = any(mixes_and_erases(phase_config)[:2])
        group = math.lcm(max(p.microbatches, 1), max(phase_config.mixup.group, 1) if mixes else 1)
        if p.batch_size % (cores * group):
            fits = [n for n in range(2, cores) if p.batch_size % (n * group) == 0]
            remedy = (
                (f"; set JAX_NUM_CPU_DEVICES={fits[-1]} to use {fits[-1]} devices") if fits else ""
            )
            return f"{name}.batch_size={p.batch_size} cannot be split evenly{remedy}"
        model = phase_config.model.name
        uncounted = functions.is_name(model) or model in models.available()
        if "BN" in COUNTED[model][3] if model in COUNTED else uncounted:
            return (
                f"batch norms of {model} would see {p.batch_size // cores} images at a time; set "
                f"JAX_NUM_CPU_DEVICES={cores} to allow this, which is often faster"
            )
    return None


def mesh_of(config: Config, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Make the mesh specified by a config."""
    return sharding.make_mesh(devices, fsdp=config.mesh.fsdp)


def control(
    mesh: jax.sharding.Mesh, *, stop: int = 0, lr_scale: float = 1.0, epsilon_share: float = 1.0
) -> step.Control:
    """Collect this host's inputs to a step."""
    here = np.full(len(mesh.local_devices), stop, np.int32)

    def everywhere(number: float) -> jax.Array:
        # Not `device_put`, which asks the other hosts for theirs; they may not be stopping yet.
        value, placed = np.float32(number), sharding.replicated(mesh)
        return jax.make_array_from_callback((), placed, lambda index: value)

    numbers = everywhere(lr_scale), everywhere(epsilon_share)
    return step.Control(sharding.global_arrays(mesh, here), *numbers)


def flops_per_image(config: Config, name: str) -> float:
    """Count the operations per training image for model FLOP utilization, without recomputation.

    With F for a forward pass: the attack counts as in `attacks.passes`, the update as 3 F. TRADES
    updates on two images and computes the clean probabilities first; MART skips the latter.
    """
    return objectives.passes(config[name].objective, config.attack) * forward_flops(config)


def forward_flops(config: Config) -> float:
    """Count the operations of a forward pass per image."""
    model = config.model
    sizes = (model.num_classes, model.image_size, model.in_channels)
    if model.name in COUNTED and not model.options:
        of = models.member(model.name)
        if sizes == (of.num_classes, of.counted_at, 3):
            return 2.0 * COUNTED[model.name][1]
    return _forward_flops(json.dumps(plain(model), sort_keys=True))


@functools.cache  # one estimate asks five times, and the runs of a paper share networks
def _forward_flops(model: str) -> float:
    config = attributes({"model": json.loads(model)})
    net = network_of(config)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    size, channels = config.model.image_size, config.model.in_channels
    return 2.0 * multiply_adds(net, params, stats, image_size=size, in_channels=channels)


def abstract_arguments(config: Config, name: str, phase: Phase) -> tuple[Any, ...]:
    """List the shapes and types of the arguments of a phase's step."""
    stop = jax.ShapeDtypeStruct((phase.mesh.size,), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    control = step.Control(stop, number, number)  # type: ignore[arg-type]
    return phase.abstract_state, abstract_batch(config, name), control


def abstract_batch(config: Config, name: str) -> Any:
    """Describe the shapes and types of a phase's global batch, as a `Batch`."""
    size, side = config[name].batch_size, config.model.image_size
    images = jax.ShapeDtypeStruct((size, side, side, config.model.in_channels), jnp.uint8)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    if generated.soft_labels(config.data.get("extra")):
        labels = jax.ShapeDtypeStruct((size, config.model.num_classes), jnp.float32)
    return Batch(images, labels)  # type: ignore[arg-type]


def evaluation(
    config: Config,
    mesh: jax.sharding.Mesh,
    *,
    steps: int,
    dtype: str | None = None,
    top5: bool = False,
) -> accuracy.Counter:
    """Build `(params, stats, images, labels, mask, ids, key) -> counts` under APGD-CE; with several
    norms an image counts as robust if it withstands all.
    """
    searches = [accuracy.apgd_ce(ball, steps=steps) for ball in threats(config.attack)]
    attack = accuracy.of_union(searches)
    net = network_of(config, dtype=dtype)
    dtype = dtype or config.model.dtype
    return accuracy.counter(net, attack, mesh=mesh, dtype=dtype, top5=top5)
