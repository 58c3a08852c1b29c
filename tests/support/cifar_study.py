"""What every network of the study at 32 px is held to."""

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights import convert
from tests.support import golden32, parity, paths

SIZES = {"num_classes": 10, "image_size": 32}


def weights(listing: str) -> dict[str, np.ndarray]:
    """The golden weights of a listing in tests/golden/models."""
    return golden32.weights(paths.GOLDEN / "models" / f"{listing}.tsv")


def any_weights(name: str, **options) -> dict[str, np.ndarray]:
    """Arrays under the names of a network of which there is no listing."""
    net = models.create(name, **SIZES, **options)
    random = np.random.default_rng(0)
    params, stats = (
        {key: random.random(array.shape, np.float32) for key, array in arrays.items()}
        for arrays in jax.eval_shape(net.init, jax.random.key(0))
    )
    stats |= {"normalize.mean": np.zeros(3, np.float32), "normalize.std": np.ones(3, np.float32)}
    return convert.to_torch(name, params, stats, **options)


def check_logits(test, listing: str, name: str, **options) -> None:
    """Golden logits in float32, quickly: where blocks are equal, one is compiled for all."""
    net, *own = golden32.network(name, weights(listing), "float32", **options)
    logits = jax.jit(net.apply)(*own, golden32.images().astype(np.float32))[0]
    theirs = golden32.stored(listing)[f"{listing}__f32"]
    test.assertLess(parity.relative(logits, theirs), 1e-5)


def check_counts(test, name: str, parameters: int, multiply_adds: int, more: int) -> None:
    """Exact counts at 32 px; `more`: products that ours has and the sheet leaves out."""
    found = table.architecture(name)
    test.assertEqual(found.parameters, parameters)
    test.assertEqual(found.multiply_adds - more, multiply_adds)
    assert found.paper is not None and found.paper.parameters is not None
    cut = int(found.parameters / 1e4) / 100  # the paper cuts its figures, it does not round them
    test.assertEqual(float(found.paper.parameters), cut)


def check_both_ways(test, name: str, arrays, **options) -> None:
    """Weights of the public code's names, as ours and back."""
    params, stats = convert.from_torch(name, arrays, **SIZES, **options)
    back = convert.to_torch(name, params, stats, **options)
    test.assertEqual(list(back), list(arrays))
    for key, array in back.items():
        np.testing.assert_array_equal(array, arrays[key], key)


def check_message(test, name: str, changes, message: str) -> None:
    """A row or a size that cannot work is refused with a sentence."""
    with test.assertRaisesRegex(ValueError, message):
        models.create(name, **SIZES | changes)


def check_dropout(test, name: str, **tiny) -> None:
    """Training draws by the key, each image for itself; evaluation does not draw."""
    net = models.create(name, **SIZES | tiny)
    params, stats = jax.jit(net.init)(jax.random.key(0))
    params = {k: 8 * p if p.ndim > 1 else p for k, p in params.items()}  # each branch matters
    side = tiny.get("image_size", 32)
    image = np.random.default_rng(0).random((1, side, side, 3), np.float32)
    images = np.concatenate([image, image])
    train = jax.jit(lambda key: net.apply(params, stats, images, train=True, key=key)[0])
    logits = np.asarray(train(jax.random.key(0)))
    np.testing.assert_array_equal(train(jax.random.key(0)), logits)
    test.assertGreater(parity.relative(logits[0], logits[1]), 1e-3)
    test.assertGreater(parity.relative(train(jax.random.key(1)), logits), 1e-3)
    # A key for each image: what an image draws does not depend on the others.
    keys = jax.random.split(jax.random.key(2), 2)
    one = jax.jit(lambda k: net.apply(params, stats, image, train=True, key=k)[0])(keys[1:])
    np.testing.assert_allclose(train(keys)[1:], one, rtol=1e-5, atol=1e-6)
    plain = jax.jit(lambda key: net.apply(params, stats, images, key=key)[0])(jax.random.key(0))
    np.testing.assert_array_equal(plain[0], plain[1])
    with test.assertRaisesRegex(ValueError, "dropout above 0 draws in training: call apply with a"):
        net.apply(params, stats, images, train=True)


def check_beside_pytorch(test, name: str, *, side: int = 32, batch: int = 2, **options) -> None:
    """Logits and input gradients are those of our file in PyTorch, in both precisions."""
    torch = parity.torch_or_skip(test)
    from jaxrobust.convert import torch_networks

    sizes = {"num_classes": 10, "image_size": side}
    row = models.variant(name, **options)._asdict()
    row = {key: row[key] for key in models.computed(name, options)} | sizes
    if models.family(name).any_size:
        del row["image_size"]
    net = torch_networks.module(models.family(name).file).model(**row)
    arrays = {k: golden32.drawn(k, tuple(v.shape)) for k, v in net.state_dict().items()}
    test.assertEqual(list(arrays), models.torch_keys(name, **options))
    net.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    x = np.random.default_rng(0).random((batch, side, side, 3), np.float32)
    single, double = (
        parity.torch_logits_and_gradients(net, x, dtype) for dtype in ("float32", "float64")
    )
    for dtype, logits, gradient in (
        # float32: the order of sums; gradients jump where a unit is near 0, PyTorch's own too.
        ("float32", 1e-5, 2 * parity.relative(single[1], double[1])),
        ("float64", 1e-9, 1e-7),
    ):
        ours = parity.logits_and_gradients(name, arrays, x, dtype=dtype, **sizes, **options)
        test.assertLess(parity.relative(ours[0], double[0]), logits, dtype)
        test.assertLess(parity.relative(ours[1], double[1]), gradient, dtype)
