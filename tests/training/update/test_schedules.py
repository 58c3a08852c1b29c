import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.config import phase
from jaxrobust.training.update import optim, schedules
from tests.support import paths, sweeps
from tests.support.parity import torch_or_skip
from tests.support.steps import standard

EPOCHS, STEPS = 10, 5  # 50 updates
LENGTHS = {"lr": 0.4, "epochs": EPOCHS, "final_lr": 0.01}


def schedule_of(steps_per_epoch, **changes):
    p = phase(**changes)
    return schedules.learning_rate(p, "train", steps_per_epoch=steps_per_epoch)


def by_chords(torch, optimiser):
    """As main.py of nmndeep/revisiting-at: whole epochs, linear between them."""

    def at(epoch):
        if epoch <= 2:
            return 0.4 * (1e-4 + (1 - 1e-4) * epoch / 2)
        return 0.01 + 0.195 * (1 + math.cos(math.pi * (epoch - 2) / 8))

    def rate(step):
        epoch, part = divmod(step, STEPS)
        return np.interp(part / STEPS, [0, 1], [at(epoch), at(epoch + 1)]) / 0.4

    return torch.optim.lr_scheduler.LambdaLR(optimiser, rate), False


def in_a_row(torch, optimiser, *parts):
    """PyTorch's own schedulers, one after the other: (from update, what)."""
    begins = [begin for begin, _ in parts[1:]]
    return torch.optim.lr_scheduler.SequentialLR(optimiser, [p for _, p in parts], begins)


def cosine(torch, optimiser):
    s = torch.optim.lr_scheduler
    warm = s.LinearLR(optimiser, start_factor=0.25, total_iters=10)
    return in_a_row(
        torch, optimiser, (0, warm), (10, s.CosineAnnealingLR(optimiser, 40, eta_min=0.01))
    ), False


def linear(torch, optimiser):
    s = torch.optim.lr_scheduler
    warm = s.LinearLR(optimiser, start_factor=0.25, total_iters=10)
    fall = s.LinearLR(optimiser, start_factor=1, end_factor=0.01 / 0.4, total_iters=40)
    return in_a_row(torch, optimiser, (0, warm), (10, fall)), False


def timm():
    from jaxrobust.publish import torch_networks

    return torch_networks.import_timm()


def of_timm(torch, optimiser):
    timm()
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimiser, t_initial=7, lr_min=0.01, warmup_t=2, warmup_lr_init=0.02
    ), True


def steps_of_timm(torch, optimiser):
    timm()
    from timm.scheduler import StepLRScheduler

    return StepLRScheduler(
        optimiser, decay_t=3, decay_rate=0.1, warmup_t=2, warmup_lr_init=0.4, warmup_prefix=False
    ), True


def steps(torch, optimiser):
    return torch.optim.lr_scheduler.MultiStepLR(optimiser, [5, 8], gamma=0.3), True


def one_cycle(torch, optimiser):
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.4, pct_start=0.3, total_steps=EPOCHS, cycle_momentum=False
    ), True


def late(torch, optimiser):
    s = torch.optim.lr_scheduler
    warm = s.LambdaLR(optimiser, lambda epoch: min(epoch / 3, 1))
    rest = s.CosineAnnealingLR(optimiser, EPOCHS, eta_min=0.01)
    return in_a_row(torch, optimiser, (0, warm), (4, rest)), True


# our settings -> their scheduler, and whether it is stepped once an epoch
CURVES = {
    "chord-cosine": ({"warmup_epochs": 2}, by_chords),
    "cosine": ({"warmup_epochs": 2, "warmup_lr": 0.1}, cosine),
    "epoch-cosine": ({"warmup_epochs": 2, "warmup_lr": 0.02, "cooldown_epochs": 3}, of_timm),
    "late-cosine": ({"warmup_epochs": 3, "warmup_lr": 0.0}, late),
    "linear": ({"warmup_epochs": 2, "warmup_lr": 0.1}, linear),
    "step": ({"warmup_epochs": 0, "lr_steps": (0.5, 8), "lr_factor": 0.3}, steps),
    "step, warm-up": ({"warmup_epochs": 2, "warmup_lr": 0.4, "lr_steps": (3, 6, 9)}, steps_of_timm),
    "one-cycle": ({"warmup_epochs": 3, "warmup_lr": 0.016, "final_lr": 1.6e-6}, one_cycle),
}


class ScheduleTest(parameterized.TestCase):
    def test_is_the_reference_curve(self):
        schedule = schedule_of(100, lr=1e-3, epochs=50, warmup_epochs=10)
        # Values at whole epochs, as main.py of nmndeep/revisiting-at defines them.
        self.assertAlmostEqual(float(schedule(0)), 1e-7, delta=1e-12)
        self.assertAlmostEqual(float(schedule(1000)), 1e-3, delta=1e-9)
        self.assertAlmostEqual(float(schedule(5000)), 5e-6, delta=1e-9)
        self.assertAlmostEqual(float(schedule(500)), 1e-7 + (1e-3 - 1e-7) / 2, delta=1e-9)
        at30 = 5e-6 + (1e-3 - 5e-6) / 2 * (1 + math.cos(math.pi * 20 / 40))
        self.assertAlmostEqual(float(schedule(3000)), at30, delta=1e-9)
        # Within an epoch: the chord, not the cosine.
        chord = (float(schedule(3000)) + float(schedule(3100))) / 2
        self.assertAlmostEqual(float(schedule(3050)), chord, delta=1e-9)

    def test_one_is_an_epoch_and_what_is_below_it_a_fraction(self):
        settings = {"lr": 1.0, "epochs": 8, "warmup_epochs": 0, "lr_steps": (1, 0.75)}
        schedule = schedule_of(10, **settings, schedule="step")
        values = [round(float(schedule(10 * epoch)), 6) for epoch in range(8)]
        self.assertEqual(values, [1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])

    @sweeps.rows(
        ({"epochs": 0}, "epochs=0"),
        ({"warmup_epochs": 50}, "warmup_epochs=50"),
        ({"steps_per_epoch": 0}, "fewer images than one batch"),
    )
    def test_refuses(self, changes, message):
        values = {"lr": 1e-3, "epochs": 50, "warmup_epochs": 5, "steps_per_epoch": 10} | changes
        with self.assertRaisesRegex(ValueError, message):
            schedule_of(**values)


class ParityTest(parameterized.TestCase):
    @sweeps.fast(3, 4, 7)
    @parameterized.parameters(*CURVES)
    def test_fifty_updates_of_torch(self, name):
        """SGD with Nesterov in float64; what differs is the rounding of a curve's formula."""
        torch = torch_or_skip(self)
        settings, reference = CURVES[name]
        leaf = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
        start = leaf.detach().numpy().copy()
        theirs = torch.optim.SGD([leaf], lr=0.4, momentum=0.9, nesterov=True, weight_decay=0.01)
        scheduler, by_epoch = reference(torch, theirs)
        with jax.enable_x64(True), standard():
            schedule = schedule_of(STEPS, schedule=name.partition(",")[0], **LENGTHS | settings)
            tx = optim.sgd(schedule, weight_decay=0.01, decay_mask="all", nesterov=True)
            params = {"a": jnp.asarray(start)}
            state = tx.init(params)
            update = jax.jit(tx.update)
            for i in range(EPOCHS * STEPS):
                rate = theirs.param_groups[0]["lr"]
                np.testing.assert_allclose(schedule(i), rate, rtol=1e-9, err_msg=f"update {i}")
                updates, state = update(
                    {"a": jnp.asarray(np.tanh(np.asarray(params["a"]) - 0.3))}, state, params
                )
                params = {"a": params["a"] + updates["a"]}
                leaf.grad = torch.tanh(leaf.detach() - 0.3)
                theirs.step()
                if not by_epoch or (i + 1) % STEPS == 0:
                    self.step(scheduler, (i + 1) // STEPS)
                np.testing.assert_allclose(params["a"], leaf.detach().numpy(), rtol=0, atol=1e-9)
        self.assertGreater(np.abs(np.asarray(params["a"]) - start).max(), 0.1)

    def step(self, scheduler, epoch):
        if type(scheduler).__module__.startswith("timm"):
            scheduler.step(epoch)
        elif epoch < EPOCHS or not hasattr(scheduler, "total_steps"):
            scheduler.step()

    def test_momentum_of_one_cycle(self):
        """OneCycleLR's default, with 50 updates of SGD with Nesterov; and the published curve."""
        torch = torch_or_skip(self)
        leaf = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
        start = leaf.detach().numpy().copy()
        theirs = torch.optim.SGD([leaf], lr=0.4, nesterov=True, momentum=0.9, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            theirs, max_lr=0.4, pct_start=0.3, total_steps=EPOCHS
        )
        p = phase(
            optimizer="sgd", nesterov=True, cycle_momentum=True, schedule="one-cycle",
            lr=0.4, warmup_lr=0.016, final_lr=1.6e-6, warmup_epochs=3, epochs=EPOCHS,
            weight_decay=0.01,
        )  # fmt: skip
        with jax.enable_x64(True), standard():
            _, tx = optim.of_phase(p, "train", decay_mask="all", steps_per_epoch=STEPS)
            params = {"a": jnp.asarray(start)}
            state, update = tx.init(params), jax.jit(tx.update)
            for i in range(EPOCHS * STEPS):
                grads = {"a": jnp.asarray(np.tanh(np.asarray(params["a"]) - 0.3))}
                updates, state = update(grads, state, params)
                params = {"a": params["a"] + updates["a"]}
                leaf.grad = torch.tanh(leaf.detach() - 0.3)
                theirs.step()
                if (i + 1) % STEPS == 0 and i + 1 < EPOCHS * STEPS:
                    scheduler.step()
                np.testing.assert_allclose(params["a"], leaf.detach().numpy(), rtol=0, atol=1e-9)
            expected = np.load(paths.GOLDEN / "updates/cifar_updates.npz")["onecycle_400_momentum"]
            cycle = phase(epochs=400, warmup_epochs=10)
            momentum = schedules.cycled_momentum(cycle, steps_per_epoch=7)
            for epoch, value in enumerate(expected):
                np.testing.assert_allclose(momentum(7 * epoch + 3), value, rtol=1e-12)

    @sweeps.rows(
        ("onecycle_400_lr", "one-cycle", 0.4, 10, 0.016, 1.6e-6),
        ("warmup8_cosine100_lr", "late-cosine", 2.5e-4, 8, 0.0, 5e-6),
    )
    def test_published_curves(self, name, shape, peak, warmup, start, final):
        file = paths.GOLDEN / "updates/cifar_updates.npz"
        expected = np.load(file)[name]
        with jax.enable_x64(True):
            schedule = schedule_of(
                7, lr=peak, epochs=len(expected), warmup_epochs=warmup, warmup_lr=start,
                final_lr=final, schedule=shape,
            )  # fmt: skip
            for epoch, value in enumerate(expected):
                for step in (7 * epoch, 7 * epoch + 6):  # constant within an epoch
                    np.testing.assert_allclose(schedule(step), value, rtol=1e-12, atol=1e-18)
