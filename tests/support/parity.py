"""What every architecture is measured by: golden logits, and its reference network in process."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import compiling, paths, reference

MODELS = paths.GOLDEN / "models"


def relative(ours, theirs) -> float:
    """max|difference| / max|reference|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def torch_or_skip(test):
    """PyTorch, if it is there."""
    try:
        import torch
    except ImportError:
        test.skipTest(paths.PARITY)
    return torch


def listing(tsv: str) -> list[str]:
    """The names of a state dict's listing, without the normalization's and wrapper's prefix."""
    names = [line.split("\t")[0] for line in (MODELS / f"{tsv}.tsv").read_text().splitlines()]
    return [n.removeprefix("model.") for n in names if not n.startswith("normalize.")]


def parameters(name: str, **options) -> int:
    """How many parameters a network has."""
    member = models.member(name)
    options = {"num_classes": member.num_classes, "image_size": member.counted_at} | options
    params, _ = jax.eval_shape(models.create(name, **options).init, jax.random.key(0))
    return sum(p.size for p in params.values())


def logits_and_gradients(name, weights, images, *, dtype="float32", overrides=None, **options):
    """Logits, and the gradient of sum_b log_softmax(logits)[b, 0] in the images.

    Args:
      weights: reference names -> arrays.
      images: f[B,H,W,C]; the computation runs in `dtype`.
    """
    with jax.enable_x64(dtype == "float64"):
        weights = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in weights.items()}
        params, stats = convert.from_torch(name, weights, **options)
        net = models.create(name, dtype=dtype, **options, **(overrides or {}))

        def loss(x, params, stats):
            logits, _ = net.apply(params, stats, x)
            return jax.nn.log_softmax(logits)[:, 0].sum(), logits

        images = jnp.asarray(images.astype(dtype))
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compiling.as_users())
        (_, logits), gradient = jax.device_get(run(images, params, stats))
        return logits, gradient


def golden_logits(tsv: str):
    """The stored arrays of a network of `logits_seeded_weights*.npz`, by their last name part."""
    for file in ("logits_seeded_weights.npz", "logits_seeded_weights_2.npz"):
        stored = np.load(MODELS / file)
        found = {k.split("__")[1]: stored[k] for k in stored.files if k.startswith(f"{tsv}__")}
        if found:
            return found
    raise KeyError(tsv)


def check_golden(test, name: str, tsv: str, *, dtype: str, smooth: slice = slice(None)) -> None:
    """Our logits (and gradients, where stored) are those of `logits_seeded_weights*.npz`.

    `smooth`: the images of which no unit is so close to 0 that a derivative depends on rounding.
    """
    theirs = golden_logits(tsv)
    weights = reference.seeded_weights(MODELS / f"{tsv}.tsv")
    logits, gradient = logits_and_gradients(name, weights, reference.golden_images(), dtype=dtype)
    bits = {"float32": "f32", "float64": "f64"}[dtype]
    # float32: theirs is 3e-6 from its own float64, logits have deviation 1; float64 is exact.
    test.assertLess(relative(logits, theirs[bits]), {"f32": 1e-5, "f64": 1e-9}[bits])
    if f"grad_{bits}" not in theirs:
        return
    sampled = gradient.transpose(0, 3, 1, 2)[:, :, ::16, ::16]
    largest = theirs[f"gradmax_{bits}"].max()

    def error(a, b):
        return float(np.abs(np.asarray(a, np.float64) - b)[smooth].max() / largest)

    # In float32 the bound is twice the reference's own rounding error.
    own = error(theirs["grad_f32"], theirs["grad_f64"])
    bound = 1e-7 if bits == "f64" else 2 * own
    test.assertLess(error(sampled, theirs["grad_f64"]), bound)


def check_forward(test, name: str, tsv: str, **options) -> None:
    """Our float64 logits and gradients are those of `golden_forward.json`."""
    stored = json.loads((MODELS / "golden_forward.json").read_text())[tsv]
    weights = reference.forward_weights(MODELS / f"{tsv}.tsv")
    images = reference.forward_images(stored["input_size"])
    logits, gradient = logits_and_gradients(name, weights, images, dtype="float64", **options)
    for row, key in enumerate(("logits0", "logits1")):
        theirs = np.array(stored[key])
        test.assertLess(relative(logits[row, : len(theirs)], theirs), 1e-9)
    test.assertLess(abs(logits.sum() / stored["logit_sum"] - 1), 1e-9)
    test.assertLess(abs(np.abs(gradient).sum() / stored["grad_abs_sum"] - 1), 1e-7)
    test.assertLess(abs(gradient[0, 5, 5, 0] / stored["grad_0_0_5_5"] - 1), 1e-7)


def torch_logits_and_gradients(net, images, dtype: str):
    """The same two of a PyTorch network, in evaluation mode."""
    import torch

    wide = getattr(torch, dtype)
    net = net.to(wide).eval()
    x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=wide).requires_grad_()
    logits = net(x)
    loss = torch.nn.functional.log_softmax(logits, 1)[:, 0].sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)


@functools.cache
def torch_network(name: str, num_classes: int, image_size: int):
    """The reference network with its weights spread enough that each of them matters."""
    import torch

    from tests.support import torch_modules

    net = torch_modules.network(name, num_classes=num_classes, img_size=image_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.is_floating_point() and value.ndim < 2:
                base = 1.0 if key.endswith("weight") else 0.5 * ("gamma" in key)
                value.copy_(base + 0.1 * noise)
            elif value.is_floating_point():
                value.copy_(noise / value[0].numel() ** 0.5)
    return net


def check_reference(test, name: str, *, image_size: int, num_classes: int = 10, batch=2) -> None:
    """Logits and input gradients are those of the installed reference, float64 and float32."""
    try:
        import torch  # noqa: F401

        from jaxrobust.publish import torch_networks  # noqa: F401
    except ImportError:
        test.skipTest(paths.PARITY)
    from jaxrobust.publish.torch_networks import state_arrays

    net = torch_network(name, num_classes, image_size)
    images = np.random.default_rng(1).random((batch, image_size, image_size, 3), np.float32)
    options = {"num_classes": num_classes, "image_size": image_size}
    theirs64 = torch_logits_and_gradients(net, images, "float64")
    theirs32 = torch_logits_and_gradients(net, images, "float32")
    weights = state_arrays(net)
    ours64 = logits_and_gradients(name, weights, images, dtype="float64", **options)
    ours32 = logits_and_gradients(name, weights, images, **options)
    test.assertLess(relative(ours64[0], theirs64[0]), 1e-9)
    test.assertLess(relative(ours64[1], theirs64[1]), 1e-7)
    test.assertLess(relative(ours32[0], theirs64[0]), 1e-5)
    # Rounding in float32, in any order of the sums: twice what the reference itself has.
    own = relative(theirs32[1], theirs64[1])
    test.assertLess(relative(ours32[1], theirs64[1]), 2 * own)
