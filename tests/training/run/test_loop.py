"""Where the loop of a phase continues from, without a step being made."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest

from jaxrobust.training.run import goodput, loop
from tests.support.runs import tiny


class StepsTest(absltest.TestCase):
    """The order of what is done between two steps, with parts that only take notes."""

    def loop(self, *, start=0, total=4, fails=(), trouble=(), sound=True, stops=(), ends=()):
        events = []
        fake = mock.MagicMock()
        fake.step, fake.start, fake.saved, fake.evaluated, fake.kept = (
            start,
            start,
            start,
            start,
            start,
        )
        fake.every = loop.Every(
            log_steps=3,
            checkpoint_epochs=1,
            evaluation_epochs=2,
            steps_per_epoch=2,
            total_steps=total,
            keep_epochs=2,
        )
        fake.ahead.stop = None
        fake.ahead.drain = lambda: events.append("drain")

        def note(name):
            def call(*given):
                events.append(f"{name} {fake.step}")
                if name in ("evaluate", "keep"):
                    setattr(fake, {"evaluate": "evaluated", "keep": "kept"}[name], fake.step)

            return call

        for name in ("log", "save", "keep", "evaluate", "heed"):
            setattr(fake, name, note(name))

        def take():
            fake.step += 1
            events.append(f"take {fake.step}")
            if fake.step in ends:
                fake.ahead.stop = (15, fake.step)

        fake.take, fake.sound = take, lambda: sound
        fake.troubled = lambda now: (fake.step, "why") if fake.step in trouble else None
        fake.stopped = lambda why, step: RuntimeError(f"stopped by {why} after {step}")
        fake.stops.at_once = lambda: 2 if fake.step in stops else 0
        made = mock.Mock()
        made.opened = lambda: contextlib.nullcontext(fake)
        phase = SimpleNamespace(total_steps=total)
        run = SimpleNamespace(name="train", latest="latest", phase=phase, clock=goodput.NONE)
        with mock.patch.object(loop, "_Loop", lambda *given: made):
            try:
                reached = loop.steps(run, None, None)
            except RuntimeError as error:
                reached = str(error)
        return reached, events, fake

    def test_order(self):
        reached, events, _ = self.loop()
        self.assertIs(reached, True)
        expected = ["take 1", "take 2", "drain", "save 2", "take 3", "drain", "log 3", "take 4"]
        expected += ["drain", "log 4", "save 4", "keep 4", "evaluate 4", "heed 4"]
        self.assertEqual(events, expected)

    def test_trouble_is_seen_before_anything_is_written(self):
        reached, events, fake = self.loop(trouble=(2,))
        self.assertIs(reached, False)
        self.assertEqual(events, ["take 1", "take 2", "drain"])
        fake.trouble.roll_back.assert_called_once_with(2, "why")

    def test_what_no_rollback_may_come_back_to_is_not_kept(self):
        reached, events, fake = self.loop(sound=False)
        self.assertEqual([e for e in events if e.split()[0] in ("save", "keep", "evaluate")], [])
        self.assertEqual((reached, fake.saved), (True, 0))

    def test_stops(self):
        reached, events, _ = self.loop(stops=(2,))
        self.assertEqual((reached, events[-1]), ("stopped by 2 after 2", "save 2"))
        reached, events, _ = self.loop(ends=(1,))
        self.assertEqual((reached, events), ("stopped by 15 after 1", ["take 1"]))


class PartsTest(absltest.TestCase):
    """What is logged, saved and kept of a step."""

    def fake(self, **changes):
        config = tiny(attack__warmup_epochs=2).unlock()
        phase = SimpleNamespace(
            schedule=lambda step: 0.5 / (step + 1), steps_per_epoch=4, total_steps=12, bn_group=16
        )
        fake = mock.MagicMock()
        fake.run = SimpleNamespace(
            config=config, name="train", phase=phase, workdir=Path("nowhere")
        )
        fake.run.latest, fake.run.trackers, fake.run.clock = mock.Mock(), mock.Mock(), goodput.NONE
        fake.step, fake.dead = 7, ""
        fake.trouble.lr_scale = 0.25
        fake.damage = SimpleNamespace(known=[1, 2], new=[3])
        fake._epsilon_share = lambda step: loop._Loop._epsilon_share(fake, step)
        for key, value in changes.items():
            setattr(fake, key, value)
        return fake

    def logged(self, row, **changes):
        fake, said = self.fake(**changes), []
        fake.ahead.window = lambda: dict(row)
        fake.progress.show = lambda step, means: {"images_per_second": 3.0}
        fake.write = lambda step, values: said.append((step, values))
        with mock.patch.object(loop, "say", said.append):
            loop._Loop.log(fake)
        return said

    def test_a_line(self):
        ((step, values),) = self.logged({"loss": 1.0, "skipped": 0})
        # Of the update before: its rate, times that of the rollbacks, and its radius.
        expected = {"loss": 1.0, "skipped": 0, "damaged_images": 3, "lr": 0.25 * 0.5 / 7}
        expected |= {"epsilon": 0.1 * 0.5, "images_per_second": 3.0}
        self.assertEqual((step, values), (7, expected))
        ((_, values),) = self.logged({"skipped": 3})
        self.assertNotIn("images_per_second", values)
        fake = self.fake()
        fake.run.config.train.objective = "clean"
        ((_, values),) = self.logged({"loss": 1.0, "skipped": 0}, run=fake.run)
        self.assertNotIn("epsilon", values)
        fake.run.config.train.objective, fake.run.config.attack.warmup_epochs = "adversarial", 0
        ((_, values),) = self.logged({"loss": 1.0, "skipped": 0}, run=fake.run)
        self.assertNotIn("epsilon", values)

    def test_a_copy_has_both_weights(self):
        state = SimpleNamespace(params="params", stats="stats")
        fake, order = self.fake(state=state), []
        fake.run.latest.wait = lambda: order.append("wait")
        with (
            mock.patch.object(loop, "averaged", lambda state: ("mean", "mean stats")),
            mock.patch.object(loop.kept, "keep", lambda *given, **how: order.append((given, how))),
        ):
            loop._Loop.keep(fake)
        both = loop.kept.Kept("params", "stats", "mean", "mean stats")
        kept = (Path("nowhere"), "train", 7, both), {"steps_per_epoch": 4}
        self.assertEqual((order, fake.kept), (["wait", kept], 7))

    def stopped(self, *, skipped=0, broken=""):
        fake = self.fake(state=SimpleNamespace(stats={}))
        fake.ahead.skipped = skipped
        fake.sound = lambda: not skipped
        fake.run.stopped, saved = mock.Mock(), []
        fake.save = saved.append
        fake.stops.exception = lambda why, text: (why, text)
        with mock.patch.object(loop.alarm, "of_norms", lambda stats: loop.alarm.Norms(broken, "")):
            why, text = loop._Loop.stopped(fake, 15, 9)
        self.assertEqual((why, fake.step, len(saved)), (15, 9, 1))
        return text, saved[0] is fake.run.latest

    def test_a_stop_saves_where_a_rollback_may_come_back_to_or_aside(self):
        text, latest = self.stopped()
        self.assertTrue(latest)
        self.assertStartsWith(text, "stopped after step 9 of 12, saved in nowhere; run the same")
        text, latest = self.stopped(skipped=2)
        self.assertFalse(latest)
        self.assertEndsWith(text, "(the last 2 steps had no finite gradient)")
        self.assertFalse(self.stopped(broken="nan")[1])

    def test_a_stop_is_heeded_where_no_step_follows(self):
        fake = self.fake()
        fake.stopped = lambda why, step: RuntimeError(f"stopped by {why} after {step}")
        fake.stops.now.return_value = 0
        loop._Loop.heed(fake)
        fake.stops.now.return_value = 15
        with self.assertRaisesRegex(RuntimeError, "stopped by 15 after 7"):
            loop._Loop.heed(fake)

    def taken(self, **changes):
        """Take a step of a program that doubles the state."""
        fake = self.fake(state=5, batch=None, probe=None, **changes)
        fake.run.config.alarm.every_steps = 4
        fake.compiled = lambda state, images, control: (2 * state, {"loss": (images, control)})
        fake.control = lambda *told: told
        fake.stream = iter([SimpleNamespace(damaged="one")])
        fake.stops.failure, fake.stops.to_tell.return_value = None, 3
        fake.trace.dispatched.return_value = False
        fake._epsilon_share = lambda step: step / 8
        fake.run.phase.mesh = "mesh"
        return fake

    def test_a_step(self):
        fake = self.taken()
        with mock.patch.object(loop.splits, "device_batch", lambda mesh, batch: (mesh, batch)):
            for probe, looked in ((None, False), (lambda *given: {"alarm": given}, True)):
                fake.probe, fake.step = probe, 7
                fake.stream = iter([batch := SimpleNamespace(damaged="one")])
                before, fake.damage = fake.state, mock.Mock()
                fake.trace.dispatched.return_value = looked
                fake.progress.reset_mock()
                loop._Loop.take(fake)
                self.assertEqual((fake.step, fake.state, fake.batch), (8, 2 * before, batch))
                fake.damage.add.assert_called_once_with("one")
                values = {"loss": (("mesh", batch), (3, 7 / 8))}  # the share of the step before
                fake.progress.dispatched.assert_called_once_with(8, mock.ANY)
                if looked:  # at a multiple of four; of the state after it
                    values["alarm"] = (fake.state, ("mesh", batch), (3, 7 / 8))
                fake.ahead.add.assert_called_with(8, values)
                resumed = fake.progress.resume.call_args_list
                self.assertEqual(resumed, [mock.call(8)] if looked else [])
            fake.stream, fake.step, fake.ahead = iter([batch]), 8, mock.Mock()
            loop._Loop.take(fake)  # to the ninth, at which the alarm does not look
            self.assertNotIn("alarm", fake.ahead.add.call_args.args[1])

    def test_a_host_whose_images_fail_takes_steps_until_all_stop(self):
        error = loop.registry.DataError("damaged")

        def stream():
            raise error
            yield

        fake = self.taken()
        fake.stream, fake.stops.failed.return_value = stream(), None
        with (
            mock.patch.object(loop.splits, "device_batch", lambda mesh, batch: batch),
            mock.patch.object(loop.splits, "blank", return_value="blank") as blank,
        ):
            loop._Loop.take(fake)
            blank.assert_called_once_with(fake.run)
            self.assertEqual((fake.batch, fake.step), ("blank", 8))
            fake.stops.failed.assert_called_once_with(error)
            fake.stops.failed.return_value = 4
            fake.stopped = lambda why, step: RuntimeError(f"stopped by {why} after {step}")
            fake.batch, fake.stream = "the last one", stream()
            with self.assertRaisesRegex(RuntimeError, "stopped by 4 after 8") as caught:
                loop._Loop.take(fake)
            self.assertIs(caught.exception.__cause__, error)
            self.assertEqual((fake.batch, fake.step), ("the last one", 8))
