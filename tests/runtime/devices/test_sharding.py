"""One program on many devices: what it sends, where its state lies, and that numbers stay."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from jaxrobust.config import base
from jaxrobust.doctor.programs import hlo
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.types import Batch
from tests.support import sweeps
from tests.support.steps import batch_of, small_config, standard


def wide(**changes) -> ConfigDict:
    """A ConvNeXt + ConvStem with parameters on both sides of `sharding.SMALL`."""
    config = small_config(model__name="convnext_n_cvst", **changes).unlock()
    config.model.options = ConfigDict(
        {"depths": (1, 1), "dims": (64, 128), "stem_widths": (32, 64)}
    )
    return config.lock()


def compiled(config, devices):
    phase = build.phase(config, "train", 80, devices=devices)
    with jax.set_mesh(phase.mesh), standard():
        arguments = build.abstract_arguments(config, "train", phase)
        return phase, phase.step.lower(*arguments).compile()


def run(config, devices, steps=10):
    """Losses of `steps` steps, and the last state."""
    phase = build.phase(config, "train", 80, devices=devices)
    losses = []
    with jax.set_mesh(phase.mesh), standard():
        state, control = phase.init(jax.random.key(0)), build.control(phase.mesh)
        for i in range(steps):
            local = tuple(map(np.asarray, batch_of(config.train.batch_size, seed=i)))
            batch = Batch(*sharding.global_arrays(phase.mesh, local))
            state, metrics = phase.step(state, batch, control)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


class RulesTest(parameterized.TestCase):
    @sweeps.rows(
        ("stages.0.blocks.0.mlp.fc1.kernel", (384, 1536), 8, 1),
        ("stages.0.blocks.0.mlp.fc2.kernel", (1536, 384), 8, 0),
        ("attn.proj.kernel", (384, 384), 8, 1),  # the last of equals
        ("head.kernel", (1000, 768), 16, 1),  # 1000 cannot be split
        ("head.kernel", (1000, 768), 1, None),  # nothing is shared
        ("norm.scale", (768,), 8, None),  # small
        ("cls_token", (1, 1, 20001), 8, None),  # cannot be split
        ("normalize.mean", (2**20,), 8, None),
    )
    def test_splits_the_largest_axis(self, name, shape, parts, axis):
        self.assertEqual(sharding.split_axis(name, shape, parts), axis)

    def test_moments_and_averages_lie_with_their_parameters(self):
        phase = build.phase(wide(mesh__fsdp=8), "train", 80)
        specs = {}
        for path, leaf in jax.tree.leaves_with_path(phase.abstract_state):
            name = getattr(path[-1], "key", None)
            if name is not None:
                specs.setdefault(name, set()).add(leaf.sharding.spec)
        self.assertGreater(len(specs), 20)
        for name, found in specs.items():
            self.assertLen(found, 1, name)
        self.assertTrue(any("fsdp" in spec for (spec,) in specs.values()))

    @sweeps.rows((3, 8), (16, 8), (-1, 4))
    def test_groups_that_do_not_fit(self, fsdp, devices):
        with self.assertRaisesRegex(ValueError, rf"fsdp={fsdp} does not .* {devices} .*one of 1,"):
            sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)

    def test_zero_is_all_devices(self):
        phase = build.phase(wide(mesh__fsdp=0), "train", 80)
        self.assertEqual(dict(phase.mesh.shape), {"data": 1, "fsdp": 8})


class SlicesTest(parameterized.TestCase):
    """Of eight CPU devices, as if they were chips of several slices."""

    def test_a_slice_is_together(self):
        for fsdp, shape in ((2, (4, 2)), (0, (2, 4))):
            mesh = sharding.make_mesh(fsdp=fsdp, slice_of=lambda d: d.id % 2)
            ids = np.vectorize(lambda d: d.id)(mesh.devices)
            self.assertEqual(ids.shape, shape)
            np.testing.assert_array_equal(ids.ravel(), [0, 2, 4, 6, 1, 3, 5, 7])

    def test_only_tpus_have_slices(self):
        for platform, number in (("tpu", 3), ("gpu", 0)):
            device = SimpleNamespace(platform=platform, slice_index=3)
            self.assertEqual(sharding.slice_of(device), number)
        self.assertEqual(sharding.slices_of(sharding.make_mesh()), 1)

    @sweeps.rows(
        (8, 2, "mesh.fsdp=8 does not divide the 4 devices of a slice; use one of 1, 2, 4"),
        (1, 3, "the slices have 3, 3, 2 devices; start slices of equal size"),
    )
    def test_slices_that_do_not_fit(self, fsdp, slices, message):
        with self.assertRaisesRegex(ValueError, message):
            sharding.make_mesh(fsdp=fsdp, slice_of=lambda d: d.id % slices)

    def test_a_batch_that_they_do_not_divide(self):
        message = "x=20 cannot be split over 2 slices of 8 devices; use 16 or 32"
        with self.assertRaisesRegex(ValueError, message):
            build.divides(20, 16, "x", slices=2)

    @pytest.mark.slow
    def test_gradients_cross_slices_once_a_step(self):
        """Devices 0 to 3 are one slice, 4 to 7 the other; the state is split within each."""
        phase, step = compiled(wide(mesh__fsdp=4, attack__steps=2), jax.devices())
        module = hlo.parse(step.as_text())
        by_name = {i.name: i for i in hlo.instructions(module.computations)}
        crossing = [
            collective
            for collective in hlo.collectives(module)
            if np.ptp(members(by_name[collective.key].attributes) // 4, axis=1).any()
        ]
        self.assertEqual({c.kind for c in crossing}, {"all-reduce"})
        self.assertEqual({(c.times, c.inside) for c in crossing}, {(1, False)})
        shapes = phase.abstract_state.params.items()
        axes = {name: sharding.split_axis(name, p.shape, 4) for name, p in shapes}
        parts = sum(math.prod(p.shape) / (1 if axes[n] is None else 4) for n, p in shapes)
        self.assertBetween(sum(c.bytes for c in crossing), 4 * parts, 1.1 * 4 * parts + 64)


def members(attributes):
    """Return the devices of each group of a collective, a row each."""
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", match[1])], int)
    if match := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        along = [[*sizes].index(axis) for axis in re.findall(r"'(\w+)'", match[2])]
        grid = np.arange(8).reshape([int(size) for size in sizes.values()])
        grid = np.moveaxis(grid, along, range(-len(along), 0))
        return grid.reshape(-1, math.prod(grid.shape[-len(along) :]))
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        rows, sides, order = ([int(n) for n in (p or "0").split(",")] for p in match.groups())
        return np.arange(8).reshape(sides).transpose(order).reshape(rows)
    raise AssertionError(attributes[:300])


class SpreadTest(parameterized.TestCase):
    """Of eight devices, the number n on the n-th: the mean is 3.5."""

    @sweeps.rows(2, 8)
    def test_gradients_of_all_devices_become_their_mean(self, fsdp):
        mesh = sharding.make_mesh(fsdp=fsdp)
        params = {"small": jnp.zeros(3), "large": jnp.zeros((2, sharding.SMALL))}
        spread = sharding.spread(mesh, params)

        def share(parts, rows):
            whole = spread.gather(parts)
            value = rows.sum().astype(jnp.bfloat16)
            grads = {name: jnp.full(array.shape, value) for name, array in whole.items()}
            return spread.reduce(grads), spread.mean(rows.sum())

        run = jax.jit(spread.each(share, copies=0, split=1, gradients=True))
        with standard():
            grads, mean = run(params, jnp.arange(8, dtype=jnp.float32))
        self.assertEqual(float(mean), 3.5)
        for name, array in params.items():
            self.assertEqual(grads[name].dtype, jnp.float32)  # added up in more than bfloat16
            np.testing.assert_array_equal(grads[name], np.full(array.shape, 3.5))
        own = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
        self.assertAlmostEqual(float(jax.jit(spread.norm)(grads)), float(own), delta=1e-5 * own)

    @sweeps.rows(1, 8)
    def test_small_arrays_share_one_collective(self, fsdp):
        mesh = sharding.make_mesh(fsdp=fsdp)
        values = {"a": 1.0, "b": 20.0, "c": 300.0}
        shapes = {"a": (3,), "b": (2, 5), "c": ()}
        params = {name: jnp.full(shapes[name], value) for name, value in values.items()}
        spread = sharding.spread(mesh, params)

        def share(params, rows):
            numbers = {name: p * rows.sum() for name, p in params.items()}
            return spread.reduce(numbers), spread.mean({"c": params["c"], "a": rows.sum()})

        run = jax.jit(spread.each(share, copies=0, split=1, gradients=True))
        arguments = params, jnp.arange(8, dtype=jnp.float32)
        with standard():
            grads, means = run(*arguments)
            module = hlo.parse(run.lower(*arguments).compile().as_text())
        for name, value in values.items():
            np.testing.assert_array_equal(grads[name], np.full(shapes[name], 3.5 * value))
        self.assertEqual((float(means["c"]), float(means["a"])), (300, 3.5))
        self.assertLessEqual(sum(c.arrays for c in hlo.collectives(module)), 2)

    def test_the_norm_of_parts_is_one_collective(self):
        mesh = sharding.make_mesh(fsdp=8)
        params = {name: jnp.ones((sharding.SMALL, 2)) for name in "abcd"} | {"e": jnp.ones(9)}
        placed = jax.device_put(params, sharding.of_state(mesh, params))
        norm = jax.jit(sharding.spread(mesh, params).norm)
        self.assertAlmostEqual(float(norm(placed)), (8 * sharding.SMALL + 9) ** 0.5, delta=1e-3)
        self.assertLen(hlo.collectives(hlo.parse(norm.lower(placed).compile().as_text())), 1)

    def test_on_many_chips_more_stays_whole(self):
        """A part of less than a tile of a TPU's memory is padded to it."""
        for parts, axis in ((16, 3), (256, None)):
            self.assertEqual(sharding.split_axis("depthwise.kernel", (7, 7, 1, 1024), parts), axis)


class CollectivesCase(parameterized.TestCase):
    """Of the step on 8 devices, as XLA's CPU compiler leaves them."""

    def check(self, fsdp, dtype):
        programs = [
            compiled(wide(mesh__fsdp=fsdp, model__dtype=dtype, attack__steps=k), jax.devices())
            for k in (2, 10)
        ]
        two, ten = (hlo.collectives(hlo.parse(step.as_text())) for _, step in programs)
        self.assertEqual([(c.kind, c.bytes) for c in two], [(c.kind, c.bytes) for c in ten])
        self.assertEmpty([c for c in two if c.inside])
        shapes = programs[0][0].abstract_state.params
        split = {
            n: math.prod(p.shape)
            for n, p in shapes.items()
            if sharding.split_axis(n, p.shape, fsdp) is not None
        }
        whole = sum(math.prod(p.shape) for p in shapes.values()) - sum(split.values())
        width = jnp.dtype(dtype).itemsize
        # Results: parameters gathered in the compute type, gradients in float32.
        bound = {
            "all-gather": width * sum(split.values()),
            "reduce-scatter": 4 * sum(split.values()) / fsdp,
            "all-reduce": 4 * whole + (4 * sum(split.values()) / fsdp if fsdp < 8 else 0),
        }
        sent = {kind: sum(c.bytes for c in two if c.kind == kind) for kind in bound}
        self.assertEqual({c.kind for c in two} - bound.keys(), set())
        for kind, most in bound.items():
            self.assertBetween(sent[kind], 0.99 * most, 1.1 * most + 64, f"{kind}: {sent}")
        gathered = [name for c in two if c.kind == "all-gather" for name in c.parameters]
        self.assertLen(set(gathered), len(gathered))
        self.assertLen(gathered, len(split) if fsdp > 1 else 0)


class CollectivesTest(CollectivesCase):
    @pytest.mark.slow
    def test_parameters_once_gradients_once(self):
        self.check(8, "bfloat16")


@pytest.mark.slow
class MoreCollectivesTest(CollectivesCase):
    @parameterized.parameters((1, "float32"), (2, "bfloat16"))
    def test_parameters_once_gradients_once(self, fsdp, dtype):
        self.check(fsdp, dtype)

    def test_batch_norms_meet_once(self):
        config = small_config(model__name="resnet50", mesh__fsdp=2, attack__statistics="batch")
        config.unlock().model.options = ConfigDict({"depths": (1,), "width": 8})
        _, step = compiled(config, jax.devices())
        found = hlo.collectives(hlo.parse(step.as_text()))
        self.assertNotEmpty(found)
        self.assertEmpty([c for c in found if c.inside])

    def test_microbatches_meet_once(self):
        config = wide(mesh__fsdp=2, train__batch_size=32)
        again = wide(mesh__fsdp=2, train__batch_size=32, train__microbatches=4)
        one, four = (
            hlo.collectives(hlo.parse(compiled(c, jax.devices())[1].as_text()))
            for c in (config, again)
        )
        self.assertEqual(sum(c.bytes for c in one), sum(c.bytes for c in four))
        self.assertEmpty([c for c in four if c.inside])


@pytest.mark.slow
class NumbersTest(parameterized.TestCase):
    """Per-step losses over 10 steps, whatever the devices."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.one, _ = run(wide(), jax.devices()[:1])

    @parameterized.parameters((2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 8))
    def test_devices(self, devices, fsdp):
        losses, _ = run(wide(mesh__fsdp=fsdp), jax.devices()[:devices])
        # Sums over the batch in another order; the bound.
        np.testing.assert_allclose(losses, self.one, rtol=1e-5)
        self.assertGreater(np.ptp(self.one), 1e-3)  # it does train

    @parameterized.parameters((1, 8), (2, 4))
    def test_microbatches(self, devices, microbatches):
        losses, _ = run(wide(train__microbatches=microbatches), jax.devices()[:devices])
        np.testing.assert_allclose(losses, self.one, rtol=1e-5)


@pytest.mark.matrix
class DrawsTest(absltest.TestCase):
    def test_stochastic_depth_and_random_starts_are_of_images(self):
        """Neither devices nor microbatches change what is drawn for an image."""
        changes = {"attack__start": "random", "train__batch_size": 16}

        def config(**more):
            made = small_config(**changes, **more).unlock()
            options = {"depths": (2,), "dims": (8,), "drop_path": 0.5}
            made.model.options = ConfigDict(options)
            return made.lock()

        one, _ = run(config(), jax.devices()[:1], steps=3)
        for more, devices in (({}, 8), ({"mesh__fsdp": 4}, 8), ({"train__microbatches": 4}, 2)):
            losses, _ = run(config(**more), jax.devices()[:devices], steps=3)
            np.testing.assert_allclose(losses, one, rtol=1e-5)


class MicrobatchTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_running_statistics_do_not_know_microbatches(self):
        def stats(microbatches):
            config = small_config(model__name="resnet50", train__objective="clean").unlock()
            config.model.options = ConfigDict({"depths": (1,), "width": 8, "bn_group": 2})
            config.train.microbatches = microbatches
            return run(config, jax.devices()[:1], steps=1)[1].stats

        one, four = stats(1), stats(4)
        for name, value in one.items():
            np.testing.assert_allclose(four[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        self.assertGreater(float(jnp.abs(one["bn1.var"] - 1).max()), 1e-3)

    @sweeps.fast("adversarial")
    @parameterized.parameters("adversarial", "trades")
    def test_objectives_with_stochastic_depth(self, objective):
        config = small_config(train__objective=objective, attack__start="random").unlock()
        config.model.options = ConfigDict({"depths": (1,), "dims": (8,), "drop_path": 0.5})
        phase = build.phase(config, "train", 80)
        with jax.set_mesh(phase.mesh), standard():  # traces
            phase.step.lower(*build.abstract_arguments(config, "train", phase))


class MemoryTest(absltest.TestCase):
    def test_an_eighth_of_the_state(self):
        """ConvNeXt-B + ConvStem: what one of 8 devices holds, without an array being made."""
        config = base().unlock()
        config.model.update(name="convnext_b_cvst", dtype="bfloat16")
        config.mesh.fsdp = 8
        phase = build.phase(config, "train", 10**6)
        state = phase.abstract_state
        for kind in ("params", "ema", "opt_state"):
            leaves = jax.tree.leaves(getattr(state, kind))
            here = sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in leaves
            )
            all_ = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
            self.assertLessEqual(here / all_, 1.05 / 8, kind)


class ControlTest(parameterized.TestCase):
    """Of eight devices; one alone: tests/training/update/test_step.py."""

    def step(self, phase, state, **control):
        local = tuple(map(np.asarray, batch_of()))
        batch = Batch(*sharding.global_arrays(phase.mesh, local))
        return phase.step(state, batch, build.control(phase.mesh, **control))

    @pytest.mark.slow
    def test_a_stop_leaves_the_state(self):
        phase = build.phase(small_config(), "train", 80, donate=False)
        with jax.set_mesh(phase.mesh), standard():
            state = phase.init(jax.random.key(0))
            after, metrics = self.step(phase, state, stop=15)
        self.assertEqual((int(metrics["stop"]), float(metrics["skipped"])), (15, 0))
        jax.tree.map(np.testing.assert_array_equal, after._replace(key=0), state._replace(key=0))

    @sweeps.rows(np.nan, np.inf)
    @pytest.mark.slow
    def test_no_finite_gradient_counts_but_updates_nothing(self, poison):
        phase = build.phase(small_config(mesh__fsdp=8), "train", 80, donate=False)
        with jax.set_mesh(phase.mesh), standard():
            state = phase.init(jax.random.key(0))
            params = dict(state.params)
            params["head.norm.bias"] = params["head.norm.bias"].at[0].set(poison)
            state = state._replace(params=params)
            after, metrics = self.step(phase, state)
        self.assertEqual((int(after.step), float(metrics["skipped"])), (1, 1))
        jax.tree.map(
            np.testing.assert_array_equal,
            after._replace(key=0, step=0),
            state._replace(key=0, step=0),
        )

    @pytest.mark.slow
    def test_learning_rate(self):
        phase = build.phase(small_config(), "train", 80, donate=False)
        with jax.set_mesh(phase.mesh), standard():
            state = phase.init(jax.random.key(0))
            whole, half = (
                self.step(phase, state, lr_scale=scale)[0].params for scale in (1.0, 0.5)
            )
        for name, before in state.params.items():
            np.testing.assert_allclose(
                half[name] - before, (whole[name] - before) / 2, atol=1e-7, err_msg=name
            )


class RefusalTest(parameterized.TestCase):
    @sweeps.rows(
        ({"mesh__fsdp": 3}, "mesh.fsdp=3 does not divide the 8 devices; use one of 1, 2, 4, 8"),
        ({"train__microbatches": 0}, "train.microbatches=0 must be at least 1"),
        (
            {"train__batch_size": 32, "train__microbatches": 3},
            r"train.microbatches=3 does not divide the 4 images per device; .* of \[1, 2, 4\]",
        ),
        (
            {"attack__statistics": "own"},
            "attack.statistics='own' must be one of 'running', 'batch'",
        ),
    )
    def test_messages(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            build.phase(small_config(**changes), "train", 80)

    def test_groups_of_batch_norm(self):
        config = small_config(model__name="resnet50", train__batch_size=32).unlock()
        config.model.options = ConfigDict({"depths": (1,), "width": 8, "bn_group": 4})
        config.train.microbatches = 2
        with self.assertRaisesRegex(
            ValueError, "bn_group=4 does not divide the 2 images per device"
        ):
            build.phase(config, "train", 80)


@pytest.mark.matrix
class FullSizeTest(parameterized.TestCase):
    """ViT-S + ConvStem at 224 pixels in bf16: nothing inside of the attack's loop."""

    def test_no_collective_in_the_attack(self, fsdp=8):
        config = base().unlock()
        config.model.update(name="vit_s_cvst", dtype="bfloat16")
        config.train.update(batch_size=8, warmup_epochs=1)
        config.mesh.fsdp = fsdp
        _, step = compiled(config, jax.devices())
        found = hlo.collectives(hlo.parse(step.as_text()))
        self.assertNotEmpty(found)
        self.assertEmpty([c for c in found if c.inside])
