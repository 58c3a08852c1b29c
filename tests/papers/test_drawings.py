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
    picture_parts,
    sparsity,
)
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.results.comparison import picture
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
            "loss of 3 correctly classified images, each the mean of 2 starts", self.about
        )


class BarsTest(DrawingCase):
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
        with self.assertRaisesRegex(ValueError, "contains no pictures"):
            augmentations._files([Path(self.create_tempdir())], 9)


class ComparisonTest(absltest.TestCase):
    def test_gaps_of_groups_are_intervals_in_points(self):
        panel, over = mock.Mock(), Over(0.02, -0.01, 0.05, 0.2)
        shown = {"clean": GroupDifference(np.ones(1), np.ones(1), over, None)}
        picture._gaps(panel, shown)
        drawn = [call.args[:2] for call in panel.plot.call_args_list]
        self.assertEqual(drawn, [([-1.0, 5.0], [0, 0]), ([2.0], [0])])

    def test_every_line_of_differences_is_inside_the_first_above(self):
        panel, one = mock.Mock(), mock.Mock(low=0.0, difference=0.1, high=0.2)
        picture._forest(panel, "accuracy", [("a", one, False), ("b", one, True)], "minus A")
        low, high = panel.set_ylim.call_args.args
        self.assertGreater(low, 1)
        self.assertLess(high, 0)
        self.assertIn("red: significant", panel.set_title.call_args.args[0])
