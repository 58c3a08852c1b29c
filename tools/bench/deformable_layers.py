"""Milliseconds of DCNv3's sampling in each stage of InternImage-T, by formula and in PyTorch.

PyTorch's is the pure-PyTorch core: all nine points by one `grid_sample`. Both compute the value and
the gradients for value, offsets and mask. Offsets are uniform in +-`spread` pixels; where windows
are used, those beyond two are sampled by gathers. With --points PyTorch samples one point after the
other, as exported modules do, which hold one map at once. With --topology nothing runs: formulas
are compiled in bfloat16 for a chip of that slice, windows without their branch of gathers, and what
the compiler counts is printed.

python -m tools.bench.deformable_layers [--batch 8] [--spread 1.5] [--only planes] [--stages 0,2]
python -m tools.bench.deformable_layers --topology v5e:2x2 --only products,gathers --batch 16
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.doctor.programs import topology
from jaxrobust.models.families.internimage import VARIANTS
from jaxrobust.models.kernels.deformable import operator
from jaxrobust.models.kernels.deformable.places import GridGeometry
from jaxrobust.runtime.commandline.arguments import Arguments
from tools.bench_layers import best

Operands = list[np.ndarray]


def operands(batch: int, size: int, channels: int, groups: int, spread: float) -> Operands:
    """Return value, offsets, mask and the output's gradient of one layer."""
    random = np.random.default_rng(0)
    value = random.standard_normal((batch, size, size, channels))
    offsets = random.uniform(-spread, spread, (batch, size, size, groups * 18))
    mask = random.dirichlet(np.ones(9), (batch, size, size, groups)).reshape(*value.shape[:3], -1)
    arrays = (value, offsets, mask, random.standard_normal(value.shape))
    return [np.asarray(a, np.float32) for a in arrays]


def of_jax(name: str, given: Operands, groups: int, repeats: int) -> dict[str, Any]:
    """Time a formula: wall and processor milliseconds, and temporary megabytes of the gradients."""
    forward = functools.partial(operator.deformable, groups=groups, implementation=name)

    def back(value, offsets, mask, g):
        return jax.vjp(forward, value, offsets, mask)[1](g)

    arrays = [jnp.asarray(a) for a in given]
    run, back = (jax.jit(f).lower(*a).compile() for f, a in ((forward, arrays[:3]), (back, arrays)))
    memory: Any = back.memory_analysis()
    return {
        "forward": best(lambda: jax.block_until_ready(run(*arrays[:3])), repeats),
        "gradients": best(lambda: jax.block_until_ready(back(*arrays)), repeats),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
    }


def of_compiler(name: str, shapes: list[jax.ShapeDtypeStruct], groups: int) -> dict[str, Any]:
    """Compile a formula, windows without gathers, for the chip of the shapes."""
    formula = operator.IMPLEMENTATIONS[name]
    plain = getattr(formula, "formulas", formula)
    geometry = GridGeometry(shapes[0].shape[1:3], groups)

    def run(part: str, *arrays: jax.Array) -> Any:
        def alone(*some: jax.Array) -> Any:
            out = getattr(plain, part)(geometry, *some)
            return out if plain is formula else out[0]

        return alone(*arrays) if plain is formula else formula.by_images(alone, *arrays)

    said = {}
    for part, arrays in (("forward", shapes[:3]), ("backward", shapes)):
        found = topology.compiled(jax.jit(functools.partial(run, part)), *arrays)
        said[part] = {
            "thousand_cycles": round(found["cycles"] / 1e3),
            "hbm_mb": round(found["hbm_bytes"] / 1e6),
            "temporary_mb": round(found["temporary_bytes"] / 1e6, 1),
            "compile_s": round(found["compile_s"], 1),
        }
    return said


def _all_at_once(value: Any, offsets: Any, mask: Any) -> Any:
    """Sample [N, D, H, W] at all nine places in one call; arguments as of `deformed`."""
    import torch

    height, width = value.shape[2:]
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    grid = torch.stack([torch.arange(9) // 3 - 1, torch.arange(9) % 3 - 1], -1)
    at = pixels + grid[:, None, None] + offsets
    size = torch.tensor([width, height])
    at = ((2 * at + 1) / size - 1).flatten(1, 2)
    sampled = torch.nn.functional.grid_sample(value, at, align_corners=False)
    return (sampled.unflatten(2, (9, height)) * mask[:, None]).sum(2)


def of_torch(given: Operands, groups: int, repeats: int, by_points: bool) -> dict[str, Any]:
    """Time PyTorch's: the gradients reuse one forward pass."""
    import torch

    from jaxrobust.publish.torch_modules.internimage import deformed

    core: Callable = functools.partial(deformed, scale=1.0) if by_points else _all_at_once

    def forward(value, offsets, mask):
        value = value.permute(0, 3, 1, 2).unflatten(1, (groups, -1)).flatten(0, 1)
        offsets = offsets.unflatten(3, (groups, 9, 2)).permute(0, 3, 4, 1, 2, 5).flatten(0, 1)
        mask = mask.unflatten(3, (groups, 9)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        out = core(value, offsets, mask).unflatten(0, (-1, groups))
        return out.flatten(1, 2).permute(0, 2, 3, 1)

    *tensors, g = (torch.tensor(a) for a in given)
    for tensor in tensors:
        tensor.requires_grad_()
    out = forward(*tensors)
    with torch.no_grad():
        alone = best(lambda: forward(*tensors), repeats)
    back = best(lambda: torch.autograd.grad(out, tensors, g, retain_graph=True), repeats)
    return {"forward": alone, "gradients": back}


def main() -> None:
    parser = Arguments(__doc__)
    parser.flag("batch", type=int, default=8, help="Batch size; default: %(default)s.")
    parser.flag("repeats", type=int, default=5, help="Number of repetitions; default: %(default)s.")
    parser.flag("spread", type=float, default=1.5, help="Largest offset; default: %(default)s px.")
    parser.flag("only", default="planes,torch", help="Formulas, with commas; default: %(default)s.")
    parser.flag("stages", default="0,1,2,3", help="Stages of the network; default: %(default)s.")
    parser.flag("topology", help="Compile for a chip of this slice, such as v5e:2x2.")
    parser.flag("points", action="store_true", help="PyTorch samples one point after the other.")
    args = parser.parse_args()
    v = VARIANTS["internimage_t"]
    chips = topology.devices(args.topology) if args.topology else []
    for stage in map(int, args.stages.split(",")):
        size, channels, groups = 56 >> stage, v.dims[stage], v.groups[stage]
        given = operands(args.batch, size, channels, groups, args.spread)
        for name in args.only.split(","):
            if chips:
                where = jax.sharding.SingleDeviceSharding(chips[0])
                kind = functools.partial(jax.ShapeDtypeStruct, dtype="bfloat16", sharding=where)
                times = of_compiler(name, [kind(array.shape) for array in given], groups)
            elif name == "torch":
                times = of_torch(given, groups, args.repeats, args.points)
            else:
                times = of_jax(name, given, groups, args.repeats)
            print(json.dumps({"stage": stage, "shape": given[0].shape, "by": name} | times))


if __name__ == "__main__":
    main()
