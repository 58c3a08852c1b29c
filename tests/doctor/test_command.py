"""`python -m jaxrobust.doctor`: what it takes, what it prints, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from safetensors.numpy import save_file

from configs import quickstart
from jaxrobust.config import plain
from jaxrobust.data import load, open_source
from jaxrobust.doctor import command
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED
from jaxrobust.doctor.patient import Patient, Recorded
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.types import Threat
from jaxrobust.weights.trained import runs
from tests.support import paths, sweeps
from tests.support.runs import quiet_run, tiny

# The nearest mean of the shipped digits' classes, as a user writes a network.
OWN = """
import jax.numpy as jnp
import numpy as np
from jaxrobust.data import Prepared, open_source

source = open_source("digits", "train")
prepared = Prepared(source, image_size=8, preprocessing="none", images=len(source))
images, labels = prepared[np.arange(len(source))], prepared.labels()
means = np.stack([images[labels == k].mean(0).ravel() for k in range(10)])

def logits_fn(x):
    h = x.reshape(len(x), -1)
    return 2 * h @ means.T - (means**2).sum(1)[None]

def shifted(x):
    return jnp.roll(logits_fn(x), 1, axis=1)
"""

# The same in PyTorch, with means of images in [-1, 1].
MODULE = """
import torch
from jaxrobust import data

class Means(torch.nn.Module):
    def __init__(self, images, labels):
        super().__init__()
        pixels, labels = 2 * torch.from_numpy(images).flatten(1) - 1, torch.from_numpy(labels)
        means = [pixels[labels == k].mean(0) for k in range(10)]
        self.means = torch.nn.Parameter(torch.stack(means))

    def forward(self, x):
        return 2 * x.flatten(1) @ self.means.T - (self.means**2).sum(1)

def make():
    return Means(*data.load("digits", split="train")[:2]).eval()
"""

RECORD = {"dataset": "digits", "split": "test", "weights": "train, step 8, ema", "clean": 0.75}


def doctor(*words):
    """What the command leaves behind, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "jaxrobust.doctor", *words],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def examine(place, **flags):
    """The findings of each examination, by the names of their checks, and their descriptions."""
    names = ("dataset", "norm", "epsilon", "data_dir", "weights", "phase", "model")
    values = dict.fromkeys(names) | {"n": 200, "seed": 0} | flags
    config = {"config": None, "config_name": None, "devices": 1}
    done = command.answer(values, place, **config, tell=lambda text: None)
    json.dumps([finding.plain() for one in done for finding in one.findings])
    return [{f.check.name: f for f in one.findings} for one in done], [one.of for one in done]


def trained(config, run):
    """Train until a network is robust enough to tell faults from weakness."""
    for phase in (config.pretrain, config.train):
        phase.update(epochs=8, ema_decay=0.95)
    quiet_run(config, run)
    return run


@pytest.mark.computes
class HealthyTest(parameterized.TestCase):
    """Those that pass all: a ConvNeXt by three names, a ResNet with batch norms, a function."""

    def check(self, place, **flags):
        findings, names = examine(place, **flags)
        for found in findings:
            self.assertLessEqual({f.result.level for f in found.values()}, {GREEN, SKIPPED}, found)
        return findings, names

    @pytest.mark.matrix
    def test_a_digits_run(self):
        run = trained(quickstart.get_config(), Path(self.create_tempdir()) / "run")
        self.assertLen(self.check(str(run))[0], 2)  # its config and its network
        flags = {"workdir": str(run), "phase": "pretrain", "norm": "l2", "split": "test[:128]"}
        _, names = self.check(None, **flags)
        self.assertIn("(pretrain, step", names[1])
        self.assertIn("on 128 images", names[1])
        _, weights = runs.run_weights(run)
        file = run / "weights.safetensors"
        save_file({k: np.asarray(v) for k, v in (weights.params | weights.stats).items()}, file)
        flags = {"model": "convnext_n", "weights": str(file), "dataset": "digits", "epsilon": 0.1}
        flags["options"] = {"stem_strides": (1,), "dims": (32, 64, 128)}
        self.assertLen(self.check(None, **flags)[0], 1)

    @pytest.mark.matrix
    def test_a_run_with_batch_norms(self):
        config = quickstart.get_config()
        config.model.name = "resnet18"
        with config.unlocked():
            config.model.options = {"depths": (1, 1), "small_stem": True}
        run = trained(config, Path(self.create_tempdir()) / "run")
        findings, _ = self.check(str(run))
        sentence = findings[0]["batch-statistics"].result.sentence
        self.assertIn("attack.statistics=running", sentence)

    @pytest.mark.slow
    def test_a_function(self):
        file = self.create_tempfile("my_net.py", OWN)
        self.check(f"{file.full_path}:logits_fn", dataset="digits", epsilon=0.1)


class RecordedTest(parameterized.TestCase):
    """The accuracy that a run's own record has for its weights."""

    @sweeps.rows(
        ("", 0.75),
        ('{"dataset": "dig', 0.75),  # torn off
        (json.dumps(RECORD | {"clean": float("nan")}), 0.75),
        (json.dumps({"schema": 1}), 0.75),
        (json.dumps(RECORD | {"split": "train", "clean": 0.9}), 0.75),
        (json.dumps(RECORD | {"weights": "pretrain, step 8, ema", "clean": 0.9}), 0.75),
        (json.dumps(RECORD | {"clean": 0.5}) + "\n", 0.5),  # the last one counts
    )
    def test_the_last_that_is_whole(self, more, clean):
        run = Path(self.create_tempdir())
        (run / "results.jsonl").write_text(json.dumps(RECORD) + "\n" + more)
        source = open_source("digits", "test")
        record = command._recorded(run, RECORD["weights"], source)
        self.assertEqual(record, Recorded(clean, f"{run.name}/results.jsonl"))

    def test_of_a_newer_version(self):
        run = Path(self.create_tempdir())
        (run / "results.jsonl").write_text(json.dumps({"schema": 99}) + "\n")
        with self.assertRaisesRegex(ValueError, "schema 99, .* install a newer jaxrobust"):
            command._recorded(run, RECORD["weights"], open_source("digits", "test"))


class ReadTest(parameterized.TestCase):
    """The network of flags, and the images that are looked at."""

    def read(self, *, images: int = 60, **flags) -> tuple[str, Patient]:
        file = self.create_tempfile(
            "own.py", "def f(x):\n    return x.reshape(len(x), -1)[:, :10]\n"
        )
        values = dict.fromkeys(GivenFlags._fields) | {"attack": "clean", "version": "standard"}
        values |= {"search_dtype": "float32", "n": 0, "seed": 3}
        values |= {"function": f"{file.full_path}:f", "dataset": "digits"}
        return command._read(GivenFlags(**(values | flags)), images)

    @sweeps.rows(
        ({}, Threat("linf", 8 / 255)),
        ({"norm": "l2"}, Threat("l2", 0.5)),
        ({"norm": "l1"}, Threat("l1", 12.0)),
        ({"norm": "l2", "epsilon": 0.25}, Threat("l2", 0.25)),
    )
    def test_a_radius_that_is_not_given_is_that_of_cifar10(self, flags, threat):
        self.assertEqual(self.read(**flags)[1].threat, threat)

    def test_images_are_of_the_whole_split(self):
        of, patient = self.read(images=60)
        split = load("digits", split="test", image_size=8)
        self.assertRegex(of, r"own\.py:f on 60 images of .*digits")
        self.assertEqual((len(patient.images), patient.seed), (60, 3))
        places = [int(np.abs(split.images - one).sum((1, 2, 3)).argmin()) for one in patient.images]
        np.testing.assert_array_equal(split.images[places], patient.images)
        np.testing.assert_array_equal(split.labels[places], patient.labels)
        self.assertLess(100, max(places))
        self.assertLen(set(places), 60)
        for some in (10, 30, 60):  # of which some checks take the first
            self.assertLen(set(patient.labels[:some]), 10)

    def test_what_the_checks_compare_with(self):
        """What the run recorded, the images as arrays, the same network in another type."""
        record = Recorded(0.75, "run/results.jsonl")
        with mock.patch.object(command, "_recorded", return_value=record) as recorded:
            flags = {"dataset": "fake:40x40x3", "preprocessing": "bicubic-48-crop-40"}
            _, patient = self.read(images=4, **flags)
        self.assertIs(patient.recorded, record)
        self.assertEqual(recorded.call_args.args[:2], (None, None))
        self.assertEmpty(patient.others)  # a function computes in one type
        self.assertEqual(patient.arrays.shape, patient.images.shape)
        self.assertBetween(np.abs(patient.arrays - patient.images).mean(), 1e-3, 0.3)  # aliased
        self.assertIsNone(self.read(images=4)[1].arrays)

    def test_of_a_small_split_all_are_looked_at(self):
        _, patient = self.read(images=60, split="test[:9]")
        split = load("digits", split="test[:9]")
        self.assertCountEqual(patient.images.sum((1, 2, 3)), split.images.sum((1, 2, 3)))


class GivenTest(parameterized.TestCase):
    """What one word without a flag names."""

    @sweeps.rows(
        (("config.json", "metrics.jsonl"), "", "workdir"),
        (("config.json",), "", "weights"),
        (("metrics.jsonl",), "", "weights"),
        ((), "/net.py:f", "function"),
        (("net.py:f",), "/net.py:f", "weights"),  # a file that has such a name
        ((), "/net.safetensors", "weights"),
    )
    def test_a_place(self, files, name, flag):
        place = Path(self.create_tempdir())
        for file in files:
            (place / file).write_text("")
        given = command.given_of(f"{place}{name}", norm="L2", epsilon=0.5, dataset="digits")
        named = {flag: f"{place}{name}", "norm": "l2", "epsilon": 0.5, "dataset": "digits"}
        named |= {"attack": "clean", "version": "standard", "search_dtype": "float32", "seed": 0}
        self.assertEqual(given, GivenFlags(attack="clean", n=None)._replace(**named))
        with self.assertRaisesRegex(ValueError, f"and --{flag}=x both name the network"):
            command.given_of(f"{place}{name}", norm=None, **{flag: "x"})

    def test_without_a_place(self):
        given = command.given_of(None, norm=None, workdir="run", seed=7)
        self.assertEqual((given.workdir, given.weights, given.seed), ("run", None, 7))
        self.assertIsNone(given.norm)


class AnswerTest(parameterized.TestCase):
    """What is examined, in which order, and what of it is told."""

    def setUp(self):
        super().setUp()
        self.asked, self.told = [], []

        def examined(name):
            def of(*args, tell, **options):
                self.asked.append((name, *args, options))
                tell(name)
                return command.Examination(name, [])

            return of

        for name in ("of_config", "of_network"):
            self.enter_context(mock.patch.object(command, name, examined(name)))

    def answer(self, place=None, config=None, devices=3, **flags):
        self.asked.clear()
        self.told.clear()
        options = {"config": config, "config_name": "own.py", "devices": devices}
        values = {"n": 40, "seed": 5, "norm": None} | flags
        return command.answer(values, place, **options, tell=self.told.append)

    def test_a_config_and_a_network(self):
        done = self.answer("net.py:f", config="config", dataset="digits")
        self.assertEqual([one.of for one in done], ["of_config", "of_network"])
        first, second = self.asked
        self.assertEqual(first, ("of_config", "config", {"devices": 3, "name": "own.py"}))
        self.assertEqual((second[0], second[2]), ("of_network", {"images": 40}))
        self.assertEqual((second[1].function, second[1].seed), ("net.py:f", 5))
        self.assertEqual(self.told, ["of_config", "", "of_network"])

    def test_a_run_is_its_config_and_its_network(self):
        run = Path(self.create_tempdir())
        (run / "config.json").write_text(json.dumps({"version": 1} | plain(tiny())))
        (run / "metrics.jsonl").write_text("{}")
        self.answer(str(run), devices=None)
        name, config, options = self.asked[0]
        self.assertEqual((name, plain(config)), ("of_config", plain(tiny())))
        self.assertEqual(options, {"devices": 1, "name": f"{run}/config.json"})  # a CPU is one
        self.assertEqual([name for name, *_ in self.asked], ["of_config", "of_network"])
        self.answer(str(run), config="config")  # which counts instead
        self.assertEqual([each[1] for each in self.asked[:1]], ["config"])
        self.assertLen(self.asked, 2)

    def test_devices(self):
        with mock.patch.object(command.jax, "default_backend", return_value="tpu"):
            self.answer(config="config", devices=None)
        self.assertEqual(self.asked[0][2]["devices"], command.jax.device_count())


class CommandTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_a_fault_is_an_exit_code(self):
        file = self.create_tempfile("my_net.py", OWN)
        (findings,), _ = examine(f"{file.full_path}:shifted", dataset="digits", epsilon=0.1)
        reds = [name for name, finding in findings.items() if finding.result.level == RED]
        self.assertEqual(reds, ["label-order"])

    @pytest.mark.slow
    def test_a_module_that_expects_other_images(self):
        pytest.importorskip("torch", reason=paths.PARITY)
        file = self.create_tempfile("my_net.py", MODULE)
        words = ["--torch", f"{file.full_path}:make", "--dataset", "digits", "--epsilon", "0.1"]
        done = doctor(*words, "--json")
        found = {f["check"]: f for f in json.loads(done.stdout)["examined"][0]["findings"]}
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(found["missing-normalisation"]["level"], RED)
        self.assertIn("[-1, 1]", found["missing-normalisation"]["said"])

    @pytest.mark.slow
    def test_a_config(self):
        done = doctor("--config", "quickstart", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse(json.loads(done.stdout)["red"])
        done = doctor("--config=quickstart", "--config.train.warmup_epochs=20")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stdout, "(?m)^red +warm-up +train: train.warmup_epochs=20")
        self.assertNotIn("\033", done.stdout)

    def test_what_names_nothing(self):
        file = self.create_tempfile("my_net.py", OWN)
        for place, message in (
            (None, "name a run, weights, a function or a config"),
            (f"{file.full_path}:logits_fn", "--function needs --dataset NAME"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                examine(place)
