"""`python -m jaxrobust.doctor`: what it takes, what it prints, and its exit codes."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from safetensors.numpy import save_file

from configs import quickstart
from jaxrobust.data import load, open_source
from jaxrobust.doctor import command
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, Check, CheckResult, Finding
from jaxrobust.doctor.patient import Patient, Recorded
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.types import Threat
from jaxrobust.weights.trained import runs
from tests.support import paths, sweeps
from tests.support.runs import quiet_run

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


def examine(place, **given):
    rest = dict.fromkeys(("dataset", "norm", "epsilon", "data_dir", "weights", "phase", "model"))
    code = command.answer(
        rest | {"n": 200, "seed": 0} | given,
        place,
        config=None,
        config_name=None,
        devices=1,
        coloured=False,
        as_json=True,
    )
    told, code = code
    return json.loads(json.dumps(told)), code


class ExitTest(parameterized.TestCase):
    @sweeps.rows(*itertools.product((GREEN, YELLOW, RED), (False, True)))
    def test_one_where_something_is_red(self, level, as_json):
        check = Check("a", "measures", "cause", "remedy", "paper", lambda patient: None)
        made = command.Examination("x", [Finding(check, CheckResult(level, "said"))])
        how = {"config_name": "x", "devices": 1, "coloured": False, "as_json": as_json}
        with mock.patch.object(command, "of_config", return_value=made):
            told, code = command.answer({"n": 1, "seed": 0}, None, config=object(), **how)
        self.assertEqual(code, int(level == RED))
        self.assertEqual(told and told["red"], level == RED if as_json else None)


def reds(told):
    return [f["check"] for e in told["examined"] for f in e["findings"] if f["level"] == RED]


def trained(config, run):
    """Train until a network is robust enough to tell faults from weakness."""
    for phase in (config.pretrain, config.train):
        phase.update(epochs=8, ema_decay=0.95)
    quiet_run(config, run)
    return run


@pytest.mark.computes
class HealthyTest(parameterized.TestCase):
    """Those that pass all: a ConvNeXt by three names, a ResNet with batch norms, a function."""

    def check(self, place, **given):
        told, code = examine(place, **given)
        found = {f["check"]: f for e in told["examined"] for f in e["findings"]}
        self.assertLessEqual({f["level"] for f in found.values()}, {GREEN, SKIPPED}, found)
        self.assertEqual((code, told["red"]), (0, False))
        return told

    @pytest.mark.matrix
    def test_a_digits_run(self):
        run = trained(quickstart.get_config(), Path(self.create_tempdir()) / "run")
        told = self.check(str(run))
        self.assertLen(told["examined"], 2)  # its config and its network
        told = self.check(None, workdir=str(run), phase="pretrain", norm="l2", split="test[:128]")
        self.assertIn("(pretrain, step", told["examined"][1]["of"])
        self.assertIn("on 128 images", told["examined"][1]["of"])
        _, weights = runs.run_weights(run)
        file = run / "weights.safetensors"
        save_file({k: np.asarray(v) for k, v in (weights.params | weights.stats).items()}, file)
        given = {"model": "convnext_n", "weights": str(file), "dataset": "digits", "epsilon": 0.1}
        given["options"] = {"stem_strides": (1,), "dims": (32, 64, 128)}
        self.assertLen(self.check(None, **given)["examined"], 1)

    @pytest.mark.matrix
    def test_a_run_with_batch_norms(self):
        config = quickstart.get_config()
        config.model.name = "resnet18"
        with config.unlocked():
            config.model.options = {"depths": (1, 1), "small_stem": True}
        run = trained(config, Path(self.create_tempdir()) / "run")
        told = self.check(str(run))
        statistics = [
            f for f in told["examined"][0]["findings"] if f["check"] == "batch-statistics"
        ]
        self.assertIn("attack.statistics=running", statistics[0]["said"])

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
        found = command._recorded(run, RECORD["weights"], None, source)
        self.assertEqual(found, Recorded(clean, f"{run.name}/results.jsonl"))

    def test_of_a_newer_version(self):
        run = Path(self.create_tempdir())
        (run / "results.jsonl").write_text(json.dumps({"schema": 99}) + "\n")
        with self.assertRaisesRegex(ValueError, "schema 99, .* install a newer jaxrobust"):
            command._recorded(run, RECORD["weights"], None, open_source("digits", "test"))


class ReadTest(parameterized.TestCase):
    """The network of flags, and the images that are looked at."""

    def read(self, *, images: int = 60, **flags) -> tuple[str, Patient]:
        file = self.create_tempfile(
            "own.py", "def f(x):\n    return x.reshape(len(x), -1)[:, :10]\n"
        )
        none = dict.fromkeys(GivenFlags._fields) | {"attack": "clean", "version": "standard"}
        none |= {"search_dtype": "float32", "n": 0, "seed": 3}
        named = {"function": f"{file.full_path}:f", "dataset": "digits"} | flags
        return command._read(GivenFlags(**none | named), images)

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
        whole = load("digits", split="test", image_size=8)
        self.assertRegex(of, r"own\.py:f on 60 images of .*digits")
        self.assertEqual((len(patient.images), patient.seed), (60, 3))
        places = [int(np.abs(whole.images - one).sum((1, 2, 3)).argmin()) for one in patient.images]
        np.testing.assert_array_equal(whole.images[places], patient.images)
        np.testing.assert_array_equal(whole.labels[places], patient.labels)
        self.assertLess(100, max(places))
        self.assertLen(set(places), 60)
        for some in (10, 30, 60):  # of which some checks take the first
            self.assertLen(set(patient.labels[:some]), 10)

    def test_what_the_checks_compare_with(self):
        """What the run recorded, the images as arrays, the same network in another type."""
        known, arrays = Recorded(0.75, "run/results.jsonl"), np.zeros((4, 8, 8, 1), np.float32)
        settled, weights = command.flags.settled, command.flags.weights

        def with_classes(given):
            origin, subject, source = settled(given)
            return origin, subject, replace(source, classes=("a", "b"))

        def of_a_name(*given):
            _, subject, arrays = weights(*given)
            return "train, step 8", replace(subject, net=self.net), arrays

        self.enter_context(mock.patch.object(command.flags, "settled", with_classes))
        self.enter_context(mock.patch.object(command.flags, "weights", of_a_name))
        recorded = self.enter_context(mock.patch.object(command, "_recorded", return_value=known))
        resized = self.enter_context(
            mock.patch.object(command.resizing, "resized", return_value=arrays)
        )
        named = self.enter_context(mock.patch.object(command.measuring, "networks_of"))
        named.return_value = lambda dtype: f"in {dtype}"
        for self.net, others in ((None, {"bfloat16": "in bfloat16"}), (object(), {})):
            of, patient = self.read(images=4, split="test[:9]")
            self.assertRegex(of, r"own\.py:f \(train, step 8\) on 4 images of .*test\[:9\]")
            self.assertEqual((patient.logits_fn, patient.others), ("in float32", others))
            self.assertIs(patient.recorded, known)
            self.assertIs(patient.arrays, arrays)
            self.assertEqual((patient.classes, patient.seed), (("a", "b"), 3))
            run, which, subject, source = recorded.call_args.args
            self.assertEqual((run, which, subject.net), (None, "train, step 8", self.net))
            self.assertEqual((source.split, len(source)), ("test[:9]", 9))
            self.assertIs(resized.call_args.args[0], source)
            self.assertEqual(resized.call_args.kwargs, {"preprocessing": "none", "image_size": 8})
            labels = load("digits", split="test[:9]")[1]
            np.testing.assert_array_equal(labels[resized.call_args.args[1]], patient.labels)

    def test_of_a_small_split_all_are_looked_at(self):
        _, patient = self.read(images=60, split="test[:9]")
        whole = load("digits", split="test[:9]")
        self.assertCountEqual(patient.images.sum((1, 2, 3)), whole.images.sum((1, 2, 3)))


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
        with self.assertRaisesRegex(ValueError, f"and --{flag}=x name the same; give one"):
            command.given_of(f"{place}{name}", norm=None, **{flag: "x"})

    def test_without_a_place(self):
        given = command.given_of(None, norm=None, workdir="run", seed=7)
        self.assertEqual((given.workdir, given.weights, given.seed), ("run", None, 7))
        self.assertIsNone(given.norm)
        with self.assertRaisesRegex(ValueError, "--norm=l3 is unknown; choose one of linf, l2, l1"):
            command.given_of(None, norm="l3")


class AnswerTest(parameterized.TestCase):
    """What is examined, in which order, and what of it is shown."""

    def setUp(self):
        super().setUp()
        self.asked, self.shown = [], []
        check = Check("a", "measures", "cause", "remedy", "paper", lambda patient: None)
        finding = Finding(check, CheckResult(GREEN, "said"))

        def examined(name):
            def of(*args, tell, **how):
                self.asked.append((name, *args, how))
                tell(name)
                tell(finding)
                return command.Examination(name, [finding])

            return of

        for name in ("of_config", "of_network"):
            self.enter_context(mock.patch.object(command, name, examined(name)))

    def answer(self, place=None, config=None, devices=3, as_json=False, **given):
        self.asked.clear()
        self.shown.clear()
        how = {"config_name": "own.py", "devices": devices, "coloured": False, "as_json": as_json}
        given = {"n": 40, "seed": 5, "norm": None} | given
        return command.answer(given, place, config=config, show=self.shown.append, **how)

    def test_a_config_and_a_network(self):
        self.assertEqual(self.answer("net.py:f", config="config", dataset="digits"), (None, 0))
        first, second = self.asked
        self.assertEqual(first, ("of_config", "config", {"devices": 3, "name": "own.py"}))
        self.assertEqual((second[0], second[2]), ("of_network", {"images": 40}))
        self.assertEqual((second[1].function, second[1].seed), ("net.py:f", 5))
        names = [line for line in self.shown if line.startswith("of_")]
        self.assertEqual(names, ["of_config", "of_network"])
        self.assertLen(self.shown, 7)  # a name, a finding, a sum; and a line between the two
        self.assertEqual(self.shown[3], "")
        self.assertEqual(self.shown[1], self.shown[5])

    def test_as_json_nothing_is_shown(self):
        told, code = self.answer(config="config", as_json=True)
        self.assertEqual((told["red"], code, self.shown), (False, 0, []))
        (only,) = told["examined"]
        self.assertEqual((only["of"], len(only["findings"])), ("of_config", 1))
        self.assertEqual(only["findings"][0]["check"], "a")

    def test_a_run_is_its_config_and_its_network(self):
        run = Path(self.create_tempdir())
        for file in ("config.json", "metrics.jsonl"):
            (run / file).write_text("{}")
        with mock.patch.object(command.runs, "run_config", return_value="its") as of_run:
            self.answer(str(run), devices=None)
            of_run.assert_called_once_with(run)
            how = {"devices": 1, "name": f"{run}/config.json"}  # a CPU is one device
            self.assertEqual(self.asked[0], ("of_config", "its", how))
            self.assertEqual([name for name, *_ in self.asked], ["of_config", "of_network"])
            self.answer(str(run), config="config")  # which counts instead
            self.assertEqual([each[1] for each in self.asked[:1]], ["config"])
            self.assertLen(self.asked, 2)

    def test_devices(self):
        with mock.patch.object(command.jax, "default_backend", return_value="tpu"):
            self.answer(config="config", devices=None)
        self.assertEqual(self.asked[0][2]["devices"], command.jax.device_count())
        self.answer(config="config", devices=1)
        self.assertEqual(self.asked[0][2]["devices"], 1)
        for devices in (0, -1):
            with self.assertRaisesRegex(ValueError, f"--devices={devices} must be at least 1"):
                self.answer(config="config", devices=devices)


class CommandTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_a_fault_is_an_exit_code(self):
        file = self.create_tempfile("my_net.py", OWN)
        told, code = examine(f"{file.full_path}:shifted", dataset="digits", epsilon=0.1)
        self.assertEqual((code, reds(told)), (1, ["label-order"]))

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

    def test_nothing_is_named(self):
        with self.assertRaisesRegex(ValueError, "name a run, weights, a function or a config"):
            examine(None)

    def test_a_function_without_data(self):
        file = self.create_tempfile("my_net.py", OWN)
        with self.assertRaisesRegex(ValueError, "--function needs --dataset NAME"):
            examine(f"{file.full_path}:logits_fn")
