"""What a step of an attack costs in one block of a network on a TPU that is not here.

python tools/bench_block.py vit_s --topology v5e:2x2 [--batch 88]

Compiles the forward pass and the gradient for the block's input, in bfloat16, for one chip, which
takes a minute or two where a whole step takes many. Prints arithmetic, memory traffic with the
padding of tiles, the compiler's cycles, what kernels declare, and temporary memory.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxrobust.runtime.commandline.arguments import Arguments
from tools import guarded


def block(name: str) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """Look up what makes a block, and the shape of its input without the batch."""
    from jaxrobust.models.families import convnext, vit

    variant = vit.VARIANTS["vit_s"]
    blocks: dict[str, Any] = {"vit_s": (functools.partial(vit.Block, variant), (197, variant.dim))}
    for stage, (dim, side) in enumerate(zip((96, 192, 384, 768), (56, 28, 14, 7), strict=True)):
        make = functools.partial(convnext.Block, dim, 1e-6)
        blocks[f"convnext_t:{stage + 1}"] = make, (side, side, dim)
    if name not in blocks:
        raise ValueError(f"{name} is no known block; one of {', '.join(blocks)}")
    return blocks[name]


def measure(args: argparse.Namespace) -> None:
    from jaxrobust.runtime.devices import topology

    chips = topology.devices(args.topology)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxrobust.runtime.devices import hardware

    make, shape = block(args.block)
    sharding = NamedSharding(Mesh(np.array(chips[:1]), ("chip",)), PartitionSpec())
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))

    def abstract(array: Any) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)
        y, pull = jax.vjp(lambda x: nnx.merge(graph, narrow)(x, None, False), x)
        return pull(y)

    images = jax.ShapeDtypeStruct((args.batch, *shape), jnp.bfloat16, sharding=sharding)
    figures = topology.compiled(step, jax.tree.map(abstract, state), images)
    chip = hardware.chip(chips[0].device_kind)
    flops = figures["flops_executable"]
    print(f"{args.block}, {args.batch} images, bfloat16, {chips[0].device_kind}")
    print(f"  memory traffic {figures['hbm_bytes'] / 1e6:,.0f} MB")
    topology.show(figures, chip, flops=flops, images=args.batch)


def main() -> None:
    parser = Arguments(__doc__)
    parser.add_argument("block", help="Block: vit_s, or convnext_t:STAGE with a stage from 1 to 4.")
    parser.flag("topology", default="v5e:2x2", help="Slice for one of whose chips it compiles.")
    parser.flag("batch", type=int, default=88, help="Number of images.")
    measure(parser.parse_args())


if __name__ == "__main__":
    guarded("bench_block", main)
