"""Networks printed as PyTorch modules: their numbers, what else they can do, and all refusals."""

import hashlib
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store.artifact import Network
from tests.support import paths, small_networks, sweeps

try:
    import torch

    from jaxrobust.publish import layouts, self_contained, torch_program
    from jaxrobust.publish.network_account import Account
except ImportError:
    torch = None

# Masks or positions of these are for one size, or for square images.
SQUARE = ("cifar_cpvt", "cifar_swin", "cifar_vitae")
FAST = ("convnext, strides", "vit, scaled", "xcit, plain class token", "cifar_mixer")
NETS = f"{paths.ROOT}/examples/my_nets.py"


def small(label: str, dtype=np.float64) -> Network:
    """A small network with the weights of the stored numbers."""
    name, side, own = small_networks.ROWS[label]
    with jax.enable_x64(True):
        parts = convert.from_torch(
            name, small_networks.drawn(label), **small_networks.options(label)
        )
    arrays = [{key: np.asarray(value, dtype) for key, value in part.items()} for part in parts]
    return Network(name, *arrays, small_networks.CLASSES, side, own)


def users(maker: str = "make_linen") -> Network:
    name = f"{NETS}:{maker}"
    net = models.create(name, num_classes=3, image_size=8, in_channels=3, dtype="float32")
    params, stats = jax.device_get(net.init(jax.random.key(1)))
    return Network(name, params, stats, 3, 8, {"in_channels": 3})


@absltest.skipIf(torch is None, paths.PARITY)
class ProgramTest(parameterized.TestCase):
    def module(self, network: Network):
        """The module of the exported file, with the network's weights, and the file's names."""
        folder = Path(self.create_tempdir())
        code, arrays = torch_program.printed(network)
        layouts.save_pt(folder / "net.pt", arrays)
        sha256 = hashlib.sha256((folder / "net.pt").read_bytes()).hexdigest()
        code = self_contained.text(network, Account("drawn"), folder / "net.pt", sha256, code)
        names = {"__name__": "net", "__file__": str(folder / "net.py")}
        exec(compile(code, "net.py", "exec"), names)
        if any(array.dtype == np.float64 for array in arrays.values()):
            names["load"] = names["Network"]().double
        net = names["load"]()
        net.load_state_dict({key: torch.from_numpy(np.array(a)) for key, a in arrays.items()})
        return net, names

    @sweeps.fast(*(list(small_networks.ROWS).index(label) for label in FAST))
    @parameterized.parameters(*small_networks.ROWS)
    def test_computes_what_is_stored(self, label):
        """Logits are those of the authors' modules, image gradients those of JAX."""
        network = small(label)
        net, _ = self.module(network)
        images = small_networks.images(label)
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
        logits = net(x)
        stored = small_networks.stored()[label]["evaluated"]
        np.testing.assert_allclose(logits.detach(), stored, rtol=1e-7, atol=1e-7)
        accepted = self.check_other_sizes(network, net)
        any_size = models.family(network.name).any_size and label not in SQUARE
        self.assertEqual(accepted > 0, any_size)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
        with jax.enable_x64(True):
            apply = network.create(dtype="float64").apply

            def first(x):
                return apply(network.params, network.stats, x)[0][:, 0].sum()

            expected = np.asarray(jax.jit(jax.grad(first))(images))
        limit = 1e-7 * np.abs(expected).max()
        self.assertGreater(limit, 0)
        np.testing.assert_allclose(gradient.permute(0, 2, 3, 1), expected, rtol=0, atol=limit)

    def check_other_sizes(self, network, net):
        """Count the sizes of two at which the logits are JAX's; the module refuses the others."""
        accepted = 0
        for more in ((5, 11), (32, 64)):
            size = [network.image_size + n for n in more]
            images = np.random.default_rng(1).random((2, *size, network.in_channels))
            x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            try:
                logits = net(x).detach()
            except ValueError as error:
                self.assertRegex(str(error), r"give \[B,3,H,W\], (square ones|of)")
                continue
            with jax.enable_x64(True):
                apply = network.create(dtype="float64").apply
                expected, _ = jax.jit(apply)(network.params, network.stats, images)
            np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
            accepted += 1
        return accepted

    @sweeps.rows(("make", (8, 8)), ("make", (13, 10)), ("make_linen", (8, 8)))
    def test_a_users_function(self, maker, size):
        """Dropout, batch norm and "SAME" padding of NNX at any size, and a dense net of Linen."""
        network = users(maker)
        net, names = self.module(network)
        images = np.random.default_rng(0).random((5, *size, 3), np.float32)
        apply = jax.jit(network.create(dtype="float32").apply)
        expected, _ = apply(network.params, network.stats, images)
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        np.testing.assert_allclose(net(x).detach(), expected, rtol=1e-5, atol=1e-6)
        zoo = names["network"]()
        zoo.load_state_dict({f"model.{k}": v for k, v in net.state_dict().items()})
        np.testing.assert_array_equal(zoo(x).detach(), net(x).detach())

    @sweeps.rows("haiku", "equinox")
    def test_other_libraries(self, library):
        """A convolution and a dense layer, with flat dicts of weights as `Classifier` has them."""
        image = jnp.zeros((1, 8, 8, 3))
        if library == "haiku":
            import haiku

            def forward(x):
                x = jax.nn.relu(haiku.Conv2D(4, 3)(x))
                return haiku.Linear(3)(x.mean((1, 2)))

            net = haiku.without_apply_rng(haiku.transform(forward))
            weights, call = net.init(jax.random.key(0), image), net.apply
        else:
            import equinox

            class Net(equinox.Module):
                conv: equinox.nn.Conv2d
                head: equinox.nn.Linear

                def __call__(self, x):
                    x = jax.nn.relu(self.conv(x.transpose(2, 0, 1)))
                    return self.head(x.mean((1, 2)))

            keys = jax.random.split(jax.random.key(0))
            net = Net(
                equinox.nn.Conv2d(3, 4, 3, padding=1, key=keys[0]),
                equinox.nn.Linear(4, 3, key=keys[1]),
            )
            weights, rest = equinox.partition(net, equinox.is_inexact_array)
            call = lambda w, x: jax.vmap(equinox.combine(w, rest))(x)  # noqa: E731
        leaves, tree = jax.tree.flatten(weights)
        params = {f"w{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}

        def apply(params, stats, images):
            return call(tree.unflatten([params[f"w{i}"] for i in range(len(leaves))]), images), {}

        network = users()._replace(params=params)
        with mock.patch.object(Network, "create", lambda *_, **__: mock.Mock(apply=apply)):
            code, arrays = torch_program.printed(network)
        names = {}
        exec(torch_program.IMPORTS + code, names)
        net = names["Network"]()
        net.load_state_dict({key: torch.from_numpy(np.array(a)) for key, a in arrays.items()})
        images = np.random.default_rng(0).random((2, 9, 12, 3), np.float32)
        expected, _ = apply(params, {}, images)
        found = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).detach()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_compilation_other_types_and_training(self):
        net, _ = self.module(small("convnext, kernels", np.float32))
        x = torch.rand(2, 3, 9, 9)
        logits = net(x)
        exported = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(exported(x), logits)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        with warnings.catch_warnings():  # PyTorch is slower on Python 3.13.0, and says so
            warnings.simplefilter("ignore", RuntimeWarning)
            torch.testing.assert_close(compiled(x), logits)
        for dtype in (torch.float16, torch.bfloat16):
            low = net.to(dtype)(x.to(dtype))
            self.assertEqual(low.dtype, dtype)
            torch.testing.assert_close(low.float(), logits, rtol=0.1, atol=0.1)
        with self.assertRaisesRegex(RuntimeError, "is for evaluation only; train it with"):
            net.train()
        with self.assertRaisesRegex(
            ValueError, r"images have shape \(2, 4, 9, 9\); give \[B,3,H,W\]$"
        ):
            net(torch.rand(2, 4, 9, 9))

    def test_images_of_another_size_than_the_positions(self):
        net, _ = self.module(small("vit, scaled", np.float32))
        with self.assertRaisesRegex(ValueError, r"give \[B,3,H,W\], square ones, of 8 px$"):
            net(torch.rand(2, 3, 10, 10))

    def test_an_operation_without_a_rule(self):
        def apply(params, stats, images):
            return jnp.linalg.qr(images[:, :, :, 0])[1].sum(1), stats

        network = users()
        with (
            mock.patch.object(Network, "create", lambda *_, **__: mock.Mock(apply=apply)),
            self.assertRaisesRegex(
                ValueError,
                rf"has the operation '\w+' \({__file__}:\d+\), which cannot be translated to PyT",
            ),
        ):
            torch_program.printed(network)

    def test_an_old_pytorch(self):
        with (
            mock.patch.object(torch, "__version__", "2.1.0"),
            self.assertRaisesRegex(
                ValueError, "PyTorch 2.1.0 is too old .* pip install 'torch>=2.6'"
            ),
        ):
            torch_program.printed(users())


if __name__ == "__main__":
    absltest.main()
