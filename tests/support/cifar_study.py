"""What every network of the study at 32 px is held to, and others of that size too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights.naming import convert
from tests.support import golden32, parity, paths

SIZES = {"num_classes": 10, "image_size": 32}
# Names of what follows from a network's sizes.
MADE = ("_mask", "relative_index", "attention_bias_idxs")


def weights(listing: str) -> dict[str, np.ndarray]:
    """The golden weights of a listing in tests/golden/models, but for what sizes decide."""
    found = golden32.weights(paths.GOLDEN / "models" / f"{listing}.tsv")
    return {key: array for key, array in found.items() if not key.endswith(MADE)}


def weights_of(name: str, **options) -> dict[str, np.ndarray]:
    """The same of a network of which there is no listing."""
    net = models.create(name, **SIZES, **options)
    params, stats = (
        {key: np.zeros(array.shape, np.float32) for key, array in arrays.items()}
        for arrays in jax.eval_shape(net.init, jax.random.key(0))
    )
    theirs = convert.reference_names(name, params | stats, wrapped=False, **options)
    return {k: golden32.drawn(k, a.shape) for k, a in theirs.items() if not k.endswith(MADE)}


def check_logits(test, listing: str, name: str, **options) -> None:
    """Golden logits in float32, quickly: where blocks are equal, one is compiled for all."""
    net, *own = golden32.network(name, weights(listing), "float32", **options)
    logits = jax.jit(net.apply)(*own, golden32.images().astype(np.float32))[0]
    theirs = golden32.stored(listing)[f"{listing}__f32"]
    test.assertLess(parity.relative(logits, theirs), 1e-5)


def cut(parameters: int) -> str:
    """Millions as the paper prints them: it cuts its figures, it does not round them."""
    return f"{parameters // 10_000 / 100:.2f}"


def check_counts(test, name: str, parameters: int, multiply_adds: int, more: int) -> None:
    """Exact counts at 32 px; `more`: products that ours has and the sheet leaves out."""
    found = table.architecture(name)
    test.assertEqual(found.parameters, parameters)
    test.assertEqual(found.multiply_adds - more, multiply_adds)
    assert found.paper is not None
    test.assertEqual(found.paper.parameters, cut(found.parameters))


def check_both_ways(test, name: str, arrays, **options) -> None:
    """Weights of the public code's names, as ours and back.

    What follows from the network's sizes comes back as PyTorch's side has it by itself.
    """
    params, stats = convert.from_torch(name, arrays, **SIZES, **options)
    back = convert.to_torch(name, params, stats, **options)
    made = [key for key in back if key.endswith(MADE)]
    test.assertEqual([key for key in back if key not in made], list(arrays))
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array, key)
    if not made:
        return
    parity.torch_or_skip(test)
    from tests.support import torch_modules

    net = torch_modules.network(name, img_size=32, num_classes=10, **options)
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    test.assertEqual(list(back), list(state))
    for key in made:
        np.testing.assert_array_equal(back[key], state[key], key)
        test.assertEqual(back[key].dtype, state[key].dtype, key)


def check_message(test, name: str, changes, message: str) -> None:
    """A row or a size that cannot work is refused with a sentence."""
    with test.assertRaisesRegex(ValueError, message):
        models.create(name, **SIZES | changes)


def check_images_message(test, name: str, size: tuple[int, int], message: str, **options) -> None:
    """So are images of another size than the network's."""
    net = models.create(name, num_classes=3, **options)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    with test.assertRaisesRegex(ValueError, message):
        jax.eval_shape(net.apply, params, stats, images)


def small(name: str, *, factor: float = 1.0, **options):
    """(network, params, stats, four images), whose weights all matter; matrices times `factor`."""
    net = models.create(name, num_classes=3, **options)
    params, stats = net.init(jax.random.key(0))
    params = {  # scales that start at 0 hide what is dropped behind them
        key: factor * array if array.ndim > 1 else array + 0.5 * key.endswith(".scale")
        for key, array in params.items()
    }
    side = options["image_size"]
    return net, params, stats, jax.random.uniform(jax.random.key(1), (4, side, side, 3))


def check_draws(test, name: str, *, factor: float = 1.0, **options) -> None:
    """Training draws by the key and needs one; evaluation does not draw."""
    net, params, stats, x = small(name, factor=factor, **options)
    train = jax.jit(lambda key: net.apply(params, stats, x, train=True, key=key)[0])
    first, again, second = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    test.assertGreater(parity.relative(first, second), 1e-3)
    message = "above 0 needs randomness in training: call apply with a key"
    with test.assertRaisesRegex(ValueError, message):
        net.apply(params, stats, x, train=True)
    rates = ("dropout", "attention_dropout", "drop_path")
    none = {rate: 0.0 for rate in rates if rate in models.variant(name)._fields}
    without = models.create(name, num_classes=3, **options | none)
    evaluated = [jax.jit(n.apply)(params, stats, x)[0] for n in (net, without)]
    np.testing.assert_array_equal(*evaluated)


def check_own_draws(test, name: str, *, rtol: float = 1e-5, **options) -> None:
    """Each image draws for itself: not by its place in the batch, nor by the other images.

    Statistics of batch norms, if any, must be those of single images.
    """
    net, params, stats, x = small(name, **options)
    train = jax.jit(lambda x, key: net.apply(params, stats, x, train=True, key=key)[0])
    copies = train(jnp.concatenate([x[:1]] * 4), jax.random.key(0))
    test.assertGreater(parity.relative(copies[1:], copies[:-1]), 1e-3)
    keys = jax.random.split(jax.random.key(3), 4)
    two = train(x[:1:-1], keys[:1:-1])
    np.testing.assert_allclose(two, train(x, keys)[:1:-1], rtol=rtol, atol=rtol / 10)


def trained(name: str, **options):
    """((value, statistics), gradient) of a small network in training; to be called in x64."""
    net, *arrays = small(name, dtype="float64", **options)
    params, stats, x = jax.tree.map(lambda array: array.astype(jnp.float64), arrays)

    def total(params):
        logits, moved = net.apply(params, stats, x, train=True, key=jax.random.key(2))
        return (logits**2).sum(), moved

    return jax.device_get(jax.jit(jax.value_and_grad(total, has_aux=True))(params))


def check_storing(test, name: str, *hows: str, **options) -> None:
    """Recomputing blocks ("remat"), or compiling one for all ("scan"), changes no result."""
    with jax.enable_x64(True):
        (value, moved), gradient = trained(name, **options)
        for how in hows:
            (again, moved_again), gradient_again = trained(name, **options, **{how: True})
            test.assertLess(abs(again / value - 1), 1e-11)  # sums in another order
            for ours, theirs in ((moved_again, moved), (gradient_again, gradient)):
                test.assertEqual(ours.keys(), theirs.keys())
                for key in ours:
                    largest = max(np.abs(theirs[key]).max(), 1e-3)
                    test.assertLess(np.abs(ours[key] - theirs[key]).max(), 1e-9 * largest, key)


def drawn_in_torch(test, name: str, image_size: int, options):
    """(our network in PyTorch, its arrays), drawn by their names but for what sizes decide."""
    torch = parity.torch_or_skip(test)
    from tests.support import torch_modules

    row = {key: options[key] for key in options.keys() & models.computed(name, {}).keys()}
    net = torch_modules.network(name, img_size=image_size, num_classes=10, **row)
    arrays = {
        key: value.numpy() if key.endswith(MADE) else golden32.drawn(key, tuple(value.shape))
        for key, value in net.state_dict().items()
    }
    test.assertEqual(list(arrays), models.torch_keys(name, **row))
    net.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    return net, arrays


def check_beside_pytorch(test, name: str, *, side: int = 32, batch: int = 2, **options) -> None:
    """Logits and input gradients are those of our file in PyTorch, in both precisions."""
    net, arrays = drawn_in_torch(test, name, side, options)
    x = np.random.default_rng(0).random((batch, side, side, 3), np.float32)
    single, double = (
        parity.torch_logits_and_gradients(net, x, dtype) for dtype in ("float32", "float64")
    )
    options |= {"num_classes": 10, "image_size": side}
    for dtype, logits, gradient in (
        # float32: the order of sums; gradients jump where a unit is near 0, PyTorch's own too.
        ("float32", 1e-5, 2 * parity.relative(single[1], double[1])),
        ("float64", 1e-9, 1e-7),
    ):
        ours = parity.logits_and_gradients(name, arrays, x, dtype=dtype, **options)
        test.assertLess(parity.relative(ours[0], double[0]), logits, dtype)
        test.assertLess(parity.relative(ours[1], double[1]), gradient, dtype)


def check_options(test, name: str, **options) -> None:
    """Logits and input gradient, then logits and statistics of training, in float64."""
    side = options["image_size"]
    net, arrays = drawn_in_torch(test, name, side, options)
    import torch

    from jaxrobust.publish import torch_networks

    x = np.random.default_rng(0).random((3, side, side, 3))
    theirs = parity.torch_logits_and_gradients(net, x, "float64")
    ours = parity.logits_and_gradients(name, arrays, x, dtype="float64", num_classes=10, **options)
    test.assertLess(parity.relative(ours[0], theirs[0]), 1e-9)
    test.assertLess(parity.relative(ours[1], theirs[1]), 1e-7)
    for module in net.train().modules():  # what is dropped cannot be compared
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if "dropout" in models.variant(name)._fields:
        options["dropout"] = 0.0
    trained = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
    after = torch_networks.state_arrays(net)
    with jax.enable_x64(True):
        own, params, stats = golden32.network(name, arrays, "float64", **options)
        train = jax.jit(functools.partial(own.apply, train=True))
        logits, moved = jax.device_get(train(params, stats, x))
        _, expected = convert.from_torch(name, after, num_classes=10, **options)
    test.assertLess(parity.relative(logits, trained), 1e-9)
    for key, value in moved.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-9, atol=1e-12, err_msg=key)
