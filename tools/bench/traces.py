"""`python -m tools.bench.traces [NETWORK ...]`: seconds until XLA has a program to compile.

Traces each network in a fresh process: its logits, then the image gradient as in an attack, and the
parameter gradient. JAX traces all of this, whatever its cache of compiled programs contains.
Kernels of all platforms are traced on every platform.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust import models
from jaxrobust.runtime.commandline.arguments import Arguments

NETWORKS = (
    *("convnext_t_cvst", "convnext_b_cvst", "vit_b_cvst", "xcit_s12", "swin_b", "internimage_t"),
    "wide_resnet50_2",
)
SIZE = 224


def seconds(function: Callable[..., Any], *operands: Any) -> float:
    """Measure the first trace of a function."""
    start = time.perf_counter()
    jax.jit(function).trace(*operands)
    return time.perf_counter() - start


def of_network(name: str) -> list[float]:
    """Measure the logits, the gradient for images and the gradient for parameters."""
    net = models.create(name, image_size=SIZE)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)

    def logits(params: Any, stats: Any, images: Any) -> Any:
        return net.apply(params, stats, images)[0]

    def loss(*given: Any) -> Any:
        return logits(*given).sum()

    functions = logits, jax.grad(loss, argnums=2), jax.grad(loss, argnums=0)
    return [seconds(function, params, stats, images) for function in functions]


def main() -> None:
    parser = Arguments(__doc__)
    parser.add_argument("networks", nargs="*", help="Names of networks; default: seven.")
    print(f"{'seconds of':20s}    logits  of images  of parameters")
    for name in parser.parse_args().networks or NETWORKS:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            value, image, parameters = alone.submit(of_network, name).result()
        print(f"{name:20s} {value:9.2f} {image:10.2f} {parameters:14.2f}", flush=True)


if __name__ == "__main__":
    main()
