"""How often the parts of a phase happen."""

from unittest import mock

from absl.testing import absltest

from jaxrobust.config import base
from jaxrobust.doctor.estimate import account
from jaxrobust.doctor.estimate.devices import target
from jaxrobust.doctor.estimate.work import PhaseCost, work


class PhaseTest(absltest.TestCase):
    def test_weights_are_written_at_evaluations_and_the_state_beside(self):
        config = base().unlock()
        config.model.update(num_classes=10, image_size=8, in_channels=1)
        config.data.update(name="digits", selection_split="test[:50]", test_split="test")
        config.train.update(epochs=11, batch_size=32)
        config.evaluation.every_epochs = 2
        config.checkpoint.every_epochs = 4
        part = work(config)[0]
        once = PhaseCost(step=0.5, probe=2.0, selection=3.0, test=7.0, memory=9, figures={})
        once = once._replace(save=1.0, compile=11.0)
        with (
            mock.patch.object(account.build, "flops_per_image", return_value=1e6),
            mock.patch.object(account.here, "measured", return_value=once),
        ):
            spent = account._phase(part, target("cpu"), 0.4, 1.0, None)["parts_s"]
        self.assertEqual(part.selections, 6)  # after epochs 2 to 10, and after the last
        self.assertEqual(spent["checkpoints"], 6 + 3)
        self.assertEqual(spent["selection"], 6 * 3.0)
        self.assertEqual(spent["steps"], part.steps * 0.5)
        self.assertEqual(spent["alarm"], part.probes * 2.0)
        self.assertEqual((spent["test"], spent["compile"]), (7.0, 11.0))
