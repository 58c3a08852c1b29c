"""Turns networks into functions, and explains what is wrong with those that cannot be called."""

import sys
from collections.abc import Callable
from typing import Any

import jax

TRAINING = (
    "changes its state or draws random numbers while it is traced ({}); put it into evaluation "
    "mode, without dropout or batch norm updates: model.eval() in NNX, train=False in Linen, "
    "is_training=False in Haiku, equinox.nn.inference_mode(model)"
)
# Flax's errors, by name: only models import Flax.
_FLAX = ("TraceContextError", "ModifyScopeVariableError", "InvalidRngError")
# Equinox and Haiku raise Python's own errors when their dropout gets no key.
_EQUINOX = (
    "is an Equinox module, which takes a single image; pass jax.vmap(model), or, if the model "
    "expects channels first, jax.vmap(lambda image: model(image.transpose(2, 0, 1)))"
)
_NO_KEY = ("Dropout requires a key", "non-None PRNGKey")


def as_function(network: object) -> Callable[[Any], Any]:
    """Return a network as a function of images: a callable, or a pair (Linen module, variables).

    Libraries are recognized without importing them.
    """
    linen, torch = sys.modules.get("flax.linen"), sys.modules.get("torch")
    if torch is not None and isinstance(network, torch.nn.Module):
        raise ValueError(
            "the network is a PyTorch module; convert it with `logits_fn, weights = "
            "jaxrobust.interop.torch.from_module(module, images)` and pass logits_fn"
        )
    if isinstance(network, tuple) and len(network) == 2 and linen is not None:
        module, variables = network
        if isinstance(module, linen.Module):
            return jax.tree_util.Partial(module.apply, variables)
    if callable(network) and not (linen is not None and isinstance(network, linen.Module)):
        return network
    raise ValueError(
        f"the network is of type {type(network).__name__}; pass a function, an NNX module, "
        "jax.vmap of an Equinox module, or a pair (linen_module, variables)"
    )


def remedy(error: Exception, network: Any = None) -> str:
    """Return the remedy for a network that cannot be traced, and the line in its file; or ""."""
    cause = str(error).split("\n")[0].split(" (https:")[0].rstrip(".")
    leaks = isinstance(error, jax.errors.UnexpectedTracerError) or type(error).__name__ in _FLAX
    if isinstance(error, jax.errors.TracerArrayConversionError):
        text = (
            "turns its images into NumPy arrays; write it with jax.numpy, so that it can be "
            "differentiated and compiled"
        )
    elif isinstance(error, jax.errors.ConcretizationTypeError):
        text = (
            f"uses the value of an array in Python ({cause}); use jnp.where or jax.lax.cond, and "
            "pass options such as train=False as Python values; under your own jax.jit, bind them "
            "in the function: Partial(lambda v, x: net.apply(v, x, train=False), variables)"
        )
    elif leaks or any(words in cause for words in _NO_KEY):
        text = TRAINING.format(cause)
    elif _is_equinox(network):
        text = _EQUINOX
    else:
        return ""
    from jaxrobust.runtime.commandline import functions  # it loads seven modules

    place = functions.place_of(error)
    return f"{text}; see {place}" if place else text


def _is_equinox(network: Any) -> bool:
    if isinstance(network, jax.tree_util.Partial):
        return any(map(_is_equinox, (network.func, *network.args)))
    equinox: Any = sys.modules.get("equinox")
    return equinox is not None and isinstance(network, equinox.Module)


def called(network: Callable[[Any], Any], points: Any, *, logits: bool = False) -> Any:
    """Call a network, of `logits` or any outputs; `ValueError` says why it cannot be called."""
    try:
        return network(points)
    except Exception as error:
        check_layout(points.shape)
        image = jax.ShapeDtypeStruct(points.shape[1:], points.dtype)
        if words := remedy(error, network) or of_one_image(network, image, logits=logits):
            raise ValueError(f"logits_fn {words}") from error
        raise


def check_layout(shape: tuple[int, ...]) -> None:
    """Raise if images of a shape look as if their channels came before their sides."""
    if len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) > 4:
        raise ValueError(
            f"images of shape {shape} look channels-first; pass [N, H, W, C]: "
            "images.transpose(0, 2, 3, 1)"
        )


def of_one_image(
    call: Callable[..., Any], *image: jax.ShapeDtypeStruct, logits: bool = True
) -> str:
    """Return the remedy for a network that takes a single image; "" for others."""
    try:
        outputs = jax.eval_shape(lambda *image: call(*image), *image)
    except Exception:
        return ""
    if logits and len(getattr(outputs, "shape", ())) != 1:
        return ""
    return "takes a single image, not a batch; wrap it in jax.vmap"
