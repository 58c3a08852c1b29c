"""What a record says of a training, counted by hand."""

from absl.testing import parameterized

from jaxrobust.evaluation.records import of_weights
from jaxrobust.weights.trained import history
from tests.support import runs, sweeps

ON = {"dataset": "digits", "split": "test"}


class TrainingTest(parameterized.TestCase):
    @sweeps.rows(
        ("pretrain", {}, 2),  # clean epochs
        ("train", {}, 2 + 3 * (1 + 2)),
        ("train", {"attack__steps": 7}, 2 + 3 * (1 + 7)),
        ("train", {"attack__name": "fgsm", "attack__steps": 7}, 2 + 3 * (1 + 1)),
        ("train", {"pretrain__epochs": 0}, 3 * (1 + 2)),
    )
    def test_passes(self, phase, changes, passes):
        facts = of_weights.training([history.of_config(runs.tiny(**changes), phase)], **ON)
        self.assertEqual(facts["passes"], passes)
        names = [made["phase"] for made in facts["phases"]]
        self.assertEqual(names, ["pretrain", "train"][: 1 + (phase == "train")])

    def test_phases(self):
        facts = of_weights.training([history.of_config(runs.tiny(), "train")], **ON)
        clean, attacked = facts["phases"]
        self.assertEqual(
            clean,
            {"phase": "pretrain", "objective": "clean", "epochs": 2}
            | {"attack": None, "attack_steps": 0},
        )
        known = {key: attacked[key] for key in ("attack", "attack_steps", "norm", "epsilon")}
        self.assertEqual(
            known, {"attack": "apgd", "attack_steps": 2, "norm": "linf", "epsilon": 0.1}
        )
        config = runs.tiny(attack__name="pgd", attack__relative_step=0.5)
        facts = of_weights.training([history.of_config(config, "train")], **ON)
        pgd = facts["phases"][1]
        self.assertEqual((pgd["attack"], pgd["relative_step"]), ("pgd", 0.5))
        self.assertNotIn("step_size", pgd)

    def test_a_phase_without_epochs_trained_on_nothing(self):
        config = runs.tiny(pretrain__epochs=0, data__train_split="test[:9]")
        for phase, on_them in (("pretrain", False), ("train", True)):
            facts = of_weights.training([history.of_config(config, phase)], **ON)
            self.assertEqual(facts["on_evaluated_images"], on_them)

    @sweeps.rows(
        ("test", {}, False),
        ("train[:10%]", {}, True),
        ("test", {"train_split": "test"}, True),
        ("test", {"extra": "digits", "extra_split": "test"}, True),
        ("test", {"extra": "other", "extra_split": "test"}, False),
    )
    def test_images_that_were_trained_on(self, split, changes, expected):
        config = runs.tiny(**{f"data__{key}": value for key, value in changes.items()})
        facts = of_weights.training(
            [history.of_config(config, "train")], dataset="digits", split=split
        )
        self.assertEqual(facts["on_evaluated_images"], expected)

    @sweeps.rows(
        ({"dataset": "digits", "split": None, "attack": None}, None),
        ({"dataset": "digits", "split": "test[:5]"}, True),
        ({"dataset": "other", "split": "test"}, False),
    )
    def test_images_that_weights_were_chosen_on(self, chosen, same):
        facts = of_weights.training([history.of_config(runs.tiny(), "train", chosen=chosen)], **ON)
        self.assertEqual(facts["selection"]["on_evaluated_images"], same)
        self.assertEqual(facts["selection"]["dataset"], chosen["dataset"])
        self.assertEqual("attack" in facts["selection"], "attack" in chosen)
        unknown = (
            "the images on which the weights were selected are unknown"
            in of_weights.training_flags(facts).get("selection", "")
        )
        self.assertEqual(unknown, same is None)
        self.assertEqual(of_weights.training_flags(None), {})

    @sweeps.rows(
        ("train[256:320]", "test", False, {}),
        ("test[:9]", "test", True, {"selection"}),
        ("test[:9]", "test[9:]", False, {}),
    )
    def test_weights_are_chosen_on_the_selection_split(self, chosen, evaluated, same, flags):
        config = runs.tiny(data__selection_split=chosen)
        facts = of_weights.training(
            [history.of_config(config, "train")], dataset="digits", split=evaluated
        )
        attack = config.evaluation.attack
        own = {"dataset": "digits", "split": chosen, "attack": attack, "on_evaluated_images": same}
        self.assertEqual(facts["selection"], own)
        self.assertEqual(of_weights.training_flags(facts).keys(), set(flags))
