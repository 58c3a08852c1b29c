"""The sweep of planted faults: what it counts as found, as blamed wrongly and as an alarm."""

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.doctor.config_checks import CONFIG_CHECKS
from jaxrobust.doctor.network_checks import NETWORK_CHECKS
from jaxrobust.runtime.commandline import functions
from tests.support import paths
from tests.support.runs import quiet_run, tiny
from tools import bench_doctor
from tools.bench_doctor import Case, judged


def told(**levels):
    """The doctor's JSON; `after_x="y"` stands for a yellow x that follows from y."""
    found = []
    for name, level in levels.items():
        after = level if name.startswith("after_") else None
        check = name.removeprefix("after_").replace("_", "-")
        found.append({"check": check, "level": "yellow" if after else level, "follows_from": after})
    return {"examined": [{"findings": found[:1]}, {"findings": found[1:]}]}


class JudgedTest(parameterized.TestCase):
    def test_right(self):
        for check, levels, right in (
            ("softmax", {"softmax": "red", "radius": "green"}, True),
            ("softmax", {"softmax": "red", "after_radius": "softmax"}, True),
            ("softmax", {"softmax": "red", "radius": "red"}, False),  # blamed wrongly
            ("softmax", {"softmax": "red", "radius": "yellow"}, False),
            ("softmax", {"softmax": "yellow"}, False),  # not red
            ("softmax", {"softmax": "green"}, False),
            (None, {"softmax": "green", "resizing": "skipped"}, True),
            (None, {"softmax": "yellow"}, False),  # an alarm
            (None, {"softmax": "red"}, False),
        ):
            with self.subTest(row=(check, levels, right)):
                row = judged(Case("x", (), check), told(**levels), 1.0)
                self.assertEqual(row.right, right, row)

    def test_faults_name_checks(self):
        names = {check.name for check in (*NETWORK_CHECKS, *CONFIG_CHECKS)}
        faults = {*bench_doctor.NETWORKS.values(), *bench_doctor.CONFIGS, "accuracy", "resizing"}
        self.assertEqual(faults, names)  # none is without a fault that it is to find


@pytest.mark.slow
class SweepTest(absltest.TestCase):
    def test_a_run(self):
        folder = Path(self.create_tempdir())
        run = folder / "run"
        quiet_run(tiny(), run)
        with mock.patch.dict(os.environ, {"PLANTED_IN": str(run)}):
            file = paths.ROOT / "tools" / "planted" / "networks.py"
            images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
            for fault in set(bench_doctor.NETWORKS) - {"bgr"}:
                logits = functions.find("--function", f"{file}:{fault}").function(images)
                self.assertEqual(logits.shape, (4, 10), fault)
        args = mock.Mock(runs=[run], plant=None, photographs=None, json=True, only="one-step")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            (row,) = bench_doctor.run(args)["rows"]
        self.assertEqual((row["red"], row["right"]), (["one-step"], True))
        self.assertIn("1 of 1 planted faults found, 0 missed", said.getvalue())
        args.only = "on-step"
        with self.assertRaisesRegex(ValueError, "--only=on-step is not a row"):
            bench_doctor.run(args)
