"""A run goes on from the state that was saved, on any number of devices, after any trouble."""

import contextlib
import itertools
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxrobust import build, checkpoint, loop, metrics, records, scores, sharding, step, train
from tests.test_train import final_state, quiet_run, stop_after, tiny


class Killed(BaseException):
    """As kill -9: nothing is saved behind it."""


@contextlib.contextmanager
def devices(count: int):
    """A machine of so many devices, for what a run computes."""
    real = build.mesh_of

    def mesh_of(config, devices=None):
        return real(config, jax.devices()[:count])

    with mock.patch.object(build, "mesh_of", mesh_of):
        yield


@contextlib.contextmanager
def poisoned(steps, *, scales=(1.0,)):
    """The gradient after these numbers of steps is NaN, at these scales of the learning rate."""
    real = step.train_step

    def train_step(state, batch, orders, *, gradients, **rest):
        bad = jnp.isin(state.step, jnp.asarray(steps))
        bad &= jnp.isin(orders.lr_scale, jnp.asarray(scales, jnp.float32))

        def spoiled(*arguments):
            grads, others = gradients(*arguments)
            return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads), others

        return real(state, batch, orders, gradients=spoiled, **rest)

    with mock.patch.object(step, "train_step", train_step):
        yield


def one_phase(**changes):
    """Three adversarial epochs of four steps."""
    return tiny(pretrain__epochs=0, log__every_steps=1, **changes)


def numbers(state):
    """A state as numpy arrays."""
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def lines(workdir: Path, key: str) -> dict[int, float]:
    """A figure of metrics.jsonl by step, each step once."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if key in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[key] for row in rows}


def killed_after(after: int, run) -> None:
    """`run()`, that goes no further than so many steps."""
    real, seen = loop.device_batch, itertools.count(1)

    def device_batch(mesh, batch):
        if next(seen) > after:
            raise Killed
        return real(mesh, batch)

    with mock.patch.object(loop, "device_batch", device_batch):
        try:
            run()
        except Killed:
            return
    raise AssertionError("ended before")


class RunTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        reached = {"clean": 0.5, "robust": 0.25, "images": 64}
        # What an evaluation finds changes no bit of the training, but takes long to compile.
        self.enter_context(mock.patch.object(scores, "count", return_value=reached))

    def same(self, one, other):
        for (path, a), b in zip(
            jax.tree.leaves_with_path(numbers(one)),
            jax.tree.leaves(numbers(other)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


class DevicesTest(RunTest):
    def test_eight_then_one_then_four(self):
        folder = Path(self.create_tempdir())
        self.enter_context(mock.patch.object(sharding, "SMALL", 64))  # else nothing is split
        with devices(8):
            quiet_run(one_phase(mesh__fsdp=8), folder / "whole")
        workdir, saved, restored = folder / "run", {}, {}
        save, steps = checkpoint.Checkpoints.save, loop.steps

        def noted_save(checkpoints, number, arrays, meta):
            if checkpoints.directory.name == "latest":
                saved[number] = numbers(arrays)
            save(checkpoints, number, arrays, meta)

        def noted_steps(run, state):
            if (number := int(state.step)) > 0:
                restored[number] = numbers(state)
                kernel = state.params["stages.0.blocks.0.mlp.fc1.kernel"]
                here = kernel.addressable_shards[0].data.size
                self.assertEqual(kernel.size // here, run.config.mesh.fsdp)
            return steps(run, state)

        self.enter_context(mock.patch.object(checkpoint.Checkpoints, "save", noted_save))
        self.enter_context(mock.patch.object(loop, "steps", noted_steps))
        with devices(8):
            stop_after(3, lambda: quiet_run(one_phase(mesh__fsdp=8), workdir))
        with devices(1):
            stop_after(4, lambda: quiet_run(one_phase(mesh__fsdp=1), workdir))
        with devices(4):
            quiet_run(one_phase(mesh__fsdp=4), workdir)
        self.assertEqual(list(restored), [3, 7])
        for number, arrays in restored.items():
            jax.tree.map(np.testing.assert_array_equal, arrays, saved[number])
        expected, found = (lines(folder / name, "loss") for name in ("whole", "run"))
        self.assertEqual(list(found), list(range(1, 13)))
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
        self.assertGreater(np.ptp(list(found.values())), 0.01)  # it does train

    def test_what_a_checkpoint_carries(self):
        workdir, config = Path(self.create_tempdir()) / "run", one_phase(train__epochs=1)
        config.unlock().train.warmup_epochs = 0
        quiet_run(config, workdir)
        state, meta = final_state(workdir, config)
        self.assertEqual(meta["config"], json.loads(config.to_json()))
        self.assertEqual(meta["versions"], records.versions())
        self.assertEqual((meta["phase"], meta["examples_consumed"]), ("train", 4 * 64))
        self.assertGreater(meta["chip_hours"], 0)
        first = jax.random.split(jax.random.key(config.seed))[1]
        np.testing.assert_array_equal(*map(jax.random.key_data, (state.key, first)))


class SkippedTest(RunTest):
    def test_goes_on_and_saves_nothing_behind_them(self):
        """Steps 6, 7 and 8 of 12 update nothing; step 8 would be saved and evaluated."""
        folder, config = Path(self.create_tempdir()), one_phase()
        kept, save = [], checkpoint.Checkpoints.save

        def noted(checkpoints, number, arrays, meta):
            if checkpoints.directory.name == "latest":
                kept.append(number)
            save(checkpoints, number, arrays, meta)

        with poisoned([5, 6, 7]):
            with mock.patch.object(checkpoint.Checkpoints, "save", noted):
                quiet_run(config, folder / "whole")
            killed_after(6, lambda: quiet_run(config, folder / "killed"))
            stop_after(4, lambda: quiet_run(config, folder / "killed"))  # from step 4, so 8
            said = quiet_run(config, folder / "killed")
        self.assertEqual(kept, [4, 9, 12])
        self.assertIn("train: step 4 of 12", said)
        for name in ("whole", "killed"):
            skipped = lines(folder / name, "skipped")
            self.assertEqual([n for n, value in skipped.items() if value], [6, 7, 8])
            self.assertEqual(list(lines(folder / name, "loss")), [1, 2, 3, 4, 5, 9, 10, 11, 12])
            self.assertEqual(list(lines(folder / name, "selection_robust")), [4, 12])
        self.same(*(final_state(folder / name, config)[0] for name in ("whole", "killed")))


class RollbackTest(RunTest):
    def test_goes_back_once_with_a_lower_rate(self):
        folder = Path(self.create_tempdir())
        config = one_phase(trouble__skips=1, trouble__rollbacks=1, trouble__lr=0.25)
        with poisoned([5, 6, 7]):
            said = quiet_run(config, folder / "whole")
            # The first eight steps of the process are those before the rollback.
            killed_after(10, lambda: quiet_run(config, folder / "killed"))
            self.assertLen(metrics.read(folder / "killed/train/rollbacks.jsonl"), 1)
            quiet_run(config, folder / "killed")
        self.assertRegex(said, r"3 steps in a row|2 steps in a row")
        self.assertRegex(said, r"Back to step 4, with 0\.25 times the learning rate")
        for name in ("whole", "killed"):
            (row,) = metrics.read(folder / name / "train" / "rollbacks.jsonl")
            self.assertEqual((row["back_to"], row["lr_scale"]), (4, 0.25))
            self.assertFalse(any(lines(folder / name, "skipped").values()))
        rates = lines(folder / "whole", "lr")
        schedule = build.phase(config, "train", 256).schedule
        np.testing.assert_allclose(rates[4], schedule(3), rtol=1e-6)
        np.testing.assert_allclose(rates[6], 0.25 * schedule(5), rtol=1e-6)
        self.assertEqual(rates, lines(folder / "killed", "lr"))
        self.same(*(final_state(folder / name, config)[0] for name in ("whole", "killed")))

    def test_no_more_of_them(self):
        workdir = Path(self.create_tempdir()) / "run"
        config = one_phase(trouble__skips=1, trouble__rollbacks=1)
        message = r"norm nan; . steps in a row .* checkpoint: step 4 .*Set trouble.rollbacks=2 to"
        with poisoned([6, 7, 8, 9, 10], scales=(1.0, 0.5)):
            for _ in range(2):  # the second time at once
                with self.assertRaisesRegex(loop.Diverged, message):
                    quiet_run(config, workdir)
            with checkpoint_of(workdir) as checkpoints:
                self.assertEqual(checkpoints.latest_step(), 4)
            rows = metrics.read(workdir / "train" / "rollbacks.jsonl")
            self.assertEqual([row["lr_scale"] for row in rows], [0.5, 0.25])
            said = quiet_run(one_phase(trouble__skips=1, trouble__rollbacks=2), workdir)
        self.assertIn("train: step 4 of 12", said)
        self.assertEqual(list(lines(workdir, "loss")), list(range(1, 13)))

    def test_before_there_is_a_checkpoint(self):
        workdir = Path(self.create_tempdir()) / "run"
        config = tiny(trouble__skips=1, trouble__rollbacks=1, log__every_steps=1)
        starts, real = [], train._state

        def noted(run, start):
            state = real(run, start)
            starts.append((run.name, int(state.step), np.array(state.params["head.fc.kernel"])))
            return state

        with poisoned([1, 2, 3]), mock.patch.object(train, "_state", noted):
            said = quiet_run(config, workdir)
        self.assertEqual(said.count("Back to step 0, with 0.5 times"), 2)
        self.assertEqual([s[:2] for s in starts], [("pretrain", 0)] * 2 + [("train", 0)] * 2)
        for a, b in (starts[:2], starts[2:]):
            np.testing.assert_array_equal(a[2], b[2])


@contextlib.contextmanager
def checkpoint_of(workdir: Path):
    """The checkpoints of the adversarial phase."""
    with contextlib.closing(checkpoint.Checkpoints(workdir / "train" / "latest")) as checkpoints:
        yield checkpoints


class LeftoversTest(RunTest):
    """What a kill may leave behind."""

    def run_of(self, epochs):
        workdir = Path(self.create_tempdir()) / "run"
        return workdir, one_phase(train__epochs=epochs)

    def test_of_checkpoints(self):
        workdir, config = self.run_of(3)
        quiet_run(config, workdir)
        latest = workdir / "train" / "latest"
        (latest / "8" / "meta").mkdir(parents=True)  # half removed
        (latest / "13.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)  # half written
        quiet_run(config, workdir)
        self.assertEqual([path.name for path in latest.iterdir()], ["12"])

    def test_between_an_evaluation_and_its_line(self):
        """selection.jsonl has it, metrics.jsonl not yet."""
        workdir, config = self.run_of(3)
        quiet_run(config, workdir)
        path = workdir / "metrics.jsonl"
        before, selected = path.read_text(), (workdir / "train" / "selection.jsonl").read_text()
        *kept, last = before.splitlines(keepends=True)
        self.assertIn("selection_robust", last)
        metrics.replace(path, "".join(kept))
        quiet_run(config, workdir)
        self.assertEqual(path.read_text(), before)
        self.assertEqual((workdir / "train" / "selection.jsonl").read_text(), selected)

    def test_weights_to_start_from_count_until_a_checkpoint_is_whole(self):
        workdir, config = self.run_of(1)
        config.unlock().train.warmup_epochs = 0
        config.lock()
        (workdir / "train" / "latest" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
        with (
            mock.patch.object(train.initial, "of_config", side_effect=ZeroDivisionError),
            self.assertRaises(ZeroDivisionError),
        ):
            quiet_run(config, workdir)


class AheadTest(absltest.TestCase):
    """What the loop hears of steps that are still on the device."""

    def row(self, loss=1.0, *, skipped=0, stop=0):
        return {
            "loss": jnp.float32(loss),
            "skipped": jnp.float32(skipped),
            "stop": jnp.int32(stop),
        }

    def test_is_heard_two_steps_later(self):
        ahead = loop._Ahead()
        for number in range(1, 4):
            ahead.add(number, self.row(stop=15 * (number >= 1)))
            self.assertEqual(ahead.stop, (15, 0) if number == 3 else None)
        ahead.drain()
        self.assertEqual(ahead.stop, (15, 0))  # the first one counts
        self.assertEqual(ahead.window(), {"skipped": 0})

    def test_counts_those_in_a_row(self):
        ahead, found = loop._Ahead(), []
        for number, skipped in enumerate([0, 1, 1, 0, 1, 1, 1], 1):
            ahead.add(number, self.row(np.nan if skipped else number, skipped=skipped))
            ahead.drain()
            found.append(ahead.skipped)
        self.assertEqual(found, [0, 1, 2, 0, 1, 2, 3])
        self.assertEqual(ahead.window(), {"loss": 2.5, "skipped": 5})
        self.assertEqual(ahead.window(), {"skipped": 0})

    def test_a_window_that_updated_nothing(self):
        ahead = loop._Ahead()
        ahead.add(1, self.row(np.nan, skipped=1))
        ahead.drain()
        self.assertEqual(ahead.window(), {"skipped": 1})


if __name__ == "__main__":
    absltest.main()
