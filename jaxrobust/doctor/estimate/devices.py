"""The devices of an estimate: present ones, or a number of chips by name."""

import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from jaxrobust.doctor.programs import gpus, topology
from jaxrobust.runtime.text.spelling import meant

if TYPE_CHECKING:  # imports JAX, which reads the environment that `prepare` sets
    from jaxrobust.runtime.devices.hardware import Chip

HERE = ("cpu", "gpu", "tpu")
# Names as users write them -> device kinds of JAX. TPU v2 and v3 are missing: JAX counts half of
# such a chip as a device, as for TPU7x (Ironwood).
_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "v7x": "TPU7x",
    "a10": "NVIDIA A10",
    "a10g": "NVIDIA A10G",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "h100": "NVIDIA H100 SXM",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h100-nvl": "NVIDIA H100 NVL",
    "h200": "NVIDIA H200",
    "gh200": "NVIDIA GH200",
    "b200": "NVIDIA B200",
}
# Slices available on Cloud TPU: two-dimensional ones, small three-dimensional ones, and any with
# sides that are multiples of 4 up to this many chips (cloud.google.com/tpu/docs, each version).
_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SPACE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_LARGEST = {"v4": 4096, "v5p": 6144, "v7x": 9216}
_HALVED = {"TPU7x": 2}  # devices per chip


class Target(NamedTuple):
    """Devices, present or not."""

    name: str  # as written by the user
    kind: str  # JAX's device kind
    chips: int  # number of JAX's devices, which for TPU7x are halves of chips
    chip: "Chip | None"  # its peaks; None for a CPU or an unlisted device
    here: bool
    compiles: bool  # whether a compiler for it is installed, even if it is not here
    slices: int = 1  # of equal size, of which `chips` counts all

    @property
    def whole(self) -> int:
        """The number of chips that are rented and billed by the hour."""
        return self.chips // _HALVED.get(self.kind, 1)

    @property
    def float32(self) -> float:
        """The FLOP/s of all chips in float32, the type of tests and attacks.

        By default a TPU rounds the operands of products to bfloat16, and a GPU to TF32, for which
        NVIDIA quotes half the speed of bfloat16.
        """
        assert self.chip is not None, "only listed chips have names"
        return self.chips * self.chip.flops / (2 if self.kind.startswith("NVIDIA") else 1)


def prepare(name: str) -> None:
    """Make JAX compute on the CPU if the devices are not present; call before importing JAX."""
    if name == "cpu" or name not in HERE:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if name.startswith("v"):
        os.environ.update(topology.ENVIRONMENT)


def target(name: str, slices: int = 1) -> Target:
    """Look up the devices named by `--on`; a `ValueError` lists the known names."""
    if slices > 1 and not re.match(r"v\d", name):
        raise ValueError(
            f"--num_slices {slices} counts TPU slices; name one after --on, such as v5e:8x8, or "
            f"leave --num_slices out for {name}"
        )
    if name in HERE:
        return _present(name)
    kind, _, shape = name.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"--on {name}: {kind!r} is not a known device; {meant(kind, (*HERE, *_KINDS))}"
        )
    tpu = kind.startswith("v")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*" if tpu else r"[1-9]\d*", shape):
        example = f"{kind}:4x4" if tpu else f"{kind}:8"
        raise ValueError(f"--on {name} lacks the number of chips; write, for example, {example}")
    sides = [int(side) for side in shape.split("x")]
    rented = shape in _PLANE
    if kind in _LARGEST:
        in_space = len(sides) == 3 and not any(side % 4 for side in sides)
        rented = shape in _SPACE or (in_space and math.prod(sides) <= _LARGEST[kind])
    if tpu and not rented:
        some = f"{kind}:2x2x4 or {kind}:4x4x8" if kind in _LARGEST else f"{kind}:4x4 or {kind}:8x8"
        raise ValueError(f"--on {name} is not a slice of TPU {kind}; write, for example, {some}")
    from jaxrobust.runtime.devices import hardware

    chip = hardware.chip(_KINDS[kind])
    chips = math.prod(sides) * _HALVED.get(_KINDS[kind], 1)
    # The compiler knows no slices smaller than a host of four chips.
    by_libtpu = tpu and chips > 1 and importlib.util.find_spec("libtpu") is not None
    compiles = by_libtpu or (kind in gpus.CHIPS and chips <= gpus.MOST and gpus.available())
    return Target(name, _KINDS[kind], slices * chips, chip, False, compiles, slices)


def _present(name: str) -> Target:
    import jax

    from jaxrobust.runtime.devices import hardware

    try:
        devices = jax.devices(name)
    except RuntimeError as error:
        raise ValueError(
            f"--on {name}: JAX finds no {name.upper()} on this machine; write cpu, gpu or tpu for "
            "the devices of this machine, or chips such as v5e:8x8 or h100:8"
        ) from error
    # Training uses one CPU device, which has all cores.
    count = 1 if name == "cpu" else len(devices)
    kind = devices[0].device_kind
    return Target(name, kind, count, hardware.chip(kind), True, True)
