"""Checks of a config before training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import mixes
from jaxrobust.attacks import registry as attack_rows
from jaxrobust.config import AttackSection, Config, network_of, of_phase, phases
from jaxrobust.data import DataError
from jaxrobust.data.sources import registry
from jaxrobust.data.splits.known_sizes import known_images
from jaxrobust.data.stream.loading import DecodedImages
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, Check, CheckResult
from jaxrobust.evaluation.network import tracing
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.training import build
from jaxrobust.training.run import splits, warnings
from jaxrobust.training.update import inner, objectives
from jaxrobust.training.update.value_checks import must_be
from jaxrobust.types import Classifier, Threat
from jaxrobust.weights.naming.compose import NORMALIZATIONS

_ONE_STEP = 8 / 255  # L-inf radius from which one-step training is known to overfit
_LOOKED_AT = 32  # images whose sizes are read


@dataclass(frozen=True)
class PlannedRun:
    """A config, and the number of devices to train on."""

    config: Config
    devices: int = 1

    @cached_property
    def phases(self) -> dict[str, Config]:
        """The config of each phase that runs."""
        return {name: of_phase(self.config, name) for name in phases(self.config)}

    @property
    def attacked(self) -> dict[str, Config]:
        """The phases that train against an attack."""
        phases = self.phases.items()
        return {n: c for n, c in phases if objectives.named(c[n].objective).attacks}

    @cached_property
    def source(self) -> Any:
        """The opened training split, or a sentence on why it cannot be opened."""
        data = self.config.data
        try:
            return registry.open_source(
                data.name,
                data.train_split,
                data_dir=data.dir,
                classes=data.get("classes"),
                num_classes=self.config.model.num_classes,
            ).for_channels(self.config.model.in_channels)
        except (DataError, ValueError, OSError) as error:
            return str(error)

    def steps(self, name: str) -> int | None:
        """Count the steps of a phase; None if the number of images is unknown."""
        planned, data = self.phases[name], self.phases[name].data
        if isinstance(self.source, str):
            is_complete = data.get("classes") is None and data.extra is None
            images = known_images(data.name, data.train_split) if is_complete else data.epoch_images
        else:
            images = splits.examples(planned, name, self.source)
        if images is None:
            return None
        return planned[name].epochs * (images // planned[name].batch_size)

    @cached_property
    def side(self) -> int:
        """The shorter side of the images in pixels; with several sizes, the median."""
        if shape := self.source.image_shape:
            return min(shape[:2])
        places = np.linspace(0, len(self.source) - 1, min(_LOOKED_AT, len(self.source)))
        images = DecodedImages(self.source, 0, False)(sorted(set(places.astype(int).tolist())))
        return int(np.median([min(image.shape[:2]) for image, _ in images if image is not None]))

    @cached_property
    def net(self) -> Classifier:
        """The network of the config."""
        return network_of(self.config)


Look = Callable[[PlannedRun], CheckResult]


def _of_phases(
    look: Callable[[PlannedRun, str, Config], CheckResult], *, attacked: bool = False
) -> Look:
    """Check each phase, or each attacking one; the worst counts, else the first or last."""

    def looks(plan: PlannedRun) -> CheckResult:
        if attacked and not plan.attacked:
            return CheckResult(SKIPPED, "nothing is attacked")
        phases = plan.attacked if attacked else plan.phases
        results = [look(plan, name, config) for name, config in phases.items()]
        bad = (r for level in (RED, YELLOW, SKIPPED) for r in results if r.level == level)
        return next(bad, results[0] if attacked else results[-1])

    return looks


def _heavy(plan: PlannedRun) -> CheckResult:
    first, planned = next(iter(plan.phases.items()))
    start, chain = plan.config.init.weights or "random weights", planned.data.augmentation
    sentence = f"{first} starts from {start} under data.augmentation={chain}"
    try:
        warnings.check_start(planned, first)
    except ValueError as error:
        remedy = str(error).partition("; ")[2]
        return CheckResult(RED, f"{sentence}, and attacks from the start", chain, remedy=remedy)
    return CheckResult(GREEN, sentence, chain)


def _worst_norm(
    look: Callable[[str, Config, AttackSection], CheckResult],
) -> Callable[[PlannedRun, str, Config], CheckResult]:
    """Check each norm's attack separately, and return the worst result."""

    def looks(plan: PlannedRun, name: str, planned: Config) -> CheckResult:
        a, norms = planned.attack, inner.by_norm(planned.attack)
        results = [look(name, planned, alone) for alone in norms]
        worst = min(results, key=lambda result: (RED, YELLOW, SKIPPED, GREEN).index(result.level))
        if len(norms) == 1:
            return worst
        passes = f"{mixes.described(a)} attacks with {mixes.passes(a)} passes per step, and "
        passes += f"a single norm needs {mixes.passes(norms[0])}"
        return worst._replace(sentence=f"{worst.sentence}; {passes}")

    return looks


def _step(name: str, planned: Config, a: AttackSection) -> CheckResult:
    doubts = warnings.of_step(planned, name)
    size = inner.step_of(a)
    row = attack_rows.trained(a.name)
    epsilon = Threat.of(a).epsilon
    if row.length is None or size is None or not epsilon:
        sentence = f"{name}: {a.name} chooses its steps itself"
        return CheckResult(YELLOW, doubts[0]) if doubts else CheckResult(GREEN, sentence)
    steps = row.steps(a.steps)
    share = size / epsilon
    sentence = f"{name}: {counted(steps, 'step')} of {share:.3g} times attack.epsilon={epsilon:.4g}"
    if share * steps < 1 - 1e-6:
        return CheckResult(RED, f"{sentence}: the radius is never reached", share)
    if share > 2 + 1e-6:
        return CheckResult(RED, f"{sentence}: each step overshoots the ball", share)
    return CheckResult(YELLOW, doubts[0], share) if doubts else CheckResult(GREEN, sentence, share)


def _one_step(name: str, planned: Config, a: AttackSection) -> CheckResult:
    epsilon = Threat.of(a).epsilon
    steps = attack_rows.trained(a.name).steps(a.steps)
    sentence = f"{name}: {counted(steps, 'step')} of {a.name} at {a.norm} {epsilon:.4g}"
    wide = a.norm == "linf" and epsilon >= _ONE_STEP - 1e-6
    level = GREEN if steps > 1 or not wide else YELLOW if a.start == "random" else RED
    return CheckResult(level, f"{sentence}, start={a.start}", steps)


def _constants(plan: PlannedRun) -> list[str]:
    size, channels = plan.config.model.image_size, plan.config.model.in_channels
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    params, stats = jax.eval_shape(plan.net.init, jax.random.key(0))
    program = jax.make_jaxpr(lambda p, s, x: plan.net.apply(p, s, x)[0])(params, stats, image)
    small = [np.asarray(c) for c in tracing.constants(program) if np.size(c) == 3]
    real = [c.astype(float).ravel() for c in small if jnp.issubdtype(c.dtype, jnp.floating)]
    matches = []
    for name, (mean, _) in NORMALIZATIONS.items():
        scaled = [scale * np.asarray(mean) for scale in (1, 255, -1) if len(mean) == 3]
        if any(np.allclose(v, one, rtol=1e-3) for v in real for one in scaled):
            matches.append(name)
    return matches


def _twice(plan: PlannedRun) -> CheckResult:
    normalize = plan.config.init.normalize
    if not functions.is_name(plan.config.model.name):
        sentence = "the network is built in, and normalizes only in its first layer"
        return CheckResult(GREEN, f"init.normalize={normalize}: {sentence}", normalize)
    inside = _constants(plan)
    sentence = f"init.normalize={normalize}, and {plan.config.model.name} "
    sentence += f"contains the mean of {', '.join(inside)}" if inside else "contains no known mean"
    return CheckResult(
        RED if inside and normalize not in ("keep", "none") else GREEN, sentence, inside
    )


def _statistics(plan: PlannedRun, name: str, planned: Config) -> CheckResult:
    objective, statistics = planned[name].objective, planned.attack.statistics
    sentence = f"{name}: objective={objective}, attack.statistics={statistics}"
    both = objectives.named(objective).of_probabilities and planned[name].bn_statistics == "both"
    if not both or statistics != "batch":
        return CheckResult(GREEN, sentence, statistics)
    _, stats = jax.eval_shape(plan.net.init, jax.random.key(0))
    norms = any(not key.startswith("normalize.") for key in stats)
    sentence += ", with batch norm" if norms else ", and no batch norm in the network"
    return CheckResult(YELLOW if norms else GREEN, sentence, statistics)


def _ema(plan: PlannedRun, name: str, planned: Config) -> CheckResult:
    steps, decay = plan.steps(name), planned[name].ema_decay
    if planned.evaluation.weights == "raw":
        return CheckResult(GREEN, f"{name}: evaluation.weights=raw, so the average is not used")
    if steps is None:
        return CheckResult(SKIPPED, f"the number of steps is unknown: {plan.source}")
    horizon, start_share = 1 / (1 - decay), decay**steps
    sentence = f"{name}: ema_decay={decay:g} averages {horizon:.0f} of {steps} steps"
    sentence += f", and {start_share:.1%} of the average comes from the start"
    level = RED if horizon > steps else YELLOW if start_share > 0.2 else GREEN
    wanted = f"set {name}.ema_decay={max(1 - 10 / max(steps, 1), 0):.3g} or lower"
    return CheckResult(level, sentence, {"horizon": horizon, "steps": steps}, remedy=wanted)


def _warmup(plan: PlannedRun, name: str, planned: Config) -> CheckResult:
    epochs = planned[name].epochs
    rates = {f"{name}.warmup_epochs": planned[name].warmup_epochs}
    if name in plan.attacked:
        rates["attack.warmup_epochs"] = planned.attack.warmup_epochs
        if delay := planned.attack.delay_epochs:
            rates["attack.delay_epochs"] = delay
    sentence = f"{name}: {', '.join(f'{k}={v}' for k, v in rates.items())} of {epochs} epochs"
    late = sum(count for key, count in rates.items() if key.startswith("attack."))
    longest = max(planned[name].warmup_epochs, late)
    level = RED if longest >= epochs else YELLOW if longest > epochs / 2 else GREEN
    return CheckResult(level, sentence, longest / epochs)


def _batch(plan: PlannedRun, name: str, planned: Config) -> CheckResult:
    changed, fitted = warnings.fitted_batches(plan.config, plan.devices)
    planned = of_phase(changed, name)
    size, fsdp, parts = planned[name].batch_size, plan.config.mesh.fsdp, planned[name].microbatches
    try:
        must_be(f"{name}.microbatches", parts, parts >= 1, "at least 1; set it to 1")
        build.divides(size, plan.devices, f"{name}.batch_size")
        build.divides(plan.devices, fsdp or plan.devices, "the number of devices")
        build.divides(size // plan.devices, parts, "a device's images")
        build.batch_augmentation(planned, name, devices=plan.devices)
    except ValueError as error:
        wrong, _, remedy = str(error).partition("; ")
        return CheckResult(RED, wrong, size, remedy=remedy or None)
    if sentence := next((line for line in fitted if line.startswith(f"{name}.")), None):
        return CheckResult(YELLOW, sentence, size)
    return CheckResult(
        GREEN, f"{name}.batch_size={size} over {counted(plan.devices, 'device')}", size
    )


def _size(plan: PlannedRun, name: str, planned: Config) -> CheckResult:
    if isinstance(plan.source, str):
        return CheckResult(SKIPPED, f"the images cannot be read: {plan.source}")
    channels, model = plan.source.channels, planned.model
    if channels != model.in_channels:
        sentence = f"images of {plan.config.data.name} have {counted(channels, 'channel')}, but "
        sentence += f"the network expects {model.in_channels}"
        cause = "training rejects images with a different number of channels"
        remedy = f"set model.in_channels={channels}"
        return CheckResult(RED, sentence, channels, cause, remedy)
    side, size = plan.side, model.image_size
    sentence = f"{name}: {plan.config.data.name} has images of {side} px; the network takes {size}"
    level = GREEN if side >= size else RED if side < 0.8 * size else YELLOW
    return CheckResult(level, sentence, {"images": side, "network": size})


CONFIG_CHECKS: tuple[Check[PlannedRun], ...] = (
    Check(
        "heavy-augmentation",
        "Whether the first phase attacks random weights under heavy augmentation; red if so.",
        "random weights do not learn from an attack and heavy augmentation at once",
        "start from clean weights, add clean epochs, or set data.augmentation=basic",
        "Singh, Croce, Hein 2023, arXiv 2303.01870",
        _heavy,
    ),
    Check(
        "step-rule",
        "Step size relative to the radius; red if all steps together do not reach the radius or "
        "one step is more than twice the radius, yellow if the step is given in pixels.",
        "the step size was chosen for a different radius",
        "leave attack.step_size out and set attack.relative_step",
        "Madry et al. 2018, arXiv 1706.06083, section 4",
        _of_phases(_worst_norm(_step), attacked=True),
    ),
    Check(
        "one-step",
        "Number of attack steps at L-inf 8/255 or more; red for one step from the image, yellow "
        "for one from a random point.",
        "one step leaks the label, and training overfits to it (catastrophic overfitting)",
        "set attack.steps to 2 or more, or set attack.start=random and watch the alarms",
        "Kurakin et al. 2017, arXiv 1611.01236; Wong et al. 2020, arXiv 2001.03994",
        _of_phases(_worst_norm(_one_step), attacked=True),
    ),
    Check(
        "normalised-twice",
        "Whether init.normalize is set and the program of your own network contains the mean of a "
        "known data set; red if both.",
        "the images are normalized in your function and in the first layer",
        "set init.normalize=keep, or remove the normalization from your function",
        "Croce et al. 2021 (RobustBench), arXiv 2010.09670",
        _twice,
    ),
    Check(
        "batch-statistics",
        "attack.statistics of a network with batch norms; yellow for batch with TRADES, if clean "
        "and adversarial images both update the running statistics.",
        "each of TRADES' two terms uses the statistics of its images, but evaluation uses "
        "statistics of both",
        "set attack.statistics=running, or bn_statistics=adversarial in the phase, unless you "
        "follow a paper: robust XCiTs on CIFAR were trained like this",
        "Pang et al. 2021, arXiv 2010.00467",
        _of_phases(_statistics, attacked=True),
    ),
    Check(
        "ema-horizon",
        "1 / (1 - ema_decay) compared with the number of steps of the phase; red if above, yellow "
        "if more than 20% of the average still comes from the start.",
        "the averaged weights are still close to the initial ones",
        "set a lower ema_decay",
        "Rebuffi et al. 2021, arXiv 2103.01946",
        _of_phases(_ema),
    ),
    Check(
        "warm-up",
        "Warm-up epochs of the learning rate and of the radius; red if as long as the phase, "
        "yellow above half.",
        "the phase ends before the learning rate or the radius reaches its value",
        "set warmup_epochs below epochs",
        "Goyal et al. 2017, arXiv 1706.02677, section 2.2",
        _of_phases(_warmup),
    ),
    Check(
        "batch-and-mesh",
        "Whether devices, microbatches and mixing groups divide the batch evenly; yellow if "
        "training uses the nearest size that they divide, red if there is none nearby.",
        "the batch was chosen for another number of devices",
        "set a batch size that devices, microbatches and mixing groups divide evenly",
        "Goyal et al. 2017, arXiv 1706.02677, section 2.1",
        _of_phases(_batch),
    ),
    Check(
        "image-size",
        "Shorter side of the images compared with model.image_size; red below 80% of it or if the "
        "channels differ, yellow below it.",
        "images are upsampled, which costs more and adds no detail",
        "set model.image_size to the size of the images, or use another data set",
        "Touvron et al. 2019, arXiv 1906.06423",
        _of_phases(_size),
    ),
)
