"""Writes the cycles of our TPU kernels in the compiler's final schedules, over the counted ones.

`python tools/generate/refresh_schedules.py` writes `jaxrobust/models/scheduled.json`, by which
kernels declare their cycles; review it. Chips as arguments, such as `v5e:2x2`, refresh these alone;
with `--print`, it prints scheduled over declared cycles instead. Needs `.[tpu-aot]`.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.hlo import bundles

FILE = ROOT / "jaxrobust" / "models" / "scheduled.json"
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1")
BATCH = 16
# Blocks with every kernel: ViT-S, CaiT-S12, XCiT-S12, ConvNeXt-T, ConvNeXt-L's last stage, and
# InternImage-T.
NETWORKS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("vit_s_cvst", 224, {"depth": 1}),
    ("cait_s12", 224, {"depth": 1, "class_depth": 1}),
    ("xcit_s12", 224, {"depth": 1}),
    ("convnext_t", 224, {"depths": (1, 1), "dims": (96, 192)}),
    ("convnext_t", 28, {"depths": (1,), "dims": (1536,)}),
    ("internimage_t", 224, {"depths": (1,), "dims": (64,), "groups": (4,)}),
)


def calls(jaxpr: Any) -> Iterator[Any]:
    """Yield the calls of kernels in a program and in the programs inside it."""
    import jax

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        programs = jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda p: hasattr(p, "eqns")
        )
        for program in programs:
            if hasattr(program, "eqns"):
                yield from calls(getattr(program, "jaxpr", program))


def declared(call: Any) -> int:
    """Return the cycles that a call of a kernel declares."""
    return int(call.params["metadata"]["cycles"])


def kernels(chip: Any) -> dict[str, Any]:
    """Return the heaviest call of each kernel in a chip's networks."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxrobust import models

    found: dict[str, Any] = {}
    with jax.set_mesh(jax.sharding.Mesh(np.array([chip]), ("chip",))):
        for network, side, options in NETWORKS:
            net = models.create(network, image_size=side, dtype="bfloat16", **options)
            params, stats = jax.eval_shape(lambda net=net: net.init(jax.random.key(0)))
            images = jax.ShapeDtypeStruct((BATCH, side, side, 3), jnp.float32)

            def total(params: Any, images: Any, stats: Any, net: Any, train: bool) -> Any:
                key = jax.random.key(0)
                return net.apply(params, stats, images, train=train, key=key)[0].sum()

            for train in (False, True):
                run = functools.partial(total, net=net, train=train)
                program = jax.make_jaxpr(jax.grad(run, argnums=(0, 1) if train else 1))
                for call in calls(program(params, images, stats).jaxpr):
                    name = call.params["name"]
                    found[name] = max(found.get(name, call), call, key=declared)
    return found


def measured(topology_name: str, folder: Path) -> tuple[str, dict[str, float]]:
    """Return a chip's name, and scheduled over declared cycles of each kernel."""
    from jaxrobust.doctor.programs import topology

    chip = topology.devices(topology_name)[0]
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array([chip]), ("chip",)), PartitionSpec())
    ratios: dict[str, float] = {}
    for name, call in sorted(kernels(chip).items()):

        def kernel(*operands: Any, call: Any = call) -> Any:
            return call.primitive.bind(*operands, **call.params)

        arguments = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding) for v in call.invars
        ]
        jax.jit(kernel).lower(*arguments).compile()
        found = bundles.schedules(folder)
        (cycles,) = (s.cycles for work, s in found.items() if work.split(".")[0] == "kernel")
        ratios[name] = cycles / declared(call)
        print(topology_name, name, f"{ratios[name]:.2f}", file=sys.stderr)
    return chip.device_kind, ratios


def main(arguments: list[str]) -> None:
    chips = [argument for argument in arguments if argument != "--print"] or [*CHIPS]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = bundles.flags(Path(folder))
        fresh = dict(measured(name, Path(folder)) for name in chips)
    if "--print" in arguments:
        return print(json.dumps(fresh))
    table: dict[str, dict[str, float]] = json.loads(FILE.read_text())
    for chip, ratios in fresh.items():
        old = table.get(chip, {})
        table[chip] = {name: round(old.get(name, 1) * r, 2) for name, r in ratios.items()}
    FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
