"""Which devices compute."""

import jax


def count() -> int:
    """Count the devices that compute; the CPU counts once per process, however JAX splits it."""
    on_cpu = jax.devices()[0].platform == "cpu"
    return jax.process_count() if on_cpu else jax.device_count()


def devices() -> str:
    """Return the names and number of the devices that compute."""
    return f"{count()} x {jax.devices()[0].device_kind}"
