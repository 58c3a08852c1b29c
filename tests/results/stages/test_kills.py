"""One command from a config to an export, killed in each of its stages, and continued by itself."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest

import jaxrobust
from jaxrobust.runtime.files import jsonl
from jaxrobust.weights.trained import kept
from tests.support import killed
from tests.support.runs import one_phase, write_config

RUN, ATTACKS = "jaxrobust.training.run", "jaxrobust.evaluation.questions"
POINTS = (
    (f"{RUN}.splits", "device_batch", 7),  # in the second epoch
    ("jaxrobust.results.selection.choice", "_write", 3),  # the third candidate is lost
    (f"{ATTACKS}.several", "union", 1),  # behind the second threat
    ("jaxrobust.publish.export_torch", "publish", 1),  # all is written, and nothing in its place
    ("jaxrobust.results.stages.running", "_note", 1),  # in its place, and not noted
    None,
    None,
)


class KilledTest(absltest.TestCase):
    @pytest.mark.slow
    def test_the_same_command_ends_what_was_begun(self):
        folder = Path(self.create_tempdir().full_path)
        config = one_phase(test__images=40, train__epochs=3)
        write_config(folder / "digits.py", config)
        then = "select,apgd-ce:linf:0.1+l2:0.5,export:jaxrobust"
        words = ["train", "--config", "digits.py", "--then", then, "--noestimate"]
        ended = killed.run(words, folder, POINTS)
        self.assertEqual([each.code for each in ended], [-9] * 5 + [0, 0], ended[-1].said)
        run = folder / "runs" / "digits"

        said = Counter(
            re.findall("train, epoch (.), (raw|ema), 8 px: clean", "".join(e.said for e in ended))
        )
        again = {key: count for key, count in said.items() if count > 1}
        self.assertEqual((len(said), list(again.values())), (6, [2]))  # of which one was lost
        self.assertIn("train: step 4 of 12", ended[1].said)
        self.assertNotIn("train: step", ended[2].said)
        (tested,) = jsonl.read(run / "results.jsonl")

        chosen = kept.selected(run)
        rows = jsonl.read(run / "evaluation" / "results.jsonl")
        self.assertEqual([row["method"] for row in rows], ["apgd-ce", "apgd-ce", "union"])
        for row in rows:
            self.assertEqual(row["weights_sha256"], chosen.weights_sha256)
            self.assertEqual(row["image_ids"], tested["image_ids"])

        notes = [row["stage"] for row in jsonl.read(run / "stages.jsonl")]
        self.assertEqual(notes, then.split(","))
        for stage in notes:
            self.assertIn(f"{stage}: already done, see", ended[-1].said)
        self.assertEqual([p.name for p in (run / "export").iterdir()], ["jaxrobust"])
        net, params, stats = self.loaded(run / "export" / "jaxrobust")
        _, weights = kept.selected_weights(run, chosen)
        images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
        ours, theirs = (net.apply(*w, images)[0] for w in (weights, (params, stats)))
        np.testing.assert_array_equal(ours, theirs)

    def loaded(self, folder):
        network = jaxrobust.load(str(folder))
        return network.net, network.params, network.stats
