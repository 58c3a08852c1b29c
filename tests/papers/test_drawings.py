"""What the pictures of networks show, by the calls of matplotlib: places, values, titles."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.papers.networks import (
    augmentations,
    convergence,
    effectiveness,
    network_sample,
    perturbations,
    picture_parts,
    semantic_score,
    sparsity,
    synthesis,
)
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.results.comparison import groups_picture, picture
from jaxrobust.results.comparison.group_tests import Over
from jaxrobust.results.comparison.groups import GroupDifference
from jaxrobust.types import Threat, Weights


def sample(count: int = 3, channels: int = 1) -> NetworkSample:
    network = SimpleNamespace(num_classes=10, image_size=2, name="net")
    subject = SimpleNamespace(ball=Threat("linf", 0.2), network=network)
    images = np.linspace(0, 1, count * 4 * channels, dtype=np.float32)
    images = images.reshape(count, 2, 2, channels)
    labels = np.arange(count)
    return NetworkSample("net (x)", subject, None, images, labels, labels, ("a", "b", "c"))


def settings(name: str, steps: tuple[int, ...] = (3,), named=None, **others) -> AnalysisSettings:
    return AnalysisSettings(name, named or {"workdir": None}, 4, steps, **others)


class DrawingCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.figure = self.enter_context(mock.patch.object(picture_parts, "figure"))
        self.enter_context(mock.patch.object(picture_parts, "shades", lambda n: [*range(n)]))

    @property
    def about(self) -> str:
        return self.figure.call_args.args[0]

    def grid(self, module, *given) -> tuple[list, int, str]:
        with mock.patch.object(picture_parts, "grid") as grid:
            module.draw(*given)
        return grid.call_args.args


class GridsTest(DrawingCase):
    def test_images_fill_a_grid_row_by_row(self):
        made = self.figure.return_value
        made.subplots.return_value = panels = np.empty((2, 3), object)
        for place in np.ndindex(panels.shape):
            panels[place] = mock.Mock()
        cells = [(np.full((1, 1, c), 2.0 * c - 3), f"t{c}", c == 3) for c in (1, 3, 1, 3)]
        self.assertIs(picture_parts.grid(cells, 3, "two\nlines"), made)
        self.assertEqual(made.subplots.call_args.args, (2, 3))
        shown = [panel for panel in panels.ravel() if panel.imshow.called]
        self.assertEqual(shown, [*panels.ravel()[:4]])
        self.assertEqual(shown[0].imshow.call_args.args[0].tolist(), [[0.0]])  # clipped, and grey
        self.assertEqual(shown[1].imshow.call_args.args[0].shape, (1, 1, 3))
        self.assertEqual(shown[1].set_title.call_args.args, ("t3",))
        colours = [panel.set_title.call_args.kwargs["color"] for panel in shown]
        self.assertEqual([colour == "black" for colour in colours], [True, False, True, False])
        for panel in panels.ravel():
            panel.axis.assert_called_once_with("off")

    @parameterized.parameters((3, 1, 3), (3, 3, 4), (4, 1, 3), (5, 1, 6), (17, 3, 8))
    def test_perturbations(self, count, channels, across):
        seen = sample(count, channels)
        rows = [
            {"class": "a", "adversarial_prediction": (i + (i == 1)) % 3, "label": i % 3}
            for i in range(count)
        ]
        adversarial, change = seen.images / 2, seen.images / 4
        cells, wide, about = self.grid(
            perturbations, seen, rows, (adversarial, change), settings("perturbations")
        )
        kinds = 3 if channels == 1 else 4
        self.assertEqual((len(cells), wide), (min(count, 16) * kinds, across))
        first, second, third, *fourth = cells[kinds : 2 * kinds]
        np.testing.assert_array_equal(first[0], seen.images[1])
        np.testing.assert_array_equal(second[0], adversarial[1])
        np.testing.assert_array_equal(third[0], change[1])
        self.assertEqual([first[1:], second[1:]], [("a", False), ("c", True)])
        self.assertFalse(cells[1][2])  # which is right
        if fourth:
            luma = change[1] @ np.float32([0.299, 0.587, 0.114])
            np.testing.assert_allclose(fourth[0][0][..., 0], luma, rtol=1e-6)
        self.assertIn("PGD-3, linf", about)
        self.assertEqual("in grey" in about, bool(fourth))

    def test_synthesis(self):
        rows = [
            {"class": "a", "probability": 0.987, "prediction": 0, "target": 0},
            {"class": "b", "probability": 0.2, "prediction": 0, "target": 1},
        ]
        seen = sample(2)
        cells, across, about = self.grid(
            synthesis, seen, rows, seen.images, settings("synthesis", step_size=0.5)
        )
        self.assertEqual([cell[1:] for cell in cells], [("a 99%", False), ("b 20%", True)])
        self.assertEqual(across, 2)
        self.assertIn("3 steps of 0.5 from noise", about)
        images = np.zeros((20, 1, 1, 1))
        cells, across, _ = self.grid(synthesis, seen, rows * 10, images, settings("synthesis"))
        self.assertEqual((len(cells), across), (16, 4))

    def test_augmentations(self):
        base, views = np.zeros((2, 1, 1, 3)), np.arange(4.0).reshape(2, 2, 1, 1, 1)
        files = [Path("one.png"), Path("x" * 30 + ".png")]
        kinds = [("host", views), ("device", views + 4)]
        how = settings("augmentations", (), chain="heavy", views=2)
        cells, across, about = self.grid(augmentations, None, [], (files, base, kinds), how)
        self.assertEqual(across, 5)
        titles = ["one", "", "", "+ mixing, erasing", "+ mixing, erasing"]
        self.assertEqual([cell[1] for cell in cells[:5]], titles)
        self.assertEqual(cells[5][1], "x" * 20)
        self.assertEqual([cell[0].item() for cell in cells[6:10]], [2, 3, 6, 7])
        self.assertIn("2 views on the host, and as many after the device", about)
        kinds.pop()
        how = how._replace(chain="crop|flip")
        _, across, about = self.grid(augmentations, None, [], (files, base, kinds), how)
        self.assertEqual(across, 3)
        self.assertNotIn("device", about)


class CurvesTest(DrawingCase):
    def test_convergence(self):
        losses = np.arange(2 * 4 * 3, dtype=float).reshape(2, 4, 3)  # seeds, steps + 1, images
        convergence.draw(sample(), [], losses, settings("convergence", (0, 1, 3)))
        panel = self.figure.return_value.subplots.return_value
        images, _, mean, marks = panel.plot.call_args_list
        np.testing.assert_array_equal(images.args[0], np.arange(4))
        np.testing.assert_array_equal(images.args[1], losses.mean(0))
        np.testing.assert_array_equal(mean.args[1], losses.mean((0, 2)))
        self.assertEqual(marks.args[0], (0, 1, 3))
        np.testing.assert_array_equal(marks.args[1], losses.mean((0, 2))[[0, 1, 3]])
        self.assertIn(
            "loss of 3 images that are right clean, each the mean of 2 starts", self.about
        )

    def rows(self, places) -> list[dict]:
        return [
            {"checkpoint": name, "step": step, "attack_steps": k, "images": 9}
            | {"ce": step + k, "left_percent": 10 * k}
            for name, step in places.items()
            for k in (1, 5)
        ]

    def drawn(self, places, **how):
        left, right = mock.MagicMock(), mock.MagicMock()
        left.get_legend_handles_labels.return_value = ([], [])
        self.figure.return_value.subplots.return_value = left, right
        own = settings("effectiveness", (1, 5), **how)
        effectiveness.draw(sample(), self.rows(places), None, own)
        return left, right

    def test_effectiveness_over_few_checkpoints(self):
        left, right = self.drawn({"a": 0, "b": 7}, seeds=1)
        self.figure.return_value.subplots.assert_called_once_with(1, 2)
        for panel in (left, right):
            panel.set_ylim.assert_called_once_with(bottom=0)
        first, second = left.plot.call_args_list
        self.assertEqual((first.args[:2], second.args[:2]), (([0, 7], [1, 8]), ([0, 7], [5, 12])))
        self.assertEqual((first.kwargs["color"], second.kwargs["label"]), (0, "5"))
        self.assertEqual(right.plot.call_args.args[1], [50, 50])
        left.set_xticks.assert_called_once_with([0, 7], ["a", "b"], fontsize=8)
        right.set_ylabel.assert_called_once_with("left to 5 steps, % of its loss")
        self.assertIn("on 9 images, one random start", self.about)

    def test_phases_of_many_checkpoints_are_told_apart(self):
        names = ["pretrain 1", "pretrain 2", "train 1", "train 2", "train 3"]
        left, _ = self.drawn({name: 10 * i for i, name in enumerate(names[:4])}, seeds=3)
        left.set_xticks.assert_called_once_with([0, 10, 20, 30], names[:4], fontsize=8)
        left.set_xlabel.assert_not_called()
        left, right = self.drawn({name: 10 * i for i, name in enumerate(names)}, seeds=3)
        left.set_xticks.assert_not_called()
        for panel in (left, right):
            panel.set_xlabel.assert_called_once_with("steps of training")
            panel.axvline.assert_called_once_with(10, color="#888888", linestyle=":")
            self.assertEqual(panel.text.call_args.args, (10, 1.01, "train →"))
        self.assertIn("the mean of 3 random starts", self.about)


class BarsTest(DrawingCase):
    def test_a_bar_for_each_judge_the_first_on_top(self):
        above, below = mock.MagicMock(), mock.MagicMock()
        self.figure.return_value.subfigures.return_value = above, below
        below.subplots.return_value = cells = [mock.MagicMock() for _ in range(8)]
        below.axes = cells
        rows = [
            {"judge": name, "itself": name == "x", "top": 5, "images_top5": 0.5}
            | {"perturbations_top5": score}
            for name, score in (("x", 0.9), ("y", 0.1))
        ]
        change = np.zeros((3, 2, 2, 1), np.uint8)
        semantic_score.draw(sample(), rows, change, settings("semantic-score"))
        panel = above.subplots.return_value
        first, second = panel.barh.call_args_list
        np.testing.assert_allclose(first.args[0], [1.18, 0.18])
        np.testing.assert_allclose(first.args[1], [90, 10])
        np.testing.assert_allclose(second.args[1], [50, 50])
        places, names = panel.set_yticks.call_args.args
        self.assertEqual((places.tolist(), names), ([1, 0], ["x itself", "y"]))
        self.assertIn("chance is 50.0 %", self.about)
        titles = [cell.set_title.call_args.args[0] for cell in cells[:3]]
        self.assertEqual(titles, ["a", "b", "c"])
        shown = [cell.imshow.called for cell in cells]
        self.assertEqual(shown, [True] * 3 + [False] * 5)
        below.subplots.assert_called_once_with(1, 8)
        for cell in cells:  # those that are empty too
            cell.axis.assert_called_once_with("off")
        panel.set_xlim.assert_called_once_with(0, 112)  # with room for the numbers
        labels = [call.kwargs["label"] for call in (first, second)]
        self.assertEqual(labels, ["on perturbations", "on images"])
        self.assertIn("Top-5 accuracy on the perturbations alone (PGD-3, linf", self.about)
        self.assertIn("3 images)\nof net (x)", self.about)

    def test_histograms_mark_what_counts_as_zero(self):
        weights = np.float32([-2.0, 0.001, 0.01, 1.0])
        none = np.zeros(0, np.float32)
        sets = [sparsity.WeightGroup(name, 2, weights, none) for name in ("whole", "convolution")]
        panels = [mock.Mock(), mock.Mock()]
        self.figure.return_value.subplots.return_value = np.array(panels)[:, None]
        sparsity.draw("net", sets)
        density, edges = panels[0].stairs.call_args.args
        self.assertAlmostEqual(float((density * np.diff(edges)).sum()), 1, places=5)
        np.testing.assert_allclose(panels[0].axvspan.call_args.args, (-0.02, 0.02))
        titles = [panel.set_title.call_args.args[0] for panel in panels]
        expected = "50.0% of 4 weights in 2 tensors"
        self.assertEqual(titles, [f"whole network: {expected}", f"convolution: {expected}"])

    def test_sparsity_is_written_and_said(self):
        params = {"a.kernel": np.float32([[1.0, 0.001]]), "a.bias": np.float32([0.0, 0.0])}
        said, out = io.StringIO(), Path("out")
        with (
            mock.patch.object(picture_parts, "plotting"),
            mock.patch.object(sparsity.network_sample, "weights_of") as weights_of,
            mock.patch.object(picture_parts, "save", return_value=("t", "p")) as save,
            mock.patch.object(sparsity, "draw", return_value="figure") as draw,
            contextlib.redirect_stderr(said),
        ):
            weights_of.return_value = "net", Weights(params, {})
            self.assertEqual(sparsity.written({"workdir": None}, out), ("t", "p"))
            self.assertEqual(draw.call_args.args[0], "net")
            place, name, figure, rows = save.call_args.args
            self.assertEqual((place, name, figure), (out, "sparsity", "figure"))
            self.assertEqual(rows, sparsity.rows(sparsity.parts(params)))
            weights_of.return_value = "net", Weights({"a.bias": params["a.bias"]}, {})
            with self.assertRaisesRegex(ValueError, "net has no convolutions or linear maps"):
                sparsity.written({"workdir": None}, out)
        line = " ".join(said.getvalue().split())
        self.assertEqual(line, "whole 50.0% of 2 weights, 75.0% of all its parameters")


class CheckpointsTest(parameterized.TestCase):
    def test_named_ones_before_those_of_a_run(self):
        seen = sample()
        how = settings("effectiveness", named={"workdir": "w", "phase": "p"})
        with (
            mock.patch.object(network_sample, "other", lambda place, like: (place, like, place)),
            mock.patch.object(network_sample, "epochs", return_value=["of the run"]) as epochs,
        ):
            found = effectiveness._checkpoints(seen, how)
            self.assertEqual(found, ["of the run"])
            epochs.assert_called_once_with(Path("w"), seen.subject, "p")
            found = effectiveness._checkpoints(seen, how._replace(checkpoints=("x", "y")))
            self.assertEqual(found, [(0, "x", "x"), (1, "y", "y")])
        found = effectiveness._checkpoints(seen, settings("effectiveness"))
        self.assertEqual(found, [(0, "net (x)", None)])

    def test_pictures_in_folders(self):
        folder = Path(self.create_tempdir())
        (folder / "deep").mkdir()
        for name in ("b.JPG", "a.png", "notes.txt", "deep/c.webp"):
            (folder / name).write_text("")
        found = augmentations._files([folder / "notes.txt", folder], 9)
        self.assertEqual([path.name for path in found], ["notes.txt", "a.png", "b.JPG", "c.webp"])
        self.assertLen(augmentations._files([folder], 2), 2)
        with self.assertRaisesRegex(ValueError, "none.png: no such file"):
            augmentations._files([folder / "none.png"], 9)
        with self.assertRaisesRegex(ValueError, "names no picture"):
            augmentations._files([Path(self.create_tempdir())], 9)


class ComparisonTest(absltest.TestCase):
    def test_gaps_of_groups_are_intervals_in_points(self):
        panel, over = mock.Mock(), Over(0.02, -0.01, 0.05, 0.2)
        shown = {"clean": GroupDifference(np.ones(1), np.ones(1), over, None)}
        groups_picture._gaps(panel, shown)
        drawn = [call.args[:2] for call in panel.plot.call_args_list]
        self.assertEqual(drawn, [([-1.0, 5.0], [0, 0]), ([2.0], [0])])

    def test_every_line_of_differences_is_inside_the_first_above(self):
        panel, one = mock.Mock(), mock.Mock(low=0.0, difference=0.1, high=0.2)
        picture._forest(panel, "accuracy", [("a", one, False), ("b", one, True)], "minus A")
        low, high = panel.set_ylim.call_args.args
        self.assertGreater(low, 1)
        self.assertLess(high, 0)
        self.assertIn("red: told apart", panel.set_title.call_args.args[0])


if __name__ == "__main__":
    absltest.main()
