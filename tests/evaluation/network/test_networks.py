"""What an evaluation takes for a network, how it tells two apart, and what it keeps of one."""

import functools
import gc
import json
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import linen, nnx

from jaxrobust import tasks
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.network import tracing
from tests.support import sweeps

Partial = jax.tree_util.Partial
RNG = np.random.default_rng(0)
IMAGES = RNG.random((12, 4, 4, 1), np.float32)
IMAGES[:8, 0, 0] = 0  # so that weights on this pixel do not move the first logits
FIRST, SECOND = RNG.standard_normal((2, 16, 10)).astype(np.float32)
STEPS = {"square": {"steps": 2}}


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


LABELS = np.argmax(linear(FIRST, IMAGES), axis=1)


def evaluate(logits_fn, **changes):
    """A very short evaluation on one device."""
    settings = {"norm": "linf", "epsilon": 0.01, "attacks": ("square",), "overrides": STEPS}
    settings |= {"batch_size": 4, "verbose": False} | changes
    with mock.patch.object(engine, "local_devices", lambda: jax.local_devices()[:1]):
        return autoattack(logits_fn, IMAGES, LABELS, **settings)


def closure(weights):
    return lambda x: linear(weights, x)


def partial(weights):
    return Partial(linear, weights)


class IdentityTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "ledger.jsonl"

    def refused(self, logits_fn, message, **changes):
        with self.assertRaisesRegex(ValueError, f"belongs to another evaluation: .*{message}"):
            evaluate(logits_fn, ledger=self.path, **changes)

    def test_weights_that_the_first_images_do_not_show(self):
        other = FIRST.copy()
        other[0] += 1
        evaluate(closure(FIRST), ledger=self.path)
        self.refused(closure(other), r"its arrays \(weights\) differ")
        evaluate(closure(jnp.asarray(FIRST)), ledger=self.path, batch_size=12)

    def test_a_name_stands_for_nothing(self):
        evaluate(partial(FIRST), identity="mine", ledger=self.path)
        self.refused(partial(SECOND), "arrays .weights. differ", identity="mine")
        evaluate(partial(FIRST), identity="renamed", ledger=self.path)

    def test_a_ledger_of_an_older_version(self):
        """It knew logits and a hash of the weights, which a masked network has too."""
        evaluate(partial(FIRST), ledger=self.path)
        first, *lines = self.path.read_text().splitlines(keepends=True)
        identity = json.loads(first)["identity"]
        weights = identity.pop("fingerprint")["arrays"]
        identity |= {"network": [[0.0, 1.0]], "weights": weights}
        self.path.write_text("".join([json.dumps({"identity": identity}) + "\n", *lines]))
        with self.assertRaisesRegex(
            ValueError, "older version that did not fingerprint networks, .* replay="
        ):
            evaluate(partial(FIRST), ledger=self.path)

    def test_adversarial_images_that_fool_another_network(self):
        """Inside the ball, but not for this network: another file's, or the clean images."""
        fooled = evaluate(partial(FIRST), ledger=self.path, epsilon=0.1).fooled_by == "square"
        self.assertGreater(fooled.sum(), 1)
        evaluate(partial(FIRST), ledger=self.path, epsilon=0.1)
        lines = [json.loads(line) for line in self.path.read_text().splitlines()[1:]]
        stored = [r["image"] for r in sorted(lines, key=lambda r: r.get("stored", -1))]
        self.path.with_suffix(".images").write_bytes(IMAGES[stored[-fooled.sum() :]].tobytes())
        with self.assertRaisesRegex(
            ValueError, "image from square for .* does not fool this network"
        ):
            evaluate(partial(FIRST), ledger=self.path, epsilon=0.1)

    def test_a_line_that_is_no_verdict_is_named(self):
        evaluate(partial(FIRST), ledger=self.path, epsilon=0.1)
        first, *lines = self.path.read_text().splitlines()
        records = [json.loads(line) for line in lines]
        number = [record["fooled"] for record in records].index(True)
        records[number] |= {"stored": None}
        self.path.write_text("".join(f"{line}\n" for line in [first, *map(json.dumps, records)]))
        with self.assertRaisesRegex(ValueError, f"line {number + 2} is not a verdict; remove that"):
            evaluate(partial(FIRST), ledger=self.path, epsilon=0.1)

    def test_bytes_that_are_no_text_are_named(self):
        evaluate(partial(FIRST), ledger=self.path)
        with self.path.open("ab") as file:
            file.write(b'{"\xff"}\n')
        with self.assertRaisesRegex(ValueError, "ledger.jsonl, line 14 is damaged .*remove that"):
            evaluate(partial(FIRST), ledger=self.path)

    def hashed(self, *arguments, **keywords):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("slots",))
        function = lambda *unused, **ignored: None  # noqa: E731
        network = tracing.argument("", Partial(function, *arguments, **keywords), mesh)
        return tracing.weights(network, ())

    def test_what_the_hash_sees(self):
        tree = {"a": np.zeros((2, 3), np.float32), "b": jax.random.key(0), "c": "gelu", "d": None}
        wide = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        whole = jax.NamedSharding(wide, jax.P())
        for same in (
            tree | {"a": jnp.zeros((2, 3))},
            tree | {"a": jax.device_put(tree["a"], whole)},
            dict(reversed(tree.items())),
        ):
            self.assertEqual(self.hashed(tree), self.hashed(same))
        others = [
            tree,
            tree | {"a": np.zeros((3, 2), np.float32)},
            tree | {"a": np.zeros((2, 3), np.int32)},
            tree | {"a": jnp.zeros((2, 3), jnp.bfloat16)},
            tree | {"a": np.full((2, 3), -0.0, np.float32)},
            tree | {"b": jax.random.key(1)},
            tree | {"c": "relu"},
            tree | {"d": False},
            {"A" if k == "a" else k: v for k, v in tree.items()},
        ]
        self.assertLen({self.hashed(other) for other in others}, len(others))
        self.assertNotEqual(self.hashed(train=False), self.hashed(train=True))

    def test_what_the_hash_of_a_program_sees(self):
        long = np.arange(5000, dtype=np.float32)
        image = jax.ShapeDtypeStruct((5000,), jnp.float32)

        def named_otherwise(x):
            return jax.jit(lambda other: jnp.sin(other) * 2.0)(x)

        def forked(least):
            return lambda x: jax.lax.cond(x[0] > 0, jnp.sin, lambda x: x + least, x)

        @jax.custom_vjp
        def straight(x):
            return jnp.round(x)

        straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
        programs = {  # of which no two are the same; the second of a pair computes the same
            "sin": (lambda x: jax.jit(lambda x: jnp.sin(x) * 2.0)(x), named_otherwise),
            "cos": (lambda x: jax.jit(lambda x: jnp.cos(x) * 2.0)(x),),
            "a number": (lambda x: jax.jit(lambda x: jnp.sin(x) * 3.0)(x),),
            "an array": (lambda x: x + long, lambda x: x + long.copy()),
            "an entry in its middle": (lambda x: x + np.where(long == 2500, 1, long),),
            "an array inside": (forked(1.0), forked(1.0)),
            "another one inside": (forked(2.0),),
            "which operand": (lambda x: x[:9] - x[1:10], lambda x: x[:9] - x[1:10]),
            "the other operand": (lambda x: x[1:10] - x[:9],),
            "which result": (lambda x: jax.lax.top_k(x, 2)[0].sum(),),
            "its axis": (lambda x: x.reshape(50, 100).sum(0),),
            "the other axis": (lambda x: x.reshape(100, 50).sum(1),),
            "rounded": (jnp.round,),
            "straight through": (straight, straight),
        }
        same = [
            {tracing.Programs().hashed(jax.jit(f).trace(image).jaxpr) for f in functions}
            for functions in programs.values()
        ]
        self.assertEqual({len(hashes) for hashes in same}, {1})
        self.assertLen(set.union(*same), len(programs))


class Counter:
    """How often something is compiled in a `with` block."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def listen(self, event, *unused, **ignored):
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *unused):
        jax.monitoring.unregister_event_duration_listener(self.listen)


class Model:
    """Weights that may change, with a method that is a network."""

    def __init__(self, weights):
        self.weights = jnp.asarray(weights)

    def logits(self, x):
        return linear(self.weights, x)

    def __call__(self, x):
        return self.logits(x)


class MemoryTest(parameterized.TestCase):
    def live(self):
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def check_freed(self, made, attack):
        before, kept = self.live(), len(tracing._kept)
        weights = jnp.asarray(FIRST)
        gone, logits_fn = weakref.ref(weights), made(weights)
        attack(logits_fn)
        del weights, logits_fn
        self.assertEqual(self.live(), before)
        self.assertIsNone(gone())
        self.assertLen(tracing._kept, kept)

    @sweeps.rows(
        closure,
        lambda w: Model(w).logits,
        lambda w: jax.jit(closure(w)),
        Model,
        lambda w: functools.partial(linear, w),
        lambda w: Partial(lambda scale, x: scale * linear(w, x), jnp.float32(1)),
    )
    @pytest.mark.slow
    def test_an_evaluated_network_is_freed(self, made):
        self.check_freed(made, evaluate)

    @pytest.mark.slow
    def test_one_that_was_searched_with_is_freed(self):
        decides = partial(FIRST)
        evaluate(decides)
        self.check_freed(closure, lambda guides: evaluate(decides, search_fn=guides))

    @sweeps.rows(False, True)
    def test_a_function_that_changes_is_compiled_anew(self, method):
        """It would be judged by the weights that it had when it was evaluated first."""
        model = Model(FIRST)
        logits_fn = model.logits if method else model
        self.assertEqual(evaluate(logits_fn).clean.mean(), 1)
        with Counter() as compiled:
            evaluate(logits_fn)
        self.assertEqual(compiled.count, 0)
        model.weights = -model.weights
        self.assertEqual(evaluate(logits_fn).clean.mean(), 0)

    def test_arrays_that_change_in_place(self):
        weights = FIRST.copy()
        logits_fn = closure(weights)
        self.assertEqual(evaluate(logits_fn).clean.mean(), 1)
        weights *= -1
        self.assertEqual(evaluate(logits_fn).clean.mean(), 0)

    def test_another_checkpoint_compiles_nothing(self):
        # Neither right and wrong images nor arrays of NumPy and of JAX take the same programs.
        for function in (partial(FIRST), partial(-FIRST), Partial(linear, jnp.asarray(FIRST))):
            evaluate(function)
        with Counter() as compiled:
            self.assertLess(evaluate(partial(-2 * FIRST)).clean.mean(), 1)
            evaluate(Partial(linear, jnp.asarray(SECOND)))
        self.assertEqual(compiled.count, 0)


@jax.tree_util.register_pytree_node_class
class Module:
    """As one of Equinox: no hash, arrays and functions are leaves, called with one image."""

    def __init__(self, weights, activation):
        self.weights, self.activation = weights, activation

    def __call__(self, x):
        return self.activation(x.reshape(-1)) @ self.weights

    def tree_flatten(self):
        return (self.weights, self.activation), None

    @classmethod
    def tree_unflatten(cls, unused, leaves):
        return cls(*leaves)

    def __eq__(self, other):
        return isinstance(other, Module) and bool((self.weights == other.weights).all())


class Linen(linen.Module):
    """Batch norm, and a mode that Python reads."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(x.reshape(x.shape[0], -1))
        return linen.Dense(10)(x) if not train else linen.Dense(10)(2 * x)


class NNX(nnx.Module):
    """Batch norm and dropout, in training mode unless told otherwise."""

    def __init__(self):
        self.norm = nnx.BatchNorm(16, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(16, 10, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.dropout(self.norm(x.reshape(x.shape[0], -1))))


def counting():
    """A function that keeps traced values."""
    state = {"mean": jnp.zeros((4, 4, 1))}

    def logits_fn(x):
        state["mean"] = 0.9 * state["mean"] + x.mean(0)
        return linear(FIRST, x - state["mean"][None])

    return logits_fn


LINEN = Linen()
VARIABLES = LINEN.init(jax.random.key(0), IMAGES, False)
BATCH = lambda module, x: jax.vmap(module)(x)  # noqa: E731


class FormsTest(parameterized.TestCase):
    """The ways in which a network is written: each works, or one sentence says what to do."""

    @sweeps.rows(
        lambda: Partial(LINEN.apply, VARIABLES, train=False),
        lambda: lambda x: LINEN.apply(VARIABLES, x, False),
        lambda: Partial(BATCH, Module(FIRST, jax.nn.relu)),
        lambda: jax.vmap(Module(jnp.asarray(FIRST), jax.nn.relu)),
        lambda: Partial(lambda net, x: net(x), nnx.view(NNX(), **EVALUATION)),
        lambda: nnx.view(NNX(), **EVALUATION),
    )
    def test_works(self, made):
        logits_fn = made()
        result = evaluate(logits_fn)
        expected = np.argmax(logits_fn(jnp.asarray(IMAGES)), axis=1) == LABELS
        np.testing.assert_array_equal(result.clean, expected)

    def test_a_pair_of_linen(self):
        module = linen.Sequential([lambda x: x.reshape(len(x), -1), linen.Dense(10)])
        variables = module.init(jax.random.key(0), IMAGES)
        pair, partial = evaluate((module, variables)), evaluate(Partial(module.apply, variables))
        np.testing.assert_array_equal(pair.clean, partial.clean)
        np.testing.assert_array_equal(pair.images_adv, partial.images_adv)

    @pytest.mark.slow
    def test_a_python_value_is_part_of_the_program(self):
        scaled = lambda sign, x: linear(FIRST, x) * (1 if sign is True else -1)  # noqa: E731
        for sign, clean in ((True, 1), (1, 0), (1.0, 0), (True, 1)):
            self.assertEqual(evaluate(Partial(scaled, sign)).clean.mean(), clean, sign)

    @sweeps.rows(
        (lambda: Module(FIRST, jax.nn.relu), "takes a single image, .*; wrap it in jax.vmap"),
        (
            lambda: Partial(lambda net, x: net(x), Module(FIRST, jax.nn.relu)),
            "takes a single image, .*; wrap it in jax.vmap",
        ),
        (lambda: lambda x: x.mean() * FIRST[0], "takes a single image"),
        (lambda: NNX(), "changes its state .*put it into evaluation mode, .* model.eval"),
        (lambda: Partial(LINEN.apply, VARIABLES, train=True), "evaluation mode, .*train="),
        (lambda: VARIABLES, "the network is of type dict; pass a function"),
        (lambda: lambda x: None, "returns NoneType for 4 images; return logits f.B, K"),
        (lambda: lambda x: (linear(FIRST, x), x), "returns tuple for 4 images"),
        (counting, "changes its state .*put it into evaluation mode"),
        (
            lambda: Partial(LINEN.apply, VARIABLES, train=np.array(False)),
            "logits_fn uses the value of an array in Python .*train=False as Python values",
        ),
    )
    def test_is_refused(self, made, message):
        with self.assertRaisesRegex(ValueError, message):
            evaluate(made())

    def test_search_fn_is_named(self):
        with self.assertRaisesRegex(ValueError, "^search_fn returns int32; return floating"):
            evaluate(partial(FIRST), search_fn=lambda x: jnp.ones((x.shape[0], 10), jnp.int32))
        with self.assertRaisesRegex(
            ValueError, "search_fn returns 9 logits, but logits_fn returns 10; pass"
        ):
            evaluate(partial(FIRST), search_fn=partial(FIRST[:, :9]))

    @sweeps.rows(False, True)
    @pytest.mark.slow
    def test_a_module_among_the_arguments_in_training(self, dropout):
        """Its state changes in a copy, which nobody sees: the numbers are those of a batch."""
        net = NNX()
        if not dropout:
            net = nnx.view(net, deterministic=True)
        result = evaluate(Partial(lambda net, x: net(x), net))
        self.assertRegex(result.flags["batch-dependent"], "batch norm or dropout in train mode")

    def test_an_error_of_the_network_says_what_it_was_called_with(self):
        with self.assertRaises(ZeroDivisionError) as caught:
            evaluate(lambda x: 1 / 0)
        notes = "".join(caught.exception.__notes__)
        self.assertRegex(notes, r"logits_fn was called with .*\(4, 4, 4, 1\)")


@pytest.mark.skipif(not find_spec("equinox"), reason="pip install equinox")
class EquinoxTest(parameterized.TestCase):
    def made(self, dropout):
        import equinox

        class Net(equinox.Module):
            layers: list

            def __init__(self):
                key = jax.random.key(0)
                linear = equinox.nn.Linear(16, 10, key=key)
                self.layers = [equinox.nn.Dropout(dropout), jnp.ravel, linear, jax.nn.relu]

            def __call__(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x

        return Net()

    @pytest.mark.slow
    def test_of_a_batch(self):
        import equinox

        net = equinox.nn.inference_mode(self.made(0.5))
        forms = {
            "vmap": jax.vmap(net),
            "partial": Partial(BATCH, net),
            "filter_vmap": equinox.filter_vmap(net),
            "filter_jit": equinox.filter_jit(equinox.filter_vmap(net)),
        }
        expected = np.argmax(jax.vmap(net)(jnp.asarray(IMAGES)), axis=1) == LABELS
        for name, logits_fn in forms.items():
            with self.subTest(name):
                np.testing.assert_array_equal(evaluate(logits_fn).clean, expected)

    def test_is_refused(self):
        message = "draws random numbers .*Dropout requires a key.*equinox.nn.inference_mode"
        with self.assertRaisesRegex(ValueError, message):
            evaluate(self.made(0.5))

    def test_one_image_is_refused(self):
        import equinox

        key = jax.random.key(0)
        networks = {
            "MLP": equinox.nn.MLP(16, 10, 8, 1, key=key),
            "Conv": equinox.nn.Conv2d(1, 4, 2, key=key),
        }
        for name, net in networks.items():
            for task in (None, tasks.embedding(farthest=1)):
                with (
                    self.subTest(name),
                    self.assertRaisesRegex(
                        ValueError, "logits_fn is an Equinox module, .* pass jax.vmap"
                    ),
                ):
                    autoattack(net, IMAGES, LABELS, norm="linf", epsilon=0.01, task=task)


@pytest.mark.skipif(not find_spec("haiku"), reason="pip install dm-haiku")
class HaikuTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.enter_context(jax.numpy_rank_promotion("allow"))

    def made(self, forward, **how):
        import haiku

        net = getattr(haiku, how.get("transform", "transform"))(forward)
        return net, net.init(jax.random.key(0), jnp.asarray(IMAGES))

    def test_works(self):
        import haiku

        def forward(x):
            return haiku.Linear(10)(x.reshape(x.shape[0], -1))

        net, params = self.made(forward)
        result = evaluate(Partial(net.apply, params, None))
        expected = np.argmax(net.apply(params, None, jnp.asarray(IMAGES)), axis=1) == LABELS
        np.testing.assert_array_equal(result.clean, expected)
        with self.assertRaisesRegex(
            ValueError, "must accept images only .*missing .*argument: 'x'"
        ):
            evaluate(Partial(net.apply, params))


class ImagesTest(parameterized.TestCase):
    @sweeps.rows(
        (lambda: (image for image in IMAGES), "images are of type generator, not an array"),
        (lambda: iter([IMAGES]), "pass one array, for a list of batches np.concatenate"),
        (lambda: [IMAGES[:8], IMAGES[8:]], "images are of type list, not an array"),
        (lambda: [IMAGES[:6], IMAGES[6:]], "shape \\(2, 6, 4, 4, 1\\); .*np.concatenate"),
        (lambda: {"image": IMAGES}, "images are of type dict"),
    )
    def test_what_is_no_array(self, made, message):
        with (
            mock.patch(f"{__name__}.IMAGES", made()),
            self.assertRaisesRegex(ValueError, message),
        ):
            evaluate(partial(FIRST))

    def test_a_list_of_images_is_one(self):
        whole = evaluate(partial(FIRST))
        with mock.patch(f"{__name__}.IMAGES", list(IMAGES)):
            np.testing.assert_array_equal(evaluate(partial(FIRST)).robust, whole.robust)

    def test_labels_too(self):
        with (
            mock.patch(f"{__name__}.LABELS", iter(LABELS)),
            self.assertRaisesRegex(ValueError, "labels are of type .*iterator, not an array"),
        ):
            evaluate(partial(FIRST))


EVALUATION = {"use_running_average": True, "deterministic": True}


class KeptTest(absltest.TestCase):
    def test_what_one_of_two_networks_cannot_keep_is_made_each_time(self):
        made = []
        function = mock.Mock(lasts=True), mock.Mock(lasts=False)  # which can be hashed
        two = [SimpleNamespace(func=each, args=([],)) for each in function]
        for networks, times in ((two[:1], 1), (two[::-1], 2), (two, 2)):
            made.clear()
            for _ in range(2):
                tracing.keep(networks, self.id(), "programs", lambda: made.append(1))
            self.assertLen(made, times)
