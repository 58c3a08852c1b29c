import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.config import base
from jaxrobust.runtime.devices import cpus
from jaxrobust.training import build
from jaxrobust.training.update import mixing
from jaxrobust.types import Classifier
from tests.support import sweeps
from tests.support.steps import small_config, standard


def settings(devices=1, **changes):
    """What a config of these changes passes on to `augment.batch_augmentation`."""
    with mock.patch.object(mixing, "batch_augmentation") as constructor:
        build.batch_augmentation(small_config(**changes), "train", devices=devices)
    return constructor.call_args.args[0]._asdict() | constructor.call_args.kwargs


class BatchAugmentationTest(parameterized.TestCase):
    def test_values_of_presets(self):
        off = {"mixup": 0, "cutmix": 0, "erasing": 0, "smoothing": 0}
        heavy = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "smoothing": 0.1}
        mixed = off | {"mixup": 0.8, "cutmix": 1.0}
        rows = {"none": off, "basic": off, "crop|flip": off, "heavy": heavy, "3-augment": mixed}
        for name, expected in rows.items():
            found = settings(data__augmentation=name, mixup__group=4)
            self.assertEqual({key: found[key] for key in expected}, expected, name)
        self.assertEqual((found["switch"], found["probability"], found["group"]), (0.5, 1.0, 4))
        self.assertEqual((found["num_classes"], found["noise"]), (10, "normal"))

    def test_own_values_replace_them(self):
        found = settings(
            data__augmentation="heavy",
            mixup__mixup=0.0,
            erase__probability=0.0,
            erase__noise="truncated",
            label_smoothing=0.2,
        )
        kept = {"mixup": 0, "cutmix": 1.0, "erasing": 0, "noise": "truncated", "smoothing": 0.2}
        self.assertEqual({key: found[key] for key in kept}, kept)
        self.assertEqual(settings(data__augmentation="crop", label_smoothing=0.1)["smoothing"], 0.1)

    def test_group_matters_only_where_images_mix(self):
        settings(devices=8, mixup__group=8)  # one image each
        settings(devices=1, data__augmentation="heavy", mixup__group=8)

    @sweeps.rows(
        ({"mixup__mixup": -0.1}, "mixup.mixup=-0.1 must be at least 0"),
        ({"mixup__cutmix": float("nan")}, "mixup.cutmix=nan must be at least 0"),
        ({"mixup__cutmix": float("inf")}, "mixup.cutmix=inf must be at least 0"),
        ({"mixup__switch": 1.5}, "mixup.switch=1.5 must be between 0 and 1"),
        ({"mixup__probability": -1.0}, "mixup.probability=-1.0 must be between 0 and 1"),
        ({"mixup__group": 3}, "mixup.group=3 must be even"),
        ({"mixup__group": 0}, "mixup.group=0 must be even, at least 2"),
        ({"erase__probability": 25.0}, "erase.probability=25.0 must be between 0 and 1"),
        ({"erase__noise": "pixel"}, "erase.noise='pixel' must be one of 'normal', 'truncated'"),
        ({"train__l1": -1e-5}, "train.l1=-1e-05 must be at least 0"),
        ({"train__l1": float("nan")}, "train.l1=nan must be at least 0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        (
            {"mixup__mixup": 0.8, "mixup__group": 16},
            "group=16 does not divide the 8 images per device; use mixup.group=8 or "
            "train.batch_size=16",
        ),
        (
            {"mixup__mixup": 0.8, "mixup__group": 8, "train__batch_size": 174},
            "group=8 does not divide the 174 images per device; use mixup.group=6 or "
            "train.batch_size=176",
        ),
        ({"attack__norm": "l2", "attack__epsilon": 128.0}, "l2 ball of radius 128 contains all"),
        (
            {"attack__norm": "l1", "attack__epsilon": 0.5},
            "l1 radius of 0.5 changes less than",
        ),
        ({"attack__labels": "sharp"}, "attack.labels='sharp' must be one of 'soft', 'hard'"),
        (
            {"train__objective": "trades", "attack__start": "random", "attack__labels": "hard"},
            "set attack.labels='soft'",
        ),
    )
    def test_refusals_before_anything_compiles(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            build.phase(small_config(**changes), "train", 1000, devices=jax.devices()[:1])

    def test_refuses_float16(self):
        """Nothing scales the loss: a gradient of 1e-8 would be 0."""
        with self.assertRaisesRegex(ValueError, "model.dtype='float16' is not .*'bfloat16'"):
            build.phase(small_config(model__dtype="float16"), "train", 80)

    def test_refuses_a_momentum_of_norms_that_nobody_knows(self):
        """Of a network of the user's."""
        config = small_config(train__bn_momentum=(1.0, 0.1))
        plain = Classifier(*build.network_of(config))
        with (
            mock.patch.object(build, "network_of", return_value=plain),
            self.assertRaisesRegex(
                ValueError, "set the momentum in your function, and set train.b"
            ),
        ):
            build.phase(config, "train", 80, devices=jax.devices()[:1])

    def test_refuses_a_part_of_the_batch_that_has_no_pairs(self):
        config = small_config(mixup__mixup=0.8, mixup__group=8)
        message = "does not divide the 1 images per device; use train.batch_size=64"
        with self.assertRaisesRegex(ValueError, message):
            build.phase(config, "train", 80, devices=jax.devices())


def products(jaxpr) -> int:
    """The multiply-adds of all products of matrices in a program, as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        assert equation.primitive.name not in ("while", "conv_general_dilated"), "not counted"
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        total += times * sum(products(part) for part in inner if hasattr(part, "eqns"))
    return total


class FlopsTest(parameterized.TestCase):
    """What a step multiplies, counted in its program."""

    widths = (4 * 4 * 3, 16, 32, 10)

    def network(self, config):
        sizes = list(zip(self.widths, self.widths[1:], strict=False))

        def init(key):
            params = {str(i): 0.1 * jax.random.normal(key, size) for i, size in enumerate(sizes)}
            return params, {"normalize.mean": jnp.zeros(3)}

        def apply(params, stats, images, *, train=False, key=None):
            x = images.reshape(len(images), -1)
            for i in range(len(sizes)):
                x = jnp.tanh(x @ params[str(i)])
            return x, stats

        return Classifier(init, apply)

    @sweeps.rows(
        ("clean", ("apgd", 1)),
        *itertools.product(
            ("adversarial", "trades"),
            (("apgd", 1), ("apgd", 3), ("pgd", 4), ("fgsm", 2)),
        ),
    )
    @mock.patch.object(cpus, "kind", lambda: cpus.KINDS[1])  # whose step may be in a program
    def test_are_those_of_the_step(self, objective, attack):
        changes = {"attack__name": attack[0], "attack__steps": attack[1], "model__image_size": 4}
        changes |= {"attack__start": "random", "train__objective": objective}
        config = small_config(**changes)
        with (
            mock.patch.object(build, "network_of", self.network),
            mock.patch.object(build, "_forward_flops", build._forward_flops.__wrapped__),
            standard(),
        ):
            phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
            arguments = build.abstract_arguments(config, "train", phase)
            with jax.set_mesh(phase.mesh):
                program = jax.make_jaxpr(phase.step)(*arguments)
            counted = build.flops_per_image(config, "train")
        # The update needs no gradient in the pixels: the first layer's product is not made.
        first = self.widths[0] * self.widths[1] * (2 if objective == "trades" else 1)
        self.assertEqual(2 * (products(program.jaxpr) / 8 + first), counted)

    @sweeps.rows("cifar_mixer", "convnext_n")
    def test_listed_networks_are_not_counted_again(self, name):
        of = models.member(name)
        sizes = {"num_classes": of.num_classes, "image_size": of.counted_at, "in_channels": 3}
        config = base()
        config.model.update(name=name, options={}, **sizes)
        with mock.patch.object(build, "_forward_flops") as counting:
            listed = build.forward_flops(config)
        counting.assert_not_called()
        with mock.patch.object(build, "COUNTED", {}):
            self.assertEqual(build.forward_flops(config), listed)


class AttackLabelsTest(absltest.TestCase):
    def test_clean_phases_do_not_mind(self):
        # One config has both phases, and the clean one never attacks.
        config = small_config(train__objective="clean", attack__labels="hard")
        self.assertIsNotNone(build.phase(config, "train", 80, devices=jax.devices()[:1]))


class OneDeviceTest(parameterized.TestCase):
    """Whether a training on CPU gets a device for each core."""

    def config(self, **changes):
        config = base().unlock()
        config.model.name, config.train.batch_size = "convnext_n", 16
        for key, value in changes.items():
            part, _, name = key.partition("__")
            config[part][name] = value
        return config

    @sweeps.rows(
        {"cores": 2},
        {"cores": 16},
        {"cores": 4, "train__microbatches": 2},
        {"cores": 2, "model__name": "no_such_network"},  # which the run says
    )
    def test_is_for_other_trainings(self, cores, **changes):
        self.assertIsNone(build.one_device(self.config(**changes), cores))

    @sweeps.rows(
        (3, {}, "train.batch_size=16 cannot be split evenly; set JAX_NUM_CPU_DEVICES=2 to"),
        (12, {}, "cannot be split evenly; set JAX_NUM_CPU_DEVICES=8 to use 8 devices"),
        (6, {"train__batch_size": 7}, "train.batch_size=7 cannot be split evenly$"),
        (8, {"train__microbatches": 4}, "split evenly; set JAX_NUM_CPU_DEVICES=4 to"),
        (
            8,
            {"mixup__group": 4, "mixup__cutmix": 1.0},
            "split evenly; set JAX_NUM_CPU_DEVICES=4 to",
        ),
        (4, {"model__name": "resnet50"}, "batch norms of resnet50 would see 4 images at a time"),
        (4, {"model__name": "nets.py:make"}, "batch norms of nets.py:make would see 4 images"),
    )
    def test_is_for_what_would_notice(self, cores, changes, reason):
        config = self.config(**changes)
        if "mixup__cutmix" in changes:
            config.data.augmentation = "heavy"
        self.assertRegex(build.one_device(config, cores), reason)


class MeshTest(parameterized.TestCase):
    @sweeps.rows((0, 8, 1, 8), (1, 8, 8, 1), (2, 8, 4, 2), (0, 4, 1, 4), (4, 4, 1, 4))
    def test_as_many_share_a_copy_as_asked_for_or_all(self, fsdp, devices, copies, shares):
        mesh = build.mesh_of(small_config(mesh__fsdp=fsdp), jax.devices()[:devices])
        self.assertEqual(mesh.devices.shape, (copies, shares))
        self.assertEqual([*mesh.devices.ravel()], jax.devices()[:devices])

    def test_of_all_devices(self):
        self.assertEqual(build.mesh_of(small_config(mesh__fsdp=2)).size, jax.device_count())
