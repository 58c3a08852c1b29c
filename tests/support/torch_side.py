"""A converted network beside PyTorch's own, in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust.interop.torch import Converted, of_exported


def converted(net: torch.nn.Module, image: tuple[int, ...]) -> Converted:
    """Convert a network in float64 for images H, W, C."""
    example = torch.zeros(2, image[2], *image[:2])
    sizes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an LSTM's weights
        exported = torch.export.export(net, (example.double(),), dynamic_shapes=sizes, strict=False)
    with jax.enable_x64(True):
        return of_exported(exported)._replace(module=net)


def differences(network: Converted, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per result |difference| / max|reference|, and the same of all gradients."""
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    reference = network.module(x)
    cotangent = np.cos(np.arange(reference.numel())).reshape(reference.shape)
    (gradient,) = torch.autograd.grad(reference, x, torch.from_numpy(cotangent))
    gradient, reference = gradient.numpy().transpose(0, 2, 3, 1), reference.detach().numpy()

    @jax.jit
    def both(images, cotangent):
        logits, back = jax.vjp(network.logits_fn, images)
        return logits, back(cotangent)[0]

    with jax.enable_x64(True):
        ours = jax.device_get(both(jnp.asarray(images), jnp.asarray(cotangent)))
    return (
        np.abs(ours[0] - reference) / np.abs(reference).max(),
        np.abs(ours[1] - gradient) / np.abs(gradient).max(),
    )
