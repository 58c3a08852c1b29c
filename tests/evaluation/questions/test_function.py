"""`evaluate --function`: a function of a file or module, its record, and every refusal."""

import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.questions import command
from jaxrobust.weights.store import hashes
from tests.support import digits_network, result_lines, sweeps
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

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


class FunctionTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enterClassContext(
            contextlib.chdir(cls.enterClassContext(tempfile.TemporaryDirectory()))
        )
        Path("my_net.py").write_text(SOURCE)
        np.save("weights.npy", digits_network.ridge())

    def setUp(self):
        super().setUp()
        self.out = self.create_tempdir().full_path

    def call(self, name="my_net.py:logits_fn", **given):
        given = {"dataset": "digits", "epsilon": "0.05", "n": 16, "out": self.out} | given
        return call(function=name, **given)

    def record(self, name="my_net.py:logits_fn", **given):
        ended(self.call(name, **given))
        return result_lines.read(Path(self.out))[-1]

    def correct(self, count):
        (batch,) = data.evaluation_batches(
            data.open_source("digits", "test"), batch_size=count, image_size=8, limit=count
        )
        logits = batch.images.reshape(count, -1) / 255 @ np.load("weights.npy")
        return float((logits.argmax(-1) == batch.labels).mean())

    @sweeps.rows("logits_fn", "closure")
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

    def test_says_who_it_is_and_answers_again(self):
        printed, _ = ended(self.call(attack="clean"))
        self.assertTrue(printed.startswith("\nmy_net.py:logits_fn\ndigits, split test"), printed)
        with mock.patch.object(accuracy, "each", side_effect=AssertionError("computes")):
            self.assertEqual(self.call(attack="clean")[1], printed)

    def test_default_folder_is_a_name(self):
        with mock.patch.object(command, "Evaluation", side_effect=ValueError("said")) as called:
            self.call(out=None)
        self.assertEqual(called.call_args.args[-1], Path("runs/evaluation-my_net.py-logits_fn"))

    @sweeps.rows(
        ({}, "one_image", "--function=my_net.py:one_image takes a single image, not .*jax.vmap"),
        (
            {},
            "features",
            "returns 7 logits, but the data set digits has 10 classes; return one logit per class",
        ),
        ({}, "both", "--function=my_net.py:both returns tuple for 8 images; return logits"),
        ({}, "nothing", "returns NoneType for 8 images; return logits f.B, K."),
        ({}, "labels", r"returns \(8,\) for 8 images; return logits"),
        ({}, "broken", r"my_net.py, line \d+: TypeError: cannot reshape array of shape"),
        ({}, "numpy", "turns its images into NumPy arrays; write it with jax.numpy"),
        ({}, "number", "number is not a function, but of type int"),
        ({}, "absent", "my_net.py has no 'absent'; it has linear, closure"),
        ({"dataset": None}, "logits_fn", "--function needs --dataset NAME, such as"),
        ({"epsilon": None}, "logits_fn", "give --epsilon, in units"),
        ({"model": "convnext_n"}, "logits_fn", "give --workdir RUN, or --model NAME .*--function"),
        ({"weights": "a.pt"}, "logits_fn", "--weights has no effect with --function; leave it out"),
        (
            {"num_classes": 10, "phase": "train"},
            "logits_fn",
            "--num_classes and --phase have no effect with --function; leave them out",
        ),
        ({"search_dtype": "bfloat16"}, "logits_fn", "needs a network whose compute type can be"),
        ({"image_size": 9}, "logits_fn", "--function=my_net.py:logits_fn: my_net.py, line"),
    )
    def test_mistakes_are_one_sentence_and_exit_2(self, given, name, message):
        said = refused(self.call(f"my_net.py:{name}", **given))
        self.assertRegex(said, f"jaxrobust: .*{message}")
        self.assertEqual(said.count("\n"), 1, said)
        self.assertEmpty(list(Path(self.out).iterdir()))
