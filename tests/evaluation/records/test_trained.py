"""What a record says of a training, counted by hand."""

from absl.testing import absltest, parameterized

from jaxrobust.evaluation.records import trained
from jaxrobust.weights.trained import history
from tests.support import runs

ON = {"dataset": "digits", "split": "test"}


class TrainingTest(parameterized.TestCase):
    @parameterized.parameters(
        ("pretrain", {}, 2),  # clean epochs
        ("train", {}, 2 + 3 * (1 + 2)),
        ("train", {"attack__steps": 7}, 2 + 3 * (1 + 7)),
        ("train", {"attack__name": "fgsm", "attack__steps": 7}, 2 + 3 * (1 + 1)),
        ("train", {"pretrain__epochs": 0}, 3 * (1 + 2)),
    )
    def test_passes(self, phase, changes, passes):
        facts = trained.training([history.of_config(runs.tiny(**changes), phase)], **ON)
        self.assertEqual(facts["passes"], passes)
        names = [made["phase"] for made in facts["phases"]]
        self.assertEqual(names, ["pretrain", "train"][: 1 + (phase == "train")])

    def test_phases(self):
        clean, attacked = trained.training([history.of_config(runs.tiny(), "train")], **ON)[
            "phases"
        ]
        self.assertEqual(
            clean,
            {"phase": "pretrain", "objective": "clean", "epochs": 2}
            | {"attack": None, "attack_steps": 0},
        )
        known = {key: attacked[key] for key in ("attack", "attack_steps", "norm", "epsilon")}
        self.assertEqual(
            known, {"attack": "apgd", "attack_steps": 2, "norm": "linf", "epsilon": 0.1}
        )

    def test_a_phase_without_epochs_trained_on_nothing(self):
        config = runs.tiny(pretrain__epochs=0, data__train_split="test[:9]")
        self.assertFalse(
            trained.training([history.of_config(config, "pretrain")], **ON)["on_evaluated_images"]
        )
        self.assertTrue(
            trained.training([history.of_config(config, "train")], **ON)["on_evaluated_images"]
        )

    @parameterized.parameters(
        ("train[256:320]", "test", False, {}),
        ("test[:9]", "test", True, {"selection"}),
        ("test[:9]", "test[9:]", False, {}),
    )
    def test_weights_are_chosen_on_the_selection_split(self, chosen, evaluated, same, flags):
        config = runs.tiny(data__selection_split=chosen)
        facts = trained.training(
            [history.of_config(config, "train")], dataset="digits", split=evaluated
        )
        attack = config.evaluation.attack
        own = {"dataset": "digits", "split": chosen, "attack": attack, "on_evaluated_images": same}
        self.assertEqual(facts["selection"], own)
        self.assertEqual(trained.flags(facts).keys(), set(flags))

    def test_nothing_is_known_of_a_choice(self):
        chosen = {"dataset": "digits", "split": None, "attack": None}
        facts = trained.training([history.of_config(runs.tiny(), "train", chosen=chosen)], **ON)
        self.assertIsNone(facts["selection"]["on_evaluated_images"])
        self.assertIn("nothing says on which images", trained.flags(facts)["selection"])
        self.assertEqual(trained.flags(None), {})


if __name__ == "__main__":
    absltest.main()
