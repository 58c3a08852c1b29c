"""`evaluate --function`: a function of a file or module, its record, and every refusal."""

import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.questions import command
from jaxrobust.weights.store import hashes
from tests.support import result_lines
from tests.support.evaluations import call

SOURCE = """
import jax
import jax.numpy as jnp
import numpy as np

weights = np.load("weights.npy")  # as any library stores them


def linear(weights, x):
    return x.reshape(x.shape[0], -1) @ weights


logits_fn = jax.tree_util.Partial(linear, weights)


def closure(x):
    return linear(weights, x)


def one_image(x):
    return x.reshape(-1) @ weights


def features(x):
    return x.reshape(x.shape[0], -1) @ weights[:, :7]


def both(x):
    return closure(x), x


def nothing(x):
    pass


def labels(x):
    return closure(x).argmax(-1)


def broken(x):
    return x.reshape(3) @ weights


def numpy(x):
    return np.asarray(x)


number = 3
"""


def fitted(split="train") -> np.ndarray:
    """A ridge regression of the digits."""
    source = data.open_source("digits", split)
    (batch,) = data.evaluation_batches(source, batch_size=len(source), image_size=8)
    x = batch.images.reshape(len(source), -1) / 255
    return np.linalg.solve(x.T @ x + np.eye(64), x.T @ np.eye(10)[batch.labels]).astype("f")


class FunctionTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enterClassContext(
            contextlib.chdir(cls.enterClassContext(tempfile.TemporaryDirectory()))
        )
        Path("my_net.py").write_text(SOURCE)
        np.save("weights.npy", fitted())

    def setUp(self):
        super().setUp()
        self.out = self.create_tempdir().full_path

    def call(self, name="my_net.py:logits_fn", **given):
        given = {"dataset": "digits", "epsilon": "0.05", "n": 16, "out": self.out} | given
        return call(function=name, **given)

    def record(self, name="my_net.py:logits_fn", **given):
        code, _, said = self.call(name, **given)
        self.assertEqual(code, 0, said)
        return result_lines.read(Path(self.out))[-1]

    def correct(self, count):
        (batch,) = data.evaluation_batches(
            data.open_source("digits", "test"), batch_size=count, image_size=8, limit=count
        )
        logits = batch.images.reshape(count, -1) / 255 @ np.load("weights.npy")
        return float((logits.argmax(-1) == batch.labels).mean())

    @parameterized.parameters("logits_fn", "closure")
    def test_record_of_clean_images(self, name):
        record = self.record(f"my_net.py:{name}", attack="clean", n=200)
        self.assertEqual(record["clean"], self.correct(200))
        sha256 = hashes.file_sha256(Path("my_net.py"))
        function = dict(record["function"])
        self.assertLen(function.pop("arrays_sha256"), 64)
        expected = {"name": f"my_net.py:{name}", "file": "my_net.py", "sha256": sha256}
        self.assertEqual(function, expected)
        sizes = {"num_classes": 10, "image_size": 8, "in_channels": 1, "options": {}}
        self.assertEqual(record["model"], {"name": f"my_net.py:{name}"} | sizes)
        for key in ("weights", "weights_sha256", "config_sha256", "dtype", "robust"):
            self.assertIsNone(record[key], key)
        self.assertEqual((record["dataset"], record["split"]), ("digits", "test"))

    def test_attacks(self):
        pgd = self.record(attack="pgd-3")
        apgd = self.record(attack="apgd-ce")
        self.assertEqual(pgd["clean"], apgd["clean"])
        self.assertBetween(apgd["robust"], 0, apgd["clean"] - 1e-6)
        self.assertEqual(apgd["attacks"][0]["epsilon"], 0.05)

    def test_says_who_it_is_and_answers_again(self):
        code, printed, said = self.call(attack="clean")
        self.assertEqual(code, 0, said)
        self.assertTrue(printed.startswith("\nmy_net.py:logits_fn\ndigits, split test"), printed)
        with mock.patch.object(accuracy, "each", side_effect=AssertionError("computes")):
            self.assertEqual(self.call(attack="clean")[1], printed)

    def test_other_weights_or_another_file_are_another_network(self):
        first = self.record(attack="clean")
        source, weights = Path("my_net.py").read_text(), np.load("weights.npy")
        self.addCleanup(Path("my_net.py").write_text, source)
        self.addCleanup(np.save, "weights.npy", weights)
        Path("my_net.py").write_text(f"{source}\n# changed\n")
        second = self.record(attack="clean")
        self.assertEqual(first, second)  # which computes the same
        np.save("weights.npy", -weights)
        Path("my_net.py").write_text(f"{source}\n# changed again\n")  # else it is not run again
        third = self.record(attack="clean")
        self.assertNotEqual(*(r["function"]["arrays_sha256"] for r in (second, third)))
        self.assertLess(third["clean"], first["clean"])

    def test_default_folder_is_a_name(self):
        with mock.patch.object(command, "Evaluation", side_effect=ValueError("said")) as called:
            self.call(out=None)
        self.assertEqual(called.call_args.args[-1], Path("runs/evaluation-my_net.py-logits_fn"))

    @parameterized.parameters(
        ({}, "one_image", "--function=my_net.py:one_image takes one image, not .*jax.vmap"),
        ({}, "features", "gives 7 logits, and data set digits has 10 classes; return one for each"),
        ({}, "both", "--function=my_net.py:both gives tuple for 8 images; return logits"),
        ({}, "nothing", "gives NoneType for 8 images; return logits f.B, K."),
        ({}, "labels", r"gives \(8,\) for 8 images; return logits"),
        ({}, "broken", r"my_net.py, line \d+: TypeError: cannot reshape array of shape"),
        ({}, "numpy", "turns its images into NumPy arrays; write it with jax.numpy"),
        ({}, "number", "number is no function, but of type int"),
        ({}, "absent", "my_net.py has no 'absent'; it has linear, closure"),
        ({"dataset": None}, "logits_fn", "--function needs --dataset NAME, such as"),
        ({"epsilon": None}, "logits_fn", "give --epsilon, in units"),
        ({"model": "convnext_n"}, "logits_fn", "give --workdir RUN, or --model NAME .*--function"),
        ({"workdir": "runs/a"}, "logits_fn", "give --workdir RUN, or --model NAME"),
        ({"weights": "a.pt"}, "logits_fn", "--weights says nothing of a --function; leave it out"),
        ({"num_classes": 10, "phase": "train"}, "logits_fn", "--num_classes and --phase says noth"),
        ({"search_dtype": "bfloat16"}, "logits_fn", "needs a network whose compute type can be"),
        ({"image_size": 9}, "logits_fn", "--function=my_net.py:logits_fn: my_net.py, line"),
    )
    def test_mistakes_are_one_sentence_and_exit_2(self, given, name, message):
        code, printed, said = self.call(f"my_net.py:{name}", **given)
        self.assertEqual((code, printed), (2, ""), said)
        self.assertRegex(said, f"jaxrobust: .*{message}")
        self.assertEqual(said.count("\n"), 1, said)
        self.assertEmpty(list(Path(self.out).iterdir()))


if __name__ == "__main__":
    absltest.main()
