"""What a run will cost: against arithmetic by hand, and its mistakes as one sentence."""

import importlib.util
import json
import os
import subprocess
import sys
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.attacks.machine import Setting
from jaxrobust.config import base, phase
from jaxrobust.estimate import account, attacked, page, target, work
from jaxrobust.evaluation import plan
from jaxrobust.models.table import multiply_adds
from jaxrobust.runtime import hardware
from tests.support import paths

TINY = """
from jaxrobust.config import base


def get_config():
    config = base()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, in_channels=1)
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}
    config.data.update(name="digits", train_split="train[:10%]", augmentation="none")
    config.data.update(selection_split="test[:50]", test_split="test")
    config.attack.update(epsilon=0.1, steps=1)
    config.train.update(epochs=2, batch_size=32, warmup_epochs=1, from_random=True)
    config.evaluation.update(batch_size=50, steps=2)
    config.test.update(batch_size=100, steps=2, images=200)
    config.alarm.update(every_steps=100, images=1)
    return config
"""
H100 = target.Target("h100:8", "NVIDIA H100 SXM", 8, hardware.chip("NVIDIA H100 SXM"), False, False)

NET = models.create("convnext_n", image_size=224, depths=(1,), dims=(32,))
SHAPES = jax.eval_shape(NET.init, jax.random.key(0))


def imagenet():
    """Return the paper's config in two phases, with a network that is quickly traced."""
    config = base().unlock()
    config.model.update(name="convnext_n", options={"depths": (1,), "dims": (32,)})
    config.pretrain.epochs = 100
    config.data.dir = "/nowhere"
    return config


def command(*arguments):
    """Return the exit code, stdout and stderr of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxrobust.estimate", *arguments],
        cwd=paths.ROOT,
        env=os.environ | {"JAXROBUST_ALLOCATOR": "system"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


class WorkTest(parameterized.TestCase):
    def test_a_data_set_that_is_not_here_has_its_published_size(self):
        first, second = work.work(imagenet())
        self.assertIsNone(first.train.source)
        self.assertEqual(first.rows, 1_281_167)
        self.assertEqual(first.steps, 100 * (1_281_167 // 1024))
        self.assertEqual(second.steps, 50 * (1_281_167 // 1024))
        self.assertEqual((first.selections, second.selections), (100, 50))
        self.assertEqual(first.probes, 0)  # nothing is attacked
        self.assertEqual(second.probes, second.steps // 1000)
        self.assertEqual(second.evaluated("evaluation"), 4000)
        self.assertEqual(second.evaluated("test"), 5000)

    @parameterized.parameters(
        ("cifar10", "train[:90%]", 45_000),
        ("cifar100", "test", 10_000),
        ("cifar10:3.0.2", "test@robustbench[:1000]", 1_000),
        ("imagenet2012", "validation", 50_000),
        ("imagenet2012", "validation@robustbench[:100]", 100),
    )
    def test_known_sizes(self, name, split, images):
        config = imagenet()
        config.data.update(name=name, test_split=split)
        config.model.num_classes = 1000 if name == "imagenet2012" else 10
        self.assertEqual(work.split(config, "test_split"), work.Split(images, None))

    def test_data_that_is_here_is_counted(self):
        config = imagenet()
        config.data.update(name="digits", train_split="train[:50%]")
        config.model.update(num_classes=10, in_channels=1)
        found = work.split(config, "train_split")
        self.assertEqual(found.images, len(found.source))

    @parameterized.parameters("flowers_that_nobody_knows", "folder:/nowhere")
    def test_unknown_data_is_refused(self, name):
        config = imagenet()
        config.data.name = name
        with self.assertRaises(ValueError):
            work.work(config)

    def test_phases_have_their_own_size_and_steps(self):
        config = imagenet()
        config.phases = ("low", "train")
        config.low = phase(epochs=5, objective="adversarial")
        config.low.changes = {"model": {"image_size": 112}, "attack": {"steps": 1}}
        low, train = work.work(config)
        self.assertEqual((low.config.model.image_size, low.config.attack.steps), (112, 1))
        self.assertEqual((train.config.model.image_size, train.config.attack.steps), (224, 2))


class ElsewhereTest(parameterized.TestCase):
    def test_time_is_operations_over_peak_and_utilisation(self):
        found = account.account(imagenet(), H100, utilisation=0.25)
        adds = multiply_adds(NET, *SHAPES, image_size=224)
        clean, train = found["phases"]
        by_hand = 3 * 2 * adds * 1024 / (8 * 989e12 * 0.25)
        self.assertAlmostEqual(clean["step_s"] / by_hand, 1, delta=1e-6)
        # Two steps of APGD are five passes to the image, and the update costs three.
        self.assertAlmostEqual(train["step_s"] / by_hand, (2 * 2 + 4) / 3, delta=1e-6)
        self.assertAlmostEqual(clean["mfu"], 0.25)
        self.assertAlmostEqual(clean["parts_s"]["steps"], 125_100 * by_hand, delta=1e-3)
        total = sum(row["seconds"] for row in found["phases"])
        self.assertAlmostEqual(found["training"]["chip_hours"], 8 * total / 3600)
        self.assertFalse(found["measured"])
        self.assertIn("25%", found["assumed"][0])
        self.assertTrue(any("imagenet2012 is not here" in line for line in found["assumed"]))

    def test_half_the_utilisation_takes_twice_as_long(self):
        half, whole = (
            account.account(imagenet(), H100, utilisation=u)["training"]["hours"]
            for u in (0.2, 0.4)
        )
        self.assertAlmostEqual(half / whole, 2)

    def test_state_is_parameters_average_and_two_moments(self):
        config = imagenet()
        four = 4 * 4 * sum(array.size for array in SHAPES[0].values())
        whole = account.account(config, H100, utilisation=0.2)["phases"][0]["memory_bytes"]
        self.assertAlmostEqual(whole / four, 1, delta=1e-3)
        config.mesh.fsdp = 0
        shared = account.account(config, H100, utilisation=0.2)["phases"][0]["memory_bytes"]
        self.assertAlmostEqual(shared / whole, 1 / 8, delta=1e-3)

    def test_a_batch_that_the_chips_do_not_divide_is_refused(self):
        with self.assertRaisesRegex(ValueError, "batch_size=1024 cannot be split over 3 devices"):
            account.account(imagenet(), H100._replace(chips=3), utilisation=0.2)

    def test_a_state_that_no_chip_holds_is_refused(self):
        chip = H100.chip._replace(memory=10**5)
        with self.assertRaisesRegex(
            ValueError, "GiB of a chip that has 0; share them with --fsdp 0"
        ):
            account.account(imagenet(), H100._replace(chip=chip), utilisation=0.2)

    def test_tpus_without_a_compiler_say_how_to_get_it(self):
        for name, compiles in (("TPU v5e", False), ("TPU v5e", True), ("NVIDIA H100 SXM", False)):
            on = H100._replace(kind=name, compiles=compiles)
            lines = " ".join(account.account(imagenet(), on, utilisation=0.2)["assumed"])
            self.assertEqual("tpu-aot" in lines, name == "TPU v5e" and not compiles)

    def test_price_counts_every_chip_hour(self):
        found = account.account(imagenet(), H100, utilisation=0.2)
        priced = account.priced(found, 2.5)
        for part in (*priced["phases"], priced["training"], priced["autoattack"]["expected"]):
            self.assertAlmostEqual(part["money"], 2.5 * part["chip_hours"])
        self.assertNotIn("money", json.dumps(found))

    def test_the_page_says_what_is_assumed(self):
        found = account.priced(account.account(imagenet(), H100, utilisation=0.2), 2.0)
        text = page.page(found)
        for part in ("pretrain", "adversarial, 2 steps, 224 px", "20% of their", "in money"):
            self.assertIn(part, text)
        self.assertIn("Computed, not measured", text)
        self.assertIn(f"{found['training']['money']:,.2f}", text)


class AutoAttackTest(absltest.TestCase):
    def test_the_most_passes_are_those_of_the_plan(self):
        found = attacked.computed(imagenet(), flops_per_s=1e15)
        settings: list[Setting] = plan.plan("linf", "standard", None, None)
        for setting in settings:
            self.assertEqual(found.passes[setting.name], plan.most_passes(setting, 1000))
        adds = multiply_adds(NET, *SHAPES, image_size=224)
        whole = sum(found.passes.values()) * 2 * adds * 5000 / 1e15
        first = found.passes["apgd-ce"] * 2 * adds * 5000 / 1e15
        plain = {"passes_per_image": found.passes, "pass_s": found.seconds, "compile_s": 7.0}
        for robust, by_hand in ((1.0, whole), (0.0, first), (0.5, (whole + first) / 2)):
            seconds = attacked.seconds_of(plain, images=5000, robust=robust)
            self.assertAlmostEqual(seconds / (by_hand + 7), 1)


class TargetTest(parameterized.TestCase):
    @parameterized.parameters(
        ("v5e:8x8", "TPU v5e", 64, 197e12),
        ("v5p:2x2x4", "TPU v5p", 16, 459e12),
        ("v4:2x2x2", "TPU v4", 8, 275e12),
        ("h100:8", "NVIDIA H100 SXM", 8, 989e12),
        ("a100-40gb:1", "NVIDIA A100-SXM4-40GB", 1, 312e12),
    )
    def test_chips_by_name(self, name, kind, chips, flops):
        found = target.target(name)
        self.assertEqual((found.kind, found.chips, found.chip.flops), (kind, chips, flops))
        self.assertFalse(found.here)

    def test_every_name_is_listed_with_its_peaks(self):
        for name in target._KINDS:
            self.assertIsNotNone(target.target(f"{name}:4").chip, name)

    @parameterized.parameters(
        ("v5q:8x8", "no device that is known"),
        ("h100", "how many chips"),
        ("h100:8x8", "how many chips"),
        ("v5e:", "how many chips"),
        ("v5e:0x4", "how many chips"),
    )
    def test_what_is_no_device(self, name, sentence):
        with self.assertRaisesRegex(ValueError, sentence):
            target.target(name)

    def test_a_device_that_is_not_here(self):
        with (
            mock.patch.object(jax, "devices", side_effect=RuntimeError("none")),
            self.assertRaisesRegex(ValueError, "JAX finds no GPU on this machine"),
        ):
            target.target("gpu")


class CommandTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_measured_on_the_cpu(self):
        """The program, on data that ships; numbers are this machine's and only plausible."""
        file = self.create_tempfile("tiny.py", TINY).full_path
        words = (file, "--on", "cpu", "--seconds", "0.1", "--images", "0", "--json")
        code, out, err = command(*words)
        self.assertEqual(code, 0, err)
        found = json.loads(out.splitlines()[-1])
        (row,) = found["phases"]
        self.assertTrue(found["measured"] and row["measured_with_data"])
        self.assertIsNone(found["utilisation"])
        self.assertNotIn("autoattack", found)
        self.assertEqual(row["steps"], 2 * (row["images_per_epoch"] // 32))
        self.assertAlmostEqual(row["images_per_s"], 32 / row["step_s"], delta=1e-6)
        self.assertAlmostEqual(sum(row["parts_s"].values()), row["seconds"], delta=1e-9)
        for part in ("steps", "selection", "test", "compile", "checkpoints"):
            self.assertGreater(row["parts_s"][part], 0, part)
        self.assertGreater(row["memory_bytes"], 0)
        self.assertIn("Measured: the programs were compiled and run", out)

    @pytest.mark.slow
    @absltest.skipUnless(
        importlib.util.find_spec("libtpu"), "needs the TPU compiler: pip install -e '.[tpu-aot]'"
    )
    def test_the_roofline_is_that_of_bench_step(self):
        file = self.create_tempfile("tiny.py", TINY).full_path
        code, out, err = command(file, "--on", "v5e:2x2", "--fsdp", "0", "--images", "0", "--json")
        self.assertEqual(code, 0, err)
        (row,) = json.loads(out.splitlines()[-1])["phases"]
        words = (file, "--topology", "v5e:2x2", "--batch", "8", "--fsdp", "0", "--json")
        done = subprocess.run(
            [sys.executable, paths.ROOT / "tools/bench_step.py", *words],
            env=os.environ | {"JAXROBUST_ALLOCATOR": "system"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        theirs = json.loads(done.stdout.splitlines()[-1])
        for key, value in row["roofline"].items():
            self.assertEqual(value, theirs[key], key)
        self.assertEqual(row["memory_bytes"], theirs["memory_bytes"])
        self.assertAlmostEqual(row["executed_flops_per_image"], theirs["flops_executable"] / 8)

    @parameterized.parameters(
        (("quickstart", "--on", "cpu", "--price", "2"), "--on cpu has no chips"),
        (("quickstart", "--on", "h100:1", "--price", "cheap"), "--price=cheap is not a number"),
        (("quickstart", "--on", "h100:1", "--price", "-1"), "--price=-1.0 must be above 0"),
        (("quickstart", "--on", "abacus:8"), "no device that is known"),
        (("nothing_of_the_kind", "--on", "h100:1"), "no such file"),
        (("quickstart", "--on", "h100:1", "--utilisation", "0"), "above 0 and at most 1"),
        (("quickstart", "--on", "h100:1", "--utilisation", "1.5"), "above 0 and at most 1"),
        (("quickstart", "--on", "h100:1", "--utilisation", "nan"), "above 0 and at most 1"),
        (("quickstart", "--on", "cpu", "--utilisation", "0.5"), "is measured; leave it out"),
        (("quickstart", "--on", "h100:1", "--robust", "2"), "from 0 to 1"),
        (("quickstart",), "required: --on"),
    )
    def test_mistakes_are_one_sentence(self, words, sentence):
        code, out, err = command(*words)
        self.assertEqual((code, out), (2, ""), err)
        self.assertIn(sentence, err)
        self.assertLen(err.strip().splitlines(), 1)


if __name__ == "__main__":
    absltest.main()
