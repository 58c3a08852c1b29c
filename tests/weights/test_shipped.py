"""The trained network that the package ships: its names, and that it is what its record says."""

import json
import os
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.commands import report
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.questions import command, flags, stated
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.runtime.devices import compilation
from jaxrobust.types import Threat, Weights
from jaxrobust.weights import load
from jaxrobust.weights.fetch import shipped, sources
from jaxrobust.weights.store import hashes, weights_folder
from tests.support import sweeps


def records() -> dict[str, dict]:
    """The lines of the kept run, by phase."""
    text = (shipped.RUNS["quickstart"].folder / "results.jsonl").read_text()
    rows = map(json.loads, text.splitlines())
    return {row["weights"].partition(",")[0]: row for row in rows}


class ShippedTest(parameterized.TestCase):
    def test_every_phase_has_the_weights_of_its_record(self):
        rows = records()
        self.assertSameElements(rows, shipped.RUNS["quickstart"].phases)
        for phase, row in rows.items():
            folder = shipped.weights(f"quickstart:{phase}")
            about = weights_folder.about(folder)  # which compares the file's own hash
            self.assertEqual(about["weights_sha256"], row["weights_sha256"])
            loaded = load.load(f"quickstart:{phase}", tell=self.fail)
            self.assertEqual(
                hashes.weights_sha256(loaded.params, loaded.stats), row["weights_sha256"]
            )
            self.assertNotIn("+", row["commit"])  # of a checkout without changes
        self.assertGreater(rows["train"]["robust"], rows["pretrain"]["robust"] + 0.5)

    def test_names(self):
        self.assertEqual(shipped.weights("quickstart"), shipped.weights("quickstart:train"))
        self.assertEqual(sources.parse("quickstart:pretrain").kind, "folder")
        self.assertIsNone(shipped.weights("quickstarts"))
        self.assertIsNone(shipped.kept("runs/quickstart"))
        with self.assertRaisesRegex(ValueError, "has no phase 'robust'; use pretrain or train"):
            shipped.weights("quickstart:robust")

    def test_the_first_figure_is_that_of_the_record(self):
        """Of all images, and of weights that are wrong everywhere, none is right."""
        self.enter_context(absltest.mock.patch.object(compilation, "remember"))
        source = registry.open_source("digits", "test")
        sizes = {"image_size": 8, "preprocessing": "none", "images": len(source)}
        net, params, stats, _ = load.load("quickstart")
        given = Weights(params, stats), Prepared(source, **sizes)
        self.assertAlmostEqual(accuracy.clean_share(net, *given), records()["train"]["clean"])
        broken = params | {"head.fc.bias": np.full(10, np.nan, np.float32)}
        self.assertEqual(accuracy.clean_share(net, Weights(broken, stats), given[1]), 0)


class FlagsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(self.create_tempdir())

    @sweeps.rows((None, "quickstart"), ("pretrain", "quickstart:pretrain"))
    def test_the_word_stands_for_flags(self, phase, weights):
        found = stated.of_shipped(GivenFlags(shipped="quickstart", phase=phase, n=8))
        out = f"runs/evaluation-{weights.replace(':', '-')}"
        expected = GivenFlags(shipped=weights, weights=weights, dataset="digits", out=out, n=8)
        self.assertEqual(found, expected)
        plain = GivenFlags(weights="a.pt")
        self.assertEqual(stated.of_shipped(plain), plain)

    def test_each_phase_is_attacked_as_the_run_is(self):
        for phase in shipped.RUNS["quickstart"].phases:
            given = flags.placed(stated.of_shipped(GivenFlags(shipped="quickstart", phase=phase)))
            self.assertEqual(flags.settled(given)[1].threat, Threat("linf", 0.1))

    def test_what_is_given_stays(self):
        found = stated.of_shipped(GivenFlags(shipped="quickstart", dataset="npz:a", out="b"))
        self.assertEqual((found.dataset, found.out), ("npz:a", "b"))

    def test_a_wrong_flag_is_refused_before_the_first_figure(self):
        figure = self.enter_context(absltest.mock.patch.object(command, "_first_figure"))
        given = GivenFlags(shipped="quickstart", attack="apgd-ce", targets=3, n=8)
        with self.assertRaisesRegex(ValueError, "--targets=3 has no effect with --attack=apgd-ce"):
            command.evaluated(given)
        figure.assert_not_called()

    def test_the_first_figure_says_what_follows(self):
        given = flags.placed(
            stated.of_shipped(GivenFlags(shipped="quickstart", attack="apgd-ce", n=8))
        )
        _, subject, source = flags.settled(given)
        measured = absltest.mock.patch.object(command.accuracy, "clean_share", return_value=0.985)
        with measured, absltest.mock.patch.object(command, "say") as said:
            command._first_figure(given, subject, source, None)
        lines = [call.args[0] for call in said.call_args_list]
        self.assertEqual(lines[0], "quickstart: clean accuracy 98.5% on 8 images of digits")
        follows = (
            "quickstart: next is apgd-ce, linf 0.1; add --attack autoattack to run all of "
            "AutoAttack"
        )
        self.assertEqual(lines[1:], [follows])
        with measured, absltest.mock.patch.object(command, "say") as said:
            command._first_figure(given._replace(attack="clean"), subject, source, None)
        said.assert_called_once_with(lines[0])

    def test_another_network_beside_it(self):
        given = GivenFlags(shipped="quickstart", workdir="runs/1", function="a.py:f")
        with self.assertRaisesRegex(
            ValueError, "already names a network; leave --workdir and --function out"
        ):
            stated.of_shipped(given)

    def test_a_path_of_that_name(self):
        Path("quickstart").mkdir()
        with self.assertRaisesRegex(
            ValueError, "but a path here has the same name; write ./quickstart for"
        ):
            stated.of_shipped(GivenFlags(shipped="quickstart"))

    def test_a_report_of_the_kept_run_goes_where_we_are(self):
        made = report.run(report.ReportFlags(paths=(Path("quickstart"),)))
        self.assertEqual((made["file"], made["runs"], made["evaluations"]), ("report.html", 1, 2))
        self.assertEmpty(made["notes"])
        page = Path("report.html").read_text()
        for row in records().values():
            self.assertIn(row["weights_sha256"][:12], page)
