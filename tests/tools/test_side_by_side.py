"""Programs that compile at once, without a GPU and without compiling."""

import multiprocessing
from unittest import mock

from absl.testing import absltest

from tools.gpu import side_by_side


class SideBySideTest(absltest.TestCase):
    def test_leaves_out_what_is_late_or_ended(self):
        processes, ends = {}, {}
        for name in ("ready", "late", "ended"):
            here, ends[name] = multiprocessing.Pipe()
            processes[name, "PyTorch"] = (mock.Mock(), here)
        ends["ready"].send("compiled")
        ends["ended"].close()
        before = dict(processes)
        with mock.patch.object(side_by_side.sys, "stderr") as stderr:
            side_by_side.compiled(processes, 0.05)
        self.assertEqual([*processes], [("ready", "PyTorch")])
        said = "".join(call.args[0] for call in stderr.write.call_args_list)
        self.assertIn("PyTorch of late was not compiled within 0.05 s", said)
        self.assertIn("PyTorch of ended ended with an error, see above", said)
        for (name, _), (process, _) in before.items():
            self.assertEqual(process.kill.called, name != "ready", name)
