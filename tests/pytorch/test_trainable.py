"""PyTorch's modules that train: gradients, statistics, draws and weights next to PyTorch's own."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.pytorch import kept, program
from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.networks.torch_kernels import KERNELS
from jaxrobust.runtime import pytorch
from tests.support import paths

torch = pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.pytorch.reading import training_mode  # noqa: E402
from jaxrobust.pytorch.reading.training_mode import trainable  # noqa: E402
from tests.support import torch_faults  # noqa: E402
from tests.support import trainable_modules as modules  # noqa: E402

IMAGE = (modules.SIDE, modules.SIDE, modules.CHANNELS)


def written(module):
    return trainable(module, IMAGE)


def mixed(**rates):
    torch.manual_seed(0)
    return modules.Mixed(**rates)


@functools.cache
def network_of_mixed():
    """The module is written down once for all tests that change nothing of it."""
    return written(mixed())


@functools.cache
def network_of_draws():
    return written(modules.Draws(0.25, 0.4))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *IMAGE))


def channels_first(x: np.ndarray):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def wide(network):
    """Params and stats in float64."""
    made = trained.classifier(network).init(jax.random.key(0))
    return [{name: jnp.asarray(a, jnp.float64) for name, a in group.items()} for group in made]


class ParityTest(absltest.TestCase):
    """One module with every norm, in float64; the bars are the issue's, rounding is below 1e-14."""

    def test_three_updates(self):
        module, rate, x, labels = mixed(), 0.5, images(6), np.arange(6) % modules.CLASSES
        network = network_of_mixed()
        theirs = module.double().train()
        optimiser = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=rate)
        with jax.enable_x64(True):
            net, (params, stats) = trained.classifier(network), wide(network)
            chosen = jnp.eye(modules.CLASSES)[labels]

            @jax.jit
            def update(params, stats):
                def loss(params):
                    logits, after = net.apply(params, stats, jnp.asarray(x), train=True)
                    return -(jax.nn.log_softmax(logits) * chosen).sum(1).mean(), after

                grads, after = jax.grad(loss, has_aux=True)(params)
                moved = {name: p - rate * grads[name] for name, p in params.items()}
                return moved, after, grads

            for _ in range(3):
                params, stats, grads = update(params, stats)
                optimiser.zero_grad()
                logits = theirs(channels_first(x))
                torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
                for name, parameter in theirs.named_parameters():
                    if parameter.requires_grad:
                        want = parameter.grad.numpy()
                        np.testing.assert_allclose(grads[name], want, atol=1e-9, err_msg=name)
                optimiser.step()
            for name, tensor in theirs.state_dict().items():
                if name in network.params:
                    np.testing.assert_allclose(params[name], tensor.numpy(), atol=1e-9)
                elif name in network.stats:
                    np.testing.assert_allclose(
                        stats[name], tensor.numpy(), rtol=0, atol=1e-12, err_msg=name
                    )
            with self.subTest("counters and frozen parts"):
                self.assertEqual(stats["norm.num_batches_tracked"], 3)
                self.assertIn("frozen.weight", stats)
                self.assertNotIn("frozen.weight", params)
            with self.subTest("evaluation mode, with the statistics after"):
                got = jax.jit(net.apply)(params, stats, jnp.asarray(x))[0]
                with torch.no_grad():
                    want = theirs.eval()(channels_first(x)).numpy()
                np.testing.assert_allclose(got, want, atol=1e-9)

    def test_tied_weights_train_as_one(self):
        module = modules.Tied()
        network = written(module)
        self.assertSameElements(network.params, ["first.weight", "second.bias"])
        self.assertEqual(dict(network.tied), {"second.weight": "first.weight"})
        x = images(3)
        module.double()(channels_first(x)).square().sum().backward()
        with jax.enable_x64(True):
            net, (params, stats) = trained.classifier(network), wide(network)

            def loss(params):
                return jnp.square(net.apply(params, stats, jnp.asarray(x), train=True)[0]).sum()

            got = jax.grad(loss)(params)["first.weight"]
        np.testing.assert_allclose(got, module.first.weight.grad.numpy(), rtol=1e-12)

    def test_bfloat16_keeps_norms_and_counters_in_float32(self):
        network = network_of_mixed()
        net = trained.classifier(network)
        params, stats = net.init(jax.random.key(0))
        stats["norm.num_batches_tracked"] = jnp.float32(1000)  # 1001 is none of bfloat16's
        low = {name: a.astype(jnp.bfloat16) for name, a in params.items()}
        x = images(4).astype(np.float32)
        logits, after = jax.jit(lambda p: net.apply(p, stats, x, train=True))(low)
        with self.subTest("kernels take frozen weights in bfloat16"):
            fast = trained.classifier(network, trained.Faster(KERNELS))
            jax.eval_shape(lambda p: fast.apply(p, stats, x, train=True), low)
        exact, after32 = jax.jit(lambda p: net.apply(p, stats, x, train=True))(params)
        self.assertEqual(logits.dtype, jnp.float32)
        # 2^-8 of numbers of about 1, through eight layers.
        np.testing.assert_allclose(logits, exact, atol=0.1)
        self.assertEqual(after["norm.num_batches_tracked"], 1001)
        np.testing.assert_allclose(
            after["norm.running_mean"], after32["norm.running_mean"], atol=2e-3
        )

    def test_state_dict_is_strictly_the_modules(self):
        module, network = mixed(), network_of_mixed()
        params, stats = trained.classifier(network).init(jax.random.key(0))
        params = {name: a + 1 for name, a in params.items()}
        stats["norm.num_batches_tracked"] = jnp.float32(6.7)  # an average of counters
        state = trained.state_dict(network, params | stats)
        module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
        self.assertEqual(list(state), list(module.state_dict()))
        self.assertEqual(module.norm.num_batches_tracked, 7)
        self.assertEqual(module.places.dtype, torch.int64)
        np.testing.assert_array_equal(module.head.bias.detach(), params["head.bias"])


class DrawsTest(absltest.TestCase):
    def test_distribution_and_images_of_their_own(self):
        net = trained.classifier(network_of_draws())
        params, stats = net.init(jax.random.key(0))
        count = 10_000
        x = np.zeros((count, *IMAGE), np.float32)
        keys = jax.random.split(jax.random.key(3), count)
        apply = jax.jit(lambda x, k: net.apply(params, stats, x, train=True, key=k)[0])
        logits = apply(x, keys)
        np.testing.assert_array_equal(apply(x[:2], keys[7:9]), logits[7:9])
        path = np.asarray(logits).min(1) >= 10
        # Five standard errors of a share of 10,000 images.
        self.assertAlmostEqual(path.mean(), 0.6, delta=5 * (0.24 / count) ** 0.5)
        dropped = np.asarray(logits) - 10 * path[:, None]
        np.testing.assert_allclose(np.unique(dropped.round(4)), [0, 4 / 3], atol=1e-4)
        share = 5 * (0.25 * 0.75 / count) ** 0.5
        np.testing.assert_allclose((dropped > 0).mean(0), 0.75, atol=share)
        np.testing.assert_allclose(dropped.var(0), (4 / 3) ** 2 * 0.1875, atol=0.03)
        self.assertLess(abs(np.corrcoef(dropped[:-1, 0], dropped[1:, 0])[0, 1]), 0.05)
        self.assertLess(abs(np.corrcoef(dropped[:, 0], path)[0, 1]), 0.05)

    def test_an_image_draws_the_same_in_any_batch(self):
        torch.manual_seed(0)
        module = mixed(dropout=0.3, drop_path=0.5)
        module.norm, module.features = torch.nn.Identity(), torch.nn.Identity()
        net = trained.classifier(written(module))
        params, stats = net.init(jax.random.key(0))
        x, keys = images(4).astype(np.float32), jax.random.split(jax.random.key(1), 4)
        apply = jax.jit(lambda x, k: net.apply(params, stats, x, train=True, key=k)[0])
        whole = apply(x, keys)
        parts = jnp.concatenate([apply(x[:2], keys[:2]), apply(x[2:], keys[2:])])
        np.testing.assert_allclose(whole, parts, atol=1e-6)
        self.assertGreater(np.abs(whole - apply(x, keys[::-1])).max(), 1e-3)

    def test_keys_are_asked_for(self):
        net = trained.classifier(network_of_draws())
        params, stats = net.init(jax.random.key(0))
        x = np.zeros((2, *IMAGE), np.float32)
        with self.assertRaisesRegex(ValueError, r"draws random numbers in training; give keys"):
            net.apply(params, stats, x, train=True)


class RefusedTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            "branch",
            r"data-dependent.*_modules.py, line \d+.*must not branch on the images",
        ),
        ("in place", r"line \d+ \(images.mul_.*changes its input images in place"),
        ("buffer", "the buffer seen changes in .* mode, but does not belong to a batch norm"),
        ("batch draw", r"line \d+ .*draws \(\) in training, the same for all images of a batch"),
        ("draw", r"line \d+ .*draws random numbers in evaluation mode.*self.training"),
        ("several", "name the logits"),
        ("half", r"is float16; call module.float\(\)"),
        ("complex", "extra is complex, which no optimizer here supports"),
        ("lazy", "head.weight is not initialized: the module is lazy"),
        ("frozen", "no parameter that requires a gradient, so there is nothing to train"),
        ("hook", "hook"),
    )
    def test_in_a_sentence(self, fault, message):
        with self.assertRaisesRegex(ValueError, message):
            written(modules.refused(fault))

    def test_weights_that_are_integers(self):
        with self.assertRaisesRegex(ValueError, "its weights are quantized"):
            written(torch_faults.quantised())

    def test_the_one_of_several_that_is_named(self):
        network = trainable(modules.refused("several"), IMAGE, output="1")
        self.assertEqual(list(network.training.results), ["1"])

    def test_a_module_stays_as_it_was(self):
        stem, norm, head = torch.nn.Conv2d(3, 4, 8), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5)
        parts = stem, norm, torch.nn.Flatten(), torch.nn.Dropout(), head
        module = torch.nn.Sequential(*parts).eval()
        before = {name: t.clone() for name, t in module.state_dict().items()}
        written(module)
        self.assertFalse(any(part.training for part in module.modules()))
        for name, tensor in module.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]), name)


class AgreementTest(absltest.TestCase):
    def test_both_modes_are_compared(self):
        torch.manual_seed(0)
        parts = torch.nn.Conv2d(3, 4, 8), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
        module = torch.nn.Sequential(*parts, torch.nn.Linear(4, 5))
        network = written(module)
        net = trained.classifier(network)
        training_mode.check_agreement(module, network, net)
        for mode in ("evaluation", "training"):

            def other(*given, train=False, mode=mode):
                logits, stats = net.apply(*given, train=train)
                return logits + 0.1 * (train == (mode == "training")), stats

            with self.assertRaisesRegex(
                ValueError, f"different logits from PyTorch in {mode} mode"
            ):
                training_mode.check_agreement(module, network, net._replace(apply=other))

    def test_a_module_that_draws_is_compared_in_evaluation_mode_alone(self):
        network, module = network_of_draws(), modules.Draws(0.25, 0.4)
        training_mode.check_agreement(module, network, trained.classifier(network))


class WeightsTest(absltest.TestCase):
    def test_of_another_network(self):
        net = trained.classifier(written(modules.Tied()))
        params, stats = net.init(jax.random.key(0))
        x = np.zeros((2, *IMAGE), np.float32)
        few = {"first.weight": params["first.weight"]}
        other = params | {"second.bias": params["second.bias"][:3]}
        for weights, images, message in (
            (few, x, r"do not belong to this network: .'second.bias'"),
            (other, x, r"second.bias has shape \(3,\), expected \(5,\)"),
            (params, x.astype(np.uint8), "images are uint8; divide by 255 for floats in .0, 1.$"),
            (params, x[0], r"images have shape \(8, 8, 3\), expected \[B, H, W, 3\]$"),
            (params, x[..., :1], r"shape \(2, 8, 8, 1\), expected \[B, H, W, 3\]$"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                net.apply(weights, stats, images)

    def test_normalisation_goes_before_the_module(self):
        net = trained.classifier(written(modules.Tied()))
        params, stats = net.init(jax.random.key(0))
        x = images(2).astype(np.float32)
        mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([0.5, 0.25, 2.0])
        ready = {"normalize.mean": jnp.asarray(mean), "normalize.std": jnp.asarray(std)}
        got, _ = net.apply(params, stats | ready, x)
        want, _ = net.apply(params, stats, (x - mean) / std)
        np.testing.assert_allclose(got, want, rtol=1e-6)


class ImagesTest(absltest.TestCase):
    def test_sizes_of_all_images_are_those_of_one(self):
        n, of = 6, program.Of("n")
        operands = ((of, 4), of, (2, 12, 5), (of,), (0.5, 6), 6)
        step = program.OperatorCall("a", "rand", operands, {}, "line 1")
        first = trained._of_one(step, 0, n, {"n": n}).operands
        self.assertEqual(first, ((1, 4), of, (0, 12, 5), (1,), (0.5, 6), 6))
        second = trained._of_one(step, 1, n, {"n": n}).operands
        self.assertEqual(second, ((6, 0), of, (2, 2, 5), (of,), (0.5, 6), 6))


class KeptTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        torch.manual_seed(0)
        cls.network = written(modules.Various())

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir().full_path) / "run" / "kept"  # neither is there
        kept.write(self.folder, self.network, {"network": "mixed"})

    def test_what_is_read_is_what_was_written(self):
        again = kept.read(self.folder)
        for mode in ("evaluation", "training"):
            first, second = getattr(self.network, mode), getattr(again, mode)
            self.assertEqual(first._replace(constants={}), second._replace(constants={}))
            self.assertSameElements(first.constants, second.constants)
            jax.tree.map(np.testing.assert_array_equal, first.constants, second.constants)
        for group in ("params", "stats", "integers"):
            first, second = getattr(self.network, group), getattr(again, group)
            jax.tree.map(np.testing.assert_array_equal, first, second)
        for field in ("names", "image", "head", "tied"):
            self.assertEqual(getattr(again, field), getattr(self.network, field), field)
        self.assertEqual(kept.identity(self.folder), {"network": "mixed"})
        kept.write(self.folder, again, {"network": "again"})  # over the other one
        self.assertEqual(kept.identity(self.folder), {"network": "again"})

    def test_operands_of_every_kind_are_read_as_they_were(self):
        call = program.OperatorCall(
            *("a", "aten.add.Tensor"),
            (program.Of("x"), None, True, 3, 0.5, "same", (1, (program.Of("y"), 2.0)), 1 + 2j),
            {"dtype": program.NumberType("float32"), "dims": (0, -1)},
            "net.py, line 3",
            (program.OperatorCall("b", "aten.neg.default", (program.Of("a"),), {}, "line 4"),),
        )
        again = kept._called(json.loads(json.dumps(kept._call(call))))
        self.assertEqual(again, call)
        self.assertEqual([type(v) for v in again.operands], [type(v) for v in call.operands])
        with self.assertRaisesRegex(ValueError, "argument <object .*cannot be stored"):
            kept._call(call._replace(operands=(object(),)))

    def test_the_hash_is_that_of_what_is_computed(self):
        first = kept.program_sha256(self.folder)

        def of(network):
            kept.write(self.folder, network, {"network": "another"})
            return kept.program_sha256(self.folder)

        network = self.network
        bias = {name: array + 1 for name, array in network.params.items()}
        self.assertEqual(of(network._replace(params=bias)), first)
        changed = [
            network._replace(integers={"places": np.arange(3)}),
            network._replace(integers={"places": np.arange(3, dtype=np.int32)}),
            network._replace(integers={"places": np.arange(1, 4)}),
            network._replace(training=network.evaluation),
            network._replace(evaluation=network.evaluation._replace(dtype="float64")),
        ]
        constants = {"c": np.ones(2, np.float32)}
        for mode in ("evaluation", "training"):
            own = getattr(network, mode)._replace(constants=constants)
            changed.append(network._replace(**{mode: own}))
        self.assertLen({first, *map(of, changed)}, 1 + len(changed))

    def test_damage_and_versions(self):
        head = self.folder / "programs.json"
        content = json.loads(head.read_text())
        head.write_text(json.dumps(content | {"version": 99}))
        with self.assertRaisesRegex(ValueError, "has version 99, but this code reads 1; use the"):
            kept.read(self.folder)
        head.write_text("{")
        with self.assertRaisesRegex(ValueError, "programs.json cannot be read .*begin a new run"):
            kept.identity(self.folder)
        head.write_text(json.dumps(content))
        (self.folder / "arrays.safetensors").write_bytes(b"none")
        with self.assertRaisesRegex(ValueError, "kept is damaged .*restore it, or begin a new run"):
            kept.read(self.folder)

    def test_a_folder_without_its_head_holds_nothing(self):
        self.assertTrue(pytorch.has_programs(self.folder))
        (self.folder / "programs.json").unlink()
        self.assertFalse(pytorch.has_programs(self.folder))
