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
        # step, start, saved, evaluated: what is due
        (0, 0, 0, 0, ""),
        (3, 0, 0, 0, "logs"),
        (4, 0, 0, 0, "saves"),
        (8, 0, 0, 0, "saves evaluates"),
        (8, 0, 8, 0, "saves evaluates"),  # an evaluation saves first
        (9, 0, 0, 0, "logs saves evaluates"),
        (14, 0, 0, 0, "logs saves evaluates"),  # the end is one for all
        (14, 14, 14, 14, ""),
        (6, 0, 0, 0, "logs saves"),  # due until it is done
        (6, 0, 6, 0, "logs"),
        (7, 0, 6, 0, ""),
        (8, 0, 6, 0, "saves evaluates"),
        (6, 6, 4, 0, ""),  # nothing is logged where a run goes on
        (9, 6, 8, 8, "logs"),
    )
    def test_of_a_step(self, step, start, saved, evaluated, what):
        expected = Due(**{name: name in what.split() for name in Due._fields})
        self.assertEqual(due(step, EVERY, start=start, saved=saved, evaluated=evaluated), expected)

    @sweeps.rows(
        (4, 0, False), (8, 0, True), (9, 0, True), (9, 8, False), (12, 8, False), (14, 8, True),
        (14, 14, False),
    )  # fmt: skip
    def test_a_copy_of_every_second_epoch_and_of_the_last(self, step, kept, keeps):
        found = due(
            step, EVERY._replace(keep_epochs=2), start=0, saved=step, evaluated=step, copied=kept
        )
        self.assertEqual(found, Due(step % 3 == 0 or step == 14, keeps, keeps, False))
