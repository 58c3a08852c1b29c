"""Networks of a user's: that they compute what they are, and every network that is none."""

import contextlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models.interface import classifier, foreign
from jaxrobust.runtime.commandline import functions
from jaxrobust.training.update import optim
from tests.support import sweeps
from tests.support.foreign import written

SIZES = {"num_classes": 10, "image_size": 8, "in_channels": 1}
IMAGES = np.random.default_rng(0).random((6, 8, 8, 1), np.float32)


class OwnFolder(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = Path(self.create_tempdir())
        self.enter_context(contextlib.chdir(folder))
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.path = written(folder)

    def add(self, text):
        self.path.write_text(f"{self.path.read_text()}\n{text}")


class ModuleTest(OwnFolder):
    def made(self, **options):
        net = models.create("my_nets.py:make", **SIZES, **options)
        return net, *jax.jit(net.init)(jax.random.key(3))

    def reference(self, **modes):
        """The module itself, with the weights of that key."""
        make = functions.find("", "my_nets.py:make").function
        made = make(10, 1, rngs=nnx.Rngs(jax.random.key(3)))
        return nnx.view(made, **modes)

    def test_names_and_shapes(self):
        _, params, stats = self.made(width=4)
        self.assertEqual(params["blocks.0.conv.kernel"].shape, (3, 3, 1, 4))
        self.assertLen(params, 2 * 4 + 2)
        running = [f"blocks.{i}.norm.{name}" for i in (0, 1) for name in ("mean", "var")]
        self.assertSameElements(stats, running)  # neither the plain array nor random streams

    def test_evaluates_as_the_module_does(self):
        net, params, stats = self.made()
        logits, after = jax.jit(net.apply)(params, stats, IMAGES)
        module = self.reference(use_running_average=True, deterministic=True)
        # The same operations, once compiled and once one by one.
        np.testing.assert_allclose(logits, module(IMAGES), rtol=1e-5, atol=1e-6)
        for name, value in stats.items():
            np.testing.assert_array_equal(after[name], value)

    def test_trains_as_the_module_does(self):
        net, params, stats = self.made(rate=0.0)
        _, after = jax.jit(lambda *a: net.apply(*a, train=True, key=jax.random.key(0)))(
            params, stats, IMAGES
        )
        module = self.reference(use_running_average=False, deterministic=True)
        module(IMAGES)
        for i, block in enumerate(module.blocks):
            for name, value in (("mean", block.norm.mean), ("var", block.norm.var)):
                moved = after[f"blocks.{i}.norm.{name}"]
                np.testing.assert_allclose(moved, value[...], rtol=1e-5, atol=1e-6)
                self.assertGreater(np.abs(moved - stats[f"blocks.{i}.norm.{name}"]).max(), 1e-4)

    def test_dropout_draws_from_the_key(self):
        net, params, stats = self.made(rate=0.5)
        train = jax.jit(lambda key: net.apply(params, stats, IMAGES, train=True, key=key)[0])
        one, two, again = (np.asarray(train(jax.random.key(seed))) for seed in (0, 1, 0))
        np.testing.assert_array_equal(one, again)
        self.assertGreater(np.abs(one - two).max(), 1e-2)
        keys = jax.random.split(jax.random.key(5), 6)  # as the update passes them
        np.testing.assert_array_equal(train(keys), train(keys[0]))

    def test_a_file_that_changes_makes_another_network(self):
        self.made()
        self.path.write_text(self.path.read_text().replace("width=16", "width=8"))
        self.assertEqual(self.made()[1]["head.kernel"].shape, (8, 10))

    def test_the_class_itself_is_a_function(self):
        net = models.create("my_nets.py:Net", **SIZES, width=4)
        params, _ = jax.eval_shape(net.init, jax.random.key(0))
        self.assertEqual(params["head.kernel"].shape, (4, 10))

    def test_one_that_draws_from_streams_of_its_own(self):
        self.add("def fixed(num_classes):\n    return Net(num_classes, 1, rngs=nnx.Rngs(7))")
        net = models.create("my_nets.py:fixed", **SIZES)
        one, two = (net.init(jax.random.key(seed))[0]["head.kernel"] for seed in (0, 1))
        np.testing.assert_array_equal(one, two)

    @pytest.mark.slow
    def test_a_network_of_ours_with_another_head(self):
        self.add(
            "from jaxrobust import models\n"
            "def reheaded(num_classes, image_size, in_channels, dtype, rngs):\n"
            "    how = {'image_size': image_size, 'in_channels': in_channels, 'dtype': dtype}\n"
            "    small = {'depths': (2,), 'dims': (8,), 'drop_path': 0.5}\n"
            "    net = models.module('convnext_n', rngs=rngs, **how, **small)\n"
            "    net.head.fc = nnx.Linear(8, num_classes, rngs=rngs)\n"
            "    return net\n"
        )
        net = models.create("my_nets.py:reheaded", **SIZES)
        params, stats = net.init(jax.random.key(0))
        self.assertEqual(params["head.fc.kernel"].shape, (8, 10))
        self.assertIn("normalize.mean", stats)
        train = jax.jit(lambda keys: net.apply(params, stats, IMAGES, train=True, key=keys)[0])
        one, two = (train(jax.random.split(jax.random.key(s), 6)) for s in (0, 1))
        self.assertGreater(np.abs(one - two).max(), 0)  # stochastic depth, per image

    def test_shared_layers_are_one(self):
        if os.environ.get("NNX_GRAPH_MODE") == "false":
            self.skipTest("NNX itself refuses them in tree mode")

        class Twice(nnx.Module):
            def __init__(self, rngs):
                self.one = nnx.Linear(64, 64, rngs=rngs)
                self.two = self.one

            def __call__(self, x):
                return self.two(self.one(x.reshape(x.shape[0], -1)))

        net = classifier.of_foreign(Twice, in_channels=1)
        params, stats = net.init(jax.random.key(0))
        self.assertLen(params, 2)
        x = IMAGES.reshape(6, -1)
        kernel, bias = (next(v for k, v in params.items() if n in k) for n in ("kernel", "bias"))
        expected = (x @ kernel + bias[None]) @ kernel + bias[None]
        np.testing.assert_allclose(net.apply(params, stats, IMAGES)[0], expected, rtol=1e-4)


class FamilyTest(OwnFolder):
    """What is read of the family of a name."""

    def test_decays_matrices_only(self):
        rule = optim.DECAY_MASKS[models.decay_mask("my_nets.py:make")]
        params = models.create("my_nets.py:make", **SIZES).init(jax.random.key(0))[0]
        decayed = [name for name, array in params.items() if rule(name, array)]
        kernels = ["blocks.0.conv.kernel", "blocks.1.conv.kernel", "head.kernel"]
        self.assertSameElements(decayed, kernels)

    def test_says_where_it_is_from(self):
        origin = models.origin("my_nets.py:make")
        self.assertEqual((origin["name"], origin["file"]), ("my_nets.py:make", "my_nets.py"))
        self.assertIsNone(models.origin("convnext_t"))

    def test_options_are_what_makes_it_another(self):
        options = {"width": 4, "dims": (1, 2)}
        self.assertEqual(models.computed("a.py:make", options), options)
        expected = {"dims": [1, 2], "width": 4}
        self.assertEqual(models.essential("a.py:make", options), expected)

    def test_is_no_network_of_ours(self):
        with self.assertRaisesRegex(ValueError, "is your own function, but this needs one of"):
            models.known("my_nets.py:make")
        with self.assertRaisesRegex(ValueError, "name a function in the file too: my_nets.py:make"):
            models.create("my_nets.py")


class RefusalTest(OwnFolder):
    def refused(self, name, message, **given):
        with self.assertRaisesRegex(ValueError, message) as caught:
            models.create(f"my_nets.py:{name}", **SIZES | given)
        self.assertNotIn("\n", str(caught.exception))

    @sweeps.rows(
        ("depth", r"unknown option \['depth'\] for my_nets.py:make; it accepts \['num_classes', "),
        ("num_classes", "num_classes=1: a classifier needs at least 2 classes"),
        ("dtype", "dtype='half' is not a compute type"),
        ("remat", "my_nets.py:make does not accept remat; leave model.remat out"),
    )
    def test_options(self, key, message):
        given = {"depth": 3, "num_classes": 1, "dtype": "half", "remat": True}
        self.refused("make", message, **{key: given[key]})

    def test_options_that_are_no_values(self):
        self.refused("make", "options must be plain values; .*object", width=object())

    @parameterized.named_parameters(
        ("nothing", "return None", "returns nothing; return a flax.nnx.Module, or .*Classifier"),
        ("tuple", "return 1, 2", "returns a builtins.tuple; return a"),
        (
            "linen",
            "import flax.linen; return flax.linen.Dense(3)",
            "returns a flax.linen.linear.Dense; return a flax.nnx.Module, or",
        ),
        ("error", "return num_classes / 0", r"my_nets.py, line \d+: ZeroDivisionError: division"),
        (
            "one_dict",
            "return Classifier(lambda key: {}, lambda p, s, x, **how: (x, s))",
            r"init\(key\) returns \{\}; return params and stats, two flat dicts",
        ),
        (
            "nested",
            "return Classifier(lambda key: ({'a': {'b': jnp.ones(2)}}, {}), None)",
            r"init\(key\) returns \(\{a: \{b: float32\[2\]\}\}, \{\}\); return params and stats",
        ),
        (
            "integers",
            "return Classifier(lambda key: ({}, {'n': jnp.ones(2, int)}), None)",
            r"\{n: int32\[2\]\}\); return params and stats, two flat dicts of float arrays",
        ),
        (
            "common_name",
            "return Classifier(lambda key: ({'a': jnp.ones(2)}, {'a': jnp.ones(2)}), None)",
            "without a common name",
        ),
        (
            "no_train",
            "return Classifier(lambda key: ({}, {}), lambda p, s, x: (jnp.ones((2, 10)), s))",
            r"my_nets.py:own: TypeError: .*unexpected keyword argument 'train'",
        ),
        (
            "only_logits",
            "return Classifier(lambda key: ({}, {}), lambda p, s, x, **how: x[:, 0, :, 0])",
            r"apply returns float32\[2,8\] for 2 images; return logits and stats",
        ),
        (
            "other_classes",
            "return Classifier(lambda key: ({}, {}), lambda p, s, x, **how: (x[:, 0, :, 0], s))",
            r"the logits of 2 images are float32\[2,8\]; return float32\[2,10\], for model.num_cl",
        ),
        (
            "stats_that_go",
            "return Classifier(lambda key: ({}, {'a': jnp.ones(2)}),\n"
            "        lambda p, s, x, train=False, key=None:\n"
            "            (jnp.ones((2, 10)), {} if train else s))",
            "returns different stats from init for 2 images in training: .*return the same names",
        ),
        (
            "a_call_that_fails",
            "return Classifier(lambda key: ({}, {}), lambda p, s, x, **how: x @ x)",
            r"my_nets.py, line \d+: TypeError: dot_general requires contracting dimensions",
        ),
    )
    def test_what_make_returns(self, body, message):
        self.add(f"def own(num_classes):\n    {body}\n")
        self.refused("own", message)

    def test_a_module_that_is_none(self):
        self.add("def own(rngs):\n    return jnp.ones(3)\n")
        self.refused("own", "returns a jaxlib.*ArrayImpl; return a flax.nnx.Module, or")

    def test_a_module_of_other_classes(self):
        self.add("def own(rngs):\n    return Net(7, 1, rngs=rngs)\n")
        self.refused("own", r"the logits of 2 images are float32\[2,7\]; return float32\[2,10\]")

    def test_a_module_with_a_counter(self):
        self.add(
            "def own(rngs):\n    net = Net(10, 1, rngs=rngs)\n"
            "    net.count = nnx.Variable(jnp.zeros((), jnp.int32))\n    return net\n"
        )
        self.refused(
            "own", "the variable count is int32, but parameters and statistics must be floats"
        )

    def test_a_missing_argument(self):
        self.add("def own(depth, rngs):\n    return None\n")
        self.refused("own", "TypeError: own.. missing 1 required positional argument: 'depth'")

    def test_images_of_another_kind(self):
        net = models.create("my_nets.py:make", **SIZES)
        params, stats = net.init(jax.random.key(0))
        with self.assertRaisesRegex(ValueError, r"expected \[B, H, W, 1\]"):
            net.apply(params, stats, jnp.zeros((2, 8, 8, 3)))
        with self.assertRaisesRegex(ValueError, "do not belong to this network"):
            net.apply(params | {"more": params["head.bias"]}, stats, IMAGES)

    def test_the_family_has_no_rows(self):
        with self.assertRaisesRegex(ValueError, "has no rows"):
            foreign.FAMILY.maker(None)
