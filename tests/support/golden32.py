"""Golden logits and gradients of networks at 32 px, whose weights are drawn by their names."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import parity, paths, reference

PARTS = paths.GOLDEN / "cifar"  # *_32px.npz, gradients at every second pixel
WHOLE = paths.SHARED / "golden" / "cifar" / "architectures_32px.npz"
LISTINGS = paths.SHARED / "reference" / "state_dicts"
CIFAR10 = {"normalize.mean": (0.4914, 0.4822, 0.4465), "normalize.std": (0.2471, 0.2435, 0.2616)}

# Sheet of the paper: parameters, and 1e9 multiply-adds of convolutions and linear maps at 32 px.
COUNTED = {
    "wrn_28_10": (36_479_194, 5.243),
    "wrn_34_12": (66_457_818, 9.582),
    "wrn_46_14": (128_389_210, 18.585),
    "wrn_70_16": (266_796_506, 38.764),
    "wrn_34_r": (68_116_698, 19.133),
    "wrn_a1": (18_707_930, 5.077),
    "wrn_a2": (38_323_482, 10.836),
    "wrn_a3": (75_302_490, 20.216),
    "wrn_a4": (147_291_738, 40.381),
    "robustresnet_a1": (19_222_738, 5.080),
    "robustresnet_a2": (39_033_982, 10.739),
    "robustresnet_a3": (75_856_698, 19.820),
    "robustresnet_a4": (147_262_458, 39.273),
}


def weights(listing) -> dict[str, np.ndarray]:
    """Float32 weights of a state dict's listing: normal draws, each seeded by its name."""
    rows = [line.split("\t") for line in listing.read_text().splitlines()]
    shapes = {key: reference._shape(shape) for key, shape, _ in rows if key != "name"}
    return {key: drawn(key, shape) for key, shape in shapes.items()}


def drawn(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a name."""
    if key.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    random = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    z = random.standard_normal(int(np.prod(shape)))
    if key.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif key.endswith("running_mean"):
        z = 0.1 * z
    elif len(shape) >= 2:
        z = z / np.sqrt(z.size / shape[0])
    else:
        z = 1 + 0.1 * z if key.endswith("weight") else 0.1 * z
    return z.reshape(shape).astype(np.float32)


def stored(golden: str, *, whole: bool = False):
    """The file that has the arrays of a golden network."""
    for file in [WHOLE] if whole else sorted(PARTS.glob("*_32px.npz")):
        arrays = np.load(file)
        if f"{golden}__f32" in arrays.files:
            return arrays
    raise KeyError(golden)


def images(seed: int = 0, shape=(2, 3, 32, 32)) -> np.ndarray:
    """f64[B,H,W,3], as the golden arrays' makers drew them."""
    return np.random.RandomState(seed).uniform(size=shape).transpose(0, 2, 3, 1)


def network(name: str, arrays, dtype: str, **options):
    """(network, params, stats) with a reference's weights; of float64 to be called in x64."""
    arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    sizes = {"num_classes": 10, "image_size": 32} | options
    params, stats = convert.from_torch(name, arrays, **sizes)
    return models.create(name, dtype=dtype, **sizes), params, stats


def check(test, golden: str, name: str, arrays, *, whole=False, seed=0, side=32, **options) -> None:
    """Logits in both precisions, and the gradient of the sum of the first ones in float64.

    In float32 PyTorch's own gradient is up to 6e-3 of its largest entry from its float64, as ReLUs
    near 0 fall on either side: it decides nothing.
    """
    theirs = stored(golden, whole=whole)
    x = images(seed, (2, 3, side, side)).astype(np.float32)
    for dtype, key, bound in (("float32", "f32", 1e-5), ("float64", "f64", 1e-9)):
        with jax.enable_x64(dtype == "float64"):
            net, params, stats = network(name, arrays, dtype, **options)

            def first(x, params, stats, net=net):
                logits, _ = net.apply(params, stats, x)
                return logits[:, 0].sum(), logits

            if dtype == "float64":
                run = jax.jit(jax.value_and_grad(first, has_aux=True))
                (_, logits), gradient = jax.device_get(run(jnp.asarray(x, dtype), params, stats))
            else:
                logits = jax.jit(first)(jnp.asarray(x), params, stats)[1]
        # float32: theirs is 4e-7 from its own float64; float64 is exact but for the sums' order.
        test.assertLess(parity.relative(logits, theirs[f"{golden}__{key}"]), bound, dtype)
    gradient = gradient.transpose(0, 3, 1, 2)
    gradient = gradient if whole else gradient[:, :, ::2, ::2]
    test.assertLess(parity.relative(gradient, theirs[f"{golden}__grad0_f64"]), 1e-7)


def check_training(test, golden: str, name: str, arrays, **options) -> None:
    """Logits on batch statistics of 8 images and the running statistics after them, in float64."""
    theirs = stored(golden)
    with jax.enable_x64(True):
        net, params, stats = network(name, arrays, "float64", **options)
        x = jnp.asarray(images(2, (8, 3, 32, 32)))
        train = jax.jit(lambda p, s, x: net.apply(p, s, x, train=True))
        logits, moved = jax.device_get(train(params, stats, x))
    test.assertLess(parity.relative(logits, theirs[f"{golden}__train8_f64"]), 1e-9)
    prefix = f"{golden}__train8__"
    found = [key for key in theirs.files if key.startswith(prefix)]
    test.assertNotEmpty(found)
    for key in found:
        ours = key.removeprefix(prefix).replace("running_", "")
        test.assertGreater(parity.relative(stats[ours], theirs[key]), 1e-4, key)  # it did move
        test.assertLess(parity.relative(moved[ours], theirs[key]), 1e-9, key)


def check_pytorch(test, golden: str, name: str, arrays, **options) -> None:
    """Our file in PyTorch gives the golden logits and gradient, and ours in float32 is not a
    further from its float64 than twice as far as its own float32 is.

    Of 8 images' gradients the lower quartile decides: in up to half of a deep network's images a
    unit of ReLU or max pooling falls on the other side of its kink, here or in PyTorch, which is
    1e-3 to 1e-2 of the largest entry. A fault would show in all images.
    """
    torch = parity.torch_or_skip(test)
    from tests.support import torch_modules

    theirs = stored(golden)
    sizes = {"num_classes": 10, "image_size": 32} | options
    own = convert.to_torch(name, *convert.from_torch(name, arrays, **sizes), **options)
    net = torch_modules.network(name, img_size=32, num_classes=10, **options).eval()
    net.load_state_dict({key: torch.tensor(value) for key, value in own.items()})

    def of_torch(x, dtype):
        pixels = torch.tensor(x.transpose(0, 3, 1, 2).astype(np.float32), dtype=dtype)
        logits = net.to(dtype)(pixels.requires_grad_())
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), pixels)
        return logits.detach().numpy(), gradient.numpy()

    logits, gradient = of_torch(images(), torch.float64)
    test.assertLess(parity.relative(logits, theirs[f"{golden}__f64"]), 1e-9)
    test.assertLess(parity.relative(gradient[:, :, ::2, ::2], theirs[f"{golden}__grad0_f64"]), 1e-7)

    x = images(0, (8, 3, 32, 32))
    exact, single = of_torch(x, torch.float64)[1], of_torch(x, torch.float32)[1]
    ours, params, stats = network(name, arrays, "float32", **options)
    first = jax.jit(jax.grad(lambda x, *weights: ours.apply(*weights, x)[0][:, 0].sum()))
    found = np.asarray(first(jnp.asarray(x, jnp.float32), params, stats)).transpose(0, 3, 1, 2)
    test.assertLess(_without_kinks(found, exact), 2 * _without_kinks(single, exact))


def _without_kinks(found: np.ndarray, exact: np.ndarray) -> float:
    errors = [parity.relative(*pair) for pair in zip(found, exact, strict=True)]
    return float(np.quantile(errors, 0.25))
