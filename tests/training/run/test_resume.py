"""A run continues from the state that was saved, on any number of devices, after any trouble."""

import contextlib
import copy
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from ml_collections import ConfigDict

from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import jsonl, provenance
from jaxrobust.training import build
from jaxrobust.training.run import best_weights as selection_split
from jaxrobust.training.run import loop, phase, splits, stopping
from jaxrobust.training.run import run as training_run
from jaxrobust.training.run.metrics import Ahead
from jaxrobust.training.update import alarm
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store import checkpoint
from tests.support.runs import final_state, one_phase, poisoned, quiet_run, stop_after, tiny


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


def numbers(state):
    """A state as numpy arrays."""
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def lines(workdir: Path, key: str) -> dict[int, float]:
    """A figure of metrics.jsonl by step, each step once."""
    rows = [row for row in jsonl.read(workdir / "metrics.jsonl") if key in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[key] for row in rows}


def killed_after(after: int, run) -> None:
    """`run()`, that goes no further than so many steps."""
    real, seen = splits.device_batch, itertools.count(1)

    def device_batch(mesh, batch):
        if next(seen) > after:
            raise Killed
        return real(mesh, batch)

    with mock.patch.object(splits, "device_batch", device_batch):
        try:
            run()
        except Killed:
            return
    raise AssertionError("ended before")


class RunTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        reached = {"clean": 0.5, "robust": 0.25, "images": 80}
        # What an evaluation finds changes no bit of the training, but takes long to compile.
        self.enter_context(mock.patch.object(accuracy, "count", return_value=reached))

    def same(self, one, other):
        jax.tree.map(np.testing.assert_array_equal, numbers(one), numbers(other))


class DevicesTest(RunTest):
    @pytest.mark.slow
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

        def noted_steps(run, state, stop):
            if (number := int(state.step)) > 0:
                restored[number] = numbers(state)
                kernel = state.params["stages.0.blocks.0.mlp.fc1.kernel"]
                here = kernel.addressable_shards[0].data.size
                self.assertEqual(kernel.size // here, run.config.mesh.fsdp)
            return steps(run, state, stop)

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
        self.assertEqual(meta["versions"], provenance.versions())
        self.assertEqual((meta["phase"], meta["examples_consumed"]), ("train", 4 * 64))
        self.assertEqual((meta["bn_group"], meta["skipped"]), (0, 0))
        self.assertGreater(meta["chip_hours"], 0)
        first = jax.random.split(jax.random.key(config.seed))[1]
        np.testing.assert_array_equal(*map(jax.random.key_data, (state.key, first)))


class GroupsTest(RunTest):
    def config(self, bn_group=0, **changes):
        options = {"depths": (1,), "width": 4, "small_stem": True, "bn_group": bn_group}
        changes |= {"model__options": ConfigDict(options), "train__epochs": 0}
        return tiny(model__name="resnet50", log__every_steps=1, **changes)

    def test_batch_norms_keep_theirs(self):
        def check(count, before, config):
            with devices(count), jax.numpy_dtype_promotion("standard"):
                built = build.phase(config, "pretrain", 256)
            run = phase.PhaseRun(config, Path(), "pretrain", built, *[None] * 5)
            loop.same_groups(run, {"bn_group": before} if before is not None else {})
            return built.bn_group

        self.assertEqual(check(8, 8, self.config()), 8)
        self.assertEqual(check(4, 8, self.config(pretrain__microbatches=2)), 8)
        self.assertEqual(check(4, 8, self.config(8)), 8)
        self.assertEqual(check(4, None, self.config()), 16)  # a checkpoint of before
        self.assertEqual(check(4, 0, tiny()), 0)  # a network without
        message = (
            "pretrain: so far, batch norms .* over 8 images at a time, .* devices they would use "
            r"16. Set model\.options\.bn_group=8, change pretrain\.microbatches or the devices to r"
        )
        with self.assertRaisesRegex(ValueError, message):
            check(4, 8, self.config())

    @pytest.mark.slow
    def test_a_run_that_moves(self):
        """Eight images at a time on eight devices; as many on four, by either way that is named."""
        folder = Path(self.create_tempdir())
        with devices(8):
            quiet_run(self.config(), folder / "whole")
            stop_after(3, lambda: quiet_run(self.config(), folder / "moved"))
        with devices(4):
            with self.assertRaisesRegex(ValueError, "of 8 images at a time .* of 16 on these"):
                quiet_run(self.config(), folder / "moved")
            stop_after(2, lambda: quiet_run(self.config(8), folder / "moved"))
            quiet_run(self.config(pretrain__microbatches=2), folder / "moved")
        whole, moved = (list(lines(folder / k, "loss").values()) for k in ("whole", "moved"))
        np.testing.assert_allclose(whole, moved, rtol=1e-5)  # sums among devices in another order


class SkippedTest(RunTest):
    @pytest.mark.slow
    def test_goes_on_and_makes_up_for_an_evaluation(self):
        """Steps 6, 7 and 8 of 12 update nothing; step 8 would be saved and evaluated."""
        folder, config = Path(self.create_tempdir()), one_phase()
        kept, save = [], checkpoint.Checkpoints.save

        def noted(checkpoints, number, arrays, meta):
            if checkpoints.directory.name == "latest":
                kept.append((number, meta, copy.deepcopy(meta)))
            save(checkpoints, number, arrays, meta)

        killed = folder / "killed"
        with poisoned([5, 6, 7]):
            with mock.patch.object(checkpoint.Checkpoints, "save", noted):
                quiet_run(config, folder / "whole")
            killed_after(6, lambda: quiet_run(config, killed))
            stop_after(3, lambda: quiet_run(config, killed), said="the last 2 steps had no finite")
            stop_after(1, lambda: quiet_run(config, killed), said="the last 3 steps had no finite")
            reached = {"clean": 0.0, "robust": 0.0, "images": 64}
            with (
                mock.patch.object(accuracy, "count", side_effect=[reached, Killed]),
                self.assertRaises(Killed),  # while step 12 is evaluated
            ):
                said = quiet_run(config, killed)
                raise AssertionError(said)
            said = quiet_run(config, killed)
        self.assertEqual([number for number, *_ in kept], [4, 9, 12])
        for _, written, before in kept:  # in the background, while steps continue
            self.assertEqual(repr(written), repr(before))
        self.assertIn("train: step 12 of 12", said)
        self.assertEmpty(list((killed / "train" / "stopped").iterdir()))
        for name in ("whole", "killed"):
            skipped = lines(folder / name, "skipped")
            self.assertEqual([n for n, value in skipped.items() if value], [6, 7, 8])
            self.assertEqual(list(lines(folder / name, "loss")), [1, 2, 3, 4, 5, 9, 10, 11, 12])
            self.assertEqual(list(lines(folder / name, "selection_robust")), [4, 9, 12])
        self.same(*(final_state(folder / name, config)[0] for name in ("whole", "killed")))

    @pytest.mark.matrix
    def test_a_kill_before_the_evaluation_that_is_made_up_for(self):
        """Step 8 updates nothing; step 9 is saved, and evaluated after the kill."""
        workdir, config = Path(self.create_tempdir()) / "run", one_phase()
        evaluated = {"clean": 0.5, "robust": 0.25, "images": 64}
        with poisoned([7]):
            with (
                mock.patch.object(accuracy, "count", side_effect=[evaluated, Killed]),
                self.assertRaises(Killed),
            ):
                quiet_run(config, workdir)
            said = quiet_run(config, workdir)
        self.assertIn("train: step 9 of 12", said)
        self.assertEqual(list(lines(workdir, "selection_robust")), [4, 9, 12])

    @pytest.mark.slow
    def test_counts_on_after_a_stop_and_goes_back_behind_it(self):
        """Steps 6 to 9 update nothing, four in a row: one too many; stopped after two of them."""
        folder = Path(self.create_tempdir())
        config = one_phase(trouble__skips=3, trouble__rollbacks=1)
        clear = checkpoint.Checkpoints.clear
        with poisoned([5, 6, 7, 8]):
            whole = quiet_run(config, folder / "whole")
            stop_after(7, lambda: quiet_run(config, folder / "stopped"), said="last 2 in a row")
            self.assertLen(list((folder / "stopped/train/stopped").iterdir()), 1)

            def killed(checkpoints):
                clear(checkpoints)
                raise Killed

            with (
                mock.patch.object(checkpoint.Checkpoints, "clear", killed),
                self.assertRaises(Killed),  # when it would go back
            ):
                quiet_run(config, folder / "stopped")
            said = quiet_run(config, folder / "stopped")
        self.assertIn("train: step 4 of 12", said)
        for text in (whole, said):
            self.assertIn("4 steps in a row updated no weights. Returning to step 4", text)
        self.same(*(final_state(folder / name, config)[0] for name in ("whole", "stopped")))

    @pytest.mark.matrix
    def test_a_limit_that_is_lower_by_now(self):
        workdir = Path(self.create_tempdir()) / "run"
        with poisoned([5, 6, 7]):
            stop_after(7, lambda: quiet_run(one_phase(), workdir), said="last 2 in a row")
            with self.assertRaisesRegex(
                stopping.Diverged,
                r"norm nan; 2 steps in a row updated no weights.* checkpoint is step 4",
            ):
                quiet_run(one_phase(trouble__skips=1), workdir)


@pytest.mark.computes
class RollbackTest(RunTest):
    @pytest.mark.slow
    def test_goes_back_once_with_a_lower_rate(self):
        folder = Path(self.create_tempdir())
        config = one_phase(trouble__skips=1, trouble__rollbacks=1, trouble__lr=0.25)
        with poisoned([5, 6, 7]):
            said = quiet_run(config, folder / "whole")
            # The first eight steps of the process are those before the rollback.
            killed_after(10, lambda: quiet_run(config, folder / "killed"))
            self.assertLen(jsonl.read(folder / "killed/train/rollbacks.jsonl"), 1)
            quiet_run(config, folder / "killed")
        self.assertRegex(said, r"3 steps in a row|2 steps in a row")
        self.assertRegex(said, r"Returning to step 4, with 0\.25 times the learning rate")
        for name in ("whole", "killed"):
            (row,) = jsonl.read(folder / name / "train" / "rollbacks.jsonl")
            self.assertEqual((row["back_to"], row["lr_scale"]), (4, 0.25))
            self.assertFalse(any(lines(folder / name, "skipped").values()))
        rates = lines(folder / "whole", "lr")
        schedule = build.phase(config, "train", 256).schedule
        np.testing.assert_allclose(rates[4], schedule(3), rtol=1e-6)
        np.testing.assert_allclose(rates[6], 0.25 * schedule(5), rtol=1e-6)
        self.assertEqual(rates, lines(folder / "killed", "lr"))
        self.same(*(final_state(folder / name, config)[0] for name in ("whole", "killed")))

    @pytest.mark.slow
    def test_goes_back_from_norms_that_no_evaluation_can_use(self):
        """They are met where step 8 would be saved, and at a stop after step 6."""
        folder, real = Path(self.create_tempdir()), alarm.of_norms

        def broken_at(*calls):
            counted = itertools.count(1)

            def of_norms(stats):
                bad = {"bn1.var": np.float32([-1, 1])} if next(counted) in calls else stats
                return real(bad)

            return mock.patch.object(alarm, "of_norms", of_norms)

        config = one_phase(trouble__rollbacks=1, trouble__lr=0.25)
        with broken_at(3):  # before the first step, at 4, at 8
            said = quiet_run(config, folder / "whole")
        self.assertRegex(said, r"at step 8 the running variance of bn1 is negative .* to step 4, ")
        (row,) = jsonl.read(folder / "whole/train/rollbacks.jsonl")
        self.assertEqual((row["step"], row["back_to"], row["lr_scale"]), (8, 4, 0.25))
        schedule = build.phase(config, "train", 256).schedule
        np.testing.assert_allclose(lines(folder / "whole", "lr")[6], 0.25 * schedule(5), rtol=1e-6)
        with (
            broken_at(3),
            self.assertRaisesRegex(stopping.Diverged, "bn1 is negative.*step 4 under"),
        ):
            quiet_run(one_phase(), folder / "none")
        with checkpoint_of(folder / "none") as checkpoints:
            self.assertEqual(checkpoints.latest_step(), 4)
        with broken_at(3):  # where it stops
            stop_after(6, lambda: quiet_run(one_phase(), folder / "stopped"))
        self.assertLen(list((folder / "stopped/train/stopped").iterdir()), 1)
        with checkpoint_of(folder / "stopped") as checkpoints:
            self.assertEqual(checkpoints.latest_step(), 4)

    @pytest.mark.slow
    def test_a_signal_while_it_goes_back_is_heard(self):
        workdir, real = Path(self.create_tempdir()) / "run", stopping.Trouble.roll_back

        def signalled(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            real(*arguments)

        config = one_phase(trouble__skips=1, trouble__rollbacks=1)
        with (
            poisoned([5, 6, 7]),
            mock.patch.object(stopping.Trouble, "roll_back", signalled),
            self.assertRaisesRegex(stopping.Preempted, "stopped after step 4 of 12, saved"),
        ):
            quiet_run(config, workdir)

    @pytest.mark.matrix
    def test_no_more_of_them(self):
        workdir = Path(self.create_tempdir()) / "run"
        config = one_phase(trouble__skips=1, trouble__rollbacks=1)
        message = r"norm nan; . steps in a row .* checkpoint is step 4 .*Set trouble.rollbacks=2 to"
        with poisoned([6, 7, 8, 9, 10], scales=(1.0, 0.5)):
            for _ in range(2):  # the second time at once
                with self.assertRaisesRegex(stopping.Diverged, message):
                    quiet_run(config, workdir)
            with checkpoint_of(workdir) as checkpoints:
                self.assertEqual(checkpoints.latest_step(), 4)
            rows = jsonl.read(workdir / "train" / "rollbacks.jsonl")
            self.assertEqual([row["lr_scale"] for row in rows], [0.5, 0.25])
            said = quiet_run(one_phase(trouble__skips=1, trouble__rollbacks=2), workdir)
        self.assertIn("train: step 4 of 12", said)
        self.assertEqual(list(lines(workdir, "loss")), list(range(1, 13)))

    @pytest.mark.matrix
    def test_before_there_is_a_checkpoint(self):
        workdir = Path(self.create_tempdir()) / "run"
        config = tiny(trouble__skips=1, trouble__rollbacks=1, log__every_steps=1)
        starts, real = [], training_run._state

        def noted(run, start):
            state = real(run, start)
            starts.append((run.name, int(state.step), np.array(state.params["head.fc.kernel"])))
            return state

        with poisoned([1, 2, 3]), mock.patch.object(training_run, "_state", noted):
            said = quiet_run(config, workdir)
        self.assertEqual(said.count("Returning to step 0, with 0.5 times"), 2)
        self.assertEqual([s[:2] for s in starts], [("pretrain", 0)] * 2 + [("train", 0)] * 2)
        for a, b in (starts[:2], starts[2:]):
            np.testing.assert_array_equal(a[2], b[2])


@contextlib.contextmanager
def checkpoint_of(workdir: Path):
    """The checkpoints of the adversarial phase."""
    with contextlib.closing(checkpoint.Checkpoints(workdir / "train" / "latest")) as checkpoints:
        yield checkpoints


@pytest.mark.computes
class LeftoversTest(RunTest):
    """What a kill may leave behind."""

    def run_of(self, epochs):
        workdir = Path(self.create_tempdir()) / "run"
        return workdir, one_phase(train__epochs=epochs)

    @pytest.mark.slow
    def test_of_checkpoints(self):
        workdir, config = self.run_of(3)
        quiet_run(config, workdir)
        latest = workdir / "train" / "latest"
        (latest / "8" / "meta").mkdir(parents=True)  # half removed
        (latest / "13.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)  # half written
        quiet_run(config, workdir)
        self.assertEqual([path.name for path in latest.iterdir()], ["12"])

    def test_names_that_are_no_steps(self):
        """Which once took the place of the checkpoint, and had it removed."""
        folder = Path(self.create_tempdir())
        with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
            checkpoints.save(4, {"a": np.zeros(3)}, {})
            checkpoints.wait()
        for name in ("0012", "12.bak", "²", "kept"):
            (folder / name).mkdir()
        (folder / "99").write_text("")
        with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
            self.assertEqual(checkpoints.latest_step(), 4)
            self.assertEqual(checkpoints.meta(4), {})
        (folder / "12" / "arrays").mkdir(parents=True)
        message = f"{folder}/12 is not a complete checkpoint: move it away, .* continue at step 4"
        with self.assertRaisesRegex(ValueError, message):
            checkpoint.Checkpoints(folder)
        self.assertEqual(checkpoint.steps(folder), [4, 12])

    @pytest.mark.slow
    def test_between_an_evaluation_and_its_line(self):
        """selection.jsonl has it, metrics.jsonl not yet."""
        workdir, config = self.run_of(3)
        quiet_run(config, workdir)
        path = workdir / "metrics.jsonl"
        before, selected = path.read_text(), (workdir / "train" / "selection.jsonl").read_text()
        *kept, last = before.splitlines(keepends=True)
        self.assertIn("selection_robust", last)
        jsonl.replace(path, "".join(kept))
        quiet_run(config, workdir)
        self.assertEqual(path.read_text(), before)
        self.assertEqual((workdir / "train" / "selection.jsonl").read_text(), selected)

    @pytest.mark.matrix
    def test_best_weights_that_were_removed(self):
        workdir, config = self.run_of(3)
        quiet_run(config, workdir)
        shutil.rmtree(workdir / "train" / "best")
        said = quiet_run(config, workdir)
        self.assertIn("train: step 12, selection split: clean", said)
        rows = jsonl.read(workdir / "train" / "selection.jsonl")
        self.assertEqual([row["step"] for row in rows], [4, 8, 12])
        self.assertNotIn("compiled", quiet_run(config, workdir))

    def test_weights_to_start_from_count_until_a_checkpoint_is_whole(self):
        workdir, config = self.run_of(1)
        config.unlock().train.warmup_epochs = 0
        config.lock()
        (workdir / "train" / "latest" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
        with (
            mock.patch.object(start_weights, "of_config", side_effect=ZeroDivisionError),
            self.assertRaises(ZeroDivisionError),
        ):
            quiet_run(config, workdir)


class LinesTest(absltest.TestCase):
    """What the loop reads from what it has written."""

    def run_of(self, name, logged, selected=()):
        workdir = Path(self.create_tempdir())
        (workdir / name).mkdir()
        for path, rows in (("metrics", logged), (f"{name}/selection", selected)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (workdir / f"{path}.jsonl").write_text(text)
        best = mock.Mock(**{"latest_step.return_value": 4})
        return phase.PhaseRun(None, workdir, name, *[None] * 4, best, None)

    def test_the_last_evaluation_is_one_of_the_phase(self):
        rows = [
            {"phase": "pretrain", "step": 4, "selection_robust": 0.0},
            {"phase": "pretrain", "step": 12, "selection_robust": 0.0},
            {"phase": "train", "step": 4, "loss": 2.0},
            {"phase": "train", "step": 4, "selection_clean": 0.5, "selection_robust": 0.25},
            {"phase": "train", "step": 9, "loss": 1.0},
        ]
        for name, logged, last in (
            ("train", rows, 4),
            ("pretrain", rows, 12),
            ("train", rows[:3], 0),
            ("train", [], 0),
        ):
            self.assertEqual(phase.scored(self.run_of(name, logged)), last)

    def overfitting(self, training, selection, *, images=10_000, name="train"):
        """Three evaluations at steps 4, 8 and 12, and what is logged in between, twice each."""
        logged = [{"phase": "pretrain", "step": k, "robust": 1 - k / 20} for k in range(1, 13)]
        for number, robust in enumerate(training):
            end = {"phase": "train", "step": 4 * number + 4}
            logged.append({"phase": "train", "step": 4 * number + 2, "robust": robust - 0.1})
            logged += [end | {"robust": robust + 0.1}, end | {"selection_robust": 0.0}]
        selected = [
            {"step": 4 * (number + 1), "robust": robust, "images": images}
            for number, robust in enumerate(selection)
        ]
        return selection_split._overfitting(self.run_of(name, logged, selected))

    def test_overfitting_compares_means_between_evaluations(self):
        """Each figure of the sentence, from the rows that it is a mean of."""
        self.assertRegex(
            self.overfitting([0.3, 0.5, 0.7], [0.5, 0.4, 0.3]),
            r"fallen from 50\.0% at evaluation 1 to 30\.0% at evaluation 3, while on training "
            r"batches it has risen from 30\.0% to 70\.0%",
        )
        self.assertRegex(
            self.overfitting([0.3, 0.5, 0.7, 0.8], [0.3, 0.5, 0.4, 0.3]),
            r"from 50\.0% at evaluation 2 to 30\.0% at evaluation 4, .* from 50\.0% to 80\.0%",
        )

    def test_overfitting_where_nothing_was_logged_in_between(self):
        """As with log.every_steps above an epoch, or where no step updated anything."""
        selected = [
            {"step": 4 * (number + 1), "robust": robust, "images": 10_000}
            for number, robust in enumerate((0.5, 0.3, 0.3))
        ]
        for there in (2, 10):  # before the best evaluation, or before the last
            logged = [{"phase": "train", "step": step, "skipped": 4} for step in (2, 6, 10)]
            logged.append({"phase": "train", "step": there, "robust": 0.3})
            self.assertIsNone(selection_split._overfitting(self.run_of("train", logged, selected)))


class AheadTest(absltest.TestCase):
    """What the loop hears of steps that are still on the device."""

    def row(self, loss=1.0, *, skipped=0, stop=0):
        return {
            "loss": jnp.float32(loss),
            "skipped": jnp.float32(skipped),
            "stop": jnp.int32(stop),
        }

    def test_is_heard_two_steps_later(self):
        ahead = Ahead()
        for number in range(1, 4):
            ahead.add(number, self.row(stop=15 * (number >= 1)))
            self.assertEqual(ahead.stop, (15, 0) if number == 3 else None)
        ahead.drain()
        self.assertEqual(ahead.stop, (15, 0))  # the first one counts
        self.assertEqual(ahead.window(), {"skipped": 0})

    def test_counts_those_in_a_row(self):
        ahead, found = Ahead(), []
        for number, skipped in enumerate([0, 1, 1, 0, 1, 1, 1], 1):
            ahead.add(number, self.row(np.nan if skipped else number, skipped=skipped))
            ahead.drain()
            found.append(ahead.skipped)
        self.assertEqual(found, [0, 1, 2, 0, 1, 2, 3])
        self.assertEqual((Ahead().skipped, Ahead({"skipped": 3}).skipped), (0, 3))
        self.assertEqual(ahead.window(), {"loss": 2.5, "skipped": 5})
        self.assertEqual(ahead.window(), {"skipped": 0})
