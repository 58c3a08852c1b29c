"""What the runs cost that a run starts from by their configs."""

import contextlib
import json
from pathlib import Path
from unittest import mock

from absl.testing import absltest

from jaxrobust.config import plain
from jaxrobust.doctor import command
from jaxrobust.doctor.estimate import account, devices
from tests.support.runs import tiny
from tools.generate import refresh_configs


class StartCostTest(absltest.TestCase):
    def test_each_until_one_is_finished(self):
        self.enterContext(contextlib.chdir(self.create_tempdir().full_path))
        config = refresh_configs.load("larger_radius:convnext_t_cvst,start=trained")
        target = devices.target("v5e:8x8")
        found = {"training": {"hours": 2.5, "chip_hours": 160.0}}

        def estimated():
            with mock.patch.object(account, "account", return_value=found) as asked:
                how = {"utilisation": 0.2}
                rows = account.start_costs(config, Path("runs/larger"), target, **how)
                for call in asked.call_args_list:  # AutoAttack is that of the run that starts
                    self.assertEqual(call.kwargs, how | {"seconds": 3.0, "images": 0})
                    self.assertEqual(call.args[1], target)
                return asked.call_count, [account.start_sentence(row) for row in rows]

        count, said = estimated()
        self.assertEqual((count, len(said)), (2, 2))
        self.assertEqual(
            said[0],
            "It starts from runs/revisiting_at-convnext_t_cvst, which is not finished: that run "
            "costs 2.5 hours and 160 chip-hours more, once for all that start from it.",
        )
        self.assertStartsWith(said[1], "It starts from runs/convstem_pretraining-convnext_t_cvst,")
        folder = Path("runs/convstem_pretraining-convnext_t_cvst")
        (folder / "pretrain" / "best" / "7").mkdir(parents=True)
        whole = plain(refresh_configs.load("convstem_pretraining:convnext_t_cvst"))
        (folder / "config.json").write_text(json.dumps({"version": 1} | whole))
        self.assertIn("which is not finished, and was begun: that", estimated()[1][1])
        line = json.dumps({"weights": "pretrain, step 7, ema"})
        (folder / "results.jsonl").write_text(f"{line}\n")
        count, said = estimated()
        self.assertEqual(count, 1)
        self.assertIn("which is finished and costs nothing.", said[1])

    def test_the_doctor_refuses_a_start_of_another_network(self):
        config = tiny(init__weights="run:convstem_pretraining:vit_s_cvst", pretrain__epochs=0)
        with self.assertRaisesRegex(ValueError, "run:convstem.*those of vit_s_cvst; set model.na"):
            command.of_config(config, devices=1, name="tiny", tell=self.fail)
