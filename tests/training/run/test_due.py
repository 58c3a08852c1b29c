"""What is due at a step, from two epochs of four steps and an evaluation every second epoch."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import parameterized

from jaxrobust.training.run import phase
from jaxrobust.training.run.loop import Due, Every, due
from tests.support import sweeps

EVERY = Every(
    log_steps=3,
    checkpoint_epochs=1,
    evaluation_epochs=2,
    steps_per_epoch=4,
    total_steps=14,
)


class LastTest(parameterized.TestCase):
    @sweeps.rows(
        (None, None, "latest", None),
        (0, None, "latest", 0),
        (8, None, "latest", 8),
        (8, 8, "latest", 8),
        (8, 9, "stopped", 9),
        (9, 8, "latest", 9),
        (None, 3, "stopped", 3),
    )
    def test_a_run_goes_on_from_the_later_checkpoint(self, latest, stopped, name, step):
        places = {"latest": latest, "stopped": stopped}
        run = SimpleNamespace(
            **{key: mock.Mock(latest_step=lambda at=at: at) for key, at in places.items()}
        )
        self.assertEqual(phase.last(run), (getattr(run, name), step))

    def test_who_goes_on_is_noted_by_one_host(self):
        run = SimpleNamespace(file=Path("there").joinpath)
        for process, written in ((0, True), (1, False)):
            with (
                mock.patch.object(phase.jax, "process_index", return_value=process),
                mock.patch.object(phase.in_use, "devices", return_value="2 x chip"),
                mock.patch.object(phase.jsonl, "append") as append,
            ):
                phase.note_resumption(run, 9)
            self.assertEqual(append.called, written)
            if written:
                path, note = append.call_args.args
                self.assertEqual(path, Path("there/resumptions.jsonl"))
                self.assertRegex(note.pop("time"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
                self.assertEqual(note, {"step": 9, "devices": "2 x chip"})


class DueTest(parameterized.TestCase):
    @sweeps.rows(
        (0, Due(logs=False, saves=False, keeps=False, evaluates=False)),
        (3, Due(logs=True, saves=False, keeps=False, evaluates=False)),
        (4, Due(logs=False, saves=True, keeps=False, evaluates=False)),
        (8, Due(logs=False, saves=True, keeps=False, evaluates=True)),
        (9, Due(logs=True, saves=True, keeps=False, evaluates=True)),
        (14, Due(logs=True, saves=True, keeps=False, evaluates=True)),  # the end is one for all
    )
    def test_from_the_start(self, step, expected):
        self.assertEqual(due(step, EVERY, start=0, saved=0, evaluated=0), expected)

    def test_stays_due_until_it_is_done(self):
        late = due(6, EVERY, start=0, saved=0, evaluated=0)
        self.assertTrue(late.saves)
        self.assertFalse(due(6, EVERY, start=0, saved=6, evaluated=0).saves)
        self.assertFalse(due(7, EVERY, start=0, saved=6, evaluated=0).saves)
        self.assertTrue(due(8, EVERY, start=0, saved=6, evaluated=0).saves)

    def test_an_evaluation_saves_first(self):
        self.assertTrue(due(8, EVERY, start=0, saved=8, evaluated=0).saves)

    @sweeps.rows(
        (4, 0, False), (8, 0, True), (9, 0, True), (9, 8, False), (12, 8, False), (14, 8, True),
        (14, 14, False),
    )  # fmt: skip
    def test_a_copy_of_every_second_epoch_and_of_the_last(self, step, kept, keeps):
        found = due(
            step, EVERY._replace(keep_epochs=2), start=0, saved=step, evaluated=step, copied=kept
        )
        self.assertEqual(found, Due(step % 3 == 0 or step == 14, keeps, keeps, False))

    def test_nothing_is_logged_where_a_run_goes_on(self):
        self.assertFalse(due(6, EVERY, start=6, saved=4, evaluated=0).logs)
        self.assertTrue(due(9, EVERY, start=6, saved=8, evaluated=8).logs)

    def test_nothing_is_due_twice_at_the_end(self):
        done = due(14, EVERY, start=14, saved=14, evaluated=14)
        self.assertEqual(done, Due(logs=False, saves=False, keeps=False, evaluates=False))
