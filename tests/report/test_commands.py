"""The commands that a page says reproduce its numbers."""

import shlex
from pathlib import Path

from absl import flags
from absl.testing import parameterized

from jaxrobust.commands import evaluate  # noqa: F401  # defines the flags
from jaxrobust.data.transforms.corruptions import KINDS
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import commands

RECORD = {
    "dataset": "cifar10",
    "split": "test",
    "image_ids": "0..49",
    "attacks": [{"name": "apgd-ce", "norm": "linf", "epsilon": 8 / 255, "steps": 20}],
    "method": "apgd-ce, steps 20",
    "seed": 3,
}


def words(**more) -> list[str]:
    record = AccuracyRecord.from_json(RECORD | more)
    one = ReportedEvaluation("net", Path("results.jsonl"), record, None, [], None, {})
    return shlex.split(commands.evaluate(one, None))


class EvaluateTest(parameterized.TestCase):
    def test_names_a_network_that_is_none_of_ours(self):
        for function, expected in (
            ({"name": "net.py:f"}, ["--function", "net.py:f"]),
            ({"name": "net.pt2", "torch": "2.13.0"}, ["--torch", "net.pt2"]),
            (
                {
                    "name": "n.py:f",
                    "torch": "2.13.0",
                    "arguments": {"width": 6},
                    "output": "logits",
                },
                ["--torch", "n.py:f", "--torch_args", '{"width": 6}', "--torch_output", "logits"],
            ),
        ):
            with self.subTest(row=(function, expected)):
                said = words(function=function)
                self.assertEqual(said[2 : 2 + len(expected)], expected)
                self.assertIn("--steps", said)

    def test_names_corruptions(self):
        whole = {str(severity): 0.5 for severity in range(1, 6)}
        some = {"images": "computed", "accuracy": {"fog": whole, "contrast": {"3": 0.5, "4": 0.4}}}
        said = words(attacks=[], corruptions=some)
        self.assertStartsWith(said[said.index("--split") + 1], "test")
        self.assertEqual(
            said[said.index("--corruptions") :],
            ["--corruptions", "fog,contrast-3,contrast-4", "--seed", "3"],
        )
        every = {"images": "files", "accuracy": dict.fromkeys(KINDS, whole)}
        said = words(attacks=[], dataset="cifar10-c:there", split="fog-1", corruptions=every)
        self.assertNotIn("--split", said)
        self.assertEqual(said[said.index("--corruptions") + 1], "all")
        said = words(attacks=[], corruptions=every | {"images": "computed", "frost_sha256": "ab"})
        self.assertEqual(said[said.index("--frost") + 1], "PHOTOGRAPHS")
        self.assertEmpty({word[2:] for word in said if word.startswith("--")} - set(flags.FLAGS))

    def test_has_no_flag_that_the_command_lacks(self):
        said = words(function={"name": "n.py:f", "torch": "2", "arguments": {"a": 1}})
        named = {word[2:] for word in said if word.startswith("--")}
        self.assertEmpty(named - set(flags.FLAGS))
