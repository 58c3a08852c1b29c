"""What a config costs, phase by phase: against arithmetic by hand."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from configs import quickstart
from jaxrobust.config import base, network_of, plain
from jaxrobust.doctor import command
from jaxrobust.doctor.estimate import account, elsewhere
from jaxrobust.doctor.estimate.devices import Target, target
from jaxrobust.doctor.estimate.work import PhaseCost, PhaseWork, SizedSplit
from jaxrobust.doctor.programs import topology
from jaxrobust.models.table import multiply_adds
from jaxrobust.runtime.devices import hardware
from tests.support import sweeps
from tests.support.estimates import H100, NET, SHAPES, digits, imagenet
from tests.support.runs import tiny
from tools.generate import refresh_configs

HERE = Target("cpu", "cpu", 1, None, True, True)
SMALL = H100.chip._replace(memory=10**5)
LINEAR = """
import jax.numpy as jnp
from jaxrobust.types import Classifier

def make(num_classes, image_size, in_channels):
    def init(key):
        return {"w": jnp.zeros((image_size**2 * in_channels, num_classes))}, {}

    def apply(params, stats, images, *, train=False, key=None):
        return images.reshape(len(images), -1) @ params["w"], stats

    return Classifier(init, apply)
"""


class AccountTest(parameterized.TestCase):
    def test_time_is_operations_over_peak_and_utilisation(self):
        found = account.account(imagenet(), H100, utilisation=0.01)
        adds = multiply_adds(NET, *SHAPES, image_size=224)
        clean, train = found["phases"]
        by_hand = 3 * 2 * adds * 1024 / (8 * 989e12 * 0.01)
        self.assertAlmostEqual(clean["step_s"] / by_hand, 1, delta=1e-6)
        # Two steps of APGD are five passes to the image, and the update costs three.
        self.assertAlmostEqual(train["step_s"] / by_hand, (2 * 2 + 4) / 3, delta=1e-6)
        self.assertAlmostEqual(clean["mfu"], 0.01)
        self.assertAlmostEqual(clean["parts_s"]["steps"], 125_100 * by_hand, delta=1e-3)
        total = sum(row["seconds"] for row in found["phases"])
        self.assertAlmostEqual(found["training"]["chip_hours"], 8 * total / 3600)
        self.assertFalse(found["measured"])
        self.assertIn("reach 1% of", found["assumed"][0])
        self.assertTrue(any("imagenet2012 is not on this" in line for line in found["assumed"]))

    def test_evaluations_are_passes_over_speed_and_that_of_the_test_split_is_in_float32(self):
        config = imagenet()
        config.evaluation.steps, config.test.steps = 5, 40
        parts = account.account(config, H100, utilisation=0.01)["phases"][1]["parts_s"]
        forward = 2 * multiply_adds(NET, *SHAPES, image_size=224)
        speed = 8 * 989e12 * 0.01
        # APGD's passes, and the answers before and after it; 50 evaluations of 4,000 images.
        selection = 50 * 4000 * (2 + 2 * 5 + 1) * forward / speed
        self.assertAlmostEqual(parts["selection"] / selection, 1, delta=1e-6)
        # In TF32, for which NVIDIA quotes half of bfloat16's speed.
        test = 5000 * (2 + 2 * 40 + 1) * forward / (speed / 2)
        self.assertAlmostEqual(parts["test"] / test, 1, delta=1e-6)

    def test_what_the_compiler_counts_is_of_one_chip_and_its_share_of_the_images(self):
        compiled = {f"{part}_bytes": 1 for part in topology.PARTS}
        compiled |= {"hbm_bytes": 0, "sent_bytes": 0, "flops_executable": 128 * 5e9}
        compiled |= {"cycles": 0, "kernels": [], "row_bytes": 0}
        program = topology.Compiled(compiled, module=None)
        with mock.patch.object(topology, "compiled", return_value=program):
            options = {"utilisation": 0.01, "chips": jax.devices(), "images": 0}
            row = account.account(imagenet(), H100, **options)["phases"][0]
        self.assertEqual(row["batch_size"], 8 * 128)
        self.assertAlmostEqual(row["executed_flops_per_image"], 5e9)
        best = 989e12 / (3 * 2 * multiply_adds(NET, *SHAPES, image_size=224))
        ratio = row["roofline"]["roofline_images_per_s_per_chip"] / best
        self.assertAlmostEqual(ratio, 1, delta=1e-6)
        self.assertAlmostEqual(row["images_per_s_per_chip"] / (0.01 * best), 1, delta=1e-6)
        self.assertAlmostEqual(row["images_per_s"], 8 * row["images_per_s_per_chip"])
        self.assertAlmostEqual(row["mfu"], 0.01)

    @sweeps.rows(("TPU v5p", 6.25e9, "at 6.25 GB/s per chip"), ("TPU v4", None, " is unknown, so"))
    def test_gradients_between_slices(self, kind, bandwidth, line):
        """Of two slices, each chip sends its quarter of its slice's gradients, in float32."""
        on = H100._replace(kind=kind, chip=hardware.chip(kind), slices=2)
        found = account.account(imagenet(), on, utilisation=0.2, images=0)
        row = found["phases"][0]
        sent = 4 * sum(array.size for array in SHAPES[0].values()) / 4
        self.assertEqual(row["network_bytes"], sent)
        self.assertEqual(row["network_s"], bandwidth and sent / bandwidth)
        self.assertIn(line, " ".join(found["known"]))
        slow = on._replace(chip=on.chip._replace(network=1.0))
        row = account.account(imagenet(), slow, utilisation=0.2, images=0)["phases"][0]
        self.assertEqual(row["step_s"], sent)

    @pytest.mark.slow
    def test_state_is_parameters_average_and_two_moments(self):
        config = imagenet()
        four = 4 * 4 * sum(array.size for array in SHAPES[0].values())
        whole = self.state(config)
        self.assertAlmostEqual(whole / four, 1, delta=1e-3)
        config.mesh.fsdp = 0
        self.assertAlmostEqual(self.state(config) / whole, 1 / 8, delta=1e-3)

    def state(self, config):
        row = account.account(config, H100, utilisation=0.2)["phases"][0]
        return row["memory_bytes"] - row["activation_bytes"]

    def test_activations_by_hand(self):
        """The gradient of a matrix needs the images alone, of bytes 4, 8 x 8 pixels and 3 colors;
        a chip keeps those of one part of its images, and TRADES both kinds of them.
        """
        config = imagenet()
        config.model.name = f"{self.create_tempfile('nets.py', LINEAR).full_path}:make"
        config.model.options, config.model.image_size = {}, 8
        images = 16 * 8 * 8 * 3 * 4
        self.assertEqual(elsewhere.kept(config, "train", images=16), images)
        config.train.microbatches = 4
        self.assertEqual(elsewhere.kept(config, "train", images=16), images / 4)
        config.train.update(microbatches=1, objective="trades")
        self.assertEqual(elsewhere.kept(config, "train", images=16), 2 * images)

    def test_hours_alone(self):
        for config in (imagenet(), quickstart.get_config()):
            found = account.account(config, H100, utilisation=0.2)
            expected = found["training"]["hours"], found["autoattack"]["expected"]["hours"]
            with mock.patch.object(elsewhere, "kept") as counting:
                self.assertEqual(account.hours(config, H100, utilisation=0.2), expected)
            counting.assert_not_called()

    def test_memory_counts_the_activations(self):
        config = imagenet()
        row = account.account(config, H100, utilisation=0.2, images=0)["phases"][1]
        images = config.train.batch_size // H100.chips
        self.assertEqual(row["activation_bytes"], elsewhere.kept(config, "train", images=images))
        self.assertGreater(row["memory_bytes"], row["activation_bytes"])

    @pytest.mark.slow
    def test_activations_beside_a_compiled_gradient(self):
        config = quickstart.get_config()
        net, size = network_of(config), config.model.image_size
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((64, size, size, 1), jnp.float32)

        def loss(params, stats, x):
            return jnp.square(net.apply(params, stats, x, train=True)[0]).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, stats, x).compile()
        ratio = elsewhere.kept(config, "train", images=64)
        ratio /= compiled.memory_analysis().temp_size_in_bytes
        self.assertBetween(ratio, 0.5, 2)

    def test_a_batch_nearby_is_taken_and_said(self):
        config = imagenet()
        config.pretrain.batch_size = config.train.batch_size = 1020
        found = account.account(config, H100, utilisation=0.2, images=0)
        self.assertEqual({row["batch_size"] for row in found["phases"]}, {1024})
        self.assertIn(
            "train.batch_size=1020 cannot be split over 8 devices", " ".join(found["known"])
        )

    @sweeps.rows(
        (
            {},
            "batch_size=1024 cannot be split over 3000 devices; use 3000 or 6000",
            {"chips": 3000},
        ),
        ({}, "1024 cannot be split over 2 slices of 1500 devices", {"chips": 3000, "slices": 2}),
        (
            {"mesh.fsdp": 8},
            "does not divide the 4 chips of a slice; use one of 1, 2, 4",
            {"slices": 2},
        ),
        ({"evaluation.batch_size": 12}, "evaluation.batch_size=12 cannot be split over 8"),
        ({"test.batch_size": 12}, "test.batch_size=12 cannot be split over 8"),
        ({"mesh.fsdp": 3}, "mesh.fsdp=3 does not divide the 8 chips; use one of 1, 2, 4, 8"),
        ({"train.microbatches": 3}, "microbatches=3 does not divide the 128 images"),
        ({}, "GiB of a chip that has 0; shard them with --fsdp 0", {"chip": SMALL}),
    )
    def test_is_refused(self, changes, message, on=None):
        config = imagenet()
        config.update_from_flattened_dict(changes)
        with self.assertRaisesRegex(ValueError, message):
            account.account(config, H100._replace(**on or {}), utilisation=0.2)

    def test_price_counts_every_chip_hour(self):
        found = account.account(imagenet(), H100, utilisation=0.2)
        priced = account.priced(found, 2.5)
        for part in (*priced["phases"], priced["training"], priced["autoattack"]["expected"]):
            self.assertAlmostEqual(part["money"], 2.5 * part["chip_hours"])
        self.assertNotIn("money", json.dumps(found))


class HereTest(parameterized.TestCase):
    """How often the parts of a phase happen, on devices that are here."""

    def account(self, on, batch_size=32):
        config = digits()
        config.train.batch_size = batch_size
        config.evaluation.every_epochs, config.checkpoint.every_epochs = 2, 4
        cost = PhaseCost(step=0.5, probe=2.0, selection=3.0, test=7.0, memory=9, figures={})
        cost = cost._replace(save=1.0, compile=11.0)
        with mock.patch.object(account.here, "measured", return_value=cost) as measured:
            found = account.account(config, on, utilisation=0.4, seconds=1.0, images=0, start=5.0)
        self.assertEqual(measured.call_args.kwargs, {"seconds": 1.0})
        return found, *measured.call_args.args

    def test_parts_of_a_phase(self):
        found, part, devices = self.account(HERE)
        (row,) = found["phases"]
        spent = row["parts_s"]
        self.assertEqual(part.selections, 6)  # after epochs 2 to 10, and after the last
        self.assertEqual(spent["checkpoints"], 6 + 3)  # of weights, and of the state
        self.assertEqual(spent["selection"], 6 * 3.0)
        self.assertEqual(spent["steps"], part.steps * 0.5)
        self.assertEqual(spent["alarm"], part.probes * 2.0)
        self.assertEqual((spent["test"], spent["compile"]), (7.0, 11.0))
        self.assertEqual(found["training"]["seconds"], sum(spent.values()) + 5.0)
        self.assertEqual((row["mfu"], row["data_cores"]), (None, None))
        self.assertEqual(devices, jax.devices("cpu"))  # as training does
        self.assertEqual(self.account(HERE, batch_size=36)[2], jax.devices("cpu")[:1])
        self.assertIn("were measured briefly on this machine", found["known"][0])
        self.assertNotIn("peak", " ".join(found["assumed"]))

    def test_all_devices_of_an_accelerator(self):
        chips = jax.devices()[:2]
        with mock.patch.object(account.jax, "devices", return_value=chips) as asked:
            self.assertEqual(self.account(HERE._replace(name="gpu"))[2], chips)
        asked.assert_any_call("gpu")


def phase(augmentation="heavy", name="imagenet2012", size=224):
    config = base().unlock()
    config.data.update(name=name, augmentation=augmentation)
    config.model.image_size = size
    split = SizedSplit(1_281_167, None)
    return PhaseWork("train", config, split, 1_281_167, 100, 0, 1, split, split)


class DecodingTest(parameterized.TestCase):
    @sweeps.rows(
        ("heavy", "imagenet2012", 224, 405_000 / 405),
        ("basic", "tfds:imagenet2012", 224, 405_000 / 546),
        ("resized-crop|flip|randaugment", "imagenet2012", 224, 405_000 / 405),  # heavy's chain
        ("crop|flip", "imagenet2012", 224, None),
        ("basic", "cifar10", 224, None),
        ("basic", "imagenet2012", 64, None),
        ("basic", "imagenet2012", 288, None),  # larger ones take longer, how much is not known
    )
    def test_cores(self, augmentation, name, size, expected):
        self.assertEqual(account.cores(phase(augmentation, name, size), 405_000), expected)

    @sweeps.rows(
        # 16 chips are in 4 hosts of 112 cores, of which 108 decode 405 images/s each.
        (
            ("TPU v5e", 16, 200_000),
            "WARNING: train: 200,000 images/s keep 494 cores busy with decoding and "
            "data.augmentation=heavy, but there are only 432 on 4 hosts: the chips wait for data "
            "at least 13% of the time; choose a cheaper data.augmentation.",
        ),
        (("TPU v5e", 16, 174_000), "keep 430 cores busy .*=heavy, out of 432 on 4 hosts.$"),
        (("TPU v5e", 2, 40_500), "^WARNING.* keep 100 cores .*, but there are only 52 on 1 host:"),
        (("NVIDIA H100 SXM", 8, 40_500), "=heavy, 12.5 per NVIDIA H100 SXM.$"),
        # ct4p, ct5p-hightpu-4t, ct6e-standard-4t; of Ironwood JAX counts chips twice.
        *((("TPU " + kind, 16, 405), f"of {4 * (cores - 4)} on 4 hosts.$")
          for kind, cores in (("v4", 240), ("v5e", 112), ("v5p", 208), ("v6e", 180))),
        (("TPU7x", 16, 405), "of 440 on 2 hosts.$"),
    )  # fmt: skip
    def test_hosts(self, on, line):
        kind, chips, speed = on
        there = Target("there", kind, chips, hardware.chip(kind), False, False)
        self.assertRegex(account.decoding_line(phase(), there, speed), line)
        self.assertIsNone(account.decoding_line(phase("crop"), there, speed))
        self.assertIsNone(account.decoding_line(phase(), there._replace(here=True), speed))


class StartCostTest(parameterized.TestCase):
    def test_each_until_one_is_finished(self):
        self.enterContext(contextlib.chdir(self.create_tempdir().full_path))
        config = refresh_configs.load("larger_radius:convnext_t_cvst,start=trained")
        on = target("v5e:8x8")

        def estimated():
            training = {"training": {"hours": 2.5, "chip_hours": 160.0}}
            with mock.patch.object(account, "account", return_value=training) as asked:
                options = {"utilisation": 0.2}
                rows = account.start_costs(config, Path("runs/larger"), on, **options)
            for call in asked.call_args_list:  # AutoAttack is that of the run that starts
                self.assertEqual(call.kwargs, options | {"seconds": 3.0, "images": 0})
                self.assertEqual(call.args[1], on)
            return asked.call_count, [account.start_sentence(row) for row in rows]

        count, lines = estimated()
        self.assertEqual((count, len(lines)), (2, 2))
        self.assertEqual(
            lines[0],
            "It starts from runs/revisiting_at-convnext_t_cvst, which is not finished: that run "
            "costs another 2.5 hours and 160 chip-hours, once for all runs that start from it.",
        )
        self.assertStartsWith(lines[1], "It starts from runs/convstem_pretraining-convnext_t_cvst,")
        folder = Path("runs/convstem_pretraining-convnext_t_cvst")
        (folder / "pretrain" / "best" / "7").mkdir(parents=True)
        values = plain(refresh_configs.load("convstem_pretraining:convnext_t_cvst"))
        (folder / "config.json").write_text(json.dumps({"version": 1} | values))
        self.assertIn("which is not finished but has begun: that", estimated()[1][1])
        line = json.dumps({"weights": "pretrain, step 7, ema"})
        (folder / "results.jsonl").write_text(f"{line}\n")
        count, lines = estimated()
        self.assertEqual(count, 1)
        self.assertIn("which is finished and costs nothing.", lines[1])

    def test_the_doctor_refuses_a_start_of_another_network(self):
        config = tiny(init__weights="run:convstem_pretraining:vit_s_cvst", pretrain__epochs=0)
        with self.assertRaisesRegex(
            ValueError, "run:convstem.*weights of vit_s_cvst; set model.na"
        ):
            command.of_config(config, devices=1, name="tiny", tell=self.fail)
