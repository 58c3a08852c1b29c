"""The table of a loss landscape: its points, what is computed of them, and where it goes on."""

import csv
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.papers.networks import landscape
from jaxrobust.papers.networks.landscape import Plane

ABOUT = {"images": 3, "split": "digits train", "seed": 0, "weights_sha256": "abc"}
POINTS = landscape.grid(3, 1.0)


def at(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A loss and an accuracy that say where they are of."""
    return 10 * points[:, 0] + points[:, 1], points[:, 1] / 4


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


class TableTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.table = Path(self.create_tempdir(), "landscape.csv")
        self.calls = []

    def compute(self, done: int = 0, step: int = 4, until: int = 9, about=ABOUT):
        def called(points):
            self.calls.append(points)
            return at(points)

        landscape._computed(self.table, called, POINTS[:until], done, step, about)

    def test_points_are_row_by_row(self):
        self.assertEqual(landscape.grid(3, 2.0)[:4].tolist(), [[-2, -2], [-2, 0], [-2, 2], [0, -2]])
        self.assertEqual(landscape.grid(51, 1.0)[51 * 51 // 2].tolist(), [0, 0])

    def test_each_point_once_and_all_calls_of_one_length(self):
        self.compute()
        self.assertEqual([len(points) for points in self.calls], [4, 4, 4])
        rows = read(self.table)
        loss, accuracy = at(POINTS)
        for key, values in (("a", POINTS[:, 0]), ("b", POINTS[:, 1]), ("loss", loss)):
            np.testing.assert_array_equal([float(row[key]) for row in rows], values)
        np.testing.assert_array_equal([float(row["accuracy"]) for row in rows], accuracy)
        for row in rows:
            self.assertEqual(
                {key: row[key] for key in ABOUT}, {k: str(v) for k, v in ABOUT.items()}
            )

    def test_it_goes_on_behind_the_last_whole_line(self):
        self.assertEqual(landscape._done(self.table, POINTS, ABOUT), 0)
        self.compute(until=5)
        with self.table.open("a") as file:
            file.write("0.0,1.")  # a kill
        self.assertEqual(landscape._done(self.table, POINTS, ABOUT), 5)
        self.compute(done=5)
        self.assertLen(read(self.table), 9)
        np.testing.assert_array_equal([float(row["a"]) for row in read(self.table)], POINTS[:, 0])
        self.assertEqual(landscape._done(self.table, POINTS, ABOUT), 9)
        self.assertEqual(self.table.read_text().count("loss"), 1)

    @parameterized.parameters(*ABOUT)
    def test_another_table_is_refused(self, key):
        self.compute()
        other = ABOUT | {key: 4 if isinstance(ABOUT[key], int) else "other"}
        with self.assertRaisesRegex(ValueError, "name another --out, or remove it"):
            landscape._done(self.table, POINTS, other)

    @parameterized.parameters((3, 2.0), (3, 1 + 1e-9), (5, 1.0), (1, 1.0))
    def test_other_points_are_refused(self, side, reach):
        self.compute()
        points = landscape.grid(side, reach)
        with self.assertRaisesRegex(ValueError, "is of other weights, images"):
            landscape._done(self.table, points, ABOUT)

    def test_more_points_than_there_are(self):
        self.compute()
        with self.assertRaisesRegex(ValueError, "is of other weights, images"):
            landscape._done(self.table, POINTS[:8], ABOUT)


class WrittenTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.params, self.stats = {"w": np.ones((2, 2), np.float32)}, {}
        subject = SimpleNamespace(dataset="digits", split="train", create=lambda dtype: dtype)
        seen = SimpleNamespace(
            name="net",
            subject=subject,
            logits_fn=SimpleNamespace(args=(self.params, self.stats)),
            images=np.zeros((3, 2, 2, 1), np.float32),
            labels=np.arange(3),
        )
        config = SimpleNamespace(data=SimpleNamespace(train_split="train[:90%]"))
        self.mocks = {}
        for name, value in (
            ("picture_parts.plotting", None),
            ("network_sample.seen", seen),
            ("runs.run_config", config),
            ("surface.losses", at),
            ("surface.direction", None),
            ("draw", None),
        ):
            own, _, attribute = name.rpartition(".")
            place = getattr(landscape, own) if own else landscape
            patched = mock.patch.object(place, attribute, return_value=value)
            self.mocks[attribute] = self.enter_context(patched)
        self.mocks["draw"].return_value = mock.Mock()
        self.mocks["direction"].side_effect = lambda params, seed, number: (seed, number)
        self.out = Path(self.create_tempdir(), "out")

    def write(self, seed: int = 0, **named):
        flags = dict.fromkeys(("workdir", "phase", "split", "dataset")) | named
        return landscape.written(flags, Plane(side=3, reach=0.5, points=2, seed=seed), self.out)

    def test_table_and_picture(self):
        table, picture = self.write()
        self.assertEqual((table, picture), (self.out / "landscape.csv", self.out / "landscape.png"))
        self.assertLen(read(table), 9)
        name, line, losses, about = self.mocks["draw"].call_args.args
        self.assertEqual((name, line.tolist()), ("net", [-0.5, 0, 0.5]))
        np.testing.assert_allclose(losses, at(landscape.grid(3, 0.5))[0].reshape(3, 3))
        self.assertEqual((about["images"], about["split"]), (3, "digits train"))
        figure = self.mocks["draw"].return_value
        self.assertEqual(figure.savefig.call_args.args, (picture,))
        net, params, stats, both, images, labels = self.mocks["losses"].call_args.args
        self.assertEqual(net, "float32")
        self.assertIs(params, self.params)
        self.assertEqual((stats, both), ({}, [(0, 0), (0, 1)]))
        self.assertEqual((len(images), labels.tolist()), (3, [0, 1, 2]))
        self.assertEqual(self.mocks["losses"].call_args.kwargs["batch"], 3)  # there are no more

    def test_what_is_there_is_drawn_alone(self):
        self.write()
        self.mocks["losses"].reset_mock()
        self.write()
        self.mocks["losses"].assert_not_called()
        self.assertEqual(self.mocks["draw"].call_count, 2)

    def test_other_directions_are_another_table(self):
        self.write()
        with self.assertRaisesRegex(ValueError, "name another --out"):
            self.write(seed=1)
        self.params["w"] = np.zeros((2, 2), np.float32)
        with self.assertRaisesRegex(ValueError, "name another --out"):
            self.write()

    @parameterized.parameters(
        ({}, "train"),
        ({"workdir": "w", "phase": "p"}, "train[:90%]"),
        ({"workdir": "w", "dataset": "digits"}, "train"),
        ({"workdir": "w", "split": "test"}, "test"),
        ({"split": "test[:9]"}, "test[:9]"),
    )
    def test_images_are_those_of_the_training(self, named, split):
        self.write(**named)
        self.assertEqual(self.mocks["seen"].call_args.args[0]["split"], split)
        self.assertEqual(self.mocks["seen"].call_args.kwargs, {"attacked": False})
        expected = [mock.call(Path("w"), "p")] if split == "train[:90%]" else []
        self.assertEqual(self.mocks["run_config"].mock_calls, expected)


class DrawTest(parameterized.TestCase):
    def drawn(self, losses: np.ndarray) -> tuple[str, mock.Mock]:
        with mock.patch.object(landscape.picture_parts, "figure") as figure:
            line = np.linspace(-1, 1, len(losses))
            landscape.draw("net", line, losses, {"images": 1234, "split": "digits train"})
        return figure.call_args.args[0], figure.return_value.subplots.return_value

    def test_the_first_direction_lies_across(self):
        losses = np.arange(9.0).reshape(3, 3) / 4
        title, panel = self.drawn(losses)
        self.assertIn("1,234 images of digits train, 1.000 in the middle", title)
        x, y, shown, levels = panel.contourf.call_args.args
        self.assertEqual((x.tolist(), y.tolist()), ([-1, 0, 1], [-1, 0, 1]))
        np.testing.assert_array_equal(shown, losses.T)
        np.testing.assert_allclose(levels, [0.1, 0.6, 1.1, 1.6, 2.1])  # one above the highest
        np.testing.assert_array_equal(panel.contour.call_args.args[2], shown)

    def test_at_least_three_levels_and_infinite_losses_are_the_highest(self):
        _, panel = self.drawn(np.full((3, 3), 0.05))
        self.assertLen(panel.contourf.call_args.args[3], 3)
        _, panel = self.drawn(np.array([[1, np.inf, 1], [1, np.nan, 1], [1, 1, 1.0]]))
        shown, levels = panel.contourf.call_args.args[2:]
        self.assertEqual(shown[1].tolist(), [landscape.LEVELS[-1] + 1] * 2 + [1])
        self.assertLen(levels, len(landscape.LEVELS))


if __name__ == "__main__":
    absltest.main()
