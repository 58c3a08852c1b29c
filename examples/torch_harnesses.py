"""This package's attacks for two PyTorch harnesses, AttackBench and secml-torch.

    attack = attackbench("apgd", norm="linf", epsilon=8 / 255, steps=100)
    adv_inputs = attack(model, inputs, labels, targets=None, targeted=False)

    attack = secml_attack("apgd", norm="linf", epsilon=8 / 255, steps=100)
    adversarial_loader = attack(model, data_loader)

The network stays in PyTorch, with whatever the harness counts in it: an attack is a machine that
asks for points and receives their logits and gradients. This needs PyTorch, and `secml_attack`
also needs secml-torch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust import attacks
from jaxrobust.types import Machine

# By name: functions that make a machine from norm, radius and steps.
MACHINES: dict[str, Callable[..., Machine]] = {
    "pgd": attacks.pgd_machine,
    "apgd": attacks.apgd_machine,
    "apgd-dlr": lambda **how: attacks.apgd_machine(loss="dlr", **how),
    "apgd-targeted": lambda **how: attacks.apgd_machine(loss="dlr-targeted", **how),
    "square": lambda steps, **how: attacks.square_machine(queries=steps, **how),
}


def attackbench(
    name: str, *, norm: str, epsilon: float, steps: int = 100, seed: int = 0
) -> Callable[..., torch.Tensor]:
    """Make an attack with AttackBench's interface; `name` is a key of `MACHINES`.

    It returns images [B,C,H,W] in [0, 1]: for each image the first point that fools the network,
    or else the machine's result. For `apgd-targeted`, the only targeted attack, a point fools the
    network if it is classified as the target.
    """
    if name not in MACHINES:
        raise ValueError(f"{name!r} is not a supported attack; use one of {', '.join(MACHINES)}")
    machine = MACHINES[name](norm=norm, epsilon=epsilon, steps=steps)

    def attack(
        model: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
        targeted: bool = False,
    ) -> torch.Tensor:
        if targeted != (name == "apgd-targeted"):
            other = "apgd-targeted" if targeted else "a different attack"
            raise ValueError(f"{name} does not support targeted={targeted}; use {other}")
        if targeted and targets is None:
            raise ValueError("a targeted attack needs targets; pass i64[B]")
        return run(machine, model, inputs, labels, targets if targeted else None, seed=seed)

    return attack


def run(
    machine: Machine,
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    seed: int = 0,
) -> torch.Tensor:
    """Attack a PyTorch network with a machine; an image's index determines its random draws."""
    images, classes = _to_jax(inputs), jnp.asarray(labels.cpu().numpy(), jnp.int32)
    aims = None if targets is None else jnp.asarray(targets.cpu().numpy(), jnp.int32)
    keys = attacks.image_keys(jax.random.key(seed, impl="threefry2x32"), len(images))
    start = "image" if machine.gradient else "random"
    state = machine.init(images, classes, keys=keys, targets=aims, start=start)
    slope_of = jax.jit(jax.grad(lambda logits, state: _summed(machine, state, logits)))

    @jax.jit
    def tell(state: Any, logits: jax.Array, slope: jax.Array | None) -> Any:
        score = machine.score(state, logits) if machine.score else None
        return machine.tell(state, machine.loss(state, logits), score, slope)

    best, fooled = inputs.clone(), torch.zeros(len(inputs), dtype=torch.bool)

    def judge(points: torch.Tensor, logits: torch.Tensor) -> None:
        said = logits.detach().argmax(1).cpu()
        wrong = said != labels.cpu() if targets is None else said == targets.cpu()
        first = wrong & ~fooled
        best[first.to(best.device)] = points.detach()[first.to(points.device)]
        fooled.logical_or_(wrong)

    while not bool(machine.finished(state).all() or fooled.all()):
        points = _to_torch(machine.query(state), inputs).requires_grad_(machine.gradient)
        with torch.set_grad_enabled(machine.gradient):
            logits = model(points)
        judge(points, logits)
        scores, slope = jnp.asarray(logits.detach().cpu().numpy()), None
        if machine.gradient:
            pull = torch.from_numpy(np.array(slope_of(scores, state))).to(logits)
            (gradient,) = torch.autograd.grad(logits, points, pull)
            slope = _to_jax(gradient)
        state = tell(state, scores, slope)
    result = _to_torch(machine.result(state), inputs)
    with torch.no_grad():
        judge(result, model(result))
    return torch.where(fooled.to(best.device)[:, None, None, None], best, result)


def secml_attack(name: str, **settings: Any) -> Any:
    """Make an attack for secml-torch's models and data loaders; see `attackbench`."""
    from secmlt.adv.evasion.base_evasion_attack import BaseEvasionAttack

    attack = attackbench(name, **settings)

    class OfMachine(BaseEvasionAttack):
        """An attack whose points come from a machine of jaxrobust."""

        @classmethod
        def _trackers_allowed(cls) -> bool:
            return False

        @staticmethod
        def get_perturbation_models() -> set[str]:
            """Return the norms, in secml-torch's spelling."""
            return {"l1", "l2", "linf"}

        def _run(self, model: Any, samples: Any, labels: Any) -> tuple[Any, Any]:
            found = attack(model.decision_function, samples, labels)
            return found, found - samples

    return OfMachine()


def _summed(machine: Machine, state: Any, logits: Any) -> Any:
    return machine.loss(state, logits).sum()  # the sum, so that the batch size has no effect


def _to_jax(images: torch.Tensor) -> jax.Array:
    return jnp.asarray(images.detach().cpu().numpy().transpose(0, 2, 3, 1))


def _to_torch(images: jax.Array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C")).to(like)
