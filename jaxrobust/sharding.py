"""Where arrays live: one mesh axis over all devices, state replicated, batch split."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along the axis `data`; Auto, because JAX's default, Explicit, asks the network
    code for shardings.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_image(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def global_arrays(mesh: Mesh, local):
    """Arrays over the mesh from what this process holds of them (the same tree of np.ndarray)."""
    sharding = by_image(mesh)
    return jax.tree.map(
        lambda part: jax.make_array_from_process_local_data(sharding, np.asarray(part)), local
    )
